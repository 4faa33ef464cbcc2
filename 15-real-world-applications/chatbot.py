"""Topic 15 - Chatbot: history within the context, tools, memory, guards and citations, as one stream of events.

    bot = open_chatbot()                                          # the course's tool model, computing in this process
    bot = open_chatbot("http://127.0.0.1:8000")                   # any server of OpenAI's API
    conversation = Conversation(); conversation.ask("What is 345 plus 67?")
    for event in bot.reply(conversation): print(event.kind, event.text)

The terminal, the web page and the tests see the same events. A turn is: guard the question; keep as much history as the
context holds; let the model answer, or call a tool and then answer; show a sentence once the guard has read it.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, NamedTuple, Protocol

from chat_endpoint import Endpoint, HttpEndpoint, LocalEndpoint
from chat_memory import Memory, memory_tools
from chat_tools import (
    TOOLS,
    Tool,
    ToolResult,
    call_or_text,
    call_schema,
    call_tool,
    grounded,
    text_mask,
    unspaced_call,
)
from constrained_decoding import TokenBytes
from content_guard import load_guard
from retrieval_answers import Citation
from served_model import CourseServing, ServedModel
from stream_redaction import Redactor
from tool_model import SYSTEM, call_message, load_tool_model
from workbench import check_range

Message = dict[str, Any]
Kind = Literal["token", "call", "result", "refusal", "citation", "notice", "end"]


class Event(NamedTuple):
    """One thing that happens in a turn.

    token: text to show; the data of the first has the milliseconds until then by stage. call, result: of a tool; data
    has its name, and arguments or error. citation: a place; data has number, link, headings, passage. refusal: what is
    said in place of an answer; data has side (in, out) and category. notice: what the user should know. end: always
    the last; data has reason, n_dropped and milliseconds by stage.
    """

    kind: Kind
    text: str = ""
    data: Mapping[str, Any] = {}  # noqa: RUF012 - never written to


@dataclass
class Conversation:
    """What was said, as messages of the user and the assistant in turn, and what is to be remembered.

    Calls and results of earlier turns are not kept: their answers are. The system prompt is the chatbot's, not part of
    a conversation, and nobody who talks can write to it.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def ask(self, text: str) -> "Conversation":
        """Add a question."""
        self.messages.append({"role": "user", "content": text})
        return self


@dataclass(frozen=True)
class ChatbotConfig:
    """How the chatbot behaves."""

    max_tokens: int = 100  # tokens of an answer
    reserve: int = 90  # tokens kept free for a call and its result
    max_calls: int = 1  # calls of tools in a turn; the course's tool model has learned one
    restate: bool = False  # let the model speak after a result; otherwise the result is the answer
    temperature: float = 0.0  # 0 takes the most likely token
    guard: bool = True  # stop questions and answers that the content guard blocks
    guard_limit: float = 0.6  # its least score for that
    redact: bool = True  # leave secrets and personal data out of answers
    system: str = SYSTEM  # the system prompt

    def __post_init__(self) -> None:
        check_range(self, "max_tokens", "reserve", least=1)
        check_range(self, "max_calls", least=0, most=8)
        check_range(self, "temperature", least=0)
        check_range(self, "guard_limit", above=0, most=1)


# History


def exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """Messages in groups that each begin with one of the user's."""
    groups: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def fit_history(
    messages: Sequence[Message], count: Callable[[Sequence[Message]], int], room: int
) -> tuple[list[Message], int]:
    """The newest messages that fit, and how many exchanges were dropped: whole ones, from the oldest on.

    count gives the tokens of messages in the model's template. The last exchange, which holds the question, is never
    dropped. Raises ValueError if it alone does not fit.
    """
    groups = exchanges(messages)
    if not groups or groups[-1][-1]["role"] != "user":
        raise ValueError("the conversation does not end with a message of the user's; ask something")
    sizes = [count(group) for group in groups]
    if sizes[-1] > room:
        raise ValueError(f"the message has {sizes[-1]} tokens and there is room for {max(room, 0)}; shorten it")
    n_kept, used = 1, sizes[-1]
    while n_kept < len(groups) and used + sizes[-1 - n_kept] <= room:
        used += sizes[-1 - n_kept]
        n_kept += 1
    return [message for group in groups[-n_kept:] for message in group], len(groups) - n_kept


# Who speaks: a model here, or one elsewhere


class Piece(NamedTuple):
    """A piece of what a model says: text, or a whole call."""

    text: str
    call: dict[str, Any] | None = None


class Speaker(Protocol):
    """What a chatbot needs of a model."""

    context: int  # tokens of prompt and answer together

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of these messages in the model's template, without what begins an answer."""

    def speak(self, messages: Sequence[Message], tools: Mapping[str, Tool], **settings: Any) -> Iterator[Piece]:
        """The next turn: pieces of text, or one call of one of the tools."""


class PlainText:
    """The constraint of a turn without calls: any text, no special token."""

    def __init__(self, words: TokenBytes) -> None:
        self.mask = text_mask(words)  # (vocab)

    def start(self) -> int:
        return 0

    def allowed(self, state: int):
        return self.mask

    def advance(self, state: int, token_id: int) -> int:
        return 0

    def may_end(self, state: int) -> bool:
        return True


class CourseSpeaker:
    """A model with the course tokenizer: its template, its token for calls, and topic 13's constraints.

    Args:
        endpoint: topic 13's engine, or anything with LocalEndpoint's served, engine, begin and follow
    """

    def __init__(self, endpoint: LocalEndpoint) -> None:
        self.endpoint = endpoint
        self.tokenizer = endpoint.served.tokenizer.tokenizer
        self.context = endpoint.engine.max_context
        self.words = TokenBytes(self.tokenizer, endpoint.served.model.config.vocab_size)
        self.plain = PlainText(self.words)

    def count(self, messages: Sequence[Message]) -> int:
        return len(self.tokenizer.chat(messages).ids)

    def speak(self, messages: Sequence[Message], tools: Mapping[str, Tool], **settings: Any) -> Iterator[Piece]:
        prompt = self.tokenizer.chat(messages, add_generation_prompt=True).ids
        call_id = self.tokenizer.tool_call_id
        settings["constraint"] = call_or_text(tools, self.words, call_id, spaced=True) if tools else self.plain
        settings["max_tokens"] = max(1, min(settings["max_tokens"], self.context - len(prompt)))
        outputs = self.endpoint.follow(self.endpoint.begin(prompt, settings))
        written: list[int] = []  # ids of a call, which is decided by an id and not by any text
        with closing(outputs):
            for output, _ in outputs:
                if written or output.new_ids[:1] == [call_id]:
                    written += output.new_ids
                elif output.text:
                    yield Piece(output.text)
        if written:
            ends = (self.tokenizer.im_end_id, self.tokenizer.eos_id)
            text = self.tokenizer.decode([*takewhile(lambda token_id: token_id not in ends, written[1:])])
            yield Piece("", unspaced_call(read_call(text)))


def read_call(text: str) -> dict[str, Any]:
    """A call that a model wrote; one that was cut off, or that a server without constraints let pass, has no name.

    No tool runs for a call without a name.
    """
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    fits = isinstance(call, dict) and isinstance(call.get("name"), str)
    return call if fits else {"name": "", "arguments": {}}


NO_CALL = {
    "type": "object",
    "properties": {"name": {"const": "none"}, "arguments": {"type": "object", "properties": {}}},
    "required": ["name", "arguments"],
}
TOOL_PROMPT = 'Reply with one JSON object that calls the tool that answers the user, or with the name "none":'


class RemoteSpeaker:
    """A model behind OpenAI's API: a first answer under a JSON schema says which tool, a second one speaks.

    Args:
        endpoint: any Endpoint
        context: tokens that the model reads; its tokenizer is not known here, so a token is taken to be two characters
    """

    def __init__(self, endpoint: Endpoint, context: int = 4096) -> None:
        self.endpoint, self.context = endpoint, context

    def count(self, messages: Sequence[Message]) -> int:
        return sum(len(json.dumps(message, ensure_ascii=False).encode()) for message in messages) // 2

    def speak(self, messages: Sequence[Message], tools: Mapping[str, Tool], **settings: Any) -> Iterator[Piece]:
        spoken = [plain_message(message) for message in messages]
        if tools:
            listed = "\n".join(f"{tool.name}: {tool.description}" for tool in tools.values())
            system = {"role": "system", "content": f"{spoken[0]['content']}\n{TOOL_PROMPT}\n{listed}"}
            calls = call_schema(tools)
            schema = {"anyOf": [*calls.get("anyOf", [calls]), NO_CALL]}
            reply = self.endpoint.chat([system, *spoken[1:]], **{**settings, "schema": schema, "max_tokens": 200})
            call = read_call(reply.text)
            if call["name"] != "none":
                yield Piece("", call)
                return
        with closing(self.endpoint.stream(spoken, **settings)) as pieces:
            yield from (Piece(text) for text in pieces)


def plain_message(message: Message) -> dict[str, str]:
    """A message in the roles that every server knows: a call as the assistant's words, a result as the user's."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"The tool says: {message['content']}"}
    if message.get("tool_calls"):
        return {"role": "assistant", "content": json.dumps(message["tool_calls"][0]["function"])}
    return {"role": message["role"], "content": message["content"]}


# What may be shown


class Blocked(Exception):
    """The guard stops an answer; args: its category."""


class OutputGate:
    """Lets text through once it is known to be fit: secrets are replaced, and a sentence is read before it is shown.

    check(text) gives the category of a text that is to be stopped, else "".
    """

    LONGEST = 240  # characters that wait for the end of a sentence at most

    def __init__(self, check: Callable[[str], str], redactor: Redactor | None) -> None:
        self.check, self.redactor = check, redactor
        self.waiting, self.shown = "", ""

    def feed(self, text: str) -> str:
        """Take in a piece and return what may be shown now. Raises Blocked."""
        self.waiting += self.redactor.feed(text) if self.redactor else text
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", self.waiting)]
        if len(self.waiting) > self.LONGEST:
            ends.append(len(self.waiting))
        return self.release(ends[-1]) if ends else ""

    def flush(self) -> str:
        """The rest, when the answer has ended. Raises Blocked."""
        self.waiting += self.redactor.flush() if self.redactor else ""
        return self.release(len(self.waiting))

    def release(self, end: int) -> str:
        ready, self.waiting = self.waiting[:end], self.waiting[end:]
        if ready and (category := self.check(self.shown[-self.LONGEST :] + ready)):
            raise Blocked(category)
        self.shown += ready
        return ready


# The chatbot


class Stages:
    """Milliseconds of a turn by stage: each mark ends one."""

    def __init__(self) -> None:
        self.last, self.spent = time.perf_counter(), {}
        self.shown = False  # whether the user has seen any text

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + 1000 * (now - self.last)
        self.last = now


STOPPED_OUT = ("toxicity", "forbidden")  # of an answer; jailbreak and injection are things that are done to a model
REFUSALS = {
    "in": "Sorry, I do not answer this.",
    "out": "Sorry, I stop here: the answer was not fit to be shown.",
}


class Chatbot:
    """A conversation partner: a speaker with tools, memory and guards.

    Args:
        speaker: the model
        tools: what it may call, besides the memory of the conversation
        config: limits and switches
        check: gives the category of a text that must be stopped, else ""; None: the committed content guard
    """

    def __init__(
        self,
        speaker: Speaker,
        tools: Mapping[str, Tool] = TOOLS,
        config: ChatbotConfig | None = None,
        check: Callable[[str], str] | None = None,
    ) -> None:
        self.speaker, self.tools, self.config = speaker, tools, config or ChatbotConfig()
        self.check = check or (guard_check(self.config.guard_limit) if self.config.guard else lambda text: "")
        self.system = {"role": "system", "content": self.config.system}

    def reply(self, conversation: Conversation) -> Iterator[Event]:
        """The events of the next turn; the conversation then holds the answer, also one that was left half-way.

        Raises ValueError for a conversation that does not end with a question or a question that is too long, and
        EndpointError if the model cannot be reached.
        """
        stages, end = Stages(), {"reason": "stop", "n_dropped": 0}
        history, end["n_dropped"] = self.fit(conversation.messages)
        stages.mark("history")
        said: list[str] = []
        try:
            for event in self.turn(history, conversation, end, stages):
                if event.kind in ("token", "refusal"):
                    said.append(event.text)
                yield event
        finally:
            if said:
                conversation.messages.append({"role": "assistant", "content": "".join(said)})
        yield Event("end", "", end | {"ms": {name: round(value, 2) for name, value in stages.spent.items()}})

    def check_answer(self, text: str) -> str:
        category = self.check(text)
        return category if category in STOPPED_OUT else ""

    def fit(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """The part of a conversation that the model reads, the system prompt first, and how much was dropped."""
        config, count = self.config, self.speaker.count
        room = self.speaker.context - config.max_tokens - config.reserve - count([self.system])
        kept, n_dropped = fit_history(messages, count, room)
        return [self.system, *kept], n_dropped

    def turn(
        self, history: list[Message], conversation: Conversation, end: dict[str, Any], stages: Stages
    ) -> Iterator[Event]:
        question = history[-1]["content"]
        category = self.check(question)
        stages.mark("guard in")
        if category:
            end["reason"] = "refusal"
            yield Event("refusal", REFUSALS["in"], {"side": "in", "category": category})
            return
        if end["n_dropped"]:
            yield Event("notice", f"The oldest {end['n_dropped']} exchanges are no longer read: the context is full.")
        gate = OutputGate(self.check_answer, Redactor() if self.config.redact else None)
        try:
            yield from self.speak(history, conversation, gate, stages)
            if rest := gate.flush():
                stages.mark("guard out")
                yield self.token(rest, stages)
        except Blocked as blocked:
            end["reason"] = "refusal"
            yield Event("refusal", REFUSALS["out"], {"side": "out", "category": blocked.args[0]})
        stages.mark("rest of the answer")

    def speak(
        self, history: list[Message], conversation: Conversation, gate: OutputGate, stages: Stages
    ) -> Iterator[Event]:
        """Calls and their results, at most max_calls, then text; or the text of a tool whose result is the answer."""
        tools, own = {**self.tools, **memory_tools(conversation.memory)}, []
        settings = {"max_tokens": self.config.max_tokens, "temperature": self.config.temperature}
        for n_calls in range(self.config.max_calls + 1):
            offered = grounded(tools, history[-1]["content"]) if n_calls < self.config.max_calls else {}
            call = None
            with closing(self.speaker.speak([*history, *own], offered, **settings)) as pieces:
                for piece in pieces:
                    stages.mark("decide" if not own else "answer")
                    call = piece.call or call
                    if shown := gate.feed(piece.text):
                        stages.mark("guard out")
                        yield self.token(shown, stages)
            if call is None:
                return
            name, arguments = call.get("name", ""), call.get("arguments", {})
            yield Event("call", f"{name}({json.dumps(arguments, ensure_ascii=False)})", {"name": name, **call})
            result = self.run(call, offered)
            stages.mark("tool")
            yield Event("result", result.text, {"name": name, "error": result.error})
            if name in offered and (offered[name].final or not self.config.restate):
                yield from self.cite(in_words(offered[name], call, result), gate, stages)
                return
            own += [call_message(call), {"role": "tool", "content": self.cut(result.text, [*history, *own])}]

    def run(self, call: dict[str, Any], offered: Mapping[str, Tool]) -> ToolResult:
        """Run a call; a result that the model would read and that gives orders is withheld."""
        result = call_tool(call, offered)
        final = call.get("name") in offered and offered[call["name"]].final
        if not final and self.check(result.text) == "injection":
            return ToolResult("Error: the result was withheld", "the result gave orders and was withheld")
        return result

    def cut(self, text: str, before: Sequence[Message]) -> str:
        """As much of a result as the context has room for."""
        room = self.speaker.context - self.speaker.count(before) - self.config.max_tokens - 20
        while text and self.speaker.count([{"role": "tool", "content": text}]) > room:
            text = text[: len(text) * 3 // 4]
        return text

    def token(self, text: str, stages: Stages) -> Event:
        first, stages.shown = not stages.shown, True
        return Event(
            "token", text, {"ms": {name: round(value, 3) for name, value in stages.spent.items()}} if first else {}
        )

    def cite(self, result: ToolResult, gate: OutputGate, stages: Stages) -> Iterator[Event]:
        """A result as the answer, with the places that it names."""
        if shown := gate.feed(result.text):
            stages.mark("guard out")
            yield self.token(shown, stages)
        for number, place in enumerate(result.citations, start=1):
            if f"[{number}]" in result.text:
                yield Event("citation", place.link, citation_data(number, place))


def in_words(tool: Tool, call: dict[str, Any], result: ToolResult) -> ToolResult:
    """A result as an answer; an error as the sentence that it is."""
    if result.error:
        return result._replace(text=f"{result.error[:1].upper()}{result.error[1:]}.")
    return result._replace(text=tool.phrase.format(result=result.text, **call["arguments"]))


def citation_data(number: int, place: Citation) -> dict[str, Any]:
    return {"number": number, "link": place.link, "headings": list(place.headings), "passage": place.passage}


def guard_check(limit: float) -> Callable[[str], str]:
    """Topic 14's content guard as the category of what it blocks with at least this score, or "".

    Personal data are left to the redactor, which knows them by their form: a guard that has learned what they look like
    takes a sum of large numbers for a telephone number.
    """
    guard = load_guard()

    def check(text: str) -> str:
        verdict = guard.check(text)
        return verdict.category if verdict.blocked and verdict.score >= limit and verdict.category != "pii" else ""

    return check


def served_tool_model() -> ServedModel:
    """The course's tool model as topic 13 serves it."""
    model, tokenizer = load_tool_model()
    return ServedModel("course-chat-tools", model, CourseServing(tokenizer))


def open_chatbot(base_url: str | None = None, model: str | None = None, config: ChatbotConfig | None = None) -> Chatbot:
    """A chatbot with the course's tool model in this process, or with a model of a server of OpenAI's API.

    Raises EndpointError, in one line, for a server that cannot be reached.
    """
    if base_url:
        return Chatbot(RemoteSpeaker(HttpEndpoint(base_url, model)), config=config)
    return Chatbot(CourseSpeaker(LocalEndpoint(served_tool_model())), config=config)
