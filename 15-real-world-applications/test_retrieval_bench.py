"""The bench of the searches: a ratio for each, and a refusal where the two sides answer otherwise."""

import pytest

from course_bench import read_ratios
from real_world_applications import main
from retrieval_bench import check_answers


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
