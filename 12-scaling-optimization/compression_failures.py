"""Topic 12 - Compression failures: slips that raise no error and cost a model, each switched on and measured.

python 12-scaling-optimization/scaling_optimization.py --break late-binding            # one of them
python 12-scaling-optimization/scaling_optimization.py figures compression-breaks      # all, the chapter's table

Every entry of COMPRESSION_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gptq as gptq_module
from distillation import soft_cross_entropy
from gptq import GPTQConfig, gptq, output_error
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from pruning import compress_two_of_four, prune_weights
from quantized_layers import PackedLinear
from quantized_model import float_bytes
from weight_quantization import QuantFormat, affine_parameters, from_codes, int_matmul, quantise, to_codes
from workbench import RunConfig, seed_everything

Row = tuple[str, float, float]
TINY = ModelConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=32, max_seq_len=32)
IDS = torch.arange(2, 26).reshape(2, 12)


def tiny() -> CausalLM:
    """A small model whose blocks differ and matter."""
    seed_everything(0)
    model = CausalLM(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# A layer that remembers the name of a loop, not its value


class LazyLinear(nn.Module):
    """Asks for its weight when it is called, such as from a file that is too large to load."""

    def __init__(self, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.weight_of = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_of())


def lazy_copy(model: CausalLM, name: str, bind: bool) -> CausalLM:
    """The model with one kind of layer reading its codes lazily, in a loop over the blocks."""
    lazy, packed = copy.deepcopy(model), {}
    for layer, block in enumerate(model.blocks):
        packed[layer] = PackedLinear.from_quantised(quantise(getattr(block.ffn, name).weight.detach(), QuantFormat(8)))
    for layer, block in enumerate(lazy.blocks):
        late, bound = (lambda: packed[layer].weight), (lambda layer=layer: packed[layer].weight)  # noqa: B023
        setattr(block.ffn, name, LazyLinear(bound if bind else late))  # late: the planted slip
    return lazy


@torch.no_grad()
def late_binding(run: RunConfig) -> list[Row]:
    """A closure in a loop reads the loop's variable when it is called: every block gets the last block's weights."""
    model = tiny()
    before = model(IDS)
    moved = [(lazy_copy(model, "up_proj", bind)(IDS) - before).abs().max().item() for bind in (True, False)]
    return [("late-binding: how far a logit moves when the layers read 8-bit weights lazily", *moved)]


# Whole numbers that wrap


def narrow_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of int8 products in a type too narrow for it; overflow wraps without a word."""
    total = torch.zeros(len(left), len(right), dtype=dtype)
    for column in range(left.shape[1]):
        total += left[:, column, None].to(dtype) * right[:, column].to(dtype)
    return total


def int8_overflow(run: RunConfig) -> list[Row]:
    """127 * 127 = 16,129 fits 16 bits once, not three times; 8 bits hold not even 12 * 12."""
    generator = torch.Generator().manual_seed(run.seed)
    left, right = (torch.randn(rows, 128, generator=generator) for rows in (16, 24))
    codes = [torch.round(x / x.abs().amax(1, keepdim=True) * 127).to(torch.int8) for x in (left, right)]
    exact = codes[0].long() @ codes[1].long().T
    rows = []
    for name, dtype in (("int16", torch.int16), ("int8", torch.int8)):
        wrong = (narrow_matmul(*codes, dtype).long() != exact).double().mean().item()
        sound = (int_matmul(*codes).long() != exact).double().mean().item()
        rows.append((f"int8-overflow: share of wrong sums of 128 products added up in {name}", sound, wrong))
    return rows


def zero_point_wrap(run: RunConfig) -> list[Row]:
    """Codes minus zero point in uint8: 3 - 5 is 254. And a cast before the clamp: code 256 becomes 0."""
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(run.seed))
    scale, zero = affine_parameters(x.min(), x.max(), 8)
    codes = to_codes(x, scale, zero, 0, 255).to(torch.uint8)
    sound = (from_codes(codes, scale, zero) - x).abs().max().item() / scale.item()
    wrapped = ((codes - zero.to(torch.uint8)).float() * scale - x).abs().max().item() / scale.item()
    low, high = torch.quantile(x, 0.01), torch.quantile(x, 0.99)  # a range that clips, as calibrated ranges do
    scale, zero = affine_parameters(low, high, 8)
    inside = from_codes(to_codes(x, scale, zero, 0, 255), scale, zero)
    cast = from_codes((torch.round(x / scale) + zero).to(torch.int64).to(torch.uint8), scale, zero)
    errors = [(found - x).abs().max().item() for found in (inside, cast)]
    return [
        ("zero-point-wrap: largest error in steps when the zero point is taken off in uint8", sound, wrapped),
        ("zero-point-wrap: largest error when codes are cast to uint8 before they are clamped", *errors),
    ]


def zero_scale(run: RunConfig) -> list[Row]:
    """A row of zeros has the range 0: 0 / 0 is NaN, and one NaN weight makes every logit NaN."""
    model = tiny()
    with torch.no_grad():
        model.blocks[1].ffn.up_proj.weight[3] = 0
        shares = []
        for broken in (False, True):
            made = copy.deepcopy(model)
            for layer in made.modules():
                if isinstance(layer, nn.Linear) and layer is not made.lm_head:
                    if broken:
                        scale = layer.weight.abs().amax(1, keepdim=True) / 127
                        layer.weight.copy_(torch.round(layer.weight / scale) * scale)
                    else:
                        layer.weight.copy_(quantise(layer.weight, QuantFormat(8, 0, "absmax")).dequantise())
            shares.append(made(IDS).isnan().double().mean().item())
    return [("zero-scale: share of logits that are NaN when one row of one matrix is all zeros", *shares)]


# GPTQ without its two safeguards


def shared_inputs(seed: int, n_tokens: int, columns: int = 48) -> Tensor:
    """Inputs in few directions, as calibration on too little text gives: (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n_tokens, columns, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -2, columns, dtype=torch.float64
    ) @ mixing + 1e-3 * torch.randn(n_tokens, columns, generator=generator, dtype=torch.float64)


def gptq_safeguards(run: RunConfig) -> list[Row]:
    """Without damping, directions that the calibration hardly shows take all errors; without propagation it is RTN."""
    generator = torch.Generator().manual_seed(run.seed)
    weight, fmt = torch.randn(32, 48, generator=generator), QuantFormat(3, 0)
    few, fresh = shared_inputs(run.seed, 5), shared_inputs(run.seed + 1000, 2000)
    known, real = few.T @ few / len(few), fresh.T @ fresh / len(fresh)
    nearest = output_error(weight, quantise(weight, fmt).dequantise(), real)
    damped, bare = (
        output_error(weight, gptq(weight, known, fmt, GPTQConfig(damping)).dequantise(), real) / nearest
        for damping in (1.0, 1e-9)
    )
    mended = output_error(weight, gptq(weight, real, fmt, GPTQConfig(0.01)).dequantise(), real) / nearest
    stuck = output_error(weight, without_propagation(weight, real, fmt), real) / nearest
    return [
        ("gptq-no-damping: output error over rounding to nearest, 5 tokens of calibration, fresh text", damped, bare),
        ("gptq-no-propagation: output error over rounding to nearest, ample calibration", mended, stuck),
    ]


def without_propagation(weight: Tensor, moment: Tensor, fmt: QuantFormat) -> Tensor:
    """GPTQ whose factor has lost what lies beside its diagonal: every column is rounded alone."""
    whole = gptq_module.inverse_factor
    gptq_module.inverse_factor = lambda moment, damping: torch.diag(whole(moment, damping).diagonal())
    try:
        return gptq(weight, moment, fmt).dequantise()
    finally:
        gptq_module.inverse_factor = whole


# A mask is not a smaller model


def mask_saves_nothing(run: RunConfig) -> list[Row]:
    """Half of the weights at zero: the tensors weigh what they did, unless a format leaves the zeros out."""
    model = tiny()
    before = float_bytes(model)
    prune_weights(model, "magnitude", 0.5, pattern=(2, 4))
    masked = float_bytes(model) / before
    stored = float_bytes(model)
    for block in model.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                stored += compress_two_of_four(layer.weight.detach()).n_bytes - layer.weight.nbytes
    return [("mask-saves-nothing: bytes of a model with half of its block weights at zero", stored / before, masked)]


# Distillation


class DropoutLM(nn.Module):
    """A model with dropout on its stream, as most teachers were trained."""

    def __init__(self, model: CausalLM, share: float = 0.2) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(share)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model.logits(self.dropout(self.model.hidden(token_ids)))


@torch.no_grad()
def noisy_teacher(run: RunConfig) -> list[Row]:
    """A teacher left in training mode drops features: its targets differ from call to call."""
    seed_everything(run.seed)
    teacher, spread = DropoutLM(tiny()), []
    for training in (False, True):
        teacher.train(training)
        first, second = (teacher(IDS) for _ in range(2))
        spread.append(soft_cross_entropy(first, second).mean().item())
    return [("noisy-teacher: divergence between two answers of the teacher to the same text, nats", *spread)]


def missing_square(run: RunConfig) -> list[Row]:
    """Without T^2 the teacher's gradient fades beside the data's: at T = 8 to about 1 / 64."""
    student, teacher = tiny(), tiny()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter, memory_format=torch.contiguous_format))
        wanted = teacher(IDS)
    norms = []
    for squared in (True, False):
        found = student(IDS)
        size = {}
        for temperature in (1.0, 8.0):
            loss = soft_cross_entropy(found, wanted, temperature).sum() / (1.0 if squared else temperature**2)
            (grad,) = torch.autograd.grad(loss, found, retain_graph=True)
            size[temperature] = grad.norm().item()
        norms.append(size[8.0] / size[1.0])
    return [("missing-square: length of the teacher's gradient at temperature 8 over that at 1", *norms)]


COMPRESSION_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "late-binding": (late_binding, 1),
    "int8-overflow": (int8_overflow, 1),
    "zero-point-wrap": (zero_point_wrap, 1),
    "zero-scale": (zero_scale, 1),
    "gptq-safeguards": (gptq_safeguards, 1),
    "mask-saves-nothing": (mask_saves_nothing, 1),
    "noisy-teacher": (noisy_teacher, 1),
    "missing-square": (missing_square, 1),
}
