"""Exercises of topic 13: write each function in a file of your own, then

python 13-inference-at-scale/exercises_13.py my_answers.py

Two of them mend what is broken in broken_parts.py.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from broken_parts import LeakyBatcher, Trace, biased_tokens, drawn
from byte_automata import expression_dfa
from constrained_decoding import TokenAutomaton, TokenBytes
from engine_requests import RequestParams, RowState
from exercises_08 import numbers as normal
from llm_config import ModelConfig
from paged_cache import BlockPool, FloatStore, StepRows, store_bytes
from request_sampling import choose, filtered_probs
from stop_strings import TextStream
from workbench import Exercise, first_difference, grade

# Blocks and bytes

Waiting = tuple[str, list[int], int]  # tenant, prompt, tokens of the answer


def blocks_and_bytes(
    requests: Sequence[Waiting], block_size: int, config: ModelConfig, bytes_per_number: int
) -> tuple[int, int]:
    known, n_blocks = set(), 0
    for tenant, prompt, n_new in requests:
        starts = [(tenant, tuple(prompt[:end])) for end in range(block_size, len(prompt) + 1, block_size)]
        usable = starts[: (len(prompt) - 1) // block_size]  # the last token is computed in any case
        n_shared = len(list(itertools.takewhile(known.__contains__, usable)))
        n_blocks += math.ceil((len(prompt) + n_new - 1) / block_size) - n_shared
        known.update(starts)
    per_position = 2 * config.n_layers * config.n_kv_heads * config.d_head * bytes_per_number
    return n_blocks, n_blocks * block_size * per_position


SHAPE = ModelConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, d_head=8, d_ff=10, max_seq_len=90)
POLITE = list(range(10, 19))  # nine tokens that several prompts begin with


def check_blocks_and_bytes(answer: Callable) -> str | None:
    cases = {
        "three requests, by hand": ([("", [1, 2, 3, 4, 5, 6], 3), ("", [1, 2, 3, 4, 9], 4), ("", [7, 8], 2)], 4),
        "one request that just fits its block": ([("", [5, 6, 7], 2)], 4),
        "one request with one token too many for its block": ([("", [5, 6, 7], 3)], 4),
        "the same prompt twice, of two whole blocks": ([("", POLITE[:8], 1)] * 2, 4),
        "the same prompt three times": ([("", POLITE, 2)] * 3, 4),
        "two tenants, the second of them twice": ([("a", POLITE, 5), ("b", POLITE, 5), ("b", POLITE, 7)], 4),
        "the same tokens, but something else before them": (
            [("", [1, 1, 2, 2, 3], 1), ("", [4, 4, 2, 2, 3], 1), ("", [1, 1, 5, 2, 2, 2, 3], 1)],
            2,
        ),
        "the same block after another one": (
            [("", [1, 1, 2, 2, 3], 1), ("", [5, 5, 4, 4, 3], 1), ("", [1, 1, 4, 4, 3], 1)],
            2,
        ),
        "alike up to the middle of a block": ([("", [*POLITE, 1, 2], 4), ("", [*POLITE, 3, 4], 4)], 5),
        "the third is like the first": ([("", POLITE, 3), ("", [1, 2, 3], 30), ("", [*POLITE, 1], 3)], 2),
        "blocks of one": ([("", [1, 2, 3], 2), ("", [1, 2, 4, 4], 1)], 1),
        "nothing to share": ([("", [1], 1), ("", [2, 3, 4], 9), ("", [5] * 11, 6)], 8),
    }
    for name, (requests, block_size) in cases.items():
        pool, tables = BlockPool(200, block_size), []
        for tenant, prompt, _ in requests:
            tables.append(pool.open(prompt, len(prompt), tenant))
            pool.advance(tables[-1], prompt)
        for place, (table, (_, prompt, n_new)) in enumerate(zip(tables, requests, strict=True)):
            if n_new > 1:
                pool.reserve(table, n_new - 1)
                pool.advance(table, [*prompt, *[30 + place] * (n_new - 1)])
        n_blocks = pool.n_blocks - pool.n_free
        for n_bytes in (2, 4):
            want = (n_blocks, store_bytes(BlockPool(n_blocks, block_size), SHAPE, 0, n_bytes))
            got = answer(
                [(tenant, list(prompt), n_new) for tenant, prompt, n_new in requests], block_size, SHAPE, n_bytes
            )
            if not (isinstance(got, tuple | list) and len(got) == 2):
                return f"{name}: expected (blocks, bytes), got {got!r}"
            for what, found, wanted in zip(("blocks", "bytes"), got, want, strict=True):
                if found != wanted:
                    return (
                        f"{name}, blocks of {block_size}, {n_bytes} bytes a number: {found} {what}, expected {wanted}"
                    )
    return None


def bill_with(
    n_written: Callable = lambda prompt, n_new: len(prompt) + n_new - 1,
    n_usable: Callable = lambda prompt, size: (len(prompt) - 1) // size,
    name: Callable = lambda tenant, prompt, start, end: (tenant, tuple(prompt[:end])),
    to_whole: Callable = math.ceil,
    remembers: Callable = lambda known, starts: known | starts,
    numbers: Callable = lambda config: 2 * config.n_layers * config.n_kv_heads * config.d_head,
    of_blocks: bool = True,
) -> Callable:
    """A wrong solution: other positions, other ideas of what two blocks share, or other bytes."""

    def wrong(requests, block_size, config, bytes_per_number):
        known, n_blocks, n_positions = set(), 0, 0
        for tenant, prompt, n_new in requests:
            ends = range(block_size, len(prompt) + 1, block_size)
            starts = [name(tenant, prompt, end - block_size, end) for end in ends]
            usable = starts[: n_usable(prompt, block_size)]
            n_shared = len(list(itertools.takewhile(known.__contains__, usable)))
            n_blocks += to_whole(n_written(prompt, n_new) / block_size) - n_shared
            n_positions += n_written(prompt, n_new) - n_shared * block_size
            known = remembers(known, set(starts))
        kept = n_blocks * block_size if of_blocks else n_positions
        return n_blocks, kept * numbers(config) * bytes_per_number

    return wrong


def blocks_laid_end_to_end(requests, block_size, config, bytes_per_number):
    """All positions counted together, as if two requests could share the end of a block."""
    per_block = blocks_and_bytes([("", [1], 1)], block_size, config, bytes_per_number)[1]
    n_blocks = math.ceil(sum(len(prompt) + n_new - 1 for _, prompt, n_new in requests) / block_size)
    return n_blocks, n_blocks * per_block


# A scheduler that loses blocks


class MendedBatcher(LeakyBatcher):
    """Whoever leaves, on whatever way, gives its blocks back."""

    def abort(self, name: str) -> None:
        self.free += self.tables.get(name, [])
        super().abort(name)

    def preempt(self, name: str) -> None:
        self.free += self.tables[name]
        super().preempt(name)

    def read(self, name: str) -> list[str]:
        table = self.tables[name]
        got = super().read(name)
        if name not in self.jobs:
            self.free += table
        return got


def check_batcher(answer: Callable) -> str | None:
    by_hand = {
        "an abort while it runs": [("add", "a", 5, 3), ("step",), ("abort", "a")],
        "an abort while it waits": [("add", "a", 5, 3), ("abort", "a"), ("abort", "a")],
        "an answer of one token": [("add", "a", 5, 1), ("step",), ("step",)],
        "one that loses its blocks": [("add", "a", 6, 11), ("add", "b", 6, 9), *[("step",)] * 12],
        "an abort after that": [("add", "a", 6, 11), ("add", "b", 6, 9), *[("step",)] * 7, ("abort", "b")],
    }
    for name, events in by_hand.items():
        trace = Trace(answer, 8, 2, 8)
        for what, *args in events:
            if fault := getattr(trace, what)(*args):
                return f"{name}: {fault}"
        if fault := trace.finish():
            return f"{name}: {fault}"
    for seed in range(40):
        if fault := random_trace(answer, random.Random(seed)):
            return f"random trace {seed}: {fault}"
    roomy = Trace(answer, 60, 2, 4)
    for index, (n_prompt, n_answer) in enumerate([(9, 6), (3, 8), (13, 1), (1, 7)]):
        roomy.add(f"r{index}", n_prompt, n_answer)
    for _ in range(8):  # three pieces of the first prompt, the last of which gives a token, then five more
        if fault := roomy.step():
            return f"a pool with room for all: {fault}"
    if roomy.owed:
        return "a pool with room for all: they should run side by side and be done in 8 steps"
    crowded = Trace(answer, 8, 2, 8)
    crowded.add("a", 6, 11)
    crowded.add("b", 6, 9)
    crowded.step()
    if [n_got for _, _, n_got in crowded.owed.values()] != [1, 1]:
        return "two prompts that fit the pool: both should be read at once, though their answers will not fit together"
    return None


def random_trace(make: Callable, rng: random.Random) -> str | None:
    n_blocks, size, chunk = rng.randint(4, 9), rng.randint(1, 3), rng.randint(1, 6)
    trace = Trace(make, n_blocks, size, chunk)
    for index in range(60):
        lot = rng.random()
        if lot < 0.25:
            n_prompt = rng.randint(1, (n_blocks * size + 1) // 2)
            fault = trace.add(f"r{index}", n_prompt, rng.randint(1, n_blocks * size + 1 - n_prompt))
        elif lot < 0.35 and index:
            fault = trace.abort(f"r{rng.randrange(index)}")  # it may wait, run, have ended, or never have been
        else:
            fault = trace.step()
        if fault:
            return fault
    return trace.finish()


def batcher_without(*names: str) -> type:
    """Some of the three leaks are mended, those named are not."""
    return type("Half", (MendedBatcher,), {name: getattr(LeakyBatcher, name) for name in names})


class FreesWhatIsListed(MendedBatcher):
    """An abort frees the blocks and leaves the table, so that they are in two places."""

    def abort(self, name: str) -> None:
        self.free += self.tables.get(name, [])
        self.jobs.pop(name, None)
        if name in self.waiting:
            self.waiting.remove(name)


class FreesTwice(MendedBatcher):
    """Answers that end are swept up after every step, those too that have given their blocks back."""

    def step(self) -> list[str]:
        before = {name: list(table) for name, table in self.tables.items()}
        got = super().step()
        self.free += itertools.chain.from_iterable(table for name, table in before.items() if name not in self.jobs)
        return got


class StartsOver(MendedBatcher):
    """Whoever loses its blocks loses its answer, too, and says it again."""

    def preempt(self, name: str) -> None:
        super().preempt(name)
        self.jobs[name].n_got = 0


class GivesUp(MendedBatcher):
    """Whoever loses its blocks is not heard of again."""

    def preempt(self, name: str) -> None:
        super().preempt(name)
        self.waiting.remove(name)
        del self.jobs[name]


class OneByOne(MendedBatcher):
    """Nobody is ever preempted, for nobody runs beside another."""

    def step(self) -> list[str]:
        waiting, self.waiting = self.waiting, self.waiting[: 0 if self.tables else 1]
        held_back = waiting[len(self.waiting) :]
        got = super().step()
        self.waiting += held_back
        return got


class ReservesEverything(MendedBatcher):
    """Nobody is ever preempted, for everybody waits for all blocks that it can ever need."""

    def step(self) -> list[str]:
        longest = {name: self.blocks_for(job.n_prompt + job.n_answer - 1) for name, job in self.jobs.items()}
        room = self.n_blocks - sum(longest[name] for name in self.tables)
        fit = list(
            itertools.takewhile(lambda total: total <= room, itertools.accumulate(map(longest.get, self.waiting)))
        )
        held_back = self.waiting[len(fit) :]
        del self.waiting[len(fit) :]
        got = super().step()
        self.waiting += held_back
        return got


class ForgetsTheQueue(MendedBatcher):
    """An abort takes out what runs and leaves what waits in the queue."""

    def abort(self, name: str) -> None:
        if name in self.tables:
            super().abort(name)


class EmptiesThePool(MendedBatcher):
    """An abort frees all blocks, those of the others too."""

    def abort(self, name: str) -> None:
        super().abort(name)
        self.free = list(range(self.n_blocks))


class HoldsNothing(MendedBatcher):
    """No block is ever lost by whoever takes none."""

    def make_room(self, name: str, n_positions: int) -> bool:
        return True


# The paged gather


def paged_keys(
    store: Tensor, tables: Sequence[Sequence[int]], lengths: Sequence[int], n_new: int
) -> tuple[Tensor, Tensor]:
    n_heads, width = store.shape[1], store.shape[3]
    keys = store.new_zeros(len(tables), n_heads, max(lengths), width)  # (rows, kv_heads, key, width)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        side_by_side = store[list(table)].transpose(0, 1).flatten(1, 2)  # (kv_heads, positions, width)
        keys[row, :, :length] = side_by_side[:, :length]
    at = torch.tensor(lengths)[:, None] - n_new + torch.arange(n_new)  # (rows, new)
    mask = torch.arange(max(lengths)) <= at[:, :, None]  # (rows, new, key)
    return keys, mask[:, None]


def check_paged_keys(answer: Callable) -> str | None:
    cases = {
        "one row, one block": (4, [[2]], [3], 1),
        "one row, blocks out of order": (3, [[4, 1, 3]], [8], 1),
        "rows of different lengths": (3, [[5, 0, 2], [1], [4, 3]], [7, 3, 5], 1),
        "three new tokens": (3, [[5, 0, 2], [1, 4], [3]], [9, 4, 3], 3),
        "two rows share a block": (2, [[3, 1], [3, 5], [0, 4]], [4, 3, 3], 2),
        "blocks that are reserved and not yet needed": (2, [[1, 4, 0], [5, 2]], [3, 2], 1),
    }
    for name, (size, tables, lengths, n_new) in cases.items():
        pool, config = BlockPool(6, size), ModelConfig(n_layers=1, n_heads=6, n_kv_heads=3, d_head=4)
        paged = FloatStore(pool, config, torch.float64, "cpu")
        clean = normal(6, 3, size, 4, seed=sum(lengths))
        paged.layers[0][0][0].copy_(clean)
        widest = max(map(len, tables))
        filled = np.array([[*table, *[0] * (widest - len(table))] for table in tables])
        starts = np.array(lengths) - n_new
        rows = StepRows(paged, np.zeros((len(tables), n_new), np.int64), np.full(len(tables), n_new), starts, filled)
        keys, _ = paged.read(0, rows.read_at, (rows.n_rows, rows.n_keys), torch.float64)
        longest, own = max(lengths), torch.arange(rows.n_keys) < torch.tensor(lengths)[:, None]
        keys = torch.where(own[:, None, :, None], keys, 0.0)[:, :, :longest]
        used = {
            (table[place // size], place % size)
            for table, length in zip(tables, lengths, strict=True)
            for place in range(length)
        }
        dirty = clean.clone()
        for block, offset in itertools.product(range(6), range(size)):
            if (block, offset) not in used:
                dirty[block, :, offset] = math.nan  # what another request has left
        got = answer(dirty, [list(table) for table in tables], list(lengths), n_new)
        if not (isinstance(got, tuple | list) and len(got) == 2 and all(isinstance(part, Tensor) for part in got)):
            return f"{name}: expected (keys, mask), two tensors, got {got!r:.80}"
        if difference := first_difference(got[0], keys, 0.0):
            return f"{name}, keys: {difference}; what lies behind a row's own positions is 0"
        if got[1].dtype != torch.bool:
            return f"{name}, mask: {got[1].dtype}, expected torch.bool"
        if difference := first_difference(got[1], rows.mask()[..., :longest], 0.0):
            return f"{name}, mask (row, 1, new, key): {difference}; True = may attend"
    return None


def keys_with(
    blocks: Callable = list,
    lay: Callable = lambda part: part.transpose(0, 1).flatten(1, 2),
    at: Callable = lambda lengths, n_new: lengths[:, None] - n_new + torch.arange(n_new),
    meets: Callable = lambda key, at: key <= at,
    keep: Callable = lambda length, size: length,
    align_right: bool = False,
) -> Callable:
    """A wrong solution: another order of blocks or axes, other positions, another mask, or leftovers."""

    def wrong(store, tables, lengths, n_new):
        longest, size = max(lengths), store.shape[2]
        keys = store.new_zeros(len(tables), store.shape[1], longest, store.shape[3])
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            own = lay(store[blocks(table)])[:, : min(longest, keep(length, size))]
            if align_right:
                keys[row, :, longest - own.shape[1] :] = own
            else:
                keys[row, :, : own.shape[1]] = own
        mask = meets(torch.arange(longest), at(torch.tensor(lengths), n_new)[:, :, None])
        return keys, mask[:, None]

    return wrong


# One step of speculative sampling


def accept_or_replace(p: list[float], q: list[float], guess: int, u: float, v: float) -> tuple[int, bool]:
    if u * q[guess] < p[guess]:
        return guess, True
    rest = [max(0.0, own - drafted) for own, drafted in zip(p, q, strict=True)]
    return drawn(rest if any(rest) else p, v), False


def midpoints(n: int) -> list[float]:
    """One number of each of n equal parts of [0, 1): no threshold that is a multiple of 1/n lies on one of them."""
    return [(index + 0.5) / n for index in range(n)]


def shares(weights: Sequence[int]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


FINEST = 60  # parts of [0, 1) at least: a threshold that is off by more than half a part is found
ROWS = [  # whole-number weights of p and q, of equal sums
    ((3, 1, 2), (1, 3, 2)),
    ((1, 4, 0, 5), (4, 2, 3, 1)),
    ((0, 2, 2, 2), (3, 1, 1, 1)),
    ((5, 1), (2, 4)),
    ((2, 0, 4, 0, 2), (0, 4, 2, 2, 0)),
    ((2, 3, 1), (2, 3, 1)),
    ((0, 0, 6), (1, 2, 3)),
    ((1, 2, 3), (0, 0, 6)),
]


def check_accept_or_replace(answer: Callable) -> str | None:
    for own, drafted in ROWS:
        p, q, whole = shares(own), shares(drafted), sum(own)
        case = f"p = {own}/{whole}, q = {drafted}/{whole}"
        n_u = math.lcm(*(b for a, b in zip(own, drafted, strict=True) if 0 < a < b))
        n_v = max(1, sum(max(0, a - b) for a, b in zip(own, drafted, strict=True)))
        n_u, n_v = (n * math.ceil(FINEST / n) for n in (n_u, n_v))
        law = [Fraction(0)] * len(own)
        for guess, weight in enumerate(drafted):
            if not weight:
                continue
            n_kept = 0
            for u, v in itertools.product(midpoints(n_u), midpoints(n_v)):
                token, kept = answer(list(p), list(q), guess, u, v) or (None, False)
                if type(token) is not int or not 0 <= token < len(p) or bool(kept) != (token == guess):
                    return f"{case}: a guess of {guess} gave {(token, kept)!r}, which is no (token, was it the guess)"
                n_kept += bool(kept)
                law[token] += Fraction(weight, whole * n_u * n_v)
            wanted = min(Fraction(1), Fraction(own[guess], weight))
            if Fraction(n_kept, n_u * n_v) != wanted:
                kept = n_kept / (n_u * n_v)
                return f"{case}: a guess of {guess} is kept with probability {kept:.4f}, expected {float(wanted):.4f}"
        for token, (found, weight) in enumerate(zip(law, own, strict=True)):
            if found != Fraction(weight, whole):
                return (
                    f"{case}: token {token} comes out with probability {float(found):.4f}, p has {weight / whole:.4f}"
                )
    for number in (0.0, 1 - 2**-53):  # the ends of what a generator gives
        for own, drafted in ROWS:
            for guess in (token for token, weight in enumerate(drafted) if weight):
                token, _ = answer(shares(own), shares(drafted), guess, number, number)
                if not 0 <= token < len(own) or not own[token]:
                    return f"u = v = {number!r}, p = {own}, guess {guess}: token {token}, which p never says"
    return None


def step_with(
    chance: Callable = lambda p, q: min(1.0, p / q),
    rest: Callable = lambda p, q: max(0.0, p - q),
    number: Callable = lambda u, v: v,
    draw: Callable = drawn,
    kept: Callable = lambda u, chance: u < chance,
) -> Callable:
    """A wrong solution: another chance, another remainder, another number, or another way to draw."""

    def wrong(p, q, guess, u, v):
        if kept(u, chance(p[guess], q[guess])):
            return guess, True
        weights = [rest(a, b) for a, b in zip(p, q, strict=True)]
        token = draw(weights if any(weights) else p, number(u, v))
        return token, token == guess

    return wrong


def drawn_from_whole_sums(weights: Sequence[float], number: float) -> int:
    """The running sum compared with the number itself, as if the weights had the sum 1."""
    sums = list(itertools.accumulate(weights))
    return next((token for token, total in enumerate(sums) if total > number), len(sums) - 1)


def drawn_at_or_above(weights: Sequence[float], number: float) -> int:
    """The first running sum that is at least the goal: at 0 that is the first token, whatever its weight."""
    sums = list(itertools.accumulate(weights))
    return next((token for token, total in enumerate(sums) if total >= number * sums[-1]), len(sums) - 1)


# A speculative sampler that is biased


def mended_tokens(p: list[list[float]], q: list[list[float]], draft: list[int], numbers: list[float]) -> list[int]:
    tokens = []
    for place, guess in enumerate(draft):
        if numbers[place] * q[place][guess] >= p[place][guess]:
            rest = [max(0.0, own - drafted) for own, drafted in zip(p[place], q[place], strict=True)]
            return [*tokens, drawn(rest, numbers[-1])]
        tokens.append(guess)
    return [*tokens, drawn(p[len(draft)], numbers[-1])]


Chain = dict[tuple[int, ...], tuple[int, ...]]  # prefix -> whole-number weights of the next token

DRAFT: Chain = {(): (4, 1, 1), (0,): (1, 1, 4), (1,): (2, 1, 3), (2,): (1, 2, 3)}
TARGET: Chain = {
    (): (1, 2, 3),
    **{(0,): (3, 2, 1), (1,): (2, 4, 0), (2,): (3, 0, 3)},
    **{(0, 0): (1, 4, 1), (0, 1): (6, 0, 0), (0, 2): (2, 2, 2), (1, 0): (3, 2, 1), (1, 1): (0, 1, 5)},
    **{(1, 2): (1, 1, 4), (2, 0): (4, 1, 1), (2, 1): (0, 3, 3), (2, 2): (1, 3, 2)},
}
FINE = 12  # every threshold of these chains is a multiple of 1/12


def path_chance(chain: Chain, tokens: Sequence[int], start: int = 0) -> Fraction:
    """How likely a chain says tokens[start:] after tokens[:start]."""
    steps = ((chain[tuple(tokens[:place])], tokens[place]) for place in range(start, len(tokens)))
    return math.prod((Fraction(weights[token], sum(weights)) for weights, token in steps), start=Fraction(1))


def what_it_says(answer: Callable, n_draft: int) -> Counter:
    """How likely an answer makes each list of tokens of drafts of n_draft tokens. Raises ValueError for the rest."""
    said = Counter()
    for draft in itertools.product(range(3), repeat=n_draft):
        p = [shares(TARGET[draft[:place]]) for place in range(n_draft + 1)]
        q = [shares(DRAFT[draft[:place]]) for place in range(n_draft)]
        counts = Counter()
        for lots in itertools.product(midpoints(FINE), repeat=n_draft + 1):
            tokens = answer([list(row) for row in p], [list(row) for row in q], list(draft), list(lots))
            if not isinstance(tokens, list) or not 1 <= len(tokens) <= n_draft + 1 or not set(tokens) <= {0, 1, 2}:
                raise ValueError(f"a draft of {list(draft)} gave {tokens!r}, no list of 1 to {n_draft + 1} tokens")
            counts[tuple(tokens)] += 1
        for tokens, count in counts.items():
            said[tokens] += count * path_chance(DRAFT, draft) / FINE ** (n_draft + 1)
    return said


def most_tokens(n_draft: int) -> Fraction:
    """Tokens that a pass gives on average if each guess is kept as often as it may be."""
    mean = Fraction(1)
    for n_kept in range(1, n_draft + 1):
        for start in itertools.product(range(3), repeat=n_kept):
            places = ((start[:place], start[place]) for place in range(n_kept))
            mean += math.prod(Fraction(min(TARGET[before][token], DRAFT[before][token]), 6) for before, token in places)
    return mean


def check_mended_tokens(answer: Callable) -> str | None:
    for n_draft in (0, 1, 2):
        said = what_it_says(answer, n_draft)
        for text in itertools.product(range(3), repeat=n_draft + 1):
            starts = (text[: n + 1] for n in range(n_draft + 1))  # what is still missing, the target says as it would
            found = sum(said[start] * path_chance(TARGET, text, len(start)) for start in starts)
            wanted = path_chance(TARGET, text)
            if found != wanted:
                say = f"the target says {list(text)} with probability {float(wanted):.4f}"
                return f"drafts of {n_draft}: {say}, speculation with {float(found):.4f}"
        mean, most = sum(len(tokens) * chance for tokens, chance in said.items()), most_tokens(n_draft)
        if mean != most:
            return f"drafts of {n_draft}: {float(mean):.4f} tokens a pass, and {float(most):.4f} can be had"
    return None


def sampler_with(
    rest: Callable = lambda p, q: [max(0.0, a - b) for a, b in zip(p, q, strict=True)],
    number: Callable = lambda numbers, place: numbers[-1],
    last: Callable = lambda p, q: p[-1],
    goes_on: bool = False,
    refuses: Callable = lambda u, p, q: u * q >= p,
) -> Callable:
    """A wrong solution: some of the three faults are left, or there is another one."""

    def wrong(p, q, draft, numbers):
        tokens = []
        for place, guess in enumerate(draft):
            if refuses(numbers[place], p[place][guess], q[place][guess]):
                tokens.append(drawn(rest(p[place], q[place]), number(numbers, place)))
                if goes_on:
                    continue
                return tokens
            tokens.append(guess)
        weights = last(p, q)
        return [*tokens, drawn(weights, numbers[-1])] if weights else tokens or [drawn(p[0], numbers[-1])]

    return wrong


# A token of one row


def filtered_draw(
    logits: Tensor, temperature: float, top_p: float, min_p: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    probs = (logits / temperature).softmax(dim=0)  # (vocab)
    ordered = probs.sort(descending=True).values  # (vocab)
    before = ordered.cumsum(dim=0) - ordered  # (vocab)
    least = max(ordered[before < top_p][-1], min_p * ordered[0])
    probs = torch.where(probs >= least, probs, 0.0)  # (vocab)
    probs = probs / probs.sum()  # (vocab)
    number = torch.rand(1, generator=generator, dtype=torch.float64)
    return probs, drawn(probs.tolist(), number.item())


def check_filtered_draw(answer: Callable) -> str | None:
    cases = {
        "nothing filtered": ([1.0, 2.0, 0.5, 3.0], 1.0, 1.0, 0.0),
        "top_p 0.7": ([2.0, 1.0, 0.0, -1.0, 1.5], 1.0, 0.7, 0.0),
        "top_p so small that one token is left": ([0.0, 0.3, 0.1], 1.0, 0.05, 0.0),
        "a tie at the edge of the nucleus": ([1.0, 0.0, 1.0, 1.0, 2.0, -9.0], 1.0, 0.6, 0.0),
        "all alike": ([0.5] * 5, 1.0, 0.3, 0.0),
        "min_p 0.2": ([2.0, 1.0, 0.3, -1.0, 1.5], 1.0, 1.0, 0.2),
        "min_p 1 with two likeliest": ([1.0, 3.0, 2.9, 3.0], 1.0, 1.0, 1.0),
        "min_p is the stricter": ([2.0, 1.0, 0.0, -1.0, 1.5], 1.0, 0.97, 0.3),
        "top_p is the stricter": ([2.0, 1.0, 0.0, -1.0, 1.5], 1.0, 0.5, 0.01),
        "temperature 0.5, top_p 0.8": ([2.0, 1.0, 0.0, -1.0, 1.5], 0.5, 0.8, 0.0),
        "temperature 2, min_p 0.3": ([2.0, 1.0, 0.0, -1.0, 1.5], 2.0, 1.0, 0.3),
        "large logits": ([900.0, 901.0, 899.5, 100.0], 1.0, 0.95, 0.05),
    }
    for name, (logits, temperature, top_p, min_p) in cases.items():
        row = torch.tensor(logits, dtype=torch.float64)
        params = RequestParams(temperature=temperature, top_p=top_p, min_p=min_p)
        state = RowState(params, [], generator=torch.Generator().manual_seed(len(name)))
        own, everyone = torch.Generator().manual_seed(len(name)), torch.get_rng_state()
        want = filtered_probs(row[None], [state])[0]
        for count in range(12):
            got = answer(row.clone(), temperature, top_p, min_p, own)
            if not (isinstance(got, tuple | list) and len(got) == 2 and isinstance(got[0], Tensor)):
                return f"{name}: expected (probs, token), got {got!r:.80}"
            if not count and (difference := first_difference(got[0], want, 1e-12)):
                return f"{name}, probs: {difference}; as likely as the last one that stays means to stay"
            token = choose(row[None], [state]).ids[0]
            if got[1] != token:
                return f"{name}, draw {count + 1} of one generator: token {got[1]!r}, expected {token}"
        if not torch.equal(own.get_state(), state.generator.get_state()):
            return f"{name}: a draw takes one number of the generator, yours takes more or none"
        if not torch.equal(everyone, torch.get_rng_state()):
            return f"{name}: it draws from the generator that all requests share"
    return None


def draw_with(
    nucleus: Callable = lambda ordered, top_p: ordered[ordered.cumsum(0) - ordered < top_p][-1],
    floor: Callable = lambda ordered, min_p: min_p * ordered[0],
    both: Callable = max,
    renewed: bool = True,
    late_temperature: bool = False,
    choice: Callable | None = None,
) -> Callable:
    """A wrong solution: another nucleus, another floor, another order, or another way to draw."""

    def wrong(logits, temperature, top_p, min_p, generator):
        probs = (logits if late_temperature else logits / temperature).softmax(dim=0)
        ordered = probs.sort(descending=True).values
        kept = probs >= both(nucleus(ordered, top_p), floor(ordered, min_p))
        if late_temperature:
            probs = (logits / temperature).softmax(dim=0)
        probs = probs * kept
        whole = probs / probs.sum()
        if choice is not None:
            return whole, choice(whole, generator)
        number = torch.rand(1, generator=generator, dtype=torch.float64)
        return whole if renewed else probs, drawn(probs.tolist(), number.item())

    return wrong


def nucleus_by_place(logits, temperature, top_p, min_p, generator):
    """A tie is cut where the sorting happened to put it."""
    whole, _ = filtered_draw(logits, temperature, 1.0, min_p, torch.Generator())
    probs = (logits / temperature).softmax(dim=0)
    ordered, order = probs.sort(descending=True, stable=True)
    removed = order[ordered.cumsum(0) - ordered >= top_p]
    whole[removed] = 0
    whole = whole / whole.sum()
    return whole, drawn(whole.tolist(), torch.rand(1, generator=generator, dtype=torch.float64).item())


def gumbel_choice(probs: Tensor, generator: torch.Generator) -> int:
    lots = torch.rand(len(probs), generator=generator, dtype=torch.float64)
    return int((probs.log() - (-lots.log()).log()).argmax())


def seeded_anew(probs: Tensor, generator: torch.Generator) -> int:
    again = torch.Generator().manual_seed(generator.initial_seed())
    return drawn(probs.tolist(), torch.rand(1, generator=again, dtype=torch.float64).item())


# Stop strings in a stream


def shown_pieces(pieces: Sequence[str], stops: Sequence[str]) -> list[str]:
    shown, held, stopped = [], "", False
    for piece in pieces:
        safe = ""
        for char in "" if stopped else piece:
            held += char
            complete = [stop for stop in stops if held.endswith(stop)]
            if complete:
                safe, held, stopped = safe + held.removesuffix(max(complete, key=len)), "", True
                break
            while not any(stop.startswith(held) for stop in stops) and held:
                safe, held = safe + held[0], held[1:]
        shown.append(safe)
    return [*shown, held]


def check_shown_pieces(answer: Callable) -> str | None:
    cases = {
        "no stop string": (["Hel", "lo"], []),
        "within a piece": (["one. two"], [". "]),
        "over two pieces": (["one", ".", "\n", "\ntwo"], ["\n\n"]),
        "over four pieces": (["a", "E", "N", "D", "b"], ["END"]),
        "it began, and was none": (["a", "E", "N", "X", "b"], ["END"]),
        "a second beginning within the first": (["a", "a", "a", "b", "!"], ["aab"]),
        "a beginning is left at the end": (["wait", " U", "s"], ["User:"]),
        "the earlier one in the text": (["1 b 2 a 3"], ["a", "b"]),
        "complete with the same character": (["x", "ab", "c"], ["bc", "abc"]),
        "a short one inside a long one that has begun": (["x", "ab", "y"], ["abcd", "b"]),
        "at the very start": (["\n", "x"], ["\n"]),
        "empty pieces": (["", "a", "", "b", ""], ["ab"]),
        "it stands there twice": (["a;b;", "c"], [";"]),
    }
    rng = random.Random(0)
    for index in range(150):
        pieces = ["".join(rng.choices("ab", k=rng.randint(0, 3))) for _ in range(rng.randint(1, 6))]
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 3))]
        cases[f"random text {index}"] = (pieces, stops)
    for name, (pieces, stops) in cases.items():
        stream = TextStream(SimpleNamespace(decode=lambda ids: ""), stops)
        want = ["" if stream.stopped is not None else stream.take(piece) for piece in pieces]
        want.append(stream.flush())
        got = answer(list(pieces), list(stops))
        if not isinstance(got, list | tuple) or len(got) != len(want):
            return f"{name}: expected {len(want)} texts, one more than pieces, got {got!r}"
        for place, (found, wanted) in enumerate(zip(got, want, strict=True)):
            if found != wanted:
                when = f"after {pieces[place]!r}" if place < len(pieces) else "at the end"
                return f"{name}, pieces {pieces}, stops {stops}: {when} it shows {found!r}, expected {wanted!r}"
    return None


def pieces_with(
    which: Callable = lambda complete, stops: max(complete, key=len),
    keep: Callable = lambda held, stops: max(
        (n for n in range(len(held) + 1) if any(stop.startswith(held[len(held) - n :]) for stop in stops)), default=0
    ),
    shows_stop: bool = False,
    flushes: bool = True,
    goes_on: bool = False,
    forgets: bool = False,
) -> Callable:
    """A wrong solution: another stop string wins, more or less is held, or the end is another."""

    def wrong(pieces, stops):
        shown, held, stopped = [], "", False
        for piece in pieces:
            safe = ""
            for char in "" if stopped else piece:
                held += char
                if complete := [stop for stop in stops if held.endswith(stop)]:
                    stop = which(complete, stops)
                    safe, held, stopped = safe + (held if shows_stop else held[: -len(stop)]), "", not goes_on
                    if stopped:
                        break
                    continue
                n_kept = keep(held, stops)
                safe, held = safe + held[: len(held) - n_kept], held[len(held) - n_kept :]
            if forgets:
                safe, held = safe + held, ""
            shown.append(safe)
        return [*shown, held if flushes else ""]

    return wrong


def whole_text_searched(pieces: Sequence[str], stops: Sequence[str], late: bool = False) -> list[str]:
    """Cut at the first stop string of the whole text: what has been shown is not asked; or all of it at the end."""
    text, shown = "", []
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        shown.append(text[: min(places)] if places else text)
    news = [part[len(before) :] for before, part in zip(["", *shown], shown, strict=False)]
    return [*[""] * len(pieces), "".join(shown_pieces(pieces, stops))] if late else [*news, ""]


def first_stop_alone(pieces: Sequence[str], stops: Sequence[str]) -> list[str]:
    return shown_pieces(pieces, stops[:1])


def no_second_chance(held: str, stops: Sequence[str]) -> int:
    """What does not go on as it began is let go whole, with the beginning that lies within it."""
    return len(held) if any(stop.startswith(held) for stop in stops) else 0


# Token masks without dead ends

States = list[dict[str, int]]  # of each state: character -> next state


def token_masks(table: States, accepting: set[int], tokens: Sequence[str]) -> list[list[bool]]:
    ends = [[run(table, state, token) for token in tokens] for state in range(len(table))]
    alive, before = set(accepting), None
    while alive != before:
        before = set(alive)
        alive |= {state for state, row in enumerate(ends) if before & set(row)}
    return [[end in alive for end in row] for row in ends]


def run(table: States, state: int | None, token: str) -> int | None:
    """The state after all characters of a token; None where the automaton has no way, or the token no character."""
    if not token:
        return None
    for char in token:
        state = None if state is None else table[state].get(char)
    return state


def check_token_masks(answer: Callable) -> str | None:
    patterns = {
        "every character is a token": (r"(ab|cd)*", ["a", "b", "c", "d", "ab", "cda"]),
        "no token begins with d": (r"(ab|cd)*", ["a", "b", "c", "ab", "cd"]),
        "a way that ends three tokens later": (
            r"a(bcde|xyz)",
            ["a", "ab", "ax", "b", "bc", "c", "d", "x", "y", "xyz", "z"],
        ),
        "six tokens to the end": (r"abcdef|xy", ["a", "b", "c", "d", "e", "f", "x", "y"]),
        "a token that spells nothing": (r"a{2,4}", ["a", "", "aa", "aaaa", "aaaaa", "b"]),
        "it may end and may go on": (r"-?\d{1,3}(\.\d)?", ["-", "1", "12", "1.", ".5", ".", "-.5", "1.25", "007"]),
        "a loop that never gets out": (r"(ab)*(c|aad)", ["ab", "a", "c", "aad", "aa", "b"]),
        "a word among words": (r"yes|no|yesterday", ["y", "yes", "ye", "n", "no", "s", "ter", "day", "o", "terd"]),
    }
    for name, (pattern, tokens) in patterns.items():
        dfa = expression_dfa(pattern)
        vocabulary = SimpleNamespace(
            spellings=dict(enumerate(tokens)), special_tokens=(), token_bytes=lambda i, own=tokens: own[i].encode()
        )
        automaton = TokenAutomaton(dfa, TokenBytes(vocabulary, len(tokens)))
        table = [
            {chr(char): int(row[char]) for char in np.flatnonzero(row != dfa.dead)} for row in dfa.table[: dfa.dead]
        ]
        want = [automaton.allowed(state).tolist() for state in range(dfa.dead)]
        if advice := judged_masks(answer, table, set(np.flatnonzero(dfa.accepting).tolist()), tokens, want, name):
            return advice
    pit = [{"a": 1, "b": 2, "c": 3}, {"z": 1}, {"y": 4}, {}, {"z": 1}]  # from 1 and 4 no text is ever complete
    want = [[False, False, True, False], [False] * 4, [False] * 4, [False] * 4, [False] * 4]
    return judged_masks(answer, pit, {3}, ["a", "by", "c", "z"], want, "a state that nothing completes")


def judged_masks(answer: Callable, table: States, accepting: set[int], tokens: list[str], want: list, name: str):
    got = answer([dict(row) for row in table], set(accepting), list(tokens))
    if not isinstance(got, list | tuple) or len(got) != len(table) or any(len(row) != len(tokens) for row in got):
        return f"{name}: expected {len(table)} lists of {len(tokens)} truth values"
    for state, token in itertools.product(range(len(table)), range(len(tokens))):
        if bool(got[state][token]) != want[state][token]:
            verb = "allows" if got[state][token] else "forbids"
            return f"{name}, {table}, ends {sorted(accepting)}: in state {state} it {verb} {tokens[token]!r}"
    return None


def masks_with(end_of: Callable = run, alive: Callable | None = None, rows: Callable = lambda masks: masks) -> Callable:
    """A wrong solution: another state after a token, another idea of which states have a way out, one row for all."""

    def wrong(table, accepting, tokens):
        ends = [[end_of(table, state, token) for token in tokens] for state in range(len(table))]
        if alive is None:
            return rows([[end is not None for end in row] for row in ends])
        good = alive(table, accepting, ends)
        return rows([[end in good for end in row] for row in ends])

    return wrong


def alive_by_characters(table: States, accepting: set[int], ends: list) -> set[int]:
    """States that characters can complete, whether or not there are tokens that spell them."""
    alive = set(accepting)
    for _ in table:
        alive |= {state for state, row in enumerate(table) if alive & set(row.values())}
    return alive


def alive_by_one_look(table: States, accepting: set[int], ends: list) -> set[int]:
    """States after which some token goes on, whatever comes then."""
    return set(accepting) | {state for state, row in enumerate(ends) if any(end is not None for end in row)}


def alive_within_two(table: States, accepting: set[int], ends: list) -> set[int]:
    alive = set(accepting)
    for _ in range(2):
        alive |= {state for state, row in enumerate(ends) if alive & set(row)}
    return alive


def alive_before_the_end(table: States, accepting: set[int], ends: list) -> set[int]:
    """States from which a further token leads to an end: the end itself is forgotten."""
    alive = {state for state, row in enumerate(ends) if set(accepting) & set(row)}
    for _ in table:
        alive |= {state for state, row in enumerate(ends) if alive & set(row)}
    return alive


def end_with_nothing(table: States, state: int, token: str) -> int | None:
    return run(table, state, token) if token else state


EXERCISES = [
    Exercise(
        name="blocks_and_bytes",
        statement=(
            "Blocks and bytes that a pool holds for `requests`, (tenant, prompt ids, tokens of the answer) each. All "
            "prompts are read one after another, then the answers grow; all differ and nobody has left. A request "
            "begins with the whole blocks of its own tenant that hold what its prompt begins with, but computes its "
            "prompt's last token itself. The last token of an answer is not written."
        ),
        signature="blocks_and_bytes(requests, block_size, config, bytes_per_number) -> (blocks, bytes)",
        hint="A block is known by everything up to its end. A block takes its bytes whether it is full or not.",
        check=check_blocks_and_bytes,
        solution=blocks_and_bytes,
        mistakes={
            "the last token is written": bill_with(n_written=lambda prompt, n_new: len(prompt) + n_new),
            "only the prompts": bill_with(n_written=lambda prompt, n_new: len(prompt)),
            "blocks rounded down": bill_with(to_whole=math.floor),
            "a block more for each request": bill_with(to_whole=lambda share: math.floor(share) + 1),
            "nothing is shared": bill_with(n_usable=lambda prompt, size: 0),
            "a prompt may be found whole": bill_with(n_usable=lambda prompt, size: len(prompt) // size),
            "known by its own tokens alone": bill_with(
                name=lambda tenant, prompt, start, end: (tenant, tuple(prompt[start:end]))
            ),
            "known by its tokens and its place": bill_with(
                name=lambda tenant, prompt, start, end: (tenant, start, tuple(prompt[start:end]))
            ),
            "tenants share": bill_with(name=lambda tenant, prompt, start, end: tuple(prompt[:end])),
            "only the request before is remembered": bill_with(remembers=lambda known, starts: starts),
            "only the first request is remembered": bill_with(remembers=lambda known, starts: known or starts),
            "requests lie end to end": blocks_laid_end_to_end,
            "bytes of positions, not of blocks": bill_with(of_blocks=False),
            "keys without values": bill_with(numbers=lambda c: c.n_layers * c.n_kv_heads * c.d_head),
            "a key for each query head": bill_with(numbers=lambda c: 2 * c.n_layers * c.n_heads * c.d_head),
            "one layer": bill_with(numbers=lambda c: 2 * c.n_kv_heads * c.d_head),
            "the width of the stream": bill_with(numbers=lambda c: 2 * c.n_layers * c.d_model),
        },
    ),
    Exercise(
        name="MendedBatcher",
        statement=(
            "broken_parts.LeakyBatcher loses blocks on three ways out. Write a class that does the same without loss. "
            "After every call each block is in `free` or in one of `tables`, once; every request gets exactly its "
            "n_answer tokens, from step to step, however often it was preempted; and requests run side by side as long "
            "as there is room for what they hold now."
        ),
        signature="MendedBatcher(n_blocks, block_size, chunk) -> what LeakyBatcher is; it may extend it",
        hint="Who can end without ever being decoded? Who leaves `tables` without having ended?",
        check=check_batcher,
        solution=MendedBatcher,
        mistakes={
            "nothing is mended": LeakyBatcher,
            "the abort still leaks": batcher_without("abort"),
            "preemption still leaks": batcher_without("preempt"),
            "an answer that ends in prefill still leaks": batcher_without("read"),
            "only the abort is mended": batcher_without("preempt", "read"),
            "freed on abort, and left in the table": FreesWhatIsListed,
            "freed twice": FreesTwice,
            "a preempted answer starts over": StartsOver,
            "a preempted request is dropped": GivesUp,
            "one by one, so that nobody is preempted": OneByOne,
            "all blocks reserved beforehand, so that nobody is preempted": ReservesEverything,
            "who waits cannot be aborted": ForgetsTheQueue,
            "an abort empties the pool": EmptiesThePool,
            "no blocks are taken at all": HoldsNothing,
        },
    ),
    Exercise(
        name="paged_keys",
        statement=(
            "Gather one layer's keys: row r has the blocks tables[r], in order, and lengths[r] positions in them, of "
            "which the last n_new are new. Keys are filled up with 0 to the longest row; a store may hold anything, "
            "NaN too, in positions that no row owns. The mask says which keys each new position may attend to."
        ),
        signature=(
            "paged_keys(store, tables, lengths, n_new) -> (keys (rows, kv_heads, longest, width), bool mask (rows, 1, "
            "n_new, longest)); store (blocks, kv_heads, block_size, width)"
        ),
        hint="store[table] is (blocks, kv_heads, block_size, width). Which axes must be neighbours to be flattened?",
        check=check_paged_keys,
        solution=paged_keys,
        mistakes={
            "heads and blocks are mixed up": keys_with(lay=lambda part: part.reshape(part.shape[1], -1, part.shape[3])),
            "blocks in the order of their numbers": keys_with(blocks=sorted),
            "the table is read backwards": keys_with(blocks=lambda table: list(table)[::-1]),
            "leftovers of the last block": keys_with(keep=lambda length, size: math.ceil(length / size) * size),
            "whole blocks only": keys_with(keep=lambda length, size: length // size * size),
            "the filling on the left": keys_with(align_right=True),
            "a query does not see itself": keys_with(meets=lambda key, at: key < at),
            "True = may not attend": keys_with(meets=lambda key, at: key > at),
            "queries counted from the start": keys_with(
                at=lambda lengths, n_new: torch.arange(n_new).expand(len(lengths), -1)
            ),
            "new tokens see each other": keys_with(at=lambda lengths, n_new: lengths[:, None].expand(-1, n_new) - 1),
            "all rows as long as the longest": keys_with(
                at=lambda lengths, n_new: lengths.max().expand(len(lengths), 1) - n_new + torch.arange(n_new)
            ),
            "a mask of numbers": keys_with(meets=lambda key, at: (key <= at).double()),
        },
    ),
    Exercise(
        name="accept_or_replace",
        statement=(
            "One step of speculative sampling: `guess` was drawn from q. With u and v, independent and uniform in "
            "[0, 1), keep it as often as possible or replace it, so that the token is distributed as p. The checker "
            "sums over all guesses and a grid of u and v, exactly; a chance that is off by a hundredth is found."
        ),
        signature="accept_or_replace(p, q, guess, u, v) -> (token, kept); p, q: lists of vocab probabilities",
        hint="What does p have more of than q? broken_parts.drawn(weights, number) draws by inversion.",
        check=check_accept_or_replace,
        solution=accept_or_replace,
        mistakes={
            "replaced from p": step_with(rest=lambda p, q: p),
            "replaced from q": step_with(rest=lambda p, q: q),
            "replaced from |p - q|": step_with(rest=lambda p, q: abs(p - q)),
            "the likeliest of the remainder": step_with(draw=lambda weights, number: weights.index(max(weights))),
            "the remainder is not divided by its sum": step_with(draw=drawn_from_whole_sums),
            "one number for both": step_with(number=lambda u, v: u),
            "kept with probability p": step_with(chance=lambda p, q: p),
            "kept with probability q / p": step_with(chance=lambda p, q: min(1.0, q / p) if p else 0.0),
            "kept with probability min(p, q)": step_with(chance=min),
            "kept whenever p >= q, else never": step_with(chance=lambda p, q: float(p >= q)),
            "always kept": step_with(chance=lambda p, q: 1.0),
            "never kept, and drawn from p": step_with(chance=lambda p, q: 0.0, rest=lambda p, q: p),
            "u = 0 keeps what p never says": step_with(kept=lambda u, chance: u <= chance),
            "v = 0 draws what has no weight": step_with(draw=drawn_at_or_above),
        },
    ),
    Exercise(
        name="mended_tokens",
        statement=(
            "broken_parts.biased_tokens checks a draft of several tokens. Each of its three faults biases the text. "
            "Mend it: the tokens, and whatever the target says after them, must be distributed as the target alone "
            "would write, and a pass must give as many tokens as possible. Row k of p is the target's after draft[:k], "
            "of q the draft's; all drafts and a grid of numbers are summed over, exactly."
        ),
        signature="mended_tokens(p, q, draft, numbers) -> list of 1 to len(draft) + 1 tokens; see biased_tokens",
        hint="From what is replaced, by which number, and what comes after a draft that was right throughout?",
        check=check_mended_tokens,
        solution=mended_tokens,
        mistakes={
            "nothing is mended": biased_tokens,
            "still replaced from p": sampler_with(rest=lambda p, q: p),
            "still replaced by the number that refused": sampler_with(number=lambda numbers, place: numbers[place]),
            "still one row too early at the end": sampler_with(last=lambda p, q: p[max(0, len(p) - 2)]),
            "the end from the draft's last row": sampler_with(last=lambda p, q: q[-1] if q else p[0]),
            "no token after a draft that was right": sampler_with(last=lambda p, q: []),
            "guesses after a refused one are kept": sampler_with(goes_on=True),
            "refused unless p is the larger": sampler_with(refuses=lambda u, p, q: p < q),
            "kept with probability p": sampler_with(refuses=lambda u, p, q: u >= p),
            "the draft is not looked at": lambda p, q, draft, numbers: [drawn(p[0], numbers[-1])],
            "the draft is believed": lambda p, q, draft, numbers: [*draft, drawn(p[-1], numbers[-1])],
        },
    ),
    Exercise(
        name="filtered_draw",
        statement=(
            "Temperature, then top-p, then min-p for one row: keep the fewest likeliest tokens that together reach "
            "top_p, and with the last of them whatever is as likely as it; of these, what is at least min_p times as "
            "likely as the likeliest. Then draw by inversion with one number, torch.rand(1, generator=generator, "
            "dtype=torch.float64), of the request's own generator: the first id whose running sum exceeds it."
        ),
        signature="filtered_draw(logits, temperature, top_p, min_p, generator) -> (probs (vocab), of sum 1, token id)",
        hint="Turn both filters into a least probability. broken_parts.drawn(weights, number) draws by inversion.",
        check=check_filtered_draw,
        solution=filtered_draw,
        mistakes={
            "the token that reaches top_p is left out": draw_with(
                nucleus=lambda ordered, top_p: ordered[max(0, int((ordered.cumsum(0) <= top_p).sum()) - 1)]
            ),
            "a tie is cut by the order of sorting": nucleus_by_place,
            "top_p as a least probability": draw_with(nucleus=lambda ordered, top_p: min(1 - top_p, ordered[0])),
            "min_p as a least probability": draw_with(floor=lambda ordered, min_p: min(min_p, float(ordered[0]))),
            "the milder filter": draw_with(both=min),
            "top_p alone": draw_with(floor=lambda ordered, min_p: 0.0),
            "min_p alone": draw_with(nucleus=lambda ordered, top_p: 0.0),
            "temperature after the filters": draw_with(late_temperature=True),
            "not divided by the new sum": draw_with(renewed=False),
            "the generator of all requests": draw_with(
                choice=lambda probs, generator: drawn(probs.tolist(), torch.rand(1, dtype=torch.float64).item())
            ),
            "the same number at each draw": draw_with(choice=seeded_anew),
            "a number for each token": draw_with(choice=gumbel_choice),
            "the likeliest": draw_with(choice=lambda probs, generator: int(probs.argmax())),
        },
    ),
    Exercise(
        name="shown_pieces",
        statement=(
            "A text comes in pieces. Say after each piece what is shown: all that is not shown yet, but for the "
            "longest end of the text that some stop string begins with. Last, say what is left when the text ends. It "
            "stops where a stop string is complete first, wherever the pieces are cut, and no part of that string is "
            "shown; of two that are complete with the same character, the longer counts."
        ),
        signature="shown_pieces(pieces, stops) -> list of len(pieces) + 1 texts",
        hint="Go by characters. When a beginning does not go on, a shorter one may lie within what is held.",
        check=check_shown_pieces,
        solution=shown_pieces,
        mistakes={
            "looked for within a piece": pieces_with(forgets=True),
            "what was shown is taken back": whole_text_searched,
            "everything at the end": lambda pieces, stops: whole_text_searched(pieces, stops, late=True),
            "as much held as the longest has": pieces_with(
                keep=lambda held, stops: min(len(held), max(map(len, stops), default=1) - 1)
            ),
            "what does not go on is let go whole": pieces_with(keep=no_second_chance),
            "the stop string is shown": pieces_with(shows_stop=True),
            "the first of the list alone": first_stop_alone,
            "the shorter of two": pieces_with(which=lambda complete, stops: min(complete, key=len)),
            "the first in the list of two": pieces_with(which=lambda complete, stops: complete[0]),
            "what is held is lost at the end": pieces_with(flushes=False),
            "it goes on after a stop": pieces_with(goes_on=True),
            "pieces as they come": lambda pieces, stops: [*pieces, ""],
        },
    ),
    Exercise(
        name="token_masks",
        statement=(
            "An automaton reads characters: table[state][character] is the next state, a character that is missing is "
            "refused, and a text may end in the states `accepting`. For each state, say which tokens may come next so "
            "that the text can still be completed by further tokens, if need be. A token that spells nothing never may."
        ),
        signature="token_masks(table, accepting, tokens) -> a list of len(tokens) truth values for each state",
        hint="First find the states from which tokens lead to an end, from the ends backwards, until nothing is added.",
        check=check_token_masks,
        solution=token_masks,
        mistakes={
            "only the first character is looked at": masks_with(
                end_of=lambda table, state, token: table[state].get(token[:1])
            ),
            "only whether it can be read": masks_with(),
            "completed by characters, not by tokens": masks_with(alive=alive_by_characters),
            "only whether any token follows": masks_with(alive=alive_by_one_look),
            "looked two tokens ahead": masks_with(alive=alive_within_two),
            "only tokens that end the text": masks_with(alive=lambda table, accepting, ends: set(accepting)),
            "an end needs a further token": masks_with(alive=alive_before_the_end),
            "a token that spells nothing": masks_with(
                end_of=end_with_nothing,
                alive=lambda table, accepting, ends: {*alive_within_two(table, accepting, ends)},
            ),
            "the mask of the start for all": masks_with(
                alive=alive_by_characters, rows=lambda masks: [masks[0]] * len(masks)
            ),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
