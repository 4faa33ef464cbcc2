"""Proofs for sharded_checkpoints: 1 and 4 processes read bit for bit what 2 wrote; damage and foreign code are seen."""

import dataclasses
import io
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from checkpoints import MANIFEST, render_manifest
from data_parallel import Team
from llm_config import ModelConfig
from manual_parallel import MANUAL, train_with
from modern_llm_architectures import CausalLM
from packing import Batch
from process_launch import LaunchConfig, run_processes
from sharded_checkpoints import (
    MetadataUnpickler,
    ShardedCheckpoints,
    fingerprint,
    load_scheme,
    save_scheme,
    state_tensors,
)
from sharded_parallel import Sharded, TensorByHand
from training_transformers import TrainConfig

MODEL = ModelConfig(
    51, d_model=25, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=41, max_seq_len=32
)  # no bucket of four equal parts
TRAINING = TrainConfig(max_steps=4, batch_size=4, warmup_steps=1, learning_rate=3e-3)
HEADER = {"model": dataclasses.asdict(MODEL), "seed": 0}
NAMES = ("zero1", "fsdp")


def batch_of(step: int) -> Batch:
    ids = torch.randint(0, 51, (4, 9), generator=torch.Generator().manual_seed(step))
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def build(name: str, team: Team, n_steps: int = 4):
    torch.manual_seed(7)
    model, training = CausalLM(MODEL), dataclasses.replace(TRAINING, max_steps=n_steps)
    return Sharded(model, training, team) if name == "fsdp" else MANUAL[name](model, training, team, bucket_bytes=9000)


def whole_state(scheme) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in state_tensors(scheme).items():
        state[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return state


def parts_of(scheme) -> dict[str, int]:
    """How many numbers of each tensor that is cut this process has."""
    return {
        name: tensor.to_local().numel() for name, tensor in state_tensors(scheme).items() if isinstance(tensor, DTensor)
    }


def train_and_save(team: Team, folder: Path) -> dict:
    results = {}
    for name in NAMES:
        scheme = build(name, team)
        train_with(scheme, batch_of)
        save_scheme(ShardedCheckpoints(folder / name, team), scheme, 4, HEADER)
        results[name] = whole_state(scheme)
    return results


def load_and_save(team: Team, source: Path, target: Path) -> dict:
    results = {}
    for name in NAMES:
        scheme = build(name, team)
        assert load_scheme(ShardedCheckpoints(source / name, team), scheme, HEADER) == 4
        results[name], results[f"{name} parts"] = whole_state(scheme), parts_of(scheme)
        save_scheme(ShardedCheckpoints(target / name, team), scheme, 4, HEADER)
    return results


def test_two_processes_write_one_reads_four_read_bit_for_bit(tmp_path, parity) -> None:
    first, second = run_processes(train_and_save, LaunchConfig(2), tmp_path / "two")
    one = run_processes(load_and_save, LaunchConfig(1), tmp_path / "two", tmp_path / "one")[0]
    four = run_processes(load_and_save, LaunchConfig(4), tmp_path / "one", tmp_path / "four")
    for name in NAMES:
        assert int(first[name]["steps"]) == 4 and any("optimizer" in key for key in first[name])
        assert float(first[name]["model.token_emb.weight"].abs().sum()) > 0
        parity(f"{name}: checkpoint of 2 processes", "read by 1", "exchange", one[name], first[name], 0.0)
        for result in (second, *four):
            parity(f"{name}: 2, then 1 process", "read by 4", "exchange", result[name], first[name], 0.0)
        for key, n in four[0][f"{name} parts"].items():  # every number is somebody's, and no padding is
            assert sum(result[f"{name} parts"][key] for result in four) == first[name][key].numel() >= n > 0
    files = sorted(path.name for path in (tmp_path / "four" / "fsdp" / "step-000004").iterdir())
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4)), MANIFEST], "everyone wrote a part"


def saved(folder: Path, *steps: int) -> ShardedCheckpoints:
    checkpoints = ShardedCheckpoints(folder, Team(), keep_last=2)
    for step in steps:
        checkpoints.save(step, {"x": torch.full((3,), float(step))}, {"seed": 1})
    return checkpoints


def load_newest(team: Team, folder: Path) -> int:
    return ShardedCheckpoints(folder, team).load({"x": torch.zeros(3)}, {"seed": 1})


def test_what_one_process_finds_damaged_all_pass_over(tmp_path) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-000002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_processes(load_newest, LaunchConfig(2, timeout=20.0), tmp_path) == [1, 1]


def test_another_shape_and_what_is_no_tensor_are_refused(tmp_path) -> None:
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"x has the shape \(3,\) instead of \(1, 3\)"):
        checkpoints.load({"x": torch.zeros(1, 3)}, {"seed": 1})
    checkpoints.save(2, {"x": "a text, which would be unpickled"}, {"seed": 1})
    with pytest.raises(ValueError, match="x is no tensor"):
        checkpoints.load({"x": torch.zeros(3)}, {"seed": 1})


def test_the_newest_stay_in_the_order_of_numbers(tmp_path) -> None:
    checkpoints = saved(tmp_path, 999_999, 1_000_000, 1_000_001)
    assert checkpoints.files.steps() == [1_000_000, 1_000_001]
    target = {"x": torch.zeros(3)}
    assert checkpoints.load(target, {"seed": 1}) == 1_000_001 and target["x"].tolist() == [1_000_001.0] * 3
    assert not list(tmp_path.glob(".step-*")), "nothing half done is left"


def test_a_flipped_byte_is_passed_over_and_named(tmp_path, capsys) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in (2, 1):
        path = tmp_path / f"step-00000{step}" / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        target = {"x": torch.zeros(3)}
        if step == 2:
            assert checkpoints.load(target, {"seed": 1}) == 1 and target["x"].tolist() == [1.0] * 3
            assert (
                "step-000002/__0_0.distcp is damaged (its SHA-256 differs); going back to step 1"
                in capsys.readouterr().err
            )
    target = {"x": torch.zeros(3)}
    with pytest.raises(ValueError, match="no whole checkpoint .*step-000001/__0_0.distcp is damaged"):
        checkpoints.load(target, {"seed": 1})
    assert target["x"].tolist() == [0.0] * 3, "nothing is half loaded"


def test_what_does_not_fit_is_refused_by_name(tmp_path) -> None:
    checkpoints = saved(tmp_path, 3)
    with pytest.raises(ValueError, match="cannot resume: .*seed was 1, is 2"):
        checkpoints.load({"x": torch.zeros(3)}, {"seed": 2})
    with pytest.raises(ValueError, match=r"does not fit this run: x has the shape \(3,\) instead of \(4,\)"):
        checkpoints.load({"x": torch.zeros(4)}, {"seed": 1})
    with pytest.raises(ValueError, match="does not fit this run: y is missing"):
        checkpoints.load({"y": torch.zeros(3)}, {"seed": 1})
    with pytest.raises(ValueError, match="no checkpoint in .*; train first, with the same --out"):
        ShardedCheckpoints(tmp_path / "empty", Team()).load({"x": torch.zeros(3)}, {})
    by_hand = TensorByHand(CausalLM(MODEL), TRAINING, Team())
    with pytest.raises(ValueError, match="TensorByHand has no sharded checkpoint"):
        state_tensors(by_hand)


class RunsAProgram:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_table_of_contents_that_runs_a_program_is_refused(tmp_path) -> None:
    checkpoints, marker = saved(tmp_path, 3), tmp_path / "ran"
    folder = tmp_path / "step-000003"
    (folder / ".metadata").write_bytes(pickle.dumps(RunsAProgram(marker)))
    files = {path.name: fingerprint(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_bytes(render_manifest({"step": 3, "files": files, "header": {"seed": 1}}))
    with pytest.raises(ValueError, match="could run a program: it asks for (posix|nt).system"):
        checkpoints.load({"x": torch.zeros(3)}, {"seed": 1})
    assert not marker.exists()


def test_tables_of_contents_of_every_python_are_read() -> None:
    written = pickle.dumps(Path("a"), protocol=0)  # names its classes in plain text
    modern = re.sub(rb"cpathlib(\._local)?\n", b"cpathlib._local\n", written)  # as Python 3.13 writes it
    plain = re.sub(rb"cpathlib(\._local)?\n", b"cpathlib\n", written)  # as all others do
    assert modern != plain
    assert [MetadataUnpickler(io.BytesIO(data)).load() for data in (modern, plain)] == [Path("a")] * 2


def save_where_a_file_is(team: Team, folder: Path) -> str:
    checkpoints = ShardedCheckpoints(folder, team)
    checkpoints.save(1, {"x": torch.zeros(3)}, {})
    if team.rank == 0:
        (folder / ".step-000002.tmp.sharded").write_text("in the way, and no folder")
    try:
        checkpoints.save(2, {"x": torch.zeros(3)}, {})
    except OSError as error:
        return str(error)
    return "saved"


def test_a_failed_save_is_everyones_and_leaves_the_earlier_one(tmp_path) -> None:
    messages = run_processes(save_where_a_file_is, LaunchConfig(2), tmp_path)
    assert messages[0] == messages[1] and "cannot save" in messages[0]
    assert messages[0].endswith("earlier checkpoints are as they were")
    target = {"x": torch.ones(3)}
    assert ShardedCheckpoints(tmp_path, Team()).load(target, {}) == 1 and target["x"].tolist() == [0.0] * 3
