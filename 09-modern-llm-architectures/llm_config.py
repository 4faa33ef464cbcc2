"""Topic 09 - The config of a model, and the same facts as the config.json of five families of Hugging Face's library.

Our names are one vocabulary; those of the files differ from family to family and from year to year, and stay here.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_folders import CONFIG, FileTensor, Layout, config_from_file, read_json
from latent_attention import LatentConfig
from llm_layers import RopeScaling
from workbench import check_name, check_range


@dataclass(frozen=True)
class ExpertConfig:
    """The experts of a model that has some."""

    n_experts: int = 8  # feed-forward networks to choose from in each layer
    n_active_experts: int = 2  # networks that each token visits
    d_expert: int = 256  # hidden width of one expert
    d_shared: int = 0  # hidden width of a network that every token visits besides; 0 for none
    n_dense_layers: int = 0  # first layers that keep an ordinary network
    router: Literal["softmax", "sigmoid"] = "softmax"  # Mixtral's router or DeepSeek-V3's
    n_groups: int = 1  # groups of experts, for the sigmoid router
    n_active_groups: int = 1  # groups that a token may visit
    scale: float = 1.0  # multiplies the sigmoid router's weights
    capacity_factor: float | None = None  # visits that an expert takes, as a share of its even load; None: all

    def __post_init__(self) -> None:
        check_range(self, "n_experts", "n_active_experts", "d_expert", "n_groups", "n_active_groups", least=1)
        check_range(self, "d_shared", "n_dense_layers", least=0)
        if self.n_active_experts > self.n_experts:
            raise ValueError(f"n_active_experts={self.n_active_experts} is more than n_experts={self.n_experts}")
        if self.router == "softmax" and (self.n_groups, self.n_active_groups, self.scale) != (1, 1, 1.0):
            raise ValueError(
                f"n_groups={self.n_groups}, n_active_groups={self.n_active_groups} and scale={self.scale} belong to "
                "the sigmoid router; leave them at 1 or choose router='sigmoid'"
            )


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 2048  # tokens
    d_model: int = 128  # width of the residual stream
    n_layers: int = 4  # blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # heads of keys and values; must divide n_heads
    d_head: int = 32  # width of a head
    d_ff: int = 352  # hidden width of the feed-forward networks
    max_seq_len: int = 512  # longest sequence
    norm_eps: float = 1e-5  # keeps the norms from dividing by 0
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # how longer sequences are read
    use_bias: bool = False  # biases in the projections of attention
    qk_norm: bool = False  # normalise queries and keys within each head
    window_size: int = 0  # keys that a query may attend to; 0 is all of the past
    n_sinks: int = 0  # first keys that stay visible outside the window
    full_layers: tuple[int, ...] = ()  # layers that see everything although window_size is set
    attention_cap: float = 0.0  # soft cap of the attention scores; 0 is none
    logit_cap: float = 0.0  # soft cap of the logits; 0 is none
    tie_embeddings: bool = True  # one matrix for the embedding and the output
    latent: LatentConfig | None = None  # latent attention in place of grouped queries
    experts: ExpertConfig | None = None  # a mixture of experts in place of the feed-forward network
    pad_id: int | None = None  # token that fills batches and learns from no lookup; none: the end's fills
    bos_id: int = 1  # token that begins a document
    eos_id: int = 1  # token that ends it; vocab_size, which no token is, for texts without an end
    more_eos_ids: tuple[int, ...] = ()  # other tokens that end it too, such as the end of a turn in a chat

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "max_seq_len")
        check_range(self, *sizes, least=1)
        check_range(self, "norm_eps", "rope_theta", above=0)
        check_range(self, "window_size", "n_sinks", "attention_cap", "logit_cap", least=0)
        if self.pad_id is None:
            object.__setattr__(self, "pad_id", self.unnamed_filler)
        if self.padding_idx is not None:
            check_range(self, "pad_id", least=0, below=self.vocab_size)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if self.d_head % 2 and not self.latent:
            raise ValueError(f"rotary positions turn pairs of features: d_head={self.d_head} must be even")
        kinds = {"latent": self.latent, "qk_norm": self.qk_norm, "attention_cap": self.attention_cap}
        chosen = [name for name, value in kinds.items() if value] + ["use_bias"] * bool(self.latent and self.use_bias)
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} do not go together: there is no such attention; choose one")

    def window_of(self, layer: int) -> int:
        return 0 if layer in self.full_layers else self.window_size

    @property
    def unnamed_filler(self) -> int:
        """The token that fills where none was named for it: the end, or the beginning where texts have no end."""
        return self.bos_id if self.eos_id == self.vocab_size else self.eos_id

    @property
    def padding_idx(self) -> int | None:
        """pad_id if it was named for filling: as in transformers, its embedding then learns from no lookup."""
        return None if self.pad_id == self.unnamed_filler else self.pad_id


# The same facts in a config.json


@dataclass(frozen=True)
class Family:
    """What one model_type calls our fields, and the settings of which our model knows one value only."""

    architecture: str
    names: dict[str, str]
    fixed: dict[str, tuple]
    defaults: dict[str, Any] = field(default_factory=dict)  # what an absent key means there, where it is not ours


SHARED_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
SHARED_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
MISTRAL_DEFAULTS = SHARED_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
QWEN3_DEFAULTS = {
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": 128, "num_key_value_heads": 32},
    **{"max_position_embeddings": 32_768, "sliding_window": 4096},
}
DEEPSEEK_DEFAULTS = {
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1},
    **{"max_position_embeddings": 4096, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256},
    **{"num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4},
    **{"first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
}
MEANS_NONE = {  # keys whose null says something else than that the key is absent
    *("head_dim", "num_key_value_heads", "sliding_window", "q_lora_rank"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
NULL_IS_FALSE = ("norm_topk_prob", "rope_interleave")  # although what is absent is true
SILU, BIAS, WINDOW = {"hidden_act": ("silu",)}, {"use_bias": "attention_bias"}, {"window_size": "sliding_window"}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        SHARED_NAMES | BIAS,
        SILU | {"mlp_bias": (False,)},
        SHARED_DEFAULTS | {"max_position_embeddings": 2048},
    ),
    "mistral": Family("MistralForCausalLM", SHARED_NAMES | WINDOW, SILU, MISTRAL_DEFAULTS | {"sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", SHARED_NAMES | BIAS | WINDOW, SILU, QWEN3_DEFAULTS),
    "mixtral": Family("MixtralForCausalLM", SHARED_NAMES | WINDOW, SILU, MISTRAL_DEFAULTS | {"rms_norm_eps": 1e-5}),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        SHARED_NAMES,
        SILU | {"attention_bias": (False,), "norm_topk_prob": (True,), "rope_interleave": (True,)},
        DEEPSEEK_DEFAULTS,
    ),
}
EXPERT_NAMES = {
    "mixtral": {"n_experts": "num_local_experts", "n_active_experts": "num_experts_per_tok"},
    "deepseek_v3": {
        "n_experts": "n_routed_experts",
        "n_active_experts": "num_experts_per_tok",
        "d_expert": "moe_intermediate_size",
        "n_dense_layers": "first_k_dense_replace",
        "n_groups": "n_group",
        "n_active_groups": "topk_group",
        "scale": "routed_scaling_factor",
    },
}
LATENT_NAMES = {
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "d_nope": "qk_nope_head_dim",
    "d_rope": "qk_rope_head_dim",
    "d_value": "v_head_dim",
}
SCALING_NAMES = {
    "linear": {name: name for name in ("factor", "mscale_all_dim")},  # the second counts in latent attention alone
    "dynamic": {name: name for name in ("factor", "mscale_all_dim")},
    "yarn": {
        name: name
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    },
    "llama3": {name: name for name in ("factor", "low_freq_factor", "high_freq_factor", "mscale_all_dim")},
}
TRAINED = "original_max_position_embeddings"
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_folder(given: dict) -> ModelConfig:
    """Our config from a config.json. Raises ValueError with the name and the value of what our model cannot compute."""
    kind = check_name("model_type", given.get("model_type"), FAMILIES)
    family = FAMILIES[kind]
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise ValueError(f"{CONFIG} lacks {', '.join(missing)}")
    for name in REQUIRED:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{CONFIG} has {name}={given[name]!r}; it must be a whole number >= 1")
    given = {name: False if value is None and name in NULL_IS_FALSE else value for name, value in given.items()}
    given = family.defaults | {name: value for name, value in given.items() if value is not None or name in MEANS_NONE}
    given = {name: value for name, value in given.items() if value is not None}
    more_ends: list[int] = []
    if isinstance(given.get("eos_token_id"), list):  # several ends
        given["eos_token_id"], *more_ends = whole_ids("eos_token_id", given["eos_token_id"])
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    given.setdefault("bos_token_id", given.get("eos_token_id", 0))
    filler = given.get("eos_token_id", given["bos_token_id"])
    given.setdefault("eos_token_id", given["vocab_size"])
    given.setdefault("pad_token_id", filler)
    if given["pad_token_id"] == -1:  # as the first files of Llama say that there is none
        given["pad_token_id"] = filler
    windowed = given.get("sliding_window") and (kind != "qwen3" or given.get("use_sliding_window"))
    given["sliding_window"] = given["sliding_window"] if windowed else 0
    if kind == "deepseek_v3":  # latent attention has neither; published files name one of them or none
        given |= {"head_dim": given["qk_rope_head_dim"], "num_key_value_heads": given["num_attention_heads"]}
    theta, scaling = scaling_from_folder(given, kind)
    config = config_from_file(ModelConfig, given, family.names, family.fixed)
    extra: dict[str, Any] = {"qk_norm": kind == "qwen3", "rope_theta": theta, "rope_scaling": scaling}
    extra["more_eos_ids"] = tuple(more_ends)
    if kind == "qwen3" and windowed:
        types = given.get("layer_types") or [
            "full_attention" if layer < given.get("max_window_layers", 28) else "sliding_attention"
            for layer in range(config.n_layers)
        ]
        if len(types) != config.n_layers or not all(name in ("full_attention", "sliding_attention") for name in types):
            raise ValueError(
                f"{CONFIG} has layer_types={types!r}; it must name full_attention or sliding_attention for each of "
                f"{config.n_layers} layers"
            )
        extra["full_layers"] = tuple(layer for layer, name in enumerate(types) if name == "full_attention")
    elif kind == "qwen3" and "sliding_attention" in (given.get("layer_types") or []):
        raise ValueError(
            f"{CONFIG} has layers of sliding_attention but no sliding_window in use; set use_sliding_window"
        )
    if kind in EXPERT_NAMES:
        extra["experts"] = experts_from_folder(given, kind)
    if kind == "deepseek_v3":
        extra["latent"] = config_from_file(LatentConfig, {"q_lora_rank": 0} | given, LATENT_NAMES, {})  # null: 0
    return replace(config, **extra)


def whole_ids(name: str, ids: list) -> list[int]:
    if not ids or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{CONFIG} has {name}={ids!r}; a list there must hold at least one id >= 0")
    return ids


def with_generation_ends(given: dict, folder: Path | str) -> dict:
    """A config.json with the ends and the filler that generation_config.json names, if there is one.

    Chat models often have more ends there, and transformers' `generate` obeys that file.
    """
    path = Path(folder) / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    named = {name: found[name] for name in ("eos_token_id", "pad_token_id") if found.get(name) is not None}
    return given | named


def experts_from_folder(given: dict, kind: str) -> ExpertConfig:
    router = {"router": "softmax" if kind == "mixtral" else "sigmoid"}
    experts = config_from_file(ExpertConfig, given | router, EXPERT_NAMES[kind] | {"router": "router"}, {})
    if kind == "mixtral":
        return replace(experts, d_expert=given["intermediate_size"])
    return replace(experts, d_shared=experts.d_expert * given["n_shared_experts"])


def scaling_from_folder(given: dict, kind: str) -> tuple[float, RopeScaling]:
    """Theta and scaling from rope_scaling, as older files have it, or from rope_parameters.

    What neither holds, theta and the length of training, may stand beside them. Raises ValueError for a kind of scaling
    that our model does not know, and for one that turns only some of the features.
    """
    found = rope_settings(given)
    rope = {name: value for name, value in found.items() if value is not None}
    theta = number("rope_theta", rope.get("rope_theta", given.get("rope_theta", 1e6 if kind == "mixtral" else 1e4)))
    name = rope.get("rope_type", rope.get("type", "default"))
    if name == "default":
        return theta, RopeScaling()
    check_name("rope_type", name, SCALING_NAMES)
    if rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{CONFIG} turns only a part of the features (partial_rotary_factor); this model turns all")
    trained = given.get(TRAINED, rope.get(TRAINED, given["max_position_embeddings"]))
    number(TRAINED, trained)
    if name == "yarn" and "factor" in found:  # null: it follows from the lengths
        rope.setdefault("factor", given["max_position_embeddings"] / trained)
    if "factor" not in rope:
        raise ValueError(f"{CONFIG} scales rotary positions by {name!r} but gives no factor")
    known = {field: rope.get(theirs) for field, theirs in SCALING_NAMES[name].items()}
    known = {field: value for field, value in known.items() if value is not None}
    known = {field: value if field == "truncate" else number(field, value) for field, value in known.items()}
    if "truncate" in found:
        known["truncate"] = bool(found["truncate"])  # null: false
    return theta, RopeScaling(name, trained_seq_len=trained, **known)


def number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{CONFIG} has {name}={value!r}; it must be a number")
    return float(value)


def rope_settings(given: dict) -> dict:
    found = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} has a rotary scaling of {found!r}; it must be an object with a rope_type")
    nested = [name for name, value in found.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{CONFIG} has rotary settings of their own for {', '.join(nested)}; this model has one for all"
        )
    return found


def family_of(config: ModelConfig) -> str:
    """The model_type that computes what this config says. Raises ValueError if none of the five does."""
    if (
        config.n_sinks
        or config.attention_cap
        or config.logit_cap
        or (config.experts and config.experts.capacity_factor)
    ):
        raise ValueError(
            "no family has attention sinks, soft caps or an expert capacity; leave them out to save a folder"
        )
    if config.latent or (config.experts and config.experts.router == "sigmoid"):
        kind = "deepseek_v3"
    elif config.experts:
        kind = "mixtral"
    elif config.qk_norm:
        kind = "qwen3"
    else:
        kind = "mistral" if config.window_size else "llama"
    read = config_from_folder(to_words(config, kind))
    if read != config:
        names = [entry.name for entry in fields(config) if getattr(read, entry.name) != getattr(config, entry.name)]
        lost = ", ".join(f"{name}={getattr(config, name)!r} would become {getattr(read, name)!r}" for name in names)
        raise ValueError(
            f"{kind}, the closest family, cannot express this config: {lost}; change that to save a folder"
        )
    return kind


def config_to_folder(config: ModelConfig) -> dict:
    """What config.json says of a model, the way back of `config_from_folder`."""
    return to_words(config, family_of(config))


def to_words(config: ModelConfig, kind: str) -> dict:
    family = FAMILIES[kind]
    words = {"model_type": kind, "architectures": [family.architecture], "use_cache": True}
    words |= {theirs: getattr(config, ours) for ours, theirs in family.names.items()}
    words |= {name: allowed[0] for name, allowed in family.fixed.items()}
    words["pad_token_id"] = config.padding_idx
    if config.eos_id == config.vocab_size:
        words["eos_token_id"] = None
    if config.more_eos_ids:
        words["eos_token_id"] = [config.eos_id, *config.more_eos_ids]
    if kind in ("mistral", "qwen3", "mixtral"):
        words["sliding_window"] = config.window_size or None
    if kind == "qwen3":
        full = [layer in config.full_layers or not config.window_size for layer in range(config.n_layers)]
        words["use_sliding_window"] = bool(config.window_size)
        words["max_window_layers"] = config.n_layers if all(full) else full.index(False)
        words["layer_types"] = ["full_attention" if whole else "sliding_attention" for whole in full]
    if config.experts and kind in EXPERT_NAMES:
        words |= {theirs: getattr(config.experts, ours) for ours, theirs in EXPERT_NAMES[kind].items()}
        if kind == "mixtral":
            words["intermediate_size"] = config.experts.d_expert
        else:
            words["n_shared_experts"] = config.experts.d_shared // config.experts.d_expert
    if config.latent and kind == "deepseek_v3":
        words |= {theirs: getattr(config.latent, ours) for ours, theirs in LATENT_NAMES.items()}
        words |= {"q_lora_rank": config.latent.q_rank or None, "head_dim": config.latent.d_rope}
        words["num_key_value_heads"] = config.n_heads
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, TRAINED: scaling.trained_seq_len}
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in SCALING_NAMES[scaling.kind].items()}
        if not rope.get("mscale_all_dim"):  # of which most kinds of scaling know nothing
            rope.pop("mscale_all_dim", None)
        words["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return words | {"rope_parameters": rope, "rope_theta": config.rope_theta}


# The tensors of a folder


FILE_NAMES = {  # of the tensors of one layer: theirs to ours
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "self_attn.out_proj",
}
LATENT_FILE_NAMES = {
    "self_attn.kv_a_proj_with_mqa": "self_attn.kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attn.kv_norm",
    "self_attn.kv_b_proj": "self_attn.kv_proj",
}
FFN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_FFN = dict(zip(("w1", "w3", "w2"), FFN, strict=True))


def folder_layout(config: ModelConfig) -> Layout:
    """How the files of the config's family name our tensors."""
    kind = family_of(config)
    tensors = [
        FileTensor("model.embed_tokens.weight", ("token_emb.weight",)),
        FileTensor("model.norm.weight", ("final_norm.weight",)),
    ]
    for layer in range(config.n_layers):
        names = FILE_NAMES | attention_names(config) | ffn_names(config, layer, kind)
        for theirs, ours in names.items():
            biased = config.use_bias and ours.startswith("self_attn.") and ours.endswith("_proj")
            for part in ("weight", "bias") if biased else ("weight",):
                tensors.append(FileTensor(f"model.layers.{layer}.{theirs}.{part}", (f"blocks.{layer}.{ours}.{part}",)))
        if config.experts and config.experts.router == "sigmoid" and layer >= config.experts.n_dense_layers:
            key = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            tensors.append(FileTensor(key, (f"blocks.{layer}.ffn.router.bias",)))
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
    if not tied:
        tensors.append(FileTensor("lm_head.weight", ("lm_head.weight",)))
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # a constant that older files carry
    if kind == "deepseek_v3":  # a last layer that predicts one token further, of which our model has none
        ignored = (*ignored, rf"model\.layers\.{config.n_layers}\..*")
    return Layout(tuple(tensors), tied, ignored)


def attention_names(config: ModelConfig) -> dict[str, str]:
    if config.latent:
        ranked = {"q_a_proj": "q_down_proj", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj"}
        queries = ranked if config.latent.q_rank else {"q_proj": "q_proj"}
        return LATENT_FILE_NAMES | {f"self_attn.{theirs}": f"self_attn.{ours}" for theirs, ours in queries.items()}
    same = ("q_proj", "k_proj", "v_proj", *(("q_norm", "k_norm") if config.qk_norm else ()))
    return {f"self_attn.{name}": f"self_attn.{name}" for name in same}


def ffn_names(config: ModelConfig, layer: int, kind: str) -> dict[str, str]:
    experts = config.experts
    if experts is None or layer < experts.n_dense_layers:
        return {f"mlp.{name}": f"ffn.{name}" for name in FFN}
    base = "block_sparse_moe" if kind == "mixtral" else "mlp"
    inner = MIXTRAL_FFN if kind == "mixtral" else dict(zip(FFN, FFN, strict=True))
    names = {f"{base}.gate": "ffn.router"}
    for expert in range(experts.n_experts):
        names |= {f"{base}.experts.{expert}.{theirs}": f"ffn.experts.{expert}.{ours}" for theirs, ours in inner.items()}
    if experts.d_shared:
        names |= {f"mlp.shared_experts.{name}": f"ffn.shared.{name}" for name in FFN}
    return names
