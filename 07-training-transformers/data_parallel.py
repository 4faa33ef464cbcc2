"""Topic 07 - Data Parallel: several processes train one model, each on its rows, and stay bit for bit alike.

torchrun --nproc-per-node 2 07-training-transformers/training_transformers.py train
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench import pick_device

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)  # the default is 30: a dead neighbour would cost half an hour


def rank_device(name: str = "auto") -> torch.device:
    """The device of this process: under torchrun every process has a GPU of its own, or all compute on the CPU.

    Raises ValueError for "cuda" where this machine has more of our processes than GPUs: NCCL refuses to share one.
    """
    if "LOCAL_RANK" not in os.environ or name not in ("auto", "cuda"):
        return pick_device(name)
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    n_gpus = torch.cuda.device_count()
    if n_gpus >= n_processes:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name == "cuda":
        raise ValueError(
            f"{n_processes} processes need a GPU each, this machine has {n_gpus}; "
            f"use --nproc-per-node {n_gpus or 1} or --device cpu"
        )
    return torch.device("cpu")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, while the block runs; one process alone does nothing."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start several processes with torchrun")
    # both on GPUs: gradients travel by NCCL, the numbers of the log are on the CPU, which NCCL does not know
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """The processes that train one model together; one process alone is a team of 1, for which all of this is free."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Team":
        """The team of the process group that this process belongs to."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def start_alike(self, model: nn.Module) -> None:
        """Give every process the weights of rank 0, and random numbers of its own."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)
            torch.manual_seed(torch.initial_seed() + self.rank)  # otherwise all would drop the same units

    def rows_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[self.rank :: self.size] for name, tensor in batch.items()}

    def add_up(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes: one message for all of them together.

        A parameter without a gradient in any process keeps none; where only some have one, it counts as 0 elsewhere.
        """
        if self.size == 1:
            return
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        with_gradient = [parameter for parameter, flag in zip(parameters, used.tolist(), strict=True) if flag]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in with_gradient]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for parameter, part in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
            parameter.grad = part.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values
