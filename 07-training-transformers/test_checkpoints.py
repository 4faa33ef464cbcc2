"""Topic 07: checkpoints, logs and signals, tried with kill -9, a full disk, flipped bytes and hostile files."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import (
    Checkpoints,
    CsvLog,
    DamagedCheckpoint,
    check_header,
    load_weights,
    read_checkpoint,
    render_manifest,
    rng_state,
    set_rng_state,
    stop_requests,
)
from packing import PackedTransformer, language_model_loss
from training_transformers import TrainConfig, fit, main
from transformer_architecture import ModelConfig
from workbench import leaves, locked, seed_everything

VOCAB, INTERVAL = 17, 3
TINY_MODEL = ModelConfig(d_model=8, n_layers=1, n_heads=2, d_ff=12, max_seq_len=32, dropout=0.1)
TINY = (
    "--d-model 8 --n-layers 1 --n-heads 2 --d-ff 12 --batch-size 2 --seq-len 16 --warmup-steps 1 --n-documents 4 "
    "--device cpu"
).split()


def some_parts(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    state = {"rng": rng_state(), "header": {"name": "a", "sizes": [1, 2], "rate": 0.1, "none": None}}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": state}


def random_batch(step: int) -> dict[str, torch.Tensor]:
    token_ids = torch.randint(4, VOCAB, (3, 10), generator=torch.Generator().manual_seed(step))
    return {"inputs": token_ids[:, :-1], "targets": token_ids[:, 1:]}


def train_tiny(out: Path, max_steps: int, batches: Callable = random_batch, **changes) -> None:
    config = TrainConfig(batch_size=3, max_steps=max_steps, warmup_steps=2, save_every=INTERVAL, log_every=1, **changes)
    seed_everything(3)
    fit(PackedTransformer(TINY_MODEL, VOCAB), batches, language_model_loss, config, out=out)


def in_child(work: Callable[[], object], said: str | Path = os.devnull) -> int:
    """Run `work` in a forked process that writes to the file `said`; its exit code is that of a script."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 - it ends with the process
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def wait_for(condition: Callable[[], bool], child: int, seconds: float = 60.0) -> None:
    """Return once the condition holds; fail if the child ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the child ended early"
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"still waiting after {seconds} s")
        time.sleep(0.0005)


def exit_code_of(child: int, seconds: float = 60.0) -> int:
    """The child's exit code, negative for the signal that ended it. Fails if it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"still running after {seconds} s")


def fingerprint(out: Path) -> str:
    """SHA-256 of the newest checkpoint (weights, optimizer, counters, random numbers) and of the log."""
    digest = hashlib.sha256((out / "log.csv").read_bytes())
    for path, array in leaves(Checkpoints(out).load()):
        if "['resume']" not in path:  # the one setting that differs
            digest.update(path.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# Written whole or not at all


def test_parts_come_back_as_they_were(tmp_path, parity) -> None:
    folder, parts = Checkpoints(tmp_path), some_parts()
    folder.save(7, parts)
    back = folder.load()
    assert back.pop("step") == 7 and back["run"]["header"] == parts["run"]["header"]
    parity("Checkpoints", "the state that was saved", "exchange", back, parts, 0.0)
    only = folder.load(("model",))
    assert set(only) == {"model", "step"}
    with pytest.raises(ValueError, match="has no part ema; it has model, optimizer, run"):
        folder.load(("ema",))


@pytest.mark.usefixtures("forks")
def test_kill_at_twenty_random_moments_loses_one_interval_at_most_and_changes_nothing(tmp_path, parity) -> None:
    """CK1 and CK2."""
    steps, rng, out = 20 * (3 * INTERVAL + 2), random.Random(0), tmp_path / "killed"
    log, folder, last = out / "log.csv", Checkpoints(out), 0
    train_tiny(tmp_path / "warm", 2)  # what PyTorch imports at the first step, the children need not import again

    def entries() -> set[str]:
        return {path.name for path in out.glob("*step-*")}

    for trial in range(20):
        before = entries()
        child = in_child(lambda resume=last > 0: train_tiny(out, steps, resume=resume))
        target = last + INTERVAL + rng.randint(1, INTERVAL + 1)  # behind the next save, by up to one interval and one
        if trial % 2:  # somewhere in a step
            wait_for(lambda target=target: log.exists() and log.read_bytes().count(b"\n") > target, child)
        else:  # somewhere in a save, under whatever name it writes
            wait_for(lambda before=before: entries() - before, child)
        time.sleep(rng.uniform(0.0, 0.008))
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
        visible = [path.name for path in out.iterdir() if not path.name.startswith(".")]
        assert sorted(visible) == sorted(["log.csv", *(folder.path(step).name for step in folder.steps())])
        for step in folder.steps():
            read_checkpoint(folder.path(step))  # every visible one is whole
        reached = log.read_bytes().count(b"\n") - 1
        last = folder.load()["step"] if folder.steps() else 0  # the first save may not have been finished
        assert last % INTERVAL == 0 and reached - INTERVAL <= last <= reached, (reached, last)
    assert exit_code_of(in_child(lambda: train_tiny(out, steps, resume=True))) == 0
    assert not list(out.glob(".step-*")), "half-written folders are swept away"
    assert exit_code_of(in_child(lambda: train_tiny(tmp_path / "whole", steps))) == 0
    parity(
        "20 kills and resume",
        "an uninterrupted run",
        "trajectory",
        fingerprint(out),
        fingerprint(tmp_path / "whole"),
        0,
    )


def test_a_full_disk_is_named_and_leaves_the_previous_checkpoint(tmp_path) -> None:
    """CK3, on files of at most 1 MB."""
    folder, said = Checkpoints(tmp_path), tmp_path / "said"
    folder.save(1, some_parts())

    def save_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        try:
            folder.save(2, {"model": {"weight": torch.randn(2**19)}})
        except OSError as error:
            print(error)
            raise SystemExit(2) from None

    assert exit_code_of(in_child(save_too_much, said)) == 2
    assert "cannot save step 2" in said.read_text() and "File too large" in said.read_text()
    assert folder.steps() == [1] and folder.load()["step"] == 1
    assert not list(tmp_path.glob(".step-*")), "what did not fit is removed at once"

    def log_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        log = CsvLog(tmp_path / "log.csv")
        try:
            for step in range(99):
                log.add({"step": step, "loss": 0.1})
        except OSError as error:
            raise SystemExit(
                3 if "cannot write" in str(error) and "log.csv: File too large; make room" in str(error) else 4
            ) from None

    assert exit_code_of(in_child(log_too_much)) == 3


@pytest.mark.usefixtures("forks")
def test_the_command_line_reports_a_full_disk_in_one_line(tmp_path) -> None:
    """CK3 from outside: an optimizer part of 1.5 MB does not fit, the earlier checkpoint does not suffer."""
    out, said = tmp_path / "run", tmp_path / "stderr"
    arguments = ["train", *TINY, "--d-model", "128", "--d-ff", "128", "--max-steps", "3", "--out", str(out)]
    arguments += ["--save-every", "1", "--keep-last", "3"]
    assert exit_code_of(in_child(lambda: main(arguments))) == 0
    shutil.rmtree(out / "step-000003")

    def resume_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        main([*arguments, "--resume"])

    assert exit_code_of(in_child(resume_on_a_full_disk, said)) == 2
    last_line = said.read_text().splitlines()[-1]
    assert "error: cannot save step 3" in last_line and "File too large" in last_line, last_line
    assert "Traceback" not in said.read_text()
    assert Checkpoints(out).steps() == [1, 2]
    assert Checkpoints(out).load()["step"] == 2 and not list(out.glob(".step-*"))


def test_every_flip_and_every_cut_is_noticed(tmp_path, capsys) -> None:
    """CK4: 50 flipped bytes and 4 truncations, in the parts and in the manifest; each falls back to the step before."""
    folder, rng = Checkpoints(tmp_path), random.Random(0)
    folder.save(1, some_parts(1))
    folder.save(2, some_parts(2))
    files = sorted(folder.path(2).iterdir())
    n_noticed = 0
    for trial in range(54):
        path = files[trial % len(files)]
        sound = path.read_bytes()
        if trial < 50:
            at = rng.randrange(len(sound))
            damaged = sound[:at] + bytes([sound[at] ^ (1 << rng.randrange(8))]) + sound[at + 1 :]
        else:
            damaged = sound[: int(len(sound) * (0, 0.01, 0.5, 0.99)[trial - 50])]
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(folder.path(2))
        n_noticed += folder.load()["step"] == 1
        warning = capsys.readouterr().err
        assert warning.startswith("warning: ") and "step-000002" in warning and "going back to step 1" in warning
        path.write_bytes(sound)
    assert n_noticed == 54
    assert folder.load()["step"] == 2 and capsys.readouterr().err == ""
    for step in (1, 2):
        (folder.path(step) / "model.pt").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint in .*step-000002/model.pt cannot be read.*; train again"):
        folder.load()


@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path, how: str, capsys) -> None:
    """CK5, in the function and on the command line."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weights = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    changes = {
        "missing": ("missing: 1.bias", lambda w: w.pop("1.bias")),
        "unknown": ("unknown: extra", lambda w: w.update(extra=torch.ones(1))),
        "shape": (
            r"of another shape: 1.weight \(3, 2\) instead of \(2, 3\)",
            lambda w: w.update({"1.weight": torch.ones(3, 2)}),
        ),
    }
    message, change = changes[how]
    change(weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    if how == "missing":
        arguments = [*TINY, "--out", str(tmp_path)]
        main(["train", *arguments, "--max-steps", "1"])
        parts = Checkpoints(tmp_path).load()
        del parts["model"]["lm_head.weight"], parts["step"]
        Checkpoints(tmp_path).save(2, parts)
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            main(["evaluate", "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.count("\n") == 1 and "missing: lm_head.weight" in error


@pytest.mark.parametrize("part", ["model", "ema", "run"])
def test_evaluate_goes_back_to_a_whole_checkpoint(part, tmp_path, capsys) -> None:
    decay = ["--ema-decay", "0.5"] if part == "ema" else []
    main(["train", *TINY, "--max-steps", "2", "--save-every", "1", *decay, "--out", str(tmp_path)])
    damaged = tmp_path / "step-000002" / f"{part}.pt"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    capsys.readouterr()
    main(["evaluate", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert said.out.startswith("step 1 of 2") and "going back to step 1" in said.err


# Hostile files


class Runs:
    """Unpickled, it calls a function: what a hostile checkpoint does."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def hostile_parts(marker: Path) -> dict[str, dict]:
    touch = f"touch {marker}"
    sound = some_parts()
    return {
        "os.system": {**sound, "model": Runs(os.system, touch)},
        "eval": {**sound, "model": Runs(eval, f"open({str(marker)!r}, 'w')")},
        "subprocess": {**sound, "run": Runs(subprocess.check_call, ["touch", str(marker)])},
        "nested": {**sound, "model": {"layers": [{"weight": torch.ones(2), "more": (1, [Runs(os.system, touch)])}]}},
        "in the optimizer": {
            **sound,
            "optimizer": {"state": {0: {"step": Runs(os.system, touch)}}, "param_groups": []},
        },
    }


@pytest.mark.parametrize("how", ["os.system", "eval", "subprocess", "nested", "in the optimizer"])
def test_a_checkpoint_that_would_run_a_program_is_refused(tmp_path, how: str, monkeypatch) -> None:
    """CK9; its manifest is right, because whoever writes the one can write the other."""
    marker = tmp_path / "marker"
    parts = hostile_parts(marker)[how]
    monkeypatch.setattr("checkpoints.check_loadable", lambda path: None)  # as a foreign program writes it
    Checkpoints(tmp_path).save(1, parts)
    with pytest.raises(ValueError, match="refused, because loading it could run a program") as refused:
        Checkpoints(tmp_path).load()
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert not marker.exists()
    culprit = next(name for name in parts if f"{name}.pt" in str(refused.value))
    with open(tmp_path / "step-000001" / f"{culprit}.pt", "rb") as file, contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert marker.exists(), "the file would have done it"


# The folder over time


def test_rotation_counts_in_numbers_and_stale_files_go(tmp_path) -> None:
    folder = Checkpoints(tmp_path, keep_last=2)
    for step in (999_998, 999_999, 1_000_000):
        folder.save(step, {"model": {"weight": torch.tensor([float(step)])}})
    assert folder.steps() == [999_999, 1_000_000], "sorted as text, the newest would have gone"
    assert folder.load()["step"] == 1_000_000 and folder.load(step=999_999)["model"]["weight"] == 999_999
    (tmp_path / ".step-000005.tmp.123").mkdir()
    (tmp_path / ".step-000005.tmp.123" / "model.pt").write_bytes(b"half")
    (tmp_path / "step-notes.txt").write_text("mine")
    folder.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999", "step-notes.txt"]
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 \(there are \[999999, 1000000\]\)"):
        folder.load(step=5)
    with pytest.raises(ValueError, match="no checkpoint in .*; run the verb train first"):
        Checkpoints(tmp_path / "empty").load()
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        Checkpoints(tmp_path, keep_last=0)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    """What a power failure may take was not forced out: log, parts, manifest; then the name, then the folder."""
    done, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        done.append(f"rename to {Path(target).name}")
        rename(source, target)

    train_tiny(tmp_path / "warm", 2)
    n_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    train_tiny(tmp_path / "run", 2)
    end = done.index("rename to step-000002")
    places = [done.index(f"fsync {name}") for name in ("log.csv", "model.pt", "optimizer.pt", "run.pt")]
    assert max(places) < end and "fsync run" in done[end:], done
    manifest = next(index for index, what in enumerate(done) if what.startswith("fsync") and "manifest" in what)
    assert max(places) < manifest < end, done
    assert len(os.listdir("/proc/self/fd")) == n_open, "every file is closed again"


def test_a_checkpoint_that_goes_loses_its_name_first(tmp_path, monkeypatch) -> None:
    """Killed in the middle of a removal, half a folder must not stand there as a damaged one."""
    folder = Checkpoints(tmp_path)
    folder.save(1, some_parts())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        folder.remove(1)
    assert folder.steps() == [] and len(list(tmp_path.iterdir())) == 1
    folder.sweep()
    assert not list(tmp_path.iterdir())


def test_the_same_step_can_be_saved_again(tmp_path) -> None:
    """What happens when a run goes back behind a damaged checkpoint and reaches its step once more."""
    folder = Checkpoints(tmp_path)
    folder.save(3, {"model": {"weight": torch.zeros(2)}, "old": {}})
    folder.save(3, {"model": {"weight": torch.ones(2)}})
    assert folder.steps() == [3] and set(folder.load()) == {"model", "step"}
    assert folder.load()["model"]["weight"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_manifest_that_says_something_else_is_no_traceback(tmp_path) -> None:
    """Its own hash is right, so somebody wrote it on purpose, or another program."""
    train_tiny(tmp_path, INTERVAL)
    path = tmp_path / "step-000003" / "manifest.json"
    for body in (
        3,
        [],
        {},
        {"step": 3},
        {"step": 3, "files": {"model.pt": 5}},
        {"files": {}},
        {"step": 3, "files": []},
        {"step": 3, "files": {"model.pt": {}}},
    ):
        path.write_bytes(render_manifest(body))
        with pytest.raises(ValueError, match="no whole checkpoint in .*the manifest of step-000003 is damaged"):
            train_tiny(tmp_path, INTERVAL, resume=True)
    path.write_bytes(b"[" * 100_000)  # deeper than any reader goes
    with pytest.raises(ValueError, match="step-000003 has no readable manifest"):
        train_tiny(tmp_path, INTERVAL, resume=True)
    path.write_bytes(render_manifest({"step": 3, "files": {}}))
    with pytest.raises(ValueError, match="step 3 in .* has no part model, optimizer, run; train again"):
        train_tiny(tmp_path, INTERVAL, resume=True)


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path, capsys) -> None:
    """It is the last by number, and with keep_last 1 all others would go."""
    for step in (3, 9):
        Checkpoints(tmp_path).save(step, some_parts())
    (tmp_path / "step-000009" / "model.pt").write_bytes(b"")
    folder = Checkpoints(tmp_path, keep_last=1)
    folder.save(4, some_parts())
    assert folder.steps() == [4, 9] and folder.load()["step"] == 4
    assert "step-000009/model.pt has 0 bytes" in capsys.readouterr().err


def test_a_run_goes_on_behind_a_damaged_checkpoint_as_if_nothing_had_happened(tmp_path, parity) -> None:
    train_tiny(tmp_path / "whole", 3 * INTERVAL)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    path = tmp_path / "hurt" / "step-000009" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    train_tiny(tmp_path / "hurt", 3 * INTERVAL, resume=True)
    prints = [fingerprint(tmp_path / name) for name in ("hurt", "whole")]
    parity("resume behind a damaged checkpoint", "an uninterrupted run", "trajectory", *prints, 0)


@pytest.mark.usefixtures("forks")
def test_two_trainers_cannot_share_a_folder(tmp_path, capsys) -> None:
    """CK11: the second one is refused, in one line, whether the first is this process or another."""
    with locked(tmp_path), pytest.raises(SystemExit) as refused:
        main(["train", *TINY, "--max-steps", "1", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and "is in use by another run" in error

    def slow(step: int) -> dict:
        time.sleep(0.05)
        return random_batch(step)

    child = in_child(lambda: train_tiny(tmp_path, 10_000, slow))
    wait_for(Checkpoints(tmp_path).steps, child)
    with pytest.raises(ValueError, match="is in use by another run"):
        train_tiny(tmp_path, 10_000, resume=True)
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    with locked(tmp_path):
        pass  # the lock died with the process


# Settings, random numbers, the log


def test_a_run_with_other_settings_is_refused_by_name() -> None:
    saved = {"model": {"d_model": 64, "n_layers": 2}, "seed": 0, "train": {"learning_rate": 0.1, "save_every": 5}}
    other = {"model": {"d_model": 32, "n_layers": 2}, "seed": 0, "train": {"learning_rate": 0.1, "save_every": 9}}
    check_header(saved, saved | {"train": other["train"]}, may_change=("save_every",))
    with pytest.raises(ValueError) as refused:
        check_header(saved, other | {"data": "new"})
    for part in ("data was 'absent', is 'new'", "model.d_model was 64, is 32", "train.save_every was 5, is 9"):
        assert part in str(refused.value)
    assert "n_layers" not in str(refused.value)
    with pytest.raises(ValueError, match="seed was 0, is 'absent'"):
        check_header(saved, {name: value for name, value in saved.items() if name != "seed"})


def test_random_numbers_go_on_where_they_stopped(tmp_path) -> None:
    seed_everything(5)
    torch.randn(3), random.gauss(0, 1), np.random.standard_normal(3)  # a half-used pair of normals is part of the state
    Checkpoints(tmp_path).save(1, {"rng": rng_state()})

    def draw() -> list:
        return [torch.randn(4).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()]

    expected = draw()
    seed_everything(6)
    set_rng_state(Checkpoints(tmp_path).load()["rng"])
    assert draw() == expected


def test_the_log_survives_a_torn_line_and_new_columns(tmp_path) -> None:
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "n": 3},
        {"step": 2, "loss": float("inf"), "n": -4, "gap": 1e-300},
        {"step": 3, "loss": np.float32(1.5), "gap": torch.tensor(0.25).item()},
    ]
    log = CsvLog(tmp_path / "log.csv")
    for row in rows:
        log.add(row)
    whole = (tmp_path / "log.csv").read_bytes()
    assert whole.decode() == ("step,loss,n,gap\n1,0.30000000000000004,3,\n2,inf,-4,1e-300\n3,1.5,,0.25\n")
    (tmp_path / "log.csv").write_bytes(whole + b"4,0.25,1")
    again = CsvLog(tmp_path / "log.csv", last_step=3)
    assert again.rows == rows and (tmp_path / "log.csv").read_bytes() == whole
    for broken in (b"3,0.25\n", b"\xff\xfe\n3,1.0,2,0.5\n"):  # a row that lacks cells; no text, and a row behind it
        (tmp_path / "log.csv").write_bytes(whole + broken)
        assert CsvLog(tmp_path / "log.csv", last_step=3).rows == rows
    log.rows = [dict(reversed(row.items())) for row in again.rows]
    assert log.digest() == again.digest(), "the order of columns, which a file has but once, is no difference"
    earlier = CsvLog(tmp_path / "log.csv", last_step=1)
    assert earlier.columns == ["step", "loss", "n"], "a column that came later is gone with its rows"
    for row in rows[1:]:
        earlier.add(row)
    assert (tmp_path / "log.csv").read_bytes() == whole


def test_a_run_does_not_go_on_from_a_log_that_was_changed(tmp_path) -> None:
    train_tiny(tmp_path / "run", 2 * INTERVAL)
    path = tmp_path / "run" / "log.csv"
    sound, go_on = path.read_bytes(), lambda: train_tiny(tmp_path / "run", 2 * INTERVAL, resume=True)
    lines = sound.splitlines(keepends=True)
    changed = lines[2].replace(b".", b".1", 1)
    for wrong in (b"".join(lines[:2] + lines[3:]), b"".join([*lines[:2], changed, *lines[3:]]), b"\0" * 99, b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="is not the log that step 6 was saved with.*bring the file back, or remo"):
            go_on()
        assert path.read_bytes() == wrong, "the refusal leaves the file to its owner"
    path.unlink()
    go_on()
    assert path.read_bytes() == b"\n", "removed on purpose: no rows, and no complaint"
    path.write_bytes(sound + b"7,1.5\n" + b"\0" * 40 + b"\n8,")  # lines behind the checkpoint that were never finished
    go_on()
    assert path.read_bytes() == sound


# Signals


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_mid_step_saves_and_leaves(tmp_path, parity, signum: int, code: int) -> None:
    """CK7: at most 10 s; the run then goes on as if it had never stopped."""

    def slow(step: int) -> dict:
        (tmp_path / "step").write_text(str(step))
        time.sleep(0.1 if step == 6 else 0)
        return random_batch(step)

    child = in_child(lambda: train_tiny(tmp_path / "run", 11, slow))
    wait_for(lambda: (tmp_path / "step").exists() and (tmp_path / "step").read_text() == "6", child)
    os.kill(child, signum)
    assert exit_code_of(child, seconds=10) == code
    assert Checkpoints(tmp_path / "run").load()["step"] == 7, "the step at hand is finished and saved"
    train_tiny(tmp_path / "run", 11, resume=True)
    train_tiny(tmp_path / "whole", 11)
    prints = [fingerprint(tmp_path / name) for name in ("run", "whole")]
    parity(f"{signal.Signals(signum).name} and resume", "an uninterrupted run", "trajectory", *prints, 0)


@pytest.mark.usefixtures("forks")
def test_a_closed_terminal_saves_although_nobody_hears_of_it(tmp_path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "the terminal was closed")

    def run() -> None:
        sys.stderr = Gone()
        train_tiny(tmp_path, 9, lambda step: (step == 4 and os.kill(os.getpid(), signal.SIGHUP)) or random_batch(step))

    assert exit_code_of(in_child(run)) == 129
    assert Checkpoints(tmp_path).steps()[-1] == 5


def test_a_second_signal_ends_at_once(tmp_path) -> None:
    def stuck(step: int) -> dict:
        (tmp_path / "here").write_text("")
        time.sleep(60)
        return random_batch(step)

    child = in_child(lambda: train_tiny(tmp_path / "run", 5, stuck))
    wait_for((tmp_path / "here").exists, child)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first signal waits for the step"
    os.kill(child, signal.SIGINT)
    assert exit_code_of(child, seconds=10) == -signal.SIGINT
    assert not Checkpoints(tmp_path / "run").steps()


def test_signals_are_left_as_they_were_and_outside_the_main_thread_alone() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
    seen = []

    def elsewhere() -> None:
        with stop_requests() as request:
            seen.append(request.signum)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.usefixtures("forks")
def test_a_signal_that_was_ignored_stays_ignored(tmp_path) -> None:
    """As under nohup, or for a job that a script put in the background."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        train_tiny(tmp_path, 3, lambda step: os.kill(os.getpid(), signal.SIGINT) or random_batch(step))

    assert exit_code_of(in_child(run)) == 0
    assert Checkpoints(tmp_path).steps() == [3]


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path) -> None:
    """A part of any object would be written, and then refused by every load, that of earlier steps included."""
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"model": {"weight": torch.ones(2)}, "run.info": {"n": 1, "names": ["a"], "none": None}})
    for step, parts, message in (
        (2, {"model": object()}, "model holds more than tensors and plain values"),
        (2, {"model": torch.nn.Linear(2, 2)}, "model holds more than tensors and plain values"),
        (2, {"model": lambda: 0}, "model cannot be saved .*lambda"),
        (2, {"../model": 1}, r"the name of a part becomes that of a file, got \['../model'\]"),
        (2, {7: 1}, "the name of a part"),
        (-1, {"model": 1}, "a step is an integer >= 0, got -1"),
        (1.5, {"model": 1}, r"a step is an integer >= 0, got 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.save(step, parts)
    assert checkpoints.load()["step"] == 1 and [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_column_that_would_hide_the_rows_is_refused(tmp_path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 2.0})
    for name in ("a,b", "a\nb"):
        with pytest.raises(ValueError, match="no comma and no line break"):
            log.add({"step": 2, name: 1.0})
    assert CsvLog(tmp_path / "log.csv", 9).rows == [{"step": 1, "loss": 2.0}]
