"""Topic 13 - The scheduler: which requests compute how many tokens in the next step, and who waits for memory.

    scheduler = Scheduler(SchedulerConfig(max_batch=8), pool)
    scheduler.add(request)                   # Overloaded if the queue is full
    plan = scheduler.plan()                  # plan.decodes: one token each; plan.chunks: so many tokens of a prompt
    scheduler.leave(request)                 # finished or aborted, wherever it was

Requests join and leave between any two steps (Yu et al. 2022, Orca, OSDI, section 3.1); prompts are computed in pieces
beside the running ones, so that no answer stands still while a long prompt is read (Agrawal et al. 2024, Sarathi-Serve,
arXiv 2403.02310); who finds no block gives its own back and is computed again later (Kwon et al. 2023, arXiv
2309.06180, section 4.5). It knows nothing of models and tensors.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from engine_requests import Overloaded, RowState
from paged_cache import BlockPool, BlockTable, PoolFull
from stop_strings import TextStream
from workbench import check_range

Phase = Literal["queued", "prefill", "decode", "preempted", "finished"]
LOOK_AHEAD = 8  # waiting requests that are tried behind one that does not fit


@dataclass(frozen=True)
class SchedulerConfig:
    max_batch: int = 64  # requests that run at once
    max_step_tokens: int = 512  # tokens of a step, prompts and answers together
    prefill_chunk: int = 256  # tokens of one prompt in a step
    max_waiting: int = 256  # requests that wait; more are refused
    ageing: int = 32  # steps after which a waiting request goes before all younger ones, whatever their priority
    max_preemptions: int = 2  # times that a request may lose its blocks; then it takes all it can need at once

    def __post_init__(self) -> None:
        check_range(self, "max_batch", "max_step_tokens", "prefill_chunk", "max_waiting", "ageing", least=1)
        check_range(self, "max_preemptions", least=0)


@dataclass(eq=False)
class Request:
    """One request on its way through the engine."""

    request_id: str
    row: RowState
    arrival: int = 0  # its place in the order of arrival, which it keeps
    arrived_at: int = 0  # step
    phase: Phase = "queued"
    table: BlockTable = field(default_factory=BlockTable)
    ids: list[int] = field(default_factory=list)  # prompt and answer
    n_cached: int = 0  # tokens of the prompt that were found in the prefix cache
    n_preempted: int = 0
    shared: bool = False  # the block to be written next may be another's too
    slot: int = -1  # its row in the engine's list of tables while it runs
    n_listed: int = 0  # blocks that the engine has listed there
    n_drafted: int = 0  # positions that a draft model has read
    counted: bool = False  # whether its n_cached is in the engine's sum
    text: TextStream | None = None  # its text as it grows
    leader: "Request | None" = None  # whose prompt it waits for, to take a copy
    followers: list["Request"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = self.row.prompt_ids + self.row.new_ids

    @property
    def most_positions(self) -> int:
        """Positions that are ever written: the last token is not read again."""
        return len(self.row.prompt_ids) + self.row.params.max_tokens - 1


class WaitingLine:
    """The waiting requests in the order in which they are served.

    First those that have waited `ageing` steps or more, the earliest arrival first; then by priority and arrival. So
    nobody waits for ever, and within a priority a later one goes first only past somebody who does not fit.
    """

    def __init__(self, ageing: int) -> None:
        self.ageing = ageing
        self.by_arrival: list[Request] = []
        self.by_priority: list[Request] = []

    def __len__(self) -> int:
        return len(self.by_arrival)

    def orders(self) -> tuple[tuple[list[Request], Callable[[Request], Any]], ...]:
        by_priority = (self.by_priority, lambda request: (request.row.params.priority, request.arrival))
        return (self.by_arrival, lambda request: request.arrival), by_priority

    def add(self, request: Request) -> None:
        for line, key in self.orders():
            insort(line, request, key=key)

    def remove(self, request: Request) -> None:
        for line, key in self.orders():
            del line[bisect_left(line, key(request), key=key)]

    def overdue(self, request: Request, step: int) -> bool:
        return step - request.arrived_at >= self.ageing

    def order(self, step: int) -> Iterator[Request]:
        for request in self.by_arrival:
            if not self.overdue(request, step):
                break
            yield request
        yield from (request for request in self.by_priority if not self.overdue(request, step))


@dataclass
class Plan:
    """One step: who gets the next token, who reads how much of its prompt, and who has lost its blocks."""

    decodes: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Plans steps over the blocks of one pool.

    Args:
        config: limits
        pool: the blocks
        n_ahead: positions that a decoding request writes besides its next token if there is room, for drafts
        copy_blocks: called with (from, to) before a shared block is written
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        n_ahead: int = 0,
        copy_blocks: Callable[[Sequence[tuple[int, int]]], None] = lambda copies: None,
    ) -> None:
        if config.max_step_tokens <= config.max_batch * (1 + n_ahead):
            raise ValueError(
                f"max_step_tokens={config.max_step_tokens} leaves no room for prompts beside max_batch="
                f"{config.max_batch} requests with {1 + n_ahead} tokens each; raise it above their product"
            )
        self.config, self.pool, self.n_ahead, self.copy_blocks = config, pool, n_ahead, copy_blocks
        self.line = WaitingLine(config.ageing)
        self.running: list[Request] = []  # in the order in which they were admitted
        self.slots = list(range(config.max_batch - 1, -1, -1))
        self.step = self.n_arrived = self.n_preemptions = self.n_following = 0

    @property
    def n_waiting(self) -> int:
        return len(self.line) + self.n_following

    # Coming and going

    def add(self, *requests: Request) -> None:
        """Queue requests with one prompt: the first computes it, the others take copies. All of them or none.

        Raises Overloaded if the queue has no room, ValueError for what would never fit the pool.
        """
        if self.n_waiting + len(requests) > self.config.max_waiting:
            raise Overloaded(f"{self.n_waiting} requests are waiting and max_waiting is {self.config.max_waiting}")
        for request in requests:
            n_blocks = self.pool.blocks_for(request.most_positions)
            if n_blocks > self.pool.n_blocks:
                raise ValueError(
                    f"prompt and max_tokens need {n_blocks} blocks of {self.pool.block_size} positions, but the pool "
                    f"has {self.pool.n_blocks}; shorten the prompt or lower max_tokens"
                )
        for request in requests:
            self.n_arrived += 1
            request.arrival, request.arrived_at = self.n_arrived, self.step
        self.follow(requests[0], requests[1:])
        self.line.add(requests[0])

    def follow(self, leader: Request, followers: Sequence[Request]) -> None:
        leader.leader, leader.followers = None, list(followers)
        for follower in followers:
            follower.leader = leader
        self.n_following += len(followers)

    def dismiss(self, leader: Request) -> list[Request]:
        """Its followers, who follow no longer."""
        followers, leader.followers = leader.followers, []
        self.n_following -= len(followers)
        for follower in followers:
            follower.leader = None
        return followers

    def leave(self, request: Request) -> None:
        """Take a request out, finished or aborted in any phase; its blocks come back. Leaving twice changes nothing."""
        if request.phase == "finished":
            return
        if request.leader is not None:
            request.leader.followers.remove(request)
            request.leader, self.n_following = None, self.n_following - 1
        elif request.phase in ("prefill", "decode"):
            self.stop(request)
        else:
            self.line.remove(request)
        followers = self.dismiss(request)
        if followers:  # the prompt has not been computed: the next one leads
            self.follow(followers[0], followers[1:])
            self.line.add(followers[0])
        request.phase = "finished"

    def start(self, request: Request, table: BlockTable, phase: Phase) -> None:
        request.table, request.phase, request.slot, request.n_listed = table, phase, self.slots.pop(), 0
        request.n_drafted = table.n_tokens
        self.running.append(request)

    def stop(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.free(request.table)
        self.slots.append(request.slot)
        request.slot = -1

    def fork(self, leader: Request) -> list[Request]:
        """The followers that run from here on the leader's blocks; those for which there is no row go to the queue."""
        started = []
        for follower in self.dismiss(leader):
            if len(self.running) < self.config.max_batch:
                self.start(follower, self.pool.fork(leader.table), "decode")
                follower.n_cached = len(follower.row.prompt_ids)
                follower.shared = True  # the leader keeps the block: all followers copy it before the next step
                started.append(follower)
            else:
                self.line.add(follower)
        return started

    # The next step

    def plan(self) -> Plan:
        """What the next step computes. Every decoding request takes part in every step, unless it loses its blocks."""
        self.step += 1
        plan = Plan()
        for request in list(self.running):
            if request.phase == "decode" and self.make_room(request, plan):
                plan.decodes.append(request)
        budget = self.config.max_step_tokens - len(plan.decodes) * (1 + self.n_ahead)
        for request in self.running:
            if request.phase == "prefill":
                budget -= self.read_on(request, plan, budget)
        if not plan.preempted:  # else the blocks that were just given back would be lost again
            self.admit(plan, budget)
        return plan

    def make_room(self, request: Request, plan: Plan) -> bool:
        """Blocks for the next token; while there are none, the last admitted request loses its own."""
        table, most = request.table, request.most_positions
        wanted = min(1 + self.n_ahead, most - table.n_tokens)
        if not request.shared and table.n_tokens + wanted <= len(table.blocks) * self.pool.block_size:
            return True
        while request.phase == "decode":
            for n_new in dict.fromkeys((wanted, 1)):
                try:
                    copies = self.pool.reserve(table, n_new)
                except PoolFull:
                    continue
                if copies:
                    self.copy_blocks(copies)
                    request.n_listed = 0
                request.shared = False
                return True
            self.preempt(plan)
        return False

    def preempt(self, plan: Plan) -> None:
        """Take the blocks of the request that was admitted last, except from those that have lost theirs often enough.

        Such a request holds all it can need since it was admitted again, so there is always another one to choose: at
        worst the one that asks, and never one before it, which has its place in this step already.
        """
        limit = self.config.max_preemptions
        victim = next(request for request in reversed(self.running) if request.n_preempted < max(1, limit))
        self.stop(victim)
        victim.phase, victim.n_preempted = "preempted", victim.n_preempted + 1
        self.n_preemptions += 1
        plan.preempted.append(victim)
        self.line.add(victim)

    def read_on(self, request: Request, plan: Plan, budget: int) -> int:
        """Let a request read the next piece of its prompt; returns the number of tokens."""
        n = min(len(request.ids) - request.table.n_tokens, self.config.prefill_chunk, budget)
        if n > 0:
            plan.chunks.append((request, n))
        return max(n, 0)

    def admit(self, plan: Plan, budget: int) -> None:
        """Start waiting requests while there are rows, tokens and blocks.

        Who does not fit lets others pass, until it is overdue: then all wait with it until enough blocks are free.
        """
        tried = 0
        while budget > 0 and len(self.running) < self.config.max_batch and len(self.line):
            for request in islice(self.line.order(self.step), tried, 1 + LOOK_AHEAD):
                if self.open(request):
                    break
                if self.line.overdue(request, self.step):
                    return
                tried += 1
            else:
                return
            budget -= self.read_on(request, plan, budget)

    def open(self, request: Request) -> bool:
        """Blocks for all that is known of a request, or for all it can ever need if it has lost its blocks before."""
        n_positions = len(request.ids)
        if request.n_preempted >= self.config.max_preemptions:
            n_positions = max(n_positions, request.most_positions)
        try:
            table = self.pool.open(request.ids, n_positions, request.row.params.tenant)
        except PoolFull:
            return False
        self.line.remove(request)
        if request.phase == "queued":
            request.n_cached = table.n_tokens
        self.start(request, table, "prefill")
        return True
