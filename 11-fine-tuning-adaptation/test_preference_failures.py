"""The failures do what their rows say, and each is caught by a test that exists."""

import ast
from pathlib import Path

import pytest

from preference_failures import CAUGHT_BY, PREFERENCE_BREAKS
from workbench import RunConfig

UNHARMED = ("DPO loss",)  # what a failure leaves alone, which is part of its lesson


@pytest.mark.parametrize("name", PREFERENCE_BREAKS)
def test_every_failure_shows(name) -> None:
    run = RunConfig()
    for what, sound, wrong in PREFERENCE_BREAKS[name][0](run):
        if what in UNHARMED:
            assert sound == pytest.approx(wrong, abs=1e-12), what
        else:
            assert abs(sound - wrong) > 0.05 * max(abs(sound), abs(wrong)), what


@pytest.mark.parametrize("name", PREFERENCE_BREAKS)
def test_the_test_that_catches_it_exists(name) -> None:
    file, function = CAUGHT_BY[name]
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
