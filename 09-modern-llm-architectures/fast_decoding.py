"""Topic 09 - Fast decoding: one token with few operations, for a batch so small that the calls cost more than the sums.

python 09-modern-llm-architectures/modern_llm_architectures.py bench    # beside transformers' generate

At batch 1 a small model spends most of a step on entering operations, not in them. `DecodePlan` computes what the
modules compute, with everything that does not change from step to step prepared before the first one.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_layers import GroupedQueryAttention, KVCache, NormedAttention, SwiGLU

if TYPE_CHECKING:
    from modern_llm_architectures import CausalLM


class LayerPlan(NamedTuple):
    """The tensors of one block. Shapes: weights as in nn.Linear, keys and values (batch, kv_heads, most, d_head)."""

    attn_gain: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_gain: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    ffn_gain: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


def can_plan(model: "CausalLM") -> bool:
    """Whether a model is of the plain kind: grouped queries over all of the past, SwiGLU, angles fixed by the place."""
    config = model.config
    odd = config.latent or config.experts or config.attention_cap or config.window_size
    kinds = (GroupedQueryAttention, NormedAttention)
    known = all(type(block.self_attn) in kinds and type(block.ffn) is SwiGLU for block in model.blocks)
    precise = model.final_norm.weight.dtype in (torch.float32, torch.float64)  # half precision needs a wider norm
    return known and precise and not odd and config.rope_scaling.kind != "dynamic"


class DecodePlan:
    """The steps of one generation after its prompt, for the model's weights as they are now.

    Args:
        model: one that `can_plan`
        caches: what the prompt left, one for each layer; rows and positions are taken over
        most: positions in all, prompt and continuation
        is_real: (batch, prompt), False at padding, which stands on the left; None if there is none

    `step` gives the stream after the last norm, up to rounding what `CausalLM.hidden` gives with caches.
    """

    def __init__(self, model: "CausalLM", caches: list[KVCache], most: int, is_real: Tensor | None = None) -> None:
        self.model, self.config, self.place = model, model.config, len(caches[0])
        most, half = max(most, self.place + 1), model.config.d_head // 2
        cos, sin = model.rotary.rows(most, model.final_norm.weight)  # (*, half)
        self.cos = torch.cat([cos, cos], dim=-1)[:most]  # (most, d_head)
        self.sin = torch.cat([-sin, sin], dim=-1)[:most]  # (most, d_head); x * cos + (x turned by half) * sin
        self.half, self.width, self.eps = half, (model.config.d_model,), model.config.norm_eps
        self.n_rotated = model.config.n_heads + model.config.n_kv_heads
        self.shift, self.real = None, None
        if is_real is not None:
            self.shift = (~is_real).sum(dim=1)  # (batch): positions are counted without the padding
            self.real = F.pad(is_real, (0, most - is_real.shape[1]), value=True)[:, None, None]  # (batch, 1, 1, most)
        self.layers = [self.layer(block, cache, most) for block, cache in zip(model.blocks, caches, strict=True)]

    def layer(self, block: nn.Module, cache: KVCache, most: int) -> LayerPlan:
        attention, ffn = block.self_attn, block.ffn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        qk_gain = None
        if isinstance(attention, NormedAttention):
            gains = [attention.q_norm.weight] * self.config.n_heads
            gains += [attention.k_norm.weight] * self.config.n_kv_heads
            qk_gain = torch.stack(gains)  # (*, d_head), queries first
        buffers = []
        for kept in cache.buffers:
            buffer = kept.new_empty(*kept.shape[:2], most, kept.shape[3])  # (batch, kv_heads, most, d_head)
            buffer[:, :, : self.place] = kept[:, :, : self.place]
            buffers.append(buffer)
        return LayerPlan(
            block.attn_norm.weight,
            torch.cat([part.weight for part in parts]),
            None if parts[0].bias is None else torch.cat([part.bias for part in parts]),
            qk_gain,
            attention.out_proj.weight,
            attention.out_proj.bias,
            block.ffn_norm.weight,
            torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]),
            ffn.down_proj.weight,
            *buffers,
        )

    def step(self, token_ids: Tensor) -> Tensor:
        """One new id for each row, (batch, 1), to the stream after the last norm, (batch, d_model).

        Raises ValueError beyond the model's max_seq_len.
        """
        config, place = self.config, self.place
        self.model.check_length(place + 1)
        x = F.embedding(token_ids[:, 0], self.model.token_emb.weight)  # (batch, d_model)
        if self.shift is None:
            cos, sin = self.cos[place], self.sin[place]  # (d_head)
        else:
            own = place - self.shift
            cos, sin = self.cos[own][:, None], self.sin[own][:, None]  # (batch, 1, d_head)
        for layer in self.layers:
            normed = F.rms_norm(x, self.width, layer.attn_gain, self.eps)
            heads = F.linear(normed, layer.qkv, layer.qkv_bias).unflatten(1, (-1, config.d_head))  # (batch, *, d_head)
            turned = heads[:, : self.n_rotated]  # (batch, *, d_head): queries, then keys
            if layer.qk_gain is not None:
                turned = F.rms_norm(turned, (config.d_head,), None, self.eps) * layer.qk_gain
            turned = torch.addcmul(turned * cos, turned.roll(self.half, -1), sin)
            layer.keys[:, :, place] = turned[:, config.n_heads :]
            layer.values[:, :, place] = heads[:, self.n_rotated :]
            x = x + F.linear(self.attend(turned[:, : config.n_heads], layer), layer.out, layer.out_bias)
            normed = F.rms_norm(x, self.width, layer.ffn_gain, self.eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)  # (batch, d_ff)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.place += 1
        return F.rms_norm(x, self.width, self.model.final_norm.weight, self.eps)

    def attend(self, q: Tensor, layer: LayerPlan) -> Tensor:
        """The heads that share a key are its queries: no key is repeated, and no mask is needed without padding."""
        last = self.place + 1
        q = q.unflatten(1, (self.config.n_kv_heads, -1))  # (batch, kv_heads, *, d_head)
        keys, values = layer.keys[:, :, :last], layer.values[:, :, :last]  # (batch, kv_heads, *, d_head)
        mask = None if self.real is None else self.real[..., :last]
        return F.scaled_dot_product_attention(q, keys, values, mask).flatten(1)  # (batch, *)
