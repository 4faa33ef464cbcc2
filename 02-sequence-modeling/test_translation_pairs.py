"""Topic 02: the translation pairs obey French grammar and ISO 8601, and their splits never meet."""

import datetime
import random
import re
from pathlib import Path

import pytest

import translation_pairs
from translation_pairs import (
    ADJECTIVES,
    DATES,
    FRENCH,
    NOUNS,
    TASKS,
    Pair,
    SampleConfig,
    begins_with_vowel,
    french_determiner,
    is_held_out,
    join_tokens,
    main,
    read_pairs,
    sample_pairs,
    split_pairs,
    tokenize,
)

N_PAIRS = 2500


@pytest.fixture(scope="module")
def french() -> dict[str, list[Pair]]:
    return {split: sample_pairs(FRENCH, N_PAIRS, seed=0, split=split) for split in FRENCH.splits}


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(" ".join(pair.source), join_tokens(pair.target, "words")) for pair in pairs]


# French, by the rules of a grammar book rather than of the generator


def test_no_elision_or_contraction_is_missed(french) -> None:
    for pair in (pair for split in french.values() for pair in split):
        for word, following in zip(pair.target, pair.target[1:], strict=False):
            vowel, plural = following[0] in "aeiouhéèêî", following[-1] in "sx"
            assert not (vowel and word in ("le", "la", "ne", "de", "ce", "ma", "sa")), pair
            assert not (vowel and not plural and word in ("vieux", "nouveau", "beau")), pair
            assert not (word == "de" and following in ("le", "les")), pair
            assert vowel or not word.endswith("'"), pair


@pytest.mark.parametrize(
    ("pattern", "negated"), [(r"^(\w+ )*(do|does|did) not ", True), (r"^(?!.*\b(do|does|did) not\b)", False)]
)
def test_negation_surrounds_the_verb(french, pattern: str, negated: bool) -> None:
    for source, target in texts(french["train"]):
        if re.search(pattern, source):
            assert bool(re.search(r"\bn(e |')", target)) == bool(re.search(r"\bpas\b", target)) == negated, (
                source,
                target,
            )


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (r"\b(an?|any|some)\b.*\bnot\b", r"."),
        (r"\bnot \w+( for| to)? (a|an|any) ", r"\bpas (\w+ )?d(e |')"),
        (r"(see|love|take|find|watch|draw|want|for|to) them$", r"\bles (\w+)"),
        (r"^they ", r"^ils "),
        (r"\bthese\b", r"\bces\b"),
        (r"\btwo\b", r"\bdeux\b"),
        (r"\bnear the \w*s\b", r"\bprès des\b|\bprès de la\b"),
        (r"\b(saw|did not see) her$", r"\bvue$"),
        (r"\b(saw|did not see) them$", r"\bvus$"),
        (r"\btook them$", r"\bpris$"),
        (r"\bold (\w+ )?man\b", r"\bvieil homme\b"),
        (r"\bbeautiful (\w+ )?tree\b", r"\bbel arbre\b"),
        (r"\bnew (\w+ )?bird\b", r"\bnouvel oiseau\b"),
        (r"\bold (\w+ )?men\b", r"\bvieux hommes\b"),
        (r"\bmy apple\b", r"\bmon? pomme\b|\bma pomme\b"),
        (r"\bmy star\b", r"\bmon étoile\b"),
        (r"\bthis tree\b", r"\bcet arbre\b"),
        (r"\bthis island\b", r"\bcette île\b"),
        (r"\bsome small \w+", r"\bde petite?s\b"),
    ],
)
def test_constructions_that_learners_get_wrong(french, source: str, targets: str) -> None:
    pairs = [pair for pair in texts(french["train"] + french["longer"]) if re.search(source, pair[0])]
    assert pairs, f"no sentence matches {source}"
    for english, translation in pairs:
        assert re.search(targets, translation), (english, translation)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("the", "m", False, False, "chat", False), "le"),
        (("the", "f", False, False, "école", False), "l'"),
        (("the", "f", True, False, "écoles", False), "les"),
        (("a", "f", False, False, "petite", True), "une"),
        (("some", "m", True, False, "chats", False), "des"),
        (("some", "m", True, False, "petits", True), "de"),
        (("any", "m", True, True, "amis", False), "d'"),
        (("a", "m", False, True, "chat", False), "de"),
        (("my", "f", False, False, "amie", False), "mon"),
        (("her", "m", True, False, "chats", False), "ses"),
        (("this", "m", False, False, "homme", False), "cet"),
        (("these", "f", True, False, "îles", False), "ces"),
        (("one", "f", False, True, "pomme", False), "une"),
        (("three", "m", True, True, "chats", False), "trois"),
    ],
)
def test_determiners_by_hand(arguments: tuple, expected: str) -> None:
    assert french_determiner(*arguments) == expected


def test_agreement_of_every_noun_phrase(french) -> None:
    """Adjectives carry the gender and number of the noun that the alignment puts them beside."""
    singular, plural = {name: noun for name, noun in NOUNS.items()}, {noun.plural: noun for noun in NOUNS.values()}
    checked = 0
    for pair in french["train"]:
        for position, word in enumerate(pair.source[:-1]):
            following = pair.source[position + 1]
            if word not in ADJECTIVES or not (following in singular or following in plural):
                continue
            noun = singular.get(following) or plural[following]
            form = 2 * (following in plural) + (noun.gender == "f")
            target = pair.target[pair.alignment.index((position,))]
            assert target in (ADJECTIVES[word].forms[form], ADJECTIVES[word].before_vowel), pair
            checked += 1
    assert checked > 1000


def test_one_english_sentence_has_one_translation(monkeypatch) -> None:
    """With few words, and without `sample_pairs`, which keeps one pair of each source, sentences come again."""
    for name, kept in {"NOUNS": ("tree", "apple"), "ADJECTIVES": ("old", "black"), "VERBS": ("sees",)}.items():
        monkeypatch.setattr(translation_pairs, name, {word: getattr(translation_pairs, name)[word] for word in kept})
    rng, seen, n_draws = random.Random(5), {}, 5000
    for _ in range(n_draws):
        pair = FRENCH.draw(rng, "train")
        assert seen.setdefault(pair.source, pair.target) == pair.target
    assert len(seen) < n_draws - 100


def test_begins_with_vowel_counts_a_mute_h() -> None:
    assert begins_with_vowel("homme") and begins_with_vowel("école") and not begins_with_vowel("chat")


# Dates


def test_dates_are_read_back_by_the_standard_library() -> None:
    for split in DATES.splits:
        for pair in sample_pairs(DATES, 1000, seed=1, split=split):
            text, date = "".join(pair.source).lower(), datetime.date.fromisoformat("".join(pair.target))
            numbers = [int(number) for number in re.findall(r"\d+", text)]
            assert date.day in numbers and (date.year in numbers or date.year % 100 in numbers), text
            months = re.findall(r"[a-z]{3,}", re.sub(r"\b(mon|tue|wed|thu|fri|sat|sun)[a-z]*", "", text))
            named = [name for name in months if date.strftime("%B").lower().startswith(name)]
            assert named or numbers[1] == date.month, text
            weekday = re.search(r"\b(mon|tue|wed|thu|fri|sat|sun)", text)
            assert not weekday or weekday[0] == date.strftime("%a").lower(), text
            assert (1900 if split == "new-years" else 1950) <= date.year <= (1949 if split == "new-years" else 2049)


# Both tasks


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_splits_are_disjoint_for_any_seed(task) -> None:
    train = {pair.source for seed in range(3) for pair in sample_pairs(task, 1500, seed)}
    for split in task.splits:
        if split != "train":
            assert not train & {pair.source for pair in sample_pairs(task, 700, seed=9, split=split)}


def test_new_pairs_and_longer_hold_out_what_they_say(french) -> None:
    def combinations(pair: Pair) -> set[tuple[str, str]]:
        nouns = set(NOUNS) | {noun.plural for noun in NOUNS.values()}
        starts = [i for i, word in enumerate(pair.source) if word in ADJECTIVES]
        ends = [next((w for w in pair.source[i + 1 : i + 3] if w in nouns), "") for i in starts]
        return {(pair.source[i], noun) for i, noun in zip(starts, ends, strict=True)}

    trained = set().union(*(combinations(pair) for pair in french["train"]))
    assert all(combinations(pair) - trained for pair in french["new-pairs"])
    prepositions = {"in", "under", "behind", "near", "opposite"}
    counts = {split: {sum(word in prepositions for word in pair.source) for pair in french[split]} for split in french}
    assert counts["train"] == counts["test"] == {0, 1} and counts["longer"] == {2}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_tokens_and_alignment_are_consistent(task) -> None:
    for pair in sample_pairs(task, 500, seed=2):
        assert tokenize(join_tokens(pair.source, task.unit), task.unit) == pair.source
        assert tokenize(join_tokens(pair.target, task.unit), task.unit) == pair.target
        assert len(pair.alignment) == len(pair.target)
        assert all(0 <= position < len(pair.source) for positions in pair.alignment for position in positions)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_same_seed_same_pairs_and_another_seed_others(task) -> None:
    first, again, other = (sample_pairs(task, 50, seed) for seed in (3, 3, 4))
    assert first == again != other
    random.seed(0)
    assert sample_pairs(task, 50, 3) == first, "the global generator has no say"


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev' of task 'french'; use one of"):
        sample_pairs(FRENCH, 1, 0, "dev")
    with pytest.raises(ValueError, match="seed must be finite and >= 0"):
        SampleConfig(seed=-1)


def test_command_line_prints_a_file_that_reads_back(tmp_path: Path, capsys) -> None:
    main(["sample", "--task", "dates", "--n-pairs", "30"])
    path = tmp_path / "dates.tsv"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    expected = [(pair.source, pair.target) for pair in sample_pairs(DATES, 30, seed=0)]
    assert [(pair.source, pair.target) for pair in read_pairs(path, "characters")] == expected
    main([])
    assert "new-format" in capsys.readouterr().out


def test_a_file_of_pairs_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffHello .\tBonjour .\r\n\r\nOne\tUn\r\n".encode())
    found = [(pair.source, pair.target) for pair in read_pairs(path)]
    assert found == [(("hello", "."), ("bonjour", ".")), (("one",), ("un",))]


def test_own_pairs_are_split_by_content() -> None:
    pairs = [Pair((str(number),), ("x",)) for number in range(1000)]
    splits = split_pairs(pairs)
    assert 50 < len(splits["test"]) < 150 and len(splits["train"]) + len(splits["test"]) == 1000
    assert all(is_held_out(pair.source[0]) for pair in splits["test"])
