"""Topic 15 - Bench: our search indexes beside bm25s and faiss, on the same passages and vectors.

python 15-real-world-applications/real_world_applications.py bench

Both sides' answers are compared before they are timed: the same scores for BM25 and for exact search, nearly as many of
the true neighbours for the graphs, whose layers are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dense_search import FlatIndex, HNSWConfig, HNSWIndex
from lexical_search import BM25Config, BM25Index, analyse
from tiny_world import World
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    largest_difference,
    seed_everything,
    speed_line,
    time_in_turns,
)

Pair = tuple[str, Callable[[], Any], Callable[[], Any]]  # the rival's name, our work, theirs


@dataclass(frozen=True)
class BenchConfig:
    """How much is indexed and asked in each round."""

    n_passages: int = 1000  # passages, and vectors
    n_queries: int = 50  # queries, one at a time
    width: int = 64  # of a vector
    k: int = 10  # passages that a search returns
    n_rounds: int = 5  # rounds of measurement

    def __post_init__(self) -> None:
        check_range(self, "n_passages", least=10)
        check_range(self, "n_queries", "width", "k", "n_rounds", least=1)
        check_range(self, "k", most=self.n_passages)


def lexical_works(config: BenchConfig, seed: int) -> dict[str, Pair]:
    """BM25 over documents of TinyWorld, the words cut before for both; a query is one document's first sentence."""
    import bm25s

    texts = [document.text for document in World().documents(config.n_passages, seed)]
    queries = [text.partition(".")[0] for text in texts[: config.n_queries]]
    settings = BM25Config()
    index, theirs = BM25Index(settings), bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    for number, text in enumerate(texts):
        index.add(number, text)
    theirs.index([analyse(text) for text in texts], show_progress=False)

    def search() -> list[list[float]]:
        return [[hit.score for hit in index.search(query, config.k)] for query in queries]

    def their_search() -> list[list[float]]:
        found = []
        for query in queries:
            scores = theirs.retrieve([analyse(query)], k=config.k, show_progress=False).scores[0]
            found.append([score for score in scores.tolist() if score > 0])
        return found

    return {f"BM25, {config.n_queries} queries to {config.n_passages} passages": ("bm25s", search, their_search)}


def dense_works(config: BenchConfig, seed: int) -> dict[str, Pair]:
    """Exact and approximate search for vectors around a few centres; build and search apart."""
    import faiss

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(seed)
    vectors, queries = (
        unit_vectors(config.n_passages, config.width, rng),
        unit_vectors(config.n_queries, config.width, rng),
    )
    sizes = HNSWConfig()

    def build(index: FlatIndex | HNSWIndex) -> Any:
        for number, vector in enumerate(vectors):
            index.add(number, vector)
        return index

    def their_build() -> Any:
        graph = faiss.IndexHNSWFlat(config.width, sizes.n_links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = sizes.build_width, sizes.search_width
        graph.add(vectors)
        return graph

    flat, their_flat = build(FlatIndex(config.width)), faiss.IndexFlatIP(config.width)
    their_flat.add(vectors)
    graph, their_graph = build(HNSWIndex(config.width, sizes)), their_build()

    def search(index: FlatIndex | HNSWIndex) -> list[list[float]]:
        return [[hit.score for hit in index.search(query, config.k)] for query in queries]

    def their_search(index: Any) -> list[list[float]]:
        return [index.search(query[None], config.k)[0][0].tolist() for query in queries]

    asked = f"{config.n_queries} queries to {config.n_passages} vectors of {config.width}"
    return {
        f"exact search, {asked}": ("faiss.IndexFlatIP", lambda: search(flat), lambda: their_search(their_flat)),
        f"HNSW search, {asked}": ("faiss.IndexHNSWFlat", lambda: search(graph), lambda: their_search(their_graph)),
        f"HNSW build, {config.n_passages} vectors of {config.width}": (
            "faiss.IndexHNSWFlat",
            lambda: build(HNSWIndex(config.width, sizes)),
            their_build,
        ),
    }


def unit_vectors(n: int, width: int, rng: np.random.Generator) -> np.ndarray:
    vectors = rng.normal(size=(n, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check_answers(name: str, ours: list[list[float]], theirs: list[list[float]]) -> None:
    """Raise ValueError if exact scores differ, or if our graph's are much lower than theirs."""
    if "HNSW" in name:
        gap = float(np.mean([sum(their) - sum(our) for our, their in zip(ours, theirs, strict=True)]))
        wrong = gap > 0.05 * len(theirs[0])
    else:
        wrong = largest_difference(ours, theirs) > 1e-3  # bm25s keeps float32
    if wrong:
        raise ValueError(f"{name}: the answers differ, so the speed cannot be compared")


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Time BM25, exact search and the graph beside bm25s and faiss, in turns."""
    announce(f"{config.n_rounds + 1} rounds of indexes and searches by both sides", 20)
    seed_everything(run.seed)
    print(describe_machine())
    for name, (rival, ours, theirs) in (lexical_works(config, run.seed) | dense_works(config, run.seed)).items():
        if "build" not in name:
            check_answers(name, ours(), theirs())
        seconds = time_in_turns({"ours": ours, "theirs": theirs}, config.n_rounds)
        print(speed_line(name, rival, seconds["ours"], seconds["theirs"]), flush=True)


BENCH_VERBS = {"bench": (bench, BenchConfig, RunConfig)}
