"""Topic 01 - Interrupts: Ctrl-C, SIGTERM or a closed terminal end a script in one line, with all that it started.

Every script of the course imports this before the packages that take long. Standard library only.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).resolve().parents[1]
FAREWELL = "\ninterrupted; what was saved stays"
EXIT_CODE = 130
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class Terminated(KeyboardInterrupt):
    """SIGTERM or a closed terminal (SIGHUP), which end a verb as Ctrl-C does; exit code 143 or 129."""

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__()
        self.code = 128 + signum


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block the first signal to end raises Terminated, so that what was started ends too; the next kills.

    A signal that is ignored (nohup) or has another handler keeps it; so do processes of torchrun, which ends them all.
    """

    def take(signum: int, _frame: FrameType | None) -> None:
        restore()
        raise Terminated(signum)

    def restore() -> None:
        for each in ours:
            if signal.getsignal(each) is take:
                signal.signal(each, signal.SIG_DFL)

    ours = []
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        ours = [each for each in ENDING if signal.getsignal(each) is signal.SIG_DFL]
        for each in ours:
            signal.signal(each, take)
    try:
        yield
    finally:
        restore()


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take Python's place where an exception ends the script: Ctrl-C gets one line, all others their traceback."""
    if not was_interrupted(error):
        sys.__excepthook__(kind, error, trace)
        return
    end_at_once_from_here()
    print(FAREWELL, file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def end_at_once_from_here() -> None:
    """Another Ctrl-C gets no word: Python, which is ending, would show it as an error. Others' scripts stay theirs."""
    if sys.excepthook is end_quietly and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what went wrong: compiled modules turn it into an ImportError of their own."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if ROOT in Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents:
    sys.excepthook = end_quietly  # only in the course's own scripts; who imports from it keeps his own
