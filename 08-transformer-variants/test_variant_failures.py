"""Topic 08: every planted failure keeps shapes and raises nothing, and its measurement tells sound from broken."""

import types
from typing import get_args, get_type_hints
from unittest import mock

import pytest

import variant_failures
from transformer_variants import BreakConfig, main
from variant_failures import BREAKS, breaks, planted, show
from workbench import RunConfig

SOUND = {  # the right value, and how far from it a sound program may lie
    "conv1d": (0, 1e-6),
    "roberta-positions": (0, 1e-5),
    "patch-order": (0, 1e-5),
    "one-sided-rows": (1, 0.01),
    "unit-rows": (1, 0.01),
    "global-twice": (0, 1e-12),
    "nucleus-order": (0.9, 0.1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_failure_shows_and_leaves_no_trace(name) -> None:
    _, _, owner, attribute, _ = BREAKS[name]
    before = getattr(owner, attribute)
    what, sound, broken = show(name)
    value, tolerance = SOUND[name]
    assert abs(sound - value) <= tolerance < abs(broken - value) / 3
    assert getattr(owner, attribute) == before and ":" in what


def test_the_demo_shows_each_failure_in_one_line(capsys, tmp_path) -> None:
    assert get_args(get_type_hints(BreakConfig)["break_"]) == ("none", *BREAKS)
    main(["demo", "--break", "global-twice", "--out", str(tmp_path), "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "with --break global-twice" in said


def test_the_table_holds_every_failure(monkeypatch) -> None:
    saved = mock.Mock()
    monkeypatch.setattr(variant_failures, "save", saved)
    monkeypatch.setattr(variant_failures, "show", lambda name: ("what", 0.0, 1.0))
    breaks(types.SimpleNamespace(), RunConfig(device="cpu"))
    assert [row[0] for row in saved.call_args.args[3]] == [f"`{name}`" for name in BREAKS]


def test_an_unknown_failure_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match="unknown failure 'conv2d'; did you mean 'conv1d'?"), planted("conv2d"):
        pass
    with pytest.raises(ValueError, match="unknown failure"):
        show("none")
