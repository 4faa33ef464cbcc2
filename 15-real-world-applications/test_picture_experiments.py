"""Proofs of picture_experiments.py and picture_failures.py: small runs fill the tables, every failure shows itself."""

import json
import random

import pytest

from picture_experiments import (
    PICTURE_EXPERIMENTS,
    PICTURE_VERBS,
    PictureFiguresConfig,
    PictureQuestionConfig,
    picture,
    picture_breaks,
    picture_recall,
    picture_tokens,
)
from picture_failures import PICTURE_BREAKS
from picture_model import FOLDER
from scene_pictures import CHOICES, KINDS, ask, draw_scene
from workbench import RunConfig


def config(folder) -> PictureFiguresConfig:
    return PictureFiguresConfig(n_seeds=1, picture_questions=2, picture_pairs=6, picture_shrink=400, folder=folder)


def table(folder, name: str) -> dict:
    return json.loads((folder / "results.json").read_text())[name]


@pytest.mark.parametrize("name", PICTURE_BREAKS)
def test_every_failure_is_far_from_the_sound_value(name):
    for what, sound, broken in PICTURE_BREAKS[name][0](RunConfig(seed=0)):
        assert what.startswith(name)
        if name in ("picture-behind", "last-layer"):
            assert broken == 0 < 0.01 < sound
        else:
            assert broken > 2 * sound > 0


def test_small_runs_fill_the_tables_and_what_was_measured_is_kept(tmp_path, monkeypatch):
    run = RunConfig(seed=0, out=tmp_path / "run")
    picture_recall(config(tmp_path), run)
    rows = table(tmp_path, "picture-recall")["rows"]
    assert [row[0] for row in rows] == ["seen pairs", "held-out pairs", "chance"]
    monkeypatch.setattr("picture_experiments.train_pairs", None)  # a second run trains nothing
    picture_recall(config(tmp_path), run)
    picture_tokens(config(tmp_path), run)
    costs = [row[1] for row in table(tmp_path, "picture-tokens")["rows"]]
    assert costs == ["15", "16", "24", "51", "591"]


def test_the_names_are_registered_and_guessing_is_among_what_the_questions_leave():
    assert {"picture-recall", "picture-questions", "picture-breaks"} <= set(PICTURE_EXPERIMENTS)
    assert {"picture", "train-pictures"} <= set(PICTURE_VERBS)
    rng = random.Random(0)
    assert {kind: ask(draw_scene(rng), rng, kind).n_choices for kind in KINDS} == CHOICES
    assert picture_breaks.__doc__ and all(function.__doc__ for function, _ in PICTURE_EXPERIMENTS.values())


def test_bad_pictures_and_questions_are_one_line(tmp_path):
    run = RunConfig(seed=0)
    with pytest.raises(ValueError, match="give a picture and a question"):
        PictureQuestionConfig()
    (tmp_path / "x.png").write_bytes(b"no picture")
    for text, reason in [(("x.png",), "not a sound"), (("absent.png",), "absent.png")]:
        with pytest.raises(ValueError, match=reason):
            picture(PictureQuestionConfig(text=(str(tmp_path / text[0]),)), run)


@pytest.mark.skipif(not FOLDER.exists(), reason="made by the verb train-pictures")
def test_the_verb_draws_and_answers(tmp_path, capsys):
    path = str(tmp_path / "scene.png")
    picture(PictureQuestionConfig(text=(path, "how many dots?"), draw=True), RunConfig(seed=0))
    drawn, answer = capsys.readouterr().out.splitlines()
    assert drawn.startswith("drew ") and answer in ("0.", "1.", "2.", "3.")
    with pytest.raises(ValueError, match="limit is 200"):
        picture(PictureQuestionConfig(text=(path, "a" * 201)), RunConfig(seed=0))
