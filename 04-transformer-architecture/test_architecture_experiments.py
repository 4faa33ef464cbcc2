"""Topic 04: the chapter's measurements and planted failures, on models small enough for a test."""

import collections
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import architecture_experiments as topic
import transformer_architecture as core
from sequence_modeling import BOS_ID, Vocabulary
from tiny_world import World
from transformer_architecture import (
    POSITIONS,
    CausalTransformer,
    EncoderLayer,
    FeedForward,
    ModelConfig,
    TrainConfig,
    TransformerSize,
)
from workbench import RunConfig, seed_everything

BATCH, TGT, D_MODEL, N_HEADS, D_FF, VOCAB = 2, 5, 12, 3, 20, 23  # all different
TINY = ModelConfig(max_seq_len=16, d_model=D_MODEL, n_layers=2, n_heads=N_HEADS, d_ff=D_FF)
SHORT = TrainConfig(batch_size=8, seq_len=32, max_steps=4, warmup_steps=2, n_documents=20)
RUN = RunConfig(device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # empty stacks are counted here


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)
    torch.set_num_threads(1)


def config_for_world(**changes) -> ModelConfig:
    return ModelConfig(**{"max_seq_len": 96, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, **changes})


def test_shape_comments_are_true(checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        topic.plot_curves({"a": [[1.0, 2.0], [2.0, 3.0]]}, "x", "y")
        language = CausalTransformer(config_for_world(), len(World().vocabulary()))
        topic.excess_by_position(language, 20, 2, 0)
        topic.position_similarities(language, torch.randint(4, VOCAB, (BATCH, TGT)))
    source = Path(topic.__file__).read_text(encoding="utf-8").splitlines()
    claimed = {number for number, line in enumerate(source, 1) if line.rstrip().endswith(")") and "  # (" in line}
    ran = {int(place.rsplit(":", 1)[1]) for place in checked}
    assert claimed <= ran, f"shape comments that no line of this test runs: {sorted(claimed - ran)}"


def test_numpy_engine_trains_a_transformer_along_the_same_path(parity) -> None:
    config = dataclasses.replace(TINY, n_layers=1, positions="learned")
    model, token_ids = CausalTransformer(config, VOCAB), torch.randint(4, VOCAB, (BATCH, TGT + 1))
    theirs, ours = topic.train_both_engines(model, token_ids[:, :-1], token_ids[:, 1:], max_steps=20)
    parity("NumpyTransformer", "CausalTransformer in torch", "trajectory", ours, theirs, 1e-10)
    assert ours[0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert ours[-1] < math.log(VOCAB) / 2


def test_depth_shrinks_the_last_gradient_of_pre_norm_but_not_of_post_norm() -> None:
    """Xiong et al. 2020, theorem 1: untrained, the last block's gradient falls with 1/sqrt(depth) in pre-norm only."""
    token_ids, last = torch.randint(VOCAB, (8, 13)), {}
    for norm_order, n_layers in itertools.product(("pre", "post"), (2, 8)):
        config = dataclasses.replace(TINY, d_model=48, d_ff=96, n_layers=n_layers, norm_order=norm_order)
        models = [CausalTransformer(config, VOCAB) for _ in range(3)]
        norms = [topic.gradient_norms(model, token_ids[:, :-1], token_ids[:, 1:]) for model in models]
        assert all(len(per_block) == n_layers for per_block in norms)
        last[norm_order, n_layers] = np.mean(norms, axis=0)[-1]
    assert last["pre", 8] < 0.7 * last["pre", 2]
    assert last["post", 8] > 0.85 * last["post", 2]
    model = models[0]
    F.cross_entropy(model(token_ids).flatten(0, 1), token_ids.flatten()).backward()  # must not add to what is measured
    again = topic.gradient_norms(model, token_ids[:, :-1], token_ids[:, 1:])
    assert again == pytest.approx(norms[0])


def test_the_last_feed_forward_gradient_exceeds_the_derived_ratio_by_a_fifth() -> None:
    """The chapter's six blocks before training: post-norm over pre-norm, beside the root of Var / (1 + nu_ff)."""
    measured, derived = [], []
    for seed in range(3):
        norms, variance = {}, {}
        for norm_order in ("pre", "post"):
            seed_everything(seed)
            model = CausalTransformer(
                ModelConfig(256, 32, 6, d_ff=128, norm_order=norm_order), len(core.tiny_world()[1])
            )
            batch = next(core.tiny_world_batches(TrainConfig(), seed))
            topic.gradient_norms(model, *batch)
            grads = [parameter.grad for parameter in model.encoder.blocks[-1].ffn.parameters()]
            norms[norm_order] = math.sqrt(sum(grad.square().sum().item() for grad in grads))
            variance[norm_order] = topic.residual_variances(model, batch[0])[-1]
        measured.append(norms["post"] / norms["pre"])
        derived.append(math.sqrt(variance["pre"] / 1.32))
    assert measured == pytest.approx([2.2, 2.3, 2.9], abs=0.06) and derived == pytest.approx([1.8, 1.9, 2.4], abs=0.06)


def test_residual_variance_grows_only_in_pre_norm() -> None:
    token_ids = torch.randint(VOCAB, (8, 13))
    for norm_order in ("pre", "post"):
        config = dataclasses.replace(TINY, d_model=48, n_layers=8, norm_order=norm_order)
        variances = topic.residual_variances(CausalTransformer(config, VOCAB), token_ids)
        assert len(variances) == 9
        steps = np.diff(variances)
        if norm_order == "pre":
            assert (steps > 0).all() and steps[4:].mean() < 3 * steps[:4].mean()  # linear, not exponential
        else:
            assert variances[1:] == pytest.approx([1.0] * 8, abs=0.05)


def test_residual_variance_lies_between_its_bounds_and_starts_at_the_lower_one() -> None:
    config = ModelConfig(max_seq_len=64, d_model=64, n_layers=6, n_heads=4, d_ff=256)
    least, most = topic.predicted_variances(TransformerSize(64, 4, 256, 6), 64)
    assert most[1] - most[0] == pytest.approx(1 + 8 / 25)  # d_ff = 4 d: attention at most 1, feed-forward 0.32
    token_ids = torch.randint(4, 10_000, (8, 64))  # hardly a token twice, as the derivation assumes
    runs = [topic.residual_variances(CausalTransformer(config, 10_000), token_ids) for _ in range(3)]
    measured = np.mean(runs, axis=0)
    assert measured[1] == pytest.approx(least[1], rel=0.1)
    assert all(0.97 * low < value < high for low, value, high in zip(least[1:], measured[1:], most[1:], strict=True))


def test_position_similarity_of_equal_opposite_and_crossed_vectors() -> None:
    model, token_ids = CausalTransformer(TINY, VOCAB), torch.tensor([[4, 4, 5]])
    model.token_emb.weight.data.zero_()
    model.token_emb.weight.data[4, 0], model.token_emb.weight.data[5, 1] = 2.0, 3.0
    assert topic.position_similarities(model, token_ids)[0] == pytest.approx(1 / 3)  # pairs: 1, 0, 0
    model.token_emb.weight.data[5] = -model.token_emb.weight.data[4]
    assert topic.position_similarities(model, token_ids)[0] == pytest.approx(-1 / 3)  # pairs: 1, -1, -1
    assert len(topic.position_similarities(model, token_ids)) == TINY.n_layers + 1


def test_feed_forward_variance_is_the_derived_one() -> None:
    layer, x = FeedForward(128, 512), torch.randn(4000, 128)
    assert layer(x).var().item() == pytest.approx(2 * 128 * 512 / 640**2, rel=0.1)  # 0.32


def test_every_break_shows_its_symptom() -> None:
    assert get_args(get_type_hints(core.BreakConfig)["break_"]) == ("none", *topic.BREAKS)
    config = config_for_world(d_model=32, d_ff=64, n_heads=2)
    schedule = TrainConfig(max_steps=80, warmup_steps=10, learning_rate=2e-2, n_documents=60)
    found = {name: topic.BREAKS[name][0](config, schedule, RUN) for name in topic.BREAKS if name != "mask"}
    (_, sound, broken), (_, gap, swapped) = found["unbiased"]
    assert (round(sound, 3), round(broken, 3)) == (1.0, 0.707) and 0 < abs(swapped - gap) < 0.05  # hardly to be seen
    (_, sound, broken), (_, finite, spoiled) = found["epsilon"]
    assert (round(sound, 3), round(broken, 3)) == (0.302, 0.990) and finite == 1 and spoiled < 0.5
    (_, sound, broken), (_, differs, same) = found["norm-order"]
    assert sound > 1.2 and broken == pytest.approx(1, abs=0.05) and differs > 0.01 and same == 0
    (_, gap, mixed), (_, _, reordered) = found["rotary"]
    assert mixed > gap + 0.01 and reordered == pytest.approx(gap, abs=1e-5)
    deeper = dataclasses.replace(config, n_layers=2, d_ff=32)
    longer = dataclasses.replace(schedule, max_steps=200, learning_rate=3e-2)
    ((_, gap, leaking),) = topic.break_mask(deeper, longer, RUN)
    assert gap > 0 > leaking  # below the floor: no honest model can be


def test_break_on_the_command_line(capsys, tmp_path) -> None:
    flags = "--break epsilon --max-steps 1 --d-model 8 --n-layers 1 --n-heads 2 --d-ff 8 --n-documents 5 --device cpu"
    core.main([*flags.split(), "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "about 5 s" in lines[0]  # this failure trains nothing
    assert any("0.3015 as it should be, 0.9901 with --break epsilon" in line for line in lines)
    with pytest.raises(SystemExit):
        core.main(["--break", "nothing-of-the-kind"])


def test_figures_writes_every_table_and_figure(tmp_path, capsys) -> None:
    sizes = "--n-seeds 2 --d-model 16 --n-deep 2 --deep-steps 2 --max-steps 2 --n-documents 8 --n-rows 2 --longest 160"
    folder = tmp_path / "figures"
    core.main(["figures", *sizes.split(), "--device", "cpu", "--folder", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(
        "breaks costs engines gradients lengths norms parameters parts similarities variances".split()
    )
    assert {path.name for path in folder.glob("*.svg")} == {
        f"{name}.svg" for name in ("blocks", "gradients", "lengths", "models", "norms", "variances")
    }
    assert all(path.stat().st_size < 120_000 for path in folder.glob("*.svg"))
    assert [row[0] for row in results["lengths"]["rows"]] == list(POSITIONS)
    counted, formula = (
        {row[0]: row[1:] for row in results["parameters"]["rows"]}[name] for name in ("counted in our modules", "total")
    )
    assert counted == formula and formula[2] == 124_439_808
    assert all(row[2] == pytest.approx(row[3]) for row in results["costs"]["rows"])
    assert all(row[3] < 1e-10 for row in results["engines"]["rows"])
    core.main(["figures", "blocks", "--folder", str(tmp_path / "other")])
    assert not (tmp_path / "other" / "results.json").exists()


def test_lengths_are_averaged_over_the_stated_positions(tmp_path, monkeypatch) -> None:
    ramp = [float(position) for position in range(160)]
    monkeypatch.setattr(topic, "compare_lengths", lambda *_: {"ramp": [ramp, [math.nan] + ramp[1:]]})
    topic.show_lengths(topic.FiguresConfig(longest=160, n_seeds=2, folder=tmp_path / "figures"), RUN)
    row = json.loads((tmp_path / "figures" / "results.json").read_text())["lengths"]["rows"][0]
    assert row == ["ramp", [31.5, 32.0], [95.5, 95.5], [143.5, 143.5]]


def test_word_frequencies_alone_leave_a_gap_of_about_four_nats() -> None:
    """What a model has learned that looks at nothing but how often a word occurs: the chapter's flat line."""
    counts: collections.Counter[str] = collections.Counter()
    for document in itertools.islice(core.tiny_world()[0].stream(0, split="train"), 3000):
        counts.update(document.tokens)
    words = [word for document in core.held_out_documents(500) for word in document.tokens]
    smooth = 0.5 / (counts.total() + 0.5 * 368)
    nats = [-math.log(counts[word] / (counts.total() + 0.5 * 368) + smooth) for word in words]
    assert sum(nats) / len(nats) - core.entropy_floor(500) == pytest.approx(3.97, abs=0.005)


def test_entropy_floor_and_gap_are_those_of_training() -> None:
    trained = core.train_language_model(config_for_world(), SHORT, RUN)
    assert core.entropy_floor(SHORT.n_documents) == pytest.approx(trained.loss - trained.gap)
    assert topic.held_out_gap(trained.model, SHORT.n_documents) == pytest.approx(trained.gap)


def test_an_unknown_experiment_is_refused_in_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        core.main(["figures", "lenghts"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "unknown experiment 'lenghts'; did you mean 'lengths'" in error


def test_each_ablation_removes_its_part() -> None:
    token_ids = torch.randint(4, VOCAB, (BATCH, TGT))
    changed = token_ids.clone()
    changed[:, 0] = 4 + (changed[:, 0] - 3) % (VOCAB - 4)
    outputs = {}
    for part in topic.ABLATIONS:
        torch.manual_seed(0)
        model = CausalTransformer(TINY, VOCAB).double()
        topic.ablate(part)(model)
        outputs[part] = model(token_ids)
        moved = (model(changed) - outputs[part])[:, 1:].abs().max()
        assert (moved < 1e-12) == (part == "attention")  # without attention no position sees another
    assert len({round(output.sum().item(), 9) for output in outputs.values()}) == len(topic.ABLATIONS)
    with pytest.raises(ValueError, match="unknown part 'atention'; did you mean 'attention'"):
        topic.ablate("atention")
    x = torch.randn(BATCH, TGT, D_MODEL)
    layer = EncoderLayer(D_MODEL, N_HEADS, D_FF)
    topic.remove_residual(layer)
    torch.testing.assert_close(layer(x), layer.ffn(layer.ffn_norm(layer.self_attn(layer.attn_norm(x))[0])))
    topic.remove_norms(layer)
    torch.testing.assert_close(layer(x), layer.ffn(layer.self_attn(x)[0]))
    layer = EncoderLayer(D_MODEL, N_HEADS, D_FF)
    topic.silence(layer.ffn)
    torch.testing.assert_close(layer(x), x + layer.self_attn(layer.attn_norm(x))[0])


def test_comparisons_run_every_condition_and_seed() -> None:
    config, seeds = config_for_world(max_seq_len=96), range(2)
    orders = topic.compare_norm_orders(config, SHORT, RUN, seeds)
    assert list(orders) == ["pre, warm-up 2", "pre, warm-up 0", "post, warm-up 2", "post, warm-up 0"]
    with_warmup, without = orders["pre, warm-up 2"], orders["pre, warm-up 0"]
    assert [run.gradients for run in with_warmup] == [run.gradients for run in without]  # before the first step
    assert [run.before for run in with_warmup] == [run.before for run in without]
    assert all(run.after != run.before and len(run.losses) == SHORT.max_steps for run in with_warmup)
    parts = topic.compare_parts(config, SHORT, RUN, range(1))
    lengths = topic.compare_lengths(config, dataclasses.replace(SHORT, max_steps=2), RUN, range(1), n_rows=4)
    assert list(parts) == list(topic.ABLATIONS) and list(lengths) == list(POSITIONS)
    gaps = [run.gap for runs in orders.values() for run in runs] + [gap for gaps in parts.values() for gap in gaps]
    assert parts["nothing"] == [with_warmup[0].gap]  # the same run
    assert len(gaps) == 8 + len(parts) and len(set(gaps)) == len(gaps) - 1 and min(gaps) > 0
    assert all(len(curve) == 96 for curves in lengths.values() for curve in curves)
    figure = topic.plot_curves(lengths, "position", "nats per token", width=8, marks=(32,))
    assert len(figure.axes[0].lines) == len(POSITIONS) + 1


class Oracle(nn.Module):
    """A model that knows the language: it answers with the exact probabilities of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.vocabulary = Vocabulary(self.world.vocabulary())
        self.lm_head = nn.Linear(1, 1)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*token_ids.shape, len(self.vocabulary)), -1e9)
        for row, ids in enumerate(token_ids.tolist()):
            for position in range(len(ids)):
                start = max(index for index in range(position + 1) if ids[index] == BOS_ID)
                prefix = self.vocabulary.decode(ids[start + 1 : position + 1])
                if prefix[-1:] != ["<eos>"]:
                    for token, chance in self.world.next_token(prefix).items():
                        logits[row, position, self.vocabulary.ids[token]] = math.log(chance)
        return logits


def test_excess_of_the_true_language_is_zero_at_every_position(parity) -> None:
    excess = topic.excess_by_position(Oracle(), seq_len=50, n_rows=3, seed=5)
    parity(
        "excess_by_position",
        "exact language",
        "invariant",
        [x for x in excess if x == x],
        [0.0] * sum(x == x for x in excess),
        1e-5,
    )
