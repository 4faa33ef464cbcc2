"""Topic 09: every planted failure keeps shapes and raises nothing, and its measurement tells sound from broken."""

from typing import get_args, get_type_hints

import pytest
import torch

from mixture_of_experts import MixtureOfExperts, SoftmaxRouter
from modern_llm_architectures import DemoConfig, main
from modern_llm_failures import BREAKS, FullSizeExperts, breaks, planted, show
from workbench import RunConfig

SOUND = {"bool-minus-infinity": 0.0, "window-of-ones": 0.0, "full-size-experts": 0.25}


@pytest.mark.parametrize("name", SOUND)
def test_a_failure_shows_and_leaves_no_trace(name) -> None:
    _, _, owner, attribute, _ = BREAKS[name]
    before = getattr(owner, attribute)
    what, sound, broken = show(name)
    assert sound == pytest.approx(SOUND[name], abs=1e-9) and abs(broken - sound) > 1e-3
    assert getattr(owner, attribute) is before and ":" in what


def test_full_size_experts_cost_eight_times_what_was_sold(parity) -> None:
    assert show("full-size-experts")[2] == pytest.approx(2.0)
    torch.manual_seed(0)
    broken, sound = (
        kind(SoftmaxRouter(12, 4, 2), 12, size) for kind, size in ((FullSizeExperts, 5), (MixtureOfExperts, 20))
    )
    sound.load_state_dict(broken.state_dict())
    x = torch.randn(2, 7, 12)
    parity("FullSizeExperts", "MixtureOfExperts, 4 times as wide", "invariant", broken(x), sound(x), 0)


def test_without_its_gate_no_gradient_reaches_the_router() -> None:
    _, sound, broken = show("switch-without-gate")
    assert sound > 1e-3 and broken < 1e-6 * sound


def test_the_demo_shows_each_failure_in_one_line(capsys, tmp_path) -> None:
    assert get_args(get_type_hints(DemoConfig)["break_"]) == ("none", *BREAKS)
    main(["demo", "--break", "window-of-ones", "--out", str(tmp_path), "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "0 as it should be" in said and "with --break window-of-ones" in said


def test_the_table_holds_every_failure() -> None:
    saved = []

    class Config:
        def save(self, name, columns, rows, experiment, n_seeds) -> None:
            saved.append((name, rows))

    breaks(Config(), RunConfig(device="cpu"))
    assert saved[0][0] == "breaks" and [row[0] for row in saved[0][1]] == [f"`{name}`" for name in BREAKS]
    assert all(row[2] != row[3] for row in saved[0][1])


def test_an_unknown_failure_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match="unknown failure 'window-of-one'; did you mean 'window-of-ones'?"):
        show("window-of-one")
    with pytest.raises(ValueError, match="unknown failure"), planted("none"):
        pass
