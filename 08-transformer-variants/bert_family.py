"""Topic 08 - The BERT family: encoders that learn from masked, reordered and replaced tokens.

from bert_family import BertForMaskedLM
model = BertForMaskedLM.from_pretrained("path/to/bert")    # any folder of Hugging Face's BERT

BERT comes first, whole; RoBERTa, ALBERT and ELECTRA are the lines in which they differ from it.

Papers: Devlin et al. 2019 (arXiv 1810.04805), BERT; Liu et al. 2019 (arXiv 1907.11692), RoBERTa; Lan et al. 2020 (arXiv
1909.11942), ALBERT; Clark et al. 2020 (arXiv 2003.10555), ELECTRA.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import check_heads
from gpt2 import TanhFeedForward, check_real, check_text_ids, init_weights, set_norm_eps
from huggingface_folders import FileTensor, FolderModel, Layout, file_tensors
from sequence_modeling import IGNORE, check_token_ids, sample_ids
from transformer_architecture import EncoderLayer, LayerNorm, LearnedPositions, check_length
from workbench import check_range


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT; the defaults are those of the published base model."""

    vocab_size: int = 30_522  # different tokens
    max_seq_len: int = 512  # most positions
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # blocks
    n_heads: int = 12  # attention heads; must divide d_model
    d_ff: int = 3072  # width inside the feed-forward networks
    n_segments: int = 2  # different segments: the first and the second text of a pair
    dropout: float = 0.1  # fraction of activations zeroed in training
    norm_eps: float = 1e-12  # added to the variance in every normalisation
    pad_id: int = 0  # filler of shorter rows
    class_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # what a classification head tells apart

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff", "n_segments", "d_embedding")
        check_range(self, *sizes, least=1)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "norm_eps", above=0)
        check_range(self, "pad_id", least=0, below=self.vocab_size)
        check_heads(self.d_model, self.n_heads)
        if not self.class_names:
            raise ValueError("class_names is empty; a classification head needs at least one class")

    @property
    def d_embedding(self) -> int:
        """Width of the embeddings: BERT's is that of the stream; ALBERT and ELECTRA have a field of this name."""
        return self.d_model


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The shape of a RoBERTa: one segment, another vocabulary; the defaults are those of the published base model."""

    vocab_size: int = 50_265  # different tokens
    n_segments: int = 1  # different segments
    norm_eps: float = 1e-5  # added to the variance in every normalisation
    pad_id: int = 1  # filler of shorter rows; positions start after it


@dataclass(frozen=True)
class AlbertConfig(BertConfig):
    """The shape of an ALBERT; the defaults are those of the published base model (version 2)."""

    vocab_size: int = 30_000  # different tokens
    dropout: float = 0.0  # fraction of activations zeroed in training
    d_embedding: int = 128  # width of the embeddings, mapped to d_model once


@dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """The shape of an ELECTRA; the defaults are those of the published small discriminator."""

    d_model: int = 256  # width of the residual stream
    n_heads: int = 4  # attention heads; must divide d_model
    d_ff: int = 1024  # width inside the feed-forward networks
    d_embedding: int = 128  # width of the embeddings, mapped to d_model where it differs


# BERT: the trunk


class BertLayer(EncoderLayer):
    """An encoder layer with the norm after each sum, as published; dropout stands on the sub-layers' outputs alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.d_model, config.n_heads, config.d_ff, config.dropout, "post", "gelu")
        self.ffn.dropout = nn.Identity()


class BertTrunk(nn.Module):
    """Embeddings of token, position and segment, normalised; then post-norm blocks without a mask for the future.

    Shapes: token_ids (batch, seq) to (batch, seq, d_model); segment_ids likewise, 0 where left out; `real` (batch,
    seq), bool, is False at padding, which is attended by nobody. Raises ValueError for ids outside the vocabulary, more
    than max_seq_len positions and a `real` of another shape.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, d_embedding = config, config.d_embedding
        self.token_emb = nn.Embedding(config.vocab_size, d_embedding, padding_idx=config.pad_id)
        self.pos_emb = LearnedPositions(d_embedding, self.first_position + config.max_seq_len)
        self.segment_emb = nn.Embedding(config.n_segments, d_embedding)
        self.emb_norm, self.dropout = LayerNorm(d_embedding), nn.Dropout(config.dropout)
        self.emb_proj = nn.Linear(d_embedding, config.d_model) if self.has_projection else nn.Identity()
        self.blocks = self.new_blocks()

    first_position = 0

    @property
    def has_projection(self) -> bool:
        return self.config.d_embedding != self.config.d_model

    def new_blocks(self) -> nn.ModuleList:
        return nn.ModuleList(BertLayer(self.config) for _ in range(self.config.n_layers))

    def layers(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        return list(self.blocks)

    def add_positions(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x (batch, seq, d_embedding) plus the embedding of every position; padding counts as a position."""
        return self.pos_emb(x)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        check_text_ids(token_ids, self.config.vocab_size)
        check_length(token_ids.shape[1], 0, self.config.max_seq_len)
        segment_ids = torch.zeros_like(token_ids) if segment_ids is None else segment_ids  # (batch, seq)
        if not token_ids.is_meta:
            check_token_ids(segment_ids, self.config.n_segments)
        mask = None  # quicker than one that is True everywhere
        if real is not None:
            check_real(real, tuple(token_ids.shape))
            mask = real[:, None, None, :]  # (batch, 1, 1, seq)
        x = self.token_emb(token_ids) + self.segment_emb(segment_ids)  # (batch, seq, d_embedding)
        x = self.dropout(self.emb_norm(self.add_positions(x, token_ids)))  # (batch, seq, d_embedding)
        x = self.emb_proj(x)  # (batch, seq, d_model)
        for block in self.layers():
            x = block(x, mask)  # (batch, seq, d_model)
        return x


# BERT: the heads


class MaskedLMHead(nn.Module):
    """Predict tokens from hidden states: a map, GELU, a norm, then products with the token embeddings plus a bias.

    Shapes: (batch, seq, d_model), embedding (vocab, d_embedding) to logits (batch, seq, vocab).
    """

    def __init__(self, config: BertConfig, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate  # of GELU: none or tanh
        self.proj, self.norm = nn.Linear(config.d_model, config.d_embedding), LayerNorm(config.d_embedding)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.proj(x), approximate=self.approximate))  # (batch, seq, d_embedding)
        logits = F.linear(x, embedding, self.bias)  # (batch, seq, vocab)
        return logits


class Pooler(nn.Module):
    """tanh of a map of the first token's state: what a whole text is judged by; (batch, seq, d) to (batch, d)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x[:, 0]).tanh()  # (batch, d_model)


BERT_BLOCK = {  # a layer's name in the files -> ours
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "attn_norm",
    "intermediate.dense": "ffn.up_proj",
    "output.dense": "ffn.down_proj",
    "output.LayerNorm": "ffn_norm",
}


class BertModel(FolderModel):
    """What the members of the family share: a trunk, their config, the names of the trunk in files."""

    model_type: ClassVar[str] = "bert"
    config_class: ClassVar[type] = BertConfig
    trunk_class: ClassVar[type] = BertTrunk
    config_names: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "n_segments": "type_vocab_size",
        "dropout": "hidden_dropout_prob",
        "norm_eps": "layer_norm_eps",
        "pad_id": "pad_token_id",
    }
    fixed: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("gelu",),
        "is_decoder": (False,),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    }
    block_names: ClassVar[dict[str, str]] = BERT_BLOCK
    block_path: ClassVar[str] = "encoder.layer.{}"
    heads: ClassVar[dict[str, str]] = {}  # further layers: name in the files -> ours
    head_bias: ClassVar[str] = ""  # name in the files of the bias of a MaskedLMHead
    tied: ClassVar[tuple[str, ...]] = ()  # names in the files that may repeat the token embedding
    other_heads: ClassVar[tuple[str, ...]] = ()  # patterns of names that belong to heads which this class has not

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = self.trunk_class(config)
        self.add_heads()
        init_weights(self)
        set_norm_eps(self, config.norm_eps)

    def add_heads(self) -> None:
        """Make what follows the trunk."""

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> Any:
        names, n_classes = config.get("id2label"), config.get("num_labels")
        found = super().config_of(config, tensors)
        if names is None and type(n_classes) is int:  # as the first files say it
            names = {str(i): f"LABEL_{i}" for i in range(n_classes)}
        if names is None:
            return found
        if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
            raise ValueError(f"config.json has id2label={names!r}; it must map '0', '1', ... to names")
        return type(found)(**(vars(found) | {"class_names": tuple(str(names[str(i)]) for i in range(len(names)))}))

    def file_config(self) -> dict:
        names = self.config.class_names
        labels = {"id2label": {str(i): name for i, name in enumerate(names)}}
        labels["label2id"] = {name: i for i, name in enumerate(names)}
        return super().file_config() | labels | {"attention_probs_dropout_prob": self.config.dropout}

    @classmethod
    def layout(cls, config: BertConfig) -> Layout:
        base, embeddings = cls.model_type, f"{cls.model_type}.embeddings"
        tensors = [
            FileTensor(f"{embeddings}.word_embeddings.weight", ("trunk.token_emb.weight",)),
            FileTensor(f"{embeddings}.position_embeddings.weight", ("trunk.pos_emb.weight",)),
            FileTensor(f"{embeddings}.token_type_embeddings.weight", ("trunk.segment_emb.weight",)),
            *file_tensors({f"{embeddings}.LayerNorm": "trunk.emb_norm"}),
            *cls.projection_layout(config),
        ]
        for index in range(cls.n_blocks(config)):
            theirs, ours = f"{base}.{cls.block_path.format(index)}", f"trunk.blocks.{index}"
            tensors += file_tensors({f"{theirs}.{key}": f"{ours}.{name}" for key, name in cls.block_names.items()})
        tensors += file_tensors(cls.heads)
        tied = dict.fromkeys(cls.tied, f"{embeddings}.word_embeddings.weight")
        if cls.head_bias:
            tensors.append(FileTensor(cls.head_bias, ("mlm_head.bias",)))
            tied |= {key.removesuffix("weight") + "bias": cls.head_bias for key in cls.tied}
        return Layout(tuple(tensors), tied, (rf"({base}\.)?embeddings\.position_ids", *cls.other_heads), f"{base}.")

    @classmethod
    def n_blocks(cls, config: BertConfig) -> int:
        """Blocks that the file holds."""
        return config.n_layers

    @classmethod
    def projection_layout(cls, config: BertConfig) -> list[FileTensor]:
        """The map from the embeddings to the stream, where there is one."""
        return []


class BertForMaskedLM(BertModel):
    """BERT that fills in masked tokens: token_ids, segment_ids, real (batch, seq) to logits (batch, seq, vocab)."""

    architecture: ClassVar[str] = "BertForMaskedLM"
    heads: ClassVar[dict[str, str]] = {
        "cls.predictions.transform.dense": "mlm_head.proj",
        "cls.predictions.transform.LayerNorm": "mlm_head.norm",
    }
    head_bias: ClassVar[str] = "cls.predictions.bias"
    tied: ClassVar[tuple[str, ...]] = ("cls.predictions.decoder.weight",)
    other_heads: ClassVar[tuple[str, ...]] = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")

    def add_heads(self) -> None:
        self.mlm_head = MaskedLMHead(self.config)

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        x = self.trunk(token_ids, segment_ids, real)  # (batch, seq, d_model)
        return self.mlm_head(x, self.trunk.token_emb.weight)  # (batch, seq, vocab)


class BertForPreTraining(BertForMaskedLM):
    """BERT with both of its objectives: masked tokens, and whether the second segment followed the first.

    Returns logits (batch, seq, vocab) and (batch, 2); class 0 means "it followed", as in Hugging Face's files.
    """

    architecture: ClassVar[str] = "BertForPreTraining"
    heads: ClassVar[dict[str, str]] = BertForMaskedLM.heads | {
        "bert.pooler.dense": "pooler.proj",
        "cls.seq_relationship": "pair_head",
    }
    other_heads: ClassVar[tuple[str, ...]] = ()

    def add_heads(self) -> None:
        super().add_heads()
        self.pooler, self.pair_head = Pooler(self.config.d_model), nn.Linear(self.config.d_model, 2)

    def forward(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.trunk(token_ids, segment_ids, real)  # (batch, seq, d_model)
        return self.mlm_head(x, self.trunk.token_emb.weight), self.pair_head(self.pooler(x))


class BertForSequenceClassification(BertModel):
    """BERT that judges a whole text: logits (batch, classes) from the pooled first token.

    To go on from pretraining: `classifier.trunk, classifier.pooler = pretrained.trunk, pretrained.pooler`.
    """

    architecture: ClassVar[str] = "BertForSequenceClassification"
    heads: ClassVar[dict[str, str]] = {"bert.pooler.dense": "pooler.proj", "classifier": "class_head"}

    def add_heads(self) -> None:
        self.pooler, self.dropout = Pooler(self.config.d_model), nn.Dropout(self.config.dropout)
        self.class_head = nn.Linear(self.config.d_model, len(self.config.class_names))

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        pooled = self.pooler(self.trunk(token_ids, segment_ids, real))  # (batch, d_model)
        return self.class_head(self.dropout(pooled))  # (batch, classes)


# RoBERTa: another count of positions, no second objective


class RobertaTrunk(BertTrunk):
    """Positions count real tokens alone and start after pad_id, where padding stays (fairseq's convention)."""

    @property
    def first_position(self) -> int:
        return self.config.pad_id + 1

    def add_positions(self, x: Tensor, token_ids: Tensor) -> Tensor:
        real = (token_ids != self.config.pad_id).long()  # (batch, seq)
        positions = real.cumsum(dim=1) * real + self.config.pad_id  # (batch, seq)
        return x + F.embedding(positions, self.pos_emb.weight, self.config.pad_id)  # (batch, seq, d_embedding)


class RobertaForMaskedLM(BertForMaskedLM):
    """RoBERTa: BERT's architecture, trained longer on masked tokens alone.

    Positions are counted by pad_id, as Hugging Face does; who is attended to, `real` alone says. In files
    max_position_embeddings counts the unused places too: max_seq_len + pad_id + 1.
    """

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaForMaskedLM"
    config_class: ClassVar[type] = RobertaConfig
    trunk_class: ClassVar[type] = RobertaTrunk
    heads: ClassVar[dict[str, str]] = {"lm_head.dense": "mlm_head.proj", "lm_head.layer_norm": "mlm_head.norm"}
    head_bias: ClassVar[str] = "lm_head.bias"
    tied: ClassVar[tuple[str, ...]] = ("lm_head.decoder.weight",)
    other_heads: ClassVar[tuple[str, ...]] = (r"roberta\.pooler\..*",)
    absent: ClassVar[dict[str, Any]] = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> RobertaConfig:
        found = super().config_of(config, tensors)
        return type(found)(**(vars(found) | {"max_seq_len": found.max_seq_len - found.pad_id - 1}))

    def file_config(self) -> dict:
        places = self.config.max_seq_len + self.config.pad_id + 1
        return super().file_config() | {"max_position_embeddings": places}


# ALBERT: one block for all layers, narrow embeddings, the order of two segments


class AlbertLayer(BertLayer):
    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.ffn = TanhFeedForward(config.d_model, config.d_ff)


class AlbertTrunk(BertTrunk):
    """The same block n_layers times: deep as BERT, with the parameters of one layer (Lan et al. 2020, 3.1)."""

    has_projection = True

    def new_blocks(self) -> nn.ModuleList:
        return nn.ModuleList([AlbertLayer(self.config)])

    def layers(self) -> list[nn.Module]:
        return [self.blocks[0]] * self.config.n_layers


class AlbertForMaskedLM(BertForMaskedLM):
    """ALBERT that fills in masked tokens."""

    model_type: ClassVar[str] = "albert"
    architecture: ClassVar[str] = "AlbertForMaskedLM"
    config_class: ClassVar[type] = AlbertConfig
    trunk_class: ClassVar[type] = AlbertTrunk
    config_names: ClassVar[dict[str, str]] = BertModel.config_names | {"d_embedding": "embedding_size"}
    fixed: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("gelu_new",),
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    }
    absent: ClassVar[dict[str, Any]] = {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16_384}
    block_names: ClassVar[dict[str, str]] = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.dense": "self_attn.out_proj",
        "attention.LayerNorm": "attn_norm",
        "ffn": "ffn.up_proj",
        "ffn_output": "ffn.down_proj",
        "full_layer_layer_norm": "ffn_norm",
    }
    block_path: ClassVar[str] = "encoder.albert_layer_groups.0.albert_layers.0"
    heads: ClassVar[dict[str, str]] = {
        "predictions.dense": "mlm_head.proj",
        "predictions.LayerNorm": "mlm_head.norm",
    }
    head_bias: ClassVar[str] = "predictions.bias"
    tied: ClassVar[tuple[str, ...]] = ("predictions.decoder.weight",)
    other_heads: ClassVar[tuple[str, ...]] = (r"albert\.pooler\..*", r"sop_classifier\..*")

    def add_heads(self) -> None:
        self.mlm_head = MaskedLMHead(self.config, "tanh")

    @classmethod
    def n_blocks(cls, config: BertConfig) -> int:
        return 1

    @classmethod
    def projection_layout(cls, config: BertConfig) -> list[FileTensor]:
        return file_tensors({"albert.encoder.embedding_hidden_mapping_in": "trunk.emb_proj"})


class AlbertForPreTraining(AlbertForMaskedLM):
    """ALBERT with both objectives: masked tokens, and whether two neighbouring segments stand in their true order.

    Returns logits (batch, seq, vocab) and (batch, 2); class 0 means "in order".
    """

    architecture: ClassVar[str] = "AlbertForPreTraining"
    heads: ClassVar[dict[str, str]] = AlbertForMaskedLM.heads | {
        "albert.pooler": "pooler.proj",
        "sop_classifier.classifier": "pair_head",
    }
    other_heads: ClassVar[tuple[str, ...]] = ()

    def add_heads(self) -> None:
        super().add_heads()
        self.pooler, self.pair_head = Pooler(self.config.d_model), nn.Linear(self.config.d_model, 2)

    forward = BertForPreTraining.forward


# ELECTRA: a small generator proposes tokens, the discriminator finds out which were replaced


class ElectraModel(BertModel):
    """What generator and discriminator share: embeddings that may be narrower than the stream."""

    model_type: ClassVar[str] = "electra"
    config_class: ClassVar[type] = ElectraConfig
    config_names: ClassVar[dict[str, str]] = BertModel.config_names | {"d_embedding": "embedding_size"}

    @classmethod
    def projection_layout(cls, config: BertConfig) -> list[FileTensor]:
        if config.d_embedding == config.d_model:
            return []
        return file_tensors({"electra.embeddings_project": "trunk.emb_proj"})


class ElectraGenerator(ElectraModel):
    """A masked language model, smaller than the discriminator: logits (batch, seq, vocab)."""

    architecture: ClassVar[str] = "ElectraForMaskedLM"
    heads: ClassVar[dict[str, str]] = {
        "generator_predictions.dense": "mlm_head.proj",
        "generator_predictions.LayerNorm": "mlm_head.norm",
    }
    head_bias: ClassVar[str] = "generator_lm_head.bias"
    tied: ClassVar[tuple[str, ...]] = ("generator_lm_head.weight",)
    add_heads, forward = BertForMaskedLM.add_heads, BertForMaskedLM.forward


class ElectraDiscriminator(ElectraModel):
    """Says of every token whether it was replaced: logits (batch, seq), > 0 for "replaced"."""

    architecture: ClassVar[str] = "ElectraForPreTraining"
    heads: ClassVar[dict[str, str]] = {
        "discriminator_predictions.dense": "rtd_proj",
        "discriminator_predictions.dense_prediction": "rtd_head",
    }

    def add_heads(self) -> None:
        self.rtd_proj, self.rtd_head = (
            nn.Linear(self.config.d_model, self.config.d_model),
            nn.Linear(self.config.d_model, 1),
        )

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        x = self.trunk(token_ids, segment_ids, real)  # (batch, seq, d_model)
        return self.rtd_head(F.gelu(self.rtd_proj(x))).squeeze(-1)  # (batch, seq)


class ReplacedTokens(NamedTuple):
    """What one pass of an Electra gives, each (batch, seq) but the first, which has a vocabulary axis."""

    mlm_logits: Tensor
    corrupted_ids: Tensor
    replaced: Tensor  # bool: where corrupted_ids differ from the text
    rtd_logits: Tensor


class Electra(nn.Module):
    """Generator and discriminator trained together, with one embedding of tokens, positions and segments for both.

    Clark et al. 2020, section 2: the generator fills in the masked tokens, a sample of what it proposes replaces them,
    and the discriminator judges every position. No gradient flows through the sample. Raises ValueError if the two
    have embeddings of different shapes.
    """

    def __init__(self, generator: ElectraGenerator, discriminator: ElectraDiscriminator) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        for name in ("token_emb", "pos_emb", "segment_emb"):
            mine, shared = (getattr(model.trunk, name) for model in (generator, discriminator))
            if mine.weight.shape != shared.weight.shape:
                shapes = f"{tuple(mine.weight.shape)} and {tuple(shared.weight.shape)}"
                raise ValueError(f"generator and discriminator share {name}, but theirs have shapes {shapes}")
            setattr(generator.trunk, name, shared)

    def forward(
        self,
        masked_ids: Tensor,
        targets: Tensor,
        real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ReplacedTokens:
        """masked_ids and targets (batch, seq) as `mask_tokens` makes them; `generator` draws the replacements."""
        mlm_logits = self.generator(masked_ids, None, real)  # (batch, seq, vocab)
        chosen = targets != IGNORE  # (batch, seq)
        proposals = sample_ids(mlm_logits[chosen].detach(), 1.0, generator)[:, 0]  # (chosen)
        text_ids = torch.where(chosen, targets, masked_ids)  # (batch, seq)
        corrupted_ids = text_ids.masked_scatter(chosen, proposals)  # (batch, seq)
        rtd_logits = self.discriminator(corrupted_ids, None, real)  # (batch, seq)
        return ReplacedTokens(mlm_logits, corrupted_ids, corrupted_ids != text_ids, rtd_logits)


def electra_loss(
    output: ReplacedTokens, targets: Tensor, real: Tensor | None = None, rtd_weight: float = 50.0
) -> Tensor:
    """Mean loss of the generator on masked tokens plus rtd_weight times the discriminator's on all (section 3.1).

    The discriminator's binary loss is small beside the generator's, hence the weight of 50.
    """
    mlm = F.cross_entropy(output.mlm_logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    every = F.binary_cross_entropy_with_logits(
        output.rtd_logits, output.replaced.to(output.rtd_logits), reduction="none"
    )
    return mlm + rtd_weight * (every.mean() if real is None else every[real].mean())


# The objectives: pure functions of token ids, with a generator of their own


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens a masked language model must predict, and what it sees in their place."""

    mask_rate: float = 0.15  # fraction of the tokens to predict
    mask_share: float = 0.8  # of these, the fraction that becomes <mask>
    random_share: float = 0.1  # of these, the fraction that becomes a random token; the rest stays

    def __post_init__(self) -> None:
        check_range(self, "mask_rate", above=0, most=1)
        check_range(self, "mask_share", "random_share", least=0, most=1)
        if self.mask_share + self.random_share > 1 + 1e-9:
            total = self.mask_share + self.random_share
            raise ValueError(f"mask_share + random_share = {total:g} exceeds 1; lower one of them")


def mask_tokens(
    token_ids: Tensor,
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int],
    config: MaskingConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """What a masked language model sees and what it must say (Devlin et al. 2019, section 3.1), each (batch, seq).

    Every token outside `special_ids` is chosen with probability mask_rate; its target is the token, all other targets
    are -100. A chosen token becomes mask_id, or an ordinary token drawn uniformly (it may be the same one), or stays:
    so the model cannot tell which tokens it is judged on, and its states are good at real tokens too.
    """
    device = token_ids.device
    special = torch.tensor(sorted({*special_ids, mask_id}), device=device)
    everyone = torch.arange(vocab_size, device=device)
    ordinary = everyone[~torch.isin(everyone, special)]  # (ordinary)
    if not len(ordinary):
        raise ValueError(f"all {vocab_size} tokens are special; there is nothing to mask")
    check_token_ids(token_ids, vocab_size)
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id={mask_id} must be in 0..{vocab_size - 1}, the ids of the vocabulary")
    lots = torch.rand(2, *token_ids.shape, generator=generator, device=generator.device).to(device)
    drawn = torch.randint(len(ordinary), token_ids.shape, generator=generator, device=generator.device).to(device)
    chosen = (lots[0] < config.mask_rate) & ~torch.isin(token_ids, special)  # (batch, seq)
    hidden = chosen & (lots[1] < config.mask_share)  # (batch, seq)
    swapped = chosen & ~hidden & (lots[1] < config.mask_share + config.random_share)  # (batch, seq)
    inputs = torch.where(swapped, ordinary[drawn], token_ids.masked_fill(hidden, mask_id))  # (batch, seq)
    return inputs, token_ids.masked_fill(~chosen, IGNORE)


def next_sentence(documents: list[list[list[int]]], rng: random.Random) -> tuple[list[int], list[int], int]:
    """Two sentences and 0 if the second follows the first, or 1 if it is from another document, each half of the time.

    `documents` are lists of sentences, which are lists of token ids. Devlin et al. 2019, section 3.1.
    """
    first, second = neighbours(documents, rng)
    if rng.random() < 0.5:
        return first, second, 0
    if len(documents) < 2:
        raise ValueError("a sentence from another document needs at least 2 documents")
    others = [document for document in documents if second not in document] or documents
    other = others[int(rng.random() * len(others))]
    return first, other[int(rng.random() * len(other))], 1


def sentence_order(documents: list[list[list[int]]], rng: random.Random) -> tuple[list[int], list[int], int]:
    """Two neighbouring sentences and 0, or the same two in the wrong order and 1 (Lan et al. 2020, section 3.1).

    Both come from one document, so the topic gives nothing away: what made the next sentence easy to guess.
    """
    first, second = neighbours(documents, rng)
    return (first, second, 0) if rng.random() < 0.5 else (second, first, 1)


PAIR_OBJECTIVES: dict[str, Callable] = {"next sentence": next_sentence, "sentence order": sentence_order}


def neighbours(documents: list[list[list[int]]], rng: random.Random) -> tuple[list[int], list[int]]:
    long_enough = [document for document in documents if len(document) > 1]
    if not long_enough:
        raise ValueError("no document has two sentences; a pair needs neighbours")
    document = long_enough[int(rng.random() * len(long_enough))]
    index = int(rng.random() * (len(document) - 1))
    return document[index], document[index + 1]


def join_pair(first: list[int], second: list[int], cls_id: int, sep_id: int) -> tuple[list[int], list[int]]:
    """Ids of <cls> first <sep> second <sep>, and the segment of each: 0 up to the first <sep>, then 1."""
    token_ids = [cls_id, *first, sep_id, *second, sep_id]
    return token_ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)
