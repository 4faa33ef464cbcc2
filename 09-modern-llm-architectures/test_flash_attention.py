"""Topic 09: FlashAttention-2 against SDPA, outputs and gradients, and its traffic against the formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

import flash_attention as topic
from flash_attention import Traffic, flash_attention, flash_traffic, tile_sizes, written_out_traffic


def inputs(n_query: int, n_key: int, n_kv_heads: int = 4, d_value: int = 9, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n_query + 100 * n_key)
    shapes = ((2, 4, n_query, 6), (2, n_kv_heads, n_key, 6), (2, n_kv_heads, n_key, d_value))
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("fast_memory", [32, 200, 5000])
@pytest.mark.parametrize(("n_query", "n_key", "n_kv_heads"), [(1, 1, 4), (13, 13, 2), (5, 17, 1), (11, 7, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_equal_sdpa(causal, n_query, n_key, n_kv_heads, fast_memory, parity) -> None:
    q, k, v = inputs(n_query, n_key, n_kv_heads)
    mask = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query) if causal else None
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    grad = torch.randn_like(wanted)
    theirs = torch.autograd.grad(wanted, (q, k, v), grad)
    got = flash_attention(q, k, v, causal, fast_memory)
    parity("flash_attention", "F.scaled_dot_product_attention", "output", got, wanted, 1e-10)
    parity(
        "flash_attention",
        "F.scaled_dot_product_attention",
        "gradient",
        torch.autograd.grad(got, (q, k, v), grad),
        theirs,
        1e-10,
    )


def test_large_scores_and_half_precision_stay_finite(parity) -> None:
    q, k, v = (tensor.detach() for tensor in inputs(9, 9, d_value=6))
    huge = flash_attention(q * 1e4, k * 1e4, v, causal=True, fast_memory=200)
    assert torch.isfinite(huge).all()
    half = flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), fast_memory=200)
    parity("flash_attention, bfloat16", "its own float64", "output", half, flash_attention(q, k, v), 0.03)


def test_half_precision_is_rounded_once_and_not_in_every_tile(parity) -> None:
    """Sums over 400 keys: kept in bfloat16 they would be off by several roundings, where the output's is one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 400, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    got, wanted = flash_attention(q, k, v, fast_memory=500), flash_attention(*exact, fast_memory=500)
    one_rounding = (wanted - wanted.bfloat16()).abs().max().item()
    parity("flash_attention, bfloat16, 400 keys", "float64", "output", got.double(), wanted, 1.01 * one_rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_as_close_as_sdpas(dtype, parity) -> None:
    """Sharp scores, where the products of output and gradient must not be rounded one by one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(4, 4, 30, 8, generator=generator) for _ in range(4))
    halves = [tensor.to(dtype).requires_grad_() for tensor in (30 * q, k, v)]
    exact = [tensor.detach().double().requires_grad_() for tensor in halves]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, grad.to(dtype).double())
    for name, one in (("queries", 0), ("keys", 1), ("values", 2)):
        errors = []
        for attention in (flash_attention, F.scaled_dot_product_attention):
            got = torch.autograd.grad(attention(*halves), halves, grad.to(dtype))[one]
            errors.append(((got.double() - wanted[one]).norm() / wanted[one].norm()).item())
        parity(f"flash_attention, {dtype}, {name}", "SDPA's error", "gradient", errors[0], 0.0, 1.5 * errors[1])


@pytest.mark.parametrize("fast_memory", [200, 2000, 20_000])
def test_traffic_is_the_formula(fast_memory: int, parity) -> None:
    n, d_head, traffic = 64, 6, Traffic()
    q, k, v = inputs(n, n, d_value=6)
    output = flash_attention(q, k, v, fast_memory=fast_memory, traffic=traffic)
    wanted = 8 * flash_traffic(n, n, d_head, fast_memory)
    parity("flash_traffic", "transfers of the run", "invariant", traffic.total, wanted, 0)
    output.sum().backward()
    n_tiles = math.ceil(n / tile_sizes(fast_memory, d_head)[1])
    once = 6 * n * d_head + n  # the output and its gradient; keys, values and their gradients; a number for each row
    each = 4 * n * d_head + 2 * n  # of keys: queries, gradients, two numbers a row; the queries' gradient, both ways
    parity(
        "flash backward traffic", "counted by hand", "invariant", traffic.total - wanted, 8 * (once + n_tiles * each), 0
    )


def test_traffic_falls_with_fast_memory_and_beats_the_written_out_matrix() -> None:
    n, d_head = 1024, 64
    moved = [flash_traffic(n, n, d_head, memory) for memory in (20_000, 40_000, 80_000, 160_000)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < written_out_traffic(n, n, d_head) / 4


def test_causal_reads_about_half_and_the_backward_pass_is_counted() -> None:
    q, k, v = inputs(120, 120, d_value=6)
    whole, half = Traffic(), Traffic()
    flash_attention(q, k, v, False, 300, whole)
    output = flash_attention(q, k, v, True, 300, half)
    assert 0.5 < half.read / whole.read < 0.62
    before = half.total
    output.sum().backward()
    assert half.total > 2 * before


def test_tiles_fill_the_fast_memory() -> None:
    for fast_memory, d_head in ((200, 6), (2**15, 64), (2**17, 128)):
        rows, _ = tile_sizes(fast_memory, d_head)
        used = rows * 4 * d_head + rows**2
        assert used <= fast_memory < (rows + 1) * 4 * d_head + (rows + 1) ** 2


def test_shape_comments_hold(checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        flash_attention(*inputs(7, 11), causal=True, fast_memory=150).sum().backward()
    assert len(checked) >= 10


def test_bad_input_is_refused_in_words() -> None:
    q, k, v = inputs(5, 7)
    with pytest.raises(ValueError, match="fast_memory=20 holds no row of width 6; it needs at least 31"):
        flash_attention(q, k, v, fast_memory=20)
    for wrong in ((q[0], k[0], v[0]), (q, k, v[:, :2]), (q[:1], k, v)):
        with pytest.raises(ValueError, match="keys and values of the same heads and positions"):
            flash_attention(*wrong)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        flash_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="queries have width 6 but keys 5"):
        flash_attention(q, k[..., :5], v)
