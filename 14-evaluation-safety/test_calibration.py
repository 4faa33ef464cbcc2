"""Calibration, ranking and agreement against scikit-learn, scipy, NLTK and hand-worked numbers."""

import math

import numpy as np
import pytest
from nltk.metrics.agreement import AnnotationTask
from scipy import optimize, stats
from sklearn import metrics

from calibration import (
    auc,
    average_precision,
    brier_parts,
    brier_score,
    calibration_error,
    cohen_kappa,
    confusion,
    fit_temperature,
    fleiss_kappa,
    krippendorff_alpha,
    log_loss,
    plot_reliability,
    reliability,
    roc_curve,
    scaled_nats,
    softmax,
)

RNG = np.random.default_rng(3)


def cases(n_cases: int = 200):
    """Scores with ties, labels of both classes, sizes 2 to 40."""
    for _ in range(n_cases):
        n = int(RNG.integers(2, 40))
        labels = RNG.integers(0, 2, n)
        labels[:2] = (0, 1)
        yield np.round(RNG.random(n) * 0.7 + 0.3 * labels * RNG.random(), int(RNG.integers(1, 4))), labels


def test_ranking_is_scikit_learns(parity) -> None:
    ours, theirs = [], []
    for scores, labels in cases():
        ours.append((auc(scores, labels), average_precision(scores, labels)))
        theirs.append((metrics.roc_auc_score(labels, scores), metrics.average_precision_score(labels, scores)))
    parity("AUC, average precision", "scikit-learn", "output", ours, theirs, 1e-12)
    scores, labels = next(cases())
    parity(
        "roc_curve",
        "scikit-learn",
        "output",
        list(roc_curve(scores, labels)),
        list(metrics.roc_curve(labels, scores, drop_intermediate=False)),
        1e-12,
    )
    statistic = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    assert auc(scores, labels) == pytest.approx(statistic / (labels.sum() * (1 - labels).sum()))


def test_area_under_the_curve_is_the_area_under_the_curve() -> None:
    for scores, labels in cases(20):
        no, yes, _ = roc_curve(scores, labels)
        assert np.trapezoid(yes, no) == pytest.approx(auc(scores, labels), abs=1e-12)


def test_decisions_are_scikit_learns(parity) -> None:
    ours, theirs = [], []
    for scores, labels in cases():
        guesses = (scores > 0.6).astype(int)
        found = confusion(guesses, labels)
        ours.append((found.accuracy, found.precision, found.recall, found.f1, found.matthews))
        with np.errstate(all="ignore"):
            numbers = metrics.precision_recall_fscore_support(labels, guesses, average="binary", zero_division=0)[:3]
            theirs.append(
                (metrics.accuracy_score(labels, guesses), *numbers, metrics.matthews_corrcoef(labels, guesses))
            )
    parity("precision, recall, F1, Matthews", "scikit-learn", "output", ours, theirs, 1e-12)
    assert confusion([1, 1, 0, 0, 0], [1, 0, 0, 0, 1]).false_alarm_rate == pytest.approx(1 / 3)


def test_scores_of_forecasts_are_scikit_learns(parity) -> None:
    ours, theirs = [], []
    for scores, labels in cases():
        stated = np.clip(scores, 0.01, 0.99)
        ours.append((brier_score(stated, labels), log_loss(stated, labels)))
        theirs.append((metrics.brier_score_loss(labels, stated), metrics.log_loss(labels, stated, labels=[0, 1])))
    parity("Brier score, log loss", "scikit-learn", "output", ours, theirs, 1e-12)
    assert log_loss([1.0, 0.5], [0, 1]) == math.inf


@pytest.mark.parametrize(("n_bins", "by"), [(0, "width"), (5, "width"), (7, "mass"), (1, "mass")])
def test_the_parts_add_up_to_the_brier_score(n_bins: int, by: str, parity) -> None:
    ours, theirs = [], []
    for scores, labels in cases(60):
        parts = brier_parts(np.clip(scores, 0, 1), labels, n_bins, by)
        ours.append(parts.score)
        theirs.append(brier_score(np.clip(scores, 0, 1), labels))
        assert min(parts.reliability, parts.resolution) >= 0 and (n_bins or abs(parts.within) < 1e-12)
    parity(f"brier_parts, {n_bins} bins of equal {by}", "Brier score", "invariant", ours, theirs, 1e-12)


def test_the_parts_by_hand() -> None:
    """Four forecasts of 0.75 of which two come true, four of 0.25 of which none does."""
    stated, came = [0.75] * 4 + [0.25] * 4, [1, 1, 0, 0, 0, 0, 0, 0]
    parts = brier_parts(stated, came)
    assert parts.reliability == pytest.approx(0.0625) and parts.resolution == pytest.approx(0.0625)
    assert parts.uncertainty == pytest.approx(0.1875) and brier_score(stated, came) == pytest.approx(0.1875)
    assert calibration_error(stated, came) == pytest.approx(0.25)
    assert [(each.n, each.confidence, each.frequency) for each in reliability(stated, came)] == [
        (4, 0.25, 0.0),
        (4, 0.75, 0.5),
    ]


def test_bins_are_closed_above_and_hold_everything() -> None:
    stated, came = np.array([0.0, 0.1, 0.2, 0.2001, 1.0]), [0, 1, 0, 1, 1]
    assert [each.n for each in reliability(stated, came, 5)] == [3, 1, 1]
    assert [each.n for each in reliability(stated, came, 2, "mass")] == [3, 2]
    calibrated = RNG.random(20_000)
    came = RNG.random(20_000) < calibrated
    assert calibration_error(calibrated, came) < 0.012 < 0.1 < calibration_error(calibrated**2, came)
    assert calibration_error(np.full(len(came), came.mean()), came) == pytest.approx(0, abs=1e-12)  # and knows nothing


def planted_logits(temperature: float, n: int = 3000, n_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for their labels, which are drawn from them."""
    sound = RNG.normal(size=(n, n_classes)) * 1.5
    chances = softmax(sound).cumsum(axis=1)
    return sound * temperature, (RNG.random(n)[:, None] > chances).sum(axis=1)


def test_temperature_is_the_lowest_point_of_a_grid_and_of_scipy(parity) -> None:
    ours, theirs = [], []
    for temperature in (0.3, 1.0, 2.5, 40.0):
        logits, labels = planted_logits(temperature, 400)
        found = fit_temperature(logits, labels)
        grid = found * np.linspace(0.5, 2.0, 601)
        losses = [scaled_nats(logits, labels, 1 / each)[0] for each in grid]
        assert abs(grid[int(np.argmin(losses))] - found) <= 0.0026 * found
        best = optimize.minimize_scalar(
            lambda inverse, logits=logits, labels=labels: scaled_nats(logits, labels, inverse)[0],
            bounds=(0.3 / found, 3 / found),
            method="bounded",
            options={"xatol": 1e-12},
        )
        ours.append(scaled_nats(logits, labels, 1 / found)[0])
        theirs.append(metrics.log_loss(labels, softmax(logits, 1 / best.x), labels=range(5)))
        assert abs(scaled_nats(logits, labels, 1 / found)[1]) < 1e-10
        assert 0.75 * temperature < found < 1.35 * temperature
    parity("fit_temperature", "scipy's bounded minimiser", "output", ours, theirs, 1e-9)


def test_a_planted_temperature_is_found_and_answers_stay() -> None:
    logits, labels = planted_logits(3.0)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(3.0, rel=0.1)
    before, after = softmax(logits), softmax(logits, found)
    assert (before.argmax(1) == after.argmax(1)).all()
    right = after.argmax(1) == labels
    assert calibration_error(after.max(1), right) < 0.04 < 0.15 < calibration_error(before.max(1), right)


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_cohens_kappa_is_scikit_learns(weights: str, parity) -> None:
    ours, theirs = [], []
    for _ in range(100):
        one = RNG.integers(0, 4, 25)
        other = np.where(RNG.random(25) < 0.5, one, RNG.integers(0, 4, 25))
        ours.append(cohen_kappa(one.tolist(), other.tolist(), weights))
        theirs.append(metrics.cohen_kappa_score(one, other, weights=None if weights == "none" else weights))
    parity(f"Cohen's kappa, weights {weights}", "scikit-learn", "output", ours, theirs, 1e-12)


def test_fleiss_and_krippendorff_are_nltks(parity) -> None:
    ours, theirs = [], []
    for _ in range(40):
        n_items, n_raters = int(RNG.integers(3, 12)), int(RNG.integers(2, 5))
        table = [[f"c{RNG.integers(0, 3)}" for _ in range(n_raters)] for _ in range(n_items)]
        table[0][0], table[1][0] = "c0", "c1"
        task = AnnotationTask([(str(r), str(i), table[i][r]) for i in range(n_items) for r in range(n_raters)])
        ours.append((fleiss_kappa(table), krippendorff_alpha(table)))
        theirs.append((task.pi(), task.alpha()))
    parity("Fleiss' kappa, Krippendorff's alpha", "NLTK's AnnotationTask", "output", ours, theirs, 1e-12)


def test_alpha_with_missing_ratings_and_numbers_is_nltks(parity) -> None:
    ours, theirs = [], []
    for _ in range(40):
        table = [[None if RNG.random() < 0.3 else int(RNG.integers(0, 5)) for _ in range(4)] for _ in range(9)]
        table[0], table[1] = [1, 2, 1, None], [3, 3, None, 3]
        kept = [item for item in table if sum(rating is not None for rating in item) > 1]
        triples = [(str(r), str(i), rating) for i, item in enumerate(kept) for r, rating in enumerate(item)]
        triples = [triple for triple in triples if triple[2] is not None]
        ours.append((krippendorff_alpha(table, numeric=True), krippendorff_alpha(table)))
        theirs.append(
            (AnnotationTask(triples, distance=lambda a, b: (a - b) ** 2).alpha(), AnnotationTask(triples).alpha())
        )
    parity("Krippendorff's alpha, missing ratings", "NLTK's AnnotationTask", "output", ours, theirs, 1e-12)


def test_kappa_by_hand_and_at_its_ends() -> None:
    """Fleiss on two items and three raters: agreement (1 + 1/3) / 2, chance (4/6)^2 + (2/6)^2."""
    assert fleiss_kappa(["aaa", "abb"]) == pytest.approx((2 / 3 - 5 / 9) / (1 - 5 / 9))
    assert cohen_kappa("aabb", "aabb") == 1.0 and cohen_kappa("aabb", "abab") == pytest.approx(0)
    assert krippendorff_alpha(["aa", "bb"]) == 1.0
    assert cohen_kappa(["a", None, 1], ["a", None, "1"]) == pytest.approx(4 / 7)  # labels of several kinds


def test_the_figure_shows_every_curve() -> None:
    figure = plot_reliability({"before": reliability([0.2, 0.8], [0, 1]), "after": reliability([0.5, 0.5], [0, 1])})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["before", "after"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0.1, 0.2], [1, 1]), "AUC is not defined for one class: all 2 labels are 1"),
        (lambda: roc_curve([0.1], [0]), "a ROC curve is not defined for one class"),
        (lambda: auc([0.1, 0.2], [1, 2]), "labels must be 0 or 1, got 2 at place 1"),
        (lambda: auc([0.1, math.nan], [1, 0]), "scores must be finite, got nan"),
        (lambda: auc([], []), "0 scores: nothing to measure"),
        (lambda: auc([1.0], [1, 0]), "1 scores but 2 labels"),
        (lambda: brier_score([1.5], [1]), "a confidence must be between 0 and 1, got 1.5"),
        (lambda: reliability([0.5], [1], 0), "n_bins=0 must be a whole number of at least 1"),
        (lambda: reliability([0.5], [1], 5, "depth"), "unknown binning 'depth'"),
        (lambda: fit_temperature(np.eye(3), [0, 1, 2]), "every label has the largest logit"),
        (lambda: fit_temperature(np.eye(2), [1, 0]), "no better than a uniform guess"),
        (lambda: fit_temperature(np.eye(2), [1, 2]), "class numbers below 2"),
        (lambda: fit_temperature(np.eye(2), [1]), "logits must be"),
        (lambda: cohen_kappa("aa", "a"), "2 labels of one rater but 1 of the other"),
        (lambda: cohen_kappa("aa", "aa"), "only one label occurs"),
        (lambda: fleiss_kappa(["ab", "a"]), "the same number of raters"),
        (lambda: fleiss_kappa(["aa", "aa"]), "only one label occurs"),
        (lambda: krippendorff_alpha([["a", None], ["b"]]), "alpha needs items with two ratings"),
        (lambda: krippendorff_alpha([[1.0, math.nan], [2.0, 2.0]], numeric=True), "a rating is NaN; write None"),
        (lambda: brier_score(np.array([[0.2], [0.9]]), [0, 1]), r"confidence must be one column, .* \(2, 1\)"),
        (lambda: auc([0.1, 0.2], np.eye(2)), r"labels must be one column, .* \(2, 2\)"),
        (lambda: brier_score(0.5, 1), "confidence must be one column"),
        (lambda: fit_temperature(np.eye(2), [0.0, 1.0]), "labels must be whole numbers in one column, got float64"),
        (lambda: fit_temperature(np.eye(2), [True, False]), "got bool"),
        (lambda: fit_temperature(np.eye(2), [[0], [1]]), r"int64 of shape \(2, 1\)"),
        (lambda: fit_temperature(np.array([[1e300, 0.0], [0.0, 1.0]]), [1, 1]), "finite and at most 1e.100 in size"),
        (lambda: calibration_error([0.5], [1], 2.5), "n_bins=2.5 must be a whole number of at least 1"),
        (lambda: cohen_kappa([], []), "0 labels: nothing to agree on"),
        (lambda: softmax([[1.0, 2.0]], 0.0), "temperature=0.0 must be above 0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
