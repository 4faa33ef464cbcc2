"""The code model: its rows, its verdicts, what it learns from, second attempts, and the committed folder."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

import code_model
from code_model import (
    FOLDER,
    LONGEST,
    CodeModel,
    CodeTrainConfig,
    accepted_rows,
    best_of_n_bound,
    code_row,
    examine,
    expert_iteration,
    filter_kl,
    filtered_pass,
    judge_bodies,
    load_code_model,
    quick_exam,
    real_rows,
    reference_rows,
    repair_wins,
    second_attempts,
    train_base,
    tuned,
)
from code_tasks import draw_tasks, repair_prompt
from course_model import ModelSizes
from course_tokenizer import load_course_tokenizer
from fine_tuning_adaptation import DialogueBatches, answer_loss
from huggingface_folders import WEIGHTS
from modern_llm_architectures import CausalLM
from sandbox import probe

needs_sandbox = pytest.mark.skipif(probe().tier == "C", reason=f"no sandbox here: {probe().reasons}")
TINY = CodeTrainConfig(n_tasks=12, n_long=3, base_steps=2, n_prompts=2, n_samples=2, tune_steps=2, code_batch=4)


class Scripted(CodeModel):
    """Writes what it is told to: bodies for a prompt, in turns."""

    def __init__(self, bodies: dict[str, Sequence[str]]) -> None:
        super().__init__(None, load_course_tokenizer())
        self.bodies = bodies

    def write(self, prompts, n=1, temperature=0.0, seed=0):
        return [list(itertools.islice(itertools.cycle(self.bodies[prompt]), n)) for prompt in prompts]


@pytest.fixture(scope="module")
def small() -> CodeModel:
    """A model with its first weights."""
    tokenizer = load_course_tokenizer()
    torch.manual_seed(0)
    return CodeModel(CausalLM(ModelSizes(16, 1, 2, 1, 24, 256).config(tokenizer)).eval(), tokenizer)


WRONG, FAILS = "    return None\n", "    return 1 // 0\n"


def test_the_loss_counts_the_body_and_its_end() -> None:
    tokenizer, [task] = load_course_tokenizer(), draw_tasks(1, 0)
    row = code_row(tokenizer, task.prompt, task.body)
    counted = [token for token, kept in zip(row.ids, row.trained, strict=True) if kept]
    assert counted == [*tokenizer.encode(task.body), tokenizer.eos_id]
    assert row.ids[0] == tokenizer.bos_id and tokenizer.decode(row.ids[1:-1]) == task.prompt + task.body


def test_training_holds_references_repairs_and_real_python_but_nothing_held_out() -> None:
    tokenizer = load_course_tokenizer()
    rows = reference_rows(tokenizer, replace(TINY, n_tasks=40), 0)
    texts = [tokenizer.decode(row.ids[1:-1]) for row in rows]
    assert sum(text.count("def f(") == 2 for text in texts) in range(3, 6)
    held = {task.prompt for task in draw_tasks(200, 77, "validation", (2, 3))}
    assert not [text for text in texts if any(text.startswith(prompt) for prompt in held)]


@needs_sandbox
def test_verdicts_keep_the_order_of_bodies() -> None:
    tasks = draw_tasks(2, 1)
    bodies = [[WRONG, tasks[0].body, WRONG], [tasks[1].body, FAILS, tasks[1].body]]
    verdicts = judge_bodies(tasks, bodies)
    assert [[verdict.passed for verdict in row] for row in verdicts] == [[False, True, False], [True, False, True]]
    assert verdicts[1][1].failure.startswith("ZeroDivisionError")


@needs_sandbox
def test_scores_by_hand() -> None:
    one, two = draw_tasks(2, 1)
    code = Scripted({one.prompt: [one.body, WRONG], two.prompt: [WRONG]})
    scores = examine(code, [one, two], n_samples=10)
    assert scores == {"pass@1": 0.25, "pass@10": 0.5, "greedy": 0.5}


@needs_sandbox
def test_only_what_passes_is_learned_from_and_each_program_once(small) -> None:
    one, two = draw_tasks(2, 1)
    other = one.body.replace("return ", "return (").rstrip("\n") + ")\n"
    code = Scripted({one.prompt: [one.body, WRONG, other, one.body], two.prompt: [FAILS]})
    rows = accepted_rows(code, [one, two], replace(TINY, n_samples=4), 0)
    assert rows == [code_row(code.tokenizer, one.prompt, body) for body in (one.body, other)]
    with pytest.raises(ValueError, match="no program passed in this round; train the base longer"):
        expert_iteration(small, replace(TINY, n_prompts=1), 0)


def test_further_steps_leave_the_first_model_alone_and_lower_the_loss(small) -> None:
    rows = reference_rows(small.tokenizer, TINY, 0)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    after = tuned(small, rows[:9], rows[9:], 12, replace(TINY, tune_rate=0.02), 0)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    batch = DialogueBatches(rows, 8, 0, 256)(0)
    with torch.no_grad():
        first, last = (answer_loss(model, batch)[0].item() for model in (small.model, after.model))
    assert last < 0.97 * first


def test_the_recipe_runs_from_the_beginning(monkeypatch, tmp_path) -> None:
    """With two functions in place of the whole library, which takes ten seconds to read."""
    texts = ["def g(a):\n    return a\n", "x = 1\n" * 200]
    monkeypatch.setattr(code_model, "python_text", lambda split, parts: texts)
    [row] = real_rows(load_course_tokenizer())  # the other is longer than a row
    assert all(row.trained) and load_course_tokenizer().decode(row.ids[1:-1]) == texts[0]
    code = train_base(replace(TINY, real_share=0.25), 1, tmp_path)
    assert len(code.write(["def f(n):\n"], 2, 1.0)[0]) == 2
    again = train_base(replace(TINY, real_share=0.25), 1, tmp_path)  # it goes on where it stopped: at its end
    assert again.write(["def f(n):\n"]) == code.write(["def f(n):\n"])


def test_writing_is_a_function_of_the_seed_and_knows_its_room(small) -> None:
    prompts = ["def f(n):\n", 'def f(s):\n    """Reverse it."""\n']
    first = small.write(prompts, 3, 1.0, 5)
    assert first == small.write(prompts, 3, 1.0, 5) and first != small.write(prompts, 3, 1.0, 6)
    assert [len(row) for row in first] == [3, 3] and small.write(prompts)[1] == small.write(prompts[1:])[0]
    with pytest.raises(ValueError, match=f"no room for a body of {LONGEST}: the model reads 256; shorten it"):
        small.write(["x = 1\n" * 60])


@needs_sandbox
def test_second_attempts_by_hand() -> None:
    """Two of three first programs fail; the repair of one kind is right, of the other unchanged."""
    [task] = draw_tasks(1, 1)
    case = task.public[0]
    after_none = repair_prompt(task.prompt, WRONG, case, "None")
    after_error = repair_prompt(task.prompt, FAILS, case, "ZeroDivisionError: integer division or modulo by zero")
    code = Scripted({task.prompt: [WRONG, task.body, FAILS], after_none: [task.body], after_error: [FAILS]})
    seen = second_attempts(code, [task], 3, 0.8, 0)
    assert (seen["n"], seen["failed"], seen["repair"], seen["unchanged"]) == (2, pytest.approx(2 / 3), 0.5, 0.5)
    assert seen["fresh"] == 0.5 and seen["chances"] == [0.5, 0.5]
    assert seen["repair_tokens"] > 2 * seen["fresh_tokens"]


def test_picking_by_public_cases_is_the_average_over_all_orders() -> None:
    public, hidden = [True, False, True, False, False], [True, False, False, True, False]
    for n in range(1, 6):
        wins = []
        for order in itertools.permutations(range(5)):
            chosen = next((place for place in order[:n] if public[place]), order[0])
            wins.append(hidden[chosen])
        assert filtered_pass(public, hidden, n) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    with pytest.raises(ValueError, match="n=6 must be between 1 and the 5 programs"):
        filtered_pass(public, hidden, 6)


def test_what_choosing_moves_is_what_enumeration_finds() -> None:
    """Four equally likely programs, ranked: the best of n, and a filter that two of them pass."""
    n, ranks = 3, range(1000)
    chances = [((rank + 1) / 1000) ** n - (rank / 1000) ** n for rank in ranks]
    moved = sum(chance * math.log(chance * 1000) for chance in chances)
    assert moved == pytest.approx(best_of_n_bound(n), abs=1e-3) and moved < best_of_n_bound(n)
    p, after = 0.25, 1 - 0.75**n
    wanted = after * math.log(after / p) + (1 - after) * math.log((1 - after) / (1 - p))
    assert filter_kl(p, n) == pytest.approx(wanted, abs=1e-12) and filter_kl(p, n) < best_of_n_bound(n)
    assert filter_kl(0.3, 1) == pytest.approx(0, abs=1e-12) and filter_kl(1.0, 5) == 0
    assert repair_wins(0.3, 0.1, 2) and not repair_wins(0.3, 0.1, 4)


# The committed folder


def test_the_committed_model_is_the_one_of_its_card() -> None:
    report = json.loads((FOLDER / "report.json").read_text())
    weights = (FOLDER / WEIGHTS).read_bytes()
    assert sha256(weights).hexdigest() == report["weights_sha256"] and len(weights) < 2_000_000
    card = (FOLDER / "README.md").read_text()
    assert all(f"{numbers['pass@1']:.1%}" in card for numbers in report["exams"].values())


@needs_sandbox
def test_the_committed_model_solves_what_its_report_says() -> None:
    report = json.loads((FOLDER / "report.json").read_text())
    found = quick_exam(load_code_model())
    assert found == pytest.approx(report["quick"], abs=0.05)  # other machines round other numbers last
    assert found["pass@10"] > 0.5
