"""Topic 02 - Sequence experiments: every measurement of the chapter, and its failures on purpose.

python 02-sequence-modeling/sequence_modeling.py figures              # all of them: about eight minutes
python 02-sequence-modeling/sequence_modeling.py figures memory text  # some of them
python 02-sequence-modeling/sequence_modeling.py --break pad-in-loss  # one failure, beside the sound value

Papers: Pascanu et al. 2013 (arXiv 1211.5063), the bound of the gradient and clipping; Fano 1961, the inequality that
bounds what a vector must have carried.
"""

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from sequence_modeling import (
    BOS_ID,
    CELLS,
    EOS_ID,
    FIRST_TOKENS,
    GRU,
    IGNORE,
    LSTM,
    N_KINDS,
    PAD_ID,
    RNN,
    BagOfWords,
    CharacterConfig,
    LadderConfig,
    LanguageModel,
    NGramModel,
    Recurrent,
    Seq2Seq,
    Vocabulary,
    check_sizes,
    compressed_bits,
    copy_batch,
    device_of,
    document_batches,
    document_losses,
    echo_batch,
    fit,
    floor_of,
    gap_to_floor,
    generate_ids,
    linear_recurrence,
    linear_scan,
    measure_scan,
    perplexity,
    read_text,
    recall_batch,
    reshuffled,
    text_bits,
    train_character_lm,
    uniform_bits,
    update,
)
from tiny_world import MIXTURE, Document, World, plot_surprisal, statistics
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    largest_difference,
    pick_device,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
)


@dataclass(frozen=True)
class FiguresConfig:
    only: tuple[str, ...] = ()  # experiments to run: data, ladder, gradients, memory, text, scan, breaks; none: all
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go
    n_seeds: int = 3  # runs of every experiment that compares
    n_documents: int = 20_000  # TinyWorld documents to train on
    n_eval: int = 1_000  # fresh documents on which every model is judged
    n_samples: int = 100  # documents that every model of the ladder writes
    max_steps: int = 300  # optimizer steps of each network of the ladder
    memory_steps: int = 400  # optimizer steps of each network that must remember
    max_symbols: int = 16  # longest sequence to remember
    data: str = "python-text"  # text of the character models: python-text, a file, or a Hugging Face data set
    text_steps: int = 800  # optimizer steps of the character model
    eval_chars: int = 100_000  # held-out characters of that text
    max_lag: int = 100  # steps back over which gradients are measured
    scan_steps: int = 4096  # longest recurrence that is timed

    def __post_init__(self) -> None:
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)
        sizes = ("n_seeds", "n_documents", "n_samples", "max_steps", "memory_steps", "text_steps", "eval_chars")
        check_range(self, *sizes, least=1)
        check_range(self, "n_eval", "max_symbols", "max_lag", "scan_steps", least=2)

    def save(self, name: str, columns: list[Column], rows: list[list], n_seeds: int, experiment: str) -> None:
        command = f"python 02-sequence-modeling/sequence_modeling.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), command)


def measure_data(config: FiguresConfig, run: RunConfig) -> None:
    """What each kind of document is worth, and one document with the surprisal of every token."""
    rows = statistics(World(), 2 * config.n_eval, seed=0)
    columns = [Column("kind"), Column("weight", digits=".1f"), Column("tokens", "mean of a document", ".1f")]
    columns += [Column("entropy", "nats per token", ".3f"), Column("standard error", digits=".3f")]
    columns += [Column("repeats in 2,000 documents", digits=".1%")]
    cells = [[row.kind, MIXTURE[row.kind], row.tokens, row.entropy, row.error, row.repeats] for row in rows]
    config.save("kinds", columns, cells, 1, "data")
    save_figure(plot_surprisal(World().document(random.Random(0), "story"), rows), config.folder / "surprisal.svg")


# The ladder: every model of the topic on the same documents


@dataclass(frozen=True)
class Rung:
    """One model of the ladder after training."""

    name: str
    model: Any
    losses: list[float]  # nats of each fresh document
    curve: list[float]  # training loss of each step, nats per token
    seconds: float  # of training


def climb(config: LadderConfig, run: RunConfig) -> tuple[list[Rung], list[Document], Vocabulary]:
    """Train every model on the same TinyWorld documents and judge it on the same fresh ones of the validation side."""
    world = World()
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, run.seed, "train")
    fresh, n_tokens = world.documents(config.n_eval, run.seed, "validation"), len(vocabulary)
    makers = {
        "unigram": partial(NGramModel, 1, n_tokens),
        "bag of words": partial(BagOfWords, n_tokens, config.d_model),
        f"{config.order}-gram Kneser-Ney": partial(NGramModel, config.order, n_tokens),
        **{cell.upper(): partial(LanguageModel, n_tokens, config.d_model, cell) for cell in CELLS},
    }
    rungs = []
    for name, maker in makers.items():
        seed_everything(run.seed)
        model, start = maker(), time.perf_counter()
        if isinstance(model, NGramModel):
            curve = []
            model.fit([BOS_ID, *vocabulary.encode(document.tokens)] for document in documents)
        else:
            batches = document_batches(documents, vocabulary, config.batch_size, config.seq_len, run.seed)
            curve = fit(model.to(pick_device(run.device)), batches, config.max_steps, config.learning_rate, name)
        seconds = time.perf_counter() - start
        rungs.append(Rung(name, model, document_losses(model, fresh, vocabulary), curve, seconds))
    return rungs, fresh, vocabulary


def sample_documents(model, vocabulary: Vocabulary, n_samples: int, seed: int, temperature: float = 1.0) -> list:
    """Draw TinyWorld documents from a model, at most 100 tokens each, without surprisal."""
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    prompt = torch.full((n_samples, 1), BOS_ID, device=device_of(model))
    rows = generate_ids(model, prompt, 100, temperature, generator).tolist()
    rows = [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in rows]
    return [Document("sample", vocabulary.decode(row), []) for row in rows]


def is_grammatical(document: Document, world: World) -> bool:
    """Whether TinyWorld could have written the document, as a whole."""
    try:
        world.surprisal(document.tokens)
    except ValueError:
        return False
    return document.tokens[-1] == FIRST_TOKENS[EOS_ID]


def grammatical_share(documents: list[Document]) -> float:
    """Fraction of the documents that TinyWorld could have written."""
    world = World()
    return sum(is_grammatical(document, world) for document in documents) / len(documents)


def plot_ladder(rungs: list[Rung], fresh: list[Document]) -> Figure:
    """Draw the smoothed training losses of the networks above the levels of the counting models and the floor."""
    n_tokens, series = sum(len(document.tokens) for document in fresh), {}
    for rung in (rung for rung in rungs if rung.curve):
        window = math.ceil(len(rung.curve) / 50)
        smooth = np.convolve(rung.curve, np.full(window, 1 / window), "valid")
        series[rung.name] = (np.arange(len(smooth)) + window, smooth)
    levels = {rung.name: sum(rung.losses) / n_tokens for rung in rungs if not rung.curve}
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (steps, smooth) in series.items():
        axis.plot(steps, smooth, label=name, marker="o" if len(steps) < 20 else None, markersize=4)
    for (name, level), style in zip(
        {**levels, "entropy floor": floor_of(fresh)}.items(), ("--", ":", "-."), strict=True
    ):
        axis.axhline(level, color="black", linestyle=style, linewidth=1, label=name)
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.minorticks_off()
    axis.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    return figure


def measure_ladder(config: FiguresConfig, run: RunConfig) -> None:
    """The gap of every model to the floor, over all documents and by kind."""
    sizes = {"n_documents": config.n_documents, "n_eval": config.n_eval, "max_steps": config.max_steps}
    table, by_kind = {}, {}
    for seed in range(config.n_seeds):
        rungs, fresh, vocabulary = climb(LadderConfig(**sizes), RunConfig(seed, run.device, run.out, run.threads))
        floor, n_tokens = floor_of(fresh), sum(len(document.tokens) for document in fresh)
        rows = [("uniform (chance)", math.log(len(vocabulary)), None)]
        for rung in rungs:
            share = None
            if hasattr(rung.model, "advance"):
                share = grammatical_share(sample_documents(rung.model, vocabulary, config.n_samples, seed))
            rows.append((rung.name, sum(rung.losses) / n_tokens, share))
            for kind in World().kinds:
                pairs = [pair for pair in zip(rung.losses, fresh, strict=True) if pair[1].kind == kind]
                if len(pairs) > 1:
                    gap, _ = gap_to_floor(*zip(*pairs, strict=True))
                    by_kind.setdefault(kind, {}).setdefault(rung.name, []).append(gap)
        rows.append(("floor (optimum)", floor, 1.0))
        for name, nats, share in rows:
            for index, value in enumerate((nats, nats - floor, perplexity(nats), share)):
                table.setdefault(name, ([], [], [], []))[index].append(value)
        if seed == 0:
            save_figure(plot_ladder(rungs, fresh), config.folder / "ladder.svg")
    columns = [Column("model"), Column("loss", "nats per token", ".3f"), Column("gap to the floor", digits=".3f")]
    columns += [Column("perplexity", digits=".2f"), Column("grammatical samples", digits=".0%")]
    cells = [[name, *("-" if None in cell else cell for cell in lists)] for name, lists in table.items()]
    config.save("ladder", columns, cells, config.n_seeds, "ladder")
    models = [name for name in table if name not in ("uniform (chance)", "floor (optimum)", "unigram")]
    columns = [Column("gap by kind"), *(Column(name, digits=".2f") for name in models)]
    cells = [[kind, *(gaps[name] for name in models)] for kind, gaps in by_kind.items()]
    config.save("ladder-kinds", columns, cells, config.n_seeds, "ladder")


# The gradient against distance


def gradient_by_lag(layer: Recurrent, seq_len: int, seed: int) -> list[float]:
    """Mean norm of the gradient of the last output, along a random unit vector, with respect to each input.

    Entry k belongs to the input k steps back. In float64: a vanished gradient is a small number here, not 0.
    """
    check_sizes(seq_len=seq_len)
    generator = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(32, seq_len, layer.d_input, generator=generator, dtype=torch.float64).requires_grad_()
    direction = F.normalize(torch.randn(32, layer.d_hidden, generator=generator, dtype=torch.float64))
    outputs, _ = layer(x)
    (gradient,) = torch.autograd.grad((outputs[:, -1] * direction).sum(), x)  # (batch, seq, d_input)
    return gradient.norm(dim=2).mean(dim=0).flip(0).tolist()


def gradient_bound(layer: RNN, seq_len: int) -> list[float]:
    """What `gradient_by_lag` cannot exceed: the largest singular value of W, times that of U for each step back."""
    cell = layer.cells[0]
    reach, gain = (
        torch.linalg.matrix_norm(proj.weight.double(), 2).item() for proj in (cell.input_proj, cell.state_proj)
    )
    return [reach * gain**lag for lag in range(seq_len)]


def measure_gradients(d_hidden: int, seq_len: int, seed: int) -> dict[str, list[float]]:
    """`gradient_by_lag` of fresh layers: RNNs whose state matrix stretches by a gain, GRU, LSTM, LSTM without bias."""
    found = {}
    for gain in (0.8, 1.0, 1.2):
        seed_everything(seed)
        layer = RNN(d_hidden, d_hidden)
        nn.init.orthogonal_(layer.cells[0].state_proj.weight, gain)
        found[f"RNN, gain {gain}"] = gradient_by_lag(layer, seq_len, seed)
        found[f"bound, gain {gain}"] = gradient_bound(layer, seq_len)
    for name, layer_cls in (("GRU", GRU), ("LSTM", LSTM), ("LSTM, forget bias 0", LSTM)):
        seed_everything(seed)
        layer = layer_cls(d_hidden, d_hidden)
        if name.endswith("0"):
            nn.init.zeros_(layer.cells[0].input_proj.bias)
        found[name] = gradient_by_lag(layer, seq_len, seed)
    return found


def measure_lags(config: FiguresConfig, run: RunConfig) -> None:
    """The gradient that reaches the input k steps back, and the bound of the RNN."""
    runs = [measure_gradients(64, config.max_lag + 1, seed) for seed in range(config.n_seeds)]
    lags = sorted({min(lag, config.max_lag) for lag in (10, 25, 50, 100)})
    columns = [Column("layer"), *(Column(f"{lag} steps back", digits=".1e") for lag in lags)]
    cells = [[name, *([found[name][lag] for found in runs] for lag in lags)] for name in runs[0]]
    config.save("gradients", columns, cells, config.n_seeds, "gradients")
    save_figure(plot_gradients(runs[0]), config.folder / "gradients.svg")
    save_figure(plot_cells(), config.folder / "cells.svg")


def plot_cells() -> Figure:
    """Draw an RNN and an LSTM over three steps: what lies on the gradient's way back, from h to h and from c to c."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 5.2), height_ratios=(3, 4))
    box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "black"}
    arrow = {"arrowstyle": "->", "linewidth": 1.2}
    for axis, name, label in zip(axes, ("RNN", "LSTM"), (r"$\tanh(Wx+Uh+b)$", "gates and candidate"), strict=True):
        axis.set(title=name, xlim=(-0.6, 9.6), ylim=(-1.3, 1.4 if name == "RNN" else 2.7))
        axis.axis("off")
        for step in range(3):
            centre = 1.5 + 3 * step
            axis.text(centre, 0, label, ha="center", va="center", bbox=box, fontsize=9)
            axis.annotate("", (centre, -0.35), (centre, -0.95), arrowprops=arrow)
            axis.text(centre, -1.2, f"$x_{step + 1}$: embedding of token {step + 1}", ha="center", fontsize=8)
            axis.annotate("", (centre + 2.0, 0), (centre + 1.05, 0), arrowprops=arrow)
            axis.text(centre + 1.5, 0.12, f"$h_{step + 1}$", ha="center")
            if name == "RNN":
                axis.annotate("", (centre, 0.95), (centre, 0.35), arrowprops=arrow)
                axis.text(centre, 1.05, rf"$\hat p$ for token {step + 2}", ha="center", fontsize=8)
                continue
            for place, sign, gate in ((centre - 0.7, r"$\times$", f"f_{step + 1}"), (centre + 0.5, "$+$", None)):
                axis.text(place, 1.8, sign, ha="center", va="center", bbox={**box, "edgecolor": "C1"})
                axis.annotate("", (place, 1.5), (place, 0.35), arrowprops=arrow)
                text = f"${gate}$" if gate else rf"$i_{step + 1}\tilde c_{step + 1}$"
                axis.text(place + 0.08, 0.85, text, fontsize=9)
            axis.annotate("", (centre + 2.05, 1.8), (centre + 0.75, 1.8), arrowprops={**arrow, "color": "C1"})
            axis.annotate("", (centre + 0.25, 1.8), (centre - 0.45, 1.8), arrowprops={**arrow, "color": "C1"})
            axis.text(centre + 1.2, 1.95, f"$c_{step + 1}$", color="C1")
            axis.annotate("", (centre + 1.5, 0.4), (centre + 1.3, 1.75), arrowprops={**arrow, "linestyle": ":"})
        axis.annotate("", (0.45, 0), (-0.5, 0), arrowprops=arrow)
        axis.text(0, 0.12, "$h_0$", ha="center")
    axis.annotate("", (0.55, 1.8), (-0.5, 1.8), arrowprops={**arrow, "color": "C1"})
    axis.text(0, 1.95, "$c_0$", color="C1", ha="center")
    return figure


def plot_gradients(found: dict[str, list[float]]) -> Figure:
    """Draw gradient norms by lag on a log scale, each RNN with its bound as a dotted line of the same colour."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    colours = {}
    for name, norms in found.items():
        kind, _, gain = name.partition(", gain ")
        style = ":" if kind == "bound" else "-"
        (line,) = axis.plot(norms, style, color=colours.get(gain) if gain else None, linewidth=1.2 if gain else 2)
        colours.setdefault(gain or name, line.get_color())
        if kind != "bound":
            line.set_label(name)
    axis.plot([], [], ":", color="black", label="bound of the RNN")
    axis.set(xlabel="steps back (lag)", ylabel="norm of the gradient", yscale="log", ylim=(1e-16, 1e10))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# Copying and recalling


@torch.no_grad()
def accuracy(model: nn.Module, *batch: Tensor) -> float:
    """Fraction of the counted targets of one batch (*inputs, targets) that are the model's first choice."""
    *inputs, targets = (part.to(device_of(model)) for part in batch)
    counted = targets != IGNORE
    return (model(*inputs).argmax(dim=-1) == targets)[counted].float().mean().item()


def memory_accuracy(
    model: nn.Module, make_batch: Callable, size: int, max_steps: int, learning_rate: float = 3e-3, seed: int = 0
) -> float:
    """Train on fresh sequences of one size of `copy_batch`, `recall_batch` or `echo_batch`; accuracy on 512 more."""
    generator = torch.Generator().manual_seed(seed)
    batches = (make_batch(64, size, generator) for _ in itertools.count())
    fit(model, batches, max_steps, learning_rate, f"{type(model).__name__}, size {size}")
    return accuracy(model, *make_batch(512, size, generator))


def measure_memory(make_batch: Callable, sizes: list[int], d_model: int, max_steps: int, seed: int) -> dict[str, list]:
    """Accuracy of every cell, or of Seq2Seq for `echo_batch`, at every size; one fresh model for each."""
    vocab_size = len(FIRST_TOKENS) + 2 * N_KINDS  # recall_batch has keys and values
    makers = {cell.upper(): partial(LanguageModel, vocab_size, d_model, cell) for cell in CELLS}
    if make_batch is echo_batch:
        makers = {f"seq2seq, width {d_model}": partial(Seq2Seq, vocab_size, vocab_size, d_model)}
    found: dict[str, list] = {}
    for (name, maker), size in itertools.product(makers.items(), sizes):
        seed_everything(seed)
        found.setdefault(name, []).append(memory_accuracy(maker(), make_batch, size, max_steps, seed=seed))
    return found


def bag_accuracy(n_pairs: int, n_draws: int = 20_000) -> float:
    """Best accuracy in `recall_batch` for a memory of the values alone: which were shown, but not with which key.

    It answers with the most frequent of the values that were not yet asked for; the mean over random sequences.
    """
    values = torch.randint(N_KINDS, (n_draws, n_pairs), generator=torch.Generator().manual_seed(0))  # as they are asked
    left = F.one_hot(values, N_KINDS).flip(1).cumsum(1)  # (draws, pairs, kinds): of the last 1, 2, ... values
    return (left.amax(dim=2) / left.sum(dim=2)).mean().item()


def least_bits(n_symbols: int, accuracy: float) -> float:
    """Bits that must have passed from a sequence of random symbols to whoever names them with this accuracy.

    Fano's inequality for each of the N_KINDS equally likely symbols, summed: at chance it gives 0, at accuracy 1 all.
    """
    check_range(SimpleNamespace(accuracy=accuracy), "accuracy", least=1 / N_KINDS, most=1)
    parts = [accuracy, *[(1 - accuracy) / (N_KINDS - 1)] * (N_KINDS - 1)]
    doubt = -sum(part * math.log2(part) for part in parts if part)
    return n_symbols * (math.log2(N_KINDS) - doubt)


def measure_remembering(config: FiguresConfig, run: RunConfig) -> None:
    """Accuracy against length: copying, recalling by key, and passing a sequence through one vector."""
    sizes = [2**power for power in range(1, config.max_symbols.bit_length()) if 2**power <= config.max_symbols]
    plans = {
        "copy": (copy_batch, (64,), sizes, "symbols"),
        "recall": (recall_batch, (64,), [size // 2 for size in sizes], "pairs"),
        "bottleneck": (echo_batch, (16, 64), sizes, "symbols"),
    }
    panels = {}
    for task, (make_batch, widths, lengths, unit) in plans.items():
        found: dict[str, list[list[float]]] = {}  # model -> length -> seed
        for width, seed in itertools.product(widths, range(config.n_seeds)):
            for name, scores in measure_memory(make_batch, lengths, width, config.memory_steps, seed).items():
                for place, score in enumerate(scores):
                    found.setdefault(name, [[] for _ in lengths])[place].append(score)
        levels = {"chance": [1 / N_KINDS] * len(lengths)}
        if make_batch is recall_batch:
            levels["values without their keys"] = [bag_accuracy(length) for length in lengths]
        columns = [
            Column("model"),
            *(Column(f"{length} {unit if length > 1 else 'pair'}", digits=".2f") for length in lengths),
        ]
        cells = [[name, *values] for name, values in (found | levels).items()]
        for name, values in found.items() if make_batch is echo_batch else ():
            pairs = zip(lengths, values, strict=True)
            passed = ([least_bits(length, max(score, 1 / N_KINDS)) for score in scores] for length, scores in pairs)
            cells.append([f"bits that passed, at least: {name}", *passed])
        config.save(task, columns, cells, config.n_seeds, "memory")
        panels[task] = (lengths, unit, {name: np.mean(values, axis=1) for name, values in found.items()}, levels)
    save_figure(plot_memory(panels), config.folder / "memory.svg")


def plot_memory(panels: dict[str, tuple]) -> Figure:
    """Draw accuracy against length, a panel for each task, with the levels that need no memory as dashed lines."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True)
    for axis, (task, (lengths, unit, found, levels)) in zip(axes, panels.items(), strict=True):
        for name, values in found.items():
            axis.plot(lengths, values, marker="o", markersize=4, label=name)
        for (name, values), style in zip(levels.items(), ("--", ":"), strict=False):
            axis.plot(lengths, values, style, color="black", linewidth=1.3, label=name)
        axis.set(xlabel=f"{unit} to remember", title=task, xscale="log", ylim=(0, 1.45))
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8, loc="upper right")
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes[0].set_ylabel("accuracy (fraction)")
    return figure


# Real text


def measure_text(
    train_text: str, test_text: str, config: CharacterConfig, runs: list[RunConfig]
) -> dict[str, float | list[float]]:
    """Bits per byte of the test text: uniform, compressors, a 5-gram, and a network (a list, one number a run)."""
    vocabulary = Vocabulary(sorted(set(train_text + test_text)))
    five_gram = NGramModel(5, len(vocabulary)).fit([[BOS_ID, *vocabulary.encode(train_text)]])
    models = (train_character_lm(train_text, vocabulary, config, run)[0] for run in runs)
    return {
        "uniform": uniform_bits(vocabulary, test_text),
        **compressed_bits(train_text, test_text),
        "5-gram Kneser-Ney": text_bits(five_gram, vocabulary, test_text),
        config.cell.upper(): [text_bits(model, vocabulary, test_text) for model in models],
    }


def measure_compression(config: FiguresConfig, run: RunConfig) -> None:
    """Bits per byte of held-out text: general compressors, counting, and a short run of an LSTM."""
    train_text, test_text = (read_text(config.data, split) for split in ("train", "validation"))
    model = CharacterConfig(d_model=128, max_steps=config.text_steps)
    runs = [RunConfig(seed, run.device, run.out, run.threads) for seed in range(config.n_seeds)]
    bits = measure_text(train_text, test_text[: config.eval_chars], model, runs)
    columns = [Column("model"), Column("held-out text", "bits per byte", ".3f")]
    config.save("text", columns, [[name, value] for name, value in bits.items()], config.n_seeds, "text")


# Loop and scan


def measure_speed(config: FiguresConfig, run: RunConfig) -> None:
    """Time the loop and the scan of one recurrence, forward and backward, and compare their states."""
    lengths = [length for length in (64, 256, 1024, 4096, 16384) if length < config.scan_steps] + [config.scan_steps]
    cells = []
    for seq_len in lengths:
        seconds = measure_scan(seq_len, 1, 64, 7, pick_device(run.device))
        loop, scan = (1e3 * float(np.median(seconds[form])) for form in ("loop", "scan"))
        seed_everything(run.seed)
        a, b = torch.rand(1, seq_len, 64, dtype=torch.float64), torch.randn(1, seq_len, 64, dtype=torch.float64)
        error = largest_difference(linear_scan(a, b), linear_recurrence(a, b))
        passes = 2 * math.ceil(math.log2(seq_len))
        cells.append([str(seq_len), str(seq_len), str(passes), loop, scan, loop / scan, error])
    columns = [Column("steps"), Column("sequential passes, loop"), Column("sequential passes, scan")]
    columns += [Column("loop", "ms", ".1f"), Column("scan", "ms", ".1f"), Column("loop / scan", digits=".1f")]
    config.save("scan", [*columns, Column("largest difference", digits=".0e")], cells, 1, "scan")


# Failures on purpose, each beside the sound run: `--break NAME`


def padded_batches(documents: Iterable[Document], vocabulary: Vocabulary, batch_size: int, break_: str) -> Iterator:
    """Yield (inputs, targets): a document in each row, padded to the longest of its batch, the loss blind to padding.

    Two classic mistakes can be made: "pad-in-loss" counts the padding as tokens to predict, "no-shift" asks for the
    token that the model reads instead of the next one.
    """
    documents = iter(documents)
    while chosen := list(itertools.islice(documents, batch_size)):
        rows = [torch.tensor([BOS_ID, *vocabulary.encode(document.tokens)]) for document in chosen]
        token_ids = nn.utils.rnn.pad_sequence(rows, True, PAD_ID)  # (batch, seq_and_one)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]  # (batch, seq)
        is_padding = targets == PAD_ID  # (batch, seq)
        if break_ == "no-shift":
            targets = inputs
        if break_ != "pad-in-loss":
            targets = targets.masked_fill(is_padding, IGNORE)
        yield inputs, targets


@torch.no_grad()
def reported_loss(model: nn.Module, batches: Iterable) -> float:
    """What a training log would show: nats over counted targets, whatever the batches count."""
    nats, counted = 0.0, 0
    for inputs, targets in batches:
        nats += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        counted += (targets != IGNORE).sum().item()
    return nats / counted


def break_batches(config: LadderConfig, seed: int, break_: str) -> list[tuple[str, float, float]]:
    """Train a GRU on sound and on spoiled batches: the gap that each reports, and the gap when scored soundly."""
    world, found = World(), []
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, seed, "train")
    fresh = world.documents(config.n_eval, seed, "validation")
    for kind in ("none", break_):
        seed_everything(seed)
        model = LanguageModel(len(vocabulary), config.d_model, "gru")
        stream = reshuffled(list(documents), random.Random(seed))
        batches = padded_batches(stream, vocabulary, config.batch_size, kind)
        fit(model, batches, config.max_steps, config.learning_rate, f"break: {kind}")
        gaps = [reported_loss(model, padded_batches(fresh, vocabulary, 64, how)) for how in (kind, "none")]
        found.append([gap - floor_of(fresh) for gap in gaps])
    measures = ("reported loss above the floor (nats per token)", "the same model, scored soundly")
    return [(measure, *values) for measure, values in zip(measures, zip(*found, strict=True), strict=True)]


def break_clipping(config: LadderConfig, seed: int) -> list[tuple[str, float, float]]:
    """Train an RNN whose state matrix stretches 2.5 times by plain gradient descent, with clipping and without."""
    world, found = World(), []
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, seed, "train")
    for max_norm in (1.0, math.inf):
        seed_everything(seed)
        model = LanguageModel(len(vocabulary), config.d_model, "rnn")
        nn.init.orthogonal_(model.layers.cells[0].state_proj.weight, 2.5)
        optimizer = torch.optim.SGD(model.parameters())
        batches = document_batches(documents, vocabulary, config.batch_size, config.seq_len, seed)
        losses, largest = [], 0.0
        for step, (inputs, targets) in enumerate(itertools.islice(batches, config.max_steps)):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            losses.append(update(loss, optimizer, step, config.max_steps, 1.0, max_norm))
            moved = sum((new - old).square().sum() for new, old in zip(model.parameters(), before, strict=True))
            largest = max(largest, moved.sqrt().item())
        found.append((largest, float(np.mean(losses[-math.ceil(config.max_steps / 10) :]))))
    measures = ("largest step of the parameters (length)", "training loss at the end (nats per token)")
    return [(measure, *values) for measure, values in zip(measures, zip(*found, strict=True), strict=True)]


def break_forget_bias(config: LadderConfig, seed: int) -> list[tuple[str, float, float]]:
    """A fresh LSTM with and without its forget bias of 1: the gradient that comes back over 50 steps."""
    found = measure_gradients(config.d_model, 51, seed)
    return [("gradient norm 50 steps back", found["LSTM"][50], found["LSTM, forget bias 0"][50])]


BREAKS: dict[str, Callable[[LadderConfig, int], list[tuple[str, float, float]]]] = {
    "no-shift": partial(break_batches, break_="no-shift"),
    "pad-in-loss": partial(break_batches, break_="pad-in-loss"),
    "no-clip": break_clipping,
    "forget-bias": break_forget_bias,
}


def measure_breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Every failure beside the sound run."""
    sizes = {"n_documents": config.n_documents, "n_eval": config.n_eval, "max_steps": math.ceil(config.max_steps / 2)}
    cells = []
    for name, show in BREAKS.items():
        runs = [show(LadderConfig(**sizes), seed) for seed in range(config.n_seeds)]
        for rows in zip(*runs, strict=True):
            sound, broken = ([row[place] for row in rows] for place in (1, 2))
            cells.append([f"`{name}`", rows[0][0], sound, broken])
    columns = [Column("`--break`"), Column("what is measured"), Column("sound"), Column("broken")]
    config.save("breaks", columns, cells, config.n_seeds, "breaks")


# All of them


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], int]] = {  # with seconds
    "data": (measure_data, 5),
    "ladder": (measure_ladder, 80),
    "gradients": (measure_lags, 5),
    "memory": (measure_remembering, 220),
    "text": (measure_compression, 120),
    "scan": (measure_speed, 5),
    "breaks": (measure_breaks, 45),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments, write figures and results.json, and fill the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
