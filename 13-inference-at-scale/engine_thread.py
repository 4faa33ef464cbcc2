"""Topic 13 - Engine Thread: the engine computes in a thread of its own while asyncio talks with a thousand clients.

    thread = EngineThread(engine)
    thread.start()                                           # within a running event loop
    answer = await thread.submit(prompt_ids, [params])       # ValueError, Overloaded or EngineDead; else it is queued
    async for choice, output in answer: ...                  # RequestOutputs as the engine makes them
    answer.close()                                           # aborts what has not finished; the blocks come back

A step of the engine takes milliseconds; in the event loop it would stop every other connection for as long. The engine
itself knows nothing of threads: only its own thread touches it, and commands wait in a queue between two steps. Every
call has a bounded buffer: who reads more slowly than the engine writes is aborted, so that no client can fill memory.
"""

import asyncio
import contextlib
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine_requests import EngineStats, Overloaded, RequestOutput, RequestParams

if TYPE_CHECKING:
    from serving_engine import Engine

STOPS = "the server stops"


class EngineDead(Exception):
    """The engine raised and its thread has ended: nothing will be answered any more."""


class SlowReader(Exception):
    """The buffer of a call is full: its client reads more slowly than the engine writes."""


class Answer:
    """What the engine makes for one call, choice by choice as it comes: `async for choice, output in answer`.

    The loop ends when every choice has finished. It raises SlowReader if the buffer ran over and EngineDead if the
    engine did. `close` may be called at any time and as often as one likes. All methods belong to the event loop.
    """

    def __init__(self, thread: "EngineThread", n_choices: int) -> None:
        self.thread = thread
        name = uuid.uuid4().hex
        self.choices = {f"{name}-{choice}": choice for choice in range(n_choices)}  # request id -> choice
        self.running = set(self.choices)
        self.failure: Exception | None = None
        self.admitted: asyncio.Future | None = None  # done when the engine has queued every choice, or refused
        self.pending: asyncio.Queue[RequestOutput | None] = asyncio.Queue(thread.max_pending * n_choices)

    def put(self, output: RequestOutput) -> None:
        """Take an output from the engine; the reader's buffer may be full, and then the call ends."""
        if output.finish_reason is not None:
            self.running.discard(output.request_id)
        try:
            self.pending.put_nowait(output)
        except asyncio.QueueFull:
            limit = self.pending.maxsize
            self.fail(SlowReader(f"the client left {limit} pieces of its answer unread; the request was aborted"))
            self.close()

    def fail(self, failure: Exception) -> None:
        """End the reader's loop with this error, after what is buffered."""
        self.failure = failure
        with contextlib.suppress(asyncio.QueueFull):  # a reader that waits has an empty buffer
            self.pending.put_nowait(None)

    def close(self) -> None:
        """Abort every choice that still runs, and give its blocks back."""
        if self.running:
            self.thread.abort(self.running)
            self.running = set()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        output = None
        if not self.pending.empty() or (self.running and self.failure is None):
            output = await self.pending.get()
        if output is None:
            if self.failure is not None:
                raise self.failure
            raise StopAsyncIteration
        return self.choices[output.request_id], output


class EngineThread:
    """An engine with its thread, and the event loop's side of it.

    Args:
        engine: anything with the engine's add_choices, abort, step, busy and stats
        max_pending: pieces of an answer that wait for a slow reader, for each choice
    """

    def __init__(self, engine: "Engine", max_pending: int = 256) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be >= 1, got {max_pending}")
        self.engine, self.max_pending = engine, max_pending
        self.failure: Exception | None = None  # why the thread has ended, if it was not asked to
        self.stopping = False
        self.latest: EngineStats = engine.stats()  # after the last step
        self.answers: dict[str, Answer] = {}  # of requests that run, by request id
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: end
        self.loop: asyncio.AbstractEventLoop | None = None
        self.n_threads = torch.get_num_threads()  # a new thread would take all cores
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # The event loop's side

    def start(self) -> None:
        """Start the thread; its outputs go to the event loop that is running now."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def submit(self, prompt: list[int], params: Sequence[RequestParams]) -> Answer:
        """Queue one request for each of `params`: all of them or none.

        Raises what the engine's `add_choices` raises (ValueError for what can never fit, Overloaded), and EngineDead.
        """
        if self.failure is not None:
            raise dead(self.failure)
        if self.stopping:
            raise EngineDead(STOPS)
        answer = Answer(self, len(params))
        answer.admitted = asyncio.get_running_loop().create_future()
        self.answers |= dict.fromkeys(answer.choices, answer)
        requests = dict(zip(answer.choices, params, strict=True))
        self.commands.put(partial(self.admit, prompt, requests, answer.admitted))
        try:
            await answer.admitted
        except BaseException:
            answer.close()
            raise
        return answer

    def abort(self, request_ids: set[str]) -> None:
        """Forget these requests: no output of theirs is delivered any more, and their blocks come back."""
        for request_id in request_ids:
            self.answers.pop(request_id, None)
        self.commands.put(partial(self.abort_all, tuple(request_ids)))

    def deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            answer = self.answers.get(output.request_id)
            if answer is not None:
                if output.finish_reason is not None:
                    del self.answers[output.request_id]
                answer.put(output)

    async def stop(self, timeout: float = 5.0) -> None:
        """End the thread after its current step; what still runs gets EngineDead."""
        self.stopping = True
        self.commands.put(None)
        await asyncio.to_thread(self.thread.join, timeout)
        self.fail_all(EngineDead(STOPS))

    def fail_all(self, failure: Exception) -> None:
        answers, self.answers = set(self.answers.values()), {}
        for answer in answers:
            answer.fail(failure)
            if answer.admitted is not None and not answer.admitted.done():
                answer.admitted.set_exception(failure)

    @property
    def alive(self) -> bool:
        """Whether the engine computes: it was started, has not failed and was not stopped."""
        return self.failure is None and not self.stopping and self.thread.is_alive()

    # The engine's side: everything below runs in the thread

    def run(self) -> None:
        torch.set_num_threads(self.n_threads)
        try:
            while self.carry_out():
                if self.engine.busy:
                    outputs = self.engine.step()
                    self.latest = self.engine.stats()
                    self.tell(self.deliver, outputs)
        except Exception as error:  # whatever it was, nobody may wait for an answer that will not come
            self.failure = error
            self.tell(self.fail_all, dead(error))

    def carry_out(self) -> bool:
        """Do what was asked for since the last step, waiting for it if there is nothing else to do; False: end."""
        wait = not self.engine.busy
        while True:
            try:
                work = self.commands.get(block=wait)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()
            self.latest = self.engine.stats()
            wait = False

    def admit(self, prompt: list[int], requests: dict[str, RequestParams], admitted: asyncio.Future) -> None:
        try:
            self.engine.add_choices(prompt, list(requests.values()), list(requests))
        except (ValueError, Overloaded) as error:  # any other one ends the thread
            self.tell(settle, admitted, error)
        else:
            self.tell(settle, admitted, None)

    def abort_all(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)

    def tell(self, function: Callable, *args: object) -> None:
        """Call in the event loop; a loop that is closed has nobody to tell."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)


def settle(future: asyncio.Future, error: Exception | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def dead(cause: Exception) -> EngineDead:
    return EngineDead(f"the engine failed: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}")
