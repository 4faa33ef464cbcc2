"""Topic 05: every planted bug is found by the check that is meant for it, and a sound model passes them all."""

import functools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from building_from_scratch import (
    IGNORE,
    Codec,
    ModelConfig,
    Transformer,
    batch_tensors,
    beam_translate,
    noam_factor,
    smoothed_cross_entropy,
)
from debugging_tools import (
    BUGS,
    CHECKS,
    SMALL,
    Finding,
    check_loss_at_init,
    checkup_model,
    data_for_checks,
    loss_at_init,
    main,
    planted,
    plot_ladder,
    symptoms,
)
from translation_pairs import Pair

FOUND_BY = {
    "no-shift": {"loss at init", "answer hidden", "decoding"},
    "future-visible": {"future hidden"},
    "inverted-padding": {"padding", "order"},
    "padding-in-loss": {"loss at init", "answer hidden", "loss mean"},
    "no-positions": {"order"},
    "detached-memory": {"gradients"},
    "no-zero-grad": {"one batch"},
    "schedule-per-epoch": {"schedule"},
    "too-much-mass": {"loss floor"},
    "mixed-beams": {"beam"},
}
SLOW = ("one batch", "decoding", "beam")  # these train a model


@pytest.fixture(scope="module")
def data() -> tuple[Codec, list[Pair]]:
    return data_for_checks(32, seed=0)


def test_a_sound_model_passes_every_check(data) -> None:
    torch.set_num_threads(1)
    findings = checkup_model(SMALL, *data, seed=0, device=torch.device("cpu"))
    assert {name for name, finding in findings.items() if not finding.right} == set()


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_is_found_by_its_check(data, bug: str, monkeypatch) -> None:
    wanted = FOUND_BY[bug]
    needed = wanted | {"one batch"} if wanted & set(SLOW) else wanted  # the other two look at what it trained
    for name in set(SLOW) - needed:
        monkeypatch.delitem(CHECKS, name)
    with planted(bug):
        findings = checkup_model(SMALL, *data, seed=0, device=torch.device("cpu"))
    found = {name for name, finding in findings.items() if not finding.right}
    assert wanted <= found, f"{bug} was found only by {found}"


SIZES = {"check-up": SMALL, "small": ModelConfig(n_encoder_layers=1, n_decoder_layers=1), "main": ModelConfig()}


more_data = functools.cache(lambda: data_for_checks(64, seed=0))


@torch.no_grad()
def first_losses(config: ModelConfig, bug: str, n_seeds: int = 8) -> tuple[float, float]:
    """Mean excess over ln(vocabulary) of untrained models, and mean logit of the word just read, in nats."""
    codec, pairs = more_data()
    excess, read = [], []
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        model = Transformer(config, len(codec.src), len(codec.tgt))
        with planted(bug):
            src_ids, tgt_ids, answers = batch_tensors(codec, pairs, torch.device("cpu"))
        loss, chance = loss_at_init(model, (src_ids, tgt_ids, answers))
        excess.append(loss - chance)
        logits = model(src_ids, tgt_ids).gather(-1, tgt_ids[..., None]).squeeze(-1)  # (batch, tgt)
        read.append(logits[answers != IGNORE].mean().item())
    return statistics.mean(excess), statistics.mean(read)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_loss_is_predicted(size: str) -> None:
    """Untied: d / (d + vocabulary) above chance. Tied: one logit, of the word just read, explains the excess."""
    config, vocab_size = SIZES[size], len(more_data()[0].tgt)
    untied = replace(config, tie_embeddings=False)
    sound = first_losses(untied, "none")[0]
    assert sound == pytest.approx(config.d_model / (config.d_model + vocab_size), abs=0.1)
    excess, read = first_losses(config, "none")
    predicted = math.log(math.exp(0.5) + math.exp(read) / vocab_size)
    assert excess == pytest.approx(predicted, abs=0.15)
    assert first_losses(config, "no-shift")[0] == pytest.approx(predicted - read, abs=0.2)
    for bug in ("no-shift", "future-visible"):  # what cannot be used cannot be seen
        assert first_losses(untied, bug)[0] == pytest.approx(sound, abs=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_sound_models_of_every_size_start_in_the_accepted_range(data, tied: bool) -> None:
    for config in SIZES.values():
        for seed in range(4):
            torch.manual_seed(seed)
            model = Transformer(replace(config, tie_embeddings=tied), len(data[0].src), len(data[0].tgt))
            assert check_loss_at_init(model, *data).right


def test_bugs_leave_nothing_behind() -> None:
    import building_from_scratch as core

    before = (core.smoothed_cross_entropy, core.noam_factor, core.beam_translate, Codec.encode_targets)
    for bug in BUGS:
        with planted(bug):
            pass
    assert before == (smoothed_cross_entropy, noam_factor, beam_translate, Codec.encode_targets)
    with pytest.raises(ValueError, match="unknown bug 'gremlin'; choose none, no-shift"), planted("gremlin"):
        pass


def test_command_line_names_the_failed_check(tmp_path, capsys, monkeypatch) -> None:
    for name in SLOW:
        monkeypatch.delitem(CHECKS, name)
    main(["checkup", "--n-checked", "16", "--break", "no-positions", "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    failed = [line.split() for line in printed.splitlines() if line.startswith("FAIL")]
    assert "planted: words are embedded without their positions" in printed
    assert [words[1] for words in failed] == ["order"]
    sound, broken = map(float, failed[0][2:4])
    assert sound > 0.01 > broken, "the sound value stands beside the broken one"
    main(["--n-checked", "16", "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "every check holds" in printed and (tmp_path / "ladder.svg").exists()
    with pytest.raises(SystemExit) as exit_info:
        main(["checkup", "--n-checked", "3"])
    assert exit_info.value.code == 2 and "n_checked must be finite and >= 16, got 3" in capsys.readouterr().err


def test_plot_has_a_row_for_each_bug() -> None:
    findings = {bug: dict.fromkeys(CHECKS, Finding(0.5, bug == "none")) for bug in ("none", "no-shift")}
    axis = plot_ladder(findings).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["none", "no-shift"]


def test_symptoms_put_the_sound_value_beside_the_broken_one() -> None:
    sound, broken = Finding(0.0, True), Finding(0.75, False)
    findings = {"none": {"padding": sound, "order": sound}, "future-visible": {"padding": broken, "order": sound}}
    assert symptoms(findings) == [["future-visible", "padding", 0.0, 0.75]]
