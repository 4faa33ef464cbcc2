"""Topic 13 - Replica Router: several servers behind one address, and which of them gets the next request.

python 13-inference-at-scale/inference_at_scale.py route --n-replicas 2 --policy two-choices   # starts the replicas
python 13-inference-at-scale/inference_at_scale.py route --urls http://a:8000,http://b:8000    # those that run already

Azar et al. 1994 and Mitzenmacher 2001 (IEEE TPDS 12(10)) for the power of two choices; Thaler and Ravishankar 1998 for
rendezvous hashing; Mirrokni et al. 2018 (arXiv 1608.01350) for its bound of the load.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from chat_model import FOLDER
from http_limits import HttpLimits, read_body, while_connected
from http_streams import NoAnswer, Reply, call, check_url
from server import (
    LOOPBACK,
    GracefulServer,
    add_error_shapes,
    error_response,
    listen,
    names_us,
    uvicorn_settings,
    wrong_host,
)
from server_schema import ApiError
from workbench import RunConfig, check_range

PASSED_ON = ("content-type", "retry-after", "x-request-id", "www-authenticate")  # headers of an answer
PASSED_IN = ("content-type", "authorization", "x-request-id")  # headers of a request
HEAD_CHARS = 256  # of a prompt, by which requests are kept together: most of a system prompt
RECENT = 30.0  # seconds for which times to the first byte count


# Which replica


@dataclass
class Replica:
    """A server as the router knows it."""

    url: str
    in_flight: int = 0  # requests that the router has sent and whose answers have not ended
    healthy: bool = True
    n_requests: int = 0


class RoundRobin:
    """One after the other."""

    def __init__(self, seed: int = 0) -> None:
        self.turn = -1

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        self.turn += 1
        return replicas[self.turn % len(replicas)]


class ClockRobin:
    """The trap: by the clock in place of a counter, so that a burst goes to one replica alone."""

    def __init__(self, seed: int = 0) -> None:
        self.clock = time.time

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        return replicas[int(self.clock()) % len(replicas)]


class LeastLoaded:
    """The one with the fewest requests, drawn among equals: the first of them would get every idle moment's."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        least = min(replica.in_flight for replica in replicas)
        return self.rng.choice([replica for replica in replicas if replica.in_flight == least])


class RandomReplica:
    """Any of them, with equal chances: what two choices are compared with."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        return self.rng.choice(replicas)


class TwoChoices:
    """The less loaded of two that are drawn (Azar et al. 1994)."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        drawn = self.rng.sample(range(len(replicas)), min(2, len(replicas)))
        return min((replicas[index] for index in drawn), key=lambda replica: replica.in_flight)


class PrefixAffine:
    """Equal heads of prompts to the same replica, whose cache knows them, unless it has too much to do.

    Rendezvous hashing: each pair of head and replica has a score, the highest wins; when a replica comes or goes, only
    its own heads move. A replica with more than `bound` times the mean load is passed over for the next in the order.
    """

    def __init__(self, seed: int = 0, bound: float = 1.5) -> None:
        self.bound = bound

    def pick(self, replicas: Sequence[Replica], key: str) -> Replica:
        mean = (sum(replica.in_flight for replica in replicas) + 1) / len(replicas)  # with the one that comes
        limit = math.ceil(self.bound * mean)
        order = sorted(replicas, key=lambda replica: sha256(f"{replica.url} {key}".encode()).digest(), reverse=True)
        return next(replica for replica in order if replica.in_flight < limit)  # the least loaded is always below


POLICIES: dict[str, Callable[..., Any]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "random": RandomReplica,
    "two-choices": TwoChoices,
    "prefix": PrefixAffine,
    "clock": ClockRobin,
}
Policy = Literal["round-robin", "least-loaded", "random", "two-choices", "prefix", "clock"]


def head_of(content: dict[str, Any]) -> str:
    """What a prompt begins with: the text, the ids or the first message of a request."""
    messages = content.get("messages")
    first = messages[:1] if isinstance(messages, list) else content.get("prompt")
    return json.dumps([content.get("user"), first])[:HEAD_CHARS]


# The cache of answers


class ResponseCache:
    """Answers to requests whose answer is determined, the least recently used forgotten first, apart for each tenant.

    Args:
        max_entries: answers kept for one tenant, so that none can push out another's
        max_bytes: of one answer; longer ones are not kept
        max_tenants: tenants remembered
    """

    def __init__(self, max_entries: int = 256, max_bytes: int = 65_536, max_tenants: int = 64) -> None:
        self.max_entries, self.max_bytes, self.max_tenants = max_entries, max_bytes, max_tenants
        self.tenants: OrderedDict[str, OrderedDict[str, bytes]] = OrderedDict()

    @staticmethod
    def key(path: str, content: dict[str, Any]) -> str | None:
        """What names an answer; None for a request whose answer is a matter of chance, or comes as a stream."""
        determined = content.get("temperature") == 0 or isinstance(content.get("seed"), int)
        if not determined or content.get("stream"):
            return None
        return sha256(f"{path} {json.dumps(content, sort_keys=True)}".encode()).hexdigest()

    def get(self, tenant: str, key: str) -> bytes | None:
        answers = self.tenants.get(tenant)
        if answers is None or key not in answers:
            return None
        self.tenants.move_to_end(tenant)
        answers.move_to_end(key)
        return answers[key]

    def put(self, tenant: str, key: str, answer: bytes) -> None:
        if len(answer) > self.max_bytes:
            return
        answers = self.tenants.setdefault(tenant, OrderedDict())
        self.tenants.move_to_end(tenant)
        answers[key] = answer
        answers.move_to_end(key)
        if len(answers) > self.max_entries:
            answers.popitem(last=False)
        if len(self.tenants) > self.max_tenants:
            self.tenants.popitem(last=False)


# The router


@dataclass(frozen=True)
class RouterConfig(HttpLimits):
    """How requests are spread."""

    policy: Policy = "two-choices"  # which replica gets a request
    check_every: float = 1.0  # seconds between two questions for the health of a replica
    cache_entries: int = 256  # determined answers kept for each tenant; 0: none
    allowed_hosts: str = ""  # names besides this machine's own that the Host header may have, separated by commas
    grace: float = 30.0  # seconds in which answers may finish after SIGTERM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "check_every", above=0)
        check_range(self, "cache_entries", "grace", least=0)

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset((*LOOPBACK, *(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())))


@dataclass
class Asked:
    """A request on its way to a replica."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    head: str = ""  # of its prompt
    cache_key: str | None = None
    tenant: str = ""
    tried: list[Replica] = field(default_factory=list)


class Router:
    """The replicas, what is under way to each, and what was measured; belongs to one event loop."""

    def __init__(self, urls: Sequence[str], config: RouterConfig, seed: int = 0) -> None:
        self.config, self.policy = config, POLICIES[config.policy](seed)
        self.replicas = [Replica(check_url(url)) for url in urls]
        self.cache = ResponseCache(config.cache_entries)
        self.draining, self.in_flight = False, 0
        self.first_bytes: deque[tuple[float, float]] = deque(maxlen=10_000)  # (moment, seconds to the first byte)
        self.registry = CollectorRegistry()
        own = {"namespace": "router", "registry": self.registry}
        self.answers = Counter("answers", "Answers by status", ["status"], **own)
        self.cache_hits = Counter("cache_hits", "Answers from the cache", **own)
        self.retries = Counter("retries", "Requests that were sent to another replica", **own)
        self.loads = Gauge("replica_in_flight", "Requests under way to a replica", ["replica"], **own)
        self.health = Gauge("replica_healthy", "Whether a replica answers", ["replica"], **own)

    def candidates(self, asked: Asked) -> list[Replica]:
        return [replica for replica in self.replicas if replica.healthy and replica not in asked.tried]

    async def answer(self, asked: Asked) -> Response:
        """The answer of a replica; another one is asked as long as nothing of an answer has gone to the client.

        A replica that cannot be reached, dies before its first byte, or says that it is full or shutting down (429,
        503) has not begun to answer. After the first byte nobody can take over: the client has read a part.
        """
        if asked.cache_key is not None and (kept := self.cache.get(asked.tenant, asked.cache_key)) is not None:
            self.cache_hits.inc()
            return Response(kept, media_type="application/json", headers={"x-cache": "hit"})
        refusal: Response | None = None
        while candidates := self.candidates(asked):
            replica = self.policy.pick(candidates, asked.head)
            if asked.tried:
                self.retries.inc()
            asked.tried.append(replica)
            passing = Passing(self, replica, asked)
            try:
                response = await passing.begin()
            except NoAnswer:
                replica.healthy = False  # until a check finds it well again
                continue
            if response.status_code not in (429, 503):
                return response
            refusal = response
        return refusal or error_response(
            ApiError(503, "no replica answers", "no_replica", headers={"Retry-After": "5"})
        )

    async def check_health(self) -> None:
        """Ask every replica now and then how it is."""
        while True:
            await asyncio.gather(*(self.check(replica) for replica in list(self.replicas)))
            await asyncio.sleep(self.config.check_every)

    async def check(self, replica: Replica) -> None:
        try:
            async with call(replica.url, "GET", "/health", timeout=5 * self.config.check_every) as reply:
                replica.healthy = reply.status == 200
        except NoAnswer:
            replica.healthy = False

    def recent_p95(self, now: float) -> float:
        """Seconds to the first byte that 95 % of the answers of the last while stayed below; 0 without any."""
        recent = sorted(seconds for moment, seconds in self.first_bytes if now - moment < RECENT)
        return recent[math.ceil(0.95 * len(recent)) - 1] if recent else 0.0

    def metrics(self) -> bytes:
        self.loads.clear()
        self.health.clear()
        for replica in self.replicas:
            self.loads.labels(replica.url).set(replica.in_flight)
            self.health.labels(replica.url).set(replica.healthy)
        return generate_latest(self.registry)


class Passing:
    """One answer on its way from a replica to the client."""

    def __init__(self, router: Router, replica: Replica, asked: Asked) -> None:
        self.router, self.replica, self.asked = router, replica, asked
        self.open = contextlib.AsyncExitStack()

    async def begin(self) -> Response:
        """Ask the replica. Raises NoAnswer while another one may still be asked."""
        asked, start = self.asked, time.monotonic()
        self.replica.in_flight += 1
        self.replica.n_requests += 1
        try:
            reply = await self.open.enter_async_context(
                call(self.replica.url, asked.method, asked.path, asked.body, asked.headers)
            )
            headers = {name: reply.headers[name] for name in PASSED_ON if name in reply.headers}
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                first = await anext(reply.pieces, b"")  # a replica may die between its head and its first piece
                self.router.first_bytes.append((time.monotonic(), time.monotonic() - start))
                return PassedStream(self.stream(first, reply), reply.status, headers, self.end)
            body = await reply.body()
        except BaseException:
            await self.end()
            raise
        await self.end()
        if reply.status == 200:
            self.router.first_bytes.append((time.monotonic(), time.monotonic() - start))
            if asked.cache_key is not None:
                self.router.cache.put(asked.tenant, asked.cache_key, body)
        return Response(body, reply.status, headers=headers)

    async def stream(self, first: bytes, reply: Reply) -> AsyncIterator[bytes]:
        yield first
        try:
            async for piece in reply.pieces:
                yield piece
        except NoAnswer:
            error = ApiError(502, "the replica ended before its answer did", "replica_lost").content()
            yield f"\n\ndata: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()

    async def end(self) -> None:
        """Close the connection, which aborts what still runs at the replica; once, by `begin` or by its stream."""
        self.replica.in_flight -= 1
        await self.open.aclose()


class PassedStream(Response):
    """A stream that is passed on piece by piece, and ended when the client leaves."""

    def __init__(self, pieces: AsyncIterator[bytes], status: int, headers: dict[str, str], end: Callable) -> None:
        super().__init__(status_code=status, headers=headers)
        del self.headers["content-length"]
        self.pieces, self.end = pieces, end

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await while_connected(receive, self.write(send))
        finally:
            await self.end()

    async def write(self, send: Callable) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.pieces) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class RouterGuard:
    """Counts what is under way, and refuses foreign names and, at the end, everything new."""

    def __init__(self, app: Callable, router: Router) -> None:
        self.app, self.router = app, router

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        router, headers = self.router, {name: value.decode("latin-1") for name, value in scope["headers"]}
        is_work = scope["path"].startswith("/v1")
        router.in_flight += is_work
        try:
            if not names_us(headers.get(b"host", ""), router.config.hosts):
                await error_response(wrong_host())(scope, receive, send)
            elif is_work and router.draining:
                await error_response(ApiError(503, "the router is shutting down", "shutting_down"))(
                    scope, receive, send
                )
            else:
                await self.app(scope, receive, send)
        finally:
            router.in_flight -= is_work


def make_router_app(router: Router) -> FastAPI:
    """The application of a router, for uvicorn; it speaks the API of its replicas."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        checking = asyncio.create_task(router.check_health())
        yield
        checking.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RouterGuard, router=router)
    add_error_shapes(app)

    @app.get("/health")
    async def health() -> Response:
        n_healthy = sum(replica.healthy for replica in router.replicas)
        well = n_healthy > 0 and not router.draining
        return JSONResponse({"status": "ok" if well else "unavailable", "replicas": n_healthy}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    async def pass_on(request: Request, path: str) -> Response:
        asked = await asked_of(request, router.config.max_body)
        response = await while_connected(request.receive, router.answer(asked))
        router.answers.labels(str(response.status_code)).inc()
        return response

    return app


async def asked_of(request: Request, max_body: int) -> Asked:
    """A request as it will be passed on. What is no JSON is passed on too: the replica says what is wrong with it."""
    body = await read_body(request, max_body)
    headers = {name: request.headers[name] for name in PASSED_IN if name in request.headers}
    path = request.scope["raw_path"].decode("ascii")  # as it came: a decoded space or line break would be no path
    path += f"?{request.url.query}" if request.url.query else ""
    tenant = sha256(headers.get("authorization", "").encode()).hexdigest()
    asked = Asked(request.method, path, body, headers, tenant=tenant)
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(body)
        if isinstance(content, dict):
            asked.head, asked.cache_key = head_of(content), ResponseCache.key(path, content)
    return asked


# Replicas as processes


START = (
    "import sys; from server import SERVER_VERBS as V; from workbench import run_verbs; run_verbs('', V, sys.argv[1:])"
)


class ReplicaProcess:
    """A server in a process of its own, which ends with this one."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags
        self.process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self, timeout: float = 120.0) -> str:
        """Start it and wait until it listens; returns its address. Raises ValueError with its own words."""
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-c", START, "serve", "--port", "0", "--tied", *self.flags)
        self.process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        line = (await asyncio.wait_for(self.process.stdout.readline(), timeout)).decode()
        found = re.search(r"(http://\S+?)/v1", line)
        if found is None:
            said = (await self.process.stderr.read()).decode().strip()
            await self.process.wait()
            raise ValueError(f"a replica did not start: {said[-300:] or line}")
        self.url = found[1]
        return self.url

    def send(self, number: int) -> None:
        """A signal, if it still runs; Popen's own way would take its exit code from asyncio, which waits for it."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    async def stop(self, grace: float = 30.0) -> int:
        """Let it finish what it has and end; its exit code. One that does not end in time is killed."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), grace + 5)
        except TimeoutError:
            self.send(signal.SIGKILL)
        return await self.process.wait()


@dataclass(frozen=True)
class RouteConfig(RouterConfig):
    """The replicas of a router, and where it listens."""

    urls: str = ""  # addresses of replicas that run already, separated by commas; empty: start some
    n_replicas: int = 2  # replicas to start
    model: Path = FOLDER  # the folder that they serve
    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # port to listen at; 0 takes a free one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_replicas", least=1, most=64)
        check_range(self, "port", least=0, most=65535)
        for url in self.given:
            check_url(url)

    @property
    def given(self) -> list[str]:
        return [url.strip() for url in self.urls.split(",") if url.strip()]

    @property
    def hosts(self) -> frozenset[str]:
        return super().hosts | {self.host.lower()}

    def flags(self) -> list[str]:
        """What a replica is started with."""
        return ["--model", str(self.model), "--grace", str(self.grace)]


class RouterServer(GracefulServer):
    """The same orderly end for a router: `service` is the Router."""

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining:
            self.drain_until = self.drain_until or time.monotonic() + self.service.config.grace
            if not self.service.in_flight or time.monotonic() > self.drain_until:
                self.should_exit = True
        return await uvicorn.Server.on_tick(self, counter)


async def run_router(
    config: RouteConfig, seed: int, beside: Callable[[Router, list[ReplicaProcess]], Any] | None = None
) -> None:
    """Start the replicas and the router; end the replicas with it. `beside` runs while it serves."""
    sock = listen(config.host, config.port)
    processes = [ReplicaProcess(*config.flags()) for _ in range(0 if config.given else config.n_replicas)]
    tasks: list[asyncio.Task] = []
    try:
        urls = config.given or await asyncio.gather(*(process.start() for process in processes))
        router = Router(urls, config, seed)
        server = RouterServer(uvicorn.Config(make_router_app(router), **uvicorn_settings(config)), router)
        host, port = sock.getsockname()[:2]
        print(f"routing {config.policy} to {len(urls)} replicas at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)
        if beside is not None:
            tasks.append(asyncio.create_task(beside(router, processes)))
        await server.serve(sockets=[sock])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(process.stop(config.grace) for process in processes if process.process is not None))


def route(config: RouteConfig, run: RunConfig) -> None:
    """Serve several replicas at one address until SIGTERM or Ctrl-C."""
    asyncio.run(run_router(config, run.seed))


ROUTER_VERBS: dict[str, tuple[Any, ...]] = {"route": (route, RouteConfig, RunConfig)}
