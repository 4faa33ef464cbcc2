"""Exercises of topic 12: write each function in a file of your own, then

python 12-scaling-optimization/exercises_12.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distillation import soft_cross_entropy
from exercises_08 import compare, numbers
from gptq import optimal_brain_quantise
from llm_calculators import count_parameters
from llm_config import ModelConfig
from pipeline_parallel import bubble_share
from quantized_layers import int8_codes
from scaling_laws import PUBLISHED_LAWS, ChinchillaLaw
from sequence_modeling import IGNORE
from training_cost import GPUS, zero_bytes
from training_planner import Plan, known_model, utilisations
from weight_quantization import QuantFormat, affine_parameters, in_groups, int_matmul, to_codes
from workbench import Exercise, first_difference, grade

# A row of weights on an affine grid


def affine_row(weights: list[float], n_bits: int) -> tuple[list[int], float, int]:
    low, high, most = min(0.0, *weights), max(0.0, *weights), 2**n_bits - 1
    if low == high:
        return [0] * len(weights), 1.0, 0
    scale = (high - low) / most
    zero_point = round(-low / scale)
    return [min(most, max(0, round(weight / scale) + zero_point)) for weight in weights], scale, zero_point


def check_affine_row(answer: Callable) -> str | None:
    cases = {
        "both signs": ([-0.6, 0.0, 0.3, 1.5], 4),
        "positive weights only": ([0.5, 0.7, 1.0], 4),
        "negative weights only": ([-3.0, -2.9, -1.0], 3),
        "the largest weight rounds past the last code": ([-5.5, 9.5, 0.0], 4),
        "eight bits, and the largest rounds past the last code": ([-100.5, 154.5, 3.2], 8),
        "halves go to the even neighbour": ([0.0, 2.5, 3.5, 15.0], 4),
        "two bits": ([-1.0, 0.1, 2.0], 2),
        "zeros only": ([0.0, 0.0], 4),
    }
    for name, (weights, n_bits) in cases.items():
        row = torch.tensor(weights, dtype=torch.float64)
        scale, zero_point = affine_parameters(row.min(), row.max(), n_bits)
        codes = to_codes(row, scale, zero_point, 0, 2**n_bits - 1)
        want = (codes.int().tolist(), scale.item() if row.any() else 1.0, int(zero_point))
        got = answer(list(weights), n_bits)
        if not (isinstance(got, tuple | list) and len(got) == 3):
            return f"{name}: expected (codes, scale, zero_point), got {got!r}"
        if len(got[0]) != len(weights) or any(code != int(code) for code in (*got[0], got[2])):
            return f"{name}: a code for each weight and a zero point, all whole numbers, got {got!r}"
        for what, found, wanted in zip(("codes", "scale", "zero_point"), got, want, strict=True):
            if difference := first_difference(found, wanted, 1e-12):
                return f"{name}, {weights} in {n_bits} bits, {what}: {difference}"
    return None


def affine_with(
    steps: int = -1, holds_zero: bool = True, to_whole: Callable = round, wraps: bool = False, whole_zero: bool = True
) -> Callable:
    """A wrong solution: another number of steps, range or rounding; or codes that wrap around."""

    def wrong(weights: list[float], n_bits: int) -> tuple[list[int], float, float]:
        low, high = min(weights), max(weights)
        if holds_zero:
            low, high = min(0.0, low), max(0.0, high)
        if low == high:
            return [0] * len(weights), 1.0, 0
        scale = (high - low) / (2**n_bits + steps)
        zero_point = to_whole(-low / scale) if whole_zero else -low / scale
        codes = [to_whole(weight / scale) + zero_point for weight in weights]
        if wraps:
            return [code % 2**n_bits for code in codes], scale, zero_point
        return [min(2**n_bits - 1, max(0, code)) for code in codes], scale, zero_point

    return wrong


def affine_rounded_once(weights: list[float], n_bits: int) -> tuple[list[int], float, int]:
    """Add the zero point that was not rounded, and round the sum: 0 then has no code of its own."""
    codes, scale, zero_point = affine_row(weights, n_bits)
    exact = -min(0.0, *weights) / scale
    return [min(2**n_bits - 1, max(0, round(weight / scale + exact))) for weight in weights], scale, zero_point


def affine_divides_by_zero(weights: list[float], n_bits: int) -> tuple[list[int], float, int]:
    if not any(weights):
        return affine_row([weight / 0.0 for weight in weights], n_bits)
    return affine_row(weights, n_bits)


# Groups


def group_codes(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    largest = torch.stack([part.abs().amax(1) for part in weight.split(quant_group_size, dim=1)], dim=1)
    scales = largest / (2 ** (n_bits - 1) - 1)  # (rows, groups)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = scales.repeat_interleave(quant_group_size, dim=1)[:, :columns]  # (rows, columns)
    return torch.round(weight / steps), scales


def check_group_codes(answer: Callable) -> str | None:
    cases = {
        "groups divide the row": (numbers(3, 6, seed=1), 4, 2),
        "a square matrix": (numbers(4, 4, seed=2), 4, 2),
        "the last group is short": (numbers(2, 7, seed=3), 4, 3),
        "one group for a row": (numbers(3, 5, seed=4), 8, 8),
        "the largest is negative": (-numbers(2, 4, seed=5).abs(), 4, 2),
        "three bits": (numbers(5, 6, seed=6), 3, 3),
        "a group of zeros": (numbers(3, 6, seed=7) * torch.tensor([0, 0, 1, 1, 1, 1.0]), 4, 2),
    }
    for name, (weight, n_bits, size) in cases.items():
        fmt = QuantFormat(n_bits, size, "absmax")
        grouped = in_groups(weight, fmt.group_size(weight.shape[1]))  # (rows, groups, size)
        scales = grouped.abs().amax(2) / (2 ** (n_bits - 1) - 1)  # (rows, groups)
        scales = scales.masked_fill(scales == 0, 1.0)
        codes = torch.round(grouped / scales[..., None]).flatten(1)[:, : weight.shape[1]]  # (rows, columns)
        look = "a group is quant_group_size neighbours in a row; codes lie around 0, and zeros have scale 1"
        if advice := compare(answer, (weight, n_bits, size), (codes, scales), name, look):
            return advice
    return None


def groups_with(most: Callable = lambda n_bits: 2 ** (n_bits - 1) - 1, size: Callable = Tensor.abs) -> Callable:
    """A wrong solution: another largest code, or another measure of size."""

    def wrong(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
        parts = weight.split(quant_group_size, dim=1)
        scales = torch.stack([size(part).amax(1) for part in parts], dim=1) / most(n_bits)
        scales = torch.where(scales != 0, scales, torch.ones_like(scales))
        steps = scales.repeat_interleave(quant_group_size, dim=1)[:, : weight.shape[1]]
        return torch.round(weight / steps), scales

    return wrong


def groups_of_rows(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    """Neighbours in a column share a scale: the axis of the outputs in place of that of the inputs."""
    return tuple(part.T for part in group_codes(weight.T, n_bits, quant_group_size))


def groups_of_the_flat_matrix(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    """Groups run on from one row into the next."""
    codes, scales = group_codes(weight.reshape(1, -1), n_bits, quant_group_size)
    per_row = math.ceil(weight.shape[1] / quant_group_size)
    return codes.reshape(weight.shape), F.pad(scales[0], (0, per_row * len(weight)))[: per_row * len(weight)].reshape(
        -1, per_row
    )


def groups_interleaved(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    """The scales of the groups laid side by side over and over instead of each over its own columns."""
    scales = group_codes(weight, n_bits, quant_group_size)[1]
    steps = scales.repeat(1, quant_group_size)[:, : weight.shape[1]]
    return torch.round(weight / steps), scales


def groups_with_a_zero_scale(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    parts = weight.split(quant_group_size, dim=1)
    scales = torch.stack([part.abs().amax(1) for part in parts], dim=1) / (2 ** (n_bits - 1) - 1)
    return torch.round(weight / scales.repeat_interleave(quant_group_size, dim=1)[:, : weight.shape[1]]), scales


def one_scale_for_a_row(weight: Tensor, n_bits: int, quant_group_size: int) -> tuple[Tensor, Tensor]:
    codes, scales = group_codes(weight, n_bits, weight.shape[1])
    return codes, scales.expand(-1, math.ceil(weight.shape[1] / quant_group_size))


# GPTQ for one row


def gptq_row(weight: Tensor, second_moment: Tensor, step: float) -> Tensor:
    factor = torch.linalg.cholesky(torch.linalg.inv(second_moment), upper=True)  # (columns, columns)
    left, rounded = weight.clone(), torch.zeros_like(weight)
    for column in range(len(weight)):
        rounded[column] = step * torch.round(left[column] / step)
        error = (left[column] - rounded[column]) / factor[column, column]
        left[column:] -= error * factor[column, column:]
    return rounded


def moment(columns: int, seed: int) -> Tensor:
    """A second moment of correlated inputs, no pair of them like another."""
    x = numbers(4 * columns, columns, seed=seed) @ numbers(columns, columns, seed=seed + 1)
    return x.T @ x / len(x)


def check_gptq_row(answer: Callable) -> str | None:
    by_hand = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    cases = {
        "the chapter's two weights": (torch.tensor([1.4, 0.4], dtype=torch.float64), by_hand, 1.0),
        "inputs of opposite sign": (torch.tensor([1.4, 0.4], dtype=torch.float64), 2 * torch.eye(2) - by_hand / 2, 1.0),
        "uncorrelated inputs of different size": (numbers(5, seed=3), torch.diag(numbers(5, seed=4) ** 2 + 0.1), 0.5),
        **{f"{n} correlated inputs": (2 * numbers(n, seed=n), moment(n, 10 * n), 0.75) for n in (3, 4, 7, 12, 24)},
    }
    for name, (weight, second_moment, step) in cases.items():
        second_moment = second_moment.double()
        scale, zero = torch.full((1, len(weight)), step).double(), torch.full((1, len(weight)), 1000.0).double()
        want = optimal_brain_quantise(weight[None], second_moment, scale, zero, 2000)[0]
        look = "each error is shared out among the columns that are still free, by the inverse of *their* moments"
        if advice := compare(answer, (weight, second_moment, step), want, name, look):
            return advice
    return None


def gptq_with(factor_of: Callable, divide: Callable = lambda factor, column: factor[column, column]) -> Callable:
    """A wrong solution: another matrix to share errors out by, or another divisor."""

    def wrong(weight: Tensor, second_moment: Tensor, step: float) -> Tensor:
        factor, left, rounded = factor_of(second_moment), weight.clone(), torch.zeros_like(weight)
        for column in range(len(weight)):
            rounded[column] = step * torch.round(left[column] / step)
            error = (left[column] - rounded[column]) / divide(factor, column)
            left[column:] -= error * factor[column, column:]
        return rounded

    return wrong


def upper_factor(second_moment: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(second_moment), upper=True)


def gptq_from_first_errors(weight: Tensor, second_moment: Tensor, step: float) -> Tensor:
    """Every error taken from the weight as it was, not as it has become."""
    factor, moved = upper_factor(second_moment), weight.clone()
    for column in range(len(weight)):
        error = (weight[column] - step * torch.round(weight[column] / step)) / factor[column, column]
        moved[column + 1 :] -= error * factor[column, column + 1 :]
    return step * torch.round(moved / step)


def gptq_from_the_last(weight: Tensor, second_moment: Tensor, step: float) -> Tensor:
    return gptq_row(weight.flip(0), second_moment.flip(0, 1), step).flip(0)


# Both sides in whole numbers


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    def coded(matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = matrix.abs().amax(1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return torch.round(matrix / scale).to(torch.int32), scale

    (x_codes, x_scale), (w_codes, w_scale) = coded(x), coded(weight)
    return (x_codes @ w_codes.T) * x_scale * w_scale.T  # (tokens, rows)


def check_int8_linear(answer: Callable) -> str | None:
    loud = numbers(4, 6, seed=1) * torch.tensor([[1.0], [100.0], [0.01], [1.0]])
    hushed = numbers(5, 6, seed=2) * torch.tensor([1.0, 0.0, 30.0, 1.0, 0.1])[:, None]
    cases = {
        "one token": (numbers(1, 4, seed=3), numbers(3, 4, seed=4)),
        "tokens of very different size": (loud, numbers(5, 6, seed=5)),
        "outputs of very different size, one of them 0": (numbers(3, 6, seed=6), hushed),
        "a token of zeros": (numbers(3, 4, seed=7) * torch.tensor([[1.0], [0.0], [1.0]]), numbers(2, 4, seed=8)),
        "a long row of equal signs": (numbers(2, 300, seed=9).abs() + 1, numbers(3, 300, seed=10).abs() + 1),
    }
    for name, (x, weight) in cases.items():
        (x_codes, x_scale), (w_codes, w_scale) = int8_codes(x, dim=1), int8_codes(weight, dim=1)
        want = int_matmul(x_codes, w_codes).double() * x_scale * w_scale.T  # (tokens, rows)
        look = "a scale for each token and each output, codes of -127 to 127, and a sum that is wide enough"
        if advice := compare(answer, (x, weight), want, name, look, 1e-6):
            return advice
    return None


def int8_with(
    x_dim: tuple[int, ...] = (1,),
    w_dim: tuple[int, ...] = (1,),
    most: int = 127,
    to_whole: Callable = torch.round,
    wide: torch.dtype = torch.int32,
    narrow: torch.dtype = torch.int8,
    guarded: bool = True,
) -> Callable:
    """A wrong solution: scales shared by too many, another largest code, no rounding, or a sum that is too narrow."""

    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        found = []
        for matrix, dim in ((x, x_dim), (weight, w_dim)):
            scale = matrix.abs().amax(dim, keepdim=True) / most
            scale = torch.where(scale > 0, scale, torch.ones_like(scale)) if guarded else scale
            found.append((to_whole(matrix / scale).to(narrow), scale))
        (x_codes, x_scale), (w_codes, w_scale) = found
        products = x_codes.to(wide)[:, None] * w_codes.to(wide)[None]  # (tokens, rows, columns)
        return products.sum(2, dtype=wide).double() * x_scale * w_scale.T

    return wrong


# Distillation


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float, weight: float
) -> Tensor:
    counted = targets != IGNORE  # (batch, seq)
    student, teacher = student_logits[counted], teacher_logits[counted]  # (tokens, vocab)
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_pi = F.log_softmax(teacher / temperature, dim=-1)
    soft = temperature**2 * (log_pi.exp() * (log_pi - log_p)).sum(-1).mean()
    return weight * soft + (1 - weight) * F.cross_entropy(student, targets[counted])


def check_distillation_loss(answer: Callable) -> str | None:
    targets = torch.tensor([[3, 0, IGNORE], [1, IGNORE, 4]])
    student, teacher = 2 * numbers(2, 3, 5, seed=1), 2 * numbers(2, 3, 5, seed=2)
    counted = targets != IGNORE
    for temperature, weight in ((1.0, 1.0), (1.0, 0.0), (2.0, 1.0), (4.0, 0.3)):
        case = f"temperature {temperature:g}, weight {weight:g}"
        losses, gradients = [], []
        for function in (answer, None):
            logits = student.clone().requires_grad_()
            if function is None:
                soft = soft_cross_entropy(logits, teacher, temperature)[counted].mean()
                loss = weight * soft + (1 - weight) * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            else:
                loss = function(logits, teacher.clone(), targets.clone(), temperature, weight)
            if not isinstance(loss, Tensor) or loss.dim():
                return f"{case}: expected a scalar tensor, got {loss!r}"
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, logits)[0])
        if difference := first_difference(losses[0], losses[1], 1e-9):
            return f"{case}: {difference}; a sum over the vocabulary, a mean over the positions that have a target"
        if difference := first_difference(gradients[0], gradients[1], 1e-9):
            return f"{case}, gradient for the student: {difference}"
    return None


def distilled_with(
    power: int = 2, reverse: bool = False, over: Callable = Tensor.sum, hard_t: bool = False, padding: bool = False
) -> Callable:
    """A wrong solution: another power of T, the other divergence, a mean over the vocabulary, padding counted ..."""

    def wrong(
        student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float, weight: float
    ) -> Tensor:
        counted = targets != IGNORE
        chosen = torch.ones_like(counted) if padding else counted
        log_p, log_pi = (F.log_softmax(part[chosen] / temperature, -1) for part in (student_logits, teacher_logits))
        first, second = (log_p, log_pi) if reverse else (log_pi, log_p)
        soft = temperature**power * over(first.exp() * (first - second), -1).mean()
        hard_logits = student_logits[counted] / (temperature if hard_t else 1.0)
        return weight * soft + (1 - weight) * F.cross_entropy(hard_logits, targets[counted])

    return wrong


def distillation_of_soft_labels_alone(student_logits, teacher_logits, targets, temperature, weight):
    """The weight at the wrong term."""
    return distillation_loss(student_logits, teacher_logits, targets, temperature, 1 - weight)


# A budget


def best_division(a: float, alpha: float, b: float, beta: float, flops: float) -> tuple[float, float]:
    product = flops / 6
    n_best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * product ** (beta / (alpha + beta))
    return n_best, product / n_best


def check_best_division(answer: Callable) -> str | None:
    cases = {
        "the chapter's budget": (ChinchillaLaw(1, 8, 0.5, 32, 0.5), 1536.0),
        "size helps less than data": (ChinchillaLaw(0, 9, 0.3, 9, 0.6), 54e6),
        **{f"{name}, Gopher's budget": (law, 5.76e23) for name, law in PUBLISHED_LAWS.items()},
        "the refit at a small budget": (PUBLISHED_LAWS["Besiroglu et al. 2024, refit"], 6e12),
    }
    for name, (law, flops) in cases.items():
        got = answer(law.a, law.alpha, law.b, law.beta, flops)
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"{name}: expected (N, D), got {got!r}"
        for what, found, wanted in zip(("N", "D"), got, law.optimum(flops), strict=True):
            if not found > 0 or abs(math.log(found / wanted)) > 1e-9:
                spent = 6 * got[0] * got[1] / flops
                return f"{name}: {what} is {found:.6g}, expected {wanted:.6g}; yours spend {spent:.3g} of the budget"
    return None


def divided_by(exponent: Callable, ratio: Callable, per_weight: float = 6.0) -> Callable:
    """A wrong solution: another exponent, another constant before it, or other FLOPs for a weight and token."""

    def wrong(a: float, alpha: float, b: float, beta: float, flops: float) -> tuple[float, float]:
        product = flops / per_weight
        n_best = ratio(a, alpha, b, beta) ** (1 / (alpha + beta)) * product ** exponent(alpha, beta)
        return n_best, product / n_best

    return wrong


def right_exponent(alpha: float, beta: float) -> float:
    return beta / (alpha + beta)


def right_ratio(a: float, alpha: float, b: float, beta: float) -> float:
    return alpha * a / (beta * b)


def twenty_tokens(a: float, alpha: float, b: float, beta: float, flops: float) -> tuple[float, float]:
    n_best = math.sqrt(flops / 120)
    return n_best, 20 * n_best


# Two shares of one peak


def shares_of_peak(model: ModelConfig, plan: Plan, seconds: float, peak: float) -> tuple[float, float]:
    heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.d_head
    multiplied = model.n_layers * model.d_model * (heads + 3 * model.d_ff) + model.vocab_size * model.d_model
    met = (plan.seq_len + 1) / 2
    forward = 2 * multiplied + 4 * model.n_layers * model.n_heads * model.d_head * met
    n_tokens, available = plan.batch_size * plan.seq_len, seconds * plan.n_gpus * peak
    again = forward if plan.recompute == "full" else 0.0
    return 3 * forward * n_tokens / available, (3 * forward + again) * n_tokens / available


SMALL = ModelConfig(1000, 64, 3, 4, 2, 16, 160, 2048, tie_embeddings=True)


def check_shares_of_peak(answer: Callable) -> str | None:
    llama = known_model("Llama-3.1-8B")
    cases = {
        "Llama-3.1-8B, rows of 4,096": (llama, Plan(64, batch_size=256), 8.0, "H100 SXM"),
        "rows of 32,768, all done again": (llama, Plan(64, seq_len=32768, batch_size=64, recompute="full"), 60.0, ""),
        "selective recomputation": (llama, Plan(8, batch_size=64, recompute="selective"), 20.0, "A100 80GB SXM"),
        "a tied embedding": (SMALL, Plan(2, batch_size=8, seq_len=512, recompute="full"), 1e-4, "A100 80GB SXM"),
    }
    for name, (model, plan, seconds, gpu) in cases.items():
        gpu = GPUS[gpu or "H100 SXM"]
        shares = utilisations(model, plan, seconds, gpu)
        want = [shares["model FLOPs (MFU)"], shares["hardware FLOPs (HFU)"]]
        got = answer(model, plan, seconds, gpu.flops)
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"{name}: expected (mfu, hfu), got {got!r}"
        for what, found, wanted in zip(("MFU", "HFU"), got, want, strict=True):
            if not abs(found / wanted - 1) < 1e-6:
                return f"{name}: {what} is {found:.6g}, expected {wanted:.6g}, {found / wanted:.4f} times as much"
    return None


def shares_with(
    tables: Callable = lambda model: 1,
    met: Callable = lambda seq_len: (seq_len + 1) / 2,
    wide_keys: bool = False,
    mfu_counts_again: bool = False,
    again: Callable = lambda recompute, forward, scores: forward if recompute == "full" else 0.0,
    n_gpus: Callable = lambda plan: plan.n_gpus,
) -> Callable:
    """A wrong solution: one term of the count, or of what is done again, is another."""

    def wrong(model: ModelConfig, plan: Plan, seconds: float, peak: float) -> tuple[float, float]:
        n_kv_heads = model.n_heads if wide_keys else model.n_kv_heads
        heads = (2 * model.n_heads + 2 * n_kv_heads) * model.d_head
        multiplied = model.n_layers * model.d_model * (heads + 3 * model.d_ff)
        multiplied += tables(model) * model.vocab_size * model.d_model
        scores = 4 * model.n_layers * model.n_heads * model.d_head * met(plan.seq_len)
        forward, n_tokens = 2 * multiplied + scores, plan.batch_size * plan.seq_len
        twice, available = again(plan.recompute, forward, scores), seconds * n_gpus(plan) * peak
        mfu = (3 * forward + mfu_counts_again * twice) * n_tokens / available
        return mfu, (3 * forward + twice) * n_tokens / available

    return wrong


def six_n_of_everything(model: ModelConfig, plan: Plan, seconds: float, peak: float) -> tuple[float, float]:
    """6 N D with every weight, the looked-up table included, and no attention."""
    share = 6 * count_parameters(model).total * plan.batch_size * plan.seq_len / (seconds * plan.n_gpus * peak)
    return share, share * (4 / 3 if plan.recompute == "full" else 1)


# What a GPU of a plan holds, and how long it waits


def gpu_bill(n_parameters: float, plan: Plan) -> tuple[float, float, float, float]:
    own = n_parameters / (plan.tensor_size * plan.pipeline_size)
    weights, gradients, state = (
        each * own / (plan.data_size if plan.zero_stage >= stage else 1) for each, stage in ((2, 3), (2, 2), (12, 1))
    )
    waits = plan.pipeline_size - 1
    return weights, gradients, state, waits / (plan.n_micro * plan.n_chunks + waits)


def check_gpu_bill(answer: Callable) -> str | None:
    cases = [
        *(Plan(16, zero_stage=stage, batch_size=32) for stage in range(4)),
        Plan(64, 4, 2, 1, 2, 64),
        Plan(8, 1, 4, 0, 1, 16),
        Plan(96, 2, 6, 1, 4, 128, n_chunks=5),
        Plan(6, 1, 3, 1, 1, 4, n_chunks=2),
        Plan(1, batch_size=4),
    ]
    for plan in cases:
        own = 8e9 / (plan.tensor_size * plan.pipeline_size)
        held = zero_bytes(own, plan.data_size, plan.zero_stage)
        waits = bubble_share(plan.pipeline_size, plan.n_micro * plan.n_chunks)
        got = answer(8e9, plan)
        if not (isinstance(got, tuple | list) and len(got) == 4):
            return f"{plan.layout}: expected (weights, gradients, optimizer, bubble), got {got!r}"
        for found, (what, wanted) in zip(got, held.items(), strict=False):
            if not abs(found / wanted - 1) < 1e-9:
                return f"{plan.layout}: {found / 1e9:.3f} GB of {what}, expected {wanted / 1e9:.3f}"
        if not abs(got[3] - waits) < 1e-9:
            return f"{plan.layout}: a bubble of {got[3]:.4f} of the step, expected {waits:.4f}"
    return None


def bill_with(
    stages: tuple[int, int, int] = (3, 2, 1),
    state: float = 12,
    among: Callable = lambda plan: plan.data_size,
    own: Callable = lambda plan: plan.tensor_size * plan.pipeline_size,
    bubble: Callable | None = None,
) -> Callable:
    """A wrong solution: another stage from which a part is shared, other bytes, or another bubble."""

    def wrong(n_parameters: float, plan: Plan) -> tuple[float, ...]:
        held = [
            each * n_parameters / own(plan) / (among(plan) if plan.zero_stage >= stage else 1)
            for each, stage in zip((2, 2, state), stages, strict=True)
        ]
        if bubble is None:
            return *held, gpu_bill(n_parameters, plan)[3]
        return *held, bubble(plan.pipeline_size, plan.n_micro, plan.n_chunks)

    return wrong


EXERCISES = [
    Exercise(
        name="affine_row",
        statement=(
            "Round a row of weights to codes 0 to 2^n_bits - 1. The grid reaches from the least to the largest weight, "
            "widened to hold 0, which has the code zero_point. A row of zeros has codes 0, scale 1 and zero point 0."
        ),
        signature="affine_row(weights, n_bits) -> (codes, scale, zero_point); codes: list of int",
        hint="code = round(weight / scale) + zero_point, then clamped. round(2.5) is 2 in Python, as in PyTorch.",
        check=check_affine_row,
        solution=affine_row,
        mistakes={
            "2^b steps in place of 2^b - 1": affine_with(steps=0),
            "0 need not lie in the range": affine_with(holds_zero=False),
            "cut off instead of rounded": affine_with(to_whole=int),
            "halves always upwards": affine_with(to_whole=lambda value: math.floor(value + 0.5)),
            "a code beyond the last wraps around": affine_with(wraps=True),
            "the zero point is not rounded": affine_with(whole_zero=False),
            "weight and zero point rounded together": affine_rounded_once,
            "the scale of zeros is 0": affine_divides_by_zero,
        },
    ),
    Exercise(
        name="group_codes",
        statement=(
            "absmax codes of a matrix (rows, columns): every quant_group_size neighbours in a row share a scale; the "
            "last group of a row may be short. A group of zeros has scale 1. Codes are signed whole numbers around 0."
        ),
        signature="group_codes(weight, n_bits, quant_group_size) -> (codes (rows, columns), scales (rows, groups))",
        hint="The largest code is 2^(n_bits - 1) - 1. weight.split(size, dim=1) cuts a row, a short end included.",
        check=check_group_codes,
        solution=group_codes,
        mistakes={
            "groups down the columns": groups_of_rows,
            "groups run on into the next row": groups_of_the_flat_matrix,
            "the scales lie over the wrong columns": groups_interleaved,
            "one scale for the whole row": one_scale_for_a_row,
            "2^(b-1) for the largest code": groups_with(lambda n_bits: 2 ** (n_bits - 1)),
            "2^b - 1 for the largest code": groups_with(lambda n_bits: 2**n_bits - 1),
            "the largest, not the largest size": groups_with(size=lambda part: part),
            "the scale of a group of zeros is 0": groups_with_a_zero_scale,
        },
    ),
    Exercise(
        name="gptq_row",
        statement=(
            "GPTQ for one row: round the weights from the first to the last to multiples of `step`. After each, the "
            "weights still free take over its error so that the output changes least. second_moment is the mean of "
            "x x^T, float64, invertible; no damping."
        ),
        signature="gptq_row(weight, second_moment, step) -> rounded weights (columns)",
        hint="With U upper triangular and U^T U = second_moment^-1: w_F -= (w_q - rounded) / U_qq * U_qF.",
        check=check_gptq_row,
        solution=gptq_row,
        mistakes={
            "rounded to nearest": lambda weight, second_moment, step: step * torch.round(weight / step),
            "the whole inverse for every column": gptq_with(torch.linalg.inv),
            "the second moment in place of its inverse": gptq_with(lambda found: found),
            "the factor of the second moment": gptq_with(lambda found: torch.linalg.cholesky(found, upper=True)),
            "the lower factor, transposed": gptq_with(
                lambda found: torch.linalg.inv(torch.linalg.cholesky(found, upper=True))
            ),
            "not divided": gptq_with(upper_factor, lambda factor, column: 1.0),
            "divided by the square": gptq_with(upper_factor, lambda factor, column: factor[column, column] ** 2),
            "divided by another diagonal": gptq_with(upper_factor, lambda factor, column: factor[-1, -1]),
            "errors moved the wrong way": gptq_with(upper_factor, lambda factor, column: -factor[column, column]),
            "errors of the weights as they were": gptq_from_first_errors,
            "from the last to the first": gptq_from_the_last,
        },
    ),
    Exercise(
        name="int8_linear",
        statement=(
            "x @ weight.T as LLM.int8 computes it, without outliers: every token (row of x) and every output (row of "
            "weight) has an absmax scale and int8 codes; the products are summed in whole numbers and scaled once."
        ),
        signature="int8_linear(x, weight) -> (tokens, rows), float64; x (tokens, columns), weight (rows, columns)",
        hint="A product of two codes needs 15 bits; how many does a sum of 300 need? A row of zeros has scale 1.",
        check=check_int8_linear,
        solution=int8_linear,
        mistakes={
            "summed in int8": int8_with(wide=torch.int8),
            "summed in int16": int8_with(wide=torch.int16),
            "one scale for all tokens": int8_with(x_dim=(0, 1)),
            "one scale for the whole weight": int8_with(w_dim=(0, 1)),
            "128 for the largest code": int8_with(most=128),
            "cut off instead of rounded": int8_with(to_whole=torch.trunc),
            "a row of zeros divides by 0": int8_with(wide=torch.float64, narrow=torch.float64, guarded=False),
            "nothing is rounded": lambda x, weight: x @ weight.T,
        },
    ),
    Exercise(
        name="distillation_loss",
        statement=(
            "weight times T^2 KL(teacher || student), both softened by T, plus (1 - weight) times the cross-entropy of "
            "the targets at temperature 1. Both are means over the positions whose target is not -100."
        ),
        signature=(
            "distillation_loss(student_logits, teacher_logits, targets, temperature, weight) -> scalar; logits "
            "(batch, seq, vocab), targets (batch, seq)"
        ),
        hint="F.kl_div takes the log of the student first, and reduction='mean' divides by the vocabulary, too.",
        check=check_distillation_loss,
        solution=distillation_loss,
        mistakes={
            "no T^2": distilled_with(power=0),
            "T in place of T^2": distilled_with(power=1),
            "the other divergence": distilled_with(reverse=True),
            "a mean over the vocabulary": distilled_with(over=Tensor.mean),
            "the targets at temperature T, too": distilled_with(hard_t=True),
            "padding is distilled": distilled_with(padding=True),
            "the weight at the wrong term": distillation_of_soft_labels_alone,
        },
    ),
    Exercise(
        name="best_division",
        statement="N and D of the least loss E + a / N^alpha + b / D^beta among all with 6 N D = flops.",
        signature="best_division(a, alpha, b, beta, flops) -> (N, D)",
        hint="At the best point alpha a / N^alpha = beta b / D^beta.",
        check=check_best_division,
        solution=best_division,
        mistakes={
            "exponents swapped": divided_by(lambda alpha, beta: alpha / (alpha + beta), right_ratio),
            "always the square root": divided_by(lambda alpha, beta: 0.5, right_ratio),
            "the constant upside down": divided_by(right_exponent, lambda *law: 1 / right_ratio(*law)),
            "a / b without the exponents": divided_by(right_exponent, lambda a, alpha, b, beta: a / b),
            "2 FLOPs for each weight and token": divided_by(right_exponent, right_ratio, 2.0),
            "N D = flops": divided_by(right_exponent, right_ratio, 1.0),
            "20 tokens for each weight": twenty_tokens,
        },
    ),
    Exercise(
        name="shares_of_peak",
        statement=(
            "MFU and HFU of an optimizer step that took `seconds`, for a dense decoder without biases. Count matrix "
            "products and the scores of a causal mask (a query meets (seq_len + 1) / 2 keys on average); backward "
            "costs twice forward. recompute 'full' repeats the forward pass; 'selective' repeats no product."
        ),
        signature="shares_of_peak(model, plan, seconds, peak) -> (mfu, hfu); peak: FLOP/s of one GPU",
        hint="Looking up a row of the embedding multiplies nothing; the head multiplies, tied or not.",
        check=check_shares_of_peak,
        solution=shares_of_peak,
        mistakes={
            "the embedding counted beside the head": shares_with(tables=lambda model: 2),
            "an untied embedding counted, too": shares_with(tables=lambda model: 1 if model.tie_embeddings else 2),
            "the head left out": shares_with(tables=lambda model: 0),
            "a tied head left out": shares_with(tables=lambda model: 0 if model.tie_embeddings else 1),
            "no attention": shares_with(met=lambda seq_len: 0),
            "all scores, future ones too": shares_with(met=lambda seq_len: seq_len),
            "a key head for each query head": shares_with(wide_keys=True),
            "MFU with recomputation counted": shares_with(mfu_counts_again=True),
            "HFU without what is done again": shares_with(again=lambda recompute, forward, scores: 0.0),
            "selective counted as full": shares_with(
                again=lambda recompute, forward, scores: forward if recompute != "none" else 0.0
            ),
            "attention not repeated": shares_with(
                again=lambda recompute, forward, scores: forward - scores if recompute == "full" else 0.0
            ),
            "one GPU's peak for all": shares_with(n_gpus=lambda plan: 1),
            "6 N of all weights": six_n_of_everything,
        },
    ),
    Exercise(
        name="gpu_bill",
        statement=(
            "Bytes of weights, gradients (bf16) and AdamW (float32 master, mean, square) on one GPU of a plan whose "
            "tensor and pipeline sizes divide the parameters evenly, under its ZeRO stage; and the share of the step "
            "that a stage waits under 1F1B, interleaved if n_chunks > 1."
        ),
        signature="gpu_bill(n_parameters, plan) -> (weights, gradients, optimizer, bubble); see training_planner.Plan",
        hint="ZeRO shares among plan.data_size GPUs. The bubble is a share of the whole step, waiting included.",
        check=check_gpu_bill,
        solution=gpu_bill,
        mistakes={
            "stage 1 shares the gradients, too": bill_with(stages=(3, 1, 1)),
            "stage 2 shares the weights": bill_with(stages=(2, 3, 1)),
            "every stage one too late": bill_with(stages=(4, 3, 2)),
            "no master weights": bill_with(state=8),
            "shared among all GPUs": bill_with(among=lambda plan: plan.n_gpus),
            "pipeline stages hold everything": bill_with(own=lambda plan: plan.tensor_size),
            "p in place of p - 1": bill_with(bubble=lambda p, m, c: p / (c * m + p - 1)),
            "one micro-batch too many": bill_with(bubble=lambda p, m, c: (p - 1) / (c * m + p)),
            "a share of the work, not of the step": bill_with(bubble=lambda p, m, c: (p - 1) / (c * m)),
            "chunks forgotten": bill_with(bubble=lambda p, m, c: (p - 1) / (m + p - 1)),
            "chunks make it longer": bill_with(bubble=lambda p, m, c: c * (p - 1) / (m + c * (p - 1))),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
