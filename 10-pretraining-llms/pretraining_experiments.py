"""Topic 10 - Pretraining Experiments: what the chapter's `figures` and `bench` run.

python 10-pretraining-llms/pretraining_llms.py figures                  # all of them
python 10-pretraining-llms/pretraining_llms.py figures course packing   # two of them
python 10-pretraining-llms/pretraining_llms.py bench
"""

import csv
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from corpus_experiments import CORPUS_EXPERIMENTS, CorpusFiguresConfig
from corpus_failures import CORPUS_BREAKS
from course_model import FOLDER, LONG_RUN, REPORT, complete, load_course_model, make_shards
from gpt2 import SamplingConfig
from llm_calculators import forward_flops
from optimizers import build_optimizer
from packing import language_model_loss
from parallel_experiments import EXPERIMENTS as PARALLEL_EXPERIMENTS
from parallel_experiments import PARALLEL_BREAKS
from shards import PACKINGS, ShardBatches, ShardConfig
from tiny_world import World, join, words
from workbench import (
    Column,
    RunConfig,
    announce,
    check_folder,
    check_name,
    describe_machine,
    run_experiments,
    save_figure,
    save_results,
    speed_line,
    time_in_turns,
)

FIGURES = Path(__file__).parent / "figures"

# The course model: its curve, its report, and what packing wastes


def course(config, run: RunConfig) -> None:
    """The committed model's own log and report, as figure and tables; nothing is trained."""
    report = json.loads((FOLDER / REPORT).read_text(encoding="utf-8"))
    with open(FOLDER / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    save_figure(plot_course(rows, report), config.folder / "course.svg")
    columns = [Column("Kind"), Column("Entropy floor", "nats per token", ".3f")]
    columns += [Column("Gap above it", "nats per token", ".4f"), Column("Standard error", "", ".4f")]
    gaps = [[kind, *numbers] for kind, numbers in report["gaps"].items()]
    made = ([0], report["command"], report["machine"])
    save_results(config.folder / "results.json", "course-gaps", columns, gaps, *made)
    columns = [Column("Questions"), Column("Exactly right", "", ".1%")]
    answers = [[topic, share] for topic, share in report["answers"].items()]
    answers += [["documents of its own that are possible", report["possible_samples"]]]
    save_results(config.folder / "results.json", "course-answers", columns, answers, *made)
    save_runs(config.folder, report)


def save_runs(folder: Path, report: dict) -> None:
    """The committed run beside others: a shorter one, and two on a GPU, whose longest lies in long_run/."""
    others = json.loads((FIGURES / "other_runs.json").read_text(encoding="utf-8"))
    longest = json.loads((LONG_RUN / REPORT).read_text(encoding="utf-8"))
    asked = ("story", "scene", "new sums", "unasked")
    columns = [Column("Run"), Column("weights", digits=",d"), Column("positions", "millions", ".1f")]
    columns += [Column("gap", "nats per token", ".4f"), *(Column(topic, digits=".1%") for topic in asked)]
    columns += [Column("possible", digits=".1%")]
    runs = {"half the steps": others[0], "**the course model**": report}
    runs |= {"GPU, four blocks": others[1], "GPU, long_run/": longest}
    rows = [
        [
            *(name, run["parameters"], run["positions"] / 1e6, run["gaps"]["all"][1]),
            *(*(run["answers"][topic] for topic in asked), run["possible_samples"]),
        ]
        for name, run in runs.items()
    ]
    command = "python 10-pretraining-llms/pretraining_llms.py figures course"
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs.values()))
    save_results(folder / "results.json", "course-runs", columns, rows, [0], command, machines)


def scenes(config, run: RunConfig) -> None:
    """What of a picture the longest run has understood: where things lie, and which colour belongs to which."""
    (model, tokenizer), n_questions = load_course_model(LONG_RUN), 600
    asked = World().questions("scene", n_questions, run.seed)
    prompts = [join(before) for before, _ in asked]
    made = complete(model.eval(), tokenizer, prompts, SamplingConfig(8, temperature=0.0))
    counts: dict[tuple[str, int], list[int]] = {}
    for prompt, text, (before, answer) in zip(prompts, made, asked, strict=True):
        about = "colour" if "what colour" in prompt.rpartition("Question")[2] else "place"
        found, n_objects = words(text)[: len(answer)], 3 if " and " in prompt else 2
        count = counts.setdefault((about, n_objects), [0, 0, 0])
        count[0] += 1
        count[1] += found == answer
        count[2] += found != answer and found[0] in before
    columns = [Column("Question about"), Column("Objects", digits="d"), Column("Asked", digits="d")]
    columns += [Column("Right", digits=".1%"), Column("Wrong, a colour or shape of the picture", digits=".1%")]
    columns += [Column("Right by choosing blindly among the picture's colours", digits=".1%")]
    rows = [
        [about, n_objects, n, right / n, other / n, 1 / n_objects if about == "colour" else "-"]
        for (about, n_objects), (n, right, other) in sorted(counts.items())
    ]
    command = "python 10-pretraining-llms/pretraining_llms.py figures scenes"
    save_results(config.folder / "results.json", "scenes", columns, rows, [run.seed], command)


def plot_course(rows: list[dict[str, str]], report: dict) -> Figure:
    """Training loss and held-out gap over the run, left; the gap by kind at its end, right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    floor = report["gaps"]["all"][0]
    steps, losses = (np.array([float(row[name]) for row in rows]) for name in ("step", "loss"))
    left.plot(steps, losses - floor, color="0.75", lw=0.8, label="training batches, loss minus floor")
    held = [(float(row["step"]), float(row["gap"])) for row in rows if row.get("gap")]
    left.plot(*zip(*held, strict=True), "o-", color="C0", label="held-out documents")
    left.set(yscale="log", xlabel="step", ylabel="gap to the floor (nats per token)", ylim=(0.005, 5))
    left.legend(frameon=False, loc="upper right")
    kinds = sorted((kind for kind in report["gaps"] if kind != "all"), key=lambda kind: report["gaps"][kind][1])
    right.barh(kinds, [report["gaps"][kind][1] for kind in kinds], color="C0")
    right.axvline(report["gaps"]["all"][1], color="black", ls="--", lw=1)
    right.set(xlabel="gap at the end (nats per token)\ndashed: all documents")
    return figure


def packing(config, run: RunConfig) -> None:
    """What the two packings waste, and how many documents they cut, at three row lengths."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_shards(ShardConfig(n_documents=5000), Path(folder))
        for seq_len, name in itertools.product((64, 128, 512), PACKINGS):
            made = ShardBatches(corpus, 1, seq_len, run.seed, name)
            n_pieces = sum(len(row) for _, row in made.rows)
            rows.append([f"{name}, {seq_len}", 1 - made.used_share, (n_pieces - len(corpus)) / len(corpus)])
    columns = [Column("Packing, row length"), Column("Padding", "share of positions", ".2%")]
    columns += [Column("Cuts", "per document", ".1%")]
    command = "python 10-pretraining-llms/pretraining_llms.py figures packing"
    save_results(config.folder / "results.json", "packing", columns, rows, [run.seed], command)


def breaks(config, run: RunConfig) -> None:
    """Every failure that --break switches on: the right value beside the broken one."""
    shows = {name: show for name, (show, _) in CORPUS_BREAKS.items()} | PARALLEL_BREAKS
    rows = [[f"`{name}`", *row] for name, show in shows.items() for row in show(run)]
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save("breaks", columns, rows, "breaks", n_seeds=1)


# The verbs


EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "course": (course, 2),
    "scenes": (scenes, 15),
    "packing": (packing, 5),
    "breaks": (breaks, 150),
    **CORPUS_EXPERIMENTS,
    **PARALLEL_EXPERIMENTS,
}


@dataclass(frozen=True)
class FiguresConfig(CorpusFiguresConfig):
    """Which experiments, and their sizes."""

    only: tuple[str, ...] = ()  # names of experiments; none means all

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)
        check_folder(self.folder)


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments, or only those named, and fill its tables and figures."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)


def bench(run: RunConfig) -> None:
    """Time a training step of the course model beside transformers' Llama, and what the batches cost."""
    announce("timing training steps in turns", 40)
    from transformers import AutoModelForCausalLM

    ours, theirs = load_course_model()[0].train(), AutoModelForCausalLM.from_pretrained(FOLDER).train()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_shards(ShardConfig(n_documents=3000), Path(folder))
        batches = ShardBatches(corpus, 8, 128, run.seed)
        works = {
            "ours": step_work(ours, language_model_loss, batches),
            "theirs": step_work(theirs, their_loss, batches),
            "batch": lambda: batches(int(torch.randint(100, ()))),
            "matmul": matmul_work(n=512),
        }
        seconds = time_in_turns(works, 9)
    print(describe_machine())
    print(speed_line("training step", "transformers' Llama", seconds["ours"], seconds["theirs"]))
    fastest, n_tokens = min(seconds["ours"]), 8 * 128
    flops = 3 * sum(forward_flops(ours.config, 128).values()) * n_tokens
    peak = 2 * 512**3 * 10 / min(seconds["matmul"])
    print(f"{n_tokens / fastest:,.0f} tokens/s, {flops / fastest / 1e9:.1f} GFLOP/s: {flops / fastest / peak:.0%} of")
    print(f"the {peak / 1e9:.0f} GFLOP/s of a product of 512 x 512 matrices in the same run (the optimizer included)")
    print(f"making a batch takes {min(seconds['batch']) / fastest:.1%} of a step")


def step_work(model: nn.Module, loss_fn: Callable, batches: ShardBatches) -> Callable[[], None]:
    """One step of training with AdamW, on the same batch each time."""
    optimizer, batch = build_optimizer(model, "adamw", 1e-4), batches(0)

    def work() -> None:
        loss, count = loss_fn(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def their_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss from transformers' model: a mask between documents is given to it as it is, all four axes."""
    numbers = batch["document_ids"]  # (batch, seq)
    same = numbers[:, None, :, None] == numbers[:, None, None, :]  # (batch, 1, seq, seq)
    mask = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()  # (batch, 1, seq, seq)
    logits = model(input_ids=batch["inputs"], attention_mask=mask).logits  # (batch, seq, vocab)
    targets = batch["targets"]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, (targets >= 0).sum()


def matmul_work(n: int) -> Callable[[], None]:
    a, b = torch.randn(n, n), torch.randn(n, n)

    def work() -> None:
        for _ in range(10):
            a @ b

    return work
