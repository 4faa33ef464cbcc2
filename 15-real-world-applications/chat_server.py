"""Topic 15 - Chat server: the chatbot as a web page beside topic 13's API, on one engine.

python 15-real-world-applications/real_world_applications.py chat-server            # the page, http://127.0.0.1:8080
python 15-real-world-applications/real_world_applications.py chat-server --base-url http://127.0.0.1:8000
python 15-real-world-applications/real_world_applications.py chat                   # the same chatbot in the terminal

GET / is the page (chat_page/: plain HTML, CSS and JavaScript), POST /chat/reply answers with a stream of events. The
server keeps nothing of a conversation: the page holds it, in its tab, and sends it with each question. It listens at
127.0.0.1, and what reaches it under another name is refused, as topic 13's API is.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from chat_endpoint import EndpointError
from chat_memory import Memory
from chatbot import Chatbot, ChatbotConfig, Conversation, CourseSpeaker, Event, open_chatbot, served_tool_model
from engine_requests import Overloaded, RequestOutput, RequestParams
from engine_thread import EngineDead, EngineThread
from retrieval_answers import safe_text
from served_model import ServedModel
from server import (
    EventStream,
    GracefulServer,
    ServerConfig,
    add_error_shapes,
    error_response,
    listen,
    make_app,
    make_engine,
    names_us,
    read_request,
    uvicorn_settings,
    wrong_host,
)
from server_schema import ApiError, bad_request
from serving_engine import EngineConfig
from workbench import RunConfig, check_range, pick_device

PAGE = Path(__file__).parent / "chat_page"
MAX_MESSAGES, MAX_TEXT = 200, 20_000  # messages of a conversation, characters of one
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
PAGE_FILES = {"/": "index.html", **{f"/{name}": name for name in ("chat.js", "chat.css", "chat.svg")}}
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


# One engine for the page and the API


class ThreadEndpoint:
    """What CourseSpeaker asks of an endpoint, answered by the engine that topic 13's server runs in its thread.

    begin and follow may be called from any thread but the event loop's.
    """

    def __init__(self, served: ServedModel, thread: EngineThread) -> None:
        self.served, self.thread, self.engine = served, thread, thread.engine

    def begin(self, prompt: list[int], settings: dict[str, Any]) -> Any:
        """Queue a request. Raises EndpointError if the queue is full or the engine has failed."""
        coroutine = self.thread.submit(prompt, [RequestParams(**settings)])
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.thread.loop).result()
        except Overloaded as error:
            raise EndpointError(f"{error}; try again later", 429) from None
        except EngineDead as error:
            raise EndpointError(str(error), 503) from None

    def follow(self, answer: Any) -> Iterator[tuple[RequestOutput, float]]:
        """The outputs of a request and when they came; leaving the loop aborts it."""
        loop = self.thread.loop
        try:
            while True:
                step = asyncio.run_coroutine_threadsafe(next_output(answer), loop).result()
                if step is None:
                    return
                yield step, time.perf_counter()
        except EngineDead as error:
            raise EndpointError(str(error), 503) from None
        finally:
            loop.call_soon_threadsafe(answer.close)


async def next_output(answer: Any) -> RequestOutput | None:
    async for _, output in answer:
        return output
    return None


# A turn in its own thread


class ReplyThread:
    """The events of one turn, made in a thread and read in the event loop: `await next()` until it is None."""

    def __init__(self, bot: Chatbot, conversation: Conversation) -> None:
        self.bot, self.conversation = bot, conversation
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()  # a turn has a bounded number of events
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, name="reply", daemon=True)

    def start(self, done: Callable[[], None]) -> "ReplyThread":
        self.done = done
        self.thread.start()
        return self

    async def next(self) -> Event | None:
        """The next event. Raises what the chatbot raised."""
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End the turn after its next event."""
        self.stopped.set()

    def run(self) -> None:
        try:
            with closing(self.bot.reply(self.conversation)) as events:
                for event in events:
                    if self.stopped.is_set():
                        break
                    self.tell(self.queue.put_nowait, event)
        except Exception as error:  # whatever it was, nobody may wait for events that will not come
            self.tell(self.queue.put_nowait, error)
        finally:
            self.tell(self.queue.put_nowait, None)
            self.tell(self.done)

    def tell(self, function: Callable, *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(function, *args)


# The application


class ChatSite:
    """The page and its route as an ASGI application around another one, which gets every other request.

    It stands outside of topic 13's guard because that marks all answers with a policy for data, under which no page
    shows; it asks for the same Host.

    Args:
        bot: who answers
        app: topic 13's application, or an empty one
        config: limits
    """

    def __init__(self, bot: Chatbot, app: FastAPI, config: "ChatServerConfig") -> None:
        self.bot, self.app, self.config = bot, app, config
        self.files = {path: (PAGE / name).read_bytes() for path, name in PAGE_FILES.items()}
        self.running = 0  # turns being answered

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path in self.files or path.startswith("/chat/")):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self.respond(request, path)
        except ApiError as error:
            response = error_response(error)
        for name, value in PAGE_HEADERS.items():
            response.headers[name] = value
        await response(scope, receive, send)

    async def respond(self, request: Request, path: str) -> Response:
        if not names_us(request.headers.get("host", ""), self.config.hosts):
            raise wrong_host()
        if path in self.files:
            if request.method not in ("GET", "HEAD"):
                raise ApiError(405, f"{request.method} {path}: method not allowed", "method_not_allowed")
            return Response(self.files[path], media_type=KINDS[PAGE_FILES[path].rpartition(".")[2]])
        if path != "/chat/reply":
            raise ApiError(404, f"{path[:100]}: not found", "not_found")
        if request.method != "POST":
            raise ApiError(405, f"{request.method} {path}: method not allowed", "method_not_allowed")
        conversation = read_conversation(await read_request(request, self.config.max_body))
        return await self.reply(conversation)

    async def reply(self, conversation: Conversation) -> Response:
        """The turn as server-sent events; what goes wrong before the first one is a status."""
        if self.running >= self.config.max_replies:
            busy = f"{self.running} conversations are being answered, which is the limit; try again in a moment"
            raise ApiError(429, busy, "overloaded", headers={"Retry-After": "1"})
        self.running += 1
        turn = ReplyThread(self.bot, conversation).start(self.finished)
        try:
            first = await turn.next()
        except Exception as error:
            raise as_api_error(error) from None
        return EventStream(self.events(turn, first), turn.close)

    def finished(self) -> None:
        self.running -= 1

    async def events(self, turn: ReplyThread, event: Event | None) -> AsyncIterator[dict[str, Any]]:
        try:
            while event is not None:
                data = dict(event.data)
                if event.kind == "end":
                    data["memory"] = turn.conversation.memory.facts
                yield {"kind": event.kind, "text": event.text, "data": data}
                event = await turn.next()
        except Exception as error:  # the status has gone out already
            yield {"kind": "error", "text": as_api_error(error).message, "data": {}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception of the chatbot's."""
    if isinstance(error, EndpointError):
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return ApiError(error.status if error.status in (429, 503) else 502, str(error), "endpoint", headers=headers)
    if isinstance(error, ValueError):
        return bad_request(str(error), "messages")
    print(f"the chatbot failed: {error!r}", file=sys.stderr, flush=True)
    return ApiError(500, "the chatbot failed; its log says why", "internal_error")


def read_conversation(content: dict[str, Any]) -> Conversation:
    """The conversation in a request. Raises ApiError, status 400, for what a page would not send."""
    unknown = sorted(set(content) - {"messages", "memory"})
    if unknown:
        raise bad_request(f"{unknown[0][:40]} is not a field of a conversation", unknown[0][:40], "unknown_parameter")
    messages = content.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise bad_request(f"messages is a list of 1 to {MAX_MESSAGES} messages", "messages")
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise bad_request(f"{place} has a role and a content, and nothing else", place)
        if message["role"] not in ("user", "assistant"):
            raise bad_request(f"{place}.role is user or assistant; only the server writes other turns", place)
        if not isinstance(message["content"], str) or not 1 <= len(message["content"]) <= MAX_TEXT:
            raise bad_request(f"{place}.content is a text of 1 to {MAX_TEXT:,} characters", place)
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise bad_request("the last message is the user's and not empty", f"messages.{len(messages) - 1}")
    try:
        memory = Memory.of(content.get("memory", {}))
    except ValueError as error:
        raise bad_request(f"memory: {error}", "memory") from None
    return Conversation(messages, memory)


# The processes


@dataclass(frozen=True)
class ChatServerConfig(ServerConfig):
    """Where the page is served, and who answers."""

    port: int = 8080  # port at 127.0.0.1; 0 takes a free one
    base_url: str = ""  # a server of OpenAI's API that answers; empty: the course's tool model, in this process
    model: str = ""  # the model's name at that server; empty: its first
    max_replies: int = 16  # turns answered at the same time; more are told to come again

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "port", least=0, most=65535)
        check_range(self, "max_replies", least=1)


def make_site(
    config: ChatServerConfig, chat: ChatbotConfig, engine: EngineConfig, device: str = "cpu"
) -> tuple[ChatSite, EngineThread | None]:
    """The site, around topic 13's API if the model computes here, and that engine's thread."""
    if config.base_url:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        add_error_shapes(app)
        return ChatSite(open_chatbot(config.base_url, config.model or None, chat), app, config), None
    served = served_tool_model()
    served.model.to(device)
    thread = EngineThread(make_engine(served, engine), config.max_pending)
    bot = Chatbot(CourseSpeaker(ThreadEndpoint(served, thread)), config=chat)
    return ChatSite(bot, make_app(served, thread, config), config), thread


def site_server(site: ChatSite) -> uvicorn.Server:
    """uvicorn for a site; with topic 13's application inside, its orderly end."""
    settings = uvicorn.Config(site, **uvicorn_settings(site.config))
    service = getattr(site.app.state, "service", None)
    return GracefulServer(settings, service) if service else uvicorn.Server(settings)


@contextlib.contextmanager
def background_site(site: ChatSite, port: int = 0) -> Iterator[str]:
    """Serve a site in a thread of this process while the block runs; gives its address."""
    sock, server = listen("127.0.0.1", port), site_server(site)
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    runner = threading.Thread(target=server.run, args=([sock],), daemon=True)
    runner.start()
    try:
        yield address
    finally:
        server.should_exit = server.force_exit = True
        runner.join(site.config.grace)


def chat_server(config: ChatServerConfig, chat: ChatbotConfig, engine: EngineConfig, run: RunConfig) -> None:
    """Serve the chat page at 127.0.0.1 until Ctrl-C."""
    site, _ = make_site(config, chat, engine, str(pick_device(run.device)))
    sock = listen("127.0.0.1", config.port)
    print(f"the chat is at http://127.0.0.1:{sock.getsockname()[1]}/ (Ctrl-C ends)", flush=True)
    server = site_server(site)
    if isinstance(server, GracefulServer):
        server.serve_at(sock)
    else:
        server.run(sockets=[sock])  # uvicorn's own, which raises what Ctrl-C means


@dataclass(frozen=True)
class ChatConfig(ChatbotConfig):
    """Whom to talk with in the terminal."""

    base_url: str = ""  # a server of OpenAI's API that answers; empty: the course's tool model, in this process
    model: str = ""  # the model's name at that server; empty: its first
    prompt: str = ""  # one question; without one, questions are read line by line
    events: bool = False  # print every event as a line of JSON


def chat(config: ChatConfig, run: RunConfig) -> None:
    """Talk with the chatbot: one question, or a conversation line by line until an empty line."""
    bot = open_chatbot(config.base_url or None, config.model or None, config)
    conversation = Conversation()
    for line in [config.prompt] if config.prompt else lines_until_empty():
        for event in bot.reply(conversation.ask(line)):
            if config.events:
                print(json.dumps({"kind": event.kind, "text": event.text, "data": dict(event.data)}))
            else:
                print(for_terminal(event), end="", flush=True)


def lines_until_empty() -> Iterator[str]:
    """What is typed, line by line; the mark at which one types goes to a terminal alone."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def for_terminal(event: Event) -> str:
    """An event as text for a terminal, without the characters by which a text could command it."""
    text = safe_text(event.text)
    match event.kind:
        case "token" | "refusal":
            return text
        case "call":
            return f"[{text}]\n"
        case "result":
            return f"[-> {text.partition(chr(10))[0][:100]}]\n"
        case "citation":
            return f"\n  [{event.data['number']}] {text}"
        case "notice":
            return f"({text})\n"
    return "\n"


CHAT_SERVER_VERBS: dict[str, tuple[Any, ...]] = {
    "chat": (chat, ChatConfig, RunConfig),
    "chat-server": (chat_server, ChatServerConfig, ChatbotConfig, EngineConfig, RunConfig),
}
