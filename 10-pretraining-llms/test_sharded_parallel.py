"""Proofs for sharded_parallel: layers split by hand or by PyTorch train as one process; bytes are the formula's."""

import dataclasses
import math
from unittest import mock

import pytest
import torch

import sharded_parallel
from data_parallel import Team
from llm_config import ModelConfig
from llm_layers import SwiGLU
from manual_parallel import Ring, train_with
from modern_llm_architectures import CausalLM
from packing import IGNORE, Batch, language_model_loss
from process_launch import LaunchConfig, run_processes
from sharded_parallel import (
    ColumnParallelLinear,
    CopyToAll,
    RowParallelLinear,
    Sharded,
    SumOfAll,
    TensorByHand,
    check_splits,
    split_by_hand,
)
from training_cost import tensor_parallel_bytes
from training_transformers import TrainConfig, fit

MODEL = ModelConfig(56, d_model=24, n_layers=2, n_heads=8, n_kv_heads=4, d_head=6, d_ff=40, max_seq_len=32)
TRAINING = TrainConfig(max_steps=5, batch_size=8, warmup_steps=2, learning_rate=3e-3, grad_clip=0.5, log_every=1)


def uneven_batch(step: int) -> Batch:
    generator, n_rows = torch.Generator().manual_seed(step), (8, 3, 1)[step % 3]
    ids = torch.randint(0, MODEL.vocab_size, (n_rows, 13), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(n_rows):
        targets[row, row + 3 :] = IGNORE
    return {"inputs": ids[:, :-1], "targets": targets}


def fresh(seed: int, tied: bool) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(dataclasses.replace(MODEL, tie_embeddings=tied))


def alone(training: TrainConfig, tied: bool) -> tuple[list[float], list[float], dict]:
    model = fresh(0, tied)
    rows = fit(model, uneven_batch, language_model_loss, training)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights


SETTINGS = {"fsdp": {}, "tensor": {"tensor_size": 2}}
SETTINGS["fsdp+sequence+loss"] = {"tensor_size": 2, "sequence": True, "share_loss": True}


def train_all(team: Team, names: tuple[str, ...], training: TrainConfig, tied: bool) -> dict:
    results = {}
    for name in names:
        model = fresh(team.rank, tied)  # rank 0's weights count
        if name == "tensor by hand":
            scheme = TensorByHand(model, training, team)
        else:
            scheme = Sharded(model, training, team, **SETTINGS[name])
        norms: list[float] = []
        with mock.patch.object(sharded_parallel, "check_norm", lambda norm, step, norms=norms: norms.append(norm)):
            losses = train_with(scheme, uneven_batch)
        results[name] = {
            "losses": losses,
            "norms": norms,
            "weights": scheme.full_state(),
            "state": scheme.state_bytes(),
        }
        results[name]["sent"] = scheme.ring.sent if name == "tensor by hand" else 0
    return results


@pytest.mark.parametrize(
    ("size", "names", "n_steps", "tied"),
    [
        (1, ("fsdp",), 5, True),
        (2, ("tensor by hand", "fsdp"), 5, True),
        (2, ("tensor",), 3, False),
        (4, ("tensor by hand", "fsdp+sequence+loss"), 3, True),
    ],
)
def test_split_models_train_as_one_process(size: int, names: tuple, n_steps: int, tied: bool, parity) -> None:
    training = dataclasses.replace(TRAINING, max_steps=n_steps)
    losses, norms, weights = alone(training, tied)
    results = run_processes(train_all, LaunchConfig(size, timeout=120.0), names, training, tied)
    n_weights = sum(tensor.numel() for name, tensor in weights.items() if not (tied and name == "lm_head.weight"))
    for name in names:
        what = f"{name}, {size} processes"
        for result in (results[0][name], results[-1][name]):
            parity(what, "one process", "trajectory", result["losses"], losses, 1e-6)
            parity(f"{what}: norm", "one process", "gradient", result["norms"], norms, 1e-5)  # AdamW sees no scale
            parity(what, "one process", "trajectory", result["weights"], weights, 1e-5)
        if name == "tensor by hand":
            n_tokens = sum(uneven_batch(step)["inputs"].numel() for step in range(n_steps))
            expected = tensor_parallel_bytes(MODEL, n_tokens, size, 4)
            parity(f"{what}: bytes sent", "formula", "invariant", results[0][name]["sent"], expected, 0.0)
        if name.startswith("fsdp") and size > 1:
            share = results[0][name]["state"] / (8 * n_weights)
            assert 1 / size <= share < 1.1 / size, "each process keeps its part of AdamW's state"


def split_network(team: Team) -> dict:
    """A feed-forward network by f and g: output, and gradients of the input and of this process's columns."""
    torch.manual_seed(0)
    whole, ring = SwiGLU(6, 8).double(), Ring(team)
    holder = torch.nn.Module()
    holder.blocks, holder.config = [torch.nn.Module()], dataclasses.replace(MODEL, d_ff=8)
    holder.blocks[0].ffn, holder.blocks[0].self_attn = whole, torch.nn.Module()
    split_by_hand(holder, ring)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    out = holder.blocks[0].ffn(x)
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad, "up": holder.blocks[0].ffn.inner.up_proj.weight.grad, "sent": ring.sent}


def test_a_split_network_gives_the_whole_ones_gradients(parity) -> None:
    torch.manual_seed(0)
    whole = SwiGLU(6, 8).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    out = whole(x)
    out.square().sum().backward()
    for size, results in ((1, [split_network(Team())]), (2, run_processes(split_network, LaunchConfig(2)))):
        for rank, result in enumerate(results):
            parity("column and row parallel SwiGLU", "SwiGLU", "output", result["out"], out, 1e-10)
            parity("column and row parallel SwiGLU", "SwiGLU", "gradient", result["x"], x.grad, 1e-10)
            share = whole.up_proj.weight.grad.chunk(size)[rank]
            parity("column and row parallel SwiGLU", "SwiGLU", "gradient", result["up"], share, 1e-10)
            n_sent = 2 * 3 * 5 * 6 * 8 if size == 2 else 0  # an all-reduce forward, one backward, 8-byte numbers
            assert result["sent"] == n_sent


def test_shares_of_a_layer_together_are_the_layer(parity) -> None:
    whole, x = torch.nn.Linear(12, 9, bias=False).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    parts = [ColumnParallelLinear(whole, Team(rank, 3))(x) for rank in range(3)]
    parity("ColumnParallelLinear, 3 shares", "nn.Linear", "output", torch.cat(parts, dim=-1), whole(x), 1e-12)
    rows = [RowParallelLinear(whole, Ring(Team(rank, 3))) for rank in range(3)]
    terms = sum(part @ row.weight.T for part, row in zip(x.chunk(3, dim=-1), rows, strict=True))
    parity("RowParallelLinear, 3 shares", "nn.Linear", "output", terms, whole(x), 1e-12)
    whole.weight.requires_grad_(False)
    assert not ColumnParallelLinear(whole, Team(1, 3)).weight.requires_grad
    with pytest.raises(ValueError, match="got bias=True and 9 features for 3 processes"):
        ColumnParallelLinear(torch.nn.Linear(12, 9), Team(0, 3))
    with pytest.raises(ValueError, match="got bias=False and 12 features for 5 processes"):
        RowParallelLinear(whole, Ring(Team(0, 5)))


@pytest.mark.parametrize("kind", [TensorByHand, Sharded])
def test_a_batch_without_targets_and_a_gradient_without_bounds_are_refused(kind: type) -> None:
    scheme, batch = kind(fresh(0, True), TRAINING, Team()), uneven_batch(0)
    before = {name: tensor.clone() for name, tensor in scheme.full_state().items()}
    with pytest.raises(ValueError, match="no token of this batch is counted"):
        scheme.train_on({**batch, "targets": torch.full_like(batch["targets"], IGNORE)})
    next(scheme.model.parameters()).data[3] = math.inf
    with pytest.raises(ValueError, match="the gradient's norm is nan at step 1; lower --learning-rate"):
        scheme.train_on(batch)
    assert all(torch.equal(scheme.full_state()[name][-1], tensor[-1]) for name, tensor in before.items())


def test_frozen_weights_stay_as_they_are() -> None:
    for kind in (TensorByHand, Sharded):
        model = fresh(0, False)
        frozen = [model.blocks[0].ffn.up_proj.weight, model.token_emb.weight]
        for weight in frozen:
            weight.requires_grad_(False)
        scheme, before = kind(model, TRAINING, Team()), [weight.clone() for weight in frozen]
        head = model.lm_head.weight.clone()
        train_with(scheme, uneven_batch)
        after = scheme.full_state()
        kept = (after["blocks.0.ffn.up_proj.weight"], after["token_emb.weight"])
        assert all(map(torch.equal, kept, before)) and not torch.equal(after["lm_head.weight"], head)


def test_the_two_collectives_are_each_others_transpose() -> None:
    ring = Ring(Team())
    x = torch.randn(4, requires_grad=True)
    assert torch.equal(CopyToAll.apply(x, ring), x) and torch.equal(SumOfAll.apply(x, ring), x)


def too_many(team: Team) -> str:
    model = CausalLM(dataclasses.replace(MODEL, n_kv_heads=1))
    try:
        TensorByHand(model, TRAINING, team)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_cannot_be_split_is_refused() -> None:
    for message in run_processes(too_many, LaunchConfig(2)):
        assert message.startswith("n_kv_heads=1 cannot be split over 2 tensor-parallel processes; repeat key-value")
    with pytest.raises(ValueError, match="vocab_size=57 cannot be split over 4"):
        check_splits(dataclasses.replace(MODEL, vocab_size=57), 4)
    with pytest.raises(ValueError, match="leave out latent, experts, qk_norm and use_bias"):
        check_splits(dataclasses.replace(MODEL, qk_norm=True), 2)
    with pytest.raises(ValueError, match="tensor_size=2 does not divide the 1 processes"):
        Sharded(fresh(0, True), TRAINING, Team(), tensor_size=2)
