"""Judges with planted biases: what is measured is what was planted, and the corrections recover the truth."""

import math
import random

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from course_model import load_course_model
from judging import (
    Duel,
    PlantedJudge,
    Verdict,
    agreement,
    consistency,
    first_wins,
    fit_logistic,
    judge_duels,
    judge_model,
    likelihood_judge,
    sigmoid,
    win_rate,
)
from text_model import Likelihood, TextModel


def quality(question: str, answer: str) -> float:
    """1 for an answer that holds the right word, which stands at the end of the question."""
    return float(question.split()[-1] in answer.split())


def duels(n: int, seed: int, p_a: float = 0.6, p_b: float = 0.6, words_a: int = 0) -> list[Duel]:
    """A and B right with these chances; both pad their answers at random, A with words_a more."""
    rng, found = random.Random(seed), []
    for number in range(n):
        right_a, right_b = rng.random() < p_a, rng.random() < p_b
        lengths = rng.randrange(6) + words_a, rng.randrange(6)
        answers = [
            "sure " * length + (f"r{number}" if right else "no")
            for length, right in zip(lengths, (right_a, right_b), strict=True)
        ]
        found.append(Duel(f"q r{number}", *answers, truth=(1 + right_a - right_b) / 2))
    return found


def test_the_regression_is_scikit_learns(parity) -> None:
    rng = np.random.default_rng(0)
    design = rng.normal(size=(300, 3))
    scores = (rng.random(300) < 1 / (1 + np.exp(-design @ [1.0, -0.5, 0.2]))).astype(float)
    known = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, solver="newton-cholesky").fit(design, scores)
    parity(
        "fit_logistic",
        "scikit-learn",
        "output",
        fit_logistic(design, scores, ridge=0).coefficients,
        known.coef_[0],
        1e-7,
    )


def test_planted_biases_are_measured() -> None:
    judge = PlantedJudge(quality, skill=2.0, position=0.6, length=0.15, seed=1)
    found = judge_model(judge_duels(judge, duels(3000, 2, words_a=2)))
    for effect, planted in ((found.ability, 2.0), (found.position, 0.6), (found.length, 0.15)):
        low, high = effect.interval
        assert low < planted < high and high - low < 0.25
    assert first_wins(judge_duels(PlantedJudge(quality, position=0.0), duels(1500, 3))).interval.covers(0.5)
    biased = first_wins(judge_duels(PlantedJudge(quality, skill=0.0, position=1.0), duels(1500, 3)))
    assert biased.interval.covers(sigmoid(1.0))


def test_a_judge_that_only_reads_the_first_answer_is_taken_out_by_swapping() -> None:
    verdicts = judge_duels(lambda question, first, second: 1.0, duels(50, 0))
    assert win_rate(verdicts, "plain") == 1.0 and win_rate(verdicts, "swapped") == 0.5
    assert consistency(verdicts) == 0.0 and first_wins(verdicts).value == 1.0
    assert agreement(verdicts).accuracy == 0.5


def test_corrections_bring_equal_systems_back_to_one_half() -> None:
    """Equal systems, but A writes four words more and is read first: each correction takes its own bias out."""
    judge = PlantedJudge(quality, skill=2.0, position=0.8, length=0.2, seed=5)
    verdicts = judge_duels(judge, duels(3000, 6, words_a=4))
    plain, swapped, length = (win_rate(verdicts, name) for name in ("plain", "swapped", "length"))
    assert plain > 0.7 > swapped > 0.6 and length == pytest.approx(0.5, abs=0.03)


def test_length_is_not_charged_for_what_the_truth_explains() -> None:
    """Long answers that are right more often: without the truth their length looks like a bias."""
    rng, found = random.Random(0), []
    for number in range(2000):
        longer = rng.random() < 0.5
        right = rng.random() < (0.9 if longer else 0.3), rng.random() < (0.3 if longer else 0.9)
        lengths = (6, 1) if longer else (1, 6)
        answers = ["sure " * n + (f"r{number}" if ok else "no") for n, ok in zip(lengths, right, strict=True)]
        found.append(Duel(f"q r{number}", *answers, truth=(1 + right[0] - right[1]) / 2))
    verdicts = judge_duels(PlantedJudge(quality, skill=2.0, seed=1), found)
    without = [
        Verdict(Duel(v.duel.question, v.duel.answer_a, v.duel.answer_b), v.a_first, v.a_second) for v in verdicts
    ]
    assert judge_model(verdicts).length.interval.covers(0.0)
    assert judge_model(without).length.interval.low > 0.1


def test_agreement_with_the_truth() -> None:
    perfect = judge_duels(lambda q, first, second: 0.5 + (quality(q, first) - quality(q, second)) / 2, duels(80, 1))
    found = agreement(perfect)
    assert found.accuracy == 1.0 and found.kappa == 1.0 and found.interval.high == 1.0
    assert found.n == sum(each.duel.truth != 0.5 for each in perfect)
    careless = agreement(judge_duels(PlantedJudge(quality, skill=0.0, seed=2), duels(2000, 1)))
    assert careless.interval.covers(0.5) and abs(careless.kappa) < 0.1
    skilled = agreement(judge_duels(PlantedJudge(quality, skill=2.0, seed=2), duels(2000, 1)))
    assert skilled.accuracy == pytest.approx(sigmoid(2.0), abs=0.03)


def test_a_language_model_judges_by_what_it_finds_likely() -> None:
    judge = likelihood_judge(TextModel.of(*load_course_model()))
    assert judge("Sum: 2 + 3 =", "5.", "6.") == 1.0 and judge("Sum: 2 + 3 =", "6.", "5.") == 0.0
    assert judge("Sum: 2 + 3 =", "5.", "5.") == 0.5


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid(-1000.0) == 0.0 and sigmoid(1000.0) == 1.0 and sigmoid(math.log(3)) == pytest.approx(0.75)


class Costly:
    """Finds of every answer what it is told to: (nats, tokens) by the answer."""

    def __init__(self, costs: dict[str, tuple[float, int]]) -> None:
        self.costs = costs

    def likelihoods(self, pairs: list[tuple[str, str]]) -> list[Likelihood]:
        return [Likelihood(*self.costs[answer.strip()], False) for _, answer in pairs]


def test_a_sum_prefers_the_short_answer_and_a_mean_the_even_one() -> None:
    examined = Costly({"no": (4.0, 2), "no no no": (6.0, 6), "so": (4.0, 2)})
    summed, mean = likelihood_judge(examined), likelihood_judge(examined, per_token=True)
    assert summed("q", "no", "no no no") == 1.0 and mean("q", "no", "no no no") == 0.0
    assert summed("q", "no no no", "no") == 0.0 and mean("q", "no no no", "no") == 1.0
    assert summed("q", "no", "so") == mean("q", "no", "so") == 0.5


def test_agreement_in_one_order_and_the_ends_of_what_can_be_said() -> None:
    """A judge that always takes the first is right, with A read first, wherever A is."""
    found = [Duel("q", "a", "b", truth) for truth in (1.0, 1.0, 1.0, 0.0, 0.5, None)]
    verdicts = judge_duels(lambda question, first, second: 1.0, found)
    alone, both = agreement(verdicts, swapped=False), agreement(verdicts)
    assert (alone.accuracy, alone.n, both.accuracy) == (0.75, 4, 0.5) and alone.kappa == pytest.approx(0)
    assert math.isnan(agreement(verdicts[:3]).kappa)  # one label only
    assert first_wins(verdicts[:1]).interval == (-math.inf, math.inf)
    assert consistency([Verdict(found[0], 1.0, 1.0), Verdict(found[0], 1.0, 0.0)]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge_duels(lambda *_: 1.0, []), "0 duels"),
        (lambda: judge_duels(lambda *_: 2.0, duels(1, 0)), "a score between 0 and 1, got 2.0"),
        (lambda: fit_logistic(np.ones((2, 1)), [1, 1]), "all 2 scores are 1"),
        (lambda: fit_logistic(np.ones((2, 1)), [1]), "2 rows but 1 scores"),
        (lambda: win_rate([], "long"), "unknown correction 'long'; choose from plain, swapped, length"),
        (lambda: agreement([Verdict(Duel("q", "a", "b"), 1.0, 1.0)]), "no duel has a known winner"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
