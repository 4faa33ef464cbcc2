"""Topic 01 - Workbench: the tools that every topic uses - seeds, devices, command line, figures, results, exercises.

python 01-prerequisites/workbench.py              # what this machine offers to the course
python 01-prerequisites/workbench.py doctor       # what is wrong with this installation, and how to mend it
python 01-prerequisites/workbench.py links        # rewrite the line ranges of links into code, in every chapter
python 01-prerequisites/workbench.py --help
"""

import interrupts

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["doctor"]:  # asked where the imports below may fail
    import environment_doctor

    sys.exit(environment_doctor.ask_doctor())

# ruff: noqa: E402

import argparse
import ast
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import importlib.util
import inspect
import io
import json
import math
import operator
import os
import platform
import random
import re
import select
import subprocess
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

import environment_doctor

ROOT = Path(__file__).resolve().parents[1]
FIGURE_STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(  # Okabe and Ito's colours, told apart by every kind of colour vision
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600"]
    ),
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "transformers",  # identifiers that depend on the content alone
}
plt.rcParams.update(FIGURE_STYLE)


# Seeds and devices


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and PyTorch; return a CPU generator for code that wants a stream of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """Resolve "auto" to cuda, then mps, then cpu. Raises ValueError for an unknown device or one not present."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    kind, _, index = name.partition(":")
    if kind not in present or (index and not index.isdigit()):
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps")
    if not present[kind] or (kind == "cuda" and index and int(index) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available on this machine; use --device cpu")
    return torch.device(name)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has: a seed, a device, a folder for what it writes, and the number of CPU threads."""

    seed: int = 0  # seed of every random generator
    device: str = "auto"  # auto, cpu, cuda or mps
    out: Path = ROOT / "runs"  # folder for everything this run writes
    threads: int = 1  # CPU threads; one gives the same numbers everywhere and suffices for small models

    def __post_init__(self) -> None:
        check_range(self, "seed", least=0, below=2**31)  # PyTorch's CPU generator reads 32 bits of a seed
        check_range(self, "threads", least=1, most=4 * os.cpu_count())
        pick_device(self.device)
        check_folder(self.out)


# The command line, made from config dataclasses


def check_range(
    config: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless every named field of `config` is a finite number within the given limits.

    Raises TypeError for what is no number.
    """
    tests = [
        (">=", operator.ge, least),
        (">", operator.gt, above),
        ("<=", operator.le, most),
        ("<", operator.lt, below),
    ]
    tests = [(sign, holds, limit) for sign, holds, limit in tests if limit is not None]
    wanted = " and ".join(f"{sign} {limit:g}" for sign, _, limit in tests)
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and abs(value) > sys.maxsize:
            raise ValueError(f"{name} must be within {sys.maxsize:,}, got a number of {len(str(abs(value)))} digits")
        try:
            finite = math.isfinite(value)
        except TypeError:
            raise TypeError(f"{name} must be a number {wanted}, got {value!r}") from None
        if not finite or not all(holds(value, limit) for _, holds, limit in tests):
            raise ValueError(f"{name} must be finite and {wanted}, got {value}")


def check_name(kind: str, name: str, known: Collection[str]) -> str:
    """Return `name` if it is one of the `known` names of this kind; else raise ValueError with the closest one."""
    if name not in known:
        closest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        advice = f"did you mean {closest[0]!r}? " if closest else ""
        raise ValueError(f"unknown {kind} {name!r}; {advice}choose from {', '.join(known)}")
    return name


def check_folder(folder: Path, name: str = "out") -> None:
    """Raise ValueError unless `folder` is, or could become, a folder that this user can write to; creates nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}={folder} cannot be a folder: {existing} is a file; choose another --{name}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder} cannot be written: no permission in {existing}; choose another --{name}")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        for bar in list(tqdm._instances):  # those that the error left open: the message gets a line of its own
            bar.close()
        text = " ".join(str(message).split())
        text = text if len(text) <= 1000 else f"{text[:400]} [...] {text[-400:]}"  # a value may be a whole text
        self.exit(2, f"{self.prog}: error: {text} (--help lists the options)\n")


def add_config_flags(parser: argparse.ArgumentParser, config_cls: type) -> None:
    """Add one flag per dataclass field; name, type, default and help all come from the field's own line.

    A field of type `tuple[str, ...]` becomes the positional arguments.
    """
    kinds, notes = get_type_hints(config_cls), field_notes(config_cls)
    for field in dataclasses.fields(config_cls):
        kind, note = kinds[field.name], notes[field.name].replace("%", "%%")
        if get_origin(kind) is tuple:
            parser.add_argument(field.name, nargs="*", type=get_args(kind)[0], help=note)
            continue
        if isinstance(kind, types.UnionType):  # `int | None`: the flag sets the int
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        if kind is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        flag = "--" + field.name.rstrip("_").replace("_", "-")  # a field `break_` becomes --break
        help_text = f"{note} (default: %(default)s)"
        parser.add_argument(flag, dest=field.name, default=field.default, help=help_text, **how)


@functools.cache
def field_notes(config_cls: type) -> dict[str, str]:
    """The trailing comment of each field of a config dataclass."""
    sources = [inspect.getsource(cls) for cls in reversed(config_cls.__mro__) if dataclasses.is_dataclass(cls)]
    return dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", "\n".join(sources), re.MULTILINE))


def alone(verb: Callable) -> Callable:
    """Mark a verb that writes several files: `run_verbs` holds --out for it, so that two runs never mix theirs.

    The processes that torchrun starts are one run: the first of them holds the folder.
    """
    verb.alone = True
    return verb


def run_verbs(description: str, verbs: dict[str, tuple], argv: list[str] | None = None) -> None:
    """Parse `[verb] [--flag value ...]` and call verbs[verb] = (function, *config classes); no verb means demo.

    A mistake in the input (ValueError, OSError, a size beyond memory) becomes one line on stderr and exit code 2;
    Ctrl-C becomes exit code 130, SIGTERM 143, a closed terminal 129, a reader of the output that has left (`| head`)
    141. None prints a traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?", and the run goes on
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["demo", *argv]
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb, (function, *config_classes) in verbs.items():
        summary = inspect.getdoc(function).splitlines()[0]
        command = commands.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        for config_cls in config_classes:
            add_config_flags(command, config_cls)
        if RunConfig in config_classes:
            command.set_defaults(out=ROOT / "runs" / Path(inspect.getfile(function)).stem)
    args = parser.parse_args(argv)
    function, *config_classes = verbs[args.verb]
    try:
        configs = [config_from_args(config_cls, args) for config_cls in config_classes]
        with contextlib.ExitStack() as held:
            held.enter_context(interrupts.terminable())
            for config in configs:
                if isinstance(config, RunConfig):
                    torch.set_num_threads(config.threads)
                    if getattr(function, "alone", False) and os.environ.get("RANK", "0") == "0":
                        held.enter_context(locked(config.out, ".verb.lock"))  # what it calls may hold .lock
            function(*configs)
        if sys.stdout:
            sys.stdout.flush()  # here, where a full disk still gets its line
    except KeyboardInterrupt as ended:
        interrupts.end_at_once_from_here()
        parser.exit(getattr(ended, "code", interrupts.EXIT_CODE), interrupts.FAREWELL + "\n")
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():
            sys.exit(141)
        commands.choices[args.verb].error(advice_on(error))
    except Exception as error:
        if not is_too_large(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        commands.choices[args.verb].error(f"a size is too large for this machine; choose a smaller one ({reason})")


def reader_has_left() -> bool:
    """Whether nobody reads our output any more; what is still to be written then goes nowhere, without complaint."""
    if not sys.stdout or not hasattr(select, "poll"):
        return False
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    if left := any(event & select.POLLERR for _, event in watched.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def advice_on(error: ValueError | OSError) -> str:
    """What happened, and, where only the system speaks, what helps."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}); free some space or choose a folder on another disk, as with --out"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another folder, as with --out, or make it yours (chown)"
    return str(error)


def is_too_large(error: Exception) -> bool:
    """Whether the error says that a number or a tensor does not fit; PyTorch has no type of its own for it."""
    words = "allocate memory|out of memory|calculation overflowed|Overflow when unpacking"
    return isinstance(error, (MemoryError, OverflowError)) or bool(re.search(words, str(error)))


def config_from_args(config_cls: type, args: argparse.Namespace) -> Any:
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(config_cls)}
    return config_cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def announce(plan: str, seconds: float) -> None:
    """Say what will be done and about how long it takes on 2 CPU cores, before it starts."""
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    print(f"{plan} (about {duration} on 2 CPU cores)", flush=True)


def progress(iterable: Iterable, description: str, total: int | None = None) -> tqdm:
    """A plain tqdm bar on stderr: a line every ten seconds in a log file, silent in a notebook."""
    pace = 0.1 if sys.stderr.isatty() else 10.0
    quiet = "ipykernel" in sys.modules
    return tqdm(iterable, desc=description, total=total, mininterval=pace, disable=quiet, dynamic_ncols=True)


def run_command(command: list[str], timeout: float | None = None, **settings: Any) -> subprocess.CompletedProcess:
    """subprocess.run, but a process that must not go on is asked to end before it is killed: it may have its own."""
    with subprocess.Popen(command, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            for ask, patience in ((lambda: None, 0.5), (process.terminate, 10), (process.kill, None)):
                ask()  # nothing at first: Ctrl-C in a terminal reaches both
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
                    break
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


# Files: whole or not at all


def read_utf8(path: Path) -> str:
    """The text of a user's file. Raises ValueError with its name and the place where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8 text") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError with the file's name if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is not JSON: {error}; write it again, or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} must hold a JSON object, got {type(value).__name__}; write it again")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that a reader finds the old file or the new one, never half, even after a crash or full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # POSIX: the rename itself reaches the disk when the folder does
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold `folder` for one run; raise ValueError at once if another run holds it. The lock dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{shown(folder)} is in use by another run; choose another --out") from None
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend only on the data, so that git shows a diff only if the result changed."""
    image = io.BytesIO()
    with plt.rc_context(FIGURE_STYLE):
        figure.savefig(image, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    write_atomically(path, re.sub(rb"[ \t]+\n", b"\n", image.getvalue()))
    print(f"wrote {shown(path)}")


def shown(path: Path) -> str:
    """The path as a reader would type it from here."""
    return os.path.relpath(path) if Path.cwd() in path.absolute().parents else str(path)


# Results: measured once, shown everywhere


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a result table: its heading, its unit and how its numbers are printed."""

    name: str
    unit: str = ""
    digits: str = ".3g"  # a format specification: ".1%" for a fraction, ".4f" for nats


def save_results(
    path: Path,
    name: str,
    columns: list[Column],
    rows: list[list],
    seeds: Iterable[int],
    command: str,
    hardware: str = "",
) -> None:
    """Record a table of measurements under `name` in a results.json.

    A cell is a string, a number, or a list of numbers, one for each seed (shown as mean ± standard deviation).
    hardware: where they were made, if not here.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"table {name!r}: every row needs {len(columns)} cells, got {[len(row) for row in rows]}")
    results = read_object(path) if path.exists() else {}
    results[name] = {
        "columns": [dataclasses.asdict(column) for column in columns],
        "rows": rows,
        "seeds": list(seeds),
        "hardware": hardware or describe_machine(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
    text = json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def render_table(result: dict) -> str:
    """Render one entry of results.json as a Markdown table with a line that says where it comes from."""
    columns = [Column(**column) for column in result["columns"]]
    heads = [f"{column.name} ({column.unit})" if column.unit else column.name for column in columns]
    sides = [
        ":--" if index == 0 or words([row[index] for row in result["rows"]]) else "--:" for index in range(len(heads))
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(sides) + "|"]
    for row in result["rows"]:
        cells = (render_cell(cell, column.digits) for cell, column in zip(row, columns, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    seeds = result["seeds"]
    spread = any(isinstance(cell, list) and len(cell) > 1 for row in result["rows"] for cell in row)
    noun = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    noun += ", mean ± standard deviation" if spread else ""
    lines += ["", f"*{noun} · {result['hardware']} · {result['date']} · `{result['command']}`*"]
    return "\n".join(lines)


def words(cells: list[str | float | list[float]]) -> bool:
    """Whether a column is read, not compared: half of its cells begin with a letter or code, or hold two words."""
    read = re.compile(r"`|[^\W\d_]|.*[^\W\d_]{2}.* .*[^\W\d_]{2}")
    return 2 * sum(isinstance(cell, str) and bool(read.match(cell)) for cell in cells) >= max(1, len(cells))


def render_cell(cell: str | float | list[float], digits: str) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list):
        spread = f" ± {format(float(np.std(cell, ddof=1)), digits.lstrip('+'))}" if len(cell) > 1 else ""
        return format(float(np.mean(cell)), digits) + spread
    return format(cell, digits)


BLOCK = re.compile(r"(<!-- results:begin ([\w-]+) -->\n)(.*?)(<!-- results:end -->)", re.DOTALL)


def fill_blocks(text: str, tables: dict[str, str]) -> str:
    """Replace what stands between the markers of each block that has a table; leave the other blocks alone."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[4]}" if m[2] in tables else m[0], text)


def fill_chapter(folder: Path) -> None:
    """Fill the result tables of the chapter in `folder` from its figures/results.json; no chapter, nothing to do."""
    chapter, results = folder / "README.md", folder / "figures" / "results.json"
    if not chapter.exists():
        return
    tables = {name: render_table(result) for name, result in json.loads(results.read_text(encoding="utf-8")).items()}
    write_atomically(chapter, fill_blocks(chapter.read_text(encoding="utf-8"), tables).encode())


def run_experiments(
    experiments: dict[str, tuple[Callable, float]], only: Iterable[str], folder: Path, *args: Any
) -> None:
    """Run a chapter's experiments, or only those named, then fill the chapter's tables from the results in `folder`.

    `experiments` maps a name to its function, called with `args`, and the seconds it takes on 2 CPU cores.
    """
    names = tuple(only) or tuple(experiments)
    announce(f"run {', '.join(names)}", sum(experiments[name][1] for name in names))
    for name in names:
        before = time.perf_counter()
        seed_everything(0)
        experiments[name][0](*args)
        print(f"{name}: {time.perf_counter() - before:.0f} s", flush=True)
    fill_chapter(folder.parent)


def part_of(config: Any, part: type) -> Any:
    """The settings of one of the configs that a config is made from; it checks itself."""
    return part(**{field.name: getattr(config, field.name) for field in dataclasses.fields(part)})


def with_parts(parts: dict[type, dict[str, tuple[Callable, float]]]) -> dict[str, tuple[Callable, float]]:
    """Experiments of several parts in one dict; each is called with the config of its own part. Names must differ."""

    def own(part: type, function: Callable) -> Callable:
        return lambda config, run: function(part_of(config, part), run)

    names = [name for experiments in parts.values() for name in experiments]
    if len(set(names)) < len(names):
        raise ValueError(f"two experiments have one name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    return {
        name: (own(part, function), seconds)
        for part, experiments in parts.items()
        for name, (function, seconds) in experiments.items()
    }


# Chapters: links into code keep their line ranges


CODE_LINK = re.compile(r"\[`([\w.]+)(\(\))?`\]\(([^)#\s]+\.py)(#L\d+(?:-L\d+)?)?\)")


@functools.cache  # a chapter links many times into one file
def line_ranges(source: str) -> dict[str, tuple[int, int]]:
    """Map every class, function, method (`Class.method`) and module constant of `source` to its first and last line."""
    ranges = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                ranges[prefix + node.name] = (first, node.end_lineno)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, node.name + ".")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        ranges[prefix + target.id] = (node.lineno, node.end_lineno)

    visit(ast.parse(source).body, "")
    return ranges


def relink(chapter: Path) -> str:
    """Return the chapter with the line range of every [`name`](file.py#L1-L2) link brought up to date."""

    def renewed(match: re.Match) -> str:
        name, call, target, _ = match.groups()
        ranges = line_ranges((chapter.parent / target).read_text(encoding="utf-8"))
        if name == Path(target).name:
            return match[0]
        if name not in ranges:
            raise ValueError(f"{chapter.name} links to `{name}`, which {target} does not define")
        first, last = ranges[name]
        return f"[`{name}{call or ''}`]({target}#L{first}" + (f"-L{last})" if last > first else ")")

    return CODE_LINK.sub(renewed, chapter.read_text(encoding="utf-8"))


def chapter_folders() -> list[Path]:
    return sorted(path.parent for path in ROOT.glob("[0-9][0-9]-*/README.md"))


# Comparing: what a proof measures, and what a learner reads


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) for every tensor, array, number or string inside nested lists, tuples and dicts."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{path}[{key!r}]")
    elif isinstance(value, list | tuple) and not all(isinstance(item, int | float | bool) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        yield path, (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    else:
        yield path, np.asarray(value)


def largest_difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference between two nested structures of numbers; infinite where shape or NaN differ."""
    pairs, wanted = list(leaves(actual)), list(leaves(expected))
    if [path for path, _ in pairs] != [path for path, _ in wanted]:
        return math.inf
    worst = 0.0
    for (_, got), (_, want) in zip(pairs, wanted, strict=True):
        if got.shape != want.shape:
            return math.inf
        if got.dtype.kind in "USO" or want.dtype.kind in "USO":
            worst = max(worst, 0.0 if np.array_equal(got, want) else math.inf)
        elif got.size:
            wide = complex if "c" in (got.dtype.kind, want.dtype.kind) else float
            got, want = got.astype(wide), want.astype(wide)
            with np.errstate(invalid="ignore"):  # inf - inf, which the condition sorts out
                gap = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, np.abs(got - want))
            worst = max(worst, math.inf if np.isnan(gap).any() else float(gap.max()))
    return worst


def first_difference(actual: Any, expected: Any, tolerance: float = 1e-6) -> str | None:
    """Say in words where `actual` first differs from `expected`, or None if it does not."""
    pairs, wanted = dict(leaves(actual)), dict(leaves(expected))
    for path, want in wanted.items():
        where = f" at {path}" if path else ""
        if path not in pairs:
            return f"nothing{where}, expected {want.tolist()!r}"
        got = pairs[path]
        if got.dtype == object and got.shape == ():
            return f"expected a value like {want.tolist()!r}{where}, got {got.item()!r}"
        if got.shape != want.shape:
            return f"shape {got.shape}{where}, expected {want.shape}"
        for index in np.ndindex(want.shape):
            if largest_difference(got[index], want[index]) > tolerance:
                spot = f" at position {list(index)}" if index else ""
                return f"{got[index].item()!r}{where}{spot}, expected {want[index].item()!r}"
    extra = [path for path in pairs if path not in wanted]
    return f"an unexpected entry at {extra[0]}" if extra else None


# Exercises: a statement, a checker, a solution, and planted mistakes that the checker must reject


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One auto-checked exercise.

    `check(answer)` returns None if the answer is right, else one sentence that names the first differing case.
    `mistakes` maps the name of each plausible wrong idea to a wrong solution: the tests run them all.
    """

    name: str  # the function that the learner writes
    statement: str
    signature: str
    hint: str
    check: Callable[[Callable], str | None]
    solution: Callable
    mistakes: dict[str, Callable]

    def verdict(self, answer: Callable | None) -> str:
        """Judge an answer: "correct", or advice that starts with "not yet". Never raises: a notebook runs on."""
        if answer is None:
            return f"not yet: define {self.signature}"
        try:
            advice = self.check(answer)
        except (Exception, SystemExit) as error:  # a learner's function may fail in any way; the way is the advice
            advice = f"it raised {told(error)}"
        return "correct" if advice is None else f"not yet: {advice}"


def told(error: BaseException) -> str:
    """An exception in words, even one whose own words fail."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def grade(exercises: list[Exercise], argv: list[str] | None = None) -> None:
    """The command line of an exercises file: no argument lists the exercises, a Python file of answers is graded."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(description="Check your answers: one Python file that defines the functions named below.")
    parser.add_argument("answers", nargs="?", type=Path, help="your file of answers; left out: print the exercises")
    path = parser.parse_args(argv).answers
    if path is None:
        for exercise in exercises:
            print(f"{exercise.signature}\n    {exercise.statement}\n    Hint: {exercise.hint}\n")
        return
    if not path.is_file() or path.suffix != ".py":
        parser.error(f"{'not a Python file (.py)' if path.is_file() else 'no such file'}: {path}")
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        parser.error(f"{path} does not run: {told(error)}")
    verdicts = {exercise.name: exercise.verdict(getattr(module, exercise.name, None)) for exercise in exercises}
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    right = sum(verdict == "correct" for verdict in verdicts.values())
    print(f"{right} of {len(verdicts)} correct")
    if right < len(verdicts):
        sys.exit(1)


# Hardware: published figures, and this machine


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A processor as its maker describes it. Dense matrix rates, no sparsity; memory in bytes; rates per second."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes/s between memory and processor
    flops: float  # bf16 (T4: fp16) matrix FLOP/s with fp32 accumulation
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a kernel is bound by arithmetic, below which by memory."""
        return self.flops / self.bandwidth


# Read in the makers' data sheets, November 2026.
HARDWARE = [
    Hardware("T4", 16e9, 0.320e12, 65e12, "NVIDIA T4 data sheet"),
    Hardware("L4", 24e9, 0.300e12, 121e12, "NVIDIA L4 data sheet, half of the rate with sparsity"),
    Hardware("RTX 4090", 24e9, 1.008e12, 165.2e12, "NVIDIA Ada architecture white paper, appendix A"),
    Hardware("A100 80GB SXM", 80e9, 2.039e12, 312e12, "NVIDIA A100 data sheet"),
    Hardware("H100 SXM", 80e9, 3.35e12, 989.4e12, "NVIDIA H100 architecture white paper, table 2"),
    Hardware("H200 SXM", 141e9, 4.8e12, 989.4e12, "NVIDIA H200 data sheet"),
    Hardware("MI300X", 192e9, 5.3e12, 1307.4e12, "AMD Instinct MI300X data sheet"),
]


def describe_machine() -> str:
    """One line that says where a number was measured."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = " ".join(names[0].split()) if names else cpu
    n_threads = torch.get_num_threads()
    threads = f"{n_threads} thread{'s' if n_threads > 1 else ''}"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {threads}{gpu}, torch {torch.__version__.partition('+')[0]}"


def time_in_turns(works: dict[str, Callable[[], object]], n_rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every piece of work in every round, in turns, so that a busy moment hits all alike; one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(n_rounds + 1):
        for name, work in works.items():
            before = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def speed_ratio(ours: list[float], theirs: list[float]) -> str:
    """How fast ours is beside theirs: median and range over the rounds of their seconds / our seconds."""
    ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
    middle, least, most = (shown_ratio(value) for value in (float(np.median(ratios)), ratios[0], ratios[-1]))
    return f"{middle}x the speed ({least} to {most} in {len(ratios)} rounds)"


def shown_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"  # what is far slower is not shown as 0.00


def speed_line(what: str, rival: str, ours: list[float], theirs: list[float]) -> str:
    """One comparison as every `bench` prints it and `workbench.py bench` reads it: both in seconds of each round."""
    return f"{what} beside {rival}: {speed_ratio(ours, theirs)}"


# The verbs


def demo() -> None:
    """Show what this machine offers to the course."""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(describe_machine())
    print(f"device that 'auto' picks: {pick_device()}")
    print(f"course folder: {ROOT}")


def doctor() -> None:
    """Say what is wrong with this installation, and how to mend it."""
    sys.exit(environment_doctor.ask_doctor())


def hardware() -> None:
    """Print the published figures of the processors that the later topics plan with."""
    print(f"{'processor':15} {'memory':>8} {'bandwidth':>11} {'matrix rate':>13} {'ridge':>12}  source")
    for item in HARDWARE:
        rates = f"{item.bandwidth / 1e9:6.0f} GB/s {item.flops / 1e12:6.0f} TFLOP/s {item.ridge:5.0f} FLOP/B"
        print(f"{item.name:15} {item.memory / 1e9:5.0f} GB {rates}  {item.source}")


def links() -> None:
    """Rewrite the line ranges of the links into code in every chapter."""
    for chapter in [ROOT / "README.md", *(folder / "README.md" for folder in chapter_folders())]:
        renewed = relink(chapter)
        if renewed != chapter.read_text(encoding="utf-8"):
            write_atomically(chapter, renewed.encode())
            print(f"rewrote {shown(chapter)}")


def tables() -> None:
    """Fill the result tables of every chapter from its results.json."""
    for results in sorted(ROOT.glob("[0-9][0-9]-*/figures/results.json")):
        fill_chapter(results.parents[1])
        print(f"filled {shown(results.parents[1] / 'README.md')}")


@dataclasses.dataclass(frozen=True)
class NotebookConfig:
    paths: tuple[str, ...] = ()  # the notebooks; none means all of the course
    check: bool = False  # only execute; leave the files as they are


def notebooks(config: NotebookConfig) -> None:
    """Execute notebooks from top to bottom, each in its own folder, and keep the new outputs."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    paths = [Path(path) for path in config.paths] or sorted(ROOT.glob("[0-9][0-9]-*/*.ipynb"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"no such notebook: {', '.join(missing)}")
    for path in progress(paths, "notebooks"):
        notebook = nbformat.read(path, as_version=4)
        try:
            settings = {"timeout": 300, "coalesce_streams": True, "resources": {"metadata": {"path": path.parent}}}
            NotebookClient(notebook, **settings).execute()
        except CellExecutionError as error:
            sys.exit(f"{shown(path)} failed:\n{error}")
        if not config.check:
            for cell in notebook.cells:  # timings would change with every run
                cell.metadata.pop("execution", None)
            write_atomically(path, (without_own_folders(nbformat.writes(notebook)) + "\n").encode())
        print(f"executed {shown(path)}")


def without_own_folders(text: str) -> str:
    """The text of a notebook whose tracebacks name files from the repository or from site-packages on."""
    return re.sub(r"/[\w./~-]*site-packages/", "site-packages/", text.replace(f"{ROOT}/", ""))


def chosen_topics(topics: str) -> list[Path]:
    """The folders of the topics in `topics`, numbers with commas between; "" means all.

    Raises ValueError for a number that no topic has.
    """
    folders = {int(folder.name[:2]): folder for folder in sorted(ROOT.glob("[0-9][0-9]-*")) if folder.is_dir()}
    words = [word.strip() for word in topics.split(",") if word.strip()]
    wrong = [word for word in words if not word.isdecimal() or int(word) not in folders]
    if wrong:
        raise ValueError(f"topics={topics!r}: there is no topic {wrong[0]!r}; give numbers from 1 to 15")
    return [folders[number] for number in sorted({int(word) for word in words} or folders)]


def topic_script(folder: Path) -> Path:
    """The topic's own module: 03-attention-mechanisms/attention_mechanisms.py."""
    return folder / f"{folder.name[3:].replace('-', '_')}.py"


@dataclasses.dataclass(frozen=True)
class EveryConfig:
    verbs: tuple[str, ...] = ()  # the verb, such as figures or demo
    topics: str = ""  # numbers of topics with commas between, such as 3,7; none means all

    def __post_init__(self) -> None:
        if len(self.verbs) != 1:
            raise ValueError(f"every needs exactly one verb, such as figures or demo; got {list(self.verbs)}")
        chosen_topics(self.topics)


def every(config: EveryConfig) -> None:
    """Run one verb of every topic that has it, one after the other; a topic that fails does not end the rest."""
    verb, failed = config.verbs[0], []
    scripts = [topic_script(folder) for folder in chosen_topics(config.topics)]
    having = [path for path in scripts if f'"{verb}": (' in path.read_text(encoding="utf-8")]
    if not having:
        raise ValueError(f"no topic has the verb {verb!r}; choose one such as figures or demo")
    for script in having:
        print(f"\n{script.name} {verb}", flush=True)
        before = time.perf_counter()
        code = run_command([sys.executable, str(script), verb]).returncode
        print(f"{script.name} {verb}: {time.perf_counter() - before:.0f} s", flush=True)
        failed += [script.parent.name] if code else []
    if failed:
        sys.exit(f"{verb} failed: {', '.join(failed)}; once mended: every {verb} --topics N,N")


def main(argv: list[str] | None = None) -> None:
    from course_bench import BenchConfig, bench  # here, because they import this module
    from course_pages import contents, parity

    verbs = {
        "demo": (demo,),
        "doctor": (doctor,),
        "hardware": (hardware,),
        "links": (links,),
        "contents": (contents,),
        "tables": (tables,),
        "notebooks": (notebooks, NotebookConfig),
        "every": (every, EveryConfig),
        "bench": (bench, BenchConfig, RunConfig),
        "parity": (parity,),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
