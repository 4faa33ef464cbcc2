"""Topic 13 - Choosing tokens for a batch of requests, each with settings and a random generator of its own.

    chosen = choose(logits, rows)           # logits (rows, vocab), one RowState each -> ChosenTokens(ids, logprobs)
    probs = filtered_probs(logits, rows)    # the distributions that `choose` draws from; speculation needs them whole

The order: penalties, logit bias, constraint, temperature, top-k, top-p, min-p. What a row gets depends on its own
logits, settings and generator and on nothing else in the batch, bit for bit.

Papers: Keskar et al. 2019 (arXiv 1909.05858), repetition penalty; Fan et al. 2018 (arXiv 1805.04833), top-k; Holtzman
et al. 2020 (arXiv 1904.09751), top-p; Nguyen et al. 2024 (arXiv 2407.01082), min-p. Presence and frequency penalties:
https://platform.openai.com/docs/api-reference/completions.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine_requests import RequestParams, RowState, TokenLogprob

SPAN = 64  # tokens whose probabilities are added up before the one to draw is looked for among them


class ChosenTokens(NamedTuple):
    ids: list[int]  # one for each row
    logprobs: list[TokenLogprob | None]  # of the model's own distribution; None where params.logprobs is -1


class BadLogits(ValueError):
    """Some rows have no distribution to choose from. Nothing was drawn; the other rows can be chosen without them."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons, self.rows = reasons, tuple(reasons)
        super().__init__("; ".join(f"row {row} of the batch: {reason}" for row, reason in reasons.items()))


# What is added to the logits


def is_plain(params: RequestParams) -> bool:
    """Whether the logits are taken as the model gives them: no penalty, no bias, no constraint."""
    return (
        params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.logit_bias
        and params.constraint is None
    )


def counted(ids: Sequence[list[int]], like: Tensor) -> Tensor:
    """How often each token of the vocabulary stands in each row of ids: (rows, vocab), in the kind of `like`."""
    flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long, device=like.device)
    lengths = torch.tensor([len(row) for row in ids], device=like.device)
    owner = torch.arange(len(ids), device=like.device).repeat_interleave(lengths)
    ones = torch.ones(len(flat), dtype=like.dtype, device=like.device)
    counts = torch.zeros_like(like).index_put_((owner, flat), ones, accumulate=True)  # (rows, vocab)
    return counts


def penalised(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Logits (rows, vocab) less the three penalties.

    The repetition penalty (Keskar et al. 2019) divides a positive and multiplies a negative logit of every token in the
    prompt or the answer, as transformers' does; presence and frequency penalties look at the answer alone.
    """
    column = logits.new_tensor(
        [
            (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
            for row in rows
        ]
    ).T[:, :, None]  # fmt: skip
    repetition, presence, frequency = column  # (rows, 1)
    if any(row.params.repetition_penalty != 1 for row in rows):
        seen = counted([row.prompt_ids + row.new_ids for row in rows], logits) > 0  # (rows, vocab)
        scaled = torch.where(logits < 0, logits * repetition, logits / repetition)  # (rows, vocab)
        logits = torch.where(seen, scaled, logits)  # (rows, vocab)
    if any(row.params.presence_penalty or row.params.frequency_penalty for row in rows):
        counts = counted([row.new_ids for row in rows], logits)  # (rows, vocab)
        logits = logits - presence * (counts > 0) - frequency * counts  # (rows, vocab)
    return logits


def allowed_tokens(row: RowState, vocab_size: int, end_ids: Sequence[int]) -> Tensor:
    """What a constrained request may take next, its ends included where it may end: (vocab,), bool."""
    constraint, state = row.params.constraint, row.constraint_state
    allowed = constraint.allowed(state)
    if len(allowed) != vocab_size:
        raise ValueError(f"the constraint knows {len(allowed)} tokens but the model has {vocab_size}: not a pair")
    if constraint.may_end(state):
        allowed = allowed.clone()
        allowed[list(end_ids)] = True
    return allowed


def adjusted_logits(logits: Tensor, rows: Sequence[RowState], end_ids: Sequence[int] = ()) -> Tensor:
    """Logits (rows, vocab) after penalties, then bias, then constraint, which has the last word; the input stays."""
    changed = [index for index, row in enumerate(rows) if not is_plain(row.params)]
    if not changed:
        return logits
    own = [rows[index] for index in changed]
    part = penalised(logits[changed], own)  # (*, vocab)
    for index, row in enumerate(own):
        if row.params.logit_bias:
            ids, biases = zip(*row.params.logit_bias, strict=True)
            if max(ids) >= part.shape[1]:
                raise ValueError(f"logit_bias names token {max(ids)}, but the vocabulary ends at {part.shape[1] - 1}")
            part[index].index_add_(0, torch.tensor(ids, device=part.device), part.new_tensor(biases))
    bound = [index for index, row in enumerate(own) if row.params.constraint is not None]
    if bound:
        masks = torch.stack([allowed_tokens(own[index], part.shape[1], end_ids) for index in bound]).to(part.device)
        part[bound] = part[bound].masked_fill(~masks, -math.inf)
    logits = logits.clone()
    logits[changed] = part
    return logits


# What of the distribution is kept


def descending(probs: Tensor) -> Tensor:
    """The values of each row, the largest first."""
    if probs.device.type == "cpu":  # NumPy sorts them ten times as fast as torch does
        return torch.from_numpy(np.sort(probs.numpy(), axis=1)).flip(1)
    return probs.sort(dim=1, descending=True).values


def keep_likely_rows(probs: Tensor, rows: Sequence[RequestParams]) -> Tensor:
    """Probabilities (rows, vocab) with 0 for what top-k, then top-p, then min-p of each row remove; not divided anew.

    As topic 08's `keep_likely`, but with settings for each row, and with ties kept everywhere: a token as likely as the
    last one that stays also stays, so that the choice depends on no order of sorting.
    """
    vocab_size = probs.shape[1]
    rank = [min(params.top_k or vocab_size, vocab_size) - 1 for params in rows]
    top_p, min_p = probs.new_tensor([(params.top_p, params.min_p) for params in rows]).T[:, :, None]  # (rows, 1)
    ordered = descending(probs)  # (rows, vocab)
    least = ordered.gather(1, torch.tensor(rank, device=probs.device)[:, None])  # (rows, 1): of the top k
    if any(params.top_p < 1 for params in rows):
        ordered = ordered * (ordered >= least)  # (rows, vocab)
        sums = ordered.cumsum(dim=1)  # (rows, vocab)
        inside = sums - ordered < top_p * sums[:, -1:]  # (rows, vocab): what is likelier does not suffice yet
        n_inside = inside.sum(dim=1, keepdim=True).clamp(
            min=1
        )  # (rows, 1); a top-p that rounds to 0 keeps the likeliest
        last = ordered.gather(1, n_inside - 1)  # (rows, 1): of the nucleus
        least = torch.where(top_p < 1, torch.maximum(least, last), least)  # (rows, 1)
    least = torch.maximum(least, min_p * ordered[:, :1])  # (rows, 1)
    return probs * (probs >= least)  # (rows, vocab)


def has_filter(params: RequestParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def kept_probs(logits: Tensor, rows: Sequence[RequestParams]) -> Tensor:
    """Adjusted logits (rows, vocab) of rows that sample -> probabilities after temperature and filters, not normed."""
    if any(params.temperature != 1 for params in rows):
        least = torch.finfo(logits.dtype).tiny  # a colder row is as good as greedy, and 0 / 0 must not arise
        temperature = logits.new_tensor([max(params.temperature, least) for params in rows])[:, None]  # (rows, 1)
        logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature  # (rows, vocab); no overflow near 0
    probs = logits.softmax(dim=1)  # (rows, vocab)
    filtered = [index for index, params in enumerate(rows) if has_filter(params)]
    if len(filtered) == len(rows):
        return keep_likely_rows(probs, rows)
    if filtered:
        probs[filtered] = keep_likely_rows(probs[filtered], [rows[index] for index in filtered])
    return probs


# Choosing


def likeliest(logits: Tensor) -> Tensor:
    """The id of the largest logit of each row, the smallest id among equals; where there is NaN, its place: (rows)."""
    if logits.device.type == "cpu":  # NumPy finds it ten times as fast as torch does
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def check_rows(logits: Tensor, best: Tensor, rows: Sequence[RowState]) -> None:
    """Raise BadLogits for rows without a finite largest logit; `best` holds the ids of the largest."""
    largest = logits.gather(1, best[:, None])[:, 0]  # (rows)
    if torch.isfinite(largest).all():
        return
    reasons = {}
    for index, value in enumerate(largest.tolist()):
        if math.isnan(value):
            reasons[index] = "the model's logits hold NaN"
        elif value == math.inf:
            reasons[index] = "the model's logits hold +inf"
        elif value == -math.inf:
            bound = " that the constraint allows" if rows[index].params.constraint is not None else ""
            reasons[index] = f"no token{bound} has a logit above -inf"
    raise BadLogits(reasons)


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least: half precision would make a hundred tokens equally likely."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def prepared(logits: Tensor, rows: Sequence[RowState], end_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Raw logits in float32 or wider, the adjusted ones, and the likeliest id of each row; all rows checked."""
    if logits.dim() != 2 or len(logits) != len(rows):
        raise ValueError(f"{len(rows)} rows need logits of shape ({len(rows)}, vocab), got {tuple(logits.shape)}")
    logits = widened(logits.detach())
    best = likeliest(logits)  # (rows)
    check_rows(logits, best, rows)
    adjusted = adjusted_logits(logits, rows, end_ids)  # (rows, vocab)
    if adjusted is not logits:
        best = likeliest(adjusted)  # (rows)
        check_rows(adjusted, best, rows)
    return logits, adjusted, best


def uniforms(generator: torch.Generator, n_draws: int) -> Tensor:
    """Numbers in [0, 1) of a request's own generator, on its device: (n_draws), float64."""
    return torch.rand(n_draws, generator=generator, device=generator.device, dtype=torch.float64)


def at_quantile(probs: Tensor, quantiles: Tensor) -> Tensor:
    """Draw by inversion: the first id at which the running sum exceeds the quantile's share of the whole.

    Shapes: probs (rows, vocab), >= 0 and not all 0, of any sum; quantiles (rows, 1) in [0, 1), float64 -> ids (rows).
    One number decides, so that a request draws as often as it has tokens. An id of probability 0 is never drawn.
    Sums are in float64, first of spans of ids, then within the span that was hit: a running sum over the whole
    vocabulary would cost more than the softmax.
    """
    missing = -probs.shape[1] % SPAN
    spans = (F.pad(probs, (0, missing)) if missing else probs).unflatten(1, (-1, SPAN))  # (rows, spans, span)
    sums = spans.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # (rows, spans)
    goal = quantiles * sums[:, -1:]  # (rows, 1)
    span = first_above(sums, goal)  # (rows, 1)
    goal = goal - F.pad(sums, (1, 0)).gather(1, span)  # (rows, 1): what is left of it within the span
    hit = spans[torch.arange(len(spans), device=spans.device), span[:, 0]]  # (rows, span)
    return (span * SPAN + first_above(hit.cumsum(dim=1, dtype=torch.float64), goal))[:, 0]


def first_above(sums: Tensor, goal: Tensor) -> Tensor:
    """The first place at which running sums (rows, n) exceed goal (rows, 1), or, after rounding, the last that adds."""
    total = sums[:, -1:].contiguous()  # (rows, 1)
    return torch.minimum(torch.searchsorted(sums, goal, right=True), torch.searchsorted(sums, total))  # (rows, 1)


def filtered_probs(logits: Tensor, rows: Sequence[RowState], end_ids: Sequence[int] = ()) -> Tensor:
    """The distributions that `choose` draws from: (rows, vocab), float64, of sum 1; a greedy row has a single 1.

    Raises BadLogits (a ValueError) for rows with NaN or nothing to choose from.
    """
    _, adjusted, best = prepared(logits, rows, end_ids)
    probs = torch.zeros_like(adjusted, dtype=torch.float64).scatter_(1, best[:, None], 1.0)  # (rows, vocab)
    sampled = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if sampled:
        kept = kept_probs(adjusted[sampled], [rows[index].params for index in sampled]).double()  # (*, vocab)
        probs[sampled] = kept / kept.sum(dim=1, keepdim=True)
    return probs


@torch.no_grad()
def choose(logits: Tensor, rows: Sequence[RowState], end_ids: Sequence[int] = ()) -> ChosenTokens:
    """One token for each row of logits (rows, vocab), by the settings and with the generator of its request.

    end_ids are allowed where a constraint lets the text end. Rows are not changed, save that the generator of a row
    that samples gives one number. Raises BadLogits (a ValueError that names the rows) before anything is drawn, and
    ValueError for a constraint or a bias of another vocabulary.
    """
    logits, adjusted, best = prepared(logits, rows, end_ids)
    sampled = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    ids = best
    if sampled:
        everyone = len(sampled) == len(rows)
        part = adjusted if everyone else adjusted[sampled]  # (*, vocab)
        probs = kept_probs(part, [rows[index].params for index in sampled])  # (*, vocab)
        quantiles = [uniforms(rows[index].generator, 1).item() for index in sampled]
        drawn = at_quantile(probs, torch.tensor(quantiles, dtype=torch.float64, device=probs.device)[:, None])
        if everyone:
            ids = drawn
        else:
            ids = ids.clone()
            ids[sampled] = drawn
    chosen = ids.tolist()
    return ChosenTokens(chosen, token_logprobs(logits, chosen, rows))


def token_logprobs(logits: Tensor, ids: Sequence[int], rows: Sequence[RowState]) -> list[TokenLogprob | None]:
    """Log probabilities of the chosen ids under the model's own distribution, softmax(logits), where a row wants them.

    Tokens that are impossible are left out of the likeliest.
    """
    found: list[TokenLogprob | None] = [None] * len(rows)
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs >= 0]
    if not wanted:
        return found
    logprobs = widened(logits[wanted]).log_softmax(dim=1)  # (*, vocab)
    n_top = min(max(rows[index].params.logprobs for index in wanted), logits.shape[1])
    values, top = logprobs.topk(n_top, dim=1)  # (*, *)
    for place, index in enumerate(wanted):
        n_own = rows[index].params.logprobs
        pairs = zip(top[place, :n_own].tolist(), values[place, :n_own].tolist(), strict=True)
        likely = tuple((token_id, value) for token_id, value in pairs if value > -math.inf)
        found[index] = TokenLogprob(ids[index], float(logprobs[place, ids[index]]), likely)
    return found
