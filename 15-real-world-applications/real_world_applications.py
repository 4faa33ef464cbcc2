"""Topic 15 - Real-World Applications: a model put to work - documents, tools, code, pictures, an agent, a gate.

python 15-real-world-applications/real_world_applications.py                # three questions to these chapters
python 15-real-world-applications/real_world_applications.py ask "why divide by sqrt(d)?"   # this course's own chapters
python 15-real-world-applications/real_world_applications.py ask "who was hired?" --documents FOLDER
python 15-real-world-applications/real_world_applications.py chat           # the chatbot, in this terminal
python 15-real-world-applications/real_world_applications.py chat-server    # and as a page in your browser
python 15-real-world-applications/real_world_applications.py sandbox --selftest   # which attacks this machine holds
python 15-real-world-applications/real_world_applications.py release-gate   # may it ship? exit code 0 or 1
python 15-real-world-applications/real_world_applications.py life           # one model's life, stage by stage
python 15-real-world-applications/real_world_applications.py --break NAME   # a failure on purpose
python 15-real-world-applications/real_world_applications.py figures hallucination   # measure

Robertson and Zaragoza 2009 (BM25), Lewis et al. 2020 (retrieval-augmented generation, arXiv 2005.11401), Yao et al.
2022 (ReAct, arXiv 2210.03629), Liu et al. 2023 (LLaVA, arXiv 2304.08485).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

from dataclasses import dataclass
from typing import Any, Literal

from chatbot_experiments import CHAT_BREAKS, CHAT_EXPERIMENTS, CHAT_VERBS, ChatFiguresConfig
from code_experiments import CODE_EXPERIMENTS, CODE_VERBS, CodeFiguresConfig
from code_failures import CODE_BREAKS
from language_experiments import LANGUAGE_EXPERIMENTS, LANGUAGE_VERBS, LanguageFiguresConfig
from model_life import LIFE_EXPERIMENTS, LIFE_VERBS, LifeFiguresConfig
from operations_experiments import (
    OPERATIONS_BREAKS,
    OPERATIONS_EXPERIMENTS,
    OPERATIONS_VERBS,
    OperationsFiguresConfig,
)
from picture_experiments import PICTURE_EXPERIMENTS, PICTURE_VERBS, PictureFiguresConfig
from picture_failures import PICTURE_BREAKS
from rag_experiments import RAG_EXPERIMENTS, RAG_VERBS, AskConfig, RagFiguresConfig, ask
from retrieval_bench import BENCH_VERBS
from workbench import RunConfig, announce, check_name, part_of, run_experiments, run_verbs, with_parts

QUESTIONS = ("why divide by sqrt(d)?", "what does a KV cache keep?", "how do volcanoes erupt?")
BREAKS = CHAT_BREAKS | CODE_BREAKS | OPERATIONS_BREAKS | PICTURE_BREAKS
PARTS = {
    RagFiguresConfig: RAG_EXPERIMENTS,
    ChatFiguresConfig: CHAT_EXPERIMENTS,
    CodeFiguresConfig: CODE_EXPERIMENTS,
    OperationsFiguresConfig: OPERATIONS_EXPERIMENTS,
    PictureFiguresConfig: PICTURE_EXPERIMENTS,
    LanguageFiguresConfig: LANGUAGE_EXPERIMENTS,
    LifeFiguresConfig: LIFE_EXPERIMENTS,
}
EXPERIMENTS = with_parts(PARTS)


@dataclass(frozen=True)
class DemoConfig:
    """The tour, or the failure to show in its place."""

    break_: Literal["none", *BREAKS] = "none"  # the failure to show


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Ask the course's own chapters two questions that they answer, and one that they do not."""
    if config.break_ != "none":
        show_break, seconds = BREAKS[config.break_]
        announce(f"showing the failure {config.break_!r}", seconds)
        for what, sound, broken in show_break(run):
            print(f"{what}: {told(sound)} as it should be, {told(broken)} with --break {config.break_}")
        return
    announce("three questions to the course's own chapters", 15)
    for question in QUESTIONS:
        print(f"> {question}")
        ask(AskConfig(question=tuple(question.split())), run)


def told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


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
        **RAG_VERBS,
        **CHAT_VERBS,
        **CODE_VERBS,
        **OPERATIONS_VERBS,
        **PICTURE_VERBS,
        **LANGUAGE_VERBS,
        **LIFE_VERBS,
        **BENCH_VERBS,
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
