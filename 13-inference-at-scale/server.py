"""Topic 13 - Server: the engine behind OpenAI's API - completions, chats, streams, metrics, and an orderly end.

python 13-inference-at-scale/inference_at_scale.py serve                        # the course chat model, port 8000
python 13-inference-at-scale/inference_at_scale.py serve --model DIR --port 0   # any folder that topic 09 reads

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Serves /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics. What a request may say is in
server_schema.py, what a connection may do in http_limits.py, how the engine is reached in engine_thread.py.
"""

from interrupts import ENDING

import asyncio
import contextlib
import hmac
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chat_model import FOLDER
from constrained_decoding import TokenBytes, json_constraint, schema_constraint
from draft_model import load_draft_model
from engine_requests import Constraint, Overloaded, RequestOutput, RequestParams, TokenLogprob
from engine_thread import Answer, EngineDead, EngineThread, SlowReader
from http_limits import HttpLimits, bounded_protocol, read_body, while_connected
from served_model import ServedModel, load_served_model
from server_schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    JsonFormat,
    SchemaFormat,
    TextFormat,
    bad_request,
    checked,
    read_object,
)
from serving_engine import Engine, EngineConfig
from workbench import RunConfig, check_range, pick_device

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_CONSTRAINTS = 32  # schemas whose automata are kept
LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class ServerConfig(HttpLimits):
    """How the server behaves."""

    max_pending: int = 256  # pieces of an answer that wait for a slow reader before it is aborted, for each choice
    grace: float = 30.0  # seconds in which answers may finish after SIGTERM
    api_key_env: str = ""  # environment variable that holds the API key; empty: none is asked for
    allowed_hosts: str = ""  # names besides this machine's own that the Host header may have, separated by commas
    log: bool = False  # write a line of JSON to stderr for each request

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "max_pending", least=1)
        check_range(self, "grace", least=0)
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise ValueError(f"the environment variable {self.api_key_env} is empty or not set; put the API key there")

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset((*LOOPBACK, *(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())))


# Metrics


class Meters:
    """What /metrics tells: counters and times of this server, and the engine's state at the moment of asking."""

    def __init__(self, thread: EngineThread) -> None:
        self.thread, self.registry = thread, CollectorRegistry()
        own = {"namespace": "course", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **own)
        self.ttft = Histogram("ttft_seconds", "From a request to its first token", buckets=SECONDS, **own)
        self.tpot = Histogram("tpot_seconds", "Between two tokens, mean of an answer", buckets=SECONDS, **own)
        self.latency = Histogram("request_seconds", "From a request to its last token", buckets=SECONDS, **own)
        self.registry.register(self)

    def collect(self) -> list:
        stats = self.thread.latest
        gauges = {
            "running": (stats.running, "Requests that hold blocks"),
            "waiting": (stats.waiting, "Requests in the queue"),
            "blocks": (stats.n_blocks, "Blocks of the pool"),
            "free_blocks": (stats.free_blocks, "Blocks that no request holds"),
            "engine_up": (int(self.thread.alive), "Whether the engine computes"),
        }
        counters = {
            "prompt_tokens": (stats.prompt_tokens, "Tokens of prompts that were computed"),
            "cached_tokens": (stats.cached_tokens, "Tokens of prompts that were found in the prefix cache"),
            "generated_tokens": (stats.generated_tokens, "Tokens generated"),
            "preemptions": (stats.preemptions, "Requests that lost their blocks for a while"),
            "steps": (stats.steps, "Steps of the engine"),
        }
        return [
            *(GaugeMetricFamily(f"course_{name}", text, value=value) for name, (value, text) in gauges.items()),
            *(CounterMetricFamily(f"course_{name}", text, value=value) for name, (value, text) in counters.items()),
        ]


class Stopwatch:
    """The times of one call, told to the meters."""

    def __init__(self, meters: Meters) -> None:
        self.meters, self.start = meters, time.perf_counter()
        self.first: dict[int, float] = {}  # choice -> time of its first token

    def see(self, choice: int, output: RequestOutput) -> None:
        now = time.perf_counter()
        if choice not in self.first and output.new_ids:
            self.first[choice] = now
            self.meters.ttft.observe(now - self.start)
        if output.finish_reason is not None:
            self.meters.latency.observe(now - self.start)
            if output.n_generated > 1 and choice in self.first:
                self.meters.tpot.observe((now - self.first[choice]) / (output.n_generated - 1))


# The two shapes of an answer


class Shape:
    """How an answer is written down; one for each call."""

    whole_kind, chunk_kind, prefix = "", "", ""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices, **usage}

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """One token of a list of log probabilities."""
        data = self.served.tokenizer.spelling(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}


class CompletionShape(Shape):
    whole_kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served)
        self.offsets: dict[int, int] = {}  # choice -> characters of its tokens so far

    def choice(self, index: int, text: str, found: list[TokenLogprob] | None, reason: str | None) -> dict[str, Any]:
        logprobs = None if found is None else self.logprobs(index, found)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, output: RequestOutput, first: bool) -> dict[str, Any]:
        return self.choice(index, output.text, output.logprobs, output.finish_reason)

    def logprobs(self, index: int, found: list[TokenLogprob]) -> dict[str, list]:
        made: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in found:
            token, offset = self.token(entry.token_id, entry.logprob), self.offsets.get(index, 0)
            self.offsets[index] = offset + len(token["token"])
            top = (self.token(*pair) for pair in entry.top)
            made["tokens"].append(token["token"])
            made["token_logprobs"].append(token["logprob"])
            made["top_logprobs"].append({item["token"]: item["logprob"] for item in top})
            made["text_offset"].append(offset)
        return made


class ChatShape(Shape):
    whole_kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, text: str, found: list[TokenLogprob] | None, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.logprobs(found), "finish_reason": reason}

    def delta(self, index: int, output: RequestOutput, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": output.text} if first else {"content": output.text}
        if not (first or output.text):
            delta = {}
        found = self.logprobs(output.logprobs)
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": output.finish_reason}

    def logprobs(self, found: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        content = [
            self.token(entry.token_id, entry.logprob) | {"top_logprobs": [self.token(*pair) for pair in entry.top]}
            for entry in found
        ]
        return {"content": content, "refusal": None}


def usage_of(ends: dict[int, RequestOutput]) -> dict[str, Any]:
    """Tokens of a call: the prompt counts once, the answers each."""
    n_prompt, n_cached = (max((getattr(end, name) for end in ends.values()), default=0) for name in COUNTS)
    n_new = sum(end.n_generated for end in ends.values())
    details = {"cached_tokens": n_cached}
    total = n_prompt + n_new
    counts = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": total}
    return counts | {"prompt_tokens_details": details}


COUNTS = ("n_prompt", "n_cached")


# From a request to its answer


class ConstraintCache:
    """Automata for the forms that answers were asked for, built beside the event loop and kept for the next one."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.kept: OrderedDict[str, Constraint] = OrderedDict()  # by schema, the least recently used first
        self.words: TokenBytes | None = None
        self.building = threading.Lock()

    async def get(self, form: TextFormat | JsonFormat | SchemaFormat) -> Constraint | None:
        """What the text must obey; None for plain text. ApiError for a schema that is not understood."""
        if form.type == "text":
            return None
        schema = form.json_schema.schema_ if form.type == "json_schema" else None
        key = json.dumps(schema)  # unsorted: the order of the properties is that of the answer
        if key not in self.kept:
            try:
                self.kept[key] = await asyncio.to_thread(self.build, schema)
            except ValueError as error:
                raise bad_request(f"response_format: {error}", "response_format") from None
            if len(self.kept) > MAX_CONSTRAINTS:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def build(self, schema: dict[str, Any] | None) -> Constraint:
        with self.building:  # one at a time: the spellings of the tokens are read once
            if self.words is None:
                self.words = TokenBytes(self.served.tokenizer.tokenizer, self.served.model.config.vocab_size)
            return json_constraint(self.words) if schema is None else schema_constraint(schema, self.words)


class Service:
    """What the routes share: the model, the engine's thread, the meters, and whether the server still takes work."""

    def __init__(self, served: ServedModel, thread: EngineThread, config: ServerConfig) -> None:
        self.served, self.thread, self.config = served, thread, config
        self.meters = Meters(thread)
        self.draining = False
        self.in_flight = 0  # requests to /v1 that are being answered
        self.constraints = ConstraintCache(served)
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self.key_digest = sha256(key.encode()).digest() if key else None
        pool = thread.engine.stats().n_blocks * thread.engine.config.block_size
        self.max_context = min(thread.engine.max_context, pool)  # positions of prompt and answer together

    async def answer(self, request: Request, wanted: CompletionRequest | ChatRequest, shape: Shape) -> Response:
        """Queue a call and write its answer down, whole or as a stream."""
        if wanted.model != self.served.name:
            message = f"the model {wanted.model!r} does not exist here; this server has {self.served.name!r}"
            raise ApiError(404, message, "model_not_found", "model")
        watch = Stopwatch(self.meters)
        prompt = self.prompt_of(wanted)
        params = self.params_of(wanted, prompt, await self.constraints.get(wanted.response_format))
        try:
            answer = await self.thread.submit(prompt, params)
        except Overloaded as error:
            raise ApiError(429, f"{error}; try again later", "overloaded", headers={"Retry-After": "1"}) from None
        except EngineDead as error:
            raise ApiError(503, str(error), "engine_dead") from None
        except ValueError as error:
            raise bad_request(str(error)) from None
        if wanted.stream:
            return EventStream(self.events(answer, shape, watch, wanted.with_usage), answer.close)
        return JSONResponse(await while_connected(request.receive, self.whole(answer, shape, watch)))

    def prompt_of(self, wanted: CompletionRequest | ChatRequest) -> list[int]:
        """The ids of the prompt; ApiError for one that the model cannot read."""
        served, text = self.served, ""
        if isinstance(wanted, ChatRequest):
            text = "".join(message.content for message in wanted.messages)
        elif isinstance(wanted.prompt, str):
            text = wanted.prompt
        if served.fewest_tokens(text) > self.max_context:
            raise self.too_long(served.fewest_tokens(text), wanted, "at least ")
        try:
            if isinstance(wanted, ChatRequest):
                return served.chat([message.model_dump() for message in wanted.messages])
            if isinstance(wanted.prompt, str):
                return served.encode(wanted.prompt)
        except ValueError as error:
            raise bad_request(str(error), "messages" if isinstance(wanted, ChatRequest) else "prompt") from None
        strange = next((token_id for token_id in wanted.prompt if token_id >= served.model.config.vocab_size), None)
        if strange is not None:
            most = served.model.config.vocab_size - 1
            raise bad_request(f"prompt has the token {strange}, but the model's ids are 0 to {most}", "prompt")
        return list(wanted.prompt)

    def params_of(
        self, wanted: CompletionRequest | ChatRequest, prompt: list[int], constraint: Constraint | None
    ) -> list[RequestParams]:
        room = self.max_context - len(prompt)
        if room < 1 or wanted.longest(room) > room:
            raise self.too_long(len(prompt), wanted)
        return wanted.params(self.served.model.config.vocab_size, room, constraint)

    def too_long(self, n_prompt: int, wanted: CompletionRequest | ChatRequest, qualifier: str = "") -> ApiError:
        n_new = max(wanted.longest(self.max_context - n_prompt), 1)
        message = (
            f"this model's context holds {self.max_context} tokens, but the request asks for {qualifier}"
            f"{n_prompt + n_new}: {qualifier}{n_prompt} in the prompt and {n_new} for the answer; shorten one of them"
        )
        param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
        return bad_request(message, param, "context_length_exceeded")

    async def whole(self, answer: Answer, shape: Shape, watch: Stopwatch) -> dict[str, Any]:
        """The answer at once, as a dict."""
        texts: dict[int, list[str]] = {}
        found: dict[int, list[TokenLogprob]] = {}
        ends: dict[int, RequestOutput] = {}
        with contextlib.closing(answer):
            async for index, output in guarded(answer):
                watch.see(index, output)
                texts.setdefault(index, []).append(output.text)
                if output.logprobs is not None:
                    found.setdefault(index, []).extend(output.logprobs)
                if output.finish_reason is not None:
                    ends[index] = output
        choices = [
            shape.choice(index, "".join(texts[index]), found.get(index), ends[index].finish_reason)
            for index in sorted(ends)
        ]
        return shape.whole(choices, usage_of(ends))

    async def events(self, answer: Answer, shape: Shape, watch: Stopwatch, with_usage: bool) -> AsyncIterator[dict]:
        """The answer piece by piece; an error after the first piece is a piece of its own."""
        ends: dict[int, RequestOutput] = {}
        begun: set[int] = set()
        with contextlib.closing(answer):
            try:
                async for index, output in guarded(answer):
                    watch.see(index, output)
                    if output.finish_reason is not None:
                        ends[index] = output
                    if output.text or output.logprobs or output.finish_reason or index not in begun:
                        yield shape.chunk([shape.delta(index, output, index not in begun)])
                        begun.add(index)
                if with_usage:
                    yield shape.chunk([], usage=usage_of(ends))
            except ApiError as error:
                yield error.content()


async def guarded(answer: Answer) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of an answer; ApiError for one that ends otherwise than it should."""
    try:
        async for index, output in answer:
            if output.finish_reason in ("abort", "error"):
                raise ApiError(500, "the engine gave this request up", "request_failed")
            yield index, output
    except EngineDead as error:
        raise ApiError(500, str(error), "engine_dead") from None
    except SlowReader as error:
        raise ApiError(500, str(error), "slow_reader") from None


class EventStream(Response):
    """Server-sent events, `data: {...}` and at last `data: [DONE]`; what makes them ends when the client leaves."""

    def __init__(self, events: AsyncIterator[dict], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]  # unknown: the body goes out in chunks
        self.events, self.close = events, close

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await while_connected(receive, self.write(send))
        finally:
            self.close()  # a generator that was never begun does not close what it would have

    async def write(self, send: Callable[[dict], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events) as events:
            async for event in events:
                data = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


# The application


class Guard:
    """What every request passes first: its id, its Host, its key, and the end of the server; then it is counted."""

    def __init__(self, app: Callable, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given, start = headers.get("x-request-id", ""), time.perf_counter()
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        route, status = route_of(scope["path"]), 0

        async def send_marked(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marks = (HEADERS | {"x-request-id": request_id}).items()
                message["headers"] = [*message["headers"], *((key.encode(), value.encode()) for key, value in marks)]
            await send(message)

        counted = route.startswith("/v1")
        self.service.in_flight += counted
        try:
            refusal = self.refusal(scope, headers)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_marked)
            else:
                await self.app(scope, receive, send_marked)
        except Exception:
            status = 500
            raise
        finally:
            self.service.in_flight -= counted
            self.service.meters.requests.labels(route, str(status or 499)).inc()  # 499: the client left before
            if self.service.config.log:
                seconds = round(time.perf_counter() - start, 4)
                line = {"id": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status}
                print(
                    json.dumps(line | {"seconds": seconds}), file=sys.stderr, flush=True
                )  # JSON: no control character

    def refusal(self, scope: dict, headers: dict[str, str]) -> ApiError | None:
        """Why this request is not let in, if so."""
        service = self.service
        if not names_us(headers.get("host", ""), service.config.hosts):
            return wrong_host()
        if not scope["path"].startswith("/v1"):
            return None
        if service.key_digest is not None:
            kind, _, key = headers.get("authorization", "").partition(" ")
            digest = sha256(key.encode("latin-1")).digest()
            if kind.lower() != "bearer" or not hmac.compare_digest(digest, service.key_digest):
                return ApiError(
                    401, "wrong or missing API key", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
        if service.draining:
            headers = {"Retry-After": "5", "Connection": "close"}
            return ApiError(503, "the server is shutting down", "shutting_down", headers=headers)
        return None


def names_us(host: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header names this server: a web page may have its own name point to 127.0.0.1."""
    return re.sub(r":\d{1,5}$", "", host.lower()) in hosts


def wrong_host() -> ApiError:
    return ApiError(400, "the Host header names another server; see --allowed-hosts", "wrong_host")


ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


def route_of(path: str) -> str:
    """The route for the counters: what a client makes up does not become a label."""
    return path if path in ROUTES else "/v1/other" if path.startswith("/v1") else "other"


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.content(), error.status, headers=error.headers)


async def read_request(request: Request, max_body: int) -> dict[str, Any]:
    """The object in the body. 415 for another type: a web page could send text/plain here without being asked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the Content-Type must be application/json, got {kind!r}", "unsupported_media_type")
    return read_object(await read_body(request, max_body))


def make_app(served: ServedModel, thread: EngineThread, config: ServerConfig | None = None) -> FastAPI:
    """The application for uvicorn; it starts the engine's thread with itself and stops it. `app.state.service`."""
    service = Service(served, thread, config or ServerConfig())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        await thread.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, service=service)
    add_error_shapes(app)
    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "course"}
    card["max_model_len"] = service.max_context

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        if name != served.name:
            raise ApiError(404, f"the model {name[:100]!r} does not exist here", "model_not_found", "model")
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = checked(CompletionRequest, await read_request(request, service.config.max_body))
        return await service.answer(request, wanted, CompletionShape(served))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = checked(ChatRequest, await read_request(request, service.config.max_body))
        return await service.answer(request, wanted, ChatShape(served))

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"}) if thread.alive else JSONResponse({"status": "engine dead"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def add_error_shapes(app: FastAPI) -> None:
    """Every error has OpenAI's shape, also those of the framework and those that nobody expected."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def frameworks(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:100]}: {str(error.detail).lower()}"
        headers = dict(error.headers or {})
        return error_response(ApiError(error.status_code, message, codes.get(error.status_code), headers=headers))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; its log says why", "internal_error"))


# The process


class GracefulServer(uvicorn.Server):
    """uvicorn whose first SIGTERM or Ctrl-C drains and whose second one ends the process at once.

    While it drains, running answers finish, /health and new requests get 503 from a port that still listens: a balancer
    then learns of the end before it meets a closed port. An engine that died ends the process too, with exit code 1.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.signals: list[int] = []
        self.drain_until: float | None = None
        self.url = ""

    def serve_at(self, sock: socket.socket) -> None:
        """Serve until told to end; exit code 1 if the engine died, KeyboardInterrupt after Ctrl-C."""
        self.run(sockets=[sock])
        if self.service.thread.failure is not None:
            sys.exit(1)
        if signal.SIGINT in self.signals:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own, and a closed terminal (SIGHUP), which drains as SIGTERM does; nohup keeps it running."""
        taken: dict[int, Any] = {}
        with super().capture_signals():
            if threading.current_thread() is threading.main_thread():
                for each in ENDING:
                    if signal.getsignal(each) not in (signal.SIG_IGN, self.handle_exit):
                        taken[each] = signal.signal(each, self.handle_exit)
            try:
                yield
            finally:
                for each, handler in taken.items():
                    signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        self.signals.append(sig)
        if len(self.signals) > 1:
            os._exit(128 + sig)
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        if service.thread.failure is not None and not service.draining:
            service.draining = True
            print(f"the engine failed: {service.thread.failure!r}", file=sys.stderr, flush=True)
        if service.draining:
            if self.drain_until is None:
                self.drain_until = time.monotonic() + service.config.grace
            if time.monotonic() > self.drain_until:
                service.thread.fail_all(EngineDead("the server stops"))
            if not service.in_flight or time.monotonic() > self.drain_until + 1:
                self.should_exit = True
        return await super().on_tick(counter)


@dataclass(frozen=True)
class ServeConfig(ServerConfig):
    """What is served, and where."""

    model: Path = FOLDER  # a folder in the Hugging Face layout; without it the course chat model
    name: str = ""  # what clients call the model; empty: the folder's name, or course-chat
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 is every one of this machine's
    port: int = 8000  # port to listen at; 0 takes a free one
    tied: bool = False  # end when standard input closes, as it does when the process that started this one dies

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "port", least=0, most=65535)

    @property
    def hosts(self) -> frozenset[str]:
        return super().hosts | {self.host.lower()}

    @property
    def model_name(self) -> str:
        return self.name or ("course-chat" if self.model == FOLDER else self.model.resolve().name)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises ValueError, with the reason, for an address or port that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that the network's names can spell
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"host={host} is no address of this machine: {reason}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise ValueError(f"port {port} at {host} cannot be had: {error.strerror}; choose another --port") from None
    return sock


def uvicorn_settings(limits: HttpLimits) -> dict[str, Any]:
    """How uvicorn is to run an application with these limits."""
    settings = {"timeout_keep_alive": limits.idle_timeout, "h11_max_incomplete_event_size": limits.max_head}
    settings |= {"server_header": False, "proxy_headers": False, "access_log": False, "log_level": "critical"}
    return settings | {"http": bounded_protocol(limits), "ws": "none", "timeout_graceful_shutdown": 1}


@contextlib.contextmanager
def background_server(
    served: ServedModel, thread: EngineThread, config: ServerConfig | None = None
) -> Iterator[GracefulServer]:
    """A server in a thread of this process while the block runs, for notebooks and measurements; see its `url`."""
    config = config or ServerConfig()
    app, sock = make_app(served, thread, config), listen("127.0.0.1", 0)
    server = GracefulServer(uvicorn.Config(app, **uvicorn_settings(config)), app.state.service)
    server.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    runner = threading.Thread(target=server.run, args=([sock],), daemon=True)
    runner.start()
    try:
        yield server
    finally:
        server.should_exit = True
        runner.join(config.grace)


def end_with_parent() -> None:
    """Send ourselves SIGTERM when standard input closes: the process that holds its other end has died."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock, held for ever, would abort the end of the interpreter
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def make_engine(served: ServedModel, config: EngineConfig) -> Engine:
    """An engine for a served model; with speculate="draft" the course's draft model guesses for the chat model."""
    draft = None
    if config.speculate == "draft":
        draft = load_draft_model()[0].to(served.model.final_norm.weight.device)
    return Engine(served.model, served.tokenizer, config, draft)


def serve(config: ServeConfig, engine: EngineConfig, run: RunConfig) -> None:
    """Serve a model with OpenAI's API until SIGTERM or Ctrl-C; then finish what runs, and end."""
    served = load_served_model(config.model, config.model_name)
    served.model.to(pick_device(run.device))
    thread = EngineThread(make_engine(served, engine), config.max_pending)
    app = make_app(served, thread, config)
    sock = listen(config.host, config.port)
    server = GracefulServer(uvicorn.Config(app, **uvicorn_settings(config)), app.state.service)
    host, port = sock.getsockname()[:2]
    if config.tied:
        end_with_parent()
    print(f"serving {served.name} at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)
    server.serve_at(sock)


SERVER_VERBS: dict[str, tuple[Any, ...]] = {"serve": (serve, ServeConfig, EngineConfig, RunConfig)}
