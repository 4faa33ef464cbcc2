"""Code tasks: the references are right, the tests see every step, and what is held out is never trained on."""

import random

import pytest

from code_tasks import (
    OPERATIONS,
    Case,
    Step,
    body_of,
    chains,
    draw_tasks,
    evaluate,
    every_step_counts,
    feedback,
    first_wrong,
    is_held_out,
    kinds_of,
    repair_prompt,
    repairs,
    slipped,
)
from sandbox import Limits, Submission, find_sandbox, judge, probe


def test_a_task_by_hand() -> None:
    steps = (Step("even", 0, 0), Step("scaled", 3, 0), Step("sum", 0, 0))
    assert evaluate(steps, [1, 2, 4, 5]) == 18
    assert body_of(steps) == (
        "    xs = [x for x in xs if x % 2 == 0]\n    xs = [x * 3 for x in xs]\n    return sum(xs)\n"
    )
    assert (
        ", then ".join(step.phrase for step in steps)
        == "keep the even numbers, then multiply each by 3, then add them up"
    )


def test_every_operation_does_what_its_words_say_on_one_example() -> None:
    """One value for each type of argument, worked out by hand."""
    value = {"ints": [3, -1, 4, 3, 10], "int": -25, "text": "Ab c", "words": ["dog", "ax", "ibis"]}
    wanted = {
        **{"even": [4, 10], "odd": [3, -1, 3], "above": [4, 10], "below": [-1], "without": [-1, 4, 10]},
        **{"raised": [6, 2, 7, 6, 13], "lowered": [0, -4, 1, 0, 7], "scaled": [9, -3, 12, 9, 30]},
        **{"halved": [1, -1, 2, 1, 5], "squared": [9, 1, 16, 9, 100], "negated": [-3, 1, -4, -3, -10]},
        **{"sizes": [3, 1, 4, 3, 10], "rests": [0, 2, 1, 0, 1], "capped": [3, -1, 3, 3, 3]},
        **{"raised-to": [3, 3, 4, 3, 10], "sorted": [-1, 3, 3, 4, 10], "falling": [10, 4, 3, 3, -1]},
        **{"reversed": [10, 3, 4, -1, 3], "first": [3, -1, 4], "last": [4, 3, 10], "skip": [3, 10]},
        **{"second": [3, 4, 10], "once": [3, -1, 4, 10], "gaps": [-4, 5, -1, 7], "sum": 19, "count": 5},
        **{"largest": 10, "smallest": -1, "times": 2, "plus": -22, "minus": -28, "by": -75, "square": 625},
        **{"size": 25, "rest": 2, "digits": 7, "written": "-25", "upper": "AB C", "swapped": "aB C"},
        **{"backwards": "c bA", "joined": "Abc", "dashed": "Ab-c", "bare": "Ab c", "letters": "Abc"},
        **{"start": "Ab ", "end": "b c", "twice": "Ab cAb c", "length": 4, "vowels": 0, "spaces": 1},
        **{"split": ["Ab", "c"], "alphabet": ["ax", "dog", "ibis"], "turned": ["ibis", "ax", "dog"]},
        **{"long": ["ibis"], "capitals": ["DOG", "AX", "IBIS"], "mirrored": ["god", "xa", "sibi"]},
        **{"initials": ["d", "a", "i"], "lengths": [3, 2, 4], "line": "dog ax ibis", "list": "dog,ax,ibis"},
        **{"longest": "ibis", "how-many": 3},
    }
    assert wanted.keys() == OPERATIONS.keys()
    found = {name: evaluate([Step(name, 3, 0)], value[made.takes]) for name, made in OPERATIONS.items()}
    assert found == wanted


def test_references_pass_their_tests_in_the_sandbox() -> None:
    if probe().tier == "C":
        pytest.skip(f"no sandbox here: {probe().reasons}")
    tasks = draw_tasks(24, 5) + draw_tasks(12, 5, "validation", (2, 3))
    submissions = [Submission(task.prompt + task.body, "f", (*task.public, *task.hidden)) for task in tasks]
    verdicts = judge(submissions, Limits(wall_seconds=60), find_sandbox())
    assert all(verdict.passed and verdict.n_cases == 10 for verdict in verdicts)


def test_held_out_chains_are_disjoint_and_hold_an_unseen_pair() -> None:
    for length in (2, 3):
        train, validation = set(chains(length, "train")), set(chains(length, "validation"))
        assert not train & validation and len(validation) > 100
        assert all(is_held_out(chain) for chain in validation) and not any(map(is_held_out, train))
    pairs = {chain for chain in chains(2, "train")}
    assert all((one, two) in pairs and (two, three) in pairs for one, two, three in chains(3, "train"))
    assert chains(1, "validation") == () and len(chains(1, "train")) == len(OPERATIONS)


def test_drawing_is_a_pure_function_and_mixes_lengths() -> None:
    tasks = draw_tasks(30, 3)
    assert tasks == draw_tasks(30, 3) and tasks[:9] == draw_tasks(9, 3) and tasks != draw_tasks(30, 4)
    assert [len(task.steps) for task in tasks[:6]] == [1, 2, 3, 1, 2, 3]
    assert all(len(task.public) == 2 and len(task.hidden) == 8 for task in tasks)


def test_tests_see_every_step() -> None:
    """A chain whose step could be left out, or whose answer never varies, is not a task."""
    inputs = [[1, 2, 3], [4, 9], []]
    assert every_step_counts([Step("reversed", 0, 0), Step("first", 2, 0)], inputs)
    assert not every_step_counts([Step("sorted", 0, 0), Step("sum", 0, 0)], inputs)
    assert not every_step_counts([Step("above", 9, 0)], inputs)
    for task in draw_tasks(40, 6, "train", (2, 3)):
        assert first_wrong(task.steps, task.hidden) is None
        for place in range(len(task.steps)):
            kinds = kinds_of([task.steps[place].name])[0]
            if kinds.takes == kinds.gives:
                assert first_wrong(task.steps[:place] + task.steps[place + 1 :], task.hidden)


def test_repairs_show_a_real_failure() -> None:
    case = Case([[1, 2]], 3)
    assert feedback(case, "4") == "# f([1, 2]) gives 4, not 3\n"
    assert repair_prompt("P\n", "B\n", case, "4") == "P\nB\n# f([1, 2]) gives 4, not 3\nP\n"
    tasks = draw_tasks(40, 8)
    made = list(repairs(tasks, 1))
    assert 20 < len(made) <= 40 and all(prompt.count("def f(") == 2 and " gives " in prompt for prompt, _ in made)
    rng = random.Random(0)
    assert any(len(slipped(task, rng)) < len(task.steps) for task in tasks)


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="no task of 1 operation is held out"):
        draw_tasks(3, 0, "validation", (1, 2))
    with pytest.raises(ValueError, match="1, 2 or 3 operations, not 4"):
        chains(4, "train")
    with pytest.raises(ValueError, match="did you mean 'sorted'"):
        kinds_of(["sortd"])
    with pytest.raises(ValueError, match="unknown split"):
        chains(2, "test")
