"""Tests of chat_endpoint: the engine in this process, topic 13's server, and servers that answer whatever they like."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import chat_endpoint
from chat_endpoint import (
    EndpointError,
    HttpConfig,
    HttpEndpoint,
    LocalEndpoint,
    Reply,
    checked_base_url,
    open_endpoint,
)
from engine_thread import EngineThread
from server import ServerConfig, background_server
from serving_engine import Engine, EngineConfig

QUESTIONS = ["What is 3 plus 4 ?", "Do you know the sum of 12 and 14 ?", "Sort 6 7 3 .", "What pet does Ben King own ?"]
CHATS = [[{"role": "user", "content": text}] for text in QUESTIONS]
SECRET = "sk-very-secret-0123456789"
DIGITS = {"type": "object", "properties": {"n": {"enum": [3, 7]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def local() -> LocalEndpoint:
    return open_endpoint()


@pytest.fixture(scope="module")
def remote(local) -> Iterator[HttpEndpoint]:
    engine = Engine(local.served.model, local.served.tokenizer, EngineConfig(max_batch=8))
    with background_server(local.served, EngineThread(engine)) as server:
        endpoint = open_endpoint(server.url)
        yield endpoint
        endpoint.close()


def unchanged(local: LocalEndpoint) -> bool:
    stats = local.engine.stats()
    return not local.outputs and not local.engine.busy and stats.free_blocks == stats.n_blocks


# The engine in this process


def test_the_course_chat_model_answers(local):
    reply = local.chat(CHATS[0])
    assert reply.text == "3 plus 4 is 7." and reply.finish_reason == "stop"
    assert reply.n_prompt > 5 and reply.n_generated > 5 and reply.seconds > 0 and reply.logprobs == ()


def test_stream_batch_and_single_answers_agree(local):
    single = [local.chat(messages).text for messages in CHATS]
    assert [reply.text for reply in local.chat_all(CHATS)] == single
    streamed = [list(local.stream(messages)) for messages in CHATS]
    assert ["".join(pieces) for pieces in streamed] == single and all(len(pieces) > 2 for pieces in streamed)
    with ThreadPoolExecutor(4) as pool:
        assert [reply.text for reply in pool.map(local.chat, CHATS)] == single
    assert unchanged(local) or local.engine.step() == [] or unchanged(local)


def test_logprobs_are_those_of_a_greedy_answer(local):
    reply = local.chat(CHATS[0], logprobs=True)
    assert len(reply.logprobs) == reply.n_generated and all(value <= 1e-6 for value in reply.logprobs)


def test_a_schema_binds_the_answer(local):
    assert json.loads(local.chat(CHATS[0], schema=DIGITS).text) in ({"n": 3}, {"n": 7})
    assert len(local.constraints) == 1
    local.chat(CHATS[1], schema=DIGITS)
    assert len(local.constraints) == 1


def test_completion_length_and_stop(local):
    reply = local.complete("Sum: 2 + 3 =", max_tokens=1)
    assert reply.text.strip() == "5" and (reply.finish_reason, reply.n_generated) == ("length", 1)
    assert local.chat(CHATS[0], stop="is").text == "3 plus 4 "


def test_a_stream_that_is_closed_gives_its_blocks_back(local):
    for n_read in (0, 1):
        stream = local.stream(CHATS[0])
        for _ in range(n_read):
            next(stream)
        stream.close()
        assert not local.outputs
        local.chat(CHATS[1], max_tokens=1)
        assert unchanged(local)


def test_a_bad_conversation_leaves_nothing_behind(local):
    long = [{"role": "user", "content": "red " * 3000}]
    with pytest.raises(ValueError, match="context"):
        local.chat_all([CHATS[0], long])
    local.chat(CHATS[1], max_tokens=1)
    assert unchanged(local)


@pytest.mark.parametrize(
    ("messages", "settings", "words"),
    [
        (CHATS[0], {"temprature": 1}, "did you mean 'temperature'"),
        (CHATS[0], {"temperature": -1}, "temperature must be finite and >= 0"),
        ([], {}, "at least one message"),
        ([{"role": "user"}], {}, "a role and a content"),
        ([{"role": "tool", "content": "x"}], {}, "unknown role 'tool'"),
        (["hello"], {}, "a role and a content"),
    ],
)
def test_bad_requests_say_what_is_wrong(local, messages, settings, words):
    with pytest.raises(ValueError, match=words):
        local.chat(messages, **settings)


def test_a_full_queue_is_an_endpoint_error(local):
    small = LocalEndpoint(local.served, EngineConfig(max_waiting=2))
    streams = [small.stream(CHATS[0]) for _ in range(2)]
    with pytest.raises(EndpointError, match="try again later") as caught:
        small.stream(CHATS[0])
    assert caught.value.status == 429
    assert ["".join(stream) for stream in streams] == ["3 plus 4 is 7."] * 2
    assert len(small.chat_all(CHATS)) == 4  # more than the queue holds


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        open_endpoint(None, tmp_path / "nowhere")


# Topic 13's server


def test_the_server_answers_as_the_engine_does(local, remote):
    assert remote.name == "course-chat"
    for here, there in zip(local.chat_all(CHATS), remote.chat_all(CHATS), strict=True):
        assert (here.text, here.finish_reason, here.n_prompt, here.n_generated) == (
            there.text,
            there.finish_reason,
            there.n_prompt,
            there.n_generated,
        )
    assert "".join(remote.stream(CHATS[1])) == local.chat(CHATS[1]).text
    assert remote.complete("Sum: 2 + 3 =", max_tokens=1).text == local.complete("Sum: 2 + 3 =", max_tokens=1).text
    settings = {"logprobs": True, "tenant": "a", "top_k": 3, "max_tokens": 4, "stop": ("plus",)}
    one, other = local.chat(CHATS[0], **settings), remote.chat(CHATS[0], **settings)
    assert one.text == other.text and one.logprobs == pytest.approx(other.logprobs, abs=1e-4) and one.logprobs
    assert json.loads(remote.chat(CHATS[0], schema=DIGITS).text)["n"] in (3, 7)


def test_closing_a_stream_ends_the_request(remote):
    with pytest.raises(StopIteration):
        stream = remote.stream(CHATS[0])
        stream.close()
        next(stream)
    assert remote.chat(CHATS[0]).text == "3 plus 4 is 7."


def test_an_unknown_model_is_named_with_those_there_are(remote):
    wrong = HttpEndpoint(remote.base_url, "gpt-9")
    with pytest.raises(EndpointError, match="404.*gpt-9.*listed: course-chat") as caught:
        wrong.chat(CHATS[0])
    assert caught.value.status == 404


def test_a_key_is_needed_and_never_shown(local, monkeypatch):
    monkeypatch.setenv("COURSE_KEY", SECRET)
    engine = Engine(local.served.model, local.served.tokenizer, EngineConfig(max_batch=2))
    with background_server(local.served, EngineThread(engine), ServerConfig(api_key_env="COURSE_KEY")) as server:
        endpoint = open_endpoint(server.url, None, HttpConfig(api_key_env="COURSE_KEY"))
        assert endpoint.chat(CHATS[0]).text == "3 plus 4 is 7." and SECRET not in repr(endpoint)
        monkeypatch.setenv("COURSE_KEY", "wrong-key-here")
        with pytest.raises(EndpointError, match="401.*COURSE_KEY is missing or wrong") as caught:
            open_endpoint(server.url, None, HttpConfig(api_key_env="COURSE_KEY"))
        assert "wrong-key-here" not in str(caught.value)


# Servers that answer whatever they like


class Scripted:
    """A server whose answers are given: (status, headers, body) for each request, the last again and again."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes]) -> None:
        self.answers, self.asked, self.go = list(answers), [], threading.Event()
        self.listed = 200, json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
        self.go.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(outer.listed[0], {}, outer.listed[1])

            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                outer.go.wait(30)
                status, headers, body = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self.answer(status, headers, body)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                given = {"content-type": "application/json", "content-length": str(len(body))} | headers
                for name, value in given.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(*answers: tuple[int, dict[str, str], bytes]) -> Scripted:
        made.append(Scripted(*answers))
        return made[-1]

    yield make
    for server in made:
        server.go.set()
        server.server.shutdown()
        server.server.server_close()


def chat_body(**message: object) -> bytes:
    made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"} | message}
    return json.dumps(made | {"choices": [choice]}).encode()


GOOD = (200, {}, chat_body(content="yes"))
BUSY = json.dumps({"error": {"message": "slow down", "type": "rate_limit_error", "code": None}}).encode()


def test_a_plain_answer_without_usage(scripted):
    server = scripted(GOOD)
    reply = HttpEndpoint(server.url, None).chat(CHATS[0], max_tokens=5)
    assert reply == Reply("yes", "stop", 0, 0, reply.seconds)
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["max_tokens"] == 5 and "seed" not in server.asked[0]
    assert server.asked[0]["model"] == "m"


def test_busy_servers_are_asked_again_after_the_time_that_they_name(scripted):
    slept: list[float] = []
    server = scripted((429, {"retry-after": "7"}, BUSY), (503, {}, BUSY), (429, {"retry-after": "soon"}, BUSY), GOOD)
    endpoint = HttpEndpoint(server.url, None, HttpConfig(max_wait=20), slept.append)
    assert endpoint.chat(CHATS[0]).text == "yes" and slept == [7.0, 1.0, 2.0]


@pytest.mark.parametrize("header", ["60", "99999999999", "inf"])
def test_nobody_waits_longer_than_allowed(scripted, header):
    slept: list[float] = []
    endpoint = HttpEndpoint(
        scripted((429, {"retry-after": header}, BUSY)).url, None, HttpConfig(max_wait=20), slept.append
    )
    with pytest.raises(EndpointError, match="429: slow down.*more than the 20 allowed") as caught:
        endpoint.chat(CHATS[0])
    assert not slept and caught.value.status == 429


def test_a_server_without_end_to_its_refusals_is_left(scripted):
    slept: list[float] = []
    endpoint = HttpEndpoint(scripted((429, {"retry-after": "0"}, BUSY)).url, None, HttpConfig(), slept.append)
    with pytest.raises(EndpointError, match="429"):
        endpoint.chat(CHATS[0])
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_a_timeout_is_one_line(scripted):
    server = scripted(GOOD)
    server.go.clear()
    with pytest.raises(EndpointError, match="did not answer within 0.2 s"):
        HttpEndpoint(server.url, None, HttpConfig(timeout=0.2)).chat(CHATS[0])


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"not JSON"),
        (200, {"content-type": "text/html"}, b"<html>a proxy's page</html>"),
        (200, {}, b"[]"),
        (200, {}, b"{}"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": null}'),
        (200, {}, b'{"choices": [{"message": null}]}'),
        (200, {}, chat_body(content=17)),
        (200, {}, chat_body(content={"a": 1})),
    ],
)
def test_what_is_no_answer_is_one_line(scripted, answer):
    with pytest.raises(EndpointError, match="not that of OpenAI's API"):
        HttpEndpoint(scripted(answer).url, None).chat(CHATS[0])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'data: {"choices": [{"index": 0, "delta": {"content": "half"}}]}\n\n', "broke off"),
        (b"data: {not json}\n\ndata: [DONE]\n\n", "not that of OpenAI's API"),
        (b'data: {"error": {"message": "engine died"}}\n\n', "engine died"),
        (b'data: {"choices": [{"index": 0, "delta": null}]}\n\n', "not that of OpenAI's API"),
    ],
)
def test_streams_that_end_badly_are_one_line(scripted, body, words):
    endpoint = HttpEndpoint(scripted((200, {"content-type": "text/event-stream"}, body)).url, None)
    with pytest.raises(EndpointError, match=words):
        list(endpoint.stream(CHATS[0]))


def test_a_server_that_repeats_the_key_does_not_get_it_shown(scripted, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    body = json.dumps({"error": {"message": f"key {SECRET} is out of money\nsee log", "code": None}}).encode()
    with pytest.raises(EndpointError, match=r"402: key \*\*\* is out of money see log") as caught:
        HttpEndpoint(scripted((402, {}, body)).url, None).chat(CHATS[0])
    assert SECRET not in repr(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("ftp://here/v1", "no address of a server"),
        ("localhost:8000", "no address of a server"),
        ("http://me:secret@127.0.0.1:8000/v1", "in the environment variable"),
    ],
)
def test_addresses_that_lead_nowhere(url, words):
    with pytest.raises(EndpointError, match=words) as caught:
        open_endpoint(url)
    assert "secret" not in str(caught.value)


def test_what_a_server_is_sent_is_what_was_asked_for(scripted):
    """Extensions go beside OpenAI's own fields, a tenant as its user, a schema as its form of an answer."""
    server = scripted(GOOD, (200, {}, json.dumps({"choices": [{"text": "b", "finish_reason": "length"}]}).encode()))
    endpoint = HttpEndpoint(server.url, "m")
    settings = {"max_tokens": 7, "stop": ("a", "b"), "top_k": 3, "seed": None, "tenant": "ann", "logprobs": True}
    endpoint.chat(CHATS[0], **settings, schema=DIGITS)
    made = endpoint.complete("Once", **settings, schema=DIGITS)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": DIGITS}}
    common = {"model": "m", "temperature": 0, "max_tokens": 7, "stop": ["a", "b"], "top_k": 3, "user": "ann"}
    asked = common | {"messages": CHATS[0], "logprobs": True, "response_format": form}
    assert server.asked == [asked, common | {"prompt": "Once", "logprobs": 0, "response_format": form}]
    assert (made.text, made.finish_reason) == ("b", "length")
    endpoint.close()
    assert endpoint.client.is_closed()


def test_the_engine_is_asked_for_the_same(local):
    made = local.params([1, 2, 3], {"stop": "x", "tenant": "ann", "top_k": 4, "logprobs": True})
    assert (made.temperature, made.stop, made.tenant, made.top_k, made.logprobs) == (0.0, ("x",), "ann", 4, 0)
    assert made.max_tokens == local.engine.max_context - 3
    assert local.params([1], {"max_tokens": 5, "temperature": 0.5}).logprobs == -1


def test_a_stream_arrives_piece_by_piece_and_has_an_end_and_a_limit(scripted, monkeypatch):
    pieces = [{"delta": {"role": "assistant"}}, {"delta": {"content": "ye"}}, {"delta": {"content": "s!"}}]
    pieces.append({"delta": {}, "finish_reason": "stop"})
    chunks = [json.dumps({"choices": [{"index": 0} | piece]}) for piece in pieces]
    body = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]).encode()
    endpoint = HttpEndpoint(scripted((200, {"content-type": "text/event-stream"}, body)).url, "m")
    assert list(endpoint.stream(CHATS[0])) == ["ye", "s!"]
    monkeypatch.setattr(chat_endpoint, "MAX_ANSWER", 4)
    assert list(endpoint.stream(CHATS[0])) == ["ye", "s!"]
    monkeypatch.setattr(chat_endpoint, "MAX_ANSWER", 3)
    with pytest.raises(EndpointError, match="exceeds 3 characters"):
        list(endpoint.stream(CHATS[0]))


def test_a_refusal_of_the_server_is_an_answer(scripted):
    assert (
        HttpEndpoint(scripted((200, {}, chat_body(content=None, refusal="No."))).url, "m").chat(CHATS[0]).text == "No."
    )


@pytest.mark.parametrize(("status", "named", "known"), [(404, True, True), (404, False, False), (401, True, False)])
def test_a_server_without_a_list_of_models_needs_a_name(scripted, status, named, known):
    server = scripted(GOOD)
    server.listed = (status, BUSY)
    if known:
        assert HttpEndpoint(server.url, "m" if named else None).chat(CHATS[0]).text == "yes"
        return
    with pytest.raises(EndpointError, match=str(status)):
        HttpEndpoint(server.url, "m" if named else None)
    server.listed = (200, b'{"object": "list", "data": []}')
    with pytest.raises(EndpointError, match="has no model; start one there, or give its name"):
        HttpEndpoint(server.url)


@pytest.mark.parametrize(
    ("given", "used"),
    [("http://h:1", "http://h:1/v1"), ("http://h:1/", "http://h:1/v1"), ("https://h/api/v3/", "https://h/api/v3")],
)
def test_an_address_keeps_its_path(given, used):
    assert checked_base_url(given) == used


@pytest.mark.parametrize("field", [{"timeout": 0}, {"max_wait": -1}, {"n_workers": 0}, {"n_workers": 257}])
def test_settings_of_a_server_that_make_no_sense(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        HttpConfig(**field)
