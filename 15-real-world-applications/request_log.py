"""Topic 15 - Request log: what happened, a line of JSON for each request, without what was said - and percentiles.

    log = RequestLog(folder / "requests.jsonl")
    log.write(messages, reply, tenant="a")         # {"time": ..., "question": hash, "n_prompt": 12, ...}
    log.latency.value(0.95)                        # seconds, from five numbers and not from all of them
    app.add_middleware(Observed, log=log)          # the same for every request to an application

What people ask is theirs. The log holds a keyed hash of it, so that equal questions can be counted, and no one who has
only the log can try likely questions against it. Jain and Chlamtac 1985 (CACM 28(10)) for the P-square algorithm.
Counters and histograms for Prometheus are topic 13's, at the server's /metrics.
"""

import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from chat_endpoint import Reply
from served_model import Messages
from server import SAFE_ID, route_of

MAX_FIELD = 200  # characters of a text in a line


class QuantileSketch:
    """One quantile of a stream from five numbers: heights that move along a parabola as values come (P-square).

    The estimate is exact up to five values. It has no bound of its error, and two of them cannot be put together: for
    several servers there are histograms, whose buckets are fixed beforehand.
    """

    def __init__(self, q: float) -> None:
        if not 0 < q < 1:
            raise ValueError(f"q={q} must be between 0 and 1, such as 0.95")
        self.q, self.n = q, 0
        self.heights: list[float] = []
        self.places = [1.0, 2.0, 3.0, 4.0, 5.0]  # of the heights among all values in order
        self.wanted = [1.0, 1 + 2 * q, 1 + 4 * q, 3 + 2 * q, 5.0]
        self.steps = [0.0, q / 2, q, (1 + q) / 2, 1.0]

    def add(self, value: float) -> None:
        """Take a value in. Raises ValueError for NaN, which has no place."""
        if value != value:
            raise ValueError("a value that is not a number has no place among others")
        self.n += 1
        if self.n <= 5:
            self.heights = sorted([*self.heights, float(value)])
            return
        heights = self.heights
        if value < heights[0]:
            heights[0], cell = float(value), 0
        elif value >= heights[4]:
            heights[4], cell = float(value), 3
        else:
            cell = next(index for index in range(4) if value < heights[index + 1])
        for index in range(cell + 1, 5):
            self.places[index] += 1
        self.wanted = [wanted + step for wanted, step in zip(self.wanted, self.steps, strict=True)]
        for index in (1, 2, 3):
            self.move(index)

    def move(self, index: int) -> None:
        """A middle height goes one place towards where it is wanted, if there is room."""
        gap, places = self.wanted[index] - self.places[index], self.places
        if gap >= 1 and places[index + 1] - places[index] > 1:
            sign = 1
        elif gap <= -1 and places[index - 1] - places[index] < -1:
            sign = -1
        else:
            return
        moved = self.parabola(index, sign)
        if not self.heights[index - 1] < moved < self.heights[index + 1]:
            moved = self.line(index, sign)
        self.heights[index] = moved
        places[index] += sign

    def parabola(self, index: int, sign: int) -> float:
        (left, own, right), (before, at, after) = (part[index - 1 : index + 2] for part in (self.heights, self.places))
        rising = (at - before + sign) * (right - own) / (after - at)
        falling = (after - at - sign) * (own - left) / (at - before)
        return own + sign / (after - before) * (rising + falling)

    def line(self, index: int, sign: int) -> float:
        other = index + sign
        slope = (self.heights[other] - self.heights[index]) / (self.places[other] - self.places[index])
        return self.heights[index] + sign * slope

    def value(self) -> float:
        """The estimate; NaN before the first value."""
        if not self.heights:
            return float("nan")
        if self.n <= 5:  # the order statistic, between two of them by a line
            place = self.q * (self.n - 1)
            low = int(place)
            high = min(low + 1, self.n - 1)
            return self.heights[low] + (place - low) * (self.heights[high] - self.heights[low])
        return self.heights[2]


class Percentiles:
    """Several quantiles of one stream."""

    def __init__(self, *qs: float) -> None:
        self.sketches = {q: QuantileSketch(q) for q in qs or (0.5, 0.95, 0.99)}

    def add(self, value: float) -> None:
        for sketch in self.sketches.values():
            sketch.add(value)

    def value(self, q: float) -> float:
        """Raises ValueError for a quantile that is not kept."""
        if q not in self.sketches:
            raise ValueError(f"the quantile {q} is not kept; there are {', '.join(map(str, self.sketches))}")
        return self.sketches[q].value()


class RequestLog:
    """Lines of JSON in a file, written by any number of threads; the file before is kept as FILE.1.

    Args:
        path: the file; None keeps counts and percentiles alone
        key: of the hashes; None draws one, and then hashes of two runs cannot be compared
        contents: also write what was asked and answered; only where everybody concerned knows it
        max_bytes: at which the file is put aside
        clock: seconds since 1970
    """

    def __init__(
        self,
        path: Path | None = None,
        key: bytes | None = None,
        contents: bool = False,
        max_bytes: int = 10_000_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1")
        self.path, self.contents, self.max_bytes, self.clock = path, contents, max_bytes, clock
        self.key = key or secrets.token_bytes(32)
        self.lock = threading.Lock()
        self.latency = Percentiles()  # seconds
        self.n_requests = self.n_errors = self.n_prompt = self.n_generated = 0

    def hash_of(self, text: str) -> str:
        """16 hexadecimal digits; equal for equal texts of one key."""
        return hmac.new(self.key, text.encode("utf-8", "surrogatepass"), sha256).hexdigest()[:16]

    def write(
        self, messages: Messages, reply: Reply | None, tenant: str = "", error: str = "", seconds: float | None = None
    ) -> None:
        """One exchange with a model; without a reply, the error is what is known. An error's text is not logged.

        Texts of errors repeat what was asked ("no tool 'my secret'"); their kind, given as `error`, does not.
        """
        asked = json.dumps(list(messages), ensure_ascii=False)
        line: dict[str, Any] = {"question": self.hash_of(asked), "n_messages": len(messages)}
        if reply is not None:
            line |= {"answer": self.hash_of(reply.text), "finish_reason": reply.finish_reason}
            line |= {"n_prompt": reply.n_prompt, "n_generated": reply.n_generated}
            seconds = reply.seconds if seconds is None else seconds
        if self.contents:
            line |= {"messages": list(messages)} | ({"text": reply.text} if reply else {})
        if tenant:
            line["tenant"] = self.hash_of(tenant)
        self.add(line, seconds, error)

    def add(self, line: dict[str, Any], seconds: float | None, error: str = "") -> None:
        """Write a line with the time; error: the kind of what went wrong, a word."""
        made = {"time": round(self.clock(), 3)} | line
        if seconds is not None:
            made["seconds"] = round(seconds, 4)
        if error:
            made["error"] = error[:MAX_FIELD]
        data = (json.dumps(made, ensure_ascii=True) + "\n").encode()  # ASCII: no control character, no line of its own
        with self.lock:
            self.n_requests += 1
            self.n_errors += bool(error)
            self.n_prompt += line.get("n_prompt", 0)
            self.n_generated += line.get("n_generated", 0)
            if seconds is not None:
                self.latency.add(seconds)
            if self.path is not None:
                self.append(data)

    def append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size + len(data) > self.max_bytes:
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # the owner's alone
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def summary(self) -> dict[str, float]:
        """Counts, and percentiles of the seconds."""
        with self.lock:
            counts = {name: getattr(self, name) for name in ("n_requests", "n_errors", "n_prompt", "n_generated")}
            return counts | {f"p{100 * q:.0f}": sketch.value() for q, sketch in self.latency.sketches.items()}


class Observed:
    """ASGI middleware: a line for each request, with route, status, size and time, and nothing that was said."""

    def __init__(self, app: Callable, log: RequestLog, clock: Callable[[], float] = time.perf_counter) -> None:
        self.app, self.log, self.clock = app, log, clock

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, first = self.clock(), None
        status, size = 499, 0  # the client left before there was one

        async def overheard(message: dict) -> None:
            nonlocal status, size, first
            if message["type"] == "http.response.start":
                status, first = message["status"], self.clock()
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        failed = ""
        try:
            await self.app(scope, receive, overheard)
        except Exception as error:
            failed = type(error).__name__
            raise
        finally:
            line = {"route": route_of(scope["path"]), "method": scope["method"][:10], "status": status, "bytes": size}
            if SAFE_ID.fullmatch(given):
                line["id"] = given
            if first is not None:
                line["first"] = round(first - start, 4)
            kind = failed or (f"status {status}" if status >= 400 else "")
            self.log.add(line, self.clock() - start, kind)
