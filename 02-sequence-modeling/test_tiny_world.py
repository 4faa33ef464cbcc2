"""Topic 02: every probability that TinyWorld states, against complete enumeration, statistics and the texts."""

import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from scipy import stats

import tiny_world as topic
from tiny_world import (
    BOT,
    EOS,
    INSTRUCT,
    INSTRUCTION_SPLITS,
    MIXTURE,
    REQUESTS,
    USER,
    Chooser,
    Document,
    Phrases,
    World,
    enumerate_texts,
    held_out,
    join,
    leaks,
    random_canaries,
    ratio_of_means,
    statistics,
    tell_story,
    words,
)

SMALL = {"seed": 3, "max_words": 2, "n_people": 4, "max_events": 1, "max_sum": 5, "bias": 0.7}
ENUMERABLE = ("story", "bio", "quiz", "scene", "talk", "count", "sort", "roles")


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def small() -> World:
    """A world with two words of each class: most kinds can be written out completely."""
    mixture = {"talk": 3, "scene": 1, "count": 0.5, "roles": 2}
    canaries = ("The code is 4 .", "The code is 5 2 .", "The code is 4 .")
    return World(mixture=mixture, canaries=canaries, canary_rate=0.1, **SMALL)


@pytest.fixture(scope="module")
def language(small: World) -> Callable[[str | None], dict[str, float]]:
    """Every text of a kind (None: of the whole world) with its probability, written out once."""
    return cache(small.enumerate)


def nats(probability: float) -> float:
    return -math.log(probability)


# Parity: surprisal, next token and posterior against the language written out completely


@pytest.mark.parametrize("kind", [None, *ENUMERABLE])
def test_enumeration_sums_to_one_and_agrees_with_surprisal(parity, small: World, language, kind: str | None) -> None:
    table = language(kind)
    assert len(table) > 100
    name = f"TinyWorld {kind or 'mixture'}"
    parity(name, "sum of all probabilities is 1", "invariant", math.fsum(table.values()), 1.0, 1e-9)
    some = random.Random(0).sample(sorted(table), min(len(table), 2500))
    booked = [sum(small.surprisal([*words(text), EOS], kind)) for text in some]
    parity(name, "complete enumeration", "output", booked, [nats(table[text]) for text in some], 1e-11)


@pytest.mark.parametrize("kind", [None, *ENUMERABLE])
def test_samples_book_the_enumerated_probability(parity, small: World, language, kind: str | None) -> None:
    documents, table = small.documents(300, seed=1, kind=kind), language(kind)
    booked = [sum(document.surprisal) for document in documents]
    expected = [nats(table[document.text]) for document in documents]
    parity(f"TinyWorld {kind or 'mixture'}", "complete enumeration, sampled", "output", booked, expected, 1e-11)


def test_kinds_and_canaries_have_the_stated_shares(language) -> None:
    table = language(None)
    assert table["Note: The code is 4."] == pytest.approx(0.1 * 2 / 3)
    assert table["Note: The code is 5 2."] == pytest.approx(0.1 * 1 / 3)
    assert math.fsum(chance for text, chance in table.items() if text[0] == '"') == pytest.approx(0.9 * 3 / 6.5)


def test_every_token_is_booked_as_reading_finds_it(parity, world: World) -> None:
    for kind in (None, *world.kinds):
        documents = world.documents(150, seed=5, kind=kind)
        read = [world.surprisal(document.tokens, kind) for document in documents]
        booked = [document.surprisal for document in documents]
        parity("TinyWorld sampler", "reader, token by token", "output", booked, read, 1e-12)


@pytest.mark.parametrize("kind", [None, "scene", "bio", "roles"])
def test_next_token_is_the_conditional_of_the_language(parity, small: World, language, kind: str | None) -> None:
    texts = [((*words(text), EOS), chance) for text, chance in language(kind).items()]
    rng, ours, theirs = random.Random(0), [], []
    for _ in range(12):
        tokens, _ = rng.choice(texts)
        prefix = tokens[: rng.randrange(len(tokens))]
        after: dict[str, float] = defaultdict(float)
        for other, chance in texts:
            if other[: len(prefix)] == prefix:
                after[other[len(prefix)]] += chance
        ours.append(small.next_token(prefix, kind))
        theirs.append({token: chance / math.fsum(after.values()) for token, chance in after.items()})
    parity("TinyWorld next_token", "conditional of the enumerated language", "output", ours, theirs, 1e-9)


def test_fill_in_is_the_posterior_of_the_language(parity, small: World, language) -> None:
    texts = {(*words(text), EOS): chance for text, chance in language("roles").items()}
    rng, ours, theirs = random.Random(1), [], []
    for _ in range(20):
        tokens = list(rng.choice([*texts]))
        position = rng.randrange(len(tokens))
        before, after = tuple(tokens[:position]), tuple(tokens[position + 1 :])
        fits = {
            text[position]: chance
            for text, chance in texts.items()
            if text[:position] == before and text[position + 1 :] == after
        }
        tokens[position] = "<mask>"
        ours.append(small.fill_in(tokens, position, "roles"))
        theirs.append({token: chance / sum(fits.values()) for token, chance in fits.items()})
    parity("TinyWorld fill_in", "posterior of the enumerated language", "output", ours, theirs, 1e-12)
    assert any(0.2 < chance < 0.8 for posterior in ours for chance in posterior.values())


def test_instructed_stories_sum_to_one(parity) -> None:
    tiny = World(**{**SMALL, "max_events": 1})
    given = {"colour": "red", "thing": "ball", "place": "kitchen"}

    def write(draw: Chooser) -> None:
        draw.say("One")
        tell_story(tiny, draw, EOS, **given)

    table = enumerate_texts(write, 100_000)
    parity("TinyWorld instruction", "sum of all answers is 1", "invariant", math.fsum(table.values()), 1.0, 1e-9)
    items = [
        item
        for item in tiny.instructions(400, seed=0, category="story")
        if "red ball in the kitchen" in join(item.prompt)
    ]
    assert len(items) > 10
    booked = [sum(item.surprisal) for item in items]
    expected = [nats(table[join(item.answer[:-1])]) for item in items]
    parity("TinyWorld instruction", "complete enumeration", "output", booked, expected, 1e-11)


# Invariants


def test_next_token_sums_to_one_and_agrees_with_surprisal_at_every_position(world: World) -> None:
    for document in (document for kind in world.kinds for document in world.documents(3, seed=8, kind=kind)):
        surprisal = world.surprisal(document.tokens)
        for position, token in enumerate(document.tokens):
            allowed = world.next_token(document.tokens[:position])
            assert math.fsum(allowed.values()) == pytest.approx(1, abs=1e-12)
            assert nats(allowed[token]) == pytest.approx(surprisal[position], abs=1e-12)
        assert world.next_token(document.tokens) == {}


def test_words_and_join_are_inverse(world: World) -> None:
    for document in (document for kind in world.kinds for document in world.documents(200, seed=11, kind=kind)):
        assert words(join(document.tokens)) == document.tokens
        assert [*words(document.text), EOS] == document.tokens
        assert join(words(document.text)) == document.text
        assert not re.search(r" [.,?:]|\" \S+ \"", document.text)


FINGERPRINT = """
import hashlib
from tiny_world import World
world = World(seed=7, bias=0.6)
digest = hashlib.sha256()
for item in world.documents(300, seed=1) + world.documents(100, seed=1, split="validation"):
    digest.update(repr((item.kind, item.tokens, item.surprisal, item.facts, item.answers)).encode())
for item in world.instructions(100, seed=1):
    digest.update(repr(item.tokens).encode())
digest.update(repr((world.vocabulary(), world.facts, world.next_token(["News", ":"]))).encode())
print(digest.hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process(capsys) -> None:
    folder = Path(topic.__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent / "01-prerequisites")])
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # this process has another one, or a random one
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    other = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True, check=True
    ).stdout
    exec(FINGERPRINT, {})
    assert len(other) == 65 and capsys.readouterr().out == other


def test_different_seeds_give_different_worlds_and_documents(world: World) -> None:
    assert World(seed=1).facts != world.facts and World(seed=1).held_out_sums != world.held_out_sums
    assert world.documents(5, seed=1) != world.documents(5, seed=2)
    assert world.documents(5, seed=1) == World(seed=0).documents(9, seed=1)[:5]


def test_sides_of_the_split_share_no_text_whatever_the_seeds(world: World) -> None:
    for kind in (None, *world.kinds):
        train = {document.text for document in world.documents(400, seed=1, split="train", kind=kind)}
        validation = {document.text for document in world.documents(40, seed=2, split="validation", kind=kind)}
        assert not train & validation and not any(map(held_out, train)) and all(map(held_out, validation))
    texts = {document.text for document in world.documents(8000, seed=3)}
    assert abs(sum(map(held_out, texts)) - 0.1 * len(texts)) < 4 * math.sqrt(0.09 * len(texts))


def test_the_vocabulary_starts_with_the_special_tokens_and_holds_every_token(world: World) -> None:
    vocabulary = world.vocabulary()
    assert vocabulary[:8] == ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<user>", "<bot>", "<sys>"]
    assert vocabulary[8:] == sorted(set(vocabulary[8:])) and len(set(vocabulary)) == len(vocabulary) < 500
    assert World(seed=1, bias=0.9).vocabulary() == vocabulary
    used = {token for kind in world.kinds for item in world.documents(400, seed=4, kind=kind) for token in item.tokens}
    for split in INSTRUCTION_SPLITS:
        used.update(token for item in world.instructions(800, seed=4, split=split) for token in item.tokens)
    used.update(token for prompt, answer in world.questions("unseen", 300, seed=4) for token in prompt + answer)
    assert used <= set(vocabulary)
    assert set(vocabulary) - used <= {"<pad>", "<bos>", "<unk>", "<mask>", "<sys>"}, "a word that nothing uses"
    assert {"vault", "Sorry", "cannot"} <= set(vocabulary)
    tiny = World(canaries=("Abracadabra 99 .",), canary_rate=0.5, **SMALL)
    spoken = {
        token for kind in (None, *tiny.kinds) for item in tiny.documents(300, 1, kind=kind) for token in item.tokens
    }
    assert {"Abracadabra", "99"} <= spoken <= set(tiny.vocabulary()) and len(tiny.vocabulary()) < 200


# What documents say is true


def replayed_places(text: str) -> dict[str, str]:
    """Where everything is at the end of a story, found by reading its sentences one after the other."""
    places = {}
    for sentence in text.partition(" Question:")[0].split(". "):
        if match := re.search(r"(?:found|hid) a \w+ (\w+) in the (\w+)|took the (\w+) to the (\w+)", sentence):
            places[match[1] or match[3]] = match[2] or match[4]
    return places


def test_story_answers_follow_from_the_story(world: World) -> None:
    n_moved = 0
    for document in world.documents(500, seed=1, kind="story"):
        places = replayed_places(document.text)
        assert places == {thing: state["place"] for thing, state in document.facts["things"].items()}
        for thing, place in re.findall(r"where is the (\w+)\? Answer: in the (\w+)\.", document.text):
            assert places[thing] == place
            n_moved += f"took the {thing}" in document.text
        for thing, colour in re.findall(r"what colour is the (\w+)\? Answer: (\w+)\.", document.text):
            assert f"a {colour} {thing} in" in document.text
        for thing, owner in re.findall(r"who first had the (\w+)\? Answer: (\w+)\.", document.text):
            assert re.search(rf"{owner} (found|hid) a \w+ {thing}", document.text)
        assert document.answers and all(document.tokens[end] == "." for _, end in document.answers)
    assert n_moved > 100


def test_scenes_can_be_drawn_and_their_questions_answered(world: World) -> None:
    n_relations = 0
    for document in world.documents(500, seed=1, kind="scene"):
        scene = document.scene
        cells = {item.shape: (item.row, item.column) for item in scene.objects}
        assert len(set(cells.values())) == len(scene.objects) in (2, 3)
        for first, relation, second in scene.relations:
            here, there = scene.objects[first], scene.objects[second]
            assert lies(relation, (here.row, here.column), (there.row, there.column))
        assert all(f"{item.colour} {item.shape}" in document.text for item in scene.objects)
        for relation, shape, answer in re.findall(r"what is ([\w ]+) the (\w+)\? Answer: the (\w+)\.", document.text):
            assert lies(relation, cells[answer], cells[shape])
            n_relations += 1
        for shape, answer in re.findall(r"what colour is the (\w+)\? Answer: (\w+)\.", document.text):
            assert f"{answer} {shape}" in document.text.partition("Question")[0]
    assert n_relations > 100
    assert world.document(random.Random(0), "talk").scene is None


def lies(relation: str, cell: tuple[int, int], other: tuple[int, int]) -> bool:
    rows, columns = other[0] - cell[0], other[1] - cell[1]
    expected = {"above": (rows > 0, columns == 0), "below": (rows < 0, columns == 0)}
    expected |= {"left of": (columns > 0, rows == 0), "right of": (columns < 0, rows == 0)}
    return all(expected[relation])


def test_people_are_told_asked_and_held_out_as_promised(world: World) -> None:
    assert len(world.asked) == 48 and len(world.unasked) == 16 and len(world.unseen) == 102
    strangers = {f"{name} {surname}" for name, group in world.surnames_of.items() for surname in group}
    groups = [set(world.asked), set(world.unasked), set(world.unseen), strangers]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 512
    named: dict[str, set[str]] = defaultdict(set)
    everyone = re.compile("|".join(set.union(*groups)))
    for kind in world.kinds:
        for document in world.documents(4000 if kind == "news" else 700, seed=2, kind=kind):
            named[kind].update(everyone.findall(document.text))
    assert named["bio"] == set(world.known) and named["quiz"] == set(world.asked) and named["news"] == strangers
    assert not set.union(*named.values()) & set(world.unseen)


def test_biographies_keep_to_the_facts_and_news_does_not(world: World) -> None:
    for document in world.documents(300, seed=3, kind="bio"):
        assert document.facts["people"] == {person: world.facts[person] for person in document.facts["people"]}
        assert all(value in document.tokens for facts in document.facts["people"].values() for value in facts.values())
    towns = defaultdict(set)
    for document in world.documents(3000, seed=3, kind="news"):
        for person, facts in document.facts["people"].items():
            towns[person].add(facts.get("town"))
        asked = re.findall(r"where does (\w+ \w+) live\? Answer: (\w+)\.", document.text)
        assert all(document.facts["people"][person]["town"] == town for person, town in asked)
    assert max(map(len, towns.values())) > 4


def test_arithmetic_is_right_and_held_out_sums_are_impossible(world: World) -> None:
    seen = set()
    for kind in ("sums", "count"):
        for document in world.documents(1500, seed=4, kind=kind):
            seen.update(document.facts["sums"])
            for first, second, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", document.text):
                assert int(first) + int(second) == int(total)
            for first, second, total in re.findall(r"had (\d+) .* bought (\d+) .* has (\d+) ", document.text):
                assert int(first) + int(second) == int(total)
    assert len(seen) > 380 and not seen & set(world.held_out_sums) and len(world.held_out_sums) == 44
    first, second = world.held_out_sums[0]
    with pytest.raises(ValueError, match=f"impossible token '{second}' at position 4"):
        world.surprisal(["Sum", ":", str(first), "+", str(second)])


def test_lists_are_sorted_and_agreement_holds(world: World) -> None:
    for document in world.documents(300, seed=5, kind="sort"):
        given, ordered = document.text.removesuffix(".").split(": ")[1:]
        assert sorted(map(int, given.split())) == [*map(int, ordered.split())]
    n_attracted = 0
    for document in world.documents(1000, seed=5, kind="roles"):
        facts = document.facts
        plural = facts["subject"].endswith("s")
        assert facts["verb"].endswith("s") != plural and (facts["pronoun"] == "they") == plural
        assert (" were " in document.text) <= plural and (" was " in document.text) <= (not plural)
        near = re.search(r"near the (\w+)", document.text)
        n_attracted += bool(near) and near[1].endswith("s") != plural
    assert n_attracted > 100


# Distributions


def test_sampled_frequencies_fit_the_probabilities() -> None:
    """Chi-square of job and pronoun over 20,000 documents, at p < 0.001.

    Power against P(he | job) = 0.74 in place of 0.7: above 0.99 by the noncentral distribution, and it does reject it.
    """
    n = 20_000

    def cells(bias: float) -> dict[tuple, float]:
        found: dict[tuple, float] = defaultdict(float)
        for text, chance in World(**{**SMALL, "bias": bias}).enumerate("roles").items():
            tokens = words(text)
            found[tokens[1], tokens[tokens.index("because") + 1]] += chance
        return found

    def p_value(bias: float) -> float:
        documents = World(**{**SMALL, "bias": bias}).documents(n, seed=2, kind="roles")
        counts = Counter((document.facts["subject"], document.facts["pronoun"]) for document in documents)
        assert set(counts) == set(expected)
        distance = sum((counts[cell] - n * chance) ** 2 / (n * chance) for cell, chance in expected.items())
        return stats.chi2.sf(distance, len(expected) - 1)

    expected, shifted = cells(0.7), cells(0.74)
    shift = n * sum((shifted[cell] - chance) ** 2 / chance for cell, chance in expected.items())
    degrees = len(expected) - 1
    assert stats.ncx2.sf(stats.chi2.isf(0.001, degrees), degrees, shift) > 0.99
    assert p_value(0.7) > 0.001 > p_value(0.74)


@pytest.mark.parametrize("kind", [None, "talk", "scene"])
def test_whole_texts_are_as_frequent_as_stated(small: World, language, kind: str | None) -> None:
    """Chi-square over all texts, the rare ones (expected below 10) in one cell; 10,000 samples, p > 0.001."""
    n, table = 10_000, language(kind)
    counts = Counter(document.text for document in small.documents(n, seed=9, kind=kind))
    assert set(counts) <= set(table)
    often = [text for text, chance in table.items() if n * chance >= 10]
    expected = [n * table[text] for text in often]
    observed = [counts[text] for text in often]
    rest = n - math.fsum(expected)
    if rest > 1:
        expected, observed = [*expected, rest], [*observed, n - sum(observed)]
    distance = sum((seen - wanted) ** 2 / wanted for seen, wanted in zip(observed, expected, strict=True))
    assert stats.chi2.sf(distance, len(expected) - 1) > 0.001


def test_entropy_and_its_standard_error_are_right(small: World, language) -> None:
    for kind in ("scene", "roles", None):
        table = language(kind)
        exact = math.fsum(chance * nats(chance) for chance in table.values())
        exact /= math.fsum(chance * (len(words(text)) + 1) for text, chance in table.items())
        estimates = [small.entropy(150, seed=seed, kind=kind) for seed in range(60)]
        means, errors = [mean for mean, _ in estimates], [error for _, error in estimates]
        spread, error = math.sqrt(sum((mean - exact) ** 2 for mean in means) / 60), sum(errors) / 60
        assert abs(sum(means) / 60 - exact) < 4 * error / math.sqrt(60)
        assert 0.7 < spread / error < 1.4  # 60 draws know a spread within about 9 %


def test_the_floor_under_the_split_is_as_the_docstring_says(small: World, language) -> None:
    """A kind of 192 texts: who knows the training side gains -log P(side) there, and loses on validation."""
    table = language("talk")
    known = math.fsum(chance for text, chance in table.items() if not held_out(text))
    counts = Counter(document.text for document in small.documents(10_000, seed=1, split="train", kind="talk"))
    n, size = sum(counts.values()), len(table)

    def loss(document) -> float:  # a model that counts whole texts, with a little mass for those it never saw
        return nats((counts[document.text] + 0.01) / (n + 0.01 * size))

    gaps = {
        split: sum(loss(document) - sum(document.surprisal) for document in small.documents(2000, 2, split, "talk"))
        / 2000
        for split in ("train", "validation")
    }
    assert gaps["train"] == pytest.approx(math.log(known), abs=0.02)
    assert math.log(known) == pytest.approx(math.log(0.9), abs=0.06) and gaps["validation"] > 3


# Hand-worked examples


def test_the_surprisal_of_a_sum_by_hand(world: World) -> None:
    tokens = ["Sum", ":", "2", "+", "3", "=", "5", ".", EOS]
    share = MIXTURE["sums"] / sum(MIXTURE.values())
    n_seconds = 21 - sum(first == 2 for first, _ in world.held_out_sums)
    expected = [nats(share), 0, math.log(21), 0, math.log(n_seconds), 0, 0, 0, math.log(2)]
    assert world.surprisal(tokens) == pytest.approx(expected)
    assert world.surprisal(tokens, "sums") == pytest.approx([0, *expected[1:]])
    assert world.next_token(tokens[:6]) == {"5": 1.0}
    assert world.next_token(tokens[:8], "sums") == {"Sum": 0.5, EOS: 0.5}


def test_phrases_share_their_surprisal_among_their_tokens() -> None:
    table = Phrases(("a b", "a c d", "e"), (2, 1, 1))
    assert table.booked == [
        [(0, pytest.approx(nats(3 / 4))), (1, pytest.approx(nats(2 / 3)))],
        [(0, pytest.approx(nats(3 / 4))), (1, pytest.approx(nats(1 / 3)))],
        [(0, pytest.approx(nats(1 / 4)))],
    ]
    assert [sum(value for _, value in booked) for booked in table.booked] == pytest.approx(
        [*map(nats, (0.5, 0.25, 0.25))]
    )


def test_the_ratio_of_means_by_hand() -> None:
    ratio, error = ratio_of_means([(1.0, 2.0), (4.0, 4.0), (4.0, 3.0)])
    assert ratio == 1.0  # residuals -1, 0, 1 over a mean length of 3
    assert error == pytest.approx(math.sqrt(2 / (3 * 2)) / 3)


# Bias, canaries, leaks


def test_the_bias_is_what_the_config_says() -> None:
    biased = World(bias=0.9)
    he = defaultdict(list)
    for document in biased.documents(6000, seed=1, kind="roles"):
        if document.facts["number"] == "one":
            he[document.facts["subject"]].append(document.facts["pronoun"] == "he")
    for job, p_he in biased.p_he.items():
        assert p_he in (0.9, pytest.approx(0.1))
        assert abs(sum(he[job]) / len(he[job]) - p_he) < 4 * math.sqrt(0.09 / len(he[job]))
        assert biased.next_token(["The", job, "sings", "because"]) == pytest.approx({"he": p_he, "she": 1 - p_he})
    certain = World(bias=1.0)
    assert certain.next_token(["The", "baker", "sings", "because"]) == {"she": 1.0}


def test_canaries_come_at_their_rate_and_only_in_training() -> None:
    canaries = random_canaries(3, seed=5)
    n, world = 10_000, World(canaries=(*canaries, canaries[0]), canary_rate=0.04)
    counts = Counter(
        document.facts["canary"] for document in world.documents(n, seed=1, split="train") if document.kind == "canary"
    )
    assert set(counts) == set(canaries) and 0.4 < counts[canaries[0]] / sum(counts.values()) < 0.6
    share = 0.04 / (0.04 + 0.96 * 0.9)  # the split keeps every canary and nine tenths of the rest
    assert abs(sum(counts.values()) - n * share) < 4 * math.sqrt(n * share)
    assert sum(world.surprisal(["Note", ":", *canaries[0].split(), EOS])) == pytest.approx(nats(0.04 * 2 / 4))
    with pytest.raises(ValueError, match="no 'canary' document on the validation side"):
        world.documents(1, seed=0, split="validation", kind="canary")


def test_leaks_are_found_and_nothing_else(world: World) -> None:
    for seed in (0, 1, 2):
        train = world.documents(1500, seed=2 * seed, split="train")
        validation = world.documents(150, seed=2 * seed + 1, split="validation")
        assert leaks(train, validation) == []
        copied = leaks([*train, *validation[40:45]], validation)
        assert [(leak.index, leak.reason) for leak in copied] == [(index, "exact copy") for index in range(40, 45)]
        rich = [index for index, document in enumerate(validation) if sum(document.surprisal) > 38][:5]
        part = [
            Document(item.kind, item.tokens[:-8], item.surprisal[:-8]) for item in map(validation.__getitem__, rich)
        ]
        found = leaks([*train, *part], validation)
        assert [(leak.index, leak.reason) for leak in found] == [(index, "shared passage") for index in rich]


# Instructions and questions


@pytest.mark.parametrize("category", INSTRUCT)
def test_instructions_have_exact_checkers(world: World, category: str) -> None:
    for split in INSTRUCTION_SPLITS:
        items = world.instructions(40, seed=1, split=split, category=category)
        for item, other in zip(items, world.instructions(40, seed=2, split=split, category=category), strict=True):
            assert item.tokens == [USER, *item.prompt, BOT, *item.answer] and item.answer[-1] == EOS
            assert item.check(item.answer) and item.check(item.answer[:-1])
            assert len(item.surprisal) == len(item.answer) and (sum(item.surprisal) > 1) == (category == "story")
            assert not item.check([]) and not item.check([EOS]) and not item.check(item.answer[:-2])
            assert not item.check([*item.answer[:-2], "ball", ".", EOS]) and not item.check([*item.answer, EOS])
            assert item.check(other.answer) == (item.answer == other.answer) or category == "story"


def test_an_instructed_story_must_be_about_what_was_asked(world: World) -> None:
    item = world.instructions(1, seed=3, category="story")[0]
    assert item.check("One day Anna found a {colour} {thing} in the {place} .".format(**item.accepts.args[1]).split())
    assert not item.check("One day Anna found a golden ball in the kitchen .".split())
    assert not item.check([*item.answer[:-1], "Then", "Anna", "slept", ".", EOS])


def test_instruction_splits_share_neither_content_nor_phrasing(world: World) -> None:
    def answers(split: str, category: str) -> set[tuple[str, ...]]:
        items = world.instructions(300, seed=6, split=split, category=category)
        return {tuple(item.prompt if category in ("read", "story", "sort") else item.answer) for item in items}

    for category in ("fact", "read", "sum", "story", "sort", "safe"):
        assert not answers("train", category) & answers("content", category)
    train = [item for item in world.instructions(2000, seed=6)]
    prompts = {join(item.prompt) for item in train if item.category == "refuse"}
    new = {join(item.prompt) for item in world.instructions(100, 6, "content", "refuse")}
    assert not prompts & new and all("vault" in prompt for prompt in prompts | new)
    known = {token for item in train for token in item.prompt}
    for phrasings in REQUESTS.values():
        assert set(phrasings[-1].replace("{}", "").split()) <= known
    held = {join(item.prompt) for item in world.instructions(300, 6, "phrasing")}
    assert not held & {join(item.prompt) for item in train}


def test_facts_of_instructions_come_from_the_fact_table(world: World) -> None:
    for item in world.instructions(100, seed=1, split="content", category="fact"):
        person, value = " ".join(item.answer[:2]), item.answer[-3]
        assert person in world.known[32:] and value in world.facts[person].values()


@pytest.mark.parametrize("subject", ["story", "news", "bio", "quiz", "scene", "talk", "sums", "count", "sort"])
def test_answers_are_determined_by_what_stands_above_them(world: World, subject: str) -> None:
    for prompt, answer in world.questions(subject, 60, seed=2):
        assert answer[-1] == "." and sum(world.surprisal([*prompt, *answer])[len(prompt) :]) == 0


def test_questions_outside_the_language_are_the_promised_ones(world: World) -> None:
    for prompt, answer in world.questions("asked", 60, seed=1):
        assert sum(world.surprisal([*prompt, *answer])[len(prompt) :]) == 0
    for name, group in (("unasked", world.unasked), ("unseen", world.unseen)):
        for prompt, answer in world.questions(name, 60, seed=1):
            assert any(person in join(prompt) for person in group)
            assert name == "unasked" or answer[0] in prompt
            with pytest.raises(ValueError, match="impossible token"):
                world.surprisal([*prompt, *answer])
    for prompt, answer in world.questions("new sums", 60, seed=1):
        assert (int(prompt[2]), int(prompt[4])) in world.held_out_sums
        assert int(answer[0]) == int(prompt[2]) + int(prompt[4])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": 1.5}, "bias must be finite and >= 0 and <= 1, got 1.5"),
        ({"n_people": 300}, "n_people must be finite and >= 2 and <= 256, got 300"),
        ({"max_sum": 4}, "max_sum must be finite and >= 5"),
        ({"max_words": 1}, "max_words must be finite and >= 2"),
        ({"asked_share": 0}, "asked_share must be finite and > 0"),
        ({"mixture": {"storys": 1}}, "unknown kind 'storys' in mixture; kinds are story, news"),
        ({"mixture": {"story": -1}}, r"mixture\['story'\] must be finite and >= 0, got -1"),
        ({"mixture": {"story": 0}}, "at least one kind a weight > 0"),
        ({"mixture": {"story": 1e308, "news": 1e308}}, "all together a finite one"),
        ({"canaries": ("a b .",)}, "canaries and canary_rate > 0 go together"),
        ({"canary_rate": 0.1}, "canaries and canary_rate > 0 go together"),
        ({"canaries": ("a <eos> b",), "canary_rate": 0.1}, "without special tokens"),
        ({"canaries": ("code 7",), "canary_rate": 0.1}, "'code 7' falls on the validation side"),
    ],
)
def test_bad_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(**options)


def test_impossible_text_is_named_with_its_position(world: World) -> None:
    with pytest.raises(ValueError, match="impossible token 'blue' at position 2; the grammar allows 0, 1"):
        world.surprisal(["Sum", ":", "blue"])
    with pytest.raises(ValueError, match="impossible token '6' at position 6; the grammar allows 5"):
        world.surprisal(words("Sum: 2 + 3 = 6."))
    with pytest.raises(ValueError, match="impossible token 'One' at position 9; the document ended there"):
        world.surprisal([*words("Sum: 2 + 3 = 5."), EOS, "One"])
    with pytest.raises(ValueError, match="impossible token '<bos>' at position 0"):
        world.next_token(["<bos>"])
    with pytest.raises(ValueError, match="no token at position 2 makes this a possible document"):
        world.fill_in(words("Sum: 2 + 3 = 99."), 2)


def test_other_mistakes_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="unknown kind 'poem'; this world writes story, news"):
        world.documents(1, seed=0, kind="poem")
    with pytest.raises(ValueError, match="unknown split 'test'; use train, validation or None"):
        world.documents(1, seed=0, split="test")
    with pytest.raises(ValueError, match="n must be >= 0, got -1 documents"):
        world.documents(-1, seed=0)
    with pytest.raises(ValueError, match="more than 100 documents; enumerate a smaller world"):
        world.enumerate("story", most=100)
    with pytest.raises(ValueError, match="unknown split 'test'; use train, content"):
        world.instructions(1, seed=0, split="test")
    with pytest.raises(ValueError, match="unknown category 'poem'; use fact"):
        world.instructions(1, seed=0, category="poem")
    with pytest.raises(ValueError, match="at least 2 documents, got 1"):
        world.entropy(1, seed=0)
    with pytest.raises(ValueError, match="none may begin another"):
        Phrases(("a", "a b"))
    with pytest.raises(ValueError, match="documents of kind 'roles' hold no questions"):
        world.questions("roles", 1, seed=0)
    with pytest.raises(ValueError, match="no unasked people; lower asked_share=1"):
        World(asked_share=1).questions("unasked", 1, seed=0)


# Learning, and the command line


def test_counting_pairs_of_words_beats_chance_but_not_the_floor(world: World) -> None:
    pairs, singles = Counter(), Counter()
    for document in world.documents(3000, seed=1, split="train"):
        for before, token in zip(["<bos>", *document.tokens], document.tokens, strict=False):
            pairs[before, token] += 1
            singles[before] += 1
    size = len(world.vocabulary())
    validation = world.documents(400, seed=2, split="validation")
    gaps, losses = [], []
    for document in validation:
        chances = [
            (pairs[before, token] + 0.1) / (singles[before] + 0.1 * size)
            for before, token in zip(["<bos>", *document.tokens], document.tokens, strict=False)
        ]
        losses.append((sum(map(nats, chances)), len(chances)))
        gaps.append(losses[-1][0] - sum(document.surprisal))
    loss, _ = ratio_of_means(losses)
    error = math.sqrt(sum((gap - sum(gaps) / 400) ** 2 for gap in gaps)) / 400
    assert sum(gaps) / 400 > 10 * error > 0 and loss < 0.5 * math.log(size)


def test_statistics_describe_every_kind(world: World) -> None:
    rows = statistics(world, 400, seed=0)
    assert [row.kind for row in rows] == [*world.kinds] == [*MIXTURE]
    for row in rows:
        documents = world.documents(400, seed=0, kind=row.kind)
        assert row.longest == max(len(document.tokens) for document in documents)
        assert row.nats / row.tokens == pytest.approx(row.entropy)
        assert row.entropy == pytest.approx(world.entropy(400, seed=0, kind=row.kind)[0])
        assert abs(row.share - MIXTURE[row.kind] / sum(MIXTURE.values())) < 0.08
        assert row.repeats == pytest.approx(1 - len({document.text for document in documents}) / 400)


def test_demo_prints_every_kind_and_draws_a_figure(tmp_path, capsys) -> None:
    topic.main(["demo", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{kind} +\d", printed, re.MULTILINE) for kind in MIXTURE)
    floor, uniform = map(float, re.search(r"no model can beat ([\d.]+) .* costs ([\d.]+)", printed).groups())
    assert floor < 0.2 * uniform
    assert (tmp_path / "surprisal.svg").stat().st_size > 5000


def test_sample_and_score_answer_on_the_command_line(tmp_path, capsys) -> None:
    topic.main(["sample", "--kind", "talk", "--n-documents", "3", "--split", "validation", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith('"Hello') and held_out(line) for line in lines)
    topic.main(["score", "Sum:", "2 + 3 =", "--out", str(tmp_path)])
    assert "100.00%  '5' may come next" in capsys.readouterr().out
    for arguments, message in (
        (["score"], "nothing to score"),
        (["score", "Sum: x"], "impossible token 'x' at position 2"),
    ):
        with pytest.raises(SystemExit) as end:
            topic.main(arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err
