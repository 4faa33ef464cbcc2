"""Topic 03 - Exercises: write the pieces of attention yourself; the checker says where the first difference is.

python 03-attention-mechanisms/exercises_03.py                # the exercises
python 03-attention-mechanisms/exercises_03.py my_answers.py  # grade the functions that your file defines
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from workbench import Exercise, first_difference, grade


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(copied, value)) if isinstance(value, tuple) else value


def unchanged(given: object, kept: object) -> bool:
    if isinstance(kept, tuple):
        return all(map(unchanged, given, kept))
    return torch.equal(given, kept) if isinstance(kept, Tensor) else given == kept


class Shortcut(Exception):
    """What an answer does that the exercise rules out."""


class Watch(TorchFunctionMode):
    """Within the block, raise Shortcut for PyTorch's own attention and for a tensor of more than a million numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            raise Shortcut("it calls PyTorch's attention; write it in plain tensor operations")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > 1_000_000:
            raise Shortcut(f"it builds a tensor of shape {tuple(result.shape)}; build no matrix of all pairs")
        return result


def compare(answer: Callable, args: tuple, expected: Tensor | tuple, case: str, look: str) -> str | None:
    """Call the answer on copies; return in words what differs, with what to look at, or None."""
    copies = copied(args)
    try:
        with Watch():
            actual = answer(*copies)
    except Shortcut as stop:
        return f"{case}: {stop}"
    wanted = tuple if isinstance(expected, tuple) else Tensor
    if not isinstance(actual, wanted):
        return f"{case}: expected a {wanted.__name__}, got {type(actual).__name__}"
    if isinstance(actual, Tensor) and actual.dtype != expected.dtype:
        return f"{case}: expected {expected.dtype}, got {actual.dtype}"
    difference = first_difference(actual, expected, 1e-9)
    if difference:
        return f"{case}: {difference}; {look}"
    if not unchanged(copies, args):
        return f"{case}: the result is right, but an input was changed; work on new tensors"
    return None


def compare_gradients(
    answer: Callable, wanted: Callable, inputs: tuple[Tensor, ...], case: str, look: str
) -> str | None:
    """Compare the gradients of the sum of squares of what answer and wanted return, for all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = answer(*leaves)
    if not result.requires_grad:
        return f"{case}: no gradient reaches the inputs; use tensor operations throughout, outside torch.no_grad"
    grads = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(wanted(*leaves).square().sum(), leaves)
    difference = first_difference(list(grads), list(expected), 1e-9)
    return difference and f"{case}: {difference}; {look}"


def first_complaint(*complaints: Callable[[], str | None]) -> str | None:
    """The first complaint of several checks; a later check does not run after an earlier failure."""
    return next((words for words in (complaint() for complaint in complaints) if words), None)


# 1. Masked attention


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    nowhere = ~mask.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(mask | nowhere), -math.inf).softmax(dim=-1)
    return weights.masked_fill(nowhere, 0.0) @ v


def attention_from(q, k, v, mask, width=None, after=torch.nan_to_num, fill=-math.inf, dim=-1):
    scores = q @ k.transpose(-2, -1) / math.sqrt(width or q.shape[-1])
    blocked = torch.zeros_like(scores).masked_fill(~mask, fill)
    return after((scores + blocked).softmax(dim=dim)) @ v


def renormalised(q, k, v, mask):
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) * mask
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30) @ v


def check_masked_attention(answer: Callable) -> str | None:
    q, k, v = numbers(2, 3, 5, 4), numbers(2, 3, 7, 4, seed=1), numbers(2, 3, 7, 6, seed=2)
    causal = torch.arange(7) <= torch.arange(2, 7)[:, None]
    padding = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    empty = causal.clone()
    empty[1] = False

    def value(mask: Tensor, case: str, look: str) -> Callable[[], str | None]:
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return lambda: compare(answer, (q, k, v, mask), expected, case, look)

    far_q, far_k = torch.full((2, 1), 40.0, dtype=q.dtype), torch.tensor([[20.0], [-20.0], [-19.99]], dtype=q.dtype)
    far_v, not_first = numbers(3, 2), torch.tensor([[False, True, True]] * 2)

    everywhere = torch.ones(5, 7, dtype=torch.bool)
    return first_complaint(
        value(
            everywhere,
            "5 queries, 7 keys, all allowed",
            "look at the division, the axis of the softmax and what True means",
        ),
        value(causal, "a causal mask", "True means: may attend"),
        value(padding, "a padding mask (2, 1, 1, 7)", "let the mask broadcast over heads and queries"),
        value(empty, "the second query may attend nowhere", "its output is 0"),
        lambda: compare(
            answer,
            (far_q, far_k, far_v, not_first),
            F.scaled_dot_product_attention(far_q, far_k, far_v, attn_mask=not_first),
            "scores of 800, blocked, and -800, allowed",
            "block before the softmax, with -inf, and let the softmax subtract the maximum",
        ),
        lambda: compare_gradients(
            lambda *inputs: answer(*inputs, empty),
            lambda *inputs: F.scaled_dot_product_attention(*inputs, attn_mask=empty),
            (q, k, v),
            "gradients for q, k, v with a query that may attend nowhere",
            "a NaN erased after the softmax comes back in the backward pass: do not let it arise",
        ),
    )


# 2. Mask conversions


def to_may_attend(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    blocked = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        blocked = attn_mask if blocked is None else blocked | attn_mask
    return None if blocked is None else ~blocked


def combined(key_padding_mask, attn_mask, combine):
    if key_padding_mask is None or attn_mask is None:
        return to_may_attend(key_padding_mask, attn_mask)
    return combine(key_padding_mask, attn_mask)


def check_to_may_attend(answer: Callable) -> str | None:
    padding = torch.tensor([[False, False, False, True, True], [False, False, False, False, True]])
    future = torch.ones(3, 5, dtype=torch.bool).triu(3)
    future[0, 1] = True
    neither = None if answer(None, None) is None else "both None: expected None"
    expected = (~padding[:, None, None], ~future, ~(padding[:, None, None] | future))

    def case(index: int, args: tuple, name: str, look: str) -> Callable[[], str | None]:
        def squeezed(*masks: Tensor | None) -> object:
            mask = answer(*masks)
            fits = isinstance(mask, Tensor) and 2 <= mask.dim() <= 4
            return mask.expand(2, 4, 3, 5).contiguous() if fits else mask

        return lambda: compare(squeezed, args, expected[index].expand(2, 4, 3, 5), name, look)

    return first_complaint(
        case(0, (padding, None), "padding alone", "True is blocked there and allowed here; (batch, 1, 1, key)"),
        case(1, (None, future), "attn_mask alone", "True is blocked there and allowed here"),
        case(2, (padding, future), "both", "a key is blocked if either mask blocks it"),
        lambda: neither,
    )


# 3. The softmax Jacobian, never built


def softmax_backward(weights: Tensor, grad_weights: Tensor) -> Tensor:
    return weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))


def check_softmax_backward(answer: Callable) -> str | None:
    def case(shape: tuple[int, ...], name: str, look: str) -> Callable[[], str | None]:
        scores, upstream = numbers(*shape).requires_grad_(), numbers(*shape, seed=1)
        weights = scores.softmax(dim=-1)
        (expected,) = torch.autograd.grad(weights, scores, upstream)
        return lambda: compare(answer, (weights.detach(), upstream), expected, name, look)

    def long() -> str | None:
        weights = torch.full((1, 3000), 1 / 3000, dtype=torch.float64)
        return compare(answer, (weights, weights.clone()), torch.zeros_like(weights), "3,000 keys", "build no matrix")

    return first_complaint(
        case((5,), "one row", "every weight depends on every score: subtract the weighted mean of the gradients"),
        case((2, 3, 4, 6), "four axes", "sum over the last axis and keep it"),
        long,
    )


# 4. Merging two blocks of a streaming softmax

Block = tuple[Tensor, Tensor, Tensor]


def merge_blocks(first: Block, second: Block) -> Block:
    (top_1, total_1, mixed_1), (top_2, total_2, mixed_2) = first, second
    top = torch.maximum(top_1, top_2)
    reference = top.masked_fill(top == -math.inf, 0.0)
    shrink_1, shrink_2 = (top_1 - reference).exp(), (top_2 - reference).exp()
    return top, total_1 * shrink_1 + total_2 * shrink_2, mixed_1 * shrink_1 + mixed_2 * shrink_2


def merged_with(first, second, shrinks):
    top, (one, two) = torch.maximum(first[0], second[0]), shrinks(first, second)
    return top, first[1] * one + second[1] * two, first[2] * one + second[2] * two


def block_of(scores: Tensor, values: Tensor) -> Block:
    """Maximum (query, 1), sum (query, 1) and weighted sum of values (query, d) of some keys; -inf is blocked."""
    top = scores.amax(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_full((len(scores), 1), -math.inf)
    weights = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    return top, weights.sum(dim=-1, keepdim=True), weights @ values


def check_merge_blocks(answer: Callable) -> str | None:
    scores, values = 3 * numbers(4, 9), numbers(9, 2, seed=1)
    far = scores + torch.where(torch.arange(9) < 4, 800.0, 0.0)
    blocked = scores.clone()
    blocked[:, :4] = -math.inf
    nothing = torch.full_like(scores, -math.inf)

    def case(scores: Tensor, name: str, look: str) -> Callable[[], str | None]:
        parts = [block_of(scores[:, part], values[part]) for part in (slice(0, 4), slice(4, 9))]
        return lambda: compare(answer, tuple(parts), block_of(scores, values), name, look)

    def gradient(scores: Tensor, name: str) -> Callable[[], str | None]:
        parts = [block_of(scores[:, part], values[part]) for part in (slice(0, 4), slice(4, 9))]
        tops = [part[0] for part in parts]

        def sums(merge: Callable) -> Callable:
            def of(*inputs: Tensor) -> Tensor:
                merged = merge((tops[0] + inputs[4], *inputs[0:2]), (tops[1] + inputs[4], *inputs[2:4]))
                return merged[2] / merged[1].masked_fill(merged[1] == 0, 1.0)

            return of

        inputs = (*parts[0][1:], *parts[1][1:], torch.zeros_like(tops[0]))
        look = "a NaN erased afterwards comes back in the backward pass: do not let it arise"
        return lambda: compare_gradients(sums(answer), sums(merge_blocks), inputs, f"gradients, {name}", look)

    return first_complaint(
        case(scores, "two blocks of 4 and 5 keys", "rescale both sums of a block by exp(old maximum - new maximum)"),
        case(far, "scores 800 apart", "the exponent must never be positive: subtract the larger maximum"),
        case(blocked, "a first block with nothing allowed", "its maximum is -inf, its sums are 0: exp(-inf) is 0"),
        case(nothing, "two blocks with nothing allowed", "-inf - -inf is NaN: subtract 0 there; the sums stay 0"),
        gradient(scores, "two blocks of 4 and 5 keys"),
        gradient(nothing, "two blocks with nothing allowed"),
    )


# 5. Heads for cross attention


def cross_heads(x: Tensor, memory: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, n_heads: int) -> Tensor:
    q, k, v = (
        (source @ weight).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for source, weight in ((x, w_q), (memory, w_k), (memory, w_v))
    )
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def heads_from(x, memory, w_q, w_k, w_v, n_heads, split=None, merge=None, width=None):
    split = split or (lambda y: y.unflatten(-1, (n_heads, -1)).transpose(1, 2))
    merge = merge or (lambda y: y.transpose(1, 2).flatten(2))
    q, k, v = split(x @ w_q), split(memory @ w_k), split(memory @ w_v)
    return merge((q @ k.transpose(-2, -1) / math.sqrt(width or q.shape[-1])).softmax(dim=-1) @ v)


def check_cross_heads(answer: Callable) -> str | None:
    x, memory = numbers(2, 5, 12), numbers(2, 7, 12, seed=1)
    weights = [numbers(12, 12, seed=seed) / 4 for seed in (2, 3, 4)]

    def case(x: Tensor, memory: Tensor, n_heads: int, name: str, look: str) -> Callable[[], str | None]:
        parts = [F.linear(source, weight.T) for source, weight in zip((x, memory, memory), weights, strict=True)]
        width = 12 // n_heads
        heads = [
            F.scaled_dot_product_attention(*(part[..., h * width : (h + 1) * width] for part in parts))
            for h in range(n_heads)
        ]
        return lambda: compare(answer, (x, memory, *weights, n_heads), torch.cat(heads, dim=-1), name, look)

    return first_complaint(
        case(x, x, 1, "one head, self-attention", "divide by the root of the head's width; project with x @ w"),
        case(
            x,
            x,
            3,
            "three heads, self-attention",
            "a head is a group of neighbouring features; transpose, then flatten",
        ),
        case(x, memory, 3, "5 queries, 7 keys", "keys and values have the memory's length, not the query's"),
        case(x[:, :1], memory, 4, "1 query, 7 keys, 4 heads", "read each length from its own tensor"),
        lambda: compare_gradients(
            lambda *inputs: answer(*inputs, 3),
            lambda *inputs: cross_heads(*inputs, 3),
            (x, memory, *weights),
            "gradients",
            "use tensor operations throughout",
        ),
    )


# 6. Causal linear attention


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, normaliser, outputs = q.new_zeros(k.shape[-1], v.shape[-1]), q.new_zeros(k.shape[-1]), []
    for query, key, value in zip(q, k, v, strict=True):
        state, normaliser = state + key[:, None] * value, normaliser + key
        outputs.append(query @ state / (query @ normaliser))
    return torch.stack(outputs)


def linear_from(q, k, v, features, mask=torch.tril):
    scores = mask(features(q) @ features(k).T)
    return scores @ v / scores.sum(dim=-1, keepdim=True)


def check_causal_linear_attention(answer: Callable) -> str | None:
    def case(n: int, name: str, look: str, scale: float = 1.0) -> Callable[[], str | None]:
        q, k, v = scale * numbers(n, 4), numbers(n, 4, seed=1), numbers(n, 3, seed=2)
        expected = linear_from(q, k, v, lambda x: F.elu(x) + 1)
        return lambda: compare(answer, (q, k, v), expected, name, look)

    return first_complaint(
        case(1, "one position", "a position may attend to itself: add to the state before you answer"),
        case(6, "six positions", "only the past, and divide by the sum of the kernels"),
        case(6, "queries ten times as long", "features of the query too; no softmax, no division by a root", 10.0),
        lambda: compare_gradients(
            answer,
            lambda q, k, v: linear_from(q, k, v, lambda x: F.elu(x) + 1),
            (numbers(6, 4), numbers(6, 4, seed=1), numbers(6, 3, seed=2)),
            "gradients for q, k, v",
            "do not change the state in place",
        ),
        case(1200, "1,200 positions", "carry a state from one position to the next"),
    )


EXERCISES = [
    Exercise(
        name="masked_attention",
        statement="Scaled dot-product attention in plain tensor operations. mask is bool, broadcasts to (..., query, "
        "key), True = may attend. A query that may attend nowhere gives 0, and its gradients are finite.",
        signature="masked_attention(q, k, v, mask) -> tensor (..., query, d_v)",
        hint="Two masked_fill: one before the softmax, one after; a row without keys attends everywhere in between.",
        check=check_masked_attention,
        solution=masked_attention,
        mistakes={
            "inverted mask": lambda q, k, v, mask: masked_attention(q, k, v, ~mask),
            "no division": lambda q, k, v, mask: attention_from(q, k, v, mask, width=1),
            "softmax over the queries": lambda q, k, v, mask: attention_from(q, k, v, mask, dim=-2),
            "-inf added, NaN erased too late": attention_from,
            "NaN left in": lambda q, k, v, mask: attention_from(q, k, v, mask, after=lambda w: w),
            "-1e9 for -inf": lambda q, k, v, mask: attention_from(q, k, v, mask, fill=-1e9),
            "PyTorch's own": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            "-100 for -inf": lambda q, k, v, mask: attention_from(q, k, v, mask, fill=-100.0) * mask.any(-1)[..., None],
            "masked and renormalised": renormalised,
            "masks after the softmax": lambda q, k, v, mask: attention_from(q, k, v, mask | True) * mask[..., :1],
        },
    ),
    Exercise(
        name="to_may_attend",
        statement="nn.MultiheadAttention's bool masks, True = blocked: key_padding_mask (batch, key) and attn_mask "
        "(query, key), each possibly None, as one mask for F.scaled_dot_product_attention over (batch, heads, query, "
        "key), True = takes part. None if both are None.",
        signature="to_may_attend(key_padding_mask, attn_mask) -> bool tensor that broadcasts, or None",
        hint="Blocked if either blocks; then negate. The padding mask needs axes for heads and queries.",
        check=check_to_may_attend,
        solution=to_may_attend,
        mistakes={
            "not negated": lambda p, a: None if p is None and a is None else ~to_may_attend(p, a),
            "blocked only if both block": lambda p, a: combined(p, a, lambda p, a: ~p[:, None, None] | ~a),
            "padding forgotten": lambda p, a: combined(p, a, lambda p, a: ~a),
            "numbers for bools": lambda p, a: None if p is None and a is None else to_may_attend(p, a).double(),
            "padding of queries": lambda p, a: None if p is None else ~p[:, None, :, None],
        },
    ),
    Exercise(
        name="softmax_backward",
        statement="The gradient for the scores, from the weights (softmax over the last axis) and the gradient for "
        "the weights, without a matrix of keys times keys.",
        signature="softmax_backward(weights, grad_weights) -> tensor of the same shape",
        hint="a_l (da_l - sum_j a_j da_j).",
        check=check_softmax_backward,
        solution=softmax_backward,
        mistakes={
            "the diagonal alone": lambda a, da: a * (1 - a) * da,
            "the whole Jacobian": lambda a, da: ((a.diag_embed() - a[..., None] * a[..., None, :]) @ da[..., None])[
                ..., 0
            ],
            "no row sum": lambda a, da: a * da,
            "unweighted mean": lambda a, da: a * (da - da.mean(dim=-1, keepdim=True)),
            "sum over all axes": lambda a, da: a * (da - (a * da).sum()),
        },
    ),
    Exercise(
        name="merge_blocks",
        statement="A block of keys is (maximum, sum, mixed): the largest score of each query (query, 1), the sum of "
        "exp(score - maximum) (query, 1), and that sum weighted with the values (query, d). Return the same three for "
        "the keys of both blocks. A block may have seen nothing: maximum -inf, sums 0.",
        signature="merge_blocks(first, second) -> (maximum, sum, mixed)",
        hint="Bring both blocks to the larger maximum; where that is -inf, subtract 0.",
        check=check_merge_blocks,
        solution=merge_blocks,
        mistakes={
            "sums added as they are": lambda f, s: merged_with(f, s, lambda f, s: (1.0, 1.0)),
            "no guard for -inf": lambda f, s: merged_with(
                f, s, lambda f, s: [(b[0] - torch.maximum(f[0], s[0])).exp() for b in (f, s)]
            ),
            "NaN erased too late": lambda f, s: merged_with(
                f, s, lambda f, s: [(b[0] - torch.maximum(f[0], s[0])).exp().nan_to_num() for b in (f, s)]
            ),
            "exponentials of the maxima": lambda f, s: merged_with(f, s, lambda f, s: (f[0].exp(), s[0].exp())),
            "wrong sign": lambda f, s: merged_with(
                f, s, lambda f, s: [(torch.maximum(f[0], s[0]) - b[0]).exp() for b in (f, s)]
            ),
            "only the second shrinks": lambda f, s: merged_with(f, s, lambda f, s: (1.0, (s[0] - f[0]).exp())),
        },
    ),
    Exercise(
        name="cross_heads",
        statement="Multi-head attention before the output projection: queries x @ w_q, keys memory @ w_k, values "
        "memory @ w_v, cut into n_heads groups of neighbouring features, attended in each, and put side by side again.",
        signature="cross_heads(x, memory, w_q, w_k, w_v, n_heads) -> tensor (batch, query, d_model)",
        hint="unflatten the last axis, transpose; attend; transpose, flatten.",
        check=check_cross_heads,
        solution=cross_heads,
        mistakes={
            "reshaped at once": lambda x, m, q, k, v, n: heads_from(
                x, m, q, k, v, n, split=lambda y: y.reshape(len(y), n, y.shape[1], -1)
            ),
            "merged without transpose": lambda x, m, q, k, v, n: heads_from(
                x, m, q, k, v, n, merge=lambda y: y.reshape(len(y), y.shape[2], -1)
            ),
            "split with the query's length": lambda x, m, q, k, v, n: heads_from(
                x, m, q, k, v, n, split=lambda y: y.reshape(len(y), x.shape[1], n, -1).transpose(1, 2)
            ),
            "divided by the root of d_model": lambda x, m, q, k, v, n: heads_from(x, m, q, k, v, n, width=12),
            "no gradient": torch.no_grad()(cross_heads),
            "values from x": lambda x, m, q, k, v, n: heads_from(x, x, q, k, v, n),
        },
    ),
    Exercise(
        name="causal_linear_attention",
        statement="Causal attention with the kernel phi(q) . phi(k), phi(x) = elu(x) + 1, for q, k (seq, d_k) and v "
        "(seq, d_v), with a state that does not grow: no matrix of queries times keys.",
        signature="causal_linear_attention(q, k, v) -> tensor (seq, d_v)",
        hint="Add phi(k) v^T to the state and phi(k) to the normaliser, then answer.",
        check=check_causal_linear_attention,
        solution=causal_linear_attention,
        mistakes={
            "not causal": lambda q, k, v: linear_from(q, k, v, lambda x: F.elu(x) + 1, mask=lambda s: s),
            "answers before it adds": lambda q, k, v: linear_from(
                q, k, v, lambda x: F.elu(x) + 1, mask=lambda s: s.tril(-1)
            ),
            "all pairs": lambda q, k, v: linear_from(q, k, v, lambda x: F.elu(x) + 1),
            "not normalised": lambda q, k, v: ((F.elu(q) + 1) @ (F.elu(k) + 1).T).tril() @ v,
            "elu without + 1": lambda q, k, v: linear_from(q, k, v, F.elu),
            "a softmax": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        },
    ),
]

if __name__ == "__main__":
    grade(EXERCISES)
