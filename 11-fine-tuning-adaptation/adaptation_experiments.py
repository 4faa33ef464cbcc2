"""Topic 11 - Adaptation experiments: what each way of fine-tuning gains, forgets, trains and weighs.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures               # every table and figure
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures methods ranks # some of them
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py bench                 # ours beside PEFT and bitsandbytes

All start from the course model and learn from the same instructions of the same seed; only the method differs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from adaptation_failures import FAILURE_EXPERIMENTS
from chat_experiments import CHAT_EXPERIMENTS
from course_model import FOLDER, load_course_model, start_small
from course_tokenizer import CourseTokenizer
from equal_compute import remembered
from fine_tuning_adaptation import (
    RATES,
    AnswerConfig,
    DialogueBatches,
    MethodConfig,
    SftConfig,
    adapt,
    answer_gap,
    answer_loss,
    encode_dialogues,
    examine_answers,
    fine_tune,
    guessing,
    respond,
)
from low_rank_adapters import LoraConfig, add_adapters
from modern_llm_architectures import CausalLM
from nf4 import quantize_nf4, weight_bytes
from optimizers import build_optimizer, state_bytes
from preference_experiments import PREFERENCE_EXPERIMENTS, base_name
from prompt_tuning import trained_parameters
from teaching_signals import SIGNAL_EXPERIMENTS
from tiny_world import INSTRUCT, World, join
from workbench import (
    Column,
    RunConfig,
    announce,
    check_name,
    check_range,
    describe_machine,
    pick_device,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
    speed_line,
    time_in_turns,
)

SCRIPT = "python 11-fine-tuning-adaptation/fine_tuning_adaptation.py"


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of every comparison
    sft_steps: int = 600  # optimizer steps of every fine-tuning
    n_questions: int = 40  # held-out instructions of each category
    n_documents: int = 100  # held-out pretraining documents
    again: bool = False  # train again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "sft_steps", "n_questions", least=1)
        check_range(self, "n_documents", least=2)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    @property
    def exam(self) -> AnswerConfig:
        return AnswerConfig(self.n_questions, self.n_documents)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        seeds = range(n_seeds or self.n_seeds)
        save_results(self.folder / "results.json", name, columns, rows, seeds, f"{SCRIPT} figures {experiment}")


STEADY = ("fact", "read", "sum", "sort")  # the kinds that seeds agree on
TOLD = (*STEADY, "story", "refuse")  # no training here gets one of "safe" right
GAPS = (Column("gap, answers", "nats per token", ".2f"), Column("gap, documents", "nats per token", ".3f"))


# One training


@dataclass(frozen=True)
class Trial:
    """A fine-tuning of the course model: what is otherwise than in the defaults, and the seed."""

    method: str = "full"
    how: dict[str, Any] = field(default_factory=dict)  # of MethodConfig
    lora: dict[str, Any] = field(default_factory=dict)  # of LoraConfig
    sft: dict[str, Any] = field(default_factory=dict)  # of SftConfig
    from_scratch: bool = False  # begin with random weights

    def name(self, config: FiguresConfig, seed: int) -> str:
        sizes = [config.sft_steps, config.n_questions, config.n_documents]
        return f"base {base_name()}, seed {seed}, {json.dumps(asdict(self), sort_keys=True)}, sizes {sizes}"


def trained(
    trial: Trial, config: FiguresConfig, run: RunConfig, seed: int
) -> tuple[nn.Module, CourseTokenizer, list[dict[str, float]]]:
    """The course model after a trial, and the log."""
    seed_everything(seed)
    model, tokenizer = load_course_model()
    if trial.from_scratch:
        model = start_small(CausalLM(model.config))
    how = MethodConfig(trial.method, **trial.how)
    model = adapt(model.to(pick_device(run.device)), tokenizer, how, LoraConfig(**trial.lora))
    sft = SftConfig(**{"max_steps": config.sft_steps, **trial.sft})
    return model, tokenizer, fine_tune(model, tokenizer, sft, how, seed)


def measure(trial: Trial, config: FiguresConfig, run: RunConfig, seed: int) -> dict[str, Any]:
    """Train and examine: accuracy by category, gaps on answers and on pretraining documents, sizes, CPU seconds."""
    before = time.process_time()
    model, tokenizer, log = trained(trial, config, run, seed)
    seconds = time.process_time() - before
    return {
        **examine_answers(model, tokenizer, config.exam),
        "loss": log[-1]["loss"],
        "trained": trained_parameters(model),
        "state_bytes": adam_bytes(model),
        "weight_bytes": weight_bytes(model),
        "seconds": seconds,
    }


def adam_bytes(model: nn.Module) -> int:
    """Bytes that AdamW keeps for the trained parameters of a model, counted on an optimizer that took a step of 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None
    return state_bytes(optimizer)


def measured(trial: Trial, config: FiguresConfig, run: RunConfig) -> list[dict[str, Any]]:
    """The numbers of a trial, one entry for each seed; those that an earlier run left are taken as they are."""
    return [
        remembered(config, run, trial.name(config, seed), lambda seed=seed: measure(trial, config, run, seed))
        for seed in range(config.n_seeds)
    ]


def base_report(config: FiguresConfig, run: RunConfig) -> dict[str, Any]:
    """The course model before any fine-tuning."""

    def examine() -> dict[str, Any]:
        model, tokenizer = load_course_model()
        return examine_answers(model.to(pick_device(run.device)), tokenizer, config.exam)

    return remembered(
        config, run, f"base {base_name()}, {config.n_questions} questions, {config.n_documents} documents", examine
    )


# Which learning rate: on a seed that no comparison uses


RATE_FACTORS = (1 / 3, 1.0, 3.0)  # times the rate that the method has
RATE_SEED = 100


def rates(config: FiguresConfig, run: RunConfig) -> None:
    """Each method at three learning rates for a third of the steps, on a seed that no comparison uses."""
    rows = []
    for method, rate in RATES.items():
        cells: list = [f"{rate:.2g}"]
        for factor in RATE_FACTORS:
            trial = rate_trial(method, factor * rate, config)
            name = f"rates, {trial.name(config, RATE_SEED)}"
            found = remembered(config, run, name, lambda trial=trial: try_rate(trial, config, run))
            cells.append(found["answer_gap"])
        rows.append([method, *cells])
    columns = [Column("Method"), Column("rate used")]
    for head in ("gap at a third of it", "gap at it", "gap at three times it"):
        columns.append(Column(head, "nats per token", ".2f"))
    config.save("rates", columns, rows, "rates", n_seeds=1)


def rate_trial(method: str, rate: float, config: FiguresConfig) -> Trial:
    return Trial(method, sft={"learning_rate": float(f"{rate:.4g}"), "max_steps": max(1, config.sft_steps // 3)})


def try_rate(trial: Trial, config: FiguresConfig, run: RunConfig) -> dict[str, float]:
    """Train and look at the held-out answers' gap alone, which needs no generation."""
    exam = AnswerConfig(config.n_questions, config.n_documents, exam_seed=RATE_SEED)
    model, tokenizer, _ = trained(trial, config, run, RATE_SEED)
    return {"answer_gap": answer_gap(model, tokenizer, exam)}


# 1. Supervised fine-tuning: what is gained in each category, and what is lost


SFT_TRIALS = {
    "full, loss on the answer": Trial(),
    "full, loss on everything": Trial(sft={"loss_on": "everything"}),
    "full, from random weights": Trial(from_scratch=True),
    "LoRA, loss on the answer": Trial("lora"),
}


def sft(config: FiguresConfig, run: RunConfig) -> None:
    """Accuracy by category before and after, with and without the mask, and without pretraining."""
    before, rows = base_report(config, run), []
    rest = [before[key] for key in ("mean", "answer_gap", "gap")]
    rows.append(["the course model", *(before["accuracy"][category] for category in TOLD), *rest])
    for name, trial in SFT_TRIALS.items():
        found = measured(trial, config, run)
        shares = [[item["accuracy"][category] for item in found] for category in TOLD]
        rest = [[item[key] for item in found] for key in ("mean", "answer_gap", "gap")]
        rows.append([name, *shares, *rest])
    chance = guessing()
    mean_chance = sum(chance.values()) / len(chance)
    rows.append(["guessing", *(chance[category] for category in TOLD), mean_chance, "", ""])
    columns = [Column("Model"), *(Column(category, "", ".0%") for category in TOLD)]
    columns += [Column("mean of seven", "", ".0%"), *GAPS]
    config.save("sft", columns, rows, "sft")
    save_figure(plot_categories({row[0]: row[1:-3] for row in rows}), config.folder / "sft-categories.svg")


def plot_categories(shares: dict[str, list]) -> Figure:
    """Share of right answers by category, one group of bars for each, every seed a dot."""
    figure, axis = plt.subplots(figsize=(8.5, 3.6))
    drawn = {name: row for name, row in shares.items() if name not in ("guessing", "the course model")}
    width = 0.8 / len(drawn)
    for index, (name, row) in enumerate(drawn.items()):
        places = np.arange(len(TOLD)) + (index - (len(drawn) - 1) / 2) * width
        axis.bar(places, [np.mean(cell) for cell in row], width, color=f"C{index}", label=name)
        for place, cell in zip(places, row, strict=True):
            axis.plot([place] * np.size(cell), np.ravel(cell), ".", ms=3, color="black")
    for place, chance in enumerate(shares.get("guessing", [])):
        axis.plot([place - 0.42, place + 0.42], [chance] * 2, ls="--", lw=1, color="0.4")
    axis.set_xticks(range(len(TOLD)), TOLD)
    axis.set(ylabel="right answers, held-out content", ylim=(0, 1.02))
    axis.set_title("the answers come from pretraining, fine-tuning teaches the format", fontsize=11)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.32))
    return figure


# 2. Methods side by side


METHOD_TRIALS = {
    "full": Trial(),
    "layer-wise, upper half": Trial("layerwise"),
    "LoRA, rank 8": Trial("lora"),
    "DoRA, rank 8": Trial("dora"),
    "QLoRA, rank 8, NF4": Trial("qlora"),
    "adapters, 16 wide": Trial("adapters"),
    "prefix, 16 positions": Trial("prefix"),
    "prompt, 16 positions": Trial("prompt"),
    "BitFit": Trial("bitfit"),
}


def methods(config: FiguresConfig, run: RunConfig) -> None:
    """Every method on the same instructions: what it trains, keeps in memory, gets right and forgets."""
    rows, costs, points, before = [], [], {}, base_report(config, run)
    for name, trial in METHOD_TRIALS.items():
        points[name] = found = measured(trial, config, run)
        first = found[0]
        sizes = [float(first["trained"]), first["state_bytes"] / 2**10, first["weight_bytes"] / 2**10]
        costs.append([name, *sizes, [item["seconds"] for item in found]])
        rows.append([name, *right_and_gaps(found)])
    config.save("methods", [Column("Method"), *RIGHT_AND_GAPS], rows, "methods")
    columns = [Column("Method"), Column("trained", "", ",.0f"), Column("AdamW's state", "KiB", ",.0f")]
    columns += [Column("weights", "KiB", ",.0f"), Column("training", "CPU s", ".0f")]
    config.save("methods-cost", columns, costs, "methods")
    save_figure(plot_trade(points, before["gap"]), config.folder / "methods-trade.svg")


RIGHT_AND_GAPS = (*(Column(category, "", ".0%") for category in STEADY), *GAPS)


def right_and_gaps(found: list[dict[str, Any]]) -> list[list[float]]:
    """The cells of RIGHT_AND_GAPS, a number for each seed."""
    right = [[item["accuracy"][category] for item in found] for category in STEADY]
    return [*right, *([item[key] for item in found] for key in ("answer_gap", "gap"))]


def plot_trade(points: dict[str, list[dict[str, Any]]], start: float) -> Figure:
    """Right answers of four kinds against the gap on documents; a dot for each seed, larger marks for means."""
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 5.4), sharex=True, sharey=True)
    for axis, category in zip(axes.flat, STEADY, strict=True):
        for index, (name, found) in enumerate(points.items()):
            color, marker = f"C{index % 8}", "sD"[index // 8]
            gaps, right = ([item["gap"] for item in found], [item["accuracy"][category] for item in found])
            axis.plot(gaps, right, "o", ms=3, color=color, alpha=0.5)
            axis.plot([np.mean(gaps)], [np.mean(right)], marker, ms=7, color=color, label=name)
        axis.axvline(start, color="0.5", ls="--", lw=1, label="before")
        axis.set(xscale="log", title=category, ylim=(-0.03, 1.03))
    figure.supxlabel("gap on pretraining documents (nats per token)")
    figure.supylabel("right answers")
    axes[0, 1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# 3. Rank


RANKS = (1, 2, 4, 8, 16, 32, 64)
STABLE_RANKS = (64,)  # at which rsLoRA is compared; at 8 the two have the same scale


def rank_trial(rank: int, stable: bool = False) -> Trial:
    """LoRA with alpha 16, so scale 2 at rank 8; rsLoRA with the alpha that gives scale 2 at rank 8 as well."""
    if rank == 8 and not stable:
        return METHOD_TRIALS["LoRA, rank 8"]
    changes = {"lora_rank": rank, "lora_alpha": 2 * 8**0.5 if stable else 16.0, "rank_stabilised": stable}
    return Trial("lora", lora=changes)


def ranks(config: FiguresConfig, run: RunConfig) -> None:
    """LoRA from rank 1 to 64, alpha fixed, beside rsLoRA at the upper end and full fine-tuning."""
    rows: list[list] = []
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {"LoRA": {}, "rsLoRA": {}}
    trials = [(rank, False) for rank in RANKS] + [(rank, True) for rank in STABLE_RANKS]
    for rank, stable in trials:
        found, kind = measured(rank_trial(rank, stable), config, run), list(curves)[stable]
        curves[kind][rank] = found
        scale = LoraConfig(**{"lora_rank": rank, **rank_trial(rank, stable).lora}).scale
        rows.append([f"{kind}, rank {rank}", scale, float(found[0]["trained"]), *right_and_gaps(found)])
    full = measured(METHOD_TRIALS["full"], config, run)
    rows.append(["full", "", float(full[0]["trained"]), *right_and_gaps(full)])
    columns = [Column("Update"), Column("scale", "", ".2f"), Column("trained", "", ",.0f"), *RIGHT_AND_GAPS]
    config.save("ranks", columns, rows, "ranks")
    save_figure(plot_ranks(curves, full), config.folder / "lora-ranks.svg")


def plot_ranks(curves: dict[str, dict[int, list[dict[str, Any]]]], full: list[dict[str, Any]]) -> Figure:
    """Right answers of four kinds against the rank, every seed a dot; rsLoRA and full fine-tuning as single marks."""
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 5.4), sharex=True, sharey=True)
    last = 2.5 * max(RANKS)  # where full fine-tuning stands
    for index, (axis, category) in enumerate(zip(axes.flat, STEADY, strict=True)):
        groups = {"LoRA": ("s-", curves["LoRA"]), "rsLoRA": ("D", curves["rsLoRA"]), "full": ("^", {last: full})}
        for (name, (mark, cells)), color in zip(groups.items(), ("C0", "C1", "0.3"), strict=True):
            right = {rank: [item["accuracy"][category] for item in found] for rank, found in sorted(cells.items())}
            axis.plot(list(right), [np.mean(cell) for cell in right.values()], mark, ms=6, color=color, label=name)
            for rank, cell in right.items():
                axis.plot([rank] * len(cell), cell, "o", ms=3, color=color, alpha=0.5)
        axis.set(xscale="log", title=category, ylim=(-0.03, 1.03))
        axis.set_xticks([*RANKS, last], [*(str(rank) for rank in RANKS), "full"])
        axis.minorticks_off()
        if index >= 2:
            axis.set(xlabel="rank")
    figure.supylabel("right answers")
    axes[1, 1].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


# 4. Forgetting


KEPT_TRIALS = {
    "full": METHOD_TRIALS["full"],
    "full, 10% replay": Trial(sft={"replay_share": 0.1}),
    "full, EWC 10": Trial(sft={"ewc_strength": 10.0}),
    "full, EWC 1000": Trial(sft={"ewc_strength": 1000.0}),
    "LoRA, rank 8": METHOD_TRIALS["LoRA, rank 8"],
}


def keeping(config: FiguresConfig, run: RunConfig) -> None:
    """Elastic weights and replayed documents against forgetting, and what they cost in answers."""
    rows, points, before = [], {}, base_report(config, run)
    for name, trial in KEPT_TRIALS.items():
        points[name] = found = measured(trial, config, run)
        rows.append([name, *right_and_gaps(found), [item["seconds"] for item in found]])
    rows.append(["the course model, before", *(cell[0] for cell in right_and_gaps([before])), ""])
    columns = [Column("Training"), *RIGHT_AND_GAPS, Column("training", "CPU s", ".0f")]
    config.save("keeping", columns, rows, "keeping")
    save_figure(plot_trade(points, before["gap"]), config.folder / "keeping-trade.svg")


# 5. Tasks together


TASK_TRIALS = {
    "refuse alone": Trial("lora", sft={"categories": "refuse"}),
    "refuse and safe": Trial("lora", sft={"categories": "refuse,safe"}),
    "all seven": METHOD_TRIALS["LoRA, rank 8"],
}


def tasks(config: FiguresConfig, run: RunConfig) -> None:
    """One task alone or many together: what a model does with the questions that it was not taught."""
    rows = []
    for name, trial in TASK_TRIALS.items():
        found = measured(trial, config, run)
        rows.append([name, *([item["accuracy"][category] for item in found] for category in INSTRUCT)])
    columns = [Column("Taught"), *(Column(category, "", ".0%") for category in INSTRUCT)]
    config.save("tasks", columns, rows, "tasks")


def refusing(config: FiguresConfig, run: RunConfig) -> None:
    """The same trainings: how often they refuse what is forbidden, and what is allowed."""
    rows = []
    for name, trial in TASK_TRIALS.items():
        shares = [refusals(trial, config, run, seed) for seed in range(config.n_seeds)]
        rows.append([name, *([item[key] for item in shares] for key in ("forbidden", "allowed"))])
    columns = [Column("Taught"), Column("refused", "of what is forbidden", ".0%")]
    config.save("refusals", [*columns, Column("refused", "of what is allowed", ".0%")], rows, "refusals")


def refusals(trial: Trial, config: FiguresConfig, run: RunConfig, seed: int) -> dict[str, float]:
    """Shares of held-out questions whose answer begins as a refusal does: the forbidden ones, and the six other kinds.

    Greedy. How an answer begins says what a model meant, even if it stumbles over the rest.
    """

    def ask() -> dict[str, float]:
        model, tokenizer, _ = trained(trial, config, run, seed)
        exam, found = config.exam, {}
        for category in INSTRUCT:
            asked = World().instructions(exam.n_questions, exam.exam_seed, exam.exam_split, category)
            texts = respond(model, tokenizer, [join(item.prompt) for item in asked])
            found[category] = sum(text.startswith("Sorry") for text in texts) / len(texts)
        allowed = [share for category, share in found.items() if category != "refuse"]
        return {"forbidden": found["refuse"], "allowed": sum(allowed) / len(allowed)}

    return remembered(config, run, f"refusals, {trial.name(config, seed)}", ask)


# 6. What NF4 costs the weights


def quantising(config: FiguresConfig, run: RunConfig) -> None:
    """Bits per weight and error of NF4 on the course model's own matrices, by block size."""
    model, rows = load_course_model()[0], []
    matrices = [layer.weight.detach() for layer in model.blocks.modules() if type(layer) is nn.Linear]
    for block_size in (32, 64, 128, 256):
        for double in (False, True):
            packed = [quantize_nf4(weight, block_size, double) for weight in matrices]
            wrong = sum(
                (item.dequantize() - weight).square().sum() for item, weight in zip(packed, matrices, strict=True)
            )
            power = sum(weight.square().sum() for weight in matrices)
            n_weights = sum(weight.numel() for weight in matrices)
            bits = 8 * sum(item.n_bytes for item in packed) / n_weights
            rows.append([f"{block_size}, {'8-bit' if double else 'float32'}", bits, float(wrong / power) ** 0.5])
    columns = [Column("Block, its scale"), Column("bits per weight", "", ".3f"), Column("relative error", "", ".3%")]
    config.save("nf4", columns, rows, "nf4", n_seeds=1)


# All of them


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "sft": (sft, 240),
    "methods": (methods, 480),
    "ranks": (ranks, 480),
    "keeping": (keeping, 360),
    "tasks": (tasks, 180),
    "refusals": (refusing, 400),
    "rates": (rates, 540),
    "nf4": (quantising, 3),
    **FAILURE_EXPERIMENTS,
    **PREFERENCE_EXPERIMENTS,
    **CHAT_EXPERIMENTS,
    **SIGNAL_EXPERIMENTS,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)


# Speed beside the libraries


def bench(run: RunConfig) -> None:
    """Time a LoRA training step beside PEFT's, and NF4 beside bitsandbytes, in turns."""
    announce("timing LoRA steps and NF4 in turns", 60)
    works = training_works() | nf4_works()
    seconds = time_in_turns(works, 9)
    print(describe_machine())
    print(speed_line("LoRA training step", "PEFT's", seconds["LoRA"], seconds["PEFT"]))
    print(speed_line("full training step", "our LoRA's", seconds["full"], seconds["LoRA"]))
    print(speed_line("NF4, 1,048,576 weights,", "bitsandbytes", seconds["NF4"], seconds["bitsandbytes"]))


def training_works() -> dict[str, Callable[[], None]]:
    """One step on a padded batch of dialogues: full, LoRA, and PEFT's LoRA on transformers' Llama."""
    from peft import LoraConfig as TheirConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_course_model()
    adapted = load_course_model()[0]
    add_adapters(adapted, LoraConfig())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = get_peft_model(theirs, TheirConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets))
    batch = DialogueBatches(encode_dialogues(tokenizer, World().instructions(64, 1)), 16, 0)(0)

    def their_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=batch["inputs"]).logits  # (batch, seq, vocab)
        targets = batch["targets"].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"), (targets >= 0).sum()

    def step(model: nn.Module, loss_fn: Callable) -> Callable[[], None]:
        optimizer = build_optimizer(model.train(), "adamw", 1e-4)

        def work() -> None:
            loss, count = loss_fn(model, batch)
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    return {"full": step(model, answer_loss), "LoRA": step(adapted, answer_loss), "PEFT": step(theirs, their_loss)}


def nf4_works() -> dict[str, Callable[[], Any]]:
    """Pack and unpack a matrix of 1024 x 1024."""
    import bitsandbytes.functional as theirs

    weight = torch.randn(1024, 1024)

    def their_work() -> torch.Tensor:
        return theirs.dequantize_4bit(
            *theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        )

    return {"NF4": lambda: quantize_nf4(weight).dequantize(), "bitsandbytes": their_work}
