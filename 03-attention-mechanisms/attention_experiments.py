"""Topic 03 - Attention experiments: every measurement of the chapter.

python 03-attention-mechanisms/attention_mechanisms.py figures              # all of them: about seven minutes
python 03-attention-mechanisms/attention_mechanisms.py figures width linear # some of them

Papers: Elhage et al. 2021, the two links of recall; Katharopoulos et al. 2020 (arXiv 2006.16236), linear attention.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention_mechanisms import (
    ATTENTION_FOR,
    BREAKS,
    N_KINDS,
    AlignmentConfig,
    BahdanauSeq2Seq,
    CostConfig,
    MultiHeadAttention,
    RecallConfig,
    ablate_heads,
    accuracy,
    accuracy_without_future,
    attention_weights,
    causal_mask,
    compare_on_task,
    fresh_recall,
    guessed_alignment,
    held_out,
    linear_attention,
    padding_share,
    plot_alignment,
    plot_heads,
    recall_model,
    scaled_dot_product_attention,
    tiled_attention,
    token_names,
    train_on_task,
    trained_on_recall,
    without_head,
)
from sequence_modeling import IGNORE, device_of
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    pick_device,
    progress,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
    time_in_turns,
)


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter."""

    only: tuple[str, ...] = ()  # names of experiments; none means all
    n_seeds: int = 3  # seeds of every comparison
    shrink: int = 1  # divide training steps, lengths and draws by this: a quick look, not the chapter's numbers
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "shrink", least=1)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)


# What a trained model does


SCALINGS = ("with 1/√d", "without", "without, small start", "without, small start, small query step")


def relative_entropy(weights: Tensor, mask: Tensor) -> float:
    """Mean entropy of the rows of weights (..., query, key), as a fraction of the log of how many keys they may use.

    1 is uniform, 0 a single key. Rows with fewer than two keys are left out: they have no choice.
    """
    n_keys = mask.sum(dim=-1).expand(weights.shape[:-1])  # (layers, batch, heads, query)
    entropy = torch.special.entr(weights).sum(dim=-1)  # (layers, batch, heads, query)
    free = n_keys > 1
    return (entropy[free] / n_keys[free].log()).mean().item()


class ScaleTrial(NamedTuple):
    """What one training run of `entropy_through_training` showed."""

    steps: list[int]  # at which the entropy was taken
    entropies: list[float]  # as `relative_entropy`
    accuracy: float  # on a fresh batch of 512
    clipped: float  # fraction of the steps whose gradient was longer than max_norm


def entropy_through_training(
    config: RecallConfig, scaling: str, run: RunConfig, every: int = 10, max_norm: float = 1.0
) -> ScaleTrial:
    """Train with one of SCALINGS, by the recipe of topic 02's `fit`; an infinite max_norm does not clip.

    "small start" divides the first query weights by sqrt(d_head), once: the same function at step 0 as with the scale.
    "small query step" divides the queries' learning rate too, which Adam's steps otherwise ignore.
    """
    model, batches = recall_model(config, run)
    factor = model.layers[0].scale
    queries = [parameter for layer in model.layers for parameter in layer.q_proj.parameters()]
    for layer in model.layers if scaling != SCALINGS[0] else ():
        layer.scale = 1.0
        if scaling in SCALINGS[2:]:
            layer.q_proj.weight.data *= factor
    others = [parameter for parameter in model.parameters() if all(parameter is not query for query in queries)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": queries}])
    rates = (1.0, factor if scaling == SCALINGS[3] else 1.0)
    steps, entropies, norms = [], [], []
    for step in progress(range(config.max_steps), f"{scaling}, seed {run.seed}"):
        inputs, targets = (part.to(device_of(model)) for part in next(batches))
        logits, weights = model.look(inputs)
        if step % every == 0:
            steps.append(step)
            entropies.append(relative_entropy(weights.detach(), causal_mask(weights.shape[-1], device=weights.device)))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
        norms.append(nn.utils.clip_grad_norm_(list(model.parameters()), max_norm).item())
        warm = min(1.0, (step + 1) / math.ceil(config.max_steps / 20)) * (1 - step / config.max_steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = config.learning_rate * warm * rate
        optimizer.step()
    inputs, targets = (part.to(device_of(model)) for part in fresh_recall(config, run.seed))
    with torch.no_grad():
        right = accuracy(model(inputs), targets)
    return ScaleTrial(steps, entropies, right, sum(norm > max_norm for norm in norms) / len(norms))


def largest_weight(d_head: int, n_keys: int, scaled: bool, generator: torch.Generator, n_queries: int = 500) -> float:
    """Mean largest weight of a query over n_keys keys, all independent standard normal; uniform would be 1/n_keys."""
    q, k = (torch.randn(n_queries, 1, n, d_head, generator=generator) for n in (1, n_keys))
    weights = attention_weights(q, k, scale=None if scaled else 1.0)  # (queries, 1, 1, keys)
    return weights.amax(dim=-1).mean().item()


def score_gradient(d_head: int, n_keys: int, scaled: bool, generator: torch.Generator, n_queries: int = 2000) -> float:
    """Median length of the gradient for the scores of a query, as in `largest_weight`, when that for each weight is
    standard normal: how much of it the softmax lets through."""
    q, k = (torch.randn(n_queries, 1, n, d_head, generator=generator) for n in (1, n_keys))
    weights = attention_weights(q, k, scale=None if scaled else 1.0)  # (queries, 1, 1, keys)
    grad = torch.randn(weights.shape, generator=generator)  # (queries, 1, 1, keys)
    grad_scores = weights * (grad - (weights * grad).sum(dim=-1, keepdim=True))  # (queries, 1, 1, keys)
    return grad_scores.norm(dim=-1).median().item()


def linear_error(spread: float, generator: torch.Generator, n_keys: int = 64, d_head: int = 32) -> tuple[float, float]:
    """How far linear attention, and the plain mean of the values, lie from softmax attention: relative distances.

    Queries, keys and values are independent normal, the queries scaled so that scores have standard deviation `spread`.
    """
    q, k, v = (torch.randn(200, n, d_head, generator=generator) for n in (1, n_keys, n_keys))
    exact = scaled_dot_product_attention(q * spread, k, v)[0]
    others = linear_attention(q * spread, k, v), v.mean(dim=1, keepdim=True)
    return tuple(((other - exact).norm() / exact.norm()).item() for other in others)


def head_roles(weights: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean weight of every head of recall on two links that solve it: (layers, heads) each.

    Shapes: weights (layers, batch, heads, seq, seq), inputs and targets (batch, seq). First what a shown value puts on
    the key before it, then what a question puts on the value that answers it. Two layers need both: the value must
    carry its key before a question can find it (Elhage et al. 2021).
    """
    n_shown = inputs.shape[1] // 2
    values = torch.arange(1, n_shown, 2)
    to_key = weights[..., values, values - 1].mean(dim=(1, 3))  # (layers, heads)
    asked = (inputs[:, :, None] == inputs[:, None, : n_shown - 1]) & (targets != IGNORE)[:, :, None]
    links = F.pad(asked, (1, inputs.shape[1] - n_shown))  # (batch, seq, seq); the value follows its key
    to_answer = (weights * links[:, None]).sum(dim=(1, 3, 4)) / links.sum()  # (layers, heads)
    return to_key, to_answer


# What attention costs


class PeakMemory(TorchDispatchMode):
    """Within the block, `peak` is the largest number of bytes that tensors made there held at once.

    Sees every tensor that PyTorch's dispatcher hands out, on any device; not the private scratch of a fused kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.meet((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self.meet(result, is_new=True)
        return result

    def meet(self, tree, is_new: bool) -> None:
        for leaf in tree_leaves(tree):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is None or storage.nbytes() == 0 or storage.data_ptr() in self.known:
                continue  # a view, or a tensor met before
            size = storage.nbytes() if is_new else 0
            self.live += size
            self.peak = max(self.peak, self.live)
            self.known.add(storage.data_ptr())
            weakref.finalize(storage, self.forget, storage.data_ptr(), size).atexit = False

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def peak_memory(work: Callable[[], object]) -> int:
    with PeakMemory() as memory:
        work()
    return memory.peak


KINDS = ("naive", "tiled", "PyTorch", "linear")
Measure = TypeVar("Measure")


def measure_cost(
    config: CostConfig, run: RunConfig, measure: Callable[[Callable[[], object]], Measure]
) -> dict[str, dict[int, Measure]]:
    """`measure(work)` for forward and backward of each of KINDS, unmasked, one sequence, at doubling lengths.

    Returns {kind: {length: result}}. `peak_memory` measures bytes beyond the inputs; `time_costs` takes seconds.
    """
    functions = (
        lambda q, k, v: scaled_dot_product_attention(q, k, v)[0],
        lambda q, k, v: tiled_attention(q, k, v, tile_size=config.tile_size),
        F.scaled_dot_product_attention,
        linear_attention,
    )
    seed_everything(run.seed)
    device, costs, seq_len = pick_device(run.device), {kind: {} for kind in KINDS}, config.shortest
    while seq_len <= config.longest:
        shape = (1, config.n_heads, seq_len, config.d_head)
        inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in "qkv"]
        for kind, attend in zip(KINDS, functions, strict=True):

            def work(attend=attend, inputs=inputs) -> None:
                torch.autograd.grad(attend(*inputs).sum(), inputs)

            costs[kind][seq_len] = measure(work)
        seq_len *= 2
    return costs


def time_costs(config: CostConfig, run: RunConfig) -> dict[tuple[str, int], list[float]]:
    """Seconds of every timed run of `measure_cost`'s work, by kind and length, all kinds and lengths in turns."""
    works = measure_cost(config, run, lambda work: work)
    return time_in_turns({(kind, n): work for kind in works for n, work in works[kind].items()}, config.n_repeats)


def multi_head_works(config: CostConfig, run: RunConfig) -> dict[str, Callable[[], None]]:
    """Forward and backward of our layer and of PyTorch's with the same weights, 8 sequences."""
    seed_everything(run.seed)
    device = pick_device(run.device)
    ours = MultiHeadAttention(config.n_heads * config.d_head, config.n_heads).to(device)
    theirs = ours.to_torch()
    x = torch.randn(8, config.shortest, ours.d_model, device=device)

    def work(layer: nn.Module, *inputs: Tensor, **options) -> None:
        layer(*inputs, **options)[0].sum().backward()

    return {
        "ours": lambda: work(ours, x),
        "theirs": lambda: work(theirs, x, x, x, average_attn_weights=False),
    }


def growth(costs: dict[int, float]) -> float:
    """The exponent p of cost = fixed + length^p: the slope, in the logarithms, of what each doubling adds.

    Raises ValueError for fewer than three lengths.
    """
    if len(costs) < 3:
        raise ValueError(f"an exponent needs at least 3 lengths, got {len(costs)}; raise longest")
    lengths, values = np.array(list(costs.items()), dtype=float).T
    return float(np.polyfit(np.log(lengths[:-1]), np.log(np.diff(values)), deg=1)[0])


# Figures


def plot_lines(lines: dict[str, tuple[list, list]], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Curves by name, each (x, y); `log` makes both axes logarithmic, the horizontal one in powers of 2."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for name, (x, y) in lines.items():
        axis.plot(x, y, marker="o" if len(x) < 15 else "", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=len(lines), frameon=False)
    return figure


def three_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of "Ann waves she", one head of width 4, for the chapter's picture.

    Features of a token: name, verb, pronoun, female. Keys and values are the features themselves; the query of a verb
    asks for a name, that of a pronoun for a name and for female.
    """
    features = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]])  # (key, d_head)
    asks = torch.tensor([[0.0, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 2], [0, 0, 0, 0]])
    return features @ asks, features, features


def plot_three_tokens() -> Figure:
    """Draw causal self-attention on three tokens as grids of numbers, from queries and keys to the output."""
    q, k, v = three_tokens()
    output, weights = scaled_dot_product_attention(q, k, v, causal_mask(3))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~causal_mask(3), -math.inf)
    tokens = ("Ann", "waves", "she")
    parts = [
        ("$Q$", q, "what each token asks", ""),
        ("$K^\\top$", k.mT, "a column for each key", "·"),
        ("scores", scores, "divided by √4, future masked", "→"),
        ("weights", weights, "softmax of each row", "→"),
        ("$V$", v, "what is averaged", "·"),
        ("output", output, "a row for each token", "="),
    ]
    figure, axis = plt.subplots(figsize=(9.6, 2.1))
    left = 1.6
    for title, numbers, caption, sign in parts:
        n_rows, n_columns = numbers.shape
        axis.text(left - 0.65, 0, sign, ha="center", va="center", fontsize=13)
        for row, column in np.ndindex(n_rows, n_columns):
            x, y = left + column, n_rows / 2 - row
            number = numbers[row, column].item()
            shade = 0.0 if title != "weights" else 0.6 * number
            axis.add_patch(plt.Rectangle((x, y - 1), 1, 1, facecolor=("C1", shade), edgecolor="0.6", linewidth=0.6))
            text = "−∞" if number == -math.inf else f"{number:.2f}".rstrip("0").rstrip(".")
            axis.text(x + 0.5, y - 0.5, text, ha="center", va="center", fontsize=8)
        axis.text(left + n_columns / 2, n_rows / 2 + 0.2, title, ha="center", fontsize=10)
        axis.text(left + n_columns / 2, -n_rows / 2 - 0.6, caption, ha="center", fontsize=7)
        if title == "$Q$":
            for row, token in enumerate(tokens):
                axis.text(left - 0.2, 1 - row, token, ha="right", va="center", fontsize=9)
        left += n_columns + 1.3
    axis.set(xlim=(-0.3, left - 1.0), ylim=(-2.9, 2.8), aspect="equal")
    axis.axis("off")
    return figure


# The chapter's experiments


ALIGNMENT = (Column("alignment precision", digits=".3f"), Column("alignment recall", digits=".3f"))


class Study:
    """What every experiment needs: its configurations, shrunk if asked, its runs, and where its results go."""

    def __init__(self, config: FiguresConfig) -> None:
        shrink = config.shrink
        self.folder, self.seeds = config.folder, range(config.n_seeds)
        self.runs = [RunConfig(seed=seed, device="cpu") for seed in self.seeds]
        self.alignment = AlignmentConfig(max_steps=max(1, AlignmentConfig.max_steps // shrink))
        self.recall = RecallConfig(max_steps=max(1, RecallConfig.max_steps // shrink))
        draws = {largest_weight: 500, score_gradient: 2000}
        self.n_queries = {measure: max(100, n_queries // shrink) for measure, n_queries in draws.items()}
        shortest = max(1, CostConfig.shortest // shrink)
        self.cost = CostConfig(shortest=shortest, longest=8 * shortest)

    def save(self, name: str, columns: list[Column], rows: list[list], n_seeds: int | None = None) -> None:
        command = f"python 03-attention-mechanisms/attention_mechanisms.py figures {name}"
        save_results(self.folder / "results.json", name, columns, rows, self.seeds[:n_seeds], command)


def run_tasks(study: Study) -> None:
    """Copy and recall from a fixed vector and with attention: accuracy, and the alignment against the true one."""
    rows = []
    for task, attention_cls in ATTENTION_FOR.items():
        trials = [compare_on_task(task, attention_cls, study.alignment, run) for run in study.runs]
        fresh = [held_out(task, study.alignment, seed) for seed in study.seeds]
        for results in zip(*trials, strict=True):
            pairs = ["–", "–"]
            if results[0].weights is not None:
                pairs = [[result.precision for result in results], [result.recall for result in results]]
            rows.append([task, results[0].model, results[0].n_parameters, [r.accuracy for r in results], *pairs])
        guess = [guessed_alignment(links, src_lengths) for _, src_lengths, _, _, links in fresh]
        rows.append([task, "guessing", "–", 1 / N_KINDS, guess, guess])
        title = f"{task} of {study.alignment.n_symbols} tokens, seed {study.seeds[0]}"
        save_figure(plot_alignment(trials[0], fresh[0][-1], title), study.folder / f"alignment_{task}.svg")
    columns = [Column("task"), Column("model"), Column("parameters", digits=","), Column("accuracy", digits=".1%")]
    study.save("tasks", [*columns, *ALIGNMENT], rows)


def run_padding_breaks(study: Study) -> None:
    """The padding mask broken in two ways, on copy: accuracy, alignment, and the weight that lies on padding."""
    rows = []
    for name in BREAKS:
        config = replace(study.alignment, break_=name)
        results = [train_on_task("copy", BahdanauSeq2Seq, config.d_model, config, run) for run in study.runs]
        shares = [
            padding_share(result.weights, held_out("copy", config, seed)[1])
            for result, seed in zip(results, study.seeds, strict=True)
        ]
        scores = [[getattr(result, name) for result in results] for name in ("accuracy", "precision", "recall")]
        rows.append([f"`{name}`", *scores, shares])
    columns = [Column("`--break`"), Column("accuracy", digits=".1%"), *ALIGNMENT]
    study.save("padding-breaks", [*columns, Column("weight on padding", digits=".1%")], rows)


def run_causal_breaks(study: Study) -> None:
    """The causal mask broken in the same two ways, on recall: how well, and how well without the future in sight."""
    rows = []
    for name in BREAKS:
        trials = [trained_on_recall(replace(study.recall, break_=name), run) for run in study.runs]
        with torch.no_grad():
            at_once = [accuracy(model(inputs), targets) for model, inputs, targets in trials]
        rows.append([f"`{name}`", at_once, [accuracy_without_future(*trial) for trial in trials]])
    columns = [Column("accuracy, all positions at once"), Column("accuracy, one token at a time")]
    study.save("causal-breaks", [Column("`--break`"), *(replace(column, digits=".1%") for column in columns)], rows)


def run_scale(study: Study) -> None:
    """With and without 1/sqrt(d): entropy of the weights, and the accuracy it ends with.

    Every scaling at the usual learning rate; the first three at a fifth of it, and the two that the derivation calls
    the same model without clipping.
    """
    rate = study.recall.learning_rate
    cases = [(scaling, rate, 1.0) for scaling in SCALINGS]
    cases += [(scaling, rate / 5, 1.0) for scaling in SCALINGS[:3]]
    cases += [(scaling, rate, math.inf) for scaling in (SCALINGS[0], SCALINGS[3])]
    rows, curves = [], {}
    for scaling, learning_rate, max_norm in cases:
        config = replace(study.recall, learning_rate=learning_rate)
        trials = [entropy_through_training(config, scaling, run, max_norm=max_norm) for run in study.runs]
        entropies = np.array([trial.entropies for trial in trials])
        if len(curves) < 3:
            curves[scaling] = (trials[0].steps, entropies.mean(axis=0).tolist())
        clipped = [trial.clipped for trial in trials] if max_norm < math.inf else "–"
        cells = [clipped, entropies[:, 0].tolist(), entropies[:, -1].tolist(), [trial.accuracy for trial in trials]]
        rows.append([scaling, f"{learning_rate:g}", *cells])
    columns = [Column("scale"), Column("learning rate"), Column("steps clipped", digits=".0%")]
    columns += [Column(f"entropy, {when}", digits=".3f") for when in ("start", "end")]
    study.save("scale", [*columns, Column("accuracy", digits=".1%")], rows)
    figure = plot_lines(curves, "training step", "entropy of the weights / log(keys)")
    save_figure(figure, study.folder / "scale_entropy.svg")


def run_width(study: Study) -> None:
    """Against width, for standard normal queries and 64 keys: the mean largest weight, and the gradient let through."""
    rows = []
    for width in (4, 16, 64, 256, 512, 1024):
        cells = []
        for measure in (largest_weight, score_gradient):
            for scaled in (False, True):
                generators = (torch.Generator().manual_seed(seed) for seed in study.seeds)
                n_queries = study.n_queries[measure]
                cells.append([measure(width, 64, scaled, generator, n_queries) for generator in generators])
        rows.append([str(width), *cells])
    columns = [
        Column(f"{what}, {how}", digits=digits)
        for what, digits in (("largest weight", ".3f"), ("score gradient", ".4f"))
        for how in ("undivided", "divided")
    ]
    study.save("width", [Column("width d"), *columns], rows)
    save_figure(plot_three_tokens(), study.folder / "three_tokens.svg")


def run_heads(study: Study) -> None:
    """What each head of the attention-only model looks at, and the accuracy without it."""
    rows = []
    for run in study.runs:
        model, inputs, targets = trained_on_recall(study.recall, run)
        with torch.no_grad():
            logits, weights = model.look(inputs)
        to_key, to_answer = (part.tolist() for part in head_roles(weights, inputs, targets))
        for layer, row in enumerate(ablate_heads(model, inputs, targets)):
            for head, right in enumerate(row):
                cells = [accuracy(logits, targets), right, to_key[layer][head], to_answer[layer][head]]
                rows.append([f"seed {run.seed}, layer {layer}, head {head}", *cells])
            with ExitStack() as silence, torch.no_grad():
                for head in range(len(row)):
                    silence.enter_context(without_head(model.layers[layer], head))
                neither = accuracy(model(inputs), targets)
            rows.append([f"seed {run.seed}, layer {layer}, all", accuracy(logits, targets), neither, "–", "–"])
        if run.seed == study.seeds[0]:
            looks = torch.stack([weights[layer, 0, head] for layer in range(len(weights)) for head in range(len(row))])
            titles = [f"layer {layer}, head {head}" for layer in range(len(weights)) for head in range(len(row))]
            save_figure(plot_heads(looks, token_names(inputs[0]), titles=titles), study.folder / "heads.svg")
    shares = (Column("whole model"), Column("without it"))
    looks = (Column("value token → its key token"), Column("question → answer token"))
    columns = [replace(c, digits=".1%") for c in shares] + [replace(c, digits=".2f") for c in looks]
    study.save("heads", [Column("head"), *columns], rows)


def cost_rows(costs: dict[str, dict[int, float]], unit: Column) -> tuple[list[Column], list[list]]:
    """Columns and rows of a table of `measure_cost`: one length after the other."""
    lengths = [replace(unit, name=f"{seq_len} tokens") for seq_len in costs["naive"]]
    return [Column("attention"), *lengths], [[kind, *by_length.values()] for kind, by_length in costs.items()]


def run_memory(study: Study) -> None:
    """Peak memory of forward and backward against length: exact, the same in every run."""
    costs = measure_cost(study.cost, study.runs[0], lambda work: peak_memory(work) / 2**20)
    columns, rows = cost_rows(costs, Column("", "MiB", ".2f"))
    rows = [[*row, growth(costs[row[0]])] for row in rows]
    study.save("memory", [*columns, Column("grows as length to the power", digits=".2f")], rows, n_seeds=1)
    lines = {kind: (list(by_length), list(by_length.values())) for kind, by_length in costs.items()}
    save_figure(plot_lines(lines, "length (tokens)", "peak memory (MiB)", log=True), study.folder / "memory.svg")


def run_time(study: Study) -> None:
    """Time of forward and backward against length: the fastest of some runs."""
    costs: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for (kind, seq_len), seconds in time_costs(study.cost, study.runs[0]).items():
        costs[kind][seq_len] = 1e3 * min(seconds)  # milliseconds
    columns, rows = cost_rows(costs, Column("", "ms", ".1f"))
    rows = [[*row, row[-1] / row[-2]] for row in rows]
    study.save("time", [*columns, Column("last doubling", "×", ".1f")], rows, n_seeds=1)


def run_linear(study: Study) -> None:
    """How far linear attention lies from softmax attention, beside the plain mean of the values."""
    rows = []
    for spread in (0.25, 1.0, 4.0):
        pairs = [linear_error(spread, torch.Generator().manual_seed(seed)) for seed in study.seeds]
        rows.append([f"{spread:g}", *([pair[i] for pair in pairs] for i in range(2))])
    columns = [Column("standard deviation of the scores"), Column("linear attention"), Column("mean of the values")]
    study.save("linear", [columns[0], *(replace(column, digits=".2f") for column in columns[1:])], rows)


EXPERIMENTS: dict[str, tuple[Callable[[Study], None], float]] = {  # with seconds on one core at full size
    "width": (run_width, 1),
    "linear": (run_linear, 1),
    "memory": (run_memory, 5),
    "time": (run_time, 20),
    "scale": (run_scale, 95),
    "heads": (run_heads, 15),
    "causal-breaks": (run_causal_breaks, 35),
    "padding-breaks": (run_padding_breaks, 90),
    "tasks": (run_tasks, 130),
}


def figures(config: FiguresConfig) -> None:
    """Run the chapter's experiments; write every figure, results.json and the tables of the chapter."""
    torch.set_num_threads(1)
    run_experiments(EXPERIMENTS, config.only, config.folder, Study(config))
