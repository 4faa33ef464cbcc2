"""Topic 02: our recurrent layers against torch's, counting against its definition, every model against the entropy."""

import itertools
import json
import math
import re
from collections import Counter
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sequence_modeling as topic
from exercises_02 import solve_kneser_ney
from sequence_modeling import (
    BOS_ID,
    CELLS,
    EOS_ID,
    GRU,
    IGNORE,
    LSTM,
    RNN,
    BagOfWords,
    LanguageModel,
    NGramModel,
    Seq2Seq,
    Vocabulary,
    bits_per_byte,
    check_token_ids,
    copy_batch,
    document_batches,
    document_losses,
    echo_batch,
    fit,
    fit_stream,
    gap_to_floor,
    generate_ids,
    linear_recurrence,
    linear_scan,
    perplexity,
    recall_batch,
    sample_ids,
    stream_batches,
    stream_nats,
)
from tiny_world import World
from workbench import seed_everything

BATCH, SEQ, D_INPUT, D_HIDDEN = 4, 7, 3, 5  # all different, so that a swapped axis cannot pass
LENGTHS = [7, 1, 4, 6]
LAYERS = {"RNN": (RNN, nn.RNN, nn.RNNCell), "LSTM": (LSTM, nn.LSTM, nn.LSTMCell), "GRU": (GRU, nn.GRU, nn.GRUCell)}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def vocabulary(world) -> Vocabulary:
    return Vocabulary(world.vocabulary())


@pytest.fixture(scope="module")
def counted(world, vocabulary) -> dict[int, NGramModel]:
    """Order -> a model that has counted the same 2,000 documents."""
    sequences = [[BOS_ID, *vocabulary.encode(document.tokens)] for document in world.documents(2000, 5, "train")]
    return {order: NGramModel(order, len(vocabulary)).fit(sequences) for order in (1, 2, 3, 5)}


def parts_of(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def twins(name: str, n_layers: int = 1, seed: int = 0):
    """Torch's layer and ours with its weights, in float64."""
    torch.manual_seed(seed)
    ours_cls, theirs_cls, _ = LAYERS[name]
    theirs = theirs_cls(D_INPUT, D_HIDDEN, n_layers, batch_first=True, dtype=torch.float64)
    return ours_cls(D_INPUT, D_HIDDEN, n_layers).double().load_torch(theirs), theirs


def inputs_of(name: str, n_layers: int) -> tuple[torch.Tensor, torch.Tensor | tuple]:
    x = torch.randn(BATCH, SEQ, D_INPUT, dtype=torch.float64, requires_grad=True)
    shape = (n_layers, BATCH, D_HIDDEN)
    parts = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "LSTM")))
    return x, parts if len(parts) > 1 else parts[0]


def run_torch(theirs: nn.RNNBase, x: torch.Tensor, state, lengths: list[int] | None):
    if lengths is None:
        return theirs(x, state)
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = theirs(rows, state)
    return nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


# Parity


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("started", [False, True])
def test_layer_matches_torch(name, n_layers, lengths, started, parity) -> None:
    ours, theirs = twins(name, n_layers)
    x, state = inputs_of(name, n_layers)
    given = state if started else None
    results, gradients = [], []
    for layer, run in ((ours, lambda: ours(x, given, lengths)), (theirs, lambda: run_torch(theirs, x, given, lengths))):
        outputs, final = run()
        results.append([outputs, *parts_of(final)])
        weights = torch.linspace(-1, 2, outputs.numel(), dtype=torch.float64).view_as(outputs)
        loss = (outputs * weights).sum() + sum((part**2).sum() for part in parts_of(final))
        parameters = [pair[layer is theirs] for pair in ours.weight_pairs(theirs)]
        wanted = [x, *parameters, *(parts_of(state) if started else [])]
        gradients.append(torch.autograd.grad(loss, wanted))
    oracle = f"nn.{name}" + (", packed" if lengths else "")
    parity(name, oracle, "output", *results, 1e-10)
    parity(name, oracle, "gradient", *gradients, 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_cell_matches_torch(name, parity) -> None:
    ours_cls, _, cell_cls = LAYERS[name]
    torch.manual_seed(1)
    ours, theirs = ours_cls.cell_cls(D_INPUT, D_HIDDEN).double(), cell_cls(D_INPUT, D_HIDDEN, dtype=torch.float64)
    weights = [ours.input_proj.weight, ours.state_proj.weight, ours.input_proj.bias, ours.state_proj.bias]
    for parameter, weight in zip(theirs.parameters(), weights, strict=True):
        parameter.data.copy_(weight.data)
    x = torch.randn(BATCH, D_INPUT, dtype=torch.float64)
    parts = tuple(torch.randn(BATCH, D_HIDDEN, dtype=torch.float64) for _ in range(ours.n_states))
    state = parts if ours.n_states > 1 else parts[0]
    actual, expected = parts_of(ours(x, state)), parts_of(theirs(x, state))
    parity(f"{name}Cell", f"nn.{name}Cell", "output", actual, expected, 1e-10)
    losses = [sum((part**2).sum() for part in found) for found in (actual, expected)]
    gradients = torch.autograd.grad(losses[0], weights), torch.autograd.grad(losses[1], list(theirs.parameters()))
    parity(f"{name}Cell", f"nn.{name}Cell", "gradient", *gradients, 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_go_to_torch_and_back(name, parity) -> None:
    torch.manual_seed(2)
    ours = LAYERS[name][0](D_INPUT, D_HIDDEN, 2)
    back = LAYERS[name][0](D_INPUT, D_HIDDEN, 2).load_torch(ours.to_torch())
    parity(name, f"nn.{name}", "exchange", back.state_dict(), ours.state_dict(), 0.0)
    assert isinstance(ours.to_torch(), LAYERS[name][1])


@pytest.mark.parametrize("name", LAYERS)
def test_fifty_training_steps_match_torch(name, parity) -> None:
    ours, theirs = twins(name, n_layers=2)
    heads = [nn.Linear(D_HIDDEN, 2, dtype=torch.float64) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    x, target = torch.randn(BATCH, SEQ, D_INPUT).double(), torch.randn(BATCH, SEQ, 2).double()
    curves = []
    for head, layer, run in ((heads[0], ours, ours), (heads[1], theirs, None)):
        optimizer, losses = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.03), []
        for _ in range(50):
            outputs, _ = run(x, None, LENGTHS) if run else run_torch(theirs, x, None, LENGTHS)
            loss = F.mse_loss(head(outputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    parity(name, f"nn.{name}", "trajectory", *curves, 1e-8)
    assert curves[0][-1] < 0.7 * curves[0][0]


@pytest.mark.parametrize("seq", [1, 2, 5, 8, 37])
@pytest.mark.parametrize("started", [False, True])
def test_scan_equals_loop(seq, started, parity) -> None:
    torch.manual_seed(seq)
    a = torch.randn(3, seq, 2, dtype=torch.float64)
    a[:, seq // 2] = 0  # forgets everything: a scan that divides by products of a would fail here
    b, initial = torch.randn(3, seq, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    leaves = [a.requires_grad_(), b.requires_grad_(), *([initial.requires_grad_()] if started else [])]
    weights = torch.randn(3, seq, 2, dtype=torch.float64)
    found = [form(*leaves) for form in (linear_scan, linear_recurrence)]
    parity("linear_scan", "linear_recurrence", "output", *found, 1e-10)
    gradients = [torch.autograd.grad((states * weights).sum(), leaves) for states in found]
    parity("linear_scan", "linear_recurrence", "gradient", *gradients, 1e-10)


def test_bag_of_words_matches_embedding_bag(parity) -> None:
    """Torch's own mean of embeddings, given each bag by hand: a position's document from its <bos> on."""
    torch.manual_seed(4)
    model, token_ids = (
        BagOfWords(9, 5).double(),
        torch.tensor([[BOS_ID, 7, 4, EOS_ID, BOS_ID, 8], [6, 6, BOS_ID, 5, 5, 4]]),
    )
    bags = []
    for row in token_ids.tolist():
        for end in range(len(row)):
            start = max((index for index in range(end + 1) if row[index] == BOS_ID), default=0)
            bags.append(row[start : end + 1])
    offsets = torch.tensor([0, *itertools.accumulate(map(len, bags))][:-1])
    weights = torch.linspace(-1, 2, 2 * 6 * 9, dtype=torch.float64).view(2, 6, 9)
    results, gradients = [], []
    for ours in (True, False):
        mean = F.embedding_bag(torch.tensor(sum(bags, [])), model.token_emb.weight, offsets, mode="mean")
        logits = model(token_ids) if ours else model.lm_head(model.hidden_proj(mean).tanh()).view(2, 6, 9)
        results.append(logits)
        gradients.append(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))
    parity("BagOfWords", "F.embedding_bag", "output", *results, 1e-10)
    parity("BagOfWords", "F.embedding_bag", "gradient", *gradients, 1e-10)


def test_scan_costs_three_multiplications_a_step_and_the_loop_one() -> None:
    """What the chapter says of the price of the parallel form; a join costs two, a state filled in costs one."""

    class Counted(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.products += result.numel() if function is torch.ops.aten.mul.Tensor else 0
            return result

    def products(form, seq: int) -> int:
        with Counted() as counted:
            form(torch.rand(1, seq, 1), torch.rand(1, seq, 1))
        return counted.products

    assert products(linear_recurrence, 1024) == 1024
    assert 2.9 * 1024 < products(linear_scan, 1024) < 3 * 1024


def kneser_ney_by_definition(documents: list[list[int]], order: int, vocab_size: int, discount: float):
    """p(word, context) straight from the formula, with a Counter for each length; slow and short."""
    counts = [Counter() for _ in range(order)]
    for document in documents:
        for position in range(1, len(document)):
            length = min(position, order - 1)
            counts[length][tuple(document[position - length : position + 1])] += 1
    for length in reversed(range(order - 1)):
        counts[length].update(longer[1:] for longer in counts[length + 1])

    def probability(word: int, context: tuple[int, ...]) -> float:
        shorter = probability(word, context[1:]) if context else 1 / vocab_size
        after = {key[-1]: count for key, count in counts[len(context)].items() if key[:-1] == context}
        if not after:
            return shorter
        total = sum(after.values())
        return (max(after.get(word, 0) - discount, 0) + discount * len(after) * shorter) / total

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_equals_its_definition(order, parity) -> None:
    rng, vocab_size = np.random.default_rng(order), 8
    documents = [[BOS_ID, *rng.integers(4, 7, rng.integers(1, 9)).tolist(), EOS_ID] for _ in range(30)]
    model = NGramModel(order, vocab_size, discount=0.7).fit(documents)
    probability = kneser_ney_by_definition(documents, order, vocab_size, 0.7)
    rows = [[BOS_ID, 4, 5, 6, 4], [5, 5, BOS_ID, 4, 4], [7, 6, 7, 4, 5]]  # a packed row, a word never seen
    expected = []
    for row in rows:
        for position in range(len(row)):
            start = max(index for index in range(position + 1) if row[index] == BOS_ID or index == 0)
            context = tuple(row[max(start, position - order + 2) : position + 1]) if order > 1 else ()
            expected.append([probability(word, context) for word in range(vocab_size)])
    actual = model(torch.tensor(rows)).exp().view(-1, vocab_size)
    parity("NGramModel", "definition of interpolated Kneser-Ney", "output", actual, np.array(expected), 1e-12)


# Invariants


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_sums_to_one_after_every_context(order) -> None:
    rng, vocab_size = np.random.default_rng(0), 9
    documents = [[BOS_ID, *rng.integers(4, 8, rng.integers(1, 7)).tolist(), EOS_ID] for _ in range(20)]
    model = NGramModel(order, vocab_size).fit(documents)
    contexts = torch.tensor(list(itertools.product(range(vocab_size), repeat=3)))  # most of them never seen
    rows = model(contexts).exp()
    torch.testing.assert_close(rows.sum(-1), torch.ones(contexts.shape, dtype=torch.float64), rtol=0, atol=1e-12)
    assert rows.min() > 0


def test_longer_contexts_and_more_data_help(world, vocabulary, counted) -> None:
    fresh = world.documents(100, 5, "validation")
    few = [[BOS_ID, *vocabulary.encode(document.tokens)] for document in world.documents(200, 5, "train")]
    less = sum(document_losses(NGramModel(3, len(vocabulary)).fit(few), fresh, vocabulary))
    nats = {order: sum(document_losses(model, fresh, vocabulary)) for order, model in counted.items()}
    assert nats[1] > nats[2] > nats[3] > nats[5]
    assert less > nats[3]


@pytest.mark.parametrize("name", LAYERS)
def test_padding_changes_nothing(name, parity) -> None:
    ours, _ = twins(name, n_layers=2)
    x, state = inputs_of(name, 2)
    outputs, final = ours(x, state, LENGTHS)
    noisy = x.detach().clone()
    for row, length in enumerate(LENGTHS):
        noisy[row, length:] = float("nan")  # whatever stands there
        alone, end = ours(x[row : row + 1, :length], one_row(state, row))
        parity(name, "the unpadded row alone", "invariant", outputs[row, :length], alone[0], 1e-12)
        parity(name, "the unpadded row alone", "invariant", parts_of(one_row(final, row)), parts_of(end), 1e-12)
        assert not outputs[row, length:].any()
    noisy.requires_grad_()
    again, _ = ours(noisy, state, LENGTHS)
    torch.testing.assert_close(again, outputs, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(again.sum(), noisy)
    assert gradient.isfinite().all()


def one_row(state, row: int):
    parts = tuple(part[:, row : row + 1] for part in parts_of(state))
    return parts if len(parts) > 1 else parts[0]


def some_end_early(generated: torch.Tensor) -> bool:
    """Whether at least one row goes on for two tokens after another row's <eos>."""
    ends = [row.index(EOS_ID) if EOS_ID in row else len(row) for row in generated.tolist()]
    return max(ends) >= min(ends) + 2


def lively(model: nn.Module, seed: int) -> nn.Module:
    """The model with large random weights, so that greedy answers differ from row to row."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def causal_models(vocab_size: int) -> list:
    rng = np.random.default_rng(3)
    documents = [[BOS_ID, *rng.integers(4, vocab_size, 9).tolist(), EOS_ID] for _ in range(50)]
    networks = [LanguageModel(vocab_size, 6, cell, 2) for cell in CELLS]
    return [*networks, BagOfWords(vocab_size, 6), NGramModel(3, vocab_size).fit(documents)]


def test_the_future_cannot_change_the_past() -> None:
    torch.manual_seed(0)
    token_ids = torch.randint(4, 11, (2, 9))
    changed = token_ids.clone()
    changed[:, 5:] = BOS_ID
    for model in causal_models(11):
        before, after = model(token_ids), model(changed)
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
        assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_reading_in_pieces_equals_reading_at_once(parity) -> None:
    torch.manual_seed(0)
    token_ids = torch.randint(4, 11, (2, 9))
    for model in causal_models(11):
        if not hasattr(model, "advance"):
            continue
        pieces, state = [], None
        for piece in token_ids.split([1, 4, 1, 3], dim=1):
            logits, state = model.advance(piece, state)
            pieces.append(logits)
        name = type(model).__name__
        parity(name, "the whole sequence at once", "invariant", torch.cat(pieces, 1), model(token_ids), 1e-6)
        targets = torch.randint(4, 11, (20,))
        wanted = F.cross_entropy(
            model(torch.cat([torch.tensor([BOS_ID]), targets[:-1]])[None])[0], targets, reduction="sum"
        )
        assert stream_nats(model, targets, chunk=6) == pytest.approx(wanted.item(), rel=1e-5)


def test_rows_of_a_stream_lose_only_memory() -> None:
    bigram = NGramModel(2, 11).fit([[BOS_ID, *np.random.default_rng(0).integers(4, 11, 90).tolist()]])
    targets = torch.randint(4, 11, (23,), generator=torch.Generator().manual_seed(0))
    once = stream_nats(bigram, targets)  # a bigram remembers one token, which every row is given
    assert [stream_nats(bigram, targets, n_rows) for n_rows in (2, 5, 23)] == pytest.approx([once] * 3)


def test_bag_of_words_counts_and_forgets_order() -> None:
    token_ids = torch.tensor([[BOS_ID, 5, 6, 5, EOS_ID, BOS_ID, 6]])
    counts = topic.document_so_far(token_ids)[0].float() @ F.one_hot(token_ids, 7)[0].float()
    assert counts[3].tolist() == [0, 1, 0, 0, 0, 2, 1]
    assert counts[6].tolist() == [0, 1, 0, 0, 0, 0, 1]  # the second document does not see the first
    shuffled = token_ids[:, [0, 3, 2, 1, 4, 5, 6]]
    torch.manual_seed(0)
    model, recurrent = BagOfWords(7, 4), LanguageModel(7, 4)
    torch.testing.assert_close(model(shuffled)[:, 3:], model(token_ids)[:, 3:])
    swapped = torch.tensor([[BOS_ID, 6, 5, 5, EOS_ID, BOS_ID, 6]])
    torch.testing.assert_close(model(swapped)[:, 4], model(token_ids)[:, 4])
    assert not torch.allclose(recurrent(swapped)[:, 4], recurrent(token_ids)[:, 4])
    mean = counts @ model.token_emb.weight / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(model.lm_head(torch.tanh(model.hidden_proj(mean))), model(token_ids)[0])


def test_seq2seq_is_not_changed_by_padding_or_by_its_neighbours(parity) -> None:
    model = lively(Seq2Seq(11, 9, 6), 30).double()
    lengths, tgt_ids = [5, 2, 3], torch.randint(4, 9, (3, 4))
    src_ids = torch.randint(4, 11, (3, 5))
    noise = src_ids.clone()
    for row, length in enumerate(lengths):
        noise[row, length:] = 0
    memory, state = model.encode(noise, lengths)
    assert memory.shape == (3, 5, 6) and state.shape == (3, 6)
    parity("Seq2Seq", "other padding", "invariant", model(src_ids, lengths, tgt_ids), model(noise, lengths, tgt_ids), 0)
    generated = model.generate(src_ids, torch.tensor(lengths), 7)
    for row, length in enumerate(lengths):
        alone = src_ids[row : row + 1, :length]
        logits = model(alone, [length], tgt_ids[row : row + 1])[0]
        parity("Seq2Seq", "the row alone", "invariant", model(src_ids, lengths, tgt_ids)[row], logits, 1e-12)
        expected, answer = model.generate(alone, [length], 7)[0].tolist(), generated[row].tolist()
        assert answer == expected + [0] * (len(answer) - len(expected))
    assert some_end_early(generated)


def test_generation_is_the_argmax_of_teacher_forcing() -> None:
    model = lively(Seq2Seq(11, 9, 6), 1)
    src_ids, lengths = torch.randint(4, 11, (6, 5)), [5, 2, 3, 4, 1, 5]
    generated = model.generate(src_ids, lengths, 8)
    tgt_ids = F.pad(generated[:, :-1], (1, 0), value=BOS_ID)
    assert some_end_early(generated)
    alive = (generated == EOS_ID).cumsum(1) - (generated == EOS_ID).int() == 0
    assert torch.equal(model(src_ids, lengths, tgt_ids).argmax(-1)[alive], generated[alive])
    assert not generated[~alive].any()


def test_document_batches_are_packed_and_repeatable(world, vocabulary) -> None:
    documents = world.documents(50, 1)
    whole = {tuple(vocabulary.encode(document.tokens)) for document in documents}
    first, again, other = (document_batches(documents, vocabulary, 3, 64, seed) for seed in (7, 7, 8))
    inputs, targets = next(first)
    assert inputs.shape == targets.shape == (3, 64) and (inputs[:, 0] == BOS_ID).all()
    for row_inputs, row_targets in zip(inputs.tolist(), targets.tolist(), strict=True):
        shifted = [IGNORE if token == BOS_ID else token for token in row_inputs[1:]]
        assert row_targets[:-1] == shifted
        starts = [index for index, token in enumerate(row_inputs) if token == BOS_ID]
        for start, end in itertools.pairwise(starts):
            assert tuple(row_inputs[start + 1 : end]) in whole
    assert (targets == IGNORE).sum() == (inputs[:, 1:] == BOS_ID).sum() + (targets[:, -1] == IGNORE).sum()
    rest = [torch.stack([next(batches)[0] for _ in range(5)]) for batches in (first, again, other)]
    assert torch.equal(rest[1][0], inputs) and torch.equal(rest[1][1:], rest[0][:4]), "one seed, one order"
    assert not torch.equal(rest[2], rest[1]), "another seed, another order"
    assert documents == world.documents(50, 1)  # the caller's list keeps its order


def test_document_batches_reshuffle_a_list_and_stream_an_iterator(world, vocabulary) -> None:
    documents = world.documents(4, 2)
    batches = document_batches(documents, vocabulary, 1, 2, seed=0)  # every row is the beginning of one document
    epochs = [[tuple(next(batches)[0][0].tolist()) for _ in documents] for _ in range(8)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1, "an epoch must show every document once"
    assert len({tuple(epoch) for epoch in epochs}) > 2, "epochs must differ in order"
    asked = []

    def stream():
        for number in itertools.count():
            asked.append(number)
            yield documents[number % 4]

    batches = document_batches(stream(), vocabulary, 2, 2, seed=0)
    next(batches)
    assert asked == [0, 1], "an endless iterator must be read no further than needed"
    assert len(list(document_batches(iter(documents), vocabulary, 3, 2, seed=0))) == 1  # 4 rows make one batch of 3


def test_stream_batches_continue_their_rows() -> None:
    token_ids = torch.arange(50)
    batches = stream_batches(token_ids, batch_size=2, seq_len=4)
    epoch = [next(batches) for _ in range(6)]
    assert [is_start for *_, is_start in epoch] == [True, *[False] * 5]
    for row in range(2):
        seen = torch.cat([inputs[row] for inputs, _, _ in epoch])
        assert seen.tolist() == list(range(25 * row, 25 * row + 24))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets, _ in epoch)
    assert next(batches)[2]


@pytest.mark.parametrize("make_batch", [copy_batch, recall_batch])
def test_memory_tasks_have_one_answer(make_batch) -> None:
    inputs, targets = make_batch(5, 6, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        middle = row.index(EOS_ID)
        shown, counted = row[:middle], [answer for answer in answers if answer != IGNORE]
        assert len(counted) == 6 and answers[:middle] == [IGNORE] * middle
        if make_batch is copy_batch:
            assert counted == shown and row[middle + 1 :] == shown[:-1]
        else:
            values = dict(zip(shown[::2], shown[1::2], strict=True))
            asked = [(row[index], answers[index]) for index in range(len(row)) if answers[index] != IGNORE]
            assert dict(asked) == values and len(values) == 6
            assert row[middle + 2 :: 2] == counted[:-1]


# The optimum


def oracle(world: World, vocabulary: Vocabulary):
    """The world itself as a model: exact log-probabilities of the next token."""

    def model(token_ids: torch.Tensor) -> torch.Tensor:
        rows = torch.full((*token_ids.shape, len(vocabulary)), -math.inf, dtype=torch.float64)
        for row, ids in enumerate(token_ids.tolist()):
            tokens = vocabulary.decode(ids[1 : ids.index(EOS_ID)] if EOS_ID in ids else ids[1:])
            while tokens and tokens[-1] == "<pad>":
                tokens.pop()
            for position in range(len(tokens) + 1):
                for token, chance in world.next_token(tokens[:position]).items():
                    rows[row, position, vocabulary.ids[token]] = math.log(chance)
            rows[row, len(tokens) + 1 :] = 0
        return rows

    return model


def test_the_world_itself_pays_exactly_the_floor(world, vocabulary, parity) -> None:
    documents = world.documents(40, 3)
    losses = document_losses(oracle(world, vocabulary), documents, vocabulary, batch_size=7)
    floor = [sum(document.surprisal) for document in documents]
    parity("document_losses", "TinyWorld surprisal", "invariant", losses, floor, 1e-9)
    assert gap_to_floor(floor, documents) == (0.0, 0.0)
    assert gap_to_floor(losses, documents)[0] == pytest.approx(0, abs=1e-10)


def test_document_losses_are_sums_over_single_documents(world, vocabulary) -> None:
    torch.manual_seed(0)
    model, documents = LanguageModel(len(vocabulary), 8).double(), world.documents(12, 4)
    expected = []
    for document in documents:
        token_ids = torch.tensor([[BOS_ID, *vocabulary.encode(document.tokens)]])
        log_probs = model(token_ids[:, :-1]).log_softmax(-1)[0]
        expected.append(-log_probs.gather(1, token_ids[0, 1:, None]).sum().item())
    model.train()
    assert document_losses(model, documents, vocabulary, batch_size=5) == pytest.approx(expected, rel=1e-9)
    assert model.training, "evaluation must leave the mode as it was"


def test_gap_has_the_paired_standard_error() -> None:
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[float, float]:
        documents, losses = [], []
        for size in rng.integers(2, 30, n):
            luck = rng.normal(0, 50)  # of the document: the same for the model and the floor
            documents.append(SimpleNamespace(tokens=[""] * size, surprisal=[luck]))
            losses.append(luck + rng.normal(0.25 * size, 1))
        return gap_to_floor(losses, documents)

    found = np.array([draw(100) for _ in range(300)])
    assert found[:, 0].mean() == pytest.approx(0.25, abs=0.002)
    assert found[:, 0].std() == pytest.approx(found[:, 1].mean(), rel=0.15)  # 300 draws: 4 % expected


def test_no_model_beats_the_floor_on_fresh_documents(world, vocabulary, counted) -> None:
    train, fresh = world.documents(1000, 6, "train"), world.documents(200, 6, "validation")
    seed_everything(0)
    network = LanguageModel(len(vocabulary), 32, "gru")
    fit(network, document_batches(train, vocabulary, 8, 48, 0), 60, 0.02)
    models = [counted[order] for order in (1, 3, 5)]
    gaps = [gap_to_floor(document_losses(model, fresh, vocabulary), fresh) for model in [*models, network]]
    assert all(gap > -3 * error for gap, error in gaps), gaps
    uniform = math.log(len(vocabulary)) - sum(sum(d.surprisal) for d in fresh) / sum(len(d.tokens) for d in fresh)
    assert all(gap < uniform for gap, _ in gaps), "every trained model must beat a uniform guess"


def test_a_model_that_can_reach_the_floor_does_and_stops_there(world, vocabulary) -> None:
    """Counting is enough for "roles" in a small world: the gap closes, and what is left is above the floor."""
    small = World(max_words=2, n_people=2, mixture={"roles": 1})
    words = Vocabulary(small.vocabulary())
    train, fresh = small.documents(15_000, 0), small.documents(1000, 1)
    model = NGramModel(8, len(words)).fit([[BOS_ID, *words.encode(document.tokens)] for document in train])
    gap, error = gap_to_floor(document_losses(model, fresh, words), fresh)
    assert -3 * error < gap < 0.05, (gap, error)


# By hand


def test_kneser_ney_by_hand() -> None:
    """Two documents, "a b" and "a c": <eos> follows two different words, a only <bos>, though each occurs twice."""
    words = Vocabulary(["a", "b", "c"])
    a, b, c = words.encode("abc")
    model = NGramModel(2, len(words), discount=0.5).fit([[BOS_ID, a, b, EOS_ID], [BOS_ID, a, c, EOS_ID]])
    after_bos, after_a, after_b = model(torch.tensor([[BOS_ID, a, b]])).exp()[0]
    once, twice, never = 1 / 10 + 2 / 35, 3 / 10 + 2 / 35, 2 / 35  # 4 kinds share 5 counts; 0.5 * 4 / 5 / 7 each
    assert after_a[b].item() == pytest.approx(1 / 4 + once / 2)
    assert after_a[EOS_ID].item() == pytest.approx(twice / 2)
    assert after_bos[a].item() == pytest.approx(3 / 4 + once / 4)
    assert after_b.tolist() == pytest.approx(
        [never / 2, never / 2, 1 / 2 + twice / 2, never / 2, once / 2, once / 2, once / 2]
    )
    assert model.n_entries == 5 + 4


def test_the_exercise_counts_as_the_module_does() -> None:
    sequences = [[BOS_ID, 4, 5, 4, 5, 2], [BOS_ID, 5, 5, 6, 2], [BOS_ID, 4, 6, 6, 2]]
    model = NGramModel(2, 8, discount=0.4).fit(sequences)
    for previous in (BOS_ID, 4, 5, 6, 7):
        row = model(torch.tensor([[previous]])).exp()[0, 0].tolist()
        assert row == pytest.approx([solve_kneser_ney(sequences, previous, word, 0.4, 8) for word in range(8)])


def test_estimated_discount_by_hand() -> None:
    model = NGramModel(1, 9).fit([[BOS_ID, 4, 5, 5, 6, 6, 7, 7, 7, 8]])  # 4 and 8 once, 5 and 6 twice
    assert model.tables[0].discount == pytest.approx(2 / (2 + 2 * 2))
    for words in ([4, 5], [4, 4, 5, 5]):  # nothing counted twice, nothing once: no estimate
        assert NGramModel(1, 9).fit([[BOS_ID, *words]]).tables[0].discount == 0.5


def test_lstm_step_by_hand() -> None:
    cell = LSTM.cell_cls(1, 1).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    cell.input_proj.bias.data = torch.tensor([0.0, math.log(3), math.atanh(0.5), 0.0], dtype=torch.float64)
    h, c = cell(torch.ones(1, 1).double(), (torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()))
    assert c.item() == pytest.approx(0.75 * 2 + 0.5 * 0.5)  # forget 3/4 of it stays, half of the candidate 1/2 enters
    assert h.item() == pytest.approx(0.5 * math.tanh(1.75))


def test_small_numbers_by_hand() -> None:
    a, b = torch.full((1, 3, 1), 0.5), torch.tensor([8.0, 0.0, 4.0]).view(1, 3, 1)
    assert linear_scan(a, b).flatten().tolist() == [8, 4, 6]
    assert perplexity(math.log(4)) == pytest.approx(4)
    assert perplexity(710.0) == math.inf  # exp(710) is beyond the largest float
    assert bits_per_byte(math.log(2) * 24, 3) == pytest.approx(8)
    assert topic.compressed_bits("", "a" * 10_000)["xz"] < 0.2
    assert LSTM(2, 3).cells[0].input_proj.bias.tolist()[3:6] == [1, 1, 1]


# Bad input


def unknown_character() -> None:
    Vocabulary("ab").encode("aé\u200bb")


def broken_model() -> LanguageModel:
    model = LanguageModel(5, 4)
    model.lm_head.weight.data[2, 1] = math.nan
    return model


X, PAIR = torch.zeros(2, 4, 3), (torch.tensor([[4]]), torch.tensor([[4]]))
BAD = {
    "d_hidden must be finite and >= 1, got 0": lambda: RNN(3, 0),
    "d_input must be finite and >= 1, got 0": lambda: LSTM(0, 3),
    "n_layers must be finite and >= 1, got 0": lambda: GRU(3, 4, 0),
    r"x must be \(batch, seq >= 1, 3\), got \(2, 0, 3\)": lambda: GRU(3, 4)(X[:, :0]),
    r"x must be \(batch, seq >= 1, 5\), got \(2, 4, 3\)": lambda: GRU(5, 4)(X),
    r"lengths must be in 1\.\.4, got \[5, 2\]": lambda: RNN(3, 4)(X, lengths=[5, 2]),
    r"lengths must be in 1\.\.4, got \[0, 2\]": lambda: RNN(3, 4)(X, lengths=[0, 2]),
    r"lengths must have shape \(2,\), one for each row, got \(3,\)": lambda: RNN(3, 4)(X, lengths=[1, 2, 3]),
    r"state must be 2 tensor\(s\) of shape \(1, 2, 4\), got \(1, 2, 4\)": lambda: LSTM(3, 4)(X, torch.zeros(1, 2, 4)),
    r"state must be 1 tensor\(s\) of shape \(1, 2, 4\), got \(1, 1, 4\)": lambda: GRU(3, 4)(X, torch.zeros(1, 1, 4)),
    "hidden_size must be 4, torch's layer has 5": lambda: GRU(3, 4).load_torch(nn.GRU(3, 5)),
    "mode must be RNN_TANH, torch's layer has RNN_RELU": lambda: RNN(3, 4).load_torch(
        nn.RNN(3, 4, nonlinearity="relu")
    ),
    r"a and b must both be .* got \(2, 4, 3\) and \(2, 3, 3\)": lambda: linear_scan(X, X[:, :3]),
    r"a and b must both be .* got \(2, 0, 3\)": lambda: linear_recurrence(X[:, :0], X[:, :0]),
    r"not in the vocabulary of 6 tokens: 'é' \(U\+00E9\), '\\u200b' \(U\+200B\)": unknown_character,
    "lists 'b' twice": lambda: Vocabulary("abcb"),
    "lists '<pad>' twice; .* special tokens in front or not at all": lambda: Vocabulary(["a", "<pad>"]),
    r"token id 6 >= vocab_size 6 at \[1\]": lambda: Vocabulary("ab").decode([4, 6]),
    r"token id 300 >= vocab_size 300 at \[0, 2\]": lambda: check_token_ids(torch.tensor([[1, 2, 300]]), 300),
    r"token id -1 < 0 at \[1, 0\]": lambda: check_token_ids(torch.tensor([[1], [-1]]), 300),
    r"token id 9 >= vocab_size 9 at \[0, 0\]": lambda: LanguageModel(9, 4)(torch.tensor([[9]])),
    r"token ids must have 2 axes, got shape \(3,\); add one": lambda: LanguageModel(9, 4)(torch.tensor([1, 2, 3])),
    r"token ids must have 2 axes, got shape \(2,\); add one": lambda: BagOfWords(9, 4)(torch.tensor([1, 2])),
    r"token ids must have 2 axes, got shape \(1,\); add one": lambda: NGramModel(1, 9).fit([[1, 2]])(torch.tensor([1])),
    r"token id 8 >= vocab_size 8 at \[0, 0\] ?": lambda: Seq2Seq(9, 8, 4)(
        torch.tensor([[4]]), [1], torch.tensor([[8]])
    ),
    "pad_id must be finite and >= 0 and < 8, got 8": lambda: Seq2Seq(9, 8, 4, pad_id=8),
    "max_new_tokens must be finite and >= 1, got 0": lambda: Seq2Seq(9, 8, 4).generate(torch.tensor([[4]]), [1], 0),
    "unknown cell 'elman'; use one of rnn, gru, lstm": lambda: LanguageModel(9, 4, "elman"),
    "order must be finite and >= 1, got 0": lambda: NGramModel(0, 9),
    "discount must be > 0 and <= 1, got 0": lambda: NGramModel(2, 9, discount=0.0),
    "nothing to count": lambda: NGramModel(2, 9).fit([[BOS_ID]]),
    "call fit first": lambda: NGramModel(2, 9)(torch.tensor([[1]])),
    r"token id 9 >= vocab_size 9 at \[1\]": lambda: NGramModel(2, 9).fit([[BOS_ID, 9]]),
    "seq_len must be finite and >= 1, got 0": lambda: document_batches([], Vocabulary("a"), 2, 0, 0),
    "list of documents is empty": lambda: document_batches([], Vocabulary("a"), 2, 4, 0),
    "batch_size=4 rows of seq_len=5 need 24 tokens, the data has 23": lambda: stream_batches(torch.arange(23), 4, 5),
    "n_pairs=17 needs as many distinct keys, but n_kinds=16": lambda: recall_batch(2, 17, torch.Generator()),
    "n_symbols must be finite and >= 1, got 0": lambda: copy_batch(2, 0, torch.Generator()),
    "temperature must be finite and >= 0, got -1": lambda: sample_ids(torch.zeros(1, 3), -1.0),
    "temperature must be finite and >= 0, got nan": lambda: sample_ids(torch.zeros(1, 3), math.nan),
    "largest logit of a row must be finite, got nan": lambda: sample_ids(torch.tensor([[1.0, math.nan]]), 0.0),
    "largest logit of a row must be finite, got -inf": lambda: sample_ids(torch.full((2, 3), -math.inf), 1.0),
    r"logits must be \(batch, vocab >= 1\), got \(2, 5, 3\)": lambda: sample_ids(torch.zeros(2, 5, 3), 1.0),
    r"logits must be \(batch, vocab >= 1\), got \(2, 0\)": lambda: sample_ids(torch.zeros(2, 0), 1.0),
    r"prompts must be \(batch, seq >= 1\), got \(1, 0\)": lambda: topic.generate_ids(
        NGramModel(1, 9).fit([[1, 2]]), torch.zeros(1, 0, dtype=torch.long), 1
    ),
    r"initial must be \(batch, ...\) = \(2, 3\), got \(4,\)": lambda: linear_scan(X, X, torch.zeros(4)),
    r"initial must be \(batch, ...\) = \(2, 3\), got \(3,\)": lambda: linear_recurrence(X, X, torch.zeros(3)),
    "d_hidden must be finite and >= 1, got -1": lambda: topic.LSTMCell(3, -1),
    r"state must be 2 tensor\(s\) of shape \(1, 2, 4\), got None and None": lambda: LSTM(3, 4)(X, (None, None)),
    "one long sequence, got shape": lambda: stream_batches(torch.zeros(9, 9, dtype=torch.long), 2, 3),
    r"token id 9 >= vocab_size 9 at \[0, 1\]": lambda: stream_nats(LanguageModel(9, 4), torch.tensor([4, 9])),
    r"token id -100 < 0 at \[1\]": lambda: stream_nats(LanguageModel(9, 4), torch.tensor([4, -100])),
    "token ids must have 1 axes": lambda: stream_nats(LanguageModel(9, 4), torch.tensor([[4]])),
    "no documents; give at least one": lambda: topic.floor_of([]),
    "chunk must be finite and >= 1, got 0": lambda: stream_nats(LanguageModel(9, 4), torch.tensor([4]), chunk=0),
    "text to compress is empty": lambda: topic.compressed_bits("a", ""),
    "3 losses for 2 documents": lambda: gap_to_floor([1.0] * 3, [SimpleNamespace(tokens=[1], surprisal=[1])] * 2),
    "n_bytes must be finite and >= 1, got 0": lambda: bits_per_byte(1.0, 0),
    "the text is empty": lambda: topic.text_bits(LanguageModel(5, 4), Vocabulary("a"), ""),
    "the data ended after 0 batches": lambda: fit(LanguageModel(5, 4), iter([]), 3, 0.1),
    "loss nan, gradient norm nan at step 0; lower learning_rate=0.1": lambda: fit(broken_model(), repeat(PAIR), 1, 0.1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_ids_and_lengths_must_be_integers() -> None:
    with pytest.raises(TypeError, match="token ids must be integers, got torch.float32"):
        LanguageModel(9, 4)(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="token ids must be integers, got torch.float64"):
        NGramModel(2, 9).fit([[BOS_ID, 4.5]])
    with pytest.raises(TypeError, match="integer"):
        Vocabulary("ab").decode([4.5])
    for ids, message in (([[4]], "a tensor of integers, got list"), (torch.zeros(1, 2).short(), "use token_ids.long")):
        with pytest.raises(TypeError, match=message):
            LanguageModel(9, 4)(ids)
    assert NGramModel(2, 9).fit([np.array([BOS_ID, 4], np.uint8)]).n_entries == 2
    for wrong in (True, 2.0, "2", math.nan):
        with pytest.raises(TypeError, match=f"n_layers must be an integer, got {wrong!r}"):
            GRU(3, 4, wrong)
    with pytest.raises(TypeError, match="temperature must be a number >= 0, got 'hot'"):
        sample_ids(torch.zeros(1, 3), "hot")
    with pytest.raises(TypeError, match="expected an nn.GRU, got GRUCell"):
        GRU(3, 4).load_torch(nn.GRUCell(3, 4))
    assert RNN(3, 4)(X[:0], lengths=[])[0].shape == (0, 4, 4)
    with pytest.raises(TypeError, match="lengths must be integers, got torch.float32"):
        RNN(3, 4)(X, lengths=[1.5, 2.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--seq-len", "0"], "seq_len must be finite and >= 1, got 0"),
        (["demo", "--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
        (["train", "--d-model", "0"], "d_model must be finite and >= 1, got 0"),
        (["train", "--cell", "mlp"], "invalid choice: 'mlp'"),
        (["generate", "--temperature", "-1"], "temperature must be finite and >= 0, got -1.0"),
        (["generate", "--prompt", ""], "prompt is empty"),
        (["evaluate"], "run the verb train first"),
        (["bench", "--n-repeats", "0"], "n_repeats must be finite and >= 1, got 0"),
    ],
)
def test_command_line_mistakes_are_one_line(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        topic.main([*arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


# Learning


def test_untrained_models_are_as_good_as_a_uniform_guess() -> None:
    torch.manual_seed(0)
    token_ids, targets = torch.randint(4, 300, (8, 20)), torch.randint(300, (8, 20))
    for model in (*(LanguageModel(300, 32, cell) for cell in CELLS), BagOfWords(300, 32)):
        loss = F.cross_entropy(model(token_ids).flatten(0, 1), targets.flatten()).item()
        assert perplexity(loss) == pytest.approx(300, rel=0.1)


@pytest.mark.parametrize("cell", CELLS)
def test_one_batch_can_be_learned_by_heart(cell) -> None:
    seed_everything(0)
    batch = torch.randint(4, 20, (4, 10)), torch.randint(4, 20, (4, 10))
    losses = fit(LanguageModel(20, 32, cell), repeat(batch), 60, 0.04)
    assert losses[0] == pytest.approx(math.log(20), rel=0.1) and losses[-1] < 0.05


def test_the_carried_state_reaches_beyond_the_batch() -> None:
    """In a a b a a b ... a reader of one token at a time cannot know what follows a, unless the state is carried."""
    blind = (2 / 3) * math.log(2)  # nats per token of the best guess without memory
    seed_everything(0)
    losses = fit_stream(LanguageModel(6, 16, "gru"), torch.tensor([4, 4, 5] * 60), 2, 1, 250, 0.05)
    assert np.mean(losses[-30:]) < blind / 3


def test_the_direct_path_is_the_product_of_the_forget_gates() -> None:
    """Section 4: where no gate reads h, the gradient from c_T to c_0 is the product of all f_t, place by place."""
    torch.manual_seed(0)
    cell = LSTM.cell_cls(3, 4).double()
    nn.init.zeros_(cell.state_proj.weight)
    x, start = torch.randn(6, 1, 3).double(), torch.randn(1, 4).double().requires_grad_()
    h, c, product = torch.zeros(1, 4).double(), start, torch.ones(1, 4).double()
    for step in x:
        product = product * torch.sigmoid(cell.input_proj(step).chunk(4, dim=-1)[1])
        h, c = cell(step, (h, c))
    (gradient,) = torch.autograd.grad(c.sum(), start)
    torch.testing.assert_close(gradient, product, rtol=1e-12, atol=0)


def test_the_gradient_of_the_state_matrix_is_a_sum_over_steps() -> None:
    """Section 3, last line: the sum of ((1 - h_t^2) * delta_t) h_{t-1}^T, for a loss that reads the last state."""
    torch.manual_seed(0)
    layer, x = RNN(3, 4).double(), torch.randn(1, 5, 3).double()
    states, h = [torch.zeros(4).double()], torch.zeros(1, 4).double()
    for step in x.unbind(1):
        h = layer.cells[0](step, h)
        h.retain_grad()
        states.append(h)
    (h**3).sum().backward()
    expected = sum(
        torch.outer(((1 - after**2) * after.grad).flatten(), before.detach().flatten())
        for before, after in itertools.pairwise(states)
    )
    torch.testing.assert_close(layer.cells[0].state_proj.weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_truncation_stops_the_gradient() -> None:
    torch.manual_seed(0)
    model = LanguageModel(9, 4)
    first, second = torch.randint(4, 9, (2, 1, 5))
    _, state = model.advance(first)
    logits, _ = model.advance(second, topic.detach(state))
    truncated = torch.autograd.grad(logits.sum(), model.layers.cells[0].state_proj.weight, retain_graph=True)[0]
    logits, _ = model.advance(second, state)
    full = torch.autograd.grad(logits.sum(), model.layers.cells[0].state_proj.weight)[0]
    assert not torch.allclose(truncated, full)
    assert all(part.grad_fn is None for part in topic.detach(state))


def test_demo_climbs_from_chance_towards_the_floor(tmp_path, capsys) -> None:
    sizes = "--n-documents 800 --n-eval 60 --n-samples 20 --max-steps 40 --batch-size 8 --seq-len 48 --d-model 32"
    topic.main(["demo", *sizes.split(), "--device", "cpu", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    table = {line[:22].strip(): line[22:].split() for line in output.splitlines()}
    nats = {name: float(cells[0]) for name, cells in table.items() if cells and "." in cells[0] and len(cells) > 2}
    floor = nats["floor (optimum)"]
    assert nats["uniform (chance)"] > nats["unigram"] > nats["3-gram Kneser-Ney"] > floor > 0
    for name in ("bag of words", "RNN", "GRU", "LSTM"):
        assert floor < nats[name] < nats["unigram"]
        assert float(table[name][1]) == pytest.approx(nats[name] - floor, abs=2e-3)
    assert "grammatical" in output
    assert (tmp_path / "ladder.svg").stat().st_size > 5000


def test_character_model_is_trained_saved_and_used(tmp_path, capsys) -> None:
    data = tmp_path / "verse.txt"
    lines = (f"The {colour} {pet} sat on the {seat}." for colour, pet, seat in itertools.product(
        ("red", "blue", "old"), ("cat", "dog", "hen", "fox"), ("mat", "log", "rug", "bed")
    ))  # fmt: skip
    data.write_text("\n\n".join(lines))
    flags = ["--device", "cpu", "--out", str(tmp_path / "run")]
    sizes = "--d-model 32 --batch-size 4 --seq-len 16 --max-steps 120 --learning-rate 0.02".split()
    topic.main(["train", "--data", str(data), *sizes, *flags])
    trained = float(capsys.readouterr().out.split("held-out text: ")[1].split()[0])
    topic.main(["evaluate", "--data", str(data), *flags])
    output = capsys.readouterr().out
    chance = float(output.split("uniform ")[1].split(")")[0])
    assert float(output.split()[0]) == pytest.approx(trained, abs=1e-3) and trained < chance / 2
    written = []
    for temperature in ("0", "0", "1"):
        topic.main(["generate", "--max-new-tokens", "30", "--temperature", temperature, *flags])
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and written[0].startswith("The ")
    with pytest.raises(SystemExit):
        topic.main(["generate", "--prompt", "Ω", *flags])
    assert "'Ω' (U+03A9)" in capsys.readouterr().err
    weights = tmp_path / "run" / "character_lm" / "model.safetensors"
    card = weights.with_name("config.json").read_text()
    absurd = ["[1]", "{", card.replace('"d_model": 32', '"d_model": 1e9'), card.replace("lstm", "gru")]
    for text in [*absurd, re.sub(r'"n_layers": \d+', f'"n_layers": {10**9}', card)]:
        weights.with_name("config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json( is damaged|: its sizes are not those of the weights)"):
            topic.load_character_lm(weights.parent)
    weights.with_name("config.json").write_text(card)
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(SystemExit):
        topic.main(["generate", *flags])
    assert "is damaged (its sha256 differs)" in capsys.readouterr().err
    assert json.loads((weights.parent / "config.json").read_text())["cell"] == "lstm"


def test_bench_prints_ratios(capsys) -> None:
    topic.main("bench --batch-size 2 --seq-len 5 --d-hidden 4 --n-repeats 2 --device cpu".split())
    output = capsys.readouterr().out
    pairs = [f"{name} beside nn.{name}" for name in LAYERS] + [
        f"scan of {n} steps beside our loop" for n in ("2 x 5", "1 x 80")
    ]
    for pair in pairs:
        assert re.search(rf"{pair}: \d+\.\d+x the speed", output), pair


# Distributions


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_tempered_softmax(temperature) -> None:
    """Chi-square of 20,000 draws over 5 tokens: a temperature 10 % off would be refused with probability > 0.99."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    expected = (logits / temperature).softmax(-1).double() * 20_000
    draws = sample_ids(logits.expand(20_000, -1), temperature, torch.Generator().manual_seed(0)).flatten()
    observed = torch.bincount(draws, minlength=5)
    assert ((observed - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    other = (logits / (1.1 * temperature)).softmax(-1).double() * 20_000
    assert ((observed - other) ** 2 / other).sum() > 18.5


def test_any_temperature_above_zero_can_be_drawn_from() -> None:
    logits = torch.tensor([[2.0, 5.0, -math.inf, 4.5]])
    for temperature in (5e-324, 1e-320, 1e-30):  # the first two are 0 in float32
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert sample_ids(logits.to(dtype), temperature, torch.Generator().manual_seed(0)).item() == 1
    drawn = {sample_ids(logits, 1e30, torch.Generator().manual_seed(seed)).item() for seed in range(40)}
    assert drawn == {0, 1, 3}  # evenly, but never what is impossible


def test_temperature_zero_is_greedy_and_rows_are_independent() -> None:
    model = lively(LanguageModel(9, 8), 42)
    prompts = torch.randint(4, 9, (3, 4))
    together = generate_ids(model, prompts, 6, temperature=0.0)
    assert some_end_early(together)
    seen = prompts
    for column in together.T:
        choice = model(seen)[:, -1].argmax(-1)
        ended = (seen[:, 4:] == EOS_ID).any(1)
        assert torch.equal(column, choice.masked_fill(ended, 0))
        seen = torch.cat([seen, column[:, None]], 1)
    for row in range(3):
        alone = generate_ids(model, prompts[row : row + 1], 6, temperature=0.0)[0].tolist()
        assert together[row].tolist()[: len(alone)] == alone


def test_shape_comments_are_true(checked_shapes, world, vocabulary) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(4, 11, (2, 9))
    with checked_shapes(topic) as checked:
        for model in causal_models(11):
            model(token_ids)
        GRU(3, 4)(X, lengths=[4, 1])
        linear_scan(X, X, torch.zeros(2, 3)), linear_recurrence(X, X)
        sequences = Seq2Seq(36, 36, 6)
        for make_batch in (copy_batch, recall_batch, echo_batch):
            make_batch(3, 2, generator)
        sequences(*echo_batch(3, 2, generator)[:3])
        sequences.generate(token_ids, [9, 5], 4)
        documents = world.documents(9, 0)
        next(document_batches(documents, vocabulary, 2, 12, 0))
        document_losses(LanguageModel(len(vocabulary), 4), documents, vocabulary)
        stream_nats(LanguageModel(11, 4), token_ids.flatten(), n_rows=4, chunk=2)
        fit_stream(LanguageModel(11, 4), token_ids.flatten(), 2, 3, 1, 0.1)
        generate_ids(LanguageModel(11, 4), token_ids, 2, 0.0)
        sample_ids(torch.zeros(2, 3), 1.0)
    assert len(checked) >= 40, sorted(checked)
