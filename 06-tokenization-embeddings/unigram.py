"""Topic 06 - Unigram: pieces with probabilities, learnt by expectation maximisation; the likeliest segmentation wins.

Paper: Kudo 2018. Equal to the Rust library `tokenizers` in pieces, scores, ids and spans.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import regex

from tokenizer_basics import (
    BYTE_PIECES,
    NO_NORMALIZER,
    Normalizer,
    WordCutter,
    check_text,
    check_vocab,
    checked_texts,
    expect,
    join_pieces,
    read_tokenizer_json,
)


class UnigramModel(WordCutter):
    """Pieces with log-probabilities, and the segmentations of a text: the likeliest, the n best, random ones.

    A subclass says with `words` how a text is cut into words. Arguments: see Unigram.
    """

    unk_penalty = 10.0  # nats

    def __init__(
        self,
        pieces: list[tuple[str, float]],
        special_tokens: tuple[str, ...] = ("<unk>",),
        unk_token: str = "<unk>",
        byte_fallback: bool = False,
        normalizer: Normalizer = NO_NORMALIZER,
    ):
        self.vocab = {spelling: token_id for token_id, (spelling, _) in enumerate(pieces)}
        if len(self.vocab) < len(pieces):
            twice = next(spelling for spelling, count in Counter(name for name, _ in pieces).items() if count > 1)
            raise ValueError(f"piece {twice!r} stands twice in the vocabulary")
        check_vocab(self.vocab, [*special_tokens, unk_token, *(BYTE_PIECES if byte_fallback else ())])
        self.byte_fallback, self.normalizer = byte_fallback, normalizer
        self.pieces, self.special_tokens, self.unk_token = pieces, special_tokens, unk_token
        self.spellings = {token_id: spelling for spelling, token_id in self.vocab.items()}
        self.scores = {spelling: score for spelling, score in pieces if spelling not in special_tokens}
        self.max_piece_chars = max(map(len, self.scores), default=1)
        self.unk_score = min(score for _, score in pieces) - self.unk_penalty
        self.short_cut = lru_cache(maxsize=2**16)(self.best_pieces)

    def __reduce__(self) -> tuple:
        """Copies and pickles begin with an empty cache."""
        return type(self), (self.pieces, self.special_tokens, self.unk_token, self.byte_fallback, self.normalizer)

    def cut(self, word: str) -> tuple[tuple[str, int, int], ...]:
        """As `best_pieces`, out of a cache for words of ordinary length."""
        return self.short_cut(word) if len(word) <= 256 else self.best_pieces(word)

    def best_pieces(self, word: str) -> tuple[tuple[str, int, int], ...]:
        """The likeliest segmentation of a word (Viterbi): spelling, first and last character of each piece."""
        best: list[tuple[float, int]] = [(0.0, 0)] + [(-math.inf, 0)] * len(word)  # score and start of the last piece
        for start in range(len(word)):
            here = best[start][0]
            for end in range(start + 1, min(start + self.max_piece_chars, len(word)) + 1):
                score = self.scores.get(word[start:end], self.unk_score if end == start + 1 else None)
                if score is not None and here + score > best[end][0]:
                    best[end] = (here + score, start)
        cuts = [len(word)]
        while cuts[-1]:
            cuts.append(best[cuts[-1]][1])
        return self.known_pieces(word[start:end] for start, end in itertools.pairwise(reversed(cuts)))

    def known_pieces(self, parts: Iterable[str]) -> tuple[tuple[str, int, int], ...]:
        """The pieces of a segmentation with their places; a run of characters without pieces is one unknown.

        With byte fallback the run becomes its bytes, each of which has the place of the whole run.
        """
        pieces: list[tuple[str, int, int]] = []
        end = 0
        for known, run in itertools.groupby(parts, self.scores.__contains__):
            for part in run if known else ["".join(run)]:
                start, end = end, end + len(part)
                spelled = [part] if known else [self.unk_token]
                if self.byte_fallback and not known:
                    spelled = [BYTE_PIECES[byte] for byte in part.encode()]
                pieces += [(spelling, start, end) for spelling in spelled]
        return tuple(pieces)

    def n_best(self, text: str, n_samples: int) -> list[tuple[float, list[int]]]:
        """The likeliest segmentations of a text, at most `n_samples`: log-probability (nats) and ids, the best first.

        The n best ways to a place are found among the n best ways to the places before it, so the result is exact
        (Kudo 2018, section 3.3). Without special tokens in the text.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        check_text(text)
        found: list[tuple[float, list[int]]] = [(0.0, [])]
        for word, _ in self.words(self.normalizer(text)):
            ways = n_best_cuts(edges_of(word, self.scores, self.max_piece_chars, self.unk_score), n_samples)
            spelled = []
            for score, cuts in ways:
                parts = [word[start:end] for start, end in itertools.pairwise(cuts)]
                spelled.append((score, [self.vocab[piece] for piece, _, _ in self.known_pieces(parts)]))
            found = [(before + score, ids + more) for before, ids in found for score, more in spelled]
            found = heapq.nlargest(n_samples, found, key=lambda way: way[0])
        return found

    def sample(self, text: str, temperature: float, generator: random.Random) -> list[int]:
        """A random segmentation, each with probability proportional to exp(log-probability / temperature).

        Forward filtering, backward sampling: exact, in one pass each way (Kudo 2018, section 3.3).
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; encode gives the best segmentation")
        check_text(text)
        ids: list[int] = []
        for word, _ in self.words(self.normalizer(text)):
            edges = edges_of(word, self.scores, self.max_piece_chars, self.unk_score)
            heated = [[(start, score / temperature) for start, score in into] for into in edges]
            alpha = forward_scores(heated)
            pieces, end = [], len(word)
            while end:
                weights = [math.exp(alpha[start] + score - alpha[end]) for start, score in heated[end]]
                (start, _) = generator.choices(heated[end], weights)[0]
                pieces.append(word[start:end])
                end = start
            ids.extend(self.vocab[piece] for piece, _, _ in self.known_pieces(reversed(pieces)))
        return ids


class Unigram(UnigramModel):
    """A tokenizer that takes the likeliest of all segmentations (Kudo 2018): pieces are independent, each with a
    log-probability. Blanks are spelled as the metaspace character, one before every word.

    Args:
        pieces: (spelling, log-probability in nats) in the order of their ids
        special_tokens: those of the pieces that no text may produce
        unk_token: stands for characters without a piece; its log-probability is 10 nats below the least
        byte_fallback: spell characters without a piece by the BYTE_PIECES of their UTF-8 instead
        normalizer: the stage before
    """

    metaspace = "\u2581"
    spelling = {"type": "Metaspace", "replacement": metaspace, "prepend_scheme": "always", "split": True}
    byte_score = -1000.0  # nats, of a byte piece: so low that the text "<0x41>" is cut into its characters

    @staticmethod
    def words(text: str) -> list[tuple[str, list[int]]]:
        return metaspace_words(text)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: tuple[str, ...] = ("<unk>",),
        unk_token: str = "<unk>",
        byte_fallback: bool = False,
        normalizer: Normalizer = NO_NORMALIZER,
    ) -> "Unigram":
        """Learn pieces by expectation maximisation and pruning (Kudo 2018, section 3.2); see `train_unigram`."""
        words: Counter[str] = Counter()
        for text in checked_texts(texts):
            words.update(word for word, _ in metaspace_words(normalizer(text)))
        if not words:
            raise ValueError("the corpus is empty; give at least one word")
        first = [(token, 0.0) for token in special_tokens]
        if byte_fallback:  # with the characters of the byte pieces' names, so that these names as text have pieces too
            first += [(piece, cls.byte_score) for piece in BYTE_PIECES]
            words.update(dict.fromkeys("<>x0123456789ABCDEF", 1))
        least = len({char for word in words for char in word}) + len(first)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size must be >= {least} (characters, special tokens and byte pieces), got {vocab_size}"
            )
        pieces = train_unigram(words, vocab_size, vocab_size - len(first))
        return cls([*first, *pieces], special_tokens, unk_token, byte_fallback, normalizer)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with every metaspace as a blank and without the one put before the first word."""
        pieces = [piece.replace(self.metaspace, " ") for piece in self.plain_spellings(ids)]
        first = pieces[:1]  # only a piece loses its blank, as in the library; one that came from bytes keeps it
        return join_pieces([*(piece.removeprefix(" ") for piece in first), *pieces[1:]])

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        unk_id = self.vocab[self.unk_token]
        model = {"type": "Unigram", "unk_id": unk_id, "byte_fallback": self.byte_fallback}
        model["vocab"] = [list(piece) for piece in self.pieces]
        self.write(path, model, pre_tokenizer=self.spelling, decoder=self.decoder_of(self.byte_fallback))

    @classmethod
    def decoder_of(cls, byte_fallback: bool) -> dict:
        bytes_first = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, cls.spelling]}
        return bytes_first if byte_fallback else cls.spelling

    @classmethod
    def load(cls, path: Path) -> "Unigram":
        """Read a tokenizer.json with a Unigram model. Raises ValueError with the reason if it cannot."""
        content, special_tokens = read_tokenizer_json(path, "Unigram")
        expect(path, "pre_tokenizer", content["pre_tokenizer"], cls.spelling)
        model = content["model"]
        try:
            pieces = [(spelling, float(score)) for spelling, score in model["vocab"]]
            unk_id = model["unk_id"]
            if type(unk_id) is not int or unk_id < 0 or not all(math.isfinite(score) for _, score in pieces):
                raise ValueError(f"unk_id is {unk_id!r}, or a score is no finite number")
            unk_token = pieces[unk_id][0]
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"{path}: the pieces or the unk_id are broken: {error}") from None
        fallback, normalizer = model.get("byte_fallback", False), Normalizer.from_json(content["normalizer"])
        expect(path, "decoder", content["decoder"], cls.decoder_of(fallback), None)
        return cls(pieces, special_tokens, unk_token, fallback, normalizer)


def metaspace_words(text: str) -> list[tuple[str, list[int]]]:
    """Cut before every blank, spelled as the metaspace; with each word the position in the text of each character."""
    mark = Unigram.metaspace
    spelled = text.replace(" ", mark)
    shift = 0 if not text or spelled.startswith(mark) else 1
    spelled = mark + spelled if shift else spelled
    words = []
    for match in regex.finditer(f"{mark}?[^{mark}]*", spelled):
        if match.end() > match.start():
            words.append((match.group(), [max(0, at - shift) for at in range(match.start(), match.end())]))
    return words


def train_unigram(
    words: dict[str, int], vocab_size: int, n_pieces: int, max_piece_chars: int = 16
) -> list[tuple[str, float]]:
    """Pieces and their log-probabilities, the likeliest first (Kudo 2018), in the variant of sentencepiece.

    Start from every substring that occurs in at least two places with different continuations; then, until few enough
    are left: two rounds of expectation maximisation, and pruning of those whose loss costs the least likelihood.
    The digamma function in place of the logarithm favours few pieces: a Bayesian prior (Liang and Klein 2007).
    """
    scores = seed_pieces(words, max_piece_chars)
    wanted, shrinking, rare = vocab_size * 11 // 10 - 1, 0.75, 0.5
    while True:
        for _ in range(2):
            expected = expected_counts(words, scores)
            kept = {piece: count for piece, count in expected.items() if count >= rare}
            log_total = digamma(sum(kept.values()))
            scores = {piece: digamma(count) - log_total for piece, count in kept.items()}
        if len(scores) <= wanted:
            break
        scores = prune_pieces(words, scores, max(wanted, int((len(scores) + 1) * shrinking) - 1))
    least = min(scores.values())
    chars = sorted({char for word in words for char in word})
    found = {char: scores[char] for char in chars if char in scores}
    found |= {char: least + 1e-4 * rank for rank, char in enumerate(char for char in chars if char not in scores)}
    for piece, score in scores.items():
        if len(found) >= n_pieces:
            break
        found.setdefault(piece, score)
    return sorted(found.items(), key=lambda item: -item[1])


def seed_pieces(words: dict[str, int], max_piece_chars: int) -> dict[str, float]:
    """All characters, then all substrings that branch, by frequency times length; scores are log shares of these."""
    chars: Counter[str] = Counter()
    follows: dict[str, str | None] = {}  # substring -> what follows it, None once two things did
    places: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            chars[char] += count
        for start in range(len(word)):
            for end in range(start + 2, min(start + max_piece_chars, len(word)) + 1):
                piece, after = word[start:end], word[end : end + 1]
                places[piece] += 1
                if follows.setdefault(piece, after) != after:
                    follows[piece] = None
    ranked = sorted(((count, char) for char, count in chars.items()), reverse=True)
    ranked += sorted(
        ((places[piece] * len(piece), piece) for piece, after in follows.items() if after is None), reverse=True
    )
    log_total = math.log(sum(weight for weight, _ in ranked))
    return {piece: math.log(weight) - log_total for weight, piece in ranked}


Edges = list[list[tuple[int, float]]]  # for each end in a word: the starts of the pieces that end there, with scores


def edges_of(word: str, scores: dict[str, float], max_piece_chars: int, unk_score: float) -> Edges:
    """The lattice of a word: every piece in it, and an unknown character where no piece of one character is."""
    edges: Edges = [[] for _ in range(len(word) + 1)]
    for start in range(len(word)):
        for end in range(start + 1, min(start + max_piece_chars, len(word)) + 1):
            score = scores.get(word[start:end], unk_score if end == start + 1 else None)
            if score is not None:
                edges[end].append((start, score))
    return edges


def log_sum(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def forward_scores(edges: Edges) -> list[float]:
    """Log of the summed probability of all segmentations of each beginning of the word."""
    alpha = [0.0]
    for into in edges[1:]:
        alpha.append(log_sum([alpha[start] + score for start, score in into]))
    return alpha


def expected_counts(words: dict[str, int], scores: dict[str, float]) -> dict[str, float]:
    """How often each piece is used on average over all segmentations of all words, weighted by their probability."""
    expected = dict.fromkeys(scores, 0.0)
    max_piece_chars, unk_score = max(map(len, scores)), min(scores.values()) - Unigram.unk_penalty
    for word, count in words.items():
        edges = edges_of(word, scores, max_piece_chars, unk_score)
        alpha = forward_scores(edges)
        whole = alpha[-1]
        onward: list[list[float]] = [[] for _ in edges]
        onward[-1] = [0.0]
        for end in range(len(word), 0, -1):
            beta = log_sum(onward[end])
            for start, score in edges[end]:
                onward[start].append(score + beta)
                piece = word[start:end]
                if piece in expected:
                    expected[piece] += count * math.exp(alpha[start] + score + beta - whole)
    return expected


def best_cuts(word: str, edges: Edges) -> list[str]:
    """The likeliest path through a lattice; of equal ones, that with the longer last piece."""
    best = [(0.0, 0)]
    for into in edges[1:]:
        score, start = -math.inf, 0
        for begin, piece_score in into:
            if best[begin][0] + piece_score > score:
                score, start = best[begin][0] + piece_score, begin
        best.append((score, start))
    pieces, end = [], len(word)
    while end:
        pieces.append(word[best[end][1] : end])
        end = best[end][1]
    return pieces[::-1]


def n_best_cuts(edges: Edges, n: int) -> list[tuple[float, tuple[int, ...]]]:
    """The n likeliest paths through a lattice, the best first: score, and the places 0, ..., end where it cuts."""
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, (0,))]]
    for end, into in enumerate(edges[1:], start=1):
        ways = [(before + score, (*cuts, end)) for start, score in into for before, cuts in best[start]]
        best.append(heapq.nlargest(n, ways, key=lambda way: way[0]))
    return best[-1]


def prune_pieces(words: dict[str, int], scores: dict[str, float], n_kept: int) -> dict[str, float]:
    """Keep the pieces whose removal would cost the most likelihood (Kudo 2018, section 3.2, step 3).

    The cost is estimated by putting in place of a piece its second best segmentation, everywhere.
    """
    max_piece_chars, unk_score = max(map(len, scores)), min(scores.values()) - Unigram.unk_penalty
    freq: Counter[str | None] = Counter()  # uses in the best segmentations; None counts the unknown characters
    for word, count in words.items():
        for piece in best_cuts(word, edges_of(word, scores, max_piece_chars, unk_score)):
            freq[piece if piece in scores else None] += count
    total, log_total = freq.total(), math.log(freq.total())
    total_words = sum(words.values())
    kept, candidates = {}, []
    for piece, score in scores.items():
        edges = edges_of(piece, scores, max_piece_chars, unk_score)
        whole_is_best = len(best_cuts(piece, edges)) == 1
        edges[-1] = [edge for edge in edges[-1] if edge[0] > 0]
        instead = best_cuts(piece, edges) if whole_is_best and reachable(edges) else []
        if not freq[piece] and not (whole_is_best or len(piece) == 1):
            continue
        if not instead:
            kept[piece] = score
        elif freq[piece]:
            log_after = math.log(total + freq[piece] * len(scores))
            cost = math.log(freq[piece]) - log_total
            cost -= sum(math.log(freq[part if part in scores else None] + freq[piece]) - log_after for part in instead)
            candidates.append((freq[piece] / total_words * cost, piece))
    for _, piece in sorted(candidates, key=lambda candidate: -candidate[0])[: max(0, n_kept - len(kept))]:
        kept[piece] = scores[piece]
    return kept


def reachable(edges: Edges) -> bool:
    """Whether some path leads through the lattice."""
    seen = {0}
    for end, into in enumerate(edges[1:], 1):
        if any(start in seen for start, _ in into):
            seen.add(end)
    return len(edges) - 1 in seen


def digamma(x: float) -> float:
    """The derivative of log(Gamma): recurrence up to 7, then the asymptotic series about x - 1/2."""
    shift = 0.0
    while x < 7:
        shift -= 1 / x
        x += 1
    square = 1 / (x - 0.5) ** 2
    series = square / 24 - 7 * square**2 / 960 + 31 * square**3 / 8064 - 127 * square**4 / 30720
    return shift + math.log(x - 0.5) + series
