"""Topic 03 - Attention mechanisms: instead of one fixed summary, look back at everything, and learn where to look.

python 03-attention-mechanisms/attention_mechanisms.py              # the demo: CPU, a minute, no network
python 03-attention-mechanisms/attention_mechanisms.py figures      # every experiment of the chapter
python 03-attention-mechanisms/attention_mechanisms.py --help

Papers: Bahdanau et al. 2015 (arXiv 1409.0473), additive attention; Luong et al. 2015 (arXiv 1508.04025), dot, general,
concat; Vaswani et al. 2017 (arXiv 1706.03762), scaled dot products and heads; Dao et al. 2022 (arXiv 2205.14135), exact
attention tile by tile; Katharopoulos et al. 2020 (arXiv 2006.16236), linear attention.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sequence_modeling import (
    BOS_ID,
    FIRST_TOKENS,
    IGNORE,
    PAD_ID,
    GRUCell,
    Seq2Seq,
    check_integers,
    check_sizes,
    check_token_ids,
    copy_batch,
    device_of,
    fit,
    real_positions,
    recall_batch,
)
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    pick_device,
    run_verbs,
    save_figure,
    seed_everything,
    speed_line,
    time_in_turns,
)

N_KINDS = 16  # different symbols of the memory tasks; guessing is right once in so many
HELD_OUT = 2**31  # added to the seed of held-out data; PyTorch's CPU generator reads the lowest 32 bits alone


@dataclass(frozen=True)
class AlignmentConfig:
    """Sequence-to-sequence tasks whose true alignment is known."""

    n_symbols: int = 16  # longest source, in tokens
    d_model: int = 64  # width of the models with attention; those without get at least as many parameters
    batch_size: int = 64  # sequences per step
    max_steps: int = 240  # training steps of each model
    learning_rate: float = 4e-3  # Adam's highest step size
    break_: Literal["none", "inverted-mask", "bool-fill"] = "none"  # break the padding mask on purpose

    def __post_init__(self) -> None:
        check_range(self, "n_symbols", least=2, most=2 * N_KINDS)
        check_range(self, "d_model", "batch_size", "max_steps", least=1)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class RecallConfig:
    """An attention-only model on associative recall."""

    n_pairs: int = 3  # key-value pairs of a sequence
    d_model: int = 48  # width of the residual stream
    n_heads: int = 2  # attention heads of each layer; must divide d_model
    n_layers: int = 2  # attention layers
    batch_size: int = 64  # sequences per step
    max_steps: int = 500  # training steps
    learning_rate: float = 5e-3  # Adam's highest step size
    break_: Literal["none", "inverted-mask", "bool-fill"] = "none"  # break the causal mask on purpose

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", least=1, most=N_KINDS)
        check_range(self, "d_model", "n_heads", "n_layers", "batch_size", "max_steps", least=1)
        check_range(self, "learning_rate", above=0)
        check_heads(self.d_model, self.n_heads)


@dataclass(frozen=True)
class CostConfig:
    """Shapes at which time and memory are measured."""

    shortest: int = 256  # first length; it doubles from here
    longest: int = 2048  # last length
    n_heads: int = 4  # heads
    d_head: int = 64  # width of a head
    tile_size: int = 128  # rows and columns of a tile
    n_repeats: int = 5  # timed runs; the fastest counts

    def __post_init__(self) -> None:
        check_range(self, "shortest", "n_heads", "d_head", "tile_size", "n_repeats", least=1)
        check_range(self, "longest", least=self.shortest)


def check_heads(d_model: int, n_heads: int) -> None:
    if n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; choose a divisor of d_model")


# Masks: bool, True = may attend


def key_distance(n_query: int, n_key: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """How many positions key j lies behind query i, when the last query stands at the last key; shape (query, key).

    0 is the query's own position, a negative number the future. Fewer queries than keys is what a cache of past keys
    gives: a single new query may see all of them. Raises ValueError for a negative length.
    """
    n_key = n_query if n_key is None else n_key
    if n_query < 0 or n_key < 0:
        raise ValueError(f"a mask needs lengths >= 0, got n_query={n_query}, n_key={n_key}")
    query = torch.arange(n_key - n_query, n_key, device=device)  # (query)
    key = torch.arange(n_key, device=device)  # (key)
    return query[:, None] - key  # (query, key)


def causal_mask(n_query: int, n_key: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """Every key up to the query's own position; shape (query, key). See `key_distance` for n_query != n_key."""
    return key_distance(n_query, n_key, device) >= 0


def padding_mask(token_ids: Tensor, pad_id: int = 0) -> Tensor:
    """Every key that is not padding: token_ids (batch, key) -> (batch, 1, 1, key), for all heads and queries."""
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids must have shape (batch, key), got {tuple(token_ids.shape)}")
    return (token_ids != pad_id)[:, None, None, :]  # (batch, 1, 1, key)


def prefix_mask(
    n_query: int, n_prefix: int, n_key: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The first `n_prefix` keys for every query, and the past; shape (query, key) (Raffel et al. 2020, section 3.2.1).

    Raises ValueError unless 0 <= n_prefix <= number of keys.
    """
    check_integers(n_prefix=n_prefix)
    distance = key_distance(n_query, n_key, device)  # (query, key)
    n_key = distance.shape[1]
    if not 0 <= n_prefix <= n_key:
        raise ValueError(f"n_prefix={n_prefix} must be in 0..{n_key}, the number of keys")
    return (distance >= 0) | (torch.arange(n_key, device=device) < n_prefix)  # (query, key)


def window_mask(
    n_query: int, window_size: int, n_key: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The query's own position and the `window_size - 1` before it; shape (query, key).

    For n_query = n_key, `mask | mask.T` is the window to both sides (Beltagy et al. 2020, section 3.1).
    """
    return dilated_mask(n_query, window_size, 1, n_key, device)


def dilated_mask(
    n_query: int,
    window_size: int,
    dilation: int,
    n_key: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The `window_size` keys at distances 0, dilation, 2 * dilation, ...; shape (query, key) (Beltagy et al. 2020)."""
    check_integers(window_size=window_size, dilation=dilation)
    for name, size in (("window_size", window_size), ("dilation", dilation)):
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}; a window of 1 is the query's own position")
    distance = key_distance(n_query, n_key, device)  # (query, key)
    return (distance >= 0) & (distance < window_size * dilation) & (distance % dilation == 0)


def document_mask(document_ids: Tensor) -> Tensor:
    """Every key of the query's own document, for rows that pack several: (batch, seq) -> (batch, 1, seq, seq).

    Past and future: `document_mask(ids) & causal_mask(seq)` is the mask of a packed language model. Where each document
    starts with <bos>, its ids are `(token_ids == bos_id).cumsum(1)`.
    """
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids must have shape (batch, seq), got {tuple(document_ids.shape)}")
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]  # (batch, 1, seq, seq)


def random_mask(n_query: int, n_random: int, generator: torch.Generator, n_key: int | None = None) -> Tensor:
    """`n_random` different keys, drawn uniformly for each query; shape (query, key) (Zaheer et al. 2020, section 2).

    Lies on the generator's device. Raises ValueError unless 1 <= n_random <= number of keys.
    """
    n_query, n_key = key_distance(n_query, n_key).shape
    if not 1 <= n_random <= n_key:
        raise ValueError(f"n_random={n_random} must be in 1..{n_key}, the number of keys")
    lots = torch.rand(n_query, n_key, generator=generator, device=generator.device)  # (query, key)
    chosen = lots.topk(n_random, dim=1).indices  # (query, random)
    return torch.zeros_like(lots, dtype=torch.bool).scatter(1, chosen, True)  # (query, key)


def check_mask(mask: Tensor, scores_shape: torch.Size) -> None:
    """Raise ValueError unless `mask` is bool and broadcasts to the shape of the scores; TypeError for no tensor."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of bool, got {type(mask).__name__}; use torch.tensor(mask)")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = may attend), got {mask.dtype}; pass numbers to add as bias")
    check_broadcast("mask", mask, scores_shape)


def check_bias(bias: Tensor, scores_shape: torch.Size) -> None:
    """Raise ValueError unless `bias` holds numbers, which True and False are not, and broadcasts to the scores.

    Raises TypeError for no tensor.
    """
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor of numbers, got {type(bias).__name__}; use torch.tensor(bias)")
    if bias.dtype == torch.bool:
        raise ValueError(
            "bias must be numbers to add to the scores, got torch.bool, which would add 1; pass it as mask"
        )
    check_broadcast("bias", bias, scores_shape)


def check_broadcast(name: str, tensor: Tensor, scores_shape: torch.Size) -> None:
    sizes = zip(reversed(tensor.shape), reversed(scores_shape), strict=False)
    if tensor.dim() > len(scores_shape) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected one that broadcasts to the scores (..., query, key) = "
            f"{tuple(scores_shape)}"
        )


# Scaled dot-product attention


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the keys that may be attended; a row with none is 0, and so is the gradient through it.

    The plain softmax of a row of -inf is 0 / 0 = NaN. Such a row gets scores of 0 for the softmax and is erased after
    it, so that no NaN arises on the way either, forward or backward, for a NaN finder to stumble over.
    """
    if mask is None:
        return scores.softmax(dim=-1)
    check_mask(mask, scores.shape)
    somewhere = mask.any(dim=-1, keepdim=True)
    blocked = torch.zeros_like(somewhere, dtype=scores.dtype).masked_fill(somewhere, -math.inf)
    return torch.where(mask, scores, blocked).softmax(dim=-1) * somewhere


def check_widths(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Raise ValueError unless queries, keys and values, each (..., position, width), can meet in one attention.

    Raises TypeError for integers, whose average would be cut to an integer.
    """
    given = [tensor for tensor in (q, k, v) if tensor is not None]
    if not all(tensor.is_floating_point() for tensor in given):
        raise TypeError(f"attention needs floating-point tensors, got {[x.dtype for x in given]}; use .float()")
    shapes = [tuple(tensor.shape) for tensor in given]
    if min(map(len, shapes)) < 2:
        raise ValueError(f"queries, keys and values need axes (..., position, width), got {shapes}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(
            f"queries have width {q.shape[-1]} but keys {k.shape[-1]}; a dot product needs them equal, and at least 1"
        )
    if v is not None and k.shape[-2] != v.shape[-2]:
        raise ValueError(f"there are {k.shape[-2]} keys but {v.shape[-2]} values; each key needs its value")
    if len({shape[:-2] for shape in shapes}) > 1:
        try:
            torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
        except RuntimeError:
            raise ValueError(f"batch and heads of queries, keys and values do not fit each other: {shapes}") from None


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) over the keys that may be attended; scale is 1/sqrt(d_k) unless given.

    A bias of -inf blocks too. Shapes and errors as in `scaled_dot_product_attention`.
    """
    check_widths(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (batch, heads, query, key)
    if mask is not None:
        check_mask(mask, scores.shape)
    if bias is not None:
        check_bias(bias, scores.shape)
        bias = bias.to(scores.dtype)
        allowed = bias != -math.inf
        scores = scores + bias.masked_fill(~allowed, 0.0)  # (batch, heads, query, key)
        mask = allowed if mask is None else mask & allowed
    return masked_softmax(scores, mask)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average the values with weights softmax(q k^T / sqrt(d_k) + bias) (Vaswani et al. 2017, equation 1).

    Shapes, for any leading axes, of which the comments show two:
        q (batch, heads, query, d_k), k (batch, heads, key, d_k), v (batch, heads, key, d_v)
        mask: bool, broadcastable to (batch, heads, query, key); True = may attend. bias: numbers, likewise.
        returns output (batch, heads, query, d_v), weights (batch, heads, query, key)
    A query that may attend nowhere gives 0, and passes no gradient. NaN is never hidden: one in a query spoils that
    query's row, one in a key the rows that may attend to it, one in a value every row (0 * NaN is NaN).
    Raises ValueError for shapes that do not fit, a mask that is not bool and a bias that is.
    """
    check_widths(q, k, v)
    weights = attention_weights(q, k, mask, bias)  # (batch, heads, query, key)
    output = weights @ v  # (batch, heads, query, d_v)
    return output, weights


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in `n_heads` subspaces at once (Vaswani et al. 2017, section 3.2.2).

    Shapes:
        x (batch, query, d_model), memory (batch, key, d_model) -> output (batch, query, d_model) and weights
        (batch, heads, query, key); without memory, x attends to itself
        mask: bool, (query, key), or four axes that broadcast to (batch, heads, query, key); True = may attend
    The weights are returned as used: in training with dropout applied, as by nn.MultiheadAttention.
    Raises ValueError if n_heads does not divide d_model, for inputs of other shapes, and for a mask of three axes,
    whose first could mean the sequence or the head.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, use_bias: bool = True) -> None:
        super().__init__()
        check_heads(d_model, n_heads)
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_model // n_heads
        self.scale = 1 / math.sqrt(self.d_head)  # unit-variance q and k then give scores of variance 1
        self.q_proj = nn.Linear(d_model, d_model, bias=use_bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=use_bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=use_bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if use_bias:
                nn.init.zeros_(layer.bias)

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, seq, d_model) -> (batch, heads, seq, d_head): seq is x's own length, not always the query's."""
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)  # (batch, heads, seq, d_head)

    def check_input(self, x: Tensor, mask: Tensor | None = None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"expected a sequence (batch, seq, d_model={self.d_model}), got {tuple(x.shape)}")
        if isinstance(mask, Tensor) and mask.dim() == 3 and len(mask) != 1:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected (query, key) or (batch, heads, query, key); "
                "use mask[:, None] for one per sequence, mask[None] for one per head"
            )

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, each (batch, heads, key, d_head): what a cache keeps."""
        self.check_input(memory)
        return self.split_heads(self.k_proj(memory)), self.split_heads(self.v_proj(memory))

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of x (batch, query, d_model) over keys and values that are already split into heads."""
        self.check_input(x, mask)
        q = self.split_heads(self.q_proj(x))  # (batch, heads, query, d_head)
        weights = self.dropout(attention_weights(q, k, mask, bias, self.scale))  # (batch, heads, query, key)
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # (batch, query, d_model)
        return self.out_proj(mixed), weights

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k, v = self.keys_values(x if memory is None else memory)  # (batch, heads, key, d_head)
        return self.attend(x, k, v, mask)

    def load_torch(self, theirs: nn.MultiheadAttention) -> "MultiHeadAttention":
        """Copy the weights of PyTorch's layer of the same size; its three input projections are one matrix.

        Raises ValueError for a layer that is not of the same kind, see `check_same_attention`.
        """
        check_same_attention(self, theirs)
        weights = theirs.in_proj_weight.chunk(3)
        biases = (None,) * 3 if theirs.in_proj_bias is None else theirs.in_proj_bias.chunk(3)
        for ours, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), weights, biases, strict=True):
            ours.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        self.out_proj.load_state_dict(theirs.out_proj.state_dict())
        return self

    def to_torch(self) -> nn.MultiheadAttention:
        """Return PyTorch's layer (batch first) with a copy of these weights."""
        weight, bias = self.q_proj.weight, self.q_proj.bias
        theirs = nn.MultiheadAttention(
            self.d_model,
            self.n_heads,
            self.dropout.p,
            bias is not None,
            batch_first=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        inputs = (self.q_proj, self.k_proj, self.v_proj)
        state = {
            "in_proj_weight": torch.cat([layer.weight for layer in inputs]),
            "out_proj.weight": self.out_proj.weight,
        }
        if bias is not None:
            state |= {"in_proj_bias": torch.cat([layer.bias for layer in inputs]), "out_proj.bias": self.out_proj.bias}
        theirs.load_state_dict(state)
        return theirs.train(self.training)


def check_same_attention(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    """Raise ValueError unless the weights of one layer mean the same in the other: equal matrices cut into another
    number of heads load without complaint and compute something else. TypeError for another kind of layer."""
    if not isinstance(theirs, nn.MultiheadAttention):
        raise TypeError(f"expected an nn.MultiheadAttention, got {type(theirs).__name__}")
    pairs = {
        "d_model": (ours.d_model, theirs.embed_dim),
        "widths of keys and values": ((ours.d_model, ours.d_model), (theirs.kdim, theirs.vdim)),
        "n_heads": (ours.n_heads, theirs.num_heads),
        "use_bias": (ours.q_proj.bias is not None, theirs.in_proj_bias is not None),
        "added keys and values": (False, theirs.bias_k is not None or theirs.add_zero_attn),
    }
    for name, (mine, other) in pairs.items():
        if mine != other:
            raise ValueError(f"{name} is {mine} in ours and {other} in PyTorch's layer; build both alike")


# How alike are a query and a memory? The scores that came before


class ScoredAttention(nn.Module):
    """Average a memory with weights softmax(scores); the classes below say how a score is computed.

    Shapes:
        query (batch, query, d_query), memory (batch, key, d_memory), mask broadcastable to (batch, query, key)
        -> context (batch, query, d_memory), weights (batch, query, key)
    Raises ValueError for a query and a memory that are not sequences of one batch, and for another width.
    """

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if query.dim() != 3 or memory.dim() != 3 or len(query) != len(memory):
            raise ValueError(
                "expected query (batch, query, d_query) and memory (batch, key, d_memory) of one batch, got "
                f"{tuple(query.shape)} and {tuple(memory.shape)}"
            )
        weights = masked_softmax(self.scores(query, memory), mask)  # (batch, query, key)
        context = weights @ memory  # (batch, query, d_memory)
        return context, weights


def check_width(name: str, x: Tensor, layer: nn.Linear) -> None:
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"{name} must have width {layer.in_features}, got {tuple(x.shape)}")


class AdditiveAttention(ScoredAttention):
    """v^T tanh(W q + U h) (Bahdanau et al. 2015, section 3.1 and appendix A.1.2)."""

    def __init__(self, d_query: int, d_memory: int, d_attention: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(d_query, d_attention, bias=False)
        self.memory_proj = nn.Linear(d_memory, d_attention, bias=False)
        self.score_proj = nn.Linear(d_attention, 1, bias=False)

    def scores(self, query: Tensor, memory: Tensor) -> Tensor:
        check_width("query", query, self.query_proj)
        check_width("memory", memory, self.memory_proj)
        hidden = (
            self.query_proj(query)[:, :, None] + self.memory_proj(memory)[:, None]
        )  # (batch, query, key, attention)
        return self.score_proj(hidden.tanh()).squeeze(-1)  # (batch, query, key)


class DotAttention(ScoredAttention):
    """q^T h, without a parameter, so both need the same width (Luong et al. 2015, section 3.1)."""

    def scores(self, query: Tensor, memory: Tensor) -> Tensor:
        check_widths(query, memory)
        return query @ memory.transpose(1, 2)  # (batch, query, key)


class GeneralAttention(ScoredAttention):
    """q^T W h (Luong et al. 2015, section 3.1)."""

    def __init__(self, d_query: int, d_memory: int) -> None:
        super().__init__()
        self.memory_proj = nn.Linear(d_memory, d_query, bias=False)

    def scores(self, query: Tensor, memory: Tensor) -> Tensor:
        check_width("memory", memory, self.memory_proj)
        projected = self.memory_proj(memory)  # (batch, key, d_query)
        check_widths(query, projected)
        return query @ projected.transpose(1, 2)  # (batch, query, key)


class ConcatAttention(ScoredAttention):
    """v^T tanh(W [q; h]) (Luong et al. 2015, section 3.1): every query is paired with every key, in that order."""

    def __init__(self, d_query: int, d_memory: int, d_attention: int) -> None:
        super().__init__()
        self.pair_proj = nn.Linear(d_query + d_memory, d_attention, bias=False)
        self.score_proj = nn.Linear(d_attention, 1, bias=False)

    def scores(self, query: Tensor, memory: Tensor) -> Tensor:
        n_query, n_key = query.shape[1], memory.shape[1]
        left = query[:, :, None].expand(-1, -1, n_key, -1)  # (batch, query, key, d_query)
        right = memory[:, None].expand(-1, n_query, -1, -1)  # (batch, query, key, d_memory)
        pairs = torch.cat([left, right], dim=-1)  # (batch, query, key, pair)
        check_width("query and memory together", pairs, self.pair_proj)
        hidden = self.pair_proj(pairs).tanh()  # (batch, query, key, attention)
        return self.score_proj(hidden).squeeze(-1)  # (batch, query, key)


# Exact attention in O(n) memory: one tile of the score matrix at a time


def tiles(length: int, tile_size: int) -> list[slice]:
    return [slice(start, min(start + tile_size, length)) for start in range(0, length, tile_size)]


def tile_scores(
    q: Tensor, k: Tensor, rows: slice, columns: slice, mask: Tensor | None, offset: int | None
) -> Tensor | None:
    """Scores of a tile, -inf where blocked; None if all of it lies in the future.

    q is already cut to `rows` and scaled. `offset` is the number of keys before the first query; None is not causal.
    """
    if offset is not None and columns.start > rows.stop - 1 + offset:
        return None
    scores = q @ k[..., columns, :].to(q.dtype).transpose(-2, -1)  # (batch, heads, rows, columns)
    if mask is not None:
        scores = torch.where(mask[..., rows, columns], scores, -math.inf)
    if offset is not None and columns.stop - 1 > rows.start + offset:  # the diagonal crosses the tile
        query = torch.arange(rows.start + offset, rows.stop + offset, device=q.device)  # (rows)
        key = torch.arange(columns.start, columns.stop, device=q.device)  # (columns)
        scores = torch.where(key <= query[:, None], scores, -math.inf)
    return scores


class TiledAttention(torch.autograd.Function):
    """Attention that never holds the score matrix (Dao et al. 2022, algorithms 1 and 4).

    Forward, for each tile of queries: a running maximum, a running sum of exp(score - maximum) and a running weighted
    sum of values; a new maximum rescales both sums (Milakov and Gimelshein 2018, arXiv 1805.02867). Backward: the
    weights of a tile are computed again from its scores and the saved log-sum of each row.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, offset: int | None, tile_size: int
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)  # half-precision inputs, single-precision sums
        scale, output = 1 / math.sqrt(q.shape[-1]), q.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = q.new_empty(*q.shape[:-1], 1, dtype=wide)  # (batch, heads, query, 1)
        for rows in tiles(q.shape[-2], tile_size):
            q_tile = q[..., rows, :].to(wide) * scale  # (batch, heads, *, d_k)
            top = q_tile.new_full((*q_tile.shape[:-1], 1), -math.inf)  # (batch, heads, *, 1)
            total, mixed = torch.zeros_like(top), q_tile.new_zeros(*q_tile.shape[:-1], v.shape[-1])
            for columns in tiles(k.shape[-2], tile_size):
                scores = tile_scores(q_tile, k, rows, columns, mask, offset)
                if scores is None:
                    break
                new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))  # (batch, heads, *, 1)
                reference = new_top.masked_fill(new_top == -math.inf, 0.0)  # nothing allowed so far: -inf - -inf is NaN
                weights, shrink = scores.sub_(reference).exp_(), (top - reference).exp()  # in place: no new tile
                total = total * shrink + weights.sum(dim=-1, keepdim=True)  # (batch, heads, *, 1)
                mixed = mixed * shrink + weights @ v[..., columns, :].to(wide)  # (batch, heads, *, d_v)
                top = new_top  # (batch, heads, *, 1)
            nowhere = total == 0
            total = total.masked_fill(nowhere, 1.0)
            output[..., rows, :] = mixed / total
            log_sums[..., rows, :] = top.masked_fill(nowhere, 0.0) + total.log()
        ctx.save_for_backward(q, k, v, mask, output, log_sums)
        ctx.offset, ctx.tile_size, ctx.scale, ctx.wide = offset, tile_size, scale, wide
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, output, log_sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(tensor, dtype=ctx.wide) for tensor in (q, k, v))
        for rows in tiles(q.shape[-2], ctx.tile_size):
            q_tile = q[..., rows, :].to(ctx.wide) * ctx.scale  # (batch, heads, *, d_k)
            grad = grad_output[..., rows, :].to(ctx.wide)  # (batch, heads, *, d_v)
            # The softmax Jacobian needs sum_j P_ij dP_ij of a whole row: it equals dO_i . O_i, which needs no row.
            shared = (grad * output[..., rows, :]).sum(dim=-1, keepdim=True)  # (batch, heads, *, 1)
            for columns in tiles(k.shape[-2], ctx.tile_size):
                scores = tile_scores(q_tile, k, rows, columns, mask, ctx.offset)
                if scores is None:
                    break
                weights = scores.sub_(log_sums[..., rows, :]).exp_()  # (batch, heads, *, *)
                grad_weights = grad @ v[..., columns, :].to(ctx.wide).transpose(-2, -1)  # (batch, heads, *, *)
                grad_scores = grad_weights.sub_(shared).mul_(weights)  # (batch, heads, *, *)
                grad_v[..., columns, :] += weights.transpose(-2, -1) @ grad
                grad_k[..., columns, :] += grad_scores.transpose(-2, -1) @ q_tile
                grad_q[..., rows, :] += grad_scores @ k[..., columns, :].to(ctx.wide) * ctx.scale
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, tile_size: int = 128
) -> Tensor:
    """The output of `scaled_dot_product_attention`, to rounding, in memory proportional to the length.

    Shapes as there. causal aligns the last query with the last key, as `causal_mask`; it skips the tiles of the future
    and keeps no mask, while a mask is read tile by tile but is itself (query, key) unless it broadcasts.
    No second derivatives. Raises ValueError for tile_size < 1 and for what `scaled_dot_product_attention` refuses.
    """
    check_integers(tile_size=tile_size)
    if tile_size < 1:
        raise ValueError(f"tile_size must be >= 1, got {tile_size}")
    check_widths(q, k, v)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    if mask is not None:
        scores_shape = torch.Size((*lead, q.shape[-2], k.shape[-2]))
        check_mask(mask, scores_shape)
        mask = mask.expand(scores_shape)  # a view: nothing is copied
    q, k, v = (tensor.expand(*lead, *tensor.shape[-2:]) for tensor in (q, k, v))
    return TiledAttention.apply(q, k, v, mask, k.shape[-2] - q.shape[-2] if causal else None, tile_size)


# Linear attention: another kernel, without a softmax


def positive_features(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020, equation 7), as exp(x) where x <= 0: elu would round e^x - 1 + 1 to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def linear_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention with weights phi(q) . phi(k), normalised, in time linear in the length (Katharopoulos et al. 2020).

    Shapes: q (batch, heads, query, d_k), k (batch, heads, key, d_k), v (batch, heads, key, d_v), or other leading axes
    -> (batch, heads, query, d_v). Since the kernel is a product, keys and values are summed before a query asks: once
    for all queries, or as running sums if causal, which needs as many queries as keys. The running sums of all
    positions are kept: key * d_k * d_v numbers, in float32 at least. Raises ValueError for shapes that do not fit.
    """
    check_widths(q, k, v)
    if causal and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"causal linear attention needs as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}")
    wide = torch.promote_types(q.dtype, torch.float32)  # products of small features would vanish in half precision
    dtype, (q, k), v = q.dtype, (positive_features(tensor.to(wide)) for tensor in (q, k)), v.to(wide)
    if causal:
        memory = (k[..., :, None] * v[..., None, :]).cumsum(dim=-3)  # (batch, heads, key, d_k, d_v)
        mixed = (q[..., None, :] @ memory).squeeze(-2)  # (batch, heads, query, d_v)
        total = (q * k.cumsum(dim=-2)).sum(dim=-1, keepdim=True)  # (batch, heads, query, 1)
    else:
        mixed = q @ (k.transpose(-2, -1) @ v)  # (batch, heads, query, d_v)
        total = q @ k.sum(dim=-2)[..., None]  # (batch, heads, query, 1)
    output = mixed / total.clamp(min=torch.finfo(wide).tiny)  # (batch, heads, query, d_v)
    return output.to(dtype)  # (batch, heads, query, d_v)


# Models


class DecoderState(NamedTuple):
    """What a decoder with attention carries from one call to the next."""

    hidden: Tensor  # (batch, d_model)
    memory: Tensor  # (batch, src, d_model)
    mask: Tensor  # (batch, 1, src)
    weights: Tensor | None = None  # (batch, tgt, src) of the last call


class AttentionSeq2Seq(Seq2Seq):
    """Topic 02's encoder-decoder, with a decoder that looks back at every encoder output, not the last state alone.

    `encode` returns the memory and a DecoderState; forward (teacher forcing) and generate (greedy) are inherited.
    """

    def source_mask(self, src_ids: Tensor, src_lengths: Tensor | list[int]) -> Tensor:
        return real_positions(src_lengths, src_ids).transpose(1, 2)  # (batch, 1, src)

    def encode(self, src_ids: Tensor, src_lengths: Tensor | list[int]) -> tuple[Tensor, DecoderState]:
        memory, hidden = super().encode(src_ids, src_lengths)
        return memory, DecoderState(hidden, memory, self.source_mask(src_ids, src_lengths))

    def align(self, src_ids: Tensor, src_lengths: Tensor | list[int], tgt_ids: Tensor) -> Tensor:
        """Where the decoder looks before each prediction: weights (batch, tgt, src)."""
        _, state = self.decode(tgt_ids, self.encode(src_ids, src_lengths)[1])
        return state.weights  # (batch, tgt, src)


class BahdanauSeq2Seq(AttentionSeq2Seq):
    """The decoder's previous state asks; the context enters its next step and its output (Bahdanau et al. 2015).

    Deviations: topic 02's encoder reads in one direction only, and the output is linear in [state; token; context]
    where the paper has a maxout layer.
    """

    def __init__(self, src_vocab_size: int, tgt_vocab_size: int, d_model: int, pad_id: int = PAD_ID) -> None:
        super().__init__(src_vocab_size, tgt_vocab_size, d_model, pad_id)
        self.attention = AdditiveAttention(d_model, d_model, d_model)
        self.decoder = GRUCell(2 * d_model, d_model)
        self.lm_head = nn.Linear(3 * d_model, tgt_vocab_size)

    def decode(self, tgt_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        check_token_ids(tgt_ids, self.tgt_vocab_size)
        hidden, outputs, looks = state.hidden, [], []
        if tgt_ids.dim() != 2 or len(tgt_ids) != len(hidden) or tgt_ids.shape[1] == 0:
            raise ValueError(f"tgt_ids must have shape (batch={len(hidden)}, tgt >= 1), got {tuple(tgt_ids.shape)}")
        for token in self.tgt_emb(tgt_ids).unbind(1):
            context, weights = self.attention(hidden[:, None], state.memory, state.mask)
            seen = torch.cat([token, context[:, 0]], dim=-1)  # (batch, seen)
            hidden = self.decoder(seen, hidden)  # (batch, d_model)
            outputs.append(torch.cat([hidden, seen], dim=-1))
            looks.append(weights)
        return torch.stack(outputs, dim=1), state._replace(hidden=hidden, weights=torch.cat(looks, dim=1))


class LuongSeq2Seq(AttentionSeq2Seq):
    """The decoder's current state asks, so all steps ask at once; h' = tanh(W [context; h]) (Luong et al. 2015).

    Score "general". Deviation: h' is not fed to the next step (the paper's input feeding, section 3.3).
    """

    def __init__(self, src_vocab_size: int, tgt_vocab_size: int, d_model: int, pad_id: int = PAD_ID) -> None:
        super().__init__(src_vocab_size, tgt_vocab_size, d_model, pad_id)
        self.attention = GeneralAttention(d_model, d_model)
        self.context_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def decode(self, tgt_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        hidden, last = super().decode(tgt_ids, state.hidden)
        context, weights = self.attention(hidden, state.memory, state.mask)
        outputs = self.context_proj(torch.cat([context, hidden], dim=-1)).tanh()  # (batch, tgt, d_model)
        return outputs, state._replace(hidden=last, weights=weights)


class AttentionOnlyModel(nn.Module):
    """A causal language model of multi-head attention and residual sums alone (Elhage et al. 2021).

    Shapes: token_ids (batch, seq) -> logits (batch, seq, vocab). Raises ValueError for ids or lengths out of range.
    """

    def __init__(self, vocab_size: int, max_seq_len: int, d_model: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, max_seq_len=max_seq_len, n_layers=n_layers)
        self.token_emb, self.pos_emb = nn.Embedding(vocab_size, d_model), nn.Embedding(max_seq_len, d_model)
        self.layers = nn.ModuleList(MultiHeadAttention(d_model, n_heads) for _ in range(n_layers))
        self.lm_head = nn.Linear(d_model, vocab_size)

    def attention_mask(self, seq: int, device: torch.device) -> Tensor:
        return causal_mask(seq, device=device)  # (query, key)

    def look(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the weights of all layers, (layers, batch, heads, seq, seq)."""
        check_token_ids(token_ids, self.token_emb.num_embeddings)
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids must have shape (batch, seq), got {tuple(token_ids.shape)}")
        seq, limit = token_ids.shape[1], self.pos_emb.num_embeddings
        if seq > limit:
            raise ValueError(f"sequence length {seq} exceeds max_seq_len {limit}")
        mask, looks = self.attention_mask(seq, token_ids.device), []
        x = self.token_emb(token_ids) + self.pos_emb.weight[:seq]  # (batch, seq, d_model)
        for layer in self.layers:
            mixed, weights = layer(x, mask=mask)
            x = x + mixed  # (batch, seq, d_model)
            looks.append(weights)
        return self.lm_head(x), torch.stack(looks)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.look(token_ids)[0]  # (batch, seq, vocab)


# Memory tasks with a known alignment


TASKS = ("copy", "recall")
VOCAB_SIZE = len(FIRST_TOKENS) + 2 * N_KINDS


def alignment_batch(task: str, batch_size: int, n_symbols: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Topic 02's memory tasks as source and target: (src_ids, src_lengths, tgt_ids, targets, links).

    copy: the target repeats the source, of n_symbols // 2 to n_symbols tokens. recall: the source shows key-value pairs
    (n_symbols // 2 of them), the target asks for each key's value. links, bool (batch, tgt, src), is the alignment that
    solves the task: which source token each counted target repeats. Raises ValueError for another task.
    """
    if task == "copy":
        _, targets = copy_batch(batch_size, n_symbols, generator, N_KINDS)
        symbols = targets[:, n_symbols:]  # (batch, src)
        src_lengths = torch.randint(max(1, n_symbols // 2), n_symbols + 1, (batch_size,), generator=generator)
        real = real_positions(src_lengths, symbols)[:, :, 0]  # (batch, src)
        src_ids, targets = symbols.masked_fill(~real, PAD_ID), symbols.masked_fill(~real, IGNORE)  # (batch, src)
        tgt_ids = src_ids.roll(1, dims=1)  # (batch, tgt)
        tgt_ids[:, 0] = BOS_ID
        links = torch.eye(n_symbols, dtype=torch.bool) & real[:, :, None]  # (batch, tgt, src)
    elif task == "recall":
        inputs, targets = recall_batch(batch_size, n_symbols // 2, generator, N_KINDS)
        n_shown = n_symbols // 2 * 2
        src_ids, tgt_ids, targets = inputs[:, :n_shown], inputs[:, n_shown + 1 :], targets[:, n_shown + 1 :]
        src_lengths = torch.full((batch_size,), n_shown)  # (batch)
        asked = src_ids[:, None, :] == tgt_ids[:, :, None]  # (batch, tgt, src)
        links = asked.roll(1, dims=2) & (targets != IGNORE)[:, :, None]  # (batch, tgt, src); the value follows its key
    else:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    return src_ids, src_lengths, tgt_ids, targets, links


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Fraction of the counted targets that are the most likely token."""
    counted = targets != IGNORE
    return (logits.argmax(dim=-1) == targets)[counted].float().mean().item()


def score_alignment(weights: Tensor, links: Tensor, threshold: float = 0.5) -> tuple[float, float]:
    """Precision and recall of the links with a weight above `threshold`, over the rows that have a true link.

    Shapes: weights and links (bool), both (batch, tgt, src). Precision is 0 where no weight exceeds the threshold.
    Raises ValueError for links of another shape or type.
    """
    if weights.shape != links.shape or links.dtype != torch.bool:
        raise ValueError(
            f"links must be bool and of the weights' shape {tuple(weights.shape)}, got {links.dtype} of shape "
            f"{tuple(links.shape)}"
        )
    found = (weights > threshold) & links.any(dim=-1, keepdim=True)  # (batch, tgt, src)
    right = (found & links).sum().item()
    return right / max(1, found.sum().item()), right / max(1, links.sum().item())


# Training, with and without attention


BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda mask: mask,
    "inverted-mask": torch.logical_not,  # built for a function whose True means "blocked"
    "bool-fill": lambda mask: mask.masked_fill(~mask, -math.inf),  # bool(-inf) is True: nothing is blocked
}


def broken(make_mask: Callable[..., Tensor], break_: str) -> Callable[..., Tensor]:
    """`make_mask` with one of BREAKS applied to what it returns."""
    return lambda *arguments: BREAKS[break_](make_mask(*arguments))


ATTENTION_FOR: dict[str, type[AttentionSeq2Seq]] = {"copy": BahdanauSeq2Seq, "recall": LuongSeq2Seq}


@dataclass(frozen=True)
class AlignmentResult:
    """One trained model on one task; precision, recall and weights are None for a model without attention."""

    model: str
    n_parameters: int
    losses: list[float]  # nats per counted target, of every step
    accuracy: float  # fraction of held-out targets
    precision: float | None = None
    recall: float | None = None
    weights: Tensor | None = None  # (batch, tgt, src) on the held-out batch


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def matched_width(model_cls: type[Seq2Seq], n_parameters: int) -> int:
    """The smallest d_model at which a model of this class has at least `n_parameters` parameters."""
    with torch.device("meta"):  # shapes alone: no memory, no random numbers
        widths = itertools.count(1)
        return next(d for d in widths if count_parameters(model_cls(VOCAB_SIZE, VOCAB_SIZE, d)) >= n_parameters)


def held_out(task: str, config: AlignmentConfig, seed: int) -> tuple[Tensor, ...]:
    """512 sequences that no training run with this seed draws."""
    return alignment_batch(task, 512, config.n_symbols, torch.Generator().manual_seed(seed + HELD_OUT))


def train_on_task(
    task: str, model_cls: type[Seq2Seq], d_model: int, config: AlignmentConfig, run: RunConfig
) -> AlignmentResult:
    """Train one model on the task's batches, the same for every model, and score it on held-out ones."""
    device, generator = pick_device(run.device), seed_everything(run.seed)
    src_ids, src_lengths, tgt_ids, targets, links = (part.to(device) for part in held_out(task, config, run.seed))
    model = model_cls(VOCAB_SIZE, VOCAB_SIZE, d_model).to(device)
    attentive = isinstance(model, AttentionSeq2Seq)
    if attentive:
        model.source_mask = broken(model.source_mask, config.break_)
    batches = (alignment_batch(task, config.batch_size, config.n_symbols, generator)[:4] for _ in itertools.count())
    losses = fit(model, batches, config.max_steps, config.learning_rate, f"{task}, {model_cls.__name__}")
    with torch.no_grad():
        outputs, state = model.decode(tgt_ids, model.encode(src_ids, src_lengths)[1])
        right = accuracy(model.lm_head(outputs), targets)
        weights = state.weights.cpu() if attentive else None
    precision, recall = score_alignment(weights, links.cpu()) if attentive else (None, None)
    return AlignmentResult(model_cls.__name__, count_parameters(model), losses, right, precision, recall, weights)


def compare_on_task(
    task: str, attention_cls: type[AttentionSeq2Seq], config: AlignmentConfig, run: RunConfig
) -> list[AlignmentResult]:
    """Topic 02's model and one with attention, with at least as many parameters in the first."""
    with torch.device("meta"):
        n_parameters = count_parameters(attention_cls(VOCAB_SIZE, VOCAB_SIZE, config.d_model))
    pair = ((Seq2Seq, matched_width(Seq2Seq, n_parameters)), (attention_cls, config.d_model))
    return [train_on_task(task, model_cls, d_model, config, run) for model_cls, d_model in pair]


def guessed_alignment(links: Tensor, src_lengths: Tensor) -> float:
    """Precision, and recall, of one source token drawn at random for each counted target; links (batch, tgt, src)."""
    return ((links.sum(dim=(1, 2)) / src_lengths).sum() / links.sum()).item()


def padding_share(weights: Tensor, src_lengths: Tensor) -> float:
    """The fraction of all weight (batch, tgt, src) that lies on padding, behind each source's own length."""
    padding = torch.arange(weights.shape[-1]) >= src_lengths[:, None]  # (batch, src)
    return ((weights * padding[:, None]).sum() / weights.sum()).item()


def recall_model(config: RecallConfig, run: RunConfig) -> tuple[AttentionOnlyModel, Iterator[tuple[Tensor, Tensor]]]:
    """A fresh attention-only model on its device, and endless batches of (inputs, targets)."""
    generator = seed_everything(run.seed)
    model = AttentionOnlyModel(VOCAB_SIZE, 4 * config.n_pairs, config.d_model, config.n_heads, config.n_layers)
    model.attention_mask = broken(model.attention_mask, config.break_)
    return model.to(pick_device(run.device)), (
        recall_batch(config.batch_size, config.n_pairs, generator, N_KINDS) for _ in itertools.count()
    )


def fresh_recall(config: RecallConfig, seed: int) -> tuple[Tensor, Tensor]:
    """512 sequences (inputs, targets) that no training run with this seed draws."""
    return recall_batch(512, config.n_pairs, torch.Generator().manual_seed(seed + HELD_OUT), N_KINDS)


@torch.no_grad()
def accuracy_without_future(model: AttentionOnlyModel, inputs: Tensor, targets: Tensor) -> float:
    """Accuracy when each counted position is predicted from the tokens up to it alone, as in generation.

    With a sound causal mask it equals `accuracy` of all positions at once. A model that has learned to look ahead does
    well there and fails here.
    """
    ends = (targets != IGNORE).any(dim=0).nonzero()[:, 0].tolist()
    logits = torch.stack([model(inputs[:, : end + 1])[:, -1] for end in ends], dim=1)  # (batch, questions, vocab)
    return accuracy(logits, targets[:, ends])


@contextmanager
def without_head(layer: MultiHeadAttention, head: int) -> Iterator[None]:
    """Within the block, the layer's output lacks what `head` contributes (Michel et al. 2019, arXiv 1905.10650).

    Raises ValueError for a head that the layer has not.
    """
    if not 0 <= head < layer.n_heads:
        raise ValueError(f"head={head} must be in 0..{layer.n_heads - 1}")

    def silence(_, inputs: tuple[Tensor]) -> Tensor:
        by_head = inputs[0].unflatten(-1, (layer.n_heads, layer.d_head)).clone()  # (batch, seq, heads, d_head)
        by_head[:, :, head] = 0
        return by_head.flatten(2)  # (batch, seq, d_model)

    hook = layer.out_proj.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def ablate_heads(model: AttentionOnlyModel, inputs: Tensor, targets: Tensor) -> list[list[float]]:
    """Accuracy with one head silenced at a time: one list for each layer, one number for each head."""
    table = []
    for layer in model.layers:
        table.append([])
        for head in range(layer.n_heads):
            with without_head(layer, head):
                table[-1].append(accuracy(model(inputs), targets))
    return table


class Work(NamedTuple):
    """What one forward pass of attention over all heads asks of a processor."""

    flops: int  # of the two matrix products, a multiplication and an addition each
    naive_bytes: int  # moved when scores and weights each travel to memory and back once
    fused_bytes: int  # moved when they never leave the chip: queries, keys and values read, the output written

    @property
    def naive_intensity(self) -> float:
        return self.flops / self.naive_bytes  # FLOPs per byte

    @property
    def fused_intensity(self) -> float:
        return self.flops / self.fused_bytes  # FLOPs per byte


def attention_work(n_query: int, n_key: int, n_heads: int, d_head: int, number_bytes: int = 2) -> Work:
    """FLOPs and least bytes of one sequence, without a mask; numbers of 2 bytes unless told (Dao et al. 2022).

    Raises ValueError for sizes below 1.
    """
    check_sizes(n_query=n_query, n_key=n_key, n_heads=n_heads, d_head=d_head, number_bytes=number_bytes)
    ends = number_bytes * n_heads * d_head * 2 * (n_query + n_key)
    return Work(
        flops=4 * n_heads * n_query * n_key * d_head,
        naive_bytes=ends + number_bytes * n_heads * 4 * n_query * n_key,
        fused_bytes=ends,
    )


# Figures


def plot_heads(
    weights: Tensor, tokens: list[str] | None = None, title: str = "", titles: list[str] | None = None
) -> Figure:
    """One panel, with its title, for each head of weights (heads, query, key); `tokens` label both axes."""
    if weights.dim() != 3:
        raise ValueError(f"weights must have shape (heads, query, key), got {tuple(weights.shape)}")
    n_heads, n_query, n_key = weights.shape
    side = max(2.3, 0.13 * n_key)  # inches: room for a label at every token
    figure, axes = plt.subplots(1, n_heads, figsize=(side * n_heads + 0.6, side + 0.9), squeeze=False, sharey=True)
    for head, axis in enumerate(axes[0]):
        image = axis.imshow(weights[head].detach().cpu().numpy(), vmin=0, vmax=1, cmap="viridis")
        axis.set(title=titles[head] if titles else f"head {head}", xlabel="key", ylabel="" if head else "query")
        if tokens is not None:
            axis.set_xticks(range(n_key), tokens, rotation=90, fontsize=8)
            axis.set_yticks(range(n_query), tokens, fontsize=8)
    figure.colorbar(image, ax=axes[0], label="weight")
    figure.suptitle(title)
    return figure


def plot_alignment(results: list[AlignmentResult], links: Tensor, title: str = "") -> Figure:
    """Left: the loss of every model; right: weights of the sequence with most links (batch, tgt, src), each circled.

    Only the targets that count are drawn.
    """
    index = links.sum(dim=(1, 2)).argmax()
    counted = links[index].any(dim=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for result in results:
        left.plot(result.losses, label=result.model)
        if result.weights is not None:
            image = right.imshow(result.weights[index, counted].numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    left.axhline(math.log(N_KINDS), color="black", linestyle=":", label="guessing")
    left.set(xlabel="training step", ylabel="loss (nats per symbol)", ylim=(0, None))
    left.legend(frameon=False)
    rows, columns = links[index, counted].nonzero(as_tuple=True)
    right.scatter(columns, rows, s=60, facecolors="none", edgecolors="#D55E00", linewidths=2)
    right.set(xlabel="source position", ylabel="target", title="attention weights; circles: true alignment")
    right.locator_params(integer=True)
    figure.colorbar(image, ax=right, label="weight")
    figure.suptitle(title)
    return figure


# The verbs


SECONDS_PER_STEP = 0.18  # of the demo's four models together, with the default sizes, on 2 cores
SECONDS_PER_READ = 0.007  # a training step of the attention-only model


def demo(config: AlignmentConfig, run: RunConfig) -> None:
    """Two memory tasks, from a fixed vector and with attention: accuracy, and the alignment beside the true one."""
    plan = f"train 4 models for {config.max_steps} steps on copy and recall of {config.n_symbols} tokens"
    announce(plan, config.max_steps * SECONDS_PER_STEP)
    lines = [
        f"{'task':7} {'model':15} {'parameters':>10} {'accuracy':>9} {'precision':>10} {'recall':>7} {'on padding':>11}"
    ]
    for task, attention_cls in ATTENTION_FOR.items():
        results = compare_on_task(task, attention_cls, config, run)
        _, src_lengths, _, _, links = held_out(task, config, run.seed)
        for result in results:
            scores = ""
            if result.weights is not None:
                on_padding = padding_share(result.weights, src_lengths)
                scores = f" {result.precision:10.2f} {result.recall:7.2f} {on_padding:11.1%}"
            lines.append(f"{task:7} {result.model:15} {result.n_parameters:10,} {result.accuracy:9.1%}{scores}")
        guess = guessed_alignment(links, src_lengths)
        lines.append(f"{task:7} {'chance':15} {'':10} {1 / N_KINDS:9.1%} {guess:10.2f} {guess:7.2f}")
        figure = plot_alignment(results, links, f"{task} of {config.n_symbols} tokens, seed {run.seed}")
        save_figure(figure, run.out / f"alignment_{task}.svg")
    print("\n".join(lines))


def heads(config: RecallConfig, run: RunConfig) -> None:
    """Train an attention-only model on recall, draw what each head looks at, and silence the heads one at a time."""
    plan = f"train {config.n_layers} layers of {config.n_heads} heads for {config.max_steps} steps"
    announce(plan, config.max_steps * SECONDS_PER_READ)
    model, inputs, targets = trained_on_recall(config, run)
    with torch.no_grad():
        logits, weights = model.look(inputs)
    alone = accuracy_without_future(model, inputs, targets)
    print(f"accuracy {accuracy(logits, targets):.1%} with all heads (chance {1 / N_KINDS:.1%})")
    print(f"accuracy {alone:.1%} when the tokens after each question are not there yet")
    for layer, row in enumerate(ablate_heads(model, inputs, targets)):
        print(
            f"layer {layer}, one silenced: " + "  ".join(f"head {head} {value:6.1%}" for head, value in enumerate(row))
        )
    for layer in range(config.n_layers):
        figure = plot_heads(weights[layer, 0], token_names(inputs[0]), f"layer {layer}")
        save_figure(figure, run.out / f"heads_layer_{layer}.svg")


def trained_on_recall(config: RecallConfig, run: RunConfig) -> tuple[AttentionOnlyModel, Tensor, Tensor]:
    """The trained model, and 512 fresh sequences with their targets."""
    model, batches = recall_model(config, run)
    fit(model, batches, config.max_steps, config.learning_rate, f"recall, seed {run.seed}, break {config.break_}")
    return model, *(part.to(device_of(model)) for part in fresh_recall(config, run.seed))


def token_names(token_ids: Tensor) -> list[str]:
    """Names for the ids of recall: keys k0, k1, ..., values v0, v1, ..."""
    names = [*FIRST_TOKENS, *(f"k{kind}" for kind in range(N_KINDS)), *(f"v{kind}" for kind in range(N_KINDS))]
    return [names[token_id] for token_id in token_ids.tolist()]


def bench(config: CostConfig, run: RunConfig) -> None:
    """Ours beside PyTorch's in one run: time as a ratio, and peak memory against length; forward and backward."""
    from attention_experiments import KINDS, growth, measure_cost, multi_head_works, peak_memory, time_costs

    announce(f"time attention at {config.shortest} to {config.longest} tokens", 15)
    print(f"{describe_machine()}; {config.n_heads} heads of {config.d_head}, tiles of {config.tile_size}, float32")
    seconds = time_costs(config, run)
    n_bytes = measure_cost(config, run, peak_memory)
    for (kind, n), times in seconds.items():
        spent = f"{1e3 * min(times):.2f} ms, {n_bytes[kind][n] / 2**20:.2f} MiB"
        if kind == "PyTorch":
            print(f"PyTorch's attention, {n} tokens: {spent}")
        else:
            print(f"{speed_line(f'{kind} attention, {n} tokens,', 'PyTorch', times, seconds['PyTorch', n])}; {spent}")
    if config.longest >= 4 * config.shortest:
        exponents = [f"{kind} length^{growth(n_bytes[kind]):.2f}" for kind in KINDS]
        print(f"peak memory grows as: {', '.join(exponents)} (beyond a fixed part)")
    seconds = time_in_turns(multi_head_works(config, run), config.n_repeats)
    what = "MultiHeadAttention with weights per head"
    print(speed_line(what, "nn.MultiheadAttention", seconds["ours"], seconds["theirs"]))


def main(argv: list[str] | None = None) -> None:
    from attention_experiments import FiguresConfig, figures  # here, because they import this module

    verbs = {
        "demo": (demo, AlignmentConfig, RunConfig),
        "heads": (heads, RecallConfig, RunConfig),
        "figures": (figures, FiguresConfig),
        "bench": (bench, CostConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
