"""Chunks: the span reproduces the text, nothing is lost, budgets hold, duplicates go."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_tokenizer import load_course_tokenizer
from deduplication import MinHashConfig
from document_loaders import course_chapters, document_of, python_reference
from text_chunks import ChunkConfig, count_words, cut_document, cut_documents, paragraph_spans, without_duplicates

LINES = st.sampled_from(
    ["# One", "## Two", "### Three", "", "", "word", "A sentence. Another one! And a third?", "```", "  code = [1, 2]"]
    + ["x" * 70, "- item one", "|a|b|", "na\u00efve \u65e5\u672c\u8a9e", "   ", "\ttab", "1. first;  second:  third"]
)
TEXTS = st.lists(LINES, min_size=1, max_size=40).map("\n".join).filter(lambda text: text.strip())


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(1, 30), st.integers(0, 29), st.integers(0, 12))
def test_spans_reproduce_the_text_and_nothing_is_lost(text: str, most: int, overlap: int, least: int) -> None:
    document = document_of("a.md", "markdown", text)
    config = ChunkConfig(most, min(overlap, most - 1), least)
    chunks = cut_document(document, config)
    covered = [False] * len(document.text)
    for chunk in chunks:
        assert chunk.text == document.text[chunk.start : chunk.end] == chunk.text.strip() != ""
        assert count_words(chunk.text) <= most
        assert document.text.splitlines()[chunk.line - 1].startswith(chunk.text.splitlines()[0][:1].strip()) or (
            chunk.text.splitlines()[0] in document.text.splitlines()[chunk.line - 1]
        )
        covered[chunk.start : chunk.end] = [True] * len(chunk.text)
        home = document.section_at(chunk.end - 1)
        assert (chunk.headings, chunk.anchor) == (home.headings, home.anchor)
    lost = [char for char, found in zip(document.text, covered, strict=True) if not found]
    assert not "".join(lost).strip()
    assert [chunk.start for chunk in chunks] == sorted({chunk.start for chunk in chunks})
    if not config.overlap:
        for before, after in zip(chunks, chunks[1:], strict=False):
            assert before.end <= after.start


def test_a_chunk_never_crosses_a_heading_and_lone_headings_join_what_follows() -> None:
    document = document_of("a.md", "markdown", "# T\n\n## A\n\nOne two three.\n\n## B\n\nFour five six.\n")
    chunks = cut_document(document, ChunkConfig(min_tokens=3))
    assert [(chunk.headings[-1], chunk.text) for chunk in chunks] == [
        ("A", "# T\n\n## A\n\nOne two three."),
        ("B", "## B\n\nFour five six."),
    ]
    assert chunks[1].link == "a.md#b" and chunks[1].line == 7
    assert chunks[1].search_text == "T\nB\n## B\n\nFour five six."
    assert [chunk.headings for chunk in cut_document(document, ChunkConfig(min_tokens=0))][0] == ("T",)
    apart = cut_document(document_of("a.md", "markdown", "# One\n## Two"), ChunkConfig(1, min_tokens=2))
    assert [chunk.headings for chunk in apart] == [("One",)] * 2 + [("One", "Two")] * 3  # "#", "One", "#", "#", "Two"


def test_budget_overlap_and_cuts_by_hand() -> None:
    text = "one two. three four. five six.\n\nseven eight."
    document = document_of("a.txt", "text", text)
    assert [chunk.text for chunk in cut_document(document, ChunkConfig(3))] == [
        "one two.",
        "three four.",
        "five six.",
        "seven eight.",
    ]
    assert [chunk.text for chunk in cut_document(document, ChunkConfig(6, overlap=3))] == [
        "one two. three four.",
        "three four. five six.",
        "five six.\n\nseven eight.",
    ]
    assert [chunk.text for chunk in cut_document(document, ChunkConfig(12))] == [text]
    assert cut_document(document, ChunkConfig(12))[0].link == "a.txt#L1"


def test_a_listing_is_one_paragraph() -> None:
    text = "before\n\n```py\na = 1\n\nb = 2\n```\nafter\n\nlast"
    found = [text[span.start : span.end] for span in paragraph_spans(text, 0, len(text))]
    assert found == ["before", "```py\na = 1\n\nb = 2\n```", "after", "last"]


def test_a_text_without_a_blank_is_cut_and_costs_no_square() -> None:
    document = document_of("a.txt", "text", "\u65e5" * 100_000)
    calls = 0

    def count(text: str) -> int:  # every character is a token
        nonlocal calls
        calls += len(text)
        return len(text)

    chunks = cut_document(document, ChunkConfig(1000), count)
    assert "".join(chunk.text for chunk in chunks) == document.text and max(len(chunk.text) for chunk in chunks) <= 1000
    assert calls < 100 * len(document.text)
    [whole] = cut_document(document_of("a.txt", "text", "x"), ChunkConfig(1), lambda text: 5 * len(text))
    assert whole.text == "x"  # a single character of many tokens


def test_the_budget_may_be_that_of_a_models_tokenizer() -> None:
    tokenizer = load_course_tokenizer()
    documents = [document for document in python_reference() if document.source in ("python/assert", "python/break")]
    chunks = cut_documents(documents, ChunkConfig(64), lambda text: len(tokenizer.encode(text)))
    sizes = [len(tokenizer.encode(chunk.text)) for chunk in chunks]
    assert max(sizes) <= 64 and sum(sizes) / len(sizes) > 32


def test_chapters_and_reference_are_cut_with_exact_spans() -> None:
    documents = {document.source: document for document in [*course_chapters(), *python_reference()]}
    chunks = cut_documents(documents.values())
    assert len(chunks) > 1000
    for chunk in chunks:
        document = documents[chunk.source]
        assert chunk.text == document.text[chunk.start : chunk.end] and count_words(chunk.text) <= 200
        assert document.text.count("\n", 0, chunk.start) + 1 == chunk.line
    divided = [chunk for chunk in chunks if chunk.anchor == "why-divide-by-the-square-root-of-the-width"]
    assert divided and {chunk.source for chunk in divided} == {"03-attention-mechanisms/README.md"}
    assert divided[0].headings[-2:] == ("Derivation", "Why divide by the square root of the width")


def test_duplicates_are_dropped_and_named() -> None:
    rng = random.Random(0)
    words = [f"w{number}" for number in range(400)]
    long = [rng.choice(words) for _ in range(120)]
    nearly = [*long[:60], "changed", *long[61:]]
    texts = ["Same words here.", "same WORDS, here", " ".join(long), " ".join(nearly), "---", "***", "other"]
    chunks = cut_documents([document_of(f"{number}.txt", "text", text) for number, text in enumerate(texts)])
    kept, dropped = without_duplicates(chunks)
    assert [chunk.source for chunk in kept] == ["0.txt", "2.txt", "3.txt", "4.txt", "5.txt", "6.txt"]
    assert [(gone.source, stays.source) for gone, stays in dropped] == [("1.txt", "0.txt")]
    kept, dropped = without_duplicates(chunks, MinHashConfig(shingle_size=3))
    assert ("3.txt", "2.txt") in [(gone.source, stays.source) for gone, stays in dropped]
    assert without_duplicates([]) == ([], [])


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="max_tokens must be finite and >= 1, got 0"):
        ChunkConfig(0)
    with pytest.raises(ValueError, match=re.escape("overlap=5 must be less than max_tokens=5")):
        ChunkConfig(5, 5)
    assert cut_documents([]) == []
