"""Topic 11 - Exact policies: a task so small that every response is enumerated, so that every estimate has a truth.

    bed = ExactBed()                                      # 3 prompts, 364 responses to each, rewards that are known
    truth = bed.gradient(logits, bed.correct)             # of the expected reward, exactly
    estimates = bed.estimates(logits, rloo_loss, config)  # what 20,000 batches of sampled responses would have said

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py exact                 # the tables of this module
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py exact --n-rollouts 8

The losses under examination are those of `policy_gradients` and `preference_losses`, unchanged. Everything is float64.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from policy_gradients import (
    PolicyConfig,
    Rollouts,
    clipped,
    gae,
    k1,
    k2,
    k3,
    summed,
    token_rewards,
)
from preference_losses import Pairs, Responses

END = 0  # the token that ends a response; the others are 1, 2, 3

# The bed


class ExactBed:
    """A tabular autoregressive policy with END and three other tokens, whose responses have at most five.

    A policy is a tensor of logits (prompts, states, vocab); a state is what has been written so far. A response that
    has no END after `max_len` tokens is cut there, as in practice.

    Shapes: responses, mask and states (responses, seq): the ids (END as padding), which of them are real, and the state
    before each. reference (prompts, states, vocab). correct and worth (prompts, responses): prompt i asks for token
    i + 1 and then an end. `correct` is 1 if both came, else 0; `worth` is the share of the most copies that fit.
    """

    def __init__(self, n_prompts: int = 3, max_len: int = 5, n_words: int = 3, seed: int = 0) -> None:
        self.n_prompts, self.max_len, self.vocab_size = n_prompts, max_len, n_words + 1
        prefixes = [p for length in range(max_len) for p in itertools.product(range(1, n_words + 1), repeat=length)]
        number = {prefix: index for index, prefix in enumerate(prefixes)}
        whole = [(*prefix, END) for prefix in prefixes]
        whole += list(itertools.product(range(1, n_words + 1), repeat=max_len))
        self.n_states, lengths = len(prefixes), torch.tensor([len(response) for response in whole])
        padded = [[*response, *[END] * (max_len - len(response))] for response in whole]
        before = [[number[response[:t]] if t < len(response) else 0 for t in range(max_len)] for response in whole]
        self.responses, self.states = torch.tensor(padded), torch.tensor(before)
        self.mask = torch.arange(max_len) < lengths[:, None]
        self.lengths, self.ended = lengths.double(), torch.tensor([END in response for response in whole])
        counts = torch.stack([(self.responses == word + 1).sum(dim=1) for word in range(n_prompts)]).double()
        self.worth = counts / (max_len - 1) * self.ended
        self.correct = ((counts > 0) & self.ended).double()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(n_prompts, self.n_states, self.vocab_size, generator=generator, dtype=torch.float64) / 2
        for prompt in range(n_prompts):  # of different difficulty: the word asked for is more or less rare
            logits[prompt, :, prompt + 1] += (-1.5, 0.0, 1.5)[prompt % 3]
        self.reference = logits

    def token_log_probs(self, logits: Tensor) -> Tensor:
        """log p(token | prompt, state) of every token of every response, 0 at padding: (prompts, responses, seq)."""
        table = logits.log_softmax(dim=-1)  # (prompts, states, vocab)
        return table[:, self.states, self.responses] * self.mask  # (prompts, responses, seq)

    def log_probs(self, logits: Tensor) -> Tensor:
        """log p(response | prompt): (prompts, responses); the probabilities of each prompt add up to 1."""
        return self.token_log_probs(logits).sum(dim=2)  # (prompts, responses)

    def expected(self, logits: Tensor, quantity: Tensor) -> Tensor:
        """The mean of a quantity (prompts, responses) or (responses) under the policy, mean over prompts. A scalar."""
        return (self.log_probs(logits).exp() * quantity).sum(dim=1).mean()

    def kl(self, logits: Tensor, other: Tensor) -> Tensor:
        """KL(policy || other) of whole responses, nats, mean over prompts."""
        log_probs = self.log_probs(logits)
        return (log_probs.exp() * (log_probs - self.log_probs(other))).sum(dim=1).mean()

    def objective(self, logits: Tensor, rewards: Tensor, kl_coef: float = 0.0) -> Tensor:
        """What policy gradients climb: expected reward - kl_coef * KL(policy || reference)."""
        return self.expected(logits, rewards) - kl_coef * self.kl(logits, self.reference)

    def gradient(self, logits: Tensor, rewards: Tensor, kl_coef: float = 0.0) -> Tensor:
        """The gradient of the objective, exactly: (prompts, states, vocab)."""
        return exact_gradient(partial(self.objective, rewards=rewards, kl_coef=kl_coef), logits)

    def values(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """The expected reward of a response that goes on from each state: (prompts, states), exactly."""
        chances = self.log_probs(logits).exp()  # (prompts, responses)
        places = self.states[self.mask]  # (tokens)
        rows = torch.arange(len(self.responses)).repeat_interleave(self.lengths.long())  # (tokens)
        reached, won = (
            torch.zeros(self.n_prompts, self.n_states, dtype=torch.float64).index_add(1, places, amount[:, rows])
            for amount in (chances, chances * rewards)
        )
        return won / reached  # (prompts, states)

    def optimum(self, rewards: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
        """The best possible policy in closed form: log(reference * exp(rewards / kl_coef) / Z), and log Z.

        Shapes: log-probabilities (prompts, responses), log Z (prompts). The objective there is kl_coef * log Z.
        """
        unnormalised = self.log_probs(self.reference) + rewards / kl_coef
        log_z = unnormalised.logsumexp(dim=1)
        return unnormalised - log_z[:, None], log_z

    def policy_of(self, log_probs: Tensor) -> Tensor:
        """The logits whose responses have these log-probabilities (prompts, responses): every distribution has some."""
        chances, total = log_probs.exp(), torch.zeros_like(self.reference)
        for t in range(self.max_len):
            index = self.states[:, t] * self.vocab_size + self.responses[:, t]
            total.flatten(1).index_add_(1, index[self.mask[:, t]], chances[:, self.mask[:, t]])
        return total.clamp(min=1e-300).log()

    # What sampling would have said

    def sample(self, logits: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Indices of responses, drawn independently: (batches, prompts, rollouts) for shape (batches, rollouts)."""
        chances = self.log_probs(logits).exp()
        drawn = torch.multinomial(chances, shape[0] * shape[1], replacement=True, generator=generator)
        return drawn.view(self.n_prompts, *shape).transpose(0, 1).contiguous()

    def estimates(self, logits: Tensor, loss: Callable, setting: "Setting", batch_of: int = 2000) -> Tensor:
        """The gradient that `loss` gives on each of n_batches sampled batches, uphill: (batches, parameters).

        loss(log_probs, rollouts, config) as in `policy_gradients`. Its gradient in the log-probabilities is taken by
        autograd, and from there to the logits by the chain rule: d log p / d logits = one-hot - p.
        """
        generator, found, left = torch.Generator().manual_seed(setting.seed), [], setting.n_batches
        values = setting.values
        if values is None:
            values = torch.zeros(self.n_prompts, self.n_states, dtype=torch.float64)
        tables = [self.token_log_probs(table) for table in (logits, setting.behaviour_of(logits), self.reference)]
        prompts = torch.arange(self.n_prompts)[:, None]

        def one(ours: Tensor, old: Tensor, ref: Tensor, rewards: Tensor, mask: Tensor, value: Tensor) -> Tensor:
            rows = Responses(torch.zeros(0), mask)
            return -loss(ours, Rollouts(rows, rewards, old, ref, value), setting.config)

        while left > 0:
            shape = (min(batch_of, left), setting.n_rollouts)
            picked = self.sample(setting.behaviour_of(logits), shape, generator)  # (batches, prompts, rollouts)
            parts = [table[prompts, picked].flatten(1, 2) for table in tables]  # (batches, batch, seq)
            mask, states = (part[picked].flatten(1, 2) for part in (self.mask, self.states))
            rewards = setting.rewards[prompts, picked]  # (batches, prompts, rollouts)
            value = values[prompts[..., None], self.states[picked]].flatten(1, 2)
            slopes = vmap(grad(one))(*parts, rewards, mask, value) * mask  # (batches, batch, seq)
            found.append(self.to_logits(slopes, states, self.responses[picked].flatten(1, 2), logits))
            left -= shape[0]
        return torch.cat(found)

    def to_logits(self, slopes: Tensor, states: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        """Slopes in log-probabilities (batches, batch, seq) as slopes in the logits: (batches, parameters)."""
        batches, n_rows, _ = slopes.shape
        place = torch.arange(self.n_prompts).repeat_interleave(n_rows // self.n_prompts)[:, None] * self.n_states
        place = (place + states).flatten(1)  # (batches, tokens): which row of the table of logits
        total = torch.zeros(batches, self.n_prompts * self.n_states * self.vocab_size, dtype=torch.float64)
        total.scatter_add_(1, place * self.vocab_size + tokens.flatten(1), slopes.flatten(1))
        weight = torch.zeros(batches, self.n_prompts * self.n_states, dtype=torch.float64)
        weight.scatter_add_(1, place, slopes.flatten(1))
        return total - (weight[..., None] * logits.softmax(dim=-1).flatten(0, 1)).flatten(1)


@dataclass(frozen=True)
class Setting:
    """What an estimator is examined on. values (prompts, states): of PPO's value model; behaviour: who sampled."""

    rewards: Tensor
    config: PolicyConfig
    n_rollouts: int = 4
    n_batches: int = 20_000
    seed: int = 0
    values: Tensor | None = None
    behaviour: Tensor | None = None

    def behaviour_of(self, logits: Tensor) -> Tensor:
        return logits if self.behaviour is None else self.behaviour


def exact_gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The gradient of a scalar function at these logits."""
    return grad(function)(logits)


def nearby(bed: ExactBed, distance: float, seed: int = 1) -> Tensor:
    """A policy beside the reference: its logits with normal noise of this size added."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(bed.reference.shape, generator=generator, dtype=torch.float64)
    return bed.reference + distance * noise


# Judging estimates of a gradient

N_DIRECTIONS = 30


class Verdict(NamedTuple):
    """How estimates lie about the truth.

    scale: the component of their mean along the truth, in units of the truth (1: none lost), with its standard error;
    angle: degrees between their mean and the truth, the noise of the mean taken off; off: the largest |mean - truth|,
    in standard errors, along the truth and N_DIRECTIONS random directions (single parameters would not do: a rare state
    is met too seldom for its mean to be normal); noise: root of the summed variances of one estimate, over the length
    of their mean along the truth.
    """

    scale: float
    scale_error: float
    angle: float
    off: float
    noise: float

    @property
    def biased(self) -> bool:
        """Whether an unbiased estimator would be this far off with a probability of less than 1 in 1,000."""
        return self.off > bonferroni(N_DIRECTIONS + 1)


def bonferroni(n_tests: int, doubt: float = 1e-3) -> float:
    """The |z| that the largest of n_tests standard normal numbers exceeds with a probability of at most `doubt`."""
    return -torch.special.ndtri(torch.tensor(doubt / (2 * n_tests), dtype=torch.float64)).item()


def judge(estimates: Tensor, truth: Tensor) -> Verdict:
    """Compare estimates (batches, parameters) with the true gradient (any shape of that many parameters)."""
    truth, n = truth.flatten(), len(estimates)
    mean, variance = estimates.mean(dim=0), estimates.var(dim=0)
    size = truth.norm()
    along = estimates @ truth / size**2  # (batches)
    scale = along.mean()
    noise = variance.sum() / n
    across = (mean - scale * truth).square().sum() - noise + along.var() / n * size**2
    generator = torch.Generator().manual_seed(0)
    ways = torch.randn(len(truth), N_DIRECTIONS, generator=generator, dtype=torch.float64)
    ways = torch.cat([truth[:, None], ways], dim=1)  # (parameters, directions)
    seen = estimates @ ways  # (batches, directions)
    off = ((seen.mean(dim=0) - truth @ ways).abs() / (seen.std(dim=0) / n**0.5)).max().item()
    angle = math.degrees(math.atan2(math.sqrt(max(0.0, across.item())), (scale * size).item()))
    return Verdict(
        scale.item(), (along.std() / n**0.5).item(), angle, off, (variance.sum().sqrt() / (scale * size)).item()
    )


def best_baseline(bed: ExactBed, logits: Tensor, rewards: Tensor) -> Tensor:
    """The constant for each prompt that makes REINFORCE least noisy: E[r |score|^2] / E[|score|^2]. (prompts)."""
    chances, softmax = bed.log_probs(logits).exp(), logits.softmax(dim=-1)
    sizes = 1 - 2 * softmax + softmax.square().sum(dim=-1, keepdim=True)  # |one-hot - p|^2 of each token
    squares = (sizes[:, bed.states, bed.responses] * bed.mask).sum(dim=2)  # (prompts, responses): states are distinct
    return (chances * rewards * squares).sum(dim=1) / (chances * squares).sum(dim=1)


def grpo_prompt_weight(p: float, n_rollouts: int) -> float:
    """What dividing by the deviation of the group multiplies a prompt's gradient by, for rewards 0 and 1, exactly.

    p: the prompt's chance of a right answer. The centred reward alone would give (n - 1) / n for every p; as n grows
    this tends to 1 / sqrt(p (1 - p)): prompts that are nearly always, or nearly never, solved get most of the step.
    """
    if not 0 < p < 1:
        raise ValueError(
            f"p must lie between 0 and 1, got {p}: a prompt that is always or never solved has no gradient"
        )
    n, total = n_rollouts, 0.0
    for k in range(1, n):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k) * math.sqrt(k * (n - k))
    return math.sqrt((n - 1) / n**3) * total / (p * (1 - p))


def tilted(
    advantage: Callable[[Tensor], Tensor], average: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Rollouts, PolicyConfig], Tensor]:
    """A loss from one way to centre rewards and one to average tokens."""

    def loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
        advantages = advantage(rollouts.rewards).reshape(-1, 1)
        ratio = (log_probs - rollouts.old_log_probs).exp()
        return average(clipped(ratio, advantages, config.clip_eps), rollouts.mask)

    return loss


def minus_baseline(baseline: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rewards: rewards - baseline[:, None]


def gae_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """PPO's surrogate with unwhitened generalised advantages, summed over tokens."""
    advantages = gae(token_rewards(rollouts, 0.0), rollouts.values, rollouts.mask, 1.0, config.gae_lambda)
    ratio = (log_probs - rollouts.old_log_probs).exp()
    return summed(clipped(ratio, advantages, config.clip_eps), rollouts.mask)


def kl_loss(estimator: Callable[[Tensor], Tensor], level: str, with_ratio: bool = False) -> Callable:
    """An estimate of the KL as a loss, for each "token" or for a whole "sequence"; with_ratio: times policy / old."""

    def loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
        log_ratio, moved = log_probs - rollouts.ref_log_probs, log_probs - rollouts.old_log_probs
        if level == "sequence":
            log_ratio, moved = ((part * rollouts.mask).sum(dim=1, keepdim=True) for part in (log_ratio, moved))
        values = estimator(log_ratio) * (moved.exp() if with_ratio else 1.0)
        return -(values.sum(dim=1).mean() if level == "sequence" else summed(values, rollouts.mask))

    return loss


def kl_values(bed: ExactBed, logits: Tensor) -> dict[str, tuple[float, float]]:
    """Exact mean and standard deviation of k1, k2, k3, for whole responses and as sums over tokens (prompt 0).

    By enumeration, so no sample is in it; the truth is the mean of k1.
    """
    chances = bed.log_probs(logits).exp()[0]
    log_ratio = (bed.token_log_probs(logits) - bed.token_log_probs(bed.reference))[0]  # (responses, seq)
    found = {}
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        for level, values in (
            ("sequence", estimator(log_ratio.sum(dim=1))),
            ("token", (estimator(log_ratio) * bed.mask).sum(dim=1)),
        ):
            mean = (chances * values).sum()
            found[f"{name}, {level}"] = (mean.item(), (chances * (values - mean).square()).sum().sqrt().item())
    return found


# Preferences: every pair, weighted as a judge would label it


def pair_chances(rewards: Tensor) -> Tensor:
    """P(the first beats the second) of all pairs by Bradley and Terry: (prompts, responses, responses)."""
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def all_pairs(bed: ExactBed, logits: Tensor) -> Pairs:
    """Log-probabilities of every pair (first chosen, second rejected): each (prompts, responses, responses)."""
    ours, ref = bed.log_probs(logits), bed.log_probs(bed.reference)
    counts = bed.lengths.expand_as(ours)
    shape = (*ours.shape, ours.shape[1])
    first, second = ((part[:, :, None].expand(shape), part[:, None].expand(shape)) for part in (ours, ref))
    n_first, n_second = counts[:, :, None].expand(shape), counts[:, None].expand(shape)
    return Pairs(first[0], first[1], second[0], second[1], n_first, n_second)


def fit_pairs(bed: ExactBed, weights: Tensor, loss: Callable[[Pairs], Tensor], n_steps: int = 1000) -> Tensor:
    """Logits that minimise the weighted mean loss over pairs, from the reference, by L-BFGS.

    weights (prompts, responses, responses): how often the judge sees the pair and prefers the first.
    """
    seen = weights.nonzero(as_tuple=True) if (weights == 0).double().mean() > 0.5 else None

    def total(logits: Tensor) -> Tensor:
        if seen is None:
            return (weights * loss(all_pairs(bed, logits))).sum()
        ours, ref = bed.log_probs(logits), bed.log_probs(bed.reference)
        prompt, first, second = seen
        counts = bed.lengths
        pairs = Pairs(
            *(ours[prompt, first], ours[prompt, second], ref[prompt, first], ref[prompt, second]),
            *(counts[first], counts[second]),
        )
        return (weights[seen] * loss(pairs)).sum()

    return minimise(total, bed.reference, n_steps)


def minimise(function: Callable[[Tensor], Tensor], start: Tensor, n_steps: int = 1000) -> Tensor:
    """The place of the minimum, by L-BFGS with line search."""
    logits = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=n_steps,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


def judged(bed: ExactBed, sampler: Tensor, chances: Tensor) -> Tensor:
    """Weights of `fit_pairs` for pairs drawn from the policy `sampler` and judged with these chances, exactly."""
    drawn = bed.log_probs(sampler).exp()  # (prompts, responses)
    return drawn[:, :, None] * drawn[:, None, :] * chances / bed.n_prompts


def judged_sample(bed: ExactBed, sampler: Tensor, chances: Tensor, n_pairs: int, seed: int) -> Tensor:
    """The same for n_pairs pairs of each prompt that were really drawn and judged: counts over their sum."""
    generator = torch.Generator().manual_seed(seed)
    picked = bed.sample(sampler, (n_pairs, 2), generator)  # (pairs, prompts, 2)
    weights = torch.zeros_like(chances)
    for prompt in range(bed.n_prompts):
        first, second = picked[:, prompt].unbind(dim=1)
        wins = torch.rand(n_pairs, generator=generator, dtype=torch.float64) < chances[prompt, first, second]
        winner, loser = torch.where(wins, first, second), torch.where(wins, second, first)
        different = winner != loser
        ones = torch.ones(int(different.sum()), dtype=torch.float64)
        weights[prompt].index_put_((winner[different], loser[different]), ones, accumulate=True)
    return weights / weights.sum()


def ipo_optimum(bed: ExactBed, chances: Tensor, sampler: Tensor, tau: float) -> Tensor:
    """Where IPO ends: log(reference * exp(P(beats a response of the sampler) / tau) / Z): (prompts, responses)."""
    drawn = bed.log_probs(sampler).exp()  # (prompts, responses)
    wins = (chances * drawn[:, None, :]).sum(dim=2)  # (prompts, responses)
    return (bed.log_probs(bed.reference) + wins / tau).log_softmax(dim=1)


def distance(bed: ExactBed, log_probs: Tensor, wanted: Tensor) -> float:
    """KL(policy || wanted) of whole responses, nats, mean over prompts; both as log-probabilities."""
    return (log_probs.exp() * (log_probs - wanted)).sum(dim=1).mean().item()
