"""Tests of tool_model: lessons that are right and held out as they say, an adapter that is what its card says."""

import json
from hashlib import sha256

import pytest
import torch

import tool_model
from chat_model import load_chat_model
from chat_tools import call_or_text, call_tool, course_world, spaced_call, spaced_schema, unspaced_call, with_question
from constrained_decoding import TokenBytes
from course_tokenizer import COURSE_SPECIAL_TOKENS, load_course_tokenizer
from low_rank_adapters import ADAPTER_WEIGHTS, load_adapter
from tiny_world import words
from tool_model import (
    ADAPTER,
    LONGEST,
    REPORT,
    SYSTEM,
    TEACH,
    Lesson,
    Reaction,
    ToolExamConfig,
    ToolPupil,
    ToolTrainConfig,
    draw_lessons,
    examine_tools,
    lesson_messages,
    lesson_row,
    lesson_rows,
    load_tool_model,
    reaction,
    score_reactions,
    tool_card,
    tools_of,
    train_tool_adapter,
)

TOKENIZER = load_course_tokenizer()
WORDS = TokenBytes(TOKENIZER)


@pytest.mark.parametrize("category", TEACH)
@pytest.mark.parametrize("new", [False, True])
def test_every_call_of_a_lesson_is_one_that_the_constraint_admits(category, new):
    for lesson in draw_lessons(category, 3, 5, new):
        if lesson.call is None:
            assert lesson.answer
            continue
        tools = with_question(tools_of(lesson), lesson.question)
        constraint = call_or_text(tools, WORDS, TOKENIZER.tool_call_id, spaced=True)
        state = constraint.advance(constraint.start(), TOKENIZER.tool_call_id)
        for token_id in TOKENIZER.encode(json.dumps(spaced_call(lesson.call), ensure_ascii=False)):
            state = constraint.advance(state, token_id)
        assert constraint.may_end(state)


@pytest.mark.parametrize("category", [name for name in TEACH if name not in ("search", "story")])
def test_the_answer_of_a_lesson_says_what_the_tool_says(category):
    for lesson in draw_lessons(category, 10, 6, True):
        messages = reaction(lesson)
        assert messages[-1] == {"role": "assistant", "content": lesson.answer} and lesson.right(lesson.answer)
        if lesson.call is None:
            assert len(messages) == 1
            continue
        result = call_tool(lesson.call, tools_of(lesson))
        if result.error:
            assert lesson.answer.startswith(("I do not know", "I cannot keep"))
        elif category == "sum":
            assert words(lesson.answer)[-2] == words(result.text)[-1]
        else:
            assert lesson.answer == result.text


def test_what_is_held_out_is_not_trained():
    world = course_world()

    def asked(category: str, new: bool) -> set[str]:
        return {lesson.question for lesson in draw_lessons(category, 150, 7, new)}

    for category in ("fact", "listed", "unknown"):
        people = [
            {lesson.call["arguments"]["person"] for lesson in draw_lessons(category, 150, 7, new)}
            for new in (False, True)
        ]
        assert not people[0] & people[1] and (category == "unknown") != (people[1] <= set(world.facts))
    for category in ("search", "greet"):
        assert not asked(category, False) & asked(category, True)
    numbers = [
        {int(word) for text in asked("sum", new) for word in words(text) if word.isdigit() and int(word) > 20}
        for new in (False, True)
    ]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]


def test_only_the_own_turn_of_a_lesson_is_trained():
    [lesson], history = draw_lessons("sum", 1, 3, False), draw_lessons("greet", 3, 3, False)
    row = lesson_row(TOKENIZER, lesson, history)
    trained = [token_id for token_id, kept in zip(row.ids, row.trained, strict=True) if kept]
    text = TOKENIZER.decode(trained)
    assert trained[0] == TOKENIZER.tool_call_id and trained.count(TOKENIZER.im_end_id) == 2
    assert lesson.answer in text and not any(other.answer in text for other in history)
    result = call_tool(lesson.call, tools_of(lesson)).text
    assert TOKENIZER.decode(row.ids).count(result) > text.count(result)  # what the tool says is read, not learned


def test_a_lesson_loses_its_oldest_exchanges_if_it_is_too_long():
    [lesson], history = draw_lessons("said", 1, 3, False), draw_lessons("read", 30, 3, False)
    row = lesson_row(TOKENIZER, lesson, history)
    text = TOKENIZER.decode(row.ids)
    assert len(row.ids) <= LONGEST + 1 and SYSTEM in text and history[-1].question in text
    assert history[0].question not in text and lesson.before[0]["content"] in text
    long = Lesson("sum", "x" * 3000, None, "y")
    assert lesson_row(TOKENIZER, long, []) is None


def test_blanks_come_and_go():
    call = {"name": "x", "arguments": {"a": "Noah Wood", "n": 3, "b": ""}}
    assert spaced_call(call)["arguments"] == {"a": " Noah Wood", "n": 3, "b": " "}
    assert unspaced_call(spaced_call(call)) == call and unspaced_call({"name": ""}) == {"name": ""}
    with pytest.raises(ValueError, match="needs an enum, a const or a pattern"):
        spaced_schema({"properties": {"a": {"type": "string"}}})
    assert spaced_schema({"properties": {"a": {"type": "integer"}}})["properties"]["a"] == {"type": "integer"}


def test_scores_count_what_they_say():
    lessons = draw_lessons("sum", 4, 1, True)
    other = {"name": "look_up", "arguments": {}}
    wrong = {"name": "calculator", "arguments": {"expression": "1"}}
    made = [
        Reaction(lessons[0].call, "", lessons[0].answer),
        Reaction(lessons[1].call, "", "no"),
        Reaction(wrong, "", lessons[2].answer),
        Reaction(None, "{", ""),
    ]
    assert score_reactions(lessons, made) == {"choice": 0.75, "call": 0.5, "right": 0.25, "invalid": 0.25}
    assert score_reactions(lessons[:1], [Reaction(other, "", "")])["choice"] == 0.0


def test_a_few_steps_teach_something(monkeypatch):
    model, tokenizer = load_chat_model()
    ids = [tokenizer.tool_call_id, tokenizer.tool_result_id]
    monkeypatch.setattr(tool_model, "new_tokens", lambda *args: ids)  # which takes seconds to find
    config = ToolTrainConfig(n_lessons=3, tool_steps=3, tool_batch=4, document_share=0.0, tool_rank=4)
    log = train_tool_adapter(model, tokenizer, config, seed=0)
    rows, start = model.token_emb.rows.detach().clone(), load_chat_model()[0].token_emb.weight[ids]
    assert len(log) == 1 and log[0]["loss"] > 0 and (rows - start).abs().max() > 1e-3
    assert len(lesson_rows(tokenizer, config, 0)) > 40


@pytest.fixture(scope="module")
def pair():
    return load_tool_model()


def test_the_card_says_what_the_report_says_and_a_small_exam_repeats_it(pair):
    report = json.loads((ADAPTER / REPORT).read_text(encoding="utf-8"))
    assert (ADAPTER / "README.md").read_text(encoding="utf-8") == tool_card(report)
    weights = (ADAPTER / ADAPTER_WEIGHTS).read_bytes()
    assert sha256(weights).hexdigest() == report["weights_sha256"] and len(weights) == report["bytes"] <= 1_000_000
    some = ("sum", "listed", "said", "sort")  # the others would take as long again
    found = examine_tools(*pair, ToolExamConfig(**report["small_exam"]), categories=some)
    for category in some:
        assert found[category] == pytest.approx(report["small_categories"][category])


def test_the_adapter_refuses_other_weights():
    model, _ = load_chat_model()
    with torch.no_grad():
        model.final_norm.weight[3] += 1e-3
    with pytest.raises(ValueError, match="was trained on a base with sha256"):
        load_adapter(model, ADAPTER)


def test_the_model_calls_copies_and_answers(pair):
    """What the chapter's examples show; held-out numbers and people."""
    pupil = ToolPupil(*pair)
    lessons = [*draw_lessons("listed", 6, 11, True), *draw_lessons("sort", 4, 11, True)]
    made = pupil.react(lessons, [lesson_messages(lesson) for lesson in lessons])
    scores = score_reactions(lessons, made)
    assert scores["choice"] == 1.0 and scores["invalid"] == 0.0
    assert sum(item.call == lesson.call for lesson, item in zip(lessons, made, strict=True)) >= 7


def test_unconstrained_output_is_read_as_it_is():
    class Output:
        def __init__(self, ids: list[int], text: str) -> None:
            self.new_ids, self.text = ids, text

    pupil = object.__new__(ToolPupil)
    pupil.tokenizer = TOKENIZER
    assert pupil.read(Output(TOKENIZER.encode("Hi."), "Hi.")) == (None, "", "Hi.")

    def called(text: str):
        return pupil.read(Output([TOKENIZER.tool_call_id, *TOKENIZER.encode(text), TOKENIZER.im_end_id], ""))

    assert called('{"name": "x", "arguments": {"a": " b"}}')[0] == {"name": "x", "arguments": {"a": "b"}}
    assert called('{"name": "x') == (None, '{"name": "x', "") and called("[1]")[0] is None
    assert len(COURSE_SPECIAL_TOKENS) <= min(TOKENIZER.encode("[1]")) and tool_model.BASE.endswith("model")
