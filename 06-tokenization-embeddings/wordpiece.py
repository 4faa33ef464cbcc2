"""Topic 06 - WordPiece: the tokenizer of BERT, which cuts a word by the longest piece that matches.

Papers: Wu et al. 2016, Devlin et al. 2019. It cuts as the Rust library `tokenizers` does, by the signs and
marks of Unicode 8: those that came later count as letters, whatever Unicode the Python knows.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from byte_level_bpe import train_merges
from tokenizer_basics import WordCutter, check_vocab, checked_texts, expect, read_tokenizer_json


class WordPiece(WordCutter):
    """BERT's tokenizer (Devlin et al. 2019): clean, lower-cased words, cut by the longest piece that matches.

    A piece that continues a word is spelled with ## before it. A word with a part that no piece matches is unknown.

    Args:
        vocab: piece -> id, with `unk_token` in it
        special_tokens: those of `vocab` that no text may produce
        unk_token: the piece that stands for a word without pieces
        cleanup: decode without the blanks before full stops, commas, contractions ..., as BERT's own file does
    """

    prefix = "##"
    max_word_chars = 100  # longer words are unknown
    parts = {  # of the tokenizer.json
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": prefix, "cleanup": False},
    }

    @staticmethod
    def words(text: str) -> list[tuple[str, list[int]]]:
        return bert_words(text)

    def __init__(
        self,
        vocab: dict[str, int],
        special_tokens: tuple[str, ...] = ("[UNK]",),
        unk_token: str = "[UNK]",
        cleanup: bool = False,
    ):
        check_vocab(vocab, special_tokens)
        if unk_token not in vocab:
            raise ValueError(f"the vocabulary lacks the unknown token {unk_token!r}")
        self.vocab, self.special_tokens, self.unk_token = vocab, special_tokens, unk_token
        self.cleanup = cleanup
        self.spellings = {token_id: spelling for spelling, token_id in vocab.items()}
        self.pieces = vocab.keys() - set(special_tokens)  # no text may produce a special token

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = ("[UNK]",), min_frequency: int = 0
    ) -> "WordPiece":
        """Learn merges as byte pair encoding does, on characters with ## before those that continue a word.

        The library `tokenizers` gives the ## characters their ids in an order that changes from run to run, and with
        it the order of equally frequent pairs; here they come in the order of their code points.
        """
        words: Counter[str] = Counter()
        for text in checked_texts(texts):
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
            end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in self.pieces), None)
            if end is None:
                break
            pieces.append((mark + word[start:end], start, end))
            start = end
        return pieces if start == len(word) else [(self.unk_token, 0, len(word))]

    def decode(self, ids: Iterable[int]) -> str:
        """Pieces joined to words, words by blanks: case, accents and spacing of the text are gone."""
        pieces = [piece if at == 0 else " " + piece for at, piece in enumerate(self.plain_spellings(ids))]
        pieces = [piece.replace(" " + self.prefix, "") for piece in pieces]
        return "".join(map(clean, pieces) if self.cleanup else pieces)

    def save(self, path: Path) -> None:
        """Write the Hugging Face library's tokenizer.json, whole or not at all."""
        model = {
            "type": "WordPiece",
            "unk_token": self.unk_token,
            "continuing_subword_prefix": self.prefix,
            "max_input_chars_per_word": self.max_word_chars,
            "vocab": self.vocab,
        }
        decoder = {**self.parts["decoder"], "cleanup": self.cleanup}
        self.write(path, model, **{**self.parts, "decoder": decoder})

    @classmethod
    def load(cls, path: Path) -> "WordPiece":
        """Read a tokenizer.json with a WordPiece model. Raises ValueError with the reason if it cannot."""
        content, special_tokens = read_tokenizer_json(path, "WordPiece")
        model = content["model"]
        for part in ("normalizer", "pre_tokenizer"):
            expect(path, part, content[part], cls.parts[part])
        expect(path, "continuing_subword_prefix", model.get("continuing_subword_prefix"), cls.prefix)
        expect(path, "max_input_chars_per_word", model.get("max_input_chars_per_word"), cls.max_word_chars)
        decoder = content["decoder"]
        expect(path, "decoder", decoder, *({**cls.parts["decoder"], "cleanup": way} for way in (False, True)), None)
        return cls(model["vocab"], special_tokens, model.get("unk_token"), bool(decoder and decoder["cleanup"]))


def clean(piece: str) -> str:
    """A piece without the blank that English does not write, in the order of the library's replacements."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " do not", " 's", " 've", " 're"):
        piece = piece.replace(spaced, " don't" if spaced == " do not" else spaced.strip())
    return piece


def code_points(ranges: str) -> list[range]:
    """Ranges of code points, written in hexadecimal with both ends, such as "61d 7fd 890-8e2"."""
    ends = (block.split("-") for block in ranges.split())
    return [range(int(both[0], 16), int(both[-1], 16) + 1) for both in ends]


CHINESE = code_points("3400-4dbf 4e00-9fff f900-faff 20000-2a6df 2a700-2b73f 2b740-2b81f 2b920-2ceaf 2f800-2fa1f")
# Ranges that hold every mark and punctuation sign that Unicode gained after the table of `tokenizers` 0.23.3, and
# otherwise only letters, numbers and symbols; and three characters that Unicode has put into other classes since.
NEWER_SIGNS = frozenset(
    chr(point)
    for block in code_points(
        "5c8-5c9 61d 7fd 890-8e2 9fd-9fe a76 afa-aff b53-b55 c04-c3c c77 c84 d00 d3b-d3c d81 eba ece 180f-1886 "
        "1abf-1af0 1b4e-1b4f 1b7d-1b7f 1df6-1dfb 2e43-2e63 a82c a8c5 a8ff a9bd 10d24-10d6e 10eab-10f89 11070-11074 "
        "110c2-110cd 111cf 1123e-11241 1133b 113bb-1145e 11660-1166c 116b9 1182f-1183b 1193b-11946 119d4-11df0 "
        "11ef3-11f5a 11fff 12ff1-12ff2 13430-13455 1611e-1612f 16d6d-16d6f 16e97-16e9a 16f4f 16fe2-16fe4 1cf00-1cf46 "
        "1d127-1d128 1d25b-1d25c 1e000-1e08f 1e130-1e136 1e2ae-1e2ef 1e4ec-1e4ef 1e5ee-1e5ff 1e6e3-1e6f5 1e944-1e95f"
    )
    for point in block
)
MOVED = {"\u166d": "Po", "\u1734": "Mn", "\U000111c9": "Po"}


def category(char: str) -> str:
    """The class of a character by the table that BERT's normaliser has; newer signs are letters (Lo)."""
    if char in NEWER_SIGNS:
        return "Lo"
    return MOVED.get(char) or unicodedata.category(char)


def bert_words(text: str) -> list[tuple[str, list[int]]]:
    """The words and signs of a text as BERT normalises them, with the position in the text of each character.

    Control characters go, letters lose accents and case, and each punctuation mark and each Chinese character is a
    word of its own.
    """
    words: list[tuple[list[str], list[int]]] = []
    open_word = False
    for at, char in enumerate(text):
        kind = category(char)
        if kind.startswith("Z") or char in "\t\n\r":
            open_word = False
        elif kind in ("Cc", "Cf", "Co") or char == "\ufffd":  # a form feed too: it leaves no gap
            continue
        else:
            chinese = is_chinese(char)
            for part in unicodedata.normalize("NFD", char):
                if category(part) == "Mn":
                    continue
                alone = chinese or is_punctuation(part)
                for lower in part.lower():
                    if alone or not open_word:
                        words.append(([], []))
                    words[-1][0].append(lower)
                    words[-1][1].append(at)
                    open_word = not alone
    return [("".join(letters), origins) for letters, origins in words]


def is_punctuation(char: str) -> bool:
    return category(char).startswith("P") or char in "$+<=>^`|~"


def is_chinese(char: str) -> bool:
    """Whether a character is in one of the blocks that BERT's normaliser calls CJK ideographs."""
    return char >= "\u3400" and any(ord(char) in block for block in CHINESE)
