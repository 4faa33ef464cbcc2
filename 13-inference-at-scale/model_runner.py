"""Topic 13 - One forward pass over requests of different lengths, for topic 09's models on the blocks of a paged cache.

    runner = make_runner(model, store, most)       # the packed one where the model is of the plain kind
    decoded, read = runner.hidden([decode_rows, prompt_rows])        # each (tokens, d_model)

`BlockRunner` runs any of topic 09's models through its own blocks, rows filled up to the longest. `PackedRunner` puts
the new tokens of all requests behind one another, so that the matrices see no filling, and fills up only for attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_decoding import DecodePlan, LayerPlan, can_plan
from llm_layers import KVCache
from modern_llm_architectures import CausalLM
from paged_cache import FloatStore, PagedView, StepRows


class BlockRunner:
    """A model's own blocks, with a paged view as each layer's cache: latent attention, experts, windows, soft caps.

    One pass for each group of rows; what fills up a row is computed and dropped.
    """

    def __init__(self, model: CausalLM, store: FloatStore) -> None:
        self.model, self.store = model, store

    def hidden(self, groups: Sequence[StepRows]) -> list[Tensor]:
        """The stream after the last norm at each group's real new tokens: (tokens, d_model) each."""
        return [self.one(rows) for rows in groups]

    def one(self, rows: StepRows) -> Tensor:
        model, config = self.model, self.model.config
        x = model.token_emb(rows.token_ids)  # (rows, new, d_model)
        rotation = model.rotary.at(rows.positions, x)
        windows = {config.window_of(layer) for layer in range(config.n_layers)}
        masks = {window: rows.mask(window, config.n_sinks) for window in windows}
        for layer, block in enumerate(model.blocks):
            view = PagedView(self.store, layer, rows)
            x = block(x, rotation, masks[config.window_of(layer)], view)  # (rows, new, d_model)
        return model.final_norm(x.flatten(0, 1)[rows.flat])  # (tokens, d_model)


class PackedRunner(DecodePlan):
    """Topic 09's plan of fused matrices, for the tokens of many requests, each at its own position.

    The matrices are copied: they are the model's weights as they are now, and take their memory a second time.

    Args:
        model: one that `can_plan`
        store: the blocks
        most: positions that a request may have
    """

    def __init__(self, model: CausalLM, store: FloatStore, most: int) -> None:
        caches = [KVCache() for _ in model.blocks]
        nothing = model.final_norm.weight.new_empty(0, 0, 0, 0)
        for cache in caches:
            cache.buffers = (nothing, nothing)  # keys and values are in the store
        super().__init__(model, caches, most)
        self.store = store

    def hidden(self, groups: Sequence[StepRows]) -> list[Tensor]:
        """The stream after the last norm at each group's real new tokens: (tokens, d_model) each."""
        config = self.config
        positions = torch.cat([rows.positions.reshape(-1)[rows.flat] for rows in groups])  # (tokens)
        token_ids = torch.cat([rows.token_ids.reshape(-1)[rows.flat] for rows in groups])  # (tokens)
        write_at = torch.cat([rows.write_at for rows in groups])
        sizes = [len(rows.flat) for rows in groups]
        x = F.embedding(token_ids, self.model.token_emb.weight)  # (tokens, d_model)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (tokens, 1, d_head)
        biases = [self.bias(rows, x) for rows in groups]
        for number, layer in enumerate(self.layers):
            q, k, v = self.project(x, layer, cos, sin)
            self.store.write(number, write_at, k, v)
            parts = zip(groups, biases, q.split(sizes), strict=True)
            mixed = torch.cat([self.mix(number, *part) for part in parts])  # (tokens, *)
            x = x + F.linear(mixed, layer.out, layer.out_bias)
            normed = F.rms_norm(x, self.width, layer.ffn_gain, self.eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)  # (tokens, d_ff)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        normed = F.rms_norm(x, self.width, self.model.final_norm.weight, config.norm_eps)
        return list(normed.split(sizes))

    def project(self, x: Tensor, layer: LayerPlan, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (tokens, heads, d_head), rotated keys and values (tokens, kv_heads, d_head)."""
        config = self.config
        normed = F.rms_norm(x, self.width, layer.attn_gain, self.eps)
        heads = F.linear(normed, layer.qkv, layer.qkv_bias).unflatten(1, (-1, config.d_head))  # (tokens, *, d_head)
        turned = heads[:, : self.n_rotated]  # (tokens, *, d_head): queries, then keys
        if layer.qk_gain is not None:
            turned = F.rms_norm(turned, (config.d_head,), None, self.eps) * layer.qk_gain
        turned = torch.addcmul(turned * cos, turned.roll(self.half, -1), sin)
        return turned[:, : config.n_heads], turned[:, config.n_heads :], heads[:, self.n_rotated :]

    def bias(self, rows: StepRows, like: Tensor) -> Tensor:
        """The mask as numbers to add, once for all layers, for queries that share a key side by side."""
        mask = rows.mask()  # (rows, 1, new, key)
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))
        return bias if rows.width == 1 else bias.repeat(1, 1, self.config.n_heads // self.config.n_kv_heads, 1)

    def mix(self, number: int, rows: StepRows, bias: Tensor, q: Tensor) -> Tensor:
        """Attention of a group's queries (tokens, heads, d_head) to the blocks of its rows: (tokens, heads * d_head).

        The heads that share a key are further queries of it: no key is repeated.
        """
        config, n_heads = self.config, self.config.n_kv_heads
        k, v = self.store.read(number, rows.read_at, (rows.n_rows, rows.n_keys), q.dtype)
        if rows.width == 1:
            grouped = q.unflatten(1, (n_heads, -1))  # (rows, kv_heads, *, d_head)
            return F.scaled_dot_product_attention(grouped, k, v, bias).flatten(1)
        if not rows.full:
            filled = q.new_zeros(rows.n_rows * rows.width, config.n_heads, config.d_head)
            q = filled.index_copy_(0, rows.flat, q)
        q = q.view(rows.n_rows, rows.width, n_heads, -1, config.d_head).permute(0, 2, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, bias)  # (rows, kv_heads, *, d_head)
        mixed = mixed.unflatten(2, (-1, rows.width)).permute(0, 3, 1, 2, 4).flatten(2)  # (rows, new, *)
        mixed = mixed.flatten(0, 1)  # (*, *)
        return mixed if rows.full else mixed[rows.flat]


def make_runner(model: CausalLM, store: FloatStore, most: int) -> BlockRunner | PackedRunner:
    """The packed runner where topic 09 can plan the model, else the model's own blocks."""
    return PackedRunner(model, store, most) if can_plan(model) else BlockRunner(model, store)
