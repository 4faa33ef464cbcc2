"""Topic 13 - Dynamic batching: three rules for who may start when, on the clock of the machine or on one that counts.

    rule = BatchRule(max_batch=8, window=0.05)                   # dynamic; window=inf: static; joins=True: continuous
    served = serve_arrivals(engine, jobs, moments, rule, CountedClock(cost))
    python 13-inference-at-scale/inference_at_scale.py figures batching

A batch that nobody may join runs to its longest answer, and the rows of those who are done before it still cost.
Continuous batching: Yu et al. 2022 (OSDI), section 3.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine_requests import RequestParams
from load_generator import Record
from serving_bench import Job
from serving_engine import Engine
from workbench import check_range


@dataclass(frozen=True)
class BatchRule:
    """Who may start when."""

    max_batch: int = 8  # rows that run at once
    window: float = 0.05  # seconds for which the oldest request may be kept waiting for company; inf: until it is full
    joins: bool = False  # whether requests may join a batch that runs

    def __post_init__(self) -> None:
        check_range(self, "max_batch", least=1)
        if not self.window >= 0:  # NaN, too
            raise ValueError(f"window must be >= 0 seconds (inf: until the batch is full), got {self.window}")

    def n_start(self, due: Sequence[float], n_running: int, now: float) -> int:
        """How many of the waiting requests start now; `due`: when each arrived, the oldest first."""
        room = min(len(due), self.max_batch - n_running)
        if self.joins or room == 0:
            return room
        ready = len(due) >= self.max_batch or now >= self.expires(due)
        return room if ready and not n_running else 0

    def expires(self, due: Sequence[float]) -> float:
        """When the oldest has waited enough; a window that began anew with each arrival might never end."""
        return due[0] + self.window if due else math.inf


class StepCost(NamedTuple):
    """Seconds of an engine step: a fixed part, one for each row, and one for each token of a prompt."""

    fixed: float
    per_row: float
    per_token: float

    def seconds(self, n_rows: int, n_tokens: int) -> float:
        return self.fixed + self.per_row * n_rows + self.per_token * n_tokens


class Clock(Protocol):
    now: float  # seconds since the beginning

    def spend(self, n_rows: int, n_tokens: int) -> None: ...

    def wait_until(self, moment: float) -> None: ...


class CountedClock:
    """Time that passes by what is counted: the same on every machine and beside every neighbour."""

    def __init__(self, cost: StepCost) -> None:
        self.cost, self.now = cost, 0.0

    def spend(self, n_rows: int, n_tokens: int) -> None:
        self.now += self.cost.seconds(n_rows, n_tokens)

    def wait_until(self, moment: float) -> None:
        self.now = max(self.now, moment)


class WallClock:
    """The machine's time; the step itself has spent it."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self.begin

    def spend(self, n_rows: int, n_tokens: int) -> None:
        """Nothing to add."""

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now))


@dataclass
class ArrivalsServed:
    """What became of a stream of requests."""

    records: list[Record]  # seconds from the beginning
    ids: list[list[int]]
    steps: int = 0
    slots: int = 0  # rows of all steps
    live: int = 0  # of those, rows whose request had not ended
    starts: list[int] = field(default_factory=list)  # requests that started together

    @property
    def wasted(self) -> float:
        """Share of rows whose request had ended."""
        return 1 - self.live / self.slots

    @property
    def throughput(self) -> float:
        """Answers per second until the last one is complete."""
        return len(self.records) / max(record.last for record in self.records)


def serve_arrivals(
    engine: Engine, jobs: Sequence[Job], moments: Sequence[float], rule: BatchRule, clock: Clock
) -> ArrivalsServed:
    """Let each job arrive at its moment (in order) and run the engine by the rule until all are answered.

    A batch is as wide as it started, until its last request has ended. When nobody else will come, those who would wait
    for ever start although they fill no batch.
    """
    served = ArrivalsServed([Record(due) for due in moments], [[] for _ in jobs])
    n_arrived, n_started, width = 0, 0, 0
    while n_started < len(jobs) or engine.busy:
        while n_arrived < len(jobs) and moments[n_arrived] <= clock.now:
            n_arrived += 1
        n_running, due = len(engine.requests), moments[n_started:n_arrived]
        n_new = rule.n_start(due, n_running, clock.now)
        if not n_running and n_arrived == len(jobs) and rule.window == math.inf:
            n_new = min(len(due), rule.max_batch)
        for index in range(n_started, n_started + n_new):
            params = RequestParams(jobs[index].n_new, temperature=0, ignore_eos=True)
            engine.add(jobs[index].prompt, params, str(index))
        n_started += n_new
        if n_new:
            served.starts.append(n_new)
            width = n_new
        if not engine.busy:
            coming = moments[n_arrived] if n_arrived < len(jobs) else math.inf
            clock.wait_until(min(coming, rule.expires(due)))
            continue
        live, read = len(engine.requests), engine.prompt_tokens
        outputs = engine.step()
        slots = live if rule.joins else width
        clock.spend(slots, engine.prompt_tokens - read)
        served.steps, served.slots, served.live = served.steps + 1, served.slots + slots, served.live + live
        for output in outputs:
            record = served.records[int(output.request_id)]
            served.ids[int(output.request_id)] += output.new_ids
            record.first, record.last = record.first or clock.now, clock.now
            record.n_tokens, record.outcome = output.n_generated, "ok"
    return served
