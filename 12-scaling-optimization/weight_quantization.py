"""Topic 12 - Weight quantisation: whole numbers of 2 to 8 bits in place of floats, and what each choice costs.

    fmt = QuantFormat(n_bits=4, quant_group_size=32, scheme="affine")
    quantised = quantise(weight, fmt)          # codes, scales, zero points
    quantised.dequantise()                     # the floats that the codes stand for
    pack_codes(quantised.codes, 4)             # two codes in each byte
    quantised.n_bytes                          # what it weighs; equals stored_bytes(rows, columns, fmt)

Jacob et al. 2018 (affine codes, arXiv 1712.05877), Bennett 1948 (noise of a uniform quantiser), Dettmers et al. 2022
(vector-wise int8, arXiv 2208.07339), Frantar et al. 2022 (groups, arXiv 2210.17323).
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import check_name, check_range

SCHEMES = ("absmax", "affine")
TINY_SCALE = 2.0**-14  # the smallest normal float16: a group of zeros divides by this, not by 0
ADDS_NOTHING = torch.finfo(torch.float32).eps  # torch's observers take this for a range of width 0


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix becomes whole numbers. Scales are kept in float16, as in the published 4-bit checkpoints."""

    n_bits: int = 4  # bits of a code, 2 to 8
    quant_group_size: int = 32  # neighbours in a row that share a scale; 0: the whole row; -1: the whole matrix
    scheme: Literal["absmax", "affine"] = "affine"  # codes around 0, or from the smallest to the largest value

    def __post_init__(self) -> None:
        check_range(self, "n_bits", least=2, most=8)
        check_range(self, "quant_group_size", least=-1)
        check_name("scheme", self.scheme, SCHEMES)
        for name in ("n_bits", "quant_group_size"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")

    @property
    def most(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.n_bits - 1

    def group_size(self, columns: int) -> int:
        return min(self.quant_group_size, columns) if self.quant_group_size > 0 else columns

    def n_groups(self, columns: int) -> int:
        """Scales along one row; the last group of a row may be short."""
        return math.ceil(columns / self.group_size(columns))

    def n_scales(self, rows: int, columns: int) -> int:
        return 1 if self.quant_group_size < 0 else rows * self.n_groups(columns)

    def __str__(self) -> str:
        place = {0: "row", -1: "matrix"}.get(self.quant_group_size, f"{self.quant_group_size}")
        return f"int{self.n_bits} {self.scheme}, one scale per {place}"


# Scales and zero points


def absmax_scale(x: Tensor, n_bits: int, dim: int | None = None) -> Tensor:
    """The step of a grid around 0 that reaches the largest |x|: max|x| / (2^(n_bits - 1) - 1).

    Over all of x, or along `dim`, which stays with size 1. The code -2^(n_bits - 1) is never used.
    """
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    return largest / (2 ** (n_bits - 1) - 1)


def affine_parameters(low: Tensor, high: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of codes 0 to 2^n_bits - 1 that reach from low to high (Jacob et al. 2018, section 2.1).

    The range is widened to hold 0, so that 0 has a code of its own, the zero point: padding and pruned weights stay
    exactly 0. Equals torch.ao's MinMaxObserver. Shapes: low and high alike, both results like them.
    """
    low, high, most = low.clamp(max=0), high.clamp(min=0), 2**n_bits - 1
    scale = ((high - low) / most).clamp(min=ADDS_NOTHING)
    return scale, (-torch.round(low / scale)).clamp(0, most)


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor | float, least: int, most: int) -> Tensor:
    """round(x / scale) + zero_point, kept in least..most; float32 whole numbers, halves to the even neighbour.

    As torch's fake_quantize and quantize_per_channel: multiplies by 1 / scale, and clamps before it converts. A cast of
    a number beyond the type's range wraps around: 256 becomes code 0.
    """
    return (torch.round(x * (1 / scale)) + zero_point).clamp(least, most)


def from_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """(code - zero_point) * scale, subtracted in float: 3 - 5 is 254 in uint8."""
    return (codes.float() - zero_point) * scale


# Groups


def in_groups(x: Tensor, size: int) -> Tensor:
    """Rows cut into groups, the last filled up with zeros: (rows, columns) to (rows, groups, size)."""
    rows, columns = x.shape
    n_groups = math.ceil(columns / size)
    return F.pad(x, (0, n_groups * size - columns)).unflatten(1, (n_groups, size))  # (rows, groups, size)


def per_column(values: Tensor, size: int, columns: int) -> Tensor:
    """One value for each group, repeated for each of its columns: (rows or 1, groups) to (rows or 1, columns)."""
    return values.repeat_interleave(size, dim=1)[:, :columns]


def group_parameters(weight: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Scales, rounded to float16, and zero points of a matrix: both (rows, groups), or (1, 1) for one per matrix.

    The padding of a short group adds zeros, which every range holds anyway. Codes of "absmax" are stored unsigned, so
    its zero point is 2^(n_bits - 1) throughout. Raises ValueError for a matrix without entries, and for weights
    that are NaN or infinite.
    """
    if weight.dim() != 2:
        raise ValueError(f"a weight to quantise is a matrix (rows, columns), got shape {tuple(weight.shape)}")
    if not weight.numel():
        raise ValueError(f"a matrix of shape {tuple(weight.shape)} has no weight to quantise; leave the layer out")
    if not torch.isfinite(weight).all():
        n_bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"the weight has {n_bad} values that are NaN or infinite; quantise a sound checkpoint")
    grouped = in_groups(weight.float(), fmt.group_size(weight.shape[1]))  # (rows, groups, size)
    low, high = grouped.amin(2), grouped.amax(2)  # (rows, groups)
    if fmt.quant_group_size < 0:
        low, high = low.min().reshape(1, 1), high.max().reshape(1, 1)
    if fmt.scheme == "absmax":
        scale = torch.maximum(-low, high) / (2 ** (fmt.n_bits - 1) - 1)
        return rounded_scale(scale), torch.full_like(scale, 2 ** (fmt.n_bits - 1))
    scale = rounded_scale((high.clamp(min=0) - low.clamp(max=0)) / fmt.most)
    return scale, (-torch.round(low.clamp(max=0) / scale)).clamp(0, fmt.most)


def rounded_scale(scale: Tensor) -> Tensor:
    """As it will be read back from float16, and never 0: the codes are chosen for the scale that is stored."""
    if (scale > torch.finfo(torch.float16).max).any():
        raise ValueError(f"a scale of {scale.max():.3g} exceeds float16; the values are too large to quantise")
    return scale.clamp(min=TINY_SCALE).half().float()


# A quantised matrix


@dataclass
class Quantised:
    """Codes with what turns them back into floats.

    Shapes: codes (rows, columns), uint8; scales and zero_points (rows, groups) or (1, 1), float32.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    fmt: QuantFormat

    def dequantise(self) -> Tensor:
        columns = self.codes.shape[1]
        size = self.fmt.group_size(columns)
        scales, zeros = (per_column(part, size, columns) for part in (self.scales, self.zero_points))
        return from_codes(self.codes, scales, zeros)

    @property
    def n_bytes(self) -> int:
        """Bytes of codes, scales and zero points as a file holds them, counted on the packed tensors."""
        zeros = pack_codes(self.zero_points, self.fmt.n_bits).nbytes if self.fmt.scheme == "affine" else 0
        return pack_codes(self.codes, self.fmt.n_bits).nbytes + self.scales.half().nbytes + zeros


def quantise(weight: Tensor, fmt: QuantFormat) -> Quantised:
    """Round every weight to the nearest code of its group (RTN). Shapes: weight (rows, columns).

    The error of a weight is at most (1 / 2 + most / 2048) * its scale: half a step, and what float16 takes from the
    scale; zero stays exactly zero.
    """
    scales, zeros = group_parameters(weight, fmt)
    columns = weight.shape[1]
    size = fmt.group_size(columns)
    codes = to_codes(weight.float(), per_column(scales, size, columns), per_column(zeros, size, columns), 0, fmt.most)
    return Quantised(codes.to(torch.uint8), scales, zeros, fmt)


# Bytes


def pack_codes(codes: Tensor, n_bits: int) -> Tensor:
    """Codes of n_bits in as few bytes as a row needs: (rows, columns) to (rows, ceil(columns * n_bits / 8)), uint8.

    A row is a stream of bits, the lowest bit of the first code first; at 4 bits a byte holds an even column in its low
    half and the next one in its high half. Raises ValueError for a code that needs more bits.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**n_bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit {n_bits} bits")
    places = torch.arange(n_bits, device=codes.device)
    bits = (codes.to(torch.int64)[..., None] >> places & 1).flatten(1)  # (rows, bits)
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))  # (rows, bytes, 8)
    return (bits << torch.arange(8, device=codes.device)).sum(2).to(torch.uint8)  # (rows, bytes)


def unpack_codes(packed: Tensor, n_bits: int, columns: int) -> Tensor:
    """The way back: (rows, bytes) to (rows, columns), uint8. Raises ValueError where the bytes are not as many."""
    if packed.shape[-1] != math.ceil(columns * n_bits / 8):
        raise ValueError(f"{columns} codes of {n_bits} bits are not in rows of {packed.shape[-1]} bytes")
    if 8 % n_bits == 0:  # no code crosses a byte: one shift and one mask
        shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8, device=packed.device)
        return (packed[..., None] >> shifts & (2**n_bits - 1)).flatten(1)[:, :columns]  # (rows, columns)
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1  # (rows, bytes, 8)
    bits = bits.flatten(1)[:, : columns * n_bits].unflatten(1, (columns, n_bits))
    places = torch.arange(n_bits, dtype=torch.uint8, device=packed.device)
    return (bits << places).sum(2).to(torch.uint8)  # (rows, columns)


def stored_bytes(rows: int, columns: int, fmt: QuantFormat) -> int:
    """Bytes of a quantised matrix on disk: packed codes, float16 scales, and packed zero points if it has some."""
    n_scales = fmt.n_scales(rows, columns)
    scale_rows = 1 if fmt.quant_group_size < 0 else rows
    zeros = scale_rows * math.ceil(n_scales // scale_rows * fmt.n_bits / 8) if fmt.scheme == "affine" else 0
    return rows * math.ceil(columns * fmt.n_bits / 8) + 2 * n_scales + zeros


def bits_per_weight(rows: int, columns: int, fmt: QuantFormat) -> float:
    """What a weight really costs: n_bits, and its share of scale and zero point."""
    return 8 * stored_bytes(rows, columns, fmt) / (rows * columns)


# Error


def noise_variance(scale: Tensor) -> Tensor:
    """Mean squared rounding error of a grid, if it is spread evenly over the step: scale^2 / 12 (Bennett 1948)."""
    return scale.double() ** 2 / 12


def predicted_sqnr(n_bits: int, peak_to_rms: float) -> float:
    """Signal over quantisation noise in decibels for absmax codes of values whose largest is peak_to_rms times the rms.

    20 log10(2^(n_bits - 1) - 1) + 10 log10(12) - 20 log10(peak_to_rms): about 6.02 for each bit.
    """
    return 20 * math.log10((2 ** (n_bits - 1) - 1) / peak_to_rms) + 10 * math.log10(12)


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    """10 log10(power of the exact values / power of the error), decibels; infinite without an error."""
    noise = (exact - approximate).double().square().mean().item()
    return 10 * math.log10(exact.double().square().mean().item() / noise) if noise else math.inf


# Whole-number products


def int_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of int8 matrices, exact, as int32: (tokens, columns) and (rows, columns) to (tokens, rows).

    A CPU without int8 units multiplies floats faster than int8, and whole numbers in floats are exact as long as every
    sum is at most 2^24 in float32 or 2^53 in float64; int8 sums of fewer than 1,024 products are below the first.
    Raises ValueError for other types, and for rows so long that the sum may leave int32.
    """
    if left.dtype != torch.int8 or right.dtype != torch.int8:
        raise ValueError(f"int_matmul multiplies int8 by int8, got {left.dtype} and {right.dtype}")
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"rows of {left.shape[1]} and of {right.shape[1]} numbers have no product")
    largest = left.shape[1] * 128**2
    if largest >= 2**31:
        raise ValueError(f"a sum of {left.shape[1]} products of int8 may leave int32; split the columns")
    wide = torch.float32 if largest < 2**24 else torch.float64
    return (left.to(wide) @ right.to(wide).T).to(torch.int32)  # (tokens, rows)
