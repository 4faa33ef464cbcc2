"""Proofs of topic 06: the trainers, encoders and files beside the library `tokenizers`, round trips, and bad input."""

import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tokenization_embeddings as topic
from python_text import load_texts
from tokenization_embeddings import (
    BYTE_CHARS,
    GPT2_PATTERN,
    ByteLevelBPE,
    Unigram,
    WordPiece,
    digamma,
    edges_of,
    main,
    metaspace_words,
    train_merges,
    train_merges_naively,
)

CORPORA = {name: list(itertools.islice(load_texts(name, "train"), 400)) for name in ("python-text", "tiny-world")}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ODD = [
    "",
    " ",
    "\n\n  a\tb ",
    "wörld 日本語 🤖👩‍👩‍👧",
    "ﬁ ŉ İstanbul ǅ",
    "e\u0301" * 30,
    "שלום",
    "a\u200db\ufffd\x00c",
    "x" * 500,
]


def random_text(generator: random.Random, length: int) -> str:
    """Characters of all planes; none is half of a surrogate pair."""
    tops = [0x7F, 0x7FF, 0xFFFF, 0x10FFFF]
    points = (generator.randint(0, generator.choice(tops)) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def library_bpe(texts: list[str], vocab_size: int, special: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # special tokens in the text are text
    return tokenizer


def library_wordpiece(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def library_unigram(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_of(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


def ids_and_spans(tokenizer, texts: list[str]) -> list:
    if isinstance(tokenizer, Tokenizer):
        return [(encoded.ids, [tuple(span) for span in encoded.offsets]) for encoded in map(tokenizer.encode, texts)]
    found = [tokenizer.tokens(text) for text in texts]
    return [([token.token_id for token in tokens], [token.span for token in tokens]) for tokens in found]


@pytest.fixture(scope="module")
def bpe() -> ByteLevelBPE:
    return ByteLevelBPE.train(CORPORA["python-text"], 700, SPECIAL)


# Byte-level BPE


@pytest.mark.parametrize("vocab_size", [300, 1500])
@pytest.mark.parametrize("corpus", CORPORA)
def test_bpe_learns_the_library_vocabulary_and_merges(corpus: str, vocab_size: int, parity) -> None:
    texts = CORPORA[corpus]
    ours, theirs = ByteLevelBPE.train(texts, vocab_size, SPECIAL), library_bpe(texts, vocab_size, SPECIAL)
    model = model_of(theirs)
    assert ours.vocab == model["vocab"] and [list(pair) for pair in ours.merges] == model["merges"]
    parity("ByteLevelBPE", "tokenizers, trained", "output", list(ours.vocab.values()), list(model["vocab"].values()), 0)


def test_bpe_cuts_every_text_as_the_library_does(bpe: ByteLevelBPE, parity) -> None:
    theirs = library_bpe(CORPORA["python-text"], 700, SPECIAL)
    generator = random.Random(0)
    texts = [*ODD, *CORPORA["tiny-world"][:20], *(random_text(generator, 30) for _ in range(500)), "a<|endoftext|>b"]
    ours, wanted = ids_and_spans(bpe, texts), ids_and_spans(theirs, texts)
    for text, mine, library in zip(texts, ours, wanted, strict=True):
        assert mine == library, text
    parity("ByteLevelBPE", "tokenizers, ids and spans", "output", ours, wanted, 0)


def test_words_are_cut_like_the_library_at_every_character() -> None:
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    points = [*range(0x250), *range(0x300, 0xD800, 7), *range(0xE000, 0x110000, 101)]
    differing = []
    for point in points:
        text = f"a{chr(point)}1{chr(point)}b"
        if [match.span() for match in GPT2_PATTERN.finditer(text)] != [
            span for _, span in library.pre_tokenize_str(text)
        ]:
            differing.append(hex(point))
    assert not differing


def test_bpe_round_trips_any_text_and_any_bytes(bpe: ByteLevelBPE) -> None:
    generator = random.Random(1)
    texts = [*ODD, *(random_text(generator, generator.randint(0, 40)) for _ in range(10_000))]
    assert [text for text in texts if bpe.decode(bpe.encode(text)) != text] == []
    data = [generator.randbytes(generator.randint(0, 40)) for _ in range(2_000)]
    assert [raw for raw in data if bpe.decode_bytes(bpe.encode_bytes(raw)) != raw] == []


def test_streaming_gives_whole_characters_and_the_whole_text(bpe: ByteLevelBPE) -> None:
    generator = random.Random(2)
    for text in [*ODD, *(random_text(generator, 20) for _ in range(200))]:
        pieces = list(bpe.stream(bpe.byte_ids[byte] for byte in text.encode()))  # cut at every byte
        assert "".join(pieces) == text and ("\ufffd" in "".join(pieces)) == ("\ufffd" in text)
    assert "".join(bpe.stream([bpe.byte_ids[0xE6]])) == "\ufffd" == bpe.decode([bpe.byte_ids[0xE6]])
    assert all(isinstance(bpe.decode([token_id]), str) for token_id in range(len(bpe.vocab)))


def test_no_text_becomes_a_special_token_unless_allowed(bpe: ByteLevelBPE) -> None:
    special_ids = {bpe.vocab[token] for token in SPECIAL}
    for token in SPECIAL:
        for text in (token, f"x{token}y", token.upper(), token[:5] + "\u200b" + token[5:], token * 20):
            ids = bpe.encode(text)
            assert not special_ids & set(ids) and bpe.decode(ids) == text
        assert bpe.encode(f"x{token}y", allowed_special=[token])[1:2] == [bpe.vocab[token]]
    assert bpe.decode(bpe.encode("a<|im_end|>b", SPECIAL)) == "a<|im_end|>b"
    longer = ByteLevelBPE.train(["ab"], 260, ("<a>", "<a><b>"))
    assert longer.encode("<a><b>", ("<a>", "<a><b>")) == [1]


def test_merges_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "from tokenization_embeddings import ByteLevelBPE; from python_text import load_texts; import itertools, json;"
        "texts = itertools.islice(load_texts('tiny-world', 'train'), 100);"
        "print(json.dumps(ByteLevelBPE.train(texts, 400).merges))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    ]
    assert len(runs[0]) > 1000 and len(set(runs)) == 1


def test_the_naive_trainer_learns_the_same_merges_where_no_tie_decides() -> None:
    words = {tuple("banana"): 7, tuple("bandana"): 3, tuple("cabana"): 2}
    _, merges = train_merges(words, 100, sorted("abcdn"))
    assert merges[:3] == train_merges_naively(words, 3)


def test_ties_go_to_the_smallest_ids() -> None:
    vocab, merges = train_merges({("c", "d"): 1, ("a", "b"): 1, ("a", "c"): 1}, 7, "abcd")
    assert merges == [("a", "b"), ("a", "c"), ("c", "d")] and vocab["ab"] == 4


def test_a_long_word_takes_no_quadratic_time(bpe: ByteLevelBPE) -> None:
    work = Counter()
    for length in (20_000, 40_000):
        ids = bpe.encode("a" * length)
        assert bpe.decode(ids) == "a" * length
        work[length] = len(ids)
    assert work[40_000] == pytest.approx(2 * work[20_000], abs=2)


def test_dropout_of_merges_lies_between_bytes_and_the_best_tokens(bpe: ByteLevelBPE) -> None:
    text, generator = CORPORA["python-text"][3], random.Random(3)
    assert bpe.encode_with_dropout(text, 0.0, generator) == bpe.encode(text)
    assert bpe.encode_with_dropout(text, 1.0, generator) == [bpe.byte_ids[byte] for byte in text.encode()]
    some = bpe.encode_with_dropout(text, 0.3, generator)
    assert len(bpe.encode(text)) < len(some) < len(text.encode()) and bpe.decode(some) == text


# WordPiece


@pytest.mark.parametrize("vocab_size", [400, 1200])
@pytest.mark.parametrize("corpus", CORPORA)
def test_wordpiece_cuts_as_the_library_does(corpus: str, vocab_size: int, parity) -> None:
    theirs = library_wordpiece(CORPORA[corpus], vocab_size)
    ours = WordPiece(model_of(theirs)["vocab"])
    generator = random.Random(0)
    known = [text for text in (random_text(generator, 20) for _ in range(300)) if is_old(text)]
    texts = [*ODD, *CORPORA["python-text"][:60], *CORPORA["tiny-world"][:60], *known]
    found, wanted = ids_and_spans(ours, texts), ids_and_spans(theirs, texts)
    for text, mine, library in zip(texts, found, wanted, strict=True):
        assert mine == library, ascii(text)
    parity("WordPiece", "tokenizers, ids and spans", "output", found, wanted, 0)


def is_old(text: str) -> bool:
    """Whether every character is assigned: Unicode tables of different years disagree about the others."""
    return all(unicodedata.category(char) != "Cn" for char in text)


@pytest.mark.parametrize("corpus", CORPORA)
def test_wordpiece_learns_the_library_pieces_but_for_ties(corpus: str, parity) -> None:
    """The library numbers the ## characters in an order that changes from run to run, and ties follow the numbers."""
    vocab_size = {"python-text": 900, "tiny-world": 300}[corpus]
    ours = set(WordPiece.train(CORPORA[corpus], vocab_size).vocab)
    runs = [set(model_of(library_wordpiece(CORPORA[corpus], vocab_size))["vocab"]) for _ in range(3)]
    differing = min(len(ours ^ run) for run in runs)
    parity("WordPiece", "tokenizers, pieces that differ", "output", differing, 0, 8)


def test_every_character_of_the_corpus_has_both_its_pieces() -> None:
    ours = WordPiece.train(["abc cab", "bca"], 20)
    assert set("abc") | {"##a", "##b", "##c"} <= ours.vocab.keys()
    assert ours.decode(ours.encode("ABC cab")) == "abc cab" and ours.encode("xyz") == [ours.vocab["[UNK]"]]
    assert ours.encode("a" * 101) == [0] and 0 not in ours.encode("a" * 100)


# Unigram


@pytest.mark.parametrize("vocab_size", [300, 900])
@pytest.mark.parametrize("corpus", CORPORA)
def test_unigram_learns_the_library_pieces(corpus: str, vocab_size: int, parity) -> None:
    texts = CORPORA[corpus][:150]
    ours = Unigram.train(texts, vocab_size)
    theirs = {piece: score for piece, score in model_of(library_unigram(texts, vocab_size))["vocab"]}
    assert set(dict(ours.pieces)) == set(theirs)
    rare = {piece for piece in theirs if len(piece) == 1}  # those without a score come in random order in the library
    pieces = sorted(set(theirs) - rare)
    scores = dict(ours.pieces)
    parity("Unigram", "tokenizers, trained", "output", [scores[p] for p in pieces], [theirs[p] for p in pieces], 1e-9)


def test_unigram_cuts_as_the_library_does(parity) -> None:
    theirs = library_unigram(CORPORA["python-text"], 600)
    ours = Unigram([(piece, score) for piece, score in model_of(theirs)["vocab"]])
    generator = random.Random(0)
    texts = [*ODD, "  a  b ", "▁a ▁b", *CORPORA["tiny-world"][:50], *(random_text(generator, 20) for _ in range(300))]
    found, wanted = ids_and_spans(ours, texts), ids_and_spans(theirs, texts)
    for text, mine, library in zip(texts, found, wanted, strict=True):
        assert mine == library, ascii(text)
    parity("Unigram", "tokenizers, ids and spans", "output", found, wanted, 0)


def test_viterbi_and_sampling_agree_with_the_enumeration_of_all_segmentations() -> None:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("a", -1.5),
        ("b", -2.5),
        ("ab", -2.0),
        ("ba", -2.2),
        ("▁a", -2.1),
        ("aba", -3.6),
    ]
    ours = Unigram(pieces)
    scores, word = dict(pieces), "▁ababa"
    ends = itertools.chain.from_iterable(itertools.combinations(range(1, len(word)), n) for n in range(len(word)))
    cuts = [[word[first:last] for first, last in itertools.pairwise((0, *inner, len(word)))] for inner in ends]
    cuts = [cut for cut in cuts if all(part in scores for part in cut)]
    best = max(cuts, key=lambda cut: sum(scores[part] for part in cut))
    assert ours.encode("ababa") == [ours.vocab[part] for part in best]
    weights = {tuple(cut): 2.718281828459045 ** (sum(scores[part] for part in cut) / 1.5) for cut in cuts}
    total = sum(weights.values())
    generator, n_samples = random.Random(0), 20_000
    drawn = Counter(tuple(ours.spellings[i] for i in ours.sample("ababa", 1.5, generator)) for _ in range(n_samples))
    assert set(drawn) <= set(weights)
    chi2 = sum((drawn[cut] - n_samples * w / total) ** 2 / (n_samples * w / total) for cut, w in weights.items())
    assert chi2 < len(weights) + 5 * (2 * len(weights)) ** 0.5


def test_expected_counts_equal_the_enumeration() -> None:
    scores = {"a": -1.0, "b": -1.2, "ab": -1.5, "ba": -2.0}
    expected = topic.expected_counts({"aba": 2}, scores)
    cuts = [["a", "b", "a"], ["ab", "a"], ["a", "ba"]]
    weights = [2.718281828459045 ** sum(scores[part] for part in cut) for cut in cuts]
    for piece in scores:
        wanted = 2 * sum(w * cut.count(piece) for w, cut in zip(weights, cuts, strict=True)) / sum(weights)
        assert expected[piece] == pytest.approx(wanted, abs=1e-12)


def test_digamma_has_its_known_values() -> None:
    assert digamma(1.0) == pytest.approx(-0.5772156649015329, abs=1e-9)
    assert digamma(10.5) - digamma(9.5) == pytest.approx(1 / 9.5, abs=1e-9)


def test_unknown_neighbours_are_one_token() -> None:
    ours = Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)])
    assert [token.text for token in ours.tokens("a日本a")] == ["▁", "a", "<unk>", "a"]
    assert [token.span for token in ours.tokens("a日本a")] == [(0, 1), (0, 1), (1, 3), (3, 4)]
    assert len(edges_of("日", {}, 1, -9.0)[1]) == 1


def test_metaspace_words_keep_every_blank() -> None:
    assert [word for word, _ in metaspace_words(" a  b")] == ["▁a", "▁", "▁b"]
    assert [word for word, _ in metaspace_words("a b")] == ["▁a", "▁b"] and metaspace_words("") == []


# Files


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_files_go_to_the_library_and_back(kind: str, tmp_path: Path, parity) -> None:
    texts, vocab_size = CORPORA["python-text"][:150], 500
    ours = topic.KINDS[kind].train(texts, vocab_size)
    ours.save(tmp_path / "ours.json")
    theirs = Tokenizer.from_file(str(tmp_path / "ours.json"))
    theirs.encode_special_tokens = True
    sample = [*ODD, *CORPORA["tiny-world"][:20]]
    wanted = ids_and_spans(ours, sample)
    assert ids_and_spans(theirs, sample) == wanted
    theirs.save(str(tmp_path / "theirs.json"))
    again = type(ours).load(tmp_path / "theirs.json")
    parity(type(ours).__name__, "tokenizer.json, both ways", "exchange", ids_and_spans(again, sample), wanted, 0)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "ours.json"))
    assert fast(sample, add_special_tokens=False)["input_ids"] == [ids for ids, _ in wanted]
    assert [theirs.decode(ids) for ids, _ in wanted] == [ours.decode(ids) for ids, _ in wanted]


# Bad input


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_bad_texts_and_ids_are_refused_in_words(kind: str) -> None:
    ours = topic.KINDS[kind].train(["abc abd"], 300)
    with pytest.raises(ValueError, match=r"character 1 is a lone surrogate \(0xd800\)"):
        ours.encode("a\ud800b")
    for bad in (None, 7, b"bytes"):
        with pytest.raises(ValueError, match=f"a tokenizer reads str, got {type(bad).__name__}"):
            ours.encode(bad)
    for bad in (-1, len(ours.vocab)):
        with pytest.raises(ValueError, match=f"token id {bad} is not in 0"):
            ours.decode([bad])
    with pytest.raises(ValueError, match="the corpus is empty"):
        type(ours).train([], 300)
    with pytest.raises(ValueError, match="vocab_size must be >="):
        type(ours).train(["abc"], 1)
    with pytest.raises(ValueError, match="'<x>' is no special token"):
        ours.encode("a", allowed_special=["<x>"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "is not valid UTF-8 at byte 0"),
        (b"{", r"bad.json:1: no valid JSON"),
        (b"[]", "is no tokenizer.json"),
        (b'{"model": {"type": "WordPiece"}, "added_tokens": []}', "holds a WordPiece model, not BPE"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}', "'a' stands twice in one object"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}, "added_tokens": []}', "merge 0 is no pair"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "added_tokens": []}', "belongs to both"),
        (
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}',
            "lacks 255 of the 256 bytes",
        ),
    ],
)
def test_bad_files_are_refused_in_words(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ByteLevelBPE.load(tmp_path / "bad.json")


def test_a_merge_of_unknown_parts_is_refused() -> None:
    vocab = {char: token_id for token_id, char in enumerate(BYTE_CHARS)}
    with pytest.raises(ValueError, match="merge 0 .* uses a token that the vocabulary lacks"):
        ByteLevelBPE(vocab, [("a", "b")])


# The verbs


def test_the_verbs_train_encode_and_compare(tmp_path: Path, capsys) -> None:
    small = ["--n-bytes", "20000", "--out", str(tmp_path)]
    main(["demo", "--vocab-size", "400", *small])
    shown = capsys.readouterr().out
    assert all(f"\n{kind}" in shown for kind in topic.KINDS) and "texts come back" in shown
    main(["train", "--vocab-size", "300", *small])
    main(["encode", "return x", "--out", str(tmp_path)])
    assert "'x':" in capsys.readouterr().out
    main(
        [
            "bench",
            "--n-bytes",
            "3000",
            "--vocab-size",
            "280",
            "--n-naive",
            "2",
            "--n-rounds",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    shown = capsys.readouterr().out
    assert "of tokenizers (Rust)" in shown and "MB/s" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--kind", "bytes"], "unknown kind 'bytes'; choose from bpe, wordpiece, unigram"),
        (["train", "--vocab-size", "100"], "vocab_size must be >= 256"),
        (["encode"], "give at least one text"),
        (["encode", "hi", "--out", "/tmp/nowhere-at-all"], "train one first"),
    ],
)
def test_bad_flags_give_one_line(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
