"""Tests of load_generator: arrivals, reports of records known beforehand, Little's law, and a server under load."""

import asyncio
import contextlib
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import load_generator
from chat_model import FOLDER
from engine_thread import EngineThread
from http_streams import NoAnswer, Reply, call, check_url, events
from load_generator import (
    LoadConfig,
    LoadRun,
    Record,
    arrivals,
    bodies,
    load,
    one_request,
    percentiles,
    report_of,
    run_load,
    watch_server,
)
from served_model import load_served_model
from server import GracefulServer, background_server
from serving_engine import Engine, EngineConfig
from workbench import RunConfig

SHORT = LoadConfig(n_requests=10, least_tokens=2, most_tokens=6, ttft_limit=60, tpot_limit=60)


class Pausing(Engine):
    """The engine, with a gate before each step."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.gate = threading.Event()
        self.gate.set()

    def step(self):
        self.gate.wait(60)
        return super().step()


@pytest.fixture(scope="module")
def served():
    return load_served_model(FOLDER, "course-chat")


@pytest.fixture(scope="module")
def server(served) -> Iterator[GracefulServer]:
    thread = EngineThread(Pausing(served.model, served.tokenizer, EngineConfig(max_batch=8, max_waiting=12)))
    with background_server(served, thread) as found:
        yield found


# Arrivals


def test_arrivals_are_a_poisson_process() -> None:
    config = LoadConfig(rate=5.0, n_requests=4001)
    gaps = np.diff(arrivals(config, seed=3))
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5)).pvalue > 0.01
    counts = np.bincount(np.floor(arrivals(config, seed=3)).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.25)  # the mark of Poisson counts; even gaps give 0
    assert arrivals(config, 3) == arrivals(config, 3) != arrivals(config, 4)
    assert arrivals(config, 3)[0] == 0.0


def test_requests_are_mixed_in_length_and_repeatable() -> None:
    config = LoadConfig(n_requests=200, least_tokens=5, most_tokens=9)
    made = [json.loads(body) for body in bodies(config, "m", seed=1)]
    assert {content["max_tokens"] for content in made} == {5, 6, 7, 8, 9}
    assert len({content["messages"][0]["content"] for content in made}) > 100
    assert list(bodies(config, "m", 1)) == list(bodies(config, "m", 1)) != list(bodies(config, "m", 2))
    assert all(content["ignore_eos"] and content["stream"] for content in made)
    assert "ignore_eos" not in json.loads(next(bodies(replace(config, ignore_eos=False), "m", 1)))


# Reports


def test_a_report_of_records_known_beforehand() -> None:
    ok = [
        Record(due=0.0, sent=0.0, first=0.2, last=1.2, n_tokens=11, outcome="ok"),  # ttft 0.2, tpot 0.1
        Record(due=1.0, sent=1.5, first=1.6, last=2.0, n_tokens=5, outcome="ok"),  # ttft 0.6: from when it was due
        Record(due=2.0, sent=2.0, first=2.1, last=2.1, n_tokens=1, outcome="ok"),  # one token: no tpot
        Record(due=3.0, sent=3.0, first=3.1, last=4.1, n_tokens=3, outcome="ok"),  # tpot 0.5
    ]
    others = [Record(due=3.5, last=3.6, outcome="refused"), Record(due=4.0, last=5.0)]
    config = LoadConfig(ttft_limit=0.5, tpot_limit=0.2)
    report = report_of(LoadRun(ok + others, seconds=5.0, in_system=[(7, 1), (8, 2), (10, 0), (12, 9)]), config)
    assert (report.n_ok, report.n_refused, report.n_failed) == (4, 1, 1)
    assert report.ttft["p50"] == pytest.approx((0.2 + 0.1) / 2)
    assert report.tpot["p50"] == pytest.approx(0.1) and report.tpot["p99"] == pytest.approx(0.1 + 0.98 * 0.4)
    assert report.throughput == pytest.approx(4 / 5) and report.tokens_per_second == pytest.approx(20 / 5)
    assert report.good == pytest.approx(2 / 6) and report.goodput == pytest.approx(2 / 5)
    assert report.offered == pytest.approx(5 / 4)
    assert report.mean_in_system == pytest.approx((1 * 1 + 2 * 2 + 2 * 0) / 5)
    assert report.rate_times_time == pytest.approx((1.2 + 1.0 + 0.1 + 1.1 + 0.1 + 1.0) / 5)


def test_little_holds_for_any_records_when_the_system_is_empty_at_both_ends() -> None:
    rng = np.random.default_rng(0)
    dues = np.sort(rng.uniform(0, 50, 300))
    records = [Record(due=due, last=due + rng.lognormal(0, 1), outcome="ok", n_tokens=2) for due in dues]
    seconds = max(record.last for record in records)
    moments = np.sort(rng.uniform(0, seconds, 9000))  # uneven looks
    counts = [(moment, sum(record.due <= moment < record.last for record in records)) for moment in moments]
    report = report_of(LoadRun(records, seconds, counts), LoadConfig())
    assert report.mean_in_system == pytest.approx(report.rate_times_time, rel=0.01)


def test_percentiles_of_nothing_are_no_number() -> None:
    assert all(math.isnan(value) for value in percentiles([]).values())
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([*map(float, range(101))]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


# Against the server


@pytest.mark.parametrize("kind", ["open", "closed"])
def test_every_request_is_answered_with_the_length_that_was_asked_for(server, kind: str) -> None:
    config = replace(SHORT, url=server.url, kind=kind, rate=40.0, n_clients=3)
    run = asyncio.run(run_load(config, seed=2))
    report = report_of(run, config)
    assert (report.n_ok, report.n_refused, report.n_failed, report.good) == (10, 0, 0, 1.0)
    wanted = sorted(json.loads(body)["max_tokens"] for body in bodies(config, "course-chat", 2))
    assert sorted(record.n_tokens for record in run.records) == wanted
    for record in run.records:
        assert record.due <= record.sent <= record.first <= record.last
    if kind == "closed":
        assert max(n for _, n in run.in_system) <= 3
    else:  # due when the dice said, whenever the loop came to send
        dues = sorted(record.due for record in run.records)
        assert np.subtract(dues, dues[0]) == pytest.approx(arrivals(config, 2), abs=1e-6)
        assert all(record.sent >= record.due for record in run.records)
    assert 0 < report.mean_in_system <= 10


def test_a_pause_shows_in_the_open_loop_and_hides_in_the_closed_one(server) -> None:
    """Both see a server that stands still for a second; the open loop's clients keep coming meanwhile."""
    engine, slow = server.service.thread.engine, {}
    for kind in ("open", "closed"):
        config = replace(SHORT, url=server.url, kind=kind, rate=10.0, n_clients=1, n_requests=15)
        engine.gate.clear()
        opening = threading.Thread(target=open_later, args=(server, engine.gate))
        opening.start()
        run = asyncio.run(run_load(config, seed=2))
        opening.join()
        slow[kind] = sum(record.ttft > 0.3 for record in run.records)
    assert slow["closed"] == 1 and slow["open"] >= 4


def open_later(server: GracefulServer, gate: threading.Event) -> None:
    """Open the gate a second after somebody has come to stand before it."""
    while not server.service.in_flight:
        time.sleep(0.005)
    time.sleep(1.0)
    gate.set()


def test_little_holds_on_a_real_server(server) -> None:
    config = replace(SHORT, url=server.url, n_requests=60, rate=20.0, least_tokens=20, most_tokens=60)
    run = asyncio.run(run_load(config, seed=5))
    report = report_of(run, config)
    assert report.n_failed == 0 and report.n_ok >= 20 and len(run.in_system) > 20
    assert report.mean_in_system == pytest.approx(report.rate_times_time, rel=0.25)  # the clock of a busy machine
    assert report.mean_on_server is not None


def test_refused_requests_are_counted_and_are_not_good(server) -> None:
    engine = server.service.thread.engine
    engine.gate.clear()
    config = replace(SHORT, url=server.url, kind="closed", n_clients=40, n_requests=40)

    async def run():
        running = asyncio.create_task(run_load(config, seed=1))
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 0.3:  # then all have asked, and some may have been refused already
            if server.service.in_flight != seen:
                seen, since = server.service.in_flight, time.monotonic()
            await asyncio.sleep(0.005)
        engine.gate.set()
        return await running

    report = report_of(asyncio.run(run()), config)
    assert report.n_refused > 0 and report.n_failed == 0 and report.n_ok + report.n_refused == 40
    assert report.good == report.n_ok / 40


def test_errors_are_told_with_their_reason(server, tmp_path, capsys) -> None:
    config = replace(SHORT, url=server.url, served="other", n_requests=3, rate=100)
    with pytest.raises(ValueError, match="3 requests failed, such as: 404 .*model_not_found"):
        load(config, RunConfig(out=tmp_path))
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["report"]["n_failed"] == 3 and len(written["records"]) == 3
    assert "api_key" not in written["config"] and "0 answered, 0 refused, 3 failed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="names no model"):
        load(replace(SHORT, url="http://127.0.0.1:9"), RunConfig(out=tmp_path))


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "ftp://a", "http://", "http://a:0", "http://a:99999", "http://a?b"),
        *("http://a..b:80", f"http://{'a' * 64}.b"),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="is no address of a server"):
        LoadConfig(url=url)
    with pytest.raises(ValueError, match="holds a name or password") as refused:
        check_url("http://user:word@a:80")
    assert "word@" not in str(refused.value)  # a secret stays out of every message
    assert check_url("http://a:80/v1/") == check_url("http://a:80") == "http://a:80"


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 0}, {"n_clients": 0}, {"n_requests": 0}, {"least_tokens": 0}, {"most_tokens": 3}, {"ttft_limit": 0}],
)
def test_settings_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoadConfig(**wrong)


# The client below


def answering(data: bytes):
    """A server that says the same to everybody and closes; returns it and its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()

    return asyncio.start_server(serve, "127.0.0.1", 0)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_hints_before_an_answer_are_passed_over() -> None:
    async def ask() -> tuple[int, bytes]:
        hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
        async with await answering(hints + OK) as server:
            port = server.sockets[0].getsockname()[1]
            async with call(f"http://127.0.0.1:{port}", "GET", "/") as reply:
                return reply.status, await reply.body()

    assert asyncio.run(ask()) == (200, b"ok")


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("https://a", ("a", 443, True)),
        ("http://a", ("a", 80, None)),
        ("https://a:8", ("a", 8, True)),
        ("http://[::1]:9", ("::1", 9, None)),
    ],
)
def test_where_a_request_goes(url: str, where: tuple, monkeypatch) -> None:
    async def refused(host: str, port: int, ssl: bool | None) -> None:
        raise ConnectionRefusedError((host, port, ssl))

    async def ask() -> None:
        async with call(url, "GET", "/"):
            pass

    monkeypatch.setattr(asyncio, "open_connection", refused)
    with pytest.raises(NoAnswer, match=re.escape(repr(where))):
        asyncio.run(ask())


def test_a_request_as_it_is_sent(monkeypatch) -> None:
    """With the path of the address before its own, and closed by the client when it has what it wants."""
    connect, held = asyncio.open_connection, []  # what nobody holds is closed by Python itself

    async def holding(*args, **settings):
        held.append(await connect(*args, **settings))
        return held[-1]

    monkeypatch.setattr(asyncio, "open_connection", holding)

    async def ask() -> bytes:
        sent = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            said = await reader.readuntil(b"\r\n\r\nbody")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
            sent.set_result(said + await reader.read())  # until the client closes
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with call(f"http://127.0.0.1:{port}/base", "POST", "/x?y=%20", b"body", {"A": "\xe9"}) as reply:
                pass
            assert reply.status == 200
            return (await asyncio.wait_for(sent, 30)).replace(b":%d\r\n" % port, b"\r\n")

    head = b"POST /base/x?y=%20 HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: 4\r\na: \xe9"
    assert asyncio.run(ask()) == head + b"\r\n\r\nbody"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "broke off"),
        (b"nothing like HTTP\r\n\r\n", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\ndata: {}\n\n\n", "without .DONE."),
    ],
)
def test_answers_that_end_too_soon(data: bytes, reason: str) -> None:
    async def ask() -> None:
        async with await answering(data) as server:
            port = server.sockets[0].getsockname()[1]
            async with call(f"http://127.0.0.1:{port}", "GET", "/", timeout=30) as reply:
                async for _ in events(reply.pieces):
                    pass

    with pytest.raises(NoAnswer, match=reason):
        asyncio.run(ask())


def test_events_are_found_wherever_the_pieces_are_cut() -> None:
    stream = b'data: {"a": 1}\n\ndata: {"b": "x"}\n\ndata: [DONE]\n\n'

    async def cut(size: int) -> list[dict]:
        async def pieces():
            for start in range(0, len(stream), size):
                yield stream[start : start + size]

        return [event async for event in events(pieces())]

    for size in (1, 2, 7, 100):
        assert asyncio.run(cut(size)) == [{"a": 1}, {"b": "x"}]


def test_a_server_that_says_nothing_is_given_up() -> None:
    async def ask() -> None:
        held = []  # a writer that nobody holds is closed by Python 3.13, which is an answer of a kind
        server = await asyncio.start_server(lambda reader, writer: held.append(writer), "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            async with call(f"http://127.0.0.1:{port}", "GET", "/", timeout=0.2):
                pass
        finally:
            for writer in held:
                writer.close()
            server.close()

    before = time.monotonic()
    with pytest.raises(NoAnswer, match="TimeoutError"):
        asyncio.run(ask())
    assert time.monotonic() - before < 30


def test_the_first_text_is_timed_once_and_the_last_at_the_end(monkeypatch) -> None:
    async def pieces():
        for text in ("", "a", "b", "c"):  # a role, then three texts
            yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def answered(*args):
        yield Reply(200, {}, pieces())

    clock = itertools.count(1)  # a second passes from look to look
    monkeypatch.setattr(load_generator, "call", answered)
    monkeypatch.setattr(load_generator, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    record = asyncio.run(one_request(LoadConfig(), b"{}", Record(due=0.5)))
    assert (record.sent, record.first, record.last, record.n_tokens, record.outcome) == (1.0, 2.0, 5.0, 3, "ok")
    assert (record.ttft, record.tpot, record.latency) == (1.5, 1.5, 4.5)


def test_an_error_in_a_stream_and_a_server_that_leaves_are_told_apart() -> None:
    body = b'data: {"error": {"message": "no room"}}\n\ndata: [DONE]\n\n'
    wanted = {
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body: ("failed", "no room"),
        b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno": ("refused", "503 no"),
        b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\nno": ("refused", "429 no"),
        b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno": ("failed", "500 no"),
    }

    async def ask(data: bytes) -> Record:
        async with await answering(data) as server:
            config = LoadConfig(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return await one_request(config, b"{}", Record(0.0))

    found = {data: asyncio.run(ask(data)) for data in wanted}
    assert {data: (record.outcome, record.reason) for data, record in found.items()} == wanted


def test_the_servers_own_account_is_what_runs_and_what_waits() -> None:
    async def watch(text: bytes) -> list[float]:
        seen: list[tuple[float, float]] = []
        async with await answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text) as server:
            config = LoadConfig(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            watching = asyncio.create_task(watch_server(config, seen))
            while not seen and not watching.done():
                await asyncio.sleep(0.002)
            watching.cancel()
            return [value for _, value in seen]

    assert asyncio.run(watch(b"course_running 3.0\ncourse_waiting 4.0\ncourse_blocks 9.0\n")) == [7.0]
    assert asyncio.run(watch(b"other_running 3.0\n")) == []  # somebody else's: not asked again
