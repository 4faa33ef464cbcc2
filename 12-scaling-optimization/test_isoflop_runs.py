"""Proofs for isoflop_runs: budgets are kept, runs are remembered, records say what was trained; early readings."""

import dataclasses
import json
import math

import numpy as np
import pytest

import isoflop_runs
from isoflop_runs import (
    FAMILY,
    RECIPE,
    RECORDS,
    Cell,
    ScaleConfig,
    as_runs,
    early_readings,
    family_config,
    matmul_weights,
    plan_cells,
    read_records,
    train_all,
    world_entropy,
)
from llm_calculators import count_parameters, forward_flops
from modern_llm_architectures import CausalLM
from transformer_architecture import tiny_world
from workbench import RunConfig

TINY = ScaleConfig(budgets="1e9", n_documents=20, n_entropy=200, least_ratio=0.5)


def test_every_run_keeps_its_budget() -> None:
    config = ScaleConfig(budgets="1e10,2.5e10,6e10,1.5e11", n_seeds=2)
    cells = plan_cells(config)
    assert len({(cell.d_model, cell.flops, cell.seed) for cell in cells}) == len(cells)
    for cell in cells:
        assert 6 * cell.n_parameters * cell.n_tokens == pytest.approx(cell.flops, rel=0.01)
        assert cell.n_tokens == cell.n_steps * RECIPE.batch_size * RECIPE.seq_len
        one_step = 6 * cell.n_parameters * RECIPE.batch_size * RECIPE.seq_len
        assert abs(6 * cell.n_parameters * cell.n_tokens - cell.flops) <= one_step / 2  # the nearest number of steps
    for flops in config.flops:
        ratios = [cell.n_tokens / cell.n_parameters for cell in cells if cell.flops == flops]
        assert len(ratios) >= 6 and min(ratios) < 8 and max(ratios) > 60


@pytest.mark.parametrize("size", FAMILY)
def test_n_is_what_multiplies_a_token(parity, size: tuple[int, int]) -> None:
    config = family_config(*size)
    model = CausalLM(config)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    parity("N of a run", "matrices of the model", "output", matmul_weights(config), matrices, 0)
    assert forward_flops(config, 64)["matrices"] == 2 * matrices


def test_the_family_has_heads_of_8_and_from_width_32_on_of_16() -> None:
    configs = [family_config(*size) for size in FAMILY]
    assert [config.d_head for config in configs] == [8] * 4 + [16] * 4
    assert [config.n_heads for config in configs] == [1, 1, 2, 3, 2, 2, 3, 5]
    assert all(config.d_ff == 3 * config.d_model for config in configs)


def test_two_sizes_are_no_curve() -> None:
    ratios = sorted(1e10 / 6 / Cell(1e10, *size, 0).n_parameters ** 2 for size in FAMILY)
    settings = dict(budgets="1e10", least_ratio=0.99 * ratios[3])
    assert len(plan_cells(ScaleConfig(**settings, most_ratio=1.01 * ratios[5]))) == 3
    with pytest.raises(ValueError, match=r"budget 1e.10 has 2 sizes"):
        plan_cells(ScaleConfig(**settings, most_ratio=1.01 * ratios[4]))


def test_runs_are_remembered_and_read_back(tmp_path, monkeypatch, capsys) -> None:
    run, cells = RunConfig(out=tmp_path), plan_cells(TINY)
    records = train_all(cells, TINY, run)
    assert "gap" in capsys.readouterr().out and read_records(tmp_path) == records
    chance = math.log(len(tiny_world()[1]))
    for record, cell in zip(records, cells, strict=True):
        assert record["n_steps"] == cell.n_steps and 0 < record["gap"] < chance - world_entropy(200)[0]
        assert record["loss"] == pytest.approx(record["gap"] + world_entropy(200)[0])
        assert record["n_body"] == cell.n_parameters - len(tiny_world()[1]) * cell.d_model

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(isoflop_runs, "train_cell", fail)
    assert train_all(cells, TINY, run, say=False) == records
    with pytest.raises(AssertionError, match="trained again"):
        train_all(cells, dataclasses.replace(TINY, n_documents=21), run)
    monkeypatch.setattr(isoflop_runs, "RECIPE", dataclasses.replace(RECIPE, learning_rate=1e-2))
    with pytest.raises(AssertionError, match="trained again"):
        train_all(cells, TINY, run)


def test_records_become_runs() -> None:
    cells = plan_cells(ScaleConfig(n_seeds=2))
    records = [
        dataclasses.asdict(cell)
        | {"n_parameters": cell.n_parameters, "n_tokens": cell.n_tokens, "loss": 1.0}
        | {"n_body": cell.n_parameters - count_parameters(family_config(cell.d_model, cell.n_layers)).embedding}
        for cell in cells
    ]
    runs, bodies = as_runs(records), as_runs(records, "n_body")
    assert runs.flops.tolist() == [cell.flops for cell in cells], "nominal budgets"
    assert bodies.flops == pytest.approx(6 * bodies.n_parameters * bodies.n_tokens)
    assert (bodies.n_parameters < runs.n_parameters).all()
    assert len(np.unique(runs.group)) == len(cells) // 2, "seeds belong together"
    assert (bodies.group == runs.group).all()


def test_a_reading_before_the_end_is_of_another_schedule(tmp_path) -> None:
    rows = early_readings(16, 2, 60, (0.5, 0.7, 1.0), RunConfig(out=tmp_path), n_documents=60)
    assert [row[0] for row in rows] == [30, 42, 60]  # no multiples of the first
    assert rows[-1][1] == pytest.approx(rows[-1][2], abs=1e-9), "at its end both are one run"
    assert abs(rows[0][1] - rows[0][2]) > 0.02, "which of the two is lower depends on the length"


def test_bad_settings_and_files_are_refused(tmp_path) -> None:
    for budgets, message in (
        ("1e10,-1", "finite number of FLOPs > 0, got -1 in"),
        ("1e10,nan", "finite number of FLOPs > 0, got nan"),
        ("many", "budgets must be numbers with commas between, such as 1e10,3e10; got 'many'"),
    ):
        with pytest.raises(ValueError, match=message):
            ScaleConfig(budgets=budgets)
    with pytest.raises(ValueError, match="most_ratio=1 must be above least_ratio=2.5"):
        ScaleConfig(most_ratio=1)
    with pytest.raises(ValueError, match="budget 1e.16 has 0 sizes between 2.5 and 400 tokens"):
        plan_cells(ScaleConfig(budgets="1e16"))
    (tmp_path / RECORDS).write_text(json.dumps({"loss": 1, "n_parameters": 2, "n_tokens": 3}) + "\nnonsense\n")
    with pytest.raises(ValueError, match="runs.jsonl:2 is no record of a run; remove the line or the file"):
        read_records(tmp_path)
    assert read_records(tmp_path / "none") == [] and Cell(1e10, 16, 2, 0).seconds > 0
