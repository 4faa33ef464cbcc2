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

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from workbench import (
    HARDWARE,
    Column,
    Hardware,
    RunConfig,
    announce,
    check_range,
    describe_machine,
    fill_chapter,
    largest_difference,
    progress,
    run_verbs,
    save_figure,
    save_results,
    seed_everything,
    speed_ratio,
    time_in_turns,
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
        check_range(self, "n_samples", least=2)
        check_range(self, "d_hidden", "batch_size", "max_steps", "n_seeds", least=1)
        check_range(self, "noise", least=0)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class DemoConfig(TrainConfig):
    """The demo, whole or with one planted bug."""

    break_: Literal["none", "order", "recursion", "accumulate", "bias", "eps"] = "none"  # the bug to plant


@dataclass(frozen=True)
class FiguresConfig:
    """Sizes of the chapter's experiments."""

    only: tuple[str, ...] = ()  # graph xor spirals variance optimizers softmax roofline breaks; none means all
    n_seeds: int = 3  # runs of each configuration, with seeds from 0
    n_xor_seeds: int = 100  # runs of each network on XOR, with seeds from 100
    max_steps: int = 1500  # training steps on the spirals; XOR takes at most 400
    n_layers: int = 50  # layers of the random networks
    d_hidden: int = 256  # width of the random networks
    max_size: int = 1024  # largest square matrix of the roofline
    n_rounds: int = 7  # measurements of each time, in turns
    n_copied: int = 2**25  # float32 numbers in the arrays that measure the memory
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_xor_seeds", "max_steps", "n_layers", "d_hidden", "n_rounds", least=1)
        check_range(self, "max_size", least=32, most=8192)
        check_range(self, "n_copied", least=1000)
        unknown = [name for name in self.only if name not in EXPERIMENTS]
        if unknown:
            raise ValueError(f"unknown experiment {unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")


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
    except ValueError:
        raise ValueError(f"data must be a rectangular array of numbers, got {reprlib.repr(x)}") from None
    if array.dtype.kind not in "biuf":  # bool, signed, unsigned, float
        raise ValueError(f"data must be real numbers, got {reprlib.repr(x)}; text needs ids, a list of tensors stack()")
    return array


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
    y = np.exp(-np.logaddexp(0, -array_of(x)))
    return record(y, (x, lambda grad: grad * y * (1 - y)))


def relu(x):
    """max(x, 0), with derivative 0 at 0."""
    array = array_of(x)
    return record(np.maximum(array, 0), (x, lambda grad: grad * (array > 0)))


ERF = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has none; the C library's is exact to the last bits


def gelu(x):
    """x P(Z <= x) for a standard normal Z: the exact form, with erf (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    array = array_of(x)
    below = ((1 + ERF(array / math.sqrt(2))) / 2).astype(np.result_type(array, np.float32))  # P(Z <= x)

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
    ends = np.cumsum([array.shape[axis] for array in arrays])

    def part(end: int, size: int) -> Callable:
        return lambda grad: np.take(grad, range(end - size, end), axis)

    parts = [part(end, array.shape[axis]) for end, array in zip(ends, arrays, strict=True)]
    return record(np.concatenate(arrays, axis), *zip(tensors, parts, strict=True))


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
    array = array_of(x)
    rest, top = shifted(array, axis)
    with np.errstate(divide="ignore"):  # log 0 = -inf is right where every x is -inf
        value = np.log(np.exp(rest).sum(axis=axis, keepdims=True)) + top
    value = value if keepdims else value.squeeze(axis)
    return record(value, (x, lambda grad: restored(grad, axis, keepdims) * softmax(array, axis)))


def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)). A slice that is -inf throughout gives 0, where PyTorch gives NaN."""
    weights = np.exp(shifted(array_of(x), axis)[0])
    total = weights.sum(axis=axis, keepdims=True)
    y = weights / np.where(total == 0, 1.0, total)
    return record(y, (x, lambda grad: y * (grad - (grad * y).sum(axis=axis, keepdims=True))))


def log_softmax(x, axis=-1):
    """log(softmax(x)) without the logarithm of a probability that has been rounded to 0."""
    rest, _ = shifted(array_of(x), axis)
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
    off = np.abs(p.sum(axis=axis) - 1)
    if (p < 0).any() or not (off < 1e-4).all():
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
        self.parameters, self.learning_rate = list(dict.fromkeys(parameters)), float(learning_rate)
        if not self.parameters:
            raise ValueError("no parameters to train")
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
    """
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
    a, b = array_of(a), array_of(b)
    lengths = [np.maximum(np.sqrt((x * x).sum(axis=axis)), eps) for x in (a, b)]
    return (a * b).sum(axis=axis) / (lengths[0] * lengths[1])


def check_gradients(function: Callable, *arrays: np.ndarray) -> tuple[float, float]:
    """Compare `backward` with `numerical_gradient` for a function from arrays, or tensors, to one number.

    Returns the largest difference, and the cosine of the angle between the two gradients by all arrays together.
    """
    tensors = [Tensor(array, requires_grad=True) for array in arrays]
    function(*tensors).backward()
    exact, estimate = np.concatenate([tensor.grad.ravel() for tensor in tensors]), []
    for place, array in enumerate(arrays):
        with_values = lambda values, place=place: function(*arrays[:place], values, *arrays[place + 1 :])  # noqa: E731
        estimate.append(numerical_gradient(with_values, array).ravel())
    estimate = np.concatenate(estimate)
    return largest_difference(exact, estimate), float(cosine_similarity(exact, estimate))


def pca(x, n_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of the rows of x by singular value decomposition, which needs no covariance matrix.

    Each component's sign makes its largest weight positive, so that the result does not depend on the library.
    Shapes: x (samples, features) -> projected (samples, rank), components (rank, features), variances (rank).
    Raises ValueError unless 1 <= n_components <= min(samples, features) and there are at least 2 samples.
    """
    x = array_of(x)
    if len(x) < 2:
        raise ValueError(f"PCA needs at least 2 samples, got {len(x)}")
    if not 1 <= n_components <= np.min(x.shape):
        raise ValueError(f"n_components must be >= 1 and <= {np.min(x.shape)} for shape {x.shape}, got {n_components}")
    centred = x - x.mean(axis=0)  # (samples, features)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    components = directions[:n_components]  # (rank, features)
    largest = np.abs(components).argmax(axis=1)  # (rank)
    signs = np.sign(components[np.arange(n_components), largest])  # (rank)
    components = signs[:, None] * components  # (rank, features)
    variances = scales[:n_components] ** 2 / (len(x) - 1)  # (rank)
    return centred @ components.T, components, variances


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


def fit(model: Module, points: np.ndarray, classes: np.ndarray, config: TrainConfig, seed: int) -> list[float]:
    """Train with Adam on random batches; return the loss of each step in nats. Raises ValueError without data."""
    if len(points) == 0:
        raise ValueError("dataset is empty: fit() needs at least one point")
    if len(points) != len(classes):
        raise ValueError(f"{len(points)} points but {len(classes)} classes")
    generator, losses = np.random.default_rng(seed), []
    optimizer = Adam(model.parameters(), config.learning_rate)
    steps = range(config.max_steps)
    for _ in progress(steps, f"train, seed {seed}") if len(steps) > 1000 else steps:
        batch = generator.integers(len(points), size=config.batch_size)  # (batch)
        loss = cross_entropy(model(points[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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


# Experiments: initialisation, optimizers, rounding


def activation_variances(
    init: Callable, activation: Callable, generator: np.random.Generator, n_layers: int = 50, width: int = 256
) -> list[float]:
    """Send as many normal inputs as a layer is wide through random layers; return each layer's variance of W x."""
    x, variances = generator.normal(size=(width, width)), []
    for _ in range(n_layers):
        summed = x @ init(width, width, generator).T  # (samples, width)
        x = activation(summed)  # (samples, width)
        variances.append(float(summed.var()))
    return variances


def bowl(place, curvatures: tuple[float, float] = (1.0, 100.0), angle: float = 0.0):
    """sum(curvature x^2) / 2 along axes turned by `angle` in radians: places (..., 2) -> heights (...)."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # (2, 2)
    return sum(0.5 * np.array(curvatures) * (place @ turn) ** 2, axis=-1)


def optimizer_path(
    make_optimizer: Callable[[list[Tensor]], SGD],
    start: tuple[float, float] = (-1.0, 1.0),
    curvatures: tuple[float, float] = (1.0, 100.0),
    n_steps: int = 100,
    angle: float = 0.0,
) -> np.ndarray:
    """Minimise `bowl`; return every place on the way, (steps + 1, 2). The minimum, 0, is at (0, 0)."""
    place = Tensor(np.array(start, dtype=np.float64), requires_grad=True)
    optimizer, path = make_optimizer([place]), [place.data]
    for _ in range(n_steps):
        optimizer.zero_grad()
        bowl(place, curvatures, angle).backward()
        optimizer.step()
        path.append(place.data)
    return np.stack(path)


def steps_to(losses: np.ndarray, share: float = 1e-6) -> float:
    """The first step at which the loss is at most `share` of the first; infinite if there is none."""
    reached = np.flatnonzero(losses <= share * losses[0])
    return float(reached[0]) if len(reached) else math.inf


def naive_softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) as the formula is written: overflows above 88 in float32 and above 709 in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def softmax_error(
    function: Callable, offset: float, generator: np.random.Generator, n_classes: int = 100, dtype=np.float32
) -> float:
    """Largest relative error of a softmax of logits N(offset, 1); infinite if a result is not a number.

    The reference has 28 decimal digits, for the same rounded logits.
    """
    logits = (generator.normal(size=n_classes) + offset).astype(dtype)  # (classes)
    weights = [Decimal(float(logit)).exp() for logit in logits]
    total = math.fsum(float(weight / weights[0]) for weight in weights)
    exact = np.array([float(weight / weights[0]) / total for weight in weights])  # (classes)
    error = float((np.abs(function(logits) - exact) / exact).max())
    return error if math.isfinite(error) else math.inf


# Experiments: how fast a matrix product can be


def matmul_loop(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """The matrix product as it is defined, c[i][j] = sum over k of a[i][k] b[k][j], one number at a time."""
    product = [[0.0] * len(b[0]) for _ in a]
    for i in range(len(a)):
        for j in range(len(b[0])):
            for k in range(len(b)):
                product[i][j] += a[i][k] * b[k][j]
    return product


def repeat(work: Callable[[], object], n_calls: int) -> None:
    for _ in range(n_calls):
        work()


def matmul_rates(config: BenchConfig, generator: np.random.Generator) -> dict[str, dict[int, list[float]]]:
    """FLOP/s of square float32 matrix products, 2 n^3 FLOPs each: {"loop", "NumPy" or "torch": {size: rounds}}."""
    rates = {"loop": {}, "NumPy": {}, "torch": {}}
    for size in progress(config.sizes, "matrix products"):
        a, b = generator.normal(size=(2, size, size)).astype(np.float32)
        products = {"NumPy": partial(np.matmul, a, b), "torch": partial(torch.matmul, *map(torch.from_numpy, (a, b)))}
        n_calls = dict.fromkeys(products, 1 + int(1e7 / size**3))  # long enough for the clock
        if size <= 128:
            products["loop"], n_calls["loop"] = partial(matmul_loop, a.tolist(), b.tolist()), 1
        works = {name: partial(repeat, product, n_calls[name]) for name, product in products.items()}
        for name, seconds in time_in_turns(works, config.n_rounds).items():
            rates[name][size] = [2 * size**3 * n_calls[name] / second for second in seconds]
    return rates


def streaming_rates(n_numbers: int, n_rounds: int) -> list[tuple[str, float, float]]:
    """(work, FLOP/byte, best FLOP/s) in torch of two operations that touch each number once, in float32."""
    a, b, total = torch.ones(n_numbers), torch.ones(n_numbers), torch.empty(n_numbers)
    side = math.isqrt(n_numbers)
    matrix, vector = torch.ones(side, side), torch.ones(side)
    works = {"add": lambda: torch.add(a, b, out=total), "matrix times vector": lambda: matrix @ vector}
    best = {name: float(np.min(seconds)) for name, seconds in time_in_turns(works, n_rounds).items()}
    return [
        ("add two arrays", 1 / 12, n_numbers / best["add"]),  # 1 FLOP for two numbers read and one written
        ("matrix times vector", 2 / 4, 2 * side**2 / best["matrix times vector"]),  # 2 FLOPs for each weight read
    ]


def measure_machine(
    n_rounds: int,
    rates: dict[str, dict[int, list[float]]],
    n_copied: int = 2**25,
    streams: Iterable[tuple[str, float, float]] = (),
) -> Hardware:
    """This machine's best float32 FLOP/s, in a matrix product, and bytes/s, read and written by a copy of 128 MB.

    The peak is the best of a product of size 2048 and of all `rates`, and the bandwidth the best of the copy and of all
    `streams`: nothing that ran is faster than the peak.
    """
    square, source = torch.randn(2048, 2048), torch.zeros(n_copied)
    array, target = square.numpy(), torch.empty_like(source)
    works = {"torch": lambda: square @ square, "NumPy": lambda: array @ array, "copy": lambda: target.copy_(source)}
    best = {name: np.min(seconds) for name, seconds in time_in_turns(works, n_rounds).items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.nan
    known = [rate for sizes in rates.values() for rounds in sizes.values() for rate in rounds]
    flops = float(np.max([2 * 2048**3 / best["torch"], 2 * 2048**3 / best["NumPy"], *known]))
    bandwidth = float(np.max([2 * source.nbytes / best["copy"], *(rate / reuse for _, reuse, rate in streams)]))
    return Hardware("this machine", memory, bandwidth, flops, f"measured, {describe_machine()}")


def roofline(intensity, machine: Hardware):
    """Attainable FLOP/s at an intensity in FLOP/byte: bound by memory below the ridge (Williams et al. 2009).

    A product whose matrices stay in the processor's cache may exceed the slope, never the flat part.
    """
    return np.minimum(machine.flops, machine.bandwidth * intensity)


def matmul_intensity(size: int) -> float:
    """FLOPs for each byte of a square float32 product that reads two matrices and writes one: n / 6."""
    return 2 * size**3 / (3 * 4 * size**2)


def step_times(d_hidden: int, batch_size: int, n_rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of 10 training steps (forward, backward, Adam) of one network in our engine and in torch, float64."""
    generator = np.random.default_rng(seed)
    points, classes = two_spirals(batch_size, 0.0, generator)
    widths = [2, d_hidden, d_hidden, 2]
    layers = [torch.nn.Linear(*sizes, dtype=torch.float64) for sizes in zip(widths, widths[1:], strict=False)]
    theirs = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    ours, inputs, targets = MLP(widths, generator), torch.from_numpy(points), torch.from_numpy(classes)
    torch_loss = torch.nn.functional.cross_entropy

    def step(optimizer, loss_of: Callable) -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    our_step = partial(step, Adam(ours.parameters()), lambda: cross_entropy(ours(points), classes))
    their_step = partial(step, torch.optim.Adam(theirs.parameters()), lambda: torch_loss(theirs(inputs), targets))
    return time_in_turns({"ours": partial(repeat, our_step, 10), "torch": partial(repeat, their_step, 10)}, n_rounds)


# Planted bugs: each changes a line or two of what is right above, and returns its symptoms


def first_met_order(root: Tensor) -> list[Tensor]:
    """A wrong order for `backward`: each tensor where a walk from `root` first meets it, then reversed."""
    order, seen, stack = [], set(), [root]
    while stack:
        tensor = stack.pop()
        if tensor not in seen:
            seen.add(tensor)
            order.append(tensor)
            stack.extend(parent for parent, _ in reversed(tensor.parents))
    return order[::-1]


def recursive_order(root: Tensor) -> list[Tensor]:
    """The right order by a function that calls itself, as in micrograd: limited by Python's nested calls."""
    order, seen = [], set()

    def visit(tensor: Tensor) -> None:
        if tensor not in seen:
            seen.add(tensor)
            for parent, _ in tensor.parents:
                visit(parent)
            order.append(tensor)

    visit(root)
    return order


class AdamThatKeepsGradients(Adam):
    """Adam in a loop that forgot zero_grad."""

    def zero_grad(self) -> None:
        pass


class AdamUncorrected(Adam):
    """Adam without its bias corrections."""

    def direction(self, parameter: Tensor) -> np.ndarray:
        super().direction(parameter)
        first, second, _ = self.moments[parameter]
        return first / (np.sqrt(second) + self.eps)


class AdamEpsInside(Adam):
    """Adam with eps under the root."""

    def direction(self, parameter: Tensor) -> np.ndarray:
        super().direction(parameter)
        first, second, n_steps = self.moments[parameter]
        return first / (1 - self.beta1**n_steps) / np.sqrt(second / (1 - self.beta2**n_steps) + self.eps)


@contextmanager
def planted(**wrong) -> Iterator[None]:
    """Within the block, these names of this module mean something else."""
    right = {name: globals()[name] for name in wrong}
    globals().update(wrong)
    try:
        yield
    finally:
        globals().update(right)


def reused_node() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The square r1 = x^2 is used twice: r2 = 3 r1 and loss = r1 r2. At x = 1, loss = 3 x^4 has derivative 12."""
    x = Tensor(1.0, requires_grad=True)
    square = x * x
    triple = 3.0 * square
    loss = square * triple
    loss.backward()
    return x, square, triple, loss


def chain_length(most: int = 10_000) -> int:
    """The most operations in a row, up to `most`, that `backward` gets through."""
    low, high = 0, most + 1  # low works, high does not
    while high - low > 1:
        length = most if high > most else (low + high) // 2
        y = Tensor(1.0, requires_grad=True)
        for _ in range(length):
            y = y + 1.0
        try:
            y.backward()
            low = length
        except RecursionError:
            high = length
        if low == most:
            break
    return low


def first_step(gradient: float) -> float:
    """Length of Adam's first step, in learning rates, for one parameter with this gradient."""
    x = Tensor(0.0, requires_grad=True)
    x.grad = np.array(gradient)
    Adam([x], 1.0).step()
    return float(np.abs(x.data))


def xor_share(seeds: Iterable[int], learning_rate: float = 0.01) -> float:
    """Share of the seeds whose network gets all four points of XOR."""
    return float(np.mean([solve_xor(TrainConfig(learning_rate=learning_rate), seed) == 1 for seed in seeds]))


def small_bowl_left() -> float:
    """Share of the loss left after 200 steps of Adam on a bowl that is scaled by 1e-6."""
    path = optimizer_path(partial(Adam, learning_rate=0.03), curvatures=(1e-6, 1e-4), n_steps=200)
    losses = bowl(path, (1e-6, 1e-4))
    return float(losses[-1] / losses[0])


def gradient_after(n_calls: int) -> float:
    """The gradient of x^2 at x = 1 after some steps at learning rate 0, each with zero_grad, backward and step."""
    x = Tensor(1.0, requires_grad=True)
    optimizer = Adam([x], 1e-30)
    for _ in range(n_calls):
        optimizer.zero_grad()
        (x * x).backward()
        optimizer.step()
    return float(x.grad)


SYMPTOMS = {  # bug: (what replaces what, [(what is measured, how)])
    "order": (
        {"topological_order": first_met_order},
        [
            ("derivative of 3 x^4 at x = 1", lambda: float(reused_node()[0].grad)),
            ("cosine with central differences, layer with layer norm", lambda: check_layer(0)[1]),
            ("share of seeds 100 to 109 that solve XOR", lambda: xor_share(range(100, 110))),
        ],
    ),
    "recursion": (
        {"topological_order": recursive_order},
        [("longest chain of operations, of 10,000 tried", lambda: float(chain_length()))],
    ),
    "accumulate": (
        {"Adam": AdamThatKeepsGradients},
        [
            ("derivative of x^2 at x = 1 in the third step", lambda: gradient_after(3)),
            ("share of seeds 100 to 109 that solve XOR", lambda: xor_share(range(100, 110))),
        ],
    ),
    "bias": (
        {"Adam": AdamUncorrected},
        [
            ("first step, in learning rates", lambda: first_step(1.0)),
            ("share of seeds 100 to 109 that solve XOR", lambda: xor_share(range(100, 110))),
            ("the same at learning rate 1, not 0.01", lambda: xor_share(range(100, 110), 1.0)),
        ],
    ),
    "eps": (
        {"Adam": AdamEpsInside},
        [
            ("first step, in learning rates, gradient 1e-6", lambda: first_step(1e-6)),
            ("share of the loss left on a bowl scaled by 1e-6", small_bowl_left),
            ("share of seeds 100 to 109 that solve XOR", lambda: xor_share(range(100, 110))),
        ],
    ),
}


def symptoms(bug: str) -> Iterator[tuple[str, float, float]]:
    """(what is measured, its value in the sound code, its value with the bug) for every symptom of the bug."""
    wrong, measures = SYMPTOMS[bug]
    for what, measure in measures:
        sound = measure()
        with planted(**wrong):
            broken = measure()
        yield what, sound, broken


# Figures


def plot_graph(nodes: dict[str, Tensor], places: list[tuple[float, float]]) -> Figure:
    """A computation as a graph: each node's formula, value and gradient; each edge its local derivative."""
    figure, axis = plt.subplots(figsize=(8, 3.4))
    axis.set(xlim=(-0.3, 2.85), ylim=(-0.35, 1.05))
    where_is = dict(zip(nodes.values(), places, strict=True))
    for tensor, (x, y) in where_is.items():
        bends = {}
        for parent, vjp in tensor.parents:
            bends[parent] = bends.get(parent, 0) + 1
            u, v = where_is[parent]
            bend = 0.35 * (-1) ** bends[parent] if [p for p, _ in tensor.parents].count(parent) > 1 else 0.0
            arrow = {"arrowstyle": "->", "color": "0.45", "shrinkA": 38, "shrinkB": 38}
            arrow["connectionstyle"] = f"arc3,rad={bend}"
            axis.annotate("", (x, y), (u, v), arrowprops=arrow)
            slope = vjp(np.ones_like(tensor.data)).item()
            middle = ((u + x) / 2, (v + y) / 2 - 0.5 * bend * (x - u) * 0.9 + (0.12 if bend <= 0 else -0.12))
            axis.text(*middle, f"{slope:g}", color="#D55E00", ha="center", va="center")
    for (name, tensor), (x, y) in zip(nodes.items(), places, strict=True):
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.3"}
        axis.text(x, y + 0.2, name, ha="center", va="center")
        axis.text(x, y, f"value {tensor.item():g}\ngradient {tensor.grad.item():g}", ha="center", va="center", bbox=box)
    axis.axis("off")
    return figure


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
    share = variances.sum() / features.var(axis=0, ddof=1).sum()
    for label, marker in enumerate("o^"):
        chosen = np.flatnonzero(classes == label)[: n_shown // 2]
        for axis, places in ((plane, points), (hidden, projected)):
            axis.scatter(*places[chosen].T, s=12, marker=marker, label=f"class {label}")
    plane.set(title="held-out points, and where p = 1/2", xlabel="first input", ylabel="second input", aspect="equal")
    hidden.set(title=f"last hidden layer, {share:.0%} of its variance")
    hidden.set(xlabel="first principal component", ylabel="second principal component")
    hidden.legend()
    return figure


def plot_activation_variances(curves: dict[str, list[list[float]]]) -> Figure:
    """One line for each initialisation, through the layers; a curve holds one list of variances for each seed.

    A name that contains "tanh" is drawn dashed. Lines leave the frame at 1e-18, where nothing is left to learn from.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, (name, runs) in enumerate(curves.items()):
        style = "--" if "tanh" in name else "-"
        for run in runs:
            axis.semilogy(range(1, len(run) + 1), run, style, color=f"C{number % 8}", alpha=0.7, label=name)
            name = None  # one entry in the legend
    axis.axhline(1.0, color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel="layer", ylabel="variance of W x, before the activation", ylim=(1e-18, 30))
    axis.legend()
    return figure


def plot_optimizer_paths(paths: dict[str, np.ndarray], turned: dict[str, np.ndarray], angle: float) -> Figure:
    """Left: places (steps, 2) over the contours of the bowl. Right: losses, dashed on a bowl turned by `angle`."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(9, 4))
    side = np.linspace(-1.2, 1.2, 80)
    grid = np.stack(np.meshgrid(side, side), axis=-1)  # (rows, columns, 2)
    plane.contour(side, side, bowl(grid), levels=np.logspace(-2, 2, 7), colors="0.8")
    for number, (name, path) in enumerate(paths.items()):
        plane.plot(*path[:60].T, marker=".", markersize=3, color=f"C{number}", label=name)
        curve.semilogy(bowl(path), color=f"C{number}", label=name)
        curve.semilogy(bowl(turned[name], angle=angle), "--", color=f"C{number}")
    plane.set(xlabel="x, curvature 1", ylabel="y, curvature 100", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    curve.axhline(1e-6 * bowl(paths[name])[0], color="0.6", linestyle=":", linewidth=1)
    curve.set(ylim=(1e-9, 1e3), title=f"dashed: bowl turned by {math.degrees(angle):.0f}°")
    curve.set(xlabel="step", ylabel="loss above the minimum")
    curve.legend()
    return figure


def plot_softmax_errors(offsets: list[float], errors: dict[str, list[float]]) -> Figure:
    """Relative error against the offset of the logits; where there is no number, a cross at the top, a row each."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, (name, line) in enumerate(errors.items()):
        line = np.array(line)
        (drawn,) = axis.semilogy(offsets, np.where(np.isfinite(line), line, np.nan), label=name)
        lost = ~np.isfinite(line)
        axis.plot(np.array(offsets)[lost], np.full(lost.sum(), 10.0 * 10**number), "x", color=drawn.get_color())
    axis.axhline(np.finfo(np.float32).eps, color="0.6", linestyle=":", label="spacing of float32 at 1")
    axis.set(xlabel="offset added to every logit", ylabel="largest relative error (cross: not a number)")
    axis.legend(loc="center", bbox_to_anchor=(0.56, 0.3), ncol=2, fontsize=9)
    return figure


def plot_roofline(
    machine: Hardware, rates: dict[str, dict[int, list[float]]], streams: Iterable[tuple[str, float, float]] = ()
) -> Figure:
    """Measured matrix products, worst to best of the repeats, under what this machine's memory and arithmetic allow.

    `streams` holds (work, FLOP/byte, FLOP/s) of work that touches each number once.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    reach = np.logspace(-1.5, 3, 50)
    axis.loglog(reach, roofline(reach, machine) / 1e9, color="black", label="roofline of this machine")
    for marker, (name, sizes) in zip("^so", rates.items(), strict=True):
        x = [matmul_intensity(size) for size in sizes]
        best, worst = (np.array([pick(runs) for runs in sizes.values()]) / 1e9 for pick in (np.max, np.min))
        axis.errorbar(x, best, yerr=[best - worst, 0 * best], marker=marker, capsize=3, label=f"product, {name}")
    for marker, (name, intensity, rate) in zip("Dv", streams, strict=False):
        axis.plot(intensity, rate / 1e9, marker, color="0.3", label=name)
    axis.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="rate (GFLOP/s)")
    axis.legend()
    return figure


# The chapter's experiments


def save_table(config: FiguresConfig, name: str, columns: list[Column], rows: list[list], seeds: Iterable[int]) -> None:
    experiment = "roofline" if name == "machine" else name
    command = f"python 01-prerequisites/prerequisites.py figures {experiment}"
    save_results(config.folder / "results.json", name, columns, rows, seeds, command)


def n_parameters(model: Module) -> float:
    return float(np.sum([parameter.data.size for parameter in model.parameters()]))


def graph_figure(config: FiguresConfig) -> None:
    nodes = dict(zip(("x", "r₁ = x²", "r₂ = 3 r₁", "loss = r₁ r₂"), reused_node(), strict=True))
    figure = plot_graph(nodes, [(0, 0), (1, 0), (1.75, 0.75), (2.5, 0)])
    save_figure(figure, config.folder / "graph.svg")


def xor_table(config: FiguresConfig) -> None:
    """Seeds from 100: the network was chosen on seeds 0 to 99."""
    seeds, rows = range(100, 100 + config.n_xor_seeds), []
    train = TrainConfig(max_steps=config.max_steps)
    for d_hidden in (0, 2, 4, 8, 16):
        scores = [solve_xor(train, seed, d_hidden) for seed in progress(seeds, f"XOR, {d_hidden} hidden units")]
        size = n_parameters(MLP([2, d_hidden, 2] if d_hidden else [2, 2], np.random.default_rng(0)))
        name = f"{d_hidden} hidden units" if d_hidden else "a line"
        rows.append([name, size, float(np.mean(np.equal(scores, 1))), scores])
    columns = [Column("network"), Column("parameters", "", ".0f")]
    columns += [Column("seeds with all four points right", "", ".0%"), Column("points right", "", ".1%")]
    save_table(config, "xor", columns, rows, seeds)


def spirals_table(config: FiguresConfig) -> None:
    train, seeds, rows = TrainConfig(max_steps=config.max_steps), range(config.n_seeds), []
    for n_hidden, name in enumerate(("a line", "one hidden layer of 32", "two hidden layers of 32")):
        runs = [solve_spirals(train, seed, n_hidden) for seed in seeds]
        rows.append([name, n_parameters(runs[0][0]), [score for _, score, _ in runs]])
    columns = [Column("network"), Column("parameters", "", ".0f"), Column("held-out points right", "", ".1%")]
    save_table(config, "spirals", columns, rows, seeds)
    model, _, held_out = runs[0]
    save_figure(plot_spirals(model, *held_out), config.folder / "two_spirals.svg")


def variance_table(config: FiguresConfig) -> None:
    seeds, rows, curves = range(config.n_seeds), [], {}
    inits = {"normal, 0.01": normal_init, "Xavier": xavier_normal, "He": he_normal}
    for activation in (relu, tanh):
        for name, init in inits.items():
            generators = [np.random.default_rng(seed) for seed in seeds]
            size = {"n_layers": config.n_layers, "width": config.d_hidden}
            runs = [activation_variances(init, activation, generator, **size) for generator in generators]
            curves[f"{name}, {activation.__name__}"] = runs
            gain = {"normal, 0.01": config.d_hidden * 0.01**2, "Xavier": 1.0, "He": 2.0}[name]  # width * variance
            factor = f"{gain / 2:.3g}" if activation is relu else f"at most {gain:.3g}"
            growth = [float((run[-1] / run[0]) ** (1 / (config.n_layers - 1 or 1))) for run in runs]
            rows.append([f"{name}, {activation.__name__}", [r[0] for r in runs], [r[-1] for r in runs], growth, factor])
    columns = [Column("weights and activation"), Column("variance in layer 1", "", ".2g")]
    columns += [Column(f"in layer {config.n_layers}", "", ".2g")]
    columns += [Column("factor per layer", "", ".4f"), Column("derived")]
    save_table(config, "variance", columns, rows, seeds)
    save_figure(plot_activation_variances(curves), config.folder / "activation_variance.svg")


def optimizers_table(config: FiguresConfig) -> None:
    seeds, angle, rows = range(config.n_seeds), math.pi / 4, []
    makers = {
        "SGD, η = 2/101": partial(SGD, learning_rate=2 / 101),
        "momentum 0.669, η = 4/121": partial(Momentum, learning_rate=4 / 121, momentum=(9 / 11) ** 2),
    }
    makers |= {f"Adam, η = {rate}": partial(Adam, learning_rate=rate) for rate in (0.01, 0.03, 0.1, 0.3)}
    for name, make in progress(list(makers.items()), "optimizers"):
        cells = []
        for turn in (0.0, angle):
            places = [np.random.default_rng(seed).uniform(0, 2 * math.pi) for seed in seeds]
            starts = [(math.cos(place), math.sin(place)) for place in places]
            paths = [optimizer_path(make, start, n_steps=config.max_steps, angle=turn) for start in starts]
            steps = [steps_to(bowl(path, angle=turn)) for path in paths]
            cells.append(steps if np.isfinite(steps).all() else f"not within {config.max_steps} in every run")
        rows.append([name, *cells])
    columns = [Column("optimiser"), Column("steps, bowl along the axes", "", ".0f")]
    save_table(config, "optimizers", [*columns, Column("bowl turned by 45°", "", ".0f")], rows, seeds)
    drawn = {"SGD": 0, "momentum": 1, "Adam, η = 0.03": 3}
    walk = partial(optimizer_path, start=(-1.0, 0.5), n_steps=400)
    paths = {name: walk(list(makers.values())[place]) for name, place in drawn.items()}
    turned = {name: walk(list(makers.values())[place], angle=angle) for name, place in drawn.items()}
    save_figure(plot_optimizer_paths(paths, turned, angle), config.folder / "optimizer_paths.svg")


def softmax_table(config: FiguresConfig) -> None:
    seeds = range(config.n_seeds)
    kinds = {
        f"{name}, {np.dtype(dtype).name}": partial(softmax_error, function, dtype=dtype)
        for dtype in (np.float32, np.float64)
        for name, function in (("as written", naive_softmax), ("shifted", softmax))
    }

    def cell(measure: Callable, offset: float) -> list[float] | str:
        errors = [measure(offset, np.random.default_rng(seed)) for seed in seeds]
        return errors if np.isfinite(errors).all() else "not a number"

    offsets = (-800.0, -700.0, -95.0, -50.0, 0.0, 50.0, 80.0, 95.0, 700.0, 800.0)
    rows = [[f"{offset:g}", *(cell(measure, offset) for measure in kinds.values())] for offset in offsets]
    save_table(config, "softmax", [Column("offset"), *(Column(name, "", ".0e") for name in kinds)], rows, seeds)
    fine = [float(offset) for offset in range(-800, 801, 20)]
    curves = {n: [measure(offset, np.random.default_rng(0)) for offset in fine] for n, measure in kinds.items()}
    save_figure(plot_softmax_errors(fine, curves), config.folder / "softmax_error.svg")


def roofline_table(config: FiguresConfig) -> None:
    bench_config = BenchConfig(config.max_size, config.n_rounds)
    rates = matmul_rates(bench_config, np.random.default_rng(0))
    streams = streaming_rates(config.n_copied, config.n_rounds)
    machine = measure_machine(config.n_rounds, rates, config.n_copied, streams)
    rows = []
    for name, intensity, rate in streams:
        rows.append([name, intensity, float(roofline(intensity, machine)) / 1e9, "", "", rate / 1e9])
    for size in bench_config.sizes:
        best = [float(np.max(sizes[size])) / 1e9 if size in sizes else "" for sizes in rates.values()]
        roof = float(roofline(matmul_intensity(size), machine)) / 1e9
        rows.append([f"matrix product, size {size}", matmul_intensity(size), roof, *best])
    columns = [Column("work, float32"), Column("intensity", "FLOP/byte"), Column("roofline", "GFLOP/s")]
    columns += [Column(name, "GFLOP/s") for name in rates]
    save_table(config, "roofline", columns, rows, [0])
    limits = [
        ["arithmetic", machine.flops / 1e9, "GFLOP/s"],
        ["memory", machine.bandwidth / 1e9, "GB/s"],
        ["ridge", machine.ridge, "FLOP/byte"],
    ]
    save_table(config, "machine", [Column("limit, measured"), Column("value"), Column("unit")], limits, [0])
    save_figure(plot_roofline(machine, rates, streams), config.folder / "roofline.svg")


def breaks_table(config: FiguresConfig) -> None:
    rows = []
    for bug in progress(list(SYMPTOMS), "planted bugs"):
        for what, *values in symptoms(bug):
            rows.append([f"`{bug}`", what, *(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values)])
    columns = [Column("--break"), Column("symptom"), Column("sound"), Column("broken")]
    save_table(config, "breaks", columns, rows, [0])


EXPERIMENTS: dict[str, Callable[[FiguresConfig], None]] = {
    "graph": graph_figure,
    "xor": xor_table,
    "spirals": spirals_table,
    "variance": variance_table,
    "optimizers": optimizers_table,
    "softmax": softmax_table,
    "roofline": roofline_table,
    "breaks": breaks_table,
}


# The verbs


def figures(config: FiguresConfig) -> None:
    """Run the chapter's experiments; write its figures, results.json and tables."""
    torch.set_num_threads(1)
    names = config.only or tuple(EXPERIMENTS)
    announce(f"experiments of chapter 1: {', '.join(names)}", 15 * len(names))
    for name in names:
        seed_everything(0)
        EXPERIMENTS[name](config)
    fill_chapter(config.folder.parent)


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Check every gradient, then learn XOR and two spirals with our own automatic differentiation."""
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
    model, _, held_out = runs[0]
    save_figure(plot_spirals(model, *held_out), run.out / "two_spirals.svg")


def spelled(scores: list[float]) -> str:
    """The fraction for each seed, then mean and standard deviation."""
    spread = f" ± {np.std(scores, ddof=1):.1%}" if len(scores) > 1 else ""
    return f"{', '.join(f'{score:.1%}' for score in scores)}; mean {np.mean(scores):.1%}{spread}"


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Measure matrix products against this machine's roofline, and our training step against torch's."""
    seed_everything(run.seed)
    announce("matrix products and training steps", 2 + 2 * config.n_rounds)
    rates = matmul_rates(config, np.random.default_rng(run.seed))
    machine = measure_machine(config.n_rounds, rates)
    ridges = ", ".join(f"{item.name} {item.ridge:.0f}" for item in HARDWARE)
    print(describe_machine())
    print(f"measured peaks: {machine.flops / 1e9:.1f} GFLOP/s in float32, {machine.bandwidth / 1e9:.1f} GB/s")
    print(f"ridge: {machine.ridge:.1f} FLOP/byte; by their data sheets, in 16 bits: {ridges}")
    print("matrix product: size, intensity, GFLOP/s in the best round (share of the roofline; slowest round)")
    for size in config.sizes:
        roof = roofline(matmul_intensity(size), machine)
        cells = {name: np.array(sizes[size]) for name, sizes in rates.items() if size in sizes}
        line = "  ".join(
            f"{n} {r.max() / 1e9:.3g} ({r.max() / roof:.2%}; {r.min() / 1e9:.3g})" for n, r in cells.items()
        )
        print(f"{size:5} {matmul_intensity(size):6.1f} FLOP/byte  {line}")
    shared = list(rates["loop"])[-1]
    loop, *others = (np.max(sizes[shared]) for sizes in rates.values())
    print(
        f"at size {shared}, NumPy is {others[0] / loop:.0f} and torch {others[1] / loop:.0f} times as fast as the loop"
    )
    rounds = [runs for sizes in rates.values() for runs in sizes.values()]
    for d_hidden, batch_size in ((32, 64), (512, 256)):
        times = step_times(d_hidden, batch_size, config.n_rounds, run.seed)
        rounds += times.values()
        ratio = speed_ratio(times["ours"], times["torch"])
        best = np.min(times["ours"]) / 10
        print(f"training step, width {d_hidden}, batch {batch_size}: {best * 1e3:.2f} ms, {ratio} of torch")
    warn_if_unsteady(rounds)
    save_figure(plot_roofline(machine, rates), run.out / "roofline.svg")


def warn_if_unsteady(rounds: list[list[float]], most: float = 3.0) -> None:
    """Say so if the rounds of one measurement differ more than `most`-fold: then no ratio above can be trusted.

    A threaded product waits for its slowest thread, so that one busy core can make it a hundred times as slow.
    """
    spread = np.max([np.max(runs) / np.min(runs) for runs in rounds])
    if spread > most:
        remedy = "repeat on an idle machine, or with OMP_NUM_THREADS=1"
        print(f"unsteady: rounds of one measurement differ {spread:.0f}-fold, other programs hold the cores; {remedy}")


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "demo": (demo, DemoConfig, RunConfig),
        "figures": (figures, FiguresConfig),
        "bench": (bench, BenchConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
