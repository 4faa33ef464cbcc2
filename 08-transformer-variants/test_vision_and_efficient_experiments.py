"""Topic 08: the experiments on images, contrastive learning and efficient attention run at any size."""

import json
import types

import pytest
import torch
from torch import nn

import efficient_experiments
import vision_experiments
from efficient_experiments import (
    D_MODEL,
    EFFICIENT_EXPERIMENTS,
    FORMS,
    LOOKUP_HEADS,
    N_CARDS,
    N_VALUES,
    LookupModel,
    cost_works,
    crossing,
    exchanged,
    lookup_batch,
    put_in,
    seeded,
)
from sequence_modeling import IGNORE
from vision_experiments import (
    VISION_EXPERIMENTS,
    ConvNet,
    UnorderedVisionTransformer,
    baseline_accuracies,
    train_digits,
)
from vision_transformer import DigitsConfig, VisionConfig, VisionTransformer, load_digits_images, patchify, unpatchify
from workbench import Column, RunConfig, render_table, seed_everything

RUN = RunConfig(device="cpu")


@pytest.fixture(autouse=True)
def fresh() -> None:
    seed_everything(0)


def test_every_experiment_writes_its_tables(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vision_experiments, "PATCH_SIZES", (4, 8))
    kept = ("batches of 4", "repeated, their scores masked", "temperature fixed at 1")
    variants = {name: vision_experiments.PAIR_VARIANTS[name] for name in kept}
    monkeypatch.setattr(vision_experiments, "PAIR_VARIANTS", variants)
    monkeypatch.setattr(efficient_experiments, "LOOKUP_STEPS", 2)
    monkeypatch.setattr(efficient_experiments, "N_EXAMINED", 8)
    config = types.SimpleNamespace(n_seeds=1, shrink=400, folder=tmp_path)
    tables = {"digits": 5, "patches": 2, "bound": 5, "pairs": 4}
    tables |= {"kernel": 5, "cost-time": 6, "cost-memory": 6, "lookup": len(FORMS) + 1, "features": 4, "breaks": 7}
    for experiment, seconds in {**VISION_EXPERIMENTS, **EFFICIENT_EXPERIMENTS}.values():
        assert seconds > 0
        if experiment is efficient_experiments.cost:
            config.shrink = 32  # one length, 256
        experiment(config, RUN)
        config.shrink = 400
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: len(result["rows"]) for name, result in results.items()} == tables
    for result in results.values():
        assert "nan" not in render_table(result)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"rollout", "bound", "cost"}


# Measures, on cases worked by hand


def test_the_lookup_task_has_one_answer_per_question() -> None:
    inputs, targets = lookup_batch(5, seeded(0))
    for row in range(5):
        cards = {key: value for key, value in inputs[row, :N_CARDS].tolist()}
        assert len(cards) == N_CARDS
        for (key, blank), target in zip(inputs[row, N_CARDS:].tolist(), targets[row, N_CARDS:].tolist(), strict=True):
            assert blank == 0 and cards[key] == 1 + N_CARDS + target and 0 <= target < N_VALUES
    assert (targets[:, :N_CARDS] == IGNORE).all()


def test_exact_attention_put_in_for_exact_attention_changes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(efficient_experiments, "N_EXAMINED", 8)
    model = LookupModel(FORMS["exact"](0)).eval()
    assert put_in(model, FORMS["exact"], 0)[:2] == (0.0, 0.0)
    errors = [put_in(model, FORMS[form], 0)[1] for form in FORMS if form != "exact"]
    assert min(errors) > 0.01


def test_the_lookup_model_is_attention_of_torch_between_its_two_maps(parity) -> None:
    model = LookupModel(FORMS["exact"](0)).double().eval()
    theirs = nn.MultiheadAttention(D_MODEL, LOOKUP_HEADS, batch_first=True, dtype=torch.float64)
    model.layer.load_torch(theirs)
    inputs, _ = lookup_batch(3, seeded(5))
    table, places = model.token_emb.weight, model.pos_emb.weight
    x = table[inputs[..., 0]] + table[inputs[..., 1]] + places
    expected = (x + theirs(x, x, x)[0]) @ model.head.weight.T + model.head.bias
    parity("LookupModel", "nn.MultiheadAttention and its maps", "output", model(inputs), expected, 1e-10)


def test_an_exchanged_layer_keeps_the_projections() -> None:
    layer = FORMS["exact"](0)
    for form in FORMS:
        other = exchanged(layer, FORMS[form], 0)
        assert all(
            torch.equal(getattr(other, f"{name}_proj").weight, getattr(layer, f"{name}_proj").weight) for name in "qkv"
        )


def test_crossing_is_where_a_form_becomes_and_stays_faster() -> None:
    exact = {1: 1.0, 2: 4.0, 4: 16.0}
    assert crossing({1: 2.0, 2: 3.0, 4: 4.0}, exact) == "2"
    assert crossing({1: 0.5, 2: 5.0, 4: 6.0}, exact) == "4"
    assert crossing({1: 2.0, 2: 5.0, 4: 17.0}, exact) == "not reached"
    assert crossing(exact, exact) == ""


def test_all_cost_works_give_the_same_shape_and_exact_ones_the_same_numbers() -> None:
    inputs = [torch.randn(1, 4, 256, 32) for _ in "qkv"]
    outputs = {name: work(*inputs) for name, work in cost_works(256).items()}
    assert {tuple(output.shape) for output in outputs.values()} == {(1, 4, 256, 32)}
    fused, kept = outputs["exact, fused"], outputs["exact, all scores kept"]
    assert (fused - kept).abs().max() < 1e-5


def test_the_convolutions_equal_products_with_unfolded_pictures(parity) -> None:
    model, images = ConvNet(5).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def convolved(layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        columns = layer.weight.flatten(1) @ torch.nn.functional.unfold(x, 3, padding=1) + layer.bias[:, None]
        return columns.unflatten(2, x.shape[2:]).clamp(min=0)

    pooled = convolved(model.first, images).reshape(3, 5, 4, 2, 4, 2).amax(dim=(3, 5))
    flat = convolved(model.second, pooled).flatten(1)
    parity("ConvNet", "unfolded products", "output", model(images), flat @ model.head.weight.T + model.head.bias, 1e-10)


def test_without_positions_a_vision_transformer_sees_a_set(parity) -> None:
    unordered = UnorderedVisionTransformer(VisionConfig()).double().eval()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    patches = patchify(images, 2)
    shuffled = unpatchify(patches[:, torch.randperm(16)], 1, 8, 8)
    parity(
        "UnorderedVisionTransformer", "its patches shuffled", "invariant", unordered(shuffled), unordered(images), 1e-10
    )
    ordered = VisionTransformer(VisionConfig()).double().eval()
    ordered.load_state_dict(unordered.state_dict())
    ordered.pos_emb.data.zero_()
    name = "VisionTransformer, positions 0"
    parity("UnorderedVisionTransformer", name, "output", unordered(images), ordered(images), 1e-10)


def test_models_of_the_digits_learn_and_the_unordered_one_sees_a_set() -> None:
    train, held_out = load_digits_images()
    model, seconds = train_digits(ConvNet(16), train, DigitsConfig(max_steps=60), RUN)
    assert vision_experiments.image_accuracy(model, held_out) > 0.5 and seconds > 0  # chance: 0.1
    scores = baseline_accuracies(train, held_out)
    assert 0.95 < scores["3 nearest neighbours"] <= 1 and 0.9 < scores["logistic regression"] < 1
    unordered = UnorderedVisionTransformer(VisionConfig(patch_size=4)).eval()
    image = held_out.images[:1]
    swapped = torch.cat([image[:, :, 4:], image[:, :, :4]], dim=2)
    assert torch.allclose(unordered(image), unordered(swapped), atol=1e-5)
    ordered = VisionTransformer(VisionConfig(patch_size=4)).eval()
    assert not torch.allclose(ordered(image), ordered(swapped), atol=1e-5)


def test_tables_name_their_command(tmp_path) -> None:
    config = types.SimpleNamespace(folder=tmp_path)
    vision_experiments.save(config, "some", [Column("Name"), Column("value")], [["a", 1.0]], "digits", 3)
    result = json.loads((tmp_path / "results.json").read_text())["some"]
    assert result["command"].endswith("transformer_variants.py figures digits") and result["seeds"] == [0, 1, 2]
