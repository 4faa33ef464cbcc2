"""Tests of rate_limits: promises on time made of fractions, and in front of a server of topic 13's kind."""

import asyncio
import json
import math
from fractions import Fraction

import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from rate_limits import (
    FixedWindow,
    KeyedLimiter,
    LimitConfig,
    Overheard,
    RateLimited,
    SlidingWindow,
    TokenBucket,
    estimated_tokens,
    key_of,
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
    assert window.take(6, 0) == 0 and window.take(4, 3) == 0 and window.take(5, 4) == window.take(6, 4) == 1
    assert window.take(5, 5) == 0 and window.take(2, 5) == 3  # 4 and 5 are in it until the 4 leave
    at_once = SlidingWindow(10, 5)
    assert at_once.take(5, 0) == at_once.take(5, 0) == 0 and at_once.take(1, 4) == 1 and at_once.take(10, 5) == 0
    assert most_in_a_window([(0, 3), (5, 4)], 5) == 4 and most_in_a_window([(0, 3), (4, 4)], 5) == 7


def test_a_bucket_is_full_again_and_no_fuller():
    bucket = TokenBucket(1, 5)
    bucket.take(5, 0)
    assert not bucket.idle(4) and bucket.idle(5) and bucket.take(5, 1000) == 0 and bucket.take(1, 1000) == 1


def test_a_fixed_window_admits_twice_its_limit_in_a_moment():
    steps = [(Fraction(9, 10), 10), (Fraction(1, 10), 10)]
    assert most_in_a_window(run(FixedWindow(10, 1), steps), 1) == 20
    assert most_in_a_window(run(SlidingWindow(10, 1), steps), 1) == 10
    fixed = FixedWindow(10, 1)
    assert fixed.take(10, 0.5) == 0 and not fixed.idle(0.9) and fixed.idle(1.0)


@pytest.mark.parametrize("limit", [TokenBucket(1, 10), SlidingWindow(10, 10)])
def test_a_clock_that_goes_back_gives_nothing(limit):
    assert limit.take(10, 100) == 0
    assert all(limit.take(1, moment) > 0 for moment in (50, 0, 100))


def test_a_bucket_is_the_same_when_a_clock_that_went_back_comes_again():
    bucket = TokenBucket(1, 10)
    assert bucket.take(10, 100) == 0 and bucket.take(1, 50) == 1 and bucket.take(1, 101) == 0


def test_a_window_counts_from_the_latest_moment_and_gives_no_admission_back_twice():
    window = SlidingWindow(10, 10)
    assert window.take(10, 100) == 0 and window.take(1, 50) == 10
    window = SlidingWindow(10, 10)
    assert window.take(8, 0) == 0 and window.take(2, 1) == 0
    window.settle(8, 0, 1)  # more than the last admission holds: the rest is not given back
    assert window.take(3, 1) > 0 and window.take(10, 10) == 0 and window.take(1, 10) > 0
    window = SlidingWindow(10, 10)
    assert window.take(4, 0) == 0
    window.settle(4, 9, 20)  # known when it had left the window: from now on 5
    assert window.take(6, 20) == 10 and window.take(5, 20) == 0


def test_what_is_given_back_late_makes_no_bucket_fuller_than_full():
    bucket = TokenBucket(1, 10)
    assert bucket.take(8, 0) == 0
    bucket.settle(8, 2, 100)
    assert bucket.take(10, 100) == 0 and bucket.take(1, 100) == 1


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


def test_the_key_that_was_used_last_is_forgotten_last():
    limiter = KeyedLimiter(LimitConfig(rate=1, burst=10, max_keys=2), Clock())
    for name in ("a", "b", "a", "c"):
        limiter.take(name, 2)
    assert set(limiter.limits) == {"a", "c"}


def test_a_window_holds_its_rate_times_its_length():
    limit = LimitConfig(kind="window", rate=2, seconds=5).limit()
    assert limit.take(11, 0) == math.inf and limit.take(10, 0) == 0 and limit.take(1, 4) == 1


def test_whom_a_request_counts_for():
    def key(host: str | None, given: str = "") -> str:
        headers = [(b"authorization", given.encode())] if given else []
        return key_of(Request({"type": "http", "headers": headers, "client": host and (host, 5)}))

    assert key("10.0.0.1") == key("10.0.0.1") != key("10.0.0.2") != key(None)
    assert key("10.0.0.1", "Bearer a") == key("10.0.0.2", "Bearer a") != key("10.0.0.1", "Bearer b")
    assert key("10.0.0.2", "host 10.0.0.1") != key("10.0.0.1")  # nobody spends what is another's by writing his name
    assert "Bearer" not in key("10.0.0.1", "Bearer a")


@pytest.mark.parametrize(("kind", "kept"), [(b"application/json", 16), (b"text/event-stream", 0)])
def test_of_an_answer_no_more_is_kept_than_is_read(kind, kept):
    passed = []

    async def send(message: dict) -> None:
        passed.append(message)

    async def run() -> int:
        answer = Overheard(send, most=10)
        await answer({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", kind)]})
        for _ in range(5):
            await answer({"type": "http.response.body", "body": b"12345678", "more_body": True})
        return len(answer.body)

    assert asyncio.run(run()) == kept and len(passed) == 6


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


def test_only_work_costs_and_what_cannot_be_read_costs_its_length():
    limiter = KeyedLimiter(LimitConfig(rate=1, burst=1), Clock())
    client, _ = application(limiter)
    assert client.get("/v1/chat/completions", headers=A).status_code == 405  # asked of the application
    assert client.post("/other", json=BODY, headers=A).status_code == 404 and not limiter.limits
    limited = RateLimited(None, limiter)
    assert [limited.cost(body) for body in (b"x" * 90, b"x" * 91, b"[1]", b"[" * 3000)] == [30, 31, 1, 1000]
    assert [limited.refusal(5, wait).headers["Retry-After"] for wait in (0.2, 1, 1.5)] == ["1", "1", "2"]


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
