"""Topic 06 - Byte-level BPE: the tokenizer of GPT-2, with a trainer that is near linear.

Papers: Sennrich et al. 2016 (byte pair encoding), Radford et al. 2019 (on bytes), Provilkov et al. 2020 (dropout).
Equal to the Rust library `tokenizers` in vocabulary, merges, ids and spans.
"""

import codecs
import heapq
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import regex

from tokenizer_basics import (
    Token,
    check_ids,
    check_text,
    check_vocab,
    read_tokenizer_json,
    split_special,
    tokenizer_json,
)
from workbench import write_atomically

# Text and bytes

BYTE_CHARS = [
    chr(byte) if byte in (*range(33, 127), *range(161, 173), *range(174, 256)) else None for byte in range(256)
]
_hidden = map(chr, range(256, 512))
BYTE_CHARS = [char or next(_hidden) for char in BYTE_CHARS]  # a printable character for each byte, as GPT-2 spells them
CHAR_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARS)}

# Letters and numbers that Unicode gained after the table in `tokenizers` 0.23.3 was made. A tokenizer must not cut a
# text otherwise because a library learnt new characters: those here count as symbols for ever.
NEWER = (
    r"\u0558\u058b\u058c\u088f\u0c5c\u0cdc\u208f\u209d-\u209f\ua7ce\ua7cf\ua7d2\ua7d4\ua7dd\ua7e2\ua7f1\uab6c\uab6d"
    r"\U000107bb-\U000107bf\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010ed9-\U00010eee\U00011b0a"
    r"\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00011df1\U0001246f\U00012475-\U0001247f\U00012550-\U00012686"
    r"\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018cd6-\U00018cda"
    r"\U00018d09-\U00018d20\U00018d80-\U00018df2\U00018e00-\U00019191\U000191a0-\U000191d2\U0001b123-\U0001b128"
    r"\U0001b168\U0001d6a6\U0001df1f-\U0001df24\U0001df2b-\U0001df81\U0001df90-\U0001df96\U0001dfcd-\U0001dfff"
    r"\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4"
    r"\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002b81e\U0002cea2-\U0002cead\U000323b0-\U00033479"
    r"\U0003d000-\U0003fc3f"
)
# GPT-2's rule (Radford et al. 2019): contractions, then words, numbers and symbols with the blank before them, then
# white space, of which the last blank goes with the word that follows.
GPT2_PATTERN = regex.compile(
    rf"(?V1)'(?:[sdmt]|ll|ve|re)| ?[\p{{L}}--[{NEWER}]]+| ?[\p{{N}}--[{NEWER}]]+"
    rf"| ?[[^\s\p{{L}}\p{{N}}]||[{NEWER}]]+|\s+(?!\S)|\s+"
)


# Learning merges: byte pair encoding


def train_merges(
    word_counts: dict[tuple[str, ...], int],
    vocab_size: int,
    first: Iterable[str],
    min_frequency: int = 0,
    prefix: str = "",
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn the vocabulary and the merges of byte pair encoding (Sennrich et al. 2016, algorithm 1).

    The most frequent pair of neighbours becomes one token, again and again; of equally frequent pairs the one whose
    two ids are smallest. The pair counts are kept, not counted again: a merge visits only the words that hold it.

    Args:
        word_counts: each word as a tuple of symbols, with the number of times it occurs
        vocab_size: tokens at most, the first ones included
        first: tokens that come first, in the order of their ids; symbols that are missing here follow as they occur
        min_frequency: stop when the best pair is rarer
        prefix: what marks a symbol that continues a word; it is dropped from the second part of a merge

    The order of work, ties and repeated spellings included, is that of the Rust library `tokenizers`.
    """
    vocab: dict[str, int] = {}
    for symbol in itertools.chain(first, *word_counts):
        vocab.setdefault(symbol, len(vocab))
    spellings, counts = list(vocab), list(word_counts.values())
    words = [[vocab[symbol] for symbol in word] for word in word_counts]
    pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # the words that hold a pair
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[index]
            places[pair].add(index)
    queue = [(-pair_counts[pair], pair, order, held) for order, (pair, held) in enumerate(places.items())]
    heapq.heapify(queue)
    order, merges = len(queue), []
    while len(vocab) < vocab_size and queue:
        minus_count, pair, _, held = queue[0]
        count = pair_counts[pair]
        if count != -minus_count:  # out of date: other merges took some of its places
            heapq.heapreplace(queue, (-count, *queue[0][1:]))
            continue
        heapq.heappop(queue)
        if count < max(1, min_frequency):
            break
        left, right = (spellings[part] for part in pair)
        spelling = left + right.removeprefix(prefix)
        if spelling not in vocab:
            vocab[spelling] = len(spellings)
            spellings.append(spelling)
        merges.append((left, right))
        for new_pair, where in merge_in_words(words, counts, held, pair, vocab[spelling], pair_counts).items():
            if pair_counts[new_pair] > 0:
                heapq.heappush(queue, (-pair_counts[new_pair], new_pair, order, where))
                order += 1
    return vocab, merges


def merge_in_words(
    words: list[list[int]],
    counts: list[int],
    held: set[int],
    pair: tuple[int, int],
    new_id: int,
    pair_counts: dict[tuple[int, int], int],
) -> dict[tuple[int, int], set[int]]:
    """Replace `pair` by `new_id` in the words `held`, keep the pair counts true, and return where new pairs stand."""
    first, second = pair
    new_places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index in held:
        word, count = words[index], counts[index]
        at, last = 0, len(word) - 1
        while at < last:
            if word[at] == first and word[at + 1] == second:
                if at:
                    before = word[at - 1]
                    pair_counts[before, first] -= count
                    pair_counts[before, new_id] += count
                    new_places[before, new_id].add(index)
                word[at : at + 2] = [new_id]
                last -= 1
                if at < last:
                    after = word[at + 1]
                    pair_counts[second, after] -= count
                    pair_counts[new_id, after] += count
                    new_places[new_id, after].add(index)
            at += 1
    return new_places


def train_merges_naively(word_counts: dict[tuple[str, ...], int], n_merges: int) -> list[tuple[str, str]]:
    """The same merges (up to ties) by counting every pair anew for each merge: short, and quadratic."""
    words = {tuple(word): count for word, count in word_counts.items()}
    merges = []
    for _ in range(n_merges):
        pair_counts: Counter = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pair_counts[pair] += count
        if not pair_counts:
            break
        best = max(pair_counts, key=pair_counts.get)
        merges.append(best)
        merged: Counter = Counter()
        for word, count in words.items():
            merged[merge_all(word, best)] += count
        words = merged
    return merges


def merge_all(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of `pair`, from left to right."""
    joined: list[str] = []
    at = 0
    while at < len(symbols):
        if symbols[at : at + 2] == pair:
            joined.append(symbols[at] + symbols[at + 1])
            at += 2
        else:
            joined.append(symbols[at])
            at += 1
    return tuple(joined)


# Byte-level BPE


class ByteLevelBPE:
    """Byte pair encoding over UTF-8 bytes, as in GPT-2: every text has tokens, and decoding gives it back.

    Special tokens have the first ids. Text never becomes a special token unless `encode` is told to allow it.

    Args:
        vocab: spelling in GPT-2's byte characters -> id
        merges: pairs of spellings, the most important first
        special_tokens: those of `vocab` that no text may produce
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: tuple[str, ...] = ()):
        check_vocab(vocab, special_tokens)
        missing = [char for char in BYTE_CHARS if char not in vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, the first is {missing[0]!r}")
        self.vocab, self.merges, self.special_tokens = vocab, merges, special_tokens
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}
        self.ranks: dict[tuple[int, int], tuple[int, int]] = {}  # pair of ids -> rank and id of the merged token
        for rank, (left, right) in enumerate(merges):
            if not {left, right, left + right} <= vocab.keys():
                raise ValueError(f"merge {rank} ({left!r} + {right!r}) uses a token that the vocabulary lacks")
            self.ranks[vocab[left], vocab[right]] = rank, vocab[left + right]
        self.byte_ids = [vocab[char] for char in BYTE_CHARS]
        self.word_ids = lru_cache(maxsize=2**16)(self.merge_word)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = (), min_frequency: int = 0
    ) -> "ByteLevelBPE":
        """Learn from texts. Raises ValueError if `vocab_size` leaves no room for 256 bytes and the special tokens."""
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(f"vocab_size must be >= {least} (256 bytes and {len(special_tokens)} special tokens)")
        words: Counter[str] = Counter()
        for text in texts:
            check_text(text)
            words.update(GPT2_PATTERN.findall(text))
        if not words:
            raise ValueError("the corpus is empty; give at least one word")
        spelled = {tuple(BYTE_CHARS[byte] for byte in word.encode()): count for word, count in words.items()}
        first = [*special_tokens, *sorted(BYTE_CHARS)]
        return cls(*train_merges(spelled, vocab_size, first, min_frequency), special_tokens)

    def merge_word(self, word: bytes) -> tuple[int, ...]:
        """The ids of one word: join the pair of lowest rank, the leftmost of equals, until no pair can be joined.

        A queue of pairs and a linked list of positions keep a word of n bytes at O(n log n).
        """
        ids = [self.byte_ids[byte] for byte in word]
        before, after = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), -1]
        queue = [(*self.ranks[pair], at, pair) for at, pair in enumerate(itertools.pairwise(ids)) if pair in self.ranks]
        queue = [(rank, at, new_id, pair) for rank, new_id, at, pair in queue]
        heapq.heapify(queue)
        while queue:
            _, at, new_id, pair = heapq.heappop(queue)
            right = after[at]
            if right < 0 or (ids[at], ids[right]) != pair:  # an earlier merge used one of the two
                continue
            ids[at], ids[right] = new_id, -1
            after[at] = after[right]
            if after[at] >= 0:
                before[after[at]] = at
            for start, end in ((before[at], at), (at, after[at])):
                if start >= 0 and end >= 0 and (ids[start], ids[end]) in self.ranks:
                    rank, merged = self.ranks[ids[start], ids[end]]
                    heapq.heappush(queue, (rank, start, merged, (ids[start], ids[end])))
        return tuple(token_id for token_id in ids if token_id >= 0)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of a text. Only the special tokens in `allowed_special` are recognised, the longest first."""
        check_text(text)
        ids: list[int] = []
        for part, special in split_special(text, allowed_special, self.special_tokens):
            if special:
                ids.append(self.vocab[part])
            else:
                for word in GPT2_PATTERN.findall(part):
                    ids.extend(self.word_ids(word.encode()))
        return ids

    def encode_with_dropout(self, text: str, dropout: float, generator: random.Random) -> list[int]:
        """BPE-dropout (Provilkov et al. 2020): each possible merge is passed over with probability `dropout`."""
        check_text(text)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {dropout}")
        ids: list[int] = []
        for word in GPT2_PATTERN.findall(text):
            word_ids = [self.byte_ids[byte] for byte in word.encode()]
            while True:
                offers = [
                    (*self.ranks[pair], at)
                    for at, pair in enumerate(itertools.pairwise(word_ids))
                    if pair in self.ranks and generator.random() >= dropout
                ]
                if not offers:
                    break
                _, new_id, at = min(offers, key=lambda offer: (offer[0], offer[2]))
                word_ids[at : at + 2] = [new_id]
            ids.extend(word_ids)
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, valid UTF-8 or not."""
        text = data.decode("utf-8", "surrogateescape")
        return [
            token_id
            for word in GPT2_PATTERN.findall(text)
            for token_id in self.word_ids(word.encode("utf-8", "surrogateescape"))
        ]

    def tokens(self, text: str, allowed_special: Collection[str] = ()) -> list[Token]:
        """Ids, spellings and character spans; a token that holds part of a character spans the whole character."""
        check_text(text)
        found, start = [], 0
        for part, special in split_special(text, allowed_special, self.special_tokens):
            if special:
                found.append(Token(self.vocab[part], part, (start, start + len(part))))
            else:
                owner = [at for at, char in enumerate(part, start) for _ in char.encode()]  # character of each byte
                first = 0
                for token_id in self.encode(part):
                    last = first + len(self.spellings[token_id])
                    found.append(Token(token_id, self.spellings[token_id], (owner[first], owner[last - 1] + 1)))
                    first = last
            start += len(part)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of a special token are its own spelling."""
        check_ids([token_id], self.spellings)
        spelling = self.spellings[token_id]
        if spelling in self.special_tokens:
            return spelling.encode()
        return bytes(CHAR_BYTES[char] for char in spelling)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(token_id) for token_id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come: each piece holds whole characters, and the pieces joined equal `decode`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids:
            piece = decoder.decode(self.token_bytes(token_id))
            if piece:
                yield piece
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    def to_json(self) -> dict:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": self.vocab,
            "merges": [list(pair) for pair in self.merges],
        }
        return tokenizer_json(model, self.vocab, self.special_tokens, pre_tokenizer=level, decoder=level)

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(), ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> "ByteLevelBPE":
        """Read a tokenizer.json with a byte-level BPE model. Raises ValueError with the reason if it cannot."""
        model, special_tokens = read_tokenizer_json(path, "BPE")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        broken = [number for number, pair in enumerate(merges) if len(pair) != 2]
        if broken:
            raise ValueError(f"{path}: merge {broken[0]} is no pair: {model['merges'][broken[0]]!r}")
        return cls(model["vocab"], merges, special_tokens)
