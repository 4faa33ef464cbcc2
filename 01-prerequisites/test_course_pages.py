"""The pages of the course: what chapters say becomes a map, terms, symbols, papers, traps and a ledger."""

from pathlib import Path

import pytest

import course_pages
from course_pages import (
    at_root,
    chapter_symbols,
    course_layers,
    course_map,
    glossary,
    ledger_summary,
    library_of,
    notation,
    read_ledger,
    render_ledger,
    trap_row,
    traps,
    twice_in_a_topic,
    unproven_layers,
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

## Notation and shapes

| Symbol | Meaning | Shape | In the code |
|:--|:--|:--|:--|
| $`W`$, $b$ | weights, bias of [a layer](#layer) | $(d, d)$ | `weight` |
| $`p, \\hat p`$; $`z_{a,b}`$ | a share, its estimate; a score; a logit | numbers | |
| $`N, D`$ | 2: tokens and steps | | |

## Glossary

**zeta** ($z$): x [y](code.py).

- **Eta**, **beta**: y.

## R

**no**: not a term
"""
    second = """# 2. Beta

In this topic: the rest.

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
    assert course_map(folders).splitlines()[2:] == [
        "| 1 | [A](01-alpha/README.md) | It is 7 of 9. | complete |",
        "| 2 | [Beta](02-beta/README.md) | the rest | planned |",
    ]
    (folders[1] / "beta.py").touch()
    assert course_map(folders[1:]).endswith("| the rest | code and proofs begun, chapter planned |")


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
"""


def test_a_trap_is_described_by_the_chapters_tables() -> None:
    rows = course_pages.table_rows(TABLES)
    assert trap_row("odd-one", rows) == ("b", "a", "")
    assert trap_row("other", rows) == ("e", "d", "how far: 3 → 4")
    assert trap_row("third", rows) == ("a thing is left out", "", "how far it is: 1 → 2")
    assert trap_row("odd", rows) == ("", "", "")


def test_traps_are_listed_by_topic_with_the_real_bugs(tmp_path: Path, monkeypatch) -> None:
    folder = chapter(tmp_path / "03-gamma", TABLES)
    monkeypatch.setattr(course_pages, "trap_names", lambda topic: {"x.py demo": ["other"]} if topic == 3 else {})
    page = traps([folder])
    assert "`python 03-gamma/x.py demo --break NAME`" in page and "| `other` | e | d | how far: 3 → 4 |" in page
    assert page.endswith("the chapter cites: [a/b-c#12](https://github.com/a/b-c/pull/12).")


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
        "| 1 | 1 | 2 | 1 | 0 | 0 | 0 | 0.5 | PyTorch |",
        "| 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | PyTorch |",
        "| all | 2 | 3 | 1 | 0 | 0 | 0 | 0.5 |  |",
    ]
    assert library_of("F.softmax") == "PyTorch" and library_of("the row alone") is None


def test_layers_without_a_proof_are_named() -> None:
    layers = course_layers()
    assert layers["LayerNorm"] == "04-transformer-architecture" and layers["CausalLM"] == "09-modern-llm-architectures"
    assert "Module" not in layers and "TransformerConfig" not in layers
    assert layers["UnscaledTransformer"] == "05-building-from-scratch"  # a layer made from a layer of ours
    rows = [{"layers": sorted(layers.keys() - {"LayerNorm", "Bart"})}, {"error": 0.0}]
    left = {"04-transformer-architecture": ["LayerNorm"], "08-transformer-variants": ["Bart"]}
    assert unproven_layers(rows) == left
