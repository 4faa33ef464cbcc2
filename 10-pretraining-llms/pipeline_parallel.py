"""Topic 10 - Pipeline Parallel: a model cut into stages, GPipe and 1F1B of PyTorch, and a simulator of both.

torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py parallel --scheme 1f1b

Huang et al. 2019 (GPipe, arXiv 1811.06965), Narayanan et al. 2021 (1F1B and its bubble, arXiv 2104.04473).
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from data_parallel import Team
from manual_parallel import check_alike, check_counted, check_norm
from modern_llm_architectures import CausalLM
from optimizers import AdamW, parameter_groups, state_bytes
from packing import IGNORE, Batch
from training_transformers import TrainConfig
from workbench import check_name

Event = tuple[str, int]  # "F" or "B", and the number of the micro-batch
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


# The simulator


def order_of(schedule: str, stage: int, n_stages: int, n_micro: int) -> list[Event]:
    """What a stage does, one after the other.

    gpipe: all forward passes, then all backward passes. 1f1b: as many forward passes as stages lie behind it, itself
    included, then a backward and a forward pass in turns, so that never more activations wait than there are stages.
    """
    check_name("schedule", schedule, SCHEDULES)
    if schedule == "gpipe":
        return [("F", i) for i in range(n_micro)] + [("B", i) for i in range(n_micro)]
    ahead = min(n_micro, n_stages - stage)
    events: list[Event] = [("F", i) for i in range(ahead)]
    for done in range(n_micro):
        events.append(("B", done))
        if ahead + done < n_micro:
            events.append(("F", ahead + done))
    return events


@dataclass(frozen=True)
class Timetable:
    """When each stage does what: times[stage] maps an event to (start, end), in units of one forward pass."""

    times: list[dict[Event, tuple[int, int]]]

    @property
    def length(self) -> int:
        return max(end for stage in self.times for _, end in stage.values())

    @property
    def bubble(self) -> Fraction:
        """Share of the time of all stages together in which a stage waits."""
        busy = sum(end - start for stage in self.times for start, end in stage.values())
        return 1 - Fraction(busy, self.length * len(self.times))

    def peak(self, stage: int) -> int:
        """The most micro-batches whose activations a stage holds at once, between their forward and backward pass."""
        return peak_of(list(self.times[stage]))


def peak_of(events: list[Event]) -> int:
    held = peak = 0
    for kind, _ in events:
        held += 1 if kind == "F" else -1
        peak = max(peak, held)
    return peak


def simulate(schedule: str, n_stages: int, n_micro: int, forward: int = 1, backward: int = 2) -> Timetable:
    """Run a schedule on paper: a stage starts its next event when it is free and its input is there.

    F i needs F i of the stage before, B i needs B i of the stage behind; sending takes no time. A backward pass has
    two matrix products for each of the forward pass, hence 2. Raises ValueError for counts below 1.
    """
    if min(n_stages, n_micro, forward, backward) < 1:
        raise ValueError(f"stages, micro-batches and times must be >= 1, got {(n_stages, n_micro, forward, backward)}")
    orders = [order_of(schedule, stage, n_stages, n_micro) for stage in range(n_stages)]
    times: list[dict[Event, tuple[int, int]]] = [{} for _ in range(n_stages)]
    while any(len(times[stage]) < len(orders[stage]) for stage in range(n_stages)):
        for stage in range(n_stages):
            while len(times[stage]) < len(orders[stage]):
                event = orders[stage][len(times[stage])]
                source = stage - 1 if event[0] == "F" else stage + 1
                outside = not 0 <= source < n_stages
                if not outside and event not in times[source]:
                    break
                free = max((end for _, end in times[stage].values()), default=0)
                ready = 0 if outside else times[source][event][1]
                start = max(free, ready)
                times[stage][event] = (start, start + (forward if event[0] == "F" else backward))
    return Timetable(times)


def bubble_share(n_stages: int, n_micro: int) -> float:
    """(p - 1) / (m + p - 1): the first micro-batch takes p - 1 turns to arrive, the last as many to come back."""
    return (n_stages - 1) / (n_micro + n_stages - 1)


def plot_timetables(tables: dict[str, Timetable]) -> Figure:
    """Each stage's forward and backward passes over time, one axis for each schedule."""
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, 1.9 * len(tables)), sharex=True, squeeze=False)
    for axis, (name, table) in zip(axes[:, 0], tables.items(), strict=True):
        for stage, events in enumerate(table.times):
            for (kind, micro), (start, end) in events.items():
                colour = "#56B4E9" if kind == "F" else "#E69F00"
                axis.barh(stage, end - start, left=start, color=colour, edgecolor="white")
                axis.text((start + end) / 2, stage, str(micro), ha="center", va="center", fontsize=7)
        axis.set(ylabel="stage", yticks=range(len(table.times)), title=f"{name}: bubble {float(table.bubble):.0%}")
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("time (forward passes of one micro-batch); blue forward, orange backward")
    return figure


# The stages of a model


class Stage(nn.Module):
    """Blocks first to last - 1 of a model, with the embedding before or the head behind where they belong.

    Shapes: token_ids (batch, seq) for the first stage, otherwise the stream (batch, seq, d_model); the last stage gives
    logits (batch, seq, vocab), the others the stream. Parameters keep the names that they have in the whole model.
    """

    def __init__(self, model: CausalLM, stage: int, n_stages: int) -> None:
        super().__init__()
        bounds = [round(index * model.config.n_layers / n_stages) for index in range(n_stages + 1)]
        chosen = range(bounds[stage], bounds[stage + 1])
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in chosen})
        self.token_emb = model.token_emb if stage == 0 else None
        self.final_norm, self.lm_head = (model.final_norm, model.lm_head) if stage == n_stages - 1 else (None, None)
        self.rotary = model.rotary

    def forward(self, x: Tensor) -> Tensor:
        if self.token_emb is not None:
            x = self.token_emb(x)  # (batch, seq, d_model)
        rotation = self.rotary.span(0, x.shape[1], x)
        for block in self.blocks.values():
            x = block(x, rotation, None, None)  # (batch, seq, d_model)
        if self.lm_head is not None:
            x = self.lm_head(self.final_norm(x))  # (batch, seq, vocab)
        return x


class RecordedStage(PipelineStage):
    """A PipelineStage that writes down what it does, in the words of the simulator."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Event] = []

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        self.events.append(("F", fwd_chunk_id))
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        self.events.append(("B", bwd_chunk_id))
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of all counted targets; a sum, so that micro-batches with few tokens get no more weight than they have."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class Pipeline:
    """Training with one stage in each process; all rows pass through all of them, in `n_micro` micro-batches."""

    def __init__(
        self, model: CausalLM, config: TrainConfig, team: Team, schedule: str = "1f1b", n_micro: int = 4
    ) -> None:
        check_name("schedule", schedule, SCHEDULES)
        settings = model.config
        if settings.n_layers < team.size or settings.window_size or settings.logit_cap:
            raise ValueError(
                f"a pipeline of {team.size} stages needs as many blocks (there are {settings.n_layers}), "
                "without window_size and logit_cap"
            )
        if team.size < 2:
            raise ValueError("a pipeline needs at least 2 processes; use torchrun --nproc-per-node 2")
        check_alike(model, team)
        team.start_alike(model)
        self.config, self.team, self.n_micro, self.n_steps = config, team, n_micro, 0
        self.model = Stage(model, team.rank, team.size)
        device = next(self.model.parameters()).device
        self.stage = RecordedStage(self.model, team.rank, team.size, device)
        self.schedule = SCHEDULES[schedule](self.stage, n_micro, loss_fn=sum_of_losses, scale_grads=False)
        self.ends = dist.new_group([0, team.size - 1]) if settings.tie_embeddings else None
        groups = parameter_groups(model, config.weight_decay)  # of the whole model: a tied head is an embedding there
        own = {id(parameter) for parameter in self.model.parameters()}
        groups = [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]
        self.optimizer = AdamW([g for g in groups if g["params"]], config.learning_rate, config.beta1, config.beta2)

    @property
    def events(self) -> list[Event]:
        return self.stage.events

    def train_on(self, batch: Batch) -> float:
        """One optimizer step on a batch that all processes know; returns its loss, nats per token."""
        batch, counted = self.padded(batch), int((batch["targets"] != IGNORE).sum())
        check_counted(counted)
        first, last = self.team.rank == 0, self.team.rank == self.team.size - 1
        self.stage.events.clear()
        losses: list[Tensor] = []
        inputs = (batch["inputs"],) if first else ()
        wanted = {"target": batch["targets"], "losses": losses} if last else {}
        self.schedule.step(*inputs, **wanted)
        self.take_step(counted)
        return self.team.add_up(float(sum(loss.detach() for loss in losses)) if last else 0.0)[0] / counted

    def padded(self, batch: Batch) -> Batch:
        """The batch with rows that count nothing, up to the one size that the stages have agreed on."""
        n_rows = -(-self.config.batch_size // self.n_micro) * self.n_micro
        missing = n_rows - len(batch["inputs"])
        if missing < 0:
            raise ValueError(
                f"the batch has {len(batch['inputs'])} rows, more than batch_size={self.config.batch_size}"
            )
        inputs, targets = batch["inputs"], batch["targets"]
        nothing = targets.new_full((missing, targets.shape[1]), IGNORE)
        return {
            "inputs": torch.cat([inputs, inputs[:1].expand(missing, -1)]),
            "targets": torch.cat([targets, nothing]),
        }

    def take_step(self, counted: int) -> None:
        first, last = self.team.rank == 0, self.team.rank == self.team.size - 1
        if self.ends is not None and (first or last):  # the tied matrix lives at both ends: each has half its gradient
            tied = self.model.token_emb if first else self.model.lm_head
            dist.all_reduce(tied.weight.grad, group=self.ends)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1 / counted)
        squares = sum(float(grad.square().sum()) for grad in gradients)
        if self.ends is not None and last:
            squares -= float(self.model.lm_head.weight.grad.square().sum())  # counted at the first stage
        norm = math.sqrt(self.team.add_up(squares)[0])
        check_norm(norm, self.n_steps)
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(gradients, self.config.grad_clip / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.n_steps += 1

    def state_bytes(self) -> int:
        return state_bytes(self.optimizer)

    def full_state(self) -> dict[str, Tensor]:
        """All weights under the names of the whole model, on the CPU; every process must call."""
        parts = self.team.gather({name: tensor.cpu() for name, tensor in self.model.state_dict().items()})
        joined = {name: tensor for part in parts for name, tensor in part.items()}
        if self.ends is not None:
            joined["lm_head.weight"] = joined["token_emb.weight"]
        return joined
