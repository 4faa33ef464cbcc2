"""Proofs for parallel_experiments: a killed run comes to the same bits, torchrun starts again; the failures show."""

import dataclasses
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_experiments
import pretraining_experiments
from corpus_failures import CORPUS_BREAKS
from llm_calculators import count_parameters
from parallel_experiments import (
    BREAKS,
    PARALLEL_BREAKS,
    ParallelConfig,
    expected_bytes,
    measure_all_reduce,
    parallel,
    parameter_order,
    published_budgets,
    restart_address,
    show_parameter_order,
    train_in_team,
    zero_table,
)
from process_launch import AGENT_STORE, LaunchConfig, address_table, run_processes
from training_cost import RUNS
from workbench import RunConfig

TINY = ParallelConfig(
    scheme="zero1", max_steps=6, batch_size=4, seq_len=16, d_model=16, n_layers=2, save_every=2, timeout=40.0
)


def test_processes_of_our_own_do_not_take_a_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="compute on the CPU, got --device cuda; for GPUs start it by torchrun"):
        parallel_experiments.parallel(TINY, RunConfig(device="cuda", out=tmp_path))


def test_killed_and_restarted_comes_to_the_same_bits_and_goes_on_with_four(tmp_path, parity, capfd) -> None:
    whole = run_processes(train_in_team, LaunchConfig(2), TINY, RunConfig(out=tmp_path / "whole"))[0]
    config = dataclasses.replace(TINY, fault="kill", fault_step=5)
    launch = LaunchConfig(2, timeout=40.0, max_restarts=1)
    again = run_processes(train_in_team, launch, config, RunConfig(out=tmp_path / "killed"))[0]
    assert again["first"] == 4 and len(again["losses"]) == 2, "from the checkpoint of step 4"
    parity(
        "zero1, killed at step 5", "the run that never stopped", "invariant", again["weights"], whole["weights"], 0.0
    )
    parity(
        "zero1, killed at step 5", "the run that never stopped", "invariant", again["losses"], whole["losses"][4:], 0.0
    )
    os.rename(tmp_path / "killed" / "checkpoints" / "step-000006", tmp_path / "later")
    more = dataclasses.replace(TINY, resume=True, save_every=0)
    four = run_processes(train_in_team, LaunchConfig(4), more, RunConfig(out=tmp_path / "killed"))[0]
    assert four["first"] == 4
    parity("zero1, 2 processes, then 4", "2 processes", "trajectory", four["losses"], whole["losses"][4:], 1e-5)


def test_a_folder_in_use_and_other_settings_are_refused(tmp_path) -> None:
    run, own = RunConfig(out=tmp_path), dataclasses.replace(TINY, size=1)
    parallel(own, run)
    with pytest.raises(ValueError, match="has checkpoints; go on with --resume, or choose another --out"):
        parallel(own, run)
    with pytest.raises(ValueError, match="cannot resume: .*batch_size was 4, is 8"):
        parallel(dataclasses.replace(own, batch_size=8, resume=True), run)
    with pytest.raises(ValueError, match="process 1 of 2 left with exit code 3; the others were ended"):
        parallel(dataclasses.replace(TINY, fault="exit", fault_step=1), RunConfig(out=tmp_path / "another"))
    with pytest.raises(ValueError, match="d_model=12 must be divisible by 8"):
        ParallelConfig(d_model=12)


def test_exchanged_weights_train_apart_without_an_error(tmp_path, capsys, monkeypatch) -> None:
    config, run = dataclasses.replace(TINY, scheme="ddp", save_every=0), RunConfig(out=tmp_path)
    (_, same, wrong), (_, *losses) = parameter_order(run, config)
    assert same == 0.0 and wrong > 1e-3 and abs(losses[0] - losses[1]) < 0.1
    monkeypatch.setattr(parallel_experiments, "exchanged", lambda *_: (1.25, 0.5))
    show_parameter_order(config, run)
    assert "exchanged in process 1: loss 1.2500, weights of the two processes differ by 0.5" in capsys.readouterr().out


def test_every_failure_has_a_row_with_its_sound_and_its_broken_value(tmp_path, monkeypatch) -> None:
    assert (*PARALLEL_BREAKS,) == BREAKS[1:]
    calls = []
    monkeypatch.setattr(
        parallel_experiments, "restarts_that_end", lambda *args: calls.append(args[2:]) or (2 if args[2] else 1, "")
    )
    assert restart_address(RunConfig(out=tmp_path), 2)[0][1:] == (1.0, 0.5) and calls == [(True, 2), (False, 2)]
    recorder, run = Recorder(), RunConfig(out=tmp_path, device="cpu")
    cheap = {name: CORPUS_BREAKS[name] for name in ("search-by-letters", "dedup-before-repair")}
    monkeypatch.setattr(pretraining_experiments, "CORPUS_BREAKS", cheap)
    monkeypatch.setattr(pretraining_experiments, "PARALLEL_BREAKS", {"restart-address": restart_address})
    pretraining_experiments.breaks(recorder, run)
    rows = recorder.tables["breaks"]
    assert [row[0] for row in rows] == ["`search-by-letters`", "`dedup-before-repair`", "`restart-address`"]
    assert all(row[2] != row[3] for row in rows)


def as_torchrun_would(rank: int, port: int, config: ParallelConfig, out: Path) -> None:
    """One process of the verb, told where it is by the variables that torchrun sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {AGENT_STORE: "True"})
    torch.set_num_threads(1)
    parallel(config, RunConfig(out=out))
    sys.stdout.flush()


@pytest.mark.usefixtures("forks")
def test_the_verb_runs_under_torchruns_variables(tmp_path, capfd) -> None:
    context = multiprocessing.get_context("fork")
    with address_table() as port:
        members = [context.Process(target=as_torchrun_would, args=(rank, port, TINY, tmp_path)) for rank in range(2)]
        for member in members:
            member.start()
        for member in members:
            member.join(120)
    assert [member.exitcode for member in members] == [0, 0]
    out = capfd.readouterr().out
    assert out.count("zero1, 2 processes: loss") == 1, "process 0 alone speaks"
    assert len(out.partition("of optimizer state, by process: ")[2].split(", ")) == 2
    assert (tmp_path / "checkpoints" / "step-000006").is_dir()


SMOKE = """
from process_launch import Fault, attempt, joined

with joined() as team:
    for step in (1, 2):
        total = team.add_up(team.rank + 1.0)[0]
        Fault("kill", rank=1, step=1).strike(team, step)
print(f"<attempt {attempt()}, process {team.rank} of {team.size}: {total}>")
"""


def test_torchrun_starts_again_after_a_kill(tmp_path) -> None:
    """The smoke test of the real thing: torchrun, its table of addresses, a process that dies, a second attempt."""
    script = tmp_path / "script.py"
    script.write_text(SMOKE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", port, "--monitor-interval", "0.2", str(script)]
    folders = os.pathsep.join(str(path) for path in Path(parallel_experiments.__file__).parents[1].glob("[0-9][0-9]-*"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(re.findall("<(.+?)>", done.stdout)) == [f"attempt 1, process {rank} of 2: 3.0" for rank in range(2)]


# What the chapter's tables are made of


class Recorder:
    """Where an experiment would write its table."""

    def __init__(self) -> None:
        self.tables: dict[str, list] = {}

    def save(self, name: str, columns: list, rows: list, experiment: str, n_seeds: int = 0) -> None:
        assert experiment in pretraining_experiments.EXPERIMENTS and all(len(row) == len(columns) for row in rows)
        self.tables[name] = rows


def test_the_tables_that_need_no_run_are_whole() -> None:
    recorder = Recorder()
    published_budgets(recorder, RunConfig())
    zero_table(recorder, RunConfig())
    assert [row[0] for row in recorder.tables["published-budgets"]] == [run.model for run in RUNS]
    held = [row[1] for row in recorder.tables["zero-memory"]]
    assert held == sorted(held, reverse=True) and held[0] == pytest.approx(16 * 8.03)


def test_a_measured_message_is_as_long_as_the_formula_says() -> None:
    ring = run_processes(measure_all_reduce, LaunchConfig(2), "ring", 50_000)
    star = run_processes(measure_all_reduce, LaunchConfig(3), "star", 50_000)
    if sys.platform == "linux":
        assert [result["sent"] for result in ring] == pytest.approx([200_000] * 2, rel=0.02)
        assert star[0]["sent"] == pytest.approx(2 * 200_000, rel=0.02)
    config = ParallelConfig(max_steps=3)
    n_weights = count_parameters(config.model).total
    assert expected_bytes(config, 2) == 3 * 4 * n_weights and expected_bytes(config, 1) == 0
