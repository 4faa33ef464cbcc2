"""Topic 10 - Parallel Experiments: one command for every parallel scheme, and the measurements of the chapter.

torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py parallel --scheme zero1
python 10-pretraining-llms/pretraining_llms.py parallel --scheme 1f1b --size 4      # starts the processes itself
python 10-pretraining-llms/pretraining_llms.py parallel --fault kill --max-restarts 1 --save-every 5

The same lines run on GPUs: with CUDA each process takes the GPU of its place and messages go through NCCL.
"""

import dataclasses
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data_parallel import Team
from llm_config import ModelConfig
from manual_parallel import MANUAL, DataParallel, Ring, train_with
from modern_llm_architectures import CausalLM
from packing import Batch, language_model_loss, to_device
from pipeline_parallel import SCHEDULES, Pipeline, bubble_share, order_of, plot_timetables, simulate
from process_launch import (
    Fault,
    LaunchConfig,
    ProcessFailed,
    attempt,
    joined,
    own_device,
    run_processes,
    settled_bytes_sent,
)
from sharded_checkpoints import ShardedCheckpoints, load_scheme, save_scheme
from sharded_parallel import Sharded, TensorByHand
from training_cost import RUNS, data_parallel_bytes, recomputed, ring_bytes, tensor_parallel_bytes, zero_bytes
from training_transformers import TrainConfig, WorldBatches, fit
from transformer_architecture import tiny_world
from workbench import (
    Column,
    RunConfig,
    check_range,
    largest_difference,
    save_figure,
    seed_everything,
    shown,
)

SCHEMES = (*MANUAL, "tensor-by-hand", "fsdp", "tensor", "sequence", "fsdp+tensor", *SCHEDULES)
BREAKS = ("none", "restart-address", "parameter-order")  # see PARALLEL_BREAKS


@dataclass(frozen=True)
class ParallelConfig:
    """A small model trained by several processes."""

    scheme: Literal[SCHEMES] = "ddp"  # how the work is shared
    size: int = 2  # processes to start; under torchrun --nproc-per-node decides
    tensor_size: int = 2  # processes that share each layer, in the schemes with tensor; fsdp takes the rest
    n_micro: int = 4  # micro-batches of a pipeline
    max_steps: int = 20  # optimizer steps
    batch_size: int = 8  # rows of a step, over all processes
    micro_batch_size: int = 0  # rows in one forward pass of ddp, zero1 and zero2; 0: all that a process has
    seq_len: int = 64  # tokens in a row
    learning_rate: float = 5e-3  # the peak
    d_model: int = 64  # width of the model
    n_layers: int = 4  # blocks
    save_every: int = 0  # steps between sharded checkpoints; 0: none
    resume: bool = False  # go on from the newest checkpoint, whatever number of processes wrote it
    max_restarts: int = 0  # how often all processes start again after one failed; under torchrun its own flag decides
    timeout: float = 60.0  # seconds that a process waits for another
    fault: Literal["none", "kill", "raise", "exit", "hang"] = "none"  # what one process does on purpose
    fault_rank: int = 1  # which process
    fault_step: int = 7  # after which step
    break_: Literal[BREAKS] = "none"  # the failure to show

    def __post_init__(self) -> None:
        counts = ("size", "tensor_size", "n_micro", "max_steps", "batch_size", "seq_len", "d_model", "n_layers")
        check_range(self, *counts, least=1)
        check_range(self, "micro_batch_size", "save_every", "max_restarts", "fault_rank", "fault_step", least=0)
        check_range(self, "learning_rate", "timeout", above=0)
        if self.d_model % 8:
            raise ValueError(f"d_model={self.d_model} must be divisible by 8, the number of heads")

    @property
    def training(self) -> TrainConfig:
        sizes = {"max_steps": self.max_steps, "batch_size": self.batch_size, "seq_len": self.seq_len}
        return TrainConfig(
            **sizes,
            micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(5, self.max_steps // 2),
            log_every=1,
        )

    @property
    def model(self) -> ModelConfig:
        vocab_size = -(-len(tiny_world()[1]) // 8) * 8  # divisible among up to 8 processes
        d_head = self.d_model // 8
        d_ff = -(-8 * self.d_model // 3 // 8) * 8
        return ModelConfig(
            vocab_size, self.d_model, self.n_layers, 8, 4, d_head + d_head % 2, d_ff, max(self.seq_len, 64)
        )


def build_scheme(config: ParallelConfig, team: Team, run: RunConfig) -> Any:
    """A fresh model on this process's device, and the scheme that trains it."""
    seed_everything(run.seed)
    model, training = CausalLM(config.model).to(own_device(run.device)), config.training
    if config.scheme in MANUAL:
        return MANUAL[config.scheme](model, training, team)
    if config.scheme == "tensor-by-hand":
        return TensorByHand(model, training, team)
    if config.scheme in SCHEDULES:
        return Pipeline(model, training, team, config.scheme, config.n_micro)
    tensor_size = {"fsdp": 1, "fsdp+tensor": config.tensor_size}.get(config.scheme, team.size)
    splits_sequence = config.scheme in ("sequence", "fsdp+tensor")
    return Sharded(model, training, team, tensor_size, splits_sequence, share_loss=splits_sequence)


def batches_of(config: ParallelConfig, seed: int, device: str = "auto") -> Callable[[int], Batch]:
    """Rows of TinyWorld on this process's device, a pure function of the step: what a resumed run needs."""
    rows, place = WorldBatches(config.training, seed), own_device(device)
    return lambda step: to_device(rows(step), place)


def train_in_team(team: Team, config: ParallelConfig, run: RunConfig) -> dict[str, Any]:
    """What every process of a run does; returns its losses, its weights, and what it sent and kept.

    A restarted process goes on from the newest checkpoint, if there is one. Raises ValueError if it is told to resume
    and there is none.
    """
    scheme, batches = build_scheme(config, team, run), batches_of(config, run.seed, run.device)
    checkpoints = ShardedCheckpoints(run.out / "checkpoints", team)
    header = {"scheme": config.scheme, "model": dataclasses.asdict(config.model), "seed": run.seed}
    header |= {"training": dataclasses.asdict(config.training)}
    first = 0
    found = any(team.gather(bool(checkpoints.files.steps())))
    if config.resume or (attempt() and found):
        first = load_scheme(checkpoints, scheme, header)
    elif found and not attempt():
        raise ValueError(f"{shown(checkpoints.folder)} has checkpoints; go on with --resume, or choose another --out")
    fault = Fault(config.fault, config.fault_rank, config.fault_step)

    def after_step(step: int) -> None:
        if config.save_every and step % config.save_every == 0:
            save_scheme(checkpoints, scheme, step, header)
        fault.strike(team, step)

    before, started = settled_bytes_sent(), time.perf_counter()
    losses = train_with(scheme, batches, first, after_step)
    seconds = time.perf_counter() - started
    after = settled_bytes_sent()
    return {
        "first": first,
        "losses": losses,
        "seconds": seconds,
        "kernel_bytes": after - before if before is not None and after is not None else -1,
        "ring_bytes": scheme.ring.sent if hasattr(scheme, "ring") else -1,
        "state_bytes": scheme.state_bytes(),
        "weights": scheme.full_state(),
        "events": [list(event) for event in getattr(scheme, "events", [])],
    }


def parallel(config: ParallelConfig, run: RunConfig) -> None:
    """Train a small model with several processes and one of the parallel schemes; torchrun's, or our own on the CPU."""
    if run.device not in ("auto", "cpu") and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"the processes that this command starts compute on the CPU, got --device {run.device}; "
            "for GPUs start it by torchrun --nproc-per-node N"
        )
    if config.break_ == "parameter-order":
        show_parameter_order(config, run)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with joined(datetime.timedelta(seconds=config.timeout)) as team:
            result = train_in_team(team, config, run)
            results = team.gather({name: result[name] for name in ("kernel_bytes", "state_bytes")})
        if team.rank == 0:
            print_outcome(config, result, results)
        return
    launch = LaunchConfig(config.size, config.timeout, config.max_restarts)
    if config.break_ == "restart-address":
        show_restart_address(config, run)
        return
    try:
        results = run_processes(train_in_team, launch, config, run)
    except ProcessFailed as failure:
        raise ValueError(f"{failure}; the others were ended; see --max-restarts and --save-every") from failure
    print_outcome(config, results[0], results)


def print_outcome(config: ParallelConfig, result: dict[str, Any], results: list[dict[str, Any]]) -> None:
    losses, n_tokens = result["losses"], len(result["losses"]) * config.batch_size * config.seq_len
    if result["first"]:
        print(f"went on from step {result['first']}")
    if not losses:
        print(f"nothing to do: {config.max_steps} steps are done")
        return
    print(f"{config.scheme}, {len(results)} processes: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
    print(f"{n_tokens / result['seconds']:,.0f} tokens/s over {len(losses)} steps")
    for name, unit in (("kernel_bytes", "sent over TCP"), ("state_bytes", "of optimizer state")):
        print(f"bytes {unit}, by process: {', '.join(format(one[name], ',') for one in results)}")


# Failures on purpose


Row = tuple[str, float, float]  # what is measured, as it should be, with the failure


def restarts_that_end(config: ParallelConfig, run: RunConfig, apart: bool, n_runs: int = 4) -> tuple[int, str]:
    """Kill a process and start all again, `n_runs` times: how many runs come to their end, and what stopped another."""
    own = dataclasses.replace(config, fault="kill", save_every=5, timeout=10.0)
    launch = LaunchConfig(config.size, own.timeout, max_restarts=1, apart=apart, slow=1.0)
    n_done, last = 0, ""
    for _ in range(n_runs):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_processes(train_in_team, launch, own, dataclasses.replace(run, out=Path(folder)))
                n_done += 1
            except ProcessFailed as failure:
                last = str(failure)
    return n_done, last


def show_restart_address(config: ParallelConfig, run: RunConfig) -> None:
    """Kill a process and start again: four times with a table of addresses for each attempt, four with one for all.

    With one table a restart fails in about three of four cases: of two addresses gloo lets one call the other, and only
    a caller notices that the address of the other is dead.
    """
    for apart in (True, False):
        n_done, last = restarts_that_end(config, run, apart)
        what = "an address table for each attempt" if apart else "one address table for all attempts"
        print(f"{what}: {n_done} of 4 went on and came to the end{'; otherwise: ' * bool(last)}{last}")


class Misordered(DataParallel):
    """Data parallelism in which one process has two weights of the same shape in the other order, unnoticed."""

    def reduced(self) -> list[torch.Tensor]:
        if self.team.rank == 1 and self.n_steps == 0:
            block = self.model.blocks[0].self_attn
            pair = {id(block.k_proj.weight): block.v_proj.weight, id(block.v_proj.weight): block.k_proj.weight}
            for bucket in self.buckets:
                bucket.parameters = [pair.get(id(parameter), parameter) for parameter in bucket.parameters]
        return super().reduced()


def order_losses(team: Team, config: ParallelConfig, seed: int, misordered: bool) -> dict[str, Any]:
    scheme = (Misordered if misordered else DataParallel)(CausalLM(config.model), config.training, team)
    losses = train_with(scheme, batches_of(config, seed))
    return {"losses": losses, "weights": scheme.full_state()}


def exchanged(config: ParallelConfig, run: RunConfig, misordered: bool) -> tuple[float, float]:
    """The last loss, and the largest difference between the weights of the two processes."""
    seed_everything(run.seed)
    first, second = run_processes(order_losses, LaunchConfig(2), config, run.seed, misordered)
    return first["losses"][-1], largest_difference(first["weights"], second["weights"])


def show_parameter_order(config: ParallelConfig, run: RunConfig) -> None:
    """Two processes that disagree on the order of two weights: no error, and two models in place of one."""
    for misordered in (False, True):
        loss, apart = exchanged(config, run, misordered)
        what = "k_proj and v_proj exchanged in process 1" if misordered else "the same order everywhere"
        print(f"{what}: loss {loss:.4f}, weights of the two processes differ by {apart:.2g}")


def restart_address(run: RunConfig, n_runs: int = 8) -> list[Row]:
    done = [restarts_that_end(ParallelConfig(), run, apart, n_runs)[0] / n_runs for apart in (True, False)]
    return [(f"share of {n_runs} restarts after a kill that come to the end", *done)]


def parameter_order(run: RunConfig, config: ParallelConfig | None = None) -> list[Row]:
    sound, broken = (exchanged(config or ParallelConfig(), run, misordered) for misordered in (False, True))
    return [
        ("largest difference between the weights of the two processes", sound[1], broken[1]),
        ("loss of the last step, nats per token", sound[0], broken[0]),
    ]


PARALLEL_BREAKS: dict[str, Callable[[RunConfig], list[Row]]] = {
    "restart-address": restart_address,
    "parameter-order": parameter_order,
}


# The measurements of the chapter. Each takes the lead module's FiguresConfig, which knows where results go


def quiet_run(config: ParallelConfig, size: int, seed: int = 0) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(seed=seed, out=Path(folder))
        return run_processes(train_in_team, LaunchConfig(size, timeout=300.0), config, run)


def one_process(config: ParallelConfig, seed: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of topic 07's loop, alone."""
    seed_everything(seed)
    model = CausalLM(config.model)
    rows = fit(model, batches_of(config, seed), language_model_loss, config.training)
    return [row["loss"] for row in rows], {name: tensor.detach() for name, tensor in model.state_dict().items()}


EQUALITY = (
    *((scheme, size) for scheme in MANUAL for size in (2, 4)),
    *(("tensor-by-hand", 2), ("tensor-by-hand", 4), ("fsdp", 2), ("fsdp", 4), ("tensor", 2), ("sequence", 2)),
    *(("fsdp+tensor", 4), ("gpipe", 2), ("gpipe", 4), ("1f1b", 2), ("1f1b", 4)),
)


def expected_bytes(config: ParallelConfig, size: int) -> float:
    """Bytes that a process sends in a whole run, by formula; 0 where none is given here."""
    n_bytes = 4 * sum(parameter.numel() for parameter in CausalLM(config.model).parameters())
    n_tokens = config.batch_size * config.seq_len
    if config.scheme in MANUAL:
        return config.max_steps * data_parallel_bytes(n_bytes, size, config.scheme)
    if config.scheme == "tensor-by-hand":
        return config.max_steps * tensor_parallel_bytes(config.model, n_tokens, size, 4)
    if config.scheme == "fsdp":
        return config.max_steps * data_parallel_bytes(n_bytes, size, "zero3")
    return 0.0


def parallel_equality(figures: Any, run: RunConfig) -> None:
    """Every scheme against one process: losses and weights after 10 steps, and the bytes that left process 0."""
    config = ParallelConfig(max_steps=10)
    losses, weights = one_process(config)
    columns = [
        *(Column("scheme"), Column("processes", digits="d"), Column("largest difference of a loss", "nats", ".1e")),
        *(Column("of a weight", digits=".1e"), Column("sent by process 0", "MB", ".3f")),
        *(Column("by formula", "MB"), Column("sent / formula")),
    ]
    rows: list[list] = []
    for scheme, size in EQUALITY:
        own = dataclasses.replace(config, scheme=scheme)
        results = quiet_run(own, size)
        sent, formula = results[0]["kernel_bytes"], expected_bytes(own, size)
        ratio = (f"{formula / 1e6:.3f}", f"{sent / formula:.3f}") if formula and sent > 0 else ("-", "-")
        differences = (
            largest_difference(results[-1]["losses"], losses),
            largest_difference(results[-1]["weights"], weights),
        )
        rows.append([scheme, size, *differences, sent / 1e6, *ratio])
    figures.save("parallel-equal", columns, rows, "parallel-equality", 1)


def parallel_scaling(figures: Any, run: RunConfig) -> None:
    """Tokens per second with 1, 2 and 4 processes, the batch shared among them; schemes in turns, three rounds."""
    config = ParallelConfig(max_steps=12, batch_size=16, d_model=128)
    cases = [("ddp", 1), ("ddp", 2), ("ddp", 4), ("zero1", 2), ("fsdp", 2), ("tensor-by-hand", 2), ("1f1b", 2)]
    speeds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for seed in range(3):
        for scheme, size in cases:
            result = quiet_run(dataclasses.replace(config, scheme=scheme), size, seed)[0]
            n_tokens = len(result["losses"]) * config.batch_size * config.seq_len
            speeds[scheme, size].append(n_tokens / result["seconds"])
    alone = speeds["ddp", 1]
    columns = [
        *(Column("scheme"), Column("processes", digits="d"), Column("speed", "tokens/s", ",.0f")),
        *(Column("against one process", "times", ".2f"), Column("efficiency", digits=".0%")),
    ]
    rows = []
    for (scheme, size), measured in speeds.items():
        ratios = [speed / one for speed, one in zip(measured, alone, strict=True)]
        rows.append([scheme, size, measured, ratios, [ratio / size for ratio in ratios]])
    figures.save("parallel-scaling", columns, rows, "parallel-scaling", 3)


def parallel_memory(figures: Any, run: RunConfig) -> None:
    """Optimizer state kept by each process, measured after a step, and ZeRO's formula for it."""
    config = ParallelConfig(max_steps=1)
    n_parameters = sum(parameter.numel() for parameter in CausalLM(config.model).parameters())
    stages = {"ddp": 0, "zero1": 1, "zero2": 2, "fsdp": 3}
    columns = [
        *(Column("scheme"), Column("processes", digits="d"), Column("largest of a process", "bytes", ",d")),
        *(Column("by formula", "bytes", ",.0f"), Column("measured / formula", digits=".4f")),
    ]
    rows: list[list] = []
    for scheme, stage in stages.items():
        for size in (1, 2, 4):
            results = quiet_run(dataclasses.replace(config, scheme=scheme), size)
            most = max(result["state_bytes"] for result in results)
            formula = zero_bytes(n_parameters, size, stage, weight_bytes=4)["optimizer"]
            rows.append([scheme, size, most, formula, most / formula])
    figures.save("parallel-memory", columns, rows, "parallel-memory", 1)


def zero_table(figures: Any, run: RunConfig) -> None:
    """What ZeRO's stages leave on each GPU, for 8 billion weights on 8 and on 64 GPUs."""
    n_parameters = 8.03e9
    columns = [Column("stage")] + [
        Column(f"{name}, {size} GPUs", "GB", ".1f") for size in (8, 64) for name in ("a GPU", "sent a step")
    ]
    rows: list[list] = []
    for stage, scheme in enumerate(("ddp", "zero1", "zero2", "zero3")):
        cells = []
        for size in (8, 64):
            held = sum(zero_bytes(n_parameters, size, stage).values())
            cells += [held / 1e9, data_parallel_bytes(2 * n_parameters, size, scheme) / 1e9]
        rows.append([f"{stage}", *cells])
    figures.save("zero-memory", columns, rows, "zero-memory", 1)


def pipeline_bubbles(figures: Any, run: RunConfig) -> None:
    """Bubble and activations of both schedules: formula, simulator, and the order in which PyTorch really ran."""
    columns = [
        *(Column("schedule"), Column("stages", digits="d"), Column("micro-batches", digits="d")),
        *(Column("bubble by formula", digits=".1%"), Column("simulated", digits=".1%")),
        *(Column("activations of stage 0", "micro-batches", "d"), Column("PyTorch's order")),
    ]
    rows: list[list] = []
    for n_stages, n_micro in ((2, 4), (4, 4), (4, 8)):
        for schedule in SCHEDULES:
            config = ParallelConfig(scheme=schedule, n_micro=n_micro, max_steps=1)
            results = quiet_run(config, n_stages)
            ran = [[tuple(event) for event in result["events"]] for result in results]
            planned = [order_of(schedule, stage, n_stages, n_micro) for stage in range(n_stages)]
            table = simulate(schedule, n_stages, n_micro)
            same = "as simulated" if ran == planned else "another"
            cells = (bubble_share(n_stages, n_micro), float(table.bubble), table.peak(0))
            rows.append([schedule, n_stages, n_micro, *cells, same])
    figures.save("pipeline-bubbles", columns, rows, "pipeline-bubbles", 1)
    tables = {"GPipe": simulate("gpipe", 4, 8), "1F1B": simulate("1f1b", 4, 8)}
    save_figure(plot_timetables(tables), figures.folder / "pipeline-timetables.svg")


def restarts(figures: Any, run: RunConfig) -> None:
    """Process 1 fails at a random step, in each of four ways; do all runs go on, and end with the same bits?"""
    config = ParallelConfig(scheme="zero1", max_steps=12, save_every=2, timeout=60.0, max_restarts=1)
    whole = quiet_run(config, 2)[0]["weights"]
    columns = [
        *(Column("what happens to process 1"), Column("runs", digits="d"), Column("went on", digits="d")),
        *(Column("same bits at the end", digits="d"), Column("a run without restart is over after", "s", ".1f")),
    ]
    rows: list[list] = []
    generator = torch.Generator().manual_seed(0)
    for kind, n_runs in (("kill", 10), ("raise", 10), ("exit", 10), ("hang", 3)):
        went_on = equal = 0
        own = dataclasses.replace(config, fault=kind, timeout=10.0 if kind == "hang" else config.timeout)
        seconds = seconds_to_fail(dataclasses.replace(own, fault_step=1))
        for _ in range(n_runs):
            step = int(torch.randint(1, config.max_steps, (1,), generator=generator))
            with tempfile.TemporaryDirectory() as folder:
                launch = LaunchConfig(2, own.timeout, max_restarts=1)
                struck = dataclasses.replace(own, fault_step=step)
                try:
                    result = run_processes(train_in_team, launch, struck, RunConfig(out=Path(folder)))[0]
                except ProcessFailed:
                    continue
            went_on += 1
            equal += largest_difference(result["weights"], whole) == 0
        rows.append([kind, n_runs, went_on, equal, seconds])
    figures.save("parallel-restarts", columns, rows, "parallel-restarts", 1)


def seconds_to_fail(config: ParallelConfig) -> float:
    """Seconds from the start of a run that fails at its first step to the end of all of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            run_processes(train_in_team, LaunchConfig(2, config.timeout), config, RunConfig(out=Path(folder)))
        except ProcessFailed:
            return time.perf_counter() - started
    raise ValueError("the run did not fail; choose another fault_rank or fault_step")


def published_budgets(figures: Any, run: RunConfig) -> None:
    """6ND and the sum of all terms for published runs, and the utilisation that their GPU hours imply."""
    columns = [
        *(Column("model"), Column("active weights", "billions", ".1f"), Column("tokens", "trillions", ".1f")),
        *(Column("6ND", "FLOP", ".2e"), Column("all terms", "FLOP", ".2e"), Column("stated", "FLOP")),
        *(Column("GPU hours stated", "millions"), Column("implied MFU")),
    ]
    rows: list[list] = []
    for budget in map(recomputed, RUNS):
        hours = budget.run.gpu_hours
        stated = f"{budget.stated:.2e}" if budget.stated else "-"
        known = (f"{hours / 1e6:.2f}", f"{budget.mfu:.1%}") if hours else ("-", "-")
        sizes = (budget.n_parameters / 1e9, budget.run.n_tokens / 1e12, budget.six_nd, budget.flops)
        rows.append([budget.run.model, *sizes, stated, *known])
    figures.save("published-budgets", columns, rows, "published-budgets", 1)


def all_reduce_bytes(figures: Any, run: RunConfig) -> None:
    """What one all-reduce of 4 MB sends, by ring and by star, as the kernel counts it."""
    columns = [
        *(Column("way"), Column("processes", digits="d"), Column("busiest process sends", "MB", ".3f")),
        *(Column("by formula", "MB", ".3f"), Column("seconds", "s", ".3f")),
    ]
    rows: list[list] = []
    for way in ("ring", "star", "gloo"):
        for size in (2, 4):
            results = run_processes(measure_all_reduce, LaunchConfig(size), way, 10**6)
            formula = (size - 1) * 4e6 if way == "star" else ring_bytes(4e6, size)
            sent = max(result["sent"] for result in results)
            rows.append([way, size, sent / 1e6, formula / 1e6, max(result["seconds"] for result in results)])
    figures.save("all-reduce-bytes", columns, rows, "all-reduce-bytes", 1)


def measure_all_reduce(team: Team, way: str, numel: int) -> dict[str, float]:
    """Bytes and seconds of one all-reduce of fp32 numbers; all processes have the right sum, or ValueError."""
    ring = Ring(team)
    works = {"ring": ring.all_reduce, "star": ring.star_all_reduce, "gloo": lambda x: torch.distributed.all_reduce(x)}
    works[way](torch.ones(8))
    x = torch.full((numel,), float(team.rank + 1))
    before, started = settled_bytes_sent() or 0, time.perf_counter()
    works[way](x)
    seconds = time.perf_counter() - started
    if not bool((x == team.size * (team.size + 1) / 2).all()):
        raise ValueError(f"{way} gave a wrong sum")
    return {"sent": (settled_bytes_sent() or 0) - before, "seconds": seconds}


EXPERIMENTS = {  # name: (function, seconds on 2 CPU cores), for run_experiments
    "all-reduce-bytes": (all_reduce_bytes, 10),
    "parallel-equality": (parallel_equality, 120),
    "parallel-memory": (parallel_memory, 40),
    "zero-memory": (zero_table, 1),
    "pipeline-bubbles": (pipeline_bubbles, 40),
    "parallel-scaling": (parallel_scaling, 180),
    "parallel-restarts": (restarts, 180),
    "published-budgets": (published_budgets, 1),
}
