"""Topic 15 - Lexical search: BM25 over an inverted index, for texts of any script.

    index = BM25Index(); index.add(7, "a passage"); index.search("a question", k=5)      # [Hit(7, score)]

Papers: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond" (section 3.4); Harman
1991, "How effective is suffixing?" (the rule for plurals). The weight of a term is Lucene's,
ln(1 + (N - n + 0.5)/(n + 0.5)), never negative; that of the paper is negative for terms in more than half of the texts.
"""

import heapq
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import regex

from workbench import check_range

MAX_QUERY = 10_000  # characters; a longer "question" is a document
WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*(?:'[\p{L}\p{N}][\p{L}\p{N}\p{M}]*)?")
UNSPACED = re.compile(  # scripts that put no blanks between words: kana, ideographs, Thai, Lao, Khmer, Myanmar
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


class Hit(NamedTuple):
    """One result: the id of a passage, and a score that is comparable within one search only."""

    id: int
    score: float


def check_query(query: str) -> str:
    """Return a question that can be searched for; raises ValueError for one that is empty or longer than MAX_QUERY."""
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"the question is empty ({query!r}); ask with at least one word")
    if len(query) > MAX_QUERY:
        raise ValueError(f"the question has {len(query):,} characters, the limit is {MAX_QUERY:,}; shorten it")
    return query


# Words


def singular(word: str) -> str:
    """Harman's rule for plurals: -ies to -y, -s away, each with its exceptions; short words stay.

    Her rule between the two, -es to -e, takes the letter that the last one takes.
    """
    if len(word) > 4 and word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and word[-2] not in "us":
        return word[:-1]
    return word


def analyse(text: str) -> list[str]:
    """The terms of a text: compatible forms made equal (NFKC), case folded, plurals cut, the same for every script.

    A script without blanks gives pairs of neighbouring characters. Marks that combine with a letter stay with it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    terms: list[str] = []
    for word in WORD.findall(folded):
        place = 0
        for run in [*UNSPACED.finditer(word), None]:
            spaced = word[place : run.start() if run else len(word)].removesuffix("'s")
            terms += [singular(spaced)] * bool(spaced)
            if run:
                terms += [run[0][at : at + 2] for at in range(max(1, len(run[0]) - 1))]
                place = run.end()
    return terms


STOP_WORDS = frozenset(  # words that questions are asked with; what a passage is about is said with others
    "a about after all an and any are as at be before been between by can could did do doe each every for from had has "
    "have he her his how i if in into is it its may me might my no not of on one only or our over she should so such "
    "than that the their them then there these they this those to too under was we were what when where which who why "
    "will with without would you your".split()
)
ENDINGS = tuple(  # the longest that leaves four letters goes
    "ational ization isation ingly ations ation ings edly ment ness ing ers est ied ies ity ed er ly es al e s".split()
)


@lru_cache(maxsize=1 << 16)  # the words of strangers are without end
def stem(word: str) -> str:
    """An English word without its ending, so that trained, training and trains are one term; crude, and one way only.

    Porter's rules (1980) look at syllables too; this takes the first of ENDINGS that leaves at least four letters.
    """
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def analyse_english(text: str) -> list[str]:
    """The terms of `analyse` without the words of questions, and without endings; other scripts pass unchanged."""
    return [stem(word) for word in analyse(text) if word not in STOP_WORDS]


# BM25


@dataclass(frozen=True)
class BM25Config:
    """The two numbers of BM25."""

    k1: float = 1.2  # how slowly repeated terms stop counting; 0: a term counts once
    b: float = 0.75  # how much long passages are discounted: 0 not at all, 1 in proportion to their length

    def __post_init__(self) -> None:
        check_range(self, "k1", least=0)
        check_range(self, "b", least=0, most=1)


def term_weight(n_texts: int, n_with: int) -> float:
    """ln(1 + (N - n + 0.5) / (n + 0.5)): what a term says that n of N texts have, in nats."""
    return math.log1p((n_texts - n_with + 0.5) / (n_with + 0.5))


def saturated(count: float, length: float, mean_length: float, config: BM25Config) -> float:
    """f / (f + k1 (1 - b + b L / mean L)): from 0 to 1 as a term is repeated; 1/2 at f = k1 for the mean length."""
    return count / (count + config.k1 * (1 - config.b + config.b * length / mean_length)) if count else 0.0


class BM25Index:
    """For each term the passages that have it; a search looks only at the lists of its own terms.

    Passages are added and removed at any time; all counts follow, so that the index always equals one built anew.
    """

    def __init__(self, config: BM25Config | None = None, analyser: Callable[[str], list[str]] = analyse) -> None:
        self.config, self.analyser = config or BM25Config(), analyser
        self.postings: dict[str, dict[int, int]] = defaultdict(dict)  # term -> passage -> how often
        self.terms: dict[int, Counter[str]] = {}  # passage -> its terms
        self.lengths: dict[int, int] = {}  # passage -> how many terms it has
        self.n_terms = 0  # of all passages together

    def __len__(self) -> int:
        return len(self.terms)

    def add(self, id: int, text: str) -> None:
        """Add a passage under a new id. Raises ValueError for an id that is taken."""
        if id in self.terms:
            raise ValueError(f"passage {id} is in the index already; remove it first")
        self.terms[id] = counts = Counter(self.analyser(text))
        for term, count in counts.items():
            self.postings[term][id] = count
        self.lengths[id] = counts.total()
        self.n_terms += self.lengths[id]

    def remove(self, id: int) -> None:
        """Forget a passage, down to the last count. Raises ValueError for an id that is not there."""
        if id not in self.terms:
            raise ValueError(f"passage {id} is not in the index")
        counts = self.terms.pop(id)
        for term in counts:
            del self.postings[term][id]
            if not self.postings[term]:
                del self.postings[term]
        self.n_terms -= self.lengths.pop(id)

    def scores(self, query: str) -> dict[int, float]:
        """The score of every passage that shares a term with the query, in nats; a term asked twice counts twice."""
        found: dict[int, float] = defaultdict(float)
        mean_length = self.n_terms / max(len(self), 1)
        for term, times in Counter(self.analyser(check_query(query))).items():
            passages = self.postings.get(term, {})
            weight = times * term_weight(len(self), len(passages))
            for id, count in passages.items():
                found[id] += weight * saturated(count, self.lengths[id], mean_length, self.config)
        return found

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first, fewer if fewer share a term; of equal scores the lower id comes first.

        Raises ValueError for k < 1, and for a query that is empty or too long.
        """
        return best(self.scores(query), k)


def best(scores: dict[int, float], k: int) -> list[Hit]:
    """The k highest scores in order, ties by id."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return [Hit(id, score) for id, score in heapq.nsmallest(k, scores.items(), key=lambda item: (-item[1], item[0]))]


def bm25_naively(query: str, texts: Sequence[str], config: BM25Config | None = None) -> list[float]:
    """The score of every text, term by term from the formula: what the index is proven against."""
    config, cut = config or BM25Config(), [analyse(text) for text in texts]
    mean_length, scores = sum(map(len, cut)) / max(len(cut), 1), []
    for terms in cut:
        total = 0.0
        for term in analyse(query):
            n_with = sum(term in other for other in cut)
            total += term_weight(len(cut), n_with) * saturated(terms.count(term), len(terms), mean_length, config)
        scores.append(total)
    return scores
