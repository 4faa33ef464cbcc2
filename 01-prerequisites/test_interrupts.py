"""Proofs for interrupts.py: Ctrl-C ends a script in one line, from its first import on."""

from interrupts import Terminated, end_at_once_from_here, end_quietly, terminable

import ast
import os
import signal
from pathlib import Path

import pytest

from workbench import ROOT


def caught(raiser: type[BaseException], of: BaseException | None = None) -> BaseException:
    try:
        try:
            raise of or raiser("first")
        except BaseException as error:
            if of is None:
                raise
            raise raiser("numpy failed to import") from error
    except BaseException as error:
        return error


@pytest.mark.parametrize("error", [caught(KeyboardInterrupt), caught(ImportError, KeyboardInterrupt())])
def test_an_interrupt_is_one_line_and_130(error: BaseException, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        end_quietly(type(error), error, error.__traceback__)
    assert left.value.code == 130 and capsys.readouterr().err == "\ninterrupted; what was saved stays\n"


def test_other_errors_keep_their_traceback(capsys) -> None:
    error = caught(ImportError)
    end_quietly(ImportError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("default_hangup")
def test_only_the_first_signal_is_taken_and_only_within_the_block(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Terminated) as ended, terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert ended.value.code == 143
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as nohup has it
    with terminable():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setenv("RANK", "0")
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_after_the_farewell_another_ctrl_c_is_silent_in_our_scripts_alone(monkeypatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    end_at_once_from_here()
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr("sys.excepthook", end_quietly)
    try:
        end_at_once_from_here()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPTS = [
    path
    for path in sorted(ROOT.glob("[0-9][0-9]-*/*.py"))
    if not path.name.startswith("test_") and 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_imports_it_before_anything_that_takes_time(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.Import) and first.names[0].name == "interrupts"
