"""Topic 02 - Python text: the real English and code that every Python installation carries, and a loader for any text.

The same paragraph is on the same side of the split in every Python version, with no download.

python 02-sequence-modeling/python_text.py                       # sizes, compression, a paragraph
python 02-sequence-modeling/python_text.py show --data notes.txt # what the loader makes of a file or a data set
python 02-sequence-modeling/python_text.py --help

The text is the Python language reference (`pydoc_data.topics`), and the docstrings and functions of the standard
library. It is the work of the Python Software Foundation and its contributors, under the PSF License Agreement
(https://docs.python.org/3/license.html); nothing of it is copied into this repository.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import ast
import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tiny_world import World, held_out
from workbench import RunConfig, announce, check_range, run_verbs, save_figure

SPLITS = ("train", "validation")
PARTS = ("reference", "docstrings", "functions")

# Cleaning


TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2192": "->",
        "\u00d7": "x",
        "\u2264": "<=",
        "\u2265": ">=",
    }
)


def plain(text: str) -> str:
    """Replace typographic characters by ASCII ones and drop what remains beyond ASCII: 96 characters are enough."""
    return text.translate(TYPOGRAPHY).encode("ascii", "ignore").decode()


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines; put each paragraph of prose on one line, keep indented code as it stands.

    Since prose has no line breaks left, a release that wraps a paragraph elsewhere gives the same string, hence the
    same side of the split. Tables, underlines of headings and drawings are dropped.
    """
    found = []
    for block in re.split(r"\n[ \t]*\n", plain(text)):
        lines = [line.rstrip() for line in block.expandtabs().splitlines() if re.search(r"[A-Za-z0-9]", line)]
        n_table = sum(line.lstrip().startswith(("|", "+")) for line in lines)
        if not lines or 2 * n_table > len(lines):
            continue
        code = all(line.startswith("   ") for line in lines) and re.search(r">>>|::=|[=(){}\[\]:]", block)
        found.append("\n".join(lines) if code else " ".join(" ".join(lines).split()))
    return found


def unique(texts: Iterable[str]) -> list[str]:
    """Keep the first of equal texts, in order."""
    return list(dict.fromkeys(texts))


# What Python carries


@dataclass(frozen=True)
class Docstring:
    """The documentation of a module, class or function of the standard library, in plain ASCII."""

    module: str
    name: str  # empty for the module itself
    text: str


@dataclass(frozen=True)
class LibraryFunction:
    """A documented function of the standard library."""

    module: str
    name: str
    summary: str  # first paragraph of the docstring, on one line
    code: str  # without the docstring, moved to the left margin


SKIPPED_FOLDERS = {  # tests, other people's packages, generated tables, graphical programs
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "distutils",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "tkinter",
    "_pyrepl",
    "__phello__",
}


@cache
def reference() -> dict[str, list[str]]:
    """Map each topic of the Python language reference to its paragraphs; a paragraph stays with its first topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        advice = "install the full Python (Debian and Ubuntu: apt install libpython3-stdlib)"
        raise ValueError(f"{sys.executable} carries no pydoc_data.topics; {advice}") from None
    seen: set[str] = set()
    found = {}
    for topic in sorted(topics):
        fresh = [paragraph for paragraph in unique(paragraphs(topics[topic])) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            found[topic] = fresh
    return found


def library_files() -> Iterator[tuple[str, str]]:
    """Yield (module name, source) of the pure-Python modules of the standard library, in order of their paths."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in sorted(name for name in files if name.endswith(".py")):
            path = Path(folder, file)
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            try:
                yield module, path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


@cache
def library() -> tuple[tuple[Docstring, ...], tuple[LibraryFunction, ...]]:
    """Read the standard library once: every docstring and every documented function, each text once."""
    docstrings, functions = {}, {}
    for module, source in library_files():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in definitions(tree):
            text = plain(ast.get_docstring(node) or "")
            if len(text) < 30:
                continue
            name = getattr(node, "name", "")
            docstrings.setdefault(text, Docstring(module, name, text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                code = code_without_docstring(node, lines)
                summary = " ".join(re.split(r"\n[ \t]*\n", text)[0].split())
                functions.setdefault(code, LibraryFunction(module, name, summary, code))
    return tuple(docstrings.values()), tuple(functions.values())


def definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and all classes and functions in it; expressions, most of the tree, are not looked into."""
    waiting: list[ast.AST] = [tree]
    for node in waiting:  # grows while it is read
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            waiting += getattr(node, block, [])
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """The source of a function without its decorators and docstring, at the left margin, in plain ASCII."""
    docstring = node.body[0]
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return plain("\n".join(line[node.col_offset :].rstrip() for line in kept))


def docstrings() -> tuple[Docstring, ...]:
    """Every docstring of 30 characters or more in the standard library, each text once."""
    return library()[0]


def functions(max_chars: int = 2500) -> list[LibraryFunction]:
    """Every documented function of the standard library whose code has at most `max_chars` characters."""
    return [function for function in library()[1] if len(function.code) <= max_chars]


def python_text(split: str, parts: Sequence[str] = ("reference", "docstrings")) -> list[str]:
    """The paragraphs of one side of the split ("train" or "validation"), each once, in a fixed order.

    About a tenth of the text is validation. `parts` may name "reference", "docstrings" and "functions" (each function
    is one text). Measures on it are in bits per byte: the text is ASCII, so a character is a byte.
    """
    check_split(split)
    texts: list[str] = []
    for part in parts:
        if part == "reference":
            texts += [paragraph for found in reference().values() for paragraph in found]
        elif part == "docstrings":
            texts += [paragraph for docstring in docstrings() for paragraph in paragraphs(docstring.text)]
        elif part == "functions":
            texts += [function.code for function in functions()]
        else:
            raise ValueError(f"unknown part {part!r}; use {', '.join(PARTS)}")
    return side(unique(text for text in texts if len(text) > 20), split)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use {' or '.join(SPLITS)}")


def side(texts: Iterable[str], split: str) -> list[str]:
    """Those of the texts that lie on one side of the split by content."""
    return [text for text in texts if held_out(text) == (split == "validation")]


# Any text


def load_texts(
    name_or_path: str, split: str = "train", column: str = "text", max_texts: int | None = None
) -> list[str]:
    """Load texts for training or validation.

    `name_or_path` is "tiny-world" (20,000 documents, 2,000 for validation), "python-text", a local file (.jsonl, .csv
    and .tsv with the field `column`; any other kind of text file: paragraphs separated by blank lines), a local folder,
    .parquet, .arrow or .json file, or the id of a data set on the Hugging Face Hub, with a configuration after a colon
    ("wikitext:wikitext-2-raw-v1"); the last three through the `datasets` library.

    A data set with train and validation splits keeps them; everything else is split by content, a tenth for validation.
    Raises ValueError with the file, the line and the reason for what cannot be read.
    """
    check_split(split)
    if not name_or_path:
        raise ValueError("no data named; use tiny-world, python-text, a local path or a data set id")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"max_texts must be >= 1, got {max_texts}; None loads all")
    path = Path(name_or_path)
    if name_or_path == "tiny-world":
        n, seed = (20_000, 1) if split == "train" else (2_000, 2)
        texts = [document.text for document in World().documents(min(n, max_texts or n), seed, split)]
    elif name_or_path == "python-text":
        texts = python_text(split)
    elif path.is_file() and path.suffix not in (".parquet", ".arrow", ".json"):
        texts = side(read_file(path, column), split)
    else:
        texts = read_data_set(name_or_path, split, column)
    if not texts:
        raise ValueError(f"{name_or_path}: no text on the {split} side; more texts are needed for a split of 9 to 1")
    return texts[:max_texts]


def read_file(path: Path, column: str) -> list[str]:
    """The texts of a local file, without empty ones. Raises ValueError naming file, line and reason."""
    try:
        content = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    if path.suffix == ".jsonl":
        texts = list(read_json_lines(path, content, column))
    elif path.suffix in (".csv", ".tsv"):
        texts = list(read_table(path, content, column))
    else:
        texts = re.split(r"\n[ \t]*\n", content.replace("\r\n", "\n"))
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path}: no text in this file")
    return texts


def read_json_lines(path: Path, content: str, column: str) -> Iterator[str]:
    """Yield the field `column` of each line of JSON."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number}: expected an object with a field {column!r}, got {type(record).__name__}"
            )
        yield text_field(f"{path}:{number}", record, column)


def read_table(path: Path, content: str, column: str) -> Iterator[str]:
    """Yield the column `column` of a table whose first row names the columns, separated by commas (.csv) or tabs."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts longer than 131,072 characters
    reader = csv.DictReader(
        io.StringIO(content, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    try:
        if column not in (reader.fieldnames or []):
            raise ValueError(f"{path}:1: no column {column!r}; columns are {', '.join(reader.fieldnames or ['none'])}")
        for record in reader:
            if None in record or None in record.values():
                n_fields = len(reader.fieldnames)
                raise ValueError(
                    f"{path}:{reader.line_num}: this row has not the {n_fields} fields that the first row names"
                )
            yield record[column]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: not a valid table: {error}") from None


def text_field(where: str, record: dict, column: str) -> str:
    """The text of a record. Raises ValueError if there is none or it is not a string."""
    if column not in record:
        raise ValueError(f"{where}: no field {column!r}; fields are {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[column], str):
        raise ValueError(f"{where}: field {column!r} is {type(record[column]).__name__}, expected a string")
    return record[column]


def read_data_set(name_or_path: str, split: str, column: str) -> list[str]:
    """The texts of a local folder or file, or of a data set on the Hub, through the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name_or_path!r} needs the datasets library: pip install datasets") from None
    path = Path(name_or_path)
    builders = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
    if not path.exists():
        found = load_from_hub(name_or_path)
    else:
        try:
            if path.is_file():
                found = datasets.load_dataset(builders[path.suffix], data_files=str(path))
            elif any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path))
        except Exception as error:  # the libraries beneath raise errors of many kinds
            raise ValueError(f"{name_or_path} is not a data set: {one_line(error)}") from error
    sides = found if isinstance(found, dict) else {"train": found}
    given = {"train", "validation"} <= set(sides)
    rows = sides[split] if given else sides.get("train", next(iter(sides.values())))
    if column not in rows.column_names:
        raise ValueError(f"{name_or_path}: no column {column!r}; columns are {', '.join(rows.column_names)}")
    texts = [text for text in rows[column] if isinstance(text, str) and text.strip()]
    return texts if given else side(texts, split)


def one_line(error: Exception) -> str:
    """The kind and the first words of an error of another library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_from_hub(name: str) -> dict:
    """Load the data set "owner/name" or "owner/name:configuration" from the Hub, or from the local cache without it.

    The libraries may try for minutes, so the Hub is first asked once, for ten seconds at most.
    """
    repository, _, configuration = name.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise ValueError(
            f"no such file or folder: {name!r}; use tiny-world, python-text, a local path or a data set id"
        )
    import datasets
    import huggingface_hub

    offline, reason = datasets.config.HF_HUB_OFFLINE, ""
    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=10)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise ValueError(
            f"no data set {repository!r} on the Hugging Face Hub, and no such file or folder here"
        ) from None
    except Exception as error:  # no network, a proxy, offline mode: each raises errors of its own
        datasets.config.HF_HUB_OFFLINE, reason = True, type(error).__name__
    try:
        return datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        if not reason:
            raise ValueError(f"data set {name!r} cannot be loaded: {one_line(error)}") from error
        message = f"the Hugging Face Hub does not answer ({reason}) and the data set {name!r} is not in the local cache"
        raise ValueError(f"{message}; check the name and the network, or use a local file") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


# How well general-purpose compressors do: the bits per byte to beat


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9),
}


def bits_per_byte(compress: Callable[[bytes], bytes], text: str, before: str = "") -> float:
    """Compressed size of `text`, given that the reader already has `before`, in bits per byte.

    With `before` (the training text) it is the growth of the compressed file: what a compressor learned from training.
    Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("the text to compress is empty; give at least one character")
    size = len(compress((before + text).encode())) - (len(compress(before.encode())) if before else 0)
    return 8 * size / len(text.encode())


def plot_compression(rows: list[tuple[str, float, float]]) -> Figure:
    """Draw the bits per byte of each compressor, alone and after the training text."""
    figure, axis = plt.subplots(figsize=(6, 3))
    places = range(len(rows))
    axis.bar([place - 0.2 for place in places], [alone for _, alone, _ in rows], 0.4, label="held-out text alone")
    axis.bar([place + 0.2 for place in places], [after for _, _, after in rows], 0.4, label="after the training text")
    axis.set_xticks(places, [name for name, _, _ in rows])
    axis.set(ylabel="bits per byte", ylim=(0, 4))
    axis.legend(frameon=False)
    return figure


# The verbs


@dataclass(frozen=True)
class ShowConfig:
    """What to load and how much of it to print."""

    data: str = "python-text"  # tiny-world, python-text, a file, a folder or a data set id
    split: Literal["train", "validation"] = "train"  # side of the split
    column: str = "text"  # field that holds the text
    n_texts: int = 3  # how many texts to print

    def __post_init__(self) -> None:
        check_range(self, "n_texts", least=0)


def demo(run: RunConfig) -> None:
    """Measure the text that this Python carries, and compress its held-out part."""
    announce("Read the language reference and the standard library", seconds=10)
    print(f"Python {sys.version.split()[0]}; text of the Python Software Foundation, PSF License Agreement")
    for part in PARTS:
        sizes = [sum(map(len, python_text(split, [part]))) for split in SPLITS]
        print(f"{part:10} {sizes[0] / 1e6:6.2f} MB to train on, {sizes[1] / 1e6:5.2f} MB held out")
    train, validation = ("\n\n".join(python_text(split)) for split in SPLITS)
    rows = []
    for name, compress in COMPRESSORS.items():
        alone, after = bits_per_byte(compress, validation), bits_per_byte(compress, validation, before=train)
        rows.append((name, alone, after))
        print(f"{name:4} {alone:.2f} bits per byte of the held-out text, {after:.2f} after the training text")
    print(f"every character equally likely: {math.log2(len(set(train + validation))):.2f} bits per byte")
    save_figure(plot_compression(rows), run.out / "compression.svg")
    long = [text for text in python_text("validation") if len(text) > 300]
    print(f"\nA paragraph of it:\n{long[run.seed % len(long)]}")


def show(config: ShowConfig, run: RunConfig) -> None:
    """Load any text and print its size and its first texts."""
    texts = load_texts(config.data, config.split, config.column)
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters on the {config.split} side of {config.data}")
    for text in texts[: config.n_texts]:
        print(f"\n{text}")


def main(argv: list[str] | None = None) -> None:
    run_verbs(__doc__, {"demo": (demo, RunConfig), "show": (show, ShowConfig, RunConfig)}, argv)


if __name__ == "__main__":
    main()
