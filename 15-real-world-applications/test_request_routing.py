"""Tests of request_routing: the cascade's cost and quality against sums by hand, and when it beats a coin."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from chat_endpoint import Reply
from request_routing import (
    SCORES,
    Answered,
    Cascade,
    Isotonic,
    Point,
    always,
    ask_both,
    best_threshold,
    cascade,
    clairvoyant,
    course_pair,
    discrimination,
    frontier,
    gain_needed,
    gain_of,
    halves,
    least_logprob,
    net_value,
    plot_frontier,
    random_at,
)

HAND = Answered(
    score=np.array([-3.0, -2.0, -1.0, -0.5]),
    right_small=np.array([0.0, 1.0, 0.0, 1.0]),
    right_large=np.array([1.0, 1.0, 1.0, 0.0]),
    cost_small=np.full(4, 1.0),
    cost_large=np.full(4, 4.0),
)


def drawn(seed: int, n: int = 2000, knows: float = 1.0) -> Answered:
    """Questions whose small model is right with the chance sigmoid(score); knows=0: the score says nothing."""
    rng = np.random.default_rng(seed)
    strength = rng.normal(0.5, 2, n)
    right = rng.random(n) < 1 / (1 + np.exp(-strength))
    score = knows * strength + (1 - knows) * rng.normal(0.5, 2, n)
    large = rng.random(n) < 0.95
    return Answered(score, right.astype(float), large.astype(float), np.full(n, 0.25), np.full(n, 1.0))


def test_by_hand():
    keep = np.array([False, False, True, True])
    assert cascade(HAND, keep) == Point((4 * 1 + 2 * 4) / 16, 0.75, 0.5)
    assert always(HAND, False) == Point(0.25, 0.5, 0.0) and always(HAND, True) == Point(1.0, 0.75, 1.0)
    assert random_at(HAND, 0.25) == 0.5 and random_at(HAND, 0.625) == 0.625 and random_at(HAND, 2.0) == 0.75
    assert clairvoyant(HAND) == Point((1 + 1 + 4 + 4) / 16, 1.0, 0.5)
    assert gain_needed(HAND) == pytest.approx(0.25 / 0.75) and gain_of(HAND, keep) == 0.5
    assert gain_of(HAND, np.ones(4, bool)) == 0.0


def test_the_frontier_goes_from_keeping_all_to_keeping_none():
    points = frontier(HAND, np.array([0.1, 0.2, 0.2, 0.9]))
    assert [point.escalated for point in points] == [0.0, 0.25, 0.75, 1.0]
    assert points[0] == always(HAND, False) and points[-1].quality == always(HAND, True).quality
    assert points[-1].cost == 1.25  # both models are paid


@pytest.mark.parametrize("seed", range(4))
def test_a_cascade_beats_the_coin_exactly_where_the_escalated_gain_enough(seed):
    data = drawn(seed, 400, knows=0.6)
    for threshold in np.quantile(data.score, (0.1, 0.4, 0.7)):
        keep = data.score >= threshold
        point = cascade(data, keep)
        if point.cost < 1:  # beyond it the coin stays at the large model
            better = point.quality > random_at(data, point.cost)
            assert better == (gain_of(data, keep) > gain_needed(data))


def test_a_score_that_knows_nothing_is_worse_than_a_coin():
    data = drawn(0, 1500, knows=0.0)
    points = [point for point in frontier(data, data.score)[::50] if 0.3 < point.cost < 0.95]
    assert np.mean([point.quality - random_at(data, point.cost) for point in points]) < 0
    knowing = drawn(0, 1500, knows=1.0)
    points = [point for point in frontier(knowing, knowing.score)[::50] if 0.3 < point.cost < 0.95]
    assert np.mean([point.quality - random_at(knowing, point.cost) for point in points]) > 0.03


def test_isotonic_regression_equals_scikit_learn():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = np.round(rng.normal(size=80), 1)  # with ties
        right = rng.random(80) < 1 / (1 + np.exp(-scores))
        peer = IsotonicRegression(out_of_bounds="clip").fit(scores, right.astype(float))
        assert np.allclose(Isotonic(scores, right)(scores), peer.predict(scores), atol=1e-12)


def test_isotonic_by_hand_and_beyond_its_ends():
    made = Isotonic([1, 2, 3, 4], [True, False, True, True])
    assert made.shares.tolist() == [0.5, 1.0] and made.starts.tolist() == [1, 3]
    assert made(np.array([-9, 1, 2.9, 3, 99])).tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert float(made(-np.inf)) == 0.5
    with pytest.raises(ValueError, match="at least 1"):
        Isotonic([], [])
    with pytest.raises(ValueError, match="not a number"):
        Isotonic([np.nan], [True])


def test_calibrated_chances_are_chances():
    """Of 4000 answers, the mean chance and the share right differ by 0.03 with a chance below 1e-4."""
    train, test = halves(drawn(1, 8000), 0)
    chances = Isotonic(train.score, train.right_small)(test.score)
    assert abs(chances.mean() - test.right_small.mean()) < 0.03
    high = chances >= 0.8
    assert abs(chances[high].mean() - test.right_small[high].mean()) < 0.03


def test_the_derived_threshold_is_the_best_for_true_chances():
    data = drawn(2, 6000)
    chances, large = 1 / (1 + np.exp(-data.score)), always(data, True).quality
    for worth_right in (1.5, 3.0, 10.0):
        chosen = net_value(cascade(data, chances >= best_threshold(worth_right, large)), worth_right)
        best = max(net_value(point, worth_right) for point in frontier(data, np.round(chances, 2)))
        assert best - chosen < 0.01 * worth_right
        raw = net_value(cascade(data, chances**0.02 >= best_threshold(worth_right, large)), worth_right)
        assert raw < chosen  # the same order of the answers, but no chances


# Endpoints


class Fixed:
    def __init__(self, name: str, text: str, logprobs: tuple[float, ...] = (), reason: str = "stop") -> None:
        self.name, self.text, self.logprobs, self.reason, self.asked = name, text, logprobs, reason, []

    def chat(self, messages, **settings) -> Reply:
        self.asked.append(settings)
        return Reply(self.text, self.reason, 3, 2, 0.1, self.logprobs)


CHAT = [{"role": "user", "content": "?"}]


def test_a_cascade_asks_the_large_model_only_where_the_small_one_is_not_sure():
    large = Fixed("large", "L")
    for logprobs, reason, answer in (
        ((-0.1, -0.2), "stop", "S"),
        ((-0.1, -2.0), "stop", "L"),
        ((-0.1,), "length", "L"),
        ((0.0, np.log(0.5)), "stop", "L"),
    ):
        one = Cascade(Fixed("small", "S", logprobs, reason), large, np.exp, 0.7)
        assert one.chat(CHAT, max_tokens=9).text == answer
        assert (one.n_asked, one.n_escalated) == (1, int(answer == "L"))
        assert one.small.asked == [{"max_tokens": 9, "logprobs": True}]
    assert large.asked == [{"max_tokens": 9}] * 3 and one.name == "small, then large"


def test_a_chance_at_the_threshold_is_enough_and_its_log_probabilities_are_asked_for_whatever_the_caller_wants():
    one = Cascade(Fixed("small", "S", (-1.0,)), Fixed("large", "L"), lambda score: 0.7, 0.7)
    assert one.chat(CHAT, logprobs=False).text == "S" and one.small.asked == [{"logprobs": True}]


def test_halves_are_drawn_and_share_no_question():
    data = drawn(0, 101)
    columns = [data.score, data.right_small, data.right_large, data.cost_small, data.cost_large]
    one, other = halves(data, 0)
    assert (len(one), len(other)) == (50, 51) and len({*data.score}) == 101
    assert sorted([*one.score, *other.score]) == sorted(data.score) and {*one.score} != {*data.score[:50]}
    rows = set(zip(*columns, strict=True))  # a question stays whole
    for half in (one, other):
        own = [getattr(half, name) for name in Answered.__dataclass_fields__]
        assert set(zip(*own, strict=True)) <= rows
    assert {*halves(data, 1)[0].score} != {*one.score}


class Weighing:
    """An endpoint of so many weights, whose answers have 2 tokens for a prompt of 3."""

    def __init__(self, n_weights: int, text: str) -> None:
        self.served = SimpleNamespace(model=torch.nn.Linear(n_weights, 1, bias=False))
        self.text = text

    def chat_all(self, chats, **settings) -> list[Reply]:
        return [Reply(self.text, "stop", 3, 2, 0.1, (-1.0, -2.0)) for _ in chats]


def test_an_answer_costs_its_weights_for_every_token_of_prompt_and_answer():
    data = ask_both(Weighing(7, "no"), Weighing(100, "neither"), 2, 0)
    assert set(data.cost_small) == {7 * 5} and set(data.cost_large) == {100 * 5} and set(data.score) == {-2.0}


def test_scores_of_an_answer():
    reply = Reply("x", "stop", 1, 3, 0.1, (-1.0, -2.0, -3.0))
    assert [SCORES[name](reply) for name in ("mean", "least", "total")] == [-2.0, -3.0, -6.0]
    assert all(score(Reply("x", "stop", 1, 0, 0.1)) == -np.inf for score in SCORES.values())


def test_the_courses_pair_is_asked_and_paid_as_it_is():
    small, large = course_pair()
    data = ask_both(small, large, 4, 0)
    assert len(data) == 24 and set(data.right_large) <= {0.0, 1.0} and always(data, True).quality > 0.6
    assert 0.2 < always(data, False).cost < 0.4 and always(data, False).quality > 0.3
    assert 0.5 <= discrimination(data) <= 1
    question = [{"role": "user", "content": "What is 3 plus 4 ?"}]
    never = Cascade(small, large, lambda score: 0.0, 0.5, least_logprob)
    assert never.chat(question).text == large.chat(question).text == "3 plus 4 is 7."


def test_the_plot_names_its_axes():
    figure = plot_frontier({"cascade": frontier(HAND, HAND.score)}, {"large": always(HAND, True)})
    axes = figure.axes[0]
    assert "cost" in axes.get_xlabel() and "right" in axes.get_ylabel() and len(axes.lines) == 2
