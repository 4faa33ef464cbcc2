"""Topic 10: each objective asks what it says, loses no token, and the future cannot be seen where it is asked for."""

import random

import pytest
import torch

import packing
import pretraining_objectives
from attention_mechanisms import prefix_mask
from bert_family import MaskingConfig
from pretraining_objectives import (
    ObjectiveBatches,
    PrefixTransformer,
    causal_example,
    fim_document,
    masked_example,
    prefix_example,
    prefix_masks,
    restore_fim,
    span_example,
)
from sequence_modeling import IGNORE
from t5 import SpanConfig, restore_spans
from training_transformers import TrainConfig, fit
from transformer_architecture import ModelConfig

FIM = (21, 22, 23)
IDS = [1, *range(5, 14), 2]


def test_causal_by_hand() -> None:
    assert causal_example([1, 7, 8, 2]) == ([1, 7, 8], [7, 8, 2], 0)
    with pytest.raises(ValueError, match="at least 2 token ids for this objective, got 1"):
        causal_example([1])


def test_prefix_targets_are_the_tokens_after_the_prefix_and_every_length_occurs() -> None:
    lengths = set()
    for seed in range(300):
        example = prefix_example(IDS, random.Random(seed))
        length = example.prefix_length
        assert example.inputs == IDS[:-1] and len(example.targets) == len(example.inputs)
        assert [target for target in example.targets if target != IGNORE] == IDS[length:]
        assert example.targets[: length - 1] == [IGNORE] * (length - 1)
        lengths.add(length)
    assert lengths == set(range(1, len(IDS)))


def test_prefix_masks_equal_topic_03_row_by_row() -> None:
    masks = prefix_masks(torch.tensor([0, 3, 6]), 6)
    assert masks.shape == (3, 1, 6, 6)
    for row, length in zip(masks[:, 0], (0, 3, 6), strict=True):
        assert torch.equal(row, prefix_mask(6, length))


def test_fim_restores_every_document_and_uses_every_cut() -> None:
    shapes = set()
    for seed in range(2000):
        cut = fim_document(IDS, FIM, random.Random(seed), rate=1.0)
        assert restore_fim(cut, FIM) == IDS and len(cut) == len(IDS) + 3
        assert (cut[0], cut[1], cut[-1]) == (1, 21, 2)
        shapes.add((cut.index(22), cut.index(23)))
    assert len(shapes) == 10 * 11 // 2  # all pairs low <= high of the 10 places between 9 tokens
    assert fim_document(IDS, FIM, random.Random(0), rate=0.0) == IDS


def test_fim_rate_is_the_share_of_documents() -> None:
    rng, n = random.Random(1), 4000
    share = sum(21 in fim_document(IDS, FIM, rng, 0.3) for _ in range(n)) / n
    assert abs(share - 0.3) < 5 * (0.21 / n) ** 0.5
    with pytest.raises(ValueError, match="rate must be between 0 and 1, got 1.5"):
        fim_document(IDS, FIM, rng, 1.5)
    with pytest.raises(ValueError, match="expected prefix, suffix, middle in this order"):
        restore_fim([1, 21, 5, 23, 6, 22, 2], FIM)


def test_masked_and_span_examples_are_topic_08s() -> None:
    generator = torch.Generator().manual_seed(0)
    example = masked_example(IDS, 30, 4, (1, 2), MaskingConfig(mask_rate=0.5), generator)
    asked = [place for place, target in enumerate(example.targets) if target != IGNORE]
    assert asked and 0 not in asked and len(IDS) - 1 not in asked
    assert all(example.targets[place] == IDS[place] for place in asked)
    sentinels = [24, 25, 26, 27]
    example = span_example(IDS, sentinels, SpanConfig(0.3, 1.5), generator)
    row = [*example.inputs, example.targets[-1]]
    source, target = row[1 : example.prefix_length], row[example.prefix_length : -1]
    assert restore_spans(source, target, sentinels) == IDS[1:-1]
    assert [t for t in example.targets if t != IGNORE] == row[example.prefix_length :]


def small_model() -> PrefixTransformer:
    torch.manual_seed(0)
    return PrefixTransformer(ModelConfig(32, 16, 2, 2, 24), 30).eval()


def test_a_prefix_is_read_in_both_directions_and_the_rest_is_causal(checked_shapes) -> None:
    model, ids, length = small_model(), torch.tensor([list(range(5, 15))]), 4
    lengths = torch.tensor([length])
    with checked_shapes(pretraining_objectives):
        before = model(ids, prefix_lengths=lengths)
    changed = ids.clone()
    changed[0, 3] = 29
    after = model(changed, prefix_lengths=lengths)
    assert not torch.equal(before[0, 0], after[0, 0])  # position 0 sees position 3, which is in the prefix
    changed = ids.clone()
    changed[0, 7] = 29
    after = model(changed, prefix_lengths=lengths)
    assert torch.equal(before[0, :7], after[0, :7]) and not torch.equal(before[0, 7:], after[0, 7:])


def test_without_a_prefix_it_is_the_causal_model(parity) -> None:
    model, ids = small_model(), torch.arange(5, 17)[None].repeat(2, 1)
    logits = model(ids, prefix_lengths=torch.tensor([0, 1]))
    parity("PrefixTransformer", "CausalTransformer", "invariant", logits, model(ids), 1e-6)


def test_batches_depend_on_the_step_alone_and_padding_is_no_target() -> None:
    documents = [[1, *range(5, 5 + n), 2] for n in (3, 6, 9, 4, 5)]
    batches = ObjectiveBatches(documents, prefix_example, batch_size=2, seed=3)
    again = ObjectiveBatches(documents, prefix_example, batch_size=2, seed=3)
    for step in (4, 0, 2):
        batch = batches(step)
        assert all(torch.equal(tensor, again(step)[name]) for name, tensor in batch.items())
        assert batch["inputs"].shape == batch["targets"].shape and batch["prefix_lengths"].shape == (
            len(batch["inputs"]),
        )
        assert (batch["targets"][batch["inputs"] == packing.PAD_ID] == IGNORE).all()
    lengths = [tuple(batches(step)["prefix_lengths"].tolist()) for step in (0, 3, 6)]
    assert len(set(lengths)) > 1  # other prefixes in another epoch


@pytest.mark.parametrize("name", ["causal", "prefix", "fim"])
def test_every_objective_can_be_learnt(name: str) -> None:
    documents = [[1, *(5 + (start + place) % 7 for place in range(8)), 2] for start in range(7)]
    makes = {
        "causal": lambda ids, rng: causal_example(ids),
        "prefix": prefix_example,
        "fim": lambda ids, rng: causal_example(fim_document(ids, FIM, rng)),
    }
    model = small_model()

    def loss_fn(model, batch):
        logits = model(batch["inputs"], prefix_lengths=batch["prefix_lengths"] if name == "prefix" else None)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        return loss, (batch["targets"] != IGNORE).sum()

    batches = ObjectiveBatches(documents, makes[name], batch_size=7, seed=0)
    log = fit(model, batches, loss_fn, TrainConfig(max_steps=45, warmup_steps=5, learning_rate=1e-2))
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
