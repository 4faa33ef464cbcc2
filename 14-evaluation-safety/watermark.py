"""Topic 14 - Watermark: a text that its writer can recognise by counting, and what that costs, proves and survives.

    mark = Watermark(vocab_size=2048, key=7, green_share=0.25, bias=2.0)
    ids = write_marked(model, [prompt] * 8, 100, mark, generator)        # sample with the green tokens pushed up
    detect(ids[0], mark)                                                 # Detection(n, n_green, z, p_value)
    substituted(ids[0], 0.3, pool, rng), resampled(model, ids[0], 0.3, generator)       # two ways to take it off

Kirchenbauer et al. 2023 (arXiv 2301.10226; algorithm 2, seeded by the token before) and 2024 (arXiv 2306.04634,
counting each n-gram once), Jovanovic et al. 2024 (arXiv 2402.19361, lists that can be read off the texts). The lists
are those of transformers' WatermarkLogitsProcessor with seeding_scheme "lefthash", number for number.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation_statistics import binomial_chances
from gpt2 import left_padded
from modern_llm_architectures import CausalLM
from sequence_modeling import device_of, sample_ids
from workbench import check_range

MILLIONTH_PRIME = 15_485_863  # the key that everybody has unless told otherwise


@dataclass(frozen=True)
class Watermark:
    """Which tokens are green after each token, and how much they are pushed up."""

    vocab_size: int  # tokens of the model
    key: int = MILLIONTH_PRIME  # whoever has it can find the mark, and forge it
    green_share: float = 0.25  # gamma: fraction of the vocabulary that is green
    bias: float = 2.0  # delta: nats that are added to the logits of the green tokens
    lists: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # those that were asked for
    flags: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)  # the same, quick to look up

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", least=2)
        check_range(self, "key", least=1)
        check_range(self, "green_share", above=0, below=1)
        check_range(self, "bias", least=0)  # without a bias the mark is only looked for
        if self.n_green < 1:
            raise ValueError(f"green_share={self.green_share} of {self.vocab_size} tokens is none; raise it")

    @property
    def n_green(self) -> int:
        return int(self.vocab_size * self.green_share)

    def green(self, previous: int) -> Tensor:
        """Which tokens are green after a token: (vocab), bool; they begin a permutation seeded by key x token."""
        if previous not in self.lists:
            generator = torch.Generator().manual_seed(self.key * previous % (2**64 - 1))
            chosen = torch.zeros(self.vocab_size, dtype=torch.bool)
            chosen[torch.randperm(self.vocab_size, generator=generator)[: self.n_green]] = True
            self.lists[previous] = chosen
        return self.lists[previous]

    def is_green(self, pair: tuple[int, int]) -> bool:
        """Whether the second token of a pair is green after the first."""
        if pair[0] not in self.flags:
            self.flags[pair[0]] = bytes(self.green(pair[0]).tolist())
        return bool(self.flags[pair[0]][pair[1]])

    def push(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Logits (batch, vocab) after the tokens `previous` (batch), with the bias on the green ones."""
        green = torch.stack([self.green(token_id) for token_id in previous.tolist()]).to(
            logits.device
        )  # (batch, vocab)
        return logits + self.bias * green


# Writing


class Written(NamedTuple):
    ids: list[int]  # new ids, up to and with the first end
    nats: list[float]  # what the model without a mark asks for each of them: -log p
    green_mass: list[float]  # the model's own probability of the green tokens at each step; empty without a mark


@torch.no_grad()
def write_marked(
    model: CausalLM,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    mark: Watermark | None,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[Written]:
    """Sample a continuation of each prompt (ids); the mark, if there is one, is put on before the temperature."""
    token_ids, real = left_padded([*prompts], model.config.pad_id)
    device, ends = device_of(model), [model.config.eos_id, *model.config.more_eos_ids]
    steps = model.decoding(token_ids.to(device), token_ids.shape[1] + max_new_tokens, real.to(device))
    found = [Written([], [], []) for _ in prompts]
    given, previous, ended = token_ids.to(device), token_ids[:, -1], torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = steps(given).float()  # (batch, vocab)
        logs = logits.log_softmax(dim=-1)  # (batch, vocab)
        pushed = mark.push(logits, previous) if mark else logits  # (batch, vocab)
        chosen = sample_ids(pushed / temperature if temperature > 0 else pushed, float(temperature > 0), generator)
        nats = -logs.gather(1, chosen)[:, 0]  # (batch)
        for place in (~ended).nonzero()[:, 0].tolist():
            found[place].ids.append(int(chosen[place]))
            found[place].nats.append(float(nats[place]))
            if mark:
                found[place].green_mass.append(float(logs[place].exp()[mark.green(int(previous[place]))].sum()))
        ended |= torch.isin(chosen[:, 0].cpu(), torch.tensor(ends))
        if ended.all():
            break
        given, previous = chosen, chosen[:, 0].cpu()
    return found


def pushed_mass(mass: float, bias: float) -> float:
    """Probability of the green tokens after the push, if it was G = mass before: a G / (1 + (a - 1) G), a = e^bias."""
    if not 0 <= mass <= 1 + 1e-6:
        raise ValueError(f"mass={mass} must be a probability")
    return math.exp(bias) * mass / (1 + math.expm1(bias) * mass)


# Reading


class Detection(NamedTuple):
    n: int  # tokens that were judged
    n_green: int
    z: float  # deviations above what chance gives
    p_value: float  # chance of as many green ones or more without a mark: the exact binomial tail


def bigrams(ids: Sequence[int], previous: int | None = None) -> list[tuple[int, int]]:
    """Each token with the one before it; `previous` stands before the first, which is left out without it."""
    row = list(ids) if previous is None else [previous, *ids]
    return list(zip(row, row[1:], strict=False))


def detect(
    ids: Sequence[int] | Iterable[tuple[int, int]],
    mark: Watermark,
    previous: int | None = None,
    distinct: bool = True,
) -> Detection:
    """Count green tokens. ids: a text, or pairs of tokens, such as those of several texts together.

    distinct: count each pair once. A pair that comes again has the same colour again and is no fresh evidence; counted
    every time it makes the tail too small for texts that repeat themselves. Raises ValueError for no pair.
    """
    row = list(ids)
    pairs = row if row and isinstance(row[0], tuple) else bigrams(row, previous)
    pairs = list(dict.fromkeys(pairs)) if distinct else pairs
    if not pairs:
        raise ValueError("a watermark is looked for in pairs of tokens; give at least 2 tokens")
    strange = next((token for pair in pairs for token in pair if not 0 <= token < mark.vocab_size), None)
    if strange is not None:
        raise ValueError(f"token id {strange} is not in 0..{mark.vocab_size - 1}, the vocabulary of the mark")
    n_green = sum(map(mark.is_green, pairs))
    return Detection(len(pairs), n_green, z_score(n_green, len(pairs), mark), tail(n_green, len(pairs), mark))


def z_score(n_green: int, n: int, mark: Watermark) -> float:
    """(green - gamma n) / sqrt(n gamma (1 - gamma)), equation 3."""
    share = mark.green_share
    return (n_green - share * n) / math.sqrt(n * share * (1 - share))


def tail(n_green: int, n: int, mark: Watermark) -> float:
    """P(at least n_green of n tokens are green by chance), each with the exact share of the list."""
    return float(min(1.0, binomial_chances(n, mark.n_green / mark.vocab_size)[n_green:].sum()))


def threshold(n: int, mark: Watermark, level: float) -> int:
    """The least number of green tokens among n whose tail is at most the level; n + 1 if not even n is enough."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, such as 0.001")
    chances = binomial_chances(n, mark.n_green / mark.vocab_size)
    tails = chances[::-1].cumsum()[::-1]
    return next((count for count in range(n + 1) if tails[count] <= level), n + 1)


# Taking it off


def check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be between 0 and 1")


def substituted(ids: Sequence[int], share: float, pool: Sequence[int], rng: random.Random) -> list[int]:
    """The text with a share of its tokens, drawn at random, replaced by others of the pool."""
    check_share(share)
    if not len(pool):
        raise ValueError("the pool holds no token to put in place of others")
    made = list(ids)
    for place in rng.sample(range(len(made)), round(share * len(made))):
        made[place] = pool[int(rng.random() * len(pool))]
    return made


def cropped(ids: Sequence[int], share: float) -> list[int]:
    """The text without a share of its tokens, at its end; the first one stays."""
    check_share(share)
    return list(ids[: max(1, round((1 - share) * len(ids)))])


@torch.no_grad()
def resampled(
    model: CausalLM, prompt: list[int], ids: Sequence[int], share: float, generator: torch.Generator, rng: random.Random
) -> list[int]:
    """The text with a share of its tokens drawn anew from a model without a mark, each after what stands before it.

    What comes after is kept, so the text may stop making sense: this is a rewriter that looks back only.
    """
    check_share(share)
    made = list(ids)
    for place in sorted(rng.sample(range(len(made)), round(share * len(made)))):
        row = torch.tensor([[*prompt, *made[:place]]], device=device_of(model))
        made[place] = int(sample_ids(model(row)[:, -1], 1.0, generator)[0, 0])
    return made


def surviving_share(green: float, gamma: float, share: float) -> float:
    """Expected share of green pairs after a share of the tokens was replaced by ones that know nothing of the lists.

    A pair keeps its colour only if both of its tokens were kept: gamma + (green - gamma) (1 - share)^2.
    """
    return gamma + (green - gamma) * (1 - share) ** 2


# Reading the lists off the texts


def stolen_lists(marked: Iterable[tuple[int, int]], plain: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """For each pair of tokens how much more often it comes in marked than in plain text: log of the ratio, counts + 1.

    Whoever sees enough of both kinds needs no key (Jovanovic et al. 2024).
    """
    counts: list[dict[tuple[int, int], int]] = [{}, {}]
    for side, pairs in enumerate((marked, plain)):
        for pair in pairs:
            counts[side][pair] = counts[side].get(pair, 0) + 1
    totals = [sum(side.values()) for side in counts]
    if not all(totals):
        raise ValueError(f"{totals[0]} marked and {totals[1]} plain pairs; a ratio needs some of both")
    return {
        pair: math.log((counts[0].get(pair, 0) + 1) / totals[0]) - math.log((counts[1].get(pair, 0) + 1) / totals[1])
        for pair in {*counts[0], *counts[1]}
    }
