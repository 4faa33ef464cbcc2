"""Tests of engine_thread: answers equal the engine's own, aborts and slow readers give blocks back, a dead engine."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import SimpleNamespace

import pytest
import torch

from engine_requests import Overloaded, RequestOutput, RequestParams
from engine_thread import Answer, EngineDead, EngineThread, SlowReader, settle
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from serving_engine import Engine, EngineConfig

GREEDY = RequestParams(max_tokens=9, temperature=0.0, ignore_eos=True)
LONG = RequestParams(max_tokens=200, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


class Spelling:
    """A tokenizer for a model that knows no text: every id is a word."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token_id} " for token_id in ids)


def small_engine(**settings) -> Engine:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_ff": 24}
    return Engine(CausalLM(ModelConfig(**sizes, max_seq_len=256)).eval(), Spelling(), EngineConfig(**settings))


def with_thread(work: Callable[[EngineThread], Coroutine], engine: Engine | None = None, max_pending: int = 256):
    """Run a coroutine with a thread that is running; end the thread after it."""

    async def inside():
        thread = EngineThread(engine or small_engine(), max_pending)
        thread.start()
        try:
            return await asyncio.wait_for(work(thread), 60)
        finally:
            await thread.stop()

    return asyncio.run(inside())


async def whole(answer: Answer) -> dict[int, tuple[list[int], str, str | None]]:
    """Ids, text and reason of every choice."""
    made: dict[int, tuple[list[int], str, str | None]] = {}
    async for choice, output in answer:
        ids, text, _ = made.get(choice, ([], "", None))
        made[choice] = (ids + output.new_ids, text + output.text, output.finish_reason)
    return made


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition, for the test's whole time if it must be."""
    while not holds():
        await asyncio.sleep(0.002)


def is_empty(thread: EngineThread) -> bool:
    stats = thread.latest
    return not stats.running and not stats.waiting and stats.free_blocks == stats.n_blocks


def test_answers_of_many_at_once_are_those_of_the_engine_alone() -> None:
    alone = small_engine().generate(PROMPTS, GREEDY)

    async def ask(thread: EngineThread):
        answers = [await thread.submit(prompt, [GREEDY, GREEDY]) for prompt in PROMPTS]
        return await asyncio.gather(*(whole(answer) for answer in answers)), thread.answers

    made, left = with_thread(ask)
    for output, choices in zip(alone, made, strict=True):
        assert choices == {choice: (output.new_ids, output.text, "length") for choice in range(2)}
    assert left == {}


def test_what_can_never_fit_is_refused_at_once_and_leaves_nothing() -> None:
    async def ask(thread: EngineThread):
        with pytest.raises(ValueError):
            await thread.submit([5] * 250, [LONG])
        fits = RequestParams(max_tokens=5, temperature=0.0)
        with pytest.raises(ValueError):
            await thread.submit([5] * 100, [fits, LONG])  # the first would fit
        await until(lambda: is_empty(thread))
        assert thread.answers == {} and thread.alive
        return await whole(await thread.submit(PROMPTS[0], [GREEDY]))

    assert with_thread(ask)[0][2] == "length"


def test_a_full_queue_refuses_all_choices_and_serves_those_before() -> None:
    async def ask(thread: EngineThread):
        first = await thread.submit(PROMPTS[0], [LONG])
        await until(lambda: thread.latest.running == 1)
        second = await thread.submit(PROMPTS[1], [GREEDY, GREEDY])
        with pytest.raises(Overloaded):
            await thread.submit(PROMPTS[2], [GREEDY, GREEDY])
        return await whole(first), await whole(second)

    first, second = with_thread(ask, small_engine(max_batch=1, max_waiting=3))
    assert len(first[0][0]) == 200 and [reason for _, _, reason in second.values()] == ["length"] * 2


def test_closing_an_answer_gives_its_blocks_back_and_leaves_the_others_alone() -> None:
    [alone] = small_engine().generate(PROMPTS[:1], GREEDY)

    async def ask(thread: EngineThread):
        leaving = [await thread.submit(prompt, [LONG, LONG]) for prompt in PROMPTS]
        staying = await thread.submit(PROMPTS[0], [GREEDY])
        await anext(leaving[0])  # one in the midst of its answer
        for answer in leaving:
            answer.close()
            answer.close()  # and once more, for nothing
        made = await whole(staying)
        await until(lambda: is_empty(thread))
        assert thread.latest.generated_tokens < 6 * LONG.max_tokens / 2  # they were not computed to the end
        return made, thread.answers

    made, left = with_thread(ask)
    assert made[0][0] == alone.new_ids and left == {}


def test_a_caller_that_is_cancelled_while_it_waits_to_be_admitted_leaves_nothing() -> None:
    async def ask(thread: EngineThread):
        asking = asyncio.create_task(thread.submit(PROMPTS[0], [LONG]))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: is_empty(thread))
        assert thread.answers == {}

    with_thread(ask)


def test_a_reader_slower_than_its_buffer_is_aborted_and_told() -> None:
    async def ask(thread: EngineThread):
        answer = await thread.submit(PROMPTS[0], [LONG])
        await until(lambda: answer.failure is not None)
        assert answer.pending.qsize() == 8  # no more was kept
        await until(lambda: is_empty(thread))
        pieces = []
        with pytest.raises(SlowReader, match="left 8 pieces of its answer unread"):
            async for _, output in answer:
                pieces.append(output)
        assert len(pieces) == 8 and thread.alive

    with_thread(ask, max_pending=8)


class Breaking:
    """An engine whose steps fail as soon as it is told to."""

    def __init__(self, error: Exception, broken: bool = False) -> None:
        self.engine, self.error, self.broken = small_engine(), error, broken

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def step(self):
        if self.broken:
            raise self.error
        return self.engine.step()


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), MemoryError("no more"), ValueError("strange")])
def test_an_engine_that_fails_ends_every_answer_and_takes_no_more(error: Exception) -> None:
    async def ask(thread: EngineThread):
        answers = [await thread.submit(prompt, [LONG]) for prompt in PROMPTS]
        await anext(answers[0])
        thread.engine.broken = True
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for answer in answers:
            with pytest.raises(EngineDead, match=reason):
                await whole(answer)
        assert not thread.alive and thread.failure is error and thread.answers == {}
        with pytest.raises(EngineDead, match=reason):
            await thread.submit(PROMPTS[0], [GREEDY])

    with_thread(ask, Breaking(error))


def test_a_failure_ends_the_wait_of_those_who_are_not_admitted_yet() -> None:
    engine = Breaking(RuntimeError("broken"), broken=True)

    async def ask(thread: EngineThread):
        calls = [asyncio.create_task(thread.submit(PROMPTS[0], [LONG])) for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:  # admitted in time and told in its loop, or refused
            with pytest.raises(EngineDead):
                raise result if isinstance(result, EngineDead) else await failure_of(result)
        assert len(results) == 20

    with_thread(ask, engine)


async def failure_of(answer: Answer) -> Exception:
    try:
        await whole(answer)
    except EngineDead as error:
        return error
    raise AssertionError("the answer ended as if nothing had happened")


def test_stopping_ends_what_runs_and_refuses_what_comes() -> None:
    async def ask(thread: EngineThread):
        answer = await thread.submit(PROMPTS[0], [LONG])
        await thread.stop()
        with pytest.raises(EngineDead, match="the server stops"):
            await whole(answer)
        with pytest.raises(EngineDead, match="the server stops"):
            await thread.submit(PROMPTS[0], [GREEDY])
        assert not thread.alive

    with_thread(ask)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_thread_has_the_number_of_cores_that_the_process_was_given(n_threads: int) -> None:
    found = []

    class Asking(Breaking):
        def step(self):
            found.append(torch.get_num_threads())
            return super().step()

    async def ask(thread: EngineThread):
        await whole(await thread.submit(PROMPTS[0], [GREEDY]))

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with_thread(ask, Asking(RuntimeError()))
    finally:
        torch.set_num_threads(before)
    assert set(found) == {n_threads}


def test_a_buffer_must_hold_something() -> None:
    with pytest.raises(ValueError, match="max_pending must be >= 1, got 0"):
        EngineThread(small_engine(), 0)


def test_each_choice_has_a_buffer_of_its_own_size() -> None:
    aborted: list[set[str]] = []
    answer = Answer(SimpleNamespace(max_pending=4, abort=lambda request_ids: aborted.append(set(request_ids))), 3)
    for _ in range(12):
        answer.put(RequestOutput(next(iter(answer.choices)), [1], "a"))
    assert answer.failure is None and not aborted
    answer.put(RequestOutput(next(iter(answer.choices)), [1], "a"))
    assert isinstance(answer.failure, SlowReader) and "12 pieces" in str(answer.failure)
    assert aborted == [set(answer.choices)]  # the engine is told at once, all choices


def test_an_answer_that_is_closed_has_ended() -> None:
    async def ask(thread: EngineThread):
        answer = await thread.submit(PROMPTS[0], [LONG])
        await anext(answer)
        answer.close()
        await until(lambda: is_empty(thread))  # no step follows that would tell
        return await whole(answer)

    assert all(reason is None for _, _, reason in with_thread(ask).values())


def test_a_failure_while_a_request_is_queued_ends_the_thread() -> None:
    """What is wrong with a request is its own; everything else is the engine's."""

    def fail(*args) -> None:
        raise RuntimeError("torn")

    async def ask(thread: EngineThread):
        thread.engine.add_choices = fail
        with pytest.raises(EngineDead, match="RuntimeError: torn"):
            await thread.submit(PROMPTS[0], [GREEDY])
        assert not thread.alive

    with_thread(ask)


def test_a_thread_is_alive_from_its_start_until_it_is_told_to_stop() -> None:
    entered, gate = threading.Event(), threading.Event()

    class Waiting(Breaking):
        def step(self):
            entered.set()
            gate.wait(60)
            return super().step()

    thread = EngineThread(Waiting(RuntimeError()))
    assert not thread.alive

    async def ask():
        thread.start()
        assert thread.alive
        await thread.submit(PROMPTS[0], [GREEDY])
        await until(entered.is_set)
        stopping = asyncio.create_task(thread.stop())
        await asyncio.sleep(0)
        assert not thread.alive and thread.thread.is_alive()  # its step goes on
        gate.set()
        await stopping

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_nobody_is_told_what_he_cannot_hear() -> None:
    async def ask():
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        settle(future, None)
        settle(future, ValueError())
        assert future.cancelled()

    asyncio.run(ask())
    thread = EngineThread(small_engine())
    thread.loop = asyncio.new_event_loop()
    thread.loop.close()
    thread.tell(ask)
