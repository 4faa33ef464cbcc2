"""Topic 07 - Training Monitors: numbers that move before the loss does, and one that says when it jumped.

python 07-training-transformers/training_transformers.py train --monitor   # gradient norm and update of every block
python 07-training-transformers/training_transformers.py figures spikes    # which monitor moves first
"""

import contextlib
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from attention_mechanisms import MultiHeadAttention
from building_from_scratch import watched
from sequence_modeling import check_sizes
from transformer_architecture import FeedForward


def block_of(name: str) -> str:
    """The block that a parameter belongs to, "encoder.blocks.0", or its module if it belongs to none."""
    match = re.match(r"(.*blocks\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0] or name


def block_norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Norm of all tensors of each block together."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + tensor.float().norm().item() ** 2
    return {block: math.sqrt(square) for block, square in squares.items()}


class BlockMonitor:
    """Gradient norm of every block as it is now, and how far the step that follows moves it, relative to its weights.

    Made before clipping and before the step: a norm taken after zero_grad is 0 for ever.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
        self.gradients = block_norms({name: parameter.grad for name, parameter in parameters.items()})
        self.before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def report(self, model: nn.Module) -> dict[str, float]:
        """After the step: "grad_norm BLOCK" and "update_ratio BLOCK" (norm of the change / norm of the weights)."""
        after = dict(model.named_parameters())
        moved = block_norms({name: after[name].detach() - old for name, old in self.before.items()})
        sizes = block_norms(self.before)
        ratios = {f"update_ratio {block}": moved[block] / max(sizes[block], 1e-12) for block in moved}
        return {f"grad_norm {block}": norm for block, norm in self.gradients.items()} | ratios


@torch.no_grad()
def attention_entropy(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Mean entropy of each attention layer's weights, in nats, for one forward pass.

    ln(i + 1) is what query i of a causal layer has when it looks everywhere alike; near 0, every query looks at one key
    and the layer has stopped to learn through its softmax.
    """
    entropies: dict[str, float] = {}

    def see(name: str, _: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> None:
        entropies[name] = torch.special.entr(output[1].double()).sum(dim=-1).mean().item()

    with in_eval_mode(model), watched(model, MultiHeadAttention, see):
        model(*inputs)
    return entropies


@torch.no_grad()
def dead_units(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Share (0..1) of the hidden units of each feed-forward network that are <= 0 at every position of the inputs."""
    shares: dict[str, float] = {}

    def see(name: str, module: FeedForward, arguments: tuple, _: Tensor) -> None:
        shares[name] = (module.up_proj(arguments[0]) <= 0).flatten(0, -2).all(dim=0).float().mean().item()

    with in_eval_mode(model), watched(model, FeedForward, see):
        model(*inputs)
    return shares


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def loss_spikes(losses: list[float], window: int = 25, threshold: float = 6.0) -> list[int]:
    """Positions whose loss is not finite, or above the median of the `window` before by `threshold` robust deviations.

    The deviation is 1.48 times the median distance from the median, which a spike inside the window hardly moves.
    Raises ValueError for a window below 1.
    """
    check_sizes(window=window)
    spikes = []
    for position in range(window, len(losses)):
        recent = np.asarray(losses[position - window : position])
        recent = recent[np.isfinite(recent)]
        middle = float(np.median(recent)) if len(recent) else math.inf
        spread = 1.4826 * float(np.median(np.abs(recent - middle))) if len(recent) else 0.0
        if not math.isfinite(losses[position]) or losses[position] > middle + threshold * max(spread, 1e-3 * middle):
            spikes.append(position)
    return spikes
