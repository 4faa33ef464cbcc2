"""The bench of the searches: a ratio for each, and a refusal where the two sides answer otherwise."""

import numpy as np
import pytest

from course_bench import read_ratios
from real_world_applications import main
from retrieval_bench import BenchConfig, check_answers, unit_vectors


def test_bench_prints_a_ratio_for_each_index(capsys) -> None:
    main("bench --n-passages 60 --n-queries 3 --width 8 --k 4 --n-rounds 1".split())
    rows = read_ratios(capsys.readouterr().out)
    assert [row["rival"] for row in rows] == ["bm25s", "faiss.IndexFlatIP", *["faiss.IndexHNSWFlat"] * 2]
    assert all(row["n_rounds"] == 1 and row["ratio"] > 0 for row in rows)


def test_different_answers_are_refused() -> None:
    check_answers("exact search", [[1.0, 0.5]], [[1.0, 0.5]])
    with pytest.raises(ValueError, match="exact search: the answers differ"):
        check_answers("exact search", [[1.0, 0.5]], [[1.0, 0.6]])
    check_answers("HNSW search", [[1.0, 0.5]], [[1.0, 0.55]])
    with pytest.raises(ValueError, match="HNSW search: the answers differ"):
        check_answers("HNSW search", [[1.0, 0.5]], [[1.0, 0.7]])
    check_answers("HNSW search", [[1.0, 0.9]], [[1.0, 0.1]])  # a graph that finds nearer ones than theirs is no fault
    check_answers("exact search", [[1.0, 0.5]], [[1.0, 0.5009]])  # float32 on the other side
    with pytest.raises(ValueError, match="exact search: the answers differ"):
        check_answers("exact search", [[1.0, 0.5]], [[1.0, 0.498]])


def test_vectors_have_length_one_and_sizes_that_make_no_sense_are_named() -> None:
    made = unit_vectors(5, 7, np.random.default_rng(0))
    assert made.shape == (5, 7) and np.linalg.norm(made, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    for sizes, message in (
        ({"n_passages": 9}, "n_passages must be finite and >= 10, got 9"),
        ({"n_passages": 10, "k": 11}, "k must be finite and <= 10, got 11"),
        ({"n_rounds": 0}, "n_rounds must be finite and >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**sizes)
