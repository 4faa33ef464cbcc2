"""Topic 12 - Pruning: weights set to zero, and heads, neurons and blocks that really go.

    prune_weights(model, "wanda", 0.5, statistics)              # zeros; every tensor keeps its size and its speed
    prune_weights(model, "wanda", 0.5, statistics, (2, 4))      # two of every four, which some GPUs can skip
    smaller = prune_heads(model, 1, statistics)                 # smaller tensors: a plain, smaller Llama folder
    smaller = prune_neurons(model, 176, statistics); smaller = prune_layers(model, 1, batches)

Han et al. 2015 (magnitude, arXiv 1506.02626), Sun et al. 2023 (Wanda, arXiv 2306.11695), Mishra et al. 2021 (2:4, arXiv
2104.08378), Michel et al. 2019 (heads, arXiv 1905.10650), Men et al. 2024 (blocks, arXiv 2403.03853).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_model import CheckpointConfig, load_course_model
from course_tokenizer import load_course_tokenizer
from gptq import Batch, InputStatistics, block_linears, calibration_batches, input_statistics
from modern_llm_architectures import CausalLM
from packing import language_model_loss
from quantized_model import Exam, float_bytes
from tiny_world import World
from training_transformers import TrainConfig, fit
from weight_quantization import pack_codes, unpack_codes
from workbench import RunConfig, alone, announce, check_name, check_range, seed_everything, shown

Pattern = tuple[int, int]  # (n, m): n of every m neighbours stay
UNSTRUCTURED, STRUCTURED = ("magnitude", "wanda"), ("heads", "neurons", "layers")


# Which weights go


def magnitude_scores(weight: Tensor, statistics: InputStatistics | None = None) -> Tensor:
    """|w|: what is small goes (Han et al. 2015)."""
    return weight.abs()


def wanda_scores(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|w_ij| * rms(x_j): the output that a weight makes alone (Sun et al. 2023, equation 1). (rows, columns)."""
    if statistics is None:
        raise ValueError("wanda looks at activations; give statistics, see input_statistics")
    return weight.abs() * statistics.second_moment.diagonal().sqrt().to(weight)


SCORES: dict[str, Callable[[Tensor, InputStatistics | None], Tensor]] = {
    "magnitude": magnitude_scores,
    "wanda": wanda_scores,
}


def check_share(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must be between 0 and 1, the share of weights that go")


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: the best of each row, so that every row loses the same number, rounded down."""
    check_share(sparsity)
    n_gone = int(sparsity * scores.shape[1] + 1e-9)  # 0.29 * 100 is 28.999... in floats
    order = scores.argsort(dim=1)  # (rows, columns), the worst first
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, order[:, :n_gone], False)  # (rows, columns)


def matrix_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: the best of the whole matrix."""
    return row_mask(scores.reshape(1, -1), sparsity).reshape(scores.shape)  # (rows, columns)


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """True for the best n of every m neighbours in a row. Raises ValueError if m does not divide the row."""
    n, m = pattern
    if not 0 < n <= m or scores.shape[1] % m:
        raise ValueError(f"pattern {n}:{m} needs 0 < n <= m and rows that are a multiple of m, got {scores.shape[1]}")
    best = scores.unflatten(1, (-1, m)).argsort(dim=2, descending=True)[..., :n]  # (rows, groups, n)
    mask = torch.zeros(*best.shape[:2], m, dtype=torch.bool, device=scores.device)  # (rows, groups, m)
    return mask.scatter(2, best, True).flatten(1)  # (rows, columns)


@torch.no_grad()
def prune_weights(
    model: CausalLM,
    method: str,
    sparsity: float,
    statistics: dict[str, InputStatistics] | None = None,
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Set weights of all linear layers in the blocks to zero, in place; returns the masks, True = stays.

    Magnitude compares within a matrix, Wanda within a row, as their papers do; a pattern within m neighbours, whatever
    the sparsity says. Nothing gets smaller or faster by itself. Raises ValueError for a sparsity outside 0..1.
    """
    check_name("method", method, SCORES)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be >= 0 and < 1, got {sparsity}")
    masks = {}
    for name, layer in block_linears(model).items():
        scores = SCORES[method](layer.weight, statistics[name] if statistics else None)
        if pattern:
            masks[name] = pattern_mask(scores, pattern)
        else:
            masks[name] = (matrix_mask if method == "magnitude" else row_mask)(scores, sparsity)
        layer.weight *= masks[name]
    return masks


# What zeros weigh


class TwoOfFour(NamedTuple):
    """A 2:4 matrix as its kernels store it: the values that stay, and two bits of place for each.

    Shapes: values (rows, columns / 2), places (rows, columns / 8) uint8.
    """

    values: Tensor
    places: Tensor

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes + self.places.nbytes


def compress_two_of_four(weight: Tensor) -> TwoOfFour:
    """Keep the two largest of every four neighbours. Raises ValueError if more than two are not zero."""
    if weight.shape[1] % 4:
        raise ValueError(f"rows of {weight.shape[1]} do not divide into fours; pad them with zeros to a multiple of 4")
    groups = weight.unflatten(1, (-1, 4))  # (rows, groups, 4)
    if ((groups != 0).sum(2) > 2).any():
        raise ValueError("four neighbours have more than two values that are not zero; prune with pattern (2, 4) first")
    places = groups.abs().argsort(dim=2, descending=True, stable=True)[..., :2].sort(2).values  # (rows, groups, 2)
    values = groups.gather(2, places).flatten(1)  # (rows, kept)
    return TwoOfFour(values, pack_codes(places.flatten(1), 2))


def expand_two_of_four(compressed: TwoOfFour) -> Tensor:
    """The way back: (rows, columns)."""
    values = compressed.values.unflatten(1, (-1, 2))  # (rows, groups, 2)
    places = unpack_codes(compressed.places, 2, compressed.values.shape[1]).long().unflatten(1, (-1, 2))
    return values.new_zeros(*values.shape[:2], 4).scatter(2, places, values).flatten(1)  # (rows, columns)


def csr_bytes(rows: int, columns: int, sparsity: float, bytes_per_value: int = 4) -> int:
    """Bytes of a matrix of which a share is zero, in compressed rows: value and 4-byte column of the rest, row starts.

    Below the dense bytes only from a sparsity of 4 / (4 + bytes_per_value) on: a half in float32, two thirds in bf16.
    """
    check_share(sparsity)
    kept = rows * columns - round(sparsity * rows * columns)
    return kept * (bytes_per_value + 4) + 4 * (rows + 1)


# Heads, neurons, blocks: tensors that get smaller


def resized(model: CausalLM, **sizes: int) -> CausalLM:
    """An untrained model of other sizes, to be filled."""
    return CausalLM(replace(model.config, **sizes)).to(next(model.parameters())).eval()


def check_kept(what: str, n_kept: int, n_all: int) -> None:
    if not 1 <= n_kept <= n_all:
        raise ValueError(f"{n_kept} {what} cannot stay of {n_all}; keep 1 to {n_all}")


@torch.no_grad()
def head_scores(model: CausalLM, statistics: dict[str, InputStatistics]) -> Tensor:
    """Power that each group of a key-value head and its queries adds to the stream: (layers, kv_heads).

    tr(W_g M_g W_g^T): W_g the columns of out_proj that read the group, M_g the second moment of what it gives them.
    """
    scores = torch.zeros(len(model.blocks), model.config.n_kv_heads, dtype=torch.float64)  # (layers, kv_heads)
    for layer, block in enumerate(model.blocks):
        weight = block.self_attn.out_proj.weight.double()
        moment = statistics[f"blocks.{layer}.self_attn.out_proj"].second_moment.to(weight)
        for group, columns in enumerate(torch.arange(weight.shape[1]).chunk(model.config.n_kv_heads)):
            part = weight[:, columns]  # (rows, *)
            scores[layer, group] = ((part @ moment[columns][:, columns]) * part).sum()
    return scores


@torch.no_grad()
def prune_heads(model: CausalLM, n_kv_heads: int, statistics: dict[str, InputStatistics]) -> CausalLM:
    """Keep the best n_kv_heads key-value heads of every block, each with all of its query heads.

    With grouped queries a key cannot go alone: its queries would have nothing to read, and the sharing must stay even.
    A config.json has one number of heads for all blocks, so every block loses as many. Returns a smaller model.
    """
    config = model.config
    check_kept("key-value heads", n_kv_heads, config.n_kv_heads)
    share = config.n_heads // config.n_kv_heads
    small = resized(model, n_heads=n_kv_heads * share, n_kv_heads=n_kv_heads)
    scores = head_scores(model, statistics)
    for layer, (old, new) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        kept = scores[layer].topk(n_kv_heads).indices.sort().values  # (kept)
        keys = torch.arange(config.n_kv_heads * config.d_head).unflatten(0, (config.n_kv_heads, -1))[kept].flatten()
        queries = torch.arange(config.n_heads * config.d_head).unflatten(0, (config.n_kv_heads, -1))[kept].flatten()
        attention, smaller = old.self_attn, new.self_attn
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            for part, tensor in getattr(attention, name).named_parameters():
                getattr(getattr(smaller, name), part).copy_(tensor[rows])
        smaller.out_proj.weight.copy_(attention.out_proj.weight[:, queries])
        copy_rest(old, new, ("q_proj", "k_proj", "v_proj", "out_proj.weight"))
    copy_rest(model, small, ("blocks.",))
    return small


@torch.no_grad()
def prune_neurons(model: CausalLM, d_ff: int, statistics: dict[str, InputStatistics]) -> CausalLM:
    """Keep the d_ff hidden units of every feed-forward network that add most: |column of down_proj| * rms of the unit.

    Returns a smaller model; every block keeps as many.
    """
    check_kept("hidden units", d_ff, model.config.d_ff)
    small = resized(model, d_ff=d_ff)
    for layer, (old, new) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        power = statistics[f"blocks.{layer}.ffn.down_proj"].second_moment.diagonal()
        norms = old.ffn.down_proj.weight.double().square().sum(0) * power.to(old.ffn.down_proj.weight.device)
        kept = norms.topk(d_ff).indices.sort().values  # (kept)
        for name in ("gate_proj", "up_proj"):
            getattr(new.ffn, name).weight.copy_(getattr(old.ffn, name).weight[kept])
        new.ffn.down_proj.weight.copy_(old.ffn.down_proj.weight[:, kept])
        copy_rest(old, new, ("ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"))
    copy_rest(model, small, ("blocks.",))
    return small


@torch.no_grad()
def block_influence(model: CausalLM, batches: list[Batch]) -> Tensor:
    """1 - mean cosine between a block's input and output over the tokens: (layers) (Men et al. 2024, section 3)."""
    sums, count = torch.zeros(len(model.blocks), dtype=torch.float64), 0
    real = torch.ones(0, dtype=torch.bool)

    def watch(layer: int) -> Callable:
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            cosine = F.cosine_similarity(inputs[0][real].double(), output[real].double(), dim=-1)  # (tokens)
            sums[layer] += (1 - cosine).sum().cpu()

        return hook

    hooks = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(model.blocks)]
    try:
        for token_ids, is_real in batches:
            real = is_real
            model(token_ids)
            count += int(is_real.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return sums / count


@torch.no_grad()
def prune_layers(model: CausalLM, n_layers: int, batches: list[Batch]) -> CausalLM:
    """Keep the n_layers blocks that turn the stream most, in their order. Returns a smaller model."""
    check_kept("blocks", n_layers, model.config.n_layers)
    kept = block_influence(model, batches).topk(n_layers).indices.sort().values.tolist()
    small = resized(model, n_layers=n_layers)
    for new, layer in zip(small.blocks, kept, strict=True):
        new.load_state_dict(model.blocks[layer].state_dict())
    copy_rest(model, small, ("blocks.",))
    return small


def copy_rest(old: nn.Module, new: nn.Module, done: tuple[str, ...]) -> None:
    """Copy every parameter whose name contains none of `done`."""
    source = dict(old.named_parameters(remove_duplicate=False))
    for name, parameter in new.named_parameters():
        if not any(part in name for part in done):
            parameter.copy_(source[name])


# Training on, zeros kept


def train_masked(
    model: CausalLM,
    masks: dict[str, Tensor],
    batches: Callable[[int], dict[str, Tensor]],
    config: TrainConfig,
    loss_fn: Callable = language_model_loss,
) -> CausalLM:
    """Train a pruned model a little more, in place; what was pruned stays zero. No masks: plain training."""
    layers = block_linears(model)

    def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # the last step moved the zeros, by momentum or decay at least
            for name, mask in masks.items():
                layers[name].weight *= mask
        return loss_fn(model, batch)

    fit(model, batches, masked_loss, config)
    with torch.no_grad():
        for name, mask in masks.items():
            layers[name].weight *= mask
    return model.eval()


def sparsity_of(model: CausalLM) -> float:
    """Share of zeros in the linear layers of the blocks."""
    weights = [layer.weight for layer in block_linears(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# The verb


@dataclass(frozen=True)
class PruneConfig(CheckpointConfig):
    """What to prune, and how much."""

    what: Literal["magnitude", "wanda", "magnitude-2:4", "wanda-2:4", "heads", "neurons", "layers"] = "neurons"  # rule
    share: float = 0.5  # share of weights, heads, neurons or blocks that goes; the 2:4 rules take half
    n_calibration: int = 128  # training documents whose activations are looked at
    n_held_out: int = 500  # held-out documents to examine both models with

    def __post_init__(self) -> None:
        check_range(self, "share", least=0, below=1)
        check_range(self, "n_calibration", least=1)
        check_range(self, "n_held_out", least=2)


def pruned(model: CausalLM, what: str, share: float, batches: list[Batch]) -> CausalLM:
    """A pruned copy. Raises ValueError for a rule that is not known."""
    check_name("what", what.removesuffix("-2:4"), (*UNSTRUCTURED, *STRUCTURED))
    config, statistics = model.config, input_statistics(model, batches) if what != "layers" else {}

    def staying(n: int) -> int:
        return math.ceil((1 - share) * n - 1e-9)  # 0.3 of 40, computed so, is 12.000000000000002

    if what == "layers":
        return prune_layers(model, staying(config.n_layers), batches)
    if what == "heads":
        return prune_heads(model, staying(config.n_kv_heads), statistics)
    if what == "neurons":
        return prune_neurons(model, staying(config.d_ff), statistics)
    copied = copy.deepcopy(model)
    pattern = (2, 4) if what.endswith("-2:4") else None
    prune_weights(copied, what.removesuffix("-2:4"), share, statistics, pattern)
    return copied


@alone
def prune(config: PruneConfig, run: RunConfig) -> None:
    """Prune a model, save it as a Llama folder, and say what became smaller and what was lost."""
    announce(f"prune {shown(config.folder)} by {config.what}", 20)
    seed_everything(run.seed)
    model, tokenizer = load_course_model(config.folder)
    small = pruned(model, config.what, config.share, calibration_batches(tokenizer, config.n_calibration, run.seed))
    folder = run.out / "model"
    small.save_pretrained(folder)
    load_course_tokenizer().save_folder(folder)
    exam = Exam.of(model, tokenizer, World().documents(config.n_held_out, 7, "validation"))
    damage, error = exam.damage(small)
    print(
        f"{float_bytes(model):,} bytes before, {float_bytes(small):,} after; {sparsity_of(small):.0%} zeros in blocks"
    )
    print(f"gap to the floor {exam.gap(model)[0]:.4f}, then {exam.gap(small)[0]:.4f} nats per token")
    print(
        f"what pruning cost: {damage:+.4f} ± {error:.4f} nats per token, without training on; saved in {shown(folder)}"
    )
