"""Topic 13 - A paged cache: keys and values in blocks that requests take, share, copy before writing, and give back.

    pool, table = BlockPool(n_blocks=64, block_size=16), BlockTable()
    pool.reserve(table, n_new=20)            # two blocks; the tensors are in a store beside the pool
    pool.advance(table, ids)                 # the keys of these ids are in the blocks now: whole blocks can be shared
    twin = pool.fork(table)                  # the same blocks, to be copied before the first write
    pool.free(table)

A request's cache need not lie in one piece, so memory is lost only at the end of its last block, and what two requests
begin with is kept once. Kwon et al. 2023 (PagedAttention, arXiv 2309.06180, section 4), Zheng et al. 2023
(RadixAttention, arXiv 2312.07104) for the reuse of prefixes, Liu et al. 2024 (KIVI, arXiv 2402.02750) for the codes.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_config import ModelConfig
from llm_layers import KVCache
from quantized_layers import KVFormat, QuantisedKVCache
from weight_quantization import from_codes, unpack_codes
from workbench import check_range

# Who holds which block


class BlockError(ValueError):
    """A request for blocks that makes no sense, such as a second release. Nothing has changed."""


class PoolFull(Exception):
    """Fewer blocks are free than are needed now; later there may be. Nothing has changed."""


@dataclass
class BlockTable:
    """The blocks of one request, in the order of its positions."""

    tenant: str = ""  # prefixes are shared within a tenant
    blocks: list[int] = field(default_factory=list)
    n_tokens: int = 0  # positions whose keys and values are in the blocks
    chain: list[int] = field(default_factory=list)  # the contents of the first whole blocks, as the pool numbers them


class Content(NamedTuple):
    """What a cached block holds. `number` is never used again, so that no child is taken for another parent's."""

    number: int
    parent: int  # number of the content before it; 0 at the start of a prompt
    tokens: tuple[int, ...]
    tenant: str


def content_hash(parent: int, tokens: tuple[int, ...], tenant: str) -> int:
    """Where to look for a content. It only has to be fast: whatever is found there is compared."""
    return hash((parent, tokens, tenant))


class BlockPool:
    """Reference counts, the free list and the prefix cache of n_blocks blocks of block_size positions each.

    A block is held by as many tables as its count says. At 0 it is free: blank, or still holding a content that a later
    prompt may begin with; those are used up last, the least recently used first. A held block that others hold too, or
    whose content is cached, is copied before it is written (`reserve`).

    Every method either does all it says or raises and changes nothing: BlockError for what makes no sense, PoolFull
    for what has to wait.
    """

    def __init__(self, n_blocks: int, block_size: int = 16, prefix_cache: bool = True) -> None:
        self.n_blocks, self.block_size, self.prefix_cache = n_blocks, block_size, prefix_cache
        check_range(self, "n_blocks", "block_size", least=1)
        self.counts = [0] * n_blocks
        self.blank = list(range(n_blocks - 1, -1, -1))  # free and empty; the last one is taken first
        self.idle: OrderedDict[int, None] = OrderedDict()  # free with a content, the least recently used first
        self.contents: dict[int, Content] = {}  # of cached blocks
        self.places: dict[int, list[int]] = {}  # hash to cached blocks
        self.n_contents = 0
        self.fresh: list[int] = []  # blocks taken since the owner of the tensors last cleared them

    @property
    def n_free(self) -> int:
        return len(self.blank) + len(self.idle)

    def blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take n free blocks, each with count 1."""
        if n < 1 or n > self.n_blocks:
            raise BlockError(f"cannot allocate {n} blocks; ask for 1 to {self.n_blocks}, the size of the pool")
        if n > self.n_free:
            raise PoolFull(f"{n} blocks are needed and {self.n_free} of {self.n_blocks} are free")
        taken = []
        for _ in range(n):
            if self.blank:
                block = self.blank.pop()
            else:
                block, _ = self.idle.popitem(last=False)
                self.forget(block)
            self.counts[block] = 1
            taken.append(block)
        self.fresh += taken
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more: blocks that are held already, or free ones with a content."""
        for block in blocks:
            if not (0 <= block < self.n_blocks and (self.counts[block] or block in self.contents)):
                raise BlockError(f"block {block} is neither held nor cached, so there is nothing in it to share")
        for block in blocks:
            self.idle.pop(block, None)
            self.counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, one hold for each time a block is named."""
        for block, n in Counter(blocks).items():
            if not 0 <= block < self.n_blocks or self.counts[block] < n:
                held = self.counts[block] if 0 <= block < self.n_blocks else 0
                raise BlockError(f"block {block} would be released {n} times but is held {held} times")
        for block in blocks:
            self.counts[block] -= 1
            if not self.counts[block]:
                if block in self.contents:
                    self.idle[block] = None
                else:
                    self.blank.append(block)

    # The prefix cache

    def find(self, parent: int, tokens: tuple[int, ...], tenant: str) -> int | None:
        """The cached block with this content: parent, tokens and tenant are compared, whatever the hash says."""
        for block in self.places.get(content_hash(parent, tokens, tenant), ()):
            if self.contents[block][1:] == (parent, tokens, tenant):
                return block
        return None

    def matched(self, ids: Sequence[int], tenant: str) -> list[int]:
        """The cached blocks of the longest known prefix; the last id is left out, as its logits have to be computed."""
        blocks, parent, size = [], 0, self.block_size
        for start in range(0, (len(ids) - 1) // size * size if self.prefix_cache else 0, size):
            block = self.find(parent, tuple(ids[start : start + size]), tenant)
            if block is None:
                break
            blocks.append(block)
            parent = self.contents[block].number
        return blocks

    def forget(self, block: int) -> None:
        """Drop the content of a block."""
        content = self.contents.pop(block)
        place = content_hash(*content[1:])
        self.places[place].remove(block)
        if not self.places[place]:
            del self.places[place]

    # Tables

    def open(self, ids: Sequence[int], n_tokens: int, tenant: str = "") -> BlockTable:
        """A table with room for n_tokens positions that begins with the blocks of what is known of ids."""
        known = self.matched(ids, tenant)
        n_fresh = self.blocks_for(n_tokens) - len(known)
        if self.blocks_for(n_tokens) > self.n_blocks:
            raise BlockError(f"{n_tokens} positions need more blocks than the pool's {self.n_blocks}")
        n_left = self.n_free - sum(block in self.idle for block in known)
        if n_fresh > n_left:
            raise PoolFull(f"{n_fresh} blocks are needed and {n_left} of {self.n_blocks} are free")
        self.share(known)
        fresh = self.allocate(n_fresh) if n_fresh > 0 else []
        chain = [self.contents[block].number for block in known]
        return BlockTable(tenant, known + fresh, len(known) * self.block_size, chain)

    def reserve(self, table: BlockTable, n_new: int) -> list[tuple[int, int]]:
        """Room for n_new positions after those of the table, in blocks that may be written.

        Returns (from, to) for each block that was shared or cached: the caller copies the tensors.
        """
        if n_new < 1:
            raise BlockError(f"cannot reserve {n_new} positions; ask for 1 or more")
        first, n_blocks = table.n_tokens // self.block_size, self.blocks_for(table.n_tokens + n_new)
        shared = [i for i in range(first, min(len(table.blocks), n_blocks)) if not self.writable(table.blocks[i])]
        n_fresh = max(0, n_blocks - len(table.blocks))
        if not shared and not n_fresh:
            return []
        fresh = self.allocate(len(shared) + n_fresh)
        copies = []
        for index in shared:
            copies.append((table.blocks[index], fresh.pop()))
            table.blocks[index] = copies[-1][1]
        table.blocks += fresh
        self.release([old for old, _ in copies])
        return copies

    def writable(self, block: int) -> bool:
        return self.counts[block] == 1 and block not in self.contents

    def advance(self, table: BlockTable, ids: Sequence[int]) -> None:
        """The keys and values of all of `ids` are in the table's blocks now: whole blocks become cached contents."""
        if self.blocks_for(len(ids)) > len(table.blocks):
            raise BlockError(f"{len(ids)} positions do not fit the {len(table.blocks)} blocks; reserve more first")
        table.n_tokens = len(ids)
        size = self.block_size
        for index in range(len(table.chain), len(ids) // size if self.prefix_cache else 0):
            tokens, parent = tuple(ids[index * size : (index + 1) * size]), table.chain[-1] if index else 0
            known, block = self.find(parent, tokens, table.tenant), table.blocks[index]
            if known is None:
                self.n_contents += 1
                self.contents[block] = Content(self.n_contents, parent, tokens, table.tenant)
                self.places.setdefault(content_hash(parent, tokens, table.tenant), []).append(block)
                known = block
            table.chain.append(self.contents[known].number)

    def truncate(self, table: BlockTable, n_tokens: int) -> None:
        """Forget the positions from n_tokens on, and give back the blocks behind them."""
        if not 0 <= n_tokens <= table.n_tokens:
            raise BlockError(f"n_tokens={n_tokens} must be in 0..{table.n_tokens}, the positions of the table")
        n_kept = self.blocks_for(n_tokens)
        self.release(table.blocks[n_kept:][::-1])
        del table.blocks[n_kept:], table.chain[n_tokens // self.block_size :]
        table.n_tokens = n_tokens

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table of the same positions in the same blocks."""
        blocks = table.blocks[: self.blocks_for(table.n_tokens)]
        self.share(blocks)
        return BlockTable(table.tenant, blocks, table.n_tokens, list(table.chain))

    def free(self, table: BlockTable) -> None:
        """Give all blocks of a table back, the last one first: the end of a prefix is of use only with its start."""
        self.release(table.blocks[::-1])
        table.blocks, table.n_tokens, table.chain = [], 0, []


# The tensors


class LayerShape(NamedTuple):
    """What one layer keeps of a position: n_heads vectors of width_k and as many of width_v."""

    n_heads: int
    width_k: int
    width_v: int


def layer_shape(config: ModelConfig) -> LayerShape:
    """Keys and values of each head, or the latent and the one rotated key that latent attention keeps."""
    if config.latent:
        return LayerShape(1, config.latent.kv_rank, config.latent.d_rope)
    return LayerShape(config.n_kv_heads, config.d_head, config.d_head)


class FloatStore:
    """Keys and values of all blocks and layers as numbers of one floating-point type.

    Shapes: each side of each layer (blocks, kv_heads, block_size, width). A head of a block lies in one piece, so that
    reading a row's blocks head by head gives its keys in the order that attention wants, with one copy.
    """

    def __init__(self, pool: BlockPool, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape, self.block_size = layer_shape(config), pool.block_size
        self.layers = [
            tuple(self.make_side(pool.n_blocks, width, dtype, device) for width in self.shape[1:])
            for _ in range(config.n_layers)
        ]

    def make_side(self, n_blocks: int, width: int, dtype: torch.dtype, device: torch.device | str):
        return (torch.zeros(n_blocks, self.shape.n_heads, self.block_size, width, dtype=dtype, device=device),)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for side in layer for tensor in side]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers."""
        old, new = torch.tensor(copies, device=self.tensors[0].device).T
        for tensor in self.tensors:
            tensor[new] = tensor[old]

    def clear(self, blocks: Iterable[int]) -> None:
        """Write zeros: a masked key has weight 0, but 0 times the NaN that another request left there is NaN."""
        index = torch.tensor(list(blocks), device=self.tensors[0].device)
        for tensor in self.tensors:
            tensor.index_fill_(0, index, 0)

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Shapes: index (tokens * kv_heads) from `write_index`; k and v (tokens, kv_heads, width)."""
        for (tensor,), new in zip(self.layers[layer], (k, v), strict=True):
            tensor.view(-1, tensor.shape[3]).index_copy_(0, index, new.reshape(-1, tensor.shape[3]).to(tensor.dtype))

    def read(self, layer: int, index: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """index (rows * kv_heads * blocks) from `read_index`, shape (rows, key); gives (rows, kv_heads, key, width)."""
        rows, n_keys = shape
        k, v = (
            tensor.view(-1, self.block_size * tensor.shape[3]).index_select(0, index).to(dtype)
            for (tensor,) in self.layers[layer]
        )
        return tuple(side.view(rows, self.shape.n_heads, n_keys, -1) for side in (k, v))

    def write_index(self, slots: np.ndarray) -> np.ndarray:
        """Vectors of new positions: slots (tokens), each block * block_size + offset, to (tokens * kv_heads)."""
        block, offset = slots // self.block_size, slots % self.block_size
        heads = np.arange(self.shape.n_heads)
        return (((block[:, None] * self.shape.n_heads + heads) * self.block_size) + offset[:, None]).reshape(-1)

    def read_index(self, tables: np.ndarray) -> np.ndarray:
        """Heads of blocks: tables (rows, blocks) to (rows * kv_heads * blocks)."""
        heads = np.arange(self.shape.n_heads)[:, None]
        return (tables[:, None, :] * self.shape.n_heads + heads).reshape(-1)


class QuantisedStore(FloatStore):
    """Keys and values in codes of 8 or 4 bits, with a float16 scale and a zero point for each position and head.

    Topic 12's codes. A block takes 2 * kv_heads * block_size * (width * n_bits / 8 + 3) bytes in each layer.
    """

    def __init__(
        self, pool: BlockPool, config: ModelConfig, n_bits: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.coder, self.n_bits = QuantisedKVCache(KVFormat(n_bits)), n_bits
        super().__init__(pool, config, dtype, device)

    def make_side(self, n_blocks: int, width: int, dtype: torch.dtype, device: torch.device | str):
        widths = {torch.uint8: -(-width * self.n_bits // 8), torch.float16: 1}
        shape = (n_blocks, self.shape.n_heads, self.block_size)
        codes, scales = (torch.zeros(*shape, last, dtype=kind, device=device) for kind, last in widths.items())
        return codes, scales, torch.zeros(*shape, 1, dtype=torch.uint8, device=device)

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        for side, new in zip(self.layers[layer], (k, v), strict=True):
            for tensor, part in zip(side, self.coder.encode(new[None].float(), 3), strict=True):
                tensor.view(-1, tensor.shape[3]).index_copy_(0, index, part.reshape(-1, tensor.shape[3]))

    def read(self, layer: int, index: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, n_keys = shape
        sides = []
        for width, side in zip(self.shape[1:], self.layers[layer], strict=True):
            codes, scale, zero = (
                tensor.view(-1, self.block_size * tensor.shape[3]).index_select(0, index).view(-1, tensor.shape[3])
                for tensor in side
            )
            exact = from_codes(unpack_codes(codes, self.n_bits, width), scale.float(), zero.float()).to(dtype)
            sides.append(exact.view(rows, self.shape.n_heads, n_keys, width))
        return sides[0], sides[1]


def store_bytes(pool: BlockPool, config: ModelConfig, kv_bits: int, bytes_per_number: int) -> int:
    """Bytes of a pool's tensors: 2 * layers * heads * positions * width numbers, or codes with 3 bytes each."""
    shape, n_vectors = layer_shape(config), pool.n_blocks * pool.block_size * config.n_layers * layer_shape(config)[0]
    if not kv_bits:
        return n_vectors * (shape.width_k + shape.width_v) * bytes_per_number
    return n_vectors * sum(-(-width * kv_bits // 8) + 3 for width in shape[1:])


# What one forward pass reads and writes


class StepRows:
    """The new tokens of some requests, and where their keys and values are: everything that all layers share.

    Args:
        store: the tensors
        ids: new token ids, rows filled up with any id: (rows, new)
        n_new: how many of them are real: (rows)
        starts: positions before them: (rows)
        tables: blocks of every row, filled up with any block: (rows, blocks)

    Attributes, on the store's device: token_ids and positions (rows, new); flat (tokens), where the real ones are among
    rows * new, all of them if `full`; write_at and read_at as the store wants them.
    """

    def __init__(
        self, store: FloatStore, ids: np.ndarray, n_new: np.ndarray, starts: np.ndarray, tables: np.ndarray
    ) -> None:
        size, device = store.block_size, store.tensors[0].device
        n_rows, width = ids.shape
        last = (starts + n_new)[:, None] - 1  # (rows, 1)
        positions = np.minimum(starts[:, None] + np.arange(width), last)  # (rows, new); filling stays within the row
        n_blocks = int(last.max()) // size + 1
        self.n_rows, self.width, self.n_keys = n_rows, width, n_blocks * size
        self.full = bool((n_new == width).all())
        flat = np.arange(n_rows * width) if self.full else np.flatnonzero(np.arange(width) < n_new[:, None])  # (tokens)
        kept = positions.reshape(-1)[flat]  # (tokens)
        slots = tables[flat // width, kept // size] * size + kept % size  # (tokens)

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.write_at = put(store.write_index(slots))
        self.read_at = put(store.read_index(tables[:, :n_blocks]))
        self.token_ids, self.positions, self.flat = put(ids), put(positions), put(flat)

    def mask(self, window_size: int = 0, n_sinks: int = 0) -> Tensor:
        """(rows, 1, new, key), True = may attend: the past within the window, and the sinks."""
        keys = torch.arange(self.n_keys, device=self.positions.device)
        distance = self.positions[:, :, None] - keys  # (rows, new, key)
        mask = distance >= 0  # (rows, new, key)
        if window_size:
            mask &= (distance < window_size) | (keys < n_sinks)
        return mask[:, None]


class PagedView(KVCache):
    """One layer's blocks as a cache for topic 09's attention: `append` writes the new positions and reads all.

    Shapes: new keys and values (rows, kv_heads, new, width) to all (rows, kv_heads, key, width); what lies beyond a
    row's own positions has to be masked. A window only masks here: no block is given back before its request ends.
    """

    def __init__(self, store: FloatStore, layer: int, rows: StepRows) -> None:
        super().__init__()
        self.store, self.layer, self.rows = store, layer, rows

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows
        for_store = [side.transpose(1, 2).flatten(0, 1)[rows.flat] for side in (k, v)]  # tokens, kv_heads, width
        self.store.write(self.layer, rows.write_at, *for_store)
        return self.store.read(self.layer, rows.read_at, (rows.n_rows, rows.n_keys), k.dtype)
