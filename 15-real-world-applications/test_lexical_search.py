"""BM25: equal to bm25s, to the naive formula, and to an index built anew after any additions and removals."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexical_search import (
    MAX_QUERY,
    BM25Config,
    BM25Index,
    Hit,
    analyse,
    analyse_english,
    bm25_naively,
    check_query,
    saturated,
    singular,
    stem,
    term_weight,
)

WORDS = [f"w{number}" for number in range(30)]


def random_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, weights=range(30, 0, -1), k=rng.randint(1, 40))) for _ in range(n)]


def filled(texts: list[str], config: BM25Config | None = None) -> BM25Index:
    index = BM25Index(config)
    for number, text in enumerate(texts):
        index.add(number, text)
    return index


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (2.0, 1.0)])
def test_scores_equal_bm25s(parity, k1: float, b: float) -> None:
    import bm25s

    texts, queries = random_texts(50, 1), random_texts(7, 2)
    theirs = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64")
    theirs.index([analyse(text) for text in texts], show_progress=False)
    index = filled(texts, BM25Config(k1, b))
    ours = np.array([[index.scores(query).get(number, 0.0) for number in range(50)] for query in queries])
    expected = np.array([theirs.get_scores(analyse(query)) for query in queries])
    parity("BM25Index", "bm25s, method lucene", "output", ours, expected, 1e-5)  # bm25s keeps some parts in float32


def test_scores_equal_the_formula(parity) -> None:
    texts, index = random_texts(23, 3), filled(random_texts(23, 3))
    for query in random_texts(5, 4):
        ours = [index.scores(query).get(number, 0.0) for number in range(23)]
        parity("BM25Index", "the formula, term by term", "output", ours, bm25_naively(query, texts), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 99)), max_size=40))
def test_an_index_that_grew_and_shrank_equals_one_built_anew(steps: list[tuple[bool, int, int]]) -> None:
    index, texts = BM25Index(), {}
    for adds, id, seed in steps:
        if adds and id not in texts:
            texts[id] = random_texts(1, seed)[0]
            index.add(id, texts[id])
        elif not adds and id in texts:
            del texts[id]
            index.remove(id)
    anew = BM25Index()
    for id, text in texts.items():
        anew.add(id, text)
    assert index.postings == anew.postings and index.n_terms == anew.n_terms and len(index) == len(texts)
    assert index.search("w0 w1 w2", 5) == anew.search("w0 w1 w2", 5)


def test_by_hand() -> None:
    """Three texts; "cat" is in two of them: ln(1 + 1.5/2.5) = ln 1.6; the first has mean length, f = 1: 1 / 2.2."""
    index = filled(["cat dog", "cat cat bird", "fish"])
    assert term_weight(3, 2) == pytest.approx(math.log(1.6))
    assert index.search("cat", 3) == [
        Hit(1, pytest.approx(math.log(1.6) * 2 / (2 + 1.2 * (0.25 + 0.75 * 1.5)))),
        Hit(0, pytest.approx(math.log(1.6) / 2.2)),
    ]


def test_repetition_saturates_and_length_is_discounted() -> None:
    config = BM25Config()
    values = [saturated(count, 10, 10, config) for count in range(100)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False)) and values[-1] < 1
    assert saturated(config.k1, 10, 10, config) == 0.5
    assert saturated(3, 20, 10, config) < saturated(3, 10, 10, config)
    assert saturated(3, 20, 10, BM25Config(b=0)) == saturated(3, 10, 10, BM25Config(b=0))
    assert saturated(5, 10, 10, BM25Config(k1=0)) == 1
    assert all(term_weight(10, n) > term_weight(10, n + 1) > 0 for n in range(10))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Cats, the DOGS!", ["the", "cat", "the", "dog"]),
        ("STRASSE stra\u00dfe", ["strasse", "strasse"]),
        ("\ufb01le caf\u00e9 cafe\u0301", ["file", "caf\u00e9", "caf\u00e9"]),
        ("\u0130stanbul", ["i\u0307stanbul"]),
        ("\u81ea\u7136\u8a00\u8a9e", ["\u81ea\u7136", "\u7136\u8a00", "\u8a00\u8a9e"]),
        ("GPT\u81ea", ["gpt", "\u81ea"]),
        (
            "\u043c\u043e\u0434\u0435\u043b\u044c \u0915\u094d\u0937",
            ["\u043c\u043e\u0434\u0435\u043b\u044c", "\u0915\u094d\u0937"],
        ),
        ("d_head=64, Adam's", ["d", "head", "64", "adam"]),
        ("\u2460 \uff21\uff22", ["1", "ab"]),
        ("", []),
        ("!?, \u200b", []),
    ],
)
def test_words_of_many_scripts(text: str, terms: list[str]) -> None:
    assert analyse(text) == terms


def test_plurals() -> None:
    for plural, one in ("queries", "query"), ("losses", "losse"), ("biases", "biase"), ("bus", "bus"), ("loss", "loss"):
        assert singular(plural) == one
    for plural, one in ("zeies", "zeie"), ("zaies", "zaie"), ("shoes", "shoe"), ("trees", "tree"), ("ones", "one"):
        assert singular(plural) == one
    for plural, one in ("tokens", "token"), ("caches", "cache"), ("is", "is"), ("gas", "gas"), ("axes", "axe"):
        assert singular(plural) == one


def test_english_endings_and_words_of_questions() -> None:
    assert analyse_english("What is the trained model of training trains?") == ["train", "model", "train", "train"]
    assert analyse_english("How to divide by it: dividing?") == ["divid", "divid"]
    assert analyse_english("\u81ea\u7136 d 64") == ["\u81ea\u7136", "d", "64"]
    assert [stem(word) for word in ("runs", "trains", "baked", "played")] == ["runs", "train", "baked", "play"]
    assert len({stem(word) for word in "token tokens tokenization tokenizing".split()}) <= 2


def test_edges() -> None:
    index = BM25Index()
    assert index.search("anything", 3) == [] and len(index) == 0
    index.add(4, "word")
    index.add(2, "word")
    index.add(9, "")
    assert [hit.id for hit in index.search("word", 100)] == [2, 4]  # ties by id, k beyond the number, no empty hits
    assert index.search("absent", 3) == [] and index.search("?!", 3) == []
    assert index.scores("word word")[2] == pytest.approx(2 * index.scores("word")[2])
    for call, message in (
        (lambda: index.search("word", 0), "k=0 must be at least 1"),
        (lambda: index.search(" ", 1), "the question is empty"),
        (lambda: index.search("x" * (MAX_QUERY + 1), 1), "has 10,001 characters, the limit is 10,000"),
        (lambda: index.search("x" * 2**20, 1), "1,048,576 characters"),
        (lambda: index.add(2, "x"), "passage 2 is in the index already"),
        (lambda: index.remove(5), "passage 5 is not in the index"),
        (lambda: BM25Config(k1=-1), "k1 must be finite and >= 0, got -1"),
        (lambda: BM25Config(b=1.5), "b must be finite and >= 0 and <= 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_only_asked_for_is_not_kept_and_the_longest_question_is_one() -> None:
    index = BM25Index()
    index.add(1, "known words")
    assert index.search("strange terms " * 50, 3) == [] and set(index.postings) == {"known", "word"}
    assert check_query("x" * MAX_QUERY) == "x" * MAX_QUERY
    with pytest.raises(ValueError, match="the limit is"):
        check_query("x" * (MAX_QUERY + 1))
