"""Topic 09: the figures and the table that need no training say what the formulas say."""

import json

import pytest
import torch

from flash_attention import flash_traffic, tile_sizes, written_out_traffic
from llm_calculators import PUBLISHED
from llm_diagrams import (
    DIAGRAM_EXPERIMENTS,
    block_parts,
    counted_traffic,
    plot_blocks,
    plot_scaling,
    plot_sharing,
    shared_configs,
    speed_ratios,
)
from llm_layers import rotary_frequencies
from modern_llm_experiments import FiguresConfig
from workbench import RunConfig


def test_the_figure_states_what_the_caches_keep() -> None:
    labels = [axis.get_xlabel() for axis in plot_sharing().axes]
    assert labels == [f"{number} numbers kept" for number in ("32,768", "2,048", "256", "576")]
    assert [config.n_kv_heads for config in shared_configs().values()] == [128, 8, 1, 128]


def test_the_blocks_are_those_of_the_published_configs_and_mark_what_is_new() -> None:
    parts = block_parts()
    experts = PUBLISHED["DeepSeek-V3"].experts
    assert [len(column) for column in parts.values()] == [7, 7, 7] and experts.d_shared == experts.d_expert
    assert (
        f"{experts.n_active_experts} of {experts.n_experts}" in parts["DeepSeek-V3"][4]
        and "64 features" in parts["DeepSeek-V3"][2]
    )
    filled = [
        sum(patch.get_facecolor() != (1, 1, 1, 1) for patch in axis.patches) - 1  # the frame of a layer is grey
        for axis in plot_blocks().axes
    ]
    assert filled == [0, 7, 2]


def test_every_scaling_keeps_its_promise_for_the_first_and_the_last_pair() -> None:
    ratios = speed_ratios(d_head=32, theta=1e4, factor=4.0, trained=512)
    assert set(ratios) == {"linear", "YaRN", "Llama 3", "NTK"}
    turns = 512 * rotary_frequencies(32, 1e4) / (2 * torch.pi)
    for name, ratio in ratios.items():
        assert ratio.shape == (16,) and ratio[-1].item() == pytest.approx(0.25, rel=1e-5)
        assert ratio[0].item() == pytest.approx(0.25 if name == "linear" else 1.0, rel=1e-5)
        assert (ratio.diff() <= 1e-6).all(), name  # slower pairs are never slowed less
    slow = turns < 1
    assert 0 < slow.sum() < 16 and (ratios["Llama 3"][slow] == 0.25).all()
    assert (ratios["NTK"][slow][:-1] > 0.26).all()  # the flaw that counting turns repairs


def test_the_lines_mark_the_pairs_that_turn_so_often() -> None:
    axis = plot_scaling().axes[0]
    marks = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    turns = 8192 * rotary_frequencies(128, 5e5) / (2 * torch.pi)
    for mark, times in zip(marks, (32, 4, 1), strict=True):
        assert turns[int(mark - 0.5)] > times >= turns[int(mark + 0.5)]


def test_the_count_is_the_formula_and_tiles_win_from_half_the_width_on() -> None:
    n, d_head = 96, 16
    for fast_memory in (400, 900, 1500, 4000):
        moved = counted_traffic(n, d_head, fast_memory)
        assert moved["forward"] == flash_traffic(n, n, d_head, fast_memory)
        assert moved["causal"] < moved["forward"] < moved["backward"]
    for fast_memory in (400, 4000):
        rows = tile_sizes(fast_memory, d_head)[0]
        wins = flash_traffic(4096, 4096, d_head, fast_memory) < written_out_traffic(4096, 4096, d_head)
        assert wins == (rows > d_head / 2)


def test_the_experiments_write_their_table_and_figures(tmp_path) -> None:
    config = FiguresConfig(shrink=8, folder=tmp_path)
    for name, (experiment, seconds) in DIAGRAM_EXPERIMENTS.items():
        experiment(config, RunConfig())
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000 and seconds > 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["traffic"]["rows"]
    assert len(rows) == 5 and all(row[2] == row[5] for row in rows)
