"""Dense search: indexes equal to faiss and to brute force, deletion, edges; the encoder learns its passages."""

import math

import numpy as np
import pytest
import torch

from dense_search import (
    DenseConfig,
    FlatIndex,
    HNSWConfig,
    HNSWIndex,
    PairBatches,
    PassageEncoder,
    pair_loss,
    train_encoder,
)
from document_loaders import document_of
from lexical_search import Hit
from text_chunks import cut_documents

TINY = DenseConfig(d_model=20, n_heads=2, d_shared=12, batch_size=7, max_steps=40, warmup_steps=5, max_tokens=24)
INDEXES = (FlatIndex, HNSWIndex)


def unit_vectors(n: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(index, vectors: np.ndarray):
    for id, vector in enumerate(vectors):
        index.add(id, vector)
    return index


def recall(index: HNSWIndex, exact: FlatIndex, queries: np.ndarray, k: int, width: int) -> float:
    found = [len({h.id for h in index.search(q, k, width)} & {h.id for h in exact.search(q, k)}) / k for q in queries]
    return sum(found) / len(found)


def test_flat_search_equals_faiss(parity) -> None:
    import faiss

    vectors, queries = unit_vectors(301, 17, 0), unit_vectors(11, 17, 1)
    theirs = faiss.IndexFlatIP(17)
    theirs.add(vectors)
    scores, ids = theirs.search(queries, 9)
    ours = [filled(FlatIndex(17), vectors).search(query, 9) for query in queries]
    assert [[hit.id for hit in hits] for hits in ours] == ids.tolist()
    parity(
        "FlatIndex",
        "faiss.IndexFlatIP",
        "output",
        [[hit.score for hit in hits] for hits in ours],
        scores.tolist(),
        1e-6,
    )


def test_the_graph_finds_about_what_faiss_finds_with_the_same_sizes() -> None:
    import faiss

    vectors, queries = unit_vectors(400, 16, 2), unit_vectors(40, 16, 3)
    exact, graph = filled(FlatIndex(16), vectors), filled(HNSWIndex(16, HNSWConfig(8, 40)), vectors)
    theirs = faiss.IndexHNSWFlat(16, 8, faiss.METRIC_INNER_PRODUCT)
    theirs.hnsw.efConstruction = 40
    theirs.add(vectors)
    for width in (10, 40):
        theirs.hnsw.efSearch = width
        ids = theirs.search(queries, 10)[1]
        right = [{hit.id for hit in exact.search(query, 10)} for query in queries]
        their_recall = sum(len(set(row) & good) / 10 for row, good in zip(ids.tolist(), right, strict=True)) / 40
        assert recall(graph, exact, queries, 10, width) > their_recall - 0.05
    assert recall(graph, exact, queries, 10, 400) == 1.0  # all candidates kept: the graph is connected
    graph.n_compared = 0
    graph.search(queries[0], 10, 40)
    assert graph.n_compared < 500


def test_more_candidates_find_more_and_compare_more() -> None:
    vectors, queries = unit_vectors(400, 24, 4), unit_vectors(30, 24, 5)
    exact, graph, found, costs = filled(FlatIndex(24), vectors), filled(HNSWIndex(24), vectors), [], []
    for width in (10, 30, 120):
        graph.n_compared = 0
        found.append(recall(graph, exact, queries, 10, width))
        costs.append(graph.n_compared)
    assert found[0] < found[1] < found[2] and costs[0] < costs[1] < costs[2] and found[2] > 0.95


def test_links_stay_within_their_number_and_layers_thin_out() -> None:
    graph = filled(HNSWIndex(8, HNSWConfig(4, 20)), unit_vectors(400, 8, 6))
    assert [len(layer) for layer in graph.layers] == sorted((len(layer) for layer in graph.layers), reverse=True)
    assert len(graph.layers[0]) == 400 and 50 < len(graph.layers[1]) < 160
    for number, layer in enumerate(graph.layers):
        for node, links in layer.items():
            assert len(links) <= (4 if number else 8) and node not in links and len(set(links)) == len(links)


@pytest.mark.parametrize("kind", INDEXES)
def test_what_is_removed_is_never_found_again(kind) -> None:
    vectors = unit_vectors(120, 9, 7)
    index = filled(kind(9), vectors)
    gone = list(range(0, 120, 3)) + list(range(1, 120, 6))
    for number, id in enumerate(gone):
        index.remove(id)
        if number % 10 == 0:
            assert not {hit.id for hit in index.search(vectors[id], 120)} & set(gone[: number + 1])
    assert len(index) == 120 - len(gone) == len(index.search(vectors[0], 500))
    index.add(0, vectors[50])  # the id comes back with another vector
    hits = index.search(vectors[50], 2)
    assert {hit.id for hit in hits} == {0, 50} and hits[0].score == pytest.approx(1)
    assert all(hit.score < 0.999 for hit in index.search(vectors[0], 3))
    for id in [hit.id for hit in index.search(vectors[0], 500)]:
        index.remove(id)
    assert len(index) == 0 and index.search(vectors[0], 5) == []


@pytest.mark.parametrize("kind", INDEXES)
def test_edges(kind) -> None:
    index = kind(3)
    assert index.search([1, 0, 0], 4) == []
    index.add(5, [2, 0, 0])
    index.add(3, [0, 0, 0.5])
    assert index.search([3, 0, 0], 4) == [Hit(5, 1.0), Hit(3, 0.0)]
    for call, message in (
        (lambda: index.add(1, [0, 0, 0]), "has length 0"),
        (lambda: index.add(1, [0, math.nan, 0]), "holds nan"),
        (lambda: index.search([0, math.inf, 0], 1), "holds inf"),
        (lambda: index.search([0, 0, 0], 1), "has length 0"),
        (lambda: index.add(1, [1, 0]), r"shape \(3,\) is wanted, got \(2,\)"),
        (lambda: index.add(5, [1, 0, 0]), "passage 5 is in the index already"),
        (lambda: index.remove(9), "passage 9 is not in the index"),
        (lambda: index.search([1, 0, 0], 0), "k=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert len(index) == 2


# The encoder


SUBJECTS = "attention tokens gradients caches experts pruning beams layers ranks floors".split()
TEXT = "\n\n".join(
    f"## About {word}\n\nHere we tell what {word} are for. Some {word} are small. Nobody counts {word} twice at all."
    for word in SUBJECTS
)


@pytest.fixture(scope="module")
def trained():
    chunks = cut_documents([document_of("a.md", "markdown", TEXT)])
    return chunks, *train_encoder(chunks, TINY, seed=0)


def test_the_encoder_learns_which_passage_a_heading_belongs_to(trained) -> None:
    chunks, encoder, log = trained
    untrained = pair_loss(PassageEncoder(TINY), PairBatches(chunks, encoder, 0)(0))
    assert len(chunks) == 10 and log[-1]["loss"] < 0.5 * math.log(7) < (untrained[0] / untrained[1]).item()
    vectors = encoder.embed([chunk.text for chunk in chunks])
    cosines = encoder.embed([f"About {word}" for word in SUBJECTS]) @ vectors.T
    assert (cosines.argmax(axis=1) == np.arange(10)).mean() >= 0.7  # chance is 0.1


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(trained) -> None:
    _, encoder, _ = trained
    texts = ["short", "a much longer text about experts and their caches " * 3, "", "\u65e5\u672c"]
    together = encoder.embed(texts)
    assert together.shape == (4, 12) and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for row, text in zip(together, texts, strict=True):
        assert np.allclose(encoder.embed([text])[0], row, atol=1e-5)
    assert np.allclose(encoder.embed(["x " * 24]), encoder.embed(["x " * 24 + "unread " * 50]), atol=1e-6)
    assert encoder.embed([]).shape == (0, 12)


def test_batches_depend_on_the_step_alone_and_number_their_sections(trained) -> None:
    chunks, encoder, _ = trained
    batches = PairBatches(chunks, encoder, seed=1)
    first, again, other = batches(3), batches(3), batches(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["groups"], other["groups"]) and len(set(first["groups"].tolist())) == 7
    with pytest.raises(ValueError, match="0 passages of more than 80 characters"):
        PairBatches([], encoder, 0)


def test_shapes(trained, checked_shapes) -> None:
    import dense_search

    with checked_shapes(dense_search) as checked:
        PassageEncoder(TINY).embed(["one", "two three"])
        filled(FlatIndex(4), unit_vectors(5, 4, 0)).search([1, 0, 0, 0], 2)
    assert len(checked) >= 2


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="max_tokens must be finite and >= 8, got 2"):
        DenseConfig(max_tokens=2)
    with pytest.raises(ValueError, match="n_links must be finite and >= 2, got 1"):
        HNSWConfig(n_links=1)
