"""Topic 01 - Interrupts: Ctrl-C in the seconds of importing ends a script as it does later: one line, no traceback.

Every script of the course imports this before the packages that take long. Standard library only.
"""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
FAREWELL = "\ninterrupted; what was saved stays"
EXIT_CODE = 130


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take Python's place where an exception ends the script: Ctrl-C gets one line, all others their traceback."""
    if not was_interrupted(error):
        sys.__excepthook__(kind, error, trace)
        return
    print(FAREWELL, file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what went wrong: compiled modules turn it into an ImportError of their own."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if ROOT in Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents:
    sys.excepthook = end_quietly  # only in the course's own scripts; who imports from it keeps his own
