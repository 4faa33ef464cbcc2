"""Topic 10 - Sharded Checkpoints: every process writes its own part; any number of processes reads them again.

torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py parallel --scheme fsdp --save-every 5
torchrun --nproc-per-node 4 10-pretraining-llms/pretraining_llms.py parallel --scheme fsdp --save-every 5 --resume

The parts are written and cut anew by torch.distributed.checkpoint. Around it stand topic 07's rules: a checkpoint
appears whole or not at all, and every file has its SHA-256 in a manifest.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoints import (
    MANIFEST,
    Checkpoints,
    DamagedCheckpoint,
    check_header,
    read_manifest,
    render_manifest,
    sync_folder,
)
from data_parallel import Team
from manual_parallel import DataParallel, ZeroOne
from pipeline_parallel import Pipeline
from sharded_parallel import Sharded
from workbench import shown, write_atomically

MOMENTS = ("mean", "square")  # what AdamW keeps of every number
MAY_CHANGE = ("save_every", "resume", "keep_last")  # settings that a resumed run may have otherwise


# What a scheme's state is, as tensors that know which part of the whole they are


def state_tensors(scheme: Any) -> dict[str, Tensor]:
    """Weights, moments and the number of steps of a scheme: tensors in its own memory, under names for everyone.

    A DTensor says which part of the whole this process holds; any other tensor is whole. Loading into these tensors
    changes the scheme, but for the number of steps: see `set_steps`. Raises ValueError for a scheme without such names.
    """
    if not isinstance(scheme, DataParallel | Pipeline | Sharded):
        raise ValueError(
            f"{type(scheme).__name__} has no sharded checkpoint; use ddp, zero1, zero2, fsdp or a pipeline"
        )
    begin_moments(scheme.optimizer)
    weights = dict(scheme.model.named_parameters())  # a tied matrix once
    tensors = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    if isinstance(scheme, ZeroOne):
        tensors |= zero_moments(scheme)
    elif isinstance(scheme, Sharded):
        for name, weight in weights.items():
            for moment, tensor in moments_of(scheme.optimizer, scheme.locals[name]).items():
                tensors[f"optimizer.{name}.{moment}"] = like(weight, tensor)
    else:
        for name, weight in weights.items():
            moments = moments_of(scheme.optimizer, weight)
            tensors |= {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()}
    return tensors | {"steps": torch.tensor([steps_of(scheme.optimizer)])}


def zero_moments(scheme: ZeroOne) -> dict[str, Tensor]:
    """The moments of each bucket, one vector of which process r holds the r-th chunk; padding is left out.

    The chunks are those of torch.chunk, which is how a DTensor of any number of processes is cut: that is all it takes
    to reshard.
    """
    size, rank = scheme.team.size, scheme.team.rank
    mesh = init_device_mesh(scheme.shards[0].device.type, (size,)) if size > 1 else None
    tensors = {}
    for index, (bucket, shard) in enumerate(zip(scheme.buckets, scheme.shards, strict=True)):
        n_real = min(max(bucket.numel - rank * shard.numel(), 0), shard.numel())
        for moment, tensor in moments_of(scheme.optimizer, shard).items():
            part = tensor[:n_real]
            if mesh is not None:
                whole = {"shape": torch.Size([bucket.numel]), "stride": (1,)}
                part = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, **whole)
            tensors[f"optimizer.bucket-{index}.{moment}"] = part
    return tensors


def like(weight: Tensor, local: Tensor) -> Tensor:
    """A local part as the DTensor that it is a part of, cut as `weight` is."""
    if not isinstance(weight, DTensor):
        return local
    whole = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False, **whole)


def begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer that has taken no step the state it would start from."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                zeros = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
                optimizer.state[parameter].update(step=0, **zeros)


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {moment: optimizer.state[parameter][moment] for moment in MOMENTS}


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    return next(iter(optimizer.state.values()))["step"]


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        state["step"] = steps


# Reading without running anything


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the table of contents of a checkpoint, and nothing that is not part of one."""

    modules = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    others = (
        *(("torch", name) for name in ("Size", "strided", "contiguous_format", "preserve_format")),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # what Python 3.13 wrote; 3.11, 3.12 and 3.14 know the same class as pathlib's
            module = "pathlib"
        known = module in self.modules or (module, name) in self.others
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """DCP's reader, but for its table of contents: PyTorch unpickles that without any guard."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                metadata = MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{shown(Path(self.path))}/.metadata is refused, because loading it could run a program: {error}"
                ) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def check_contents(metadata: Metadata, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless every tensor stands in the checkpoint, with its shape and as a tensor."""
    found = metadata.state_dict_metadata
    problems = [f"{name} is missing" for name in tensors if name not in found]
    for name, tensor in tensors.items():
        entry = found.get(name)
        if entry is None:
            continue
        if not isinstance(entry, TensorStorageMetadata):  # DCP would unpickle it without any guard
            problems.append(f"{name} is no tensor")
        elif entry.size != tensor.shape:
            problems.append(f"{name} has the shape {tuple(entry.size)} instead of {tuple(tensor.shape)}")
    if problems:
        raise ValueError(f"{shown(folder)} does not fit this run: {'; '.join(problems[:5])}; give the same flags")


# The checkpoints of a run


class ShardedCheckpoints:
    """The checkpoints of one run of several processes: folders step-N, of which the newest `keep_last` stay.

    Every process calls every method, and all return or raise alike. The folder must be on a disk that all see.
    """

    def __init__(self, folder: Path, team: Team, keep_last: int = 2) -> None:
        self.folder, self.team = folder, team
        self.files = Checkpoints(folder, keep_last)  # names, order and removal as in topic 07

    def save(self, step: int, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Write every process's part, hash all files, then let the folder appear under its name.

        Raises OSError, with earlier checkpoints as they were, if a process cannot write.
        """
        final = self.files.path(step)
        temporary = self.folder / f".{final.name}.tmp.sharded"
        self.on_first(lambda: fresh_folder(temporary))
        try:
            with alone_without_warning():
                dcp.save(tensors, checkpoint_id=temporary, no_dist=self.team.size == 1)
            problem = None
        except Exception as error:  # DCP wraps what went wrong in the processes into an exception of its own
            problem = " ".join(str(error).split())[-200:]
        self.agree(problem, f"cannot save step {step} in {shown(self.folder)}")
        names = sorted(path.name for path in temporary.iterdir())
        mine = {name: fingerprint(temporary / name) for name in names[self.team.rank :: self.team.size]}
        files = {name: entry for part in self.team.gather(mine) for name, entry in part.items()}
        self.on_first(lambda: self.publish(temporary, final, {"step": step, "files": files, "header": header}))

    def publish(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        write_atomically(temporary / MANIFEST, render_manifest(manifest))
        if final.exists():  # a damaged one that the run had to pass over
            self.files.remove(manifest["step"])
        os.rename(temporary, final)
        sync_folder(self.folder)
        for earlier in self.files.steps()[: -self.files.keep_last]:
            self.files.remove(earlier)

    def load(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> int:
        """Fill the tensors from the newest whole checkpoint, whatever number of processes wrote it; return its step.

        Damaged checkpoints are named in a warning and passed over. Raises ValueError if there is none, if it was made
        with other settings, or if names or shapes differ; nothing is changed then.
        """
        damaged = []
        for step in reversed(self.team.gather(self.files.steps())[0]):
            folder = self.files.path(step)
            problems = [text for text in self.team.gather(self.damage(folder)) if text]
            if problems:
                damaged += problems
                continue
            if damaged and self.team.rank == 0:
                print(f"warning: {'; '.join(damaged)}; going back to step {step}", file=sys.stderr)
            plain = json.loads(json.dumps(header))  # as it was written: a tuple became a list
            check_header(read_manifest(folder)["header"], plain, MAY_CHANGE)
            reader = PlainReader(folder)
            check_contents(reader.read_metadata(), tensors, folder)
            with alone_without_warning():
                dcp.load(tensors, storage_reader=reader, no_dist=self.team.size == 1)
            return step
        what = f"no whole checkpoint ({'; '.join(damaged)})" if damaged else "no checkpoint"
        raise ValueError(f"{what} in {shown(self.folder)}; train first, with the same --out")

    def damage(self, folder: Path) -> str:
        """What is wrong with this process's share of the files of a checkpoint; empty if nothing is."""
        try:
            files = read_manifest(folder)["files"]
            names = sorted(files)[self.team.rank :: self.team.size]
            wrong = [name for name in names if fingerprint(folder / name) != files[name]]
        except (DamagedCheckpoint, OSError) as error:
            return str(error)
        return f"{folder.name}/{wrong[0]} is damaged (its SHA-256 differs)" if wrong else ""

    def on_first(self, work) -> None:
        """Let process 0 do it; an OSError there is everyone's."""
        problem = None
        if self.team.rank == 0:
            try:
                work()
            except OSError as error:
                problem = error.strerror or str(error)
        self.agree(problem, f"cannot save in {shown(self.folder)}")

    def agree(self, problem: str | None, what: str) -> None:
        problems = [text for text in self.team.gather(problem) if text]
        if problems:
            raise OSError(f"{what}: {problems[0]}; earlier checkpoints are as they were")


@contextlib.contextmanager
def alone_without_warning() -> Iterator[None]:
    """One process alone has no process group, and means it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def save_scheme(checkpoints: ShardedCheckpoints, scheme: Any, step: int, header: dict[str, Any]) -> None:
    """A checkpoint of a scheme's weights, moments and number of steps."""
    checkpoints.save(step, state_tensors(scheme), header)


def load_scheme(checkpoints: ShardedCheckpoints, scheme: Any, header: dict[str, Any]) -> int:
    """Go on from the newest whole checkpoint; returns its step. Any number of processes may have written it."""
    tensors = state_tensors(scheme)
    step = checkpoints.load(tensors, header)
    set_steps(scheme.optimizer, int(tensors["steps"]))
    if dist.is_initialized():
        dist.barrier()
    return step
