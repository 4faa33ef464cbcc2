"""Whatever a model says under a constraint is allowed, can be completed, and is drawn from the renormalised chances."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from byte_automata import MAX_REPEAT, build_dfa, expression_dfa, expression_of
from constrained_decoding import (
    MAX_SCHEMA_DEPTH,
    TokenAutomaton,
    TokenBytes,
    exact_outputs,
    json_constraint,
    regex_constraint,
    schema_constraint,
    schema_tree,
)
from course_tokenizer import FOLDER, load_course_tokenizer
from engine_requests import RequestParams, new_row
from request_sampling import choose, filtered_probs

COURSE = load_course_tokenizer()
WORDS = TokenBytes(COURSE)
LIBRARY = TokenBytes(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))


class Spelled:
    """A tokenizer for tests: ids spell the given texts; <end> is special."""

    special_tokens = ("<end>",)

    def __init__(self, *texts: str) -> None:
        self.spellings = dict(enumerate(texts))

    def token_bytes(self, token_id: int) -> bytes:
        return self.spellings[token_id].encode()


def bytes_left(constraint: TokenAutomaton) -> np.ndarray:
    """How many bytes each state is from the nearest complete text."""
    table, far = constraint.dfa.table, 10**6
    left = np.where(constraint.dfa.accepting, 0, far)
    while True:
        nearer = np.minimum(left, left[table].min(axis=1) + 1)
        nearer[constraint.dfa.dead] = far
        if (nearer == left).all():
            return left
        left = nearer


def written(constraint: TokenAutomaton, seed: int, n_free: int = 40) -> str:
    """A text of random tokens; after n_free of them the ones that lead to an end most directly."""
    generator = torch.Generator().manual_seed(seed)
    row = new_row(RequestParams(seed=seed, constraint=constraint, temperature=1.5), [0])
    left = bytes_left(constraint)
    vocab, ends = len(constraint.words), [COURSE.eos_id]
    for step in range(400):
        logits = 2 * torch.randn(1, vocab, generator=generator)
        if step >= n_free:
            after = left[constraint.words.ends(constraint.dfa.table, row.constraint_state)]
            logits[0, constraint.words.by_length] = torch.tensor(-100.0 * after, dtype=torch.float32)
            logits[0, ends] = 1000.0
        (token_id,) = choose(logits, [row], ends).ids
        if token_id in ends:
            return COURSE.decode(row.new_ids)
        assert token_id >= 16  # no special token
        row.constraint_state = constraint.advance(row.constraint_state, token_id)
        row.new_ids.append(token_id)
    raise AssertionError("the text never ended")


# Tokens


def test_tokens_spell_what_they_decode_to(parity) -> None:
    assert len(WORDS) == len(COURSE.spellings) and not any(WORDS.spelled[:16]) and all(WORDS.spelled[16:])
    parity("TokenBytes of topic 06", "tokenizers' byte-level vocabulary", "exchange", LIBRARY.spelled, WORDS.spelled, 0)
    ids = COURSE.encode("Ännä lives 🙂 in 2026.")
    assert b"".join(WORDS.spelled[token_id] for token_id in ids).decode() == "Ännä lives 🙂 in 2026."


def test_a_model_may_have_more_tokens_than_its_tokenizer() -> None:
    wide = TokenBytes(COURSE, vocab_size=2100)
    mask = regex_constraint("a+", wide).allowed(0)
    assert (
        mask.shape == (2100,)
        and not mask[2048:].any()
        and torch.equal(mask[:2048], regex_constraint("a+", WORDS).allowed(0))
    )
    with pytest.raises(ValueError, match="the model has 2000 tokens but the tokenizer 2048: not a pair"):
        TokenBytes(COURSE, vocab_size=2000)
    with pytest.raises(ValueError, match="the model has 2047 tokens but the tokenizer 2048: not a pair"):
        TokenBytes(COURSE, vocab_size=2047)
    assert len(TokenBytes(COURSE, vocab_size=2048)) == 2048


def test_sentencepiece_tokens_and_strange_ones() -> None:
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = TokenBytes(tokenizer)
    assert words.spelled[1:4] == [b" a", b"b", b"\0"] and words.spelled[3 + 255] == b"\xff"
    strange = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="tokens with the decoder None are no strings of bytes; use a byte-level one"):
        TokenBytes(strange)


def test_a_token_that_was_added_spells_its_text() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.add_tokens(["naïve!"])
    assert TokenBytes(tokenizer).spelled[-1] == "naïve!".encode()


# Masks


@pytest.mark.parametrize("pattern", ["(ab)*c", "a(bc|d)*e?", "x|abab", "[abc]{0,5}", "(a|b)(c|ab)*", "c+b?"])
@pytest.mark.parametrize("texts", [("ab", "c"), ("a", "bc", "e", "cc"), ("abab", "b", "ca"), ("x", "cb", "c", "bab")])
def test_states_that_no_tokens_complete_are_found(pattern: str, texts: tuple[str, ...]) -> None:
    words = TokenBytes(Spelled(*texts, "<end>"))
    dfa = expression_dfa(pattern)
    whole = {state for state in range(len(dfa.table)) if dfa.accepting[state]}
    while more := {
        state
        for state in range(len(dfa.table))
        if state not in whole and any(dfa.run(text.encode(), state) in whole for text in texts)
    }:
        whole |= more
    if 0 not in whole:
        with pytest.raises(ValueError, match="no tokens of this vocabulary spell"):
            TokenAutomaton(dfa, words)
        return
    found = TokenAutomaton(dfa, words)
    assert set(np.nonzero(~found.stuck)[0].tolist()) == whole
    for token_id in (len(texts), len(words)):  # none of them spells anything
        with pytest.raises(ValueError, match="is not allowed here"):
            found.advance(0, token_id)
    with pytest.raises(ValueError, match=r"token -1 \(None\) is not allowed here"):
        regex_constraint("a", TokenBytes(Spelled("<end>", "a"))).advance(0, -1)


def test_a_mask_holds_exactly_the_tokens_that_can_be_completed() -> None:
    """Against brute force: a token may come next if and only if some text that matches begins so."""
    pattern = r"(ab|abc|é)x{0,2}|a1"
    texts = [head + "x" * n for head in ("ab", "abc", "é") for n in range(3)] + ["a1"]
    assert all(re.fullmatch(pattern, text) for text in texts)
    spelled = ["a", "b", "ab", "abc", "bx", "é", "xx", "xxx", "x", "a1", "1", "abx", "exx", "<end>", ""]
    words = TokenBytes(Spelled(*spelled))
    words.single = set(range(256))  # as if the other bytes were tokens: what can be completed is what begins a text
    constraint = regex_constraint(pattern, words)
    for begun in ([], [0], [2], [5], [0, 1], [2, 8], [3]):
        state, said = 0, "".join(spelled[token_id] for token_id in begun)
        for token_id in begun:
            state = constraint.advance(state, token_id)
        can = [bool(text) and any(whole.startswith(said + text) for whole in texts) for text in spelled]
        assert constraint.allowed(state).tolist() == [
            ok and text != "<end>" for ok, text in zip(can, spelled, strict=True)
        ]
        assert constraint.may_end(state) == (said in texts)


def test_no_token_leads_where_no_tokens_lead_on() -> None:
    words = TokenBytes(Spelled("ab", "aba", "c", "<end>"))
    constraint = regex_constraint("abab|abc", words)
    assert constraint.allowed(0).tolist() == [True, False, False, False]  # after "aba" a "b" is missing
    state = constraint.advance(0, 0)
    assert constraint.allowed(state).tolist() == [True, False, True, False] and not constraint.may_end(state)
    with pytest.raises(ValueError, match=r"token 1 \(b'aba'\) is not allowed here"):
        constraint.advance(0, 1)
    with pytest.raises(ValueError, match="no tokens of this vocabulary spell a text that matches"):
        regex_constraint("abb", words)
    for token_id in (3, 99):
        with pytest.raises(ValueError, match=rf"token {token_id} \(None\) is not allowed here"):
            constraint.advance(0, token_id)


@pytest.mark.parametrize("words", [WORDS, LIBRARY], ids=["topic 06", "tokenizers"])
def test_from_every_state_every_token_leaves_a_way_to_the_end(words: TokenBytes) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "number"}, "é": {"enum": ["🙂", 'a"b', None]}},
        "required": ["é"],
    }
    for constraint in (regex_constraint(r"[^\d]{1,3}\d+|é{2}", words), schema_constraint(schema, words)):
        left = bytes_left(constraint)
        for state in range(constraint.dfa.dead):
            mask = constraint.allowed(state)
            assert not mask[:16].any()
            assert mask.any() or constraint.may_end(state)
            for token_id in mask.nonzero()[:, 0].tolist():
                assert left[constraint.advance(state, token_id)] < 10**6


PATTERNS = (r"\d{4}-\d\d-\d\d", "(yes|no|maybe)( é+)?", "[^a]*🙂", ".{3,9}", r"Anna (lives|works) in [A-Z]\w+\.")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 999))
def test_random_models_write_only_what_matches(pattern: str, seed: int) -> None:
    text = written(regex_constraint(pattern, WORDS), seed, n_free=8)
    assert re.fullmatch(pattern, text, re.ASCII)


def test_the_chances_under_a_constraint_are_the_models_renormalised(parity) -> None:
    logits = torch.randn(1, len(WORDS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constraint = regex_constraint(r"[a-f]+( \d)?", WORDS)
    row = new_row(RequestParams(seed=0, constraint=constraint), [0])
    for text in ("", "a", "bad", "bad 7"):
        row.constraint_state = constraint.dfa.run(text.encode())
        allowed = constraint.allowed(row.constraint_state).clone()
        allowed[COURSE.eos_id] = constraint.may_end(row.constraint_state)
        probs = logits.softmax(1)[0] * allowed
        ours = filtered_probs(logits, [row], [COURSE.eos_id])[0]
        parity("constrained step", "probabilities renormalised", "invariant", ours, probs / probs.sum(), 1e-12)
    assert choose(logits, [row], [COURSE.eos_id]).ids == [COURSE.eos_id]  # nothing else is left


def letters(*texts: str) -> TokenBytes:
    return TokenBytes(Spelled("<end>", *texts))


def test_dividing_each_step_is_not_conditioning() -> None:
    """The chapter's example: "ab" is nearly always forbidden for this model, yet nearly always written."""
    chances = {(): {1: 0.9, 3: 0.1}, (1,): {2: 0.01, 1: 0.99}, (3,): {1: 1.0}, (1, 2): {0: 1.0}, (3, 1): {0: 1.0}}

    def next_probs(ids: tuple[int, ...]) -> Tensor:
        return torch.tensor([chances[ids].get(token_id, 0.0) for token_id in range(4)], dtype=torch.float64)

    found = exact_outputs(next_probs, regex_constraint("ab|ca", letters("a", "b", "c")), end_id=0)
    assert found.constrained == pytest.approx({(1, 2): 0.9, (3, 1): 0.1})
    assert found.conditioned == pytest.approx({(1, 2): 0.009 / 0.109, (3, 1): 0.1 / 0.109})


def test_enumeration_agrees_with_draws_and_refuses_what_never_ends() -> None:
    table = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    table = table / table.sum(1, keepdim=True)
    constraint = regex_constraint("[ab]c{0,1}a?|b", letters("a", "b", "c"))
    found = exact_outputs(lambda ids: table[ids[-1] if ids else 0], constraint, end_id=0)
    assert sum(found.constrained.values()) == pytest.approx(1) == sum(found.conditioned.values())
    rows = [new_row(RequestParams(seed=seed, constraint=constraint), [0]) for seed in range(3000)]
    drawn: list[tuple[int, ...]] = []
    while rows:
        ids = choose(table[[(row.new_ids or [0])[-1] for row in rows]].log(), rows, [0]).ids
        for row, token_id in zip(rows, ids, strict=True):
            if token_id:
                row.new_ids.append(token_id)
                row.constraint_state = constraint.advance(row.constraint_state, token_id)
            else:
                drawn.append(tuple(row.new_ids))
        rows = [row for row, token_id in zip(rows, ids, strict=True) if token_id]
    assert set(drawn) <= set(found.constrained)
    for answer, chance in found.constrained.items():
        assert drawn.count(answer) / 3000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 3000) ** 0.5)
    with pytest.raises(ValueError, match="answers of more than 16 tokens"):
        exact_outputs(lambda ids: table[0], regex_constraint("a*", letters("a", "b", "c")), end_id=0)


# JSON


def thing(properties: dict, *required: str, **more) -> dict:
    return {"type": "object", "properties": properties, "required": list(required)} | more


SHORT, WHOLE = {"type": "string", "maxLength": 9}, {"type": "integer"}
SCHEMAS = [
    thing({"name": SHORT, "age": WHOLE}, "name", "age"),
    thing({"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"type": "number"}}, "b", additionalProperties=False),
    thing({"a": {"const": 1}, "b": {"const": 2}}),
    {"type": "array", "items": {"enum": ["x", 'say "é"', 3, None, {"k": [1, True]}]}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": {"type": "array", "items": WHOLE, "maxItems": 2}, "maxItems": 2},
    {"type": "string", "pattern": "^[A-Z][a-z]+$"},
    {"type": "string", "pattern": 'x"|\\\\\\n'},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"anyOf": [WHOLE, thing({"é": {"type": "string", "enum": ["ü", 4]}}, "é")]},
    {"type": ["number", "null", "boolean"], "title": "a note"},
    {"type": "object"},
    thing({"any": {}, "more": True}, "any", "more"),
    thing({"arguments": thing({"town": SHORT}, "town")}, "arguments"),
]


def test_true_is_not_one_in_a_schema() -> None:
    dfa = build_dfa(schema_tree({"enum": [True, 1, [1], [True]], "const": 1}))
    assert dfa.matches("1") and not dfa.matches("true") and not dfa.matches("[1]")


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_whatever_is_written_parses_and_is_valid(number: int) -> None:
    schema = SCHEMAS[number]
    constraint = schema_constraint(schema, WORDS)
    texts = {written(constraint, seed, n_free=25) for seed in range(4)}
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
        assert re.fullmatch(expression_of(schema_tree(schema)), text)
    assert len(texts) > 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=4) | st.floats(-1e9, 1e9, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
def test_json_objects_of_python_are_accepted_up_to_the_depth(value: dict) -> None:
    constraint = json_constraint(WORDS, depth=3)
    for blanks in ((",", ":"), (", ", ": ")):
        text = json.dumps(value, ensure_ascii=False, separators=blanks)
        assert constraint.dfa.matches(text) == (depth_of(value) <= 3)
        assert not constraint.dfa.matches(text[:-1]) and not constraint.dfa.matches(text + " ")


def test_json_objects_of_random_models_parse() -> None:
    constraint = json_constraint(WORDS, depth=2)
    for seed in range(6):
        assert isinstance(json.loads(written(constraint, seed)), dict)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_valid_values_in_the_order_of_the_schema_are_accepted(number: int) -> None:
    good = [
        ['{"name":"Ännä","age":-3}', '{"name": "", "age": 0}'],
        ['{"b":null}', '{"a": true, "b": null, "c": -1.5e+3}', '{"b":null,"c":0}'],
        ["{}", '{"a":1}', '{"b": 2}', '{"a":1,"b":2}'],
        ['["x",null]', '["say \\"é\\"",3,{"k": [1, true]}]'],
        ["[]", "[[1,-2],[]]"],
        ['"Anna"'],
        ['"so x\\" it is"', '"\\\\\\n"'],
        ['"\\u0001é"', '"abcde"'],
        ["-7", '{"é":"ü"}'],
        ["null", "1e5", "false"],
        ["{}", '{"a": {"b": 1}}', '{"a": [1]}'],
        ['{"any":[1,[2]],"more":{"x":null}}'],
        ['{"arguments": {"town": "Oslo"}}'],
    ][number]
    bad = [
        ['{"age":1,"name":"a"}', '{"name":"a"}', '{"name":"aaaaaaaaaaaaa","age":1}', '{"name":"a","age":01}'],
        ["{}", '{"a":true}', '{"b":null,}', '{"b":null,"c":.5}', '{"a":true,"b":null,"a":true}', '{,"b":null}'],
        ['{"a":2}', '{"b":2,"a":1}', '{"a":1 ,"b":2}', '{"a":1,  "b":2}'],
        ['["x"]', '["x","x","x","x"]', '["y","x"]', '["x" "x"]'],
        ["[[1,2,3]]", "[[1],[2],[3]]", "[1]"],
        ['"anna"', '"Anna "', "Anna"],
        ['"x"', '"\\"x"'],
        ['"a"', '"abcdef"', '"a\nb"', '"a"b"', '"\\x"'],
        ['{"é":4}', "1.5", "{}"],
        ["NaN", "Infinity", "True", "1.", "1e999", '"1"'],
        ["[]", '{"a": {"b": [{}]}}', "{} "],
        ['{"any":[[[1]]],"more":1}', '{"any":1}'],
        ['{"arguments": {}}', '{"arguments": {"town": "too long a name"}}'],
    ][number]
    dfa = build_dfa(schema_tree(SCHEMAS[number]))
    for text in good:
        jsonschema.validate(json.loads(text), SCHEMAS[number])
        assert dfa.matches(text), text
    for text in bad:
        assert not dfa.matches(text), text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 3}, r"the schema's 'minimum' at \$ is not supported here, only type"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, r"the type at \$\.a is None; choose from object, "),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, r"the type at \$\.a is 'text'; choose from"),
        ({"oneOf": []}, r"the type at \$ is None"),
        ({"anyOf": []}, r"the schema at \$\.anyOf should be a list with at least one entry, got \[\]"),
        ({"type": "object", "required": ["x"], "properties": {}}, r"\$ requires 'x', which its properties lack"),
        ({"type": "object", "additionalProperties": True}, r"additionalProperties at \$ is not supported unless false"),
        ({"type": "object", "required": [["x"]], "properties": {}}, r"\$ requires \['x'\], which its properties lack"),
        ({"type": ["string", ["x"]], "enum": ["a"]}, r"the type at \$ is \['string', \['x'\]\]; choose from object"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern beside minLength or maxLength"),
        ({"type": "string", "pattern": "(?!a)"}, r"'\(\?!' is not supported"),
        ({"type": "string", "maxLength": -1}, r"maxLength at \$ must be a whole number in 0\.\.2000, got -1"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, r"minItems=3 at \$ is more than maxItems=2"),
        ({"type": "string", "enum": [1]}, "no value of enum or const at"),
        ({"enum": [float("nan")]}, "not JSON compliant"),
        (3, r"the schema at \$ should be an object, got 3"),
        ({"type": "array", "items": False}, r"the schema at \$\[\] should be an object, got False"),
    ],
)
def test_schemas_that_are_not_understood_are_refused_by_name(schema: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema_constraint(schema, WORDS)


def test_depth_is_bounded() -> None:
    schema: dict = {"type": "integer"}
    for _ in range(18):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="is more than 16 schemas deep"):
        schema_constraint(schema, WORDS)
    with pytest.raises(ValueError, match=r"depth=6 must be in 1\.\.5"):
        json_constraint(WORDS, depth=6)


def test_masks_are_kept_and_bounded(monkeypatch) -> None:
    import constrained_decoding

    constraint = regex_constraint("a{9}", WORDS)
    assert constraint.allowed(3) is constraint.allowed(3)
    monkeypatch.setattr(constrained_decoding, "MAX_MASKS", 2)
    first = constraint.allowed(0).clone()
    for state in range(9):
        constraint.allowed(state)
        assert len(constraint.masks) <= 2
    assert torch.equal(constraint.allowed(0), first)


def test_words_of_any_vocabulary_are_found_by_search() -> None:
    """All tokens at once against one after the other."""
    rng = random.Random(0)
    constraint = json_constraint(WORDS, depth=2)
    for state in rng.sample(range(constraint.dfa.dead), 12):
        one_by_one = [bool(data) and constraint.dfa.run(data, state) != constraint.dfa.dead for data in WORDS.spelled]
        assert constraint.allowed(state).tolist() == one_by_one


def test_numbers_are_those_of_json_and_none_is_beyond_a_float() -> None:
    whole, number = (build_dfa(schema_tree({"type": kind})) for kind in ("integer", "number"))
    for text in ("0", "-0", "7", "-120", "9" * 18):
        assert whole.matches(text) and number.matches(text) and json.loads(text) == int(text)
    largest = f"-{'9' * 18}.{'9' * 24}E+99"
    for text in ("0.5", "1e5", "1E-7", "10.25e+10", f"0.{'0' * 23}1", largest):
        assert number.matches(text) and not whole.matches(text) and abs(json.loads(text)) < 1e120
    for text in ("", "-", "01", "+1", "--1", "1.", ".5", "1e", "1e100", "9" * 19, f"0.{'1' * 25}", "1e5.0"):
        assert not whole.matches(text) and not number.matches(text)


def test_characters_of_a_string_are_written_as_json_wants_them() -> None:
    string = build_dfa(schema_tree({"type": "string"}))
    for code in (*range(0x30), 0x5B, 0x5C, 0x5D, 0x7F, 0x80, 0xD7FF, 0xE000, 0x10FFFF):
        raw = f'"{chr(code)}"'
        assert string.matches(json.dumps(chr(code), ensure_ascii=False))
        assert string.matches(raw) == (code >= 0x20 and chr(code) not in '"\\')  # RFC 8259, section 7


def test_schemas_in_schemas_are_read_to_the_limit_and_equal_values_are_equal_in_any_order() -> None:
    def nested(n: int) -> dict:
        return {"type": "null"} if n == 0 else {"type": "array", "items": nested(n - 1), "maxItems": 1}

    assert build_dfa(schema_tree(nested(MAX_SCHEMA_DEPTH))).matches("[" * 16 + "null" + "]" * 16)
    with pytest.raises(ValueError, match="more than 16 schemas deep"):
        schema_tree(nested(MAX_SCHEMA_DEPTH + 1))
    assert build_dfa(schema_tree({"type": "object"}, depth=0)).matches('{"a": 1, "b": "c"}')  # has members all the same
    one = schema_tree({"enum": [{"a": 1, "b": 2}, 7], "const": {"b": 2, "a": 1}})
    assert build_dfa(one).matches('{"a": 1, "b": 2}') and not build_dfa(one).matches("7")


def test_bounds_are_whole_numbers_up_to_the_limit_and_may_be_equal() -> None:
    two = build_dfa(schema_tree({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}))
    assert [two.matches(f"[{', '.join(['null'] * n)}]") for n in (1, 2, 3)] == [False, True, False]
    schema_tree({"type": "string", "maxLength": MAX_REPEAT})
    for wrong in (MAX_REPEAT + 1, True, -1, 2.0):
        with pytest.raises(ValueError, match="maxLength at . must be a whole number"):
            schema_tree({"type": "string", "maxLength": wrong})


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "number", "enum": [True, 1, 2.5]}, ["1", "2.5"], ["true"]),
        ({"type": "integer", "enum": [True, 1, 2.0, 2.5]}, ["1", "2.0"], ["true", "2.5"]),
        ({"type": "boolean", "enum": [True, 1]}, ["true"], ["1"]),
        (
            {"properties": {'a"b\\': {"type": "null"}}, "type": "object"},
            ['{"a\\"b\\\\":null}', "{}"],
            ['{"a"b\\":null}'],
        ),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ["{}", '{"a": 1}'], ["[]"]),
    ],
)
def test_values_by_hand(schema: dict, right: list[str], wrong: list[str]) -> None:
    found = build_dfa(schema_tree(schema))
    for text in right:
        jsonschema.validate(json.loads(text), schema)
        assert found.matches(text)
    assert not any(found.matches(text) for text in wrong)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "additionalProperties": {"type": "null"}}, "additionalProperties at . is not supported"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "pattern beside minLength or maxLength"),
        ({"type": "string", "pattern": "a", "maxLength": 1}, "pattern beside minLength or maxLength"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "'type' at . is not supported here, only anyOf"),
    ],
)
def test_what_would_be_read_by_half_is_refused(schema: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        schema_tree(schema)


@pytest.mark.parametrize(
    "around", [lambda s: {"anyOf": [s]}, lambda s: {"type": "object", "properties": {"a": s}}, lambda s: {"items": s}]
)
def test_schemas_in_schemas_of_every_kind_count(around) -> None:
    schema: dict = {"type": "null"}
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        schema = {"type": "array"} | around(schema) if "items" in around(schema) else around(schema)
    with pytest.raises(ValueError, match="more than 16 schemas deep"):
        schema_tree(schema)


def test_an_answer_as_long_as_the_limit_is_enumerated_and_the_order_of_properties_is_kept() -> None:
    words = TokenBytes(Spelled("a", "<end>"))
    even = torch.tensor([0.5, 0.5])
    found = exact_outputs(lambda ids: even, regex_constraint("aaa", words), 1, longest=3)
    assert list(found.constrained) == [(0, 0, 0)]
    with pytest.raises(ValueError, match="more than 2 tokens"):
        exact_outputs(lambda ids: even, regex_constraint("aaa", words), 1, longest=2)
    with pytest.raises(ValueError, match=r"depth=0 must be in 1..5"):
        json_constraint(WORDS, depth=0)
    names = {"b": {"type": "null"}, "a": {"type": "null"}}
    ordered = schema_constraint({"type": "object", "properties": names, "required": ["a", "b"]}, WORDS)
    assert ordered.dfa.matches('{"b":null,"a":null}') and not ordered.dfa.matches('{"a":null,"b":null}')
