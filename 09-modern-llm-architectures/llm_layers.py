"""Topic 09 - The layers of a modern language model: RMSNorm, rotary scaling, SwiGLU, grouped-query attention, caches.

Small classes; `modern_llm_architectures.py` puts them together. Zhang and Sennrich 2019 (RMSNorm, arXiv 1910.07467),
Su et al. 2021 (rotary, arXiv 2104.09864), Shazeer 2020 (SwiGLU, arXiv 2002.05202), Shazeer 2019 (multi-query, arXiv
1911.02150), Ainslie et al. 2023 (grouped-query, arXiv 2305.13245), Peng et al. 2023 (YaRN, arXiv 2309.00071), Dehghani
et al. 2023 (QK-norm, arXiv 2302.05442), Xiao et al. 2023 (attention sinks, arXiv 2309.17453).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import check_mask, key_distance, masked_softmax
from t5 import T5Norm
from workbench import check_name, check_range

# Normalisation and the feed-forward network


class RMSNorm(T5Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, equation 4): LayerNorm without mean and bias.

    T5's norm with float32 statistics whatever the input is, as in the code that trained the published models: the
    squares of half-precision activations overflow. Shapes: (..., d_model) to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.norm_eps)
        return self.weight * (wide * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): a feed-forward network whose hidden units are switched (Shazeer 2020, section 2).

    Three matrices instead of two: a d_ff of 8/3 d_model has the parameters of a plain network of 4 d_model.
    Shapes: (..., d_model) to the same.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# Rotary positions beyond the trained length


SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the angles of rotary positions are changed so that a model reads more than it was trained on."""

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0  # how many times longer than the trained length
    trained_seq_len: int = 0  # the length the model was trained on; yarn and llama3 need it
    beta_fast: float = 32.0  # yarn: features that turn more often than this within the trained length stay as they are
    beta_slow: float = 1.0  # yarn: features that turn less often than this are divided by the whole factor
    low_freq_factor: float = 1.0  # llama3: wavelengths beyond trained_seq_len / this are divided by the whole factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below trained_seq_len / this stay as they are
    attention_factor: float | None = None  # yarn: multiplies sines and cosines; None follows from the other fields
    mscale: float = 0.0  # yarn as DeepSeek uses it: strength of the attention factor; 0 is the paper's 1
    mscale_all_dim: float = 0.0  # likewise for the scores as a whole; 0 leaves them alone
    truncate: bool = True  # yarn: the ends of the ramp are rounded outwards to whole pairs

    def __post_init__(self) -> None:
        check_name("rotary scaling", self.kind, SCALINGS)
        check_range(self, "factor", "beta_fast", "beta_slow", above=0)
        if self.kind in ("yarn", "llama3"):
            check_range(self, "trained_seq_len", least=1)
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )

    @property
    def table_factor(self) -> float:
        """What sines and cosines are multiplied by: YaRN's temperature (Peng et al. 2023, section 3.4)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_temperature(self.factor, self.mscale) / yarn_temperature(self.factor, self.mscale_all_dim)
        return yarn_temperature(self.factor)

    @property
    def score_factor(self) -> float:
        """What DeepSeek multiplies 1/sqrt(d_head) by."""
        if self.kind == "none" or not self.mscale_all_dim:
            return 1.0
        return yarn_temperature(self.factor, self.mscale_all_dim) ** 2


def yarn_temperature(factor: float, strength: float = 1.0) -> float:
    """0.1 ln(factor) + 1, fitted by Peng et al. 2023, equation 22; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def rotary_frequencies(
    d_head: int, rope_theta: float, scaling: RopeScaling | None = None, max_seq_len: int = 0, seq_len: int = 0
) -> Tensor:
    """Radians by which each pair of features turns from one position to the next: (d_head / 2), float32.

    linear (Chen et al. 2023, arXiv 2306.15595) divides all by the factor; dynamic raises theta with the current
    `seq_len` once it exceeds `max_seq_len`; yarn and llama3 leave the fast features alone, divide the slow ones by the
    factor, and blend between. Float32, although topic 04 takes float64: the published models were trained with these
    roundings. Raises ValueError for an odd d_head.
    """
    if d_head < 2 or d_head % 2:
        raise ValueError(f"rotary positions turn pairs of features: d_head must be even and >= 2, got {d_head}")
    if not rope_theta > 0:
        raise ValueError(f"rope_theta, the base of the wavelengths, must be > 0, got {rope_theta}")
    scaling = scaling or RopeScaling()
    if scaling.kind == "dynamic":
        if max_seq_len < 1:
            raise ValueError(
                f"dynamic scaling compares with the trained length: max_seq_len={max_seq_len} must be >= 1"
            )
        stretched = scaling.factor * max(seq_len, max_seq_len) / max_seq_len - (scaling.factor - 1)
        rope_theta = rope_theta * stretched ** (d_head / max(1, d_head - 2))
    exponents = torch.arange(0, d_head, 2, dtype=torch.float32, device="cpu") / d_head  # (half)
    frequencies = 1.0 / rope_theta**exponents  # (half)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = 1 - yarn_ramp(d_head, rope_theta, scaling)  # (half)
        slow = 1.0 / (scaling.factor * rope_theta**exponents)  # (half)
        return slow * (1 - kept) + frequencies * kept
    if scaling.kind == "llama3":
        turns = scaling.trained_seq_len / (2 * math.pi / frequencies)  # (half), within the trained length
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies  # (half)
        wavelengths = 2 * math.pi / frequencies
        longest_kept = scaling.trained_seq_len / scaling.high_freq_factor
        shortest_slowed = scaling.trained_seq_len / scaling.low_freq_factor
        blended = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, blended)
        return torch.where(wavelengths < longest_kept, frequencies, blended)
    return frequencies


def yarn_ramp(d_head: int, rope_theta: float, scaling: RopeScaling) -> Tensor:
    """How far each pair of features is slowed, 0 to 1: (d_head / 2) (Peng et al. 2023, section 3.2).

    A straight line in the index between the two features that turn beta_fast and beta_slow times within the trained
    length; both ends are rounded outwards to whole indices, unless `truncate` is False (gpt-oss).
    """
    if rope_theta <= 1:
        raise ValueError(f"yarn counts turns by the logarithm of rope_theta, which must be > 1, got {rope_theta}")

    def index(turns: float) -> float:
        return d_head * math.log(scaling.trained_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d_head - 1)
    width = last - first if last != first else 0.001
    return ((torch.arange(d_head // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)


class RotaryTable:
    """Cosines and sines of every position, made once for each data type and device.

    `table(positions)`: positions (batch or 1, seq) to two tensors (batch or 1, 1, seq, d_head / 2).
    """

    def __init__(self, d_head: int, rope_theta: float, max_seq_len: int, scaling: RopeScaling | None = None) -> None:
        self.d_head, self.rope_theta, self.max_seq_len = d_head, rope_theta, max_seq_len
        self.scaling = scaling or RopeScaling()
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        rotary_frequencies(d_head, rope_theta, self.scaling, max_seq_len)  # refuses bad sizes when the model is built

    def rows(self, last: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tables for positions 0 to last - 1: two of (*, d_head / 2)."""
        grows = self.scaling.kind == "dynamic" and last > self.max_seq_len
        key = (like.dtype, like.device, last if grows else 0)
        if key not in self.tables or len(self.tables[key][0]) < last:
            size = last if grows else max(2 * last, min(256, self.max_seq_len))
            if grows:  # each length has its own table: keep one
                self.tables = {kept: table for kept, table in self.tables.items() if not kept[2]}
            with torch.inference_mode(False):  # a table made in inference mode could not be trained with later
                frequencies = rotary_frequencies(self.d_head, self.rope_theta, self.scaling, self.max_seq_len, last)
                angles = torch.arange(size, dtype=torch.float32, device="cpu")[:, None] * frequencies  # (*, half)
                factor = self.scaling.table_factor
                pair = (angles.cos() * factor, angles.sin() * factor)
                self.tables[key] = tuple(table.to(like.dtype).to(like.device) for table in pair)
        return self.tables[key]

    def span(self, start: int, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positions start to start + seq_len - 1 of every row: two of (1, 1, seq, half)."""
        cos, sin = self.rows(start + seq_len, like)
        chosen = slice(start, start + seq_len)
        return cos[chosen][None, None], sin[chosen][None, None]

    def at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (batch, seq), each row its own, from 0: two of (batch, 1, seq, half)."""
        if positions.numel() and int(positions.min()) < 0:
            raise ValueError(f"positions count from 0, got {int(positions.min())}")
        cos, sin = self.rows(int(positions.max()) + 1 if positions.numel() else 1, like)
        return cos[positions][:, None], sin[positions][:, None]


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (batch or 1, 1, seq, d_head / 2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate features (i, i + d_head / 2), the layout of Llama's files in the Hugging Face format.

    Topic 04's rotate_halves with the cosines given. Shapes: x (batch, heads, seq, d_head) to the same.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # (batch, heads, seq, half)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_neighbours(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate features (2i, 2i + 1), as DeepSeek lays them out, and return them in the order of halves.

    Queries and keys are reordered alike, so their dot products are those of topic 04's rotate_pairs.
    """
    return rotate(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), rotation)


# Masks and caches


def attention_mask(
    n_query: int, n_key: int, key_is_real: Tensor | None, window_size: int = 0, n_sinks: int = 0
) -> Tensor | None:
    """The mask of a decoder, True = may attend, or None where the plain causal mask says it all.

    Causal; the last `window_size` keys if that is above 0, and always the first `n_sinks` (Xiao et al. 2023); not the
    padding: key_is_real (batch, key). Shapes: (query, key), or (batch, 1, query, key) with padding.
    """
    windowed = 0 < window_size < n_key
    if key_is_real is None and not windowed and (n_query == n_key or n_query == 1):
        return None
    device = None if key_is_real is None else key_is_real.device
    distance = key_distance(n_query, n_key, device)  # (query, key)
    mask = distance >= 0  # (query, key)
    if windowed:
        mask &= (distance < window_size) | (torch.arange(n_key, device=device) < n_sinks)
    if key_is_real is None:
        return mask
    if key_is_real.shape[1] > n_key:  # the cache has dropped what lies between the sinks and the window
        recent = key_is_real[:, key_is_real.shape[1] - (n_key - n_sinks) :]
        key_is_real = torch.cat([key_is_real[:, :n_sinks], recent], dim=1)
    return mask & key_is_real[:, None, None, :]  # (batch, 1, query, key)


class KVCache:
    """Keys and values of one layer in buffers that double when they are full, so that a step copies one position.

    `len(cache)` counts the positions so far, those that a window has dropped included. With a window, `append` returns
    all keys that a query of this call may need, and keeps the first `n_sinks` and the last window_size - 1.

    Shapes: keys and values (batch, kv_heads, position, width), any two widths.
    """

    def __init__(self, window_size: int = 0, n_sinks: int = 0) -> None:
        if window_size < 0 or n_sinks < 0:
            raise ValueError(f"window_size and n_sinks must be >= 0, got {window_size} and {n_sinks}")
        self.window_size, self.n_sinks = window_size, n_sinks
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.n_kept, self.n_seen = 0, 0

    def __len__(self) -> int:
        return self.n_seen

    @property
    def n_bytes(self) -> int:
        """Bytes of the positions that are kept; the buffers may be up to twice as large."""
        if self.buffers is None:
            return 0
        return sum(buffer[:, :, : self.n_kept].numel() * buffer.element_size() for buffer in self.buffers)

    def n_keys(self, n_new: int) -> int:
        """How many keys the next `append` of n_new positions will return."""
        most = self.n_sinks + self.window_size - 1
        return (min(self.n_kept, most) if self.window_size else self.n_kept) + n_new

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions and return all that are kept, each (batch, kv_heads, *, width)."""
        self.drop_old()
        n_new, last = k.shape[2], self.n_kept + k.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < last:
            self.grow(k, v, max(2 * last, 32))
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[:, :, self.n_kept : last] = new
        self.n_kept, self.n_seen = last, self.n_seen + n_new
        return self.buffers[0][:, :, :last], self.buffers[1][:, :, :last]

    def grow(self, k: Tensor, v: Tensor, size: int) -> None:
        fresh = tuple(new.new_empty(*new.shape[:2], size, new.shape[3]) for new in (k, v))
        if self.buffers is not None:
            for old, buffer in zip(self.buffers, fresh, strict=True):
                buffer[:, :, : self.n_kept] = old[:, :, : self.n_kept]
        self.buffers = fresh

    def drop_old(self) -> None:
        """Forget what no later query may attend to: all but the sinks and the last window_size - 1 positions."""
        most = self.n_sinks + self.window_size - 1
        if not self.window_size or self.n_kept <= most:
            return
        for buffer in self.buffers:
            recent = buffer[:, :, self.n_kept - (self.window_size - 1) : self.n_kept].clone()
            buffer[:, :, self.n_sinks : most] = recent
        self.n_kept = most

    def select(self, rows: Tensor | list[int]) -> None:
        """Keep these rows of the batch, in this order, repeats allowed."""
        if self.buffers is not None:
            index = torch.as_tensor(rows, device=self.buffers[0].device)
            self.buffers = tuple(buffer.index_select(0, index) for buffer in self.buffers)

    def crop(self, n_positions: int) -> None:
        """Forget the positions from `n_positions` on, such as rejected drafts. Raises ValueError under a window."""
        if self.window_size and self.n_seen > self.n_kept:
            raise ValueError("a windowed cache that has dropped positions cannot be cropped; start a new one")
        if not 0 <= n_positions <= self.n_seen:
            raise ValueError(f"n_positions={n_positions} must be in 0..{self.n_seen}, the positions in the cache")
        self.n_kept = self.n_seen = n_positions


# Attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """F.scaled_dot_product_attention with grouped keys; None is the plain causal mask, the last query at the last key.

    Shapes: q (batch, heads, query, d_head), k and v (batch, kv_heads, key, width) to (batch, heads, query, width).
    """
    grouped = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:  # PyTorch's own causal mask puts the first query at the first key
        mask, causal = key_distance(q.shape[2], k.shape[2], q.device) >= 0, False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose n_heads queries share n_kv_heads keys and values (Ainslie et al. 2023).

    n_kv_heads = n_heads is multi-head attention, 1 is multi-query attention. d_head need not be d_model / n_heads.
    Shapes: x (batch, seq, d_model) to the same; rotation as from RotaryTable; mask as from `attention_mask`. With a
    cache, x holds only the new positions. Raises ValueError if n_kv_heads does not divide n_heads.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, use_bias: bool = False) -> None:
        super().__init__()
        if d_head < 1 or n_heads < 1:
            raise ValueError(f"n_heads and d_head must be >= 1, got {n_heads} and {d_head}")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads={n_heads} is not divisible by n_kv_heads={n_kv_heads}; choose a divisor")
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.scale = d_head**-0.5
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=use_bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=use_bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=use_bias)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias=use_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, seq, d_head), keys and values (batch, kv_heads, seq, d_head)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)  # a cache keeps rotated keys: each is turned once
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = self.mix(q, k, v, mask)  # (batch, heads, seq, d_head)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (batch, seq, d_model)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask, self.scale)


class NormedAttention(GroupedQueryAttention):
    """QK-norm: every query and key is normalised within its head before it is rotated (Qwen3; Dehghani et al. 2023).

    The scores are then bounded by the learned gains, however large the activations grow.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, use_bias: bool = False, norm_eps: float = 1e-6
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, use_bias)
        self.q_norm, self.k_norm = RMSNorm(d_head, norm_eps), RMSNorm(d_head, norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class SoftCappedAttention(GroupedQueryAttention):
    """Scores pass through cap * tanh(score / cap) before the softmax (Gemma 2, arXiv 2408.00118, section 2).

    The fused kernels have no such step, so the scores are written out, at a cost of O(query * key) memory.
    """

    soft_cap = 50.0

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (tensor.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for tensor in (k, v))
        scores = soft_cap((q * self.scale) @ k.transpose(-2, -1), self.soft_cap)  # (batch, heads, query, key)
        mask = key_distance(q.shape[2], k.shape[2], q.device) >= 0 if mask is None else mask
        check_mask(mask, scores.shape)
        return masked_softmax(scores, mask) @ v  # (batch, heads, query, d_head)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): about x near 0, never beyond +-cap."""
    return cap * torch.tanh(x / cap)
