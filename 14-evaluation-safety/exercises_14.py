"""Exercises of topic 14: write each function in a file of your own, then

python 14-evaluation-safety/exercises_14.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
import random
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from evaluation_statistics import mcnemar, wilson
from exercises_08 import numbers as normal
from judging import Duel, PlantedJudge, judge_duels, win_rate
from memorisation import exposure
from workbench import Exercise, first_difference, grade


def apart(got: object, want: float, tolerance: float = 1e-9) -> bool:
    """Whether an answer is no number, or another one than is wanted."""
    if isinstance(got, Tensor):
        got = got.item() if got.numel() == 1 else None
    return not isinstance(got, int | float) or not math.isclose(got, want, rel_tol=tolerance, abs_tol=tolerance)


# Perplexity of a corpus


def corpus_perplexity(batches: Sequence[tuple[float, int, int]]) -> float:
    nats = sum(mean * n_tokens for mean, n_tokens, _ in batches)
    return math.exp(nats / sum(n_tokens for _, n_tokens, _ in batches))


def check_corpus_perplexity(answer: Callable) -> str | None:
    vocab = 2048
    cases = {
        "an untrained model": [(math.log(vocab), 900, 8), (math.log(vocab), 350, 8), (math.log(vocab), 40, 1)],
        "one batch": [(2.5, 120, 4)],
        "a short batch with a hard text": [(1.0, 990, 10), (5.0, 10, 10)],
        "batches of different rows": [(3.0, 64, 1), (2.0, 64, 16), (1.0, 64, 4)],
    }
    rng = random.Random(14)
    for number in range(4):
        rows = [(rng.uniform(0.5, 6), rng.randint(5, 500), rng.randint(1, 32)) for _ in range(rng.randint(2, 6))]
        cases[f"random batches, {number + 1}"] = rows
    for name, batches in cases.items():
        want = math.exp(math.fsum(m * n for m, n, _ in batches) / math.fsum(n for _, n, _ in batches))
        got = answer(list(batches))
        if apart(got, want):
            return f"{name}: {got!r}, expected {want:.6g}"
    return None


def mean_of_perplexities(batches):
    return sum(math.exp(mean) for mean, _, _ in batches) / len(batches)


# An interval that does not end at 100 %


def share_interval(n_right: int, n: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, more = n_right / n, z * z / n
    centre = (share + more / 2) / (1 + more)
    reach = z / (1 + more) * math.sqrt(share * (1 - share) / n + more / (4 * n))
    return centre - reach, centre + reach


def check_share_interval(answer: Callable) -> str | None:
    cases = [(20, 20, 0.95), (0, 4, 0.95), (0, 119, 0.95), (7, 10, 0.95), (7, 10, 0.9), (63, 200, 0.99), (1, 1, 0.95)]
    for n_right, n, level in cases:
        want, got = wilson(n_right, n, level), answer(n_right, n, level)
        if not isinstance(got, Sequence) or len(got) != 2:
            return f"expected (low, high), got {got!r}"
        for end, found, wanted in zip(("lower", "upper"), got, want, strict=True):
            if apart(found, wanted, 1e-7):
                case = f"{n_right} right of {n} at level {level}"
                return f"{case}: the {end} end is {found!r}, expected {wanted:.6f}"
    return None


def interval_with(centre: Callable | None = None, spread: Callable | None = None, tail: Callable | None = None):
    """A wrong solution: another centre, another width or another quantile."""
    centre = centre or (lambda share, more: (share + more / 2) / (1 + more))
    spread = spread or (lambda share, n, more: math.sqrt(share * (1 - share) / n + more / (4 * n)) / (1 + more))
    tail = tail or (lambda level: (1 + level) / 2)

    def wrong(n_right, n, level):
        z = NormalDist().inv_cdf(tail(level))
        share, more = n_right / n, z * z / n
        reach = z * spread(share, n, more)
        return centre(share, more) - reach, centre(share, more) + reach

    return wrong


# Two models on the same questions


def paired_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    only_first = sum(one and not two for one, two in zip(first, second, strict=True))
    only_second = sum(two and not one for one, two in zip(first, second, strict=True))
    n = only_first + only_second
    below = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * below)


def answers_of(only_first: int, only_second: int, both: int, neither: int, seed: int = 0) -> tuple[list, list]:
    pairs = [(True, False)] * only_first + [(False, True)] * only_second
    pairs += [(True, True)] * both + [(False, False)] * neither
    random.Random(seed).shuffle(pairs)
    return [one for one, _ in pairs], [two for _, two in pairs]


def check_paired_p(answer: Callable) -> str | None:
    counts = [
        (9, 3, 150, 38),
        (3, 9, 2, 0),
        (0, 6, 50, 50),
        (5, 5, 10, 0),
        (1, 0, 0, 0),
        (0, 0, 7, 3),
        (14, 30, 0, 400),
    ]
    for place, (only_first, only_second, both, neither) in enumerate(counts):
        first, second = answers_of(only_first, only_second, both, neither, place)
        want, got = mcnemar(only_first, only_second), answer(list(first), list(second))
        if apart(got, want):
            case = f"{only_first} questions that only the first gets right, {only_second} that only the second does"
            return f"{case}, {both + neither} alike: {got!r}, expected {want:.6f}"
    return None


def p_with(apart_only: bool = True, sides: int = 2, inclusive: bool = True, bounded: bool = True) -> Callable:
    """A wrong solution: other questions are counted, or another tail."""

    def wrong(first, second):
        wins = sum(one and not two for one, two in zip(first, second, strict=True))
        losses = sum(two and not one for one, two in zip(first, second, strict=True))
        if not apart_only:
            wins += sum(one and two for one, two in zip(first, second, strict=True))
        n, fewer = wins + losses, min(wins, losses)
        below = sum(math.comb(n, k) for k in range(fewer + inclusive)) / 2**n
        return min(1.0, sides * below) if bounded else sides * below

    return wrong


def unpaired_p(first, second):
    """The test of two shares on questions of their own."""
    n, one, two = len(first), sum(first), sum(second)
    pooled = (one + two) / (2 * n)
    spread = math.sqrt(2 * pooled * (1 - pooled) / n)
    return 2 * NormalDist().cdf(-abs(one - two) / n / spread) if spread else 1.0


# A judge who reads in some order

Pairs = Sequence[tuple[str, str, str]]  # question, answer of A, answer of B


def fair_win_rate(judge: Callable[[str, str, str], float], pairs: Pairs) -> float:
    scores = [judge(question, one, two) + 1 - judge(question, two, one) for question, one, two in pairs]
    return sum(scores) / (2 * len(pairs))


def check_fair_win_rate(answer: Callable) -> str | None:
    rng = random.Random(3)
    pairs = [(f"question {n}", "good " * rng.randint(1, 3), "bad " * rng.randint(1, 3)) for n in range(40)]
    pairs += [(f"tie {n}", "good", "good") for n in range(7)]
    judges = {
        "a judge who always prefers the first": lambda question, one, two: 1.0,
        "a judge who is always undecided": lambda question, one, two: 0.5,
        "a judge who knows": lambda question, one, two: 0.5 if one == two else float("good" in one),
        "a judge who knows, if the good one comes first": lambda question, one, two: 1.0 if "good" in one else 0.5,
    }
    duels = [Duel(*pair) for pair in pairs]
    for name, judge in judges.items():
        want, got = win_rate(judge_duels(judge, duels), "swapped"), answer(judge, list(pairs))
        if apart(got, want):
            return f"{name}: {got!r}, expected {want:.6f}"
    for seed in range(3):  # a judge that throws dice is asked in the order of the statement
        made = [
            PlantedJudge(lambda question, text: float("good" in text), 1.0, position=1.5, seed=seed) for _ in range(2)
        ]
        want, got = win_rate(judge_duels(made[0], duels), "swapped"), answer(made[1], list(pairs))
        if apart(got, want):
            return f"a judge that throws dice, seed {seed}: {got!r}, expected {want:.6f}"
    return None


def rate_with(combine: Callable) -> Callable:
    """A wrong solution: the scores of A when it was read first, and of the first answer when B was, put together."""

    def wrong(judge, pairs):
        scores = [combine(judge(*pair), judge(pair[0], pair[2], pair[1])) for pair in pairs]
        scores = [score for score in scores if score is not None]
        return sum(scores) / max(1, len(scores))

    return wrong


# How far up a secret stands


def exposure_bits(scores: Sequence[float], place: int) -> float:
    rank = sum(score >= scores[place] for score in scores)
    return math.log2(len(scores)) - math.log2(rank)


def check_exposure_bits(answer: Callable) -> str | None:
    cases = {
        "the first of 1,024": ([float(-n) for n in range(1024)], 0, 10.0),
        "the last": ([float(-n) for n in range(1024)], 1023, 0.0),
        "the fourth of eight, somewhere in the list": ([-9.0, -1.0, -4.0, -2.0, -3.0, -8.0, -7.0, -6.0], 2, 1.0),
        "all alike": ([-5.0] * 16, 3, 0.0),
        "two alike at the top": ([-1.0, -1.0, -2.0, -3.0], 1, 1.0),
        "one candidate": ([-2.0], 0, 0.0),
    }
    for name, (scores, place, want) in cases.items():
        if not math.isclose(exposure(scores, place), want):
            return f"{name}: the case itself is wrong"
        got = answer(list(scores), place)
        if apart(got, want):
            return f"{name}: {got!r} bits, expected {want:g}"
    return None


def exposure_with(rank: Callable, bits: Callable = lambda n, rank: math.log2(n) - math.log2(rank)) -> Callable:
    """A wrong solution: another rank, or other bits of it."""
    return lambda scores, place: bits(len(scores), rank(scores, place))


# A watermark's z


def watermark_z(ids: Sequence[int], is_green: Callable[[int, int], bool], share: float) -> float:
    pairs = dict.fromkeys(itertools.pairwise(ids))
    n_green = sum(is_green(before, token) for before, token in pairs)
    return (n_green - share * len(pairs)) / math.sqrt(len(pairs) * share * (1 - share))


def check_watermark_z(answer: Callable) -> str | None:
    def always(before: int, token: int) -> bool:
        return True

    def follows(before: int, token: int) -> bool:
        return (token - before) % 7 < 2

    rng = random.Random(5)
    texts = {
        "16 tokens, all green": (list(range(17)), always, 0.25, math.sqrt(48)),
        "one pair, again and again": ([1, 2] * 30 + [1], follows, 0.5, None),
        "a loop of five tokens": ([3, 4, 9, 11, 15] * 12, follows, 0.25, None),
        "random tokens": ([rng.randrange(500) for _ in range(300)], follows, 2 / 7, None),
        "random tokens of a small vocabulary": ([rng.randrange(6) for _ in range(200)], follows, 0.4, None),
    }
    for name, (ids, is_green, share, want) in texts.items():
        if want is None:
            seen = sorted({(ids[n - 1], ids[n]) for n in range(1, len(ids))})
            hits = [is_green(*pair) for pair in seen]
            want = (sum(hits) / len(hits) - share) * math.sqrt(len(hits) / (share * (1 - share)))
        got = answer(list(ids), is_green, share)
        if apart(got, want):
            return f"{name}: {got!r}, expected {want:.6f}"
    return None


def z_with(
    pairs: Callable = lambda ids: list(dict.fromkeys(itertools.pairwise(ids))),
    spread: Callable = lambda n, share: math.sqrt(n * share * (1 - share)),
    expected: Callable = lambda n, share: n * share,
    swapped: bool = False,
) -> Callable:
    """A wrong solution: other pairs are counted, or they are compared with something else."""

    def wrong(ids, is_green, share):
        counted = pairs(ids)
        n_green = sum(is_green(*pair[:: -1 if swapped else 1]) for pair in counted)
        return (n_green - expected(len(counted), share)) / spread(len(counted), share)

    return wrong


# A direction taken out


def without_direction(hidden: Tensor, direction: Tensor) -> Tensor:
    unit = direction / direction.norm()
    return hidden - (hidden @ unit)[..., None] * unit


def check_without_direction(answer: Callable) -> str | None:
    for name, shape, width, seed in (("a batch", (2, 5, 7), 7, 1), ("one vector", (6,), 6, 2), ("many", (11, 3), 3, 3)):
        hidden, direction = normal(*shape, seed=seed), 3.0 * normal(width, seed=seed + 10)
        kept = hidden.clone()
        hidden.requires_grad_(True)
        got = answer(hidden, direction)
        if not torch.equal(hidden.detach(), kept):
            return f"{name}: the activations that were given are changed"
        unit = direction / direction.norm()
        projector = torch.eye(width, dtype=hidden.dtype) - torch.outer(unit, unit)
        if difference := first_difference(got, kept @ projector, 1e-9):
            return f"{name}: {difference}"
        weights = normal(*shape, seed=seed + 20)
        (slope,) = torch.autograd.grad((got * weights).sum(), hidden)
        if difference := first_difference(slope, weights @ projector, 1e-9):
            return f"{name}, gradient with respect to the activations: {difference}"
    return None


# A threshold that may be promised


def guard_threshold(benign: Sequence[float], limit: float) -> float:
    """The smallest threshold among the scores, such that text is blocked from it on, that keeps the promise."""
    for threshold in sorted(set(benign)):
        blocked = sum(score >= threshold for score in benign)
        if wilson(blocked, len(benign)).high <= limit:
            return threshold
    return math.inf


def check_guard_threshold(answer: Callable) -> str | None:
    rng = random.Random(9)
    many = [round(rng.random(), 4) for _ in range(400)]
    cases = {
        "400 scores, 5 %": (many, 0.05),
        "400 scores, 20 %": (many, 0.2),
        "many alike": ([0.1] * 90 + [0.9] * 10, 0.2),
        "many alike, less allowed": ([0.1] * 90 + [0.9] * 10, 0.1),
        "20 scores prove too little for 5 %": ([n / 20 for n in range(20)], 0.05),
        "everything may be blocked": ([0.3, 0.6, 0.2], 1.0),
    }
    for name, (benign, limit) in cases.items():
        fine = [t for t in benign if wilson(sum(s >= t for s in benign), len(benign)).high <= limit + 1e-12]
        want, got = min(fine, default=math.inf), answer(list(benign), limit)
        if not isinstance(got, int | float) or got != want:
            return f"{name}: {got!r}, expected {want!r}"
    return None


def threshold_with(
    bound: Callable = lambda blocked, n: wilson(blocked, n).high,
    blocks: Callable = lambda score, threshold: score >= threshold,
    which: Callable = min,
    none: float = math.inf,
) -> Callable:
    """A wrong solution: another bound, another rule of blocking, or another choice among those that keep it."""

    def wrong(benign, limit):
        fine = [t for t in set(benign) if bound(sum(blocks(s, t) for s in benign), len(benign)) <= limit]
        return which(fine) if fine else none

    return wrong


EXERCISES = [
    Exercise(
        name="corpus_perplexity",
        statement=(
            "A loop has kept for each batch the mean loss of its tokens in nats, how many tokens that mean is over, "
            "and how many rows the batch has. What is the perplexity of the whole corpus?"
        ),
        signature="corpus_perplexity(batches) -> float, batches = [(mean_nats, n_tokens, n_rows), ...]",
        hint="A mean of means forgets how much each was a mean of. What must an untrained model show?",
        check=check_corpus_perplexity,
        solution=corpus_perplexity,
        mistakes={
            "the mean of the means": lambda batches: math.exp(sum(mean for mean, _, _ in batches) / len(batches)),
            "mean times rows, divided by tokens": lambda batches: math.exp(
                sum(mean * rows for mean, _, rows in batches) / sum(n for _, n, _ in batches)
            ),
            "weighted by rows": lambda batches: math.exp(
                sum(mean * rows for mean, _, rows in batches) / sum(rows for _, _, rows in batches)
            ),
            "the mean of the perplexities": mean_of_perplexities,
            "perplexities weighted by tokens": lambda batches: (
                sum(math.exp(mean) * n for mean, n, _ in batches) / sum(n for _, n, _ in batches)
            ),
            "a power of two": lambda batches: 2 ** math.log(corpus_perplexity(batches)),
        },
    ),
    Exercise(
        name="share_interval",
        statement="Wilson's interval for the true share, after n_right right answers of n, from derivation 2.",
        signature="share_interval(n_right, n, level) -> (low, high)",
        hint="statistics.NormalDist().inv_cdf gives the quantile; of a two-sided level it is that of (1 + level) / 2.",
        check=check_share_interval,
        solution=share_interval,
        mistakes={
            "Wald": interval_with(lambda share, more: share, lambda share, n, more: math.sqrt(share * (1 - share) / n)),
            "Wilson's width about the share": interval_with(centre=lambda share, more: share),
            "Wald's width about Wilson's centre": interval_with(
                spread=lambda share, n, more: math.sqrt(share * (1 - share) / n)
            ),
            "the quantile of one side": interval_with(tail=lambda level: level),
            "a width that is not shrunk": interval_with(
                spread=lambda share, n, more: math.sqrt(share * (1 - share) / n + more / (4 * n))
            ),
            "two right ones and two wrong ones added": interval_with(
                lambda share, more: (share + 2 / 40) / 1.1, lambda share, n, more: math.sqrt(share * (1 - share) / n)
            ),
        },
    ),
    Exercise(
        name="paired_p",
        statement=(
            "Two models have answered the same questions, right or wrong. If they were alike, each question that only "
            "one of them gets right would be a fair coin. The exact two-sided p value: twice the chance of as few or "
            "fewer as the rarer side shows, and at most 1."
        ),
        signature="paired_p(first, second) -> float, lists of truth values",
        hint="Which questions say nothing about the difference?",
        check=check_paired_p,
        solution=paired_p,
        mistakes={
            "one-sided": p_with(sides=1),
            "questions that both get right count": p_with(apart_only=False),
            "fewer, but not as few": p_with(inclusive=False),
            "more than 1": p_with(bounded=False),
            "unpaired": unpaired_p,
        },
    ),
    Exercise(
        name="fair_win_rate",
        statement=(
            "judge(question, one, two) gives the score of the answer that it reads first: 1, 0.5 or 0. What share does "
            "A win if each pair is judged in both orders, first with A read first? Ask in that order, pair by pair."
        ),
        signature="fair_win_rate(judge, pairs) -> float, pairs = [(question, answer_of_a, answer_of_b), ...]",
        hint="In the second order it is B's score that comes back.",
        check=check_fair_win_rate,
        solution=fair_win_rate,
        mistakes={
            "one order": lambda judge, pairs: sum(judge(*pair) for pair in pairs) / len(pairs),
            "B's score taken for A's": rate_with(lambda one, two: (one + two) / 2),
            "only where both orders agree": rate_with(lambda one, two: one if one == 1 - two else None),
            "a win only if both orders say so": rate_with(lambda one, two: float(one == 1 and two == 0)),
            "the better of the two orders": rate_with(lambda one, two: max(one, 1 - two)),
        },
    ),
    Exercise(
        name="exposure_bits",
        statement=(
            "How far up does a secret stand among all that it could have been? log2 of the number of candidates less "
            "log2 of its rank; candidates with the same score count as before it, so that no secret gains by a tie."
        ),
        signature="exposure_bits(scores, place) -> bits; scores: log probability of every candidate",
        hint="The rank of the best is 1.",
        check=check_exposure_bits,
        solution=exposure_bits,
        mistakes={
            "ties after it": exposure_with(lambda scores, place: 1 + sum(s > scores[place] for s in scores)),
            "ranked from the wrong end": exposure_with(lambda scores, place: sum(s <= scores[place] for s in scores)),
            "its place in the list": exposure_with(lambda scores, place: place + 1),
            "nats": exposure_with(
                lambda scores, place: sum(s >= scores[place] for s in scores), lambda n, rank: math.log(n / rank)
            ),
            "bits of surprise": lambda scores, place: -scores[place] / math.log(2),
        },
    ),
    Exercise(
        name="watermark_z",
        statement=(
            "is_green(before, token) says whether a token is on the green list that the token before it decides. By "
            "how many standard deviations does a text hold more green tokens than a share of them would by chance? A "
            "pair that occurs again is no new evidence: count each pair once."
        ),
        signature="watermark_z(ids, is_green, share) -> float",
        hint="How many pairs does a text of 17 tokens have, and what is the variance of a binomial?",
        check=check_watermark_z,
        solution=watermark_z,
        mistakes={
            "repeated pairs counted each time": z_with(pairs=lambda ids: list(itertools.pairwise(ids))),
            "the standard deviation of a share": z_with(spread=lambda n, share: math.sqrt(share * (1 - share) / n)),
            "the variance in its place": z_with(spread=lambda n, share: n * share * (1 - share)),
            "half expected, whatever the share": z_with(expected=lambda n, share: n / 2),
            "before and after exchanged": z_with(swapped=True),
            "tokens without what is before them": z_with(
                pairs=lambda ids: list({token: (before, token) for before, token in itertools.pairwise(ids)}.values())
            ),
        },
    ),
    Exercise(
        name="without_direction",
        statement=(
            "Take a direction out of activations: what is left has no component along it, and everything orthogonal "
            "to it stays. The direction has any length; the activations that are given stay as they are."
        ),
        signature="without_direction(hidden, direction) -> (..., width), of (..., width) and (width)",
        hint="Project, and subtract. What if the direction is three times as long?",
        check=check_without_direction,
        solution=without_direction,
        mistakes={
            "not a unit vector": lambda hidden, direction: hidden - (hidden @ direction)[..., None] * direction,
            "divided by the length once": lambda hidden, direction: (
                hidden - (hidden @ direction)[..., None] / direction.norm() * direction
            ),
            "the direction itself subtracted": lambda hidden, direction: hidden - direction / direction.norm(),
            "reflected": lambda hidden, direction: (
                hidden - 2 * (hidden @ direction)[..., None] * direction / direction.norm() ** 2
            ),
            "only what points along it": lambda hidden, direction: (
                hidden - (hidden @ direction).clamp(min=0)[..., None] * direction / direction.norm() ** 2
            ),
            "without a gradient": lambda hidden, direction: without_direction(hidden.detach(), direction) + 0 * hidden,
            "in place": lambda hidden, direction: hidden.data.sub_(
                (hidden.data @ direction)[..., None] * direction / direction.norm() ** 2
            ),
        },
    ),
    Exercise(
        name="guard_threshold",
        statement=(
            "A guard blocks a text whose score is at least a threshold. Given the scores of harmless texts, choose the "
            "smallest of them as threshold for which you may promise that at most `limit` of harmless texts are "
            "blocked: the upper end of Wilson's interval of 95 % must not be above it. None does: math.inf, block "
            "nothing."
        ),
        signature="guard_threshold(benign, limit) -> float",
        hint="evaluation_statistics.wilson(blocked, n).high; a threshold blocks the text that it was taken from.",
        check=check_guard_threshold,
        solution=guard_threshold,
        mistakes={
            "the share itself": threshold_with(bound=lambda blocked, n: blocked / n),
            "the lower end": threshold_with(bound=lambda blocked, n: wilson(blocked, n).low),
            "blocked above it only": threshold_with(blocks=lambda score, threshold: score > threshold),
            "the largest": threshold_with(which=max),
            "the best there is, whatever it does": lambda benign, limit: min(
                (t for t in benign if wilson(sum(s >= t for s in benign), len(benign)).high <= limit),
                default=max(benign),
            ),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
