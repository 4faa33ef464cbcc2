"""Proofs of the doctor: each way in which an installation breaks is seen, with its remedy, even without any package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import environment_doctor as doctor
from environment_doctor import CHECKS, Finding
from workbench import ROOT


def found(check: Callable) -> list[Finding]:
    return list(check())


def grades(check: Callable) -> str:
    return " ".join(finding.grade for finding in found(check))


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """What the doctor says of this installation; it starts three other processes, so it is asked once."""
    return doctor.examine()


def test_this_installation_is_sound(findings) -> None:
    assert not [finding for finding in findings if finding.grade == "BAD"]


def test_it_answers_without_any_package(tmp_path: Path) -> None:
    """-S leaves out site-packages: numpy, torch and this clone's path are all missing."""
    command = [sys.executable, "-S", str(ROOT / "01-prerequisites" / "workbench.py"), "doctor"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stderr
    assert "not installed: torch, numpy" in done.stdout and "-> pip install -r requirements.txt" in done.stdout


def test_a_missing_and_another_version_are_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "pins", lambda: {"numpy": "1.0.0", "no-such-package": "1.0"})
    missing, other = found(doctor.packages)
    assert (missing.grade, missing.what) == ("BAD", "not installed: no-such-package")
    assert other.grade == "note" and other.what.startswith("other versions: numpy") and "tested: 1.0.0" in other.what


def test_pins_are_those_of_the_list() -> None:
    assert doctor.pins()["torch"] == "2.13.0" and len(doctor.pins()) > 30


def test_two_clones_in_one_environment(monkeypatch, tmp_path: Path) -> None:
    """Seen from a second clone, the modules of this environment are another folder's."""
    for folder in ("01-prerequisites", "03-attention-mechanisms"):
        (tmp_path / folder).mkdir()
        name = f"{folder[3:].replace('-', '_')}.py"
        shutil.copy(ROOT / folder / name, tmp_path / folder / name)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (finding,) = found(doctor.import_path)
    assert finding.grade == "BAD" and str(ROOT) in finding.what and "one environment for each clone" in finding.remedy


def test_a_module_that_is_on_no_path(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "course_modules", lambda: {"no_such_topic": ROOT})
    assert found(doctor.import_path)[0].what == "not on the import path: no_such_topic (1 modules)"
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "unset PYTHONPATH" in found(doctor.import_path)[-1].remedy


@pytest.mark.parametrize(
    ("cores", "asked", "grade"), [(2.0, "2", "ok"), (2.0, "8", "note"), (0.5, "1", "ok"), (1.0, "many", "BAD")]
)
def test_more_threads_than_cores(monkeypatch, cores: float, asked: str, grade: str) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert grades(doctor.threads) == grade
    if grade == "note":
        assert found(doctor.threads)[0].remedy == "export OMP_NUM_THREADS=2"


def test_a_full_disk_and_a_small_shared_memory(monkeypatch) -> None:
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6, total=10**6))
    seen = [finding for finding in found(doctor.memory) if "disk" in finding.what or "shm" in finding.what]
    assert seen[0].grade == "BAD" and all("1g" in finding.remedy for finding in seen[1:])


def test_a_folder_that_cannot_be_written(monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert found(doctor.writing)[0].grade == "BAD"


def test_a_model_that_is_not_its_cards(monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / doctor.MODELS[0]
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "report.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    other, missing = found(doctor.course_models)
    assert other.what.endswith("has other weights than its card says") and missing.what.endswith("is not complete")
    assert other.remedy == f"git checkout -- {doctor.MODELS[0]}"


def test_a_check_that_falls_ill_is_a_finding(monkeypatch) -> None:
    def ill():
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (ill, doctor.loopback))
    assert [finding.what for finding in doctor.examine()][0] == "ill could not be checked: OSError: no such thing"


def test_an_old_python(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST", (9, 0))
    assert found(doctor.python_version)[0].grade == "BAD"


def test_every_bad_finding_has_a_remedy(findings) -> None:
    source = Path(doctor.__file__).read_text(encoding="utf-8")
    assert len(CHECKS) == 12 and 'Finding("BAD", ' in source
    for finding in findings:
        assert finding.grade == "ok" or finding.remedy, finding.what


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_completes_an_environment_whose_making_was_interrupted(tmp_path: Path) -> None:
    """After Ctrl-C in `python -m venv` there is a python and no pip: every later `make` failed for want of it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> asked\n')
    python.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(python, tmp_path / ".venv/bin/python")
    command = ["make", f"PYTHON={python}", "VENV=.venv", "run"]
    for expected in (True, False):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert ("-m venv .venv" in (tmp_path / "asked").read_text()) == expected
        for path in (tmp_path / "asked", tmp_path / ".venv/installed"):
            path.unlink()
        shutil.copy(python, tmp_path / ".venv/bin/pip")
