"""Topic 15 - Code model: a small decoder that writes functions, runs them, and learns from what passes.

    model = load_code_model()                                                    # code_model/, committed
    [bodies] = model.write([task.prompt], n=10, temperature=0.8, seed=0)
    scores = examine(model, draw_tasks(50, 1, "validation", (2, 3)), n_samples=20)   # {"pass@1": ..., "pass@10": ...}

python 15-real-world-applications/real_world_applications.py code keep the even numbers, then add them up
python 15-real-world-applications/real_world_applications.py code-train

Topic 09's model with the course tokenizer, trained on tasks of code_tasks.py and on functions of Python's standard
library, then by expert iteration: it writes programs for tasks without a reference, the sandbox says which pass, and
those become training data. Chen et al. 2021 (arXiv 2107.03374), Zelikman et al. 2022 (STaR, arXiv 2203.14465), Yuan et
al. 2023 (rejection sampling fine-tuning, arXiv 2308.01825), Olausson et al. 2023 (self-repair, arXiv 2306.09896).
"""

import copy
import datetime
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from code_tasks import CodeTask, draw_tasks, repair_prompt, repairs
from course_model import ModelSizes, command_line, start_small, tokenizer_sha256
from course_tokenizer import Chat, CourseTokenizer, load_course_tokenizer
from distillation import student_training
from fine_tuning_adaptation import DialogueBatches, answer_loss
from gpt2 import SamplingConfig
from huggingface_folders import WEIGHTS
from modern_llm_architectures import CausalLM
from policy_gradients import sample_responses
from python_text import python_text
from sandbox import Limits, Sandbox, Submission, Verdict, judge
from sequence_modeling import device_of
from text_metrics import mean_pass_at_k, score_texts
from training_transformers import fit, going_on
from workbench import (
    RunConfig,
    alone,
    announce,
    check_range,
    describe_machine,
    seed_everything,
    shown,
    write_atomically,
)

FOLDER = Path(__file__).parent / "code_model"
ROW = 256  # positions of a training row
LONGEST = 64  # tokens of a body
AT_ONCE = 256  # programs that are written together
LIMITS = Limits(wall_seconds=20.0)  # a machine that is busy is not a program that hangs


# Rows of ids


def code_row(tokenizer: CourseTokenizer, prompt: str, body: str) -> Chat:
    """A task as ids; the loss counts the body and its end. Prompt and body are encoded apart, as when it writes."""
    given = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    wanted = [*tokenizer.encode(body), tokenizer.eos_id]
    return Chat(given + wanted, [False] * len(given) + [True] * len(wanted))


def fitting(rows: Sequence[Chat]) -> list[Chat]:
    return [row for row in rows if len(row.ids) <= ROW + 1]


def real_rows(tokenizer: CourseTokenizer, split: str = "train") -> list[Chat]:
    """The functions of the standard library that fit into a row, every token counted."""
    documents = (tokenizer.encode_document(code).ids for code in python_text(split, ["functions"]))
    return fitting([Chat(ids, [True] * len(ids)) for ids in documents])


@dataclass(frozen=True)
class CodeTrainConfig:
    """How the code model is made."""

    n_tasks: int = 9000  # tasks of one and two operations with a reference
    n_long: int = 600  # tasks of three operations with a reference: few, so that there is something to learn alone
    base_steps: int = 700  # optimizer steps on references
    code_batch: int = 24  # programs of a step
    code_rate: float = 1e-2  # peak of the learning rate, for Muon
    real_share: float = 0.1  # fraction of each batch that is real Python
    n_rounds: int = 2  # rounds of expert iteration
    n_prompts: int = 200  # tasks of three operations without a reference, in each round
    n_samples: int = 8  # programs written for each
    tune_steps: int = 120  # optimizer steps of a round
    tune_rate: float = 3e-3  # peak of the learning rate in a round

    def __post_init__(self) -> None:
        check_range(self, "n_tasks", "n_long", "code_batch", "n_prompts", "n_samples", least=1)
        check_range(self, "base_steps", "tune_steps", least=2)
        check_range(self, "n_rounds", least=0)
        check_range(self, "code_rate", "tune_rate", above=0)
        check_range(self, "real_share", least=0, below=1)

    def batches(self, rows: Sequence[Chat], others: Sequence[Chat], share: float, seed: int) -> DialogueBatches:
        """Batches in which `others` make up a share."""
        return DialogueBatches(rows, self.code_batch, seed, ROW, others, share)


SIZES = ModelSizes(d_model=96, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=240)


def settings(config: CodeTrainConfig) -> dict[str, Any]:
    """The training's settings alone, also where the config is a larger one."""
    return {field.name: getattr(config, field.name) for field in fields(CodeTrainConfig)}


def reference_rows(tokenizer: CourseTokenizer, config: CodeTrainConfig, seed: int) -> list[Chat]:
    """Tasks with their references, and for a tenth of them a repair: a slip, its failure, the reference."""
    tasks = draw_tasks(config.n_tasks, 1000 + seed, "train", (1, 2)) + draw_tasks(
        config.n_long, 2000 + seed, "train", (3,)
    )
    pairs = [(task.prompt, task.body) for task in tasks]
    pairs += repairs(tasks[::10], seed)
    return fitting([code_row(tokenizer, *pair) for pair in pairs])


# The model with what turns text into programs


@dataclass
class CodeModel:
    """A causal model that writes bodies behind prompts."""

    model: CausalLM
    tokenizer: CourseTokenizer

    def write(self, prompts: Sequence[str], n: int = 1, temperature: float = 0.0, seed: int = 0) -> list[list[str]]:
        """n bodies for each prompt. Raises ValueError for a prompt that leaves no room for a body."""
        generator = torch.Generator(device_of(self.model)).manual_seed(seed)
        encoded = [[self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] for prompt in prompts]
        longest = max(map(len, encoded))
        if longest + LONGEST > self.model.config.max_seq_len:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for a body of {LONGEST}: the model reads "
                f"{self.model.config.max_seq_len}; shorten it"
            )
        rows = [row for row in encoded for _ in range(n)]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        sampling, made = SamplingConfig(LONGEST, temperature), [""] * len(rows)
        self.model.eval()
        for start in range(0, len(order), AT_ONCE):
            places = order[start : start + AT_ONCE]
            written = sample_responses(
                self.model, [rows[place] for place in places], self.tokenizer.eos_id, sampling, generator
            )
            for place, ids in zip(places, written, strict=True):
                made[place] = self.tokenizer.decode([token for token in ids if token != self.tokenizer.eos_id])
        return [made[start : start + n] for start in range(0, len(made), n)]

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


def load_code_model(folder: Path = FOLDER) -> CodeModel:
    """The committed code model, or one that `code-train` wrote elsewhere; ready to write."""
    return CodeModel(CausalLM.from_pretrained(folder).eval(), load_course_tokenizer())


def train_base(config: CodeTrainConfig, seed: int, out: Path | None = None) -> CodeModel:
    """A new model that has seen references, repairs and real Python. out: where a run that stopped goes on."""
    tokenizer = load_course_tokenizer()
    rows, real = reference_rows(tokenizer, config, seed), real_rows(tokenizer) if config.real_share else []
    seed_everything(seed)
    model = start_small(CausalLM(SIZES.config(tokenizer)))
    training = student_training(config.base_steps, config.code_rate, config.code_batch, ROW)
    training = going_on(replace(training, save_every=100), out)
    fit(
        model,
        config.batches(rows, real, config.real_share, seed),
        answer_loss,
        training,
        out=out,
        header={"code": settings(config)},
    )
    return CodeModel(model.eval(), tokenizer)


# Judging what was written


def judge_bodies(
    tasks: Sequence[CodeTask],
    bodies: Sequence[Sequence[str]],
    sandbox: Sandbox | None = None,
    cases: Callable[[CodeTask], Sequence] = lambda task: task.hidden,
) -> list[list[Verdict]]:
    """A verdict on every body; a body that was written twice for a task is run once."""
    wanted = {(place, body): None for place, written in enumerate(bodies) for body in written}
    submissions = [Submission(tasks[place].prompt + body, "f", cases(tasks[place])) for place, body in wanted]
    found = dict(zip(wanted, judge(submissions, LIMITS, sandbox), strict=True)) if submissions else {}
    return [[found[place, body] for body in written] for place, written in enumerate(bodies)]


def passes(verdicts: Sequence[Sequence[Verdict]]) -> list[list[bool]]:
    return [[verdict.passed for verdict in row] for row in verdicts]


def examine(
    code: CodeModel,
    tasks: Sequence[CodeTask],
    n_samples: int = 20,
    temperature: float = 0.8,
    seed: int = 0,
    sandbox: Sandbox | None = None,
) -> dict[str, float]:
    """pass@1 and pass@10 by the unbiased estimator, and the share of tasks that the greedy program solves."""
    prompts = [task.prompt for task in tasks]
    outcomes = passes(judge_bodies(tasks, code.write(prompts, n_samples, temperature, seed), sandbox))
    greedy = passes(judge_bodies(tasks, code.write(prompts), sandbox))
    scores = {f"pass@{k}": mean_pass_at_k(outcomes, k) for k in (1, 10) if k <= n_samples}
    return scores | {"greedy": mean_pass_at_k(greedy, 1)}


# Expert iteration


def accepted_rows(code: CodeModel, tasks: Sequence[CodeTask], config: CodeTrainConfig, seed: int) -> list[Chat]:
    """What the model wrote for these tasks and passed all of their cases, each different program once.

    Their references are not looked at: the cases alone say what is right.
    """
    bodies = code.write([task.prompt for task in tasks], config.n_samples, 1.0, seed)
    verdicts = judge_bodies(tasks, bodies, cases=lambda task: (*task.public, *task.hidden))
    found = []
    for task, written, row in zip(tasks, bodies, verdicts, strict=True):
        right = dict.fromkeys(body for body, verdict in zip(written, row, strict=True) if verdict.passed)
        found += [code_row(code.tokenizer, task.prompt, body) for body in right]
    return fitting(found)


def tuned(
    code: CodeModel, rows: Sequence[Chat], others: Sequence[Chat], n_steps: int, config: CodeTrainConfig, seed: int
) -> CodeModel:
    """A copy after some more steps on these rows, half of every batch being others, if there are any."""
    model = copy.deepcopy(code.model).train()
    training = student_training(n_steps, config.tune_rate, config.code_batch, ROW)
    fit(
        model,
        config.batches(rows, others, 0.5, seed),
        answer_loss,
        replace(training, warmup_steps=min(10, n_steps // 4)),
    )
    return CodeModel(model.eval(), code.tokenizer)


def expert_iteration(code: CodeModel, config: CodeTrainConfig, seed: int) -> tuple[CodeModel, list[dict[str, float]]]:
    """Rounds of writing, running, and learning from what passed; half of every batch are rows of the first training.

    These are drawn from all of them, so that what is seen often is only what is new. All accepted programs of earlier
    rounds stay. Returns the model and, for each round, the share of programs accepted and how many different ones there
    are. Raises ValueError where nothing passes: then there is nothing to learn from.
    """
    old, kept, log = reference_rows(code.tokenizer, config, seed), {}, []
    for turn in range(config.n_rounds):
        tasks = draw_tasks(config.n_prompts, 3000 + 100 * seed + turn, "train", (3,))
        found = accepted_rows(code, tasks, config, seed + turn)
        kept |= {tuple(row.ids): row for row in found}
        if not kept:
            raise ValueError("no program passed in this round; train the base longer or give it easier tasks")
        code = tuned(code, [*kept.values()], old, config.tune_steps, config, seed + turn)
        log.append({"accepted": len(found) / len(tasks), "different": len(kept)})
    return code, log


def more_of_the_same(code: CodeModel, config: CodeTrainConfig, seed: int) -> CodeModel:
    """The control: as many further steps, in as many rounds, on the references alone."""
    rows = reference_rows(code.tokenizer, config, seed)
    for turn in range(config.n_rounds):
        code = tuned(code, rows, (), config.tune_steps, config, seed + turn)
    return code


# Second attempts


def second_attempts(
    code: CodeModel,
    tasks: Sequence[CodeTask],
    n_first: int,
    temperature: float,
    seed: int,
    sandbox: Sandbox | None = None,
) -> dict[str, Any]:
    """For every first program that fails a public case: one repair that sees the failure, and what fresh ones come to.

    repair: share of repairs that pass the hidden cases; fresh: chance of another program of the same task, estimated
    by the task's other n_first - 1; the same program again: share of repairs that change nothing; tokens of a
    repair's prompt and body, and of a fresh body; prompt: tokens of a task's prompt.
    """
    firsts = code.write([task.prompt for task in tasks], n_first, temperature, seed)
    public = judge_bodies(tasks, firsts, sandbox, lambda task: task.public)
    hidden = judge_bodies(tasks, firsts, sandbox)
    prompts, owners, fresh, again = [], [], [], []
    for place, (task, written) in enumerate(zip(tasks, firsts, strict=True)):
        n_right = sum(verdict.passed for verdict in hidden[place])
        for number, (body, verdict) in enumerate(zip(written, public[place], strict=True)):
            if not verdict.passed:
                case = task.public[max(0, verdict.failed_case)]
                prompts.append(repair_prompt(task.prompt, body, case, verdict.failure))
                owners.append(place)
                again.append(body)
                fresh.append((n_right - hidden[place][number].passed) / (n_first - 1))
    if not prompts:
        return {"n": 0}
    fits = [place for place, prompt in enumerate(prompts) if code.tokens(prompt) + LONGEST + 1 < SIZES.max_seq_len]
    bodies = code.write([prompts[place] for place in fits], 1, temperature, seed + 1)
    verdicts = judge_bodies([tasks[owners[place]] for place in fits], bodies, sandbox)
    right = [row[0].passed for row in verdicts]
    same = [made[0] == again[place] for made, place in zip(bodies, fits, strict=True)]
    return {
        "n": len(fits),
        "failed": len(prompts) / (len(tasks) * n_first),
        "repair": average(right),
        "fresh": average([fresh[place] for place in fits]),
        "unchanged": average(same),
        "repair_tokens": average(
            [code.tokens(prompts[place]) + code.tokens(made[0]) for made, place in zip(bodies, fits, strict=True)]
        ),
        "fresh_tokens": average(
            [code.tokens(tasks[owners[place]].prompt) + code.tokens(again[place]) for place in fits]
        ),
        "chances": [fresh[place] for place in fits],
    }


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def filtered_pass(public: Sequence[bool], hidden: Sequence[bool], n: int) -> float:
    """Chance that the first of n programs that passes the public cases passes the hidden ones; the first, if none does.

    Exact over all orders of the programs at hand. Raises ValueError for n outside 1 to their number.
    """
    total = len(public)
    if not 1 <= n <= total:
        raise ValueError(f"n={n} must be between 1 and the {total} programs at hand")
    good = sum(public)
    chosen = sum(h for p, h in zip(public, hidden, strict=True) if p) / good if good else 0.0
    rest = sum(h for p, h in zip(public, hidden, strict=True) if not p) / (total - good) if total > good else 0.0
    none = 1.0
    for drawn in range(n):
        none *= max(0, total - good - drawn) / (total - drawn)
    return (1 - none) * chosen + none * rest


def best_of_n_bound(n: int) -> float:
    """Most that taking the best of n samples moves a distribution: KL divergence in nats, log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def filter_kl(p: float, n: int) -> float:
    """KL divergence in nats of the first of n samples that passes a filter; the last one, if none does.

    p: chance of one sample to pass, 0 to 1. Among the samples that pass, and among those that fail, nothing changes:
    it is the divergence of two coins.
    """
    after = 1 - (1 - p) ** n
    parts = ((after, p), (1 - after, 1 - p))
    return sum(new * math.log(new / old) for new, old in parts if new > 0)


def repair_wins(repair: float, p: float, ratio: float) -> bool:
    """Whether a repair passes more often than fresh programs of the same tokens, of which it costs `ratio` each."""
    return repair > 1 - (1 - p) ** ratio


def cpu_seconds() -> float:
    """Seconds of CPU of this process and of those that it waited for: the sandbox counts too."""
    return sum(os.times()[:4])


# The folder


def code_bits(code: CodeModel, n_functions: int = 150) -> float:
    """Bits per byte of held-out functions of the standard library."""
    texts = python_text("validation", ["functions"])
    texts = [text for text in texts if code.tokens(text) <= ROW][:n_functions]
    rows = [code.tokenizer.encode_document(text).ids for text in texts]
    return score_texts(code.model, rows, texts, SIZES.max_seq_len).bits_per_byte


def exam_tasks(n: int, length: int) -> list[CodeTask]:
    """The held-out tasks of the card and of the tables."""
    return draw_tasks(n, 77, "validation", (length,))


def save_code_model(code: CodeModel, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the model as a Llama folder, its report and a card made from the report. Returns the report."""
    code.model.save_pretrained(folder)
    report = facts | {"weights_sha256": sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    report["parameters"] = sum(parameter.numel() for parameter in code.model.parameters())
    report["tokenizer_sha256"] = tokenizer_sha256()
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", code_card(report).encode())
    return report


def code_card(report: dict[str, Any]) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    rows = [
        f"| {name} | {numbers['greedy']:.1%} | {numbers['pass@1']:.1%} | {numbers['pass@10']:.1%} |"
        for name, numbers in report["exams"].items()
    ]
    lines = [
        "# The course code model",
        "",
        f"A Llama with {report['parameters']:,} parameters that uses [the course tokenizer]"
        "(../../06-tokenization-embeddings/tokenizer/README.md), made by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['cpu_seconds'] / 60:.1f} minutes of CPU ({report['machine']}, {report['date']}).",
        "",
        "**Use**: to learn with. It completes a signature and a docstring in the wording of code_tasks.py: one to "
        "three operations on numbers, lists, texts and words. What it writes is to be run in a sandbox only.",
        "",
        f"**Data**: {report['config']['n_tasks']:,} generated tasks of one and two operations and "
        f"{report['config']['n_long']} of three with references, repairs of planted slips, functions of Python's "
        "standard library (PSF License Agreement); then its own programs that passed the cases of further tasks.",
        "",
        f"On {report['n_exam']} held-out tasks of each length, whose pairs of neighbouring operations training never "
        f"showed, {report['n_samples']} programs each at temperature 0.8:",
        "",
        "| Exam | Greedy | pass@1 | pass@10 |",
        "|:--|--:|--:|--:|",
        *rows,
        "",
        f"Held-out functions of the standard library: {report['bits_per_byte']:.2f} bits per byte.",
        "",
        f"`model.safetensors`: sha256 `{report['weights_sha256']}`; tokenizer.json: `{report['tokenizer_sha256']}`",
    ]
    return "\n".join(lines) + "\n"


def make_code_model(config: CodeTrainConfig, seed: int, out: Path) -> tuple[CodeModel, CodeModel, dict[str, Any]]:
    """The model before and after the rounds, and what is to be known of its making."""
    before = cpu_seconds()
    base = train_base(config, seed, out)
    code, log = expert_iteration(base, config, seed)
    return base, code, {"cpu_seconds": cpu_seconds() - before, "config": settings(config), "rounds": log}


def examined(base: CodeModel, code: CodeModel, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with everything that the card says."""
    facts = facts | {"command": command_line(), "machine": describe_machine()}
    facts |= {"date": datetime.date.today().isoformat(), "n_exam": 40, "n_samples": 20, "exams": {}}
    for length in (2, 3):
        for name, made in (("before", base), ("after", code)):
            facts["exams"][f"{length} operations, {name} the rounds"] = examine(made, exam_tasks(40, length))
    return facts | {"quick": quick_exam(code), "bits_per_byte": code_bits(code)}


def quick_exam(code: CodeModel) -> dict[str, float]:
    """A small part of the exam, which a test repeats."""
    return examine(code, exam_tasks(12, 3), 10)


@alone
def code_train(config: CodeTrainConfig, run: RunConfig) -> None:
    """Make the code model: references, then expert iteration with the sandbox; save it as a folder with a card."""
    seconds = 0.25 * (config.base_steps + config.n_rounds * config.tune_steps) + 40 * config.n_rounds + 60
    announce(f"train on references for {config.base_steps} steps, then {config.n_rounds} rounds alone", seconds)
    base, code, facts = make_code_model(config, run.seed, run.out / "references")
    report = save_code_model(code, run.out / "code_model", examined(base, code, facts))
    for name, numbers in report["exams"].items():
        print(f"{name}: " + ", ".join(f"{kind} {value:.1%}" for kind, value in numbers.items()))
    print(f"the code model is in {shown(run.out / 'code_model')}")
