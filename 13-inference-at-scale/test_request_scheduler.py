"""Topic 13 - Proofs of the scheduler, without a model: nobody starves or stalls, and no block is lost."""

import random

import pytest

from engine_requests import Overloaded, RequestParams, new_row
from paged_cache import BlockPool
from request_scheduler import Plan, Request, Scheduler, SchedulerConfig

SMALL = SchedulerConfig(max_batch=4, max_step_tokens=24, prefill_chunk=10, max_waiting=50, ageing=12)


def request(name: str, n_prompt: int = 5, max_tokens: int = 4, **params) -> Request:
    """Prompts differ from the first token on, so that nothing is found in the prefix cache."""
    prompt = [hash(name) % 10**6, *range(n_prompt - 1)]
    return Request(name, new_row(RequestParams(max_tokens, temperature=0, **params), prompt))


class Machine:
    """An engine without a model: the next token is the number of tokens so far."""

    def __init__(self, config: SchedulerConfig = SMALL, n_blocks: int = 40, block_size: int = 4, n_ahead: int = 0):
        self.pool = BlockPool(n_blocks, block_size)
        self.scheduler = Scheduler(config, self.pool, n_ahead)
        self.started: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}  # steps at which a request got a token
        self.finished: list[str] = []

    def add(self, *requests: Request) -> None:
        self.scheduler.add(*requests)

    def step(self) -> Plan:
        scheduler = self.scheduler
        running = [request for request in scheduler.running if request.phase == "decode"]
        plan = scheduler.plan()
        n_tokens = len(plan.decodes) * (1 + scheduler.n_ahead) + sum(n for _, n in plan.chunks)
        assert n_tokens <= scheduler.config.max_step_tokens and len(scheduler.running) <= scheduler.config.max_batch
        assert set(running) == set(plan.decodes) | {gone for gone in plan.preempted if gone in running}
        assert all(request.phase == "decode" for request in plan.decodes)
        for request in scheduler.running:
            assert len(request.table.blocks) <= self.pool.blocks_for(request.most_positions)
        slots = [request.slot for request in scheduler.running]
        assert sorted(slots + scheduler.slots) == list(range(scheduler.config.max_batch))
        for request, n in plan.chunks:
            assert 0 < n <= scheduler.config.prefill_chunk
            self.started.setdefault(request.request_id, scheduler.step)
            self.pool.advance(request.table, request.ids[: request.table.n_tokens + n])
            if request.table.n_tokens == len(request.ids):
                request.phase = "decode"
                for ready in [request, *scheduler.fork(request)]:
                    self.grow(ready)
        for request in plan.decodes:
            assert self.pool.writable(request.table.blocks[request.table.n_tokens // self.pool.block_size])
            self.pool.advance(request.table, request.ids)
            self.grow(request)
        return plan

    def grow(self, request: Request) -> None:
        row = request.row
        self.tokens.setdefault(request.request_id, []).append(self.scheduler.step)
        for ids in (row.new_ids, request.ids):
            ids.append(len(ids))
        if len(row.new_ids) == row.params.max_tokens:
            self.scheduler.leave(request)
            self.finished.append(request.request_id)

    def drain(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.scheduler.running and not self.scheduler.n_waiting:
                break
            self.step()
        else:
            pytest.fail(f"not done after {most} steps")
        self.check_empty()

    def check_empty(self) -> None:
        pool, scheduler = self.pool, self.scheduler
        assert pool.n_free == pool.n_blocks and not any(pool.counts)
        assert not scheduler.running and not scheduler.line.by_priority and not scheduler.n_waiting
        assert len(scheduler.slots) == scheduler.config.max_batch


def test_requests_join_and_leave_between_steps_and_get_a_token_in_every_step_between() -> None:
    machine = Machine()
    for number in range(9):
        machine.add(request(f"r{number}", n_prompt=3 + 4 * number, max_tokens=2 + number % 4))
        machine.step()
    machine.drain()
    assert sorted(machine.finished) == [f"r{number}" for number in range(9)]
    for steps in machine.tokens.values():
        assert steps == list(range(steps[0], steps[-1] + 1))


def test_a_long_prompt_is_read_in_pieces_while_others_go_on() -> None:
    machine = Machine(n_blocks=60)
    machine.add(request("short", 3, 12))
    machine.step()
    machine.add(request("long", 95, 2))
    machine.drain()
    assert machine.tokens["short"] == list(range(1, 13))
    assert machine.tokens["long"] == [11, 12]  # ten pieces of ten


def test_a_piece_is_no_longer_than_what_the_step_has_left() -> None:
    machine = Machine(SchedulerConfig(max_batch=3, max_step_tokens=8, prefill_chunk=7))
    for name, n_prompt in (("a", 6), ("b", 9), ("c", 2)):
        machine.add(request(name, n_prompt, 30))
    pieces = [[(piece.request_id, n) for piece, n in machine.step().chunks] for _ in range(4)]
    assert pieces == [[("a", 6), ("b", 2)], [("b", 7)], [("c", 2)], []]


# Nobody starves


@pytest.mark.parametrize("n_blocks", [14, 24, 200])
def test_a_long_prompt_starts_within_fifty_steps_of_endless_short_ones(n_blocks: int) -> None:
    machine, rng = Machine(n_blocks=n_blocks), random.Random(0)
    for step in range(120):
        if step == 20:
            machine.add(request("long", 44, 6))
        for number in range(2):
            if machine.scheduler.n_waiting < 40:
                machine.add(request(f"{step}-{number}", rng.randint(1, 9), rng.randint(2, 8)))
        machine.step()
    assert machine.started["long"] - 20 <= 50
    machine.drain()


def test_what_does_not_fit_lets_others_pass_until_it_is_overdue() -> None:
    machine = Machine(n_blocks=12)
    machine.add(request("first", 12, 20))  # holds up to 8 of 12 blocks
    machine.step()
    machine.add(request("wide", 40, 2))  # needs 10
    for number in range(3):
        machine.add(request(f"thin{number}", 2, 2))
    machine.step()
    assert "thin0" in machine.started and "wide" not in machine.started
    for _ in range(SMALL.ageing):
        machine.step()
    machine.add(request("late", 2, 2))
    machine.step()
    assert "late" not in machine.started  # there are blocks for it, but now all wait with the one in front
    machine.drain()
    names = list(machine.started)
    assert names.index("wide") < names.index("late")


def test_eight_are_tried_behind_one_that_does_not_fit_and_no_ninth() -> None:
    for n_wide, started in ((8, ["thin0", "thin1"]), (9, [])):
        machine = Machine(SchedulerConfig(max_batch=20, max_step_tokens=60, prefill_chunk=20), n_blocks=12)
        machine.add(request("first", 12, 20))  # holds 3 of 12 blocks
        machine.step()
        for number in range(n_wide):
            machine.add(request(f"wide{number}", 40, 2))  # needs 10
        for number in range(2):
            machine.add(request(f"thin{number}", 2, 2))
        tried, open_table = [], machine.pool.open
        machine.pool.open = lambda *given, tried=tried, open_table=open_table: tried.append(1) or open_table(*given)
        machine.step()
        assert list(machine.started) == ["first", *started] and len(tried) == 9 + (n_wide == 8)  # nobody twice
        machine.drain()


def test_priorities_go_first_but_not_for_ever() -> None:
    machine = Machine()
    for step in range(80):
        for number in range(2):
            if machine.scheduler.n_waiting < 40:
                machine.add(request(f"{step}-{number}", 4, 4, priority=-1000))
        if step == 10:
            machine.add(request("low", 4, 3, priority=5))
        machine.step()
    assert SMALL.ageing <= machine.started["low"] - 10 <= 50
    machine.drain()


def test_equal_priorities_are_served_in_the_order_of_arrival() -> None:
    machine = Machine()
    names = [f"r{number}" for number in range(30)]
    for name in names:
        machine.add(request(name, 5, 3))
    machine.drain()
    assert list(machine.started) == names
    machine = Machine()
    for priority in (2, 0, 1):
        for number in range(4):
            machine.add(request(f"{priority}-{number}", 5, 3, priority=priority))
    machine.drain()
    assert list(machine.started) == [f"{priority}-{number}" for priority in range(3) for number in range(4)]


# Preemption


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("n_ahead", [0, 2])
def test_in_a_pool_too_small_everybody_finishes_and_is_preempted_a_bounded_number_of_times(limit, n_ahead) -> None:
    config = SchedulerConfig(max_batch=5, max_step_tokens=40, prefill_chunk=9, ageing=8, max_preemptions=limit)
    machine, rng = Machine(config, n_blocks=9, block_size=3, n_ahead=n_ahead), random.Random(limit)
    requests = [request(f"r{number}", rng.randint(1, 13), rng.randint(1, 15)) for number in range(60)]
    for one in requests:
        machine.add(one) if machine.scheduler.n_waiting < 20 else None
        machine.step()
    machine.drain()
    counts = [one.n_preempted for one in requests]
    assert max(counts) <= max(1, limit) and sum(counts) == machine.scheduler.n_preemptions
    assert sum(counts) == 0 if limit == 0 else sum(counts) > 5


def test_the_last_admitted_loses_its_blocks_and_keeps_its_place_in_the_queue() -> None:
    machine = Machine(SchedulerConfig(max_batch=2, max_step_tokens=40, prefill_chunk=20), n_blocks=6)
    first, second, third = request("first", 8, 12), request("second", 11, 12), request("third", 3, 3)
    machine.add(first)
    machine.add(second)
    machine.add(third)
    while not (lost := machine.step().preempted):
        pass
    assert lost == [second] and second.phase == "preempted" and second.row.new_ids
    assert machine.scheduler.line.by_arrival == [second, third]
    machine.drain()
    assert second.n_preempted == 1 and machine.tokens["first"] == list(range(1, 13))
    assert len(second.row.new_ids) == 12


def test_what_a_preempted_request_finds_of_its_own_was_not_cached_for_it() -> None:
    machine, own = Machine(), request("own", 9)
    machine.add(own)
    machine.step()
    machine.scheduler.preempt(Plan())
    machine.step()
    assert own.phase == "decode" and own.table.n_tokens == 10 and own.n_cached == 0


# Followers


def test_followers_take_copies_of_the_leaders_prompt() -> None:
    machine = Machine()
    choices = [request(f"c{number}", 7, 5) for number in range(3)]
    for choice in choices:
        choice.row.prompt_ids[0] = choice.ids[0] = 77
    machine.add(*choices)
    assert machine.scheduler.n_waiting == 3
    plan = machine.step()
    assert [(chunk.request_id, n) for chunk, n in plan.chunks] == [("c0", 7)]
    assert {tuple(choice.table.blocks) for choice in choices} == {tuple(choices[0].table.blocks)}
    assert [choice.n_cached for choice in choices] == [0, 7, 7]
    machine.step()
    last = [choice.table.blocks[1] for choice in choices]
    assert len(set(last)) == 3 and len({choice.table.blocks[0] for choice in choices}) == 1
    machine.drain()
    assert all(len(choice.row.new_ids) == 5 for choice in choices)


def test_followers_beyond_the_batch_wait_and_find_the_prompt_in_the_cache() -> None:
    machine = Machine()
    choices = [request(f"c{number}", 9, 3) for number in range(7)]
    for choice in choices:
        choice.row.prompt_ids[0] = choice.ids[0] = 77
    machine.add(*choices)
    machine.step()
    assert len(machine.scheduler.running) == 4 and machine.scheduler.n_waiting == 3
    machine.drain()
    assert sorted(machine.finished) == [f"c{number}" for number in range(7)]
    assert [choice.n_cached for choice in choices] == [0, 9, 9, 9, 8, 8, 8]


@pytest.mark.parametrize("n_blocks", [7, 8, 10, 40])
def test_followers_in_a_small_pool(n_blocks: int) -> None:
    for limit in (0, 1, 2):
        machine = Machine(SchedulerConfig(4, 24, 10, max_preemptions=limit), n_blocks=n_blocks, block_size=3)
        requests = []
        for number in range(4):
            choices = [request(f"{number}-{choice}", 6 + number, 11) for choice in range(4)]
            for choice in choices:
                choice.row.prompt_ids[0] = choice.ids[0] = number
            machine.add(*choices)
            requests += choices
        machine.drain()
        assert len(machine.finished) == 16 and max(one.n_preempted for one in requests) <= max(1, limit)


# Leaving in every phase, refusals


def test_leaving_in_every_phase_gives_everything_back() -> None:
    machine = Machine(n_blocks=8)
    names = ["decode", "prefill", "queued", "follower", "other", "done"]
    made = {name: request(name, 20 if name == "prefill" else 6, 1 if name == "done" else 9) for name in names}
    machine.add(made["decode"])
    machine.add(made["done"])
    machine.step()
    machine.add(made["prefill"], made["follower"], made["other"])
    machine.add(made["queued"])
    machine.step()
    phases = {name: one.phase for name, one in made.items()}
    assert phases == {
        **dict(zip(names, names, strict=True)),
        "follower": "queued",
        "other": "queued",
        "done": "finished",
    }
    for name in ("follower", "prefill", "queued", "decode", "done", "decode"):
        machine.scheduler.leave(made[name])
        assert made[name].phase == "finished"
    assert machine.scheduler.line.by_arrival == [made["other"]] and machine.scheduler.n_waiting == 1
    assert machine.pool.n_free == 8
    machine.drain()
    assert machine.finished == ["done", "other"]


def test_a_preempted_request_can_leave() -> None:
    machine = Machine(SchedulerConfig(max_batch=2, max_step_tokens=40, prefill_chunk=20), n_blocks=6)
    first, second = request("first", 8, 12), request("second", 11, 12)
    machine.add(first)
    machine.add(second)
    while second.phase != "preempted":
        machine.step()
    machine.scheduler.leave(second)
    machine.drain()
    assert machine.finished == ["first"]


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_and_departures_end_with_a_full_pool(seed: int) -> None:
    rng = random.Random(seed)
    config = SchedulerConfig(
        rng.randint(1, 6), 40, rng.randint(1, 20), 30, rng.randint(1, 20), max_preemptions=rng.randint(0, 3)
    )
    machine = Machine(config, rng.randint(8, 20), rng.randint(2, 4), rng.choice([0, 0, 3]))
    made: list[Request] = []
    for step in range(150):
        if rng.random() < 0.5:
            size = (rng.randint(1, 8), rng.randint(1, 9), rng.randint(-1, 1))
            group = [request(f"{step}-{i}", *size[:2], priority=size[2]) for i in range(rng.choice([1, 1, 3]))]
            for one in group:
                one.row.prompt_ids[0] = one.ids[0] = step
            if machine.scheduler.n_waiting + len(group) <= 30:
                machine.add(*group)
                made += group
        if made and rng.random() < 0.15:
            machine.scheduler.leave(rng.choice(made))
        machine.step()
    machine.drain()
    assert all(one.phase == "finished" for one in made)
    assert len(machine.finished) == len(set(machine.finished)) > 20


def test_a_full_queue_refuses_all_or_nothing() -> None:
    machine = Machine(SchedulerConfig(4, 24, 10, max_waiting=3))
    machine.add(request("a"))
    with pytest.raises(Overloaded, match="1 requests are waiting and max_waiting is 3"):
        machine.add(request("b"), request("c"), request("d"))
    assert machine.scheduler.n_waiting == 1
    machine.add(request("b"), request("c"))
    machine.drain()


def test_what_can_never_fit_is_refused_at_once() -> None:
    machine = Machine(n_blocks=5)  # 20 positions; the last token's is not written
    with pytest.raises(ValueError, match="need 6 blocks of 4 positions, but the pool has 5"):
        machine.add(request("wide", 10, 12))
    assert machine.scheduler.n_waiting == 0
    machine.add(request("fits", 10, 11))
    machine.drain()
    with pytest.raises(ValueError, match="max_step_tokens=24 leaves no room for prompts beside max_batch=8"):
        Scheduler(SchedulerConfig(8, 24), BlockPool(4), n_ahead=2)
    with pytest.raises(ValueError, match="ageing must be finite and >= 1, got 0"):
        SchedulerConfig(ageing=0)


def test_guesses_take_their_part_of_a_step() -> None:
    machine = Machine(SchedulerConfig(max_batch=3, max_step_tokens=12, prefill_chunk=10), n_ahead=2)
    machine.add(request("a", 3, max_tokens=20))
    machine.add(request("b", 3, max_tokens=20))
    machine.step()
    machine.add(request("long", 25))
    plan = machine.step()  # two answers with two guesses each take six of twelve
    assert len(plan.decodes) == 2 and [n for _, n in plan.chunks] == [6]


def test_guesses_are_left_out_before_anybody_loses_its_blocks() -> None:
    config = SchedulerConfig(max_batch=2, max_step_tokens=12, prefill_chunk=10)
    machine = Machine(config, n_blocks=9, block_size=1, n_ahead=2)
    machine.add(request("short", 3, max_tokens=2))
    machine.add(request("long", 3, max_tokens=6))
    machine.step()
    plan = machine.step()  # one of the three free blocks is short's, and two are too few for a token and two guesses
    assert len(plan.decodes) == 2
    machine.drain()
    assert machine.scheduler.n_preemptions == 0


def test_a_request_is_overdue_after_as_many_steps_as_the_setting_says() -> None:
    waiting = request("old")
    waiting.arrived_at = 5
    line = Scheduler(SMALL, BlockPool(4)).line
    assert [line.overdue(waiting, step) for step in (16, 17)] == [False, True]  # ageing is 12
