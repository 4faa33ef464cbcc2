"""Proofs of the quantisation of weights: torch's own numerics, error bounds for any matrix, bytes, packing."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weight_quantization
from weight_quantization import (
    QuantFormat,
    absmax_scale,
    affine_parameters,
    bits_per_weight,
    from_codes,
    int_matmul,
    noise_variance,
    pack_codes,
    predicted_sqnr,
    quantise,
    sqnr,
    stored_bytes,
    to_codes,
    unpack_codes,
)

ORACLE = "torch"
FORMATS = st.builds(
    QuantFormat,
    st.integers(2, 8),
    st.sampled_from((-1, 0, 1, 5, 8, 32)),
    st.sampled_from(("absmax", "affine")),
)


@st.composite
def matrices(draw) -> torch.Tensor:
    """Any size, scale and offset; sometimes a row of zeros, a constant row or one outlier."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 41))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) + draw(st.sampled_from((0.0, 3.0, -3.0)))
    weight = weight * 10.0 ** draw(st.integers(-3, 3))
    kind = draw(st.sampled_from(("plain", "zero row", "constant row", "outlier")))
    if kind != "plain":
        weight[0] = {"zero row": 0.0, "constant row": -0.7, "outlier": weight[0]}[kind]
    if kind == "outlier":
        weight[0, 0] = 1000 * weight.abs().max()
        weight = weight.clamp(-3e4, 3e4)
    return weight


@pytest.fixture
def quiet():
    """torch's quantised tensors are deprecated, and say so; their numerics are the oracle all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_scale_and_zero_point_equal_the_observer(quiet, parity) -> None:
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, 4.0, -4.0, None):
        weight = torch.zeros(5, 37) if offset is None else torch.randn(5, 37, generator=generator) + offset
        observer = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        observer(weight)
        theirs = [part.float() for part in observer.calculate_qparams()]
        ours = [part.reshape(1) for part in affine_parameters(weight.min(), weight.max(), 8)]
        parity("affine_parameters", "torch.ao MinMaxObserver", "output", ours, theirs, 0)
        observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine)
        observer(weight)
        theirs = [part.float() for part in observer.calculate_qparams()]
        ours = list(affine_parameters(weight.amin(1), weight.amax(1), 8))
        parity("affine_parameters, by channel", "torch.ao PerChannelMinMaxObserver", "output", ours, theirs, 0)


def test_codes_equal_torch_bit_for_bit(quiet, parity) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        weight = torch.randn(7, 53, generator=generator) * 10 ** torch.randint(-3, 4, (), generator=generator).item()
        scale = absmax_scale(weight, 8)
        ours = to_codes(weight, scale, 0, -128, 127).to(torch.int8)
        theirs = torch.quantize_per_tensor(weight, scale.item(), 0, torch.qint8).int_repr()
        parity("absmax codes, by tensor", "torch.quantize_per_tensor", "output", ours, theirs, 0)
        scales = absmax_scale(weight, 8, dim=1)
        zeros = torch.randint(-20, 20, (7, 1), generator=generator)
        ours = to_codes(weight, scales, zeros, -128, 127).to(torch.int8)
        theirs = torch.quantize_per_channel(weight, scales[:, 0], zeros[:, 0], 0, torch.qint8)
        parity("affine codes, by channel", "torch.quantize_per_channel", "output", ours, theirs.int_repr(), 0)
        parity("from_codes", "Tensor.dequantize", "output", from_codes(ours, scales, zeros), theirs.dequantize(), 0)
        scale, zero = affine_parameters(weight.min(), weight.max(), 4)
        ours = from_codes(to_codes(weight, scale, zero, 0, 15), scale, zero)
        theirs = torch.fake_quantize_per_tensor_affine(weight, scale.item(), int(zero), 0, 15)
        parity("int4 codes, by tensor", "torch.fake_quantize_per_tensor_affine", "output", ours, theirs, 0)


def test_groups_equal_torch_by_channel_of_the_cut_matrix(quiet, parity) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    for scheme in ("absmax", "affine"):
        quantised = quantise(weight, QuantFormat(4, 8, scheme))
        scales, zeros = quantised.scales.flatten(), quantised.zero_points.flatten().int()
        theirs = torch.fake_quantize_per_channel_affine(weight.reshape(30, 8), scales, zeros, 0, 0, 15).reshape(6, 40)
        parity(
            f"quantise, groups, {scheme}",
            "fake_quantize_per_channel_affine",
            "output",
            quantised.dequantise(),
            theirs,
            0,
        )


def test_halves_go_to_the_even_neighbour(quiet) -> None:
    x, scale = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25, torch.tensor(0.25)
    assert to_codes(x, scale, 0, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7)
    assert torch.equal(from_codes(to_codes(x, scale, 0, -8, 7), scale, 0), theirs)


@settings(max_examples=80, deadline=None)
@given(matrices(), FORMATS)
def test_no_weight_is_further_off_than_half_a_step(weight, fmt) -> None:
    quantised = quantise(weight, fmt)
    columns, size = weight.shape[1], fmt.group_size(weight.shape[1])
    step = weight_quantization.per_column(quantised.scales, size, columns)
    error = (quantised.dequantise().double() - weight.double()).abs()
    assert (error <= (0.5 + fmt.most / 2048 + 1e-4) * step).all()
    assert (quantised.dequantise()[weight == 0] == 0).all()
    assert quantised.codes.max() <= fmt.most


@settings(max_examples=60, deadline=None)
@given(matrices(), FORMATS)
def test_a_quantised_matrix_is_a_fixed_point(weight, fmt) -> None:
    once = quantise(weight, fmt)
    again = to_codes(
        once.dequantise(),
        weight_quantization.per_column(once.scales, fmt.group_size(weight.shape[1]), weight.shape[1]),
        weight_quantization.per_column(once.zero_points, fmt.group_size(weight.shape[1]), weight.shape[1]),
        0,
        fmt.most,
    )
    assert torch.equal(again.to(torch.uint8), once.codes)


@settings(max_examples=80, deadline=None)
@given(matrices(), FORMATS)
def test_bytes_equal_the_formula(weight, fmt) -> None:
    assert quantise(weight, fmt).n_bytes == stored_bytes(*weight.shape, fmt)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_is_undone_and_as_short_as_can_be(n_bits, rows, columns, seed) -> None:
    codes = torch.randint(0, 2**n_bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, n_bits)
    assert packed.shape == (rows, math.ceil(columns * n_bits / 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, n_bits, columns), codes.to(torch.uint8))


def test_two_codes_of_four_bits_share_a_byte() -> None:
    assert pack_codes(torch.tensor([[1, 2, 15]]), 4).tolist() == [[0x21, 0x0F]]
    assert pack_codes(torch.tensor([[1, 2, 3, 0]]), 2).tolist() == [[0b00111001]]
    with pytest.raises(ValueError, match="codes from 3 to 16 do not fit 4 bits"):
        pack_codes(torch.tensor([[3, 16]]), 4)
    with pytest.raises(ValueError, match="5 codes of 4 bits are not in rows of 2 bytes"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.randn(3), QuantFormat()), r"is a matrix \(rows, columns\), got shape \(3,\)"),
        (
            lambda: quantise(torch.randn(2, 3, 4), QuantFormat()),
            r"is a matrix \(rows, columns\), got shape \(2, 3, 4\)",
        ),
        (lambda: QuantFormat(4.0), "n_bits must be a whole number, got 4.0"),
        (lambda: QuantFormat(4, 2.5), "quant_group_size must be a whole number, got 2.5"),
        (lambda: int_matmul(*(torch.zeros(2, n, dtype=torch.int8) for n in (3, 4))), "rows of 3 and of 4 numbers"),
    ],
)
def test_what_has_no_codes_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_codes_below_the_zero_point_are_negative() -> None:
    """Subtracted in uint8, 3 - 5 would be 254."""
    codes, zero = torch.tensor([3, 9], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8)
    assert from_codes(codes, torch.tensor(0.5), zero).tolist() == [-1.0, 2.0]


def test_hand_worked_row() -> None:
    """The chapter's row: range -0.6..1.5, 4 bits, so a step of 0.14 and 0 at code 4."""
    weight = torch.tensor([[-0.6, 0.0, 0.35, 1.5]])
    scale, zero = affine_parameters(weight.min(), weight.max(), 4)
    assert scale.item() == pytest.approx(0.14) and zero.item() == 4
    codes = to_codes(weight, scale, zero, 0, 15)
    assert codes.tolist() == [[0, 4, 6, 15]]  # 0.35 / 0.14 = 2.5 in exact sums goes to the even 2
    assert from_codes(codes, scale, zero).tolist() == [pytest.approx([-0.56, 0.0, 0.28, 1.54], abs=1e-6)]


def test_bits_with_their_share_of_the_scales() -> None:
    assert bits_per_weight(8, 128, QuantFormat(4, 32, "absmax")) == 4 + 16 / 32
    assert bits_per_weight(8, 128, QuantFormat(4, 32, "affine")) == 4 + 16 / 32 + 4 / 32
    assert bits_per_weight(8, 128, QuantFormat(8, 0, "absmax")) == 8 + 16 / 128
    assert stored_bytes(3, 10, QuantFormat(3, -1, "affine")) == 3 * 4 + 2 + 1


def test_noise_is_that_of_an_even_spread_and_six_decibels_a_bit() -> None:
    x = torch.rand(400, 500, generator=torch.Generator().manual_seed(3)) * 2 - 1
    x[0, 0] = 1.0
    for n_bits in (3, 4, 6, 8):
        scale = absmax_scale(x, n_bits)
        approximate = from_codes(to_codes(x, scale, 0, -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1), scale, 0)
        assert (x - approximate).square().mean().item() == pytest.approx(noise_variance(scale).item(), rel=0.02)
        peak_to_rms = (x.abs().max() / x.square().mean().sqrt()).item()
        assert sqnr(x, approximate) == pytest.approx(predicted_sqnr(n_bits, peak_to_rms), abs=0.1)
    assert predicted_sqnr(9, 1) - predicted_sqnr(8, 1) == pytest.approx(6.02, abs=0.05)
    assert sqnr(x, x) == math.inf


def test_smaller_groups_never_have_larger_steps() -> None:
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(4)) ** 3
    errors = [
        (quantise(weight, QuantFormat(4, size)).dequantise() - weight).square().mean().item() for size in (-1, 0, 16, 4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from((1, 63, 1023, 1024, 1100)), st.integers(0, 2**31), st.booleans())
def test_int_products_are_exact(rows, columns, seed, extreme) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-128, 128, (4, columns), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    if extreme:
        left, right = torch.full_like(left, -128), torch.full_like(right, -128)
    product = int_matmul(left, right)
    assert product.dtype == torch.int32 and torch.equal(product, left.int() @ right.int().T)


def test_int_products_equal_torch(parity) -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randint(-128, 128, (n, 96), dtype=torch.int8, generator=generator) for n in (20, 11))
    parity("int_matmul", "torch._int_mm", "output", int_matmul(left, right), torch._int_mm(left, right.T), 0)


def test_shape_comments(checked_shapes) -> None:
    with checked_shapes(weight_quantization) as checked:
        quantised = quantise(torch.randn(5, 19), QuantFormat(3, 8))
        unpack_codes(pack_codes(quantised.codes, 3), 3, 19)
        unpack_codes(pack_codes(quantised.codes, 4), 4, 19)
        int_matmul(torch.ones(2, 19, dtype=torch.int8), torch.ones(5, 19, dtype=torch.int8))
    assert len(checked) >= 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantFormat(1), "n_bits must be finite and >= 2 and <= 8, got 1"),
        (lambda: QuantFormat(9), "n_bits must be finite and >= 2 and <= 8, got 9"),
        (lambda: QuantFormat(quant_group_size=-2), "quant_group_size must be finite and >= -1, got -2"),
        (lambda: QuantFormat(scheme="absmin"), "unknown scheme 'absmin'; did you mean 'absmax'?"),
        (lambda: quantise(torch.tensor([[1.0, math.nan]]), QuantFormat()), "1 values that are NaN or infinite"),
        (lambda: quantise(torch.full((1, 2), 1e8), QuantFormat()), "exceeds float16"),
        (lambda: quantise(torch.ones(0, 4), QuantFormat()), "a matrix of shape (0, 4) has no weight to quantise"),
        (lambda: int_matmul(*[torch.ones(1, 2**17, dtype=torch.int8)] * 2), "may leave int32; split the columns"),
        (lambda: int_matmul(torch.ones(1, 2), torch.ones(1, 2)), "int8 by int8, got torch.float32"),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_zero_point_is_added_after_rounding(quiet, parity) -> None:
    """Halves go to the even neighbour of x / scale; an odd zero point added before would turn them otherwise."""
    x, scale = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25, torch.tensor(0.25)
    for zero in (0, 3, 4):
        ours = from_codes(to_codes(x, scale, zero, 0, 15), scale, zero)
        theirs = torch.fake_quantize_per_tensor_affine(x, 0.25, zero, 0, 15)
        parity("to_codes, halves", "torch.fake_quantize_per_tensor_affine", "output", ours, theirs, 0)
