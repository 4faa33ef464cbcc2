"""Topic 03: attention against PyTorch's and against the published formulas, and what any correct attention must do."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attention_mechanisms as topic
from attention_mechanisms import (
    N_KINDS,
    VOCAB_SIZE,
    AdditiveAttention,
    AlignmentConfig,
    AttentionOnlyModel,
    AttentionSeq2Seq,
    BahdanauSeq2Seq,
    ConcatAttention,
    CostConfig,
    DotAttention,
    GeneralAttention,
    LuongSeq2Seq,
    MultiHeadAttention,
    RecallConfig,
    ScoredAttention,
    ablate_heads,
    accuracy,
    alignment_batch,
    attention_weights,
    causal_mask,
    compare_on_task,
    dilated_mask,
    document_mask,
    key_distance,
    linear_attention,
    main,
    matched_width,
    padding_mask,
    plot_alignment,
    plot_heads,
    positive_features,
    prefix_mask,
    random_mask,
    recall_model,
    scaled_dot_product_attention,
    score_alignment,
    tiled_attention,
    window_mask,
    without_head,
)
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, PAD_ID, Seq2Seq, recall_batch
from workbench import RunConfig

BATCH, HEADS, QUERY, KEY, D_K, D_V = 2, 3, 5, 7, 4, 6  # all different: a swapped axis cannot pass
D_MODEL = 12
SDPA = "F.scaled_dot_product_attention"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).requires_grad_(grad)


def qkv(*lead: int, n_query: int = QUERY, n_key: int = KEY) -> list[Tensor]:
    shapes = ((n_query, D_K), (n_key, D_K), (n_key, D_V))
    return [normal(*lead, *shape, seed=seed, grad=True) for seed, shape in enumerate(shapes)]


def some_mask(*shape: int, seed: int = 9) -> Tensor:
    """A random mask of which the third query may attend nowhere."""
    mask = torch.rand(*shape, generator=generator(seed)) > 0.4
    mask[..., 2, :] = False
    return mask


def gradients(output: Tensor, inputs) -> list[Tensor]:
    upstream = normal(*output.shape, seed=77)
    return list(torch.autograd.grad(output, list(inputs), upstream))


# Parity: scaled dot products


MASKS = {
    "none": None,
    "query, key": some_mask(QUERY, KEY),
    "per head": some_mask(BATCH, HEADS, QUERY, KEY),
    "padding": padding_mask(torch.tensor([[4, 5, 6, 7, 8, 0, 0], [0, 5, 6, 7, 8, 9, 9]])),
    "causal": causal_mask(QUERY, KEY),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_equals_pytorch(name: str, parity) -> None:
    inputs, mask = qkv(BATCH, HEADS), MASKS[name]
    ours, weights = scaled_dot_product_attention(*inputs, mask=mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    parity("scaled_dot_product_attention", SDPA, "output", ours, theirs, 1e-10)
    parity("scaled_dot_product_attention", SDPA, "gradient", gradients(ours, inputs), gradients(theirs, inputs), 1e-10)
    allowed = torch.ones(BATCH, HEADS, QUERY, KEY, dtype=torch.bool) if mask is None else mask.expand_as(weights)
    assert (weights[~allowed] == 0).all()
    parity("attention weights", "sum of a row", "invariant", weights.sum(-1), allowed.any(-1).double(), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(QUERY, KEY), (HEADS, QUERY, KEY), (BATCH, 1, 1, KEY)])
def test_additive_bias_equals_pytorch(masked: bool, shape: tuple[int, ...], parity) -> None:
    inputs, bias = qkv(BATCH, HEADS), normal(*shape, seed=5, grad=True)
    mask = some_mask(QUERY, KEY) if masked else None
    ours, _ = scaled_dot_product_attention(*inputs, mask=mask, bias=bias)
    added = bias if mask is None else torch.where(mask, bias, -math.inf)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=added.expand(BATCH, HEADS, QUERY, KEY))
    parity("scaled_dot_product_attention, bias", SDPA, "output", ours, theirs, 1e-10)
    pair = gradients(ours, [*inputs, bias]), gradients(theirs, [*inputs, bias])
    parity("scaled_dot_product_attention, bias", SDPA, "gradient", *pair, 1e-10)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3, 2)])
def test_any_leading_axes(lead: tuple[int, ...], parity) -> None:
    inputs, mask = qkv(*lead), some_mask(QUERY, KEY)
    ours = scaled_dot_product_attention(*inputs, mask)[0]
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    parity("scaled_dot_product_attention, leading axes", SDPA, "output", ours, theirs, 1e-10)
    pair = gradients(ours, inputs), gradients(theirs, inputs)
    parity("scaled_dot_product_attention, leading axes", SDPA, "gradient", *pair, 1e-10)


def test_rows_without_keys_are_zero() -> None:
    inputs = qkv(BATCH, HEADS)
    mask = some_mask(QUERY, KEY)
    blocked_by_bias = torch.where(mask, 0.0, -math.inf).double()
    for options in ({"mask": mask}, {"bias": blocked_by_bias}, {"mask": mask, "bias": normal(QUERY, KEY)}):
        output, weights = scaled_dot_product_attention(*inputs, **options)
        assert (output[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all() and output[:, :, 0].abs().min() > 0
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
            grad_q, grad_k, grad_v = gradients(output, inputs)
        assert (grad_q[:, :, 2] == 0).all()
        assert all(torch.isfinite(grad).all() for grad in (grad_q, grad_k, grad_v))
    nowhere = scaled_dot_product_attention(*inputs, torch.zeros(QUERY, KEY, dtype=torch.bool))[0]
    assert all((grad == 0).all() for grad in gradients(nowhere, inputs))
    inputs[0].data[:, :, 2] = math.nan  # such a row does not look at its scores
    output, _ = scaled_dot_product_attention(*inputs, mask)
    assert (output[:, :, 2] == 0).all() and output.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, QUERY, KEY), (BATCH, 0, KEY), (BATCH, QUERY, 0), (BATCH, 1, 1)])
def test_empty_and_single_axes(sizes: tuple[int, int, int]) -> None:
    batch, n_query, n_key = sizes
    inputs = qkv(batch, HEADS, n_query=n_query, n_key=n_key)
    for mask in (None, torch.ones(n_query, n_key, dtype=torch.bool)):
        output, _ = scaled_dot_product_attention(*inputs, mask)
        assert output.shape == (batch, HEADS, n_query, D_V) and torch.isfinite(output).all()
        torch.testing.assert_close(tiled_attention(*inputs, mask), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_stay_finite(dtype: torch.dtype, parity) -> None:
    q, k, v = (tensor.detach().to(dtype) for tensor in qkv(BATCH, HEADS))
    q, mask = q * 1e4, some_mask(QUERY, KEY)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    for name, output in (
        ("scaled_dot_product_attention", scaled_dot_product_attention(q, k, v, mask)[0]),
        ("tiled_attention", tiled_attention(q, k, v, mask, tile_size=3)),
    ):
        assert output.dtype == dtype and torch.isfinite(output).all()
        parity(f"{name}, {dtype}, scores 1e4", SDPA + " in float64", "output", output.double(), expected, tolerance)


def test_nan_is_not_hidden() -> None:
    """In a query it spoils that row, in a key the rows that may attend to it, in a value all; no other sequence."""
    mask = causal_mask(QUERY, KEY)
    for which, position, spoiled in ((0, 1, [1]), (1, 4, [2, 3, 4]), (2, 4, [0, 1, 2, 3, 4])):
        inputs = [tensor.detach().clone() for tensor in qkv(BATCH)]
        inputs[which][1, position] = math.nan
        theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask).isnan().any(-1)
        ours = scaled_dot_product_attention(*inputs, mask)[0].isnan().any(-1)
        assert ours.nonzero().tolist() == [[1, i] for i in spoiled] and (theirs | ~ours).all()
        tiled = tiled_attention(*inputs, causal=True, tile_size=2).isnan().any(-1)
        assert (ours | ~tiled).all() and tiled[1][spoiled[-1]] and not tiled[0].any()


# Parity: multi-head


def both_layers(n_heads: int, use_bias: bool = True, dropout: float = 0.0) -> tuple:
    """Our layer and PyTorch's with the same random weights, biases included."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(D_MODEL, n_heads, dropout, use_bias, batch_first=True, dtype=torch.float64)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = MultiHeadAttention(D_MODEL, n_heads, dropout, use_bias).double().load_torch(theirs)
    return ours, theirs


def parameter_gradients(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> tuple[list, list]:
    inputs = (ours.q_proj, ours.k_proj, ours.v_proj)
    mine = [torch.cat([layer.weight.grad for layer in inputs]), ours.out_proj.weight.grad]
    other = [theirs.in_proj_weight.grad, theirs.out_proj.weight.grad]
    if ours.q_proj.bias is not None:
        mine += [torch.cat([layer.bias.grad for layer in inputs]), ours.out_proj.bias.grad]
        other += [theirs.in_proj_bias.grad, theirs.out_proj.bias.grad]
    return mine, other


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("n_heads", [1, 3, 12])
def test_multi_head_equals_pytorch(n_heads: int, cross: bool, masked: bool, use_bias: bool, parity) -> None:
    ours, theirs = both_layers(n_heads, use_bias)
    x = normal(BATCH, QUERY, D_MODEL, seed=1, grad=True)
    memory = normal(BATCH, KEY, D_MODEL, seed=2, grad=True) if cross else x
    mask = causal_mask(QUERY, memory.shape[1]) if masked else None
    output, weights = ours(x, memory if cross else None, mask)
    their_mask = None if mask is None else ~mask  # nn.MultiheadAttention: True = blocked
    expected, their_weights = theirs(x, memory, memory, attn_mask=their_mask, average_attn_weights=False)
    name = "MultiHeadAttention, cross" if cross else "MultiHeadAttention"
    parity(name, "nn.MultiheadAttention", "output", [output, weights], [expected, their_weights], 1e-10)
    inputs = [x, memory] if cross else [x]
    output.square().sum().backward()
    mine = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    expected.square().sum().backward()
    ours_parameters, theirs_parameters = parameter_gradients(ours, theirs)
    other = [tensor.grad for tensor in inputs] + theirs_parameters
    parity(name, "nn.MultiheadAttention", "gradient", mine + ours_parameters, other, 1e-10)


def test_multi_head_padding_equals_key_padding_mask(parity) -> None:
    ours, theirs = both_layers(3)
    token_ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [5, 0, 0, 0, 0, 0, 0]])
    x = normal(BATCH, KEY, D_MODEL)
    output, _ = ours(x, mask=padding_mask(token_ids))
    expected, _ = theirs(x, x, x, key_padding_mask=token_ids == 0)
    parity("padding_mask", "nn.MultiheadAttention key_padding_mask", "output", output, expected, 1e-10)


def test_multi_head_trains_like_pytorch(parity) -> None:
    """50 Adam steps of cross attention from the same weights give the same losses and the same weights."""
    ours, theirs = both_layers(3)
    data = [(normal(BATCH, QUERY, D_MODEL, seed=s), normal(BATCH, KEY, D_MODEL, seed=s + 100)) for s in range(5)]
    target, mask, histories = normal(BATCH, QUERY, D_MODEL, seed=999), causal_mask(QUERY, KEY), []
    for layer in (ours, theirs):
        optimizer, losses = torch.optim.Adam(layer.parameters(), lr=1e-2), []
        for step in range(50):
            x, memory = data[step % len(data)]
            if layer is ours:
                output, _ = layer(x, memory, mask)
            else:
                output, _ = layer(x, memory, memory, attn_mask=~mask)
            loss = (output - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0][-1] < histories[0][0] / 2
    back = MultiHeadAttention(D_MODEL, 3).double().load_torch(theirs)
    pair = [histories[0], ours.state_dict()], [histories[1], back.state_dict()]
    parity("MultiHeadAttention", "nn.MultiheadAttention", "trajectory", *pair, 1e-8)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ((12, 3), {"num_heads": 4}, "n_heads is 3 in ours and 4 in PyTorch's layer; build both alike"),
        ((8, 2), {"num_heads": 2}, "d_model is 8 in ours and 12"),
        ((12, 2), {"num_heads": 2, "kdim": 5}, r"widths of keys and values is \(12, 12\) in ours and \(5, 12\)"),
        ((12, 2), {"num_heads": 2, "bias": False}, "use_bias is True in ours and False"),
        ((12, 2), {"num_heads": 2, "add_zero_attn": True}, "added keys and values is False in ours and True"),
        ((12, 2), {"num_heads": 2, "add_bias_kv": True}, "added keys and values is False in ours and True"),
    ],
)
def test_weights_of_another_kind_of_layer_are_refused(ours: tuple, theirs: dict, message: str) -> None:
    """Twelve columns cut into four heads load into three without a word, and mean something else."""
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*ours).load_torch(nn.MultiheadAttention(12, **theirs))


@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_travel_both_ways(use_bias: bool, parity) -> None:
    ours, theirs = both_layers(3, use_bias)
    again = ours.to_torch()
    parity("MultiHeadAttention", "nn.MultiheadAttention", "exchange", again.state_dict(), theirs.state_dict(), 0.0)
    fresh = MultiHeadAttention(D_MODEL, 3, use_bias=use_bias).double().load_torch(again)
    parity("MultiHeadAttention", "its own weights", "exchange", fresh.state_dict(), ours.state_dict(), 0.0)
    x = normal(BATCH, QUERY, D_MODEL)
    parity("MultiHeadAttention", "nn.MultiheadAttention", "exchange", ours(x)[0], again(x, x, x)[0], 1e-10)
    with torch.no_grad():
        again.in_proj_weight.zero_()
    assert ours.q_proj.weight.abs().min() > 0, "a copy, not the same storage"


def test_dropout_is_pytorchs(parity) -> None:
    """With one seed both layers drop the same weights, scale the rest and return them as used."""
    ours, theirs = both_layers(3, dropout=0.4)
    x, memory = normal(BATCH, QUERY, D_MODEL), normal(BATCH, KEY, D_MODEL, seed=1)
    torch.manual_seed(5)
    mine = ours(x, memory)
    torch.manual_seed(5)
    other = theirs(x, memory, memory, average_attn_weights=False)
    parity("MultiHeadAttention, dropout", "nn.MultiheadAttention", "output", list(mine), list(other), 1e-10)
    assert 0.2 < (mine[1] == 0).double().mean() < 0.6
    ours.eval()
    assert (ours(x, memory)[1] > 0).all() and ours.to_torch().dropout == 0.4


def test_one_head_with_identity_projections_is_plain_attention() -> None:
    layer = MultiHeadAttention(D_MODEL, 1).double()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        nn.init.eye_(projection.weight)
    x, memory = normal(BATCH, QUERY, D_MODEL), normal(BATCH, KEY, D_MODEL, seed=1)
    expected = scaled_dot_product_attention(x, memory, memory)[0]
    torch.testing.assert_close(layer(x, memory)[0], expected, rtol=0, atol=1e-12)


def test_keys_and_values_can_be_kept(parity) -> None:
    """One position at a time over kept keys and values gives what the whole sequence gives at once."""
    layer, x = both_layers(3)[0], normal(BATCH, QUERY, D_MODEL)
    whole, weights = layer(x, mask=causal_mask(QUERY))
    k, v = layer.keys_values(x)
    assert k.shape == v.shape == (BATCH, 3, QUERY, D_MODEL // 3)
    for t in range(QUERY):
        kept = k[:, :, : t + 1], v[:, :, : t + 1]
        step, step_weights = layer.attend(x[:, t : t + 1], *kept, causal_mask(1, t + 1))
        parity("MultiHeadAttention.attend, one by one", "all at once", "invariant", step[:, 0], whole[:, t], 1e-12)
        torch.testing.assert_close(step_weights[:, :, 0], weights[:, :, t, : t + 1], rtol=0, atol=1e-12)


def test_fresh_multi_head_keeps_the_scale_of_its_input() -> None:
    """Xavier weights and zero biases: projections of unit-variance inputs have unit variance."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(256, 4)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        variance = projection(torch.randn(200, 256)).var().item()
        assert 0.9 < variance < 1.1 and (projection.bias == 0).all()
    assert layer.scale == 1 / 8


# Parity: the published scores


D_QUERY, D_MEMORY, D_ATTENTION = 4, 6, 3


def literal_score(layer: nn.Module, q: Tensor, h: Tensor) -> Tensor:
    """The score of one query and one memory vector, as the papers print it."""
    match layer:
        case AdditiveAttention():
            hidden = torch.tanh(layer.query_proj.weight @ q + layer.memory_proj.weight @ h)
            return layer.score_proj.weight[0] @ hidden
        case ConcatAttention():
            return layer.score_proj.weight[0] @ torch.tanh(layer.pair_proj.weight @ torch.cat([q, h]))
        case GeneralAttention():
            return torch.einsum("i,ij,j->", q, layer.memory_proj.weight, h)
        case DotAttention():
            return torch.einsum("i,i->", q, h)
    raise AssertionError(layer)


SCORES = {
    "AdditiveAttention": lambda: AdditiveAttention(D_QUERY, D_MEMORY, D_ATTENTION),
    "ConcatAttention": lambda: ConcatAttention(D_QUERY, D_MEMORY, D_ATTENTION),
    "GeneralAttention": lambda: GeneralAttention(D_QUERY, D_MEMORY),
    "DotAttention": lambda: DotAttention(),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_their_formula(name: str, masked: bool, parity) -> None:
    torch.manual_seed(0)
    layer = SCORES[name]().double()
    d_query = D_MEMORY if name == "DotAttention" else D_QUERY
    query, memory = normal(BATCH, QUERY, d_query, grad=True), normal(BATCH, KEY, D_MEMORY, seed=1, grad=True)
    mask = some_mask(QUERY, KEY) if masked else torch.ones(QUERY, KEY, dtype=torch.bool)
    contexts, rows = [], []
    for b, i in itertools.product(range(BATCH), range(QUERY)):
        allowed = [j for j in range(KEY) if mask[i, j]]
        row = [torch.zeros((), dtype=torch.float64)] * KEY
        if allowed:
            chances = torch.stack([literal_score(layer, query[b, i], memory[b, j]) for j in allowed]).exp()
            for j, chance in zip(allowed, chances / chances.sum(), strict=True):
                row[j] = chance
        rows.append(torch.stack(row))
        contexts.append(sum(row[j] * memory[b, j] for j in range(KEY)))
    expected = [torch.stack(part).unflatten(0, (BATCH, QUERY)) for part in (contexts, rows)]
    context, weights = layer(query, memory, mask if masked else None)
    oracle = "the formula, looped"
    parity(name, oracle, "output", [context, weights], expected, 1e-12)
    inputs = [query, memory, *layer.parameters()]
    parity(name, oracle, "gradient", gradients(context, inputs), gradients(expected[0], inputs), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_any_score_is_averaged_as_pytorch_does(masked: bool, parity) -> None:
    """The base class with scaled dot products for a score is PyTorch's attention, with the memory as its values."""
    layer, mask = ScoredAttention(), some_mask(QUERY, KEY) if masked else None
    layer.scores = lambda query, memory: query @ memory.mT / math.sqrt(D_K)
    query, memory = normal(BATCH, QUERY, D_K, grad=True), normal(BATCH, KEY, D_K, seed=1, grad=True)
    ours, theirs = layer(query, memory, mask)[0], F.scaled_dot_product_attention(query, memory, memory, attn_mask=mask)
    parity("ScoredAttention", SDPA, "output", ours, theirs, 1e-10)
    inputs = query, memory
    parity("ScoredAttention", SDPA, "gradient", gradients(ours, inputs), gradients(theirs, inputs), 1e-10)


@pytest.mark.parametrize("name", SCORES)
def test_published_scores_pass_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    layer = SCORES[name]().double()
    d_query = D_MEMORY if name == "DotAttention" else D_QUERY
    inputs = normal(BATCH, 2, d_query, grad=True), normal(BATCH, 3, D_MEMORY, seed=1, grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda q, h: layer(q, h, mask), inputs)


def test_concat_is_additive_with_one_matrix_for_both() -> None:
    """W [q; h] = W_q q + W_h h: the halves in the order query, memory. Swapped halves would not even fit."""
    torch.manual_seed(0)
    concat, additive = SCORES["ConcatAttention"]().double(), SCORES["AdditiveAttention"]().double()
    with torch.no_grad():
        additive.query_proj.weight.copy_(concat.pair_proj.weight[:, :D_QUERY])
        additive.memory_proj.weight.copy_(concat.pair_proj.weight[:, D_QUERY:])
        additive.score_proj.weight.copy_(concat.score_proj.weight)
    query, memory = normal(BATCH, QUERY, D_QUERY), normal(BATCH, KEY, D_MEMORY, seed=1)
    torch.testing.assert_close(concat(query, memory), additive(query, memory), rtol=0, atol=1e-12)
    assert concat.scores(query, memory).shape == (BATCH, QUERY, KEY)


def test_general_with_the_identity_is_dot() -> None:
    general = GeneralAttention(D_MEMORY, D_MEMORY).double()
    nn.init.eye_(general.memory_proj.weight)
    query, memory = normal(BATCH, QUERY, D_MEMORY), normal(BATCH, KEY, D_MEMORY, seed=1)
    torch.testing.assert_close(general(query, memory), DotAttention()(query, memory), rtol=0, atol=1e-12)


# Parity: tiled


TILE_SIZES = [1, 2, 3, KEY, 100]


@pytest.mark.parametrize("tile_size", TILE_SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_tiled_equals_pytorch(name: str, tile_size: int, parity) -> None:
    inputs, mask = qkv(BATCH, HEADS), MASKS[name]
    ours = tiled_attention(*inputs, mask, tile_size=tile_size)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    parity("tiled_attention", SDPA, "output", ours, theirs, 1e-12)
    parity("tiled_attention", SDPA, "gradient", gradients(ours, inputs), gradients(theirs, inputs), 1e-12)


@pytest.mark.parametrize("tile_size", TILE_SIZES)
@pytest.mark.parametrize(("n_query", "n_key"), [(5, 7), (7, 5), (6, 6), (1, 7)])
def test_tiled_causal_equals_naive(n_query: int, n_key: int, tile_size: int, parity) -> None:
    """More queries than keys too: then the first queries may attend nowhere."""
    inputs = qkv(BATCH, HEADS, n_query=n_query, n_key=n_key)
    extra = some_mask(n_query, n_key) if n_query > 2 else None
    for mask in (None, extra):
        both = causal_mask(n_query, n_key) if mask is None else causal_mask(n_query, n_key) & mask
        ours = tiled_attention(*inputs, mask, causal=True, tile_size=tile_size)
        naive = scaled_dot_product_attention(*inputs, both)[0]
        parity("tiled_attention, causal", "scaled_dot_product_attention", "output", ours, naive, 1e-12)
        pair = gradients(ours, inputs), gradients(naive, inputs)
        parity("tiled_attention, causal", "scaled_dot_product_attention", "gradient", *pair, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile_size", [1, 2, 9])
def test_tiled_passes_gradcheck(causal: bool, tile_size: int) -> None:
    inputs = qkv(1, n_query=3, n_key=4)
    mask = some_mask(3, 4)
    assert torch.autograd.gradcheck(lambda *args: tiled_attention(*args, mask, causal, tile_size), inputs)


def test_tiled_broadcasts_leading_axes(parity) -> None:
    """Keys and values shared by all heads receive the sum of the heads' gradients."""
    q, _, _ = qkv(BATCH, HEADS)
    k, v = normal(BATCH, 1, KEY, D_K, seed=1, grad=True), normal(KEY, D_V, seed=2, grad=True)
    ours, naive = tiled_attention(q, k, v, tile_size=2), scaled_dot_product_attention(q, k, v)[0]
    parity("tiled_attention, shared keys", "scaled_dot_product_attention", "output", ours, naive, 1e-12)
    pair = gradients(ours, (q, k, v)), gradients(naive, (q, k, v))
    parity("tiled_attention, shared keys", "scaled_dot_product_attention", "gradient", *pair, 1e-12)


def test_tiled_single_precision_at_length(parity) -> None:
    shape = (1, 2, 300, 16)
    inputs = [torch.randn(shape, generator=generator(seed), requires_grad=True) for seed in range(3)]
    ours = tiled_attention(*inputs, causal=True, tile_size=64)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
    parity("tiled_attention, float32", SDPA, "output", ours, theirs, 1e-6)
    grads = [torch.autograd.grad(output.sum(), inputs) for output in (ours, theirs)]
    parity("tiled_attention, float32", SDPA, "gradient", list(grads[0]), list(grads[1]), 1e-5)


def test_tiled_sums_half_precision_in_single() -> None:
    """400 tiles of one key: sums kept in bfloat16 would lose the output's last bits, by far more than one."""
    q, k = (torch.randn(3, n, D_K, generator=generator(n)).bfloat16() for n in (2, 400))
    v = (torch.rand(3, 400, D_V, generator=generator(2)) + 0.5).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    output = tiled_attention(q, k, v, tile_size=1)
    assert output.dtype == torch.bfloat16 and (output / exact - 1).abs().max() < 2**-8


def test_tiled_has_no_second_derivative() -> None:
    """Asked for through the upstream gradient it is refused; otherwise the first derivative is a constant."""
    inputs = qkv(1, 1)
    (grad,) = torch.autograd.grad(tiled_attention(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(tiled_attention(*inputs).sum(), inputs[0], create_graph=True)
    assert not grad.requires_grad


# Parity: linear attention


def quadratic_kernel_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    scores = scores.tril() if causal else scores
    return scores / scores.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_equals_the_quadratic_form(causal: bool, parity) -> None:
    inputs = qkv(BATCH, HEADS, n_query=KEY if causal else QUERY)
    ours, theirs = linear_attention(*inputs, causal), quadratic_kernel_attention(*inputs, causal)
    name = "linear_attention, causal" if causal else "linear_attention"
    parity(name, "quadratic form of the kernel", "output", ours, theirs, 1e-12)
    pair = gradients(ours, inputs), gradients(theirs, inputs)
    parity(name, "quadratic form of the kernel", "gradient", *pair, 1e-12)


def test_causal_linear_attention_is_a_recurrence(parity) -> None:
    """A state of d_k * d_v numbers and a normaliser, updated once for each position."""
    q, k, v = qkv(n_query=KEY)
    state, normaliser, outputs = torch.zeros(D_K, D_V, dtype=torch.float64), torch.zeros(D_K, dtype=torch.float64), []
    for t in range(KEY):
        state, normaliser = state + positive_features(k[t])[:, None] * v[t], normaliser + positive_features(k[t])
        outputs.append(positive_features(q[t]) @ state / (positive_features(q[t]) @ normaliser))
    parity(
        "linear_attention, causal",
        "step by step",
        "invariant",
        linear_attention(q, k, v, True),
        torch.stack(outputs),
        1e-12,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_sums_half_precision_in_single(causal: bool) -> None:
    """Features of e^-9 have products below float16's smallest number: equal weights must come out all the same."""
    small, v = torch.full((4, 3), -9.0).half(), torch.arange(8.0).view(4, 2).half()
    expected = v.cumsum(0) / torch.arange(1, 5)[:, None] if causal else v.mean(0).expand(4, 2)
    output = linear_attention(small, small, v, causal)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), expected.float(), rtol=2e-3, atol=0)


def test_positive_features_are_elu_plus_one_and_stay_positive(parity) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    parity("positive_features", "F.elu + 1", "output", positive_features(x), F.elu(x) + 1, 1e-12)
    pair = gradients(positive_features(x), [x]), gradients(F.elu(x) + 1, [x])
    parity("positive_features", "F.elu + 1", "gradient", *pair, 1e-12)
    far = torch.tensor([-30.0])
    assert F.elu(far) + 1 == 0 < positive_features(far), "rounding turns elu + 1 into 0, and a row into 0 / 0"
    large = torch.full((3, 2), -500.0, requires_grad=True)
    output = linear_attention(large, large, large)
    output.sum().backward()
    assert torch.isfinite(output).all() and torch.isfinite(large.grad).all()


# Masks: every builder against a predicate in plain Python


def members(mask: Tensor) -> set[tuple[int, ...]]:
    assert mask.dtype == torch.bool
    return {tuple(index) for index in mask.nonzero().tolist()}


LENGTHS = [(6, None), (4, 7), (7, 4), (1, 5), (5, 1), (0, 3), (3, 0)]


@pytest.mark.parametrize(("n_query", "n_key"), LENGTHS)
def test_masks_hold_their_pairs(n_query: int, n_key: int | None) -> None:
    keys = n_query if n_key is None else n_key
    pairs = list(itertools.product(range(n_query), range(keys)))

    def position(i: int) -> int:
        return i + keys - n_query  # the last query stands at the last key

    def expect(mask: Tensor, holds) -> None:
        assert mask.shape == (n_query, keys) and members(mask) == {(i, j) for i, j in pairs if holds(i, j)}

    expect(causal_mask(n_query, n_key), lambda i, j: j <= position(i))
    for n_prefix in range(keys + 1):
        expect(prefix_mask(n_query, n_prefix, n_key), lambda i, j, p=n_prefix: j <= position(i) or j < p)
    for size in (1, 2, 3, 50):
        expect(window_mask(n_query, size, n_key), lambda i, j, w=size: position(i) - w < j <= position(i))
        for gap in (1, 2, 3):
            near = range(0, size * gap, gap)
            expect(dilated_mask(n_query, size, gap, n_key), lambda i, j, near=near: position(i) - j in near)
    assert key_distance(n_query, n_key).tolist() == [[position(i) - j for j in range(keys)] for i in range(n_query)]


def test_two_sided_window_is_the_union_with_its_transpose() -> None:
    mask = window_mask(7, 3)
    assert members(mask | mask.T) == {(i, j) for i, j in itertools.product(range(7), repeat=2) if abs(i - j) < 3}


def test_padding_and_document_masks_hold_what_they_promise() -> None:
    token_ids = torch.tensor([[5, 6, 0, 7], [0, 0, 8, 0]])
    mask = padding_mask(token_ids)
    assert mask.shape == (2, 1, 1, 4) and mask[:, 0, 0].tolist() == [[1, 1, 0, 1], [0, 0, 1, 0]]
    assert padding_mask(token_ids, pad_id=7)[0, 0, 0].tolist() == [1, 1, 1, 0]
    packed = torch.tensor([[BOS_ID, 9, 9, BOS_ID, 9, BOS_ID], [BOS_ID, 9, BOS_ID, 9, 9, 9]])
    document_ids = (packed == BOS_ID).cumsum(1)
    mask = document_mask(document_ids)
    assert mask.shape == (2, 1, 6, 6)
    names = ["aaabbc", "aabbbb"]
    expected = {
        (b, 0, i, j) for b in range(2) for i, j in itertools.product(range(6), repeat=2) if names[b][i] == names[b][j]
    }
    assert members(mask) == expected


def test_packed_documents_equal_documents_alone(parity) -> None:
    layer, parts = both_layers(3)[0], [normal(1, n, D_MODEL, seed=n) for n in (2, 4, 3)]
    document_ids = torch.tensor([[0] * 2 + [1] * 4 + [2] * 3])
    packed, _ = layer(torch.cat(parts, dim=1), mask=document_mask(document_ids) & causal_mask(9))
    alone = torch.cat([layer(part, mask=causal_mask(part.shape[1]))[0] for part in parts], dim=1)
    parity("document_mask", "each document alone", "invariant", packed, alone, 1e-12)


def test_random_mask_draws_distinct_keys_uniformly() -> None:
    """Chi-square over the 20 subsets of 3 of 6 keys; a key drawn 30 % too often would fail with power > 0.99."""
    mask = random_mask(8000, 3, generator(), n_key=6)
    assert mask.dtype == torch.bool and (mask.sum(1) == 3).all()
    codes = (mask * 2 ** torch.arange(6)).sum(1)
    counts = torch.stack([(codes == code).sum() for code in codes.unique()]).double()
    expected = 8000 / 20
    assert len(counts) == 20 and ((counts - expected) ** 2 / expected).sum() < 43.8  # 0.999 quantile, 19 degrees
    assert torch.equal(random_mask(5, 2, generator(3)), random_mask(5, 2, generator(3)))
    assert not torch.equal(random_mask(50, 2, generator(3)), random_mask(50, 2, generator(4)))
    assert random_mask(4, 4, generator()).all()


# Invariants


CAUSAL_MASKS = {
    "causal": causal_mask(8),
    "prefix": prefix_mask(8, 3),
    "window": window_mask(8, 3),
    "dilated": dilated_mask(8, 3, 2),
    "document": document_mask(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])) & causal_mask(8),
}


def depends_on(layer: nn.Module, mask: Tensor) -> Tensor:
    """Which outputs of self-attention change with which inputs: (query, key), by exact non-zero gradients."""
    x = normal(1, mask.shape[-1], D_MODEL, grad=True)
    output, _ = layer(x, mask=mask)
    rows = [torch.autograd.grad(output[0, i].sum(), x, retain_graph=True)[0][0] for i in range(x.shape[1])]
    return torch.stack(rows).abs().sum(-1) > 0


@pytest.mark.parametrize("name", CAUSAL_MASKS)
def test_changing_the_future_changes_nothing_before_it(name: str) -> None:
    layer, mask = both_layers(3)[0], CAUSAL_MASKS[name]
    x = normal(1, 8, D_MODEL)
    before, _ = layer(x, mask=mask)
    for t in range(3 if name == "prefix" else 1, 8):
        changed = x.clone()
        changed[:, t:] += normal(1, 8 - t, D_MODEL, seed=t + 1)
        after, _ = layer(changed, mask=mask)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.isclose(after[:, t:], before[:, t:]).all(-1).any()
    own = torch.eye(8, dtype=torch.bool)  # the query itself
    assert torch.equal(depends_on(layer, mask), mask.view(8, 8) | own)


def test_an_inverted_mask_is_caught() -> None:
    """The public bug that this topic opens with: True meant "blocked". Both checks above see it at once."""
    layer, mask = both_layers(3)[0], ~causal_mask(8)
    assert depends_on(layer, mask).triu(1).any(), "the past depends on the future"
    x = normal(1, 8, D_MODEL)
    expected, _ = layer.to_torch()(x, x, x, attn_mask=~causal_mask(8))
    output, _ = layer(x, mask=mask)
    assert (output - expected).abs().max() > 0.1
    assert torch.allclose(output[:, -1], layer.out_proj.bias), (
        "the last query may attend nowhere: only the bias is left"
    )


@pytest.mark.parametrize("attend", ["multi-head", "additive", "tiled", "linear"])
def test_order_means_nothing_without_positions(attend: str, parity) -> None:
    x, order = normal(BATCH, KEY, D_MODEL), torch.randperm(KEY, generator=generator(4))
    torch.manual_seed(0)
    additive = AdditiveAttention(D_MODEL, D_MODEL, 5).double()
    function = {
        "multi-head": lambda x: both_layers(3)[0](x)[0],
        "additive": lambda x: additive(x, x)[0],
        "tiled": lambda x: tiled_attention(x, x, x, tile_size=2),
        "linear": lambda x: linear_attention(x, x, x),
    }[attend]
    parity(f"{attend} attention", "permuted inputs", "invariant", function(x[:, order]), function(x)[:, order], 1e-12)
    assert not torch.allclose(function(x[:, order]), function(x))


def test_padded_equals_unpadded(parity) -> None:
    layer, x = both_layers(3)[0], normal(1, QUERY, D_MODEL)
    padded = torch.cat([x, normal(1, 3, D_MODEL, seed=8)], dim=1)
    mask = padding_mask(torch.tensor([[9] * QUERY + [PAD_ID] * 3]))
    parity("padding_mask", "without padding", "invariant", layer(padded, mask=mask)[0][:, :QUERY], layer(x)[0], 1e-12)


def test_a_constant_added_to_all_scores_of_a_row_changes_nothing(parity) -> None:
    inputs = qkv(BATCH, HEADS)
    for mask in (None, some_mask(QUERY, KEY)):  # a finite stand-in for -inf would win against scores far below it
        shifted = scaled_dot_product_attention(*inputs, mask, bias=normal(QUERY, 1).abs() * -1e6)[0]
        expected = scaled_dot_product_attention(*inputs, mask)[0]
        parity("scaled_dot_product_attention", "shifted scores", "invariant", shifted, expected, 1e-8)


# By hand


def test_the_hand_worked_example() -> None:
    """Two keys, width 4: scores 4 and 0 over sqrt(4) give 2 and 0, weights e^2 / (e^2 + 1) and the rest."""
    q = torch.tensor([[2.0, 0, 0, 0]])
    k = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]])
    v = torch.tensor([[10.0], [20]])
    output, weights = scaled_dot_product_attention(q, k, v)
    first = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(weights, torch.tensor([[first, 1 - first]]))
    torch.testing.assert_close(output, torch.tensor([[10 * first + 20 * (1 - first)]]))
    torch.testing.assert_close(tiled_attention(q, k, v, tile_size=1), output)
    torch.testing.assert_close(attention_weights(q, k, scale=1.0)[0, 1].item(), 1 / (math.exp(4) + 1))
    linear = linear_attention(q, k, v)  # features (3 1 1 1), (3 1 1 1), (1 3 1 1): kernels 12 and 8
    torch.testing.assert_close(linear, torch.tensor([[(12 * 10 + 8 * 20) / 20]]))


def test_the_streaming_softmax_by_hand() -> None:
    """Scores 0, then ln 3: the first maximum 0 has sum 1; the second rescales it to 1/3 and adds 1."""
    q, k, v = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([[4.0], [8.0]])
    torch.testing.assert_close(tiled_attention(q, k, v, tile_size=1), torch.tensor([[(4 / 3 + 8) / (4 / 3)]]))


# Sequence to sequence


def source() -> tuple[Tensor, Tensor, Tensor]:
    src_ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10], [9, 8, 7, 0, 0, 0, 0]])
    return src_ids, torch.tensor([7, 3]), torch.tensor([[BOS_ID, 5, 6, 7], [BOS_ID, 8, 9, 4]])


def model_of(model_cls: type, d_model: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return model_cls(11, 13, d_model).double()


def test_bahdanau_equals_the_paper(parity) -> None:
    model = model_of(BahdanauSeq2Seq)
    src_ids, src_lengths, tgt_ids = source()
    attention, cell, expected, looks = model.attention, model.decoder, [], []
    for b in range(2):
        memory, state = model.encode(src_ids[b : b + 1, : src_lengths[b]], src_lengths[b : b + 1])
        h, s = memory[0], state.hidden[0]
        for token_id in tgt_ids[b]:
            y = model.tgt_emb(token_id)
            energies = torch.stack([literal_score(attention, s, h[j]) for j in range(len(h))])
            weights = energies.exp() / energies.exp().sum()
            c = sum(weight * row for weight, row in zip(weights, h, strict=True))
            projected, own = cell.input_proj(torch.cat([y, c])).chunk(3), cell.state_proj(s).chunk(3)
            r, z = torch.sigmoid(projected[0] + own[0]), torch.sigmoid(projected[1] + own[1])
            s = (1 - z) * torch.tanh(projected[2] + r * own[2]) + z * s
            expected.append(model.lm_head(torch.cat([s, y, c])))
            looks.append(F.pad(weights, (0, 7 - len(h))))
    logits = model(src_ids, src_lengths, tgt_ids)
    weights = model.align(src_ids, src_lengths, tgt_ids)
    both = [torch.stack(part).unflatten(0, (2, 4)) for part in (expected, looks)]
    parity("BahdanauSeq2Seq", "the paper's equations, looped", "output", [logits, weights], both, 1e-12)


def test_luong_equals_the_paper(parity) -> None:
    model = model_of(LuongSeq2Seq)
    src_ids, src_lengths, tgt_ids = source()
    memory, state = model.encode(src_ids, src_lengths)
    hidden, _ = Seq2Seq.decode(model, tgt_ids, state.hidden)
    expected = torch.zeros(2, 4, 13, dtype=torch.float64)
    for b, t in itertools.product(range(2), range(4)):
        h, rows = hidden[b, t], memory[b, : src_lengths[b]]
        weights = (rows @ (model.attention.memory_proj.weight.T @ h)).softmax(0)
        expected[b, t] = model.lm_head(torch.tanh(model.context_proj.weight @ torch.cat([weights @ rows, h])))
    logits = model(src_ids, src_lengths, tgt_ids)
    parity("LuongSeq2Seq", "the paper's equations, looped", "output", logits, expected, 1e-12)


def test_a_decoder_that_ignores_the_memory_is_topic_02s(parity) -> None:
    """What every attention model shares: the encoder, its memory and mask, and the head, around any decoder."""
    plain, shared = model_of(Seq2Seq), model_of(AttentionSeq2Seq)
    src_ids, src_lengths, tgt_ids = source()

    def decode(tgt_ids, state):
        outputs, hidden = Seq2Seq.decode(shared, tgt_ids, state.hidden)
        return outputs, state._replace(hidden=hidden)

    shared.decode = decode
    ours, theirs = shared(src_ids, src_lengths, tgt_ids), plain(src_ids, src_lengths, tgt_ids)
    parity("AttentionSeq2Seq", "topic 02's Seq2Seq", "output", ours, theirs, 1e-12)
    grads = [gradients(logits, model.parameters()) for model, logits in ((shared, ours), (plain, theirs))]
    parity("AttentionSeq2Seq", "topic 02's Seq2Seq", "gradient", *grads, 1e-12)
    assert torch.equal(shared.generate(src_ids, src_lengths, 5), plain.generate(src_ids, src_lengths, 5))
    memory, state = shared.encode(src_ids, src_lengths)
    assert torch.equal(memory, plain.encode(src_ids, src_lengths)[0]) and torch.equal(state.memory, memory)
    assert state.mask.tolist() == [[[True] * 7], [[True] * 3 + [False] * 4]]


@pytest.mark.parametrize("model_cls", [BahdanauSeq2Seq, LuongSeq2Seq])
def test_seq2seq_padding_and_batch_change_nothing(model_cls: type, parity) -> None:
    model = model_of(model_cls)
    src_ids, src_lengths, tgt_ids = source()
    batched, weights = model(src_ids, src_lengths, tgt_ids), model.align(src_ids, src_lengths, tgt_ids)
    single = model(src_ids[1:, :3], src_lengths[1:], tgt_ids[1:])
    parity(model_cls.__name__, "unpadded, alone", "invariant", batched[1:], single, 1e-12)
    garbage = src_ids.masked_fill(src_ids == PAD_ID, 4)
    assert torch.equal(model(garbage, src_lengths, tgt_ids), batched)
    assert weights.shape == (2, 4, 7) and (weights[1, :, 3:] == 0).all() and (weights[1, :, :3] > 0).all()
    parity(
        model_cls.__name__, "weights sum to 1", "invariant", weights.sum(-1), torch.ones_like(weights[:, :, 0]), 1e-12
    )


@pytest.mark.parametrize("model_cls", [BahdanauSeq2Seq, LuongSeq2Seq])
def test_seq2seq_generates_what_teacher_forcing_predicts(model_cls: type, parity) -> None:
    model = model_of(model_cls)
    src_ids, src_lengths, _ = source()
    generated = model.generate(src_ids, src_lengths, 6)
    inputs = torch.cat([torch.full((2, 1), BOS_ID), generated[:, :-1]], dim=1)
    forced = model(src_ids, src_lengths, inputs).argmax(-1)
    for row, wanted in zip(generated.tolist(), forced.tolist(), strict=True):
        end = row.index(EOS_ID) + 1 if EOS_ID in row else len(row)
        assert row[:end] == wanted[:end] and set(row[end:]) <= {PAD_ID}
    tgt_ids = torch.randint(4, 13, (2, 6), generator=generator())
    state, steps = model.encode(src_ids, src_lengths)[1], []
    for t in range(6):
        output, state = model.decode(tgt_ids[:, t : t + 1], state)
        steps.append(model.lm_head(output))
    whole = model(src_ids, src_lengths, tgt_ids)
    parity(model_cls.__name__, "one step at a time", "invariant", torch.cat(steps, dim=1), whole, 1e-12)


def test_the_fixed_vector_cannot_see_what_attention_can() -> None:
    """With the last state held fixed, only a model with attention still depends on the other encoder outputs."""
    src_ids, src_lengths, tgt_ids = source()
    for model_cls in (BahdanauSeq2Seq, LuongSeq2Seq):
        model = model_of(model_cls)
        memory, state = model.encode(src_ids, src_lengths)
        memory = memory.detach().requires_grad_()
        outputs, _ = model.decode(tgt_ids, state._replace(memory=memory, hidden=state.hidden.detach()))
        (grad,) = torch.autograd.grad(outputs.square().sum(), memory)
        assert (grad[0].abs().sum(-1) > 0).all() and (grad[1, 3:] == 0).all()


# The tasks


@pytest.mark.parametrize("n_symbols", [2, 6, 7])
def test_the_links_of_a_task_solve_it(n_symbols: int) -> None:
    """Copying the linked source token gives every counted target, and each has exactly one link."""
    for task in topic.TASKS:
        batch = alignment_batch(task, 50, n_symbols, generator())
        src_ids, src_lengths, tgt_ids, targets, links = batch
        counted = targets != IGNORE
        assert tgt_ids.shape == targets.shape and links.shape == (*targets.shape, src_ids.shape[1])
        assert torch.equal(links.sum(-1), counted.long()) and counted.any(dim=1).all()
        rows, _, columns = links.nonzero(as_tuple=True)
        assert torch.equal(src_ids[rows, columns], targets[counted])
        assert (columns < src_lengths[rows]).all() and (src_ids[rows, columns] > 3).all()
        assert torch.equal(src_ids == PAD_ID, torch.arange(src_ids.shape[1]) >= src_lengths[:, None])
    assert (tgt_ids[:, 0] > 3).all(), "recall asks from the first step"


def test_copy_lengths_cover_their_range() -> None:
    src_ids, src_lengths, tgt_ids, targets, _ = alignment_batch("copy", 400, 6, generator())
    assert set(src_lengths.tolist()) == {3, 4, 5, 6} and (tgt_ids[:, 0] == BOS_ID).all()
    assert torch.equal(tgt_ids[:, 1:4], src_ids[:, :3]) and torch.equal(targets[:, :3], src_ids[:, :3])


def test_score_alignment_counts_by_hand() -> None:
    """Three true links; weights above a half on one true and one false, and one on a row that does not count."""
    links = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]], dtype=torch.bool)
    weights = torch.tensor([[[0.9, 0.1, 0], [0.6, 0.4, 0], [0.4, 0.3, 0.3], [1, 0, 0]]])
    assert score_alignment(weights, links) == (1 / 2, 1 / 3)
    assert score_alignment(weights, links, threshold=0.35) == (2 / 4, 2 / 3)
    assert score_alignment(torch.full((1, 4, 3), 1 / 3), links) == (0.0, 0.0)
    assert score_alignment(links.float(), links) == (1.0, 1.0)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiHeadAttention(10, 3), r"d_model=10 is not divisible by n_heads=3; choose a divisor"),
        (lambda: MultiHeadAttention(10, 0), r"d_model=10 is not divisible by n_heads=0"),
        (
            lambda: MultiHeadAttention(8, 1)(torch.ones(5, 8)),
            r"expected a sequence \(batch, seq, d_model=8\), got \(5, 8\)",
        ),
        (lambda: MultiHeadAttention(8, 2)(torch.ones(2, 5, 8), torch.ones(2, 5, 6)), r"d_model=8\), got \(2, 5, 6\)"),
        (lambda: RecallConfig(d_model=10, n_heads=3), r"d_model=10 is not divisible by n_heads=3"),
        (lambda: window_mask(5, 0), r"window_size must be >= 1, got 0"),
        (lambda: dilated_mask(5, 2, 0), r"dilation must be >= 1, got 0"),
        (lambda: causal_mask(-1), r"lengths >= 0, got n_query=-1"),
        (lambda: prefix_mask(5, 6), r"n_prefix=6 must be in 0..5, the number of keys"),
        (lambda: random_mask(5, 0, generator()), r"n_random=0 must be in 1..5"),
        (lambda: random_mask(5, 9, generator(), n_key=8), r"n_random=9 must be in 1..8"),
        (lambda: random_mask(-1, 2, generator(), n_key=8), r"lengths >= 0, got n_query=-1, n_key=8"),
        (lambda: padding_mask(torch.ones(3)), r"token_ids must have shape \(batch, key\), got \(3,\)"),
        (lambda: document_mask(torch.ones(3)), r"document_ids must have shape \(batch, seq\), got \(3,\)"),
        (lambda: tiled_attention(*qkv(), tile_size=0), r"tile_size must be >= 1, got 0"),
        (lambda: plot_heads(torch.ones(3, 3)), r"weights must have shape \(heads, query, key\), got \(3, 3\)"),
        (lambda: linear_attention(*qkv(), causal=True), r"as many queries as keys, got 5 and 7"),
        (lambda: DotAttention()(normal(1, 2, 3), normal(1, 2, 4)), r"queries have width 3 but keys 4"),
        (lambda: alignment_batch("sort", 1, 4, generator()), r"unknown task 'sort'; use one of copy, recall"),
        (lambda: AlignmentConfig(n_symbols=1), r"n_symbols must be finite and >= 2 and <= 32, got 1"),
        (lambda: AlignmentConfig(learning_rate=math.nan), r"learning_rate must be finite and > 0, got nan"),
        (lambda: RecallConfig(n_pairs=17), r"n_pairs must be finite and >= 1 and <= 16, got 17"),
        (lambda: CostConfig(tile_size=0), r"tile_size must be finite and >= 1, got 0"),
        (lambda: CostConfig(shortest=64, longest=32), r"longest must be finite and >= 64, got 32"),
        (lambda: AttentionOnlyModel(20, 8, 12, 3, 1)(torch.ones(1, 9, dtype=torch.long)), r"length 9 exceeds .* 8"),
        (
            lambda: AttentionOnlyModel(20, 8, 12, 3, 1)(torch.full((1, 4), 20)),
            r"token id 20 >= vocab_size 20 at \[0, 0\]",
        ),
        (lambda: model_of(BahdanauSeq2Seq)(*source()[:2], torch.full((2, 2), 13)), r"token id 13 >= vocab_size 13"),
        (
            lambda: model_of(BahdanauSeq2Seq)(*source()[:2], torch.ones(2, 0, dtype=torch.long)),
            r"tgt_ids must have shape \(batch=2, tgt >= 1\), got \(2, 0\)",
        ),
        (
            lambda: model_of(BahdanauSeq2Seq)(*source()[:2], torch.ones(3, 4, dtype=torch.long)),
            r"\(batch=2, tgt >= 1\), got \(3, 4\)",
        ),
        (
            lambda: AttentionOnlyModel(20, 8, 12, 3, 1)(torch.ones(5, dtype=torch.long)),
            r"token_ids must have shape \(batch, seq\), got \(5,\)",
        ),
        (lambda: AttentionOnlyModel(20, 8, 12, 3, 0), r"n_layers must be finite and >= 1, got 0"),
        (
            lambda: AdditiveAttention(3, 4, 5)(normal(2, 5, 3), normal(1, 7, 4)),
            r"one batch, got \(2, 5, 3\) and \(1, 7",
        ),
        (
            lambda: MultiHeadAttention(8, 2)(torch.ones(2, 5, 8), torch.ones(3, 7, 8)),
            r"batch and heads of queries, keys and values do not fit each other: \[\(2, 2, 5, 4\), \(3, 2, 7, 4\)\]",
        ),
        (lambda: without_head(MultiHeadAttention(8, 2), 2).__enter__(), r"head=2 must be in 0..1"),
        (lambda: without_head(MultiHeadAttention(8, 2), -1).__enter__(), r"head=-1 must be in 0..1"),
        (
            lambda: score_alignment(torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
            r"links must be bool and of the weights' shape \(2, 3, 4\), got torch.float32",
        ),
        (lambda: AdditiveAttention(3, 4, 5)(normal(2, 5, 4), normal(2, 7, 4)), r"query must have width 3, got \(2, 5"),
        (lambda: GeneralAttention(3, 4)(normal(2, 5, 3), normal(2, 7, 3)), r"memory must have width 4, got \(2, 7"),
        (lambda: GeneralAttention(3, 4).double()(normal(2, 5, 4), normal(2, 7, 4)), r"queries have width 4 but keys 3"),
        (lambda: ConcatAttention(3, 4, 5)(normal(2, 5, 4), normal(2, 7, 4)), r"together must have width 7, got"),
        (lambda: topic.attention_work(0, 5, 3, 8), r"n_query must be finite and >= 1, got 0"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named() -> None:
    """The average of integers would be cut to integers, and a window of 1.5 or nan keys be cut somehow."""
    whole = torch.ones(2, 3, 5, 4, dtype=torch.long)
    for attend in (scaled_dot_product_attention, tiled_attention, linear_attention):
        for q in (whole, whole > 0):
            with pytest.raises(TypeError, match="attention needs floating-point tensors, got .torch"):
                attend(q, whole, whole)
    for call, message in (
        (lambda: window_mask(5, math.nan), "window_size must be an integer, got nan"),
        (lambda: dilated_mask(5, 2, 1.5), r"dilation must be an integer, got 1\.5"),
        (lambda: prefix_mask(5, 1.5), r"n_prefix must be an integer, got 1\.5"),
        (lambda: tiled_attention(*qkv(), tile_size=True), "tile_size must be an integer, got True"),
        (lambda: scaled_dot_product_attention(*qkv(), mask=[[True]]), "mask must be a tensor of bool, got list"),
        (lambda: scaled_dot_product_attention(*qkv(), bias=1.0), "bias must be a tensor of numbers, got float"),
        (lambda: MultiHeadAttention(8, 2).load_torch(nn.Linear(8, 8)), "expected an nn.MultiheadAttention, got Linear"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("attend", [scaled_dot_product_attention, tiled_attention])
def test_bad_masks_and_shapes_are_named(attend) -> None:
    q, k, v = qkv(BATCH, HEADS)
    for bad in (torch.ones(QUERY, KEY), torch.zeros(QUERY, KEY, dtype=torch.long)):
        with pytest.raises(ValueError, match=re.escape(f"mask must be bool (True = may attend), got {bad.dtype}")):
            attend(q, k, v, bad)
    wrong = [(KEY, QUERY), (BATCH, QUERY, KEY), (1, BATCH, HEADS, QUERY, KEY), (QUERY,), (BATCH, 1, 1, KEY + 1)]
    for shape in wrong:
        message = f"mask has shape {shape}, expected one that broadcasts to the scores (..., query, key) = (2, 3, 5, 7)"
        with pytest.raises(ValueError, match=re.escape(message)):
            attend(q, k, v, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="queries have width 4 but keys 6; a dot product needs them equal"):
        attend(q, v, v)
    with pytest.raises(ValueError, match="there are 7 keys but 6 values"):
        attend(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="queries have width 0 but keys 0; .* and at least 1"):
        attend(q[..., :0], k[..., :0], v)
    with pytest.raises(ValueError, match=re.escape("need axes (..., position, width), got [(4,), (7, 4), (7, 6)]")):
        attend(q[0, 0, 0], k[0, 0], v[0, 0])
    with pytest.raises(ValueError, match=re.escape("[(2, 3, 5, 4), (2, 2, 7, 4), (2, 3, 7, 6)]")):
        attend(q, k[:, :2], v)


def test_a_bool_bias_is_refused() -> None:
    """A public bug: a bool mask added to the scores raises the allowed ones by 1 and blocks nothing."""
    with pytest.raises(ValueError, match="got torch.bool, which would add 1; pass it as mask"):
        scaled_dot_product_attention(*qkv(), bias=causal_mask(QUERY, KEY))
    with pytest.raises(ValueError, match=re.escape("bias has shape (7, 5), expected")):
        scaled_dot_product_attention(*qkv(), bias=normal(KEY, QUERY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
def test_a_bias_takes_the_type_of_the_scores(dtype: torch.dtype) -> None:
    """Distances are whole numbers and tables often float64; neither may change the type of what comes out."""
    q, k, v = (tensor.detach().float() for tensor in qkv(BATCH, HEADS))
    bias = -key_distance(QUERY, KEY).abs()
    ours = scaled_dot_product_attention(q, k, v, bias=bias.to(dtype))
    expected = scaled_dot_product_attention(q, k, v, bias=bias.float())
    assert all(
        torch.equal(mine, other) and mine.dtype == torch.float32 for mine, other in zip(ours, expected, strict=True)
    )


def test_a_mask_of_three_axes_is_refused_by_multi_head() -> None:
    """One mask for each sequence would be read as one for each head, without a word where batch = heads."""
    layer, x = MultiHeadAttention(D_MODEL, BATCH), torch.randn(BATCH, QUERY, D_MODEL)
    mask = some_mask(BATCH, QUERY, QUERY)
    with pytest.raises(
        ValueError, match=re.escape("use mask[:, None] for one per sequence, mask[None] for one per head")
    ):
        layer(x, mask=mask)
    (_, per_sequence), (_, per_head) = layer(x, mask=mask[:, None]), layer(x, mask=mask[None])
    assert (per_sequence[0][:, ~mask[0]] == 0).all() and (per_head[:, 0, ~mask[0]] == 0).all()
    assert layer(x, mask=mask[:1])[1].shape == (BATCH, BATCH, QUERY, QUERY)


def test_cross_attention_splits_the_memory_by_its_own_length() -> None:
    """A public bug: keys reshaped with the query's length. Where both lengths agree nothing shows, so they differ."""
    layer = MultiHeadAttention(D_MODEL, 3)
    for n_query, n_key in ((5, 7), (7, 5), (1, 9), (6, 3)):
        output, weights = layer(torch.randn(BATCH, n_query, D_MODEL), torch.randn(BATCH, n_key, D_MODEL))
        assert output.shape == (BATCH, n_query, D_MODEL) and weights.shape == (BATCH, 3, n_query, n_key)
    memory = torch.randn(BATCH, KEY, D_MODEL)
    k, _ = layer.keys_values(memory)
    torch.testing.assert_close(k[1, 2, 3], layer.k_proj(memory)[1, 3, 8:12])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--n-symbols", "1"], "n_symbols must be finite and >= 2"),
        (["demo", "--break", "typo"], "invalid choice: 'typo'"),
        (["figures", "typo"], "unknown experiment 'typo'; choose from width, linear, memory"),
        (["figures", "--shrink", "0"], "shrink must be finite and >= 1, got 0"),
        (["demo", "--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
        (["heads", "--d-model", "10", "--n-heads", "3"], "d_model=10 is not divisible by n_heads=3"),
        (["bench", "--tile-size", "0"], "tile_size must be finite and >= 1, got 0"),
        (["bench", "--window", "3"], "unrecognized arguments"),
    ],
)
def test_command_line_mistakes_are_one_line(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


# Learning


TINY = AlignmentConfig(n_symbols=5, d_model=24, batch_size=24, max_steps=70, learning_rate=1.5e-2)
CPU = RunConfig(device="cpu")


def test_fresh_models_know_nothing() -> None:
    """The loss at init is near ln(vocab): no token is favoured."""
    _, batches = recall_model(RecallConfig(), CPU)
    inputs, targets = next(batches)
    torch.manual_seed(0)
    losses = {"AttentionOnlyModel": F.cross_entropy(recall_model(RecallConfig(), CPU)[0](inputs).mT, targets)}
    batch = alignment_batch("copy", 64, 8, generator())
    for model_cls in (BahdanauSeq2Seq, LuongSeq2Seq):
        logits = model_cls(VOCAB_SIZE, VOCAB_SIZE, 64)(*batch[:3])
        losses[model_cls.__name__] = F.cross_entropy(logits.mT, batch[3])
    for name, loss in losses.items():
        assert abs(loss.item() - math.log(VOCAB_SIZE)) < 0.8, name


@pytest.mark.parametrize("model_cls", [BahdanauSeq2Seq, LuongSeq2Seq])
def test_one_batch_can_be_learned_by_heart(model_cls: type) -> None:
    torch.manual_seed(0)
    model = model_cls(VOCAB_SIZE, VOCAB_SIZE, 32)
    *inputs, targets, _ = alignment_batch("copy", 8, 5, generator())
    losses = topic.fit(model, itertools.repeat((*inputs, targets)), 80, 1e-2)
    assert losses[-1] < 0.1 < 2 < losses[0] and accuracy(model(*inputs), targets) == 1


@pytest.mark.parametrize(
    ("task", "model_cls", "config"),
    [
        ("copy", BahdanauSeq2Seq, TINY),
        (
            "recall",
            LuongSeq2Seq,
            AlignmentConfig(n_symbols=6, d_model=32, batch_size=48, max_steps=140, learning_rate=6e-3),
        ),
    ],
)
def test_attention_learns_what_the_fixed_vector_does_not(task: str, model_cls: type, config: AlignmentConfig) -> None:
    """Same batches and steps, at least as many parameters without attention; the alignment is the true one."""
    plain, attentive = compare_on_task(task, model_cls, config, CPU)
    assert plain.n_parameters >= attentive.n_parameters and plain.n_parameters < 1.1 * attentive.n_parameters
    assert attentive.accuracy > plain.accuracy + 0.1 and plain.accuracy > 2 / N_KINDS
    assert attentive.precision > 0.5 and attentive.recall > 0.3, "chance is below 0.25"
    assert plain.weights is None and attentive.weights.shape[0] == 512 and len(plain.losses) == config.max_steps


def test_a_broken_padding_mask_is_seen_in_the_weights() -> None:
    """Inverted: all weight lies on padding. Filled as bool: some of it does. Sound: none."""
    _, src_lengths, *_ = topic.held_out("copy", TINY, 0)
    on_padding = {}
    for name in topic.BREAKS:
        config = AlignmentConfig(n_symbols=5, d_model=8, batch_size=4, max_steps=2, break_=name)
        weights = compare_on_task("copy", BahdanauSeq2Seq, config, CPU)[1].weights
        on_padding[name] = topic.padding_share(weights, src_lengths)
    assert on_padding["none"] == 0 < on_padding["bool-fill"] < 1 == on_padding["inverted-mask"]


def test_a_broken_causal_mask_scores_well_until_the_future_is_missing() -> None:
    """Both breaks read the answer from the next token; the sound model reads the same with and without a future."""
    config = RecallConfig(n_pairs=2, d_model=32, batch_size=32, learning_rate=1e-2, max_steps=120)
    seen, alone = {}, {}
    for name in topic.BREAKS:
        max_steps = 20 if name == "none" else config.max_steps  # the sound mask needs no training to be sound
        trial = replace(config, break_=name, max_steps=max_steps)
        model, inputs, targets = topic.trained_on_recall(trial, CPU)
        with torch.no_grad():
            seen[name] = accuracy(model(inputs), targets)
        alone[name] = topic.accuracy_without_future(model, inputs, targets)
    assert alone["none"] == seen["none"]
    # Inverted: the first of two questions is answered from what follows, the last has no future to look at.
    assert 0.45 < seen["inverted-mask"] < 0.62 and alone["inverted-mask"] < 0.15
    assert seen["bool-fill"] > alone["bool-fill"] + 0.2


def test_bool_fill_blocks_nothing_and_adds_the_same_to_every_score() -> None:
    """masked_fill(-inf) on bools writes bool(-inf), True; as a number it is 1 everywhere, and softmax ignores it."""
    mask = causal_mask(4)
    filled = topic.BREAKS["bool-fill"](mask)
    assert filled.dtype == torch.bool and filled.all()
    scores = normal(4, 4)
    torch.testing.assert_close((scores + filled).softmax(-1), scores.softmax(-1), rtol=0, atol=1e-12)


def test_same_seed_same_result_and_another_seed_another() -> None:
    config = AlignmentConfig(n_symbols=4, d_model=6, batch_size=4, max_steps=3)
    first, again = (compare_on_task("recall", LuongSeq2Seq, config, CPU)[1] for _ in range(2))
    other = compare_on_task("recall", LuongSeq2Seq, config, RunConfig(seed=1, device="cpu"))[1]
    assert first.losses == again.losses and torch.equal(first.weights, again.weights) and first.losses != other.losses


def test_held_out_sequences_are_not_the_training_stream() -> None:
    """A test set drawn with the training seed would be the first training batches again."""
    for task in topic.TASKS:
        for seed in range(3):
            drawn = alignment_batch(task, 512, TINY.n_symbols, generator(seed))
            assert not torch.equal(topic.held_out(task, TINY, seed)[0], drawn[0])
    config = RecallConfig(batch_size=512)
    _, batches = recall_model(config, CPU)
    assert not torch.equal(topic.fresh_recall(config, CPU.seed)[0], next(batches)[0])


def test_matched_width_is_the_smallest_that_is_large_enough() -> None:
    width = matched_width(Seq2Seq, 20_000)
    sizes = [topic.count_parameters(Seq2Seq(VOCAB_SIZE, VOCAB_SIZE, d)) for d in (width - 1, width)]
    assert sizes[0] < 20_000 <= sizes[1]


def test_silencing_a_head_removes_exactly_its_share(parity) -> None:
    """The output is a sum over heads: what one contributes is what is missing without it."""
    layer, x = both_layers(3)[0], normal(BATCH, QUERY, D_MODEL)
    whole, weights = layer(x)
    missing = []
    for head in range(3):
        with without_head(layer, head):
            missing.append(whole - layer(x)[0])
    assert torch.equal(layer(x)[0], whole), "the hook is gone"
    v = layer.keys_values(x)[1]
    columns = layer.out_proj.weight.unflatten(1, (3, 4))  # (d_model, heads, d_head)
    expected = [(weights[:, h] @ v[:, h]) @ columns[:, h].T for h in range(3)]
    parity("without_head", "the head's own product", "invariant", missing, expected, 1e-12)
    total = sum(missing) + layer.out_proj.bias
    parity("MultiHeadAttention", "sum over heads", "invariant", total, whole, 1e-12)


def test_ablation_finds_the_only_head_that_matters() -> None:
    """Heads without output weights can go; the one that is left cannot."""
    config = RecallConfig(n_pairs=2, d_model=16, n_heads=4, n_layers=1)
    model, batches = recall_model(config, CPU)
    inputs, targets = next(batches)
    with torch.no_grad():
        model.layers[0].out_proj.weight[:, 4:] = 0  # only head 0 reaches the output
        predicted = torch.where(targets == IGNORE, IGNORE, model(inputs).argmax(-1))
    (row,) = ablate_heads(model, inputs, predicted)
    assert row[1:] == [1.0] * 3 and row[0] < 1


def test_the_division_is_a_smaller_start_and_a_smaller_step() -> None:
    """With Adam: dividing scores by sqrt(d_head) = starting the queries, and stepping them, that much smaller."""
    divided, undivided = both_layers(3)[0], both_layers(3)[0]
    factor, undivided.scale = divided.scale, 1.0
    with torch.no_grad():
        for parameter in undivided.q_proj.parameters():
            parameter *= factor
    own = {id(parameter) for parameter in undivided.q_proj.parameters()}
    others = [parameter for parameter in undivided.parameters() if id(parameter) not in own]
    groups = [{"params": undivided.q_proj.parameters(), "lr": 1e-2 * factor}, {"params": others}]
    x, target, mask = normal(BATCH, KEY, D_MODEL), normal(BATCH, KEY, D_MODEL, seed=1), causal_mask(KEY)
    outputs = []
    for layer, parameters in ((divided, divided.parameters()), (undivided, groups)):
        optimizer = torch.optim.Adam(parameters, lr=1e-2, eps=1e-30)
        start = layer(x, mask=mask)[0].detach()
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x, mask=mask)[0] - target).square().mean().backward()
            optimizer.step()
        outputs.append(layer(x, mask=mask)[0].detach())
    assert (outputs[0] - start).abs().max() > 0.1, "it has moved"
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-9)


def test_padding_share_and_guessed_alignment_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.5], [0.2, 0.8]], [[0.5, 0.5], [1.0, 0.0]]])
    assert topic.padding_share(weights, torch.tensor([1, 2])) == pytest.approx((0.5 + 0.8) / 4)
    links = torch.tensor([[[1, 0], [0, 0]], [[1, 0], [0, 1]]], dtype=torch.bool)  # one link of 1 token, two of 2
    assert topic.guessed_alignment(links, torch.tensor([1, 2])) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_attention_work_counts_what_pytorch_counts(parity) -> None:
    """FLOPs against PyTorch's own counter; bytes by adding up the tensors that are read and written."""
    q, k, v = (torch.randn(1, 3, n, 8) for n in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        _, weights = scaled_dot_product_attention(q, k, v)
    work = topic.attention_work(5, 7, n_heads=3, d_head=8, number_bytes=4)
    parity("attention_work", "torch.utils.flop_counter", "output", work.flops, counter.get_total_flops(), 0.0)
    ends = q.nbytes + k.nbytes + v.nbytes + q.nbytes  # the output has the shape of the queries
    assert work.fused_bytes == ends and work.naive_bytes == ends + 4 * weights.nbytes
    assert work.naive_intensity == work.flops / work.naive_bytes < work.fused_intensity == work.flops / ends


def test_attention_only_model_adds_pytorchs_layers_to_a_residual_stream(parity) -> None:
    """Each layer adds its output to what it read; layers that write nothing leave embedding plus position."""
    torch.manual_seed(0)
    model, token_ids = AttentionOnlyModel(20, 9, 12, 3, 2).double(), torch.randint(20, (2, 7), generator=generator())
    peers = [layer.to_torch() for layer in model.layers]
    stream, looks = model.token_emb(token_ids) + model.pos_emb.weight[:7], []
    for peer in peers:
        mixed, weights = peer(stream, stream, stream, attn_mask=~causal_mask(7), average_attn_weights=False)
        stream = stream + mixed
        looks.append(weights)
    ours, theirs = model.look(token_ids), (model.lm_head(stream), torch.stack(looks))
    oracle, logits = "nn.MultiheadAttention on a residual stream", model(token_ids)
    parity("AttentionOnlyModel", oracle, "output", [logits, *ours], [theirs[0], *theirs], 1e-10)
    around = [model.token_emb.weight, model.pos_emb.weight, model.lm_head.weight]
    parity("AttentionOnlyModel", oracle, "gradient", gradients(logits, around), gradients(theirs[0], around), 1e-10)
    for layer in model.layers:
        nn.init.zeros_(layer.out_proj.weight)
    plain = model.lm_head(model.token_emb(token_ids) + model.pos_emb.weight[:7])
    torch.testing.assert_close(model(token_ids), plain, rtol=0, atol=1e-12)


def test_attention_only_model_is_causal_and_recalls() -> None:
    # Recall comes in one jump, at a step that depends on the seed: this one has jumped by then.
    config = RecallConfig(n_pairs=3, d_model=48, n_heads=2, batch_size=32, max_steps=350, learning_rate=7e-3)
    model, batches = recall_model(config, CPU)
    topic.fit(model, batches, config.max_steps, config.learning_rate)
    inputs, targets = recall_batch(256, 3, generator(5), N_KINDS)
    right = accuracy(model(inputs), targets)
    assert right > 0.6, f"chance is {1 / N_KINDS:.3f}, a blind pick among the shown values 0.375, got {right}"
    changed = inputs.clone()
    changed[:, 6:] = 5
    assert torch.equal(model(changed)[:, :6], model(inputs)[:, :6])
    weights = model.look(inputs)[1]
    assert weights.shape == (2, 256, 2, 12, 12) and (weights.triu(1) == 0).all()
    assert min(min(row) for row in ablate_heads(model, inputs, targets)) < right - 0.1


# Figures and verbs


def test_figures_show_the_data_they_are_given() -> None:
    weights = torch.rand(3, 4, 5, generator=generator())
    figure = plot_heads(weights, title="t")
    assert isinstance(figure, Figure) and len(figure.axes) == 4  # three heads and the colour bar
    for head in range(3):
        shown = torch.tensor(figure.axes[head].images[0].get_array())
        assert torch.equal(shown.float(), weights[head]) and figure.axes[head].get_title() == f"head {head}"
    labelled = plot_heads(torch.rand(1, 2, 2), ["a", "b"])
    assert [label.get_text() for label in labelled.axes[0].get_xticklabels()] == ["a", "b"]


def test_recall_tokens_are_named_keys_and_values_in_turn() -> None:
    inputs, _ = recall_batch(20, 5, generator(), N_KINDS)
    for row in inputs:
        names = topic.token_names(row)
        assert [name[0] for name in names] == list("kv" * 5 + "<" + "kv" * 4 + "k") and names[10] == "<eos>"
        shown = dict(zip(names[:10:2], names[1:10:2], strict=True))
        assert all(shown[key] == value for key, value in zip(names[11::2], names[12::2], strict=False))
    assert VOCAB_SIZE == 4 + 2 * N_KINDS and topic.token_names(torch.arange(VOCAB_SIZE))[-1] == f"v{N_KINDS - 1}"


def test_demo_shows_chance_beside_accuracy_and_alignment(tmp_path, capsys) -> None:
    flags = "--n-symbols 4 --d-model 16 --batch-size 24 --max-steps 40 --learning-rate 2e-2".split()
    main([*flags, "--device", "cpu", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    cells = re.findall(r"^(copy|recall) +(\w+) +([\d,]+ +)?([\d.]+)%", output, re.MULTILINE)
    score = {(task, model): float(percent) for task, model, _, percent in cells}
    assert score["copy", "chance"] == score["recall", "chance"] == 6.2
    assert score["copy", "BahdanauSeq2Seq"] > 25 and score["recall", "LuongSeq2Seq"] > 25
    assert re.search(r"copy +BahdanauSeq2Seq.*% +[01]\.\d\d +[01]\.\d\d +0\.0%\n", output)
    for task in topic.TASKS:
        assert (tmp_path / f"alignment_{task}.svg").stat().st_size > 1000


def test_demo_shows_the_symptom_of_a_broken_mask(tmp_path, capsys) -> None:
    flags = "--n-symbols 4 --d-model 8 --batch-size 4 --max-steps 2 --break inverted-mask".split()
    main([*flags, "--device", "cpu", "--out", str(tmp_path)])
    assert re.search(r"copy +BahdanauSeq2Seq.* 100\.0%\n", capsys.readouterr().out), "all weight on padding"


def test_the_other_verbs_run(tmp_path, capsys) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path)]
    small = ["--n-pairs", "2", "--d-model", "16", "--n-heads", "2", "--batch-size", "8", "--max-steps", "4"]
    main(["heads", *small, *out])
    text = capsys.readouterr().out
    assert "chance 6.2%" in text and text.count("head 1") == 2 and "are not there yet" in text
    main(["bench", "--shortest", "16", "--longest", "64", "--tile-size", "16", "--n-repeats", "1", *out])
    text = capsys.readouterr().out
    assert text.count("beside PyTorch: ") == 9 and text.count("PyTorch's attention") == 3 and "tiled length^" in text
    assert "beside nn.MultiheadAttention: " in text and text.count("x the speed") == 10
    assert {path.name for path in tmp_path.iterdir()} == {"heads_layer_0.svg", "heads_layer_1.svg"}


def test_alignment_figure_marks_the_true_links() -> None:
    config = AlignmentConfig(n_symbols=4, d_model=6, batch_size=4, max_steps=2)
    results = compare_on_task("recall", LuongSeq2Seq, config, CPU)
    links = topic.held_out("recall", config, 0)[-1]
    right = plot_alignment(results, links).axes[1]
    counted = links[0, links[0].any(dim=1)]  # every sequence of recall has as many links
    points = {(int(x), int(y)) for x, y in right.collections[0].get_offsets().tolist()}
    assert points == {(j, i) for i, j in counted.nonzero().tolist()} and len(points) == 2
    shown = torch.tensor(right.images[0].get_array())
    assert torch.equal(shown.float(), results[1].weights[0, links[0].any(dim=1)])


def unreached(path: str, checked) -> list[int]:
    """Lines of a file with a shape comment that are not among the checked places."""
    commented = {
        number
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"(=|return) .*  # \([a-z0-9_*, ]+\)", line) and not re.match(r"    \w+: ", line)
    }
    return sorted(commented - {int(place.rpartition(":")[2]) for place in checked})


def test_shape_comments_are_true(checked_shapes, tmp_path) -> None:
    """Four-axis inputs, as the comments say; every commented line of the module has to be reached."""
    inputs = [tensor.float() for tensor in qkv(BATCH, HEADS)]
    mask = some_mask(QUERY, KEY)
    with checked_shapes(topic) as checked:
        scaled_dot_product_attention(*inputs, mask, bias=torch.zeros(QUERY, KEY))
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        tiled_attention(*leaves, mask, causal=True, tile_size=3).sum().backward()
        linear_attention(*inputs)
        linear_attention(inputs[1], *inputs[1:], causal=True)
        for build in SCORES.values():
            layer = build().float()
            d_query = D_MEMORY if isinstance(layer, DotAttention) else D_QUERY
            layer(torch.randn(BATCH, QUERY, d_query), torch.randn(BATCH, KEY, D_MEMORY))
        padding_mask(torch.ones(2, 3)), document_mask(torch.ones(2, 3)), random_mask(2, 3, generator(), 5)
        prefix_mask(3, 2, 5), window_mask(3, 2, 5)
        MultiHeadAttention(12, 3)(torch.randn(2, 5, 12), torch.randn(2, 7, 12))
        config = AlignmentConfig(n_symbols=5, d_model=6, batch_size=3, max_steps=1)
        for task, model_cls in (("copy", BahdanauSeq2Seq), ("recall", LuongSeq2Seq)):
            compare_on_task(task, model_cls, config, CPU)
        model_of(LuongSeq2Seq).align(*source())
        model, batches = recall_model(RecallConfig(n_pairs=2, d_model=6, n_heads=3, batch_size=2, max_steps=1), CPU)
        inputs, targets = next(batches)
        ablate_heads(model, inputs, targets)
        topic.accuracy_without_future(model, inputs, targets)
        topic.padding_share(torch.ones(2, 3, 4), torch.tensor([1, 4]))
    missing = unreached(topic.__file__, checked)
    assert not missing, f"shape comments that no line of this test runs: {missing}"
    assert len(checked) > 50
