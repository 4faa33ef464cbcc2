"""Topic 01: the workbench - seeds, devices, command line, files, results, links, exercises - and the ledger."""

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import workbench
from workbench import (
    BLOCK,
    HARDWARE,
    Column,
    Exercise,
    RunConfig,
    alone,
    check_folder,
    check_range,
    describe_machine,
    fill_blocks,
    fill_chapter,
    first_difference,
    grade,
    largest_difference,
    line_ranges,
    locked,
    pick_device,
    progress,
    relink,
    render_table,
    run_verbs,
    save_figure,
    save_results,
    seed_everything,
    speed_ratio,
    time_in_turns,
    write_atomically,
)

# Seeds and devices


def test_the_same_seed_gives_the_same_numbers_everywhere() -> None:
    def draw() -> tuple:
        generator = seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()

    assert draw() == draw()
    seed_everything(0)
    expected = torch.tensor([1.5409960747, -0.2934288979, -2.1787893772])
    torch.testing.assert_close(torch.randn(3), expected, rtol=0, atol=1e-9)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="unknown device 'gpu'; use auto, cpu, cuda, cuda:N or mps"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is not available on this machine; use --device cpu"):
            pick_device("cuda")


# The command line


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4  # how wide; 100 % of it
    rate: float = 0.5  # how fast
    limit: int | None = None  # how many at most
    kind: Literal["plain", "fancy"] = "plain"  # which kind
    loud: bool = False  # whether to shout
    break_: str = "nothing"  # what to break
    words: tuple[str, ...] = ()  # what to say

    def __post_init__(self) -> None:
        check_range(self, "width", least=1, most=9)
        check_range(self, "rate", above=0, below=1)


def toy(config: ToyConfig, run: RunConfig) -> None:
    """Say what was configured."""
    if config.words == ("explode",):
        raise ValueError("cannot explode\non two lines")
    if config.words == ("full",):
        raise OSError(28, "No space left on device", "model.pt")
    if config.words == ("stop",):
        raise KeyboardInterrupt
    print(config, run.out.name)


def call(*argv: str) -> None:
    run_verbs("Toy.", {"demo": (toy, ToyConfig, RunConfig), "other": (toy, ToyConfig, RunConfig)}, list(argv))


def test_flags_come_from_the_fields(capsys) -> None:
    call()
    assert capsys.readouterr().out.startswith(
        "ToyConfig(width=4, rate=0.5, limit=None, kind='plain', loud=False, break_='nothing', words=())"
    )
    call("other", "--width", "7", "--limit", "3", "--kind", "fancy", "--loud", "--break", "it", "two", "words")
    assert (
        "width=7, rate=0.5, limit=3, kind='fancy', loud=True, break_='it', words=('two', 'words')"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit) as exit_info:
        call("demo", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    assert "how wide; 100 % of it (default: 4)" in printed and "seed of every random generator" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "x"], "argument --width: invalid int value: 'x'"),
        (["--width", "0"], "width must be finite and >= 1 and <= 9, got 0"),
        (["--width", "10"], "width must be finite and >= 1 and <= 9, got 10"),
        (["--width", "9" * 400], "width must be within 9,223,372,036,854,775,807, got a number of 400 digits"),
        (["--rate", "nan"], "rate must be finite and > 0 and < 1, got nan"),
        (["--rate", "1"], "rate must be finite and > 0 and < 1, got 1.0"),
        (["--kind", "odd"], "invalid choice: 'odd'"),
        (["--wid", "3"], "unrecognized arguments: --wid"),
        (["--seed", "-1"], "seed must be finite and >= 0"),
        (["--seed", str(2**31)], "seed must be finite and >= 0 and < 2.14748e+09, got 2147483648"),
        (["--threads", "0"], "threads must be finite and >= 1 and <= "),
        (["--threads", "999999"], f"<= {4 * os.cpu_count()}, got 999999"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "explode"], "cannot explode on two lines"),
        (["demo", "full"], "the disk is full ([Errno 28] No space left on device: 'model.pt'); free some space"),
        (["--out", "/dev/null/sub"], "/dev/null is a file; choose another --out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        call(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


def test_a_value_of_any_length_gets_a_line_that_can_be_read(capsys) -> None:
    with pytest.raises(SystemExit):
        call("--width", "9" * 9000 + "x")
    error = capsys.readouterr().err
    assert len(error) < 1200 and "--width" in error and " [...] " in error and "x'" in error


def test_one_thread_unless_told_otherwise() -> None:
    call("--threads", "2")
    assert torch.get_num_threads() == 2
    call()
    assert torch.get_num_threads() == 1


def test_interrupt_exits_130_without_a_traceback(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        call("demo", "stop")
    assert exit_info.value.code == 130 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("default_hangup")
def test_sigterm_and_a_closed_terminal_end_a_verb_as_ctrl_c_does(signum: int, code: int, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    cleared = []

    def demo() -> None:
        """Get a signal."""
        try:
            os.kill(os.getpid(), signum)
        finally:
            cleared.append(True)

    with pytest.raises(SystemExit) as ended:
        run_verbs("Toy.", {"demo": (demo,)}, [])
    assert ended.value.code == code and cleared and capsys.readouterr().err == "\ninterrupted; what was saved stays\n"
    assert signal.getsignal(signum) is signal.SIG_DFL


def test_what_a_command_started_has_time_to_end_with_it(tmp_path: Path) -> None:
    script = "trap 'echo ended > ended; exit' TERM; while :; do sleep 0.02; done"
    with pytest.raises(subprocess.TimeoutExpired):
        workbench.run_command(["sh", "-c", script], 0.2, cwd=tmp_path)
    assert (tmp_path / "ended").exists()


def run_into(stream, monkeypatch, text: str = "√ → 9\n") -> int:
    """Exit code of a verb that prints `text` into this stream."""

    def demo() -> None:
        """Print."""
        print(text, end="")

    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", stream)
        try:
            run_verbs("Toy.", {"demo": (demo,)}, [])
        except SystemExit as ended:
            return ended.code
    return 0


def test_a_terminal_without_a_character_shows_a_question_mark(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run_into(stream, monkeypatch) == 0
    assert stream.buffer.getvalue() == b"? ? 9\n"


@pytest.mark.parametrize("n_lines", [1, 100_000])
def test_a_reader_that_leaves_early_gets_no_complaint(monkeypatch, capsys, n_lines) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(os.fdopen(writing, "wb")) as stream:
        assert run_into(stream, monkeypatch, "line\n" * n_lines) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_though_the_last_lines_alone_meet_it(monkeypatch, capsys) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as stream:  # closing it fails as well
        assert run_into(stream, monkeypatch) == 2
    assert "error: the disk is full" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_named_with_a_remedy() -> None:
    told = workbench.advice_on(PermissionError(13, "Permission denied", "theirs/log.csv"))
    assert told == "theirs/log.csv: Permission denied; choose another folder, as with --out, or make it yours (chown)"
    assert workbench.advice_on(BrokenPipeError(32, "Broken pipe")) == "[Errno 32] Broken pipe"


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(
            '''
            import time
            from workbench import run_verbs
            def demo():
                """Wait, in short sleeps: a signal just before a long one would not end it."""
                print("ready", flush=True)
                while True:
                    time.sleep(0.05)
            run_verbs("Slow.", {"demo": (demo,)})
            '''
        )
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores SIGINT
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error


def test_the_output_folder_is_named_after_the_topic_and_checked_before_work(tmp_path: Path) -> None:
    seen = {}

    def demo(run: RunConfig) -> None:
        """Look at the folder."""
        seen["out"] = run.out

    run_verbs("Toy.", {"demo": (demo, RunConfig)}, [])
    assert seen["out"] == workbench.ROOT / "runs" / "test_workbench"
    check_folder(tmp_path / "deep" / "er")
    assert not (tmp_path / "deep").exists(), "checking creates nothing"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; choose another --out"):
        check_folder(tmp_path / "file" / "out")


@pytest.mark.parametrize("size", [10**18, 2**63])  # beyond memory; beyond 64 bits
@pytest.mark.parametrize("make", [torch.zeros, lambda size: torch.nn.Linear(size, size), lambda size: [0] * size])
def test_a_size_beyond_memory_is_one_line(size: int, make, capsys) -> None:
    def demo() -> None:
        """Ask for too much."""
        make(size)

    with pytest.raises(SystemExit) as caught:
        run_verbs("Toy.", {"demo": (demo,)}, [])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "choose a smaller one" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": ', "is not JSON"), (b"", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "a JSON object, got list")],
)
def test_a_damaged_file_of_results_is_named_and_kept(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"results.json .*{message}"):
        save_results(path, "table", [Column("loss")], [[1.0]], [0], "command")
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_an_error_below_a_progress_bar_has_a_line_of_its_own(capsys) -> None:
    def demo() -> None:
        """Go wrong on the way."""
        for _ in workbench.progress(range(3), "train"):
            raise ValueError("no room")

    with pytest.raises(SystemExit):
        run_verbs("Toy.", {"demo": (demo,)}, [])
    bar, message = capsys.readouterr().err.splitlines()[-2:]
    assert "train" in bar and re.fullmatch(r"\S+ demo: error: no room \(--help lists the options\)", message)


def test_other_errors_keep_their_traceback() -> None:
    def demo() -> None:
        """Go wrong."""
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_verbs("Toy.", {"demo": (demo,)}, [])


def test_every_goes_on_after_a_failure_and_names_it(tmp_path: Path, monkeypatch, capfd) -> None:
    programs = {
        "01-good-one": 'print("good", sys.argv[1:])  # "figures": (',
        "02-bad-one": 'raise ValueError  # "figures": (',
        "03-without": "print('without')",
        "04-last-one": 'print("last")  # "figures": (',
    }
    for name, program in programs.items():
        script = tmp_path / name / f"{name[3:].replace('-', '_')}.py"
        script.parent.mkdir()
        script.write_text(f"import sys\n{program}\n")
    monkeypatch.setattr(workbench, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="figures failed: 02-bad-one; once mended"):
        workbench.every(workbench.EveryConfig(("figures",)))
    shown = capfd.readouterr().out
    assert "good ['figures']" in shown and "last\n" in shown and "without" not in shown
    workbench.every(workbench.EveryConfig(("figures",), topics="4"))
    assert "good" not in capfd.readouterr().out


def test_every_refuses_a_verb_or_a_topic_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="there is no topic '16'; give numbers from 1 to 15"):
        workbench.EveryConfig(("figures",), topics="3,16")
    with pytest.raises(ValueError, match="exactly one verb"):
        workbench.EveryConfig()
    with pytest.raises(ValueError, match="no topic has the verb 'figurs'"):
        workbench.every(workbench.EveryConfig(("figurs",)))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no permission"):
        check_folder(tmp_path / "out")


# Files


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["state"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_is_locked_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match="is in use by another run"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_a_verb_that_writes_several_files_runs_alone_in_its_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    ran = []

    @alone
    def save(run: RunConfig) -> None:
        """Save two files."""
        with locked(run.out):  # as training does
            ran.append(run.out)

    arguments = ["save", "--out", str(tmp_path)]
    with locked(tmp_path, ".verb.lock"), pytest.raises(SystemExit) as refused:
        run_verbs("", {"save": (save, RunConfig)}, arguments)
    assert refused.value.code == 2 and not ran and "is in use by another run" in capsys.readouterr().err
    run_verbs("", {"save": (save, RunConfig)}, arguments)
    assert ran == [tmp_path]
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path, ".verb.lock"):  # as the first of torchrun's processes does
        run_verbs("", {"save": (save, RunConfig)}, arguments)
    assert ran == [tmp_path, tmp_path]


def draw_figure():
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.plot([0, 1, 2], [0, 1, 4], label="squares")
    axis.set(xlabel="x", ylabel="x squared")
    axis.legend()
    return figure


def test_figures_have_the_same_bytes_every_time_and_keep_text(tmp_path: Path) -> None:
    open_before = plt.get_fignums()
    for name in ("first.svg", "second.svg"):
        save_figure(draw_figure(), tmp_path / name)
    first = (tmp_path / "first.svg").read_text(encoding="utf-8")
    assert first == (tmp_path / "second.svg").read_text(encoding="utf-8")
    assert "viewBox" in first and ">x squared</text>" in first and "fill: #ffffff" in first
    assert "Date" not in first and "<dc:date>" not in first
    assert plt.get_fignums() == open_before


# Results


def write_example(folder: Path) -> None:
    columns = [Column("model"), Column("loss", "nats", ".2f"), Column("accuracy", "", ".1%")]
    rows = [["ours", [1.0, 2.0, 3.0], 0.5], ["chance", 4.0, [0.25]]]
    save_results(folder / "figures" / "results.json", "losses", columns, rows, [0, 1, 2], "python x.py figures")


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["ours", "theirs"], True),
        (["`--flag`", 3.0], True),
        (["2 data x 1 tensor", "1.09x the speed"], True),
        (["3.2 MB", "12"], False),
        ([1.0, [1.0, 2.0]], False),
        ([], False),
    ],
    ids=str,
)
def test_columns_of_words_stand_left(cells, read) -> None:
    assert workbench.words(cells) is read


def test_results_become_the_table_of_the_chapter(tmp_path: Path) -> None:
    write_example(tmp_path)
    chapter = tmp_path / "README.md"
    chapter.write_text("# X\n\n<!-- results:begin losses -->\nold\n<!-- results:end -->\n\nend\n")
    fill_chapter(tmp_path)
    filled = chapter.read_text()
    assert "| model | loss (nats) | accuracy |\n|:--|--:|--:|\n| ours | 2.00 ± 1.00 | 50.0% |" in filled
    assert "| chance | 4.00 | 25.0% |" in filled and "3 seeds, mean ± standard deviation" in filled
    assert "`python x.py figures`" in filled and describe_machine() in filled and filled.endswith("\n\nend\n")
    fill_chapter(tmp_path)
    assert chapter.read_text() == filled
    stored = json.loads((tmp_path / "figures" / "results.json").read_text())["losses"]
    assert BLOCK.search(filled)[3].strip() == render_table(stored)
    assert {"seeds", "hardware", "date", "command", "rows", "columns"} == set(stored)


def test_columns_of_words_stand_left_and_columns_of_numbers_right() -> None:
    columns = [{"name": name, "unit": "", "digits": ".1f"} for name in ("a", "what", "code", "shown", "value")]
    rows = [["x", "loss", "`f`", "12 ± 3", 1.0], ["y", "gap", "`g`", "nearly 4", [1.0, 2.0]], ["z", "", "-", "-", 3]]
    result = {"columns": columns, "rows": rows, "seeds": [0], "hardware": "", "date": "", "command": ""}
    assert render_table(result).splitlines()[1] == "|:--|:--|:--|--:|--:|"


def test_results_refuse_ragged_rows_and_keep_other_tables(tmp_path: Path) -> None:
    write_example(tmp_path)
    path = tmp_path / "figures" / "results.json"
    with pytest.raises(ValueError, match=r"table 'bad': every row needs 1 cells, got \[2\]"):
        save_results(path, "bad", [Column("a")], [[1, 2]], [0], "x")
    save_results(path, "more", [Column("a")], [[1]], [0], "x")
    assert set(json.loads(path.read_text())) == {"losses", "more"}
    assert fill_blocks("<!-- results:begin no -->\nx\n<!-- results:end -->", {}) == (
        "<!-- results:begin no -->\nx\n<!-- results:end -->"
    )


# Links


SOURCE = '''"""Doc."""

LIMIT = 3


@decorated
def first():
    return 1


class Thing:
    size: int = 1

    def method(self):
        pass
'''


def test_links_follow_the_code(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(SOURCE)
    chapter = tmp_path / "README.md"
    chapter.write_text(
        "[`first`](code.py#L1-L2) [`Thing.method`](code.py) [`LIMIT`](code.py#L9) [`Thing`](code.py) "
        "[`code.py`](code.py) [`first()`](code.py)"
    )
    assert relink(chapter) == (
        "[`first`](code.py#L6-L8) [`Thing.method`](code.py#L14-L15) [`LIMIT`](code.py#L3) [`Thing`](code.py#L11-L15) "
        "[`code.py`](code.py) [`first()`](code.py#L6-L8)"
    )
    assert line_ranges(SOURCE)["Thing.size"] == (12, 12)


def test_a_link_to_a_name_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(SOURCE)
    (tmp_path / "README.md").write_text("[`vanished`](code.py#L1-L2)")
    with pytest.raises(ValueError, match="README.md links to `vanished`, which code.py does not define"):
        relink(tmp_path / "README.md")


# Comparisons


@pytest.mark.parametrize(
    ("actual", "expected", "difference", "words"),
    [
        (torch.tensor([1.0, 2.0]), np.array([1.0, 2.5]), 0.5, "2.0 at position [1], expected 2.5"),
        ({"a": [1.0, [2.0]]}, {"a": [1.0, [2.0]]}, 0.0, None),
        ({"a": 1.0}, {"b": 1.0}, math.inf, "nothing at ['b'], expected 1.0"),
        (torch.zeros(2, 3), torch.zeros(3, 2), math.inf, "shape (2, 3), expected (3, 2)"),
        ([math.nan], [math.nan], 0.0, None),
        ([math.nan], [1.0], math.inf, "nan at position [0], expected 1.0"),
        ([math.inf], [math.inf], 0.0, None),
        (["a", "b"], ["a", "c"], math.inf, "'b' at [1], expected 'c'"),
        ([], [], 0.0, None),
        (None, [1.0], math.inf, "expected a value like [1.0], got None"),
        (torch.tensor([1, 2]), [1, 2], 0.0, None),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), 4.0, "at position [0]"),
    ],
)
def test_differences_are_measured_and_put_into_words(actual, expected, difference, words) -> None:
    assert largest_difference(actual, expected) == pytest.approx(difference)
    said = first_difference(actual, expected)
    assert said is None if words is None else words in said


# Exercises


def check_double(answer) -> str | None:
    for value in (2.0, 3.0):
        difference = first_difference(answer(value), 2 * value)
        if difference:
            return f"double({value}): {difference}"
    return None


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("an error whose words fail")


def raises_without_words(x: float) -> float:
    raise Wordless


DOUBLE = Exercise(
    name="double",
    statement="Return twice the number.",
    signature="double(x)",
    hint="Add it to itself.",
    check=check_double,
    solution=lambda x: x + x,
    mistakes={"squares": lambda x: x * x, "forgets to return": lambda x: None},
)


def test_an_exercise_accepts_its_solution_and_says_what_is_wrong_with_the_rest() -> None:
    assert DOUBLE.verdict(DOUBLE.solution) == "correct"
    assert DOUBLE.verdict(DOUBLE.mistakes["squares"]) == "not yet: double(3.0): 9.0, expected 6.0"
    assert DOUBLE.verdict(DOUBLE.mistakes["forgets to return"]).startswith(
        "not yet: double(2.0): expected a value like"
    )
    assert DOUBLE.verdict(None) == "not yet: define double(x)"
    assert DOUBLE.verdict(lambda x: 1 / 0) == "not yet: it raised ZeroDivisionError: division by zero"
    assert DOUBLE.verdict(lambda: 0).startswith("not yet: it raised TypeError")
    assert DOUBLE.verdict(raises_without_words) == "not yet: it raised Wordless"
    assert DOUBLE.verdict(lambda x: sys.exit(3)) == "not yet: it raised SystemExit: 3"


@pytest.mark.parametrize(
    ("answers", "code", "printed"),
    [
        ("def double(x): return 2 * x", None, "double: correct\n1 of 1 correct"),
        ("def double(x): return x", 1, "double: not yet: double(2.0): 2.0, expected 4.0\n0 of 1 correct"),
        ("", 1, "double: not yet: define double(x)"),
    ],
)
def test_answers_are_graded_from_the_command_line(answers, code, printed, tmp_path: Path, capsys) -> None:
    path = tmp_path / "my_answers.py"
    path.write_text(answers)
    if code is None:
        grade([DOUBLE], [str(path)])
    else:
        with pytest.raises(SystemExit) as exit_info:
            grade([DOUBLE], [str(path)])
        assert exit_info.value.code == code
    assert printed in capsys.readouterr().out


def test_grading_names_a_missing_or_broken_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("1 +")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "answers.txt").write_text("")
    messages = {"none.py": "no such file", "broken.py": "does not run: SyntaxError"}
    messages |= {"ends.py": "does not run: SystemExit: 0", "answers.txt": "not a Python file (.py)"}
    for name, message in messages.items():
        with pytest.raises(SystemExit) as exit_info:
            grade([DOUBLE], [str(tmp_path / name)])
        assert exit_info.value.code == 2 and message in capsys.readouterr().err
    grade([DOUBLE], [])
    assert "double(x)\n    Return twice the number.\n    Hint: Add it to itself." in capsys.readouterr().out


# Hardware, progress


def test_hardware_figures_are_consistent(capsys) -> None:
    by_name = {item.name: item for item in HARDWARE}
    assert by_name["A100 80GB SXM"].ridge == pytest.approx(312e12 / 2.039e12)
    assert all(8e9 < item.memory < 1e12 and 50 < item.ridge < 1000 for item in HARDWARE)
    workbench.main(["hardware"])
    assert len(capsys.readouterr().out.splitlines()) == len(HARDWARE) + 1
    workbench.main([])
    assert describe_machine() in capsys.readouterr().out


def test_timing_takes_turns_and_leaves_the_first_round_out() -> None:
    calls: list[str] = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, n_rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert speed_ratio([1.0, 2.0, 1.0], [3.0, 4.0, 1.0]) == "2.00x the speed (1.00 to 3.00 in 3 rounds)"
    assert speed_ratio([100.0], [0.5]) == "0.005x the speed (0.005 to 0.005 in 1 rounds)"


def test_progress_passes_the_items_through(capsys) -> None:
    assert list(progress(range(5), "count")) == [0, 1, 2, 3, 4]
    captured = capsys.readouterr()
    assert captured.out == "" and "count" in captured.err


# What conftest gives to every test


def test_the_ledger_fails_a_difference_beyond_the_tolerance(parity) -> None:
    with pytest.raises(AssertionError, match=r"differs from truth \(output\) by 0.5"):
        parity("half", "truth", "output", 1.0, 1.5, 1e-3)
    with pytest.raises(AssertionError, match="unknown level 'vibes'"):
        parity("half", "truth", "vibes", 1.0, 1.0, 1e-3)


def test_shape_comments_are_executed(checked_shapes, tmp_path: Path) -> None:
    import importlib.util

    source = """
def good(x):
    y = x.sum(0)  # (key)
    return y[None].expand(2, -1)  # (2, key)

def bad(x):
    y = x.T  # (query, key)
    z = x  # (query, key)
    return z

def rank(x):
    y = x[0]  # (query, key)
    return y
"""
    path = tmp_path / "shapes.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("shapes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with checked_shapes(module) as checked:
        module.good(torch.zeros(3, 4))
    assert len(checked) == 2
    for name, message in (("bad", "axis 'query' was 4, now 3"), ("rank", "claimed")):
        with pytest.raises(AssertionError, match=message), checked_shapes(module):
            getattr(module, name)(torch.zeros(3, 4))


def test_the_network_is_out_of_reach_but_loopback_is_not(request) -> None:
    with pytest.raises(PermissionError, match="tests run without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(PermissionError, match="asked for 'example.org'"):
        socket.getaddrinfo("example.org", 80)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()
    blocked = request.getfixturevalue("no_network")
    assert len(blocked) == 2
    blocked.clear()
