"""Topic 15 - Document loaders: files of strangers become text with sections, and nothing else is read or run.

    load_document(root, "notes/guide.md")            # SourceDocument: text, title, sections with their anchors
    load_folder(root)                                # (documents, refusals), each refusal with its reason
    python_reference()                               # Python's language reference, as every installation carries it
    course_chapters()                                # the chapters of this course

A name is opened only inside its root: the real path is contained, no part of it is a symbolic link (O_NOFOLLOW for each
folder and for the file), it is a regular file, and its size is checked before a byte is read. An archive is read in
memory, under limits for its entries, its sizes and its ratio. XML is refused. Every refusal is one ValueError.

Sources: the ZIP format (APPNOTE 6.3.10); GitHub's anchors of headings; docutils for titles of reStructuredText.
Python's reference is the work of the Python Software Foundation under the PSF License Agreement.
"""

import errno
import html
import io
import json
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from python_text import read_json_lines
from workbench import ROOT, chapter_folders, check_range

MIB = 2**20


@dataclass(frozen=True)
class LoadLimits:
    """How much of a stranger's files is read."""

    max_bytes: int = 8 * MIB  # of one file, packed or unpacked
    max_markup_bytes: int = MIB  # of one HTML or JSON file, whose parsers are slower
    max_total_bytes: int = 64 * MIB  # of all files of a folder or all entries of an archive together
    max_files: int = 5000  # files of a folder, or entries of an archive
    max_ratio: float = 100.0  # unpacked over packed bytes of one entry; text packs to a third or a tenth
    max_depth: int = 16  # folders within folders

    def __post_init__(self) -> None:
        check_range(self, "max_bytes", "max_markup_bytes", "max_total_bytes", "max_files", "max_depth", least=1)
        check_range(self, "max_ratio", above=1)


LIMITS = LoadLimits()


@dataclass(frozen=True)
class Section:
    """A part of a document under one heading: the characters start to end of its text, subsections not included."""

    headings: tuple[str, ...]  # from the outermost heading to its own; empty before the first one
    anchor: str  # what a link to it ends with; empty where the format has none
    start: int
    end: int


@dataclass(frozen=True)
class SourceDocument:
    """A loaded text: what a person sees of it, line by line as in the file, with the sections that cover it."""

    source: str  # name inside its root; "archive.zip!entry" and "file.jsonl#3" for parts of files
    kind: str
    title: str
    text: str
    sections: tuple[Section, ...] = field(repr=False, default=())
    n_hidden: int = 0  # characters that a reader does not see, which are left out of the text

    def section_at(self, position: int) -> Section:
        """The section that holds a character of the text."""
        return self.sections[bisect_right(self.sections, position, key=lambda section: section.start) - 1]


class Refusal(NamedTuple):
    source: str
    reason: str


# Names and files: nothing outside the root


def check_inside(name: str, what: str = "document") -> tuple[str, ...]:
    """The parts of a relative name; raises ValueError for one that leads out of its root, now or once decoded.

    A name is refused, not repaired: taking "../" out of "....//" leaves "../".
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"refused: the name of a {what} is a non-empty text, got {name!r}")
    decoded = name
    for _ in range(3):  # %252e%252e decodes to %2e%2e and then to ..
        decoded = unquote(decoded)
    for spelling in (name, decoded):
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in spelling):
            raise ValueError(f"refused: the name {shorten(name)} holds a control character or half of a character")
        parts = re.split(r"[/\\]", spelling)
        if parts[0] == "" or re.match(r"[A-Za-z]:", spelling) or ".." in parts:
            raise ValueError(f"refused: {shorten(name)} leads outside its root; give a name inside it")
    if len(re.split(r"[/\\]", decoded)) != len(re.split(r"[/\\]", name)):
        raise ValueError(f"refused: {shorten(name)} hides a separator; write the name plainly")
    if "\\" in name:
        raise ValueError(f"refused: {shorten(name)} holds a backslash; use /")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if not parts:
        raise ValueError(f"refused: {shorten(name)} names no {what}")
    return parts


def shorten(name: str, most: int = 80) -> str:
    """A name as it may stand in a message: quoted, escaped and short."""
    return ascii(name if len(name) <= most else name[:most] + "...")


def read_inside(root: Path, name: str, limits: LoadLimits = LIMITS) -> bytes:
    """The bytes of a regular file inside `root`, at most limits.max_bytes.

    Each folder on the way is opened relative to the one before without following links, so that nobody can exchange a
    folder for a link between the check and the use. Raises ValueError, with the reason, for everything else. A hard
    link cannot be told from a file: who may make one could have copied it.
    """
    parts = check_inside(name)
    real_root = os.path.realpath(root)
    if os.path.commonpath([real_root, os.path.realpath(os.path.join(real_root, *parts))]) != real_root:
        raise ValueError(f"refused: {shorten(name)} lies outside its root")
    folder = open_safely(real_root, None, os.O_DIRECTORY, name)
    try:
        for part in parts[:-1]:
            inner = open_safely(part, folder, os.O_DIRECTORY | os.O_NOFOLLOW, name)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: the opening of a FIFO that nobody writes to would wait for ever
        handle = open_safely(parts[-1], folder, os.O_NOFOLLOW | os.O_NONBLOCK, name)
    finally:
        os.close(folder)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"refused: {shorten(name)} is no regular file ({kind_of_file(status.st_mode)})")
        check_size(name, status.st_size, limits.max_bytes)
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(handle)
    check_size(name, len(data), limits.max_bytes)  # it may have grown since
    return data


def open_safely(path: str, folder: int | None, flags: int, name: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) or (error.errno == errno.ENOTDIR and is_link(path, folder)):
            raise ValueError(f"refused: {shorten(name)} passes through a symbolic link") from None
        raise ValueError(f"cannot open {shorten(name)}: {os.strerror(error.errno)}") from None


def is_link(path: str, folder: int | None) -> bool:
    return stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)


def kind_of_file(mode: int) -> str:
    names = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}
    return names.get(stat.S_IFMT(mode), "a link" if stat.S_ISLNK(mode) else "a socket")


def check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"refused: {shorten(name)} has {size:,} bytes, the limit is {most:,}")
    if not size:
        raise ValueError(f"refused: {shorten(name)} is empty")


def walk_inside(root: Path, limits: LoadLimits = LIMITS) -> Iterator[str | Refusal]:
    """Names of the regular files below `root`, sorted, and a refusal for everything else; no link is followed.

    A folder is visited once by its device and number, so that no cycle of mounts goes on without end.
    """
    if not os.path.isdir(root):
        raise ValueError(f"{root} is no folder; give the folder that holds the documents")
    waiting, visited, n_files = [("", 0)], set(), 0
    while waiting:
        inner, depth = waiting.pop()
        status = os.stat(os.path.join(root, inner))
        if (status.st_dev, status.st_ino) in visited:
            yield Refusal(inner, "this folder was visited before: a cycle")
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, inner)) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        folders = []
        for entry in found:
            name = f"{inner}/{entry.name}" if inner else entry.name
            if entry.is_symlink():
                yield Refusal(name, "a symbolic link")
            elif entry.is_dir(follow_symlinks=False):
                if depth + 1 > limits.max_depth:
                    yield Refusal(name, f"more than {limits.max_depth} folders deep")
                else:
                    folders.append((name, depth + 1))
            elif not entry.is_file(follow_symlinks=False):
                yield Refusal(name, f"no regular file ({kind_of_file(entry.stat(follow_symlinks=False).st_mode)})")
            else:
                n_files += 1
                if n_files > limits.max_files:
                    yield Refusal(name, f"more than {limits.max_files} files; the rest is left out")
                    return
                yield name
        waiting += reversed(folders)


# Bytes to text


INVISIBLE = re.compile(  # format characters, tag characters, variation selectors, fillers: no glyph of their own
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")


def decode_text(name: str, data: bytes) -> str:
    """UTF-8 text with \\n at the ends of its lines. Raises ValueError for other encodings and for binaries."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{shorten(name)} begins as UTF-16; convert the file to UTF-8")
    if b"\0" in data:
        raise ValueError(f"{shorten(name)} is binary: a zero byte at {data.index(0)}; give text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shorten(name)}: not valid UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def visible(text: str) -> tuple[str, int]:
    """A text without the characters that no reader sees, and how many those were.

    Joiners of some scripts and emoji go too: searching needs none of them, and instructions hide among them.
    """
    text, n_invisible = INVISIBLE.subn("", text)
    text, n_control = CONTROL.subn(" ", text)
    return text, n_invisible + n_control


def blank_comments(text: str) -> tuple[str, int]:
    """Markdown without its HTML comments, which no reader sees; line breaks stay, so the numbers of lines hold."""
    hidden = 0

    def blank(match: re.Match) -> str:
        nonlocal hidden
        hidden += len(match[0])
        return re.sub(r"[^\n]", " ", match[0])

    parts = re.split(r"(^ {0,3}```.*?^ {0,3}```[^\n]*$)", text, flags=re.S | re.M)  # a comment in a listing is text
    parts[::2] = [re.sub(r"<!--.*?(?:-->|\Z)", blank, part, flags=re.S) for part in parts[::2]]
    return "".join(parts), hidden


# Formats: text to sections

MAX_SECTIONS = 20_000  # of a document
MAX_HEADING = 500  # characters of a heading; what is behind them is left out of it


def slug(heading: str) -> str:
    """GitHub's anchor of a heading, without the number that it adds to a repeated one."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def cut_sections(text: str, headings: list[tuple[int, int, str]], anchor) -> tuple[Section, ...]:
    """Sections from headings (position, level, words) in order; `anchor` makes the link of each."""
    marks = [*headings, (len(text), 0, "")]
    sections = [Section((), "", 0, marks[0][0])] if marks[0][0] > 0 or len(marks) == 1 else []
    path: list[tuple[int, str]] = []
    for (start, level, words), (end, _, _) in zip(marks, marks[1:], strict=False):
        path = [*(item for item in path if item[0] < level), (level, words)]
        sections.append(Section(tuple(item[1] for item in path), anchor(words), start, end))
    return tuple(sections)


def markdown_sections(text: str) -> tuple[Section, ...]:
    """The sections of Markdown by its # headings, listings left alone, with GitHub's anchors (repeats numbered)."""
    headings, fenced, position, used = [], "", 0, {}
    for line in text.splitlines(keepends=True):
        fence = re.match(r" {0,3}(`{3,}|~{3,})", line)
        heading = re.match(r"(#{1,6})[ \t]+(.*\S)", line)
        if fence and not fenced:
            fenced = fence[1]
        elif fence and fence[1].startswith(fenced) and not line.strip().strip(fenced[0]):
            fenced = ""
        elif heading and not fenced:
            words = re.sub(r"(?<![ \t])[ \t]+#+$", "", heading[2])
            headings.append((position, len(heading[1]), words[:MAX_HEADING]))
        position += len(line)

    def anchor(words: str) -> str:
        name = slug(words)
        used[name] = used.get(name, -1) + 1
        return f"{name}-{used[name]}" if used[name] else name

    return cut_sections(text, headings, anchor)


TITLE = re.compile(
    r"^(?:(?P<over>([^\w\s])\2{2,})[ \t]*\n)?(?P<words>[^\s].*)\n(?P<line>([=\-~`:'\"^_*+#.<>])\5{2,})[ \t]*$", re.M
)


def rst_sections(text: str) -> tuple[Section, ...]:
    """The sections of reStructuredText by its underlined titles; the first kind of line met is the outermost level."""
    headings, levels = [], []
    for match in TITLE.finditer(text):
        if len(match["line"]) < len(match["words"].rstrip()):
            continue
        style = (match["line"][0], bool(match["over"]))
        if style not in levels:
            levels.append(style)
        headings.append((match.start(), levels.index(style) + 1, match["words"].strip()[:MAX_HEADING]))
    return cut_sections(text, headings, lambda words: re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-"))


BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr li "
    "main nav ol p pre section table td th tr ul".split()
)
UNSEEN = frozenset("script style template noscript iframe object svg math head".split())
MAX_OPEN_MARKUP = 64 * 1024  # characters of one tag, comment or script
MAX_TAGS = 50_000  # of a page


class TextOfHTML(HTMLParser):
    """What a reader sees of a page: no scripts, styles, comments, attributes or hidden elements; headings as Markdown.

    The title is kept apart. Elements that say `hidden` or `display:none` are left out with all that they hold.
    """

    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.title, self.in_title = "", False
        self.open: list[tuple[str, bool]] = []  # elements, and whether each hides what it holds
        self.n_open: Counter[str] = Counter()  # how many of each are open

    @property
    def hidden(self) -> bool:
        return bool(self.open) and self.open[-1][1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self.in_title = True
        if tag in BLOCKS:
            self.pieces.append("\n")
        if re.fullmatch("h[1-6]", tag) and not self.hidden:
            self.pieces.append("\n" + "#" * int(tag[1]) + " ")
        if tag in self.VOID:
            return
        style = (dict(attrs).get("style") or "").replace(" ", "").lower()
        hides = tag in UNSEEN or "hidden" in dict(attrs) or "display:none" in style or "visibility:hidden" in style
        if len(self.open) >= 500:
            raise ValueError("more than 500 elements within each other")
        self.open.append((tag, hides or self.hidden))
        self.n_open[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self.in_title = False
        closed = "" if self.n_open[tag] else tag
        while closed != tag:
            closed, _ = self.open.pop()
            self.n_open[closed] -= 1
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        elif not self.hidden:
            self.pieces.append(data if self.n_open["pre"] else re.sub(r"\s+", " ", data))


def html_text(text: str) -> tuple[str, str]:
    """(title, text) of a page. Raises ValueError for more tags than MAX_TAGS and longer ones than MAX_OPEN_MARKUP.

    The page is fed in parts and the parser may keep no more than that waiting: given whole, html.parser goes back to
    the next "<" after each tag that never ends, in a time that grows with the square of the length.
    """
    if re.search(r"<!ENTITY", text[: 64 * 1024], re.I):
        raise ValueError("declares entities, which may expand without bound; remove the declarations")
    if text.count("<") > MAX_TAGS:
        raise ValueError(f"more than {MAX_TAGS:,} tags, comments or scripts; split the page")
    parser = TextOfHTML()
    for start in range(0, len(text), MAX_OPEN_MARKUP // 4):
        parser.feed(text[start : start + MAX_OPEN_MARKUP // 4])
        if len(parser.rawdata) > MAX_OPEN_MARKUP:
            raise ValueError(f"a tag, comment or script of more than {MAX_OPEN_MARKUP:,} characters; split the page")
    if len(parser.rawdata) > 1024:
        raise ValueError("ends inside a tag, comment or script; complete the page")
    parser.close()
    lines = (line.strip(" ") for line in "".join(parser.pieces).splitlines())
    return parser.title.strip(), re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def json_lines(value: object, path: str = "") -> Iterator[str]:
    """Every text, number and truth value of a JSON document, with the path to it; in order, without recursion."""
    levels = [iter([(path, value)])]
    while levels:
        path, value = next(levels[-1], (None, None))
        if path is None:
            levels.pop()
        elif isinstance(value, dict | list):
            levels.append(parts_of(path, value))
        elif value is not None:
            yield f"{path}: {value}" if path else str(value)


def parts_of(path: str, value: dict | list) -> Iterator[tuple[str, object]]:
    """One level of a JSON document; a path is made when its turn comes, for all together may be far longer."""
    if isinstance(value, dict):
        return ((f"{path}.{key}" if path else key, item) for key, item in value.items())
    return ((f"{path}[{index}]", item) for index, item in enumerate(value))


def unfolded(lines: Iterator[str], most: int) -> str:
    """The lines as one text. Raises ValueError for more than `most` characters, before they are kept."""
    kept, size = [], 0
    for line in lines:
        size += len(line) + 1
        if size > most:
            raise ValueError(f"with the paths to its values more than {most:,} characters; split it")
        kept.append(line)
    return "\n".join(kept)


def document_of(source: str, kind: str, text: str, title: str = "", n_hidden: int = 0) -> SourceDocument:
    """Take out what no reader sees, find the sections, and refuse what then is empty."""
    text, n_invisible = visible(text)
    if kind in ("markdown", "html"):
        text, n_comments = blank_comments(text)
        sections, n_hidden = markdown_sections(text), n_hidden + n_comments
    else:
        sections = rst_sections(text) if kind == "rst" else cut_sections(text, [], slug)
    if not text.strip():
        raise ValueError(f"{shorten(source)} holds no text that a reader can see")
    if len(sections) > MAX_SECTIONS:
        raise ValueError(f"{shorten(source)} has {len(sections):,} sections, the limit is {MAX_SECTIONS:,}; split it")
    first = next((section.headings[0] for section in sections if section.headings), "")
    title = visible(title)[0] or first or source.rpartition("/")[2]
    return SourceDocument(source, kind, " ".join(title.split()), text, sections, n_hidden + n_invisible)


# Kinds of files


KINDS = {
    **dict.fromkeys((".txt", ".text", ".log", ".csv", ".tsv", ".py", ""), "text"),
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    ".rst": "rst",
    **dict.fromkeys((".html", ".htm"), "html"),
    ".json": "json",
    ".jsonl": "jsonl",
    ".zip": "zip",
}
XML = (".xml", ".svg", ".xhtml", ".rss", ".atom", ".xsl", ".docx", ".xlsx", ".pptx", ".odt", ".epub")


def kind_by_name(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in XML:
        raise ValueError(
            f"refused: {shorten(name)} is XML, whose entities may expand without bound; convert it to HTML"
        )
    if suffix not in KINDS:
        raise ValueError(f"refused: {shorten(name)} is of no known kind; known are {', '.join(filter(None, KINDS))}")
    return KINDS[suffix]


def load_bytes(name: str, data: bytes, limits: LoadLimits = LIMITS, column: str = "text") -> list[SourceDocument]:
    """The documents that one file holds: one, but an archive's entries and a .jsonl file's records are several.

    Raises ValueError with the name and the reason. A record of .jsonl must have the field `column`.
    """
    kind = kind_by_name(name)
    check_size(name, len(data), limits.max_markup_bytes if kind in ("html", "json") else limits.max_bytes)
    if kind == "zip":
        return load_archive(name, data, limits, column)
    text = decode_text(name, data)
    if text.lstrip().startswith("<?xml"):
        raise ValueError(
            f"refused: {shorten(name)} is XML, whose entities may expand without bound; convert it to HTML"
        )
    if kind == "jsonl":
        records = enumerate(read_json_lines(Path(name), text, column), start=1)
        found = [document_of(f"{name}#{number}", "text", record) for number, record in records if record.strip()]
        if not found:
            raise ValueError(f"{shorten(name)} holds no record with text")
        return found
    try:
        title = ""
        if kind == "html":
            title, text = html_text(text)
        elif kind == "json":
            text = unfolded(json_lines(json.loads(text)), limits.max_bytes)
    except (ValueError, RecursionError, AssertionError) as error:  # html.parser asserts what a page may break
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error) or "broken markup"
        raise ValueError(f"{shorten(name)}: {reason}") from None
    return [document_of(name, kind, text, title)]


def load_archive(name: str, data: bytes, limits: LoadLimits, column: str) -> list[SourceDocument]:
    """The documents in a ZIP archive, unpacked in memory: nothing is written, and one bad entry refuses the whole.

    What the directory of the archive says is checked first; but it may lie, so what is unpacked is counted too.
    """
    if data.count(b"PK\x01\x02") > limits.max_files:  # before zipfile reads the directory
        raise ValueError(f"refused: {shorten(name)} has more than {limits.max_files} entries")
    found, total = [], 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                if entry.is_dir():
                    check_inside(entry.orig_filename, "folder")
                    continue
                inner = f"{name}!{entry.orig_filename}"
                check_entry(inner, entry, limits)
                with archive.open(entry) as file:
                    content = file.read(limits.max_bytes + 1)
                check_size(inner, len(content), limits.max_bytes)
                total += len(content)
                if total > limits.max_total_bytes:
                    raise ValueError(f"refused: {shorten(name)} unpacks to more than {limits.max_total_bytes:,} bytes")
                for document in load_bytes(entry.orig_filename, content, limits, column):
                    found.append(SourceDocument(**{**vars(document), "source": f"{name}!{document.source}"}))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{shorten(name)} is no sound archive: {' '.join(str(error).split())}") from None
    if not found:
        raise ValueError(f"refused: {shorten(name)} holds no documents")
    return found


def check_entry(inner: str, entry: zipfile.ZipInfo, limits: LoadLimits) -> None:
    """Refuse an entry whose name leads out, that is a link, that is locked, or that unpacks to too much."""
    check_inside(entry.orig_filename, "entry")
    if kind_by_name(entry.orig_filename) == "zip":
        raise ValueError(f"refused: {shorten(inner)} is an archive within an archive")
    mode = entry.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise ValueError(f"refused: {shorten(inner)} is no regular file ({kind_of_file(mode)})")
    if entry.flag_bits & 1:
        raise ValueError(f"refused: {shorten(inner)} needs a password")
    check_size(inner, entry.file_size, limits.max_bytes)
    ratio = entry.file_size / max(entry.compress_size, 1)
    if ratio > limits.max_ratio:
        raise ValueError(
            f"refused: {shorten(inner)} unpacks to {ratio:,.0f} times its size, limit {limits.max_ratio:g}"
        )


def load_document(root: Path, name: str, limits: LoadLimits = LIMITS) -> list[SourceDocument]:
    """The documents of one file inside `root`; the kind is told by the suffix. Raises ValueError with the reason."""
    kind_by_name(check_inside(name)[-1])
    return load_bytes(name, read_inside(root, name, limits), limits)


def load_folder(root: Path, limits: LoadLimits = LIMITS) -> tuple[list[SourceDocument], list[Refusal]]:
    """All documents below a folder, and what was refused with the reason. Hidden files (.name) are left alone.

    Raises ValueError if `root` is no folder.
    """
    documents, refusals, total = [], [], 0
    for name in walk_inside(root, limits):
        if isinstance(name, Refusal):
            refusals.append(name)
            continue
        if any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            found = load_document(root, name, limits)
            size = sum(len(document.text) for document in found)
            if total + size > limits.max_total_bytes:
                raise ValueError(f"with it the folder holds more than {limits.max_total_bytes:,} characters")
            documents, total = documents + found, total + size
        except ValueError as error:
            refusals.append(Refusal(name, str(error)))
    return documents, refusals


# What every reader of the course has


def course_chapters() -> list[SourceDocument]:
    """The chapters of this course, by their names from the root of the repository.

    Without this topic's own, which quotes the questions of its exams, also those that nothing is to answer.
    """
    own = Path(__file__).parent.name
    names = [f"{folder.name}/README.md" for folder in chapter_folders() if folder.name != own]
    return [document for name in names for document in load_document(ROOT, name)]


def python_reference() -> list[SourceDocument]:
    """The topics of Python's language reference as documents of reStructuredText, in order of their names.

    Raises ValueError if this installation carries none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python carries no pydoc_data.topics; install the full Python") from None
    return [document_of(f"python/{topic}", "rst", html.unescape(topics[topic])) for topic in sorted(topics)]


def python_docstrings(least_chars: int = 200) -> list[SourceDocument]:
    """The docstrings of the standard library of `least_chars` characters or more, one document for each module.

    Each docstring is a section whose heading is its name. It takes some seconds: every module is read.
    """
    from python_text import docstrings

    by_module: dict[str, list[str]] = {}
    for item in docstrings():
        if len(item.text) >= least_chars:
            by_module.setdefault(item.module, []).append(f"# {item.name or item.module}\n\n{item.text.strip()}\n")
    return [
        document_of(f"python-library/{module}", "markdown", "\n".join(texts), title=module)
        for module, texts in sorted(by_module.items())
    ]
