"""Topic 01 - Prerequisites: gradients, optimizers, initialisation and stable numerics, from NumPy alone.

Learns XOR and two spirals with an automatic differentiation engine whose every gradient equals PyTorch's.

python 01-prerequisites/prerequisites.py              # the demo: gradient check, XOR, two spirals, on CPU, no network
python 01-prerequisites/prerequisites.py demo --break order      # plant a bug and print its symptom
python 01-prerequisites/prerequisites.py figures      # the chapter's experiments, figures and tables
python 01-prerequisites/prerequisites.py bench        # matrix product and training step beside NumPy and PyTorch
python 01-prerequisites/prerequisites.py --help

Papers: Rumelhart, Hinton and Williams 1986 (back-propagation); Baydin et al. 2018, arXiv:1502.05767 (automatic
differentiation); Polyak 1964 (momentum); Kingma and Ba 2015, arXiv:1412.6980 (Adam); Glorot and Bengio 2010 and He et
al. 2015, arXiv:1502.01852 (initialisation); Williams, Waterman and Patterson 2009 (roofline).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from workbench import (
    Hardware,
    RunConfig,
    announce,
    check_range,
    largest_difference,
    progress,
    run_verbs,
    save_figure,
    seed_everything,
)


@dataclass(frozen=True)
class TrainConfig:
    """How the small networks of this topic are trained."""

    n_samples: int = 600  # points of the two spirals to train on; as many again are held out
    noise: float = 0.03  # standard deviation added to each coordinate of a spiral of radius 1
    d_hidden: int = 32  # width of the two hidden layers
    batch_size: int = 64  # points per step
    max_steps: int = 1500  # steps on the spirals
    learning_rate: float = 0.01  # step size of Adam
    n_seeds: int = 3  # runs, with consecutive seeds

    def __post_init__(self) -> None:
        check_range(self, "n_samples", "d_hidden", least=2)  # the figure shows two directions
        check_range(self, "batch_size", "max_steps", "n_seeds", least=1)
        check_range(self, "noise", least=0)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class DemoConfig(TrainConfig):
    """The demo, whole or with one planted bug."""

    break_: Literal["none", "order", "recursion", "accumulate", "bias", "eps"] = "none"  # the bug to plant


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark measures."""

    max_size: int = 1024  # largest square matrix; the sizes before it are powers of two from 32
    n_rounds: int = 7  # measurements of each time, in turns

    def __post_init__(self) -> None:
        check_range(self, "max_size", least=32, most=8192)
        check_range(self, "n_rounds", least=1)

    @property
    def sizes(self) -> list[int]:
        return [2**power for power in range(5, self.max_size.bit_length())]


# The engine: an array that remembers how it was computed


class Tensor:
    """An array of numbers that remembers how it was computed, so that `backward` can find its derivatives.

    Reverse-mode automatic differentiation (Baydin et al. 2018, section 3.2). A result keeps its `parents`: pairs of an
    input and its vector-Jacobian product, a function from the gradient of the result to the gradient of that input.
    `grad` is None or an array with the shape of `data`. As in PyTorch, gradients add up over calls of `backward` until
    they are set to None; unlike in PyTorch, results that are not leaves keep theirs too, for the reader to see.

    An array given as `data` is not copied. An update should assign a new array to `data`, not write into the old one,
    which the vector-Jacobian products of earlier results still read.
    Raises ValueError for data that are not numbers and for integers that require a gradient.
    """

    __array_ufunc__ = None  # makes NumPy leave `array + tensor` to Tensor.__radd__
    recording = True  # False inside no_grad()

    def __init__(self, data, requires_grad: bool = False) -> None:
        self.data: np.ndarray = array_of(data)
        if requires_grad and self.dtype.kind != "f":
            raise ValueError(f"only floating-point tensors can require a gradient, got {self.dtype}; write 2.0, not 2")
        self.requires_grad = requires_grad
        self.grad: np.ndarray | None = None
        self.parents: tuple[tuple[Tensor, Callable], ...] = ()

    def backward(self, grad=None) -> None:
        """Add d(self)/d(input), weighted by `grad`, to `.grad` of every tensor that `self` was computed from.

        Raises ValueError if `self` has more than one element and `grad` is left out.
        """
        if not self.requires_grad:
            raise ValueError("nothing to differentiate: no input has requires_grad=True, or no_grad() was on")
        if grad is None and self.data.size != 1:
            raise ValueError(f"backward() of shape {self.shape} needs a gradient; give one, or reduce with sum()")
        grad = np.ones_like(self.data) if grad is None else array_of(grad).astype(self.dtype)
        if grad.shape != self.shape:
            raise ValueError(f"the gradient has shape {grad.shape}, but the tensor has shape {self.shape}")
        arriving = {self: grad}  # of this call alone: starting from .grad would count an earlier call twice
        for tensor in reversed(topological_order(self)):
            grad = arriving.pop(tensor)  # complete: every result that used `tensor` came earlier
            tensor.grad = np.array(grad if tensor.grad is None else tensor.grad + grad)  # a copy: nobody else's
            for parent, vjp in tensor.parents:
                share = unbroadcast(np.asarray(vjp(grad)), parent.shape).astype(parent.dtype, copy=False)
                arriving[parent] = arriving[parent] + share if parent in arriving else share

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def T(self) -> "Tensor":
        return transpose(self)

    def item(self) -> float:
        return self.data.item()

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({np.array2string(self.data, prefix='Tensor(')}, requires_grad={self.requires_grad})"


def topological_order(root: Tensor) -> list[Tensor]:
    """Every tensor that `root` depends on, each after all of its parents; `root` is last.

    A loop with its own stack: a recursive walk would fail at Python's limit of 1000 nested calls.
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        tensor, parents_done = stack.pop()
        if parents_done:
            order.append(tensor)
        elif tensor not in seen:
            seen.add(tensor)
            stack.append((tensor, True))
            stack.extend((parent, False) for parent, _ in tensor.parents)
    return order


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum `grad` down to `shape`. Broadcasting copies a number, and the gradients of the copies add up."""
    if grad.shape == shape:
        return grad
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return grad.sum(axis=stretched, keepdims=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within the block, or in a function decorated with it, results do not remember how they were computed."""
    earlier, Tensor.recording = Tensor.recording, False
    try:
        yield
    finally:
        Tensor.recording = earlier


def array_of(x) -> np.ndarray:
    """The numbers in a tensor, array, list or number. Raises ValueError for anything that is not numbers."""
    if isinstance(x, Tensor):
        return x.data
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError):  # of PyTorch's tensors: in bfloat16, or with a gradient
        raise ValueError(f"data must be a rectangular array of numbers, got {reprlib.repr(x)}") from None
    if array.dtype.kind not in "biuf":  # bool, signed, unsigned, float
        raise ValueError(f"data must be real numbers, got {reprlib.repr(x)}; text needs ids, a list of tensors stack()")
    return array


def floats_of(x) -> np.ndarray:
    """`array_of(x)` in floating point: in small integers, and in unsigned ones, a difference would wrap around."""
    array = array_of(x)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def operand(x) -> np.ndarray | float:
    """`array_of(x)`, but a Python number stays one: as an array it would turn a float32 result into float64."""
    if isinstance(x, int | float):
        return float(x) if isinstance(x, float) else x  # np.float64 is a float too
    return array_of(x)


def record(value, *inputs: tuple) -> Tensor | np.ndarray:
    """Make the result of an operation from its value and a pair (input, vector-Jacobian product) for each input.

    Plain arrays in, plain array out: only tensors make a tensor. The products are called by `backward` alone, and only
    for inputs that require a gradient; they may hold arrays, but not the resulting tensor, or the memory of a graph
    would wait for the garbage collector.
    """
    if not any(isinstance(x, Tensor) for x, _ in inputs):
        return value
    result = Tensor(value)
    if Tensor.recording:
        result.parents = tuple((x, vjp) for x, vjp in inputs if isinstance(x, Tensor) and x.requires_grad)
        result.requires_grad = bool(result.parents)
    return result


# Arithmetic: each operation is its formula, then one vector-Jacobian product for each input.
# As in NumPy, `abs`, `pow`, `sum` and `max` of this module hide Python's from here to its end.


def add(a, b):
    return record(operand(a) + operand(b), (a, lambda grad: grad), (b, lambda grad: grad))


def subtract(a, b):
    return record(operand(a) - operand(b), (a, lambda grad: grad), (b, lambda grad: -grad))


def multiply(a, b):
    x, y = operand(a), operand(b)
    return record(x * y, (a, lambda grad: grad * y), (b, lambda grad: grad * x))


def divide(a, b):
    x, y = operand(a), operand(b)
    return record(x / y, (a, lambda grad: grad / y), (b, lambda grad: -grad * (x / y) / y))


def pow(a, b):
    """a ** b. Where a = 0 and b >= 0 the derivative by b is 0, as in PyTorch."""
    x, y = operand(a), operand(b)
    value = x**y
    return record(
        value,
        (a, lambda grad: grad * y * x ** np.where(y == 0, 0, y - 1)),  # x**-1 at x = 0 would make 0 * inf
        (b, lambda grad: grad * value * np.log(np.where((x == 0) & (y >= 0), 1, x))),
    )


def negative(x):
    return record(-operand(x), (x, lambda grad: -grad))


def abs(x):
    """|x|, with derivative 0 at 0."""
    array = operand(x)
    return record(np.abs(array), (x, lambda grad: grad * np.sign(array)))


# Elementwise functions


def exp(x):
    y = np.exp(array_of(x))
    return record(y, (x, lambda grad: grad * y))


def log(x):
    array = array_of(x)
    return record(np.log(array), (x, lambda grad: grad / array))


def sqrt(x):
    y = np.sqrt(array_of(x))
    return record(y, (x, lambda grad: grad / (2 * y)))


def tanh(x):
    y = np.tanh(array_of(x))
    return record(y, (x, lambda grad: grad * (1 - y**2)))


def sigmoid(x):
    """1 / (1 + exp(-x)), in a form that never overflows."""
    y = np.exp(-np.logaddexp(0, -floats_of(x)))
    return record(y, (x, lambda grad: grad * y * (1 - y)))


def relu(x):
    """max(x, 0), with derivative 0 at 0."""
    array = array_of(x)
    return record(np.maximum(array, 0), (x, lambda grad: grad * (array > 0)))


ERF = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has none; the C library's is exact to the last bits


def gelu(x):
    """x P(Z <= x) for a standard normal Z: the exact form, with erf (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    array = array_of(x)
    below = ((1 + ERF(array / math.sqrt(2))) / 2).astype(array.dtype if array.dtype.kind == "f" else np.float64)

    def vjp(grad):
        density = np.exp(-(array**2) / 2) / math.sqrt(2 * math.pi)
        return grad * (below + array * density)

    return record(array * below, (x, vjp))


def where(condition, a, b):
    """`a` where the condition holds, else `b`. Raises ValueError if the condition is not bool."""
    mask = array_of(condition)
    if mask.dtype != bool:
        raise ValueError(f"a mask must be bool, got {mask.dtype}; compare, or use astype(bool)")
    return record(
        np.where(mask, operand(a), operand(b)),
        (a, lambda grad: np.where(mask, grad, 0.0)),
        (b, lambda grad: np.where(mask, 0.0, grad)),
    )


def masked_fill(x, mask, value: float):
    """Put `value` where `mask` is True."""
    return where(mask, value, x)


# Reductions


def restored(grad: np.ndarray, axis: int | tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    """The gradient of a reduction with its reduced axes back, of size 1."""
    return grad if keepdims or axis is None else np.expand_dims(grad, axis)


def sum(x, axis=None, keepdims: bool = False):
    array = array_of(x)
    value = array.sum(axis=axis, keepdims=keepdims)
    return record(value, (x, lambda grad: np.broadcast_to(restored(grad, axis, keepdims), array.shape)))


def mean(x, axis=None, keepdims: bool = False):
    array = array_of(x)
    value = array.mean(axis=axis, keepdims=keepdims)
    count = array.size / (value.size or 1)  # numbers in each mean
    return record(value, (x, lambda grad: np.broadcast_to(restored(grad, axis, keepdims) / count, array.shape)))


def max(x, axis=None, keepdims: bool = False):
    """The largest number. Ties share the gradient evenly, as in torch.amax; torch.max along an axis picks one."""
    array = array_of(x)

    def vjp(grad):
        winners = array == array.max(axis=axis, keepdims=True)
        return restored(grad, axis, keepdims) * winners / winners.sum(axis=axis, keepdims=True)

    return record(array.max(axis=axis, keepdims=keepdims), (x, vjp))


# Shapes


def reshape(x, *shape):
    array = array_of(x)
    return record(array.reshape(*shape), (x, lambda grad: grad.reshape(array.shape)))


def transpose(x, *axes):
    """Reorder the axes, as numpy.transpose; without `axes`, reverse them."""
    array = array_of(x)
    axes = axes[0] if len(axes) == 1 and np.ndim(axes[0]) else axes or range(array.ndim)[::-1]
    if len(axes) != array.ndim:
        raise ValueError(f"transpose of shape {array.shape} needs every axis, got {axes}; swapaxes() swaps two")
    back = np.argsort([axis % array.ndim for axis in axes])
    return record(array.transpose(axes), (x, lambda grad: grad.transpose(back)))


def swapaxes(x, axis1: int, axis2: int):
    array = array_of(x)
    return record(array.swapaxes(axis1, axis2), (x, lambda grad: grad.swapaxes(axis1, axis2)))


def getitem(x, index):
    """x[index] with slices, None, ..., integers, and arrays of integers or bool, in which a position may repeat."""
    array = array_of(x)
    parts = index if isinstance(index, tuple) else (index,)
    index = tuple(part.data if isinstance(part, Tensor) else part for part in parts)

    def vjp(grad):
        spread = np.zeros_like(array)
        np.add.at(spread, index, grad)  # spread[index] += grad would keep one gradient of a repeated position
        return spread

    return record(array[index], (x, vjp))


def concat(tensors, axis: int = 0):
    """Join along an existing axis."""
    arrays = [array_of(x) for x in tensors]
    joined = np.concatenate(arrays, axis)
    ends = np.cumsum([array.shape[axis] for array in arrays])

    def part(end: int, size: int) -> Callable:
        return lambda grad: np.take(grad, range(end - size, end), axis)

    parts = [part(end, array.shape[axis]) for end, array in zip(ends, arrays, strict=True)]
    return record(joined, *zip(tensors, parts, strict=True))


def stack(tensors, axis: int = 0):
    """Join along a new axis."""
    parts = [lambda grad, place=place: np.take(grad, place, axis) for place in range(len(tensors))]
    return record(np.stack([array_of(x) for x in tensors], axis), *zip(tensors, parts, strict=True))


# Products


def matmul(a, b):
    """Matrix product over the last two axes; the axes before them broadcast; a 1-d operand is a row or a column.

    Raises ValueError if the inner dimensions differ or an operand is a single number.
    """
    x, y = array_of(a), array_of(b)
    if x.ndim == 0 or y.ndim == 0:
        raise ValueError(f"matmul needs vectors or matrices, got shapes {x.shape} and {y.shape}; use * to scale")
    inner = y.shape[-2] if y.ndim > 1 else y.shape[0]
    if x.shape[-1] != inner:
        raise ValueError(f"inner dims {x.shape[-1]} != {inner} in matmul of {x.shape} and {y.shape}; transpose one?")
    if y.ndim == 1:
        return matmul(a, reshape(b, -1, 1))[..., 0]
    if x.ndim == 1:
        return matmul(reshape(a, 1, -1), b)[..., 0, :]
    return record(
        x @ y,
        (a, lambda grad: grad @ y.swapaxes(-1, -2)),
        (b, lambda grad: x.swapaxes(-1, -2) @ grad),
    )


# Distributions, in nats; stable for logits of any size


def shifted(x: np.ndarray, axis) -> tuple[np.ndarray, np.ndarray]:
    """Return (x - max, max). The shift changes no softmax and keeps exp from overflowing; infinities make no NaN."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(invalid="ignore"):  # inf - inf, which is not used
        return np.where(x == top, 0.0, x - top), top


def logsumexp(x, axis=-1, keepdims: bool = False):
    """log(sum(exp(x))); its gradient is the softmax."""
    array = floats_of(x)
    rest, top = shifted(array, axis)
    with np.errstate(divide="ignore"):  # log 0 = -inf is right where every x is -inf
        value = np.log(np.exp(rest).sum(axis=axis, keepdims=True)) + top
    value = value if keepdims else value.squeeze(axis)
    return record(value, (x, lambda grad: restored(grad, axis, keepdims) * softmax(array, axis)))


def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)). A slice that is -inf throughout gives 0, where PyTorch gives NaN."""
    weights = np.exp(shifted(floats_of(x), axis)[0])
    total = weights.sum(axis=axis, keepdims=True)
    y = weights / np.where(total == 0, 1.0, total)
    return record(y, (x, lambda grad: y * (grad - (grad * y).sum(axis=axis, keepdims=True))))


def log_softmax(x, axis=-1):
    """log(softmax(x)) without the logarithm of a probability that has been rounded to 0."""
    rest, _ = shifted(floats_of(x), axis)
    total = np.exp(rest).sum(axis=axis, keepdims=True)
    y = rest - np.log(np.where(total == 0, 1.0, total))
    return record(y, (x, lambda grad: grad - np.exp(y) * grad.sum(axis=axis, keepdims=True)))


def check_ids(ids: np.ndarray, limit: int, noun: str, limit_name: str, ignore_index: int | None = None) -> None:
    """Raise ValueError, naming the first wrong id and its place, unless all are integers >= 0 and < limit."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{noun}s must be integers, got {ids.dtype}")
    for wrong, limits in ((ids >= limit, f">= {limit_name} {limit}"), (ids < 0, "< 0")):
        places = np.argwhere(wrong & (ids != ignore_index))
        if len(places):
            raise ValueError(f"{noun} {ids[tuple(places[0])]} {limits} at {places[0].tolist()}")


def cross_entropy(logits, targets, ignore_index: int = -100):
    """Mean of -log softmax(logits)[target] over the targets that are not `ignore_index`, in nats; 0 if all are.

    Targets may be distributions instead of class ids: the mean of -sum(target * log softmax(logits)).
    Shapes: logits (..., classes); targets (...) of integers, or (..., classes) of floats that sum to 1.
    Raises ValueError for other shapes and for a class id out of range.
    """
    log_probs, targets = log_softmax(logits), array_of(targets)
    if log_probs.ndim == 0:
        raise ValueError("logits must have an axis of classes, got a single number")
    n_classes, soft = log_probs.shape[-1], targets.dtype.kind == "f"
    wanted = log_probs.shape if soft else log_probs.shape[:-1]
    if targets.shape != wanted:
        raise ValueError(f"logits of shape {log_probs.shape} need targets of shape {wanted}, got {targets.shape}")
    if soft:
        check_distribution(targets, axis=-1)
        return -sum(where(targets > 0, log_probs, 0.0) * targets) / (targets.size // n_classes or 1)
    check_ids(targets, n_classes, "target", "n_classes", ignore_index)
    log_probs, targets = log_probs.reshape(-1, n_classes), targets.reshape(-1)
    kept = np.flatnonzero(targets != ignore_index)
    return -sum(log_probs[kept, targets[kept]]) / (len(kept) or 1)


def check_distribution(p: np.ndarray, axis: int) -> None:
    """Raise ValueError unless p >= 0 and sums to 1 along the axis."""
    off = np.abs(p.sum(axis=axis, dtype=np.float64) - 1)
    limit = 1e-2 if p.dtype == np.float16 else 1e-4  # 11 bits round each of many terms
    if (p < 0).any() or not (off < limit).all():
        raise ValueError(
            f"probabilities must be >= 0 and sum to 1, got {reprlib.repr(p.tolist())}; apply softmax first?"
        )


def entropy(p, axis: int = -1):
    """-sum(p log p) of probabilities, in nats; 0 log 0 = 0."""
    probs = array_of(p)
    check_distribution(probs, axis)
    return -sum(p * log(where(probs > 0, p, 1.0)), axis)


def kl_divergence(p, q, axis: int = -1):
    """sum(p log(p / q)) of probabilities, in nats; infinite where q = 0 < p."""
    probs, others = array_of(p), array_of(q)
    check_distribution(probs, axis)
    check_distribution(others, axis)
    with np.errstate(divide="ignore"):
        gaps = log(where(probs > 0, p, 1.0)) - log(where(probs > 0, q, 1.0))
    return sum(p * gaps, axis)


# What a network is made of


def embedding(weight, token_ids):
    """Rows of a table: weight (vocab, d_model) and integer token_ids (...) -> (..., d_model).

    Raises ValueError for an id outside the table.
    """
    ids = array_of(token_ids)
    check_ids(ids, len(array_of(weight)), "token id", "vocab_size")
    return getitem(weight, ids)


def layer_norm(x, weight=None, bias=None, eps: float = 1e-5):
    """Zero mean and unit variance along the last axis, then scale and shift (Ba et al. 2016, arXiv:1607.06450).

    The variance divides by n, not n - 1, and `eps` stands inside the root; in Adam it stands outside.
    """
    centred = subtract(x, mean(x, -1, keepdims=True))
    normed = centred / sqrt(mean(centred * centred, -1, keepdims=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def dropout(x, rate: float, generator: np.random.Generator, training: bool = True):
    """Zero each element with probability `rate` and scale the others by 1/(1 - rate), so that the mean stays.

    Srivastava et al. 2014, scaled in training instead of in use. Raises ValueError unless 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be >= 0 and < 1, got {rate}")
    if not training or rate == 0:
        return x
    kept = generator.random(array_of(x).shape) >= rate
    return where(kept, divide(x, 1 - rate), 0.0)


# Each function whose first argument is a tensor is a method too, x.exp(); and a + b is add(a, b), 2 + b is add(2, b)
METHODS = [abs, pow, exp, log, sqrt, tanh, sigmoid, relu, gelu, sum, mean, max, reshape, transpose, swapaxes]
METHODS += [masked_fill, dropout, logsumexp, softmax, log_softmax, cross_entropy, layer_norm, embedding]
OPERATORS = {"add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": pow, "matmul": matmul}
for function in METHODS:
    setattr(Tensor, function.__name__, function)
for symbol, function in OPERATORS.items():
    setattr(Tensor, f"__{symbol}__", function)
    setattr(Tensor, f"__r{symbol}__", lambda right, left, function=function: function(left, right))
Tensor.__neg__, Tensor.__abs__, Tensor.__getitem__ = negative, abs, getitem


# Initialisation and layers


def normal_init(d_in: int, d_out: int, generator: np.random.Generator, std: float = 0.01) -> np.ndarray:
    """Weights (d_out, d_in) from a normal distribution with mean 0."""
    return generator.normal(0.0, std, (d_out, d_in))


def xavier_normal(d_in: int, d_out: int, generator: np.random.Generator) -> np.ndarray:
    """Variance 2 / (d_in + d_out): a compromise between forward and backward, for tanh (Glorot and Bengio 2010)."""
    return normal_init(d_in, d_out, generator, math.sqrt(2 / (d_in + d_out)))


def he_normal(d_in: int, d_out: int, generator: np.random.Generator) -> np.ndarray:
    """Variance 2 / d_in: makes up for the half that ReLU sets to zero (He et al. 2015, section 2.2)."""
    return normal_init(d_in, d_out, generator, math.sqrt(2 / d_in))


class Module:
    """A part of a network: finds the parameters in its attributes, in those of its parts, and in lists of them."""

    def parameters(self) -> list[Tensor]:
        found, parts = [], list(vars(self).values())
        while parts:
            part = parts.pop(0)
            if isinstance(part, Tensor) and part.requires_grad:
                found.append(part)
            elif isinstance(part, Module):
                found += part.parameters()
            elif isinstance(part, list | tuple):
                parts[:0] = part
        return list(dict.fromkeys(found))  # a shared parameter counts once

    def __call__(self, *inputs):
        return self.forward(*inputs)


class Linear(Module):
    """y = x W^T + b, with the weight (d_out, d_in) as in nn.Linear."""

    def __init__(self, d_in: int, d_out: int, generator: np.random.Generator, init: Callable = xavier_normal) -> None:
        self.weight = Tensor(init(d_in, d_out, generator), requires_grad=True)
        self.bias = Tensor(np.zeros(d_out), requires_grad=True)

    def forward(self, x):
        return x @ self.weight.T + self.bias


class MLP(Module):
    """Linear layers with an activation between them.

    Shapes: x (batch, d_in) -> logits (batch, d_out), where d_in and d_out are the first and last of `widths`.
    """

    def __init__(self, widths: list[int], generator: np.random.Generator, activation=relu, init=he_normal) -> None:
        if len(widths) < 2:
            raise ValueError(f"an MLP needs at least the widths of its input and its output, got {widths}")
        if not np.min(widths) >= 1:
            raise ValueError(f"every width must be >= 1, got {widths}")
        pairs = zip(widths[:-2], widths[1:-1], strict=True)
        self.hidden = [Linear(d_in, d_out, generator, init) for d_in, d_out in pairs]
        self.head = Linear(widths[-2], widths[-1], generator, xavier_normal)
        self.activation = activation

    def features(self, x):
        """What the last hidden layer makes of x."""
        for layer in self.hidden:
            x = self.activation(layer(x))  # (batch, *)
        return x  # (batch, d_hidden)

    def forward(self, x):
        return self.head(self.features(x))  # (batch, d_out)


# Optimizers


class SGD:
    """Stochastic gradient descent: each parameter moves by -learning_rate times its gradient.

    A parameter without a gradient stays. Raises ValueError without parameters or if the learning rate is not > 0.
    """

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        if isinstance(parameters, Tensor):  # its rows would be new tensors, and the update would not reach it
            raise TypeError("parameters must be a list of tensors, got one tensor; write [parameter]")
        self.parameters, self.learning_rate = list(parameters), float(learning_rate)
        if not self.parameters:
            raise ValueError("no parameters to train")
        if not all(isinstance(parameter, Tensor) for parameter in self.parameters):
            raise TypeError(f"parameters must be tensors, got {reprlib.repr(self.parameters)}")
        self.parameters = list(dict.fromkeys(self.parameters))  # a shared parameter moves once
        check_range(self, "learning_rate", above=0)

    def direction(self, parameter: Tensor) -> np.ndarray:
        return parameter.grad

    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.data = np.asarray(parameter.data - self.learning_rate * self.direction(parameter))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class Momentum(SGD):
    """SGD along a decaying sum of gradients, v = momentum v + g (Polyak 1964, in the form of torch.optim.SGD)."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, learning_rate)
        self.momentum = float(momentum)
        check_range(self, "momentum", least=0, below=1)
        self.velocity = {parameter: np.zeros_like(parameter.data) for parameter in self.parameters}

    def direction(self, parameter: Tensor) -> np.ndarray:
        self.velocity[parameter] = self.momentum * self.velocity[parameter] + parameter.grad
        return self.velocity[parameter]


class Adam(SGD):
    """Momentum divided by the root mean square of the gradients (Kingma and Ba 2015, algorithm 1)."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, learning_rate)
        self.beta1, self.beta2, self.eps = float(beta1), float(beta2), float(eps)
        check_range(self, "beta1", "beta2", least=0, below=1)
        check_range(self, "eps", above=0)
        self.moments = {parameter: (0.0, 0.0, 0) for parameter in self.parameters}

    def direction(self, parameter: Tensor) -> np.ndarray:
        first, second, n_steps = self.moments[parameter]
        first = self.beta1 * first + (1 - self.beta1) * parameter.grad
        second = self.beta2 * second + (1 - self.beta2) * parameter.grad**2
        n_steps += 1
        self.moments[parameter] = (first, second, n_steps)
        # Both averages start at 0: without these corrections early steps have a wrong size
        first = first / (1 - self.beta1**n_steps)
        second = second / (1 - self.beta2**n_steps)
        return first / (np.sqrt(second) + self.eps)  # eps outside the root: inside, it would stop small gradients


# Vectors, matrices, and a check for every gradient


def numerical_gradient(function: Callable, x, step: float = 1e-5) -> np.ndarray:
    """Central differences (f(x + h) - f(x - h)) / 2h of a function from an array to one number, element by element.

    In float64 the error is about h^2 from the formula plus 1e-16 |f| / h from rounding, least near h = 1e-5.
    Raises ValueError unless the step is > 0.
    """
    if not step > 0:
        raise ValueError(f"step must be > 0, got {step}; 1e-5 is a good one")
    point = np.array(array_of(x), dtype=np.float64)
    grad = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        sides = []
        for offset in (step, -step):
            moved = point.copy()
            moved[index] += offset
            sides.append(array_of(function(moved)).item())
        grad[index] = (sides[0] - sides[1]) / (2 * step)
    return grad


def cosine_similarity(a, b, axis: int = -1, eps: float = 1e-8) -> np.ndarray:
    """Cosine of the angle between vectors along `axis`; a vector of zeros gives 0."""
    a, b = floats_of(a), floats_of(b)
    a, b = (x / np.maximum(np.sqrt((x * x).sum(axis=axis, keepdims=True)), eps) for x in (a, b))  # of length 1
    return (a * b).sum(axis=axis)


def check_gradients(function: Callable, *arrays: np.ndarray) -> tuple[float, float]:
    """Compare `backward` with `numerical_gradient` for a function from arrays, or tensors, to one number.

    Returns the largest difference, and the cosine of the angle between the two gradients by all arrays together.
    """
    tensors = [Tensor(array, requires_grad=True) for array in arrays]
    function(*tensors).backward()
    unused = lambda tensor: np.zeros(tensor.shape) if tensor.grad is None else tensor.grad  # noqa: E731
    exact, estimate = np.concatenate([unused(tensor).ravel() for tensor in tensors]), []
    for place, array in enumerate(arrays):
        with_values = lambda values, place=place: function(*arrays[:place], values, *arrays[place + 1 :])  # noqa: E731
        estimate.append(numerical_gradient(with_values, array).ravel())
    estimate = np.concatenate(estimate)
    return largest_difference(exact, estimate), float(cosine_similarity(exact, estimate))


def pca(x, n_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of the rows of x by singular value decomposition, which needs no covariance matrix.

    Each component's sign makes its largest weight positive, so that the result does not depend on the library.
    Shapes: x (samples, features) -> projected (samples, rank), components (rank, features), variances (rank).
    Raises ValueError unless x is a matrix of at least 2 finite rows and 1 <= n_components <= min(samples, features).
    """
    x = array_of(x)
    x = x if x.dtype == np.float32 else x.astype(np.float64)  # LAPACK knows these two
    if x.ndim != 2:
        raise ValueError(f"PCA needs a matrix (samples, features), got shape {x.shape}")
    if len(x) < 2:
        raise ValueError(f"PCA needs at least 2 samples, got {len(x)}")
    if not 1 <= n_components <= np.min(x.shape):
        raise ValueError(f"n_components must be >= 1 and <= {np.min(x.shape)} for shape {x.shape}, got {n_components}")
    if not np.isfinite(x).all():
        raise ValueError("PCA needs finite numbers, got infinity or NaN; leave out the samples that hold them")
    centred = x - x.mean(axis=0)  # (samples, features)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    components = directions[:n_components]  # (rank, features)
    largest = np.abs(components).argmax(axis=1)  # (rank)
    signs = np.sign(components[np.arange(n_components), largest])  # (rank)
    components = signs[:, None] * components  # (rank, features)
    variances = scales[:n_components] ** 2 / (len(x) - 1)  # (rank)
    return centred @ components.T, components, variances


# What a machine allows


def roofline(intensity, machine: Hardware):
    """Attainable FLOP/s at an intensity in FLOP/byte: bound by memory below the ridge (Williams et al. 2009).

    A product whose matrices stay in the processor's cache may exceed the slope, never the flat part.
    """
    return np.minimum(machine.flops, machine.bandwidth * intensity)


def matmul_intensity(size: int) -> float:
    """FLOPs for each byte of a square float32 product that reads two matrices and writes one: n / 6."""
    return 2 * size**3 / (3 * 4 * size**2)


# Training: exclusive or, and two spirals


def xor_points() -> tuple[np.ndarray, np.ndarray]:
    """The four inputs of "exclusive or" (4, 2) and their classes (4): no line separates the classes."""
    points = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # (4, 2)
    return points, np.array([0, 1, 1, 0])


def two_spirals(n_samples: int, noise: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved spirals of 1.5 turns and radius 1 (the task of Lang and Witbrock 1988, with noise).

    Returns points (samples, 2) and classes (samples): class 1 is class 0 turned by half a turn.
    """
    classes = np.arange(n_samples) % 2  # (samples)
    radius = np.sqrt(generator.uniform(0.02, 1.0, n_samples))  # (samples); the root spreads the points evenly
    angle = 3 * np.pi * radius + np.pi * classes  # (samples)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (samples, 2)
    return points + generator.normal(0.0, noise, points.shape), classes


@np.errstate(over="ignore", invalid="ignore")  # the error below says it better than NumPy's warnings
def fit(model: Module, points: np.ndarray, classes: np.ndarray, config: TrainConfig, seed: int) -> list[float]:
    """Train with Adam on random batches; return the loss of each step in nats.

    Raises ValueError without data, and at the first loss that is not finite.
    """
    if len(points) == 0:
        raise ValueError("dataset is empty: fit() needs at least one point")
    if len(points) != len(classes):
        raise ValueError(f"{len(points)} points but {len(classes)} classes")

    def loss_at(step: int, batch) -> Tensor:
        loss = cross_entropy(model(points[batch]), classes[batch])
        if not math.isfinite(loss.item()):
            rate = f"learning rate {config.learning_rate:g}"
            raise ValueError(f"the loss is {loss.item()} at step {step} with {rate}; lower --learning-rate")
        return loss

    generator, losses = np.random.default_rng(seed), []
    optimizer = Adam(model.parameters(), config.learning_rate)
    steps = range(1, config.max_steps + 1)
    for step in progress(steps, f"train, seed {seed}") if len(steps) > 1000 else steps:
        batch = generator.integers(len(points), size=config.batch_size)  # (batch)
        loss = loss_at(step, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with no_grad():
        loss_at(config.max_steps + 1, slice(None))  # after the last step, on all points
    return losses


def accuracy(model: Module, points: np.ndarray, classes: np.ndarray) -> float:
    """Fraction of points whose most probable class is right."""
    if len(points) == 0:
        raise ValueError("dataset is empty: accuracy() needs at least one point")
    with no_grad():
        return float((model(points).data.argmax(axis=-1) == classes).mean())


def solve_xor(config: TrainConfig, seed: int, d_hidden: int = 16) -> float:
    """Train a network with one hidden layer, or none, on XOR for at most 400 steps; return the fraction right."""
    points, classes = xor_points()
    widths = [2, d_hidden, 2] if d_hidden else [2, 2]
    model = MLP(widths, np.random.default_rng(seed), tanh, xavier_normal)
    max_steps = config.max_steps if config.max_steps < 400 else 400
    fit(model, points, classes, replace(config, batch_size=8, max_steps=max_steps), seed)
    return accuracy(model, points, classes)


def solve_spirals(
    config: TrainConfig, seed: int, n_hidden: int = 2
) -> tuple[MLP, float, tuple[np.ndarray, np.ndarray]]:
    """Train on two spirals; return the model, its accuracy on as many held-out points, and those points."""
    generator = np.random.default_rng(seed)
    points, classes = two_spirals(config.n_samples, config.noise, generator)
    held_out = two_spirals(config.n_samples, config.noise, generator)
    model = MLP([2, *[config.d_hidden] * n_hidden, 2], generator)
    fit(model, points, classes, config, seed)
    return model, accuracy(model, *held_out), held_out


def check_layer(seed: int) -> tuple[float, float]:
    """Check the gradients of a layer with normalisation, GELU and a loss; see check_gradients."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(4, size=6)
    shapes = ((6, 3), (3, 5), (5,), (5, 4))  # inputs, weight, bias, weight of the head
    arrays = [generator.normal(size=shape) for shape in shapes]
    return check_gradients(lambda x, w, b, head: cross_entropy(gelu(layer_norm(x @ w + b)) @ head, classes), *arrays)


def plot_spirals(model: MLP, points: np.ndarray, classes: np.ndarray, n_shown: int = 240) -> Figure:
    """Left: what the network decides, with held-out points. Right: its last hidden layer in principal components."""
    figure, (plane, hidden) = plt.subplots(1, 2, figsize=(9, 4.2))
    side = np.linspace(-1.15, 1.15, 70)
    grid = np.stack(np.meshgrid(side, side), axis=-1)  # (rows, columns, 2)
    with no_grad():
        probability = softmax(model(grid.reshape(-1, 2))).data[:, 1].reshape(len(side), len(side))  # (rows, columns)
        features = model.features(points).data  # (samples, d_hidden)
    plane.contourf(side, side, probability, levels=[0.0, 0.5, 1.0], colors=["#0072B2", "#D55E00"], alpha=0.2)
    plane.contour(side, side, probability, levels=[0.5], colors="black", linewidths=1)
    projected, _, variances = pca(features, 2)
    share = variances.sum() / (features.var(axis=0, ddof=1).sum() or 1.0)  # a dead layer has no variance
    for label, marker in enumerate("o^"):
        chosen = np.flatnonzero(classes == label)[: n_shown // 2]
        for axis, places in ((plane, points), (hidden, projected)):
            axis.scatter(*places[chosen].T, s=12, marker=marker, label=f"class {label}")
    plane.set(title="held-out points, and where p = 1/2", xlabel="first input", ylabel="second input", aspect="equal")
    hidden.set(title=f"last hidden layer, {share:.0%} of its variance")
    hidden.set(xlabel="first principal component", ylabel="second principal component")
    hidden.legend()
    return figure


# The verbs


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Check every gradient, then learn XOR and two spirals with our own automatic differentiation."""
    from prerequisites_experiments import symptoms  # here, because it imports this module

    seed_everything(run.seed)
    if config.break_ != "none":
        announce(f"the planted bug {config.break_!r} beside the sound code", 5)
        for what, sound, broken in symptoms(config.break_):
            print(f"{what}: sound {sound:.5g}, broken {broken:.5g}")
        return
    seeds = range(run.seed, run.seed + config.n_seeds)
    seconds = 2 + config.n_seeds * (0.3 + config.max_steps * 0.6e-3)
    announce(f"gradient check, XOR and two spirals with {config.n_seeds} seeds, NumPy on the CPU", seconds)
    difference, cosine = check_layer(run.seed)
    print(f"gradients: backward and central differences differ by {difference:.0e}, cosine {cosine:.10f} (optimum 1)")
    scores = [solve_xor(config, seed) for seed in seeds]
    print(f"XOR: {spelled(scores)} of 4 points right (chance 50%, a line at most 75%)")
    runs = [solve_spirals(config, seed) for seed in seeds]
    scores = [score for _, score, _ in runs]
    print(f"two spirals: {spelled(scores)} of {config.n_samples} held-out points right (chance 50%)")
    for what, sound, broken in islice(symptoms("order"), 2):
        print(f"{what}: {sound:.5g}; in the wrong order {broken:.5g}")
    model, _, held_out = runs[0]
    save_figure(plot_spirals(model, *held_out), run.out / "two_spirals.svg")


def spelled(scores: list[float]) -> str:
    """The fraction for each seed, then mean and standard deviation."""
    spread = f" ± {np.std(scores, ddof=1):.1%}" if len(scores) > 1 else ""
    return f"{', '.join(f'{score:.1%}' for score in scores)}; mean {np.mean(scores):.1%}{spread}"


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Measure matrix products against this machine's roofline, and our training step against torch's."""
    from prerequisites_experiments import report_speed  # here, because it imports this module

    seed_everything(run.seed)
    announce("matrix products and training steps", 2 + 2 * config.n_rounds)
    report_speed(config, run)


def main(argv: list[str] | None = None) -> None:
    from prerequisites_experiments import FiguresConfig, figures  # here, because they import this module

    verbs = {
        "demo": (demo, DemoConfig, RunConfig),
        "figures": (figures, FiguresConfig),
        "bench": (bench, BenchConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
