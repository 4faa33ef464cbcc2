"""Tests of autoscaling: decisions on traces of load, and real processes that come and go."""

import asyncio
import json
import time
from dataclasses import replace

import pytest

import replica_router
from autoscaling import Fleet, Load, ScaleConfig, ScaleState, control, counts_of, decide, wanted_now
from http_streams import NoAnswer, call
from replica_router import Replica, ReplicaProcess, Router, RouterConfig

CONFIG = ScaleConfig(fewest=1, most=6, target=10, tolerance=0.1, cool_down=5, patience=30, look_every=1)


def follow(requests: list[float], config: ScaleConfig = CONFIG, start: int = 1, ttft: float = 0.0) -> list[int]:
    """Replicas after each second of a trace of load; what is decided is done at once."""
    n, state, found = start, ScaleState(), []
    for moment, load in enumerate(requests):
        n, state = decide(Load(float(moment), n, load, 0.0, ttft), state, config)
        found.append(n)
    return found


@pytest.mark.parametrize(
    ("n", "load", "wanted"),
    [(1, 0, 1), (1, 10, 1), (1, 11, 1), (1, 11.1, 2), (2, 18.1, 2), (2, 17.9, 2), (2, 10, 1), (3, 45, 5), (4, 1000, 6)],
)
def test_the_number_that_a_load_asks_for(n: int, load: float, wanted: int) -> None:
    assert wanted_now(Load(0.0, n, load / 2, load / 2), CONFIG) == wanted


def test_slow_first_tokens_ask_for_one_more_whatever_the_load() -> None:
    assert wanted_now(Load(0.0, 2, 3, 0, ttft_p95=1.01), CONFIG) == 3
    assert wanted_now(Load(0.0, 2, 20, 0, ttft_p95=0.99), CONFIG) == 2
    assert wanted_now(Load(0.0, 6, 3, 0, ttft_p95=9), CONFIG) == 6


def test_a_jump_is_followed_at_once_and_a_fall_after_its_patience_one_by_one() -> None:
    found = follow([5] * 3 + [42] * 10 + [5] * 80)
    assert found[:4] == [1, 1, 1, 5]
    assert found[3:13] == [5] * 10
    assert found[13:40] == [5] * 27  # the last wish for five stands at 12
    down = [found.index(n, 3) for n in (4, 3, 2, 1)]
    assert 41 <= down[0] <= 44 and [later - earlier for earlier, later in zip(down, down[1:], strict=False)] == [5] * 3
    assert found[-1] == 1


def test_bursts_with_gaps_shorter_than_the_patience_change_nothing() -> None:
    found = follow(([30] * 5 + [0] * 20) * 6)
    assert set(found) == {3}
    flapping = follow(([30] * 5 + [0] * 20) * 6, replace(CONFIG, patience=3))
    assert len(set(flapping)) > 1  # the same load without patience


def test_a_load_at_the_edge_does_not_flap() -> None:
    assert set(follow([19, 21] * 50, start=2)) == {2}
    without = replace(CONFIG, tolerance=0, patience=0, cool_down=0)
    assert set(follow([19, 21] * 50, without, start=2)) == {2, 3}


def test_nothing_is_changed_before_the_last_change_has_cooled_down() -> None:
    found = follow([15, 60, 60, 60, 60, 60, 60, 60])
    assert found == [2, 2, 2, 2, 2, 6, 6, 6]


def test_the_limits_hold_at_all_times() -> None:
    config = replace(CONFIG, fewest=2, most=3)
    found = follow([0] * 50 + [1000] * 50 + [0] * 100, config, start=2)
    assert min(found) == 2 and max(found) == 3 and found[-1] == 2


def test_a_start_without_history_gives_nothing_up() -> None:
    assert follow([0] * 10, start=4) == [4] * 10


@pytest.mark.parametrize("wrong", [{"fewest": 0}, {"most": 0}, {"target": 0}, {"tolerance": 1}, {"patience": -1}])
def test_settings_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)


def test_real_replicas_come_and_go_with_their_load() -> None:
    request = {"model": "course-chat", "prompt": [5, 6, 7], "ignore_eos": True, "stream": True, "n": 4}
    kind = {"content-type": "application/json"}

    async def until(holds) -> None:
        limit = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < limit
            await asyncio.sleep(0.02)

    async def ask(url: str, n_tokens: int) -> int:
        body = json.dumps(request | {"max_tokens": n_tokens}).encode()
        async with call(url, "POST", "/v1/completions", body, kind) as reply:
            return (await reply.body()).count(b'"finish_reason":"length"')

    async def live() -> None:
        first = ReplicaProcess()
        router = Router([await first.start()], RouterConfig())
        fleet = Fleet(router, [first], [], grace=60)
        config = ScaleConfig(most=2, target=3, cool_down=0.2, patience=60, look_every=0.1)
        controlling = asyncio.create_task(control(fleet, config))
        try:
            asking = [asyncio.create_task(ask(first.url, 240)) for _ in range(2)]  # eight answers, and three are enough
            await until(lambda: len(router.replicas) == 2 or controlling.done())
            controlling.cancel()
            assert await asyncio.gather(*asking) == [4, 4]
            second, replica = fleet.processes[1], router.replicas[1]
            answer = asyncio.create_task(ask(second.url, 480))
            while await counts_of(replica) != (4.0, 0.0):
                await asyncio.sleep(0.01)
            await fleet.scale_to(1)
            assert router.replicas == [Replica(first.url)] and fleet.leaving
            assert await answer == 4  # what it had is finished
            await asyncio.gather(*fleet.leaving)
            assert second.process.returncode == 0
            with pytest.raises(NoAnswer):
                await ask(second.url, 1)
            assert await counts_of(Replica(second.url, in_flight=7)) == (7.0, 0.0)  # what it was sent, if it is silent
        finally:
            controlling.cancel()
            await fleet.close()
        assert first.process.returncode == 0

    asyncio.run(live())


def test_a_replica_is_ended_only_when_what_it_was_sent_is_answered() -> None:
    class Ended:
        async def stop(self, grace: float) -> None:
            under_way.append(replica.in_flight)

    under_way, replica = [], Replica("http://127.0.0.1:9", in_flight=1)

    async def live() -> None:
        router = Router([replica.url], RouterConfig())
        fleet = Fleet(router, [Ended()], [], grace=60)
        draining = asyncio.create_task(fleet.drain(fleet.processes[0], replica))
        await asyncio.sleep(0)  # it looks, and waits
        assert not under_way
        replica.in_flight = 0
        await draining

    asyncio.run(live())
    assert under_way == [0]


def test_a_replica_that_does_not_start_says_why(monkeypatch) -> None:
    """Its own last words and its exit code; loading a server to refuse its flags would take seconds."""
    words = "import sys; print('block_size must be >= 1', sys.argv[-1], file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(replica_router, "START", words)

    async def start() -> None:
        process = ReplicaProcess("--block-size", "0")
        with pytest.raises(ValueError, match="a replica did not start: block_size must be >= 1 0"):
            await process.start()
        assert await process.stop() == 2

    asyncio.run(start())
