"""Topic 09 - Equal compute: small trainings on TinyWorld whose cost is counted, and whose results survive Ctrl-C.

from equal_compute import SIZES, TRAINING, lasting, trained_gap, train_steps
model = CausalLM(SIZES)
numbers = trained_gap(model, lasting(TRAINING, train_steps(SIZES, 1e11, TRAINING)), config, run, seed=0)

What all experiments of this topic share: one model size, one optimizer, one budget, one measure, the gap to the floor.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from llm_calculators import forward_flops
from llm_config import ModelConfig
from packing import language_model_loss
from sequence_modeling import BOS_ID, EOS_ID, PAD_ID
from training_transformers import LossFn, TrainConfig, WorldBatches, fit, world_losses
from transformer_architecture import held_out_documents, tiny_world
from workbench import RunConfig, pick_device, read_object, shown, write_atomically

if TYPE_CHECKING:
    from modern_llm_experiments import FiguresConfig

SIZES = ModelConfig(
    vocab_size=len(tiny_world()[1]),
    d_model=72,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    d_head=18,
    d_ff=192,
    max_seq_len=128,
    use_bias=True,
    pad_id=PAD_ID,
    bos_id=BOS_ID,
    eos_id=EOS_ID,
)
TRAINING = TrainConfig(batch_size=8, seq_len=64, learning_rate=7e-3, warmup_steps=50)  # the optimizer of all


# Trainings, each kept as soon as it is done: an interrupted run goes on where it stopped


def remembered(config: "FiguresConfig", run: RunConfig, what: str, measure: Callable[[], dict]) -> dict[str, Any]:
    """The numbers that `measure()` gives for `what`, or those of an earlier run with these words in --out."""
    path = run.out / "measured.json"
    known = read_object(path) if path.exists() else {}
    if what in known and not config.again:
        print(f"{what}: taken from {shown(path)}; --again trains it anew", flush=True)
        return known[what]
    numbers = measure()
    known = read_object(path) if path.exists() else {}
    write_atomically(path, json.dumps(known | {what: numbers}, indent=1).encode())
    return numbers


def train_steps(config: ModelConfig, flops: float, train: TrainConfig) -> int:
    """How many optimizer steps a budget of FLOPs pays for: a step costs three forward passes over its tokens."""
    per_token = 3 * sum(forward_flops(config, train.seq_len).values())
    return max(2, round(flops / (per_token * train.batch_size * train.seq_len)))


def lasting(train: TrainConfig, n_steps: int) -> TrainConfig:
    """The same training over n_steps, its warm-up at most a quarter of them."""
    return replace(train, max_steps=n_steps, warmup_steps=min(train.warmup_steps, n_steps // 4))


def trained_gap(
    model: nn.Module,
    train: TrainConfig,
    config: "FiguresConfig",
    run: RunConfig,
    seed: int,
    loss_fn: LossFn = language_model_loss,
) -> dict[str, Any]:
    """Train on the seed's rows of TinyWorld and examine: the gap to the floor in nats per token, steps, CPU seconds."""
    model.to(pick_device(run.device))
    before = time.process_time()
    fit(model, WorldBatches(train, seed), loss_fn, train)
    seconds = time.process_time() - before
    scores = world_losses(model.eval(), held_out_documents(config.n_documents), tiny_world()[1])
    return {"gap": scores["gap"], "error": scores["gap_error"], "steps": train.max_steps, "seconds": seconds}
