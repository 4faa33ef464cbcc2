"""Proofs of pruning: torch's own masks, storage that comes back, and smaller models that compute what zeros would."""

import copy

import pytest
import torch
from torch.nn.utils import prune as torch_prune

import pruning
from gptq import block_linears, input_statistics
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from pruning import (
    PruneConfig,
    block_influence,
    compress_two_of_four,
    csr_bytes,
    expand_two_of_four,
    head_scores,
    matrix_mask,
    pattern_mask,
    prune,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_weights,
    pruned,
    row_mask,
    sparsity_of,
    train_masked,
    wanda_scores,
)
from quantized_model import float_bytes
from training_transformers import TrainConfig
from workbench import RunConfig, seed_everything

SIZES = ModelConfig(vocab_size=60, d_model=24, n_layers=3, n_heads=6, n_kv_heads=3, d_head=4, d_ff=40, max_seq_len=64)
IDS = torch.arange(2, 36).reshape(2, 17)
BATCHES = [(IDS, torch.ones_like(IDS, dtype=torch.bool))]


def tiny(**changes) -> CausalLM:
    seed_everything(0)
    model = CausalLM(ModelConfig(**{**vars(SIZES), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_magnitude_mask_equals_torch(parity) -> None:
    layer = torch.nn.Linear(13, 7)
    with torch.no_grad():
        layer.weight.copy_(randn(7, 13))
    ours = matrix_mask(layer.weight.detach().abs(), 30 / 91)
    torch_prune.l1_unstructured(layer, "weight", amount=30)
    parity("matrix_mask", "torch.nn.utils.prune.l1_unstructured", "output", ours, layer.weight_mask.bool(), 0)


def test_row_mask_takes_as_many_from_each_row() -> None:
    scores = randn(5, 12) * torch.tensor([1, 10, 100, 1, 1.0])[:, None]
    mask = row_mask(scores, 0.5)
    assert (mask.sum(1) == 6).all()
    for row, kept in zip(scores, mask, strict=True):
        assert row[kept].min() > row[~kept].max()
    assert row_mask(scores, 0.0).all()
    for gone in (29, 57, 58):  # 0.29 * 100 is 28.999999999999996
        assert (~row_mask(randn(2, 100), gone / 100)).sum(1).tolist() == [gone, gone]


def test_two_of_every_four_stay(parity) -> None:
    weight = torch.tensor([[0.1, -5.0, 2.0, 0.0, 3.0, -1.0, 0.5, 4.0]])
    assert pattern_mask(weight.abs(), (2, 4)).tolist() == [[False, True, True, False, True, False, False, True]]
    kept = compress_two_of_four(weight * pattern_mask(weight.abs(), (2, 4)))
    assert kept.values.tolist() == [[-5.0, 2.0, 3.0, 4.0]]  # in the order of the columns
    assert kept.places.tolist() == [[1 | 2 << 2 | 0 << 4 | 3 << 6]]
    weight = randn(6, 32)
    mask = pattern_mask(weight.abs(), (2, 4))
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    pruned = weight * mask
    stored = compress_two_of_four(pruned)
    parity("expand_two_of_four", "the matrix before", "exchange", expand_two_of_four(stored), pruned, 0)
    assert stored.n_bytes == 6 * 32 * 4 // 2 + 6 * 32 // 8 == (0.5 + 1 / 32) * weight.nbytes
    zeros = torch.zeros(2, 8)
    assert torch.equal(expand_two_of_four(compress_two_of_four(zeros)), zeros)
    with pytest.raises(ValueError, match="rows of 6 do not divide into fours"):
        compress_two_of_four(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="more than two values that are not zero"):
        compress_two_of_four(weight)


def test_wanda_is_the_surgeons_score_with_a_diagonal_hessian(parity) -> None:
    """With inputs that are not correlated, the smallest cost w^2 / [H^-1]_jj of a weight is Wanda's score squared."""
    model = tiny()
    statistics = input_statistics(model, BATCHES)["blocks.1.ffn.up_proj"]
    weight, diagonal = randn(5, 24), torch.diag(statistics.second_moment.diagonal())
    cost = weight.double() ** 2 / torch.linalg.inv(diagonal).diagonal()
    ours = wanda_scores(weight, statistics).double() ** 2
    parity("wanda_scores", "optimal brain surgery, diagonal", "output", ours, cost, 1e-5)


def test_csr_pays_from_a_half_in_float32() -> None:
    dense = torch.where(randn(40, 60) > 0, randn(40, 60, seed=1), torch.tensor(0.0))
    sparse = dense.to_sparse_csr()
    n_bytes = sparse.values().nbytes + (sparse.col_indices().nbytes + sparse.crow_indices().nbytes) // 2  # int64 there
    share = (dense == 0).float().mean().item()
    assert csr_bytes(40, 60, share) == n_bytes
    assert csr_bytes(100, 1000, 0.49) > 100 * 1000 * 4 > csr_bytes(100, 1000, 0.51)
    assert csr_bytes(100, 1000, 0.65, 2) > 100 * 1000 * 2 > csr_bytes(100, 1000, 0.68, 2)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_model_with_half_of_its_weights_gone_weighs_what_it_did(method, pattern) -> None:
    model = tiny()
    statistics, before = input_statistics(model, BATCHES), float_bytes(model)
    masks = prune_weights(model, method, 0.5, statistics, pattern)
    assert sparsity_of(model) == pytest.approx(0.5, abs=0.01) and float_bytes(model) == before
    assert all((layer.weight[~masks[name]] == 0).all() for name, layer in block_linears(model).items())


def test_wanda_keeps_small_weights_with_large_inputs() -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn_norm.weight[5] *= 30
        model.blocks[0].self_attn.q_proj.weight[:, 5] /= 10
    masks = prune_weights(copy.deepcopy(model), "wanda", 0.5, input_statistics(model, BATCHES))
    by_size = prune_weights(copy.deepcopy(model), "magnitude", 0.5)
    name = "blocks.0.self_attn.q_proj"
    assert masks[name][:, 5].float().mean() > 0.7 > 0.3 > by_size[name][:, 5].float().mean()


def test_smaller_heads_compute_what_zeroed_heads_do(parity) -> None:
    model = tiny(use_bias=True)
    statistics = input_statistics(model, BATCHES)
    small = prune_heads(model, 2, statistics)
    zeroed, scores = copy.deepcopy(model), head_scores(model, statistics)
    with torch.no_grad():
        for layer, block in enumerate(zeroed.blocks):
            worst = int(scores[layer].argmin())
            block.self_attn.out_proj.weight[:, worst * 8 : worst * 8 + 8] = 0  # 2 query heads of 4 features
    assert (small.config.n_heads, small.config.n_kv_heads) == (4, 2)
    parity("prune_heads", "the same heads at zero", "invariant", small(IDS), zeroed(IDS), 1e-5)
    assert float_bytes(small) < float_bytes(model)
    parity("prune_heads, all kept", "the model", "invariant", prune_heads(model, 3, statistics)(IDS), model(IDS), 0)


def test_the_head_that_adds_least_goes() -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].self_attn.out_proj.weight[:, 8:16] *= 1e-3
    statistics = input_statistics(model, BATCHES)
    assert int(head_scores(model, statistics)[1].argmin()) == 1
    mixed = []
    handle = model.blocks[1].self_attn.out_proj.register_forward_pre_hook(lambda _, x: mixed.append(x[0]))
    model(IDS)
    handle.remove()
    weight = model.blocks[1].self_attn.out_proj.weight
    power = [
        (mixed[0][..., g * 8 : g * 8 + 8] @ weight[:, g * 8 : g * 8 + 8].T).square().sum(-1).mean() for g in range(3)
    ]
    assert torch.allclose(head_scores(model, statistics)[1], torch.stack(power).double(), rtol=1e-4)


def test_smaller_networks_compute_what_zeroed_neurons_do(parity) -> None:
    model = tiny()
    statistics = input_statistics(model, BATCHES)
    small, zeroed = prune_neurons(model, 25, statistics), copy.deepcopy(model)
    with torch.no_grad():
        for layer, block in enumerate(zeroed.blocks):
            power = statistics[f"blocks.{layer}.ffn.down_proj"].second_moment.diagonal()
            score = block.ffn.down_proj.weight.double().norm(dim=0) * power.sqrt()
            block.ffn.down_proj.weight[:, score.argsort()[:15]] = 0
    assert small.blocks[0].ffn.up_proj.weight.shape == (25, 24)
    parity("prune_neurons", "the same neurons at zero", "invariant", small(IDS), zeroed(IDS), 1e-5)


def test_the_block_that_does_least_goes(parity) -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].self_attn.out_proj.weight.zero_()
        model.blocks[1].ffn.down_proj.weight.zero_()
    influence = block_influence(model, BATCHES)
    assert influence[1] == pytest.approx(0, abs=1e-6) and influence.argmin() == 1
    small = prune_layers(model, 2, BATCHES)
    parity("prune_layers", "a block that adds nothing", "invariant", small(IDS), model(IDS), 1e-5)
    assert small.config.n_layers == 2


@pytest.mark.parametrize("what", ["heads", "neurons", "layers", "wanda-2:4"])
def test_transformers_reads_the_smaller_folder(what, tmp_path, parity) -> None:
    from transformers import AutoModelForCausalLM

    small = pruned(tiny(), what, 0.4, BATCHES)
    small.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        parity(f"pruned, {what}", "transformers' Llama", "exchange", small(IDS), theirs(IDS).logits, 1e-4)


def test_a_share_goes_to_the_last_one_and_the_model_stays_as_it_was() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    for share, left in ((0.7, 12), (0.85, 6), (0.5, 20), (0.51, 20), (0.0, 40)):  # of 40; what stays is rounded up
        assert pruned(model, "neurons", share, BATCHES).config.d_ff == left
    for what, name, left in (("heads", "n_kv_heads", 1), ("layers", "n_layers", 1)):
        assert getattr(pruned(model, what, 0.7, BATCHES).config, name) == left
    assert sparsity_of(pruned(model, "magnitude", 0.3, BATCHES)) == pytest.approx(0.3, abs=0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_smaller_models_keep_the_precision() -> None:
    small = pruned(tiny().double(), "neurons", 0.5, BATCHES)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}


def test_padding_does_not_count_as_a_token_that_blocks_turn() -> None:
    padded, real = torch.cat([IDS, IDS[:, :9]], dim=1), torch.arange(26).expand(2, -1) < 17
    wanted, found = block_influence(tiny(), BATCHES), block_influence(tiny(), [(padded, real)])
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)  # what stands behind a text is not seen by it


def test_training_on_keeps_the_zeros() -> None:
    model = tiny()
    masks = prune_weights(model, "magnitude", 0.6)
    zeros = sparsity_of(model)
    config = TrainConfig(max_steps=8, batch_size=2, seq_len=16, learning_rate=3e-3, warmup_steps=0)
    first = model.blocks[0].ffn.up_proj.weight.detach().clone()
    batch = {"inputs": IDS[:, :-1], "targets": IDS[:, 1:]}
    seen = []

    def loss_fn(model: CausalLM, batch: dict[str, torch.Tensor]) -> tuple:
        seen.append(sparsity_of(model))
        return pruning.language_model_loss(model, batch)

    train_masked(model, masks, lambda step: batch, config, loss_fn)
    assert seen == [zeros] * 8, "a step would else train weights that are gone at the end"
    assert sparsity_of(model) == zeros == pytest.approx(0.6, abs=0.01)
    assert not torch.equal(model.blocks[0].ffn.up_proj.weight, first)


def test_verb_saves_a_smaller_folder(tmp_path, capsys) -> None:
    prune(PruneConfig(what="neurons", share=0.25, n_calibration=8, n_held_out=10), RunConfig(out=tmp_path))
    said = capsys.readouterr().out
    assert "what pruning cost: " in said
    small = CausalLM.from_pretrained(tmp_path / "model")
    assert str(f"{float_bytes(small):,} after") in said


def test_shape_comments(checked_shapes) -> None:
    with checked_shapes(pruning) as checked:
        for what in ("heads", "neurons", "layers", "wanda", "magnitude-2:4"):
            pruned(tiny(), what, 0.4, BATCHES)
        expand_two_of_four(compress_two_of_four(torch.eye(8)))
    assert len(checked) >= 11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune_weights(tiny(), "magnitud", 0.5), "unknown method 'magnitud'; did you mean 'magnitude'?"),
        (lambda: prune_weights(tiny(), "magnitude", 1.0), "sparsity must be >= 0 and < 1, got 1.0"),
        (lambda: prune_weights(tiny(), "wanda", 0.5), "wanda looks at activations; give statistics"),
        (lambda: pattern_mask(torch.ones(2, 6), (2, 4)), "rows that are a multiple of m, got 6"),
        (lambda: prune_heads(tiny(), 0, {}), "0 key-value heads cannot stay of 3; keep 1 to 3"),
        (lambda: prune_layers(tiny(), 4, BATCHES), "4 blocks cannot stay of 3; keep 1 to 3"),
        (lambda: PruneConfig(share=1.0), "share must be finite and >= 0 and < 1, got 1.0"),
        (lambda: pruned(tiny(), "columns", 0.5, BATCHES), "unknown what 'columns'"),
        (lambda: row_mask(torch.randn(2, 3), -1.0), "sparsity=-1.0 must be between 0 and 1"),
        (lambda: matrix_mask(torch.randn(2, 3), float("nan")), "sparsity=nan must be between 0 and 1"),
        (lambda: csr_bytes(2, 3, 2.0), "sparsity=2.0 must be between 0 and 1"),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
