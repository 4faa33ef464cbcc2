"""Exercises of topic 11: write each function in a file of your own, then

python 11-fine-tuning-adaptation/exercises_11.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import policy_gradients
import preference_losses
from course_tokenizer import Chat
from exercises_08 import compare, numbers
from fine_tuning_adaptation import DialogueBatches
from low_rank_adapters import LoRALinear
from nf4 import nf4_levels, quantize_nf4
from policy_gradients import (
    PolicyConfig,
    Rollouts,
    clipped,
    group_centred,
    group_normalised,
    k1,
    k2,
    k3,
    leave_one_out,
    no_baseline,
    per_sequence,
    per_token,
    summed,
)
from preference_losses import Pairs, Responses
from workbench import Exercise, first_difference, grade


def slopes(function: Callable, args: tuple, wrt: tuple[int, ...]) -> list[Tensor] | str:
    """The gradients in some arguments of what a function returns, each entry of that with a weight of its own."""
    given = [arg.detach().clone().requires_grad_(n in wrt) if n in wrt else arg for n, arg in enumerate(args)]
    found = function(*given)
    if not isinstance(found, Tensor) or not found.requires_grad:
        return "it returned nothing that a gradient could come from"
    weights = torch.arange(1, found.numel() + 1, dtype=found.dtype).view_as(found)
    wanted = [given[n] for n in wrt]
    parts = torch.autograd.grad((found * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(arg) if part is None else part for arg, part in zip(wanted, parts, strict=True)]


def compare_slopes(
    answer: Callable, args: tuple, names: dict[int, str], wanted: Callable, case: str, look: str
) -> str | None:
    """None if the gradients in the arguments of these places, by name, are those of `wanted`; else what differs."""
    found, right = slopes(answer, args, tuple(names)), slopes(wanted, args, tuple(names))
    if isinstance(found, str):
        return f"{case}: {found}; {look}"
    for name, ours, theirs in zip(names.values(), found, right, strict=True):
        if difference := first_difference(ours, theirs, 1e-9):
            return f"{case}, gradient in {name}: {difference}; {look}"
    return None


# What the loss counts


def chat_targets(turns: list[tuple[str, list[int]]], start_id: int, end_id: int) -> tuple[list[int], list[int]]:
    ids, trained = [], []
    for role, content in turns:
        ids += [start_id, *content, end_id]
        trained += [False] + [role == "assistant"] * (len(content) + 1)
    return ids[:-1], [token if kept else -100 for token, kept in zip(ids[1:], trained[1:], strict=True)]


def check_chat_targets(answer: Callable) -> str | None:
    user, assistant = "user", "assistant"
    cases = {
        "one question, one answer": [(user, [5, 6, 7]), (assistant, [8, 9])],
        "two exchanges": [(user, [5, 6]), (assistant, [8]), (user, [7, 7, 7]), (assistant, [9, 8, 9])],
        "an answer of no token but its end": [(user, [5]), (assistant, [])],
        "an answer that repeats the question": [(user, [5, 6]), (assistant, [5, 6])],
        "a system turn first, and a question after the last answer": [
            *(("system", [4, 4]), (user, [5]), (assistant, [6, 7]), (user, [8, 5, 9])),
        ],
    }
    for name, turns in cases.items():
        given = [(role, list(content)) for role, content in turns]
        got = answer(given, 1, 2)
        if given != turns:
            return f"{name}: it changed the turns that it was given"
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"{name}: expected (inputs, targets), got {got!r}"
        rows = [([1, *content, 2], role == assistant) for role, content in turns]
        ids = [token for part, _ in rows for token in part]
        # a turn's first token is the template's, whoever speaks
        kept = [ours and place > 0 for part, ours in rows for place in range(len(part))]
        batch = DialogueBatches([Chat(ids, kept)], 1, 0)(0)
        for what, found, key in zip(("inputs", "targets"), got, ("inputs", "targets"), strict=True):
            if list(found) != batch[key][0].tolist():
                return f"{name}, {what}: got {list(found)}, expected {batch[key][0].tolist()} for {turns}"
    return None


def targets_with(trained_of: Callable, shift: int = 1) -> Callable:
    """A wrong solution: another choice of trained tokens, given (is it an answer, is it the last turn, its ids)."""

    def wrong(turns, start_id, end_id):
        ids, trained = [], []
        for number, (role, content) in enumerate(turns):
            ids += [start_id, *content, end_id]
            trained += trained_of(role == "assistant", number == len(turns) - 1, content)
        kept = [token if known else -100 for token, known in zip(ids, trained, strict=True)]
        return ids[:-1], kept[shift:] if shift else kept[:-1]

    return wrong


def mask_one_place_late(turns, start_id, end_id):
    """The mask belongs to the inputs: position i is counted if token i, not token i + 1, is an answer's."""
    inputs, targets = chat_targets(turns, start_id, end_id)
    every = targets_with(lambda ours, last, content: [True] * (len(content) + 2))(turns, start_id, end_id)[1]
    counted = [False] + [target != -100 for target in targets][:-1]
    return inputs, [token if kept else -100 for token, kept in zip(every, counted, strict=True)]


# A low-rank update, merged


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_alpha: float, rank_stabilised: bool) -> Tensor:
    rank = lora_a.shape[0]
    scale = lora_alpha / (math.sqrt(rank) if rank_stabilised else rank)
    return weight + scale * lora_b @ lora_a  # (d_out, d_in)


def check_merged_weight(answer: Callable) -> str | None:
    cases = ((5, 3, 2, 16.0, False), (4, 6, 3, 7.0, True), (4, 4, 4, 4.0, False), (3, 7, 1, 8.0, True))
    for d_out, d_in, rank, alpha, stabilised in cases:
        args = (numbers(d_out, d_in, seed=1), numbers(rank, d_in, seed=2), numbers(d_out, rank, seed=3))
        base = nn.Linear(d_in, d_out, bias=False).double()
        layer = LoRALinear(base, rank, alpha / rank ** (0.5 if stabilised else 1.0)).double()
        for parameter, value in zip((base.weight, layer.lora_a, layer.lora_b), args, strict=True):
            parameter.data.copy_(value)
        layer.merge()
        case = (
            f"{d_out} outputs, {d_in} inputs, rank {rank}, alpha {alpha:g}{', rank-stabilised' if stabilised else ''}"
        )
        look = "the rank is the number of rows of A; the scale divides by it, or by its root"
        args = (*args, alpha, stabilised)
        if advice := compare(answer, args, base.weight, case, look):
            return advice
        names = {0: "weight", 1: "lora_a", 2: "lora_b"}
        if advice := compare_slopes(answer, args, names, merged_weight, case, "all three are differentiable"):
            return advice
    return None


def merged_with(scale_of: Callable) -> Callable:
    """A wrong solution: another scale, of alpha, rank, whether rank-stabilised, and the size of the output."""

    def wrong(weight, lora_a, lora_b, lora_alpha, rank_stabilised):
        return weight + scale_of(lora_alpha, len(lora_a), rank_stabilised, len(weight)) * lora_b @ lora_a

    return wrong


def merged_in_place(weight, lora_a, lora_b, lora_alpha, rank_stabilised):
    """Changes the base: the second call adds the update a second time."""
    with torch.no_grad():
        weight += merged_weight(weight, lora_a, lora_b, lora_alpha, rank_stabilised) - weight
    return weight


def merged_twice(weight, lora_a, lora_b, lora_alpha, rank_stabilised):
    once = merged_weight(weight, lora_a, lora_b, lora_alpha, rank_stabilised)
    return merged_weight(once, lora_a, lora_b, lora_alpha, rank_stabilised)


def merged_the_other_way_round(weight, lora_a, lora_b, lora_alpha, rank_stabilised):
    update = merged_weight(torch.zeros_like(weight), lora_a, lora_b, lora_alpha, rank_stabilised)
    return weight + update.T if weight.shape[0] == weight.shape[1] else weight + update


# Four bits


def nf4_restored(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    values = weight.flatten()
    free = -len(values) % block_size
    blocks = F.pad(values, (0, free)).view(-1, block_size)  # (blocks, block)
    scales = blocks.abs().max(dim=1).values  # (blocks)
    scaled = blocks / scales.clamp(min=1e-38)[:, None]  # (blocks, block)
    codes = (scaled[..., None] - levels).abs().argmin(dim=-1)  # (blocks, block)
    restored = (levels[codes] * scales[:, None]).flatten()[: len(values)]
    return scales, restored.view_as(weight)


def check_nf4_restored(answer: Callable) -> str | None:
    levels, wide = nf4_levels(), torch.ones(4, 16)
    wide[:2] *= 100
    cases = {
        "the chapter's block": (torch.tensor([[0.5, -2.0, 0.0, 1.0]]), 4),
        "two blocks of very different size": (numbers(4, 16, seed=1).float() * wide, 32),
        "blocks that run on into the next row": (numbers(6, 5, seed=2).float(), 10),
        "a short last block": (numbers(3, 7, seed=3).float(), 8),
        "a largest magnitude that is negative": (torch.tensor([[0.3, -4.0, 1.1, 0.2, 3.0, 0.1]]), 6),
        "a block of zeros": (torch.cat([torch.zeros(1, 6), numbers(1, 6, seed=4).float()]), 6),
    }
    look = "each block of neighbours has its own largest magnitude; take the nearest level, not the one below"
    for name, (weight, block_size) in cases.items():
        packed = quantize_nf4(weight, block_size, double=False)
        wanted = (packed.scales, packed.dequantize())
        if advice := compare(answer, (weight, levels, block_size), wanted, name, look, 1e-6):
            return advice
    return None


def restored_with(
    scale_of: Callable = lambda blocks: blocks.abs().max(dim=1).values, whole: bool = False, nearest: bool = True
) -> Callable:
    """A wrong solution: another scale, one block for everything, or the level below in place of the nearest."""

    def wrong(weight, levels, block_size):
        size = weight.numel() if whole else block_size
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % size)).view(-1, size)
        scales = scale_of(blocks)
        scaled = blocks / scales.clamp(min=1e-38)[:, None]
        if nearest:
            codes = (scaled[..., None] - levels).abs().argmin(dim=-1)
        else:
            codes = (torch.searchsorted(levels, scaled.contiguous(), right=True) - 1).clamp(min=0)
        restored = (levels[codes] * scales[:, None]).flatten()[: weight.numel()].view_as(weight)
        return (scales.expand(-(-weight.numel() // block_size)) if whole else scales), restored

    return wrong


def nf4_on_an_even_grid(weight, levels, block_size):
    return nf4_restored(weight, torch.linspace(-1, 1, 16), block_size)


def nf4_row_by_row(weight, levels, block_size):
    rows = [nf4_restored(row, levels, min(block_size, len(row))) for row in weight]
    return torch.cat([scales for scales, _ in rows]), torch.stack([restored for _, restored in rows])


def nf4_without_care_for_zeros(weight, levels, block_size):
    scales, restored = nf4_restored(weight, levels, block_size)
    dead = (scales == 0).repeat_interleave(block_size)[: weight.numel()].view_as(weight)
    return scales, restored.masked_fill(dead, math.nan)


# The log-probability of a response


def response_log_prob(logits: Tensor, token_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, token_ids[:, 1:, None])[..., 0]  # (batch, seq)
    place = torch.arange(1, token_ids.shape[1])  # (seq), of the target
    counted = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])  # (batch, seq)
    return (log_probs * counted).sum(dim=1)  # (batch)


def one_token_at_a_time(logits: Tensor, token_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Every token of every response by itself: what the checker compares with."""
    rows = []
    for row in range(len(token_ids)):
        total = logits.new_zeros(())
        for place in range(int(prompt_lengths[row]), int(lengths[row])):
            scores = logits[row, place - 1]
            total = total + scores[token_ids[row, place]] - torch.logsumexp(scores, dim=0)
        rows.append(total)
    return torch.stack(rows)


def check_response_log_prob(answer: Callable) -> str | None:
    cases = {
        "one row": ([3], [6], 6),
        "rows of different lengths": ([2, 4, 1], [7, 5, 4], 7),
        "a response of one token, its end": ([4, 1], [5, 6], 6),
    }
    look = "logits[:, t] are about token t + 1; count the tokens from prompt_length up to length, and no others"
    for seed, (name, (prompts, lengths, width)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(9, (len(prompts), width), generator=generator)
        args = (3 * numbers(len(prompts), width, 9, seed=seed), token_ids, torch.tensor(prompts), torch.tensor(lengths))
        if advice := compare(answer, args, one_token_at_a_time(*args), name, look):
            return advice
        if advice := compare_slopes(answer, args, {0: "logits"}, one_token_at_a_time, name, look):
            return advice
    return None


def log_prob_with(
    first: int = 0, last: int = 0, mean: bool = False, of: str = "chosen", shift: bool = True
) -> Callable:
    """A wrong solution: other tokens counted, a mean, or another number in place of the log-probability."""

    def wrong(logits, token_ids, prompt_lengths, lengths):
        scores, targets = (logits[:, :-1], token_ids[:, 1:]) if shift else (logits, token_ids)
        if of == "vocabulary":
            values = scores.log_softmax(dim=-1).sum(dim=-1)
        else:
            scores = scores if of == "logits" else scores.log_softmax(dim=-1)
            values = scores.gather(2, targets[..., None])[..., 0]
            values = values.exp() if of == "probability" else values
        place = torch.arange(int(shift), token_ids.shape[1])
        counted = (place >= prompt_lengths[:, None] + first) & (place < lengths[:, None] + last)
        total = (values * counted).sum(dim=1)
        return total / counted.sum(dim=1).clamp(min=1) if mean else total

    return wrong


# DPO


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, dpo_beta: float) -> Tensor:
    margin = (chosen - rejected) - (ref_chosen - ref_rejected).detach()  # (pairs)
    return -F.logsigmoid(dpo_beta * margin)


def dpo_of_the_library(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, dpo_beta: float
) -> Tensor:
    ones = torch.ones(len(chosen), dtype=torch.long)
    pairs = Pairs(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), ones, ones)
    return preference_losses.dpo_loss(pairs, dpo_beta)


def check_dpo_loss(answer: Callable) -> str | None:
    start = numbers(3, seed=1) - 9, numbers(3, seed=2) - 12
    far = torch.tensor([-20.0, -9000.0], dtype=torch.float64), torch.tensor([-9000.0, -20.0], dtype=torch.float64)
    cases = {
        "policy and reference alike: the loss is log 2": (*start, *start, 0.3),
        "the chapter's pair": (*(torch.tensor([v], dtype=torch.float64) for v in (-2.0, -4.0, -3.0, -3.0)), 0.5),
        "four pairs": (*(5 * numbers(4, seed=seed) - 20 for seed in range(4)), 0.1),
        "margins of thousands of nats": (*far, 0 * far[0], 0 * far[1], 0.7),
    }
    look = "how much further than the reference the policy prefers the chosen response, times beta, in -log sigmoid"
    names = {0: "chosen", 1: "rejected", 2: "ref_chosen", 3: "ref_rejected"}
    for name, args in cases.items():
        if advice := compare(answer, args, dpo_of_the_library(*args), name, look):
            return advice
        if advice := compare_slopes(answer, args, names, dpo_of_the_library, name, f"{look}; the reference is fixed"):
            return advice
    return None


def dpo_with(margin_of: Callable, loss_of: Callable = lambda margin, beta: -F.logsigmoid(beta * margin)) -> Callable:
    """A wrong solution: another margin, of (chosen, rejected, ref_chosen, ref_rejected), or another use of it."""

    def wrong(chosen, rejected, ref_chosen, ref_rejected, dpo_beta):
        return loss_of(margin_of(chosen, rejected, ref_chosen.detach(), ref_rejected.detach()), dpo_beta)

    return wrong


def dpo_margin(chosen, rejected, ref_chosen, ref_rejected):
    return chosen - rejected - ref_chosen + ref_rejected


def dpo_that_trains_the_reference(chosen, rejected, ref_chosen, ref_rejected, dpo_beta):
    return -F.logsigmoid(dpo_beta * dpo_margin(chosen, rejected, ref_chosen, ref_rejected))


# The distance to the reference, as a loss


def kl_loss(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    log_ratio = log_probs - ref_log_probs.detach()  # (responses)
    ratio = (log_probs - log_probs.detach()).exp()  # (responses): 1, with a gradient
    return ratio * (torch.expm1(-log_ratio) + log_ratio)


def check_kl_loss(answer: Callable) -> str | None:
    for seed, n in ((1, 2), (2, 5), (3, 7)):
        logits, ref = 0.8 * numbers(n, seed=seed), (0.8 * numbers(n, seed=seed + 10)).log_softmax(dim=0)
        logits.requires_grad_()
        log_probs = logits.log_softmax(dim=0)
        case = f"all of {n} responses"
        args = (log_probs.detach(), ref)
        wanted = k3(args[0] - ref)
        look = "as a value it is k3 of log(policy / reference): never negative, and with the KL for its mean"
        if advice := compare(answer, args, wanted, case, look):
            return advice
        given = ref.clone().requires_grad_()
        found = answer(log_probs, given)
        if not found.requires_grad:
            return f"{case}: it returned nothing that a gradient could come from"
        chances = log_probs.detach().exp()  # how often each response is sampled
        ours, theirs = torch.autograd.grad(
            (chances * found).sum(), (logits, given), retain_graph=True, allow_unused=True
        )
        right = torch.autograd.grad((log_probs.exp() * (log_probs - ref)).sum(), logits)[0]
        ours = torch.zeros_like(right) if ours is None else ours
        look = "how often a response is sampled depends on the policy too; a ratio of 1 with a gradient says so"
        if difference := first_difference(ours, right, 1e-9):
            return f"{case}, mean gradient in the policy against that of KL(policy || reference): {difference}; {look}"
        if theirs is not None and theirs.abs().max() > 0:
            return f"{case}: a gradient goes into the reference, which is fixed"
    return None


def kl_with(estimate: Callable, with_ratio: bool = True) -> Callable:
    """A wrong solution: another estimate of log(policy / reference), with the ratio or without."""

    def wrong(log_probs, ref_log_probs):
        value = estimate(log_probs - ref_log_probs.detach())
        return value * (log_probs - log_probs.detach()).exp() if with_ratio else value

    return wrong


def kl_that_trains_the_reference(log_probs, ref_log_probs):
    return (log_probs - log_probs.detach()).exp() * k3(log_probs - ref_log_probs)


def kl_without_a_gradient_of_its_value(log_probs, ref_log_probs):
    value = k3(log_probs.detach() - ref_log_probs.detach())
    return (log_probs - log_probs.detach()).exp() * value


# Generalised advantages


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    advantages = torch.zeros_like(values)  # (batch, seq)
    for row in range(len(values)):
        advantage, value_after = 0.0, 0.0  # nothing follows the end
        for t in reversed(mask[row].nonzero()[:, 0].tolist()):
            delta = rewards[row, t] + gamma * value_after - values[row, t]
            advantage = delta + gamma * gae_lambda * advantage
            value_after = values[row, t]
            advantages[row, t] = advantage
    return advantages


def check_gae(answer: Callable) -> str | None:
    chapter = tuple(torch.tensor([row], dtype=torch.float64) for row in ([0.0, 0.0, 1.0], [0.5, 0.6, 0.8]))
    mask = torch.tensor([[False, True, True, True, True, False], [False, False, False, True, True, True]])
    mask = torch.cat([mask, torch.tensor([[True, False, False, False, False, False]])])
    random = numbers(3, 6, seed=1), 3 + numbers(3, 6, seed=2)
    cases = {
        "the chapter's three tokens, lambda 1": (*chapter, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0),
        "the chapter's three tokens, lambda 1/2": (*chapter, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5),
        "rows with a prompt before and padding behind": (*random, mask, 1.0, 0.9),
        "a discount": (*random, mask, 0.8, 0.7),
        "lambda 0": (*random, mask, 0.9, 0.0),
    }
    look = "from the back; after the last counted token of a row come no value and no advantage, whatever stands there"
    for name, args in cases.items():
        wanted = policy_gradients.gae(*args[:3], gamma=args[3], gae_lambda=args[4])
        if advice := compare(answer, args, wanted, name, look):
            return advice
    return None


def gae_with(
    end_value: bool = False,
    fade: Callable = lambda gamma, lam: gamma * lam,
    discounted: bool = True,
    plus: bool = False,
) -> Callable:
    """A wrong solution: a value after the end, another memory, no discount of the value, or returns."""

    def wrong(rewards, values, mask, gamma, gae_lambda):
        found = torch.zeros_like(values)
        for row in range(len(values)):
            places = mask[row].nonzero()[:, 0].tolist()
            advantage, after = 0.0, 0.0
            if end_value:
                after = values[row, min(places[-1] + 1, values.shape[1] - 1)]
            for t in reversed(places):
                delta = rewards[row, t] + (gamma if discounted else 1.0) * after - values[row, t]
                advantage = delta + fade(gamma, gae_lambda) * advantage
                after = values[row, t]
                found[row, t] = advantage + values[row, t] if plus else advantage
        return found

    return wrong


def gae_over_the_padding(rewards, values, mask, gamma, gae_lambda):
    everything = torch.ones_like(mask)
    return gae(rewards, values, everything, gamma, gae_lambda) * mask


def gae_from_the_front(rewards, values, mask, gamma, gae_lambda):
    reversed_ = [part.flip(1) for part in (rewards, values, mask)]
    return gae(*reversed_, gamma, gae_lambda).flip(1)


def gae_that_leaves_the_padding(rewards, values, mask, gamma, gae_lambda):
    return torch.where(mask, gae(rewards, values, mask, gamma, gae_lambda), rewards - values)


# GRPO


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, rewards: Tensor, mask: Tensor, clip_eps: float) -> Tensor:
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (prompts, rollouts)
    advantages = (centred / (rewards.std(dim=1, keepdim=True) + 1e-4)).detach().reshape(-1, 1)  # (batch, 1)
    ratio = (log_probs - old_log_probs).exp()  # (batch, seq)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)  # (batch, seq)
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def grpo_of_the_library(
    log_probs: Tensor, old_log_probs: Tensor, rewards: Tensor, mask: Tensor, clip_eps: float
) -> Tensor:
    rollouts = Rollouts(Responses(torch.zeros(0), mask), rewards.detach(), old_log_probs, old_log_probs)
    return policy_gradients.grpo_loss(log_probs, rollouts, PolicyConfig(kl_coef=0.0, clip_eps=clip_eps))


def check_grpo_loss(answer: Callable) -> str | None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    old, moved, one = numbers(6, 4, seed=1) - 2, 0.5 * numbers(6, 4, seed=2), torch.ones(4, 1, dtype=torch.bool)
    old = torch.where(mask, old, 7.0)  # what stands at uncounted places must not matter
    single = numbers(4, 1, seed=5) - 2
    close = torch.tensor([[1.0, 1.0, 1.0, 1.0003]]).double()
    rewards = torch.tensor([[1.0, 0.0, 0.25], [0.0, 0.5, 0.5]]).double()
    alike = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]).double()
    cases = {
        "one prompt, one token each, first step": (single, single, torch.tensor([[1.0, 0, 0, 1]]).double(), one, 0.2),
        "the same, rewards that hardly differ": (single, single, close, one, 0.2),
        "two prompts, several tokens, first step": (old, old, rewards, mask, 0.2),
        "a prompt whose rewards are all alike": (old, old, alike, mask, 0.2),
        "ratios on both sides of the clip": (old + moved, old, rewards, mask, 0.2),
        "a wider clip": (old + moved, old, rewards, mask, 0.4),
    }
    look = (
        "centre and divide within each prompt (sample deviation + 0.0001), clip by the smaller gain, mean over the "
        "counted tokens of each response, then over responses"
    )
    for name, args in cases.items():
        if advice := compare(answer, args, grpo_of_the_library(*args), name, look):
            return advice
        names = {0: "log_probs", 2: "rewards"}
        slope = f"{look}; the advantage is a number, no gradient goes through it"
        if advice := compare_slopes(answer, args, names, grpo_of_the_library, name, slope):
            return advice
    return None


def grpo_with(
    advantage: Callable | None = None,
    surrogate: Callable | None = None,
    average: Callable = per_sequence,
    ratio_of: Callable = lambda log_probs, old: (log_probs - old).exp(),
) -> Callable:
    """A wrong solution: another advantage of the rewards, another clip, another mean, or another ratio."""

    def wrong(log_probs, old_log_probs, rewards, mask, clip_eps):
        centre = advantage or group_normalised
        advantages = centre(rewards.detach()).reshape(-1, 1)
        ratio = ratio_of(log_probs, old_log_probs)
        losses = (surrogate or clipped)(ratio, advantages, clip_eps)
        return average(losses, mask)

    return wrong


def grpo_through_the_advantage(log_probs, old_log_probs, rewards, mask, clip_eps):
    advantages = group_normalised(rewards).reshape(-1, 1)
    losses = clipped((log_probs - old_log_probs).exp(), advantages, clip_eps)
    return per_sequence(losses, mask)


def deviation_inside_the_root(rewards):
    return group_centred(rewards) / (rewards.var(dim=1, keepdim=True) + 1e-4).sqrt()


def deviation_of_the_group_as_a_population(rewards):
    return group_centred(rewards) / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-4)


def divided_before_it_is_centred(rewards):
    """The reward is divided, the mean is not."""
    return rewards / (rewards.std(dim=1, keepdim=True) + 1e-4) - rewards.mean(dim=1, keepdim=True)


EXERCISES = [
    Exercise(
        name="chat_targets",
        statement=(
            "A dialogue is a list of turns (role, ids); each is written as start_id, its ids, end_id. Return the "
            "inputs and the targets of next-token prediction: position i has the target of token i + 1. Counted are "
            "the ids of every turn of the role 'assistant' and the end_id behind them; every other target is -100."
        ),
        signature="chat_targets(turns, start_id, end_id) -> (inputs, targets), two lists, one shorter than the text",
        hint="Make two lists of the same length, the tokens and whether each is counted, and shift both.",
        check=check_chat_targets,
        solution=chat_targets,
        mistakes={
            "a loss on everything": targets_with(lambda ours, last, content: [True] * (len(content) + 2)),
            "the end is not trained": targets_with(lambda ours, last, content: [False, *[ours] * len(content), False]),
            "the start of the answer is trained": targets_with(lambda ours, last, content: [ours] * (len(content) + 2)),
            "every end is trained": targets_with(lambda ours, last, content: [False, *[ours] * len(content), True]),
            "only the last turn": targets_with(
                lambda ours, last, content: [False, *[ours and last] * (len(content) + 1)]
            ),
            "the question in place of the answer": targets_with(
                lambda ours, last, content: [False, *[not ours] * (len(content) + 1)]
            ),
            "the first token of the answer is lost": targets_with(
                lambda ours, last, content: [False, *([False] + [ours] * len(content))[: len(content) + 1]]
            ),
            "targets are not shifted": targets_with(
                lambda ours, last, content: [False, *[ours] * (len(content) + 1)], shift=0
            ),
            "the mask is one place late": mask_one_place_late,
        },
    ),
    Exercise(
        name="merged_weight",
        statement=(
            "The weight of a layer with its LoRA update added: scale alpha / rank, or alpha / root of the rank if "
            "rank_stabilised. The tensors that are given stay as they are. Gradients pass."
        ),
        signature=(
            "merged_weight(weight, lora_a, lora_b, lora_alpha, rank_stabilised) -> (d_out, d_in); "
            "weight (d_out, d_in), lora_a (rank, d_in), lora_b (d_out, rank)"
        ),
        hint="The rank is lora_a.shape[0].",
        check=check_merged_weight,
        solution=merged_weight,
        mistakes={
            "scaled by alpha": merged_with(lambda alpha, rank, stabilised, d_out: alpha),
            "alpha / rank always": merged_with(lambda alpha, rank, stabilised, d_out: alpha / rank),
            "alpha / root of the rank always": merged_with(lambda alpha, rank, stabilised, d_out: alpha / rank**0.5),
            "rank / alpha": merged_with(
                lambda alpha, rank, stabilised, d_out: (rank**0.5 if stabilised else rank) / alpha
            ),
            "divided by the number of outputs": merged_with(
                lambda alpha, rank, stabilised, d_out: alpha / (d_out**0.5 if stabilised else d_out)
            ),
            "no scale": merged_with(lambda alpha, rank, stabilised, d_out: 1.0),
            "subtracted": merged_with(
                lambda alpha, rank, stabilised, d_out: -alpha / (rank**0.5 if stabilised else rank)
            ),
            "merged in place": merged_in_place,
            "merged twice": merged_twice,
            "the update transposed where that fits": merged_the_other_way_round,
            "cut off from the gradient": lambda weight, lora_a, lora_b, lora_alpha, rank_stabilised: (
                weight + merged_weight(torch.zeros_like(weight), lora_a, lora_b, lora_alpha, rank_stabilised).detach()
            ),
        },
    ),
    Exercise(
        name="nf4_restored",
        statement=(
            "Quantise a weight and read it back. Its numbers, row after row, form blocks of block_size neighbours, the "
            "last of which may be short; each is divided by the largest magnitude of its block and sent to the nearest "
            "of the levels. Return the scales and the weight that is read back. A block of zeros stays zero."
        ),
        signature="nf4_restored(weight, levels, block_size) -> (scales (blocks), restored, of the weight's shape)",
        hint="Flatten, pad with zeros, view as (blocks, block_size); argmin over |value - level|.",
        check=check_nf4_restored,
        solution=nf4_restored,
        mistakes={
            "one scale for the whole tensor": restored_with(whole=True),
            "the largest number, not the largest magnitude": restored_with(lambda blocks: blocks.max(dim=1).values),
            "divided by the deviation": restored_with(lambda blocks: blocks.std(dim=1)),
            "the level below": restored_with(nearest=False),
            "an even grid": nf4_on_an_even_grid,
            "blocks that begin anew in every row": nf4_row_by_row,
            "zero divided by zero": nf4_without_care_for_zeros,
            "not scaled back": lambda weight, levels, block_size: (
                nf4_restored(weight, levels, block_size)[0],
                nf4_restored(weight / weight.abs().max(), levels, block_size)[1],
            ),
        },
    ),
    Exercise(
        name="response_log_prob",
        statement=(
            "log p(response | prompt) of each row, in nats. A row holds a prompt of prompt_length tokens, a response "
            "that ends with its end token, together `length` tokens, and padding. logits[:, t] are the scores of token "
            "t + 1. Any id may stand in the padding."
        ),
        signature=(
            "response_log_prob(logits, token_ids, prompt_lengths, lengths) -> (batch); "
            "logits (batch, seq, vocab), token_ids (batch, seq)"
        ),
        hint="log_softmax, gather the token that follows, a boolean for each target, a sum.",
        check=check_response_log_prob,
        solution=response_log_prob,
        mistakes={
            "the prompt is counted too": log_prob_with(first=-99),
            "one token of the prompt is counted": log_prob_with(first=-1),
            "the first token of the response is missed": log_prob_with(first=1),
            "the end is not counted": log_prob_with(last=-1),
            "the padding is counted": log_prob_with(last=99),
            "each token as its own successor": log_prob_with(shift=False),
            "summed over the vocabulary": log_prob_with(of="vocabulary"),
            "raw scores": log_prob_with(of="logits"),
            "a sum of probabilities": log_prob_with(of="probability"),
            "a mean over tokens": log_prob_with(mean=True),
        },
    ),
    Exercise(
        name="dpo_loss",
        statement=(
            "DPO's loss of each pair from the log-probabilities of whole responses, by the policy and by the "
            "reference. It must stay finite at any margin. No gradient goes into the reference."
        ),
        signature="dpo_loss(chosen, rejected, ref_chosen, ref_rejected, dpo_beta) -> (pairs), as all four",
        hint="F.logsigmoid does not overflow; torch.log(torch.sigmoid(x)) does.",
        check=check_dpo_loss,
        solution=dpo_loss,
        mistakes={
            "without the reference": dpo_with(lambda chosen, rejected, ref_chosen, ref_rejected: chosen - rejected),
            "the reference is added": dpo_with(
                lambda chosen, rejected, ref_chosen, ref_rejected: chosen - rejected + ref_chosen - ref_rejected
            ),
            "chosen and rejected exchanged": dpo_with(lambda *all_four: -dpo_margin(*all_four)),
            "the chosen response alone": dpo_with(
                lambda chosen, rejected, ref_chosen, ref_rejected: chosen - ref_chosen + 0 * rejected
            ),
            "beta outside": dpo_with(dpo_margin, lambda margin, beta: -beta * F.logsigmoid(margin)),
            "divided by beta": dpo_with(dpo_margin, lambda margin, beta: -F.logsigmoid(margin / beta)),
            "the sigmoid without the log": dpo_with(dpo_margin, lambda margin, beta: 1 - torch.sigmoid(beta * margin)),
            "the sign is forgotten": dpo_with(dpo_margin, lambda margin, beta: F.logsigmoid(beta * margin)),
            "the log of a sigmoid": dpo_with(dpo_margin, lambda margin, beta: -torch.sigmoid(beta * margin).log()),
            "ratios of probabilities": dpo_with(
                lambda chosen, rejected, ref_chosen, ref_rejected: (
                    (chosen - ref_chosen).exp() - (rejected - ref_rejected).exp()
                )
            ),
            "the mean over pairs": dpo_with(dpo_margin, lambda margin, beta: -F.logsigmoid(beta * margin).mean()),
            "the reference is trained": dpo_that_trains_the_reference,
        },
    ),
    Exercise(
        name="kl_loss",
        statement=(
            "The distance to the reference as a loss. Given log-probabilities of responses that the policy sampled, "
            "return one number for each: k3 in value, whose gradient, on average over the policy's samples, is that of "
            "KL(policy || reference). No gradient goes into the reference."
        ),
        signature="kl_loss(log_probs, ref_log_probs) -> (responses), as both",
        hint="Derivation 12, last line. exp(x - x.detach()) is 1 and has the gradient of x.",
        check=check_kl_loss,
        solution=kl_loss,
        mistakes={
            "k1": kl_with(k1),
            "k2": kl_with(k2, with_ratio=False),
            "k3 without the ratio: the gradient of KL(reference || policy)": kl_with(k3, with_ratio=False),
            "k3 of log(reference / policy)": kl_with(lambda log_ratio: k3(-log_ratio)),
            "the sign": kl_with(lambda log_ratio: -k3(log_ratio)),
            "the exponent's sign": kl_with(lambda log_ratio: torch.expm1(log_ratio) + log_ratio),
            "the 1 is forgotten": kl_with(lambda log_ratio: torch.exp(-log_ratio) + log_ratio),
            "no gradient through the value": kl_without_a_gradient_of_its_value,
            "the reference is trained": kl_that_trains_the_reference,
        },
    ),
    Exercise(
        name="gae",
        statement=(
            "Generalised advantages. At each counted token of a row stand the reward for it and the value before it; "
            "counted tokens are neighbours, and the last of them ends the text. Anything may stand at other places, "
            "where the result is 0."
        ),
        signature="gae(rewards, values, mask, gamma, gae_lambda) -> (batch, seq), as all three",
        hint="a_t = delta_t + gamma lambda a_{t+1}, from the back; after the end both value and advantage are 0.",
        check=check_gae,
        solution=gae,
        mistakes={
            "a value after the end": gae_with(end_value=True),
            "the padding takes part": gae_over_the_padding,
            "the padding keeps numbers": gae_that_leaves_the_padding,
            "from the front": gae_from_the_front,
            "without lambda": gae_with(fade=lambda gamma, lam: gamma),
            "lambda without the discount": gae_with(fade=lambda gamma, lam: lam),
            "only the next token": gae_with(fade=lambda gamma, lam: 0.0),
            "the value is not discounted": gae_with(discounted=False),
            "returns in place of advantages": gae_with(plus=True),
        },
    ),
    Exercise(
        name="grpo_loss",
        statement=(
            "GRPO's loss without a distance to the reference. rewards (prompts, rollouts); the rows of the others are "
            "the rollouts, those of a prompt side by side. Advantage: reward minus the mean of its prompt, over the "
            "sample standard deviation of its prompt + 0.0001. PPO's clip for every counted token; the mean over the "
            "tokens of each response, then over responses. Gradients go through log_probs alone."
        ),
        signature=(
            "grpo_loss(log_probs, old_log_probs, rewards, mask, clip_eps) -> scalar; "
            "log_probs, old_log_probs, mask (prompts * rollouts, seq)"
        ),
        hint="-minimum(ratio * a, clamp(ratio) * a): the minimum of two gains is a loss's maximum.",
        check=check_grpo_loss,
        solution=grpo_loss,
        mistakes={
            "rewards without a baseline": grpo_with(no_baseline),
            "the mean of the others": grpo_with(leave_one_out),
            "not divided by the deviation": grpo_with(group_centred),
            "0.0001 inside the root": grpo_with(deviation_inside_the_root),
            "the deviation with n in place of n - 1": grpo_with(deviation_of_the_group_as_a_population),
            "divided by zero where all rewards are alike": grpo_with(lambda rewards: group_normalised(rewards, 0.0)),
            "divided by the variance": grpo_with(
                lambda rewards: group_centred(rewards) / (rewards.var(dim=1, keepdim=True) + 1e-4)
            ),
            "divided before it is centred": grpo_with(divided_before_it_is_centred),
            "centred over the whole batch": grpo_with(
                lambda rewards: (rewards - rewards.mean()) / (rewards.std(dim=1, keepdim=True) + 1e-4)
            ),
            "deviation of the whole batch": grpo_with(lambda rewards: group_centred(rewards) / (rewards.std() + 1e-4)),
            "across prompts": grpo_with(lambda rewards: group_normalised(rewards.T).T),
            "the maximum of two gains": grpo_with(
                surrogate=lambda ratio, a, eps: -torch.maximum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a)
            ),
            "clipped on both sides always": grpo_with(
                surrogate=lambda ratio, a, eps: -ratio.clamp(1 - eps, 1 + eps) * a
            ),
            "not clipped": grpo_with(surrogate=lambda ratio, a, eps: -ratio * a),
            "uphill": grpo_with(surrogate=lambda ratio, a, eps: -clipped(ratio, a, eps)),
            "the log of the ratio": grpo_with(ratio_of=lambda log_probs, old: 1 + log_probs - old),
            "the ratio upside down": grpo_with(ratio_of=lambda log_probs, old: (old - log_probs).exp()),
            "the old policy recomputed": grpo_with(
                ratio_of=lambda log_probs, old: (log_probs - log_probs.detach()).exp()
            ),
            "one mean over all tokens": grpo_with(average=per_token),
            "a sum over tokens": grpo_with(average=summed),
            "the padding is counted": grpo_with(average=lambda losses, mask: losses.mean()),
            "through the advantage": grpo_through_the_advantage,
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
