"""Topic 15 - Sandbox: run a program that nobody trusts, and judge what it returns.

    outcome = run_code("print(6 * 7)")                                    # Outcome("ok", stdout="42\\n", ...)
    [verdict] = judge([Submission("def f(n): return 2 * n", "f", [([3], 6)])])
    verdict.passed, verdict.failure

python 15-real-world-applications/real_world_applications.py sandbox --selftest

Tier A: own user ids, process ids, network, IPC and file system, and all of B. Tier B: resource limits, Landlock,
seccomp, another user where root starts it; no process beside the candidate, nothing to write to. Tier C: this machine
has less; then nothing is run, unless the caller accepts limits alone. Which tier a machine reaches is found by trying.

No tier holds against a fault of the kernel, against measuring time, or against somebody who wants the CPU busy.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from workbench import check_range

FOLDER = Path(__file__).parent
USER = 61_099  # whom root's candidates run as: the number of no account
START = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import sandbox_jail; del sys.path[0]; sandbox_jail.enter()"
GRACE = 60.0  # seconds for starting and ending on a busy machine, beside the limits of the jobs
MODES = {"A": "A", "B": "B", "C": "limits"}  # tier -> what the jail does
GUARANTEES = {
    "A": "no file, network, process or memory of this machine in reach; nothing survives; memory and disk bounded",
    "B": "no file can be opened but Python's, no network, no second process; names and sizes of files can be seen",
    "C": "limits of CPU, memory and one file alone: files and network are open",
}


@dataclass(frozen=True)
class Limits:
    """What one candidate may use."""

    cpu_seconds: int = 2  # seconds of CPU
    wall_seconds: float = 10.0  # seconds on the clock
    memory_mib: int = 256  # MiB of address space of a process
    disk_mib: int = 8  # MiB that it may write, tier A alone; in tier B there is nowhere to write
    output_kib: int = 64  # KiB of stdout, and of stderr
    result_kib: int = 256  # KiB of results
    n_tasks: int = 1  # processes (tier A alone) and threads, the first included

    def __post_init__(self) -> None:
        check_range(self, "cpu_seconds", "n_tasks", "output_kib", "result_kib", "disk_mib", least=1)
        check_range(self, "memory_mib", least=64)
        check_range(self, "wall_seconds", above=0)

    def job(self, n_bytes: int) -> dict[str, Any]:
        """What the supervisor is told of a program: these limits, and its length, for it never reads the program."""
        return {
            "n_bytes": n_bytes,
            "cpu": self.cpu_seconds,
            "wall": self.wall_seconds,
            "memory": self.memory_mib * 2**20,
            "disk": self.disk_mib * 2**20,
            "tasks": self.n_tasks,
            "most": [self.output_kib * 1024, self.output_kib * 1024, self.result_kib * 1024],
        }


LIMITS = Limits()


class Program(NamedTuple):
    """A source; with `function`, what is called with each list of `calls` after the source has run."""

    source: str
    function: str = ""
    calls: Sequence[list] = ()
    stdin: str = ""

    def body(self) -> bytes:
        """What the candidate's process alone reads. Raises ValueError for arguments that JSON cannot carry."""
        try:
            return json.dumps(self._asdict(), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"arguments of a call must be numbers, strings, lists or dicts: {error}") from None


class Outcome(NamedTuple):
    """How a program ended.

    status: "ok" (it ended by itself, code 0), "error" (another code), "timeout", "output" (it wrote too much), "killed"
    (by a signal), "setup" (it could not be shut in, and was not run), "lost" (the sandbox itself ended).
    results: the lines that it wrote as results, not yet believed. seconds on the clock and of CPU; peak in MiB.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    results: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0


def outcome_of(told: dict[str, Any], limits: Limits) -> Outcome:
    code, why = told["code"], told["why"]
    if why:
        status = {"wall": "timeout", "output": "output"}[why]
    elif not told["shut"]:
        status = "setup"
    elif code in (-9, -24) and told["cpu"] > limits.cpu_seconds / 2:  # the limit counts ticks, the report time: on a
        status = "timeout"  # busy machine they differ, and nothing but the limit kills what has computed for so long
    elif code < 0:
        status = "killed"
    else:
        status = "error" if code else "ok"
    texts = (told["stdout"], told["stderr"], told["results"])
    return Outcome(status, *texts, told["seconds"], told["cpu"], told["peak_kib"] / 1024)


class SetupFailed(RuntimeError):
    """The jail could not be built; nothing was run."""


@dataclass(frozen=True)
class Sandbox:
    """A way of running programs on this machine: use `find_sandbox`.

    mode: "A", "B", or the unsafe "limits" and "guard", which are here to be compared.
    """

    mode: str
    python: str = sys.executable
    user: int = field(default_factory=lambda: USER if os.geteuid() == 0 else 0)  # 0: stay who one is

    def run(self, programs: Sequence[Program], limits: Limits = LIMITS, mark: str = "sandbox") -> list[Outcome]:
        """Run programs one after the other, each shut in on its own; one Python is started for all.

        mark: a word in the command line of the processes, by which a test finds what is left of them. Raises
        SetupFailed where the jail cannot be built.
        """
        if not programs:
            return []
        bodies = [program.body() for program in programs]
        jobs = [limits.job(len(body)) for body in bodies]
        request = json.dumps({"mode": self.mode, "user": self.user, "parent": os.getpid(), "jobs": jobs}).encode()
        letter = b"%d\n" % len(request) + request + b"".join(bodies)
        process = subprocess.Popen(
            [self.python, "-I", "-S", "-c", START, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        with process:
            try:
                most = GRACE + len(jobs) * limits.wall_seconds
                told, noise = process.communicate(letter, timeout=most)
            except subprocess.TimeoutExpired:
                process.kill()
                told, noise = process.communicate()
            except BaseException:
                process.kill()
                raise
        reports = [json.loads(line) for line in told.split(b"\n")[:-1]]
        if (reports and "setup" in reports[-1]) or not reports:
            raise SetupFailed(reports[-1]["setup"] if reports else noise.decode(errors="replace").strip()[-300:])
        outcomes = [outcome_of(report, limits) for report in reports]
        failed = next((outcome for outcome in outcomes if outcome.status == "setup"), None)
        if failed:
            raise SetupFailed(failed.stderr[-300:])
        return outcomes + [Outcome("lost")] * (len(jobs) - len(outcomes))


# Which tier


class TierReport(NamedTuple):
    """What this machine reaches, and why it is not more: reasons maps what was tried to what was said."""

    tier: str
    python: str
    reasons: dict[str, str]

    def lines(self) -> list[str]:
        found = [f"tier {self.tier}: {GUARANTEES[self.tier]}", f"candidates run in {self.python}"]
        return found + [f"not {what}: {why}" for what, why in self.reasons.items()]


def pythons() -> list[str]:
    """Interpreters to try: the one beneath this environment, then the system's.

    Root's candidates run as another user, who cannot read a Python that lies in root's own folder.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [path for path in dict.fromkeys([own, "/usr/bin/python3", "/usr/local/bin/python3"]) if os.path.exists(path)]


TRIAL = Program("import fractions, statistics\nprint(fractions.Fraction(42, 6) * 6)")  # reads the library, once shut in


def why_not(sandbox: Sandbox) -> str:
    """Try a trivial program; the reason why it did not run, or ""."""
    try:
        [outcome] = sandbox.run([TRIAL], Limits(wall_seconds=30))
    except (SetupFailed, OSError) as error:
        return str(error) or type(error).__name__
    if (outcome.status, outcome.stdout) == ("ok", "42\n"):
        return ""
    return f"{outcome.status}: {outcome.stderr.strip()[-200:]}"


@functools.cache
def probe() -> TierReport:
    """Try the tiers from the strictest on, with each interpreter; what runs a trivial program is what there is."""
    reasons = {}
    for tier in ("A", "B"):
        for python in pythons():
            reason = why_not(Sandbox(tier, python))
            if not reason:
                return TierReport(tier, python, reasons)
            reasons[f"tier {tier} with {python}"] = reason
    return TierReport("C", pythons()[0], reasons)


def find_sandbox(accept_unsafe: bool = False) -> Sandbox:
    """The strictest sandbox of this machine. Raises ValueError with the report where only tier C is left.

    accept_unsafe: take tier C. Right for programs that one would also start by hand.
    """
    report = probe()
    if report.tier == "C" and not accept_unsafe:
        reasons = "; ".join(f"{what}: {why}" for what, why in report.reasons.items())
        raise ValueError(
            f"no sandbox on this machine, refusing to run untrusted code ({reasons}); use Linux 5.13 or newer with "
            "Landlock and seccomp, or accept the risk with --i-accept-unsafe"
        )
    return Sandbox(MODES[report.tier], report.python)


def run_code(
    source: str, stdin: str = "", limits: Limits = LIMITS, sandbox: Sandbox | None = None, mark: str = "sandbox"
) -> Outcome:
    """Run one program. Raises ValueError where this machine has no sandbox."""
    return (sandbox or find_sandbox()).run([Program(source, stdin=stdin)], limits, mark)[0]


# The judge: it holds the right answers, and never runs in the candidate's process


class Submission(NamedTuple):
    """A source that is to define `function`; cases of (arguments, right value)."""

    source: str
    function: str
    cases: Sequence[tuple[list, Any]]


class Verdict(NamedTuple):
    """passed: all cases are right. failure: the first case that is not, in words; "" if there is none."""

    passed: bool
    n_right: int
    n_cases: int
    outcome: Outcome
    failure: str = ""
    failed_case: int = -1


def judge(
    submissions: Sequence[Submission],
    limits: Limits = LIMITS,
    sandbox: Sandbox | None = None,
    mark: str = "sandbox",
) -> list[Verdict]:
    """Run each submission on its inputs in the sandbox, and compare here what came out.

    Whatever a candidate prints, patches, raises or returns, it passes only if it ended by itself and delivered one
    plain value for every case, each equal to the right one. Values travel as JSON, so a tuple is a list; True is not 1.
    """
    programs = [Program(item.source, item.function, [case[0] for case in item.cases]) for item in submissions]
    outcomes = (sandbox or find_sandbox()).run(programs, limits, mark)
    return [verdict_on(item, outcome) for item, outcome in zip(submissions, outcomes, strict=True)]


def verdict_on(submission: Submission, outcome: Outcome) -> Verdict:
    n_cases = len(submission.cases)
    if not n_cases:
        raise ValueError("a submission needs at least 1 case: with none every program passes")
    lines = outcome.results.split("\n")[:-1]
    right, failure, failed = 0, "", -1
    for place, (_, expected) in enumerate(submission.cases):
        wrong = wrong_line(lines[place], expected) if place < len(lines) else "nothing"
        right += not wrong
        if wrong and not failure:
            failure, failed = wrong, place
    if outcome.status != "ok":
        failure = outcome.status if failed < 0 or failure == "nothing" else failure
        last = outcome.stderr.strip().splitlines()[-1:]
        if outcome.status == "error" and last and failure == "error":
            failure = last[0][:200]
    elif len(lines) != n_cases and not failure:
        failure = f"{len(lines)} results for {n_cases} cases"
    return Verdict(not failure and right == n_cases, right, n_cases, outcome, failure, failed)


def wrong_line(line: str, expected: Any) -> str:
    """What is wrong with a line of results, or ""."""
    try:
        kind, value = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, TypeError, RecursionError):
        return "no plain value"
    if kind != "ok":
        return printable(str(value)[:200])
    return "" if same(value, plain_value(expected)) else printable(repr(value)[:200])


def printable(text: str, kept: str = "") -> str:
    """A candidate's text as a terminal or a model may be shown it: signs that command or hide are spelled out."""
    return "".join(char if char.isprintable() or char in kept else ascii(char)[1:-1] for char in text)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def plain_value(value: Any) -> Any:
    """The value as JSON carries it. Raises ValueError for one that it does not carry."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except TypeError as error:
        raise ValueError(f"a right value must be plain: {error}") from None


def same(one: Any, other: Any) -> bool:
    """Equality of plain values with equal types; floats may differ by 1e-9 of their size."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return math.isclose(one, other, rel_tol=1e-9) if isinstance(one, float) else one == other
