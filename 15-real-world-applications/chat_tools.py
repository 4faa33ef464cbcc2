"""Topic 15 - Chat tools: what a model may call, checked before it runs - a calculator, the world's facts, the course.

    result = call_tool({"name": "calculator", "arguments": {"expression": "12 * 7"}}, TOOLS)   # ToolResult("84")
    constraint = tools_constraint(TOOLS, words)                    # a model can write nothing but a valid call
    constraint = call_or_text(TOOLS, words, tool_call_id)          # it may also just answer

A call is data from a model, and so from whoever wrote what the model reads. It runs only if its name is on the list
that the caller gives and its arguments are what the tool's JSON schema says, and it gets back text of a bounded size.
The schema that a constraint is built from is the one that a call is checked with.
"""

import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from constrained_decoding import TokenAutomaton, TokenBytes, schema_constraint, schema_dfa
from document_index import SHARED, DocumentIndex
from document_loaders import course_chapters
from retrieval_answers import Answer, Citation, answer_from, render_text, safe_text
from tiny_world import ATTRIBUTES, World, join

MAX_CALL = 2000  # characters of a call's arguments, as JSON
MAX_RESULT = 2000  # characters of a result that anybody is shown


@dataclass(frozen=True)
class Tool:
    """Something that a model may call.

    run takes the arguments by name and gives a text, or an Answer whose citations are kept. A ValueError of its is told
    to the model as the reason why there is no result.
    """

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of an object
    run: Callable[..., str | Answer]
    final: bool = False  # the result is the answer itself: no model speaks after it
    phrase: str = "{result}"  # the result as an answer; may name arguments

    def __post_init__(self) -> None:
        if self.parameters.get("type") != "object" or not isinstance(self.parameters.get("properties"), dict):
            raise ValueError(f"the parameters of {self.name!r} must be a JSON schema of an object with properties")


class ToolResult(NamedTuple):
    """What a call gave. With an error the text says it too, in words for the model."""

    text: str
    error: str = ""
    citations: tuple[Citation, ...] = ()  # the places that [1], [2], ... in the text stand for


def call_tool(call: object, allowed: Mapping[str, Tool]) -> ToolResult:
    """Run {"name": ..., "arguments": {...}} if it is on the list and its arguments fit; never raises for a bad call.

    allowed: the tools that may run here, by name. A result has at most MAX_RESULT characters, without control
    characters and characters that no reader sees; so has an error.
    """
    try:
        tool, arguments = checked_call(call, allowed)
        found = tool.run(**arguments)
    except ValueError as error:
        return failed(str(error))
    except Exception as error:  # a defect of a tool is no reason to end a conversation
        return failed(f"{type(error).__name__} in the tool")
    if isinstance(found, Answer):
        sentences = render_text(found).partition("\n\n")[0]  # the places behind them are in the citations
        return ToolResult(shortened(without_marks(sentences)), "", found.citations)
    return ToolResult(shortened(found))


def without_marks(text: str) -> str:
    """Markdown's marks for lists, emphasis and formulas taken out of sentences, which are shown as text."""
    return re.sub(r"(?m)^[-*] |\*\*|\$`|`\$", "", text)


def failed(reason: str) -> ToolResult:
    reason = shortened(reason)
    return ToolResult(f"Error: {reason}", reason)


def shortened(text: str) -> str:
    text = safe_text(text[: 2 * MAX_RESULT])
    return text if len(text) <= MAX_RESULT else text[: MAX_RESULT - 4] + " ..."


def checked_call(call: object, allowed: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool of a call and its arguments. Raises ValueError naming what is wrong with it."""
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        raise ValueError("a call is an object with name and arguments, and nothing else")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"there is no tool {str(name)[:40]!r} here; there are {', '.join(allowed) or 'none'}")
    tool = allowed[name]
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} are an object, got {type(arguments).__name__}")
    try:
        size = len(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"the arguments of {name} are no JSON") from None
    if size > MAX_CALL:
        raise ValueError(f"the arguments of {name} have {size} characters, at most {MAX_CALL} are read")
    check_arguments(tool, arguments)
    return tool, arguments


def check_arguments(tool: Tool, arguments: dict[str, Any]) -> None:
    """Hold arguments against a schema by the automata that constrain a model: one reading of a schema, not two."""
    properties = tool.parameters["properties"]
    for name in tool.parameters.get("required", ()):
        if name not in arguments:
            raise ValueError(f"{tool.name} needs the argument {name}")
    for name, value in arguments.items():
        if name not in properties:
            raise ValueError(f"{tool.name} has no argument {name[:40]!r}; it has {', '.join(properties) or 'none'}")
        written = json.dumps(value, ensure_ascii=False)
        try:
            fits = schema_dfa(json.dumps(properties[name]), 2).matches(written)
        except UnicodeEncodeError:  # half a surrogate pair: no text
            fits = False
        if not fits:
            wanted = {key: rule for key, rule in properties[name].items() if key != "description"}
            raise ValueError(f"{name} of {tool.name} must be {json.dumps(wanted)[:120]}, got {written[:60]}")


# Constraints: what a model can write


def call_schema(tools: Mapping[str, Tool]) -> dict[str, Any]:
    """The JSON schema of one valid call of any of these tools."""
    if not tools:
        raise ValueError("no tools to call; give at least one")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
        }
        for name, tool in tools.items()
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def tools_constraint(tools: Mapping[str, Tool], words: TokenBytes) -> TokenAutomaton:
    """Topic 13's schema constraint that admits exactly the valid calls of these tools, as JSON."""
    return schema_constraint(call_schema(tools), words)


def text_mask(words: TokenBytes) -> Tensor:
    """Which tokens spell something: all but the special ones. (vocab), bool."""
    return torch.tensor([data is not None for data in words.spelled])  # (vocab)


class CallOrText:
    """Either ordinary text, or the token that begins a call and then a valid call: the first token decides.

    A text that merely looks like a call stays text: the token that begins one is spelled by no characters.
    """

    def __init__(self, calls: TokenAutomaton, tool_call_id: int) -> None:
        self.calls, self.tool_call_id = calls, tool_call_id
        self.text = text_mask(calls.words)  # (vocab)
        self.first = self.text.clone()  # (vocab)
        self.first[tool_call_id] = True

    def start(self) -> Hashable:
        return "first"

    def allowed(self, state: Hashable) -> Tensor:
        return self.first if state == "first" else self.text if state == "text" else self.calls.allowed(state)

    def advance(self, state: Hashable, token_id: int) -> Hashable:
        if isinstance(state, int):
            return self.calls.advance(state, token_id)
        if state == "first" and token_id == self.tool_call_id:
            return self.calls.start()
        if not (0 <= token_id < len(self.text) and self.text[token_id]):
            raise ValueError(f"token {token_id} is not allowed here")
        return "text"

    def may_end(self, state: Hashable) -> bool:
        return state == "text" or (isinstance(state, int) and self.calls.may_end(state))


def call_or_text(tools: Mapping[str, Tool], words: TokenBytes, tool_call_id: int, spaced: bool = False) -> CallOrText:
    """The constraint under which a model answers or calls one of the tools; see CallOrText, and `spaced_call`."""
    if spaced:
        tools = {name: replace(tool, parameters=spaced_schema(tool.parameters)) for name, tool in tools.items()}
    return CallOrText(tools_constraint(tools, words), tool_call_id)


# Calls for small models: every text in them begins with a blank


def spaced_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose texts begin with a blank, as words in a sentence do.

    A word after a blank and the same word after a quotation mark are different tokens: a model that cannot spell has to
    know both, and to copy a name that it never saw it would have to translate. With the blank, copying is copying.
    """
    arguments = {name: f" {value}" if isinstance(value, str) else value for name, value in call["arguments"].items()}
    return {**call, "arguments": arguments}


def unspaced_call(call: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `spaced_call`; a call without such blanks stays as it is."""
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return call
    plain = {name: value[value[:1] == " " :] if isinstance(value, str) else value for name, value in arguments.items()}
    return {**call, "arguments": plain}


def spaced_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of arguments whose texts begin with a blank: those with enum, const or a pattern from the start on.

    Raises ValueError for a text of another kind.
    """
    properties = {}
    for name, rule in parameters["properties"].items():
        if isinstance(rule.get("const"), str):
            rule = {**rule, "const": f" {rule['const']}"}
        elif "enum" in rule:
            rule = {**rule, "enum": [f" {value}" if isinstance(value, str) else value for value in rule["enum"]]}
        elif rule.get("pattern", "").startswith("^"):
            rule = {**rule, "pattern": "^ " + rule["pattern"][1:]}
        elif rule.get("type") == "string":
            raise ValueError(f"the text {name} needs an enum, a const or a pattern that begins with ^ to be spaced")
        properties[name] = rule
    return {**parameters, "properties": properties}


# The calculator


MAX_EXPRESSION, MAX_PARENTHESES, MAX_DIGITS, MAX_EXPONENT = 200, 20, 40, 128
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: + - * / // % ^ and parentheses over decimal numbers, exact.

    A value that is no finite decimal of at most 12 digits is given with 12 significant digits after "about". Raises
    ValueError, with the reason, for anything else, for a division by zero and for numbers of more than 40 digits.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters, got {len(expression)}")
    return written_number(Expression(expression.translate(SIGNS)).value())


class Expression:
    """A parser by recursive descent, one method for each strength of binding; it knows numbers and nothing else."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0

    def value(self) -> Fraction:
        found = self.sum()
        if self.peek():
            raise ValueError(f"cannot read {self.text[self.place :][:20]!r} in the expression")
        return found

    def peek(self) -> str:
        """The next sign, "" at the end."""
        while self.place < len(self.text) and self.text[self.place] == " ":
            self.place += 1
        two = self.text[self.place : self.place + 2]
        return two if two in ("//", "**") else two[:1]

    def take(self, *signs: str) -> str:
        """The next sign if it is one of these, else ""."""
        found = self.peek()
        if not found or found not in signs:
            return ""
        self.place += len(found)
        return found

    def sum(self) -> Fraction:
        left = self.product()
        while sign := self.take("+", "-"):
            right = self.product()
            left = bounded(left + right if sign == "+" else left - right)
        return left

    def product(self) -> Fraction:
        left = self.signed()
        while sign := self.take("*", "/", "//", "%"):
            right = self.signed()
            if sign != "*" and not right:
                raise ValueError("division by zero")
            left = bounded(DIVIDE[sign](left, right))
        return left

    def signed(self) -> Fraction:
        negative = False
        while sign := self.take("-", "+"):
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Fraction:
        base = self.atom()
        if not self.take("^", "**"):
            return base
        exponent = self.deeper(self.signed)  # binds to the right: 2 ^ 3 ^ 2 is 2 ^ 9
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise ValueError(f"an exponent is a whole number of at most {MAX_EXPONENT}, got {written_number(exponent)}")
        if not base and exponent < 0:
            raise ValueError("division by zero")
        size = max(abs(base.numerator), base.denominator).bit_length() * abs(int(exponent))
        if size > 8 * MAX_DIGITS:  # before it is computed
            raise too_large()
        return bounded(base ** int(exponent))

    def atom(self) -> Fraction:
        if self.take("("):
            value = self.deeper(self.sum)
            if not self.take(")"):
                raise ValueError("a parenthesis is not closed in the expression")
            return value
        self.peek()
        start = self.place
        while self.place < len(self.text) and self.text[self.place] in "0123456789.":
            self.place += 1
        digits = self.text[start : self.place]
        if not digits.strip(".") or digits.count(".") > 1:
            raise ValueError(f"expected a number at {self.text[start:][:20]!r}")
        return bounded(Fraction(digits))

    def deeper(self, read: Callable[[], Fraction]) -> Fraction:
        self.depth += 1
        if self.depth > MAX_PARENTHESES:
            raise ValueError(f"an expression has at most {MAX_PARENTHESES} parentheses in each other")
        value = read()
        self.depth -= 1
        return value


DIVIDE: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "//": lambda left, right: Fraction(left // right),
    "%": lambda left, right: left % right,
}


def bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise too_large()
    return value


def too_large() -> ValueError:
    return ValueError(f"a number of more than {MAX_DIGITS} digits comes up")


def written_number(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**12
    if scaled.denominator == 1:
        sign, digits = "-" * (scaled < 0), str(abs(scaled.numerator)).rjust(13, "0")
        return f"{sign}{digits[:-12]}.{digits[-12:].rstrip('0')}"
    return f"about {float(value):.12g}"


# The world and the course


@cache
def course_world() -> World:
    """The world that the course's models were told of."""
    return World()


def look_up(person: str, property: str) -> str:
    """One fact, as a sentence. Raises ValueError for a person of whom nothing is known."""
    facts = course_world().facts.get(person)
    if facts is None:
        raise ValueError(f"nothing is known of {person}")
    return join(f"{person} {ATTRIBUTES[property].verb} {facts[property]} .".split())


@cache
def course_index() -> DocumentIndex:
    """The chapters of this course, searched by words: built at the first question."""
    index = DocumentIndex()
    index.add(SHARED, course_chapters())
    return index


def search_course(query: str) -> Answer:
    """Sentences of the chapters with the places they come from, or none where no passage covers the question."""
    return answer_from(course_index(), query, [SHARED])


def text_of(least: int, most: int, **more: Any) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": most, **more}


def object_of(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


NAME = "^[A-Z][a-z]{1,20} [A-Z][a-z]{1,20}$"  # no list of the people who are known: it would turn a stranger into one
TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "calculator",
            "Computes an arithmetic expression exactly: + - * / // % ^ and parentheses.",
            object_of(expression={"type": "string", "pattern": "^[0-9.()+*/%^ -]{1,40}$"}),
            calculate,
            phrase="{expression} is {result}.",
        ),
        Tool(
            "look_up",
            "Says where a person lives, what work they do, which pet they own or which food they like.",
            object_of(person={"type": "string", "pattern": NAME}, property={"enum": [*ATTRIBUTES]}),
            look_up,
        ),
        Tool(
            "search_course",
            "Answers a question from the chapters of this course, with citations.",
            object_of(query=text_of(1, 200)),
            search_course,
            final=True,
        ),
    )
}


def with_question(tools: Mapping[str, Tool], question: str) -> dict[str, Tool]:
    """The tools, with the user's own words as the only query: a model that cannot spell them out need not.

    Only arguments called "query" change; the question is cut to what they take.
    """
    found = {}
    for name, tool in tools.items():
        properties = tool.parameters["properties"]
        if "query" in properties:
            cut = safe_text(question).strip()[: properties["query"].get("maxLength", MAX_CALL)]
            parameters = {**tool.parameters, "properties": {**properties, "query": {"const": cut}}}
            tool = replace(tool, parameters=parameters)
        found[name] = tool
    return found


# Grounding: arguments that the user said


SENTENCE_END, EDGES, MAX_WORDS = re.compile(r"[.?!](?:\s|$)"), ".,?!:;\"'", 8
OPERATOR = re.compile(r"[-+*/%^]")


def spans_of(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The runs of at most eight words within a sentence that fit, the longest from each word on."""
    found: dict[str, None] = {}
    for sentence in SENTENCE_END.split(text[:MAX_CALL]):
        words = sentence.split()
        for start in range(len(words)):
            for end in range(min(len(words), start + MAX_WORDS), start, -1):
                span = " ".join(words[start:end]).strip(EDGES)
                if span and fits(span):
                    found[span] = None
                    break
    return [*found]


def grounded(tools: Mapping[str, Tool], question: str) -> dict[str, Tool]:
    """The tools, with arguments that are restricted to what the question says, where it says something that fits.

    A query is the question itself; a text with a pattern is one of the question's own runs of words; one of several
    values is one that the question names; an arithmetic expression is written there, or joins the numbers that are, in
    their order. So a model chooses arguments and cannot invent or misspell them. Where nothing fits, the tool stays as
    it is.
    """
    found = {}
    for name, tool in with_question(tools, safe_text(question)).items():
        properties = {
            key: ground_expression(rule, question) if key == "expression" else ground(rule, question)
            for key, rule in tool.parameters["properties"].items()
        }
        found[name] = replace(tool, parameters={**tool.parameters, "properties": properties})
    return found


def ground(rule: dict[str, Any], question: str) -> dict[str, Any]:
    if "enum" in rule:
        said = set(re.findall(r"\w+", question.lower()))
        named = [value for value in rule["enum"] if isinstance(value, str) and value.lower() in said]
        return {"enum": named} if named else rule
    if "pattern" not in rule:
        return rule
    dfa = schema_dfa(json.dumps(rule), 2)
    spans = spans_of(question, lambda span: dfa.matches(json.dumps(span, ensure_ascii=False)))
    return {"enum": spans} if spans else rule


def ground_expression(rule: dict[str, Any], question: str) -> dict[str, Any]:
    dfa = schema_dfa(json.dumps(rule), 2)
    written = spans_of(
        question, lambda span: dfa.matches(json.dumps(span)) and OPERATOR.search(span.lstrip("-")) is not None
    )
    if written:
        return {"enum": written}
    numbers = [re.escape(number) for number in re.findall(r"\d+(?:\.\d+)?", question) if len(number) < 20][:6]
    return {"type": "string", "pattern": f"^{' [-+*/] '.join(numbers)}$"} if len(numbers) > 1 else rule
