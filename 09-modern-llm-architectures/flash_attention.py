"""Topic 09 - FlashAttention-2: exact attention that never stores its score matrix, with every transfer counted.

The same algorithm as a GPU kernel stands in flash_kernel.py. Dao et al. 2022 (arXiv 2205.14135), Dao 2023 (arXiv
2307.08691). Topic 03's tiled attention is the first algorithm; this is the second: the weighted sum is divided once, at
the end; the backward pass walks over tiles of keys, so that each tile of keys and values is written once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_mechanisms import check_widths, tile_scores, tiles


@dataclass
class Traffic:
    """Numbers moved between slow memory, which holds whole tensors, and fast memory, which holds a few tiles."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written

    def load(self, tensor: Tensor) -> Tensor:
        self.read += tensor.numel()
        return tensor

    def store(self, target: Tensor, value: Tensor) -> None:
        self.written += target.numel()
        target.copy_(value)

    def add(self, target: Tensor, value: Tensor) -> None:
        """target += value: read and written, as an atomic addition of a GPU does."""
        self.load(target)
        self.store(target, target + value)


def tile_sizes(fast_memory: int, d_head: int, d_value: int | None = None) -> tuple[int, int]:
    """Rows of a tile of queries and of a tile of keys that together with their scores fit `fast_memory` numbers.

    A tile of queries needs q and the running output, one of keys needs k and v: equal tiles of b rows take
    b (2 d_head + 2 d_value) + b^2 numbers. Raises ValueError if not even one row fits.
    """
    widths = 2 * (d_head + (d_head if d_value is None else d_value))
    rows = int((math.sqrt(widths**2 + 4 * fast_memory) - widths) / 2)
    if rows < 1:
        raise ValueError(f"fast_memory={fast_memory} holds no row of width {d_head}; it needs at least {widths + 1}")
    return rows, rows


class FlashAttention(torch.autograd.Function):
    """Forward: Dao 2023, algorithm 1. Backward: algorithm 2. Saved are the inputs, the output and one number a row."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, offset: int | None, sizes: tuple[int, int], traffic: Traffic
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)  # half-precision inputs, single-precision sums
        scale, output = 1 / math.sqrt(q.shape[-1]), q.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = q.new_empty(*q.shape[:-1], 1, dtype=wide)  # (batch, heads, query, 1)
        for rows in tiles(q.shape[-2], sizes[0]):
            q_tile = traffic.load(q[..., rows, :]).to(wide) * scale  # (batch, heads, *, d_k)
            top = q_tile.new_full((*q_tile.shape[:-1], 1), -math.inf)  # (batch, heads, *, 1)
            total, mixed = torch.zeros_like(top), q_tile.new_zeros(*q_tile.shape[:-1], v.shape[-1])
            for columns in tiles(k.shape[-2], sizes[1]):
                scores = tile_scores(q_tile, k, rows, columns, None, offset)
                if scores is None:  # all of the tile lies in the future: nothing is read
                    break
                traffic.load(k[..., columns, :])
                new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))  # (batch, heads, *, 1)
                reference = new_top.masked_fill(new_top == -math.inf, 0.0)
                weights, shrink = (scores - reference).exp(), (top - reference).exp()
                total = total * shrink + weights.sum(dim=-1, keepdim=True)  # (batch, heads, *, 1)
                mixed = mixed * shrink + weights @ traffic.load(v[..., columns, :]).to(wide)  # (batch, heads, *, d_v)
                top = new_top  # (batch, heads, *, 1)
            nowhere = total == 0
            total = total.masked_fill(nowhere, 1.0)
            traffic.store(output[..., rows, :], mixed / total)
            traffic.store(log_sums[..., rows, :], top.masked_fill(nowhere, 0.0) + total.log())
        ctx.save_for_backward(q, k, v, output, log_sums)
        ctx.offset, ctx.sizes, ctx.scale, ctx.wide, ctx.traffic = offset, sizes, scale, wide, traffic
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        traffic, wide = ctx.traffic, ctx.wide
        grad_q, grad_k, grad_v = (torch.zeros_like(tensor, dtype=wide) for tensor in (q, k, v))
        # The softmax Jacobian needs sum_j P_ij dP_ij of a whole row: it equals dO_i . O_i, one number for each row.
        shared = grad_output.new_empty(*q.shape[:-1], 1, dtype=wide)  # (batch, heads, query, 1)
        each = traffic.load(grad_output).to(wide) * traffic.load(output).to(wide)  # (batch, heads, query, d_v)
        traffic.store(shared, each.sum(dim=-1, keepdim=True))
        for columns in tiles(k.shape[-2], ctx.sizes[1]):
            k_tile, v_tile = (traffic.load(tensor[..., columns, :]).to(wide) for tensor in (k, v))
            grad_k_tile, grad_v_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
            for rows in tiles(q.shape[-2], ctx.sizes[0]):
                q_tile = q[..., rows, :].to(wide) * ctx.scale  # (batch, heads, *, d_k)
                scores = tile_scores(q_tile, k, rows, columns, None, ctx.offset)
                if scores is None:
                    continue
                traffic.load(q[..., rows, :])
                grad = traffic.load(grad_output[..., rows, :]).to(wide)  # (batch, heads, *, d_v)
                weights = (scores - traffic.load(log_sums[..., rows, :])).exp()  # (batch, heads, *, *)
                grad_weights = grad @ v_tile.transpose(-2, -1)  # (batch, heads, *, *)
                grad_scores = weights * (grad_weights - traffic.load(shared[..., rows, :]))  # (batch, heads, *, *)
                grad_v_tile += weights.transpose(-2, -1) @ grad
                grad_k_tile += grad_scores.transpose(-2, -1) @ q_tile
                traffic.add(grad_q[..., rows, :], grad_scores @ k_tile * ctx.scale)
            traffic.store(grad_k[..., columns, :], grad_k_tile)
            traffic.store(grad_v[..., columns, :], grad_v_tile)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    fast_memory: int = 2**15,
    traffic: Traffic | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, to rounding, through fast memory of `fast_memory` numbers for each head.

    Shapes: q (batch, heads, query, d_head), k and v (batch, kv_heads, key, width); n_kv_heads divides n_heads. causal
    aligns the last query with the last key. `traffic` counts what is read and written, backward included.
    Raises ValueError for shapes that do not fit and for a fast memory that holds no row.
    """
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} do not fit; give (batch, heads, position, "
            "width), keys and values of the same heads and positions"
        )
    if k.shape[1] != q.shape[1]:
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads; use a divisor")
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    check_widths(q, k, v)
    sizes, offset = tile_sizes(fast_memory, q.shape[-1], v.shape[-1]), k.shape[-2] - q.shape[-2] if causal else None
    return FlashAttention.apply(q, k, v, offset, sizes, traffic or Traffic())


def written_out_traffic(n_query: int, n_key: int, d_head: int) -> int:
    """Numbers moved by attention that keeps its score matrix in slow memory, forward, for one head.

    Read q and k, write the scores; read them, write the weights; read those and v, write the output (Dao et al. 2022,
    algorithm 0).
    """
    return (n_query + n_key) * d_head + 4 * n_query * n_key + n_key * d_head + n_query * d_head


def flash_traffic(n_query: int, n_key: int, d_head: int, fast_memory: int) -> int:
    """Numbers moved by `flash_attention`, forward, not causal, for one head: q, output and a number a row once, and
    keys and values once for every tile of queries. With tiles of about fast_memory / 4 d rows this is of the order
    n^2 d^2 / fast_memory (Dao et al. 2022, theorem 2).
    """
    n_tiles = math.ceil(n_query / tile_sizes(fast_memory, d_head)[0])
    return 2 * n_query * d_head + n_query + n_tiles * 2 * n_key * d_head
