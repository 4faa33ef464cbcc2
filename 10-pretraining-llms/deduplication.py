"""Topic 10 - Deduplication: equal pages, nearly equal pages, equal passages, and pages that hold the evaluation set.

    text_key(text)                                       # equal for texts that differ in case and blanks alone
    index = NearDuplicates(MinHashConfig()); index.add(text)          # number of an earlier page like it, or None
    duplicate_clusters(texts)                            # all pages at once, by union-find
    repeated_spans(documents, length=50)                 # tokens that stand in a passage seen before
    Decontaminator(evaluation_texts).shared(text)        # the n-gram that a page shares with the evaluation set

Broder 1997, "On the resemblance and containment of documents" (MinHash); Indyk and Motwani 1998 (hashing with bands);
Lee et al. 2022 (arXiv 2107.06499), 50 equal tokens; Brown et al. 2020 (arXiv 2005.14165, appendix C), 13-grams; Karp
and Rabin 1987, rolling hashes.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from workbench import check_range

WORD = re.compile(r"\w+")


def plain_words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return WORD.findall(text.casefold())


# Equal pages


def text_key(text: str) -> bytes:
    """16 bytes that are the same for texts with the same words in the same order, whatever their case and punctuation.

    Two different texts among n have the same key with a probability of about n^2 / 2^129.
    """
    return hashlib.blake2b(" ".join(plain_words(text)).encode(), digest_size=16).digest()


# Nearly equal pages: MinHash and bands


def shingles(text: str, n: int = 5) -> set[str]:
    """The runs of n words of a text; a text of fewer words is one run, a text without words has none."""
    words = plain_words(text)
    return {" ".join(words[at : at + n]) for at in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(a: set, b: set) -> float:
    """|a and b| / |a or b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def collision_probability(similarity: float, n_bands: int, n_rows: int) -> float:
    """That two pages agree in all rows of at least one band: 1 - (1 - s^r)^b."""
    return 1 - (1 - similarity**n_rows) ** n_bands


def band_threshold(n_bands: int, n_rows: int) -> float:
    """(1/b)^(1/r): where the curve has 1 - (1 - 1/b)^b, about 1 - 1/e = 0.63, and is about steepest."""
    return (1 / n_bands) ** (1 / n_rows)


@dataclass(frozen=True)
class MinHashConfig:
    """What counts as nearly equal. 14 bands of 8 rows are those of FineWeb (Penedo et al. 2024, arXiv 2406.17557)."""

    n_bands: int = 14  # groups of hashes; pages that agree in one group are compared
    n_rows: int = 8  # hashes in a group
    shingle_size: int = 5  # words in a run
    least_similarity: float = 0.7  # estimated share of common runs from which on a page is a duplicate
    seed: int = 0  # of the hash functions

    def __post_init__(self) -> None:
        check_range(self, "n_bands", "n_rows", "shingle_size", least=1)
        check_range(self, "least_similarity", least=0, most=1)

    @property
    def n_hashes(self) -> int:
        return self.n_bands * self.n_rows


PRIME = 4_294_967_311  # the smallest above 2^32, so that every 32-bit hash is a residue of its own


class MinHasher:
    """The least value of each of n random hash functions over a page's shingles.

    h_i(x) = (a_i x + b_i) mod PRIME of a 32-bit hash x: with a_i, b_i < 2^32 the product fits in 64 bits. Two pages
    agree in one of them with a probability that is their Jaccard similarity, up to what the linear functions fall
    short of random permutations.
    """

    def __init__(self, config: MinHashConfig) -> None:
        rng = np.random.default_rng(config.seed)
        self.config = config
        self.factors = rng.integers(1, 2**32, (config.n_hashes, 1), dtype=np.uint64)  # (hashes, 1)
        self.shifts = rng.integers(0, 2**32, (config.n_hashes, 1), dtype=np.uint64)  # (hashes, 1)

    def __call__(self, text: str) -> np.ndarray:
        """The signature of a text, (hashes). A text without words has the largest number everywhere."""
        found = shingles(text, self.config.shingle_size)
        if not found:
            return np.full(self.config.n_hashes, PRIME, dtype=np.uint64)
        digests = b"".join(hashlib.blake2b(item.encode(), digest_size=4).digest() for item in sorted(found))
        values = np.frombuffer(digests, dtype="<u4").astype(np.uint64)  # (shingles)
        return ((self.factors * values + self.shifts) % np.uint64(PRIME)).min(axis=1)

    def bands(self, signature: np.ndarray) -> list[bytes]:
        """What must be equal in one band for two pages to be compared."""
        return [row.tobytes() for row in signature.reshape(self.config.n_bands, self.config.n_rows)]


def estimated_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The share of equal entries of two signatures: unbiased, with the variance s (1 - s) / number of hashes."""
    return float((a == b).mean())


class NearDuplicates:
    """The pages seen so far, by the bands of their signatures: one pass, a few hundred bytes per page.

    A page is a duplicate if a page before it agrees with it in one band and, over the whole signature, in at least
    `least_similarity` of the hashes. Pages that are duplicates themselves stay known, so that a chain of small changes
    is found link by link.
    """

    def __init__(self, config: MinHashConfig) -> None:
        self.hasher, self.signatures = MinHasher(config), []
        self.buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(config.n_bands)]

    def matches(self, signature: np.ndarray) -> list[int]:
        """Numbers of the pages seen so far that are near-duplicates of this signature, in order."""
        candidates = {
            number
            for bucket, key in zip(self.buckets, self.hasher.bands(signature), strict=True)
            for number in bucket.get(key, ())
        }
        least = self.hasher.config.least_similarity
        return [n for n in sorted(candidates) if estimated_similarity(self.signatures[n], signature) >= least]

    def add(self, text: str) -> int | None:
        """Remember a page; return the number of the first earlier one that it nearly equals, or None."""
        signature = self.hasher(text)
        found = self.matches(signature)
        self.remember(signature)
        return found[0] if found else None

    def remember(self, signature: np.ndarray) -> None:
        for bucket, key in zip(self.buckets, self.hasher.bands(signature), strict=True):
            bucket[key].append(len(self.signatures))
        self.signatures.append(signature)


class UnionFind:
    """Groups that grow together (Tarjan 1975); the root of a group is its least member."""

    def __init__(self, n_items: int) -> None:
        self.parents = list(range(n_items))

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]  # halve the path
            item = self.parents[item]
        return item

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self.parents[high] = low


def duplicate_clusters(texts: Iterable[str], config: MinHashConfig | None = None) -> list[int]:
    """For each text the number of the first text of its group: two texts joined by a chain of near-duplicates.

    `NearDuplicates.add` keeps a page if none before it is like it, even if a later page links it to one before; a group
    keeps its first page alone. Groups are the stricter, and need all pages at once.
    """
    index, pairs = NearDuplicates(config or MinHashConfig()), []
    for number, text in enumerate(texts):
        signature = index.hasher(text)
        pairs += [(number, other) for other in index.matches(signature)]
        index.remember(signature)
    groups = UnionFind(len(index.signatures))
    for a, b in pairs:
        groups.join(a, b)
    return [groups.find(number) for number in range(len(index.signatures))]


# Equal passages inside different pages


BASE, MODULUS = 1_000_003, (1 << 61) - 1


def window_hashes(tokens: Sequence[int], length: int) -> list[int]:
    """The hash of every run of `length` tokens, each from the one before it: O(1) per token (Karp and Rabin 1987)."""
    if length < 1:
        raise ValueError(f"a run needs at least one token, got length={length}")
    tokens = [int(token) for token in tokens]  # numbers of numpy would overflow
    if len(tokens) < length:
        return []
    value, top = 0, pow(BASE, length - 1, MODULUS)
    for token in tokens[:length]:
        value = (value * BASE + token + 1) % MODULUS
    values = [value]
    for old, new in zip(tokens, tokens[length:], strict=False):
        value = ((value - (old + 1) * top) * BASE + new + 1) % MODULUS
        values.append(value)
    return values


def repeated_spans(documents: Sequence[Sequence[int]], length: int = 50) -> list[np.ndarray]:
    """For each document, which of its tokens stand in a run of `length` tokens that occurred before, here or elsewhere.

    The first occurrence stays unmarked. Two runs count as equal if their tokens are, not only their hashes: a new run
    is compared with the first one that had its hash, so a collision could hide a duplicate, never invent one.
    """
    first: dict[int, tuple[int, int]] = {}  # hash -> (document, position)
    documents, marks = [list(tokens) for tokens in documents], []
    for number, tokens in enumerate(documents):
        mark = np.zeros(len(tokens), dtype=bool)  # (tokens)
        for start, value in enumerate(window_hashes(tokens, length)):
            other, place = first.setdefault(value, (number, start))
            is_new = (other, place) == (number, start)
            if not is_new and documents[other][place : place + length] == tokens[start : start + length]:
                mark[start : start + length] = True
        marks.append(mark)
    return marks


# Pages that hold the evaluation set


class Decontaminator:
    """Finds pages that share a run of n words with the evaluation set, in lower case and without punctuation.

    An evaluation text of fewer than n words is looked for as a whole, if it has `least_words` or more; shorter ones
    would be found everywhere, so they are not looked for, and `n_unchecked` says how many those are (Brown et al. 2020
    took n from the lengths of each benchmark, between 8 and 13).
    """

    def __init__(self, evaluation_texts: Iterable[str], n: int = 13, least_words: int = 8) -> None:
        if not 1 <= least_words <= n:
            raise ValueError(f"least_words={least_words} must be between 1 and n={n}")
        self.wanted: dict[int, dict[str, int]] = defaultdict(dict)  # length -> run of words -> evaluation text
        self.n_unchecked = 0
        for number, text in enumerate(evaluation_texts):
            words = plain_words(text)
            length = min(n, len(words))
            if length < least_words:
                self.n_unchecked += 1
                continue
            for start in range(len(words) - length + 1):
                self.wanted[length].setdefault(" ".join(words[start : start + length]), number)

    def shared(self, text: str) -> tuple[int, str] | None:
        """(number of the evaluation text, the run of words) that a page shares with the set first, or None."""
        words = plain_words(text)
        for length, runs in self.wanted.items():
            for start in range(len(words) - length + 1):
                run = " ".join(words[start : start + length])
                if run in runs:
                    return runs[run], run
        return None


# The S-curve, drawn


def plot_s_curve(
    config: MinHashConfig, measured: list[tuple[float, float]], planted: dict[float, float] | None = None
) -> Figure:
    """Probability of being compared against similarity; `measured` are (similarity, share of pairs), `planted` maps the
    share of edited words to the mean similarity of such copies.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    similarity = np.linspace(0, 1, 201)
    shapes = [(config.n_bands, config.n_rows), (config.n_hashes // 4, 4), (max(1, config.n_hashes // 16), 16)]
    for n_bands, n_rows in shapes:
        curve = 1 - (1 - similarity**n_rows) ** n_bands
        (line,) = axis.plot(similarity, curve, label=f"{n_bands} bands of {n_rows}")
        axis.axvline(band_threshold(n_bands, n_rows), color=line.get_color(), ls=":", lw=1)
    axis.plot(*zip(*measured, strict=True), "ko", ms=4, label=f"measured, {config.n_bands} bands of {config.n_rows}")
    for share, mean in (planted or {}).items():
        axis.annotate(
            f"{share:.0%} edited", (mean, -0.02), rotation=90, fontsize=8, ha="center", va="bottom", color="grey"
        )
    axis.set(xlabel="Jaccard similarity of two pages", ylabel="probability of being compared")
    axis.legend(frameon=False, loc="upper left", fontsize=8)
    return figure
