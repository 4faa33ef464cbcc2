"""Topic 04 - Exercises: write the parts of a transformer yourself; the checker says where the first difference is.

python 04-transformer-architecture/exercises_04.py                # the exercises
python 04-transformer-architecture/exercises_04.py my_answers.py  # grade the functions that your file defines
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import Exercise, first_difference, grade


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(answer: Callable, args: tuple, expected: object, case: str, look: str) -> str | None:
    """Call the answer on copies of the tensors; return what differs in words, with what to look at, or None."""
    copies = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
    actual = answer(*copies)
    if isinstance(expected, Tensor) and not isinstance(actual, Tensor):
        return f"{case}: expected a tensor, got {type(actual).__name__}"
    difference = first_difference(actual, expected, 1e-9)
    if difference:
        return f"{case}: {difference}; {look}"
    for given, kept in zip(copies, args, strict=True):
        if isinstance(kept, Tensor) and not torch.equal(given, kept):
            return f"{case}: the result is right, but the input was changed; work on a new tensor"
    return None


def first_complaint(*complaints: Callable[[], str | None]) -> str | None:
    """The first complaint of several checks; a later check does not run after an earlier failure."""
    return next((words for words in (complaint() for complaint in complaints) if words), None)


# 1. Layer normalisation, forward and backward


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    root = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    normed, grad = centred / root, grad_output * weight
    grad_x = (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)) / root
    return normed * weight + bias, grad_x


def layer_norm_from(x, weight, bias, grad_output, spread, project=True, first=True):
    centred = x - x.mean(-1, keepdim=True)
    root = spread(centred)
    normed, grad = centred / root, grad_output * weight if first else grad_output
    grad_x = grad / root
    if project:
        grad_x = (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)) / root
    return normed * weight + bias, grad_x


def rooted(centred: Tensor) -> Tensor:
    return (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def check_layer_norm(answer: Callable) -> str | None:
    def case(x: Tensor, name: str, look: str) -> str | None:
        width = x.shape[-1]
        weight, bias, grad_output = numbers(width, seed=1), numbers(width, seed=2), numbers(*x.shape, seed=3)
        leaf = x.clone().requires_grad_()
        output = F.layer_norm(leaf, (width,), weight, bias, eps=1e-5)
        (grad_x,) = torch.autograd.grad(output, leaf, grad_output)
        result = answer(x.clone(), weight.clone(), bias.clone(), grad_output.clone())
        if not isinstance(result, tuple | list) or len(result) != 2:
            return f"{name}: expected a pair (output, grad_x), got {type(result).__name__}"
        difference = first_difference(result[0], output.detach(), 1e-9)
        if difference:
            return f"{name}: the output has {difference}; {look}"
        difference = first_difference(result[1], grad_x, 1e-9)
        if difference:
            return (
                f"{name}: the gradient has {difference}; weight comes in before the two projections are taken off, "
                "and the division by the root comes last"
            )
        return compare(
            answer, (x, weight, bias, grad_output), (output.detach(), grad_x), name, "one call must not disturb another"
        )

    return first_complaint(
        lambda: case(numbers(2, 3), "two positions of width 3", "the variance divides by 3, not by 2"),
        lambda: case(1e-3 * numbers(2, 4), "inputs of size 0.001", "eps = 1e-5 stands inside the root, beside it"),
        lambda: case(numbers(2, 5, 6), "shape (2, 5, 6)", "statistics are taken over the last axis only"),
        lambda: case(numbers(5), "a single vector of width 5", "no leading axis at all must work too: use axis -1"),
    )


# 2. Rotary positions


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    width = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions.double()[:, None] * frequencies  # (seq, width / 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.empty_like(x)
    turned[..., 0::2] = even * angles.cos() - odd * angles.sin()
    turned[..., 1::2] = odd * angles.cos() + even * angles.sin()
    return turned


def rotate_backwards(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, -positions)


def rotate_in_halves(x: Tensor, positions: Tensor) -> Tensor:
    width = x.shape[-1]
    pairs = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
    turned = rotate(pairs, positions)
    return torch.cat([turned[..., 0:width:2], turned[..., 1:width:2]], dim=-1)


def rotate_from_zero(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, torch.arange(len(positions)))


def rotate_consecutive(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, positions[0] + torch.arange(len(positions)))


def rotate_one_speed(x: Tensor, positions: Tensor) -> Tensor:
    return torch.cat([rotate(pair, positions) for pair in x.split(2, dim=-1)], dim=-1)


def check_rotate(answer: Callable) -> str | None:
    x, positions = numbers(2, 5, 6), torch.arange(5)
    quarter = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    return first_complaint(
        lambda: compare(
            answer,
            (quarter, torch.tensor([math.pi / 2], dtype=torch.float64)),
            torch.tensor([[-2.0, 1.0]], dtype=torch.float64),
            "(1, 2) at position pi/2, a quarter turn",
            "counter-clockwise: the first feature is a cos - b sin",
        ),
        lambda: compare(
            answer,
            (x, positions),
            rotate(x, positions),
            "shape (2, 5, 6), positions 0 to 4",
            "features (0, 1), (2, 3), (4, 5) are the pairs, and pair i turns by position / 10000^(2i/6)",
        ),
        lambda: compare(
            answer,
            (x[:, :2], positions[3:]),
            rotate(x[:, :2], positions[3:]),
            "two new positions, 3 and 4, behind a cache of three",
            "use the positions that are given; a cache makes them start later than 0",
        ),
        lambda: compare(
            answer,
            (x[:, :3], torch.tensor([5, 0, 2])),
            rotate(x[:, :3], torch.tensor([5, 0, 2])),
            "positions 5, 0 and 2",
            "each row turns by its own position; they need not follow each other",
        ),
    )


# 3. The table of sines and cosines


def sinusoidal_table(n_positions: int, d_model: int) -> Tensor:
    table = torch.zeros(n_positions, d_model, dtype=torch.float64)
    for position in range(n_positions):
        for column in range(d_model):
            angle = position / 10000 ** ((column - column % 2) / d_model)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def table_with(n_positions: int, d_model: int, exponent: Callable, start: int = 0, halves: bool = False) -> Tensor:
    position = torch.arange(start, start + n_positions, dtype=torch.float64)[:, None]
    column = torch.arange(d_model)
    angles = position / 10000 ** (exponent(column) / d_model)
    if halves:
        angles = position / 10000 ** (2 * (column % max(1, d_model // 2)) / d_model)
        return torch.where(column < d_model // 2, angles.sin(), angles.cos())
    return torch.where(column % 2 == 0, angles.sin(), angles.cos())


def check_sinusoidal_table(answer: Callable) -> str | None:
    def case(n_positions: int, d_model: int, look: str) -> str | None:
        expected = sinusoidal_table(n_positions, d_model)
        return compare(answer, (n_positions, d_model), expected, f"{n_positions} positions, width {d_model}", look)

    return first_complaint(
        lambda: case(1, 4, "position 0 holds sin 0 = 0 and cos 0 = 1 in turns"),
        lambda: case(3, 4, "columns 2i and 2i + 1 share the angle position / 10000^(2i/d)"),
        lambda: case(3, 5, "an odd width ends on a sine"),
    )


# 4. The wiring of a causal pre-norm block


def pre_norm_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    seq_len = x.shape[1]
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    x = x + attention(norms[0](x), mask)
    return x + feed_forward(norms[1](x))


def post_norm_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    x = norms[0](x + attention(x, mask))
    return norms[1](x + feed_forward(x))


def normed_stream_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    x = norms[0](x)
    x = x + attention(x, mask)
    x = norms[1](x)
    return x + feed_forward(x)


def inverted_mask_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    x = x + attention(norms[0](x), mask)
    return x + feed_forward(norms[1](x))


def parallel_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return x + attention(norms[0](x), mask) + feed_forward(norms[1](x))


def one_norm_block(x: Tensor, norms: tuple, attention: Callable, feed_forward: Callable) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    x = x + attention(norms[0](x), mask)
    return x + feed_forward(norms[0](x))


def check_block(answer: Callable) -> str | None:
    seen: list[Tensor] = []

    def attention(x: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        weights = (mask.double() if isinstance(mask, Tensor) else torch.ones(x.shape[1], x.shape[1]).double()) + 0.0
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1)) @ x

    parts = ((lambda x: 2 * x, lambda x: 3 * x + 1), attention, lambda x: x.square())
    silent = (parts[0], lambda x, mask: 0 * x, lambda x: 0 * x)
    x = numbers(2, 4, 3)

    def masks() -> str | None:
        seen.clear()
        answer(x.clone(), *parts)
        wanted = torch.ones(4, 4, dtype=torch.bool).tril()
        if len(seen) != 1:
            return f"attention was called {len(seen)} times, expected once"
        if not isinstance(seen[0], Tensor) or seen[0].dtype != torch.bool:
            return "the mask must be a bool tensor, True = may attend"
        if seen[0].shape[-2:] != (4, 4) or not torch.equal(seen[0].reshape(-1, 4, 4)[0], wanted):
            return f"the mask is {seen[0].tolist()}; position i may attend to positions 0 to i, itself included"
        return None

    return first_complaint(
        lambda: compare(
            answer, (x, *silent), x, "sub-layers that return 0", "a pre-norm block then hands the stream on untouched"
        ),
        masks,
        lambda: compare(
            answer,
            (x, *parts),
            pre_norm_block(x, *parts),
            "norms 2x and 3x + 1, feed-forward x squared",
            "norms[0] before attention, norms[1] before the feed-forward network, which sees attention's result",
        ),
    )


# 5. What a language model weighs


def decoder_parameters(d_model: int, d_ff: int, n_layers: int, vocab_size: int, max_seq_len: int, tied: bool) -> int:
    attention = 4 * (d_model * d_model + d_model)
    feed_forward = d_model * d_ff + d_ff + d_ff * d_model + d_model
    norms = 2 * (2 * d_model)
    embeddings = vocab_size * d_model * (1 if tied else 2) + max_seq_len * d_model
    return n_layers * (attention + feed_forward + norms) + 2 * d_model + embeddings


def check_parameters(answer: Callable) -> str | None:
    def case(name: str, look: str, *args) -> str | None:
        return compare(answer, args, decoder_parameters(*args), name, look)

    return first_complaint(
        lambda: case("no layers, 10 tokens, width 4", "embeddings, positions, and a last norm", 4, 16, 0, 10, 6, True),
        lambda: case("one layer of width 4", "every Linear and every norm has a bias", 4, 12, 1, 10, 6, True),
        lambda: case("untied output", "the output then has a matrix of its own, without bias", 4, 12, 2, 10, 6, False),
        lambda: case("GPT-2 small", "it has 124,439,808", 768, 3072, 12, 50_257, 1024, True),
    )


# 6. The linear bias of ALiBi, also behind a cache


def alibi_bias(n_heads: int, n_query: int, n_key: int) -> Tensor:
    slopes = [2 ** (-8 * (head + 1) / n_heads) for head in range(n_heads)]
    bias = torch.zeros(n_heads, n_query, n_key, dtype=torch.float64)
    for head, slope in enumerate(slopes):
        for query in range(n_query):
            for key in range(n_key):
                bias[head, query, key] = -slope * abs(n_key - n_query + query - key)
    return bias


def alibi_from(n_heads: int, n_query: int, n_key: int, first: float, sign: float, behind: bool) -> Tensor:
    heads = torch.arange(n_heads, dtype=torch.float64)
    slopes = 2 ** (-8 * (heads + first) / n_heads)
    query = torch.arange(n_query) + (n_key - n_query if behind else 0)
    return sign * slopes[:, None, None] * (query[:, None] - torch.arange(n_key)).abs()


def check_alibi(answer: Callable) -> str | None:
    def case(look: str, *args: int) -> str | None:
        name = f"{args[0]} heads, {args[1]} queries, {args[2]} keys"
        allowed = torch.ones(args[1:], dtype=torch.bool).tril(args[2] - args[1])  # (query, key), no key ahead

        def seen(*sizes: int) -> object:
            bias = answer(*sizes)
            if not isinstance(bias, Tensor) or bias.shape != (sizes[0], *allowed.shape):
                return bias
            return bias.masked_fill(~allowed, 0)

        return compare(seen, args, alibi_bias(*args).masked_fill(~allowed, 0), name, look)

    return first_complaint(
        lambda: case("far keys get less: the bias is 0 on the diagonal and negative before it", 1, 3, 3),
        lambda: case("head 1 of 8 has the slope 1/2, head 8 the slope 1/256", 8, 2, 2),
        lambda: case("behind a cache the last query stands at the last key", 4, 1, 5),
        lambda: case("several queries behind a cache: query i stands at position n_key - n_query + i", 4, 2, 5),
    )


# 7. What a cache weighs


def cache_bytes(
    n_layers: int, n_heads: int, d_head: int, batch_size: int, n_positions: int, bytes_per_number: int
) -> int:
    return 2 * n_layers * n_heads * d_head * batch_size * n_positions * bytes_per_number


def check_cache(answer: Callable) -> str | None:
    def case(name: str, look: str, *args: int) -> str | None:
        return compare(answer, args, cache_bytes(*args), name, look)

    return first_complaint(
        lambda: case("one layer, one head of width 1, one position, one byte", "a key and a value", 1, 1, 1, 1, 1, 1),
        lambda: case("all sizes different", "all six sizes multiply", 2, 3, 5, 7, 11, 4),
        lambda: case("GPT-2 small, 1,024 positions, bf16", "37,748,736 bytes", 12, 12, 64, 1, 1024, 2),
    )


EXERCISES = [
    Exercise(
        name="layer_norm",
        statement="Layer normalisation over the last axis with eps = 1e-5 inside the root, and by hand the gradient "
        "for x of a loss whose gradient for the output is grad_output. Works for any number of leading axes.",
        signature="layer_norm(x, weight, bias, grad_output) -> (output, grad_x)",
        hint="With n the normalised x and g = grad_output * weight: take from g its mean and n times the mean of g n, "
        "then divide by the root.",
        check=check_layer_norm,
        solution=layer_norm,
        mistakes={
            "needs a leading axis": lambda x, weight, bias, grad_output: (
                layer_norm(x, weight, bias, grad_output) if x.dim() > 1 else (x, x)
            ),
            "unbiased variance": lambda x, weight, bias, grad_output: layer_norm_from(
                x,
                weight,
                bias,
                grad_output,
                lambda c: (c.pow(2).sum(-1, keepdim=True) / (c.shape[-1] - 1) + 1e-5).sqrt(),
            ),
            "eps outside the root": lambda x, weight, bias, grad_output: layer_norm_from(
                x, weight, bias, grad_output, lambda c: c.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5
            ),
            "statistics treated as constants": lambda x, weight, bias, grad_output: layer_norm_from(
                x, weight, bias, grad_output, rooted, project=False
            ),
            "weight left out of the gradient": lambda x, weight, bias, grad_output: layer_norm_from(
                x, weight, bias, grad_output, rooted, first=False
            ),
            "changes its input": lambda x, weight, bias, grad_output: (
                layer_norm(x, weight, bias, grad_output),
                x.sub_(1),
            )[0],
        },
    ),
    Exercise(
        name="rotate",
        statement="Rotary positions in the layout of pairs: turn features (2i, 2i+1) of x, shape (..., seq, width), "
        "counter-clockwise by positions / 10000^(2i/width). positions has shape (seq).",
        signature="rotate(x, positions) -> tensor of x's shape",
        hint="x[..., 0::2] and x[..., 1::2] are the two coordinates; both new values need both old ones.",
        check=check_rotate,
        solution=rotate,
        mistakes={
            "turns clockwise": rotate_backwards,
            "halves instead of pairs": rotate_in_halves,
            "ignores where the positions start": rotate_from_zero,
            "assumes that positions follow each other": rotate_consecutive,
            "one speed for all pairs": rotate_one_speed,
        },
    ),
    Exercise(
        name="sinusoidal_table",
        statement="The table of Vaswani et al. 2017: column 2i of row pos is sin(pos / 10000^(2i/d_model)), column "
        "2i+1 its cosine, in float64. Odd widths end on a sine.",
        signature="sinusoidal_table(n_positions, d_model) -> tensor (n_positions, d_model)",
        hint="The exponent of column c is (c - c % 2) / d_model.",
        check=check_sinusoidal_table,
        solution=sinusoidal_table,
        mistakes={
            "exponent c instead of 2i": lambda n_positions, d_model: table_with(n_positions, d_model, lambda c: c),
            "exponent i instead of 2i": lambda n_positions, d_model: table_with(n_positions, d_model, lambda c: c // 2),
            "positions from 1": lambda n_positions, d_model: table_with(
                n_positions, d_model, lambda c: c - c % 2, start=1
            ),
            "sines in one half, cosines in the other": lambda n_positions, d_model: table_with(
                n_positions, d_model, lambda c: c - c % 2, halves=True
            ),
        },
    ),
    Exercise(
        name="pre_norm_block",
        statement="Wire a causal pre-norm block. norms is a pair of functions; attention(x, mask) and feed_forward(x) "
        "are functions too; x has shape (batch, seq, d_model). Build the causal mask (seq, seq): bool, "
        "True = may attend.",
        signature="pre_norm_block(x, norms, attention, feed_forward) -> tensor of x's shape",
        hint="Twice x + f(norm(x)), and the second time x is the result of the first.",
        check=check_block,
        solution=pre_norm_block,
        mistakes={
            "post-norm": post_norm_block,
            "adds to the normalised stream": normed_stream_block,
            "mask upside down": inverted_mask_block,
            "both sub-layers side by side": parallel_block,
            "one norm for both": one_norm_block,
        },
    ),
    Exercise(
        name="decoder_parameters",
        statement="Parameters of a decoder-only model with learned positions: attention and feed-forward network with "
        "biases, two norms (scale and shift) in each layer and one at the end, an output matrix without bias that is "
        "the embedding matrix if tied.",
        signature="decoder_parameters(d_model, d_ff, n_layers, vocab_size, max_seq_len, tied) -> int",
        hint="Four square matrices, two of d_model x d_ff, and do not forget the vectors. GPT-2 small has 124,439,808.",
        check=check_parameters,
        solution=decoder_parameters,
        mistakes={
            "12 L d^2 and the embeddings": lambda d_model, d_ff, n_layers, vocab_size, max_seq_len, tied: (
                12 * n_layers * d_model**2 + (vocab_size * (1 if tied else 2) + max_seq_len) * d_model
            ),
            "no last norm": lambda d_model, d_ff, n_layers, vocab_size, max_seq_len, tied: (
                decoder_parameters(d_model, d_ff, n_layers, vocab_size, max_seq_len, tied) - 2 * d_model
            ),
            "tied counted twice": lambda d_model, d_ff, n_layers, vocab_size, max_seq_len, tied: decoder_parameters(
                d_model, d_ff, n_layers, vocab_size, max_seq_len, False
            ),
            "no biases": lambda d_model, d_ff, n_layers, vocab_size, max_seq_len, tied: (
                decoder_parameters(d_model, d_ff, n_layers, vocab_size, max_seq_len, tied)
                - n_layers * (5 * d_model + d_ff)
            ),
        },
    ),
    Exercise(
        name="alibi_bias",
        statement="The bias of ALiBi for a power of two of heads: minus slope times (query - key position), slope "
        "2^(-8 h / n_heads) for head h = 1, 2, ... There may be fewer queries than keys (a cache): the last query "
        "stands at the last key. Entries for keys ahead of the query are not looked at: the causal mask removes them.",
        signature="alibi_bias(n_heads, n_query, n_key) -> tensor (n_heads, n_query, n_key)",
        hint="Query i stands at position n_key - n_query + i.",
        check=check_alibi,
        solution=alibi_bias,
        mistakes={
            "adds instead of subtracts": lambda n_heads, n_query, n_key: alibi_from(
                n_heads, n_query, n_key, 1, 1.0, True
            ),
            "heads from 0": lambda n_heads, n_query, n_key: alibi_from(n_heads, n_query, n_key, 0, -1.0, True),
            "minds the cache for a single query only": lambda n_heads, n_query, n_key: alibi_from(
                n_heads, n_query, n_key, 1, -1.0, n_query == 1
            ),
            "queries start at 0 behind a cache": lambda n_heads, n_query, n_key: alibi_from(
                n_heads, n_query, n_key, 1, -1.0, False
            ),
        },
    ),
    Exercise(
        name="cache_bytes",
        statement="Bytes of the keys and values that a decoder keeps after n_positions positions of each of batch_size "
        "sequences.",
        signature="cache_bytes(n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number) -> int",
        hint="A key and a value, for every layer, head, sequence and position.",
        check=check_cache,
        solution=cache_bytes,
        mistakes={
            "keys only": lambda n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number: (
                cache_bytes(n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number) // 2
            ),
            "one layer": lambda n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number: cache_bytes(
                1, n_heads, d_head, batch_size, n_positions, bytes_per_number
            ),
            "queries too": lambda n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number: (
                cache_bytes(n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number) * 3 // 2
            ),
            "scores kept too": lambda n_layers, n_heads, d_head, batch_size, n_positions, bytes_per_number: cache_bytes(
                n_layers, n_heads, d_head, batch_size, n_positions**2, bytes_per_number
            ),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
