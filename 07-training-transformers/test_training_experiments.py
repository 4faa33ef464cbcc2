"""Topic 07: the chapter's experiments run at any size, and their measures are right on cases with a known answer."""

import json
import math

import numpy as np
import pytest
import torch

import training_experiments as topic
from optimizers import gradient_squares
from training_experiments import (
    EXPERIMENTS,
    FiguresConfig,
    batches_of,
    best_rate,
    critical_batch,
    figures,
    held_out_loss,
    measure_noise,
    new_model,
    noise_along_training,
    steps_to_target,
    train,
    training_rows,
    width_run,
)
from training_transformers import TrainConfig
from workbench import BLOCK, RunConfig, render_table

TINY = {"n_seeds": 2, "n_documents": 8, "seconds": 0.1, "schedule_steps": 10, "width_steps": 10, "most_steps": 16}
TINY |= {"range_steps": 10}


@pytest.fixture
def run(tmp_path) -> RunConfig:
    return RunConfig(device="cpu", out=tmp_path / "out")


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(topic, "N_ROWS", 64)
    monkeypatch.setattr(topic, "N_EXAMINED", 4)
    monkeypatch.setattr(topic, "NOISE_PARTS", 3)


def shrink(monkeypatch) -> None:
    monkeypatch.setattr(topic, "OPTIMIZER_RATES", {"adamw": 0.01, "muon": 0.01})
    monkeypatch.setattr(topic, "GRID", (1.0,))
    monkeypatch.setattr(topic, "WIDTHS", (8, 16))
    monkeypatch.setattr(topic, "WIDTH_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(topic, "RANGE_WIDTHS", (8, 16))
    monkeypatch.setattr(topic, "BATCH_SIZES", (2, 8))
    monkeypatch.setattr(topic, "BATCH_RATES", (8e-3,))
    monkeypatch.setattr(topic, "SCHEDULE_RATES", (8e-3,))
    monkeypatch.setattr(topic, "COMPARED_SCHEDULES", ("constant", "wsd"))


def test_figures_runs_every_experiment_and_fills_the_chapter(tmp_path, monkeypatch, run, small) -> None:
    shrink(monkeypatch)
    (tmp_path / "README.md").write_text("<!-- results:begin optimizers -->\n<!-- results:end -->\n")
    own = ("muon", "memory", "optimizers", "width", "batch", "range", "schedules")
    figures(FiguresConfig(own, **TINY, target=5.5, folder=tmp_path / "figures"), run)
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    tables = "newton-schulz optimizer-memory optimizer-grid optimizers optimizer-starts width-grid width "
    tables += "batch-grid batch noise-scale range schedules"
    assert set(results) == set(tables.split())
    tuning = ("optimizer-grid", "width-grid", "batch-grid")
    assert all(results[name]["seeds"] == ([100] if name in tuning else [0, 1]) for name in tables.split()[2:])
    assert [row[0] for row in results["range"]["rows"]] == [8, 16] and len(results["range"]["rows"][0][1]) == 2
    drawn = {path.stem: path.stat().st_size for path in (tmp_path / "figures").glob("*.svg")}
    assert set(drawn) == {"newton_schulz", *own} - {"muon", "memory", "range"} and max(drawn.values()) < 120_000
    by_name = {row[0]: row for row in results["optimizers"]["rows"]}
    assert set(by_name) == {"adamw", "muon"} and len(by_name["adamw"][2]) == 2
    assert 0 < by_name["adamw"][3] < by_name["adamw"][2][0]  # a standard error, and a gap above the floor
    assert all(predicted == measured for _, predicted, measured, *_ in results["optimizer-memory"]["rows"])
    large = {row[0]: row[3:] for row in results["optimizer-memory"]["rows"]}
    assert large["adamw"] == [pytest.approx(8, rel=1e-4), pytest.approx(16 * 124.44e6 / 1e9, rel=1e-3)]
    width = {tuple(row[:2]): row for row in results["width"]["rows"]}
    assert width["standard", 8][3] == width["standard", 8][5]  # at the base width both rates are one
    assert BLOCK.search((tmp_path / "README.md").read_text())[3].strip() == render_table(results["optimizers"])


def test_bad_sizes_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'optimisers'; did you mean 'optimizers'"):
        FiguresConfig(("optimisers",))
    with pytest.raises(ValueError, match="seconds must be finite and > 0, got 0"):
        FiguresConfig(seconds=0.0)
    assert set(FiguresConfig(tuple(EXPERIMENTS)).only) == set(EXPERIMENTS)


def test_batches_are_the_next_rows_and_go_round(small) -> None:
    rows = training_rows(0, 7)
    assert rows["inputs"].shape == rows["targets"].shape == (7, topic.SEQ_LEN)
    second = batches_of(rows, 3)(1)
    assert torch.equal(second["inputs"], rows["inputs"][3:6])
    third = batches_of(rows, 3, start=2)(2)
    assert torch.equal(third["targets"], rows["targets"][[1, 2, 3]])


def test_a_run_that_diverges_has_an_infinite_gap_and_is_never_chosen(run, small) -> None:
    settings = TrainConfig(max_steps=12, warmup_steps=0, learning_rate=1e38, optimizer="sgd", max_skipped_steps=2)
    outcome = train(new_model(0, run, 16), settings, 0, 4)
    sound = train(new_model(0, run, 16), TrainConfig(max_steps=12, warmup_steps=0), 0, 4)
    assert outcome.gap == math.inf and topic.shown_gap(outcome.gap) == "diverged"
    assert 0 < sound.gap < 6 and sound.n_steps == 12
    assert best_rate({1e38: outcome, 7e-3: sound}) == 7e-3


def test_of_rates_that_one_seed_cannot_tell_apart_the_lowest_is_chosen() -> None:
    gaps = {0.1: 0.9, 0.2: 0.51, 0.4: 0.5, 0.8: 0.503, 1.6: math.inf}
    for error, chosen in ((0.02, 0.2), (0.004, 0.4), (1.0, 0.1)):
        outcomes = {rate: topic.Outcome(gap, error, 10, []) for rate, gap in gaps.items()}
        assert best_rate(outcomes) == chosen


def test_a_mistake_is_no_divergence(run, small, monkeypatch) -> None:
    def broken(*_args, **_options):
        raise ValueError("the data ended after 3 batches")

    monkeypatch.setattr(topic, "fit", broken)
    with pytest.raises(ValueError, match="data ended"):
        train(new_model(0, run, 16), TrainConfig(), 0, 4)


def test_critical_batch_recovers_a_known_curve_and_bears_noise() -> None:
    sizes, least, fewest = (1, 2, 4, 8, 16, 32, 64), 70.0, 630.0
    steps = [least * (1 + fewest / least / size) for size in sizes]
    for size, n_steps in zip(sizes, steps, strict=True):
        assert (n_steps / least - 1) * (size * n_steps / fewest - 1) == pytest.approx(1)
    assert critical_batch(sizes, steps) == (pytest.approx(least, rel=2e-3), pytest.approx(fewest, rel=2e-3))
    noisy = steps * np.exp(np.random.default_rng(0).normal(scale=0.05, size=len(steps)))
    assert critical_batch(sizes, noisy) == (pytest.approx(least, rel=0.2), pytest.approx(fewest, rel=0.2))


def test_steps_to_a_target_are_interpolated_and_infinite_if_not_reached(run, small, monkeypatch) -> None:
    """A loss that is known at every look: 5 - ln(steps), so that the target 5 - ln(20) is met at step 20."""
    seen = []
    monkeypatch.setattr(topic, "take_step", lambda *_: seen.append(0))
    monkeypatch.setattr(topic, "held_out_loss", lambda _: 5 - math.log(len(seen)))
    config = FiguresConfig(target=5 - math.log(20), most_steps=60)
    assert steps_to_target(4, 1e-3, 0, config, run) == pytest.approx(20, rel=1e-6)
    seen.clear()
    assert steps_to_target(4, 1e-3, 0, FiguresConfig(target=0.5, most_steps=60), run) == math.inf
    seen.clear()
    monkeypatch.setattr(topic, "held_out_loss", lambda _: math.nan)
    assert steps_to_target(4, 1e-3, 0, config, run) == math.inf and len(seen) == 8  # ends at the first look


def test_the_noise_scale_falls_if_the_rows_of_a_batch_are_alike(run, small) -> None:
    """Rows that repeat agree on the gradient: signal is all there is. Different rows disagree."""
    model, rows = new_model(0, run, 16), training_rows(0, 64)
    alike = {name: tensor[:1].expand(64, -1) for name, tensor in rows.items()}
    same, mixed = measure_noise(model, alike, 0), measure_noise(model, rows, 0)
    assert abs(same.scale) < 1e-3 and mixed.noise > 100 * abs(same.noise)
    parts = [batches_of(rows, topic.NOISE_ROWS)(index) for index in range(3)]
    losses = [loss / count for loss, count in (topic.language_model_loss(model, part) for part in parts)]
    squares, square = gradient_squares(model, losses)
    assert mixed.signal + mixed.noise / 2 == pytest.approx(sum(squares) / 3, rel=1e-6)  # the lengths it came from
    assert mixed.signal + mixed.noise / 6 == pytest.approx(square, rel=1e-6)
    found = noise_along_training(8e-3, 0, FiguresConfig(target=0.1, most_steps=8), run)
    assert len(found) == 5 and found[-1][0] < found[0][0] < math.log(model.vocab_size) + 0.2  # looks at 1, 2, 3, 5, 8
    assert held_out_loss(model) == pytest.approx(math.log(model.vocab_size), abs=0.3)


def test_both_parametrisations_are_one_at_the_base_width_and_differ_beyond(run, small, monkeypatch) -> None:
    monkeypatch.setattr(topic, "WIDTHS", (8, 16))
    config = FiguresConfig(width_steps=10, n_documents=8)
    gaps = {(kind, d): width_run(kind, d, 8e-3, 0, config, run).gap for kind in topic.PARAMETRISATIONS for d in (8, 16)}
    assert gaps["standard", 8] == gaps["μP", 8] and gaps["standard", 16] != gaps["μP", 16]
