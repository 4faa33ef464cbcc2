"""Topic 06 - Tokenization and Embeddings: byte-level BPE, WordPiece and Unigram from scratch, equal to `tokenizers`.

python 06-tokenization-embeddings/tokenization_embeddings.py          # three tokenizers, trained on Python's own texts
python 06-tokenization-embeddings/tokenization_embeddings.py train --vocab-size 4096
python 06-tokenization-embeddings/tokenization_embeddings.py bench    # beside the Rust library, in one run

Papers: Sennrich et al. 2016 (BPE), Wu et al. 2016 (WordPiece), Kudo 2018 (Unigram), Provilkov et al. 2020 (dropout).
Each tokenizer saves and loads the `tokenizer.json` of the Hugging Face library.
"""

import codecs
import heapq
import itertools
import json
import math
import random
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import regex

from python_text import load_texts
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    run_verbs,
    seed_everything,
    shown,
    speed_ratio,
    time_in_turns,
    write_atomically,
)

Span = tuple[int, int]  # first and last character of a token in the text, the last one excluded


class Token(NamedTuple):
    token_id: int
    text: str  # as the vocabulary spells it
    span: Span  # where it stands in the text, in characters


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


def check_text(text: str) -> None:
    """Raise ValueError unless `text` is a string that UTF-8 can write: no half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer reads str, got {type(text).__name__}; decode bytes first, or use encode_bytes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = hex(ord(text[error.start]))
        raise ValueError(f"character {error.start} is a lone surrogate ({lone}), which no text may contain") from None


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


# What the three tokenizers share


def check_vocab(vocab: dict[str, int], special_tokens: Collection[str]) -> None:
    """Raise ValueError unless the ids are 0, 1, 2, ..., each once, and every special token has one."""
    taken: dict[int, str] = {}
    for spelling, token_id in vocab.items():
        if token_id in taken:
            raise ValueError(f"id {token_id} belongs to both {taken[token_id]!r} and {spelling!r}")
        taken[token_id] = spelling
    absent = next((token_id for token_id in range(len(vocab)) if token_id not in taken), None)
    if absent is not None:
        raise ValueError(f"the vocabulary has {len(vocab)} tokens but none with id {absent}")
    unknown = [token for token in special_tokens if token not in vocab]
    if unknown:
        raise ValueError(f"special token {unknown[0]!r} is not in the vocabulary")


def check_ids(ids: Iterable[int], spellings: Collection[int]) -> None:
    for token_id in ids:
        if token_id not in spellings:
            raise ValueError(f"token id {token_id!r} is not in 0..{len(spellings) - 1}")


def split_special(text: str, allowed: Collection[str], known: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text at its special tokens: (part, whether it is a special token); of two that match, the longer."""
    strange = [token for token in allowed if token not in known]
    if strange:
        raise ValueError(f"{strange[0]!r} is no special token of this tokenizer; it has {list(known)}")
    if not allowed:
        yield text, False
        return
    longest_first = sorted(allowed, key=len, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)
    yield from ((part, at % 2 == 1) for at, part in enumerate(parts) if part)


def tokenizer_json(
    model: dict, ids: dict[str, int], special_tokens: Iterable[str], normalizer=None, pre_tokenizer=None, decoder=None
) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **plain} for token in special_tokens],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def read_tokenizer_json(path: Path, kind: str) -> tuple[dict, tuple[str, ...]]:
    """The model and the special tokens of a tokenizer.json; ValueError names what is wrong with the file."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}; train one first with the verb train")
    try:
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        if content["model"]["type"] != kind:
            raise ValueError(f"{path} holds a {content['model']['type']} model, not {kind}")
        return content["model"], tuple(token["content"] for token in content["added_tokens"] if token["special"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer.json: {type(error).__name__} {error}") from None


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return made


class WordCutter:
    """What WordPiece and Unigram share: a text is cut into words, and each word into pieces on its own.

    A subclass has `words(text)`, the words with the position in the text of each character, and `cut(word)`, the
    pieces of a word as (spelling, first, last character).
    """

    vocab: dict[str, int]
    special_tokens: tuple[str, ...]
    words: Callable[[str], list[tuple[str, list[int]]]]
    cut: Callable[[str], Iterable[tuple[str, int, int]]]

    def tokens(self, text: str, allowed_special: Collection[str] = ()) -> list[Token]:
        """Pieces with their ids and their character spans in the text as given."""
        check_text(text)
        found, start = [], 0
        for part, special in split_special(text, allowed_special, self.special_tokens):
            if special:
                found.append(Token(self.vocab[part], part, (start, start + len(part))))
            else:
                for word, origins in self.words(part):
                    for spelling, first, last in self.cut(word):
                        span = (start + origins[first], start + origins[last - 1] + 1)
                        found.append(Token(self.vocab[spelling], spelling, span))
            start += len(part)
        return found

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of a text. Only the special tokens in `allowed_special` are recognised, the longest first."""
        return [token.token_id for token in self.tokens(text, allowed_special)]


# WordPiece


class WordPiece(WordCutter):
    """BERT's tokenizer (Devlin et al. 2019): clean, lower-cased words, cut by the longest piece that matches.

    A piece that continues a word is spelled with ## before it. A word with a part that no piece matches is unknown.

    Args:
        vocab: piece -> id, with `unk_token` in it
        special_tokens: those of `vocab` that no text may produce
        unk_token: the piece that stands for a word without pieces
    """

    prefix = "##"
    max_word_chars = 100  # longer words are unknown

    @staticmethod
    def words(text: str) -> list[tuple[str, list[int]]]:
        return bert_words(text)

    def __init__(self, vocab: dict[str, int], special_tokens: tuple[str, ...] = ("[UNK]",), unk_token: str = "[UNK]"):
        check_vocab(vocab, special_tokens)
        if unk_token not in vocab:
            raise ValueError(f"the vocabulary lacks the unknown token {unk_token!r}")
        self.vocab, self.special_tokens, self.unk_token = vocab, special_tokens, unk_token
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = ("[UNK]",), min_frequency: int = 0
    ) -> "WordPiece":
        """Learn merges as byte pair encoding does, on characters with ## before those that continue a word.

        The library `tokenizers` gives the ## characters their ids in an order that changes from run to run, and with
        it the order of equally frequent pairs; here they come in the order of their code points.
        """
        words: Counter[str] = Counter()
        for text in texts:
            words.update(word for word, _ in bert_words(text))
        if not words:
            raise ValueError("the corpus is empty; give at least one word")
        alphabet = sorted({char for word in words for char in word})
        continuing = sorted({cls.prefix + char for word in words for char in word[1:]})
        first = [*special_tokens, *alphabet, *continuing]
        if vocab_size < len(first):
            raise ValueError(f"vocab_size must be >= {len(first)} (special tokens and characters), got {vocab_size}")
        spelled = {(word[0], *(cls.prefix + char for char in word[1:])): count for word, count in words.items()}
        vocab, _ = train_merges(spelled, vocab_size, first, min_frequency, cls.prefix)
        return cls(vocab, special_tokens)

    def cut(self, word: str) -> list[tuple[str, int, int]]:
        """The pieces of one word, each with its first and last character: always the longest that matches."""
        pieces, start = [], 0
        while start < len(word) <= self.max_word_chars:
            mark = self.prefix if start else ""
            end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in self.vocab), None)
            if end is None:
                break
            pieces.append((mark + word[start:end], start, end))
            start = end
        return pieces if start == len(word) else [(self.unk_token, 0, len(word))]

    def decode(self, ids: Iterable[int]) -> str:
        """Pieces joined to words, words by blanks: case, accents and spacing of the text are gone."""
        ids = list(ids)
        check_ids(ids, self.spellings)
        pieces = [self.spellings[token_id] for token_id in ids if self.spellings[token_id] not in self.special_tokens]
        return " ".join(pieces).replace(" " + self.prefix, "")

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        model = {
            "type": "WordPiece",
            "unk_token": self.unk_token,
            "continuing_subword_prefix": self.prefix,
            "max_input_chars_per_word": self.max_word_chars,
            "vocab": self.vocab,
        }
        bert = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
        content = tokenizer_json(
            model,
            self.vocab,
            self.special_tokens,
            normalizer={"type": "BertNormalizer", **bert},
            pre_tokenizer={"type": "BertPreTokenizer"},
            decoder={"type": "WordPiece", "prefix": self.prefix, "cleanup": False},
        )
        write_atomically(path, json.dumps(content, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> "WordPiece":
        """Read a tokenizer.json with a WordPiece model. Raises ValueError with the reason if it cannot."""
        model, special_tokens = read_tokenizer_json(path, "WordPiece")
        return cls(model["vocab"], special_tokens, model["unk_token"])


def bert_words(text: str) -> list[tuple[str, list[int]]]:
    """The words and signs of a text as BERT normalises them, with the position in the text of each character.

    Control characters go, letters lose accents and case, and each punctuation mark and each Chinese character is a
    word of its own.
    """
    words: list[tuple[list[str], list[int]]] = []
    open_word = False
    for at, char in enumerate(text):
        if char.isspace():
            open_word = False
        elif unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs") or char == "\ufffd":
            continue
        else:
            for part in unicodedata.normalize("NFD", char):
                if unicodedata.category(part) == "Mn":
                    continue
                alone = is_punctuation(part) or is_chinese(char)
                for lower in part.lower():
                    if alone or not open_word:
                        words.append(([], []))
                    words[-1][0].append(lower)
                    words[-1][1].append(at)
                    open_word = not alone
    return [("".join(letters), origins) for letters, origins in words]


def is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P") or char in "$+<=>^`|~"


def is_chinese(char: str) -> bool:
    """Whether a character is in one of the blocks that BERT's normaliser calls CJK ideographs."""
    blocks = "4e00-9fff 3400-4dbf 20000-2a6df 2a700-2b73f 2b740-2b81f 2b920-2ceaf f900-faff 2f800-2fa1f"
    return any(
        int(first, 16) <= ord(char) <= int(last, 16) for first, last in (block.split("-") for block in blocks.split())
    )


# Unigram


class Unigram(WordCutter):
    """A tokenizer that takes the likeliest of all segmentations (Kudo 2018): pieces are independent, each with a
    log-probability. Blanks are spelled as the metaspace character, one before every word.

    Args:
        pieces: (spelling, log-probability in nats) in the order of their ids
        special_tokens: those of the pieces that no text may produce
        unk_token: stands for characters without a piece; its log-probability is 10 nats below the least
    """

    metaspace = "\u2581"
    unk_penalty = 10.0  # nats

    @staticmethod
    def words(text: str) -> list[tuple[str, list[int]]]:
        return metaspace_words(text)

    def __init__(self, pieces: list[tuple[str, float]], special_tokens=("<unk>",), unk_token: str = "<unk>"):
        self.vocab = {spelling: token_id for token_id, (spelling, _) in enumerate(pieces)}
        if len(self.vocab) < len(pieces):
            twice = next(spelling for spelling, count in Counter(name for name, _ in pieces).items() if count > 1)
            raise ValueError(f"piece {twice!r} stands twice in the vocabulary")
        check_vocab(self.vocab, [*special_tokens, unk_token])
        self.pieces, self.special_tokens, self.unk_token = pieces, special_tokens, unk_token
        self.spellings = {token_id: spelling for spelling, token_id in self.vocab.items()}
        self.scores = {spelling: score for spelling, score in pieces if spelling not in special_tokens}
        self.max_piece_chars = max(map(len, self.scores), default=1)
        self.unk_score = min(score for _, score in pieces) - self.unk_penalty
        self.cut = lru_cache(maxsize=2**16)(self.best_pieces)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: tuple[str, ...] = ("<unk>",),
        unk_token: str = "<unk>",
    ) -> "Unigram":
        """Learn pieces by expectation maximisation and pruning (Kudo 2018, section 3.2); see `train_unigram`."""
        words: Counter[str] = Counter()
        for text in texts:
            check_text(text)
            words.update(word for word, _ in metaspace_words(text))
        if not words:
            raise ValueError("the corpus is empty; give at least one word")
        n_chars = len({char for word in words for char in word})
        if vocab_size < n_chars + len(special_tokens):
            raise ValueError(f"vocab_size must be >= {n_chars + len(special_tokens)} (characters and special tokens)")
        pieces = train_unigram(words, vocab_size, vocab_size - len(special_tokens))
        return cls([*((token, 0.0) for token in special_tokens), *pieces], special_tokens, unk_token)

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
        pieces: list[tuple[str, int, int]] = []
        for start, end in itertools.pairwise(reversed(cuts)):
            known = word[start:end] in self.scores
            if not known and pieces and pieces[-1][0] == self.unk_token:  # neighbours without pieces are one unknown
                start = pieces.pop()[1]
            pieces.append((word[start:end] if known else self.unk_token, start, end))
        return tuple(pieces)

    def sample(self, text: str, temperature: float, generator: random.Random) -> list[int]:
        """A random segmentation, each with probability proportional to exp(log-probability / temperature).

        Forward filtering, backward sampling: exact, in one pass each way (Kudo 2018, section 3.3).
        """
        check_text(text)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; encode gives the best segmentation")
        ids: list[int] = []
        for word, _ in metaspace_words(text):
            edges = edges_of(word, self.scores, self.max_piece_chars, self.unk_score)
            heated = [[(start, score / temperature) for start, score in into] for into in edges]
            alpha = forward_scores(heated)
            pieces, end = [], len(word)
            while end:
                weights = [math.exp(alpha[start] + score - alpha[end]) for start, score in heated[end]]
                (start, _) = generator.choices(heated[end], weights)[0]
                pieces.append(word[start:end])
                end = start
            ids.extend(self.vocab.get(piece, self.vocab[self.unk_token]) for piece in reversed(pieces))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with every metaspace as a blank and without the one put before the first word."""
        ids = list(ids)
        check_ids(ids, self.spellings)
        spelled = (self.spellings[token_id] for token_id in ids)
        text = "".join("" if spelling in self.special_tokens else spelling for spelling in spelled)
        return text.replace(self.metaspace, " ").removeprefix(" ")

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        unk_id = self.vocab[self.unk_token]
        model = {"type": "Unigram", "unk_id": unk_id, "vocab": [list(piece) for piece in self.pieces]}
        words = {"type": "Metaspace", "replacement": self.metaspace, "prepend_scheme": "always", "split": True}
        content = tokenizer_json(
            {**model, "byte_fallback": False}, self.vocab, self.special_tokens, pre_tokenizer=words, decoder=words
        )
        write_atomically(path, json.dumps(content, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> "Unigram":
        """Read a tokenizer.json with a Unigram model. Raises ValueError with the reason if it cannot."""
        model, special_tokens = read_tokenizer_json(path, "Unigram")
        pieces = [(spelling, float(score)) for spelling, score in model["vocab"]]
        return cls(pieces, special_tokens, pieces[model["unk_id"]][0])


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


# The verbs


KINDS: dict[str, Callable] = {"bpe": ByteLevelBPE, "wordpiece": WordPiece, "unigram": Unigram}


@dataclass(frozen=True)
class TrainConfig:
    data: str = "python-text"  # python-text, tiny-world, a file, or a Hugging Face data set
    kind: str = "bpe"  # bpe, wordpiece or unigram
    vocab_size: int = 1024  # tokens, the special ones included
    n_bytes: int = 300_000  # of the training texts, at most

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", "n_bytes", least=1)
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose from {', '.join(KINDS)}")


@dataclass(frozen=True)
class EncodeConfig:
    texts: tuple[str, ...] = ()  # what to cut into tokens

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError('give at least one text, such as: encode "Tokens are not words."')


@dataclass(frozen=True)
class BenchConfig:
    n_bytes: int = 1_000_000  # of text; repeated if there is less
    vocab_size: int = 4096  # of the trained tokenizers
    n_naive: int = 20  # merges of the naive trainer that are timed; its time for all is the mean times their number
    n_rounds: int = 3  # times each piece of work is timed

    def __post_init__(self) -> None:
        check_range(self, "n_bytes", "n_naive", "n_rounds", least=1)
        check_range(self, "vocab_size", least=257)


def some_texts(data: str, split: str, n_bytes: int) -> list[str]:
    """Texts of a split until they hold `n_bytes`, or all of them."""
    texts, size = [], 0
    for text in load_texts(data, split):
        texts.append(text)
        size += len(text.encode())
        if size >= n_bytes:
            break
    return texts


def demo(config: TrainConfig, run: RunConfig) -> None:
    """Train the three tokenizers on the same texts and show how they cut, and how far they compress unseen text."""
    announce(f"train three tokenizers of {config.vocab_size} tokens on {config.data}", 25)
    seed_everything(run.seed)
    texts = some_texts(config.data, "train", config.n_bytes)
    unseen = some_texts(config.data, "validation", config.n_bytes // 10)
    n_bytes, n_chars = sum(len(text.encode()) for text in unseen), sum(map(len, unseen))
    example = unseen[0][:60]
    print(f"{n_bytes} bytes of unseen text; one byte a token is 1.00, and decoding must give the text back")
    for kind, tokenizer_cls in KINDS.items():
        tokenizer = tokenizer_cls.train(texts, config.vocab_size)
        encoded = [tokenizer.encode(text) for text in unseen]
        same = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, unseen, strict=True))
        n_tokens = sum(map(len, encoded))
        cut = "|".join(example[slice(*token.span)] for token in tokenizer.tokens(example))
        print(
            f"{kind:10} {n_bytes / n_tokens:5.2f} bytes and {n_chars / n_tokens:5.2f} characters a token; "
            f"{same} of {len(unseen)} texts come back; {cut!r}"
        )


def train(config: TrainConfig, run: RunConfig) -> None:
    """Train one tokenizer and save it as tokenizer.json."""
    announce(f"train a {config.kind} tokenizer of {config.vocab_size} tokens on {config.data}", 10)
    tokenizer = KINDS[config.kind].train(some_texts(config.data, "train", config.n_bytes), config.vocab_size)
    path = run.out / f"{config.kind}.json"
    tokenizer.save(path)
    print(f"wrote {shown(path)}: {len(tokenizer.vocab)} tokens")


def encode(config: EncodeConfig, kind: TrainConfig, run: RunConfig) -> None:
    """Cut texts with the tokenizer that the verb train saved."""
    tokenizer = KINDS[kind.kind].load(run.out / f"{kind.kind}.json")
    for text in config.texts:
        tokens = tokenizer.tokens(text)
        print(" ".join(f"{text[slice(*token.span)]!r}:{token.token_id}" for token in tokens))


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Training and encoding of byte-level BPE beside the Rust library and the naive trainer, in one run, as ratios."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = some_texts("python-text", "train", config.n_bytes)
    size = sum(len(text.encode()) for text in texts)
    texts *= math.ceil(config.n_bytes / size)
    announce(f"time byte-level BPE on {config.n_bytes / 1e6:g} MB", 60 * config.n_bytes / 1e6)

    def rust() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    def ours() -> ByteLevelBPE:
        return ByteLevelBPE.train(texts, config.vocab_size)

    words: Counter = Counter(word for text in texts for word in GPT2_PATTERN.findall(text))
    spelled = {tuple(BYTE_CHARS[byte] for byte in word.encode()): count for word, count in words.items()}
    seconds = time_in_turns({"ours": ours, "rust": rust}, config.n_rounds)
    before = time.perf_counter()
    train_merges_naively(spelled, config.n_naive)
    naive = (time.perf_counter() - before) / config.n_naive * (config.vocab_size - 256)
    print(describe_machine())
    print(f"training {config.vocab_size} tokens: {speed_ratio(seconds['ours'], seconds['rust'])} of tokenizers (Rust)")
    mean = sum(seconds["ours"]) / len(seconds["ours"])
    print(f"  {naive / mean:.0f}x the speed of the naive trainer (its time from {config.n_naive} merges)")
    trained, library = ours(), rust()

    def encode_ours() -> None:
        trained.word_ids.cache_clear()
        for text in texts:
            trained.encode(text)

    seconds = time_in_turns({"ours": encode_ours, "rust": lambda: library.encode_batch(texts)}, config.n_rounds)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"encoding: {n_bytes / 1e6 / (sum(seconds['ours']) / len(seconds['ours'])):.2f} MB/s")
    print(f"  {speed_ratio(seconds['ours'], seconds['rust'])} of tokenizers (Rust)")


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "demo": (demo, TrainConfig, RunConfig),
        "train": (train, TrainConfig, RunConfig),
        "encode": (encode, EncodeConfig, TrainConfig, RunConfig),
        "bench": (bench, BenchConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
