"""Proofs of the experiments' parts: sizes, paired comparison, equal FLOPs, tables that land in results.json."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import compression_experiments
from compression_experiments import (
    BY_ROW,
    COMPRESSION_EXPERIMENTS,
    Bench,
    CompressionFiguresConfig,
    SparseLinear,
    WithCache,
    chosen_settings,
    compression_breaks,
    distillation,
    kv_cache,
    mean_bits,
    mean_output_ratio,
    measure_rounding,
    plot_bits,
    roundings,
    save_against_nearest,
    save_by_bits,
    short_ratio,
    sparse_model,
    spectra,
    train_student,
)
from course_model import load_course_model
from distillation import DistillConfig, step_flops
from gpt2 import SamplingConfig
from gptq import calibration_batches
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from pruning import pruned
from quantized_layers import KVFormat, QuantisedKVCache
from quantized_model import Recipe, quantize_model
from weight_quantization import QuantFormat
from workbench import RunConfig

SMALL = {"n_seeds": 1, "n_draws": 2, "n_held_out": 12, "n_many": 14, "n_questions": 2, "n_calibration": 4}
SMALL |= {"qat_steps": 2, "heal_steps": 2, "student_steps": "6"}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(CompressionFiguresConfig(**SMALL))


def test_a_model_adds_nothing_to_itself(bench) -> None:
    assert bench.added(bench.model) == 0 and abs(bench.gap(bench.model)) < 0.2
    assert 0 <= bench.right(bench.model) <= 1


def test_right_answers_are_those_of_the_packed_model(bench) -> None:
    """The exam lays weight-only models out in float; the packed model writes the same."""
    small = quantize_model(bench.model, Recipe("rtn", QuantFormat(4, 32)))
    shares = [
        compression_experiments.answer_accuracy(model, bench.tokenizer, "asked", bench.questions)
        for model in (small, small.dequantised())
    ]
    assert shares[0] == shares[1]


def test_bits_are_those_that_the_model_stores(bench) -> None:
    fmt = QuantFormat(4, 32)
    small = quantize_model(bench.model, Recipe("rtn", fmt, 0))
    names = compression_experiments.block_linears(bench.model)
    n_bytes = sum(small.get_submodule(name).n_bytes for name in names)
    count = sum(layer.weight.numel() for layer in names.values())
    assert mean_bits(bench.model, fmt) == pytest.approx(8 * n_bytes / count)


def test_settings_are_chosen_once_and_not_by_the_exam(bench, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compression_experiments, "DAMPINGS", (0.1, 1.0))
    config, run = CompressionFiguresConfig(**SMALL), RunConfig(out=tmp_path)
    fmt, name = QuantFormat(2, 0), "GPTQ, large inputs first"
    chosen = chosen_settings(bench, fmt, name, config, run)
    tried = json.loads((tmp_path / "measured.json").read_text())
    assert (
        chosen.act_order
        and min(next(iter(tried.values())).values()) == next(iter(tried.values()))[f"{chosen.damping:g}"]
    )
    assert chosen_settings(bench, fmt, name, config, run) == chosen and "taken from" in capsys.readouterr().out
    assert bench.judged.rows[0] != bench.exam.rows[0] and len(bench.judged.rows) == len(bench.exam.rows)


def test_gptq_beside_nearest_on_the_same_grid(bench, tmp_path, monkeypatch) -> None:
    """At 2 bits and with one step for a row the difference is far beyond its noise, in the outputs and in the loss."""
    monkeypatch.setattr(Bench, "right", lambda *_: 0.0)  # no answers are asked for here
    config, fmt = CompressionFiguresConfig(**SMALL | {"n_calibration": 32}, folder=tmp_path), QuantFormat(2, 0)
    nearest = measure_rounding(bench, Recipe("rtn", fmt, 0), config, 0, None)
    ours = measure_rounding(bench, Recipe("gptq", fmt, 0), config, 0, None)
    assert 0 < ours["outputs"] < 0.9 and ours["beside_error"] > 0
    again = measure_rounding(bench, Recipe("gptq", fmt, 0), config, 1, None)
    assert again["added"] != ours["added"] and "outputs" not in again, "another draw of calibration"
    save_against_nearest({(f"nearest, {BY_ROW}", fmt): [nearest], (f"GPTQ, {BY_ROW}", fmt): [ours, again]}, config)
    (row,) = json.loads((tmp_path / "results.json").read_text())["gptq-against-nearest"]["rows"]
    assert row[:3] == [f"2 bits, {BY_ROW}", "as they stand", nearest["added"]]
    assert row[3] == [each["added"] - nearest["added"] for each in (ours, again)]


def test_the_table_is_turned_without_a_number_lost(tmp_path) -> None:
    rows: list[list] = [["float32", 32.0, "", "", 0.0, 0.1, 0.9]]
    for name, widths in (("nearest, affine", (8, 4, 3, 2)), ("nearest, one scale per 64", (4,)), ("AWQ", (4, 3, 2))):
        rows += [[f"{name}, {n_bits} bits", 1.0, "", 1.0, [n_bits / 7, len(name)], 0.1, 0.9] for n_bits in widths]
    save_by_bits(rows, CompressionFiguresConfig(**SMALL, folder=tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["quality-by-bits"]
    assert [column["name"] for column in found["columns"]] == ["Added by", "8 bits", "4 bits", "3 bits", "2 bits"]
    assert [row[0] for row in found["rows"]] == ["nearest, affine", "AWQ"] and found["rows"][1][1] == ""
    assert all(
        cell == [n / 7, len(row[0])] for row in found["rows"] for n, cell in zip((4, 3, 2), row[2:], strict=True)
    )


def test_a_models_layers_beside_themselves(bench) -> None:
    name, layer = next(iter(compression_experiments.block_linears(bench.model).items()))
    moved, twice = copy.deepcopy(bench.model), copy.deepcopy(bench.model)
    for model, factor in ((moved, 1.01), (twice, 1.02)):
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(factor)
    fresh = compression_experiments.input_statistics(bench.model, calibration_batches(bench.tokenizer, 4, 5), [name])
    assert mean_output_ratio(bench.model, twice, moved, fresh) == pytest.approx(4, rel=1e-3), "squared errors"


def test_every_rounding_is_named_once() -> None:
    named = [(name, fmt) for _, fmt, name in roundings()]
    assert len(set(named)) == len(named)
    grids = {(fmt.n_bits, fmt.quant_group_size) for method, fmt, _ in roundings() if method == "gptq"}
    assert grids == {(4, 32), (3, 32), (2, 32), (4, 0), (3, 0)}


def test_prefill_through_a_wide_cache_costs_next_to_nothing(bench) -> None:
    fine = WithCache(bench.model, lambda: QuantisedKVCache(KVFormat(8)))
    coarse = WithCache(bench.model, lambda: QuantisedKVCache(KVFormat(2)))
    assert abs(bench.added(fine)) < 0.003 < bench.added(coarse)


class RoundedCache(DynamicCache):
    """Keys and values rounded for each token and head by torch's own fake quantisation, on float16 scales."""

    def update(self, keys, values, layer, *args, **kwargs):
        return super().update(self.rounded(keys), self.rounded(values), layer, *args, **kwargs)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 2)  # one channel of torch's for each token and head
        low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
        scales = ((high - low) / 7).half().float()
        zeros = (-torch.round(low / scales)).clamp(0, 7).int()
        return torch.fake_quantize_per_channel_affine(flat, scales, zeros, 0, 0, 7).view_as(x)


def test_reading_through_a_cache_equals_transformers_with_a_rounded_one(tmp_path, parity) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ff": 40, "max_seq_len": 32}
    model, ids = CausalLM(ModelConfig(vocab_size=50, **sizes)).eval(), torch.randint(2, 50, (3, 7))
    model.token_emb.weight.data.mul_(20)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = WithCache(model, lambda: QuantisedKVCache(KVFormat(3)))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, past_key_values=RoundedCache()).logits
        parity("WithCache, 3 bits", "transformers, torch.fake_quantize in its cache", "output", ours(ids), wanted, 1e-4)
        assert (ours(ids) - model(ids)).abs().max() > 1e-2


def test_a_layer_without_its_zeros_equals_the_dense_one(parity) -> None:
    layer, x = torch.nn.Linear(9, 5), torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    layer.weight.data[torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    sparse = SparseLinear(layer)
    assert sparse.weight.values().numel() == (layer.weight != 0).sum()
    parity("SparseLinear", "nn.Linear", "output", sparse(x), layer(x), 1e-6)
    assert torch.allclose(sparse(x[0, 0]), layer(x[0, 0]), atol=1e-6)


def test_students_cost_the_same(bench) -> None:
    student, steps, cost = train_student(bench, DistillConfig("logits"), 200, 6, 0)
    scratch = 6 * step_flops(student, bench.model, DistillConfig("scratch"), 128)
    spent = steps * step_flops(student, bench.model, DistillConfig("logits"), 128)
    assert steps < 6 and abs(spent - scratch) < scratch / 4
    assert cost == pytest.approx(spent / scratch)


def test_students_of_every_budget_stand_in_one_row(bench, tmp_path, monkeypatch) -> None:
    def made(_: object, name: str, n_documents: int, n_steps: int, seed: int) -> dict[str, float]:
        return {"steps": n_steps // 2, "cost": 1.0, "gap": n_documents / n_steps + seed, "right": n_steps / 100}

    monkeypatch.setattr(compression_experiments, "measure_student", made)
    settings = SMALL | {"n_seeds": 2, "student_steps": "40,8,16"}
    distillation(CompressionFiguresConfig(**settings, folder=tmp_path), RunConfig(out=tmp_path))
    rows = {row[0]: row[1:] for row in json.loads((tmp_path / "results.json").read_text())["distillation"]["rows"]}
    assert rows["500 documents: logits"] == [0.5, [62.5, 63.5], [31.25, 32.25], [12.5, 13.5], [0.4, 0.4]]
    assert rows["20,000 documents: logits and hidden states"][2] == "", "trained at the ends only"
    for steps, message in (("8,x", "whole numbers with commas"), ("1,8", "at least 2 each")):
        with pytest.raises(ValueError, match=message):
            CompressionFiguresConfig(student_steps=steps)


def test_decoding_writes_what_generate_does_and_goes_on_after_an_end(bench) -> None:
    ids = torch.randint(16, bench.model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    damaged = pruned(bench.model, "neurons", 0.5, calibration_batches(bench.tokenizer, 64, 0))
    found = damaged.generate(ids, SamplingConfig(24, temperature=0.0))  # (1, at most 24)
    written = compression_experiments.decode(damaged, ids, 24)  # (1, 24)
    assert found.shape[1] < 24 == written.shape[1], "the damaged model ends its text early"
    assert torch.equal(written[:, : found.shape[1]], found)


def test_left_out_zeros_compute_what_zeros_do(bench) -> None:
    batches = calibration_batches(bench.tokenizer, 4, 0)
    ids = torch.arange(20, 50).reshape(2, 15)
    with torch.no_grad():
        dense, sparse = pruned(bench.model, "wanda", 0.5, batches)(ids), sparse_model(bench.model, batches, 0.5)(ids)
    assert torch.allclose(dense, sparse, atol=1e-3)


@pytest.mark.parametrize(("experiment", "n_rows"), [(kv_cache, 9), (compression_breaks, 11), (spectra, None)])
def test_tables_land_in_results(experiment, n_rows, tmp_path) -> None:
    experiment(CompressionFiguresConfig(**SMALL, folder=tmp_path), RunConfig(out=tmp_path))
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert len(result["rows"]) == (n_rows or 4 * load_course_model()[0].config.n_layers)
    last = [row[-1] if isinstance(row[-1], list) else [row[-1]] for row in result["rows"]]
    assert all(math.isfinite(number) for cell in last for number in cell)
    assert result["command"].split()[-1] in COMPRESSION_EXPERIMENTS


def test_plot_shows_every_method() -> None:
    names = ["nearest, absmax", "nearest, affine", "GPTQ", "AWQ", "AWQ, then GPTQ"]
    names += [f"nearest, {BY_ROW}", f"GPTQ, large inputs first, {BY_ROW}"]
    rows = [
        [f"{name}, {bits} bits", bits + 0.5, "", 2.0, [1 / bits**3, 2 / bits**3], 0.1, 0.5]
        for name in names
        for bits in (4, 2)
    ]
    figure = plot_bits(rows)
    assert len(figure.axes[0].get_legend().get_texts()) == 7
    compression_experiments.plt.close(figure)


def test_a_ratio_fits_a_cell() -> None:
    assert short_ratio([1.0, 1.0, 2.0], [2.0, 3.0, 4.0]) == "2.00 (2.00 to 3.00)"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_seeds must be finite and >= 1, got 0"):
        CompressionFiguresConfig(n_seeds=0)
    with pytest.raises(ValueError, match="qat_steps must be finite and >= 2, got 1"):
        CompressionFiguresConfig(qat_steps=1)
    with pytest.raises(ValueError, match="n_draws must be finite and >= 1, got 0"):
        CompressionFiguresConfig(n_draws=0)
