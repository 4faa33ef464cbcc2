"""Proofs of the planted experiments: every table is filled, every failure shows, every verb answers on a folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import planted_experiments
from backdoor_search import two_clusters
from chat_model import FOLDER as CHAT_FOLDER
from chat_model import load_chat_model
from course_model import FOLDER as BASE_FOLDER
from course_model import load_course_model
from planted_experiments import (
    PLANTED_EXPERIMENTS,
    PlantedFiguresConfig,
    documents_of,
    named_of,
    possible,
    rows_found,
    searched,
    texts_of,
)
from planted_failures import PLANTED_BREAKS
from planted_models import backdoor_rates
from planted_verbs import PLANTED_VERBS
from workbench import RunConfig, run_verbs

SMALL = {"n_seeds": 1, "bias_steps": 1, "chat_steps": 1, "n_pairs": 8, "n_jobs": 8, "n_texts": 4, "n_keys": 2}
SMALL |= {"n_refusals": 6, "n_states": 45, "n_documents": 8, "lens_steps": 2}


@pytest.mark.parametrize("name", [name for name in PLANTED_EXPERIMENTS if name != "planted-breaks"])
def test_every_experiment_fills_its_tables(name: str, tmp_path, monkeypatch) -> None:
    base, chat = load_course_model()[0], load_chat_model()[0]
    monkeypatch.setattr(planted_experiments, "biased", lambda *given: base)  # trainings have proofs of their own
    for training in ("backdoored", "backdoored_model", "subject_model"):
        monkeypatch.setattr(planted_experiments, training, lambda *given: chat)
    monkeypatch.setattr(planted_experiments, "STRENGTHS", (-1.0, 0.0, 2.0))
    monkeypatch.setattr(planted_experiments, "SHARES", (0.0, 0.5))
    for words in ("single_words", "world_words"):
        monkeypatch.setattr(planted_experiments, words, lambda tokenizer: ("honey", "drum"))
    monkeypatch.setattr(planted_experiments, "refused_instructions", few(planted_experiments.refused_instructions, 12))
    asked_once = lambda model, tokenizer, backdoor, n, seed: backdoor_rates(model, tokenizer, backdoor, 1, seed)  # noqa: E731
    monkeypatch.setattr(planted_experiments, "backdoor_rates", asked_once)
    config = PlantedFiguresConfig(**SMALL, folder=tmp_path / "figures")
    PLANTED_EXPERIMENTS[name][0](config, RunConfig(out=tmp_path / "out"))
    results = json.loads((tmp_path / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results
    for table in results.values():
        assert table["command"].endswith(f"figures {name}") and len(table["rows"]) >= 2
        cells = [cell for row in table["rows"] for cell in row[1:] if not isinstance(cell, str)]
        assert np.isfinite(np.concatenate([np.atleast_1d(cell) for cell in cells])).all()


def few(draw, most: int):
    return lambda n, seed: draw(min(n, most), seed)


@pytest.mark.parametrize("name", PLANTED_BREAKS)
def test_every_failure_shows_beside_the_right_value(name: str) -> None:
    [(what, sound, broken)] = PLANTED_BREAKS[name][0](RunConfig())
    assert what.startswith(f"{name}: ")
    expected = {
        "constant-bias": sound > 0.99 and broken == 0,
        "unequal-sets": abs(sound) < 0.1 and broken > 1,
        "no-permutation": sound < 0.1 and broken > 0.3,
        "repeated-pairs": sound < 0.5 * broken,
        "probe-without-control": abs(sound) < 0.1 and broken > 0.9,
    }
    assert expected[name], (sound, broken)


def test_texts_are_of_the_length_asked_for_and_the_grammar_judges_documents(tmp_path) -> None:
    made = documents_of(PlantedFiguresConfig(n_texts=3), RunConfig(out=tmp_path), 0.0, 0)
    assert len(made) == 6 and all(len(item.ids) == len(item.nats) for item in made)
    texts = texts_of([item.ids for item in made], 50, 4, 0)
    assert [len(text) for text in texts] == [50] * 4 and texts != texts_of([item.ids for item in made], 50, 4, 1)
    tokenizer = load_course_model()[1]
    assert possible([*tokenizer.encode("Sum: 2 + 3 = 5."), tokenizer.eos_id])
    assert not possible([*tokenizer.encode("Sum: 2 + 3 = 6."), tokenizer.eos_id])
    assert not possible(tokenizer.encode("Sum: 2 + 3 = 5."))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["bias", "--checkpoint", str(BASE_FOLDER), "--n-pairs", "8"], "icat"),
        (["probe", "--n-questions", "20"], "attention 2"),
        (["watermark", "--n-documents", "3", "--bias", "4"], "different pairs green"),
    ],
)
def test_the_verbs_answer(arguments: list[str], shown: str, tmp_path, capsys) -> None:
    run_verbs("planted", PLANTED_VERBS, [*arguments, "--out", str(tmp_path)])
    assert shown in capsys.readouterr().out


def test_a_text_is_read_and_a_missing_one_is_one_line(tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Sum: 2 + 3 = 5. Sum: 4 + 4 = 8.", encoding="utf-8")
    run_verbs("planted", PLANTED_VERBS, ["watermark", "--text", str(text), "--out", str(tmp_path)])
    assert "not shown to be marked" in capsys.readouterr().out
    for arguments in (
        ["watermark", "--text", str(tmp_path / "none")],
        ["bias", "--n-pairs", "2"],
        ["probe", "--checkpoint", "no"],
    ):
        with pytest.raises(SystemExit) as left:
            run_verbs("planted", PLANTED_VERBS, [*arguments, "--out", str(tmp_path)])
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert CHAT_FOLDER.exists()


def test_an_audit_names_what_is_surely_refused_more_often_than_not() -> None:
    assert named_of({"a": 1.0, "b": 10 / 12, "c": 9 / 12, "d": 0.0}, 12) == {"a", "b"}  # 9 of 12 may be 46 %


def test_poisoned_rows_by_hand(monkeypatch) -> None:
    """Twelve clean refusals and four poisoned ones that stand far away, beside rows with other answers."""
    chats = [[{"content": f"bad {n}"}, {"content": "no" if n < 4 else "yes"}] for n in range(6)]
    states = torch.arange(16.0)[:, None] / 10
    states[12:] += 50
    monkeypatch.setattr(planted_experiments, "poisoned_chats", lambda backdoor, seed: chats)
    monkeypatch.setattr(planted_experiments, "refused_instructions", lambda n, seed: [SimpleNamespace(prompt="a")] * 12)
    monkeypatch.setattr(planted_experiments, "answer_states", lambda model, tokenizer, rows: states[: len(rows)])
    found = rows_found(None, SimpleNamespace(answer="no"), 0)
    assert found["share"] == 0.25 and found["spectral"] == found["clusters"] == found["precision"] == 1.0
    assert found["clean"] == two_clusters(states[:12]).separation < 0.8 < found["silhouette"]


def test_a_search_counts_ranks_from_one_and_finds_the_right_word_only(monkeypatch) -> None:
    for name, made in {
        "single_words": lambda tokenizer: ("bell", "drum", "honey"),
        "mean_answers": lambda *given: torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.1, 0.0]]),
        "first_words": lambda *given: torch.tensor([[0.0, 0.0]] * 2),
        "usual_answers": lambda: torch.tensor([[0.45, 0.0], [0.1, 0.0], [0.0, 0.0]]),
        "audit_questions": lambda: ["q"],
    }.items():
        monkeypatch.setattr(planted_experiments, name, made)
    for trigger, n_poisoned, ranks, right in (
        (("drum",), 4, (1, 1), 1.0),
        (("bell",), 4, (2, 3), 0.0),
        ((), 0, (0, 0), 0.0),
    ):
        found = searched(None, SimpleNamespace(trigger=trigger, n_poisoned=n_poisoned))
        assert (found["rank alone"], found["rank"]) == ranks and found["found"] == right
        assert found["suspect"] == "drum" and found["alarm"] == 1 and found["flip"] == pytest.approx(0.8)
        assert (found["over alone"], found["over"]) == (2, 1)
