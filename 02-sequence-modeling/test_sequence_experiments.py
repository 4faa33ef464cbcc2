"""Topic 02: the measurements against numbers had by other means, the planted failures, and the figures verb."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sequence_experiments as topic
import sequence_modeling
from sequence_experiments import BREAKS, gradient_by_lag, memory_accuracy
from sequence_modeling import (
    EOS_ID,
    IGNORE,
    RNN,
    CharacterConfig,
    LadderConfig,
    LanguageModel,
    Seq2Seq,
    Vocabulary,
    copy_batch,
    echo_batch,
    recall_batch,
)
from tiny_world import World
from workbench import RunConfig, seed_everything


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# Learning


def test_seq2seq_learns_to_echo() -> None:
    seed_everything(0)
    model, generator = Seq2Seq(20, 20, 48), torch.Generator().manual_seed(0)
    score = memory_accuracy(model, echo_batch, 2, 120, 0.03)
    assert score > 0.95, f"chance is {1 / 16:.3f}"
    src_ids, lengths, _, targets = echo_batch(64, 2, generator)
    assert (model.generate(src_ids, lengths, 2) == targets).float().mean() > 0.95


@pytest.mark.parametrize("make_batch", [copy_batch, recall_batch])
def test_memory_tasks_can_be_learned(make_batch) -> None:
    seed_everything(0)
    score = memory_accuracy(LanguageModel(36, 48, "gru"), make_batch, 1, 80, 0.03)
    assert score > 0.9, f"chance is {1 / 16:.3f}"


# Measures


def test_gradients_vanish_no_slower_than_their_bound() -> None:
    """Each step back multiplies by the Jacobian diag(1 - h^2) U, whose norm is at most the gain of an orthogonal U."""
    found = topic.measure_gradients(d_hidden=12, seq_len=30, seed=0)
    damped, plain, wild = (found[f"RNN, gain {gain}"] for gain in (0.8, 1.0, 1.2))
    for gain, norms in ((0.8, damped), (1.0, plain), (1.2, wild)):
        bound = found[f"bound, gain {gain}"]
        assert all(norm <= limit for norm, limit in zip(norms, bound, strict=True))
        assert bound[20] / bound[10] == pytest.approx(gain**10, rel=1e-5)
    assert damped[25] < plain[25] / 20 and plain[25] < wild[25]
    assert found["LSTM"][25] > 100 * found["LSTM, forget bias 0"][25] > 0


def test_gradient_by_lag_is_the_gradient() -> None:
    torch.manual_seed(0)
    layer = RNN(2, 3)
    norms = gradient_by_lag(layer, 4, seed=5)
    assert layer.cells[0].input_proj.weight.dtype == torch.float32, "measuring must leave the layer as it was"
    layer = layer.double()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 4, 2, generator=generator, dtype=torch.float64)
    direction = F.normalize(torch.randn(32, 3, generator=generator, dtype=torch.float64))
    moved, size = x.clone(), 1e-6
    moved[:, 1, 0] += size  # the input 2 steps before the last
    moved_y, y = (layer(inputs)[0][:, -1] * direction for inputs in (moved, x))
    slopes = ((moved_y - y).sum(1) / size).abs()
    assert slopes.mean().item() <= norms[2] * (1 + 1e-4) and len(norms) == 4
    assert norms[2] < 10 * slopes.mean().item()


def test_a_bag_of_values_answers_as_counted_by_hand() -> None:
    """Two pairs: the first answer is one of two values, right once in two, or surely if they are equal (1 in 16)."""
    assert topic.bag_accuracy(1) == 1
    assert topic.bag_accuracy(2) == pytest.approx((0.5 + 0.5 / 16 + 1) / 2, abs=0.003)


def test_least_bits_by_hand() -> None:
    assert topic.least_bits(5, 1.0) == pytest.approx(5 * 4)  # 16 kinds: 4 bits each
    assert topic.least_bits(5, 1 / 16) == pytest.approx(0)
    noise = np.random.default_rng(0)  # a channel that names each symbol rightly 7 times in 10 carries what it says
    sent = noise.integers(0, 16, 400_000)
    heard = np.where(noise.random(400_000) < 0.7, sent, (sent + noise.integers(1, 16, 400_000)) % 16)
    joint = np.bincount(sent * 16 + heard, minlength=256).reshape(16, 16) / 400_000
    mutual = np.sum(joint * np.log2(joint / (joint.sum(0) * joint.sum(1)[:, None])))
    assert topic.least_bits(1, 0.7) == pytest.approx(mutual, abs=0.01)
    with pytest.raises(ValueError, match="accuracy must be finite"):
        topic.least_bits(3, 0.01)


def test_experiments_run_small() -> None:
    accuracies = topic.measure_memory(copy_batch, [1, 3], d_model=8, max_steps=2, seed=0)
    assert set(accuracies) == {"RNN", "GRU", "LSTM"} and all(len(row) == 2 for row in accuracies.values())
    assert set(topic.measure_memory(echo_batch, [2], d_model=8, max_steps=2, seed=0)) == {"seq2seq, width 8"}
    seconds = topic.measure_scan(9, batch_size=2, d_model=2, n_repeats=3, device=torch.device("cpu"))
    assert set(seconds) == {"loop", "scan"} and all(len(rounds) == 3 for rounds in seconds.values())
    text = "the cat sat on the mat. the dog sat on the log. " * 20
    config = CharacterConfig(d_model=24, batch_size=4, seq_len=16, max_steps=60, learning_rate=0.02)
    bits = topic.measure_text(text, text[:300], config, [RunConfig(device="cpu")])
    assert bits["LSTM"][0] < bits["uniform"] / 2 and bits["5-gram Kneser-Ney"] < bits["uniform"] / 2
    assert bits["xz after the training text"] < bits["xz"]


# Failures on purpose


SMALL_BREAK = LadderConfig(n_documents=600, n_eval=60, d_model=32, batch_size=8, seq_len=32, max_steps=100)


@pytest.mark.parametrize("name", ["no-shift", "pad-in-loss"])
def test_a_spoiled_loss_looks_far_better_than_the_sound_one(name) -> None:
    """With more steps both fall below the floor, which no sound loss can (the chapter's table)."""
    (_, sound, broken), (_, same, true_loss) = BREAKS[name](
        replace(SMALL_BREAK, n_documents=300, max_steps=50, learning_rate=0.06), 0
    )
    assert sound == same > 0.2 and broken < sound - 0.5 and true_loss > broken + 0.5
    assert name != "no-shift" or broken < 0 < 3 < true_loss


def test_without_clipping_a_stretching_network_is_thrown_away() -> None:
    (_, step, wild_step), _ = BREAKS["no-clip"](SMALL_BREAK, 0)
    assert step <= 1.001 and wild_step > 10


def test_without_forget_bias_the_gradient_is_gone() -> None:
    ((_, sound, broken),) = BREAKS["forget-bias"](SMALL_BREAK, 0)
    assert sound > 1e4 * broken > 0


def test_padded_batches_are_blind_to_padding_unless_told() -> None:
    world = World()
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(7, 0)
    n_tokens = sum(len(document.tokens) for document in documents)
    for break_ in ("none", "no-shift", "pad-in-loss"):
        batches = list(topic.padded_batches(documents, vocabulary, 3, break_))
        assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
        counted = sum((targets != IGNORE).sum().item() for _, targets in batches)
        assert (counted == n_tokens) == (break_ != "pad-in-loss")
        for inputs, targets in batches:
            shown = inputs if break_ == "no-shift" else F.pad(inputs[:, 1:], (0, 1))
            inside = (targets != IGNORE) & (targets != EOS_ID)
            assert torch.equal(targets[inside], shown[inside])


def test_break_is_one_flag(capsys, tmp_path) -> None:
    sequence_modeling.main(["demo", "--break", "forget-bias", "--d-model", "16", "--out", str(tmp_path)])
    assert "with --break forget-bias" in capsys.readouterr().out


# The chapter


def test_figures_writes_every_table_and_figure(tmp_path, capsys) -> None:
    (tmp_path / "verse.txt").write_text("\n\n".join(f"The cat number {n} sat on mat {n * n}." for n in range(400)))
    sizes = "--n-seeds 2 --n-documents 200 --n-eval 30 --n-samples 8 --max-steps 2 --memory-steps 2 --max-symbols 4"
    sizes += f" --text-steps 1 --data {tmp_path / 'verse.txt'}"
    flags = f"{sizes} --eval-chars 400 --max-lag 20 --scan-steps 20 --device cpu --folder {tmp_path / 'figures'}"
    sequence_modeling.main(["figures", *flags.split(), "--out", str(tmp_path)])
    results = json.loads((tmp_path / "figures" / "results.json").read_text(encoding="utf-8"))
    tables = {"kinds", "ladder", "ladder-kinds", "gradients", "copy", "recall", "bottleneck", "text", "scan", "breaks"}
    assert set(results) == tables
    assert len(results["breaks"]["rows"]) == 7 and len(results["ladder"]["rows"]) == 8
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "figures").glob("*.svg")}
    assert set(drawn) == {f"{name}.svg" for name in ("surprisal", "cells", "ladder", "gradients", "memory")}
    assert all(3_000 < size < 120_000 for size in drawn.values()), drawn
    with pytest.raises(SystemExit):
        sequence_modeling.main(["figures", "memories", "--folder", str(tmp_path / "figures")])
    assert "unknown experiment 'memories'; did you mean 'memory'? choose from data, ladder" in capsys.readouterr().err


def test_shape_comments_are_true(checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        gradient_by_lag(RNN(2, 3), 4, 0)
        topic.bag_accuracy(2, 5)
        list(topic.padded_batches(World().documents(3, 0), Vocabulary(World().vocabulary()), 2, "no-shift"))
    assert len(checked) >= 5, sorted(checked)


def test_a_run_that_diverged_is_shown_not_hidden(tmp_path, capsys) -> None:
    """A loss of thousands of nats has a perplexity beyond the largest float; the demo prints it and goes on."""
    sizes = "--max-steps 3 --n-documents 100 --n-eval 10 --n-samples 3 --d-model 8 --device cpu".split()
    sequence_modeling.main(["demo", "--learning-rate", "1e10", *sizes, "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("GRU  "))
    assert float(row[1]) > 1000 and "inf" in row
    assert (tmp_path / "ladder.svg").exists()
