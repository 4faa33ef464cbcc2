"""The command line of the topic: its verbs, and mistakes in one line."""

import pytest

from real_world_applications import main


@pytest.mark.parametrize("argv", [["figures", "nothing"], ["--break", "nothing"], ["life", "--seed", "-1"], ["asks"]])
def test_mistakes_are_one_line_and_exit_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_every_application_of_the_topic_has_a_verb(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for verb in ("ask", "chat", "chat-server", "sandbox", "code", "agent", "picture", "release-gate", "life", "bench"):
        assert f"\n    {verb} " in printed or f"\n    {verb}\n" in printed, verb
