"""Proofs for process_launch: a process that dies or hangs ends the team with its name, and a restart finds its way."""

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import process_launch
from data_parallel import Team
from process_launch import (
    AGENT_STORE,
    ATTEMPT,
    Fault,
    LaunchConfig,
    ProcessFailed,
    attempt,
    joined,
    own_device,
    run_processes,
)

QUICK = LaunchConfig(2, timeout=20.0)


def work(team: Team, fault: Fault) -> list:
    """Three steps of adding up, with a failure on the way; the number of the attempt and the sum."""
    total = 0.0
    for step in range(1, 4):
        total += team.add_up(team.rank + 1.0)[0]
        fault.strike(team, step)
    return [attempt(), total]


def children() -> set[int]:
    """The processes below this one that still run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(path.parent.name))
    return found


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_processes(work, LaunchConfig(3), Fault()) == [[0, 18.0]] * 3
    assert run_processes(rank_of, LaunchConfig(3)) == [0, 1, 2] and run_processes(rank_of, LaunchConfig(1)) == [0]


def rank_of(team: Team) -> int:
    return team.rank


def linger(team: Team, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_ctrl_c_is_the_starters_and_its_death_ends_all(tmp_path: Path) -> None:
    starter = multiprocessing.get_context("fork").Process(target=run_processes, args=(linger, QUICK, tmp_path))
    starter.start()
    deadline = time.monotonic() + 20
    while len(team := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in team:
        os.kill(process, signal.SIGINT)  # a terminal sends it to all
    time.sleep(0.1)
    assert len(team) == 2 and all(map(runs, team))
    starter.kill()
    starter.join()
    while any(map(runs, team)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(runs, team))


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_where_there_is_a_gpu_processes_start_afresh_and_compute_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_launch.start_method() == "spawn"
    assert run_processes(work_and_place, LaunchConfig(2), Fault()) == [[0, 9.0, "cpu"]] * 2


def work_and_place(team: Team, fault: Fault) -> list:
    return [*work(team, fault), str(own_device())]


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("kill", "was ended by SIGKILL"),
        ("exit", "left with exit code 3"),
        ("raise", "raised RuntimeError: failing on purpose at step 2"),
    ],
)
def test_one_failure_ends_all_and_a_restart_goes_on(kind: str, cause: str, capfd) -> None:
    before, again = children(), dataclasses.replace(QUICK, max_restarts=1, slow=0.3)
    assert run_processes(work, again, Fault(kind, rank=1, step=2)) == [[1, 9.0]] * 2
    assert f"process 1 of 2 {cause}; starting again (1 of 1)" in capfd.readouterr().err
    assert children() == before, "no process stays behind"


def test_a_failure_without_a_restart_ends_all_before_their_time_is_up() -> None:
    before, started = children(), time.monotonic()
    with pytest.raises(ProcessFailed, match="process 1 of 2 was ended by SIGKILL"):
        run_processes(work, QUICK, Fault("kill", rank=1, step=2))
    assert children() == before, "no process stays behind"
    assert time.monotonic() - started < QUICK.timeout, "nobody waited for the dead"


def test_a_hanging_process_ends_all_when_the_time_is_up() -> None:
    before, started = children(), time.monotonic()
    with pytest.raises(ProcessFailed, match="process 0 of 2 raised RuntimeError: .*[Tt]imed? ?out"):
        run_processes(work, LaunchConfig(2, timeout=1.5), Fault("hang", rank=1, step=1))
    assert children() == before and time.monotonic() - started > 1.5


def test_one_table_for_all_attempts_leads_a_restart_to_a_dead_address() -> None:
    """The failure that `apart` prevents: process 0 finds where process 1 was, and process 1 comes a little later."""
    launch, fault = LaunchConfig(2, timeout=20.0, max_restarts=1, slow=0.7), Fault("kill", rank=1, step=2)
    assert run_processes(work, launch, fault) == [[1, 9.0]] * 2
    shared = dataclasses.replace(launch, timeout=2.0, apart=False)
    with pytest.raises(ProcessFailed, match="(?i)connect|timeout|store"):
        for _ in range(10):  # of two addresses gloo lets one call the other: in about a quarter of the runs the new one
            run_processes(work, shared, fault)


def refuse(team: Team) -> None:
    raise ValueError(f"the flag of process {team.rank} is wrong; use another")


def test_a_mistake_of_the_user_stays_one() -> None:
    with pytest.raises(ValueError, match=r"the flag of process [01] is wrong; use another"):
        run_processes(refuse, QUICK)
    with pytest.raises(ValueError, match="size must be finite and >= 1, got 0"):
        LaunchConfig(0)


def test_joined_reads_torchruns_variables(monkeypatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", ATTEMPT, AGENT_STORE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as team:
        assert team == Team(0, 1) and attempt() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="WORLD_SIZE is set but RANK, MASTER_ADDR, MASTER_PORT is not; start"),
        joined(),
    ):
        pass


def test_bytes_are_counted_when_they_stand_still(monkeypatch) -> None:
    counts = iter([100, 250, 300, 300, 999])
    monkeypatch.setattr(process_launch, "kernel_bytes_sent", lambda: next(counts))
    monkeypatch.setattr(process_launch.time, "sleep", lambda seconds: None)
    assert process_launch.settled_bytes_sent() == 300
