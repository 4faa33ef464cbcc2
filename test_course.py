"""The house rules: what every topic folder must keep, checked on the files themselves."""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from course_pages import (
    chapter_symbols,
    known_papers,
    ledger_summary,
    page_blocks,
    table_rows,
    trap_names,
    trap_row,
    twice_in_a_topic,
    wrong_citations,
)
from workbench import BLOCK, ROOT, relink, render_table, without_own_folders

TOPICS = sorted(path for path in ROOT.glob("[0-9][0-9]-*") if path.is_dir())
MODULES = sorted(path for topic in TOPICS for path in topic.glob("*.py"))
CHAPTERS = [ROOT / "README.md", *(topic / "README.md" for topic in TOPICS)]
PAGES = sorted(ROOT.glob("*.md"))
NOTEBOOKS = sorted(path for topic in TOPICS for path in topic.glob("*.ipynb"))
TOPIC_OF = {path.stem: path.parent.name for path in MODULES}
PLAIN_MODULES = [path for path in MODULES if not path.name.startswith("test_")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


ALONE = {  # the verbs that write several files which belong together, by their modules
    "agent_tasks": ("teach_agent",),
    "chat_model": ("chat",),
    "code_model": ("code_train",),
    "corpus_pipeline": ("corpus",),
    "course_model": ("pretrain", "shards"),
    "distillation": ("distill",),
    "draft_model": ("draft",),
    "evaluation_safety": ("report", "task"),
    "fine_tuning_adaptation": ("merge_folder", "sft"),
    "guard_suite": ("guard",),
    "language_experiments": ("train_language",),
    "modern_llm_architectures": ("demo",),
    "picture_experiments": ("train_pictures",),
    "pruning": ("prune",),
    "quantized_model": ("quantize",),
    "rag_experiments": ("encoder",),
    "release_gate": ("release_gate",),
    "tokenization_embeddings": ("course",),
    "tool_model": ("tool_adapter",),
    "training_transformers": ("demo",),
    "transformer_variants": ("finetune", "pretrain"),
}


def test_verbs_that_write_several_files_refuse_a_second_run_in_their_folder() -> None:
    found = {}
    for path in PLAIN_MODULES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        functions = [node for node in body if isinstance(node, ast.FunctionDef)]
        marked = [node.name for node in functions if "alone" in map(ast.unparse, node.decorator_list)]
        if marked:
            found[path.stem] = tuple(sorted(marked))
    assert found == ALONE


def test_fifteen_topics_each_with_a_chapter() -> None:
    assert [topic.name[:2] for topic in TOPICS] == [f"{number:02d}" for number in range(1, 16)]
    assert not [name_of(chapter) for chapter in CHAPTERS if not chapter.exists()]


def test_folder_lists_in_pyproject_equal_the_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    on_disk = [topic.name for topic in TOPICS]
    assert project["hatch"]["build"]["dev-mode-dirs"] == on_disk
    assert project["pytest"]["ini_options"]["pythonpath"] == [".", *on_disk]  # the root: for processes started afresh
    assert project["pyright"]["extraPaths"] == on_disk


def test_requirements_are_pinned_and_end_with_this_clone() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    assert not [line for line in lines[:-1] if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_topic_imports_earlier_topics_only(path: Path) -> None:
    later = {name for name in imported_modules(path) if TOPIC_OF.get(name, "") > path.parent.name}
    assert not later, f"{name_of(path)} imports from later topics: {later}"


@pytest.mark.parametrize("path", PLAIN_MODULES, ids=name_of)
def test_each_module_comes_from_this_clone(path: Path) -> None:
    spec = importlib.util.find_spec(path.stem)
    assert spec and Path(spec.origin) == path, f"{path.stem} is imported from {spec and spec.origin}"


def test_module_names_are_unique_and_shadow_no_package() -> None:
    stems = [path.stem for path in MODULES]
    assert len(stems) == len(set(stems))
    packages = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert not set(stems) & packages


@pytest.mark.parametrize("path", [path for path in PLAIN_MODULES if "def main(" in path.read_text()], ids=name_of)
def test_every_script_has_help_and_refuses_an_unknown_flag_in_one_line(path: Path, capsys) -> None:
    main = importlib.import_module(path.stem).main
    with pytest.raises(SystemExit) as helped:
        main(["--help"])
    assert helped.value.code == 0 and "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["demo", "--no-such-flag"])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and "--no-such-flag" in error


@pytest.mark.parametrize("path", PLAIN_MODULES, ids=name_of)
def test_no_module_loads_untrusted_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unsafe = ("weights_only=False", "pickle.load", "allow_pickle=True", "trust_remote_code=True", "yaml.load(")
    assert not [word for word in unsafe if word in text]


# Exercises


@pytest.mark.parametrize("path", sorted(ROOT.glob("[0-9][0-9]-*/exercises_[0-9][0-9].py")), ids=name_of)
def test_exercises_accept_their_solutions_and_reject_every_planted_mistake(path: Path) -> None:
    exercises = importlib.import_module(path.stem).EXERCISES
    assert len(exercises) >= 4 and len({exercise.name for exercise in exercises}) == len(exercises)
    for exercise in exercises:
        assert len(exercise.mistakes) >= 3, exercise.name
        wanted = inspect.signature(exercise.solution)
        assert exercise.signature.startswith(f"{exercise.name}({', '.join(wanted.parameters)})"), exercise.signature
        assert exercise.verdict(exercise.solution) == "correct", exercise.name
        for idea, mistake in exercise.mistakes.items():
            assert exercise.verdict(mistake).startswith("not yet: "), f"{exercise.name} accepts the mistake {idea!r}"
        for useless in (None, lambda *_: None, lambda *_: "text"):
            assert exercise.verdict(useless).startswith("not yet: "), exercise.name


# Chapters


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


@pytest.mark.parametrize("chapter", [*PAGES, *CHAPTERS[1:]], ids=name_of)
def test_links_and_anchors_exist(chapter: Path) -> None:
    text = re.sub(r"^```.*?^```", "", chapter.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (chapter.parent / file) if file else chapter
        found = path.exists()
        if found and anchor and path.suffix == ".md":
            found = anchor in anchors(path.read_text(encoding="utf-8"))
        if not found:
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)
def test_links_into_code_have_the_current_line_range(chapter: Path) -> None:
    assert relink(chapter) == chapter.read_text(encoding="utf-8"), "run: python 01-prerequisites/workbench.py links"


@pytest.mark.parametrize("chapter", CHAPTERS[1:], ids=name_of)
def test_tables_equal_results(chapter: Path) -> None:
    path = chapter.parent / "figures" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    blocks = {match[2]: match[3].strip() for match in BLOCK.finditer(chapter.read_text(encoding="utf-8"))}
    assert blocks == {name: render_table(results[name]) for name in blocks}


def blocks_of(page: Path) -> dict[str, str]:
    return {match[2]: match[3].strip() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}


def test_the_pages_say_what_the_chapters_say() -> None:
    for page, expected in page_blocks(TOPICS).items():
        blocks = blocks_of(ROOT / page)
        stale = [name for name, block in expected.items() if blocks.get(name) != block]
        assert not stale, f"{page} is stale; run: python 01-prerequisites/workbench.py contents"


def test_the_summary_of_the_ledger_is_that_of_its_page() -> None:
    summary = ledger_summary(blocks_of(ROOT / "PARITY.md")["parity"])
    assert blocks_of(ROOT / "README.md")["parity-summary"] == summary, "run: make parity"


def test_every_citation_is_of_the_paper_with_that_id() -> None:
    known, cited = known_papers(), set()
    for topic in TOPICS:
        text = (topic / "README.md").read_text(encoding="utf-8")
        wrong = wrong_citations(text, known)
        assert not wrong, f"{topic.name}/README.md: {wrong}"
        cited |= set(re.findall(r"(?:arXiv:|arxiv\.org/\w+/)(\d{4}\.\d{4,5})", text))
    assert cited == set(known), "papers.json lacks a paper, or has one that no chapter cites"
    listed = re.findall(r"^\| \[(\d{4}\.\d{4,5})\]", blocks_of(ROOT / "PAPERS.md")["papers"], re.MULTILINE)
    assert listed == sorted(cited)


@pytest.mark.parametrize("topic", TOPICS, ids=name_of)
def test_a_letter_has_one_meaning_in_a_topic(topic: Path) -> None:
    assert chapter_symbols(topic) and not twice_in_a_topic(topic)


@pytest.mark.parametrize("topic", TOPICS, ids=name_of)
def test_every_failure_that_can_be_planted_stands_in_the_chapter(topic: Path) -> None:
    """The names of the registries are those that the command line takes, and the chapter's tables describe each."""
    rows = table_rows((topic / "README.md").read_text(encoding="utf-8"))
    for command, names in trap_names(int(topic.name[:2])).items():
        script, verb = command.split()
        taken = break_names(topic / script, verb)
        assert taken is None or set(names) == taken, command
        for name in names:
            bug, symptom, measured = trap_row(name, rows)
            assert bug or symptom or measured, f"{name} has no row in {topic.name}/README.md"


def break_names(script: Path, verb: str) -> set[str] | None:
    """What --break of a script's verb takes, read from its help; None if its help lists no names."""
    shown, main = io.StringIO(), importlib.import_module(script.stem).main
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    found = re.search(r"--break\s+\{([^}]*)\}", shown.getvalue())
    return found and set(re.sub(r"\s", "", found[1]).split(",")) - {"none"}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)
def test_worked_examples_run(chapter: Path) -> None:
    runner, names = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), {}
    for block in re.finditer(r"^( *)```pycon\n(.*?)^\1```", chapter.read_text(encoding="utf-8"), re.S | re.M):
        example = doctest.DocTestParser().get_doctest(block[2], names, name_of(chapter), str(chapter), 0)
        failures: list[str] = []
        runner.run(example, out=failures.append, clear_globs=False)
        assert not runner.failures, "".join(failures)
        names = example.globs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_executed_in_order_and_small(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [(cell, output) for cell in code for output in cell["outputs"]]
    assert not [cell["id"] for cell, output in outputs if output.get("name") == "stderr"]
    wanted = {cell["id"] for cell in code if "raises-exception" in cell["metadata"].get("tags", [])}
    assert {cell["id"] for cell, output in outputs if output["output_type"] == "error"} <= wanted


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_name_no_folder_of_the_machine_that_ran_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == without_own_folders(text)
    assert not re.search(r"/(home|Users|root)/", text)
