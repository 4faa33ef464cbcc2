"""Topic 10 - Sharded Parallel: tensor parallelism by hand, then FSDP2, tensor and sequence parallelism of PyTorch.

torchrun --nproc-per-node 4 10-pretraining-llms/pretraining_llms.py parallel --scheme fsdp+tensor --tensor-size 2

The model knows nothing of any of this: its linear layers are replaced, or its weights distributed, from outside.
Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053), Korthikanti et al. 2022 (sequence parallelism, arXiv 2205.05198),
Zhao et al. 2023 (FSDP, arXiv 2304.11277).
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from data_parallel import Team
from llm_config import ModelConfig
from manual_parallel import Ring, check_alike, check_counted, check_norm
from modern_llm_architectures import CausalLM
from optimizers import AdamW, parameter_groups, state_bytes
from packing import IGNORE, Batch, language_model_loss
from training_transformers import TrainConfig, backward_in_parts

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # split by output features: heads, hidden units
ROWS = ("out_proj", "down_proj")  # split by input features, so that the two kinds fit together


def check_splits(config: ModelConfig, size: int) -> None:
    """Raise ValueError unless heads, hidden units and vocabulary can be dealt out to `size` processes."""
    if config.latent or config.experts or config.qk_norm or config.use_bias:
        raise ValueError(
            "tensor parallelism here knows Llama's layers; leave out latent, experts, qk_norm and use_bias"
        )
    for name in ("n_kv_heads", "n_heads", "d_ff", "vocab_size"):
        if getattr(config, name) % size:
            remedy = "; repeat key-value heads or use fewer processes" if name == "n_kv_heads" else ""
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be split over {size} tensor-parallel processes{remedy}"
            )


# By hand: the two conjugate collectives of Megatron


class CopyToAll(torch.autograd.Function):
    """f: the identity forward; backward the sum over processes, because each used the input in its own columns."""

    @staticmethod
    def forward(ctx, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ring.all_reduce(grad.clone()), None


class SumOfAll(torch.autograd.Function):
    """g: the sum over processes forward, because each has some terms of every output; backward the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, ring: Ring) -> Tensor:
        return ring.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def share_of(whole: nn.Linear, team: Team, dim: int) -> nn.Parameter:
    """This process's rows (dim 0) or columns (dim 1) of a weight; ValueError for a bias and for unequal shares."""
    n_features = whole.weight.shape[dim]
    if whole.bias is not None or n_features % team.size:
        raise ValueError(
            f"a layer is split without bias and into equal shares; got bias={whole.bias is not None} and {n_features} "
            f"features for {team.size} processes"
        )
    share = whole.weight.detach().chunk(team.size, dim)[team.rank].clone()
    return nn.Parameter(share, requires_grad=whole.weight.requires_grad)


class ColumnParallelLinear(nn.Module):
    """A share of a linear layer's output features. Shapes: (..., d_in) to (..., d_out / size).

    Layers that read the same input, such as queries, keys and values, share one `entry` (see `Entry`).
    """

    def __init__(self, whole: nn.Linear, team: Team) -> None:
        super().__init__()
        self.weight = share_of(whole, team, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowParallelLinear(nn.Module):
    """A share of a linear layer's input features, and the sum over processes.

    Shapes: (..., d_in / size) to (..., d_out).
    """

    def __init__(self, whole: nn.Linear, ring: Ring) -> None:
        super().__init__()
        self.ring = ring
        self.weight = share_of(whole, ring.team, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return SumOfAll.apply(F.linear(x, self.weight), self.ring)


class Entry(nn.Module):
    """A sublayer whose input enters through f once, however many column-parallel layers read it."""

    def __init__(self, inner: nn.Module, ring: Ring) -> None:
        super().__init__()
        self.inner, self.ring = inner, ring

    def forward(self, x: Tensor, *rest) -> Tensor:
        return self.inner(CopyToAll.apply(x, self.ring), *rest)


def split_by_hand(model: CausalLM, ring: Ring) -> None:
    """Replace the linear layers of every block by this process's share; the cost is 4 all-reduces a block and step."""
    check_splits(model.config, ring.team.size)
    for block in model.blocks:
        for sublayer in (block.self_attn, block.ffn):
            for name, layer in list(sublayer.named_children()):
                if name in COLUMNS:
                    setattr(sublayer, name, ColumnParallelLinear(layer, ring.team))
                elif name in ROWS:
                    setattr(sublayer, name, RowParallelLinear(layer, ring))
        block.self_attn, block.ffn = Entry(block.self_attn, ring), Entry(block.ffn, ring)


class TensorByHand:
    """Training with `split_by_hand`: all processes see all rows; each has a share of every block."""

    def __init__(
        self, model: CausalLM, config: TrainConfig, team: Team, loss_fn: Callable = language_model_loss
    ) -> None:
        check_alike(model, team)
        team.start_alike(model)
        self.model, self.config, self.team, self.loss_fn, self.ring = model, config, team, loss_fn, Ring(team)
        split_by_hand(model, self.ring)
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay), config.learning_rate, config.beta1, config.beta2
        )
        self.n_steps = 0

    def train_on(self, batch: Batch) -> float:
        total, n_counted = backward_in_parts(self.model, batch, self.loss_fn, self.config, 1.0)
        check_counted(n_counted)
        whole, shares = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:  # a frozen one has none
                parameter.grad /= n_counted
                (shares if kind_of(name) else whole).append(parameter.grad)
        squares = [sum(float(grad.square().sum()) for grad in grads) for grads in (whole, shares)]
        norm = math.sqrt(squares[0] + self.team.add_up(squares[1])[0])  # what all hold alike counts once
        check_norm(norm, self.n_steps)
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(whole + shares, self.config.grad_clip / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.n_steps += 1
        return total / n_counted

    def state_bytes(self) -> int:
        return state_bytes(self.optimizer)

    def full_state(self) -> dict[str, Tensor]:
        """All weights under their ordinary names, on the CPU."""
        everyone = self.team.gather({name: tensor.cpu() for name, tensor in self.model.state_dict().items()})
        joined = {}
        for name, tensor in everyone[0].items():
            kind = kind_of(name)
            parts = [state[name] for state in everyone]
            joined[name.replace(".inner.", ".")] = torch.cat(parts, dim=int(kind == "row")) if kind else tensor
        return joined


def kind_of(name: str) -> str:
    """Whether a parameter of a split model is a share of columns ("column"), of rows ("row"), or whole ("")."""
    layer = name.split(".")[-2] if "." in name else name
    return "column" if layer in COLUMNS else "row" if layer in ROWS else ""


# With PyTorch: the same plan, told to parallelize_module


def plan_of(config: ModelConfig, sequence: bool, share_loss: bool) -> dict:
    """What each layer does with its weight and with its input and output, by name.

    sequence: between the sublayers each process has seq / size positions, so that norms and residuals are shared too;
    an all-reduce becomes a reduce-scatter at the end of a sublayer and an all-gather at the start of the next.
    share_loss: the logits stay split by vocabulary, for `loss_parallel`.
    """
    between = Shard(1) if sequence else Replicate()
    plan = {
        "token_emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if share_loss else Replicate(),
            use_local_output=not share_loss,
        ),
    }
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        plan |= {f"{block}.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {f"{block}.ffn.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan |= {f"{block}.self_attn.out_proj": RowwiseParallel(output_layouts=between)}
        plan |= {f"{block}.ffn.down_proj": RowwiseParallel(output_layouts=between)}
        if sequence:
            plan |= {f"{block}.{name}": SequenceParallel() for name in ("attn_norm", "ffn_norm")}
            gather = {
                "input_layouts": (Shard(1), None, None, None),
                "desired_input_layouts": (Replicate(), None, None, None),
            }
            plan[f"{block}.self_attn"] = PrepareModuleInput(**gather)
            plan[f"{block}.ffn"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return plan | ({"final_norm": SequenceParallel()} if sequence else {})


def parallelize(model: CausalLM, mesh: DeviceMesh, sequence: bool = False, share_loss: bool = False) -> CausalLM:
    """Distribute a model over a mesh with the axes "data" (FSDP2) and "tensor"; an axis of length 1 costs nothing.

    Every weight becomes a DTensor. FSDP2 gathers one block's weights just before it is used, drops them afterwards and
    reduce-scatters its gradients: ZeRO stage 3. Raises ValueError for sizes that cannot be split.
    """
    if mesh["tensor"].size() > 1:
        check_splits(model.config, mesh["tensor"].size())
        parallelize_module(model, mesh["tensor"], plan_of(model.config, sequence, share_loss))
        if model.config.tie_embeddings:  # distributing made two tensors of one
            model.lm_head.weight = model.token_emb.weight
    if mesh["data"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model


class Sharded:
    """Training with `parallelize`: rows are dealt out along "data"; along "tensor" all see the same rows."""

    def __init__(
        self,
        model: CausalLM,
        config: TrainConfig,
        team: Team,
        tensor_size: int = 1,
        sequence: bool = False,
        share_loss: bool = False,
    ) -> None:
        if team.size % tensor_size:
            raise ValueError(f"tensor_size={tensor_size} does not divide the {team.size} processes; choose a divisor")
        check_alike(model, team)
        team.start_alike(model)
        self.config, self.team, self.share_loss, self.sequence = config, team, share_loss, sequence
        self.tensor_size, self.rows, self.tensor_rank = tensor_size, Team(), 0
        names = [
            (group["weight_decay"], names_of(model, group["params"]))
            for group in parameter_groups(model, config.weight_decay)
        ]
        self.model = model
        if team.size > 1:
            device, shape = next(model.parameters()).device.type, (team.size // tensor_size, tensor_size)
            mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))
            self.rows = Team(mesh["data"].get_local_rank(), mesh["data"].size())  # who has which rows
            self.tensor_rank = mesh["tensor"].get_local_rank()
            parallelize(model, mesh, sequence, share_loss and tensor_size > 1)
        self.weights = dict(model.named_parameters())
        self.locals = {name: nn.Parameter(local_of(weight.detach())) for name, weight in self.weights.items()}
        groups = [
            {"params": [self.locals[name] for name in members], "weight_decay": decay} for decay, members in names
        ]
        self.optimizer = AdamW(groups, config.learning_rate, config.beta1, config.beta2)
        self.n_steps = 0

    def train_on(self, batch: Batch) -> float:
        """One optimizer step on a batch that all processes know; returns its loss, nats per token."""
        if self.sequence and batch["inputs"].shape[1] % self.tensor_size:
            raise ValueError(
                f"sequence parallelism cuts {batch['inputs'].shape[1]} positions into {self.tensor_size} equal parts; "
                "choose another seq_len"
            )
        rows = self.rows.rows_of(batch)
        if not len(rows["inputs"]):  # every process must take part in the collectives: a row that counts nothing
            rows = {"inputs": batch["inputs"][:1], "targets": torch.full_like(batch["targets"][:1], IGNORE)}
        counted = int((batch["targets"] != IGNORE).sum())
        check_counted(counted)
        sharing = loss_parallel() if self.share_loss and self.tensor_size > 1 else contextlib.nullcontext()
        with sharing, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes it in place
            loss, _ = language_model_loss(self.model, rows)
            (loss * (self.rows.size / counted)).backward()  # FSDP divides by the processes of its axis
        self.take_step()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        one_of_them = self.tensor_rank == 0  # of those that saw the same rows
        return self.team.add_up(loss.item() if one_of_them else 0.0)[0] / counted

    def take_step(self) -> None:
        """Clip and step on this process's own numbers: an optimizer that goes number by number needs no others."""
        squares, gradients = 0.0, []
        for name, weight in self.weights.items():
            grad, copies = weight.grad, self.team.size
            if grad is None:  # frozen
                continue
            if isinstance(weight, DTensor):
                grad = grad.redistribute(weight.device_mesh, weight.placements)  # a norm's gain has a partial sum
                copies = math.prod(
                    weight.device_mesh.size(axis)
                    for axis, place in enumerate(weight.placements)
                    if place.is_replicate()
                )
                copies *= self.team.size // weight.device_mesh.size()
            grad = self.locals[name].grad = local_of(grad)
            squares += float(grad.square().sum()) / copies
            gradients.append(grad)
        norm = math.sqrt(self.team.add_up(squares)[0])
        check_norm(norm, self.n_steps)
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(gradients, self.config.grad_clip / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self.n_steps += 1

    def state_bytes(self) -> int:
        """Bytes of optimizer state in this process."""
        return state_bytes(self.optimizer)

    def full_state(self) -> dict[str, Tensor]:
        """All weights, whole, on the CPU; every process must call."""
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # "suboptimal", but once
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
            for name, tensor in self.model.state_dict().items()
        }


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    """Names of parameters, which stay when distributing a model replaces the parameters themselves."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]
