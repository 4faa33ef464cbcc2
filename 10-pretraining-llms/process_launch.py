"""Topic 10 - Process Launch: start processes, let them meet, notice that one died or hangs, and start them again.

torchrun --nproc-per-node 2 --max-restarts 1 10-pretraining-llms/pretraining_llms.py parallel --scheme zero1

`joined` reads the variables that torchrun sets; `run_processes` is a small torchrun for one machine and its CPU, which
forks where it can and so starts within a tenth of a second. Both give a restarted process a clean table of addresses.
"""

import interrupts

import contextlib
import datetime
import itertools
import multiprocessing
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from data_parallel import COLLECTIVE_TIMEOUT, Team, rank_device
from workbench import check_range

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # 0, then 1 after the first restart
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True": whoever started us holds the table of addresses
GRACE = 2.0  # seconds in which the others may say how they ended, once one process has failed


# Meeting


def attempt() -> int:
    """How often these processes have been started before."""
    return int(os.environ.get(ATTEMPT, "0"))


def own_device(name: str = "auto") -> torch.device:
    """The device of this process: under torchrun that of its place, otherwise the CPU, as in `run_processes`."""
    return rank_device(name) if "LOCAL_RANK" in os.environ else torch.device("cpu")


@contextlib.contextmanager
def joined(timeout: datetime.timedelta = COLLECTIVE_TIMEOUT, apart: bool = True) -> Iterator[Team]:
    """Join the processes that were started with this one, while the block runs; yields the team.

    apart: every attempt has its own part of the table of addresses. torchrun keeps one table through all restarts;
    without a part of its own a restarted process finds the address at which its neighbour died, and tries to connect
    to it until the time is up. Raises ValueError if WORLD_SIZE is set and the other variables are not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    missing = [name for name in MEETING if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start several processes with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    we_hold = rank == 0 and os.environ.get(AGENT_STORE) != "True"
    store = dist.TCPStore(host, port, size, is_master=we_hold, timeout=timeout)
    if apart:
        store = dist.PrefixStore(f"attempt-{attempt()}", store)
    device, backend = own_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # counts and messages stay on the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield Team(rank, size)
    dist.barrier()  # whoever left before the others have connected would look dead to them
    dist.destroy_process_group()  # not after an exception: it may wait for the dead, and it hides the cause from them


# Failing on purpose


@dataclass(frozen=True)
class Fault:
    """What goes wrong on purpose, in one process, at one step of the first attempt."""

    kind: Literal["none", "kill", "raise", "exit", "hang"] = "none"
    rank: int = 1
    step: int = 1

    def strike(self, team: Team, step: int) -> None:
        """Fail, if it is time for it: die as of kill -9, raise, leave with exit code 3, or sleep for ever."""
        if self.kind == "none" or team.rank != self.rank or step != self.step or attempt():
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            sys.exit(3)
        while self.kind == "hang":
            time.sleep(1)
        raise RuntimeError(f"failing on purpose at step {step}")


# Starting processes on this machine


class ProcessFailed(RuntimeError):
    """A process of a team ended before its work: its rank, and why, in one line; all the others have been ended."""

    def __init__(self, rank: int, size: int, cause: str) -> None:
        super().__init__(f"process {rank} of {size} {cause}")
        self.rank, self.cause = rank, cause


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started on this machine."""

    size: int = 2  # processes
    timeout: float = 60.0  # seconds that a process waits for another one
    max_restarts: int = 0  # how often all are started again after one failed
    apart: bool = True  # every attempt has a table of addresses of its own; False shows why
    slow: float = 0.0  # seconds by which the last process joins later than the others after a restart

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)
        check_range(self, "timeout", above=0)
        check_range(self, "max_restarts", "slow", least=0)


def run_processes(worker: Callable, launch: LaunchConfig, *args: Any) -> list[Any]:
    """Call worker(team, *args) in `size` processes that can talk to each other, on the CPU; their results by rank.

    Results are tensors and plain values. When one process fails all others are ended, and everything starts again as
    often as max_restarts allows. Raises ProcessFailed with the first cause, or ValueError if the cause is one.
    """
    if launch.size == 1:
        return [worker(Team(), *args)]
    with address_table() as port:  # one for all attempts, as torchrun has it
        for number in itertools.count():
            try:
                return run_once(worker, launch, port, number, args)
            except ProcessFailed as failure:
                if number == launch.max_restarts:
                    raise
                print(f"{failure}; starting again ({number + 1} of {launch.max_restarts})", file=sys.stderr)


def start_method() -> str:
    """How processes start: forked; or afresh, some seconds slower, on Windows and where there is a GPU.

    With a GPU the backward pass has threads, and refuses to run in a process that was forked after they had started.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return "fork" if can_fork and not torch.cuda.is_available() else "spawn"


@contextlib.contextmanager
def address_table() -> Iterator[int]:
    """Within the block a process of its own holds the table of addresses at this port.

    Not this process: the table is served by a thread, and a process that is forked while a thread holds a lock waits
    for that lock for ever.
    """
    context = multiprocessing.get_context(start_method())
    ours, theirs = context.Pipe()
    host = context.Process(target=hold_table, args=(theirs,), daemon=True)
    host.start()
    theirs.close()  # ours alone now: should the host die before it speaks, waiting for it ends
    try:
        try:
            port = ours.recv()
        except EOFError:
            raise ProcessFailed(0, 1, "could not start: it was to hold the table of addresses") from None
        yield port
    finally:
        host.kill()
        host.join()


def hold_table(pipe: Connection) -> None:
    obey_starter_alone()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while True:
        time.sleep(60)


def obey_starter_alone() -> None:
    """In a process that was started here: Ctrl-C and a closed terminal are its starter's to answer; it dies with it.

    Forked processes hold the ends of the pipes by which those before them watch the starter, so the last one sees its
    death first, and the others one after the other.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    for number in (signal.SIGINT, *interrupts.ENDING):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def run_once(worker: Callable, launch: LaunchConfig, port: int, number: int, args: tuple) -> list[Any]:
    """One attempt: start all, wait until all are done or one failed, and leave no process behind."""
    context = multiprocessing.get_context(start_method())
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=member, args=(rank, worker, launch, port, number, Path(folder), args), daemon=True)
            for rank in range(launch.size)
        ]
        try:
            for process in processes:
                process.start()
            waiting = {process.sentinel: process for process in processes}
            while waiting:
                for sentinel in wait(list(waiting)):
                    process = waiting.pop(sentinel)
                    process.join()  # its pipe closes a moment before its exit code can be read
                    if process.exitcode:
                        raise first_failure(processes, Path(folder))
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(launch.size)]
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.kill()  # not terminate: a process inside a collective does not listen
            for process in processes:
                if process.pid is not None:
                    process.join()


def member(
    rank: int, worker: Callable, launch: LaunchConfig, port: int, number: int, folder: Path, args: tuple
) -> None:
    """The life of one process; what it returns or raises lies in the folder afterwards.

    It ends at once, without destructors: those of a broken group may wait for its dead, or end the process themselves.
    """
    obey_starter_alone()
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": launch.size, ATTEMPT: number, AGENT_STORE: True}
    place |= {"LOCAL_WORLD_SIZE": launch.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"CUDA_VISIBLE_DEVICES": ""}  # all compute on the CPU, however many GPUs there are
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        if number and rank == launch.size - 1:
            time.sleep(launch.slow)
        with joined(datetime.timedelta(seconds=launch.timeout), launch.apart) as team:
            result = worker(team, *args)
        torch.save(result, folder / f"{rank}.pt")
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as left:
        os._exit(left.code if isinstance(left.code, int) else 1)
    except Exception as error:
        text = " ".join(str(error).split())
        record = {"time": time.monotonic(), "kind": type(error).__name__, "text": text, "all": traceback.format_exc()}
        torch.save(record, folder / f"{rank}.error")
        os._exit(1)


def first_failure(processes: list, folder: Path) -> Exception:
    """The cause among the failures: a death without a word comes before what it made the others raise."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        time.sleep(0.02)
    said = {}
    for rank, process in enumerate(processes):
        if process.exitcode and (folder / f"{rank}.error").exists():
            said[rank] = torch.load(folder / f"{rank}.error", weights_only=True)
        elif process.exitcode:
            code = process.exitcode
            cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            return ProcessFailed(rank, len(processes), cause)
    rank = min(said, key=lambda rank: said[rank]["time"])
    first = said[rank]
    if first["kind"] == "ValueError":
        return ValueError(first["text"])
    return ProcessFailed(rank, len(processes), f"raised {first['kind']}: {first['text'][:300]}")


# What really left this process


def kernel_bytes_sent() -> int | None:
    """Payload bytes that this process's TCP connections have sent so far, as the kernel counts them; None if unknown.

    Retransmitted bytes count once. Linux 4.19 and later (struct tcp_info); shared memory and NVLink are not seen.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed in between, or no TCP
            continue
        if len(info) < 216:  # an older kernel
            continue
        sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
        total += sent - again
    return total or None


def settled_bytes_sent() -> int | None:
    """`kernel_bytes_sent` once it stands still: gloo's own thread may still be sending when a collective returns."""
    before = kernel_bytes_sent()
    for _ in range(100):
        time.sleep(0.01)
        now = kernel_bytes_sent()
        if now == before:
            break
        before = now
    return before
