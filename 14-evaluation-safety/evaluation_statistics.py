"""Topic 14 - Evaluation statistics: what a score on some questions says about all questions, and which model is better.

    wilson(62, 80)                                        # interval of an accuracy
    bootstrap_interval(mean_of(scores), groups)           # of anything, with whole groups drawn
    sign_flip_test(scores_a, scores_b), mcnemar(only_a, only_b), holm(p_values)
    questions_needed(difference=0.05, disagreement=0.2)   # before the exam is written
    bradley_terry(wins).ratings

Wilson 1927; Clopper and Pearson 1934; Brown, Cai and DasGupta 2001 (coverage); Efron 1987 (BCa); Koehn 2004 (paired
bootstrap, ACL W04-3250); McNemar 1947; Connor 1987 (sample size for it); Holm 1979; Benjamini and Hochberg 1995;
Bradley and Terry 1952; Hunter 2004 (MM algorithm); Miller 2024 (clusters and pairs in evaluations, arXiv 2411.00640).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from statistics import NormalDist
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from scaling_laws import interval, resampled_counts
from workbench import check_name

NORMAL = NormalDist()
Statistic = Callable[[np.ndarray], np.ndarray]  # how often each item is drawn (draws, items) -> value (draws)


class Interval(NamedTuple):
    low: float
    high: float

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


def check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1, such as 0.95")
    return level


def check_count(n_right: int, n: int) -> None:
    if not (n >= 1 and 0 <= n_right <= n):
        raise ValueError(f"{n_right} right of {n}: the first must be between 0 and the second, which is at least 1")


def two_sided(level: float) -> float:
    """How many standard errors an interval of this level reaches to each side: 1.96 for 0.95."""
    return NORMAL.inv_cdf((1 + check_level(level)) / 2)


# Intervals of a share


def wald(n_right: int, n: int, level: float = 0.95) -> Interval:
    """Estimate plus and minus z standard errors: empty at 0 and n right, and too narrow near them."""
    check_count(n_right, n)
    share = n_right / n
    reach = two_sided(level) * math.sqrt(share * (1 - share) / n)
    return Interval(max(0.0, share - reach), min(1.0, share + reach))


def wilson(n_right: int, n: int, level: float = 0.95) -> Interval:
    """All shares p whose own standard error sqrt(p (1 - p) / n) leaves the estimate within z of them (Wilson 1927)."""
    check_count(n_right, n)
    share, z = n_right / n, two_sided(level)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = max(0.0, centre - reach), min(1.0, centre + reach)
    return Interval(low if n_right else 0.0, high if n_right < n else 1.0)  # exactly: rounding would leave out the end


@cache
def log_choices(n: int) -> np.ndarray:
    """log of the number of ways to take k of n, for k = 0..n."""
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    return logs[n] - logs - logs[::-1]


def binomial_chances(n: int, share: float) -> np.ndarray:
    """P(k of n) for k = 0..n."""
    if not isinstance(n, Integral) or n < 0:
        raise ValueError(f"n={n} must be a whole number of at least 0")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    if share in (0, 1):
        return (np.arange(n + 1) == share * n).astype(float)
    k = np.arange(n + 1)
    return np.exp(log_choices(n) + k * math.log(share) + (n - k) * math.log1p(-share))


def clopper_pearson(n_right: int, n: int, level: float = 0.95) -> Interval:
    """All shares that a two-sided exact test does not reject: covers at least as often as it says, mostly more."""
    check_count(n_right, n)
    tail = (1 - check_level(level)) / 2

    def lowest(k: int) -> float:
        return 0.0 if k == 0 else bisect(lambda p: binomial_chances(n, p)[k:].sum() - tail)

    return Interval(lowest(n_right), 1 - lowest(n - n_right))


def bisect(rising: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function crosses 0."""
    while high - low > 1e-15 * max(high, 1e-3):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


SHARE_INTERVALS = {"wald": wald, "wilson": wilson, "clopper-pearson": clopper_pearson}


def exact_coverage(method: str, n: int, share: float, level: float = 0.95) -> float:
    """How often an interval holds the true share: the sum of P(k) over all k whose interval does. No simulation."""
    low, high = share_intervals(check_name("interval", method, SHARE_INTERVALS), n, level)
    return float(binomial_chances(n, share)[(low <= share) & (share <= high)].sum())


@cache
def share_intervals(method: str, n: int, level: float) -> np.ndarray:
    """(2, n + 1): low and high ends for every number of right answers."""
    return np.array([SHARE_INTERVALS[method](k, n, level) for k in range(n + 1)]).T


# Bootstrap: of any statistic, over items or over whole groups


def finite(values: Sequence[float]) -> np.ndarray:
    """Scores as an array. Raises ValueError for one that is no number: it would pass for a score in some tests."""
    column = np.asarray(values, dtype=float)
    if column.ndim != 1 or not np.isfinite(column).all():
        wrong = column[~np.isfinite(column)][:1].tolist() or [f"numbers of shape {column.shape}"]
        raise ValueError(f"scores must be finite numbers in one column, got {wrong[0]}")
    return column


def mean_of(values: Sequence[float]) -> Statistic:
    """The mean of the drawn items."""
    column = finite(values)
    return lambda drawn: drawn @ column / drawn.sum(axis=1)


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """Sum over sum, such as nats over bytes."""
    above, below = finite(numerators), finite(denominators)
    if not below.sum() > 0:
        raise ValueError(f"the denominators add up to {below.sum():g}; a ratio needs a sum above 0")
    return lambda drawn: (drawn @ above) / (drawn @ below)


@dataclass(frozen=True)
class Bootstrap:
    """A statistic on the items as they are, on samples of whole groups, and with each group left out once."""

    estimate: float
    draws: np.ndarray
    left_out: np.ndarray

    @property
    def error(self) -> float:
        """The standard error."""
        return float(self.draws.std(ddof=1))

    def percentile(self, level: float = 0.95) -> Interval:
        """The middle of the draws; right where the estimate is unbiased and its error does not depend on the truth."""
        return Interval(*interval(self.draws, check_level(level)))

    def bca(self, level: float = 0.95) -> Interval:
        """Bias-corrected and accelerated (Efron 1987): other percentiles, from where the estimate lies among the draws
        and from how skewed its parts are. Raises ValueError if the draws or the groups are all alike.
        """
        below = (np.mean(self.draws < self.estimate) + np.mean(self.draws <= self.estimate)) / 2
        moved = self.left_out.mean() - self.left_out
        if not 0 < below < 1 or not (moved**2).sum():
            raise ValueError("the draws do not vary, so no interval can be made of them; ask more questions")
        bias = NORMAL.inv_cdf(below)
        acceleration = (moved**3).sum() / (6 * (moved**2).sum() ** 1.5)
        places = []
        for side in (-1, 1):
            reach = bias + side * two_sided(level)
            places.append(NORMAL.cdf(bias + reach / (1 - acceleration * reach)))
        return Interval(*(float(value) for value in np.quantile(self.draws, places)))


def bootstrap(
    statistic: Statistic, groups: Sequence[int] | int, n_boot: int = 2000, seed: int = 0, chunk: int = 500
) -> Bootstrap:
    """Draw groups of items with replacement; groups: a number for each item (0, 1, ...), or how many items there are.

    Questions about one text share its luck: they are one group. Drawn one by one they pretend to be more than they are,
    and the interval is too narrow. Raises ValueError for fewer than two groups, and for items that the statistic does
    not have.
    """
    if n_boot < 2:
        raise ValueError(f"n_boot={n_boot} draws must be at least 2")
    given = np.arange(groups) if isinstance(groups, Integral) else np.asarray(groups)
    numbers = np.unique(given, return_inverse=True)[1]
    if not len(numbers) or numbers.max() < 1:
        raise ValueError(f"a bootstrap needs at least 2 groups, got {len(set(numbers.tolist()))}")
    whole, n_groups = np.ones((1, len(numbers))), numbers.max() + 1
    try:
        estimate = float(statistic(whole)[0])
    except ValueError as error:
        raise ValueError(f"groups name {len(numbers)} items, the statistic has another number: {error}") from None
    counts = resampled_counts(SimpleNamespace(group=numbers), n_boot, seed)  # (draws, items)
    parts = [statistic(counts[start : start + chunk]) for start in range(0, n_boot, chunk)]
    left_out = [
        statistic((numbers != np.arange(start, min(start + chunk, n_groups))[:, None]).astype(float))
        for start in range(0, n_groups, chunk)
    ]
    return Bootstrap(estimate, np.concatenate(parts), np.concatenate(left_out))


def bootstrap_interval(
    statistic: Statistic,
    groups: Sequence[int] | int,
    level: float = 0.95,
    method: str = "bca",
    n_boot: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile or BCa interval of a statistic; see `bootstrap`."""
    check_name("bootstrap interval", method, ("percentile", "bca"))
    made = bootstrap(statistic, groups, n_boot, seed)
    return made.bca(level) if method == "bca" else made.percentile(level)


def clustered_error(values: Sequence[float], groups: Sequence[int]) -> float:
    """Standard error of a mean over items in groups, without drawing: from the groups' sums (Miller 2024, section 2.2).

    sqrt(sum over groups of (sum of the deviations in it)^2) / n; with groups of one item the usual error.
    """
    column = finite(values)
    if not len(column) or len(column) != len(groups):
        raise ValueError(f"{len(column)} scores but {len(groups)} groups; give each score its group, at least one")
    sums = np.bincount(np.unique(np.asarray(groups), return_inverse=True)[1], column - column.mean())
    return float(math.sqrt((sums**2).sum()) / len(column))


# Two models on the same questions


class Comparison(NamedTuple):
    difference: float  # mean of first minus second
    p_value: float  # two-sided: how often chance alone makes a difference as large


def differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores but {len(second)} of the other; a paired test needs the same questions")
    if not len(first):
        raise ValueError("0 scores: nothing to compare")
    return finite(first) - finite(second)


def sign_flip_test(
    first: Sequence[float], second: Sequence[float], n_flips: int = 10_000, seed: int = 0, most_exact: int = 16
) -> Comparison:
    """If the models were alike, each difference could as well have the other sign: all 2^n signs, or a sample of them.

    Exact for up to `most_exact` questions on which the models differ (equal ones change no sum). A sample counts what
    was seen as one of its draws, so p is never 0 and rejects too seldom rather than too often.
    """
    if n_flips < 1:
        raise ValueError(f"n_flips={n_flips} must be at least 1")
    moved = differences(first, second)
    apart, mean = moved[moved != 0], float(moved.mean())
    seen, slack = abs(apart.sum()), 1e-9 * np.abs(apart).sum()
    if len(apart) <= most_exact:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(apart))))  # (2^n, n)
        return Comparison(mean, float((np.abs(signs @ apart) >= seen - slack).mean()))
    rng, n_extreme = np.random.default_rng(seed), 0
    for start in range(0, n_flips, 1000):
        signs = rng.integers(0, 2, size=(min(1000, n_flips - start), len(apart))) * 2.0 - 1
        n_extreme += int((np.abs(signs @ apart) >= seen - slack).sum())
    return Comparison(mean, (n_extreme + 1) / (n_flips + 1))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[int] | int | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[Comparison, Interval]:
    """Difference of two models on samples of the same questions (Koehn 2004), with its 95 % percentile interval.

    p is twice the share of samples in which the sign turns. The questions are drawn for both models at once: what makes
    a sample easy helps both, and cancels.
    """
    moved = differences(first, second)
    made = bootstrap(mean_of(moved), len(moved) if groups is None else groups, n_boot, seed)
    turned = min(np.mean(made.draws <= 0), np.mean(made.draws >= 0))
    return Comparison(made.estimate, float(min(1.0, 2 * turned))), made.percentile()


def mcnemar(n_only_first: int, n_only_second: int, exact: bool = True) -> float:
    """Two-sided p for two models right or wrong on the same questions (McNemar 1947).

    Only questions that one of them gets right say anything; of these, if the models were alike, each is a fair coin.
    exact: the binomial; else chi-squared with continuity correction, good from about 25 such questions on.
    """
    n = n_only_first + n_only_second
    if min(n_only_first, n_only_second) < 0:
        raise ValueError(f"counts must be >= 0, got {n_only_first} and {n_only_second}")
    if n == 0:
        return 1.0
    if exact:
        return float(min(1.0, 2 * binomial_chances(n, 0.5)[: min(n_only_first, n_only_second) + 1].sum()))
    chi2 = max(0, abs(n_only_first - n_only_second) - 1) ** 2 / n
    return math.erfc(math.sqrt(chi2 / 2))


# Power: how many questions it takes


def check_effect(difference: float, disagreement: float) -> None:
    if not (0 < abs(difference) <= disagreement <= 1):
        raise ValueError(
            f"difference={difference} and disagreement={disagreement}: models can differ by at most the share of "
            "questions on which only one is right, and that share is at most 1"
        )


def paired_power(n: int, difference: float, disagreement: float, level: float = 0.95) -> float:
    """Chance that n questions show a true difference of accuracies, two-sided, by the normal approximation.

    disagreement: share of questions that exactly one of the models gets right. A question's difference is -1, 0 or 1,
    with variance `disagreement` if the models are alike and disagreement - difference^2 if they are not.
    """
    check_effect(difference, disagreement)
    if not n >= 0:
        raise ValueError(f"n={n} questions must be at least 0")
    shift, null = abs(difference) * math.sqrt(n), two_sided(level) * math.sqrt(disagreement)
    spread = math.sqrt(disagreement - difference**2)
    if not spread:
        return float(shift > null)
    return NORMAL.cdf((shift - null) / spread) + NORMAL.cdf((-shift - null) / spread)


def questions_needed(
    difference: float, disagreement: float, power: float = 0.8, level: float = 0.95, paired: bool = True
) -> int:
    """How many questions show a true difference of accuracies with this power (Connor 1987, equation 2).

    paired=False: each model on questions of its own, that many for each; `disagreement` is then 2 p (1 - p), what two
    independent models of accuracy p differ by, and each side has half of the variance.
    """
    check_effect(difference, disagreement)
    check_level(power)
    reach, more = two_sided(level), NORMAL.inv_cdf(power)
    if not paired:
        return math.ceil((reach + more) ** 2 * disagreement / difference**2)
    spread = reach * math.sqrt(disagreement) + more * math.sqrt(disagreement - difference**2)
    return math.ceil((spread / difference) ** 2)


def exact_mcnemar_power(n: int, difference: float, disagreement: float, level: float = 0.95) -> float:
    """Chance that the exact McNemar test rejects, summed over all outcomes of n questions."""
    check_effect(difference, disagreement)
    chance_first, total = (disagreement + difference) / 2 / disagreement, 0.0
    for n_apart, chance in enumerate(binomial_chances(n, disagreement)):
        if chance > 1e-15:
            rejects = mcnemar_rejects(n_apart, level)
            total += chance * binomial_chances(n_apart, chance_first)[rejects].sum()
    return float(total)


def mcnemar_rejects(n_apart: int, level: float) -> np.ndarray:
    """For each number of questions that only the first gets right, of n_apart: whether the exact test rejects."""
    tail = np.minimum(1.0, 2 * np.cumsum(binomial_chances(n_apart, 0.5)))
    smaller = np.minimum(np.arange(n_apart + 1), n_apart - np.arange(n_apart + 1))
    return tail[smaller] <= 1 - level


# Many comparisons


def check_p_values(p_values: Sequence[float]) -> np.ndarray:
    found = np.asarray(p_values, dtype=float)
    if found.ndim != 1 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"p values must be numbers between 0 and 1, at least one, got {list(p_values)[:5]}")
    return found


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p values (Holm 1979): below alpha with chance <= alpha for any true null, however they depend."""
    found = check_p_values(p_values)
    order, n = np.argsort(found, kind="stable"), len(found)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(found[order] * (n - np.arange(n))))
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p values (Benjamini and Hochberg 1995): of those below alpha a share <= alpha is wrong, on average."""
    found = check_p_values(p_values)
    order, n = np.argsort(found, kind="stable"), len(found)
    steps = found[order] * n / (np.arange(n) + 1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(steps[::-1])[::-1])
    return adjusted


# Ratings from games


ELO = 400 / math.log(10)  # points of a difference in log odds


def expected_score(rating: float, other: float) -> float:
    """Chance of winning in Elo's model: 10 to 1 for 400 points."""
    return 1 / (1 + 10 ** ((other - rating) / 400))


def elo(games: Sequence[tuple[int, int, float]], n_players: int, k: float = 16.0, start: float = 1000.0) -> np.ndarray:
    """Ratings after games (first, second, score of the first: 1, 0.5 or 0), one after the other (Elo 1978).

    A step of stochastic gradient on the Bradley-Terry likelihood for each game: it depends on the order, forgets, and
    never settles. For players that do not change, `bradley_terry` uses all games alike.
    """
    if not 0 < k < math.inf:
        raise ValueError(f"k={k} must be finite and > 0, such as 16")
    ratings = np.full(n_players, start)
    for first, second, score in games:
        check_game(first, second, score, n_players)
        gain = k * (score - expected_score(ratings[first], ratings[second]))
        ratings[first] += gain
        ratings[second] -= gain
    return ratings


def check_game(first: int, second: int, score: float, n_players: int) -> None:
    """Raises ValueError for a player that there is not, one who plays against itself, and a score outside 0..1."""
    known = all(isinstance(player, Integral) and 0 <= player < n_players for player in (first, second))
    if not known or first == second or isinstance(first, bool) or isinstance(second, bool):
        raise ValueError(f"a game is between two of the players 0 to {n_players - 1}, got {first} against {second}")
    if not 0 <= score <= 1:
        raise ValueError(f"the score of a game must be between 0 and 1, got {score}")


def win_table(games: Sequence[tuple[int, int, float]], n_players: int) -> np.ndarray:
    """wins[i, j]: what i scored against j; a draw is half a win for each."""
    wins = np.zeros((n_players, n_players))
    for first, second, score in games:
        check_game(first, second, score, n_players)
        wins[first, second] += score
        wins[second, first] += 1 - score
    return wins


@dataclass(frozen=True)
class Ratings:
    """Strengths in log odds with mean 0, and their covariance."""

    strengths: np.ndarray
    covariance: np.ndarray

    @property
    def elo(self) -> np.ndarray:
        """On Elo's scale, with mean 1000."""
        return 1000 + ELO * self.strengths

    def difference(self, one: int, other: int, level: float = 0.95) -> Interval:
        """Interval of strength one minus other, in log odds (Wald)."""
        error = math.sqrt(self.covariance[one, one] + self.covariance[other, other] - 2 * self.covariance[one, other])
        gap = float(self.strengths[one] - self.strengths[other])
        return Interval(gap - two_sided(level) * error, gap + two_sided(level) * error)


def check_connected(wins: np.ndarray) -> np.ndarray:
    """Raises ValueError unless every player is linked to every other by a chain of wins (Ford 1957).

    Otherwise some group has lost no point to the rest, and the likelihood grows as it moves away for ever.
    """
    wins = np.asarray(wins, dtype=float)
    square = wins.ndim == 2 and wins.shape[0] == wins.shape[1] and len(wins) >= 2
    if not square or not ((wins >= 0) & np.isfinite(wins)).all() or wins.diagonal().any():
        raise ValueError(f"wins must be a square table of finite numbers >= 0, its diagonal 0, got shape {wins.shape}")
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for middle in range(len(wins)):
        reach |= reach[:, middle : middle + 1] & reach[middle]
    if not reach.all():
        beaten = int(np.flatnonzero(~reach.all(axis=1))[0])
        never = np.flatnonzero(~reach[beaten])[:3].tolist()
        raise ValueError(
            f"player {beaten} has no chain of wins to {never}: their distance would be infinite; play more games"
        )
    return wins


def bradley_terry(wins: np.ndarray, tolerance: float = 1e-12) -> Ratings:
    """Strengths s that make the games likeliest, P(i beats j) = sigmoid(s_i - s_j), by Newton's method.

    The log likelihood is concave and does not change if all strengths move together, so its Hessian has one direction
    of zeros, which a rank-one term fills. The covariance is the inverse of the information, for a mean of 0.
    """
    wins = check_connected(wins)
    games, strengths = wins + wins.T, np.zeros(len(wins))
    fill = np.full_like(wins, 1 / len(wins))
    for _ in range(200):
        chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))  # P(row beats column)
        slope = wins.sum(axis=1) - (games * chance).sum(axis=1)
        weight = games * chance * (1 - chance)
        information = np.diag(weight.sum(axis=1)) - weight
        step = np.linalg.solve(information + fill, slope)
        size = np.abs(step).max()
        strengths = strengths + step * min(1.0, 2.0 / max(size, 1e-300))
        strengths -= strengths.mean()
        if size <= tolerance * max(1.0, np.abs(strengths).max()):
            break
    return Ratings(strengths, np.linalg.inv(information + fill) - fill)


def minorise_maximise(wins: np.ndarray, n_steps: int = 10_000, tolerance: float = 1e-13) -> np.ndarray:
    """The same strengths by Hunter's MM algorithm: pi_i <- wins of i / sum over j of games / (pi_i + pi_j).

    Every step raises the likelihood; where few games decide, it takes thousands of steps to Newton's ten.
    """
    wins = check_connected(wins)
    games, skill = wins + wins.T, np.ones(len(wins))
    for _ in range(n_steps):
        renewed = wins.sum(axis=1) / (games / (skill[:, None] + skill[None, :])).sum(axis=1)
        renewed /= np.exp(np.log(renewed).mean())
        done = np.abs(np.log(renewed / skill)).max() <= tolerance
        skill = renewed
        if done:
            break
    return np.log(skill)
