"""Tests of server_schema: bodies that are no request, every field with every kind of wrong value, and what is made."""

import json
import math
import time

import pytest

from engine_requests import MAX_SEED, RequestParams
from server_schema import (
    MAX_BRACKETS,
    MAX_DEPTH,
    ApiError,
    ChatRequest,
    CompletionRequest,
    checked,
    read_object,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}
KINDS = {ChatRequest: CHAT, CompletionRequest: COMPLETION}


def refusal(kind, body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        checked(kind, read_object(body))
    error = caught.value
    assert error.status == 400
    assert error.content()["error"].keys() == {"message", "type", "param", "code"}
    assert error.content()["error"]["type"] == "invalid_request_error" and "\n" not in error.message
    return error


# HT1: bodies


BODIES = {
    "nothing": (b"", "not JSON"),
    "cut off": (b'{"model": "m", "prompt"', "not JSON"),
    "array": (b"[]", "must be a JSON object, got an array"),
    "null": (b"null", "got null"),
    "number": (b"42", "got a number"),
    "string": (b'"text"', "got a string"),
    "boolean": (b"true", "got a boolean"),
    "two objects": (b"{} {}", "not JSON"),
    "utf-16": (json.dumps(COMPLETION).encode("utf-16"), "not UTF-8 at byte 0"),
    "utf-16 without mark": (json.dumps(COMPLETION).encode("utf-16-le"), "not JSON"),
    "utf-8 with mark": (b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode(), "not JSON"),
    "bad utf-8": (b'{"model": "\xff"}', "not UTF-8 at byte 11"),
    "overlong utf-8": (b'{"model": "\xc0\xaf"}', "not UTF-8"),
    "100,000 arrays": (b"[" * 100_000, "opening brackets"),
    "100,000 objects": (b'{"a":' * 100_000, "opening brackets"),
    "5,000 arrays": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", f"deeper than {MAX_DEPTH}"),
    "65 levels": (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"deeper than {MAX_DEPTH}"),
    "5,000 digits": (b'{"model": "m", "prompt": "x", "seed": ' + b"7" * 5000 + b"}", "seed must be a finite number"),
    "5,000 digits deep": (b'{"logit_bias": {"5": -' + b"7" * 5000 + b"}}", "logit_bias.5 must be a finite number"),
    "key twice": (b'{"model": "m", "model": "n", "prompt": "x"}', "'model' stands twice"),
    "inner key twice": (b'{"logit_bias": {"5": 1, "5": 2}}', "'5' stands twice"),
    "control character": (b'{"model": "a\nb"}', "not JSON"),
    "half a surrogate pair": (b'{"model": "m", "prompt": "a\\ud800"}', "prompt has half of a surrogate pair"),
    "half a pair as key": (b'{"\\udfff": 1}', "half of a surrogate pair"),
    "single quotes": (b"{'model': 'm'}", "not JSON"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused_with_its_reason(name: str) -> None:
    body, reason = BODIES[name]
    assert reason in refusal(CompletionRequest, body).message


def test_a_megabyte_of_brackets_costs_no_time_and_a_text_of_many_is_read() -> None:
    before = time.process_time()
    refusal(CompletionRequest, b"[" + b"[]," * 330_000 + b"[]]")
    assert time.process_time() - before < 0.3  # parsing it would take more
    content = read_object(json.dumps({"prompt": "x[0]" * (MAX_BRACKETS // 2)}).encode())
    assert len(content["prompt"]) == 2 * MAX_BRACKETS


def test_nesting_up_to_the_limit_and_pairs_of_surrogates_are_read() -> None:
    deep = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert isinstance(read_object(deep)["a"], list)
    assert read_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert read_object(b'{"a": 18446744073709551615, "b": -1.5e3}') == {"a": 2**64 - 1, "b": -1500.0}


# HT2: each field with each kind of wrong value


WHOLE = {  # least, most
    "max_tokens": (1, None),
    "n": (1, 8),
    "seed": (0, MAX_SEED),
    "top_k": (-1, None),
    "max_completion_tokens": (1, None),
    "top_logprobs": (0, 20),
    "logprobs": (0, 20),
}
REAL = {
    "temperature": (0, 2),
    "top_p": (None, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
}
NULL_IS_NO_VALUE = {"top_k", "min_p", "repetition_penalty", "user", "response_format", "ignore_eos", "prompt", "model"}


def number_cases(name: str, least: float | None, most: float | None, whole: bool) -> list[tuple[str, object]]:
    """Wrong values of a field of numbers, as they stand in a body."""
    wrong = ["true", "false", '"1"', "[]", "[1]", "{}", "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000]
    wrong += ["0" if least is None else str(least - 1)] + ([] if most is None else [str(most + 1)])
    wrong += ["1.5", "2.0", str(10**19)] if whole else [str(10**19)]
    wrong += ["null"] if name in NULL_IS_NO_VALUE else []
    return [(name, value) for value in wrong]


TEXTS = ("true", "1", "[]", "{}", "NaN")
WRONG = [
    *(case for name, limits in WHOLE.items() for case in number_cases(name, *limits, whole=True)),
    *(case for name, limits in REAL.items() for case in number_cases(name, *limits, whole=False)),
    *(("model", value) for value in (*TEXTS, "null", '""')),
    *(("user", value) for value in (*TEXTS, "null", json.dumps("x" * 257))),
    *(("stream", value) for value in ("1", "0", '"true"', "[]", "{}", "NaN")),
    *(("ignore_eos", value) for value in ("1", '"true"', "null")),
    *(("stop", value) for value in ("true", "1", "{}", '""', '["a", ""]', "[1]", '["a", null]')),
    *(("stop", value) for value in ('["a", "b", "c", "d", "e"]', json.dumps("x" * 257))),
    *(("logit_bias", value) for value in ("true", "1", '"1"', "[]", '{"5": true}', '{"5": "1"}', '{"5": NaN}')),
    *(
        ("logit_bias", value)
        for value in ('{"5": 100.5}', '{"5": -101}', '{"-1": 1}', '{"x": 1}', '{"05": 1}', '{"5": null}')
    ),
    *(("stream_options", value) for value in ("true", "1", "[]", '{"include_usage": 1}', '{"other": true}')),
    *(("response_format", value) for value in ("null", "true", '"text"', "[]", "{}", '{"type": "xml"}', '{"type": 1}')),
    *(("response_format", value) for value in ('{"type": "json_schema"}', '{"type": "text", "more": 1}')),
]
IN_COMPLETIONS = [
    *(("prompt", value) for value in ("null", "true", "1", "{}", '""', "[]", '["a"]', "[1.0]", "[true]", "[-1]")),
    *(("prompt", value) for value in ("[1, null]", "[[1]]", "[4294967296]", "NaN")),
    *(("echo", value) for value in ("true", "1", '"no"')),
]
IN_CHAT = [
    *(("messages", value) for value in ("null", "true", "1", "{}", '"Hi"', "[]", "[null]", '["Hi"]', "[{}]")),
    *(("messages", f'[{{"role": "user", "content": {value}}}]') for value in ("null", "1", "true", "[]", "{}")),
    *(
        ("messages", f'[{{"role": {value}, "content": "x"}}]')
        for value in ("null", "1", '"tool"', '"User"', '"function"')
    ),
    ("messages", '[{"role": "user", "content": [{"type": "text", "text": "x"}]}]'),
    ("messages", '[{"role": "user", "content": "x", "name": "Ann"}]'),
    ("messages", '[{"role": "assistant", "content": "x", "tool_calls": []}]'),
    ("logprobs", "1"),
    ("logprobs", '"true"'),
]
CASES = [
    *((ChatRequest, *case) for case in WRONG if case[0] != "logprobs"),
    *((CompletionRequest, *case) for case in WRONG if case[0] in ("logprobs", "max_tokens", "temperature")),
    *((CompletionRequest, *case) for case in IN_COMPLETIONS),
    *((ChatRequest, *case) for case in IN_CHAT),
]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 240 and len({field for _, field, _ in CASES}) >= 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_wrong_value_is_refused_and_its_field_named(kind: type) -> None:
    """One test over all cases, which names those that pass: separate tests of so small a thing would cost more."""
    accepted = []
    for case_kind, name, value in CASES:
        if case_kind is not kind:
            continue
        fields = {key: json.dumps(item) for key, item in KINDS[kind].items()} | {name: value}
        if name == "top_logprobs":
            fields["logprobs"] = "true"
        if name == "stream_options":
            fields["stream"] = "true"
        body = "{" + ", ".join(f"{json.dumps(key)}: {item}" for key, item in fields.items()) + "}"
        try:
            checked(kind, read_object(body.encode()))
            accepted.append((name, value[:40]))
        except ApiError as error:
            assert error.status == 400 and error.param and error.param.split(".")[0] == name, (name, value, error.param)
            assert name in error.message and len(error.message) < 500
    assert accepted == []


def test_the_smallest_and_largest_values_are_accepted() -> None:
    for name, (least, most) in (WHOLE | REAL).items():
        kind = CompletionRequest if name == "logprobs" else ChatRequest
        more = {"logprobs": True} if name == "top_logprobs" else {}
        for value in (least, most):
            if value is not None:
                assert getattr(checked(kind, KINDS[kind] | more | {name: value}), name) == value


def test_null_means_left_out_where_the_reference_of_the_api_says_so() -> None:
    names = ("temperature", "top_p", "n", "stop", "max_tokens", "seed", "stream", "logit_bias", "logprobs")
    names += ("presence_penalty", "frequency_penalty", "stream_options")
    for kind, base in KINDS.items():
        assert checked(kind, base | dict.fromkeys(names)).params(10, 5) == checked(kind, base).params(10, 5)


@pytest.mark.parametrize(
    ("field", "advice"),
    [("temprature", "did you mean temperature?"), ("max_token", "did you mean max_tokens?"), ("tools", "supports")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(field: str, advice: str) -> None:
    error = refusal(ChatRequest, json.dumps(CHAT | {field: 1}).encode())
    assert error.param == field and error.code == "unknown_parameter" and error.message.endswith(advice)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field: str) -> None:
    content = {key: value for key, value in CHAT.items() if key != field}
    error = refusal(ChatRequest, json.dumps(content).encode())
    assert (error.param, error.code) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict, named: str) -> None:
    assert refusal(ChatRequest, json.dumps(CHAT | fields).encode()).param == named


# HT3: what is made of a request


def made(kind, **fields) -> RequestParams:
    [params] = checked(kind, KINDS[kind] | fields).params(vocab_size=50, room=30)
    return params


def test_defaults_are_those_of_the_api() -> None:
    assert made(CompletionRequest) == RequestParams(max_tokens=16, temperature=1.0, tenant="")
    assert made(ChatRequest).max_tokens == 30  # all the room there is
    assert checked(CompletionRequest, COMPLETION).params(50, room=7)[0].max_tokens == 7
    assert made(ChatRequest, max_completion_tokens=4).max_tokens == made(ChatRequest, max_tokens=4).max_tokens == 4


def test_zero_temperature_top_k_and_stops() -> None:
    assert made(ChatRequest, temperature=0).temperature == 0.0
    assert [made(ChatRequest, top_k=k).top_k for k in (-1, 0, 7, 50, 51, 10**9)] == [0, 0, 7, 50, 50, 50]
    assert made(ChatRequest, stop="end").stop == ("end",)
    assert made(ChatRequest, stop=["a", "b", "c", "d"]).stop == ("a", "b", "c", "d")
    assert made(ChatRequest, stop=[]).stop == ()
    assert made(ChatRequest, user="ann").tenant != made(ChatRequest, user="bob").tenant != made(ChatRequest).tenant


def test_logprobs_of_both_kinds() -> None:
    assert [made(CompletionRequest, logprobs=k).logprobs for k in (None, 0, 3)] == [-1, 0, 3]
    assert made(ChatRequest).logprobs == made(ChatRequest, logprobs=False).logprobs == -1
    assert made(ChatRequest, logprobs=True).logprobs == 0
    assert made(ChatRequest, logprobs=True, top_logprobs=5).logprobs == 5


def test_choices_differ_in_their_seeds_alone() -> None:
    several = checked(ChatRequest, CHAT | {"n": 3, "seed": MAX_SEED - 1, "temperature": 0.5}).params(50, 30)
    assert [params.seed for params in several] == [MAX_SEED - 1, MAX_SEED, 0]
    assert {params.temperature for params in several} == {0.5}
    assert [params.seed for params in checked(ChatRequest, CHAT | {"n": 2}).params(50, 30)] == [None, None]


def test_a_biased_token_that_the_model_does_not_have_is_named() -> None:
    assert made(ChatRequest, logit_bias={"49": -100, "0": 1.5}).logit_bias == ((49, -100.0), (0, 1.5))
    with pytest.raises(ApiError, match="names token 50, but the model has the ids 0 to 49") as caught:
        made(ChatRequest, logit_bias={"50": 1})
    assert caught.value.param == "logit_bias.50"


def test_a_schema_may_hold_what_it_likes_but_finite_numbers() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None, "maximum": 5}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    request = checked(ChatRequest, CHAT | {"response_format": wanted})
    assert request.response_format.json_schema.schema_ == schema
    schema["properties"]["a"]["maximum"] = math.inf
    error = refusal(ChatRequest, json.dumps(CHAT | {"response_format": wanted}).encode())
    assert error.param == "response_format.json_schema.schema.properties.a.maximum"
