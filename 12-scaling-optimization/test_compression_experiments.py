"""Proofs of the experiments' parts: sizes, paired comparison, equal FLOPs, tables that land in results.json."""

import json
import math

import pytest
import torch

import compression_experiments
from compression_experiments import (
    COMPRESSION_EXPERIMENTS,
    Bench,
    CompressionFiguresConfig,
    WithCache,
    compression_breaks,
    kv_cache,
    mean_bits,
    plot_bits,
    short_ratio,
    sparse_model,
    spectra,
    train_student,
)
from course_model import load_course_model
from distillation import DistillConfig, step_flops
from gptq import calibration_batches
from pruning import pruned
from quantized_layers import KVFormat, QuantisedKVCache
from quantized_model import Recipe, quantize_model
from weight_quantization import QuantFormat
from workbench import RunConfig

SMALL = {"n_seeds": 1, "n_held_out": 12, "n_questions": 2, "n_calibration": 4}
SMALL |= {"qat_steps": 2, "heal_steps": 2, "student_steps": 6}


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


def test_prefill_through_a_wide_cache_costs_next_to_nothing(bench) -> None:
    fine = WithCache(bench.model, lambda: QuantisedKVCache(KVFormat(8)))
    coarse = WithCache(bench.model, lambda: QuantisedKVCache(KVFormat(2)))
    assert abs(bench.added(fine)) < 0.003 < bench.added(coarse)


def test_students_cost_the_same(bench) -> None:
    config = CompressionFiguresConfig(**SMALL)
    student, steps = train_student(bench, DistillConfig("logits"), config, 200, 0)
    scratch = 6 * step_flops(student, bench.model, DistillConfig("scratch"), 128)
    spent = steps * step_flops(student, bench.model, DistillConfig("logits"), 128)
    assert steps < 6 and abs(spent - scratch) < scratch / 4


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
    assert all(math.isfinite(row[-1]) for row in result["rows"])
    assert result["command"].split()[-1] in COMPRESSION_EXPERIMENTS


def test_plot_shows_every_method() -> None:
    names = ("nearest, absmax", "nearest, affine", "GPTQ", "AWQ", "AWQ, then GPTQ")
    rows = [
        [f"{name}, {bits} bits", bits + 0.5, [1 / bits**3, 2 / bits**3], 0.1, 0.5] for name in names for bits in (4, 2)
    ]
    figure = plot_bits(rows)
    assert len(figure.axes[0].get_legend().get_texts()) == 5
    compression_experiments.plt.close(figure)


def test_a_ratio_fits_a_cell() -> None:
    assert short_ratio([1.0, 1.0, 2.0], [2.0, 3.0, 4.0]) == "2.00 (2.00 to 3.00)"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_seeds must be finite and >= 1, got 0"):
        CompressionFiguresConfig(n_seeds=0)
    with pytest.raises(ValueError, match="qat_steps must be finite and >= 2, got 1"):
        CompressionFiguresConfig(qat_steps=1)
