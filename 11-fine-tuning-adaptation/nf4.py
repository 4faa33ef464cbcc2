"""Topic 11 - NF4: four bits for each weight, at the quantiles of a normal distribution; the base model of QLoRA.

    packed = quantize_nf4(weight)                 # codes, two in a byte, and a scale for each block of 64 weights
    packed.dequantize(), packed.n_bytes           # what is left of the weights, and what they weigh
    quantize_model(model)                         # every linear layer of the blocks; add_adapters then makes it QLoRA

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py sft --method qlora

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314); Dettmers et al. 2022 (8-bit blocks, arXiv 2110.02861) and Dettmers 2016
(arXiv 1511.04561) for the 8-bit code of the scales.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from low_rank_adapters import remember_base
from modern_llm_architectures import CausalLM

OFFSET = 0.9677083  # the outermost quantile of QLoRA's table: 1 - (1/32 + 1/30) / 2, the mean of the two spacings
NESTED_BLOCK = 256  # scales that share a scale of their own


# The two tables


@cache
def nf4_levels() -> Tensor:
    """The 16 levels of NF4: (16), float32, ascending, from -1 to 1 (Dettmers et al. 2023, section 3).

    Equally spaced probabilities, turned into quantiles of a normal distribution and divided by the largest. Eight of
    them lie above 0, seven below, and 0 itself is a level, so that a weight of 0 stays 0.
    """

    def quantiles(n: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(OFFSET, 0.5, n + 1)[:-1].double())  # (n), descending

    levels = torch.cat([-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8).flip(0)]).float()
    return levels / levels.max()


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of the signed 8-bit code with a dynamic exponent: (256), float32, ascending (Dettmers 2016).

    Seven powers of ten, each with twice as many levels as the one below: fine near 0, and fine near 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2
        levels += (10 ** (exponent - 6) * means).tolist() + (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(levels))


# Blocks with a scale


def block_scales(values: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block of a vector, the last of which may be short: (blocks)."""
    blocks = F.pad(values.abs(), (0, -len(values) % block_size)).view(-1, block_size)  # (blocks, block)
    return blocks.max(dim=1).values


def scaled_to_one(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Each value divided by the scale of its block; a block of zeros stays zero. (n) to (n)"""
    inverse = 1 / scales.clamp(min=1e-38)
    return (values * inverse.repeat_interleave(block_size)[: len(values)]).clamp(-1, 1)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the closest level; a value halfway between two takes the lower. (n) to (n), int64"""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)


def eight_bit_codes(values: Tensor, scales: Tensor) -> Tensor:
    """Codes of `dynamic_levels` for values in blocks of 256 with these scales: (n), uint8.

    As bitsandbytes on a CPU, which looks the scaled value up in a table of 2^16 entries: near a midpoint it may take
    the second closest level. A block of zeros has code 0, whose level its scale of 0 turns into 0 again.
    """
    place = ((scaled_to_one(values, scales, NESTED_BLOCK) + 1) * 32767.5 + 0.5).floor()  # up from halves, as in C
    codes = nearest(place / 32767.5 - 1, dynamic_levels().to(values.device)).to(torch.uint8)
    return codes.masked_fill(scales.repeat_interleave(NESTED_BLOCK)[: len(values)] == 0, 0)


@dataclass
class NF4Tensor:
    """A tensor in NF4. With double quantisation `scales` are 8-bit codes, with a scale and a mean of their own.

    Shapes: codes (ceil(n / 2)), uint8, the first of two weights in the upper half; scales (blocks), float32 or uint8;
    nested_scales (ceil(blocks / 256)); mean ().
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    block_size: int
    nested_scales: Tensor | None = None
    mean: Tensor | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is stored for this tensor; the two tables of levels are shared by all."""
        parts = (self.codes, self.scales, self.nested_scales, self.mean)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def block_sizes(self) -> Tensor:
        """The scale of every block in float32: (blocks)."""
        if self.nested_scales is None:
            return self.scales
        outer = self.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(self.scales)]
        return dynamic_levels().to(outer.device)[self.scales.long()] * outer + self.mean

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, float32, in the tensor's own shape."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).flatten().long()  # (*)
        n = math.prod(self.shape)
        scales = self.block_sizes().repeat_interleave(self.block_size)[:n]
        return (nf4_levels().to(codes.device)[codes[:n]] * scales).view(self.shape)


def quantize_nf4(weight: Tensor, block_size: int = 64, double: bool = True) -> NF4Tensor:
    """Four bits for each weight: the closest of 16 levels, times the largest magnitude of its block of neighbours.

    Double quantisation stores the scales, less their mean, as 8-bit codes in blocks of 256 (QLoRA, section 3).
    Raises ValueError for a block size below 2 and for weights that are not finite.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be >= 2, got {block_size}; 64 is QLoRA's")
    values = weight.detach().float().flatten()
    if not values.isfinite().all():
        raise ValueError("the weights are not all finite; NF4 scales a block by its largest magnitude")
    scales = block_scales(values, block_size)
    codes = nearest(scaled_to_one(values, scales, block_size), nf4_levels().to(values.device))
    if len(codes) % 2:
        codes = F.pad(codes, (0, 1), value=int(nearest(torch.zeros(1), nf4_levels())))
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    if not double:
        return NF4Tensor(packed, scales, tuple(weight.shape), block_size)
    mean = scales.mean()
    outer = block_scales(scales - mean, NESTED_BLOCK)
    return NF4Tensor(packed, eight_bit_codes(scales - mean, outer), tuple(weight.shape), block_size, outer, mean)


def nf4_bytes(n_weights: int, block_size: int = 64, double: bool = True) -> int:
    """Bytes of n weights in NF4, by the formula: 4 bits each, a scale for each block, and what the scales need."""
    n_blocks = math.ceil(n_weights / block_size)
    scales = n_blocks + 4 * math.ceil(n_blocks / NESTED_BLOCK) + 4 if double else 4 * n_blocks
    return math.ceil(n_weights / 2) + scales


# QLoRA's base layer


class DequantizedLinear(torch.autograd.Function):
    """x @ W^T with W made from its codes in the forward pass and again in the backward pass, and kept in neither."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: NF4Tensor) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.packed.dequantize().to(grad.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is stored in NF4; gradients pass through it to its input.

    `weight` is made anew whenever it is read. Shapes: x (..., in) to (..., out).
    """

    def __init__(self, linear: nn.Linear, block_size: int = 64, double: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = quantize_nf4(linear.weight, block_size, double)
        for name in ("codes", "scales", "nested_scales", "mean"):
            self.register_buffer(name, getattr(packed, name))
        self.block_size = block_size
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    @property
    def packed(self) -> NF4Tensor:
        shape = (self.out_features, self.in_features)
        return NF4Tensor(self.codes, self.scales, shape, self.block_size, self.nested_scales, self.mean)

    @property
    def weight(self) -> Tensor:
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        y = DequantizedLinear.apply(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_model(model: CausalLM, block_size: int = 64, double: bool = True) -> list[str]:
    """Store every linear layer of the blocks in NF4; return their names. Embeddings, norms and head stay as they are.

    Raises ValueError if there is none left to quantise.
    """
    chosen = [name for name, layer in model.named_modules() if name.startswith("blocks.") and type(layer) is nn.Linear]
    if not chosen:
        raise ValueError("the model has no plain linear layer in its blocks; quantise before adding adapters, once")
    remember_base(model)
    for name in chosen:
        model.set_submodule(name, NF4Linear(model.get_submodule(name), block_size, double))
    return chosen


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
