"""Topic 13 - Load Generator: clients that arrive by chance or wait for their answers, and what they measured.

python 13-inference-at-scale/inference_at_scale.py load --url http://127.0.0.1:8000 --rate 8     # open loop
python 13-inference-at-scale/inference_at_scale.py load --kind closed --n-clients 16             # closed loop

An open loop sends at moments that do not depend on the server (Poisson arrivals), as strangers do; when the server is
too slow the queue grows, and so do the times. A closed loop sends the next request after the last answer, so that a
slow server is asked less: it measures the highest throughput and hides the waiting. Times count from the moment at
which a request was due, not from when the generator came to send it (Tene's "coordinated omission").

Works with any server that speaks OpenAI's API; ours also takes ignore_eos, which makes answers of a known length.
"""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from http_streams import NoAnswer, call, check_url, events
from tiny_world import World, join
from workbench import RunConfig, announce, check_range, shown, write_atomically

SAMPLE_EVERY = 0.02  # seconds between two looks at how many requests there are


@dataclass(frozen=True)
class LoadConfig:
    """Who asks, how often, and what counts as good."""

    url: str = "http://127.0.0.1:8000"  # the server
    served: str = ""  # the model's name; empty asks the server
    api_key: str = "none"  # what is sent as the API key
    kind: Literal["open", "closed"] = "open"  # arrivals by chance, or clients that wait for their answers
    rate: float = 4.0  # open loop: requests per second on average
    n_clients: int = 8  # closed loop: clients, each with one request at a time
    n_requests: int = 64  # in all
    least_tokens: int = 8  # shortest answer
    most_tokens: int = 64  # longest answer; lengths between the two are equally likely
    ignore_eos: bool = True  # answers have exactly the length that was asked for; only our server and vLLM know it
    ttft_limit: float = 0.5  # seconds to the first token that are still good
    tpot_limit: float = 0.1  # seconds from token to token that are still good

    def __post_init__(self) -> None:
        check_url(self.url)
        check_range(self, "rate", "ttft_limit", "tpot_limit", above=0)
        check_range(self, "n_clients", "n_requests", "least_tokens", least=1)
        check_range(self, "most_tokens", least=self.least_tokens)


@dataclass
class Record:
    """One request: moments in seconds of one clock."""

    due: float  # when it was to be sent
    sent: float = 0.0
    first: float = 0.0  # its first text came
    last: float = 0.0  # its last text came
    n_tokens: int = 0
    outcome: str = "failed"  # ok, refused (429 or 503) or failed
    reason: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.due

    @property
    def tpot(self) -> float:
        """Seconds between two tokens on average; 0 for an answer of one."""
        return (self.last - self.first) / (self.n_tokens - 1) if self.n_tokens > 1 else 0.0

    @property
    def latency(self) -> float:
        return self.last - self.due


@dataclass
class LoadRun:
    """What one run saw."""

    records: list[Record]
    seconds: float  # from the first arrival to the last answer
    in_system: list[tuple[float, float]] = field(default_factory=list)  # (moment, requests without their whole answer)
    on_server: list[tuple[float, float]] = field(default_factory=list)  # (moment, running and waiting by its /metrics)


def arrivals(config: LoadConfig, seed: int) -> list[float]:
    """Moments of Poisson arrivals, seconds from the start: the gaps are exponential with mean 1 / rate."""
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(config.n_requests):
        found.append(now)
        now += rng.expovariate(config.rate)
    return found


def bodies(config: LoadConfig, served: str, seed: int) -> Iterator[bytes]:
    """Requests: TinyWorld's instructions as chats, with answers of mixed lengths."""
    rng = random.Random(seed)
    for instruction in World().instructions(config.n_requests, seed, "train"):
        content = {
            "model": served,
            "messages": [{"role": "user", "content": join(instruction.prompt)}],
            "max_tokens": rng.randint(config.least_tokens, config.most_tokens),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        yield json.dumps(content | ({"ignore_eos": True} if config.ignore_eos else {})).encode()


def headers_of(config: LoadConfig) -> dict[str, str]:
    return {"content-type": "application/json", "authorization": f"Bearer {config.api_key}"}


async def one_request(config: LoadConfig, body: bytes, record: Record) -> Record:
    """Send one request and note when what of its answer came."""
    record.sent = time.perf_counter()
    n_pieces = 0
    try:
        url = check_url(config.url)
        async with call(url, "POST", "/v1/chat/completions", body, headers_of(config)) as reply:
            if reply.status != 200:
                record.outcome = "refused" if reply.status in (429, 503) else "failed"
                record.reason = f"{reply.status} {(await reply.body())[:200].decode(errors='replace')}"
                record.last = time.perf_counter()
                return record
            async for event in events(reply.pieces):
                if "error" in event:
                    raise NoAnswer(str(event["error"].get("message")))
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    record.last = time.perf_counter()
                    record.first = record.first or record.last
                    n_pieces += 1
                if event.get("usage"):
                    record.n_tokens = event["usage"]["completion_tokens"]
    except (NoAnswer, ValueError, LookupError) as error:  # broken off, or not OpenAI's API
        record.reason, record.last = str(error), time.perf_counter()
        return record
    record.n_tokens = record.n_tokens or n_pieces
    record.last = time.perf_counter()
    record.first = record.first or record.last  # nothing but an end
    record.outcome = "ok"
    return record


async def run_load(config: LoadConfig, seed: int = 0) -> LoadRun:
    """Send all requests of a config, open or closed loop. Raises ValueError if the server does not answer at all."""
    served = config.served or await ask_name(config)
    requests = list(bodies(config, served, seed))
    run = LoadRun([], 0.0)
    start = time.perf_counter()
    n_open = 0  # requests in the system now

    async def one(body: bytes, due: float) -> None:
        nonlocal n_open
        n_open += 1
        run.records.append(record := Record(due))
        await one_request(config, body, record)
        n_open -= 1

    async def client(queue: Iterator[bytes]) -> None:
        for body in queue:
            await one(body, time.perf_counter())

    async def look() -> None:
        while True:
            run.in_system.append((time.perf_counter(), n_open))
            await asyncio.sleep(SAMPLE_EVERY)

    looking = [asyncio.create_task(look()), asyncio.create_task(watch_server(config, run.on_server))]
    if config.kind == "open":
        tasks = []
        for body, moment in zip(requests, arrivals(config, seed), strict=True):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(one(body, start + moment)))
        await asyncio.gather(*tasks)
    else:
        queue = iter(requests)  # shared: whoever is free takes the next
        await asyncio.gather(*(client(queue) for _ in range(config.n_clients)))
    run.seconds = time.perf_counter() - start
    for task in looking:
        task.cancel()
    await asyncio.gather(*looking, return_exceptions=True)
    return run


async def ask_name(config: LoadConfig) -> str:
    """The first model that the server has."""
    try:
        async with call(check_url(config.url), "GET", "/v1/models", headers=headers_of(config), timeout=30) as reply:
            body = await reply.body()
            return json.loads(body)["data"][0]["id"]
    except (NoAnswer, ValueError, LookupError) as error:
        raise ValueError(f"{config.url} names no model ({error}); start a server there, or check --url") from None


async def watch_server(config: LoadConfig, seen: list[tuple[float, float]]) -> None:
    """Ask the server now and then how many requests it has; one without our /metrics is not asked again."""
    while True:
        with contextlib.suppress(NoAnswer):
            async with call(check_url(config.url), "GET", "/metrics", timeout=30) as reply:
                text = (await reply.body()).decode(errors="replace")
            counts = re.findall(r"^course_(?:running|waiting) (\S+)$", text, re.MULTILINE)
            if len(counts) != 2:
                return
            seen.append((time.perf_counter(), sum(map(float, counts))))
        await asyncio.sleep(10 * SAMPLE_EVERY)


# What the records say


@dataclass(frozen=True)
class LoadReport:
    """A run in numbers: seconds, requests per second, tokens per second."""

    n_ok: int
    n_refused: int
    n_failed: int
    seconds: float
    offered: float  # requests per second that arrived
    throughput: float  # requests per second that were answered
    tokens_per_second: float
    ttft: dict[str, float]  # p50, p95, p99
    tpot: dict[str, float]
    latency: dict[str, float]
    good: float  # share of all requests that were answered within both limits
    goodput: float  # such requests per second
    mean_in_system: float  # L: seen now and then, over time
    rate_times_time: float  # lambda W: requests per second times their mean time
    mean_on_server: float | None  # as the server's own /metrics said


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return dict.fromkeys(("p50", "p95", "p99"), float("nan"))
    return dict(zip(("p50", "p95", "p99"), np.percentile(values, (50, 95, 99)).tolist(), strict=True))


def mean_over_time(seen: list[tuple[float, float]]) -> float | None:
    """The mean of what was seen, each value for as long as it was the newest; None without an interval.

    A plain mean would be too low: a busy machine looks less often just when much is going on.
    """
    if len(seen) < 2:
        return None
    moments, values = (np.array(column, dtype=float) for column in zip(*seen, strict=True))
    return float((np.diff(moments) * values[:-1]).sum() / (moments[-1] - moments[0]))


def report_of(run: LoadRun, config: LoadConfig) -> LoadReport:
    """Summarise a run. Refused and failed requests are in no percentile, but they are not good."""
    records, ok = run.records, [record for record in run.records if record.outcome == "ok"]
    good = [item for item in ok if item.ttft <= config.ttft_limit and item.tpot <= config.tpot_limit]
    span = max(record.due for record in records) - min(record.due for record in records)
    refused = sum(record.outcome == "refused" for record in records)
    return LoadReport(
        n_ok=len(ok),
        n_refused=refused,
        n_failed=len(records) - len(ok) - refused,
        seconds=run.seconds,
        offered=(len(records) - 1) / span if span else float("inf"),
        throughput=len(ok) / run.seconds,
        tokens_per_second=sum(record.n_tokens for record in ok) / run.seconds,
        ttft=percentiles([record.ttft for record in ok]),
        tpot=percentiles([record.tpot for record in ok if record.n_tokens > 1]),
        latency=percentiles([record.latency for record in ok]),
        good=len(good) / len(records),
        goodput=len(good) / run.seconds,
        mean_in_system=mean_over_time(run.in_system) or 0.0,
        rate_times_time=len(records) / run.seconds * float(np.mean([record.latency for record in records])),
        mean_on_server=mean_over_time(run.on_server),
    )


def show_report(report: LoadReport, config: LoadConfig) -> None:
    print(f"{report.n_ok} answered, {report.n_refused} refused, {report.n_failed} failed in {report.seconds:.1f} s")
    rates = f"{report.throughput:.2f} requests/s of {report.offered:.2f} offered"
    print(f"throughput: {rates}, {report.tokens_per_second:.0f} tokens/s")
    for name in ("ttft", "tpot", "latency"):
        values = getattr(report, name)
        print(f"{name:8} " + "  ".join(f"{key} {1e3 * value:8.1f} ms" for key, value in values.items()))
    limits = f"first token within {config.ttft_limit:g} s, then {config.tpot_limit:g} s each"
    print(f"goodput: {report.goodput:.2f} requests/s, {report.good:.1%} of all ({limits})")
    server = "" if report.mean_on_server is None else f", {report.mean_on_server:.2f} by the server's own account"
    law = f"{report.mean_in_system:.2f} requests seen in the system, rate x time = {report.rate_times_time:.2f}"
    print(f"Little's law: {law}{server}")


def load(config: LoadConfig, run: RunConfig) -> None:
    """Put a server under load and report times to the first token, per token and in all, goodput and Little's law."""
    plan = f"{config.n_requests} requests, " + (
        f"{config.rate:g} a second by chance" if config.kind == "open" else f"{config.n_clients} clients"
    )
    announce(plan, config.n_requests / config.rate if config.kind == "open" else config.n_requests / 4)
    found = asyncio.run(run_load(config, run.seed))
    report = report_of(found, config)
    show_report(report, config)
    settings = {name: value for name, value in asdict(config).items() if name != "api_key"}
    content: dict[str, Any] = {"config": settings, "report": asdict(report)}
    content["records"] = [asdict(record) for record in found.records]
    path = run.out / "load.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print(f"wrote {shown(path)}")
    if report.n_failed:
        reasons = {record.reason for record in found.records if record.outcome == "failed"}
        raise ValueError(f"{report.n_failed} requests failed, such as: {sorted(reasons)[0][:300]}")


LOAD_VERBS: dict[str, tuple[Any, ...]] = {"load": (load, LoadConfig, RunConfig)}
