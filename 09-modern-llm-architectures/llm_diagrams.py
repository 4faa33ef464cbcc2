"""Topic 09 - Four figures and a table that need no training: three blocks side by side, who shares keys, how rotary
speeds are scaled, and what tiled attention moves, counted.

python 09-modern-llm-architectures/modern_llm_architectures.py figures blocks sharing scaling traffic
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flash_attention import Traffic, flash_attention, flash_traffic, tile_sizes, written_out_traffic
from latent_attention import LatentConfig
from llm_calculators import PUBLISHED, kv_bytes_per_token
from llm_config import ModelConfig
from llm_layers import RopeScaling, rotary_frequencies
from workbench import Column, save_figure

KEPT, MADE = "C0", "0.85"  # colours: what is cached, and what is computed and thrown away

# Three blocks


def block_parts() -> dict[str, list[str]]:
    """What stands in GPT-2, Llama or Qwen3, and DeepSeek-V3, from the input up; the parts in the same order."""
    experts = PUBLISHED["DeepSeek-V3"].experts
    width = PUBLISHED["DeepSeek-V3"].latent.d_rope
    chosen = f"{experts.n_active_experts} of {experts.n_experts} SwiGLU experts,\nand a shared one"
    rotary = "grouped-query attention,\nrotary (Qwen3: QK-norm)"
    latent = f"latent attention,\n{width} features rotary"
    same = ["token embedding", "RMSNorm", rotary, "RMSNorm", "SwiGLU network", "RMSNorm", "output matrix"]
    return {
        "GPT-2": [
            *("token + position\nembedding", "LayerNorm", "multi-head\nattention", "LayerNorm", "GELU network"),
            *("LayerNorm", "output: the embedding"),
        ],
        "Llama, Qwen3": same,
        "DeepSeek-V3": [part.replace(rotary, latent).replace("SwiGLU network", chosen) for part in same],
    }


PLACES = (0.0, 1.45, 2.5, 4.25, 5.3, 7.2, 8.25)  # heights of the parts; the second to fifth stand on branches


def draw_block(axis: Axes, parts: list[str], before: list[str]) -> None:
    """One model, input below; the stream is the thick line, and a part that `before` did not have is filled."""
    axis.plot([0, 0], [0, 8.25], color="C0", lw=3, zorder=1)
    axis.add_patch(plt.Rectangle((-0.5, 0.62), 4.5, 5.95, fc="0.95", ec="0.6", ls="--", zorder=0))
    axis.text(4.12, 3.6, "every layer", rotation=90, ha="left", va="center", fontsize=9, color="0.4")
    for out, back in ((0.85, 3.35), (3.65, 6.15)):
        axis.plot([0, 2.2, 2.2, 0], [out, out, back, back], color="0.45", lw=1.3, zorder=1)
        circle = {"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "C0", "lw": 1.5}
        axis.text(0, back, "+", ha="center", va="center", fontsize=10, bbox=circle, zorder=4)
    for index, (height, part) in enumerate(zip(PLACES, parts, strict=True)):
        left, width = (0.55, 3.3) if 1 <= index <= 4 else (-0.5, 4.5)
        changed = bool(before) and part != before[index]
        colours = {"fc": "#FBE3C8" if changed else "white", "ec": "C1" if changed else "0.45"}
        axis.add_patch(plt.Rectangle((left, height - 0.4), width, 0.8, lw=1.4, zorder=3, **colours))
        axis.text(left + width / 2, height, part, ha="center", va="center", fontsize=9, zorder=4)


def plot_blocks() -> Figure:
    """GPT-2's block and two later ones; filled is what the model on the left of it did not have."""
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 5.0), layout="constrained")
    before: list[str] = []
    for axis, (name, parts) in zip(axes, block_parts().items(), strict=True):
        draw_block(axis, parts, before)
        axis.set(title=name, xlim=(-0.7, 4.7), ylim=(-0.6, 8.8))
        axis.axis("off")
        before = parts
    return figure


# Who shares keys


def shared_configs() -> dict[str, ModelConfig]:
    """Four attentions of 128 heads of width 128, the sizes of DeepSeek-V3, in one layer."""
    heads = ModelConfig(d_model=7168, n_layers=1, n_heads=128, n_kv_heads=128, d_head=128)
    grouped, single = replace(heads, n_kv_heads=8), replace(heads, n_kv_heads=1)
    return {
        "multi-head": heads,
        "grouped": grouped,
        "multi-query": single,
        "latent": replace(heads, latent=LatentConfig()),
    }


def draw_heads(axis: Axes, n_heads: int, n_groups: int, latent: bool) -> None:
    """Queries above, keys and values below, a line from each query to the key it meets."""
    for head in range(n_heads):
        axis.plot(head, 2, "o", color=MADE, mec="black", ms=8)
        target = (head * n_groups // n_heads + 0.5) * n_heads / n_groups - 0.5
        axis.plot([head, target], [1.9, 1.12], color="0.6", lw=1, zorder=0)
    for group in range(n_groups):
        centre = (group + 0.5) * n_heads / n_groups - 0.5
        colour = MADE if latent else KEPT
        axis.plot(centre, 1, "s", color=colour, mec="black", ms=10)
        if latent:
            axis.plot([centre, (n_heads - 1) / 2], [0.88, 0.18], color="0.6", lw=1, zorder=0)
    if latent:
        axis.plot((n_heads - 1) / 2, 0, "s", color=KEPT, mec="black", ms=14)


def plot_sharing(n_heads: int = 8) -> Figure:
    """Queries (circles), keys and values (squares); blue is what a cache keeps, in numbers at DeepSeek-V3's size."""
    figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.7), sharey=True)
    groups = {"multi-head": n_heads, "grouped": n_heads // 4, "multi-query": 1, "latent": n_heads}
    for axis, (name, config) in zip(axes, shared_configs().items(), strict=True):
        draw_heads(axis, n_heads, groups[name], latent=config.latent is not None)
        numbers = kv_bytes_per_token(config, bytes_per_number=1)
        axis.set(title=name, xlim=(-0.8, n_heads - 0.2), ylim=(-0.5, 2.4), xticks=[])
        axis.set_xlabel(f"{numbers:,.0f} numbers kept")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set(yticks=[0, 1, 2], yticklabels=["latent", "keys, values", "queries"])
    return figure


# How rotary speeds are scaled


def speed_ratios(
    d_head: int = 128, theta: float = 5e5, factor: float = 8.0, trained: int = 8192
) -> dict[str, torch.Tensor]:
    """Each pair's speed after scaling, divided by its speed before: (d_head / 2) for every kind."""
    plain = rotary_frequencies(d_head, theta)
    kinds = {
        "linear": RopeScaling("linear", factor),
        "YaRN": RopeScaling("yarn", factor, trained),
        "Llama 3": RopeScaling("llama3", factor, trained),
    }
    ratios = {name: rotary_frequencies(d_head, theta, scaling) / plain for name, scaling in kinds.items()}
    raised = rotary_frequencies(d_head, theta, RopeScaling("dynamic", 1.0), trained, int(factor * trained))
    return ratios | {"NTK": raised / plain}


def plot_scaling() -> Figure:
    """The ratio of speeds for every pair of features; dashed lines where a pair turns 32, 4 and 1 times in training."""
    d_head, theta, trained = 128, 5e5, 8192
    figure, axis = plt.subplots(figsize=(6.6, 3.4))
    for name, ratio in speed_ratios(d_head, theta, 8.0, trained).items():
        axis.plot(ratio, label=name)
    turns = trained * rotary_frequencies(d_head, theta) / (2 * torch.pi)
    for times in (32, 4, 1):
        place = int((turns > times).sum()) - 0.5
        axis.axvline(place, color="0.6", ls="--", lw=1)
        behind = {"fc": "white", "ec": "none", "pad": 1.5}  # the dashes stop for the number
        axis.text(place, 1.05, f"{times}", ha="center", color="0.4", fontsize=9, bbox=behind)
    axis.set(xlabel="pair of features, fast to slow", ylabel="speed after / before", ylim=(0, 1.12))
    axis.set_yticks([0, 1 / 8, 0.25, 0.5, 0.75, 1], ["0", "1/8", "1/4", "1/2", "3/4", "1"])
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.12))
    return figure


# What tiled attention moves


def counted_traffic(n: int, d_head: int, fast_memory: int) -> dict[str, int]:
    """Numbers moved by one head of `n` positions, counted while it runs: forward, causal forward, backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, d_head, generator=generator).requires_grad_() for _ in range(3))
    whole, causal = Traffic(), Traffic()
    output = flash_attention(q, k, v, fast_memory=fast_memory, traffic=whole)
    forward = whole.total
    output.sum().backward()
    flash_attention(q, k, v, causal=True, fast_memory=fast_memory, traffic=causal)
    return {"forward": forward, "causal": causal.total, "backward": whole.total - forward}


def plot_traffic(n: int, d_head: int, counted: dict[int, dict[str, int]]) -> Figure:
    """Numbers moved against the size of fast memory: counted, by formula, and without tiles."""
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    sizes = [2**power for power in range(9, 18)]
    written_out = written_out_traffic(n, n, d_head)
    axis.axhline(written_out / 1e6, color="C3", label="scores written out")
    axis.loglog(sizes, [flash_traffic(n, n, d_head, size) / 1e6 for size in sizes], color="C0", label="tiles, formula")
    axis.plot(
        list(counted), [moved["forward"] / 1e6 for moved in counted.values()], "o", color="C0", label="tiles, counted"
    )
    axis.axhline(4 * n * d_head / 1e6, color="0.5", ls=":", label="q, k, v and output once")
    axis.set(xlabel="numbers that fit fast memory", ylabel="million numbers moved")
    axis.legend(frameon=False, fontsize=9)
    return figure


def traffic(config, run) -> None:
    """The counter's table and figure."""
    n, d_head = max(16, 512 // config.shrink), 64
    counted = {2**power: counted_traffic(n, d_head, 2**power) for power in (12, 13, 14, 15, 16)}
    written_out = written_out_traffic(n, n, d_head)
    rows = [
        [f"{size:,}", tile_sizes(size, d_head)[0], *(moved[name] / 1e6 for name in ("forward", "causal", "backward"))]
        + [flash_traffic(n, n, d_head, size) / 1e6, moved["forward"] / written_out]
        for size, moved in counted.items()
    ]
    columns = [Column("Fast memory (numbers)"), Column("rows of a tile", "", ".0f")]
    columns += [Column(name, "M", ".2f") for name in ("forward", "causal", "backward", "formula, forward")]
    config.save("traffic", [*columns, Column("forward / written out", "", ".2f")], rows, "traffic", n_seeds=1)
    save_figure(plot_traffic(n, d_head, counted), config.folder / "traffic.svg")


def blocks(config, run) -> None:
    save_figure(plot_blocks(), config.folder / "blocks.svg")


def sharing(config, run) -> None:
    save_figure(plot_sharing(), config.folder / "sharing.svg")


def scaling(config, run) -> None:
    save_figure(plot_scaling(), config.folder / "scaling.svg")


DIAGRAM_EXPERIMENTS: dict[str, tuple[Callable, float]] = {  # name -> function of (config, run), seconds
    "blocks": (blocks, 2),
    "sharing": (sharing, 2),
    "scaling": (scaling, 2),
    "traffic": (traffic, 10),
}
