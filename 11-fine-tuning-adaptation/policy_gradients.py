"""Topic 11 - Policy gradients: a language model that is rewarded for its own answers.

    log = improve(model, reference, task, PolicyConfig(method="grpo", budget=60), seed=0)

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py reinforce --method grpo  # checked answers
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py exact  # every estimator against the truth

One loop; the methods differ in the advantage of a response, in what is clipped, and in how tokens are averaged.

Williams 1992 (REINFORCE); Schulman et al. 2016 (GAE, arXiv 1506.02438), 2017 (PPO, arXiv 1707.06347), Schulman 2020
("Approximating KL divergence"); Ziegler et al. 2019 (KL to a reference, arXiv 1909.08593); Ahmadian et al. 2024 (RLOO,
arXiv 2402.14740); Shao et al. 2024 (GRPO, arXiv 2402.03300); Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783); Yu et al.
2025 (DAPO, arXiv 2503.14476).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt2 import SamplingConfig, left_padded
from modern_llm_architectures import CausalLM
from preference_losses import (
    Pairs,
    Responses,
    ScalarModel,
    dpo_loss,
    lay_out,
    response_log_probs,
    response_scores,
)
from sequence_modeling import device_of
from training_transformers import clip_gradients
from workbench import check_range, progress

# Distance to the reference: three estimates from samples of the policy


def k1(log_ratio: Tensor) -> Tensor:
    """log(policy / reference): unbiased for KL(policy || reference), often negative. Any shape, as all three."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square: biased, small variance; differentiated, it gives the gradient of the KL."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy): unbiased, never negative; its gradient is another KL's."""
    return torch.expm1(-log_ratio) + log_ratio


# Advantages: how much better a response was than expected. rewards (prompts, rollouts) to the same


def no_baseline(rewards: Tensor) -> Tensor:
    """The reward itself (REINFORCE)."""
    return rewards


def leave_one_out(rewards: Tensor) -> Tensor:
    """The reward minus the mean of the other rollouts of the same prompt (RLOO); 0 for a single rollout."""
    n = rewards.shape[1]
    if n == 1:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (n / (n - 1))  # (prompts, rollouts)


def group_centred(rewards: Tensor) -> Tensor:
    """The reward minus the mean of all rollouts of its prompt, itself included (Dr. GRPO)."""
    return rewards - rewards.mean(dim=1, keepdim=True)  # (prompts, rollouts)


def group_normalised(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """The centred reward in standard deviations of its group (GRPO, section 4.1.2); 0 where all rewards are equal."""
    centred = group_centred(rewards)
    if rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)  # (prompts, rollouts)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95) -> Tensor:
    """Generalised advantages (Schulman et al. 2016, eq. 16): the sum of (gamma lambda)^l * delta_{t+l}.

    rewards, values, mask (batch, seq): at each counted token the reward for it and the value before it, that is, of the
    text that it is appended to. Nothing follows the last counted token: the value after it is 0. Counted tokens of a
    row are neighbours. Returns (batch, seq), 0 where nothing is counted. One pass from the back.
    """
    advantages = torch.zeros_like(values)  # (batch, seq)
    following, value_after = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])  # (batch)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        value_after = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages  # (batch, seq)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all counted tokens, as PPO's implementations do; 0 elsewhere. (batch, seq)."""
    n = mask.sum()
    centred = (advantages - (advantages * mask).sum() / n) * mask
    return centred / ((centred.square().sum() / (n - 1).clamp(min=1)).sqrt() + 1e-8)  # (batch, seq)


# Averages over tokens. losses, mask (batch, seq) to a scalar


def summed(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of a response, mean over responses: what the policy gradient theorem asks for."""
    return (losses * mask).sum(dim=1).mean()


def per_sequence(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each response, then over responses (GRPO): a token of a long response counts less."""
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def per_token(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over all tokens of the batch (DAPO; TRL's "bnpo"): a response's weight is its length."""
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def per_budget(losses: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
    """Sum over tokens, divided by a constant (Dr. GRPO): `summed`, on another scale."""
    return (losses * mask).sum() / (len(losses) * max_new_tokens)


# Surrogates: what is differentiated


def clipped(ratio: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """PPO's loss (eq. 7): -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A). Gradient 0 where it went far enough."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_eps: float) -> Tensor:
    """Half the larger of two squared errors: of the new value, and of it moved by at most eps from the old one."""
    near = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


class Rollouts(NamedTuple):
    """Sampled responses of some prompts and what is known of them. The rollouts of a prompt are neighbours.

    Shapes: rewards (prompts, rollouts); old_log_probs, ref_log_probs (batch, seq) as of `response_log_probs`, without
    gradient, with batch = prompts * rollouts; values (batch, seq) of PPO, or None.
    """

    rows: Responses
    rewards: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.rows.mask

    def penalised(self, kl_coef: float) -> Tensor:
        """The rewards minus kl_coef * log(policy / reference) of each whole response: (prompts, rollouts)."""
        log_ratio = ((self.old_log_probs - self.ref_log_probs) * self.mask).sum(dim=1)  # (batch)
        return self.rewards - kl_coef * log_ratio.view_as(self.rewards)


Method = Literal["reinforce", "rloo", "grpo", "dr-grpo", "dapo", "ppo", "rejection", "dpo", "online-dpo"]


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy is improved."""

    method: Method = "grpo"  # the rule
    n_prompts: int = 16  # prompts of a batch
    n_rollouts: int = 8  # responses sampled for each
    max_new_tokens: int = 40  # longest response
    max_steps: int = 100  # batches; with a budget the limit of them
    budget: float = 0.0  # seconds of CPU after which to end; 0: none
    n_epochs: int = 1  # optimizer steps on each batch; with more than one the clip begins to matter
    learning_rate: float = 3e-4  # of Adam
    grad_clip: float = 1.0  # largest norm of the gradient
    kl_coef: float = 0.01  # weight of the distance to the reference
    clip_eps: float = 0.2  # how far the probability ratio of a token may move
    correct_kl: bool = True  # GRPO and its kin: multiply k3 by the ratio, which makes its gradient that of the KL
    gae_lambda: float = 0.95  # PPO: 1 trusts what happened, 0 the value model
    dpo_beta: float = 0.1  # DPO: weight of the distance to the reference
    log_every: int = 1  # batches between rows of the log

    def __post_init__(self) -> None:
        counts = ("n_prompts", "n_rollouts", "max_new_tokens", "max_steps", "n_epochs", "log_every")
        check_range(self, *counts, least=1)
        check_range(self, "learning_rate", "grad_clip", "dpo_beta", above=0)
        check_range(self, "budget", "kl_coef", least=0)
        check_range(self, "clip_eps", above=0, below=1)
        check_range(self, "gae_lambda", least=0, most=1)
        if self.method not in POLICY_LOSSES:
            raise ValueError(f"unknown method {self.method!r}; use {', '.join(POLICY_LOSSES)}")


# The methods: loss(log_probs with gradient, rollouts, config) -> scalar


def reinforce_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """-reward * log p(response), the distance to the reference taken off the reward (Williams 1992)."""
    advantages = no_baseline(rollouts.penalised(config.kl_coef)).reshape(-1, 1)  # (batch, 1)
    return summed(-advantages * log_probs, rollouts.mask)


def rloo_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """REINFORCE with the mean of the other rollouts for a baseline, and one clipped ratio for a whole response."""
    advantages = leave_one_out(rollouts.penalised(config.kl_coef)).flatten()  # (batch)
    ratio = ((log_probs - rollouts.old_log_probs) * rollouts.mask).sum(dim=1).exp()  # (batch)
    return clipped(ratio, advantages, config.clip_eps).mean()


def token_losses(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig, advantages: Tensor) -> Tensor:
    """What GRPO and its kin average: PPO's clip for every token, and k3 to the reference as a loss. (batch, seq)."""
    ratio = (log_probs - rollouts.old_log_probs).exp()  # (batch, seq)
    losses = clipped(ratio, advantages, config.clip_eps)  # (batch, seq)
    if config.kl_coef:
        distance = k3(log_probs - rollouts.ref_log_probs)  # (batch, seq)
        losses = losses + config.kl_coef * distance * (ratio if config.correct_kl else 1.0)
    return losses


def grpo_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """Advantages in standard deviations of the group, a mean over the tokens of each response (Shao et al. 2024)."""
    advantages = group_normalised(rollouts.rewards).reshape(-1, 1)  # (batch, 1)
    return per_sequence(token_losses(log_probs, rollouts, config, advantages), rollouts.mask)


def dapo_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """GRPO with one mean over all tokens of the batch (Yu et al. 2025, section 3.3); TRL's default."""
    advantages = group_normalised(rollouts.rewards).reshape(-1, 1)  # (batch, 1)
    return per_token(token_losses(log_probs, rollouts, config, advantages), rollouts.mask)


def dr_grpo_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """GRPO without its two divisions, by the deviation and by the length (Liu et al. 2025)."""
    advantages = group_centred(rollouts.rewards).reshape(-1, 1)  # (batch, 1)
    losses = token_losses(log_probs, rollouts, config, advantages)  # (batch, seq)
    return per_budget(losses, rollouts.mask, config.max_new_tokens)


def token_rewards(rollouts: Rollouts, kl_coef: float) -> Tensor:
    """PPO's reward of each token: -kl_coef * log(policy / reference), and at the end the response's. (batch, seq)."""
    positions = torch.arange(rollouts.mask.shape[1], device=rollouts.mask.device)
    last = (rollouts.mask * (positions + 1)).argmax(dim=1, keepdim=True)  # (batch, 1)
    rewards = -kl_coef * (rollouts.old_log_probs - rollouts.ref_log_probs) * rollouts.mask  # (batch, seq)
    return rewards.scatter_add(1, last, rollouts.rewards.reshape(-1, 1))  # (batch, seq)


def ppo_advantages(rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """GAE of the token rewards, not yet whitened: (batch, seq)."""
    rewards = token_rewards(rollouts, config.kl_coef)
    return gae(rewards, rollouts.values, rollouts.mask, gae_lambda=config.gae_lambda)


def ppo_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """The policy's half of PPO: whitened generalised advantages, a clipped ratio for every token."""
    advantages = whitened(ppo_advantages(rollouts, config), rollouts.mask)  # (batch, seq)
    ratio = (log_probs - rollouts.old_log_probs).exp()  # (batch, seq)
    return per_token(clipped(ratio, advantages, config.clip_eps), rollouts.mask)


def rejection_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """Fine-tuning on the responses that have the best possible reward of 1, nats per token; 0 if there are none."""
    accepted = (rollouts.rewards.reshape(-1, 1) >= 1) & rollouts.mask  # (batch, seq)
    return per_token(-log_probs, accepted)


def best_and_worst(log_probs: Tensor, rollouts: Rollouts) -> tuple[Pairs, Tensor]:
    """One pair for each prompt, its best and its worst rollout, and whether their rewards differ: (prompts), bool."""
    ours, ref, counts = (
        (values * rollouts.mask).sum(dim=1).view_as(rollouts.rewards)
        for values in (log_probs, rollouts.ref_log_probs, rollouts.mask.long())
    )
    best, worst = (place(dim=1, keepdim=True) for place in (rollouts.rewards.argmax, rollouts.rewards.argmin))
    picked = (values.gather(1, place)[:, 0] for values in (ours, ref, counts) for place in (best, worst))
    return Pairs(*picked), rollouts.rewards.amax(dim=1) > rollouts.rewards.amin(dim=1)


def pair_loss(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
    """DPO on the best and the worst rollout of every prompt whose rollouts are not all alike; 0 if there are none."""
    pairs, differ = best_and_worst(log_probs, rollouts)
    return (dpo_loss(pairs, config.dpo_beta) * differ).sum() / differ.sum().clamp(min=1)


POLICY_LOSSES: dict[str, Callable[[Tensor, Rollouts, PolicyConfig], Tensor]] = {
    "reinforce": reinforce_loss,
    "rloo": rloo_loss,
    "grpo": grpo_loss,
    "dr-grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "ppo": ppo_loss,
    "rejection": rejection_loss,
    "dpo": pair_loss,
    "online-dpo": pair_loss,
}
FROM_REFERENCE = ("rejection", "dpo")  # whose responses are sampled from the reference, not from the policy


# Sampling


class RewardTask(NamedTuple):
    """What a policy is asked and what its answers are worth.

    draw(n, step) gives n questions, a pure function of the step; each has the ids of its `prompt`. reward(questions,
    responses) gives one number for each response, a list of ids that ends with end_id if it has ended. Rewards of 1 and
    more are what rejection sampling accepts.
    """

    draw: Callable[[int, int], list]
    reward: Callable[[list, list[list[int]]], list[float]]
    end_id: int


@torch.no_grad()
def sample_responses(
    model: CausalLM, prompts: list[list[int]], end_id: int, sampling: SamplingConfig, generator: torch.Generator
) -> list[list[int]]:
    """One response to each prompt, its end included if it has ended within max_new_tokens.

    The end of a text (eos_id) cuts a response as well: what generation writes behind it is padding, not the model's.
    """
    token_ids, real = left_padded(prompts, model.config.pad_id)
    device = device_of(model)
    made = model.generate(token_ids.to(device), sampling, real.to(device), generator).tolist()
    ends = (end_id, model.config.eos_id)
    return [row[: next((place for place, token in enumerate(row, 1) if token in ends), len(row))] for row in made]


@torch.no_grad()
def roll_out(
    model: CausalLM, reference: CausalLM, task: RewardTask, config: PolicyConfig, step: int, generator: torch.Generator
) -> tuple[Rollouts, dict[str, float]]:
    """Sample responses to a batch of questions; and numbers for the log.

    The log has the mean reward, the distance to the reference (k1 of whole responses: nats per response), the entropy
    (nats per token) and the length (tokens). The model is set to evaluate: dropout would make another policy of it.
    """
    model.eval()
    actor = reference if config.method in FROM_REFERENCE else model
    questions = [item for item in task.draw(config.n_prompts, step) for _ in range(config.n_rollouts)]
    prompts, sampling = [question.prompt for question in questions], SamplingConfig(config.max_new_tokens)
    responses = sample_responses(actor, prompts, task.end_id, sampling, generator)
    rewards = torch.tensor(task.reward(questions, responses)).view(config.n_prompts, config.n_rollouts)
    rows = lay_out(prompts, responses, model.config.pad_id).to(device_of(model))
    log_probs, entropies = response_scores(model, rows, with_entropy=True)  # (batch, seq)
    ref_log_probs = response_log_probs(reference, rows)  # (batch, seq)
    rollouts = Rollouts(rows, rewards.to(log_probs), log_probs, ref_log_probs)
    row = {
        "reward": rewards.mean().item(),
        "kl": (log_probs - ref_log_probs).sum(dim=1).mean().item(),
        "entropy": (entropies.sum() / rows.mask.sum()).item(),
        "length": rows.lengths.double().mean().item(),
        "mixed": (rewards.amax(dim=1) > rewards.amin(dim=1)).double().mean().item(),
    }
    return rollouts, row


# The loop


class Critic:
    """PPO's value model: a copy of the policy with a number in place of the vocabulary, trained on the returns."""

    def __init__(self, model: CausalLM, config: PolicyConfig) -> None:
        self.model, self.config = ScalarModel(copy.deepcopy(model)), config
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))

    def values(self, rows: Responses) -> Tensor:
        """The value of the text before each counted token, 0 elsewhere: (batch, seq)."""
        return self.model(rows.token_ids[:, :-1]) * rows.mask  # (batch, seq)

    def learn(self, rollouts: Rollouts, returns: Tensor) -> None:
        """One step towards the returns (batch, seq), each value moved by at most clip_eps."""
        losses = clipped_value_loss(self.values(rollouts.rows), rollouts.values, returns, self.config.clip_eps)
        take_step(self.model, self.optimizer, per_token(losses, rollouts.mask), self.config.grad_clip)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> float:
    """One optimizer step; returns the norm of the gradient before the clip. A loss without gradient changes nothing."""
    optimizer.zero_grad(set_to_none=True)
    if not loss.requires_grad:
        return 0.0
    loss.backward()
    norm = clip_gradients([p.grad for p in model.parameters() if p.grad is not None], grad_clip)
    if norm > 0:  # Adam would go on along its old mean where this batch says nothing
        optimizer.step()
    return norm


def improve(
    model: CausalLM,
    reference: CausalLM,
    task: RewardTask,
    config: PolicyConfig,
    seed: int,
    evaluate: Callable[[CausalLM], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Improve a policy in place until max_steps or the budget of CPU seconds; return the rows of the log.

    `evaluate` runs at the end and, five times on the way, off the clock; its numbers join the row at hand.
    """
    generator, rows = torch.Generator(device_of(model)).manual_seed(seed), []
    spent, examined = 0.0, 0
    loss_of = POLICY_LOSSES[config.method]
    critic = Critic(model, config) if config.method == "ppo" else None
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    for step in progress(range(config.max_steps), config.method):
        before = time.process_time()
        rollouts, row = roll_out(model, reference, task, config, step, generator)
        if critic:
            with torch.no_grad():
                rollouts = rollouts._replace(values=critic.values(rollouts.rows))
            returns = ppo_advantages(rollouts, config) + rollouts.values  # (batch, seq)
        for _ in range(config.n_epochs):
            loss = loss_of(response_log_probs(model, rollouts.rows), rollouts, config)
            row["grad_norm"] = take_step(model, optimizer, loss, config.grad_clip)
            if critic:
                critic.learn(rollouts, returns)
        spent += time.process_time() - before
        share = spent / config.budget if config.budget else (step + 1) / config.max_steps
        done = share >= 1 or step + 1 == config.max_steps
        row, due = {"step": step + 1, "seconds": spent, **row}, evaluate and (done or share * 6 >= examined + 1)
        if due:
            row, examined = row | evaluate(model), int(share * 6)
        if due or done or (step + 1) % config.log_every == 0:
            rows.append(row)
        if done:
            break
    return rows
