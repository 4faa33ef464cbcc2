"""Topic 13 - Speculative decoding: guess several tokens cheaply, check them in one pass, and lose nothing.

    drafts = proposer.propose(rows, n_draft=4)                  # NgramLookup() or DraftModel(small)
    verdicts = verify(logits, rows, drafts)                     # logits (rows, 1 + drafted, vocab) of the target
    result = speculate(model, proposer, prompt, RequestParams(max_tokens=50), n_draft=4)    # the loop, for one request

A guess is kept with probability min(1, p/q) and replaced from the remainder of p otherwise: the tokens have exactly the
distribution that the target would have drawn from, whatever the guesser is. `verify` is also what the engine runs.

Papers: Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318); Yang et al. 2023 (arXiv
2304.04487), copying from a reference, here the text so far.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine_requests import RequestParams, RowState, TokenLogprob, new_row
from llm_layers import KVCache
from modern_llm_architectures import CausalLM
from request_sampling import (
    BadLogits,
    at_quantile,
    check_rows,
    filtered_probs,
    is_plain,
    likeliest,
    token_logprobs,
    uniforms,
)
from workbench import check_range


class Draft(NamedTuple):
    """Tokens guessed for one row; none at all is a draft too."""

    ids: list[int]
    probs: Tensor | None = (
        None  # (drafted, vocab), float64: what each id was drawn from; None: there was no other choice
    )


class Verdict(NamedTuple):
    """What one pass of the target makes of a draft: what was accepted, and one more token."""

    ids: list[int]  # no further token follows an accepted end
    n_accepted: int  # how many of them were drafted
    logprobs: list[TokenLogprob | None]  # one for each id; None where the request asks for none


class Proposer(Protocol):
    """Guesses tokens for rows, at most n_draft for each."""

    def propose(self, rows: Sequence[RowState], n_draft: int, end_ids: Sequence[int] = ()) -> list[Draft]: ...


# The rule


def acceptance_chances(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q): how likely a token is kept if it was guessed (Leviathan et al. 2023, section 2.3); same shapes."""
    return torch.where(p < q, p / q, 1.0) * (p > 0)  # what the target never says is never kept


def remainder(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected token is replaced from, not divided by its sum: max(p - q, 0), (rows, vocab).

    Where p and q are equal up to rounding nothing remains; a rejection then has no chance, and p stands in.
    """
    rest = (p - q).clamp(min=0)  # (rows, vocab)
    return torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p)  # (rows, vocab)


def ends_text(token_id: int, params: RequestParams, end_ids: Sequence[int]) -> bool:
    """Whether a request is over with this token; under a constraint nothing follows an end, whatever is ignored."""
    return token_id in end_ids and not (params.ignore_eos and params.constraint is None)


def rows_ahead(row: RowState, ids: Sequence[int], end_ids: Sequence[int] = ()) -> list[RowState]:
    """The row before each drafted token and after the last, as penalties and constraint will see it.

    The list ends early where the text would: at a token that the constraint refuses, or that ends the text.
    """
    if is_plain(row.params):
        stop = next((place for place, token_id in enumerate(ids) if ends_text(token_id, row.params, end_ids)), len(ids))
        return [row] * (stop + 1)
    ahead, constraint = [row], row.params.constraint
    for token_id in ids:
        last = ahead[-1]
        if ends_text(token_id, row.params, end_ids):
            break
        state = last.constraint_state
        if constraint is not None:
            if not constraint.allowed(state)[token_id]:
                break
            state = constraint.advance(state, token_id)
        ahead.append(replace(last, new_ids=[*last.new_ids, token_id], constraint_state=state))
    return ahead


@torch.no_grad()
def verify(
    logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft], end_ids: Sequence[int] = ()
) -> list[Verdict]:
    """Keep or replace drafted tokens so that each row's tokens follow its own filtered distributions exactly.

    Shapes: logits (rows, at least 1 + longest draft, vocab) of the target at the last known token and at each drafted
    one; positions after a shorter draft are not read. A row that samples takes 1 + len(draft) numbers of its own
    generator, a greedy one none. Rows are not changed: whoever appends the ids advances the constraints.
    Raises ValueError for shapes that do not fit, and BadLogits, before anything is drawn, for rows with NaN.
    """
    check_drafts(logits, rows, drafts)
    ahead = [rows_ahead(row, draft.ids, end_ids) for row, draft in zip(rows, drafts, strict=True)]
    owner = [index for index, states in enumerate(ahead) for _ in states]
    place = [position for states in ahead for position in range(len(states))]
    read = logits[owner, place]  # (*, vocab): the positions that a token may be taken from, row after row
    try:
        if all(row.params.temperature == 0 and is_plain(row.params) for row in rows):
            best = likeliest(read)
            check_rows(read, best, [rows[index] for index in owner])
            found = greedy_tokens(best.tolist(), ahead, drafts)
        else:
            probs = filtered_probs(read, [state for states in ahead for state in states], end_ids)  # (*, vocab)
            found = sampled_tokens(probs, ahead, drafts, end_ids)
    except BadLogits as bad:
        raise BadLogits({owner[index]: reason for index, reason in bad.reasons.items()}) from None
    return verdicts(logits, rows, drafts, found, end_ids)


def check_drafts(logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft]) -> None:
    if not rows or len(rows) != len(drafts):
        raise ValueError(f"{len(rows)} rows with {len(drafts)} drafts; each row needs one, an empty one at least")
    n_positions = 1 + max(len(draft.ids) for draft in drafts)
    if logits.dim() != 3 or len(logits) != len(rows) or logits.shape[1] < n_positions:
        wanted = f"({len(rows)}, at least {n_positions}, vocab)"
        raise ValueError(f"these drafts need logits of shape {wanted}, got {tuple(logits.shape)}")
    for index, draft in enumerate(drafts):
        shape = (len(draft.ids), logits.shape[2])
        if draft.probs is not None and tuple(draft.probs.shape) != shape:
            raise ValueError(f"the draft of row {index} needs probs of shape {shape}, got {tuple(draft.probs.shape)}")
        if draft.ids and not 0 <= min(draft.ids) <= max(draft.ids) < logits.shape[2]:
            raise ValueError(f"the draft of row {index} holds ids outside 0..{logits.shape[2] - 1}: {draft.ids}")


def greedy_tokens(best: list[int], ahead: Sequence[list[RowState]], drafts: Sequence[Draft]) -> list[tuple[int, int]]:
    """How many guesses are kept, and the token after them, where the likeliest token is the only right one."""
    found, first = [], 0
    for states, draft in zip(ahead, drafts, strict=True):
        own = best[first : first + len(states)]
        n_kept = next((n for n, pair in enumerate(zip(own, draft.ids, strict=False)) if pair[0] != pair[1]), None)
        n_kept = min(len(own), len(draft.ids)) if n_kept is None else n_kept
        found.append((n_kept, own[min(n_kept, len(own) - 1)]))
        first += len(states)
    return found


def sampled_tokens(
    probs: Tensor, ahead: Sequence[list[RowState]], drafts: Sequence[Draft], end_ids: Sequence[int]
) -> list[tuple[int, int]]:
    """How many guesses are kept, and the token after them, by rejection; probs (*, vocab) holds all rows' positions."""
    first, taken, kinds = [], [], []  # for each row: its first position; for each guess: position and id
    for states, draft in zip(ahead, drafts, strict=True):
        first.append(first[-1] + len(ahead[len(first) - 1]) if first else 0)
        for position, token_id in enumerate(draft.ids[: len(states)]):
            taken.append(first[-1] + position)
            kinds.append(token_id)
    q = probs.new_tensor(
        [q for states, draft in zip(ahead, drafts, strict=True) for q in drawn_with(draft, len(states))]
    )
    chances = acceptance_chances(probs[taken, kinds], q).tolist()  # guess after guess
    kept, quantiles, place = [], [], 0
    for states, draft in zip(ahead, drafts, strict=True):
        n_guesses, generator = min(len(draft.ids), len(states)), states[0].generator
        greedy = states[0].params.temperature == 0
        numbers = [0.0] * (1 + len(draft.ids)) if greedy else uniforms(generator, 1 + len(draft.ids)).tolist()
        own = chances[place : place + n_guesses]
        kept.append(next((n for n, chance in enumerate(own) if numbers[n] >= chance), n_guesses))
        quantiles.append(numbers[-1])
        place += n_guesses
    last = [start + min(n, len(states) - 1) for start, n, states in zip(first, kept, ahead, strict=True)]
    p_last, q_last = probs[last], torch.zeros_like(probs[last])  # (rows, vocab)
    for index, (n, draft) in enumerate(zip(kept, drafts, strict=True)):
        if n < len(draft.ids):  # rejected, or cut by an end, which nothing follows; else the whole of p remains
            if draft.probs is None:
                q_last[index, draft.ids[n]] = 1.0
            else:
                q_last[index] = draft.probs[n]
    numbers = torch.tensor(quantiles, dtype=torch.float64, device=probs.device)[:, None]  # (rows, 1)
    return list(zip(kept, at_quantile(remainder(p_last, q_last), numbers).tolist(), strict=True))


def drawn_with(draft: Draft, n_read: int) -> list[float]:
    """With what probability each of the first n_read guesses was made."""
    ids = draft.ids[:n_read]
    return [1.0] * len(ids) if draft.probs is None else draft.probs[list(range(len(ids))), ids].tolist()


def verdicts(
    logits: Tensor,
    rows: Sequence[RowState],
    drafts: Sequence[Draft],
    found: Sequence[tuple[int, int]],
    end_ids: Sequence[int],
) -> list[Verdict]:
    """The ids of each row: the guesses that were kept and, unless the last of them ends the text, one more."""
    made = []
    for row, draft, (n_kept, token_id) in zip(rows, drafts, found, strict=True):
        kept = list(draft.ids[:n_kept])
        over = n_kept > 0 and ends_text(kept[-1], row.params, end_ids)
        made.append(kept if over else [*kept, token_id])
    wanted = [
        (index, position, token_id)
        for index, ids in enumerate(made)
        for position, token_id in enumerate(ids)
        if rows[index].params.logprobs >= 0
    ]
    logprobs: list[list[TokenLogprob | None]] = [[None] * len(ids) for ids in made]
    if wanted:
        owner, place, ids = (list(column) for column in zip(*wanted, strict=True))
        told = token_logprobs(logits[owner, place], ids, [rows[index] for index in owner])
        for index, position, logprob in zip(owner, place, told, strict=True):
            logprobs[index][position] = logprob
    return [Verdict(ids, n, own) for ids, (n, _), own in zip(made, found, logprobs, strict=True)]


# Proposers


class NgramLookup:
    """Guess that the text goes on as it did where its last few tokens stood before (Yang et al. 2023; Saxena 2023).

    Args:
        longest, shortest: how many tokens must match; the longest match wins, and of equals the latest

    It costs no model, and is right where an answer copies from its prompt. A copy may run into the tokens that it has
    itself guessed, so that a repetition is continued for as long as it is asked to.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        self.longest, self.shortest = longest, shortest
        check_range(self, "shortest", least=1)
        check_range(self, "longest", least=shortest)

    def propose(self, rows: Sequence[RowState], n_draft: int, end_ids: Sequence[int] = ()) -> list[Draft]:
        return [Draft(self.copied([*row.prompt_ids, *row.new_ids], n_draft)) for row in rows]

    def copied(self, ids: list[int], n_draft: int) -> list[int]:
        packed = array("I", ids)
        size, data = packed.itemsize, packed.tobytes()
        for length in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            found = data.rfind(data[-length * size :], 0, len(data) - 1)
            while found >= 0 and found % size:  # between two ids
                found = data.rfind(data[-length * size :], 0, found + length * size - 1)
            if found >= 0:
                text, start = list(ids), found // size + length
                for place in range(start, start + n_draft):
                    text.append(text[place])
                return text[len(ids) :]
        return []


def draft_tokens(
    next_logits: Callable[[list[int] | None], Tensor],
    rows: Sequence[RowState],
    n_draft: int,
    end_ids: Sequence[int] = (),
) -> list[Draft]:
    """Guess by a model: each row's next tokens by its own settings, drawn with its own generator.

    next_logits(None) gives the draft's logits (rows, vocab) after the rows as they are, next_logits(ids) those after
    one more id for each row. A row that has drafted an end gets ids too, but they are not part of its draft.
    """
    ahead, guesses, probs = list(rows), [[] for _ in rows], []
    newest, over = None, [False] * len(rows)
    for _ in range(n_draft):
        q = filtered_probs(next_logits(newest), ahead, end_ids)  # (rows, vocab)
        numbers = [
            0.0 if done or row.params.temperature == 0 else uniforms(row.generator, 1).item()
            for row, done in zip(rows, over, strict=True)
        ]
        newest = at_quantile(q, torch.tensor(numbers, dtype=torch.float64, device=q.device)[:, None]).tolist()
        probs.append(q)
        for index, token_id in enumerate(newest):
            if over[index]:
                continue
            guesses[index].append(token_id)
            over[index] = ends_text(token_id, rows[index].params, end_ids)
            if not over[index] and not is_plain(rows[index].params):
                ahead[index] = rows_ahead(ahead[index], [token_id])[-1]
        if all(over):
            break
    return [
        Draft(ids, None if row.params.temperature == 0 else torch.stack([q[index] for q in probs[: len(ids)]]))
        if ids
        else Draft([])
        for index, (row, ids) in enumerate(zip(rows, guesses, strict=True))
    ]


class CachedModel:
    """A model that remembers one text: ids that it has read are not computed again, and a changed end is forgotten."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self.ids = model, []
        self.caches = [KVCache() for _ in model.blocks]  # no window: what a mask hides may be needed after a crop

    @torch.no_grad()
    def logits(self, ids: list[int], n_last: int) -> Tensor:
        """Logits (n_last, vocab) at the last positions of a text."""
        n_known = 0
        while n_known < min(len(self.ids), len(ids) - n_last) and self.ids[n_known] == ids[n_known]:
            n_known += 1
        for cache in self.caches:
            cache.crop(n_known)
        new = torch.tensor([ids[n_known:]], device=self.model.lm_head.weight.device)
        self.ids = list(ids)
        return self.model.logits(self.model.hidden(new, self.caches)[0, -n_last:])  # (n_last, vocab)


class DraftModel:
    """Guess by a smaller model of the same vocabulary, for one request at a time.

    Raises ValueError for a model of another vocabulary than the target's.
    """

    def __init__(self, model: CausalLM, target: CausalLM) -> None:
        check_draft_model(model, target)
        self.cached = CachedModel(model)

    def propose(self, rows: Sequence[RowState], n_draft: int, end_ids: Sequence[int] = ()) -> list[Draft]:
        return [self.continued(row, n_draft, end_ids) for row in rows]

    def continued(self, row: RowState, n_draft: int, end_ids: Sequence[int]) -> Draft:
        text, config = [*row.prompt_ids, *row.new_ids], self.cached.model.config
        if not config.window_size and config.rope_scaling.kind != "dynamic":
            n_draft = min(n_draft, config.max_seq_len - len(text) + 1)  # the last guess is not read

        def next_logits(newest: list[int] | None) -> Tensor:
            text.extend(newest or [])
            return self.cached.logits(text, 1)

        return draft_tokens(next_logits, [row], n_draft, end_ids)[0]


def check_draft_model(draft: CausalLM, target: CausalLM) -> None:
    """Raise ValueError unless both models have the same vocabulary."""
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"draft vocabulary {sizes[0]} != target {sizes[1]}; a draft must use the target's tokenizer")


# What it brings


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """How likely a guess from q is kept: sum of min(p, q) = 1 - total variation distance; (..., vocab) -> (...)."""
    return torch.minimum(p, q).sum(dim=-1)


def expected_tokens(acceptance: float, n_draft: int) -> float:
    """Tokens for each pass of the target if every guess is kept with the same chance (Leviathan et al. 2023, eq. 1)."""
    if not 0 <= acceptance <= 1 or n_draft < 0:
        raise ValueError(f"acceptance={acceptance} must be between 0 and 1, and n_draft={n_draft} at least 0")
    if acceptance == 1:
        return n_draft + 1.0
    return (1 - acceptance ** (n_draft + 1)) / (1 - acceptance)


def expected_speedup(acceptance: float, n_draft: int, cost_ratio: float) -> float:
    """Times as fast as without: one pass of the draft costs cost_ratio passes of the target (theorem 3.8 there).

    It holds where checking 1 + n_draft tokens takes no longer than making one: in small batches, bound by memory.
    """
    return expected_tokens(acceptance, n_draft) / (1 + n_draft * cost_ratio)


def best_draft_length(acceptance: float, cost_ratio: float, longest: int = 32) -> int:
    """How many tokens to guess for the largest expected speed-up; 0 if guessing does not pay."""
    return max(range(longest + 1), key=lambda n_draft: expected_speedup(acceptance, n_draft, cost_ratio))


class Speculation(NamedTuple):
    """The tokens of one request, and what they cost."""

    ids: list[int]
    n_passes: int  # of the target
    n_drafted: int
    n_accepted: int


def speculate(
    model: CausalLM,
    proposer: Proposer,
    prompt: Sequence[int],
    params: RequestParams,
    n_draft: int = 4,
    end_ids: Sequence[int] = (),
) -> Speculation:
    """Continue one prompt, checking up to n_draft guesses in each pass of the model; call `eval()` first.

    Raises ValueError for an empty prompt and for an answer that could reach beyond the model's positions.
    """
    if not prompt:
        raise ValueError("a prompt needs at least one token")
    model.check_length(len(prompt) + params.max_tokens)
    target, row = CachedModel(model), new_row(params, list(prompt))
    n_passes = n_drafted = n_accepted = 0
    while len(row.new_ids) < params.max_tokens:
        room = params.max_tokens - len(row.new_ids) - 1  # the pass gives one token beyond the guesses
        (draft,) = proposer.propose([row], min(n_draft, room), end_ids) if min(n_draft, room) else (Draft([]),)
        logits = target.logits([*row.prompt_ids, *row.new_ids, *draft.ids], 1 + len(draft.ids))
        (verdict,) = verify(logits[None], [row], [draft], end_ids)
        n_passes, n_drafted, n_accepted = n_passes + 1, n_drafted + len(draft.ids), n_accepted + verdict.n_accepted
        for token_id in verdict.ids:
            over = ends_text(token_id, params, end_ids)
            if params.constraint is not None and not over:
                row.constraint_state = params.constraint.advance(row.constraint_state, token_id)
            row.new_ids.append(token_id)
            if over:
                return Speculation(row.new_ids, n_passes, n_drafted, n_accepted)
    return Speculation(row.new_ids, n_passes, n_drafted, n_accepted)
