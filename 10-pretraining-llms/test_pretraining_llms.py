"""Topic 10: the command line, its demo and its failures, and the same packed batch in transformers."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import pretraining_experiments
import pretraining_llms as topic
from course_model import FOLDER, load_course_model, make_shards
from packing import language_model_loss
from shards import ShardBatches, ShardConfig


def test_demo_cleans_trains_compares_and_shares(tmp_path, capsys) -> None:
    flags = ["--n-pages", "70", "--max-steps", "20", "--n-held-out", "100", "--out", str(tmp_path)]
    topic.main(flags)
    printed = capsys.readouterr().out
    small, course = (float(re.search(rf"{name} model: ([\d.]+) ±", printed)[1]) for name in ("small", "course"))
    assert course < 0.1 < 0.3 < small  # the course model has seen two hundred times as much
    assert "precision" in printed and "Sort" in printed or "Question" in printed
    alone, shared = re.search(r"state of the optimizer ([\d,]+) bytes alone, ([\d,]+) on each", printed).groups()
    assert int(shared.replace(",", "")) < 0.6 * int(alone.replace(",", ""))
    assert float(re.search(r"one process by ([\d.e+-]+);", printed)[1]) < 1e-5


def test_transformers_pays_the_same_for_a_packed_batch(tmp_path, parity) -> None:
    ours, theirs = load_course_model()[0], AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    batch = ShardBatches(make_shards(ShardConfig(n_documents=40), tmp_path / "shards"), 4, 96, seed=0)(0)
    with torch.no_grad():
        loss, count = language_model_loss(ours, batch)
        their_loss, their_count = pretraining_experiments.their_loss(theirs, batch)
    parity("course model, packed rows", "transformers", "output", loss / count, their_loss / their_count, 1e-5)
    assert count == their_count


def test_a_failure_can_be_switched_on(tmp_path, capsys) -> None:
    topic.main(["demo", "--break", "search-by-letters", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    pairs = [re.search(r": (-?[\d.]+) as it should be, (-?[\d.]+) with", line) for line in lines]
    assert pairs and any(float(pair[1]) != float(pair[2]) for pair in pairs)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["demo", "--n-pages", "3"], "n_pages must be finite and >= 70"),
        (["figures", "curse"], "did you mean 'course'"),
        (["demo", "--break", "nothing"], "invalid choice"),
        (["pretrian"], "invalid choice"),
    ],
)
def test_mistakes_get_one_line(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        topic.main(flags)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1
