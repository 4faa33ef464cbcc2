"""Tests of chat_tools: what may run, what a model can write, and a calculator that only calculates."""

import json
import random
import string
from fractions import Fraction

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chat_tools
from chat_tools import (
    MAX_CALL,
    MAX_RESULT,
    TOOLS,
    Tool,
    calculate,
    call_or_text,
    call_schema,
    call_tool,
    course_world,
    object_of,
    text_of,
    tools_constraint,
    with_question,
)
from constrained_decoding import TokenBytes
from course_tokenizer import COURSE_SPECIAL_TOKENS, load_course_tokenizer
from document_loaders import course_chapters
from retrieval_answers import Answer, Citation

TOKENIZER = load_course_tokenizer()
WORDS = TokenBytes(TOKENIZER)
FEW = {name: TOOLS[name] for name in ("calculator", "look_up")}
ECHO = Tool("echo", "Says it again.", object_of(text=text_of(1, 9), n={"type": "integer"}), lambda text, n: text * n)


def call(name: str, **arguments: object) -> dict:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        ("2 ^ 3 ** 2", "512"),
        ("-2^2", "-4"),
        ("2^-2", "0.25"),
        ("-(3 - 5) * 2.5", "5"),
        ("7 - 4 - 2", "1"),
        ("100 / 8 / 2", "6.25"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("1/3", "about 0.333333333333"),
        ("-1/8", "-0.125"),
        ("0.1 + 0.2", "0.3"),
        ("6 × 7 − 2 ÷ 1", "40"),
        ("999999999999 * 999999999999", "999999999998000000000001"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1/0", "division by zero"),
        ("5 % (2 - 2)", "division by zero"),
        ("0^-1", "division by zero"),
        ("2^129", "at most 128"),
        ("9^99^99", "more than 40 digits"),
        ("2^0.5", "whole number"),
        ("((((9^100)^100)^100)^100)^100", "more than 40 digits"),
        ("9" * 41, "more than 40 digits"),
        ("(" * 25 + "1" + ")" * 25, "at most 20 parentheses"),
        ("1^" * 90 + "1", "at most 20 parentheses"),
        ("(1", "not closed"),
        ("1 2", "cannot read '2'"),
        ("1.2.3", "expected a number"),
        ("", "expected a number"),
        ("__import__('os')", "expected a number at .__import__"),
        ("٣ + 1", "expected a number"),
        ("1+" * 200 + "1", "at most 200 characters"),
    ],
)
def test_the_calculator_refuses_with_the_reason(expression, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        calculate(expression)


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_calculator_agrees_with_fractions(seed):
    rng = random.Random(seed)

    def tree(depth: int) -> tuple[str, Fraction]:
        if depth == 0 or rng.random() < 0.2:
            number = rng.randrange(1000)
            return str(number), Fraction(number)
        sign = rng.choice("+-*/")
        (left, a), (right, b) = tree(depth - 1), tree(depth - 1)
        if sign == "/" and b == 0:
            sign = "+"
        value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[sign]()
        return f"({left} {sign} {right})", value

    text, value = tree(3)
    found = calculate(text)
    if found.startswith("about "):
        assert float(found.removeprefix("about ")) == pytest.approx(float(value), rel=1e-11)
    else:
        assert Fraction(found) == value


def test_a_call_that_fits_runs():
    assert call_tool(call("calculator", expression="20 + 22"), TOOLS) == ("42", "", ())
    world = course_world()
    person = world.unseen[0]
    assert call_tool(call("look_up", person=person, property="pet"), TOOLS).text == (
        f"{person} owns a {world.facts[person]['pet']}."
    )
    assert call_tool(call("echo", text="ab", n=3), {"echo": ECHO}).text == "ababab"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "a call is an object with name and arguments"),
        ([1], "a call is an object"),
        ({"name": "calculator"}, "a call is an object"),
        ({**call("calculator", expression="1"), "as": "root"}, "and nothing else"),
        (call("delete_files"), "no tool 'delete_files' here; there are calculator, look_up"),
        ({"name": ["calculator"], "arguments": {}}, "no tool"),
        ({"name": "calculator", "arguments": "1"}, "are an object, got str"),
        (call("calculator"), "calculator needs the argument expression"),
        (call("calculator", expression=1), "expression of calculator must be"),
        (call("calculator", expression="x"), "expression of calculator must be"),
        (call("calculator", expression="1\n"), "expression of calculator must be"),
        (call("calculator", expression="1", base=2), "has no argument 'base'"),
        (call("calculator", expression="1" * MAX_CALL), f"at most {MAX_CALL}"),
        (call("calculator", expression="\ud800"), "expression of calculator must be"),
        (call("calculator", expression=float("nan")), "no JSON"),
        (call("calculator", expression={1, 2}), "no JSON"),
        (call("look_up", person="Noah Wood", property="password"), "property of look_up must be"),
        (call("look_up", person="<|im_start|>", property="pet"), "person of look_up must be"),
        (call("look_up", person="Zzz Zzz", property="pet"), "nothing is known of Zzz Zzz"),
    ],
)
def test_a_bad_call_is_an_error_and_no_exception(bad, reason):
    found = call_tool(bad, FEW)
    assert reason in found.error and found.text == f"Error: {found.error}" and not found.citations


def test_a_call_that_nests_without_end_is_an_error():
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    assert "no JSON" in call_tool(call("calculator", expression=deep), FEW).error


def test_only_what_the_caller_allows_runs():
    ran = []
    tool = Tool("danger", "", object_of(), lambda: ran.append(1) or "done")
    assert "no tool" in call_tool(call("danger"), TOOLS).error and not ran
    assert call_tool(call("danger"), {"danger": tool}).text == "done" and ran


def test_a_defective_tool_gives_an_error_without_its_details():
    def broken() -> str:
        raise KeyError("secret path")

    found = call_tool(call("broken"), {"broken": Tool("broken", "", object_of(), broken)})
    assert found.error == "KeyError in the tool"


def test_results_are_short_and_show_no_hidden_characters():
    tool = Tool("long", "", object_of(), lambda: "a\u200b\x1b[31m\x00" + "b" * 10_000)
    text = call_tool(call("long"), {"long": tool}).text
    assert len(text) == MAX_RESULT and text.startswith("a [31m b") and text.endswith(" ...")


def test_an_answer_keeps_its_citations():
    place = Citation("a.md#b", ("A", "B"), "shared", "A passage.")
    answer = Answer("why?", (("Because.", 1),), (place,), 1.0)
    tool = Tool("find", "", object_of(), lambda: answer)
    found = call_tool(call("find"), {"find": tool})
    assert found.citations == (place,) and found.text.startswith("Because. [1]")


@pytest.fixture
def two_chapters(monkeypatch):
    """The index of two chapters in place of fifteen, which takes seconds."""
    chapters = [item for item in course_chapters() if item.source[:2] in ("03", "06")]
    monkeypatch.setattr(chat_tools, "course_chapters", lambda: chapters)
    chat_tools.course_index.cache_clear()
    yield
    chat_tools.course_index.cache_clear()


def test_the_course_is_searched_and_the_rest_of_the_world_is_not(two_chapters):
    found = call_tool(call("search_course", query="why divide by the square root of the width?"), TOOLS)
    assert found.citations[0].link.startswith("03-attention-mechanisms/README.md#why-divide")
    nothing = call_tool(call("search_course", query="Which bank offers the cheapest mortgage?"), TOOLS)
    assert not nothing.citations and "do not answer" in nothing.text
    assert "empty" in call_tool(call("search_course", query=" "), TOOLS).error


def accepts(constraint, text: str) -> bool:
    state = constraint.start()
    try:
        for token_id in TOKENIZER.encode(text):
            if not constraint.allowed(state)[token_id]:
                return False
            state = constraint.advance(state, token_id)
    except ValueError:
        return False
    return constraint.may_end(state)


def test_the_constraint_admits_valid_calls_and_nothing_else():
    constraint = tools_constraint(FEW, WORDS)
    good = [call("calculator", expression="(1+2)*3"), call("look_up", person="Noah Wood", property="job")]
    bad = [
        call("search_course", query="x"),
        call("calculator", expression=""),
        call("calculator", expression="import os"),
        call("look_up", person="Noah Wood", property="salary"),
        call("look_up", person="Noah Wood"),
        call("calculator", expression="1", more="1"),
        {"arguments": {"expression": "1"}, "name": "calculator"},
    ]
    schema = call_schema(FEW)
    for item in good:
        jsonschema.validate(item, schema)
        assert accepts(constraint, json.dumps(item)) and not call_tool(item, FEW).error
    for item in bad:
        assert not accepts(constraint, json.dumps(item))
    for text in ("", "12", json.dumps(good[0])[:-1], json.dumps(good[0]) + "x", "Sure: " + json.dumps(good[0])):
        assert not accepts(constraint, text)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_model_draws_is_a_call_that_passes_the_check(seed):
    generator = torch.Generator().manual_seed(seed)
    echo = Tool("echo", "", object_of(text=text_of(1, 9), n={"enum": [1, 2]}), lambda text, n: text * n)
    tools = {**FEW, "echo": echo}
    constraint, state, ids = tools_constraint(tools, WORDS), 0, []
    while not (constraint.may_end(state) and not constraint.allowed(state).any()):
        weights = constraint.allowed(state).double()
        token_id = int(torch.multinomial(weights, 1, generator=generator))
        ids.append(token_id)
        state = constraint.advance(state, token_id)
    made = json.loads(TOKENIZER.decode(ids))
    error = call_tool(made, tools).error
    assert "must be" not in error and "no argument" not in error and "no tool" not in error
    assert min(ids) >= len(COURSE_SPECIAL_TOKENS)


def test_the_first_token_decides_between_a_call_and_text():
    constraint, special = call_or_text(FEW, WORDS, TOKENIZER.tool_call_id), len(COURSE_SPECIAL_TOKENS)
    first = constraint.allowed(constraint.start())
    assert [int(i) for i in first[:special].nonzero()[:, 0]] == [TOKENIZER.tool_call_id] and first[special:].all()
    assert not constraint.may_end(constraint.start())
    written = json.dumps(call("calculator", expression="1 + 1"))
    state = constraint.advance(constraint.start(), TOKENIZER.tool_call_id)
    for token_id in TOKENIZER.encode(written):
        assert not constraint.may_end(state) and constraint.allowed(state)[token_id]
        state = constraint.advance(state, token_id)
    assert constraint.may_end(state)
    state = constraint.start()
    for token_id in TOKENIZER.encode("<|tool_call|>" + written + " and so on"):  # spelled out, it is text
        assert token_id >= special and constraint.allowed(state)[token_id]
        state = constraint.advance(state, token_id)
        assert constraint.may_end(state)
    assert not constraint.allowed(state)[:special].any()
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(state, TOKENIZER.tool_call_id)


def test_the_users_words_become_the_only_query():
    question = 'why "divide"?\u200b <|im_end|>'
    tools = with_question(TOOLS, question)
    constraint = tools_constraint({"search_course": tools["search_course"]}, WORDS)
    exact = call("search_course", query='why "divide"? <|im_end|>')
    assert accepts(constraint, json.dumps(exact))
    assert not accepts(constraint, json.dumps(call("search_course", query="something else")))
    assert tools["calculator"] is TOOLS["calculator"]
    assert len(with_question(TOOLS, "x" * 1000)["search_course"].parameters["properties"]["query"]["const"]) == 200


def test_a_tool_needs_a_schema_of_an_object():
    with pytest.raises(ValueError, match="must be a JSON schema of an object"):
        Tool("bad", "", {"type": "string"}, str)
    with pytest.raises(ValueError, match="at least one"):
        call_schema({})


def test_every_description_and_name_is_plain_text():
    for name, tool in TOOLS.items():
        assert name == tool.name and set(name) <= set(string.ascii_lowercase + "_") and tool.description.endswith(".")
        jsonschema.Draft202012Validator.check_schema(tool.parameters)
