"""Tests of server as a process: SIGTERM once and twice, and an engine that fails."""

import concurrent.futures
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

PATIENCE = 60.0  # seconds that a condition may take on a busy machine
LONG = {"model": "course-chat", "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SERVE = """
import sys
from server import SERVER_VERBS
from serving_engine import Engine
from workbench import run_verbs
"""
RUN = """
run_verbs("", SERVER_VERBS, sys.argv[1:])
"""
FAILING = """
step = Engine.step
def failing(engine):
    if engine.generated_tokens > 100:
        raise RuntimeError("out of memory")
    return step(engine)
Engine.step = failing
"""


@contextlib.contextmanager
def process(more: str = "", *flags: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server in a process of its own, with its port; slow clients are none of its business."""
    command = [sys.executable, "-c", SERVE + more + RUN, "serve", "--port", "0", "--head-timeout", "300", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = started.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, line + started.stderr.read()
        yield started, int(found[1])
    finally:
        started.kill()
        started.communicate()


def ask(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3 * PATIENCE)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def running(port: int) -> int:
    text = ask(port, "GET", "/metrics")[1].decode()
    return int(float(re.search(r"^course_running (\S+)$", text, re.MULTILINE)[1]))


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < limit, "what the test waits for did not come"
        time.sleep(0.005)


def test_the_first_sigterm_lets_answers_finish_and_refuses_what_is_new() -> None:
    with process("", "--grace", "200") as (started, port), concurrent.futures.ThreadPoolExecutor(10) as pool:
        waiting = socket.create_connection(("127.0.0.1", port), PATIENCE)  # from before, for a request after
        futures = [pool.submit(ask, port, "POST", "/v1/completions", LONG | {"stream": n % 2 == 0}) for n in range(10)]
        until(lambda: running(port) == 10)
        started.send_signal(signal.SIGTERM)
        until(lambda: ask(port, "GET", "/health")[0] == 503)
        status, body = ask(port, "POST", "/v1/completions", LONG)
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        waiting.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert waiting.recv(4096).startswith(b"HTTP/1.1 503 ")
        for number, future in enumerate(futures):
            status, body = future.result()
            assert status == 200
            if number % 2 == 0:
                assert body.endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
            else:
                assert json.loads(body)["usage"]["completion_tokens"] == 400
        assert started.wait(PATIENCE) == 0
        assert started.stderr.read() == ""


def test_the_second_sigterm_ends_at_once() -> None:
    with process() as (started, port), concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, port, "POST", "/v1/completions", LONG | {"n": 8, "stream": True})
        until(lambda: running(port) == 8)
        started.send_signal(signal.SIGTERM)
        until(lambda: ask(port, "GET", "/health")[0] == 503)
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE) == 128 + signal.SIGTERM
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert b"[DONE]" not in future.result()[1]


def test_an_engine_that_fails_ends_the_process_with_an_error() -> None:
    with process(FAILING) as (started, port):
        status, body = ask(port, "POST", "/v1/completions", LONG)
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_dead")
        assert started.wait(PATIENCE) == 1
        assert started.stderr.read() == "the engine failed: RuntimeError('out of memory')\n"
