"""Topic 11 - Prompt tuning and its kin: bottleneck adapters, prefixes, soft prompts, biases; the weights stay frozen.

    add_bottlenecks(model, 16)                       # a small network behind every sublayer
    add_biases(model)                                # BitFit, on a model that has no biases
    add_prefix(model, token_ids)                     # learned keys and values before every text, in every layer
    model = PromptTuned(model, token_ids, mask_id)   # learned embeddings before every text

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py sft --method prefix

Houlsby et al. 2019 (arXiv 1902.00751), Li and Liang 2021 (prefix tuning, arXiv 2101.00190), Lester et al. 2021 (prompt
tuning, arXiv 2104.08691), Ben Zaken et al. 2022 (BitFit, arXiv 2106.10199).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import key_distance
from gpt2 import SamplingConfig
from llm_layers import GroupedQueryAttention, SwiGLU, attend, rotate
from low_rank_adapters import freeze
from modern_llm_architectures import CausalLM, ModelConfig
from sequence_modeling import check_token_ids
from workbench import check_name

BIASED = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj")


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# Bottleneck adapters


class Bottleneck(nn.Module):
    """y + up(gelu(down(y))): begins as nothing, because up is 0 (Houlsby et al. 2019, section 2.1).

    Shapes: (..., d_model) to the same.
    """

    def __init__(self, d_model: int, d_bottleneck: int) -> None:
        super().__init__()
        if not 1 <= d_bottleneck <= d_model:
            raise ValueError(f"d_bottleneck={d_bottleneck} must be in 1..{d_model}, the width of the stream")
        self.down, self.up = nn.Linear(d_model, d_bottleneck), nn.Linear(d_bottleneck, d_model)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.up(F.gelu(self.down(y)))


class WithBottleneck(nn.Module):
    """A sublayer of a block whose output passes through a bottleneck before it is added to the stream."""

    def __init__(self, sublayer: nn.Module, d_model: int, d_bottleneck: int) -> None:
        super().__init__()
        like = next(sublayer.parameters())
        self.sublayer, self.adapter = sublayer, Bottleneck(d_model, d_bottleneck).to(like.device, like.dtype)

    def forward(self, *args: object) -> Tensor:
        return self.adapter(self.sublayer(*args))


def add_bottlenecks(model: CausalLM, d_bottleneck: int) -> None:
    """Freeze the model and put a trained bottleneck behind the attention and the feed-forward network of each block."""
    freeze(model)
    for block in model.blocks:
        block.self_attn = WithBottleneck(block.self_attn, model.config.d_model, d_bottleneck)
        block.ffn = WithBottleneck(block.ffn, model.config.d_model, d_bottleneck)


# BitFit


class BiasedSwiGLU(SwiGLU):
    """A SwiGLU whose three maps have biases; a type of its own, since the fast decoding of topic 09 knows none."""

    def __init__(self, ffn: SwiGLU) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj


def add_biases(model: CausalLM, names: Sequence[str] = BIASED) -> None:
    """Freeze the model and train biases alone (Ben Zaken et al. 2022).

    BitFit trains the biases that a model has. Most Llamas have none: where the named layers of a block lack one, it is
    added at 0, so that the model begins as it was. Raises ValueError for a name that no layer has, and for experts.
    """
    for name in names:
        check_name("biased layer", name, BIASED)
    if model.config.experts or model.config.latent:
        raise ValueError("biases are added to grouped-query attention and SwiGLU; this model has experts or latents")
    freeze(model)
    for block in model.blocks:
        block.ffn = BiasedSwiGLU(block.ffn)
        for name in names:
            layer = getattr(block.self_attn if hasattr(block.self_attn, name) else block.ffn, name)
            start = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(start)


# Prefix tuning


class PrefixAttention(GroupedQueryAttention):
    """An attention with trained keys and values that every position may attend to, before all of the text.

    Shapes: x (batch, seq, d_model) to the same; prefix_keys, prefix_values (kv_heads, virtual, d_head). A prefix key
    stands at a fixed place just before position 0 and is not rotated; so rows must begin at position 0: pad, not pack.
    """

    def __init__(self, attention: GroupedQueryAttention, keys: Tensor, values: Tensor) -> None:
        nn.Module.__init__(self)
        self.n_heads, self.n_kv_heads, self.d_head = attention.n_heads, attention.n_kv_heads, attention.d_head
        self.scale = attention.scale
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, getattr(attention, name))
        self.prefix_keys, self.prefix_values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = key_distance(q.shape[2], k.shape[2], q.device) >= 0  # (query, key)
        mask = F.pad(mask, (self.prefix_keys.shape[1], 0), value=True)  # (..., query, virtual_and_key)
        k, v = (
            torch.cat([prefix.expand(len(q), -1, -1, -1), part], dim=2)
            for prefix, part in ((self.prefix_keys, k), (self.prefix_values, v))
        )
        return attend(q, k, v, mask, self.scale)


def turned_back(model: CausalLM, keys: Tensor, n_positions: int) -> Tensor:
    """Rotated keys (..., kv_heads, seq, d_head) as they would be n_positions earlier.

    Rotary scores see distances alone, so turning the keys back by n is the same as counting the queries from n on, as
    transformers does behind a cache of n positions, and so PEFT's prefixes.
    """
    cos, sin = model.rotary.span(n_positions, 1, keys)
    return rotate(keys, (cos, -sin)).reshape(keys.shape)


@torch.no_grad()
def add_prefix(model: CausalLM, token_ids: Sequence[int]) -> None:
    """Freeze the model and train keys and values that stand before every text (Li and Liang 2021).

    They start as those of `token_ids`: the model then begins as if it had read these ids first, which trains better
    than a random start (section 7.4 there). No network makes them, as none does in the paper's model after training.
    Raises ValueError for attention that does more than grouped queries do, such as norms of queries, caps or windows.
    """
    if not token_ids:
        raise ValueError("a prefix needs at least one token id to start from")
    for block in model.blocks:
        if type(block.self_attn) is not GroupedQueryAttention or model.config.window_size:
            kind = f"{type(block.self_attn).__name__} with window_size={model.config.window_size}"
            raise ValueError(f"a prefix stands before plain grouped-query attention, got {kind}; use PromptTuned")
    caches = model.new_caches()
    model(torch.tensor([list(token_ids)], device=model.token_emb.weight.device), caches)
    freeze(model)
    for block, cache in zip(model.blocks, caches, strict=True):
        keys, values = (buffer[0, :, : len(token_ids)] for buffer in cache.buffers)  # (kv_heads, virtual, d_head)
        block.self_attn = PrefixAttention(block.self_attn, turned_back(model, keys, len(token_ids)), values)


# Prompt tuning


class PromptedEmbedding(nn.Module):
    """An embedding in which the first, second ... placeholder of a row has the first, second ... trained vector.

    Shapes: token_ids (batch, seq) to (batch, seq, d_model).
    """

    def __init__(self, embedding: nn.Module, prompt: Tensor, placeholder_id: int) -> None:
        super().__init__()
        self.base, self.placeholder_id = embedding, placeholder_id
        self.prompt = nn.Parameter(prompt.detach().clone())  # (virtual, d_model)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        there = token_ids == self.placeholder_id  # (batch, seq)
        place = (there.cumsum(dim=1) - 1).clamp(0, len(self.prompt) - 1)  # (batch, seq)
        return torch.where(there[..., None], self.prompt[place], self.base(token_ids))


class PromptTuned(nn.Module):
    """A frozen model that reads trained embeddings before every text (Lester et al. 2021).

    Takes and gives what `CausalLM` does; the positions of the prompt are hidden. The vectors start as the embeddings of
    `token_ids`. Raises ValueError for packed rows: there a prompt would have to stand before each document.
    """

    def __init__(self, model: CausalLM, token_ids: Sequence[int], placeholder_id: int) -> None:
        super().__init__()
        if not token_ids:
            raise ValueError("a prompt needs at least one token id to start from")
        check_token_ids(torch.tensor([*token_ids, placeholder_id]), model.config.vocab_size)
        freeze(model)
        start = model.token_emb.weight[torch.tensor(list(token_ids))]  # (virtual, d_model)
        model.token_emb = PromptedEmbedding(model.token_emb, start, placeholder_id)
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @config.setter
    def config(self, config: ModelConfig) -> None:
        self.model.config = config

    @property
    def n_virtual(self) -> int:
        return len(self.model.token_emb.prompt)

    def before(self, token_ids: Tensor) -> Tensor:
        """The ids with the placeholders of the prompt before them: (batch, virtual_and_seq)."""
        placeholder_id = self.model.token_emb.placeholder_id
        if (token_ids == placeholder_id).any():
            raise ValueError(f"a text holds id {placeholder_id}, which stands for the prompt; take another placeholder")
        placeholders = token_ids.new_full((len(token_ids), self.n_virtual), placeholder_id)
        return torch.cat([placeholders, token_ids], dim=1)

    def hidden(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        if document_ids is not None:
            raise ValueError("a prompt stands before a whole row; pad the rows instead of packing them (seq_len 0)")
        return self.model.hidden(self.before(token_ids))[:, self.n_virtual :]  # (batch, seq, d_model)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(token_ids, document_ids))  # (batch, seq, vocab)

    @torch.no_grad()
    def generate(
        self,
        token_ids: Tensor,
        sampling: SamplingConfig,
        is_real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `CausalLM.generate`. Left padding then lies between prompt and text, where it is as invisible."""
        real = None if is_real is None else F.pad(is_real, (self.n_virtual, 0), value=True)
        return self.model.generate(self.before(token_ids), sampling, real, generator)
