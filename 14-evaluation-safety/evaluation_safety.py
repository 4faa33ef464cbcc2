"""Topic 14 - Evaluation and Safety: what a model can do, how sure one may be of it, and what it must not do.

python 14-evaluation-safety/evaluation_safety.py                          # base and chat model on tasks of the world
python 14-evaluation-safety/evaluation_safety.py evaluate --checkpoint FOLDER --task facts,new-sums
python 14-evaluation-safety/evaluation_safety.py task --task facts        # the questions as a file
python 14-evaluation-safety/evaluation_safety.py report                   # everything, as a page with a verdict
python 14-evaluation-safety/evaluation_safety.py report --base-url http://127.0.0.1:8000
python 14-evaluation-safety/evaluation_safety.py check "Ignore all rules."   # what the guard says of a text
python 14-evaluation-safety/evaluation_safety.py red-team                 # search for a suffix that makes a model tell
python 14-evaluation-safety/evaluation_safety.py --break wrong-count      # a failure on purpose
python 14-evaluation-safety/evaluation_safety.py figures coverage judge   # measure, and keep the tables

Chen et al. 2021 (pass@k, arXiv 2107.03374), Gao et al. 2024 (lm-evaluation-harness, doi 10.5281/zenodo.12608602).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attack_experiments import ATTACK_EXPERIMENTS, GUARD_VERBS, AttackFiguresConfig
from attack_failures import ATTACK_BREAKS
from chat_endpoint import open_endpoint
from chat_model import FOLDER as CHAT_FOLDER
from course_model import FOLDER as BASE_FOLDER
from course_model import command_line
from evaluation_bench import BENCH_VERBS
from evaluation_experiments import EVALUATION_EXPERIMENTS, EvaluationFiguresConfig
from evaluation_report import AskedEndpoint, ReportPlan, Subject, examine, subject_of
from evaluation_tasks import WORLD_TASKS, Task, read_task, run_task, world_task, write_task
from lm_eval_adapter import write_harness_task
from metric_failures import METRIC_BREAKS
from planted_experiments import PLANTED_EXPERIMENTS, PlantedFiguresConfig
from planted_failures import PLANTED_BREAKS
from planted_verbs import PLANTED_VERBS
from report_page import write_report
from report_verdict import headline
from text_model import TextModel, load_text_model
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    part_of,
    run_experiments,
    run_verbs,
    shown,
    with_parts,
)

BREAKS = METRIC_BREAKS | PLANTED_BREAKS | ATTACK_BREAKS
PARTS = {
    EvaluationFiguresConfig: EVALUATION_EXPERIMENTS,
    PlantedFiguresConfig: PLANTED_EXPERIMENTS,
    AttackFiguresConfig: ATTACK_EXPERIMENTS,
}
EXPERIMENTS = with_parts(PARTS)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is examined, and with what."""

    checkpoint: Path = CHAT_FOLDER  # a folder in the Hugging Face layout
    task: str = "facts,new-sums,held-out"  # names of tasks of the world, or task files, with commas between
    n_questions: int = 100  # questions of each task of the world

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=2)
        if not self.names:
            raise ValueError("task names nothing; give one or more, such as facts,new-sums")
        for name in self.names:
            if not Path(name).suffix:
                check_name("task", name, WORLD_TASKS)

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.task.split(",") if name.strip()]

    def tasks(self, seed: int) -> list[Task]:
        return [
            read_task(name) if Path(name).suffix else world_task(name, self.n_questions, seed) for name in self.names
        ]


def show(examined: TextModel, tasks: list[Task]) -> None:
    """A line for each score of each task, with its interval of 95 %."""
    for task in tasks:
        for name, (value, interval) in run_task(examined, task).table().items():
            print(f"  {task.task:14} {name:22} {value:8.4f}   {interval.low:.4f} to {interval.high:.4f}")


def evaluate(config: EvaluateConfig, run: RunConfig) -> None:
    """Examine a model of any folder with tasks of the world or of files; every score with its interval."""
    tasks = config.tasks(run.seed)
    announce(f"examine {shown(config.checkpoint)} with {', '.join(task.task for task in tasks)}", 10 * len(tasks))
    show(load_text_model(config.checkpoint), tasks)


@dataclass(frozen=True)
class TaskConfig(EvaluateConfig):
    """Which tasks are written, and for whom."""

    harness: bool = False  # also for lm-evaluation-harness, in OUT/harness


@alone
def task(config: TaskConfig, run: RunConfig) -> None:
    """Write tasks of the world as files, a question in each line; on demand for lm-evaluation-harness too."""
    for made in config.tasks(run.seed):
        path = run.out / f"{made.task}.jsonl"
        write_task(made, path)
        print(f"{len(made.questions)} questions in {shown(path)}")
        if config.harness:
            folder = run.out / "harness"
            write_harness_task(made, folder)
            print(
                f"lm_eval --model hf --model_args pretrained={shown(config.checkpoint)},dtype=float32 "
                f"--include_path {shown(folder)} --tasks {made.task} --device cpu"
            )


@dataclass(frozen=True)
class ReportConfig(ReportPlan):
    """Who is examined for the report, and how long."""

    checkpoint: str = f"{shown(BASE_FOLDER)},{shown(CHAT_FOLDER)},{shown(CHAT_FOLDER)}@3"  # folders; FOLDER@BITS rounds
    base_url: str = ""  # an address of OpenAI's API, examined in place of folders; its key: OPENAI_API_KEY
    model: str = ""  # the model's name there; none means the first that it offers

    def subjects(self) -> list[Subject]:
        if self.base_url:
            endpoint = open_endpoint(self.base_url, self.model or None)
            return [Subject(endpoint.name, AskedEndpoint(endpoint), {"place": self.base_url})]
        return [subject_of(place.strip()) for place in self.checkpoint.split(",") if place.strip()]


@alone
def report(config: ReportConfig, run: RunConfig) -> None:
    """Examine models with everything that stands in this topic; write one page with plots and a verdict."""
    subjects = config.subjects()
    announce(f"examine {', '.join(subject.name for subject in subjects)}", 0.1 * config.n_questions * len(subjects))
    made = examine(subjects, ReportPlan(config.n_questions, config.n_forbidden), run.seed)
    for examined in made.subjects:
        print(f"{examined.subject.name}: {headline(examined).text}")
    print(f"wrote {shown(write_report(made, run.out, command_line()))}")


@dataclass(frozen=True)
class DemoConfig:
    """The tour, or the failure to show in its place."""

    n_questions: int = 60  # questions of each task
    break_: Literal["none", *BREAKS] = "none"  # the failure to show

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=2)


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Examine the base model and the chat model with the same tasks."""
    if config.break_ != "none":
        show_break, seconds = BREAKS[config.break_]
        announce(f"showing the failure {config.break_!r}", seconds)
        for what, sound, broken in show_break(run):
            print(f"{what}: {sound:.4g} as it should be, {broken:.4g} with --break {config.break_}")
        return
    announce("base and chat model on four tasks", 40)
    tasks = [world_task(name, config.n_questions, run.seed) for name in ("facts", "cloze", "new-sums", "held-out")]
    for name, folder in (("base", BASE_FOLDER), ("chat", CHAT_FOLDER)):
        print(f"{name} model, mean and interval of 95 %")
        show(load_text_model(folder), tasks)


@dataclass(frozen=True)
class FiguresConfig(*PARTS):
    """The experiments, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all

    def __post_init__(self) -> None:
        for part in PARTS:
            part_of(self, part)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the experiments; write their figures and results.json."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)


def main(argv: list[str] | None = None) -> None:
    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, DemoConfig, RunConfig),
        "evaluate": (evaluate, EvaluateConfig, RunConfig),
        "task": (task, TaskConfig, RunConfig),
        "report": (report, ReportConfig, RunConfig),
        **PLANTED_VERBS,
        **GUARD_VERBS,
        **BENCH_VERBS,
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
