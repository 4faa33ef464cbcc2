"""Topic 09 - Architecture experiments: what each modern change buys, at equal compute and down to the entropy floor.

python 09-modern-llm-architectures/modern_llm_architectures.py figures                    # every table and figure
python 09-modern-llm-architectures/modern_llm_architectures.py figures ladder kv-quality  # some of them

From GPT-2 to Llama one change at a time; attention that caches less, at equal parameters. Compute is counted, not
timed: 3 x the forward FLOPs of `llm_calculators`, so that neither the machine nor a slow kernel decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from context_extension import CONTEXT_EXPERIMENTS
from equal_compute import SIZES, TRAINING, lasting, remembered, train_steps, trained_gap
from gpt2 import TanhFeedForward, init_weights
from latent_attention import LatentConfig
from llm_calculators import count_parameters, kv_bytes_per_token
from llm_config import ModelConfig
from llm_diagrams import DIAGRAM_EXPERIMENTS
from modern_llm_architectures import CausalLM
from modern_llm_bench import BENCH_EXPERIMENTS
from modern_llm_failures import FAILURE_EXPERIMENTS
from router_experiments import ROUTER_EXPERIMENTS
from transformer_architecture import LayerNorm, LearnedPositions
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
)


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of every comparison
    shrink: int = 1  # divide the length of every training by this, for a quick look
    gflops: float = 150.0  # billions of floating-point operations of each training of the ladder and of kv-quality
    router_steps: int = 200  # optimizer steps of each training of the router
    context_steps: int = 400  # optimizer steps on short rows, before the context is stretched
    tune_steps: int = 40  # optimizer steps on long rows, after it is
    n_documents: int = 300  # held-out documents to examine each model with
    again: bool = False  # train again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "shrink", "router_steps", "context_steps", "tune_steps", least=1)
        check_range(self, "gflops", above=0)
        check_range(self, "n_documents", least=2)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    @property
    def flops(self) -> float:
        return 1e9 * self.gflops / self.shrink

    def steps(self, name: str) -> int:
        """The number of steps called `name`, shrunk."""
        return max(2, getattr(self, name) // self.shrink)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        command = f"python 09-modern-llm-architectures/modern_llm_architectures.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds or self.n_seeds), command)


# From GPT-2 to Llama


CHANGES = ("RMSNorm", "rotary", "SwiGLU", "no biases", "GQA", "QK-norm", "untied")


class NoRotation:
    """Stands where the rotary table stands in a model whose positions are in its embeddings."""

    def span(self, start: int, seq_len: int, like: torch.Tensor) -> None:
        return None


def rung_config(n_changes: int, sizes: ModelConfig = SIZES) -> ModelConfig:
    """The config of a rung, which gives its FLOPs too: a SwiGLU of 8/3 d_model costs as much as a GELU of 4 d_model."""
    done = CHANGES[:n_changes]
    return replace(
        sizes,
        use_bias="no biases" not in done,
        n_kv_heads=sizes.n_heads // 2 if "GQA" in done else sizes.n_heads,
        qk_norm="QK-norm" in done,
        tie_embeddings="untied" not in done,
    )


def rung(n_changes: int, sizes: ModelConfig = SIZES) -> CausalLM:
    """GPT-2 with the first `n_changes` of CHANGES made: 0 is GPT-2, all of them is `CausalLM`.

    Built backwards: from the modern model the modules of topics 04 and 08 take the place of those not yet changed.
    All rungs start from the same normal distribution.
    """
    done, model = CHANGES[:n_changes], CausalLM(rung_config(n_changes, sizes))
    d_model = sizes.d_model
    for block in model.blocks:
        if "SwiGLU" not in done:
            block.ffn = TanhFeedForward(d_model, 4 * d_model)
        if "RMSNorm" not in done:
            block.attn_norm, block.ffn_norm = LayerNorm(d_model), LayerNorm(d_model)
    if "RMSNorm" not in done:
        model.final_norm = LayerNorm(d_model)
    if "rotary" not in done:
        model.token_emb = nn.Sequential(model.token_emb, LearnedPositions(d_model, sizes.max_seq_len))
        model.rotary = NoRotation()
    init_weights(model)
    return model


def rung_names() -> list[str]:
    return ["GPT-2", *(f"+ {change}" for change in CHANGES)]


def ladder(config: FiguresConfig, run: RunConfig) -> None:
    """From GPT-2 to Llama one change at a time at equal FLOPs, the optimizer as it is."""
    gaps, rows = [], []
    for n_changes, name in enumerate(rung_names()):
        runs = [ladder_run(n_changes, config, run, seed) for seed in range(config.n_seeds)]
        gaps.append([item["gap"] for item in runs])
        change = [new - old for new, old in zip(gaps[-1], gaps[n_changes - 1], strict=True)] if n_changes else ""
        since = [new - old for new, old in zip(gaps[-1], gaps[0], strict=True)] if n_changes else ""
        numbers = (runs[0]["parameters"], runs[0]["steps"])
        rows.append([name, *map(float, numbers), gaps[-1], change, since, [item["seconds"] for item in runs]])
    columns = [
        Column("Model"),
        Column("parameters", "", ",.0f"),
        Column("steps", "", ",.0f"),
        Column("gap", "nats per token", ".3f"),
        Column("against the line before", "nats", "+.3f"),
        Column("against GPT-2", "nats", "+.3f"),
        Column("training", "CPU s", ".0f"),
    ]
    config.save("ladder", columns, rows, "ladder")
    save_figure(plot_ladder(rung_names(), gaps), config.folder / "ladder.svg")


def ladder_run(n_changes: int, config: FiguresConfig, run: RunConfig, seed: int, rate: float = 1.0) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        seed_everything(seed)
        model = rung(n_changes)
        train = replace(TRAINING, learning_rate=rate * TRAINING.learning_rate)
        train = lasting(train, train_steps(model.config, config.flops, train))
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        return trained_gap(model, train, config, run, seed) | {"parameters": n_parameters}

    name = rung_names()[n_changes]
    times = "" if rate == 1 else f", {rate:g} x the learning rate"
    return remembered(config, run, f"ladder, {config.flops:g} FLOPs, {name}{times}, seed {seed}", measure)


RATES = (0.5, 1.0, 2.0)  # times the learning rate of the ladder
ENDS = (0, 6)  # GPT-2, and all but the untied embedding


def ladder_rates(config: FiguresConfig, run: RunConfig) -> None:
    """Two rungs at three learning rates: is it the architecture that wins, or a rate that suits it?"""
    rows, curves = [], {}
    for n_changes in ENDS:
        name = "GPT-2" if not n_changes else f"GPT-2 {' '.join(rung_names()[1 : n_changes + 1])}"
        cells = [
            [ladder_run(n_changes, config, run, seed, rate)["gap"] for seed in range(config.n_seeds)] for rate in RATES
        ]
        curves[name] = cells
        rows.append([name, *cells])
    rates = [f"{rate * TRAINING.learning_rate:.2g}" for rate in RATES]
    config.save("ladder-rates", [Column("Model"), *(Column(rate, "", ".3f") for rate in rates)], rows, "ladder-rates")
    save_figure(plot_rates(curves), config.folder / "ladder-rates.svg")


def plot_ladder(names: list[str], gaps: list[list[float]]) -> Figure:
    """Gap to the floor of every rung: each seed as a line, the mean as a bar."""
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    places = range(len(names))
    axis.bar(places, [np.mean(row) for row in gaps], color="C5", alpha=0.5, label="mean")
    for seed, column in enumerate(zip(*gaps, strict=True)):
        axis.plot(places, column, "o-", ms=4, lw=1, color=f"C{(0, 1, 2, 3, 6)[seed % 5]}", label=f"seed {seed}")
    axis.set(ylabel="gap to the floor (nats per token)")
    axis.set_xticks(list(places), names, rotation=20, ha="right")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def plot_rates(curves: dict[str, list[list[float]]]) -> Figure:
    """Gap against the learning rate, mean and every seed."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    rates = [rate * TRAINING.learning_rate for rate in RATES]
    for index, (name, cells) in enumerate(curves.items()):
        axis.plot(rates, [np.mean(cell) for cell in cells], color=f"C{index}", label=name)
        for rate, cell in zip(rates, cells, strict=True):
            axis.plot([rate] * len(cell), cell, "o", ms=3, color=f"C{index}")
    axis.set(xscale="log", xlabel="peak learning rate", ylabel="gap to the floor (nats per token)")
    axis.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=7)
    return figure


# Attention that caches less


WIDE = replace(SIZES, d_model=64, n_heads=8, n_kv_heads=8, d_head=8, d_ff=176, use_bias=False)
ATTENTIONS: dict[str, dict[str, Any]] = {
    "MHA, 8 heads": {},
    "GQA, 4": {"n_kv_heads": 4},
    "GQA, 2": {"n_kv_heads": 2},
    "MQA, 1": {"n_kv_heads": 1},
    "MLA, 24 + 8": {"latent": LatentConfig(0, 24, 8, 8, 8)},
    "MLA, 8 + 8": {"latent": LatentConfig(0, 8, 8, 8, 8)},
}


def equal_parameters(name: str) -> ModelConfig:
    """The config of an attention; what it saves in keys and values goes into the feed-forward network."""
    wanted, config = count_parameters(WIDE).total, replace(WIDE, **ATTENTIONS[name])
    spare = wanted - count_parameters(replace(config, d_ff=1)).total
    return replace(config, d_ff=1 + round(spare / (3 * config.d_model * config.n_layers)))


def kv_quality(config: FiguresConfig, run: RunConfig) -> None:
    """Quality against the bytes that a cache grows by with each token, at equal parameters and FLOPs."""
    rows, points = [], {}
    for name in ATTENTIONS:
        model_config = equal_parameters(name)
        runs = [kv_run(name, model_config, config, run, seed) for seed in range(config.n_seeds)]
        size, gaps = kv_bytes_per_token(model_config), [item["gap"] for item in runs]
        points[name] = (size, gaps)
        first = next(iter(points.values()))[1]
        against = [new - old for new, old in zip(gaps, first, strict=True)] if len(points) > 1 else ""
        total = count_parameters(model_config).total
        rows.append([name, float(total), float(model_config.d_ff), float(runs[0]["steps"]), size, gaps, against])
    columns = [
        Column("Attention"),
        Column("parameters", "", ",.0f"),
        Column("d_ff", "", ".0f"),
        Column("steps", "", ",.0f"),
        Column("cache", "bytes per token, bf16", ",.0f"),
        Column("gap", "nats per token", ".3f"),
        Column("against MHA", "nats", "+.3f"),
    ]
    config.save("kv-quality", columns, rows, "kv-quality")
    save_figure(plot_kv_quality(points), config.folder / "kv-quality.svg")


def kv_run(name: str, model_config: ModelConfig, config: FiguresConfig, run: RunConfig, seed: int) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        seed_everything(seed)
        model = CausalLM(model_config)
        train = lasting(TRAINING, train_steps(model_config, config.flops, TRAINING))
        return trained_gap(model, train, config, run, seed)

    return remembered(config, run, f"kv-quality, {config.flops:g} FLOPs, {name}, seed {seed}", measure)


def plot_kv_quality(points: dict[str, tuple[float, list[float]]]) -> Figure:
    """Gap to the floor against cache bytes per token, mean, every seed and the spread."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for name, (size, gaps) in points.items():
        color = "C1" if name.startswith("MLA") else "C0"
        spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else 0.0
        axis.errorbar([size], [np.mean(gaps)], [spread], fmt="s", ms=5, capsize=3, color=color)
        axis.plot([size] * len(gaps), gaps, "o", ms=3, color=color, alpha=0.5)
        axis.annotate(name, (size, np.mean(gaps)), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", xlabel="cache (bytes per token, bf16)", ylabel="gap to the floor (nats per token)")
    sizes = sorted({size for size, _ in points.values()})
    axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    axis.minorticks_off()
    axis.margins(x=0.2)
    return figure


# All of them


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "ladder": (ladder, 600),
    "ladder-rates": (ladder_rates, 600),
    "kv-quality": (kv_quality, 450),
    **ROUTER_EXPERIMENTS,
    **CONTEXT_EXPERIMENTS,
    **FAILURE_EXPERIMENTS,
    **BENCH_EXPERIMENTS,
    **DIAGRAM_EXPERIMENTS,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
