"""Proofs of the quantised layers: packed weights, bitsandbytes' int8, torch's straight-through gradient, the cache."""

import pytest
import torch
from torch import nn

import quantized_layers
from llm_config import ModelConfig
from llm_layers import KVCache
from modern_llm_architectures import CausalLM
from quantized_layers import (
    FakeQuantise,
    Int8Linear,
    KVFormat,
    PackedEmbedding,
    PackedLinear,
    QuantisedKVCache,
    int8_codes,
    quantise_nearest,
    quantised_kv_bytes,
    replace_linears,
    with_rounding,
    without_rounding,
)
from weight_quantization import QuantFormat, quantise, stored_bytes
from workbench import seed_everything

FORMATS = [
    QuantFormat(4, 8),
    QuantFormat(4, 7, "absmax"),
    QuantFormat(3, 0),
    QuantFormat(2, -1, "absmax"),
    QuantFormat(8, -1),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)


# Packed weights


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_packed_layer_computes_with_the_dequantised_weight(parity, fmt) -> None:
    weight, x, bias = randn(5, 19), randn(2, 3, 19, seed=1), randn(5, seed=2)
    quantised = quantise(weight, fmt)
    layer = PackedLinear.from_quantised(quantised, bias)
    expected = nn.functional.linear(x, quantised.dequantise(), bias)
    parity("PackedLinear", "F.linear of the dequantised weight", "output", layer(x), expected, 0)
    assert layer.n_bytes == quantised.n_bytes == stored_bytes(5, 19, fmt)
    assert "zero_points" in layer.state_dict() or fmt.scheme == "absmax"


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_packed_embedding_looks_up_the_rows_of_the_dequantised_table(parity, fmt) -> None:
    table = PackedLinear.from_quantised(quantise(randn(11, 6), fmt))
    ids = torch.tensor([[3, 0, 10], [3, 7, 1]])
    parity("PackedEmbedding", "F.embedding", "output", PackedEmbedding(table)(ids), table.weight[ids], 0)


def test_state_dict_is_the_way_to_copy(parity) -> None:
    layer = PackedLinear.from_quantised(quantise(randn(5, 19), QuantFormat(3, 4)))
    other = PackedLinear(5, 19, QuantFormat(3, 4))
    other.load_state_dict(layer.state_dict())
    parity("PackedLinear", "its own state dict", "exchange", other.weight, layer.weight, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_give_the_type_that_they_are_given_and_keep_their_own_bias(dtype) -> None:
    layer, x = nn.Linear(6, 5), randn(3, 6).to(dtype)
    made = [Int8Linear.from_linear(layer), quantise_nearest(QuantFormat(8, 0))("", layer)]
    before = [small(x) for small in made]
    assert [out.dtype for out in before] == [dtype] * 2
    assert all((out.float() - layer(x.float())).abs().max() < 0.1 for out in before)
    with torch.no_grad():
        layer.bias += 7  # of the float layer: the others have bytes of their own
    assert all(torch.equal(small(x), out) for small, out in zip(made, before, strict=True))


# LLM.int8


def test_codes_and_sums_equal_bitsandbytes(parity) -> None:
    from bitsandbytes import functional

    x, weight = randn(7, 33), randn(9, 33, seed=1)
    x[:, 4] *= 30
    ours, scale = int8_codes(x, dim=1)
    theirs, peaks, _ = functional.int8_vectorwise_quant(x)
    parity("int8_codes", "bitsandbytes int8_vectorwise_quant", "output", ours, theirs, 0)
    parity("int8 scales", "bitsandbytes int8_vectorwise_quant", "output", scale[:, 0], peaks / 127, 1e-7)
    codes, _ = int8_codes(weight, dim=1)
    sums = functional.int8_linear_matmul(theirs, codes)
    ours = quantized_layers.int_matmul(ours, codes)
    parity("int_matmul", "bitsandbytes int8_linear_matmul", "output", ours, sums, 0)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_layer_equals_bitsandbytes(parity, threshold) -> None:
    """Their result is rounded to half precision, ours is not: the tolerance is a few steps of float16 at this size.

    The outlier channel is one in every token. Where it is not, theirs lets its smaller values set the token's scale,
    although their codes are not used; ours leaves the channel out of the scale.
    """
    import bitsandbytes

    torch.manual_seed(4)
    layer, x = nn.Linear(32, 9), randn(2, 5, 32)
    layer.weight.data = layer.weight.data.half().float()  # theirs rounds it so first, which may turn a code
    x[..., 6] = 8 + x[..., 6].abs()
    theirs = bitsandbytes.nn.Linear8bitLt(32, 9, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict({"weight": layer.weight.data, "bias": layer.bias.data})
    theirs = theirs.to("cpu").eval()  # in training mode it multiplies floats
    with torch.no_grad():
        x = x.half().float()
        expected, ours = theirs(x.half()).float(), Int8Linear.from_linear(layer, threshold)(x)
    parity(f"Int8Linear, threshold {threshold:g}", "bitsandbytes Linear8bitLt", "output", ours, expected, 1e-2)


def test_outlier_channels_are_exact_but_for_the_weight() -> None:
    layer, x = nn.Linear(16, 5, bias=False), randn(4, 16)
    x[1, 3] = 50.0
    made = Int8Linear.from_linear(layer, 6.0)
    rest = x.clone()
    rest[:, 3] = 0
    codes, scales = int8_codes(rest, dim=1)
    expected = (codes.float() * scales) @ made.weight.T + x[:, 3:4] @ made.weight[:, 3:4].T
    assert torch.allclose(made(x), expected, atol=1e-5)
    exact = x @ layer.weight.T
    plain = Int8Linear.from_linear(layer, 0.0)
    assert (made(x) - exact)[1].abs().mean() < (plain(x) - exact)[1].abs().mean() / 3


def test_one_scale_for_a_token_or_for_all() -> None:
    layer, x = nn.Linear(16, 5, bias=False), randn(6, 16)
    alone = torch.cat([Int8Linear.from_linear(layer)(row[None]) for row in x])
    together = Int8Linear.from_linear(layer)(x)
    assert torch.equal(alone, together)
    assert not torch.equal(Int8Linear.from_linear(layer, per_token=False)(x), together)


def test_tokens_and_rows_of_zeros_give_zeros() -> None:
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    out = Int8Linear.from_linear(layer)(torch.zeros(2, 8))
    assert torch.allclose(out, layer.bias.expand(2, 3)) and torch.isfinite(out).all()


# Training through rounding


def test_straight_through_gradient_equals_torch(parity) -> None:
    x = randn(6, 9) * 3
    scale, zero = torch.rand(6, 1) * 0.3 + 0.1, torch.randint(0, 16, (6, 1)).float()
    grad = randn(6, 9, seed=1)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    FakeQuantise.apply(ours, scale, zero, 15).backward(grad)
    torch.fake_quantize_per_channel_affine(theirs, scale[:, 0], zero[:, 0].int(), 0, 0, 15).backward(grad)
    assert 0 < (ours.grad == 0).float().mean() < 1
    parity("FakeQuantise", "torch.fake_quantize_per_channel_affine", "gradient", ours.grad, theirs.grad, 0)


def test_trained_weights_are_those_that_are_stored(parity) -> None:
    seed_everything(0)
    fmt, x, layer = QuantFormat(3, 8), randn(40, 16), nn.Linear(16, 4, bias=False)
    first = layer.weight.detach().clone()
    with_rounding(layer, fmt)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    computed = layer(x)
    without_rounding(layer)
    assert not torch.allclose(layer.weight, first, atol=1e-3) and len(list(layer.parameters())) == 1
    stored = PackedLinear.from_quantised(quantise(layer.weight.detach(), fmt))
    parity("with_rounding", "the packed layer afterwards", "output", stored(x), computed, 1e-6)


# The cache


KV_FORMATS = [KVFormat(8), KVFormat(4), KVFormat(8, "channel", 4), KVFormat(3, "channel", 5)]


@pytest.mark.parametrize("fmt", KV_FORMATS, ids=str)
def test_cache_gives_back_what_it_got_within_half_a_step(fmt) -> None:
    cache, exact = QuantisedKVCache(fmt), KVCache()
    for step, n_new in enumerate((7, 1, 1, 6)):
        new = (randn(2, 3, n_new, 6, seed=step), randn(2, 3, n_new, 10, seed=20 + step))
        k, v = cache.append(*new)
        exact_k, exact_v = exact.append(*new)
        assert k.shape == exact_k.shape and v.shape == exact_v.shape and len(cache) == len(exact)
        most = 2**fmt.n_bits - 1
        for got, want in ((k, exact_k), (v, exact_v)):
            assert (got - want).abs().max() <= 0.51 * (want.max() - want.min()) / most + 1e-3
        assert cache.n_keys(1) == exact.n_keys(1)


def test_cache_of_a_token_is_that_tokens_own_grid(parity) -> None:
    """One scale for each token and head: quantised token by token or all at once, the same codes."""
    k, v = randn(2, 3, 9, 6), randn(2, 3, 9, 6, seed=1)
    whole, steps = QuantisedKVCache(KVFormat(4)), QuantisedKVCache(KVFormat(4))
    together = whole.append(k, v)
    for place in range(9):
        apart = steps.append(k[:, :, place : place + 1], v[:, :, place : place + 1])
    parity("QuantisedKVCache, in steps", "all positions at once", "invariant", list(apart), list(together), 0)
    row = quantise(k.reshape(-1, 6), QuantFormat(4, 0)).dequantise().reshape(k.shape)
    parity("QuantisedKVCache", "quantise of each token's row", "output", together[0], row, 0)


def test_cache_by_channel_keeps_large_channels_apart() -> None:
    k = randn(1, 2, 16, 8)
    k[..., 5] += 30
    v = randn(1, 2, 16, 8, seed=1)
    error = {
        name: (QuantisedKVCache(KVFormat(4, name, 16)).append(k, v)[0] - k)[..., :5].square().mean().item()
        for name in ("token", "channel")
    }
    assert error["channel"] < error["token"] / 20


@pytest.mark.parametrize("fmt", [KVFormat(8), KVFormat(4), KVFormat(3), KVFormat(4, "channel", 8)], ids=str)
def test_cache_bytes_equal_the_formula(fmt) -> None:
    cache = QuantisedKVCache(fmt)
    cache.append(randn(2, 3, 24, 10), randn(2, 3, 24, 10, seed=1))
    assert cache.n_bytes == 2 * 24 * quantised_kv_bytes(fmt, 1, 3, 10)
    assert cache.n_bytes < 2 * 2 * 3 * 24 * 10 * 4


@pytest.mark.parametrize("fmt", KV_FORMATS, ids=str)
def test_cache_selects_rows_and_crops(fmt) -> None:
    k, v = randn(3, 2, 7, 6), randn(3, 2, 7, 6, seed=1)
    cache = QuantisedKVCache(fmt)
    kept, _ = cache.append(k, v)
    cache.select([2, 0, 2])
    new = (randn(3, 2, 1, 6, seed=2), randn(3, 2, 1, 6, seed=3))
    after, _ = cache.append(*new)
    if fmt.keys_by == "token" or fmt.kv_block_size == 4:
        n_encoded = 7 if fmt.keys_by == "token" else 4
        assert torch.equal(after[:, :, :n_encoded], kept[[2, 0, 2], :, :n_encoded])
    with pytest.raises(ValueError, match="n_positions=9 must be in 0..8"):
        cache.crop(9)
    cache.crop(8)
    if fmt.keys_by == "token":
        with pytest.raises(ValueError, match="the first 8 positions are encoded"):
            cache.crop(3)
    else:
        cache.crop(8 - 8 % fmt.kv_block_size)
    cache.crop(0)
    assert len(cache) == 0 and cache.append(*new)[0].shape == (3, 2, 1, 6)


def test_a_cropped_cache_goes_on_as_one_that_never_saw_the_rest() -> None:
    """Five tokens are encoded, two are not; the last is forgotten, and another two come."""
    k, v, new = randn(2, 3, 7, 6), randn(2, 3, 7, 10, seed=1), (randn(2, 3, 4, 6, seed=2), randn(2, 3, 4, 10, seed=3))
    cropped, short = (QuantisedKVCache(KVFormat(4, "channel", 5)) for _ in range(2))
    cropped.append(k, v)
    cropped.crop(6)
    short.append(k[:, :, :6], v[:, :, :6])
    assert len(cropped) == len(short) == 6 and cropped.n_keys(1) == short.n_keys(1)
    for found, wanted in zip(cropped.append(*new), short.append(*new), strict=True):
        assert torch.equal(found, wanted) and found.shape[2] == 10
    assert cropped.n_bytes == short.n_bytes


def test_a_cache_keeps_what_it_was_given_in_its_type() -> None:
    k, v = randn(1, 2, 3, 4).bfloat16(), randn(1, 2, 3, 4, seed=1).bfloat16()
    cache = QuantisedKVCache(KVFormat(8, "channel", 8))  # all in the tail, in float
    cache.append(k, v)
    wanted = k.clone()
    k.zero_()
    found, _ = cache.append(randn(1, 2, 1, 4).bfloat16(), randn(1, 2, 1, 4).bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found[:, :, :3], wanted)


def test_a_model_with_these_layers_and_caches(parity) -> None:
    """8 bits everywhere stay close to the float model, and steps with a cache equal one pass."""
    seed_everything(0)
    config = ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=4, d_ff=24)
    model, ids = CausalLM(config).eval(), torch.arange(22).reshape(2, 11)
    before = model(ids)
    replace_linears(model, quantise_nearest(QuantFormat(8, 8)))
    assert 0 < (model(ids) - before).abs().max() < 0.02 * before.abs().max()
    caches = [QuantisedKVCache(KVFormat(8)) for _ in range(2)]
    whole = model(ids, caches)
    caches = [QuantisedKVCache(KVFormat(8)) for _ in range(2)]
    steps = torch.cat([model(ids[:, place : place + 1], caches) for place in range(11)], dim=1)
    parity("CausalLM with quantised caches", "one pass", "invariant", steps, whole, 1e-5)


def test_an_int8_layer_takes_what_a_linear_layer_takes() -> None:
    layer, x = nn.Linear(6, 5), randn(4, 6)
    for per_token in (True, False):
        small = Int8Linear.from_linear(layer, 0.0, per_token)
        assert torch.equal(small(x[1]), small(x[1:2])[0])  # one vector
        assert small(x.T.contiguous().T).equal(small(x))
        assert small(x[:0].reshape(2, 0, 6)).shape == (2, 0, 5)


def test_shape_comments(checked_shapes) -> None:
    with checked_shapes(quantized_layers) as checked:
        PackedEmbedding(PackedLinear.from_quantised(quantise(randn(5, 6), QuantFormat(4, 4))))(torch.tensor([1, 2]))
        x = randn(4, 6)
        x[0, 1] = 9.0
        Int8Linear.from_linear(nn.Linear(6, 3))(x)
        QuantisedKVCache(KVFormat(4, "channel", 3)).append(randn(2, 1, 7, 4), randn(2, 1, 7, 4))
    assert len(checked) >= 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Linear(2, 2, -1.0), "threshold must be >= 0 (0: no channel is left in float), got -1.0"),
        (lambda: KVFormat(1), "n_bits must be finite and >= 2 and <= 8, got 1"),
        (lambda: KVFormat(4, "tokens"), "unknown keys_by 'tokens'; did you mean 'token'?"),
        (lambda: KVFormat(kv_block_size=0), "kv_block_size must be finite and >= 1, got 0"),
        (
            lambda: QuantisedKVCache(KVFormat(2)).append(*[1e6 * randn(1, 2, 3, 4)] * 2),
            "exceeds float16; the values are",
        ),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
