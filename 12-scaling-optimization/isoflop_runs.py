"""Topic 12 - Iso-FLOP runs: small language models of TinyWorld, several sizes at each of several budgets.

python 12-scaling-optimization/scaling_optimization.py scale      # train them; what is done stays in --out
python 12-scaling-optimization/scaling_optimization.py fit        # the laws, from what is there
python 12-scaling-optimization/scaling_optimization.py predict    # a larger run: first the prediction, then the run

Every run has its own schedule, as long as the run (Hoffmann et al. 2022, section 3). A loss is the world's entropy plus
the gap to the floor on held-out documents: two numbers with small errors in place of one with a large one.
"""

import functools
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from course_model import start_small
from equal_compute import lasting
from llm_calculators import count_parameters
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from packing import language_model_loss
from scaling_laws import FLOPS_PER_WEIGHT, Runs
from sequence_modeling import BOS_ID, EOS_ID, PAD_ID
from training_transformers import TrainConfig, WorldBatches, fit, world_losses
from transformer_architecture import held_out_documents, tiny_world
from workbench import RunConfig, check_range, pick_device, seed_everything, shown, write_atomically

FAMILY = ((8, 2), (12, 2), (16, 2), (24, 2), (32, 2), (40, 3), (56, 3), (80, 4))  # (d_model, n_layers)
RECIPE = TrainConfig(
    batch_size=8, seq_len=64, optimizer="muon", learning_rate=2e-2, min_lr_ratio=0.0, weight_decay=0.0, log_every=10**6
)
RECORDS = "runs.jsonl"


def family_config(d_model: int, n_layers: int) -> ModelConfig:
    """The config of one size: heads of 8, of 16 from width 32 on, queries and keys normalised, tied embeddings."""
    d_head = 16 if d_model >= 32 else min(8, d_model)
    n_heads = max(1, d_model // d_head)
    ids = {"pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID}
    sizes = (len(tiny_world()[1]), d_model, n_layers, n_heads, n_heads, d_head, 3 * d_model, 128)
    return ModelConfig(*sizes, qk_norm=True, **ids)


def matmul_weights(config: ModelConfig) -> int:
    """N: the weights that multiply a token. The tied embedding is one of them, in the output; the norms are not."""
    return count_parameters(config).active_matmul


@dataclass(frozen=True)
class ScaleConfig:
    """Which models to train."""

    budgets: str = "1e10,2.5e10,6e10"  # training FLOPs, 6 N D, of each iso-FLOP curve; commas between
    n_seeds: int = 1  # seeds 0, 1, ... of every run
    least_ratio: float = 2.5  # fewest tokens for each parameter that a run may have
    most_ratio: float = 400.0  # most tokens for each parameter
    n_documents: int = 1000  # held-out documents that a model is examined with
    n_entropy: int = 50_000  # documents that the entropy of the world is measured with

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", least=1)
        check_range(self, "n_documents", "n_entropy", least=2)
        check_range(self, "least_ratio", above=0)
        if not self.least_ratio < self.most_ratio < math.inf:
            raise ValueError(f"most_ratio={self.most_ratio} must be above least_ratio={self.least_ratio}")
        for flops in self.flops:
            if not math.isfinite(flops) or flops <= 0:
                raise ValueError(
                    f"every budget must be a finite number of FLOPs > 0, got {flops:g} in {self.budgets!r}"
                )

    @property
    def flops(self) -> list[float]:
        try:
            return sorted({float(word) for word in self.budgets.split(",")})
        except ValueError:
            raise ValueError(
                f"budgets must be numbers with commas between, such as 1e10,3e10; got {self.budgets!r}"
            ) from None


@dataclass(frozen=True)
class Cell:
    """One run to be made."""

    flops: float
    d_model: int
    n_layers: int
    seed: int

    @property
    def n_parameters(self) -> int:
        return matmul_weights(family_config(self.d_model, self.n_layers))

    @property
    def n_steps(self) -> int:
        per_step = FLOPS_PER_WEIGHT * self.n_parameters * RECIPE.batch_size * RECIPE.seq_len
        return max(2, round(self.flops / per_step))

    @property
    def n_tokens(self) -> int:
        return self.n_steps * RECIPE.batch_size * RECIPE.seq_len

    @property
    def seconds(self) -> float:
        """About how long it takes on one CPU core: steps of so small a model are mostly overhead."""
        return self.n_steps * (0.007 * self.n_layers + FLOPS_PER_WEIGHT * self.n_parameters * 512 / 1.5e10) + 3


def plan_cells(config: ScaleConfig) -> list[Cell]:
    """The sizes of the family whose tokens per parameter are within the limits, at every budget, seed by seed.

    Raises ValueError if a budget has fewer than three sizes, too few for a parabola.
    """
    cells = []
    for seed in range(config.n_seeds):
        for flops in config.flops:
            row = [Cell(flops, *size, seed) for size in FAMILY]
            row = [
                cell
                for cell in row
                if config.least_ratio <= flops / FLOPS_PER_WEIGHT / cell.n_parameters**2 <= config.most_ratio
            ]
            if len(row) < 3:
                raise ValueError(
                    f"budget {flops:g} has {len(row)} sizes between {config.least_ratio:g} and {config.most_ratio:g} "
                    "tokens for each parameter; an iso-FLOP curve needs 3: choose budgets from 3e9 to 1e12"
                )
            cells += row
    return cells


# Training, and what is kept of it


@functools.cache
def world_entropy(n_documents: int) -> tuple[float, float]:
    """Entropy of the world in nats per token, and its standard error: the floor under every loss here."""
    return tiny_world()[0].entropy(n_documents, seed=11)


def train_cell(cell: Cell, config: ScaleConfig, run: RunConfig) -> dict[str, Any]:
    """Train one model with a schedule of its own length, and examine it."""
    seed_everything(cell.seed)
    model = start_small(CausalLM(family_config(cell.d_model, cell.n_layers))).to(pick_device(run.device))
    train, before = lasting(RECIPE, cell.n_steps), time.process_time()
    fit(model, WorldBatches(train, cell.seed), language_model_loss, train)
    seconds = time.process_time() - before
    scores = world_losses(model.eval(), held_out_documents(config.n_documents), tiny_world()[1])
    facts = {"n_parameters": cell.n_parameters, "n_tokens": cell.n_tokens, "n_steps": cell.n_steps}
    facts["n_body"] = cell.n_parameters - count_parameters(model.config).embedding
    loss = world_entropy(config.n_entropy)[0] + scores["gap"]
    return (
        asdict(cell)
        | facts
        | {"gap": scores["gap"], "gap_error": scores["gap_error"], "loss": loss, "seconds": seconds}
    )


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The runs that are kept in a folder. Raises ValueError with the line that is no record."""
    path = folder / RECORDS
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            float(record["loss"]), float(record["n_parameters"]), float(record["n_tokens"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{shown(path)}:{number} is no record of a run; remove the line or the file") from None
        records.append(record)
    return records


def same_cell(record: dict[str, Any], cell: Cell, config: ScaleConfig) -> bool:
    wanted = asdict(cell) | {"n_documents": config.n_documents, "recipe": recipe_words()}
    return all(record.get(name) == value for name, value in wanted.items())


def recipe_words() -> str:
    return f"{RECIPE.optimizer} {RECIPE.learning_rate:g}, {RECIPE.batch_size} x {RECIPE.seq_len}, {RECIPE.schedule}"


def train_all(cells: list[Cell], config: ScaleConfig, run: RunConfig, say: bool = True) -> list[dict[str, Any]]:
    """The records of all cells; a cell that --out has already is not trained again."""
    records = read_records(run.out)
    found = []
    for index, cell in enumerate(cells):
        known = next((record for record in records if same_cell(record, cell, config)), None)
        if known is None:
            known = train_cell(cell, config, run) | {"n_documents": config.n_documents, "recipe": recipe_words()}
            records.append(known)
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(run.out / RECORDS, text.encode())
        found.append(known)
        if say:
            print(
                f"{index + 1:3}/{len(cells)}  C {cell.flops:.1e}  width {cell.d_model:2} x {cell.n_layers}  "
                f"N {cell.n_parameters:7,}  D {cell.n_tokens:10,}  seed {cell.seed}  gap {known['gap']:.4f}",
                flush=True,
            )
    return found


def as_runs(records: list[dict[str, Any]], count: str = "n_parameters") -> Runs:
    """Records as arrays. count "n_body" leaves the embedding out of N, and so out of 6 N D."""
    n, tokens, loss = (np.array([float(record[name]) for record in records]) for name in (count, "n_tokens", "loss"))
    nominal = None if count == "n_body" else np.array([float(record["flops"]) for record in records])
    group = np.array([record["n_parameters"] * 1e12 + record["n_tokens"] for record in records])
    return Runs(n, tokens, loss, nominal, group)


# Kaplan's schedule: one long run, read before its end


def early_readings(
    d_model: int, n_layers: int, n_steps: int, shares: tuple[float, ...], run: RunConfig, n_documents: int
):
    """Gaps after each share of n_steps: read from one run whose schedule lasts n_steps, and from runs that end there.

    Returns rows (steps, gap of the long run at that step, gap of a run whose schedule ends at it). Kaplan et al. 2020
    trained with one schedule whatever the length; a loss before its end is that of a learning rate still high.
    """
    documents, vocabulary = held_out_documents(n_documents), tiny_world()[1]
    stops = sorted({max(2, round(share * n_steps)) for share in shares})

    def trained(train: TrainConfig, every: int) -> list[dict[str, float]]:
        seed_everything(run.seed)
        model = start_small(CausalLM(family_config(d_model, n_layers))).to(pick_device(run.device))
        train = replace(train, eval_every=every)
        examine = lambda model: world_losses(model, documents, vocabulary)  # noqa: E731
        return fit(model, WorldBatches(train, run.seed), language_model_loss, train, evaluate=examine)

    unit = math.gcd(*stops)
    long = {row["step"]: row["gap"] for row in trained(lasting(RECIPE, n_steps), unit) if "gap" in row}
    return [(stop, long[stop], trained(lasting(RECIPE, stop), 0)[-1]["gap"]) for stop in stops]
