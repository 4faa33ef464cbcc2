"""Proofs for machine_roofline: counts against PyTorch's own counter, bounds by hand, profiles that add up, compile."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_calculators import forward_flops
from llm_config import ModelConfig
from machine_roofline import (
    FAMILIES,
    PHASES,
    Compiled,
    Machine,
    Placed,
    Profile,
    RooflineConfig,
    Work,
    compare_compiled,
    family_of_operator,
    layer_works,
    measure,
    place,
    plot_rooflines,
    print_roofline,
    profile_steps,
    step_flops,
    training_step,
)
from modern_llm_architectures import CausalLM
from workbench import Hardware

SMALL = ModelConfig(60, d_model=24, n_layers=3, n_heads=3, n_kv_heads=1, d_head=8, d_ff=40, max_seq_len=32)
PAPER = Machine(Hardware("paper", 1e9, 1e9, 100e9, "by hand"), ((1e3, 8e9), (1e6, 1e9)), overhead=1e-6)


@pytest.mark.parametrize("phase", PHASES)
def test_flops_of_layers_are_those_that_pytorch_counts(parity, phase: str) -> None:
    for work in layer_works(SMALL, phase, seq_len=16, batch=2):
        if work.layer in ("norm", "attention"):  # no matrix products; the CPU kernel of attention is counted as 0
            continue
        with FlopCounterMode(display=False) as counter:
            work.run()
        parity(f"{work.layer}, {phase}", "FlopCounterMode", "output", work.flops, float(counter.get_total_flops()), 0)


def test_layers_add_up_to_the_model() -> None:
    works = {work.layer: work for work in layer_works(SMALL, "prefill", 16)}
    flops = {name: work.flops / 16 for name, work in works.items() if name != "norm"}
    head = flops.pop("head")
    expected = forward_flops(SMALL, 16)
    assert SMALL.n_layers * sum(flops.values()) + head == pytest.approx(sum(expected.values()))
    trained = {work.layer: work.flops for work in layer_works(SMALL, "training", 16, batch=5)}
    assert all(trained[name] == pytest.approx(3 * 5 * work.flops) for name, work in works.items())
    assert step_flops(SMALL, 5, 16) == pytest.approx(3 * 5 * 16 * sum(expected.values()))


def test_bytes_by_hand() -> None:
    prefill, decode = ({w.layer: w for w in layer_works(SMALL, phase, 16)} for phase in ("prefill", "decode"))
    assert prefill["down"].n_bytes == 4 * (16 * (40 + 24) + 40 * 24)
    assert decode["down"].n_bytes == 4 * (1 * (40 + 24) + 40 * 24) and decode["down"].flops == 2 * 40 * 24
    assert decode["attention"].n_bytes == 4 * 3 * 8 * 2 * (1 + 16), "query and output, keys and values"
    assert decode["attention"].flops == 4 * 16 * 3 * 8 and prefill["attention"].flops == 4 * 16 * 8.5 * 3 * 8
    assert decode["down"].intensity < 0.5 < 3 < prefill["down"].intensity, "a weight is used once, or 16 times"


def test_bounds_by_hand() -> None:
    def work(flops: float, n_bytes: float, n_calls: int) -> Work:
        return Work("layer", "decode", flops, n_bytes, n_calls, lambda: None)

    assert PAPER.bound(work(1e6, 1e3, 1)) == (pytest.approx(1e-5), "arithmetic")
    assert PAPER.bound(work(1e3, 1e6, 1)) == (pytest.approx(1e-3), "memory")
    assert PAPER.bound(work(1e3, 1e3, 5)) == (pytest.approx(5e-6), "overhead")
    assert PAPER.bandwidth(1e3) == 8e9 and PAPER.bandwidth(1e9) == 1e9
    assert 1e9 < PAPER.bandwidth(3e4) < 8e9, "between the rungs of the ladder"
    assert Placed(work(1e6, 1e3, 1), 2e-5, 1e-5, "arithmetic").share == 0.5


def test_this_machine_is_measured_and_its_layers_placed(capsys) -> None:
    machine = measure(n_rounds=1)
    assert machine.hardware.flops > 1e8 and len(machine.ladder) == 6 and 0 < machine.overhead < 1e-3
    raised, placed = place(layer_works(SMALL, "decode", 8), machine, n_rounds=1)
    assert raised.hardware.flops >= max(machine.hardware.flops, *(point.rate for point in placed))
    slow, again = place(layer_works(SMALL, "prefill", 8), PAPER, n_rounds=1)
    assert slow.hardware.flops >= max(point.rate for point in again) and slow.ladder == PAPER.ladder
    assert len(placed) == 7 and all(point.seconds > 0 and point.rate > 0 for point in placed)
    print_roofline(machine, placed)
    out = capsys.readouterr().out
    assert "GFLOP/s" in out and out.count("decode") == 7
    figure = plot_rooflines(machine, {"small": placed, "again": placed})
    assert len(figure.axes) == 2 and figure.axes[0].get_xlabel() == "arithmetic intensity (FLOP/byte)"


# The profiler


def test_a_profile_adds_up() -> None:
    profile = profile_steps(training_step(CausalLM(SMALL), 2, 16), n_steps=2)
    rows = profile.rows()
    assert sum(seconds for _, seconds, _, _ in rows) == pytest.approx(profile.wall)
    assert sum(share for _, _, share, _ in rows) == pytest.approx(1)
    assert profile.seconds["outside of operators"] > 0, "no operator's time is counted twice"
    n_linear = SMALL.n_layers * 7 + 1
    assert profile.calls["matrix products"] >= 2 * 3 * n_linear, "forward, and two backward"
    assert {"matrix products", "attention", "elementwise", "optimizer"} <= set(profile.seconds)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)


def test_a_product_inside_an_operator_is_counted_once() -> None:
    x, weight = torch.randn(300, 300), torch.randn(300, 300)

    def step() -> None:
        for _ in range(20):
            torch.nn.functional.linear(x, weight)  # aten::linear calls aten::matmul, which calls aten::mm

    profile = profile_steps(step)
    assert 0 < profile.seconds["matrix products"] < profile.wall and profile.seconds["outside of operators"] > 0


def test_operators_have_their_family() -> None:
    for name, family in (
        ("aten::addmm", "matrix products"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_log_softmax", "softmax and loss"), ("aten::_fused_adamw_", "optimizer"), ("aten::mul", "elementwise"),
        ("aten::copy_", "copies"), ("aten::transpose", "views"), ("aten::unheard_of", "everything else"),
    ):  # fmt: skip
        assert family_of_operator(name) == family
    assert Profile({"a": 1.0, "b": 3.0}, {"a": 2}, 4.0).rows() == [("b", 3.0, 0.75, 0), ("a", 1.0, 0.25, 2)]
    assert len(FAMILIES) == 8


# torch.compile


def test_a_compiled_step_is_the_same_step(parity) -> None:
    torch.manual_seed(0)
    eager, traced = CausalLM(SMALL), CausalLM(SMALL)
    traced.load_state_dict(eager.state_dict())
    steps = (
        training_step(eager, 2, 16),
        training_step(traced, 2, 16, torch.compile(traced, backend="eager")),
    )
    for step in steps:
        for _ in range(3):
            step()
    parity("compiled training step", "eager", "trajectory", traced.state_dict(), eager.state_dict(), 1e-6)
    found = compare_compiled(CausalLM(SMALL), 2, 16, backend="eager", n_rounds=2)
    assert found.first > 0 and found.ratio > 0 and len(found.eager) == 2


def test_when_compiling_pays() -> None:
    assert Compiled(11.0, [3.0, 3.0], [1.0, 1.0]).steps_to_pay == 5
    assert Compiled(11.0, [3.0, 2.0], [1.0, 1.0]).ratio == 2.5
    assert Compiled(11.0, [1.0], [2.0]).steps_to_pay == float("inf")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown phase 'training loop'; choose from prefill, decode, training"):
        layer_works(SMALL, "training loop", 8)
    with pytest.raises(ValueError, match="d_model=100 must be a multiple of 64"):
        RooflineConfig(d_model=100)
    with pytest.raises(ValueError, match="torch.compile with 'inductr' fails here"):
        compare_compiled(CausalLM(SMALL), 2, 16, backend="inductr")
    assert RooflineConfig().model(SMALL) == SMALL and RooflineConfig(d_model=128).model(SMALL).n_heads == 2
