"""Intervals, tests and ratings against scipy, scikit-learn, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats._resampling import BootstrapResult
from sklearn.linear_model import LogisticRegression

from evaluation_statistics import (
    ELO,
    Interval,
    benjamini_hochberg,
    binomial_chances,
    bootstrap,
    bootstrap_interval,
    bradley_terry,
    clopper_pearson,
    clustered_error,
    elo,
    exact_coverage,
    exact_mcnemar_power,
    expected_score,
    holm,
    mcnemar,
    mean_of,
    minorise_maximise,
    paired_bootstrap,
    paired_power,
    questions_needed,
    ratio_of,
    sign_flip_test,
    wald,
    wilson,
    win_table,
)

CASES = [(k, n, level) for n in (1, 2, 7, 30, 211) for k in {0, 1, n // 3, n - 1, n} for level in (0.8, 0.95, 0.999)]


def test_intervals_of_a_share_are_scipys(parity) -> None:
    library = {"wilson": wilson, "exact": clopper_pearson}
    for method, ours in library.items():
        found = [tuple(ours(k, n, level)) for k, n, level in CASES]
        known = [tuple(stats.binomtest(k, n).proportion_ci(level, method)) for k, n, level in CASES]
        parity(f"interval of a share, {method}", "scipy.stats.binomtest", "output", found, known, 1e-9)
    parity(
        "binomial_chances",
        "scipy.stats.binom",
        "output",
        binomial_chances(37, 0.3),
        stats.binom(37, 0.3).pmf(range(38)),
        1e-12,
    )
    assert wald(0, 10) == (0.0, 0.0) and wald(5, 10) == pytest.approx((0.5 - 0.30990, 0.5 + 0.30990), abs=1e-5)


def test_wilson_holds_exactly_the_shares_that_a_score_test_keeps() -> None:
    low, high = wilson(13, 40, 0.9)
    z = stats.norm.ppf(0.95)
    for edge in (low, high):
        assert abs(13 / 40 - edge) == pytest.approx(z * math.sqrt(edge * (1 - edge) / 40))


def test_coverage_is_what_a_simulation_finds_and_only_one_method_keeps_its_promise() -> None:
    drawn = np.random.default_rng(0).binomial(20, 0.15, 40_000)
    simulated = np.mean(np.array([wilson(k, 20).covers(0.15) for k in range(21)])[drawn])
    assert exact_coverage("wilson", 20, 0.15) == pytest.approx(simulated, abs=4 * math.sqrt(0.05 * 0.95 / 40_000))
    shares = np.linspace(0.01, 0.99, 99)
    least = {name: min(exact_coverage(name, 20, p) for p in shares) for name in ("wald", "wilson", "clopper-pearson")}
    assert least["clopper-pearson"] >= 0.95 and least["wald"] < 0.3 and least["wilson"] > 0.82
    assert np.mean([exact_coverage("wilson", 20, p) for p in shares]) == pytest.approx(0.95, abs=0.01)


def test_bca_and_percentile_intervals_are_scipys_on_the_same_draws(parity) -> None:
    ours, theirs = [], []
    for seed in range(10):
        values = np.random.default_rng(seed).exponential(size=15 + seed)
        made = bootstrap(mean_of(values), len(values), 1000, seed)
        for method in ("percentile", "BCa"):
            known = BootstrapResult(Interval(0, 0), made.draws, 0.0)
            found = stats.bootstrap(
                (values,), np.mean, n_resamples=0, bootstrap_result=known, method=method, confidence_level=0.9
            )
            theirs.append(tuple(found.confidence_interval))
            ours.append(tuple(made.bca(0.9) if method == "BCa" else made.percentile(0.9)))
    parity("bootstrap intervals", "scipy.stats.bootstrap", "output", ours, theirs, 1e-9)


def test_the_draws_have_the_spread_of_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    made = bootstrap(mean_of(values), 400, 4000)
    assert made.error == pytest.approx(values.std() / 20, rel=0.06) and made.estimate == pytest.approx(values.mean())
    sizes = np.arange(1, 401)
    made = bootstrap(ratio_of(values * sizes, sizes), 400, 4000)
    assert made.estimate == pytest.approx((values * sizes).sum() / sizes.sum())
    assert made.left_out[0] == pytest.approx((values * sizes)[1:].sum() / sizes[1:].sum())


def test_whole_groups_are_drawn() -> None:
    """Twenty texts with five questions each that are all right or all wrong: twenty coins, not a hundred."""
    right = np.repeat(np.arange(20) % 2, 5)
    groups = np.repeat(np.arange(20), 5)
    alone, together = bootstrap(mean_of(right), 100, 4000).error, bootstrap(mean_of(right), groups, 4000).error
    assert together == pytest.approx(0.5 / math.sqrt(20), rel=0.06) and alone == pytest.approx(0.05, rel=0.06)
    assert clustered_error(right, groups) == pytest.approx(0.5 / math.sqrt(20))
    assert clustered_error(right, range(100)) == pytest.approx(0.05)
    low, high = bootstrap_interval(mean_of(right), groups, method="percentile")
    assert high - low == pytest.approx(2 * 1.96 * together, rel=0.1)


def test_sign_flips_are_scipys_exact_permutation_test(parity) -> None:
    ours, theirs = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        first, second = rng.integers(0, 3, 9).astype(float), rng.integers(0, 3, 9) + rng.random(9).round(1)
        found = stats.permutation_test(
            (first - second,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        ours.append(sign_flip_test(first, second).p_value)
        theirs.append(float(found.pvalue))
    parity("sign_flip_test", "scipy.stats.permutation_test", "output", ours, theirs, 1e-9)


def test_sampled_flips_agree_with_all_of_them_and_are_never_zero() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random(14), rng.random(14) + 0.25
    exact = sign_flip_test(first, second).p_value
    sampled = sign_flip_test(first, second, n_flips=20_000, most_exact=0).p_value
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000) + 1e-4)
    assert sign_flip_test(np.ones(50), np.zeros(50), n_flips=999).p_value == 1 / 1000


def test_on_right_or_wrong_answers_sign_flips_are_mcnemars_test(parity) -> None:
    first, second = [1] * 9 + [0] * 3 + [1] * 5, [0] * 9 + [1] * 3 + [1] * 5
    p_value = mcnemar(9, 3)
    parity("mcnemar", "sign_flip_test", "invariant", p_value, sign_flip_test(first, second).p_value, 1e-12)
    counts = [(0, 0), (1, 0), (3, 3), (5, 9), (30, 12), (0, 40)]
    known = [stats.binomtest(a, a + b).pvalue if a + b else 1.0 for a, b in counts]
    parity("mcnemar", "scipy.stats.binomtest", "output", [mcnemar(a, b) for a, b in counts], known, 1e-12)
    chi2 = [stats.chi2(1).sf(max(0, abs(a - b) - 1) ** 2 / max(1, a + b)) for a, b in counts]
    parity("mcnemar, chi-squared", "scipy.stats.chi2", "output", [mcnemar(a, b, False) for a, b in counts], chi2, 1e-12)


def test_a_paired_bootstrap_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(300) < 0.5
    first = (~hard | (rng.random(300) < 0.10)).astype(float)
    second = (~hard).astype(float)
    test, (low, high) = paired_bootstrap(first, second)
    assert test.p_value < 0.01 and low > 0 and test.difference == pytest.approx((first - second).mean())
    assert wilson(int(first.sum()), 300).low < wilson(int(second.sum()), 300).high  # the two intervals overlap
    assert paired_bootstrap(first, first)[0].p_value == 1.0


@pytest.mark.parametrize(("n", "difference", "disagreement"), [(50, 0.2, 0.4), (200, 0.08, 0.2), (400, -0.05, 0.1)])
def test_power_is_what_a_simulation_finds(n: int, difference: float, disagreement: float) -> None:
    rng, rejected = np.random.default_rng(0), []
    shares = [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement]
    for a, b, _ in rng.multinomial(n, shares, 3000):
        rejected.append(mcnemar(int(a), int(b)) <= 0.05)
    exact = exact_mcnemar_power(n, difference, disagreement)
    assert np.mean(rejected) == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 3000))
    assert exact <= paired_power(n, difference, disagreement) + 0.005  # the exact test is careful
    assert exact == pytest.approx(paired_power(n, difference, disagreement), abs=0.09)


def test_the_number_of_questions_has_the_power_that_was_asked() -> None:
    for difference, disagreement, power in [(0.1, 0.3, 0.8), (0.02, 0.1, 0.9), (0.5, 0.5, 0.8)]:
        n = questions_needed(difference, disagreement, power)
        assert paired_power(n, difference, disagreement) >= power - 1e-9
        assert difference == disagreement or paired_power(n - 1, difference, disagreement) < power
    assert questions_needed(0.05, 0.1) < questions_needed(0.05, 0.42, paired=False) == 1319


def test_holm_is_the_closed_test_and_hochbergs_is_scipys(parity) -> None:
    """Holm's p is the largest Bonferroni p of any set of hypotheses that holds it: every set is looked at."""
    ours, theirs, rates, known = [], [], [], []
    rng = np.random.default_rng(7)
    for _ in range(30):
        found = np.round(rng.random(5) ** 3, 2)
        sets = [chosen for size in range(1, 6) for chosen in itertools.combinations(range(5), size)]
        theirs.append([max(min(1, len(s) * found[list(s)].min()) for s in sets if i in s) for i in range(5)])
        ours.append(holm(found))
        rates.append(benjamini_hochberg(found))
        known.append(stats.false_discovery_control(found))
    parity("holm", "closed testing, all sets", "output", ours, [np.array(row) for row in theirs], 1e-12)
    parity("benjamini_hochberg", "scipy.stats.false_discovery_control", "output", rates, known, 1e-12)


def tournament(strengths: np.ndarray, n_games: int, seed: int) -> list[tuple[int, int, float]]:
    rng, found = np.random.default_rng(seed), []
    for _ in range(n_games):
        one, two = rng.choice(len(strengths), 2, replace=False)
        found.append((int(one), int(two), float(rng.random() < 1 / (1 + math.exp(strengths[two] - strengths[one])))))
    return found


def test_bradley_terry_is_logistic_regression_and_the_other_algorithm(parity) -> None:
    ours, theirs, slow = [], [], []
    for seed in range(5):
        games = tournament(np.array([0.0, 0.4, 1.0, -0.7]), 120, seed)
        wins = win_table(games, 4)
        ours.append(bradley_terry(wins).strengths)
        slow.append(minorise_maximise(wins))
        design = np.zeros((len(games), 4))
        for row, (one, two, _) in enumerate(games):
            design[row, one], design[row, two] = 1, -1
        fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
        found = np.append(0, fitted.fit(design[:, 1:], [score for _, _, score in games]).coef_[0])
        theirs.append(found - found.mean())
    parity("bradley_terry", "scikit-learn's logistic regression", "output", ours, theirs, 1e-6)
    parity("bradley_terry", "MM algorithm", "invariant", ours, slow, 1e-9)


def test_two_players_have_the_log_odds_and_its_error() -> None:
    rated = bradley_terry(np.array([[0, 30], [10, 0]]))
    assert rated.strengths[0] - rated.strengths[1] == pytest.approx(math.log(3))
    assert rated.elo[0] - rated.elo[1] == pytest.approx(400 * math.log10(3)) and round(ELO, 4) == 173.7178
    low, high = rated.difference(0, 1)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(1 / 30 + 1 / 10))
    assert rated.elo.mean() == pytest.approx(1000)


def test_intervals_of_ratings_cover() -> None:
    strengths, covered = np.array([0.5, 0.0, -0.5]), []
    for seed in range(400):
        rated = bradley_terry(win_table(tournament(strengths, 90, seed), 3))
        covered.append(rated.difference(0, 2).covers(1.0))
    assert 0.92 < np.mean(covered) < 0.98


def test_elo_moves_by_the_surprise_and_depends_on_the_order() -> None:
    assert expected_score(1400, 1000) == pytest.approx(10 / 11)
    assert elo([(0, 1, 1.0)], 2).tolist() == [1008, 992]
    games = tournament(np.array([1.0, 0.0, -1.0]), 300, 0)
    forward, backward = elo(games, 3), elo(games[::-1], 3)
    assert forward.sum() == pytest.approx(3000) and np.abs(forward - backward).max() > 5
    assert forward.argsort().tolist() == [2, 1, 0] == bradley_terry(win_table(games, 3)).elo.argsort().tolist()
    assert win_table([(0, 1, 0.5)], 2).tolist() == [[0, 0.5], [0.5, 0]]


def test_wilsons_interval_ends_exactly_where_shares_end() -> None:
    """Rounding left out the true share 0 for every second n."""
    for n in range(1, 400):
        assert wilson(0, n).low == 0.0 and wilson(n, n).high == 1.0
        assert wilson(0, n).high == pytest.approx(1 - wilson(n, n).low, abs=1e-15)


def test_more_groups_than_a_chunk_holds_are_all_drawn_and_left_out() -> None:
    values = np.random.default_rng(4).normal(size=1203)
    made = bootstrap(mean_of(values), 1203, 1203, chunk=500)
    alike = bootstrap(mean_of(values), 1203, 1203, chunk=77)
    assert len(made.draws) == len(made.left_out) == 1203 and made.draws == pytest.approx(alike.draws, abs=1e-12)
    for place in (0, 499, 500, 1000, 1202):
        assert made.left_out[place] == pytest.approx(np.delete(values, place).mean(), abs=1e-12)


def test_a_paired_bootstrap_draws_whole_texts() -> None:
    first, second = np.repeat(np.arange(12) % 3 > 0, 6).astype(float), np.zeros(72)
    (alone, (low, high)), (together, (wide_low, wide_high)) = (
        paired_bootstrap(first, second, groups) for groups in (None, np.repeat(np.arange(12), 6))
    )
    assert alone.difference == together.difference == pytest.approx(2 / 3)
    assert (wide_high - wide_low) / (high - low) == pytest.approx(math.sqrt(6), rel=0.2)


def test_a_number_of_items_may_be_numpy_s() -> None:
    ours, theirs = (bootstrap(mean_of([1, 2, 4]), n, 50).draws for n in (3, np.int64(3)))
    assert (ours == theirs).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(4, 3), "4 right of 3"),
        (lambda: wilson(0, 0), "at least 1"),
        (lambda: clopper_pearson(1, 3, 95), "level=95 must be between 0 and 1"),
        (lambda: exact_coverage("wilsn", 3, 0.5), "unknown interval 'wilsn'; did you mean 'wilson'"),
        (lambda: bootstrap(mean_of([1.0]), 1), "at least 2 groups"),
        (lambda: bootstrap_interval(mean_of([1.0, 1.0]), 2), "the draws do not vary"),
        (lambda: bootstrap_interval(mean_of([1.0, 2.0]), 2, method="bc"), "unknown bootstrap interval 'bc'"),
        (lambda: sign_flip_test([1], [1, 2]), "1 scores but 2 of the other"),
        (lambda: sign_flip_test([], []), "0 scores"),
        (lambda: mcnemar(-1, 2), "counts must be >= 0"),
        (lambda: questions_needed(0.3, 0.2), "difference=0.3 and disagreement=0.2"),
        (lambda: paired_power(10, 0.0, 0.2), "difference=0.0"),
        (lambda: holm([0.5, 1.5]), "p values must be numbers between 0 and 1"),
        (lambda: elo([(0, 1, 2.0)], 2), "score of a game must be between 0 and 1, got 2.0"),
        (lambda: bradley_terry(np.array([[0, 3], [0, 0]])), "player 1 has no chain of wins to .0."),
        (lambda: bradley_terry(np.zeros((2, 3))), "wins must be a square table"),
        (lambda: bradley_terry(np.array([[0, math.inf], [1, 0]])), "of finite numbers >= 0"),
        (lambda: sign_flip_test([1.0, math.nan], [0.0, 1.0]), "scores must be finite numbers in one column, got nan"),
        (lambda: mean_of([1.0, math.inf]), "got inf"),
        (lambda: mean_of([[1.0, 2.0]]), r"numbers of shape \(1, 2\)"),
        (lambda: bootstrap(mean_of([1.0, 2.0, 3.0]), [0, 1]), "groups name 2 items, the statistic has another number"),
        (lambda: bootstrap(mean_of([1.0, 2.0]), 2, n_boot=0), "n_boot=0 draws must be at least 2"),
        (lambda: holm([[0.1, 0.2]]), "p values must be numbers between 0 and 1"),
        (lambda: elo([(0, 2, 1.0)], 2), "players 0 to 1, got 0 against 2"),
        (lambda: elo([(1, -1, 1.0)], 2), "got 1 against -1"),
        (lambda: win_table([(1, 1, 1.0)], 2), "got 1 against 1"),
        (lambda: exact_coverage("wilson", 3, 1.5), "share=1.5 must be between 0 and 1"),
        (lambda: binomial_chances(-1, 0.5), "n=-1 must be a whole number of at least 0"),
        (lambda: clopper_pearson(1, 2.5), "n=2.5 must be a whole number"),
        (lambda: ratio_of([1.0, 2.0], [0.0, 0.0]), "the denominators add up to 0"),
        (lambda: clustered_error([], []), "0 scores but 0 groups"),
        (lambda: clustered_error([1.0, 2.0], [0]), "2 scores but 1 groups"),
        (lambda: sign_flip_test([1.0] * 20, [0.0] * 20, n_flips=0), "n_flips=0 must be at least 1"),
        (lambda: paired_power(-4, 0.1, 0.2), "n=-4 questions"),
        (lambda: elo([(0, 1, 1.0)], 2, k=math.nan), "k=nan must be finite and > 0"),
        (lambda: elo([(0.0, 1, 1.0)], 2), "got 0.0 against 1"),
        (lambda: elo([(0, True, 1.0)], 2), "got 0 against True"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
