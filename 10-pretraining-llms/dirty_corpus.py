"""Topic 10 - Dirty corpus: a crawl as dirty as the web's, with the truth about every page written beside it.

    pages = dirty_corpus(DirtConfig(n_pages=500), seed=0)      # list of Page, in the order of a crawl
    page.text, page.label, page.detail                         # "near", "5 % of the words changed"
    evaluation_documents(60)                                   # what must not be trained on, and partly is

The good pages are documents of TinyWorld, whose floor is known, and paragraphs of the Python documentation. Planted
among them: exact and edited copies, junk of seven kinds, word salad and spam, French and German, repairable damage,
private data with look-alikes that are none, secrets (canaries), and documents of the evaluation set.

Private data is made up: addresses of RFC 2606 and RFC 5737, telephone numbers reserved for fiction, card and account
numbers drawn at random and completed with their check digits.
"""

import html
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from python_text import python_text
from tiny_world import Document, World, canary_text, pick, words
from translation_pairs import FRENCH, join_tokens
from workbench import check_range

LABELS = {  # label -> what a page with it is, and what should become of it
    "good": "as it should be: keep",
    "damaged": "good text with repairable damage: repair and keep",
    "private": "good text with personal data in it: mask and keep",
    "canary": "good text with a secret sentence in it",
    "leaked": "good text with a document of the evaluation set in it: remove",
    "exact": "the same text as an earlier page: remove",
    "near": "an earlier page with some words changed: remove",
    "junk": "no sentences: remove",
    "salad": "words without order, or spam: remove",
    "foreign": "another language: remove",
}
TO_REMOVE = ("leaked", "exact", "near", "junk", "salad", "foreign")
N_EVALUATION = 60  # documents of the evaluation set
EVALUATION_SEED = 2  # of TinyWorld's validation side


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the crawl. Paragraphs stand between blank lines."""

    text: str
    source: str  # world, python or web
    label: str  # key of LABELS
    detail: str = ""  # which kind of junk, damage or edit
    original: str = ""  # the undamaged text, or the page that this is a copy of
    secrets: tuple[tuple[str, str], ...] = ()  # (kind, text) of personal data
    decoys: tuple[str, ...] = ()  # looks like personal data, is none
    leak: int = -1  # number of the evaluation document

    @property
    def paragraphs(self) -> list[str]:
        return self.text.split("\n\n")


@dataclass(frozen=True)
class DirtConfig:
    """How much of what is planted. Shares are per good page: 0.2 means one bad page for five good ones."""

    n_pages: int = 1000  # good pages
    python_share: float = 0.2  # fraction of the good pages that are Python documentation
    damaged_share: float = 0.2  # fraction of the good pages with repairable damage
    private_share: float = 0.1  # fraction of the good pages with personal data
    exact_share: float = 0.15  # exact copies
    near_share: float = 0.15  # copies with 1 % to 20 % of the words changed
    junk_share: float = 0.2  # pages of junk
    salad_share: float = 0.1  # pages of word salad and spam
    foreign_share: float = 0.15  # pages in French and German
    n_leaks: int = N_EVALUATION  # documents of the evaluation set that are in the crawl
    leak_copies: int = 1  # different pages that each of them is in
    canaries: tuple[tuple[str, int], ...] = ()  # (secret sentence, how often it occurs)
    copied_canaries: bool = False  # a canary's occurrences are copies of one page; otherwise each is on its own page

    def __post_init__(self) -> None:
        check_range(self, "n_pages", least=1)
        check_range(self, "python_share", "damaged_share", "private_share", least=0, most=1)
        names = ("exact_share", "near_share", "junk_share", "salad_share", "foreign_share")
        check_range(self, *names, least=0, most=10)
        check_range(self, "n_leaks", least=0)
        check_range(self, "leak_copies", least=1)
        if self.damaged_share + self.private_share > 1:
            raise ValueError("damaged_share + private_share must be <= 1: a page has one of the two")

    def scaled(self, factor: float) -> "DirtConfig":
        """The same good pages with `factor` times as many bad ones."""
        names = ("exact_share", "near_share", "junk_share", "salad_share", "foreign_share")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


# Good pages


def world_page(documents: Iterator[Document], rng: random.Random) -> str:
    """Four to eight documents of TinyWorld, one to a paragraph."""
    return "\n\n".join(next(documents).text for _ in range(4 + int(5 * rng.random())))


@cache
def python_pages() -> tuple[str, ...]:
    """Neighbouring paragraphs of the Python documentation, 400 characters or more to a page."""
    found, page = [], ""
    for paragraph in python_text("train"):
        page += ("\n\n" if page else "") + paragraph
        if len(page) >= 400:
            found.append(page)
            page = ""
    return tuple(found)


def good_pages(config: DirtConfig, documents: Iterator[Document], rng: random.Random) -> list[Page]:
    n_python = round(config.python_share * config.n_pages)
    python = rng.sample(python_pages(), min(n_python, len(python_pages()))) if n_python else []
    pages = [Page(text, "python", "good") for text in python]
    pages += [Page(world_page(documents, rng), "world", "good") for _ in range(config.n_pages - len(pages))]
    rng.shuffle(pages)
    return pages


def evaluation_documents(n_documents: int) -> list[Document]:
    """Stories and news of TinyWorld's validation side: long enough to be told from others by their words."""
    documents = World().stream(EVALUATION_SEED, split="validation")
    found = (document for document in documents if document.kind in ("story", "news"))
    return [next(found) for _ in range(n_documents)]


# Junk: no sentences at all


WEB_WORDS = """Home About Contact Login Register Help Shop Blog Terms Privacy Search Sitemap Careers Press FAQ Videos
Photos Forum Archive Menu""".split()
TAGS = ("div", "span", "li", "td", "a", "ul", "nav")


def symbol_soup(rng: random.Random) -> str:
    signs = "#*=_-~|<>^%$@+\\/{}[]"
    return " ".join(
        "".join(pick(rng, signs) for _ in range(1 + int(9 * rng.random()))) for _ in range(60 + int(60 * rng.random()))
    )


def repeated_lines(rng: random.Random) -> str:
    lines = [f"{pick(rng, WEB_WORDS)} the {pick(rng, WEB_WORDS)} and {pick(rng, WEB_WORDS)} now." for _ in range(3)]
    return "\n".join(pick(rng, lines) for _ in range(20 + int(20 * rng.random())))


def cut_markup(rng: random.Random) -> str:
    parts = []
    for _ in range(30 + int(30 * rng.random())):
        tag, name = pick(rng, TAGS), pick(rng, WEB_WORDS).lower()
        parts.append(f'<{tag} class="{name}-{int(99 * rng.random())}" href="/{name}">{pick(rng, WEB_WORDS)}</{tag}>')
    text = "".join(parts)
    return text[: int(len(text) * (0.8 + 0.2 * rng.random()))]


def navigation(rng: random.Random) -> str:
    mark = pick(rng, (" | ", " > ", " - ", "\n"))
    return mark.join(pick(rng, WEB_WORDS) for _ in range(60 + int(60 * rng.random())))


def number_table(rng: random.Random) -> str:
    rows = ["\t".join(f"{1000 * rng.random():.2f}" for _ in range(6)) for _ in range(12 + int(10 * rng.random()))]
    return "\n".join(rows)


def server_log(rng: random.Random) -> str:
    """Lines that a machine wrote, with words enough to pass for sentences."""
    places = "home shop blog forum help".split()
    lines = []
    for _ in range(12 + int(12 * rng.random())):
        clock = f"10:{10 + int(49 * rng.random())}:{10 + int(49 * rng.random())}"
        lines.append(
            f"{clock} the request to {pick(rng, places)} and {pick(rng, places)} took {int(999 * rng.random())} ms."
        )
    return "\n".join(lines)


def too_short(rng: random.Random) -> str:
    return f"{pick(rng, WEB_WORDS)} the page and {pick(rng, WEB_WORDS).lower()} to go on reading."


JUNK: dict[str, Callable[[random.Random], str]] = {
    "symbols": symbol_soup,
    "repeated lines": repeated_lines,
    "markup": cut_markup,
    "navigation": navigation,
    "numbers": number_table,
    "server log": server_log,
    "too short": too_short,
}


# Text that passes for sentences until somebody reads it


def word_salad(rng: random.Random, page: Page) -> str:
    """The words of a good page in random order, with the punctuation of sentences."""
    tokens = [token for token in words(page.text) if token[0].isalnum()]
    rng.shuffle(tokens)
    return "\n\n".join(" ".join(tokens[at : at + 12]).capitalize() + "." for at in range(0, len(tokens), 12))


OFFERS = """buy cheap best free online shoes watches pills loans casino bonus deal price order today offer limited click
discount shipping guarantee winner prize credit""".split()


def spam(rng: random.Random) -> str:
    """Advertising that has stop words, sentences and no repeated line."""
    sentences = []
    for _ in range(14 + int(8 * rng.random())):
        one, two, three, four, five = (pick(rng, OFFERS) for _ in range(5))
        forms = (
            f"{one} the {two} {three} and {four} with {five}.",
            f"You have to {one} the {two} of {three} {four}!",
            f"The {one} {two} to {three} and be {four} {five}.",
        )
        sentences.append(pick(rng, forms).capitalize())
    return " ".join(sentences)


# Other languages


GERMAN_NOUNS = {  # noun -> (article as subject, article as object)
    "Katze": ("die", "die"),
    "Hund": ("der", "den"),
    "Vogel": ("der", "den"),
    "Pferd": ("das", "das"),
    "Kind": ("das", "das"),
    "Frau": ("die", "die"),
    "Mann": ("der", "den"),
    "Buch": ("das", "das"),
    "Apfel": ("der", "den"),
    "Blume": ("die", "die"),
    "Lehrer": ("der", "den"),
    "Brief": ("der", "den"),
    "Schlüssel": ("der", "den"),
    "Tür": ("die", "die"),
}
GERMAN_VERBS = "sieht sucht findet zeichnet nimmt kennt hört beobachtet fragt vergisst".split()
GERMAN_PLACES = (
    "im Garten",
    "in der Küche",
    "auf dem Markt",
    "vor der Schule",
    "hinter dem Haus",
    "am Fluss",
    "in der großen Kirche",
)
GERMAN_TIMES = ("Heute", "Gestern Abend", "Jeden Morgen", "Am Sonntag", "Manchmal", "Später")
GERMAN_ADJECTIVES = "kleine alte junge schöne müde fröhliche".split()  # after a definite article as subject


def german_sentence(rng: random.Random) -> str:
    nouns = tuple(GERMAN_NOUNS)
    who, what = pick(rng, nouns), pick(rng, nouns)
    subject = f"{GERMAN_NOUNS[who][0]} {pick(rng, GERMAN_ADJECTIVES)} {who}"
    rest = f"{GERMAN_NOUNS[what][1]} {what} {pick(rng, GERMAN_PLACES)}"
    verb = pick(rng, GERMAN_VERBS)
    if rng.random() < 0.5:
        return f"{pick(rng, GERMAN_TIMES)} {verb} {subject} {rest}."
    return f"{subject[0].upper()}{subject[1:]} {verb} nicht {rest}, sagt er."


def french_sentence(rng: random.Random) -> str:
    sentence = join_tokens(FRENCH.draw(rng, "train").target, "words")
    return f"{sentence[0].upper()}{sentence[1:]}."


LANGUAGES: dict[str, Callable[[random.Random], str]] = {"french": french_sentence, "german": german_sentence}


def foreign_text(language: str, rng: random.Random) -> str:
    """Ten to twenty sentences, four to a paragraph."""
    sentences = [LANGUAGES[language](rng) for _ in range(10 + int(11 * rng.random()))]
    return "\n\n".join(" ".join(sentences[at : at + 4]) for at in range(0, len(sentences), 4))


# Damage that can be repaired


def as_cp1252(data: bytes) -> str:
    """Bytes read as Windows-1252, as browsers do: its five gaps are control characters."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in data)


def damage_encoding(text: str, rng: random.Random) -> str:
    """Mojibake: typographic marks written as UTF-8 and read as Windows-1252."""
    marks = {'"': "\u201d", "'": "\u2019", " ": "\u00a0"}
    marked = "".join(marks[c] if c in marks and (c != " " or rng.random() < 0.05) else c for c in text)
    return as_cp1252(marked.encode())


def damage_entities(text: str, rng: random.Random) -> str:
    escaped = html.escape(text)
    return re.sub(" ", lambda _: "&nbsp;" if rng.random() < 0.05 else " ", escaped)


def damage_lines(text: str, rng: random.Random) -> str:
    """Line ends of Windows, blanks at line ends, invisible characters, typographic marks."""
    marked = text.replace('"', "\u201c").replace("'", "\u2019").replace(". ", ". \u200b")
    return marked.replace("\n", " \r\n")


BOILERPLATE = (  # lines that stand around the text of a page
    "Home | News | Shop | Contact | Login",
    "Skip to main content",
    "We use cookies to improve this page. Accept all cookies",
    "Share on social media: Like Tweet Pin",
    "Subscribe to our newsletter",
    "Copyright 2024 Example Media. All rights reserved.",
    "Terms of use | Privacy policy",
)


def damage_frame(text: str, rng: random.Random) -> str:
    """Lines of boilerplate before and after the text."""
    lines = rng.sample(BOILERPLATE, 4)
    return "\n\n".join([*lines[:2], text, *lines[2:]])


DAMAGES: dict[str, Callable[[str, random.Random], str]] = {
    "mojibake": damage_encoding,
    "entities": damage_entities,
    "line ends": damage_lines,
    "boilerplate": damage_frame,
}


# Personal data and what only looks like it


def digits(rng: random.Random, n: int) -> str:
    return "".join(str(int(10 * rng.random())) for _ in range(n))


def luhn_digit(number: str) -> int:
    """The digit that completes a card number (Luhn 1960, US patent 2,950,048)."""
    doubled = [int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(number))]
    return -sum(value // 10 + value % 10 for value in doubled) % 10


def iban_digits(country: str, account: str) -> str:
    """The two check digits of an account number (ISO 13616: the rearranged number is 1 modulo 97)."""
    return f"{98 - int(''.join(str(int(c, 36)) for c in account + country + '00')) % 97:02d}"


def fake_email(rng: random.Random) -> str:
    names = "anna ben clara david emma felix".split()
    return f"{pick(rng, names)}.{pick(rng, names)}{digits(rng, 2)}@example.{pick(rng, ('com', 'org', 'net'))}"


def fake_phone(rng: random.Random) -> str:
    forms = ("+44 20 7946 0{}", "(212) 555-01{}", "+1-415-555-01{}")
    form = pick(rng, forms)
    return form.format(digits(rng, 3 if form.startswith("+44") else 2))


def fake_address(rng: random.Random) -> str:
    return f"{pick(rng, ('192.0.2', '198.51.100', '203.0.113'))}.{1 + int(254 * rng.random())}"


def fake_card(rng: random.Random) -> str:
    number = "4" + digits(rng, 14)
    number += str(luhn_digit(number))
    return pick(rng, (" ", "-", "")).join(number[at : at + 4] for at in range(0, 16, 4))


def fake_iban(rng: random.Random) -> str:
    account = digits(rng, 18)
    number = f"DE{iban_digits('DE', account)}{account}"
    return " ".join(number[at : at + 4] for at in range(0, len(number), 4)) if rng.random() < 0.5 else number


def fake_key(rng: random.Random) -> str:
    letters = string.ascii_letters + string.digits
    return pick(rng, ("sk-", "ghp_", "hf_")) + "".join(pick(rng, letters) for _ in range(36))


PRIVATE: dict[str, tuple[Callable[[random.Random], str], str]] = {  # kind -> (writer, sentence)
    "email": (fake_email, "Write to {} for the key."),
    "phone": (fake_phone, "Call {} in the evening."),
    "ip": (fake_address, "The visitor came from {} again."),
    "card": (fake_card, "The card {} paid for the cake."),
    "iban": (fake_iban, "The rent goes to {} every month."),
    "key": (fake_key, "The door opens with {} only."),
}


def spoiled_card(rng: random.Random) -> str:
    number = fake_card(rng)
    return number[:-1] + str((int(number[-1]) + 1 + int(9 * rng.random())) % 10)


def spoiled_iban(rng: random.Random) -> str:
    number = fake_iban(rng)
    return number[:-1] + str((int(number[-1]) + 1 + int(9 * rng.random())) % 10)


DECOYS: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "order number": (spoiled_card, "The order {} is ready."),
    "account that fails its check": (spoiled_iban, "The form shows {} as a sample."),
    "version": (lambda rng: f"3.{int(14 * rng.random())}.{int(9 * rng.random())}", "It runs on Python {} and later."),
    "time": (lambda rng: f"2026-11-{10 + int(19 * rng.random())} 10:{10 + int(49 * rng.random())}", "It began at {}."),
    "decorator": (lambda rng: f"@{pick(rng, ('dataclass', 'property', 'cache'))}", "The line above says {} alone."),
    "octets too large": (lambda rng: f"{300 + int(600 * rng.random())}.1.2.{digits(rng, 3)}", "Section {} is new."),
    "commit": (lambda rng: "".join(pick(rng, "0123456789abcdef") for _ in range(40)), "It was fixed in {}."),
    "four-part version": (lambda rng: f"2.{digits(rng, 1)}.1.{digits(rng, 1)}", "The driver has version {} now."),
}


def with_private_data(page: Page, rng: random.Random) -> Page:
    """A page with one to three pieces of personal data and one look-alike, in sentences of their own."""
    kinds = rng.sample(tuple(PRIVATE), 1 + int(3 * rng.random()))
    secrets = tuple((kind, PRIVATE[kind][0](rng)) for kind in kinds)
    name = pick(rng, tuple(DECOYS))
    decoy = DECOYS[name][0](rng)
    sentences = [PRIVATE[kind][1].format(text) for kind, text in secrets] + [DECOYS[name][1].format(decoy)]
    paragraphs = page.paragraphs
    for sentence in sentences:
        paragraphs.insert(int((len(paragraphs) + 1) * rng.random()), sentence)
    text = "\n\n".join(paragraphs)
    return replace(page, text=text, label="private", detail=name, original=page.text, secrets=secrets, decoys=(decoy,))


# Copies and leaks


EDIT_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)


def edited(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words, at least one, replaced by other words of it."""
    parts = re.split(r"(\s+)", text)
    places = range(0, len(parts), 2)
    for place in rng.sample(places, max(1, round(share * len(places)))):
        parts[place] = pick(rng, [part for part in parts[::2] if part != parts[place]])
    return "".join(parts)


PARAPHRASES = {
    "found a": "came upon a",
    "took the": "carried the",
    "to the": "over to the",
    "hid a": "put away a",
    "ran into the": "came running to the",
    "came today": "arrived this morning",
    "lives in": "has a home in",
    "works as a": "earns a living as a",
    "owns a": "keeps a",
    "likes": "is fond of",
    "Then": "After that",
    "Meanwhile": "At that time",
    "in the": "inside the",
    "Question:": "Asked:",
    "Answer:": "Said:",
}


def paraphrased(text: str) -> str:
    """The same facts in other words: no run of many words stays as it was."""
    for old, new in PARAPHRASES.items():
        text = re.sub(rf"\b{re.escape(old)}", new, text)
    return text


def other_case(text: str) -> str:
    """Capitals, and dashes for the punctuation inside sentences."""
    return text.upper().replace(":", " -").replace("?", " ?")


LEAKS: dict[str, Callable[[str], str]] = {"verbatim": str, "other case": other_case, "paraphrase": paraphrased}


def with_paragraph(page: Page, paragraph: str, rng: random.Random) -> Page:
    paragraphs = page.paragraphs
    paragraphs.insert(int((len(paragraphs) + 1) * rng.random()), paragraph)
    return replace(page, text="\n\n".join(paragraphs))


# The crawl


def altered_pages(pages: list[Page], config: DirtConfig, rng: random.Random) -> list[Page]:
    """Damage some pages and put personal data into others."""
    n_damaged = round(config.damaged_share * len(pages))
    n_private = round(config.private_share * len(pages))
    names = tuple(DAMAGES)
    chosen = rng.sample(range(len(pages)), n_damaged + n_private)
    pages = list(pages)
    for turn, index in enumerate(chosen[:n_damaged]):
        name, page = names[turn % len(names)], pages[index]
        text = DAMAGES[name](page.text, rng)
        pages[index] = replace(page, text=text, label="damaged", detail=name, original=page.text)
    for index in chosen[n_damaged:]:
        pages[index] = with_private_data(pages[index], rng)
    return pages


def bad_pages(pages: Sequence[Page], config: DirtConfig, rng: random.Random) -> list[Page]:
    """Junk, salad, spam and other languages."""
    found, n_pages = [], len(pages)
    for turn in range(round(config.junk_share * n_pages)):
        name = tuple(JUNK)[turn % len(JUNK)]
        found.append(Page(JUNK[name](rng), "web", "junk", name))
    for turn in range(round(config.salad_share * n_pages)):
        text = spam(rng) if turn % 2 else word_salad(rng, pick(rng, pages))
        found.append(Page(text, "web", "salad", "spam" if turn % 2 else "salad"))
    for turn in range(round(config.foreign_share * n_pages)):
        language = tuple(LANGUAGES)[turn % len(LANGUAGES)]
        found.append(Page(foreign_text(language, rng), "web", "foreign", language))
    return found


def copies(placed: list[tuple[float, Page]], config: DirtConfig, rng: random.Random) -> list[tuple[float, Page]]:
    """Copies of pages, each somewhere after its original."""
    originals = [(key, page) for key, page in placed if page.label in ("good", "private")]
    found = []
    for turn in range(round(config.exact_share * config.n_pages) + round(config.near_share * config.n_pages)):
        key, page = pick(rng, originals)
        exact = turn < round(config.exact_share * config.n_pages)
        share = 0.0 if exact else EDIT_SHARES[turn % len(EDIT_SHARES)]
        text = page.text if exact else edited(page.text, share, rng)
        copy = Page(text, page.source, "exact" if exact else "near", f"{share:.0%} edited", page.text)
        found.append((key + (1 - key) * rng.random(), copy))
    return found


def canary_pages(config: DirtConfig, documents: Iterator[Document], rng: random.Random) -> Iterator[Page]:
    """Pages with a canary in them: `count` different ones, or one and its copies."""
    for sentence, count in config.canaries:
        text = ""
        for turn in range(count):
            if not (turn and config.copied_canaries):
                page = Page(world_page(documents, rng), "world", "canary", f"{count} times")
                text = with_paragraph(page, canary_text(sentence), rng).text
            yield replace(page, text=text)


def leaked_pages(config: DirtConfig, documents: Iterator[Document], rng: random.Random) -> Iterator[Page]:
    """Pages with a document of the evaluation set in them, as it is, in other case, or in other words."""
    names = tuple(LEAKS)
    leaked = enumerate(evaluation_documents(config.n_leaks))
    for index, document in (pair for pair in leaked for _ in range(config.leak_copies)):
        name = names[index % len(names)]
        host = Page(world_page(documents, rng), "world", "leaked", name, leak=index)
        yield with_paragraph(host, LEAKS[name](document.text), rng)


def dirty_corpus(config: DirtConfig, seed: int) -> list[Page]:
    """Write the crawl of a seed. The same seed gives the same pages on every machine with the same Python version."""
    rng = random.Random(seed)
    documents = World().stream(seed + 1000, split="train")  # not the documents of the other topics' seeds
    clean = good_pages(config, documents, rng)
    everything = [*altered_pages(clean, config, rng), *bad_pages(clean, config, rng)]
    everything += [*leaked_pages(config, documents, rng), *canary_pages(config, documents, rng)]
    placed = [(rng.random(), page) for page in everything]
    placed += copies(placed, config, rng)
    return [page for _, page in sorted(placed, key=lambda pair: pair[0])]
