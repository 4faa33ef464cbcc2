"""Topic 08 - GPT-2: a stack of decoder blocks that predicts the next token, and generates by feeding itself.

from gpt2 import GPT2, GPT2Config
model = GPT2.from_pretrained("path/to/gpt2")    # any folder of Hugging Face's GPT-2
model = GPT2(GPT2Config(vocab_size=500, d_model=64, n_layers=2, n_heads=4))

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Hendrycks and Gimpel 2016
(arXiv 1606.08415), GELU and its tanh approximation; Fan et al. 2018 (arXiv 1805.04833), top-k; Holtzman et al. 2020
(arXiv 1904.09751), top-p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import causal_mask, check_heads
from huggingface_folders import FileTensor, FolderModel, Layout, file_tensors
from sequence_modeling import check_token_ids, sample_ids
from transformer_architecture import Encoder, FeedForward, KeyValueCache, LayerNorm, LearnedPositions, check_length
from workbench import check_range


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are those of the smallest published one."""

    vocab_size: int = 50_257  # different tokens
    max_seq_len: int = 1024  # most positions, prompt and continuation together
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # attention heads; must divide d_model
    d_ff: int | None = None  # width inside the feed-forward networks; none means 4 * d_model
    dropout: float = 0.1  # fraction of activations zeroed in training
    norm_eps: float = 1e-5  # added to the variance in every normalisation
    bos_id: int | None = 50_256  # first token of a text; GPT-2 has one special token for both
    eos_id: int | None = 50_256  # token that ends a text; none means that texts do not end
    pad_id: int | None = None  # filler of shorter rows; none means the id of the end

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", "max_seq_len", "d_model", "n_layers", "n_heads", least=1)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "norm_eps", above=0)
        if self.d_ff is not None:
            check_range(self, "d_ff", least=1)
        check_heads(self.d_model, self.n_heads)
        for name in ("bos_id", "eos_id", "pad_id"):
            if getattr(self, name) is not None:
                check_range(self, name, least=0)

    @property
    def filler_id(self) -> int:
        """What stands in a row after its end."""
        return next((index for index in (self.pad_id, self.eos_id) if index is not None), 0)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen from its distribution: temperature first, then top-k, then top-p."""

    max_new_tokens: int = 40  # longest continuation
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # draw among the k most likely tokens; 0 means all
    top_p: float = 1.0  # draw among the fewest tokens that together have this probability; 1 means all

    def __post_init__(self) -> None:
        check_range(self, "max_new_tokens", "temperature", "top_k", least=0)
        check_range(self, "top_p", above=0, most=1)


class TanhFeedForward(FeedForward):
    """A feed-forward network with GELU's tanh approximation, "gelu_new" in files (Hendrycks and Gimpel 2016).

    It differs from the exact GELU by up to 5e-4, enough to change a model's answers. No dropout between the two maps.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up_proj(x), approximate="tanh")  # (batch, seq, d_ff)
        return self.down_proj(hidden)  # (batch, seq, d_model)


def init_weights(model: nn.Module, std: float = 0.02) -> None:
    """Normal matrices and embeddings, biases 0, as GPT-2 and BERT start."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def set_norm_eps(model: nn.Module, norm_eps: float) -> None:
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.norm_eps = norm_eps


class GPT2(FolderModel):
    """GPT-2: pre-norm blocks under a causal mask, learned positions, output tied to the token embedding.

    Shapes: token_ids (batch, seq) to logits (batch, seq, vocab); `real` (batch, seq so far), bool, is False where a row
    holds padding, on either side: positions count real tokens alone, and padding is never attended to. With caches
    (one KeyValueCache for each block) token_ids holds only the new positions, `real` all so far.
    Raises ValueError for ids outside the vocabulary, more than max_seq_len positions, and a `real` of another shape.
    """

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    config_class: ClassVar[type] = GPT2Config
    config_names: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "dropout": "resid_pdrop",
        "norm_eps": "layer_norm_epsilon",
        "bos_id": "bos_token_id",
        "eos_id": "eos_token_id",
        "pad_id": "pad_token_id",
    }
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    fixed: ClassVar[dict[str, tuple]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (True,),
    }

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        d_model, d_ff = config.d_model, config.d_ff or 4 * config.d_model
        self.token_emb = nn.Embedding(config.vocab_size, d_model)
        self.pos_emb = LearnedPositions(d_model, config.max_seq_len)
        self.encoder = Encoder(config.n_layers, d_model, config.n_heads, d_ff, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        for block in self.encoder.blocks:
            block.ffn = TanhFeedForward(d_model, d_ff)
        set_norm_eps(self, config.norm_eps)
        self.start(0.02)

    def start(self, std: float) -> None:
        """Draw fresh weights with this standard deviation."""
        init_weights(self, std)
        for block in self.encoder.blocks:  # 2 n_layers maps add to the stream: scaled, their sum keeps its variance
            for layer in (block.self_attn.out_proj, block.ffn.down_proj):
                nn.init.normal_(layer.weight, std=std / math.sqrt(2 * self.config.n_layers))

    def forward(
        self, token_ids: Tensor, real: Tensor | None = None, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        check_text_ids(token_ids, self.config.vocab_size)
        start = len(caches[0]) if caches else 0
        stop = check_length(token_ids.shape[1], start, self.config.max_seq_len)
        mask = causal_mask(token_ids.shape[1], stop, token_ids.device)  # (query, key)
        if real is None:
            x = self.pos_emb(self.token_emb(token_ids), start)  # (batch, seq, d_model)
        else:
            check_real(real, (token_ids.shape[0], stop))
            positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]  # (batch, seq)
            x = self.token_emb(token_ids) + self.pos_emb.weight[positions]  # (batch, seq, d_model)
            mask = mask & real[:, None, None, :]  # (batch, 1, query, key)
        x = self.encoder(self.dropout(x), mask, caches)  # (batch, seq, d_model)
        logits = F.linear(x, self.token_emb.weight)  # (batch, seq, vocab)
        return logits

    def new_caches(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.encoder.blocks]

    def generate(
        self,
        token_ids: Tensor,
        sampling: SamplingConfig,
        real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts (batch, seq); rows of other lengths are padded on the left, where `real` is False.

        Returns the new ids (batch, at most max_new_tokens); after its end a row holds filler_id. Call `eval()` first.
        Raises ValueError for an empty prompt and if the end could lie beyond max_seq_len.
        """
        check_prompt(token_ids, real)
        check_length(token_ids.shape[1] + sampling.max_new_tokens, 0, self.config.max_seq_len)
        caches, seen = self.new_caches(), token_ids[:, :0] if real is None else real

        def next_logits(new_ids: Tensor) -> Tensor:
            nonlocal seen
            if real is not None and len(caches[0]):
                seen = F.pad(seen, (0, 1), value=True)
            return self(new_ids, None if real is None else seen, caches)[:, -1]

        return extend(next_logits, token_ids, sampling, self.config.eos_id, self.config.filler_id, generator)

    def file_config(self) -> dict:
        dropout = self.config.dropout
        return super().file_config() | {"embd_pdrop": dropout, "attn_pdrop": dropout}

    @classmethod
    def layout(cls, config: GPT2Config) -> Layout:
        tensors = [
            FileTensor("transformer.wte.weight", ("token_emb.weight",)),
            FileTensor("transformer.wpe.weight", ("pos_emb.weight",)),
        ]
        for index in range(config.n_layers):
            theirs, ours = f"transformer.h.{index}", f"encoder.blocks.{index}"
            tensors += file_tensors({f"{theirs}.ln_1": f"{ours}.attn_norm", f"{theirs}.ln_2": f"{ours}.ffn_norm"})
            for key, names in {
                "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.c_proj": ("self_attn.out_proj",),
                "mlp.c_fc": ("ffn.up_proj",),
                "mlp.c_proj": ("ffn.down_proj",),
            }.items():
                parts = [f"{ours}.{name}" for name in names]
                tensors.append(FileTensor(f"{theirs}.{key}.weight", tuple(f"{part}.weight" for part in parts), True))
                tensors.append(FileTensor(f"{theirs}.{key}.bias", tuple(f"{part}.bias" for part in parts)))
        tensors += file_tensors({"transformer.ln_f": "encoder.final_norm"})
        masks = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)  # constants that older files carry
        return Layout(tuple(tensors), {"lm_head.weight": "transformer.wte.weight"}, masks, "transformer.")


def check_text_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError or TypeError unless the ids are a tensor (batch, seq) of known tokens."""
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"token ids must be a tensor (batch, seq), got a {type(token_ids).__name__}; use torch.tensor")
    if not token_ids.is_meta:  # a meta tensor has a shape but no values to check
        check_token_ids(token_ids, vocab_size, 2)


def check_real(real: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless `real` is bool and has one entry for each position so far."""
    if real.dtype != torch.bool or tuple(real.shape) != shape:
        raise ValueError(
            f"real must be bool of shape (batch, positions so far) = {shape}, True at tokens and False at padding; "
            f"got {real.dtype}, {tuple(real.shape)}"
        )


# Generation


def check_prompt(token_ids: Tensor, real: Tensor | None) -> None:
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"a prompt must be a tensor (batch, seq), got a {type(token_ids).__name__}; use torch.tensor")
    if token_ids.dim() != 2 or token_ids.shape[1] == 0:
        raise ValueError(f"a prompt needs shape (batch, seq) with at least one token, got {tuple(token_ids.shape)}")
    if real is not None:
        check_real(real, tuple(token_ids.shape))
        if not real[:, -1].all():
            raise ValueError("a prompt must end with a token: pad shorter rows on the left")


def left_padded(rows: list[list[int]], filler_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch: ids (batch, seq) and `real` (batch, seq), True at tokens."""
    if not rows or not all(rows):
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, rows))
    token_ids = torch.tensor([[filler_id] * (width - len(row)) + row for row in rows])  # (batch, seq)
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])  # (batch, seq)
    return token_ids, real


def keep_likely(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (batch, vocab) with -inf for all but the top_k most likely tokens, then all but the nucleus.

    The nucleus is the fewest most likely tokens whose probability reaches top_p (Holtzman et al. 2020, section 3.1);
    the most likely one always stays. Tokens that tie with the last of the top_k stay as well. Raises ValueError for a
    negative top_k and for a top_p outside (0, 1].
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be >= 0, 0 for all, and top_p in (0, 1], got {top_k} and {top_p}")
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < least, -math.inf)  # (batch, vocab)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)  # (batch, vocab)
        chances = ordered.softmax(dim=-1)  # (batch, vocab)
        outside = chances.cumsum(dim=-1) - chances >= top_p  # (batch, vocab)
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)  # (batch, vocab)
    return logits


@torch.no_grad()
def extend(
    next_logits: Callable[[Tensor], Tensor],
    token_ids: Tensor,
    sampling: SamplingConfig,
    eos_id: int | None,
    filler_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose tokens one after the other; `next_logits(new ids)` gives the logits (batch, vocab) of the next.

    The one loop of every generator in this topic. Returns the new ids (batch, at most max_new_tokens); it stops when
    every row has drawn eos_id, and fills rows that ended earlier with filler_id.
    """
    ended = torch.zeros(len(token_ids), 1, dtype=torch.bool, device=token_ids.device)  # (batch, 1)
    generated = [token_ids[:, :0]]
    for _ in range(sampling.max_new_tokens):
        logits = next_logits(token_ids)  # (batch, vocab)
        if sampling.temperature > 0:  # scaled here, because the nucleus depends on the temperature
            logits = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)  # (batch, vocab)
        chosen = sample_ids(logits, 1.0 if sampling.temperature > 0 else 0.0, generator)  # (batch, 1)
        token_ids = chosen.masked_fill(ended, filler_id)  # (batch, *)
        generated.append(token_ids)
        if eos_id is not None:
            ended = ended | (token_ids == eos_id)  # (batch, 1)
            if ended.all():
                break
    return torch.cat(generated, dim=1)  # (batch, *)
