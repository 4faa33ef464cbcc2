"""Topic 12 - Quantised models: one call from a float model to one of few bits, and a folder that holds it.

    small = quantize_model(model, Recipe("gptq", QuantFormat(4, 32)), calibration_batches(tokenizer, 128, 0))
    small.save_pretrained("runs/small"); QuantisedLM.from_pretrained("runs/small"); load_folder("runs/small")
    small.n_bytes, small.dequantised()            # bytes of its tensors; a plain CausalLM that computes the same
    small.kv_format = KVFormat(n_bits=4)          # from now on its caches are quantised too

A `QuantisedLM` is a `CausalLM`: it generates, and everything that examines models takes it. The folder is the Llama
folder of topic 09 with codes, scales and zero points in place of each weight, and a recipe in config.json.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from channel_scaling import awq, smooth
from course_model import CheckpointConfig, load_course_model, row_nats
from course_tokenizer import CourseTokenizer, load_course_tokenizer
from gptq import Batch, GPTQConfig, block_linears, calibration_batches, gptq_model, input_statistics
from huggingface_folders import (
    CONFIG,
    WEIGHTS,
    FileTensor,
    Layout,
    load_weights,
    read_config,
    read_weights,
)
from llm_config import ModelConfig, config_from_folder, config_to_folder, folder_layout, with_generation_ends
from llm_layers import KVCache
from modern_llm_architectures import CausalLM
from optimizers import shapes_alone
from packing import language_model_loss
from quantized_layers import (
    Int8Linear,
    KVFormat,
    PackedEmbedding,
    PackedLinear,
    QuantisedKVCache,
    packed_tensors,
    replace_linears,
    with_rounding,
    without_rounding,
)
from tiny_world import Document, World, ratio_of_means
from training_transformers import TrainConfig, fit
from weight_quantization import QuantFormat, Quantised, quantise
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    pick_device,
    seed_everything,
    shown,
    write_atomically,
)

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "llm.int8", "smoothquant")
WHOLE_PRODUCTS = ("llm.int8", "smoothquant")  # methods that quantise the activations too
KEY = "quantization_config"


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised; what a folder must know to be read again."""

    method: Literal[METHODS] = "rtn"
    fmt: QuantFormat = QuantFormat()  # of the linear layers in the blocks
    embedding_bits: int = 8  # of embedding and head, one absmax scale for each token's row; 0 leaves them in float
    threshold: float = 6.0  # llm.int8: input channels that reach this stay in float
    strength: float = 0.5  # smoothquant: share of the inputs' peaks that moves into the weights

    def __post_init__(self) -> None:
        check_name("method", self.method, METHODS)
        check_range(self, "threshold", least=0)
        check_range(self, "strength", least=0, most=1)
        if self.embedding_bits:
            QuantFormat(self.embedding_bits)  # refuses other numbers of bits
        if self.method in WHOLE_PRODUCTS and self.fmt.n_bits != 8:
            raise ValueError(f"{self.method} multiplies int8 by int8: n_bits must be 8, got {self.fmt.n_bits}")

    @property
    def embedding_fmt(self) -> QuantFormat:
        return QuantFormat(self.embedding_bits, 0, "absmax")

    def empty_layer(self, layer: nn.Linear) -> nn.Module:
        """A layer of the kind and sizes that this recipe makes of `layer`, without its numbers."""
        sizes = (layer.out_features, layer.in_features)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if self.method in WHOLE_PRODUCTS:
            return Int8Linear(*sizes, self.threshold if self.method == "llm.int8" else 0.0, bias=bias)
        return PackedLinear(*sizes, self.fmt, bias)


class QuantisedLM(CausalLM):
    """A CausalLM whose weights are whole numbers; see the head of this module. For inference: it has no gradients.

    Raises ValueError for a config whose blocks are not linear layers throughout, such as a mixture of experts.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        if config.experts or config.latent:
            raise ValueError("only models with grouped-query attention and SwiGLU are quantised here, no experts")
        super().__init__(config)
        self.recipe, self.kv_format = recipe, None
        replace_linears(self, lambda _, layer: recipe.empty_layer(layer))
        if recipe.embedding_bits:
            sizes = (config.vocab_size, config.d_model)
            table = PackedLinear(*sizes, recipe.embedding_fmt)
            self.token_emb = PackedEmbedding(table)
            self.lm_head = table if config.tie_embeddings else PackedLinear(*sizes, recipe.embedding_fmt)
        self.requires_grad_(False)

    kv_format: KVFormat | None

    def new_caches(self) -> list[KVCache]:
        """Topic 09's caches, or quantised ones if kv_format is set. Raises ValueError for those under a window."""
        if self.kv_format is None:
            return super().new_caches()
        if self.config.window_size:
            raise ValueError("a quantised cache keeps all positions; this model has a window: leave kv_format None")
        return [QuantisedKVCache(self.kv_format) for _ in self.blocks]

    def decoding(self, prompt: Tensor, most: int, is_real: Tensor | None) -> Callable[[Tensor], Tensor]:
        """As CausalLM's, but never by a DecodePlan: that would lay every weight out in float first."""
        caches, seen = self.new_caches(), is_real

        def next_logits(new_ids: Tensor) -> Tensor:
            nonlocal seen
            if seen is not None and len(caches[0]):
                seen = F.pad(seen, (0, 1), value=True)
            return self.logits(self.hidden(new_ids, caches, seen)[:, -1])  # (batch, vocab)

        return next_logits

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    def dequantised(self) -> CausalLM:
        """A plain model with the floats that the codes stand for; activations are no longer rounded."""
        plain = CausalLM(self.config)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                owner, _, attribute = name.rpartition(".")
                parameter.copy_(getattr(self.get_submodule(owner), attribute))
        return plain.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the folder: the tensors as they lie in memory, and the recipe in config.json."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{shown(folder)} is a file; choose another folder to save to")
        ours = dict(self.named_parameters()) | dict(self.named_buffers())
        tensors = {entry.key: ours[entry.parts[0]].detach().contiguous() for entry in quantised_layout(self).tensors}
        words = config_to_folder(self.config) | {"dtype": "float32", "torch_dtype": "float32"}
        words[KEY] = {"quant_method": "transformers-course", **asdict(self.recipe)}
        write_atomically(folder / WEIGHTS, safetensors_bytes(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG, json.dumps(words, indent=2).encode() + b"\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model of such a folder. Raises ValueError for another kind of folder and for tensors that do not fit."""
        words = with_generation_ends(read_config(folder), folder)
        config, recipe, tensors = config_from_folder(words), recipe_from(words, Path(folder)), read_weights(folder)
        check_room(config, tensors, Path(folder))
        model = cls(config, recipe)
        layout = quantised_layout(model)
        ours = dict(model.named_parameters()) | dict(model.named_buffers())
        for entry in layout.tensors:
            found, wanted = tensors.get(entry.key), ours[entry.parts[0]]
            if found is not None and found.dtype != wanted.dtype:
                raise ValueError(f"{entry.key} has type {found.dtype}, expected {wanted.dtype}")
        load_weights(model, tensors, layout)
        return model.eval()


def check_room(config: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError for sizes that no weights fill, before they take memory: a weight has at least one bit."""
    held = sum(tensor.nbytes for tensor in tensors.values())
    if config.n_layers > 10_000:
        raise ValueError(f"num_hidden_layers={config.n_layers} is above 10,000; {CONFIG} of {shown(folder)} is damaged")
    with shapes_alone():
        n_weights = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    if n_weights > 8 * held:
        raise ValueError(
            f"{CONFIG} of {shown(folder)} asks for {n_weights:,} weights, its files hold {held:,} bytes, which is less "
            "than one bit each; it is damaged, write the folder again"
        )


def recipe_from(words: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that config.json tells. Raises ValueError, with what is wrong, if it tells none of ours."""
    told = words.get(KEY)
    if not isinstance(told, dict) or told.get("quant_method") != "transformers-course":
        raise ValueError(f"{shown(folder / CONFIG)} has no {KEY} of this course; load it with CausalLM.from_pretrained")
    try:
        fields = {name: value for name, value in told.items() if name != "quant_method"}
        return Recipe(**(fields | {"fmt": QuantFormat(**fields["fmt"])}))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{shown(folder / CONFIG)}: {KEY} does not describe a recipe: {error}") from None


def quantised_layout(model: QuantisedLM) -> Layout:
    """The names of the tensors in a file: topic 09's, with .codes, .scales, .zero_points where .weight stood."""
    entries = []
    for entry in folder_layout(model.config).tensors:
        owner, _, attribute = entry.parts[0].rpartition(".")
        module, base = model.get_submodule(owner), entry.key.removesuffix("weight")
        if isinstance(module, PackedEmbedding):
            module, owner = module.table, f"{owner}.table"
        if attribute == "weight" and isinstance(module, PackedLinear | Int8Linear):
            parts = [name for name, _ in module.named_buffers() if name != "bias"]
            entries += [FileTensor(base + part, (f"{owner}.{part}",)) for part in parts]
        else:
            entries.append(entry)
    return Layout(tuple(entries))


def load_folder(folder: Path | str) -> CausalLM:
    """The model of a folder, quantised or not."""
    quantised = KEY in read_config(folder)
    return QuantisedLM.from_pretrained(folder) if quantised else CausalLM.from_pretrained(folder)


# From a float model to codes


@torch.no_grad()
def quantize_model(
    model: CausalLM, recipe: Recipe, batches: list[Batch] | None = None, config: GPTQConfig | None = None
) -> QuantisedLM:
    """Quantise a model; it stays as it is, the result shares nothing with it.

    `batches` (see calibration_batches) are needed by all methods that look at activations, which are all but rtn and
    llm.int8. Raises ValueError without them.
    """
    if recipe.method not in ("rtn", "llm.int8") and not batches:
        raise ValueError(f"{recipe.method} looks at activations; give batches, see calibration_batches")
    work = copy.deepcopy(model).cpu().eval()
    if recipe.method.startswith("awq"):
        awq(work, input_statistics(work, batches), recipe.fmt)
    if recipe.method == "smoothquant":
        smooth(work, input_statistics(work, batches), recipe.strength)
    if recipe.method.endswith("gptq"):
        codes = gptq_model(work, batches, recipe.fmt, config)
    elif recipe.method in WHOLE_PRODUCTS:
        codes = {}
    else:
        codes = {name: quantise(layer.weight, recipe.fmt) for name, layer in block_linears(work).items()}
    return assemble(work, recipe, codes)


def assemble(model: CausalLM, recipe: Recipe, codes: dict[str, Quantised]) -> QuantisedLM:
    """A quantised model from codes of the linear layers, and all else from a float model."""
    made = QuantisedLM(model.config, recipe)
    for name, layer in block_linears(model).items():
        target = made.get_submodule(name)
        if isinstance(target, Int8Linear):
            source = Int8Linear.from_linear(layer, target.threshold)
            target.codes, target.scales = source.codes, source.scales
        else:
            fill(target, codes[name])
        if layer.bias is not None:
            target.bias.copy_(layer.bias)
    plain = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in made.named_parameters():
        parameter.copy_(plain[name])
    if recipe.embedding_bits:
        fill(made.token_emb.table, quantise(model.token_emb.weight, recipe.embedding_fmt))
        if not model.config.tie_embeddings:
            fill(made.lm_head, quantise(model.lm_head.weight, recipe.embedding_fmt))
    return made.eval()


def fill(layer: PackedLinear, quantised: Quantised) -> None:
    for name, tensor in packed_tensors(quantised).items():
        getattr(layer, name).copy_(tensor)


def train_rounded(
    model: CausalLM, fmt: QuantFormat, batches: Callable[[int], dict[str, Tensor]], config: TrainConfig
) -> CausalLM:
    """Quantisation-aware training: a copy of the model, trained while it computes with rounded weights.

    `quantize_model` with "rtn" and the same format then gives codes for exactly what was trained. The grids follow the
    weights; embedding, head and norms train in float.
    """
    trained = copy.deepcopy(model)
    for layer in block_linears(trained).values():
        with_rounding(layer, fmt)
    fit(trained, batches, language_model_loss, config)
    for layer in block_linears(trained).values():
        without_rounding(layer)
    return trained.eval()


# What it is worth


@dataclass(frozen=True)
class Exam:
    """Held-out documents and what a reference model pays for them, to judge others by the difference.

    Both models see the same documents, so that the difference is known far better than either loss.
    """

    rows: tuple[list[int], ...]
    floors: tuple[float, ...]
    reference: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: CourseTokenizer, documents: list[Document]) -> "Exam":
        encoded = [tokenizer.encode_document(document) for document in documents]
        rows = tuple(item.ids for item in encoded)
        return cls(rows, tuple(item.nats for item in encoded), tuple(row_nats(model, rows)))

    def gap(self, model: nn.Module) -> tuple[float, float]:
        """Above the documents' entropy, and its standard error, nats per token."""
        return self.compare(model, self.floors)

    def damage(self, model: nn.Module) -> tuple[float, float]:
        """Above the reference model, and its standard error, nats per token; negative if better."""
        return self.compare(model, self.reference)

    def compare(self, model: nn.Module, least: tuple[float, ...]) -> tuple[float, float]:
        paid = row_nats(model, self.rows)
        return ratio_of_means([(p - q, len(row) - 1) for p, q, row in zip(paid, least, self.rows, strict=True)])


def float_bytes(model: nn.Module) -> int:
    """Bytes of a float model's parameters, each counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


# The verb


@dataclass(frozen=True)
class QuantizeConfig(CheckpointConfig):
    """What to quantise, and how."""

    method: Literal[METHODS] = "gptq"  # how the codes are chosen
    n_bits: int = 4  # bits of a weight in the blocks
    quant_group_size: int = 32  # weights of a row that share a scale; 0: the row; -1: the matrix
    scheme: Literal["absmax", "affine"] = "affine"  # codes around 0, or from the smallest to the largest weight
    embedding_bits: int = 8  # bits of embedding and head; 0 leaves them in float
    damping: float = 0.3  # gptq: added to the diagonal of the second moments, as a share of its mean
    act_order: bool = False  # gptq: columns with the largest inputs first
    n_calibration: int = 128  # training documents whose activations are looked at
    n_held_out: int = 500  # held-out documents to examine both models with

    def __post_init__(self) -> None:
        check_range(self, "n_calibration", least=1)
        check_range(self, "n_held_out", least=2)
        self.recipe()
        GPTQConfig(self.damping, act_order=self.act_order)

    def recipe(self) -> Recipe:
        fmt = QuantFormat(self.n_bits, self.quant_group_size, self.scheme)
        return Recipe(self.method, fmt, self.embedding_bits)


@alone
def quantize(config: QuantizeConfig, run: RunConfig) -> None:
    """Quantise a model, save it as a folder, and say what it weighs and what it lost."""
    announce(f"quantise {shown(config.folder)} by {config.method} to {config.n_bits} bits", 20)
    seed_everything(run.seed)
    model, tokenizer = load_course_model(config.folder)
    batches = calibration_batches(tokenizer, config.n_calibration, run.seed)
    settings = GPTQConfig(config.damping, act_order=config.act_order)
    small = quantize_model(model, config.recipe(), batches, settings)
    folder = run.out / "model"
    small.save_pretrained(folder)
    load_course_tokenizer().save_folder(folder)
    device = pick_device(run.device)
    exam = Exam.of(model.to(device), tokenizer, World().documents(config.n_held_out, 7, "validation"))
    before, after, (damage, error) = exam.gap(model), exam.gap(small.to(device)), exam.damage(small)
    print(f"float32: {float_bytes(model):,} bytes, {before[0]:.4f} ± {before[1]:.4f} nats per token above the floor")
    ratio = float_bytes(model) / small.n_bytes
    print(f"{config.method}, {config.recipe().fmt}: {small.n_bytes:,} bytes ({ratio:.1f} times fewer), {after[0]:.4f}")
    print(f"what rounding cost: {damage:+.4f} ± {error:.4f} nats per token, on the same documents")
    print(f"saved in {shown(folder)}: {(folder / WEIGHTS).stat().st_size:,} bytes")
