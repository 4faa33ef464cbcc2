"""Topic 10 - Manual Parallel: ring collectives from send and receive, and on them data parallelism and ZeRO by hand.

torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py parallel --scheme zero1

Patarasuk and Yuan 2009 (the ring all-reduce is bandwidth optimal), Li et al. 2020 (PyTorch DDP, arXiv 2006.15704),
Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054).
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from data_parallel import Team
from optimizers import AdamW, parameter_groups, set_learning_rates, state_bytes
from packing import Batch, language_model_loss
from training_transformers import TrainConfig, backward_in_parts, clip_gradients, gradient_norm, next_batch

BUCKET_BYTES = 2**20  # DDP's default is 25 MiB; small models shall have several buckets too


# Rings


def chunk_given(rank: int, hop: int, size: int, gathering: bool) -> int:
    """The chunk that a process sends to its right neighbour in a hop; it receives the chunk before it.

    Adding up, chunk c starts at process c + 1 and comes home to c after size - 1 hops; gathering, it starts at c.
    """
    return (rank - hop - (0 if gathering else 1)) % size


class Ring:
    """Collectives among all processes of a team, made of nothing but send and receive; `sent` counts bytes sent.

    Every tensor is flat and is changed in place. With n bytes and p processes each process sends (p-1)/p * n bytes in
    reduce_scatter and in all_gather, and 2 (p-1)/p * n in all_reduce, however many processes there are.
    """

    def __init__(self, team: Team) -> None:
        self.team, self.sent = team, 0

    def pass_on(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send to the right and receive from the left at once: if all sent first, all would wait for a receiver."""
        rank, size = self.team.rank, self.team.size
        operations = [
            dist.P2POp(dist.isend, outgoing, (rank + 1) % size),
            dist.P2POp(dist.irecv, incoming, (rank - 1) % size),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        self.sent += outgoing.numel() * outgoing.element_size()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return chunk `rank` of the sum over all processes, a view into x; the rest of x is left half added."""
        rank, size = self.team.rank, self.team.size
        chunks = equal_chunks(x, size)  # (size, chunk)
        incoming = torch.empty_like(chunks[0])
        for hop in range(size - 1):
            given = chunk_given(rank, hop, size, gathering=False)
            self.pass_on(chunks[given], incoming)
            chunks[given - 1] += incoming
        return chunks[rank]

    def all_gather(self, x: Tensor) -> Tensor:
        """Fill x with every process's own chunk, which lies at its place in x before; return x."""
        rank, size = self.team.rank, self.team.size
        chunks = equal_chunks(x, size)  # (size, chunk)
        for hop in range(size - 1):
            given = chunk_given(rank, hop, size, gathering=True)
            self.pass_on(chunks[given], chunks[given - 1])
        return x

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace x, of any shape, by its sum over all processes; return x. The same bits arrive everywhere."""
        if self.team.size > 1:
            flat = F.pad(x.flatten(), (0, -x.numel() % self.team.size))
            self.reduce_scatter(flat)
            x.copy_(self.all_gather(flat)[: x.numel()].view_as(x))
        return x

    def star_all_reduce(self, x: Tensor) -> Tensor:
        """The same by sending everything to process 0 and back, for comparison: process 0 sends (p-1) * n bytes."""
        if self.team.rank > 0:
            dist.send(x, dst=0)
            self.sent += x.numel() * x.element_size()
            dist.recv(x, src=0)
            return x
        part = torch.empty_like(x)
        for other in range(1, self.team.size):
            dist.recv(part, src=other)
            x += part
        for other in range(1, self.team.size):
            dist.send(x, dst=other)
            self.sent += x.numel() * x.element_size()
        return x


def equal_chunks(x: Tensor, size: int) -> Tensor:
    if x.dim() != 1 or x.numel() % size:
        raise ValueError(f"a ring of {size} needs a flat tensor of a multiple of {size} numbers, got {tuple(x.shape)}")
    return x.view(size, -1)


def simulate_ring(vectors: list[list[float]]) -> Iterator[list[list[float]]]:
    """All-reduce on paper: vectors[rank][chunk], one number a chunk; yields what all hold after each hop."""
    size, state = len(vectors), [list(vector) for vector in vectors]
    for hop in range(2 * (size - 1)):
        gathering = hop >= size - 1
        given = [chunk_given(rank, hop % (size - 1), size, gathering) for rank in range(size)]
        messages = [state[rank][given[rank]] for rank in range(size)]
        for rank in range(size):
            left = (rank - 1) % size
            before = 0 if gathering else state[rank][given[left]]
            state[rank][given[left]] = before + messages[left]
        yield [list(vector) for vector in state]


# The same model everywhere


def description(model: nn.Module) -> list[str]:
    """Name, shape, type and trainability of every parameter, in the order of the collectives."""
    return [
        f"{name} {tuple(parameter.shape)} {parameter.dtype} {'trained' if parameter.requires_grad else 'frozen'}"
        for name, parameter in model.named_parameters()
    ]


def check_alike(model: nn.Module, team: Team) -> None:
    """Raise ValueError in every process unless all have the same parameters in the same order.

    A collective adds bytes to bytes: with another order of the same shapes it would add the gradient of one weight to
    that of another, silently. A hash of 64 characters is compared; only if it differs are the names sent.
    """
    lines = description(model)
    if len(set(team.gather(hashlib.sha256("\n".join(lines).encode()).hexdigest()))) == 1:
        return
    everyone = team.gather(lines)
    for rank, others in enumerate(everyone):
        for index in range(max(len(everyone[0]), len(others))):
            ours, theirs = (side[index] if index < len(side) else "nothing" for side in (everyone[0], others))
            if ours != theirs:
                raise ValueError(
                    f"the processes have different models: parameter {index} is {ours!r} in process 0 and {theirs!r} "
                    f"in process {rank}; build the model from the same config, in the same order, everywhere"
                )


# Buckets: many small tensors as one large one


class Bucket:
    """Some parameters of one type and one optimizer group, as one flat vector with room for a multiple of `size`."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float, size: int) -> None:
        self.parameters, self.weight_decay, self.size = parameters, weight_decay, size
        self.numel = sum(parameter.numel() for parameter in parameters)
        self.padding = -self.numel % size
        self.used: set[int] = set()  # which parameters ever had a gradient

    def gradients(self) -> Tensor:
        """All gradients in a row, flat, padded with zeros; a parameter without one counts as 0."""
        self.used |= {index for index, parameter in enumerate(self.parameters) if parameter.grad is not None}
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        return torch.cat([*parts, parts[0].new_zeros(self.padding)])

    def spread(self, flat: Tensor) -> None:
        """Let every parameter's gradient be its part of the flat vector."""
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, flat[: self.numel].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def flatten_weights(self) -> Tensor:
        """Move the weights into one flat padded vector, of which each parameter is a view from now on."""
        flat = torch.cat([*(p.detach().flatten() for p in self.parameters), self.zeros(self.padding)])
        offset = 0
        for parameter in self.parameters:
            parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        return flat

    def zeros(self, n: int) -> Tensor:
        return self.parameters[0].detach().new_zeros(n)


def make_buckets(model: nn.Module, weight_decay: float, size: int, bucket_bytes: int) -> list[Bucket]:
    """Buckets of about `bucket_bytes`, last layers first: their gradients are ready first in the backward pass.

    A bucket has one weight decay and one type, so that an optimizer may treat it as a single long parameter.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}")
    decay_of = {
        id(p): group["weight_decay"] for group in parameter_groups(model, weight_decay) for p in group["params"]
    }
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    open_ones: dict[tuple, list[nn.Parameter]] = {}
    closed: list[list[nn.Parameter]] = []
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        key = (decay_of[id(parameter)], parameter.dtype)
        members = open_ones.setdefault(key, [])
        members.append(parameter)
        if sum(one.numel() * one.element_size() for one in members) >= bucket_bytes:
            closed.append(open_ones.pop(key))
    closed += open_ones.values()
    closed.sort(key=lambda members: -min(order[id(parameter)] for parameter in members))  # complete first, first
    return [Bucket(members, decay_of[id(members[0])], size) for members in closed]


def check_counted(n_counted: float) -> None:
    if not n_counted:
        raise ValueError("no token of this batch is counted; see the data")


def check_norm(norm: float, n_steps: int) -> None:
    """Raise ValueError, before the weights are spoiled, for a gradient that is infinite or no number."""
    if not math.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm} at step {n_steps + 1}; lower --learning-rate")


# The schemes. Each trains on a batch as one process would, and says what it costs


class DataParallel:
    """Every process holds everything and takes some rows; gradients are added by ring, bucket by bucket.

    The mean is over the tokens of all processes together, so that a process with fewer, or with none, has its due
    weight. Raises ValueError for models that differ between processes and for a config that needs another loop.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        team: Team,
        loss_fn: Callable = language_model_loss,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        if config.optimizer != "adamw" or config.dtype == "fp16" or config.ema_decay:
            raise ValueError(
                "the schemes by hand know adamw in fp32 or bf16 without an average of the weights; "
                f"got optimizer={config.optimizer}, dtype={config.dtype}, ema_decay={config.ema_decay}"
            )
        check_alike(model, team)  # first: start_alike already is a collective
        team.start_alike(model)
        self.model, self.config, self.team, self.loss_fn = model, config, team, loss_fn
        self.ring, self.n_steps = Ring(team), 0
        self.buckets = make_buckets(model, config.weight_decay, team.size, bucket_bytes)
        self.optimizer = AdamW(self.groups(), config.learning_rate, config.beta1, config.beta2)

    def groups(self) -> list[dict]:
        """What the optimizer updates here."""
        return [{"params": bucket.parameters, "weight_decay": bucket.weight_decay} for bucket in self.buckets]

    def train_on(self, batch: Batch) -> float:
        """One optimizer step on a batch that all processes know; returns its loss, nats per token."""
        rows, n_rows = self.team.rows_of(batch), len(next(iter(batch.values())))
        most = math.ceil(n_rows / self.team.size)
        size, scale = self.config.micro_batch_size or most, 1 / n_rows
        total = n_counted = 0.0
        for start in range(0, most, size):  # the same number of turns everywhere, also without rows
            part = {name: tensor[start : start + size] for name, tensor in rows.items()}
            loss, count = backward_in_parts(self.model, part, self.loss_fn, self.config, scale)
            total, n_counted = total + loss, n_counted + count
            self.after_backward()
        total, n_counted = self.team.add_up(total, n_counted)
        check_counted(n_counted)
        self.take_step(scale * n_counted)
        return total / n_counted

    def after_backward(self) -> None:
        """After each micro-batch: gradients wait for the last one."""

    def take_step(self, divisor: float) -> None:
        gradients = self.reduced()
        if self.n_steps == 0:
            self.check_all_used()
        torch._foreach_mul_(gradients, 1 / divisor)
        norm = self.clip(gradients)
        check_norm(norm, self.n_steps)
        self.optimizer.step()
        self.n_steps += 1
        self.finish()

    def reduced(self) -> list[Tensor]:
        """Gradients added up over all processes, those that this process will use."""
        for bucket in self.buckets:
            bucket.spread(self.ring.all_reduce(bucket.gradients()))
        return [parameter.grad for bucket in self.buckets for parameter in bucket.parameters]

    def clip(self, gradients: list[Tensor]) -> float:
        return clip_gradients(gradients, self.config.grad_clip or math.inf)

    def finish(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def check_all_used(self) -> None:
        """A weight without gradient would be decayed as part of a bucket, though one process alone leaves it be."""
        flags = [float(i in bucket.used) for bucket in self.buckets for i in range(len(bucket.parameters))]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        every = [names[id(parameter)] for bucket in self.buckets for parameter in bucket.parameters]
        idle = [name for name, n_users in zip(every, self.team.add_up(*flags), strict=True) if not n_users]
        if idle:
            raise ValueError(f"no gradient reached {', '.join(idle)}; freeze it with requires_grad_(False)")

    def state_bytes(self) -> int:
        """Bytes of optimizer state in this process."""
        return state_bytes(self.optimizer)

    def gradient_bytes(self) -> int:
        """Bytes of gradients held here now."""
        return sum(p.grad.numel() * p.grad.element_size() for p in self.model.parameters() if p.grad is not None)

    def full_state(self) -> dict[str, Tensor]:
        """All weights, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}


class ZeroOne(DataParallel):
    """ZeRO stage 1: every process keeps the optimizer state of 1/size of the weights and updates those alone.

    Gradients are reduce-scattered and new weights all-gathered: together the bytes of one all-reduce, for 1/size of
    the optimizer state (Rajbhandari et al. 2020, section 5.1). The optimizer must treat every number by itself.
    """

    def groups(self) -> list[dict]:
        self.flats = [bucket.flatten_weights() for bucket in self.buckets]
        chunks = [equal_chunks(flat, self.team.size)[self.team.rank] for flat in self.flats]
        self.shards = [nn.Parameter(chunk) for chunk in chunks]  # views: a step changes the model itself
        return [
            {"params": [shard], "weight_decay": bucket.weight_decay}
            for shard, bucket in zip(self.shards, self.buckets, strict=True)
        ]

    def reduced(self) -> list[Tensor]:
        for shard, bucket in zip(self.shards, self.buckets, strict=True):
            shard.grad = self.ring.reduce_scatter(bucket.gradients())
        return [shard.grad for shard in self.shards]

    def clip(self, gradients: list[Tensor]) -> float:
        """Each process has some of the squares; the norm needs all of them."""
        norm = math.sqrt(self.team.add_up(gradient_norm(gradients) ** 2)[0])
        if self.config.grad_clip and self.config.grad_clip < norm < math.inf:
            torch._foreach_mul_(gradients, self.config.grad_clip / (norm + 1e-6))
        return norm

    def finish(self) -> None:
        super().finish()
        for shard, flat in zip(self.shards, self.flats, strict=True):
            shard.grad = None
            self.ring.all_gather(flat)

    def gradient_bytes(self) -> int:
        kept = sum(s.grad.numel() * s.grad.element_size() for s in self.shards if s.grad is not None)
        return super().gradient_bytes() + kept


class ZeroTwo(ZeroOne):
    """ZeRO stage 2: a bucket's gradients are reduce-scattered as soon as they are complete, and then dropped.

    Between the backward pass and the step a process holds 1/size of the gradients. The price with micro-batches: every
    one of them is reduced by itself, so n of them send n times the gradient bytes of stage 1.
    """

    def groups(self) -> list[dict]:
        self.n_reduced = 0  # buckets of this backward pass, always in the order of the list
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _: self.reduce_complete())
        return super().groups()

    def reduce_complete(self) -> None:
        """Reduce the next buckets whose gradients are all there."""
        while self.n_reduced < len(self.buckets) and all(
            parameter.grad is not None for parameter in self.buckets[self.n_reduced].parameters
        ):
            self.reduce_next()

    def reduce_next(self) -> None:
        bucket, shard = self.buckets[self.n_reduced], self.shards[self.n_reduced]
        part = self.ring.reduce_scatter(bucket.gradients())
        shard.grad = part.clone() if shard.grad is None else shard.grad + part  # a view would keep the whole bucket
        for parameter in bucket.parameters:
            parameter.grad = None
        self.n_reduced += 1

    def after_backward(self) -> None:
        """Take part in the reductions of the others also where gradients, or rows, are missing here."""
        while self.n_reduced < len(self.buckets):
            self.reduce_next()
        self.n_reduced = 0

    def reduced(self) -> list[Tensor]:
        return [shard.grad for shard in self.shards]


MANUAL = {"ddp": DataParallel, "zero1": ZeroOne, "zero2": ZeroTwo}


def train_with(
    scheme, batches: Callable[[int], Batch], first: int = 0, after_step: Callable[[int], None] | None = None
) -> list[float]:
    """Train from step `first` to config.max_steps with a scheme, by hand or not; the losses, nats per token.

    after_step(n) is called when n steps are done. A scheme has `train_on(batch)`, `optimizer` and `config`.
    """
    losses = []
    scheme.model.train()
    for step in range(first, scheme.config.max_steps):
        set_learning_rates(scheme.optimizer, scheme.config.factor(step))
        losses.append(scheme.train_on(next_batch(batches, step)))
        if after_step:
            after_step(step + 1)
    return losses
