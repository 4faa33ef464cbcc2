"""Tests of rate_limits: promises on time made of fractions, and in front of a server of topic 13's kind."""

import json
import math
from fractions import Fraction

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from rate_limits import (
    FixedWindow,
    KeyedLimiter,
    LimitConfig,
    RateLimited,
    SlidingWindow,
    TokenBucket,
    estimated_tokens,
    most_in_a_window,
    used_tokens,
)

FRACTIONS = st.fractions(0, 5, max_denominator=12)
STEPS = st.lists(st.tuples(FRACTIONS, st.integers(0, 9)), min_size=1, max_size=25)  # (seconds since the last, cost)


def run(limit, steps) -> list[tuple[Fraction, int]]:
    """What a limit admits of requests with these gaps and costs."""
    now, admitted = Fraction(0), []
    for gap, cost in steps:
        now += gap
        if limit.take(cost, now) == 0:
            admitted.append((now, cost))
    return admitted


def all_windows(admitted, seconds) -> list:
    """The sums of all windows [start, start + seconds) that begin at an admission, by brute force."""
    return [sum(cost for moment, cost in admitted if start <= moment < start + seconds) for start, _ in admitted]


@given(STEPS, st.fractions(Fraction(1, 4), 4, max_denominator=8), st.integers(1, 12), FRACTIONS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_bucket_admits_at_most_burst_and_rate_in_every_window(steps, rate, burst, seconds):
    admitted = run(TokenBucket(rate, burst), steps)
    assert all(total <= burst + rate * seconds for total in all_windows(admitted, seconds))


@given(STEPS, st.integers(1, 12), st.fractions(Fraction(1, 4), 4, max_denominator=8))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_sliding_window_admits_at_most_its_limit_in_every_window(steps, limit, seconds):
    admitted = run(SlidingWindow(limit, seconds), steps)
    assert all(total <= limit for total in all_windows(admitted, seconds))
    assert most_in_a_window(admitted, seconds) == max([0, *all_windows(admitted, seconds)])


@given(STEPS, st.sampled_from(["bucket", "window"]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_wait_that_is_named_is_the_shortest(steps, kind):
    make = {"bucket": lambda: TokenBucket(Fraction(3, 2), 9), "window": lambda: SlidingWindow(9, Fraction(4))}[kind]
    limit, now = make(), Fraction(0)
    for gap, cost in steps:
        now += gap
        wait = limit.take(cost, now)
        if wait:
            assert limit.take(cost, now + wait * Fraction(999, 1000)) > 0
            now += wait
            assert limit.take(cost, now) == 0


def test_by_hand():
    bucket = TokenBucket(rate=2, burst=10)
    assert bucket.take(10, 0) == 0 and bucket.take(4, 1) == 1  # 2 came in, 2 are missing, 2 a second
    assert bucket.take(4, 2) == 0 and bucket.take(11, 100) == math.inf
    window = SlidingWindow(10, 5)
    assert window.take(6, 0) == 0 and window.take(4, 3) == 0 and window.take(5, 4) == 1 and window.take(5, 5) == 0


def test_a_bucket_is_full_again_and_no_fuller():
    bucket = TokenBucket(1, 5)
    bucket.take(5, 0)
    assert not bucket.idle(4) and bucket.idle(5) and bucket.take(5, 1000) == 0 and bucket.take(1, 1000) == 1


def test_a_fixed_window_admits_twice_its_limit_in_a_moment():
    steps = [(Fraction(9, 10), 10), (Fraction(1, 10), 10)]
    assert most_in_a_window(run(FixedWindow(10, 1), steps), 1) == 20
    assert most_in_a_window(run(SlidingWindow(10, 1), steps), 1) == 10


@pytest.mark.parametrize("limit", [TokenBucket(1, 10), SlidingWindow(10, 10)])
def test_a_clock_that_goes_back_gives_nothing(limit):
    assert limit.take(10, 100) == 0
    assert all(limit.take(1, moment) > 0 for moment in (50, 0, 100))


@pytest.mark.parametrize("limit", [TokenBucket(1, 10), SlidingWindow(10, 10)])
def test_settling_books_the_truth(limit):
    assert limit.take(8, 0) == 0 and limit.take(8, 0) > 0
    limit.settle(8, 2, 0)
    assert limit.take(8, 0) == 0 and limit.take(1, 0) > 0
    limit.settle(8, 12, 0)  # more than was booked: a debt of 4
    assert limit.take(1, 4 if isinstance(limit, TokenBucket) else 9) > 0
    assert limit.take(1, 10) == 0


@pytest.mark.parametrize("cost", [-1, math.nan, math.inf])
def test_costs_that_are_none(cost):
    for limit in (TokenBucket(1, 1), SlidingWindow(1, 1), FixedWindow(1, 1)):
        with pytest.raises(ValueError, match="a cost must be"):
            limit.take(cost, 0)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 1), (math.nan, 1), (math.inf, 1)])
def test_limits_that_are_none(numbers):
    for kind in (TokenBucket, SlidingWindow):
        with pytest.raises(ValueError, match="must be > 0"):
            kind(*numbers)


# Keys


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_keys_do_not_share_and_memory_is_bounded():
    clock = Clock()
    limiter = KeyedLimiter(LimitConfig(rate=1, burst=10, max_keys=3), clock)
    assert limiter.take("a", 10) == 0 and limiter.take("b", 10) == 0 and limiter.take("a", 1) == 1
    clock.now = 5
    assert limiter.take("c", 10) == 0
    clock.now = 11
    assert limiter.take("d", 1) == 0 and set(limiter.limits) == {"c", "d"}  # a and b are full again: as good as new
    for name in "efghij":
        limiter.take(name, 10)
    assert len(limiter.limits) == 3 and limiter.n_refused == 1


def test_the_cost_of_a_request_is_known_before_it_runs():
    chat = {"messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 50}
    assert 150 <= estimated_tokens(chat, 256) <= 170
    assert estimated_tokens(chat | {"n": 3}, 256) == estimated_tokens(chat, 256) + 100
    assert estimated_tokens({"prompt": "x" * 30}, 256) >= 256 + 10
    for strange in (None, -5, True, "9", 1.5):
        assert estimated_tokens({"prompt": "", "max_tokens": strange, "n": strange}, 256) >= 256
    assert used_tokens(b'{"usage": {"total_tokens": 7}}') == 7
    for body in (
        b"",
        b"[]",
        b'{"usage": null}',
        b'{"usage": {"total_tokens": -1}}',
        b'{"usage": {"total_tokens": "7"}}',
    ):
        assert used_tokens(body) is None


# In front of a server


def application(limiter: KeyedLimiter) -> tuple[TestClient, list]:
    app, seen = FastAPI(), []

    @app.post("/v1/chat/completions")
    async def chat(content: dict):
        seen.append(content)
        if content.get("bad"):
            return JSONResponse({"error": {"message": "bad"}}, 400)
        if content.get("stream"):
            return StreamingResponse(iter([b"data: [DONE]\n\n"]), media_type="text/event-stream")
        return {"choices": [], "usage": {"total_tokens": 20}}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    app.add_middleware(RateLimited, limiter=limiter)
    return TestClient(app), seen


BODY = {"messages": [], "max_tokens": 100}
A, B = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}


def test_429_names_the_time_and_another_key_is_not_concerned():
    clock = Clock()
    client, seen = application(KeyedLimiter(LimitConfig(rate=10, burst=110), clock))
    path = "/v1/chat/completions"
    assert client.post(path, json=BODY, headers=A).status_code == 200  # costs 100, then 20
    assert client.post(path, json=BODY | {"stream": True}, headers=A).status_code == 429  # 90 are left
    clock.now = 1.0
    assert client.post(path, json=BODY | {"stream": True}, headers=A).status_code == 200  # stays at 100
    refused = client.post(path, json=BODY, headers=A)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "10"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded" and "Bearer" not in refused.text
    assert client.post(path, json=BODY, headers=B).status_code == 200
    assert client.get("/health", headers=A).status_code == 200
    clock.now = 11.0
    assert client.post(path, json=BODY, headers=A).status_code == 200
    assert len(seen) == 4 and seen[0] == BODY  # the body arrives as it was sent


def test_what_can_never_pass_is_said_without_a_time():
    client, _ = application(KeyedLimiter(LimitConfig(rate=10, burst=50), Clock()))
    refused = client.post("/v1/chat/completions", json=BODY, headers=A)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "request_too_large")
    assert "retry-after" not in refused.headers


def test_a_request_that_the_server_refuses_costs_nothing():
    client, _ = application(KeyedLimiter(LimitConfig(rate=1, burst=110), Clock()))
    for _ in range(5):
        assert client.post("/v1/chat/completions", json=BODY | {"bad": True}, headers=A).status_code == 400
    assert client.post("/v1/chat/completions", json=BODY, headers=A).status_code == 200


def test_many_at_once_are_charged_before_they_run():
    limiter = KeyedLimiter(LimitConfig(rate=1, burst=350), Clock())
    assert [limiter.take("k", 100) > 0 for _ in range(6)] == [False] * 3 + [True] * 3


def test_bodies_that_are_no_requests():
    client, seen = application(KeyedLimiter(LimitConfig(rate=1, burst=1000, max_body=2000), Clock()))
    path = "/v1/chat/completions"
    assert client.post(path, content=b"x" * 3000, headers=A).status_code == 413
    assert client.post(path, content=b"[" * 1500, headers=A).status_code in (400, 422)
    assert client.post(path, content=json.dumps([1]).encode(), headers=A).status_code == 422 and not seen
    assert client.post("/v1/chat/completions", content=b"x" * 1990, headers=B).status_code in (400, 422)
    with pytest.raises(ValueError, match="rate"):
        LimitConfig(rate=0)
