"""The sandbox: what gets in, what gets out, what is left, and that nothing runs where it cannot be built."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sandbox as sandbox_module
from sandbox import (
    Limits,
    Outcome,
    Program,
    Sandbox,
    Submission,
    TierReport,
    find_sandbox,
    judge,
    outcome_of,
    plain_value,
    printable,
    probe,
    run_code,
    same,
    verdict_on,
)
from sandbox_attacks import (
    ATTACKS,
    CASES,
    CHEATS,
    RIGHT,
    SandboxConfig,
    judge_by_exit,
    judge_by_print,
    left_running,
    run_attacks,
    run_benign,
    run_together,
)
from workbench import RunConfig

PATIENT = Limits(cpu_seconds=5, wall_seconds=60)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    """The best sandbox of this machine; where there is none, its tests are skipped, aloud."""
    report = probe()
    if report.tier == "C":
        pytest.skip(f"no sandbox here: {report.reasons}")
    return find_sandbox()


def test_this_machine_says_what_it_reaches() -> None:
    report = probe()
    assert report.tier in ("A", "B", "C")
    assert report.tier == "A" or report.reasons, "a lower tier needs a reason"


# What gets in and out


def test_a_program_prints_reads_and_ends(box: Sandbox) -> None:
    source = "import sys\nprint(input()[::-1])\nprint('hint', file=sys.stderr)\nraise SystemExit(3)"
    outcome = run_code(source, "abc", PATIENT, box)
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("error", "cba\n", "hint\n")
    assert 0 < outcome.seconds < 60 and 4 < outcome.peak_mib < 256


def test_one_program_cannot_reach_the_next(box: Sandbox) -> None:
    first = (
        "import builtins, math, os\nmath.pi = 3\nbuiltins.len = None\nopen('left', 'w') if os.getcwd() != '/' else 0"
    )
    second = "import math, os\nprint(math.pi > 3.1, len('ab'), os.path.exists('left'))"
    outcomes = box.run([Program(first), Program(second)], PATIENT)
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert outcomes[1].stdout == "True 2 False\n"


def test_a_program_finds_no_other_in_its_memory(box: Sandbox) -> None:
    """Neither the source of one before or behind it nor what that one wrote; its own it does find."""
    look = (
        "import gc, sys\nfound, frame = gc.get_objects(), sys._getframe()\nwhile frame:\n"
        "    found += [frame.f_locals, frame.f_globals]\n    frame = frame.f_back\n"
        "text = repr(found)\nprint([word for word in ('erofeB', 'dniheB', 'nwO') if word[::-1] in text])  # Own"
    )
    outcomes = box.run([Program("print('Before')"), Program(look), Program("print('Behind')")], PATIENT)
    assert [outcome.stdout for outcome in outcomes] == ["Before\n", "['nwO']\n", "Behind\n"]


@pytest.mark.parametrize("code", [1, 97, 255])
def test_no_exit_code_says_that_a_program_was_not_shut_in(box: Sandbox, code: int) -> None:
    """What tells that must be out of a candidate's reach, or one candidate ends the judging of all."""
    outcomes = box.run([Program(f"import os\nos._exit({code})"), Program("print(1)")], PATIENT)
    assert [(outcome.status, outcome.stdout) for outcome in outcomes] == [("error", ""), ("ok", "1\n")]


def test_processes_are_counted_without_those_of_the_jail(box: Sandbox) -> None:
    """With a limit of n tasks a candidate starts n - 1 threads beside its own, and no more."""
    source = (
        "import threading\nn, go = 1, threading.Event()\nthreading.stack_size(65536)\ntry:\n    while n < 20:\n"
        "        threading.Thread(target=go.wait, daemon=True).start()\n        n += 1\n"
        "except RuntimeError: pass\nprint(n)"
    )
    assert [run_code(source, "", Limits(n_tasks=n), box).stdout for n in (1, 2, 5)] == ["1\n", "2\n", "5\n"]


def test_limits_end_what_is_beyond_them(box: Sandbox) -> None:
    tight = Limits(cpu_seconds=1, wall_seconds=0.3, memory_mib=64, output_kib=1)
    programs = ["import time; time.sleep(60)", "while True: print('x' * 99)", "bytearray(2**27)"]
    outcomes = box.run([Program(source) for source in programs], tight)
    assert [outcome.status for outcome in outcomes] == ["timeout", "output", "error"]
    assert len(outcomes[1].stdout) <= 1025 and "MemoryError" in outcomes[2].stderr


def test_cpu_is_limited_beside_the_clock(box: Sandbox) -> None:
    outcome = run_code("while True: pass", "", Limits(cpu_seconds=1, wall_seconds=100), box)
    assert outcome.status == "timeout" and 0.9 < outcome.cpu_seconds < 2 and outcome.seconds < 100


def test_what_the_cpu_limit_killed_is_told_from_what_something_else_did() -> None:
    told = {"why": "", "shut": True, "stdout": "", "stderr": "", "results": "", "seconds": 9.0, "peak_kib": 0}
    for code, cpu, status in ((-9, 1.99, "timeout"), (-24, 1.6, "timeout"), (-9, 0.2, "killed"), (-11, 1.99, "killed")):
        assert outcome_of(told | {"code": code, "cpu": cpu}, Limits(cpu_seconds=2)).status == status


def test_output_up_to_the_limit_is_kept_whole(box: Sandbox) -> None:
    outcome = run_code("print('y' * 65535)", "", PATIENT, box)
    assert outcome.status == "ok" and outcome.stdout == "y" * 65535 + "\n"


def test_the_environment_is_empty_and_no_file_is_open(box: Sandbox) -> None:
    os.environ["SANDBOX_SECRET"] = "x"
    source = (
        "import os\nprint([name for name in os.environ if 'SECRET' in name])\nfound = []\nfor n in range(4, 64):\n"
        "    try:\n        os.fstat(n)\n        found.append(n)\n    except OSError: pass\nprint(found)"
    )
    try:
        assert run_code(source, "", PATIENT, box).stdout == "[]\n[]\n"
    finally:
        del os.environ["SANDBOX_SECRET"]


# What attacks and honest programs come to


def test_every_attack_is_held_in_the_best_tier(box: Sandbox) -> None:
    results, traces = run_together(box)
    seen = ["see names and sizes of files"] if box.mode == "B" else []
    assert [result.attack.name for result in results if not result.contained] == seen
    assert not traces
    assert len(results) == len(ATTACKS) >= 31


def test_attacks_get_through_where_there_are_only_limits() -> None:
    """The attacks are able to see an open door: without this the test above could not fail."""
    names = {"read a file of ours", "write a file outside", "connect over TCP", "send over UDP", "memory in files"}
    chosen = [attack for attack in ATTACKS if attack.name.split(" (")[0] in names]
    results = run_attacks(Sandbox("limits", probe().python), [a for a in chosen if "memory" not in a.kind])
    assert [result.contained for result in results] == [False] * 4


def test_honest_programs_run(box: Sandbox) -> None:
    honest = run_benign(box)
    assert all(honest.values()) and len(honest) == (4 if box.mode == "A" else 2)


def test_nothing_is_left_behind(box: Sandbox) -> None:
    mounts, descriptors = Path("/proc/self/mounts").read_text(), len(os.listdir("/proc/self/fd"))
    folders = set(os.listdir("/tmp"))
    for _ in range(5):
        run_code("import time; time.sleep(60)", "", Limits(wall_seconds=0.05), box, "left-behind-test")
    assert not left_running("left-behind-test")
    assert Path("/proc/self/mounts").read_text() == mounts and len(os.listdir("/proc/self/fd")) == descriptors
    assert not {name for name in set(os.listdir("/tmp")) - folders if "jail" in name or "sandbox" in name}


# Other users and other machines, in processes of their own


def in_another_process(body: str) -> str:
    """What a fresh Python prints that has this test's modules and then runs `body`."""
    code = "import os, sandbox, sandbox_kernel as kernel, sandbox_attacks\n" + textwrap.dedent(body)
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout


DROP = "kernel.become(61_234)\n" if os.geteuid() == 0 else ""


def test_a_user_without_rights_and_machines_with_less() -> None:
    """As a user: all attacks in tier B. Then no user namespaces: tier B. Then no Landlock: C, and nothing is run.

    The kernel is made to refuse these calls as a container does that lacks them.
    """
    body = f"""
    {DROP}
    def tier():
        sandbox.probe.cache_clear()
        return sandbox.probe()
    first = tier()
    print(first.tier, os.geteuid() != 0)
    box = sandbox.Sandbox("B", first.python)
    chosen = [attack for attack in sandbox_attacks.ATTACKS if attack.kind not in ("time", "output")]  # no user's matter
    results, traces = sandbox_attacks.run_together(box, chosen)
    print([r.attack.name for r in results if not r.contained], traces, sandbox_attacks.run_benign(box))
    kernel.install(kernel.refusing("unshare"))
    print(tier().tier, "unshare: Operation not permitted" in str(tier().reasons))
    kernel.install(kernel.refusing("landlock_create_ruleset", error=38))
    print(tier().tier, "no Landlock" in str(tier().reasons))
    try:
        sandbox.run_code("print(1)")
    except ValueError as error:
        print("refused" if "--i-accept-unsafe" in str(error) else error)
    print(sandbox.find_sandbox(accept_unsafe=True).mode)
    """
    if probe().tier == "C":
        pytest.skip(f"no sandbox here: {probe().reasons}")
    lines = in_another_process(body).splitlines()
    if lines[0].startswith("C"):
        pytest.skip(f"an ordinary user has no sandbox here: {lines}")
    assert lines[0].endswith("True") or os.geteuid() == 0
    assert lines[1].startswith("['see names and sizes of files'] [] {'the standard library': True, '4 threads': True}")
    assert lines[2:] == ["B True", "C True", "refused", "limits"]


def test_tier_c_is_refused_and_says_why(monkeypatch) -> None:
    report = TierReport("C", sys.executable, {"tier A": "no namespaces", "tier B": "no Landlock"})
    monkeypatch.setattr(sandbox_module, "probe", lambda: report)
    with pytest.raises(ValueError, match="refusing to run untrusted code .*no namespaces.*--i-accept-unsafe"):
        run_code("print(1)")
    assert find_sandbox(accept_unsafe=True) == Sandbox("limits", sys.executable)


def test_a_jail_that_cannot_be_built_runs_nothing(monkeypatch, tmp_path, capfd) -> None:
    """An unknown way in, or a Python that does not start, is an error and never a run without a jail."""
    with pytest.raises((sandbox_module.SetupFailed, OSError)):
        Sandbox("A", str(tmp_path / "no-python")).run([Program("print(1)")])
    with pytest.raises(sandbox_module.SetupFailed):
        Sandbox("A", "/bin/true").run([Program("print(1)")])


# The judge


def test_the_right_program_passes_and_no_cheat_does(box: Sandbox) -> None:
    sources = {"right": RIGHT, **CHEATS}
    verdicts = judge([Submission(source, "f", CASES) for source in sources.values()], Limits(wall_seconds=60), box)
    assert [name for name, verdict in zip(sources, verdicts, strict=True) if verdict.passed] == ["right"]
    assert len(CHEATS) >= 10


def test_cheats_fool_tests_that_run_inside(box: Sandbox) -> None:
    """The cheats are real: the two usual shortcuts believe them."""
    inside = {"leave with code 0": judge_by_exit, "patch unittest": judge_by_print}
    for name, believer in inside.items():
        assert believer([CHEATS[name], RIGHT, "def f(n): return 0"], box) == [True, True, False], name


def test_the_judge_says_which_case_failed_and_how(box: Sandbox) -> None:
    sources = ["def f(n): return n * n + (n < 5)", "def f(n): return 1 // (5 - n)", "def g(n): return 1", "def f(n:"]
    verdicts = judge([Submission(source, "f", CASES) for source in sources], PATIENT, box)
    assert [verdict.failed_case for verdict in verdicts] == [3, 0, 0, 0]
    assert verdicts[0].failure == "25" and verdicts[0].n_right == 3
    assert verdicts[1].failure == "0" and "KeyError" in verdicts[2].failure
    assert verdicts[3].failure.startswith("SyntaxError")


def test_values_are_compared_with_their_types() -> None:
    assert same(plain_value((1, [2.0, "a"], {"b": None})), [1, [2.0, "a"], {"b": None}])
    assert same(0.1 + 0.2, 0.3) and not same(1, True) and not same(1, 1.0) and not same([1], [1, 2])
    assert not same({"a": 1}, {"b": 1}) and not same("1", 1)
    with pytest.raises(ValueError, match="must be plain"):
        plain_value({1, 2})


@pytest.mark.parametrize(
    ("results", "status", "passed"),
    [
        ('["ok", 1]\n["ok", 4]\n', "ok", True),
        ('["ok", 1]\n["ok", 4]\n', "timeout", False),
        ('["ok", 1]\n["ok", 4]\n["ok", 4]\n', "ok", False),
        ('["ok", 1]\n["ok", 4]', "ok", False),
        ('["ok", 1]\n', "ok", False),
        ('["ok", 1]\n["ok", NaN]\n', "ok", False),
        ('["ok", 1]\n{}\n', "ok", False),
        ('["ok", 1]\n' + "[" * 100_000 + "\n", "ok", False),
        ("", "ok", False),
    ],
)
def test_only_a_complete_and_right_list_of_results_passes(results: str, status: str, passed: bool) -> None:
    verdict = verdict_on(Submission("", "f", [([1], 1), ([2], 4)]), Outcome(status, results=results))
    assert verdict.passed is passed and bool(verdict.failure) is not passed


def test_what_a_candidate_wrote_is_shown_without_commands(box: Sandbox) -> None:
    """No terminal obeys it, and no tokenizer stumbles over half a character."""
    source = "def f(n):\n    raise Exception('\\x1b[2J' + chr(0xD800) + chr(0x202E) + 'Zoë')"
    [verdict] = judge([Submission(source, "f", [([1], 1)])], PATIENT, box)
    assert verdict.failure == r"Exception: \x1b[2J\ud800\u202eZoë"
    assert printable("a\tb\nc\r", "\n\t") == "a\tb\nc\\r"


# Bad input


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_mib must be finite and >= 64, got 1"):
        Limits(memory_mib=1)
    with pytest.raises(ValueError, match="must be numbers, strings, lists or dicts"):
        Program("", "f", [[{1}]]).body()
    with pytest.raises(ValueError, match="at least 1 case"):
        verdict_on(Submission("", "f", []), Outcome("ok"))
    from sandbox_attacks import sandbox

    with pytest.raises(ValueError, match="is no file; give a Python file"):
        sandbox(SandboxConfig(program=tmp_path / "none.py"), RunConfig(out=tmp_path))
    assert json.loads(json.dumps(PATIENT.job(7)))["tasks"] == 1
