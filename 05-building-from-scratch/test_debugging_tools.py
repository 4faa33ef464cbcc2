"""Topic 05: every planted bug is found by the check that is meant for it, and a sound model passes them all."""

import pytest
import torch

from building_from_scratch import Codec, beam_translate, noam_factor, smoothed_cross_entropy
from debugging_tools import (
    BUGS,
    CHECKS,
    SMALL,
    Finding,
    checkup_model,
    data_for_checks,
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
    "padding-in-loss": {"answer hidden", "loss mean"},
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
    for name in set(SLOW) - wanted if not wanted & set(SLOW) else ():
        monkeypatch.delitem(CHECKS, name)
    with planted(bug):
        findings = checkup_model(SMALL, *data, seed=0, device=torch.device("cpu"))
    found = {name for name, finding in findings.items() if not finding.right}
    assert wanted <= found, f"{bug} was found only by {found}"


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
