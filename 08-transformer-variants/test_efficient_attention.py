"""Topic 08: efficient attention against dense attention under the same mask, against Hugging Face, and on average."""

import math

import pytest
import torch
from torch import nn

import efficient_attention as topic
from attention_experiments import peak_memory
from attention_mechanisms import (
    MultiHeadAttention,
    causal_mask,
    linear_attention,
    scaled_dot_product_attention,
    window_mask,
)
from efficient_attention import (
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SparseAttention,
    SparsePattern,
    attention_flops,
    bigbird_pattern,
    kernel_variance,
    linformer_attention,
    longformer_pattern,
    orthogonal_gaussian,
    performer_attention,
    positive_random_features,
    sparse_attention,
    trigonometric_features,
)
from transformer_architecture import MatmulCounter
from workbench import seed_everything

BATCH, HEADS, SEQ, D_HEAD = 2, 3, 23, 4  # all different; 23 is no multiple of any block
D_MODEL = HEADS * D_HEAD


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(seq: int = SEQ) -> list[torch.Tensor]:
    return [torch.randn(BATCH, HEADS, seq, D_HEAD, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


def compare(parity, name: str, oracle: str, actual, expected, inputs, tolerance: float = 1e-10) -> None:
    """Outputs, and the gradients of the inputs in a random direction."""
    parity(name, oracle, "output", actual, expected, tolerance)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, inputs, direction, retain_graph=True) for output in (actual, expected)]
    parity(name, oracle, "gradient", *gradients, tolerance)


# Sparse patterns


@pytest.mark.parametrize("window_size", [1, 2, 4, 6, 23, 40])
@pytest.mark.parametrize("global_ids", [(), (0,), (3, 17, 22)])
def test_longformer_equals_dense_attention_under_topic_3s_window(parity, window_size, global_ids) -> None:
    pattern, (q, k, v) = longformer_pattern(SEQ, window_size, global_ids), qkv()
    window = window_mask(SEQ, window_size)
    mask = window | window.T
    mask[list(global_ids)], mask[:, list(global_ids)] = True, True
    assert torch.equal(pattern.mask(), mask)
    expected = scaled_dot_product_attention(q, k, v, mask)[0]
    compare(
        parity,
        "sparse_attention (Longformer)",
        "dense, masked",
        sparse_attention(q, k, v, pattern),
        expected,
        [q, k, v],
    )


@pytest.mark.parametrize(("block_size", "n_global", "n_random"), [(4, 0, 0), (4, 1, 2), (3, 2, 1), (2, 1, 5)])
def test_bigbird_equals_dense_attention_under_its_mask(parity, block_size, n_global, n_random) -> None:
    pattern, (q, k, v) = bigbird_pattern(SEQ, block_size, n_global, n_random, generator()), qkv()
    mask, n_blocks = pattern.mask(), -(-SEQ // block_size)
    expected = scaled_dot_product_attention(q, k, v, mask)[0]
    compare(
        parity, "sparse_attention (BigBird)", "dense, masked", sparse_attention(q, k, v, pattern), expected, [q, k, v]
    )
    by_block = torch.zeros(n_blocks * block_size, n_blocks * block_size, dtype=torch.bool)
    by_block[:SEQ, :SEQ] = mask
    by_block = by_block.unflatten(0, (n_blocks, -1)).unflatten(2, (n_blocks, -1)).any(dim=3).any(dim=1)
    for block in range(n_global, n_blocks):  # near, global and exactly n_random different others
        near = set(range(max(0, block - 1), min(n_blocks, block + 2))) | set(range(n_global))
        seen = set(by_block[block].nonzero()[:, 0].tolist())
        assert near <= seen and len(seen - near) == n_random
    assert mask[: n_global * block_size].all() and mask[:, : n_global * block_size].all()


def test_a_window_over_everything_is_full_attention(parity) -> None:
    q, k, v = qkv()
    everything = sparse_attention(q, k, v, longformer_pattern(SEQ, SEQ))
    parity(
        "sparse_attention", "full attention", "invariant", everything, scaled_dot_product_attention(q, k, v)[0], 1e-10
    )


def test_sparse_attention_needs_memory_linear_in_the_length() -> None:
    def peak(seq: int) -> int:
        inputs = [torch.randn(1, 2, seq, 8) for _ in "qkv"]
        return peak_memory(lambda: sparse_attention(*inputs, longformer_pattern(seq, 9, (0,))))

    small, twice, four_times = peak(256), peak(512), peak(1024)
    assert 1.9 < (four_times - twice) / (twice - small) < 2.1


def huggingface_longformer(window_size: int, seq: int, global_ids: tuple[int, ...]):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        attention_window=[2 * (window_size - 1)],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    mask = torch.zeros(BATCH, seq)
    mask[:, list(global_ids)] = 10000.0
    options = {
        "attention_mask": mask,
        "is_index_masked": mask < 0,
        "is_index_global_attn": mask > 0,
        "is_global_attn": bool(global_ids),
    }
    return layer, lambda x: layer(x, **options)[0]


@pytest.mark.parametrize("global_ids", [(), (0,), (5, 6, 21)])
def test_longformer_attention_equals_hugging_faces(parity, global_ids) -> None:
    """Their softmax is float32 whatever the input, hence the tolerance of one operation in float32."""
    window_size, seq = 5, 24  # they need a multiple of the whole window
    theirs, run_theirs = huggingface_longformer(window_size, seq, global_ids)
    ours = LongformerAttention(D_MODEL, HEADS, window_size, global_ids)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    names |= {ours_.replace("_proj", "_global_proj"): f"{name}_global" for ours_, name in names.items()}
    for ours_, name in names.items():
        layer = getattr(theirs, name)
        nn.init.normal_(layer.weight, std=0.5)
        nn.init.normal_(layer.bias, std=0.1)
        getattr(ours, ours_).load_state_dict(layer.state_dict())
    x = torch.randn(BATCH, seq, D_MODEL, requires_grad=True)
    actual, expected = ours.mix(x), run_theirs(x)
    compare(parity, "LongformerAttention", "transformers LongformerSelfAttention", actual, expected, [x], 1e-5)
    used = [name for name in names if global_ids or "global" not in name]
    direction = torch.randn_like(expected)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = (
        [getattr(ours, name).weight.grad for name in used],
        [getattr(theirs, names[n]).weight.grad for n in used],
    )
    parity("LongformerAttention", "transformers LongformerSelfAttention", "gradient", *gradients, 1e-4)


def test_longformer_attention_starts_as_sparse_attention_with_the_same_projections(parity) -> None:
    ours, x = LongformerAttention(D_MODEL, HEADS, 3, (1, 20)).double(), torch.randn(BATCH, SEQ, D_MODEL).double()
    plain = SparseAttention(D_MODEL, HEADS, longformer_pattern(SEQ, 3, (1, 20))).double()
    plain.load_state_dict(ours.state_dict(), strict=False)
    parity("LongformerAttention", "SparseAttention", "invariant", ours(x)[0], plain(x)[0], 1e-10)
    dense = MultiHeadAttention(D_MODEL, HEADS).double()
    dense.load_state_dict(plain.state_dict())
    expected = dense(x, mask=longformer_pattern(SEQ, 3, (1, 20)).mask())[0]
    parity("SparseAttention", "MultiHeadAttention, masked", "output", plain(x)[0], expected, 1e-10)


# Linformer


def test_linformer_with_identity_mixtures_is_full_attention(parity) -> None:
    (q, k, v), eye = qkv(), torch.eye(SEQ, dtype=torch.float64)
    expected = scaled_dot_product_attention(q, k, v)[0]
    compare(
        parity, "linformer_attention", "full attention", linformer_attention(q, k, v, eye, eye), expected, [q, k, v]
    )


def test_linformer_equals_its_equation(parity) -> None:
    q, k, v = qkv()
    key_mix, value_mix = torch.randn(2, 7, SEQ, dtype=torch.float64)
    scores = torch.einsum("bhqd,rn,bhnd->bhqr", q, key_mix, k) / math.sqrt(D_HEAD)
    expected = torch.einsum("bhqr,rn,bhnd->bhqd", scores.softmax(-1), value_mix, v)
    actual = linformer_attention(q, k, v, key_mix, value_mix)
    parity("linformer_attention", "equation 7", "output", actual, expected, 1e-10)


def test_linformer_leaves_out_padding(parity) -> None:
    (q, k, v), length = qkv(), 15
    mixes = torch.randn(2, 7, SEQ, dtype=torch.float64)
    real = (torch.arange(SEQ) < length).expand(BATCH, -1)
    short = [tensor[:, :, :length] for tensor in (q, k, v)]
    padded = linformer_attention(q, k, v, *mixes, real)[:, :, :length]
    alone = linformer_attention(*short, *mixes[:, :, :length])
    parity("linformer_attention", "unpadded", "invariant", padded, alone, 1e-10)
    layer, x = LinformerAttention(D_MODEL, HEADS, SEQ, 7).double(), torch.randn(BATCH, SEQ, D_MODEL).double()
    padded = layer(x, mask=real[:, None, None])[0][:, :length]
    parity("LinformerAttention", "unpadded", "invariant", padded, layer(x[:, :length])[0], 1e-10)


def test_linformer_layer_with_identity_mixtures_is_multi_head_attention(parity) -> None:
    ours, dense = LinformerAttention(D_MODEL, HEADS, SEQ, SEQ).double(), MultiHeadAttention(D_MODEL, HEADS).double()
    dense.load_state_dict({name: value for name, value in ours.state_dict().items() if "mix" not in name})
    for mix in (ours.key_mix, ours.value_mix):
        mix.data = torch.eye(SEQ, dtype=torch.float64)
    x = torch.randn(BATCH, SEQ, D_MODEL, dtype=torch.float64)
    parity("LinformerAttention", "MultiHeadAttention", "invariant", ours(x), dense(x), 1e-10)


# Performer


def test_orthogonal_rows_are_gaussian_and_orthogonal_within_a_block() -> None:
    rows = orthogonal_gaussian(4 * 5000 + 2, 4, generator())
    assert rows.shape == (20_002, 4)
    blocks = rows[:20_000].unflatten(0, (5000, 4))
    products = blocks @ blocks.transpose(1, 2)
    assert products.masked_fill(torch.eye(4, dtype=torch.bool), 0).abs().max() < 1e-12
    assert (blocks[0] @ blocks[1].T).abs().median() > 0.1  # blocks are independent of each other
    lengths = products.diagonal(dim1=1, dim2=2)  # chi-squared with 4 degrees: mean 4, variance 8
    assert abs(lengths.mean() - 4) < 5 * math.sqrt(8 / 20_000) and abs(lengths.var() - 8) < 1
    standard = blocks[:, 0]  # each row is standard normal in every feature
    assert standard.mean(dim=0).abs().max() < 5 / math.sqrt(5000) and (standard.var(dim=0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_features_are_unbiased_and_the_positive_ones_have_the_derived_variance(kind) -> None:
    """20,000 rows, each an estimate of its own; five standard errors, so a bias of 5 % of the kernel would show."""
    x, y = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)
    rows, exact = torch.randn(20_000, 3, dtype=torch.float64, generator=generator()), (x @ y).exp()
    features = {"positive": positive_random_features, "trigonometric": trigonometric_features}[kind]
    estimates = (features(x, rows) * features(y, rows)).unflatten(0, (-1, 20_000)).sum(dim=0) * 20_000
    error = estimates.std() / math.sqrt(20_000)
    assert abs(estimates.mean() - exact) < 5 * error < 0.05 * exact
    assert (estimates.min() > 0) == (kind == "positive")
    if kind == "positive":
        relative = (estimates.var() / exact.square()).item()
        assert abs(relative / kernel_variance(x, y, 1).item() - 1) < 0.2


def test_orthogonal_rows_keep_the_mean_and_lower_the_variance() -> None:
    x, y, n = torch.tensor([0.5, -0.4, 0.6, 0.2]).double(), torch.tensor([0.4, 0.3, 0.2, -0.2]).double(), 400_000
    draws, variances = (
        (torch.randn(n, 4, dtype=torch.float64, generator=generator()), orthogonal_gaussian(n, 4, generator())),
        [],
    )
    for rows in draws:
        products = positive_random_features(x, rows) * positive_random_features(y, rows) * n
        estimates = products.unflatten(0, (-1, 4)).mean(dim=1)
        assert abs(estimates.mean() - (x @ y).exp()) < 5 * estimates.std() / math.sqrt(n / 4)
        variances.append(estimates.var())
    assert variances[1] < 0.93 * variances[0]  # 0.87 with far more draws


def test_performer_equals_attention_with_its_kernel_and_converges_to_softmax(parity) -> None:
    q, k, v = (tensor.detach() for tensor in qkv())
    projection = orthogonal_gaussian(32, D_HEAD, generator())
    features = [positive_random_features(x * D_HEAD**-0.25, projection) for x in (q, k)]
    weights = features[0] @ features[1].transpose(-2, -1)
    for causal in (False, True):
        allowed = causal_mask(SEQ) if causal else torch.ones(SEQ, SEQ, dtype=torch.bool)
        expected = (weights * allowed) / (weights * allowed).sum(dim=-1, keepdim=True) @ v
        actual = performer_attention(q, k, v, projection, causal)
        parity("performer_attention", "its own kernel, dense", "output", actual, expected, 1e-10)
    q, k, errors = q / 2, k / 2, []  # the variance grows as exp(|q + k|^2): large scores would need far more features
    exact = scaled_dot_product_attention(q, k, v)[0]
    for n_features in (16, 256, 4096):
        draws = [performer_attention(q, k, v, orthogonal_gaussian(n_features, D_HEAD, generator(s))) for s in range(5)]
        errors.append(sum((draw - exact).square().mean().sqrt().item() for draw in draws) / 5)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05  # about a quarter for 16 times the features


def test_causal_performer_never_sees_the_future_and_its_chunks_do_not_matter(parity, monkeypatch) -> None:
    q, k, v = (tensor.detach() for tensor in qkv(150))
    projection = orthogonal_gaussian(8, D_HEAD, generator())
    before = performer_attention(q, k, v, projection, causal=True)
    k[:, :, 120:], v[:, :, 120:] = 40 * k[:, :, 120:], 7.0  # huge exponents: they may not erase the past either
    after = performer_attention(q, k, v, projection, causal=True)
    parity("performer_attention", "the past alone", "invariant", after[:, :, :120], before[:, :, :120], 1e-10)
    assert (after[:, :, 120:] - before[:, :, 120:]).abs().max() > 0.1
    whole, _ = topic.causal_performer, monkeypatch.setattr(topic, "causal_performer", lambda *args: whole(*args, 7))
    parity(
        "performer_attention",
        "another chunk size",
        "invariant",
        performer_attention(q, k, v, projection, True),
        after,
        1e-10,
    )


def test_performer_does_not_overflow_and_padding_rows_give_no_nan() -> None:
    q, k, v = (100 * tensor.float().detach() for tensor in qkv())
    for causal in (False, True):
        output = performer_attention(q, k, v, orthogonal_gaussian(16, D_HEAD, generator()), causal)
        assert output.isfinite().all()


def test_one_long_query_does_not_silence_the_others() -> None:
    """Weights sum to 1 in every row: where all values are 1, so is the output, though one query is 60 times longer."""
    q, k, v = (tensor.detach().clone() for tensor in qkv())
    q[:, :, 4] *= 60
    for causal in (False, True):
        output = performer_attention(q, k / 4, torch.ones_like(v), orthogonal_gaussian(16, D_HEAD, generator()), causal)
        assert (output - 1).abs().max() < 1e-9


def test_performer_layer_and_gradients_reach_every_parameter(parity) -> None:
    layer, x = PerformerAttention(D_MODEL, HEADS, 512).double(), 0.2 * torch.randn(BATCH, SEQ, D_MODEL).double()
    dense = MultiHeadAttention(D_MODEL, HEADS).double()
    dense.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "projection"})
    for mask in (None, causal_mask(SEQ)):
        close = (layer(x, mask=mask)[0] - dense(x, mask=mask)[0]).norm() / dense(x, mask=mask)[0].norm()
        assert close < 0.05
        q, k, v = (layer.split_heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        features = [positive_random_features(y * D_HEAD**-0.25, layer.projection) for y in (q, k)]
        weights = features[0] @ features[1].transpose(-2, -1)  # every estimate, which the layer never forms
        weights = weights if mask is None else weights.tril()
        mixed = (weights / weights.sum(dim=-1, keepdim=True)) @ v
        expected = layer.out_proj(mixed.transpose(1, 2).flatten(2))
        name = "PerformerAttention" if mask is None else "PerformerAttention, causal"
        compare(parity, name, "all pairs of its features", layer(x, mask=mask)[0], expected, list(layer.parameters()))
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in layer.named_parameters() if name != "k_proj.bias")
    same = PerformerAttention(D_MODEL, HEADS, 512, seed=0).projection
    assert torch.equal(same.double(), layer.projection) and layer.projection.requires_grad is False


def test_linear_attention_of_topic_3_is_another_kernel() -> None:
    """Neither reduces to the other: the kernels differ, only the order of the sums is the same."""
    q, k, v = (tensor.detach() for tensor in qkv())
    q, k = q / 2, k / 2
    exact = scaled_dot_product_attention(q, k, v)[0]
    projection = orthogonal_gaussian(2048, D_HEAD, generator())
    errors = [(other - exact).norm() for other in (performer_attention(q, k, v, projection), linear_attention(q, k, v))]
    assert errors[0] < 0.3 * errors[1]


# Costs, shapes and bad input


def test_flops_formula_equals_the_counted_products() -> None:
    seq, block = 48, 4
    q, k, v = (torch.randn(1, 1, seq, D_HEAD) for _ in "qkv")
    eye, projection = torch.randn(5, seq), torch.randn(6, D_HEAD)
    pattern = bigbird_pattern(seq, block, 0, 2, generator())
    works = {
        ("exact", 0): lambda: scaled_dot_product_attention(q, k, v),
        ("linformer", 5): lambda: linformer_attention(q, k, v, eye, eye),
        ("performer", 6): lambda: performer_attention(q, k, v, projection),
        ("sparse", 5 * block): lambda: sparse_attention(q, k, v, pattern),
    }
    for (kind, size), work in works.items():
        with MatmulCounter() as counter:
            work()
        assert counter.flops == attention_flops(kind, seq, D_HEAD, size), kind
    assert pattern.n_scores() == seq * 5 * block
    # 8 blocks of 3 queries meet 3 * 3 near keys and a global one; and the global query meets all 23
    assert longformer_pattern(23, 4, (0,)).n_scores() == 24 * (9 + 1) + 23


def test_shape_comments_hold(checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        q, k, v = qkv()
        x = torch.randn(BATCH, SEQ, D_MODEL)
        projection = orthogonal_gaussian(6, D_HEAD, generator())
        performer_attention(q, k, v, projection)
        performer_attention(q, k, v, projection, causal=True)
        trigonometric_features(q, projection)
        linformer_attention(q, k, v, *torch.randn(2, 7, SEQ).double(), torch.ones(BATCH, SEQ, dtype=torch.bool))
        LinformerAttention(D_MODEL, HEADS, SEQ, 5)(x, mask=torch.ones(BATCH, 1, 1, SEQ, dtype=torch.bool))
        for pattern in (longformer_pattern(SEQ, 4, (0, 9)), bigbird_pattern(SEQ, 3, 1, 2, generator())):
            sparse_attention(q, k, v, pattern)
            pattern.mask()
            SparseAttention(D_MODEL, HEADS, pattern)(x)
        LongformerAttention(D_MODEL, HEADS, 4, (0, 9))(x)
        PerformerAttention(D_MODEL, HEADS, 5)(x)
    assert len(checked) >= 40


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: longformer_pattern(SEQ, 0), "window_size and n_positions must be >= 1, got 0"),
        (lambda: longformer_pattern(SEQ, 3, (23,)), r"must be different positions in 0..22"),
        (lambda: longformer_pattern(SEQ, 3, (4, 4)), "must be different positions"),
        (lambda: bigbird_pattern(SEQ, 8, 1, 1, generator()), "23 positions make 3 blocks, fewer than 1 global, 3 near"),
        (lambda: bigbird_pattern(SEQ, 6, 1, 1, generator()), "23 positions make 4 blocks, fewer than 1 global, 3 near"),
        (lambda: bigbird_pattern(SEQ, 0, 1, 1, generator()), "must be >= 1"),
        (lambda: SparsePattern(SEQ, 8, torch.full((3, 1), 3)), "naming blocks below 3"),
        (lambda: linformer_attention(*qkv(), torch.randn(5, 23), torch.randn(4, 23)), "expected .* for both"),
        (
            lambda: LinformerAttention(12, 3, 8, 4)(torch.randn(1, 8, 12), mask=causal_mask(8)[None, None]),
            "can leave out padding",
        ),
        (lambda: SparsePattern(SEQ, 8, torch.zeros(2, 1, dtype=torch.long)), "a row for each of 3 blocks"),
        (lambda: sparse_attention(*qkv(22), longformer_pattern(SEQ, 3)), "for 23 positions, got 22 queries"),
        (
            lambda: linformer_attention(*qkv(), torch.randn(5, 22), torch.randn(5, 22)),
            r"expected \(rank, 23\) for both",
        ),
        (lambda: LinformerAttention(12, 3, 8, 9), r"rank=9 must be in 1..8"),
        (lambda: LinformerAttention(12, 3, 8, 4)(torch.randn(1, 9, 12)), "sequence length 9 exceeds max_seq_len 8"),
        (lambda: LinformerAttention(12, 3, 8, 4)(torch.randn(1, 8, 12), mask=causal_mask(8)), "padding"),
        (lambda: PerformerAttention(12, 3, 5)(torch.randn(1, 8, 12), mask=window_mask(8, 2)), "square causal one"),
        (lambda: orthogonal_gaussian(0, 4, generator()), "n_features must be >= 1, got 0"),
        (lambda: performer_attention(qkv(5)[0], *qkv(7)[1:], torch.randn(6, 4).double(), True), "got 5 and 7"),
        (
            lambda: LongformerAttention(12, 3, 2)(torch.randn(1, 8, 12), mask=causal_mask(8)),
            "takes no memory and no mask",
        ),
        (lambda: attention_flops("exakt", 8, 4, 0), "unknown kind 'exakt'"),
        (lambda: orthogonal_gaussian(4, 0, generator()), "d_head must be >= 1, got 0"),
        (lambda: performer_attention(*qkv(5), torch.randn(6, 9)), r"shape \(6, 9\), expected \(features, 4\)"),
        (lambda: SparsePattern(4, 2, torch.tensor([[0, 0], [1, -1]])), "must name different blocks, or -1 for none"),
        (lambda: SparsePattern(4, 2, torch.tensor([[0, -2], [1, -1]])), "must name different blocks, or -1 for none"),
    ],
)
def test_bad_input_gives_one_clear_line(work, message) -> None:
    with pytest.raises(ValueError, match=message):
        work()


@pytest.mark.parametrize("causal", [False, True])
def test_estimated_attention_to_nobody_is_0_as_exact_attention_is(causal) -> None:
    q, nobody = torch.randn(1, 2, 0 if causal else 5, 4), torch.randn(1, 2, 0, 4)
    got = performer_attention(q, nobody, nobody, torch.randn(6, 4), causal)
    assert torch.equal(got, torch.zeros_like(q))
