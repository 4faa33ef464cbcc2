"""Topic 10: repairs undo damage and nothing else, rules count what they say, classifiers equal scikit-learn's."""

import math
import random
import unicodedata

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from corpus_filters import (
    RULES,
    NgramLanguage,
    QualityClassifier,
    QualityConfig,
    RuleConfig,
    failed_rule,
    hashed_ngrams,
    iban_valid,
    luhn_valid,
    mask_private,
    normalise,
    repair_mojibake,
    top_ngram_share,
)
from dirty_corpus import DAMAGES, DECOYS, JUNK, LANGUAGES, PRIVATE, damage_encoding, foreign_text, spam, world_page
from tiny_world import World


@pytest.fixture(scope="module")
def good() -> list[str]:
    documents, rng = World().stream(11), random.Random(2)
    return [world_page(documents, rng) for _ in range(40)]


# Repair


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_undone_exactly(name: str, good) -> None:
    rng = random.Random(3)
    damaged = [DAMAGES[name](text, rng) for text in good]
    assert all(text != other for text, other in zip(damaged, good, strict=True))
    assert [normalise(text) for text in damaged] == good


def test_good_text_and_other_languages_stay_and_twice_is_once(good) -> None:
    texts = [*good, *(foreign_text(language, random.Random(4)) for language in LANGUAGES)]
    assert [normalise(text) for text in texts] == texts
    for text in ("a &amp; b", "\ufeffx\r\ny  ", damage_encoding(good[0], random.Random(0))):
        assert normalise(normalise(text)) == normalise(text)


def test_mojibake_is_repaired_only_where_the_whole_text_agrees() -> None:
    assert repair_mojibake("caf\u00c3\u00a9") == "caf\u00e9"
    for honest in (
        "\u00c2ge tendre, \u00e2me",
        "\u00c3\u00a9 \u4e2d",
        "S\u00c3O PAULO",
    ):  # not one of them is UTF-8 misread
        assert repair_mojibake(honest) == honest


def test_decomposed_letters_are_composed_and_every_line_end_is_one_line_end() -> None:
    assert normalise("12 m\u00b2 and \u00bd") == "12 m\u00b2 and \u00bd"  # compatibility forms are not the same text
    assert normalise("a\r\nb\rc\nd") == "a\nb\nc\nd"
    assert normalise(unicodedata.normalize("NFD", "\u00e9t\u00e9")) == "\u00e9t\u00e9"


# Rules


def test_good_pages_pass_and_each_kind_of_junk_breaks_a_rule(good) -> None:
    rng = random.Random(5)
    assert sum(failed_rule(text) is not None for text in good) <= 1
    for name, write in JUNK.items():
        passed = sum(failed_rule(write(rng)) is None for _ in range(20))
        assert not passed, name


SENTENCE = "The cat and the dog have to be in the garden with that bird. "
PROSE = "\n".join(SENTENCE.replace("cat", name) for name in "Anna Ben Carl Dora Emil Finn Greta Hugo".split())
BROKEN = {
    "too few words": "The cat and the dog.",
    "word length": "a I " * 30 + "the of.",
    "symbols": PROSE + " # # #" * 12,
    "not alphabetic": PROSE + " 12 13" * 70,
    "stop words": "Katzen sehen Hunde im Garten heute. " * 10,
    "sentence ends": PROSE.replace(".", "") * 3,
    "tags": PROSE + '<div class="the-one-with-many-words-in-it"></div>' * 6,
    "bullets": "\n".join("- " + line for line in PROSE.split("\n")),
    "ellipses": PROSE.replace(". ", " ..."),
    "duplicate lines": PROSE + "\n" + "\n".join(PROSE.split("\n")[:5]) + "\n" + PROSE.split("\n")[0],
    "top bigram": PROSE + " unbelievable extravagance, the" * 9 + ".",
    "top trigram": PROSE + " elephants and tigers dance." * 6,
}


def test_the_text_of_these_tests_passes_all_rules() -> None:
    loose = RuleConfig(max_top_bigram=1, max_top_trigram=1)
    assert failed_rule(PROSE, loose) is None


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_finds_the_text_that_breaks_it(name: str) -> None:
    text = BROKEN[name]
    assert RULES[name](text, text.split(), RuleConfig())
    assert not RULES[name](PROSE, PROSE.split(), RuleConfig(max_top_bigram=0.5, max_top_trigram=0.6))


def test_too_many_words_is_the_only_rule_that_needs_a_long_page() -> None:
    assert set(RULES) - set(BROKEN) == {"too many words"}
    assert failed_rule("the cat and " * 40, RuleConfig(max_words=100)) == "too many words"


def test_top_ngram_by_hand() -> None:
    assert top_ngram_share("a b a b c".split(), 2) == pytest.approx(4 / 5)
    assert top_ngram_share("a b c d".split(), 2) == 0.0
    assert top_ngram_share([], 3) == 0.0


# Language


@pytest.fixture(scope="module")
def texts(good) -> dict[str, list[str]]:
    rng = random.Random(6)
    return {"english": good, **{name: [foreign_text(name, rng) for _ in range(15)] for name in LANGUAGES}}


def test_naive_bayes_equals_scikit_learn(texts, parity) -> None:
    orders = (1, 2, 3)
    model = NgramLanguage.train(texts, orders)
    flat = [(name, text) for name, found in texts.items() for text in found]
    counter = CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=True)
    padded = [f" {' '.join(text.split())} " for _, text in flat]
    oracle = MultinomialNB(alpha=1.0, fit_prior=False).fit(counter.fit_transform(padded), [name for name, _ in flat])
    rng = random.Random(7)
    unseen = [foreign_text("german", rng), foreign_text("french", rng)[:40], "Hello the dog", "\u4e2d", good_line()]
    found = counter.transform([f" {' '.join(text.split())} " for text in unseen])
    order = [list(oracle.classes_).index(name) for name in model.names]
    ours = np.array([model.log_probabilities(text) for text in unseen])
    parity("NgramLanguage", "sklearn MultinomialNB", "output", ours, oracle.predict_log_proba(found)[:, order], 1e-8)


def good_line() -> str:
    return next(World().stream(77)).text


def test_unseen_sentences_are_told_apart_but_not_by_two_letters(texts) -> None:
    model, rng = NgramLanguage.train(texts), random.Random(8)
    documents = World().stream(12)
    cases = [("english", next(documents).text) for _ in range(60)]
    cases += [(name, write(rng)) for name, write in LANGUAGES.items() for _ in range(60)]
    right = sum(model.classify(text) == name for name, text in cases)
    assert right >= 0.98 * len(cases)  # chance: a third
    assert sum(model.classify(text[:2]) == name for name, text in cases) < 0.9 * len(cases)


def test_language_needs_two_languages() -> None:
    with pytest.raises(ValueError, match="two languages or more"):
        NgramLanguage.train({"english": ["text"]})


# Quality


def test_quality_equals_scikit_learn_logistic_regression(good, parity) -> None:
    rng, config, good = random.Random(9), QualityConfig(n_buckets=50, decay=1e-3, max_steps=100), good[:12]
    bad = [spam(rng) for _ in range(9)]
    model = QualityClassifier.train(good, bad, config)
    rows = np.zeros((len(good) + len(bad), 50))
    for row, text in zip(rows, [*good, *bad], strict=True):
        for bucket in (buckets := hashed_ngrams(text, 50)):
            row[bucket] += 1 / len(buckets)
    wanted = [1] * len(good) + [0] * len(bad)
    oracle = LogisticRegression(C=1 / (1e-3 * len(rows)), tol=1e-10, max_iter=5000).fit(rows, wanted)
    ours = torch.cat([model.weight, model.bias[None]]).numpy()
    theirs = np.append(oracle.coef_[0], oracle.intercept_)
    parity("QualityClassifier", "sklearn LogisticRegression", "trajectory", ours, theirs, 1e-2)
    scores = [model.score(text) for text in [*good, *bad]]
    parity("QualityClassifier", "sklearn LogisticRegression", "output", scores, oracle.predict_proba(rows)[:, 1], 1e-4)


def test_quality_tells_order_from_salad_and_the_threshold_keeps_what_was_asked(good) -> None:
    rng = random.Random(10)
    salad = [" ".join(rng.sample(text.split(), len(text.split()))) for text in good]
    model = QualityClassifier.train(good[:20], salad[:20])
    least = model.threshold(good[20:], kept=0.9)
    assert sum(model.score(text) >= least for text in good[20:]) == 18
    assert sum(model.score(text) >= least for text in salad[20:]) <= 2
    assert 0 < model.score("") < 1
    with pytest.raises(ValueError, match="needs texts of both kinds; got 2 and 0"):
        QualityClassifier.train(["a", "b"], [])


# Private data


@pytest.mark.parametrize("kind", PRIVATE)
def test_every_kind_of_personal_data_is_masked_whole(kind: str) -> None:
    rng = random.Random(f"{kind} 1")
    write, sentence = PRIVATE[kind]
    for _ in range(200):
        secret = write(rng)
        text, found = mask_private(sentence.format(secret))
        assert text == sentence.format(f"[{kind}]") and found == [(kind, secret)]


@pytest.mark.parametrize("name", sorted(set(DECOYS) - {"four-part version"}))
def test_look_alikes_stay(name: str) -> None:
    rng = random.Random(f"{name} 2")
    write, sentence = DECOYS[name]
    for _ in range(200):
        text = sentence.format(write(rng))
        assert mask_private(text) == (text, [])


def test_a_version_of_four_numbers_is_taken_for_an_address() -> None:
    assert mask_private("version 2.3.1.4") == ("version [ip]", [("ip", "2.3.1.4")])  # known, and in the chapter


def test_random_numbers_pass_the_checks_as_rarely_as_stated() -> None:
    rng, n = random.Random(12), 4000
    digits = lambda k: "".join(str(int(10 * rng.random())) for _ in range(k))  # noqa: E731
    luhn = sum(luhn_valid(digits(16)) for _ in range(n)) / n
    iban = sum(iban_valid(f"DE{digits(20)}") for _ in range(n)) / n
    assert abs(luhn - 1 / 10) < 5 * math.sqrt(0.09 / n)
    assert abs(iban - 1 / 97) < 5 * math.sqrt(0.0102 / n)
    assert luhn_valid("4111 1111 1111 1111") and not luhn_valid("4111 1111 1111 1112")
    assert iban_valid("GB82 WEST 1234 5698 7654 32") and not iban_valid("GB82 WEST 1234 5698 7654 23")


def test_masking_is_linear_in_hostile_text() -> None:
    for text in ("a" * 20_000 + "@", "1" * 20_000, "DE12 " * 4000, "1.2." * 5000, "a.b@" * 5000):
        assert len(mask_private(text)[0]) <= len(text)  # a pattern that backtracks would run into the test's timeout


def test_a_frame_is_found_by_the_order_of_its_words_and_in_linear_time() -> None:
    for frame in ("We use COOKIES to improve this page.", "cookie settings: accept", "a | b | c", "Skip to content"):
        assert normalise(f"{frame}\n\nThe page.\n{frame}") == "The page."
    for page in ("Accept it: we ate cookies.", "cookies, unacceptable", "a | b", "cookies " * 20_000):
        assert normalise(page) == page.rstrip()  # a pattern that backtracks would run into the test's timeout


def test_what_is_invisible_does_not_hide_damage_and_a_soft_hyphen_may_be_half_a_letter() -> None:
    assert normalise("x\u200b\u00c3\u00a9 y") == "x\u00e9 y" == normalise(normalise("x\u200b\u00c3\u00a9 y"))
    assert normalise("\u00c3\u00ad") == "\u00ed" and normalise("so\u00adft") == "soft"


def test_scores_and_thresholds_have_no_edge_to_fall_from() -> None:
    for weight, wanted in ((-1e5, 0.0), (1e5, 1.0)):
        model = QualityClassifier(torch.full((4,), weight, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
        assert model.score("a b") == wanted
    ten = [" ".join(["good"] * n + ["bad"] * (10 - n)) for n in range(10)]
    graded = QualityClassifier.train(["good good"], ["bad bad"])
    for kept, n_kept in ((1.0, 10), (0.9, 9), (0.5, 5), (0.05, 1)):
        assert sum(graded.score(text) >= graded.threshold(ten, kept) for text in ten) == n_kept
    graded.score = float
    for kept in (0.99, 0.85, 0.31):  # shares that are no whole number of texts: rather one too many
        least = graded.threshold(list(map(str, range(30))), kept)
        assert sum(number >= least for number in range(30)) == math.ceil(30 * kept)
    with pytest.raises(ValueError, match="a threshold needs trusted texts, got none"):
        model.threshold([], 0.9)


@pytest.mark.parametrize(
    ("address", "is_somebodys"),
    [("8.8.4.4", True), ("192.168.1.20", False), ("172.16.0.9", False), ("172.32.0.9", True), ("10.1.2.3", False)]
    + [("8.8.4.255", True), ("8.8.4.256", False)],
)
def test_addresses_of_private_networks_stay(address: str, is_somebodys: bool) -> None:
    assert (mask_private(f"It came from {address} again.")[0] == "It came from [ip] again.") == is_somebodys
