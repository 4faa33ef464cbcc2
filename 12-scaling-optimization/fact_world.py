"""Topic 12 - A world of facts: many small things to know, rare as a power law says, with an exactly known entropy.

    world = FactWorld()
    ids = world.sample(100, np.random.default_rng(0))     # (documents, 7): "<bos> Anna Bell Brook lives-in Oslo <eos>"

TinyWorld has ten kinds of documents, each learned in a jump; a smooth power law needs many small pieces (Michaud et al.
2023, "The quantization model of neural scaling", arXiv 2303.13506). Here each person is one: the more often a person is
met, the earlier their name and their two facts are known.
"""

import functools
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from course_model import row_nats, start_small
from equal_compute import lasting
from isoflop_runs import RECIPE, matmul_weights
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from packing import Batch, language_model_loss
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, PAD_ID
from training_transformers import fit
from workbench import RunConfig, check_range, pick_device, seed_everything

N_NAMES = (32, 16, 16)  # first, middle and last names
N_PLACES = 64  # towns, and as many trades
LENGTH = 7  # tokens of a document, <bos> and <eos> included
FIRST = np.cumsum([3, *N_NAMES, 2, N_PLACES, N_PLACES])  # where the ids of each part begin
VOCAB_SIZE = int(FIRST[-1])
ROWS, DOCUMENTS = 16, 9  # rows of a batch, documents of a row
TOKENS_PER_STEP = ROWS * DOCUMENTS * (LENGTH - 1)  # that are predicted


@dataclass(frozen=True)
class FactWorld:
    """People with a town and a trade; who is told of is drawn with probability ~ rank^-(1 + tail)."""

    n_people: int = 4096  # at most the number of names
    tail: float = 0.5  # the smaller, the more rare people matter
    seed: int = 0  # of names and facts

    def __post_init__(self) -> None:
        check_range(self, "n_people", least=2, most=math.prod(N_NAMES))
        check_range(self, "tail", above=-1)

    @functools.cached_property
    def chances(self) -> np.ndarray:
        weights = np.arange(1, self.n_people + 1, dtype=float) ** -(1 + self.tail)
        return weights / weights.sum()

    @functools.cached_property
    def people(self) -> np.ndarray:
        """(people, 5): ids of first, middle and last name, of the town and of the trade."""
        rng = np.random.default_rng(self.seed)
        code = rng.permutation(math.prod(N_NAMES))[: self.n_people]
        names = np.stack(np.unravel_index(code, N_NAMES), axis=1)  # (people, 3)
        facts = rng.integers(0, N_PLACES, size=(self.n_people, 2))  # (people, 2)
        return np.concatenate([names + FIRST[:3], facts + FIRST[4:6]], axis=1)

    @property
    def entropy(self) -> float:
        """Nats per predicted token, exactly: who, and which of the two facts; all else follows."""
        return float(-(self.chances * np.log(self.chances)).sum() + math.log(2)) / (LENGTH - 1)

    def draw(self, n_documents: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids (documents, 7), and the surprisal of each document in nats."""
        who, which = rng.choice(self.n_people, n_documents, p=self.chances), rng.integers(0, 2, n_documents)
        person = self.people[who]  # (documents, 5)
        fact = np.where(which == 0, person[:, 3], person[:, 4])
        ends = (np.full(n_documents, BOS_ID), np.full(n_documents, EOS_ID))
        ids = np.stack([ends[0], *person[:, :3].T, FIRST[3] + which, fact, ends[1]], axis=1)
        return ids, -np.log(self.chances[who]) + math.log(2)

    def sample(self, n_documents: int, rng: np.random.Generator) -> np.ndarray:
        return self.draw(n_documents, rng)[0]


class FactBatches:
    """Rows of nine documents, fresh at every step: `batches(step)`, a pure function of step and seed."""

    def __init__(self, world: FactWorld, seed: int) -> None:
        self.world, self.seed = world, seed

    def __call__(self, step: int) -> Batch:
        ids = self.world.sample(ROWS * DOCUMENTS, np.random.default_rng((self.seed, step)))
        inputs = torch.from_numpy(ids.reshape(ROWS, DOCUMENTS * LENGTH))  # (batch, seq)
        targets = inputs.roll(-1, dims=1)  # (batch, seq)
        targets = targets.masked_fill(targets == BOS_ID, IGNORE)  # (batch, seq): a document's first token is given
        return {"inputs": inputs, "targets": targets}


def fact_config(d_model: int) -> ModelConfig:
    """Two blocks with heads of 8."""
    n_heads = max(1, d_model // 8)
    ids = {"pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID}
    return ModelConfig(VOCAB_SIZE, d_model, 2, n_heads, n_heads, 8, 3 * d_model, 128, qk_norm=True, **ids)


def fact_run(world: FactWorld, d_model: int, n_steps: int, seed: int, run: RunConfig) -> dict[str, Any]:
    """Train one model for n_steps with a schedule of that length; its loss is the entropy plus the gap to the floor."""
    seed_everything(seed)
    model = start_small(CausalLM(fact_config(d_model))).to(pick_device(run.device))
    before = time.process_time()
    fit(model, FactBatches(world, seed), language_model_loss, replace(lasting(RECIPE, n_steps), batch_size=ROWS))
    seconds = time.process_time() - before
    return {
        "n_parameters": matmul_weights(model.config),
        "n_tokens": n_steps * TOKENS_PER_STEP,
        "loss": world.entropy + gap(model.eval(), world),
        "seconds": seconds,
    }


def gap(model: CausalLM, world: FactWorld, n_documents: int = 4096) -> float:
    """Nats per predicted token above the surprisal of the same held-out documents."""
    ids, surprisal = world.draw(n_documents, np.random.default_rng(99))
    paid = row_nats(model, ids.tolist(), batch_size=512)
    return float((np.array(paid) - surprisal).mean() / (LENGTH - 1))
