"""Proofs of channel scaling: the function stays, AWQ never loses on its calibration, SmoothQuant evens out."""

import copy

import pytest
import torch
from torch import nn

import channel_scaling
from channel_scaling import (
    Site,
    agreed,
    awq,
    awq_scales,
    for_readers,
    plant_outliers,
    scale_channels,
    scaling_sites,
    smooth,
)
from gptq import InputStatistics, block_linears, input_statistics, output_error
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from quantized_layers import Int8Linear, replace_linears
from weight_quantization import QuantFormat, quantise
from workbench import seed_everything

SIZES = ModelConfig(vocab_size=50, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_head=4, d_ff=40, max_seq_len=32)


def tiny(use_bias: bool = False) -> CausalLM:
    seed_everything(0)
    model = CausalLM(ModelConfig(**{**vars(SIZES), "use_bias": use_bias})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batches(seed: int = 0) -> list:
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(seed))
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_scaling_a_site_changes_no_output(parity, number, use_bias) -> None:
    model = tiny(use_bias).double()
    before = model(batches()[0][0])
    for site in list(scaling_sites(model))[number::4]:
        channels = len(site.maker.weight)
        scale_channels(site, torch.rand(channels, dtype=torch.float64) * 3 + 0.1)
    parity(f"scale_channels, site {number}", "the model before", "invariant", model(batches()[0][0]), before, 1e-10)


def test_smoothing_changes_no_output_before_rounding(parity) -> None:
    model = tiny().double()
    before, statistics = model(batches()[0][0]), input_statistics(model, batches())
    for strength in (0.0, 0.5, 1.0):
        smoothed = copy.deepcopy(model)
        smooth(smoothed, statistics, strength)
        assert not torch.equal(smoothed.blocks[0].attn_norm.weight, model.blocks[0].attn_norm.weight)
        parity("smooth", "the model before", "invariant", smoothed(batches()[0][0]), before, 1e-10)


def test_grouped_heads_agree_on_one_scale() -> None:
    """Query heads 0, 1, 2 read value head 0 and 3, 4, 5 read head 1; a head has 4 features."""
    site = list(scaling_sites(tiny()))[1]
    assert (site.tied, site.width) == (3, 4)
    values = torch.arange(24.0)
    assert agreed(values, site).tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    assert for_readers(torch.arange(8.0), site).tolist() == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3


def test_smoothing_fully_makes_the_inputs_even() -> None:
    model = plant_outliers(tiny(), 50.0, [3])
    statistics = input_statistics(model, batches())
    name = "blocks.0.self_attn.q_proj"
    peaks = statistics[name].max_abs
    assert peaks[3] > 10 * peaks.median()
    smooth(model, statistics, 1.0)
    after = input_statistics(model, batches())[name].max_abs
    assert torch.allclose(after, torch.ones_like(after), atol=1e-4)


def test_awq_takes_the_best_exponent_and_never_loses_on_its_calibration() -> None:
    model, fmt = plant_outliers(tiny(), 20.0, [5, 11]), QuantFormat(3, 8)
    statistics = input_statistics(model, batches())

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quantise(weight, fmt).dequantise()

    gains = []
    for site in scaling_sites(model):
        errors = {}
        size = agreed(next(iter(statistics[name].mean_abs for name in site.readers)), site)
        for alpha in (0.0, *(step / 20 for step in range(1, 20))):
            scales = channel_scaling.centred(size**alpha)
            columns = for_readers(scales, site).float()
            errors[alpha] = sum(
                output_error(
                    reader.weight,
                    rounded(reader.weight.detach() * columns) / columns,
                    statistics[name].second_moment,
                )
                * len(reader.weight)
                for name, reader in site.readers.items()
            )
        _, alpha = awq_scales(site, statistics, rounded)
        assert errors[alpha] == min(errors.values()) <= errors[0.0]
        gains.append(min(errors.values()) / errors[0.0])
    assert min(gains) < 0.9


def test_awq_counts_every_output_alike_however_many_a_reader_has() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(50, 8, generator=generator) * (0.5 + torch.rand(8, generator=generator))
        readers = {"few": nn.Linear(8, 1, bias=False), "many": nn.Linear(8, 20, bias=False)}
        for reader in readers.values():
            nn.init.normal_(reader.weight, generator=generator)
        seen = InputStatistics.empty(8)
        seen.add(x)
        _, alpha = awq_scales(Site(nn.RMSNorm(8), readers), dict.fromkeys(readers, seen), torch.round, n_grid=5)
        errors = {}
        for step in range(5):
            scales = x.abs().mean(dim=0) ** (step / 5)
            scales /= (scales.max() * scales.min()).sqrt()
            changes = [torch.round(reader.weight * scales) / scales - reader.weight for reader in readers.values()]
            errors[step / 5] = sum((x @ change.T).square().sum().item() for change in changes)
        assert alpha == min(errors, key=errors.get)
        for reader in readers.values():
            reader.weight.data.round_()
        assert awq_scales(Site(nn.RMSNorm(8), readers), dict.fromkeys(readers, seen), torch.round)[1] == 0


def test_awq_changes_no_output_before_rounding(parity) -> None:
    model = tiny().double()
    before = model(batches()[0][0])
    chosen = awq(model, input_statistics(model, batches()), QuantFormat(3, 8))
    assert len(chosen) == 8 and {name.rpartition(".")[2] for name, _ in chosen} >= {"q_proj", "out_proj", "down_proj"}
    assert any(alpha > 0 for _, alpha in chosen)
    parity("awq", "the model before", "invariant", model(batches()[0][0]), before, 1e-10)


def test_planted_outliers_change_no_output_but_break_plain_int8(parity) -> None:
    model, ids = tiny().double(), batches()[0][0]
    before = model(ids)
    plant_outliers(model, 20.0, [2, 7])
    parity("plant_outliers", "the model before", "invariant", model(ids), before, 1e-10)

    def error(model: CausalLM, threshold: float) -> float:
        made = copy.deepcopy(model).float()
        replace_linears(made, lambda _, layer: Int8Linear.from_linear(layer, threshold))
        return (made(ids) - before).square().mean().item()

    smoothed = copy.deepcopy(model)
    smooth(smoothed, input_statistics(smoothed, batches()), 0.5)
    plain, decomposed, evened = error(model, 0.0), error(model, 6.0), error(smoothed, 0.0)
    never = error(tiny(), 0.0)
    assert plain > 10 * never and decomposed < plain / 2 and evened < 2 * never, (plain, decomposed, evened, never)


def test_shape_comments(checked_shapes) -> None:
    model = tiny()
    with checked_shapes(channel_scaling) as checked:
        awq(model, input_statistics(model, batches()), QuantFormat(4, 8), n_grid=2)
        smooth(model, input_statistics(model, batches()))
    assert len(checked) >= 5


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="strength must be in 0..1, got 1.5"):
        smooth(model, {}, 1.5)
    with pytest.raises(ValueError, match="channels \\[24\\] must be in 0..23"):
        plant_outliers(model, 2.0, [24])
    assert len(block_linears(model)) == 14
