"""Every planted failure of compression shows its sound value and its broken one, and a test would catch it."""

import copy
import math

import pytest
import torch

from compression_failures import COMPRESSION_BREAKS, IDS, DropoutLM, lazy_copy, tiny
from weight_quantization import QuantFormat, quantise
from workbench import RunConfig, seed_everything

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


def test_layers_that_read_their_codes_late_compute_what_is_stored(parity) -> None:
    """With the loop's variable bound: the model whose layers hold the dequantised weights."""
    model = tiny()
    stored = copy.deepcopy(model)
    for block in stored.blocks:
        block.ffn.up_proj.weight.data = quantise(block.ffn.up_proj.weight.detach(), QuantFormat(8)).dequantise()
    parity("LazyLinear", "dequantised weights", "invariant", lazy_copy(model, "up_proj", True)(IDS), stored(IDS), 1e-6)


def test_dropout_is_on_the_stream_and_off_in_evaluation(parity) -> None:
    model = DropoutLM(tiny(), 0.3)
    seed_everything(5)
    noisy = model.train()(IDS)
    seed_everything(5)
    kept = torch.empty(2, 12, 24).bernoulli_(0.7) / 0.7  # as F.dropout draws it
    theirs = (kept * model.model.hidden(IDS)) @ model.model.token_emb.weight.T
    parity("DropoutLM, training", "a mask by hand", "output", noisy, theirs, 1e-4)
    parity("DropoutLM, evaluation", "the model", "invariant", model.eval()(IDS), model.model(IDS), 0)


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
