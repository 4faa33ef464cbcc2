"""Topic 13 - Dynamic batching: three rules for who may start when, by counted steps or on the real engine.

    rule = BatchRule(max_batch=8, window=0.05)                   # dynamic; window=inf: static; joins=True: continuous
    served = serve_arrivals(CountedEngine(), jobs, moments, rule, CountedClock(cost))
    python 13-inference-at-scale/inference_at_scale.py figures batching

A batch that nobody may join runs to its longest answer, and the rows of those who are done before it still cost.
Continuous batching: Yu et al. 2022 (OSDI), section 3.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from engine_requests import RequestOutput, RequestParams
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


class ProcessClock:
    """Seconds that this process has computed, and those that it would have slept: other processes take none of them."""

    def __init__(self) -> None:
        self.begin, self.slept = time.process_time(), 0.0

    @property
    def now(self) -> float:
        return time.process_time() - self.begin + self.slept

    def spend(self, n_rows: int, n_tokens: int) -> None:
        """Nothing to add: the step itself has spent it."""

    def wait_until(self, moment: float) -> None:
        self.slept += max(0.0, moment - self.now)


class CountedEngine:
    """An engine without a model, for counting: a step reads all new prompts and gives every request a token."""

    def __init__(self) -> None:
        self.requests: dict[str, list[int]] = {}  # tokens made, tokens wanted, tokens of a prompt still to be read
        self.prompt_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def add(self, prompt: Sequence[int], params: RequestParams, request_id: str) -> None:
        self.requests[request_id] = [0, params.max_tokens, len(prompt)]

    def step(self) -> list[RequestOutput]:
        outputs = []
        for request_id, (made, wanted, unread) in list(self.requests.items()):
            self.prompt_tokens += unread
            self.requests[request_id] = [made + 1, wanted, 0]
            if made + 1 == wanted:
                del self.requests[request_id]
            outputs.append(RequestOutput(request_id, [], "", n_generated=made + 1))
        return outputs


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
    engine: Engine | CountedEngine, jobs: Sequence[Job], moments: Sequence[float], rule: BatchRule, clock: Clock
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


def plot_batches(found: dict[str, ArrivalsServed], step: float = 1.0) -> Figure:
    """A line for each request: when it waited, when it ran, and for how long its row was then kept for its batch.

    `step`: seconds of an engine step, by which a request started before its first token.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(9, 3.4), sharex=True, sharey=True)
    for axis, (name, served) in zip(axes, found.items(), strict=True):
        records, first = served.records, 0
        for index, record in enumerate(records):
            axis.hlines(index, record.due, record.first - step, lw=1, color="C1", label="waits")
            axis.hlines(index, record.first - step, record.last, lw=3, color="C0", label="runs")
        for n in served.starts if served.wasted else ():
            end = max(record.last for record in records[first : first + n])
            for index in range(first, first + n):
                axis.hlines(index, records[index].last, end, lw=3, color="0.75", label="row kept, empty")
            first += n
        axis.set(title=name, xlabel="step")
    axes[0].set(ylabel="request, by arrival")
    axes[0].invert_yaxis()
    labels = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    axes[-1].legend(labels.values(), labels.keys(), loc="upper right", frameon=False, fontsize=9)
    return figure
