"""Proofs for manual_parallel: rings equal sums and send what the formula says; every scheme equals one process."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from data_parallel import Team
from llm_config import ModelConfig
from manual_parallel import MANUAL, DataParallel, Ring, ZeroTwo, check_alike, make_buckets, simulate_ring, train_with
from modern_llm_architectures import CausalLM
from packing import IGNORE, Batch, PackedTransformer, language_model_loss
from process_launch import LaunchConfig, run_processes, settled_bytes_sent
from training_cost import data_parallel_bytes, ring_bytes, zero_bytes
from training_transformers import TrainConfig, fit
from transformer_architecture import ModelConfig as EarlierConfig

VOCAB = 53
MODEL = ModelConfig(VOCAB, d_model=24, n_layers=2, n_heads=8, n_kv_heads=4, d_head=6, d_ff=40, max_seq_len=32)
TRAINING = TrainConfig(
    max_steps=6, batch_size=8, warmup_steps=2, learning_rate=3e-3, micro_batch_size=2, grad_clip=0.5, log_every=1
)
N_WEIGHTS = sum(parameter.numel() for parameter in CausalLM(MODEL).parameters())


def uneven_batch(step: int) -> Batch:
    """8, 3 or 5 rows with different numbers of counted targets: no equal shares, and processes without rows."""
    generator, n_rows = torch.Generator().manual_seed(step), (8, 3, 5)[step % 3]
    ids = torch.randint(0, VOCAB, (n_rows, 12), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(n_rows):
        targets[row, row + 3 :] = IGNORE
    return {"inputs": ids[:, :-1], "targets": targets}


def fresh(seed: int, double: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    if double:
        return PackedTransformer(EarlierConfig(d_model=16, n_heads=2, d_ff=32, max_seq_len=32), VOCAB).double()
    return CausalLM(MODEL)


def alone(double: bool = False) -> tuple[list[float], dict]:
    model = fresh(0, double)
    rows = fit(model, uneven_batch, language_model_loss, TRAINING)
    return [row["loss"] for row in rows], {name: tensor.detach() for name, tensor in model.state_dict().items()}


# Rings


def use_rings(team: Team) -> dict:
    ring, given = Ring(team), torch.arange(12.0) * (team.rank + 1)
    part = ring.reduce_scatter(given.clone()).clone()
    scattered = ring.sent
    whole = torch.zeros(12)
    whole.view(team.size, -1)[team.rank] = part
    ring.all_gather(whole)
    odd = ring.all_reduce(torch.full((3, 7), 10.0**team.rank, dtype=torch.float64))
    star = ring.star_all_reduce(torch.full((5,), 2.0**team.rank))
    large = Ring(team)
    before = settled_bytes_sent()
    large.all_reduce(torch.ones(300_000))
    kernel = settled_bytes_sent() - before if before is not None else -1
    return {"part": part, "whole": whole, "odd": odd, "star": star, "scattered": scattered} | {
        "sent": large.sent,
        "kernel": kernel,
    }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rings_add_up_and_send_what_the_formula_says(size: int, parity) -> None:
    results = run_processes(use_rings, LaunchConfig(size))
    total = torch.arange(12.0) * (size * (size + 1) / 2)
    for rank, result in enumerate(results):
        assert torch.equal(result["part"], total.view(size, -1)[rank])
        assert torch.equal(result["whole"], total)
        assert torch.equal(result["odd"], torch.full((3, 7), float("1" * size), dtype=torch.float64))
        assert torch.equal(result["star"], torch.full((5,), 2.0**size - 1))
        assert result["scattered"] == ring_bytes(48, size, "reduce_scatter")
        parity("Ring.all_reduce bytes", "2 (p-1)/p n", "invariant", result["sent"], ring_bytes(1.2e6, size), 0.0)
        if sys.platform == "linux":
            assert 1.0 <= result["kernel"] / result["sent"] < 1.01, "the kernel sees the payload and small headers"


def test_the_ring_on_paper() -> None:
    states = list(simulate_ring([[1, 2, 3], [10, 20, 30], [100, 200, 300]]))
    assert states[0] == [[1, 202, 3], [10, 20, 33], [110, 200, 300]]
    assert states[1] == [[111, 202, 3], [10, 222, 33], [110, 200, 333]], "chunk c is complete at process c"
    assert states[-1] == [[111, 222, 333]] * 3 and len(states) == 4


def test_a_ring_needs_equal_chunks() -> None:
    with pytest.raises(ValueError, match=r"a ring of 3 needs a flat tensor of a multiple of 3 numbers, got \(4,\)"):
        Ring(Team(0, 3)).reduce_scatter(torch.zeros(4))


# Schemes


def train_all(team: Team) -> dict:
    results = {}
    for name, kind in MANUAL.items():
        scheme = kind(fresh(team.rank), TRAINING, team, bucket_bytes=9000)  # rank 0's weights count
        losses = train_with(scheme, uneven_batch)
        padded = sum(bucket.numel + bucket.padding for bucket in scheme.buckets)
        results[name] = {"losses": losses, "weights": scheme.full_state(), "sent": scheme.ring.sent, "padded": padded}
        results[name] |= {"state": scheme.state_bytes(), "n_buckets": len(scheme.buckets)}
    precise = MANUAL["zero2"](fresh(team.rank, double=True), TRAINING, team, bucket_bytes=5000)
    results["double"] = {"losses": train_with(precise, uneven_batch), "weights": precise.full_state()}
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_scheme_trains_as_one_process_and_costs_what_the_formulas_say(size: int, parity) -> None:
    losses, weights = alone()
    exact_losses, exact_weights = alone(double=True)
    results = run_processes(train_all, LaunchConfig(size))
    n_turns = sum(math.ceil(math.ceil((8, 3, 5)[step % 3] / size) / 2) for step in range(6))  # micro-batches
    for name in MANUAL:
        first, what = results[0][name], f"{name} by hand, {size} processes"
        parity(what, "one process", "trajectory", first["losses"], losses, 1e-6)
        parity(what, "one process", "trajectory", first["weights"], weights, 1e-5)
        parity(what, "each other", "invariant", [r[name]["weights"] for r in results], [first["weights"]] * size, 0.0)
        assert first["n_buckets"] >= 5
        if size > 1:
            n_passes = n_turns + 6 if name == "zero2" else 12  # reduce-scatters, and all-gathers of weights
            expected = n_passes * ring_bytes(4 * first["padded"], size, "all_gather")
            parity(f"{what}: bytes sent", "formula", "invariant", first["sent"], expected, 0.0)
        stage = list(MANUAL).index(name)
        formula = zero_bytes(N_WEIGHTS, size, stage, weight_bytes=4)["optimizer"]
        assert formula <= first["state"] <= formula + 8 * first["n_buckets"], "no more than padding"
    what = f"zero2 by hand, fp64, {size} processes"
    parity(what, "one process", "trajectory", results[0]["double"]["losses"], exact_losses, 1e-10)
    parity(what, "one process", "trajectory", results[0]["double"]["weights"], exact_weights, 1e-10)


def test_without_micro_batches_all_three_send_the_same() -> None:
    assert data_parallel_bytes(600, 4, "ddp") == data_parallel_bytes(600, 4, "zero1") == 900
    assert data_parallel_bytes(600, 4, "zero2") == 900 and data_parallel_bytes(600, 4, "zero2", n_micro=3) == 1800


def hold_gradients(team: Team) -> list[int]:
    """Bytes of gradients between the last backward pass and the step, for ddp and zero2."""
    held = []
    for kind in (DataParallel, ZeroTwo):
        scheme = kind(fresh(0), TRAINING, team, bucket_bytes=9000)
        take_step = scheme.take_step
        scheme.take_step = lambda divisor, scheme=scheme, go_on=take_step: (
            held.append(scheme.gradient_bytes()),
            go_on(divisor),
        )
        scheme.train_on(uneven_batch(0))
    return held


def test_stage_two_keeps_its_share_of_the_gradients_only() -> None:
    whole, share = run_processes(hold_gradients, LaunchConfig(2))[1]
    assert whole == 4 * N_WEIGHTS and whole / 2 <= share <= whole / 2 + 40


def test_buckets_hold_every_weight_once_last_layers_first() -> None:
    model = CausalLM(MODEL)
    buckets = make_buckets(model, 0.1, 3, 9000)
    members = [id(parameter) for bucket in buckets for parameter in bucket.parameters]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    assert {bucket.weight_decay for bucket in buckets} == {0.0, 0.1}
    assert all((bucket.numel + bucket.padding) % 3 == 0 and bucket.padding < 3 for bucket in buckets)
    last = model.blocks[1].ffn.down_proj.weight
    assert any(last is parameter for parameter in buckets[0].parameters)
    assert any(model.token_emb.weight is parameter for parameter in buckets[-1].parameters)
    with pytest.raises(ValueError, match="bucket_bytes must be >= 1, got 0"):
        make_buckets(model, 0.1, 3, 0)


# Mistakes that must not become silent


def two_layers(first: str, second: str, d_out: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    for name in (first, second):
        model.add_module(name, nn.Linear(4, d_out, bias=False, dtype=dtype))
    return model


def disagree(team: Team) -> list[str]:
    others = [two_layers("b", "a"), two_layers("a", "b", d_out=5), two_layers("a", "b", dtype=torch.float64)]
    others.append(two_layers("a", "b"))
    others[-1].b.weight.requires_grad_(False)
    messages = []
    for other in (*others, two_layers("a", "b")):
        try:
            check_alike(two_layers("a", "b") if team.rank == 0 else other, team)
            messages.append("alike")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_different_models_are_found_before_the_first_collective() -> None:
    results = run_processes(disagree, LaunchConfig(2))
    assert results[0] == results[1], "every process knows"
    order, shape, kind, frozen, same = results[0]
    assert "parameter 0 is 'a.weight (4, 4) torch.float32 trained' in process 0 and 'b.weight (4, 4)" in order
    assert "'a.weight (5, 4) torch.float32 trained' in process 1" in shape and "torch.float64" in kind
    assert "parameter 1 is" in frozen and "frozen" in frozen and same == "alike"


def test_what_the_schemes_cannot_train_is_refused() -> None:
    for change in ({"dtype": "fp16"}, {"optimizer": "muon"}, {"ema_decay": 0.9}):
        with pytest.raises(ValueError, match="the schemes by hand know adamw in fp32 or bf16 without an average"):
            DataParallel(fresh(0), dataclasses.replace(TRAINING, **change), Team())
    model = fresh(0)
    model.add_module("idle", nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no gradient reached idle.weight, idle.bias; freeze it"):
        DataParallel(model, TRAINING, Team()).train_on(uneven_batch(0))
    nothing = {"inputs": uneven_batch(0)["inputs"], "targets": torch.full((8, 11), IGNORE)}
    with pytest.raises(ValueError, match="no token of this batch is counted"):
        DataParallel(fresh(0), TRAINING, Team()).train_on(nothing)
    broken = fresh(0)
    with torch.no_grad():
        broken.token_emb.weight[3] = float("inf")
    with pytest.raises(ValueError, match="the gradient's norm is nan at step 1"):
        DataParallel(broken, TRAINING, Team()).train_on(uneven_batch(0))
