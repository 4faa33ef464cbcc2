"""Topic 02: the text that Python carries, cleaned and split by content, and the loader of any other text."""

import ast
import inspect
import json
import lzma
import random
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

import python_text as topic
from python_text import (
    COMPRESSORS,
    PARTS,
    bits_per_byte,
    docstrings,
    functions,
    load_texts,
    paragraphs,
    plain,
    python_text,
    reference,
)
from tiny_world import World, held_out

TEXTS = [f"Sentence number {number} speaks of the {number * 7}th thing, and nothing else." for number in range(60)]
TRAIN, VALIDATION = (sorted(text for text in TEXTS if held_out(text) == side) for side in (False, True))


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """The datasets library, with its cache in a folder of this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


# Parity: our readers against those of the datasets library


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_files_are_read_as_the_datasets_library_reads_them(parity, data_sets, tmp_path, suffix: str) -> None:
    texts = [*TEXTS[:20], 'a "quoted" word, a comma', "two\nlines", "  caf\u00e9 \u2192 \u65e5\u672c  "]
    path = tmp_path / f"texts.{suffix}"
    builder = {"jsonl": "json", "csv": "csv"}[suffix]
    table = data_sets.Dataset.from_dict({"number": [*range(len(texts))], "text": texts})
    getattr(table, f"to_{builder}")(str(path))
    theirs = data_sets.load_dataset(builder, data_files=str(path), split="train")["text"]
    ours = load_texts(str(path)) + load_texts(str(path), "validation")
    expected = sorted(text.strip() for text in theirs)
    parity(f"load_texts .{suffix}", f'datasets.load_dataset("{builder}")', "exchange", sorted(ours), expected, 0)


# Cleaning


def test_prose_is_the_same_wherever_it_was_wrapped() -> None:
    rng = random.Random(0)
    sentences = [
        " ".join(rng.choices("the value of an object whose type is known (see below)".split(), k=40)) for _ in range(9)
    ]
    for width in (30, 50, 79):
        text = "\n\n".join(textwrap.fill(sentence, width) for sentence in sentences)
        assert paragraphs(text) == sentences
        assert paragraphs(textwrap.indent(text, "  ").replace("\n", " \n")) == sentences


def test_code_keeps_its_lines_and_tables_and_rules_go() -> None:
    text = """Comprehensions
**************

A list   is made
like this:

   squares = [x * x
              for x in range(3)]

+-----+-----+
| one | two |
+-----+-----+

\u201cDone\u201d \u2013 it\u2019s \u00e9 fine\u2026"""
    assert paragraphs(text) == [
        "Comprehensions",
        "A list is made like this:",
        "   squares = [x * x\n              for x in range(3)]",
        '"Done" - it\'s  fine...'.replace("  ", " "),
    ]
    assert plain("\u2192 \u00d7 \u2264\u00a0\u2265") == "-> x <= >="


# What Python carries


def test_the_reference_is_plain_text_and_holds_each_paragraph_once() -> None:
    found = [paragraph for texts in reference().values() for paragraph in texts]
    assert len(found) == len(set(found)) > 1000 and sum(map(len, found)) > 200_000
    assert all(paragraph.isascii() and paragraph.strip() for paragraph in found)
    prose = [paragraph for paragraph in found if "\n" not in paragraph]
    assert len(prose) > 0.5 * len(found)
    assert any("statement" in paragraph for paragraph in prose)


def test_docstrings_and_functions_are_those_of_the_library() -> None:
    texts = [docstring.text for docstring in docstrings()]
    assert len(texts) == len(set(texts)) > 3000 and all(text.isascii() for text in texts)
    assert plain(inspect.getdoc(textwrap.dedent)) in texts
    found = {(function.module, function.name): function for function in functions()}
    dedent = found["textwrap", "dedent"]
    assert dedent.code.startswith("def dedent(text):") and dedent.summary.startswith(
        "Remove any common leading whitespace"
    )
    assert dedent.summary[:40] not in dedent.code
    some = functions()[::10]
    assert sum(parses(function.code) for function in some) > 0.99 * len(some) > 200
    assert all(len(function.code) <= 300 for function in functions(max_chars=300)) and functions(max_chars=300)
    modules = {docstring.module for docstring in docstrings()}
    assert not any(re.search(r"(^|\.)(test|tests|idlelib|site-packages)(\.|$)", module) for module in modules)
    assert {"textwrap", "json", "json.decoder"} <= modules


def parses(code: str) -> bool:
    try:
        return isinstance(ast.parse(code).body[0], ast.FunctionDef | ast.AsyncFunctionDef)
    except SyntaxError:
        return False


def test_the_two_sides_share_nothing_and_lose_nothing() -> None:
    for parts in (("reference", "docstrings"), ("functions",)):
        train, validation = python_text("train", parts), python_text("validation", parts)
        assert len(set(train) | set(validation)) == len(train) + len(validation)
        assert not any(map(held_out, train)) and all(map(held_out, validation))
        share = len(validation) / (len(train) + len(validation))
        assert abs(share - 0.1) < 4 * (0.09 / len(train)) ** 0.5
    assert python_text("train") == python_text("train")
    assert set(python_text("train", ["reference"])) <= set(python_text("train"))


def test_another_release_splits_the_same_paragraphs_alike(monkeypatch) -> None:
    """The same paragraphs in other topics, wrapped otherwise, beside new ones: each stays on its side."""
    here = [paragraph for paragraph in python_text("validation", ["reference"]) if paragraph[0] != " "][:40]
    there = [paragraph for paragraph in python_text("train", ["reference"]) if paragraph[0] != " "][:400]
    fake = types.ModuleType("pydoc_data.topics")
    mixed = random.Random(0).sample(here + there, len(here + there))
    fake.topics = {
        f"topic{number}": "\n\n".join(
            textwrap.fill(text, 40, break_long_words=False, break_on_hyphens=False) for text in part
        )
        for number, part in enumerate((mixed[:100], ["Something wholly new in this release."], mixed[100:]))
    }
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", fake)
    found = [paragraph for texts in reference.__wrapped__().values() for paragraph in texts]
    assert {text for text in found if held_out(text)} - {"Something wholly new in this release."} == set(here)
    assert {text for text in found if not held_out(text)} >= set(there)


def test_a_python_without_topics_is_told_apart(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="carries no pydoc_data.topics; install the full Python"):
        reference.__wrapped__()


# The loader


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


FILES = {
    "texts.txt": "\n\n".join(TEXTS),
    "texts.md": "\ufeff" + "\r\n \r\n".join(TEXTS) + "\r\n",
    "texts.jsonl": "\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS) + "\n\n",
    "texts.csv": "id,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS),
    "texts.tsv": "text\tid\n" + "".join(f"{text}\t1\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", FILES)
def test_local_files_give_their_texts_split_by_content(tmp_path, name: str) -> None:
    path = write(tmp_path / name, FILES[name])
    assert sorted(load_texts(path)) == TRAIN and sorted(load_texts(path, "validation")) == VALIDATION
    assert load_texts(path, max_texts=3) == load_texts(path)[:3]


def test_another_column_can_be_named(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": text}) for text in TEXTS))
    assert sorted(load_texts(path, column="body")) == TRAIN


def test_the_courses_own_texts_have_names() -> None:
    world = World()
    validation = load_texts("tiny-world", "validation", max_texts=50)
    assert len(validation) == 50 and all(map(held_out, validation))
    assert validation == [document.text for document in world.documents(50, 2, "validation")]
    assert load_texts("python-text", "validation") == python_text("validation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xc3\xa9 ol\xe9", r"a\.txt: not valid UTF-8 at byte 8; convert"),
        ("a.txt", "\n \n\t\n", r"a\.txt: no text in this file"),
        ("a.txt", "only one", "no text on the validation side"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl:2: not valid JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b", "id": 1}', r"a\.jsonl:3: no field 'text'; fields are body, id"),
        ("a.jsonl", '{"text": 5}', r"a\.jsonl:1: field 'text' is int, expected a string"),
        ("a.jsonl", '["text"]', r"a\.jsonl:1: expected an object with a field 'text', got list"),
        ("a.csv", "body,id\nx,1\n", r"a\.csv:1: no column 'text'; columns are body, id"),
        ("a.csv", "", r"a\.csv:1: no column 'text'; columns are none"),
        ("a.csv", "text,id\na,1\nb\n", r"a\.csv:3: this row has not the 2 fields"),
        ("a.csv", "text,id\na,1,2\n", r"a\.csv:2: this row has not the 2 fields"),
        ("a.csv", 'text,id\n"a" b,1\n', r"a\.csv:2: not a valid table"),
        ("a.tsv", "text\tid\na\n", r"a\.tsv:2: this row has not the 2 fields"),
    ],
)
def test_bad_files_are_named_with_line_and_reason(tmp_path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_texts(write(tmp_path / name, content), "validation")
    assert "\n" not in str(error.value)


def test_long_fields_and_deep_nesting_do_no_harm(tmp_path) -> None:
    long = "word " * 60_000
    assert load_texts(write(tmp_path / "a.csv", f"text\n{long}\n{long}more\n")) == [long.strip(), f"{long}more"]
    with pytest.raises(ValueError, match=r"deep\.jsonl:1: not valid JSON"):
        load_texts(write(tmp_path / "deep.jsonl", "[" * 100_000))


def test_data_sets_on_disk_are_loaded(data_sets, tmp_path) -> None:
    table = data_sets.Dataset.from_dict({"text": TEXTS, "id": [*range(len(TEXTS))]})
    (tmp_path / "folder").mkdir()
    table.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    table.to_json(str(tmp_path / "list.json"), lines=False)
    table.save_to_disk(str(tmp_path / "saved"))
    for name in ("folder", "folder/train.parquet", "list.json", "saved"):
        assert sorted(load_texts(str(tmp_path / name))) == TRAIN
        assert sorted(load_texts(str(tmp_path / name), "validation")) == VALIDATION
    halves = data_sets.DatasetDict(train=table.select(range(40)), validation=table.select(range(40, 60)))
    halves.save_to_disk(str(tmp_path / "halves"))
    assert load_texts(str(tmp_path / "halves")) == TEXTS[:40]
    assert load_texts(str(tmp_path / "halves"), "validation") == TEXTS[40:]
    with pytest.raises(ValueError, match="saved: no column 'body'; columns are text, id"):
        load_texts(str(tmp_path / "saved"), column="body")


def test_broken_data_sets_give_one_line(data_sets, tmp_path) -> None:
    for path in (write(tmp_path / "a.parquet", b"PAR1 nothing"), str(tmp_path)):
        with pytest.raises(ValueError) as error:
            load_texts(path)
        assert path in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_id_without_a_network_gives_one_line(data_sets, monkeypatch) -> None:
    monkeypatch.setattr(data_sets.config, "HF_HUB_OFFLINE", False)  # as if the network had failed just now
    expected = (
        r"Hub does not answer \(OfflineModeIsEnabled\) and the data set 'owner/name:part' is not in the local cache"
    )
    with pytest.raises(ValueError, match=expected) as error:
        load_texts("owner/name:part")
    assert "\n" not in str(error.value)
    assert data_sets.config.HF_HUB_OFFLINE is False


def test_what_is_neither_file_nor_id_is_refused(tmp_path) -> None:
    for name in (str(tmp_path / "missing.txt"), "a/b/c", "missing file"):
        with pytest.raises(
            ValueError, match="no such file or folder: .*; use tiny-world, python-text, a local path or"
        ):
            load_texts(name)
    with pytest.raises(ValueError, match="unknown split 'test'; use train or validation"):
        load_texts("tiny-world", "test")
    with pytest.raises(ValueError, match="no data named; use tiny-world"):
        load_texts("")
    with pytest.raises(ValueError, match="max_texts must be >= 1, got -1; None loads all"):
        load_texts("tiny-world", max_texts=-1)
    with pytest.raises(ValueError, match="unknown part 'blog'; use reference, docstrings, functions"):
        python_text("train", ["blog"])


# Compression, and the command line


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(bytes, "abc") == 8
    assert bits_per_byte(lambda data: data[::2], "abcd", before="xyz!") == 4
    letters = "".join(random.Random(0).choices("abcd", k=40_000))  # 2 bits per letter is the entropy
    for name, compress in COMPRESSORS.items():
        assert 2 <= bits_per_byte(compress, letters) < 2.6, name
    assert bits_per_byte(COMPRESSORS["xz"], letters, before=letters) < 0.1
    assert lzma.decompress(COMPRESSORS["xz"](b"text")) == b"text"


def test_demo_measures_the_compressors(tmp_path, capsys) -> None:
    topic.main(["demo", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "PSF License" in printed and all(re.search(rf"^{part} +[\d.]+ MB", printed, re.MULTILINE) for part in PARTS)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) bits per byte of the held-out", printed)]
    after = [float(rate) for rate in re.findall(r", ([\d.]+) after the training", printed)]
    assert len(rates) == len(after) == 3 and all(1 < new < old < 4 for old, new in zip(rates, after, strict=True))
    assert (tmp_path / "compression.svg").stat().st_size > 2000


def test_show_prints_texts_or_one_line_of_error(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.txt", "\n\n".join(TEXTS))
    topic.main(["show", "--data", path, "--n-texts", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{len(TRAIN)} texts" in printed and load_texts(path)[1] in printed and load_texts(path)[2] not in printed
    with pytest.raises(SystemExit) as end:
        topic.main(["show", "--data", str(tmp_path / "none.txt")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "no such file" in message and message.count("\n") == 1
