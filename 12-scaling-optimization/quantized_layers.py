"""Topic 12 - Quantised layers: packed weights, LLM.int8, training through rounding, and a cache of few bits.

    PackedLinear.from_quantised(quantise(weight, QuantFormat(4, 32)))      # 4.6 bits a weight in memory and on disk
    Int8Linear.from_linear(layer, threshold=6.0)                           # int8 x int8, outliers in float
    with_rounding(layer, QuantFormat(2, 32))                               # trains the weights behind the codes
    QuantisedKVCache(n_bits=4, keys_by="channel")                          # in place of topic 09's KVCache

Dettmers et al. 2022 (LLM.int8, arXiv 2208.07339), Bengio et al. 2013 (straight-through gradients, arXiv 1308.3432),
Jacob et al. 2018 (training with simulated rounding, arXiv 1712.05877), Liu et al. 2024 (KIVI, arXiv 2402.02750).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from llm_layers import KVCache
from weight_quantization import (
    QuantFormat,
    Quantised,
    absmax_scale,
    from_codes,
    group_parameters,
    int_matmul,
    pack_codes,
    per_column,
    quantise,
    rounded_scale,
    to_codes,
    unpack_codes,
)
from workbench import check_name, check_range

# Packed weights


class PackedLinear(nn.Module):
    """A linear layer whose weight lies packed in memory and is unpacked in each call (weight-only quantisation).

    Small in memory and on disk; the product itself is in float. Buffers: codes (rows, bytes) uint8, scales
    (rows, groups) float16, zero_points packed like the codes, or None for "absmax". Shapes: (..., columns) to
    (..., rows).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, rows: int, columns: int, fmt: QuantFormat, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.fmt = rows, columns, fmt
        empty = Quantised(
            torch.zeros(rows, columns, dtype=torch.uint8),
            *(torch.zeros(1 if fmt.quant_group_size < 0 else rows, fmt.n_groups(columns)) for _ in range(2)),
            fmt,
        )
        for name, tensor in packed_tensors(empty).items():
            self.register_buffer(name, tensor)
        if fmt.scheme == "absmax":
            self.register_buffer("zero_points", None)
        self.register_buffer("bias", bias)

    @classmethod
    def from_quantised(cls, quantised: Quantised, bias: Tensor | None = None) -> "PackedLinear":
        layer = cls(*quantised.codes.shape, quantised.fmt, None if bias is None else bias.detach().clone())
        for name, tensor in packed_tensors(quantised).items():
            getattr(layer, name).copy_(tensor)
        return layer

    def quantised(self, rows: Tensor | slice = slice(None)) -> Quantised:
        """The codes and grids of all rows, or of some."""
        n_bits, grids = self.fmt.n_bits, slice(None) if self.fmt.quant_group_size < 0 else rows
        codes = unpack_codes(self.codes[rows], n_bits, self.in_features)  # (rows, columns)
        scales = self.scales[grids].float()  # (*, groups)
        if self.zero_points is None:
            zeros = torch.full_like(scales, 2 ** (n_bits - 1))  # (*, groups)
        else:
            zeros = unpack_codes(self.zero_points[grids], n_bits, scales.shape[1]).float()  # (*, groups)
        return Quantised(codes, scales, zeros, self.fmt)

    @property
    def weight(self) -> Tensor:
        """The floats that the codes stand for, made anew: (rows, columns)."""
        return self.quantised().dequantise()

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.codes, self.scales, self.zero_points) if buffer is not None)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)  # (..., rows)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.fmt}"


def packed_tensors(quantised: Quantised) -> dict[str, Tensor]:
    """What a file holds of a quantised matrix."""
    n_bits = quantised.fmt.n_bits
    tensors = {"codes": pack_codes(quantised.codes, n_bits), "scales": quantised.scales.half()}
    if quantised.fmt.scheme == "affine":
        tensors["zero_points"] = pack_codes(quantised.zero_points, n_bits)
    return tensors


class PackedEmbedding(nn.Module):
    """An embedding that unpacks the rows it is asked for. Shares its tensors with the layer that it is made from.

    Shapes: ids (...) to (..., columns).
    """

    def __init__(self, table: PackedLinear) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.table.quantised(token_ids.flatten()).dequantise().unflatten(0, token_ids.shape)


# LLM.int8: both sides in whole numbers, the outliers apart


class Int8Linear(nn.Module):
    """int8 weights times int8 activations, summed in int32; input channels with an outlier are multiplied in float.

    Every row of the weight and every token has its own absmax scale, so that a product is code * code * scale * scale
    (Dettmers et al. 2022, section 2). A channel in which any |x| of the call reaches `threshold` is left out of the
    whole numbers; 0 leaves none out. per_token=False gives all tokens of a call one scale.
    Shapes: (..., columns) to (..., rows).
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, rows: int, columns: int, threshold: float = 6.0, per_token: bool = True, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"threshold must be >= 0 (0: no channel is left in float), got {threshold}")
        self.out_features, self.in_features = rows, columns
        self.threshold, self.per_token = threshold, per_token
        self.register_buffer("codes", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(rows, 1))
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, layer: nn.Linear, threshold: float = 6.0, per_token: bool = True) -> "Int8Linear":
        bias = None if layer.bias is None else layer.bias.detach().clone()
        made = cls(layer.out_features, layer.in_features, threshold, per_token, bias)
        made.codes, made.scales = int8_codes(layer.weight.detach().float(), dim=1)
        return made

    @property
    def weight(self) -> Tensor:
        """The floats that the codes stand for: (rows, columns)."""
        return from_codes(self.codes, self.scales, 0)

    @property
    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()  # (tokens, columns)
        outliers = (flat.abs() >= self.threshold).any(0) if self.threshold else flat.new_zeros(flat.shape[1]).bool()
        one_each = self.per_token or not len(flat)  # of no tokens there is no largest value
        codes, scales = int8_codes(flat.masked_fill(outliers, 0), dim=1 if one_each else None)
        out = int_matmul(codes, self.codes).float() * scales * self.scales.T  # (tokens, rows)
        if outliers.any():
            columns = from_codes(self.codes[:, outliers], self.scales, 0)  # (rows, outliers)
            out = out + flat[:, outliers] @ columns.T  # (tokens, rows)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, threshold={self.threshold}"


def int8_codes(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """absmax codes -127 to 127 and their scales; a row of zeros gets the codes 0, not 0 / 0."""
    scale = absmax_scale(x, 8, dim)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale


# Training through rounding


class FakeQuantise(torch.autograd.Function):
    """Round in the forward pass; backward, the gradient passes straight through to what lies inside the grid.

    Bengio et al. 2013, section 4; the same as torch.fake_quantize_per_channel_affine. Scales and zero points are
    constants.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, most: int) -> Tensor:
        wanted = torch.round(x * (1 / scale)) + zero_point
        ctx.save_for_backward((wanted >= 0) & (wanted <= most))
        return from_codes(to_codes(x, scale, zero_point, 0, most), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class RoundedWeight(nn.Module):
    """The weight as it will be after quantisation, with a grid that follows the weight. A parametrization."""

    def __init__(self, fmt: QuantFormat) -> None:
        super().__init__()
        self.fmt = fmt

    def forward(self, weight: Tensor) -> Tensor:
        columns, size = weight.shape[1], self.fmt.group_size(weight.shape[1])
        scales, zeros = group_parameters(weight.detach(), self.fmt)
        scales, zeros = (per_column(part, size, columns) for part in (scales, zeros))
        return FakeQuantise.apply(weight, scales, zeros, self.fmt.most)


def with_rounding(layer: nn.Linear, fmt: QuantFormat) -> nn.Linear:
    """Let a layer compute with rounded weights and train the exact ones behind them (quantisation-aware training)."""
    return parametrize.register_parametrization(layer, "weight", RoundedWeight(fmt))


def without_rounding(layer: nn.Linear) -> nn.Linear:
    """The layer with its exact weights again; `quantise` of them gives what it computed with."""
    return parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


# The cache of keys and values


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are kept."""

    n_bits: int = 8  # bits of a number
    keys_by: Literal["token", "channel"] = "token"  # what shares a scale among the keys; values share it by token
    kv_block_size: int = 16  # tokens that are quantised together when keys share scales by channel

    def __post_init__(self) -> None:
        check_range(self, "n_bits", least=2, most=8)
        check_range(self, "kv_block_size", least=1)
        check_name("keys_by", self.keys_by, ("token", "channel"))


class QuantisedKVCache(KVCache):
    """Topic 09's cache with keys and values in codes of few bits, dequantised when attention asks for them.

    A token's value has one scale and zero point for each head. Keys either likewise, or, because some channels of keys
    are large in all tokens, one for each channel and block of tokens (Liu et al. 2024, section 3); the tokens of an
    unfinished block stay in float. Codes are affine. Shapes: keys and values (batch, kv_heads, position, width).
    """

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__()
        self.fmt = fmt
        self.blocks: list[tuple[Tensor, ...]] = []  # codes, scales, zero points of keys, then of values
        self.tail: tuple[Tensor, Tensor] | None = None  # keys and values in float
        self.widths = (0, 0)

    @property
    def n_bytes(self) -> int:
        kept = sum(tensor.nbytes for block in self.blocks for tensor in block)
        return kept + sum(tensor.nbytes for tensor in self.tail or ())

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.widths = (k.shape[3], v.shape[3])
        if self.tail is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self.tail, (k, v), strict=True))
            self.n_seen -= self.tail[0].shape[2]
        self.n_seen += k.shape[2]
        self.n_kept = self.n_seen
        block_size = self.fmt.kv_block_size if self.fmt.keys_by == "channel" else k.shape[2]
        whole = k.shape[2] - k.shape[2] % max(block_size, 1)
        for start in range(0, whole, max(block_size, 1)):
            part = slice(start, start + block_size)
            keys = self.encode(k[:, :, part], 2 if self.fmt.keys_by == "channel" else 3)
            self.blocks.append((*keys, *self.encode(v[:, :, part], 3)))
        self.tail = (k[:, :, whole:].clone(), v[:, :, whole:].clone())
        return self.read(0), self.read(1)

    def encode(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Affine codes along `dim`, packed: codes, scales in float16, zero points in uint8.

        Raises ValueError for values so large that float16 cannot hold their scale.
        """
        low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
        most = 2**self.fmt.n_bits - 1
        scale = rounded_scale((high - low).float() / most)
        zero = (-torch.round(low / scale)).clamp(0, most)
        codes = to_codes(x, scale, zero, 0, most).to(torch.uint8)
        return pack_codes(codes.flatten(0, 2), self.fmt.n_bits), scale.half(), zero.to(torch.uint8)

    def read(self, which: int) -> Tensor:
        """All keys (0) or all values (1): (batch, kv_heads, *, width)."""
        parts, width = [], self.widths[which]
        for block in self.blocks:
            packed, scale, zero = block[3 * which : 3 * which + 3]
            codes = unpack_codes(packed, self.fmt.n_bits, width)
            codes = codes.unflatten(0, (*self.tail[0].shape[:2], -1))  # (batch, kv_heads, *, width)
            parts.append(from_codes(codes, scale.float(), zero.float()))
        return torch.cat([*parts, self.tail[which].float()], dim=2).to(self.tail[which].dtype)

    def select(self, rows: Tensor | list[int]) -> None:
        """Keep these rows of the batch, in this order, repeats allowed."""
        if self.tail is None:
            return
        index = torch.as_tensor(rows, device=self.tail[0].device)
        n_heads, n_rows = self.tail[0].shape[1], len(self.tail[0])
        self.blocks = [tuple(pick_rows(tensor, index, n_rows, n_heads) for tensor in block) for block in self.blocks]
        self.tail = tuple(tensor.index_select(0, index) for tensor in self.tail)

    def crop(self, n_positions: int) -> None:
        """Forget the positions from `n_positions` on. Raises ValueError if they reach into a block that is encoded."""
        if not 0 <= n_positions <= self.n_seen:
            raise ValueError(f"n_positions={n_positions} must be in 0..{self.n_seen}, the positions in the cache")
        if n_positions == self.n_seen:
            return
        encoded = self.n_seen - self.tail[0].shape[2]
        if n_positions < encoded and n_positions:
            raise ValueError(f"the first {encoded} positions are encoded in blocks; crop to that or more, or to 0")
        if not n_positions:
            self.blocks, encoded = [], 0
        self.tail = tuple(tensor[:, :, : n_positions - encoded] for tensor in self.tail)
        self.n_seen = self.n_kept = n_positions


def pick_rows(tensor: Tensor, index: Tensor, n_rows: int, n_heads: int) -> Tensor:
    """Rows of the batch from packed codes, (batch * kv_heads * positions, bytes), or from scales with four axes."""
    if tensor.dim() == 4:
        return tensor.index_select(0, index)
    return tensor.unflatten(0, (n_rows, n_heads, -1)).index_select(0, index).flatten(0, 2)


def quantised_kv_bytes(fmt: KVFormat, n_layers: int, n_kv_heads: int, d_head: int) -> float:
    """Bytes that a cache grows by for each token: packed codes, and 3 bytes for each scale with its zero point."""
    codes = 2 * -(-d_head * fmt.n_bits // 8)
    key_scales = 1.0 if fmt.keys_by == "token" else d_head / fmt.kv_block_size
    return n_layers * n_kv_heads * (codes + 3 * (1 + key_scales))


def replace_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module], prefix: str = "blocks.") -> None:
    """Put `make(name, layer)` in the place of every linear layer below `prefix`."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(prefix):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(name, layer))


def quantise_nearest(fmt: QuantFormat) -> Callable[[str, nn.Linear], PackedLinear]:
    """What `replace_linears` needs to round everything to nearest."""
    return lambda _, layer: PackedLinear.from_quantised(quantise(layer.weight.detach(), fmt), layer.bias)
