"""Topic 10 - Corpus filters: repair a page, judge it by rules, by language and by quality, and mask what is private.

    normalise(text)                          # line ends, Unicode, entities, mojibake, boilerplate
    failed_rule(text)                        # name of the first rule that the page breaks, or None
    NgramLanguage.train({"english": [...], "french": [...]}).classify(text)
    QualityClassifier.train(good, random).score(text)          # probability of being like the good texts
    mask_private(text)                       # (text with [email] and the like, what was found)

Rules: Raffel et al. 2020 (arXiv 1910.10683, C4), Rae et al. 2021 (arXiv 2112.11446, appendix A, Gopher). Language:
Cavnar and Trenkle 1994, character n-grams. Quality: Joulin et al. 2017 (arXiv 1607.01759, fastText); Li et al. 2024
(arXiv 2406.11794, DCLM) filter web text with it.
"""

import html
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from python_text import TYPOGRAPHY
from workbench import check_range

# Repair


MOJIBAKE = re.compile("[\u00c2\u00c3\u00e2][\u0080-\u00bf\u0152-\u2122]")  # a lead byte of UTF-8 and one that follows
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")  # no byte of Windows-1252 reads as one of these
SOFT_HYPHEN = "\u00ad"  # but as this one: it may be half of a character that repair_mojibake puts together
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
FRAME_LINES = re.compile(
    r"(^skip to |all rights reserved|^copyright\b|\bnewsletter\b"
    r"|^share on |privacy policy|terms of (use|service)|^(\w+ [|>] ){2,})",
    re.IGNORECASE,
)
COOKIES = re.compile(r"cookies?\b", re.IGNORECASE)
CONSENT = re.compile(r"\b(accept|improve|consent)", re.IGNORECASE)  # behind cookies


def cp1252_bytes(text: str) -> bytes:
    """The bytes that a browser would have read as this text. Raises UnicodeEncodeError if there are none."""
    return b"".join(c.encode("latin-1") if 0x80 <= ord(c) < 0xA0 else c.encode("cp1252") for c in text)


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as Windows-1252, where all of the text agrees with that; else leave it alone.

    Only once: text that was spoiled twice, or whose bytes were lost, stays as it is.
    """
    if not MOJIBAKE.search(text):
        return text
    try:
        return cp1252_bytes(text).decode("utf-8")
    except UnicodeError:
        return text


def is_frame(line: str) -> bool:
    """Whether a line is empty, or belongs to the site and not to the page.

    Behind the *first* mention of cookies: one pattern for both words would try every mention with every rest of a line.
    """
    cookies = COOKIES.search(line)
    asked = cookies is not None and CONSENT.search(line, cookies.end()) is not None
    return not line.strip() or asked or FRAME_LINES.search(line) is not None


def strip_frame(text: str) -> str:
    """Drop the lines at the beginning and the end that belong to the site and not to the page."""
    lines = text.split("\n")
    first = next((place for place, line in enumerate(lines) if not is_frame(line)), len(lines))
    last = next((place for place in range(len(lines), first, -1) if not is_frame(lines[place - 1])), first)
    return "\n".join(lines[first:last])


def normalise(text: str) -> str:
    """Repair a page: encoding, entities, Unicode form, invisible characters, line ends, the frame around the text.

    Applied twice it changes nothing more, unless an entity stands for an entity (&amp;amp;).
    """
    text = INVISIBLE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROL.sub("", INVISIBLE.sub("", html.unescape(repair_mojibake(text)))).replace(SOFT_HYPHEN, "")
    text = unicodedata.normalize("NFC", text).translate(TYPOGRAPHY)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return strip_frame(re.sub(r"\n{3,}", "\n\n", text))


# Rules: each counts something that anyone can check


WORD = re.compile(r"\S+")
STOP_WORDS = frozenset("the be to of and that have with is in a was".split())


@dataclass(frozen=True)
class RuleConfig:
    """The limits. Where they differ from the paper's (in brackets), this corpus has shorter pages or sentences."""

    min_words: int = 20  # words of a page (Gopher: 50)
    max_words: int = 100_000  # words of a page (Gopher: the same)
    min_word_length: float = 2.5  # mean characters of a word (Gopher: 3)
    max_word_length: float = 10.0  # mean characters of a word (Gopher: the same)
    max_symbol_ratio: float = 0.1  # hash signs and ellipses per word (Gopher: the same)
    min_alphabetic: float = 0.5  # fraction of the words that have a letter (Gopher: 0.8)
    min_stop_words: int = 2  # different stop words (Gopher: 2 of eight; ours are twelve)
    max_bullets: float = 0.9  # fraction of the lines that begin with a bullet (Gopher: the same)
    max_ellipses: float = 0.3  # fraction of the lines that end with an ellipsis (Gopher: the same)
    max_duplicate_lines: float = 0.3  # fraction of the lines that came before (Gopher: the same)
    max_top_bigram: float = 0.2  # characters in the commonest pair of words, as a fraction (Gopher: the same)
    max_top_trigram: float = 0.18  # the same for three words (Gopher: the same)
    max_tags: float = 0.1  # characters inside angle brackets, as a fraction (C4 drops pages with a curly bracket)
    min_sentence_ends: float = 0.01  # full stops, question and exclamation marks per word (C4: in every line)

    def __post_init__(self) -> None:
        check_range(self, "min_words", "max_words", least=1)
        names = [name for name in self.__dataclass_fields__ if name not in ("min_words", "max_words")]
        check_range(self, *names, least=0)


def duplicate_lines(text: str) -> float:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram_share(words: Sequence[str], n: int) -> float:
    """Characters covered by the commonest run of n words, if it occurs twice, as a fraction of all."""
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    if not counts:
        return 0.0
    ngram, count = max(counts.items(), key=lambda item: item[1] * sum(map(len, item[0])))
    return count * sum(map(len, ngram)) / sum(map(len, words)) if count > 1 else 0.0


def line_share(text: str, wanted: Callable[[str], bool]) -> float:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return sum(map(wanted, lines)) / len(lines) if lines else 0.0


RULES: dict[str, Callable[[str, list[str], RuleConfig], bool]] = {  # name -> whether the page breaks it; cheap first
    "too few words": lambda text, words, limit: len(words) < limit.min_words,
    "too many words": lambda text, words, limit: len(words) > limit.max_words,
    "word length": lambda text, words, limit: (
        not limit.min_word_length <= sum(map(len, words)) / len(words) <= limit.max_word_length
    ),
    "symbols": lambda text, words, limit: text.count("#") + text.count("...") > limit.max_symbol_ratio * len(words),
    "not alphabetic": lambda text, words, limit: (
        sum(any(map(str.isalpha, word)) for word in words) < limit.min_alphabetic * len(words)
    ),
    "stop words": lambda text, words, limit: (
        len({word.strip(".,:;?!\"'()").lower() for word in words} & STOP_WORDS) < limit.min_stop_words
    ),
    "sentence ends": lambda text, words, limit: (
        len(re.findall(r"[.?!:](?:\s|$|\")", text)) < limit.min_sentence_ends * len(words)
    ),
    "tags": lambda text, words, limit: (
        sum(map(len, re.findall(r"</?\w+(?:\s[^<>]*)?>?", text))) > limit.max_tags * len(text)
    ),
    "bullets": lambda text, words, limit: line_share(text, lambda line: line[0] in "-*\u2022") > limit.max_bullets,
    "ellipses": lambda text, words, limit: line_share(text, lambda line: line.endswith("...")) > limit.max_ellipses,
    "duplicate lines": lambda text, words, limit: duplicate_lines(text) > limit.max_duplicate_lines,
    "top bigram": lambda text, words, limit: top_ngram_share(words, 2) > limit.max_top_bigram,
    "top trigram": lambda text, words, limit: top_ngram_share(words, 3) > limit.max_top_trigram,
}


def failed_rule(text: str, limits: RuleConfig | None = None) -> str | None:
    """The name of the first rule that a page breaks, or None; the key of RULES."""
    words, limits = WORD.findall(text), limits or RuleConfig()
    return next((name for name, breaks in RULES.items() if breaks(text, words, limits)), None)


# Language: naive Bayes on character n-grams


def character_ngrams(text: str, orders: Sequence[int]) -> Counter[str]:
    """How often each run of characters occurs, in lower case; a blank stands at the beginning and at the end."""
    text = f" {' '.join(text.lower().split())} "
    return Counter(text[at : at + n] for n in orders for at in range(len(text) - n + 1))


class NgramLanguage:
    """Naive Bayes: log p(language | text) = log prior + sum over the n-grams of log p(n-gram | language), normalised.

    p(n-gram | language) = (count + alpha) / (all counts + alpha * number of n-grams). N-grams that no language showed
    in training are passed over. All languages have the same prior. The n-grams of a text are not independent, so the
    probabilities lie closer to 0 and 1 than they should; the order of the languages suffers less.
    """

    def __init__(self, names: list[str], rows: dict[str, int], logs: np.ndarray, orders: tuple[int, ...]) -> None:
        self.names, self.rows, self.logs, self.orders = names, rows, logs, orders  # logs: (ngrams, languages)

    @classmethod
    def train(
        cls, texts: dict[str, Iterable[str]], orders: tuple[int, ...] = (1, 2, 3), alpha: float = 1.0
    ) -> "NgramLanguage":
        """Learn from texts of each language. Raises ValueError for fewer than two languages, or one without text."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in texts}
        for name, found in texts.items():
            for text in found:
                counts[name].update(character_ngrams(text, orders))
        empty = [name for name, found in counts.items() if not found]
        if len(counts) < 2 or empty:
            raise ValueError(
                f"language identification needs texts of two languages or more; got {list(texts)}, {empty=}"
            )
        known = sorted(set().union(*counts.values()))
        table = np.array([[counts[name][ngram] for name in counts] for ngram in known]) + alpha  # (ngrams, languages)
        logs = np.log(table / table.sum(axis=0))  # (ngrams, languages)
        return cls(list(counts), {ngram: row for row, ngram in enumerate(known)}, logs, orders)

    def log_probabilities(self, text: str) -> np.ndarray:
        """log p(language | text) for every language, in the order of `names`."""
        found = character_ngrams(text, self.orders)
        known = [(self.rows[ngram], count) for ngram, count in found.items() if ngram in self.rows]
        rows, counts = np.array(known, dtype=int).reshape(-1, 2).T  # (ngrams), (ngrams)
        scores = counts @ self.logs[rows]  # (languages)
        return scores - np.logaddexp.reduce(scores)

    def classify(self, text: str) -> str:
        return self.names[int(self.log_probabilities(text).argmax())]


# Quality: logistic regression on hashed n-grams of words


def hashed_ngrams(text: str, n_buckets: int, orders: Sequence[int] = (1, 2)) -> list[int]:
    """The bucket of every word and of every pair of neighbouring words. Different n-grams may share one."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [
        zlib.crc32(" ".join(words[at : at + n]).encode()) % n_buckets
        for n in orders
        for at in range(len(words) - n + 1)
    ]


@dataclass(frozen=True)
class QualityConfig:
    """The quality classifier."""

    n_buckets: int = 2**16  # weights; n-grams are hashed into so many
    decay: float = 1e-5  # of the squared weights; halves of it are added to the mean loss
    max_steps: int = 60  # steps of L-BFGS over all texts

    def __post_init__(self) -> None:
        check_range(self, "n_buckets", "max_steps", least=1)
        check_range(self, "decay", above=0)


class QualityClassifier:
    """p(good | text) = sigmoid(bias + mean of the weights of the text's hashed n-grams), as fastText with width 1.

    Trained as the makers of corpora do: good texts against random pages of the crawl, which are good in part. So the
    score is an order and no probability: with a share g of good pages among the random ones, even a perfect score for
    them is 1 / (1 + g).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias  # (buckets), ()

    @classmethod
    def train(
        cls, good: Sequence[str], others: Sequence[str], config: QualityConfig | None = None
    ) -> "QualityClassifier":
        """Minimise the mean logistic loss plus decay / 2 * |weights|^2 over all texts at once. Nothing is random."""
        config = config or QualityConfig()
        if not good or not others:
            raise ValueError(f"the quality classifier needs texts of both kinds; got {len(good)} and {len(others)}")
        rows = [hashed_ngrams(text, config.n_buckets) or [0] for text in (*good, *others)]
        ids = torch.tensor([bucket for row in rows for bucket in row])  # (ngrams)
        lengths = torch.tensor([len(row) for row in rows])
        starts = lengths.cumsum(0) - lengths  # (texts)
        wanted = torch.tensor([1.0] * len(good) + [0.0] * len(others), dtype=torch.float64)  # (texts)
        weight = torch.zeros(config.n_buckets, 1, dtype=torch.float64, requires_grad=True)  # (buckets, 1)
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=config.max_steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = F.embedding_bag(ids, weight, starts, mode="mean")[:, 0] + bias  # (texts)
            total = F.binary_cross_entropy_with_logits(logits, wanted) + config.decay / 2 * weight.pow(2).sum()
            total.backward()
            return total

        optimizer.step(loss)
        return cls(weight.detach()[:, 0], bias.detach())

    def score(self, text: str) -> float:
        buckets = hashed_ngrams(text, len(self.weight))
        mean = float(self.weight[buckets].mean()) if buckets else 0.0
        logit = mean + float(self.bias)
        small = math.exp(-abs(logit))  # never overflows
        return (1.0 if logit >= 0 else small) / (1 + small)

    def threshold(self, texts: Iterable[str], kept: float) -> float:
        """The score that a share `kept` of these texts reaches: how much of trusted text may be lost is the choice."""
        scores = sorted(self.score(text) for text in texts)
        if not scores:
            raise ValueError("a threshold needs trusted texts, got none")
        return scores[min(len(scores) - 1, math.floor((1 - kept) * len(scores) + 1e-9))]


# Private data: a pattern finds candidates, a check sorts out what only looks like it


def luhn_valid(number: str) -> bool:
    """Whether the digits of a card number pass Luhn's check (ISO/IEC 7812-1): nine of ten random numbers do not."""
    digits = [int(c) for c in number if c.isdecimal()]
    doubled = [digit * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


def iban_valid(number: str) -> bool:
    """Whether an account number is 1 modulo 97 (ISO 13616): 96 of 97 random ones are not."""
    compact = re.sub(r"\s", "", number).upper()
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def address_valid(number: str) -> bool:
    """Whether four numbers can be an IPv4 address of somebody; those of one machine or private network are nobody's."""
    first, second, *rest = (int(part) for part in number.split("."))
    private = first in (0, 10, 127) or (first, second) == (192, 168) or (first == 172 and 16 <= second < 32)
    return max(first, second, *rest) < 256 and not private


PRIVATE_PATTERNS: dict[str, tuple[re.Pattern, Callable[[str], bool]]] = {  # tried in this order
    "email": (re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}\b"), lambda found: True),
    "key": (re.compile(r"\b(?:sk-|ghp_|gho_|hf_|AKIA)[A-Za-z0-9]{16,100}\b"), lambda found: True),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), iban_valid),
    "card": (re.compile(r"(?<![\w.-])(?<!\d[ -])(?:\d{4}[ -]?){3}\d{4}(?![\w-]| \d)"), luhn_valid),
    "phone": (
        re.compile(r"(?<![\w.])(?:\+\d{1,3}[ -]\d{2,4}|\(\d{3}\))(?:[ -]\d{2,4}){1,3}(?!\w)"),
        lambda found: True,
    ),
    "ip": (re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)"), address_valid),
}


def mask_private(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Replace personal data by [its kind]; return the text and what was found as (kind, text)."""
    found: list[tuple[str, str]] = []
    for kind, (pattern, is_valid) in PRIVATE_PATTERNS.items():

        def mask(match: re.Match, kind: str = kind, is_valid: Callable[[str], bool] = is_valid) -> str:
            if not is_valid(match[0]):
                return match[0]
            found.append((kind, match[0]))
            return f"[{kind}]"

        text = pattern.sub(mask, text)
    return text, found
