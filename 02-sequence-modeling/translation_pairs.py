"""Topic 02 - Translation pairs: two real sequence-to-sequence tasks with known alignment, and any TSV file of pairs.

python 02-sequence-modeling/translation_pairs.py                         # pairs of every task and split
python 02-sequence-modeling/translation_pairs.py sample --task dates --n-pairs 20
python 02-sequence-modeling/translation_pairs.py --help

`french` (words): English sentences into French, with gender and number agreement, adjectives before and after the noun,
elision (l'arbre), liaison forms (un vieil arbre), contraction (près du jardin), negation around the verb, object
pronouns that move before it, and the compound past with its agreement (elle les a vus). Where English leaves a choice
open, a rule decides: `they` is `ils`, `them` is masculine, `your` is `votre`.

`dates` (characters): dates as people write them into ISO 8601. Numeric dates are read day first; a year of two digits
lies between 1950 and 2049.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import datetime
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench import check_range, run_verbs


@dataclass(frozen=True)
class Pair:
    """A source and its target. `alignment[i]` holds the source positions that target token i comes from."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    alignment: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Task:
    """A stream of pairs with a training distribution and held-out splits, disjoint by construction."""

    name: str
    splits: dict[str, str]  # split -> what it holds out
    draw: Callable[[random.Random, str], Pair]  # one random pair of a split
    unit: Literal["words", "characters"]


def sample_pairs(task: Task, n_pairs: int, seed: int, split: str = "train") -> list[Pair]:
    """Draw `n_pairs` different pairs of one split; the same seed gives the same pairs on every machine."""
    if split not in task.splits:
        raise ValueError(f"unknown split {split!r} of task {task.name!r}; use one of {sorted(task.splits)}")
    rng, found = random.Random(f"{seed} {split}"), {}
    for _ in range(100 * n_pairs):
        if len(found) == n_pairs:
            break
        pair = task.draw(rng, split)
        found.setdefault(pair.source, pair)
    if len(found) < n_pairs:
        raise ValueError(f"split {split!r} of {task.name!r} has only about {len(found)} pairs, asked for {n_pairs}")
    return list(found.values())


def is_held_out(text: str, share: int = 10) -> bool:
    """Whether a text belongs to the held-out tenth: decided by its content, so that no seed can move it."""
    return zlib.crc32(text.encode()) % share == 0


# Words and characters


def tokenize(text: str, unit: str) -> tuple[str, ...]:
    """Split a text into words (lower case; an apostrophe ends a word: l' arbre) or into characters."""
    if unit == "characters":
        return tuple(text.strip())
    return tuple(re.findall(r"\w+['’]?|[^\w\s]", text.strip().lower().replace("’", "'")))


def join_tokens(tokens: tuple[str, ...] | list[str], unit: str) -> str:
    """The inverse of `tokenize` for what the tasks produce."""
    if unit == "characters":
        return "".join(tokens)
    return re.sub(r" ([.,!?])", r"\1", " ".join(tokens)).replace("' ", "'")


# English to French


@dataclass(frozen=True)
class Noun:
    plural: str  # English plural
    french: str
    gender: Literal["m", "f"]
    french_plural: str


@dataclass(frozen=True)
class Adjective:
    forms: tuple[str, str, str, str]  # masculine, feminine, masculine plural, feminine plural
    before: bool  # whether it stands before the noun
    before_vowel: str = ""  # the masculine form before a vowel, where it differs


@dataclass(frozen=True)
class Verb:
    base: str  # English base form, with its preposition: "look for"
    past: str
    present: str  # French, third person singular
    present_plural: str
    participle: str


def noun(english: str, french: str, gender: str, plural: str = "", french_plural: str = "") -> tuple[str, Noun]:
    return english, Noun(plural or english + "s", french, gender, french_plural or french + "s")


NOUNS = dict(
    [
        noun("cat", "chat", "m"),
        noun("dog", "chien", "m"),
        noun("house", "maison", "f"),
        noun("table", "table", "f"),
        noun("book", "livre", "m"),
        noun("car", "voiture", "f"),
        noun("tree", "arbre", "m"),
        noun("flower", "fleur", "f"),
        noun("garden", "jardin", "m"),
        noun("school", "école", "f"),
        noun("teacher", "professeur", "m"),
        noun("boy", "garçon", "m"),
        noun("girl", "fille", "f"),
        noun("friend", "ami", "m"),
        noun("man", "homme", "m", "men"),
        noun("woman", "femme", "f", "women"),
        noun("child", "enfant", "m", "children"),
        noun("apple", "pomme", "f"),
        noun("bird", "oiseau", "m", "", "oiseaux"),
        noun("horse", "cheval", "m", "", "chevaux"),
        noun("boat", "bateau", "m", "", "bateaux"),
        noun("hat", "chapeau", "m", "", "chapeaux"),
        noun("window", "fenêtre", "f"),
        noun("door", "porte", "f"),
        noun("street", "rue", "f"),
        noun("star", "étoile", "f"),
        noun("island", "île", "f"),
        noun("train", "train", "m"),
        noun("letter", "lettre", "f"),
        noun("church", "église", "f", "churches"),
    ]
)
ADJECTIVES = {
    "small": Adjective(("petit", "petite", "petits", "petites"), True),
    "big": Adjective(("grand", "grande", "grands", "grandes"), True),
    "young": Adjective(("jeune", "jeune", "jeunes", "jeunes"), True),
    "pretty": Adjective(("joli", "jolie", "jolis", "jolies"), True),
    "old": Adjective(("vieux", "vieille", "vieux", "vieilles"), True, "vieil"),
    "new": Adjective(("nouveau", "nouvelle", "nouveaux", "nouvelles"), True, "nouvel"),
    "beautiful": Adjective(("beau", "belle", "beaux", "belles"), True, "bel"),
    "black": Adjective(("noir", "noire", "noirs", "noires"), False),
    "white": Adjective(("blanc", "blanche", "blancs", "blanches"), False),
    "green": Adjective(("vert", "verte", "verts", "vertes"), False),
    "red": Adjective(("rouge", "rouge", "rouges", "rouges"), False),
    "blue": Adjective(("bleu", "bleue", "bleus", "bleues"), False),
    "round": Adjective(("rond", "ronde", "ronds", "rondes"), False),
    "sad": Adjective(("triste", "triste", "tristes", "tristes"), False),
}
VERBS = {
    "sees": Verb("see", "saw", "voit", "voient", "vu"),
    "loves": Verb("love", "loved", "aime", "aiment", "aimé"),
    "takes": Verb("take", "took", "prend", "prennent", "pris"),
    "finds": Verb("find", "found", "trouve", "trouvent", "trouvé"),
    "watches": Verb("watch", "watched", "regarde", "regardent", "regardé"),
    "draws": Verb("draw", "drew", "dessine", "dessinent", "dessiné"),
    "wants": Verb("want", "wanted", "veut", "veulent", "voulu"),
    "waits for": Verb("wait for", "waited for", "attend", "attendent", "attendu"),
    "looks for": Verb("look for", "looked for", "cherche", "cherchent", "cherché"),
    "listens to": Verb("listen to", "listened to", "écoute", "écoutent", "écouté"),
}
POSSESSIVES = {
    "my": ("mon", "ma", "mes"),
    "his": ("son", "sa", "ses"),
    "her": ("son", "sa", "ses"),
    "our": ("notre", "notre", "nos"),
    "your": ("votre", "votre", "vos"),
}
PREPOSITIONS = {"in": "dans", "under": "sous", "behind": "derrière", "near": "près de", "opposite": "en face de"}
PRONOUNS = {"he": ("il", False), "she": ("elle", False), "they": ("ils", True)}
OBJECT_PRONOUNS = {"him": ("le", ""), "her": ("la", "e"), "them": ("les", "s")}  # and the participle's ending

Aligned = list[tuple[str, int]]  # French words, each with the position of the English word it comes from


def begins_with_vowel(word: str) -> bool:
    """Whether a word elides the one before it; every h of this vocabulary is mute."""
    return word[0] in "aeiouhéèêî"


@dataclass
class Sentence:
    """An English sentence and its translation under construction."""

    rng: random.Random
    english: list[str]
    french: Aligned
    pairs: list[tuple[str, str]]  # every (adjective, noun) used: whole pairs can be held out

    def add(self, *words: str) -> int:
        """Append English words and return the position of the first."""
        self.english += words
        return len(self.english) - len(words)

    def noun_phrase(self, negated: bool = False, simple: bool = False) -> tuple[Aligned, bool]:
        """Add a noun phrase; return its French words and whether it is plural. `simple`: always with `the`."""
        rng, name = self.rng, self.rng.choice(list(NOUNS))
        item, plural = NOUNS[name], rng.random() < 0.4
        front = rng.choice([a for a in ADJECTIVES if ADJECTIVES[a].before]) if rng.random() < 0.35 else None
        back = rng.choice([a for a in ADJECTIVES if not ADJECTIVES[a].before]) if rng.random() < 0.3 else None
        chosen = [adjective for adjective in (front, back) if adjective]
        self.pairs += [(adjective, name) for adjective in chosen]
        english = [*chosen, item.plural if plural else name]
        kind = "the" if simple else rng.choice(["the", "a", "this", "number", *POSSESSIVES])
        determiner = english_determiner(rng, kind, plural, negated, english[0])
        at = self.add(determiner, *english)
        spot = {adjective: at + 1 + i for i, adjective in enumerate(chosen)}
        form = 2 * plural + (item.gender == "f")
        body: Aligned = [(item.french_plural if plural else item.french, at + len(english))]
        if front:
            adjective = ADJECTIVES[front]
            special = adjective.before_vowel and form == 0 and begins_with_vowel(body[0][0])
            body.insert(0, (adjective.before_vowel if special else adjective.forms[form], spot[front]))
        if back:
            body.append((ADJECTIVES[back].forms[form], spot[back]))
        french = french_determiner(determiner, item.gender, plural, negated, body[0][0], bool(front))
        return [(french, at), *body], plural

    def clause(self, n_phrases: int) -> None:
        """Add subject, verb, object and `n_phrases` prepositional phrases."""
        rng = self.rng
        if rng.random() < 0.25:
            name = rng.choice(list(PRONOUNS))
            word, plural = PRONOUNS[name]
            self.french.append((word, self.add(name)))
        else:
            subject, plural = self.noun_phrase()
            self.french += subject
        negated, past, verb = rng.random() < 0.3, rng.random() < 0.4, VERBS[name := rng.choice(list(VERBS))]
        if negated:
            helper = "did" if past else "do" if plural else "does"
            at_helper = self.add(helper, "not")
            at_not, at_verb = at_helper + 1, self.add(*verb.base.split())
        else:
            at_helper = at_verb = at_not = self.add(*(verb.past if past else verb.base if plural else name).split())
        pronoun, ending, rest = None, "", []
        if rng.random() < 0.25:
            name = rng.choice(list(OBJECT_PRONOUNS))
            word, ending = OBJECT_PRONOUNS[name]
            pronoun = (word, self.add(name))
        else:
            rest, _ = self.noun_phrase(negated=negated)
        if past:
            ending = "" if verb.participle.endswith("s") and ending == "s" else ending  # pris keeps its own s
            finite, after = ("ont" if plural else "a", at_helper), [(verb.participle + ending, at_verb)]
        else:
            finite, after = (verb.present_plural if plural else verb.present, at_verb), []
        group: Aligned = [finite]
        if pronoun:
            elided = pronoun[0] != "les" and begins_with_vowel(finite[0])
            group.insert(0, ("l'" if elided else pronoun[0], pronoun[1]))
        if negated:
            group = [("n'" if begins_with_vowel(group[0][0]) else "ne", at_not), *group, ("pas", at_not)]
        self.french += group + after + rest
        for _ in range(n_phrases):
            self.prepositional_phrase()

    def prepositional_phrase(self) -> None:
        name = self.rng.choice(list(PREPOSITIONS))
        at, words = self.add(name), PREPOSITIONS[name].split()
        phrase, _ = self.noun_phrase(simple=True)
        if words[-1] == "de" and phrase[0][0] in ("le", "les"):  # de + le = du, de + les = des
            words.pop()
            phrase[0] = ({"le": "du", "les": "des"}[phrase[0][0]], phrase[0][1])
        self.french += [(word, at) for word in words] + phrase


def english_determiner(rng: random.Random, kind: str, plural: bool, negated: bool, following: str) -> str:
    if kind == "number":
        return rng.choice(["two", "three"]) if plural else "one"
    if kind == "a":
        return ("any" if negated else "some") if plural else ("an" if following[0] in "aeiou" else "a")
    return "these" if kind == "this" and plural else kind


def french_determiner(
    determiner: str, gender: str, plural: bool, negated: bool, following: str, adjective: bool
) -> str:
    """The French determiner; `adjective` says whether an adjective comes between it and the noun."""
    vowel, feminine = begins_with_vowel(following), gender == "f"
    if determiner in POSSESSIVES:
        masculine_form, feminine_form, plural_form = POSSESSIVES[determiner]
        return plural_form if plural else feminine_form if feminine and not vowel else masculine_form
    if determiner in ("a", "an", "some", "any"):
        if negated or (plural and adjective):  # pas de chat; de petits chats
            return "d'" if vowel else "de"
        return "des" if plural else "une" if feminine else "un"
    if determiner == "the":
        return "les" if plural else "l'" if vowel else "la" if feminine else "le"
    if determiner in ("this", "these"):
        return "ces" if plural else "cette" if feminine else "cet" if vowel else "ce"
    return {"one": "une" if feminine else "un", "two": "deux", "three": "trois"}[determiner]


def draw_french(rng: random.Random, split: str) -> Pair:
    while True:
        sentence = Sentence(rng, [], [], [])
        sentence.clause({"longer": 2}.get(split) or rng.randrange(2))
        has_new_pair = any(is_held_out(" ".join(pair)) for pair in sentence.pairs)
        held_out = is_held_out(" ".join(sentence.english))
        if has_new_pair == (split == "new-pairs") and (
            held_out == (split != "train") or split in ("new-pairs", "longer")
        ):
            words = tuple(word for word, _ in sentence.french)
            return Pair(tuple(sentence.english), words, tuple((position,) for _, position in sentence.french))


FRENCH = Task(
    "french",
    {
        "train": "sentences with at most one prepositional phrase",
        "test": "other sentences of the same kind",
        "new-pairs": "an adjective and a noun that never stood together in training",
        "longer": "two prepositional phrases, where training has at most one",
    },
    draw_french,
    "words",
)


# Dates to ISO 8601


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FORMATS = (  # d, dd, th: the day; M, m: the month; yyyy, yy: the year; W: the weekday
    "{d} {M} {yyyy}",
    "{M} {d}, {yyyy}",
    "{W}, {d} {M} {yyyy}",
    "{W} {M} {th} {yyyy}",
    "the {th} of {M}, {yyyy}",
    "{d}/{m}/{yyyy}",
    "{dd}.{mm}.{yyyy}",
    "{M} {d} '{yy}",
    "{d}-{M}-{yyyy}",
    "{yyyy} {M} {d}",
)
NEW_FORMATS = ("{yyyy}, the {th} of {M}", "{th} {M} {yyyy}", "{W} {dd}/{mm}/{yyyy}")
FIELD_OF = {
    "d": "day",
    "dd": "day",
    "th": "day",
    "M": "month",
    "m": "month",
    "mm": "month",
    "yyyy": "year",
    "yy": "year",
}


def ordinal(number: int) -> str:
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def draw_date(rng: random.Random, split: str) -> Pair:
    first, last = (1900, 1949) if split == "new-years" else (1950, 2049)
    start, end = datetime.date(first, 1, 1).toordinal(), datetime.date(last, 12, 31).toordinal()
    date = datetime.date.fromordinal(rng.randint(start, end))
    while is_held_out(date.isoformat()) == (split == "train"):
        date = datetime.date.fromordinal(rng.randint(start, end))
    templates = NEW_FORMATS if split == "new-format" else FORMATS
    template = rng.choice([t for t in templates if "{yy}" not in t or split != "new-years"])
    month, weekday = MONTHS[date.month - 1], WEEKDAYS[date.weekday()]
    values = {
        "d": str(date.day),
        "dd": f"{date.day:02d}",
        "th": ordinal(date.day),
        "M": month[:3] if rng.random() < 0.4 else month,
        "m": str(date.month),
        "mm": f"{date.month:02d}",
        "yyyy": str(date.year),
        "yy": f"{date.year % 100:02d}",
        "W": weekday[:3] if rng.random() < 0.4 else weekday,
    }
    text, spans = "", {}
    for literal, field in re.findall(r"([^{}]*)(?:\{(\w+)\})?", template):
        text += literal
        if field:
            spans[FIELD_OF.get(field, field)] = tuple(range(len(text), len(text) + len(values[field])))
            text += values[field]
    case = rng.random()
    text = text.lower() if case < 0.25 else text.upper() if case < 0.4 else text
    separator = tuple(range(len(text)))
    alignment = [spans["year"]] * 4 + [separator] + [spans["month"]] * 2 + [separator] + [spans["day"]] * 2
    return Pair(tuple(text), tuple(date.isoformat()), tuple(alignment))


DATES = Task(
    "dates",
    {
        "train": "nine tenths of the dates from 1950 to 2049, in ten formats",
        "test": "the other dates, same formats",
        "new-format": "the other dates, in three formats that training never shows",
        "new-years": "1900 to 1949, years that training never shows",
    },
    draw_date,
    "characters",
)
TASKS = {task.name: task for task in (FRENCH, DATES)}


# The reader's own pairs


def read_pairs(path: Path, unit: str = "words") -> list[Pair]:
    """Read `source<TAB>target` lines (UTF-8; blank lines are skipped).

    Raises ValueError naming the file, the line and the reason.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    pairs = []
    for number, line in enumerate(
        path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1
    ):  # no byte-order mark
        try:
            columns = line.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid UTF-8 at byte {error.start} of the line") from None
        if not line.strip():
            continue
        if len(columns) != 2:
            raise ValueError(f"{path}:{number}: expected source<TAB>target, found {len(columns)} columns")
        source, target = (tokenize(column, unit) for column in columns)
        if not source or not target:
            raise ValueError(f"{path}:{number}: the {'source' if not source else 'target'} is empty")
        pairs.append(Pair(source, target))
    if not pairs:
        raise ValueError(f"{path}: no pairs; every line needs source<TAB>target")
    return pairs


def split_pairs(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Split by the content of the source: about a tenth is held out, and no held-out source is in training."""
    splits: dict[str, list[Pair]] = {"train": [], "test": []}
    for pair in pairs:
        splits["test" if is_held_out(" ".join(pair.source)) else "train"].append(pair)
    return splits


# The verbs


@dataclass(frozen=True)
class SampleConfig:
    task: Literal["french", "dates"] = "french"  # which pairs
    split: str = "train"  # train, test, or one of the task's held-out splits
    n_pairs: int = 10  # how many
    seed: int = 0  # seed of the draw

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", least=1)
        check_range(self, "seed", least=0, below=2**31)


def lines(pairs: list[Pair], unit: str) -> Iterator[str]:
    for pair in pairs:
        yield f"{join_tokens(pair.source, unit)}\t{join_tokens(pair.target, unit)}"


def demo() -> None:
    """Show three pairs of every task and split."""
    for task in TASKS.values():
        for split, meaning in task.splits.items():
            print(f"{task.name}, {split}: {meaning}")
            for line in lines(sample_pairs(task, 3, seed=0, split=split), task.unit):
                print("    " + line.replace("\t", "  ->  "))


def sample(config: SampleConfig) -> None:
    """Print pairs as source<TAB>target lines, the format that `train --data` reads."""
    task = TASKS[config.task]
    print("\n".join(lines(sample_pairs(task, config.n_pairs, config.seed, config.split), task.unit)))


def main(argv: list[str] | None = None) -> None:
    run_verbs(__doc__, {"demo": (demo,), "sample": (sample, SampleConfig)}, argv)


if __name__ == "__main__":
    main()
