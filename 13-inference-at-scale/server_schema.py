"""Topic 13 - Server Schema: what a request may say, read so strictly that nothing ill-formed reaches the engine.

    content = read_object(body)                              # bytes -> dict, or ApiError(400)
    request = checked(ChatRequest, content)                  # every field of the right type, none unknown
    params = request.params(vocab_size, room)                # engine_requests.RequestParams

Python's json module and pydantic's defaults are made for friendly senders: they read NaN, Infinity and 1e999, UTF-16,
the second of two equal keys, `true` as 1 and "1" as 1. Here each of these is an error that names the field.
The fields are OpenAI's, https://platform.openai.com/docs/api-reference, and those of vLLM's extension that the engine
has. null means the same as leaving a field out where that reference allows it (the fields typed "| None"), and is an
error elsewhere.
"""

import difflib
import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, field_validator, model_validator

from engine_requests import MAX_LOGPROBS, MAX_SEED, MAX_STOPS, REPETITION, Constraint, RequestParams
from tokenizer_basics import without_duplicates

MAX_DEPTH = 64  # of nested arrays and objects; a schema for structured answers has some
MAX_BRACKETS = 20_000  # arrays and objects, or such characters in texts: a megabyte of "[]," takes Python half a second
MAX_DIGITS = 20  # of an integer: 2**64 has 20
MAX_CHOICES = 8  # answers to one request
MAX_MESSAGES, MAX_STOP_CHARS, MAX_BIASES = 512, 256, 512


class ApiError(Exception):
    """What goes wrong in a request, as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def content(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


# JSON: UTF-8, finite numbers, no key twice, not too deep


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body. Raises ApiError with status 400 for everything that is not exactly that."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 at byte {error.start}; send UTF-8", code="invalid_json") from None
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise bad_request(f"the body has more than {MAX_BRACKETS} opening brackets; shorten it", code="invalid_json")
    try:
        content = json.loads(text, object_pairs_hook=without_duplicates, parse_int=bounded_int)
    except RecursionError:
        raise bad_request(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is ambiguous: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise bad_request(f"the body must be a JSON object, got {json_name(content)}", code="invalid_json")
    check_values(content)
    return content


def bounded_int(digits: str) -> int | float:
    """An integer; infinity for one that no field could take, which `check_values` then refuses with its place."""
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def check_values(content: dict[str, Any]) -> None:
    """Raise ApiError for a number that is not finite, half of a surrogate pair, or nesting beyond MAX_DEPTH."""
    waiting: list[tuple[str, Any, int]] = [("", content, 1)]  # (place, value, depth): no recursion, so no limit of it
    while waiting:
        place, value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise bad_request(f"nested deeper than {MAX_DEPTH} levels", place.split(".")[0] or None, "invalid_json")
        if isinstance(value, dict):
            check_strings(place, value)
            waiting += [(f"{place}.{key}" if place else key, item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list):
            members = ((index, item) for index, item in enumerate(value) if type(item) is not int)
            waiting += [(f"{place}.{index}", item, depth + 1) for index, item in members]
        elif isinstance(value, str):
            check_strings(place, [value])
        elif isinstance(value, float) and not math.isfinite(value):
            raise bad_request(f"{place} must be a finite number with at most {MAX_DIGITS} digits", place)


def check_strings(place: str, texts: Any) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                message = f"{place or 'a key'} has half of a surrogate pair at character {error.start}"
                raise bad_request(message, place or None) from None


def json_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# The requests


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class SchemaOf(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None  # the answer always follows the schema, asked for or not


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: SchemaOf


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]
StopText = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationRequest(Strict):
    """The fields that completions and chat completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # 0 and -1: no limit
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=REPETITION[0], le=REPETITION[1])] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    user: Annotated[str, Field(max_length=256)] = ""  # cached prompts are shared within one user only
    ignore_eos: bool = False  # to measure with answers of a known length
    response_format: ResponseFormat = TextFormat(type="text")

    @model_validator(mode="after")
    def check_together(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @field_validator("logit_bias")
    @classmethod
    def check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and len(value) > MAX_BIASES:
            raise ValueError(f"at most {MAX_BIASES} tokens can be biased, got {len(value)}")
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
                raise ValueError(f'the keys are token ids such as "17", got {key!r}')
        return value

    @property
    def n_choices(self) -> int:
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def longest(self, room: int) -> int:
        """New tokens at most, if the request says nothing else: what the API's reference has for completions."""
        return min(16, room) if self.max_tokens is None else self.max_tokens

    def n_logprobs(self) -> int:
        raise ValueError("a request is a completion or a chat completion")

    def params(self, vocab_size: int, room: int, constraint: Constraint | None = None) -> list[RequestParams]:
        """What the engine is asked for, one for each choice; with a seed, choice i draws with seed + i.

        room: new tokens that fit behind the prompt. Raises ApiError for a biased id that the model does not have.
        """
        bias = tuple((int(key), float(value)) for key, value in (self.logit_bias or {}).items())
        for token_id, _ in bias:
            if token_id >= vocab_size:
                message = f"logit_bias names token {token_id}, but the model has the ids 0 to {vocab_size - 1}"
                raise bad_request(message, f"logit_bias.{token_id}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seeds = [
            None if self.seed is None else (self.seed + choice) % (MAX_SEED + 1) for choice in range(self.n_choices)
        ]
        settings = {
            "max_tokens": self.longest(room),
            "temperature": 1.0 if self.temperature is None else float(self.temperature),
            "top_k": min(max(self.top_k, 0), vocab_size),
            "top_p": 1.0 if self.top_p is None else float(self.top_p),
            "min_p": float(self.min_p),
            "repetition_penalty": float(self.repetition_penalty),
            "presence_penalty": float(self.presence_penalty or 0.0),
            "frequency_penalty": float(self.frequency_penalty or 0.0),
            "ignore_eos": self.ignore_eos,
            "logprobs": self.n_logprobs(),
        }
        shared = {"logit_bias": bias, "stop": stop, "constraint": constraint, "tenant": self.user}
        return [RequestParams(seed=seed, **settings, **shared) for seed in seeds]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = None  # the prompt is not repeated

    def n_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def check_chat(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def longest(self, room: int) -> int:
        """All the room there is, if the request says nothing else: an answer ends by itself."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(room, 1) if given is None else given

    def n_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


Request = TypeVar("Request", CompletionRequest, ChatRequest)


def checked(kind: type[Request], content: dict[str, Any]) -> Request:
    """A request of this kind. Raises ApiError, status 400, that names the first field that is wrong, and why."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
    wrong = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    param = place_of(wrong["loc"], content)
    if wrong["type"] == "extra_forbidden":
        raise bad_request(unknown_field(kind, param), param, "unknown_parameter")
    if wrong["type"] == "missing":
        param = f"{param}.{wrong['loc'][-1]}".lstrip(".")
        raise bad_request(f"{param} is missing", param, "missing_required_parameter")
    texts = (item["msg"].removeprefix("Value error, ") for item in found if place_of(item["loc"], content) == param)
    reason = " or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in texts))
    if not param:  # two fields that do not go together
        raise bad_request(reason, reason.split()[0])
    raise bad_request(f"{param}: {reason}{but_got(param, content)}", param)


def place_of(loc: tuple[int | str, ...], content: Any) -> str:
    """Where in the request an error is, without the names that pydantic gives to the arms of a union."""
    parts: list[str] = []
    for part in loc:
        if isinstance(content, dict) and part in content or isinstance(content, list) and isinstance(part, int):
            parts.append(str(part))
            content = content[part]
    return ".".join(parts)


def but_got(param: str, content: Any) -> str:
    """What stands at that place instead, if it is short."""
    for part in param.split("."):
        content = content[int(part) if isinstance(content, list) else part]
    shown = json.dumps(content)
    return f", got {shown}" if len(shown) <= 40 else f", got {json_name(content)}"


def unknown_field(kind: type[BaseModel], param: str) -> str:
    closest = difflib.get_close_matches(param, kind.model_fields, n=1, cutoff=0.7)
    advice = f"; did you mean {closest[0]}?" if closest else ""
    return f"{param} is not a field that this server supports{advice}"
