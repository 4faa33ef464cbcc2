"""Topic 01 - Pages of the course, made from its chapters: course map, glossary and notation, papers, traps, ledger.

python 01-prerequisites/workbench.py contents     # the course map in README.md, GLOSSARY.md, PAPERS.md, TRAPS.md
python 01-prerequisites/workbench.py parity       # PARITY.md and the summary in README.md, from the last test run

A page is prose with generated blocks between markers; a test compares each block with what the chapters say now.
"""

import ast
import datetime
import functools
import importlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from torch import nn

from workbench import ROOT, chapter_folders, describe_machine, fill_blocks, shown, write_atomically

LEVELS = ("output", "gradient", "trajectory", "invariant", "exchange")  # of a proof; see conftest.py


def read_chapter(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def section_of(text: str, heading: str) -> str:
    """What stands under `## heading` up to the next heading of that level; "" if there is none."""
    found = re.search(rf"^## {heading}[^\n]*\n(.+?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def topic_link(folder: Path, anchor: str = "") -> str:
    return f"[{int(folder.name[:2])}]({folder.name}/README.md{anchor})"


def at_root(text: str, folder: Path) -> str:
    """A piece of a chapter for a page in the root: its relative links lead to the same places."""

    def moved(match: re.Match) -> str:
        target = match[1]
        if re.match(r"[a-z]+:", target):
            return match[0]
        if target.startswith("#"):
            return f"]({folder.name}/README.md{target})"
        return f"]({target[3:]})" if target.startswith("../") else f"]({folder.name}/{target})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


# The course map


def course_map(folders: list[Path]) -> str:
    """A table of the topics: each chapter's question, its promise with a measured number, and what it takes."""
    lines = ["| | Topic and its question | One measured answer | Read; run | Exercises |", "|--:|:--|:--|:--|--:|"]
    for folder in folders:
        text = read_chapter(folder)
        number, title = re.search(r"^# (\d+)\. (.+)$", text, re.MULTILINE).groups()
        promise = re.search(r"^> (.+(?:\n> .+)*)", text, re.MULTILINE)[1].replace("\n> ", " ")
        question = re.findall(r"\*\*([A-Z][^*]+\?)\*\*", section_of(text, "The question"))[-1].replace("\n", " ")
        takes = re.search(r"^\*\*Read\*\* about (\d+) min.+? \((.+?) on 2 CPU cores\)", text, re.MULTILINE)
        minutes, run = takes.groups()
        n_exercises = len(re.findall(r"^### Exercise \d", text, re.MULTILINE))
        topic = f"[**{title}**]({folder.name}/README.md)<br>{question}"
        lines.append(f"| {number} | {topic} | {promise} | {minutes} min; {run} | {n_exercises} |")
    return "\n".join(lines)


# The parity ledger


def render_ledger(rows: list[dict]) -> str:
    """The parity ledger as a Markdown table: one line for each component and oracle, worst error of each level."""
    groups: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in rows:
        levels = groups.setdefault((row["topic"], row["component"], row["oracle"]), {})
        worst = levels.get(row["level"], (-1.0, 0.0))
        levels[row["level"]] = max(worst, (row["error"], row["tolerance"]))
    lines = ["| Topic | Component | Compared with | Largest error (tolerance) |", "|:--|:--|:--|:--|"]
    for (topic, component, oracle), levels in sorted(groups.items()):
        errors = " · ".join(f"{level} {error:.0e} ({limit:.0e})" for level, (error, limit) in levels.items())
        lines.append(f"| {topic[:2]} | {component} | {oracle} | {errors} |")
    return "\n".join(lines)


class LedgerRow(NamedTuple):
    topic: str
    component: str
    oracle: str
    levels: dict[str, tuple[float, float]]  # level -> largest error, tolerance


def read_ledger(table: str) -> list[LedgerRow]:
    """The lines of `render_ledger`'s table."""
    rows = []
    for topic, component, oracle, cell in re.findall(r"^\| (\d\d) \| (.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE):
        found = re.findall(r"(\w+) ([\d.e+-]+) \(([\d.e+-]+)\)", cell)
        rows.append(LedgerRow(topic, component, oracle, {name: (float(a), float(b)) for name, a, b in found}))
    return rows


def library_of(oracle: str) -> str | None:
    """The library that an oracle of the ledger comes from; None for a property or another form of our own."""
    names = {
        "PyTorch": r"\btorch\b|\bnn\.|\bF\.|PyTorch|TorchAO",
        "transformers": r"\btransformers\b|Hugging Face|\bHF\b|\bLlama|\bGPT2|\bBert|\bT5For|\bMixtral|\bViT",
        "NumPy": r"\bnumpy\b|NumPy",
        "SciPy": r"\bscipy\b|SciPy",
        "scikit-learn": r"sklearn|scikit-learn",
        "tokenizers": r"\btokenizers\b",
        "tiktoken": r"tiktoken",
        "SentencePiece": r"[Ss]entence[Pp]iece",
        "datasets": r"\bdatasets\b",
        "PEFT": r"\bpeft\b|\bPEFT\b",
        "TRL": r"\btrl\b|\bTRL\b",
        "bitsandbytes": r"bitsandbytes",
        "accelerate": r"\baccelerate\b",
        "lm-evaluation-harness": r"lm[-_]eval",
        "sacrebleu": r"sacrebleu",
        "rouge-score": r"rouge-score",
        "NLTK": r"\bNLTK\b|\bnltk\b",
        "bm25s": r"bm25s",
        "faiss": r"faiss",
        "jsonschema": r"jsonschema",
        "safetensors": r"safetensors",
    }
    return next((name for name, pattern in names.items() if re.search(pattern, oracle)), None)


def ledger_summary(table: str) -> str:
    """For each topic of the ledger: components, comparisons of each level, the worst error, the libraries."""
    rows = read_ledger(table)
    heads = ["Topic", "Components", " · ".join(LEVELS), "Worst error / tolerance", "Libraries"]
    lines = ["| " + " | ".join(heads) + " |", "|--:|--:|:-:|--:|:--|"]
    for topic in [*sorted({row.topic for row in rows}), "all"]:
        own = [row for row in rows if topic in (row.topic, "all")]
        counts = [sum(level in row.levels for row in own) for level in LEVELS]
        shares = [error / limit for row in own for error, limit in row.levels.values() if limit]
        libraries: dict[str, int] = {}
        for name in filter(None, (library_of(row.oracle) for row in own)):
            libraries[name] = libraries.get(name, 0) + 1
        named = ", ".join(sorted(libraries, key=lambda name: (-libraries[name], name)))
        number = topic if topic == "all" else str(int(topic))
        components = len({(row.topic, row.component) for row in own})
        worst, libraries_named = f"{max(shares, default=0.0):.2g}", "" if topic == "all" else named
        cells = [number, components, " · ".join(map(str, counts)), worst, libraries_named]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


@functools.cache
def course_layers() -> dict[str, str]:
    """Public layers of the course, read from the source: name -> topic folder.

    A layer is a class made from one of torch.nn, directly or by way of another layer, that can be called: some class of
    the chain defines `forward`. Topic 1 builds a Module of its own, whose layers no hook of torch sees.
    """
    bases: dict[str, tuple[str, set[str]]] = {}
    calls = {name for name, value in vars(nn).items() if isinstance(value, type)} - {"Module"}
    for path in sorted(ROOT.glob("[0-9][0-9]-*/*.py")):
        if not path.name.startswith(("test_", "exercises_")):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
            for name, node in classes.items() if "Module" not in classes else ():
                above = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
                bases[name] = path.parent.name, above
                calls |= {name for item in node.body if getattr(item, "name", "") == "forward"}
    layers = calls - bases.keys() | {"Module"}
    for chain in (layers, calls):  # what is made from a layer is one; what is made from one with a forward has one
        while more := {name for name, (_, above) in bases.items() if above & chain} - chain:
            chain |= more
    return {name: topic for name, (topic, _) in bases.items() if name in layers & calls and name[0] != "_"}


def unproven_layers(rows: list[dict]) -> dict[str, list[str]]:
    """Topic -> its public layers that no proof of the ledger runs."""
    run = {name for row in rows for name in row.get("layers", ())}
    found: dict[str, list[str]] = {}
    for name, topic in sorted(course_layers().items(), key=lambda item: (item[1], item[0])):
        if name not in run:
            found.setdefault(topic, []).append(name)
    return found


def parity() -> None:
    """Print the ledger that the last test run wrote to parity.json; put it into PARITY.md, its summary into README.md.

    Says besides which public layers (subclasses of nn.Module) no proof runs.
    """
    path = ROOT / "parity.json"
    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist; run the tests first: pytest")
    rows = json.loads(path.read_text(encoding="utf-8"))["proofs"]
    table = render_ledger(rows)
    widest = max((row for row in rows if row["tolerance"]), key=lambda row: row["error"] / row["tolerance"])
    summary = (
        f"{len(rows)} proofs of {len({(row['topic'], row['component']) for row in rows})} components; "
        f"the closest to its tolerance: {widest['component']}, {widest['level']}, {widest['error']:.1e} of "
        f"{widest['tolerance']:.0e}."
    )
    unproven = unproven_layers(rows)
    n_left = sum(map(len, unproven.values()))
    summary += f" {len(course_layers()) - n_left} of {len(course_layers())} public layers run in a proof"
    summary += "; not: " + ", ".join(name for names in unproven.values() for name in names) + "." if n_left else "."
    print(table, summary, sep="\n\n")
    where = f"*{summary} {describe_machine()} · {datetime.date.today()}*"
    fill_page(ROOT / "PARITY.md", {"parity": f"{table}\n\n{where}"})
    fill_page(ROOT / "README.md", {"parity-summary": ledger_summary(table)})


def fill_page(page: Path, blocks: dict[str, str]) -> None:
    write_atomically(page, fill_blocks(page.read_text(encoding="utf-8"), blocks).encode())
    print(f"filled {shown(page)}")


# The glossary and the notation


class Term(NamedTuple):
    name: str
    meaning: str
    folder: Path
    company: str  # the term of the same entry that its meaning begins with, if this one comes later; else ""


def chapter_terms(folder: Path) -> list[Term]:
    """The entries of a chapter's glossary: `- **term**, **other name**: meaning`."""
    terms = []
    for line in section_of(read_chapter(folder), "Glossary").splitlines():
        head, colon, meaning = line.removeprefix("- ").partition(": ")
        if colon and head.startswith("**"):
            names = [name.rstrip(".:") for name in re.findall(r"\*\*(.+?)\*\*", head)]
            for name in names:
                company = "" if name == names[0] else names[0]
                terms.append(Term(name, at_root(meaning, folder), folder, company))
    return terms


def glossary(folders: list[Path]) -> str:
    """Every term of the chapters' glossaries in alphabetical order, as the chapter that defines it first says it."""
    home: dict[str, list[Term]] = {}
    for term in (term for folder in folders for term in chapter_terms(folder)):
        home.setdefault(term.name.lower(), []).append(term)
    lines = []
    for _, (first, *others) in sorted(home.items(), key=lambda item: re.sub(r"[^\w ]", "", item[0])):
        again = [topic_link(other.folder, "#glossary") for other in others if other.folder != first.folder]
        meaning = first.meaning.rstrip(".")
        meaning = f"with **{first.company}**: {meaning}" if first.company else meaning
        places = ", ".join([topic_link(first.folder, "#glossary"), *dict.fromkeys(again)])
        lines.append(f"- **{first.name}**: {meaning}. *Topic {places}*")
    return "\n".join(lines)


UNCLEAR_ALONE = re.compile(r"(and |the )?(of|its|their|that|those|which|whose|in|at|to|corrected)\b")


class Symbol(NamedTuple):
    text: str  # LaTeX, without dollars
    meaning: str
    folder: Path


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside of dollars, brackets and backticks."""
    parts, depth, start, quoted = [], 0, 0, ""
    for place, char in enumerate(text):
        if quoted:
            quoted = "" if char == quoted else quoted
        elif char in "$`":
            quoted = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif not depth and text.startswith(separator, place):
            parts.append(text[start:place].strip())
            start = place + len(separator)
    return [*parts, text[start:].strip()]


def symbols_of(cell: str) -> list[str]:
    """The symbols of one piece of a table's first column: `$A, B$`, `$W$` and `$b$` alike; subscripts stay whole."""
    found = []
    for formula in re.findall(r"\$`(.+?)`\$|\$([^$]+)\$", cell):
        depth, start, formula = 0, 0, (formula[0] or formula[1]).replace(r",\ ", ", ")
        for place, char in enumerate(formula + ","):
            depth += (char in "{([") - (char in "})]")
            if char in ",;" and depth == 0:
                found.append(formula[start:place].strip())
                start = place + 1
    return [symbol for symbol in found if symbol and symbol != r"\dots"]


def paired(names: list[str], meaning: str) -> list[tuple[str, str]]:
    """Each symbol with its part of the meaning, if it has as many parts; else each with the whole, and its company."""
    if len(names) == 1:
        return [(names[0], meaning)]
    plain = re.sub(r",? as in topics? \d+(?:, .*)?$", "", meaning)
    notes = [part for part in split_outside(plain, ";") if re.match(r"\$[^$]+\$(?:, \$[^$]+\$)*( alone)?: ", part)]
    plain = "; ".join(part for part in split_outside(plain, ";") if part not in notes)
    for separator in (";", ","):
        parts = split_outside(plain, separator)
        if len(parts) == len(names) and not any(UNCLEAR_ALONE.match(part) for part in parts):
            return list(zip(names, parts, strict=True))
    return [(name, f"{', '.join(f'$`{each}`$' for each in names)}: {meaning}") for name in names]


def chapter_symbols(folder: Path) -> list[Symbol]:
    """The rows of a chapter's notation table, one for each symbol.

    Groups between semicolons have a part of the meaning each; more parts than groups belong to the last group.
    """
    found = []
    for row in re.findall(r"^\|(.+)\|$", section_of(read_chapter(folder), "Notation and shapes"), re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        if "$" not in cells[0]:
            continue
        scope, _, rest = cells[1].rpartition(": ") if re.match(r"[\d, –-]+: ", cells[1]) else ("", "", cells[1])
        groups, parts = split_outside(cells[0], ";"), split_outside(rest, ";")
        if 1 < len(groups) <= len(parts):
            parts = [*parts[: len(groups) - 1], "; ".join(parts[len(groups) - 1 :])]
        else:
            groups, parts = [cells[0]], [rest]
        for group, meaning in zip(groups, parts, strict=True):
            for name, part in paired(symbols_of(group), meaning):
                part = f"{part} (derivation{'s' * (not scope.isdecimal())} {scope})" if scope else part
                found.append(Symbol(name, at_root(part.removeprefix("and "), folder), folder))
    return found


def notation(folders: list[Path]) -> str:
    """One table of all symbols: what each means in which topic."""
    meanings: dict[str, dict[str, list[Path]]] = {}
    for symbol in (symbol for folder in folders for symbol in chapter_symbols(folder)):
        where = meanings.setdefault(symbol.text, {})
        same = next((known for known in where if same_meaning(known, symbol.meaning)), symbol.meaning)
        if symbol.folder not in where.setdefault(same, []):
            where[same].append(symbol.folder)
    lines = ["| Symbol | In topic | Meaning |", "|:--|:--|:--|"]
    for text, where in sorted(meanings.items(), key=lambda item: symbol_order(item[0])):
        for index, (meaning, places) in enumerate(where.items()):
            topics = ", ".join(topic_link(place, "#notation-and-shapes") for place in places)
            lines.append(f"| {'' if index else f'$`{text}`$'} | {topics} | {meaning} |")
    return "\n".join(lines)


def symbol_order(text: str) -> tuple[str, str]:
    """Latin letters first, then Greek ones by name; an accent or a style does not count."""
    bare = re.sub(r"\\(?:hat|tilde|bar|mathcal|mathrm|mathbf|mathbb|lvert|rvert|lVert|rVert|frac|text)\b", "", text)
    bare = re.sub(r"[{}() ]", "", bare)
    return ("~" if bare.startswith("\\") else "") + bare.lower(), text


def same_meaning(one: str, other: str) -> bool:
    """Whether two chapters say the same of a symbol: all words of content of the shorter one are in the longer one."""
    empty = "a an and at by for from in is it its no number numbers of on one or s that the to what with all topic as"
    first, second = (
        set(re.findall(r"[a-z]{2,}", re.sub(r"\$.*?\$", "", text).lower())) - set(empty.split())
        for text in (one, other)
    )
    in_company = any(text.startswith("$`") and "`$: " in text for text in (one, other))
    return one == other or (not in_company and bool(first and second and (first <= second or second <= first)))


def twice_in_a_topic(folder: Path) -> list[str]:
    """Symbols to which one chapter gives two meanings without saying in which derivation."""
    rows = chapter_symbols(folder)
    found = []
    for text in dict.fromkeys(symbol.text for symbol in rows):
        said = [symbol.meaning for symbol in rows if symbol.text == text]
        unclear = [meaning for meaning in said if not re.search(r"derivation|with an index|upright", meaning)]
        if len(said) > 1 and len(unclear) > 1 and not same_meaning(*unclear[:2]):
            found.append(f"{text}: {' / '.join(said)}")
    return found


# The papers


PAPERS = Path(__file__).with_name("papers.json")  # arXiv id -> [title, authors, year], each looked up
ARXIV = re.compile(r"(?:arXiv:|arxiv\.org/\w+/)(\d{4}\.\d{4,5})")
OTHER_IDS = re.compile(r"https://(doi\.org/[^\s)\]]+|aclanthology\.org/[^\s)\]]+)")


class Citation(NamedTuple):
    arxiv_id: str
    title: str  # as the chapter gives it; "" if it does not
    author: str  # surname of the first author; "" if none stands before
    year: int  # 0 if none stands before


MONTHS = "January February March April May June July August September October November December".split()


def known_papers() -> dict[str, list]:
    return json.loads(PAPERS.read_text(encoding="utf-8"))


def citations(text: str) -> list[Citation]:
    """Every link to arXiv, with what stands right before it: `A. Author et al., *Title*, 2020, [arXiv:...`."""
    found = []
    for match in re.finditer(r"\[arXiv:(\d{4}\.\d{4,5})\]", text):
        before = re.split(r"\]\([^)]*\)|\n", text[max(0, match.start() - 300) : match.start()])[-1]
        title = re.search(r"\*([^*]+)\*(?:,[^*.;]*)?[,.]? ?$", before)
        year = re.search(r"\b((?:19|20)\d\d)[,.:]? ?\(?$", before)
        head = before[: title.start()] if title else before[: year.start()] if year else ""
        name = re.search(r"([A-Z][\w\u00C0-\u017F'-]+)(?:,? (?:et al\.|and |[A-Z]\.)[^.;:]*)?,? ?$", head)
        words = (title[1] if title else "", name[1] if name else "", int(year[1]) if year else 0)
        found.append(Citation(match[1], *words))
    return found


def plain_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("²", "^2"))


def wrong_citations(text: str, known: dict[str, list]) -> list[str]:
    """Citations whose title, author or year is not that of the paper with this id.

    A title may be shortened to some of its words in their order; a year may be that of a later publication.
    """
    wrong = []
    for cited in citations(text):
        if cited.arxiv_id not in known:
            wrong.append(f"{cited.arxiv_id} is not in {PAPERS.name}")
            continue
        title, authors, year = known[cited.arxiv_id]
        words = iter(plain_words(title))
        if not all(word in words for word in plain_words(cited.title)):
            wrong.append(f"{cited.arxiv_id}: *{cited.title}*, but it is *{title}*")
        if cited.author not in authors and cited.author not in MONTHS:
            wrong.append(f"{cited.arxiv_id}: {cited.author}, but it is by {authors}")
        if cited.year and not year <= cited.year <= year + 3:
            wrong.append(f"{cited.arxiv_id}: {cited.year}, but it is of {year}")
    return wrong


def papers(folders: list[Path]) -> str:
    """Every paper with an id that a chapter cites: id, title, authors, year, and where it is cited."""
    known, places, others = known_papers(), {}, {}
    for folder in folders:
        text = read_chapter(folder)
        for number in dict.fromkeys(ARXIV.findall(text)):
            places.setdefault(number, []).append(topic_link(folder, "#references"))
        for address in dict.fromkeys(OTHER_IDS.findall(text)):
            others.setdefault(address.rstrip("."), []).append(topic_link(folder, "#references"))
    lines = ["| Paper | Title | Authors | Year | Topics |", "|:--|:--|:--|--:|:--|"]
    for number, where in sorted(places.items()):
        title, authors, year = known.get(number, ["*title not looked up*", "", ""])
        lines.append(
            f"| [{number}](https://arxiv.org/abs/{number}) | {title} | {authors} | {year} | {', '.join(where)} |"
        )
    if others:
        listed = (f"[{address}](https://{address}) ({', '.join(where)})" for address, where in sorted(others.items()))
        lines += ["", f"By another id: {'; '.join(listed)}."]
    return "\n".join(lines)


# The traps


REGISTRIES = {  # topic -> what the command begins with -> module and attribute that hold the names of its failures
    1: {"prerequisites.py demo": ("prerequisites_experiments", "SYMPTOMS")},
    2: {"sequence_modeling.py demo": ("sequence_experiments", "BREAKS")},
    3: {"attention_mechanisms.py heads": ("attention_mechanisms", "BREAKS")},
    4: {"transformer_architecture.py demo": ("architecture_experiments", "BREAKS")},
    5: {"debugging_tools.py checkup": ("debugging_tools", "BUGS")},
    6: {"tokenization_embeddings.py demo": ("tokenization_embeddings", "TRAPS")},
    7: {"training_transformers.py demo": ("training_transformers", "BREAK_NAMES")},
    8: {"transformer_variants.py demo": ("variant_failures", "BREAKS")},
    9: {"modern_llm_architectures.py demo": ("modern_llm_failures", "BREAKS")},
    10: {
        "pretraining_llms.py demo": ("pretraining_llms", "BREAKS"),
        "pretraining_llms.py parallel": ("parallel_experiments", "BREAKS"),
    },
    11: {"fine_tuning_adaptation.py demo": ("fine_tuning_adaptation", "BREAK_NAMES")},
    12: {"scaling_optimization.py demo": ("scaling_optimization", "BREAKS")},
    13: {"inference_at_scale.py demo": ("inference_failures", "INFERENCE_BREAKS")},
    14: {"evaluation_safety.py demo": ("evaluation_safety", "BREAKS")},
    15: {"real_world_applications.py demo": ("real_world_applications", "BREAKS")},
}
BUG_URL = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)")


def trap_names(topic: int) -> dict[str, list[str]]:
    """What the command begins with -> the names that its --break takes."""
    found = {}
    for command, (module, attribute) in REGISTRIES.get(topic, {}).items():
        names = getattr(importlib.import_module(module), attribute)
        found[command] = [name for name in names if name != "none"]
    return found


def table_rows(text: str) -> list[dict[str, str]]:
    """Every row of every table of a chapter: heading in lower case -> cell."""
    rows, heads = [], []
    for line in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        if not line.startswith("|"):
            heads = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not heads:
            heads = [cell.strip("` ").lower() for cell in cells]
        elif not set(line) <= set("|:- "):
            rows.append(dict(zip(heads, cells, strict=False)))
    return rows


def rows_about(name: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that name a failure: in backticks, after --break, or as what a cell begins with."""
    pattern = re.compile(rf"`(?:[^`|]*--break )?{re.escape(name)}`|^{re.escape(name)}(?::|$)")
    return [row for row in rows if any(pattern.search(cell) for cell in row.values())]


def pick(row: dict[str, str], *heads: str) -> str:
    return next((row[head] for head in heads if row.get(head)), "")


def trap_row(name: str, rows: list[dict[str, str]]) -> tuple[str, str, str]:
    """The bug, its symptom, and what the chapter measured of it, from the chapter's tables; "" for what has none."""
    bug = symptom = measured = ""
    for row in rows_about(name, rows):
        symptom = symptom or pick(row, "symptom", "what one sees") * ("broken" not in row)
        cause = pick(row, "cause", "slip", "cause and repair", "cause and fix").partition(" (`--break")[0]
        cause = re.sub(r"^(`[a-z-]+`,? ?)+:? ?", "", cause) if f"`{name}`" in cause else cause
        bug = bug or cause
        broken = pick(row, "broken", "with the failure")
        sound = pick(row, "sound", "as it should be")
        together, alone = pick(row, "accuracy, all positions at once"), pick(row, "accuracy, one token at a time")
        if together and alone:
            measured = measured or f"accuracy: {together} with the future in sight, {alone} without"
        if broken and sound and not measured:
            heads = ("what is measured", "measured", "what happens, and what is measured", "check that finds it")
            what = pick(row, *heads) or ("" if "broken" not in row else pick(row, "symptom", "failure", "slip", "what"))
            what = re.sub(rf"^`?{re.escape(name)}`?: ", "", what)
            if "what happens, and what is measured" in row and ": " in what:
                happens, _, what = what.partition(": ")
                bug = bug or happens
            measured = f"{what}: {sound} → {broken}" if what else f"{sound} → {broken}"
    return bug, symptom, measured


def bug_links(text: str) -> list[str]:
    found = dict.fromkeys(match.group(0, 1, 2) for match in BUG_URL.finditer(text))
    return [f"[{repository}#{number}]({url})" for url, repository, number in found]


def bugs_of_traps(text: str, names: list[str]) -> dict[str, list[str]]:
    """Name of a failure -> the real bugs cited by the rows, bullets and paragraphs that name this failure alone."""
    found = {name: [] for name in names}
    for unit in re.split(r"\n(?=\s*\n|- |\d+\. |\|)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        named = [name for name in names if re.search(rf"`(?:[^`|]*--break )?{re.escape(name)}`", unit)]
        if len(named) == 1:
            found[named[0]] += [link for link in bug_links(unit) if link not in found[named[0]]]
    return found


def traps(folders: list[Path]) -> str:
    """For each topic the failures that --break plants, as its chapter describes them, and real bugs that it cites."""
    lines = []
    for folder in folders:
        text = read_chapter(folder)
        commands = trap_names(int(folder.name[:2]))
        bugs = bugs_of_traps(text, [name for names in commands.values() for name in names])
        rows, title = table_rows(text), re.search(r"^# (\d+\. .+)$", text, re.MULTILINE)[1]
        lines += [f"## [{title}]({folder.name}/README.md#what-goes-wrong)", ""]
        for command, names in commands.items():
            lines += [
                f"`python {folder.name}/{command} --break NAME`",
                "",
                "| NAME | The bug | What one sees | Measured, sound → broken | Shipped by |",
                "|:--|:--|:--|:--|:--|",
            ]
            for name in names:
                cells = [*(at_root(cell, folder) for cell in trap_row(name, rows)), ", ".join(bugs[name])]
                lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
            lines.append("")
        told = {link for links in bugs.values() for link in links}
        links = [link for link in bug_links(text) if link not in told]
        if links:
            lines += [f"Other real bugs that the chapter cites: {', '.join(links)}.", ""]
    return "\n".join(lines).strip()


# The pages


def page_blocks(folders: list[Path]) -> dict[str, dict[str, str]]:
    """Page in the root -> name of a generated block -> what it should hold now."""
    return {
        "README.md": {"course-map": course_map(folders)},
        "GLOSSARY.md": {"glossary": glossary(folders), "notation": notation(folders)},
        "PAPERS.md": {"papers": papers(folders)},
        "TRAPS.md": {"traps": traps(folders)},
    }


def contents() -> None:
    """Fill the course map of the README, and the pages of terms, papers and traps, from the chapters."""
    for page, blocks in page_blocks(chapter_folders()).items():
        fill_page(ROOT / page, blocks)
