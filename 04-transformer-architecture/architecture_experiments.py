"""Topic 04 - Architecture experiments: every measurement and every planted failure of the chapter.

python 04-transformer-architecture/transformer_architecture.py figures                 # all of them: eight minutes
python 04-transformer-architecture/transformer_architecture.py figures norms lengths   # some of them
python 04-transformer-architecture/transformer_architecture.py --break mask            # one failure

Papers: Xiong et al. 2020 (arXiv 2002.04745), gradients by layer in both norm orders; Dong et al. 2021 (arXiv
2103.03404), positions that become alike; Press et al. 2022 (arXiv 2108.12409), lengths beyond those of training.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import prerequisites
from sequence_modeling import BOS_ID, IGNORE, PAD_ID, document_losses, gap_to_floor
from transformer_architecture import (
    GPT2_SMALL,
    HELD_OUT_SEED,
    NORM_ORDERS,
    POSITIONS,
    VASWANI_BASE,
    VASWANI_BIG,
    CausalTransformer,
    Decoder,
    Encoder,
    EncoderLayer,
    LayerNorm,
    LearnedPositions,
    ModelConfig,
    NumpyTransformer,
    TrainConfig,
    TrainedModel,
    TransformerSize,
    activation_bytes,
    count_parameters,
    entropy_floor,
    fit,
    held_out_documents,
    kv_cache_bytes,
    pairs_to_halves,
    rotate_halves,
    smooth,
    start_as_identity,
    tiny_world,
    tiny_world_batches,
    train_language_model,
    transformer_flops,
    transformer_parameters,
)
from workbench import (
    Column,
    RunConfig,
    check_folder,
    check_name,
    check_range,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
)

NORM_RATES = (2e-3, 7e-3)  # learning rates of the comparison of norm orders: a careful one, and the module's own


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # names of experiments; none means all
    n_seeds: int = 3  # runs of every condition that is compared
    d_model: int = 64  # width of the two-block models; the deep ones have half of it
    n_deep: int = 6  # blocks of the models whose norm orders are compared
    deep_steps: int = 200  # their training steps
    max_steps: int = 400  # training steps of the two-block models
    n_documents: int = 500  # held-out documents to examine each model with
    n_rows: int = 100  # held-out rows on which the excess by position is measured
    longest: int = 256  # positions of such a row
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "d_model", "n_deep", "deep_steps", "max_steps", "n_rows", least=1)
        check_range(self, "n_documents", least=2)
        check_range(self, "longest", least=96)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)
        check_folder(self.folder)


# Experiments: what each choice does. Each returns one list of results for every condition, seed by seed


def train_both_engines(
    model: CausalTransformer, inputs: Tensor, targets: Tensor, max_steps: int, learning_rate: float = 1e-2
) -> tuple[list[float], list[float]]:
    """Train a float64 copy of `model` with torch and one with NumPy on the same batch, both with Adam.

    Returns the losses (nats per token) before every step, torch's and NumPy's: the same numbers up to rounding.
    """
    twin, ours = copy.deepcopy(model).double(), NumpyTransformer(model)
    their_optimizer = torch.optim.Adam(twin.parameters(), lr=learning_rate)
    our_optimizer = prerequisites.Adam(ours.weights.values(), learning_rate)
    their_losses, our_losses = [], []
    for _ in range(max_steps):
        their_loss = F.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        our_loss = prerequisites.cross_entropy(ours(inputs.numpy()), targets.numpy(), IGNORE)
        for loss, optimizer in ((their_loss, their_optimizer), (our_loss, our_optimizer)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        their_losses.append(their_loss.item())
        our_losses.append(our_loss.item())
    return their_losses, our_losses


def held_out_gap(model: CausalTransformer, n_documents: int) -> float:
    """Loss on held-out documents minus their own surprisal, in nats per token: below 0 only if a model cheats."""
    held_out = held_out_documents(n_documents)
    return gap_to_floor(document_losses(model, held_out, tiny_world()[1]), held_out)[0]


@functools.cache
def sound_run(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> TrainedModel:
    """A model as it should be, trained once for all experiments that need it; copy it before an edit."""
    return train_language_model(model_config, config, run)


def gradient_norms(model: CausalTransformer, inputs: Tensor, targets: Tensor) -> list[float]:
    """Euclidean norm of the loss gradient of each block's parameters, first to last (Xiong et al. 2020, figure 3)."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    return [
        math.sqrt(sum(parameter.grad.square().sum().item() for parameter in block.parameters()))
        for block in model.encoder.blocks
    ]


@dataclass(frozen=True)
class NormRun:
    """One model of a norm order: what its gradients and its stream look like before training, and where it ends."""

    gradients: list[float]  # norm of the gradient of each block's parameters, before the first step
    similarities: list[float]  # position_similarities before the first step
    before: list[float]  # residual_variances before the first step
    after: list[float]  # and after the last
    losses: list[float]  # nats per token, of every step
    gap: float  # nats per token above the entropy floor, after training


def compare_norm_orders(
    model_config: ModelConfig, config: TrainConfig, run: RunConfig, seeds: range
) -> dict[str, list[NormRun]]:
    """Pre-norm and post-norm, each with the warm-up of `config` and with none, without the identity start.

    Returns for "pre, warm-up 50" and its like one NormRun for each seed.
    """
    results: dict[str, list[NormRun]] = {}
    for norm_order, warmup_steps in itertools.product(NORM_ORDERS, (config.warmup_steps, 0)):
        model_kind = dataclasses.replace(model_config, norm_order=norm_order)
        schedule = dataclasses.replace(config, warmup_steps=warmup_steps)
        for seed in seeds:
            seed_everything(seed)
            model, batch = CausalTransformer(model_kind, len(tiny_world()[1])), next(tiny_world_batches(schedule, seed))
            gradients, before = gradient_norms(model, *batch), residual_variances(model, batch[0])
            similarities = position_similarities(model, batch[0])
            kept = dataclasses.replace(run, seed=seed)
            trained = train_language_model(model_kind, schedule, kept, prepare=lambda model: None)
            after = residual_variances(trained.model.cpu(), batch[0])
            norm_run = NormRun(gradients, similarities, before, after, trained.losses, trained.gap)
            results.setdefault(f"{norm_order}, warm-up {warmup_steps}", []).append(norm_run)
    return results


@torch.no_grad()
def through_blocks(model: CausalTransformer, token_ids: Tensor, measure: Callable[[Tensor], float]) -> list[float]:
    """What `measure` says of the residual stream (batch, seq, d_model): of the embeddings, then after each block."""
    measured: list[float] = []
    handles = [
        block.register_forward_hook(lambda block, args, output: measured.append(measure(output)))
        for block in model.encoder.blocks
    ]
    handles.append(model.encoder.register_forward_pre_hook(lambda encoder, args: measured.append(measure(args[0]))))
    model(token_ids)
    for handle in handles:
        handle.remove()
    return measured


def residual_variances(model: CausalTransformer, token_ids: Tensor) -> list[float]:
    """Variance of the residual stream: of the embeddings, then after each block.

    In pre-norm every sub-layer adds an independent part, so the variance grows linearly with depth; in post-norm each
    block hands on a normalised stream. `predicted_variances` is the derivation's answer.
    """
    return through_blocks(model, token_ids, lambda x: x.var().item())


def position_similarities(model: CausalTransformer, token_ids: Tensor) -> list[float]:
    """Mean cosine between the vectors of two positions of a sequence: of the embeddings, then after each block."""

    def cosine(x: Tensor) -> float:
        unit, n_positions = F.normalize(x, dim=-1), x.shape[1]
        cosines = unit @ unit.transpose(1, 2)  # (batch, seq, seq), with ones on the diagonal
        return ((cosines.sum(dim=(1, 2)) - n_positions) / (n_positions * (n_positions - 1))).mean().item()

    return through_blocks(model, token_ids, cosine)


def predicted_variances(size: TransformerSize, seq_len: int) -> tuple[list[float], list[float]]:
    """Least and most variance of the pre-norm stream before training: of the embeddings, then after each block.

    Both sub-layers see inputs of variance 1. Xavier weights and ReLU make the feed-forward network's output of variance
    2 d d_ff / (d + d_ff)^2. Attention averages: i equal shares of independent values have variance 1 / i (least), of
    equal values 1 (most).
    """
    feed_forward = 2 * size.d_model * size.d_ff / (size.d_model + size.d_ff) ** 2
    independent = sum(1 / n_keys for n_keys in range(1, seq_len + 1)) / seq_len
    blocks = range(size.n_encoder_layers + 1)
    least, most = ([1 + block * (feed_forward + attention) for block in blocks] for attention in (independent, 1.0))
    return least, most


def silence(module: nn.Module) -> None:
    """Make a sub-layer add nothing to the stream: its output becomes 0."""

    def zeroed(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, Tensor]):
        return (0 * output[0], output[1]) if isinstance(output, tuple) else 0 * output

    module.register_forward_hook(zeroed)


def remove_norms(block: EncoderLayer) -> None:
    block.attn_norm, block.ffn_norm = nn.Identity(), nn.Identity()


def remove_residual(block: EncoderLayer) -> None:
    block.residual = lambda x, norm, sublayer: sublayer(norm(x))


ABLATIONS = {  # name: the edit that removes this part from a block
    "nothing": lambda block: None,
    "attention": lambda block: silence(block.self_attn),
    "feed-forward": lambda block: silence(block.ffn),
    "normalisation": remove_norms,
    "residual connection": remove_residual,
}


def ablate(part: str) -> Callable[[CausalTransformer], None]:
    """The edit of a whole model that removes `part` from each block, before training."""
    remove = ABLATIONS[check_name("part", part, ABLATIONS)]

    def prepare(model: CausalTransformer) -> None:
        for block in model.encoder.blocks:
            remove(block)

    return prepare


def compare_parts(
    model_config: ModelConfig, config: TrainConfig, run: RunConfig, seeds: range
) -> dict[str, list[float]]:
    """Gap to the floor (nats per token) of models trained without one part, seed by seed."""
    return {
        part: [
            train_language_model(model_config, config, dataclasses.replace(run, seed=seed), ablate(part)).gap
            for seed in seeds
        ]
        for part in ABLATIONS
    }


@torch.no_grad()
def excess_by_position(model: CausalTransformer, seq_len: int, n_rows: int, seed: int) -> list[float]:
    """Nats above the surprisal of the language, at each of seq_len positions, over rows packed with held-out documents.

    Documents are short, so a longer row asks for no longer memory: only a model that its positions confuse gets worse.
    """
    world, vocabulary = tiny_world()
    documents = world.stream(seed, split="validation")
    rows, floors = [], []
    for _ in range(n_rows):
        row, floor = [], []
        while len(row) <= seq_len:
            document = next(documents)
            row += [BOS_ID, *vocabulary.encode(document.tokens)]
            floor += [math.nan, *document.surprisal]
        rows.append(row[: seq_len + 1])
        floors.append(floor[1 : seq_len + 1])
    token_ids = torch.tensor(rows, device=model.lm_head.weight.device)  # (rows, seq_and_one)
    parts = []
    for part in token_ids.split(32):
        logits = model.eval()(part[:, :-1])  # (batch, seq, vocab)
        parts.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().cpu())
    return (torch.cat(parts) - torch.tensor(floors, dtype=torch.float64)).nanmean(dim=0).tolist()


def compare_lengths(
    model_config: ModelConfig, config: TrainConfig, run: RunConfig, seeds: range, n_rows: int = 200
) -> dict[str, list[list[float]]]:
    """For each position scheme, seed by seed: excess_by_position up to max_seq_len of a model trained on seq_len."""
    curves: dict[str, list[list[float]]] = {}
    for positions in POSITIONS:
        for seed in seeds:
            scheme = dataclasses.replace(model_config, positions=positions)
            trained = sound_run(scheme, config, dataclasses.replace(run, seed=seed))
            excess = excess_by_position(trained.model, model_config.max_seq_len, n_rows, HELD_OUT_SEED)
            curves.setdefault(positions, []).append(excess)
    return curves


# Failures: each returns what is measured, the value as it should be, and the value with the failure


Finding = tuple[str, float, float]


def with_norms(model: CausalTransformer, forward: Callable[[LayerNorm, Tensor], Tensor]) -> CausalTransformer:
    """A copy of the model with another formula in each of its normalisations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.forward = functools.partial(forward, module)
    return model


def unbiased_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return norm.weight * centred / (x.var(dim=-1, keepdim=True) + norm.norm_eps).sqrt() + norm.bias


def epsilon_outside(norm: LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()  # its gradient at 0 is infinite
    return norm.weight * centred / (deviation + norm.norm_eps) + norm.bias


def break_unbiased(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Finding]:
    """Tensor.std and Tensor.var divide by d - 1 unless told otherwise."""
    norm, x = LayerNorm(2), torch.tensor([1.0, 3.0])
    trained = sound_run(model_config, config, run)
    gap = held_out_gap(with_norms(trained.model, unbiased_norm), config.n_documents)
    return [
        ("second feature of the normalised (1, 3)", norm(x)[1].item(), unbiased_norm(norm, x)[1].item()),
        ("gap of a trained model, nats per token", trained.gap, gap),
    ]


def break_epsilon(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Finding]:
    """With eps outside the root small inputs are blown up, and a row of zeros has the gradient 0 / 0."""
    norm, x = LayerNorm(2), torch.tensor([-1e-3, 1e-3])
    inputs, targets = next(tiny_world_batches(config, run.seed))
    inputs[:, -1] = PAD_ID
    targets[:, -1] = IGNORE
    shares = []
    for forward in (LayerNorm.forward, epsilon_outside):
        seed_everything(run.seed)
        model = with_norms(CausalTransformer(model_config, len(tiny_world()[1])), forward)
        model.token_emb.weight.data[PAD_ID] = 0  # what nn.Embedding(padding_idx=...) does
        fit(model, iter([(inputs, targets)]), dataclasses.replace(config, max_steps=1))
        finite = sum(parameter.isfinite().sum().item() for parameter in model.parameters())
        shares.append(finite / count_parameters(model)["total"])
    return [
        ("second feature of the normalised (-0.001, 0.001)", norm(x)[1].item(), epsilon_outside(norm, x)[1].item()),
        ("share of finite weights after one step with a padding vector of zeros", *shares),
    ]


def break_norm_order(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Finding]:
    """One formula under two names: what is called pre-norm normalises the stream."""
    seed_everything(run.seed)
    pre = CausalTransformer(dataclasses.replace(model_config, norm_order="pre"), len(tiny_world()[1]))
    post = copy.deepcopy(pre)
    for block in post.encoder.blocks:
        block.norm_order = "post"
    broken = copy.deepcopy(pre)
    for block in broken.encoder.blocks:
        block.residual = lambda x, norm, sublayer: norm(x + sublayer(x))
    inputs, _ = next(tiny_world_batches(config, run.seed))
    variances = [residual_variances(model, inputs)[-1] for model in (pre, broken)]
    with torch.no_grad():
        distances = [(model(inputs) - post(inputs)).abs().max().item() for model in (pre, broken)]
    return [
        ("variance of the untrained stream after the last block", *variances),
        ("largest difference between the logits of pre-norm and post-norm", *distances),
    ]


def break_rotary(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Finding]:
    """Weights trained on pairs of features, run by code that rotates halves."""
    trained = sound_run(dataclasses.replace(model_config, positions="rotary"), config, run)
    mixed = copy.deepcopy(trained.model)
    for block in mixed.encoder.blocks:
        block.self_attn.rotate = rotate_halves
    broken = held_out_gap(mixed, config.n_documents)
    for block in mixed.encoder.blocks:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj):
            layer.weight.data = pairs_to_halves(layer.weight.data, model_config.n_heads)
            layer.bias.data = pairs_to_halves(layer.bias.data, model_config.n_heads)
    return [
        ("gap, weights loaded as they are, nats per token", trained.gap, broken),
        ("gap, rows of q and k reordered, nats per token", trained.gap, held_out_gap(mixed, config.n_documents)),
    ]


def forget_mask(model: CausalTransformer) -> None:
    """Let every position attend to the whole row, its future included."""
    start_as_identity(model)
    for block in model.encoder.blocks:
        block.attend_self = lambda x, mask, cache, block=block: block.self_attn(x)[0]


def break_mask(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Finding]:
    """Without the causal mask a position reads the token that it is asked to predict."""
    broken = train_language_model(model_config, config, run, prepare=forget_mask)
    return [("gap after training, nats per token", sound_run(model_config, config, run).gap, broken.gap)]


BREAKS = {  # name that --break takes: what shows the failure, and how many models it trains
    "unbiased": (break_unbiased, 1),
    "epsilon": (break_epsilon, 0),
    "norm-order": (break_norm_order, 0),
    "rotary": (break_rotary, 1),
    "mask": (break_mask, 2),
}


# Figures


def plot_curves(
    curves: dict[str, list[list[float]]],
    xlabel: str,
    ylabel: str,
    width: int = 1,
    marks: tuple[float, ...] = (),
    levels: dict[str, float] | None = None,
) -> Figure:
    """One line for each name: the mean over seeds, averaged over `width` points, with a band from least to most.

    `marks` are places on the x axis, `levels` named heights such as the optimum.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for index, (name, runs) in enumerate(curves.items()):
        lines = np.stack([smooth(run, width) for run in runs])  # (seeds, points)
        start = len(runs[0]) - lines.shape[1]
        x, stride = np.arange(start, len(runs[0])), 1 + lines.shape[1] // 128  # thinned out: the file stays small
        x, lines = x[::stride], lines[:, ::stride]
        axis.plot(x, lines.mean(axis=0), color=f"C{index}", label=name)
        axis.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=f"C{index}", alpha=0.2, lw=0)
    for mark in marks:
        axis.axvline(mark, color="black", ls=":", lw=1)
    for style, (name, level) in zip(itertools.cycle(("--", "-.")), (levels or {}).items(), strict=False):
        axis.axhline(level, color="black", ls=style, lw=1, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_blocks() -> Figure:
    """Where the normalisation stands: off the residual stream (pre-norm) or on it (post-norm)."""
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 3.4))
    titles = {
        "pre": "pre-norm: x + f(norm(x)); the stream itself is only added to",
        "post": "post-norm: norm(x + f(x)); the stream passes through every norm",
    }

    def box(axis, x: float, y: float, text: str, color: str, width: float) -> None:
        axis.add_patch(plt.Rectangle((x - width / 2, y - 0.42), width, 0.84, fc="white", ec=color, lw=1.6, zorder=3))
        axis.text(x, y, text, ha="center", va="center", fontsize=9, zorder=4)

    for axis, norm_order in zip(axes, NORM_ORDERS, strict=True):
        axis.set(xlim=(0, 23), ylim=(-0.8, 2.5))
        axis.axis("off")
        axis.set_title(titles[norm_order], fontsize=10, loc="left")
        axis.annotate("", (22.8, 0), (0.2, 0), arrowprops={"arrowstyle": "-|>", "lw": 3, "color": "C0"})
        for start, name in ((1.0, "attention"), (11.5, "feed-forward")):
            end = start + 7.2
            axis.plot([start, start, end, end], [0, 1.5, 1.5, 0], color="C7", lw=1.4)
            axis.text(
                end,
                0,
                "+",
                ha="center",
                va="center",
                fontsize=11,
                zorder=4,
                bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "C0", "lw": 1.6},
            )
            box(axis, start + (5.0 if norm_order == "pre" else 3.6), 1.5, name, "C2", 3.6)
            if norm_order == "pre":
                box(axis, start + 1.5, 1.5, "norm", "C1", 2.2)
            else:
                box(axis, end + 1.9, 0, "norm", "C1", 2.2)
    return figure


def plot_models() -> Figure:
    """The two whole models, input below and output above: encoder with decoder, and decoder-only."""
    figure, axis = plt.subplots(figsize=(6.4, 3.9))
    axis.set(xlim=(-0.2, 15.4), ylim=(-1.1, 7.7))
    axis.axis("off")
    columns = {  # x: what the column is, and the sub-layers of a block
        2.2: ("encoder: source (B, S)", ["self-attention, all"]),
        7.4: ("decoder: target (B, T)", ["self-attention, causal", "cross-attention"]),
        13.0: ("decoder-only: text (B, T)", ["self-attention, causal"]),
    }
    for x, (title, attentions) in columns.items():
        last = 3 + len(attentions)
        stack = [("C7", "token embeddings"), ("C7", "+ positions"), *(("C2", name) for name in attentions)]
        stack += [("C4", "feed-forward"), ("C1", "final norm"), *([] if x < 5 else [("C7", "output matrix")])]
        top = len(stack) - 1
        axis.annotate("", (x, top + 1.0), (x, -0.6), arrowprops={"arrowstyle": "-|>", "lw": 2.5, "color": "C0"})
        axis.add_patch(plt.Rectangle((x - 2.35, 1.5), 4.7, last - 2, fc="0.93", ec="0.6", ls="--", zorder=1))
        axis.text(x + 2.15, (last + 1) / 2, "L times", fontsize=8, rotation=90, ha="center", va="center", zorder=4)
        for y, (color, text) in enumerate(stack):
            axis.add_patch(plt.Rectangle((x - 1.95, y - 0.28), 3.9, 0.56, fc="white", ec=color, lw=1.6, zorder=3))
            axis.text(x, y, text, ha="center", va="center", fontsize=8, zorder=4)
        axis.text(x, -0.95, title, ha="center", fontsize=8.5)
        output = "memory (B, S, d)" if x < 5 else "logits (B, T, |V|)"
        axis.text(x, top + 1.1, output, ha="center", fontsize=8.5)
    axis.plot([2.2, 4.8, 4.8], [4.62, 4.62, 3.0], color="C3", lw=1.6, zorder=2)
    axis.annotate("", (5.45, 3.0), (4.8, 3.0), arrowprops={"arrowstyle": "-|>", "lw": 1.6, "color": "C3"})
    axis.text(3.5, 4.7, "keys, values", color="C3", fontsize=8, ha="left")
    return figure


# The chapter's experiments


def save_table(
    config: FiguresConfig, experiment: str, name: str, columns: list[Column], rows: list[list], n_seeds: int
) -> None:
    """Record one table of an experiment; n_seeds 0 says that nothing random is in it (shown as seed 0)."""
    command = f"python 04-transformer-architecture/transformer_architecture.py figures {experiment}"
    save_results(config.folder / "results.json", name, columns, rows, range(max(1, n_seeds)), command)


def small_model(config: FiguresConfig) -> tuple[ModelConfig, TrainConfig]:
    """The two-block model of most experiments."""
    model_config = ModelConfig(max_seq_len=config.longest, d_model=config.d_model, d_ff=4 * config.d_model)
    return model_config, TrainConfig(max_steps=config.max_steps, n_documents=config.n_documents)


def show_blocks(config: FiguresConfig, run: RunConfig) -> None:
    save_figure(plot_blocks(), config.folder / "blocks.svg")
    save_figure(plot_models(), config.folder / "models.svg")


def show_norms(config: FiguresConfig, run: RunConfig) -> None:
    width = config.d_model // 2
    model_config = ModelConfig(config.longest, width, config.n_deep, d_ff=4 * width)
    schedule = TrainConfig(max_steps=config.deep_steps, n_documents=config.n_documents)
    by_rate = {
        rate: compare_norm_orders(
            model_config, dataclasses.replace(schedule, learning_rate=rate), run, range(config.n_seeds)
        )
        for rate in NORM_RATES
    }
    careful, bold = by_rate.values()  # the lower and the higher rate
    columns = [
        Column("norm order", digits="s"),
        *(Column(f"gap at learning rate {rate:g}", "nats per token", ".2f") for rate in NORM_RATES),
    ]
    rows = [[name, *([one.gap for one in runs[name]] for runs in by_rate.values())] for name in careful]
    save_table(config, "norms", "norms", columns, rows, config.n_seeds)
    orders = {order: careful[f"{order}, warm-up {schedule.warmup_steps}"] for order in NORM_ORDERS}
    blocks = [f"block {index + 1}" for index in range(config.n_deep)]
    columns = [Column("norm order", digits="s"), *(Column(block, "", ".3f") for block in blocks)]
    gradients = {order: [one.gradients for one in runs] for order, runs in orders.items()}
    rows = [[order, *(list(values) for values in zip(*gradients[order], strict=True))] for order in NORM_ORDERS]
    save_table(config, "norms", "gradients", columns, rows, config.n_seeds)
    size = TransformerSize(width, model_config.n_heads, model_config.d_ff, config.n_deep)
    least, most = predicted_variances(size, schedule.seq_len)
    curves = {"pre, least predicted": [least], "pre, most predicted": [most]}
    for order, runs in orders.items():
        curves[f"{order}, before"] = [one.before for one in runs]
        curves[f"{order}, after"] = [one.after for one in runs]
    columns = [Column("stream", digits="s"), *(Column(name, "", ".2f") for name in ("embeddings", *blocks))]
    rows = [[name, *(list(values) for values in zip(*runs, strict=True))] for name, runs in curves.items()]
    rows[0][1:], rows[1][1:] = least, most
    save_table(config, "norms", "variances", columns, rows, config.n_seeds)
    rows = [
        [order, *(list(values) for values in zip(*(one.similarities for one in runs), strict=True))]
        for order, runs in orders.items()
    ]
    columns = [Column("norm order", digits="s"), *columns[1:]]
    save_table(config, "norms", "similarities", columns, rows, config.n_seeds)
    losses = {name: [one.losses for one in runs] for name, runs in bold.items()}
    floor = {"entropy floor": entropy_floor(config.n_documents)}
    figure = plot_curves(
        losses, "step", "training loss (nats per token)", width=min(10, config.deep_steps), levels=floor
    )
    save_figure(figure, config.folder / "norms.svg")
    figure = plot_curves(gradients, "block", "norm of the gradient before the first step")
    figure.axes[0].set_xticks(range(config.n_deep), range(1, config.n_deep + 1))
    save_figure(figure, config.folder / "gradients.svg")
    figure = plot_curves(curves, "blocks passed", "variance of the residual stream")
    save_figure(figure, config.folder / "variances.svg")


def show_lengths(config: FiguresConfig, run: RunConfig) -> None:
    model_config, schedule = small_model(config)
    curves = compare_lengths(model_config, schedule, run, range(config.n_seeds), config.n_rows)
    edges = [0, schedule.seq_len, 2 * schedule.seq_len, config.longest]
    parts = list(itertools.pairwise(edges))
    columns = [Column("positions", digits="s")]
    columns += [Column(f"excess at {first} to {last - 1}", "nats per token", ".3f") for first, last in parts]
    rows = [
        [name, *([float(np.nanmean(curve[first:last])) for curve in runs] for first, last in parts)]
        for name, runs in curves.items()
    ]
    save_table(config, "lengths", "lengths", columns, rows, config.n_seeds)
    figure = plot_curves(
        curves, "position", "excess over the entropy (nats)", 16, (schedule.seq_len,), {"exact language": 0.0}
    )
    save_figure(figure, config.folder / "lengths.svg")


def show_parts(config: FiguresConfig, run: RunConfig) -> None:
    gaps = compare_parts(*small_model(config), run, range(config.n_seeds))
    columns = [Column("removed from every block", digits="s"), Column("gap to the floor", "nats per token", ".3f")]
    save_table(config, "parts", "parts", columns, [[name, runs] for name, runs in gaps.items()], config.n_seeds)


def show_engines(config: FiguresConfig, run: RunConfig) -> None:
    model_config, schedule = small_model(config)
    model_config = dataclasses.replace(model_config, n_layers=1, positions="learned")
    shown, n_steps = (0, 1, 10, 30), 31
    runs = []
    for seed in range(config.n_seeds):
        seed_everything(seed)
        model = CausalTransformer(model_config, len(tiny_world()[1]))
        runs.append(train_both_engines(model, *next(tiny_world_batches(schedule, seed)), n_steps, 3e-3))
    columns = [
        Column("after step", digits="s"),
        Column("loss with torch", "nats per token", ".6f"),
        Column("loss with NumPy", "nats per token", ".6f"),
        Column("largest difference", "", ".0e"),
    ]
    rows = [
        [
            str(step),
            [theirs[step] for theirs, _ in runs],
            [ours[step] for _, ours in runs],
            max(abs(ours[step] - theirs[step]) for theirs, ours in runs),
        ]
        for step in shown
    ]
    save_table(config, "engines", "engines", columns, rows, config.n_seeds)


def build_on_meta(size: TransformerSize) -> nn.ModuleDict:
    """Our layers of this size, without memory for their weights: one matrix for embeddings and output."""
    arguments = (size.d_model, size.n_heads, size.d_ff)
    with torch.device("meta"):
        parts = {"token_emb": nn.Embedding(size.vocab_size, size.d_model)}
        if size.n_positions:
            parts["pos_emb"] = LearnedPositions(size.d_model, size.n_positions)
        parts["encoder"] = Encoder(size.n_encoder_layers, *arguments)
        if size.n_decoder_layers:
            parts["decoder"] = Decoder(size.n_decoder_layers, *arguments)
    return nn.ModuleDict(parts)


def count_on_meta(model: nn.ModuleDict, src_len: int, tgt_len: int) -> int:
    """FLOPs of one forward pass of build_on_meta's model, as torch.utils.flop_counter sees them."""
    d_model = model["token_emb"].embedding_dim
    with FlopCounterMode(display=False) as counter:
        x = model["encoder"](torch.empty(1, src_len, d_model, device="meta"))
        if "decoder" in model:
            x = model["decoder"](torch.empty(1, tgt_len, d_model, device="meta"), x)
        F.linear(x, model["token_emb"].weight)
    return counter.get_total_flops()


def show_costs(config: FiguresConfig, run: RunConfig) -> None:
    models = {  # size, published parameters, positions of a source and of a target
        "Vaswani base": (VASWANI_BASE, "65 M", 512, 512),
        "Vaswani big": (VASWANI_BIG, "213 M", 512, 512),
        "GPT-2 small": (GPT2_SMALL, "124 M", 1024, 0),
    }
    built = {name: build_on_meta(size) for name, (size, *_) in models.items()}
    terms = {name: transformer_parameters(size) for name, (size, *_) in models.items()}
    columns = [Column("parameters", digits="s"), *(Column(name, "", ",") for name in models)]
    rows = [[term, *(counts[term] for counts in terms.values())] for term in terms["Vaswani base"]]
    rows.append(["counted in our modules", *(count_parameters(model)["total"] for model in built.values())])
    rows.append(["published", *(published for _, published, *_ in models.values())])
    save_table(config, "costs", "parameters", columns, rows, 0)
    columns = [
        Column("one sequence", digits="s"),
        Column("positions", digits="s"),
        Column("forward", "GFLOP, formula", ".3f"),
        Column("forward", "GFLOP, torch's counter", ".3f"),
        Column("of it scores and mixing", "", ".1%"),
        Column("FLOP per parameter and position", "", ".2f"),
        Column("activations", "MB, fp32", ",.0f"),
        Column("key-value cache", "MB, bf16", ".1f"),
    ]
    rows = []
    for name, (size, _, src_len, tgt_len) in models.items():
        flops = transformer_flops(size, 1, src_len, tgt_len)
        share = flops["scores and mixing"] / flops["total"]
        positions = f"{src_len} + {tgt_len}" if tgt_len else str(src_len)
        per_parameter = flops["total"] / terms[name]["total"] / (tgt_len or src_len)
        activations = activation_bytes(size, 1, src_len)["total"] / 1e6 if not tgt_len else "-"
        cache = kv_cache_bytes(size, 1, tgt_len or src_len, src_len if tgt_len else 0, 2) / 1e6
        counted = count_on_meta(built[name], src_len, tgt_len)
        rows.append([name, positions, flops["total"] / 1e9, counted / 1e9, share, per_parameter, activations, cache])
    save_table(config, "costs", "costs", columns, rows, 0)


def show_breaks(config: FiguresConfig, run: RunConfig) -> None:
    model_config, schedule = small_model(config)
    columns = [
        Column("--break", digits="s"),
        Column("what is measured", digits="s"),
        Column("sound", "", ".4f"),
        Column("broken", "", ".4f"),
    ]
    rows = []
    for name, (measure, _) in BREAKS.items():
        findings = [
            measure(model_config, schedule, dataclasses.replace(run, seed=seed)) for seed in range(config.n_seeds)
        ]
        for same in zip(*findings, strict=True):
            sound, broken = [finding[1] for finding in same], [finding[2] for finding in same]
            rows.append(
                [
                    f"`{name}`",
                    same[0][0],
                    *(values[0] if len(set(values)) == 1 else values for values in (sound, broken)),
                ]
            )
    save_table(config, "breaks", "breaks", columns, rows, config.n_seeds)


EXPERIMENTS = {  # name: the experiment, and about how many seconds it takes
    "blocks": (show_blocks, 1),
    "costs": (show_costs, 5),
    "engines": (show_engines, 15),
    "norms": (show_norms, 170),
    "lengths": (show_lengths, 140),
    "parts": (show_parts, 100),
    "breaks": (show_breaks, 70),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the experiments of the chapter, or only those named; write their figures and results.json."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
