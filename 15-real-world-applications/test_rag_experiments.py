"""Every retrieval experiment runs with tiny sizes and saves its table; the verbs answer and refuse in one line."""

import json
import re

import pytest

import rag_experiments
from document_loaders import course_chapters, document_of
from lexical_search import Hit
from rag_experiments import (
    GROUPS,
    RAG_EXPERIMENTS,
    RAG_VERBS,
    CourseQuestion,
    RagFiguresConfig,
    course_questions,
    judge,
    shelf_words,
)
from text_chunks import cut_documents
from workbench import RunConfig, run_verbs

TINY = {"n_seeds": 2, "dense_steps": 4, "rerank_steps": 4, "n_people": 4, "n_questions": 5, "n_vectors": 150}


@pytest.fixture
def one_chapter(monkeypatch) -> None:
    """One chapter in place of all documents: enough for every table."""
    documents = tuple(item for item in course_chapters() if item.source[:2] in ("03",))
    questions = [item for item in course_questions() if item.chapter[:2] in ("03",)]
    monkeypatch.setattr(rag_experiments, "course_documents", lambda: documents)
    monkeypatch.setattr(rag_experiments, "course_questions", lambda: questions)
    sizes = {"d_model": 16, "n_heads": 2, "d_shared": 8, "batch_size": 4, "max_tokens": 16, "warmup_steps": 1}
    for name in ("DenseConfig", "CrossConfig"):
        kind = getattr(rag_experiments, name)
        monkeypatch.setattr(rag_experiments, name, lambda kind=kind: kind(**sizes))


@pytest.mark.parametrize("name", [name for name in RAG_EXPERIMENTS])
def test_each_experiment_saves_its_table(name: str, one_chapter, tmp_path) -> None:
    work, seconds = RAG_EXPERIMENTS[name]
    work(RagFiguresConfig(**TINY, folder=tmp_path), RunConfig(out=tmp_path))
    table = json.loads((tmp_path / "results.json").read_text())[name]
    assert len(table["rows"]) >= 3 and seconds <= 150 and name in table["command"]
    for row in table["rows"]:
        for column, cell in zip(table["columns"], row, strict=True):
            values = [value for value in (cell if isinstance(cell, list) else [cell]) if not isinstance(value, str)]
            if column["digits"].endswith("%"):
                assert all(0 <= value <= 1 for value in values)
    if name == "poisoned-documents":
        assert table["rows"][-1][3:] == [0, 0] and table["rows"][-1][2] > 0
    if name == "hnsw-recall":
        assert table["rows"][-1][1:] == [1.0, 150.0] and table["rows"][-2][1][0] >= table["rows"][0][1][0]


def test_scores_by_hand() -> None:
    text = "# C\n\n## A\n\nalpha words here now\n\n## B\n\nbeta words here now\n"
    documents = [document_of("c.md", "markdown", text)]
    chunks, words = shelf_words(documents)
    asked = [CourseQuestion("which beta?", "c.md", ("B",), "own", False)]
    by_words = judge(lambda question: words.search(question, 5), chunks, asked)
    assert by_words == {"success": 1.0, "mrr": 1.0, "ndcg": 1.0}
    place = {chunk.headings[-1]: number for number, chunk in enumerate(chunks)}
    second = judge(lambda question: [Hit(place["A"], 2.0), Hit(place["A"], 1.5), Hit(place["B"], 1.0)], chunks, asked)
    assert second["mrr"] == 0.5 and second["success"] == 1.0 and second["ndcg"] == pytest.approx(0.6309, abs=1e-4)
    assert judge(lambda question: [], chunks, asked) == {"success": 0.0, "mrr": 0.0, "ndcg": 0.0}


def test_every_question_has_a_right_passage_and_belongs_to_its_groups() -> None:
    chunks = cut_documents(course_chapters())
    for item in course_questions():
        assert item.right(chunks), item.question
        names = [name for name, chosen in GROUPS.items() if chosen(item)]
        assert names == (["held out", f"held out, {item.wording} words"] if item.held_out else ["tuned"])


def test_ask_answers_with_places_and_abstains(capsys, tmp_path) -> None:
    run_verbs("", RAG_VERBS, ["ask", "why", "divide", "by", "the", "square", "root", "of", "the", "width?"])
    said = capsys.readouterr().out
    assert "03-attention-mechanisms/README.md#why-divide-by-the-square-root-of-the-width" in said
    assert re.search(r"\[\d\]", said)
    (tmp_path / "a.md").write_text("# Cups\n\nA cup is made of clay.\n")
    (tmp_path / "b.xml").write_text("<x/>")
    run_verbs("", RAG_VERBS, ["ask", "what are cups made of?", "--documents", str(tmp_path)])
    said = capsys.readouterr().out
    assert "A cup is made of clay." in said and "a.md#cups" in said and "left out b.xml: refused" in said
    run_verbs("", RAG_VERBS, ["ask", "who won in Uruguay?", "--documents", str(tmp_path)])
    assert "do not answer this" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask"], "the question is empty"),
        (["ask", "x", "--k", "0"], "k must be finite and >= 1"),
        (["ask", "x", "--documents", "/no/such"], "is no folder"),
        (["ask", "y" * 10_001], "the limit is 10,000"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        run_verbs("", RAG_VERBS, argv)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_encoder_verb_trains_and_saves_an_index(one_chapter, tmp_path, capsys) -> None:
    flags = "--max-steps 3 --warmup-steps 1 --d-model 16 --n-heads 2 --d-shared 8 --batch-size 4 --max-tokens 16"
    run_verbs("", RAG_VERBS, ["encoder", *flags.split(), "--out", str(tmp_path)])
    assert "hybrid" in capsys.readouterr().out and (tmp_path / "index" / "vectors.safetensors").exists()
