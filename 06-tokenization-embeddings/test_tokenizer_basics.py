"""Proofs of topic 06: normalisation, batches, the character and the word tokenizer, and the files of all, beside
the libraries `tokenizers` and transformers."""

import itertools
import json
import math
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tokenization_embeddings as topic
from tiny_world import World
from tokenization_embeddings import (
    BYTE_PIECES,
    ByteLevelBPE,
    CharacterTokenizer,
    Normalizer,
    Unigram,
    WordPiece,
    WordTokenizer,
    join_pieces,
    pad_batch,
)
from tokenizer_basics import clusters

TEXTS = [document.text for document in World().documents(60, 1)]
ODD = [
    "",
    " ",
    "\n\n  a\tb ",
    "wörld 日本語 🤖👩‍👩‍👧",
    "ﬁ ŉ İstanbul ǅ",
    "e\u0301" * 30,
    "שלום don't",
    "a\u200db\x00c",
    "<unk>_x",
]


def random_text(generator: random.Random, length: int) -> str:
    """Characters of all planes; none is half of a surrogate pair."""
    tops = [0x7F, 0x7FF, 0xFFFF, 0x10FFFF]
    points = (generator.randint(0, generator.choice(tops)) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def library_of(tokenizer, path: Path) -> Tokenizer:
    tokenizer.save(path)
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True  # special tokens in the text are text
    return library


def ids_and_spans(tokenizer, texts: list[str]) -> list:
    if isinstance(tokenizer, Tokenizer):
        return [(encoded.ids, [tuple(span) for span in encoded.offsets]) for encoded in map(tokenizer.encode, texts)]
    found = [tokenizer.tokens(text) for text in texts]
    return [([token.token_id for token in tokens], [token.span for token in tokens]) for tokens in found]


# The character and the word tokenizer


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_characters_are_cut_as_by_the_library(byte_fallback: bool, tmp_path: Path, parity) -> None:
    ours = CharacterTokenizer.train(TEXTS, 310 if byte_fallback else 50, byte_fallback=byte_fallback)
    theirs = library_of(ours, tmp_path / "ours.json")
    generator = random.Random(0)
    texts = [*ODD, "<0x41>", *TEXTS[:5], *(random_text(generator, 30) for _ in range(200))]
    wanted = ids_and_spans(theirs, texts)
    name = "CharacterTokenizer" + ", byte fallback" * byte_fallback
    parity(name, "tokenizers, ids and spans", "output", ids_and_spans(ours, texts), wanted, 0)
    assert [ours.decode(ids) for ids, _ in wanted] == [theirs.decode(ids) for ids, _ in wanted]
    theirs.save(str(tmp_path / "theirs.json"))
    again = CharacterTokenizer.load(tmp_path / "theirs.json")
    parity(name, "tokenizer.json, both ways", "exchange", ids_and_spans(again, texts), wanted, 0)


def test_byte_fallback_brings_every_text_back() -> None:
    ours = CharacterTokenizer.train(TEXTS, 300, byte_fallback=True)
    generator = random.Random(1)
    texts = [*ODD, "<0x41>", "▁ ▁", *(random_text(generator, generator.randint(0, 40)) for _ in range(2000))]
    assert [text for text in texts if ours.decode(ours.encode(text)) != text] == []
    without = CharacterTokenizer.train(TEXTS, 60)
    assert without.encode("日") == [0] and without.decode(without.encode("a日b")) == "ab"


def test_bytes_that_are_no_text_become_one_mark_each() -> None:
    assert join_pieces([BYTE_PIECES[byte] for byte in "é".encode()]) == "é"
    assert join_pieces(["a", BYTE_PIECES[0xE6], BYTE_PIECES[0x97], "b"]) == "a\ufffd\ufffdb"


@pytest.mark.parametrize("kind", topic.KINDS.values())
def test_a_row_of_a_model_s_answer_is_decoded_too(kind: type) -> None:
    ours = kind.train(TEXTS[:5], 300)
    ids = ours.encode(TEXTS[0])
    assert ours.decode(torch.tensor(ids)) == ours.decode(torch.tensor(ids).int()) == ours.decode(ids) != ""


@pytest.mark.parametrize("vocab_size", [60, 10_000])
def test_words_are_learnt_and_cut_as_by_the_library(vocab_size: int, tmp_path: Path, parity) -> None:
    ours = WordTokenizer.train(TEXTS, vocab_size)
    theirs = Tokenizer(models.WordLevel(unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(WordTokenizer.rule), "removed", invert=True)
    theirs.encode_special_tokens = True
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=["<unk>"], show_progress=False)
    theirs.train_from_iterator(TEXTS, trainer)
    assert ours.vocab == theirs.get_vocab()
    generator = random.Random(0)
    texts = [*ODD, *TEXTS[:20], *(random_text(generator, 30) for _ in range(300))]
    wanted = ids_and_spans(theirs, texts)
    parity("WordTokenizer", "tokenizers, ids and spans", "output", ids_and_spans(ours, texts), wanted, 0)
    theirs.save(str(tmp_path / "theirs.json"))
    both = [ids_and_spans(WordTokenizer.load(tmp_path / "theirs.json"), texts)]
    both.append(ids_and_spans(library_of(ours, tmp_path / "ours.json"), texts))
    parity("WordTokenizer", "tokenizer.json, both ways", "exchange", both, [wanted, wanted], 0)
    assert ours.decode(wanted[9][0]) == theirs.decode(wanted[9][0])


def test_rare_words_are_unknown_and_ties_go_by_spelling() -> None:
    ours = WordTokenizer.train(["b a c b c, d"], 4)
    assert ours.vocab == {"<unk>": 0, "b": 1, "c": 2, ",": 3}
    assert ours.encode("a b,") == [0, 1, 3] and ours.decode([0, 1, 3]) == "b ,"
    assert [token.span for token in ours.tokens("  b, zz")] == [(2, 3), (3, 4), (5, 7)]
    assert set(WordTokenizer.train(["b a c b"], 99, min_frequency=2).vocab) == {"<unk>", "b"}


def test_words_and_pieces_never_spell_a_special_token() -> None:
    words = WordTokenizer({"<unk>": 0, "end": 1, "a": 2}, ("<unk>", "end"))
    assert words.encode("a end") == [2, 0] and words.encode("a end", ["end"]) == [2, 1]
    pieces = WordPiece({"[UNK]": 0, "end": 1, "a": 2}, ("[UNK]", "end"))
    assert pieces.encode("a end") == [2, 0]
    with pytest.raises(ValueError, match="a special token of one character, '#', could be produced by any text"):
        CharacterTokenizer({"<unk>": 0, "#": 1}, ("<unk>", "#"))


# Normalisation


@pytest.mark.parametrize("step", Normalizer.STEPS)
def test_every_character_is_normalised_as_by_the_library(step: str, parity) -> None:
    """But for those that Unicode gained after the library's table was made: they are few, and there ours does more.

    The counts are those of Unicode 14, which Python 3.11 knows; later Pythons know more characters.
    """
    library, ours = getattr(normalizers, Normalizer.STEPS[step])(), Normalizer(step)
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    differing = [char for char in characters if unicodedata.category(char) not in ("Cn", "Lo", "Co")]
    differing = [char for char in differing if ours(char) != library.normalize_str(char)]
    newer = {"nfd": 1, "nfkc": 72, "nfkd": 73, "strip_accents": 315}.get(step, 0)
    newer *= 1 if unicodedata.unidata_version == "14.0.0" else 2
    assert len(differing) <= newer and all(library.normalize_str(char) == char for char in differing)
    generator, gone = random.Random(0), set(differing)
    texts = ["".join(c for c in random_text(generator, 40) if c not in gone and is_assigned(c)) for _ in range(300)]
    marked = ["".join(generator.choice("aeo가각\u0301\u0323\u0327\u0308") for _ in range(20)) for _ in range(200)]
    texts += [*ODD, *marked]
    wanted = [library.normalize_str(text) for text in texts]
    parity(f"Normalizer {step}", "tokenizers.normalizers", "output", [ours(text) for text in texts], wanted, 0)


def is_assigned(char: str) -> bool:
    return unicodedata.category(char) != "Cn"


@pytest.mark.parametrize("form", Normalizer.FORMS.values())
def test_clusters_are_normalised_independently_and_cost_linear_time(form: str) -> None:
    generator = random.Random(2)
    for _ in range(500):
        text = "".join(generator.choice("aeo가각\u0301\u0323\u0327\u0308ﾊﾞ") for _ in range(15))
        parts = list(clusters(text, form))
        assert "".join(parts) == text
        assert "".join(unicodedata.normalize(form, part) for part in parts) == unicodedata.normalize(form, text)
    assert len(list(clusters("e" + "\u0301" * 100_000, form))) == 1


def test_spans_point_into_the_text_before_normalisation(tmp_path: Path, parity) -> None:
    """Equal to the library's except where characters compose: there ours covers all of them."""
    normalizer = Normalizer("nfkd", "lowercase", "strip_accents")
    ours = CharacterTokenizer.train(["filofaxe"], 20, normalizer=normalizer)
    theirs = library_of(ours, tmp_path / "ours.json")
    texts = ["ÉLÉ", "ﬁx İl", "Ω", "e\u0301l\u0323e", "fi"]
    parity("Normalizer, spans", "tokenizers", "output", ids_and_spans(ours, texts), ids_and_spans(theirs, texts), 0)
    composed = Normalizer("nfc").align("xe\u0301y")
    assert composed == ("x\u00e9y", [(0, 1), (1, 3), (3, 4)])
    assert CharacterTokenizer.load(tmp_path / "ours.json").encode("ÉLÉ") == ours.encode("ele")


@pytest.mark.parametrize("kind", [WordTokenizer, Unigram])
def test_a_normaliser_is_saved_with_its_tokenizer(kind: type, tmp_path: Path) -> None:
    ours = kind.train(["the CAFÉ is open", "a cafe", "the open cafes"], 60, normalizer=Normalizer("nfkc", "lowercase"))
    theirs = library_of(ours, tmp_path / "ours.json")
    texts = ["THE Café", "ﬁne", "open\u2003cafes"]
    assert [ids for ids, _ in ids_and_spans(theirs, texts)] == [ours.encode(text) for text in texts]
    assert kind.load(tmp_path / "ours.json").encode("OPEN cafe") == ours.encode("open cafe")


def test_unknown_steps_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="unknown normalisation 'lower'; did you mean 'lowercase'"):
        Normalizer("lower")
    with pytest.raises(ValueError, match="unknown normalizer 'Prepend'"):
        Normalizer.from_json({"type": "Prepend", "prepend": "x"})
    assert Normalizer.from_json({"type": "NFC"}).steps == ("nfc",) and Normalizer.from_json(None)("É") == "É"


# Batches


@pytest.mark.parametrize(("pad_side", "cut_side"), [*itertools.product(("left", "right"), repeat=2)])
@pytest.mark.parametrize("max_seq_len", [None, 4, 100])
def test_batches_equal_those_of_transformers(pad_side: str, cut_side: str, max_seq_len, parity, tmp_path) -> None:
    ours = ByteLevelBPE.train(TEXTS[:10], 300, ("<|pad|>",))
    ours.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        pad_token="<|pad|>",
        padding_side=pad_side,
        truncation_side=cut_side,
    )
    texts = [TEXTS[0][:9], TEXTS[1][:31], "abc", "a", ""]
    wanted = theirs(texts, padding=True, truncation=max_seq_len is not None, max_length=max_seq_len)
    batch = pad_batch([ours.encode(text) for text in texts], ours.vocab["<|pad|>"], max_seq_len, pad_side, cut_side)
    found = [batch.token_ids.tolist(), batch.mask.int().tolist()]
    parity("pad_batch", "PreTrainedTokenizerFast", "output", found, [wanted["input_ids"], wanted["attention_mask"]], 0)
    assert batch.mask.dtype == torch.bool and batch.token_ids.dtype == torch.long


def test_batches_that_cannot_be_are_refused(checked_shapes) -> None:
    for rows, options, message in (
        ([], {}, "a batch needs at least one row"),
        ([[1]], {"max_seq_len": 0}, "max_seq_len must be at least 1, got 0"),
        ([[1]], {"pad_side": "up"}, "unknown side 'up'"),
        ([[1], [2.5, 3]], {}, "row 1 holds 2.5; token ids are whole numbers"),
        ([[True]], {}, "row 0 holds True; token ids are whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_batch(rows, 0, **options)
    import tokenizer_basics

    with checked_shapes(tokenizer_basics) as checked:
        pad_batch([[5, 6, 7], [8]], 0)
    assert len(checked) == 2


# TK7: files that are damaged, or not what they seem


def broken(content: dict, **changes) -> bytes:
    return json.dumps({**content, **changes}).encode()


SPACED = {"content": "<m>", "id": 300, "special": True, "lstrip": True}  # as RoBERTa's <mask>
NORMALISED = {"content": "<m>", "id": 300, "special": True, "normalized": True}
CHARACTERS = {"type": "BPE", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1}, "merges": []}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (WordPiece, {"normalizer": None}, "its normalizer is null, not"),
        (WordPiece, {"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is"),
        (WordTokenizer, {"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is"),
        (Unigram, {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "its pre_tokenizer is"),
        (Unigram, {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["<unk>", 0.0]]}}, "unk_id are broken"),
        (Unigram, {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>"]]}}, "unk_id are broken"),
        (CharacterTokenizer, {"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is"),
        (CharacterTokenizer, {"normalizer": {"type": "Replace"}}, "unknown normalizer 'Replace'"),
        (ByteLevelBPE, {"normalizer": {"type": "NFC"}}, "its normalizer is"),
        (ByteLevelBPE, {"pre_tokenizer": None}, "its pre_tokenizer is"),
        (ByteLevelBPE, {"added_tokens": [{"content": "a", "id": 7, "special": True}]}, "'a' has the ids"),
        (ByteLevelBPE, {"added_tokens": [SPACED]}, "the added token '<m>' has lstrip=true"),
        (ByteLevelBPE, {"added_tokens": ["<m>"]}, "is no tokenizer.json"),
        (ByteLevelBPE, {"decoder": {"type": "Fuse"}}, 'its decoder is "Fuse", not "ByteLevel"'),
        (ByteLevelBPE, {"decoder": "ByteLevel!"}, 'its decoder is "ByteLevel!"'),
        (WordPiece, {"decoder": {"type": "WordPiece", "prefix": "@@", "cleanup": True}}, "its decoder is"),
        (WordPiece, {"added_tokens": [NORMALISED]}, "the added token '<m>' has normalized=true"),
        (WordTokenizer, {"decoder": {"type": "Fuse"}}, "its decoder is"),
        (Unigram, {"decoder": {"type": "Metaspace", "replacement": "_"}}, "its decoder is"),
        (Unigram, {"model": {"type": "Unigram", "unk_id": -1, "vocab": [["<unk>", 0.0]]}}, "unk_id is -1"),
        (Unigram, {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", math.nan]]}}, "no finite number"),
        (CharacterTokenizer, {"model": {**CHARACTERS, "fuse_unk": True}}, "its fuse_unk is true, not false"),
        (CharacterTokenizer, {"model": {**CHARACTERS, "end_of_word_suffix": "</w>"}}, "its end_of_word_suffix is"),
        (CharacterTokenizer, {"decoder": {"type": "BPEDecoder"}}, "its decoder is"),
    ],
)
def test_a_file_that_would_be_cut_otherwise_is_refused(kind: type, changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    kind.train(["a b ab"], 300).save(path)
    assert kind.load(path).encode("ab")
    path.write_bytes(broken(json.loads(path.read_bytes()), **changes))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        kind.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", topic.KINDS.values())
def test_truncated_files_are_refused_at_every_length(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    kind.train(["a b ab"], 300).save(path)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"file.json:1: no valid JSON|is not valid UTF-8 at byte"):
            kind.load(path)


@pytest.mark.parametrize("kind", topic.KINDS.values())
def test_flipped_bytes_raise_a_value_error_or_nothing(kind: type, tmp_path: Path) -> None:
    """A flipped byte may give another valid file; it never gives another kind of error."""
    path, generator = tmp_path / "file.json", random.Random(0)
    kind.train(["a b ab"], 300).save(path)
    data = path.read_bytes()
    for _ in range(150):
        at = generator.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :])
        try:
            kind.load(path)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("kind", [CharacterTokenizer, WordTokenizer])
def test_bad_texts_ids_and_sizes_are_refused_in_words(kind: type) -> None:
    ours = kind.train(["abc abd"], 300)
    with pytest.raises(ValueError, match=r"character 1 is a lone surrogate \(0xd800\)"):
        ours.encode("a\ud800b")
    with pytest.raises(ValueError, match="a tokenizer reads str, got NoneType"):
        ours.encode(None)
    with pytest.raises(ValueError, match="token id 99 is not in 0"):
        ours.decode([99])
    for strange in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"token id {strange!r} is not in 0"):
            ours.decode([strange])
    with pytest.raises(ValueError, match="the corpus is empty"):
        kind.train([], 300)
    with pytest.raises(ValueError, match="vocab_size must be >= 2"):
        kind.train(["abc"], 1)
