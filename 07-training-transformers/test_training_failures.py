"""Topic 07: each failure shows its symptom; the gallery and the autopsy are right on cases with a known answer."""

import copy
import dataclasses
import json
import math

import pytest
import torch

import training_experiments
import training_failures
from packing import language_model_loss
from training_experiments import FiguresConfig, figures
from training_failures import (
    BREAKS,
    N_BAD,
    PRECISIONS,
    Autopsy,
    autopsy,
    gap_of,
    lost_updates,
    new_model,
    precision_gallery,
    precision_run,
    relative_error,
    underflow,
)
from training_speed import BenchConfig
from training_transformers import BREAK_NAMES, TrainConfig, WorldBatches, main
from transformer_architecture import ModelConfig
from workbench import RunConfig

SHAPE = ModelConfig(d_model=12, n_layers=1, n_heads=2, d_ff=20)
SHORT = TrainConfig(batch_size=4, seq_len=24, max_steps=12, warmup_steps=2)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(training_failures, "MODEL", SHAPE)
    monkeypatch.setattr(training_failures, "N_EXAMINED", 8)


@pytest.fixture
def run(tmp_path) -> RunConfig:
    return RunConfig(device="cpu", out=tmp_path)


def symptoms(name: str, run: RunConfig, config: TrainConfig = SHORT) -> dict[str, tuple[float, float]]:
    return {what.split(" (")[0]: (sound, wrong) for what, sound, wrong in BREAKS[name][0](SHAPE, config, run)}


def test_every_failure_has_a_name_on_the_command_line() -> None:
    assert set(BREAK_NAMES) == set(BREAKS)


def test_a_schedule_that_counts_micro_batches_ends_after_a_quarter(run) -> None:
    found = symptoms("schedule-per-micro-batch", run)
    sound, wrong = found["share of the run before the rate is at its end"]
    assert sound > 0.9 and wrong == pytest.approx(0.25, abs=0.01)
    gaps = found["held-out nats per token above the floor"]
    assert gaps[1] > gaps[0] + 0.1, "most of the training is lost"


def test_a_mean_of_means_is_another_gradient(run) -> None:
    found = symptoms("mean-of-means", run, dataclasses.replace(SHORT, max_steps=2))
    sound, wrong = found["error of the first gradient, relative"]
    assert sound < 1e-5 and wrong > 0.1
    sound, wrong = found["weight of a token of the shortest document, in tokens of the longest"]
    assert sound == 1 and wrong > 2


def test_decay_of_the_norms_pulls_their_gains_down(run) -> None:
    config = dataclasses.replace(SHORT, weight_decay=20.0)
    sound, wrong = symptoms("decay-layernorm", run, config)["mean gain of the norms"]
    assert wrong < 0.8 < 0.9 < sound


def test_without_bias_correction_the_first_step_is_three_times_too_long(run) -> None:
    found = symptoms("no-bias-correction", run)
    sound, wrong = found["largest move of a weight in the first step, in learning rates"]
    assert sound == pytest.approx(1.0, abs=1e-3) and wrong == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-3)


def test_a_norm_after_zero_grad_is_0(run) -> None:
    sound, wrong = symptoms("norm-after-zero-grad", run)["logged gradient norm"]
    assert sound > 0.1 and wrong == 0.0


def test_a_step_for_every_micro_batch_sees_a_part_of_the_rows(run) -> None:
    sound, wrong = symptoms("step-per-micro-batch", run)["error of the gradient of a step, relative"]
    assert sound == 0 and wrong > 0.1


def test_a_failure_is_shown_from_the_command_line(capsys, tmp_path) -> None:
    main(["--break", "norm-after-zero-grad", "--d-model", "12", "--n-heads", "2", "--out", str(tmp_path)])
    assert "0.0000 with --break norm-after-zero-grad" in capsys.readouterr().out


# The precision gallery


def test_the_gallery_shows_what_few_bits_lose(run) -> None:
    gallery = {what: (sound, wrong) for what, sound, wrong in precision_gallery(10, run)}
    assert len(gallery) == 7
    assert gallery["1000 times 1 added up: in fp32, in bf16"] == (1000, 256), "256 + 1 is 256 in 8 bits"
    assert gallery["Adam's epsilon of 1e-8: in fp32, in fp16"] == (1e-8, 0.0)
    stable, naive = gallery["softmax of the logits 100 and 99 in fp16: stable, naive"]
    assert stable == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3) and math.isnan(naive)
    assert gallery["deviation after LayerNorm of activations around 300: in fp32, in fp16"] == (1.0, 0.0)


def test_a_scale_saves_gradients_from_underflow(run) -> None:
    model, batch = new_model(SHAPE, run), WorldBatches(SHORT, 0)(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-6)  # gradients of the block become as small
    assert underflow(model, batch, 1.0) > 0.05 > underflow(model, batch, 2.0**14)


def test_lost_updates_by_hand() -> None:
    before = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        before.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight.copy_(torch.tensor([[1.0, 1.001, 0.999, 1.02]]))  # above 1 bf16 steps by 1/128, below by 1/256
    assert lost_updates(before, after) == pytest.approx(2 / 3)


def test_every_precision_trains(run) -> None:
    config = dataclasses.replace(SHORT, max_steps=3, warmup_steps=1)
    chance = gap_of(new_model(SHAPE, run))
    for name in PRECISIONS:
        gap, n_skipped = precision_run(name, config, run, 8)
        assert gap < chance or n_skipped, name


def test_relative_error_is_a_distance_over_a_length(run) -> None:
    model = new_model(SHAPE, run)
    language_model_loss(model, WorldBatches(SHORT, 0)(0))[0].backward()
    whole = [1.25 * parameter.grad for parameter in model.parameters()]
    assert relative_error(model, whole) == pytest.approx(0.2, rel=1e-5)


# The autopsy


def test_the_autopsy_reads_alarms_and_costs_by_hand() -> None:
    noise = (0.02 * torch.randn(60, generator=torch.Generator().manual_seed(0))).tolist()
    late, never = [2 + n for n in noise], [3 + n for n in noise]
    for step in range(32, 36):
        late[step] += 1
    found = Autopsy({"loss": late, "calm": never}, planted=30)
    assert (found.alarm("loss"), found.alarm("calm")) == (2, math.inf)
    after = late[30 + N_BAD : 30 + N_BAD + 25]
    assert found.cost() == pytest.approx(sum(after) / 25 - sum(late[5:30]) / 25)
    assert found.peak() == pytest.approx(max(late[33:]) - sum(late[5:30]) / 25)


def test_a_rate_that_jumps_moves_the_update_before_the_loss(run) -> None:
    config = TrainConfig(max_steps=55, warmup_steps=5, schedule="constant", batch_size=4, learning_rate=3e-3)
    found = autopsy("rate", config, 50, run)
    assert found.alarm("relative update") == 0 < found.alarm("loss")
    assert len(found.series["attention entropy"]) == 55
    ratios = found.series["relative update"]
    assert ratios[50] / ratios[49] == pytest.approx(10, rel=0.5) and ratios[54] < 3 * ratios[49]
    noisy = autopsy("batch", config, 50, run)
    assert noisy.series["loss"][50] > math.log(300), "random answers cannot be known"
    assert noisy.series["loss"][:50] == found.series["loss"][:50] and noisy.peak() < 1


def test_the_table_of_failures_is_what_each_failure_shows(tmp_path, monkeypatch, run) -> None:
    chosen = {name: BREAKS[name] for name in ("norm-after-zero-grad", "no-bias-correction")}
    monkeypatch.setattr(training_failures, "BREAKS", chosen)
    folder, seeded = tmp_path / "figures", dataclasses.replace(run, seed=0)
    figures(FiguresConfig(("breaks",), break_steps=10, folder=folder), dataclasses.replace(run, seed=5))
    result = json.loads((folder / "results.json").read_text())["breaks"]
    settings = TrainConfig(max_steps=10, warmup_steps=1)
    expected = [
        [f"`{name}`", *row] for name, (measure, _) in chosen.items() for row in measure(SHAPE, settings, seeded)
    ]
    assert result["rows"] == expected and len(expected) == 4 and result["seeds"] == [0]


def test_the_figures_of_failures_and_speed_run_at_any_size(tmp_path, monkeypatch, run) -> None:
    monkeypatch.setattr(training_failures, "SPIKES", {"bad batches": ("batch", 0.95, 1.0)})
    sizes = {"n_seeds": 1, "precision_steps": 10, "spike_steps": 30, "n_rounds": 1, "n_documents": 4}
    monkeypatch.setattr(training_experiments, "PRECISIONS", {"fp32": PRECISIONS["fp32"]})
    monkeypatch.setattr(training_experiments, "BenchConfig", lambda n_rounds: BenchConfig(n_rounds, n_texts=64))
    config = FiguresConfig(("precision", "spikes", "throughput"), **sizes, folder=tmp_path / "figures")
    figures(config, run)
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    assert set(results) == {"precision-gallery", "precision", "spikes", "step-speed", "batching-speed"}
    assert (tmp_path / "figures" / "spikes.svg").stat().st_size < 120_000
    kept = {row[0]: row[3] for row in results["step-speed"]["rows"]}
    assert kept["checkpointed"] < 0.5 * kept["plain"]
    shares = {row[0]: row[1] for row in results["batching-speed"]["rows"]}
    assert shares["padded"] < 0.8 < 0.9 < shares["packed"] and shares["bucketed"] > 0.85
