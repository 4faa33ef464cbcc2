"""Topic 12 - Scaling experiments: the tables and figures of the chapter.

python 12-scaling-optimization/scaling_optimization.py figures                  # all of them: about an hour
python 12-scaling-optimization/scaling_optimization.py figures isoflop plans    # some of them

The iso-FLOP runs stay in --out: a second call trains nothing that is there. A prediction is written to
predictions.jsonl in --out before its run is made.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from compression_experiments import COMPRESSION_EXPERIMENTS, CompressionFiguresConfig, bench_compression
from course_model import load_course_model
from equal_compute import remembered
from fact_world import TOKENS_PER_STEP, FactWorld, fact_config, fact_run
from isoflop_runs import ScaleConfig, as_runs, early_readings, matmul_weights, plan_cells, train_all, world_entropy
from llm_calculators import count_parameters
from machine_roofline import (
    PHASES,
    Placed,
    RooflineConfig,
    compare_compiled,
    layer_works,
    measure,
    place,
    plot_rooflines,
    profile_steps,
    step_flops,
    training_step,
)
from modern_llm_architectures import CausalLM
from scaling_failures import PLANTED, PLANTED_BUDGETS, PLANTED_SIZES, SCALING_BREAKS
from scaling_laws import (
    KAPLAN_EXPONENT,
    PUBLISHED_LAWS,
    ChinchillaLaw,
    Frontier,
    Runs,
    body_exponent,
    bootstrap_frontiers,
    bootstrap_laws,
    coverage,
    envelope_frontier,
    fit_chinchilla,
    interval,
    isoflop_frontier,
    misfit,
    misfit_of_forms,
    planted_runs,
)
from scaling_optimization import PredictConfig, predicted_run, write_prediction
from training_cost import GPUS, training_flops
from training_planner import (
    MEGATRON,
    RESERVED,
    SELECTIVE,
    Plan,
    best_plan,
    gpt_parameters,
    known_model,
    llama_plans,
    megatron_days,
    megatron_model,
    megatron_plan,
    memory,
    predicted_tflops,
    selective_overhead,
    step_time,
    utilisations,
    zero_table,
)
from workbench import (
    Column,
    RunConfig,
    announce,
    check_folder,
    check_name,
    check_range,
    describe_machine,
    locked,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
    speed_line,
    speed_ratio,
)


@dataclass(frozen=True)
class FiguresConfig(CompressionFiguresConfig):
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all
    budgets: str = "1e10,2.5e10,6e10,1.5e11"  # training FLOPs of the iso-FLOP curves, with commas between
    n_seeds: int = 3  # seeds of every iso-FLOP run, of calibration, of students
    target: float = 4e11  # FLOPs of the larger run that is predicted
    n_boot: int = 120  # samples of every bootstrap
    n_target_seeds: int = 1  # how often the larger run is made
    n_fact_seeds: int = 1  # seeds of the runs on the world of facts
    n_worlds: int = 30  # worlds with a planted law, whose intervals are checked
    n_documents: int = 1000  # held-out documents that a run is examined with
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_seeds", "n_target_seeds", "n_fact_seeds", "n_worlds", "n_documents", least=1)
        check_range(self, "n_boot", least=20)
        check_range(self, "target", above=0)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)
        check_folder(self.folder)

    @property
    def scale(self) -> ScaleConfig:
        return ScaleConfig(self.budgets, self.n_seeds, n_documents=self.n_documents)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 1) -> None:
        command = f"python 12-scaling-optimization/scaling_optimization.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), command)


# Laws that are published, and worlds whose law is known


def published_laws(config: FiguresConfig, run: RunConfig) -> None:
    """What three sets of constants of one law advise at three budgets, and what an analyst without embeddings finds."""
    rows, exponents = [], []
    for name, law in PUBLISHED_LAWS.items():
        cells: list[Any] = [name, law.exponent]
        for flops in (1e21, 5.76e23, 3.8e25):
            n_best, d_best = (float(value) for value in law.optimum(flops))
            cells += [n_best / 1e9, d_best / n_best]
        rows.append(cells)
        exponents.append(
            [name, law.exponent, body_exponent(law, (768, 1.5e9)), body_exponent(law, (1e9, 1e12)), KAPLAN_EXPONENT]
        )
    columns = [Column("Constants"), Column("a of N_best ~ C^a", digits=".3f")]
    for flops in ("1e21", "5.76e23 (Gopher, Chinchilla)", "3.8e25 (Llama 3)"):
        columns += [Column(f"N at {flops} FLOPs", "billion", ",.1f"), Column("tokens for each parameter", digits=".0f")]
    config.save("published-laws", columns, rows, "published-laws")
    columns = [Column("World whose law is"), Column("a, all counted", digits=".3f")]
    columns += [Column("a without embeddings, 768 to 1.5e9 weights", digits=".3f")]
    columns += [Column("the same, 1e9 to 1e12", digits=".3f"), Column("Kaplan et al. 2020", digits=".2f")]
    config.save("kaplan-by-counting", columns, exponents, "published-laws")


def interval_coverage(config: FiguresConfig, run: RunConfig) -> None:
    """How often 95 per cent intervals cover the planted truth, with one and three seeds, and two Huber thresholds."""
    rows = []
    for n_seeds, delta in ((1, 1e-2), (3, 1e-2), (3, 1e-3)):
        worlds = [
            planted_runs(PLANTED, PLANTED_SIZES, PLANTED_BUDGETS, 0.005, n_seeds, seed)
            for seed in range(config.n_worlds)
        ]
        found = coverage(PLANTED, worlds, min(config.n_boot, 60), delta=delta)
        rows.append([f"{n_seeds} seed{'s' if n_seeds > 1 else ''}, delta {delta:g}", *found.values()])
    columns = [Column("Runs, threshold"), *(Column(name, digits=".0%") for name in ("E", "alpha", "beta", "a"))]
    config.save("coverage", columns, rows, "coverage", config.n_worlds)


# Laws of our own runs


def isoflop(config: FiguresConfig, run: RunConfig) -> None:
    """The iso-FLOP curves, three approaches to the best size, and the floor beside the known entropy."""
    with locked(run.out):
        records = train_all(plan_cells(config.scale), config.scale, run)
    runs, bodies = as_runs(records), as_runs(records, "n_body")
    save_budgets(config, runs, records)
    save_laws(config, runs, bodies, run)
    save_figure(plot_isoflop(runs), config.folder / "isoflop.svg")


def save_budgets(config: FiguresConfig, runs: Runs, records: list[dict[str, Any]]) -> None:
    """For each budget: the lowest point of the parabola, and the best size that was trained."""
    rows = []
    frontier = isoflop_frontier(runs)
    for flops in config.scale.flops:
        here = [record for record in records if record["flops"] == flops]
        sizes = sorted({record["n_parameters"] for record in here})
        means = {size: np.mean([r["loss"] for r in here if r["n_parameters"] == size]) for size in sizes}
        best = min(means, key=means.__getitem__)
        losses = [record["loss"] for record in here if record["n_parameters"] == best]
        index = int(np.abs(np.log(frontier.budgets / flops)).argmin())
        lowest = ["none", "-", "-"]
        if abs(math.log(frontier.budgets[index] / flops)) < 0.05:
            n_best = frontier.best[index]
            lowest = [f"{n_best:,.0f}", f"{flops / 6 / n_best**2:.0f}", f"{frontier.least[index]:.4f}"]
        rows.append([f"{flops:.1e}", float(len(sizes)), *lowest, float(best), losses])
    columns = [
        Column("Budget (FLOPs)"),
        Column("sizes", digits=".0f"),
        Column("lowest point, N"),
        Column("its tokens for each parameter"),
        Column("its loss (nats per token)"),
        Column("best trained N", digits=",.0f"),
        Column("its loss", "nats per token", ".4f"),
    ]
    config.save("isoflop", columns, rows, "isoflop", config.n_seeds)


def save_laws(config: FiguresConfig, runs: Runs, bodies: Runs, run: RunConfig) -> None:
    """Exponents by every approach with intervals, and E beside the entropy."""
    rows: list[list] = []
    for name, these in (("all weights", runs), ("without embeddings", bodies)):
        for approach, method in (("1, envelope", envelope_frontier), ("2, parabolas", isoflop_frontier)):
            if these is bodies and method is isoflop_frontier:
                continue  # without embeddings the budgets of the curves are no longer equal
            found = bootstrap_frontiers(method, these, config.n_boot // 4, run.seed)
            band = "-"
            if len(found) == config.n_boot // 4:  # else most samples have no answer, and those that have are no sample
                low, high = interval([each.exponent for each in found])
                band = f"{low:.3f} to {high:.3f}"
            exponent, note = exponent_of(method, these)
            rows.append([f"{approach}; {name}{note}", exponent, band])
        law, laws = fit_chinchilla(these), bootstrap_laws(these, config.n_boot, run.seed)
        low, high = interval([each.exponent for each in laws])
        rows.append([f"3, parametric; {name}", f"{law.exponent:.3f}", f"{low:.3f} to {high:.3f}"])
    config.save(
        "exponents",
        [Column("Approach"), Column("a of N_best ~ C^a"), Column("95 % interval")],
        rows,
        "isoflop",
        config.n_seeds,
    )
    entropy, error = world_entropy(config.scale.n_entropy)
    rows = [["entropy of the world", f"{entropy:.4f}", f"± {error:.4f} (standard error)"]]
    for name, delta in (("E, delta 0.01", 1e-2), ("E, delta 0.001", 1e-3)):
        laws, law = bootstrap_laws(runs, config.n_boot, run.seed, delta), fit_chinchilla(runs, delta)
        low, high = interval([each.e for each in laws])
        rows.append([name, f"{law.e:.4f}", f"{low:.4f} to {high:.4f}"])
        if delta == 1e-2:
            fitted = [law, laws]
    for name, field in (("A", "a"), ("alpha", "alpha"), ("B", "b"), ("beta", "beta")):
        low, high = interval([getattr(each, field) for each in fitted[1]])
        rows.append([name, f"{getattr(fitted[0], field):.4g}", f"{low:.4g} to {high:.4g}"])
    for name, kept in halves(runs).items():
        law, laws = fit_chinchilla(kept), bootstrap_laws(kept, config.n_boot, run.seed)
        low, high = interval([each.e for each in laws])
        rows.append([f"E from {name}", f"{law.e:.4f}", f"{low:.4f} to {high:.4f}"])
    rows += misfit_rows(runs) + form_rows(runs, entropy)
    config.save("floor", [Column("Number"), Column("value"), Column("95 % interval")], rows, "isoflop", config.n_seeds)


def exponent_of(method: Callable[[Runs], Frontier], runs: Runs) -> tuple[str, str]:
    """The exponent that an approach finds, or why it finds none; and how many budgets it stands on, if not on all."""
    try:
        found = method(runs)
    except ValueError as reason:
        return str(reason).partition(";")[0], ""
    used, left_out = len(found.budgets), len(found.left_out)
    return f"{found.exponent:.3f}", f"; {used} of {used + left_out} budgets" if left_out else ""


def misfit_rows(runs: Runs) -> list[list]:
    """What seeds differ by, beside what the means of the seeds miss the law by."""
    if len(np.unique(runs.group)) == len(runs):
        return []
    within, between = misfit(runs, fit_chinchilla(runs))
    n_seeds = len(runs) / len(np.unique(runs.group))
    return [
        ["seeds of one run differ by (one deviation)", f"{within:.2%}", "-"],
        ["means of seeds miss the law by", f"{between:.2%}", f"{within / math.sqrt(n_seeds):.2%} if the law were true"],
    ]


def form_rows(runs: Runs, entropy: float) -> list[list]:
    """By how much the gap above the known floor misses a sum of two powers, and one product."""
    found = misfit_of_forms(runs, entropy)
    words = {"sum": "A / N^alpha + B / D^beta", "product": "K / (N^alpha D^beta)"}
    return [[f"the gap, floor known, misses {words[name]} by", f"{found[name]:.1%}", "-"] for name in words]


def halves(runs: Runs) -> dict[str, Runs]:
    """Parts of the runs: does the law say the same of each?"""
    budgets, ratio = np.unique(runs.flops), runs.n_tokens / runs.n_parameters
    parts = {
        "the three largest budgets": runs.flops >= budgets[-min(3, len(budgets))],
        "the three smallest budgets": runs.flops <= budgets[min(2, len(budgets) - 1)],
        "runs of more than 20 tokens for each parameter": ratio > 20,
    }
    found = {name: runs.take(mask) for name, mask in parts.items()}
    return {name: part for name, part in found.items() if len(np.unique(part.group)) > 6}


def plot_isoflop(runs: Runs) -> Figure:
    """Loss over N at each budget with its parabola, left; the best sizes over compute, right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9))
    law, frontier = fit_chinchilla(runs), isoflop_frontier(runs)
    budgets = np.unique(runs.flops)
    for index, flops in enumerate(budgets):
        here = runs.take(runs.flops == flops)
        color = f"C{index}"
        left.plot(here.n_parameters, here.loss, "o", ms=4, color=color, label=f"{flops:.1e} FLOPs")
        grid = np.geomspace(here.n_parameters.min(), here.n_parameters.max(), 50)
        left.plot(grid, law.loss(grid, flops / 6 / grid), color=color, lw=1)
    left.plot(frontier.best, frontier.least, "k+", ms=10)
    left.set(xscale="log", xlabel="N, weights that multiply a token", ylabel="loss (nats per token)")
    left.set_xticks([5e3, 1e4, 2e4, 5e4], ["5,000", "10,000", "20,000", "50,000"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    reach = np.geomspace(budgets[0] / 2, budgets[-1] * 8, 20)
    right.loglog(reach, law.optimum(reach)[0], color="C0", label=f"approach 3, a = {law.exponent:.2f}")
    right.loglog(reach, frontier.size(reach), "k--", lw=1, label=f"approach 2, a = {frontier.exponent:.2f}")
    right.loglog(frontier.budgets, frontier.best, "k+", ms=10, label="lowest point of each parabola")
    right.set(xlabel="C, FLOPs of the training", ylabel="best N")
    right.legend(frameon=False, fontsize=8)
    return figure


def prediction(config: FiguresConfig, run: RunConfig) -> None:
    """The larger run: what the laws predict of it, written down first, and what it gave."""
    with locked(run.out):
        records = train_all(plan_cells(config.scale), config.scale, run, say=False)
        cell, says = predicted_run(as_runs(records), PredictConfig(config.target, n_boot=config.n_boot), run)
        write_prediction(cell, says, len(records), run)
        cells = [replace(cell, seed=seed) for seed in range(config.n_target_seeds)]
        losses = [record["loss"] for record in train_all(cells, config.scale, run)]
    rows: list[list] = []
    for name, said in says.items():
        if name != "interval":
            low, high = says["interval"] if name == "approach 3" else (np.nan, np.nan)
            band = f"{low:.4f} to {high:.4f}" if name == "approach 3" else "-"
            rows.append([name, said, band, losses, [loss / said - 1 for loss in losses]])
    rows.append(["the world's entropy", world_entropy(config.scale.n_entropy)[0], "-", losses, ""])
    columns = [
        Column(f"Law, asked for N = {cell.n_parameters:,} and D = {cell.n_tokens:,}"),
        Column("said", "nats per token", ".4f"),
        Column("95 % interval of the law"),
        Column("found", "nats per token", ".4f"),
        Column("found / said - 1", digits="+.2%"),
    ]
    config.save("prediction", columns, rows, "prediction", config.n_target_seeds)


# A world of many small facts


FACT_SIZES, FACT_STEPS = (8, 12, 16, 24, 32, 48), (120, 240, 480)
LATER_SIZES, LATER_STEPS = (12, 24, 48), 960  # predicted from the others


def fact_runs(sizes: Sequence[int], steps: Sequence[int], config: FiguresConfig, run: RunConfig) -> Runs:
    """Runs on the world of facts; those that --out has are not made again."""
    world, records = FactWorld(), []
    for seed, n_steps, d_model in itertools.product(range(config.n_fact_seeds), steps, sizes):
        what = f"facts, width {d_model}, {n_steps} steps, seed {seed}"
        made = remembered(config, run, what, partial(fact_run, world, d_model, n_steps, seed, run))
        records.append(made)
    return Runs(*(np.array([r[name] for r in records], float) for name in ("n_parameters", "n_tokens", "loss")))


def facts(config: FiguresConfig, run: RunConfig) -> None:
    """The same law on a world whose pieces are many and small: does the interval of E cover, and is it narrow?"""
    world, runs = FactWorld(), fact_runs(FACT_SIZES, FACT_STEPS, config, run)
    law, laws = fit_chinchilla(runs), bootstrap_laws(runs, config.n_boot, run.seed)
    rows: list[list] = [["entropy of the world, exact", f"{world.entropy:.4f}", "-"]]
    for name in ("e", "a", "alpha", "b", "beta", "exponent"):
        low, high = interval([getattr(each, name) for each in laws])
        label = {"e": "E", "exponent": "a of N_best ~ C^a", "a": "A", "b": "B"}.get(name, name)
        rows.append([label, f"{getattr(law, name):.4g}", f"{low:.4g} to {high:.4g}"])
    rows += misfit_rows(runs) + form_rows(runs, world.entropy)
    config.save(
        "facts", [Column("Number"), Column("value"), Column("95 % interval")], rows, "facts", config.n_fact_seeds
    )
    said = [laws_say(law, laws, size) for size in LATER_SIZES]  # before these runs are made
    later = fact_runs(LATER_SIZES, (LATER_STEPS,), config, run)
    save_later(config, said, later, world.entropy)
    save_figure(plot_facts(runs, later, world.entropy), config.folder / "facts.svg")


def laws_say(law: ChinchillaLaw, laws: list[ChinchillaLaw], d_model: int) -> tuple[float, float, float]:
    """The loss of a later run by the law, and its 95 per cent interval."""
    n_parameters, n_tokens = matmul_weights(fact_config(d_model)), LATER_STEPS * TOKENS_PER_STEP
    low, high = interval([float(each.loss(n_parameters, n_tokens)) for each in laws])
    return float(law.loss(n_parameters, n_tokens)), low, high


def save_later(config: FiguresConfig, said: list[tuple[float, float, float]], later: Runs, entropy: float) -> None:
    rows = []
    for d_model, (loss, low, high) in zip(LATER_SIZES, said, strict=True):
        found = later.loss[later.n_parameters == matmul_weights(fact_config(d_model))] - entropy
        band = f"{low - entropy:.4f} to {high - entropy:.4f}"
        rows.append([f"width {d_model}, {LATER_STEPS} steps", loss - entropy, band, found.tolist()])
    columns = [Column("Run with twice the tokens of any other"), Column("gap said", "nats per token", ".4f")]
    columns += [Column("95 % interval"), Column("gap found", "nats per token", ".4f")]
    config.save("facts-later", columns, rows, "facts", config.n_fact_seeds)


def plot_facts(runs: Runs, later: Runs, entropy: float) -> Figure:
    """Gap to the exact entropy over tokens: lines by the law, filled points in the fit, open ones made after it."""
    figure, axis = plt.subplots(figsize=(6.5, 3.9))
    law = fit_chinchilla(runs)
    grid = np.geomspace(runs.n_tokens.min(), later.n_tokens.max(), 30)
    for index, size in enumerate(np.unique(runs.n_parameters)):
        here, after = runs.n_parameters == size, later.n_parameters == size
        axis.plot(runs.n_tokens[here], runs.loss[here] - entropy, "o", ms=4, color=f"C{index}", label=f"N {size:,.0f}")
        axis.plot(grid, law.loss(size, grid) - entropy, color=f"C{index}", lw=1)
        axis.plot(later.n_tokens[after], later.loss[after] - entropy, "o", ms=6, mfc="none", color=f"C{index}")
    axis.set(xscale="log", yscale="log", xlabel="D (predicted tokens)", ylabel="gap to the entropy (nats per token)")
    axis.legend(frameon=False, fontsize=8)
    return figure


# Kaplan's schedule, and the failures


def schedule(config: FiguresConfig, run: RunConfig) -> None:
    """The loss read from a longer run before its end, beside a run whose schedule ends there."""
    found: dict[int, list[tuple[float, float]]] = {}
    for seed in range(config.n_seeds):
        for steps, early, matched in early_readings(16, 2, 1040, (0.25, 0.5), replace(run, seed=seed), 300):
            found.setdefault(steps, []).append((early, matched))
    rows = [
        [
            f"{steps} of 1040",
            [matched for _, matched in pairs],
            [early for early, _ in pairs],
            [e - m for e, m in pairs],
        ]
        for steps, pairs in found.items()
    ]
    columns = [
        Column("Steps"),
        Column("gap, schedule ends here", "nats per token", ".4f"),
        Column("gap, read from the run of 1040", "nats per token", ".4f"),
        Column("difference", digits="+.4f"),
    ]
    config.save("early-reading", columns, rows, "early-reading", config.n_seeds)


def breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Every failure: the right value beside the broken one."""
    rows = [
        [f"`{name}`", what, sound, broken]
        for name, (show, _) in SCALING_BREAKS.items()
        for what, sound, broken in show(run)
    ]
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save("scaling-breaks", columns, rows, "breaks")


# The machine


WIDE = RooflineConfig(d_model=1024)


def machine(config: FiguresConfig, run: RunConfig) -> None:
    """Peaks of this machine; layers of the course model and of a wider one in three phases; the profiler's table."""
    seed_everything(run.seed)
    course, found = load_course_model()[0], measure(5)
    models = {"course model": course.config, "width 1024": WIDE.model(course.config)}
    sizes = {name: min(128, model_config.max_seq_len) for name, model_config in models.items()}
    works = {
        name: [work for phase in PHASES for work in layer_works(model_config, phase, sizes[name])]
        for name, model_config in models.items()
    }
    found, points = place([work for group in works.values() for work in group], found, 5)
    placed = {name: [point for point in points if point.work in works[name]] for name in models}
    rows = [
        [f"{name}: {layer}", *(in_words(p) for p in placed[name] if p.work.layer == layer)]
        for name in models
        for layer in dict.fromkeys(p.work.layer for p in placed[name])
    ]
    columns = [Column(phase, "GFLOP/s at FLOP/byte, bound") for phase in PHASES]
    config.save("layers", [Column("Layer"), *columns], rows, "machine")
    rows = [["arithmetic", found.hardware.flops / 1e9, "GFLOP/s"], ["memory", found.hardware.bandwidth / 1e9, "GB/s"]]
    rows += [[f"copy of {size / 2**10:,.0f} KiB", rate / 1e9, "GB/s"] for size, rate in found.ladder]
    rows += [["an empty call", found.overhead * 1e6, "microseconds"], ["ridge", found.hardware.ridge, "FLOP/byte"]]
    config.save("machine", [Column("What"), Column("measured"), Column("unit")], rows, "machine")
    save_figure(plot_rooflines(found, placed), config.folder / "layers.svg")
    save_profile(config, course, found.hardware.flops)


def in_words(placed: Placed) -> str:
    """Rate, intensity and bound of a layer, as a cell of a table."""
    return f"{placed.rate / 1e9:.1f} at {placed.work.intensity:.1f}, {placed.bound}"


def save_profile(config: FiguresConfig, model: CausalLM, peak: float) -> None:
    profile = profile_steps(training_step(model, 8, 128), 5)
    rows: list[list] = [[name, 1e3 * s / 5, share, float(calls // 5)] for name, s, share, calls in profile.rows()]
    rows.append(["sum", 1e3 * profile.wall / 5, sum(row[2] for row in rows), sum(row[3] for row in rows)])
    used = 5 * step_flops(model.config, 8, 128) / profile.wall / peak
    rows.append(["MFU of the measured peak, while profiled", "", used, ""])
    columns = [Column("Operators of a training step"), Column("time", "ms", ".2f"), Column("share", digits=".1%")]
    config.save("profile", [*columns, Column("calls", digits=",.0f")], rows, "machine")


def compiling(config: FiguresConfig, run: RunConfig) -> None:
    """torch.compile: the ratio of a training step, the seconds of the first step, and when they are won back."""
    course = load_course_model()[0].config
    rows = []
    for name, model_config in {"course model": course, "width 256": replace(course, d_model=256, d_ff=704)}.items():
        seed_everything(run.seed)
        found = compare_compiled(CausalLM(model_config), 8, 128)
        slow, fast = (1e3 * float(np.median(seconds)) for seconds in (found.eager, found.compiled))
        pays = f"{found.steps_to_pay:,.0f}" if np.isfinite(found.steps_to_pay) else "never"
        rows.append([name, slow, fast, speed_ratio(found.compiled, found.eager), found.first, pays])
    columns = [Column("Model"), Column("step", "ms", ".1f"), Column("compiled", "ms", ".1f"), Column("ratio")]
    columns += [Column("first step", "s", ".1f"), Column("steps that pay for it")]
    config.save("compile", columns, rows, "compile")


# The planner, beside what is published


def planner(config: FiguresConfig, run: RunConfig) -> None:
    """Tables of ZeRO, Megatron-LM and Llama 3 computed again; plans for 1 to 1,024 GPUs; MFU beside HFU."""
    rows: dict[int, list[str]] = {}
    sizes = dict.fromkeys(size for _, size, _ in zero_table())
    for n_gpus, _, held in zero_table():
        rows.setdefault(n_gpus, [f"{n_gpus:,}"]).append(" / ".join(f"{gigabytes:.4g}" for gigabytes in held))
    columns = [Column(f"{size / 1e9:g} billion", "GB with ZeRO 1 / 2 / 3") for size in sizes]
    config.save("zero-paper", [Column("GPUs"), *columns], list(rows.values()), "planner")
    save_megatron(config)
    save_llama(config)
    save_plans(config)
    save_selective(config)


def save_megatron(config: FiguresConfig) -> None:
    rows = []
    for row in MEGATRON:
        held = memory(megatron_model(row), megatron_plan(row)).total / 1e9
        said = predicted_tflops(row)
        layout = f"{row.tensor_size} x {row.pipeline_size} x {row.n_gpus // row.tensor_size // row.pipeline_size}"
        size = gpt_parameters(row.d_model, row.n_layers) / 1e9
        rows.append([f"{row.billions:g}", size, layout, held, float(row.tflops), said, said / row.tflops - 1])
    columns = [
        *(
            Column("Printed size", "billion"),
            Column("by formula", "billion", ".1f"),
            Column("tensor x pipeline x data"),
        ),
        *(Column("memory", "GB", ".1f"), Column("printed rate", "TFLOP/s", ".0f"), Column("planner", "TFLOP/s", ".0f")),
        Column("planner / printed - 1", digits="+.0%"),
    ]
    config.save("megatron", columns, rows, "planner")
    days = [
        ["GPT-3 175B, 300e9 tokens, 1,024 A100 at 140 TFLOP/s", megatron_days(175e9, 300e9, 1024, 140), "34"],
        ["1T, 450e9 tokens, 3,072 A100 at 163 TFLOP/s", megatron_days(1e12, 450e9, 3072, 163), "84"],
    ]
    config.save(
        "megatron-days",
        [Column("Training"), Column("by the paper's formula", "days", ".1f"), Column("printed", "days")],
        days,
        "planner",
    )


def save_llama(config: FiguresConfig) -> None:
    """Llama 3 405B in its published layouts: all kept, or elementwise work done again; with chunks or without."""
    model, gpu, rows = known_model("Llama-3.1-405B"), GPUS["H100 SXM"], []
    for plan, tflops in llama_plans():
        flops = sum(training_flops(model, plan.batch_size * plan.seq_len, plan.seq_len).values()) / plan.n_gpus
        for kept, n_chunks in (("none", 1), ("selective", 1), ("selective", 7)):
            own = replace(plan, recompute=kept, n_chunks=n_chunks)
            seconds = step_time(model, own, gpu).total
            shares = utilisations(model, own, flops / (tflops * 1e12), gpu)
            held = memory(model, own).total / 1e9
            rows.append(
                [
                    f"{plan.n_gpus:,} GPUs, recompute {kept}, chunks {n_chunks}",
                    held,
                    flops / seconds / 1e12,
                    float(tflops),
                    shares["model FLOPs (MFU)"],
                ]
            )
    columns = [Column("Layout"), Column("fullest GPU", "GB", ".1f"), Column("planner", "TFLOP/s", ".0f")]
    columns += [Column("printed", "TFLOP/s", ".0f"), Column("MFU of the printed rate", digits=".1%")]
    config.save("llama-405b", columns, rows, "planner")


PLANNED = (2, 4, 16, 32, 256, 512, 1024)  # numbers of GPUs in the table; the figure has all


def save_plans(config: FiguresConfig) -> None:
    gpu, rows, curves = GPUS["H100 SXM"], [], {}
    for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
        model = known_model(name)
        for n_gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            try:
                best = best_plan(model, Plan(n_gpus=n_gpus, batch_size=1024), gpu)
            except ValueError as reason:
                if n_gpus == 1:
                    rows.append([f"{name}, {n_gpus:,}", str(reason).rpartition("; ")[2], "-", "-", "-"])
                continue
            mfu = utilisations(model, best.plan, best.time.total, gpu)["model FLOPs (MFU)"]
            numbers = (f"{best.memory.total / 1e9:.1f}", f"{best.days(1e12):.1f}", f"{mfu:.0%}")
            if n_gpus in PLANNED:
                rows.append([f"{name}, {n_gpus:,}", best.plan.layout, *numbers])
            curves.setdefault(name, []).append((n_gpus, best))
    columns = [Column("Model, GPUs"), Column("fastest layout that fits"), Column("fullest GPU (GB)")]
    config.save("plans", [*columns, Column("days for 1e12 tokens"), Column("MFU")], rows, "planner")
    save_figure(plot_plans(curves), config.folder / "plans.svg")


def plot_plans(curves: dict[str, list[tuple[int, Any]]]) -> Figure:
    """What a GPU holds in the fastest layout, by number of GPUs; dotted: the room that a plan has on an H100."""
    room = GPUS["H100 SXM"].memory * (1 - RESERVED) / 1e9
    size = (4.8 * len(curves), 3.8)
    figure, axes = plt.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, points) in zip(axes[0], curves.items(), strict=True):
        places, base = range(len(points)), np.zeros(len(points))
        for index, term in enumerate(("weights", "gradients", "optimizer", "activations", "gathered")):
            heights = np.array([getattr(best.memory, term) / 1e9 for _, best in points])
            axis.bar(places, heights, bottom=base, color=f"C{index}", label=term)
            base += heights
        axis.axhline(room, color="k", lw=1, ls=":", label="room")
        axis.set_xticks(list(places), [str(n_gpus) for n_gpus, _ in points])
        axis.set(xlabel="GPUs", title=name)
    axes[0, 0].set_ylabel("fullest GPU (GB)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )
    return figure


def save_selective(config: FiguresConfig) -> None:
    """Published MFU and HFU of one and the same runs, beside the share of FLOPs that attention's repetition adds."""
    rows = [
        [f"{billions:g}B", mfu, hfu, hfu / mfu - 1, selective_overhead(d_model, 2048)]
        for billions, d_model, mfu, hfu in SELECTIVE
    ]
    columns = [Column("Model"), Column("printed MFU", digits=".1%"), Column("printed HFU", digits=".1%")]
    columns += [Column("HFU / MFU - 1", digits=".2%"), Column("one more forward pass of attention", digits=".2%")]
    config.save("selective", columns, rows, "planner")


# All of them


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "published-laws": (published_laws, 2),
    "coverage": (interval_coverage, 30),
    "isoflop": (isoflop, 1100),
    "prediction": (prediction, 130),
    "facts": (facts, 160),
    "early-reading": (schedule, 90),
    "breaks": (breaks, 70),
    "machine": (machine, 60),
    "compile": (compiling, 120),
    "planner": (planner, 10),
    **COMPRESSION_EXPERIMENTS,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments, or only those named; write figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)


def bench(config: RooflineConfig, run: RunConfig) -> None:
    """Time a training step against the measured peak and torch.compile, and compressed models against float32."""
    announce("time training steps and compressed models", 80 + 60 * config.compile)
    seed_everything(run.seed)
    found = measure(config.n_rounds)
    model = CausalLM(config.model(load_course_model()[0].config))
    profile = profile_steps(training_step(model, config.batch_size, config.seq_len))
    used = 3 * step_flops(model.config, config.batch_size, config.seq_len) / profile.wall / found.hardware.flops
    print(describe_machine())
    print(
        f"{count_parameters(model.config).total:,} weights: MFU {used:.1%} of {found.hardware.flops / 1e9:.0f} GFLOP/s"
    )
    if config.compile:
        both = compare_compiled(model, config.batch_size, config.seq_len, n_rounds=config.n_rounds)
        line = speed_line("training step, compiled,", "our eager one", both.compiled, both.eager)
        print(f"{line}; first step {both.first:.0f} s")
    bench_compression(config.n_rounds)
