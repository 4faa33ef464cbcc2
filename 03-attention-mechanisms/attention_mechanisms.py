"""Topic 03 - Attention Mechanisms: look back at everything read so far, and learn where to look.

python 03-attention-mechanisms/attention_mechanisms.py              # the demo: CPU, a minute, no network
python 03-attention-mechanisms/attention_mechanisms.py bench        # ours against PyTorch's: time and memory
python 03-attention-mechanisms/attention_mechanisms.py --help

Papers: Bahdanau, Cho, Bengio 2015 (arXiv 1409.0473), additive attention; Luong, Pham, Manning 2015 (arXiv 1508.04025),
dot, general, concat; Vaswani et al. 2017 (arXiv 1706.03762), scaled dot products and heads; Dao et al. 2022 (arXiv
2205.14135), exact attention tile by tile; Katharopoulos et al. 2020 (arXiv 2006.16236), linear attention.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def prefix_mask(n_query: int, n_prefix: int, n_key: int | None = None) -> Tensor:
    """The first `n_prefix` keys for every query, and the past; shape (query, key) (Raffel et al. 2020, section 3.2.1)."""
    distance = key_distance(n_query, n_key)  # (query, key)
    n_key = distance.shape[1]
    if not 0 <= n_prefix <= n_key:
        raise ValueError(f"n_prefix={n_prefix} must be in 0..{n_key}, the number of keys")
    return (distance >= 0) | (torch.arange(n_key) < n_prefix)  # (query, key)


def window_mask(n_query: int, window_size: int, n_key: int | None = None) -> Tensor:
    """The query's own position and the `window_size - 1` before it; shape (query, key).

    `mask | mask.T` is the window to both sides (Beltagy et al. 2020, section 3.1) of n_query = n_key positions.
    """
    return dilated_mask(n_query, window_size, 1, n_key)


def dilated_mask(n_query: int, window_size: int, dilation: int, n_key: int | None = None) -> Tensor:
    """The `window_size` keys at distances 0, dilation, 2 * dilation, ...; shape (query, key) (Beltagy et al. 2020)."""
    if window_size < 1 or dilation < 1:
        raise ValueError(f"window_size and dilation must be >= 1, got {window_size} and {dilation}")
    distance = key_distance(n_query, n_key)  # (query, key)
    return (distance >= 0) & (distance < window_size * dilation) & (distance % dilation == 0)


def document_mask(document_ids: Tensor) -> Tensor:
    """Every key of the query's own document, for rows that pack several: (batch, seq) -> (batch, 1, seq, seq).

    Both directions: `document_mask(ids) & causal_mask(seq)` is the mask of a packed language model. Where each document
    starts with <bos>, its ids are `(token_ids == bos_id).cumsum(1)`.
    """
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids must have shape (batch, seq), got {tuple(document_ids.shape)}")
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]  # (batch, 1, seq, seq)


def random_mask(n_query: int, n_random: int, generator: torch.Generator, n_key: int | None = None) -> Tensor:
    """`n_random` different keys, drawn uniformly for each query; shape (query, key) (Zaheer et al. 2020, section 2)."""
    n_key = n_query if n_key is None else n_key
    if not 1 <= n_random <= n_key:
        raise ValueError(f"n_random={n_random} must be in 1..{n_key}, the number of keys")
    chosen = torch.rand(n_query, n_key, generator=generator).topk(n_random, dim=1).indices  # (query, random)
    return torch.zeros(n_query, n_key, dtype=torch.bool).scatter(1, chosen, True)  # (query, key)


def check_mask(mask: Tensor, scores_shape: torch.Size) -> None:
    """Raise ValueError unless `mask` is bool and broadcasts to the shape of the scores."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = may attend), got {mask.dtype}; pass numbers to add as bias=")
    check_broadcast("mask", mask, scores_shape)


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

    A score of -inf also blocks its key. The plain softmax of a row of -inf is 0 / 0 = NaN, and would stay NaN in the
    gradient even if the output were overwritten; so the row is replaced before the softmax, and erased after it.
    """
    if mask is not None:
        check_mask(mask, scores.shape)
        scores = scores.masked_fill(~mask, -math.inf)
    blocked = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blocked, 0.0).softmax(dim=-1).masked_fill(blocked, 0.0)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) over the keys that may be attended; scale is 1/sqrt(d_k) unless given."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"queries have width {q.shape[-1]}, keys {k.shape[-1]}; a dot product needs them equal")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (batch, heads, query, key)
    if bias is not None:
        check_broadcast("bias", bias, scores.shape)
        scores = scores + bias
    elif mask is None:
        return scores.softmax(dim=-1)
    return masked_softmax(scores, mask)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average the values with weights softmax(q k^T / sqrt(d_k) + bias) (Vaswani et al. 2017, equation 1).

    Shapes, for any leading axes, of which the comments show two:
        q (batch, heads, query, d_k), k (batch, heads, key, d_k), v (batch, heads, key, d_v)
        mask: bool, broadcastable to (batch, heads, query, key); True = may attend. bias: numbers, likewise.
        returns output (batch, heads, query, d_v), weights (batch, heads, query, key)
    A query that may attend nowhere gives 0, and 0 as gradient. NaN is not hidden: it reaches every row that it touches.
    Raises ValueError for shapes that do not fit and for a mask that is not bool.
    """
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"there are {k.shape[-2]} keys but {v.shape[-2]} values")
    weights = attention_weights(q, k, mask, bias)  # (batch, heads, query, key)
    output = weights @ v  # (batch, heads, query, d_v)
    return output, weights


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in `n_heads` subspaces at once (Vaswani et al. 2017, section 3.2.2).

    Shapes:
        x (batch, query, d_model), memory (batch, key, d_model) -> output (batch, query, d_model), weights (batch,
        heads, query, key); without memory x attends to itself. mask: bool, (query, key) or with four axes that
        broadcast to (batch, heads, query, key); True = may attend.
    The weights are returned as they were used: in training with dropout, as nn.MultiheadAttention does.
    Raises ValueError if n_heads does not divide d_model, and for a mask of three axes, which could mean one for each
    sequence or one for each head.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, use_bias: bool = True) -> None:
        super().__init__()
        if n_heads < 1 or d_model < 1 or d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}")
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_model // n_heads
        self.scale = 1 / math.sqrt(self.d_head)  # keeps the variance of a score at 1 for unit-variance q and k
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
        """(batch, seq, d_model) -> (batch, heads, seq, d_head): the length is that of x, never the query's."""
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)  # (batch, heads, seq, d_head)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, each (batch, heads, key, d_head): what a cache keeps."""
        return self.split_heads(self.k_proj(memory)), self.split_heads(self.v_proj(memory))

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of x (batch, query, d_model) over keys and values that are already split into heads."""
        if mask is not None and mask.dim() == 3 and len(mask) != 1:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected (query, key) or (batch, heads, query, key); "
                "use mask[:, None] for one mask per sequence, mask[None] for one per head"
            )
        q = self.split_heads(self.q_proj(x))  # (batch, heads, query, d_head)
        weights = self.dropout(attention_weights(q, k, mask, bias, self.scale))  # (batch, heads, query, key)
        mixed = weights @ v  # (batch, heads, query, d_head)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k, v = self.keys_values(x if memory is None else memory)  # (batch, heads, key, d_head)
        return self.attend(x, k, v, mask)
