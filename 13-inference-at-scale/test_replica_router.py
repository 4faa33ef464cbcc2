"""Tests of replica_router: policies, the cache of answers, replicas that are full, dead or dying, and processes."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient

from chat_model import FOLDER
from engine_thread import EngineThread
from replica_router import (
    RECENT,
    Asked,
    ClockRobin,
    LeastLoaded,
    PrefixAffine,
    RandomReplica,
    Replica,
    ReplicaProcess,
    ResponseCache,
    RoundRobin,
    RouteConfig,
    Router,
    RouterConfig,
    RouterServer,
    TwoChoices,
    head_of,
    make_router_app,
    run_router,
)
from served_model import load_served_model
from server import GracefulServer, background_server, listen, uvicorn_settings
from serving_engine import Engine, EngineConfig

NAME = "course-chat"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "What is 3 plus 4 ?"}], "temperature": 0}
LONG = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0.7}
PATIENCE = 60.0


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < limit, "what the test waits for did not come"
        time.sleep(0.005)


# Policies


def some(*loads: int) -> list[Replica]:
    return [Replica(f"http://replica-{number}", load) for number, load in enumerate(loads)]


def test_one_after_the_other_and_by_the_clock() -> None:
    replicas = some(0, 0, 0)
    turns = RoundRobin()
    assert [turns.pick(replicas, "") for _ in range(6)] == replicas * 2
    clock = ClockRobin()
    clock.clock = lambda: 1000.2
    burst = Counter(clock.pick(replicas, "").url for _ in range(100))
    assert len(burst) == 1  # the trap: a burst within one second meets one replica
    clock.clock = lambda: 1001.2
    assert clock.pick(replicas, "").url not in burst


def test_the_least_loaded_is_drawn_among_equals() -> None:
    policy = LeastLoaded(seed=1)
    assert policy.pick(some(3, 1, 2), "").in_flight == 1
    drawn = Counter(policy.pick(some(1, 0, 0, 0), "").url for _ in range(600))
    assert len(drawn) == 3 and max(drawn.values()) < 260


def most_loaded(policy, n: int = 500) -> int:
    """The fullest of n replicas after n requests that never end."""
    replicas = some(*[0] * n)
    for _ in range(n):
        policy.pick(replicas, "").in_flight += 1
    return max(replica.in_flight for replica in replicas)


def test_two_choices_keep_the_fullest_replica_low() -> None:
    for seed in range(3):
        assert most_loaded(RandomReplica(seed)) >= 4  # log n / log log n is 3.4 for 500, and some more
        assert most_loaded(TwoChoices(seed)) <= 3  # log2 log n is 2.6
    assert most_loaded(LeastLoaded(0)) == 1
    assert TwoChoices().pick(some(9), "").in_flight == 9  # one replica is all the choice there is


def test_equal_heads_meet_again_and_few_move_when_a_replica_goes() -> None:
    policy, replicas = PrefixAffine(), some(0, 0, 0, 0)
    keys = [f"head {number}" for number in range(400)]
    before = {key: policy.pick(replicas, key).url for key in keys}
    assert before == {key: policy.pick(replicas[::-1], key).url for key in keys}  # whatever the order
    assert min(Counter(before.values()).values()) > 60
    gone = replicas[2].url
    after = {key: policy.pick([item for item in replicas if item.url != gone], key).url for key in keys}
    assert all(before[key] in (gone, after[key]) for key in keys)


def test_a_favourite_head_does_not_fill_one_replica() -> None:
    policy, replicas = PrefixAffine(bound=1.5), some(0, 0, 0, 0)
    for n in range(1, 201):
        policy.pick(replicas, "the one system prompt").in_flight += 1
        assert max(replica.in_flight for replica in replicas) <= 1.5 * n / 4 + 1
    assert sum(replica.in_flight > 0 for replica in replicas) == 3  # three times 1.5 / 4 are enough


def test_heads_are_those_of_the_first_message() -> None:
    system = {"role": "system", "content": "You are short."}
    one, two = ({"messages": [system, {"role": "user", "content": text}]} for text in "ab")
    assert head_of(one) == head_of(two) != head_of({"messages": [{"role": "user", "content": "a"}]})
    assert head_of({"prompt": [1, 2]}) != head_of({"prompt": [1, 3]})
    assert head_of(one | {"user": "ann"}) != head_of(one)  # whose cached prompts are apart
    assert len(head_of({"prompt": "x" * 10_000})) == 256 and head_of({}) == head_of({"messages": "strange"}) != ""


# The cache


def test_only_determined_answers_have_a_key() -> None:
    def key(**fields) -> str | None:
        return ResponseCache.key("/v1/completions", {"model": "m", "prompt": "x"} | fields)

    assert key(temperature=0) and key(seed=3) and key(seed=0, temperature=1.0)
    assert key() is key(temperature=1) is key(temperature=0, stream=True) is key(seed=None) is None
    assert key(temperature=0, n=1) != key(temperature=0, n=2)
    assert ResponseCache.key("/v1/a", {"temperature": 0, "b": 1}) == ResponseCache.key(
        "/v1/a", {"b": 1, "temperature": 0}
    )
    assert ResponseCache.key("/v1/a", {"temperature": 0}) != ResponseCache.key("/v1/b", {"temperature": 0})


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = ResponseCache(max_entries=3, max_bytes=10, max_tenants=2)
    for name in "abc":
        cache.put("one", name, name.encode())
    assert cache.get("one", "a") == b"a"
    cache.put("one", "d", b"d")
    assert [cache.get("one", name) for name in "abcd"] == [b"a", None, b"c", b"d"]
    cache.put("one", "long", b"x" * 11)
    assert cache.get("one", "long") is None
    cache.put("two", "a", b"other")
    assert cache.get("one", "a") == b"a" and cache.get("two", "a") == b"other" and cache.get("three", "a") is None
    cache.get("one", "a")
    cache.put("three", "a", b"third")
    assert cache.get("two", "a") is None and cache.get("one", "a") == b"a"  # the least recently used tenant went
    nothing = ResponseCache(max_entries=0)
    nothing.put("one", "a", b"a")
    assert nothing.get("one", "a") is None


def test_what_is_written_again_counts_as_used() -> None:
    cache = ResponseCache(max_entries=2, max_tenants=2)
    for tenant, name in (("one", "a"), ("one", "b"), ("two", "a"), ("one", "a"), ("one", "c"), ("three", "a")):
        cache.put(tenant, name, b"x")
    assert [cache.get("one", name) for name in "abc"] == [b"x", None, b"x"]
    assert cache.get("two", "a") is None and cache.get("three", "a") == b"x"


# Routers in front of servers


class Running:
    """A router in a thread of the test's process."""

    def __init__(self, urls: Sequence[str], **settings) -> None:
        self.config = RouterConfig(**{"check_every": 0.1, "policy": "round-robin"} | settings)
        self.router = Router(urls, self.config)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        made = uvicorn.Config(make_router_app(self.router), **uvicorn_settings(self.config))
        self.server = RouterServer(made, self.router)
        self.runner = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def counts(self) -> list[int]:
        return [replica.n_requests for replica in self.router.replicas]


@contextlib.contextmanager
def routing(*urls: str, **settings) -> Iterator[Running]:
    found = Running(urls, **settings)
    found.runner.start()
    until(lambda: found.server.started)
    try:
        yield found
    finally:
        found.server.should_exit = True
        found.runner.join(PATIENCE)
        assert not found.runner.is_alive()


def ask(port: int, method: str, path: str, body: bytes | dict | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


class Saying:
    """A replica that reads a request's head, says what it is told to say, and dies; it is as well before as it says."""

    def __init__(self, answer: bytes, health: bytes = b"200 OK") -> None:
        self.answer, self.health, self.asked = answer, health, 0
        self.heads: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with connection:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += connection.recv(4096)
                    health = head.startswith(b"GET /health")
                    self.asked += not health
                    self.heads.append(head.decode("latin-1"))
                    ok = b"HTTP/1.1 " + self.health + b"\r\nContent-Length: 2\r\n\r\n{}"
                    connection.sendall(ok if health else self.answer)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[GracefulServer]]:
    served = load_served_model(FOLDER, NAME)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(background_server(served, EngineThread(Engine(served.model, served.tokenizer, config))))
            for config in (EngineConfig(), EngineConfig(max_batch=1, max_waiting=1))
        ]


def test_the_95th_percentile_is_the_least_that_19_of_20_stayed_below() -> None:
    router = Router(["http://a"], RouterConfig())
    assert router.recent_p95(0.0) == 0.0
    router.first_bytes.append((1000.0 - RECENT, 99.0))  # too old
    for n in range(1, 45):
        router.first_bytes.append((1000.0 - 0.1 * n, float(n * 7 % 47)))
        seconds, found = [value for _, value in router.first_bytes if value < 99], router.recent_p95(1000.0)
        assert 20 * sum(value <= found for value in seconds) >= 19 * n > 20 * sum(value < found for value in seconds)


def test_a_router_that_drains_refuses_work_and_says_so_to_balancers() -> None:
    router = Router(["http://a"], RouterConfig())
    client = TestClient(make_router_app(router), base_url="http://localhost")
    assert client.get("/health").status_code == 200
    router.draining = True
    refused = client.get("/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert client.get("/health").status_code == 503 and client.get("/metrics").status_code == 200
    assert router.in_flight == 0


def test_a_replica_that_broke_off_is_not_asked_again_before_a_check() -> None:
    dying = Saying(b"")
    router = Router([dying.url], RouterConfig())  # nobody checks
    for _ in range(2):
        assert asyncio.run(router.answer(Asked("GET", "/v1/models", b"", {}))).status_code == 503
    assert dying.asked == 1 and not router.replicas[0].healthy


def test_the_metrics_name_the_replicas_that_are_there_now() -> None:
    router = Router(["http://a", "http://b"], RouterConfig())
    router.replicas[0].in_flight, router.replicas[1].healthy = 3, False
    before = router.metrics().decode()
    assert 'router_replica_in_flight{replica="http://a"} 3.0' in before
    assert 'router_replica_healthy{replica="http://b"} 0.0' in before
    router.replicas.pop()  # as autoscaling does
    assert "http://b" not in router.metrics().decode()


def test_who_answers_that_it_is_unwell_or_not_at_all_is_not_healthy() -> None:
    async def check(url: str) -> bool:
        router = Router([url], RouterConfig(check_every=0.02))
        replica = router.replicas[0]
        replica.healthy = None
        await asyncio.wait_for(router.check(replica), 10)
        return replica.healthy

    assert asyncio.run(check(Saying(b"").url))
    assert not asyncio.run(check(Saying(b"", b"503 Service Unavailable").url))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert asyncio.run(check(f"http://127.0.0.1:{silent.getsockname()[1]}")) is False


def test_a_stream_that_is_given_up_is_closed_though_somebody_still_holds_it() -> None:
    async def run() -> tuple:
        left = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"5\r\nhello\r\n")
            await reader.read()  # until the router closes
            left.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            router = Router([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], RouterConfig())
            start = time.monotonic()
            passed = await router.answer(Asked("GET", "/v1/models", b"", {}))
            [(moment, seconds)] = router.first_bytes
            assert start <= moment <= time.monotonic() and 0 <= seconds <= moment - start
            before = router.replicas[0].in_flight
            await passed.end()
            await asyncio.wait_for(left.wait(), 10)
            return before, router.replicas[0].in_flight, passed.headers.items()

    before, after, headers = asyncio.run(run())
    assert (before, after) == (1, 0) and ("content-type", "text/event-stream") in headers


def test_the_headers_and_the_query_that_pass() -> None:
    passed = {"Content-Type": "application/x", "Retry-After": "3", "X-Request-Id": "one", "WWW-Authenticate": "Bearer"}
    head = "".join(f"{name}: {value}\r\n" for name, value in passed.items())
    saying = Saying(f"HTTP/1.1 401 No\r\n{head}X-Other: kept back\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    client = TestClient(make_router_app(Router([saying.url], RouterConfig())), base_url="http://localhost")
    given = {"authorization": "Bearer k", "x-request-id": "two", "cookie": "a=b"}
    answer = client.get("/v1/models?a=%20b&c=1", headers=given)
    assert {name: answer.headers.get(name) for name in passed} == passed and "x-other" not in answer.headers
    [asked] = saying.heads
    assert asked.startswith("GET /v1/models?a=%20b&c=1 HTTP/1.1\r\n") and "cookie" not in asked.lower()
    assert "authorization: Bearer k\r\n" in asked and "x-request-id: two\r\n" in asked
    assert 'router_answers_total{status="401"} 1.0' in client.get("/metrics").text


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("policy", ["round-robin", "two-choices", "prefix"])
def test_the_official_client_through_every_policy(servers, policy: str) -> None:
    direct = json.loads(ask(int(servers[0].url.rpartition(":")[2]), "POST", "/v1/chat/completions", CHAT)[2])
    text = direct["choices"][0]["message"]["content"]
    with routing(*(server.url for server in servers), policy=policy, cache_entries=0) as router:
        client = router.client()
        assert [model.id for model in client.models.list()] == [NAME]
        for _ in range(2):
            assert client.chat.completions.create(**CHAT).choices[0].message.content == text
            chunks = list(client.chat.completions.create(**CHAT, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        until(lambda: not any(item.in_flight for item in router.router.replicas))  # counted down after the last byte
        assert sum(router.counts()) == 5
        if policy == "round-robin":
            assert sorted(router.counts()) == [2, 3]
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**CHAT | {"temperature": 3})
        metrics = ask(router.port, "GET", "/metrics")[2].decode()
        assert f'router_replica_healthy{{replica="{servers[0].url}"}} 1.0' in metrics


def test_determined_answers_are_kept_for_each_tenant(servers) -> None:
    with routing(servers[0].url) as router:
        first = ask(router.port, "POST", "/v1/chat/completions", CHAT, Authorization="Bearer a")
        again = ask(router.port, "POST", "/v1/chat/completions", dict(reversed(CHAT.items())), Authorization="Bearer a")
        assert "router_cache_hits_total 1.0" in ask(router.port, "GET", "/metrics")[2].decode()
        assert again[2] == first[2] and again[1]["x-cache"] == "hit" and first[1]["x-cache"] is None
        assert router.counts() == [1]
        other = ask(router.port, "POST", "/v1/chat/completions", CHAT, Authorization="Bearer b")
        assert other[1]["x-cache"] is None and router.counts() == [2]
        by_chance = CHAT | {"temperature": 0.9}
        for _ in range(2):
            assert ask(router.port, "POST", "/v1/chat/completions", by_chance)[1]["x-cache"] is None
        wrong = CHAT | {"top_p": 7}
        for _ in range(2):
            status, headers, _ = ask(router.port, "POST", "/v1/chat/completions", wrong)
            assert status == 400 and headers["x-cache"] is None  # errors are not kept


def test_a_replica_that_is_not_there_is_passed_over_and_found_when_it_comes(servers) -> None:
    url = closed_port()
    with routing(url, servers[0].url, check_every=30, cache_entries=0) as router:
        for _ in range(4):
            assert ask(router.port, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert not router.router.replicas[0].healthy and router.router.replicas[1].n_requests == 4
    with routing(url, check_every=0.05) as router:
        until(lambda: not router.router.replicas[0].healthy)
        status, headers, body = ask(router.port, "POST", "/v1/chat/completions", CHAT)
        assert (status, json.loads(body)["error"]["code"]) == (503, "no_replica") and headers["retry-after"]
        assert ask(router.port, "GET", "/health")[0] == 503
        router.router.replicas[0].url = servers[0].url  # as if it listened there now
        until(lambda: router.router.replicas[0].healthy)
        assert ask(router.port, "POST", "/v1/chat/completions", CHAT)[0] == 200


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CUT_OFF = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "a head alone": HEAD,
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_replica_that_dies_before_its_first_byte_is_replaced(servers, name: str) -> None:
    dying = Saying(CUT_OFF[name])
    with routing(dying.url, servers[0].url, check_every=30) as router:
        for stream in (True, False):
            router.router.replicas[0].healthy, router.router.policy.turn = True, -1
            status, headers, body = ask(router.port, "POST", "/v1/chat/completions", CHAT | {"stream": stream})
            assert status == 200 and (b"[DONE]" in body) == stream and b"error" not in body
            assert headers["content-type"].partition(";")[0] == ("text/event-stream" if stream else "application/json")
        assert dying.asked == 2 and router.counts() == [2, 2]
        assert "router_retries_total 2.0" in ask(router.port, "GET", "/metrics")[2].decode()


def test_a_replica_that_dies_after_its_first_byte_is_told_and_nobody_takes_over(servers) -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "7"}}]}\n\n'
    dying = Saying(HEAD + f"{len(event):x}\r\n".encode() + event + b"\r\n")
    with routing(dying.url, servers[0].url, check_every=30) as router:
        status, _, body = ask(router.port, "POST", "/v1/chat/completions", CHAT | {"stream": True})
        first, error, done = [part for part in body.decode().split("\n\n") if part]
        assert status == 200 and '"7"' in first and done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
        until(lambda: router.router.replicas[0].in_flight == 0)  # it counts down after the last byte has left
        assert router.counts() == [1, 0]


def refusing(status: str) -> Saying:
    return Saying(
        f"HTTP/1.1 {status}\r\nRetry-After: 7\r\n".encode()
        + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_replica_that_is_full_or_leaving_is_passed_over(servers, status: str) -> None:
    full = refusing(status)
    with routing(full.url, servers[0].url, check_every=30) as router:
        assert ask(router.port, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert full.asked == 1 and router.router.replicas[0].healthy  # it is well, only busy
    with routing(full.url, refusing(status).url, check_every=30) as router:
        found, headers, _ = ask(router.port, "POST", "/v1/chat/completions", CHAT)
        assert (found, headers["retry-after"]) == (int(status[:3]), "7")  # all are; the last says so
        assert router.counts() == [1, 1]


def test_a_client_that_leaves_frees_the_blocks_of_the_replica(servers) -> None:
    state = servers[0].service
    with routing(servers[0].url) as router:
        for stream in (True, False):
            body = json.dumps(LONG | {"stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection = socket.create_connection(("127.0.0.1", router.port), PATIENCE)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: state.thread.latest.running == 1)
            connection.close()
            until(lambda: not state.thread.latest.running and not state.in_flight)
            until(lambda: not (router.router.replicas[0].in_flight or router.router.in_flight))  # it hears of it later
        assert state.thread.latest.free_blocks == state.thread.latest.n_blocks


def test_what_a_router_refuses_itself(servers) -> None:
    with routing(servers[0].url, max_body=1000) as router:
        assert ask(router.port, "POST", "/v1/completions", b"x" * 1001)[0] == 413
        assert ask(router.port, "GET", "/v1/models", Host="evil.example")[0] == 400
        assert ask(router.port, "GET", "/other")[0] == 404
        assert ask(router.port, "POST", "/v1/completions", b"no json")[0] == 400  # the replica's answer
        assert ask(router.port, "POST", "/v1/completions", b"[" * 900)[0] == 400
        status, _, body = ask(router.port, "GET", "/v1/models/%2e%2e/x")
        assert status == 404 and json.loads(body)["error"]


def test_what_a_client_sends_makes_no_replica_unhealthy(servers) -> None:
    """A path is passed on as it came: decoded, a blank or a line break in it would be no request at all."""
    with routing(servers[0].url, check_every=30, cache_entries=0) as router:
        for path in ("a%20b", "%0d%0aX:y", "%E2%82%AC", "%ff", "%00"):
            status, _, body = ask(router.port, "GET", f"/v1/models/{path}")
            assert status == 404 and json.loads(body)["error"]["code"] in ("model_not_found", "not_found")
        latin = {"X-Request-Id": "caf\xe9", "Authorization": "Bearer \xe9\xff"}
        assert ask(router.port, "GET", "/v1/models?x=%20", **latin)[0] == 200
        assert router.router.replicas[0].healthy and router.counts() == [5]  # a line break is on no route


def test_names_and_addresses_are_read_as_they_are_written() -> None:
    config = RouteConfig(urls=" http://a:1, http://b:2/v1/ ,", host="Box", allowed_hosts=" My.Example ,other,")
    assert config.given == ["http://a:1", "http://b:2/v1/"]
    assert config.hosts == {"127.0.0.1", "localhost", "[::1]", "box", "my.example", "other"}
    assert RouteConfig(grace=7.0).flags()[-2:] == ["--grace", "7.0"]


def test_the_end_waits_for_what_is_under_way_as_long_as_it_was_told(monkeypatch) -> None:
    router = Router(["http://a"], RouterConfig(grace=30.0))
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("replica_router.time", SimpleNamespace(monotonic=lambda: now.seconds))
    server, ends = RouterServer(uvicorn.Config(None), router), []
    router.in_flight = 1
    for now.seconds in (90.0, 100.0, 129.9, 130.1):
        router.draining = now.seconds >= 100
        ends.append(asyncio.run(server.on_tick(1)))
    assert ends == [False, False, False, True]
    router.in_flight = 0
    assert asyncio.run(RouterServer(uvicorn.Config(None), router).on_tick(1))


@pytest.mark.parametrize("wrong", [{"n_replicas": 0}, {"port": -1}, {"urls": "nowhere"}, {"check_every": 0}])
def test_settings_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s")):
        RouteConfig(**wrong)


# Processes


PROGRAM = """
import sys
from replica_router import ROUTER_VERBS
from workbench import run_verbs
run_verbs("", ROUTER_VERBS, sys.argv[1:])
"""


def test_a_replica_is_told_what_to_do_and_that_it_may_not_outlive_its_router(monkeypatch) -> None:
    monkeypatch.setattr("replica_router.START", "import sys; sys.exit(' '.join(sys.argv[1:]))")
    with pytest.raises(ValueError, match="a replica did not start: serve --port 0 --tied --model x"):
        asyncio.run(ReplicaProcess("--model", "x").start())


@pytest.mark.parametrize(("deaf", "code"), [(True, -signal.SIGKILL), (False, -signal.SIGTERM)])
def test_a_replica_that_does_not_end_in_time_is_killed(deaf: bool, code: int, monkeypatch) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if deaf else ""
    saying = f"import signal, time; {ignore} print('at http://127.0.0.1:7/v1', flush=True); time.sleep(60)"
    monkeypatch.setattr("replica_router.START", saying)

    async def run() -> tuple[str, int]:
        process = ReplicaProcess()
        return await process.start(), await asyncio.wait_for(process.stop(grace=-4.8 if deaf else PATIENCE), PATIENCE)

    assert asyncio.run(run()) == ("http://127.0.0.1:7", code)


def test_the_replicas_of_a_router_are_told_to_end_with_it(monkeypatch, tmp_path) -> None:
    told = tmp_path / "told"
    heard = f"signal.signal(signal.SIGTERM, lambda *_: (open({str(told)!r}, 'a').write('x'), sys.exit()))"
    saying = f"import signal, sys, time; {heard}; print('at http://127.0.0.1:7/v1', flush=True); time.sleep(60)"
    monkeypatch.setattr("replica_router.START", saying)

    async def beside(router: Router, processes: list[ReplicaProcess]) -> None:
        router.draining = True

    asyncio.run(run_router(RouteConfig(port=0, n_replicas=2), 0, beside))
    assert told.read_text() == "xx"


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_replicas_are_processes_that_end_with_their_router() -> None:
    command = [sys.executable, "-c", PROGRAM, "route", "--port", "0", "--n-replicas", "2", "--check-every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", started.stdout.readline())[1])
            first, second = children(started.pid)
            os.kill(first, signal.SIGKILL)
            for number in range(6):  # the dead one is asked first, or not any more; nobody notices
                body = CHAT | {"seed": number}
                assert ask(port, "POST", "/v1/chat/completions", body)[0] == 200
            started.send_signal(signal.SIGTERM)
            assert started.wait(PATIENCE) == 0
            until(lambda: not alive(second))
        finally:
            started.kill()
