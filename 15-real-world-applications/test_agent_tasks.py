"""Tests of agent_tasks: what is true in a village, tasks with one right answer, who knows the next step, bad input."""

import json
import random
import re

import pytest

from agent_loop import Agent, AgentLimits, AgentStep
from agent_tasks import (
    KINDS,
    LONGEST,
    MOST_GOODS,
    AgentTask,
    AgentTrainConfig,
    Oracle,
    Village,
    agent_card,
    draw_task,
    draw_tasks,
    load_agent_model,
    share_right,
    trace_rows,
    village_tools,
)
from chat_tools import course_world
from course_tokenizer import load_course_tokenizer
from tiny_world import ATTRIBUTES

VILLAGE = Village(3)


def test_friendship_is_one_circle_and_goods_are_few() -> None:
    person, seen = VILLAGE.people[0], []
    while person not in seen:
        seen.append(person)
        person = VILLAGE.friends[person]
    assert person == VILLAGE.people[0] and sorted(seen) == sorted(VILLAGE.people) and len(seen) == 64
    counts = [n for goods in VILLAGE.counts.values() for n in goods.values()]
    assert min(counts) == 1 and max(counts) == MOST_GOODS and len(counts) == 64 * len(VILLAGE.goods)
    assert Village(3).counts == VILLAGE.counts != Village(4).counts and Village(4).friends != VILLAGE.friends


def test_what_the_tools_say_is_the_villages_truth() -> None:
    tools, one = village_tools(VILLAGE), VILLAGE.people[5]
    assert [*tools] == ["calculator", "look_up", "friend_of", "count_of"]
    assert tools["friend_of"].run(person=one) == f"The friend of {one} is {VILLAGE.friends[one]}."
    for n, good in {n: good for good, n in VILLAGE.counts[one].items()}.items():
        said = f"{one} has {n} {good.removesuffix('s') if n == 1 else good}."
        assert tools["count_of"].run(person=one, good=good) == said
    single = [(who, good) for who, goods in VILLAGE.counts.items() for good, n in goods.items() if n == 1]
    who, good = single[0]
    assert VILLAGE.count_of(who, good) == f"{who} has 1 {good.removesuffix('s')}." and good.endswith("s")
    for call in (lambda: VILLAGE.friend_of("Nobody Here"), lambda: VILLAGE.count_of("Nobody Here", "stones")):
        with pytest.raises(ValueError, match="nothing is known of Nobody Here"):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_facts_by_hand(kind: str) -> None:
    rng, facts = random.Random(1), course_world().facts
    for _ in range(20):
        task = draw_task(VILLAGE, rng, kind)
        names = re.findall(r"[A-Z]\w+ [A-Z]\w+", task.question.replace("How many", "how many"))
        assert task.n_calls == KINDS[kind] and (" the friend of " in task.question) == kind.startswith("friend")
        if kind.endswith("together"):
            good = task.question.split()[2]
            one, other = names[0], VILLAGE.friends[names[0]] if kind == "friend-together" else names[1]
            assert one != other and int(task.answer) == VILLAGE.counts[one][good] + VILLAGE.counts[other][good]
            assert names == ([one, one] if kind == "friend-together" else [one, other])
        else:
            person = VILLAGE.friends[names[0]] if kind == "friend" else names[0]
            [name] = [
                name
                for name, attribute in ATTRIBUTES.items()
                if task.question.lower().startswith(attribute.question[0].lower() + " ")
                and task.question.endswith(attribute.question[1].replace(" ?", "?"))
            ]
            assert facts[person][name] == task.answer
    assert len({task.question for task in draw_tasks(VILLAGE, 30, 0) if task.kind == kind}) > 25


def test_a_right_answer_may_have_a_full_stop_and_no_more() -> None:
    task = AgentTask("fact", "q", "Red House", 1)
    assert task.right(" red house. ") and task.right("RED HOUSE") and not task.right("a red house")
    assert not task.right("") and not task.right("red house!")
    runs = [Agent(Oracle(), village_tools(VILLAGE)).run(one.question) for one in draw_tasks(VILLAGE, 1, 0)]
    for run, right in zip(runs, (True, False, False, True), strict=True):
        run.right = right
    assert share_right(runs) == 0.5


def test_the_oracle_says_why_or_not_and_knows_what_is_no_question() -> None:
    question = draw_task(VILLAGE, random.Random(2), "fact").question
    loud, quiet = (json.loads(Oracle(thoughts).turn(question, [], AgentLimits()).text) for thoughts in (True, False))
    assert loud["thought"].startswith("I need the ") and not quiet.get("thought")
    assert loud["action"] == quiet["action"] and loud["action"]["name"] == "look_up"
    with pytest.raises(ValueError, match="no question of the village: 'Who are you\?'"):
        Oracle().act("Who are you?", [])
    run = Agent(Oracle(), village_tools(VILLAGE)).run(question)
    assert isinstance(run.steps[0], AgentStep) and len(run.steps) == 2


def test_lessons_come_from_many_villages_and_fit_a_row() -> None:
    tokenizer, config = load_course_tokenizer(), AgentTrainConfig(n_tasks=3)
    rows = trace_rows(tokenizer, config, 0)
    assert len(rows) == 3 * len(KINDS) and max(len(row.ids) for row in rows) <= LONGEST + 1
    again, other = trace_rows(tokenizer, config, 0), trace_rows(tokenizer, config, 1)
    assert [row.ids for row in rows] == [row.ids for row in again] != [row.ids for row in other]
    texts = " ".join(tokenizer.decode(row.ids) for row in rows)
    told = re.findall(r"The friend of ([A-Z]\w+ [A-Z]\w+) is ([A-Z]\w+ [A-Z]\w+)\.", texts)
    assert any(VILLAGE.friends[one] != other for one, other in told)  # not the village of the tests


def test_a_training_has_its_schedule_and_refuses_what_makes_no_sense(tmp_path) -> None:
    short, long = AgentTrainConfig(agent_steps=20).training, AgentTrainConfig(agent_steps=900, agent_batch=5).training
    assert (short.max_steps, short.warmup_steps, short.batch_size) == (20, 5, 12)
    assert (long.max_steps, long.warmup_steps, long.batch_size, long.learning_rate) == (900, 40, 5, 1e-2)
    for settings in ({"n_tasks": 0}, {"agent_steps": 0}, {"agent_rate": 0.0}, {"replay": 1.0}, {"agent_rank": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            AgentTrainConfig(**settings)
    with pytest.raises(
        ValueError, match="holds no adapter; train one with the verb agent-train, or use --policy oracle"
    ):
        load_agent_model(tmp_path)


def test_a_card_holds_the_reports_numbers() -> None:
    report = {
        "right": {"fact": [True, True, False, True], "friend": [False] * 4},
        "steps": {"fact": 2.25, "friend": 3.0},
        "tokens": {"fact": 310.4, "friend": 600.0},
        "exam": {"n": 4, "seed": 7, "village": 7},
        "bytes": 12345,
        "weights_sha256": "ab",
        "base_sha256": "cd",
        "cpu_seconds": 600.0,
        "machine": "a machine",
        "date": "2026-11-27",
        "command": "python x",
        "config": {"agent_steps": 9, "n_tasks": 3},
    }
    card = agent_card(report)
    assert "| fact | 1 | 75% | 2.2 | 310 |" in card and "| friend | 2 | 0% | 3.0 | 600 |" in card
    assert "12,345 bytes, sha256 `ab`" in card and "`cd`" in card and "4 tasks of each kind" in card
