"""Topic 08 - Efficient attention: four ways to pay less than one score for every pair of positions, and their price.

python 08-transformer-variants/transformer_variants.py figures efficient    # error and cost against length

Papers: Wang et al. 2020 (arXiv 2006.04768), Linformer; Choromanski et al. 2021 (arXiv 2009.14794), Performer; Beltagy,
Peters, Cohan 2020 (arXiv 2004.05150), Longformer; Zaheer et al. 2020 (arXiv 2007.14062), BigBird.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import MultiHeadAttention, check_widths, masked_softmax, scaled_dot_product_attention

# Linformer: mix the keys, and the values, down to a fixed number of them


def linformer_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mix: Tensor, value_mix: Tensor, real: Tensor | None = None
) -> Tensor:
    """Attention over `rank` mixtures of the keys: softmax(q (E k)^T / sqrt(d)) (F v) (Wang et al. 2020, equation 7).

    Shapes: q (batch, heads, query, d_head), k and v (batch, heads, key, d_head), key_mix and value_mix (rank, key);
    real (batch, key), bool, False for padding, which is then left out of the mixtures. Every mixture holds every key,
    the future too: no mask can hide a single one, so there is no causal form. Raises ValueError for shapes that do not
    fit.
    """
    check_widths(q, k, v)
    if key_mix.shape != value_mix.shape or key_mix.shape[-1] != k.shape[-2]:
        shapes = f"{tuple(key_mix.shape)} and {tuple(value_mix.shape)}"
        raise ValueError(f"the mixtures have shapes {shapes}, expected (rank, {k.shape[-2]}) for both")
    if real is not None:
        k, v = (tensor.masked_fill(~real[:, None, :, None], 0.0) for tensor in (k, v))  # (batch, heads, key, d_head)
    k, v = key_mix @ k, value_mix @ v  # (batch, heads, rank, d_head)
    return scaled_dot_product_attention(q, k, v)[0]


class LinformerAttention(MultiHeadAttention):
    """Self-attention with learned mixtures, shared by the heads, for at most max_seq_len positions.

    Shapes as MultiHeadAttention; the weights it returns are those of the mixtures, (batch, heads, query, rank). A mask
    may only mark padding, (batch, 1, 1, key). Raises ValueError for another mask and for a longer sequence.
    """

    def __init__(self, d_model: int, n_heads: int, max_seq_len: int, rank: int) -> None:
        super().__init__(d_model, n_heads)
        if not 1 <= rank <= max_seq_len:
            raise ValueError(f"rank={rank} must be in 1..{max_seq_len}, the number of positions")
        self.key_mix, self.value_mix = (nn.Parameter(torch.empty(rank, max_seq_len)) for _ in "kv")
        for mix in (self.key_mix, self.value_mix):
            nn.init.normal_(mix, std=1 / math.sqrt(rank))

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        n_key, limit = k.shape[2], self.key_mix.shape[1]
        if n_key > limit:
            raise ValueError(f"sequence length {n_key} exceeds max_seq_len {limit}; the mixtures are learned for it")
        if mask is not None and (mask.dim() != 4 or mask.shape[1:3] != (1, 1)):
            shape = tuple(mask.shape)
            raise ValueError(f"mixtures of keys can leave out padding, (batch, 1, 1, key), alone; got a mask {shape}")
        if mask is not None:
            k, v = (tensor.masked_fill(~mask.transpose(2, 3), 0.0) for tensor in (k, v))  # (batch, heads, key, d_head)
        return super().attend(x, self.key_mix[:, :n_key] @ k, self.value_mix[:, :n_key] @ v, None, bias)


# Performer: a random map whose dot products are, on average, the exponentials of the scores


def orthogonal_gaussian(n_features: int, d_head: int, generator: torch.Generator) -> Tensor:
    """Rows that are each standard normal, and orthogonal within blocks of d_head (Choromanski et al., section 2.4).

    Returns (features, d_head) in float64 on the CPU. Two corrections keep the estimate unbiased. A row of an orthogonal
    matrix has length 1, so each gets the length of a Gaussian vector. And Householder's QR picks signs of its own, so
    that Q points to one side; the signs of R's diagonal undo that (Mezzadri 2007, arXiv math-ph/0609050).
    """
    for name, value in (("n_features", n_features), ("d_head", d_head)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    n_blocks = -(-n_features // d_head)
    square = torch.randn(n_blocks, d_head, d_head, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(square)
    signs = triangular.diagonal(dim1=1, dim2=2).sign()  # (blocks, d_head)
    directions = (orthogonal * signs[:, None]).transpose(1, 2)  # (blocks, d_head, d_head)
    lengths = torch.randn(n_blocks, d_head, d_head, generator=generator, dtype=torch.float64).norm(dim=2)
    return (directions * lengths[:, :, None]).flatten(0, 1)[:n_features]  # (features, d_head)


def feature_exponents(x: Tensor, projection: Tensor) -> Tensor:
    """w.x - |x|^2 / 2 for every row w of the projection: (..., seq, d_head) to (..., seq, features)."""
    return x @ projection.T - x.square().sum(dim=-1, keepdim=True) / 2


def positive_random_features(x: Tensor, projection: Tensor) -> Tensor:
    """exp(w.x - |x|^2 / 2) / sqrt(m) for every row w of the projection (Choromanski et al. 2021, lemma 1).

    Shapes: x (..., seq, d_head), projection (features, d_head) to (..., seq, features). For x = q / d_head^(1/4) and
    y = k / d_head^(1/4) the mean of phi(x).phi(y) over projections is exp(q.k / sqrt(d_head)).
    """
    return feature_exponents(x, projection).exp() / math.sqrt(len(projection))


def trigonometric_features(x: Tensor, projection: Tensor) -> Tensor:
    """exp(|x|^2 / 2) [sin(w.x), cos(w.x)] / sqrt(m): unbiased too, but of either sign (the paper's equation 5).

    Shapes: x (..., seq, d_head) to (..., seq, 2 * features). Small kernel values drown in its noise: for contrast.
    """
    angles = x @ projection.T  # (batch, heads, seq, features)
    size = (x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(len(projection))
    return size * torch.cat([angles.sin(), angles.cos()], dim=-1)


def kernel_variance(x: Tensor, y: Tensor, n_features: int) -> Tensor:
    """Relative variance of phi(x).phi(y) with independent rows: (exp(|x + y|^2) - 1) / m, the chapter's derivation.

    Shapes: x and y (..., d_head) to (...).
    """
    return torch.expm1((x + y).square().sum(dim=-1)) / n_features


def performer_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention, estimated with random features in time linear in the length (Choromanski et al. 2021).

    Shapes: q (batch, heads, query, d_head), k and v (batch, heads, key, d_head), projection (features, d_head) to
    (batch, heads, query, d_head). The largest exponent is taken out, for each query and for all keys: normalised
    attention does not see it, and nothing overflows. causal: running sums instead of one sum, for as many queries as
    keys. Raises ValueError for shapes that do not fit.
    """
    check_widths(q, k, v)
    if projection.dim() != 2 or projection.shape[1] != q.shape[-1] or not len(projection):
        raise ValueError(
            f"the projection has shape {tuple(projection.shape)}, expected (features, {q.shape[-1]}), as wide as q"
        )
    if not k.shape[-2] and not (causal and q.shape[-2]):  # nobody to attend to: 0, as exact attention gives
        return (q @ k.transpose(-2, -1)) @ v  # (batch, heads, query, d_head)
    scale, projection = q.shape[-1] ** -0.25, projection.to(q)
    of_queries = feature_exponents(q * scale, projection)  # (batch, heads, query, features)
    of_queries = (of_queries - of_queries.amax(dim=-1, keepdim=True)).exp()  # (batch, heads, query, features)
    exponents = feature_exponents(k * scale, projection)  # (batch, heads, key, features)
    if causal:
        return causal_performer(of_queries, exponents, v)
    of_keys = (exponents - exponents.amax(dim=(-2, -1), keepdim=True)).exp()  # (batch, heads, key, features)
    mixed = of_queries @ (of_keys.transpose(-2, -1) @ v)  # (batch, heads, query, d_head)
    return mixed / positive(of_queries @ of_keys.sum(dim=-2)[..., None])


def causal_performer(of_queries: Tensor, exponents: Tensor, v: Tensor, chunk_size: int = 64) -> Tensor:
    """Chunk by chunk: sums over all earlier chunks, and a causal product of features within the chunk.

    The exponent taken out is the largest so far, and both sums shrink when it grows, as in topic 03's tiled attention:
    a later key cannot push the earlier ones below the smallest number.
    """
    if of_queries.shape[-2] != exponents.shape[-2]:
        lengths = f"{of_queries.shape[-2]} and {exponents.shape[-2]}"
        raise ValueError(f"causal attention needs as many queries as keys, got {lengths}")
    lead, n_features = exponents.shape[:-2], exponents.shape[-1]
    mixed_so_far, sum_so_far = v.new_zeros(*lead, n_features, v.shape[-1]), v.new_zeros(*lead, n_features, 1)
    top, outputs = v.new_full((*lead, 1, 1), -math.inf), []
    for start in range(0, exponents.shape[-2], chunk_size):
        rows = slice(start, start + chunk_size)
        new_top = torch.maximum(top, exponents[..., rows, :].amax(dim=(-2, -1), keepdim=True))
        shrink, top = (top - new_top).exp(), new_top
        q_rows, k_rows = of_queries[..., rows, :], (exponents[..., rows, :] - top).exp()  # (batch, heads, *, features)
        mixed_so_far, sum_so_far = mixed_so_far * shrink, sum_so_far * shrink
        within = (q_rows @ k_rows.transpose(-2, -1)).tril()  # (batch, heads, *, *)
        total = q_rows @ sum_so_far + within.sum(dim=-1, keepdim=True)  # (batch, heads, *, 1)
        outputs.append((q_rows @ mixed_so_far + within @ v[..., rows, :]) / positive(total))
        mixed_so_far = mixed_so_far + k_rows.transpose(-2, -1) @ v[..., rows, :]
        sum_so_far = sum_so_far + k_rows.sum(dim=-2)[..., None]
    return torch.cat(outputs, dim=-2)  # (batch, heads, query, d_head)


def positive(total: Tensor) -> Tensor:
    """Weights that all underflow sum to 0; the smallest normal number gives 0 in the end, not NaN."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


class PerformerAttention(MultiHeadAttention):
    """Self-attention with positive random features. `redraw` draws a new projection; a trained model keeps its own.

    Shapes as MultiHeadAttention, but there are no weights to return: the second output is an empty tensor. A mask may
    only be the square causal one. Raises ValueError for another mask.
    """

    def __init__(self, d_model: int, n_heads: int, n_features: int, seed: int = 0) -> None:
        super().__init__(d_model, n_heads)
        self.n_features = n_features
        self.register_buffer("projection", torch.empty(n_features, self.d_head))
        self.redraw(torch.Generator().manual_seed(seed))

    def redraw(self, generator: torch.Generator) -> None:
        self.projection.copy_(orthogonal_gaussian(self.n_features, self.d_head, generator))

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check_input(x)
        q = self.split_heads(self.q_proj(x))  # (batch, heads, query, d_head)
        if bias is not None or (mask is not None and not is_causal(mask)):
            raise ValueError("random features know no single score: only no mask or the square causal one will do")
        mixed = performer_attention(q, k, v, self.projection, causal=mask is not None)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), x.new_empty(0)


def is_causal(mask: Tensor) -> bool:
    return mask.dim() == 2 and mask.shape[0] == mask.shape[1] and bool((mask == torch.ones_like(mask).tril()).all())


# Longformer and BigBird: exact attention on a sparse pattern, block by block


@dataclass(frozen=True)
class SparsePattern:
    """Which keys each query may see, in a form whose cost is linear in the length.

    Positions are cut into blocks of block_size. Block b of queries reads the blocks of keys table[b] (-1: none). Among
    them `reach`, if any, keeps only keys at most so far away, on both sides. Global positions see everything, and
    everything sees them.
    """

    n_positions: int
    block_size: int
    table: Tensor  # (blocks, neighbours)
    reach: int | None = None
    global_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n_blocks = -(-self.n_positions // self.block_size)
        if self.table.dim() != 2 or len(self.table) != n_blocks or self.table.max() >= n_blocks:
            raise ValueError(f"the table needs a row for each of {n_blocks} blocks, naming blocks below {n_blocks}")
        rows = self.table.sort(dim=1).values  # (blocks, neighbours)
        if ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).any() or rows.min() < -1:
            raise ValueError("a row of the table must name different blocks, or -1 for none: each is read once")
        wrong = [position for position in self.global_ids if not 0 <= position < self.n_positions]
        if wrong or len(set(self.global_ids)) < len(self.global_ids):
            raise ValueError(f"global_ids={self.global_ids} must be different positions in 0..{self.n_positions - 1}")

    def mask(self) -> Tensor:
        """The same pattern as a dense mask (query, key), True = may attend: for small lengths and for tests."""
        block = torch.arange(self.n_positions) // self.block_size  # (query)
        mask = (self.table[block][:, :, None] == block).any(dim=1)  # (query, key)
        if self.reach is not None:
            position = torch.arange(self.n_positions)
            mask &= (position[:, None] - position).abs() <= self.reach
        chosen = list(self.global_ids)
        mask[chosen], mask[:, chosen] = True, True
        return mask

    def n_scores(self) -> int:
        """Scores that `sparse_attention` computes for one head."""
        n_global, padded = len(self.global_ids), len(self.table) * self.block_size
        return padded * (self.table.shape[1] * self.block_size + n_global) + n_global * self.n_positions


def longformer_pattern(n_positions: int, window_size: int, global_ids: tuple[int, ...] = ()) -> SparsePattern:
    """The own position and window_size - 1 on each side, and global positions (Beltagy et al. 2020, section 3.1).

    `window_mask(n, window_size)` of topic 03, mirrored. The paper's w, and Hugging Face's attention_window, is
    2 * (window_size - 1). Raises ValueError for a window below 1.
    """
    if window_size < 1 or n_positions < 1:
        raise ValueError(f"window_size and n_positions must be >= 1, got {window_size} and {n_positions}")
    block_size = min(max(window_size - 1, 1), n_positions)
    table = neighbours(-(-n_positions // block_size), 1)
    return SparsePattern(n_positions, block_size, table, window_size - 1, tuple(global_ids))


def bigbird_pattern(
    n_positions: int, block_size: int, n_global_blocks: int, n_random_blocks: int, generator: torch.Generator
) -> SparsePattern:
    """Three neighbouring blocks, the first n_global_blocks, and n_random_blocks more (Zaheer et al. 2020, section 2).

    The random blocks of a row are different, and none of those it reads anyway. Raises ValueError if there are too few
    blocks for that.
    """
    if block_size < 1 or n_positions < 1 or n_global_blocks < 0 or n_random_blocks < 0:
        raise ValueError("block_size and n_positions must be >= 1, the numbers of blocks >= 0")
    n_blocks = -(-n_positions // block_size)
    if n_global_blocks + n_random_blocks + 3 > n_blocks:
        wanted = f"{n_global_blocks} global, 3 near and {n_random_blocks} random blocks"
        raise ValueError(f"{n_positions} positions make {n_blocks} blocks, fewer than {wanted}; take a smaller block")
    table = neighbours(n_blocks, 1)  # (blocks, neighbours)
    lots = torch.rand(n_blocks, n_blocks, generator=generator)  # (blocks, blocks)
    near = (torch.arange(n_blocks)[:, None] - torch.arange(n_blocks)).abs() <= 1
    lots = lots.masked_fill(near, -1.0)
    lots[:, :n_global_blocks] = -1.0
    drawn = lots.topk(n_random_blocks, dim=1).indices  # (blocks, random)
    global_ids = tuple(range(n_global_blocks * block_size))
    return SparsePattern(n_positions, block_size, torch.cat([table, drawn], dim=1), None, global_ids)


def neighbours(n_blocks: int, n_side: int) -> Tensor:
    """The block itself and n_side on each side, -1 where there is none: (blocks, 2 * n_side + 1)."""
    table = torch.arange(n_blocks)[:, None] + torch.arange(-n_side, n_side + 1)  # (blocks, neighbours)
    return table.masked_fill((table < 0) | (table >= n_blocks), -1)


def into_blocks(x: Tensor, block_size: int, n_blocks: int) -> Tensor:
    """(..., seq, width) to (..., blocks, block_size, width), with rows of 0 after the last position."""
    return F.pad(x, (0, 0, 0, n_blocks * block_size - x.shape[-2])).unflatten(-2, (n_blocks, block_size))


def allowed_keys(pattern: SparsePattern, device: torch.device) -> Tensor:
    """Which of the keys that a block reads its queries may see, global ones apart: (blocks, block_size, keys)."""
    table, size, n = pattern.table.to(device), pattern.block_size, pattern.n_positions
    inside = torch.arange(size, device=device)  # (block_size)
    query = torch.arange(len(table), device=device)[:, None] * size + inside  # (blocks, block_size)
    key = (table[:, :, None] * size + inside).flatten(1)  # (blocks, keys)
    is_global = torch.zeros(len(table) * size, dtype=torch.bool, device=device)
    is_global[list(pattern.global_ids)] = True
    real = (key >= 0) & (key < n) & ~is_global[key.clamp(min=0)]  # (blocks, keys)
    allowed = real[:, None].expand(-1, size, -1)  # (blocks, block_size, keys)
    if pattern.reach is not None:
        allowed = allowed & ((query[:, :, None] - key[:, None]).abs() <= pattern.reach)
    return allowed


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern) -> Tensor:
    """Attention under pattern.mask(), computed block by block: no matrix of all scores exists at any time.

    Shapes: q, k, v (batch, heads, seq, d_head) to the same; memory grows as seq * keys of a block. Raises ValueError
    for another length than the pattern's.
    """
    check_widths(q, k, v)
    if q.shape[-2] != pattern.n_positions or k.shape[-2] != pattern.n_positions:
        lengths = f"{q.shape[-2]} queries and {k.shape[-2]} keys"
        raise ValueError(f"the pattern is for {pattern.n_positions} positions, got {lengths}")
    output = local_attention(q, k, v, pattern)  # (batch, heads, seq, d_head)
    if pattern.global_ids:
        rows = list(pattern.global_ids)
        everywhere = scaled_dot_product_attention(q[..., rows, :], k, v)[0]  # (batch, heads, global, d_head)
        output = output.index_copy(-2, torch.tensor(rows, device=q.device), everywhere)
    return output


def local_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern) -> Tensor:
    """What all positions see that are not global: the keys of their blocks, and the global keys."""
    n_blocks, size, chosen = len(pattern.table), pattern.block_size, list(pattern.global_ids)
    table = pattern.table.to(q.device).clamp(min=0)
    q_blocks = into_blocks(q, size, n_blocks) / math.sqrt(q.shape[-1])  # (batch, heads, blocks, block_size, d_head)
    k_near, v_near = (
        into_blocks(tensor, size, n_blocks)[..., table, :, :].flatten(-3, -2) for tensor in (k, v)
    )  # (batch, heads, blocks, keys, d_head)
    allowed = allowed_keys(pattern, q.device)  # (blocks, block_size, keys)
    scores = q_blocks @ k_near.transpose(-2, -1)  # (batch, heads, blocks, block_size, keys)
    if chosen:
        to_global = q_blocks @ k[..., None, chosen, :].transpose(-2, -1)  # (batch, heads, blocks, block_size, global)
        scores = torch.cat([scores, to_global], dim=-1)  # (batch, heads, blocks, block_size, *)
        allowed = torch.cat([allowed, allowed.new_ones(*allowed.shape[:2], len(chosen))], dim=-1)
    weights = masked_softmax(scores, allowed.expand(scores.shape))
    mixed = weights[..., : k_near.shape[-2]] @ v_near  # (batch, heads, blocks, block_size, d_head)
    if chosen:
        mixed = mixed + weights[..., k_near.shape[-2] :] @ v[..., None, chosen, :]
    return mixed.flatten(-3, -2)[..., : pattern.n_positions, :]  # (batch, heads, seq, d_head)


class LongformerAttention(MultiHeadAttention):
    """A window and global tokens, whose queries, keys and values have projections of their own (section 3.1).

    Shapes: x (batch, seq, d_model) to the same and an empty tensor in place of the weights. The projections of the
    global tokens start as copies of the others, as in the paper. Hugging Face's LongformerSelfAttention ends before
    `out_proj`. Raises ValueError for a mask: the window is the mask.
    """

    def __init__(self, d_model: int, n_heads: int, window_size: int, global_ids: tuple[int, ...] = ()) -> None:
        super().__init__(d_model, n_heads)
        self.window_size, self.global_ids = window_size, tuple(global_ids)
        self.q_global_proj, self.k_global_proj, self.v_global_proj = (nn.Linear(d_model, d_model) for _ in "qkv")
        pairs = zip(
            (self.q_global_proj, self.k_global_proj, self.v_global_proj),
            (self.q_proj, self.k_proj, self.v_proj),
            strict=True,
        )
        for copy, original in pairs:
            copy.load_state_dict(original.state_dict())

    def mix(self, x: Tensor) -> Tensor:
        """Attention before the last projection: (batch, seq, d_model) to the same."""
        self.check_input(x)
        pattern = longformer_pattern(x.shape[1], self.window_size, self.global_ids)
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        output = local_attention(q, k, v, pattern)  # (batch, heads, seq, d_head)
        if self.global_ids:
            rows = list(self.global_ids)
            q = self.split_heads(self.q_global_proj(x[:, rows]))  # (batch, heads, global, d_head)
            k, v = (self.split_heads(proj(x)) for proj in (self.k_global_proj, self.v_global_proj))
            everywhere = scaled_dot_product_attention(q, k, v)[0]  # (batch, heads, global, d_head)
            output = output.index_copy(-2, torch.tensor(rows, device=x.device), everywhere)
        return output.transpose(1, 2).flatten(2)  # (batch, seq, d_model)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if memory is not None or mask is not None:
            raise ValueError(
                "LongformerAttention is self-attention under its own window; it takes no memory and no mask"
            )
        return self.out_proj(self.mix(x)), x.new_empty(0)


class SparseAttention(MultiHeadAttention):
    """Self-attention under a SparsePattern: BigBird's, or a window without projections of its own for global tokens.

    Shapes: x (batch, seq, d_model) to the same and an empty tensor in place of the weights. Raises ValueError for a
    length other than the pattern's, and for a mask.
    """

    def __init__(self, d_model: int, n_heads: int, pattern: SparsePattern) -> None:
        super().__init__(d_model, n_heads)
        self.pattern = pattern

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if memory is not None or mask is not None:
            raise ValueError("SparseAttention is self-attention under its own pattern; it takes no memory and no mask")
        self.check_input(x)
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = sparse_attention(q, k, v, self.pattern).transpose(1, 2).flatten(2)  # (batch, seq, d_model)
        return self.out_proj(mixed), x.new_empty(0)


# What each costs, in scores and in FLOPs


def attention_flops(kind: str, n_positions: int, d_head: int, size: int) -> int:
    """FLOPs of the matrix products of one head, forward: exact, linformer, performer or sparse.

    `size` is the rank, the number of features, or the keys that each query reads; ignored for exact.
    """
    per_key = 4 * d_head  # one score and one mixed value: a multiplication and an addition for each feature, twice
    if kind == "exact":
        return n_positions * n_positions * per_key
    if kind == "linformer":
        return n_positions * size * (per_key + 4 * d_head)  # the mixtures of keys and of values, then attention
    if kind == "performer":
        return n_positions * size * (4 * d_head + 4 * d_head + 2)  # features of q and k; k^T v and q (k^T v); the sum
    if kind == "sparse":
        return n_positions * size * per_key
    raise ValueError(f"unknown kind {kind!r}; use exact, linformer, performer or sparse")
