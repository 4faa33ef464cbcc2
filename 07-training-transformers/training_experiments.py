"""Topic 07 - Training experiments: every measurement of the chapter.

python 07-training-transformers/training_transformers.py figures                   # all of them
python 07-training-transformers/training_transformers.py figures optimizers width  # some of them

Papers: McCandlish et al. 2018 (arXiv 1812.06162), the critical batch size; Yang et al. 2022 (arXiv 2203.03466), one
learning rate for narrow and wide models; Hu et al. 2024 (arXiv 2404.06395), the schedule with a stable phase.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

import training_failures
from optimizers import (
    OPTIMIZERS,
    QUINTIC_STEPS,
    GradientNoise,
    build_optimizer,
    gradient_noise_scale,
    gradient_squares,
    mup_groups,
    parameter_groups,
    quintic,
    scale_for_width,
    schedule_factor,
    set_learning_rates,
    shapes_alone,
    state_bytes,
    training_bytes,
)
from packing import Batch, language_model_loss
from sequence_modeling import document_batches, document_losses, gap_to_floor
from speedrun import speedrun_ablation, speedrun_table
from training_failures import (
    PRECISIONS,
    failure_rows,
    plot_autopsies,
    precision_gallery,
    precision_run,
    shown_alarms,
    spike_autopsies,
)
from training_speed import BenchConfig, activation_megabytes, batching_works, speeds, step_works
from training_transformers import TrainConfig, fit, range_test
from transformer_architecture import (
    CausalTransformer,
    ModelConfig,
    entropy_floor,
    held_out_documents,
    smooth,
    start_as_identity,
    tiny_world,
)
from workbench import (
    Column,
    RunConfig,
    check_folder,
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

SEQ_LEN = 64  # tokens in a row of every experiment here
TUNING_SEED = 100  # learning rates are chosen with this seed, results come from seeds 0, 1, ...
N_ROWS = 8192  # rows of training data that a seed draws; longer runs see them again


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # names of experiments; none means all
    n_seeds: int = 3  # runs of every condition that is compared
    n_documents: int = 300  # held-out documents to examine each model with
    seconds: float = 5.0  # CPU seconds of training in the comparison of optimizers
    schedule_steps: int = 240  # steps in the comparison of schedules
    width_steps: int = 100  # steps of each model in the comparison of widths
    target: float = 1.5  # held-out nats per token that every batch size has to reach
    most_steps: int = 2000  # steps after which a batch size has failed
    precision_steps: int = 60  # steps of each training in the precision gallery
    spike_steps: int = 90  # steps before the ones that spoil a run in the autopsy of loss spikes
    break_steps: int = 40  # steps of each training in the table of failures
    range_steps: int = 150  # steps of a learning-rate range test
    n_rounds: int = 7  # timed rounds of every way to make batches and steps
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "most_steps", "n_rounds", least=1)
        check_range(self, "schedule_steps", "width_steps", "precision_steps", "break_steps", "range_steps", least=10)
        check_range(self, "spike_steps", least=30)
        check_range(self, "n_documents", least=2)
        check_range(self, "seconds", "target", above=0)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)
        check_folder(self.folder)

    def save(
        self, name: str, columns: list[Column], rows: list[list], experiment: str, seeds: Iterable[int] | None = None
    ) -> None:
        """Record a table, by default of seeds 0, 1, ... n_seeds - 1."""
        command = f"python 07-training-transformers/training_transformers.py figures {experiment}"
        seeds = range(self.n_seeds) if seeds is None else seeds
        save_results(self.folder / "results.json", name, columns, rows, seeds, command)


# What the experiments share: a small model, rows of TinyWorld, the distance to its entropy


@functools.cache
def training_rows(seed: int, n_rows: int) -> Batch:
    """Rows of TinyWorld's train split, packed with whole documents: drawn once, so that no run pays for it."""
    world, vocabulary = tiny_world()
    inputs, targets = next(document_batches(world.stream(seed, split="train"), vocabulary, n_rows, SEQ_LEN, seed))
    return {"inputs": inputs, "targets": targets}


def batches_of(rows: Batch, batch_size: int, start: int = 0) -> Callable[[int], Batch]:
    """The batch of each step: the next `batch_size` rows, from row `start` on and round again after the last."""
    n_rows = len(rows["inputs"])

    def batch(step: int) -> Batch:
        chosen = (start + step * batch_size + torch.arange(batch_size)) % n_rows
        return {name: tensor[chosen] for name, tensor in rows.items()}

    return batch


def new_model(seed: int, run: RunConfig, d_model: int = 64, identity: bool = True) -> CausalTransformer:
    """Two blocks, four heads, rotary positions; every block starts as the identity: its last matrices are 0."""
    seed_everything(seed)
    model = CausalTransformer(ModelConfig(d_model=d_model, d_ff=4 * d_model), len(tiny_world()[1]))
    if identity:
        start_as_identity(model)
    return model.to(pick_device(run.device))


@dataclass(frozen=True)
class Outcome:
    """What one training run gives; a run that diverged has a gap of infinity."""

    gap: float  # held-out nats per token above the entropy floor
    standard_error: float  # of the gap, from the draw of the held-out documents
    n_steps: int
    log: list[dict[str, float]]


def train(
    model: CausalTransformer,
    config: TrainConfig,
    seed: int,
    n_documents: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> Outcome:
    """Train a model on the rows of a seed, and examine it on held-out documents."""
    batches = batches_of(training_rows(seed, N_ROWS), config.batch_size)
    try:
        log = fit(model, batches, language_model_loss, config, optimizer=optimizer)
    except ValueError as error:
        if "had to be skipped" not in str(error):
            raise
        return Outcome(math.inf, 0.0, 0, [])
    gap, standard_error = held_out_gap(model, n_documents)
    return Outcome(gap, standard_error, int(log[-1]["step"]), log)


def held_out_gap(model: nn.Module, n_documents: int) -> tuple[float, float]:
    documents = held_out_documents(n_documents)
    return gap_to_floor(document_losses(model, documents, tiny_world()[1]), documents)


def best_rate(outcomes: dict[float, Outcome]) -> float:
    """The lowest rate whose gap is within one standard error of the least: one seed cannot tell those apart."""
    best = min(outcomes.values(), key=lambda outcome: outcome.gap)
    return min(rate for rate, outcome in outcomes.items() if outcome.gap <= best.gap + best.standard_error)


def shown_gap(gap: float) -> float | str:
    return gap if math.isfinite(gap) else "diverged"


def plain_ticks(axis: plt.Axes) -> None:
    """A logarithmic y axis with its ticks written out."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [lead * 10.0**power for power in range(-3, 4) for lead in (1, 1.5, 2, 3, 4, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


# Optimizers at equal CPU time


GRID = (0.25, 0.5, 1.0, 2.0)  # learning rates that every optimizer is tried with, as multiples of its own
OPTIMIZER_RATES = {"momentum": 1.6, "adamw": 0.016, "adafactor": 0.16, "lion": 8e-3, "lamb": 0.04, "muon": 0.064}
LION_BETA2 = 0.99  # as Chen et al. 2023; the others have the default


def optimizer_run(
    name: str, rate: float, seed: int, config: FiguresConfig, run: RunConfig, identity: bool = True
) -> Outcome:
    """Train the small model for `config.seconds` of CPU time; the rate falls in a straight line over that time."""
    settings = TrainConfig(
        optimizer=name,
        learning_rate=rate,
        schedule="linear",
        min_lr_ratio=0.0,
        max_steps=400,
        warmup_steps=20,
        beta2=LION_BETA2 if name == "lion" else 0.95,
        budget=config.seconds,
        clock="cpu",
    )
    return train(new_model(seed, run, identity=identity), settings, seed, config.n_documents)


def optimizers(config: FiguresConfig, run: RunConfig) -> None:
    """Six optimizers at equal CPU time.

    Predicted before the first run: Muon comes nearest to the floor although its steps cost more; Adafactor within a
    fifth of AdamW's gap; Lion and LAMB behind AdamW, by less than a half; momentum last, with three times AdamW's gap.
    """
    grid = {name: {} for name in OPTIMIZER_RATES}
    for name, factor in progress([(name, factor) for name in grid for factor in GRID], "tuning"):
        rate = factor * OPTIMIZER_RATES[name]
        grid[name][rate] = optimizer_run(name, rate, TUNING_SEED, config, run)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in grid}
    for seed in progress(range(config.n_seeds), "seeds"):
        for name in grid:  # in turns: a busy moment of the machine hits all alike
            outcomes[name].append(optimizer_run(name, best_rate(grid[name]), seed, config, run))
    columns = [Column("optimizer", digits="s"), *(Column(f"{factor:g} x", "", ".3f") for factor in GRID)]
    columns.insert(1, Column("rate at 1 x", "", "g"))
    rows = [
        [name, OPTIMIZER_RATES[name], *(shown_gap(outcome.gap) for outcome in tried.values())]
        for name, tried in grid.items()
    ]
    config.save("optimizer-grid", columns, rows, "optimizers", seeds=[TUNING_SEED])
    columns = [
        Column("optimizer", digits="s"),
        Column("learning rate", "", "g"),
        Column("gap to the floor", "nats per token", ".3f"),
        Column("standard error of one gap", "nats per token", ".3f"),
        Column("steps", "", ".0f"),
    ]
    rows = [
        [
            name,
            best_rate(grid[name]),
            [outcome.gap for outcome in found],
            float(np.mean([outcome.standard_error for outcome in found])),
            [outcome.n_steps for outcome in found],
        ]
        for name, found in outcomes.items()
    ]
    config.save("optimizers", columns, rows, "optimizers")
    logs = {name: [outcome.log for outcome in found] for name, found in outcomes.items()}
    figure = plot_optimizers(logs, entropy_floor(config.n_documents), config.seconds)
    save_figure(figure, config.folder / "optimizers.svg")
    compare_starts({name: (best_rate(grid[name]), outcomes[name]) for name in RELATIVE if name in grid}, config, run)


RELATIVE = ("adamw", "adafactor", "lamb")  # the last two take steps relative to the size of the weights


def compare_starts(chosen: dict[str, tuple[float, list[Outcome]]], config: FiguresConfig, run: RunConfig) -> None:
    """The diagnosis of a prediction that failed: do relative steps suffer from matrices that start at 0?

    Predicted before it was run: without zeros at the start Adafactor and LAMB gain at least 0.1 nats, AdamW nothing.
    """
    rows = []
    for name, (rate, found) in chosen.items():
        plain = [optimizer_run(name, rate, seed, config, run, False).gap for seed in range(config.n_seeds)]
        rows.append([name, [outcome.gap for outcome in found], plain])
    columns = [Column("optimizer", digits="s"), Column("gap from zeros in every block", "nats per token", ".3f")]
    columns.append(Column("gap from Xavier's variance everywhere", "nats per token", ".3f"))
    config.save("optimizer-starts", columns, rows, "optimizers")


def plot_optimizers(logs: dict[str, list[list[dict]]], floor: float, seconds: float) -> Figure:
    """Training loss above the entropy floor against CPU time and against steps, averaged over seeds and smoothed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for name, runs in logs.items():
        n_rows = min(len(log) for log in runs)
        gaps = np.mean([[row["loss"] - floor for row in log[:n_rows]] for log in runs], axis=0)
        averaged = smooth(gaps, 3)
        steps = np.mean([[row["step"] for row in log[:n_rows]] for log in runs], axis=0)[-len(averaged) :]
        axes[0].plot(seconds * steps / np.mean([log[-1]["step"] for log in runs]), averaged, label=name)
        axes[1].plot(steps, averaged, label=name)
    axes[0].set(xlabel="CPU seconds", ylabel="training loss above the floor (nats)")
    axes[1].set(xlabel="steps")
    axes[0].set_ylim(top=2 * axes[0].get_ylim()[1])
    axes[1].legend(frameon=False, ncols=3, loc="upper center")
    plain_ticks(axes[0])
    return figure


# What Muon does to singular values, and what each optimizer remembers


def muon(config: FiguresConfig, run: RunConfig) -> None:
    """Where the Newton-Schulz polynomial sends the singular values, step by step; nothing here is random."""
    start = np.geomspace(1e-3, 1, 2001)
    after = [start]
    for _ in range(QUINTIC_STEPS + 1):
        after.append(quintic(after[-1]))
    edges = (1e-3, 1e-2, 1e-1, 1.0)
    columns = [Column("steps", "", "d"), *(Column(f"from {edge:g}", "", ".3f") for edge in edges)]
    columns += [Column("least from 0.01 on", "", ".3f"), Column("most from 0.01 on", "", ".3f")]
    rows = []
    for n_steps, values in enumerate(after):
        upper = values[start >= 0.01]
        rows.append([n_steps, *(float(np.interp(edge, start, values)) for edge in edges), upper.min(), upper.max()])
    config.save("newton-schulz", columns, rows, "muon", seeds=[0])
    save_figure(plot_newton_schulz(start, after), config.folder / "newton_schulz.svg")


def plot_newton_schulz(start: np.ndarray, after: list[np.ndarray]) -> Figure:
    """Singular values after 1, 3 and 5 steps of the polynomial against those before."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for n_steps in (1, 3, 5):
        axis.plot(start, after[n_steps], label=f"{n_steps} step{'s' if n_steps > 1 else ''}")
    axis.plot(start, start, color="grey", lw=1, label="before")
    axis.axhline(1, color="black", ls="--", lw=1)
    axis.set(xlabel="singular value / Frobenius norm", ylabel="singular value after", xscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def memory(config: FiguresConfig, run: RunConfig) -> None:
    """Bytes of state per parameter: measured on the small model, and by the formula for the sizes of GPT-2 small."""
    batch = batches_of(training_rows(0, 8), 8)(0)
    with shapes_alone():
        large = CausalTransformer(ModelConfig(1024, 768, 12, 12, 3072, positions="learned"), 50_257)
        large.lm_head.weight = large.token_emb.weight
    n_large, rows = sum(parameter.numel() for parameter in large.parameters()), []
    for name in OPTIMIZERS:
        model = new_model(0, run)
        optimizer = build_optimizer(model, name, 1e-3)
        take_step(model, batch, optimizer, 1.0)
        n_small = sum(parameter.numel() for parameter in model.parameters())
        predicted, total = training_bytes(model, name)["state"], training_bytes(large, name)
        rows.append([name, predicted / n_small, state_bytes(optimizer) / n_small, total["state"] / n_large])
        rows[-1].append(sum(total.values()) / 1e9)
    columns = [Column("optimizer", digits="s"), Column("state by the formula", "bytes per parameter", ".2f")]
    columns += [
        Column("measured", "bytes per parameter", ".2f"),
        Column("GPT-2 small: state", "bytes per parameter", ".2f"),
        Column("GPT-2 small: weights, gradients and state", "GB", ".2f"),
    ]
    config.save("optimizer-memory", columns, rows, "memory", seeds=[0])


# Learning rate and width


WIDTHS = (16, 32, 64, 128)
WIDTH_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
PARAMETRISATIONS = ("standard", "μP")


@functools.cache
def width_run(kind: str, d_model: int, rate: float, seed: int, config: FiguresConfig, run: RunConfig) -> Outcome:
    """A short run at one width: the usual parametrisation, or μP with the first of WIDTHS as its base."""
    model, steps = new_model(seed, run, d_model), config.width_steps
    if kind == "μP":
        scale_for_width(model, WIDTHS[0])
        groups = mup_groups(model, WIDTHS[0], rate, 0.1)
    else:
        groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, rate, (0.9, 0.95), fused=True)
    settings = TrainConfig(
        batch_size=4,
        max_steps=steps,
        warmup_steps=steps // 10,
        learning_rate=rate,
        schedule="linear",
        min_lr_ratio=0.0,
    )
    return train(model, settings, seed, config.n_documents // 3, optimizer)


def width(config: FiguresConfig, run: RunConfig) -> None:
    """The best learning rate at four widths, in the usual parametrisation and in μP.

    Predicted before the first run: the best rate of the usual parametrisation falls at least fourfold from width 16 to
    128, that of μP stays within a factor of 2; at width 128 the rate that was best at 16 costs the usual
    parametrisation more than 0.1 nats, and μP less than 0.02.
    """
    places = [(kind, d_model) for kind in PARAMETRISATIONS for d_model in WIDTHS]
    gaps: dict[tuple, dict[float, float]] = {place: {} for place in places}
    for place, rate in progress([(place, rate) for place in places for rate in WIDTH_RATES], "width"):
        same = gaps[("standard", place[1])].get(rate) if place[1] == WIDTHS[0] else None  # equal at the base width
        gaps[place][rate] = width_run(*place, rate, TUNING_SEED, config, run).gap if same is None else same
    best = {place: min(by_rate, key=by_rate.get) for place, by_rate in gaps.items()}
    columns = [Column("parametrisation", digits="s"), Column("width", "", "d")]
    columns += [Column(f"{rate:g}", "", ".3f") for rate in WIDTH_RATES]
    rows = [[*place, *(shown_gap(gap) for gap in by_rate.values())] for place, by_rate in gaps.items()]
    config.save("width-grid", columns, rows, "width", seeds=[TUNING_SEED])
    rows = []
    for kind, d_model in progress(places, "seeds"):
        rates = best[kind, d_model], best[kind, WIDTHS[0]]
        own, moved = (
            [width_run(kind, d_model, rate, seed, config, run).gap for seed in range(config.n_seeds)] for rate in rates
        )
        rows.append([kind, d_model, rates[0], own, rates[1], moved])
    columns = columns[:2] + [Column("best rate", "", "g"), Column("gap", "nats per token", ".3f")]
    columns += [Column(f"best rate at width {WIDTHS[0]}", "", "g"), Column("gap with that", "nats per token", ".3f")]
    config.save("width", columns, rows, "width")
    save_figure(plot_widths(gaps), config.folder / "width.svg")


def plot_widths(gaps: dict[tuple, dict[float, float]]) -> Figure:
    """Gap against learning rate, a line for each width and a panel for each parametrisation; the best is marked."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, kind in zip(axes, PARAMETRISATIONS, strict=True):
        for d_model in WIDTHS:
            finite = {rate: gap for rate, gap in gaps[kind, d_model].items() if math.isfinite(gap)}
            (line,) = axis.plot(finite.keys(), finite.values(), label=f"width {d_model}")
            best = min(finite, key=finite.get)
            axis.plot(best, finite[best], "o", color=line.get_color())
        axis.set(title=kind, xlabel="learning rate", xscale="log")
    axes[0].set(ylabel="gap to the floor (nats per token)")
    axes[1].legend(frameon=False)
    plain_ticks(axes[0])
    return figure


RANGE_WIDTHS = (32, 64, 128)


def ranges(config: FiguresConfig, run: RunConfig) -> None:
    """The rate that a range test suggests, by width.

    Predicted before the first run with three seeds: it falls by a factor of 2 to 8 from width 32 to 128, and differs
    by less than a factor of 2 between seeds.
    """
    settings = TrainConfig(max_steps=config.range_steps, warmup_steps=0, schedule="constant")
    rows = []
    for d_model in progress(RANGE_WIDTHS, "range tests"):
        suggested = []
        for seed in range(config.n_seeds):
            batches = batches_of(training_rows(seed, N_ROWS), settings.batch_size)
            suggested.append(range_test(new_model(seed, run, d_model), batches, language_model_loss, settings)[2])
        rows.append([d_model, suggested])
    config.save("range", [Column("width", "", "d"), Column("suggested rate", "", ".4f")], rows, "range")


# How large a batch is worth its samples


BATCH_SIZES = (1, 2, 4, 8, 16, 32)
BATCH_RATES = (2e-3, 4e-3, 8e-3)  # learning rates tried for one row; for B rows sqrt(B) times as high
NOISE_PARTS, NOISE_ROWS = 64, 2  # micro-batches of a measurement of the noise scale, and rows in each
N_EXAMINED = 60  # held-out documents that say whether the target is reached


def held_out_loss(model: nn.Module) -> float:
    documents = held_out_documents(N_EXAMINED)
    return sum(document_losses(model, documents, tiny_world()[1])) / sum(len(doc.tokens) for doc in documents)


def steps_to_target(batch_size: int, rate: float, seed: int, config: FiguresConfig, run: RunConfig) -> float:
    """Steps of AdamW at a constant rate (after 5 of warm-up) until the held-out loss is at the target.

    The loss is examined about every tenth of the steps so far, and between two examinations interpolated on a
    logarithmic axis of steps. Infinite if most_steps do not suffice or the loss is not finite.
    """
    model = new_model(seed, run)
    optimizer = build_optimizer(model, "adamw", rate)
    batches = batches_of(training_rows(seed, N_ROWS), batch_size)
    before, next_look = (1, math.log(model.vocab_size)), 8
    for step in range(config.most_steps):
        take_step(model, batches(step), optimizer, schedule_factor("constant", step, config.most_steps + 5, 5))
        if step + 1 == next_look:
            now, next_look = (next_look, held_out_loss(model)), math.ceil(1.1 * next_look)
            if not math.isfinite(now[1]):
                return math.inf
            if now[1] <= config.target:
                share = (before[1] - config.target) / (before[1] - now[1])
                return before[0] * (now[0] / before[0]) ** share
            before = now
    return math.inf


def take_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, factor: float) -> None:
    loss, count = language_model_loss(model, batch)
    optimizer.zero_grad()
    (loss / count).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    set_learning_rates(optimizer, factor)
    optimizer.step()


def critical_batch(sizes: Iterable[int], steps: Iterable[float]) -> tuple[float, float]:
    """(S_min, E_min) of (S / S_min - 1)(E / E_min - 1) = 1 with E = size * S (McCandlish et al. 2018, equation 2.11).

    That is S = S_min (1 + B / size) with the critical batch size B = E_min / S_min, fitted to the logarithms of the
    steps: the best S_min for each B in closed form, the best B among 4,000 on a logarithmic scale.
    """
    sizes, logs = np.asarray(list(sizes), dtype=float), np.log(list(steps))
    candidates = np.geomspace(sizes.min() / 10, sizes.max() * 10, 4000)
    rises = np.log1p(candidates[:, None] / sizes)  # (candidates, sizes)
    offsets = (logs - rises).mean(axis=1)
    best = np.square(logs - rises - offsets[:, None]).sum(axis=1).argmin()
    return float(np.exp(offsets[best])), float(np.exp(offsets[best]) * candidates[best])


def measure_noise(model: nn.Module, rows: Batch, start: int) -> GradientNoise:
    """The noise scale, in rows, from micro-batches of NOISE_ROWS rows and the batch of all of them."""
    batches = batches_of(rows, NOISE_ROWS, start)
    parts = (language_model_loss(model, batches(index)) for index in range(NOISE_PARTS))
    squares, square = gradient_squares(model, (loss / count for loss, count in parts))
    return gradient_noise_scale(squares, [square], NOISE_ROWS, NOISE_ROWS * NOISE_PARTS)


def noise_along_training(rate: float, seed: int, config: FiguresConfig, run: RunConfig) -> list[tuple[float, float]]:
    """(held-out loss, noise scale in rows) along a run with batches of 8, from the first step to the target."""
    model, found = new_model(seed, run), []
    optimizer, rows = build_optimizer(model, "adamw", rate), training_rows(seed, N_ROWS)
    batches, next_look = batches_of(rows, 8), 1
    for step in range(config.most_steps):
        take_step(model, batches(step), optimizer, schedule_factor("constant", step, config.most_steps + 5, 5))
        if step + 1 == next_look:
            next_look = math.ceil(1.5 * next_look)
            found.append((held_out_loss(model), measure_noise(model, rows, N_ROWS // 2).scale))
            if found[-1][0] <= config.target:
                break
    return found


def batch(config: FiguresConfig, run: RunConfig) -> None:
    """Steps and rows to one loss at six batch sizes, and the gradient noise scale on the way.

    Predicted before the first run: the hyperbola fits every size within 20 %; the critical batch size lies between 4
    and 32 rows; the noise scale grows along the run and at its end is within a factor of 3 of it.
    """
    tried = [(size, rate) for size in BATCH_SIZES for rate in BATCH_RATES]
    grid = {
        (size, rate): steps_to_target(size, rate * math.sqrt(size), TUNING_SEED, config, run)
        for size, rate in progress(tried, "tuning")
    }
    best = {
        size: math.sqrt(size) * min(BATCH_RATES, key=lambda rate, size=size: grid[size, rate]) for size in BATCH_SIZES
    }
    columns = [Column("rows in a batch, B", "", "d")]
    columns += [Column(f"rate {rate:g} √B", "steps", ".0f") for rate in BATCH_RATES]
    rows = [[size, *(shown_steps(grid[size, rate]) for rate in BATCH_RATES)] for size in BATCH_SIZES]
    config.save("batch-grid", columns, rows, "batch", seeds=[TUNING_SEED])
    seeds = range(config.n_seeds)
    steps = {
        size: [steps_to_target(size, rate, seed, config, run) for seed in seeds]
        for size, rate in progress(best.items(), "seeds")
    }
    reached = {size: found for size, found in steps.items() if all(map(math.isfinite, found))}
    fits = [critical_batch(reached, [found[seed] for found in reached.values()]) for seed in seeds]
    least, fewest = np.exp(np.log(fits).mean(axis=0))
    columns = [
        Column("rows in a batch", "", "d"),
        Column("learning rate", "", ".3g"),
        Column("steps", "", ".0f"),
        Column("rows in all", "", ".0f"),
        Column("steps by the fitted curve", "", ".0f"),
    ]
    rows = [
        [size, best[size], found, [size * n_steps for n_steps in found], least * (1 + fewest / least / size)]
        for size, found in reached.items()
    ]
    config.save("batch", columns, rows, "batch")
    noise = [noise_along_training(best[8], seed, config, run) for seed in progress(seeds, "noise scale")]
    rows = [
        ["fewest steps, S_min", [s for s, _ in fits]],
        ["fewest rows, E_min", [e for _, e in fits]],
        ["critical batch size in rows, E_min / S_min", [e / s for s, e in fits]],
        ["noise scale in rows, first step", [found[0][1] for found in noise]],
        ["noise scale in rows, at the target", [found[-1][1] for found in noise]],
    ]
    config.save("noise-scale", [Column("Measured", digits="s"), Column("value", "", ".1f")], rows, "batch")
    save_figure(plot_batches(reached, least, fewest, noise), config.folder / "batch.svg")


def shown_steps(steps: float) -> float | str:
    return steps if math.isfinite(steps) else "not reached"


def plot_batches(
    steps: dict[int, list[float]], least: float, fewest: float, noise: list[list[tuple[float, float]]]
) -> Figure:
    """Left: steps against rows, measured and fitted. Right: the noise scale as the loss falls."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    sizes = np.geomspace(min(steps) / 2, max(steps) * 2, 200)
    curve = least * (1 + fewest / least / sizes)
    left.loglog(sizes * curve, curve, color="grey", label="fitted curve")
    for size, found in steps.items():
        left.plot([size * n_steps for n_steps in found], found, "o", color="C0", ms=4)
        left.annotate(f"{size}", (size * max(found), max(found)), xytext=(6, -4), textcoords="offset points")
    left.axhline(least, color="black", ls=":", lw=1)
    left.axvline(fewest, color="black", ls=":", lw=1)
    left.set(xlabel="rows to the target", ylabel="steps to the target")
    left.legend(frameon=False)
    for index, found in enumerate(noise):
        right.plot(*zip(*found, strict=True), "o-", ms=3, label=f"noise scale, seed {index}")
    right.axhline(fewest / least, color="black", ls="--", label="critical batch size")
    right.invert_xaxis()
    right.set(xlabel="held-out loss (nats per token)", ylabel="rows")
    right.legend(frameon=False, fontsize=8)
    plain_ticks(right)
    return figure


# Schedules at equal steps


SCHEDULE_RATES = (4e-3, 8e-3, 1.6e-2)
COMPARED_SCHEDULES = ("constant", "linear", "cosine", "wsd")


def schedule_run(name: str, rate: float, seed: int, config: FiguresConfig, run: RunConfig) -> Outcome:
    steps = config.schedule_steps
    settings = TrainConfig(
        max_steps=steps,
        warmup_steps=steps // 15,
        cooldown_steps=steps // 5 if name == "wsd" else 0,
        schedule=name,
        min_lr_ratio=0.0,
        learning_rate=rate,
    )
    return train(new_model(seed, run), settings, seed, config.n_documents)


def schedules(config: FiguresConfig, run: RunConfig) -> None:
    """Four schedules at equal steps, each at the best of three rates.

    Predicted before the first run: linear and cosine within two standard errors of each other; wsd, whose cooldown
    takes a fifth of the steps, within 5 % of cosine; constant last, with a gap at least 30 % larger.
    """
    tried = [(name, rate) for name in COMPARED_SCHEDULES for rate in SCHEDULE_RATES]
    grid: dict[str, dict[float, Outcome]] = {name: {} for name in COMPARED_SCHEDULES}
    for name, rate in progress(tried, "tuning"):
        grid[name][rate] = schedule_run(name, rate, TUNING_SEED, config, run)
    chosen = {name: best_rate(by_rate) for name, by_rate in grid.items()}
    outcomes = {
        name: [schedule_run(name, rate, seed, config, run) for seed in range(config.n_seeds)]
        for name, rate in progress(chosen.items(), "seeds")
    }
    columns = [Column("schedule", digits="s"), *(Column(f"gap at {rate:g}", "", ".3f") for rate in SCHEDULE_RATES)]
    columns += [
        Column("best rate", "", "g"),
        Column("gap to the floor", "nats per token", ".3f"),
        Column("standard error of one gap", "nats per token", ".3f"),
    ]
    rows = [
        [
            name,
            *(shown_gap(outcome.gap) for outcome in grid[name].values()),
            chosen[name],
            [outcome.gap for outcome in found],
            float(np.mean([outcome.standard_error for outcome in found])),
        ]
        for name, found in outcomes.items()
    ]
    config.save("schedules", columns, rows, "schedules")
    logs = {name: [outcome.log for outcome in found] for name, found in outcomes.items()}
    save_figure(plot_schedules(config, logs, entropy_floor(config.n_documents)), config.folder / "schedules.svg")


def plot_schedules(config: FiguresConfig, logs: dict[str, list[list[dict]]], floor: float) -> Figure:
    """Left: the four schedules. Right: training loss above the floor, averaged over seeds and smoothed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    steps = config.schedule_steps
    for name, runs in logs.items():
        cooldown = steps // 5 if name == "wsd" else 0
        left.plot([schedule_factor(name, step, steps, steps // 15, cooldown) for step in range(steps)], label=name)
        averaged = smooth(np.mean([[row["loss"] - floor for row in log] for log in runs], axis=0), 5)
        right.plot([row["step"] for row in runs[0]][-len(averaged) :], averaged, label=name)
    left.set(xlabel="step", ylabel="share of the full rate")
    right.set(xlabel="step", ylabel="training loss above the floor (nats)")
    right.legend(frameon=False)
    plain_ticks(right)
    return figure


# What goes wrong, and what things cost: training_failures and training_speed measure it


def precision(config: FiguresConfig, run: RunConfig) -> None:
    """What fp16 and bf16 lose, number by number, and what that does to a training.

    Predicted before the first run: fp16 without a loss scale ends at least a tenth further from the floor than fp32,
    weights in bf16 furthest of all; bf16 products and fp16 with a scaler within the spread of fp32.
    """
    gallery = precision_gallery(config.precision_steps, run)
    rows = [[what, sound, wrong if math.isfinite(wrong) else str(wrong)] for what, sound, wrong in gallery]
    columns = [Column("what", digits="s"), Column("as it should be"), Column("in few bits")]
    config.save("precision-gallery", columns, rows, "precision", seeds=[0])
    settings = TrainConfig(max_steps=config.precision_steps, warmup_steps=config.precision_steps // 6)
    rows = []
    for name in progress(PRECISIONS, "precisions"):
        found = [
            precision_run(name, settings, dataclasses.replace(run, seed=seed), config.n_documents)
            for seed in range(config.n_seeds)
        ]
        rows.append([name, [gap for gap, _ in found], [skipped for _, skipped in found]])
    columns = [Column("precision", digits="s"), Column("gap to the floor", "nats per token", ".3f")]
    columns += [Column("skipped steps", "", ".1f")]
    config.save("precision", columns, rows, "precision")


def spikes(config: FiguresConfig, run: RunConfig) -> None:
    """Three bad steps in the middle of a run: which monitor moves first, and what keeps the damage small.

    Predicted before the first run: after bad batches clipping and the shorter memory of beta2 = 0.95 both help, and
    without both the loss rises most. With a rate that is too high the relative update moves in the same step, loss and
    gradient norm one step later; clipping changes nothing there, because Adam divides the size of the gradient out.
    """
    found = spike_autopsies(config.spike_steps, range(config.n_seeds), run)
    monitors = list(found["bad batches"][0].series)
    rows = [
        [
            name,
            [each.peak() for each in autopsies],
            [each.cost() for each in autopsies],
            *(shown_alarms([each.alarm(monitor) for each in autopsies]) for monitor in monitors),
        ]
        for name, autopsies in found.items()
    ]
    columns = [Column("three bad steps", digits="s"), Column("highest loss after", "nats above before", ".2f")]
    columns += [Column("mean loss of 25 steps after", "nats above before", ".3f")]
    columns += [Column(f"alarm of {monitor}", "steps", "s") for monitor in monitors]
    config.save("spikes", columns, rows, "spikes")
    save_figure(plot_autopsies({name: each[0] for name, each in found.items()}), config.folder / "spikes.svg")


def breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Each failure that --break switches on: its symptom and its end, as it should be and with the failure."""
    columns = [Column("`--break`"), Column("measured", digits="s"), Column("as it should be", "", ".2f")]
    rows = failure_rows(config.break_steps, dataclasses.replace(run, seed=0))
    config.save("breaks", [*columns, Column("with the failure", "", ".2f")], rows, "breaks", seeds=[0])


def throughput(config: FiguresConfig, run: RunConfig) -> None:
    """Seconds of the same work done in other ways, in turns, as speed beside the plain way.

    Predicted before the first run: 4 micro-batches 0.7 of the speed of one batch; bf16 slower on a CPU without matrix
    units for it; checkpointing 0.75, for one forward pass more beside three; bucketed and packed batches of the same
    documents 1.5 times the speed of padded ones or more.
    """
    settings, shape = TrainConfig(), training_failures.MODEL
    timed = time_in_turns(step_works(shape, settings, run), config.n_rounds)
    kept = dict(zip(("plain", "checkpointed"), activation_megabytes(shape, settings, run), strict=True))
    rows = [[name, *speeds(timed[name], timed["plain"]), kept.get(name, "")] for name in timed]
    columns = [Column("a step of 8 rows", digits="s"), Column("speed", "of plain", ".2f"), Column("range", digits="s")]
    config.save("step-speed", [*columns, Column("activations kept", "MB", ".2f")], rows, "throughput", seeds=[0])
    works = batching_works(BenchConfig(config.n_rounds), shape, settings, run)
    timed = time_in_turns({name: work for name, (work, _) in works.items()}, config.n_rounds)
    rows = [[name, share, *speeds(timed[name], timed["padded"])] for name, (_, share) in works.items()]
    columns = [Column("batches of documents", digits="s"), Column("real tokens", "", ".1%")]
    columns += [Column("speed", "of padded", ".2f"), Column("range", digits="s")]
    config.save("batching-speed", columns, rows, "throughput", seeds=[0])


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], int]] = {  # name -> function, seconds
    "muon": (muon, 1),
    "memory": (memory, 3),
    "optimizers": (optimizers, 330),
    "width": (width, 200),
    "batch": (batch, 200),
    "range": (ranges, 40),
    "schedules": (schedules, 180),
    "precision": (precision, 150),
    "spikes": (spikes, 120),
    "breaks": (breaks, 30),
    "throughput": (throughput, 60),
    "speedrun": (lambda config, run: speedrun_table(config.folder, config.n_seeds), 750),
    "speedrun_ablation": (lambda config, run: speedrun_ablation(config.folder, config.n_seeds), 750),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
    training_rows.cache_clear()
    width_run.cache_clear()
