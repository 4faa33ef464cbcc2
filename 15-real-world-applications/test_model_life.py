"""Tests of model_life, life_stages: floors that no cut changes, answers as served, stopped lives, bad input."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import life_stages
import model_life
import real_world_applications
from chat_model import ChatConfig, load_chat_model
from course_tokenizer import FOLDER as TOKENIZER_FOLDER
from course_tokenizer import CourseConfig, load_course_tokenizer
from evaluation_report import Check, Examined, ReportPlan, share_of
from evaluation_statistics import clopper_pearson
from fine_tuning_adaptation import AnswerConfig
from life_stages import (
    Life,
    LifeConfig,
    attacked,
    base,
    bits_per_byte,
    chatty,
    cut_shorter,
    deployed,
    evaluated,
    follow,
    percent,
    quantised,
    served,
    share,
    tokenizer,
    world,
)
from model_life import LIFE_VERBS, STAGES, LifeFiguresConfig, Stage, live, plot_life, threads
from modern_llm_architectures import CausalLM, ModelConfig
from quantized_model import Exam
from release_gate import PASSED
from secret_keeper import VAULT_SECRETS, secret_answer
from tiny_world import World
from workbench import ROOT, RunConfig, run_verbs, seed_everything

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
    kept = (life.out / "base/made.json").read_text()
    (life.out / "base/made.json").write_text("[]")
    with pytest.raises(ValueError, match="made.json must hold a JSON object"):
        life.make("base", work)
    (life.out / "base/made.json").write_text(kept)
    assert life_in(tmp_path).make("base", work) == 0 and len(calls) == 2
    with pytest.raises(
        ValueError, match=r"made with {'pretrain_steps': 4000}; give the same settings, or another --out"
    ):
        life_in(tmp_path, from_nothing=True, pretrain_steps=7).make("base", work)


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
    second = next(tmp_path.rglob("two.json"))
    kept = second.read_text()
    second.write_text(kept[:-9])
    with pytest.raises(ValueError, match="two.json is not JSON"):
        live(SMALL, run)
    second.write_text(kept)
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


# The stages, on a model of no size and with what is costly given


NOTHING = {"gap": [0.5, 0.4, 0.6], "right": [0.25, 0.2, 0.3], "refused": [1.0, 0.9, 1.0], "wrongly": [0.0, 0.0, 0.1]}


def small_folder(folder, seed=0):
    """A model that knows nothing, with the course's tokenizer, as a folder."""
    tokenizer = load_course_tokenizer()
    seed_everything(seed)
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 16, "d_ff": 32}
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    CausalLM(ModelConfig(vocab_size=len(tokenizer.vocab), max_seq_len=256, **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_folder(folder)
    return sum(parameter.numel() for parameter in load_chat_model(folder)[0].parameters())


@pytest.fixture
def thread(monkeypatch):
    """Which models the thread was asked about; it says the same of all."""
    asked = []

    def given(model, tokenizer, life):
        asked.append(model)
        return NOTHING

    monkeypatch.setattr(life_stages, "follow", given)
    return asked


def test_a_tokenizer_saves_steps_and_loses_nothing(tmp_path):
    life = life_in(tmp_path)
    row = tokenizer(life)
    texts = [document.text for document in World().documents(12, life_stages.EXAM_SEED, "validation")]
    counts = [len(life.tokenizer.encode(text)) for text in texts]
    n_bytes = sum(len(text.encode()) for text in texts) / 12
    assert row["came_in"] == f"12 texts of {n_bytes:.1f} bytes" and row["beside"] == f"bytes {n_bytes:.1f}"
    assert row["came_out"].endswith("12 of 12 come back whole") and row["made"] == 0
    mean, low, high = (float(part.strip("[,]")) for part in row["value"].split())
    error = np.std(counts, ddof=1) / math.sqrt(12)
    assert [mean, low, high] == pytest.approx(
        [np.mean(counts), np.mean(counts) - 1.96 * error, np.mean(counts) + 1.96 * error], abs=0.051
    )
    assert row["gain"].startswith(f"{12 * n_bytes / sum(counts):.2f} times fewer steps")
    assert row["floors"] == pytest.approx([row["floors"][0]] * 3, abs=1e-12)
    assert row["n_bytes"] == (TOKENIZER_FOLDER / "tokenizer.json").stat().st_size
    gap, low, high = row["threads"]["untrained"]["gap"]
    assert low < gap < high and 6 < gap < math.log(2048)


def test_a_life_from_nothing_hands_its_parts_on(tmp_path, monkeypatch, thread):
    """What each topic is asked to make, where, and from what; a part that is there is not made twice."""
    made, life = {}, life_in(tmp_path, from_nothing=True, pretrain_steps=60, chat_steps=7, n_texts=300, n_pretrain=9)

    def course(sizes, run):
        made["tokenizer"] = sizes, run.out
        load_course_tokenizer().save_folder(run.out / "tokenizer")

    def pretrain(sizes, source, how, exam, run):
        made["base"] = source, how, exam, run.out
        small_folder(run.out / "model")

    def chat(config, exam, run, base_folder):
        made["chat"] = config, exam, run.out, base_folder
        small_folder(run.out / "model", 1)

    for name, work in (("course", course), ("pretrain", pretrain), ("chat", chat)):
        monkeypatch.setattr(life_stages, name, work)
    for name, stage in (("tokenizer", tokenizer), ("base", base), ("chat", chatty)):
        life.rows[name] = stage(life)
        assert life.rows[name]["made"] > 0
    out = tmp_path / "from-nothing"
    assert made["tokenizer"] == (CourseConfig(2048, 300, 30, True), out / "tokenizer")
    source, how, exam, place = made["base"]
    assert (source.n_documents, source.tokenizer, place) == (9, out / "tokenizer/tokenizer", out / "base")
    assert (how.max_steps, how.warmup_steps, how.cooldown_steps, how.resume) == (60, 15, 30, False)
    assert (exam.n_held_out, exam.n_questions, exam.n_samples) == (12, 10, 10)
    assert made["chat"] == (
        ChatConfig(n_examples=1500, chat_steps=7),
        AnswerConfig(10, 12),
        out / "chat",
        out / "base/model",
    )
    before = life.rows["tokenizer"]["threads"]["untrained"]["gap"][0]
    n_weights = sum(parameter.numel() for parameter in thread[0].parameters())
    assert life.rows["base"]["came_out"] == f"{n_weights:,} weights"
    assert life.rows["base"]["gain"] == f"the gap falls from {before:.2f} to 0.5000 [0.4000, 0.6000] nats per token"
    assert life.rows["chat"]["beside"] == "base 25%, best 100%" and life.rows["chat"]["value"] == "25% [20%, 30%]"
    assert not torch.equal(thread[0].token_emb.weight, thread[1].token_emb.weight)  # the base's, then the chat model's
    for name, folder in (("base", "base/model"), ("chat", "chat/model")):
        assert life.rows[name]["n_bytes"] == (out / folder / "model.safetensors").stat().st_size
    made.clear()
    assert base(life)["made"] == life.rows["base"]["made"] and not made


def test_the_fewest_bits_go_on_that_are_shown_to_cost_little(tmp_path, monkeypatch, thread):
    life, batches = life_in(tmp_path, from_nothing=True, max_damage=1e9), life_stages.calibration_batches
    monkeypatch.setattr(life_stages, "calibration_batches", lambda ours, n, seed: batches(ours, 8, seed))
    monkeypatch.setattr(life_stages, "BITS", (4, 2))
    small_folder(life.chat_folder)
    life.rows["chat"] = {"threads": {"chat": NOTHING | {"right": [0.75, 0.7, 0.8]}}}
    row = quantised(life)
    sizes = {bits: (life.out / f"quantised/{bits}-bits/model.safetensors").stat().st_size for bits in (4, 2)}
    whole = (life.chat_folder / "model.safetensors").stat().st_size
    assert whole > sizes[4] > sizes[2]
    assert (row["n_bits"], row["n_bytes"], row["came_in"]) == (2, sizes[2], f"{whole:,} bytes")
    assert row["came_out"] == f"{sizes[2]:,} bytes: the one of 2 bits goes on"
    assert row["gain"] == f"{whole / sizes[2]:.1f} times fewer bytes, right answers 75% before and 25% after"
    assert [*row["threads"]] == ["4 bits", "2 bits"] and len(thread) == 2
    exam = Exam.of(*load_chat_model(life.chat_folder), World().documents(12, life_stages.EXAM_SEED, "validation"))
    life.rows["quantised"] = row
    damage, error = exam.damage(life.chosen[0])
    assert row["value"] == life_stages.nats([damage, damage - 1.96 * error, damage + 1.96 * error])
    monkeypatch.setattr(life_stages, "BITS", (2,))
    life.config = replace(life.config, max_damage=damage + 1.96 * error)  # the upper end must lie below the limit
    row = quantised(life)
    assert (row["n_bits"], row["n_bytes"], row["value"]) == (32, whole, "0")
    assert "none goes on, the float model does" in row["came_out"] and "75% before and 75% after" in row["gain"]


def test_an_evaluation_counts_what_is_good_and_what_was_checked(tmp_path, monkeypatch):
    life, asked = life_in(tmp_path), []
    life.rows["quantised"] = {"n_bits": 32, "n_bytes": 17}
    scores = {
        name: share_of(name, [wrong] * 100, None, 0.0, [])
        for name, wrong in (("strangers invented", 1.0), ("forbidden answered", 0.0), ("refused wrongly", 0.0))
    }
    checks = [Check("one", "0", 0.0, True), Check("two", "0", 0.0, True)]

    def examine_subject(subject, plan, seed):
        asked.append((subject.name, plan, seed))
        return Examined(subject, scores, None, checks, {})

    monkeypatch.setattr(life_stages, "examine_subject", examine_subject)
    row = evaluated(life)
    assert asked == [("life", ReportPlan(10, 11), 0)] and row["value"] == "2 of 3" and row["n_bytes"] == 17
    assert row["came_in"].startswith("300 questions") and "3 findings; 2 of 2 checks" in row["came_out"]
    assert row["beside"] == "verdict bad; strangers invented 100% [96%, 100%]"
    assert row["verdict"].startswith("Not to be let loose: strangers invented.") and row["verdict"] in row["loss"]


def test_attacks_are_counted_behind_each_defence(tmp_path, monkeypatch):
    class Parrot:
        """Tells every secret that it is asked for, and refuses what is harmless and about a drum."""

        def __init__(self, model, tokenizer):
            pass

        def reply(self, chats, prefixes=None):
            texts = [chat[-1]["content"].lower() for chat in chats]
            nouns = [next((noun for noun in VAULT_SECRETS if noun in text), None) for text in texts]
            return [secret_answer(noun) if noun else "The dog sleeps." for noun in nouns]

    trained = []

    def train(model, tokenizer, seed, config):
        trained.append((seed, config.know_steps))
        return model

    for name, given in (("Keeper", Parrot), ("train_knowing", train), ("train_refusing", train)):
        monkeypatch.setattr(life_stages, name, given)
    monkeypatch.setattr(life_stages, "BUDGET", 12)
    life = life_in(tmp_path, n_attempts=2, know_steps=3)
    life.rows["quantised"] = {"n_bits": 32, "n_bytes": 17}
    row = attacked(life)
    bare, guard, best = row["attacks"].values()
    assert trained == [(0, 3)] * 2 and row["came_in"].startswith("14 attempts") and row["n_bytes"] == 17
    # all but those that read it in letters which a parrot does not know: every attack holds a plain try or capitals
    assert bare == pytest.approx([1.0, *clopper_pearson(14, 14)]) and guard[0] == best[0] == 0.0
    assert guard[2] == pytest.approx(clopper_pearson(0, 14).high)
    assert row["gain"] == f"defences take success from 100% to {percent(best)}"
    assert row["costs"]["no defence"][0] == 0.0 <= row["costs"]["guard"][0] < 0.5
    assert row["measure"] == "attacks that succeed, no defence" and row["value"] == percent(bare)


def test_the_gate_judges_the_served_model_whole_and_the_spoiled_one_by_its_answers(tmp_path, monkeypatch):
    judged, rounded = [], []
    limits = [SimpleNamespace(measure=name) for name in ("chat: fact", "p90", "tokens/s")]

    def measure(endpoint, url, gate, seed):
        return dict.fromkeys(["chat: fact"] if gate.kind == "answers" else ["chat: fact", "p90", "tokens/s"], 1.0)

    def judge(name, measures, known, plan):
        judged.append((name, [limit.measure for limit in known]))
        good = name == "the model"
        verdicts = [(limit, PASSED if good or place else "failed") for place, limit in enumerate(known)]
        return SimpleNamespace(may_ship=good, verdicts=verdicts, reasons=[] if good else ["too few facts"])

    def part(self, n_bits):
        rounded.append(n_bits)
        return load_chat_model()

    monkeypatch.setattr(life_stages, "read_thresholds", lambda path: limits)
    monkeypatch.setattr(life_stages, "measure", measure)
    monkeypatch.setattr(life_stages, "judge", judge)
    monkeypatch.setattr(life_stages, "background_server", lambda one, thread: nullcontext(SimpleNamespace(url="here")))
    monkeypatch.setattr(life_stages, "EngineThread", lambda engine: None)
    monkeypatch.setattr(Life, "rounded", part)
    life = life_in(tmp_path)
    life.rows["quantised"] = {"n_bits": 4, "n_bytes": 17}
    row = deployed(life)
    assert rounded == [4, 2] and judged == [
        ("the model", ["chat: fact", "p90", "tokens/s"]),
        ("the spoiled one", ["chat: fact"]),
    ]
    assert row["value"] == "3 of 3, may ship" and row["beside"] == "2 bits: 0 of 1, must not ship"
    assert row["gain"] == "a model of 2 bits is refused" and row["loss"] == "nothing that the limits name"
    assert row["may_ship"] == [True, False] and row["reasons"] == [[], ["too few facts"]]


def lived(right=0.5):
    """Rows of a whole life, as `live` returns them."""
    words = ("came_in", "came_out", "gain", "loss", "measure", "value", "beside")
    rows = {name: dict.fromkeys(words, f"{name}!") for name in STAGES}
    gaps = {"world": "even guessing", "tokenizer": "untrained"}
    for number, (name, row) in enumerate(rows.items()):
        row |= {"n_bytes": 1000 * number, "seconds": 2.0 + number, "threads": {}}
        if name in gaps:
            row["threads"] = {gaps[name]: {"gap": [7.0, 6.0, 8.0]}}
    for name, of in (("base", {"base": 1}), ("chat", {"chat": 1}), ("quantised", {"8 bits": 0.8, "4 bits": 0.4})):
        rows[name]["threads"] = {each: NOTHING | {"right": [part * right, 0.0, 1.0]} for each, part in of.items()}
    rows["quantised"]["n_bits"] = 4
    rows["attacked"]["attacks"] = {"no defence": [0.4, 0.2, 0.6], "guard": [0.0, 0.0, 0.1]}
    return rows


def test_a_life_is_told_and_tabled(tmp_path, monkeypatch, capsys):
    asked, drawn, run = [], [], RunConfig(out=tmp_path / "out", device="cpu")

    def live(config, run):
        asked.append((config.from_nothing, config.again))
        return lived(0.75 if config.from_nothing else 0.5)

    monkeypatch.setattr(model_life, "live", live)
    monkeypatch.setattr(model_life, "plot_life", lambda lives: drawn.append([*lives]) or plt.figure())
    model_life.life(SMALL, run)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{sum(range(2, 11))} s in all" and said[3].split()[-3:] == ["-", "-", "-"]
    assert (
        said[4].split()[0] == "base" and said[4].split()[-9:] == "50% [0%, 100%] 100% [90%, 100%] 0% [0%, 10%]".split()
    )
    config = LifeFiguresConfig(again=True, folder=tmp_path)
    model_life.model_life(config, run)
    model_life.life_from_nothing(config, run)
    assert asked == [(False, False), (False, True), (False, True), (True, True)]
    tables = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(tables) == {"model-life", "model-life-thread", "model-life-from-nothing"}
    assert (tmp_path / "model_life.svg").is_file()
    stages = tables["model-life"]["rows"]
    assert stages[2] == ["10 base", "`pretrain`", "base!", "base!", "base!", "2 kB", 4.0]
    assert [row[0] for row in tables["model-life-thread"]["rows"]] == [*threads(lived())]
    both = tables["model-life-from-nothing"]["rows"]
    assert both[0][:4] == ["02 world", "world!", "world!", "world!"] and both[-1] == ["in all", "", "", "", 54.0]
    assert ["what is served", "answered rightly", "20% [0%, 100%]", "30% [0%, 100%]", ""] in both
    (tmp_path / "out/from-nothing").mkdir(parents=True)
    (tmp_path / "out/from-nothing/deployed.json").write_text("{}")
    model_life.model_life(config, run)
    assert asked[-2:] == [(False, True), (True, False)]
    assert drawn == [["committed weights"], ["committed weights", "made from nothing"]]
    plt.close("all")


def test_a_life_from_nothing_is_lived_again_with_other_sizes(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(model_life, "STAGES", {"one": stage_of("one", told, set())})
    run, config = RunConfig(out=tmp_path, device="cpu"), replace(SMALL, from_nothing=True)
    for settings, n_lived in ((config, 1), (config, 1), (replace(config, pretrain_steps=5), 2), (SMALL, 3)):
        live(settings, run)
        assert len(told) == n_lived
