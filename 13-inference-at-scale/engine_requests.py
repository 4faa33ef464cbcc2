"""Topic 13 - What a client asks of the engine and what it gets back: the words that engine, samplers and server share.

    params = RequestParams(max_tokens=32, temperature=0.7, seed=3, stop=("\\n",))
    request_id = engine.add(prompt_ids, params)         # serving_engine.py
    for output in engine.step(): print(output.text, output.finish_reason)

The names of the fields are those of OpenAI's API, https://platform.openai.com/docs/api-reference/completions, as vLLM
extends them.
"""

import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workbench import check_range

MAX_STOPS, MAX_LOGPROBS, MAX_SEED = 4, 20, 2**31 - 1  # PyTorch's CPU generator reads 32 bits of a seed
REPETITION = (0.01, 100)  # a smaller or larger penalty makes logits of float32 infinite


class Overloaded(Exception):
    """The waiting queue is full: try again later (a server's answer 429)."""


class Constraint(Protocol):
    """What a request's text must obey, as an automaton over token ids. States are hashable and never change."""

    def start(self) -> Hashable:
        """The state before the first new token."""

    def allowed(self, state: Hashable) -> Tensor:
        """Which tokens may come next, the ends left out: (vocab,), bool."""

    def advance(self, state: Hashable, token_id: int) -> Hashable:
        """The state after a token that was allowed."""

    def may_end(self, state: Hashable) -> bool:
        """Whether the text may end here; the ids that end a text are then allowed too."""


class TextDecoder(Protocol):
    """What the engine needs of a tokenizer: topic 06's own, and those of the `tokenizers` library, have it.

    An unfinished character at the end of the ids is decoded to U+FFFD.
    """

    def decode(self, ids: list[int]) -> str:
        """The text of these ids."""


@dataclass(frozen=True)
class RequestParams:
    """How one request is to be continued. Raises ValueError, naming field, value and limit, for what makes no sense."""

    max_tokens: int = 16  # new tokens at most
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # draw among the k most likely tokens; 0 means all
    top_p: float = 1.0  # draw among the fewest tokens that together have this probability; 1 means all
    min_p: float = 0.0  # draw among tokens at least this many times as likely as the likeliest; 0 means all
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of all tokens so far; 1 is none
    presence_penalty: float = 0.0  # taken from the logit of each token that was generated before
    frequency_penalty: float = 0.0  # taken from the logit of a token for each time that it was generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    seed: int | None = None  # of the request's own generator; None draws one
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it; at most 4
    ignore_eos: bool = False  # go on after an id that ends a text
    logprobs: int = -1  # log probabilities: -1 none, 0 of the chosen token, k of the k likeliest tokens besides
    constraint: Constraint | None = None  # what the text must obey
    tenant: str = ""  # requests share cached prompts only with requests of the same tenant
    priority: int = 0  # smaller is served sooner

    def __post_init__(self) -> None:
        whole = ("max_tokens", "top_k", "logprobs", "priority") + (() if self.seed is None else ("seed",))
        for name in whole:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        real = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in real:
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        check_range(self, "max_tokens", least=1)
        check_range(self, "temperature", "top_k", least=0)
        check_range(self, "top_p", above=0, most=1)
        check_range(self, "min_p", least=0, most=1)
        check_range(self, "repetition_penalty", least=REPETITION[0], most=REPETITION[1])
        check_range(self, "presence_penalty", "frequency_penalty", least=-2, most=2)
        check_range(self, "logprobs", least=-1, most=MAX_LOGPROBS)
        check_range(self, "priority", least=-1_000_000, most=1_000_000)
        if self.seed is not None:
            check_range(self, "seed", least=0, most=MAX_SEED)
        many = not isinstance(self.stop, str) and len(self.stop) <= MAX_STOPS  # a text would be read as its letters
        if not many or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop takes a tuple of at most {MAX_STOPS} texts, none of them empty, got {self.stop!r}")
        for token_id, bias in self.logit_bias:
            real = isinstance(bias, int | float) and not isinstance(bias, bool)
            if type(token_id) is not int or token_id < 0 or not real or not abs(bias) <= 100:  # NaN, too
                raise ValueError(f"logit_bias pairs an id >= 0 with a number in -100..100, got {(token_id, bias)}")


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities at one position, before temperature, filters and constraint."""

    token_id: int
    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...]  # (id, log probability) of the likeliest tokens, the likeliest first


@dataclass
class RequestOutput:
    """What a step adds to one request."""

    request_id: str
    new_ids: list[int]  # tokens since the last output; an id that ended the text is among them
    text: str  # new text, safe to show: nothing that a stop text may still take back
    finish_reason: str | None = None  # None while it runs, else "stop", "length", "abort" or "error"
    logprobs: list[TokenLogprob] | None = None  # one for each of new_ids, if they were asked for
    n_prompt: int = 0  # tokens of the prompt
    n_generated: int = 0  # tokens generated so far
    n_cached: int = 0  # tokens of the prompt whose keys and values were found in the prefix cache


@dataclass
class RowState:
    """What choosing the next token of one request depends on, besides its logits."""

    params: RequestParams
    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)  # tokens generated so far
    generator: torch.Generator | None = None  # the request's own, on the device of the logits; None if greedy
    constraint_state: Hashable = None  # what params.constraint.advance has led to; the engine keeps it


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine, and what it has counted since it was made."""

    running: int  # requests that hold blocks
    waiting: int  # requests in the queue
    n_blocks: int  # blocks of the pool
    free_blocks: int  # blocks that no request holds, cached ones included
    cached_blocks: int  # free blocks that still hold a prefix
    steps: int
    prompt_tokens: int  # tokens of prompts that were computed, again after a preemption
    generated_tokens: int
    cached_tokens: int  # tokens of prompts that were found in the prefix cache
    preemptions: int
    proposed_tokens: int  # by speculation
    accepted_tokens: int  # of those


def new_row(params: RequestParams, prompt_ids: list[int], device: torch.device | str = "cpu") -> RowState:
    """The state before the first token, with a generator that no other request draws from."""
    generator = None
    if params.temperature > 0:
        seed = random.SystemRandom().randrange(MAX_SEED) if params.seed is None else params.seed
        generator = torch.Generator(device).manual_seed(seed)
    state = None if params.constraint is None else params.constraint.start()
    return RowState(params, list(prompt_ids), generator=generator, constraint_state=state)
