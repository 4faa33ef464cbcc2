"""Topic 01 - Prerequisites, measured: every experiment of the chapter, its planted bugs and its figures.

python 01-prerequisites/prerequisites.py figures             # all of them: about two minutes
python 01-prerequisites/prerequisites.py figures xor softmax # some of them

Papers: Glorot and Bengio 2010 and He et al. 2015, arXiv:1502.01852 (variance through the layers); Williams, Waterman
and Patterson 2009 (roofline).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import prerequisites as core
from prerequisites import (
    MLP,
    SGD,
    Adam,
    BenchConfig,
    Module,
    Momentum,
    Tensor,
    TrainConfig,
    check_layer,
    cross_entropy,
    he_normal,
    matmul_intensity,
    normal_init,
    plot_spirals,
    relu,
    roofline,
    softmax,
    solve_spirals,
    solve_xor,
    tanh,
    two_spirals,
    xavier_normal,
)
from workbench import (
    HARDWARE,
    Column,
    Hardware,
    RunConfig,
    check_name,
    check_range,
    describe_machine,
    progress,
    run_experiments,
    save_figure,
    save_results,
    speed_line,
    time_in_turns,
)


@dataclass(frozen=True)
class FiguresConfig:
    """Sizes of the chapter's experiments."""

    only: tuple[str, ...] = ()  # graph xor spirals variance optimizers softmax roofline breaks; none means all
    n_seeds: int = 3  # runs of each configuration, with seeds from 0
    n_xor_seeds: int = 100  # runs of each network on XOR, with seeds from 100
    max_steps: int = 1500  # training steps on the spirals; XOR takes at most 400
    n_layers: int = 50  # layers of the random networks
    d_hidden: int = 256  # width of the random networks
    max_size: int = 1024  # largest square matrix of the roofline
    n_rounds: int = 7  # measurements of each time, in turns
    n_copied: int = 2**25  # float32 numbers in the arrays that measure the memory
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_xor_seeds", "max_steps", "n_layers", "d_hidden", "n_rounds", least=1)
        check_range(self, "max_size", least=32, most=8192)
        check_range(self, "n_copied", least=1000)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)


# Initialisation, optimizers, rounding


def activation_variances(
    init: Callable, activation: Callable, generator: np.random.Generator, n_layers: int = 50, width: int = 256
) -> list[float]:
    """Send as many normal inputs as a layer is wide through random layers; return each layer's variance of W x."""
    x, variances = generator.normal(size=(width, width)), []
    for _ in range(n_layers):
        summed = x @ init(width, width, generator).T  # (samples, width)
        x = activation(summed)  # (samples, width)
        variances.append(float(summed.var()))
    return variances


def bowl(place, curvatures: tuple[float, float] = (1.0, 100.0), angle: float = 0.0):
    """sum(curvature x^2) / 2 along axes turned by `angle` in radians: places (..., 2) -> heights (...)."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # (2, 2)
    return core.sum(0.5 * np.array(curvatures) * (place @ turn) ** 2, axis=-1)


def optimizer_path(
    make_optimizer: Callable[[list[Tensor]], SGD],
    start: tuple[float, float] = (-1.0, 1.0),
    curvatures: tuple[float, float] = (1.0, 100.0),
    n_steps: int = 100,
    angle: float = 0.0,
) -> np.ndarray:
    """Minimise `bowl`; return every place on the way, (steps + 1, 2). The minimum, 0, is at (0, 0)."""
    place = Tensor(np.array(start, dtype=np.float64), requires_grad=True)
    optimizer, path = make_optimizer([place]), [place.data]
    for _ in range(n_steps):
        optimizer.zero_grad()
        bowl(place, curvatures, angle).backward()
        optimizer.step()
        path.append(place.data)
    return np.stack(path)


def steps_to(losses: np.ndarray, share: float = 1e-6) -> float:
    """The first step at which the loss is at most `share` of the first; infinite if there is none."""
    reached = np.flatnonzero(losses <= share * losses[0])
    return float(reached[0]) if len(reached) else math.inf


def naive_softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) as the formula is written: overflows above 88 in float32 and above 709 in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def softmax_error(
    function: Callable, offset: float, generator: np.random.Generator, n_classes: int = 100, dtype=np.float32
) -> float:
    """Largest relative error of a softmax of logits N(offset, 1); infinite if a result is not a number.

    The reference has 28 decimal digits, for the same rounded logits.
    """
    logits = (generator.normal(size=n_classes) + offset).astype(dtype)  # (classes)
    weights = [Decimal(float(logit)).exp() for logit in logits]
    total = math.fsum(float(weight / weights[0]) for weight in weights)
    exact = np.array([float(weight / weights[0]) / total for weight in weights])  # (classes)
    error = float((np.abs(function(logits) - exact) / exact).max())
    return error if math.isfinite(error) else math.inf


# How fast a matrix product can be


def matmul_loop(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """The matrix product as it is defined, c[i][j] = sum over k of a[i][k] b[k][j], one number at a time."""
    product = [[0.0] * len(b[0]) for _ in a]
    for i in range(len(a)):
        for j in range(len(b[0])):
            for k in range(len(b)):
                product[i][j] += a[i][k] * b[k][j]
    return product


def repeat(work: Callable[[], object], n_calls: int) -> None:
    for _ in range(n_calls):
        work()


def matmul_rates(config: BenchConfig, generator: np.random.Generator) -> dict[str, dict[int, list[float]]]:
    """FLOP/s of square float32 matrix products, 2 n^3 FLOPs each: {"loop", "NumPy" or "torch": {size: rounds}}."""
    rates = {"loop": {}, "NumPy": {}, "torch": {}}
    for size in progress(config.sizes, "matrix products"):
        a, b = generator.normal(size=(2, size, size)).astype(np.float32)
        products = {"NumPy": partial(np.matmul, a, b), "torch": partial(torch.matmul, *map(torch.from_numpy, (a, b)))}
        n_calls = dict.fromkeys(products, 1 + int(1e7 / size**3))  # long enough for the clock
        if size <= 128:
            products["loop"], n_calls["loop"] = partial(matmul_loop, a.tolist(), b.tolist()), 1
        works = {name: partial(repeat, product, n_calls[name]) for name, product in products.items()}
        for name, seconds in time_in_turns(works, config.n_rounds).items():
            rates[name][size] = [2 * size**3 * n_calls[name] / second for second in seconds]
    return rates


def streaming_rates(n_numbers: int, n_rounds: int) -> list[tuple[str, float, float]]:
    """(work, FLOP/byte, best FLOP/s) in torch of two operations that touch each number once, in float32."""
    a, b, total = torch.ones(n_numbers), torch.ones(n_numbers), torch.empty(n_numbers)
    side = math.isqrt(n_numbers)
    matrix, vector = torch.ones(side, side), torch.ones(side)
    works = {"add": lambda: torch.add(a, b, out=total), "matrix times vector": lambda: matrix @ vector}
    best = {name: float(np.min(seconds)) for name, seconds in time_in_turns(works, n_rounds).items()}
    return [
        ("add two arrays", 1 / 12, n_numbers / best["add"]),  # 1 FLOP for two numbers read and one written
        ("matrix times vector", 2 / 4, 2 * side**2 / best["matrix times vector"]),  # 2 FLOPs for each weight read
    ]


def measure_machine(
    n_rounds: int,
    rates: dict[str, dict[int, list[float]]],
    n_copied: int = 2**25,
    streams: Iterable[tuple[str, float, float]] = (),
    size: int = 2048,
) -> Hardware:
    """This machine's best float32 FLOP/s, in a matrix product, and bytes/s, read and written by a copy of 128 MB.

    The peak is the best of a product of `size` and of all `rates`, and the bandwidth the best of the copy and of all
    `streams`: nothing that ran is faster than the peak.
    """
    square, source = torch.randn(size, size), torch.zeros(n_copied)
    array, target = square.numpy(), torch.empty_like(source)
    works = {"torch": lambda: square @ square, "NumPy": lambda: array @ array, "copy": lambda: target.copy_(source)}
    best = {name: np.min(seconds) for name, seconds in time_in_turns(works, n_rounds).items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.nan
    known = [rate for sizes in rates.values() for rounds in sizes.values() for rate in rounds]
    flops = float(np.max([2 * size**3 / best["torch"], 2 * size**3 / best["NumPy"], *known]))
    bandwidth = float(np.max([2 * source.nbytes / best["copy"], *(rate / reuse for _, reuse, rate in streams)]))
    return Hardware("this machine", memory, bandwidth, flops, f"measured, {describe_machine()}")


def step_times(d_hidden: int, batch_size: int, n_rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of 10 training steps (forward, backward, Adam) of one network in our engine and in torch, float64."""
    generator = np.random.default_rng(seed)
    points, classes = two_spirals(batch_size, 0.0, generator)
    widths = [2, d_hidden, d_hidden, 2]
    layers = [torch.nn.Linear(*sizes, dtype=torch.float64) for sizes in zip(widths, widths[1:], strict=False)]
    theirs = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    ours, inputs, targets = MLP(widths, generator), torch.from_numpy(points), torch.from_numpy(classes)
    torch_loss = torch.nn.functional.cross_entropy

    def step(optimizer, loss_of: Callable) -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    our_step = partial(step, Adam(ours.parameters()), lambda: cross_entropy(ours(points), classes))
    their_step = partial(step, torch.optim.Adam(theirs.parameters()), lambda: torch_loss(theirs(inputs), targets))
    return time_in_turns({"ours": partial(repeat, our_step, 10), "torch": partial(repeat, their_step, 10)}, n_rounds)


def warn_if_unsteady(rounds: list[list[float]], most: float = 3.0) -> None:
    """Say so if the rounds of one measurement differ more than `most`-fold: then no ratio above can be trusted.

    A threaded product waits for its slowest thread, so that one busy core can make it a hundred times as slow.
    """
    spread = np.max([np.max(runs) / np.min(runs) for runs in rounds])
    if spread > most:
        remedy = "repeat on an idle machine, or with OMP_NUM_THREADS=1"
        print(f"unsteady: rounds of one measurement differ {spread:.0f}-fold, other programs hold the cores; {remedy}")


def report_speed(config: BenchConfig, run: RunConfig) -> None:
    """The `bench` verb: print what was measured, with its ratios, and draw the roofline."""
    rates = matmul_rates(config, np.random.default_rng(run.seed))
    machine = measure_machine(config.n_rounds, rates, size=2 * config.max_size)
    ridges = ", ".join(f"{item.name} {item.ridge:.0f}" for item in HARDWARE)
    print(describe_machine())
    print(f"measured peaks: {machine.flops / 1e9:.1f} GFLOP/s in float32, {machine.bandwidth / 1e9:.1f} GB/s")
    print(f"ridge: {machine.ridge:.1f} FLOP/byte; by their data sheets, in 16 bits: {ridges}")
    print("matrix product: size, intensity, GFLOP/s in the best round (share of the roofline; slowest round)")
    for size in config.sizes:
        roof = roofline(matmul_intensity(size), machine)
        cells = {name: np.array(sizes[size]) for name, sizes in rates.items() if size in sizes}
        line = "  ".join(
            f"{n} {r.max() / 1e9:.3g} ({r.max() / roof:.2%}; {r.min() / 1e9:.3g})" for n, r in cells.items()
        )
        print(f"{size:5} {matmul_intensity(size):6.1f} FLOP/byte  {line}")
    shared = list(rates["loop"])[-1]
    loop, *others = (np.max(sizes[shared]) for sizes in rates.values())
    print(
        f"at size {shared}, NumPy is {others[0] / loop:.0f} and torch {others[1] / loop:.0f} times as fast as the loop"
    )
    rounds = [runs for sizes in rates.values() for runs in sizes.values()]
    for d_hidden, batch_size in ((32, 64), (512, 256)):
        times = step_times(d_hidden, batch_size, config.n_rounds, run.seed)
        rounds += times.values()
        what, best = f"training step, width {d_hidden}, batch {batch_size},", np.min(times["ours"]) / 10
        print(f"{speed_line(what, 'torch', times['ours'], times['torch'])}; {best * 1e3:.2f} ms")
    warn_if_unsteady(rounds)
    save_figure(plot_roofline(machine, rates), run.out / "roofline.svg")


# Planted bugs: each changes a line or two of what is right in the components, and returns its symptoms


def first_met_order(root: Tensor) -> list[Tensor]:
    """A wrong order for `backward`: each tensor where a walk from `root` first meets it, then reversed."""
    order, seen, stack = [], set(), [root]
    while stack:
        tensor = stack.pop()
        if tensor not in seen:
            seen.add(tensor)
            order.append(tensor)
            stack.extend(parent for parent, _ in reversed(tensor.parents))
    return order[::-1]


def recursive_order(root: Tensor) -> list[Tensor]:
    """The right order by a function that calls itself, as in micrograd: limited by Python's nested calls."""
    order, seen = [], set()

    def visit(tensor: Tensor) -> None:
        if tensor not in seen:
            seen.add(tensor)
            for parent, _ in tensor.parents:
                visit(parent)
            order.append(tensor)

    visit(root)
    return order


class AdamThatKeepsGradients(Adam):
    """Adam in a loop that forgot zero_grad."""

    def zero_grad(self) -> None:
        pass


class AdamUncorrected(Adam):
    """Adam without its bias corrections."""

    def direction(self, parameter: Tensor) -> np.ndarray:
        super().direction(parameter)
        first, second, _ = self.moments[parameter]
        return first / (np.sqrt(second) + self.eps)


class AdamEpsInside(Adam):
    """Adam with eps under the root."""

    def direction(self, parameter: Tensor) -> np.ndarray:
        super().direction(parameter)
        first, second, n_steps = self.moments[parameter]
        return first / (1 - self.beta1**n_steps) / np.sqrt(second / (1 - self.beta2**n_steps) + self.eps)


@contextmanager
def planted(**wrong) -> Iterator[None]:
    """Within the block, these names of prerequisites.py mean something else; what is measured calls them by `core`."""
    with ExitStack() as stack:
        for name, replacement in wrong.items():
            stack.enter_context(mock.patch.object(core, name, replacement))
        yield


def reused_node() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The square r1 = x^2 is used twice: r2 = 3 r1 and loss = r1 r2. At x = 1, loss = 3 x^4 has derivative 12."""
    x = Tensor(1.0, requires_grad=True)
    square = x * x
    triple = 3.0 * square
    loss = square * triple
    loss.backward()
    return x, square, triple, loss


def chain_length(most: int = 10_000) -> int:
    """The most operations in a row, up to `most`, that `backward` gets through."""
    low, high = 0, most + 1  # low works, high does not
    while high - low > 1:
        length = most if high > most else (low + high) // 2
        y = Tensor(1.0, requires_grad=True)
        for _ in range(length):
            y = y + 1.0
        try:
            y.backward()
            low = length
        except RecursionError:
            high = length
        if low == most:
            break
    return low


def first_step(gradient: float) -> float:
    """Length of Adam's first step, in learning rates, for one parameter with this gradient."""
    x = Tensor(0.0, requires_grad=True)
    x.grad = np.array(gradient)
    core.Adam([x], 1.0).step()
    return float(np.abs(x.data))


def xor_share(seeds: Iterable[int], learning_rate: float = 0.01) -> float:
    """Share of the seeds whose network gets all four points of XOR."""
    return float(np.mean([solve_xor(TrainConfig(learning_rate=learning_rate), seed) == 1 for seed in seeds]))


def small_bowl_left() -> float:
    """Share of the loss left after 200 steps of Adam on a bowl that is scaled by 1e-6."""
    path = optimizer_path(partial(core.Adam, learning_rate=0.03), curvatures=(1e-6, 1e-4), n_steps=200)
    losses = bowl(path, (1e-6, 1e-4))
    return float(losses[-1] / losses[0])


def gradient_after(n_calls: int) -> float:
    """The gradient of x^2 at x = 1 after some steps too small to move x, each with zero_grad, backward and step."""
    x = Tensor(1.0, requires_grad=True)
    optimizer = core.Adam([x], 1e-30)
    for _ in range(n_calls):
        optimizer.zero_grad()
        (x * x).backward()
        optimizer.step()
    return float(x.grad)


SOLVES_XOR = ("share of seeds 100 to 109 that solve XOR", lambda: xor_share(range(100, 110)))
SYMPTOMS = {  # bug: (what replaces what, [(what is measured, how)])
    "order": (
        {"topological_order": first_met_order},
        [
            ("derivative of 3 x^4 at x = 1", lambda: float(reused_node()[0].grad)),
            ("cosine with central differences, layer with layer norm", lambda: check_layer(0)[1]),
            SOLVES_XOR,
        ],
    ),
    "recursion": (
        {"topological_order": recursive_order},
        [("longest chain of operations, of 10,000 tried", lambda: float(chain_length()))],
    ),
    "accumulate": (
        {"Adam": AdamThatKeepsGradients},
        [
            ("derivative of x^2 at x = 1 in the third step", lambda: gradient_after(3)),
            SOLVES_XOR,
        ],
    ),
    "bias": (
        {"Adam": AdamUncorrected},
        [
            ("first step, in learning rates", lambda: first_step(1.0)),
            SOLVES_XOR,
            ("the same at learning rate 1, not 0.01", lambda: xor_share(range(100, 110), 1.0)),
        ],
    ),
    "eps": (
        {"Adam": AdamEpsInside},
        [
            ("first step, in learning rates, gradient 1e-6", lambda: first_step(1e-6)),
            ("share of the loss left on a bowl scaled by 1e-6", small_bowl_left),
            SOLVES_XOR,
        ],
    ),
}


def symptoms(bug: str) -> Iterator[tuple[str, float, float]]:
    """(what is measured, its value in the sound code, its value with the bug) for every symptom of the bug."""
    wrong, measures = SYMPTOMS[bug]
    for what, measure in measures:
        sound = measure()
        with planted(**wrong):
            broken = measure()
        yield what, sound, broken


# Figures


def plot_graph(nodes: dict[str, Tensor], places: list[tuple[float, float]]) -> Figure:
    """A computation as a graph: each node's formula, value and gradient; each edge its local derivative."""
    figure, axis = plt.subplots(figsize=(8, 3.4))
    axis.set(xlim=(-0.3, 2.85), ylim=(-0.35, 1.05))
    where_is = dict(zip(nodes.values(), places, strict=True))
    for tensor, (x, y) in where_is.items():
        bends = {}
        for parent, vjp in tensor.parents:
            bends[parent] = bends.get(parent, 0) + 1
            u, v = where_is[parent]
            bend = 0.35 * (-1) ** bends[parent] if [p for p, _ in tensor.parents].count(parent) > 1 else 0.0
            arrow = {"arrowstyle": "->", "color": "0.45", "shrinkA": 38, "shrinkB": 38}
            arrow["connectionstyle"] = f"arc3,rad={bend}"
            axis.annotate("", (x, y), (u, v), arrowprops=arrow)
            slope = vjp(np.ones_like(tensor.data)).item()
            middle = ((u + x) / 2, (v + y) / 2 - 0.5 * bend * (x - u) * 0.9 + (0.12 if bend <= 0 else -0.12))
            axis.text(*middle, f"{slope:g}", color="#D55E00", ha="center", va="center")
    for (name, tensor), (x, y) in zip(nodes.items(), places, strict=True):
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.3"}
        from_above = any(where_is[parent][1] > y for parent, _ in tensor.parents)  # an arrow stands where a name would
        axis.text(x, y + (-0.2 if from_above else 0.2), name, ha="center", va="center")
        axis.text(x, y, f"value {tensor.item():g}\ngradient {tensor.grad.item():g}", ha="center", va="center", bbox=box)
    axis.axis("off")
    return figure


def plot_activation_variances(curves: dict[str, list[list[float]]]) -> Figure:
    """One line for each initialisation, through the layers; a curve holds one list of variances for each seed.

    A name that contains "tanh" is drawn dashed. Lines leave the frame at 1e-18, where nothing is left to learn from.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, (name, runs) in enumerate(curves.items()):
        style = "--" if "tanh" in name else "-"
        for run in runs:
            axis.semilogy(range(1, len(run) + 1), run, style, color=f"C{number % 8}", alpha=0.7, label=name)
            name = None  # one entry in the legend
    axis.axhline(1.0, color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel="layer", ylabel="variance of W x, before the activation", ylim=(1e-18, 30))
    axis.legend()
    return figure


def plot_optimizer_paths(paths: dict[str, np.ndarray], turned: dict[str, np.ndarray], angle: float) -> Figure:
    """Left: places (steps, 2) over the contours of the bowl. Right: shares of the first loss, dashed if turned."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(9, 4))
    side = np.linspace(-1.2, 1.2, 80)
    grid = np.stack(np.meshgrid(side, side), axis=-1)  # (rows, columns, 2)
    plane.contour(side, side, bowl(grid), levels=np.logspace(-2, 2, 7), colors="0.8")
    for number, (name, path) in enumerate(paths.items()):
        plane.plot(*path[:60].T, marker=".", markersize=3, color=f"C{number}", label=name)
        losses, dashed = bowl(path), bowl(turned[name], angle=angle)
        curve.semilogy(losses / losses[0], color=f"C{number}", label=name)
        curve.semilogy(dashed / dashed[0], "--", color=f"C{number}")
    plane.set(xlabel="x, curvature 1", ylabel="y, curvature 100", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    curve.axhline(1e-6, color="0.6", linestyle=":", linewidth=1)
    curve.set(ylim=(1e-9, 1e2), title=f"dashed: bowl turned by {math.degrees(angle):.0f}°")
    curve.set(xlabel="step", ylabel="loss / loss at the start")
    curve.legend()
    return figure


def plot_softmax_errors(offsets: list[float], errors: dict[str, list[float]]) -> Figure:
    """Relative error against the offset of the logits; where there is no number, a cross at the top, a row each."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, (name, line) in enumerate(errors.items()):
        line = np.array(line)
        (drawn,) = axis.semilogy(offsets, np.where(np.isfinite(line), line, np.nan), label=name)
        lost = ~np.isfinite(line)
        axis.plot(np.array(offsets)[lost], np.full(lost.sum(), 10.0 * 10**number), "x", color=drawn.get_color())
    axis.axhline(np.finfo(np.float32).eps, color="0.6", linestyle=":", label="spacing of float32 at 1")
    axis.set(xlabel="offset added to every logit", ylabel="largest relative error (cross: not a number)")
    axis.legend(loc="center", bbox_to_anchor=(0.56, 0.3), ncol=2, fontsize=9)
    return figure


def plot_roofline(
    machine: Hardware, rates: dict[str, dict[int, list[float]]], streams: Iterable[tuple[str, float, float]] = ()
) -> Figure:
    """Measured matrix products, worst to best of the repeats, under what this machine's memory and arithmetic allow.

    `streams` holds (work, FLOP/byte, FLOP/s) of work that touches each number once.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    reach = np.array([10**-1.5, machine.ridge, 1e3])
    axis.loglog(reach, roofline(reach, machine) / 1e9, color="black", label="roofline of this machine")
    for marker, (name, sizes) in zip("^so", rates.items(), strict=True):
        x = [matmul_intensity(size) for size in sizes]
        best, worst = (np.array([pick(runs) for runs in sizes.values()]) / 1e9 for pick in (np.max, np.min))
        axis.errorbar(x, best, yerr=[best - worst, 0 * best], marker=marker, capsize=3, label=f"product, {name}")
    for marker, (name, intensity, rate) in zip("Dv", streams, strict=False):
        axis.plot(intensity, rate / 1e9, marker, color="0.3", label=name)
    axis.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="rate (GFLOP/s)")
    axis.legend()
    return figure


# The chapter's experiments


def save_table(config: FiguresConfig, name: str, columns: list[Column], rows: list[list], seeds: Iterable[int]) -> None:
    experiment = "roofline" if name == "machine" else name
    command = f"python 01-prerequisites/prerequisites.py figures {experiment}"
    save_results(config.folder / "results.json", name, columns, rows, seeds, command)


def n_parameters(model: Module) -> float:
    return float(np.sum([parameter.data.size for parameter in model.parameters()]))


def graph_figure(config: FiguresConfig) -> None:
    nodes = dict(zip(("x", "r₁ = x²", "r₂ = 3 r₁", "loss = r₁ r₂"), reused_node(), strict=True))
    figure = plot_graph(nodes, [(0, 0), (1, 0), (1.75, 0.75), (2.5, 0)])
    save_figure(figure, config.folder / "graph.svg")


def xor_table(config: FiguresConfig) -> None:
    """Seeds from 100: the network was chosen on seeds 0 to 99."""
    seeds, rows = range(100, 100 + config.n_xor_seeds), []
    train = TrainConfig(max_steps=config.max_steps)
    for d_hidden in (0, 2, 4, 8, 16):
        scores = [solve_xor(train, seed, d_hidden) for seed in progress(seeds, f"XOR, {d_hidden} hidden units")]
        size = n_parameters(MLP([2, d_hidden, 2] if d_hidden else [2, 2], np.random.default_rng(0)))
        name = f"{d_hidden} hidden units" if d_hidden else "a line"
        rows.append([name, size, float(np.mean(np.equal(scores, 1))), scores])
    columns = [Column("network"), Column("parameters", "", ".0f")]
    columns += [Column("seeds with all four points right", "", ".0%"), Column("points right", "", ".1%")]
    save_table(config, "xor", columns, rows, seeds)


def spirals_table(config: FiguresConfig) -> None:
    train, seeds, rows = TrainConfig(max_steps=config.max_steps), range(config.n_seeds), []
    for n_hidden, name in enumerate(("a line", "one hidden layer of 32", "two hidden layers of 32")):
        runs = [solve_spirals(train, seed, n_hidden) for seed in seeds]
        rows.append([name, n_parameters(runs[0][0]), [score for _, score, _ in runs]])
    columns = [Column("network"), Column("parameters", "", ".0f"), Column("held-out points right", "", ".1%")]
    save_table(config, "spirals", columns, rows, seeds)
    model, _, held_out = runs[0]
    save_figure(plot_spirals(model, *held_out), config.folder / "two_spirals.svg")


def variance_table(config: FiguresConfig) -> None:
    seeds, rows, curves = range(config.n_seeds), [], {}
    inits = {"normal, 0.01": normal_init, "Xavier": xavier_normal, "He": he_normal}
    for activation in (relu, tanh):
        for name, init in inits.items():
            generators = [np.random.default_rng(seed) for seed in seeds]
            size = {"n_layers": config.n_layers, "width": config.d_hidden}
            runs = [activation_variances(init, activation, generator, **size) for generator in generators]
            curves[f"{name}, {activation.__name__}"] = runs
            gain = {"normal, 0.01": config.d_hidden * 0.01**2, "Xavier": 1.0, "He": 2.0}[name]  # width * variance
            factor = f"{gain / 2:.3g}" if activation is relu else f"at most {gain:.3g}"
            growth = [float((run[-1] / run[0]) ** (1 / (config.n_layers - 1 or 1))) for run in runs]
            rows.append([f"{name}, {activation.__name__}", [r[0] for r in runs], [r[-1] for r in runs], growth, factor])
    columns = [Column("weights and activation"), Column("variance in layer 1", "", ".2g")]
    columns += [Column(f"in layer {config.n_layers}", "", ".2g")]
    columns += [Column("factor per layer", "", ".4f"), Column("derived")]
    save_table(config, "variance", columns, rows, seeds)
    save_figure(plot_activation_variances(curves), config.folder / "activation_variance.svg")


def optimizers_table(config: FiguresConfig) -> None:
    seeds, angle, rows = range(config.n_seeds), math.pi / 4, []
    makers = {
        "SGD, η = 2/101": partial(SGD, learning_rate=2 / 101),
        "momentum 0.669, η = 4/121": partial(Momentum, learning_rate=4 / 121, momentum=(9 / 11) ** 2),
    }
    makers |= {f"Adam, η = {rate}": partial(Adam, learning_rate=rate) for rate in (0.01, 0.03, 0.1, 0.3)}
    for name, make in progress(list(makers.items()), "optimizers"):
        cells = []
        for turn in (0.0, angle):
            places = [np.random.default_rng(seed).uniform(0, 2 * math.pi) for seed in seeds]
            starts = [(math.cos(place), math.sin(place)) for place in places]
            paths = [optimizer_path(make, start, n_steps=config.max_steps, angle=turn) for start in starts]
            steps = [steps_to(bowl(path, angle=turn)) for path in paths]
            n_arrived = np.isfinite(steps).sum()
            some = f"{n_arrived} of {len(steps)} runs arrive within {config.max_steps}"
            cells.append(steps if n_arrived == len(steps) else some)
        rows.append([name, *cells])
    columns = [Column("optimiser"), Column("steps, bowl along the axes", "", ".0f")]
    save_table(config, "optimizers", [*columns, Column("bowl turned by 45°", "", ".0f")], rows, seeds)
    drawn = {"SGD": 0, "momentum": 1, "Adam, η = 0.03": 3}
    walk = partial(optimizer_path, start=(-1.0, 0.5), n_steps=400)
    paths = {name: walk(list(makers.values())[place]) for name, place in drawn.items()}
    turned = {name: walk(list(makers.values())[place], angle=angle) for name, place in drawn.items()}
    save_figure(plot_optimizer_paths(paths, turned, angle), config.folder / "optimizer_paths.svg")


def softmax_table(config: FiguresConfig) -> None:
    seeds = range(config.n_seeds)
    kinds = {
        f"{name}, {np.dtype(dtype).name}": partial(softmax_error, function, dtype=dtype)
        for dtype in (np.float32, np.float64)
        for name, function in (("as written", naive_softmax), ("shifted", softmax))
    }

    def cell(measure: Callable, offset: float) -> list[float] | str:
        errors = [measure(offset, np.random.default_rng(seed)) for seed in seeds]
        return errors if np.isfinite(errors).all() else "not a number"

    offsets = (-800.0, -700.0, -95.0, -50.0, 0.0, 50.0, 80.0, 95.0, 700.0, 800.0)
    rows = [[f"{offset:g}", *(cell(measure, offset) for measure in kinds.values())] for offset in offsets]
    save_table(config, "softmax", [Column("offset"), *(Column(name, "", ".0e") for name in kinds)], rows, seeds)
    fine = [float(offset) for offset in range(-800, 801, 20)]
    curves = {n: [measure(offset, np.random.default_rng(0)) for offset in fine] for n, measure in kinds.items()}
    save_figure(plot_softmax_errors(fine, curves), config.folder / "softmax_error.svg")


def roofline_table(config: FiguresConfig) -> None:
    bench_config = BenchConfig(config.max_size, config.n_rounds)
    rates = matmul_rates(bench_config, np.random.default_rng(0))
    streams = streaming_rates(config.n_copied, config.n_rounds)
    machine = measure_machine(config.n_rounds, rates, config.n_copied, streams, 2 * config.max_size)
    rows = []
    for name, intensity, rate in streams:
        rows.append([name, intensity, float(roofline(intensity, machine)) / 1e9, "", "", rate / 1e9])
    for size in bench_config.sizes:
        best = [float(np.max(sizes[size])) / 1e9 if size in sizes else "" for sizes in rates.values()]
        roof = float(roofline(matmul_intensity(size), machine)) / 1e9
        rows.append([f"matrix product, size {size}", matmul_intensity(size), roof, *best])
    columns = [Column("work, float32"), Column("intensity", "FLOP/byte"), Column("roofline", "GFLOP/s")]
    columns += [Column(name, "GFLOP/s") for name in rates]
    save_table(config, "roofline", columns, rows, [0])
    limits = [
        ["arithmetic", machine.flops / 1e9, "GFLOP/s"],
        ["memory", machine.bandwidth / 1e9, "GB/s"],
        ["ridge", machine.ridge, "FLOP/byte"],
    ]
    save_table(config, "machine", [Column("limit, measured"), Column("value"), Column("unit")], limits, [0])
    save_figure(plot_roofline(machine, rates, streams), config.folder / "roofline.svg")


def breaks_table(config: FiguresConfig) -> None:
    rows = []
    for bug in progress(list(SYMPTOMS), "planted bugs"):
        for what, *values in symptoms(bug):
            rows.append([f"`{bug}`", what, *(f"{x:,.0f}" if x >= 100 else f"{x:.4g}" for x in values)])
    columns = [Column("--break"), Column("symptom"), Column("sound"), Column("broken")]
    save_table(config, "breaks", columns, rows, [0])


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig], None], int]] = {  # with seconds
    "graph": (graph_figure, 1),
    "xor": (xor_table, 30),
    "spirals": (spirals_table, 15),
    "variance": (variance_table, 5),
    "optimizers": (optimizers_table, 5),
    "softmax": (softmax_table, 1),
    "roofline": (roofline_table, 15),
    "breaks": (breaks_table, 10),
}


def figures(config: FiguresConfig) -> None:
    """Run the chapter's experiments; write its figures, results.json and tables."""
    torch.set_num_threads(1)
    run_experiments(EXPERIMENTS, config.only, config.folder, config)
