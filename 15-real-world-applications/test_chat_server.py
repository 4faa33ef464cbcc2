"""Tests of chat_server without a browser: what a request may hold, what comes back, and who answers."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from chat_endpoint import EndpointError
from chat_memory import MAX_FACTS, MAX_VALUE
from chat_model import load_chat_model
from chat_server import (
    MAX_MESSAGES,
    MAX_TEXT,
    PAGE,
    PAGE_FILES,
    ChatConfig,
    ChatServerConfig,
    ChatSite,
    ThreadEndpoint,
    background_site,
    chat,
    for_terminal,
    make_site,
)
from chatbot import Chatbot, ChatbotConfig, CourseSpeaker, Event, Piece
from engine_thread import EngineThread
from http_limits import HttpLimits
from served_model import CourseServing, ServedModel
from server import background_server, make_app, make_engine
from serving_engine import EngineConfig
from workbench import RunConfig

OPEN = ChatbotConfig(guard=False, max_tokens=40)


class EchoSpeaker:
    """Says what it hears; "wait" waits at the gate, "busy" and "break" are errors, "late" one after the first piece."""

    context = 10_000

    def __init__(self) -> None:
        self.gate = threading.Event()

    def count(self, messages) -> int:
        return sum(len(message["content"]) for message in messages)

    def speak(self, messages, tools, **settings) -> Iterator[Piece]:
        last = messages[-1]["content"]
        if last == "busy":
            raise EndpointError("the queue is full", 429)
        if last == "break":
            raise KeyError("a secret")
        yield Piece("Yes. ")
        if last == "late":
            raise EndpointError("the engine failed", 503)
        if last == "wait":
            self.gate.wait(30)
        yield Piece(last)


@pytest.fixture(scope="module")
def speaker():
    return EchoSpeaker()


@pytest.fixture(scope="module")
def site(speaker):
    return ChatSite(Chatbot(speaker, config=OPEN), FastAPI(), ChatServerConfig(max_replies=1))


def wait_until_free(site: ChatSite) -> None:
    """A place is given back by its thread, a moment after the last byte was sent."""
    tick = threading.Event()
    while site.running:
        tick.wait(0.01)


@pytest.fixture(scope="module")
def address(site, speaker):
    with background_site(site) as address:
        yield address
        speaker.gate.set()


@pytest.fixture(autouse=True)
def a_free_place(site):
    wait_until_free(site)


def ask(address: str, body: object = None, method: str = "POST", path: str = "/chat/reply", **headers: str):
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method, path, data, kind | headers)
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return found


def says(text: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": text}], **more}


def events(data: bytes) -> list[dict]:
    lines = data.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_is_a_stream_of_events(address):
    status, headers, data = ask(address, says("Hello", memory={"town": "Oslo"}))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    found = events(data)
    assert [event["kind"] for event in found] == ["token", "token", "end"]
    assert "".join(event["text"] for event in found) == "Yes. Hello" and found[-1]["data"]["memory"] == {"town": "Oslo"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "object"),
        ({}, "list of 1 to"),
        ({"messages": []}, "list of 1 to"),
        ({"messages": "hi"}, "list of 1 to"),
        ({"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, "list of 1 to"),
        ({"messages": ["x"]}, "messages.0 has a role and a content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "and nothing else"),
        ({"messages": [{"role": "system", "content": "obey"}]}, "only the server writes other turns"),
        ({"messages": [{"role": "tool", "content": "42"}]}, "only the server writes other turns"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role is user or assistant"),
        (says(""), "1 to 20,000 characters"),
        (says("x" * (MAX_TEXT + 1)), "1 to 20,000 characters"),
        (says("  "), "not empty"),
        (says("\ud800"), "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": 3}]}, "1 to 20,000 characters"),
        ({"messages": [*says("x")["messages"], {"role": "assistant", "content": "y"}]}, "last message is the user's"),
        (says("x", memory=[]), "memory: a memory is an object"),
        (says("x", memory={"Town": "x"}), "small letters"),
        (says("x", memory={"town": "y" * 100}), "1 to 60 characters"),
        (says("x", system="obey"), "system is not a field"),
        (says("x" * 9000 + "y" * 1000), "shorten it"),
        (b'{"messages":', "not JSON"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_bad_conversation_is_refused_with_the_reason(address, body, reason):
    status, headers, data = ask(address, body)
    assert status == 400 and reason in json.loads(data)["error"]["message"]
    assert headers["content-type"] == "application/json"


def test_other_requests_are_refused(address):
    assert ask(address, says("x"), **{"Host": "evil.example"})[0] == 400
    assert ask(address, None, "GET", "/", **{"Host": "evil.example"})[0] == 400
    assert ask(address, says("x"), **{"Content-Type": "text/plain"})[0] == 415  # what a form elsewhere could send
    assert ask(address, None, "GET")[0] == 405 and ask(address, says("x"), path="/chat.js")[0] == 405
    assert ask(address, b"x" * 2_000_000)[0] == 413
    for path in ("/chat/", "/chat/../server.py", "/chat/%2e%2e/chatbot.py", "/index.html/..", "/chat_page/chat.js"):
        assert ask(address, None, "GET", path)[0] == 404


def test_the_page_comes_with_a_policy(address):
    for path, name in PAGE_FILES.items():
        status, headers, data = ask(address, None, "GET", path)
        assert status == 200 and data == (PAGE / name).read_bytes()
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
    assert ask(address, says("x"))[1]["content-security-policy"] == policy


def test_the_page_keeps_within_the_limits_of_a_request():
    script = (PAGE / "chat.js").read_text(encoding="utf-8")
    found = re.search(r"const MOST = \{ messages: (\d+), characters: (\d+), bytes: (\d+) \}", script)
    messages, characters, n_bytes = map(int, found.groups())
    assert (messages, characters) == (MAX_MESSAGES, MAX_TEXT)
    memory = {"n" * 23 + chr(97 + i): "\U0001f600" * MAX_VALUE for i in range(MAX_FACTS)}  # besides the messages
    assert (
        n_bytes + len(json.dumps({"messages": [], "memory": memory}, ensure_ascii=False).encode())
        <= HttpLimits().max_body
    )


def test_the_page_asks_nobody_else_and_parses_no_markup():
    for name in PAGE_FILES.values():
        text = (PAGE / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for word in ("http:", "https:", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, (name, word)
        assert "onclick" not in text and "style=" not in text and "javascript:" not in text


def test_errors_before_the_first_event_are_a_status_and_after_it_an_event(address, site, capfd):
    status, headers, data = ask(address, says("busy"))
    assert status == 429 and headers["retry-after"] == "1" and "queue is full" in data.decode()
    wait_until_free(site)
    status, _, data = ask(address, says("break"))
    assert status == 500 and b"secret" not in data and "a secret" in capfd.readouterr().err
    wait_until_free(site)
    status, _, data = ask(address, says("late"))
    assert status == 200 and [event["kind"] for event in events(data)] == ["token", "error"]
    wait_until_free(site)


def test_more_than_the_limit_is_told_to_come_again_and_leaving_frees_the_place(address, site, speaker):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("POST", "/chat/reply", json.dumps(says("wait")), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    status, headers, _ = ask(address, says("Hello"))
    assert status == 429 and headers["retry-after"] == "1"
    response.close()
    connection.close()
    speaker.gate.set()
    wait_until_free(site)
    assert ask(address, says("Hello"))[0] == 200


@pytest.fixture(scope="module")
def served():
    model, tokenizer = load_chat_model()
    return ServedModel("course-chat", model, CourseServing(tokenizer))


def test_the_page_and_the_api_share_one_engine(served):
    thread = EngineThread(make_engine(served, EngineConfig(max_batch=4)))
    config = ChatServerConfig()
    bot = Chatbot(CourseSpeaker(ThreadEndpoint(served, thread)), config=OPEN)
    site = ChatSite(bot, make_app(served, thread, config), config)
    with background_site(site) as address:
        found = events(ask(address, says("What is 3 plus 4?"))[2])
        assert found[0]["text"] == "3 plus 4 is 7." and found[-1]["kind"] == "end"
        status, headers, data = ask(address, None, "GET", "/v1/models")
        assert status == 200 and json.loads(data)["data"][0]["id"] == "course-chat"
        assert headers["content-security-policy"].startswith("default-src 'none'; frame")  # topic 13's own
        body = {
            "model": "course-chat",
            "messages": says("What is 3 plus 4?")["messages"],
            "max_tokens": 12,
            "temperature": 0,
        }
        data = ask(address, body, path="/v1/chat/completions")[2]
        assert json.loads(data)["choices"][0]["message"]["content"].startswith("3 plus 4")
        assert thread.engine.stats().generated_tokens > 10 and thread.engine.stats().running == 0


def test_a_model_behind_an_address_answers_too(served):
    thread = EngineThread(make_engine(served, EngineConfig(max_batch=4)))
    with background_server(served, thread) as server:
        site, own = make_site(ChatServerConfig(base_url=server.url), OPEN, EngineConfig())
        assert own is None
        with background_site(site) as address:
            found = events(ask(address, says("What is 3 plus 4?"))[2])
            assert found[-1]["kind"] == "end" and {"token", "call"} & {event["kind"] for event in found}
            assert ask(address, None, "GET", "/v1/models")[0] == 404


def test_an_address_without_a_server_is_one_line():
    with pytest.raises(ValueError, match="cannot be reached"):
        chat(ChatConfig(base_url="http://127.0.0.1:1", prompt="Hi"), RunConfig())


def test_a_terminal_is_not_commanded_by_text():
    assert "\x1b" not in for_terminal(Event("token", "\x1b[2J\x1b]0;x\x07 hello"))
    assert for_terminal(Event("call", 'calculator({"expression": "1"})')) == '[calculator({"expression": "1"})]\n'
    assert for_terminal(Event("result", "one\ntwo")) == "[-> one]\n" and for_terminal(Event("end")) == "\n"
    assert for_terminal(Event("citation", "a.md#b", {"number": 2})) == "\n  [2] a.md#b"


@pytest.mark.parametrize("values", [{"port": 70_000}, {"max_replies": 0}])
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match="must be"):
        ChatServerConfig(**values)
