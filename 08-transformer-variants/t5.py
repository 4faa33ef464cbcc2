"""Topic 08 - T5: an encoder reads a text with gaps, a decoder writes what was in them. BART: the lines that differ.

from t5 import T5
model = T5.from_pretrained("path/to/t5")    # any folder of Hugging Face's T5, first version or 1.1

Papers: Raffel et al. 2020 (arXiv 1910.10683), T5 and span corruption; Shazeer 2020 (arXiv 2002.05202), the gated
feed-forward network of version 1.1; Zhang and Sennrich 2019 (arXiv 1910.07467), the norm without a mean; Lewis et al.
2020 (arXiv 1910.13461), BART.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import MultiHeadAttention, causal_mask, check_heads
from gpt2 import SamplingConfig, check_real, check_text_ids, extend, init_weights
from huggingface_folders import FileTensor, FolderModel, Layout, file_tensors
from sequence_modeling import IGNORE
from transformer_architecture import (
    DecoderLayer,
    EncoderLayer,
    KeyValueCache,
    LayerNorm,
    LearnedPositions,
    RelativeAttention,
    check_length,
)
from workbench import check_range


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5; the defaults are those of the published small model, first version."""

    vocab_size: int = 32_128  # different tokens
    d_model: int = 512  # width of the residual stream
    d_head: int = 64  # width of an attention head; n_heads * d_head need not be d_model
    d_ff: int = 2048  # width inside the feed-forward networks
    n_encoder_layers: int = 6  # blocks of the encoder
    n_decoder_layers: int = 6  # blocks of the decoder
    n_heads: int = 8  # attention heads
    n_buckets: int = 32  # different numbers for relative positions
    max_distance: int = 128  # distance from which on all positions share a bucket
    dropout: float = 0.1  # fraction of activations zeroed in training
    norm_eps: float = 1e-6  # added to the mean square in every normalisation
    ffn: Literal["relu", "gated-gelu"] = "relu"  # feed-forward network: first version or 1.1
    tie_embeddings: bool = True  # one matrix for input and output; false in version 1.1
    scale_outputs: bool = True  # divide by sqrt(d_model) before the output map; false in version 1.1
    pad_id: int = 0  # filler of shorter rows
    eos_id: int = 1  # token that ends a text
    start_id: int = 0  # first input of the decoder

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "d_head", "d_ff", "n_encoder_layers", "n_decoder_layers", "n_heads")
        check_range(self, *sizes, least=1)
        check_range(self, "n_buckets", least=4)
        check_range(self, "max_distance", least=self.n_buckets)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "norm_eps", above=0)
        check_range(self, "pad_id", "eos_id", "start_id", least=0, below=self.vocab_size)
        if self.ffn not in FEED_FORWARD:
            raise ValueError(f"unknown ffn {self.ffn!r}; choose from {', '.join(FEED_FORWARD)}")


# Encoder-decoders: what T5 and BART share


class EncoderDecoder(FolderModel):
    """A model that reads one sequence and writes another; a subclass defines `encode`, `decode` and the blocks.

    Shapes: src_ids (batch, src), tgt_ids (batch, tgt), which start with start_id, to logits (batch, tgt, vocab);
    `real` (batch, src), bool, is False at padding of the source. Padding of the target may follow it: no earlier
    position sees it. Raises ValueError for ids outside the vocabulary and a `real` of another shape.
    """

    decoder_blocks: nn.ModuleList

    def encode(self, src_ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The memory (batch, src, d_model) and who may be attended in it, (batch, 1, 1, src)."""
        raise TypeError(f"{type(self).__name__} has no encoder")

    def decode(
        self, tgt_ids: Tensor, memory: Tensor, memory_mask: Tensor, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Logits (batch, tgt, vocab); with caches (one for each block) tgt_ids holds only the new positions."""
        raise TypeError(f"{type(self).__name__} has no decoder")

    def forward(self, src_ids: Tensor, tgt_ids: Tensor, real: Tensor | None = None) -> Tensor:
        memory, memory_mask = self.encode(src_ids, real)
        return self.decode(tgt_ids, memory, memory_mask)

    def check_source(self, src_ids: Tensor, real: Tensor | None) -> Tensor:
        check_text_ids(src_ids, self.config.vocab_size)
        if real is None:
            real = torch.ones_like(src_ids, dtype=torch.bool)  # (batch, src)
        check_real(real, tuple(src_ids.shape))
        return real[:, None, None, :]  # (batch, 1, 1, src)

    def new_caches(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.decoder_blocks]

    def shift_right(self, targets: Tensor) -> Tensor:
        """What the decoder reads while it must say `targets` (batch, tgt): start_id, then all but the last of them."""
        shifted = F.pad(targets[:, :-1], (1, 0), value=self.config.start_id)  # (batch, tgt)
        return shifted.masked_fill(shifted == IGNORE, self.config.pad_id)  # (batch, tgt)

    def generate(
        self,
        src_ids: Tensor,
        sampling: SamplingConfig,
        real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Write an answer to each source: ids (batch, at most max_new_tokens), pad_id after the end.

        The source is read once; its keys and values, and those of the answer so far, are cached.
        """
        with torch.no_grad():
            memory, memory_mask = self.encode(src_ids, real)
        caches, start = self.new_caches(), src_ids.new_full((len(src_ids), 1), self.config.start_id)

        def next_logits(new_ids: Tensor) -> Tensor:
            return self.decode(new_ids, memory, memory_mask, caches)[:, -1]

        return extend(next_logits, start, sampling, self.config.eos_id, self.config.pad_id, generator)


# T5: the parts that differ from topic 04


class T5Norm(nn.Module):
    """Divide by the root of the mean square, then scale: no mean is subtracted, no bias added (Zhang, Sennrich 2019).

    Shapes: any (..., d_model) to the same.
    """

    def __init__(self, d_model: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.norm_eps))


class T5FeedForward(nn.Module):
    """Two maps without bias around ReLU; (..., d_model) to the same."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(self.up_proj(x).relu()))


class GatedFeedForward(T5FeedForward):
    """A second map, through GELU's tanh approximation, decides how much of each hidden unit passes (Shazeer 2020)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # (batch, seq, d_ff)
        return self.down_proj(self.dropout(gate * self.up_proj(x)))  # (batch, seq, d_model)


FEED_FORWARD = {"relu": T5FeedForward, "gated-gelu": GatedFeedForward}


class T5Attention(MultiHeadAttention):
    """Multi-head attention without biases and without 1/sqrt(d_head), whose heads may be wider than d_model / n_heads.

    The missing factor stands in the initial weights instead: queries start d_head times smaller in variance.
    """

    def __init__(self, config: T5Config) -> None:
        nn.Module.__init__(self)  # the parent's projections are square
        self.d_model, self.n_heads, self.d_head, self.scale = config.d_model, config.n_heads, config.d_head, 1.0
        d_inner = config.n_heads * config.d_head
        self.q_proj = nn.Linear(config.d_model, d_inner, bias=False)
        self.k_proj = nn.Linear(config.d_model, d_inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)


class T5SelfAttention(T5Attention, RelativeAttention):
    """T5's attention with topic 04's relative positions; all layers of a stack share one table."""

    def __init__(self, config: T5Config, relative_bias: nn.Embedding, bidirectional: bool) -> None:
        super().__init__(config)
        self.n_buckets, self.max_distance, self.bidirectional = config.n_buckets, config.max_distance, bidirectional
        self.relative_bias = relative_bias


class T5EncoderLayer(EncoderLayer):
    """Topic 04's pre-norm layer around T5's parts."""

    def __init__(self, config: T5Config, relative_bias: nn.Embedding, bidirectional: bool = True) -> None:
        nn.Module.__init__(self)  # the parent would build parts of other shapes
        self.norm_order = "pre"
        self.self_attn = T5SelfAttention(config, relative_bias, bidirectional)
        self.ffn = FEED_FORWARD[config.ffn](config)
        self.attn_norm, self.ffn_norm = (T5Norm(config.d_model, config.norm_eps) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)


class T5DecoderLayer(T5EncoderLayer, DecoderLayer):
    """Topic 04's decoder layer around T5's parts; positions stand in self-attention alone."""

    def __init__(self, config: T5Config, relative_bias: nn.Embedding) -> None:
        super().__init__(config, relative_bias, bidirectional=False)
        self.cross_attn, self.cross_norm = T5Attention(config), T5Norm(config.d_model, config.norm_eps)


class T5(EncoderDecoder):
    """T5 (Raffel et al. 2020, section 2.1): pre-norm stacks with relative positions and one matrix of embeddings."""

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    config_class: ClassVar[type] = T5Config
    config_names: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "d_head": "d_kv",
        "d_ff": "d_ff",
        "n_encoder_layers": "num_layers",
        "n_decoder_layers": "num_decoder_layers",
        "n_heads": "num_heads",
        "n_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "dropout": "dropout_rate",
        "norm_eps": "layer_norm_epsilon",
        "ffn": "feed_forward_proj",
        "pad_id": "pad_token_id",
        "eos_id": "eos_token_id",
        "start_id": "decoder_start_token_id",
    }
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    fixed: ClassVar[dict[str, tuple]] = {"is_encoder_decoder": (True,), "is_decoder": (False,)}

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model)
        biases = [nn.Embedding(config.n_buckets, config.n_heads) for _ in range(2)]
        self.encoder_blocks = nn.ModuleList(T5EncoderLayer(config, biases[0]) for _ in range(config.n_encoder_layers))
        self.decoder_blocks = nn.ModuleList(T5DecoderLayer(config, biases[1]) for _ in range(config.n_decoder_layers))
        self.encoder_norm, self.decoder_norm = (T5Norm(config.d_model, config.norm_eps) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Every map keeps the variance of its input at 1, queries excepted, which carry the missing 1/sqrt(d_head)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0 if module is self.token_emb else self.config.d_model**-0.5)
        for module in self.modules():
            if isinstance(module, T5Attention):
                nn.init.normal_(module.q_proj.weight, std=(self.config.d_model * self.config.d_head) ** -0.5)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=1.0)

    def encode(self, src_ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        memory_mask = self.check_source(src_ids, real)  # (batch, 1, 1, src)
        x = self.dropout(self.token_emb(src_ids))  # (batch, src, d_model)
        for block in self.encoder_blocks:
            x = block(x, memory_mask)  # (batch, src, d_model)
        return self.dropout(self.encoder_norm(x)), memory_mask

    def decode(
        self, tgt_ids: Tensor, memory: Tensor, memory_mask: Tensor, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        check_text_ids(tgt_ids, self.config.vocab_size)
        start, length = len(caches[0]) if caches else 0, tgt_ids.shape[1]
        mask = causal_mask(length, start + length, tgt_ids.device)
        x = self.dropout(self.token_emb(tgt_ids))  # (batch, tgt, d_model)
        for block, cache in zip(self.decoder_blocks, caches or [None] * len(self.decoder_blocks), strict=True):
            x = block(x, memory, mask, memory_mask, cache)  # (batch, tgt, d_model)
        x = self.dropout(self.decoder_norm(x))  # (batch, tgt, d_model)
        if self.config.scale_outputs:
            x = x * self.config.d_model**-0.5  # (batch, tgt, d_model)
        logits = F.linear(x, (self.lm_head or self.token_emb).weight)  # (batch, tgt, vocab)
        return logits

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> T5Config:
        """In the files of version 1.1 tie_word_embeddings is false and means two things: an own output, no scaling.

        Newer files give scale_decoder_outputs and always say that they tie; whether they do shows in the tensors.
        """
        if config.get("num_decoder_layers") is None:
            config = config | {"num_decoder_layers": config.get("num_layers")}
        found = super().config_of(config, tensors)
        scale = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        return replace(found, scale_outputs=scale is not False, tie_embeddings="lm_head.weight" not in tensors)

    def file_config(self) -> dict:
        scale = self.config.scale_outputs
        return super().file_config() | {"tie_word_embeddings": scale, "scale_decoder_outputs": scale}

    @classmethod
    def layout(cls, config: T5Config) -> Layout:
        tensors = [FileTensor("shared.weight", ("token_emb.weight",))]
        ffn_names = {"wi": "up_proj"} if config.ffn == "relu" else {"wi_0": "gate_proj", "wi_1": "up_proj"}
        attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        for stack, n_layers in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
            tensors.append(FileTensor(f"{stack}.final_layer_norm.weight", (f"{stack}_norm.weight",)))
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            tensors.append(FileTensor(table, (f"{stack}_blocks.0.self_attn.relative_bias.weight",)))
            parts = [("SelfAttention", attention, "self_attn", "attn_norm")]
            if stack == "decoder":
                parts.append(("EncDecAttention", attention, "cross_attn", "cross_norm"))
            parts.append(("DenseReluDense", ffn_names | {"wo": "down_proj"}, "ffn", "ffn_norm"))
            pairs = {}
            for index in range(n_layers):
                for place, (theirs, names, ours, norm) in enumerate(parts):
                    layer, block = f"{stack}.block.{index}.layer.{place}", f"{stack}_blocks.{index}"
                    pairs[f"{layer}.layer_norm"] = f"{block}.{norm}"
                    pairs |= {f"{layer}.{theirs}.{key}": f"{block}.{ours}.{name}" for key, name in names.items()}
            tensors += file_tensors(pairs, ("weight",))
        tied = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
        if not config.tie_embeddings:
            tensors.append(FileTensor("lm_head.weight", ("lm_head.weight",)))
        unused = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # in the first files
        return Layout(tuple(tensors), tied, (unused,))


# BART: the layers of Vaswani et al. 2017 with learned positions, pretrained to restore a damaged text


@dataclass(frozen=True)
class BartConfig:
    """The shape of a BART; the defaults are those of the published base model."""

    vocab_size: int = 50_265  # different tokens
    max_seq_len: int = 1024  # most positions, in the source and in the target
    d_model: int = 768  # width of the residual stream
    n_encoder_layers: int = 6  # blocks of the encoder
    n_decoder_layers: int = 6  # blocks of the decoder
    n_heads: int = 12  # attention heads; must divide d_model
    d_ff: int = 3072  # width inside the feed-forward networks
    dropout: float = 0.1  # fraction of activations zeroed in training
    pad_id: int = 1  # filler of shorter rows
    eos_id: int = 2  # token that ends a text
    start_id: int = 2  # first input of the decoder

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_seq_len", "d_model", "n_encoder_layers", "n_decoder_layers", "n_heads", "d_ff")
        check_range(self, *sizes, least=1)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "pad_id", "eos_id", "start_id", least=0, below=self.vocab_size)
        check_heads(self.d_model, self.n_heads)


class Bart(EncoderDecoder):
    """BART (Lewis et al. 2020, section 2.1): post-norm layers without a last norm, GELU, normalised embeddings.

    The first two rows of its position tables are unused, as in fairseq, where positions start after the padding's id.
    `generate` writes what is likeliest: it does not force a first or last token on a text, as forced_bos_token_id and
    forced_eos_token_id of a folder ask of Hugging Face's.
    Raises ValueError for more than max_seq_len positions.
    """

    unused_positions = 2
    model_type: ClassVar[str] = "bart"
    architecture: ClassVar[str] = "BartForConditionalGeneration"
    config_class: ClassVar[type] = BartConfig
    config_names: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "d_model",
        "n_encoder_layers": "encoder_layers",
        "n_decoder_layers": "decoder_layers",
        "n_heads": "encoder_attention_heads",
        "d_ff": "encoder_ffn_dim",
        "dropout": "dropout",
        "pad_id": "pad_token_id",
        "eos_id": "eos_token_id",
        "start_id": "decoder_start_token_id",
    }
    fixed: ClassVar[dict[str, tuple]] = {
        "activation_function": ("gelu",),
        "is_encoder_decoder": (True,),
        "scale_embedding": (False,),
        "tie_word_embeddings": (True,),
    }

    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    absent: ClassVar[dict[str, int]] = {  # the large model's
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
    }

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.d_model, config.n_heads, config.d_ff, config.dropout, "post", "gelu")
        n_positions = self.unused_positions + config.max_seq_len
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        self.src_pos_emb, self.tgt_pos_emb = (LearnedPositions(config.d_model, n_positions) for _ in range(2))
        self.src_norm, self.tgt_norm = LayerNorm(config.d_model), LayerNorm(config.d_model)
        self.encoder_blocks = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.n_encoder_layers))
        self.decoder_blocks = nn.ModuleList(DecoderLayer(*sizes) for _ in range(config.n_decoder_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("logits_bias", torch.zeros(1, config.vocab_size))
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            block.ffn.dropout = nn.Identity()
        init_weights(self)

    def encode(self, src_ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        memory_mask = self.check_source(src_ids, real)  # (batch, 1, 1, src)
        check_length(src_ids.shape[1], 0, self.config.max_seq_len)
        x = self.src_pos_emb(self.token_emb(src_ids), self.unused_positions)  # (batch, src, d_model)
        x = self.dropout(self.src_norm(x))  # (batch, src, d_model)
        for block in self.encoder_blocks:
            x = block(x, memory_mask)  # (batch, src, d_model)
        return x, memory_mask

    def decode(
        self, tgt_ids: Tensor, memory: Tensor, memory_mask: Tensor, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        check_text_ids(tgt_ids, self.config.vocab_size)
        start, length = len(caches[0]) if caches else 0, tgt_ids.shape[1]
        check_length(length, start, self.config.max_seq_len)
        mask = causal_mask(length, start + length, tgt_ids.device)
        x = self.tgt_pos_emb(self.token_emb(tgt_ids), self.unused_positions + start)  # (batch, tgt, d_model)
        x = self.dropout(self.tgt_norm(x))  # (batch, tgt, d_model)
        for block, cache in zip(self.decoder_blocks, caches or [None] * len(self.decoder_blocks), strict=True):
            x = block(x, memory, mask, memory_mask, cache)  # (batch, tgt, d_model)
        logits = F.linear(x, self.token_emb.weight) + self.logits_bias  # (batch, tgt, vocab)
        return logits

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> BartConfig:
        for ours, theirs in (
            ("encoder_attention_heads", "decoder_attention_heads"),
            ("encoder_ffn_dim", "decoder_ffn_dim"),
        ):
            mine, other = config.get(ours), config.get(theirs, config.get(ours))
            if mine != other:
                raise ValueError(f"config.json has {ours}={mine} but {theirs}={other}; they must agree")
        return super().config_of(config, tensors)

    def file_config(self) -> dict:
        config = self.config
        return super().file_config() | {
            "decoder_attention_heads": config.n_heads,
            "decoder_ffn_dim": config.d_ff,
            "attention_dropout": config.dropout,
            "bos_token_id": 0,
            "forced_eos_token_id": None,
        }

    @classmethod
    def layout(cls, config: BartConfig) -> Layout:
        names = {
            "self_attn_layer_norm": "attn_norm",
            "encoder_attn_layer_norm": "cross_norm",
            "final_layer_norm": "ffn_norm",
            "fc1": "ffn.up_proj",
            "fc2": "ffn.down_proj",
        }
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= {f"self_attn.{part}": f"self_attn.{part}", f"encoder_attn.{part}": f"cross_attn.{part}"}
        tensors = [FileTensor("model.shared.weight", ("token_emb.weight",))]
        tensors.append(FileTensor("final_logits_bias", ("logits_bias",)))
        stacks = (("encoder", "src", config.n_encoder_layers), ("decoder", "tgt", config.n_decoder_layers))
        for stack, side, n_layers in stacks:
            tensors.append(FileTensor(f"model.{stack}.embed_positions.weight", (f"{side}_pos_emb.weight",)))
            tensors += file_tensors({f"model.{stack}.layernorm_embedding": f"{side}_norm"})
            kept = {key: ours for key, ours in names.items() if stack == "decoder" or "encoder_attn" not in key}
            for index in range(n_layers):
                theirs, block = f"model.{stack}.layers.{index}", f"{stack}_blocks.{index}"
                tensors += file_tensors({f"{theirs}.{key}": f"{block}.{ours}" for key, ours in kept.items()})
        copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
        # released as the bare model: "shared.weight" and so on, without the bias
        tied, bare = dict.fromkeys(copies, "model.shared.weight"), ("final_logits_bias",)
        return Layout(tuple(tensors), tied, prefix="model.", optional=bare)


# Span corruption: pure functions of token ids


@dataclass(frozen=True)
class SpanConfig:
    """How much of a text span corruption takes out, and in pieces of what length."""

    noise_share: float = 0.15  # fraction of the tokens that is taken out
    mean_span: float = 3.0  # mean length of a piece, in tokens

    def __post_init__(self) -> None:
        check_range(self, "noise_share", above=0, below=1)
        check_range(self, "mean_span", least=1)


def draw_spans(length: int, config: SpanConfig, generator: torch.Generator) -> list[tuple[int, int]]:
    """Where the pieces of a text of `length` tokens lie: (start, end) pairs in order, with text between them.

    Their number and their total length are fixed, up to rounding; how the total is divided is uniform among all
    divisions into positive parts, and so is how the remaining text is divided into the stretches before the pieces
    (Raffel et al. 2020, section 3.3.4, in the authors' implementation). Raises ValueError for fewer than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"span corruption needs at least 2 tokens, one to keep and one to take out, got {length}")
    n_noise = min(max(round(length * config.noise_share), 1), length - 1)
    n_spans = min(max(round(n_noise / config.mean_span), 1), n_noise, length - n_noise)
    spans, position = [], 0
    kept = random_parts(length - n_noise, n_spans, generator)
    for gap, size in zip(kept, random_parts(n_noise, n_spans, generator), strict=True):
        spans.append((position + gap, position + gap + size))
        position += gap + size
    return spans


def random_parts(total: int, n_parts: int, generator: torch.Generator) -> list[int]:
    """`total` as a sum of n_parts positive whole numbers, every such sum equally likely."""
    cuts = torch.randperm(total - 1, generator=generator, device=generator.device)[: n_parts - 1] + 1
    edges = [0, *sorted(cuts.tolist()), total]
    return [end - start for start, end in zip(edges, edges[1:], strict=False)]


def corrupt_spans(
    token_ids: list[int], spans: list[tuple[int, int]], sentinel_ids: list[int]
) -> tuple[list[int], list[int]]:
    """Replace every span by a sentinel of its own; the target is each sentinel with its span, and one last sentinel.

    Raffel et al. 2020, figure 2. Raises ValueError for spans that overlap, touch or leave the text, for fewer than
    len(spans) + 1 sentinels, for two that are equal, and for a text that contains one.
    """
    if len(sentinel_ids) < len(spans) + 1:
        raise ValueError(f"{len(spans)} spans need {len(spans) + 1} sentinels, got {len(sentinel_ids)}")
    if len(set(sentinel_ids)) < len(sentinel_ids):
        raise ValueError(f"each span needs a sentinel of its own, got {sentinel_ids}")
    if set(token_ids) & set(sentinel_ids):
        raise ValueError(f"the text contains the sentinel {min(set(token_ids) & set(sentinel_ids))}")
    inputs: list[int] = []
    targets: list[int] = []
    position = 0
    for index, ((start, end), sentinel) in enumerate(zip(spans, sentinel_ids, strict=False)):
        if not (position + (index > 0) <= start < end <= len(token_ids)):
            raise ValueError(
                f"span {(start, end)} must lie in 0..{len(token_ids)}, after and apart from those before it"
            )
        inputs += [*token_ids[position:start], sentinel]
        targets += [sentinel, *token_ids[start:end]]
        position = end
    return inputs + token_ids[position:], [*targets, sentinel_ids[len(spans)]]


def restore_spans(inputs: list[int], targets: list[int], sentinel_ids: list[int]) -> list[int]:
    """The text that `corrupt_spans` took apart. What a model wrote for a sentinel that it never wrote is empty."""
    known, found, current = set(sentinel_ids), {}, None
    for token in targets:
        if token in known:
            current = token
        elif current is not None:
            found.setdefault(current, []).append(token)
    return [token for index in inputs for token in (found.get(index, []) if index in known else [index])]


def infill_spans(token_ids: list[int], spans: list[tuple[int, int]], mask_id: int) -> list[int]:
    """BART's text infilling: one and the same mask for every span; the target is the whole text (Lewis et al. 2020)."""
    inputs, _ = corrupt_spans(token_ids, spans, [-1 - index for index in range(len(spans) + 1)])
    return [mask_id if token < 0 else token for token in inputs]
