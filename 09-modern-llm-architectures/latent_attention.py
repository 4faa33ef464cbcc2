"""Topic 09 - Multi-head latent attention: what is cached is one short vector for each position, shared by all heads.

DeepSeek-AI 2024 (V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_layers import KVCache, RMSNorm, Rotation, attend, rotate_neighbours
from workbench import check_range


@dataclass(frozen=True)
class LatentConfig:
    """The widths of latent attention, with those of DeepSeek-V3 as the default."""

    q_rank: int = 1536  # width of the queries' latent; 0 projects queries in one step
    kv_rank: int = 512  # width of the latent that keys and values are made from: this is cached
    d_nope: int = 128  # width of a head's query and key without position
    d_rope: int = 64  # width of the part that carries the position; its key is shared by all heads, and cached
    d_value: int = 128  # width of a head's value

    def __post_init__(self) -> None:
        check_range(self, "kv_rank", "d_nope", "d_rope", "d_value", least=1)
        check_range(self, "q_rank", least=0)
        if self.d_rope % 2:
            raise ValueError(f"rotary positions turn pairs of features: d_rope must be even, got {self.d_rope}")


class LatentAttention(nn.Module):
    """Keys and values of all heads are linear maps of one latent of width kv_rank (V2, equations 9 to 11, 14 to 19).

    A rotation cannot be moved into a map that does not know the position, so a few features of the query, and one key
    for all heads, carry the position apart from the rest. Cached are the latent and that key: kv_rank + d_rope numbers
    for each position, whatever the number of heads.

    Shapes: x (batch, seq, d_model) to the same; with a cache, x holds only the new positions. A cached call of one
    position uses the absorbed form, in which no key or value of any head is ever made.
    """

    latent_eps = 1e-6  # of the two inner norms; the published code sets it apart from the model's norm_eps

    def __init__(self, d_model: int, n_heads: int, widths: LatentConfig, score_factor: float = 1.0) -> None:
        super().__init__()
        self.n_heads, self.widths = n_heads, widths
        d_query = widths.d_nope + widths.d_rope
        self.scale = d_query**-0.5 * score_factor
        if widths.q_rank:
            self.q_down_proj = nn.Linear(d_model, widths.q_rank, bias=False)
            self.q_norm = RMSNorm(widths.q_rank, self.latent_eps)
        self.q_proj = nn.Linear(widths.q_rank or d_model, n_heads * d_query, bias=False)
        self.kv_down_proj = nn.Linear(d_model, widths.kv_rank + widths.d_rope, bias=False)
        self.kv_norm = RMSNorm(widths.kv_rank, self.latent_eps)
        self.kv_proj = nn.Linear(widths.kv_rank, n_heads * (widths.d_nope + widths.d_value), bias=False)
        self.out_proj = nn.Linear(n_heads * widths.d_value, d_model, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        hidden = self.q_norm(self.q_down_proj(x)) if self.widths.q_rank else x
        q = self.q_proj(hidden).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (batch, heads, seq, d_query)
        q_nope, q_rope = q.split([self.widths.d_nope, self.widths.d_rope], dim=-1)
        q_rope = rotate_neighbours(q_rope, rotation)  # (batch, heads, seq, d_rope)
        latent, k_rope = self.kv_down_proj(x).split([self.widths.kv_rank, self.widths.d_rope], dim=-1)
        latent = self.kv_norm(latent)[:, None]  # (batch, 1, seq, kv_rank)
        k_rope = rotate_neighbours(k_rope[:, None], rotation)  # (batch, 1, seq, d_rope)
        if cache is not None:
            latent, k_rope = cache.append(latent, k_rope)  # (batch, 1, key, *)
        absorb = cache is not None and x.shape[1] == 1
        mix = self.mix_absorbed if absorb else self.mix_expanded
        mixed = mix(q_nope, q_rope, latent, k_rope, mask)  # (batch, heads, seq, d_value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (batch, seq, d_model)

    def mix_expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None):
        """Make every head's keys and values from the latents, then attend: the cheaper form for long inputs."""
        made = self.kv_proj(latent[:, 0]).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (batch, heads, key, *)
        k_nope, v = made.split([self.widths.d_nope, self.widths.d_value], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)  # (batch, heads, key, d_query)
        return attend(torch.cat([q_nope, q_rope], dim=-1), k, v, mask, self.scale)

    def mix_absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None):
        """Attend to the latents themselves: q . (W_k c) = (W_k^T q) . c, and sum p (W_v c) = W_v (sum p c).

        All heads then share one key, the latent with its rotated part, and one value, the latent: multi-query
        attention of width kv_rank + d_rope.
        """
        by_head = self.kv_proj.weight.unflatten(0, (self.n_heads, -1))  # (heads, d_nope + d_value, kv_rank)
        w_k, w_v = by_head.split([self.widths.d_nope, self.widths.d_value], dim=1)
        q = torch.cat([q_nope @ w_k, q_rope], dim=-1)  # (batch, heads, seq, kv_rank + d_rope)
        k = torch.cat([latent, k_rope], dim=-1)  # (batch, 1, key, kv_rank + d_rope)
        mixed = attend(q, k, latent, mask, self.scale)  # (batch, heads, seq, kv_rank)
        return mixed @ w_v.transpose(-2, -1)  # (batch, heads, seq, d_value)
