"""Topic 13 - Broken parts: a batcher that loses blocks and a sampler that is biased, for the exercises to mend.

    from broken_parts import LeakyBatcher, biased_tokens, drawn

`Trace` audits the first; exercises_13.py sums over everything that the second can say.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Job:
    """One request of a batcher: its sizes, and how far it has come, in tokens."""

    n_prompt: int
    n_answer: int
    n_got: int = 0  # of the answer
    n_written: int = 0  # positions in its blocks

    @property
    def n_known(self) -> int:
        return self.n_prompt + self.n_got


class LeakyBatcher:
    """Continuous batching over n_blocks blocks, prompts in pieces of `chunk`; right, but for blocks that get lost.

    `free` lists the free blocks, `tables` the blocks of each request that runs, by name, the first admitted first.
    """

    def __init__(self, n_blocks: int, block_size: int, chunk: int) -> None:
        self.n_blocks, self.block_size, self.chunk = n_blocks, block_size, chunk
        self.free = list(range(n_blocks))
        self.tables: dict[str, list[int]] = {}
        self.waiting: list[str] = []
        self.jobs: dict[str, Job] = {}  # those that wait and those that run

    def blocks_for(self, n_positions: int) -> int:
        return math.ceil(n_positions / self.block_size)

    def add(self, name: str, n_prompt: int, n_answer: int) -> None:
        """Queue a request. Raises ValueError for one that the pool could never hold."""
        if self.blocks_for(n_prompt + n_answer - 1) > self.n_blocks:
            raise ValueError(f"{name} needs more blocks than the pool's {self.n_blocks}")
        self.jobs[name] = Job(n_prompt, n_answer)
        self.waiting.append(name)

    def abort(self, name: str) -> None:
        """End a request wherever it is; nothing happens if it has ended."""
        if self.jobs.pop(name, None) is None:
            return
        if name in self.waiting:
            self.waiting.remove(name)
        else:
            del self.tables[name]

    def step(self) -> list[str]:
        """A token for each answer that runs, a piece of each prompt; the names of those that got a token."""
        got, self.short = [], False
        for name in list(self.tables):
            if name in self.tables:  # else it has just been preempted
                job = self.jobs[name]
                decodes = job.n_got and job.n_written == job.n_known - 1
                got += self.decode(name) if decodes else self.read(name)
        while self.waiting and not self.short:
            job = self.jobs[self.waiting[0]]
            if self.blocks_for(min(self.chunk, job.n_known)) > len(self.free):
                break
            name = self.waiting.pop(0)
            self.tables[name] = []
            got += self.read(name)
        return got

    def make_room(self, name: str, n_positions: int) -> bool:
        """Blocks for so many positions; while there are none, whoever was admitted last gives its own back."""
        while len(self.tables[name]) < self.blocks_for(n_positions):
            if self.free:
                self.tables[name].append(self.free.pop())
                continue
            victim = list(self.tables)[-1]
            self.preempt(victim)
            if victim == name:
                return False
        return True

    def preempt(self, name: str) -> None:
        """Send a request back to the head of the queue, to be computed again."""
        self.short = True
        del self.tables[name]
        self.jobs[name].n_written = 0
        self.waiting.insert(0, name)

    def decode(self, name: str) -> list[str]:
        job = self.jobs[name]
        if not self.make_room(name, job.n_known):
            return []
        job.n_written += 1
        job.n_got += 1
        if job.n_got == job.n_answer:
            self.free += self.tables.pop(name)
            del self.jobs[name]
        return [name]

    def read(self, name: str) -> list[str]:
        job = self.jobs[name]
        n_new = min(self.chunk, job.n_known - job.n_written)
        if not self.make_room(name, job.n_written + n_new):
            return []
        job.n_written += n_new
        if job.n_written < job.n_known:
            return []
        job.n_got += 1  # what comes after the last token of the prompt
        if job.n_got == job.n_answer:
            del self.jobs[name], self.tables[name]
        return [name]


class Trace:
    """A batcher under arrivals, aborts and steps, with a book of its own about who is owed how many tokens."""

    def __init__(self, make: Callable, n_blocks: int, block_size: int, chunk: int) -> None:
        self.batcher, self.size = make(n_blocks, block_size, chunk), block_size
        self.all_blocks = list(range(n_blocks))
        self.owed: dict[str, list[int]] = {}  # prompt, answer, and tokens so far
        self.work, self.after, self.got = 0, "at the start", []

    def add(self, name: str, n_prompt: int, n_answer: int) -> str | None:
        self.batcher.add(name, n_prompt, n_answer)
        self.owed[name] = [n_prompt, n_answer, 0]
        self.work += n_prompt + n_answer
        self.after, self.got = f"after {name} came", []
        return self.fault()

    def abort(self, name: str) -> str | None:
        self.batcher.abort(name)
        self.owed.pop(name, None)
        self.after, self.got = f"after an abort of {name}", []
        return self.fault()

    def step(self) -> str | None:
        self.got, self.after = list(self.batcher.step()), "after a step"
        for name in self.got:
            if name not in self.owed:
                return f"{name} got a token although it had ended"
            self.owed[name][2] += 1
            if self.owed[name][2] == self.owed[name][1]:
                del self.owed[name]
                self.after = f"after {name} ended"
        if len(self.got) != len(set(self.got)):
            return f"a request got two tokens in one step: {self.got}"
        return self.fault()

    def finish(self) -> str | None:
        for _ in range(10 * self.work + 10):
            if not self.owed:
                return self.fault()
            if fault := self.step():
                return fault
        return f"{len(self.owed)} requests are still not done after {10 * self.work} steps; blocks or requests are lost"

    def fault(self) -> str | None:
        """What is wrong with the blocks, if anything."""
        free, tables = list(self.batcher.free), {name: list(table) for name, table in self.batcher.tables.items()}
        found = sorted([*free, *itertools.chain.from_iterable(tables.values())])
        if missing := [block for block in self.all_blocks if block not in found]:
            return f"{self.after}, {len(missing)} blocks are neither free nor in a table: {missing[:5]}"
        if found != self.all_blocks:
            return f"{self.after}, a block is in two places, or is none of the pool's"
        if strange := [name for name in tables if name not in self.owed]:
            return f"{self.after}, {strange[0]} still has a table although it has ended"
        for name, table in tables.items():
            n_prompt, n_answer, n_got = self.owed[name]
            written, most = n_prompt + n_got - 1, math.ceil((n_prompt + n_answer - 1) / self.size)
            if len(table) > most:
                return f"{self.after}, {name} holds {len(table)} blocks and can never need more than {most}"
            if name in self.got and len(table) * self.size < written:
                return f"{self.after}, {name} holds {len(table)} blocks of {self.size} for {written} positions"
        return None


def drawn(weights: Sequence[float], number: float) -> int:
    """Draw by inversion: the first id at which the running sum exceeds number, in [0, 1), of the whole."""
    goal, running = number * math.fsum(weights), 0.0
    possible = [token for token, weight in enumerate(weights) if weight > 0]
    for token in possible:
        running += weights[token]
        if running > goal:
            return token
    return possible[-1]


def biased_tokens(p: list[list[float]], q: list[list[float]], draft: list[int], numbers: list[float]) -> list[int]:
    """Check a draft, wrongly. Shapes: p (draft + 1, vocab), q (draft, vocab), numbers (draft + 1) in [0, 1)."""
    tokens = []
    for place, guess in enumerate(draft):
        if numbers[place] * q[place][guess] >= p[place][guess]:
            return [*tokens, drawn(p[place], numbers[place])]
        tokens.append(guess)
    return [*tokens, drawn(p[len(draft) - 1], numbers[-1])]
