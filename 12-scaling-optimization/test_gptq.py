"""Proofs of GPTQ: it is optimal brain surgery, step by step, and what that buys is measured on the course model."""

import copy
import itertools

import pytest
import torch
from torch import nn

import gptq as module
from course_model import load_course_model
from gptq import (
    GPTQConfig,
    InputStatistics,
    block_linears,
    calibration_batches,
    column_grid,
    gptq,
    gptq_model,
    input_statistics,
    inverse_factor,
    optimal_brain_quantise,
    output_error,
    rounded_without_mending,
)
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from tiny_world import World
from weight_quantization import QuantFormat, quantise


def correlated(n_tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs that share directions, as the activations of a network do: (tokens, columns), float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    return torch.randn(n_tokens, columns, generator=generator, dtype=torch.float64) * scale @ mixing


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


NO_DAMPING = GPTQConfig(damping=0)


@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
@pytest.mark.parametrize(("size", "scheme"), [(0, "affine"), (-1, "absmax")])
def test_equals_optimal_brain_quantisation(parity, block_size, size, scheme) -> None:
    weight, moment = weights(5, 19, 0), moment_of(correlated(200, 19, 1))
    quantised = gptq(weight, moment, QuantFormat(3, size, scheme), GPTQConfig(0, block_size))
    slow = optimal_brain_quantise(weight, moment, *(part.double() for part in column_grid(quantised)), 7)
    ours = quantised.dequantise().double()
    parity("gptq", "optimal brain surgery with explicit inverses", "output", ours, slow, 1e-6)


def test_every_update_is_the_exact_optimum_of_the_free_weights(parity) -> None:
    """After some columns are fixed, least squares over the rest finds the same targets as the factor's rows."""
    weight, x = weights(4, 9, 2).double(), correlated(60, 9, 3)
    factor = inverse_factor(moment_of(x), 0)
    fixed, left = torch.round(weight * 2) / 2, weight.clone()
    for column in range(8):
        error = (left[:, column] - fixed[:, column]) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:]
        stop = column + 1
        target = (weight[:, :stop] - fixed[:, :stop]) @ x[:, :stop].T + weight[:, stop:] @ x[:, stop:].T
        best = torch.linalg.lstsq(x[:, stop:], target.T).solution.T
        parity("gptq, one update", "least squares over the free weights", "output", left[:, stop:], best, 1e-10)
        assert torch.allclose(left[:, :stop], fixed[:, :stop])


def test_brute_force_over_all_codes() -> None:
    """48 rows of 5 weights at 2 bits, all 1,024 roundings of each. GPTQ never looks back, so it can miss the best."""
    found = {"nearest": [], "gptq": []}
    for seed in range(12):
        weight, moment = weights(4, 5, 10 + seed), moment_of(correlated(50, 5, seed))
        quantised = gptq(weight, moment, QuantFormat(2, -1), NO_DAMPING)
        scale, zero = (part[0, 0].double() for part in column_grid(quantised))
        grid = (torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.float64) - zero) * scale
        difference = grid[None] - weight.double()[:, None]  # (rows, candidates, columns)
        best = ((difference @ moment) * difference).sum(2).amin(1)  # (rows)
        for name, rounded in (
            ("gptq", quantised.dequantise()),
            ("nearest", rounded_without_mending(weight, quantised)),
        ):
            off = (rounded - weight).double()
            error = ((off @ moment) * off).sum(1)
            assert (error >= best * (1 - 1e-4)).all()
            found[name] += (error / best).tolist()
    median = {name: sorted(ratios)[24] for name, ratios in found.items()}
    mean = {name: sum(ratios) / 48 for name, ratios in found.items()}
    assert median["gptq"] < 0.7 * median["nearest"] and mean["gptq"] < mean["nearest"] / 2


def test_brute_force_over_each_choice(parity) -> None:
    """With the later columns free and refitted by least squares, no other code of the present column costs less."""
    weight, x = weights(1, 6, 30).double()[0], correlated(60, 6, 31)
    quantised = gptq(weight[None].float(), moment_of(x), QuantFormat(3, 0), NO_DAMPING)
    scale, zero = (part[0, 0].double() for part in column_grid(quantised))
    fixed: list[float] = []
    for column in range(6):
        costs = []
        for code in range(8):
            tried = torch.tensor([*fixed, float((code - zero) * scale)], dtype=torch.float64)
            target = (weight[: column + 1] - tried) @ x[:, : column + 1].T + weight[column + 1 :] @ x[:, column + 1 :].T
            rest = x[:, column + 1 :]
            best = torch.linalg.lstsq(rest, target[:, None]).solution[:, 0] if column < 5 else torch.zeros(0).double()
            costs.append((target - rest @ best).square().mean().item())
        chosen = int(quantised.codes[0, column])
        parity("gptq, one code", "all codes, the rest by least squares", "output", chosen, costs.index(min(costs)), 0)
        fixed.append(float((chosen - zero) * scale))


def test_without_correlation_it_is_rounding_to_nearest(parity) -> None:
    weight, moment = weights(5, 23, 4), torch.diag(torch.rand(23, dtype=torch.float64) + 0.1)
    for fmt, act_order in ((QuantFormat(4, 8), False), (QuantFormat(3, 0, "absmax"), True), (QuantFormat(2, -1), True)):
        quantised = gptq(weight, moment, fmt, GPTQConfig(act_order=act_order))
        parity("gptq, diagonal moment", "quantise", "output", quantised.codes, quantise(weight, fmt).codes, 0)


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_change_nothing(parity, act_order) -> None:
    weight, moment = weights(6, 48, 5), moment_of(correlated(300, 48, 6))
    whole = gptq(weight, moment, QuantFormat(3, 8), GPTQConfig(block_size=48, act_order=act_order))
    for block_size in (1, 7, 16, 40):
        blocked = gptq(weight, moment, QuantFormat(3, 8), GPTQConfig(block_size=block_size, act_order=act_order))
        parity("gptq, in blocks", "gptq in one block", "output", blocked.dequantise(), whole.dequantise(), 0)


def test_late_groups_see_the_mended_weights() -> None:
    """The grid of the last group is that of the weights which arrive there, not of the ones at the start."""
    weight, moment = weights(6, 32, 7), moment_of(correlated(200, 32, 8))
    quantised = gptq(weight, moment, QuantFormat(2, 8))
    assert torch.equal(quantised.scales[:, 0], quantise(weight, QuantFormat(2, 8)).scales[:, 0])
    assert not torch.equal(quantised.scales[:, -1], quantise(weight, QuantFormat(2, 8)).scales[:, -1])


def test_large_inputs_first_is_a_permutation_of_the_columns(parity) -> None:
    weight, moment = weights(4, 16, 9), moment_of(correlated(100, 16, 10))
    order = moment.diagonal().argsort(descending=True, stable=True)
    ours = gptq(weight, moment, QuantFormat(3, -1), GPTQConfig(act_order=True)).dequantise()[:, order]
    theirs = gptq(weight[:, order], moment[order][:, order], QuantFormat(3, -1)).dequantise()
    parity("gptq, act_order", "gptq of sorted columns", "invariant", ours, theirs, 0)


def test_an_input_that_is_always_zero_and_one_that_repeats() -> None:
    x = correlated(100, 8, 11)
    x[:, 3], x[:, 5] = 0, x[:, 4]
    moment = moment_of(x)
    quantised = gptq(weights(3, 8, 12), moment, QuantFormat(4, 4))
    assert torch.isfinite(quantised.dequantise()).all()
    with pytest.raises(ValueError, match="second moment of 8 inputs is singular with damping=0; raise damping"):
        gptq(weights(3, 8, 12), moment, QuantFormat(4, 4), NO_DAMPING)


@pytest.mark.parametrize("dead", [[], [5], [0, 11]])
def test_the_unit_of_the_inputs_does_not_matter(dead) -> None:
    """Inputs in other units give the same codes, though some of them are always 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    x[:, dead] = 0
    weight, moment = torch.randn(7, 12, generator=generator), x.T @ x / len(x)
    wanted = gptq(weight, moment, QuantFormat(3, 4), GPTQConfig(0.1)).codes
    for factor in (2.0**-20, 2.0**20):
        assert torch.equal(gptq(weight, factor * moment, QuantFormat(3, 4), GPTQConfig(0.1)).codes, wanted)


def test_statistics_are_those_of_the_real_tokens(parity) -> None:
    model, tokenizer = load_course_model()
    batches = calibration_batches(tokenizer, 9, 0, batch_size=4)
    assert len(batches) == 3 and not batches[0][1].all() and batches[0][0].shape == batches[0][1].shape
    texts = sorted(tuple(tokenizer.encode_document(text).ids[:-1]) for text in World().documents(9, 0, "train"))
    rows = sorted(tuple(row[kept].tolist()) for ids, real in batches for row, kept in zip(ids, real, strict=True))
    assert rows == texts, "inputs: the last id is only ever a target"
    name = "blocks.0.self_attn.v_proj"
    found = input_statistics(model, batches, [name])
    with torch.no_grad():
        x = torch.cat([model.blocks[0].attn_norm(model.token_emb(ids[real])) for ids, real in batches]).double()
    assert list(found) == [name] and found[name].n_tokens == len(x)
    parity("input_statistics", "all tokens at once", "output", found[name].second_moment, moment_of(x), 1e-10)
    parity("input_statistics, mean size", "all tokens at once", "output", found[name].mean_abs, x.abs().mean(0), 1e-10)
    parity("input_statistics, largest size", "all tokens at once", "output", found[name].max_abs, x.abs().amax(0), 0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    everything = input_statistics(model, batches)  # each layer counts its own inputs, not those of the last one
    assert everything.keys() == block_linears(model).keys()
    assert all(statistics.n_tokens == len(x) for statistics in everything.values())
    assert torch.equal(everything[name].second_moment, found[name].second_moment)


def test_each_stage_is_calibrated_on_what_the_stages_before_it_now_give() -> None:
    """What a layer is given depends on the layers before it alone, so each can be looked at when all are done."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=4, d_ff=24)).eval()
    ids = torch.randint(40, (4, 15), generator=torch.Generator().manual_seed(1))
    batches, done, fmt = [(ids, torch.ones_like(ids, dtype=torch.bool))], copy.deepcopy(model), QuantFormat(2, 8)
    config = GPTQConfig(0.1, act_order=True)
    codes, before, after = (
        gptq_model(done, batches, fmt, config),
        *(input_statistics(m, batches) for m in (model, done)),
    )
    changed = 0
    for name, layer in block_linears(model).items():
        wanted = gptq(layer.weight, after[name].second_moment, fmt, config)
        assert torch.equal(codes[name].codes, wanted.codes), name
        assert torch.equal(done.get_submodule(name).weight, wanted.dequantise()), name
        changed += not torch.equal(gptq(layer.weight, before[name].second_moment, fmt, config).codes, wanted.codes)
    assert len(codes) == 14 and changed > 5, "the float model's statistics would give other codes"


def test_output_error_is_the_mean_over_tokens(parity) -> None:
    x, weight, other = correlated(40, 6, 13), weights(3, 6, 14), weights(3, 6, 15)
    direct = ((x @ (other - weight).double().T) ** 2).mean().item()
    parity("output_error", "outputs of all tokens", "output", output_error(weight, other, moment_of(x)), direct, 1e-9)


@pytest.mark.parametrize("n_bits", [3, 4])
def test_better_than_nearest_on_every_layer_of_the_course_model(n_bits) -> None:
    """On tokens that the calibration did not see, and no less so with little damping, which spoils the model's loss."""
    model, tokenizer = load_course_model()
    known = input_statistics(model, calibration_batches(tokenizer, 64, 0))
    fresh = input_statistics(model, calibration_batches(tokenizer, 64, 1))
    fmt, means = QuantFormat(n_bits, 32), []
    for damping in (0.01, 0.3):
        ratios = []
        for name, layer in block_linears(model).items():
            weight, moment = layer.weight.detach(), fresh[name].second_moment
            nearest = output_error(weight, quantise(weight, fmt).dequantise(), moment)
            codes = gptq(weight, known[name].second_moment, fmt, GPTQConfig(damping))
            ratios.append(output_error(weight, codes.dequantise(), moment) / nearest)
        assert max(ratios) < 0.8, (damping, ratios)
        means.append(sum(ratios) / len(ratios))
    assert means[0] < means[1], means


def test_statistics_of_parts_add_up() -> None:
    x, whole, parts = correlated(30, 5, 16), InputStatistics.empty(5), InputStatistics.empty(5)
    whole.add(x)
    for part in x.split(7):
        parts.add(part)
    assert torch.allclose(whole.second_moment, parts.second_moment) and parts.n_tokens == 30


def test_shape_comments(checked_shapes) -> None:
    weight, moment = weights(4, 12, 17), moment_of(correlated(40, 12, 18))
    with checked_shapes(module) as checked:
        gptq(weight, moment, QuantFormat(3, 4))
        optimal_brain_quantise(weight, moment, torch.ones(4, 12), torch.zeros(4, 12), 7)
    assert len(checked) >= 6


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="a weight of 4 columns needs a second moment of as many"):
        gptq(torch.randn(3, 4), torch.eye(5), QuantFormat(3))
    with pytest.raises(ValueError, match="damping must be finite and >= 0, got -1"):
        GPTQConfig(damping=-1)
    with pytest.raises(ValueError, match="at least 1 document, got n_documents=0"):
        calibration_batches(None, 0, 0)
    assert list(block_linears(nn.Sequential(nn.Linear(2, 2)))) == []
