"""Topic 09 - Router experiments: how a mixture of experts collapses, and what each cure costs.

python 09-modern-llm-architectures/modern_llm_architectures.py figures router

Shazeer et al. 2017 (arXiv 1701.06538) saw routers favour a few experts, which then learn faster and are favoured more.
Cures: a loss (Fedus et al. 2021, arXiv 2101.03961), with a second one that keeps the logits small (Zoph et al. 2022,
arXiv 2202.08906), or a bias that no gradient moves (Wang et al. 2024, arXiv 2408.15664).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from equal_compute import SIZES, TRAINING, lasting, remembered, trained_gap
from llm_calculators import count_parameters
from llm_config import ExpertConfig, ModelConfig
from mixture_of_experts import MixtureOfExperts, SwitchRouter, load_balance_loss, load_entropy, router_z_loss
from modern_llm_architectures import CausalLM
from packing import Batch, language_model_loss
from sequence_modeling import device_of
from training_transformers import WorldBatches
from workbench import Column, RunConfig, save_figure, seed_everything

if TYPE_CHECKING:
    from modern_llm_experiments import FiguresConfig

DENSE = replace(SIZES, d_model=64, n_kv_heads=2, d_head=16, d_ff=128, use_bias=False)
EXPERTS = ExpertConfig(n_experts=8, n_active_experts=2, d_expert=64)  # two of them are as wide as the dense network
ONE_EXPERT = ExpertConfig(n_experts=8, n_active_experts=1, d_expert=128)  # one of them is
DEAD = 0.1  # an expert with less than this share of its even load counts as dead


class Cure(NamedTuple):
    """How the load is kept even: the weights of two losses, or the step of the bias."""

    balance: float = 0.0
    pooled: bool = False  # one balance loss over all layers together, as transformers computes it
    z: float = 0.0
    bias_rate: float = 0.0


CONDITIONS: dict[str, tuple[ModelConfig, Cure]] = {
    "dense, equal active parameters": (DENSE, Cure()),
    "dense, equal total parameters": (replace(DENSE, d_ff=8 * 64), Cure()),
    "softmax router, no cure": (replace(DENSE, experts=EXPERTS), Cure()),
    "balance loss, each layer": (replace(DENSE, experts=EXPERTS), Cure(balance=0.01)),
    "balance loss, layers pooled": (replace(DENSE, experts=EXPERTS), Cure(balance=0.01, pooled=True)),
    "balance and z loss": (replace(DENSE, experts=EXPERTS), Cure(balance=0.01, z=0.001)),
    "sigmoid router, no cure": (replace(DENSE, experts=replace(EXPERTS, router="sigmoid")), Cure()),
    "bias, no loss": (replace(DENSE, experts=replace(EXPERTS, router="sigmoid")), Cure(bias_rate=0.01)),
    "Switch router, no cure": (replace(DENSE, experts=ONE_EXPERT), Cure()),
    "Switch router, balance loss": (replace(DENSE, experts=ONE_EXPERT), Cure(balance=0.01)),
    "Switch router, balance and z loss": (replace(DENSE, experts=ONE_EXPERT), Cure(balance=0.01, z=0.001)),
}


def build(name: str) -> CausalLM:
    """A fresh model of a condition; a router that picks one expert is Switch's, whose gate is not divided by itself."""
    config, _ = CONDITIONS[name]
    model = CausalLM(config)
    if config.experts and config.experts.n_active_experts == 1:
        for layer in expert_layers(model):
            layer.router = SwitchRouter(config.d_model, config.experts.n_experts)
    return model


def expert_layers(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


class RouterLoss:
    """The language-model loss with a cure; `loads` keeps the mean load entropy of every step."""

    def __init__(self, cure: Cure) -> None:
        self.cure = cure
        self.loads: list[float] = []

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = language_model_loss(model, batch)
        layers, cure = expert_layers(model), self.cure
        routings = [layer.routing for layer in layers]
        if cure.balance and cure.pooled:
            loss = loss + cure.balance * count * load_balance_loss(routings)
        elif cure.balance:
            loss = loss + cure.balance * count * torch.stack([load_balance_loss([one]) for one in routings]).mean()
        if cure.z:
            loss = loss + cure.z * count * torch.stack([router_z_loss(one) for one in routings]).mean()
        if cure.bias_rate and model.training:
            for layer in layers:
                layer.router.update_bias(layer.counts, cure.bias_rate)
        self.loads += [float(np.mean([load_entropy(layer.counts) for layer in layers]))] if layers else []
        return loss, count


@torch.no_grad()
def held_out_load(model: nn.Module) -> dict[str, float]:
    """Load entropy and share of dead experts, means over the layers, on rows that no training draws."""
    model(WorldBatches(replace(TRAINING, batch_size=64), seed=2**30)(0)["inputs"].to(device_of(model)))
    counts = [layer.counts.double() for layer in expert_layers(model)]
    dead = [(count < DEAD * count.mean()).double().mean().item() for count in counts]
    return {"entropy": float(np.mean([load_entropy(count) for count in counts])), "dead": float(np.mean(dead))}


def router_run(name: str, config: "FiguresConfig", run: RunConfig, seed: int) -> dict[str, Any]:
    n_steps = config.steps("router_steps")

    def measure() -> dict[str, Any]:
        seed_everything(seed)
        model, loss_fn = build(name), RouterLoss(CONDITIONS[name][1])
        numbers = trained_gap(model, lasting(TRAINING, n_steps), config, run, seed, loss_fn)
        return numbers | {"loads": loss_fn.loads} | (held_out_load(model) if expert_layers(model) else {})

    return remembered(config, run, f"router, {n_steps} steps, {name}, seed {seed}", measure)


def router(config: "FiguresConfig", run: RunConfig) -> None:
    """Load, dead experts and gap without a cure and with each, beside dense models; the same tokens for all."""
    rows, gaps, loads = [], {}, {}
    for name, (model_config, _) in CONDITIONS.items():
        runs = [router_run(name, config, run, seed) for seed in range(config.n_seeds)]
        counted, gaps[name] = count_parameters(model_config), [item["gap"] for item in runs]
        cells: list = ["", "", ""]
        if model_config.experts:
            loads[name] = [item["loads"] for item in runs]
            lowest = [float(smoothed(item["loads"]).min()) for item in runs]
            cells = [[item["entropy"] for item in runs], lowest, [item["dead"] for item in runs]]
        rows.append([name, float(counted.active), float(counted.total), *cells, gaps[name]])
    columns = [
        Column("Model"),
        Column("active parameters", "", ",.0f"),
        Column("all parameters", "", ",.0f"),
        Column("load entropy", "1 is even", ".3f"),
        Column("lowest on the way", "", ".3f"),
        Column("dead experts", "", ".0%"),
        Column("gap", "nats per token", ".3f"),
    ]
    config.save("router", columns, rows, "router")
    save_figure(plot_router(loads, gaps), config.folder / "router.svg")


def plot_router(loads: dict[str, list[list[float]]], gaps: dict[str, list[float]]) -> Figure:
    """Left: load entropy over the steps, mean of the seeds. Right: gap to the floor, every seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    colors = {name: f"C{index % 8}" for index, name in enumerate(gaps)}
    for name, runs in loads.items():
        curve = np.mean([smoothed(run) for run in runs], axis=0)
        style = "--" if name.startswith("Switch") else "-." if name.startswith("bias") else "-"
        left.plot(range(1, len(curve) + 1), curve, style, color=colors[name], lw=1.2, label=name)
    left.axhline(1.0, color="grey", ls=":", lw=1)
    left.set(xlabel="step", ylabel="load entropy (1 is even)")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for place, (name, values) in enumerate(gaps.items()):
        right.plot(values, [place] * len(values), "o", ms=4, color=colors[name])
        right.plot([np.mean(values)], [place], "|", ms=14, color=colors[name])
    right.set_yticks(range(len(gaps)), list(gaps), fontsize=8)
    right.set(xlabel="gap to the floor (nats per token)")
    right.invert_yaxis()
    return figure


def smoothed(values: list[float], width: int = 10) -> np.ndarray:
    """Mean of the last `width` values at every step, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


ROUTER_EXPERIMENTS = {"router": (router, 600)}
