"""Topic 13 - Proofs of the paged cache: the pool under random operations, its refusals, its tensors, its prefixes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import paged_cache
from latent_attention import LatentConfig
from llm_config import ModelConfig
from llm_layers import KVCache
from paged_cache import (
    BlockError,
    BlockPool,
    BlockTable,
    FloatStore,
    PagedView,
    PoolFull,
    QuantisedStore,
    StepRows,
    layer_shape,
    store_bytes,
)
from quantized_layers import KVFormat, quantised_kv_bytes

SHORT = ModelConfig(vocab_size=11, d_model=12, n_layers=3, n_heads=6, n_kv_heads=3, d_head=8, d_ff=10, max_seq_len=64)
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two letters, so that prefixes are met again
PICK = st.integers(0, 10**6)


def books(pool: BlockPool) -> tuple:
    places = {place: list(blocks) for place, blocks in pool.places.items()}
    return list(pool.counts), list(pool.blank), list(pool.idle), dict(pool.contents), places, pool.n_contents


class PoolMachine(RuleBasedStateMachine):
    """Requests that come, grow, fork, shrink, leave and come back, against a memory in which each position keeps what
    depends on all ids up to it: a block that is shared wrongly, or written without a copy, shows in the numbers."""

    @initialize(n_blocks=st.integers(3, 12), block_size=st.integers(1, 4), cached=st.booleans())
    def begin(self, n_blocks: int, block_size: int, cached: bool) -> None:
        self.pool = BlockPool(n_blocks, block_size, cached)
        self.memory = np.full((n_blocks, block_size), -1, dtype=np.int64)
        self.live: list[tuple[BlockTable, list[int]]] = []
        self.away: list[tuple[str, list[int]]] = []

    def write(self, table: BlockTable, ids: list[int]) -> None:
        """What a model would do: the positions that the table lacks."""
        for place in range(table.n_tokens, len(ids)):
            block = table.blocks[place // self.pool.block_size]
            self.memory[block, place % self.pool.block_size] = hash(tuple(ids[: place + 1]))
        self.pool.advance(table, ids)

    def enter(self, tenant: str, ids: list[int]) -> bool:
        before = books(self.pool)
        try:
            table = self.pool.open(ids, len(ids), tenant)
        except (PoolFull, BlockError) as error:
            too_long = self.pool.blocks_for(len(ids)) > self.pool.n_blocks
            assert isinstance(error, BlockError) == too_long
            assert books(self.pool) == before
            return False
        assert table.n_tokens < len(ids)
        self.write(table, ids)
        self.live.append((table, list(ids)))
        return True

    @rule(ids=IDS, tenant=st.sampled_from(["", "b"]))
    def open(self, ids: list[int], tenant: str) -> None:
        self.enter(tenant, ids)

    @precondition(lambda self: self.live)
    @rule(pick=PICK, new=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def append(self, pick: int, new: list[int]) -> None:
        table, ids = self.live[pick % len(self.live)]
        before, free, own = books(self.pool), self.pool.n_free, list(table.blocks)
        try:
            copies = self.pool.reserve(table, len(new))
        except (PoolFull, BlockError):
            assert books(self.pool) == before and table.blocks == own and free < self.pool.blocks_for(len(new)) + 1
            return
        for old, fresh in copies:
            self.memory[fresh] = self.memory[old]
        for block in table.blocks[table.n_tokens // self.pool.block_size :]:
            assert self.pool.writable(block)
        ids += new
        self.write(table, ids)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        table, ids = self.live[pick % len(self.live)]
        self.live.append((self.pool.fork(table), list(ids)))

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        self.pool.free(self.live.pop(pick % len(self.live))[0])

    @precondition(lambda self: self.live)
    @rule(pick=PICK, share=st.integers(0, 100))
    def truncate(self, pick: int, share: int) -> None:
        table, ids = self.live[pick % len(self.live)]
        n_kept = max(1, len(ids) * share // 100)
        self.pool.truncate(table, n_kept)
        del ids[n_kept:]

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        table, ids = self.live.pop(pick % len(self.live))
        self.away.append((table.tenant, ids))
        self.pool.free(table)

    @precondition(lambda self: self.away)
    @rule(pick=PICK)
    def resume(self, pick: int) -> None:
        waiting = self.away[pick % len(self.away)]
        if self.enter(*waiting):
            self.away.remove(waiting)

    @precondition(lambda self: self.live and self.away)
    @rule(out=PICK, back=PICK)
    def swap(self, out: int, back: int) -> None:
        waiting = self.away[back % len(self.away)]
        self.preempt(out)
        if self.enter(*waiting):
            self.away.remove(waiting)

    @rule(pick=PICK)
    def refuse(self, pick: int) -> None:
        before, pool = books(self.pool), self.pool
        block = pick % pool.n_blocks
        wrong = [
            lambda: pool.allocate(0),
            lambda: pool.allocate(pool.n_blocks + 1),
            lambda: pool.release([*range(pool.n_blocks), pool.n_blocks]),
            lambda: pool.release([-1]),
            lambda: pool.release([block] * (pool.counts[block] + 1)),
        ]
        for call in wrong:
            with pytest.raises(BlockError):
                call()
        assert books(self.pool) == before

    @invariant()
    def books_agree(self) -> None:
        pool = self.pool
        held = Counter(block for table, _ in self.live for block in table.blocks)
        assert pool.counts == [held[block] for block in range(pool.n_blocks)]
        free = [*pool.blank, *pool.idle]
        assert len(free) == len(set(free)) == pool.n_free
        assert sorted([*free, *held]) == list(range(pool.n_blocks))
        assert set(pool.idle) <= set(pool.contents) and not set(pool.blank) & set(pool.contents)
        assert Counter(block for blocks in pool.places.values() for block in blocks) == Counter(list(pool.contents))
        assert len({content[1:] for content in pool.contents.values()}) == len(pool.contents)

    @invariant()
    def every_table_reads_its_own(self) -> None:
        tenants: dict[int, str] = {}
        for table, ids in self.live:
            assert table.n_tokens == len(ids) and len(table.blocks) == self.pool.blocks_for(len(ids))
            kept = self.memory[table.blocks].reshape(-1)[: len(ids)] if ids else []
            assert list(kept) == [hash(tuple(ids[: place + 1])) for place in range(len(ids))]
            for block in table.blocks:
                assert tenants.setdefault(block, table.tenant) == table.tenant


PoolMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestPoolMachine = PoolMachine.TestCase


# Single operations


def test_refusals_say_what_was_asked_and_change_nothing() -> None:
    pool = BlockPool(5, 4)
    table = pool.open([1] * 9, 9)
    before = books(pool)
    for call, kind, message in [
        (lambda: pool.allocate(0), BlockError, "ask for 1 to 5"),
        (lambda: pool.allocate(6), BlockError, "cannot allocate 6 blocks"),
        (lambda: pool.allocate(3), PoolFull, "3 blocks are needed and 2 of 5 are free"),
        (lambda: pool.release([table.blocks[0], table.blocks[0]]), BlockError, "released 2 times but is held 1 times"),
        (lambda: pool.release([table.blocks[1], 17]), BlockError, "block 17 would be released 1 times but is held 0"),
        (lambda: pool.share([table.blocks[1], pool.blank[0]]), BlockError, "neither held nor cached"),
        (lambda: pool.reserve(table, 0), BlockError, "cannot reserve 0 positions"),
        (lambda: pool.reserve(table, 24), PoolFull, "3 blocks are needed"),
        (lambda: pool.open([1] * 21, 21), BlockError, "more blocks than the pool's 5"),
        (lambda: pool.open([1] * 12, 12), PoolFull, "3 blocks are needed and 2 of 5 are free"),
        (lambda: pool.advance(table, [1] * 13), BlockError, "do not fit the 3 blocks"),
        (lambda: pool.truncate(table, 10), BlockError, "n_tokens=10 must be in 0..0"),
    ]:
        with pytest.raises(kind, match=message):
            call()
        assert books(pool) == before
    copied = BlockTable(blocks=list(table.blocks))
    pool.free(table)
    with pytest.raises(BlockError, match="held 0 times"):
        pool.free(copied)
    assert pool.n_free == 5
    with pytest.raises(ValueError, match="n_blocks must be finite and >= 1, got 0"):
        BlockPool(0)


def test_a_prefix_is_found_again_block_by_block_and_only_where_all_before_it_is_equal() -> None:
    pool, ids = BlockPool(12, 3), [5, 6, 7, 8, 9, 1, 2, 3]
    first = pool.open(ids, 8)
    pool.advance(first, ids)
    assert pool.matched(ids, "") == first.blocks[:2]
    assert pool.matched(ids[:6], "") == first.blocks[:1]  # the logits of the last id have to come from somewhere
    assert pool.matched([5, 6, 7, 0, 9, 1, 2], "") == first.blocks[:1]
    assert pool.matched([0, 6, 7, 8, 9, 1, 2], "") == []
    assert pool.matched(ids[3:], "") == []  # the same tokens at another place are another content
    assert pool.matched(ids, "other") == []
    second = pool.open(ids, 8)
    assert second.blocks[:2] == first.blocks[:2] and second.n_tokens == 6
    assert pool.counts[first.blocks[0]] == 2 and pool.n_free == 8


def test_a_third_block_is_found_behind_the_second_alone() -> None:
    pool, ids = BlockPool(8, 2), [1, 2, 3, 4, 5, 6, 0]
    table = pool.open(ids, 7)
    pool.advance(table, ids)
    assert pool.matched(ids, "") == table.blocks[:3]
    assert pool.matched([1, 2, 5, 6, 0], "") == table.blocks[:1]


def test_copies_that_go_on_differently_are_both_found() -> None:
    pool = BlockPool(8, 2)
    first = pool.open([1, 2], 4)
    pool.advance(first, [1, 2])
    second = pool.fork(first)
    assert second.blocks == first.blocks[:1]  # room that holds nothing yet is not shared
    for table, ids in ((first, [1, 2, 3, 4]), (second, [1, 2, 5, 6])):
        pool.reserve(table, 2)
        pool.advance(table, ids)
    assert pool.matched([1, 2, 3, 4, 0], "") == first.blocks and pool.matched([1, 2, 5, 6, 0], "") == second.blocks


@pytest.mark.parametrize("constant", [0, 12345])
def test_equal_hashes_share_nothing(monkeypatch, constant: int) -> None:
    monkeypatch.setattr(paged_cache, "content_hash", lambda *_: constant)
    pool = BlockPool(12, 2)
    for tenant, ids in [("", [1, 2, 3, 4]), ("", [3, 4, 1, 2]), ("b", [1, 2, 3, 4])]:
        assert pool.matched([*ids, 0], tenant) == []
        table = pool.open([*ids, 0], 5, tenant)
        pool.advance(table, [*ids, 0])
        assert pool.matched([*ids, 0], tenant) == table.blocks[:2]
    assert len(pool.places) == 1 and len(pool.contents) == 6


def test_a_child_is_not_found_below_a_new_parent_in_the_block_of_the_old_one() -> None:
    pool = BlockPool(3, 2)
    old = pool.open([1, 2, 3, 4, 0], 5)
    pool.advance(old, [1, 2, 3, 4, 0])
    parent, child, _ = old.blocks
    pool.free(old)
    pool.share([child])  # only the child's block is safe
    taken = pool.allocate(2)  # the parent's content is gone
    assert parent in taken and child in pool.contents and parent not in pool.contents
    pool.release(taken)
    new = pool.open([7, 8], 2)
    pool.advance(new, [7, 8])
    assert pool.matched([7, 8, 3, 4, 0], "") == new.blocks
    assert pool.matched([1, 2, 3, 4, 0], "") == []


def test_the_least_recently_used_content_goes_first_and_ends_before_starts() -> None:
    pool = BlockPool(6, 2)
    tables = {}
    for name, ids in (("a", [1, 1, 2, 2, 0]), ("b", [3, 3, 4, 4, 0])):
        tables[name] = pool.open(ids, 5)
        pool.advance(tables[name], ids)
    blocks = {name: list(table.blocks) for name, table in tables.items()}
    pool.free(tables["a"])
    pool.free(tables["b"])
    again = pool.open([1, 1, 2, 2, 0], 5)  # a is used once more: now b is the oldest
    pool.free(again)
    assert pool.n_free == 6 and len(pool.blank) == 2
    pool.allocate(3)
    assert blocks["b"][1] not in pool.contents and blocks["b"][0] in pool.contents
    pool.allocate(1)
    assert blocks["b"][0] not in pool.contents and set(blocks["a"][:2]) == set(pool.contents)


def test_of_what_is_cut_off_the_end_is_used_up_first() -> None:
    pool, ids = BlockPool(4, 2), [1, 2, 3, 4, 5, 6, 7, 8]
    table = pool.open(ids, 8)
    pool.advance(table, ids)
    first, second, third, last = table.blocks
    pool.truncate(table, 2)
    assert [pool.allocate(1) for _ in range(2)] == [[last], [third]]
    assert pool.matched(ids, "") == [first, second]  # the end of a prefix is of use only with its start


def test_a_pool_that_is_too_full_for_a_known_prefix_is_left_as_it_was() -> None:
    pool = BlockPool(4, 2)
    held = pool.open([9], 1)
    old = pool.open([1, 2, 3, 4, 5, 6], 6)
    pool.advance(old, [1, 2, 3, 4, 5, 6])
    pool.free(old)
    before = books(pool)
    with pytest.raises(PoolFull, match="2 blocks are needed and 1 of 4 are free"):  # the two of the prefix are not
        pool.open([1, 2, 3, 4, 7, 7, 7, 7], 8)
    assert books(pool) == before and pool.n_free == 3 and held.blocks


def test_forgotten_contents_leave_nothing_behind() -> None:
    pool = BlockPool(3, 2)
    for first in range(50):  # as in a server that runs for months
        table = pool.open([first, 0, 0], 3)
        pool.advance(table, [first, 0, 0])
        pool.free(table)
    assert len(pool.places) == len(pool.contents) <= 3


def test_a_shared_or_cached_block_is_copied_before_it_is_written() -> None:
    pool, ids = BlockPool(8, 4), [1, 2, 3, 4, 5, 6]
    first = pool.open(ids, 6)
    pool.advance(first, ids)
    second = pool.fork(first)
    assert second.blocks == first.blocks
    [(old, new)] = pool.reserve(second, 1)
    assert old == first.blocks[1] and second.blocks == [first.blocks[0], new] and pool.reserve(first, 1) == []
    pool.truncate(first, 3)  # the next position lies in a whole block that is cached, and shared besides
    [(old, new)] = pool.reserve(first, 1)
    assert old == second.blocks[0] and first.blocks == [new] and pool.matched([*ids, 0], "") == second.blocks[:1]
    pool.free(second)
    pool.free(first)
    assert pool.n_free == 8


def test_truncating_gives_back_whole_blocks_and_forgets_the_rest_of_the_chain() -> None:
    pool = BlockPool(8, 2)
    table = pool.open([1, 2, 3], 12)
    pool.advance(table, [1, 2, 3, 4, 5])
    pool.truncate(table, 3)
    assert len(table.blocks) == 2 and len(table.chain) == 1 and pool.n_free == 6
    [(old, new)] = pool.reserve(table, 1)
    pool.advance(table, [1, 2, 3, 9])
    assert pool.matched([1, 2, 3, 9, 0], "")[1] == new and pool.matched([1, 2, 3, 4, 0], "")[1] == old


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    table = pool.open([1, 2, 3], 3)
    pool.advance(table, [1, 2, 3])
    assert pool.matched([1, 2, 3], "") == [] and not pool.contents


# The tensors


def rows_of(store: FloatStore, n_new: list[int], starts: list[int], tables: list[list[int]]) -> StepRows:
    width, longest = max(n_new), max(map(len, tables))
    filled = np.array([table + table[:1] * (longest - len(table)) for table in tables])
    return StepRows(store, np.ones((len(n_new), width), dtype=np.int64), np.array(n_new), np.array(starts), filled)


@pytest.mark.parametrize("latent", [None, LatentConfig(0, kv_rank=10, d_nope=5, d_rope=6, d_value=7)])
def test_a_paged_view_returns_what_a_plain_cache_returns(parity, latent) -> None:
    config = replace(SHORT, latent=latent)
    pool, dtype = BlockPool(9, 4), torch.float64
    store, shape = FloatStore(pool, config, dtype, "cpu"), layer_shape(config)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, new: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.randn(rows, shape.n_heads, new, width, generator=generator, dtype=dtype) for width in shape[1:]
        )

    plain, tables, starts = [KVCache(), KVCache()], [[7, 2, 5], [0, 8]], [0, 0]
    for n_new in ([5, 2], [1, 1], [3, 4]):
        rows = rows_of(store, n_new, starts, tables)
        k, v = random(2, max(n_new))
        got = PagedView(store, 2, rows).append(k, v)
        for row, cache in enumerate(plain):
            part = slice(0, n_new[row])
            wanted = cache.append(k[row : row + 1, :, part], v[row : row + 1, :, part])
            starts[row] += n_new[row]
            for side, name in enumerate(("keys", "values")):
                kept = got[side][row : row + 1, :, : starts[row]]
                parity(f"PagedView {name}", "KVCache", "output", kept, wanted[side], 0)
    assert got[0].shape[2] == 12  # nine positions in blocks of four
    assert all(not tensor[[1, 3, 4, 6]].any() for tensor in store.tensors)
    assert all(not tensor.any() for side in store.layers[0] for tensor in side)


def test_a_mask_lets_each_row_see_its_own_past() -> None:
    store = FloatStore(BlockPool(6, 4), SHORT, torch.float32, "cpu")
    rows = rows_of(store, [2, 1], [3, 6], [[0, 1], [2, 3]])
    keys = torch.arange(8)
    mask = rows.mask()
    assert mask.shape == (2, 1, 2, 8)
    for row, new, last in ((0, 0, 3), (0, 1, 4), (1, 0, 6), (1, 1, 6)):  # filling stays at a row's last position
        assert torch.equal(mask[row, 0, new], keys <= last)
    windowed = rows.mask(window_size=3, n_sinks=1)
    assert torch.equal(windowed[1, 0, 0], (keys <= 6) & ((keys > 3) | (keys < 1)))
    assert torch.equal(windowed[0, 0, 0], (keys <= 3) & ((keys > 0) | (keys < 1)))


@pytest.mark.parametrize("n_bits", [0, 8, 4])
@pytest.mark.parametrize("latent", [None, LatentConfig(0, kv_rank=10, d_nope=5, d_rope=6, d_value=7)])
def test_bytes_are_those_of_the_formula(parity, n_bits: int, latent) -> None:
    config, pool = replace(SHORT, latent=latent), BlockPool(7, 4)
    store = (
        QuantisedStore(pool, config, n_bits, torch.float32, "cpu")
        if n_bits
        else FloatStore(pool, config, torch.bfloat16, "cpu")
    )
    name = f"paged store, {n_bits or 16} bits"
    parity(name, "bytes by formula", "invariant", store.n_bytes, store_bytes(pool, config, n_bits, 2), 0)
    if n_bits and not latent:
        a_token = quantised_kv_bytes(KVFormat(n_bits), config.n_layers, config.n_kv_heads, config.d_head)
        parity(name, "quantised_kv_bytes", "invariant", store.n_bytes, 28 * a_token, 0)


@pytest.mark.parametrize("n_bits", [8, 4])
def test_quantised_keys_and_values_are_topic_12s(parity, n_bits: int) -> None:
    from quantized_layers import QuantisedKVCache

    store = QuantisedStore(BlockPool(5, 4), SHORT, n_bits, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 3, 6, 8, generator=generator) for _ in range(2))
    got = PagedView(store, 1, rows_of(store, [6], [0], [[4, 1]])).append(k, v)
    wanted = QuantisedKVCache(KVFormat(n_bits)).append(k, v)
    for mine, theirs in zip(got, wanted, strict=True):
        parity(f"paged store, {n_bits} bits", "QuantisedKVCache", "output", mine[:, :, :6], theirs, 0)
    error = float((got[0][:, :, :6] - k).abs().max())
    assert 0 < error < float(k.max() - k.min()) / (2**n_bits - 1)


@pytest.mark.parametrize("n_bits", [0, 4])
def test_copying_and_clearing_touch_the_named_blocks_alone(n_bits: int) -> None:
    pool = BlockPool(5, 4)
    store = (
        QuantisedStore(pool, SHORT, n_bits, torch.float32, "cpu")
        if n_bits
        else FloatStore(pool, SHORT, torch.float32, "cpu")
    )
    for tensor in store.tensors:
        tensor.copy_(torch.randint(1, 9, tensor.shape))
    before = [tensor.clone() for tensor in store.tensors]
    store.copy([(3, 0), (1, 4)])
    for tensor, old in zip(store.tensors, before, strict=True):
        assert torch.equal(tensor, old[[3, 1, 2, 3, 1]])
    store.clear([2, 4])
    for tensor, old in zip(store.tensors, before, strict=True):
        assert torch.equal(tensor[[0, 1, 3]], old[[3, 1, 3]]) and not tensor[[2, 4]].any()


def test_shape_comments_hold(checked_shapes) -> None:
    pool = BlockPool(6, 4)
    store = QuantisedStore(pool, SHORT, 8, torch.float32, "cpu")
    with checked_shapes(paged_cache) as checked:
        rows = rows_of(store, [2, 1], [3, 6], [[0, 1], [2, 3]])
        PagedView(store, 0, rows).append(torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 8))
        rows.mask(window_size=2)
    assert len(checked) >= 6, checked
