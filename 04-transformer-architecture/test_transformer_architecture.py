"""Topic 04: layers and stacks against PyTorch, positions against Hugging Face, counters against real models."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import prerequisites
import transformer_architecture as topic
from architecture_experiments import build_on_meta, silence
from attention_mechanisms import MultiHeadAttention, causal_mask, padding_mask
from sequence_modeling import BOS_ID, IGNORE, Vocabulary, document_losses
from tiny_world import World
from transformer_architecture import (
    POSITIONS,
    VASWANI_BASE,
    VASWANI_BIG,
    AlibiAttention,
    CausalRelativeAttention,
    CausalTransformer,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    HalfRotaryAttention,
    KeyValueCache,
    LayerNorm,
    LearnedPositions,
    MatmulCounter,
    ModelConfig,
    NoPositions,
    NumpyTransformer,
    RelativeAttention,
    RotaryAttention,
    SinusoidalPositions,
    TrainConfig,
    TransformerSize,
    activation_bytes,
    alibi_slopes,
    copy_from_torch,
    copy_to_torch,
    count_parameters,
    kv_cache_bytes,
    layer_norm_backward,
    pairs_to_halves,
    position_angles,
    relative_buckets,
    rotate_halves,
    rotate_pairs,
    saved_bytes,
    transformer_flops,
    transformer_parameters,
)
from workbench import RunConfig, seed_everything

BATCH, TGT, SRC, D_MODEL, N_HEADS, D_FF = 2, 5, 7, 12, 3, 20  # all different, so a swapped axis cannot pass unnoticed
VOCAB = 23
TINY = ModelConfig(max_seq_len=16, d_model=D_MODEL, n_layers=2, n_heads=N_HEADS, d_ff=D_FF)
SHORT = TrainConfig(batch_size=8, seq_len=32, max_steps=4, warmup_steps=2, n_documents=20)
RUN = RunConfig(device="cpu")
pytestmark = [  # what PyTorch says about its own fast paths, and about the empty stacks that are counted here
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)
    torch.set_num_threads(1)  # layers this small gain nothing from a second core, and stall when it has other work


def random_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def shake(module: nn.Module) -> nn.Module:
    """Move every parameter away from special values: a weight of 1 and a bias of 0 would hide mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def gradients_in_our_layout(ours: nn.Module, theirs: nn.Module) -> tuple[list, list]:
    """The gradients of both modules' parameters, theirs under our names and in our order."""
    holder, mapped = copy.deepcopy(theirs), copy.deepcopy(ours)
    for parameter, source in zip(holder.parameters(), theirs.parameters(), strict=True):
        parameter.data = source.grad
    copy_from_torch(mapped, holder)
    return [parameter.grad for parameter in ours.parameters()], list(mapped.parameters())


def compare_everything(
    parity, name: str, oracle: str, ours: nn.Module, theirs: nn.Module, run_ours, run_theirs, inputs
):
    """Outputs, gradients of inputs and parameters, twelve Adam steps, and the weights back and forth."""
    shake(theirs)
    copy_from_torch(ours, theirs)
    returned = shake(copy.deepcopy(theirs))
    copy_to_torch(ours, returned)
    parity(name, oracle, "exchange", list(returned.parameters()), list(theirs.parameters()), 0.0)
    actual, expected = run_ours(), run_theirs()
    parity(name, oracle, "output", actual, expected, 1e-10)
    direction = torch.randn_like(expected)
    our_inputs = torch.autograd.grad(actual, inputs, direction, retain_graph=True)
    their_inputs = torch.autograd.grad(expected, inputs, direction, retain_graph=True)
    parity(name, oracle, "gradient", our_inputs, their_inputs, 1e-10)
    actual.backward(direction)
    expected.backward(direction)
    parity(name, oracle, "gradient", *gradients_in_our_layout(ours, theirs), 1e-10)
    losses = []
    for module, forward in ((ours, run_ours), (theirs, run_theirs)):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(12):
            loss = (forward() - direction).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    parity(name, oracle, "trajectory", losses[0], losses[1], 1e-10)


# Parity: layers and stacks


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 6), (1, 1, 2), (8,)])
def test_layer_norm_and_its_backward_by_hand(parity, shape) -> None:
    width, x, grad = shape[-1], random_input(*shape), torch.randn(*shape, dtype=torch.float64)
    ours = shake(LayerNorm(width, norm_eps=0.03)).double()  # an eps large enough that its place matters
    x.data[0] *= 0.01
    actual = ours(x)
    expected = F.layer_norm(x, (width,), ours.weight, ours.bias, eps=0.03)
    wanted = torch.autograd.grad(expected, (x, ours.weight, ours.bias), grad)
    parity("LayerNorm", "F.layer_norm", "output", actual, expected, 1e-10)
    automatic = torch.autograd.grad(actual, (x, ours.weight, ours.bias), grad)
    parity("LayerNorm", "F.layer_norm", "gradient", automatic, wanted, 1e-10)
    parity(
        "layer_norm_backward",
        "F.layer_norm",
        "gradient",
        layer_norm_backward(x, ours.weight, grad, 0.03),
        wanted,
        1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_layer_norm_normalises_half_precision_in_single(parity, dtype: torch.dtype, size: float) -> None:
    """Squares of 300 are infinite in float16, whose largest number is 65,504."""
    x, ours = (size * torch.randn(6, 9)).to(dtype).requires_grad_(), shake(LayerNorm(9)).to(dtype)
    actual, expected = ours(x), F.layer_norm(x, (9,), ours.weight, ours.bias)
    assert actual.dtype == dtype
    last_bit = 4 * torch.finfo(dtype).eps  # of outputs up to 4
    parity(f"LayerNorm, {dtype}", "F.layer_norm", "output", actual.float(), expected.float(), last_bit)
    grads = [torch.autograd.grad(size * out.float().square().sum(), x)[0].float() for out in (actual, expected)]
    parity(f"LayerNorm, {dtype}", "F.layer_norm", "gradient", *grads, 8 * last_bit)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward(parity, activation: str) -> None:
    ours, x = FeedForward(D_MODEL, D_FF, activation=activation).double(), random_input(BATCH, TGT, D_MODEL)
    middle = {"relu": nn.ReLU(), "gelu": nn.GELU()}[activation]
    theirs = nn.Sequential(nn.Linear(D_MODEL, D_FF), middle, nn.Linear(D_FF, D_MODEL)).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    actual, expected = ours(x), theirs(x)
    parity("FeedForward", "nn.Sequential", "output", actual, expected, 1e-10)
    grads = [
        torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        for out, module in ((actual, ours), (expected, theirs))
    ]
    parity("FeedForward", "nn.Sequential", "gradient", *grads, 1e-10)


@pytest.mark.parametrize(
    ("norm_order", "activation"), [("pre", "relu"), ("post", "relu"), ("pre", "gelu"), ("post", "gelu")]
)
def test_encoder_layer(parity, norm_order: str, activation: str) -> None:
    ours = EncoderLayer(D_MODEL, N_HEADS, D_FF, norm_order=norm_order, activation=activation).double()
    theirs = nn.TransformerEncoderLayer(
        D_MODEL, N_HEADS, D_FF, 0.0, activation, batch_first=True, norm_first=norm_order == "pre", dtype=torch.float64
    )
    x, mask = random_input(BATCH, TGT, D_MODEL), torch.rand(TGT, TGT) < 0.6
    mask |= torch.eye(TGT, dtype=torch.bool)
    compare_everything(
        parity,
        f"EncoderLayer, {norm_order}-norm",
        "nn.TransformerEncoderLayer",
        ours,
        theirs,
        lambda: ours(x, mask),
        lambda: theirs(x, src_mask=~mask),
        (x,),
    )


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_decoder_layer(parity, norm_order: str) -> None:
    ours = DecoderLayer(D_MODEL, N_HEADS, D_FF, norm_order=norm_order, activation="gelu").double()
    theirs = nn.TransformerDecoderLayer(
        D_MODEL, N_HEADS, D_FF, 0.0, "gelu", batch_first=True, norm_first=norm_order == "pre", dtype=torch.float64
    )
    x, memory = random_input(BATCH, TGT, D_MODEL), random_input(BATCH, SRC, D_MODEL)
    mask, memory_mask = causal_mask(TGT), torch.rand(TGT, SRC) < 0.7
    memory_mask[:, 0] = True
    compare_everything(
        parity,
        f"DecoderLayer, {norm_order}-norm",
        "nn.TransformerDecoderLayer",
        ours,
        theirs,
        lambda: ours(x, memory, mask, memory_mask),
        lambda: theirs(x, memory, tgt_mask=~mask, memory_mask=~memory_mask),
        (x, memory),
    )


def test_encoder_layer_without_mask_and_decoder_layer_without_masks_match_too(parity) -> None:
    x, memory = random_input(BATCH, TGT, D_MODEL), random_input(BATCH, SRC, D_MODEL)
    for ours, theirs, inputs in (
        (EncoderLayer, nn.TransformerEncoderLayer, (x,)),
        (DecoderLayer, nn.TransformerDecoderLayer, (x, memory)),
    ):
        layer = ours(D_MODEL, N_HEADS, D_FF).double()
        other = theirs(D_MODEL, N_HEADS, D_FF, 0.0, batch_first=True, norm_first=True, dtype=torch.float64)
        copy_from_torch(layer, other)
        parity(ours.__name__, f"nn.Transformer{ours.__name__}", "output", layer(*inputs), other(*inputs), 1e-10)


class Both(nn.Module):
    """An encoder and a decoder side by side, as nn.Transformer has them."""

    def __init__(self, norm_order: str) -> None:
        super().__init__()
        self.encoder = Encoder(3, D_MODEL, N_HEADS, D_FF, norm_order=norm_order)
        self.decoder = Decoder(2, D_MODEL, N_HEADS, D_FF, norm_order=norm_order)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_stacks_against_the_whole_transformer_with_padding(parity, norm_order: str) -> None:
    ours = Both(norm_order).double()
    theirs = nn.Transformer(
        D_MODEL, N_HEADS, 3, 2, D_FF, 0.0, batch_first=True, norm_first=norm_order == "pre", dtype=torch.float64
    )
    src, tgt = random_input(BATCH, SRC, D_MODEL), random_input(BATCH, TGT, D_MODEL)
    real = padding_mask(torch.tensor([[4, 5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 0, 0, 0]]))
    causal = causal_mask(TGT)
    compare_everything(
        parity,
        f"Encoder and Decoder, {norm_order}-norm",
        "nn.Transformer",
        ours,
        theirs,
        lambda: ours.decoder(tgt, ours.encoder(src, real), causal, real),
        lambda: theirs(
            src, tgt, tgt_mask=~causal, src_key_padding_mask=~real[:, 0, 0], memory_key_padding_mask=~real[:, 0, 0]
        ),
        (src, tgt),
    )
    encoder = Encoder(3, D_MODEL, N_HEADS, D_FF, 0.0, norm_order).double()
    copy_from_torch(encoder, theirs.encoder)
    parity("Encoder", "nn.TransformerEncoder", "output", encoder(src), theirs.encoder(src), 1e-10)
    decoder = Decoder(2, D_MODEL, N_HEADS, D_FF, 0.0, norm_order).double()
    copy_from_torch(decoder, theirs.decoder)
    parity("Decoder", "nn.TransformerDecoder", "output", decoder(tgt, src), theirs.decoder(tgt, src), 1e-10)


# Parity: positions


@pytest.mark.parametrize("d_model", [1, 6, 7])
def test_sinusoidal_positions_are_the_published_formula(parity, d_model: int) -> None:
    max_seq_len, start = 40, 9
    expected = [
        [
            (math.sin if column % 2 == 0 else math.cos)(pos / 10000 ** ((column - column % 2) / d_model))
            for column in range(d_model)
        ]
        for pos in range(max_seq_len)
    ]
    layer = SinusoidalPositions(d_model, max_seq_len)
    zeros = torch.zeros(BATCH, max_seq_len - start, d_model, dtype=torch.float64)
    table = torch.tensor(expected[start:], dtype=torch.float64).expand_as(zeros)
    parity("SinusoidalPositions", "Vaswani et al. 2017, section 3.5", "output", layer(zeros, start), table, 1e-12)
    single = layer(zeros.float(), start)
    parity("SinusoidalPositions", "Vaswani et al. 2017, section 3.5", "output", single, table, 1e-7)


def test_shifting_a_sinusoid_is_a_rotation_that_does_not_depend_on_the_position(parity) -> None:
    d_model, shift = 10, 6
    table = SinusoidalPositions(d_model, 30).table
    angles = position_angles(torch.tensor([shift]), d_model)
    backwards = rotate_pairs(table[:-shift], -angles)  # (sin, cos) pairs turn clockwise as the position grows
    parity("SinusoidalPositions", "shift as rotation", "invariant", backwards, table[shift:], 1e-10)


def huggingface_cos_sin(n_positions: int, d_head: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_angles(torch.arange(n_positions), d_head)
    doubled = torch.cat([angles, angles], dim=-1)[None]
    return doubled.cos(), doubled.sin()


def test_rotary_in_halves_against_llama(parity) -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    d_head, q, k = 6, random_input(BATCH, 3, TGT, 6), random_input(BATCH, 3, TGT, 6)
    angles = position_angles(torch.arange(TGT), d_head)
    expected = apply_rotary_pos_emb(q, k, *huggingface_cos_sin(TGT, d_head))
    actual = (rotate_halves(q, angles), rotate_halves(k, angles))
    parity("rotate_halves", "transformers Llama", "output", actual, expected, 1e-10)
    grads = [torch.autograd.grad(pair[0].sum() + pair[1].square().sum(), (q, k)) for pair in (actual, expected)]
    parity("rotate_halves", "transformers Llama", "gradient", *grads, 1e-10)
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, max_position_embeddings=64)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])  # float32
    ours = position_angles(torch.arange(64), d_head).repeat(1, 2)
    parity("position_angles", "transformers Llama", "output", (cos[0], sin[0]), (ours.cos(), ours.sin()), 1e-5)


def test_rotary_in_pairs_against_gptj(parity) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x = random_input(BATCH, TGT, N_HEADS, 6)  # GPT-J keeps the heads behind the positions
    angles = position_angles(torch.arange(TGT), 6)
    expected = apply_rotary_pos_emb(x, angles.sin()[None], angles.cos()[None]).transpose(1, 2)
    actual = rotate_pairs(x.transpose(1, 2), angles)
    parity("rotate_pairs", "transformers GPT-J", "output", actual, expected, 1e-10)
    grads = [torch.autograd.grad(out.pow(3).sum(), x)[0] for out in (actual, expected)]
    parity("rotate_pairs", "transformers GPT-J", "gradient", *grads, 1e-10)


def test_the_two_rotary_layouts_agree_only_after_the_weights_are_reordered(parity) -> None:
    pairs, halves = RotaryAttention(18, N_HEADS).double(), HalfRotaryAttention(18, N_HEADS).double()  # d_head 6 = 2 * 3
    shake(pairs)
    halves.load_state_dict(pairs.state_dict())
    x = random_input(BATCH, TGT, 18)
    assert (halves(x)[0] - pairs(x)[0]).abs().max() > 1e-3  # weights of the other layout load without any complaint
    for name in ("q_proj", "k_proj"):
        for part in ("weight", "bias"):
            source = getattr(getattr(pairs, name), part).data
            getattr(getattr(halves, name), part).data = pairs_to_halves(source, N_HEADS)
    parity("RotaryAttention", "HalfRotaryAttention", "exchange", halves(x), pairs(x), 1e-10)


@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_halves])
def test_rotary_scores_depend_on_the_distance_alone(parity, rotate) -> None:
    q, k = random_input(8), random_input(8)
    angles = position_angles(torch.arange(60), 8)
    scores = rotate(q.expand(60, 8), angles) @ rotate(k.expand(60, 8), angles).T
    parity("rotary positions", "shift by 17 positions", "invariant", scores[17:, 17:], scores[:-17, :-17], 1e-10)
    assert (scores[0, 1:] - scores[0, 0]).abs().max() > 1e-3  # and they do depend on it
    lengths = rotate(q.expand(60, 8), angles).norm(dim=-1)
    parity("rotary positions", "length of the vector", "invariant", lengths, q.norm().expand(60), 1e-10)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 50), (8, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_against_t5(parity, n_buckets: int, max_distance: int, bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(offsets, bidirectional, n_buckets, max_distance)
    actual = relative_buckets(offsets, n_buckets, max_distance, bidirectional)
    parity("relative_buckets", "transformers T5", "output", actual, expected, 0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_attention_against_t5(parity, bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    length, d_head = 40, 4  # long enough for the logarithmic buckets
    config = T5Config(d_model=D_MODEL, d_kv=d_head, num_heads=N_HEADS, dropout_rate=0.0, is_decoder=not bidirectional)
    config._attn_implementation = "eager"
    theirs = T5Attention(config, has_relative_attention_bias=True).double()
    ours = (RelativeAttention if bidirectional else CausalRelativeAttention)(D_MODEL, N_HEADS, use_bias=False).double()
    names = [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")]
    for name, other in [*names, ("relative_bias", "relative_attention_bias")]:
        getattr(ours, name).weight.data = torch.randn_like(getattr(theirs, other).weight)
        getattr(theirs, other).weight.data = getattr(ours, name).weight.data.clone()
    ours.q_proj.weight.data *= math.sqrt(d_head)  # T5 leaves out 1 / sqrt(d_head)
    x = random_input(BATCH, length, D_MODEL)
    mask = None if bidirectional else causal_mask(length)
    blocked = None if mask is None else torch.zeros(1, 1, length, length).double().masked_fill(~mask, -math.inf)
    expected, _, _ = theirs(x, mask=blocked)
    actual, _ = ours(x, mask=mask)
    parity(type(ours).__name__, "transformers T5Attention", "output", actual, expected, 1e-10)
    our_grads = torch.autograd.grad(actual.square().sum(), (x, ours.relative_bias.weight, ours.k_proj.weight))
    wanted = (x, theirs.relative_attention_bias.weight, theirs.k.weight)
    their_grads = torch.autograd.grad(expected.square().sum(), wanted)
    parity(type(ours).__name__, "transformers T5Attention", "gradient", our_grads, their_grads, 1e-8)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes_against_bloom(parity, n_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), n_heads, torch.float32)  # (heads, 1, key): slope * key position
    parity("alibi_slopes", "transformers Bloom", "output", alibi_slopes(n_heads), theirs[:, 0, 1], 1e-6)


def test_alibi_slopes_are_those_of_the_paper(parity) -> None:
    parity(
        "alibi_slopes", "Press et al. 2022, section 3", "output", alibi_slopes(8), [2.0**-i for i in range(1, 9)], 1e-12
    )
    sixteen = [2 ** (-i / 2) for i in range(1, 17)]
    parity("alibi_slopes", "Press et al. 2022, section 3", "output", alibi_slopes(16), sixteen, 1e-12)


def test_alibi_attention_weights_against_bloom_bias(parity) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    layer, x = shake(AlibiAttention(D_MODEL, N_HEADS)).double(), random_input(BATCH, TGT, D_MODEL)
    bias = build_alibi_tensor(torch.ones(1, TGT), N_HEADS, torch.float64)  # same in every row: softmax cannot tell
    plain = MultiHeadAttention(D_MODEL, N_HEADS).double()
    plain.load_state_dict(layer.state_dict())
    k, v = plain.keys_values(x)
    expected = plain.attend(x, k, v, causal_mask(TGT), bias)
    parity("AlibiAttention", "transformers Bloom", "output", layer(x, mask=causal_mask(TGT)), expected, 1e-7)


@pytest.mark.parametrize("cls", [AlibiAttention, RotaryAttention])
def test_without_a_mask_the_future_is_as_far_as_the_past(parity, cls) -> None:
    layer, token = shake(cls(D_MODEL, N_HEADS)).double(), random_input(1, 1, D_MODEL)
    layer.q_proj.load_state_dict(layer.k_proj.state_dict())  # a score that does not change if query and key swap
    weights = layer(token.expand(1, TGT, D_MODEL))[1]  # equal tokens: only positions can tell keys apart
    parity(cls.__name__, "reversed sequence", "invariant", weights.flip(-1, -2), weights, 1e-10)
    assert (weights - 1 / TGT).abs().max() > 1e-3
    assert (weights[0, :, 0].argmax(dim=-1) == 0).all()  # nearest first


def test_position_attention_adds_to_a_given_bias(parity) -> None:
    x, bias = random_input(BATCH, TGT, D_MODEL), torch.randn(N_HEADS, TGT, TGT).double()
    blocking = torch.zeros_like(bias).masked_fill(~causal_mask(TGT), -math.inf)
    for cls in (RotaryAttention, AlibiAttention, RelativeAttention):
        layer = shake(cls(D_MODEL, N_HEADS)).double()
        k, v = layer.keys_values(x)
        by_bias, by_mask = layer.attend(x, k, v, bias=blocking), layer(x, mask=causal_mask(TGT))
        parity(cls.__name__, "a bias of -inf as the mask", "invariant", by_bias, by_mask, 1e-10)
        assert (layer.attend(x, k, v, bias=bias)[1] - layer(x)[1]).abs().max() > 1e-3


def test_relative_buckets_and_rotations_refuse_what_has_no_meaning() -> None:
    offsets = torch.arange(-3, 4)
    for arguments, message in (
        ((3, 128, True), r"n_buckets=3 must be >= 4"),
        ((1, 128, False), r"n_buckets=1 must be >= 2"),
        ((32, 8, True), r"max_distance=8 > 8, the number"),
        ((32, 16, False), r"max_distance=16 > 16"),
    ):
        with pytest.raises(ValueError, match=message):
            relative_buckets(offsets, *arguments)
    layer, k = RotaryAttention(D_MODEL, N_HEADS), torch.randn(BATCH, N_HEADS, TGT - 1, 4)
    with pytest.raises(ValueError, match="5 queries need as many keys at least, got 4"):  # would turn all alike
        layer.attend(torch.randn(BATCH, TGT, D_MODEL), k, k)


# Parity: counters


def sizes() -> list[TransformerSize]:
    return [
        TransformerSize(D_MODEL, N_HEADS, D_FF, 3, 2),
        TransformerSize(D_MODEL, N_HEADS, D_FF, 4, 0),
        VASWANI_BASE,
        VASWANI_BIG,
    ]


@pytest.mark.parametrize("size", sizes(), ids=["small", "encoder", "base", "big"])
def test_counts_of_stacks_on_the_meta_device(parity, size: TransformerSize) -> None:
    batch_size, src_len, tgt_len = 2, SRC, TGT
    arguments = (size.d_model, size.n_heads, size.d_ff)
    with torch.device("meta"):
        encoder, decoder = Encoder(size.n_encoder_layers, *arguments), Decoder(size.n_decoder_layers, *arguments)
        lm_head = nn.Linear(size.d_model, size.vocab_size, bias=False)
        src = torch.empty(batch_size, src_len, size.d_model)
        tgt = torch.empty(batch_size, tgt_len, size.d_model)
    stacks = nn.ModuleList([encoder, decoder, lm_head] if size.n_decoder_layers else [encoder, lm_head])
    counted = count_parameters(stacks)["total"]
    parity("transformer_parameters", "instances on meta", "output", transformer_parameters(size)["total"], counted, 0)
    terms = transformer_flops(size, batch_size, src_len, tgt_len)
    with FlopCounterMode(display=False) as theirs, MatmulCounter() as ours:
        memory = encoder(src)
        lm_head(decoder(tgt, memory) if size.n_decoder_layers else memory)
    parity("transformer_flops", "torch.utils.flop_counter", "output", terms["total"], theirs.get_total_flops(), 0)
    parity("MatmulCounter", "torch.utils.flop_counter", "output", ours.flops, theirs.get_total_flops(), 0)


def test_backward_takes_twice_the_flops_of_forward(parity) -> None:
    size = TransformerSize(D_MODEL, N_HEADS, D_FF, 2)
    encoder, x = Encoder(2, D_MODEL, N_HEADS, D_FF), torch.randn(BATCH, TGT, D_MODEL, requires_grad=True)
    with FlopCounterMode(display=False) as theirs, MatmulCounter() as ours:
        encoder(x, causal_mask(TGT)).sum().backward()
    expected = 3 * transformer_flops(size, BATCH, TGT)["total"]
    parity("transformer_flops", "torch.utils.flop_counter", "output", expected, theirs.get_total_flops(), 0)
    parity("MatmulCounter", "torch.utils.flop_counter", "output", ours.flops, theirs.get_total_flops(), 0)


def test_published_parameter_counts() -> None:
    base, big = transformer_parameters(VASWANI_BASE), transformer_parameters(VASWANI_BIG)
    assert base["embeddings"] == 37_000 * 512  # the shared matrix is part of the published numbers
    assert base["total"] == pytest.approx(65e6, rel=0.03)
    assert big["total"] == pytest.approx(213e6, rel=0.01)
    implied = [
        (published - (terms["total"] - terms["embeddings"])) / width
        for published, terms, width in ((65e6, base, 512), (213e6, big, 1024))
    ]
    assert implied[0] > 39_000 and implied[1] < 37_000  # no one vocabulary size gives both


@pytest.mark.parametrize("positions", list(POSITIONS))
def test_counts_of_language_models(parity, positions: str) -> None:
    model = CausalTransformer(dataclasses.replace(TINY, positions=positions), VOCAB)
    size, token_ids = TransformerSize.of(model), torch.randint(4, VOCAB, (BATCH, TGT))
    extra = TINY.n_layers * 32 * N_HEADS if positions == "relative" else 0  # learned numbers of each bucket and head
    counts = count_parameters(model)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["encoder.blocks.ffn"] == transformer_parameters(size)["feed-forward"]
    formula = transformer_parameters(size)["total"] + extra
    parity("transformer_parameters", "CausalTransformer", "output", formula, counts["total"], 0)
    with torch.device("meta"), FlopCounterMode(display=False) as on_meta:
        CausalTransformer(model.config, VOCAB)(torch.zeros(BATCH, TGT, dtype=torch.long))
    with FlopCounterMode(display=False) as theirs:
        model(token_ids)
    assert on_meta.get_total_flops() == theirs.get_total_flops()
    flops = transformer_flops(size, BATCH, TGT)["total"]
    parity("transformer_flops", "torch.utils.flop_counter", "output", flops, theirs.get_total_flops(), 0)


def test_gpt2_small_has_the_parameters_of_the_released_model(parity) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config())
    total = transformer_parameters(topic.GPT2_SMALL)["total"]
    parity("transformer_parameters", "transformers GPT-2", "output", total, theirs.num_parameters(), 0)
    built = count_parameters(build_on_meta(topic.GPT2_SMALL))["total"]
    parity("transformer_parameters", "our modules on meta", "output", total, built, 0)


def test_a_shared_parameter_counts_once() -> None:
    module = nn.ModuleDict({"one": nn.Linear(3, 5, bias=False), "two": nn.Linear(3, 5, bias=False)})
    assert count_parameters(module) == {"one": 15, "two": 15, "total": 30}
    module["two"].weight = module["one"].weight
    assert count_parameters(module) == {"one": 15, "total": 15}


@pytest.mark.parametrize(("batch", "length"), [(2, 9), (3, 5)])
def test_memory_formulas_equal_what_is_really_kept(parity, batch: int, length: int) -> None:
    size = TransformerSize(D_MODEL, N_HEADS, D_FF, 2)
    encoder, x = Encoder(2, D_MODEL, N_HEADS, D_FF), torch.randn(batch, length, D_MODEL, requires_grad=True)
    measured = saved_bytes(encoder, x, causal_mask(length))
    masks = 2 * length  # a byte for each bool: which rows have a key, in two layers; the mask itself is the caller's
    formula = activation_bytes(size, batch, length)["total"] + masks
    parity("activation_bytes", "saved tensors of autograd", "output", formula, measured, 0)
    half = saved_bytes(encoder.bfloat16(), x.detach().bfloat16().requires_grad_(), causal_mask(length))
    formula = activation_bytes(size, batch, length, bytes_per_number=2)["total"] + masks
    parity("activation_bytes, bfloat16", "saved tensors of autograd", "output", formula, half, 0)
    encoder.float()
    model, token_ids = CausalTransformer(TINY, VOCAB), torch.randint(4, VOCAB, (batch, length))
    caches = model.new_caches()
    model(token_ids, caches)
    held = sum(cache.n_bytes for cache in caches)
    formula = kv_cache_bytes(TransformerSize.of(model), batch, length)
    parity("kv_cache_bytes", "KeyValueCache", "output", formula, held, 0)
    decoder, caches = Decoder(3, D_MODEL, N_HEADS, D_FF), [KeyValueCache() for _ in range(3)]
    decoder(x, torch.randn(batch, SRC, D_MODEL), causal_mask(length), None, caches)
    formula = kv_cache_bytes(TransformerSize(D_MODEL, N_HEADS, D_FF, 1, 3), batch, length, SRC)
    parity("kv_cache_bytes", "KeyValueCache", "output", formula, sum(cache.n_bytes for cache in caches), 0)


# Parity: topic 01's NumPy engine


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_numpy_engine_computes_the_same_gradients(parity, activation: str) -> None:
    config = dataclasses.replace(TINY, n_layers=1, positions="learned", activation=activation)
    model = shake(CausalTransformer(config, VOCAB)).double()
    inputs, targets = torch.randint(VOCAB, (BATCH, TGT)), torch.randint(VOCAB, (BATCH, TGT))
    targets[0, 1] = IGNORE
    ours, logits = NumpyTransformer(model), model(inputs)
    our_logits = ours(inputs.numpy())
    parity("NumpyTransformer", "CausalTransformer in torch", "output", our_logits.data, logits, 1e-10)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    prerequisites.cross_entropy(our_logits, targets.numpy(), IGNORE).backward()
    our_grads = {name: weight.grad for name, weight in ours.weights.items()}
    their_grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    parity("NumpyTransformer", "CausalTransformer in torch", "gradient", our_grads, their_grads, 1e-10)


# Invariants


@pytest.mark.parametrize("positions", list(POSITIONS))
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_language_model_cached_equals_uncached_and_ignores_the_future(parity, positions: str, norm_order: str) -> None:
    config = dataclasses.replace(TINY, positions=positions, norm_order=norm_order)
    model, token_ids = shake(CausalTransformer(config, VOCAB)).double(), torch.randint(4, VOCAB, (BATCH, 9))
    whole = model(token_ids)
    caches, parts = model.new_caches(), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 9)):  # several positions at once, and one by one
        parts.append(model(token_ids[:, start:stop], caches))
        assert len(caches[0]) == stop
    parity(f"CausalTransformer, {positions}", "cached = uncached", "invariant", torch.cat(parts, dim=1), whole, 1e-10)
    changed = token_ids.clone()
    changed[:, 6:] = 4 + (changed[:, 6:] - 3) % (VOCAB - 4)
    after = model(changed)
    parity(f"CausalTransformer, {positions}", "the future does not count", "invariant", after[:, :6], whole[:, :6], 0)
    assert (after[:, 6:] - whole[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_decoder_cached_equals_uncached(parity, norm_order: str) -> None:
    decoder = shake(Decoder(2, D_MODEL, N_HEADS, D_FF, norm_order=norm_order)).double()
    x, memory = random_input(BATCH, TGT, D_MODEL), random_input(BATCH, SRC, D_MODEL)
    memory_mask = torch.tensor([True] * (SRC - 2) + [False] * 2)[None]
    whole = decoder(x, memory, causal_mask(TGT), memory_mask)
    caches, parts = [KeyValueCache() for _ in decoder.blocks], []
    assert [len(cache) for cache in caches] == [0, 0]
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        mask = causal_mask(stop - start, stop)
        parts.append(decoder(x[:, start:stop], memory if start == 0 else None, mask, memory_mask, caches))
    parity("Decoder", "cached = uncached", "invariant", torch.cat(parts, dim=1), whole, 1e-10)
    assert [len(cache) for cache in caches] == [TGT, TGT]


def test_the_memory_is_projected_once() -> None:
    layer, cache, calls = DecoderLayer(D_MODEL, N_HEADS, D_FF), KeyValueCache(), []
    layer.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        layer(torch.randn(BATCH, 1, D_MODEL), torch.randn(BATCH, SRC, D_MODEL), cache=cache)
    assert len(calls) == 1 and len(cache) == 4


def test_selecting_cache_rows_equals_selecting_sequences(parity) -> None:
    layer, rows = shake(DecoderLayer(D_MODEL, N_HEADS, D_FF)).double(), [1, 0, 1, 1]
    x, memory = random_input(BATCH, TGT, D_MODEL), random_input(BATCH, SRC, D_MODEL)
    cache = KeyValueCache()
    cache.select(rows)  # nothing to select yet
    layer(x[:, :3], memory, causal_mask(3), cache=cache)
    cache.select(torch.tensor(rows))
    continued = torch.randn(len(rows), 2, D_MODEL).double()
    actual = layer(continued, memory[rows], causal_mask(2, 5), cache=cache)
    expected = layer(torch.cat([x[rows, :3], continued], dim=1), memory[rows], causal_mask(5))[:, 3:]
    parity("KeyValueCache.select", "selected sequences", "invariant", actual, expected, 1e-10)


def test_padding_does_not_change_an_encoder(parity) -> None:
    for norm_order in ("pre", "post"):
        encoder = shake(Encoder(2, D_MODEL, N_HEADS, D_FF, norm_order=norm_order)).double()
        token_ids = torch.tensor([[5, 6, 7, 8, 9, 4, 4], [5, 6, 7, 8, 0, 0, 0]])
        x = random_input(VOCAB, D_MODEL)[token_ids]
        padded = encoder(x, padding_mask(token_ids))
        parity("Encoder", "padded = unpadded", "invariant", padded[1:, :4], encoder(x[1:, :4]), 1e-10)


@pytest.mark.parametrize("cls", [RotaryAttention, HalfRotaryAttention, RelativeAttention, AlibiAttention])
def test_position_attention_ignores_where_a_sequence_starts(parity, cls) -> None:
    layer = shake(cls(D_MODEL, N_HEADS)).double()
    x, before = random_input(BATCH, TGT, D_MODEL), random_input(BATCH, 4, D_MODEL)
    mask = causal_mask(TGT + 4)
    mask[:, :4] = torch.eye(TGT + 4, 4, dtype=torch.bool)  # nobody looks at the four positions in front
    shifted = layer(torch.cat([before, x], dim=1), mask=mask)[0][:, 4:]
    parity(cls.__name__, "shift of the whole sequence", "invariant", shifted, layer(x, mask=causal_mask(TGT))[0], 1e-10)


def test_without_positions_the_order_of_the_past_is_invisible(parity) -> None:
    x, order = random_input(1, TGT, D_MODEL), [2, 0, 3, 1, 4]
    encoder = shake(Encoder(1, D_MODEL, N_HEADS, D_FF)).double()
    last, again = encoder(x, causal_mask(TGT))[:, -1], encoder(x[:, order], causal_mask(TGT))[:, -1]
    parity("Encoder without positions", "permuted past", "invariant", again, last, 1e-10)
    for cls in (RotaryAttention, AlibiAttention, CausalRelativeAttention):
        encoder.blocks[0].self_attn = shake(cls(D_MODEL, N_HEADS)).double()
        assert (encoder(x, causal_mask(TGT)) - encoder(x[:, order], causal_mask(TGT)))[:, -1].abs().max() > 1e-4


def test_pre_norm_leaves_the_stream_alone_and_post_norm_does_not() -> None:
    """The trap of two names for one formula: with silent sub-layers pre-norm is the identity, post-norm normalises."""
    x = 3 * random_input(BATCH, TGT, D_MODEL) + 1
    for norm_order, expected in (("pre", x), ("post", F.layer_norm(F.layer_norm(x, (D_MODEL,)), (D_MODEL,)))):
        layer = EncoderLayer(D_MODEL, N_HEADS, D_FF, norm_order=norm_order).double()
        silence(layer.self_attn)
        silence(layer.ffn)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_identity_start(parity) -> None:
    model, token_ids = CausalTransformer(TINY, VOCAB), torch.randint(4, VOCAB, (BATCH, TGT))
    topic.start_as_identity(model)
    x = model.token_emb(token_ids)
    for block in model.encoder.blocks:
        parity("start_as_identity", "identity", "invariant", block(x), x, 0.0)


def test_layer_norm_traps() -> None:
    """The variance is the biased one, and eps stands inside the root."""
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    output = LayerNorm(2).double()(x)
    assert output[0, 1].item() == pytest.approx(1 / math.sqrt(1 + 1e-5), abs=1e-12)  # unbiased would give 0.7071
    tiny = LayerNorm(2, norm_eps=1e-5).double()(torch.tensor([[-1e-3, 1e-3]], dtype=torch.float64))
    assert tiny[0, 1].item() == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-5), abs=1e-12)  # outside would give 0.990


@pytest.mark.parametrize("cls", [RotaryAttention, RelativeAttention, AlibiAttention])
def test_a_mask_for_each_sequence_is_never_read_as_one_for_each_head(cls) -> None:
    layer, x = cls(D_MODEL, 2), torch.randn(2, TGT, D_MODEL)
    with pytest.raises(ValueError, match=r"use mask\[:, None\] for one per sequence"):
        layer(x, mask=torch.ones(2, TGT, TGT, dtype=torch.bool))


def test_what_would_broadcast_or_be_cut_is_named() -> None:
    x, model = torch.randn(BATCH, TGT, D_MODEL), CausalTransformer(TINY, VOCAB)
    for cls in (topic.SinusoidalPositions, topic.LearnedPositions, topic.NoPositions):
        for wrong, start in ((x[..., :1], 0), (x[0], 0), (x, -TGT - 1)):
            with pytest.raises(ValueError, match=r"expected a sequence \(batch, seq, d_model="):
                cls(D_MODEL, 2 * TGT)(wrong, start)
    for rotate in (rotate_pairs, topic.rotate_halves):
        for wrong, angles in (
            (x[..., :3], (TGT, 1)),
            (x, (TGT, 1)),
            (x, (TGT + 1, D_MODEL // 2)),
            (x.long(), (TGT, 6)),
        ):
            with pytest.raises(ValueError, match=r"angles \(seq, d_head / 2\), got torch"):
                rotate(wrong, torch.zeros(angles))
    with pytest.raises(ValueError, match=f"got 0 caches for {TINY.n_layers} blocks"):  # [] is not "without a cache"
        model(torch.zeros(1, 2, dtype=torch.long), [])
    with pytest.raises(TypeError, match="expected floating-point numbers, got torch.int64"):
        LayerNorm(D_MODEL)(x.long())
    cache = KeyValueCache()
    cache.append(x[:, None], x[:, None])
    for rows, kind, message in (
        ([BATCH], ValueError, f"rows must be in 0..{BATCH - 1}, got"),
        ([-1], ValueError, "rows must be in"),
        ([True], TypeError, "rows must be integers, got torch.bool; use mask.nonzero"),
    ):
        with pytest.raises(kind, match=message):
            cache.select(rows)
    cache.select([])
    assert len(cache.own[0]) == 0
    for call, message in (
        (lambda: topic.relative_buckets(torch.tensor([1.5])), "offsets must be integers, got torch.float32"),
        (lambda: topic.alibi_slopes(2.0), r"n_heads must be an integer, got 2\.0"),
        (lambda: Encoder(1.5, D_MODEL, N_HEADS, D_FF), r"n_layers must be an integer, got 1\.5"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for call, message in (
        (lambda: Encoder(-1, D_MODEL, N_HEADS, D_FF), "n_layers must be >= 0, got -1"),
        (lambda: topic.position_angles(torch.arange(3), 4, 0.0), "theta must be > 0, got 0"),
        (lambda: topic.copy_from_torch(Encoder(1, D_MODEL, N_HEADS, D_FF), nn.Linear(2, 2)), "only one of Encoder and"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.lm_head.weight.data[:] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="largest logit of a row must be finite"):
            model.generate(torch.zeros(1, 2, dtype=torch.long), 2, temperature)
    assert torch.equal(topic.alibi_slopes(np.int64(6)), topic.alibi_slopes(6))


def test_rows_that_may_attend_nowhere_stay_finite() -> None:
    layer, x = EncoderLayer(D_MODEL, N_HEADS, D_FF), torch.randn(BATCH, TGT, D_MODEL, requires_grad=True)
    mask = torch.zeros(TGT, TGT, dtype=torch.bool)
    output = layer(x, mask)
    output.sum().backward()
    assert output.isfinite().all() and x.grad.isfinite().all()


def test_shape_comments_are_true(checked_shapes, tmp_path) -> None:
    config = dataclasses.replace(TINY, n_layers=1)
    with checked_shapes(topic) as checked:
        for positions in POSITIONS:
            model = CausalTransformer(dataclasses.replace(config, positions=positions), VOCAB)
            model.generate(torch.randint(4, VOCAB, (BATCH, TGT)), 3)
        cache, decoder = KeyValueCache(), Decoder(1, D_MODEL, N_HEADS, D_FF)
        for _ in range(2):
            decoder(torch.randn(BATCH, 1, D_MODEL), torch.randn(BATCH, SRC, D_MODEL), caches=[cache])
        x = torch.randn(BATCH, TGT, D_MODEL)
        layer_norm_backward(x, torch.ones(D_MODEL), x)
        model = CausalTransformer(dataclasses.replace(config, positions="learned"), VOCAB)
        token_ids = torch.randint(4, VOCAB, (BATCH, TGT))
        NumpyTransformer(model)(token_ids.numpy())
        topic.train_language_model(config_for_world(), dataclasses.replace(SHORT, max_steps=1), RUN)
    source = Path(topic.__file__).read_text(encoding="utf-8").splitlines()
    claimed = {number for number, line in enumerate(source, 1) if line.rstrip().endswith(")") and "  # (" in line}
    ran = {int(place.rsplit(":", 1)[1]) for place in checked}
    assert claimed <= ran, f"shape comments that no line of this test runs: {sorted(claimed - ran)}"


def config_for_world(**changes) -> ModelConfig:
    return ModelConfig(**{"max_seq_len": 96, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, **changes})


# Worked by hand


def test_hand_worked_layer() -> None:
    """One position, d_model 2: normalise (1, 3), add the sub-layer, in both orders."""
    x = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    norm, double = LayerNorm(2, norm_eps=0.0).double(), lambda y: 2 * y
    assert norm(x).tolist() == [[[-1.0, 1.0]]]  # mean 2, variance 1
    pre, post = (EncoderLayer(2, 1, 1, norm_order=order) for order in ("pre", "post"))
    assert pre.residual(x, norm, double).tolist() == [[[-1.0, 5.0]]]  # (1, 3) + 2 (-1, 1)
    assert post.residual(x, norm, double).tolist() == [[[-1.0, 1.0]]]  # (1, 3) + 2 (1, 3) = (3, 9), normalised
    quarter = torch.tensor([[math.pi / 2]], dtype=torch.float64)
    turned = rotate_pairs(torch.tensor([[1.0, 2.0]], dtype=torch.float64), quarter)
    torch.testing.assert_close(turned, torch.tensor([[-2.0, 1.0]], dtype=torch.float64))
    grads = layer_norm_backward(
        torch.tensor([[1.0, 3.0]]).double(), torch.tensor([2.0, 5.0]).double(), torch.tensor([[1.0, 1.0]]).double(), 0.0
    )
    assert [grad.tolist() for grad in grads] == [[[0.0, 0.0]], [-1.0, 1.0], [1.0, 1.0]]  # width 2: only signs are left


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EncoderLayer(10, 3, 20), "d_model=10 is not divisible by n_heads=3"),
        (lambda: RotaryAttention(9, 3), r"d_head=3 \(d_model=9 / n_heads=3\) must be even"),
        (lambda: EncoderLayer(12, 3, 20, norm_order="prenorm"), "unknown norm_order 'prenorm'; did you mean 'pre'"),
        (lambda: DecoderLayer(12, 3, 20, norm_order="both"), "unknown norm_order 'both'; .*choose from pre, post"),
        (lambda: FeedForward(12, 20, activation="gleu"), "unknown activation 'gleu'; did you mean 'gelu'"),
        (lambda: ModelConfig(positions="rotery"), "unknown positions 'rotery'; did you mean 'rotary'"),
        (lambda: ModelConfig(positions="xyz"), "choose from sinusoidal, learned, rotary, alibi, relative, none"),
        (lambda: ModelConfig(n_layers=0), "n_layers must be finite and >= 1, got 0"),
        (lambda: ModelConfig(dropout=1.0), "dropout must be finite and >= 0 and < 1, got 1.0"),
        (lambda: TrainConfig(learning_rate=math.nan), "learning_rate must be finite and > 0, got nan"),
        (lambda: TrainConfig(n_documents=1), "n_documents must be finite and >= 2, got 1"),
        (
            lambda: CausalTransformer(ModelConfig(d_model=10, n_heads=3), VOCAB),
            "d_model=10 is not divisible by n_heads=3",
        ),
        (lambda: SinusoidalPositions(6, 16)(torch.zeros(1, 40, 6)), "sequence length 40 exceeds max_seq_len 16"),
        (lambda: LearnedPositions(6, 16)(torch.zeros(1, 40, 6)), "sequence length 40 exceeds max_seq_len 16"),
        (lambda: NoPositions(6, 16)(torch.zeros(1, 40, 6)), "sequence length 40 exceeds max_seq_len 16"),
        (
            lambda: LearnedPositions(6, 16)(torch.zeros(1, 4, 6), 13),
            "length 4 after 13 cached positions exceeds max_seq_len 16",
        ),
        (lambda: tiny_model()(torch.full((1, 3), VOCAB)), rf"token id {VOCAB} >= vocab_size {VOCAB} at \[0, 0\]"),
        (lambda: tiny_model()(torch.full((1, 17), 5)), "sequence length 17 exceeds max_seq_len 16"),
        (lambda: LayerNorm(1)(torch.zeros(2, 6)), r"expected vectors of width 1, got a tensor of shape \(2, 6\)"),
        (lambda: alibi_slopes(0), "n_heads must be >= 1, got 0"),
        (lambda: tiny_model()(torch.full((3,), 5)), r"token_ids must have shape \(batch, seq\), got \(3,\)"),
        (lambda: tiny_model()(torch.full((1, 3), 5), [KeyValueCache()]), "got 1 caches for 2 blocks; build one"),
        (lambda: reuse(tiny_model()), "the cache holds 2 sequences, got 3; select its rows or start a new one"),
        (
            lambda: tiny_model().generate(torch.full((1, 0), 5), 4),
            r"token_ids must have shape \(batch, seq >= 1\), got \(1, 0\); begin with <bos>",
        ),
        (lambda: tiny_model().generate(torch.full((1, 3), 5), -1), "max_new_tokens and temperature must be >= 0"),
        (lambda: tiny_model().generate(torch.full((1, 3), 5), 2, temperature=math.nan), "finite, got 2, nan"),
        (lambda: tiny_model().generate(torch.full((1, 3), 5), 14), "sequence length 17 exceeds max_seq_len 16"),
        (lambda: NumpyTransformer(tiny_model()), "needs norm_order 'pre', positions 'learned' and dropout 0"),
        (
            lambda: copy_from_torch(EncoderLayer(12, 3, 20), nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)),
            "norm_order='pre' does not fit norm_first=False",
        ),
        (
            lambda: copy_to_torch(
                EncoderLayer(9, 3, 5), nn.TransformerEncoderLayer(9, 3, 5, norm_first=True, activation="gelu")
            ),
            "activation='relu' does not fit gelu",
        ),
        (lambda: copy_from_torch(encoder_layer(), peer(12, 4, 20)), "n_heads is 3 in ours and 4 in PyTorch's layer"),
        (lambda: copy_from_torch(encoder_layer(), peer(activation=F.silu)), "activation='relu' does not fit silu"),
        (
            lambda: copy_from_torch(encoder_layer("gelu"), peer(activation=nn.GELU("tanh"))),
            r"'gelu' does not fit GELU\(approximate='tanh'\)",
        ),
        (lambda: copy_from_torch(encoder_layer(), peer(layer_norm_eps=1e-3)), "norm_eps=1e-05 does not fit eps=0.001"),
        (lambda: copy_from_torch(encoder_layer(), peer(bias=False)), "use_bias is True in ours and False"),
        (
            lambda: copy_from_torch(DecoderLayer(12, 3, 20), peer()),
            "DecoderLayer does not fit TransformerEncoderLayer",
        ),
        (
            lambda: copy_to_torch(nn.Linear(2, 3), nn.Linear(2, 3, bias=False)),
            "only one of Linear and Linear has a bias",
        ),
        (
            lambda: copy_to_torch(LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)),
            "only one of LayerNorm and LayerNorm has a weight",
        ),
        (lambda: copy_from_torch(nn.Linear(2, 3), nn.GRU(2, 3)), "no layer of this topic corresponds to GRU"),
        (lambda: copy_from_torch(nn.Linear(2, 3), nn.Linear(2, 1)), r"weights of shape \(1, 2\) do not fit \(3, 2\)"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def tiny_model() -> CausalTransformer:
    return CausalTransformer(TINY, VOCAB)


def reuse(model: CausalTransformer) -> None:
    """Give the caches of two sequences to three."""
    caches = model.new_caches()
    for batch_size in (2, 3):
        model(torch.full((batch_size, 4), 5), caches)


def encoder_layer(activation: str = "relu") -> EncoderLayer:
    return EncoderLayer(12, 3, 20, activation=activation)


def peer(d_model: int = 12, n_heads: int = 3, d_ff: int = 20, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(d_model, n_heads, d_ff, batch_first=True, norm_first=True, **options)


def test_stacks_of_another_depth_are_refused() -> None:
    theirs = nn.Transformer(12, 3, 2, 2, 20, 0.0, batch_first=True, norm_first=True)
    with pytest.raises(ValueError, match="need 3 layers and a last norm, got 2"):
        copy_from_torch(Encoder(3, 12, 3, 20), theirs.encoder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d-model", "10", "--n-heads", "3"], "d_model=10 is not divisible by n_heads=3"),
        (["--positions", "rotry"], "did you mean 'rotary'"),
        (["--max-seq-len", "99", "--seq-len", "100"], "sequence length 100 exceeds max_seq_len 99"),
        (["--max-seq-len", "64", "--seq-len", "64"], "exceeds max_seq_len 64"),  # the longest held-out document does
        (["--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
    ],
)
def test_command_line_reports_a_mistake_in_one_line(flags, message: str, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        topic.main(["demo", "--device", "cpu", "--max-steps", "1", "--out", str(tmp_path), *flags])
    output = capsys.readouterr().err
    errors = [line for line in output.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert "train:" not in output  # refused before the training, not after it


# Learning


@pytest.mark.parametrize("positions", list(POSITIONS))
def test_loss_at_the_start_is_ln_v_and_one_batch_can_be_overfitted(positions: str) -> None:
    config = dataclasses.replace(TINY, positions=positions, d_model=24, activation="relu")
    model = CausalTransformer(config, VOCAB)
    token_ids = torch.randint(4, VOCAB, (4, 13))
    batch = (token_ids[:, :-1], token_ids[:, 1:])
    losses = topic.fit(model, iter([batch] * 80), TrainConfig(max_steps=80, warmup_steps=5, learning_rate=3e-2))
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.15)
    assert losses[-1] < 0.3  # the first token of each row is given; the rest can be learned by heart


def test_demo_beats_chance_and_writes_a_figure(capsys, tmp_path) -> None:
    flags = "--max-steps 40 --warmup-steps 5 --d-model 32 --n-layers 1 --d-ff 64 --learning-rate 3e-2 --n-documents 40"
    topic.main(["demo", *flags.split(), "--device", "cpu", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    uniform = float(output.split("uniform guessing: ")[1].split(")")[0])
    loss = float(output.split("held-out loss ")[1].split()[0])
    gap = float(output.split("per token: ")[1].split()[0])
    floor = float(output.split("entropy floor ")[1].split()[0])
    assert uniform == pytest.approx(math.log(len(World().vocabulary())), abs=1e-3)
    assert 0 < gap == pytest.approx(loss - floor, abs=2e-4)
    assert loss < 0.6 * uniform and 0.4 < floor < 0.8
    assert (tmp_path / "loss.svg").stat().st_size > 1000


def test_training_stops_at_the_first_loss_that_is_not_finite(capsys, tmp_path) -> None:
    flags = "demo --learning-rate 1e10 --max-steps 30 --d-model 8 --n-layers 1 --n-heads 2 --d-ff 8 --n-documents 5"
    with pytest.raises(SystemExit) as stop:
        topic.main([*flags.split(), "--device", "cpu", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(r"the loss is (nan|inf) at step \d+; lower --learning-rate or", error)
    model, batch = tiny_model(), (torch.randint(4, VOCAB, (BATCH, TGT)), torch.randint(4, VOCAB, (BATCH, TGT)))
    model.lm_head.weight.data.fill_(math.nan)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        topic.fit(model, iter([batch]), TrainConfig(max_steps=1))
    for parameter, kept in zip(model.parameters(), before, strict=True):  # stopped before the step, not after it
        torch.testing.assert_close(parameter, kept, rtol=0, atol=0, equal_nan=True)


def test_bench_reports_a_ratio(capsys) -> None:
    topic.main("bench --n-repeats 2 --batch-size 2 --seq-len 8 --d-model 16 --device cpu".split())
    assert 0.01 < float(capsys.readouterr().out.split("nn.TransformerEncoder's: ")[1].split("x the speed")[0]) < 100


def test_training_is_reproducible() -> None:
    first, second = (topic.train_language_model(config_for_world(), SHORT, RUN) for _ in range(2))
    assert first.losses == second.losses and first.gap == second.gap
    other = topic.train_language_model(config_for_world(), SHORT, dataclasses.replace(RUN, seed=1))
    assert other.losses != first.losses
    assert not torch.equal(next(topic.tiny_world_batches(SHORT, 0))[0], next(topic.tiny_world_batches(SHORT, 1))[0])


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(max_steps=90, warmup_steps=10, learning_rate=0.5, min_lr_ratio=0.1)
    rates = [topic.learning_rate_at(step, config) for step in range(91)]
    assert rates[0] == 0.05 and rates[9] == rates[10] == 0.5 and rates[90] == pytest.approx(0.05)
    assert rates[50] == pytest.approx(0.275)  # half of the way: the middle between peak and end
    assert rates[30] == pytest.approx(0.05 + 0.45 * (1 + math.sqrt(0.5)) / 2)  # a quarter: cos(45 degrees)
    assert topic.learning_rate_at(0, dataclasses.replace(config, warmup_steps=0)) == 0.5


def test_training_loop_against_torch_parts(parity) -> None:
    config = TrainConfig(max_steps=8, warmup_steps=3, learning_rate=0.02, weight_decay=0.5, grad_clip=0.3)
    ours = shake(tiny_model()).double()
    theirs = copy.deepcopy(ours)
    batches = [tuple(torch.randint(4, VOCAB, (2, BATCH, TGT))) for _ in range(config.max_steps)]
    losses = topic.fit(ours, iter(batches), config)
    groups = [
        {"params": [parameter for parameter in theirs.parameters() if parameter.dim() >= 2], "weight_decay": 0.5},
        {"params": [parameter for parameter in theirs.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer, expected = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: topic.learning_rate_at(step, config))
    for inputs, targets in batches:
        theirs.zero_grad()
        loss = F.cross_entropy(theirs(inputs).reshape(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.3) > 0.3  # the limit is felt
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    parity("fit", "torch.optim.AdamW and LambdaLR", "trajectory", losses, expected, 1e-10)
    weights = [list(model.parameters()) for model in (ours, theirs)]
    parity("fit", "torch.optim.AdamW and LambdaLR", "trajectory", *weights, 1e-10)


# Distributions


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_generate_samples_from_the_softmax(temperature: float) -> None:
    model, n_samples = shake(tiny_model()), 20_000
    model.lm_head.weight.data *= 20
    prompt, generator = torch.tensor([[BOS_ID, 7, 9]]), torch.Generator().manual_seed(0)
    chances = (model(prompt)[0, -1] / temperature).softmax(dim=-1).detach().double().numpy()
    drawn = model.generate(prompt.expand(n_samples, -1), 1, temperature, generator)[:, 0]
    counts = torch.bincount(drawn, minlength=VOCAB).numpy()
    common = chances * n_samples >= 5  # with 20,000 samples a total variation of 0.03 fails almost surely
    observed = [*counts[common], counts[~common].sum()]
    expected = np.array([*chances[common], chances[~common].sum() + 1e-9])
    assert stats.chisquare(observed, expected / expected.sum() * n_samples).pvalue > 1e-3


def test_temperature_zero_takes_the_most_likely_token() -> None:
    model, prompt = shake(tiny_model()), torch.tensor([[BOS_ID, 7, 9]])
    drawn = model.generate(prompt, 6, temperature=0)
    whole = torch.cat([prompt, drawn], dim=1)
    assert drawn.shape[1] >= 1 and model(whole).argmax(dim=-1)[0, 2:-1].tolist() == drawn[0].tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-320])
def test_the_smallest_temperatures_take_the_most_likely_token_too(temperature: float) -> None:
    model, prompt = shake(tiny_model()), torch.tensor([[BOS_ID, 7, 9]])
    assert torch.equal(model.generate(prompt, 6, temperature), model.generate(prompt, 6, temperature=0))


def test_generated_rows_hold_padding_after_their_end() -> None:
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    drawn = model.generate(torch.full((200, 1), BOS_ID), 15, generator=torch.Generator().manual_seed(0))
    ended = (drawn == 2).cumsum(dim=1)
    after = (ended - (drawn == 2).long()) > 0
    assert after.any() and (drawn[after] == 0).all() and ((drawn == 2).sum(dim=1) <= 1).all()


@pytest.mark.parametrize("norm_order", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_dropout_stands_at_every_place_that_the_paper_names(positions: str, norm_order: str, monkeypatch) -> None:
    """Vaswani et al. 2017, section 5.4: the sum of embeddings and positions, and the output of each sub-layer; and, as
    in nn.Transformer, the attention weights and the hidden features."""
    config = ModelConfig(9, 12, 2, 3, 20, dropout=0.5, norm_order=norm_order, positions=positions)
    model, shapes = CausalTransformer(config, 11), []
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: shapes.append(tuple(x.shape)) or x)
    model(torch.zeros(2, 5, dtype=torch.long))
    stream, weights, hidden = (2, 5, 12), (2, 3, 5, 5), (2, 5, 20)
    assert shapes == [stream] + 2 * [weights, stream, hidden, stream]


def test_dropout_zeroes_the_stated_fraction_in_training_only() -> None:
    layer = EncoderLayer(64, 4, 256, dropout=0.3)
    x = torch.randn(8, 40, 64)
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)
    layer.train()
    silence(layer.self_attn)
    for seen in ([], []):
        handle = layer.ffn.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        dropped = (layer(x) - x) == 0  # what the residual dropout removed from the feed-forward network's part
        handle.remove()
        assert stats.binomtest(int(dropped.sum()), dropped.numel(), 0.3).pvalue > 1e-4
    hidden = []
    layer.ffn.down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    layer.ffn(x)
    active = F.relu(layer.ffn.up_proj(x)) > 0
    assert stats.binomtest(int((hidden[0][active] == 0).sum()), int(active.sum()), 0.3).pvalue > 1e-4


def test_document_losses_accepts_the_language_model() -> None:
    world = World()
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(6, seed=3)
    model = CausalTransformer(config_for_world(), len(vocabulary))
    losses = document_losses(model, documents, vocabulary)
    tokens = sum(len(document.tokens) for document in documents)
    assert sum(losses) / tokens == pytest.approx(math.log(len(vocabulary)), abs=0.2)
