"""Topic 07: the training loop against a plain PyTorch loop, torch.amp, swa_utils and itself; and what must hold."""

import copy
import dataclasses
import importlib.util
import math
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from torch import nn
from torch.nn import functional as F

import packing
import training_transformers as topic
from checkpoints import Checkpoints, check_header
from data_parallel import COLLECTIVE_TIMEOUT, Team, process_group, rank_device
from packing import BucketedBatches, EpochOrder, PackedBatches, PackedTransformer, language_model_loss, pack
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, device_of
from tiny_world import held_out, join
from training_monitors import BlockMonitor, attention_entropy, block_of, dead_units, loss_spikes
from training_transformers import (
    EMA,
    MAY_CHANGE,
    N_BYTE_IDS,
    DataConfig,
    Keeper,
    LossScaler,
    TrainConfig,
    TrainingState,
    WorldBatches,
    backward_in_parts,
    checkpoint_activations,
    clip_gradients,
    first_broken,
    fit,
    load_task,
    main,
    plot_range,
    range_test,
    train_model,
    world_losses,
)
from transformer_architecture import CausalTransformer, ModelConfig, held_out_documents, saved_bytes, tiny_world
from workbench import ROOT, RunConfig, seed_everything

VOCAB = 23
SMALL = ModelConfig(d_model=12, n_layers=3, n_heads=3, d_ff=20, max_seq_len=40)
BASIC = TrainConfig(batch_size=7, max_steps=12, warmup_steps=3, learning_rate=1e-2, log_every=1)
SCRIPT = ROOT / "07-training-transformers" / "training_transformers.py"
TINY = (
    "--d-model 8 --n-layers 1 --n-heads 2 --d-ff 12 --batch-size 2 --seq-len 16 --warmup-steps 1 --n-documents 4 "
    "--device cpu"
).split()


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> PackedTransformer:
    torch.manual_seed(seed)
    return PackedTransformer(dataclasses.replace(SMALL, **changes), VOCAB).to(dtype)


def uneven_batch(step: int, n_rows: int = 7, seq: int = 9) -> dict[str, torch.Tensor]:
    """Rows that count between none and all of their targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, VOCAB, (n_rows, seq + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(n_rows):
        targets[row, (row * 3) % (seq + 1) :] = IGNORE  # row 0 counts nothing
    return {"inputs": ids[:, :-1], "targets": targets}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# The loop against a plain one


@pytest.mark.parametrize("micro_batch_size", [0, 3, 1])
def test_the_loop_equals_a_plain_pytorch_loop(parity, micro_batch_size: int) -> None:
    """NU6: however the rows are cut, weights and losses follow the plain loop over whole batches."""
    ours, theirs = small_model(), small_model()
    config = dataclasses.replace(BASIC, micro_batch_size=micro_batch_size, grad_clip=0.7)
    rows = fit(ours, uneven_batch, language_model_loss, config)
    matrices = [p for n, p in theirs.named_parameters() if p.dim() > 1 and n != "token_emb.weight"]
    others = [p for n, p in theirs.named_parameters() if p.dim() < 2 or n == "token_emb.weight"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, BASIC.factor)
    losses, norms, rates = [], [], []
    for step in range(BASIC.max_steps):
        batch = uneven_batch(step)
        loss = F.cross_entropy(theirs(batch["inputs"]).flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 0.7).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    name, oracle = f"fit, micro-batches of {micro_batch_size or 'all'}", "a plain PyTorch loop"
    parity(name, oracle, "trajectory", [row["loss"] for row in rows], losses, 1e-10)
    parity(name, oracle, "trajectory", [row["grad_norm"] for row in rows], norms, 1e-10)
    parity(name, oracle, "trajectory", [row["learning_rate"] for row in rows], rates, 1e-15)
    parity(name, oracle, "trajectory", weights_of(ours), weights_of(theirs), 1e-10)
    assert max(norms) > 0.7 > min(norms), "some steps were clipped"


def test_accumulation_weighs_by_tokens_not_by_micro_batches(parity) -> None:
    """NU6 for one step in fp32; the mean of the micro-batches' means is another gradient."""
    model, batch = small_model(dtype=torch.float32), uneven_batch(0)
    loss, count = language_model_loss(model, batch)
    (loss / count).backward()
    whole = gradients_of(model)
    model.zero_grad()
    config = dataclasses.replace(BASIC, micro_batch_size=2)
    total, n_counted = backward_in_parts(model, batch, language_model_loss, config, 1 / int(count))
    parity("token-weighted accumulation", "one big batch", "gradient", gradients_of(model), whole, 1e-6)
    assert (total, n_counted) == (pytest.approx(loss.item(), abs=1e-4), int(count)) and config.grad_accum_steps == 4

    def mean_of_means(model: nn.Module, part: dict) -> tuple:
        loss, count = language_model_loss(model, part)
        return loss / count.clamp(min=1), 1

    model.zero_grad()
    backward_in_parts(model, batch, mean_of_means, config, 1 / 4)
    worst = max((gradients_of(model)[name] - whole[name]).norm() / whole[name].norm() for name in whole)
    assert worst > 0.1


def test_clipping_equals_torch_and_leaves_what_is_not_finite(parity) -> None:
    for seed, max_norm in ((0, 0.5), (1, 100.0)):
        generator = torch.Generator().manual_seed(seed)
        ours = [torch.randn(3, 4, generator=generator, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
        theirs = [nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
        for parameter, gradient in zip(theirs, ours, strict=True):
            parameter.grad = gradient.clone()
        norms = clip_gradients(ours, max_norm), nn.utils.clip_grad_norm_(theirs, max_norm).item()
        parity("clip_gradients", "nn.utils.clip_grad_norm_", "output", *norms, 1e-10)
        parity("clip_gradients", "nn.utils.clip_grad_norm_", "gradient", ours, [p.grad for p in theirs], 1e-10)
    broken = [torch.tensor([1.0, math.inf]), torch.ones(2)]
    assert clip_gradients(broken, 1.0) == math.inf and broken[1].tolist() == [1, 1]
    assert clip_gradients([], 1.0) == 0.0


# Mixed precision


def test_the_loss_scale_follows_torch_amp(parity) -> None:
    ours, weight = LossScaler(2.0**10, growth_interval=3), nn.Parameter(torch.ones(2))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scales = {"ours": [], "theirs": []}
    generator = torch.Generator().manual_seed(0)
    for index, overflow in enumerate((torch.rand(60, generator=generator) < 0.25).tolist()):
        if index == 31:  # in the middle of a row of good steps: a resumed run counts on
            state, ours = ours.state_dict(), LossScaler(growth_interval=3)
            assert state["n_good"]
            ours.load_state_dict(state)
        weight.grad = torch.full((2,), math.inf if overflow else 1.0)
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        scales["ours"].append(ours.scale)
        scales["theirs"].append(theirs.get_scale())
    parity("LossScaler", "torch.amp.GradScaler", "trajectory", scales["ours"], scales["theirs"], 0.0)
    assert len(set(scales["ours"])) > 4
    ours = LossScaler(2.0**126, growth_interval=1)
    for _ in range(4):
        ours.update(overflow=False)
    assert ours.scale == 2.0**127  # as there: twice that is no float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossScaler(0.0), "scale must be finite and > 0, got 0"),
        (lambda: LossScaler(growth_factor=1.0), "growth_factor must be finite and > 1, got 1"),
        (lambda: LossScaler(backoff_factor=2.0), "backoff_factor must be finite and > 0 and < 1, got 2"),
        (lambda: EMA(nn.Linear(3, 2), math.nan), "decay must be finite and >= 0 and <= 1, got nan"),
        (lambda: EMA(nn.Linear(3, 2), 0.9).update(nn.Linear(4, 2)), "other weights than the one that the average"),
        (lambda: EMA(nn.Linear(3, 2), 0.9).update(nn.ReLU()), "other weights than the one that the average"),
        (lambda: clip_gradients([torch.ones(2)], -1.0), r"max_norm must be >= 0, got -1\.0"),
        (lambda: clip_gradients([torch.ones(2)], math.nan), "max_norm must be >= 0, got nan"),
        (lambda: PackedBatches([[1, 2]], 0, 2, 0), "batch_size must be finite and >= 1, got 0"),
        (lambda: PackedBatches([[1, 2]], 1, 0, 0), "seq_len must be finite and >= 1, got 0"),
        (lambda: PackedBatches([[1, 2]], 1, 2, 0)(-1), "steps count from 0, got -1"),
        (lambda: BucketedBatches([[1, 2]], 1, 0, 0), "pool_size must be finite and >= 1, got 0"),
        (lambda: loss_spikes([1.0, 2.0], 0), "window must be finite and >= 1, got 0"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_average_takes_its_decay_from_the_state() -> None:
    average = EMA(nn.Linear(3, 2), 0.5)
    average.load_state_dict(EMA(nn.Linear(3, 2), 0.9).state_dict())
    assert average.decay == 0.9
    assert BucketedBatches([[], []], 2, 0)(0)["inputs"].dtype == torch.int64


def test_fp16_finds_its_scale_and_learns_what_fp32_learns() -> None:
    config = dataclasses.replace(BASIC, max_steps=40)
    plain, half = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
    expected = fit(plain, lambda step: uneven_batch(0), language_model_loss, config)
    rows = fit(half, lambda step: uneven_batch(0), language_model_loss, dataclasses.replace(config, dtype="fp16"))
    assert all(row["loss_scale"] == 2.0 ** (16 - row["n_skipped"]) for row in rows) and rows[-1]["n_skipped"] < 8
    assert expected[-1]["loss"] < expected[0]["loss"] - 1.0
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=0.3)


def test_an_fp16_overflow_lowers_the_scale_and_ends_the_run_only_at_its_end(capsys) -> None:
    """Sixteen halvings bring the scale to 1; only then is a gradient that overflows the model's own fault."""
    model, name = small_model(dtype=torch.float32), "lm_head.weight"
    config = dataclasses.replace(BASIC, dtype="fp16", max_steps=40, max_skipped_steps=3)
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"at step 19 .*first in {name}.*; 3 steps in a row had to be skipped"):
        fit(model, uneven_batch, poisoned_loss(set(range(40)), in_gradient=name), config)
    assert capsys.readouterr().err.count("warning") == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bf16_stays_near_fp32_and_keeps_the_weights_in_fp32() -> None:
    plain, half = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
    expected = fit(plain, uneven_batch, language_model_loss, BASIC)
    rows = fit(half, uneven_batch, language_model_loss, dataclasses.replace(BASIC, dtype="bf16"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    differences = [abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(rows, expected, strict=True)]
    assert 1e-5 < max(differences) < 0.05, "other products, the same training"


# Activation checkpointing and the average


def test_checkpointed_gradients_are_equal_and_need_less_memory(parity) -> None:
    plain = small_model(dropout=0.2)
    thrifty, batch = copy.deepcopy(plain), uneven_batch(1)
    assert checkpoint_activations(thrifty) == 3
    once = thrifty.encoder.blocks[0].forward
    assert checkpoint_activations(thrifty) == 3 and thrifty.encoder.blocks[0].forward is once, "no third pass"
    for model in (plain, thrifty):
        torch.manual_seed(3)
        language_model_loss(model, batch)[0].backward()
    parity(
        "checkpoint_activations", "all activations kept", "gradient", gradients_of(thrifty), gradients_of(plain), 0.0
    )
    assert thrifty.state_dict().keys() == plain.state_dict().keys()
    kept = {model: saved_bytes(model, batch["inputs"]) for model in (plain, thrifty)}
    assert kept[thrifty] < 0.4 * kept[plain]
    twin = copy.deepcopy(thrifty)
    with torch.no_grad():
        twin.encoder.blocks[0].ffn.down_proj.weight.zero_()
    twin.eval(), thrifty.eval()
    assert not torch.equal(twin(batch["inputs"]), thrifty(batch["inputs"])), "a copy computes with its own weights"
    with pytest.raises(ValueError, match="no nn.ModuleList called 'blocks'"):
        checkpoint_activations(nn.Linear(2, 2))


def test_the_average_equals_torch_swa_utils(parity) -> None:
    model = small_model()
    ours = EMA(model, 0.8)
    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(7):
        optimizer.zero_grad()
        language_model_loss(model, uneven_batch(step))[0].backward()
        optimizer.step()
        ours.update(model)
        theirs.update_parameters(model)
    parity("EMA", "torch.optim.swa_utils.AveragedModel", "trajectory", ours.weights, weights_of(theirs.module), 1e-12)
    raw = weights_of(model)
    with ours.applied(model):
        parity("EMA applied", "its own weights", "invariant", weights_of(model), ours.weights, 0.0)
    parity("EMA taken back", "the weights before", "invariant", weights_of(model), raw, 0.0)
    with pytest.raises(RuntimeError, match="half-way"), ours.applied(model):
        raise RuntimeError("half-way")
    assert all(torch.equal(raw[name], tensor) for name, tensor in model.state_dict().items()), "taken back all the same"
    counting = nn.BatchNorm1d(3)  # a whole number among its buffers: copied, not averaged
    average = EMA(counting, 0.5)
    for _ in range(3):
        counting(torch.randn(4, 3))
        average.update(counting)
    assert average.weights["num_batches_tracked"] == 3


def test_a_run_with_an_average_examines_it_and_ends_with_it(tmp_path, parity) -> None:
    model, seen = small_model(), []

    def remember(model: nn.Module) -> dict[str, float]:
        seen.append(weights_of(model))
        return {}

    config = dataclasses.replace(BASIC, ema_decay=0.5, eval_every=6)
    fit(model, uneven_batch, language_model_loss, config, out=tmp_path, evaluate=remember)
    parts = Checkpoints(tmp_path).load()
    parity(
        "fit with an average",
        "the average in the checkpoint",
        "exchange",
        weights_of(model),
        parts["ema"]["weights"],
        0,
    )
    parity("evaluation with an average", "the average", "invariant", seen[-1], parts["ema"]["weights"], 0)
    assert len(seen) == 2 and not torch.equal(parts["model"]["lm_head.weight"], model.lm_head.weight)


# Steps that are skipped


def poisoned_loss(at: set[int], value: float = math.nan, in_gradient: str = ""):
    """language_model_loss, but the loss, or only the gradient of one parameter, is not finite at some steps."""
    calls = iter(range(10**6))

    def loss_fn(model: nn.Module, batch: dict) -> tuple:
        loss, count = language_model_loss(model, batch)
        if next(calls) in at:
            if not in_gradient:
                return loss * value, count
            parameter = dict(model.named_parameters())[in_gradient]
            loss = loss + (parameter.flatten()[0] * 0).sqrt()  # finite, its slope at 0 is not
        return loss, count

    return loss_fn


@pytest.mark.parametrize("in_gradient", ["", "encoder.blocks.1.ffn.up_proj.weight"])
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, parity, capsys, in_gradient: str) -> None:
    """NU4: the run with a poisoned step is the run in which the batch of that step never came."""
    poisoned, clean = small_model(), small_model()
    config = dataclasses.replace(BASIC, max_steps=6, schedule="constant", warmup_steps=0)
    rows = fit(poisoned, uneven_batch, poisoned_loss({3}, in_gradient=in_gradient), config, out=tmp_path)
    fit(
        clean,
        lambda step: uneven_batch(step + (step >= 3)),
        language_model_loss,
        dataclasses.replace(config, max_steps=5),
    )
    parity("skipped step", "a run without that batch", "trajectory", weights_of(poisoned), weights_of(clean), 0.0)
    assert [row["n_skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    warning = capsys.readouterr().err
    assert "at step 4 (gradient norm nan, first in" in warning and "the step is skipped" in warning
    assert in_gradient in warning


def test_a_run_that_diverged_ends_with_step_and_parameter_and_keeps_its_checkpoint(tmp_path, capsys) -> None:
    """NU4: weights bitwise those of before, the checkpoint of before remains."""
    config = dataclasses.replace(BASIC, max_steps=30, save_every=4, max_skipped_steps=3)
    model, name = small_model(), "encoder.blocks.1.ffn.up_proj.weight"
    with pytest.raises(ValueError) as ended:
        fit(model, uneven_batch, poisoned_loss(set(range(5, 30)), in_gradient=name), config, out=tmp_path)
    assert "at step 8" in str(ended.value) and f"first in {name}" in str(ended.value)
    assert "3 steps in a row had to be skipped; lower --learning-rate" in str(ended.value)
    assert Checkpoints(tmp_path).steps() == [4] and capsys.readouterr().err.count("warning") == 2
    reference = small_model()
    fit(reference, uneven_batch, language_model_loss, config, out=tmp_path / "b", schedule=config.factor)
    assert all(p.isfinite().all() for p in model.parameters())


def test_skips_that_are_not_in_a_row_are_forgiven() -> None:
    config = dataclasses.replace(BASIC, max_skipped_steps=2)
    rows = fit(small_model(), uneven_batch, poisoned_loss({1, 3, 5, 7, 9}, math.inf), config)
    assert rows[-1]["n_skipped"] == 5 and math.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize(("factor", "more"), [(1.0, math.inf), (math.nan, 0.0)])
def test_a_loss_that_is_not_finite_is_skipped_and_is_no_overflow(capsys, factor: float, more: float) -> None:
    """Infinity as a constant leaves the gradient finite, NaN as a factor does not; the loss scale is not to blame."""

    def at_step_3(model: nn.Module, batch: dict) -> tuple:
        loss, count = language_model_loss(model, batch)
        bad = batch["targets"][-1, 0] == uneven_batch(3)["targets"][-1, 0]
        return (factor * loss + more if bad else loss), count

    config = dataclasses.replace(BASIC, max_steps=5, dtype="fp16", loss_scale=8.0)
    rows = fit(small_model(dtype=torch.float32), uneven_batch, at_step_3, config)
    assert [math.isfinite(row["loss"]) for row in rows] == [True, True, True, False, True]
    assert [row["n_skipped"] for row in rows] == [0, 0, 0, 1, 1] and {row["loss_scale"] for row in rows} == {8.0}
    assert capsys.readouterr().err.count(f"the loss is {factor * 1.0 + more} at step 4") == 1


def test_resuming_does_not_forgive_skipped_steps(tmp_path) -> None:
    """Two in a row lie before the checkpoint, the third after it."""
    config = dataclasses.replace(BASIC, save_every=5, max_skipped_steps=3)
    for resume, bad in ((False, set(range(3, 99))), (True, set(range(99)))):
        again = dataclasses.replace(config, resume=resume)
        with pytest.raises(ValueError, match="at step 6 .*; 3 steps in a row had to be skipped"):
            fit(small_model(), uneven_batch, poisoned_loss(bad), again, out=tmp_path)
        assert Checkpoints(tmp_path).steps() == [5]


def test_the_first_broken_parameter_is_named() -> None:
    model = small_model()
    language_model_loss(model, uneven_batch(0))[0].backward()
    assert first_broken(model) == "all gradients are finite"
    model.lm_head.weight.grad[2, 1] = math.inf
    assert first_broken(model) == "first in lm_head.weight"
    with torch.no_grad():
        model.encoder.final_norm.bias[3] = math.nan
    assert first_broken(model) == "the weights of encoder.final_norm.bias are not finite"


def test_a_batch_in_which_nothing_counts_is_skipped_with_loss_0(capsys) -> None:
    """NU3: no NaN from a mean over nothing."""

    def batches(step: int) -> dict:
        batch = uneven_batch(step)
        return batch | ({"targets": torch.full_like(batch["targets"], IGNORE)} if step in (2, 4) else {})

    model = small_model()
    rows = fit(model, batches, language_model_loss, BASIC)
    assert [(rows[i]["loss"], rows[i]["n_counted"], rows[i]["n_skipped"]) for i in (2, 4)] == [(0.0, 0, 1), (0.0, 0, 2)]
    assert "no token is counted at step 3; the step is skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no token is counted at step 2; 2 steps in a row had to be skipped"):
        always = lambda step: batches(2)  # noqa: E731
        fit(model, always, language_model_loss, dataclasses.replace(BASIC, max_skipped_steps=2))


# Going on, and what must not matter


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9, "dtype": "fp16"}, {"optimizer": "muon"}, {"monitor": True}])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, parity, changes: dict) -> None:
    config = dataclasses.replace(BASIC, save_every=5, keep_last=9, log_every=2, eval_every=4, **changes)

    def train(folder: str, resume: bool = False, **more) -> PackedTransformer:
        seed_everything(1)
        model = small_model(dtype=torch.float32, dropout=0.1)
        fit(
            *(model, uneven_batch, language_model_loss, dataclasses.replace(config, resume=resume, **more)),
            out=tmp_path / folder,
            header={"data": "made up"},
            evaluate=lambda model: {"norm": model.lm_head.weight.norm().item(), "luck": torch.rand(()).item()},
        )
        return model

    whole = train("a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for later in (12, 10):
        Checkpoints(tmp_path / "b").remove(later)
    resumed = train("b", resume=True, save_every=3, keep_last=2)
    parity("resume", "an uninterrupted run", "trajectory", weights_of(resumed), weights_of(whole), 0.0)
    assert (tmp_path / "a" / "log.csv").read_bytes() == (tmp_path / "b" / "log.csv").read_bytes()
    ends = [Checkpoints(tmp_path / name).load(("run", "optimizer")) for name in "ab"]
    for end in ends:
        end["run"].pop("header")
    parity("resume", "an uninterrupted run", "invariant", *ends, 0.0)
    with pytest.raises(ValueError, match=r"train_config.learning_rate was 0.01, is 0.02"):
        train("b", resume=True, learning_rate=0.02)
    with pytest.raises(ValueError, match="has checkpoints of an earlier run, up to step 12; go on with --resume"):
        train("b")


class Stream:
    """An outside stream: it remembers where it is."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        self.position += 1
        return uneven_batch(self.position)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def test_an_iterator_can_resume_if_it_keeps_its_state(tmp_path, parity) -> None:
    config = dataclasses.replace(BASIC, save_every=5, keep_last=9)
    whole, stopped = small_model(), small_model()
    fit(whole, Stream(), language_model_loss, config, out=tmp_path)
    Checkpoints(tmp_path).remove(12)
    fit(stopped, Stream(), language_model_loss, dataclasses.replace(config, resume=True), out=tmp_path)
    parity("resume of a stream", "an uninterrupted run", "trajectory", weights_of(stopped), weights_of(whole), 0.0)
    with pytest.raises(ValueError, match="an iterator without load_state_dict cannot resume"):
        fit(stopped, iter([]), language_model_loss, dataclasses.replace(config, resume=True), out=tmp_path)
    with pytest.raises(ValueError, match="the data ended after 2 batches; lower max_steps or give more"):
        fit(small_model(), iter([uneven_batch(0), uneven_batch(1)]), language_model_loss, config)


def test_evaluation_and_logging_leave_no_trace_in_the_training(parity) -> None:
    def meddle(model: nn.Module) -> dict[str, float]:
        assert not model.training
        seed_everything(99)
        torch.rand(5)
        return {"held_out": 1.0}

    models = []
    for changes in ({}, {"eval_every": 3, "monitor": True, "log_every": 5}):
        seed_everything(4)
        model = small_model(dropout=0.3)
        config = dataclasses.replace(BASIC, **changes)
        fit(model, uneven_batch, language_model_loss, config, evaluate=meddle if changes else None)
        models.append(weights_of(model))
    parity("training with evaluation", "training without", "trajectory", *models, 0.0)


def test_compiled_training_is_the_same(parity) -> None:
    plain, compiled = small_model(), small_model()
    config = dataclasses.replace(BASIC, max_steps=3)
    fit(plain, uneven_batch, language_model_loss, config)
    fit(compiled, uneven_batch, language_model_loss, dataclasses.replace(config, compile="eager"))
    parity("compiled training", "eager training", "trajectory", weights_of(compiled), weights_of(plain), 1e-10)


def test_a_budget_ends_the_run_and_carries_the_schedule_to_its_end() -> None:
    config = dataclasses.replace(BASIC, budget=0.3, clock="cpu", min_lr_ratio=0.0)
    rows = fit(small_model(), uneven_batch, language_model_loss, config, evaluate=lambda model: {"seen": 1.0})
    rates = [row["learning_rate"] for row in rows]
    assert len(rows) > 12, "max_steps is no limit here"
    assert rates[-1] < 0.2 * BASIC.learning_rate and max(rates) > 0.9 * BASIC.learning_rate and "seen" in rows[-1]
    with pytest.raises(ValueError, match="a run with a time budget cannot resume"):
        dataclasses.replace(config, resume=True)


def test_what_may_change_in_a_resumed_run_is_what_cannot_change_its_numbers() -> None:
    settings = dataclasses.asdict(BASIC)
    free = {"resume", "save_every", "keep_last", "tensorboard", "micro_batch_size", "checkpoint_activations", "compile"}
    for name in settings:
        headers = [{"seed": 0, "train_config": settings | {name: value}} for value in ("one", "two")]
        if name in free:
            check_header(*headers, MAY_CHANGE)
        else:
            with pytest.raises(ValueError, match=f"train_config.{name} was 'one', is 'two'"):
                check_header(*headers, MAY_CHANGE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_clip": -1.0}, "grad_clip must be finite and >= 0, got -1.0"),
        ({"budget": -1.0}, "budget must be finite and >= 0, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and >= 0, got inf"),
        ({"loss_scale": 0.0}, "loss_scale must be finite and > 0, got 0.0"),
        ({"beta1": 1.0}, "beta1 must be finite and >= 0 and < 1, got 1.0"),
        ({"eval_every": -1}, "eval_every must be finite and >= 0, got -1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be >= 0 and <= 1, got 1.5"),
        ({"warmup_steps": 20}, "warmup_steps=20 and cooldown_steps=0 .* max_steps=12"),
    ],
)
def test_settings_are_refused_before_anything_is_read(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASIC, **changes)


def test_small_promises_of_the_loop(tmp_path, monkeypatch) -> None:
    """Which steps are logged; dropout for a model that came in eval mode; one optimizer for two runs; signals."""
    model, modes, handlers = small_model().eval(), set(), set()

    def watched_batch(step: int) -> dict:
        modes.add(model.training)
        handlers.add(signal.getsignal(signal.SIGTERM))
        return uneven_batch(step)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config, before = dataclasses.replace(BASIC, log_every=5), signal.getsignal(signal.SIGTERM)
    first, second = (fit(model, watched_batch, language_model_loss, config, optimizer=optimizer) for _ in range(2))
    assert [row["step"] for row in first] == [5, 10, 12] and modes == {True}
    assert [row["learning_rate"] for row in first] == [row["learning_rate"] for row in second]
    assert handlers == {before}, "with nothing to save, a signal ends the run at once"

    thrifty = dataclasses.replace(BASIC, checkpoint_activations=True, max_steps=1, warmup_steps=0)
    fit(model, uneven_batch, language_model_loss, thrifty)
    assert all(hasattr(block.forward, "keywords") for block in model.encoder.blocks), "wrapped"

    def told_to_stop(step: int) -> dict:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return uneven_batch(step)

    last = dataclasses.replace(BASIC, max_steps=4, warmup_steps=1)
    rows = fit(small_model(), told_to_stop, language_model_loss, last, out=tmp_path)
    assert len(rows) == 4 and Checkpoints(tmp_path).steps() == [4], "a run that is over need not be stopped"
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(Team, "here", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(ValueError, match="a time budget needs one process, there are 2"):
        fit(model, uneven_batch, language_model_loss, dataclasses.replace(BASIC, budget=1.0))


# Several processes


def sometimes_two_rows(step: int) -> dict[str, torch.Tensor]:
    """At step 5 only the second row counts something: one process has a gradient, the others none."""
    return uneven_batch(step, 2 if step == 5 else 7)


def test_each_process_goes_on_with_its_own_random_numbers(tmp_path) -> None:
    fit(small_model(), uneven_batch, language_model_loss, dataclasses.replace(BASIC, max_steps=3), out=tmp_path)
    parts = Checkpoints(tmp_path).load()
    step, states = parts.pop("step"), []
    for seed in (8, 9):
        seed_everything(seed)
        states.append(topic.rng_state())
    parts["run"]["rng"] = states
    Checkpoints(tmp_path).save(step, parts)
    model, config = small_model(), dataclasses.replace(BASIC, max_steps=3, resume=True)
    state = TrainingState(model, topic.build_optimizer(model, "adamw", 0.01), config)
    with Keeper(tmp_path, config, {}, Team(1, 2)) as keeper:
        keeper.start(state, uneven_batch)
    assert torch.equal(torch.get_rng_state(), states[1]["torch"]) and state.step == 3


def member(rank: int, size: int, folder: Path) -> None:
    """One process of a team: train with gloo, found through a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", meeting, COLLECTIVE_TIMEOUT, world_size=size, rank=rank)
    model = small_model(seed=rank)  # rank 0's weights count
    model.token_emb.weight.requires_grad_(False)
    extra = nn.Linear(3, 2).double()
    model.add_module("unused", extra)  # no process has a gradient for it
    config = dataclasses.replace(BASIC, micro_batch_size=2)
    fit(model, sometimes_two_rows, language_model_loss, config, out=folder / "run")
    torch.save(weights_of(model), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_train_as_one(tmp_path, parity, size: int) -> None:
    context = torch.multiprocessing.start_processes(
        member, args=(size, tmp_path), nprocs=size, start_method="fork", join=False
    )
    deadline = time.monotonic() + 60
    while not context.join(timeout=1):
        assert time.monotonic() < deadline, "the processes did not finish"
    alone = small_model(seed=0)
    alone.token_emb.weight.requires_grad_(False)
    alone.add_module("unused", nn.Linear(3, 2).double())
    expected = fit(alone, sometimes_two_rows, language_model_loss, BASIC)
    rows = topic.CsvLog(tmp_path / "run" / "log.csv", BASIC.max_steps).rows
    name, oracle = f"data parallel, {size} processes", "one process"
    parity(name, oracle, "trajectory", [row["loss"] for row in rows], [row["loss"] for row in expected], 1e-6)
    states = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]
    trained = {key: tensor for key, tensor in weights_of(alone).items() if not key.startswith("unused")}
    parity(name, oracle, "trajectory", {key: states[0][key] for key in trained}, trained, 1e-5)
    parity(name, "each other", "invariant", states[1:], states[:1] * (size - 1), 0.0)
    saved = Checkpoints(tmp_path / "run").load()
    assert saved["step"] == 12 and len(saved["run"]["rng"]) == size
    assert not torch.equal(saved["run"]["rng"][0]["torch"], saved["run"]["rng"][1]["torch"]), "dropout of its own"


@pytest.mark.usefixtures("forks")
def test_torchrun_trains_with_two_processes(tmp_path, capfd) -> None:
    """The smoke test of the whole path: torchrun, gloo, the command line, one log and one set of checkpoints.

    Torchrun in this process, its two forked from it, so that none has to import PyTorch again.
    """
    arguments = [*TINY, "--max-steps", "4", "--out", str(tmp_path / "two")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--nproc-per-node", "2", "--master-port", port, "--run-path", "--start-method", "fork"]
    handlers = {signum: signal.getsignal(signum) for signum in (1, 2, 3, 15)}
    torch.distributed.run.main([*options, str(SCRIPT), "train", *arguments])
    for signum, handler in handlers.items():  # torchrun takes them over for good
        signal.signal(signum, handler)
    assert capfd.readouterr().out.count("above the entropy floor") == 1, "rank 0 alone speaks"
    main(["train", *arguments[:-1], str(tmp_path / "one")])
    logs = [topic.CsvLog(tmp_path / name / "log.csv", 4).rows[-1] for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5) and logs[0]["n_counted"] == logs[1]["n_counted"]


@pytest.mark.parametrize(
    ("name", "n_gpus", "expected"),
    [("auto", 2, "cuda:1"), ("cuda", 3, "cuda:1"), ("cpu", 2, "cpu"), ("auto", 1, "cpu"), ("auto", 0, "cpu")],
)
def test_each_process_has_a_gpu_of_its_own_or_all_use_the_cpu(monkeypatch, name: str, n_gpus: int, expected) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    for variable, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    assert str(rank_device(name)) == expected
    monkeypatch.delenv("LOCAL_RANK")
    assert str(rank_device("cpu")) == "cpu"


def test_more_processes_than_gpus_are_refused_where_a_gpu_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variable, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="2 processes need a GPU each, this machine has 1; use --nproc-per-node 1 or"):
        rank_device("cuda")


def test_a_batch_goes_to_where_the_model_is() -> None:
    model = small_model().to("meta")
    loss, _ = language_model_loss(model, {"inputs": torch.tensor([[5, 6]]), "targets": torch.tensor([[6, 7]])})
    assert loss.is_meta


def test_a_team_needs_torchruns_variables(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is set but .*MASTER_ADDR.* is not; start"), process_group():
        pass
    assert Team.here() == Team(0, 1)


# Batches


def some_documents(n: int = 40, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest, (n,), generator=generator).tolist()
    return [[BOS_ID, *torch.randint(4, VOCAB, (k,), generator=generator).tolist(), EOS_ID] for k in lengths]


def test_packed_rows_hold_every_document_once_and_little_else() -> None:
    documents = some_documents()
    batches = PackedBatches(documents, batch_size=3, seq_len=16, seed=0)
    for epoch in (0, 1):
        found, n_real, n_positions = [], 0, 0
        for index in range(batches.order.n_batches):
            batch = batches(epoch * batches.order.n_batches + index)
            n_real += int((batch["targets"] != IGNORE).sum())
            n_positions += batch["targets"].numel()
            for inputs, targets, ids in zip(
                *(batch[name] for name in ("inputs", "targets", "document_ids")), strict=True
            ):
                for number in range(1, int(ids.max()) + 1):
                    where = ids == number
                    found.append([*inputs[where].tolist(), int(targets[where][-1])])
                    assert inputs[where][1:].tolist() == targets[where][:-1].tolist()
        pieces = [d[start : start + 17] for d in documents for start in range(0, len(d) - 1, 16)]
        assert sorted(found) == sorted(pieces)
        assert n_real == sum(len(document) - 1 for document in documents) and n_real / n_positions > 0.9
    assert not torch.equal(batches(0)["inputs"], batches(batches.order.n_batches)["inputs"]), "another order each epoch"
    again = PackedBatches(documents, batch_size=3, seq_len=16, seed=0)
    assert torch.equal(again(7)["inputs"], batches(7)["inputs"]), "a function of seed and step"


def test_packing_by_hand() -> None:
    rows = pack([[1] * n for n in (3, 6, 4, 4, 2)], seq_len=6)  # they take 2, 5, 3, 3 and 1 positions
    assert sorted(sorted(len(piece) - 1 for piece in row) for row in rows) == [[1, 5], [2], [3, 3]]


def test_packed_documents_have_the_loss_and_gradients_of_separate_ones(parity) -> None:
    documents, model = some_documents(12, 13), small_model()
    batches = PackedBatches(documents, batch_size=1, seq_len=14, seed=0)
    totals, gradients = [], []
    for parts in (
        [batches(step) for step in range(batches.order.n_batches)],
        [{"inputs": torch.tensor([d[:-1]]), "targets": torch.tensor([d[1:]])} for d in documents],
    ):
        model.zero_grad()
        results = [language_model_loss(model, part) for part in parts]
        sum(loss for loss, _ in results).backward()
        totals.append([sum(loss for loss, _ in results).item(), sum(int(count) for _, count in results)])
        gradients.append(gradients_of(model))
    assert batches.order.n_batches < len(documents)
    parity("packed documents", "separate documents", "output", *totals, 1e-10)
    parity("packed documents", "separate documents", "gradient", *gradients, 1e-10)
    packed = next(batch for batch in map(batches, range(20)) if batch["document_ids"].max() > 1)
    without = {name: packed[name] for name in ("inputs", "targets")}
    difference = language_model_loss(model, packed)[0] - language_model_loss(model, without)[0]
    assert difference.abs() > 1e-3, "without the mask, a document sees the one before"


def test_packed_model_reduces_to_its_base_class_and_refuses_added_positions(parity) -> None:
    model = small_model(dropout=0.2)
    base = CausalTransformer(dataclasses.replace(SMALL, dropout=0.2), VOCAB).double()
    base.load_state_dict(model.state_dict())
    ids = uneven_batch(0)["inputs"]
    ones, logits = torch.ones_like(ids), []
    for forward in (base, model, lambda ids: model(ids, document_ids=ones)):
        torch.manual_seed(5)  # the same units are dropped
        logits.append(forward(ids))
    parity("PackedTransformer without document_ids", "CausalTransformer", "output", logits[1], logits[0], 0.0)
    parity("PackedTransformer, one document", "CausalTransformer", "output", logits[2], logits[0], 1e-10)
    for positions in ("learned", "sinusoidal"):
        with pytest.raises(ValueError, match=f"positions={positions!r} count from the start of the row"):
            small_model(positions=positions)(ids, document_ids=ones)
    with pytest.raises(ValueError, match=f"token id {VOCAB}"):
        model(ids.masked_fill(ids == ids[0, 0], VOCAB), document_ids=ones)
    with pytest.raises(ValueError, match="leave out document_ids or the caches"):
        model(ids, model.new_caches(), ones)
    assert language_model_loss(model.bfloat16(), uneven_batch(0))[0].dtype == torch.float32, "sums need more bits"


def test_buckets_hold_every_document_once_with_less_padding() -> None:
    documents = some_documents()
    shares = {}
    for pool_size in (1, 5):
        batches = BucketedBatches(documents, 4, seed=1, pool_size=pool_size)
        epoch = [batches(step) for step in range(batches.order.n_batches)]
        rows = [row[row != IGNORE].tolist() for batch in epoch for row in batch["targets"]]
        assert sorted(rows) == sorted(document[1:] for document in documents)
        shares[pool_size] = sum(map(len, rows)) / sum(batch["targets"].numel() for batch in epoch)
        assert all(
            torch.equal(
                batch["inputs"][:, 1:][batch["targets"][:, :-1] != IGNORE],
                batch["targets"][:, :-1][batch["targets"][:, :-1] != IGNORE],
            )
            for batch in epoch
        )
    assert shares[5] > 0.85 > shares[1] + 0.1
    one_pool = BucketedBatches(documents, 4, seed=1, pool_size=10)
    widths = [one_pool(step)["targets"].shape[1] for step in range(10)]
    assert widths != sorted(widths), "short and long batches take turns"
    with pytest.raises(ValueError, match=r"batch_size=41 is more than the data has rows \(40\)"):
        BucketedBatches(documents, 41, seed=1)
    assert len(BucketedBatches(documents, 40, seed=1)(0)["inputs"]) == 40


def test_the_batches_of_the_world_depend_on_seed_and_step_alone() -> None:
    config = TrainConfig(batch_size=3, seq_len=20)
    first, again, other = WorldBatches(config, 0), WorldBatches(config, 0), WorldBatches(config, 1)
    later = [first(step) for step in (5, 6)]
    assert torch.equal(again(6)["inputs"], later[1]["inputs"]) and torch.equal(again(5)["targets"], later[0]["targets"])
    assert not torch.equal(later[0]["inputs"], later[1]["inputs"])
    assert not torch.equal(other(5)["inputs"], later[0]["inputs"])
    assert not torch.equal(other(5)["inputs"], later[1]["inputs"]), "no seed repeats the steps of another"
    rows = [row for step in range(10) for row in WorldBatches(TrainConfig(seq_len=64), 0)(step)["inputs"].tolist()]
    texts = [join(tiny_world()[1].decode(row[1 : row.index(EOS_ID)])) for row in rows if EOS_ID in row]
    assert len(texts) > 60 and not any(map(held_out, texts)), "nothing of the other side"
    order = EpochOrder(10, 4, seed=0)
    assert sorted(order(0) + order(1) + order(2)) == list(range(10)) != order(3) + order(4) + order(5)
    assert EpochOrder(10, 4, seed=1)(0) != order(0)


def test_shape_comments_are_true(checked_shapes) -> None:
    with checked_shapes(packing) as checked:
        batch = PackedBatches(some_documents(), 3, 16, 0)(0)
        language_model_loss(small_model(), batch)
        BucketedBatches(some_documents(), 3, 0)(0)
    assert len(checked) == 8


# Monitors


def test_block_norms_add_up_and_updates_are_relative(parity) -> None:
    model = small_model()
    language_model_loss(model, uneven_batch(0))[0].backward()
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    monitor = BlockMonitor(model)
    parity("block norms", "nn.utils.get_total_norm", "output", math.hypot(*monitor.gradients.values()), total, 1e-5)
    model.zero_grad()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if name.startswith("encoder.blocks.1.") else 1.0)
    report = monitor.report(model)
    moved = {name: value for name, value in report.items() if name.startswith("update_ratio")}
    assert moved.pop("update_ratio encoder.blocks.1") == pytest.approx(0.5, abs=1e-6) and not any(moved.values())
    assert all(report[f"grad_norm {block}"] > 0 for block in ("token_emb", "encoder.blocks.0", "encoder.final_norm"))
    assert block_of("encoder.blocks.12.ffn.up_proj.weight") == "encoder.blocks.12" and block_of("gain") == "gain"


def test_attention_entropy_between_uniform_and_one_key(parity) -> None:
    model, ids = small_model(), uneven_batch(0)["inputs"]
    sharp, even = model.encoder.blocks[0].self_attn, model.encoder.blocks[2].self_attn
    with torch.no_grad():
        even.q_proj.weight.zero_(), even.q_proj.bias.zero_()
        sharp.q_proj.weight.mul_(1e4)
    model.train()
    entropies = attention_entropy(model, ids)
    uniform = sum(math.log(i + 1) for i in range(9)) / 9
    parity(
        "attention_entropy, equal scores",
        "mean of ln(i + 1)",
        "output",
        entropies["encoder.blocks.2.self_attn"],
        uniform,
        1e-10,
    )
    assert entropies["encoder.blocks.0.self_attn"] < 0.1 < entropies["encoder.blocks.1.self_attn"] < uniform
    assert model.training
    attention_entropy(model.eval(), ids)
    assert not model.training, "as it was"


def test_dead_units_are_counted() -> None:
    model, ids = small_model(), uneven_batch(0)["inputs"]
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.ffn.up_proj.bias.fill_(100.0)
        model.encoder.blocks[1].ffn.up_proj.bias[:5] = -100.0
        mixed = model.encoder.blocks[2].ffn.up_proj  # a unit that repeats a normalised feature: below 0 at some places
        mixed.weight[0], mixed.bias[0] = torch.eye(12)[0], 0.0
    assert list(dead_units(model, ids).values()) == [0.0, 0.25, 0.0]


def test_loss_spikes_are_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (3 - torch.arange(200) / 100 + 0.05 * torch.randn(200, generator=generator)).tolist()
    assert loss_spikes(losses) == []
    losses[90], losses[150], losses[160] = losses[90] + 1, math.nan, losses[160] + 1
    assert loss_spikes(losses) == [90, 150, 160], "a value that is not finite does not blind the window behind it"
    even = [1.0, 2.0] * 12  # median 1.5, distance 0.5: a spike begins above 1.5 + 6 * 1.4826 * 0.5 = 5.948
    assert loss_spikes([*even, 5.94], window=24) == [] and loss_spikes([*even, 5.96], window=24) == [24]
    assert loss_spikes([2.0] * 25 + [2.011]) == [] and loss_spikes([2.0] * 25 + [2.013]) == [25]  # 6 thousandths


# The range test, the command line


def test_the_range_test_finds_a_rate_below_the_one_that_breaks() -> None:
    torch.manual_seed(0)
    target = torch.randn(4, 1)

    def batches(step: int) -> dict:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        return {"x": x, "y": x @ target}

    def squared(model: nn.Module, batch: dict) -> tuple:
        return (model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"])

    model = nn.Linear(4, 1)
    before = weights_of(model)
    config = TrainConfig(max_steps=120, warmup_steps=0, optimizer="sgd", grad_clip=0, weight_decay=0, batch_size=32)
    rates, losses, suggested = range_test(model, batches, squared, config, 1e-4, 10.0)
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(10.0)
    assert 0.03 < suggested < 0.5, "plain gradient descent on this bowl breaks near 1"
    assert losses[-1] > 100 * min(losses) and weights_of(model).keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(plot_range(rates, losses, suggested).axes) == 1
    with pytest.raises(ValueError, match="0 < lowest < highest, got 1.0 and 0.1"):
        range_test(model, batches, squared, config, 1.0, 0.1)
    _, losses, suggested = range_test(model, batches, squared, config, 1e-4, 1e30)
    assert losses.count(math.inf) > 10 and math.nan not in losses and suggested < 1, "overflows do not end it"


def test_one_lucky_batch_does_not_choose_the_rate() -> None:
    """Losses told in advance: a dip of one step, then a broad valley whose smoothed loss is lowest at its end."""
    told = [1.0] * 10 + [0.3] + [1.0] * 10 + [0.5] * 6 + [2.0] * 12 + [math.nan]

    def batches(step: int) -> dict:
        return {"loss": torch.tensor([told[step]])}

    def as_told(model: nn.Module, batch: dict) -> tuple:
        return batch["loss"].sum() + 0 * model.weight.sum(), 1

    config = TrainConfig(max_steps=40, warmup_steps=0, batch_size=1)
    rates, losses, suggested = range_test(nn.Linear(1, 1), batches, as_told, config, 1e-4, 1.0)
    assert losses[:-1] == pytest.approx(told[:-1]) and losses[-1] == math.inf, "no number is the worst of all"
    assert suggested == rates[26] / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size must be finite and >= 1, got 0"),
        (["--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
        (["--max-steps", "-1"], "max_steps must be finite and >= 1, got -1"),
        (["--warmup-steps", "9", "--max-steps", "5"], "warmup_steps=9 and cooldown_steps=0 must be >= 0 and together"),
        (["--micro-batch-size", "-2"], "micro_batch_size must be finite and >= 0, got -2"),
        (["--ema-decay", "1"], "ema_decay must be finite and >= 0 and < 1, got 1"),
        (["--schedule", "wsd"], "schedule wsd needs cooldown_steps >= 1"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--seq-len", "999"], "sequence length 999 exceeds max_seq_len 256"),
        (["--budget", "5", "--resume"], "a run with a time budget cannot resume"),
        (["--resume"], "no checkpoint in"),
        (["--data", "empty.txt"], "empty.txt: no text in this file"),
        (["--checkpoint-activations", "--compile", "nonsense"], "nonsense"),
    ],
)
def test_bad_flags_give_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(["train", *TINY, "--max-steps", "2", "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert refused.value.code == 2 and message in error, error


def test_batches_that_do_not_fit_are_named() -> None:
    for batch, message in (
        ({"inputs": torch.ones(3, 2), "targets": torch.ones(2, 2)}, r"got \{'inputs': 3, 'targets': 2\}"),
        ({"inputs": torch.ones(0, 2)}, "at least 1, on their first axis"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(small_model(), lambda step, batch=batch: batch, language_model_loss, BASIC)


def test_train_and_evaluate_on_a_text_of_ones_own(tmp_path, capsys) -> None:
    text = "\n\n".join(f"number {n} is followed by number {n + 1}, as ever." for n in range(300))
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    arguments = ["--data", str(tmp_path / "mine.txt"), *TINY, "--d-model", "24", "--n-documents", "20"]
    arguments += ["--max-steps", "120", "--learning-rate", "1e-2", "--out", str(tmp_path / "run"), "--ema-decay", "0.8"]
    main(["train", *arguments, "--seq-len", "48", "--batch-size", "4"])
    trained = capsys.readouterr().out
    bits = float(trained.split(" bits per byte")[0].split()[-1])
    assert bits < 3.5, "far below the 8.02 of uniform guessing"
    main(["evaluate", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.startswith("step 120 of 120") and trained.splitlines()[0] in said


class Clueless(nn.Module):
    """All tokens alike."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, token_ids: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits.expand(*token_ids.shape, -1)


def test_a_model_that_knows_nothing_is_charged_ln_vocab_for_every_token(tmp_path) -> None:
    """A text is charged for its <eos> as well, and its bits are shared by its bytes."""
    texts = ["é" * 30 + f" {n}" for n in range(100)]
    (tmp_path / "mine.txt").write_text("\n\n".join(texts), encoding="utf-8")
    held = topic.load_texts(str(tmp_path / "mine.txt"), "validation")
    assert topic.byte_ids("é") == [BOS_ID, N_BYTE_IDS - 256 + 0xC3, N_BYTE_IDS - 256 + 0xA9, EOS_ID]
    task = load_task(DataConfig(str(tmp_path / "mine.txt"), n_documents=4), TrainConfig(batch_size=2), 0, 64)
    n_bytes, n_tokens = (sum(len(text.encode()) + extra for text in held[:4]) for extra in (0, 1))
    found = task.evaluate(Clueless(N_BYTE_IDS))
    assert len(held) > 4 and found["held_out"] == pytest.approx(math.log(N_BYTE_IDS), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(N_BYTE_IDS) * n_tokens / n_bytes, rel=1e-6)
    vocabulary, documents = tiny_world()[1], held_out_documents(5)
    found = world_losses(Clueless(len(vocabulary)), documents, vocabulary)
    assert found["held_out"] == pytest.approx(math.log(len(vocabulary)), rel=1e-6)


def test_the_trained_model_starts_as_the_identity(tmp_path, monkeypatch) -> None:
    """The line of the chapter's opening question."""
    monkeypatch.setattr(topic, "fit", lambda *arguments, **options: [])
    sizes = dataclasses.replace(SMALL, max_seq_len=80)
    model, _ = train_model(sizes, DataConfig(n_documents=2), TrainConfig(seq_len=16), RunConfig(out=tmp_path))
    assert not any(block.ffn.down_proj.weight.any() for block in model.encoder.blocks)
    assert not any(block.self_attn.out_proj.weight.any() for block in model.encoder.blocks)
    assert device_of(model).type in ("cpu", "cuda")


def test_the_demo_kills_a_run_and_gets_the_same_model(tmp_path, capsys) -> None:
    main(["demo", *TINY, "--max-steps", "40", "--save-every", "5", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "killed the second run; it had saved step" in said
    assert "weights bit for bit equal: True; logs byte for byte: True" in said, "in another process, with other hashes"


def test_range_and_bench_run_from_the_command_line(tmp_path, capsys) -> None:
    main(["range", *TINY, "--n-steps", "12", "--out", str(tmp_path)])
    assert "start from --learning-rate" in capsys.readouterr().out and (tmp_path / "range.svg").exists()
    sizes = "--d-model 8 --n-layers 1 --n-heads 2 --d-ff 12 --batch-size 4 --seq-len 16".split()
    main(["bench", *sizes, "--n-rounds", "1", "--n-texts", "32", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for name in ("4 micro-batches", "bf16", "checkpointed", "packed batches", "our Muon beside torch.optim's"):
        assert name in said


def test_tensorboard_gets_the_log_or_its_absence_is_explained(tmp_path) -> None:
    config = dataclasses.replace(BASIC, max_steps=3, tensorboard=True)
    if importlib.util.find_spec("tensorboard"):
        fit(small_model(), uneven_batch, language_model_loss, config, out=tmp_path)
        assert list((tmp_path / "tensorboard").glob("events.*"))
    else:
        with pytest.raises(ValueError, match="--tensorboard needs a package: pip install tensorboard"):
            fit(small_model(), uneven_batch, language_model_loss, config, out=tmp_path)
