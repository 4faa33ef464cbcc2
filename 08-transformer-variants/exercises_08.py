"""Exercises of topic 08: write each function in a file of your own, then

python 08-transformer-variants/exercises_08.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import contrastive
import efficient_attention
import gpt2
import t5
import vision_transformer
from workbench import Exercise, first_difference, grade

IGNORED = -100


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(
    answer: Callable, args: tuple, expected: object, case: str, look: str, tolerance: float = 1e-9
) -> str | None:
    """None if answer(*args) is right and left its tensors alone, else what differs in which case, and where to look."""
    given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    found = answer(*given)
    for before, after in zip(args, given, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            return f"{case}: it changed its input; work on a copy"
    if found is None:
        return f"{case}: it returned nothing; {look}"
    difference = first_difference(found, expected, tolerance)
    return f"{case}: {difference}; {look}" if difference else None


# BERT's masks


def mask_for_bert(token_ids: Tensor, lots: Tensor, swaps: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    chosen = lots[0] < 0.15  # (batch, seq)
    hidden = chosen & (lots[1] < 0.8)  # (batch, seq)
    swapped = chosen & (lots[1] >= 0.8) & (lots[1] < 0.9)  # (batch, seq)
    inputs = torch.where(swapped, swaps, token_ids.masked_fill(hidden, mask_id))  # (batch, seq)
    return inputs, token_ids.masked_fill(~chosen, IGNORED)


def masked_with(chosen_share: float = 0.15, hidden_share: float = 0.8, swap_end: float = 0.9, targets: str = "chosen"):
    """A wrong solution: other shares, or other targets."""

    def wrong(token_ids: Tensor, lots: Tensor, swaps: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
        chosen = lots[0] < chosen_share
        hidden = chosen & (lots[1] < hidden_share)
        swapped = chosen & ~hidden & (lots[1] < swap_end)
        inputs = torch.where(swapped, swaps, token_ids.masked_fill(hidden, mask_id))
        kept = {"chosen": chosen, "hidden": hidden, "changed": hidden | swapped, "all": torch.ones_like(chosen)}[
            targets
        ]
        return inputs, token_ids.masked_fill(~kept, IGNORED)

    return wrong


def one_lot(token_ids: Tensor, lots: Tensor, swaps: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    return mask_for_bert(token_ids, lots[:1].expand(2, -1, -1), swaps, mask_id)


def check_mask_for_bert(answer: Callable) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for mask_id, shape in ((3, (4, 90)), (77, (3, 250))):
        token_ids, swaps = (torch.randint(4, 77, shape, generator=generator) for _ in range(2))
        lots = torch.rand(2, *shape, generator=generator)
        wanted = mask_for_bert(token_ids, lots, swaps, mask_id)
        case = f"{shape[0]} rows of {shape[1]} tokens, mask_id {mask_id}"
        look = "lots[0] < 0.15 chooses; of the chosen, lots[1] below 0.8 hides, up to 0.9 swaps, and the rest stays"
        if advice := compare(answer, (token_ids, lots, swaps, mask_id), wanted, case, look):
            return advice
    return None


# T5's spans


def corrupt_spans(token_ids: list[int], spans: list[tuple[int, int]], sentinels: list[int]) -> tuple[list, list]:
    inputs, targets, position = [], [], 0
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        inputs += [*token_ids[position:start], sentinel]
        targets += [sentinel, *token_ids[start:end]]
        position = end
    return inputs + token_ids[position:], [*targets, sentinels[len(spans)]]


def one_sentinel_for_all(token_ids: list[int], spans: list[tuple[int, int]], sentinels: list[int]) -> tuple[list, list]:
    return corrupt_spans(token_ids, spans, [sentinels[0]] * len(sentinels))


def one_sentinel_for_each_token(
    token_ids: list, spans: list[tuple[int, int]], sentinels: list[int]
) -> tuple[list, list]:
    inputs, targets = corrupt_spans(token_ids, spans, sentinels)
    sizes = {sentinel: end - start for (start, end), sentinel in zip(spans, sentinels, strict=False)}
    return [token for token in inputs for _ in range(sizes.get(token, 1))], targets


def check_corrupt_spans(answer: Callable) -> str | None:
    cases = (
        ([10, 11, 12, 13, 14, 15], [(1, 3)], [90, 91]),
        ([10, 11, 12, 13, 14, 15], [(1, 3), (4, 5)], [99, 98, 97, 96]),
        ([10, 11, 12, 13], [(0, 1), (3, 4)], [90, 91, 92]),
        ([10, 11, 12], [], [90]),
    )
    for token_ids, spans, sentinels in cases:
        case = f"tokens {token_ids}, spans {spans}, sentinels {sentinels}"
        look = "input: a sentinel for each span; target: each sentinel, its span, and one more sentinel at the end"
        wanted = t5.corrupt_spans(token_ids, spans, sentinels)
        found = answer(list(token_ids), list(spans), list(sentinels))
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"{case}: expected a pair (inputs, targets), got {found!r}"
        for name, got, want in zip(("inputs", "targets"), found, wanted, strict=True):
            if list(got) != want:
                return f"{case}: the {name} are {list(got)}, expected {want}; {look}"
    return None


# The nucleus


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)  # (batch, vocab)
    chances = ordered.softmax(dim=-1)  # (batch, vocab)
    outside = chances.cumsum(dim=-1) - chances >= top_p  # (batch, vocab)
    return logits.masked_fill(outside.scatter(1, order, outside), -math.inf)


def nucleus_with(outside_of: Callable, scatter: bool = True) -> Callable:
    """A wrong solution: another rule for what lies outside, or the rule applied in the wrong order."""

    def wrong(logits: Tensor, top_p: float) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True)
        chances = ordered.softmax(dim=-1)
        outside = outside_of(chances, top_p)
        if scatter:
            outside = outside.scatter(1, order, outside)
        return logits.masked_fill(outside, -math.inf)

    return wrong


def check_keep_nucleus(answer: Callable) -> str | None:
    plain = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    cases = [(plain, top_p, f"chances 1/2, 1/4, 1/8, 1/8, top_p {top_p}") for top_p in (0.1, 0.5, 0.6, 0.8, 1.0)]
    cases += [(3 * numbers(5, 11, seed=s), p, f"5 random rows, top_p {p}") for s, p in ((1, 0.3), (2, 0.9))]
    for logits, top_p, case in cases:
        wanted = gpt2.keep_likely(logits, 0, top_p)
        look = "keep the fewest most likely tokens that reach top_p, at least one, each in its own place"
        if advice := compare(answer, (logits, top_p), wanted, case, look):
            return advice
    return None


# GPT-2's files


def split_gpt2_attention(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weight.T.chunk(3), bias.chunk(3), strict=True))


def check_split_gpt2_attention(answer: Callable) -> str | None:
    for d_model, seed in ((4, 0), (6, 1)):
        weight, bias, x = numbers(d_model, 3 * d_model, seed=seed), numbers(3 * d_model, seed=9), numbers(5, d_model)
        wanted = (x @ weight + bias).chunk(3, dim=1)  # what GPT-2 computes
        case = f"d_model {d_model}, a file's matrix of shape {tuple(weight.shape)}"
        found = answer(weight.clone(), bias.clone())
        if not (isinstance(found, tuple | list) and len(found) == 3):
            return f"{case}: expected three pairs (weight, bias), got {type(found).__name__}"
        for name, pair, want in zip("qkv", found, wanted, strict=True):
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
                return f"{case}: {name} should be a pair of tensors, got {pair!r}"
            if pair[0].shape != (d_model, d_model) or pair[1].shape != (d_model,):
                return f"{case}: {name} has shapes {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            if difference := first_difference(F.linear(x, *pair), want, 1e-9):
                return (
                    f"{case}: F.linear(x, weight, bias) for {name} gives {difference}; F.linear multiplies by weight^T"
                )
    return None


# RoBERTa's positions


def roberta_positions(token_ids: Tensor, pad_id: int) -> Tensor:
    real = (token_ids != pad_id).long()  # (batch, seq)
    return real.cumsum(dim=1) * real + pad_id


def check_roberta_positions(answer: Callable) -> str | None:
    cases = (
        (torch.tensor([[5, 6, 7, 1, 1], [8, 9, 5, 6, 7]]), 1),
        (torch.tensor([[1, 1, 5, 6, 7]]), 1),
        (torch.tensor([[5, 6, 0, 0], [4, 0, 0, 0]]), 0),
        (torch.tensor([[3, 2, 7, 7]]), 7),
    )
    for token_ids, pad_id in cases:
        real = token_ids != pad_id
        wanted = torch.where(real, pad_id + real.long().cumsum(dim=1), torch.tensor(pad_id))
        look = "the first real token stands at pad_id + 1, padding at pad_id, wherever it lies"
        if advice := compare(answer, (token_ids, pad_id), wanted, f"ids {token_ids.tolist()}, pad_id {pad_id}", look):
            return advice
    return None


# Patches


def patchify(images: Tensor, patch_size: int) -> Tensor:
    batch, channels, height, width = images.shape
    down, across = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, down, patch_size, across, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * patch_size**2)


def patchify_with(*order: int) -> Callable:
    """A wrong solution: the axes of the cut images in another order."""

    def wrong(images: Tensor, patch_size: int) -> Tensor:
        batch, channels, height, width = images.shape
        down, across = height // patch_size, width // patch_size
        cut = images.reshape(batch, channels, down, patch_size, across, patch_size)
        return cut.permute(*order).reshape(batch, down * across, channels * patch_size**2)

    return wrong


def check_patchify(answer: Callable) -> str | None:
    for shape, patch_size in (((1, 1, 4, 4), 2), ((2, 3, 6, 4), 2), ((2, 2, 3, 9), 3), ((1, 2, 2, 3), 1)):
        images = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
        wanted = vision_transformer.patchify(images, patch_size)
        case = f"images of shape {shape} that count up, patch_size {patch_size}"
        look = "patches row by row; within a patch channel by channel, then its rows, as F.unfold lists them"
        if advice := compare(answer, (images, patch_size), wanted, case, look):
            return advice
    return None


# Performer's features


def random_features(x: Tensor, projection: Tensor) -> Tensor:
    exponents = x @ projection.T - x.square().sum(dim=-1, keepdim=True) / 2  # (seq, features)
    return exponents.exp() / math.sqrt(len(projection))


def check_random_features(answer: Callable) -> str | None:
    for shape, n_features in (((5, 3), 8), ((2, 4, 6), 5)):
        x, projection = 0.5 * numbers(*shape, seed=1), numbers(n_features, shape[-1], seed=2)
        wanted = efficient_attention.positive_random_features(x, projection)
        case = f"x of shape {shape}, {n_features} random rows"
        look = "exp(w.x - |x|^2 / 2) / sqrt(m), so that phi(x).phi(y) is exp(x.y) on average"
        if advice := compare(answer, (x, projection), wanted, case, look):
            return advice
    x, projection = 0.5 * numbers(2, 3, seed=4), numbers(50_000, 3, seed=5)
    found = answer(x, projection)
    mean, wanted = (found[0] @ found[1]).item(), (x[0] @ x[1]).exp().item()
    if abs(mean - wanted) > 0.05 * wanted:
        return f"with 50,000 rows phi(x).phi(y) is {mean:.3f}, expected about exp(x.y) = {wanted:.3f}"
    return None


# Contrastive loss


def contrastive_loss(images: Tensor, texts: Tensor, temperature: float) -> Tensor:
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (images, texts))  # (pairs, width)
    scores, partners = images @ texts.T / temperature, torch.arange(len(images))
    return (F.cross_entropy(scores, partners) + F.cross_entropy(scores.T, partners)) / 2


def contrastive_with(
    normalise: bool = True, directions: int = 2, times: bool = False, targets: Callable = torch.arange
):
    """A wrong solution: no unit length, one direction, a temperature that multiplies, or other partners."""

    def wrong(images: Tensor, texts: Tensor, temperature: float) -> Tensor:
        if normalise:
            images, texts = (x / x.norm(dim=1, keepdim=True) for x in (images, texts))
        scores = images @ texts.T * (temperature if times else 1 / temperature)
        losses = [F.cross_entropy(part, targets(len(images))) for part in (scores, scores.T)]
        return sum(losses[:directions]) / directions

    return wrong


def check_contrastive_loss(answer: Callable) -> str | None:
    for n_pairs, width, temperature in ((3, 4, 1.0), (5, 2, 0.1), (6, 8, 0.5)):
        images, texts = numbers(n_pairs, width, seed=1), numbers(n_pairs, width, seed=2)
        images.requires_grad_()
        wanted = contrastive.clip_loss(images, texts, torch.tensor(-math.log(temperature), dtype=torch.float64))
        case = f"{n_pairs} pairs of width {width}, temperature {temperature}"
        found = answer(images, texts, temperature)
        if difference := first_difference(found, wanted, 1e-9):
            return f"{case}: {difference}; cosines, divided by the temperature, and both directions halved"
        if not (isinstance(found, Tensor) and found.requires_grad):
            return f"{case}: the loss has no gradient; stay with torch operations on the inputs"
        gradients = [torch.autograd.grad(loss, images)[0] for loss in (found, wanted)]
        if difference := first_difference(*gradients, 1e-9):
            return f"{case}: the value is right, the gradient is not: {difference}"
    return None


EXERCISES = [
    Exercise(
        name="mask_for_bert",
        statement="What BERT reads and what it must say, from two random numbers per token, lots (2, batch, seq), and "
        "a random token for each place, swaps (batch, seq): 15 % are chosen; of these 80 % become mask_id, 10 % the "
        "random token, 10 % stay. Targets that are not chosen are -100.",
        signature="mask_for_bert(token_ids, lots, swaps, mask_id) -> (inputs, targets), each (batch, seq)",
        hint="lots[0] < 0.15 chooses; lots[1] says what happens to a chosen token: below 0.8, below 0.9, above.",
        check=check_mask_for_bert,
        solution=mask_for_bert,
        mistakes={
            "only hidden tokens are predicted": masked_with(targets="hidden"),
            "only changed tokens are predicted": masked_with(targets="changed"),
            "every token is predicted": masked_with(targets="all"),
            "all chosen tokens are hidden": masked_with(hidden_share=1.0),
            "nothing stays": masked_with(swap_end=1.0),
            "80 % of all tokens are hidden": masked_with(chosen_share=1.0),
            "one random number decides both": one_lot,
        },
    ),
    Exercise(
        name="corrupt_spans",
        statement="T5's span corruption: spans are (start, end) pairs in order; each is replaced by its own sentinel.",
        signature="corrupt_spans(token_ids, spans, sentinels) -> (inputs, targets), two lists of ids",
        hint="Walk through the spans; the target ends with the sentinel after the last one used.",
        check=check_corrupt_spans,
        solution=corrupt_spans,
        mistakes={
            "no last sentinel": lambda token_ids, spans, sentinels: (
                corrupt_spans(token_ids, spans, sentinels)[0],
                corrupt_spans(token_ids, spans, sentinels)[1][:-1],
            ),
            "the same sentinel everywhere": one_sentinel_for_all,
            "a sentinel for every token of a span": one_sentinel_for_each_token,
            "the target is the whole text": lambda token_ids, spans, sentinels: (
                corrupt_spans(token_ids, spans, sentinels)[0],
                token_ids,
            ),
            "the text after the last span is lost": lambda token_ids, spans, sentinels: (
                corrupt_spans(token_ids[: spans[-1][1]] if spans else token_ids, spans, sentinels)[0],
                corrupt_spans(token_ids, spans, sentinels)[1],
            ),
        },
    ),
    Exercise(
        name="keep_nucleus",
        statement="Top-p: logits (batch, vocab) with -inf for every token outside the nucleus, the fewest most likely "
        "tokens whose probabilities reach top_p.",
        signature="keep_nucleus(logits, top_p) -> logits (batch, vocab)",
        hint="Sort, softmax, cumsum. A token is outside if those before it already reach top_p. Then undo the sorting.",
        check=check_keep_nucleus,
        solution=keep_nucleus,
        mistakes={
            "drops the token that crosses top_p": nucleus_with(lambda p, top_p: p.cumsum(dim=-1) > top_p),
            "keeps one token too many": nucleus_with(lambda p, top_p: p.cumsum(dim=-1) - 2 * p >= top_p),
            "leaves the mask in sorted order": nucleus_with(
                lambda p, top_p: p.cumsum(dim=-1) - p >= top_p, scatter=False
            ),
            "keeps every token likelier than 1 - top_p": nucleus_with(lambda p, top_p: p < 1 - top_p),
            "renormalises instead of -inf": lambda logits, top_p: keep_nucleus(logits, top_p).softmax(dim=-1),
        },
    ),
    Exercise(
        name="split_gpt2_attention",
        statement="GPT-2's file holds queries, keys and values as one matrix (d_model, 3 * d_model), multiplied from "
        "the right. Give the weight and bias of three nn.Linear layers.",
        signature="split_gpt2_attention(weight, bias) -> [(weight, bias) of q, of k, of v]",
        hint="nn.Linear computes x @ weight.T: turn the matrix, then cut it along its outputs.",
        check=check_split_gpt2_attention,
        solution=split_gpt2_attention,
        mistakes={
            "cut, but not turned": lambda weight, bias: list(zip(weight.chunk(3, dim=1), bias.chunk(3), strict=True)),
            "values before keys": lambda weight, bias: [split_gpt2_attention(weight, bias)[i] for i in (0, 2, 1)],
            "interleaved by feature": lambda weight, bias: [(weight.T[i::3], bias[i::3]) for i in range(3)],
            "biases forgotten": lambda weight, bias: [(w, 0 * b) for w, b in split_gpt2_attention(weight, bias)],
        },
    ),
    Exercise(
        name="roberta_positions",
        statement="RoBERTa's position of every token: real tokens count from pad_id + 1, padding stays at pad_id.",
        signature="roberta_positions(token_ids, pad_id) -> positions (batch, seq)",
        hint="A running sum of what is not padding.",
        check=check_roberta_positions,
        solution=roberta_positions,
        mistakes={
            "counts from 0, as BERT": lambda token_ids, pad_id: torch.arange(token_ids.shape[1]).expand(
                token_ids.shape
            ),
            "counts from pad_id": lambda token_ids, pad_id: (roberta_positions(token_ids, pad_id) - 1).clamp(
                min=pad_id
            ),
            "counts padding too": lambda token_ids, pad_id: (
                torch.arange(1, token_ids.shape[1] + 1).expand(token_ids.shape) + pad_id
            ),
            "padding repeats the last position": lambda token_ids, pad_id: (
                (token_ids != pad_id).long().cumsum(dim=1) + pad_id
            ),
        },
    ),
    Exercise(
        name="patchify",
        statement="Cut images (batch, channels, height, width) into square patches, as F.unfold lists them.",
        signature="patchify(images, patch_size) -> (batch, patches, channels * patch_size^2)",
        hint="Reshape into six axes (batch, channels, down, row, across, column), permute, and join them again.",
        check=check_patchify,
        solution=patchify,
        mistakes={
            "channels last, as in picture files": patchify_with(0, 2, 4, 3, 5, 1),
            "patches column by column": patchify_with(0, 4, 2, 1, 3, 5),
            "every patch turned": patchify_with(0, 2, 4, 1, 5, 3),
            "reshape alone": lambda images, patch_size: images.reshape(
                len(images), -1, images.shape[1] * patch_size**2
            ),
            "takes every n-th pixel": patchify_with(0, 3, 5, 1, 2, 4),
        },
    ),
    Exercise(
        name="random_features",
        statement="Performer's positive random features of x (..., d_head) for the rows of projection (m, d_head): "
        "phi(x).phi(y) must be exp(x.y) on average over standard normal rows.",
        signature="random_features(x, projection) -> (..., m)",
        hint="E[exp(w.z)] = exp(|z|^2 / 2) for standard normal w. Take z = x + y and see what is too much.",
        check=check_random_features,
        solution=random_features,
        mistakes={
            "no correction for the length of x": lambda x, projection: (
                (x @ projection.T).exp() / math.sqrt(len(projection))
            ),
            "the whole square, not half": lambda x, projection: (
                (x @ projection.T - x.square().sum(dim=-1, keepdim=True)).exp() / math.sqrt(len(projection))
            ),
            "divided by m": lambda x, projection: random_features(x, projection) / math.sqrt(len(projection)),
            "half of the norm, not of its square": lambda x, projection: (
                (x @ projection.T - x.norm(dim=-1, keepdim=True) / 2).exp() / math.sqrt(len(projection))
            ),
            "topic 3's elu + 1": lambda x, projection: (F.elu(x @ projection.T) + 1) / math.sqrt(len(projection)),
        },
    ),
    Exercise(
        name="contrastive_loss",
        statement="CLIP's loss of pairs of vectors (pairs, width) of any length, at a temperature.",
        signature="contrastive_loss(images, texts, temperature) -> a scalar tensor",
        hint="Cosines divided by the temperature are logits; the right class of row i is i; so is that of column i.",
        check=check_contrastive_loss,
        solution=contrastive_loss,
        mistakes={
            "dot products, not cosines": contrastive_with(normalise=False),
            "one direction": contrastive_with(directions=1),
            "times the temperature": contrastive_with(times=True),
            "the wrong partner": contrastive_with(targets=lambda n: torch.arange(n).roll(1)),
            "the sum of both directions": lambda images, texts, temperature: (
                2 * contrastive_loss(images, texts, temperature)
            ),
            "detached from the inputs": lambda images, texts, temperature: contrastive_loss(
                images.detach(), texts, temperature
            ).requires_grad_(),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
