"""Topic 11: NF4 with double quantisation equal to bitsandbytes bit for bit, its size by formula, and its gradient."""

import math

import bitsandbytes.functional as theirs
import pytest
import torch
from torch import nn

import nf4
from low_rank_adapters import LoraConfig, add_adapters
from modern_llm_architectures import CausalLM, ModelConfig
from nf4 import NF4Linear, dynamic_levels, eight_bit_codes, nf4_bytes, nf4_levels, quantize_model, quantize_nf4

TINY = ModelConfig(vocab_size=50, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40, max_seq_len=32)
SHAPES = [
    (128, 352),
    (33, 64),
    (7, 13),
    (3, 5),
    (101,),
    (700, 64),
    (1, 1),
]  # even, odd, shorter than a block, one weight


def weights(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_both_tables_equal_bitsandbytes(parity) -> None:
    parity("NF4 levels", "bitsandbytes", "output", nf4_levels(), theirs.get_4bit_type("nf4", device="cpu"), 0)
    parity("8-bit dynamic levels", "bitsandbytes", "output", dynamic_levels(), theirs.create_dynamic_map(), 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 2048])
def test_codes_scales_and_weights_equal_bitsandbytes_bit_for_bit(shape, block_size: int, parity) -> None:
    weight = weights(*shape)
    for double in (False, True):
        ours = quantize_nf4(weight, block_size, double)
        # flat: with AVX-512, their 0.50.2 unpacks as if a block began with every row, though it packs as we do
        codes, state = theirs.quantize_4bit(weight.flatten(), None, None, block_size, double, "nf4")
        parity("NF4 codes", "bitsandbytes", "output", ours.codes, codes.flatten(), 0)
        parity("NF4 scales", "bitsandbytes", "output", ours.scales, state.absmax, 0)
        if double:
            parity("NF4 nested scales", "bitsandbytes", "output", ours.nested_scales, state.state2.absmax, 0)
            parity("NF4 mean scale", "bitsandbytes", "output", ours.mean, state.offset, 0)
        with torch.compiler.set_stance("force_eager"):  # their path for odd shapes would compile for each of them
            unpacked = theirs.dequantize_4bit(codes, state).reshape(shape)
        parity("NF4 dequantised weights", "bitsandbytes", "output", ours.dequantize(), unpacked, 0)


def test_values_halfway_between_two_levels_go_where_bitsandbytes_sends_them(parity) -> None:
    middles = (nf4.nf4_levels()[:-1] + nf4.nf4_levels()[1:]) / 2
    for far in (None, 2.0, -2.0):  # at the middle itself, and one float above and below it
        values = middles if far is None else torch.nextafter(middles, torch.tensor(far))
        block = torch.cat([values, torch.ones(1), torch.zeros(48)])
        codes, _ = theirs.quantize_4bit(block, blocksize=64, quant_type="nf4")
        parity("NF4 codes", "bitsandbytes", "output", quantize_nf4(block, 64, False).codes, codes.flatten(), 0)


def test_scales_of_many_blocks_equal_bitsandbytes(parity) -> None:
    for seed in range(10):
        values = weights(256 * 40 + 37, seed=seed, scale=1.0)
        codes, state = theirs.quantize_blockwise(values, blocksize=256)
        ours = eight_bit_codes(values, nf4.block_scales(values, 256))
        parity("8-bit codes of the scales", "bitsandbytes", "output", ours, codes, 0)
        parity("8-bit scales of the scales", "bitsandbytes", "output", nf4.block_scales(values, 256), state.absmax, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_the_formula(shape) -> None:
    n = math.prod(shape)
    for double in (False, True):
        packed = quantize_nf4(weights(*shape), 64, double)
        assert packed.n_bytes == nf4_bytes(n, 64, double)
        assert packed.dequantize().shape == shape
    assert 8 * nf4_bytes(2**24, 64, double=True) / 2**24 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * nf4_bytes(2**24, 64, double=False) / 2**24 == 4.5


def test_a_worked_block() -> None:
    block = torch.tensor([0.5, -2.0, 0.0, 1.0])  # the largest magnitude is 2, so the scaled block is 1/4, -1, 0, 1/2
    packed = quantize_nf4(block, 4, double=False)
    levels = nf4_levels()
    assert packed.scales.tolist() == [2.0]
    assert [packed.codes[0].item() >> 4, packed.codes[0].item() & 15] == [10, 0]  # 0.2461 is closest to 1/4
    expected = torch.stack([2 * levels[10], torch.tensor(-2.0), torch.tensor(0.0), 2 * levels[12]])
    assert torch.equal(packed.dequantize(), expected)


def test_levels_are_kept_and_zero_stays_zero() -> None:
    weight = 3 * nf4_levels().repeat(5)
    assert torch.equal(quantize_nf4(weight, 16, double=False).dequantize(), weight)
    assert not quantize_nf4(torch.zeros(3, 70)).dequantize().any()


def test_a_block_of_zeros_between_others_stays_zero() -> None:
    """Its scale, 0, is stored as an 8-bit number less a mean, and may come back as a little more or less than 0."""
    weight = weights(6, 64)
    weight[2] = 0
    packed = quantize_nf4(weight, 64, double=True)
    assert packed.block_sizes()[2] != 0 and not packed.dequantize()[2].any()


def test_normal_weights_use_every_level_not_alike_and_beat_an_even_grid() -> None:
    weight = weights(2**16, seed=3)
    packed = quantize_nf4(weight, 64, double=False)
    codes = torch.stack([packed.codes >> 4, packed.codes & 15]).flatten().long()
    counts = torch.bincount(codes, minlength=16) / len(codes)
    assert 0.01 < counts.min() == min(counts[0], counts[15]) < 0.03  # the scale is the block's maximum: few reach it
    assert 0.08 < counts.max() < 0.11
    even = torch.linspace(-1, 1, 16)
    scales = nf4.block_scales(weight, 64)
    rounded = even[nf4.nearest(nf4.scaled_to_one(weight, scales, 64), even)] * scales.repeat_interleave(64)
    assert (packed.dequantize() - weight).square().mean() < 0.9 * (rounded - weight).square().mean()


def test_a_quantised_layer_passes_gradients_and_keeps_no_weight(parity) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(26, 17)
    layer = NF4Linear(linear)
    plain = nn.Linear(26, 17)
    plain.load_state_dict({"weight": layer.weight, "bias": linear.bias})
    x = torch.randn(3, 5, 26, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x)
    assert torch.Size([17, 26]) not in kept
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    wanted = torch.autograd.grad(plain(x).square().sum(), x)[0]
    parity("NF4 linear layer", "nn.Linear on the dequantised weight", "output", out, plain(x), 1e-6)
    parity("NF4 linear layer", "nn.Linear on the dequantised weight", "gradient", grad, wanted, 1e-5)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_quantised_layer_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    layer, x = NF4Linear(nn.Linear(26, 17, bias=False)), weights(3, 26, scale=1.0).to(dtype).requires_grad_()
    out = layer(x)
    out.sum().backward()
    wanted = x.detach() @ layer.weight.to(dtype).T
    assert NF4Linear(nn.Linear(26, 17))(x).dtype == dtype  # its bias is stored in float32
    assert out.dtype == x.grad.dtype == dtype and torch.allclose(out, wanted, rtol=1e-6 if dtype.itemsize > 2 else 0.02)
    assert torch.allclose(x.grad, layer.weight.sum(0).to(dtype).expand(3, 26), rtol=0.02, atol=0.02)


def test_a_layer_weighs_its_codes_and_its_bias() -> None:
    assert nf4.weight_bytes(NF4Linear(nn.Linear(26, 17))) == nf4_bytes(26 * 17) + 4 * 17


def test_qlora_trains_the_adapters_alone_and_learns() -> None:
    torch.manual_seed(0)
    model = CausalLM(TINY)
    before = nf4.weight_bytes(model)
    names = quantize_model(model)
    assert len(names) == 14 and nf4.weight_bytes(model) < before
    add_adapters(model, LoraConfig(lora_rank=3, lora_alpha=12))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    token_ids = torch.arange(30).view(2, 15)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    frozen = model.blocks[0].ffn.up_proj.base.codes.clone()

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())

    first = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * first  # the embeddings stay random; the adapters alone learn
    assert torch.equal(model.blocks[0].ffn.up_proj.base.codes, frozen)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be >= 2, got 0"):
        quantize_nf4(torch.ones(4), 0)
    with pytest.raises(ValueError, match="block_size must be >= 2, got 1"):
        quantize_nf4(torch.ones(4), 1)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not all finite"):
            quantize_nf4(torch.tensor([1.0, bad]))
    model = CausalLM(TINY)
    quantize_model(model)
    with pytest.raises(ValueError, match="quantise before adding adapters, once"):
        quantize_model(model)
