"""The solutions of topic 15's exercises against oracles that share no code with them.

That every checker accepts its solution and refuses every planted mistake is tested with all other exercises.
"""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom

from course_tokenizer import load_course_tokenizer
from exercises_15 import (
    HOSTILE,
    admitted,
    cascade_point,
    fused_ranks,
    latency_bound,
    outside_verdict,
    run_loop,
    safe_prompt,
    saturating_score,
)
from rate_limits import most_in_a_window


def test_hand_examples_of_the_chapter() -> None:
    library = [["cat", "dog"], ["cat", "cat", "bird"], ["fish"]]
    assert [round(saturating_score(["cat"], text, library, 1.2, 0.75), 3) for text in library] == [0.214, 0.258, 0.0]
    assert fused_ranks([[1, 7], [2, 7]], 1, 60) == [7] and fused_ranks([[1, 7], [2, 7]], 1, 0) == [1]
    assert outside_verdict(["3"], [3], 0) and not outside_verdict(["true"], [1], 0)


def test_bm25_is_that_of_bm25s() -> None:
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(0)
    corpus = [[rng.choice("abcdef") * 2 for _ in range(rng.randint(1, 12))] for _ in range(9)]
    made = bm25s.BM25(k1=1.5, b=0.6, method="lucene")
    made.index(corpus, show_progress=False)
    for term in "abcdef":
        theirs = made.get_scores([term * 2])
        ours = [saturating_score([term * 2], text, corpus, 1.5, 0.6) for text in corpus]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_fused_order_is_that_of_all_sums() -> None:
    rng = random.Random(1)
    for _ in range(50):
        lists = [rng.sample(range(8), rng.randint(1, 8)) for _ in range(3)]
        sums = {name: sum(1 / (60 + ids.index(name) + 1) for ids in lists if name in ids) for name in range(8)}
        for one, two in itertools.pairwise(fused_ranks(lists, 8, 60)):
            assert sums[one] > sums[two] or (math.isclose(sums[one], sums[two]) and one < two)


def test_a_prompt_reads_back_as_it_was_written() -> None:
    tokenizer = load_course_tokenizer()
    ids = safe_prompt(tokenizer, "Be short.", HOSTILE, "Where?")
    ends = [place for place, token_id in enumerate(ids) if token_id == tokenizer.im_end_id]
    assert len(ends) == 2
    user = ids[ends[0] + 1 : ends[1]]
    text = tokenizer.decode(user[user.index(tokenizer.im_sep_id) + 1 :])
    assert text == "".join(f"[{n}] {one}\n" for n, one in enumerate(HOSTILE, start=1)) + "Where?"


def test_a_bucket_keeps_its_promise_in_every_window() -> None:
    rng, rate, burst = random.Random(3), Fraction(3), Fraction(8)
    for _ in range(30):
        times = sorted(Fraction(rng.randrange(300), 20) for _ in range(120))
        requests = [(now, Fraction(rng.randint(1, 4))) for now in times]
        ok = admitted(requests, rate, burst)
        kept = [request for request, yes in zip(requests, ok, strict=True) if yes]
        for seconds in (1, 2, 5):
            assert most_in_a_window(kept, seconds) <= burst + rate * seconds


def test_a_threshold_below_all_scores_is_the_small_model_and_above_all_is_both() -> None:
    rng = random.Random(5)
    small, large = [(rng.random(), rng.random() < 0.5) for _ in range(30)], [rng.random() < 0.9 for _ in range(30)]
    assert cascade_point(small, large, 1, 4, -1) == (0.25, sum(right for _, right in small) / 30)
    assert cascade_point(small, large, 1, 4, 2) == (1.25, sum(large) / 30)


@pytest.mark.parametrize(("n", "q"), [(36, 0.9), (100, 0.9), (300, 0.95), (20, 0.5)])
def test_a_bound_on_a_latency_holds_with_its_confidence(n: int, q: float) -> None:
    rank = int(latency_bound([float(k) for k in range(1, n + 1)], q, 0.975))  # its value is its rank
    assert binom.sf(rank - 1, n, q) <= 0.025 < binom.sf(rank - 2, n, q)


def test_nothing_runs_that_is_not_on_the_list_whatever_the_policy_says() -> None:
    rng, ran = random.Random(7), []
    tools = {name: lambda argument, name=name: ran.append(name) or name for name in "abcd"}
    for _ in range(200):
        turns = [{"tool": rng.choice("abcdxyz"), "argument": rng.choice("12")} for _ in range(8)]
        answer, history = run_loop(lambda history, turns=turns: turns[len(history)], tools, ["a", "b", "x"], 6)
        assert answer == "" and len(history) == 6
    assert set(ran) == {"a", "b"}
