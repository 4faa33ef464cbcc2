"""Exercises of topic 05: write each function in a file of your own, then

python 05-building-from-scratch/exercises_05.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import Exercise, first_difference, grade

PAD, BOS, EOS, SKIP = 0, 1, 2, -100
OTHER_IDS = {"bos_id": 3, "eos_id": 9, "pad_id": 7, "ignore": -1}  # nothing may be built in


# Teacher forcing


def teacher_forcing(rows: list[list[int]], bos_id: int, eos_id: int, pad_id: int, ignore: int) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows) + 1
    inputs = torch.full((len(rows), longest), pad_id)
    answers = torch.full((len(rows), longest), ignore)
    for index, row in enumerate(rows):
        inputs[index, : len(row) + 1] = torch.tensor([bos_id, *row])
        answers[index, : len(row) + 1] = torch.tensor([*row, eos_id])
    return inputs, answers


def check_teacher_forcing(answer: Callable) -> str | None:
    ids, others = (BOS, EOS, PAD, SKIP), tuple(OTHER_IDS.values())
    cases = (([[5, 6, 7]], ids), ([[5, 6, 7], [8]], ids), ([[9], [4, 4, 5], [6, 7]], ids), ([[5], [4, 6]], others))
    for rows, special in cases:
        given = [list(row) for row in rows]
        found = answer(given, *special)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"expected the pair (inputs, answers), got {found!r}"
        if given != rows:
            return f"it changed the rows it was given: {rows} became {given}"
        for name, got, want in zip(("inputs", "answers"), found, teacher_forcing(rows, *special), strict=True):
            if not isinstance(got, Tensor):
                return f"the {name} should be a tensor, got {got!r}"
            if difference := first_difference(got, want):
                return (
                    f"rows {rows}, bos_id, eos_id, pad_id, ignore = {special}, {name}: {difference}; the input begins "
                    "with <bos>, the answer ends with <eos>, and only the answer is filled with what the loss ignores"
                )
    return None


def pad_to(rows: list[list[int]], filler: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def forcing_with(make_input: Callable, filler: int | None = None) -> Callable:
    """A wrong solution: other inputs, or answers filled with another id."""

    def wrong(rows, bos_id, eos_id, pad_id, ignore):
        answers = pad_to([[*row, eos_id] for row in rows], ignore if filler is None else filler)
        return pad_to([make_input(row, bos_id, eos_id) for row in rows], pad_id), answers

    return wrong


# Label smoothing


def smoothed_loss(logits: Tensor, targets: Tensor, smoothing: float, ignore: int) -> Tensor:
    counted = targets != ignore
    log_probs = logits[counted].log_softmax(dim=-1)  # (tokens, vocab)
    right = log_probs.gather(1, targets[counted][:, None]).squeeze(1)
    return -((1 - smoothing) * right + smoothing * log_probs.mean(dim=1)).mean()


def check_smoothed_loss(answer: Callable) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for smoothing, n_ignored, ignore in (
        (0.0, 0, SKIP),
        (0.1, 0, SKIP),
        (0.4, 0, SKIP),
        (0.1, 4, SKIP),
        (0.1, 11, SKIP),
        (0.1, 4, PAD),
    ):
        logits = (3 * torch.randn(12, 7, generator=generator, dtype=torch.float64)).requires_grad_()
        targets = torch.randint(1, 7, (12,), generator=generator)
        targets[torch.randperm(12, generator=generator)[:n_ignored]] = ignore
        want = F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=ignore)
        got = answer(logits, targets.clone(), smoothing, ignore)
        case = f"12 tokens, 7 classes, smoothing {smoothing}, {n_ignored} targets to ignore (marked {ignore})"
        if difference := first_difference(got, want, 1e-9):
            return f"{case}: {difference}; add up the smoothed target (it must give 1) and count the real tokens"
        if not (isinstance(got, Tensor) and got.requires_grad):
            return f"{case}: the loss has no gradient; stay with torch operations on the logits"
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (got, want)]
        if difference := first_difference(*gradients, 1e-9):
            return f"{case}: the value is right, the gradient is not: {difference}"
    return None


def smoothed_with(target_of: Callable, keep_all: bool = False) -> Callable:
    """A wrong solution: the loss against another target distribution."""

    def wrong(logits, targets, smoothing, ignore):
        counted = targets != ignore
        hot = F.one_hot(targets.clamp(min=0), logits.shape[-1]).to(logits.dtype)
        losses = -(target_of(hot, smoothing, logits.shape[-1]) * logits.log_softmax(-1)).sum(-1)
        return losses.mean() if keep_all else losses[counted].mean()

    return wrong


# The schedule


def noam_rate(step: int, d_model: int, warmup_steps: int) -> float:
    return d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def check_noam_rate(answer: Callable) -> str | None:
    for d_model, warmup_steps in ((512, 4000), (64, 7)):
        for step in (1, 2, warmup_steps - 1, warmup_steps, warmup_steps + 1, 10 * warmup_steps):
            got, want = answer(step, d_model, warmup_steps), noam_rate(step, d_model, warmup_steps)
            if difference := first_difference(got, want, 1e-9 * want):
                return f"d_model {d_model}, warm-up {warmup_steps}, step {step}: {difference}"
    return None


# Beam search, one step


def extend_beams(scores: Tensor, log_probs: Tensor, n_beams: int) -> tuple[list[float], list[int], list[int]]:
    best = (scores[:, None] + log_probs).flatten().topk(n_beams)
    parents, tokens = best.indices // log_probs.shape[1], best.indices % log_probs.shape[1]
    return best.values.tolist(), parents.tolist(), tokens.tolist()


def check_extend_beams(answer: Callable) -> str | None:
    generator = torch.Generator().manual_seed(1)
    cases = {"one beam": (1, 5, 1), "the first step, one beam into three": (1, 6, 3), "three beams": (3, 5, 3)}
    for name, (n_before, vocab_size, n_beams) in cases.items():
        for _ in range(4):
            scores = -4 * torch.rand(n_before, generator=generator, dtype=torch.float64)
            logits = 2 * torch.randn(n_before, vocab_size, generator=generator, dtype=torch.float64)
            log_probs = logits.log_softmax(dim=1)
            got = answer(scores.clone(), log_probs.clone(), n_beams)
            if not (isinstance(got, tuple | list) and len(got) == 3):
                return f"{name}: expected (scores, parents, tokens), got {got!r}"
            for what, mine, wanted in zip(
                ("scores", "parents", "tokens"), got, extend_beams(scores, log_probs, n_beams), strict=True
            ):
                if difference := first_difference(list(mine), wanted, 1e-9):
                    return f"{name}, {what}: {difference}; all continuations of all beams compete, best first"
    return None


def best_of_each_beam(scores, log_probs, n_beams):
    best = (scores[:, None] + log_probs).max(dim=1)
    order = best.values.argsort(descending=True)[:n_beams]
    return best.values[order].tolist(), order.tolist(), best.indices[order].tolist()


def forgets_the_past(scores, log_probs, n_beams):
    return extend_beams(torch.zeros_like(scores), log_probs, n_beams)


def swaps_parent_and_token(scores, log_probs, n_beams):
    total, parents, tokens = extend_beams(scores, log_probs, n_beams)
    return total, tokens, parents


# The length penalty


def best_hypothesis(log_probs: list[float], lengths: list[int], length_penalty: float) -> int:
    scores = [log_prob / length**length_penalty for log_prob, length in zip(log_probs, lengths, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def check_best_hypothesis(answer: Callable) -> str | None:
    four = [math.log(0.4), math.log(0.384), math.log(0.2), -3.0], [1, 3, 4, 12]
    near_tie = [math.log(0.4), math.log(0.384)], [1, 3]  # equal at 0.040
    late_tie = [-1.0, -3.5], [1, 3]  # equal at 1.14
    cases = [(*four, penalty) for penalty in (0.0, 0.3, 0.6, 1.0, 2.0)]
    cases += [(*near_tie, 0.03), (*near_tie, 0.05), (*late_tie, 1.0), (*late_tie, 2.0)]
    for log_probs, lengths, length_penalty in cases:
        got = answer(list(log_probs), list(lengths), length_penalty)
        want = best_hypothesis(log_probs, lengths, length_penalty)
        if isinstance(got, bool) or not isinstance(got, int):
            return f"expected the index of a hypothesis, got {got!r}"
        if got != want:
            return (
                f"log-probabilities {[round(x, 3) for x in log_probs]}, lengths {lengths}, length penalty "
                f"{length_penalty}: hypothesis {got}, expected {want}; log-probabilities are negative"
            )
    return None


# Decoding with a cache


def cached_greedy(step: Callable, bos_id: int, eos_id: int, max_new_tokens: int) -> list[int]:
    cache, token, tokens = None, bos_id, []
    for _ in range(max_new_tokens):
        log_probs, cache = step([token], cache)
        token = max(range(len(log_probs)), key=log_probs.__getitem__)
        tokens.append(token)
        if token == eos_id:
            break
    return tokens


class FakeDecoder:
    """A decoder whose next token depends on everything that it was fed, in order; it counts what it is fed."""

    def __init__(self, stop_after: int, eos_id: int) -> None:
        self.stop_after, self.eos_id, self.n_fed = stop_after, eos_id, 0

    def step(self, tokens: list[int], cache: tuple[int, ...] | None) -> tuple[list[float], tuple[int, ...]]:
        seen = (*(cache or ()), *tokens)
        self.n_fed += len(tokens)
        chosen = self.eos_id if len(seen) > self.stop_after else 3 + sum(i * t for i, t in enumerate(seen, 1)) % 6
        return [-0.1 if token == chosen else -5.0 - token for token in range(9)], seen


def check_cached_greedy(answer: Callable) -> str | None:
    cases = [(1, 8, BOS, EOS), (4, 8, BOS, EOS), (7, 8, BOS, EOS), (20, 8, BOS, EOS), (0, 1, BOS, EOS)]
    for stop_after, max_new_tokens, bos_id, eos_id in [*cases, (4, 8, 5, EOS), (4, 8, BOS, 0)]:
        fake, sound = FakeDecoder(stop_after, eos_id), FakeDecoder(stop_after, eos_id)
        got = answer(fake.step, bos_id, eos_id, max_new_tokens)
        want = cached_greedy(sound.step, bos_id, eos_id, max_new_tokens)
        case = (
            f"a decoder that ends after {stop_after} tokens, bos_id {bos_id}, eos_id {eos_id}, limit {max_new_tokens}"
        )
        if not isinstance(got, list):
            return f"{case}: expected a list of token ids, got {got!r}"
        if got != want:
            return f"{case}: {got}, expected {want}; the last token is <eos>, or the limit was reached"
        if fake.n_fed != sound.n_fed:
            return f"{case}: {fake.n_fed} tokens went through the decoder, {sound.n_fed} suffice: feed only the newest"
    return None


def feeds_the_whole_prefix(step, bos_id, eos_id, max_new_tokens):
    tokens = [bos_id]
    while len(tokens) <= max_new_tokens and tokens[-1] != eos_id:
        log_probs, _ = step(tokens, None)
        tokens.append(max(range(len(log_probs)), key=log_probs.__getitem__))
    return tokens[1:]


def feeds_the_prefix_and_the_cache(step, bos_id, eos_id, max_new_tokens):
    tokens, cache = [bos_id], None
    while len(tokens) <= max_new_tokens and tokens[-1] != eos_id:
        log_probs, cache = step(tokens, cache)
        tokens.append(max(range(len(log_probs)), key=log_probs.__getitem__))
    return tokens[1:]


def loses_the_cache(step, bos_id, eos_id, max_new_tokens):
    return cached_greedy(lambda tokens, cache: step(tokens, None), bos_id, eos_id, max_new_tokens)


def never_stops(step, bos_id, eos_id, max_new_tokens):
    return cached_greedy(step, bos_id, -1, max_new_tokens)


# A check for a leak


def sees_the_future(model: Callable, token_ids: Tensor, other_id: int) -> bool:
    for position in range(1, token_ids.shape[1]):
        changed = token_ids.clone()
        changed[:, position] = other_id
        if not torch.equal(model(token_ids)[:, :position], model(changed)[:, :position]):
            return True
    return False


def toy_model(reach: int) -> Callable:
    """Logits (batch, seq, 4) that depend on the tokens up to `reach` positions ahead; -1 stays behind."""

    def model(token_ids: Tensor) -> Tensor:
        values = token_ids.double() + 1
        sums = torch.stack(
            [values[:, : max(0, t + 1 + reach)].sum(1) for t in range(token_ids.shape[1])], dim=1
        )  # (batch, seq)
        return torch.stack([(k + 1.0) * sums for k in range(4)], dim=-1)  # (batch, seq, vocab)

    return model


def check_sees_the_future(answer: Callable) -> str | None:
    token_ids = torch.tensor([[4, 5, 6, 7, 8], [8, 7, 6, 5, 4]])
    cases = {"a causal model": 0, "a model that reads only earlier tokens": -1, "one token ahead": 1, "all ahead": 9}
    for name, reach in cases.items():
        given = token_ids.clone()
        got = answer(toy_model(reach), given, 9)
        if not torch.equal(given, token_ids):
            return f"{name}: it changed the token ids that it was given; work on a clone"
        if not isinstance(got, bool):
            return f"{name}: expected True or False, got {got!r}"
        if got != (reach > 0):
            return f"{name}: {got}; compare only positions before the changed token, and change more than one position"
    for row, source, target in ((0, 1, 0), (0, 2, 0), (0, 4, 3), (1, 3, 1)):
        if answer(leaky_model(row, source, target), token_ids.clone(), 9) is not True:
            where = f"in row {row} of the batch the prediction at position {target} depends on the token at {source}"
            return f"{where}: False; a leak may hide at one pair of positions"
    return None


def leaky_model(row: int, source: int, target: int) -> Callable:
    """A causal model but for one leak: in one row the prediction at `target` depends on the later token at `source`."""

    def model(token_ids: Tensor) -> Tensor:
        logits = toy_model(0)(token_ids)
        logits[row : row + 1, target] += token_ids[row : row + 1, source, None]
        return logits

    return model


def only_the_last_token(model, token_ids, other_id):
    changed = token_ids.clone()
    changed[:, -1] = other_id
    return not torch.equal(model(token_ids)[:, :-1], model(changed)[:, :-1])


def compares_everything(model, token_ids, other_id):
    changed = token_ids.clone()
    changed[:, -1] = other_id
    return not torch.equal(model(token_ids), model(changed))


def compares_where(where: Callable) -> Callable:
    """A wrong solution: compares only some of the earlier predictions."""

    def wrong(model, token_ids, other_id):
        for position in range(1, token_ids.shape[1]):
            changed = token_ids.clone()
            changed[:, position] = other_id
            if not torch.equal(where(model(token_ids), position), where(model(changed), position)):
                return True
        return False

    return wrong


def changes_the_first(model, token_ids, other_id):
    changed = token_ids.clone()
    changed[:, 0] = other_id
    return not torch.equal(model(token_ids)[:, 1:], model(changed)[:, 1:])


EXERCISES = [
    Exercise(
        name="teacher_forcing",
        statement="Build the decoder's input and its answers (batch, longest + 1) from rows of target ids.",
        signature="teacher_forcing(rows, bos_id, eos_id, pad_id, ignore) -> (inputs, answers), two integer tensors",
        hint="Input: <bos> y1 ... yn. Answer: y1 ... yn <eos>. The two fillers differ; why?",
        check=check_teacher_forcing,
        solution=teacher_forcing,
        mistakes={
            "no shift": forcing_with(lambda row, bos_id, eos_id: [*row, eos_id]),
            "answers filled with <pad>, which the loss then counts": forcing_with(
                lambda row, bos_id, eos_id: [bos_id, *row], PAD
            ),
            "<eos> in the input as well": forcing_with(lambda row, bos_id, eos_id: [bos_id, *row, eos_id]),
            "inputs filled with 0 whatever the id of <pad>": lambda rows, bos_id, eos_id, pad_id, ignore: (
                teacher_forcing(rows, bos_id, eos_id, 0, ignore)
            ),
            "the special ids are built in": lambda rows, *_: teacher_forcing(rows, BOS, EOS, PAD, SKIP),
        },
    ),
    Exercise(
        name="smoothed_loss",
        statement="Mean cross-entropy against (1 - smoothing) * right class + smoothing * uniform, over real targets.",
        signature="smoothed_loss(logits, targets, smoothing, ignore) -> scalar tensor, in nats per counted target",
        hint="The uniform part gives every class smoothing / n_classes, the right one too. Drop ignored rows first.",
        check=check_smoothed_loss,
        solution=smoothed_loss,
        mistakes={
            "the right class keeps its whole weight": smoothed_with(lambda hot, e, v: hot + e / v),
            "the mass is spread over the other classes only": smoothed_with(
                lambda hot, e, v: (1 - e) * hot + e / (v - 1) * (1 - hot)
            ),
            "ignored targets count as class 0": smoothed_with(lambda hot, e, v: (1 - e) * hot + e / v, keep_all=True),
            "a sum instead of a mean": lambda logits, targets, smoothing, ignore: (
                smoothed_loss(logits, targets, smoothing, ignore) * (targets != ignore).sum()
            ),
            "counts what is not negative": lambda logits, targets, smoothing, ignore: smoothed_loss(
                logits, targets, smoothing, SKIP
            ),
            "takes the ignored targets to stand last": lambda logits, targets, smoothing, ignore: smoothed_loss(
                logits[: (targets != ignore).sum()], targets[: (targets != ignore).sum()].clamp(min=0), smoothing, SKIP
            ),
        },
    ),
    Exercise(
        name="noam_rate",
        statement="The learning rate of Vaswani et al. 2017, equation 3, at a step (the first is 1).",
        signature="noam_rate(step, d_model, warmup_steps) -> float",
        hint="Two branches, a straight rise and 1/sqrt(step). Which is smaller before they meet?",
        check=check_noam_rate,
        solution=noam_rate,
        mistakes={
            "the larger branch": lambda step, d_model, warmup_steps: (
                d_model**-0.5 * max(step**-0.5, step * warmup_steps**-1.5)
            ),
            "no factor for the width": lambda step, d_model, warmup_steps: min(step**-0.5, step * warmup_steps**-1.5),
            "counted from 0": lambda step, d_model, warmup_steps: noam_rate(max(step - 1, 1), d_model, warmup_steps),
            "stays at the peak": lambda step, d_model, warmup_steps: noam_rate(
                min(step, warmup_steps), d_model, warmup_steps
            ),
        },
    ),
    Exercise(
        name="extend_beams",
        statement="One step of beam search: keep the n_beams best continuations of all beams together, best first.",
        signature="extend_beams(scores, log_probs, n_beams) -> (scores, parents, tokens), three lists",
        hint="scores (beams,), log_probs (beams, vocab). Add, flatten, topk; then divide to find parent and token.",
        check=check_extend_beams,
        solution=extend_beams,
        mistakes={
            "the best token of each beam": best_of_each_beam,
            "the running scores are forgotten": forgets_the_past,
            "parent and token exchanged": swaps_parent_and_token,
            "scores multiplied": lambda scores, log_probs, n_beams: extend_beams(
                torch.zeros_like(scores), scores[:, None] * log_probs, n_beams
            ),
        },
    ),
    Exercise(
        name="best_hypothesis",
        statement="Index of the hypothesis with the highest log-probability / length ** length_penalty.",
        signature="best_hypothesis(log_probs, lengths, length_penalty) -> int",
        hint="A negative number divided by a larger one comes nearer to 0.",
        check=check_best_hypothesis,
        solution=best_hypothesis,
        mistakes={
            "multiplies, which punishes length twice": lambda log_probs, lengths, length_penalty: best_hypothesis(
                log_probs, lengths, -length_penalty
            ),
            "always per token": lambda log_probs, lengths, length_penalty: best_hypothesis(log_probs, lengths, 1.0),
            "no penalty": lambda log_probs, lengths, length_penalty: best_hypothesis(log_probs, lengths, 0.0),
            "the smallest": lambda log_probs, lengths, length_penalty: best_hypothesis(
                [-x for x in log_probs], lengths, length_penalty
            ),
            "counts <bos> as well": lambda log_probs, lengths, length_penalty: best_hypothesis(
                log_probs, [n + 1 for n in lengths], length_penalty
            ),
            "does not count <eos>": lambda log_probs, lengths, length_penalty: best_hypothesis(
                log_probs, [max(n - 1, 1) for n in lengths], length_penalty
            ),
            "a penalty of at most 1": lambda log_probs, lengths, length_penalty: best_hypothesis(
                log_probs, lengths, min(length_penalty, 1.0)
            ),
        },
    ),
    Exercise(
        name="cached_greedy",
        statement="Greedy decoding with a cache: step(new_tokens, cache) gives log-probabilities (list) and the cache.",
        signature="cached_greedy(step, bos_id, eos_id, max_new_tokens) -> list of token ids, <eos> included",
        hint="The cache before the first call is None. Feed <bos>, then only the token that was just chosen.",
        check=check_cached_greedy,
        solution=cached_greedy,
        mistakes={
            "feeds the whole prefix without the cache": feeds_the_whole_prefix,
            "feeds the whole prefix on top of the cache": feeds_the_prefix_and_the_cache,
            "never hands the cache back": loses_the_cache,
            "does not stop at <eos>": never_stops,
            "the id of <eos> is built in": lambda step, bos_id, eos_id, max_new_tokens: cached_greedy(
                step, bos_id, EOS, max_new_tokens
            ),
            "the id of <bos> is built in": lambda step, bos_id, eos_id, max_new_tokens: cached_greedy(
                step, BOS, eos_id, max_new_tokens
            ),
        },
    ),
    Exercise(
        name="sees_the_future",
        statement="Whether any prediction of model(token_ids) changes when a later token is replaced by other_id.",
        signature="sees_the_future(model, token_ids, other_id) -> bool",
        hint="Replace one position at a time in a clone, and compare the predictions before that position.",
        check=check_sees_the_future,
        solution=sees_the_future,
        mistakes={
            "changes only the last token": only_the_last_token,
            "compares the changed position too": compares_everything,
            "changes the past": changes_the_first,
            "changes only the second token": lambda model, token_ids, other_id: sees_the_future(
                lambda ids: model(torch.cat([ids, token_ids[:, 2:]], dim=1)), token_ids[:, :2], other_id
            ),
            "compares only the neighbour": compares_where(lambda logits, position: logits[:, position - 1]),
            "compares only the first prediction": compares_where(lambda logits, position: logits[:, 0]),
            "compares only the first row": compares_where(lambda logits, position: logits[0, :position]),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
