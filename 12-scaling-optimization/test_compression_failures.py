"""Every planted failure of compression shows its sound value and its broken one, and a test would catch it."""

import math

import pytest

from compression_failures import COMPRESSION_BREAKS
from workbench import RunConfig

CAUGHT_BY = {  # what a test asserts of the sound code, and what the broken code gives
    "late-binding": lambda sound, broken: sound < 0.1 < 0.5 < broken,
    "int8-overflow": lambda sound, broken: sound == 0 < 0.1 < broken,
    "zero-point-wrap": lambda sound, broken: broken > 2 * sound,
    "zero-scale": lambda sound, broken: sound == 0 < broken,
    "gptq-safeguards": lambda sound, broken: sound < 0.9 < 0.99 < broken,
    "mask-saves-nothing": lambda sound, broken: sound < 0.8 < broken == 1,
    "noisy-teacher": lambda sound, broken: sound == 0 < 1e-3 < broken,
    "missing-square": lambda sound, broken: 0.3 < sound < 3 and broken < 0.05,
}


def test_every_failure_is_listed_here() -> None:
    assert CAUGHT_BY.keys() == COMPRESSION_BREAKS.keys()


@pytest.mark.parametrize("name", COMPRESSION_BREAKS)
def test_the_broken_code_fails_what_the_sound_code_passes(name) -> None:
    rows = COMPRESSION_BREAKS[name][0](RunConfig())
    assert rows
    for what, sound, broken in rows:
        assert what.startswith(name.partition("-")[0]) and math.isfinite(sound)
        assert CAUGHT_BY[name](sound, broken), (what, sound, broken)
        assert not CAUGHT_BY[name](broken, broken)
