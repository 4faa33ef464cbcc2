"""Topic 14 - Judging: a judge that compares two answers, what sways it besides the truth, and how to take that out.

    verdicts = judge_duels(judge, duels)                    # every duel in both orders
    position_bias(verdicts), length_bias(verdicts)          # measured, with intervals
    win_rate(verdicts, "plain" | "swapped" | "length")      # of system A, uncorrected or corrected
    agreement(verdicts)                                     # with the truth, where it is known

A judge is any function (question, first answer, second answer) -> score of the first: 1, 0.5 or 0. Zheng et al. 2023
(arXiv 2306.05685, judges and their biases); Dubois et al. 2024 (arXiv 2404.04475, length-controlled win rates).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from calibration import cohen_kappa
from evaluation_statistics import Interval, two_sided, wilson
from text_model import TextModel

Judge = Callable[[str, str, str], float]


@dataclass(frozen=True)
class Duel:
    """A question with the answers of system A and system B; `truth` is A's true score: 1, 0.5 or 0, None if unknown."""

    question: str
    answer_a: str
    answer_b: str
    truth: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one duel: A's score when A was read first, and when it was read second."""

    duel: Duel
    a_first: float
    a_second: float

    @property
    def both(self) -> float:
        """A's score over both orders: a judge that follows the position alone gives 0.5."""
        return (self.a_first + self.a_second) / 2

    @property
    def length_gap(self) -> float:
        """Words of A's answer less those of B's."""
        return float(len(self.duel.answer_a.split()) - len(self.duel.answer_b.split()))


def judge_duels(judge: Judge, duels: Sequence[Duel]) -> list[Verdict]:
    """Ask about every duel in both orders. Raises ValueError for none, and for a score outside 0..1."""
    if not duels:
        raise ValueError("0 duels: nothing to judge")
    found = []
    for duel in duels:
        first = judge(duel.question, duel.answer_a, duel.answer_b)
        second = judge(duel.question, duel.answer_b, duel.answer_a)
        for score in (first, second):
            if not 0 <= score <= 1:
                raise ValueError(f"a judge must give a score between 0 and 1, got {score} for {duel.question!r}")
        found.append(Verdict(duel, first, 1 - second))
    return found


# Judges


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass
class PlantedJudge:
    """A judge whose biases are known: it picks the first answer with log odds

        skill * (quality of first - quality of second) + position + length * (words of first - words of second)

    quality: how good an answer is, such as 1 for right and 0 for wrong.
    """

    quality: Callable[[str, str], float]  # (question, answer)
    skill: float = 2.0
    position: float = 0.0  # log odds for being read first
    length: float = 0.0  # log odds for each word more
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed).random

    def __call__(self, question: str, first: str, second: str) -> float:
        better = self.quality(question, first) - self.quality(question, second)
        longer = len(first.split()) - len(second.split())
        return float(self.random() < sigmoid(self.skill * better + self.position + self.length * longer))


def likelihood_judge(examined: TextModel, per_token: bool = False) -> Judge:
    """A language model as a judge: the answer that it finds likelier after the question wins.

    A sum over tokens prefers short answers, a mean per token long ones that end in the expected: both are biases of
    length that nobody planted.
    """

    def judge(question: str, first: str, second: str) -> float:
        one, two = examined.likelihoods([(question, " " + first), (question, " " + second)])
        costs = [each.nats / each.n_tokens if per_token else each.nats for each in (one, two)]
        return 0.5 if costs[0] == costs[1] else float(costs[0] < costs[1])

    return judge


# Bias, measured


class Effect(NamedTuple):
    value: float
    interval: Interval


def first_wins(verdicts: Sequence[Verdict]) -> Effect:
    """Share of wins of the answer that was read first, over both orders; 0.5 without a bias, whatever the answers are.

    Each duel gives the mean of two dependent judgements, so the interval is that of a mean over duels.
    """
    shares = np.array([(each.a_first + 1 - each.a_second) / 2 for each in verdicts])
    error = shares.std(ddof=1) / math.sqrt(len(shares)) if len(shares) > 1 else math.inf
    mean, reach = float(shares.mean()), two_sided(0.95) * error
    return Effect(mean, Interval(mean - reach, mean + reach))


def consistency(verdicts: Sequence[Verdict]) -> float:
    """Share of duels in which the same answer wins in both orders."""
    return sum(each.a_first == each.a_second for each in verdicts) / len(verdicts)


@dataclass(frozen=True)
class Logistic:
    """Coefficients of a logistic regression and their covariance."""

    coefficients: np.ndarray
    covariance: np.ndarray

    def effect(self, place: int, level: float = 0.95) -> Effect:
        """A coefficient with its Wald interval."""
        value, error = float(self.coefficients[place]), math.sqrt(self.covariance[place, place])
        return Effect(value, Interval(value - two_sided(level) * error, value + two_sided(level) * error))


def fit_logistic(design: np.ndarray, scores: Sequence[float], ridge: float = 1e-6) -> Logistic:
    """P(score 1) = sigmoid(design @ coefficients), by Newton's method; a score may lie between 0 and 1.

    The small ridge keeps coefficients finite where a column decides every score; they are then large and so is their
    interval. Raises ValueError if the scores are all alike.
    """
    columns, wanted = np.asarray(design, dtype=float), np.asarray(scores, dtype=float)
    if len(columns) != len(wanted) or not len(wanted):
        raise ValueError(f"{len(columns)} rows but {len(wanted)} scores; give one for each")
    if wanted.min() == wanted.max():
        raise ValueError(f"all {len(wanted)} scores are {wanted[0]:g}: there is nothing to explain")
    found, penalty = np.zeros(columns.shape[1]), ridge * len(wanted) * np.eye(columns.shape[1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(columns @ found, -700, 700)))
        slope = columns.T @ (wanted - chance) - penalty @ found
        information = (columns * (chance * (1 - chance))[:, None]).T @ columns + penalty
        step = np.linalg.solve(information, slope)
        found = found + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-12 * max(1.0, np.abs(found).max()):
            break
    return Logistic(found, np.linalg.inv(information))


@dataclass(frozen=True)
class JudgeModel:
    """What moves a judge: log odds for A = ability + position * (+1 if A is first, else -1) + length * words more."""

    fit: Logistic

    @property
    def ability(self) -> Effect:
        return self.fit.effect(0)

    @property
    def position(self) -> Effect:
        return self.fit.effect(1)

    @property
    def length(self) -> Effect:
        return self.fit.effect(2)


def judge_model(verdicts: Sequence[Verdict]) -> JudgeModel:
    """Fit A's wins on who it is, where it stood and how much longer it was.

    With the truth known it stands in the place of the ability (2 * truth - 1, so -1 to 1): what an answer is worth must
    not be charged to its length.
    """
    rows, scores = [], []
    for verdict in verdicts:
        worth = 1.0 if verdict.duel.truth is None else 2 * verdict.duel.truth - 1
        rows += [(worth, 1.0, verdict.length_gap), (worth, -1.0, verdict.length_gap)]
        scores += [verdict.a_first, verdict.a_second]
    return JudgeModel(fit_logistic(np.array(rows), scores))


# Corrected


CORRECTIONS = ("plain", "swapped", "length")


def win_rate(verdicts: Sequence[Verdict], correction: str = "plain") -> float:
    """A's share of wins. plain: A always read first. swapped: both orders, which removes the position exactly.

    length: besides, what the fitted judge would say of answers of one length (Dubois et al. 2024): the mean over duels
    of sigmoid(ability), where position and length are set to 0. It uses no truth.
    """
    if correction == "plain":
        return float(np.mean([each.a_first for each in verdicts]))
    if correction == "swapped":
        return float(np.mean([each.both for each in verdicts]))
    if correction != "length":
        raise ValueError(f"unknown correction {correction!r}; choose from {', '.join(CORRECTIONS)}")
    blind = [
        Verdict(Duel(*(v.duel.question, v.duel.answer_a, v.duel.answer_b)), v.a_first, v.a_second) for v in verdicts
    ]
    return sigmoid(judge_model(blind).ability.value)


@dataclass(frozen=True)
class Agreement:
    """How often a judge is right about duels that one system really wins, and beyond chance."""

    accuracy: float
    interval: Interval
    kappa: float
    n: int


def agreement(verdicts: Sequence[Verdict], swapped: bool = True) -> Agreement:
    """Agreement with the truth, over duels with a winner; kappa is that of the verdicts with A read first.

    swapped: where the two orders disagree, half of the verdict is right, whatever the truth is. Raises ValueError if no
    duel has a known winner.
    """
    decided = [each for each in verdicts if each.duel.truth in (0.0, 1.0)]
    if not decided:
        raise ValueError("no duel has a known winner; agreement with the truth is not defined")
    said = [each.both if swapped else each.a_first for each in decided]
    right = [1 - abs(score - each.duel.truth) for score, each in zip(said, decided, strict=True)]
    names = [each.a_first for each in decided], [each.duel.truth for each in decided]
    kappa = cohen_kappa(*names) if len(set(names[0]) | set(names[1])) > 1 else math.nan
    return Agreement(float(np.mean(right)), wilson(round(sum(right)), len(right)), kappa, len(right))
