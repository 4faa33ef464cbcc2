"""Topic 13 - Autoscaling: how many replicas, decided from measured load, and real processes started and drained.

python 13-inference-at-scale/inference_at_scale.py autoscale --most 3 --target 8

The decision is a pure function of what was measured, so that traces test it without a process. The number wanted is
that of Kubernetes' HorizontalPodAutoscaler, ceil(replicas * load / target), with its two brakes: a tolerance around the
target, and a window of which the highest wish counts before anything is given up
(kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale).
"""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from http_streams import NoAnswer, call
from replica_router import Replica, ReplicaProcess, RouteConfig, Router, run_router
from workbench import RunConfig, check_range

# The decision


@dataclass(frozen=True)
class ScaleConfig:
    """When a replica is added or given up."""

    fewest: int = 1  # replicas that always run
    most: int = 4  # replicas that ever run
    target: float = 8.0  # requests, running and waiting, that a replica should have
    tolerance: float = 0.1  # relative distance from the target at which nothing is done
    ttft_p95_limit: float = 1.0  # seconds to the first token; above it one more is wanted, whatever the load
    cool_down: float = 5.0  # seconds after a change in which no other one is made: a new replica must first take load
    patience: float = 30.0  # seconds for which fewer must have sufficed before one is given up
    look_every: float = 1.0  # seconds between two measurements

    def __post_init__(self) -> None:
        check_range(self, "fewest", least=1)
        check_range(self, "most", least=self.fewest, most=64)
        check_range(self, "target", "ttft_p95_limit", "look_every", above=0)
        check_range(self, "tolerance", least=0, below=1)
        check_range(self, "cool_down", "patience", least=0)


@dataclass(frozen=True)
class Load:
    """What was measured at one moment, over all replicas that are ready."""

    moment: float  # seconds of some clock
    n_replicas: int
    running: float  # requests that hold blocks
    waiting: float  # requests in queues
    ttft_p95: float = 0.0  # seconds


@dataclass(frozen=True)
class ScaleState:
    """What the next decision needs of the past."""

    changed: float = -math.inf  # moment of the last change
    wishes: tuple[tuple[float, int], ...] = ()  # (moment, replicas wanted) within the patience


def wanted_now(load: Load, config: ScaleConfig) -> int:
    """Replicas that this load alone asks for."""
    ratio = (load.running + load.waiting) / (max(load.n_replicas, 1) * config.target)
    near = abs(ratio - 1) <= config.tolerance + 1e-9
    wanted = load.n_replicas if near else math.ceil(load.n_replicas * ratio - 1e-9)
    if load.ttft_p95 > config.ttft_p95_limit:
        wanted = max(wanted, load.n_replicas + 1)
    return min(max(wanted, config.fewest), config.most)


def decide(load: Load, state: ScaleState, config: ScaleConfig) -> tuple[int, ScaleState]:
    """How many replicas there should be, and the state for the next decision.

    Up: as soon as it is wanted, by as many as are wanted, once the last change has cooled down. Down: one at a time,
    and only to what was the highest wish within the patience - a gap between two bursts gives nothing up.
    """
    wish = wanted_now(load, config)
    wishes = (*state.wishes, (load.moment, wish))
    wishes = tuple(item for item in wishes if load.moment - item[0] <= config.patience)
    state = replace(state, wishes=wishes)
    if load.moment - state.changed < config.cool_down:
        return load.n_replicas, state
    n = load.n_replicas
    if wish > n:
        n = wish
    elif seen_long_enough(state, load, config) and max(item[1] for item in wishes) < n:
        n -= 1
    return n, state if n == load.n_replicas else replace(state, changed=load.moment)


def seen_long_enough(state: ScaleState, load: Load, config: ScaleConfig) -> bool:
    """Whether the wishes reach back over the patience, but for the time of a look or two."""
    return load.moment - state.wishes[0][0] >= config.patience - 2 * config.look_every


# Measuring, and doing it


class Fleet:
    """The replicas of a router as processes: started, measured, drained."""

    def __init__(self, router: Router, processes: Sequence[ReplicaProcess], flags: Sequence[str], grace: float) -> None:
        self.router, self.flags, self.grace = router, tuple(flags), grace
        self.processes = list(processes)  # in the order of router.replicas
        self.leaving: set[asyncio.Task] = set()

    async def measure(self) -> Load:
        """Running and waiting by the replicas' own /metrics; times to the first byte by the router's clock."""
        counts = await asyncio.gather(*(counts_of(replica) for replica in self.router.replicas))
        now = time.monotonic()
        running, waiting = (sum(count[place] for count in counts) for place in (0, 1))
        return Load(now, len(self.router.replicas), running, waiting, self.router.recent_p95(now))

    async def scale_to(self, n: int) -> None:
        """Start what is missing; take from the router what is too much, and end it when its answers are out."""
        missing = n - len(self.processes)
        if missing > 0:
            started = [ReplicaProcess(*self.flags) for _ in range(missing)]
            self.processes += started  # those that fail to start are ended with the others
            urls = await asyncio.gather(*(process.start() for process in started))
            self.router.replicas += [Replica(url) for url in urls]
        for _ in range(-missing):
            process, replica = self.processes.pop(), self.router.replicas.pop()
            task = asyncio.create_task(self.drain(process, replica))
            self.leaving.add(task)
            task.add_done_callback(self.leaving.discard)

    async def drain(self, process: ReplicaProcess, replica: Replica) -> None:
        """No new request reaches it any more; SIGTERM lets it finish what it has."""
        limit = time.monotonic() + self.grace
        while replica.in_flight and time.monotonic() < limit:
            await asyncio.sleep(0.05)
        await process.stop(self.grace)

    async def close(self) -> None:
        await asyncio.gather(
            *self.leaving, *(process.stop(self.grace) for process in self.processes if process.process)
        )


async def counts_of(replica: Replica) -> tuple[float, float]:
    """Running and waiting requests of a replica; what it was sent, if it does not say."""
    with contextlib.suppress(NoAnswer):
        async with call(replica.url, "GET", "/metrics", timeout=10) as reply:
            text = (await reply.body()).decode(errors="replace")
        found = dict(re.findall(r"^course_(running|waiting) (\S+)$", text, re.MULTILINE))
        if len(found) == 2:
            return float(found["running"]), float(found["waiting"])
    return float(replica.in_flight), 0.0


async def control(fleet: Fleet, config: ScaleConfig) -> None:
    """Measure, decide, do; for ever."""
    state = ScaleState()
    while True:
        load = await fleet.measure()
        n, state = decide(load, state, config)
        if n != load.n_replicas:
            total = load.running + load.waiting
            print(f"{load.n_replicas} -> {n} replicas: {total:g} requests, p95 to first byte {load.ttft_p95:.2f} s")
            await fleet.scale_to(n)
            state = replace(state, changed=time.monotonic())  # it took load only now
        await asyncio.sleep(config.look_every)


def autoscale(config: RouteConfig, scale: ScaleConfig, run: RunConfig) -> None:
    """Serve behind a router whose replicas come and go with the measured load."""
    if config.given:
        raise ValueError("urls names replicas that others started; leave it out, to start and end them here")
    config = replace(config, n_replicas=scale.fewest)

    async def beside(router: Router, processes: list[ReplicaProcess]) -> None:
        fleet = Fleet(router, processes, config.flags(), config.grace)
        try:
            await control(fleet, scale)
        finally:
            await fleet.close()

    asyncio.run(run_router(config, run.seed, beside))


AUTOSCALING_VERBS: dict[str, tuple[Any, ...]] = {"autoscale": (autoscale, RouteConfig, ScaleConfig, RunConfig)}
