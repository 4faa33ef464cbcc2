"""Topic 07 - Checkpoints: what a run leaves behind, so that neither kill -9 nor a full disk nor a flipped byte ends it.

python 07-training-transformers/training_transformers.py train --out runs/mine            # saves as it goes
python 07-training-transformers/training_transformers.py train --out runs/mine --resume   # goes on, bit for bit
python 07-training-transformers/training_transformers.py evaluate --out runs/mine         # reads the model alone

Why so much care: torch.save to the final name leaves half a file when the process dies, neither torch.load nor
safetensors notices a flipped byte, and an unpickled file can run any program (Python's manual on pickle says so).
"""

from interrupts import ENDING

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench import shown, write_atomically

MANIFEST = "manifest.json"


# Checkpoints: whole or not there


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not, byte for byte, what was saved."""


class Checkpoints:
    """The checkpoints of one run: folders step-N, of which the `keep_last` newest stay.

    A checkpoint is a dict of parts, each of tensors and plain values and each in a file of its own, so that a reader of
    "model" need not load the optimizer. A folder appears under its name only when all its bytes are on the disk, so
    that a crash at any moment leaves the earlier ones as they were. One process at a time may write here; see `locked`.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}; a run that keeps none cannot go on")
        self.folder, self.keep_last = folder, keep_last

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that were saved, in the order of numbers: as text, step-1000000 would come before step-999999."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def sweep(self) -> None:
        """Remove what processes that died in the middle of a save left behind."""
        for stale in self.folder.glob(".step-*.tmp.*"):
            shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, parts: dict[str, Any]) -> Path:
        """Write all parts, then the manifest with size and SHA-256 of each, then make the folder appear.

        Raises OSError, with nothing changed, if the disk is full, and ValueError for a step below 0, for a part whose
        name cannot be a file's, and for a part that `load` would refuse.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"a step is an integer >= 0, got {step!r}")
        if wrong := [name for name in parts if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name))]:
            raise ValueError(f"the name of a part becomes that of a file, got {wrong}; use letters, digits, _, - and .")
        final = self.path(step)
        temporary, old = (self.folder / f".{final.name}.tmp.{kind}{os.getpid()}" for kind in ("", "old."))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            files = {f"{name}.pt": write_part(temporary / f"{name}.pt", part) for name, part in parts.items()}
            write_atomically(temporary / MANIFEST, render_manifest({"step": step, "files": files}))
            if final.exists():  # a damaged one that the run had to pass over
                os.rename(final, old)
            os.rename(temporary, final)
            sync_folder(self.folder)
        except OSError as error:
            raise OSError(
                f"cannot save step {step} in {shown(self.folder)}: {error.strerror or error}; earlier checkpoints are "
                "as they were: make room, or choose another --out, and go on with --resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        reached = [number for number in self.steps() if number <= step]  # later ones were damaged, and passed over
        for earlier in reached[: -self.keep_last]:
            self.remove(earlier)
        return final

    def remove(self, step: int) -> None:
        """Hide the folder first: half a removed checkpoint must not look like a damaged one."""
        hidden = self.folder / f".{self.path(step).name}.tmp.gone.{os.getpid()}"
        os.rename(self.path(step), hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def load(self, names: Collection[str] | None = None, step: int | None = None) -> dict[str, Any]:
        """The parts called `names` (None: all) of the newest whole checkpoint, or of `step`; and "step", its number.

        Damaged checkpoints are named in a warning and passed over. Raises ValueError if there is none, if all are
        damaged, or if a file holds anything but tensors and plain values, which could run a program.
        """
        damaged = []
        steps = self.steps() if step is None else [number for number in self.steps() if number == step]
        for candidate in reversed(steps):
            try:
                parts = read_checkpoint(self.path(candidate), names)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                continue
            if damaged:
                print(f"warning: {'; '.join(damaged)}; going back to step {candidate}", file=sys.stderr)
            return {**parts, "step": candidate}
        if damaged:
            raise ValueError(f"no whole checkpoint in {shown(self.folder)} ({'; '.join(damaged)}); train again")
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step} (there are {self.steps()})"
        raise ValueError(f"{wanted} in {shown(self.folder)}; run the verb train first, with the same --out")


class HashingWriter:
    """A file for torch.save that counts and hashes on the way, and remembers the error that torch would reword."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.digest, self.n_bytes, self.error = file, hashlib.sha256(), 0, None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.n_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_part(path: Path, part: Any) -> dict[str, Any]:
    """Write one part down to the disk; return its size in bytes and its SHA-256."""
    with open(path, "wb") as file:
        writer = HashingWriter(file)
        try:
            torch.save(part, writer)
        except RuntimeError:
            raise writer.error or sys.exception() from None
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(f"{path.stem} cannot be saved ({error}); give tensors and plain values") from None
        file.flush()
        os.fsync(file.fileno())
    check_loadable(path)
    return {"bytes": writer.n_bytes, "sha256": writer.digest.hexdigest()}


def check_loadable(path: Path) -> None:
    """Raise ValueError for a file that `read_part` would refuse; reads its structure, and no numbers."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path.stem} holds more than tensors and plain values, and could not be loaded again"
        ) from None


def render_manifest(body: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, closed by its own SHA-256: any other bytes are damage."""
    text = json.dumps(body, sort_keys=True)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data.partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        raise DamagedCheckpoint(f"{folder.name} has no readable manifest") from None
    try:
        sound = manifest["step"] == int(folder.name.removeprefix("step-"))
        sound &= all(set(entry) == {"bytes", "sha256"} for entry in manifest["files"].values())
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound or render_manifest(manifest) != data:
        raise DamagedCheckpoint(f"the manifest of {folder.name} is damaged")
    return manifest


def read_checkpoint(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Read the parts called `names` (None: all), each only if size and SHA-256 are those of the manifest."""
    files = read_manifest(folder)["files"]
    known = [name.removesuffix(".pt") for name in files]
    absent = [name for name in names or () if name not in known]
    if absent:
        raise ValueError(f"{shown(folder)} has no part {', '.join(absent)}; it has {', '.join(known)}")
    return {name: read_part(folder / f"{name}.pt", files[f"{name}.pt"]) for name in names or known}


def read_part(path: Path, expected: dict[str, Any]) -> Any:
    where = f"{path.parent.name}/{path.name}"
    try:
        with open(path, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes != expected["bytes"]:
                raise DamagedCheckpoint(f"{where} has {n_bytes} bytes instead of {expected['bytes']}")
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise DamagedCheckpoint(f"{where} is damaged (its SHA-256 differs)")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedCheckpoint(f"{where} cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{where} holds more than tensors and plain values and is refused, because loading it could run a program"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a rename alone may still be in memory when the power fails."""
    if hasattr(os, "O_DIRECTORY"):  # POSIX
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)


# What belongs to the state of a run


def rng_state() -> dict[str, Any]:
    """The state of the generators of Python, NumPy and PyTorch (CPU, and CUDA if there is one), as plain values."""
    state = {"torch": torch.get_rng_state()}
    kind, keys, *rest = np.random.get_state()
    state["numpy"] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]  # weights_only refuses NumPy's array
    version, keys, gauss = random.getstate()
    state["python"] = [version, torch.tensor(keys), gauss]  # one tensor is quicker to write than 625 numbers
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers where `rng_state` was taken."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model if every name and shape fits; otherwise change nothing and raise ValueError.

    nn.Module.load_state_dict copies what fits before it complains, and leaves a mixture of two models behind.
    """
    wanted = model.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in weights],
        "unknown": [name for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in weights and weights[name].shape != wanted[name].shape
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights do not fit the model; {'; '.join(found)}")
    model.load_state_dict(weights)


def check_header(saved: dict[str, Any], current: dict[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise ValueError that names every setting, "a.b" for b inside a, which the saved run had otherwise."""
    saved, current = (
        {name: value for name, value in flatten(header) if name.rpartition(".")[2] not in may_change}
        for header in (saved, current)
    )
    differing = [
        f"{name} was {saved.get(name, 'absent')!r}, is {current.get(name, 'absent')!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, "absent") != current.get(name, "absent")
    ]
    if differing:
        raise ValueError(
            f"cannot resume: the checkpoint was made with other settings: {'; '.join(differing)}; "
            "give the same flags, or another --out"
        )


def flatten(header: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in header.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# The log


class CsvLog:
    """Rows of numbers, each with its "step", in a CSV file that is never behind; `rows` holds them all.

    A run that goes on from `last_step` keeps the rows up to there, so that its file ends with the same bytes as that of
    a run that never stopped: numbers are written so that they read back exactly, and clock times are not among them.
    A path of None writes nothing. Raises ValueError, with the file as it was, if there is one whose rows are not those
    of `digest`.
    """

    def __init__(self, path: Path | None, last_step: int = 0, digest: str | None = None) -> None:
        self.path = path
        self.rows = [row for row in read_log(path) if row.get("step", last_step + 1) <= last_step] if path else []
        if digest and path.exists() and digest != self.digest():
            raise ValueError(
                f"{shown(path)} is not the log that step {last_step} was saved with: lines were lost or changed; bring "
                "the file back, or remove it to go on without its rows"
            )
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.rewrite()

    def digest(self) -> str:
        """SHA-256 of the rows, whatever the order of their columns."""
        return hashlib.sha256(repr([sorted(row.items()) for row in self.rows]).encode()).hexdigest()

    def add(self, row: dict[str, float]) -> None:
        row = {name: value if type(value) is int else float(value) for name, value in row.items()}
        if wrong := [name for name in row if re.search(r"[,\r\n]", name)]:
            raise ValueError(f"the name of a column must have no comma and no line break, got {wrong}")
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self.rewrite()
        elif self.path:
            with named_failure(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(self.line(row))

    def line(self, row: dict[str, float]) -> str:
        return ",".join(repr(row[name]) if name in row else "" for name in self.columns) + "\n"

    def rewrite(self) -> None:
        if self.path:
            text = ",".join(self.columns) + "\n" + "".join(map(self.line, self.rows))
            with named_failure(self.path):
                write_atomically(self.path, text.encode())

    def sync(self) -> None:
        """Bring the rows to the disk: a checkpoint must never be ahead of its log."""
        if self.path:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Say which file could not be written, and what helps: the system says neither."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {shown(path)}: {error.strerror or error}; make room, or choose another --out; a run that "
            "has checkpoints goes on with --resume"
        ) from error


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """Yield the rows of a log up to the first line that is none: what a dying process, or a power failure, left."""
    if not path.exists():
        return
    head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    columns = head.split(",")
    for line in lines[:-1]:  # after the last newline: nothing, or half a line
        try:
            row = {name: number(cell) for name, cell in zip(columns, line.split(","), strict=True) if cell}
        except ValueError:
            return
        yield row


def number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


# Signals


STOPPING = (signal.SIGINT, *ENDING)  # Ctrl-C, SIGTERM, a closed terminal


class StopRequest:
    """The first signal to end, if one came: `signum` is its number, else 0."""

    def __init__(self) -> None:
        self.signum = 0


@contextlib.contextmanager
def stop_requests(signums: Iterable[int] = STOPPING) -> Iterator[StopRequest]:
    """Within the block the first signal only sets `signum`, for the loop to save and leave; a second one ends at once.

    Outside the main thread, where Python delivers no signals, the block changes nothing.
    """
    request, before = StopRequest(), {}

    def take(signum: int, _frame: object) -> None:
        request.signum = signum
        for each in before:
            signal.signal(each, signal.SIG_DFL)  # the next one ends the process, even inside a long computation

    if threading.current_thread() is threading.main_thread():
        for each in signums:
            if signal.getsignal(each) is not signal.SIG_IGN:  # nohup, or a job in the background: it shall run on
                before[each] = signal.signal(each, take)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
