"""Proofs for scaling_optimization, scaling_failures and scaling_experiments: predictions come first, failures show."""

import dataclasses
import json
import math

import numpy as np
import pytest

import scaling_experiments
from isoflop_runs import Cell, ScaleConfig, as_runs, plan_cells
from machine_roofline import Machine
from scaling_experiments import EXPERIMENTS, FiguresConfig, halves, plot_isoflop, plot_plans, run_experiments
from scaling_failures import PLANTED, PLANTED_BUDGETS, PLANTED_SIZES, SCALING_BREAKS, repeated_readings
from scaling_laws import planted_runs
from scaling_optimization import (
    PREDICTIONS,
    FitConfig,
    PlanConfig,
    PredictConfig,
    fit,
    main,
    nearest_size,
    plan,
    predict,
    predicted_run,
    print_published,
    report_laws,
    write_prediction,
)
from training_planner import Plan, best_plan, known_model
from workbench import Hardware, RunConfig

RUNS = planted_runs(PLANTED, PLANTED_SIZES, PLANTED_BUDGETS, 0.003, 2, 0)


def records_of(config: ScaleConfig) -> list[dict]:
    """Records as `scale` would leave them, whose losses come from the planted law."""
    rng, records = np.random.default_rng(0), []
    for cell in plan_cells(config):
        loss = PLANTED.loss(cell.n_parameters, cell.n_tokens) * math.exp(rng.normal(0, 0.003))
        facts = {"n_parameters": cell.n_parameters, "n_tokens": cell.n_tokens, "loss": loss, "gap": loss - 0.55}
        records.append(dataclasses.asdict(cell) | facts)
    return records


# Laws from the command line


def test_fit_reads_what_scale_left(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="has no runs; make some with: scaling_optimization.py scale --out"):
        fit(FitConfig(), RunConfig(out=tmp_path))
    records = records_of(ScaleConfig(budgets="1e10,2.5e10,6e10,1.5e11", n_seeds=2))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fit(FitConfig(n_boot=40), RunConfig(out=tmp_path))
    out = capsys.readouterr().out
    assert "approach 3: L = 0.5" in out and "approach 2: N_best ~ C^0." in out
    assert "the interval of e covers the world's entropy" in out, "0.549, and the planted E is 0.55"


def test_a_prediction_is_written_before_the_run_and_never_changed(tmp_path, monkeypatch, capsys) -> None:
    records = records_of(ScaleConfig(budgets="1e10,2.5e10,6e10,1.5e11"))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    seen: list[dict] = []

    def made(cells: list[Cell], *_: object) -> list[dict]:
        seen.append(json.loads((tmp_path / PREDICTIONS).read_text().splitlines()[-1]))
        return [{"loss": float(PLANTED.loss(cell.n_parameters, cell.n_tokens))} for cell in cells]

    monkeypatch.setattr("scaling_optimization.train_all", made)
    run, config = RunConfig(out=tmp_path), PredictConfig(target=6e11, n_target_seeds=2, n_boot=40)
    predict(config, ScaleConfig(), run)
    assert len(seen) == 1 and seen[0]["flops"] == 6e11, "the file had the prediction when the run began"
    cell = Cell(6e11, seen[0]["d_model"], seen[0]["n_layers"], 0)
    truth = float(PLANTED.loss(cell.n_parameters, cell.n_tokens))
    low, high = seen[0]["says"]["interval"]
    assert low < seen[0]["says"]["approach 3"] < high
    assert seen[0]["says"]["approach 3"] == pytest.approx(truth, rel=0.015)
    without = seen[0]["says"]["frontier, power law without floor"]
    assert without < truth, "a law without a floor promises too much"
    first = (tmp_path / PREDICTIONS).read_text()
    predict(config, ScaleConfig(), run)
    assert (tmp_path / PREDICTIONS).read_text().startswith(first) and "found: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no runs below 1e.09 FLOPs; make some with scale, or raise --target"):
        predict(PredictConfig(target=1e9), ScaleConfig(), run)


def test_the_size_that_is_predicted_is_near_the_optimum(tmp_path) -> None:
    cell, says = predicted_run(RUNS, PredictConfig(target=6e11, n_boot=30), RunConfig(out=tmp_path))
    assert (cell.d_model, cell.n_layers) == nearest_size(float(PLANTED.optimum(6e11)[0]))
    write_prediction(cell, says, len(RUNS), RunConfig(out=tmp_path))
    line = json.loads((tmp_path / PREDICTIONS).read_text())
    assert line["n_runs"] == len(RUNS) and line["when"].endswith("+00:00")


def test_laws_that_are_not_possible_are_said_to_be_so(tmp_path, capsys) -> None:
    one_budget, two_sizes = RUNS.take(RUNS.flops == RUNS.flops.min()), RUNS.take(RUNS.n_parameters < 8000)
    with pytest.raises(ValueError, match="need more than 5 different runs"):
        report_laws(two_sizes.take(two_sizes.flops < 5e10), FitConfig(n_boot=20), RunConfig(out=tmp_path))
    with pytest.raises(ValueError, match="of 20 samples have more than 5 different runs; train more sizes or budgets"):
        report_laws(one_budget, FitConfig(n_boot=20), RunConfig(out=tmp_path))
    report_laws(two_sizes, FitConfig(n_boot=40), RunConfig(out=tmp_path))
    assert "approach 2: not possible with these runs: a line through best sizes" in capsys.readouterr().out
    print_published(5.76e23)
    assert "18.4 tokens for each parameter" in capsys.readouterr().out


# The planner from the command line


def test_plan_prints_the_layout_that_was_asked_for_or_the_fastest(capsys) -> None:
    plan(PlanConfig(tensor_size=2, batch_size=512))
    out = capsys.readouterr().out
    assert "32 data x 2 tensor x 1 pipeline, ZeRO 1" in out and "share of the peak" in out and "fastest" not in out
    plan(PlanConfig(model="Llama-3.1-70B", n_gpus=64, n_tokens=2e12))
    out = capsys.readouterr().out
    best = best_plan(known_model("Llama-3.1-70B"), Plan(n_gpus=64, batch_size=1024), known_gpu())
    assert best.plan.layout in out and f"2e+12 tokens take {best.days(2e12):,.1f} days" in out
    assert "16 GPUs would do" in out and out.count("GPUs ") >= 6


def known_gpu():
    from training_cost import GPUS

    return GPUS["H100 SXM"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plan", "--model", "Llama-3.1-70B", "--tensor-size", "8", "--zero-stage", "0"], "more than the 72.0 GB"),
        (["plan", "--tensor-size", "3"], "n_gpus=64 is not divisible by tensor_size * pipeline_size = 3"),
        (["plan", "--tensor-size", "1", "--pipeline-size", "64", "--zero-stage", "0"], "is more than the 32 layers"),
        (["plan", "--gpu", "T4"], "unknown gpu 'T4'"),
        (["plan", "--n-gpus", "1"], "no layout of 1 x H100 SXM holds this model"),
        (["scale", "--budgets", "1e10,-5"], "every budget must be a finite number of FLOPs > 0"),
        (["scale", "--n-seeds", "0"], "n_seeds must be finite and >= 1"),
        (["predict", "--target", "nan"], "target must be finite and > 0, got nan"),
        (["fit", "--n-boot", "3"], "n_boot must be finite and >= 20"),
        (["roofline", "--d-model", "100"], "must be a multiple of 64"),
        (["figures", "isoflops"], "unknown experiment 'isoflops'; did you mean 'isoflop'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: list[str], message: str, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--out", str(tmp_path)] if arguments[0] != "plan" else arguments)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and message in error and error.count("\n") == 1


# Failures


@pytest.mark.parametrize("name", ["embeddings-left-out", "no-floor", "three-utilisations", "points-as-runs"])
def test_failures_show(name: str, tmp_path) -> None:
    rows = SCALING_BREAKS[name][0](RunConfig(out=tmp_path))
    assert len(rows) >= 2 and all(sound != broken for _, sound, broken in rows)
    if name == "embeddings-left-out":
        assert rows[0][2] > 0.7 > 0.5 > rows[0][1]
    if name == "no-floor":
        assert abs(rows[-1][2]) > 0.1 > abs(rows[-1][1]), "far outside, only the law with a floor is near"
        assert rows[0][2] < 0.05, "on the budgets that were fitted both look well"
    if name == "points-as-runs":
        assert rows[0][1] > 0.8 > rows[0][2] and rows[1][2] < 0.7 * rows[1][1]
    if name == "three-utilisations":
        assert max(row[2] for row in rows) / min(row[2] for row in rows) > 1.3


def test_the_tour_goes_through_all_its_stations(tmp_path, monkeypatch, capsys) -> None:
    def made(cells: list[Cell], *_: object, **__: object) -> list[dict]:
        (tmp_path / "demo").mkdir(exist_ok=True)
        rng, records = np.random.default_rng(2), []
        for cell in cells:
            loss = float(PLANTED.loss(cell.n_parameters, cell.n_tokens) * math.exp(rng.normal(0, 0.01)))
            facts = {"n_parameters": cell.n_parameters, "n_tokens": cell.n_tokens, "loss": loss}
            records.append(dataclasses.asdict(cell) | facts)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "demo" / "runs.jsonl").write_text(text)
        return records

    paper = Machine(Hardware("paper", 1e9, 1e9, 1e11, "by hand"), ((1e3, 8e9), (1e6, 1e9)), overhead=1e-6)
    monkeypatch.setattr("scaling_optimization.train_all", made)
    monkeypatch.setattr("scaling_optimization.measure", lambda n_rounds: paper)
    monkeypatch.setattr("scaling_optimization.place", lambda works, machine, n_rounds: (machine, []))
    main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    for station in (
        "approach 3: L = ",
        "predicted for width",
        "found: ",
        "59.1 tokens",
        "ridge 100.0 FLOP/byte",
        "GPUs  ",
    ):
        assert station in out, station


def test_demo_shows_a_failure(capsys) -> None:
    main(["--break", "embeddings-left-out"])
    out = capsys.readouterr().out
    assert "0.4565 as it should be, 0.779 with --break embeddings-left-out" in out


def test_readings_of_a_run_stay_together_or_not() -> None:
    together, apart = repeated_readings(RUNS, 3, 0)
    assert len(together) == len(apart) == 3 * len(RUNS)
    assert len(np.unique(together.group)) == len(RUNS) and len(np.unique(apart.group)) == 3 * len(RUNS)


# The chapter's tables


def test_tables_that_need_no_training(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="n_documents must be finite and >= 1, got 0"):
        FiguresConfig(n_documents=0)
    config = FiguresConfig(only=("published-laws", "planner"), folder=tmp_path)
    run_experiments(EXPERIMENTS, config.only, tmp_path, config, RunConfig(out=tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"published-laws", "kaplan-by-counting", "zero-paper", "megatron", "llama-405b", "plans"} <= set(results)
    assert len(results["megatron"]["rows"]) == 10 and (tmp_path / "plans.svg").exists()
    ratios = [row[-1] for row in results["megatron"]["rows"]]
    assert max(map(abs, ratios)) < 0.12
    assert all(result["command"].startswith("python 12-scaling") for result in results.values())


def test_tables_of_runs(tmp_path, monkeypatch) -> None:
    config = FiguresConfig(only=("isoflop", "prediction"), n_boot=24, n_seeds=2, folder=tmp_path / "figures")

    def made(cells: list[Cell], *_: object, **__: object) -> list[dict]:
        rng, records = np.random.default_rng(1), []
        for cell in cells:
            loss = float(PLANTED.loss(cell.n_parameters, cell.n_tokens) * math.exp(rng.normal(0, 0.003)))
            facts = {"n_parameters": cell.n_parameters, "n_tokens": cell.n_tokens, "loss": loss}
            records.append(dataclasses.asdict(cell) | facts | {"n_body": cell.n_parameters - 368 * cell.d_model})
        return records

    monkeypatch.setattr(scaling_experiments, "train_all", made)
    run_experiments(EXPERIMENTS, config.only, config.folder, config, RunConfig(out=tmp_path / "runs"))
    results = json.loads((config.folder / "results.json").read_text())
    assert [row[0] for row in results["isoflop"]["rows"]] == ["1.0e+10", "2.5e+10", "6.0e+10", "1.5e+11"]
    assert any(row[0].startswith("3, parametric; without embeddings") for row in results["exponents"]["rows"])
    assert results["floor"]["rows"][0][0] == "entropy of the world"
    said = {row[0]: row[1] for row in results["prediction"]["rows"]}
    assert said["approach 3"] == pytest.approx(np.mean(results["prediction"]["rows"][0][3]), rel=0.01)
    assert (config.folder / "isoflop.svg").exists() and (tmp_path / "runs" / PREDICTIONS).exists()


def test_figures_and_parts() -> None:
    assert len(plot_isoflop(RUNS).axes) == 2
    parts = halves(RUNS)
    assert parts["the three largest budgets"].flops.min() > RUNS.flops.min()
    assert (parts["runs of more than 20 tokens for each parameter"].n_tokens >= 20 * 4e3).all()
    best = best_plan(known_model("Llama-3.1-8B"), Plan(n_gpus=8, batch_size=64), known_gpu())
    assert len(plot_plans({"one": [(8, best)], "two": [(8, best)]}).axes) == 2
    assert as_runs(records_of(ScaleConfig())).flops.max() == 6e10
    with pytest.raises(ValueError, match="target must be finite and > 0"):
        FiguresConfig(target=-1)
