"""Topic 11 - Low-rank adapters: LoRA, rsLoRA and DoRA; merged, taken out, saved and loaded in PEFT's own format.

    add_adapters(model, LoraConfig(lora_rank=8, lora_alpha=16))   # freezes the base; only the new matrices are trained
    save_adapter(model, folder)                                   # PeftModel.from_pretrained reads it
    merge(model); unmerge(model)                                  # for serving without extra work, and back
    fold(model)                                                   # plain linear layers again, changed for good

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py sft --method lora --lora-rank 8

Hu et al. 2021 (LoRA, arXiv 2106.09685), Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732), Liu et al. 2024 (DoRA, arXiv
2402.09353).
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from huggingface_folders import read_json, read_safetensors, some
from llm_config import folder_layout
from modern_llm_architectures import CausalLM
from sequence_modeling import check_token_ids
from workbench import check_name, check_range, shown, write_atomically

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in PEFT's files
ALL_LINEAR = "q_proj,k_proj,v_proj,out_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class LoraConfig:
    """Where low-rank updates are added, and how large they may be."""

    lora_rank: int = 8  # rank of each update
    lora_alpha: float = 16.0  # an update is multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # fraction of the update's inputs that is dropped in training
    target_modules: str = ALL_LINEAR  # names of the linear layers that get an update, with commas between them
    rank_stabilised: bool = False  # rsLoRA: multiply by lora_alpha / sqrt(lora_rank)
    dora: bool = False  # DoRA: also learn the length of each row of a weight

    def __post_init__(self) -> None:
        check_range(self, "lora_rank", least=1)
        check_range(self, "lora_alpha", above=0)
        check_range(self, "lora_dropout", least=0, below=1)
        if not isinstance(self.lora_rank, int) or isinstance(self.lora_rank, bool):
            raise ValueError(f"lora_rank must be a whole number, got {self.lora_rank!r}")
        if not isinstance(self.target_modules, str):
            raise ValueError(f"target_modules is one text with commas, got {self.target_modules!r}; join the names")
        if not self.targets:
            raise ValueError(f"target_modules names no layer; give some of {ALL_LINEAR}")

    @property
    def targets(self) -> list[str]:
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.rank_stabilised else self.lora_rank)


# The layers


def check_rank(rank: int, layer: nn.Module) -> None:
    most = min(layer.in_features, layer.out_features)
    if not 1 <= rank <= most:
        raise ValueError(f"lora_rank={rank} must be in 1..{most}, the smaller side of the layer that it updates")


class LoRALinear(nn.Module):
    """base(x) + scale * B A dropout(x): a frozen linear layer and a trained update of low rank (Hu et al. 2021, 4.1).

    A is drawn as nn.Linear draws its weights, B is 0, so the layer begins as its base. `weight` is the effective
    weight, for code that reads it instead of calling the layer.
    Shapes: x (..., in) to (..., out). Raises ValueError for a rank above min(in, out), where nothing is saved.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        check_rank(rank, base)
        self.base, self.scale, self.merged = base.requires_grad_(False), scale, False
        like = base.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        return self.base.weight if self.merged else self.effective_weight()

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def update(self) -> Tensor:
        """The change of the weight: (out, in)."""
        return self.scale * self.lora_b @ self.lora_a

    def effective_weight(self) -> Tensor:
        """(out, in)"""
        return self.base.weight + self.update()

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        low = F.linear(self.dropout(x), self.lora_a)  # (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.lora_b)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight; twice would add it twice, so that is refused."""
        if self.merged:
            raise ValueError(
                "the update is already part of the weight; merging again would add it twice: unmerge first"
            )
        if not isinstance(self.base, nn.Linear):
            raise ValueError("a quantised base cannot take up an update exactly; fold the adapters instead")
        self.base.weight.copy_(self.effective_weight())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the base weight again, up to rounding."""
        if not self.merged:
            raise ValueError("the update is not part of the weight; merge first")
        self.base.weight.copy_(self.without_update(self.base.weight))
        self.merged = False

    def without_update(self, weight: Tensor) -> Tensor:
        return weight - self.update()


class DoRALinear(LoRALinear):
    """magnitude * (W + scale B A) / |W + scale B A|, row by row: length and direction apart (Liu et al. 2024, 4).

    The paper's columns are the rows of nn.Linear's weight: one length for each output. The norm is a constant in the
    backward pass (section 4.3), which saves memory and changes the gradient. The magnitude starts at |W|.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.magnitude = nn.Parameter(base.weight.detach().norm(dim=1))

    def row_scale(self) -> Tensor:
        """magnitude / norm of each row: (out)."""
        norm = (self.base.weight + self.update()).detach().norm(dim=1)
        return self.magnitude / norm

    def effective_weight(self) -> Tensor:
        return self.row_scale()[:, None] * (self.base.weight + self.update())

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        row_scale, dropped = self.row_scale(), self.dropout(x)
        low = F.linear(F.linear(dropped, self.lora_a), self.lora_b)  # (..., out)
        plain = F.linear(dropped, self.base.weight)  # (..., out)
        kept = F.linear(x, self.base.weight) if self.training and self.dropout.p else plain  # (..., out)
        changed = kept + (row_scale - 1) * plain + row_scale * self.scale * low  # only the change sees the dropout
        return changed if self.bias is None else changed + self.bias

    @torch.no_grad()
    def merge(self) -> None:
        row_scale = self.row_scale()
        super().merge()
        self.merged_scale = row_scale

    def without_update(self, weight: Tensor) -> Tensor:
        return weight / self.merged_scale[:, None] - self.update()


# Tokens that pretraining never saw


class TokenRows(nn.Module):
    """An embedding that is frozen but for some rows: those of tokens that pretraining never met.

    Such rows were pushed away from every hidden state, all in one direction, and so are long and alike: nothing that
    leaves the embedding alone can tell them apart, or say them. Shapes: token_ids (batch, seq) to (batch, seq,
    d_model); weight (vocab, d_model) is made anew whenever it is read.
    """

    def __init__(self, embedding: nn.Embedding, token_ids: list[int]) -> None:
        super().__init__()
        self.base, self.off = embedding.requires_grad_(False), False
        self.register_buffer("token_ids", torch.tensor(token_ids, device=embedding.weight.device))
        self.rows = nn.Parameter(embedding.weight[self.token_ids].detach().clone())  # (tokens, d_model)

    @property
    def weight(self) -> Tensor:
        return self.base.weight if self.off else self.base.weight.index_copy(0, self.token_ids, self.rows)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class TiedHead(nn.Module):
    """The head of a model with tied embeddings whose embedding is not a plain one. (..., d_model) to (..., vocab)"""

    def __init__(self, embedding: TokenRows) -> None:
        super().__init__()
        self.embedding = [embedding]  # in a list, so that it is not a part of the head too

    @property
    def weight(self) -> Tensor:
        return self.embedding[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def freeze(model: nn.Module) -> None:
    """Train nothing but the embedding rows that `train_rows` set apart."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "token_emb.rows")


def train_rows(model: CausalLM, token_ids: Sequence[int]) -> None:
    """Train some rows of the embedding, and of the head that is tied to it, whatever else is frozen.

    PEFT's `trainable_token_indices`. Raises ValueError for ids outside the vocabulary, for a head that is not tied, and
    for a model that has such rows already.
    """
    ids, size = sorted(set(token_ids)), model.config.vocab_size
    if not ids or ids[0] < 0 or ids[-1] >= size:
        raise ValueError(f"the rows to train must be some of the ids 0..{size - 1}, got {ids[:3]}...{ids[-3:]}")
    check_token_ids(torch.tensor(ids), size)
    if not model.config.tie_embeddings or isinstance(model.token_emb, TokenRows):
        raise ValueError("rows are trained once, of an embedding that is tied to the head")
    remember_base(model)
    model.token_emb = TokenRows(model.token_emb, ids)
    model.lm_head = TiedHead(model.token_emb)


def plain_embedding(model: CausalLM) -> None:
    """Put a plain embedding, tied to a plain head, in the place of one with trained rows."""
    weight = model.token_emb.weight.detach().clone()
    model.token_emb = nn.Embedding(*weight.shape, _weight=weight)
    model.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    model.lm_head.weight = model.token_emb.weight


# Models


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def is_linear(layer: nn.Module) -> bool:
    """A linear layer, quantised or not, that has no update yet."""
    return hasattr(layer, "in_features") and not isinstance(layer, LoRALinear)


def add_adapters(model: CausalLM, config: LoraConfig) -> list[str]:
    """Freeze the model and give every linear layer that the config names an update; return the layers' names.

    Raises ValueError for a name that no layer has (a model without trained weights would be the result), for a rank
    above a layer's size, for a tied head, and for a model that has adapters already.
    """
    if adapted_layers(model):
        raise ValueError("the model has adapters already; fold them before adding others")
    linear = [name for name, layer in model.named_modules() if is_linear(layer)]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.targets:
        check_name("target module", target, known)
    if "lm_head" in config.targets and model.config.tie_embeddings:
        raise ValueError("lm_head shares its weight with token_emb, which a merge would change too; leave it out")
    chosen = [name for name in linear if name.rpartition(".")[2] in config.targets]
    for name in chosen:
        check_rank(config.lora_rank, model.get_submodule(name))
    remember_base(model)
    freeze(model)
    kind = DoRALinear if config.dora else LoRALinear
    for name in chosen:
        base = model.get_submodule(name)
        layer = kind(base, config.lora_rank, config.scale, config.lora_dropout)
        model.set_submodule(name, layer.train(model.training))  # a new module would drop in a model that evaluates
    model.lora_config = config
    return chosen


def merge(model: nn.Module) -> None:
    """Make every update part of its weight: as fast as the base model. Raises ValueError if it was done already."""
    for layer in some_adapters(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    for layer in some_adapters(model).values():
        layer.unmerge()


def some_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters; add or load some first")
    return layers


@torch.no_grad()
def fold(model: CausalLM) -> CausalLM:
    """Put plain linear layers with the effective weights in the place of all others; all weights are trained.

    Of a quantised base, layers without an update become plain too: the model can be saved as any other.
    """
    some_adapters(model)
    others = {name: layer for name, layer in model.named_modules() if is_linear(layer) and type(layer) is not nn.Linear}
    for name, layer in (others | adapted_layers(model)).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        plain.weight.copy_(layer.weight)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
        model.set_submodule(name, plain.to(layer.weight.device))
    if isinstance(model.token_emb, TokenRows):
        plain_embedding(model)
    del model.base_identity, model.lora_config
    return model.requires_grad_(True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base: a reference model that costs no memory."""
    layers = some_adapters(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("the updates are part of the weights; unmerge before switching them off")
    rows = [model.token_emb] if isinstance(model.token_emb, TokenRows) else []
    for layer in layers:
        layer.merged = True  # it then calls its base alone
    for embedding in rows:
        embedding.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.merged = False
        for embedding in rows:
            embedding.off = False


# Which base an adapter belongs to


def base_sha256(model: CausalLM) -> str:
    """The identity of a model's weights: SHA-256 of names, shapes and float32 values in its folder's order.

    It does not depend on how a file packs them. Adapters are no part of it.
    """
    tensors = {name.replace(".base.", "."): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    digest = sha256()
    for entry in sorted(folder_layout(model.config).tensors, key=lambda entry: entry.key):
        for part in entry.parts:
            tensor = tensors[part].detach().float().cpu().contiguous()
            digest.update(f"{entry.key} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def remember_base(model: CausalLM) -> None:
    """Note the identity of the base before its layers are quantised or adapted."""
    if not hasattr(model, "base_identity"):
        model.base_identity = base_sha256(model)


# PEFT's files


def file_names(model: CausalLM) -> dict[str, str]:
    """Our name of each linear layer, an untied head too, and its name in the folders of the model's family."""
    pairs = {entry.parts[0]: entry.key for entry in folder_layout(model.config).tensors if len(entry.parts) == 1}
    return {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in pairs.items()
        if ours.endswith("_proj.weight") or ours == "lm_head.weight"
    }


def file_parts(layer: LoRALinear) -> dict[str, nn.Parameter]:
    parts = {"lora_A.weight": layer.lora_a, "lora_B.weight": layer.lora_b}
    return parts | ({"lora_magnitude_vector": layer.magnitude} if isinstance(layer, DoRALinear) else {})


def target_names(layers: set[str], names: dict[str, str]) -> list[str]:
    """PEFT's target_modules: the last name of layers that are all adapted, the whole name of each of the others."""
    groups: dict[str, set[str]] = {}
    for ours, theirs in names.items():
        groups.setdefault(theirs.rpartition(".")[2], set()).add(ours)
    short = {last for last, group in groups.items() if group <= layers}
    full = {names[name] for name in layers if names[name].rpartition(".")[2] not in short}
    return sorted(short | full)


ROWS_KEY = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"  # the rows themselves, not a change


def save_adapter(model: CausalLM, folder: Path, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; `base` says where the base model lies.

    The SHA-256 of the base's weights stands in `auto_mapping`, a dictionary that PEFT hands on without looking at
    further keys. Raises ValueError for a model without adapters or with merged ones.
    """
    layers, names, config = some_adapters(model), file_names(model), model.lora_config
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the updates are part of the weights; unmerge before saving the adapter")
    tensors = {
        f"{PREFIX}{names[name]}.{part}": tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, tensor in file_parts(layer).items()
    }
    rows = model.token_emb if isinstance(model.token_emb, TokenRows) else None
    if rows:
        tensors[ROWS_KEY] = rows.rows.detach().cpu().contiguous()
    words = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": target_names(set(layers), names),
        "use_rslora": config.rank_stabilised,
        "use_dora": config.dora,
        "trainable_token_indices": rows.token_ids.tolist() if rows else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "base_sha256": model.base_identity,
        },
    }
    if Path(folder).is_file():
        raise ValueError(f"{shown(Path(folder))} is a file; choose another folder to save to")
    write_atomically(Path(folder) / ADAPTER_WEIGHTS, safetensors_bytes(tensors, metadata={"format": "pt"}))
    write_atomically(Path(folder) / ADAPTER_CONFIG, (json.dumps(words, indent=2, sort_keys=True) + "\n").encode())


UNSUPPORTED = {  # settings of PEFT's LoRA that change what is computed, and the values that mean "not used"
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others, as PiSSA, change the base too
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "kasa_config"), (False, None)),
    **dict.fromkeys(("velora_config", "monteclora_config"), (False, None)),
}
SETTINGS = {  # the settings that are read: what each must be, and what its absence means
    "r": (int, None),
    "lora_alpha": (int | float, None),
    "lora_dropout": (int | float, 0.0),
    "use_rslora": (bool, False),
    "use_dora": (bool, False),
    "auto_mapping": (dict, {}),
}


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, with every value that is read of the type it must have.

    Raises ValueError for another kind of adapter and for settings that would compute something else.
    """
    words = read_json(folder / ADAPTER_CONFIG)
    if words.get("peft_type") != "LORA":
        raise ValueError(f"{shown(folder)} holds an adapter of type {words.get('peft_type')!r}, expected 'LORA'")
    for name, allowed in UNSUPPORTED.items():
        if words.get(name) not in allowed:
            raise ValueError(
                f"{shown(folder)} has {name}={words[name]!r}, which this course's LoRA does not know; "
                "merge it with PEFT and load the whole model"
            )
    for name, (kind, absent) in SETTINGS.items():
        value = absent if words.get(name) is None else words[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = getattr(kind, "__name__", "number")
            raise ValueError(f"{shown(folder / ADAPTER_CONFIG)}: {name} must be of type {wanted}, got {value!r}")
        words[name] = value
    return words


def load_adapter(model: CausalLM, folder: Path) -> list[str]:
    """Add the adapter of a folder in PEFT's format to a model, ready to evaluate; return the names of the layers.

    Which layers are meant is read from the tensors. Raises ValueError for another kind of adapter, for settings that
    would compute something else, for tensors that do not fit, and for an adapter that was made for other weights, if it
    says for which. Nothing is half loaded.
    """
    folder = Path(folder)
    words = read_settings(folder)
    remember_base(model)
    wanted = words["auto_mapping"].get("base_sha256")
    if wanted and wanted != model.base_identity:
        raise ValueError(
            f"{shown(folder)} was trained on a base with sha256 {str(wanted)[:12]}..., this model has "
            f"{model.base_identity[:12]}...; load the base {words.get('base_model_name_or_path') or 'it was made for'}"
        )
    tensors, names = read_safetensors(folder / ADAPTER_WEIGHTS), file_names(model)
    token_ids, rows = words.get("trainable_token_indices"), tensors.pop(ROWS_KEY, None)
    if isinstance(token_ids, dict) and list(token_ids) == ["embed_tokens"]:
        token_ids = token_ids["embed_tokens"]
    if (rows is None) != (not token_ids) or (token_ids and tuple(rows.shape) != (len(token_ids), model.config.d_model)):
        raise ValueError(f"{shown(folder)} has trainable_token_indices={token_ids}, but other rows of an embedding")
    keys = {f"{PREFIX}{theirs}.lora_A.weight": ours for ours, theirs in names.items()}
    chosen = [ours for key, ours in keys.items() if key in tensors]
    config = LoraConfig(
        lora_rank=words["r"],
        lora_alpha=words["lora_alpha"],
        lora_dropout=words["lora_dropout"],
        target_modules=",".join(sorted({name.rpartition(".")[2] for name in chosen})) or "none",
        rank_stabilised=words["use_rslora"],
        dora=words["use_dora"],
    )
    check_fit(model, config, chosen, tensors, names)
    if adapted_layers(model):
        raise ValueError("the model has adapters already; fold them before loading others")
    if token_ids:
        put_rows(model, token_ids, rows)
    freeze(model)
    put_adapters(model, config, chosen, tensors, names)
    return chosen


@torch.no_grad()
def put_rows(model: CausalLM, token_ids: list[int], rows: Tensor) -> None:
    train_rows(model, token_ids)
    order = sorted(range(len(token_ids)), key=lambda index: token_ids[index])  # ours stand in the order of the ids
    model.token_emb.rows.copy_(rows[order])


def expected_shapes(model: CausalLM, config: LoraConfig, chosen: list[str], names: dict[str, str]) -> dict[str, tuple]:
    """The tensors that a file for these layers holds, by PEFT's names."""
    shapes: dict[str, tuple] = {}
    for name in chosen:
        layer, key = model.get_submodule(name), PREFIX + names[name]
        shapes[f"{key}.lora_A.weight"] = (config.lora_rank, layer.in_features)
        shapes[f"{key}.lora_B.weight"] = (layer.out_features, config.lora_rank)
        if config.dora:
            shapes[f"{key}.lora_magnitude_vector"] = (layer.out_features,)
    return shapes


def check_fit(
    model: CausalLM, config: LoraConfig, chosen: list[str], tensors: dict[str, Tensor], names: dict[str, str]
) -> None:
    shapes, problems = expected_shapes(model, config, chosen, names), []
    if extra := sorted(set(tensors) - set(shapes)):
        problems.append(f"unexpected {some(extra)}")
    if missing := sorted(set(shapes) - set(tensors)):
        problems.append(f"missing {some(missing)}")
    for key in sorted(set(shapes) & set(tensors)):
        if tuple(tensors[key].shape) != shapes[key]:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {shapes[key]}")
    for name in chosen:
        check_rank(config.lora_rank, model.get_submodule(name))
    if problems or not chosen:
        raise ValueError(f"the adapter does not fit the model: {'; '.join(problems[:6]) or 'it holds no tensor'}")


@torch.no_grad()
def put_adapters(
    model: CausalLM, config: LoraConfig, chosen: list[str], tensors: dict[str, Tensor], names: dict[str, str]
) -> None:
    """Wrap the chosen layers, whatever others have the same last name, and copy the tensors in."""
    kind = DoRALinear if config.dora else LoRALinear
    for name in chosen:
        layer = kind(model.get_submodule(name), config.lora_rank, config.scale, config.lora_dropout)
        for part, tensor in file_parts(layer).items():
            tensor.copy_(tensors[f"{PREFIX}{names[name]}.{part}"])
        model.set_submodule(name, layer)
    model.lora_config = config
    model.eval()
