"""Tests of server: a real uvicorn on this machine, the official client, hostile clients, and the end of a process.

FULL_COUNTS=1 takes the numbers of clients that a server should stand (200, 300 sockets, 64 MB); the suite takes less.
"""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import h11
import openai
import pytest
import uvicorn
from fastapi import Request
from prometheus_client import generate_latest
from uvicorn.server import ServerState

from chat_model import FOLDER
from engine_requests import RequestOutput, RequestParams, TokenLogprob
from engine_thread import EngineThread
from http_limits import HttpLimits, StrictConnection, bounded_protocol, read_body
from served_model import ServedModel, load_served_model
from server import (
    ChatShape,
    ConstraintCache,
    EventStream,
    GracefulServer,
    Guard,
    Meters,
    ServeConfig,
    ServerConfig,
    Stopwatch,
    make_app,
)
from server_schema import ApiError, SchemaFormat
from serving_engine import Engine, EngineConfig

FULL = bool(os.environ.get("FULL_COUNTS"))
NAME = "course-chat"
QUESTIONS = [f"What is {a} plus {b} ?" for a in range(1, 6) for b in range(2, 10)]
CHAT = {"model": NAME, "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
LONG = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
PATIENCE = 60.0  # seconds that a condition may take on a busy machine


class Breaking:
    """An engine whose steps wait, or fail, when they are told to."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.error, self.may_go = engine, None, threading.Event()
        self.may_go.set()

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def step(self):
        self.may_go.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.engine.step()


class Running:
    """A server in a thread of the test's process."""

    def __init__(self, served: ServedModel, config: ServerConfig, engine: EngineConfig) -> None:
        self.engine = Breaking(Engine(served.model, served.tokenizer, engine))
        self.thread = EngineThread(self.engine, config.max_pending)
        app = make_app(served, self.thread, config)
        self.service = app.state.service
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        settings = {"log_level": "critical", "access_log": False, "timeout_graceful_shutdown": 1, "ws": "none"}
        settings |= {"h11_max_incomplete_event_size": config.max_head, "server_header": False}
        self.server = GracefulServer(uvicorn.Config(app, http=bounded_protocol(config), **settings), self.service)
        self.runner = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        text = ask(self, "GET", "/metrics")[2].decode()
        return float(re.search(rf"^course_{name} (\S+)$", text, re.MULTILINE)[1])

    def is_empty(self) -> bool:
        stats = self.thread.latest
        return not (self.service.in_flight or stats.running or stats.waiting) and stats.free_blocks == stats.n_blocks


@contextlib.contextmanager
def running(served: ServedModel, config: ServerConfig | None = None, **engine) -> Iterator[Running]:
    found = Running(served, config or ServerConfig(), EngineConfig(**engine))
    found.runner.start()
    until(lambda: found.server.started)
    try:
        yield found
    finally:
        found.engine.may_go.set()
        found.server.should_exit = True
        found.runner.join(PATIENCE)
        assert not found.runner.is_alive()


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < limit, "what the test waits for did not come"
        time.sleep(0.005)


def ask(server: Running, method: str, path: str, body: bytes | dict | None = None, **headers: str):
    """One request on a connection of its own: (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, kind | named)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def error_of(answer) -> tuple[int, dict]:
    status, headers, body = answer
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and headers["x-request-id"]
    return status, error


def raw(server: Running, data: bytes) -> bytes:
    """All that the server says to these bytes before it closes."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        with contextlib.suppress(OSError):  # it may close before all is sent
            connection.sendall(data)
        said = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                said += piece
        return said


def post(path: str, body: dict, *more: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def send(server: Running, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    connection.sendall(data)
    return connection


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_served_model(FOLDER, NAME)


@pytest.fixture(scope="module")
def server(served) -> Iterator[Running]:
    with running(served) as found:
        yield found


@pytest.fixture(scope="module")
def alone(served) -> dict[str, str]:
    """The greedy answer to each question, asked alone, by topic 09's own loop."""
    engine = Engine(served.model, served.tokenizer, EngineConfig())
    params = RequestParams(max_tokens=30, temperature=0.0)
    prompts = [served.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return {text: engine.generate([ids], params)[0].text for text, ids in zip(QUESTIONS, prompts, strict=True)}


# HT14 and the official client


def test_models_and_the_card_of_one(server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_a_chat_whole_and_streamed_is_the_same(server, alone) -> None:
    client, usage = server.client(), {"include_usage": True}
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == alone[QUESTIONS[0]] and whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=usage))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == alone[QUESTIONS[0]]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [*[None] * (len(deltas) - 1), "stop"]
    assert chunks[-1].choices == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_completion_whole_and_streamed_with_several_choices(server) -> None:
    client = server.client()
    settings = {"model": NAME, "prompt": "Anna lives in", "max_tokens": 6, "seed": 5, "n": 3, "temperature": 1.0}
    whole = client.completions.create(**settings)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.completions.create(**settings, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts == [choice.text for choice in client.completions.create(**settings).choices]
    second = client.completions.create(**settings | {"seed": 6, "n": 1})
    assert second.choices[0].text == texts[1]  # choice i draws with seed + i


def test_log_probabilities_of_both_kinds(server, served) -> None:
    client = server.client()
    chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    entries = chat.choices[0].logprobs.content
    assert len(entries) == chat.usage.completion_tokens
    assert "".join(entry.token for entry in entries).startswith(chat.choices[0].message.content)
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token and entry.logprob == entry.top_logprobs[0].logprob
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 2 and entry.logprob <= 0
    plain = client.completions.create(model=NAME, prompt="Anna lives", max_tokens=4, temperature=0, logprobs=3)
    found = plain.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == plain.usage.completion_tokens
    assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(len(found.tokens))]
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None


def test_the_stream_on_the_wire(server) -> None:
    status, headers, body = ask(server, "POST", "/v1/chat/completions", CHAT | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = body.decode().split("\n\n")
    assert (
        events[-1] == "" and events[-2] == "data: [DONE]" and all(event.startswith("data: ") for event in events[:-1])
    )
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.keys() == {"id", "created", "model", "object", "choices"}
        assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == NAME
        [choice] = chunk["choices"]
        assert choice.keys() == {"index", "delta", "logprobs", "finish_reason"}


# HT1-HT4


def test_bodies_that_are_no_request(server) -> None:
    bodies = [b"", b"[]", b"null", b"42", b"{", json.dumps(CHAT).encode("utf-16"), b'{"model": "\xff"}', b"[" * 100_000]
    bodies += [b'{"seed": ' + b"7" * 5000 + b"}", b'{"model": "a", "model": "a"}', b'{"model": "\\ud800"}']
    bodies += [b'{"temperature": NaN}', b'{"temperature": 1e999}', b'{"max_tokens": true, "model": "a", "prompt": "b"}']
    for path in ("/v1/completions", "/v1/chat/completions"):
        for body in bodies:
            status, error = error_of(ask(server, "POST", path, body))
            assert (status, error["type"]) == (400, "invalid_request_error"), body[:40]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logit_bias": {"99999": 1}}, "logit_bias.99999"),
        ({"seed": -1}, "seed"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),  # infinite logits
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"tools": []}, "tools"),
        ({"functions": []}, "functions"),
    ],
)
def test_values_out_of_range_are_named(server, fields: dict, named: str) -> None:
    status, error = error_of(ask(server, "POST", "/v1/chat/completions", CHAT | fields))
    assert (status, error["param"]) == (400, named) and named.partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_p": 1e-50},  # 0 in float32
        {"temperature": 1e-300},
        {"top_k": -1},
        {"top_k": 10**9},
        {"top_p": 1},
    ]
    + [{"temperature": 1.0, "min_p": 1.0}, {"stop": []}, {"seed": 2**31 - 1}, {"temperature": 0.0}],
)
def test_settings_that_mean_greedy_are_greedy(server, alone, fields: dict) -> None:
    answer = json.loads(ask(server, "POST", "/v1/chat/completions", CHAT | fields)[2])
    assert answer["choices"][0]["message"]["content"] == alone[QUESTIONS[0]]


def test_stops_bias_and_lengths(server, served, alone) -> None:
    client, text = server.client(), alone[QUESTIONS[0]]
    cut = client.chat.completions.create(**CHAT, stop=["plus"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text.partition("plus")[0], "stop")
    short = client.chat.completions.create(**CHAT, max_completion_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    [first] = served.tokenizer.tokenizer.encode(text)[:1]
    other = client.chat.completions.create(**CHAT, logit_bias={str(first): -100}).choices[0].message.content
    assert other != text and not other.startswith(text[:2])


def test_what_does_not_fit_is_told_in_numbers(server) -> None:
    limit = server.service.max_context
    request = {"model": NAME, "prompt": [5] * (limit - 3), "temperature": 0, "ignore_eos": True}
    status, error = error_of(ask(server, "POST", "/v1/completions", request | {"max_tokens": 4}))
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    for number in (limit, limit + 1, limit - 3, 4):
        assert str(number) in error["message"]
    fits = json.loads(ask(server, "POST", "/v1/completions", request | {"max_tokens": 3})[2])
    assert fits["usage"]["total_tokens"] == limit
    assert json.loads(ask(server, "POST", "/v1/completions", request)[2])["usage"]["completion_tokens"] == 3
    for prompt in ([5] * limit, "word " * 150_000):
        status, error = error_of(ask(server, "POST", "/v1/completions", {"model": NAME, "prompt": prompt}))
        assert (status, error["code"]) == (400, "context_length_exceeded")
    for strange in (10**6, server.service.served.model.config.vocab_size):
        status, error = error_of(ask(server, "POST", "/v1/completions", {"model": NAME, "prompt": [5, strange]}))
        assert (status, error["param"]) == (400, "prompt") and f"the token {strange}," in error["message"]


# Answers in a form


SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}, "right": {"type": "boolean"}}}
SCHEMA |= {"required": ["sum", "right"], "additionalProperties": False}


def form_of(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_a_schema(server, temperature: float) -> None:
    client = server.client()
    settings = CHAT | {"temperature": temperature, "n": 3, "seed": 11, "max_tokens": 120}
    for choice in client.chat.completions.create(**settings, response_format=form_of(SCHEMA)).choices:
        if choice.finish_reason == "stop":  # one may run on in digits or spaces
            found = json.loads(choice.message.content)
            assert found.keys() == {"sum", "right"} and type(found["sum"]) is int and type(found["right"]) is bool
        else:
            assert choice.message.content.lstrip().startswith("{")
    plain = client.completions.create(
        model=NAME, prompt="Anna", max_tokens=60, temperature=0, extra_body={"response_format": {"type": "json_object"}}
    )
    assert plain.choices[0].text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "colour"}, {"$ref": "#/x"}, {"type": "string", "pattern": "(?<a"}, {"not": {}}]
)
def test_a_schema_that_is_not_understood_is_refused(server, schema: dict) -> None:
    wanted = CHAT | {"response_format": form_of(schema)}
    status, error = error_of(ask(server, "POST", "/v1/chat/completions", wanted))
    assert (status, error["param"]) == (400, "response_format")


# HT5 and HT10: sizes and framing


def test_long_bodies_are_refused_without_being_kept(server) -> None:
    size = 64_000_000 if FULL else 8_000_000
    declared = post("/v1/completions", {}).replace(b"Content-Length: 2", f"Content-Length: {size}".encode())
    with send(server, declared) as connection:  # not one byte of the body is waited for
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    before = resident()
    head = POST + b"Content-Type: application/json\r\n"
    with send(server, head + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with contextlib.suppress(OSError):
            for _ in range(size // 65536):
                connection.sendall(chunk)
            connection.sendall(b"0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert resident() - before < 20e6
    assert ask(server, "GET", "/health")[0] == 200


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_long_headers_are_refused(server, size: int) -> None:
    said = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * size + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 431 ") or said == b""  # closed while it was still being sent
    status, error = 431, json.loads(said.partition(b"\r\n\r\n")[2])["error"] if said else {"code": "invalid_http"}
    assert (status, error["code"]) == (431, "invalid_http")


BODY = json.dumps(LONG).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
MALFORMED = {
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a list of lengths": POST + b"Content-Length: 5, 6\r\n\r\nabcdef",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "length in words": POST + b"Content-Length: five\r\n\r\n",
    "unknown coding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "a line that is none": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a header without name": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: value\r\n\r\n",
    "a space before the colon": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length : 0\r\n\r\n",
    "nul in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: a\x00b\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_is_refused_and_the_connection_closed(server, name: str) -> None:
    said = raw(server, MALFORMED[name])  # returns only because the server closes
    status = b"501" if name == "unknown coding" else b"400"
    assert said.startswith(b"HTTP/1.1 " + status) and said.count(b"HTTP/1.1") == 1
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


# HT6-HT9: clients that leave, many clients, too many, and slow ones


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_give_their_blocks_back(server, stream: bool) -> None:
    left = []
    for _ in range(50 if FULL else 12):
        connection = send(server, post("/v1/completions", LONG | {"stream": stream, "n": 2}))
        if stream:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
        else:
            until(lambda: server.thread.latest.running > 0)
        left.append(connection)
        if len(left) % 4 == 0:  # several at once, and not all at the end
            for one in left[-4:]:
                one.close()
    for one in left:
        one.close()
    until(server.is_empty)
    assert server.metric("running") == server.metric("waiting") == 0
    assert server.metric("free_blocks") == server.metric("blocks")
    assert ask(server, "POST", "/v1/chat/completions", CHAT)[0] == 200


def test_a_client_that_leaves_ends_its_request_while_nothing_moves(served) -> None:
    with running(served) as still:
        still.engine.may_go.clear()
        with send(still, post("/v1/completions", LONG)):
            until(lambda: still.service.in_flight == 1)
        until(lambda: still.service.in_flight == 0)  # no token had to come for it to be noticed


def test_many_clients_at_once_get_each_its_own_answer(server, alone) -> None:
    client, n_clients = server.client(), 200 if FULL else 40
    times: list[float] = []

    def one(number: int) -> tuple[str, str]:
        question, start = QUESTIONS[number * 7 % len(QUESTIONS)], time.perf_counter()
        request = CHAT | {"messages": [{"role": "user", "content": question}], "max_tokens": 30}
        if number % 2:
            chunks = client.chat.completions.create(**request, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.chat.completions.create(**request).choices[0].message.content
        times.append(time.perf_counter() - start)
        return question, text

    with concurrent.futures.ThreadPoolExecutor(n_clients) as pool:
        answers = list(pool.map(one, range(n_clients)))
    assert len(answers) == n_clients and all(text == alone[question] for question, text in answers)
    if FULL:
        times.sort()
        print(f"{n_clients} clients: median {times[n_clients // 2]:.2f} s, p99 {times[int(n_clients * 0.99)]:.2f} s")
    until(server.is_empty)


def test_a_full_queue_answers_429_and_what_was_taken_is_finished(served) -> None:
    with running(served, max_batch=2, max_waiting=2) as small:
        small.engine.may_go.clear()  # nothing moves until all have asked
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            request = LONG | {"max_tokens": 5}
            first = [pool.submit(ask, small, "POST", "/v1/completions", request)]
            until(lambda: small.service.in_flight == 1)
            first += [pool.submit(ask, small, "POST", "/v1/completions", request) for _ in range(11)]
            until(lambda: small.service.in_flight == 12)
            small.engine.may_go.set()
            answers = [future.result() for future in first]
        refused = [answer for answer in answers if answer[0] == 429]
        assert {answer[0] for answer in answers} == {200, 429} and len(refused) >= 4
        for answer in refused:
            status, error = error_of(answer)
            assert error["code"] == "overloaded" and int(answer[1]["Retry-After"]) >= 1
        for status, _, body in answers:
            assert status == 429 or json.loads(body)["usage"]["completion_tokens"] == 5
        with pytest.raises(openai.RateLimitError):
            small.client().completions.create(**{key: LONG[key] for key in ("model", "prompt", "max_tokens")}, n=8)


def test_slow_clients_are_closed_and_the_others_served(served, alone) -> None:
    limits = ServerConfig(head_timeout=2.0, body_timeout=2.0)
    half = post("/v1/completions", LONG)[:-10]
    with running(served, limits) as strict, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(send(strict, b"POST /v1/comp")) for _ in range(300 if FULL else 60)]
        short = [stack.enter_context(send(strict, half)) for _ in range(3)]
        assert json.loads(ask(strict, "POST", "/v1/chat/completions", CHAT)[2])["choices"]  # while they wait
        silent = stack.enter_context(send(strict, b""))
        for connection in [*slow, *short]:
            said = b"".join(iter(lambda connection=connection: connection.recv(4096), b""))
            assert said.startswith(b"HTTP/1.1 408 ") and b"did not come within 2 s" in said
        assert silent.recv(4096).startswith(b"HTTP/1.1 408 ")
        until(strict.is_empty)


def test_a_byte_now_and_then_does_not_keep_a_connection(served) -> None:
    with running(served, ServerConfig(head_timeout=1.0)) as strict:
        connection = send(strict, b"GET /health HTTP/1.1\r\n")
        connection.settimeout(0.1)
        limit, said = time.monotonic() + PATIENCE, b""
        while not said and time.monotonic() < limit:
            with contextlib.suppress(OSError):
                connection.sendall(b"X-A: b\r\n")
                said = connection.recv(4096)
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_request_that_is_pipelined_behind_another_has_no_longer_than_the_first(served) -> None:
    """A part of it lies in the buffer when the answer before it is complete: no further byte starts its clock."""
    first, behind = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", post("/v1/completions", LONG)
    with running(served, ServerConfig(head_timeout=0.3, body_timeout=0.3)) as strict:
        for name, data in (("head", first + behind[:30]), ("body", first + behind[:-10])):
            said = raw(strict, data)  # returns only because the server closes
            assert said.startswith(b"HTTP/1.1 200 ") and said.count(b"HTTP/1.1 ") == 2
            assert f"the {name} of the request did not come within 0.3 s".encode() in said
        assert (
            raw(strict, first * 3 + first.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n")).count(
                b"HTTP/1.1 200 "
            )
            == 4
        )
        until(strict.is_empty)


def test_a_request_is_answered_once(served) -> None:
    """Refused for its head alone, its body never comes: the connection is closed without a second answer."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n"
    with running(served, ServerConfig(body_timeout=0.3)) as strict:
        said = raw(strict, head + b"{")
        assert said.startswith(b"HTTP/1.1 415 ") and said.count(b"HTTP/1.1 ") == 1


def test_a_connection_may_be_idle_between_two_requests(served) -> None:
    """For longer than a head may take: the clock of the next one has not begun."""
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(served, ServerConfig(head_timeout=0.5)) as strict, send(strict, health) as connection:
        said = b""
        while not said.endswith(b'"ok"}'):
            said += connection.recv(4096)
        connection.settimeout(0.9)
        with pytest.raises(TimeoutError):  # neither an answer to nothing nor the end of the connection
            connection.recv(4096)
        connection.settimeout(PATIENCE)
        connection.sendall(health)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_its_stream_is_aborted(served) -> None:
    limits = ServerConfig(write_timeout=1.0, max_pending=16)
    with running(served, limits) as strict:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        wide = {"stream": True, "n": 8, "logprobs": 20, "max_tokens": 400}  # some megabytes
        connection.sendall(post("/v1/completions", LONG | wide))
        until(lambda: strict.service.in_flight == 1)
        until(strict.is_empty)  # long before the client reads a byte
        assert strict.thread.latest.generated_tokens < 8 * 400
        said = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                said += piece
        assert b"[DONE]" not in said or b"unread; the request was aborted" in said
        connection.close()
        assert ask(strict, "POST", "/v1/chat/completions", CHAT)[0] == 200


# HT12: the engine fails


def test_an_engine_that_fails_is_told_to_all_and_ends_the_server(served) -> None:
    with running(served) as dying, concurrent.futures.ThreadPoolExecutor(4) as pool:
        requests = [LONG | {"stream": number % 2 == 0} for number in range(4)]
        futures = [pool.submit(ask, dying, "POST", "/v1/completions", request) for request in requests]
        until(lambda: dying.thread.latest.generated_tokens > 40)
        dying.server.on_tick = lambda counter: wait_for_asking(dying)  # the server stays until it was asked
        dying.engine.error = RuntimeError("out of memory")
        for request, future in zip(requests, futures, strict=True):
            status, _, body = future.result()
            if request["stream"]:
                *_, error, done, _ = body.decode().split("\n\n")
                assert status == 200 and done == "data: [DONE]"
                assert json.loads(error[6:])["error"]["code"] == "engine_dead"
            else:
                assert status == 500 and json.loads(body)["error"]["code"] == "engine_dead"
        status, _, body = ask(dying, "GET", "/health")
        assert (status, json.loads(body)["status"]) == (503, "engine dead") and dying.metric("engine_up") == 0
        status, error = error_of(ask(dying, "POST", "/v1/completions", LONG))
        assert (status, error["code"]) == (503, "engine_dead") and "out of memory" in error["message"]
        del dying.server.on_tick
        dying.runner.join(PATIENCE)
        assert not dying.runner.is_alive()  # it ends by itself; the process with exit code 1


async def wait_for_asking(server: Running) -> bool:
    return server.server.should_exit


# HT13 and HT15: keys, names, browsers


def test_keys_are_asked_for(served, monkeypatch) -> None:
    monkeypatch.setenv("COURSE_TEST_KEY", "secret-äöü")
    with running(served, ServerConfig(api_key_env="COURSE_TEST_KEY")) as locked:
        right = "Bearer secret-äöü".encode().decode("latin-1")
        other = right.replace("Bearer", "Basic")
        for header in (None, "", "Bearer", "Bearer wrong", other, "secret", right + "x", right[:-1]):
            given = {} if header is None else {"Authorization": header}
            status, error = error_of(ask(locked, "GET", "/v1/models", **given))
            assert (status, error["code"]) == (401, "invalid_api_key")
        assert ask(locked, "GET", "/v1/models", Authorization=right)[0] == 200
        assert ask(locked, "GET", "/v1/models", Authorization=right.replace("Bearer", "bearer"))[0] == 200
        assert ask(locked, "GET", "/health")[0] == 200  # a balancer has no key
        with pytest.raises(openai.AuthenticationError):
            locked.client("wrong").models.list()
    with pytest.raises(ValueError, match="COURSE_NO_SUCH_KEY is empty or not set"):
        ServerConfig(api_key_env="COURSE_NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("GET", "/v1/../health", 404, "not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "model_not_found"),
    ],
)
def test_wrong_methods_and_paths(server, method: str, path: str, status: int, code: str) -> None:
    found, error = error_of(ask(server, method, path))
    assert (found, error["code"]) == (status, code)


def test_an_unknown_model_is_not_found(server) -> None:
    status, error = error_of(ask(server, "POST", "/v1/chat/completions", CHAT | {"model": "gpt-4"}))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model") and NAME in error["message"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", ""]
)
def test_a_page_that_gives_its_own_name_to_this_machine_is_refused(server, host: str) -> None:
    status, error = error_of(ask(server, "GET", "/v1/models", Host=host))
    assert (status, error["code"]) == (400, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000"])
def test_names_of_this_machine_are_its_own(server, host: str) -> None:
    assert ask(server, "GET", "/health", Host=host)[0] == 200


def test_a_browser_may_not_send_what_it_need_not_ask_for(server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", ""):
        status, error = error_of(ask(server, "POST", "/v1/chat/completions", CHAT, Content_Type=kind))
        assert (status, error["code"]) == (415, "unsupported_media_type")
    given = "Application/JSON; charset=utf-8"
    status, headers, _ = ask(
        server, "POST", "/v1/chat/completions", CHAT, Content_Type=given, Origin="http://evil.example"
    )
    assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in headers["content-security-policy"]


def test_ids_of_requests_are_kept_if_they_are_harmless(server) -> None:
    assert ask(server, "GET", "/health", X_Request_Id="trace-17.a")[1]["x-request-id"] == "trace-17.a"
    for strange in ("a b", "x" * 65, "<script>", "a\x1b[31m"):
        assert re.fullmatch(r"[0-9a-f]{32}", ask(server, "GET", "/health", X_Request_Id=strange)[1]["x-request-id"])


def test_markup_and_control_characters_stay_data(served, capsys) -> None:
    evil = "</script><script>alert(1)</script>\x1b[2J\r\nHTTP/1.1 200 OK ![x](http://evil.example/?q=1)"
    with running(served, ServerConfig(log=True)) as logging:
        status, headers, body = ask(logging, "POST", "/v1/chat/completions", CHAT | {"model": evil})
        ask(logging, "GET", "/%1b%5b2J%0d%0aINJECTED%20200")
    assert status == 404 and headers["content-type"] == "application/json"
    assert b"\x1b" not in body and b"\r" not in body and b"\n" not in body
    written = capsys.readouterr().err  # a server that has ended writes no more
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["path"] for line in lines] == ["/v1/chat/completions", "/\x1b[2J\r\nINJECTED 200"]
    assert "\x1b" not in written


def test_routes_that_clients_make_up_do_not_become_labels(server) -> None:
    for number in range(3):
        ask(server, "GET", f"/made-up-{number}")
        ask(server, "POST", f"/v1/made-up-{number}", {})
    text = ask(server, "GET", "/metrics")[2].decode()
    assert "made-up" not in text and 'route="/v1/other",status="404"' in text and 'route="other",status="404"' in text


def test_metrics_count_what_happened(server) -> None:
    before = {
        name: server.metric(name) for name in ("generated_tokens_total", "ttft_seconds_count", "request_seconds_count")
    }
    usage = json.loads(ask(server, "POST", "/v1/completions", LONG | {"max_tokens": 7, "n": 2})[2])["usage"]
    assert usage["completion_tokens"] == 14 and usage["prompt_tokens"] == 3
    assert server.metric("generated_tokens_total") - before["generated_tokens_total"] == 14
    assert server.metric("ttft_seconds_count") - before["ttft_seconds_count"] == 2
    assert server.metric("request_seconds_count") - before["request_seconds_count"] == 2


# What is written down of an answer


class Told:
    """An answer that says what it is told to say."""

    def __init__(self, *outputs: RequestOutput) -> None:
        self.outputs, self.closed = outputs, 0

    async def __aiter__(self):
        for output in self.outputs:
            yield int(output.request_id), output

    def close(self) -> None:
        self.closed += 1


def unseen() -> SimpleNamespace:
    return SimpleNamespace(see=lambda index, output: None)


def written(service, shape, answer: Told) -> list[dict]:
    async def listed() -> list[dict]:
        return [event async for event in service.events(answer, shape, unseen(), True)]

    return asyncio.run(listed())


def test_choices_that_end_in_any_order_are_written_down_in_theirs(server, served) -> None:
    outputs = [
        RequestOutput("1", [5], "b", "stop", n_prompt=9, n_generated=1, n_cached=4),
        RequestOutput("0", [5], "a", n_prompt=9, n_generated=1, n_cached=2),
        RequestOutput("0", [6, 7], "c", "length", n_prompt=9, n_generated=3, n_cached=2),
    ]
    answer = Told(*outputs)
    whole = asyncio.run(server.service.whole(answer, ChatShape(served), unseen()))
    assert [(each["index"], each["message"]["content"]) for each in whole["choices"]] == [(0, "ac"), (1, "b")]
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert whole["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 4}} and answer.closed
    assert written(server.service, ChatShape(served), Told(*outputs))[-1]["usage"] == whole["usage"]


def test_pieces_without_text_are_sent_where_they_say_something(server, served) -> None:
    logprob = TokenLogprob(5, -math.inf, ((5, -math.inf),))
    answer = Told(
        RequestOutput("0", [5], ""),  # a role
        RequestOutput("0", [5], ""),  # nothing
        RequestOutput("0", [5], "", logprobs=[logprob]),
        RequestOutput("0", [5], "a"),
        RequestOutput("0", [5], "", "stop", n_generated=5),
    )
    *chunks, usage = written(server.service, ChatShape(served), answer)
    found = [chunk["choices"][0] for chunk in chunks]
    assert [each["delta"] for each in found] == [{"role": "assistant", "content": ""}, {}, {"content": "a"}, {}]
    assert [each["finish_reason"] for each in found] == [None, None, None, "stop"] and usage["choices"] == []
    [entry] = found[1]["logprobs"]["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0  # JSON has no infinity


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_engine_gave_up_is_no_answer(server, served, reason: str) -> None:
    answer = Told(RequestOutput("0", [5], "a"), RequestOutput("0", [], "", reason))
    first, error = written(server.service, ChatShape(served), answer)
    assert first["choices"][0]["delta"]["content"] == "a" and error["error"]["code"] == "request_failed"
    assert answer.closed


def test_a_stream_whose_client_has_left_before_its_first_piece_is_closed() -> None:
    closed = []

    async def run() -> None:
        never = asyncio.Event()

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            await never.wait()

        await EventStream(events(), lambda: closed.append(1))({"type": "http"}, receive, send)

    async def events():
        yield {}

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert closed == [1]


def test_metrics_have_the_numbers_of_the_engine() -> None:
    names = ("running", "waiting", "n_blocks", "free_blocks", "prompt_tokens", "cached_tokens", "generated_tokens")
    stats = {name: number for number, name in enumerate((*names, "preemptions", "steps"), start=1)}
    meters = Meters(SimpleNamespace(latest=SimpleNamespace(**stats), alive=True))
    found = {sample.name.removeprefix("course_"): sample.value for one in meters.collect() for sample in one.samples}
    wanted = {"blocks" if name == "n_blocks" else name: value for name, value in stats.items()}
    counters = {
        f"{name}_total" for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "preemptions", "steps")
    }
    assert found == {f"{n}_total" if f"{n}_total" in counters else n: v for n, v in wanted.items()} | {"engine_up": 1}


def test_what_left_without_an_answer_counts_as_499(server, capsys) -> None:
    async def gone(scope: dict, receive: Callable, send: Callable) -> None:
        return

    async def nothing(*args) -> None:
        return

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions" + "x" * 900,
        "headers": [(b"host", b"localhost")],
    }
    service = SimpleNamespace(config=ServerConfig(log=True), key_digest=None, draining=False, in_flight=0)
    service.meters = Meters(server.thread)
    asyncio.run(Guard(gone, service)(scope, nothing, nothing))
    counted = generate_latest(service.meters.registry).decode()
    assert 'course_requests_total{route="/v1/other",status="499"} 1.0' in counted and service.in_flight == 0
    assert len(json.loads(capsys.readouterr().err)["path"]) == 200  # no client fills a log with one line


def test_a_server_that_drains_says_when_to_come_back_and_closes(server) -> None:
    service = SimpleNamespace(config=ServerConfig(), key_digest=None, draining=True)
    refusal = Guard(None, service).refusal({"path": "/v1/models"}, {"host": "localhost"})
    assert (refusal.status, refusal.headers) == (503, {"Retry-After": "5", "Connection": "close"})
    assert Guard(None, service).refusal({"path": "/health"}, {"host": "localhost"}) is None


def test_forms_are_kept_by_their_schema_the_unused_going_first(monkeypatch) -> None:
    monkeypatch.setattr("server.MAX_CONSTRAINTS", 2)
    cache, built = ConstraintCache(None), []
    monkeypatch.setattr(cache, "build", lambda schema: built.append(schema) or len(built))
    one, two, three = ({"type": "object", "properties": dict.fromkeys(names, {})} for names in ("ab", "ba", "c"))

    async def get(schema: dict) -> int:
        return await cache.get(SchemaFormat.model_validate(form_of(schema)))

    found = [asyncio.run(get(schema)) for schema in (one, two, one, three, one, two)]
    assert found == [1, 2, 1, 3, 1, 4]  # the order of the properties is the answer's


def test_a_pool_smaller_than_the_context_is_the_limit(served) -> None:
    with running(served, n_blocks=3, block_size=16) as small:
        status, error = error_of(ask(small, "POST", "/v1/completions", LONG | {"max_tokens": 46}))
        assert (status, error["code"]) == (400, "context_length_exceeded") and "48 tokens" in error["message"]
        assert ask(small, "POST", "/v1/completions", LONG | {"max_tokens": 45})[0] == 200
    assert not small.thread.thread.is_alive()  # a server that ends takes its engine's thread with it


def test_names_of_a_server() -> None:
    config = ServeConfig(host="Box", allowed_hosts=" My.Example ,other,", name="mine")
    assert config.hosts == {"127.0.0.1", "localhost", "[::1]", "box", "my.example", "other"}
    assert config.model_name == "mine" and ServeConfig().model_name == NAME


# Limits of a connection


async def received(*pieces: bytes) -> bytes:
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return waiting.pop(0)

    length = str(len(b"".join(pieces))).encode()
    return await read_body(Request({"type": "http", "headers": [(b"content-length", length)]}, receive), 10)


def test_a_body_may_have_as_many_bytes_as_the_limit() -> None:
    assert asyncio.run(received(b"12345", b"67890")) == b"1234567890"
    with pytest.raises(ApiError, match="more than 10 bytes"):
        asyncio.run(received(b"12345", b"678901"))


def test_a_head_has_its_target_among_its_bytes_and_may_be_as_long_as_the_limit() -> None:
    for size, fits in ((1024, True), (1025, False)):
        connection = StrictConnection(h11.SERVER, 1024)
        target = "/" + "a" * (size - 1 - len("Hostlocalhost") - 4)
        connection.receive_data(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with (
            contextlib.nullcontext()
            if fits
            else pytest.raises(h11.RemoteProtocolError, match="headers have 1025 bytes")
        ):
            assert connection.next_event().target == target.encode()


def test_more_connections_than_allowed_are_closed(served) -> None:
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(served, ServerConfig(max_connections=2)) as strict, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(send(strict, health))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert raw(strict, health) == b""


def test_a_client_that_reads_again_has_its_whole_time_at_its_next_pause() -> None:
    async def run() -> list[asyncio.TimerHandle]:
        made = bounded_protocol(HttpLimits(write_timeout=50.0))
        protocol = made(uvicorn.Config(lambda *args: None), ServerState(), {})
        protocol.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
        protocol.transport = SimpleNamespace(abort=lambda: None)
        timers = []
        for _ in range(2):
            before = protocol.loop.time()
            protocol.pause_writing()
            timers.append(protocol.writing)
            assert before + 50 <= protocol.writing.when() <= protocol.loop.time() + 50
            assert not protocol.writing.cancelled()
            protocol.resume_writing()
        return timers

    assert all(timer.cancelled() for timer in asyncio.run(run()))


# Starting


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--block-size", "0"], "block_size"),
        (["--model", "no-such-folder"], "no folder"),
        (["--port", "70000"], "port"),
        (["--host", "x" * 300], "is no address of this machine"),
        (["--max-body", "0"], "max_body"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(flags: list[str], reason: str, capsys) -> None:
    from server import SERVER_VERBS
    from workbench import run_verbs

    with pytest.raises(SystemExit) as ended:
        run_verbs("", SERVER_VERBS, ["serve", *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and reason in error


def test_a_busy_port_is_named(capsys) -> None:
    from server import SERVER_VERBS
    from workbench import run_verbs

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        run_verbs("", SERVER_VERBS, ["serve", "--port", str(taken.getsockname()[1])])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "choose another --port" in error


def test_limits_must_make_sense() -> None:
    for field in ("max_body", "max_head", "head_timeout", "body_timeout", "write_timeout", "max_connections"):
        with pytest.raises(ValueError, match=field):
            HttpLimits(**{field: 0})


def test_the_end_waits_as_long_as_it_was_told_and_a_second_for_what_is_said_to_the_rest(monkeypatch) -> None:
    now, failed = SimpleNamespace(seconds=0.0), []
    monkeypatch.setattr("server.time", SimpleNamespace(monotonic=lambda: now.seconds))
    thread = SimpleNamespace(failure=None, fail_all=failed.append)
    service = SimpleNamespace(thread=thread, draining=False, in_flight=1, config=SimpleNamespace(grace=30.0))
    server, seen = GracefulServer(uvicorn.Config(None), service), []
    for now.seconds in (90.0, 100.0, 129.9, 130.5, 131.5):
        service.draining = now.seconds >= 100
        seen.append((asyncio.run(server.on_tick(1)), len(failed)))
    assert seen == [(False, 0), (False, 0), (False, 0), (False, 1), (True, 2)]  # told twice is told
    service.in_flight = 0
    server = GracefulServer(uvicorn.Config(None), service)
    assert asyncio.run(server.on_tick(1)) and len(failed) == 2  # nothing to wait for


def test_the_times_of_an_answer_are_told_by_choice(monkeypatch) -> None:
    told: dict[str, list[float]] = {"ttft": [], "tpot": [], "latency": []}
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("server.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    watch = Stopwatch(SimpleNamespace(**{name: SimpleNamespace(observe=seen.append) for name, seen in told.items()}))
    for now.seconds, choice, new, n, reason in (
        (101.0, 0, [], 0, None),  # nothing yet
        (102.0, 0, [5], 1, None),
        (104.0, 1, [5, 6], 2, None),
        (105.0, 0, [6, 7], 3, None),
        (106.0, 0, [8, 9], 5, "length"),  # four tokens in four seconds after the first
        (107.0, 1, [7], 3, "stop"),  # 2 in 3
    ):
        watch.see(choice, RequestOutput("", new, "", finish_reason=reason, n_generated=n))
    now.seconds = 108.0
    watch.see(2, RequestOutput("", [7], "", finish_reason="stop", n_generated=1))  # no time between two
    assert told == {"ttft": [2.0, 4.0, 8.0], "tpot": [1.0, 1.5], "latency": [6.0, 7.0, 8.0]}


@pytest.mark.parametrize(
    ("told", "failure", "end"),
    [(signal.SIGINT, None, KeyboardInterrupt), (signal.SIGTERM, None, None), (signal.SIGTERM, "died", SystemExit)],
)
def test_a_server_ends_as_it_was_told(told, failure, end, monkeypatch) -> None:
    service = SimpleNamespace(thread=SimpleNamespace(failure=failure), draining=False)
    server = GracefulServer(uvicorn.Config(None), service)
    monkeypatch.setattr(server, "run", lambda sockets: server.handle_exit(told, None))
    with pytest.raises(end) if end else contextlib.nullcontext():
        server.serve_at(None)
    assert service.draining


def test_a_closed_terminal_drains_a_server_unless_nohup_started_it() -> None:
    service = SimpleNamespace(draining=False)
    for handler, heard in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        server, before = GracefulServer(uvicorn.Config(None), service), signal.signal(signal.SIGHUP, handler)
        try:
            with server.capture_signals():
                os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is handler
        finally:
            signal.signal(signal.SIGHUP, before)
        assert server.signals == [signal.SIGHUP] * heard
    assert service.draining
