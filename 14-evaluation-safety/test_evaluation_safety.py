"""The command line of the topic: tasks as files, scores with intervals, failures, mistakes in one line."""

import pytest

from evaluation_safety import main
from metric_failures import METRIC_BREAKS


def test_a_task_is_written_and_a_model_examined_with_it(tmp_path, capsys) -> None:
    main(["task", "--task", "new-sums", "--n-questions", "6", "--harness", "--out", str(tmp_path)])
    assert f"--include_path {tmp_path / 'harness'} --tasks new-sums" in capsys.readouterr().out
    assert (tmp_path / "harness" / "new-sums.yaml").is_file()
    main(["evaluate", "--task", f"{tmp_path / 'new-sums.jsonl'},held-out", "--n-questions", "4"])
    found = capsys.readouterr().out
    assert "exact_match" in found and "bits_per_byte" in found and " to " in found


@pytest.mark.parametrize("name", METRIC_BREAKS)
def test_each_failure_is_shown(name: str, capsys) -> None:
    main(["--break", name])
    assert f"with --break {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["evaluate", "--task", "nothing"], ["figures", "nothing"], ["--n-questions", "1"]])
def test_mistakes_are_one_line_and_exit_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
