"""Topic 15 - Chunks: documents cut where their authors cut them, each with the place it came from.

    chunks = cut_documents(documents, ChunkConfig())     # sections, paragraphs, at most max_tokens each
    chunks[0].text == document.text[chunks[0].start : chunks[0].end]           # always, to the character
    kept, dropped = without_duplicates(chunks)           # by topic 10's hashes

A chunk never crosses a heading. Paragraphs are joined until the budget of tokens is full. One that is too long is cut
at lines, sentences or words, whichever is the largest that fits. `overlap` tokens of whole pieces are repeated.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deduplication import MinHashConfig, NearDuplicates, text_key
from document_loaders import SourceDocument
from workbench import check_range

TokenCounter = Callable[[str], int]


def count_words(text: str) -> int:
    """Words and punctuation marks: an estimate of tokens that needs no tokenizer and never counts less than words."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@dataclass(frozen=True)
class ChunkConfig:
    """How documents are cut."""

    max_tokens: int = 200  # budget of a chunk, as `count` counts them
    overlap: int = 0  # tokens at the end of a chunk that the next one repeats, at most
    min_tokens: int = 8  # a shorter section, such as a lone heading, is joined to the next one below the same heading

    def __post_init__(self) -> None:
        check_range(self, "max_tokens", least=1)
        check_range(self, "overlap", "min_tokens", least=0)
        if self.overlap >= self.max_tokens:
            raise ValueError(f"overlap={self.overlap} must be less than max_tokens={self.max_tokens}")


@dataclass(frozen=True)
class Chunk:
    """A passage and where it stands. `text` is exactly the characters start to end of the document's text."""

    source: str
    title: str  # of the document
    headings: tuple[str, ...]
    anchor: str
    start: int
    end: int
    line: int  # of its first character in the document, counted from 1
    text: str

    @property
    def link(self) -> str:
        """The place as a relative link: file and anchor, or file and line where there is no anchor."""
        return f"{self.source}#{self.anchor or f'L{self.line}'}"

    @property
    def search_text(self) -> str:
        """What a searcher reads: title and headings stand before the passage, since they say what it is about."""
        return "\n".join(dict.fromkeys((self.title, *self.headings, self.text)))


class Span(NamedTuple):
    start: int
    end: int


# Cutting


LISTING = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.M | re.S)
BLANK_LINES = re.compile(r"\n[ \t]*\n")


def paragraph_spans(text: str, start: int, end: int) -> Iterator[Span]:
    """The paragraphs of a part of a text, between blank lines; a fenced listing is one paragraph. No blanks around."""
    place, listings = start, [*LISTING.finditer(text, start, end), None]
    for listing in listings:
        until = listing.start() if listing else end
        for blank in [*BLANK_LINES.finditer(text, place, until), None]:
            stop = blank.start() if blank else until
            yield from trimmed(text, place, stop)
            place = blank.end() - 1 if blank else until
        if listing:
            yield from trimmed(text, listing.start(), listing.end())
            place = listing.end()


def trimmed(text: str, start: int, end: int) -> Iterator[Span]:
    """The span without the blanks at its ends; nothing if it holds nothing else."""
    inner = text[start:end]
    if inner.strip():
        yield Span(start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip()))


CUTS = (  # places between two pieces, the largest first
    re.compile(r"\n+"),
    re.compile(r"(?<=[.!?:;])\s+"),
    re.compile(r"\s+"),
)


def pieces(text: str, span: Span, most: int, count: TokenCounter, level: int = 0) -> Iterator[Span]:
    """Parts of a span of at most `most` tokens: lines, else sentences, else words, else runs of characters."""
    if count(text[span.start : span.end]) <= most:
        yield span
    elif level < len(CUTS):
        place = span.start  # each piece ends where a cut begins, the next one begins where it ends
        for cut in [*CUTS[level].finditer(text, span.start, span.end), None]:
            until = cut.start() if cut else span.end
            for piece in trimmed(text, place, until):
                yield from pieces(text, piece, most, count, level + 1)
            place = cut.end() if cut else span.end
    else:  # one long word: halve it, so that a text without blanks costs n log n
        middle = (span.start + span.end) // 2
        if middle == span.start:  # a single character of many tokens cannot be cut
            yield span
            return
        for half in (Span(span.start, middle), Span(middle, span.end)):
            yield from pieces(text, half, most, count, level)


def packed(text: str, spans: list[Span], config: ChunkConfig, count: TokenCounter) -> Iterator[Span]:
    """Neighbouring pieces joined while the whole fits; the next chunk begins with the overlap, in whole pieces.

    Each piece is counted with the blanks before it, once; only the chunk that this suggests is counted as a whole.
    """
    sizes = [count(text[before.end : span.end]) for before, span in zip(spans, spans[1:], strict=False)]
    first = 0
    while first < len(spans):
        last, size = first, count(text[spans[first].start : spans[first].end])
        while last + 1 < len(spans) and size + sizes[last] <= config.max_tokens:
            size, last = size + sizes[last], last + 1
        while last > first and count(text[spans[first].start : spans[last].end]) > config.max_tokens:
            last -= 1
        yield Span(spans[first].start, spans[last].end)
        if last + 1 == len(spans):
            return
        following = last + 1
        while following - 1 > first and count(text[spans[following - 1].start : spans[last].end]) <= config.overlap:
            following -= 1
        first = following


def cut_document(document: SourceDocument, config: ChunkConfig, count: TokenCounter = count_words) -> list[Chunk]:
    """The chunks of a document in order. A section with little text gives its text to the next one within it."""
    text, found, waiting = document.text, [], None
    line_ends = [match.start() for match in re.finditer("\n", text)]
    for number, section in enumerate(document.sections):
        start = section.start if waiting is None else waiting
        below = document.sections[number + 1].headings if number + 1 < len(document.sections) else ()
        short = count(text[start : section.end]) < config.min_tokens + count(" ".join(section.headings[-1:]))
        if short and len(below) > len(section.headings) and below[: len(section.headings)] == section.headings:
            waiting = start
            continue
        waiting = None
        small = [
            piece
            for paragraph in paragraph_spans(text, start, section.end)
            for piece in pieces(text, paragraph, config.max_tokens, count)
        ]
        for span in packed(text, small, config, count):
            home = document.section_at(span.end - 1)  # a tiny budget can cut a heading off again
            where = (home.headings, home.anchor, span.start, span.end, bisect_left(line_ends, span.start) + 1)
            found.append(Chunk(document.source, document.title, *where, text[span.start : span.end]))
    return found


def cut_documents(
    documents: Iterable[SourceDocument], config: ChunkConfig | None = None, count: TokenCounter = count_words
) -> list[Chunk]:
    """The chunks of many documents, in their order; an empty list of documents gives none.

    count: how many tokens a text has; `lambda text: len(tokenizer.encode(text))` counts those of a model.
    """
    return [chunk for document in documents for chunk in cut_document(document, config or ChunkConfig(), count)]


# Duplicates


def without_duplicates(
    chunks: Iterable[Chunk], near: MinHashConfig | None = None
) -> tuple[list[Chunk], list[tuple[Chunk, Chunk]]]:
    """(the first of equal passages, pairs of a dropped passage and the one kept for it), by topic 10's hashes.

    Equal are passages of the same words, whatever case and punctuation. With `near`, passages that MinHash finds alike
    go too. A passage without any word, such as a rule of dashes, is kept: nothing says that two are the same.
    """
    kept, dropped, by_key = [], [], {}
    index, numbers = (NearDuplicates(near), []) if near else (None, [])
    for chunk in chunks:
        key = text_key(chunk.text)
        if key in by_key and re.search(r"\w", chunk.text):
            dropped.append((chunk, by_key[key]))
            continue
        if index:
            alike = index.add(chunk.text)
            numbers.append(chunk if alike is None else numbers[alike])
            if alike is not None:
                dropped.append((chunk, numbers[alike]))
                continue
        by_key[key] = chunk
        kept.append(chunk)
    return kept, dropped
