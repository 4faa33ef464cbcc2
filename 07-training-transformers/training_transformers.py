"""Topic 07 - Training Transformers: the one training loop of the later topics, which a kill -9 only interrupts.

python 07-training-transformers/training_transformers.py                            # train, kill, go on; one minute
python 07-training-transformers/training_transformers.py train --data my_text.txt   # your own text, byte by byte
python 07-training-transformers/training_transformers.py --break mean-of-means      # a failure, measured
torchrun --nproc-per-node 2 07-training-transformers/training_transformers.py train # data parallel

Papers: Micikevicius et al. 2018 (arXiv 1710.03740), mixed precision and loss scaling; Chen et al. 2016 (arXiv
1604.06174), activation checkpointing; Pascanu et al. 2013 (arXiv 1211.5063), clipping; Polyak and Juditsky 1992,
averaging of the weights; Smith 2017 (arXiv 1506.01186), the range test.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoints import (
    STOPPING,
    Checkpoints,
    CsvLog,
    StopRequest,
    check_header,
    load_weights,
    rng_state,
    set_rng_state,
    stop_requests,
)
from data_parallel import Team, process_group, rank_device
from optimizers import OPTIMIZERS, SCHEDULES, build_optimizer, schedule_factor, set_learning_rates
from packing import Batch, PackedBatches, PackedTransformer, language_model_loss, to_device
from python_text import load_texts
from sequence_modeling import (
    BOS_ID,
    EOS_ID,
    FIRST_TOKENS,
    Vocabulary,
    bits_per_byte,
    device_of,
    document_batches,
    document_losses,
    floor_of,
    gap_to_floor,
)
from tiny_world import Document
from training_monitors import BlockMonitor
from transformer_architecture import ModelConfig, check_length, held_out_documents, start_as_identity, tiny_world
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    largest_difference,
    locked,
    pick_device,
    progress,
    run_verbs,
    save_figure,
    seed_everything,
    shown,
)

LossFn = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int]]  # sum of the losses, number of what was counted
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
N_BYTE_IDS = len(FIRST_TOKENS) + 256


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    batch_size: int = 8  # rows of an optimizer step, over all micro-batches and processes
    micro_batch_size: int = 0  # rows in one forward pass; 0: all that a process has
    seq_len: int = 64  # tokens in a row
    max_steps: int = 600  # optimizer steps; with --budget only the length that the schedule is written for
    optimizer: Literal[OPTIMIZERS] = "adamw"  # the rule that turns gradients into steps
    learning_rate: float = 7e-3  # the peak
    schedule: Literal[SCHEDULES] = "cosine"  # how the learning rate goes up and down
    warmup_steps: int = 50  # steps of rising learning rate
    cooldown_steps: int = 0  # last steps, in which it falls to the end
    min_lr_ratio: float = 0.05  # last learning rate, as a fraction of the peak
    weight_decay: float = 0.1  # of the matrices
    beta1: float = 0.9  # memory of the mean of the gradients
    beta2: float = 0.95  # memory of the mean of their squares
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the matrix products; weights and sums stay fp32
    loss_scale: float = 2.0**16  # first scale of the fp16 loss; it then adapts
    checkpoint_activations: bool = False  # keep only each block's input, compute the rest again
    ema_decay: float = 0.0  # average the weights with this memory and end with the average; 0: off
    compile: str = ""  # backend of torch.compile, such as inductor; empty: off
    budget: float = 0.0  # seconds of training after which to end; 0: end after max_steps
    clock: Literal["cpu", "wall"] = "wall"  # which seconds: of this process's CPU, or of the clock on the wall
    max_skipped_steps: int = 5  # steps in a row without a finite gradient, after which the run ends
    log_every: int = 10  # steps between rows of the log
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    save_every: int = 200  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep
    monitor: bool = False  # log gradient norm and relative update of every block
    tensorboard: bool = False  # also write the log for TensorBoard
    resume: bool = False  # go on from the newest checkpoint

    def __post_init__(self) -> None:
        names = ("batch_size", "seq_len", "max_steps", "max_skipped_steps", "log_every", "save_every", "keep_last")
        check_range(self, *names, least=1)
        check_range(self, "micro_batch_size", "warmup_steps", "cooldown_steps", "eval_every", least=0)
        check_range(self, "grad_clip", "budget", "weight_decay", least=0)
        check_range(self, "learning_rate", "loss_scale", above=0)
        check_range(self, "ema_decay", "beta1", "beta2", least=0, below=1)
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", DTYPES), ("clock", CLOCKS)):
            check_name(name, getattr(self, name), known)
        self.factor(0)
        if self.budget and self.resume:
            raise ValueError("a run with a time budget cannot resume: its schedule depends on the clock; use max_steps")

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of one optimizer step in one process."""
        return math.ceil(self.batch_size / self.micro_batch_size) if self.micro_batch_size else 1

    def factor(self, step: float) -> float:
        """Share of the peak learning rate at an optimizer step, counted from 0."""
        settings = (self.max_steps, self.warmup_steps, self.cooldown_steps, self.min_lr_ratio)
        return schedule_factor(self.schedule, step, *settings)


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on."""

    data: str = "tiny-world"  # tiny-world, python-text, a text file, or a data set on the Hugging Face Hub
    n_documents: int = 500  # held-out documents to examine the model with

    def __post_init__(self) -> None:
        check_range(self, "n_documents", least=2)


MAY_CHANGE = (  # settings that a resumed run may have otherwise: the last three change rounding at most
    *("resume", "save_every", "keep_last", "tensorboard"),
    *("micro_batch_size", "checkpoint_activations", "compile"),
)


# Mixed precision: a loss scale that keeps small fp16 gradients above the smallest number


class LossScaler:
    """Multiply the loss so that small gradients survive fp16; find the factor by trial (Micikevicius et al. 2018, 3.2).

    An overflow skips the step and halves the scale; growth_interval steps without one double it, up to the largest
    number of float32. Raises ValueError for a scale <= 0 and for factors that do not grow and shrink it.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale, self.n_good = scale, 0
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        check_range(self, "scale", above=0)
        check_range(self, "growth_factor", above=1)
        check_range(self, "backoff_factor", above=0, below=1)
        check_range(self, "growth_interval", least=1)

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step."""
        self.n_good = 0 if overflow else self.n_good + 1
        if overflow:
            self.scale *= self.backoff_factor
        elif self.n_good == self.growth_interval:
            grown, self.n_good = self.scale * self.growth_factor, 0
            self.scale = grown if grown <= torch.finfo(torch.float32).max else self.scale

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "n_good": self.n_good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.n_good = state["scale"], state["n_good"]


# Activation checkpointing and the average of the weights, both from outside the model


def checkpoint_activations(model: nn.Module) -> int:
    """Let every block of the model keep only its input, and compute the rest again in the backward pass.

    Chen et al. 2016: memory for the activations of one block instead of all, for one more forward pass. A block is a
    member of an nn.ModuleList called "blocks". Random numbers are drawn again alike, so dropout and gradients do not
    change. Returns the number of blocks; calling twice changes nothing. Raises ValueError if there is none.
    """
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    blocks = [block for blocks in lists for block in blocks]
    if not blocks:
        raise ValueError("checkpoint_activations found no nn.ModuleList called 'blocks' in the model; name it so")
    for block in blocks:
        if not isinstance(block.forward, functools.partial):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)


class EMA:
    """A running average of a model's weights: decay * average + (1 - decay) * weights after every step.

    The first update copies the weights. About the last 1 / (1 - decay) steps count, so choose a decay that makes this
    a tenth of the run or less. Raises ValueError unless 0 <= decay <= 1, and for a model with other weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.n_updates = decay, 0
        check_range(self, "decay", least=0, most=1)
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        current = model.state_dict()
        if {name: tensor.shape for name, tensor in current.items()} != self.shapes():
            raise ValueError("the model has other weights than the one that the average was made of")
        for name, average in self.weights.items():
            if self.n_updates and average.is_floating_point():
                average.lerp_(current[name], 1 - self.decay)
            else:
                average.copy_(current[name])
        self.n_updates += 1

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.weights.items()}

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "n_updates": self.n_updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.n_updates = state["decay"], state["n_updates"]
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])


# One step


def backward_in_parts(
    model: nn.Module, batch: Batch, loss_fn: LossFn, config: TrainConfig, scale: float
) -> tuple[float, float]:
    """Add the gradients of scale * (sum of the losses) of every micro-batch to .grad; return that sum and the count.

    Sums, not means: the mean over the tokens of a step is then one division at the end. A mean of the micro-batches'
    means would give a token in a short micro-batch more weight than one in a long one.
    """
    device, total, n_counted = device_of(model), 0.0, 0.0
    size = config.micro_batch_size or config.batch_size
    for start in range(0, len(next(iter(batch.values()))), size):
        part = to_device({name: tensor[start : start + size] for name, tensor in batch.items()}, device)
        with torch.autocast(device.type, DTYPES[config.dtype], enabled=config.dtype != "fp32"):
            loss, count = loss_fn(model, part)
        if (count := float(count)) > 0:
            (loss * scale).backward()
            total, n_counted = total + loss.item(), n_counted + count
    return total, n_counted


def gradient_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm of all gradients together; one that is not finite makes it so."""
    return torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else 0.0


def clip_gradients(gradients: list[Tensor], max_norm: float) -> float:
    """Shorten all gradients together to `max_norm` if they are longer (Pascanu et al. 2013); return the norm before.

    A norm that is not finite changes nothing: dividing by it would turn every gradient into 0 or NaN. Raises ValueError
    for a max_norm below 0, which would turn the gradients around.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be >= 0, got {max_norm}")
    norm = gradient_norm(gradients)
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def first_broken(model: nn.Module) -> str:
    """Name of the first parameter whose value or gradient is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights of {name} are not finite"
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"first in {name}"
    return "all gradients are finite"


class TrainingState:
    """All that decides how a run goes on: weights, optimizer, average, loss scale and counters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.scaler = LossScaler(config.loss_scale) if config.dtype == "fp16" else None
        self.step, self.n_skipped, self.skipped_in_a_row = 0, 0, 0

    @property
    def scale(self) -> float:
        return self.scaler.scale if self.scaler else 1.0

    def average_gradients(self, divisor: float) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / divisor)

    def take_step(self, loss: float, n_counted: float) -> float:
        """Clip and step, or skip the step if nothing was counted or loss or gradient is not finite; return the norm.

        A skipped step leaves weights, optimizer and average as they are. Raises ValueError after max_skipped_steps in a
        row. An overflow of fp16 gradients is not counted: it only lowers the loss scale, until that is at its end.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = clip_gradients(gradients, self.config.grad_clip or math.inf)
        overflow = self.scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        if n_counted and math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
            self.skipped_in_a_row = 0
        else:
            self.n_skipped += 1
            self.skipped_in_a_row += not overflow or self.scale <= 1
            self.complain(loss, norm, n_counted)
        if self.scaler:
            self.scaler.update(overflow)
        self.step += 1
        return norm

    def complain(self, loss: float, norm: float, n_counted: float) -> None:
        if not self.skipped_in_a_row:
            return
        what = f"the loss is {loss} at step {self.step + 1} (gradient norm {norm}, {first_broken(self.model)})"
        if not n_counted:
            what = f"no token is counted at step {self.step + 1}"
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            remedy = (
                "lower --learning-rate, lengthen --warmup-steps or lower --grad-clip" if n_counted else "see the data"
            )
            raise ValueError(f"{what}; {self.skipped_in_a_row} steps in a row had to be skipped; {remedy}")
        print(f"warning: {what}; the step is skipped", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the random numbers, in parts for `Checkpoints.save`; small things are one part, "run"."""
        run = {"n_skipped": self.n_skipped, "skipped_in_a_row": self.skipped_in_a_row}
        run |= {"scaler": self.scaler.state_dict()} if self.scaler else {}
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "run": run}
        return parts | ({"ema": self.ema.state_dict()} if self.ema else {})

    def load_state_dict(self, parts: dict[str, Any]) -> None:
        load_weights(self.model, parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        if self.ema:
            self.ema.load_state_dict(parts["ema"])
        if self.scaler:
            self.scaler.load_state_dict(parts["run"]["scaler"])
        self.step = parts["step"]
        self.n_skipped, self.skipped_in_a_row = parts["run"]["n_skipped"], parts["run"]["skipped_in_a_row"]


# The loop


def fit(
    model: nn.Module,
    batches: Callable[[int], Batch] | Iterator[Batch],
    loss_fn: LossFn,
    config: TrainConfig,
    *,
    out: Path | None = None,
    header: dict[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[float], float] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    floor: float | None = None,
) -> list[dict[str, float]]:
    """Train a model on its own device; return the rows of the log, those of before a resume included.

    batches: `batches(step)` gives the batch of an optimizer step, counted from 0, as a dict of tensors with the rows
        first; a pure function of the step needs no stored position. Or an iterator, which can resume if it has
        `state_dict` and `load_state_dict`.
    loss_fn: `loss_fn(model, batch)` gives the sum of the losses and the number of tokens (or rows) that it adds up.
    out: folder for checkpoints and log.csv; None writes nothing. header: plain settings stored with each checkpoint,
        which a resumed run must have again.
    schedule: share of the full learning rate at a step, in place of the config's. evaluate: numbers for the log, from
        the averaged weights if there is an average; it cannot disturb the training. floor: the best possible loss.

    With torchrun (see `process_group`) each process takes its share of the rows. SIGTERM, Ctrl-C and a closed terminal
    save and leave after the step at hand. Every number in a row is nats per token, a norm or a count; `loss` is that of
    the batch. Raises ValueError for a batch without rows, a folder in use or of another run, and a run that diverged.
    """
    team = Team.here()
    if config.budget and team.size > 1:
        raise ValueError(f"a time budget needs one process, there are {team.size}: their clocks differ; use max_steps")
    if config.checkpoint_activations:
        checkpoint_activations(model)
    optimizer = optimizer or build_optimizer(
        model, config.optimizer, config.learning_rate, config.weight_decay, config.beta1, config.beta2
    )
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
    state = TrainingState(model, optimizer, config)
    signums = STOPPING if out else ()  # with nothing to save, Ctrl-C may end at once
    with Keeper(out, config, header or {}, team) as keeper, stop_requests(signums) as stop:
        team.start_alike(model)
        keeper.start(state, batches)
        train_steps(state, batches, loss_fn, keeper, stop, schedule or config.factor, evaluate, floor)
    if state.ema:
        model.load_state_dict(state.ema.weights)
    return keeper.log.rows


def going_on(config: TrainConfig, out: Path | None) -> TrainConfig:
    """The settings of a run that goes on from the last checkpoint in `out`, if there is one, without being told."""
    return dataclasses.replace(config, resume=bool(out and Checkpoints(out).steps()))


def train_steps(
    state: TrainingState,
    batches: Callable[[int], Batch] | Iterator[Batch],
    loss_fn: LossFn,
    keeper: "Keeper",
    stop: StopRequest,
    schedule: Callable[[float], float],
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    floor: float | None,
) -> None:
    """The loop of `fit`: one turn is one optimizer step."""
    config, model, optimizer, team = state.config, state.model, state.optimizer, keeper.team
    run_model = compiled(model, config.compile) if config.compile else model
    now, spent, done = CLOCKS[config.clock], 0.0, not config.budget and state.step >= config.max_steps
    bar = keeper.bar(state.step)
    model.train()
    while not done:
        before = now()
        position = config.max_steps * spent / config.budget if config.budget else state.step
        set_learning_rates(optimizer, schedule(position))
        batch = next_batch(batches, state.step)
        n_rows = len(next(iter(batch.values())))
        scale = state.scale / n_rows  # sums of losses grow with the rows, fp16's range does not
        optimizer.zero_grad(set_to_none=True)
        total, n_counted = backward_in_parts(run_model, team.rows_of(batch), loss_fn, config, scale)
        team.add_gradients(state.parameters)
        total, n_counted, stopping = team.add_up(total, n_counted, bool(stop.signum))
        loss = total / n_counted if n_counted else 0.0
        state.average_gradients(scale * max(n_counted, 1))
        due = (state.step + 1) % config.log_every == 0 or state.step + 1 == config.max_steps
        monitor = BlockMonitor(model) if config.monitor and due else None
        norm = state.take_step(loss, n_counted)
        spent += now() - before
        done = spent >= config.budget if config.budget else state.step >= config.max_steps

        row = {"step": state.step, "loss": loss, "n_counted": int(n_counted), "grad_norm": norm}
        row |= {"learning_rate": optimizer.param_groups[0]["lr"], "n_skipped": state.n_skipped}
        row |= {"loss_scale": state.scale} if state.scaler else {}
        row |= monitor.report(model) if monitor else {}
        if evaluate and team.rank == 0 and (done or (config.eval_every and state.step % config.eval_every == 0)):
            row |= evaluated(state, evaluate)
            due = True
        keeper.show(bar, row, floor)
        if due or done:
            keeper.add(row)
        if done or stopping or state.step % config.save_every == 0:
            keeper.save(state, batches)
        if stopping and not done:
            keeper.leave(stop, state.step)
    bar.close()


def compiled(model: nn.Module, backend: str) -> Callable:
    try:
        return torch.compile(model, backend=backend)
    except RuntimeError as error:
        raise ValueError(f"compile={backend!r} is no backend of torch.compile ({error}); try inductor") from None


def next_batch(batches: Callable[[int], Batch] | Iterator[Batch], step: int) -> Batch:
    """The batch of a step. Raises ValueError if the data ended, or if the tensors have different numbers of rows."""
    batch = batches(step) if callable(batches) else next(batches, None)
    if not batch:
        raise ValueError(f"the data ended after {step} batches; lower max_steps or give more")
    n_rows = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(n_rows.values())) > 1 or 0 in n_rows.values():
        raise ValueError(f"all tensors of a batch need the same rows, at least 1, on their first axis; got {n_rows}")
    return batch


def evaluated(state: TrainingState, evaluate: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
    """Evaluate without dropout, with the averaged weights if there are any, and leave no trace in the training."""
    kept = rng_state()
    with state.ema.applied(state.model) if state.ema else contextlib.nullcontext():
        state.model.eval()
        numbers = evaluate(state.model)
    state.model.train()
    set_rng_state(kept)
    return numbers


class Keeper:
    """What a run leaves in its folder: checkpoints, log.csv and TensorBoard's files; without a folder only the rows.

    Rank 0 alone writes. Holds the lock of the folder while the run lasts, so that two runs cannot mix.
    """

    def __init__(self, out: Path | None, config: TrainConfig, header: dict[str, Any], team: Team) -> None:
        self.out, self.config, self.team = out, config, team
        self.header = {**header, "train_config": asdict(config)}
        self.checkpoints = Checkpoints(out, config.keep_last) if out else None
        self.log, self.writer, self.stack = CsvLog(None), None, contextlib.ExitStack()
        self.n_shown, self.started = 0, time.perf_counter()

    def __enter__(self) -> "Keeper":
        if self.out and self.team.rank == 0:
            self.stack.enter_context(locked(self.out))
            if self.config.tensorboard:
                self.writer = summary_writer(self.out / "tensorboard")
        return self

    def __exit__(self, *exc_info) -> None:
        if self.writer:
            self.writer.close()
        self.stack.close()

    def start(self, state: TrainingState, batches: Any) -> None:
        """Go on from the newest checkpoint if that is wanted. Raises ValueError if the folder has another run's."""
        if self.config.resume:
            if not self.checkpoints:
                raise ValueError("resume needs a folder with checkpoints; give --out")
            parts = self.checkpoints.load()
            if absent := [name for name in ("model", "optimizer", "run") if name not in parts]:
                raise ValueError(
                    f"step {parts['step']} in {shown(self.out)} has no part {', '.join(absent)}; train again"
                )
            check_header(parts["run"]["header"], self.header, MAY_CHANGE)
            state.load_state_dict(parts)
            if not callable(batches):
                if not hasattr(batches, "load_state_dict"):
                    raise ValueError("an iterator without load_state_dict cannot resume; give batches as a function")
                batches.load_state_dict(parts["run"]["data"])
            rngs = parts["run"]["rng"]
            if self.team.rank < len(rngs):
                set_rng_state(rngs[self.team.rank])
        elif self.checkpoints and self.checkpoints.steps():
            raise ValueError(
                f"{shown(self.out)} has checkpoints of an earlier run, up to step {self.checkpoints.steps()[-1]}; "
                "go on with --resume, or choose another --out"
            )
        if self.out and self.team.rank == 0:
            self.checkpoints.sweep()
            digest = parts["run"].get("log") if self.config.resume else None
            self.log = CsvLog(self.out / "log.csv", state.step, digest)

    def add(self, row: dict[str, float]) -> None:
        """One more row for the log."""
        if self.team.rank == 0 or not self.out:
            self.log.add(row)
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["step"])

    def save(self, state: TrainingState, batches: Any) -> None:
        """A checkpoint of this moment; every process must call, rank 0 writes."""
        if not self.checkpoints:
            return
        rngs = self.team.gather(rng_state())
        if self.team.rank == 0:
            parts = state.state_dict()
            parts["run"] |= {"header": self.header, "rng": rngs, "log": self.log.digest()}
            parts["run"] |= {"data": batches.state_dict()} if hasattr(batches, "state_dict") else {}
            self.log.sync()
            self.checkpoints.save(state.step, parts)

    def leave(self, stop: StopRequest, step: int) -> None:
        """End as the signal asked: KeyboardInterrupt for Ctrl-C, code 143 for SIGTERM, 129 for a closed terminal."""
        signum = stop.signum or signal.SIGTERM  # another process of the team got it
        if self.team.rank == 0:
            name = signal.Signals(signum).name
            with contextlib.suppress(OSError):  # nobody reads it: the terminal was closed
                how = "to go on, give the same command, with --resume if it has that flag"
                print(f"\n{name}: saved step {step} in {shown(self.out)}; {how}", file=sys.stderr)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def bar(self, first: int) -> tqdm:
        total = None if self.config.budget else self.config.max_steps
        bar = progress(None, "train", total)
        bar.disable = bar.disable or self.team.rank > 0
        bar.update(first)
        return bar

    def show(self, bar: tqdm, row: dict[str, float], floor: float | None) -> None:
        """The progress bar: loss, its distance from the floor, and tokens per second since the start."""
        self.n_shown += row["n_counted"]
        facts = {"loss": f"{row['loss']:.3f}", "tok/s": f"{self.n_shown / (time.perf_counter() - self.started):,.0f}"}
        facts |= {"gap": f"{row['loss'] - floor:+.3f}"} if floor is not None else {}
        bar.set_postfix(facts, refresh=False)
        bar.update()


def summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs a package: pip install tensorboard; log.csv has the same numbers"
        ) from None
    return SummaryWriter(folder)


# Batches that depend on the step alone


class WorldBatches:
    """Rows packed with fresh documents of TinyWorld's train split, as in topic 04, without end.

    `batches(step)` gives inputs and targets, each (batch, seq). The model may look across documents in a row.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        self.sizes, self.seed = (config.batch_size, config.seq_len), seed

    def __call__(self, step: int) -> Batch:
        world, vocabulary = tiny_world()
        documents = world.stream((self.seed << 32) + step, split="train")
        inputs, targets = next(document_batches(documents, vocabulary, *self.sizes, self.seed))
        return {"inputs": inputs, "targets": targets}


# What to train on


class Task(NamedTuple):
    """A language to learn: its batches, and what a model of it is worth."""

    vocab_size: int
    batches: Callable[[int], Batch]
    evaluate: Callable[[nn.Module], dict[str, float]]
    floor: float | None  # entropy of the language in nats per token, where it is known


def load_task(data: DataConfig, config: TrainConfig, seed: int, max_seq_len: int) -> Task:
    """TinyWorld in words, always fresh, with its exact entropy; or any texts in bytes, packed with document masks.

    Raises ValueError for data that cannot be read, and for rows longer than the model.
    """
    if data.data == "tiny-world":
        vocabulary, held_out = tiny_world()[1], held_out_documents(data.n_documents)
        longest = max(config.seq_len, *(len(document.tokens) for document in held_out))
        check_length(longest, 0, max_seq_len)
        return Task(
            len(vocabulary),
            WorldBatches(config, seed),
            lambda model: world_losses(model, held_out, vocabulary),
            floor_of(held_out),
        )
    check_length(config.seq_len, 0, max_seq_len)
    train, held_out = ([byte_ids(text) for text in load_texts(data.data, side)] for side in ("train", "validation"))
    held_out = held_out[: data.n_documents]
    examined = PackedBatches(held_out, min(16, len(held_out)), config.seq_len, seed=0)
    return Task(
        N_BYTE_IDS,
        PackedBatches(train, config.batch_size, config.seq_len, seed),
        lambda model: text_losses(model, examined, sum(len(ids) - 2 for ids in held_out)),
        None,
    )


def byte_ids(text: str) -> list[int]:
    """<bos>, a number for each byte in UTF-8, <eos>."""
    return [BOS_ID, *(len(FIRST_TOKENS) + byte for byte in text.encode()), EOS_ID]


def world_losses(model: nn.Module, documents: list[Document], vocabulary: Vocabulary) -> dict[str, float]:
    """Held-out nats per token, what of it lies above the documents' own entropy, and the standard error of that."""
    nats = document_losses(model, documents, vocabulary)
    gap, standard_error = gap_to_floor(nats, documents)
    return {"held_out": floor_of(documents) + gap, "gap": gap, "gap_error": standard_error}


@torch.no_grad()
def text_losses(model: nn.Module, batches: PackedBatches, n_bytes: int) -> dict[str, float]:
    """Held-out nats per token, and bits per byte, <eos> included; a long text is read in pieces without context."""
    nats, n_tokens = 0.0, 0
    for step in range(batches.order.n_batches):
        loss, count = language_model_loss(model, batches(step))
        nats, n_tokens = nats + loss.item(), n_tokens + int(count)
    return {"held_out": nats / n_tokens, "bits_per_byte": bits_per_byte(nats, n_bytes)}


# The verbs


def train(model_config: ModelConfig, data: DataConfig, config: TrainConfig, run: RunConfig) -> None:
    """Train a language model on TinyWorld or on your own text; save checkpoints and go on from them."""
    with process_group():
        _, rows = train_model(model_config, data, config, run)
        if Team.here().rank == 0:
            print_result(rows[-1], run.out)


def train_model(
    model_config: ModelConfig, data: DataConfig, config: TrainConfig, run: RunConfig
) -> tuple[PackedTransformer, list[dict[str, float]]]:
    """Train, with checkpoints in run.out; return the model and the rows of the log."""
    seed_everything(run.seed)
    task = load_task(data, config, run.seed, model_config.max_seq_len)
    model = PackedTransformer(model_config, task.vocab_size)
    start_as_identity(model)
    header = {"model_config": asdict(model_config), "data": asdict(data), "seed": run.seed}
    model.to(rank_device(run.device))
    rows = fit(
        *(model, task.batches, language_model_loss, config),
        out=run.out,
        header={**header, "vocab_size": task.vocab_size},
        evaluate=task.evaluate,
        floor=task.floor,
    )
    return model, rows


def print_result(row: dict[str, float], out: Path) -> None:
    if "gap" in row:
        chance = math.log(len(tiny_world()[1]))
        print(
            f"held-out loss {row['held_out']:.4f} nats per token, {row['gap']:.4f} ± {row['gap_error']:.4f} above the "
            f"entropy floor {row['held_out'] - row['gap']:.4f} (uniform guessing: {chance:.3f})"
        )
    else:
        print(
            f"held-out loss {row['held_out']:.4f} nats per token, {row['bits_per_byte']:.3f} bits per byte "
            f"(uniform guessing over {N_BYTE_IDS} ids: {math.log2(N_BYTE_IDS):.3f})"
        )
    print(f"checkpoints and log.csv are in {shown(out)}")


def evaluate(run: RunConfig) -> None:
    """Examine the newest checkpoint in --out on the held-out side of its own data."""
    folder = Checkpoints(run.out)
    parts = folder.load(("run", "model"))
    header = parts["run"]["header"]
    config = TrainConfig(**header["train_config"])
    task = load_task(DataConfig(**header["data"]), config, header["seed"], header["model_config"]["max_seq_len"])
    model = PackedTransformer(ModelConfig(**header["model_config"]), header["vocab_size"])
    if config.ema_decay:
        parts = folder.load(("run", "ema"))
    load_weights(model, parts["ema"]["weights"] if config.ema_decay else parts["model"])
    print(f"step {parts['step']} of {config.max_steps}")
    print_result(task.evaluate(model.to(pick_device(run.device)).eval()), run.out)


BREAK_NAMES = (  # the keys of BREAKS in training_failures, which measures them
    *("schedule-per-micro-batch", "mean-of-means", "step-per-micro-batch", "norm-after-zero-grad"),
    *("decay-layernorm", "no-bias-correction"),
)


@dataclass(frozen=True)
class BreakConfig:
    """Which failure the demo switches on."""

    break_: Literal["none", *BREAK_NAMES] = "none"  # the failure to show


@alone
def demo(broken: BreakConfig, model_config: ModelConfig, data: DataConfig, config: TrainConfig, run: RunConfig) -> None:
    """Train a language model; then train it again, kill it with SIGKILL on the way, let it go on, and compare."""
    if broken.break_ != "none":
        from training_failures import BREAKS  # here, because it imports this module

        measure, n_trainings = BREAKS[broken.break_]
        announce(f"showing the failure {broken.break_!r}", 5 + 0.006 * n_trainings * config.max_steps)
        for what, sound, wrong in measure(model_config, config, run):
            print(f"{what}: {sound:.4f} as it should be, {wrong:.4f} with --break {broken.break_}")
        return
    config = dataclasses.replace(config, resume=False)
    announce(f"training a small language model for {config.max_steps} steps, twice", 50)
    whole, killed = (dataclasses.replace(run, out=run.out / name) for name in ("demo-whole", "demo-killed"))
    for folder in (whole.out, killed.out):
        shutil.rmtree(folder, ignore_errors=True)
    model, rows = train_model(model_config, data, config, whole)
    print_result(rows[-1], whole.out)
    command = [sys.executable, __file__, "train", *flags(model_config, data, config, killed)]
    child, folder = subprocess.Popen(command, stderr=subprocess.DEVNULL), Checkpoints(killed.out)
    try:
        while child.poll() is None and not folder.steps():
            time.sleep(0.01)
        time.sleep(0.2)  # somewhere behind the first checkpoint
    finally:
        child.kill()
        child.wait()
    if not folder.steps():
        raise ValueError(f"the second run ended before its first checkpoint; try it alone: {' '.join(command)}")
    print(f"killed the second run; it had saved step {folder.steps()[-1]}")
    again, _ = train_model(model_config, data, dataclasses.replace(config, resume=True), killed)
    same = largest_difference(dict(again.state_dict()), dict(model.state_dict())) == 0
    same_log = (killed.out / "log.csv").read_bytes() == (whole.out / "log.csv").read_bytes()
    print(f"it went on to step {config.max_steps}; weights bit for bit equal: {same}; logs byte for byte: {same_log}")


def flags(*configs: Any) -> list[str]:
    """The command-line flags that give these configs."""
    given = []
    for name, value in ((name, value) for config in configs for name, value in vars(config).items()):
        flag = name.replace("_", "-")
        given += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return given


# The learning-rate range test


def range_test(
    model: nn.Module,
    batches: Callable[[int], Batch],
    loss_fn: LossFn,
    config: TrainConfig,
    lowest: float = 1e-5,
    highest: float = 1.0,
) -> tuple[list[float], list[float], float]:
    """Train a copy of the model for config.max_steps steps while the learning rate grows by equal factors (Smith 2017).

    Returns the rates, the loss at each, and a rate to start from: a tenth of the one at which the smoothed loss is
    lowest, because there the next steps already undo what the last ones gained. An overflow counts as infinity.
    """
    if not 0 < lowest < highest < math.inf:
        raise ValueError(f"the range test needs 0 < lowest < highest, got {lowest} and {highest}")
    n_steps = config.max_steps
    config = dataclasses.replace(
        config, learning_rate=highest, max_skipped_steps=n_steps + 1, log_every=1, dtype="fp32"
    )
    growth = (highest / lowest) ** (1 / max(1, n_steps - 1))
    rows = fit(copy.deepcopy(model), batches, loss_fn, config, schedule=lambda step: lowest / highest * growth**step)
    rates, losses = [row["learning_rate"] for row in rows], [row["loss"] for row in rows]
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    smoothed = list(itertools.accumulate(losses, lambda mean, loss: 0.8 * mean + 0.2 * loss))
    return rates, losses, rates[smoothed.index(min(smoothed))] / 10


def plot_range(rates: list[float], losses: list[float], suggested: float) -> Figure:
    """Loss against the learning rate of its step, and the suggested rate."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.plot(rates, losses)
    axis.axvline(suggested, color="black", ls="--", label=f"suggested: {suggested:.2g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)", ylim=(0, 1.3 * losses[0]))
    axis.legend(frameon=False)
    return figure


@dataclass(frozen=True)
class RangeConfig:
    """The range of the learning-rate test."""

    lowest: float = 1e-5  # learning rate of the first step
    highest: float = 1.0  # learning rate of the last step
    n_steps: int = 150  # steps from the lowest to the highest

    def __post_init__(self) -> None:
        check_range(self, "lowest", "highest", above=0)
        check_range(self, "n_steps", least=10)


def find_rate(
    span: RangeConfig, model_config: ModelConfig, data: DataConfig, config: TrainConfig, run: RunConfig
) -> None:
    """Find a learning rate: raise it step by step until the loss grows, and draw the curve."""
    announce(f"{span.n_steps} steps with a growing learning rate", 10)
    seed_everything(run.seed)
    task = load_task(data, config, run.seed, model_config.max_seq_len)
    model = PackedTransformer(model_config, task.vocab_size).to(pick_device(run.device))
    start_as_identity(model)
    config = dataclasses.replace(config, max_steps=span.n_steps, warmup_steps=0, cooldown_steps=0, schedule="constant")
    rates, losses, suggested = range_test(model, task.batches, language_model_loss, config, span.lowest, span.highest)
    save_figure(plot_range(rates, losses, suggested), run.out / "range.svg")
    print(f"loss {losses[0]:.3f} at the start, lowest {min(losses):.3f}; start from --learning-rate {suggested:.2g}")


def main(argv: list[str] | None = None) -> None:
    from speedrun import SpeedrunConfig, speedrun  # here, because they import this module, or one that does
    from training_experiments import FiguresConfig, figures
    from training_speed import BenchConfig, bench

    training = (ModelConfig, DataConfig, TrainConfig, RunConfig)
    verbs = {
        "demo": (demo, BreakConfig, *training),
        "train": (train, *training),
        "evaluate": (evaluate, RunConfig),
        "range": (find_rate, RangeConfig, *training),
        "speedrun": (speedrun, SpeedrunConfig, RunConfig),
        "bench": (bench, BenchConfig, ModelConfig, TrainConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
