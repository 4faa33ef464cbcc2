"""Topic 02 - Exercises: statements, checkers, solutions, and the planted mistakes that the checkers must reject.

python 02-sequence-modeling/exercises_02.py                # print the exercises
python 02-sequence-modeling/exercises_02.py my_answers.py  # check your answers
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import Exercise, first_difference, grade

# kneser_ney: pairs of words, discounted


def solve_kneser_ney(sequences, previous, word, discount, vocab_size):
    pairs = Counter(pair for sequence in sequences for pair in itertools.pairwise(sequence))
    before = Counter(last for _, last in pairs)  # different predecessors of each word
    mass = discount * len(before) / len(pairs)
    short = max(before[word] - discount, 0) / len(pairs) + mass / vocab_size
    after = {last: count for (first, last), count in pairs.items() if first == previous}
    if not after:
        return short
    total = sum(after.values())
    return max(after.get(word, 0) - discount, 0) / total + discount * len(after) / total * short


def occurrences_instead_of_predecessors(sequences, previous, word, discount, vocab_size):
    pairs = Counter(pair for sequence in sequences for pair in itertools.pairwise(sequence))
    words = Counter(last for sequence in sequences for last in sequence[1:])
    total = sum(words.values())
    short = max(words[word] - discount, 0) / total + discount * len(words) / total / vocab_size
    after = {last: count for (first, last), count in pairs.items() if first == previous}
    if not after:
        return short
    total = sum(after.values())
    return max(after.get(word, 0) - discount, 0) / total + discount * len(after) / total * short


def short_context_without_uniform(sequences, previous, word, discount, vocab_size):
    pairs = Counter(pair for sequence in sequences for pair in itertools.pairwise(sequence))
    before = Counter(last for _, last in pairs)
    short = before[word] / len(pairs)
    after = {last: count for (first, last), count in pairs.items() if first == previous}
    if not after:
        return short
    total = sum(after.values())
    return max(after.get(word, 0) - discount, 0) / total + discount * len(after) / total * short


def one_discount_instead_of_one_for_each_kind(sequences, previous, word, discount, vocab_size):
    pairs = Counter(pair for sequence in sequences for pair in itertools.pairwise(sequence))
    before = Counter(last for _, last in pairs)
    short = max(before[word] - discount, 0) / len(pairs) + discount * len(before) / len(pairs) / vocab_size
    after = {last: count for (first, last), count in pairs.items() if first == previous}
    if not after:
        return short
    total = sum(after.values())
    return max(after.get(word, 0) - discount, 0) / total + discount / total * short


def no_fallback_for_an_unseen_context(sequences, previous, word, discount, vocab_size):
    if not any(previous in sequence[:-1] for sequence in sequences):
        return 1 / vocab_size
    return solve_kneser_ney(sequences, previous, word, discount, vocab_size)


def check_kneser_ney(answer):
    corpus = [[1, 4, 5, 2], [1, 4, 6, 2]]  # <bos> a b <eos>, <bos> a c <eos>
    for previous, word, expected, what in (
        (4, 5, 13 / 40, "b after a in the corpus worked by hand"),
        (4, 2, 7 / 40, "<eos> after a: never seen there, but two different words precede it"),
        (4, 7, 1 / 40, "a word that never occurs, after a"),
        (7, 2, 7 / 20, "<eos> after an unseen word: the short context alone"),
    ):
        advice = first_difference(answer(corpus, previous, word, 0.5, 8), expected, 1e-9)
        if advice:
            return f"{what}: {advice}; the short context counts different predecessors and is mixed with 1/vocab_size"
    longer = [[0, 3, 1, 3, 1, 3, 2], [0, 3, 3, 2], [0, 1, 3, 1, 2]]
    for discount in (0.3, 1.0):
        for previous in range(5):
            found = [answer(longer, previous, word, discount, 6) for word in range(6)]
            if not math.isclose(sum(found), 1, abs_tol=1e-9):
                return f"after word {previous} with discount {discount} the chances sum to {sum(found):.4f}, not to 1"
            expected = [solve_kneser_ney(longer, previous, word, discount, 6) for word in range(6)]
            advice = first_difference(found, expected, 1e-9)
            if advice:
                return f"all words after word {previous}, discount {discount}: {advice}; is each pair counted once?"
    return None


# lstm_step: four gates and two states


def solve_lstm_step(x, h, c, w_x, w_h, bias):
    i, f, g, o = (x @ w_x.T + h @ w_h.T + bias).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gates_in_the_order_of_the_formulas(x, h, c, w_x, w_h, bias):
    i, f, o, g = (x @ w_x.T + h @ w_h.T + bias).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def output_without_the_second_tanh(x, h, c, w_x, w_h, bias):
    i, f, g, o = (x @ w_x.T + h @ w_h.T + bias).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * c, c


def the_cell_detached(x, h, c, w_x, w_h, bias):
    return solve_lstm_step(x, h, c.detach(), w_x, w_h, bias)


def the_state_detached(x, h, c, w_x, w_h, bias):
    return solve_lstm_step(x, h.detach(), c, w_x, w_h, bias)


def states_in_the_other_order(x, h, c, w_x, w_h, bias):
    return solve_lstm_step(x, h, c, w_x, w_h, bias)[::-1]


def check_lstm_step(answer):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.LSTMCell(3, 5).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x, h, c = (torch.randn(2, width, generator=generator, dtype=torch.float64) for width in (3, 5, 5))
    weights = (layer.weight_ih, layer.weight_hh, (layer.bias_ih + layer.bias_hh).detach().requires_grad_())
    leaves = {"x": x, "h": h, "c": c, "w_x": weights[0], "w_h": weights[1]}
    for leaf in leaves.values():
        leaf.requires_grad_()
    wanted = layer(x, (h, c))
    found = answer(x, h, c, *weights)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        return f"return the pair (new h, new c), got {type(found).__name__}"
    for name, got, want in zip(("h", "c"), found, wanted, strict=True):
        advice = first_difference(got, want, 1e-9)
        if advice:
            return f"new {name} for batch 2, input 3, width 5: {advice}; gates: input, forget, candidate, output"
    if not (found[0].requires_grad and found[1].requires_grad):
        return "no gradient reaches what went in; do not detach"
    slopes, ours = (
        torch.autograd.grad(new_h.sum() + new_c.sum(), leaves.values(), allow_unused=True)
        for new_h, new_c in (wanted, found)
    )
    for name, slope, got in zip(leaves, slopes, ours, strict=True):
        advice = "there is none; do not detach it" if got is None else first_difference(got, slope, 1e-9)
        if advice:
            return f"the gradient with respect to {name}: {advice}"
    return None


# masked_loss: padding neither summed nor counted


def solve_masked_loss(logits, targets, pad_id):
    log_probs = F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    real = targets != pad_id
    return -(log_probs * real).sum() / real.sum().clamp(min=1)


def padding_counted(logits, targets, pad_id):
    log_probs = F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    return -(log_probs * (targets != pad_id)).mean()


def padding_predicted(logits, targets, pad_id):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mean_of_row_means(logits, targets, pad_id):
    log_probs = F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    real = targets != pad_id
    return -((log_probs * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def nothing_real_gives_nan(logits, targets, pad_id):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad_id)


def logits_masked_instead(logits, targets, pad_id):
    kept = logits * (targets != pad_id)[..., None]
    return F.cross_entropy(kept.flatten(0, 1), targets.flatten())


def softmax_spelled_out(logits, targets, pad_id):
    chances = (logits.exp() / logits.exp().sum(dim=-1, keepdim=True)).gather(-1, targets[..., None])[..., 0]
    real = targets != pad_id
    return -(chances.log() * real).sum() / real.sum().clamp(min=1)


def only_what_costs_is_counted(logits, targets, pad_id):
    nats = -F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0] * (targets != pad_id)
    return nats.sum() / (nats > 0).sum().clamp(min=1)


def check_masked_loss(answer):
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    targets = torch.tensor([[3, 5, 1, 0], [4, 0, 0, 0]])
    wanted = solve_masked_loss(logits, targets, 0)
    found = answer(logits, targets, 0)
    advice = first_difference(found, wanted, 1e-9)
    if advice:
        return f"two rows with 3 and 1 real targets: {advice}; leave padding out of the sum and out of the count"
    (slope,) = torch.autograd.grad(found, logits)
    if slope[targets == 0].abs().max() > 0:
        return "the gradient at padded positions is not 0"
    sure = 1000 * F.one_hot(torch.tensor([[3, 5, 2, 0], [4, 0, 0, 0]]), 6).double()  # one of 4 real tokens is wrong
    advice = first_difference(answer(sure, targets, 0), 250.0, 1e-9)
    if advice:
        return (
            f"logits of 1,000, three tokens sure and right, one sure and wrong: {advice}; what overflows, what counts?"
        )
    alone = answer(logits[:1, :3], targets[:1, :3], 0)
    padded = answer(logits[:1], targets[:1], 0)
    if first_difference(padded, alone.item(), 1e-9):
        return f"one row costs {padded.item():.4f} with a padded position and {alone.item():.4f} without"
    empty = answer(logits, torch.zeros_like(targets), 0)
    advice = first_difference(empty, 0.0, 1e-9)
    if advice:
        return f"a batch of padding alone: {advice}; nothing to predict costs nothing"
    other = answer(logits, torch.tensor([[3, 5, 1, 2], [4, 2, 2, 2]]), 2)
    return f"with pad_id 2: {other.item()}" if first_difference(other, wanted.item(), 1e-9) else None


# clip_gradients: one factor for all


def solve_clip_gradients(gradients, max_norm):
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    factor = min(1.0, max_norm / norm) if norm else 1.0
    return [gradient * factor for gradient in gradients], norm


def each_tensor_by_itself(gradients, max_norm):
    clipped = [solve_clip_gradients([gradient], max_norm)[0][0] for gradient in gradients]
    return clipped, solve_clip_gradients(gradients, max_norm)[1]


def each_number_by_itself(gradients, max_norm):
    return [gradient.clamp(-max_norm, max_norm) for gradient in gradients], solve_clip_gradients(gradients, 1.0)[1]


def always_rescaled(gradients, max_norm):
    norm = solve_clip_gradients(gradients, max_norm)[1]
    return [gradient * (max_norm / norm) if norm else gradient for gradient in gradients], norm


def norm_after_clipping(gradients, max_norm):
    clipped, norm = solve_clip_gradients(gradients, max_norm)
    return clipped, min(norm, max_norm)


def inputs_changed(gradients, max_norm):
    clipped, norm = solve_clip_gradients(gradients, max_norm)
    for gradient, smaller in zip(gradients, clipped, strict=True):
        gradient.copy_(smaller)
    return gradients, norm


def stacked_as_if_of_one_shape(gradients, max_norm):
    norm = torch.stack(gradients).norm().item()
    return [gradient * min(1.0, max_norm / (norm or 1.0)) for gradient in gradients], norm


def returned_as_vectors(gradients, max_norm):
    clipped, norm = solve_clip_gradients(gradients, max_norm)
    return [gradient.flatten() for gradient in clipped], norm


def check_clip_gradients(answer):
    for numbers, max_norm, what in (
        ([[3.0, 0.0], [0.0, 4.0]], 1.0, "joint length 5, limit 1"),
        ([[0.3, 0.0], [0.0, 0.4]], 1.0, "joint length 0.5, limit 1: nothing to do"),
        ([[6.0, 8.0], [0.0, 0.0]], 5.0, "joint length 10, limit 5"),
        ([[0.0, 0.0], [0.0, 0.0]], 1.0, "no gradient at all"),
        ([[[2.0, 0.0, 4.0], [0.0, 4.0, 0.0]], [0.0, 8.0, 0.0, 0.0]], 5.0, "shapes (2, 3) and (4,), joint length 10"),
    ):
        gradients = [torch.tensor(part, dtype=torch.float64) for part in numbers]
        wanted, found = solve_clip_gradients(gradients, max_norm), answer(gradients, max_norm)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"return the pair (list of tensors, norm before), got {type(found).__name__}"
        advice = first_difference(list(found[0]), wanted[0], 1e-9)
        if advice:
            return f"{what}: {advice}; one factor serves all tensors, and never lengthens"
        advice = first_difference(found[1], wanted[1], 1e-9)
        if advice:
            return f"{what}, the norm: {advice}; report it as it was before clipping"
        if [part.tolist() for part in gradients] != numbers:
            return f"{what}: the given tensors were changed; return new ones"
    return None


# stream_rows: windows whose rows continue


def solve_stream_rows(token_ids, batch_size, seq_len):
    width = len(token_ids) // batch_size
    rows = token_ids[: batch_size * width].view(batch_size, width)
    starts = range(0, width - seq_len, seq_len)
    return [(rows[:, at : at + seq_len], rows[:, at + 1 : at + seq_len + 1]) for at in starts]


def windows_after_windows(token_ids, batch_size, seq_len):
    n_windows = (len(token_ids) - 1) // (batch_size * seq_len)
    used = n_windows * batch_size * seq_len
    inputs = token_ids[:used].view(n_windows, batch_size, seq_len)
    targets = token_ids[1 : used + 1].view(n_windows, batch_size, seq_len)
    return list(zip(inputs, targets, strict=True))


def targets_not_shifted(token_ids, batch_size, seq_len):
    return [(inputs, inputs) for inputs, _ in solve_stream_rows(token_ids, batch_size, seq_len)]


def windows_that_overlap(token_ids, batch_size, seq_len):
    width = len(token_ids) // batch_size
    rows = token_ids[: batch_size * width].view(batch_size, width)
    starts = range(0, width - seq_len)
    return [(rows[:, at : at + seq_len], rows[:, at + 1 : at + seq_len + 1]) for at in starts]


def targets_rolled_around(token_ids, batch_size, seq_len):
    windows = solve_stream_rows(token_ids, batch_size, seq_len)
    return [(inputs, inputs.roll(-1, dims=1)) for inputs, _ in windows]


def check_stream_rows(answer):
    for length, batch_size, seq_len in ((23, 2, 3), (24, 3, 2), (40, 4, 3)):
        token_ids = torch.arange(100, 100 + length)
        what = f"{length} tokens in {batch_size} rows, {seq_len} at a time"
        found = list(answer(token_ids, batch_size, seq_len))
        wanted = solve_stream_rows(token_ids, batch_size, seq_len)
        if len(found) != len(wanted):
            return f"{what}: {len(found)} windows, expected {len(wanted)}; each token is an input at most once"
        for number, (pair, expected) in enumerate(zip(found, wanted, strict=True)):
            for name, got, want in zip(("inputs", "targets"), pair, expected, strict=True):
                advice = first_difference(got, want)
                if advice:
                    return (
                        f"{what}, {name} of window {number}: {advice}; row k must continue row k of the window before"
                    )
    return None


# combine: two linear steps as one


def solve_combine(first, second):
    return second[0] * first[0], second[0] * first[1] + second[1]


def in_the_other_order(first, second):
    return first[0] * second[0], first[0] * second[1] + first[1]


def increments_added(first, second):
    return first[0] * second[0], first[1] + second[1]


def factors_added(first, second):
    return first[0] + second[0], second[0] * first[1] + second[1]


def increment_scaled_twice(first, second):
    return first[0] * second[0], second[0] * (first[1] + second[1])


def first_overwritten(first, second):
    if not isinstance(first[0], Tensor):
        return solve_combine(first, second)
    return first[0].mul_(second[0]), first[1].mul_(second[0]).add_(second[1])


def check_combine(answer):
    two = answer((2.0, 1.0), (3.0, 5.0))
    advice = first_difference(list(two) if isinstance(two, tuple | list) else two, [6.0, 8.0], 1e-9)
    if advice:
        return f"first h -> 2h + 1, then h -> 3h + 5: {advice}; apply both to h = 0 and to h = 1 on paper"
    steps = [(2.0, 1.0), (0.0, 4.0), (-1.0, 3.0), (0.5, 2.0)]
    h = 7.0
    for factor, increment in steps:
        h = factor * h + increment
    left = steps[0]
    for step in steps[1:]:
        left = answer(left, step)
    right = answer(answer(steps[0], steps[1]), answer(steps[2], steps[3]))
    for name, (factor, increment) in (("one after the other", left), ("in pairs", right)):
        if not math.isclose(factor * 7.0 + increment, h, abs_tol=1e-9):
            return f"four steps joined {name} send 7 to {factor * 7.0 + increment}, the loop sends it to {h}"
    tensors = [
        (torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0])),
        (torch.tensor([0.5, -1.0]), torch.tensor([4.0, 1.0])),
    ]
    found = answer(*tensors)
    if not all(isinstance(part, Tensor) for part in found):
        return "factors and increments may be tensors; multiply place by place"
    advice = first_difference(list(found), [torch.tensor([1.0, -3.0]), torch.tensor([4.5, 1.0])], 1e-6)
    if not advice and tensors[0][0].tolist() + tensors[0][1].tolist() != [2.0, 3.0, 1.0, 0.0]:
        return "the given tensors were changed; return new ones"
    return advice


EXERCISES = [
    Exercise(
        "kneser_ney",
        "The probability of `word` after `previous` by interpolated Kneser-Ney pairs; `sequences` are lists of ids. The"
        " short context counts different predecessors and is mixed with 1/vocab_size; an unseen `previous` falls back.",
        "kneser_ney(sequences, previous, word, discount, vocab_size) -> float",
        "A Counter of pairs serves the long context; its keys, each once, serve the short one.",
        check_kneser_ney,
        solve_kneser_ney,
        {
            "occurrences instead of predecessors": occurrences_instead_of_predecessors,
            "the short context without discount": short_context_without_uniform,
            "one discount for a context": one_discount_instead_of_one_for_each_kind,
            "no fallback": no_fallback_for_an_unseen_context,
        },
    ),
    Exercise(
        "lstm_step",
        "One step of an LSTM. x is (batch, d_input), h and c are (batch, d_hidden), w_x (4 d_hidden, d_input), "
        "w_h (4 d_hidden, d_hidden), bias (4 d_hidden); gates in torch's order: input, forget, candidate, output.",
        "lstm_step(x, h, c, w_x, w_h, bias) -> (new h, new c)",
        "(x @ w_x.T + h @ w_h.T + bias).chunk(4, dim=-1); sigmoid for gates, tanh for the candidate.",
        check_lstm_step,
        solve_lstm_step,
        {
            "gates in another order": gates_in_the_order_of_the_formulas,
            "no tanh around the cell": output_without_the_second_tanh,
            "cell detached": the_cell_detached,
            "state detached": the_state_detached,
            "states swapped": states_in_the_other_order,
        },
    ),
    Exercise(
        "masked_loss",
        "Mean nats over the real targets. logits are (batch, seq, vocab), targets (batch, seq) hold pad_id where there "
        "is nothing to predict; a batch of padding alone costs 0.",
        "masked_loss(logits, targets, pad_id) -> loss",
        "Both the sum and the count must leave padding out.",
        check_masked_loss,
        solve_masked_loss,
        {
            "padding in the count": padding_counted,
            "padding predicted": padding_predicted,
            "a mean of row means": mean_of_row_means,
            "NaN for an empty batch": nothing_real_gives_nan,
            "logits masked": logits_masked_instead,
            "softmax without log_softmax": softmax_spelled_out,
            "only losses above 0 counted": only_what_costs_is_counted,
        },
    ),
    Exercise(
        "clip_gradients",
        "Rescale a list of tensors of any shapes so that their joint length is at most max_norm, exactly (no small "
        "constant added) and without changing the given ones; return the new list and the joint length before.",
        "clip_gradients(gradients, max_norm) -> (list of tensors, float)",
        "The joint length is the root of the sum of all squares; one factor, at most 1.",
        check_clip_gradients,
        solve_clip_gradients,
        {
            "each tensor by itself": each_tensor_by_itself,
            "each number by itself": each_number_by_itself,
            "short gradients lengthened": always_rescaled,
            "the norm after clipping": norm_after_clipping,
            "inputs changed": inputs_changed,
            "stacked": stacked_as_if_of_one_shape,
            "flattened": returned_as_vectors,
        },
    ),
    Exercise(
        "stream_rows",
        "Cut one long tensor of ids into (inputs, targets) windows, each (batch_size, seq_len): row k of a window "
        "continues row k of the one before, targets are one step ahead. A row takes len(token_ids) // batch_size "
        "tokens of the text, targets included; what does not fill a window is dropped.",
        "stream_rows(token_ids, batch_size, seq_len) -> list of (inputs, targets)",
        "Fold into batch_size long rows, then cut columns; the last window needs one more token for its targets.",
        check_stream_rows,
        solve_stream_rows,
        {
            "windows one after the other": windows_after_windows,
            "no shift": targets_not_shifted,
            "overlapping windows": windows_that_overlap,
            "targets rolled around": targets_rolled_around,
        },
    ),
    Exercise(
        "combine",
        "Two steps h -> a h + b, each a pair (a, b) of numbers or tensors, as one step: `first` is applied first.",
        "combine(first, second) -> (a, b)",
        "Multiply out a2 (a1 h + b1) + b2.",
        check_combine,
        solve_combine,
        {
            "the other order": in_the_other_order,
            "increments added": increments_added,
            "factors added": factors_added,
            "increment scaled twice": increment_scaled_twice,
            "first overwritten": first_overwritten,
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
