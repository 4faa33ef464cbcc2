"""Tests of model_life, life_stages: floors that no cut changes, answers as served, stopped lives, bad input."""

import json
import math
from dataclasses import replace

import pytest
from matplotlib import pyplot as plt

import model_life
import real_world_applications
from life_stages import Life, LifeConfig, OngoingChat, bits_per_byte, cut_shorter, follow, served, share, world
from model_life import LIFE_VERBS, STAGES, Stage, live, plot_life, threads
from tiny_world import World
from workbench import ROOT, RunConfig, run_verbs

SMALL = LifeConfig(n_documents=12, n_questions=10, n_forbidden=11, n_served=5, n_rounds=1)


def life_in(folder, **settings):
    return Life(replace(SMALL, **settings), RunConfig(out=folder, device="cpu"))


def test_the_floor_of_a_byte_is_the_same_whatever_the_cuts(tmp_path):
    ours, documents = life_in(tmp_path).tokenizer, World().documents(30, 3, "validation")
    texts = [document.text for document in documents]
    cuts = [cut_shorter(ours, n_merges) for n_merges in (0, 100, len(ours.merges))]
    floors = [bits_per_byte(cut, documents) for cut in cuts]
    lengths = [sum(len(cut.encode(text)) for text in texts) for cut in cuts]
    assert lengths[0] == sum(len(text.encode()) for text in texts) > lengths[1] > lengths[2]
    assert lengths[2] == sum(len(ours.encode(text)) for text in texts)
    assert floors == pytest.approx([floors[0]] * 3, abs=1e-12)
    nats = sum(sum(document.surprisal) for document in documents)
    assert floors[0] == pytest.approx(nats / math.log(2) / lengths[0], abs=1e-12)


def test_the_world_says_what_is_left_to_know_and_what_guessing_costs(tmp_path):
    row = world(life_in(tmp_path))
    gap, low, high = row["threads"]["even guessing"]["gap"]
    assert low < gap < high < math.log(len(World().vocabulary()))
    floor = float(row["value"].split()[0])
    assert floor + gap == pytest.approx(math.log(len(World().vocabulary())), abs=1e-4)


def test_the_engine_says_what_decoding_alone_says(tmp_path):
    life = life_in(tmp_path)
    life.rows["quantised"] = {"n_bits": 32, "n_bytes": 1}
    row = served(life)
    assert row["same"] == [5, 5] and "0 of 5 answers differ" in row["loss"]


def test_the_thread_has_its_intervals_and_the_chat_model_refuses_and_answers(tmp_path):
    life = life_in(tmp_path)
    found = follow(*life.rounded(32), life)
    assert set(found) == set(model_life.THREAD)
    assert all(low <= value <= high for value, low, high in found.values())
    assert found["refused"][0] == 1 and found["wrongly"][0] == 0 and found["right"][0] > 0.5
    assert 0 < found["gap"][0] < 0.2
    assert share([True, False, True, True])[0] == 0.75


def test_a_part_that_was_stopped_is_finished_and_then_kept(tmp_path):
    life, calls = life_in(tmp_path, from_nothing=True), []

    def work(run, begun):
        calls.append(begun)
        if len(calls) == 1:
            (run.out / "step-000001").mkdir()
            raise KeyboardInterrupt
        assert run.out == tmp_path / "from-nothing/base"

    (life.out / "base").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        life.make("base", work)
    first = json.loads((life.out / "base/made.json").read_text())
    seconds = life.make("base", work)
    assert calls == [False, True] and not first["done"] and seconds > first["seconds"] > 0
    assert life.make("base", work) == seconds and len(calls) == 2
    assert life_in(tmp_path).make("base", work) == 0 and len(calls) == 2
    with pytest.raises(
        ValueError, match=r"made with {'pretrain_steps': 4000}; give the same settings, or another --out"
    ):
        life_in(tmp_path, from_nothing=True, pretrain_steps=7).make("base", work)


def test_a_training_goes_on_with_the_same_settings():
    first, second = OngoingChat(chat_steps=9).training, OngoingChat.__mro__[1](chat_steps=9).training
    assert first.resume and not second.resume and replace(first, resume=False) == second


def stage_of(name, lived, stopped):
    def one(life):
        if name in stopped:
            raise KeyboardInterrupt
        lived.append(name)
        words = ("came_in", "came_out", "gain", "loss", "measure", "value", "beside")
        return dict.fromkeys(words, f"{name}!") | {"n_bytes": 3, "threads": {name: {"gap": [1.0, 0.5, 2.0]}}}

    return Stage(2, "sample", one, 1)


def test_a_life_that_was_stopped_keeps_its_finished_stages(tmp_path, monkeypatch, capsys):
    lived, stopped = [], {"third"}
    monkeypatch.setattr(
        model_life, "STAGES", {name: stage_of(name, lived, stopped) for name in ("one", "two", "third")}
    )
    run = RunConfig(out=tmp_path, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        live(SMALL, run)
    stopped.clear()
    capsys.readouterr()
    rows = live(SMALL, run)
    said = capsys.readouterr().out.splitlines()
    assert lived == ["one", "two", "third"] == [*rows] == [*threads(rows)]
    assert said[0].startswith("1 stages of one model's life, 2 are kept") and len(said) == 4
    assert said[1].endswith("(kept)") and said[3].startswith("02 third: third! -> third! | gained: third!")
    live(replace(SMALL, again=True), run)
    assert lived == ["one", "two", "third"] * 2
    live(replace(SMALL, n_served=6), run)
    assert lived == ["one", "two", "third"] * 3
    live(replace(SMALL, n_served=6, pretrain_steps=5), run)  # which the committed weights do not depend on
    assert len(lived) == 9


def test_the_figure_shows_every_model_and_every_attack():
    thread = {"gap": [0.5, 0.4, 0.6], "right": [0.5, 0.4, 0.6], "refused": [1, 0.9, 1], "wrongly": [0, 0, 0.1]}
    rows = {
        "base": {"threads": {"even guessing": {"gap": [3, 2, 4]}, "untrained": {"gap": [7, 6, 8]}, "base": thread}},
        "quantised": {"n_bits": 4, "threads": {"4 bits": thread}},
        "attacked": {"threads": {}, "attacks": {"no defence": [0.4, 0.2, 0.6], "guard": [0.0, 0.0, 0.1]}},
    }
    figure = plot_life({"committed": rows, "anew": rows})
    top, below, side = figure.axes
    named = [text.get_text() for text in top.get_legend().get_texts()]
    assert top.get_yscale() == "log" and named == ["committed", "anew"]
    assert [label.get_text() for label in below.get_xticklabels()] == ["untrained", "base", "4 bits\n(served)"]
    assert [label.get_text() for label in side.get_xticklabels()] == ["no\ndefence", "guard"] and len(side.patches) == 4
    plt.close(figure)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-questions", "3"], "n_questions must be finite and >= 10, got 3"),
        (["--max-damage", "0"], "max_damage must be finite and > 0, got 0.0"),
        (["--vocab-size", "10"], "vocab_size must be finite and >= 272, got 10"),
        (["--n-pretrain", "0"], "n_pretrain must be finite and >= 2, got 0"),
        (["--pretrain-steps", "0"], "pretrain_steps must be finite and >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_verbs("life", LIFE_VERBS, ["life", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1


def test_every_stage_names_a_verb_of_its_topic():
    for name, stage in STAGES.items():
        [folder] = ROOT.glob(f"{stage.topic:02}-*")
        scripts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if "test_" not in path.name)
        assert f'"{stage.verb}": (' in scripts, name


def test_the_topic_has_the_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        real_world_applications.main(["life", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--from-nothing" in said and "Live one model's life" in said
