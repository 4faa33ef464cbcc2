"""The command line of the topic: the tour gives the same answers, each failure shows, mistakes are one line."""

import pytest

from inference_at_scale import main
from inference_failures import INFERENCE_BREAKS
from workbench import RunConfig


def test_the_tour_gives_the_same_answers_every_way(tmp_path, capsys) -> None:
    main(["demo", "--n-questions", "8", "--out", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("one by one", "together"))]
    assert len(lines) == 5
    exact = [line for line in lines if "8-bit" not in line]  # rounding the cache may turn an answer
    assert all(line.rstrip().endswith("100%") for line in exact)
    assert (tmp_path / "together.svg").exists()


@pytest.mark.parametrize("name", INFERENCE_BREAKS)
def test_each_failure_is_far_from_what_is_right(name: str) -> None:
    for what, sound, broken in INFERENCE_BREAKS[name][0](RunConfig()):
        assert what.startswith(f"{name}: ")
        assert abs(sound - broken) > 0.1


@pytest.mark.parametrize("argv", [["serve", "--block-size", "0"], ["serve", "--kv-bits", "3"], ["--break", "nothing"]])
def test_mistakes_are_one_line_and_exit_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
