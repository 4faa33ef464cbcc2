"""The solutions of topic 14's exercises against oracles that share no code with them.

That every checker accepts its solution and refuses every planted mistake is tested with all other exercises.
"""

import math
import random

import pytest
import torch
from scipy.stats import binomtest

from exercises_08 import numbers as normal
from exercises_14 import (
    corpus_perplexity,
    exposure_bits,
    fair_win_rate,
    guard_threshold,
    paired_p,
    share_interval,
    watermark_z,
    without_direction,
)


def test_hand_examples_of_the_chapter() -> None:
    assert round(share_interval(20, 20, 0.95)[0], 3) == 0.839
    assert paired_p([True] * 9 + [False] * 3, [False] * 9 + [True] * 3) == pytest.approx(2 * 299 / 4096)
    assert exposure_bits([-1.0, -2.0, -3.0, -4.0], 1) == 1.0
    assert watermark_z(list(range(17)), lambda before, token: True, 0.25) == pytest.approx(math.sqrt(48))


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (3, 20), (19, 20), (250, 400)])
def test_an_interval_is_scipys(n_right: int, n: int) -> None:
    found = binomtest(n_right, n).proportion_ci(0.9, method="wilson")
    assert share_interval(n_right, n, 0.9) == pytest.approx((found.low, found.high), abs=1e-9)


def test_a_paired_p_is_scipys() -> None:
    rng = random.Random(0)
    for _ in range(40):
        first, second = ([rng.random() < 0.6 for _ in range(50)] for _ in range(2))
        wins, losses = (
            sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((first, second), (second, first))
        )
        assert paired_p(first, second) == pytest.approx(binomtest(wins, wins + losses).pvalue)


def test_perplexity_does_not_depend_on_how_a_corpus_is_cut() -> None:
    torch.manual_seed(0)
    nats = torch.rand(600, dtype=torch.float64) * 4
    whole = math.exp(nats.mean())
    for sizes in ((600,), (100, 500), (1, 99, 250, 250)):
        parts = nats.split(sizes)
        assert corpus_perplexity([(part.mean().item(), len(part), 3) for part in parts]) == pytest.approx(whole)


def test_a_judge_of_positions_alone_says_one_half() -> None:
    pairs = [(str(n), "x" * n, "y") for n in range(9)]
    for first in (0.0, 0.3, 1.0):
        assert fair_win_rate(lambda question, one, two, first=first: first, pairs) == pytest.approx(0.5)


def test_a_watermark_that_is_not_there_has_z_of_mean_0_and_deviation_1() -> None:
    rng, found = random.Random(1), []
    for seed in range(400):
        ids = [rng.randrange(1000) for _ in range(120)]
        found.append(watermark_z(ids, lambda before, token, seed=seed: hash((before, token, seed)) % 4 == 0, 0.25))
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in found) / len(found))
    assert abs(mean) < 0.2 and abs(deviation - 1) < 0.15


def test_a_direction_is_taken_out_once_and_for_all() -> None:
    hidden, direction = normal(4, 9), normal(9, seed=1)
    once = without_direction(hidden, direction)
    torch.testing.assert_close(without_direction(once, direction), once, atol=1e-12, rtol=0)
    torch.testing.assert_close(once @ direction, torch.zeros(4, dtype=once.dtype), atol=1e-12, rtol=0)


def test_a_promised_threshold_keeps_its_promise_on_fresh_texts() -> None:
    rng, kept = random.Random(2), 0
    for _ in range(200):
        threshold = guard_threshold([rng.random() for _ in range(200)], 0.1)
        kept += 1 - threshold <= 0.1  # the true share of uniform scores that are blocked
    assert kept >= 190
