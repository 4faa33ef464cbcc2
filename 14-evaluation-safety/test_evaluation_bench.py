"""The bench of the metrics: a ratio for each, both sides with the same answer."""

import pytest

from course_bench import read_ratios
from evaluation_bench import BenchConfig, metric_works, statistic_works
from evaluation_safety import main


def test_both_sides_give_the_same_numbers() -> None:
    for name, (_, ours, theirs) in (metric_works(9, 1) | statistic_works(BenchConfig(n_scores=40), 1)).items():
        if "BCa" in name:
            low, high = theirs()
            assert ours().low == pytest.approx(low, rel=0.1) and ours().high == pytest.approx(high, rel=0.1)
        else:
            assert ours() == pytest.approx(theirs(), abs=1e-9)


def test_bench_prints_a_ratio_for_each_library(capsys) -> None:
    sizes = "--n-texts 8 --n-scores 30 --n-items 20 --n-boot 40 --n-questions 2 --n-rounds 1"
    main(["bench", *sizes.split()])
    rivals = [row["rival"] for row in read_ratios(capsys.readouterr().out)]
    assert rivals[:5] == ["sacrebleu", "sacrebleu", "rouge-score", "scikit-learn", "scipy.stats.bootstrap"]
    assert rivals[5].startswith("lm-evaluation-harness")
