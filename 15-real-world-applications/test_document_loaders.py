"""Document loaders: RG1 case by case, formats, sections with anchors that the chapters' own links use."""

import importlib.util
import io
import json
import os
import socket
import stat
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from document_loaders import (
    LIMITS,
    MAX_OPEN_MARKUP,
    LoadLimits,
    Refusal,
    check_inside,
    course_chapters,
    document_of,
    html_text,
    load_bytes,
    load_document,
    load_folder,
    python_docstrings,
    python_reference,
    read_inside,
    rst_sections,
    visible,
    walk_inside,
)
from workbench import ROOT

SMALL = LoadLimits(max_bytes=100_000, max_markup_bytes=50_000, max_total_bytes=150_000, max_files=20, max_depth=3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of documents, with a secret beside it that nobody may read."""
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "docs" / "inner").mkdir(parents=True)
    (tmp_path / "docs" / "a.md").write_text("# A title\n\nSome text.\n")
    (tmp_path / "docs" / "inner" / "b.txt").write_text("Plain.")
    return tmp_path / "docs"


def zipped(entries: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# RG1: names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.txt", "outside its root"),
        ("inner/../../secret.txt", "outside its root"),
        ("....//secret.txt", "cannot open"),
        ("/etc/passwd", "outside its root"),
        ("C:\\windows\\win.ini", "outside its root"),
        ("C:/windows/win.ini", "outside its root"),
        ("..\\secret.txt", "outside its root"),
        ("inner\\b.txt", "backslash"),
        ("%2e%2e/secret.txt", "outside its root"),
        ("%2e%2e%2fsecret.txt", "outside its root"),
        ("%252e%252e/secret.txt", "outside its root"),
        ("inner%2fb.txt", "hides a separator"),
        ("a\ud800.md", "half of a character"),
        ("a.md\0.txt", "control character"),
        ("a%00.md", "control character"),
        ("a\n.md", "control character"),
        ("", "non-empty"),
        ("   ", "non-empty"),
        ("./", "names no document"),
        ("missing.md", "No such file"),
        ("inner", "no regular file (a folder)"),
        ("a.md/b.md", "Not a directory"),
        ("x" * 5000 + ".md", "name too long"),
    ],
)
def test_names_that_lead_out_are_refused(root: Path, name: str, reason: str) -> None:
    with pytest.raises(ValueError) as refused:
        read_inside(root, name)
    assert reason in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_a_name_that_stays_inside_is_read(root: Path) -> None:
    assert read_inside(root, "./inner//b.txt") == b"Plain."
    (root / "100%25.md").write_text("x")  # a percent sign alone leads nowhere
    (root / "..dots.md").write_text("y")
    assert read_inside(root, "100%25.md") == b"x" and read_inside(root, "..dots.md") == b"y"


# RG1: links, pipes, devices, sizes


@pytest.mark.parametrize("target", ["../secret.txt", "a.md", "/dev/zero", "loop.md"])
def test_links_are_refused_wherever_they_point(root: Path, target: str) -> None:
    (root / "loop.md").symlink_to(target)
    with pytest.raises(ValueError, match="symbolic link|outside its root|cannot open"):
        read_inside(root, "loop.md")
    assert [item.source for item in load_folder(root)[1]] == ["loop.md"]


def test_a_linked_folder_is_refused_though_it_stays_inside(root: Path) -> None:
    (root / "again").symlink_to("inner")
    with pytest.raises(ValueError, match="symbolic link"):
        read_inside(root, "again/b.txt")
    (root / "out").symlink_to("..")
    with pytest.raises(ValueError, match="outside its root"):
        read_inside(root, "out/secret.txt")
    documents, refusals = load_folder(root)
    assert [document.source for document in documents] == ["a.md", "inner/b.txt"]
    assert refusals == [Refusal("again", "a symbolic link"), Refusal("out", "a symbolic link")]


def test_a_root_that_is_itself_a_link_is_followed(root: Path) -> None:
    link = root.parent / "shortcut"
    link.symlink_to(root)
    assert read_inside(link, "a.md").startswith(b"# A title")


@pytest.mark.timeout(30)  # a FIFO or a device that is opened would be read for ever
def test_pipes_sockets_and_devices_are_refused(root: Path, monkeypatch) -> None:
    os.mkfifo(root / "pipe.md")
    with pytest.raises(ValueError, match="a pipe"):
        read_inside(root, "pipe.md")
    monkeypatch.chdir(root)  # the name of a socket may have 108 characters only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.md")
        with pytest.raises(ValueError, match="cannot open|socket"):
            read_inside(root, "socket.md")
        assert {item.source: item.reason for item in load_folder(root)[1]} == {
            "pipe.md": "no regular file (a pipe)",
            "socket.md": "no regular file (a socket)",
        }
    with pytest.raises(ValueError, match="a device"):
        read_inside(Path("/dev"), "zero")


@pytest.mark.timeout(30)
def test_a_sparse_file_of_ten_gigabytes_is_refused_by_its_size(root: Path) -> None:
    with open(root / "huge.md", "wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="10,737,418,240 bytes, the limit is 8,388,608"):
        read_inside(root, "huge.md")
    assert [item.source for item in load_folder(root)[1]] == ["huge.md"]


def test_the_limit_holds_to_the_byte_and_for_a_file_that_grows(root: Path, monkeypatch) -> None:
    (root / "edge.txt").write_bytes(b"x" * SMALL.max_bytes)
    assert len(read_inside(root, "edge.txt", SMALL)) == SMALL.max_bytes
    (root / "edge.txt").write_bytes(b"x" * (SMALL.max_bytes + 1))
    with pytest.raises(ValueError, match="100,001 bytes"):
        read_inside(root, "edge.txt", SMALL)

    def smaller(handle: int) -> os.stat_result:  # what fstat said before somebody appended
        return os.stat_result([stat.S_IFREG | 0o644, *[0] * 5, 10, 0, 0, 0])

    monkeypatch.setattr("document_loaders.os.fstat", smaller)
    with pytest.raises(ValueError, match="limit is 100,000"):
        read_inside(root, "edge.txt", SMALL)


def test_empty_unreadable_and_unknown_files(root: Path) -> None:
    (root / "empty.md").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_document(root, "empty.md")
    (root / "blank.md").write_text(" \n<!-- nothing else -->\n")
    with pytest.raises(ValueError, match="no text that a reader can see"):
        load_document(root, "blank.md")
    (root / "tool.exe").write_bytes(b"MZ")
    with pytest.raises(ValueError, match="no known kind"):
        load_document(root, "tool.exe")
    if os.geteuid():  # root may read everything
        (root / "a.md").chmod(0)
        with pytest.raises(ValueError, match="Permission denied"):
            load_document(root, "a.md")


# RG1: folders


def test_deep_cyclic_and_crowded_folders(root: Path, monkeypatch) -> None:
    deep = root.joinpath(*"123456")
    deep.mkdir(parents=True)
    (deep / "far.md").write_text("far")
    found = list(walk_inside(root, SMALL))
    assert "1/2/3/4" in [item.source for item in found if isinstance(item, Refusal)] and "a.md" in found
    (root / "inner" / "up").symlink_to("..")  # the one cycle that an unprivileged user can make
    assert Refusal("inner/up", "a symbolic link") in list(walk_inside(root))
    for number in range(30):
        (root / f"n{number:02d}.txt").write_text("x")
    found = list(walk_inside(root, SMALL))
    assert sum(isinstance(item, str) for item in found) <= 20 and "more than 20 files" in found[-1].reason
    with pytest.raises(ValueError, match="is no folder"):
        load_folder(root / "a.md")

    real = os.stat

    def one_inode(path, **options):  # a cycle by mounts: every folder is the same one
        status = real(path, **options)
        return os.stat_result([*status[:1], 7, 7, *status[3:]]) if stat.S_ISDIR(status.st_mode) else status

    monkeypatch.setattr("document_loaders.os.stat", one_inode)
    assert "a cycle" in [item.reason for item in walk_inside(root) if isinstance(item, Refusal)][0]


def test_the_total_of_a_folder_is_limited(root: Path) -> None:
    for number in range(3):
        (root / f"part{number}.txt").write_text("word " * 12_000)
    documents, refusals = load_folder(root, SMALL)
    assert [item.source for item in refusals] == ["part2.txt"] and "more than 150,000" in refusals[0].reason
    assert len(documents) == 4


# RG1: archives


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"bomb.txt": b"0" * 8_000_000}, r"unpacks to [\d,]{3,} times its size"),
        ({"../slip.md": b"x"}, "outside its root"),
        ({"/abs.md": b"x"}, "outside its root"),
        ({"a/../../slip.md": b"x"}, "outside its root"),
        ({"..\\slip.md": b"x"}, "outside its root"),
        ({"%2e%2e/slip.md": b"x"}, "outside its root"),
        ({"../folder/": b""}, "outside its root"),
        ({"inner.zip": b"PK"}, "archive within an archive"),
        ({"laughs.xml": b"<lolz/>"}, "is XML"),
        ({"run.exe": b"MZ"}, "no known kind"),
        ({}, "holds no documents"),
    ],
)
def test_archives_that_are_refused(entries: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_bytes("papers.zip", zipped(entries))


def test_an_archive_of_many_entries_is_counted_and_its_sum_too() -> None:
    with pytest.raises(ValueError, match="more than 20 entries"):
        load_bytes("papers.zip", zipped({f"{number}.txt": b"x" for number in range(21)}), SMALL)
    with pytest.raises(ValueError, match="'papers.zip!big.txt' has 140,000 bytes, the limit is 100,000"):
        load_bytes("papers.zip", zipped({"big.txt": os.urandom(70_000).hex().encode()}), SMALL)
    with pytest.raises(ValueError, match="'papers.zip' has .* the limit is 100,000"):
        load_bytes("papers.zip", zipped({"big.txt": os.urandom(100_000)}), SMALL)
    data = zipped(
        {f"{number}.txt": bytes([48 + number]) * 39_000 + os.urandom(900).hex().encode() for number in range(4)}
    )
    with pytest.raises(ValueError, match="unpacks to more than 150,000"):
        load_bytes("papers.zip", data, SMALL)


def test_links_locks_and_lies_in_an_archive() -> None:
    link = zipfile.ZipInfo("link.md")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "../secret.txt")
    with pytest.raises(ValueError, match="no regular file"):
        load_bytes("papers.zip", buffer.getvalue())
    locked = bytearray(zipped({"a.md": b"text"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(signature) + offset] |= 1
    with pytest.raises(ValueError, match="password"):
        load_bytes("papers.zip", bytes(locked))
    lying = bytearray(zipped({"a.txt": b"0" * 200_000}))  # the directory says ten bytes, the data are 200,000
    place = lying.index(b"PK\x01\x02")
    lying[place + 24 : place + 28] = struct.pack("<I", 10)
    with pytest.raises(ValueError, match="no sound archive|limit"):
        load_bytes("papers.zip", bytes(lying))
    cut = zipped({"a.txt": b"hello " * 500})
    for broken in (b"PK", cut[: len(cut) // 2], cut[:40] + b"\0" * 9 + cut[49:], b"not a zip"):
        with pytest.raises(ValueError, match="no sound archive"):
            load_bytes("papers.zip", broken)


def test_a_nul_in_a_name_of_an_archive_is_seen() -> None:
    data = zipped({"a.md_.exe": b"x"}).replace(b"a.md_.exe", b"a.md\0.exe")  # zipfile shows "a.md"
    with pytest.raises(ValueError, match="control character"):
        load_bytes("papers.zip", data)


def test_a_sound_archive_gives_its_documents_with_their_provenance() -> None:
    data = zipped({"guide/": b"", "guide/a.md": b"# One\ntext\n", "rows.jsonl": b'{"text": "x"}\n\n{"text": "y"}\n'})
    found = load_bytes("papers.zip", data)
    assert [item.source for item in found] == [
        "papers.zip!guide/a.md",
        "papers.zip!rows.jsonl#1",
        "papers.zip!rows.jsonl#2",
    ]
    assert found[0].sections[0].headings == ("One",)


# RG1: markup


LAUGHS = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]><lolz>&lol2;</lolz>'


@pytest.mark.parametrize("name", ["laughs.xml", "laughs.svg", "laughs.html", "laughs.md", "laughs.txt", "laughs.docx"])
def test_billion_laughs_are_refused_under_every_name(name: str) -> None:
    with pytest.raises(ValueError, match="expand without bound"):
        load_bytes(name, LAUGHS.encode())
    if name.endswith("html"):
        with pytest.raises(ValueError, match="declares entities"):
            load_bytes(name, LAUGHS.partition("?>")[2].encode())


@pytest.mark.parametrize("spread", [0, 25])
@pytest.mark.timeout(60)  # given whole, 25,000 characters of "<a " alone keep html.parser busy for half a minute
@pytest.mark.parametrize(
    "unit", ["<!--", "<a ", "<a b='", '<a x="', "</", "<![CDATA[", "<?", "<!-- >", "<", "<b>x", "<script>x"]
)
def test_tags_that_never_end_take_no_quadratic_time(unit: str, spread: int) -> None:
    unit += "x" * spread  # few enough to pass the count of tags
    try:
        html_text(unit * (LIMITS.max_markup_bytes // len(unit)))
    except ValueError as error:
        assert ("comment" in str(error) or "within each other" in str(error)) and (spread or "50,000" in str(error))


@pytest.mark.timeout(60)  # before, 40,000 signs of the first took minutes and hours, and the others many seconds
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.rst", b"=" * 10**6 + b"\nx\n"),  # an overline of any length, then words, then no underline
        ("a.md", b"# a" + b" " * 10**5 + b"#" * 10**5 + b" b\n"),  # no closing signs of a heading
        ("a.md", b"# " + b"[" * 10**6 + b"\n"),  # links of a heading that never close
        ("a.html", b"<div>" * 499 + b"a<b>x</b>" * 16_000),  # each piece of text asks what it lies in
        ("a.html", b"<div>" * 499 + b"</p>a" * 40_000),  # each end looks for its beginning
    ],
)
def test_formats_take_no_quadratic_time(name: str, data: bytes) -> None:
    [document] = load_bytes(name, data)
    assert len(document.text) > 10_000 and all(
        len(words) <= 500 for part in document.sections for words in part.headings
    )


def test_pages_that_are_too_large_or_nested_are_refused() -> None:
    for name, data, reason in (
        ("a.html", b"x" * (2**20 + 1), "limit is 1,048,576"),
        ("a.html", b"<b>" * 501, "more than 500 elements"),
        ("a.html", b"<p " + b"x" * (2 * MAX_OPEN_MARKUP), "more than 65,536"),
        ("a.json", b"[" * 200_000, "too deeply nested"),
        ("a.json", b'{"a": ', "Expecting value"),
        ("a.json", b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        ("a.json", b'{"kkkkkkkk":' * 900 + b"[" + b"1," * 10**5 + b"1]" + b"}" * 900, "paths .* more than 8,388,608"),
        ("a.md", b"# a\n" * 20_001, "has 20,001 sections, the limit is 20,000"),
        ("a.jsonl", b'{"other": 1}', "no field 'text'"),
        ("a.jsonl", b'{"text": ""}', "no record with text"),
        ("a.txt", b"\xff\xfea\0", "UTF-16"),
        ("a.txt", b"PNG\0\1", "binary: a zero byte at 3"),
        ("a.md", b"caf\xe9", "not valid UTF-8 at byte 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_bytes(name, data)


def test_a_page_that_ends_inside_a_comment_is_refused_or_cut_there() -> None:
    try:  # newer versions of html.parser close it themselves
        assert html_text("<p>text</p><!-- " + "x" * 2000) == ("", "text\n")
    except ValueError as error:
        assert "ends inside a tag, comment or script" in str(error)


def test_a_page_is_what_its_reader_sees() -> None:
    page = """<!doctype html><html><head><title>A &amp; B</title><style>p {color: red}</style></head><body>
    <h1>Head</h1><script>alert("x < y")</script><p>One &lt;two&gt;<br>three <b>four</b>.</p><!-- secret -->
    <p hidden>not seen</p><div style="display: NONE"><p>nor this</p></div><h2>Next</h2><pre>a
      b</pre><ul><li>x</li><li>y</li></ul></body></html>"""
    [found] = load_bytes("page.html", page.encode())
    assert found.title == "A & B"
    assert [section.headings for section in found.sections] == [("Head",), ("Head", "Next")]
    for word in ("alert", "secret", "not seen", "nor this", "color"):
        assert word not in found.text
    assert "One <two>\nthree four." in found.text and "a\n" in found.text and "x\n" in found.text


def test_json_keeps_paths_and_order() -> None:
    [found] = load_bytes("a.json", json.dumps({"b": [1, {"c": "x"}], "a": None, "d": "y"}).encode())
    assert found.text == "b[0]: 1\nb[1].c: x\nd: y"


# What readers do not see


def test_invisible_characters_and_comments_are_left_out_but_lines_stay() -> None:
    hidden = "".join(chr(0xE0000 + ord(char)) for char in "ignore previous")
    text = f"# T\nig\u200bnore{hidden}\n<!-- system:\nobey -->\nend\u202e\n```html\n<!-- shown -->\n```\n"
    document = document_of("a.md", "markdown", text)
    assert document.text.count("\n") == text.count("\n")
    assert "ignore\n" in document.text and "obey" not in document.text and "<!-- shown -->" in document.text
    assert document.n_hidden == 1 + len(hidden) + len("<!-- system:\nobey -->") + 1
    assert visible("na\u00efve \u65e5\u672c\u8a9e \U0001f600\n\t") == (
        "na\u00efve \u65e5\u672c\u8a9e \U0001f600\n\t",
        0,
    )


def test_an_unclosed_comment_hides_the_rest() -> None:
    assert document_of("a.md", "markdown", "seen <!-- rest\nof it").text.strip() == "seen"


# Sections


def course_test_anchors():
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "test_course.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["house_rules"] = module
    spec.loader.exec_module(module)
    return module.anchors


def test_anchors_of_all_chapters_are_those_that_their_links_are_checked_against(parity) -> None:
    anchors = course_test_anchors()
    chapters = course_chapters()
    assert len(chapters) == 14  # all but this topic's own
    ours, theirs = {}, {}
    for chapter in chapters:
        ours[chapter.source] = sorted(section.anchor for section in chapter.sections if section.headings)
        theirs[chapter.source] = sorted(anchors((ROOT / chapter.source).read_text(encoding="utf-8")))
        assert len(set(ours[chapter.source])) == len(ours[chapter.source])
    parity("anchors of headings", "the link checker of test_course.py", "output", str(ours), str(theirs), 0)


def test_sections_cover_the_text_once_and_listings_are_no_headings() -> None:
    text = "before\n# A #\nx\n```py\n# no heading\n```\n## B\n### C\n## B\n"
    document = document_of("a.md", "markdown", text)
    assert "".join(document.text[item.start : item.end] for item in document.sections) == text
    assert [(item.headings, item.anchor) for item in document.sections] == [
        ((), ""),
        (("A",), "a"),
        (("A", "B"), "b"),
        (("A", "B", "C"), "c"),
        (("A", "B"), "b-1"),
    ]
    assert document.section_at(text.index("x\n")).anchor == "a" and document.section_at(0).headings == ()
    assert document.title == "A"


def test_titles_of_restructured_text() -> None:
    text = "=====\nTitle\n=====\n\ntext\n\nPart\n----\nmore\n\nDeep\n~~~~\nx\n\nNext part\n---------\ny\n\nnot\n--\n"
    found = [(item.headings, item.anchor) for item in rst_sections(text)]
    assert found == [
        (("Title",), "title"),
        (("Title", "Part"), "part"),
        (("Title", "Part", "Deep"), "deep"),
        (("Title", "Next part"), "next-part"),
    ]


def test_pythons_own_documentation_is_there_with_its_sections() -> None:
    documents = {document.source: document for document in python_reference()}
    assert len(documents) >= 70 and documents["python/assert"].title == 'The "assert" statement'
    assert len(documents["python/compound"].sections) >= 5
    for document in documents.values():
        assert "".join(document.text[item.start : item.end] for item in document.sections) == document.text


def test_docstrings_of_the_library_have_their_names_as_headings(monkeypatch) -> None:
    import python_text

    found = (
        python_text.Docstring("heapq", "", "A module " * 30),
        python_text.Docstring("heapq", "merge", "Merge many sorted inputs. " * 10),
        python_text.Docstring("heapq", "tiny", "Too short to keep."),
    )
    monkeypatch.setattr(python_text, "docstrings", lambda: found)
    [document] = python_docstrings()
    assert document.source == "python-library/heapq" and document.title == "heapq"
    assert [section.headings for section in document.sections] == [("heapq",), ("merge",)]


@pytest.mark.parametrize("name", ["a/b", "a b.md", "\u65e5\u672c.md", "50%.md"])
def test_ordinary_names_pass(name: str) -> None:
    assert check_inside(name)


def test_limits_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="max_bytes must be finite and >= 1, got 0"):
        LoadLimits(max_bytes=0)
