"""Proofs for pipeline_parallel: the simulator gives the formula and PyTorch's order; stages train as one process."""

import dataclasses
from fractions import Fraction

import pytest
import torch

from data_parallel import Team
from llm_config import ModelConfig
from manual_parallel import train_with
from modern_llm_architectures import CausalLM
from packing import IGNORE, Batch, language_model_loss
from pipeline_parallel import SCHEDULES, Pipeline, bubble_share, order_of, plot_timetables, simulate
from process_launch import LaunchConfig, run_processes
from training_transformers import TrainConfig, fit

MODEL = ModelConfig(51, d_model=24, n_layers=4, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40, max_seq_len=32)
TRAINING = TrainConfig(max_steps=5, batch_size=8, warmup_steps=2, learning_rate=3e-3, grad_clip=0.5, log_every=1)


def uneven_batch(step: int) -> Batch:
    generator, n_rows = torch.Generator().manual_seed(step), (8, 3, 5)[step % 3]
    ids = torch.randint(0, MODEL.vocab_size, (n_rows, 13), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(n_rows):
        targets[row, row + 3 :] = IGNORE
    return {"inputs": ids[:, :-1], "targets": targets}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backward", [1, 2, 3])
def test_the_bubble_is_the_formula(schedule: str, backward: int) -> None:
    for n_stages in range(1, 7):
        for n_micro in range(1, 10):
            table = simulate(schedule, n_stages, n_micro, forward=1, backward=backward)
            assert table.bubble == Fraction(n_stages - 1, n_micro + n_stages - 1)
            assert float(table.bubble) == pytest.approx(bubble_share(n_stages, n_micro))
            assert table.length == (n_micro + n_stages - 1) * (1 + backward)
            most = [n_micro if schedule == "gpipe" else min(n_micro, n_stages - stage) for stage in range(n_stages)]
            assert [table.peak(stage) for stage in range(n_stages)] == most


def test_two_stages_on_paper() -> None:
    assert order_of("1f1b", 0, 2, 3) == [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)]
    assert order_of("1f1b", 1, 2, 3) == [("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2)]
    times = simulate("gpipe", 2, 2).times
    assert times[0] == {("F", 0): (0, 1), ("F", 1): (1, 2), ("B", 0): (5, 7), ("B", 1): (7, 9)}
    assert times[1] == {("F", 0): (1, 2), ("F", 1): (2, 3), ("B", 0): (3, 5), ("B", 1): (5, 7)}


def test_schedules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule '2f2b'; did you mean '1f1b'"):
        order_of("2f2b", 0, 2, 4)
    with pytest.raises(ValueError, match="stages, micro-batches and times must be >= 1"):
        simulate("gpipe", 2, 0)
    with pytest.raises(ValueError, match="a pipeline needs at least 2 processes"):
        Pipeline(CausalLM(MODEL), TRAINING, Team())
    with pytest.raises(ValueError, match=r"a pipeline of 5 stages needs as many blocks \(there are 4\)"):
        Pipeline(CausalLM(MODEL), TRAINING, Team(0, 5))
    figure = plot_timetables({"GPipe": simulate("gpipe", 2, 2)})
    assert figure.axes[0].get_title() == "GPipe: bubble 33%"


def fresh(seed: int, tied: bool) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(dataclasses.replace(MODEL, tie_embeddings=tied))


def training_of(tied: bool) -> tuple[TrainConfig, int]:
    """And the micro-batches: nothing hides the size of a gradient where none is clipped, and 8 rows are not 3 parts."""
    return (TRAINING, 4) if tied else (dataclasses.replace(TRAINING, grad_clip=0.0), 3)


def train_stages(team: Team, schedule: str, tied: bool) -> dict:
    config, n_micro = training_of(tied)
    scheme = Pipeline(fresh(team.rank, tied), config, team, schedule, n_micro)
    losses = train_with(scheme, uneven_batch)
    events = [list(event) for event in scheme.events]
    return {
        "losses": losses,
        "weights": scheme.full_state(),
        "events": events,
        "own": len(list(scheme.model.parameters())),
    }


@pytest.mark.parametrize(("size", "schedule", "tied"), [(2, "gpipe", True), (4, "1f1b", True), (2, "1f1b", False)])
def test_stages_train_as_one_process_in_the_simulated_order(size: int, schedule: str, tied: bool, parity) -> None:
    model = fresh(0, tied)
    config, n_micro = training_of(tied)
    rows = fit(model, uneven_batch, language_model_loss, config)
    expected = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    results = run_processes(train_stages, LaunchConfig(size), schedule, tied)
    what = f"{schedule}, {size} stages, {'tied' if tied else 'untied'}"
    for stage, result in enumerate(results):
        parity(what, "one process", "trajectory", result["losses"], [row["loss"] for row in rows], 1e-6)
        parity(what, "one process", "trajectory", result["weights"], expected, 1e-5)
        ran = [tuple(event) for event in result["events"]]
        assert ran == order_of(schedule, stage, size, n_micro), "PyTorch runs what the simulator says"
        assert result["own"] < len(expected) / size + 3, "a stage holds its blocks alone"
