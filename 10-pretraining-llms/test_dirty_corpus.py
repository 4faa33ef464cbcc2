"""Topic 10: the planted crawl is what its labels say, again and again the same."""

import random
from collections import Counter

import pytest

from deduplication import plain_words
from dirty_corpus import (
    DAMAGES,
    DECOYS,
    EDIT_SHARES,
    JUNK,
    LABELS,
    LANGUAGES,
    LEAKS,
    PRIVATE,
    DirtConfig,
    Page,
    as_cp1252,
    dirty_corpus,
    edited,
    evaluation_documents,
    iban_digits,
    luhn_digit,
    paraphrased,
)
from tiny_world import World, canary_text, held_out, random_canaries

DIRT = DirtConfig(n_pages=120, n_leaks=9, canaries=tuple(zip(random_canaries(2, 3), (1, 4), strict=True)))


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    return dirty_corpus(DIRT, seed=5)


def test_every_label_and_every_kind_of_dirt_is_planted_in_the_wanted_number(pages) -> None:
    counts = Counter(page.label for page in pages)
    assert set(counts) == set(LABELS)
    wanted = {"damaged": 24, "private": 12, "exact": 18, "near": 18, "junk": 24, "salad": 12, "foreign": 18}
    wanted |= {"leaked": 9, "canary": 5, "good": 120 - 24 - 12}
    assert counts == wanted
    details = {label: {page.detail for page in pages if page.label == label} for label in counts}
    assert details["junk"] == set(JUNK) and details["damaged"] == set(DAMAGES)
    assert details["foreign"] == set(LANGUAGES) and details["leaked"] == set(LEAKS)
    assert len(details["near"]) == len(EDIT_SHARES)


def test_the_same_seed_gives_the_same_crawl_and_another_seed_another(pages) -> None:
    assert dirty_corpus(DIRT, seed=5) == pages
    assert not {page.text for page in pages if page.source == "world"} & {
        page.text for page in dirty_corpus(DIRT, seed=6) if page.source == "world"
    }


def test_copies_stand_after_their_originals_and_differ_by_the_stated_share(pages) -> None:
    first = {}
    for number, page in enumerate(pages):
        first.setdefault(page.text, number)
    for number, page in enumerate(pages):
        if page.label in ("exact", "near"):
            assert first[page.original] < number
        if page.label == "exact":
            assert page.text == page.original
        if page.label == "near":
            pairs = list(zip(page.text.split(), page.original.split(), strict=True))
            share = float(page.detail.split("%")[0]) / 100
            assert sum(a != b for a, b in pairs) == max(1, round(share * len(pairs)))


def test_leaked_documents_are_of_the_validation_side_and_in_their_pages(pages) -> None:
    documents = evaluation_documents(9)
    assert all(held_out(document.text) for document in documents)
    for page in (page for page in pages if page.label == "leaked"):
        assert LEAKS[page.detail](documents[page.leak].text) in page.text
    for page in (page for page in pages if page.label == "good"):
        assert not any(document.text in page.text for document in documents)


def test_a_paraphrase_keeps_names_and_breaks_every_run_of_words() -> None:
    for document in evaluation_documents(40):
        words, others = plain_words(document.text), plain_words(paraphrased(document.text))
        runs = {tuple(words[at : at + 13]) for at in range(len(words) - 12)}
        assert not runs & {tuple(others[at : at + 13]) for at in range(len(others) - 12)}
        people = document.facts.get("people", {document.facts.get("hero"): {}})
        assert all(name.lower() in others for person in people for name in person.split())


def test_leak_copies_are_on_different_pages() -> None:
    found = dirty_corpus(DirtConfig(n_pages=10, n_leaks=2, leak_copies=3).scaled(0), seed=0)
    leaked = [page for page in found if page.label == "leaked"]
    assert Counter(page.leak for page in leaked) == {0: 3, 1: 3} and len({page.text for page in leaked}) == 6


@pytest.mark.parametrize(("copied", "n_texts"), [(True, 2), (False, 5)])
def test_a_canary_occurs_as_often_as_asked(copied: bool, n_texts: int) -> None:
    (one, _), (four, _) = DIRT.canaries
    found = dirty_corpus(DirtConfig(n_pages=10, n_leaks=0, canaries=DIRT.canaries, copied_canaries=copied), seed=0)
    texts = [page.text for page in found if page.label == "canary"]
    assert [sum(canary_text(canary) in text for text in texts) for canary in (one, four)] == [1, 4]
    assert len(set(texts)) == n_texts


def test_check_digits_by_hand() -> None:
    assert luhn_digit("7992739871") == 3  # the example of the ISO standard and of most textbooks
    assert iban_digits("GB", "WEST12345698765432") == "82"  # the registry's example
    assert as_cp1252("\u2019".encode()) == "\u00e2\u20ac\u2122"


@pytest.mark.parametrize("kind", PRIVATE)
def test_personal_data_differs_from_draw_to_draw(kind: str) -> None:
    rng = random.Random(1)
    assert len({PRIVATE[kind][0](rng) for _ in range(20)}) > 10


def test_decoys_and_secrets_stand_in_their_pages(pages) -> None:
    private = [page for page in pages if page.label == "private"]
    assert all(text in page.text for page in private for _, text in page.secrets)
    assert all(page.decoys[0] in page.text and page.detail in DECOYS for page in private)


def test_an_edit_changes_at_least_one_word() -> None:
    text = next(World().stream(0)).text
    assert edited(text, 0.0, random.Random(0)) != text


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="n_leaks must be finite and >= 0, got -1"):
        DirtConfig(n_leaks=-1)
    with pytest.raises(ValueError, match=r"damaged_share \+ private_share must be <= 1"):
        DirtConfig(damaged_share=0.7, private_share=0.7)
