"""What every test has: the parity ledger, the shape-comment tracer, and no network beyond this machine."""

import ast
import inspect
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any test imports transformers
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.nn.modules.module import register_module_forward_pre_hook  # noqa: E402

if not torch.cuda.is_available():  # where CUDA builds of PyTorch bring triton along, any test may import it first
    os.environ.setdefault("TRITON_INTERPRET", "1")

from course_pages import LEVELS, course_layers  # noqa: E402
from workbench import ROOT, first_difference, largest_difference  # noqa: E402

LEDGER: list[dict] = []
RAN: set[str] = set()  # tests of this run


# The parity ledger


@pytest.fixture
def parity(request) -> Iterator[Callable]:
    """Compare with an oracle, record the proof, and fail if the largest absolute difference exceeds the tolerance.

    parity("MultiHeadAttention", "nn.MultiheadAttention", "gradient", ours, theirs, 1e-10)

    `ours` and `theirs` are tensors, arrays, numbers or strings, or nested lists, tuples and dicts of them. Levels:
    output, gradient, trajectory (N training steps), invariant (a property that needs no second implementation),
    exchange (weights or files loaded from, or by, the other library).
    """
    topic, rows, called = Path(request.node.path).parent.name, [], set()

    def note(module, inputs) -> None:
        called.update(cls.__name__ for cls in type(module).__mro__)

    def compare(component: str, oracle: str, level: str, actual, expected, tolerance: float) -> None:
        assert level in LEVELS, f"unknown level {level!r}; use one of {LEVELS}"
        error = largest_difference(actual, expected)
        row = {"topic": topic, "component": component, "oracle": oracle, "level": level}
        assert error <= tolerance, (
            f"{component} differs from {oracle} ({level}) by {error:.3g}, allowed {tolerance:.0e}: "
            f"{first_difference(actual, expected, tolerance)}"
        )
        rows.append({**row, "error": float(error), "tolerance": float(tolerance), "test": request.node.nodeid})

    hook = register_module_forward_pre_hook(note)
    yield compare
    hook.remove()
    LEDGER.extend(row | {"layers": sorted(called)} for row in rows)  # which layers this proof ran


def pytest_sessionfinish(session) -> None:
    """Write the ledger: the rows of the tests that ran now, beside earlier rows of other tests that still exist."""
    RAN.update(item.nodeid for item in getattr(session, "items", ()))
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest -n 2): the first one writes
        session.config.workeroutput["ledger"], session.config.workeroutput["ran"] = LEDGER, sorted(RAN)
        return
    if not LEDGER:
        return
    path = ROOT / "parity.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["proofs"] if path.exists() else []
    kept = [row for row in kept if row["test"] not in RAN and (ROOT / row["test"].partition("::")[0]).exists()]
    course = course_layers().keys()
    proofs = [row | {"layers": sorted(course & set(row["layers"]))} for row in kept + LEDGER]
    path.write_text(json.dumps({"proofs": proofs}, indent=1) + "\n", encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Take over what one of several processes has proven."""
    output = getattr(node, "workeroutput", {})
    LEDGER.extend(output.get("ledger", []))
    RAN.update(output.get("ran", []))


# The shape-comment tracer: `q = ...  # (batch, heads, query, d_head)` must hold in every call


CLAIM = re.compile(r"#\s*\(([^()]*)\)")


@cache
def claims(code) -> dict[int, tuple[int, list[str], list[str]]]:
    """Map each source line of an annotated assignment or return to (last line, assigned names, claimed axes)."""
    lines, first = inspect.getsourcelines(code)
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        match = isinstance(node, ast.Assign | ast.AnnAssign | ast.Return) and CLAIM.search(lines[node.end_lineno - 1])
        if match:
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            names = [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]
            axes = [axis.strip() for axis in match[1].split(",") if axis.strip()]
            for line in range(node.lineno, node.end_lineno + 1):
                found[first + line - 1] = (first + node.end_lineno - 1, names, axes)
    return found


@contextmanager
def trace_shapes(*modules) -> Iterator[set[str]]:
    """Within the block, every annotated line that runs in `modules` is compared with the real tensors.

    Yields the set of "file:line" checked so far. An axis keeps one size within a call; a number is a literal size;
    `*` is an axis that changes within a call, such as a growing cache.
    """
    paths, checked = tuple(module.__file__ for module in modules), set()

    def verify(frame, state, returned=None) -> None:
        last, names, axes = state["claim"]
        values = [frame.f_locals[name] for name in names if name in frame.f_locals] if names else [returned]
        for value in values:
            shape, where = tuple(getattr(value, "shape", ())), f"{frame.f_code.co_filename}:{last}"
            assert len(shape) == len(axes), f"{where}: claimed {axes}, got {shape}"
            for axis, size in zip(axes, shape, strict=True):
                if axis == "*":
                    continue
                known = int(axis) if axis.isdigit() else state["sizes"].setdefault(axis, size)
                assert known == size, f"{where}: axis {axis!r} was {known}, now {size} in {shape}"
            checked.add(where)

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(paths) or frame.f_code.co_name.startswith("<"):
            return None
        table, state = claims(frame.f_code), {"claim": None, "sizes": {}}

        def local(frame, event, arg):
            claim = state["claim"]
            if event == "exception":
                state["claim"] = None
            elif claim and (event == "return" or table.get(frame.f_lineno) != claim):
                if claim[1] or (event == "return" and arg is not None):
                    verify(frame, state, arg)
                state["claim"] = None
            if event == "line":
                state["claim"] = table.get(frame.f_lineno)
            return local

        return local

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        yield checked
    finally:
        sys.settrace(earlier)


@pytest.fixture
def checked_shapes() -> Callable:
    """`with checked_shapes(module) as checked: ...` runs the shape comments of the module; see trace_shapes."""
    return trace_shapes


@pytest.fixture
def forks() -> None:
    """For tests that train in a forked process: with a GPU the backward pass has threads, which no fork survives."""
    if not hasattr(os, "fork") or torch.cuda.is_available():
        pytest.skip("no forked process can train here; where there is a GPU, CUDA_VISIBLE_DEVICES= hides it")


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """For tests of a closed terminal: under nohup, which hands on that its signal is ignored, it is obeyed within."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# No network beyond this machine


LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")
BLOCKED: list[str] = []
WATCH = {"on": False}


def refuse_network(event: str, args: tuple) -> None:
    """Audit hook: refuse, and remember, every look-up of or connection to a host that is not this one."""
    if not WATCH["on"] or event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    address = args[0] if event == "socket.getaddrinfo" else args[1]
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    local = host is None or host == "" or str(host).startswith(LOOPBACK)
    if event != "socket.getaddrinfo" and not isinstance(address, tuple):
        local = True  # a Unix socket has a path, not a host
    if not local:
        BLOCKED.append(f"{event} {host}")
        raise PermissionError(f"tests run without a network, but {event} asked for {host!r}")


sys.addaudithook(refuse_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fail any test that asks for another host, also when the code under test swallows the refusal."""
    BLOCKED.clear()
    WATCH["on"] = True
    yield BLOCKED
    WATCH["on"] = False
    if BLOCKED:
        pytest.fail(f"the test asked for the network: {BLOCKED}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread per test: the same sums in the same order on every machine, and no fight over the cores."""
    import torch

    torch.set_num_threads(1)
