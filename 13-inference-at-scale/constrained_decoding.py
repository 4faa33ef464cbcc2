"""Topic 13 - Constrained decoding: a model that can write nothing but what a regular expression or a schema allows.

    words = TokenBytes(tokenizer)                             # what each token spells; special ones are never allowed
    constraint = regex_constraint(r"\\d{4}-\\d{2}", words)    # for RequestParams(constraint=...)
    constraint = schema_constraint({"type": "object", "properties": {"age": {"type": "integer"}}}, words)
    constraint = json_constraint(words)                       # any JSON object of bounded depth

For each state of an automaton over bytes (byte_automata.py) there is a set of tokens after which the text can still be
completed (Willard and Louf 2023, arXiv 2307.09702). It is found when the state is first reached, and kept.
"""

import json
import math
import re
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from byte_automata import (
    ANY,
    ANYTHING,
    DIGITS,
    LAST_CHAR,
    MAX_REPEAT,
    Chain,
    Chars,
    Dfa,
    Either,
    Node,
    Repeat,
    build_dfa,
    chars,
    expression_dfa,
    literal,
    live_states,
    read_expression,
)
from byte_level_bpe import CHAR_BYTES
from engine_requests import Constraint

MAX_MASKS = 4096  # token masks that one constraint keeps
MAX_SCHEMA_DEPTH = 16  # schemas in schemas


# Tokens


class TokenBytes:
    """What each token of a vocabulary spells.

    Args:
        tokenizer: topic 06's, or one of the `tokenizers` library with byte-level or SentencePiece-like tokens
        vocab_size: tokens of the model, if it has more than the tokenizer

    `spelled[id]` is None for special tokens, for ids without a token and for tokens without bytes: a constraint never
    allows them. Raises ValueError for a tokenizer whose tokens are no strings of bytes.
    """

    def __init__(self, tokenizer, vocab_size: int | None = None) -> None:
        spelled = own_bytes(tokenizer) if hasattr(tokenizer, "token_bytes") else library_bytes(tokenizer)
        size = max(spelled, default=-1) + 1
        if vocab_size is not None and vocab_size < size:
            raise ValueError(f"the model has {vocab_size} tokens but the tokenizer {size}: not a pair")
        self.spelled = [spelled.get(token_id) or None for token_id in range(vocab_size or size)]
        self.by_length = sorted((i for i, data in enumerate(self.spelled) if data), key=lambda i: -len(self.spelled[i]))
        lengths = [len(self.spelled[token_id]) for token_id in self.by_length]
        self.counts = [sum(length > place for length in lengths) for place in range(max(lengths, default=0))]
        self.columns = [
            np.array([self.spelled[token_id][place] for token_id in self.by_length[:count]], dtype=np.uint8)
            for place, count in enumerate(self.counts)
        ]
        self.single = {data[0] for data in self.spelled if data and len(data) == 1}

    def __len__(self) -> int:
        return len(self.spelled)

    def ends(self, table: np.ndarray, state: int) -> np.ndarray:
        """The state of an automaton after each of the tokens `by_length`, all at once."""
        states = np.full(len(self.by_length), state, dtype=np.int32)
        for count, column in zip(self.counts, self.columns, strict=True):
            states[:count] = table[states[:count], column]
        return states


def own_bytes(tokenizer) -> dict[int, bytes]:
    special = set(tokenizer.special_tokens)
    return {i: b"" if text in special else tokenizer.token_bytes(i) for i, text in tokenizer.spellings.items()}


def library_bytes(tokenizer) -> dict[int, bytes]:
    """Ids to bytes for a tokenizer of the `tokenizers` library, by the kind of its decoder."""
    settings = json.loads(tokenizer.to_str())
    decoder = settings.get("decoder") or {}
    kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])] if "type" in part}
    special = {added["id"] for added in settings["added_tokens"] if added["special"]}
    added = {added["id"] for added in settings["added_tokens"]}
    spelled = {}
    for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in special:
            spelled[token_id] = b""
        elif token_id in added:
            spelled[token_id] = text.encode()
        elif "ByteLevel" in kinds:
            spelled[token_id] = bytes(CHAR_BYTES[char] for char in text)
        elif kinds & {"Metaspace", "ByteFallback"}:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
            spelled[token_id] = bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()
        else:
            raise ValueError(
                f"tokens with the decoder {decoder.get('type')} are no strings of bytes; use a byte-level one"
            )
    return spelled


class TokenAutomaton:
    """An automaton over bytes as a constraint on tokens: the `Constraint` of engine_requests. States are numbers.

    Every token that is allowed leaves a way to a complete text, by further tokens: where each byte that an automaton
    reads is itself a token this is so from the start, else it is found out. Raises ValueError if no tokens spell any
    text that matches.
    """

    def __init__(self, dfa: Dfa, words: TokenBytes) -> None:
        self.dfa, self.words = dfa, words
        self.masks: dict[int, Tensor] = {}
        self.stuck = np.zeros(len(dfa.table), dtype=bool)  # states that no tokens complete
        self.stuck[dfa.dead] = True
        needed = set(np.nonzero((dfa.table != dfa.dead).any(axis=0))[0].tolist())
        if not needed <= words.single:
            self.find_stuck()

    def find_stuck(self) -> None:
        backward: list[set[int]] = [set() for _ in self.dfa.table]
        for state in range(self.dfa.dead):
            for following in set(self.words.ends(self.dfa.table, state).tolist()):
                backward[following].add(state)
        live = live_states(backward, self.dfa.accepting.tolist())
        self.stuck[[state for state in range(len(self.stuck)) if state not in live]] = True
        if self.stuck[0]:
            raise ValueError("no tokens of this vocabulary spell a text that matches")

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> Tensor:
        if state not in self.masks:
            if len(self.masks) >= MAX_MASKS:
                self.masks.clear()
            mask = np.zeros(len(self.words), dtype=bool)
            mask[self.words.by_length] = ~self.stuck[self.words.ends(self.dfa.table, state)]
            self.masks[state] = torch.from_numpy(mask)  # (vocab)
        return self.masks[state]

    def advance(self, state: int, token_id: int) -> int:
        spelled = self.words.spelled[token_id] if 0 <= token_id < len(self.words) else None
        following = self.dfa.dead if spelled is None else self.dfa.run(spelled, state)
        if self.stuck[following]:
            raise ValueError(f"token {token_id} ({spelled!r}) is not allowed here")
        return following

    def may_end(self, state: int) -> bool:
        return bool(self.dfa.accepting[state])


def regex_constraint(pattern: str, words: TokenBytes) -> TokenAutomaton:
    """The whole answer matches a regular expression; see byte_automata for what it may contain."""
    return TokenAutomaton(expression_dfa(pattern), words)


# JSON


BLANK = Repeat(
    literal(" "), 0, 1
)  # at most one blank after a comma or a colon: a model cannot go on with blanks for ever
COMMA, COLON = Chain((literal(","), BLANK)), Chain((literal(":"), BLANK))
WHOLE = Either((literal("0"), Chain((chars((ord("1"), ord("9"))), Repeat(DIGITS, 0, 17)))))
INTEGER = Either((Chain((Repeat(literal("-"), 0, 1), WHOLE)),))
FRACTION = Chain((literal("."), Repeat(DIGITS, 1, 24)))  # a float that is written out needs up to 17 after zeros
EXPONENT = Chain((chars((69, 69), (101, 101)), Repeat(chars((43, 43), (45, 45)), 0, 1), Repeat(DIGITS, 1, 2)))
NUMBER = Chain((INTEGER, Repeat(FRACTION, 0, 1), Repeat(EXPONENT, 0, 1)))  # at most 1e99 times 18 digits: no infinity
BOOLEAN, NULL = Either((literal("true"), literal("false"))), literal("null")
SHORT_ESCAPES = {code: json.dumps(chr(code)) for code in (*range(0x20), ord('"'), ord("\\"))}


def in_string(node: Node) -> Node:
    """What a tree matches, as the inside of a JSON string: quotes, backslashes and control characters escaped."""
    if isinstance(node, Chars):
        escaped = [code for code in SHORT_ESCAPES if any(low <= code <= high for low, high in node.ranges)]
        kept = chars(*(pair for low, high in node.ranges for pair in without(low, high)))
        return Either((kept, *(literal(SHORT_ESCAPES[code][1:-1]) for code in escaped)))
    if isinstance(node, Chain):
        return Chain(tuple(in_string(part) for part in node.parts))
    if isinstance(node, Either):
        return Either(tuple(in_string(branch) for branch in node.branches))
    return Repeat(in_string(node.node), node.least, node.most)  # nothing stands between in a regular expression


def without(low: int, high: int) -> list[tuple[int, int]]:
    """A range of code points less those that a JSON string escapes."""
    plain = ((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST_CHAR))
    return [(max(low, first), min(high, last)) for first, last in plain if max(low, first) <= min(high, last)]


def string_of(node: Node) -> Node:
    return Chain((literal('"'), in_string(node), literal('"')))


STRING = string_of(ANYTHING)


def any_value(depth: int) -> Node:
    """Any JSON value with at most `depth` arrays and objects in each other."""
    scalar = (STRING, NUMBER, BOOLEAN, NULL)
    return Either(scalar if depth == 0 else (*scalar, any_object(depth), any_array(any_value(depth - 1), 0, None)))


def any_object(depth: int) -> Node:
    member = Chain((STRING, COLON, any_value(depth - 1)))
    return Chain((literal("{"), Repeat(member, 0, None, COMMA), literal("}")))


def any_array(item: Node, least: int, most: int | None) -> Node:
    return Chain((literal("["), Repeat(item, least, most, COMMA), literal("]")))


NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}  # say nothing about the value
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "string": {"pattern", "minLength", "maxLength"},
    "array": {"items", "minItems", "maxItems"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
JSON_TYPES = {
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "integer": lambda value: type(value) is int or (isinstance(value, float) and value.is_integer()),
    "number": lambda value: not isinstance(value, bool) and isinstance(value, int | float),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


class SchemaReader:
    """A JSON schema as a tree.

    Understood: `type` (one or several), `properties` (written in their order), `required`, `additionalProperties`
    (false), `pattern` (as byte_automata reads it; it may match anywhere, as the standard says), `minLength`,
    `maxLength`, `items`, `minItems`, `maxItems`, `enum`, `const`, `anyOf`, and notes such as `title`. A value without a
    type is any value with at most `depth` arrays and objects in each other. Raises ValueError for anything else, with
    its place.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def tree(self, schema: object, path: str = "$", level: int = 0) -> Node:
        if level > MAX_SCHEMA_DEPTH:
            raise ValueError(f"the schema at {path} is more than {MAX_SCHEMA_DEPTH} schemas deep")
        if schema is True:
            return any_value(self.depth)
        if not isinstance(schema, dict):
            raise ValueError(f"the schema at {path} should be an object, got {schema!r:.60}")
        said = {name: value for name, value in schema.items() if name not in NOTES}
        if not said:
            return any_value(self.depth)
        if "anyOf" in said:
            self.check(said, {"anyOf"}, path)
            branches = self.listed(said["anyOf"], f"{path}.anyOf")
            return Either(tuple(self.tree(own, f"{path}.anyOf[{i}]", level + 1) for i, own in enumerate(branches)))
        if "enum" in said or "const" in said:
            return self.one_of(said, path)
        kinds = said.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        for kind in kinds:
            if not isinstance(kind, str) or kind not in KEYWORDS:
                raise ValueError(f"the type at {path} is {kind!r}; choose from {', '.join(KEYWORDS)}")
        self.check(said, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)), path)
        return Either(tuple(self.typed(kind, said, path, level) for kind in kinds))

    def check(self, said: dict, known: set[str], path: str) -> None:
        for name in said:
            if name not in known:
                raise ValueError(
                    f"the schema's {name!r} at {path} is not supported here, only {', '.join(sorted(known))}"
                )

    def listed(self, value: object, path: str) -> list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"the schema at {path} should be a list with at least one entry, got {value!r:.60}")
        return value

    def one_of(self, said: dict, path: str) -> Node:
        self.check(said, {"type", "enum", "const"}, path)
        values = self.listed(said["enum"], f"{path}.enum") if "enum" in said else [said["const"]]
        values = [value for value in values if "const" not in said or same_json(value, said["const"])]
        kinds = said.get("type", list(JSON_TYPES))
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not all(isinstance(kind, str) and kind in JSON_TYPES for kind in kinds):
            raise ValueError(f"the type at {path} is {said['type']!r}; choose from {', '.join(KEYWORDS)}")
        values = [value for value in values if any(JSON_TYPES[kind](value) for kind in kinds)]
        if not values:
            raise ValueError(f"no value of enum or const at {path} has the type that stands beside it")
        return Either(tuple(literal(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values))

    def typed(self, kind: str, said: dict, path: str, level: int) -> Node:
        if kind == "object":
            return self.object_of(said, path, level)
        if kind == "array":
            item = self.tree(said["items"], f"{path}[]", level + 1) if "items" in said else any_value(self.depth)
            return any_array(item, *self.bounds(said, "minItems", "maxItems", path))
        if kind == "string":
            return self.string(said, path)
        return {"integer": INTEGER, "number": NUMBER, "boolean": BOOLEAN, "null": NULL}[kind]

    def bounds(self, said: dict, low: str, high: str, path: str) -> tuple[int, int | None]:
        for name in (low, high):
            if name in said and (type(said[name]) is not int or not 0 <= said[name] <= MAX_REPEAT):
                raise ValueError(f"{name} at {path} must be a whole number in 0..{MAX_REPEAT}, got {said[name]!r}")
        least, most = said.get(low, 0), said.get(high)
        if most is not None and least > most:
            raise ValueError(f"{low}={least} at {path} is more than {high}={most}")
        return least, most

    def string(self, said: dict, path: str) -> Node:
        least, most = self.bounds(said, "minLength", "maxLength", path)
        if "pattern" not in said:
            return string_of(Repeat(ANY, least, most))
        if "minLength" in said or "maxLength" in said:
            raise ValueError(f"pattern beside minLength or maxLength at {path} is not supported; count in the pattern")
        if not isinstance(said["pattern"], str):
            raise ValueError(f"the pattern at {path} should be a text, got {said['pattern']!r:.60}")
        return string_of(read_expression(said["pattern"], search=True))

    def object_of(self, said: dict, path: str, level: int) -> Node:
        properties, required = said.get("properties", {}), said.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise ValueError(f"properties at {path} should be an object and required a list")
        if said.get("additionalProperties", False) is not False:
            raise ValueError(f"additionalProperties at {path} is not supported unless false; name the properties")
        unknown = [name for name in required if not isinstance(name, str) or name not in properties]
        if unknown:
            raise ValueError(f"{path} requires {unknown[0]!r}, which its properties lack")
        if not properties and "properties" not in said and "additionalProperties" not in said:
            return any_object(max(self.depth, 1))
        return Chain((literal("{"), self.members(list(properties.items()), set(required), path, level), literal("}")))

    def members(self, properties: list[tuple[str, object]], required: set[str], path: str, level: int) -> Node:
        """Members in order, those that are not required present or absent, and commas between those present.

        Built from the end: after a member that is there, the others follow with a comma before them.
        """
        first: Node = Chain(())  # the rest of the object if nothing stands before it
        later: Node = Chain(())  # the rest if something does
        for name, schema in reversed(properties):
            value = self.tree(schema, f"{path}.{name}", level + 1)
            member = Chain((literal(json.dumps(name, ensure_ascii=False)), COLON, value))
            with_it, with_comma = Chain((member, later)), Chain((COMMA, member, later))
            first = with_it if name in required else Either((with_it, first))
            later = with_comma if name in required else Either((with_comma, later))
        return first


def same_json(left: object, right: object) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def schema_tree(schema: object, depth: int = 2) -> Node:
    """The tree of a JSON schema; see SchemaReader. `expression_of` turns it into a regular expression."""
    return SchemaReader(depth).tree(schema)


@lru_cache(maxsize=64)
def schema_dfa(text: str, depth: int) -> Dfa:
    return build_dfa(schema_tree(json.loads(text), depth))


def schema_constraint(schema: object, words: TokenBytes, depth: int = 2) -> TokenAutomaton:
    """The whole answer is one JSON value of a schema; see SchemaReader for what it may contain.

    Raises ValueError for a schema that is not understood, naming keyword and place, or that needs too many states.
    """
    return TokenAutomaton(schema_dfa(json.dumps(schema), depth), words)


@lru_cache(maxsize=4)
def json_dfa(depth: int) -> Dfa:
    return build_dfa(any_object(depth))


def json_constraint(words: TokenBytes, depth: int = 3) -> TokenAutomaton:
    """The whole answer is one JSON object with at most `depth` arrays and objects in each other."""
    if not 1 <= depth <= 5:
        raise ValueError(f"depth={depth} must be in 1..5: each level doubles the automaton")
    return TokenAutomaton(json_dfa(depth), words)


# What a constraint does to a distribution


class Outputs(NamedTuple):
    """Chances of all answers of a small language, each a tuple of ids; see `exact_outputs`."""

    constrained: dict[tuple[int, ...], float]  # token by token, as constrained decoding draws
    conditioned: dict[tuple[int, ...], float]  # the model's own, given that the answer is one of the allowed ones


def exact_outputs(
    next_probs: Callable[[tuple[int, ...]], Tensor], constraint: Constraint, end_id: int, longest: int = 16
) -> Outputs:
    """Enumerate what a constraint lets a model say: next_probs(ids) is (vocab,), the end included.

    Dividing each step by what is allowed there is not dividing the whole by what is allowed in all: a first token whose
    continuations are nearly all forbidden keeps its full chance. Raises ValueError if answers exceed `longest` tokens.
    """
    constrained: dict[tuple[int, ...], float] = {}
    own: dict[tuple[int, ...], float] = {}

    def walk(ids: tuple[int, ...], state: Hashable, forced: float, free: float) -> None:
        if len(ids) > longest:
            raise ValueError(f"the constraint allows answers of more than {longest} tokens; they cannot be enumerated")
        probs, mask = next_probs(ids), constraint.allowed(state).clone()
        mask[end_id] = constraint.may_end(state)
        mass = float(probs[mask].sum())
        for token_id in mask.nonzero()[:, 0].tolist():
            chance = float(probs[token_id])
            if token_id == end_id:
                constrained[ids], own[ids] = forced * chance / mass, free * chance
            elif chance > 0:
                walk((*ids, token_id), constraint.advance(state, token_id), forced * chance / mass, free * chance)

    walk((), constraint.start(), 1.0, 1.0)
    total = math.fsum(own.values())
    return Outputs(constrained, {ids: chance / total for ids, chance in own.items()})
