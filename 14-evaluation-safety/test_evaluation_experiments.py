"""Proofs of the experiments' parts: the truth they compare with, and tables that land in results.json."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import evaluation_experiments
from course_model import load_course_model
from evaluation_experiments import (
    EVALUATION_EXPERIMENTS,
    STRENGTHS,
    EvaluationFiguresConfig,
    documents_of,
    draw_games,
    fact_duels,
    normal_below,
    rejects,
    rejects_unpaired,
    right_answer,
    rounded,
    told_facts,
)
from tiny_world import World
from workbench import RunConfig

SMALL = {"n_seeds": 2, "n_truth": 24, "n_draws": 4, "n_questions": 8, "n_duels": 120, "n_fresh": 2, "n_members": 8}


@pytest.mark.parametrize("name", EVALUATION_EXPERIMENTS)
def test_every_experiment_fills_its_table(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_experiments, "COUNTS", (0, 2))
    if name == "calibration":  # few questions may all be answered rightly, and then no temperature is best
        monkeypatch.setattr(evaluation_experiments, "fit_temperature", lambda logits, labels: 2.0)
    monkeypatch.setattr(
        evaluation_experiments, "ReportPlan", partial(evaluation_experiments.ReportPlan, n_forbidden=10)
    )
    sizes = SMALL | ({"n_seeds": 1} if name == "report" else {})  # a seed of it examines three models
    config = EvaluationFiguresConfig(**sizes, folder=tmp_path / "figures")
    EVALUATION_EXPERIMENTS[name][0](config, RunConfig(out=tmp_path / "out"))
    results = json.loads((tmp_path / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results
    for table in results.values():
        assert table["command"].endswith(f"figures {name}") and len(table["rows"]) >= 2
        numbers = [
            value for row in table["rows"] for cell in row[1:] for value in (cell if isinstance(cell, list) else [cell])
        ]
        assert all(np.isfinite(value) for value in numbers if not isinstance(value, str))


def test_documents_keep_their_questions_together() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2])
    assert [places.tolist() for places in documents_of(groups)] == [[0, 1], [2], [3, 4, 5]]


def test_the_truth_of_duels_is_the_worlds() -> None:
    for duel in fact_duels(60, 1, 0.5, 0.5, 2):
        scores = right_answer(duel.question, duel.answer_a), right_answer(duel.question, duel.answer_b)
        assert duel.truth == (1 + scores[0] - scores[1]) / 2
    duels = fact_duels(400, 2, 0.6, 0.75, 3)
    longer = [len(duel.answer_a.split()) - len(duel.answer_b.split()) for duel in duels]
    assert np.mean(longer) == pytest.approx(3, abs=0.3)
    assert np.mean([duel.truth for duel in duels]) == pytest.approx((1 + 0.6 - 0.75) / 2, abs=0.06)
    person = World().asked[0]
    assert right_answer(f"Question: where does {person} live? Answer:", World().facts[person]["town"] + ".") == 1.0


def test_no_person_is_in_both_halves() -> None:
    sides = [{q["person"] for q in told_facts(80, 3, fitting).questions} for fitting in (True, False)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(World().unasked)


def test_games_are_won_as_often_as_elo_says() -> None:
    games = draw_games(np.array([200.0, 0.0]), 4000, np.random.default_rng(0))
    score = np.mean([result if one == 0 else 1 - result for one, _, result in games])
    assert score == pytest.approx(1 / (1 + 10**-0.5), abs=0.03) and all(one != two for one, two, _ in games)
    assert {one for one, _, _ in draw_games(np.array(STRENGTHS), 200, np.random.default_rng(1))} == set(range(6))


def test_the_rejections_of_an_experiment_are_those_of_the_tests() -> None:
    one, two = np.array([1.0] * 10 + [0.0] * 30), np.array([0.0] * 10 + [0.0] * 30)
    assert rejects(one, two) and not rejects(one, one) and rejects_unpaired(one, two) and not rejects_unpaired(two, two)
    assert normal_below(1.959964) == pytest.approx(0.975, abs=1e-6)


def test_three_bits_change_a_copy_and_not_the_course_model() -> None:
    kept = load_course_model()[0].blocks[0].ffn.up_proj.weight
    ours, coarse = (made.model.blocks[0].ffn.up_proj.weight for made in (evaluation_experiments.course(), rounded()))
    assert torch.equal(ours, kept) and len(coarse[0].unique()) <= 8 < len(ours[0].unique())
