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

from tokenizer_basics import (
    Rule,
    Token,
    check_ids,
    check_text,
    check_vocab,
    checked_texts,
    expect,
    plain_ids,
    read_json,
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

# How a text is cut into words before any merge: no token reaches across. GPT-2's rule (Radford et al. 2019) takes
# contractions, then words, numbers and symbols with the blank before them, then white space, of which the last blank
# goes with the word that follows. In the second rule every digit is a word of its own, the first with its blank: a
# number of any length is then spelled with twenty tokens that are all well trained.
GPT2_RULE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_RULE = GPT2_RULE.replace(r" ?\p{N}+", r" ?\p{N}")
GPT2_PATTERN = Rule(GPT2_RULE)


def cut_words(pattern: Rule, text: str) -> list[str]:
    """The words that a rule finds, and what it leaves between them as words too: nothing of a text is lost."""
    words = pattern.findall(text)
    if sum(map(len, words)) == len(text):
        return words
    words, end = [], 0
    for match in pattern.finditer(text):
        words += [word for word in (text[end : match.start()], match.group()) if word]
        end = match.end()
    return words + [text[end:]] * (end < len(text))


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
        joined: list[int] = []
        at, end = 0, len(word)
        while at < end:
            if word[at] != first or at + 1 == end or word[at + 1] != second:
                joined.append(word[at])
                at += 1
                continue
            if joined:
                before = joined[-1]
                pair_counts[before, first] -= count
                pair_counts[before, new_id] += count
                new_places[before, new_id].add(index)
            joined.append(new_id)
            at += 2
            if at < end:
                after = word[at]
                pair_counts[second, after] -= count
                pair_counts[new_id, after] += count
                new_places[new_id, after].add(index)
        words[index] = joined
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


class ByteVocabulary:
    """Tokens that are strings of bytes, and the way from ids back to text.

    Args:
        vocab: spelling in GPT-2's byte characters -> id
        special_tokens: those of `vocab` that stand for no bytes
    """

    def __init__(self, vocab: dict[str, int], special_tokens: tuple[str, ...] = ()):
        check_vocab(vocab, special_tokens)
        missing = [char for char in BYTE_CHARS if char not in vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, the first is {missing[0]!r}")
        self.vocab, self.special_tokens = vocab, special_tokens
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}
        self.byte_ids = [vocab[char] for char in BYTE_CHARS]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of a special token are its own spelling."""
        check_ids([token_id], self.spellings)
        spelling = self.spellings[token_id]
        if spelling in self.special_tokens:
            return spelling.encode()
        return bytes(CHAR_BYTES[char] for char in spelling)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, plain_ids(ids)))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, special tokens their spelling or nothing."""
        return "".join(self.stream(ids, skip_special))

    def stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """The text of ids as they come: each piece holds whole characters, and the pieces joined equal `decode`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in plain_ids(ids):
            data = self.token_bytes(token_id)
            if skip_special and self.spellings[token_id] in self.special_tokens:
                data = b""
            piece = decoder.decode(data)
            if piece:
                yield piece
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest


class BytePairMerges(ByteVocabulary):
    """The merges of a vocabulary, and how they join the bytes of one word.

    Args:
        vocab, special_tokens: see ByteVocabulary
        merges: pairs of spellings, the most important first
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: tuple[str, ...] = ()):
        super().__init__(vocab, special_tokens)
        self.merges = merges
        self.ranks: dict[tuple[int, int], tuple[int, int]] = {}  # pair of ids -> rank and id of the merged token
        self.joins: list[tuple[int, int, int]] = []  # rank -> the pair and the merged token
        for rank, (left, right) in enumerate(merges):
            if not {left, right, left + right} <= vocab.keys():
                raise ValueError(f"merge {rank} ({left!r} + {right!r}) uses a token that the vocabulary lacks")
            self.ranks[vocab[left], vocab[right]] = rank, vocab[left + right]
            self.joins.append((vocab[left], vocab[right], vocab[left + right]))
        made = {*BYTE_CHARS, *(left + right for left, right in merges)}
        spelled = [token for token in special_tokens if token in made]
        if spelled:
            raise ValueError(f"text could produce the special token {spelled[0]!r}: a byte or a merge is spelled so")

    def merge_word(self, word: bytes) -> tuple[int, ...]:
        """The ids of one word: join the pair of lowest rank, the leftmost of equals, until no pair can be joined.

        The places of each rank are kept in a list and the positions are linked, so that a word of n bytes costs
        O(n log n) whatever it holds.
        """
        ids = [self.byte_ids[byte] for byte in word]
        before, after = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), -1]
        places: defaultdict[int, list[int]] = defaultdict(list)  # rank -> where such a pair begins, or once began
        for at, pair in enumerate(itertools.pairwise(ids)):
            if pair in self.ranks:
                places[self.ranks[pair][0]].append(at)
        waiting = list(places)
        heapq.heapify(waiting)
        while waiting:
            rank = heapq.heappop(waiting)
            left_id, right_id, new_id = self.joins[rank]
            todo = sorted(places.pop(rank), reverse=True)
            while todo and (not waiting or waiting[0] > rank):  # a merge can make a pair of lower rank, which is next
                at = todo.pop()
                right = after[at]
                if right < 0 or ids[at] != left_id or ids[right] != right_id:  # an earlier merge used one of the two
                    continue
                ids[at], ids[right] = new_id, -1
                after[at] = after[right]
                if after[at] >= 0:
                    before[after[at]] = at
                for start, end in ((before[at], at), (at, after[at])):
                    if start >= 0 and end >= 0 and (ids[start], ids[end]) in self.ranks:
                        new_rank = self.ranks[ids[start], ids[end]][0]
                        if new_rank not in places:
                            heapq.heappush(waiting, new_rank)
                        places[new_rank].append(start)
            if todo:
                places[rank] = todo
                heapq.heappush(waiting, rank)
        return tuple(token_id for token_id in ids if token_id >= 0)

    def merge_with_dropout(self, word: bytes, dropout: float, generator: random.Random) -> list[int]:
        """As `merge_word`, but at each step every possible merge is passed over with probability `dropout`.

        The library `tokenizers` drops less: whenever it meets a merge that others made void, it takes back the drops.
        """
        ids = [self.byte_ids[byte] for byte in word]
        while True:
            offers = [
                (*self.ranks[pair], at)
                for at, pair in enumerate(itertools.pairwise(ids))
                if pair in self.ranks and generator.random() >= dropout
            ]
            if not offers:
                return ids
            _, new_id, at = min(offers, key=lambda offer: (offer[0], offer[2]))
            ids[at : at + 2] = [new_id]


BPE_OPTIONS = {  # of the model in a tokenizer.json; with all bytes in the vocabulary nothing is unknown
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


class ByteLevelBPE(BytePairMerges):
    """Byte pair encoding over UTF-8 bytes, as in GPT-2: every text has tokens, and decoding gives it back.

    Special tokens have the first ids. Text never becomes a special token unless `encode` is told to allow it.

    Args:
        vocab: spelling in GPT-2's byte characters -> id
        merges: pairs of spellings, the most important first
        special_tokens: those of `vocab` that no text may produce
        rule: how a text is cut into words first, such as GPT2_RULE or DIGITS_RULE
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special_tokens: tuple[str, ...] = (),
        rule: str = GPT2_RULE,
    ):
        super().__init__(vocab, merges, special_tokens)
        self.rule, self.pattern = rule, Rule(rule)
        self.short_word_ids = lru_cache(maxsize=2**16)(self.merge_word)

    def __reduce__(self) -> tuple:
        """Copies and pickles, such as those for the workers of a data loader, begin with an empty cache."""
        return type(self), (self.vocab, self.merges, self.special_tokens, self.rule)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: tuple[str, ...] = (),
        min_frequency: int = 0,
        rule: str = GPT2_RULE,
    ) -> "ByteLevelBPE":
        """Learn from texts. Raises ValueError if `vocab_size` leaves no room for 256 bytes and the special tokens."""
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size must be >= {least} (256 bytes and {len(special_tokens)} special tokens), got {vocab_size}"
            )
        words = count_words(texts, rule)
        first = [*special_tokens, *sorted(BYTE_CHARS)]
        return cls(*train_merges(words, vocab_size, first, min_frequency), special_tokens, rule)

    def word_ids(self, word: bytes) -> tuple[int, ...]:
        """As `merge_word`, out of a cache for words of ordinary length: long ones could fill the memory."""
        return self.short_word_ids(word) if len(word) <= 256 else self.merge_word(word)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of a text. Only the special tokens in `allowed_special` are recognised, the longest first."""
        check_text(text)
        ids: list[int] = []
        for part, special in split_special(text, allowed_special, self.special_tokens):
            if special:
                ids.append(self.vocab[part])
            else:
                for word in cut_words(self.pattern, part):
                    ids.extend(self.word_ids(word.encode()))
        return ids

    def encode_with_dropout(self, text: str, dropout: float, generator: random.Random) -> list[int]:
        """BPE-dropout (Provilkov et al. 2020): each possible merge is passed over with probability `dropout`."""
        check_text(text)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {dropout}")
        words = (word.encode() for word in cut_words(self.pattern, text))
        return [token_id for word in words for token_id in self.merge_with_dropout(word, dropout, generator)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, valid UTF-8 or not."""
        if not isinstance(data, bytes | bytearray):
            raise ValueError(f"encode_bytes reads bytes, got {type(data).__name__}; encode reads str")
        text = data.decode("utf-8", "surrogateescape")
        return [
            token_id
            for word in cut_words(self.pattern, text)
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

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        write_atomically(path, json.dumps(bpe_content(self), ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> "ByteLevelBPE":
        """Read a tokenizer.json with a byte-level BPE model. Raises ValueError with the reason if it cannot."""
        return cls(*read_bpe(path))

    @classmethod
    def load_gpt2(cls, vocab_path: Path, merges_path: Path, special_tokens: tuple[str, ...] = ()) -> "ByteLevelBPE":
        """Read GPT-2's pair of files, vocab.json and merges.txt. Raises ValueError with the file and the line."""
        return cls(read_json(vocab_path), read_merges(merges_path), special_tokens)


def count_words(texts: Iterable[str], rule: str = GPT2_RULE) -> dict[tuple[str, ...], int]:
    """How often each word of the texts occurs; words as tuples of byte characters. Raises ValueError if none does."""
    words: Counter[str] = Counter()
    pattern = Rule(rule)
    for text in checked_texts(texts):
        words.update(cut_words(pattern, text))
    if not words:
        raise ValueError("the corpus is empty; give at least one word")
    return {tuple(BYTE_CHARS[byte] for byte in word.encode()): count for word, count in words.items()}


def bpe_content(tokenizer: ByteLevelBPE) -> dict:
    """What the Hugging Face library's tokenizer.json holds for this tokenizer."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cutter = level
    if tokenizer.rule != GPT2_RULE:
        split = {"type": "Split", "pattern": {"Regex": tokenizer.rule}, "behavior": "Isolated", "invert": False}
        cutter = {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}
    merges = [list(pair) for pair in tokenizer.merges]
    model = {"type": "BPE", **BPE_OPTIONS, "vocab": tokenizer.vocab, "merges": merges}
    return tokenizer_json(model, tokenizer.vocab, tokenizer.special_tokens, pre_tokenizer=cutter, decoder=level)


def read_bpe(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], tuple[str, ...], str]:
    """Vocabulary, merges, special tokens and rule of a tokenizer.json. Raises ValueError that says what is wrong."""
    content, special_tokens = read_tokenizer_json(path, "BPE")
    model = content["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        expect(path, option, model.get(option) or BPE_OPTIONS[option], BPE_OPTIONS[option])
    expect(path, "normalizer", content["normalizer"], None)
    decoder = content["decoder"]
    expect(path, "decoder", decoder.get("type") if isinstance(decoder, dict) else decoder, "ByteLevel", None)
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    broken = [number for number, pair in enumerate(merges) if len(pair) != 2]
    if broken:
        raise ValueError(f"{path}: merge {broken[0]} is no pair: {model['merges'][broken[0]]!r}")
    return model["vocab"], merges, special_tokens, rule_of(path, content["pre_tokenizer"])


def rule_of(path: Path, pre_tokenizer: dict | None) -> str:
    """The rule of a tokenizer.json that cuts as one of these does: ByteLevel alone, or a Split by rule before it."""
    found = dict(pre_tokenizer or {})
    parts = found.pop("pretokenizers", [pre_tokenizer])
    split, level = (parts if len(parts) == 2 else [None, *parts])[-2:]
    level = {key: value for key, value in (level or {}).items() if key != "trim_offsets"}
    level = level and {"use_regex": True, **level}  # GPT-2's own file is older than this setting
    expect(path, "pre_tokenizer", level, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": split is None})
    if split is None:
        return GPT2_RULE
    rule = split.get("pattern", {}).get("Regex")
    isolated = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    expect(path, "pre_tokenizer", split, isolated)
    return rule


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, the most important first. Raises ValueError with the line that is none."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}:{number}: a merge is two pieces with one blank between them, got {line!r}")
        merges.append((parts[0], parts[1]))
    return merges
