"""Exercises of topic 09: write each function in a file of your own, then

python 09-modern-llm-architectures/exercises_09.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from exercises_08 import compare, numbers
from llm_calculators import PUBLISHED, count_parameters
from llm_config import ExpertConfig, ModelConfig
from llm_layers import KVCache, RopeScaling, attention_mask, rotary_frequencies
from mixture_of_experts import Routing, load_balance_loss
from workbench import Exercise, first_difference, grade

# RMSNorm backwards


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()  # (tokens, 1)
    unit, inner = x * scale, grad * weight  # (tokens, d_model)
    along = (inner * unit).mean(dim=-1, keepdim=True)  # (tokens, 1)
    return scale * (inner - unit * along), (grad * unit).sum(dim=0)


def rms_norm_backward_with(
    project: bool = True, centre: bool = False, gain_first: bool = True, mean: bool = True, eps_kept: bool = True
) -> Callable:
    """A wrong solution: a term left out, LayerNorm's term added, or the gain applied too late."""

    def wrong(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = (x.square().mean(dim=-1, keepdim=True) + (eps if eps_kept else 0)).rsqrt()
        unit, inner = x * scale, grad * weight if gain_first else grad
        along = (inner * unit).mean(dim=-1, keepdim=True) if mean else (inner * unit).sum(dim=-1, keepdim=True)
        grad_x = inner - unit * along if project else inner
        if centre:
            grad_x = grad_x - inner.mean(dim=-1, keepdim=True)
        return scale * (grad_x if gain_first else grad_x * weight), (grad * unit).sum(dim=0)

    return wrong


def check_rms_norm_backward(answer: Callable) -> str | None:
    for n_tokens, d_model, eps in ((1, 2, 1e-6), (3, 5, 1e-6), (4, 6, 0.5)):
        x, grad = numbers(n_tokens, d_model, seed=1) + 0.7, numbers(n_tokens, d_model, seed=2)
        weight = 1 + 0.5 * numbers(d_model, seed=3)
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = inputs[0] * (inputs[0].square().mean(dim=-1, keepdim=True) + eps).rsqrt() * inputs[1]
        wanted = torch.autograd.grad(output, inputs, grad)
        case = f"{n_tokens} tokens of width {d_model}, eps {eps}"
        look = "the gain comes before the projection, and nothing is centred: RMSNorm subtracts no mean"
        if advice := compare(answer, (grad, x, weight, eps), wanted, case, look):
            return advice
    return None


# Llama 3's rotary frequencies


def llama3_frequencies(frequencies: Tensor, factor: float, low: float, high: float, trained_seq_len: int) -> Tensor:
    turns = trained_seq_len * frequencies / (2 * math.pi)  # (half)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # (half)
    return frequencies * (kept + (1 - kept) / factor)


def llama3_with(turns_of: Callable, keep_fast: bool = True, blend: bool = True) -> Callable:
    """A wrong solution: another count of turns, the wrong end kept, or a step in place of the ramp."""

    def wrong(frequencies: Tensor, factor: float, low: float, high: float, trained_seq_len: int) -> Tensor:
        kept = ((turns_of(frequencies, trained_seq_len) - low) / (high - low)).clamp(0, 1)
        kept = kept if blend else kept.round()
        kept = kept if keep_fast else 1 - kept
        return frequencies * (kept + (1 - kept) / factor)

    return wrong


def blended_in_wavelength(frequencies: Tensor, factor: float, low: float, high: float, trained_seq_len: int) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = trained_seq_len / low, trained_seq_len / high
    kept = ((longest - wavelengths) / (longest - shortest)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def check_llama3_frequencies(answer: Callable) -> str | None:
    cases = (
        (16, 1e4, RopeScaling("llama3", 8.0, 64)),
        (32, 5e5, RopeScaling("llama3", 32.0, 8192)),
        (20, 1e4, RopeScaling("llama3", 4.0, 300, low_freq_factor=2.0, high_freq_factor=9.0)),
    )
    for d_head, theta, scaling in cases:
        plain = rotary_frequencies(d_head, theta).double()
        wanted = rotary_frequencies(d_head, theta, scaling).double()
        args = (plain, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.trained_seq_len)
        case = f"{d_head // 2} frequencies of theta {theta:g}, factor {scaling.factor:g}, trained on {args[-1]}"
        look = "count the turns within the trained length: above `high` a pair is kept, below `low` divided by factor"
        if advice := compare(answer, args, wanted, case, look, 1e-6):
            return advice
    return None


# Latent attention, absorbed


def absorbed_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor
) -> Tensor:
    scale = (q_nope.shape[1] + q_rope.shape[1]) ** -0.5
    q = (q_nope[:, None] @ w_k)[:, 0]  # (heads, kv_rank)
    scores = (q @ latents.T + q_rope @ k_rope.T) * scale  # (heads, keys)
    mixed = scores.softmax(dim=-1) @ latents  # (heads, kv_rank)
    return (w_v @ mixed[..., None])[..., 0]  # (heads, d_value)


def absorbed_with(scale_of: Callable, turned: bool = True, moved: bool = True, own_key: bool = False) -> Callable:
    """A wrong solution: another scale, a key matrix on its side, or no part that carries the position."""

    def wrong(q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
        q = (q_nope[:, None] @ (w_k if turned or w_k.shape[1] != w_k.shape[2] else w_k.mT))[:, 0]
        scores = q @ latents.T + (q_rope @ k_rope.T if moved else 0)
        mixed = (scores * scale_of(q_nope, q_rope, latents)).softmax(dim=-1) @ latents
        return (w_v @ mixed[..., None])[..., 0]

    return wrong


def expanded_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor
) -> Tensor:
    k, v = latents @ w_k.mT, latents @ w_v.mT  # (heads, keys, d_nope), (heads, keys, d_value)
    scale = (q_nope.shape[1] + q_rope.shape[1]) ** -0.5
    scores = ((q_nope[:, None] @ k.mT)[:, 0] + q_rope @ k_rope.T) * scale  # (heads, keys)
    return (scores.softmax(dim=-1)[:, None] @ v)[:, 0]  # (heads, d_value)


def check_absorbed_attention(answer: Callable) -> str | None:
    for heads, keys, rank, d_nope, d_rope, d_value in ((2, 3, 4, 4, 2, 3), (3, 7, 5, 6, 2, 4), (4, 150, 8, 16, 4, 12)):
        args = (
            numbers(heads, d_nope, seed=1),
            numbers(heads, d_rope, seed=2),
            numbers(keys, rank, seed=3),
            numbers(keys, d_rope, seed=4),
            numbers(heads, d_nope, rank, seed=5),
            numbers(heads, d_value, rank, seed=6),
        )
        case = f"{heads} heads, {keys} keys, kv_rank {rank}, widths {d_nope} + {d_rope}, values of {d_value}"
        look = "q.(W c) = (W^T q).c; both parts of a query share one scale, that of their joint width"
        if advice := compare(answer, args, expanded_attention(*args), case, look):
            return advice
    with FlopCounterMode(display=False) as counter:
        answer(*args)
    least = 2 * heads * keys * (2 * rank + d_rope)
    if counter.get_total_flops() > 2 * least:
        return (
            f"{case}: the value is right, at {counter.get_total_flops():,} FLOPs; the absorbed form needs about "
            f"{least:,}: make no key and no value of any head"
        )
    return None


# The balance loss


def balance_loss(logits: Tensor, n_active: int) -> Tensor:
    chances = logits.softmax(dim=-1)  # (tokens, experts)
    chosen = F.one_hot(chances.topk(n_active, dim=-1).indices, logits.shape[1]).sum(dim=1)  # (tokens, experts)
    return logits.shape[1] * (chosen.to(logits.dtype).mean(dim=0) * chances.mean(dim=0)).sum()


def balance_with(combine: Callable, dim: int = -1) -> Callable:
    """A wrong solution: `combine` makes another number of the visits and the chances, (tokens, experts) each."""

    def wrong(logits: Tensor, n_active: int) -> Tensor:
        chances = logits.softmax(dim=dim)
        chosen = F.one_hot(chances.topk(n_active, dim=-1).indices, logits.shape[1]).sum(dim=1).to(logits.dtype)
        return combine(chosen, chances)

    return wrong


def renormalised(chosen: Tensor, chances: Tensor) -> Tensor:
    kept = chances * chosen
    return len(kept[0]) * (chosen.mean(0) * (kept / kept.sum(dim=1, keepdim=True)).mean(0)).sum()


def check_balance_loss(answer: Callable) -> str | None:
    for n_tokens, n_experts, n_active in ((6, 4, 1), (9, 5, 2), (7, 3, 3)):
        logits = 2 * numbers(n_tokens, n_experts, seed=n_experts)
        logits.requires_grad_()
        weights, experts = logits.softmax(dim=-1).topk(n_active, dim=-1)
        wanted = load_balance_loss([Routing(logits, weights, experts)])
        case = f"{n_tokens} tokens, {n_experts} experts, {n_active} for each token"
        found = answer(logits, n_active)
        if difference := first_difference(found, wanted, 1e-6):
            return (
                f"{case}: {difference}; experts * sum of (share of tokens that visit) * (mean chance over all tokens)"
            )
        if not (isinstance(found, Tensor) and found.requires_grad):
            return f"{case}: the value is right, but no gradient reaches the router; only the chances can carry one"
        gradients = [torch.autograd.grad(loss, logits, allow_unused=True)[0] for loss in (found, wanted)]
        if gradients[0] is None:
            return f"{case}: the value is right, but no gradient reaches the logits"
        if difference := first_difference(*gradients, 1e-6):
            return f"{case}: the value is right, the gradient is not: {difference}"
    return None


# The mask of a rolling cache


def rolling_mask(n_seen: int, n_new: int, window_size: int, n_sinks: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(n_seen + n_new)  # (all positions)
    kept = (positions < n_sinks) | (positions > n_seen - window_size)
    positions = positions[kept]  # (keys)
    distance = torch.arange(n_seen, n_seen + n_new)[:, None] - positions  # (query, key)
    return positions, (distance >= 0) & ((distance < window_size) | (positions < n_sinks))


def rolling_with(extra: int = 0, causal: bool = True, sinks: str = "seen", clamp: bool = True) -> Callable:
    """A wrong solution: a window of another size, one that sees the future, or sinks that are lost."""

    def wrong(n_seen: int, n_new: int, window_size: int, n_sinks: int) -> tuple[Tensor, Tensor]:
        positions, _ = rolling_mask(n_seen, n_new, window_size, n_sinks)
        columns = torch.arange(len(positions)) if not clamp else positions
        distance = torch.arange(n_seen, n_seen + n_new)[:, None] - columns
        near = distance < window_size + extra
        near = near | (positions < n_sinks) if sinks == "seen" else near
        allowed = (distance >= 0) & near if causal else near
        return positions, allowed | (positions < n_sinks) if sinks == "always" else allowed

    return wrong


def check_rolling_mask(answer: Callable) -> str | None:
    for n_seen, n_new, window_size, n_sinks in ((0, 5, 3, 0), (7, 1, 4, 0), (7, 3, 4, 0), (0, 6, 3, 2), (9, 2, 3, 2)):
        cache = KVCache(window_size, n_sinks)
        every = torch.arange(n_seen + n_new, dtype=torch.float64)[None, None, :, None]
        if n_seen:
            cache.append(every[:, :, :n_seen], every[:, :, :n_seen])
        kept = cache.append(every[:, :, n_seen:], every[:, :, n_seen:])[0].flatten().long()
        mask = attention_mask(n_new, n_seen + n_new, None, window_size, n_sinks)[:, kept]
        case = f"{n_seen} seen, {n_new} new, a window of {window_size}, {n_sinks} sinks"
        found = answer(n_seen, n_new, window_size, n_sinks)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"{case}: expected a pair (positions, mask), got {found!r}"
        if difference := first_difference(found[0], kept):
            return f"{case}: positions: {difference}; keep the sinks, the last window_size - 1, and what is new"
        if difference := first_difference(found[1], mask):
            return f"{case}: mask: {difference}; never the future; the last window_size keys, itself included; sinks"
    return None


# Merging two tiles


def merge_tiles(output_a: Tensor, log_sum_a: Tensor, output_b: Tensor, log_sum_b: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = torch.logaddexp(log_sum_a, log_sum_b)  # (rows)
    shares = [(part - log_sum.masked_fill(log_sum.isneginf(), 0.0)).exp() for part in (log_sum_a, log_sum_b)]
    return shares[0][:, None] * output_a + shares[1][:, None] * output_b, log_sum


def merge_with(weights_of: Callable, log_sum_of: Callable = torch.logaddexp) -> Callable:
    """A wrong solution: other weights of the two tiles, or another sum."""

    def wrong(output_a: Tensor, log_sum_a: Tensor, output_b: Tensor, log_sum_b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = weights_of(log_sum_a, log_sum_b)
        return first[:, None] * output_a + second[:, None] * output_b, log_sum_of(log_sum_a, log_sum_b)

    return wrong


def plain_exponentials(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.exp() / (a.exp() + b.exp()), b.exp() / (a.exp() + b.exp())


def check_merge_tiles(answer: Callable) -> str | None:
    for factor, n_first, name in ((1.0, 4, "scores of about 1"), (1000.0, 2, "scores of about 1,000")):
        scores, values = factor * numbers(3, 7, seed=1), numbers(7, 2, seed=2)
        parts = [(scores[:, columns], values[columns]) for columns in (slice(0, n_first), slice(n_first, 7))]
        args = [item for part, v in parts for item in (part.softmax(dim=-1) @ v, part.logsumexp(dim=-1))]
        wanted = scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)
        case = f"{name}, {n_first} and {7 - n_first} keys"
        look = "weigh each output by its share of the joint sum, exp(log_sum - joint log_sum)"
        if advice := compare(answer, tuple(args), wanted, case, look):
            return advice
    nothing = torch.full((3,), -math.inf, dtype=torch.float64)
    empty = (torch.zeros_like(args[0]), nothing)
    for case, given, wanted in (
        ("a tile whose keys are all masked", (*args[:2], *empty), tuple(args[:2])),
        ("two tiles whose keys are all masked", (*empty, *empty), empty),
    ):
        if advice := compare(answer, given, wanted, case, "its log_sum is -inf and its share is 0, never nan"):
            return advice
    return None


# Counting a mixture


def count_mixtral(sizes: dict[str, int]) -> tuple[int, int]:
    d_model, d_head = sizes["d_model"], sizes["d_head"]
    attention = 2 * d_model * d_head * (sizes["n_heads"] + sizes["n_kv_heads"])
    one = 3 * d_model * sizes["d_ff"]
    layer = attention + sizes["n_experts"] * (one + d_model) + 2 * d_model
    total = sizes["n_layers"] * layer + 2 * sizes["vocab_size"] * d_model + d_model
    return total, total - sizes["n_layers"] * (sizes["n_experts"] - sizes["n_active"]) * one


def count_with(**changed: int) -> Callable:
    """A wrong solution: what is named is counted in another way."""

    def wrong(sizes: dict[str, int]) -> tuple[int, int]:
        d_model, d_head = sizes["d_model"], sizes["d_head"]
        kv_heads = sizes["n_heads"] if "full_keys" in changed else sizes["n_kv_heads"]
        one = changed.get("matrices", 3) * d_model * sizes["d_ff"]
        layer = 2 * d_model * d_head * (sizes["n_heads"] + kv_heads) + 2 * d_model
        layer += sizes["n_experts"] * (one + changed.get("router", 1) * d_model)
        total = sizes["n_layers"] * layer + changed.get("embeddings", 2) * sizes["vocab_size"] * d_model
        total += changed.get("last_norm", 1) * d_model
        idle = sizes["n_layers"] * (sizes["n_experts"] - sizes["n_active"]) * one
        return total, total * sizes["n_active"] // sizes["n_experts"] if "share" in changed else total - idle

    return wrong


def check_count_mixtral(answer: Callable) -> str | None:
    names = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head")
    small = ModelConfig(11, 6, 3, 4, 2, 8, tie_embeddings=False, experts=ExpertConfig(5, 2, 7))
    for name, config in {"a small model": small, "Mixtral 8x7B": PUBLISHED["Mixtral-8x7B"]}.items():
        experts, counted = config.experts, count_parameters(config)
        sizes = {size: getattr(config, size) for size in names} | {"d_ff": experts.d_expert}
        sizes |= {"n_experts": experts.n_experts, "n_active": experts.n_active_experts}
        found = answer(dict(sizes))
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"{name}: expected a pair (total, active), got {found!r}"
        for what, got, want in zip(("total", "active"), found, (counted.total, counted.active), strict=True):
            if got != want:
                return f"{name}, {sizes}: {what} is {got:,}, expected {want:,}"
    return None


EXERCISES = [
    Exercise(
        name="rms_norm_backward",
        statement="The gradients of RMSNorm, x / sqrt(mean(x^2) + eps) * weight, for x and for weight, from the "
        "gradient of its output. x and grad are (tokens, d_model). Formulas only, no autograd.",
        signature="rms_norm_backward(grad, x, weight, eps) -> (grad_x, grad_weight)",
        hint="With u = x / rms and g = grad * weight: the part of g along u is taken out, the rest divided by the rms.",
        check=check_rms_norm_backward,
        solution=rms_norm_backward,
        mistakes={
            "the rms is a constant": rms_norm_backward_with(project=False),
            "centred, as LayerNorm's is": rms_norm_backward_with(centre=True),
            "the gain after the projection": rms_norm_backward_with(gain_first=False),
            "a sum in place of the mean": rms_norm_backward_with(mean=False),
            "no eps": rms_norm_backward_with(eps_kept=False),
        },
    ),
    Exercise(
        name="llama3_frequencies",
        statement="Llama 3's scaled rotary frequencies. A pair that turns more than `high` times within the trained "
        "length keeps its frequency, one that turns less than `low` times has it divided by factor; between, the two "
        "are blended on a straight line in the number of turns.",
        signature="llama3_frequencies(frequencies, factor, low, high, trained_seq_len) -> (half)",
        hint="A pair of frequency f turns trained_seq_len * f / 2 pi times; a clamped ramp does the rest.",
        check=check_llama3_frequencies,
        solution=llama3_frequencies,
        mistakes={
            "all divided by the factor": lambda frequencies, factor, low, high, trained_seq_len: frequencies / factor,
            "radians counted as turns": llama3_with(lambda f, length: length * f),
            "the fast ones slowed": llama3_with(lambda f, length: length * f / (2 * math.pi), keep_fast=False),
            "a step in place of the ramp": llama3_with(lambda f, length: length * f / (2 * math.pi), blend=False),
            "blended in the wavelength": blended_in_wavelength,
        },
    ),
    Exercise(
        name="absorbed_attention",
        statement="Latent attention for one new position over a cache, in the absorbed form: no key and no value of "
        "any head is made. q_nope (heads, d_nope), q_rope (heads, d_rope), latents (keys, kv_rank), k_rope "
        "(keys, d_rope), w_k (heads, d_nope, kv_rank), w_v (heads, d_value, kv_rank).",
        signature="absorbed_attention(q_nope, q_rope, latents, k_rope, w_k, w_v) -> (heads, d_value)",
        hint="Move w_k to the query; attend to the latents; apply w_v to the mixed latent.",
        check=check_absorbed_attention,
        solution=absorbed_attention,
        mistakes={
            "the scale of the latent's width": absorbed_with(lambda q, r, c: (c.shape[1] + r.shape[1]) ** -0.5),
            "the scale without the rotated part": absorbed_with(lambda q, r, c: q.shape[1] ** -0.5),
            "w_k on its side where it is square": absorbed_with(
                lambda q, r, c: (q.shape[1] + r.shape[1]) ** -0.5, turned=False
            ),
            "no position": absorbed_with(lambda q, r, c: (q.shape[1] + r.shape[1]) ** -0.5, moved=False),
            "makes every head's keys": expanded_attention,
        },
    ),
    Exercise(
        name="balance_loss",
        statement="The load-balancing loss of a softmax router from its logits (tokens, experts): experts times the "
        "sum over experts of the share of tokens that visit it times its mean probability. With gradient.",
        signature="balance_loss(logits, n_active) -> a scalar tensor",
        hint="topk says who is visited, one_hot counts it; the probabilities are those of all experts.",
        check=check_balance_loss,
        solution=balance_loss,
        mistakes={
            "visits squared, without a gradient": balance_with(
                lambda chosen, chances: chosen.shape[1] * chosen.mean(0).square().sum() + 0 * chances.sum()
            ),
            "chances of the chosen experts only": balance_with(renormalised),
            "chances squared": balance_with(
                lambda chosen, chances: chosen.shape[1] * chances.mean(0).square().sum() * chosen.sum(1).mean()
            ),
            "not times the experts": balance_with(lambda chosen, chances: (chosen.mean(0) * chances.mean(0)).sum()),
            "token by token": balance_with(
                lambda chosen, chances: chosen.shape[1] * (chosen * chances).sum(dim=1).mean()
            ),
            "softmax over the tokens": balance_with(
                lambda chosen, chances: chosen.shape[1] * (chosen.mean(0) * chances.mean(0)).sum(), dim=0
            ),
        },
    ),
    Exercise(
        name="rolling_mask",
        statement="A rolling cache has seen n_seen positions, then n_new arrive. Which positions does it return as "
        "keys, and which of them may each new query attend to (True = may)? It keeps the first n_sinks and the last "
        "window_size - 1 of what it had; a query sees the last window_size keys, itself included, and the sinks.",
        signature="rolling_mask(n_seen, n_new, window_size, n_sinks) -> (positions (keys), mask (n_new, keys))",
        hint="Work with the positions of the keys, not with their places in the cache.",
        check=check_rolling_mask,
        solution=rolling_mask,
        mistakes={
            "a window of one more": rolling_with(extra=1),
            "a window that sees the future": rolling_with(causal=False),
            "sinks fall out of the window": rolling_with(sinks="lost"),
            "sinks seen before they are written": rolling_with(sinks="always"),
            "places in the cache taken for positions": rolling_with(clamp=False),
            "keeps window_size old positions": lambda n_seen, n_new, window_size, n_sinks: rolling_mask(
                n_seen, n_new, window_size + 1, n_sinks
            ),
        },
    ),
    Exercise(
        name="merge_tiles",
        statement="Attention over two sets of keys, from attention over each: outputs (rows, d_head), each divided by "
        "its own sum already, and the logarithms of these sums (rows), -inf where every key was masked.",
        signature="merge_tiles(output_a, log_sum_a, output_b, log_sum_b) -> (output, log_sum)",
        hint="logaddexp adds the two sums; each output counts by its share. Mind -inf minus -inf.",
        check=check_merge_tiles,
        solution=merge_tiles,
        mistakes={
            "the mean of the outputs": merge_with(lambda a, b: (0.5 + 0 * a, 0.5 + 0 * b)),
            "the outputs added": merge_with(lambda a, b: (1 + 0 * a, 1 + 0 * b)),
            "overflows": merge_with(plain_exponentials),
            "nan where all is masked": merge_with(
                lambda a, b: ((a - torch.logaddexp(a, b)).exp(), (b - torch.logaddexp(a, b)).exp())
            ),
            "the larger sum for both": merge_with(lambda a, b: ((a - b).sigmoid(), (b - a).sigmoid()), torch.maximum),
        },
    ),
    Exercise(
        name="count_mixtral",
        statement="All parameters, and those that one token meets, of a Mixtral: sizes has vocab_size, d_model, "
        "n_layers, n_heads, n_kv_heads, d_head, d_ff (of one expert), n_experts, n_active. No biases, an output "
        "matrix of its own, two norms a layer and one at the end.",
        signature="count_mixtral(sizes) -> (total, active)",
        hint="Of a layer only the feed-forward network is there several times; the router has d_model an expert.",
        check=check_count_mixtral,
        solution=count_mixtral,
        mistakes={
            "all of the model shared out among the experts": count_with(share=1),
            "two matrices an expert": count_with(matrices=2),
            "keys and values of all heads": count_with(full_keys=1),
            "no router": count_with(router=0),
            "tied embeddings": count_with(embeddings=1),
            "no last norm": count_with(last_norm=0),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
