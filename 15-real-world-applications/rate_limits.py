"""Topic 15 - Rate limits: how much of a server one key may use - a promise that holds in every window of time.

    bucket = TokenBucket(rate=50, burst=200)             # tokens of text per second, and at once
    bucket.take(120, now=0.0)                            # 0.0: admitted; else the seconds to wait
    app.add_middleware(RateLimited, limiter=KeyedLimiter(LimitConfig(rate=50, burst=200)))   # 429 + Retry-After

The clock is an argument: nothing here waits or reads the time, so that the promises are tested exactly, on time made of
fractions. A language model's requests differ a thousandfold in cost; what is counted is tokens, not requests. Turner
1986 ("New directions in communications", IEEE Communications Magazine 24(10)) for the leaky bucket.
"""

import json
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from numbers import Real
from typing import Any, Literal, Protocol

from fastapi import Request
from starlette.requests import ClientDisconnect

from http_limits import read_body
from server import error_response
from server_schema import ApiError
from workbench import check_range

CHARS_PER_TOKEN = 3  # of a prompt whose tokens nobody has counted yet; fewer would charge too little


class Limit(Protocol):
    """A limit for one key."""

    def take(self, cost: Real, now: Real) -> Real:
        """0 and the cost is booked, or the seconds after which it could be; infinite for what can never be."""

    def settle(self, booked: Real, cost: Real, now: Real) -> None:
        """The true cost of something that was booked with an estimate."""

    def idle(self, now: Real) -> bool:
        """Whether forgetting the limit's state would change nothing."""


class TokenBucket:
    """A bucket that fills with `rate` per second up to `burst`; a cost is taken out of it or refused.

    In every window of w seconds at most burst + rate w is admitted: what a window takes out was in the bucket at its
    start, at most burst, or came in during it, rate w. Numbers may be Fractions, and then all is exact.
    """

    def __init__(self, rate: Real, burst: Real) -> None:
        if not (rate > 0 and burst > 0 and math.isfinite(rate) and math.isfinite(burst)):
            raise ValueError(f"rate={rate} and burst={burst} must be > 0 and finite")
        self.rate, self.burst = rate, burst
        self.level, self.at = burst, None  # what is in the bucket, and when it was so

    def fill(self, now: Real) -> None:
        """What came in since; a clock that goes back brings nothing."""
        if self.at is None or now > self.at:
            self.level = min(self.burst, self.level + self.rate * (0 if self.at is None else now - self.at))
            self.at = now

    def take(self, cost: Real, now: Real) -> Real:
        check_cost(cost)
        if cost > self.burst:
            return math.inf
        self.fill(now)
        if cost <= self.level:
            self.level -= cost
            return 0
        return (cost - self.level) / self.rate

    def settle(self, booked: Real, cost: Real, now: Real) -> None:
        """Give back what was booked too much; what was booked too little becomes a debt that is filled up first."""
        check_cost(cost)
        self.fill(now)
        self.level = min(self.burst, self.level + booked - cost)

    def idle(self, now: Real) -> bool:
        self.fill(now)
        return self.level >= self.burst


class SlidingWindow:
    """At most `limit` in every window of `seconds`, exactly, by a list of what was admitted.

    It has no burst on top of a rate, and it costs memory for every admission of the last window, where the bucket costs
    two numbers; admissions of one moment are kept as one.
    """

    def __init__(self, limit: Real, seconds: Real) -> None:
        if not (limit > 0 and seconds > 0 and math.isfinite(limit) and math.isfinite(seconds)):
            raise ValueError(f"limit={limit} and seconds={seconds} must be > 0 and finite")
        self.limit, self.seconds = limit, seconds
        self.taken: deque[list] = deque()  # [moment, cost], oldest first
        self.total: Real = 0
        self.latest: Real = -math.inf

    def forget(self, now: Real) -> Real:
        """Drop what has left the window; the moment, which never goes back."""
        self.latest = now = max(now, self.latest)
        while self.taken and now - self.taken[0][0] >= self.seconds:
            self.total -= self.taken.popleft()[1]
        return now

    def take(self, cost: Real, now: Real) -> Real:
        check_cost(cost)
        if cost > self.limit:
            return math.inf
        now = self.forget(now)
        if self.total + cost <= self.limit:
            if self.taken and self.taken[-1][0] == now:
                self.taken[-1][1] += cost
            else:
                self.taken.append([now, cost])
            self.total += cost
            return 0
        left = self.total + cost - self.limit  # has to leave the window first
        for moment, spent in self.taken:
            left -= spent
            if left <= 0:
                return moment + self.seconds - now
        return self.seconds

    def settle(self, booked: Real, cost: Real, now: Real) -> None:
        """Book the difference to the last admission; the window then may hold more than its limit for a while."""
        check_cost(cost)
        now = self.forget(now)
        if not self.taken:
            self.taken.append([now, 0])
        change = max(cost - booked, -self.taken[-1][1])
        self.taken[-1][1] += change
        self.total += change

    def idle(self, now: Real) -> bool:
        self.forget(now)
        return not self.total


class FixedWindow:
    """The trap: a counter that starts anew at each full `seconds` admits twice its limit around such a moment."""

    def __init__(self, limit: Real, seconds: Real) -> None:
        self.limit, self.seconds = limit, seconds
        self.window, self.total = None, 0

    def take(self, cost: Real, now: Real) -> Real:
        check_cost(cost)
        window = now // self.seconds
        if window != self.window:
            self.window, self.total = window, 0
        if self.total + cost <= self.limit:
            self.total += cost
            return 0
        return math.inf if cost > self.limit else (window + 1) * self.seconds - now

    def settle(self, booked: Real, cost: Real, now: Real) -> None:
        self.total += cost - booked

    def idle(self, now: Real) -> bool:
        return now // self.seconds != self.window


def check_cost(cost: Real) -> None:
    if not (cost >= 0 and math.isfinite(cost)):
        raise ValueError(f"a cost must be >= 0 and finite, got {cost}")


def most_in_a_window(admitted: list[tuple[Real, Real]], seconds: Real) -> Real:
    """The largest sum of costs in any half-open window of this length; admitted: (moment, cost) in order of time.

    A window that holds most can be moved until it begins at an admission, so only those are looked at.
    """
    most, total, last = 0, 0, 0
    for moment, cost in admitted:
        total += cost
        while admitted[last][0] <= moment - seconds:
            total -= admitted[last][1]
            last += 1
        most = max(most, total)
    return most


# One limit for each key


@dataclass(frozen=True)
class LimitConfig:
    """What one key may use."""

    kind: Literal["bucket", "window"] = "bucket"  # a rate with a burst, or a sum in every window
    rate: float = 200.0  # tokens of text per second; of a window: its limit divided by its length
    burst: float = 4000.0  # bucket: tokens at once
    seconds: float = 60.0  # window: its length
    max_keys: int = 10_000  # keys that are remembered
    default_tokens: int = 256  # what an answer is taken to have if the request does not say
    max_body: int = 1_000_000  # bytes of a request's body

    def __post_init__(self) -> None:
        check_range(self, "rate", "burst", "seconds", above=0)
        check_range(self, "max_keys", "default_tokens", "max_body", least=1)

    def limit(self) -> Limit:
        return (
            TokenBucket(self.rate, self.burst)
            if self.kind == "bucket"
            else SlidingWindow(self.rate * self.seconds, self.seconds)
        )


class KeyedLimiter:
    """A limit for each key, those forgotten first whose state would be the same as a new one's.

    If none such is left, the least recently used goes: with more than max_keys keys at work a key may get more than its
    promise, which is why keys should be those that somebody gave out, not whatever a client sends.
    """

    def __init__(self, config: LimitConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.clock = config or LimitConfig(), clock
        self.limits: OrderedDict[str, Limit] = OrderedDict()
        self.n_refused = 0

    def take(self, key: str, cost: float) -> float:
        limit = self.limits.setdefault(key, self.config.limit())
        self.limits.move_to_end(key)
        wait = limit.take(cost, self.clock())
        self.n_refused += wait > 0
        if len(self.limits) > self.config.max_keys:
            self.shrink()
        return wait

    def settle(self, key: str, booked: float, cost: float) -> None:
        if key in self.limits:
            self.limits[key].settle(booked, cost, self.clock())

    def shrink(self) -> None:
        now = self.clock()
        for key in [key for key, limit in self.limits.items() if limit.idle(now)]:
            del self.limits[key]
        while len(self.limits) > self.config.max_keys:
            self.limits.popitem(last=False)


# In front of a server


def estimated_tokens(content: dict[str, Any], default: int) -> int:
    """What a request will cost at most, before it runs: its prompt by its characters, and all that it asks for."""
    messages = content.get("messages")
    texts = [content.get("prompt")] if not isinstance(messages, list) else messages
    n_chars = sum(len(json.dumps(text, ensure_ascii=False)) for text in texts)
    asked = [content.get("max_tokens"), content.get("max_completion_tokens"), default]
    longest = next((value for value in asked if type(value) is int and value >= 0), default)
    n_answers = content.get("n")
    n_answers = n_answers if type(n_answers) is int and 1 <= n_answers <= 128 else 1
    return -(-n_chars // CHARS_PER_TOKEN) + n_answers * longest


def used_tokens(body: bytes) -> int | None:
    """What an answer says that it cost; None if it does not say it."""
    try:
        usage = json.loads(body)["usage"]
        total = usage["total_tokens"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return total if type(total) is int and total >= 0 else None


def key_of(request: Request) -> str:
    """Whom a request counts for: the hash of its API key, else its address. A key is never kept as it is."""
    given = request.headers.get("authorization", "")
    host = request.client.host if request.client else ""
    return sha256((f"key {given}" if given else f"host {host}").encode()).hexdigest()  # no key is another's host


class RateLimited:
    """ASGI middleware: requests to /v1 cost tokens; those for which there are none get 429 with Retry-After.

    The cost is booked before the request runs, by estimate, so that a hundred requests at once cannot all pass a limit
    that none of them has used yet; it is settled when the answer says what it was. A stream that does not say it stays
    at its estimate.
    """

    def __init__(self, app: Callable, limiter: KeyedLimiter) -> None:
        self.app, self.limiter = app, limiter

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1"):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = await read_body(request, self.limiter.config.max_body)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        key, cost = key_of(request), self.cost(body)
        wait = self.limiter.take(key, cost)
        if wait:
            await error_response(self.refusal(cost, wait))(scope, receive, send)
            return
        answer = Overheard(send)
        try:
            await self.app(scope, replayed(body, receive), answer)
        finally:
            used = 0 if answer.refused else used_tokens(bytes(answer.body))
            if used is not None:
                self.limiter.settle(key, cost, used)

    def cost(self, body: bytes) -> int:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            return -(-len(body) // CHARS_PER_TOKEN)
        return estimated_tokens(content, self.limiter.config.default_tokens)

    def refusal(self, cost: float, wait: float) -> ApiError:
        if math.isinf(wait):
            message = f"this request costs up to {cost} tokens, more than is ever allowed at once; ask for less"
            return ApiError(429, message, "request_too_large")
        seconds = math.ceil(wait)
        message = f"the rate limit of this key is reached; try again in {seconds} s"
        return ApiError(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})


class Overheard:
    """Passes an answer on and keeps a whole one's body, up to a limit, for the tokens that it reports."""

    def __init__(self, send: Callable, most: int = 1_000_000) -> None:
        self.send, self.most = send, most
        self.body, self.refused, self.whole = bytearray(), False, False

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.refused = message["status"] >= 400  # nothing was computed
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self.whole = bool(kinds) and kinds[0].startswith(b"application/json")
        elif self.whole and len(self.body) < self.most:
            self.body += message.get("body", b"")
        await self.send(message)


def replayed(body: bytes, receive: Callable) -> Callable:
    """A request's `receive` whose body has been read already."""
    sent = False

    async def again() -> dict:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
