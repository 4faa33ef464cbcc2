"""Topic 10: MinHash is Jaccard within its bound, the bands follow the S-curve, spans equal brute force."""

import hashlib
import math
import random

import numpy as np
import pytest

import deduplication
from deduplication import (
    Decontaminator,
    MinHashConfig,
    MinHasher,
    NearDuplicates,
    UnionFind,
    band_threshold,
    collision_probability,
    duplicate_clusters,
    estimated_similarity,
    jaccard,
    plot_s_curve,
    repeated_spans,
    shingles,
    text_key,
    window_hashes,
)

WORDS = [f"w{number}" for number in range(5000)]


def pair(similarity: float, n: int, rng: random.Random) -> tuple[str, str]:
    """Two texts of single-word shingles with about this Jaccard similarity."""
    common = round(2 * n * similarity / (1 + similarity))
    words = rng.sample(WORDS, 2 * n - common)
    return " ".join(words[:n]), " ".join(words[n - common :])


def test_shingles_by_hand() -> None:
    assert shingles("The cat, the CAT sat.", 2) == {"the cat", "cat the", "cat sat"}
    assert shingles("Two words", 5) == {"two words"} and shingles("...", 5) == set()
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5 and jaccard(set(), set()) == 1.0


def test_keys_see_words_only() -> None:
    assert text_key("Hello,  World!\n") == text_key("hello world")
    assert text_key("hello world") != text_key("world hello") and text_key("a b") != text_key("ab")
    assert text_key("Stra\u00dfe") == text_key("STRASSE")  # case folding; lower case alone keeps the two apart


def test_the_estimate_is_jaccard_within_its_binomial_bound(parity) -> None:
    """300 pairs x 64 hashes: the standardised errors have mean 0 and variance 1, each within 5 standard errors."""
    config, rng, errors = MinHashConfig(n_bands=16, n_rows=4, shingle_size=1), random.Random(0), []
    for turn in range(300):
        hasher = MinHasher(MinHashConfig(n_bands=16, n_rows=4, shingle_size=1, seed=turn))
        one, two = pair(0.1 + 0.8 * (turn % 9) / 8, 60, rng)
        truth = jaccard(shingles(one, 1), shingles(two, 1))
        spread = math.sqrt(truth * (1 - truth) / config.n_hashes)
        errors.append((estimated_similarity(hasher(one), hasher(two)) - truth) / spread)
    parity("MinHash", "Jaccard similarity by sets", "invariant", np.mean(errors), 0.0, 5 / math.sqrt(300))
    parity("MinHash", "binomial variance", "invariant", np.var(errors), 1.0, 5 * math.sqrt(2 / 300))


def test_a_signature_is_the_least_of_each_linear_function_in_whole_numbers() -> None:
    hasher = MinHasher(MinHashConfig(n_bands=6, n_rows=2, shingle_size=1))
    values = [int.from_bytes(hashlib.blake2b(w.encode(), digest_size=4).digest(), "little") for w in ("red", "blue")]
    functions = [(int(a), int(b)) for a, b in zip(hasher.factors[:, 0], hasher.shifts[:, 0], strict=True)]
    assert hasher("Red blue red.").tolist() == [min((a * x + b) % 4_294_967_311 for x in values) for a, b in functions]
    assert len({a for a, _ in functions}) == len({b for _, b in functions}) == 12  # twelve functions, not one


def test_pairs_meet_in_a_band_as_often_as_the_s_curve_says(parity) -> None:
    rng, n = random.Random(1), 200
    for similarity in (0.3, 0.5, 0.7):
        one, two = pair(similarity, 80, rng)
        truth, met = jaccard(shingles(one, 1), shingles(two, 1)), 0
        for seed in range(n):
            hasher = MinHasher(MinHashConfig(n_bands=6, n_rows=3, shingle_size=1, seed=seed))
            met += any(a == b for a, b in zip(hasher.bands(hasher(one)), hasher.bands(hasher(two)), strict=True))
        expected = collision_probability(truth, 6, 3)
        bound = 5 * math.sqrt(expected * (1 - expected) / n)
        parity("LSH bands", "1 - (1 - s^r)^b", "invariant", met / n, expected, bound)


def test_the_curve_by_hand() -> None:
    assert collision_probability(0.5, 2, 1) == 0.75 and collision_probability(1.0, 3, 4) == 1.0
    assert collision_probability(0.0, 3, 4) == 0.0
    assert band_threshold(16, 4) == pytest.approx(0.5)
    assert collision_probability(band_threshold(14, 8), 14, 8) == pytest.approx(1 - (1 - 1 / 14) ** 14)


def test_equal_texts_have_equal_signatures_and_others_meet_nowhere() -> None:
    hasher, rng = MinHasher(MinHashConfig()), random.Random(2)
    text = " ".join(rng.sample(WORDS, 100))
    assert (hasher(text) == hasher(text.upper() + "!")).all()
    assert (hasher(text) == hasher(" ".join(rng.sample(WORDS, 100)))).mean() < 0.05
    assert hasher("").shape == hasher(text).shape == (112,)


def some_texts() -> list[str]:
    """Families of texts with small changes, and single ones, in a mixed order."""
    rng, texts = random.Random(3), []
    for _ in range(12):
        words = rng.sample(WORDS, 120)
        texts.append(" ".join(words))
        for _ in range(rng.randrange(3)):
            words = [*words]
            words[rng.randrange(120)] = "changed"
            texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts


def test_clusters_equal_those_of_all_pairs_by_brute_force() -> None:
    texts, config = some_texts(), MinHashConfig(n_bands=28, n_rows=4, least_similarity=0.6)
    groups = UnionFind(len(texts))
    for a in range(len(texts)):
        for b in range(a):
            if jaccard(shingles(texts[a]), shingles(texts[b])) >= 0.6:
                groups.join(a, b)
    clusters = duplicate_clusters(texts, config)
    assert clusters == [groups.find(number) for number in range(len(texts))]
    assert 12 == len(set(clusters)) < len(texts)


def test_one_pass_keeps_the_first_of_every_family() -> None:
    texts = some_texts()
    index, clusters = NearDuplicates(MinHashConfig()), duplicate_clusters(texts)
    found = [index.add(text) for text in texts]
    assert [match is None for match in found] == [first == number for number, first in enumerate(clusters)]
    assert all(match is None or clusters[match] == clusters[number] for number, match in enumerate(found))


def test_a_page_at_the_least_similarity_is_a_duplicate() -> None:
    index = NearDuplicates(MinHashConfig(least_similarity=1.0))
    assert [index.add(text) for text in ("a b c d e f g", "h i j k l m n", "A, b c d e f g!")] == [None, None, 0]


def test_a_link_between_two_kept_pages_joins_their_group_but_not_the_single_pass() -> None:
    words = WORDS[:100]
    first, last = " ".join([*words, *WORDS[200:230]]), " ".join([*words, *WORDS[300:330]])
    middle = " ".join([*words, *WORDS[200:215], *WORDS[300:315]])
    config = MinHashConfig(n_bands=400, n_rows=2, shingle_size=1, least_similarity=0.71)
    index = NearDuplicates(config)
    assert [index.add(text) for text in (first, last, middle)] == [None, None, 0]
    assert duplicate_clusters([first, last, middle], config) == [0, 0, 0]


# Spans


def brute_force(documents: list[list[int]], length: int) -> list[list[bool]]:
    seen, marks = set(), []
    for tokens in documents:
        mark = [False] * len(tokens)
        for start in range(len(tokens) - length + 1):
            window = tuple(tokens[start : start + length])
            if window in seen:
                mark[start : start + length] = [True] * length
            seen.add(window)
        marks.append(mark)
    return marks


@pytest.mark.parametrize("length", [1, 3, 7])
def test_repeated_spans_equal_brute_force(length: int) -> None:
    rng = random.Random(length)
    documents = [[rng.randrange(3) for _ in range(rng.randrange(60))] for _ in range(20)]
    found = repeated_spans(documents, length)
    assert [mark.tolist() for mark in found] == brute_force(documents, length)
    assert any(mark.any() for mark in found) and not found[0].all()


def test_a_copied_passage_of_fifty_tokens_is_marked_and_one_of_49_is_not() -> None:
    fresh = iter(range(10_000))
    passage = [next(fresh) for _ in range(60)]
    for length, marked in ((50, 50), (49, 0)):
        other = [next(fresh) for _ in range(5)] + passage[5 : 5 + length] + [next(fresh) for _ in range(5)]
        first, second = repeated_spans([passage, other])
        assert not first.any() and second.sum() == marked


def test_rolling_hashes_equal_hashes_from_scratch() -> None:
    tokens = [random.Random(5).randrange(10**9) for _ in range(40)]
    rolled = window_hashes(tokens, 7)
    assert rolled == [window_hashes(tokens[start : start + 7], 7)[0] for start in range(34)]
    assert window_hashes(tokens, 41) == []


# Evaluation documents


def test_thirteen_words_in_other_case_are_found_and_twelve_are_not() -> None:
    words = WORDS[:20]
    index = Decontaminator([" ".join(words)])
    assert index.shared(f"Before. {', '.join(words[3:16]).upper()}! After.") == (0, " ".join(words[3:16]))
    assert index.shared(" ".join([*words[:12], "other", *words[13:]])) is None


def test_short_evaluation_texts_are_looked_for_whole_or_counted() -> None:
    index = Decontaminator([" ".join(WORDS[:9]), "What is two plus two? Four."])
    assert index.n_unchecked == 1
    at_least = Decontaminator([" ".join(WORDS[:8]), " ".join(WORDS[:7])], least_words=8)
    assert at_least.n_unchecked == 1 and at_least.shared(" ".join(WORDS[:8])) == (0, " ".join(WORDS[:8]))
    assert index.shared("x " + " ".join(WORDS[:9]) + " y") == (0, " ".join(WORDS[:9]))
    assert index.shared(" ".join(WORDS[:8]) + " y") is None
    assert index.shared("What is two plus two? Four.") is None
    with pytest.raises(ValueError, match="least_words=14 must be between 1 and n=13"):
        Decontaminator([], least_words=14)


def test_the_figure_has_the_measured_points() -> None:
    figure = plot_s_curve(MinHashConfig(), [(0.2, 0.0), (0.9, 1.0)], {0.05: 0.6})
    assert len(figure.axes[0].lines) == 7 and figure.axes[0].get_xlabel()


def test_spans_are_found_in_arrays_and_tuples_alike() -> None:
    rows = [[7, 8, 9, 7, 8, 9], (7, 8, 9), [1, 7, 8, 9]]
    wanted = [mark.tolist() for mark in repeated_spans([list(row) for row in rows], 3)]
    assert wanted == [[False] * 3 + [True] * 3, [True] * 3, [False, True, True, True]]
    for kind in (list, tuple, lambda row: np.array(row, dtype=np.uint16)):
        assert [mark.tolist() for mark in repeated_spans([kind(row) for row in rows], 3)] == wanted
    with pytest.raises(ValueError, match="a run needs at least one token, got length=0"):
        repeated_spans(rows, 0)


def test_a_collision_of_hashes_never_invents_a_duplicate(monkeypatch) -> None:
    rng = random.Random(3)
    documents = [[rng.randrange(4) for _ in range(30)] for _ in range(6)]
    wanted = repeated_spans(documents, 5)
    monkeypatch.setattr(deduplication, "MODULUS", 11)  # eleven hashes for more than a hundred different runs
    found = repeated_spans(documents, 5)
    assert not any((mark & ~right).any() for mark, right in zip(found, wanted, strict=True))
    assert sum(mark.sum() for mark in found) < sum(right.sum() for right in wanted), "collisions hide some"
