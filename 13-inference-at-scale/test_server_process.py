"""Tests of server as a process: SIGTERM once and twice, and an engine that fails."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE = 60.0  # seconds that a condition may take on a busy machine
LONG = {"model": "course-chat", "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
ZYGOTE = """
import json
import os
import sys
from server import SERVER_VERBS
from serving_engine import Engine
from workbench import run_verbs

for line in sys.stdin:
    more, errors, flags = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        exec(more)
        run_verbs("", SERVER_VERBS, ["serve", "--port", "0", *flags])
        sys.exit(0)
    print("pid", pid, flush=True)
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
FAILING = """
step = Engine.step
def failing(engine):
    if engine.generated_tokens > 100:
        raise RuntimeError("out of memory")
    return step(engine)
Engine.step = failing
"""


@dataclass
class Started:
    """A server that runs in a process of its own."""

    zygote: subprocess.Popen
    pid: int
    port: int
    errors: Path
    code: int | None = None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self.code is None:
            until(lambda: not exists(self.pid))
            self.code = int(self.zygote.stdout.readline().split()[1])
        return self.code


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen]:
    """A process that has imported the server, which takes seconds, and forks one for each test, one at a time."""
    made = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield made
    made.stdin.close()
    assert made.wait(PATIENCE) == 0


@contextlib.contextmanager
def serving(zygote: subprocess.Popen, errors: Path, more: str = "", *flags: str) -> Iterator[Started]:
    """A server; slow clients are none of its business."""
    zygote.stdin.write(json.dumps([more, str(errors), ["--head-timeout", "300", *flags]]) + "\n")
    zygote.stdin.flush()
    lines = sorted(zygote.stdout.readline() for _ in range(2))  # "pid ..." of the one, "serving ..." of the other
    pid, found = int(lines[0].split()[1]), re.search(r"http://127\.0\.0\.1:(\d+)/v1", lines[1])
    assert found, lines[1] + errors.read_text()
    started = Started(zygote, pid, int(found[1]), errors)
    try:
        yield started
    finally:
        if started.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            started.wait()


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


def test_the_first_sigterm_lets_answers_finish_and_refuses_what_is_new(zygote, tmp_path) -> None:
    server, pool = serving(zygote, tmp_path / "errors", "", "--grace", "200"), concurrent.futures.ThreadPoolExecutor(10)
    with server as started, pool:
        port = started.port
        waiting = socket.create_connection(("127.0.0.1", port), PATIENCE)  # from before, for a request after
        futures = [pool.submit(ask, port, "POST", "/v1/completions", LONG | {"stream": n % 2 == 0}) for n in range(10)]
        until(lambda: running(port) == 10)
        os.kill(started.pid, signal.SIGTERM)
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
        assert started.wait() == 0
        assert started.errors.read_text() == ""


def test_the_second_sigterm_ends_at_once(zygote, tmp_path) -> None:
    with serving(zygote, tmp_path / "errors") as started, concurrent.futures.ThreadPoolExecutor(1) as pool:
        port = started.port
        future = pool.submit(ask, port, "POST", "/v1/completions", LONG | {"n": 8, "stream": True})
        until(lambda: running(port) == 8)
        os.kill(started.pid, signal.SIGTERM)
        until(lambda: ask(port, "GET", "/health")[0] == 503)
        os.kill(started.pid, signal.SIGTERM)
        assert started.wait() == 128 + signal.SIGTERM
        with contextlib.suppress(http.client.HTTPException, OSError):
            assert b"[DONE]" not in future.result()[1]


def test_an_engine_that_fails_ends_the_process_with_an_error(zygote, tmp_path) -> None:
    with serving(zygote, tmp_path / "errors", FAILING) as started:
        status, body = ask(started.port, "POST", "/v1/completions", LONG)
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_dead")
        assert started.wait() == 1
        assert started.errors.read_text() == "the engine failed: RuntimeError('out of memory')\n"


def test_a_server_that_is_tied_ends_when_the_one_who_holds_its_input_is_gone(zygote, tmp_path) -> None:
    os.mkfifo(tmp_path / "input")
    held = os.open(tmp_path / "input", os.O_RDWR)
    more = f"os.dup2(os.open({str(tmp_path / 'input')!r}, os.O_RDONLY), 0)"
    with serving(zygote, tmp_path / "errors", more, "--tied") as started:
        os.write(held, b"what is said there means nothing")
        assert ask(started.port, "GET", "/health")[0] == 200
        os.close(held)
        assert started.wait() == 0
