"""Topic 09 - FlashAttention-2 as a GPU kernel in Triton: the tiles of flash_attention.py, one program for each.

Needs a GPU and the package triton, which PyTorch brings along with CUDA; nothing else in the course needs this file.
Without a GPU, TRITON_INTERPRET=1 runs the same kernels in Python, slowly. Dao 2023 (arXiv 2307.08691), Tillet et al.
2019 (Triton, MAPL 2019).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU computes 2^x, so that scores are scaled by log2(e)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,
    log_sum_ptr,
    scale,
    n_query,
    n_key,
    heads_per_kv,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: one tile of queries of one head, all its keys; tensors are contiguous (heads, position, WIDTH)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // heads_per_kv
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    feature = tl.arange(0, WIDTH)
    real_row = row < n_query
    q_at = q_ptr + head * n_query * WIDTH + row[:, None] * WIDTH + feature
    q = tl.load(q_at, mask=real_row[:, None], other=0.0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    offset = n_key - n_query
    last = tl.minimum(n_key, (tile + 1) * ROWS + offset) if CAUSAL else n_key
    for start in range(0, last, COLUMNS):
        key = start + column
        kv_at = kv_head * n_key * WIDTH + key[:, None] * WIDTH + feature
        real_key = key < n_key
        k = tl.load(k_ptr + kv_at, mask=real_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        allowed = real_key[None, :]
        if CAUSAL:
            allowed = allowed & (key[None, :] <= row[:, None] + offset)
        scores = tl.where(allowed, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + kv_at, mask=real_key[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    nowhere = total == 0.0
    total = tl.where(nowhere, 1.0, total)
    output_at = output_ptr + head * n_query * WIDTH + row[:, None] * WIDTH + feature
    tl.store(output_at, (mixed / total[:, None]).to(output_ptr.dtype.element_ty), mask=real_row[:, None])
    log_sum = tl.where(nowhere, 0.0, top) + tl.log2(total)
    tl.store(log_sum_ptr + head * n_query + row, log_sum, mask=real_row)


@triton.jit
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    log_sum_ptr,
    shared_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale,
    n_query,
    n_key,
    heads_per_kv,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: one tile of keys of one query head, all queries. The gradients are float32 and start at 0.

    Several programs add to one row of grad_q, and, with shared keys, to one row of grad_k and grad_v: atomically.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // heads_per_kv
    key = tile * COLUMNS + tl.arange(0, COLUMNS)
    feature = tl.arange(0, WIDTH)
    real_key = key < n_key
    kv_at = kv_head * n_key * WIDTH + key[:, None] * WIDTH + feature
    k = tl.load(k_ptr + kv_at, mask=real_key[:, None], other=0.0)
    v = tl.load(v_ptr + kv_at, mask=real_key[:, None], other=0.0)
    grad_k = tl.zeros((COLUMNS, WIDTH), tl.float32)
    grad_v = tl.zeros((COLUMNS, WIDTH), tl.float32)
    offset = n_key - n_query
    first = tl.maximum(0, tile * COLUMNS - offset) // ROWS * ROWS if CAUSAL else 0
    for start in range(first, n_query, ROWS):
        row = start + tl.arange(0, ROWS)
        real_row = row < n_query
        q_at = head * n_query * WIDTH + row[:, None] * WIDTH + feature
        q = tl.load(q_ptr + q_at, mask=real_row[:, None], other=0.0)
        grad = tl.load(grad_ptr + q_at, mask=real_row[:, None], other=0.0)
        log_sum = tl.load(log_sum_ptr + head * n_query + row, mask=real_row, other=0.0)
        shared = tl.load(shared_ptr + head * n_query + row, mask=real_row, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        allowed = real_key[None, :] & real_row[:, None]
        if CAUSAL:
            allowed = allowed & (key[None, :] <= row[:, None] + offset)
        weights = tl.where(allowed, tl.exp2(scores - log_sum[:, None]), 0.0)
        grad_v += tl.dot(tl.trans(weights).to(grad.dtype), grad, input_precision="ieee")
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = (weights * (grad_weights - shared[:, None]) * scale).to(q.dtype)
        grad_k += tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
        grad_q = tl.dot(grad_scores, k, input_precision="ieee")
        tl.atomic_add(grad_q_ptr + q_at, grad_q, mask=real_row[:, None])
    tl.atomic_add(grad_k_ptr + kv_at, grad_k, mask=real_key[:, None])
    tl.atomic_add(grad_v_ptr + kv_at, grad_v, mask=real_key[:, None])


class FlashKernel(torch.autograd.Function):
    """The kernels as a function that PyTorch can differentiate once."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, tile_rows: int) -> Tensor:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        batch, n_heads, n_query, width = q.shape
        log_sums = q.new_empty(batch, n_heads, n_query, dtype=torch.float32)  # (batch, heads, query)
        output, ctx.sizes = torch.empty_like(q), (causal, width, tile_rows, tile_rows)
        ctx.grid = (triton.cdiv(n_query, tile_rows), batch * n_heads)
        ctx.numbers = (1 / math.sqrt(width), n_query, k.shape[2], n_heads // k.shape[1])
        forward_kernel[ctx.grid](q, k, v, output, log_sums, *ctx.numbers, *ctx.sizes)
        ctx.save_for_backward(q, k, v, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        shared = (grad_output.float() * output.float()).sum(dim=-1)  # (batch, heads, query)
        grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v)]
        grid = (triton.cdiv(k.shape[2], ctx.sizes[3]), q.shape[0] * q.shape[1])
        backward_kernel[grid](q, k, v, grad_output, log_sums, shared, *grads, *ctx.numbers, *ctx.sizes)
        return (*(grad.to(tensor.dtype) for grad, tensor in zip(grads, (q, k, v), strict=True)), None, None)


def flash_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, tile_rows: int = 64) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on a GPU.

    Shapes: q (batch, heads, query, d_head), k and v (batch, kv_heads, key, d_head), float16, bfloat16 or float32;
    d_head a power of two, at least 16. causal aligns the last query with the last key.
    Raises ValueError for other shapes and dtypes.
    """
    width, group = q.shape[-1], k.shape[1]
    if width < 16 or width & (width - 1):
        raise ValueError(f"d_head={width} must be a power of two, at least 16: the tiles of a GPU are")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[-1] != width or not group or q.shape[1] % group:
        raise ValueError(f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} do not fit each other")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel computes in float16, bfloat16 or float32, got {q.dtype}")
    return FlashKernel.apply(q, k, v, causal, tile_rows)
