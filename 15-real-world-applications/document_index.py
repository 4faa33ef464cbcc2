"""Topic 15 - The document index: who may read what, searched by words and by vectors, saved without pickle.

    index = DocumentIndex(encoder); index.add("alice", documents)
    index.search("a question", readers=["alice", SHARED], k=5)         # [Found(chunk, score, owner)]
    index.save(folder); DocumentIndex.load(folder, encoder)

Each owner has a shelf with indexes of its own. A search opens only the shelves that it names, so no filter can be
forgotten, a small shelf is not crowded out by a large one, and no count of words tells one owner about another's texts.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from dense_search import FlatIndex, HNSWIndex
from document_loaders import SourceDocument
from hybrid_search import one_per_section, reciprocal_rank_fusion
from lexical_search import BM25Index, Hit, analyse_english, check_query
from text_chunks import Chunk, ChunkConfig, cut_document, without_duplicates
from workbench import write_atomically

SHARED = "shared"  # the shelf that everybody may read, by convention: a search still has to name it
HEADING_WEIGHT = 3  # how often the last heading counts among the words; chosen on the questions that are not held out
PASSAGES, VECTORS = "passages.json", "vectors.safetensors"
UNREADABLE = (OSError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)
UNREADABLE += (json.JSONDecodeError, UnicodeDecodeError)  # what a file raises that `save` has not written


class Embedder(Protocol):
    """What turns texts into vectors, such as dense_search.PassageEncoder."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


class Found(NamedTuple):
    chunk: Chunk
    score: float
    owner: str


@dataclass
class Shelf:
    """The passages of one owner. Ids count upwards and are never used again."""

    words: BM25Index
    vectors: FlatIndex | HNSWIndex | None
    chunks: dict[int, Chunk]
    next_id: int = 0


class DocumentIndex:
    """Shelves of passages. Without an encoder it searches by words alone.

    make_vectors: the index of vectors for a shelf, such as `lambda: HNSWIndex(64)` for large ones.
    """

    def __init__(
        self,
        encoder: Embedder | None = None,
        config: ChunkConfig | None = None,
        make_vectors: Callable[[], FlatIndex | HNSWIndex] | None = None,
    ) -> None:
        self.encoder, self.config = encoder, config or ChunkConfig()
        self.make_vectors = make_vectors or (lambda: FlatIndex(self.width))
        self.shelves: dict[str, Shelf] = {}

    @property
    def width(self) -> int:
        return self.encoder.embed(["width"]).shape[1]

    def __len__(self) -> int:
        return sum(len(shelf.chunks) for shelf in self.shelves.values())

    def shelf(self, owner: str) -> Shelf:
        if not isinstance(owner, str) or not owner.strip():
            raise ValueError(f"an owner is a non-empty text, got {owner!r}")
        if owner not in self.shelves:
            self.shelves[owner] = Shelf(
                BM25Index(analyser=analyse_english), self.make_vectors() if self.encoder else None, {}
            )
        return self.shelves[owner]

    def add(self, owner: str, documents: Iterable[SourceDocument]) -> int:
        """Cut documents and put them on an owner's shelf; returns how many passages came. A source replaces itself.

        All vectors are computed before anything changes, so a failing encoder leaves the index as it was.
        """
        documents = list(documents)
        chunks, _ = without_duplicates(
            [chunk for document in documents for chunk in cut_document(document, self.config)]
        )
        vectors = self.encoder.embed([chunk.search_text for chunk in chunks]) if self.encoder and chunks else []
        shelf = self.shelf(owner)
        for source in {document.source for document in documents}:
            if any(chunk.source == source for chunk in shelf.chunks.values()):
                self.remove(owner, source)
        for number, chunk in enumerate(chunks):
            self.put(shelf, chunk, vectors[number] if shelf.vectors is not None else None)
        return len(chunks)

    def put(self, shelf: Shelf, chunk: Chunk, vector: np.ndarray | None) -> None:
        id, shelf.next_id = shelf.next_id, shelf.next_id + 1
        if vector is not None:
            shelf.vectors.add(id, vector)  # first: it is the one that may refuse
        weight = "\n" + "\n".join(chunk.headings[-1:] * (HEADING_WEIGHT - 1))
        shelf.words.add(id, chunk.search_text + weight)
        shelf.chunks[id] = chunk

    def remove(self, owner: str, source: str) -> int:
        """Take a document off an owner's shelf; returns how many passages went. Raises ValueError if there is none."""
        shelf = self.shelves.get(owner)
        ids = [id for id, chunk in shelf.chunks.items() if chunk.source == source] if shelf else []
        if not ids:
            raise ValueError(f"{owner!r} has no document {source!r}")
        for id in ids:
            shelf.words.remove(id)
            if shelf.vectors is not None:
                shelf.vectors.remove(id)
            del shelf.chunks[id]
        return len(ids)

    def sources(self, owner: str) -> list[str]:
        """The documents on an owner's shelf, sorted; none for an unknown owner."""
        return sorted({chunk.source for chunk in self.shelves[owner].chunks.values()}) if owner in self.shelves else []

    def search(
        self, query: str, readers: Sequence[str], k: int = 5, depth: int = 50, way: str = "hybrid"
    ) -> list[Found]:
        """The k best passages on the named shelves, one for each section, best first.

        readers: the owners whose shelves may be read; an unknown one has an empty shelf. depth: how many passages each
        way of searching gives to the fusion. way: "hybrid", "words" or "vectors". Shelves are joined by rank, since
        scores of different shelves have no common measure. Raises ValueError for a bad query, k or way.
        """
        if isinstance(readers, str):
            raise ValueError(f"readers is a list of owners, got the text {readers!r}")
        if way not in ("hybrid", "words", "vectors") or (way == "vectors" and not self.encoder):
            raise ValueError(f"unknown way {way!r}; use hybrid or words, or vectors with an encoder")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        check_query(query)
        vector = self.encoder.embed([query])[0] if self.encoder and way != "words" else None
        found: list[Found] = []
        for owner in dict.fromkeys(readers):
            shelf = self.shelves.get(owner)
            if shelf is None:
                continue
            rankings: list[list[Hit]] = []
            if way != "vectors":
                rankings.append(shelf.words.search(query, depth))
            if vector is not None and shelf.vectors is not None:
                rankings.append(shelf.vectors.search(vector, depth))
            hits = one_per_section(reciprocal_rank_fusion(rankings, 2 * depth), shelf.chunks)
            found += [Found(shelf.chunks[hit.id], hit.score, owner) for hit in hits]
        return sorted(found, key=lambda item: (-item.score, item.owner, item.chunk.link))[:k]

    def save(self, folder: Path) -> None:
        """Write the passages as JSON, with the hash of the vectors, and the vectors as safetensors, each atomically."""
        tensors = {
            f"{number}": np.stack([shelf.vectors.vector_of(id) for id in shelf.chunks])
            for number, shelf in enumerate(self.shelves.values())
            if shelf.vectors is not None and shelf.chunks
        }
        data = save_tensors(tensors)
        shelves = [
            {"owner": owner, "passages": [asdict(chunk) for chunk in shelf.chunks.values()]}
            for owner, shelf in self.shelves.items()
        ]
        content = {"config": asdict(self.config), "vectors_sha256": sha256(data).hexdigest(), "shelves": shelves}
        write_atomically(folder / VECTORS, data)
        write_atomically(folder / PASSAGES, json.dumps(content, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path, encoder: Embedder | None = None) -> "DocumentIndex":
        """An index that `save` wrote. Raises ValueError for files that are missing, torn or do not belong together.

        Vectors of another encoder would be searched without an error and without sense: one passage is embedded again.
        """
        try:
            content = json.loads((folder / PASSAGES).read_bytes())
            data = (folder / VECTORS).read_bytes()
            if sha256(data).hexdigest() != content["vectors_sha256"]:
                raise ValueError(f"{folder / VECTORS} is not the file that {PASSAGES} was written with; index again")
            tensors, index = load_tensors(data), cls(encoder, ChunkConfig(**content["config"]))
            for number, stored in enumerate(content["shelves"]):
                shelf, vectors = index.shelf(stored["owner"]), tensors.get(str(number), ())
                if encoder and len(vectors) != len(stored["passages"]):
                    raise ValueError(f"{folder} holds {len(vectors)} vectors of {len(stored['passages'])} passages")
                for row, fields in enumerate(stored["passages"]):
                    chunk = Chunk(**{**fields, "headings": tuple(fields["headings"])})
                    index.put(shelf, chunk, vectors[row] if encoder else None)
        except UNREADABLE as error:
            raise ValueError(f"{folder} holds no document index: {' '.join(str(error).split())[:120]}") from None
        index.check_encoder(folder)
        return index

    def check_encoder(self, folder: Path) -> None:
        shelf = next((shelf for shelf in self.shelves.values() if shelf.chunks), None)
        if self.encoder and shelf:
            id, chunk = next(iter(shelf.chunks.items()))
            [anew] = self.encoder.embed([chunk.search_text])
            if float(np.asarray(anew, dtype=np.float32) @ shelf.vectors.vector_of(id)) < 0.999:
                raise ValueError(f"{folder} was indexed with another encoder; index again with this one")
