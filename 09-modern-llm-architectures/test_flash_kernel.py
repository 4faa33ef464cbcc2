"""Topic 09: the Triton kernels against SDPA; on a GPU where there is one, elsewhere in Triton's interpreter (which
conftest.py asks for before anything imports triton)."""

import pytest
import torch
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernels need the package triton, which comes with CUDA builds of PyTorch")

from flash_kernel import flash_kernel  # noqa: E402


def inputs(n_query: int, n_key: int, n_kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n_query + 100 * n_key)
    shapes = ((2, 4, n_query, 16), (2, n_kv_heads, n_key, 16), (2, n_kv_heads, n_key, 16))
    made = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize(("n_query", "n_key", "n_kv_heads"), [(1, 1, 4), (37, 37, 2), (5, 40, 1), (33, 70, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_equal_sdpa(causal: bool, n_query: int, n_key: int, n_kv_heads: int, parity) -> None:
    q, k, v = inputs(n_query, n_key, n_kv_heads, torch.float32)
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=DEVICE).tril(n_key - n_query) if causal else None
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    theirs = torch.autograd.grad(wanted, (q, k, v), grad)
    got = flash_kernel(q, k, v, causal, tile_rows=16)
    ours = torch.autograd.grad(got, (q, k, v), grad)
    parity("flash_kernel", "F.scaled_dot_product_attention", "output", got, wanted, 1e-5)
    parity("flash_kernel", "F.scaled_dot_product_attention", "gradient", ours, theirs, 1e-4)


def test_bad_input_is_refused_in_words() -> None:
    q, k, v = inputs(5, 7, 4, torch.float32)
    with pytest.raises(ValueError, match="d_head=12 must be a power of two"):
        flash_kernel(q[..., :12], k[..., :12], v[..., :12])
    with pytest.raises(ValueError, match="do not fit each other"):
        flash_kernel(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="got torch.float64"):
        flash_kernel(q.double(), k.double(), v.double())
