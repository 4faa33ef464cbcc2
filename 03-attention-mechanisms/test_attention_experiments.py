"""Topic 03: the measurements against numbers had by other means, and the figures verb."""

import json
import math

import pytest
import torch

import attention_experiments as topic
from attention_experiments import (
    PeakMemory,
    entropy_through_training,
    growth,
    largest_weight,
    measure_cost,
    relative_entropy,
)
from attention_mechanisms import (
    N_KINDS,
    CostConfig,
    RecallConfig,
    accuracy,
    causal_mask,
    main,
    masked_softmax,
    recall_model,
    token_names,
    trained_on_recall,
)
from sequence_modeling import IGNORE, recall_batch
from test_attention_mechanisms import unreached
from workbench import RunConfig

CPU = RunConfig(device="cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_tiled_memory_is_linear_and_naive_quadratic() -> None:
    """Exact: the peak counts bytes of tensors, so it is the same on every run."""
    costs = measure_cost(CostConfig(32, 128, n_heads=2, d_head=8, tile_size=16, n_repeats=1), CPU, topic.peak_memory)
    assert growth(costs["tiled"]) == pytest.approx(1.0, abs=0.02)
    assert growth(costs["linear"]) == pytest.approx(1.0, abs=0.02)
    assert growth(costs["naive"]) == pytest.approx(2.0, abs=0.05)
    scores = 2 * 128 * 128 * 4
    assert costs["tiled"][128] < scores / 2 < scores < costs["naive"][128]
    assert all(list(by_length) == [32, 64, 128] for by_length in costs.values()) and tuple(costs) == topic.KINDS


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    old = torch.ones(1000)
    with PeakMemory() as memory:
        first = old + 1  # 4000 bytes
        first.view(10, 100).mul_(2)  # a view and an in-place product make nothing new
        del first
        second = torch.empty(500, dtype=torch.float64) * 2  # 4000 bytes twice; the first dies
    assert memory.peak == 8000 and memory.live == 4000 and len(second) == 500


def test_largest_weight_grows_with_width_only_without_the_scale() -> None:
    """Scores of unit-variance vectors have variance d: unscaled, the softmax of wide ones is nearly a maximum."""
    small, wide = ([largest_weight(d, 32, scaled, generator()) for scaled in (True, False)] for d in (16, 1024))
    assert 0.10 < small[0] < 0.30 and abs(wide[0] - small[0]) < 0.05
    assert wide[1] > 0.85 > small[1] > small[0]
    scores = normal(2000, 1, 64) @ normal(2000, 64, 1, seed=1)
    assert scores.var().item() == pytest.approx(64, rel=0.15)


def test_relative_entropy_is_one_for_uniform_and_zero_for_a_single_key() -> None:
    mask = causal_mask(5)
    uniform, single = masked_softmax(torch.zeros(2, 5, 5), mask), torch.eye(5).expand(2, 5, 5)
    assert relative_entropy(uniform, mask) == pytest.approx(1) and relative_entropy(single, mask) == 0
    half = torch.tensor([[0.5, 0.5, 0, 0]])
    assert relative_entropy(half, torch.ones(1, 4, dtype=torch.bool)) == pytest.approx(0.5)


def test_entropy_is_recorded_with_and_without_the_scale() -> None:
    config = RecallConfig(n_pairs=2, d_model=64, n_heads=1, n_layers=1, batch_size=8, max_steps=6)
    trials = [entropy_through_training(config, scaling, CPU, every=3) for scaling in topic.SCALINGS]
    scaled, unscaled, small, same = (trial.entropies for trial in trials)
    assert trials[0].steps == [0, 3] and len(scaled) == len(unscaled) == 2
    assert all(0 <= trial.accuracy <= 1 and 0 <= trial.clipped <= 1 for trial in trials)
    assert 1 > scaled[0] > unscaled[0] + 0.2, "at the start the scale alone keeps the weights spread"
    assert small[0] == pytest.approx(scaled[0], abs=1e-5), "the same function at step 0"
    assert small[1] < scaled[1], "but not after the first steps, whose size does not know of the scale"
    assert same[0] == pytest.approx(scaled[0], abs=1e-5) and abs(same[1] - scaled[1]) < abs(small[1] - scaled[1]) / 3


def test_without_clipping_a_small_start_and_query_step_is_the_divided_model() -> None:
    config = RecallConfig(n_pairs=2, d_model=24, n_heads=1, batch_size=16, max_steps=30)
    divided, undivided = (
        entropy_through_training(config, topic.SCALINGS[i], CPU, every=10, max_norm=math.inf) for i in (0, 3)
    )
    assert divided.clipped == undivided.clipped == 0 and abs(divided.entropies[0] - divided.entropies[2]) > 1e-3
    assert undivided.entropies == pytest.approx(divided.entropies, abs=1e-3)


def test_score_gradient_passes_where_the_softmax_is_not_saturated() -> None:
    """With equal scores (width times 0) a weight is 1/n; the gradient's length is then that of n normals over n."""
    narrow = topic.score_gradient(1, 64, True, generator(), 400)
    wide, divided = (topic.score_gradient(1024, 64, scaled, generator(), 400) for scaled in (False, True))
    assert 0.08 < narrow < 0.3 and 0.08 < divided < 0.3 and wide < divided / 50


def test_the_training_loop_is_that_of_topic_02() -> None:
    """The loop that records entropies trains the same model as `fit`."""
    config = RecallConfig(n_pairs=2, d_model=16, n_heads=2, max_steps=40)
    model, inputs, targets = trained_on_recall(config, CPU)
    with torch.no_grad():
        expected = accuracy(model(inputs), targets)
    assert entropy_through_training(config, topic.SCALINGS[0], CPU).accuracy == expected


def test_head_roles_by_hand() -> None:
    """One pair shown, <eos>, one question: keys at 0 and 3, value at 1. Weights give each link a number of its own."""
    inputs, targets = torch.tensor([[7, 25, 2, 7]]), torch.tensor([[IGNORE, IGNORE, IGNORE, 25]])
    weights = torch.zeros(2, 1, 1, 4, 4)
    weights[:, 0, 0, 1, 0] = torch.tensor([0.7, 0.2])  # value to its key
    weights[:, 0, 0, 3, 1] = torch.tensor([0.1, 0.9])  # question to answer
    to_key, to_answer = topic.head_roles(weights, inputs, targets)
    torch.testing.assert_close(to_key, torch.tensor([[0.7], [0.2]]))
    torch.testing.assert_close(to_answer, torch.tensor([[0.1], [0.9]]))


def test_head_roles_finds_the_links_of_drawn_sequences() -> None:
    """Weights that put everything on the true links score 1; the links come from the token names."""
    inputs, targets = recall_batch(5, 3, generator(), N_KINDS)
    weights = torch.zeros(1, 5, 1, 12, 12)
    for b, row in enumerate(inputs):
        names = token_names(row)
        for i in (7, 9, 11):
            weights[0, b, 0, i, names[:6].index(names[i]) + 1] = 1
        for i in (1, 3, 5):
            weights[0, b, 0, i, i - 1] = 1
    to_key, to_answer = topic.head_roles(weights, inputs, targets)
    assert to_key.item() == to_answer.item() == 1


def test_linear_attention_is_near_the_mean_not_near_softmax() -> None:
    """For nearly equal scores all three agree; for spread ones linear attention is as far away as the plain mean."""
    near, far = (topic.linear_error(spread, generator()) for spread in (0.01, 4.0))
    assert near[1] < 0.02 and far[0] > 0.9 and far[1] > 0.9


def test_growth_finds_the_exponent_beyond_a_fixed_part() -> None:
    assert growth({n: 1000 + 3 * n**2 for n in (8, 16, 32, 64)}) == pytest.approx(2)
    assert growth({n: 5 * n for n in (8, 16, 32)}) == pytest.approx(1)
    with pytest.raises(ValueError, match="an exponent needs at least 3 lengths, got 0"):
        growth({})


def test_lines_show_the_data_they_are_given() -> None:
    lines = topic.plot_lines({"x": ([1, 2], [3, 4])}, "steps", "nats", log=True)
    assert lines.axes[0].get_lines()[0].get_ydata().tolist() == [3, 4] and lines.axes[0].get_xlabel() == "steps"


def test_three_tokens_show_attention_worked_by_hand() -> None:
    """Scores 0; 1, 0; 2, 0, 1 under the causal mask: the softmax by arithmetic, and the same numbers in the picture."""
    texts = [text.get_text() for text in topic.plot_three_tokens().axes[0].texts]
    total = math.e**2 + 1 + math.e
    row = [math.e**2 / total, 1 / total, math.e / total]
    start = texts.index("weights") - 9
    assert texts[start : start + 9] == ["1", "0", "0", "0.73", "0.27", "0", *(f"{weight:.2f}" for weight in row)]
    end = texts.index("output")
    assert texts[end - 4 : end] == [f"{x:.2f}" for x in (row[0], row[1], row[2], row[0] + row[2])], "keys are values"
    assert texts.count("−∞") == 3


def test_figures_run_every_experiment_and_write_every_table(tmp_path, capsys) -> None:
    folder = tmp_path / "figures"
    main(["figures", "--shrink", "120", "--n-seeds", "2", "--folder", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(topic.EXPERIMENTS)
    for name, result in results.items():
        assert result["seeds"] == ([0] if name in ("memory", "time") else [0, 1]), name
        assert all(len(cell) == 2 for row in result["rows"] for cell in row if isinstance(cell, list)), name
    assert [row[0] for row in results["memory"]["rows"]] == list(topic.KINDS)
    assert [row[-1] for row in results["padding-breaks"]["rows"]][:2] == [[0.0, 0.0], [1.0, 1.0]]
    assert len(results["heads"]["rows"]) == 2 * 2 * 3 and len(results["scale"]["rows"]) == 9
    wide = {row[0]: row[1:] for row in results["width"]["rows"]}["512"]
    assert min(wide[0]) > 0.9 and max(wide[1]) < 0.12, "the number of the chapter's question"
    pictures = {path.stem for path in folder.glob("*.svg")}
    assert pictures == {"alignment_copy", "alignment_recall", "heads", "memory", "scale_entropy", "three_tokens"}
    before = results["width"]
    main(["figures", "linear", "--n-seeds", "1", "--folder", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert results["linear"]["seeds"] == [0] and results["width"] == before, "only the named experiment ran"


def test_shape_comments_are_true(checked_shapes) -> None:
    config = RecallConfig(n_pairs=2, d_model=6, n_heads=3, batch_size=2, max_steps=1)
    model, batches = recall_model(config, CPU)
    inputs, targets = next(batches)
    with checked_shapes(topic) as checked:
        entropy_through_training(config, topic.SCALINGS[0], CPU)
        topic.head_roles(model.look(inputs)[1], inputs, targets)
        largest_weight(4, 5, True, generator()), topic.score_gradient(4, 5, True, generator())
        topic.three_tokens()
    missing = unreached(topic.__file__, checked)
    assert not missing, f"shape comments that no line of this test runs: {missing}"
