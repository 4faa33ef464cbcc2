"""Topic 04 - Transformer architecture: the block that every later model stacks, its positions, and what it costs.

python 04-transformer-architecture/transformer_architecture.py            # the demo: a language model, one minute
python 04-transformer-architecture/transformer_architecture.py --break mask   # a failure, switched on and measured
python 04-transformer-architecture/transformer_architecture.py figures    # every experiment of the chapter, 8 minutes
python 04-transformer-architecture/transformer_architecture.py bench      # ours against PyTorch's layers
python 04-transformer-architecture/transformer_architecture.py --help

Papers: Vaswani et al. 2017 (arXiv 1706.03762), the architecture; Ba, Kiros, Hinton 2016 (arXiv 1607.06450), layer
normalisation; Xiong et al. 2020 (arXiv 2002.04745), where to put it; Shaw et al. 2018 (arXiv 1803.02155) and Raffel et
al. 2020 (arXiv 1910.10683), relative positions; Su et al. 2021 (arXiv 2104.09864), rotary positions; Press, Smith,
Lewis 2022 (arXiv 2108.12409), attention with linear biases.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prerequisites
from attention_mechanisms import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    check_same_attention,
    key_distance,
)
from sequence_modeling import (
    BOS_ID,
    EOS_ID,
    IGNORE,
    PAD_ID,
    Vocabulary,
    check_integers,
    check_sizes,
    check_token_ids,
    document_batches,
    document_losses,
    gap_to_floor,
)
from tiny_world import Document, World, join
from workbench import (
    RunConfig,
    announce,
    check_name,
    check_range,
    describe_machine,
    pick_device,
    progress,
    run_verbs,
    save_figure,
    seed_everything,
    speed_line,
    time_in_turns,
)

NORM_ORDERS = ("pre", "post")
HELD_OUT_SEED = 777  # of the documents that models are examined with
SMALL_MODEL_RATE = 20e9  # FLOP/s that a model of 100,000 parameters reaches in training on one CPU core
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark times: one training step of a stack of encoder layers, ours and PyTorch's."""

    n_repeats: int = 15  # timed steps of each
    batch_size: int = 8  # sequences in a batch
    seq_len: int = 128  # positions in a sequence

    def __post_init__(self) -> None:
        check_range(self, "n_repeats", "batch_size", "seq_len", least=1)


@dataclass(frozen=True)
class TrainConfig:
    """How a language model is trained and examined."""

    batch_size: int = 8  # rows in a batch, each packed with whole documents
    seq_len: int = 64  # tokens in a row
    max_steps: int = 1600  # optimizer steps
    warmup_steps: int = 50  # steps of rising learning rate
    learning_rate: float = 7e-3  # the peak
    min_lr_ratio: float = 0.05  # last learning rate, as a fraction of the peak
    weight_decay: float = 0.1  # of the matrices
    grad_clip: float = 1.0  # largest norm of the gradient
    n_documents: int = 1000  # held-out documents to examine the model with

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "seq_len", "max_steps", least=1)
        check_range(self, "warmup_steps", "weight_decay", least=0)
        check_range(self, "learning_rate", "grad_clip", above=0)
        check_range(self, "min_lr_ratio", least=0, most=1)
        check_range(self, "n_documents", least=2)


@dataclass(frozen=True)
class BreakConfig:
    """Which failure the demo switches on; `BREAKS` in architecture_experiments holds them."""

    break_: Literal["none", "unbiased", "epsilon", "norm-order", "rotary", "mask"] = "none"  # the failure to show


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a CausalTransformer."""

    max_seq_len: int = 256  # most positions that one call may see
    d_model: int = 64  # width of the residual stream
    n_layers: int = 2  # blocks of attention and feed-forward network
    n_heads: int = 4  # attention heads; must divide d_model
    d_ff: int = 256  # width inside the feed-forward network
    dropout: float = 0.0  # fraction of activations zeroed in training
    norm_order: str = "pre"  # pre or post: normalise the input of a sub-layer, or the stream after it
    activation: str = "relu"  # relu or gelu
    positions: str = "rotary"  # sinusoidal, learned, rotary, alibi, relative or none

    def __post_init__(self) -> None:
        check_range(self, "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff", least=1)
        check_range(self, "dropout", least=0, below=1)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        check_name("positions", self.positions, POSITIONS)
        check_name("norm_order", self.norm_order, NORM_ORDERS)
        check_name("activation", self.activation, ACTIVATIONS)


# Normalisation and the feed-forward network


class LayerNorm(nn.Module):
    """Give every position mean 0 and variance 1, then scale and shift each feature (Ba et al. 2016, equation 4).

    The variance is the biased one (divided by d_model, not d_model - 1), and norm_eps stands inside the root. Half
    precision is normalised in float32. Shapes: any (..., d_model) to the same. Raises ValueError for another width and
    TypeError for integers, to which the result would be cut.
    """

    def __init__(self, d_model: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(f"expected vectors of width {len(self.weight)}, got a tensor of shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point numbers, got {x.dtype}; use .float()")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the square of 256 is infinite in float16
        centred = wide - wide.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return (self.weight * (centred * torch.rsqrt(variance + self.norm_eps)) + self.bias).to(x.dtype)


def layer_norm_backward(
    x: Tensor, weight: Tensor, grad_output: Tensor, norm_eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm for x, weight and bias, by hand; x and grad_output have shape (..., d_model).

    With n = (x - mean) / root and g = grad_output * weight, the gradient for x is (g - mean(g) - n mean(g n)) / root:
    g without its part along the vector of ones and without its part along n, the two directions that the
    normalisation removes from x.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    root = (centred.square().mean(dim=-1, keepdim=True) + norm_eps).sqrt()
    normed, grad = centred / root, grad_output * weight
    along_normed = normed * (grad * normed).mean(dim=-1, keepdim=True)
    grad_x = (grad - grad.mean(dim=-1, keepdim=True) - along_normed) / root
    grad_weight = (grad_output * normed).reshape(-1, x.shape[-1]).sum(dim=0)  # (d_model)
    grad_bias = grad_output.reshape(-1, x.shape[-1]).sum(dim=0)  # (d_model)
    return grad_x, grad_weight, grad_bias


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between, at every position alike (Vaswani et al. 2017, equation 2).

    Shapes: (..., d_model) to the same; d_ff wide in between. Raises ValueError for an unknown activation.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__()
        self.activation = check_name("activation", activation, ACTIVATIONS)
        self.up_proj, self.down_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.up_proj, self.down_proj):  # as in MultiHeadAttention and nn.Transformer
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.up_proj(x))  # (batch, seq, d_ff)
        return self.down_proj(self.dropout(hidden))  # (batch, seq, d_model)


# Positions that are added to the embeddings


def position_angles(positions: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """Angle of every position at every frequency, position / theta^(2i / width), in radians.

    positions (seq) to (seq, ceil(width / 2)), in float64 on the CPU: a float32 product of a position in the thousands
    is already wrong in the fourth digit of its sine. Raises ValueError unless theta > 0.
    """
    if not theta > 0:
        raise ValueError(f"theta must be > 0, got {theta}; 10000 is the usual one")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    return torch.outer(positions.double().cpu(), theta**-exponents)


class SinusoidalPositions(nn.Module):
    """Add sin(pos / 10000^(2i/d)) to feature 2i and its cosine to 2i + 1 (Vaswani et al. 2017, section 3.5).

    An odd d_model ends on a sine. Shapes: (batch, seq, d_model) to the same; `start` is the position of the first row.
    Raises ValueError for another width or start and beyond max_seq_len.
    """

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model, max_seq_len=max_seq_len)
        self.d_model, self.max_seq_len = d_model, max_seq_len
        angles = position_angles(torch.arange(max_seq_len, device="cpu"), d_model)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]  # (seq, d_model)
        self.table = table  # no parameter and no buffer: it stays in float64 until it is added

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        stop = check_sequence(x, start, self)
        return x + self.table[start:stop].to(x.dtype).to(x.device)


class LearnedPositions(nn.Module):
    """Add one learned vector for each position (Gehring et al. 2017, arXiv 1705.03122, section 3.1).

    Shapes: (batch, seq, d_model) to the same. Raises ValueError for another width or start and beyond max_seq_len.
    """

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model, max_seq_len=max_seq_len)
        self.d_model, self.max_seq_len = d_model, max_seq_len
        self.weight = nn.Parameter(torch.empty(max_seq_len, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return x + self.weight[start : check_sequence(x, start, self)]


class NoPositions(nn.Module):
    """Add nothing: the order comes from attention, or only from the causal mask (Haviv et al. 2022, arXiv 2203.16634).

    Shapes: (batch, seq, d_model) to the same. Raises ValueError for another width or start and beyond max_seq_len.
    """

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model, max_seq_len=max_seq_len)
        self.d_model, self.max_seq_len = d_model, max_seq_len

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        check_sequence(x, start, self)
        return x


def check_sequence(x: Tensor, start: int, positions: SinusoidalPositions | LearnedPositions | NoPositions) -> int:
    """Return the position after the last of x; raise ValueError for what `positions` cannot be added to."""
    if x.dim() != 3 or x.shape[-1] != positions.d_model or start < 0:  # a width of 1 would broadcast
        raise ValueError(
            f"expected a sequence (batch, seq, d_model={positions.d_model}) and start >= 0, got {tuple(x.shape)} and "
            f"{start}"
        )
    return check_length(x.shape[1], start, positions.max_seq_len)


def check_length(seq_len: int, start: int, max_seq_len: int) -> int:
    """Return the position after the last; raise ValueError if it lies beyond max_seq_len."""
    if start + seq_len > max_seq_len:
        after = f" after {start} cached positions" if start else ""
        remedy = "shorten the input or build the model with a larger max_seq_len"
        raise ValueError(f"sequence length {seq_len}{after} exceeds max_seq_len {max_seq_len}; {remedy}")
    return start + seq_len


# Positions inside attention: each scheme is a short class beside MultiHeadAttention


def check_angles(x: Tensor, angles: Tensor) -> None:
    """Raise ValueError unless there is an angle for every pair of features of x (..., seq, d_head)."""
    fits = angles.dim() > 1 and angles.shape[-1] * 2 == x.shape[-1] and angles.shape[-2] in (1, x.shape[-2])
    if not (fits and x.is_floating_point()):
        raise ValueError(
            f"expected floating-point x (..., seq, d_head) and angles (seq, d_head / 2), got {x.dtype} of shape "
            f"{tuple(x.shape)} and {tuple(angles.shape)}"
        )


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate features (2i, 2i + 1) of x (..., seq, d_head) by angles (seq, d_head / 2) (Su et al. 2021, section 3.2.2).

    The layout of the paper, of GPT-J and of Meta's Llama files.
    """
    check_angles(x, angles)
    cos, sin = angles.cos().to(x.dtype).to(x.device), angles.sin().to(x.dtype).to(x.device)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate features (i, i + d_head / 2): the layout of Llama and most others in Hugging Face's library.

    The same map as rotate_pairs with the features in another order: weights of one layout fail silently in the other.
    """
    check_angles(x, angles)
    cos, sin = angles.cos().to(x.dtype).to(x.device), angles.sin().to(x.dtype).to(x.device)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def pairs_to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection (weight or bias) from the layout in pairs to the one in halves."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class RotaryAttention(MultiHeadAttention):
    """Rotate queries and keys by their position, so that their dot product depends on i - j alone (Su et al. 2021).

    For self-attention: the last query stands at the last key, and keys are rotated here, from position 0, because a
    cache keeps them as they were projected. Raises ValueError for an odd d_head and for fewer keys than queries.
    """

    rope_theta = 10000.0
    rotate = staticmethod(rotate_pairs)

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, use_bias: bool = True) -> None:
        super().__init__(d_model, n_heads, dropout, use_bias)
        if self.d_head % 2:
            raise ValueError(
                f"rotary positions turn pairs of features: d_head={self.d_head} (d_model={d_model} / "
                f"n_heads={n_heads}) must be even; choose another n_heads"
            )

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check_input(x, mask)
        q = self.split_heads(self.q_proj(x))  # (batch, heads, query, d_head)
        if q.shape[2] > k.shape[2]:
            raise ValueError(
                f"rotary positions align the last query with the last key: {q.shape[2]} queries need as many keys at "
                f"least, got {k.shape[2]}"
            )
        angles = position_angles(torch.arange(k.shape[2], device="cpu"), self.d_head, self.rope_theta)  # (key, half)
        q, k = self.rotate(q, angles[k.shape[2] - q.shape[2] :]), self.rotate(k, angles)
        weights = self.dropout(attention_weights(q, k, mask, bias, self.scale))  # (batch, heads, query, key)
        mixed = weights @ v  # (batch, heads, query, d_head)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights


class HalfRotaryAttention(RotaryAttention):
    """Rotary attention in the layout of halves."""

    rotate = staticmethod(rotate_halves)


def relative_buckets(
    offsets: Tensor, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """Bucket of each offset (key - query position): exact when near, logarithmic when far (Raffel et al. 2020).

    One direction: half of the buckets hold one distance each, the others grow up to max_distance, and everything
    farther shares the last. Bidirectional: half of the buckets for each sign; otherwise keys ahead count as distance 0.
    Raises ValueError for too few buckets, and unless max_distance lies beyond the distances with a bucket of their own;
    TypeError for offsets that are no integers.
    """
    if offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise TypeError(f"offsets must be integers, got {offsets.dtype}")
    check_integers(n_buckets=n_buckets)
    least = 4 if bidirectional else 2
    n_exact = n_buckets // least
    if n_buckets < least or not n_exact < max_distance < math.inf:
        raise ValueError(
            f"n_buckets={n_buckets} must be >= {least}, and max_distance={max_distance} > {n_exact}, the number of "
            "distances with a bucket of their own"
        )
    base = torch.zeros_like(offsets)
    if bidirectional:
        n_buckets //= 2
        base = n_buckets * (offsets > 0)
    distance = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    growth = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)  # float32, as in T5
    far = (n_exact + (growth * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return base + torch.where(distance < n_exact, distance, far)


class RelativeAttention(MultiHeadAttention):
    """Add to each score a learned number for its head and the bucket of its distance (Raffel et al. 2020, section 2.1).

    T5 shares the numbers between layers (assign one layer's `relative_bias` to the others) and leaves out 1/sqrt(d).
    """

    n_buckets, max_distance, bidirectional = 32, 128, True

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, use_bias: bool = True) -> None:
        super().__init__(d_model, n_heads, dropout, use_bias)
        self.relative_bias = nn.Embedding(self.n_buckets, n_heads)
        nn.init.zeros_(self.relative_bias.weight)

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        offsets = -key_distance(x.shape[1], k.shape[2], x.device)  # (query, key)
        buckets = relative_buckets(offsets, self.n_buckets, self.max_distance, self.bidirectional)  # (query, key)
        relative = self.relative_bias(buckets).permute(2, 0, 1)  # (heads, query, key)
        return super().attend(x, k, v, mask, relative if bias is None else relative + bias)


class CausalRelativeAttention(RelativeAttention):
    """Relative positions for a causal mask: all buckets look back."""

    bidirectional = False


def alibi_slopes(n_heads: int) -> Tensor:
    """Slope of each head: 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two (Press et al. 2022, section 3).

    Another n takes the slopes of the power of two below it, then every other slope of the power above. Raises
    ValueError for n < 1.
    """
    check_integers(n_heads=n_heads)
    if n_heads < 1:
        raise ValueError(f"n_heads must be >= 1, got {n_heads}")
    power = 1 << (int(n_heads).bit_length() - 1)
    slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1, dtype=torch.float64))
    between = 2.0 ** (-4 / power * torch.arange(1, 2 * power + 1, 2, dtype=torch.float64))
    return torch.cat([slopes, between])[:n_heads]  # (heads)


class AlibiAttention(MultiHeadAttention):
    """Subtract slope * distance from each score: a fixed, head by head different, preference for near keys."""

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        distance = key_distance(x.shape[1], k.shape[2], x.device).abs()  # (query, key)
        slopes = alibi_slopes(self.n_heads).to(x.dtype).to(x.device)  # (heads)
        linear = -slopes[:, None, None] * distance  # (heads, query, key)
        return super().attend(x, k, v, mask, linear if bias is None else linear + bias)


# Layers and stacks


class KeyValueCache:
    """Keys and values of one layer: those of the positions so far, and those of the memory, computed once.

    `len(cache)` is the number of positions so far; an empty cache is false, so test it with `is None`. The keys and
    values have shape (batch, heads, positions, d_head) and know nothing of positions: attention derives those from the
    lengths. After the first call the memory given to a decoder layer is not looked at again.
    """

    def __init__(self) -> None:
        self.own: tuple[Tensor, Tensor] | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self.own is None else self.own[0].shape[2]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for pair in (self.own, self.memory) if pair is not None for tensor in pair)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions; return the keys and values of all of them. ValueError for another batch size."""
        if self.own is not None:
            if len(k) != len(self.own[0]):
                raise ValueError(
                    f"the cache holds {len(self.own[0])} sequences, got {len(k)}; select its rows or start a new one"
                )
            k = torch.cat([self.own[0], k], dim=2)  # (batch, heads, *, d_head)
            v = torch.cat([self.own[1], v], dim=2)  # (batch, heads, *, d_head)
        self.own = (k, v)
        return k, v

    def select(self, rows: Tensor | list[int]) -> None:
        """Keep these rows of the batch, in this order, repeats allowed: what beam search does to its hypotheses.

        Raises ValueError for a row that the cache has not, and TypeError for rows that are no integers.
        """
        for name in ("own", "memory"):
            if getattr(self, name) is not None:
                k, v = getattr(self, name)
                index = torch.as_tensor(rows, device=k.device)
                index = index if index.numel() else index.long()  # [] makes floats
                check_rows(index, len(k))
                setattr(self, name, (k.index_select(0, index), v.index_select(0, index)))


def check_rows(rows: Tensor, n_rows: int) -> None:
    if rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(f"rows must be integers, got {rows.dtype}; use mask.nonzero()[:, 0] for a mask")
    if rows.numel() and not 0 <= rows.min() <= rows.max() < n_rows:
        raise ValueError(f"rows must be in 0..{n_rows - 1}, got {rows.tolist()}")


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network, each with a residual connection and a normalisation.

    norm_order "post" is Vaswani et al. 2017, section 3.1; "pre" is Xiong et al. 2020, figure 1(b).
    Shapes: (batch, seq, d_model) to the same; mask as in MultiHeadAttention, True = may attend. With a cache, x holds
    only the new positions, and a mask has one column for each position so far. A forward hook on self_attn sees the
    attention weights when there is no cache. Raises ValueError for an unknown norm_order or activation.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm_order: str = "pre",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.norm_order = check_name("norm_order", norm_order, NORM_ORDERS)
        self.self_attn = MultiHeadAttention(d_model, n_heads, dropout)
        self.ffn = FeedForward(d_model, d_ff, dropout, activation)
        self.attn_norm, self.ffn_norm = LayerNorm(d_model), LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x = self.residual(x, self.attn_norm, lambda y: self.attend_self(y, mask, cache))  # (batch, seq, d_model)
        return self.residual(x, self.ffn_norm, self.ffn)  # (batch, seq, d_model)

    def residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Pre-norm leaves the residual stream untouched; post-norm normalises the stream itself."""
        if self.norm_order == "pre":
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))

    def attend_self(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if cache is None:
            return self.self_attn(x, mask=mask)[0]
        k, v = cache.append(*self.self_attn.keys_values(x))
        return self.self_attn.attend(x, k, v, mask)[0]


class DecoderLayer(EncoderLayer):
    """An encoder layer with attention to a memory between its two halves (Vaswani et al. 2017, section 3.1).

    Shapes: x (batch, tgt, d_model), memory (batch, src, d_model) to (batch, tgt, d_model); self_mask broadcasts to
    (batch, heads, tgt, tgt), memory_mask to (batch, heads, tgt, src). With a cache, x holds only the new positions;
    several at once need the causal mask of `causal_mask(new, len(cache) + new)`. The first call keeps the keys and
    values of the memory; later calls ignore what they get as memory.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm_order: str = "pre",
        activation: str = "relu",
    ) -> None:
        super().__init__(d_model, n_heads, d_ff, dropout, norm_order, activation)
        self.cross_attn, self.cross_norm = MultiHeadAttention(d_model, n_heads, dropout), LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        self_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x = self.residual(x, self.attn_norm, lambda y: self.attend_self(y, self_mask, cache))  # (batch, tgt, d_model)
        x = self.residual(
            x, self.cross_norm, lambda y: self.attend_memory(y, memory, memory_mask, cache)
        )  # (batch, tgt, d_model)
        return self.residual(x, self.ffn_norm, self.ffn)  # (batch, tgt, d_model)

    def attend_memory(self, x: Tensor, memory: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if cache is None:
            return self.cross_attn(x, memory, mask)[0]
        if cache.memory is None:
            cache.memory = self.cross_attn.keys_values(memory)
        return self.cross_attn.attend(x, *cache.memory, mask)[0]


def one_for_each(blocks: nn.ModuleList, caches: list[KeyValueCache] | None) -> list[KeyValueCache | None]:
    """The cache of each block, or None for each; raises ValueError for another number of caches."""
    if caches is not None and len(caches) != len(blocks):
        raise ValueError(f"got {len(caches)} caches for {len(blocks)} blocks; build one KeyValueCache for each block")
    return caches or [None] * len(blocks)


def check_depth(n_layers: int) -> None:
    check_integers(n_layers=n_layers)
    if n_layers < 0:
        raise ValueError(f"n_layers must be >= 0, got {n_layers}")


class Encoder(nn.Module):
    """`n_layers` encoder layers and a last normalisation; the arguments after n_layers are those of EncoderLayer.

    The last normalisation stands in both norm orders, as in nn.Transformer; post-norm as published ends without one.
    Shapes: (batch, seq, d_model) to the same.
    """

    def __init__(self, n_layers: int, d_model: int, *layer_args, **layer_options) -> None:
        super().__init__()
        check_depth(n_layers)
        self.blocks = nn.ModuleList(EncoderLayer(d_model, *layer_args, **layer_options) for _ in range(n_layers))
        self.final_norm = LayerNorm(d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None, caches: list[KeyValueCache] | None = None) -> Tensor:
        for block, cache in zip(self.blocks, one_for_each(self.blocks, caches), strict=True):
            x = block(x, mask, cache)  # (batch, seq, d_model)
        return self.final_norm(x)  # (batch, seq, d_model)


class Decoder(nn.Module):
    """`n_layers` decoder layers and a last normalisation; the arguments after n_layers are those of DecoderLayer.

    Shapes: x (batch, tgt, d_model), memory (batch, src, d_model) to (batch, tgt, d_model). `caches` holds one
    KeyValueCache for each layer.
    """

    def __init__(self, n_layers: int, d_model: int, *layer_args, **layer_options) -> None:
        super().__init__()
        check_depth(n_layers)
        self.blocks = nn.ModuleList(DecoderLayer(d_model, *layer_args, **layer_options) for _ in range(n_layers))
        self.final_norm = LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        self_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        for block, cache in zip(self.blocks, one_for_each(self.blocks, caches), strict=True):
            x = block(x, memory, self_mask, memory_mask, cache)  # (batch, tgt, d_model)
        return self.final_norm(x)  # (batch, tgt, d_model)


# A language model


POSITIONS = {  # name: what is added to the embeddings, and the attention that goes with it
    "sinusoidal": (SinusoidalPositions, MultiHeadAttention),
    "learned": (LearnedPositions, MultiHeadAttention),
    "rotary": (NoPositions, RotaryAttention),
    "alibi": (NoPositions, AlibiAttention),
    "relative": (NoPositions, CausalRelativeAttention),
    "none": (NoPositions, MultiHeadAttention),
}


class CausalTransformer(nn.Module):
    """A decoder-only language model: encoder layers under a causal mask (Liu et al. 2018, arXiv 1801.10198).

    Shapes: token_ids (batch, seq) to logits (batch, seq, vocab); position i sees the ids up to its own and predicts the
    next. With caches (one KeyValueCache for each layer) token_ids holds only the new positions.
    Raises ValueError for an id outside the vocabulary and for more than max_seq_len positions.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size)
        self.config, self.vocab_size = config, vocab_size
        added, attention = POSITIONS[config.positions]
        d_model, n_heads, dropout = config.d_model, config.n_heads, config.dropout
        self.token_emb = nn.Embedding(vocab_size, d_model)
        self.pos_emb = added(d_model, config.max_seq_len)
        self.encoder = Encoder(
            config.n_layers, d_model, n_heads, config.d_ff, dropout, config.norm_order, config.activation
        )
        for block in self.encoder.blocks:
            block.self_attn = attention(d_model, n_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # all tokens start about equally likely: loss ln V

    def forward(self, token_ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids must have shape (batch, seq), got {tuple(token_ids.shape)}")
        if not token_ids.is_meta:  # a meta tensor has a shape but no values to check
            check_token_ids(token_ids, self.vocab_size)
        start, seq_len = len(caches[0]) if caches else 0, token_ids.shape[1]
        x = self.dropout(self.pos_emb(self.token_emb(token_ids), start))  # (batch, seq, d_model)
        mask = causal_mask(seq_len, start + seq_len, token_ids.device)
        x = self.encoder(x, mask, caches)  # (batch, seq, d_model)
        logits = self.lm_head(x)  # (batch, seq, vocab)
        return logits

    def new_caches(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.encoder.blocks]

    @torch.no_grad()
    def generate(
        self,
        token_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample a continuation of token_ids (batch, seq); returns the new ids (batch, at most max_new_tokens).

        Temperature 0 takes the most likely token. After its <eos> a row holds <pad>. With dropout, call `eval()` first.
        Raises ValueError for a temperature or max_new_tokens below 0, for prompts without a token, if the end could lie
        beyond max_seq_len, and for logits that are not finite.
        """
        if token_ids.dim() != 2 or token_ids.shape[1] == 0:
            raise ValueError(
                f"token_ids must have shape (batch, seq >= 1), got {tuple(token_ids.shape)}; begin with <bos>"
            )
        if max_new_tokens < 0 or not 0 <= temperature < math.inf:
            raise ValueError(
                f"max_new_tokens and temperature must be >= 0 and finite, got {max_new_tokens}, {temperature}"
            )
        check_length(token_ids.shape[1] + max_new_tokens, 0, self.config.max_seq_len)
        caches, generated = self.new_caches(), [token_ids[:, :0]]
        done = torch.zeros(len(token_ids), 1, dtype=torch.bool, device=token_ids.device)  # (batch, 1)
        for _ in range(max_new_tokens):
            logits = self(token_ids, caches)[:, -1]  # (batch, vocab)
            top = logits.amax(dim=-1, keepdim=True)  # (batch, 1)
            if not top.isfinite().all():
                raise ValueError("the largest logit of a row must be finite, got NaN or infinity; train again?")
            if temperature == 0:
                token_ids = logits.argmax(dim=-1, keepdim=True)
            else:
                behind = (logits - top).double()  # 0 / temperature stays 0
                chances = (behind / temperature).softmax(dim=-1).to(logits.dtype)  # (batch, vocab)
                token_ids = torch.multinomial(chances, 1, generator=generator)
            token_ids = token_ids.masked_fill(done, PAD_ID)  # (batch, 1)
            generated.append(token_ids)
            done |= token_ids == EOS_ID
            if done.all():
                break
        return torch.cat(generated, dim=1)  # (batch, *)


def start_as_identity(model: nn.Module) -> None:
    """Zero the last map of every sub-layer, so that each block starts as the identity and learns its part from there.

    The same idea as Zhang, Dauphin, Ma 2019 (Fixup, arXiv 1901.09321): it makes high learning rates safe.
    """
    for block in model.encoder.blocks:
        for layer in (block.self_attn.out_proj, block.ffn.down_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


# PyTorch's layers: the same numbers under other names


def affine_pairs(ours: nn.Module, theirs: nn.Linear | nn.LayerNorm) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of both; raises ValueError if only one layer has them, or for another epsilon."""
    norm_eps = getattr(ours, "norm_eps", None)
    if isinstance(theirs, nn.LayerNorm) and norm_eps != theirs.eps:
        raise ValueError(f"norm_eps={norm_eps} does not fit eps={theirs.eps}")
    for name in ("weight", "bias"):
        pair = getattr(ours, name, None), getattr(theirs, name)
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"only one of {type(ours).__name__} and {type(theirs).__name__} has a {name}")
        if pair[0] is not None:
            yield pair


def torch_pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each of our parameters with the tensor that holds the same numbers in PyTorch's module of the same kind.

    Takes LayerNorm, Linear, MultiheadAttention, the two Transformer layers, their stacks, and nn.Transformer for any
    module of ours that has an `encoder` and a `decoder`. Raises ValueError if kind, heads, biases, norm order, the
    norms' epsilon, activation or depth differ, for then equal weights compute something else.
    """
    children: list[tuple[nn.Module, nn.Module]] = []
    match theirs:
        case nn.Linear() | nn.LayerNorm():
            yield from affine_pairs(ours, theirs)
        case nn.MultiheadAttention():
            check_same_attention(ours, theirs)
            projections = (ours.q_proj, ours.k_proj, ours.v_proj)
            yield from zip([proj.weight for proj in projections], theirs.in_proj_weight.chunk(3), strict=True)
            if theirs.in_proj_bias is not None:
                yield from zip([proj.bias for proj in projections], theirs.in_proj_bias.chunk(3), strict=True)
            children = [(ours.out_proj, theirs.out_proj)]
        case nn.TransformerEncoderLayer() | nn.TransformerDecoderLayer():
            if isinstance(ours, DecoderLayer) != isinstance(theirs, nn.TransformerDecoderLayer):
                raise ValueError(f"{type(ours).__name__} does not fit {type(theirs).__name__}")
            if (ours.norm_order == "pre") != theirs.norm_first:
                raise ValueError(f"norm_order={ours.norm_order!r} does not fit norm_first={theirs.norm_first}")
            x = torch.linspace(-3, 3, 7)  # theirs may be any function or module: compare what it computes
            if not torch.equal(theirs.activation(x), ACTIVATIONS[ours.ffn.activation](x)):
                name = getattr(theirs.activation, "__name__", theirs.activation)
                raise ValueError(f"activation={ours.ffn.activation!r} does not fit {name}")
            norms = [ours.attn_norm, ours.ffn_norm]
            children = [(ours.self_attn, theirs.self_attn)]
            if isinstance(theirs, nn.TransformerDecoderLayer):
                norms.insert(1, ours.cross_norm)
                children.append((ours.cross_attn, theirs.multihead_attn))
            children += [(norm, getattr(theirs, f"norm{index}")) for index, norm in enumerate(norms, start=1)]
            children += [(ours.ffn.up_proj, theirs.linear1), (ours.ffn.down_proj, theirs.linear2)]
        case nn.TransformerEncoder() | nn.TransformerDecoder():
            if len(ours.blocks) != len(theirs.layers) or theirs.norm is None:
                raise ValueError(
                    f"need {len(ours.blocks)} layers and a last norm, got {len(theirs.layers)}, {theirs.norm}"
                )
            children = [*zip(ours.blocks, theirs.layers, strict=True), (ours.final_norm, theirs.norm)]
        case nn.Transformer():
            children = [(ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)]
        case _:
            raise ValueError(f"no layer of this topic corresponds to {type(theirs).__name__}")
    for mine, other in children:
        yield from torch_pairs(mine, other)


@torch.no_grad()
def copy_from_torch(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy the weights of PyTorch's module into ours; see torch_pairs for the modules. ValueError if shapes differ."""
    for mine, other in list(torch_pairs(ours, theirs)):
        copy_exactly(other, mine)


@torch.no_grad()
def copy_to_torch(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our weights into PyTorch's module; see torch_pairs for the modules. ValueError if shapes differ."""
    for mine, other in list(torch_pairs(ours, theirs)):
        copy_exactly(mine, other)


def copy_exactly(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:  # copy_ would broadcast
        raise ValueError(f"weights of shape {tuple(source.shape)} do not fit {tuple(target.shape)}; build equal sizes")
    target.copy_(source)


# The same model in topic 01's NumPy engine


class NumpyTransformer:
    """A CausalTransformer (pre-norm, learned positions, no dropout) on NumPy alone, with the gradients of topic 01.

    Starts from the torch model's weights, in float64, and keeps their names: weights["token_emb.weight"] and so on.
    Shapes: token_ids (batch, seq) to logits (batch, seq, vocab). Raises ValueError for other kinds of model.
    """

    def __init__(self, model: CausalTransformer) -> None:
        self.config = model.config
        if (self.config.norm_order, self.config.positions, self.config.dropout) != ("pre", "learned", 0):
            raise ValueError("the NumPy transformer needs norm_order 'pre', positions 'learned' and dropout 0")
        self.weights = {
            name: prerequisites.Tensor(parameter.detach().cpu().numpy().astype(np.float64), requires_grad=True)
            for name, parameter in model.named_parameters()
        }

    def __call__(self, token_ids: np.ndarray) -> prerequisites.Tensor:
        activation = getattr(prerequisites, self.config.activation)
        x = prerequisites.embedding(self.weights["token_emb.weight"], token_ids)  # (batch, seq, d_model)
        x = x + self.weights["pos_emb.weight"][: token_ids.shape[1]]  # (batch, seq, d_model)
        for layer in range(self.config.n_layers):
            block = f"encoder.blocks.{layer}"
            x = x + self.attend(self.norm(x, f"{block}.attn_norm"), f"{block}.self_attn")  # (batch, seq, d_model)
            hidden = activation(self.linear(self.norm(x, f"{block}.ffn_norm"), f"{block}.ffn.up_proj"))
            x = x + self.linear(hidden, f"{block}.ffn.down_proj")  # (batch, seq, d_model)
        logits = self.norm(x, "encoder.final_norm") @ self.weights["lm_head.weight"].T  # (batch, seq, vocab)
        return logits

    def attend(self, x: prerequisites.Tensor, name: str) -> prerequisites.Tensor:
        batch, seq, d_model = x.shape
        split = (batch, seq, self.config.n_heads, d_model // self.config.n_heads)
        q, k, v = (self.linear(x, f"{name}.{part}_proj").reshape(split).transpose(0, 2, 1, 3) for part in "qkv")
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(split[-1])  # (batch, heads, query, key)
        future = np.triu(np.ones((seq, seq), dtype=bool), 1)
        weights = scores.masked_fill(future, -np.inf).softmax(axis=-1)  # (batch, heads, query, key)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, seq, d_model)  # (batch, seq, d_model)
        return self.linear(mixed, f"{name}.out_proj")

    def linear(self, x: prerequisites.Tensor, name: str) -> prerequisites.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: prerequisites.Tensor, name: str) -> prerequisites.Tensor:
        return prerequisites.layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


# What a model costs: formulas, and counts of a real one to check them


@dataclass(frozen=True)
class TransformerSize:
    """The numbers that decide what a transformer costs; a language model is an encoder under a causal mask."""

    d_model: int
    n_heads: int
    d_ff: int
    n_encoder_layers: int = 0
    n_decoder_layers: int = 0
    vocab_size: int = 0
    n_vocab_matrices: int = 1  # vocab x d_model matrices: 1 if the embeddings and the output share theirs
    n_positions: int = 0  # learned positions

    @classmethod
    def of(cls, model: CausalTransformer) -> "TransformerSize":
        config = model.config
        n_positions = config.max_seq_len if config.positions == "learned" else 0
        return cls(config.d_model, config.n_heads, config.d_ff, config.n_layers, 0, model.vocab_size, 2, n_positions)


# Vaswani et al. 2017, table 3, and section 5.1: "about 37000 tokens", one matrix for both embeddings and the output
VASWANI_BASE = TransformerSize(512, 8, 2048, 6, 6, 37_000)
VASWANI_BIG = TransformerSize(1024, 16, 4096, 6, 6, 37_000)
GPT2_SMALL = TransformerSize(768, 12, 3072, 12, 0, 50_257, 1, 1024)  # Radford et al. 2019; the released files


def transformer_parameters(size: TransformerSize) -> dict[str, int]:
    """Parameters of our stacks, term by term; 12 d^2 for each encoder layer with d_ff = 4 d, where biases are little.

    Vaswani et al. 2017 print 65 M for base and 213 M for big. With their one shared matrix of about 37,000 tokens the
    formula gives 63.1 M and 214.2 M: 2.9 % below and 0.6 % above, which no single vocabulary size explains.
    """
    d, d_ff, n_encoder, n_decoder = size.d_model, size.d_ff, size.n_encoder_layers, size.n_decoder_layers
    attention = 4 * (d * d + d)
    n_norms = 2 * n_encoder + 3 * n_decoder + (n_encoder > 0) + (n_decoder > 0)  # each stack has a last one
    terms = {
        "embeddings": size.n_vocab_matrices * size.vocab_size * d + size.n_positions * d,
        "self-attention": (n_encoder + n_decoder) * attention,
        "cross-attention": n_decoder * attention,
        "feed-forward": (n_encoder + n_decoder) * (2 * d * d_ff + d_ff + d),
        "norms": n_norms * 2 * d,
    }
    return {**terms, "total": sum(terms.values())}


def transformer_flops(size: TransformerSize, batch_size: int, src_len: int, tgt_len: int = 0) -> dict[str, int]:
    """Multiplications and additions in the matrix products of one forward pass, term by term; backward takes twice.

    An (m, k) times (k, n) product counts 2 m k n. A masked score is computed and counted. Softmax, norms and
    activations are left out: they cost time by their memory traffic, not by arithmetic.
    """
    d, src, tgt = size.d_model, batch_size * src_len, batch_size * tgt_len
    encoder, decoder = size.n_encoder_layers, size.n_decoder_layers
    terms = {
        "projections": encoder * 8 * src * d * d + decoder * (8 * tgt * d * d + 4 * tgt * d * d + 4 * src * d * d),
        "scores and mixing": encoder * 4 * src * src_len * d + decoder * 4 * tgt * (tgt_len + src_len) * d,
        "feed-forward": 4 * (encoder * src + decoder * tgt) * d * size.d_ff,
        "output": 2 * (tgt if decoder else src) * d * size.vocab_size,
    }
    return {**terms, "total": sum(terms.values())}


def activation_bytes(size: TransformerSize, batch_size: int, seq_len: int, bytes_per_number: int = 4) -> dict[str, int]:
    """Bytes that our pre-norm encoder keeps for the backward pass (ReLU, no dropout, with a mask), term by term.

    The stream itself is not among them: the gradient of a sum needs neither summand. Masks, one byte for each bool, are
    left out. Norms keep their numbers in 4 bytes at least, whatever bytes_per_number is.
    """
    tokens, n_layers = batch_size * seq_len, size.n_encoder_layers
    numbers = {
        "norms": (2 * n_layers + 1) * tokens * (2 * size.d_model + 1),  # input centred, normalised; and 1 / root
        "inputs of the sub-layers": 2 * n_layers * tokens * size.d_model,
        "queries, keys, values, mixed": 4 * n_layers * tokens * size.d_model,
        "attention weights": 2 * n_layers * tokens * size.n_heads * seq_len,  # before and after empty rows become 0
        "feed-forward": n_layers * tokens * size.d_ff,
    }
    terms = {name: number * bytes_per_number for name, number in numbers.items()}
    terms["norms"] = numbers["norms"] * max(4, bytes_per_number)
    return {**terms, "total": sum(terms.values())}


def kv_cache_bytes(
    size: TransformerSize, batch_size: int, seq_len: int, memory_len: int = 0, bytes_per_number: int = 4
) -> int:
    """Bytes of the caches after seq_len positions: a key and a value of width d_model for each position and layer.

    A model with a decoder caches there, its own positions and those of the memory; a language model in its encoder.
    """
    positions = (
        size.n_decoder_layers * (seq_len + memory_len) if size.n_decoder_layers else size.n_encoder_layers * seq_len
    )
    return 2 * batch_size * positions * size.d_model * bytes_per_number


def count_parameters(module: nn.Module, depth: int = 3) -> dict[str, int]:
    """Parameters of a real module, those of equal layers added up, by the first `depth` parts of their owner's name.

    A shared parameter counts once, under its first name. The last entry is the total.
    """
    counts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        owner = ".".join([part for part in name.split(".")[:-1] if not part.isdigit()][:depth])
        counts[owner or name] = counts.get(owner or name, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}


class MatmulCounter(TorchDispatchMode):
    """Within the block, add up the FLOPs of every matrix product that PyTorch runs, forward or backward, also on meta.

    with MatmulCounter() as counter: model(token_ids)  # then read counter.flops
    Sees what reaches PyTorch's kernels as mm, addmm, bmm or baddbmm; a fused attention kernel is none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        left = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if left is not None:
            self.flops += 2 * output.numel() * args[left].shape[-1]
        return output


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that one forward pass of `module` really keeps for its backward pass, without parameters and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *inputs) if tensor is not None}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # views of one tensor share it
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    del output
    return sum(size for address, size in kept.items() if address not in known)


# Training, on a language whose entropy is known


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """A straight rise over warmup_steps, then half a cosine down to min_lr_ratio of the peak; steps count from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


def fit(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig) -> list[float]:
    """Train with AdamW; weight decay on the matrices alone. Returns the loss of every step, in nats per token.

    Raises ValueError at the first loss that is not finite.
    """
    device = next(model.parameters()).device
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    bar = progress(range(config.max_steps), "train")
    for step in bar:
        inputs, targets = (tensor.to(device) for tensor in next(batches))
        logits = model(inputs)  # (batch, seq, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate or lengthen the warm-up")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@functools.cache
def tiny_world() -> tuple[World, Vocabulary]:
    """The language of all runs of this topic, and the vocabulary of its words."""
    world = World()
    return world, Vocabulary(world.vocabulary())


def tiny_world_batches(config: TrainConfig, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of fresh documents of the train split, without end."""
    world, vocabulary = tiny_world()
    documents = world.stream(seed, split="train")
    return document_batches(documents, vocabulary, config.batch_size, config.seq_len, seed)


@functools.cache
def held_out_documents(n_documents: int) -> list[Document]:
    return tiny_world()[0].documents(n_documents, HELD_OUT_SEED, split="validation")


def entropy_floor(n_documents: int) -> float:
    """The held-out documents' own surprisal, in nats per token: no honest model has less loss on average."""
    held_out = held_out_documents(n_documents)
    return sum(sum(document.surprisal) for document in held_out) / sum(len(document.tokens) for document in held_out)


@dataclass(frozen=True)
class TrainedModel:
    """What one run gives: the model, the loss of every step, and how far it stays above the entropy floor."""

    model: CausalTransformer
    losses: list[float]  # nats per token
    loss: float  # nats per token on held-out documents
    gap: float  # the same, above the documents' own surprisal
    standard_error: float  # of the gap


def train_language_model(
    model_config: ModelConfig,
    config: TrainConfig,
    run: RunConfig,
    prepare: Callable[[CausalTransformer], None] = start_as_identity,
) -> TrainedModel:
    """Train on fresh documents of TinyWorld's train split; `prepare` edits the model before the first step."""
    seed_everything(run.seed)
    vocabulary, held_out = tiny_world()[1], held_out_documents(config.n_documents)
    longest = max(len(document.tokens) for document in held_out)
    check_length(max(longest, config.seq_len), 0, model_config.max_seq_len)  # now, not after the training
    model = CausalTransformer(model_config, len(vocabulary))
    prepare(model)
    losses = fit(model.to(pick_device(run.device)), tiny_world_batches(config, run.seed), config)
    nats = document_losses(model, held_out, vocabulary)
    gap, standard_error = gap_to_floor(nats, held_out)
    return TrainedModel(model, losses, sum(nats) / sum(len(doc.tokens) for doc in held_out), gap, standard_error)


# Figures


def smooth(values: list[float], width: int) -> np.ndarray:
    """Moving average over `width` values, none before the first full window; NaN counts as absent."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values, dtype=float), min(width, len(values)))
    return np.nanmean(windows, axis=1)


def plot_training(losses: list[float], floor: float, uniform: float) -> Figure:
    """The loss of every step on a logarithmic axis, between that of uniform guessing and the entropy floor."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    averaged = smooth(losses, 25)
    axis.plot(losses, lw=0.5, alpha=0.35, color="C0")
    axis.plot(range(len(losses) - len(averaged), len(losses)), averaged, color="C0", label="training loss")
    axis.axhline(uniform, color="grey", ls=":", label=f"uniform guessing, {uniform:.2f}")
    axis.axhline(floor, color="black", ls="--", label=f"entropy floor, {floor:.3f}")
    ticks = [tick for tick in (0.5, 0.6, 0.7, 0.8, 1, 1.5, 2, 3, 4, 6) if 0.9 * floor < tick < 1.1 * uniform]
    axis.set(xlabel="step", ylabel="nats per token", yscale="log", ylim=(0.9 * floor, 1.1 * uniform))
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


# The command line


def demo(broken: BreakConfig, model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> None:
    """Train a small language model on TinyWorld and measure how far above the entropy of the language it stays."""
    sizes = (model_config.d_model, model_config.n_heads, model_config.d_ff, model_config.n_layers)
    size = TransformerSize(*sizes, vocab_size=len(tiny_world()[1]))
    flops = 3 * transformer_flops(size, config.batch_size, config.seq_len)["total"]
    seconds = 10 + config.max_steps * flops / SMALL_MODEL_RATE
    if broken.break_ != "none":
        from architecture_experiments import BREAKS  # here, because it imports this module

        measure, n_trainings = BREAKS[broken.break_]
        announce(f"showing the failure {broken.break_!r}", 5 + n_trainings * seconds)
        for what, sound, wrong in measure(model_config, config, run):
            print(f"{what}: {sound:.4f} as it should be, {wrong:.4f} with --break {broken.break_}")
        return
    announce(f"training a causal transformer of {model_config.n_layers} blocks for {config.max_steps} steps", seconds)
    trained = train_language_model(model_config, config, run)
    model, uniform, floor = trained.model, math.log(trained.model.vocab_size), entropy_floor(config.n_documents)
    for owner, number in count_parameters(model).items():
        print(f"{number:9,} parameters in {owner}")
    save_figure(plot_training(trained.losses, floor, uniform), run.out / "loss.svg")
    prompt = torch.full((1, 1), BOS_ID, device=model.lm_head.weight.device)
    generator = torch.Generator(prompt.device).manual_seed(run.seed)
    sample = model.eval().generate(prompt, model_config.max_seq_len - 1, generator=generator)[0].tolist()
    print(f"a document that it writes: {join(tiny_world()[1].decode(token for token in sample if token != EOS_ID))}")
    print(
        f"held-out loss {trained.loss:.4f} nats per token: {trained.gap:.4f} ± {trained.standard_error:.4f} above the "
        f"entropy floor {floor:.4f} (uniform guessing: {uniform:.3f})"
    )


def bench(config: BenchConfig, model_config: ModelConfig, run: RunConfig) -> None:
    """Time a training step of our encoder stack beside nn.TransformerEncoder, with the same weights and mask."""
    announce(f"timing {config.n_repeats} training steps of each stack", 10)
    seed_everything(run.seed)
    device, shape = pick_device(run.device), model_config
    sizes = (shape.d_model, shape.n_heads, shape.d_ff, shape.dropout)
    ours = Encoder(shape.n_layers, *sizes, shape.norm_order, shape.activation).to(device)
    layer = nn.TransformerEncoderLayer(
        *sizes, shape.activation, batch_first=True, norm_first=shape.norm_order == "pre", device=device
    )
    last_norm = nn.LayerNorm(shape.d_model, device=device)
    theirs = nn.TransformerEncoder(layer, shape.n_layers, last_norm, enable_nested_tensor=False)
    copy_to_torch(ours, theirs)
    x = torch.randn(config.batch_size, config.seq_len, shape.d_model, device=device, requires_grad=True)
    mask = causal_mask(config.seq_len, device=device)

    def step(module: nn.Module, seen: Tensor) -> None:
        module.zero_grad(set_to_none=True)
        module(x, seen).square().mean().backward()

    works = {"ours": lambda: step(ours, mask), "theirs": lambda: step(theirs, ~mask)}  # True means "blocked" there
    seconds = time_in_turns(works, config.n_repeats)
    size = TransformerSize(shape.d_model, shape.n_heads, shape.d_ff, shape.n_layers)
    flops = 3 * transformer_flops(size, config.batch_size, config.seq_len)["total"]  # forward, and twice as much back
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:7} {1e3 * median:8.1f} ms per training step, {flops / median / 1e9:6.1f} GFLOP/s in products")
    print(speed_line("training step", "nn.TransformerEncoder's", seconds["ours"], seconds["theirs"]))
    print(describe_machine())


def main(argv: list[str] | None = None) -> None:
    from architecture_experiments import FiguresConfig, figures  # here, because it imports this module

    verbs = {
        "demo": (demo, BreakConfig, ModelConfig, TrainConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
        "bench": (bench, BenchConfig, ModelConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
