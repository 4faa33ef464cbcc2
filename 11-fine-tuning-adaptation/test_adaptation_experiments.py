"""Topic 11: the experiments compare what they say they compare, and run at any size."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import adaptation_experiments
import fine_tuning_adaptation
from adaptation_experiments import (
    EXPERIMENTS,
    RANKS,
    STEADY,
    TOLD,
    FiguresConfig,
    Trial,
    adam_bytes,
    rank_trial,
    refusals,
)
from course_model import load_course_model
from exact_policies import gae_loss
from fine_tuning_adaptation import RATES, MethodConfig, SftConfig, adapt, fisher_diagonal
from low_rank_adapters import LoraConfig
from policy_gradients import grpo_loss, rloo_loss
from prompt_tuning import trained_parameters
from teaching_signals import fine_tuning_signal, group_signal, pair_signal, plot_signals
from workbench import RunConfig

TINY = {"n_seeds": 2, "sft_steps": 2, "n_questions": 1, "n_documents": 4}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[FiguresConfig, RunConfig]:
    """One folder for all, so that trainings which tables share are made once."""
    folder = tmp_path_factory.mktemp("figures")
    return FiguresConfig(**TINY, folder=folder), RunConfig(out=folder / "runs")


def table(config: FiguresConfig, name: str) -> dict:
    return json.loads((config.folder / "results.json").read_text())[name]


def test_all_methods_are_compared_and_no_training_is_made_twice() -> None:
    assert {trial.method for trial in adaptation_experiments.METHOD_TRIALS.values()} == set(RATES)
    groups = [getattr(adaptation_experiments, f"{name}_TRIALS").values() for name in ("SFT", "METHOD", "KEPT", "TASK")]
    trials = [*itertools.chain(*groups), *map(rank_trial, RANKS), rank_trial(64, stable=True)]
    different = [trial for index, trial in enumerate(trials) if trial not in trials[:index]]
    names = {trial.name(FiguresConfig(), 0) for trial in trials}  # by which a training is remembered
    assert len(names) == len(different) < len(trials)


def test_rank_eight_is_the_default_and_both_scales_meet_there() -> None:
    assert rank_trial(8) == Trial("lora")
    stable = LoraConfig(**rank_trial(8, stable=True).lora)
    assert stable.scale == pytest.approx(LoraConfig().scale) and LoraConfig().lora_rank == 8
    assert [LoraConfig(**rank_trial(rank).lora).scale for rank in RANKS if rank != 8] == [16, 8, 4, 1, 0.5, 0.25]


def test_the_optimizers_bytes_are_counted_on_an_optimizer() -> None:
    model, tokenizer = load_course_model()
    model = adapt(model, tokenizer, MethodConfig("lora"), LoraConfig(lora_rank=3))
    before = {name: part.clone() for name, part in model.named_parameters()}
    counted = adam_bytes(model)
    n_tensors = sum(part.requires_grad for part in model.parameters())
    assert 8 * trained_parameters(model) <= counted <= 8 * trained_parameters(model) + 8 * n_tensors
    assert all(torch.equal(part, before[name]) and part.grad is None for name, part in model.named_parameters())


@pytest.mark.parametrize("name", ["sft", "keeping", "ranks", "nf4", "refusals"])
def test_experiments_run_at_any_size(name: str, setting, monkeypatch) -> None:
    config, run = setting
    if name in ("sft", "ranks"):
        config = replace(config, n_seeds=1)  # two stand side by side in the others
    monkeypatch.setattr(adaptation_experiments, "SftConfig", partial(SftConfig, n_instructions=70))
    monkeypatch.setattr(
        fine_tuning_adaptation, "fisher_diagonal", lambda model, old, _, seed: fisher_diagonal(model, old, 2, seed)
    )
    monkeypatch.setattr(adaptation_experiments, "RANKS", (1, 8))
    monkeypatch.setattr(adaptation_experiments, "STABLE_RANKS", (2,))
    kept = adaptation_experiments.KEPT_TRIALS
    monkeypatch.setattr(adaptation_experiments, "KEPT_TRIALS", {key: kept[key] for key in ("full", "full, EWC 10")})
    monkeypatch.setattr(adaptation_experiments, "TASK_TRIALS", {"all seven": kept["full"]})
    EXPERIMENTS[name][0](config, run)
    rows, heads = table(config, name)["rows"], [column["name"] for column in table(config, name)["columns"]]
    expected = {"sft": 6, "keeping": 3, "ranks": 4, "nf4": 8, "refusals": 1}
    assert len(rows) == expected[name]
    if name in ("keeping", "ranks"):  # by category: a mean would hide which one moved
        assert heads[-len(STEADY) - 2 - (name == "keeping") :][: len(STEADY)] == list(STEADY)
    if name == "refusals":
        assert heads[1:] == ["refused", "refused"]
        assert all(0 <= share <= 1 for shares in rows[0][1:] for share in shares)
    if name == "sft":
        assert [column["name"] for column in table(config, name)["columns"]][1:7] == list(TOLD)
        assert rows[0][0] == "the course model" and rows[-1][0] == "guessing"
    if name == "nf4":
        errors = [row[2] for row in rows]
        assert errors[0] < errors[2] < errors[4] < errors[6]  # larger blocks, coarser scales
        assert rows[3][1] < rows[2][1] < 4.6  # bits per weight at block 64: with double quantisation, and without


def test_refusals_are_counted_where_they_belong_and_where_not(setting, monkeypatch) -> None:
    """A model that refuses whatever names the vault, and one that refuses everything."""
    config, run = setting
    monkeypatch.setattr(adaptation_experiments, "trained", lambda *_: (None, None, []))
    for seed, word, wanted in ((90, "vault", (1.0, 0.0)), (91, "", (1.0, 1.0)), (92, "no such word", (0.0, 0.0))):

        def respond(model, tokenizer, prompts: list[str], word: str = word) -> list[str]:
            return ["Sorry, no." if word in prompt else "I am not sorry." for prompt in prompts]

        monkeypatch.setattr(adaptation_experiments, "respond", respond)
        found = refusals(Trial(), config, run, seed)
        assert (found["forbidden"], found["allowed"]) == wanted


def test_an_interrupted_experiment_goes_on(setting, monkeypatch) -> None:
    config, run = setting
    config = replace(config, n_seeds=1)
    monkeypatch.setattr(adaptation_experiments, "SftConfig", partial(SftConfig, n_instructions=70))
    trial = Trial("bitfit")
    first = adaptation_experiments.measured(trial, config, run)
    monkeypatch.setattr(adaptation_experiments, "measure", None)  # a second training would fail
    assert adaptation_experiments.measured(trial, config, run) == json.loads(json.dumps(first))


def test_every_token_of_the_figure_is_pushed_as_its_derivation_says() -> None:
    """RLOO alike, GRPO over the length, PPO up to the digit that decides, a factor of lambda weaker for each step."""
    long, short = [1.0] * 7, [1.0] * 3
    before = [0.5**4, 0.5**3, 0.25, 0.5, 1.0, 0.0, 0.0]
    wanted = {
        rloo_loss: (long, short),
        grpo_loss: ([3 / 7] * 7, short),
        gae_loss: (before, [1.0, 0.0, 0.0]),
    }
    for loss, up in wanted.items():
        rows = [[push for _, push in row] for row in group_signal(loss)]
        expected = [*up, *([-push for push in row] for row in up)]
        assert all(got == pytest.approx(want, abs=1e-6) for got, want in zip(rows, expected, strict=True)), loss
    (given,), pair = fine_tuning_signal(), pair_signal()
    assert [push for _, push in given] == [None] * 6 + long
    assert [[push for _, push in row[6:]] for row in pair] == [long, [-1.0] * 7]
    assert len(plot_signals().axes) == 5


def test_the_seconds_of_every_experiment_are_announced() -> None:
    assert all(seconds > 0 and show.__doc__ for show, seconds in EXPERIMENTS.values())
