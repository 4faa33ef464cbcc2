"""The pages of the course: what chapters say becomes a map, terms, symbols, papers, traps and a ledger."""

from pathlib import Path

import pytest

import course_pages
from course_pages import (
    at_root,
    bugs_of_traps,
    chapter_symbols,
    citations,
    course_layers,
    course_map,
    glossary,
    known_papers,
    ledger_summary,
    library_of,
    notation,
    papers,
    read_ledger,
    render_ledger,
    trap_row,
    traps,
    twice_in_a_topic,
    unproven_layers,
    wrong_citations,
)


def chapter(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    first = """# 1. A

> It is 7
> of 9.

**Read** about 60 min, or less · **run** `python a.py` (about 6 s on 2 CPU cores) · **notebook** [a](a.ipynb)

## The question

It is **0.9**. **What is
it?**

## Notation and shapes

| Symbol | Meaning | Shape | In the code |
|:--|:--|:--|:--|
| $`W`$, $b$ | weights, bias of [a layer](#layer) | $(d, d)$ | `weight` |
| $`p, \\hat p`$; $`z_{a,b}`$ | a share, its estimate; a score; a logit | numbers | |
| $`N, D`$ | 2: tokens and steps | | |

## Glossary

**zeta** ($z$): x [y](code.py).

- **Eta**, **beta**: y.

## Exercises

### Exercise 1: by hand

### Exercise 2: build

## R

**no**: not a term
"""
    second = """# 2. Beta

## Notation and shapes

| Symbol | Meaning |
|:--|:--|
| $`W`$ | the weights |
| $`b`$ | bytes |
| $`b`$ | bits |

## Glossary

- **zeta**: again.

## R
"""
    return [chapter(tmp_path / "01-alpha", first), chapter(tmp_path / "02-beta", second)]


def test_the_course_map_comes_from_the_chapters(folders) -> None:
    assert course_map(folders[:1]).splitlines()[2:] == [
        "| 1 | [**A**](01-alpha/README.md)<br>What is it? | It is 7 of 9. | 60 min; about 6 s | 2 |",
    ]


def test_the_glossary_is_alphabetical_and_says_where_else(folders) -> None:
    link = "[1](01-alpha/README.md#glossary)"
    assert glossary(folders).splitlines() == [
        f"- **beta**: with **Eta**: y. *Topic {link}*",
        f"- **Eta**: y. *Topic {link}*",
        f"- **zeta**: x [y](01-alpha/code.py). *Topic {link}, [2](02-beta/README.md#glossary)*",
    ]


def test_symbols_get_their_part_of_the_meaning(folders) -> None:
    found = {symbol.text: symbol.meaning for symbol in chapter_symbols(folders[0])}
    assert found == {
        "W": "weights",
        "b": "bias of [a layer](01-alpha/README.md#layer)",
        "p": "$`p`$, $`\\hat p`$: a share, its estimate",
        "\\hat p": "$`p`$, $`\\hat p`$: a share, its estimate",
        "z_{a,b}": "a score; a logit",
        "N": "$`N`$, $`D`$: tokens and steps (derivation 2)",
        "D": "$`N`$, $`D`$: tokens and steps (derivation 2)",
    }
    table = notation(folders)
    one, two = (f"[{n}]({folder.name}/README.md#notation-and-shapes)" for n, folder in enumerate(folders, start=1))
    assert f"| $`W`$ | {one}, {two} | weights |" in table
    assert f"| $`b`$ | {one} | bias of [a layer](01-alpha/README.md#layer) |\n|  | {two} | bytes |" in table


def test_a_symbol_with_two_meanings_in_one_chapter_is_found(folders) -> None:
    assert twice_in_a_topic(folders[0]) == []
    assert twice_in_a_topic(folders[1]) == ["b: bytes / bits"]


def test_relative_links_lead_to_the_same_place(tmp_path: Path) -> None:
    text = "[a](x.py#L1) [b](#c) [d](../02-e/README.md#f) [g](https://h.i)"
    assert at_root(text, tmp_path / "01-z") == (
        "[a](01-z/x.py#L1) [b](01-z/README.md#c) [d](02-e/README.md#f) [g](https://h.i)"
    )


# Papers


CITED = """# 4. D

1. A. Vaswani et al., *Attention Is All You Need*, 2017. [arXiv:1706.03762](https://arxiv.org/abs/1706.03762).
2. Lee and Kim 2020, [arXiv:9999.00001](https://arxiv.org/abs/9999.00001), section 1; *Its Short Name*, December 2021,
   [arXiv:9999.00002](https://arxiv.org/abs/9999.00002). Roofline, [doi](https://doi.org/10.1/2).

As said ([arXiv:1706.03762](https://arxiv.org/abs/1706.03762)) there.
"""
KNOWN = {
    "1706.03762": ["Attention Is All You Need", "Vaswani et al.", 2017],
    "9999.00001": ["Anything", "Lee, Kim", 2019],
    "9999.00002": ["Its Rather Short: A Name", "", 2021],
}


def test_citations_are_read_with_title_author_and_year() -> None:
    first, second, third, fourth = citations(CITED)
    assert first == ("1706.03762", "Attention Is All You Need", "Vaswani", 2017)
    assert second == ("9999.00001", "", "Lee", 2020)
    assert third[:2] == ("9999.00002", "") and fourth == ("1706.03762", "", "", 0)
    assert wrong_citations(CITED, KNOWN) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "Is All You",
            "Was All You",
            "1706.03762: *Attention Was All You Need*, but it is *Attention Is All You Need*",
        ),
        ("Lee and", "Leo and", "9999.00001: Leo, but it is by Lee, Kim"),
        ("Kim 2020", "Kim 2018", "9999.00001: 2018, but it is of 2019"),
        ("arXiv:9999.00001", "arXiv:9999.00003", "9999.00003 is not in papers.json"),
    ],
)
def test_a_wrong_citation_is_named(before: str, after: str, message: str) -> None:
    assert wrong_citations(CITED.replace(before, after), KNOWN) == [message]


def test_the_page_of_papers_says_where_each_is_cited(tmp_path: Path, monkeypatch) -> None:
    folder = chapter(tmp_path / "04-delta", CITED)
    monkeypatch.setattr(course_pages, "known_papers", lambda: KNOWN)
    link = "[4](04-delta/README.md#references)"
    page = papers([folder])
    row = (
        f"[1706.03762](https://arxiv.org/abs/1706.03762) | Attention Is All You Need | Vaswani et al. | 2017 | {link} |"
    )
    assert f"| {row}" in page and page.count("\n| [") == 3
    assert page.endswith(f"By another id: [doi.org/10.1/2](https://doi.org/10.1/2) ({link}).")


def test_no_paper_is_listed_twice() -> None:
    known = known_papers()
    titles = [title for title, _, _ in known.values()]
    assert len(set(titles)) == len(titles)
    assert all(abs(2000 + int(number[:2]) - year) <= 1 for number, (_, _, year) in known.items())


# Traps


TABLES = """# 3. C

| Symptom | Cause | How to see it | Fix |
|:--|:--|:--|:--|
| a | `odd-one`: b | `python x.py demo --break odd-one` | c |
| d | e | `--break other` | f |

| `--break` | What happens, and what is measured | sound | broken |
|:--|:--|--:|--:|
| `third` | a thing is left out: how far it is | 1 | 2 |

| Failure | sound | broken |
|:--|--:|--:|
| other: how far | 3 | 4 |

[Somebody](https://github.com/a/b-c/pull/12) met it, [again](https://github.com/a/b-c/pull/12).

- *E* (`other`). [Shipped](https://github.com/d/e/issues/3) for a year.
- `third` and `other`: [both](https://github.com/f/g/issues/4).
"""


def test_a_trap_is_described_by_the_chapters_tables() -> None:
    rows = course_pages.table_rows(TABLES)
    assert trap_row("odd-one", rows) == ("b", "a", "")
    assert trap_row("other", rows) == ("e", "d", "how far: 3 → 4")
    assert trap_row("third", rows) == ("a thing is left out", "", "how far it is: 1 → 2")
    assert trap_row("odd", rows) == ("", "", "")
    seen = {"accuracy, all positions at once": "97 %", "accuracy, one token at a time": "50 %", "--break": "`mask`"}
    assert trap_row("mask", [seen])[2] == "accuracy: 97 % with the future in sight, 50 % without"


def test_traps_are_listed_by_topic_with_the_real_bugs(tmp_path: Path, monkeypatch) -> None:
    folder = chapter(tmp_path / "03-gamma", TABLES)
    monkeypatch.setattr(course_pages, "trap_names", lambda topic: {"x.py demo": ["other"]} if topic == 3 else {})
    page = traps([folder])
    bug = "[d/e#3](https://github.com/d/e/issues/3)"
    assert "`python 03-gamma/x.py demo --break NAME`" in page
    assert f"| `other` | e | d | how far: 3 → 4 | {bug}, [f/g#4](https://github.com/f/g/issues/4) |" in page
    assert page.endswith("the chapter cites: [a/b-c#12](https://github.com/a/b-c/pull/12).")


def test_a_real_bug_belongs_to_the_trap_that_alone_is_named_beside_it() -> None:
    bugs = bugs_of_traps(TABLES, ["odd-one", "other", "third"])
    assert bugs == {"odd-one": [], "other": ["[d/e#3](https://github.com/d/e/issues/3)"], "third": []}


# The ledger


ROW = {"topic": "01-prerequisites", "component": "f", "oracle": "nn.g", "level": "output", "tolerance": 1e-10}


def test_the_ledger_is_rendered_with_the_worst_error_of_each_level() -> None:
    rows = [{**ROW, "error": 1e-12}, {**ROW, "error": 3e-11}, {**ROW, "level": "gradient", "error": 0.0}]
    table = render_ledger(rows)
    assert table.splitlines()[2] == "| 01 | f | nn.g | output 3e-11 (1e-10) · gradient 0e+00 (1e-10) |"
    assert read_ledger(table) == [("01", "f", "nn.g", {"output": (3e-11, 1e-10), "gradient": (0.0, 1e-10)})]


def test_the_summary_counts_comparisons_and_finds_the_worst() -> None:
    rows = [{**ROW, "error": 3e-11}, {**ROW, "level": "gradient", "error": 0.0}]
    rows += [{**ROW, "oracle": "the formula", "error": 5e-11}, {**ROW, "topic": "02-b", "error": 0.0, "tolerance": 0.0}]
    lines = ledger_summary(render_ledger(rows)).splitlines()
    assert lines[2:] == [
        "| 1 | 1 | 2 · 1 · 0 · 0 · 0 | 0.5 | PyTorch |",
        "| 2 | 1 | 1 · 0 · 0 · 0 · 0 | 0 | PyTorch |",
        "| all | 2 | 3 · 1 · 0 · 0 · 0 | 0.5 |  |",
    ]
    assert library_of("F.softmax") == "PyTorch" and library_of("the row alone") is None


def test_layers_without_a_proof_are_named() -> None:
    layers = course_layers()
    assert layers["LayerNorm"] == "04-transformer-architecture" and layers["CausalLM"] == "09-modern-llm-architectures"
    assert "Module" not in layers and "TransformerConfig" not in layers
    assert "MLP" not in layers  # a layer of topic 1's own Module, in NumPy
    assert layers["UnscaledTransformer"] == "05-building-from-scratch"  # a layer made from a layer of ours
    rows = [{"layers": sorted(layers.keys() - {"LayerNorm", "Bart"})}, {"error": 0.0}]
    left = {"04-transformer-architecture": ["LayerNorm"], "08-transformer-variants": ["Bart"]}
    assert unproven_layers(rows) == left
