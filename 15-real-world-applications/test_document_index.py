"""The document index: no shelf shows through another (RG3), damaged files are noticed, bad input is named (RG4)."""

import json
import random
import zlib

import numpy as np
import pytest

from dense_search import HNSWIndex
from document_index import PASSAGES, SHARED, VECTORS, DocumentIndex
from document_loaders import document_of
from lexical_search import analyse
from text_chunks import ChunkConfig


class HashedWords:
    """An encoder for tests: each word gives a fixed direction, so that texts of equal words lie together."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def embed(self, texts):
        rows = np.full((len(texts), 16), 0.01, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in analyse(text):
                row += np.random.default_rng(zlib.crc32(word.encode()) + self.seed).standard_normal(16)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def document(source: str, text: str):
    return document_of(source, "markdown", text)


def make(encoder=None, **options) -> DocumentIndex:
    index = DocumentIndex(encoder, **options)
    index.add("alice", [document("plan.md", "# Plan\n\nThe launch code of alice is zebra, told to nobody else.")])
    index.add("bob", [document("plan.md", "# Plan\n\nThe launch code of bob is walrus, told to nobody else.")])
    index.add(SHARED, [document("help.md", "# Help\n\nA launch needs a code; ask the owner of the plan for it.")])
    return index


WAYS = [(None, "words"), (HashedWords(), "words"), (HashedWords(), "vectors"), (HashedWords(), "hybrid")]


@pytest.mark.parametrize(("encoder", "way"), WAYS)
@pytest.mark.parametrize("graph", [False, True])
def test_a_search_sees_the_named_shelves_only_also_after_deletion_and_indexing_again(encoder, way, graph) -> None:
    index = make(encoder, make_vectors=(lambda: HNSWIndex(16)) if graph else None)

    def owners(readers: list[str], query: str = "launch code of bob walrus") -> set[str]:
        return {found.owner for found in index.search(query, readers, k=50, way=way)}

    for _ in range(3):
        assert owners(["alice"]) == {"alice"} and owners(["alice", SHARED]) == {"alice", SHARED}
        assert owners(["bob"]) == {"bob"} and owners(["carol"]) == set() == owners([])
        assert all("walrus" not in found.chunk.text for found in index.search("walrus", ["alice", SHARED], k=50))
        index.remove("bob", "plan.md")
        assert owners(["bob"]) == set() and owners(["alice", "bob"]) == {"alice"}
        index.add("bob", [document("plan.md", "# Plan\n\nThe launch code of bob is walrus, told to nobody else.")])


def test_random_histories_never_leak(monkeypatch) -> None:
    rng, index, held = random.Random(0), DocumentIndex(HashedWords()), {"a": {}, "b": {}, "c": {}}
    for step in range(60):
        owner, source = rng.choice("abc"), f"{rng.randrange(4)}.md"
        if rng.random() < 0.6:
            index.add(owner, [document(source, f"# T\n\ncommon words and the secret{owner}{step} of step {step}")])
            held[owner][source] = f"secret{owner}{step}"
        elif source in held[owner]:
            index.remove(owner, source)
            del held[owner][source]
        for reader in "abc":
            texts = [found.chunk.text for found in index.search("common words secret", [reader], k=100)]
            assert sorted(word for text in texts for word in text.split() if word.startswith("secret")) == sorted(
                held[reader].values()
            )
            assert index.sources(reader) == sorted(held[reader])


def test_counts_of_one_shelf_do_not_change_scores_on_another() -> None:
    index = make()
    before = index.shelves["alice"].words.scores("launch code zebra")
    index.add("bob", [document(f"{number}.md", f"zebra zebra launch {number}") for number in range(20)])
    assert index.shelves["alice"].words.scores("launch code zebra") == before


def test_a_source_replaces_itself_and_a_failing_encoder_changes_nothing(monkeypatch) -> None:
    index = make(HashedWords())
    assert index.add("alice", [document("plan.md", "# Plan\n\nNew words about otters.")]) == 1
    assert index.sources("alice") == ["plan.md"] and len(index) == 3
    assert "zebra" not in str(index.search("launch code zebra", ["alice"], k=9))

    def fail(texts):
        raise ValueError("out of memory")

    monkeypatch.setattr(index.encoder, "embed", fail)
    with pytest.raises(ValueError, match="out of memory"):
        index.add("alice", [document("plan.md", "# Plan\n\nAnother text.")])
    assert "otters" in str(index.search("otters", ["alice"], way="words"))


@pytest.mark.parametrize("encoder", [None, HashedWords()])
def test_saved_and_loaded_it_answers_alike(tmp_path, encoder, parity) -> None:
    index = make(encoder)
    index.save(tmp_path)
    again = DocumentIndex.load(tmp_path, encoder)
    queries = [("launch code", ["alice", SHARED]), ("walrus", ["bob"]), ("walrus", ["alice"])]
    ours, theirs = ([str(one.search(*query)) for query in queries] for one in (again, index))
    parity("DocumentIndex", "saved and loaded", "invariant", ours, theirs, 0)
    again.remove("bob", "plan.md")
    again.add("bob", [document("more.md", "text")])
    assert again.sources("bob") == ["more.md"] and len(again) == 3
    assert {path.name for path in tmp_path.iterdir()} == {PASSAGES, VECTORS}


def test_damage_is_noticed(tmp_path) -> None:
    encoder = HashedWords()
    make(encoder).save(tmp_path)
    with pytest.raises(ValueError, match="indexed with another encoder"):
        DocumentIndex.load(tmp_path, HashedWords(seed=1))
    good = (tmp_path / VECTORS).read_bytes()
    (tmp_path / VECTORS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="not the file that passages.json was written with"):
        DocumentIndex.load(tmp_path, encoder)
    (tmp_path / VECTORS).write_bytes(good)
    content = json.loads((tmp_path / PASSAGES).read_text())
    content["shelves"][0]["passages"].append(content["shelves"][0]["passages"][0])
    (tmp_path / PASSAGES).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 vectors of 2 passages"):
        DocumentIndex.load(tmp_path, encoder)
    for torn in ("{", "[]", '{"shelves": []}', "[" * 10**5):
        (tmp_path / PASSAGES).write_text(torn)
        with pytest.raises(ValueError, match="no document index"):
            DocumentIndex.load(tmp_path, encoder)
    with pytest.raises(ValueError, match="no document index"):
        DocumentIndex.load(tmp_path / "nowhere")


CITIES = {
    "oslo.md": "# Oslo\n\nOslo lies at the fjord; ferries cross the fjord to the islands of the fjord.",
    "kiel.md": "# Kiel\n\nKiel has a fjord and a canal that ships take between two seas.",
    "graz.md": "# Graz\n\nGraz has a hill with a clock tower, far away from every coast.",
}


@pytest.mark.parametrize(("encoder", "way"), WAYS)
def test_the_best_comes_first_once_however_often_a_shelf_is_named(encoder, way) -> None:
    index = DocumentIndex(encoder)
    index.add("a", [document(source, text) for source, text in CITIES.items()])
    found = index.search("ferries to the islands of the fjord", ["a"], way=way)
    assert found[0].chunk.source == "oslo.md" and [one.score for one in found] == sorted(
        (one.score for one in found), reverse=True
    )
    assert index.search("ferries to the islands of the fjord", ["a", "a"], way=way) == found
    if way == "words":  # endings do not count
        assert [one.chunk.source for one in index.search("towering", ["a"], way=way)] == ["graz.md"]


def test_many_passages_of_one_section_leave_room_for_another() -> None:
    long = " ".join(f"The fjord of Oslo has the island number {n}, and a ferry goes there." for n in range(40))
    index = DocumentIndex(config=ChunkConfig(max_tokens=20))
    assert index.add("a", [document("oslo.md", f"# Oslo\n\n{long}"), document("kiel.md", CITIES["kiel.md"])]) > 20
    found = index.search("fjord island ferry", ["a"], k=2)
    assert [one.chunk.source for one in found] == ["oslo.md", "kiel.md"]


def test_the_last_heading_counts_three_times_and_equal_passages_once() -> None:
    index = DocumentIndex()
    text = "# Alpha\n\nSome words to begin with, quite a few of them.\n\n## Beta\n\nOther words of a part, and more."
    assert index.add("a", [document("one.md", text)]) == 2 == index.add("b", [document(f"{n}.md", text) for n in "xy"])
    shelf = index.shelves["a"]
    [(number, terms)] = [(id, counts) for id, counts in shelf.words.terms.items() if counts["beta"]]
    assert (terms["alpha"], terms["beta"] - shelf.chunks[number].text.count("Beta")) == (1, 3)
    assert index.sources("nobody") == [] and set(index.shelves) == {"a", "b"}


def test_vectors_stay_with_their_passages_and_another_encoder_is_known_by_little(tmp_path) -> None:
    encoder = HashedWords()
    index = DocumentIndex(encoder)
    index.add("a", [document(source, text) for source, text in CITIES.items()])
    index.save(tmp_path)
    again = DocumentIndex.load(tmp_path, encoder)
    for query in ("ferries to the islands", "a canal that ships take", "a hill with a tower"):
        ours, theirs = (one.search(query, ["a"], way="vectors") for one in (again, index))
        assert ours == theirs and len(ours) == 3

    class Turned:
        def embed(self, texts):
            made = encoder.embed(texts)
            turned = made + 0.1 * np.roll(made, 1, axis=1)
            return turned / np.linalg.norm(turned, axis=1, keepdims=True)

    [one], [other] = encoder.embed(["x y"]), Turned().embed(["x y"])
    assert 0.98 < one @ other < 0.999
    with pytest.raises(ValueError, match="indexed with another encoder"):
        DocumentIndex.load(tmp_path, Turned())


def test_edges_and_bad_input() -> None:
    index = make()
    assert DocumentIndex().search("anything", ["a"]) == [] and index.add("dora", []) == 0
    assert len(index.search("launch", ["alice"], k=1000)) == 1
    for call, message in (
        (lambda: index.search("", ["alice"]), "the question is empty"),
        (lambda: index.search("x" * 2**20, ["alice"]), "1,048,576 characters"),
        (lambda: index.search("x", "alice"), "readers is a list of owners, got the text 'alice'"),
        (lambda: index.search("x", ["alice"], k=0), "k=0 must be at least 1"),
        (lambda: index.search("x", ["alice"], way="vectors"), "unknown way 'vectors'"),
        (lambda: index.remove("alice", "none.md"), "'alice' has no document 'none.md'"),
        (lambda: index.remove("nobody", "plan.md"), "'nobody' has no document 'plan.md'"),
        (lambda: index.add(" ", []), "an owner is a non-empty text"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_equal_passages_are_kept_once() -> None:
    index = DocumentIndex()
    assert index.add("a", [document("1.md", "# T\n\nSame text here."), document("2.md", "# T\n\nSame text here.")]) == 1
