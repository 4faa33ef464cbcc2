"""Topic 06 - What all tokenizers share: tokens with spans, checks, special tokens, the file tokenizer.json.

The file is that of the Hugging Face library `tokenizers`: what is saved here loads there, and the other way round.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import regex

Span = tuple[int, int]  # first and last character of a token in the text, the last one excluded


class Token(NamedTuple):
    token_id: int
    text: str  # as the vocabulary spells it
    span: Span  # where it stands in the text, in characters


def check_text(text: str) -> None:
    """Raise ValueError unless `text` is a string that UTF-8 can write: no half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer reads str, got {type(text).__name__}; decode bytes first, or use encode_bytes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = hex(ord(text[error.start]))
        raise ValueError(f"character {error.start} is a lone surrogate ({lone}), which no text may contain") from None


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
