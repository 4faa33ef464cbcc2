"""Topic 12 - Machine roofline: what this machine can do at most, and where each layer of a model lies below it.

python 12-scaling-optimization/scaling_optimization.py roofline                  # peaks, and the layers of a model
python 12-scaling-optimization/scaling_optimization.py roofline --d-model 1024   # of a wider one

FLOPs and bytes are counted, seconds are measured. Williams, Waterman and Patterson 2009 (the roofline); Austin et al.
2025, "How to Scale Your Model" (prefill and decode on it). Rates are per second, bytes are those of float32 numbers.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from llm_calculators import forward_flops
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from optimizers import build_optimizer
from packing import language_model_loss
from prerequisites import roofline
from prerequisites_experiments import measure_machine
from workbench import Hardware, check_range, describe_machine, time_in_turns

PHASES = ("prefill", "decode", "training")
N_BYTES = 4  # of a float32 number


# The machine


@dataclass(frozen=True)
class Machine:
    """What was measured of a machine: its peak, and the rate of a copy by how much memory it touches."""

    hardware: Hardware  # best matrix product, best stream through memory
    ladder: tuple[tuple[float, float], ...]  # (bytes touched, bytes/s), from the caches to memory
    overhead: float  # seconds of a call that computes nothing

    def bandwidth(self, n_bytes: float) -> float:
        """Bytes/s of work that touches n_bytes again and again: that of the smallest memory it fits into."""
        sizes, rates = np.array(self.ladder).T
        return float(np.interp(np.log(n_bytes), np.log(sizes), rates))

    def bound(self, work: "Work") -> tuple[float, str]:
        """Least seconds of a piece of work, and what bounds it: arithmetic, memory, or the overhead of its calls."""
        seconds = {
            "arithmetic": work.flops / self.hardware.flops,
            "memory": work.n_bytes / self.bandwidth(work.n_bytes),
            "overhead": work.n_calls * self.overhead,
        }
        name = max(seconds, key=seconds.__getitem__)
        return seconds[name], name


def measure(n_rounds: int = 5) -> Machine:
    """Measure this machine with the threads that PyTorch has."""
    ladder = []
    for n_bytes in (2**18, 2**20, 2**22, 2**24, 2**26, 2**28):  # below, a copy is mostly the overhead of its call
        source = torch.zeros(n_bytes // 2 // N_BYTES)
        target, n_times = torch.empty_like(source), max(1, 2**26 // n_bytes)

        def copy(source: Tensor = source, target: Tensor = target, n_times: int = n_times) -> None:
            for _ in range(n_times):
                target.copy_(source)

        best = min(time_in_turns({"copy": copy}, n_rounds)["copy"])
        ladder.append((float(n_bytes), n_times * n_bytes / best))
    tiny = torch.zeros(1)

    def nothing() -> None:
        for _ in range(1000):
            tiny.add(1.0)

    overhead = min(time_in_turns({"nothing": nothing}, n_rounds)["nothing"]) / 1000
    hardware = measure_machine(n_rounds, {}, streams=[("copy", 1.0, ladder[-1][1])])
    return Machine(hardware, tuple(ladder), overhead)


# The layers


@dataclass(frozen=True)
class Work:
    """One layer in one phase: what it must compute and move at least, and a function that does it."""

    layer: str
    phase: str
    flops: float
    n_bytes: float  # weights, inputs and outputs, each once
    n_calls: int  # of PyTorch's kernels, at least
    run: Callable[[], object]

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.n_bytes


def linear_work(layer: str, phase: str, n_tokens: int, d_in: int, d_out: int) -> Work:
    """A matrix. Training: the product, and two more backward, for the input and for the weight."""
    module = nn.Linear(d_in, d_out, bias=False)
    x = torch.randn(1, n_tokens, d_in, requires_grad=phase == "training")
    times = 3 if phase == "training" else 1
    numbers = n_tokens * (d_in + d_out) + d_in * d_out
    return Work(
        layer,
        phase,
        times * 2.0 * n_tokens * d_in * d_out,
        times * N_BYTES * numbers,
        times,
        both_ways(module, x, phase),
    )


def attention_work(config: ModelConfig, phase: str, n_query: int, n_key: int, batch: int) -> Work:
    """Scores, softmax and weighted sums by PyTorch's fused kernel: the matrix of scores is never moved.

    Training: twice as many FLOPs backward; queries, keys, values and outputs move once forward, with their gradients
    twice backward.
    """
    q = torch.randn(batch, config.n_heads, n_query, config.d_head)
    k, v = (torch.randn(batch, config.n_heads, n_key, config.d_head) for _ in range(2))
    met = n_key if n_query == 1 else (n_key + 1) / 2
    times = 3 if phase == "training" else 1
    flops = times * 4.0 * batch * n_query * met * config.n_heads * config.d_head
    numbers = batch * config.n_heads * config.d_head * 2 * (n_query + n_key)
    for tensor in (q, k, v):
        tensor.requires_grad_(phase == "training")
    attend = lambda q: F.scaled_dot_product_attention(q, k, v, is_causal=n_query > 1)  # noqa: E731
    return Work("attention", phase, flops, times * N_BYTES * numbers, times, both_ways(attend, q, phase))


def norm_work(config: ModelConfig, phase: str, n_tokens: int) -> Work:
    """RMSNorm by PyTorch: square, sum, scale, multiply by the gain; about 4 FLOPs for each number."""
    gain = nn.Parameter(torch.ones(config.d_model))
    x = torch.randn(1, n_tokens, config.d_model, requires_grad=phase == "training")
    times = 3 if phase == "training" else 1
    norm = lambda x: F.rms_norm(x, (config.d_model,), gain, 1e-5)  # noqa: E731
    numbers = 2 * n_tokens * config.d_model + config.d_model
    return Work(
        "norm",
        phase,
        times * 4.0 * n_tokens * config.d_model,
        times * N_BYTES * numbers,
        4 * times,
        both_ways(norm, x, phase),
    )


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor, phase: str) -> Callable[[], object]:
    """The forward pass; for training with the backward pass, too."""
    if phase != "training":

        def forward() -> Tensor:
            with torch.inference_mode():
                return function(x)

        return forward
    gradient = torch.ones_like(function(x).detach())

    def forward_and_backward() -> None:
        function(x).backward(gradient)

    return forward_and_backward


def layer_works(config: ModelConfig, phase: str, seq_len: int, batch: int = 8) -> list[Work]:
    """The layers of one block and the head. prefill: one prompt; decode: one new token; training: a batch of rows."""
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; choose from {', '.join(PHASES)}")
    batch = batch if phase == "training" else 1
    n_query = 1 if phase == "decode" else seq_len
    n_tokens, d_model = batch * n_query, config.d_model
    d_query, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    return [
        norm_work(config, phase, n_tokens),
        linear_work("queries, keys, values", phase, n_tokens, d_model, d_query + 2 * d_kv),
        attention_work(config, phase, n_query, seq_len, batch),
        linear_work("attention output", phase, n_tokens, d_query, d_model),
        linear_work("gate and up", phase, n_tokens, d_model, 2 * config.d_ff),
        linear_work("down", phase, n_tokens, config.d_ff, d_model),
        linear_work("head", phase, n_tokens, d_model, config.vocab_size),
    ]


@dataclass(frozen=True)
class Placed:
    """A layer below the roofline: what was measured beside what bounds it."""

    work: Work
    seconds: float
    least: float  # seconds
    bound: str

    @property
    def rate(self) -> float:
        return self.work.flops / self.seconds

    @property
    def share(self) -> float:
        """Of the rate that the bound allows, 0 to about 1."""
        return self.least / self.seconds


def place(works: list[Work], machine: Machine, n_rounds: int = 5) -> tuple[Machine, list[Placed]]:
    """Time every layer in turns, the best round of each, short ones many times in a round.

    Returns the machine, its peak raised to the best rate that a layer reached: nothing that ran is faster than the
    peak, also where another program held the core while the peak was measured.
    """
    repeated = {}
    for index, work in enumerate(works):
        n_times = max(1, min(2000, int(2e-3 / max(machine.bound(work)[0], 1e-7))))

        def many(run: Callable[[], object] = work.run, n_times: int = n_times) -> None:
            for _ in range(n_times):
                run()

        repeated[str(index)] = (many, n_times)
    rounds = time_in_turns({name: many for name, (many, _) in repeated.items()}, n_rounds)
    seconds = [min(rounds[str(index)]) / repeated[str(index)][1] for index in range(len(works))]
    peak = max([machine.hardware.flops, *(work.flops / each for work, each in zip(works, seconds, strict=True))])
    machine = replace(machine, hardware=replace(machine.hardware, flops=peak))
    return machine, [Placed(work, each, *machine.bound(work)) for work, each in zip(works, seconds, strict=True)]


def plot_rooflines(machine: Machine, placed: dict[str, list[Placed]]) -> Figure:
    """Every layer of every model by phase, under the roofline of the memory; a cache allows more than its slope."""
    figure, axes = plt.subplots(1, len(placed), figsize=(5.2 * len(placed), 4), sharey=True, squeeze=False)
    reach = np.array([10**-1.3, machine.hardware.ridge, 1e3])
    fastest = replace(machine.hardware, bandwidth=max(rate for _, rate in machine.ladder))
    cached = np.array([10**-1.3, fastest.ridge, 1e3])
    for axis, (name, points) in zip(axes[0], placed.items(), strict=True):
        axis.loglog(reach, roofline(reach, machine.hardware) / 1e9, color="black", label="memory and arithmetic")
        axis.loglog(cached, roofline(cached, fastest) / 1e9, color="0.6", ls=":", label="fastest cache")
        for marker, color, phase in zip("ovs", ("C0", "C1", "C2"), PHASES, strict=True):
            chosen = [point for point in points if point.work.phase == phase]
            x, y = ([getattr(p.work, "intensity") for p in chosen], [p.rate / 1e9 for p in chosen])  # noqa: B009
            axis.loglog(x, y, marker, color=color, label=phase, ms=5)
        axis.set(xlabel="arithmetic intensity (FLOP/byte)", title=name)
    axes[0, 0].set_ylabel("rate (GFLOP/s)")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure


# The profiler's table: one step of training, by kind of operation


FAMILIES = {  # of operators, by what their names contain; the first that fits
    "matrix products": ("mm", "matmul", "linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax and loss": ("softmax", "nll", "cross_entropy"),
    "optimizer": ("adam", "foreach", "_fused"),
    "embedding": ("embedding", "index"),
    "copies": ("copy", "cat", "clone", "contiguous", "fill", "zero", "empty"),
    "views": (
        "view",
        "transpose",
        "aten::t",
        "expand",
        "slice",
        "unflatten",
        "reshape",
        "permute",
        "select",
        "as_strided",
    ),
    "elementwise": ("mul", "add", "sub", "div", "silu", "pow", "rsqrt", "mean", "neg", "sum", "sqrt"),
}


def family_of_operator(name: str) -> str:
    for family, words in FAMILIES.items():
        if any(word in name for word in words):
            return family
    return "everything else"


@dataclass(frozen=True)
class Profile:
    """Seconds of some steps, by kind of operation; they add up to the time that passed."""

    seconds: dict[str, float]
    calls: dict[str, int]
    wall: float

    def rows(self) -> list[tuple[str, float, float, int]]:
        """(kind, seconds, share of the time that passed, calls), the largest first."""
        ordered = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)
        return [(name, self.seconds[name], self.seconds[name] / self.wall, self.calls.get(name, 0)) for name in ordered]


def profile_steps(step: Callable[[], None], n_steps: int = 3) -> Profile:
    """Profile some steps with torch.profiler: the operators' own time, and what passed outside of any.

    An operator's own time leaves out that of the operators it calls, so that sums count nothing twice. What is outside
    is Python, autograd's bookkeeping and the profiler itself.
    """
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    before = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        before = time.perf_counter()
        for _ in range(n_steps):
            step()
        wall = time.perf_counter() - before
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        family = family_of_operator(event.key)
        seconds[family] = seconds.get(family, 0.0) + event.self_cpu_time_total * 1e-6
        calls[family] = calls.get(family, 0) + event.count
    seconds["outside of operators"] = wall - sum(seconds.values())
    return Profile(seconds, calls, wall)


def training_step(
    model: CausalLM, batch_size: int, seq_len: int, run_model: Callable | None = None
) -> Callable[[], None]:
    """A step of AdamW on one batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (batch_size, seq_len + 1), generator=generator)
    batch, optimizer = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}, build_optimizer(model, "adamw", 1e-4)

    def step() -> None:
        loss, count = language_model_loss(model if run_model is None else run_model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_flops(config: ModelConfig, batch_size: int, seq_len: int) -> float:
    """FLOPs that a step needs: three forward passes."""
    return 3 * sum(forward_flops(config, seq_len).values()) * batch_size * seq_len


# torch.compile


@dataclass(frozen=True)
class Compiled:
    """A training step with torch.compile beside one without."""

    first: float  # seconds of the first step, compilation included
    eager: list[float]  # seconds of a step, every round
    compiled: list[float]

    @property
    def ratio(self) -> float:
        """How many times as fast: the median over the rounds."""
        return float(np.median([slow / fast for slow, fast in zip(self.eager, self.compiled, strict=True)]))

    @property
    def steps_to_pay(self) -> float:
        """Steps after which the time of compiling is won back; infinite if a step is no faster."""
        gained = float(np.median(self.eager)) - float(np.median(self.compiled))
        return (self.first - float(np.median(self.compiled))) / gained if gained > 0 else float("inf")


def compare_compiled(
    model: CausalLM, batch_size: int, seq_len: int, backend: str = "inductor", n_rounds: int = 7
) -> Compiled:
    """Time a training step with and without torch.compile, in turns. Raises ValueError where it cannot compile."""
    eager = training_step(model, batch_size, seq_len)
    before = time.perf_counter()
    try:
        compiled = training_step(model, batch_size, seq_len, torch.compile(model, backend=backend))
        compiled()
    except Exception as error:  # no compiler, no such backend: what the reader needs is the reason and a way out
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile with {backend!r} fails here ({reason}); inductor needs g++ on a CPU") from None
    first = time.perf_counter() - before
    seconds = time_in_turns({"eager": eager, "compiled": compiled}, n_rounds)
    return Compiled(first, seconds["eager"], seconds["compiled"])


# The verb's settings


@dataclass(frozen=True)
class RooflineConfig:
    """Which model is placed; without --d-model the course model."""

    d_model: int = 0  # width of a model with random weights; 0: the course model
    seq_len: int = 128  # tokens of a prompt, of a cache and of a row
    batch_size: int = 8  # rows of a training step
    n_rounds: int = 5  # rounds of every measurement
    compile: bool = False  # also compile the training step: half a minute or more

    def __post_init__(self) -> None:
        check_range(self, "seq_len", "batch_size", "n_rounds", least=1)
        check_range(self, "d_model", least=0)
        if self.d_model % 64:
            raise ValueError(f"d_model={self.d_model} must be a multiple of 64, the width of a head")

    def model(self, course: ModelConfig) -> ModelConfig:
        """The course model's config, or a wider one of its kind with 4 blocks."""
        if not self.d_model:
            return course
        n_heads, d_ff = self.d_model // 64, 8 * self.d_model // 3
        return ModelConfig(8192, self.d_model, 4, n_heads, n_heads, 64, d_ff, max(512, self.seq_len))


def print_roofline(machine: Machine, placed: list[Placed]) -> None:
    print(
        f"{describe_machine()}: {machine.hardware.flops / 1e9:.1f} GFLOP/s, {machine.hardware.bandwidth / 1e9:.1f} GB/s"
    )
    print(
        f"ridge {machine.hardware.ridge:.1f} FLOP/byte; an empty call takes {machine.overhead * 1e6:.1f} microseconds"
    )
    print("copies: " + ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:.0f} GB/s" for size, rate in machine.ladder))
    print(f"{'phase':9} {'layer':22} {'FLOP/byte':>9} {'GFLOP/s':>8} {'of bound':>8}  bound by")
    for point in placed:
        work = point.work
        rates = f"{work.intensity:9.2f} {point.rate / 1e9:8.2f} {point.share:8.0%}"
        print(f"{work.phase:9} {work.layer:22} {rates}  {point.bound}")
