"""Topic 07 - Training Speed: what accumulation, precision, checkpointing and three ways to batch cost or save.

python 07-training-transformers/training_transformers.py bench
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from optimizers import Adafactor, AdamW, Muon
from packing import BucketedBatches, PackedBatches, PackedTransformer, language_model_loss
from sequence_modeling import BOS_ID, IGNORE
from training_transformers import TrainConfig, WorldBatches, backward_in_parts, checkpoint_activations
from transformer_architecture import ModelConfig, saved_bytes, tiny_world
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    pick_device,
    seed_everything,
    speed_line,
    time_in_turns,
)


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark times."""

    n_rounds: int = 7  # timed rounds of everything
    n_texts: int = 256  # documents of TinyWorld whose batches are compared

    def __post_init__(self) -> None:
        check_range(self, "n_rounds", least=1)
        check_range(self, "n_texts", least=32)


def step_works(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of the same batch: plain, in 4 parts, in bf16, with checkpointed activations."""
    seed_everything(run.seed)
    device, vocab_size = pick_device(run.device), len(tiny_world()[1])
    model = PackedTransformer(model_config, vocab_size).to(device)
    thrifty = copy.deepcopy(model)
    checkpoint_activations(thrifty)
    batch = WorldBatches(config, run.seed)(0)

    def work(model: nn.Module, **changes: Any) -> Callable[[], object]:
        changed = dataclasses.replace(config, **changes)
        return lambda: backward_in_parts(model, batch, language_model_loss, changed, 1e-3)

    return {
        "plain": work(model),
        "4 micro-batches": work(model, micro_batch_size=max(1, config.batch_size // 4)),
        "bf16": work(model, dtype="bf16"),
        "checkpointed": work(thrifty),
    }


def activation_megabytes(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> tuple[float, float]:
    """Megabytes that a forward pass keeps for its backward pass, plain and with checkpointed activations."""
    seed_everything(run.seed)
    model = PackedTransformer(model_config, len(tiny_world()[1])).to(pick_device(run.device))
    inputs = WorldBatches(config, run.seed)(0)["inputs"].to(pick_device(run.device))
    plain = saved_bytes(model, inputs) / 1e6
    checkpoint_activations(model)
    return plain, saved_bytes(model, inputs) / 1e6


def batching_works(
    bench: BenchConfig, model_config: ModelConfig, config: TrainConfig, run: RunConfig
) -> dict[str, tuple[Callable[[], object], float]]:
    """Forward and backward pass over the same documents, padded, bucketed and packed; with the share of real tokens."""
    seed_everything(run.seed)
    world, vocabulary = tiny_world()
    documents = world.documents(bench.n_texts, run.seed, "train")
    ids = [[BOS_ID, *vocabulary.encode(document.tokens)] for document in documents]
    model = PackedTransformer(model_config, len(vocabulary)).to(pick_device(run.device))
    seq_len = max(config.seq_len, max(len(row) for row in ids) - 1)
    batchings = {
        "padded": BucketedBatches(ids, config.batch_size, run.seed, pool_size=1),
        "bucketed": BucketedBatches(ids, config.batch_size, run.seed),
        "packed": PackedBatches(ids, config.batch_size, seq_len, run.seed),
    }
    works = {}
    for name, batches in batchings.items():
        epoch = [batches(step) for step in range(batches.order.n_batches)]
        real = sum(int((batch["targets"] != IGNORE).sum()) for batch in epoch)
        share = real / sum(batch["targets"].numel() for batch in epoch)
        works[name] = (
            lambda epoch=epoch: [backward_in_parts(model, b, language_model_loss, config, 1e-3) for b in epoch],
            share,
        )
    return works


def optimizer_works(model_config: ModelConfig, run: RunConfig) -> dict[str, Callable[[], object]]:
    """One step of our optimizers and of PyTorch's, on weights and gradients of a model."""
    seed_everything(run.seed)
    works: dict[str, Callable[[], object]] = {}
    pairs = {
        "AdamW": (AdamW, torch.optim.AdamW),
        "Adafactor": (Adafactor, torch.optim.Adafactor),
        "Muon": (Muon, torch.optim.Muon),
    }
    for name, kinds in pairs.items():
        for whose, kind in zip(("our", "their"), kinds, strict=True):
            model = PackedTransformer(model_config, len(tiny_world()[1])).to(pick_device(run.device))
            parameters = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            works[f"{whose} {name}"] = kind(parameters, 1e-3).step
    return works


def speeds(seconds: list[float], plain: list[float]) -> tuple[float, str]:
    """Median over the rounds of how fast this is beside the plain way, and the range."""
    ratios = sorted(other / own for own, other in zip(seconds, plain, strict=True))
    return float(np.median(ratios)), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"


def bench(bench: BenchConfig, model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> None:
    """Time accumulation, bf16, checkpointing, three ways to batch, and our optimizers beside torch.optim's."""
    announce("timing steps, batches and optimizers in turns", 60)
    print(describe_machine())
    seconds = time_in_turns(step_works(model_config, config, run), bench.n_rounds)
    for name in [name for name in seconds if name != "plain"]:
        print(speed_line(f"training step, {name},", "our plain one", seconds[name], seconds["plain"]))
    works = batching_works(bench, model_config, config, run)
    seconds = time_in_turns({name: work for name, (work, _) in works.items()}, bench.n_rounds)
    print(f"padded batches: {works['padded'][1]:.1%} real tokens")
    for name in [name for name in works if name != "padded"]:
        line = speed_line(f"{name} batches", "our padded ones", seconds[name], seconds["padded"])
        print(f"{line}; {works[name][1]:.1%} real tokens")
    seconds = time_in_turns(optimizer_works(model_config, run), bench.n_rounds)
    for name in ("AdamW", "Adafactor", "Muon"):
        print(speed_line(f"our {name}", "torch.optim's", seconds[f"our {name}"], seconds[f"their {name}"]))
