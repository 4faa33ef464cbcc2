"""Tests of server: a real uvicorn on this machine, the official client, hostile clients, and the end of a process.

FULL_COUNTS=1 takes the numbers of clients that a server should stand (200, 300 sockets, 64 MB); the suite takes less.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import openai
import pytest
import uvicorn

from chat_model import FOLDER
from engine_requests import RequestParams
from engine_thread import EngineThread
from http_limits import HttpLimits, bounded_protocol
from served_model import ServedModel, load_served_model
from server import GracefulServer, ServerConfig, make_app
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
    with running(served, ServerConfig(log=True)) as found:
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
    assert found.text_offset[0] == 0 and found.text_offset[1] == len(found.tokens[0])
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
    status, error = error_of(ask(server, "POST", "/v1/completions", {"model": NAME, "prompt": [5, 10**6]}))
    assert (status, error["param"]) == (400, "prompt") and "1000000" in error["message"]


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
        for header in (None, "", "Bearer", "Bearer wrong", "Basic secret", "secret", right + "x", right[:-1]):
            given = {} if header is None else {"Authorization": header}
            status, error = error_of(ask(locked, "GET", "/v1/models", **given))
            assert (status, error["code"]) == (401, "invalid_api_key")
        assert ask(locked, "GET", "/v1/models", Authorization=right)[0] == 200
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
    _, headers, _ = ask(server, "POST", "/v1/chat/completions", CHAT, Content_Type=given, Origin="http://evil.example")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in headers["content-security-policy"]


def test_ids_of_requests_are_kept_if_they_are_harmless(server) -> None:
    assert ask(server, "GET", "/health", X_Request_Id="trace-17.a")[1]["x-request-id"] == "trace-17.a"
    for strange in ("a b", "x" * 65, "<script>", "a\x1b[31m"):
        assert re.fullmatch(r"[0-9a-f]{32}", ask(server, "GET", "/health", X_Request_Id=strange)[1]["x-request-id"])


def test_markup_and_control_characters_stay_data(server, capsys) -> None:
    evil = "</script><script>alert(1)</script>\x1b[2J\r\nHTTP/1.1 200 OK ![x](http://evil.example/?q=1)"
    status, headers, body = ask(server, "POST", "/v1/chat/completions", CHAT | {"model": evil})
    assert status == 404 and headers["content-type"] == "application/json"
    assert b"\x1b" not in body and b"\r" not in body and b"\n" not in body
    ask(server, "GET", "/%1b%5b2J%0d%0aINJECTED%20200")
    seen: list[str] = []

    def written() -> bool:
        seen.append(capsys.readouterr().err)
        return "INJECTED" in "".join(seen)

    until(written)
    lines = [json.loads(line) for line in "".join(seen).splitlines()]
    assert [line["path"] for line in lines if "INJECTED" in line["path"]] == ["/\x1b[2J\r\nINJECTED 200"]
    assert "\x1b" not in "".join(seen)


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
