"""Tests of request_log: nothing that was said is written, and percentiles from five numbers are near the true ones."""

import asyncio
import contextlib
import json
import threading

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from chat_endpoint import Reply
from request_log import Observed, Percentiles, QuantileSketch, RequestLog

SECRET = "my card is 4111 1111 1111 1111"
MESSAGES = [{"role": "user", "content": SECRET}]
REPLY = Reply(f"you said {SECRET}", "stop", 12, 7, 0.25)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_counts_and_hashes_and_no_words(tmp_path):
    log = RequestLog(tmp_path / "a" / "log.jsonl", clock=lambda: 1000.0)
    log.write(MESSAGES, REPLY, tenant="Bell & Sons")
    text = log.path.read_text()
    assert "card" not in text and "4111" not in text and "Bell" not in text
    (line,) = lines(log.path)
    assert line["time"] == 1000.0 and (line["n_prompt"], line["n_generated"], line["seconds"]) == (12, 7, 0.25)
    assert line["finish_reason"] == "stop" and len(line["question"]) == 16 and line["question"] != line["answer"]
    assert log.path.stat().st_mode & 0o077 == 0


def test_equal_questions_have_equal_hashes_under_one_key_alone(tmp_path):
    one, other = RequestLog(), RequestLog()
    assert one.hash_of(SECRET) == one.hash_of(SECRET) != one.hash_of(SECRET + ".")
    assert one.hash_of(SECRET) != other.hash_of(SECRET)  # a list of likely questions helps nobody without the key
    assert RequestLog(key=b"k").hash_of(SECRET) == RequestLog(key=b"k").hash_of(SECRET)
    assert one.hash_of("\ud800")  # half a pair of surrogates is text for Python


def test_a_question_is_its_whole_conversation_and_its_time_what_the_caller_measured(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl")
    log.write(MESSAGES, REPLY, seconds=2.5)
    log.write([{"role": "system", "content": "Be brief."}, *MESSAGES], REPLY)
    log.write(MESSAGES, REPLY)
    one, two, three = lines(log.path)
    assert one["question"] == three["question"] != two["question"] and (one["n_messages"], two["n_messages"]) == (1, 2)
    assert [line["seconds"] for line in (one, two, three)] == [2.5, 0.25, 0.25]


def test_contents_are_written_only_where_they_are_asked_for(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl", contents=True)
    log.write(MESSAGES, REPLY)
    assert lines(log.path)[0]["messages"] == MESSAGES and lines(log.path)[0]["text"] == REPLY.text


def test_a_line_stays_one_line_whatever_was_said(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl", contents=True)
    log.write([{"role": "user", "content": 'a\r\n{"time": 0}\x1b[2J\u2028'}], REPLY)
    log.write([{"role": "user", "content": "half a pair \ud800"}], REPLY, error="x" * 1000)
    assert log.path.read_bytes().count(b"\n") == 2 == len(log.path.read_text().splitlines())
    assert b"\x1b" not in log.path.read_bytes() and len(lines(log.path)[1]["error"]) == 200


def test_errors_are_counted(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl")
    log.write(MESSAGES, None, error="EndpointError", seconds=0.5)
    log.write(MESSAGES, REPLY)
    summary = log.summary()
    assert (summary["n_requests"], summary["n_errors"], summary["n_prompt"]) == (2, 1, 12)
    assert summary["p50"] == pytest.approx(0.375) and lines(log.path)[0]["error"] == "EndpointError"


def test_the_file_is_put_aside_when_it_is_full(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl", max_bytes=600)
    for _ in range(6):
        log.write(MESSAGES, REPLY)
        assert log.path.stat().st_size <= 600
    assert len(lines(tmp_path / "log.jsonl.1")) >= 1
    with pytest.raises(ValueError, match="max_bytes"):
        RequestLog(max_bytes=0)


def test_threads_write_whole_lines(tmp_path):
    log = RequestLog(tmp_path / "log.jsonl")
    threads = [
        threading.Thread(target=lambda: [log.write(MESSAGES, REPLY) for _ in range(40)], daemon=True) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(log.path)) == 200 == log.n_requests and log.n_generated == 1400


# Percentiles


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("kind", ["lognormal", "two humps", "rising"])
def test_a_sketch_is_near_the_quantile(q, kind):
    """Within two points of rank: the estimate lies between the quantiles q - 0.02 and q + 0.02."""
    rng = np.random.default_rng(3)
    values = {
        "lognormal": rng.lognormal(size=3000),
        "two humps": np.concatenate([rng.normal(1, 0.1, 2000), rng.normal(9, 0.5, 1000)])[rng.permutation(3000)],
        "rising": np.sort(rng.random(3000)),
    }[kind]
    sketch = QuantileSketch(q)
    for value in values:
        sketch.add(value)
    assert np.quantile(values, max(q - 0.02, 0)) <= sketch.value() <= np.quantile(values, min(q + 0.02, 1))


def test_the_papers_example():
    """Jain and Chlamtac 1985, section 4: the median of 20 values is estimated as 4.44."""
    values = (
        "0.02 0.15 0.74 3.39 0.83 22.37 10.15 15.43 38.62 15.92 34.60 10.28 1.47 0.40 0.05 11.39 0.27 0.42 0.09 11.37"
    )
    sketch = QuantileSketch(0.5)
    for value in map(float, values.split()):
        sketch.add(value)
    assert sketch.value() == pytest.approx(4.44, abs=0.005)


def test_few_values_are_exact():
    sketch = QuantileSketch(0.9)
    assert np.isnan(sketch.value())
    for count, value in enumerate([5.0, 1.0, 3.0, 2.0], start=1):
        sketch.add(value)
        assert sketch.value() == pytest.approx(np.quantile([5.0, 1.0, 3.0, 2.0][:count], 0.9))


@pytest.mark.parametrize("q", [0.02, 0.5, 0.95])
def test_the_five_numbers_stay_in_order_whatever_comes(q):
    rng = np.random.default_rng(0)
    for values in (rng.random(200), range(200), range(200, 0, -1), rng.integers(0, 3, 200), [5, 1] * 100, [7] * 50):
        sketch, seen = QuantileSketch(q), []
        for value in values:
            sketch.add(value)
            seen.append(value)
            if len(seen) >= 5:
                assert sketch.heights == sorted(sketch.heights) and np.all(np.diff(sketch.places) >= 1)
                assert (sketch.heights[0], sketch.heights[4]) == (min(seen), max(seen))
                assert (sketch.places[0], sketch.places[4]) == (1, len(seen))


def test_equal_values_stay_what_they_are():
    sketch = QuantileSketch(0.95)
    for _ in range(100):
        sketch.add(2.0)
    assert sketch.value() == 2.0


def test_what_has_no_quantile():
    with pytest.raises(ValueError, match="between 0 and 1"):
        QuantileSketch(1.0)
    with pytest.raises(ValueError, match="no place"):
        QuantileSketch(0.5).add(float("nan"))
    with pytest.raises(ValueError, match="0.9 is not kept; there are 0.5"):
        Percentiles(0.5).value(0.9)


# In front of an application


def test_every_request_is_a_line(tmp_path):
    app, ticks = FastAPI(), iter(range(100))
    log = RequestLog(tmp_path / "log.jsonl")

    @app.post("/v1/completions")
    async def complete(content: dict):
        if content["prompt"] == "fail":
            raise RuntimeError(SECRET)
        return {"text": SECRET}

    app.add_middleware(Observed, log=log, clock=lambda: next(ticks))
    client = TestClient(app, raise_server_exceptions=False)
    client.post("/v1/completions", json={"prompt": SECRET}, headers={"x-request-id": "abc-1"})
    client.post("/v1/completions?key=hidden", json={"prompt": "fail"}, headers={"x-request-id": "bad id\x1b"})
    client.get("/etc/passwd")
    one, two, three = lines(log.path)
    assert one | {"bytes": 0, "time": 0} == {
        "time": 0,
        "route": "/v1/completions",
        "method": "POST",
        "status": 200,
        "bytes": 0,
        "id": "abc-1",
        "first": 1,
        "seconds": 2,
    }
    assert one["bytes"] > 20 and two["error"] in ("RuntimeError", "status 500") and "id" not in two
    assert (three["route"], three["status"], three["error"]) == ("other", 404, "status 404")
    assert "card" not in log.path.read_text() and "hidden" not in log.path.read_text()


def observed(tmp_path, method: str, *messages: dict, error: Exception | None = None) -> dict:
    """The line of a request to an application that sends these messages, and then fails."""
    log = RequestLog(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl")

    async def app(scope, receive, send) -> None:
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    async def nothing(*args) -> None:
        return

    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": []}
        asyncio.run(Observed(app, log)(scope, nothing, nothing))
    (line,) = lines(log.path)
    return line


def test_all_pieces_of_an_answer_count_and_what_failed_fails_on(tmp_path):
    start = {"type": "http.response.start", "status": 200, "headers": []}
    pieces = [{"type": "http.response.body", "body": b"x" * n, "more_body": True} for n in (3, 4)]
    line = observed(tmp_path, "POST", start, *pieces)
    assert (line["status"], line["bytes"]) == (200, 7) and "error" not in line
    line = observed(tmp_path, "M" * 5000, start, error=RuntimeError(SECRET))
    assert (line["error"], line["status"], line["method"]) == ("RuntimeError", 200, "M" * 10)
    line = observed(tmp_path, "POST")  # its client left
    assert (line["status"], line["error"]) == (499, "status 499") and "first" not in line
