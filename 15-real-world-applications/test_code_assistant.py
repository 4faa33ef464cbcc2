"""The assistant: programs from a model or a server, chosen by examples or by vote, and always run in the sandbox."""

from types import SimpleNamespace

import pytest

import code_assistant
from code_assistant import CodeConfig, Written, assist, by_examples, by_vote, code_in
from code_experiments import CODE_EXPERIMENTS, CODE_VERBS, CodeFiguresConfig
from code_failures import CODE_BREAKS, judge_inside, loose_equality, names_set_to_none, public_score
from sandbox import find_sandbox, probe
from workbench import RunConfig, run_verbs

needs_sandbox = pytest.mark.skipif(probe().tier == "C", reason=f"no sandbox here: {probe().reasons}")
HEAD = "def f(xs):\n"


def config(**settings) -> CodeConfig:
    return CodeConfig(words=("add", "them", "up"), **settings)


def test_a_sentence_becomes_a_prompt() -> None:
    asked = CodeConfig(words=("reverse", "it,", "then take its length."), takes="text")
    assert asked.prompt == 'def f(s):\n    """Reverse it, then take its length."""\n'


def test_programs_are_cut_out_of_a_servers_answer() -> None:
    whole, body = "def f(xs):\n    return sum(xs)\n", "    return sum(xs)\n"
    assert code_in(f"Sure!\n```python\n{whole}```\nDone.", "P\n") == whole
    assert code_in(f"```\n{whole}", "P\n") == whole and code_in(whole, "P\n") == whole
    assert code_in(body, "P\n") == "P\n" + body


@needs_sandbox
def test_examples_choose_the_first_program_that_obeys_them() -> None:
    programs = [HEAD + "    return len(xs)\n", HEAD + "    return sum(xs)\n"]
    asked = config(example="[1, 2, 4] gives 7; [] gives 0", base_url="http://nowhere")
    written = by_examples(programs, asked, 0, find_sandbox())
    assert written.source == programs[1] and written.note == "program 2 of 2 gives what the 2 examples say"
    failed = by_examples(programs[:1], asked, 0, find_sandbox())
    assert failed.note == "none of 1 programs gives what the examples say; the first gives 3"


@needs_sandbox
def test_without_examples_the_largest_group_wins() -> None:
    programs = [HEAD + f"    return {what}\n" for what in ("len(xs)", "sum(xs)", "1 // 0", "sum(list(xs))")]
    written = by_vote(programs, config(), 0, find_sandbox())
    assert written.source == programs[1] and written.note.startswith("2 of 4 programs agree; f([")
    none = by_vote(programs[2:3], config(), 0, find_sandbox())
    assert none.note == "no program ran to its end"


@needs_sandbox
def test_a_server_writes_and_the_sandbox_judges(monkeypatch) -> None:
    asked = []

    class Server:
        def chat_all(self, conversations, **settings):
            asked.append((conversations, settings))
            return [SimpleNamespace(text="```python\ndef f(xs):\n    return sum(xs)\n```")] * len(conversations)

        def close(self) -> None:
            asked.append("closed")

    monkeypatch.setattr(code_assistant, "open_endpoint", lambda base_url, model: Server())
    written = assist(config(base_url="http://somewhere", n_samples=2, example="[2, 3] gives 5"), 0)
    assert isinstance(written, Written) and written.note == "program 1 of 1 gives what the 1 examples say"
    assert len(asked[0][0]) == 2 and "Add them up." in asked[0][0][0][0]["content"] and asked[1] == "closed"


@needs_sandbox
def test_the_command_writes_runs_and_says_what_came(capsys) -> None:
    verbs = {"demo": CODE_VERBS["code"], **CODE_VERBS}
    words = ["keep", "the", "even", "numbers,", "then", "add", "them", "up"]
    run_verbs("x", verbs, ["code", *words, "--example", "[1, 2, 4] gives 6", "--n-samples", "3"])
    shown = capsys.readouterr().out
    assert "return sum(xs)" in shown and "gives what the 1 examples say" in shown and "# ok in" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["code"], "words say nothing"),
        (["code", "add", "--example", "[1 gives 2"], "cannot be read; write it as: [1, 2, 4] gives 6"),
        (["code", "add", "--n-samples", "0"], "n_samples must be finite and >= 1"),
        (["code", "add", "--base-url", "nowhere"], "nowhere"),
        (["sandbox", "--program", "no-such.py"], "is no file; give a Python file"),
        (["sandbox", "--memory-mib", "1"], "memory_mib must be finite and >= 64"),
        (["code-train", "--base-steps", "1"], "base_steps must be finite and >= 2"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run_verbs("x", {"demo": CODE_VERBS["code"], **CODE_VERBS}, arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and message in error


@needs_sandbox
def test_failures_show_what_they_are_named_for() -> None:
    run = RunConfig()
    for _, sound, broken in [*judge_inside(run), *names_set_to_none(run), *loose_equality(run)]:
        assert sound == 0 and broken >= 3
    [(_, sound, broken)] = public_score(run)
    assert sound < 0.7 < broken
    assert {"judge-inside", "names-set-to-none", "public-score", "one-seed-for-all"} <= CODE_BREAKS.keys()


def test_experiments_have_names_and_sizes(tmp_path) -> None:
    assert {"sandbox-attacks", "sandbox-cost", "cheats", "pass-at-k", "repair", "best-of-n"} <= CODE_EXPERIMENTS.keys()
    assert CodeFiguresConfig(folder=tmp_path).n_seeds == 3
    with pytest.raises(ValueError, match="n_exam_samples must be finite and >= 10"):
        CodeFiguresConfig(n_exam_samples=3)
