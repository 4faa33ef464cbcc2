"""Topic 10 - Shards: tokenised documents in checked files that are mapped into memory, and batches out of them.

python 10-pretraining-llms/pretraining_llms.py shards --data my_texts.jsonl --out runs/shards
python 10-pretraining-llms/pretraining_llms.py pretrain --shards runs/shards

A shard is plain numbers: all ids of its documents one after another. Reading a row is then a slice of a file, which the
operating system fetches when it is touched, so that a corpus may be larger than memory. Krell et al. 2021 (arXiv
2107.02027): packing with a mask between documents.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packing import Batch, EpochOrder, pack
from python_text import load_texts, one_line, side
from sequence_modeling import IGNORE
from workbench import check_name, check_range, shown, write_atomically

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; raised when a file of today could be misread


class DamagedShard(ValueError):
    """A file of a corpus that is not, byte for byte, what was written."""


# Writing


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard."""

    ids: str  # file of the ids, one after another
    lengths: str  # file of the documents' lengths, as uint32
    n_documents: int
    n_tokens: int
    ids_sha256: str
    lengths_sha256: str


def id_type(vocab_size: int) -> str:
    """The smallest type that holds every id: 2 bytes each up to 65,536 tokens, else 4."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_shards(
    documents: Iterable[Sequence[int]],
    folder: Path,
    vocab_size: int,
    tokenizer_sha256: str,
    source: str,
    shard_tokens: int = 4_000_000,
) -> "Shards":
    """Write documents, each a list of ids with its first and last token, as shards of about `shard_tokens` ids.

    One shard at a time is in memory. The manifest, with the SHA-256 of every file, is written last: a folder with a
    manifest is whole. Raises ValueError for a folder that has one already, for an id outside the vocabulary, for a
    document of fewer than two ids and for no documents at all.
    """
    if (folder / MANIFEST).exists():
        raise ValueError(f"{shown(folder)} already holds a corpus; choose another --out, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        write_shard(folder, number, shard, vocab_size)
        for number, shard in enumerate(cut_into_shards(documents, shard_tokens))
    ]
    if not entries:
        raise ValueError(f"no documents to write to {shown(folder)}: {source} is empty")
    manifest = {
        "format": FORMAT,
        "source": source,
        "id_type": id_type(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "n_documents": sum(entry.n_documents for entry in entries),
        "n_tokens": sum(entry.n_tokens for entry in entries),
        "shards": [asdict(entry) for entry in entries],
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return Shards(folder)


def cut_into_shards(documents: Iterable[Sequence[int]], shard_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Whole documents, in their order, until a shard has `shard_tokens` ids or more."""
    shard, n_tokens = [], 0
    for document in documents:
        shard.append(document)
        n_tokens += len(document)
        if n_tokens >= shard_tokens:
            yield shard
            shard, n_tokens = [], 0
    if shard:
        yield shard


def write_shard(folder: Path, number: int, documents: list[Sequence[int]], vocab_size: int) -> ShardEntry:
    lengths = np.array([len(document) for document in documents], dtype="<u4")
    if lengths.min() < 2:
        raise ValueError(f"document {int(lengths.argmin())} of shard {number} has fewer than two ids: nothing to learn")
    ids = np.concatenate([np.asarray(document) for document in documents])
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers, got {ids.dtype} in shard {number}")
    if ids.ndim != 1:
        raise ValueError(f"a document is one row of ids, got {ids.ndim} axes in shard {number}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(f"id {bad} in shard {number} is outside the vocabulary 0..{vocab_size - 1}")
    names = (f"shard_{number:05d}.ids", f"shard_{number:05d}.lengths")
    data = (ids.astype(id_type(vocab_size)).tobytes(), lengths.tobytes())
    for name, content in zip(names, data, strict=True):
        write_atomically(folder / name, content)
    hashes = (hashlib.sha256(content).hexdigest() for content in data)
    return ShardEntry(*names, len(documents), len(ids), *hashes)


# Reading


class Shards:
    """A corpus of tokenised documents, read through memory maps: `shards[i]` is document i, an array of ids.

    Opening reads the manifest and the lengths and compares the files' sizes; `verify` compares every byte with its
    SHA-256. Raises ValueError for a folder without a manifest, DamagedShard naming the file otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(Path(folder))
        self.entries = [ShardEntry(**entry) for entry in self.manifest["shards"]]
        kind = np.dtype(self.manifest["id_type"])
        for entry in self.entries:
            self.check_size(entry.ids, entry.n_tokens * kind.itemsize)
            self.check_size(entry.lengths, entry.n_documents * 4)
        self.ids = [np.memmap(self.folder / entry.ids, dtype=kind, mode="r") for entry in self.entries]
        self.lengths = [np.fromfile(self.folder / entry.lengths, dtype="<u4") for entry in self.entries]
        self.first = np.cumsum([0, *(entry.n_documents for entry in self.entries)])  # document number of each shard
        for entry, lengths in zip(self.entries, self.lengths, strict=True):
            if int(lengths.sum()) != entry.n_tokens:
                raise DamagedShard(f"{shown(self.folder / entry.lengths)} does not add up to {entry.n_tokens} ids")

    def check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise DamagedShard(f"{shown(path)} {what}; write the corpus again")

    def verify(self) -> None:
        """Read every file and compare it with its SHA-256; about a second for each gigabyte."""
        for entry in self.entries:
            for name, wanted in ((entry.ids, entry.ids_sha256), (entry.lengths, entry.lengths_sha256)):
                with open(self.folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != wanted:
                    raise DamagedShard(
                        f"{shown(self.folder / name)} is damaged: SHA-256 {found[:12]}..., expected {wanted[:12]}...; "
                        "write the corpus again"
                    )

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        within = index - self.first[shard]
        start = int(self.lengths[shard][:within].sum(dtype=np.int64))
        return self.ids[shard][start : start + int(self.lengths[shard][within])]

    @property
    def n_tokens(self) -> int:
        return self.manifest["n_tokens"]

    def check_tokenizer(self, sha256: str) -> None:
        """Raise ValueError if the ids were made by another tokenizer."""
        made_by = self.manifest["tokenizer_sha256"]
        if made_by != sha256:
            raise ValueError(
                f"{shown(self.folder)} was tokenised by tokenizer {made_by[:12]}..., not by {sha256[:12]}...: its ids "
                "mean other text; write the shards again or pass the --tokenizer they were made with"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{shown(folder)} holds no corpus: there is no {MANIFEST}; make one with the verb shards")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{shown(path)} has format {manifest['format']}, this code reads {FORMAT}")
        for entry in manifest["shards"]:
            for name in (ShardEntry(**entry).ids, entry["lengths"]):
                if os.path.basename(name) != name:
                    raise ValueError(f"{shown(path)} names {name!r}, which is not a file of its folder")
        return {**manifest, "id_type": check_name("id_type", manifest["id_type"], ("<u2", "<u4"))}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedShard(f"{shown(path)} is no manifest of a corpus ({one_line(error)}); write it again") from error


# Batches: a pure function of the step, so that a resumed run needs no stored position


class ShardBatches:
    """Rows of seq_len tokens out of shards. `batches(step)` gives inputs, targets and document_ids, each (batch, seq).

    packing "best-fit" (as topic 07's PackedBatches) keeps documents whole where they fit and pads what is left over;
    "stream" cuts the shard into rows wherever they end, as most large runs do: no padding, but documents lose their
    beginning. In both, position i predicts the next id of its own document and nothing else: targets are -100 where a
    document has no next id and on padding, and `document_ids` is the mask between documents.

    Every epoch shows each row once, in an order that depends on seed and epoch alone. Only numbers of documents and
    their places are in memory, about 100 bytes for each document. Raises ValueError for a batch larger than the corpus.
    """

    def __init__(self, shards: Shards, batch_size: int, seq_len: int, seed: int, packing: str = "best-fit") -> None:
        check_name("packing", packing, PACKINGS)
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        self.shards, self.seq_len = shards, seq_len
        self.rows = [
            (shard, row)
            for shard, lengths in enumerate(shards.lengths)
            for row in PACKINGS[packing](lengths.tolist(), seq_len)
        ]
        self.order = EpochOrder(len(self.rows), batch_size, seed)

    def __call__(self, step: int) -> Batch:
        rows = [self.rows[index] for index in self.order(step)]
        inputs = np.zeros((len(rows), self.seq_len), dtype=np.int64)  # (batch, seq)
        targets = np.full_like(inputs, IGNORE)  # (batch, seq)
        document_ids = np.zeros_like(inputs)  # (batch, seq)
        for index, (shard, pieces) in enumerate(rows):
            start = 0
            for number, piece in enumerate(pieces, start=1):
                ids, stop = self.shards.ids[shard][piece.start : piece.stop], start + len(piece) - 1
                inputs[index, start:stop], targets[index, start:stop] = ids[:-1], ids[1:]
                document_ids[index, start:stop] = number
                start = stop
        made = {"inputs": inputs, "targets": targets, "document_ids": document_ids}
        return {name: torch.from_numpy(array) for name, array in made.items()}

    @property
    def used_share(self) -> float:
        """Positions that predict something, of all positions of an epoch; the rest is padding."""
        used = sum(len(piece) - 1 for _, row in self.rows for piece in row)
        return used / (len(self.rows) * self.seq_len)


def best_fit_rows(lengths: list[int], seq_len: int) -> list[list[range]]:
    """Whole documents in the fullest row with room, longest first; see topic 07's `pack`. A piece is a range of ids."""
    pieces, start = [], 0
    for length in lengths:
        pieces += [range(at, min(at + seq_len + 1, start + length)) for at in range(start, start + length - 1, seq_len)]
        start += length
    return pack(pieces, seq_len)


def stream_rows(lengths: list[int], seq_len: int) -> list[list[range]]:
    """Documents in their order, cut where a row is full; the rest of a cut document begins the next row."""
    rows: list[list[range]] = [[]]
    free, start = seq_len, 0
    for length in lengths:
        at, end = start, start + length
        while end - at > 1:
            stop = min(at + free + 1, end)
            rows[-1].append(range(at, stop))
            free, at = free - (stop - at - 1), stop - 1
            if not free:
                rows.append([])
                free = seq_len
        start = end
    return rows if rows[-1] else rows[:-1]


PACKINGS = {"best-fit": best_fit_rows, "stream": stream_rows}


# Texts from outside, one at a time


def stream_texts(name_or_path: str, split: str = "train", column: str = "text") -> Iterator[str]:
    """The texts of a source, as `load_texts` names them, without holding all in memory where the source allows it.

    A data set on the Hub, a folder, .jsonl and .parquet files come through the streaming of the `datasets` library,
    split by content as there. Raises ValueError with the reason for what cannot be read.
    """
    path = Path(name_or_path)
    if name_or_path in ("tiny-world", "python-text") or path.suffix not in ("", ".jsonl", ".parquet"):
        yield from load_texts(name_or_path, split, column)
        return
    yield from side_of_stream(open_stream(name_or_path), name_or_path, split, column)


def open_stream(name_or_path: str) -> Any:
    """The training rows of a data set as an iterable; nothing is downloaded that is not read."""
    import datasets

    path = Path(name_or_path)
    kinds = {".jsonl": "json", ".parquet": "parquet"}
    repository, _, configuration = name_or_path.partition(":")
    try:
        if path.suffix in kinds:
            options = {"path": kinds[path.suffix], "data_files": str(path)}
        else:
            options = {"path": str(path) if path.exists() else repository, "name": configuration or None}
        return datasets.load_dataset(**options, split="train", streaming=True)
    except Exception as error:  # the libraries beneath raise errors of many kinds
        raise ValueError(f"{name_or_path} cannot be streamed: {one_line(error)}") from error


def side_of_stream(rows: Iterable[dict], name: str, split: str, column: str) -> Iterator[str]:
    for number, row in enumerate(read_on(rows, name)):
        if column not in row:
            raise ValueError(f"{name}: no column {column!r} in row {number}; columns are {', '.join(row)}")
        if isinstance(row[column], str) and row[column].strip():
            yield from side([row[column]], split)


def read_on(rows: Iterable[dict], name: str) -> Iterator[dict]:
    """The rows; an error of the library that reads them becomes a ValueError with the place."""
    source, number = iter(rows), 0
    while True:
        try:
            row = next(source, None)
        except Exception as error:  # the libraries beneath raise errors of many kinds
            raise ValueError(f"{name} cannot be read on after row {number}: {one_line(error)}") from error
        if row is None:
            return
        number += 1
        yield row


@dataclass(frozen=True)
class ShardConfig:
    """What to tokenise, and how to store it."""

    data: str = "tiny-world"  # tiny-world, python-text, a file or folder, or a data set on the Hugging Face Hub
    split: str = "train"  # side of the split by content: train or validation
    column: str = "text"  # field of the text in .jsonl, .csv and data sets
    n_documents: int = 180_000  # most documents to write
    shard_tokens: int = 4_000_000  # ids in one file, about
    tokenizer: Path | None = None  # folder of another tokenizer.json of the course's kind

    def __post_init__(self) -> None:
        check_name("split", self.split, ("train", "validation"))
        check_range(self, "n_documents", "shard_tokens", least=1)
