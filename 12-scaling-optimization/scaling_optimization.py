"""Topic 12 - Scaling and Optimization: what a budget buys, what a machine allows, and models made smaller.

python 12-scaling-optimization/scaling_optimization.py                  # a law, a prediction, a roofline, a plan
python 12-scaling-optimization/scaling_optimization.py scale            # iso-FLOP runs; then: fit, predict
python 12-scaling-optimization/scaling_optimization.py roofline         # where each layer of the course model lies
python 12-scaling-optimization/scaling_optimization.py plan --model Llama-3.1-70B --n-gpus 256
python 12-scaling-optimization/scaling_optimization.py quantize         # the course model in fewer bits
python 12-scaling-optimization/scaling_optimization.py --break no-floor # a failure on purpose

Kaplan et al. 2020 (arXiv 2001.08361), Hoffmann et al. 2022 (arXiv 2203.15556), Rajbhandari et al. 2020 (arXiv
1910.02054), Narayanan et al. 2021 (arXiv 2104.04473).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import datetime
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from compression_failures import COMPRESSION_BREAKS
from course_model import load_course_model
from distillation import StudentConfig, distill
from isoflop_runs import (
    FAMILY,
    Cell,
    ScaleConfig,
    as_runs,
    family_config,
    matmul_weights,
    plan_cells,
    read_records,
    train_all,
    world_entropy,
)
from machine_roofline import (
    PHASES,
    RooflineConfig,
    compare_compiled,
    layer_works,
    measure,
    place,
    print_roofline,
    profile_steps,
    step_flops,
    training_step,
)
from modern_llm_architectures import CausalLM
from pruning import PruneConfig, prune
from quantized_model import QuantizeConfig, quantize
from scaling_failures import SCALING_BREAKS
from scaling_laws import (
    PUBLISHED_LAWS,
    Runs,
    bootstrap_frontiers,
    bootstrap_laws,
    envelope_frontier,
    fit_chinchilla,
    fit_kaplan,
    fit_power,
    interval,
    isoflop_frontier,
)
from training_cost import GPUS, MODELS
from training_planner import LINKS, RECOMPUTE, Estimate, Plan, best_plan, estimate_plan, known_model, utilisations
from workbench import RunConfig, announce, check_name, check_range, locked, run_verbs, seed_everything, write_atomically

BREAKS = {**SCALING_BREAKS, **COMPRESSION_BREAKS}
PREDICTIONS = "predictions.jsonl"


# Scaling laws of our own runs


def scale(config: ScaleConfig, run: RunConfig) -> None:
    """Train iso-FLOP curves on TinyWorld, and keep every run in --out."""
    cells = plan_cells(config)
    announce(f"train {len(cells)} models", sum(cell.seconds for cell in cells) / max(1, min(2, run.threads)))
    with locked(run.out):
        records = train_all(cells, config, run)
    report_laws(as_runs(records), FitConfig(), run)


@dataclass(frozen=True)
class FitConfig:
    """How the laws are fitted to the runs in --out."""

    n_boot: int = 200  # samples of the bootstrap
    huber_delta: float = 1e-2  # residuals of log loss beyond it count linearly

    def __post_init__(self) -> None:
        check_range(self, "n_boot", least=20)
        check_range(self, "huber_delta", above=0)


def fit(config: FitConfig, run: RunConfig) -> None:
    """Fit the laws to the runs that `scale` left in --out, with intervals; the floor beside the world's entropy."""
    records = read_records(run.out)
    if not records:
        raise ValueError(f"{run.out} has no runs; make some with: scaling_optimization.py scale --out {run.out}")
    announce(f"fit laws to {len(records)} runs", 10)
    report_laws(as_runs(records), config, run)


def report_laws(runs: Runs, config: FitConfig, run: RunConfig) -> None:
    law = fit_chinchilla(runs, config.huber_delta)
    laws = bootstrap_laws(runs, config.n_boot, run.seed, config.huber_delta)
    entropy, error = world_entropy(ScaleConfig().n_entropy)
    print(f"approach 3: L = {law.e:.3f} + {law.a:.3g} / N^{law.alpha:.3f} + {law.b:.3g} / D^{law.beta:.3f}")
    for name in ("e", "alpha", "beta", "exponent"):
        low, high = interval([getattr(found, name) for found in laws])
        print(f"  {name:8} {getattr(law, name):.3f}, 95 % interval {low:.3f} to {high:.3f}")
    low, high = interval([found.e for found in laws])
    verdict = "covers" if low <= entropy <= high else "misses"
    print(f"  the interval of e {verdict} the world's entropy, {entropy:.4f} ± {error:.4f} nats per token")
    for name, method in (("approach 1", envelope_frontier), ("approach 2", isoflop_frontier)):
        try:
            frontier = method(runs)
        except ValueError as reason:
            print(f"{name}: not possible with these runs: {reason}")
            continue
        found = bootstrap_frontiers(method, runs, min(100, config.n_boot), run.seed)
        low, high = interval([each.exponent for each in found]) if len(found) > 20 else (np.nan, np.nan)
        print(f"{name}: N_best ~ C^{frontier.exponent:.3f}, 95 % interval {low:.3f} to {high:.3f}")


@dataclass(frozen=True)
class PredictConfig:
    """The larger run that is predicted, and then made."""

    target: float = 2.5e11  # its FLOPs, 6 N D
    n_target_seeds: int = 1  # how many times it is made
    n_boot: int = 200  # samples of the bootstrap
    train: bool = True  # make the run after its prediction is written

    def __post_init__(self) -> None:
        check_range(self, "target", above=0)
        check_range(self, "n_target_seeds", least=1)
        check_range(self, "n_boot", least=20)


def nearest_size(n_best: float) -> tuple[int, int]:
    """The size of the family whose N is closest to n_best in logs."""
    return min(FAMILY, key=lambda size: abs(np.log(matmul_weights(family_config(*size)) / n_best)))


def predictions_for(runs: Runs, cell: Cell, n_boot: int, seed: int) -> dict[str, Any]:
    """What the laws say of a run that is not among `runs`: approach 3 with its interval, and laws without a floor."""
    law = fit_chinchilla(runs)
    laws = bootstrap_laws(runs, n_boot, seed)
    low, high = interval([float(found.loss(cell.n_parameters, cell.n_tokens)) for found in laws])
    kaplan = fit_kaplan(runs)
    try:
        frontier = isoflop_frontier(runs)
        budgets, least = frontier.budgets, frontier.least
    except ValueError:  # too few budgets with a lowest point: two laws less
        budgets = least = np.empty(0)
    says: dict[str, Any] = {
        "approach 3": float(law.loss(cell.n_parameters, cell.n_tokens)),
        "interval": [low, high],
        "Kaplan's law": float(kaplan.loss(cell.n_parameters, cell.n_tokens)),
    }
    if len(budgets) > 2:
        says["frontier, power law without floor"] = float(fit_power(budgets, least, False).loss(cell.flops))
    if len(budgets) > 3:
        says["frontier, power law with floor"] = float(fit_power(budgets, least, True).loss(cell.flops))
    return says


def predict(config: PredictConfig, scale_config: ScaleConfig, run: RunConfig) -> None:
    """Predict the loss of a larger run from those in --out, write the prediction down, and only then make the run."""
    records = [record for record in read_records(run.out) if record["flops"] < config.target]
    if not records:
        raise ValueError(
            f"{run.out} has no runs below {config.target:g} FLOPs; make some with scale, or raise --target"
        )
    cell, says = predicted_run(as_runs(records), config, run)
    announce("predict a larger run, then make it", config.n_target_seeds * cell.seconds if config.train else 5)
    low, high = says["interval"]
    print(
        f"predicted for width {cell.d_model} x {cell.n_layers}, N {cell.n_parameters:,}, D {cell.n_tokens:,}: "
        f"{says['approach 3']:.4f} nats per token, 95 % interval {low:.4f} to {high:.4f}"
    )
    write_prediction(cell, says, len(records), run)
    if config.train:
        cells = [replace(cell, seed=seed) for seed in range(config.n_target_seeds)]
        with locked(run.out):
            made = train_all(cells, scale_config, run)
        losses = [record["loss"] for record in made]
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        print(
            f"found: {np.mean(losses):.4f}{spread}; {np.mean(losses) / says['approach 3'] - 1:+.2%} of the prediction"
        )
        for name in ("Kaplan's law", "frontier, power law without floor", "frontier, power law with floor"):
            if name in says:
                print(f"  {name} said {says[name]:.4f}, off by {np.mean(losses) / says[name] - 1:+.2%}")


def predicted_run(runs: Runs, config: PredictConfig, run: RunConfig) -> tuple[Cell, dict[str, Any]]:
    """The cell nearest to the optimum of the target budget, and what the laws say of it."""
    size = nearest_size(float(fit_chinchilla(runs).optimum(config.target)[0]))
    cell = Cell(config.target, *size, 0)
    return cell, predictions_for(runs, cell, config.n_boot, run.seed)


def write_prediction(cell: Cell, says: dict[str, Any], n_runs: int, run: RunConfig) -> None:
    """Append a prediction, with its time, to the file of predictions; nothing there is ever changed."""
    path = run.out / PREDICTIONS
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = asdict(cell) | {"when": when, "n_runs": n_runs, "n_parameters": cell.n_parameters, "says": says}
    write_atomically(path, (known + json.dumps(line) + "\n").encode())


# The machine and the planner


def roofline(config: RooflineConfig, run: RunConfig) -> None:
    """Measure this machine, place every layer of a model below its roofline, and profile a training step."""
    announce("measure the machine and a model's layers", 40 + 60 * config.compile)
    seed_everything(run.seed)
    course = load_course_model()[0]
    model_config, machine = config.model(course.config), measure(config.n_rounds)
    works = [work for phase in PHASES for work in layer_works(model_config, phase, config.seq_len, config.batch_size)]
    machine, placed = place(works, machine, config.n_rounds)
    print_roofline(machine, placed)
    model = CausalLM(model_config)
    profile = profile_steps(training_step(model, config.batch_size, config.seq_len))
    print(f"{'a training step':22} {'seconds':>8} {'share':>6} {'calls':>7}")
    for name, seconds, share, calls in profile.rows():
        print(f"{name:22} {seconds / 3:8.4f} {share:6.1%} {calls // 3:7,}")
    used = 3 * step_flops(model_config, config.batch_size, config.seq_len) / profile.wall / machine.hardware.flops
    print(f"{'sum':22} {profile.wall / 3:8.4f}; MFU {used:.1%} of the measured peak, the profiler running")
    if config.compile:
        found = compare_compiled(model, config.batch_size, config.seq_len)
        print(f"torch.compile: {found.ratio:.2f}x the speed; the first step took {found.first:.0f} s, won back after")
        print(f"{found.steps_to_pay:,.0f} steps")


@dataclass(frozen=True)
class PlanConfig:
    """A training to be laid out; a size left at 0 is chosen: the fastest layout that fits."""

    model: str = "Llama-3.1-8B"  # a published model
    n_gpus: int = 64  # processors
    gpu: str = "H100 SXM"  # which
    tensor_size: int = 0  # processors that share each layer; 0: choose the whole layout
    pipeline_size: int = 1  # stages
    zero_stage: int = 1  # 0 to 3: what the data-parallel processors share out
    micro_batch_size: int = 1  # sequences in one forward pass
    batch_size: int = 1024  # sequences of an optimizer step
    seq_len: int = 4096  # tokens of a sequence
    recompute: Literal[RECOMPUTE] = "none"  # done again in the backward pass: nothing, all but the products, all
    n_chunks: int = 1  # parts of the model on each stage, interleaved
    n_tokens: float = 1e12  # tokens of the training

    def __post_init__(self) -> None:
        check_range(self, "n_gpus", "pipeline_size", "micro_batch_size", "batch_size", "seq_len", "n_chunks", least=1)
        check_range(self, "tensor_size", "zero_stage", least=0)
        check_range(self, "n_tokens", above=0)
        check_name("gpu", self.gpu, LINKS)
        check_name("model", self.model, MODELS)

    @property
    def layout(self) -> Plan:
        sizes = (self.n_gpus, max(1, self.tensor_size), self.pipeline_size, self.zero_stage, self.micro_batch_size)
        return Plan(*sizes, self.batch_size, self.seq_len, self.recompute, self.n_chunks)


def plan(config: PlanConfig) -> None:
    """Lay out a training on 1 to 1,024 GPUs: bytes on the fullest GPU, seconds of a step, days, shares of the peak."""
    model, gpu = known_model(config.model), GPUS[config.gpu]
    if config.tensor_size:
        print_estimate(config, estimate_plan(model, config.layout, gpu))
        return
    print_estimate(config, best_plan(model, config.layout, gpu))
    print("the fastest layout that fits, by number of GPUs:")
    for n_gpus in (1, 4, 16, 64, 256, 1024):
        try:
            best = best_plan(model, replace(config.layout, n_gpus=n_gpus), gpu)
            cells = f"{best.memory.total / 1e9:5.1f} GB  {best.time.total:8.2f} s a step"
            print(f"  {n_gpus:5} GPUs  {cells}  {best.days(config.n_tokens):8.1f} days  {best.plan.layout}")
        except ValueError as reason:
            print(f"  {n_gpus:5} GPUs  {reason}")


def print_estimate(config: PlanConfig, found: Estimate) -> None:
    gpu, held = GPUS[config.gpu], asdict(found.memory)
    print(f"{config.model} on {found.plan.n_gpus} x {config.gpu}: {found.plan.layout}")
    print(f"  fullest GPU {found.memory.total / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB: " + ", ".join(
        f"{name} {size / 1e9:.1f}" for name, size in held.items() if size
    ))  # fmt: skip
    print(f"  a step {found.time.total:.2f} s: " + ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in asdict(found.time).items() if seconds >= 0.005
    ))  # fmt: skip
    shares = utilisations(known_model(config.model), found.plan, found.time.total, gpu)
    print("  share of the peak: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(f"  {config.n_tokens:.3g} tokens take {found.days(config.n_tokens):,.1f} days")


# The tour


@dataclass(frozen=True)
class DemoConfig:
    """The tour, or the failure to show in its place."""

    break_: Literal["none", *BREAKS] = "none"  # the failure to show


DEMO_RUNS = ScaleConfig(budgets="4e9,8e9,1.6e10", n_documents=300, n_entropy=10_000, least_ratio=4.0)


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Fit a law to small runs, predict a larger one and make it; this machine's roofline; plans for a cluster."""
    if config.break_ != "none":
        show, seconds = BREAKS[config.break_]
        announce(f"showing the failure {config.break_!r}", seconds)
        for what, sound, broken in show(run):
            print(f"{what}: {sound:.4g} as it should be, {broken:.4g} with --break {config.break_}")
        return
    announce("small runs, a law, a prediction, a roofline and a plan", 120)
    own = replace(run, out=run.out / "demo")
    print("1. Iso-FLOP runs on TinyWorld, and the laws through them")
    with locked(own.out):
        records = train_all(plan_cells(DEMO_RUNS), DEMO_RUNS, own)
    report_laws(as_runs(records), FitConfig(n_boot=60), own)
    print("2. A larger run: the prediction, then the run")
    predict(PredictConfig(target=4e10, n_boot=60), DEMO_RUNS, own)
    print("3. The published law, three times")
    print_published(5.76e23)
    print("4. This machine")
    machine, course = measure(3), load_course_model()[0].config
    machine, placed = place([work for phase in PHASES for work in layer_works(course, phase, 128)], machine, 3)
    print_roofline(machine, placed)
    print("5. A cluster")
    plan(PlanConfig())


def print_published(flops: float) -> None:
    for name, law in PUBLISHED_LAWS.items():
        n_best, d_best = (float(value) for value in law.optimum(flops))
        print(
            f"  {name:34} at {flops:.3g} FLOPs: N {n_best / 1e9:6.1f} billion, D {d_best / 1e12:5.2f} trillion, "
            f"{d_best / n_best:5.1f} tokens for each parameter"
        )


def main(argv: list[str] | None = None) -> None:
    from scaling_experiments import FiguresConfig, bench, figures  # here, because they import this module

    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, DemoConfig, RunConfig),
        "scale": (scale, ScaleConfig, RunConfig),
        "fit": (fit, FitConfig, RunConfig),
        "predict": (predict, PredictConfig, ScaleConfig, RunConfig),
        "quantize": (quantize, QuantizeConfig, RunConfig),
        "prune": (prune, PruneConfig, RunConfig),
        "distill": (distill, StudentConfig, RunConfig),
        "roofline": (roofline, RooflineConfig, RunConfig),
        "plan": (plan, PlanConfig),
        "bench": (bench, RooflineConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
