"""Topic 01 - Environment doctor: what is wrong with an installation of this course, and how to mend it.

python 01-prerequisites/workbench.py doctor

Standard library only, since it is asked where nothing else can be imported. Each check looks at one thing that has
broken an installation, and says in one line what it found and what to type.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)  # Python
INSTALL = "pip install -r requirements.txt, from the repository's root"
MODELS = ("10-pretraining-llms/model", "11-fine-tuning-adaptation/model")


@dataclass(frozen=True)
class Finding:
    """What one check saw. grade: "ok", "note" (works, but know this) or "BAD" (something of the course will fail)."""

    grade: str
    what: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.grade:5}{self.what}" + (f"\n     -> {self.remedy}" if self.remedy else "")


def python_version() -> Iterator[Finding]:
    """Whether this Python is new enough, and built with what the course's texts need."""
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST:
        yield Finding(
            "BAD", f"Python {version}", "make an environment with Python 3.11 or newer: python3.12 -m venv .venv"
        )
    else:
        yield Finding("ok", f"Python {version} ({sys.executable})")
    for name in ("bz2", "lzma", "ssl", "sqlite3"):
        if importlib.util.find_spec(f"_{name}") is None:
            yield Finding(
                "BAD", f"this Python was built without {name}", f"install the library of {name} and build again"
            )


def environment() -> Iterator[Finding]:
    """Whether packages go into an environment of their own."""
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        yield Finding(
            "note",
            "no virtual environment: the course's pinned versions may break other programs, and they the course",
            "python3 -m venv .venv && source .venv/bin/activate",
        )
    else:
        yield Finding("ok", f"environment {sys.prefix}")


def pins() -> dict[str, str]:
    """Package -> version, as requirements.txt pins them."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line.partition("#")[0].strip()) for line in lines]
    return {match[1]: match[2] for match in found if match}


def packages() -> Iterator[Finding]:
    """Whether every package is there, in the version that the tests ran with."""
    missing, other = [], []
    for name, wanted in pins().items():
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != wanted:
            other.append(f"{name} {found} (tested: {wanted})")
    if missing:
        yield Finding("BAD", f"not installed: {', '.join(missing)}", INSTALL)
    if other:
        yield Finding("note", f"other versions: {', '.join(other)}", f"if something fails: {INSTALL}")
    if not missing and not other:
        yield Finding("ok", f"all {len(pins())} pinned packages")


def course_modules() -> dict[str, Path]:
    """One module of each topic: its name and its file."""
    folders = sorted(ROOT.glob("[0-9][0-9]-*"))
    scripts = {folder.name[3:].replace("-", "_"): folder for folder in folders}
    return {name: folder / f"{name}.py" for name, folder in scripts.items() if (folder / f"{name}.py").exists()}


def import_path() -> Iterator[Finding]:
    """Whether `import attention_mechanisms` finds this clone, asked from a folder where nothing helps it."""
    names = [*course_modules(), "workbench"]
    script = (
        "import importlib.util, json, sys\n"
        f"found = {{name: importlib.util.find_spec(name) for name in {names!r}}}\n"
        "print(json.dumps({name: spec and spec.origin for name, spec in found.items()}))"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        asked = [sys.executable, "-c", script]
        done = subprocess.run(asked, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        yield Finding("BAD", f"asking for the modules failed: {done.stderr.strip().splitlines()[-1]}", INSTALL)
        return
    origins = {name: origin and Path(origin).resolve() for name, origin in json.loads(done.stdout).items()}
    lost = [name for name, origin in origins.items() if origin is None]
    others = {str(origin.parents[1]) for origin in origins.values() if origin and ROOT not in origin.parents}
    if lost:
        yield Finding("BAD", f"not on the import path: {', '.join(lost[:3])} ({len(lost)} modules)", "pip install -e .")
    if others:
        yield Finding(
            "BAD",
            f"modules come from another folder: {', '.join(sorted(others))}",
            "one environment for each clone: make another one here, or pip install -e . from this folder",
        )
    if not lost and not others:
        yield Finding("ok", f"modules of all {len(origins) - 1} topics come from {ROOT}")
    if os.environ.get("PYTHONPATH"):
        yield Finding(
            "note", f"PYTHONPATH={os.environ['PYTHONPATH']}", "unset PYTHONPATH, unless you know what it is for"
        )


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, period = quota.read_text().split()
        if most != "max":
            cores = min(cores, int(most) / int(period))
    return cores


def threads() -> Iterator[Finding]:
    """Whether numerical libraries would start more threads than there are cores."""
    cores, asked = usable_cores(), os.environ.get("OMP_NUM_THREADS", "")
    seen = f"{cores:g} of {os.cpu_count()} cores may be used"
    if asked and not asked.isdigit():
        yield Finding("BAD", f"OMP_NUM_THREADS={asked} is no number", "unset OMP_NUM_THREADS")
    elif (int(asked) if asked else os.cpu_count() or 1) > max(1, cores):
        yield Finding("note", f"{seen}, more threads would be started", f"export OMP_NUM_THREADS={max(1, int(cores))}")
    else:
        yield Finding("ok", seen)


def memory() -> Iterator[Finding]:
    """Whether there is room in memory, on the disk and between processes."""
    status = Path("/proc/meminfo")
    if status.is_file():
        free = int(re.search(r"MemAvailable:\s+(\d+)", status.read_text())[1]) * 1024
        grade, remedy = ("ok", "") if free > 3e9 else ("note", "close other programs; the tests need about 3 GB")
        yield Finding(grade, f"{free / 1e9:.1f} GB of memory are free", remedy)
    free = shutil.disk_usage(ROOT).free
    remedy = "" if free > 1e9 else "make room: runs/ takes what you train"
    yield Finding("ok" if free > 1e9 else "BAD", f"{free / 1e9:.1f} GB of disk are free", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < 64e6:
        remedy = "start the container with --shm-size=1g; data loaders and processes of topic 10 share memory there"
        yield Finding("note", f"/dev/shm has {size / 1e6:.0f} MB", remedy)


def writing() -> Iterator[Finding]:
    """Whether results can be written, and UTF-8 text read."""
    folder = ROOT / "runs"
    owner = folder if folder.exists() else ROOT
    if os.access(owner, os.W_OK):
        yield Finding("ok", f"{folder} can be written")
    else:
        yield Finding("BAD", f"{folder} cannot be written", "give every command --out FOLDER, or own the clone: chown")
    if sys.getfilesystemencoding().lower() != "utf-8":
        found = sys.getfilesystemencoding()
        yield Finding("note", f"file names are read as {found}", "export PYTHONUTF8=1")


def course_models() -> Iterator[Finding]:
    """Whether the committed models are what their cards say."""
    for place in MODELS:
        weights, report = ROOT / place / "model.safetensors", ROOT / place / "report.json"
        if not weights.is_file() or not report.is_file():
            yield Finding("BAD", f"{place} is not complete", "git checkout -- " + place)
            continue
        wanted = json.loads(report.read_text(encoding="utf-8"))["weights_sha256"]
        if sha256(weights.read_bytes()).hexdigest() == wanted:
            yield Finding("ok", f"{place} has the weights of its card")
        else:
            yield Finding("BAD", f"{place} has other weights than its card says", "git checkout -- " + place)


def accelerator() -> Iterator[Finding]:
    """Whether a GPU that is there can be used."""
    has_gpu = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if importlib.util.find_spec("torch") is None:
        return  # missing packages are a finding of their own
    script = "import torch; print(torch.version.cuda, torch.cuda.is_available(), torch.backends.mps.is_available())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("BAD", f"torch does not start: {last}", f"pip install --force-reinstall torch=={pins()['torch']}")
        return
    built_for, cuda, mps = done.stdout.split()
    if cuda == "True" or mps == "True":
        yield Finding("ok", f"a GPU that --device auto will use ({'cuda ' + built_for if cuda == 'True' else 'mps'})")
    elif has_gpu and built_for == "None":
        yield Finding(
            "note", "an NVIDIA GPU, and a torch for CPUs", f"pip install --force-reinstall torch=={pins()['torch']}"
        )
    elif has_gpu:
        yield Finding(
            "note", f"an NVIDIA GPU that torch (CUDA {built_for}) cannot use", "look at nvidia-smi: the driver"
        )
    else:
        yield Finding("ok", "no GPU: everything runs on the CPU")


def helpers() -> Iterator[Finding]:
    """What single parts of the course use if it is there."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        yield Finding(
            "note", "no C++ compiler: torch.compile (topic 12) is skipped", "apt install g++, or Xcode's tools"
        )
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")):
        yield Finding("note", "no Chromium: the chat page's browser test (topic 15) is skipped", "apt install chromium")
    if platform.system() != "Linux":
        yield Finding("note", "not Linux: the sandbox of topic 15 refuses to run programs", "use a virtual machine")


def loopback() -> Iterator[Finding]:
    """Whether a server can listen on this machine's own address."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            yield Finding("ok", "servers can listen on 127.0.0.1")
    except OSError as error:
        yield Finding("BAD", f"no server can listen on 127.0.0.1: {error}", "allow it in the firewall or the container")


def jupyter_kernel() -> Iterator[Finding]:
    """Whether notebooks run in this environment."""
    if importlib.util.find_spec("jupyter_client") is None:
        return  # missing packages are a finding of their own
    script = (
        "from jupyter_client.kernelspec import KernelSpecManager as M\nprint(M().get_kernel_spec('python3').argv[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    found = done.stdout.strip()
    if done.returncode or (os.path.isabs(found) and not os.path.samefile(found, sys.executable)):
        seen = found or "none"
        remedy = "python -m ipykernel install --sys-prefix --name python3"
        yield Finding("BAD", f"notebooks would start another Python: {seen}", remedy)
    else:
        yield Finding("ok", "notebooks run in this environment")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python_version,
    environment,
    packages,
    import_path,
    accelerator,
    threads,
    memory,
    writing,
    loopback,
    jupyter_kernel,
    course_models,
    helpers,
)


def examine() -> list[Finding]:
    """The findings of all checks; a check that fails itself is a finding too."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:  # a doctor must not fall ill
            found.append(Finding("note", f"{check.__name__} could not be checked: {type(error).__name__}: {error}"))
    return found


def ask_doctor() -> int:
    """Print the findings; returns 1 if something is bad, else 0."""
    found = examine()
    for finding in found:
        print(finding.line())
    bad = sum(finding.grade == "BAD" for finding in found)
    print(f"\n{bad} bad, {sum(finding.grade == 'note' for finding in found)} to know" if bad else "\nnothing is bad")
    return int(bad > 0)
