"""The bench of the course: what a topic prints becomes rows, and what fails becomes a row too."""

import json
import textwrap
from pathlib import Path

import pytest

import course_bench
import workbench
from course_bench import read_ratios, render_bench, time_topic
from workbench import RunConfig, chosen_topics, main, speed_line, topic_script

GOOD = """
import sys
assert sys.argv[1] == "bench" and "--out" in sys.argv
print("a head line: 3 x 4")
print("step, width 3, beside torch's: 1.50x the speed (1.00 to 2.00 in 2 rounds); 5 ms")
"""


@pytest.fixture
def course(tmp_path: Path, monkeypatch) -> Path:
    """Four topics: one that times, one that fails, one that prints no ratio, one whose bench hangs."""
    programs = {
        "01-good-one": GOOD,
        "02-bad-one": "raise ValueError('no | bench')",
        "03-mute-one": "print('done')",
        "04-slow-one": "import time\ntime.sleep(600)",
    }
    for name, program in programs.items():
        (tmp_path / name).mkdir()
        topic_script(tmp_path / name).write_text(textwrap.dedent(program))
    monkeypatch.setattr(workbench, "ROOT", tmp_path)
    return tmp_path


def test_every_topic_has_a_bench() -> None:
    folders = chosen_topics("")
    assert len(folders) == 15 and set(course_bench.SECONDS) == set(range(1, 16))
    for folder in folders:
        text = topic_script(folder).read_text(encoding="utf-8")
        assert '"bench": (' in text or "**BENCH_VERBS" in text, folder.name


def test_a_printed_line_is_read_back() -> None:
    text = (
        "x beside y\n" + speed_line("a, b,", "c's d, e", [2.0, 1.0, 1.0], [1.0, 3.0, 2.0]) + "; more: 1.5x the speed\n"
    )
    assert read_ratios(text) == [
        {"what": "a, b", "rival": "c's d, e", "ratio": 2.0, "least": 0.5, "most": 3.0, "n_rounds": 3}
    ]


def test_failures_are_rows_and_the_exit_code_is_1(course: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--topics", "1,2,3", "--out", str(course / "out"), "--note", "a quiet machine"])
    assert ended.value.code == "no result from 02-bad-one, 03-mute-one"
    shown = capsys.readouterr().out
    assert "benches of 3 topics (about" in shown
    assert "| 1 | step, width 3 | 1.50 | 1.00 to 2.00 | 2 | torch's |" in shown
    assert "| 2 | *no result: exit code 1: ValueError: no \\| bench* | | | | |" in shown
    assert "| 3 | *no result: it prints no ratio* | | | | |" in shown and "a quiet machine" in shown
    assert set(json.loads((course / "out" / "bench.json").read_text())) == {"01-good-one", "02-bad-one", "03-mute-one"}


def test_a_bench_that_hangs_is_given_up(course: Path) -> None:
    found = time_topic(course / "04-slow-one", RunConfig(out=course / "out"), limit=0.5)
    assert found["failure"] == "given up after 0.5 s" and not found["rows"]


def test_pieces_make_one_page(course: Path, monkeypatch, capsys) -> None:
    page = course / "BENCHMARKS.md"
    page.write_text("# B\n\n<!-- results:begin benchmarks -->\n<!-- results:end -->\n")
    monkeypatch.setattr(course_bench, "PAGE", page)
    out = ["--out", str(course / "out")]
    with pytest.raises(SystemExit):
        main(["bench", "--topics", "3", *out])
    main(["bench", "--topics", "1", "--write", *out])
    results = json.loads((course / "out" / "bench.json").read_text())
    assert render_bench(results) in page.read_text() and "it prints no ratio" in page.read_text()
    assert "it prints no ratio" not in capsys.readouterr().out.rpartition("benches of 1 topic ")[2]


@pytest.mark.parametrize("topics", ["16", "3,x", "-1"])
def test_a_topic_that_does_not_exist_is_refused(topics: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", f"--topics={topics}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "there is no topic" in error and error.count("\n") == 1
