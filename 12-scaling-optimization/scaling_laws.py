"""Topic 12 - Scaling laws: loss as a function of parameters and tokens, fitted with intervals, and what it advises.

    law = fit_chinchilla(runs)                       # L = E + A / N^alpha + B / D^beta
    n_best, d_best = law.optimum(1e21)               # how to spend 10^21 FLOPs
    low, high = interval([law.e for law in bootstrap_laws(runs, n_boot=400, seed=0)])

Kaplan et al. 2020 (arXiv 2001.08361), Hoffmann et al. 2022 (Chinchilla, arXiv 2203.15556), Besiroglu et al. 2024 (the
refit, arXiv 2404.10102), Pearce and Song 2024 (why the first two disagree, arXiv 2406.12907), Porian et al. 2024 (the
same question, arXiv 2406.19146). Losses are nats per token, FLOPs those of a whole training.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

FLOPS_PER_WEIGHT = 6.0  # of a training, for each weight and token: 2 forward, 4 backward (Kaplan et al. 2020)
HUBER_DELTA = 1e-2  # residuals of log loss beyond it count linearly; Hoffmann et al. 2022 have 1e-3, see coverage


@dataclass(frozen=True)
class Runs:
    """Finished trainings, one entry each: weights that multiply a token, tokens, nats per token, and who is alike.

    Runs with the same `group` are not independent of each other, such as seeds of one size: a bootstrap keeps them
    together. Raises ValueError for lengths that differ and for numbers that are not finite and above 0.
    """

    n_parameters: np.ndarray  # (runs)
    n_tokens: np.ndarray  # (runs)
    loss: np.ndarray  # (runs)
    flops: np.ndarray | None = None  # (runs); None: 6 N D
    group: np.ndarray | None = None  # (runs); None: every pair of N and D is a group

    def __post_init__(self) -> None:
        if not len(self.loss):
            raise ValueError("there are no runs; train some")
        for name in ("n_parameters", "n_tokens", "loss", "flops"):
            if name == "flops" and self.flops is None:
                object.__setattr__(self, name, FLOPS_PER_WEIGHT * self.n_parameters * self.n_tokens)
            values = np.asarray(getattr(self, name), float)
            if values.shape != (len(self.loss),) or not np.isfinite(values).all() or values.min() <= 0:
                raise ValueError(
                    f"{name} must hold a finite number > 0 for each of {len(self.loss)} runs, got {values}"
                )
            object.__setattr__(self, name, values)
        pairs = np.stack([self.n_parameters, self.n_tokens], axis=1)
        group = np.unique(pairs, axis=0, return_inverse=True)[1].ravel() if self.group is None else self.group
        if len(group) != len(self.loss):
            raise ValueError(f"group must name a group for each of {len(self.loss)} runs, got {len(group)}")
        object.__setattr__(self, "group", np.unique(np.asarray(group), return_inverse=True)[1].ravel())

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, chosen: np.ndarray) -> "Runs":
        """Some of the runs, by index or by a mask."""
        return Runs(*(getattr(self, name)[chosen] for name in ("n_parameters", "n_tokens", "loss", "flops", "group")))


def need_runs(runs: Runs, n_unknown: int, what: str) -> None:
    """Raise ValueError unless there are more different runs than unknowns."""
    n_groups = len(np.unique(np.stack([runs.n_parameters, runs.n_tokens]), axis=1).T)
    if n_groups <= n_unknown:
        raise ValueError(
            f"need more than {n_unknown} different runs to fit the {n_unknown} numbers of {what}, got {n_groups}; "
            "train more sizes or budgets"
        )


# The laws


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

    e: float  # nats per token that no size and no data remove
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, n_parameters: Any, n_tokens: Any) -> Any:
        """Nats per token of a model of N weights after D tokens."""
        return self.e + self.a / n_parameters**self.alpha + self.b / n_tokens**self.beta

    @property
    def exponent(self) -> float:
        """a of N_best ~ C^a: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: Any) -> tuple[Any, Any]:
        """N and D of the least loss at 6 N D = flops (Hoffmann et al. 2022, equation 4)."""
        check_positive("flops", flops)
        product = np.asarray(flops, float) / FLOPS_PER_WEIGHT
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n_best = scale * product**self.exponent
        return n_best, product / n_best

    def least_loss(self, flops: Any) -> Any:
        """Nats per token at the optimum of a budget."""
        return self.loss(*self.optimum(flops))


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, equation 1.5): no floor."""

    n_c: float
    alpha_n: float
    d_c: float
    alpha_d: float

    def loss(self, n_parameters: Any, n_tokens: Any) -> Any:
        size = np.power(self.n_c / np.asarray(n_parameters, float), self.alpha_n / self.alpha_d)
        return np.power(size + self.d_c / np.asarray(n_tokens, float), self.alpha_d)


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = E + (x_c / x)^alpha; E is 0 where the fit leaves it out (Kaplan et al. 2020, equations 1.1 to 1.3)."""

    e: float
    x_c: float
    alpha: float

    def loss(self, x: Any) -> Any:
        return self.e + np.power(self.x_c / np.asarray(x, float), self.alpha)


def check_positive(name: str, value: Any) -> None:
    values = np.asarray(value, float)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"{name} must be finite and > 0, got {value}")


# What the papers state

PUBLISHED_LAWS = {
    "Hoffmann et al. 2022, as printed": ChinchillaLaw(1.69, 406.4, 0.34, 410.7, 0.28),
    "Hoffmann et al. 2022, TeX source": ChinchillaLaw(1.6934, 406.4, 0.3392, 410.7, 0.2849),
    "Besiroglu et al. 2024, refit": ChinchillaLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
}
KAPLAN_EXPONENT = 0.73  # N_best ~ C^0.73 of non-embedding weights and FLOPs (Kaplan et al. 2020, section 6.1)


def body_exponent(
    law: ChinchillaLaw, sizes: Sequence[float], vocab_size: int = 50257, max_seq_len: int = 1024, aspect: float = 64.0
) -> float:
    """a of N_best ~ C^a that an analyst finds who leaves the embeddings out of both N and C, while `law` is true.

    The experiment of Pearce and Song 2024, section 3, on paper: for bodies of `sizes` weights, d_model follows from
    12 n_layers d_model^2 and aspect = d_model / n_layers, the embeddings add (vocab_size + max_seq_len) d_model, and
    the least loss at each 6 N_body D gives the best body. The slope is that of a straight line through all of them.
    """
    bodies = np.geomspace(min(sizes), max(sizes), 60)
    grid = np.geomspace(min(sizes) / 100, max(sizes) * 100, 6000)
    widths = (grid * aspect / 12) ** (1 / 3)
    total = grid + (vocab_size + max_seq_len) * widths
    budgets, best = [], []
    for body in bodies:  # the D that makes `body` the best one: at the least loss d L / d N_body = 0 along the budget
        slope = 1 + (vocab_size + max_seq_len) * np.interp(body, grid, widths) / (3 * body)  # d N / d N_body
        n_all = np.interp(body, grid, total)
        pull = law.alpha * law.a / n_all ** (law.alpha + 1) * slope * body  # of size, for d ln N_body
        tokens = (law.beta * law.b / pull) ** (1 / law.beta)
        budgets.append(FLOPS_PER_WEIGHT * body * tokens)
        best.append(body)
    return float(np.polyfit(np.log(budgets), np.log(best), 1)[0])


# Fitting: many problems of one shape at a time, by Levenberg and Marquardt with Huber's weights

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # theta (batch, k) -> log loss (batch, runs), Jacobian


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond (Huber 1964)."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def minimise(
    model: Model, log_loss: np.ndarray, starts: np.ndarray, weights: np.ndarray, delta: float, n_steps: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """The least sum of weights * huber(model(theta) - log_loss) from each start; returns thetas and these sums.

    starts (batch, k); weights (batch, runs). Each step solves the normal equations of the residuals, weighted by
    min(1, delta / |r|), with the diagonal raised until the sum falls. All problems step together; one that a step
    gains less than a millionth of a millionth, or that no step improves, is done.
    """
    theta, damping = starts.copy(), np.full(len(starts), 1e-2)
    cost = (weights * huber(model(theta)[0] - log_loss, delta)).sum(axis=1)
    open_ = np.arange(len(starts))
    for _ in range(n_steps):
        if not len(open_):
            break
        here, weight = theta[open_], weights[open_]
        value, jacobian = model(here)
        step = damped_step(value - log_loss, jacobian, weight, damping[open_], delta)
        new_cost = (weight * huber(model(here + step)[0] - log_loss, delta)).sum(axis=1)
        better = new_cost < cost[open_]
        gained = np.where(better, cost[open_] - new_cost, np.inf)
        theta[open_[better]] = (here + step)[better]
        cost[open_[better]] = new_cost[better]
        damping[open_] = np.clip(np.where(better, damping[open_] / 3, damping[open_] * 4), 1e-9, 1e9)
        open_ = open_[(gained > 1e-12 * cost[open_]) & (damping[open_] < 1e9)]
    return theta, cost


def damped_step(
    residual: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, damping: np.ndarray, delta: float
) -> np.ndarray:
    """The step of Levenberg and Marquardt (batch, k), at most 2 in each direction."""
    scale = weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))  # (batch, runs)
    scaled = jacobian * scale[:, :, None]  # (batch, runs, k)
    normal = scaled.transpose(0, 2, 1) @ jacobian  # (batch, k, k)
    gradient = (scaled.transpose(0, 2, 1) @ residual[:, :, None])[:, :, 0]  # (batch, k)
    diagonal = np.einsum("bjj->bj", normal)
    extra = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    raised = normal + extra[:, :, None] * np.eye(normal.shape[1])
    return np.clip(-np.linalg.solve(raised, gradient[:, :, None])[:, :, 0], -2.0, 2.0)


def chinchilla_model(log_n: np.ndarray, log_d: np.ndarray) -> Model:
    """log L of ChinchillaLaw; theta = (log E, log A, alpha, log B, beta), as the sum of three exponentials in logs."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_e, log_a, alpha, log_b, beta = (theta[:, index, None] for index in range(5))
        terms = np.stack([log_e + 0 * log_n, log_a - alpha * log_n, log_b - beta * log_d])  # (3, batch, runs)
        value = np.logaddexp.reduce(terms)
        floor, size, data = np.exp(terms - value)
        return value, np.stack([floor, size, -size * log_n, data, -data * log_d], axis=-1)

    return model


def kaplan_model(log_n: np.ndarray, log_d: np.ndarray) -> Model:
    """log L of KaplanLaw; theta = (log N_c, alpha_N / alpha_D, log D_c, alpha_D)."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_nc, ratio, log_dc, power = (theta[:, index, None] for index in range(4))
        terms = np.stack([ratio * (log_nc - log_n), log_dc - log_d])  # (2, batch, runs)
        total = np.logaddexp(*terms)
        size, data = np.exp(terms - total)
        columns = [power * size * ratio, power * size * (log_nc - log_n), power * data, total]
        return power * total, np.stack(columns, axis=-1)

    return model


def sum_model(log_n: np.ndarray, log_d: np.ndarray) -> Model:
    """log of A / N^alpha + B / D^beta; theta = (log A, alpha, log B, beta): ChinchillaLaw where E is known."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_a, alpha, log_b, beta = (theta[:, index, None] for index in range(4))
        terms = np.stack([log_a - alpha * log_n, log_b - beta * log_d])  # (2, batch, runs)
        value = np.logaddexp(*terms)
        size, data = np.exp(terms - value)
        return value, np.stack([size, -size * log_n, data, -data * log_d], axis=-1)

    return model


def power_model(log_x: np.ndarray) -> Model:
    """log L of PowerLaw; theta = (log E, alpha log x_c, alpha)."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_e, log_a, alpha = (theta[:, index, None] for index in range(3))
        terms = np.stack([log_e + 0 * log_x, log_a - alpha * log_x])  # (2, batch, runs)
        value = np.logaddexp(*terms)
        floor, rest = np.exp(terms - value)
        return value, np.stack([floor, rest, -rest * log_x], axis=-1)

    return model


def grid_of(*axes: Sequence[float]) -> np.ndarray:
    """Every combination of the axes' values: (batch, axes)."""
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def best_of(model: Model, runs: Runs, starts: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    """The theta of least cost over all starts, one for each row of `weights` (batch, runs).

    A few steps from every start with all weights 1, then all steps from the four best.
    """
    log_loss, found = np.log(runs.loss), []
    theta, cost = minimise(model, log_loss, starts, np.ones((len(starts), len(runs))), delta, n_steps=40)
    chosen = theta[np.argsort(cost)[:4]]
    for part in np.array_split(weights, max(1, weights.size // 20_000)):  # bounds the memory
        many = np.tile(chosen, (len(part), 1))
        theta, cost = minimise(model, log_loss, many, np.repeat(part, len(chosen), axis=0), delta, n_steps=300)
        picked = cost.reshape(len(part), -1).argmin(axis=1) + len(chosen) * np.arange(len(part))
        found.append(theta[picked])
    return np.concatenate(found)


def fit_chinchilla(runs: Runs, delta: float = HUBER_DELTA) -> ChinchillaLaw:
    """Approach 3 of Hoffmann et al. 2022, section D.2: Huber's loss on log loss, the best of 243 starts.

    Raises ValueError unless there are more than 5 different runs.
    """
    return fit_many(runs, np.ones((1, len(runs))), delta)[0]


def fit_many(runs: Runs, weights: np.ndarray, delta: float = HUBER_DELTA) -> list[ChinchillaLaw]:
    """`fit_chinchilla` for every row of weights (batch, runs), such as the counts of a bootstrap."""
    need_runs(runs, 5, "E + A / N^alpha + B / D^beta")
    log_n, log_d = np.log(runs.n_parameters), np.log(runs.n_tokens)
    mid_n, mid_d = log_n.mean(), log_d.mean()  # centred, A and alpha hardly depend on each other
    low = math.log(runs.loss.min())
    shares = np.log([0.03, 0.1, 0.3, 0.6, 0.9])
    starts = grid_of(
        low + np.array([-1.5, -0.4, -0.1]), low + shares[::2], [0.2, 0.5, 1.0], low + shares[::2], [0.2, 0.5, 1.0]
    )
    theta = best_of(chinchilla_model(log_n - mid_n, log_d - mid_d), runs, starts, weights, delta)
    theta[:, 1] += theta[:, 2] * mid_n
    theta[:, 3] += theta[:, 4] * mid_d
    return [
        ChinchillaLaw(math.exp(row[0]), math.exp(min(row[1], 700)), row[2], math.exp(min(row[3], 700)), row[4])
        for row in theta.tolist()
    ]


def fit_kaplan(runs: Runs, delta: float = HUBER_DELTA) -> KaplanLaw:
    """Kaplan's joint law by the same procedure. Raises ValueError unless there are more than 4 different runs."""
    need_runs(runs, 4, "Kaplan's law")
    log_n, log_d = np.log(runs.n_parameters), np.log(runs.n_tokens)
    mid_n, mid_d = log_n.mean(), log_d.mean()
    starts = grid_of([-4.0, 0.0, 4.0], [0.3, 1.0, 2.0], [-4.0, 0.0, 4.0], [0.05, 0.2, 0.5])
    (row,) = best_of(kaplan_model(log_n - mid_n, log_d - mid_d), runs, starts, np.ones((1, len(runs))), delta).tolist()
    return KaplanLaw(math.exp(row[0] + mid_n), row[1] * row[3], math.exp(row[2] + mid_d), row[3])


def fit_power(x: np.ndarray, loss: np.ndarray, with_floor: bool, delta: float = HUBER_DELTA) -> PowerLaw:
    """A power law of one variable, with E or without: the second is a straight line in logarithms.

    Raises ValueError for too few different runs, and for losses that do not change with x.
    """
    runs = Runs(x, np.ones_like(x, dtype=float), loss)
    need_runs(runs, 3 if with_floor else 2, "a power law")
    log_x = np.log(runs.n_parameters)
    middle, low = log_x.mean(), math.log(runs.loss.min())
    if not with_floor:
        slope, level = np.polyfit(log_x - middle, np.log(runs.loss), 1)
        return PowerLaw(0.0, crossing(level, -slope, middle), float(-slope))
    starts = grid_of(low + np.array([-2.0, -0.5, -0.1]), low + np.log([0.03, 0.3, 0.9]), [0.1, 0.3, 0.7, 1.5])
    (row,) = best_of(power_model(log_x - middle), runs, starts, np.ones((1, len(runs))), delta).tolist()
    return PowerLaw(math.exp(row[0]), crossing(row[1], row[2], middle), row[2])


def crossing(level: float, alpha: float, middle: float) -> float:
    """x_c of (x_c / x)^alpha whose logarithm is `level` at log x = middle."""
    if abs(level) > 700 * abs(alpha):
        raise ValueError(f"the losses hardly change with x (alpha={alpha:.2g}): no power law fits; use a wider range")
    return math.exp(level / alpha + middle)


# Approaches 1 and 2: where the least loss lies, without a formula for the loss


@dataclass(frozen=True)
class Frontier:
    """N_best = n_scale C^exponent through the best sizes of several budgets."""

    exponent: float
    n_scale: float
    budgets: np.ndarray = field(repr=False)  # FLOPs
    best: np.ndarray = field(repr=False)  # the best N of each budget
    least: np.ndarray = field(repr=False)  # its loss
    left_out: tuple[float, ...] = ()  # budgets without a lowest point in between

    def size(self, flops: Any) -> Any:
        return self.n_scale * np.power(flops, self.exponent)


def frontier_through(budgets: np.ndarray, best: np.ndarray, least: np.ndarray) -> Frontier:
    slope, level = np.polyfit(np.log(budgets), np.log(best), 1)
    return Frontier(float(slope), math.exp(level), np.asarray(budgets), np.asarray(best), np.asarray(least))


def parabola(n_parameters: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """The lowest point (N, loss) of the parabola of loss over log N through the runs of one budget.

    Raises ValueError for fewer than three sizes, and where no lowest point lies between them: the parabola opens
    downwards, or is so flat that it would turn at a size that nobody trained, perhaps a weight of 1e-20.
    """
    n_sizes = len(np.unique(n_parameters))
    if n_sizes < 3:
        raise ValueError(f"a parabola needs at least 3 sizes at one budget, got {n_sizes}")
    log_n = np.log(n_parameters)
    middle = log_n.mean()
    curvature, slope, level = np.polyfit(log_n - middle, loss, 2)
    turn = -slope / (2 * curvature) if curvature > 0 else math.inf
    if not (log_n.min() <= turn + middle <= log_n.max()):
        raise ValueError("the losses of one budget have no lowest point in between; train smaller and larger sizes")
    return math.exp(turn + middle), float(level - slope**2 / (4 * curvature))


def isoflop_frontier(runs: Runs, near: float = 2.5) -> Frontier:
    """Approach 2 of Hoffmann et al. 2022: a parabola at each budget, and a line through their lowest points in logs.

    A parabola is the second-order view of a lopsided curve: only runs whose size is within a factor `near` of the best
    one that was tried take part, four sizes at least. Budgets are those of `runs.flops`, neighbours within 5 per cent
    together; one whose parabola has no lowest point in between is left out, and named in the answer. Raises ValueError
    if fewer than two remain.
    """
    order = np.argsort(runs.flops)
    keys = np.zeros(len(runs), dtype=int)  # a new budget begins where the next run is more than 5 per cent larger
    keys[order[1:]] = np.cumsum(np.diff(np.log(runs.flops[order])) > 0.05)
    budgets, best, least, left_out = [], [], [], []
    for key in np.unique(keys):
        here = runs.take(keys == key)
        sizes = np.unique(here.n_parameters)
        means = np.array([here.loss[here.n_parameters == size].mean() for size in sizes])
        away = np.abs(np.log(sizes / sizes[means.argmin()]))
        kept = sizes[away <= max(math.log(near), np.sort(away)[min(3, len(away) - 1)])]
        here = here.take(np.isin(here.n_parameters, kept))
        flops = float(np.exp(np.log(here.flops).mean()))
        try:
            n_best, lowest = parabola(here.n_parameters, here.loss)
        except ValueError:
            left_out.append(flops)
            continue
        budgets.append(flops)
        best.append(n_best)
        least.append(lowest)
    if len(budgets) < 2:
        raise ValueError(f"a line through best sizes needs at least 2 budgets with a lowest point, got {len(budgets)}")
    found = frontier_through(np.array(budgets), np.array(best), np.array(least))
    return replace(found, left_out=tuple(left_out))


def envelope_frontier(runs: Runs, n_points: int = 400) -> Frontier:
    """Approach 1 of Hoffmann et al. 2022: each size has a curve of loss over FLOPs; the lowest at each budget wins.

    Between the runs of a size, all trained to their end, log loss is interpolated over log FLOPs. With few sizes the
    winner is a staircase; the line goes through its steps, the budgets at which two sizes are equally good, where the
    best size lies between them: at their geometric mean. Raises ValueError for fewer than two such budgets.
    """
    sizes = np.unique(runs.n_parameters)
    budgets = np.geomspace(runs.flops.min(), runs.flops.max(), n_points)
    curves = np.full((len(sizes), n_points), np.inf)
    for row, size in enumerate(sizes):
        here = runs.take(runs.n_parameters == size)
        x = np.unique(here.flops)
        y = [np.log(here.loss[here.flops == each]).mean() for each in x]
        inside = (budgets >= x[0] * (1 - 1e-9)) & (budgets <= x[-1] * (1 + 1e-9))
        curves[row, inside] = np.interp(np.log(budgets[inside]), np.log(x), y)
    winner = curves.argmin(axis=0)
    steps = np.flatnonzero(winner[1:] > winner[:-1])
    both = np.isfinite(curves[winner[steps + 1], steps]) & np.isfinite(curves[winner[steps], steps + 1])
    steps = steps[both]  # not where a size wins because its rival was not trained there
    if len(steps) < 2:
        raise ValueError("the best size changes at fewer than two budgets; train more sizes, or over more budgets")
    best = np.sqrt(sizes[winner[steps]] * sizes[winner[steps + 1]])
    return frontier_through(budgets[steps], best, np.exp(curves.min(axis=0)[steps]))


# Intervals


def resampled_counts(runs: Runs, n_boot: int, seed: int) -> np.ndarray:
    """How often each run is drawn in each bootstrap sample (n_boot, runs): whole groups, with replacement (Efron)."""
    rng, n_groups = np.random.default_rng(seed), int(runs.group.max()) + 1
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_boot)  # (n_boot, groups)
    return drawn[:, runs.group].astype(float)


def bootstrap_laws(runs: Runs, n_boot: int, seed: int, delta: float = HUBER_DELTA) -> list[ChinchillaLaw]:
    """The law of approach 3 on n_boot samples of the groups of runs, those with too few different runs left out.

    Raises ValueError if less than a fifth of the samples are left.
    """
    counts = resampled_counts(runs, n_boot, seed)
    different = np.array([len(np.unique(runs.group[row > 0])) for row in counts])
    if (different > 5).mean() < 0.2:
        raise ValueError(
            f"{(different > 5).sum()} of {n_boot} samples have more than 5 different runs; train more sizes or budgets"
        )
    return fit_many(runs, counts[different > 5], delta)


def bootstrap_frontiers(method: Callable[[Runs], Frontier], runs: Runs, n_boot: int, seed: int) -> list[Frontier]:
    """Approach 1 or 2 on samples of the groups; samples in which a budget has too few sizes are drawn again."""
    rng, groups, found = np.random.default_rng(seed), np.unique(runs.group), []
    members = [np.flatnonzero(runs.group == group) for group in groups]
    for _ in range(20 * n_boot):
        if len(found) == n_boot:
            break
        drawn = np.concatenate([members[index] for index in rng.integers(len(groups), size=len(groups))])
        try:
            found.append(method(runs.take(drawn)))
        except ValueError:
            continue
    return found


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap values. Raises ValueError if there are none."""
    if not len(values):
        raise ValueError("an interval needs at least one value of a bootstrap; draw more samples, or train more runs")
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def misfit(runs: Runs, law: ChinchillaLaw) -> tuple[float, float]:
    """How far seeds of one group differ, and how far the groups' means miss the law: deviations of log loss.

    If the law is true, the second is the first over the root of the number of seeds. Raises ValueError if no group has
    two runs.
    """
    away = np.log(runs.loss) - np.log(law.loss(runs.n_parameters, runs.n_tokens))
    groups = [away[runs.group == group] for group in np.unique(runs.group)]
    several = [values for values in groups if len(values) > 1]
    if not several:
        raise ValueError("the spread of seeds needs at least two runs of one size and budget; raise --n-seeds")
    within = math.sqrt(
        sum(((values - values.mean()) ** 2).sum() for values in several) / sum(len(v) - 1 for v in several)
    )
    return within, math.sqrt(np.mean([values.mean() ** 2 for values in groups]))


def misfit_of_forms(runs: Runs, floor: float) -> dict[str, float]:
    """Where the floor is known: by how much log(loss - floor) misses a sum of two powers, and one product of them.

    Root mean squares over the runs, least squares both. A law with a sum has no place for a product, and bends E.
    """
    gap = Runs(runs.n_parameters, runs.n_tokens, runs.loss - floor)
    need_runs(gap, 4, "A / N^alpha + B / D^beta")
    log_n, log_d = (values - values.mean() for values in (np.log(gap.n_parameters), np.log(gap.n_tokens)))
    log_gap = np.log(gap.loss)
    columns = np.stack([np.ones(len(gap)), log_n, log_d], axis=1)
    product = columns @ np.linalg.lstsq(columns, log_gap, rcond=None)[0]
    middle = log_gap.mean()
    starts = grid_of(middle + np.array([-2.0, -0.5]), [0.2, 0.8], middle + np.array([-2.0, -0.5]), [0.2, 0.8])
    model = sum_model(log_n, log_d)
    theta = best_of(model, gap, starts, np.ones((1, len(gap))), delta=1e3)
    away = {"sum": model(theta)[0][0] - log_gap, "product": product - log_gap}
    return {name: float(np.sqrt((values**2).mean())) for name, values in away.items()}


# Worlds whose law is known


def planted_runs(
    law: ChinchillaLaw, sizes: Sequence[float], budgets: Sequence[float], noise: float, n_seeds: int, seed: int
) -> Runs:
    """Runs of a known law: every size at every budget, n_seeds times, log loss disturbed by `noise` (one deviation)."""
    rng = np.random.default_rng(seed)
    n, flops = (axis.ravel() for axis in np.meshgrid(sizes, np.repeat(budgets, n_seeds), indexing="ij"))
    tokens = flops / (FLOPS_PER_WEIGHT * n)
    return Runs(n, tokens, law.loss(n, tokens) * np.exp(rng.normal(0.0, noise, len(n))))


def coverage(
    law: ChinchillaLaw,
    worlds: Sequence[Runs],
    n_boot: int,
    level: float = 0.95,
    delta: float = HUBER_DELTA,
) -> dict[str, float]:
    """Share of worlds, all made by `law`, in which the interval covers the true E, alpha, beta and exponent a."""
    hits = {"e": 0, "alpha": 0, "beta": 0, "exponent": 0}
    for index, runs in enumerate(worlds):
        laws = bootstrap_laws(runs, n_boot, index, delta)
        for name in hits:
            low, high = interval([getattr(found, name) for found in laws], level)
            hits[name] += low <= getattr(law, name) <= high
    return {name: count / len(worlds) for name, count in hits.items()}
