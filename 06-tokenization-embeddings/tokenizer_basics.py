"""Topic 06 - What all tokenizers share: spans, normalisation, special tokens, batches, the file tokenizer.json.

And the two simplest tokenizers, one token a character and one token a word. The file is that of the Hugging Face
library `tokenizers`: what is saved here loads there, and the other way round.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import regex
import torch
from torch import Tensor

from workbench import check_name, write_atomically

Span = tuple[int, int]  # first and last character of a token in the text, the last one excluded


class Token(NamedTuple):
    token_id: int
    text: str  # as the vocabulary spells it
    span: Span  # where it stands in the text, in characters


# Letters, marks and numbers that Unicode gained after the table in `tokenizers` 0.23.3 was made. A tokenizer must not
# cut a text otherwise because a library learnt new characters: those here count as symbols for ever.
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
    r"\u05c8\u05c9\u0b53\u0b54\u1acf-\u1af0\U00010ecb-\U00010ecf\U00010ef0-\U00010efb\U00011b60-\U00011b67\U00011df0"
    r"\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25b\U0001d25c\U0001d25f\U0001d280\U0001d281\U0001e6e3\U0001e6e6"
    r"\U0001e6ee\U0001e6ef\U0001e6f5"
)


class Rule:
    """A regular expression that cuts a text into words, in the syntax of `tokenizers`.

    Letters, marks and numbers are those of that library's table. Leaving out the newer ones makes the expression three
    times slower, so a text of ASCII alone is cut by the expression as given.
    """

    def __init__(self, rule: str):
        exact = rule
        for name in "LMN":
            exact = exact.replace(rf"\p{{{name}}}", rf"[\p{{{name}}}--[{NEWER}]]")
        try:
            self.plain, self.exact = regex.compile(f"(?V1){rule}"), regex.compile(f"(?V1){exact}")
        except regex.error as error:
            raise ValueError(f"{rule!r} is no regular expression: {error}") from None

    def findall(self, text: str) -> list[str]:
        return (self.plain if text.isascii() else self.exact).findall(text)

    def finditer(self, text: str) -> Iterator[regex.Match]:
        return (self.plain if text.isascii() else self.exact).finditer(text)


# Checks, and special tokens


def check_text(text: str) -> None:
    """Raise ValueError unless `text` is a string that UTF-8 can write: no half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer reads str, got {type(text).__name__}; decode bytes first, or use encode_bytes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = hex(ord(text[error.start]))
        raise ValueError(f"character {error.start} is a lone surrogate ({lone}), which no text may contain") from None


def checked_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts of a corpus, each checked. Raises ValueError for one str, which would count as a text a character."""
    if isinstance(texts, str):
        raise ValueError("a tokenizer is trained on several texts, got one str; put it into a list")
    for text in texts:
        check_text(text)
        yield text


def size_of(texts: Iterable[str]) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


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


def plain_ids(ids: Iterable[int] | Tensor) -> Iterable[int]:
    """Ids as Python's numbers: those of a row (seq) of a tensor too, such as a model's answer."""
    return ids.flatten().tolist() if isinstance(ids, Tensor) and ids.dim() < 2 else ids


def check_ids(ids: Iterable[int], spellings: Collection[int]) -> None:
    for token_id in ids:
        if isinstance(token_id, bool | float) or token_id not in spellings:  # True and 1.0 are found where 1 is
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


# Normalisation: an explicit stage before a text is cut


class Normalizer:
    """Steps that replace a text by a simpler one: unlike cutting, this loses something for good.

    Args:
        steps: names of STEPS, applied in turn; none leaves the text as it is
    """

    FORMS = {"nfc": "NFC", "nfd": "NFD", "nfkc": "NFKC", "nfkd": "NFKD"}  # Unicode Standard Annex 15
    STEPS = {**FORMS, "lowercase": "Lowercase", "strip_accents": "StripAccents"}  # the names in tokenizer.json

    def __init__(self, *steps: str):
        self.steps = tuple(check_name("normalisation", step, self.STEPS) for step in steps)

    def __call__(self, text: str) -> str:
        return self.align(text)[0]

    def align(self, text: str) -> tuple[str, list[Span]]:
        """The normalised text, and for each of its characters the span of the text that it came from.

        Characters that compose or change places come from their whole cluster; `tokenizers` names one part of it.
        """
        spans = [(at, at + 1) for at in range(len(text))]
        for step in self.steps:
            made, origins, start = [], [], 0
            for part in clusters(text, self.FORMS[step]) if step in self.FORMS else text:
                new, alone = self.apply(step, part), [self.apply(step, char) for char in part]
                if new == "".join(alone):
                    origins += [spans[start + at] for at, chars in enumerate(alone) for _ in chars]
                else:
                    origins += [(spans[start][0], spans[start + len(part) - 1][1])] * len(new)
                made.append(new)
                start += len(part)
            text, spans = "".join(made), origins
        return text, spans

    @classmethod
    def apply(cls, step: str, text: str) -> str:
        if step == "lowercase":
            return "".join(map(str.lower, text))  # one by one: no character looks at its neighbours
        if step == "strip_accents":
            return "".join(char for char in text if not unicodedata.category(char).startswith("M"))
        return unicodedata.normalize(cls.FORMS[step], text)

    def to_json(self) -> dict | None:
        steps = [{"type": self.STEPS[step]} for step in self.steps]
        return {"type": "Sequence", "normalizers": steps} if steps else None

    @classmethod
    def from_json(cls, content: dict | None) -> "Normalizer":
        """The stage of a tokenizer.json. Raises ValueError for steps that are not known here."""
        if content is None:
            return cls()
        parts = content["normalizers"] if content["type"] == "Sequence" else [content]
        names = {their_name: step for step, their_name in cls.STEPS.items()}
        return cls(*(names[check_name("normalizer", part["type"], names)] for part in parts))


def clusters(text: str, form: str) -> Iterator[str]:
    """Cut a text where normalisation cannot reach across: before a character that neither moves nor composes."""
    start = 0
    for at in range(1, len(text)):
        char = text[at]
        if char >= "\u0300":  # nothing below composes with what stands before it
            if unicodedata.combining(unicodedata.normalize("NFKD", char)[0]):
                continue
            before, both = (unicodedata.normalize(form, text[start:end]) for end in (at, at + 1))
            if both != before + unicodedata.normalize(form, char):
                continue
        yield text[start:at]
        start = at
    if text:
        yield text[start:]


# Byte fallback: a character without a token becomes the bytes of its UTF-8

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECE_BYTES = {piece: bytes([byte]) for byte, piece in enumerate(BYTE_PIECES)}


def join_pieces(pieces: Iterable[str]) -> str:
    """Pieces as text; a run of byte pieces becomes the text that it is in UTF-8, or one U+FFFD a byte if it is none."""
    text, run = [], bytearray()  # bytes would be copied for every piece
    for piece in [*pieces, ""]:
        if piece in PIECE_BYTES:
            run += PIECE_BYTES[piece]
            continue
        if run:
            try:
                text.append(run.decode())
            except UnicodeDecodeError:
                text.append("\ufffd" * len(run))
            run = bytearray()
        text.append(piece)
    return "".join(text)


# Batches


class Batch(NamedTuple):
    """Token ids of several texts, filled up to one length. Shapes: both (batch, seq)."""

    token_ids: Tensor
    mask: Tensor  # bool: True where a token may be attended to, False where it only fills up


def pad_batch(
    rows: list[list[int]],
    pad_id: int,
    max_seq_len: int | None = None,
    pad_side: str = "right",
    cut_side: str = "right",
) -> Batch:
    """Cut rows of ids to `max_seq_len` at one end and fill them up to the longest at one end.

    Fill on the right to train, on the left to generate: there the last column must hold the last token of every row.
    Raises ValueError if there is no row, or no length.
    """
    for side in (pad_side, cut_side):
        check_name("side", side, ("left", "right"))
    if not rows:
        raise ValueError("a batch needs at least one row of token ids, got none")
    if max_seq_len is not None and max_seq_len < 1:
        raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
    rows = [row[-max_seq_len:] if max_seq_len and cut_side == "left" else row[:max_seq_len] for row in rows]
    longest = max(map(len, rows))
    token_ids = torch.full((len(rows), longest), pad_id)  # (batch, seq)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)  # (batch, seq)
    for index, row in enumerate(rows):
        where = slice(len(row)) if pad_side == "right" else slice(longest - len(row), longest)
        ids = torch.tensor(row, dtype=None if len(row) else torch.long)
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(f"row {index} holds {row[0]!r}; token ids are whole numbers")
        token_ids[index, where] = ids.long()
        mask[index, where] = True
    return Batch(token_ids, mask)


# The file tokenizer.json


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
    """The content and the special tokens of a tokenizer.json; ValueError names what is wrong with the file.

    Special tokens that the model's vocabulary lacks, as in the files of many chat models, are put into it. What the
    file says of post-processing, truncation and padding is not read: ids are those of the text alone, spans untrimmed.
    """
    content = read_json(path)
    try:
        model = content["model"]
        found = model["type"] if "type" in model else legacy_type(model)
        if found != kind:
            raise ValueError(f"{path} holds a {found} model, not {kind}")
        added = [(token["content"], token["id"], token["special"]) for token in content["added_tokens"]]
        tables = {"vocab": list if kind == "Unigram" else dict, **({"merges": list} if kind == "BPE" else {})}
        for name, table in tables.items():
            if not isinstance(model[name], table):
                raise ValueError(f"{path}: {name} should be a {table.__name__}, got {type(model[name]).__name__}")
        for token in content["added_tokens"]:
            wider = [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]
            wider += ["normalized"] if token.get("normalized") and content.get("normalizer") else []
            if wider:
                raise ValueError(
                    f"{path}: the added token {token['content']!r} has {wider[0]}=true, but here a special token is "
                    "found by its spelling alone, whatever stands beside it"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tokenizer.json: {type(error).__name__} {error}") from None
    for token, token_id, special in added:
        if not special:
            raise ValueError(f"{path}: the added token {token!r} is not special, and any text could produce it")
        if isinstance(model["vocab"], dict) and model["vocab"].setdefault(token, token_id) != token_id:
            raise ValueError(f"{path}: {token!r} has the ids {model['vocab'][token]} and {token_id}")
    parts = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return {**parts, "model": model}, tuple(token for token, _, _ in added)


def legacy_type(model: dict) -> str:
    """The kind of a model in a file from before 2021, such as GPT-2's own: it is told by its fields alone."""
    fields = {"merges": "BPE", "unk_id": "Unigram", "max_input_chars_per_word": "WordPiece"}
    return next((kind for field, kind in fields.items() if field in model), "WordLevel")


def read_json(path: Path) -> dict:
    """An object of JSON. Raises ValueError with file, line and reason, also for a key that stands twice."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}; train one first with the verb train")
    try:
        return json.loads(path.read_bytes().decode(), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def expect(path: Path, part: str, found: object, *known: object) -> None:
    """Raise ValueError unless a part of a tokenizer.json is one of those that the class works like."""
    if found not in known:
        wanted = " or ".join(json.dumps(value) for value in known)
        raise ValueError(f"{path} is no file for this tokenizer: its {part} is {json.dumps(found)}, not {wanted}")


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return made


# What is cut word by word


NO_NORMALIZER = Normalizer()


class WordCutter:
    """What WordPiece and Unigram share: a text is cut into words, and each word into pieces on its own.

    A subclass has `words(text)`, the words with the position in the text of each character, and `cut(word)`, the
    pieces of a word as (spelling, first, last character).
    """

    vocab: dict[str, int]
    spellings: dict[int, str]
    special_tokens: tuple[str, ...]
    normalizer: Normalizer = NO_NORMALIZER
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
                plain, spans = self.normalizer.align(part)
                for word, origins in self.words(plain):
                    for spelling, first, last in self.cut(word):
                        span = (start + spans[origins[first]][0], start + spans[origins[last - 1]][1])
                        found.append(Token(self.vocab[spelling], spelling, span))
            start += len(part)
        return found

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of a text. Only the special tokens in `allowed_special` are recognised, the longest first."""
        return [token.token_id for token in self.tokens(text, allowed_special)]

    def plain_spellings(self, ids: Iterable[int]) -> list[str]:
        """The spellings of ids, without the special tokens. Raises ValueError for an id that no token has."""
        ids = list(plain_ids(ids))
        check_ids(ids, self.spellings)
        spelled = (self.spellings[token_id] for token_id in ids)
        return [spelling for spelling in spelled if spelling not in self.special_tokens]

    def write(self, path: Path, model: dict, **parts: dict) -> None:
        """Write a tokenizer.json with this model, whole or not at all."""
        normalizer = self.normalizer.to_json()
        content = tokenizer_json(model, self.vocab, self.special_tokens, **{"normalizer": normalizer, **parts})
        write_atomically(path, json.dumps(content, ensure_ascii=False).encode())


# The two simplest tokenizers


class CharacterTokenizer(WordCutter):
    """One token for each character: a vocabulary of dozens, and the longest sequences.

    Without byte fallback a strange character is the unknown token; with it, it is the bytes of its UTF-8, and every
    text comes back. Saved as a BPE model without merges.

    Args:
        vocab: character -> id, with `unk_token` and, for byte fallback, the 256 BYTE_PIECES
        special_tokens: those of `vocab` that no text may produce
        unk_token: stands for a character without a token
        byte_fallback: spell a character without a token by its bytes
        normalizer: the stage before
    """

    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}

    def __init__(
        self,
        vocab: dict[str, int],
        special_tokens: tuple[str, ...] = ("<unk>",),
        unk_token: str = "<unk>",
        byte_fallback: bool = False,
        normalizer: Normalizer = NO_NORMALIZER,
    ):
        check_vocab(vocab, [*special_tokens, unk_token, *(BYTE_PIECES if byte_fallback else ())])
        short = [token for token in special_tokens if len(token) == 1]
        if short:
            raise ValueError(f"a special token of one character, {short[0]!r}, could be produced by any text")
        self.vocab, self.special_tokens, self.unk_token = vocab, special_tokens, unk_token
        self.byte_fallback, self.normalizer = byte_fallback, normalizer
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: tuple[str, ...] = ("<unk>",),
        byte_fallback: bool = False,
        normalizer: Normalizer = NO_NORMALIZER,
    ) -> "CharacterTokenizer":
        """Give ids to the most frequent characters, of equals to the smaller code point, as many as there is room."""
        counts = Counter(char for text in checked_texts(texts) for char in normalizer(text))
        first = [*special_tokens, *(BYTE_PIECES if byte_fallback else ())]
        return cls(frequent_first(counts, vocab_size, first), special_tokens, "<unk>", byte_fallback, normalizer)

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        return [(text, list(range(len(text))))] if text else []

    def cut(self, word: str) -> Iterator[tuple[str, int, int]]:
        for at, char in enumerate(word):
            if char in self.vocab:
                yield char, at, at + 1
            elif self.byte_fallback:
                for byte in char.encode():
                    yield BYTE_PIECES[byte], at, at + 1
            else:
                yield self.unk_token, at, at + 1

    def decode(self, ids: Iterable[int]) -> str:
        """The characters joined; special tokens, the unknown one among them, leave nothing."""
        return join_pieces(self.plain_spellings(ids))

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        model = {
            "type": "BPE",
            "unk_token": self.unk_token,
            "byte_fallback": self.byte_fallback,
            "fuse_unk": False,
            "vocab": self.vocab,
            "merges": [],
        }
        self.write(path, model, decoder=self.decoder)

    @classmethod
    def load(cls, path: Path) -> "CharacterTokenizer":
        """Read a tokenizer.json with a BPE model without merges. Raises ValueError with the reason if it cannot."""
        content, special_tokens = read_tokenizer_json(path, "BPE")
        model = content["model"]
        expect(path, "list of merges", model["merges"], [])
        expect(path, "pre_tokenizer", content["pre_tokenizer"], None)
        for option in ("continuing_subword_prefix", "end_of_word_suffix"):
            expect(path, option, model.get(option) or None, None)
        expect(path, "fuse_unk", model.get("fuse_unk") or False, False)
        normalizer, fallback = Normalizer.from_json(content["normalizer"]), model.get("byte_fallback", False)
        joined = [] if fallback else [{"type": "Fuse"}]
        expect(path, "decoder", content["decoder"], cls.decoder, *joined, None)
        return cls(model["vocab"], special_tokens, model.get("unk_token"), fallback, normalizer)


class WordTokenizer(WordCutter):
    """One token for each word and each punctuation mark: short sequences, and every rare word is unknown.

    Args:
        vocab: word -> id, with `unk_token` in it
        special_tokens: those of `vocab` that no text may produce
        unk_token: stands for a word without a token
        normalizer: the stage before
    """

    rule = r"[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]"
    pattern = Rule(rule)
    pre_tokenizer = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Removed", "invert": True}

    def __init__(
        self,
        vocab: dict[str, int],
        special_tokens: tuple[str, ...] = ("<unk>",),
        unk_token: str = "<unk>",
        normalizer: Normalizer = NO_NORMALIZER,
    ):
        check_vocab(vocab, [*special_tokens, unk_token])
        self.vocab, self.special_tokens, self.unk_token = vocab, special_tokens, unk_token
        self.normalizer = normalizer
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: tuple[str, ...] = ("<unk>",),
        min_frequency: int = 0,
        normalizer: Normalizer = NO_NORMALIZER,
    ) -> "WordTokenizer":
        """Give ids to the most frequent words, of equals to the first in order of code points."""
        counts = Counter(word for text in checked_texts(texts) for word in cls.pattern.findall(normalizer(text)))
        vocab = frequent_first(counts, vocab_size, special_tokens, min_frequency)
        return cls(vocab, special_tokens, "<unk>", normalizer)

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        return [(match.group(), list(range(*match.span()))) for match in self.pattern.finditer(text)]

    def cut(self, word: str) -> list[tuple[str, int, int]]:
        known = word in self.vocab and word not in self.special_tokens
        return [(word if known else self.unk_token, 0, len(word))]

    def decode(self, ids: Iterable[int]) -> str:
        """The words with one blank between them: the white space of the text is gone, and so are unknown words."""
        return " ".join(self.plain_spellings(ids))

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        model = {"type": "WordLevel", "vocab": self.vocab, "unk_token": self.unk_token}
        self.write(path, model, pre_tokenizer=self.pre_tokenizer)

    @classmethod
    def load(cls, path: Path) -> "WordTokenizer":
        """Read a tokenizer.json with a WordLevel model. Raises ValueError with the reason if it cannot."""
        content, special_tokens = read_tokenizer_json(path, "WordLevel")
        expect(path, "pre_tokenizer", content["pre_tokenizer"], cls.pre_tokenizer)
        expect(path, "decoder", content["decoder"], None)
        model, normalizer = content["model"], Normalizer.from_json(content["normalizer"])
        return cls(model["vocab"], special_tokens, model.get("unk_token"), normalizer)


def frequent_first(
    counts: Counter[str], vocab_size: int, first: Iterable[str], min_frequency: int = 0
) -> dict[str, int]:
    """Ids for the tokens `first`, then for the most frequent others, of equals for the first in order."""
    vocab = {token: token_id for token_id, token in enumerate(first)}
    if not counts:
        raise ValueError("the corpus is empty; give at least one word")
    if vocab_size <= len(vocab):
        raise ValueError(f"vocab_size must be >= {len(vocab) + 1} ({len(vocab)} tokens come first), got {vocab_size}")
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        if len(vocab) < vocab_size and counts[token] >= min_frequency:
            vocab.setdefault(token, len(vocab))
    return vocab
