"""Proofs for fact_world: its entropy by enumeration, its documents, its batches, and a model that learns it."""

import dataclasses
import math

import numpy as np
import pytest

from fact_world import (
    DOCUMENTS,
    FIRST,
    LENGTH,
    ROWS,
    VOCAB_SIZE,
    FactBatches,
    FactWorld,
    fact_config,
    fact_run,
)
from sequence_modeling import BOS_ID, EOS_ID, IGNORE
from workbench import RunConfig

SMALL = FactWorld(n_people=5, tail=0.2)


def test_entropy_is_that_of_all_documents(parity) -> None:
    documents = [chance / 2 for chance in SMALL.chances for _ in range(2)]  # each person, each of two facts
    exact = -sum(p * math.log(p) for p in documents) / (LENGTH - 1)
    parity("FactWorld.entropy", "all documents, added up", "output", SMALL.entropy, exact, 1e-12)
    assert SMALL.chances[0] / SMALL.chances[3] == pytest.approx(4**1.2) and sum(SMALL.chances) == pytest.approx(1)
    ids, surprisal = SMALL.draw(20_000, np.random.default_rng(0))
    different, counts = np.unique(ids, axis=0, return_counts=True)
    assert len(different) == 10
    for row, count in zip(different, counts, strict=True):
        paid = surprisal[(ids == row).all(axis=1)]
        assert np.ptp(paid) == 0 and count / 20_000 == pytest.approx(math.exp(-paid[0]), abs=0.015)
    assert surprisal.mean() / (LENGTH - 1) == pytest.approx(SMALL.entropy, abs=0.005)


def test_people_keep_their_names_and_facts() -> None:
    world = FactWorld()
    assert len(np.unique(world.people[:, :3], axis=0)) == world.n_people, "every name is one person's"
    ids = world.sample(3000, np.random.default_rng(1))
    assert ids.shape == (3000, LENGTH) and (ids[:, 0] == BOS_ID).all() and (ids[:, -1] == EOS_ID).all()
    assert ids.max() < VOCAB_SIZE and ids[:, 1:].min() >= EOS_ID
    for part, (low, high) in enumerate(zip(FIRST, FIRST[1:], strict=False)):
        column = {0: 1, 1: 2, 2: 3, 3: 4}.get(part, 5)
        chosen = ids[:, column]
        inside = (chosen >= low) & (chosen < high)
        assert inside.all() if part < 4 else 0.3 < inside.mean() < 0.7
    known: dict[tuple, int] = {}
    for row in ids.tolist():
        assert known.setdefault(tuple(row[1:5]), row[5]) == row[5], "a fact does not change"


def test_batches_are_a_function_of_the_step() -> None:
    batches = FactBatches(SMALL, seed=3)
    batch = batches(7)
    assert batch["inputs"].shape == batch["targets"].shape == (ROWS, DOCUMENTS * LENGTH)
    assert (batch["inputs"] == batches(7)["inputs"]).all() and (batch["inputs"] != batches(8)["inputs"]).any()
    counted = batch["targets"] != IGNORE
    assert counted.sum() == ROWS * DOCUMENTS * (LENGTH - 1), "the first token of a document is given"
    assert (batch["targets"][:, :-1][counted[:, :-1]] == batch["inputs"][:, 1:][counted[:, :-1]]).all()


def test_a_model_learns_the_world_and_stays_above_its_floor(tmp_path) -> None:
    found = fact_run(SMALL, 16, 120, seed=0, run=RunConfig(out=tmp_path))
    assert SMALL.entropy < found["loss"] < SMALL.entropy + 0.3 < math.log(VOCAB_SIZE)
    assert found["n_tokens"] == 120 * ROWS * DOCUMENTS * 6
    assert fact_config(16).n_heads == 2 and fact_config(8).n_heads == 1


def test_bad_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match="n_people must be finite and >= 2 and <= 8192, got 10000"):
        FactWorld(n_people=10_000)
    with pytest.raises(ValueError, match="tail must be finite and > -1"):
        dataclasses.replace(SMALL, tail=-1)
