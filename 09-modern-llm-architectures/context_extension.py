"""Topic 09 - Context extension: a model trained on short rows reads rows eight times as long, before and after tuning.

python 09-modern-llm-architectures/modern_llm_architectures.py figures context

Chen et al. 2023 (position interpolation, arXiv 2306.15595), Peng et al. 2023 (NTK-aware scaling and YaRN, arXiv
2309.00071), Xiao et al. 2023 (a window with sinks, arXiv 2309.17453).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from attention_mechanisms import key_distance, masked_softmax
from equal_compute import SIZES, TRAINING, lasting, remembered
from llm_config import ModelConfig
from llm_layers import GroupedQueryAttention, KVCache, RopeScaling, Rotation, rotate
from modern_llm_architectures import CausalLM
from packing import language_model_loss
from sequence_modeling import BOS_ID, IGNORE, device_of
from training_transformers import WorldBatches, fit
from transformer_architecture import tiny_world
from workbench import Column, RunConfig, check_name, pick_device, save_figure, seed_everything

if TYPE_CHECKING:
    from modern_llm_experiments import FiguresConfig

TRAINED, FACTOR = 64, 8  # tokens in a row of the training, and how many times longer the model shall read
LENGTHS = (64, 128, 256, 512)  # tokens in a row of the examination; each is examined in its last half, 64 in all
N_SINKS = 4
SHORT = replace(SIZES, d_model=64, n_kv_heads=2, d_head=16, d_ff=176, use_bias=False, max_seq_len=TRAINED)
STRETCHES = ("nothing", "linear", "NTK", "dynamic NTK", "YaRN")
WINDOWS = ("window", "window and sinks, places in the text", "window and sinks, places in the cache")


def stretched(method: str, config: ModelConfig = SHORT) -> ModelConfig:
    """The config of a model that reads FACTOR times what `config` was trained on; its weights stay the same.

    NTK-aware scaling is a larger theta: theta * FACTOR^(d / (d - 2)) slows the slowest pair of features by FACTOR and
    leaves the fastest alone. The dynamic kind does this with the length at hand in place of the longest.
    """
    check_name("stretch", method, STRETCHES + WINDOWS)
    long = replace(config, max_seq_len=FACTOR * config.max_seq_len)
    if method == "linear":
        return replace(long, rope_scaling=RopeScaling("linear", FACTOR))
    if method == "NTK":
        return replace(long, rope_theta=config.rope_theta * FACTOR ** (config.d_head / (config.d_head - 2)))
    if method == "dynamic NTK":
        return replace(config, rope_scaling=RopeScaling("dynamic", 1.0))
    if method == "YaRN":
        return replace(long, rope_scaling=RopeScaling("yarn", FACTOR, config.max_seq_len))
    if method == "window":
        return replace(long, window_size=config.max_seq_len)
    if method in WINDOWS:
        return replace(long, window_size=config.max_seq_len - N_SINKS, n_sinks=N_SINKS)
    return long


class StreamingAttention(GroupedQueryAttention):
    """A window with sinks whose positions are counted in the cache, not in the text (Xiao et al. 2023, section 3.2).

    A query then never meets a distance beyond n_sinks + window_size - 1, although the first tokens of the text are far
    behind it. Within the window only differences count, so it is the scores of the sinks alone that change. For whole
    rows, without a cache: the scores are written out, O(query * key) memory.
    """

    window_size, n_sinks = TRAINED - N_SINKS, N_SINKS

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        q, k, v = self.project(x)
        n_groups, seq_len = self.n_heads // self.n_kv_heads, x.shape[1]
        k, v = (tensor.repeat_interleave(n_groups, dim=1) for tensor in (rotate(k, rotation), v))
        places = torch.arange(seq_len, device=x.device).clamp(max=self.n_sinks + self.window_size - 1)  # (seq)
        near = (rotation[0][:, :, places], rotation[1][:, :, places])
        scores = rotate(q, rotation) @ k.transpose(-2, -1)  # (batch, heads, seq, seq)
        sinks = rotate(q, near) @ k[:, :, : self.n_sinks].transpose(-2, -1)  # (batch, heads, seq, sinks)
        scores = torch.cat([sinks, scores[..., self.n_sinks :]], dim=-1) * self.scale  # (batch, heads, seq, seq)
        mask = key_distance(seq_len, seq_len, x.device) >= 0 if mask is None else mask
        mixed = masked_softmax(scores, mask) @ v  # (batch, heads, seq, d_head)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (batch, seq, d_model)


def stretched_model(model: CausalLM, method: str) -> CausalLM:
    """A copy of a model, with the same weights, that reads on as `method` says."""
    longer = CausalLM(stretched(method, model.config)).to(device_of(model))
    if method == WINDOWS[2]:
        config = longer.config
        for block in longer.blocks:
            block.self_attn = StreamingAttention(config.d_model, config.n_heads, config.n_kv_heads, config.d_head)
            block.self_attn.window_size, block.self_attn.n_sinks = config.window_size, config.n_sinks
    longer.load_state_dict(model.state_dict())
    return longer.to(device_of(model))


# Long rows, and the loss at each place of them


def long_rows(n_rows: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of held-out documents one after the other: inputs, targets and the targets' surprisal, (batch, seq) each.

    Each document follows its <bos>; targets are -100 where that is the next token.
    """
    world, vocabulary = tiny_world()
    documents = world.stream(2**31 - 1, split="validation")
    ids, surprisal = [], []
    for _ in range(n_rows):
        row, known = [], []
        while len(row) <= seq_len:
            document = next(documents)
            row += [BOS_ID, *vocabulary.encode(document.tokens)]
            known += [0.0, *document.surprisal]
        ids.append(row[: seq_len + 1])
        surprisal.append(known[1 : seq_len + 1])
    rows = torch.tensor(ids)
    return rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] == BOS_ID, IGNORE), torch.tensor(surprisal)


@torch.no_grad()
def gap_by_place(model: CausalLM, rows: tuple[Tensor, Tensor, Tensor], seq_len: int) -> tuple[Tensor, Tensor]:
    """Nats above the surprisal, added up over the rows at every place, and the number of targets there: (seq) each."""
    inputs, targets, surprisal = (part[:, :seq_len].to(device_of(model)) for part in rows)
    logits = model(inputs)  # (batch, seq, vocab)
    nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")  # (batch, seq)
    counted = targets != IGNORE  # (batch, seq)
    return ((nats - surprisal) * counted).sum(dim=0), counted.sum(dim=0)


def gaps_by_length(model: CausalLM, rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Nats per token above the floor in the last half of each length, and in stretches of 32 places of the longest."""
    gaps: dict[str, Any] = {}
    for seq_len in LENGTHS:
        nats, counts = gap_by_place(model.eval(), rows, seq_len)
        first = 0 if seq_len == LENGTHS[0] else seq_len // 2
        gaps[str(seq_len)] = (nats[first:].sum() / counts[first:].sum()).item()
    stretches = zip(nats.split(32), counts.split(32), strict=True)
    return gaps | {"curve": [(part.sum() / number.sum()).item() for part, number in stretches]}


def context_run(config: "FiguresConfig", run: RunConfig, seed: int) -> dict[str, Any]:
    """One model trained on short rows, examined on long ones with every method, and again after a short tuning."""
    n_steps, n_tuned = config.steps("context_steps"), config.steps("tune_steps")

    def measure() -> dict[str, Any]:
        seed_everything(seed)
        rows, model = long_rows(N_ROWS, LENGTHS[-1]), CausalLM(SHORT).to(pick_device(run.device))
        train = lasting(replace(TRAINING, seq_len=TRAINED), n_steps)
        fit(model, WorldBatches(train, seed), language_model_loss, train)
        gaps = {method: gaps_by_length(stretched_model(model, method), rows) for method in STRETCHES + WINDOWS}
        tune = lasting(replace(TRAINING, learning_rate=2e-3, batch_size=1, seq_len=LENGTHS[-1]), n_tuned)
        for method in STRETCHES:
            longer = stretched_model(model, method)
            fit(longer, WorldBatches(tune, seed + TUNING_SEED), language_model_loss, tune)
            gaps[f"{method}, tuned"] = gaps_by_length(longer, rows)
        return gaps

    return remembered(config, run, f"context, {n_steps} and {n_tuned} steps, seed {seed}", measure)


N_ROWS = 24  # long rows to examine with
TUNING_SEED = 1000  # the tuning reads other documents than the training


def context(config: "FiguresConfig", run: RunConfig) -> None:
    """Loss beyond the trained length, before and after each way to stretch positions, and after a short tuning."""
    runs = [context_run(config, run, seed) for seed in range(config.n_seeds)]
    rows = []
    for method in STRETCHES + WINDOWS:
        cells = [[item[method][str(seq_len)] for item in runs] for seq_len in LENGTHS]
        tuned: list = ["", ""]
        if method in STRETCHES:
            tuned = [[item[f"{method}, tuned"][str(seq_len)] for item in runs] for seq_len in (LENGTHS[0], LENGTHS[-1])]
        rows.append([method, *cells, *tuned])
    places = [f"places {0 if seq_len == LENGTHS[0] else seq_len // 2} to {seq_len}" for seq_len in LENGTHS]
    columns = [Column("Positions"), *(Column(place, "", ".3f") for place in places)]
    columns += [Column(f"{place}, tuned", "", ".3f") for place in (places[0], places[-1])]
    config.save("context", columns, rows, "context")
    save_figure(plot_context(runs), config.folder / "context.svg")


def plot_context(runs: list[dict[str, Any]]) -> Figure:
    """Gap to the floor by place in a row of 512 tokens, mean of the seeds: before tuning and after."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, methods, ending in ((axes[0], STRETCHES + WINDOWS, ""), (axes[1], STRETCHES, ", tuned")):
        for index, method in enumerate(methods):
            curve = np.mean([run[method + ending]["curve"] for run in runs], axis=0)
            places = 32 * np.arange(len(curve)) + 16
            axis.plot(places, curve, color=f"C{index}", ls="-" if method in STRETCHES else "--", lw=1.2, label=method)
        axis.axvline(TRAINED, color="grey", ls=":", lw=1)
        axis.set(xlabel="place in the row (tokens)", yscale="log")
    axes[0].set(ylabel="gap to the floor (nats per token)", title="as trained, on rows of 64")
    axes[1].set(title="after a short tuning on rows of 512")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False, fontsize=8)
    return figure


CONTEXT_EXPERIMENTS = {"context": (context, 300)}
