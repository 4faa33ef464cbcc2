"""Topic 13 - Proofs of the batching rules: starts and times worked by hand, and answers that no rule changes."""

import math
import random

import pytest
import torch

from dynamic_batching import (
    BatchRule,
    CountedClock,
    CountedEngine,
    ProcessClock,
    StepCost,
    plot_batches,
    serve_arrivals,
)
from modern_llm_architectures import CausalLM, ModelConfig
from serving_bench import Job, naive_answers
from serving_engine import Engine, EngineConfig

STATIC, AT_ONCE = BatchRule(2, math.inf), BatchRule(2, 0.0)
CONTINUOUS = BatchRule(2, joins=True)
SECOND = StepCost(1, 0, 0)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig(vocab_size=31, d_model=12, n_layers=1, n_heads=2, d_head=6, d_ff=14, max_seq_len=64))


def served(rule, n_new, moments, cost=SECOND, n_prompt=1):
    jobs = [Job([1 + index] * n_prompt, n) for index, n in enumerate(n_new)]
    return serve_arrivals(CountedEngine(), jobs, moments, rule, CountedClock(cost))


@pytest.mark.parametrize(
    ("rule", "firsts", "lasts", "starts", "rows"),
    [
        (CONTINUOUS, [1, 1, 2, 8], [3, 1, 3, 8], [2, 1, 1], (7, 7)),  # C takes B's row at once
        (AT_ONCE, [1, 1, 4, 8], [3, 1, 5, 8], [2, 1, 1], (7, 9)),  # C waits for A, D for nobody
        (BatchRule(2, 5.0), [1, 1, 7, 13], [3, 1, 8, 13], [2, 1, 1], (7, 9)),  # C until 1 + 5, D until 7 + 5
        (BatchRule(2, 10.0), [1, 1, 8, 8], [3, 1, 9, 8], [2, 2], (7, 10)),  # D comes within C's window
        (STATIC, [1, 1, 8, 8], [3, 1, 9, 8], [2, 2], (7, 10)),
    ],
)
def test_four_requests_by_hand(rule, firsts, lasts, starts, rows) -> None:
    """A, B, C and D want 3, 1, 2 and 1 tokens and come at 0, 0, 1 and 7 s; two rows, a second for each step."""
    found = served(rule, (3, 1, 2, 1), (0, 0, 1, 7))
    assert [record.first for record in found.records] == firsts
    assert [record.last for record in found.records] == lasts
    assert [record.n_tokens for record in found.records] == [3, 1, 2, 1]
    assert found.starts == starts and (found.live, found.slots) == rows
    assert found.wasted == pytest.approx(1 - rows[0] / rows[1])
    assert found.throughput == 4 / max(lasts)


def test_the_window_is_the_oldests_and_does_not_begin_anew_with_each_arrival() -> None:
    moments = [0.4 * index for index in range(10)]
    found = served(BatchRule(16, 1.0), [1] * 10, moments, StepCost(0.1, 0, 0))
    assert found.starts == [3, 3, 3, 1]  # at 1.0, 2.2, 3.4 and 4.6
    assert [round(found.records[index].ttft, 9) for index in (0, 2, 9)] == [1.1, 0.3, 1.1]


def test_nobody_else_comes_and_the_last_who_fill_no_batch_are_served() -> None:
    found = served(STATIC, (1, 1, 4), (0, 0, 0))
    assert found.starts == [2, 1] and [record.last for record in found.records] == [1, 1, 5]


def test_a_step_costs_its_rows_and_the_tokens_of_its_prompts() -> None:
    found = served(STATIC, (1, 3), (0, 0), StepCost(10, 1, 0.5), n_prompt=4)
    # two rows to the end although one is done: 10 + 2 + 8 * 0.5, then twice 10 + 2
    assert [record.last for record in found.records] == [16, 40]


@pytest.mark.parametrize("rule", [CONTINUOUS, AT_ONCE, BatchRule(2, 0.001), STATIC])
def test_no_rule_changes_an_answer_of_the_real_engine(model, rule) -> None:
    jobs = [Job([2, 5, 3 + index], 1 + index % 4) for index in range(7)]
    engine = Engine(model, None, EngineConfig(max_batch=2))
    found = serve_arrivals(engine, jobs, [0.002 * index for index in range(7)], rule, ProcessClock())
    assert found.ids == naive_answers(model, jobs) and sum(found.starts) == 7
    assert all(record.due < record.first <= record.last for record in found.records)
    assert (found.wasted == 0) if rule.joins else (0 <= found.wasted < 1)


@pytest.mark.parametrize("rule", [BatchRule(3, joins=True), BatchRule(3, 4.0), BatchRule(3, math.inf)])
def test_what_is_counted_is_what_the_engine_does(model, rule) -> None:
    """The same records from the engine and from counting, step for step, at costs that no two steps share."""
    rng, cost = random.Random(3), StepCost(1, 0.37, 0.011)
    jobs = [Job([1] * rng.randint(1, 12), rng.randint(1, 9)) for _ in range(14)]
    moments = sorted(rng.uniform(0, 60) for _ in jobs)
    engine = Engine(model, None, EngineConfig(max_batch=3, prefix_cache=False))
    real = serve_arrivals(engine, jobs, moments, rule, CountedClock(cost))
    counted = serve_arrivals(CountedEngine(), jobs, moments, rule, CountedClock(cost))
    assert counted.records == real.records and counted.starts == real.starts
    assert (counted.steps, counted.slots, counted.live) == (real.steps, real.slots, real.live)


def test_rules_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="window must be >= 0 seconds .*got nan"):
        BatchRule(4, math.nan)
    with pytest.raises(ValueError, match="window must be >= 0 seconds .*got -1"):
        BatchRule(4, -1)
    with pytest.raises(ValueError, match="max_batch"):
        BatchRule(0)


def test_who_joins_needs_a_row_that_is_free() -> None:
    rule = BatchRule(4, joins=True)
    assert [rule.n_start([0.0] * n, n_running, 0.0) for n, n_running in ((3, 2), (1, 2), (3, 4), (0, 1))] == [
        2,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("make_clock", [lambda: CountedClock(SECOND), ProcessClock])
def test_waiting_for_what_is_past_turns_no_clock_back(make_clock) -> None:
    clock = make_clock()
    clock.wait_until(50.0)
    assert 50 <= clock.now < 60
    clock.wait_until(3.0)
    assert clock.now >= 50


def test_the_picture_shows_rows_kept_for_nobody_only_where_there_are_some() -> None:
    found = {name: served(rule, (3, 1, 2), (0, 0, 1)) for name, rule in (("at once", AT_ONCE), ("joins", CONTINUOUS))}
    kept = [
        [tuple(line.get_segments()[0][:, 0]) for line in axis.collections if line.get_label() == "row kept, empty"]
        for axis in plot_batches(found).axes
    ]
    assert kept == [[(3, 3), (1, 3), (5, 5)], []]  # B's row is kept until A has its third token
