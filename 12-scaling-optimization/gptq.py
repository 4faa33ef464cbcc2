"""Topic 12 - GPTQ: round a weight matrix so that its *outputs* stay, each rounding error mended by the weights to come.

    batches = calibration_batches(tokenizer, n_documents=128, seed=0)
    statistics = input_statistics(model, batches)              # of every linear layer inside the blocks
    gptq(layer.weight, statistics[name].second_moment, QuantFormat(3, 32))

LeCun et al. 1990 and Hassibi and Stork 1993 (optimal brain damage and surgeon: the second-order cost of a weight),
Frantar and Alistarh 2022 (OBQ, arXiv 2208.11580), Frantar et al. 2022 (GPTQ, arXiv 2210.17323).
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from course_tokenizer import CourseTokenizer
from sequence_modeling import device_of
from tiny_world import World
from weight_quantization import QuantFormat, Quantised, from_codes, group_parameters, per_column, to_codes
from workbench import check_range

SINGULAR = 1e-11  # of an input's power: below it float64 sums hold only rounding errors
Batch = tuple[Tensor, Tensor]  # token ids and which of them are no padding, both (batch, seq)


# Calibration: what the layers are really given


def calibration_batches(tokenizer: CourseTokenizer, n_documents: int, seed: int, batch_size: int = 32) -> list[Batch]:
    """Documents of the training side, in batches of similar length. Raises ValueError for fewer than one."""
    if n_documents < 1:
        raise ValueError(f"calibration needs at least 1 document, got n_documents={n_documents}")
    documents = World().documents(n_documents, seed, "train")
    rows = sorted((tokenizer.encode_document(document).ids[:-1] for document in documents), key=len)
    batches = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        real = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in chosen], batch_first=True)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in chosen], batch_first=True)  # (batch, seq)
        batches.append((ids, real))
    return batches


@dataclass
class InputStatistics:
    """What a linear layer was given, summed over the tokens of the calibration.

    Shapes: second_moment (columns, columns), the mean of x x^T in float64, half of the Hessian of the squared output
    error; mean_abs and max_abs (columns), of |x|.
    """

    second_moment: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    n_tokens: int = 0

    @classmethod
    def empty(cls, columns: int) -> "InputStatistics":
        moment = torch.zeros(columns, columns, dtype=torch.float64)
        return cls(moment, torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """Count more tokens: x (tokens, columns)."""
        x = x.detach().cpu().double()
        total = self.n_tokens + len(x)
        self.second_moment += (x.T @ x - len(x) * self.second_moment) / total
        self.mean_abs += (x.abs().sum(0) - len(x) * self.mean_abs) / total
        self.max_abs = torch.maximum(self.max_abs, x.abs().amax(0))
        self.n_tokens = total


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by name: what is quantised and pruned. Embedding and head stand apart."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


@torch.no_grad()
def input_statistics(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str] | None = None
) -> dict[str, InputStatistics]:
    """Run the calibration and watch the inputs of the named linear layers, padding left out; without names, all."""
    layers = block_linears(model)
    chosen = {name: layers[name] for name in (layers if names is None else names)}
    found = {name: InputStatistics.empty(layer.in_features) for name, layer in chosen.items()}
    device, real = device_of(model), torch.ones(0, dtype=torch.bool)
    with ExitStack() as stack:
        for name, layer in chosen.items():
            # `name=name`: a closure reads a variable when it is called, and by then the loop has reached its last name
            hook = layer.register_forward_pre_hook(lambda _, inputs, name=name: found[name].add(inputs[0][real]))
            stack.callback(hook.remove)
        for token_ids, is_real in batches:
            real = is_real.to(device)
            model(token_ids.to(device))
    return found


def output_error(exact: Tensor, approximate: Tensor, second_moment: Tensor) -> float:
    """Mean squared change of a layer's outputs over tokens and outputs: the mean of diag(D M D^T), D the difference.

    Shapes: both weights (rows, columns), second_moment (columns, columns).
    """
    difference = (approximate - exact).double()
    return ((difference @ second_moment) * difference).sum(1).mean().item()


# The slow definition: optimal brain surgery, one weight after the other


def optimal_brain_quantise(weight: Tensor, second_moment: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """Round the columns in order; after each, the weights still free move to their exact optimum (OBQ's update).

    delta = -(w_q - round(w_q)) / [F^-1]_qq * [F^-1]_:q, with F the second moment of the free columns, inverted afresh
    for each of them: O(columns^4), which is why GPTQ exists. Shapes: weight (rows, columns), scale and zero
    (rows, columns); returns the rounded weights.
    """
    weight, columns = weight.double().clone(), weight.shape[1]
    rounded = torch.zeros_like(weight)
    for column in range(columns):
        inverse = torch.linalg.inv(second_moment[column:, column:])  # (*, *), the columns still free
        value = weight[:, column]  # (rows)
        codes = to_codes(value, scale[:, column], zero[:, column], 0, most)
        rounded[:, column] = (codes - zero[:, column]) * scale[:, column]
        error = (value - rounded[:, column]) / inverse[0, 0]  # (rows)
        weight[:, column:] -= error[:, None] * inverse[0]
    return rounded


# GPTQ


@dataclass(frozen=True)
class GPTQConfig:
    """How GPTQ goes through a matrix."""

    damping: float = 0.3  # added to the diagonal of the second moment, as a share of its mean; published code: 0.01
    block_size: int = 128  # columns whose errors reach the columns after them in one product
    act_order: bool = False  # columns with the largest inputs first

    def __post_init__(self) -> None:
        check_range(self, "damping", least=0)
        check_range(self, "block_size", least=1)


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (M + damping * mean(diag M) * I)^-1: (columns, columns), float64.

    Row q of U, divided by U_qq, is what the first column of the q-th shrinking inverse is divided by its corner, so one
    factorisation holds every update (Frantar et al. 2022, section 3.3). Raises ValueError if M cannot be inverted.
    """
    damped = second_moment.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0  # an input that is always 0: any weight will do, and the damping must not notice
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not failed:  # a pivot squared is what is left of an input's power when the inputs before it explain the rest
        failed = (factor.diagonal() ** 2 <= SINGULAR * diagonal).any()
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise ValueError(
            f"the second moment of {len(damped)} inputs is singular with damping={damping:g}; raise damping or "
            "calibrate on more tokens than a layer has inputs"
        )
    return factor


def gptq(weight: Tensor, second_moment: Tensor, fmt: QuantFormat, config: GPTQConfig | None = None) -> Quantised:
    """Quantise a matrix column by column; each column's error is taken over by the columns not yet rounded.

    The scales of a group are chosen when its first column is reached, from the weights as they are then; with act_order
    or one scale for the matrix, before the first column, from the weights as they were. Shapes: weight (rows, columns),
    second_moment (columns, columns). Raises ValueError for a second moment of another size, or one that cannot be
    inverted.
    """
    config = config or GPTQConfig()
    rows, columns = weight.shape
    if second_moment.shape != (columns, columns):
        raise ValueError(f"a weight of {columns} columns needs a second moment of as many, got {second_moment.shape}")
    size = fmt.group_size(columns)
    order = torch.arange(columns)
    if config.act_order:
        order = second_moment.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(second_moment[order][:, order], config.damping)  # (columns, columns)
    left = weight.detach().cpu().double()[:, order]  # (rows, columns): what is still to be rounded
    scales, zeros = (part.expand(rows, -1).clone() for part in group_parameters(weight.detach().cpu(), fmt))
    late = fmt.quant_group_size >= 0 and not config.act_order
    step = math.ceil(config.block_size / size) * size if late else config.block_size  # no group across two blocks
    codes = torch.zeros(rows, columns)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = torch.zeros(rows, stop - start, dtype=torch.float64)
        for column in range(start, stop):
            group = int(order[column]) // size if fmt.quant_group_size >= 0 else 0
            if late and column % size == 0:
                ahead = left[:, column : min(column + size, stop)].float()  # (rows, *)
                fresh = group_parameters(ahead, replace(fmt, quant_group_size=0))
                scales[:, group], zeros[:, group] = (part[:, 0] for part in fresh)
            value, scale, zero = left[:, column], scales[:, group].double(), zeros[:, group].double()  # (rows)
            codes[:, order[column]] = to_codes(value, scale, zero, 0, fmt.most).float()
            error = (value - (codes[:, order[column]] - zero) * scale) / factor[column, column]  # (rows)
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    if fmt.quant_group_size < 0:
        scales, zeros = scales[:1], zeros[:1]
    return Quantised(codes.to(torch.uint8), scales, zeros, fmt)


def column_grid(quantised: Quantised) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every single weight: both (rows, columns)."""
    rows, columns = quantised.codes.shape
    size = quantised.fmt.group_size(columns)
    parts = (quantised.scales, quantised.zero_points)
    scales, zeros = (per_column(part.expand(rows, -1), size, columns) for part in parts)
    return scales, zeros


def rounded_without_mending(weight: Tensor, like: Quantised) -> Tensor:
    """The weights rounded to the nearest code of another quantisation's grid: what GPTQ is compared with."""
    scales, zeros = column_grid(like)
    return from_codes(to_codes(weight.float(), scales, zeros, 0, like.fmt.most), scales, zeros)


# A whole model, layer after layer


STAGES = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # of a block


@torch.no_grad()
def gptq_model(
    model: nn.Module, batches: list[Batch], fmt: QuantFormat, config: GPTQConfig | None = None
) -> dict[str, Quantised]:
    """Quantise every linear layer of the blocks in the order in which they run, in place, and return the codes.

    Each stage is calibrated on what the stages before it now give, so that their errors are mended too (Frantar et al.
    2022, section 4). Runs the calibration once for each stage.
    """
    layers, found = block_linears(model), {}
    numbers = sorted({int(name.split(".")[1]) for name in layers})
    for number, stage in ((number, stage) for number in numbers for stage in STAGES):
        names = [name for name in layers if name.split(".")[1] == str(number) and name.rpartition(".")[2] in stage]
        for name, statistics in input_statistics(model, batches, names).items():
            found[name] = gptq(layers[name].weight, statistics.second_moment, fmt, config)
            layers[name].weight.copy_(found[name].dequantise())
    return found
