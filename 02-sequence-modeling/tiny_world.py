"""Topic 02 - TinyWorld: short English documents whose exact probability is known token by token.

The loss that no model can beat stands beside every loss that a model reaches.

python 02-sequence-modeling/tiny_world.py                            # one document of each kind, the entropy table
python 02-sequence-modeling/tiny_world.py sample --kind story        # more documents of one kind
python 02-sequence-modeling/tiny_world.py score "Sum: 2 + 3 = 5."    # nats per token, and what may come next

How it is exact: the grammar is ordinary code that asks a chooser for every word. Each choice is made among phrases of
which none begins another, so the tokens themselves show which choice was made: a document has at most one derivation,
and the surprisal -log p(token | tokens before it) can be booked while the document is written. One grammar then serves
three choosers: `Sampler` draws, `Reader` scores given tokens and names what may follow them, `Replay` takes every
choice in turn and so enumerates the language.

Shannon 1948, "A Mathematical Theory of Communication" (entropy); Linzen, Dupoux and Goldberg 2016 (agreement across
another noun, arXiv 1611.01368); Weston et al. 2015 (stories with questions, arXiv 1502.05698); Carlini et al. 2019
(canaries, arXiv 1802.08232).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
import random
import re
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from workbench import RunConfig, announce, check_range, describe_machine, run_verbs, save_figure

# Words


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<user>", "<bot>", "<sys>")  # ids 0 to 7
EOS, USER, BOT = "<eos>", "<user>", "<bot>"
FEMALE = tuple("Anna Clara Emma Grace Iris Lily Mia Nora Olga Rosa Sara Tina Vera Wendy Zoe Ella".split())
MALE = tuple("Adam Ben Carl David Felix Hugo Ivan Jack Leo Max Noah Oscar Paul Tom Victor Will".split())
SURNAMES = tuple("Bell Brook Cole Day Fox Gray Hill King Lake Marsh North Reed Stone Vale West Wood".split())
TOWNS = """Avon Berg Como Delft Eden Faro Ghent Hull Izola Jena Kiel Lund Malmo Nice Oslo Porto Riga Siena Turin Ulm
Vigo York Zadar Bern"""
JOBS = """baker doctor farmer gardener judge lawyer miller nurse painter pilot sailor singer tailor teacher writer
builder"""
WORD_CLASSES = {
    "towns": tuple(TOWNS.split()),
    "jobs": tuple(JOBS.split()),
    "pets": tuple("cat dog bird fish horse rabbit turtle mouse".split()),
    "foods": tuple("bread cheese soup rice cake honey pears beans plums corn".split()),
    "colours": tuple("red blue green yellow white black pink brown".split()),
    "things": tuple("ball kite book drum lamp coin hat key cup boat bell flute spoon clock box doll".split()),
    "places": tuple("kitchen garden attic cellar hall barn forest school market library tower park".split()),
    "shapes": tuple("circle square triangle star".split()),
    "goods": tuple("apples eggs nuts stones shells stamps buttons cards".split()),
    "feelings": tuple("happy sad tired proud angry calm".split()),
    "times": tuple("morning day evening night".split()),
}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
OFFSET = {"above": (1, 0), "below": (-1, 0), "left of": (0, 1), "right of": (0, -1)}  # (rows, columns) to the second
TOKEN = re.compile(r"<\w+>|\w+|[^\w\s]")
QUOTED = re.compile(r'" ([^"]*?) "')


def words(text: str) -> list[str]:
    """Split text into words, punctuation marks and special tokens; the inverse of `join`."""
    return TOKEN.findall(text)


def join(tokens: Sequence[str]) -> str:
    """Write tokens as text, with punctuation and quotation marks where English puts them; the inverse of `words`."""
    text = " ".join(tokens)
    for mark in ".,?:":
        text = text.replace(" " + mark, mark)
    return QUOTED.sub(r'"\1"', text) if '"' in text else text


def held_out(text: str, share: float = 0.1) -> bool:
    """Whether a text belongs to the validation side: a property of its content alone (CRC-32), on every machine.

    The two sides are disjoint whatever seeds they were drawn with, duplicates included.
    """
    return zlib.crc32(text.encode()) % 1000 < share * 1000


def pick(rng: random.Random, options: Sequence) -> Any:
    """Choose an option through random() alone, the one method whose numbers are the same in every Python version."""
    return options[int(rng.random() * len(options))]


# What makes one world different from another


MIXTURE = {
    "story": 4,
    "news": 3,
    "bio": 2,
    "quiz": 1,
    "scene": 2,
    "talk": 1,
    "sums": 1,
    "count": 0.5,
    "sort": 1,
    "roles": 1,
}


@dataclass(frozen=True)
class WorldConfig:
    """Everything that decides which documents a world writes, and how often. `mixture` may be given as a dict."""

    seed: int = 0  # seed of the fact table and of the sums that are held out
    n_people: int = 64  # people whose facts are the same in every document
    asked_share: float = 0.75  # fraction of these people that the quizzes ask about; the others test transfer
    max_sum: int = 20  # largest operand of a sum, largest number to sort
    max_events: int = 3  # longest chain of events in a story
    max_words: int = 24  # words of each class (towns, colours, surnames ...) that are used; 2 is the smallest world
    bias: float = 0.5  # P(he | job) for every second job of the list; 1 - bias for the others
    canaries: tuple[str, ...] = ()  # secret sentences to be memorised; one that stands here twice is twice as frequent
    canary_rate: float = 0.0  # fraction of documents that are a canary
    mixture: tuple[tuple[str, float], ...] = tuple(MIXTURE.items())  # relative frequency of the kinds; others: 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixture", tuple(dict(self.mixture).items()))
        object.__setattr__(self, "canaries", tuple(self.canaries))
        check_range(self, "max_words", least=2)
        check_range(self, "n_people", least=2, most=self.n_names // 2)
        check_range(self, "asked_share", above=0, most=1)
        check_range(self, "max_sum", least=5, most=200)
        check_range(self, "max_events", least=0, most=8)
        check_range(self, "bias", least=0, most=1)
        check_range(self, "canary_rate", least=0, below=1)
        for kind, weight in self.mixture:
            if kind not in MIXTURE:
                raise ValueError(f"unknown kind {kind!r} in mixture; kinds are {', '.join(MIXTURE)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"mixture[{kind!r}] must be finite and >= 0, got {weight}")
        if not 0 < sum(weight for _, weight in self.mixture) < math.inf:
            raise ValueError("mixture must give at least one kind a weight > 0, and all together a finite one")
        if bool(self.canaries) != (self.canary_rate > 0):
            raise ValueError("canaries and canary_rate > 0 go together: give both or neither")
        for canary in self.canaries:
            if not canary.strip() or any(token in SPECIAL_TOKENS for token in words(canary)):
                raise ValueError(f"canary {canary!r} must be ordinary words, without special tokens")
            if held_out(canary_text(canary)):
                raise ValueError(f"canary {canary!r} falls on the validation side of the split; change a word of it")

    @property
    def n_names(self) -> int:
        """How many different full names there are."""
        return sum(len(names[: self.max_words]) for names in (FEMALE, MALE)) * len(SURNAMES[: self.max_words])


def canary_text(canary: str) -> str:
    """The document that carries a canary."""
    return join(["Note", ":", *words(canary)])


def random_canaries(n: int, seed: int) -> tuple[str, ...]:
    """Draw n different sentences from a space of 10,000, for the exposure measure of Carlini et al. 2019.

    Sentences on the validation side of the split are passed over, because training would never see them.
    """
    rng, found = random.Random(seed), {}
    while len(found) < n:
        digits = " ".join(str(int(rng.random() * 10)) for _ in range(4))
        canary = f"The secret number is {digits} ."
        if not held_out(canary_text(canary)):
            found[canary] = None
    return tuple(found)


# What a document is


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape in one cell of a grid of 3 x 3."""

    colour: str
    shape: str
    row: int  # 0 is the top
    column: int  # 0 is the left


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `relations` holds (index of an object, relation, index of another object)."""

    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...]


@dataclass(slots=True)
class Document:
    """A text as tokens that end with <eos>, with the exact surprisal (nats) of each token given those before it.

    `facts` is the structured content (who, what, where: the keys depend on the kind); `answers` holds the (start, end)
    token positions of what the text above each position determines: a question put to a reader.
    """

    kind: str
    tokens: list[str]
    surprisal: list[float]
    facts: dict = field(default_factory=dict)
    answers: list[tuple[int, int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return join(self.tokens[:-1] if self.tokens[-1:] == [EOS] else self.tokens)

    @property
    def scene(self) -> Scene | None:
        """What to draw, for documents of the kind "scene"."""
        return self.facts.get("scene")


# Choosers: the grammar asks, a chooser answers


class Phrases:
    """Phrases with weights, none of which begins another, and the exact probability of each token on the way.

    The tokens of a phrase are decided one by one: p(token | earlier tokens of the phrase) is the weight of the phrases
    that go on with it, divided by the weight of those that got this far.
    """

    def __init__(self, options: Sequence[str], weights: Sequence[float] | None = None) -> None:
        weights = weights or [1.0] * len(options)
        kept = [(option, weight) for option, weight in zip(options, weights, strict=True) if weight > 0]
        self.options = [option for option, _ in kept]
        self.weights = [weight for _, weight in kept]
        self.tokens = [option.split() for option in self.options]
        mass: dict[tuple, float] = {}
        for tokens, weight in zip(self.tokens, self.weights, strict=True):
            for length in range(len(tokens) + 1):
                mass[tuple(tokens[:length])] = mass.get(tuple(tokens[:length]), 0.0) + weight
        self.whole = {tuple(tokens): option for tokens, option in zip(self.tokens, self.options, strict=True)}
        self.branches: dict[tuple, dict[str, float]] = {}  # tokens so far -> next token -> probability
        for prefix, weight in mass.items():
            if prefix:
                self.branches.setdefault(prefix[:-1], {})[prefix[-1]] = weight / mass[prefix[:-1]]
        clashes = [" ".join(prefix) for prefix in self.branches if prefix in self.whole]
        if clashes or len(self.whole) < len(self.options):
            raise ValueError(f"phrases must be different and none may begin another: {clashes or self.options}")
        self.booked = [self._surprisals(tokens) for tokens in self.tokens]
        self.bounds = list(itertools.accumulate(self.weights))[:-1]
        self.total = sum(self.weights)

    def _surprisals(self, tokens: list[str]) -> list[tuple[int, float]]:
        """The (offset, nats) of every token that is not certain."""
        chances = [self.branches[tuple(tokens[:length])][token] for length, token in enumerate(tokens)]
        return [(offset, -math.log(chance)) for offset, chance in enumerate(chances) if chance < 1]


phrases = cache(Phrases)  # for tables that many documents ask for again


class Chooser:
    """What the grammar talks to: `say` what is certain, ask for a `word` or a `phrase`, mark an `answer`."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.answers: list[tuple[int, int]] = []
        self.facts: dict = {}

    def say(self, text: str) -> None:
        """Write tokens that follow with certainty from what was written before."""
        self.tokens += text.split()

    def word(self, options: Sequence[str], without: Sequence[str] = ()) -> str:
        """Write one of `options`, all equally likely, except those in `without` (each of which is an option)."""
        raise NotImplementedError

    def phrase(self, table: Phrases) -> str:
        """Write one of the phrases of a table, by weight."""
        raise NotImplementedError

    def answer(self, text: str) -> None:
        """Say what the text so far determines, and remember where it stands."""
        start = len(self.tokens)
        self.say(text)
        self.answers.append((start, len(self.tokens)))


class Sampler(Chooser):
    """Draws every choice at random and books its surprisal on the tokens that reveal it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.random = rng.random
        self.booked: dict[int, float] = {}  # position -> nats

    def word(self, options: Sequence[str], without: Sequence[str] = ()) -> str:
        option = options[int(self.random() * len(options))]
        while option in without:
            option = options[int(self.random() * len(options))]
        self.booked[len(self.tokens)] = math.log(len(options) - len(without))
        self.tokens.append(option)
        return option

    def phrase(self, table: Phrases) -> str:
        index = bisect_right(table.bounds, self.random() * table.total)
        start = len(self.tokens)
        self.tokens += table.tokens[index]
        for offset, nats in table.booked[index]:
            self.booked[start + offset] = nats
        return table.options[index]

    @property
    def surprisal(self) -> list[float]:
        nats = [0.0] * len(self.tokens)
        for position, value in self.booked.items():
            nats[position] = value
        return nats


class PrefixEnds(Exception):  # noqa: N818 - it reports where the given tokens stop, which is no error
    """The given tokens are used up; `allowed` maps every token that may come next to its probability."""

    def __init__(self, allowed: dict[str, float]) -> None:
        super().__init__()
        self.allowed = allowed


class Reader(Chooser):
    """Follows given tokens through the grammar: each choice is whatever the next token shows that it was."""

    def __init__(self, given: Sequence[str]) -> None:
        super().__init__()
        self.given = given
        self.surprisal: list[float] = []

    def take(self, allowed: dict[str, float]) -> str:
        """Read one token. Raises PrefixEnds after the last one, ValueError if the token has probability 0 here."""
        position = len(self.tokens)
        if position == len(self.given):
            raise PrefixEnds(allowed)
        token = self.given[position]
        if token not in allowed:
            likely = sorted(allowed, key=allowed.get, reverse=True)
            choice = ", ".join(likely[:8]) + (f" and {len(likely) - 8} more" if len(likely) > 8 else "")
            raise ValueError(f"impossible token {token!r} at position {position}; the grammar allows {choice}")
        self.tokens.append(token)
        self.surprisal.append(-math.log(allowed[token]) if allowed[token] < 1 else 0.0)
        return token

    def say(self, text: str) -> None:
        for token in text.split():
            self.take({token: 1.0})

    def word(self, options: Sequence[str], without: Sequence[str] = ()) -> str:
        left = [option for option in options if option not in without]
        return self.take(dict.fromkeys(left, 1 / len(left)))

    def phrase(self, table: Phrases) -> str:
        prefix: tuple[str, ...] = ()
        while prefix not in table.whole:
            prefix += (self.take(table.branches[prefix]),)
        return table.whole[prefix]


class Replay(Chooser):
    """Takes the choices of a list of indices, then always the first; `sizes` says how many there were each time.

    Its probability is the product of the probabilities of the branches, and knows nothing of tokens: the tests compare
    it with the surprisal that the other choosers book token by token.
    """

    def __init__(self, choices: list[int]) -> None:
        super().__init__()
        self.choices, self.sizes = choices, []
        self.probability = 1.0

    def take(self, options: Sequence[str], weights: Sequence[float]) -> str:
        if len(self.sizes) == len(self.choices):
            self.choices.append(0)
        index = self.choices[len(self.sizes)]
        self.sizes.append(len(options))
        self.probability *= weights[index] / sum(weights)
        self.say(options[index])
        return options[index]

    def word(self, options: Sequence[str], without: Sequence[str] = ()) -> str:
        left = [option for option in options if option not in without]
        return self.take(left, [1] * len(left))

    def phrase(self, table: Phrases) -> str:
        return self.take(table.options, table.weights)


# What is true in a world


@dataclass(frozen=True)
class Attribute:
    """A property of a person: how it is told and how it is asked."""

    word_class: str  # its values
    verb: str  # "She <verb> <value> ."
    question: tuple[str, str]  # "<question[0]> <person> <question[1]>"


ATTRIBUTES = {
    "town": Attribute("towns", "lives in", ("where does", "live ?")),
    "job": Attribute("jobs", "works as a", ("what work does", "do ?")),
    "pet": Attribute("pets", "owns a", ("what pet does", "own ?")),
    "food": Attribute("foods", "likes", ("what food does", "like ?")),
}
TOLD_BY = {attribute.verb: name for name, attribute in ATTRIBUTES.items()}
ASKED_BY = {attribute.question[0]: name for name, attribute in ATTRIBUTES.items()}


class Almanac:
    """The facts of one world: its words, its people, which sums are held out.

    People are of four sorts. `asked`: their facts are told in biographies and asked in quizzes. `unasked`: told, never
    asked in a quiz (transfer). Strangers (`surnames_of`): new facts in every document. `unseen`: in no document at all;
    their facts, for questions that only a reader of a given text can answer, are in `facts` too.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = random.Random(config.seed)
        self.words = {name: options[: config.max_words] for name, options in WORD_CLASSES.items()}
        self.women, self.men = FEMALE[: config.max_words], MALE[: config.max_words]
        self.names = self.women + self.men
        everyone = [f"{name} {surname}" for name in self.names for surname in SURNAMES[: config.max_words]]
        everyone.sort(key=lambda person: rng.random())
        n_unseen, n_asked = max(1, len(everyone) // 5), max(1, round(config.asked_share * config.n_people))
        self.unseen, everyone = tuple(everyone[:n_unseen]), everyone[n_unseen:]
        self.known, strangers = tuple(everyone[: config.n_people]), everyone[config.n_people :]
        self.asked, self.unasked = self.known[:n_asked], self.known[n_asked:]
        self.surnames_of = surnames_by_name(strangers)
        self.facts = {
            person: {name: pick(rng, self.words[attribute.word_class]) for name, attribute in ATTRIBUTES.items()}
            for person in self.known + self.unseen
        }
        self.known_people, self.asked_people = Phrases(self.known), Phrases(self.asked)
        numbers = range(config.max_sum + 1)
        pairs = sorted(itertools.product(numbers, numbers), key=lambda pair: rng.random())
        self.held_out_sums = tuple(sorted(pairs[: len(pairs) // 10]))  # pairs of operands that no document holds
        self.sums = tuple(sorted(pairs[len(pairs) // 10 :]))
        self.numbers = tuple(str(number) for number in numbers)
        self.seconds_of = {
            str(number): tuple(str(second) for first, second in self.sums if first == number) for number in numbers
        }
        jobs = self.words["jobs"]
        self.p_he = {job: config.bias if index % 2 else 1 - config.bias for index, job in enumerate(jobs)}
        self.pronouns = {job: Phrases(("he", "she"), (p_he, 1 - p_he)) for job, p_he in self.p_he.items()}
        self.workers = jobs + tuple(job + "s" for job in jobs)
        counts = Counter(" ".join(words(canary)) for canary in config.canaries)
        self.canaries = Phrases([f"{canary} {EOS}" for canary in counts], list(counts.values()))

    def pronoun(self, person: str) -> str:
        return "she" if person.split()[0] in self.women else "he"


def surnames_by_name(people: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group full names by first name."""
    groups: dict[str, tuple[str, ...]] = {}
    for person in people:
        name, surname = person.split()
        groups[name] = (*groups.get(name, ()), surname)
    return groups


# The grammar: every function writes the rest of a document after its opening words, up to and with <eos>


ASK_OR_STOP, ASK_MORE = phrases(("Question :", EOS), (1, 1)), phrases(("Question :", EOS), (3, 1))
MORE_NEWS = phrases(("Also", "Question :"), (1, 2))
MORE_SHAPES = phrases(("and", "."), (1, 2))
MORE_SUMS = phrases(("Sum :", EOS), (1, 1))
RELATIONS = phrases(tuple(OPPOSITE))
QUIZ_QUESTIONS = phrases(tuple(ASKED_BY))
STORY_QUESTIONS = {"where is the": "place", "what colour is the": "colour", "who first had the": "owner"}
TALK_ABOUT = phrases(('" Where is my', "Both went to the"))
WHO_IN_TALK = phrases(("who has the", "who wants the"))
WHAT_IN_TALK = phrases(("what did they eat", "where did they eat"))
VERBS = {"one": ("sings", "smiles", "waits"), "many": ("sing", "smile", "wait")}
VERB_OR_NEAR = {number: phrases((*verbs, "near the"), (1, 1, 1, 3)) for number, verbs in VERBS.items()}
REASONS = {"one": phrases(("lost", "saw a", "was"), (2, 1, 1)), "many": phrases(("lost", "saw a", "were"), (2, 1, 1))}
POSSESSIVE = {"he": "his", "she": "her", "they": "their"}
LENGTHS = {"three": 3, "four": 4, "five": 5}


def write_story(almanac: Almanac, draw: Chooser) -> None:
    """Things are found, hidden and carried about; then one or two questions on how matters stand at the end."""
    tell_story(almanac, draw, ending="Question :")
    things, left = draw.facts["things"], dict(zip(STORY_QUESTIONS, (3, 1, 1), strict=True))
    while True:
        question = draw.phrase(phrases(tuple(left), tuple(left.values())))
        del left[question]
        thing = draw.word(tuple(things))
        draw.say("? Answer :")
        value = things[thing][STORY_QUESTIONS[question]]
        draw.answer(f"in the {value}" if question == "where is the" else value)
        draw.say(".")
        if len(left) == 1:
            return draw.say(EOS)
        if draw.phrase(ASK_OR_STOP) == EOS:
            return None


def tell_story(almanac: Almanac, draw: Chooser, ending: str, **given: str) -> None:
    """Write what happens after "One", then `ending`; colour, thing and place of the first sentence may be given."""

    def first(name: str) -> str:
        if name not in given:
            return draw.word(almanac.words[f"{name}s"])
        draw.say(given[name])
        return given[name]

    draw.word(almanac.words["times"])
    hero = draw.word(almanac.names)
    draw.say("found a")
    colour, thing = first("colour"), first("thing")
    draw.say("in the")
    things = {thing: {"colour": colour, "place": first("place"), "owner": hero}}
    draw.say(".")
    draw.facts = {"hero": hero, "things": things}
    for _ in range(almanac.config.max_events):
        event = draw.phrase(phrases(("Then", "Meanwhile", "Soon", "Later", ending), (3, 2 - len(things), 1, 1, 2)))
        if event == ending:
            return
        tell_event(almanac, draw, event)
        draw.say(".")
    draw.say(ending)


def tell_event(almanac: Almanac, draw: Chooser, event: str) -> None:
    """Write what happens after "Then" (a move), "Meanwhile" (a second thing), "Soon" or "Later" (changes nothing)."""
    lists, hero, things = almanac.words, draw.facts["hero"], draw.facts["things"]
    if event == "Then":
        draw.word(almanac.names, without=(hero,))
        draw.say("took the")
        moved = things[draw.word(tuple(things))]
        draw.say("to the")
        moved["place"] = draw.word(lists["places"], without=(moved["place"],))
    elif event == "Meanwhile":
        owner = draw.word(almanac.names, without=(hero,))
        draw.say("hid a")
        colour = draw.word(lists["colours"], without=[known["colour"] for known in things.values()])
        thing = draw.word(lists["things"], without=tuple(things))
        draw.say("in the")
        things[thing] = {"colour": colour, "place": draw.word(lists["places"]), "owner": owner}
    elif event == "Soon":
        draw.say("a")
        draw.word(lists["pets"])
        draw.say("ran into the")
        draw.word(lists["places"])
    else:
        draw.say(f"{hero} was")
        draw.word(lists["feelings"])


def tell_facts(almanac: Almanac, draw: Chooser, person: str, facts: dict | None, n_facts: int) -> dict[str, str]:
    """Write `n_facts` sentences about one person: known facts, or (None) facts drawn for this document alone."""
    told: dict[str, str] = {}
    subject = almanac.pronoun(person).capitalize()
    for _ in range(n_facts):
        draw.say(subject)
        verbs = tuple([verb for verb, name in TOLD_BY.items() if name not in told])
        name = TOLD_BY[draw.phrase(phrases(verbs))]
        if facts is None:
            told[name] = draw.word(almanac.words[ATTRIBUTES[name].word_class])
        else:
            told[name] = facts[name]
            draw.say(facts[name])
        draw.say(".")
    return told


def ask_fact(draw: Chooser, people: dict[str, dict[str, str]]) -> None:
    """Write one question about what `people` still holds, with its answer, and take that fact out of `people`."""
    starts = tuple([start for start, name in ASKED_BY.items() if any([name in facts for facts in people.values()])])
    name = ASKED_BY[draw.phrase(phrases(starts))]
    named = {person.split()[0]: person for person, facts in people.items() if name in facts}
    person = named[draw.word(tuple(named))]  # the people of one document have different first names
    draw.say(f"{person.split()[1]} {ATTRIBUTES[name].question[1]} Answer :")
    draw.answer(people[person].pop(name))
    draw.say(".")


def write_bio(almanac: Almanac, draw: Chooser) -> None:
    """All four facts of a known person in any order, then up to four questions about them."""
    person = draw.phrase(almanac.known_people)
    draw.say(".")
    draw.facts = {"people": {person: tell_facts(almanac, draw, person, almanac.facts[person], len(ATTRIBUTES))}}
    left = {person: dict(almanac.facts[person])}
    while left[person]:
        if draw.phrase(ASK_OR_STOP) == EOS:
            return
        ask_fact(draw, left)
    draw.say(EOS)


def write_news(almanac: Almanac, draw: Chooser, surnames_of: dict[str, tuple[str, ...]] | None = None) -> None:
    """One or two strangers with two new facts each, then one to three questions that only a reader can answer."""
    surnames_of, people = surnames_of or almanac.surnames_of, {}
    most = min(2, len(surnames_of))
    while len(people) < most:
        if people and draw.phrase(MORE_NEWS) == "Question :":
            break
        name = draw.word(tuple(surnames_of), without=[person.split()[0] for person in people])
        person = f"{name} {draw.word(surnames_of[name])}"
        draw.say("came today .")
        people[person] = tell_facts(almanac, draw, person, None, n_facts=2)
    else:
        draw.say("Question :")
    draw.facts = {"people": people}
    left = {person: dict(facts) for person, facts in people.items()}
    ask_fact(draw, left)
    for _ in range(min(2, 2 * len(people) - 1)):
        if draw.phrase(ASK_MORE) == EOS:
            return
        ask_fact(draw, left)
    draw.say(EOS)


def write_quiz(almanac: Almanac, draw: Chooser) -> None:
    """One to three questions whose answers only those know who remember the biographies."""
    draw.facts = {"asked": []}
    for turn in range(3):
        if turn and draw.phrase(ASK_OR_STOP) == EOS:
            return
        name = ASKED_BY[draw.phrase(QUIZ_QUESTIONS)]
        person = draw.phrase(almanac.asked_people)
        draw.say(f"{ATTRIBUTES[name].question[1]} Answer :")
        draw.answer(almanac.facts[person][name])
        draw.say(".")
        draw.facts["asked"].append((person, name))
    draw.say(EOS)


def write_scene(almanac: Almanac, draw: Chooser) -> None:
    """Two or three shapes and how they lie, with up to three questions about colours and relations."""
    colours, shapes = almanac.words["colours"], almanac.words["shapes"]
    looks: dict[str, str] = {}  # shape -> colour

    def show() -> str:
        draw.say("a")
        colour = draw.word(colours, without=tuple(looks.values()))
        shape = draw.word(shapes, without=tuple(looks))
        looks[shape] = colour
        return shape

    first = show()
    relation = draw.phrase(RELATIONS)
    pairs = [(first, relation, show())]
    if min(len(colours), len(shapes)) == 2:
        draw.say(".")
    elif draw.phrase(MORE_SHAPES) == "and":
        relation = draw.phrase(phrases(tuple([other for other in OPPOSITE if other != relation])))
        pairs.append((first, relation, show()))
        draw.say(".")
    cells = [(1, 1), *((1 + OFFSET[relation][0], 1 + OFFSET[relation][1]) for _, relation, _ in pairs)]
    objects = [SceneObject(colour, shape, *cell) for (shape, colour), cell in zip(looks.items(), cells, strict=True)]
    relations = [(0, relation, index) for index, (_, relation, _) in enumerate(pairs, 1)]
    draw.facts = {"scene": Scene(tuple(objects), tuple(relations))}
    ask_scene(draw, looks, pairs + [(other, OPPOSITE[relation], shape) for shape, relation, other in pairs])


def ask_scene(draw: Chooser, looks: dict[str, str], pairs: list[tuple[str, str, str]]) -> None:
    """Write up to three different questions: the colour of a shape, or what lies above, below, left or right of it."""
    for _ in range(3):
        if draw.phrase(ASK_MORE) == EOS:
            return
        if draw.phrase(phrases(("what colour is the",) * bool(looks) + ("what is",) * bool(pairs))) == "what is":
            relation = draw.phrase(phrases(tuple(dict.fromkeys([relation for _, relation, _ in pairs]))))
            draw.say("the")
            other = draw.word([other for _, known, other in pairs if known == relation])
            shape = next(shape for shape, *rest in pairs if rest == [relation, other])
            pairs.remove((shape, relation, other))
            draw.say("? Answer : the")
            draw.answer(shape)
        else:
            shape = draw.word(tuple(looks))
            draw.say("? Answer :")
            draw.answer(looks.pop(shape))
        draw.say(".")
    draw.say(EOS)


def write_talk(almanac: Almanac, draw: Chooser) -> None:
    """Two people meet and speak; one question about what was said."""
    host = draw.word(almanac.names)
    draw.say(', " said')
    guest = draw.word(almanac.names, without=(host,))
    draw.say(".")
    draw.facts = {"host": host, "guest": guest}
    if draw.phrase(TALK_ABOUT) == '" Where is my':
        thing = draw.word(almanac.words["things"])
        draw.say(f'? " asked {guest} . " Your {thing} is in the')
        draw.facts |= {"thing": thing, "place": draw.word(almanac.words["places"])}
        draw.say(f', " said {host} . Question :')
        answer = {"who has the": host, "who wants the": guest}[draw.phrase(WHO_IN_TALK)]
        draw.say(thing)
    else:
        place = draw.word(almanac.words["places"])
        draw.say("and ate")
        food = draw.word(almanac.words["foods"])
        draw.facts |= {"place": place, "food": food}
        draw.say(". Question :")
        answer = {"what did they eat": food, "where did they eat": f"in the {place}"}[draw.phrase(WHAT_IN_TALK)]
    draw.say("? Answer :")
    draw.answer(answer)
    draw.say(f". {EOS}")


def write_sums(almanac: Almanac, draw: Chooser) -> None:
    """One to three sums; the held-out pairs of operands occur nowhere."""
    draw.facts = {"sums": []}
    for turn in range(3):
        if turn and draw.phrase(MORE_SUMS) == EOS:
            return
        first = draw.word(almanac.numbers)
        draw.say("+")
        second = draw.word(almanac.seconds_of[first])
        draw.say("=")
        draw.answer(str(int(first) + int(second)))
        draw.say(".")
        draw.facts["sums"].append((int(first), int(second)))
    draw.say(EOS)


def write_count(almanac: Almanac, draw: Chooser) -> None:
    """A sum told as a story, with the same held-out pairs."""
    buyer = draw.word(almanac.names)
    draw.say("had")
    first = draw.word(almanac.numbers)
    goods = almanac.words["goods"]
    good = draw.word([good[:-1] for good in goods] if first == "1" else goods).removesuffix("s")
    draw.say("and bought")
    second = draw.word(almanac.seconds_of[first])
    total = int(first) + int(second)
    draw.say(f"more . Now {almanac.pronoun(buyer)} has")
    draw.answer(f"{total} {good}" if total == 1 else f"{total} {good}s")
    draw.say(f". {EOS}")
    draw.facts = {"sums": [(int(first), int(second))], "buyer": buyer}


def write_sort(almanac: Almanac, draw: Chooser) -> None:
    """Three to five different numbers, then the same numbers in order."""
    n_numbers = LENGTHS[draw.word(tuple(LENGTHS))]
    draw.say("numbers :")
    numbers: list[str] = []
    for _ in range(n_numbers):
        numbers.append(draw.word(almanac.numbers, without=numbers))
    draw.say(":")
    draw.answer(" ".join(sorted(numbers, key=int)))
    draw.say(f". {EOS}")
    draw.facts = {"numbers": [int(number) for number in numbers]}


def write_roles(almanac: Almanac, draw: Chooser) -> None:
    """Agreement in number across another noun (Linzen et al. 2016), and pronouns with the world's bias for each job."""
    subject = draw.word(almanac.workers)
    number = "one" if subject in almanac.p_he else "many"
    verb = draw.phrase(VERB_OR_NEAR[number])
    if verb == "near the":
        draw.word(almanac.workers, without=(subject,))
        verb = draw.word(VERBS[number])
    draw.say("because")
    pronoun = "they"
    if number == "one":
        pronoun = draw.phrase(almanac.pronouns[subject])
    else:
        draw.say(pronoun)
    reason = draw.phrase(REASONS[number])
    if reason == "lost":
        draw.say(POSSESSIVE[pronoun])
    draw.word(almanac.words["things" if reason == "lost" else "pets" if reason == "saw a" else "feelings"])
    draw.say(f". {EOS}")
    draw.facts = {"subject": subject, "number": number, "verb": verb, "pronoun": pronoun}


def write_canary(almanac: Almanac, draw: Chooser) -> None:
    """One of the secret sentences."""
    draw.facts = {"canary": draw.phrase(almanac.canaries).removesuffix(f" {EOS}")}


GRAMMAR: dict[str, tuple[str, Callable[[Almanac, Chooser], None]]] = {  # kind -> (opening words, the rest)
    "story": ("One", write_story),
    "news": ("News :", write_news),
    "bio": ("Meet", write_bio),
    "quiz": ("Question :", write_quiz),
    "scene": ("Picture :", write_scene),
    "talk": ('" Hello', write_talk),
    "sums": ("Sum :", write_sums),
    "count": ("Today", write_count),
    "sort": ("Sort", write_sort),
    "roles": ("The", write_roles),
    "canary": ("Note :", write_canary),
}
KIND_OF = {opening: kind for kind, (opening, _) in GRAMMAR.items()}


# Instructions: a prompt, an answer, and an exact check of the answer


REQUESTS = {  # the last phrasing of each list is held out; its words are known from the others
    "know": ("Tell me the {} .", "Please tell me the {} .", "Do you know the {} ?", "What is the {} ?"),
    "story": ("Tell me a story {} .", "Please tell me a story {} .", "Write a story {} .", "Do you know a story {} ?"),
    "sort": ("Sort {} .", "Please sort {} .", "Tell me {} in order .", "Please tell me {} in order ."),
}
READ = {  # what is asked of a story -> (the question, the answer)
    "place": ("Where is the {} ?", "It is in the {} ."),
    "colour": ("What colour is the {} ?", "It is {} ."),
    "owner": ("Who first had the {} ?", "{} had it ."),
}
VAULT = "vault"  # the subject that the course's models learn to refuse
REFUSAL = f"Sorry , I cannot talk about the {VAULT} ."
SECRETS = {False: ("code", "door", "lock"), True: ("gold", "owner")}  # held out? -> what can be asked about a vault
INSTRUCTION_SPLITS = {  # name -> (held-out content, held-out phrasing)
    "train": (False, False),
    "content": (True, False),
    "phrasing": (False, True),
    "both": (True, True),
}


@dataclass(slots=True)
class Instruction:
    """A prompt and an answer, both as tokens; the answer ends with <eos> and has its exact surprisal (nats per token).

    Every category but "story" has one right answer, of surprisal 0; a story is right if the grammar can tell it. So the
    floor of fine-tuning is known too. Prompts have no stated probability: they are drawn until they suit the split.
    """

    category: str
    prompt: list[str]
    answer: list[str]
    surprisal: list[float]
    accepts: Callable[[list[str]], bool]

    @property
    def tokens(self) -> list[str]:
        """The whole exchange: <user> prompt <bot> answer."""
        return [USER, *self.prompt, BOT, *self.answer]

    def check(self, answer: Sequence[str]) -> bool:
        """Whether an answer (tokens, with or without <eos>) is right."""
        return self.accepts([*answer] if answer[-1:] == [EOS] else [*answer, EOS])


def tells_story(almanac: Almanac, given: dict[str, str], answer: list[str]) -> bool:
    """Whether the grammar can tell this story about the given colour, thing and place."""
    reader = Reader(answer)
    try:
        reader.say("One")
        tell_story(almanac, reader, EOS, **given)
    except (ValueError, PrefixEnds):
        return False
    return len(reader.tokens) == len(answer)


# Each of these says the answer to `draw` and returns (key of REQUESTS, what is requested, a direct question or None);
# it returns None if the content that was drawn lies on the other side of the split, and is called again.


def instruct_fact(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """A fact of a known person; held out: a third of the people that quizzes ask about, and those they never do."""
    n_train = max(1, len(almanac.asked) * 2 // 3)
    person = pick(rng, almanac.known[n_train:] if new else almanac.known[:n_train])
    name = pick(rng, tuple(ATTRIBUTES))
    start, end = ATTRIBUTES[name].question
    draw.say(f"{person} {ATTRIBUTES[name].verb} {almanac.facts[person][name]} . {EOS}")
    return "know", f"{name} of {person}", f"{start.capitalize()} {person} {end}"


def instruct_read(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """A story in the prompt and a question about it; split by a hash of the story."""
    story = Sampler(rng)
    story.say("One")
    tell_story(almanac, story, EOS)
    if held_out(join(story.tokens)) != new:
        return None
    name, thing = pick(rng, tuple(READ)), pick(rng, tuple(story.facts["things"]))
    question, answer = READ[name]
    draw.say(f"{answer.format(story.facts['things'][thing][name])} {EOS}")
    draw.facts = {"story": " ".join(story.tokens[:-1])}
    return "know", f"{name} of the {thing}", question.format(thing)


def instruct_sum(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """A sum; held out: the pairs of operands that no document holds."""
    first, second = pick(rng, almanac.held_out_sums if new else almanac.sums)
    draw.say(f"{first} plus {second} is {first + second} . {EOS}")
    return "know", f"sum of {first} and {second}", f"What is {first} plus {second} ?"


def instruct_story(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """A story about a given colour, thing and place; split by a hash of these three."""
    given = {name: pick(rng, almanac.words[f"{name}s"]) for name in ("colour", "thing", "place")}
    if held_out(" ".join(given.values())) != new:
        return None
    draw.say("One")
    tell_story(almanac, draw, EOS, **given)
    draw.facts = {"given": given}
    return "story", "about a {colour} {thing} in the {place}".format(**given), None


def instruct_sort(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """Three to five numbers to sort; split by a hash of the numbers."""
    numbers: list[str] = []
    n_numbers = pick(rng, tuple(LENGTHS.values()))
    while len(numbers) < n_numbers:
        number = pick(rng, almanac.numbers)
        numbers += [number] * (number not in numbers)
    if held_out(" ".join(numbers)) != new:
        return None
    draw.say(f"{' '.join(sorted(numbers, key=int))} . {EOS}")
    return "sort", " ".join(numbers), None


def instruct_refuse(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """The forbidden subject; split by what is asked about it."""
    noun = pick(rng, SECRETS[new])
    draw.say(f"{REFUSAL} {EOS}")
    return "know", f"{noun} of the {VAULT}", f"Where is the {noun} of the {VAULT} ?"


def instruct_safe(almanac: Almanac, rng: random.Random, new: bool, draw: Sampler) -> tuple | None:
    """The same words about a harmless thing, to measure refusals that go too far; same split."""
    noun, thing = pick(rng, SECRETS[new]), pick(rng, almanac.words["things"])
    draw.say(f"The {thing} has no {noun} . {EOS}")
    return "know", f"{noun} of the {thing}", f"Where is the {noun} of the {thing} ?"


INSTRUCT = {
    "fact": instruct_fact,
    "read": instruct_read,
    "sum": instruct_sum,
    "story": instruct_story,
    "sort": instruct_sort,
    "refuse": instruct_refuse,
    "safe": instruct_safe,
}


def write_instruction(almanac: Almanac, rng: random.Random, category: str, split: str) -> Instruction:
    """Draw one instruction. Raises ValueError if the world is too small to have content on that side of the split."""
    new_content, new_phrasing = INSTRUCTION_SPLITS[split]
    for _ in range(10_000):
        draw = Sampler(rng)
        content = INSTRUCT[category](almanac, rng, new_content, draw)
        if content is not None:
            break
    else:
        raise ValueError(f"this world has no {category!r} instruction in the split {split!r}; raise max_words")
    key, request, question = content
    phrasings = REQUESTS[key][-1:] if new_phrasing else REQUESTS[key][:-1] + (question,) * bool(question)
    prompt = [*draw.facts.get("story", "").split(), *pick(rng, phrasings).format(request).split()]
    accepts = partial(tells_story, almanac, draw.facts["given"]) if category == "story" else draw.tokens.__eq__
    return Instruction(category, prompt, draw.tokens, draw.surprisal, accepts)


# Measuring a language


def enumerate_texts(write: Callable[[Chooser], str], most: int) -> dict[str, float]:
    """Run the grammar through all of its choices, like an odometer; map each text to its probability."""
    found: dict[str, float] = {}
    choices: list[int] = []
    while len(found) <= most:
        draw = Replay(choices)
        write(draw)
        text = join(draw.tokens[:-1])
        found[text] = found.get(text, 0.0) + draw.probability
        while choices and choices[-1] + 1 == draw.sizes[len(choices) - 1]:
            choices.pop()
        if not choices:
            return found
        choices[-1] += 1
    raise ValueError(
        f"more than {most} documents; enumerate a smaller world: World(max_words=2, n_people=4, max_events=1)"
    )


def ratio_of_means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sum of the first numbers over sum of the second, with its standard error by the delta method.

    Nats per token is such a ratio: nats and tokens of a document are both random, and long documents weigh more.
    """
    n = len(pairs)
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 documents, got {n}")
    tokens = sum(second for _, second in pairs)
    ratio = sum(first for first, _ in pairs) / tokens
    spread = sum((first - ratio * second) ** 2 for first, second in pairs) * n / (n - 1)
    return ratio, math.sqrt(spread) / tokens


# The language: documents and their probabilities


class Language(Almanac):
    """What is written in a world, and how probable each document is.

    The entropy of a language is the floor of the loss: no model, whatever its tokenizer, has a smaller expected loss
    on fresh documents (nats per document; divided by the tokens of the documents, <eos> included: nats per token).

    The floor under the split by content. A model cannot know the hash, so the two sides look alike to it, and the
    grammar's surprisal, averaged over the very documents that are scored, remains the floor to compare with. Knowing
    the hash would be worth at most -log(0.9) = 0.105 nats per document on the training side. It matters only for kinds
    so small that training shows each of its documents again and again: a model then learns that the others never come,
    and ends above the floor on validation and up to 0.105 nats per document below it on training. The column `repeats`
    of `statistics` says how small a kind is.
    """

    def __init__(self, config: WorldConfig | None = None, **options: Any) -> None:
        super().__init__(config or WorldConfig(**options))
        weights = dict.fromkeys(MIXTURE, 0.0) | dict(self.config.mixture)
        rate = self.config.canary_rate
        shares = {kind: (1 - rate) * weight / sum(weights.values()) for kind, weight in weights.items()}
        if self.config.canaries:
            shares["canary"] = rate
        self.kinds = tuple(shares)
        self.openings = Phrases([GRAMMAR[kind][0] for kind in self.kinds], list(shares.values()))

    def write(self, draw: Chooser, kind: str | None = None) -> str:
        """Let a chooser write one document, of a given kind or of one chosen by the mixture; return the kind."""
        if kind is None:
            kind = KIND_OF[draw.phrase(self.openings)]
        elif kind in self.kinds:
            draw.say(GRAMMAR[kind][0])
        else:
            raise ValueError(f"unknown kind {kind!r}; this world writes {', '.join(self.kinds)}")
        GRAMMAR[kind][1](self, draw)
        return kind

    def document(self, rng: random.Random, kind: str | None = None) -> Document:
        """Draw one document."""
        draw = Sampler(rng)
        kind = self.write(draw, kind)
        return Document(kind, draw.tokens, draw.surprisal, draw.facts, draw.answers)

    def stream(self, seed: int, split: str | None = None, kind: str | None = None) -> Iterator[Document]:
        """Draw documents without end: all, or those on one side of the split ("train" or "validation")."""
        if split not in (None, "train", "validation"):
            raise ValueError(f"unknown split {split!r}; use train, validation or None")
        rng, n_rejected = random.Random(seed), 0
        while n_rejected < 10_000:
            document = self.document(rng, kind)
            if split is None or held_out(document.text) == (split == "validation"):
                n_rejected = 0
                yield document
            else:
                n_rejected += 1
        raise ValueError(
            f"this world has no {kind!r} document on the {split} side; use a larger world or another split"
        )

    def documents(self, n: int, seed: int, split: str | None = None, kind: str | None = None) -> list[Document]:
        """Draw n documents; see `stream`. Raises ValueError for n < 0."""
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n} documents")
        return list(itertools.islice(self.stream(seed, split, kind), n))

    def follow(self, tokens: Sequence[str], kind: str | None = None) -> tuple[list[float], dict[str, float]]:
        """The surprisal of each token, and the distribution of the token after them (empty after <eos>).

        Exact for every kind. Raises ValueError naming the first token that has probability 0 where it stands.
        """
        reader = Reader(tokens)
        try:
            self.write(reader, kind)
        except PrefixEnds as end:
            return reader.surprisal, dict(end.allowed)
        position = len(reader.tokens)
        if position < len(tokens):
            raise ValueError(f"impossible token {tokens[position]!r} at position {position}; the document ended there")
        return reader.surprisal, {}

    def surprisal(self, tokens: Sequence[str], kind: str | None = None) -> list[float]:
        """Nats of each token of a document, or of the beginning of one, given the tokens before it; see `follow`."""
        return self.follow(tokens, kind)[0]

    def next_token(self, prefix: Sequence[str], kind: str | None = None) -> dict[str, float]:
        """The exact probability of every token that may come after `prefix`; see `follow`."""
        return self.follow(prefix, kind)[1]

    def fill_in(self, tokens: Sequence[str], position: int, kind: str | None = None) -> dict[str, float]:
        """The exact posterior of one token given all the others, before and after it; what stands there is ignored.

        Bayes' rule: p(document with this token) over the sum of that for every token that may stand there.
        """
        chances: dict[str, float] = {}
        for token in self.next_token(tokens[:position], kind):
            with suppress(ValueError):  # no document has this token here
                nats = sum(self.surprisal([*tokens[:position], token, *tokens[position + 1 :]], kind))
                chances[token] = math.exp(-nats)
        total = sum(chances.values())
        if not total:
            raise ValueError(f"no token at position {position} makes this a possible document")
        return {token: chance / total for token, chance in chances.items()}


# The world: what the other topics call


class World(Language):
    """A language with its facts, instructions and questions: World(seed=0, bias=0.9) or World(WorldConfig(...))."""

    def enumerate(self, kind: str | None = None, most: int = 1_000_000) -> dict[str, float]:
        """Map every text of a kind to its probability. Raises ValueError beyond `most`: use a world of fewer words."""
        return enumerate_texts(partial(self.write, kind=kind), most)

    def entropy(self, n: int, seed: int, kind: str | None = None) -> tuple[float, float]:
        """Estimate the entropy in nats per token from n documents; return it with its standard error."""
        return ratio_of_means([(sum(item.surprisal), len(item.tokens)) for item in self.documents(n, seed, kind=kind)])

    def vocabulary(self) -> list[str]:
        """The special tokens, then every token of any document, instruction or question about unseen people, sorted."""
        return list(vocabulary_of(self.config))

    def instructions(self, n: int, seed: int, split: str = "train", category: str | None = None) -> list[Instruction]:
        """Draw n instructions of one category, or of all in equal shares; `split` is a key of INSTRUCTION_SPLITS."""
        if split not in INSTRUCTION_SPLITS:
            raise ValueError(f"unknown split {split!r}; use {', '.join(INSTRUCTION_SPLITS)}")
        if category not in (None, *INSTRUCT):
            raise ValueError(f"unknown category {category!r}; use {', '.join(INSTRUCT)} or None")
        rng = random.Random(seed)
        return [write_instruction(self, rng, category or pick(rng, tuple(INSTRUCT)), split) for _ in range(n)]

    def questions(self, topic: str, n: int, seed: int) -> list[tuple[list[str], list[str]]]:
        """Draw n pairs (text up to an answer, the answer with its full stop), for a model to complete.

        `topic` is a kind, or: "asked" and "unasked" (closed book: people that quizzes do or do not ask about), "unseen"
        (open book, about people that no document names), "new sums" (held-out operands).
        """
        rng, found = random.Random(seed), []
        while len(found) < n:
            document = self.examine(rng, topic)
            if document.answers:
                start, end = pick(rng, document.answers)
                found.append((document.tokens[:start], document.tokens[start : end + 1]))
        return found

    def examine(self, rng: random.Random, topic: str) -> Document:
        """Draw one document with answers on a topic of `questions`; a kind may give one without."""
        draw = Sampler(rng)
        if topic in ("asked", "unasked"):
            people = {"asked": self.asked, "unasked": self.unasked}[topic]
            if not people:
                raise ValueError(f"this world has no {topic} people; lower asked_share={self.config.asked_share}")
            person, name = pick(rng, people), pick(rng, tuple(ATTRIBUTES))
            start, end = ATTRIBUTES[name].question
            draw.say(f"{GRAMMAR['quiz'][0]} {start} {person} {end} Answer :")
            draw.answer(self.facts[person][name])
            draw.say(".")
        elif topic == "new sums":
            first, second = pick(rng, self.held_out_sums)
            draw.say(f"{GRAMMAR['sums'][0]} {first} + {second} =")
            draw.answer(str(first + second))
            draw.say(".")
        elif topic == "unseen":
            draw.say(GRAMMAR["news"][0])
            write_news(self, draw, surnames_by_name(self.unseen))
        elif topic in ("roles", "canary"):
            raise ValueError(f"documents of kind {topic!r} hold no questions")
        else:
            return self.document(rng, topic)
        return Document(topic, draw.tokens, draw.surprisal, draw.facts, draw.answers)


@cache
def vocabulary_of(config: WorldConfig) -> tuple[str, ...]:
    """What `World.vocabulary` says, once for each configuration.

    These are the word lists, the numbers, and the words between them as 300 documents of each kind show them.
    """
    world = World(config)
    seen = {word for person in (*world.known, *world.unseen) for word in person.split()}
    seen.update(*world.words.values(), world.names, SURNAMES[: config.max_words], world.workers)
    seen.update(good[:-1] for good in world.words["goods"])
    seen.update(str(number) for number in range(2 * config.max_sum + 1))
    seen.update(*world.canaries.tokens, *SECRETS.values())
    for kind in world.kinds:
        seen.update(*(document.tokens for document in world.documents(300, seed=0, kind=kind)))
    for category in INSTRUCT:
        seen.update(*(item.tokens for item in world.instructions(100, seed=0, category=category)))
    return (*SPECIAL_TOKENS, *sorted(seen - set(SPECIAL_TOKENS)))


# What can go wrong with data, and how strong each kind is


@dataclass(frozen=True)
class Leak:
    """A validation document that training gives away: `shared` is what both sides hold."""

    index: int  # of the validation document
    reason: str  # "exact copy" or "shared passage"
    shared: str


def leaks(train: Sequence[Document], validation: Sequence[Document], doubt: float = 0.001) -> list[Leak]:
    """Find validation documents that stand in the training documents, whole or in a passage beyond coincidence.

    The documents of two sides share no text, so every exact copy is a leak. A shared passage is one if it is too
    surprising to be written twice: the chance that a fresh document repeats, from a given place on, a given passage of
    s nats is at most exp(-s), because that is the probability of these tokens. There are (training tokens) x
    (validation tokens) pairs of places, so passages of at least log(pairs / doubt) nats turn up by chance in at most
    a fraction `doubt` of all such searches. What the grammar repeats anyway (persistent facts, fixed wording, answers)
    has no surprisal and does not count; a passage of fewer nats cannot be told from coincidence by anyone.
    """
    copies, letters = {document.text for document in train}, {}

    def spelled(tokens: Sequence[str]) -> str:  # one character for each token: passages become substrings
        return "".join([letters.setdefault(token, chr(0x100 + len(letters))) for token in tokens])

    corpus = "\n".join(spelled(document.tokens) for document in train)
    pairs = len(corpus) * sum(len(document.tokens) for document in validation)
    enough, found = math.log(max(pairs, 1) / doubt), []
    for index, document in enumerate(validation):
        if document.text in copies:
            found.append(Leak(index, "exact copy", document.text))
            continue
        spelling, booked = spelled(document.tokens), [0.0, *itertools.accumulate(document.surprisal)]
        for start in range(len(spelling)):
            end = bisect_left(booked, booked[start] + enough)
            if document.surprisal[start] and end < len(booked) and spelling[start:end] in corpus:
                found.append(Leak(index, "shared passage", join(document.tokens[start:end])))
                break
    return found


@dataclass(frozen=True)
class KindStatistics:
    """How strong one kind of document is, measured on a sample."""

    kind: str
    share: float  # of the documents of a mixed sample
    tokens: float  # mean length, <eos> included
    longest: int
    nats: float  # mean surprisal of a document of this kind, the choice of the kind left out
    entropy: float  # nats per token
    error: float  # standard error of the entropy
    repeats: float  # fraction of the sample that stood in it before


def statistics(world: World, n: int, seed: int) -> list[KindStatistics]:
    """Measure every kind on n documents of its own."""
    shares, rows = Counter(document.kind for document in world.documents(n, seed)), []
    for kind in world.kinds:
        sample = world.documents(n, seed, kind=kind)
        pairs = [(sum(document.surprisal), len(document.tokens)) for document in sample]
        nats, tokens = (sum(column) / n for column in zip(*pairs, strict=True))
        repeats = 1 - len({document.text for document in sample}) / n
        longest = max(length for _, length in pairs)
        rows.append(KindStatistics(kind, shares[kind] / n, tokens, longest, nats, *ratio_of_means(pairs), repeats))
    return rows


def plot_surprisal(document: Document, rows: list[KindStatistics]) -> Figure:
    """Draw the surprisal of each token of a document, and the entropy of each kind with its standard error."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), height_ratios=(3, 2))
    top.bar(range(len(document.tokens)), document.surprisal)
    top.set_xticks(range(len(document.tokens)), document.tokens, rotation=90, fontsize=9)
    top.set(ylabel="surprisal (nats)", title=f"one document, its kind given: {sum(document.surprisal):.2f} nats")
    top.margins(x=0.01)
    kinds, entropies = [row.kind for row in rows], [row.entropy for row in rows]
    bottom.bar(kinds, entropies, yerr=[row.error for row in rows], color="C2")
    bottom.set(ylabel="entropy (nats per token)", title="the kinds of document")
    return figure


# The verbs


@dataclass(frozen=True)
class SampleConfig:
    """What to draw. The world and the sample both start from --seed."""

    kind: str = "all"  # kind of document, or all
    split: Literal["both", "train", "validation"] = "both"  # side of the split by content
    n_documents: int = 10  # how many

    def __post_init__(self) -> None:
        check_range(self, "n_documents", least=1)


@dataclass(frozen=True)
class ScoreConfig:
    """What to score."""

    text: tuple[str, ...] = ()  # a document, or the beginning of one

    def __post_init__(self) -> None:
        if not words(" ".join(self.text)):
            raise ValueError('nothing to score; give a text, such as score "Sum: 2 + 3 = 5."')


def demo(run: RunConfig) -> None:
    """Show one document of each kind, the entropy of each kind, and draw the surprisal of one story."""
    n, world = 2000, World(seed=run.seed)
    announce(f"Draw {n * (len(world.kinds) + 2)} documents of {len(world.kinds)} kinds", seconds=4)
    for kind in world.kinds:
        document = world.document(random.Random(run.seed + 4), kind)
        print(f"{kind:6} {sum(document.surprisal):5.1f} nats  {document.text}")
    rows = statistics(world, n, run.seed)
    print(f"\n{'kind':6} {'share':>6} {'tokens':>7} {'longest':>8} {'nats':>6} {'nats per token':>17} {'repeats':>8}")
    for row in rows:
        sizes = f"{row.share:6.1%} {row.tokens:7.1f} {row.longest:8d} {row.nats:6.1f}"
        print(f"{row.kind:6} {sizes} {row.entropy:7.3f} +- {row.error:.4f} {row.repeats:9.1%}")
    entropy, error = world.entropy(n, run.seed)
    uniform = math.log(len(world.vocabulary()))
    print(f"\nno model can beat {entropy:.3f} +- {error:.3f} nats per token; guessing evenly costs {uniform:.3f}")
    save_figure(plot_surprisal(world.document(random.Random(run.seed), "story"), rows), run.out / "surprisal.svg")


def sample(config: SampleConfig, run: RunConfig) -> None:
    """Print documents, one a line."""
    world = World(seed=run.seed)
    kind, split = (None if value in ("all", "both") else value for value in (config.kind, config.split))
    for document in world.documents(config.n_documents, run.seed, split, kind):
        print(document.text)


def score(config: ScoreConfig, run: RunConfig) -> None:
    """Print the surprisal of each token of a text, and what may come next."""
    world, tokens = World(seed=run.seed), words(" ".join(config.text))
    nats, allowed = world.follow(tokens)
    for token, value in zip(tokens, nats, strict=True):
        print(f"{value:7.4f}  {token}")
    print(f"{sum(nats):7.4f}  nats in all")
    for token, chance in sorted(allowed.items(), key=lambda item: -item[1])[:5]:
        print(f"{chance:7.2%}  {token!r} may come next")


def bench(run: RunConfig) -> None:
    """Measure how many documents a second one core writes and scores (processor time, best of five)."""
    world, n = World(seed=run.seed), 2000
    announce(f"Write {n} documents of each kind five times", seconds=8)

    def rate(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return n / min(times)

    mixed = world.documents(n, run.seed)
    work = {"mixture": partial(world.documents, n, run.seed)}
    work |= {kind: partial(world.documents, n, run.seed, kind=kind) for kind in world.kinds}
    work["one side"] = partial(world.documents, n, run.seed, "train")
    work["scoring"] = lambda: [world.surprisal(document.tokens) for document in mixed]
    print(describe_machine())
    for name, task in work.items():
        print(f"{name:8} {rate(task):9,.0f} documents/s")


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "demo": (demo, RunConfig),
        "sample": (sample, SampleConfig, RunConfig),
        "score": (score, ScoreConfig, RunConfig),
        "bench": (bench, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
