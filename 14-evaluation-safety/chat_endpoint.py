"""Topic 14 - Chat endpoint: one way to ask a model, whether it computes here or answers at an address elsewhere.

    endpoint = open_endpoint(None, "11-fine-tuning-adaptation/model")        # topic 13's engine in this process
    endpoint = open_endpoint("http://127.0.0.1:8000", None)                  # any server of OpenAI's API
    endpoint.chat([{"role": "user", "content": "What is 3 plus 4?"}])        # Reply(text, finish_reason, ...)
    for text in endpoint.stream(messages): ...
    endpoint.chat_all(conversations, max_tokens=32)                          # many, at once

Settings have the names that OpenAI's API gives them; `schema` is a JSON schema that the answer must obey. Whatever goes
wrong on the way is an EndpointError, a ValueError of one line. The key comes from an environment variable, is sent as
the Authorization header and is taken out of every message, also where a server repeats it.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from chat_model import FOLDER
from constrained_decoding import TokenBytes, schema_constraint
from engine_requests import Constraint, Overloaded, RequestOutput, RequestParams
from http_streams import check_url
from served_model import Messages, ServedModel, load_served_model
from serving_engine import Engine, EngineConfig
from workbench import check_name, check_range

STANDARD = ("max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "ignore_eos")  # ours, vLLM's and others'; OpenAI refuses them
SETTINGS = (*STANDARD, *EXTENSIONS, "schema", "logprobs", "tenant")
MAX_ANSWER = 1_000_000  # characters that are read of a stream


class EndpointError(ValueError):
    """Why there is no answer, in one line. status: that of the HTTP answer, if one came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    finish_reason: str  # "stop": it ended by itself or at a stop text; "length": it was cut off
    n_prompt: int  # tokens
    n_generated: int  # tokens
    seconds: float  # from the question to the last token
    logprobs: tuple[float, ...] = ()  # nats of each token of the answer, if they were asked for


class Endpoint(Protocol):
    """What an application needs of a model. Settings: see SETTINGS; temperature is 0 unless one is given.

    tenant: answers share cached prompts only with those of the same tenant. logprobs=True fills the reply's.
    """

    name: str  # of the model

    def chat(self, messages: Messages, **settings: Any) -> Reply:
        """The assistant's next turn."""

    def stream(self, messages: Messages, **settings: Any) -> Iterator[str]:
        """The same turn, piece by piece; closing the iterator gives the request up."""

    def complete(self, prompt: str, **settings: Any) -> Reply:
        """What follows a text."""

    def chat_all(self, conversations: Sequence[Messages], **settings: Any) -> list[Reply]:
        """The next turn of many conversations, in their order, computed together or asked for together."""

    def close(self) -> None:
        """Give back what the endpoint holds."""


def check_settings(settings: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings without those that are None. Raises ValueError for an unknown name."""
    for name in settings:
        check_name("setting", name, (*SETTINGS, *more))
    return {name: value for name, value in settings.items() if value is not None}


def check_messages(messages: Messages) -> list[dict[str, str]]:
    """The messages as dicts of role and content. Raises ValueError for anything else, and for none."""
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if set(fields) != {"role", "content"} or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError(f"a message has a role and a content, both texts; got {str(message)[:100]!r}")
        check_name("role", message["role"], ("system", "user", "assistant"))
    if not messages:
        raise ValueError("a conversation needs at least one message")
    return [*messages]


# A model in this process


class LocalEndpoint:
    """Topic 13's engine over a folder; any number of threads may ask, and their requests are computed together.

    Args:
        served: model and tokenizer
        config: the engine's sizes
    """

    def __init__(self, served: ServedModel, config: EngineConfig | None = None) -> None:
        self.served, self.name = served, served.name
        self.engine = Engine(served.model, served.tokenizer, config or EngineConfig())
        self.lock = threading.Lock()  # of the engine, and of all that follows
        self.outputs: dict[str, deque[tuple[RequestOutput, float]]] = {}  # of requests that run, and when they came
        self.constraints: dict[str, Constraint] = {}
        self.words: TokenBytes | None = None

    def __repr__(self) -> str:
        return f"LocalEndpoint({self.name!r})"

    def params(self, prompt: list[int], settings: dict[str, Any]) -> RequestParams:
        """The engine's parameters. `constraint`, one of topic 13's, is a setting of this kind of endpoint alone."""
        chosen = {"temperature": 0.0} | check_settings(settings, ("constraint",))
        chosen.setdefault("max_tokens", max(1, self.engine.max_context - len(prompt)))
        chosen["logprobs"] = 0 if chosen.pop("logprobs", False) else -1
        stop = chosen.get("stop", ())
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if (schema := chosen.pop("schema", None)) is not None:
            chosen["constraint"] = self.constraint(schema)
        return RequestParams(**chosen)

    def constraint(self, schema: dict[str, Any]) -> Constraint:
        key = json.dumps(schema)
        with self.lock:
            if key not in self.constraints:
                if self.words is None:
                    self.words = TokenBytes(self.served.tokenizer.tokenizer, self.served.model.config.vocab_size)
                self.constraints[key] = schema_constraint(schema, self.words)
            return self.constraints[key]

    def begin(self, prompt: list[int], settings: dict[str, Any]) -> str:
        """Queue a request. Raises EndpointError if the queue is full and ValueError for what can never fit."""
        params = self.params(prompt, settings)
        with self.lock:
            try:
                request_id = self.engine.add(prompt, params)
            except Overloaded as error:
                raise EndpointError(f"{error}; try again later", 429) from None
            self.outputs[request_id] = deque()
        return request_id

    def forget(self, request_id: str) -> None:
        """End a request that still runs; its blocks are free at once."""
        with self.lock:
            if self.outputs.pop(request_id, None) is not None:
                self.engine.abort(request_id)

    def follow(self, request_id: str) -> Iterator[tuple[RequestOutput, float]]:
        """The outputs of a request and when they came; whoever waits for one computes a step for all."""
        done = False
        try:
            while not done:
                with self.lock:
                    if not self.outputs[request_id]:
                        self.advance()
                    waiting = [*self.outputs[request_id]]
                    self.outputs[request_id].clear()
                for output, moment in waiting:
                    done = done or output.finish_reason is not None
                    yield output, moment
        finally:
            self.forget(request_id)

    def advance(self) -> None:
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id in self.outputs:
                self.outputs[output.request_id].append((output, now))

    def reply(self, request_id: str, start: float) -> Reply:
        outputs, moments = zip(*self.follow(request_id), strict=True)
        found = [entry.logprob for output in outputs for entry in output.logprobs or ()]
        last, text = outputs[-1], "".join(output.text for output in outputs)
        return Reply(text, last.finish_reason, last.n_prompt, last.n_generated, moments[-1] - start, tuple(found))

    def texts(self, request_id: str) -> Iterator[str]:
        try:
            yield ""  # `stream` takes it: from here on, closing the iterator ends the request
            for output, _ in self.follow(request_id):
                if output.text:
                    yield output.text
        finally:
            self.forget(request_id)

    def chat(self, messages: Messages, **settings: Any) -> Reply:
        return self.chat_all([messages], **settings)[0]

    def stream(self, messages: Messages, **settings: Any) -> Iterator[str]:
        made = self.texts(self.begin(self.served.chat(check_messages(messages)), settings))
        next(made)
        return made

    def complete(self, prompt: str, **settings: Any) -> Reply:
        start = time.perf_counter()
        return self.reply(self.begin(self.served.encode(prompt), settings), start)

    def chat_all(self, conversations: Sequence[Messages], **settings: Any) -> list[Reply]:
        start, replies = time.perf_counter(), []
        rows = [self.served.chat(check_messages(messages)) for messages in conversations]
        most = self.engine.config.max_waiting
        for first in range(0, len(rows), most):
            names: list[str] = []
            try:
                for row in rows[first : first + most]:
                    names.append(self.begin(row, settings))
                replies += [self.reply(name, start) for name in names]
            finally:
                for name in names:
                    self.forget(name)
        return replies

    def close(self) -> None:
        """Nothing to give back: the engine has no thread."""


# A server anywhere


@dataclass(frozen=True)
class HttpConfig:
    """How a server is asked."""

    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the API key
    timeout: float = 120.0  # seconds to wait for the next piece of an answer
    max_wait: float = 30.0  # seconds to wait in all where the server is busy and says when to come again
    n_workers: int = 8  # requests of chat_all under way at the same time

    def __post_init__(self) -> None:
        check_range(self, "timeout", above=0)
        check_range(self, "max_wait", least=0)
        check_range(self, "n_workers", least=1, most=256)


class HttpEndpoint:
    """Any server of OpenAI's API, through the official client.

    Args:
        base_url: with the version ("https://host/v1"), or the server alone ("http://127.0.0.1:8000")
        model: its name there; None takes the first of the server's list
        sleep: how to wait

    Raises EndpointError if the server cannot be reached, refuses the key or has no such model.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        config: HttpConfig | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import openai  # half a second

        self.config, self.sleep, self.base_url = config or HttpConfig(), sleep, checked_base_url(base_url)
        self.key = os.environ.get(self.config.api_key_env, "").strip()
        self.client = openai.OpenAI(
            base_url=self.base_url, api_key=self.key or "none", max_retries=0, timeout=self.config.timeout
        )
        self.known: list[str] = []  # models that the server lists; it may answer for others too
        try:
            with self.guard():
                self.known = self.patiently(lambda: [str(card.id) for card in self.client.models.list().data])
        except EndpointError as error:  # not all servers have a list
            if model is None or error.status in (None, 401, 403, 429, 503):
                raise
        if model is None and not self.known:
            raise EndpointError(f"{self.base_url} has no model; start one there, or give its name")
        self.name = model or self.known[0]

    def __repr__(self) -> str:
        return f"HttpEndpoint({self.base_url!r}, {self.name!r})"

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Every error of the client, and everything in an answer that is not as it should be, as EndpointError."""
        import openai

        try:
            yield
        except EndpointError:
            raise
        except openai.APITimeoutError:
            raise EndpointError(f"{self.base_url} did not answer within {self.config.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise EndpointError(self.told(error), error.status_code) from None
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"{self.base_url} cannot be reached: {self.scrubbed(error)}; is a server there?"
            ) from None
        except openai.APIError as error:  # an error that came as a piece of a stream
            raise EndpointError(f"{self.base_url} gave the answer up: {self.scrubbed(error)}") from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EndpointError(
                f"the answer of {self.base_url} is not that of OpenAI's API: {self.scrubbed(error)}"
            ) from None

    def scrubbed(self, error: object) -> str:
        text = " ".join(str(error).split())
        return (text.replace(self.key, "***") if self.key else text)[:300]

    def told(self, error: Any) -> str:
        """What a status means for whoever asked."""
        body = error.body if isinstance(error.body, dict) else {}
        said = self.scrubbed(body.get("message") or error.message)
        advice = {
            401: f"the key in {self.config.api_key_env} is missing or wrong",
            403: f"the key in {self.config.api_key_env} may not do this",
            404: f"check --base-url and the model's name; listed: {', '.join(self.known[:8]) or 'none'}",
            429: "the server is busy",
        }.get(error.status_code, "")
        return f"{self.base_url} answers {error.status_code}: {said}" + (f" ({advice})" if advice else "")

    def patiently(self, ask: Callable[[], Any]) -> Any:
        """Ask; where the server is busy (429, 503), wait as long as it says and ask again, max_wait seconds in all."""
        import openai

        waited, pause = 0.0, 0.5
        while True:
            try:
                return ask()
            except openai.APIStatusError as error:
                if error.status_code not in (429, 503):
                    raise
                given = retry_after(error.response.headers.get("retry-after"))
                wanted, pause = max(pause, given or 0.0), 2 * pause  # a server may say 0 for ever
                if waited + wanted > self.config.max_wait:
                    limit = f"{waited + wanted:g} s of waiting would be more than the {self.config.max_wait:g} allowed"
                    raise EndpointError(f"{self.told(error)}; {limit}", error.status_code) from None
            self.sleep(wanted)
            waited += wanted

    def request(self, settings: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """The fields of a request, besides the messages or the prompt."""
        chosen = {"temperature": 0.0} | check_settings(settings)
        made = {name: chosen[name] for name in STANDARD if name in chosen} | {"model": self.name}
        if chosen.get("stop") is not None and not isinstance(chosen["stop"], str):
            made["stop"] = list(chosen["stop"])
        extra = {name: chosen[name] for name in EXTENSIONS if name in chosen}
        if chosen.get("logprobs"):
            made["logprobs"] = True if chat else 0
        if chosen.get("tenant"):
            made["user"] = chosen["tenant"]
        if "schema" in chosen:
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": chosen["schema"]}}
            if chat:
                made["response_format"] = form
            else:
                extra["response_format"] = form
        return made | ({"extra_body": extra} if extra else {})

    def chat(self, messages: Messages, **settings: Any) -> Reply:
        sent = {"messages": check_messages(messages), **self.request(settings, chat=True)}
        start = time.perf_counter()
        with self.guard():
            made = self.patiently(lambda: self.client.chat.completions.create(**sent))
            choice = made.choices[0]
            found = choice.logprobs.content if choice.logprobs is not None else None
            logprobs = tuple(float(token.logprob) for token in found or ())
            text = choice.message.content or choice.message.refusal or ""
            return reply_of(text, choice.finish_reason, made.usage, start, logprobs)

    def stream(self, messages: Messages, **settings: Any) -> Iterator[str]:
        sent = {"messages": check_messages(messages), **self.request(settings, chat=True)}
        with self.guard():
            opened = self.patiently(lambda: self.client.chat.completions.create(stream=True, **sent))
        made = self.texts(opened)
        next(made)
        return made

    def texts(self, opened: Any) -> Iterator[str]:
        n_read, ended = 0, False
        with opened, self.guard():
            yield ""  # `stream` takes it: from here on, closing the iterator closes the connection
            for chunk in opened:
                for choice in chunk.choices[:1]:
                    ended = ended or choice.finish_reason is not None
                    if text := choice.delta.content or "":
                        n_read += len(text)
                        if n_read > MAX_ANSWER:
                            raise EndpointError(f"the answer of {self.base_url} exceeds {MAX_ANSWER} characters")
                        yield text
            if not ended:
                raise EndpointError(f"the answer of {self.base_url} broke off")

    def complete(self, prompt: str, **settings: Any) -> Reply:
        sent = {"prompt": prompt, **self.request(settings, chat=False)}
        start = time.perf_counter()
        with self.guard():
            made = self.patiently(lambda: self.client.completions.create(**sent))
            choice = made.choices[0]
            found = choice.logprobs.token_logprobs if choice.logprobs is not None else None
            return reply_of(choice.text, choice.finish_reason, made.usage, start, tuple(map(float, found or ())))

    def chat_all(self, conversations: Sequence[Messages], **settings: Any) -> list[Reply]:
        with ThreadPoolExecutor(self.config.n_workers) as pool:
            return list(pool.map(lambda messages: self.chat(messages, **settings), conversations))

    def close(self) -> None:
        self.client.close()


def reply_of(text: object, reason: object, usage: Any, start: float, logprobs: tuple[float, ...]) -> Reply:
    """A reply from the parts of an answer. Raises TypeError for parts of another kind; without usage, counts are 0."""
    if not isinstance(text, str):
        raise TypeError(f"the text is {text!r:.80}")
    counts = (0, 0) if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens))
    return Reply(text, str(reason or "stop"), *counts, time.perf_counter() - start, logprobs)


def checked_base_url(base_url: str) -> str:
    """The address with its path, /v1 if it has none. Raises EndpointError for what is no address, or holds a key."""
    try:
        check_url(base_url)
    except ValueError as error:
        raise EndpointError(str(error)) from None
    return base_url.rstrip("/") + ("" if urlsplit(base_url).path.strip("/") else "/v1")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; None without one, or where it gives a date."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        return None


def open_endpoint(
    base_url: str | None = None, model: str | Path | None = None, config: HttpConfig | None = None
) -> LocalEndpoint | HttpEndpoint:
    """A server's model if there is an address, else a folder's in this process, else the course chat model.

    Raises ValueError, in one line, if neither can be had.
    """
    if base_url:
        return HttpEndpoint(base_url, str(model) if model else None, config)
    folder = Path(model) if model else FOLDER
    return LocalEndpoint(load_served_model(folder, "course-chat" if folder == FOLDER else ""))
