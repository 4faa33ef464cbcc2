"""The committed draft is what its card says, and a dearer target is the same target."""

import json
from hashlib import sha256

import pytest
import torch

from chat_model import load_chat_model
from draft_model import (
    EXAM_EXAMPLES,
    EXAM_SEED,
    FOLDER,
    DraftConfig,
    agreement,
    conversation_batches,
    load_draft_model,
    made_dearer,
    train_draft,
)
from huggingface_folders import WEIGHTS
from low_rank_adapters import base_sha256


@pytest.fixture(scope="module")
def target():
    return load_chat_model()


def test_the_card_tells_of_these_weights_and_this_target(target) -> None:
    model, tokenizer = target
    report = json.loads((FOLDER / "report.json").read_text(encoding="utf-8"))
    assert sha256((FOLDER / WEIGHTS).read_bytes()).hexdigest() == report["weights_sha256"]
    assert base_sha256(model) == report["target_sha256"]
    small, _ = load_draft_model()
    fresh = conversation_batches(DraftConfig(n_examples=EXAM_EXAMPLES), tokenizer, EXAM_SEED)
    assert agreement(model, small, fresh) == pytest.approx(report["acceptance"], abs=1e-3)
    assert report["acceptance"] > 0.8


def test_agreement_is_one_with_itself_and_one_minus_the_distance_with_another(target) -> None:
    model, tokenizer = target
    small, _ = load_draft_model()
    batches = conversation_batches(DraftConfig(n_examples=3, replay=0.0), tokenizer, 5)
    assert agreement(model, model, batches, 1) == pytest.approx(1, abs=1e-5)
    batch = batches(0)
    with torch.no_grad():
        p, q = (each(batch["inputs"])[batch["targets"] >= 0].softmax(-1) for each in (model, small))
    assert agreement(model, small, batches, 1) == pytest.approx(1 - (p - q).abs().sum(-1).mean().item() / 2, abs=1e-5)


def test_a_little_training_brings_a_draft_nearer(target) -> None:
    model, tokenizer = target
    sizes = {"d_model": 16, "d_ff": 24, "draft_batch": 4, "n_examples": 4, "replay": 0.0}
    before, after = (train_draft(model, tokenizer, DraftConfig(max_steps=n, **sizes), 0) for n in (2, 60))
    fresh = conversation_batches(DraftConfig(n_examples=3, replay=0.0), tokenizer, 6)
    assert agreement(model, after, fresh, 1) > 3 * agreement(model, before, fresh, 1)


def test_a_dearer_target_is_the_same_function(target, parity) -> None:
    model, tokenizer = target
    ids = torch.tensor([tokenizer.encode("Tell me the job of Anna Reed .")])
    dear = made_dearer(model, 3)
    assert len(dear.blocks) == dear.config.n_layers == model.config.n_layers + 3
    with torch.no_grad():
        parity("a target with idle blocks", "the target", "output", dear(ids), model(ids), 0)
    assert len(model.blocks) == model.config.n_layers  # the original stays as it was
