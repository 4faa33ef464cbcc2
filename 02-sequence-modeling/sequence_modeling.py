"""Topic 02 - Sequence modeling: n-grams, recurrent networks and sequence-to-sequence models, against a known optimum.

python 02-sequence-modeling/sequence_modeling.py                     # the demo: a ladder of models, CPU, no network
python 02-sequence-modeling/sequence_modeling.py --break no-shift    # a failure on purpose, beside the sound value
python 02-sequence-modeling/sequence_modeling.py figures             # every figure and table of the chapter
python 02-sequence-modeling/sequence_modeling.py train --data python-text
python 02-sequence-modeling/sequence_modeling.py --help

Papers: Kneser and Ney 1995; Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014 (arXiv 1406.1078);
Sutskever et al. 2014 (arXiv 1409.3215).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import hashlib
import itertools
import json
import math
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_text import COMPRESSORS, load_texts
from python_text import bits_per_byte as compressor_bits
from tiny_world import SPECIAL_TOKENS, Document, ratio_of_means
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    locked,
    pick_device,
    progress,
    run_verbs,
    save_figure,
    seed_everything,
    shown,
    speed_line,
    time_in_turns,
    write_atomically,
)

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
FIRST_TOKENS = list(SPECIAL_TOKENS[:4])  # <pad> <bos> <eos> <unk>, in this order in every vocabulary of the course
IGNORE = -100  # a target that the loss leaves out
N_KINDS = 16  # different symbols of the memory tasks; guessing is right once in so many
State = Tensor | tuple[Tensor, Tensor]  # of a recurrent layer: h, or the LSTM's (h, c)


def check_integers(**numbers: int) -> None:
    """Raise TypeError unless every named number is an integer, which True is not."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(f"{name} must be an integer, got {number!r}")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every named size is at least 1, and TypeError unless it is an integer."""
    check_integers(**sizes)
    check_range(SimpleNamespace(**sizes), *sizes, least=1)


# Tokens and ids


class Vocabulary:
    """Tokens and their ids; the four special tokens come first: `tokens` begins with them, or does not list them.

    Raises ValueError for a token listed twice, for a token that is not in the vocabulary (with the code point of a
    single character), and for an id outside it.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        self.tokens = tokens if tokens[: len(FIRST_TOKENS)] == FIRST_TOKENS else FIRST_TOKENS + tokens
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            remedy = "list each token once, and the special tokens in front or not at all"
            raise ValueError(f"the vocabulary lists {twice!r} twice; {remedy}")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        tokens = list(tokens)
        try:
            return [self.ids[token] for token in tokens]
        except KeyError:
            unknown = sorted({token for token in tokens if token not in self.ids})
            named = [f"{token!r} (U+{ord(token):04X})" if len(token) == 1 else repr(token) for token in unknown[:5]]
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(
                f"not in the vocabulary of {len(self)} tokens: {', '.join(named)}{more}; "
                "remove or replace them, or train on text that has them"
            ) from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        ids = [operator.index(index) for index in ids]
        check_token_ids(torch.tensor(ids, dtype=torch.long), len(self))
        return [self.tokens[index] for index in ids]


def check_token_ids(token_ids: Tensor, vocab_size: int, n_axes: int | None = None) -> None:
    """Raise ValueError that names the first id outside 0..vocab_size-1 and its position; TypeError for non-integers.

    Integers of fewer than 32 bits are refused as by nn.Embedding. `n_axes` is the number of axes that the ids must
    have; None takes any.
    """
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"token ids must be a tensor of integers, got {type(token_ids).__name__}; use torch.tensor(ids)"
        )
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {token_ids.dtype}")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"token ids must be integers of 32 or 64 bits, got {token_ids.dtype}; use token_ids.long()")
    if n_axes not in (None, token_ids.ndim):
        raise ValueError(f"token ids must have {n_axes} axes, got shape {tuple(token_ids.shape)}; add one with [None]?")
    if token_ids.numel() == 0 or (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        return
    where = ((token_ids < 0) | (token_ids >= vocab_size)).nonzero()[0].tolist()
    token_id = token_ids[tuple(where)].item()
    limit = "< 0" if token_id < 0 else f">= vocab_size {vocab_size}"
    raise ValueError(f"token id {token_id} {limit} at {where}")


# Counting: n-grams


class NGramModel:
    """Interpolated Kneser-Ney n-gram model (Kneser and Ney 1995; Chen and Goodman 1998, section 2.7).

    p(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) p(w | h without its oldest token): c counts occurrences for the
    longest contexts, and for shorter ones the different tokens seen before h w; N(h) is the number of different words
    after h; p(w | nothing) is mixed with the uniform distribution. A context that begins with <bos>, which nothing
    precedes, keeps its plain counts. An unseen context, such as one that reaches back over <bos> into the document
    before, is shortened until it is seen.

    `discount` fixes D for every length; None estimates it for each as n1 / (n1 + 2 n2) (n1 entries counted once, n2
    twice), 0.5 where either is 0. order 1 is the unigram model.
    Raises ValueError for order < 1, vocab_size < 1, a discount outside (0, 1], ids out of range and empty data.
    """

    def __init__(self, order: int, vocab_size: int, discount: float | None = None) -> None:
        check_sizes(order=order, vocab_size=vocab_size)
        if discount is not None and not 0 < discount <= 1:
            raise ValueError(f"discount must be > 0 and <= 1, got {discount}")
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        self.tables: list[ContextTable] = []

    def fit(self, sequences: Iterable[list[int]]) -> "NGramModel":
        """Count the n-grams of sequences of ids; the first token of each, <bos>, is context only."""
        sequences = [np.asarray(sequence) for sequence in sequences if len(sequence)]
        if sum(len(sequence) > 1 for sequence in sequences) == 0:
            raise ValueError("nothing to count: give at least one sequence of two tokens, <bos> and another")
        token_ids = np.concatenate(sequences)
        token_ids = token_ids.astype(np.int64) if token_ids.dtype.kind in "iu" else token_ids
        check_token_ids(torch.from_numpy(token_ids), self.vocab_size, n_axes=1)
        depth = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
        where = np.flatnonzero(depth)  # positions of the words to predict
        words, longest = token_ids[where], np.minimum(depth[where], self.order - 1)
        contexts, nodes = [np.zeros(1, np.int64)], [np.zeros(len(where), np.int64)]
        for length in range(1, self.order):  # a context is (number of its suffix, its oldest token), in one integer
            reach = longest >= length
            keys = nodes[-1][reach] * self.vocab_size + token_ids[where[reach] - length]
            distinct, numbers = np.unique(keys, return_inverse=True)
            contexts.append(distinct)
            nodes.append(np.zeros(len(where), np.int64))
            nodes[-1][reach] = numbers
        tables, longer = [], np.zeros(0, np.int64)
        for length in reversed(range(self.order)):
            ends = longest == length
            pairs = np.concatenate([longer, nodes[length][ends] * self.vocab_size + words[ends]])
            pairs, counts = np.unique(pairs, return_counts=True)
            tables.append(ContextTable(contexts[length], pairs, counts, self.vocab_size, self.discount))
            suffix = contexts[length] // self.vocab_size  # every longer n-gram, once, is one count for its suffix
            longer = suffix[pairs // self.vocab_size] * self.vocab_size + pairs % self.vocab_size
        self.tables = tables[::-1]
        return self

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return log p(next token), in float64, for every position of (batch, seq) ids: (batch, seq, vocab)."""
        if not self.tables:
            raise ValueError("the n-gram model has counted nothing yet; call fit first")
        check_token_ids(token_ids, self.vocab_size, n_axes=2)
        ids = token_ids.numpy(force=True)
        available = np.tile(np.arange(1, ids.shape[1] + 1), len(ids))  # tokens of the row up to each position
        alive, node = np.ones(ids.size, bool), np.zeros(ids.size, np.int64)
        rows = np.full((ids.size, self.vocab_size), 1 / self.vocab_size)  # (tokens, vocab)
        for length, table in enumerate(self.tables):
            if length:
                oldest = np.roll(ids, length - 1, axis=1).ravel()  # wraps around only where `available` forbids it
                node, found = table.find(node * self.vocab_size + oldest)
                alive &= found & (available >= length)
            table.interpolate(rows, np.flatnonzero(alive), node)
        return torch.from_numpy(np.log(rows)).view(*ids.shape, self.vocab_size)  # (batch, seq, vocab)

    def advance(self, token_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As __call__, after the tokens in `state`; return the log-probabilities and the state after these tokens."""
        seen = token_ids if state is None else torch.cat([state, token_ids], dim=1)
        return self(seen)[:, -token_ids.shape[1] :], seen[:, max(0, seen.shape[1] - self.order + 1) :]

    @property
    def n_entries(self) -> int:
        """How many n-grams of all lengths are stored."""
        return sum(len(table.words) for table in self.tables)


class ContextTable:
    """Discounted counts of the words after every context of one length, in compressed rows."""

    def __init__(
        self, contexts: np.ndarray, pairs: np.ndarray, counts: np.ndarray, vocab_size: int, discount: float | None
    ) -> None:
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        estimate = once / (once + 2 * twice) if once and twice else 0.5
        self.discount = estimate if discount is None else discount
        node, self.words = np.divmod(pairs, vocab_size)
        self.contexts = contexts  # sorted keys; a context's number is its place here
        self.kinds = np.bincount(node, minlength=len(contexts))  # N(h)
        self.first = np.cumsum(self.kinds) - self.kinds
        total = np.bincount(node, weights=counts, minlength=len(contexts))
        self.share = np.maximum(counts - self.discount, 0) / total[node]
        self.rest = self.discount * self.kinds / np.maximum(total, 1)  # what the shorter context distributes

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the contexts with these keys, and whether each is known."""
        if len(self.contexts) == 0:
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        node = np.searchsorted(self.contexts, keys).clip(max=len(self.contexts) - 1)
        return node, self.contexts[node] == keys

    def interpolate(self, rows: np.ndarray, chosen: np.ndarray, node: np.ndarray) -> None:
        """Turn rows[chosen] from the shorter context's distribution into this one's, in place."""
        node = node[chosen]
        rows[chosen] *= self.rest[node, None]
        kinds = self.kinds[node]
        offset = np.arange(kinds.sum()) - np.repeat(np.cumsum(kinds) - kinds, kinds)
        entry = np.repeat(self.first[node], kinds) + offset
        rows[np.repeat(chosen, kinds), self.words[entry]] += self.share[entry]


# Recurrent layers


class Cell(nn.Module):
    """One step of a recurrent network: projections of input and state into `n_gates` gates, then `step`.

    Shapes: x (batch, d_input), state (batch, d_hidden), for the LSTM a pair of them -> the new state.
    """

    n_gates, n_states = 1, 1

    def __init__(self, d_input: int, d_hidden: int) -> None:
        super().__init__()
        check_sizes(d_input=d_input, d_hidden=d_hidden)
        self.input_proj = nn.Linear(d_input, self.n_gates * d_hidden)
        self.state_proj = nn.Linear(d_hidden, self.n_gates * d_hidden)

    def forward(self, x: Tensor, state: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        parts = self.step(self.input_proj(x), *(state if isinstance(state, tuple) else (state,)))
        return parts if self.n_states > 1 else parts[0]

    def step(self, projected: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


class RNNCell(Cell):
    """h' = tanh(W x + U h + b) (Elman 1990)."""

    def step(self, projected: Tensor, h: Tensor) -> tuple[Tensor]:
        return (torch.tanh(projected + self.state_proj(h)),)


class LSTMCell(Cell):
    """Long short-term memory with a forget gate (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    Gates in torch's order: input, forget, candidate, output. The forget gate starts with bias 1, so that a fresh layer
    remembers (Jozefowicz et al. 2015); with bias 0 it forgets half of its memory at every step.
    """

    n_gates, n_states = 4, 2

    def __init__(self, d_input: int, d_hidden: int) -> None:
        super().__init__(d_input, d_hidden)
        nn.init.ones_(self.input_proj.bias[d_hidden : 2 * d_hidden])
        nn.init.zeros_(self.state_proj.bias)

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (projected + self.state_proj(h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class GRUCell(Cell):
    """Gated recurrent unit (Cho et al. 2014, section 2.3), with the reset gate after the projection, as in torch.

    Gates in torch's order: reset, update, candidate. z near 1 keeps the old state.
    """

    n_gates = 3

    def step(self, projected: Tensor, h: Tensor) -> tuple[Tensor]:
        x_r, x_z, x_n = projected.chunk(3, dim=-1)
        h_r, h_z, h_n = self.state_proj(h).chunk(3, dim=-1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (n + z * (h - n),)


class Recurrent(nn.Module):
    """A stack of `n_layers` cells run over a batch of sequences; RNN, LSTM and GRU below name the cell.

    Shapes:
        x (batch, seq, d_input) -> outputs (batch, seq, d_hidden) of the last layer, and the final state
        state: (layers, batch, d_hidden), for the LSTM a pair of them; None starts from zeros
        lengths: real tokens of each row, 1..seq. Later positions give 0 and leave the state alone.
    Raises ValueError for a size below 1, another input width or state, and lengths out of range.
    """

    cell_cls: type[Cell]
    torch_cls: type[nn.RNNBase]

    def __init__(self, d_input: int, d_hidden: int, n_layers: int = 1) -> None:
        super().__init__()
        check_sizes(d_input=d_input, d_hidden=d_hidden, n_layers=n_layers)
        self.d_input, self.d_hidden, self.n_layers = d_input, d_hidden, n_layers
        widths = [d_input] + [d_hidden] * (n_layers - 1)
        self.cells = nn.ModuleList(self.cell_cls(width, d_hidden) for width in widths)

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | list[int] | None = None
    ) -> tuple[Tensor, State]:
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.d_input:
            raise ValueError(f"x must be (batch, seq >= 1, {self.d_input}), got {tuple(x.shape)}")
        real = None if lengths is None else real_positions(lengths, x)
        parts = self.initial_state(state, x)
        outputs, last = x if real is None else x.masked_fill(~real, 0), []
        for layer, cell in enumerate(self.cells):
            outputs, final = self.run(cell, outputs, tuple(part[layer] for part in parts), real)
            last.append(final)
        parts = tuple(torch.stack(layers) for layers in zip(*last, strict=True))
        return outputs, parts if len(parts) > 1 else parts[0]

    @staticmethod
    def run(cell: Cell, x: Tensor, parts: tuple, real: Tensor | None) -> tuple[Tensor, tuple]:
        """Run one layer. All inputs are projected in one matrix product: only the recurrence has to wait its turn."""
        outputs = []
        for step, projected in enumerate(cell.input_proj(x).unbind(1)):
            new = cell.step(projected, *parts)
            if real is None:
                outputs.append(new[0])
            else:
                alive = real[:, step]  # (batch, 1)
                outputs.append(new[0] * alive)
                new = tuple(torch.where(alive, after, before) for after, before in zip(new, parts, strict=True))
            parts = new
        stacked = torch.stack(outputs, dim=1)  # (batch, seq, d_hidden)
        return stacked, parts

    def initial_state(self, state: State | None, x: Tensor) -> tuple[Tensor, ...]:
        n_states, shape = self.cell_cls.n_states, (self.n_layers, len(x), self.d_hidden)
        if state is None:
            return (x.new_zeros(shape),) * n_states
        parts = tuple(state) if isinstance(state, tuple | list) else (state,)
        if len(parts) != n_states or any(getattr(part, "shape", None) != shape for part in parts):
            got = " and ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else repr(part) for part in parts)
            raise ValueError(f"state must be {n_states} tensor(s) of shape {shape}, got {got}")
        return parts

    def load_torch(self, theirs: nn.RNNBase) -> "Recurrent":
        """Copy the weights of torch's layer. Raises ValueError if it is of another kind, size or setting."""
        if not isinstance(theirs, nn.RNNBase):
            raise TypeError(f"expected an nn.{self.torch_cls.__name__}, got {type(theirs).__name__}")
        twin = self.torch_cls(self.d_input, self.d_hidden, self.n_layers, device="meta")
        settings = ("mode", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
        for name in settings:
            if getattr(theirs, name) != getattr(twin, name):
                raise ValueError(f"{name} must be {getattr(twin, name)}, torch's layer has {getattr(theirs, name)}")
        for ours, foreign in self.weight_pairs(theirs):
            ours.data.copy_(foreign.data)
        return self

    def to_torch(self) -> nn.RNNBase:
        """Return torch's layer with a copy of these weights."""
        theirs = self.torch_cls(self.d_input, self.d_hidden, self.n_layers, batch_first=True)
        theirs = theirs.to(self.cells[0].input_proj.weight)
        for ours, foreign in self.weight_pairs(theirs):
            foreign.data.copy_(ours.data)
        return theirs

    def weight_pairs(self, theirs: nn.RNNBase) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (our parameter, torch's parameter of the same meaning and shape)."""
        for layer, cell in enumerate(self.cells):
            for proj, kind in ((cell.input_proj, "ih"), (cell.state_proj, "hh")):
                for name in ("weight", "bias"):
                    yield getattr(proj, name), getattr(theirs, f"{name}_{kind}_l{layer}")


class RNN(Recurrent):
    """Elman's network, as nn.RNN with tanh."""

    cell_cls, torch_cls = RNNCell, nn.RNN


class LSTM(Recurrent):
    """As nn.LSTM; its state is the pair (h, c)."""

    cell_cls, torch_cls = LSTMCell, nn.LSTM


class GRU(Recurrent):
    """As nn.GRU."""

    cell_cls, torch_cls = GRUCell, nn.GRU


def real_positions(lengths: Tensor | list[int], x: Tensor) -> Tensor:
    """True where a row of x (batch, seq, ...) has a real token. Raises ValueError for lengths outside 1..seq."""
    lengths = torch.as_tensor(lengths, device=x.device)
    lengths = lengths if lengths.numel() else lengths.long()  # [] makes floats
    batch, seq = x.shape[:2]
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each row, got {tuple(lengths.shape)}")
    if batch and not 1 <= lengths.min() <= lengths.max() <= seq:
        raise ValueError(f"lengths must be in 1..{seq}, got {lengths.tolist()}")
    return (torch.arange(seq, device=x.device) < lengths[:, None])[:, :, None]  # (batch, seq, 1)


# Linear recurrence: no gate reads the state, so the steps can be combined in any order


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, one step after another.

    Shapes: a, b (batch, seq, d_model), initial (batch, d_model), None for zeros -> every h (batch, seq, d_model).
    Raises ValueError unless a and b have one shape with at least one step, and initial that of a step.
    """
    check_recurrence(a, b, initial)
    h, states = torch.zeros_like(b[:, 0]) if initial is None else initial, []
    for gain, increment in zip(a.unbind(1), b.unbind(1), strict=True):
        h = gain * h + increment
        states.append(h)
    return torch.stack(states, dim=1)  # (batch, seq, d_model)


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """The same states in 2 log2(seq) parallel passes (Blelloch 1990; Martin and Cundy 2018, arXiv 1709.04057).

    Shapes and errors as linear_recurrence. No division: a may be 0.
    """
    check_recurrence(a, b, initial)
    initial = torch.zeros_like(b[:, 0]) if initial is None else initial  # (batch, d_model)
    b = torch.cat([a[:, :1] * initial[:, None] + b[:, :1], b[:, 1:]], dim=1)  # (batch, seq, d_model)
    return scan_from_zero(a, b)


def scan_from_zero(a: Tensor, b: Tensor) -> Tensor:
    """Join neighbours into half as many steps, solve those, and fill in the states between: 3 products a step in all.

    h -> a1 h + b1 and then h -> a2 h + b2 is one step h -> a2 a1 h + (a2 b1 + b2).
    """
    seq = b.shape[1]
    if seq == 1:
        return b
    a1, b1, a2, b2 = a[:, : seq - 1 : 2], b[:, : seq - 1 : 2], a[:, 1::2], b[:, 1::2]  # (batch, half, d_model)
    after = scan_from_zero(a2 * a1, a2 * b1 + b2)  # (batch, half, d_model); states 1, 3, 5 ...
    states = torch.empty_like(b)  # (batch, seq, d_model)
    states[:, 1::2] = after
    states[:, 0] = b[:, 0]
    states[:, 2::2] = a[:, 2::2] * after[:, : (seq - 1) // 2] + b[:, 2::2]
    return states


def check_recurrence(a: Tensor, b: Tensor, initial: Tensor | None) -> None:
    if a.shape != b.shape or a.ndim < 2 or a.shape[1] < 1:
        raise ValueError(f"a and b must both be (batch, seq >= 1, ...), got {tuple(a.shape)} and {tuple(b.shape)}")
    if initial is not None and initial.shape != b[:, 0].shape:
        raise ValueError(f"initial must be (batch, ...) = {tuple(b[:, 0].shape)}, got {tuple(initial.shape)}")


# Models


def document_so_far(token_ids: Tensor) -> Tensor:
    """True at (i, j) where position j belongs to the same document as position i and is not later."""
    document = (token_ids == BOS_ID).cumsum(dim=1)  # (batch, seq)
    return (document[:, :, None] == document[:, None, :]).tril()  # (batch, seq, seq)


class BagOfWords(nn.Module):
    """Predict the next token from the mean embedding of the document so far (the input of Mikolov et al. 2013's CBOW).

    Shapes: token_ids (batch, seq) -> logits (batch, seq, vocab)
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, d_model=d_model)
        self.vocab_size = vocab_size
        self.token_emb = nn.Embedding(vocab_size, d_model)
        self.hidden_proj, self.lm_head = nn.Linear(d_model, d_model), nn.Linear(d_model, vocab_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        check_token_ids(token_ids, self.vocab_size, n_axes=2)
        visible = document_so_far(token_ids).to(self.token_emb.weight.dtype)  # (batch, seq, seq)
        mean = visible / visible.sum(dim=-1, keepdim=True)  # (batch, seq, seq)
        x = mean @ self.token_emb(token_ids)  # (batch, seq, d_model)
        logits = self.lm_head(torch.tanh(self.hidden_proj(x)))  # (batch, seq, vocab)
        return logits


CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


class LanguageModel(nn.Module):
    """A recurrent language model over words or characters (Mikolov et al. 2010): embedding, layers of cells, logits.

    Shapes: token_ids (batch, seq) -> logits (batch, seq, vocab)
    Raises ValueError for an unknown cell, sizes below 1 and ids out of range.
    """

    def __init__(self, vocab_size: int, d_model: int, cell: str = "lstm", n_layers: int = 1) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; use one of {', '.join(CELLS)}")
        check_sizes(vocab_size=vocab_size, d_model=d_model)
        self.vocab_size = vocab_size
        self.token_emb = nn.Embedding(vocab_size, d_model)
        self.layers = CELLS[cell](d_model, d_model, n_layers)
        self.lm_head = nn.Linear(d_model, vocab_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.advance(token_ids)[0]

    def advance(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read on from `state`: the logits, and the state after these tokens."""
        check_token_ids(token_ids, self.vocab_size, n_axes=2)
        x = self.token_emb(token_ids)  # (batch, seq, d_model)
        outputs, state = self.layers(x, state)
        logits = self.lm_head(outputs)  # (batch, seq, vocab)
        return logits, state


class Seq2Seq(nn.Module):
    """GRU encoder and decoder that share only the encoder's last state (Cho et al. 2014; Sutskever et al. 2014).

    Shapes:
        src_ids (batch, src) with src_lengths (batch,), tgt_ids (batch, tgt) -> logits (batch, tgt, vocab)
    tgt_ids are the decoder's inputs, <bos> first: logits[:, i] predicts what follows tgt_ids[:, i] (teacher forcing).
    Padding never changes a result. Raises ValueError for sizes below 1 and ids or lengths out of range.
    """

    def __init__(self, src_vocab_size: int, tgt_vocab_size: int, d_model: int, pad_id: int = PAD_ID) -> None:
        super().__init__()
        check_sizes(src_vocab_size=src_vocab_size, tgt_vocab_size=tgt_vocab_size, d_model=d_model)
        check_range(SimpleNamespace(pad_id=pad_id), "pad_id", least=0, below=min(src_vocab_size, tgt_vocab_size))
        self.src_vocab_size, self.tgt_vocab_size, self.pad_id = src_vocab_size, tgt_vocab_size, pad_id
        self.src_emb, self.tgt_emb = nn.Embedding(src_vocab_size, d_model), nn.Embedding(tgt_vocab_size, d_model)
        self.encoder, self.decoder = GRU(d_model, d_model), GRU(d_model, d_model)
        self.lm_head = nn.Linear(d_model, tgt_vocab_size)

    def encode(self, src_ids: Tensor, src_lengths: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """Read the source: memory (batch, src, d_model), 0 at padding, and the state (batch, d_model) after its end."""
        check_token_ids(src_ids, self.src_vocab_size)
        memory, state = self.encoder(self.src_emb(src_ids), lengths=src_lengths)
        return memory, state[0]

    def decode(self, tgt_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the decoder on from state (batch, d_model): outputs (batch, tgt, d_model) and the state after them."""
        check_token_ids(tgt_ids, self.tgt_vocab_size)
        outputs, state = self.decoder(self.tgt_emb(tgt_ids), state[None])
        return outputs, state[0]

    def forward(self, src_ids: Tensor, src_lengths: Tensor | list[int], tgt_ids: Tensor) -> Tensor:
        _, state = self.encode(src_ids, src_lengths)  # only the last state: the bottleneck
        outputs, _ = self.decode(tgt_ids, state)
        logits = self.lm_head(outputs)  # (batch, tgt, vocab)
        return logits

    @torch.no_grad()
    def generate(self, src_ids: Tensor, src_lengths: Tensor | list[int], max_new_tokens: int) -> Tensor:
        """Greedy ids (batch, at most max_new_tokens), without <bos>; after its <eos> a row holds pad_id."""
        check_sizes(max_new_tokens=max_new_tokens)
        _, state = self.encode(src_ids, src_lengths)
        token_ids = src_ids.new_full((len(src_ids), 1), BOS_ID)  # (batch, 1)
        done, generated = torch.zeros_like(token_ids, dtype=torch.bool), []
        for _ in range(max_new_tokens):
            outputs, state = self.decode(token_ids, state)
            token_ids = self.lm_head(outputs).argmax(dim=-1).masked_fill(done, self.pad_id)  # (batch, 1)
            generated.append(token_ids)
            done |= token_ids == EOS_ID
            if done.all():
                break
        return torch.cat(generated, dim=1)  # (batch, *)


# Batches


def document_batches(
    documents: Iterable, vocabulary: Vocabulary, batch_size: int, seq_len: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), each (batch, seq): rows packed with whole documents, each after its <bos>.

    Every row starts with a document; the last one of a row is cut at seq_len. Targets are -100 where the next token is
    <bos>: after <eos> it always is, which costs nothing and belongs to no document. A list is reshuffled every epoch,
    without end; an iterator is read lazily, in its order, until it is exhausted. Deterministic given `seed`.
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    if not isinstance(documents, Iterator):
        documents = list(documents)
        if not documents:
            raise ValueError("the list of documents is empty; give at least one")
        documents = reshuffled(documents, random.Random(seed))
    return packed(documents, vocabulary, batch_size, seq_len)


def reshuffled(documents: list, rng: random.Random) -> Iterator:
    """The documents again and again, in a fresh order every epoch."""
    while True:
        rng.shuffle(documents)
        yield from documents


def packed(
    documents: Iterator, vocabulary: Vocabulary, batch_size: int, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `document_batches`, until the documents run out."""
    while True:
        rows = []
        for _ in range(batch_size):
            row: list[int] = []
            while len(row) < seq_len + 1:
                document = next(documents, None)
                if document is None:
                    return
                row += [BOS_ID, *vocabulary.encode(document.tokens)]
            rows.append(row[: seq_len + 1])
        token_ids = torch.tensor(rows)  # (batch, seq_and_one)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]  # (batch, seq)
        yield inputs, targets.masked_fill(targets == BOS_ID, IGNORE)


def stream_batches(token_ids: Tensor, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Cut one long sequence into batch_size rows and yield them seq_len tokens at a time, without end.

    Yields (inputs, targets, is_start), the tensors (batch, seq): row k of a batch continues row k of the batch before,
    so that a state can be carried on, except where is_start says that the rows begin again.
    Raises ValueError if the data is shorter than batch_size rows of seq_len inputs and one more target, or not one row.
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    if token_ids.ndim != 1:
        raise ValueError(f"the data must be one long sequence, got shape {tuple(token_ids.shape)}; use flatten()")
    width = len(token_ids) // batch_size  # tokens per row
    if width < seq_len + 1:
        raise ValueError(
            f"batch_size={batch_size} rows of seq_len={seq_len} need {batch_size * (seq_len + 1)} tokens, "
            f"the data has {len(token_ids)}; lower batch_size or seq_len"
        )
    rows = token_ids[: batch_size * width].view(batch_size, width)  # (batch, width)
    starts = itertools.cycle(range(0, width - seq_len, seq_len))
    return ((rows[:, at : at + seq_len], rows[:, at + 1 : at + seq_len + 1], at == 0) for at in starts)


def copy_batch(
    batch_size: int, n_symbols: int, generator: torch.Generator, n_kinds: int = N_KINDS
) -> tuple[Tensor, Tensor]:
    """Remember a sequence: x1 .. xn <eos> x1 .. xn; the loss counts the second half alone (chance 1 / n_kinds).

    Returns inputs and targets, each (batch, 2 * n_symbols). Symbols have the ids 4 .. 3 + n_kinds.
    """
    check_sizes(batch_size=batch_size, n_symbols=n_symbols, n_kinds=n_kinds)
    symbols = torch.randint(n_kinds, (batch_size, n_symbols), generator=generator) + len(FIRST_TOKENS)
    marker = symbols.new_full((batch_size, 1), EOS_ID)
    inputs = torch.cat([symbols, marker, symbols[:, :-1]], dim=1)  # (batch, seq)
    targets = torch.cat([torch.full_like(symbols, IGNORE), symbols], dim=1)  # (batch, seq)
    return inputs, targets


def echo_batch(
    batch_size: int, n_symbols: int, generator: torch.Generator, n_kinds: int = N_KINDS
) -> tuple[Tensor, ...]:
    """The copy task for Seq2Seq: src_ids, src_lengths, tgt_ids and targets; a sequence must pass through one vector."""
    _, targets = copy_batch(batch_size, n_symbols, generator, n_kinds)
    symbols = targets[:, n_symbols:]  # (batch, tgt)
    tgt_ids = F.pad(symbols[:, :-1], (1, 0), value=BOS_ID)  # (batch, tgt)
    return symbols, torch.full((batch_size,), n_symbols), tgt_ids, symbols


def recall_batch(
    batch_size: int, n_pairs: int, generator: torch.Generator, n_kinds: int = N_KINDS
) -> tuple[Tensor, Tensor]:
    """Associative recall: k1 v1 .. kn vn <eos>, then every key again in a fresh order, each followed by its value.

    Returns inputs and targets, each (batch, 4 * n_pairs); the loss counts the values after <eos> alone
    (chance 1 / n_kinds). Keys have the ids 4 .. 3 + n_kinds, values the next n_kinds ids. Raises ValueError if n_pairs
    exceeds n_kinds: the keys of a sequence are distinct.
    """
    check_sizes(batch_size=batch_size, n_pairs=n_pairs, n_kinds=n_kinds)
    if n_pairs > n_kinds:
        raise ValueError(f"n_pairs={n_pairs} needs as many distinct keys, but n_kinds={n_kinds}; raise n_kinds")
    shuffled = torch.rand(batch_size, n_kinds, generator=generator).argsort(dim=1)  # (batch, kinds)
    keys = shuffled[:, :n_pairs] + len(FIRST_TOKENS)  # (batch, pairs)
    values = torch.randint(n_kinds, keys.shape, generator=generator) + len(FIRST_TOKENS) + n_kinds  # (batch, pairs)
    order = torch.rand(keys.shape, generator=generator).argsort(dim=1)  # (batch, pairs)
    asked, answers = keys.gather(1, order), values.gather(1, order)  # (batch, pairs)
    shown = torch.stack([keys, values], dim=2).flatten(1)  # (batch, shown)
    questions = torch.stack([asked, answers], dim=2).flatten(1)  # (batch, shown)
    marker = keys.new_full((batch_size, 1), EOS_ID)
    inputs = torch.cat([shown, marker, questions[:, :-1]], dim=1)  # (batch, seq)
    targets = torch.full_like(inputs, IGNORE)  # (batch, seq)
    targets[:, shown.shape[1] + 1 :: 2] = answers
    return inputs, targets


# Training


def update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    step: int,
    max_steps: int,
    learning_rate: float,
    max_norm: float = 1.0,
) -> float:
    """One step: gradients clipped to `max_norm`, learning rate up over a twentieth of the run and down to 0; nats paid.

    Clipping is what keeps a recurrent network alive: its rare exploding gradient would undo all steps before
    (Pascanu et al. 2013, arXiv 1211.5063). Raises ValueError, before any change, if loss or norm is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm).item()
    if not math.isfinite(loss.item() + norm):
        raise ValueError(
            f"loss {loss.item()}, gradient norm {norm} at step {step}; lower learning_rate={learning_rate}"
        )
    warm = min(1.0, (step + 1) / math.ceil(max_steps / 20))
    optimizer.param_groups[0]["lr"] = learning_rate * warm * (1 - step / max_steps)
    optimizer.step()
    return loss.item()


def fit(
    model: nn.Module, batches: Iterator[tuple], max_steps: int, learning_rate: float, description: str = "train"
) -> list[float]:
    """Train on `batches` of (*inputs, targets) with Adam; return the loss of every step, in nats per counted target."""
    check_sizes(max_steps=max_steps)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=learning_rate), []
    model.train()
    for step in progress(range(max_steps), description):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the data ended after {step} batches; lower max_steps={max_steps} or give more")
        *inputs, targets = (part.to(device_of(model)) for part in batch)
        logits = model(*inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        losses.append(update(loss, optimizer, step, max_steps, learning_rate))
    return losses


def fit_stream(
    model: LanguageModel, token_ids: Tensor, batch_size: int, seq_len: int, max_steps: int, learning_rate: float
) -> list[float]:
    """Train on one long sequence by truncated backpropagation through time (Williams and Peng 1990).

    The state is carried from batch to batch, so the model remembers further back than seq_len, but detached, so that
    the gradient stops at the batch's edge and memory stays bounded. Returns nats per token of every step.
    """
    check_sizes(max_steps=max_steps)
    optimizer, losses, state = torch.optim.Adam(model.parameters(), lr=learning_rate), [], None
    batches = stream_batches(token_ids.to(device_of(model)), batch_size, seq_len)
    model.train()
    for step in progress(range(max_steps), "train"):
        inputs, targets, is_start = next(batches)
        logits, state = model.advance(inputs, None if is_start else detach(state))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses.append(update(loss, optimizer, step, max_steps, learning_rate))
    return losses


def detach(state: State) -> State:
    """The same numbers without their history."""
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


# Sampling


def sample_ids(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one id per row from softmax(logits / temperature); temperature 0 takes the most likely one.

    Drawn on the generator's device, so that one seed chooses alike wherever the logits were computed.
    Shapes: logits (batch, vocab) -> ids (batch, 1). Raises ValueError for other shapes, for a negative or non-finite
    temperature, and for a row whose largest logit is not finite.
    """
    check_range(SimpleNamespace(temperature=temperature), "temperature", least=0)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (batch, vocab >= 1), got {tuple(logits.shape)}; choose one position")
    top = logits.max(dim=-1, keepdim=True).values  # (batch, 1)
    if not top.isfinite().all():
        raise ValueError(f"the largest logit of a row must be finite, got {top[~top.isfinite()][0]}; train again?")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (batch, 1)
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # less is 0 in float32, and 0 / 0 no number
    scaled = (logits - top) / temperature  # (batch, vocab); no overflow near 0
    probs = scaled.softmax(dim=-1).to(generator.device if generator else logits.device)  # (batch, vocab)
    return torch.multinomial(probs, 1, generator=generator).to(logits.device)  # (batch, 1)


@torch.no_grad()
def generate_ids(
    model,
    token_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts (batch, seq) of equal length, one token and one step of the state at a time.

    `model` has `advance`. Returns the new ids (batch, at most max_new_tokens); after its <eos> a row holds <pad>.
    """
    check_sizes(max_new_tokens=max_new_tokens)
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise ValueError(f"prompts must be (batch, seq >= 1), got {tuple(token_ids.shape)}; begin with <bos>")
    done, state, generated = torch.zeros(len(token_ids), 1, dtype=torch.bool, device=token_ids.device), None, []
    for _ in range(max_new_tokens):
        logits, state = model.advance(token_ids, state)
        token_ids = sample_ids(logits[:, -1], temperature, generator).masked_fill(done, PAD_ID)  # (batch, *)
        generated.append(token_ids)
        done |= token_ids == EOS_ID
        if done.all():
            break
    return torch.cat(generated, dim=1)  # (batch, *)


# Evaluation


def perplexity(nats_per_token: float) -> float:
    """exp(loss): of how many equally likely tokens a uniform choice would be as hard; inf beyond the largest float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total nats of a text in bits, over its bytes in UTF-8: comparable between all tokenizers and compressors."""
    check_sizes(n_bytes=n_bytes)
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def stream_nats(model, token_ids: Tensor, n_rows: int = 1, chunk: int = 256) -> float:
    """Total nats that `model.advance` pays for one long sequence of ids, read as n_rows rows side by side.

    The first token is predicted from <bos>. A further row starts with an empty state after its true previous token:
    more rows are faster, and can only cost a model what it would have remembered. Raises ValueError for no tokens, an
    id outside the vocabulary and more than one sequence.
    """
    check_sizes(n_tokens=len(token_ids), n_rows=n_rows, chunk=chunk)
    check_token_ids(token_ids, sys.maxsize, n_axes=1)  # the padding below is negative too
    token_ids = token_ids.long()
    width = math.ceil(len(token_ids) / n_rows)
    padded = F.pad(token_ids, (0, n_rows * width - len(token_ids)), value=IGNORE)
    targets = padded.view(n_rows, width)  # (rows, width)
    inputs = F.pad(padded[:-1].clamp(min=PAD_ID), (1, 0), value=BOS_ID).view(n_rows, width)  # (rows, width)
    total, state = 0.0, None
    for start in range(0, width, chunk):
        logits, state = model.advance(inputs[:, start : start + chunk].to(device_of(model)), state)
        wanted = targets[:, start : start + chunk]
        check_token_ids(wanted.clamp(min=PAD_ID), logits.shape[-1])
        total += F.cross_entropy(logits.double().transpose(1, 2).cpu(), wanted, reduction="sum").item()
    return total


@torch.no_grad()
def document_losses(model, documents: Iterable, vocabulary: Vocabulary, batch_size: int = 64) -> list[float]:
    """Nats that `model(token_ids) -> logits` pays for each document: <bos> in front, every token predicted, <eos> too.

    Padding follows the documents, where it cannot change what a causal model predicts.
    """
    documents = list(documents)
    encoded = [torch.tensor([BOS_ID, *vocabulary.encode(document.tokens)]) for document in documents]
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    losses, training = [0.0] * len(encoded), getattr(model, "training", False)
    if training:
        model.eval()
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        rows = nn.utils.rnn.pad_sequence([encoded[index] for index in chosen], True, IGNORE)  # (batch, seq_and_one)
        inputs, targets = rows[:, :-1].clamp(min=PAD_ID), rows[:, 1:]  # (batch, seq)
        logits = model(inputs.to(device_of(model)))  # (batch, seq, vocab)
        nats = F.cross_entropy(logits.double().transpose(1, 2).cpu(), targets, reduction="none")  # (batch, seq)
        for index, total in zip(chosen, nats.sum(dim=1).tolist(), strict=True):
            losses[index] = total
    if training:
        model.train()
    return losses


def device_of(model) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def floor_of(documents: list[Document]) -> float:
    """Mean surprisal of the documents, nats per token: the loss of a model that knows the language exactly."""
    if not documents:
        raise ValueError("no documents; give at least one")
    return sum(sum(document.surprisal) for document in documents) / sum(len(document.tokens) for document in documents)


def gap_to_floor(losses: list[float], documents: Iterable) -> tuple[float, float]:
    """Nats per token above the documents' own surprisal, and the standard error of that gap.

    The difference is taken document by document, which removes the luck of the draw: an easy document is easy for
    both. A ratio of sums, so its error is that of the ratio estimator (Cochran 1977, chapter 6).
    """
    documents = list(documents)
    if len(losses) != len(documents) or len(documents) < 2:
        raise ValueError(f"{len(losses)} losses for {len(documents)} documents; give one for each of at least 2")
    pairs = zip(losses, documents, strict=True)
    return ratio_of_means([(loss - sum(document.surprisal), len(document.tokens)) for loss, document in pairs])


def compressed_bits(train_text: str, test_text: str) -> dict[str, float]:
    """Bits per byte of the test text by gzip, bz2 and xz: alone, and after the training text."""
    alone = {name: compressor_bits(compress, test_text) for name, compress in COMPRESSORS.items()}
    after = {
        f"{name} after the training text": compressor_bits(compress, test_text, train_text)
        for name, compress in COMPRESSORS.items()
    }
    return alone | after


def text_bits(model, vocabulary: Vocabulary, text: str, n_rows: int = 32) -> float:
    """Bits per byte that a character model pays for a text."""
    if not text:
        raise ValueError("the text is empty; give at least one character")
    return bits_per_byte(stream_nats(model, torch.tensor(vocabulary.encode(text)), n_rows), len(text.encode()))


def uniform_bits(vocabulary: Vocabulary, text: str) -> float:
    """Bits per byte of a guess that finds every token equally likely."""
    return bits_per_byte(len(text) * math.log(len(vocabulary)), len(text.encode()))


# The verbs


@dataclass(frozen=True)
class LadderConfig:
    break_: Literal["none", "no-shift", "pad-in-loss", "no-clip", "forget-bias"] = "none"  # show one failure instead
    n_documents: int = 20_000  # TinyWorld documents to train on
    n_eval: int = 1_000  # fresh documents on which every model is judged
    n_samples: int = 100  # documents that every model writes
    order: int = 3  # tokens of the longest n-gram
    d_model: int = 64  # width of embeddings and states
    batch_size: int = 16  # rows per step
    seq_len: int = 64  # tokens per row
    max_steps: int = 300  # optimizer steps of each neural model
    learning_rate: float = 2e-2  # Adam's largest step size

    def __post_init__(self) -> None:
        sizes = ("n_documents", "n_samples", "order", "d_model", "batch_size", "seq_len", "max_steps")
        check_range(self, *sizes, least=1)
        check_range(self, "n_eval", least=2)
        check_range(self, "learning_rate", above=0)


def demo(config: LadderConfig, run: RunConfig) -> None:
    """Train n-grams and recurrent networks on TinyWorld and show how far each stays above the entropy."""
    import sequence_experiments as experiments  # here, because it imports this module

    if config.break_ != "none":
        announce(f"the failure {config.break_} beside the sound run", 0.15 * config.max_steps)
        for measure, sound, broken in experiments.BREAKS[config.break_](config, run.seed):
            print(f"{measure}: sound {sound:.3g}, with --break {config.break_} {broken:.3g}")
        return
    per_token = 0.4e-3 + 0.5e-6 * config.batch_size * config.d_model  # of a row, in all four networks
    seconds = 8 + per_token * config.seq_len * config.max_steps
    announce(f"2 counting models and 4 networks of {config.max_steps} steps each", seconds)
    rungs, fresh, vocabulary = experiments.climb(config, run)
    n_tokens, floor = sum(len(document.tokens) for document in fresh), floor_of(fresh)
    uniform = math.log(len(vocabulary))
    print(f"{n_tokens} tokens of {len(fresh)} fresh documents, vocabulary {len(vocabulary)}, seed {run.seed}")
    print(f"{'model':22}{'nats/token':>11}{'gap to the floor':>22}{'perplexity':>12}{'seconds':>9}")
    print(f"{'uniform (chance)':22}{uniform:11.3f}{uniform - floor:13.3f}{perplexity(uniform):21.2f}")
    for rung in rungs:
        gap, error = gap_to_floor(rung.losses, fresh)
        nats = sum(rung.losses) / n_tokens
        print(f"{rung.name:22} {nats:10.3f} {gap:12.3f} +- {error:.3f} {perplexity(nats):11.2f} {rung.seconds:8.1f}")
    print(f"{'floor (optimum)':22}{floor:11.3f}{0:13.3f}{perplexity(floor):21.2f}")
    save_figure(experiments.plot_ladder(rungs, fresh), run.out / "ladder.svg")
    for rung in rungs:
        if hasattr(rung.model, "advance"):
            samples = experiments.sample_documents(rung.model, vocabulary, config.n_samples, run.seed)
            share = experiments.grammatical_share(samples)
            print(f"{rung.name}: {share:.0%} of its documents are grammatical, e.g. {samples[0].text}")


@dataclass(frozen=True)
class TextConfig:
    data: str = "python-text"  # python-text, tiny-world, a file, or a Hugging Face data set
    eval_chars: int = 100_000  # characters of the validation side that are scored

    def __post_init__(self) -> None:
        check_range(self, "eval_chars", least=1)


@dataclass(frozen=True)
class CharacterConfig:
    cell: Literal["rnn", "gru", "lstm"] = "lstm"  # kind of recurrent layer
    d_model: int = 256  # width of embeddings and states
    n_layers: int = 1  # recurrent layers
    batch_size: int = 32  # rows per step
    seq_len: int = 64  # characters per row and step; the gradient reaches no further back
    max_steps: int = 1000  # optimizer steps
    learning_rate: float = 5e-3  # Adam's largest step size

    def __post_init__(self) -> None:
        check_range(self, "d_model", "n_layers", "batch_size", "seq_len", "max_steps", least=1)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class GenerateConfig:
    prompt: str = "The "  # text to continue
    max_new_tokens: int = 400  # characters to write
    temperature: float = 0.8  # 0 takes the most likely character, 1 samples from the model as it is

    def __post_init__(self) -> None:
        check_range(self, "max_new_tokens", least=1)
        check_range(self, "temperature", least=0)
        if not self.prompt:
            raise ValueError("prompt is empty; give at least one character")


def read_text(data: str, split: str) -> str:
    """One text of all the texts of a split, as a character model reads it."""
    return "\n\n".join(load_texts(data, split))


def save_character_lm(model: LanguageModel, vocabulary: Vocabulary, config: CharacterConfig, folder: Path) -> None:
    """Write weights, then configuration with their sha256: neither file is ever half, and a mismatch is noticed."""
    weights = safetensors.torch.save(model.state_dict())
    card = {"cell": config.cell, "d_model": config.d_model, "n_layers": config.n_layers, "tokens": vocabulary.tokens}
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    write_atomically(folder / "model.safetensors", weights)
    write_atomically(folder / "config.json", (json.dumps(card, indent=1) + "\n").encode())
    print(f"wrote {shown(folder)}")


def load_character_lm(folder: Path) -> tuple[LanguageModel, Vocabulary]:
    """Read what `save_character_lm` wrote. Raises ValueError if it is missing or if a byte changed."""
    if not (folder / "config.json").exists():
        raise ValueError(f"no model in {shown(folder)}; run the verb train first, with the same --out")
    weights = (folder / "model.safetensors").read_bytes()
    try:
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        intact = hashlib.sha256(weights).hexdigest() == card["sha256"]
        vocabulary = Vocabulary(card["tokens"])
        d_model, cell, n_layers = card["d_model"], card["cell"], card["n_layers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{shown(folder / 'config.json')} is damaged ({reason}); run train again") from None
    if not intact:
        raise ValueError(f"{shown(folder / 'model.safetensors')} is damaged (its sha256 differs); run train again")
    state = safetensors.torch.load(weights)
    differs = f"{shown(folder / 'config.json')}: its sizes are not those of the weights; run train again"
    if state["token_emb.weight"].shape != (len(vocabulary), d_model) or n_layers not in range(1, len(state)):
        raise ValueError(differs)  # before a model of absurd sizes is built
    model = LanguageModel(len(vocabulary), d_model, cell, n_layers)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise ValueError(differs) from None
    return model, vocabulary


def train_character_lm(
    text: str, vocabulary: Vocabulary, config: CharacterConfig, run: RunConfig
) -> tuple[LanguageModel, list[float]]:
    """Train a character model by truncated backpropagation through time; return it and nats per character by step."""
    seed_everything(run.seed)
    model = LanguageModel(len(vocabulary), config.d_model, config.cell, config.n_layers).to(pick_device(run.device))
    token_ids = torch.tensor([BOS_ID, *vocabulary.encode(text)])
    sizes = (config.batch_size, config.seq_len, config.max_steps)
    return model, fit_stream(model, token_ids, *sizes, config.learning_rate)


def train(data: TextConfig, config: CharacterConfig, run: RunConfig) -> None:
    """Train a character model on a text, compare it with compressors, and save it."""
    per_step = config.seq_len * config.n_layers * (0.3e-3 + 0.3e-6 * config.batch_size * config.d_model)
    announce(f"{config.max_steps} steps of a character {config.cell} on {data.data}", 10 + per_step * config.max_steps)
    with locked(run.out):
        train_text, test_text = read_text(data.data, "train"), read_text(data.data, "validation")
        vocabulary = Vocabulary(sorted(set(train_text + test_text)))  # of both sides: no character is unknown
        model, _ = train_character_lm(train_text, vocabulary, config, run)
        save_character_lm(model, vocabulary, config, run.out / "character_lm")
    test_text = test_text[: data.eval_chars]
    chance = uniform_bits(vocabulary, test_text)
    print(f"held-out text: {text_bits(model, vocabulary, test_text):.3f} bits per byte (uniform {chance:.3f})")
    for name, bits in compressed_bits(train_text, test_text).items():
        print(f"{name}: {bits:.3f} bits per byte")


def evaluate(data: TextConfig, run: RunConfig) -> None:
    """Score held-out text with the model that train saved."""
    model, vocabulary = load_character_lm(run.out / "character_lm")
    text = read_text(data.data, "validation")[: data.eval_chars]
    bits = text_bits(model.to(pick_device(run.device)), vocabulary, text)
    chance = uniform_bits(vocabulary, text)
    print(f"{bits:.3f} bits per byte on {len(text)} held-out characters of {data.data} (uniform {chance:.3f})")


def generate(config: GenerateConfig, run: RunConfig) -> None:
    """Continue a prompt with the model that train saved."""
    model, vocabulary = load_character_lm(run.out / "character_lm")
    model, generator = model.to(pick_device(run.device)), torch.Generator(pick_device(run.device)).manual_seed(run.seed)
    prompt = torch.tensor([vocabulary.encode(config.prompt)], device=device_of(model))  # (batch, seq)
    new_ids = generate_ids(model, prompt, config.max_new_tokens, config.temperature, generator)
    print(config.prompt + "".join(vocabulary.decode(new_ids[0])))


@dataclass(frozen=True)
class BenchConfig:
    batch_size: int = 32  # rows
    seq_len: int = 64  # steps
    d_hidden: int = 128  # width of inputs and states
    n_repeats: int = 20  # rounds of measurement

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "seq_len", "d_hidden", "n_repeats", least=1)


def forward_backward(layer: Callable, *inputs: Tensor) -> None:
    outputs = layer(*inputs)
    (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()


def measure_scan(seq_len: int, batch_size: int, d_model: int, n_repeats: int, device: torch.device) -> dict[str, list]:
    """Seconds of the "loop" and of the "scan", forward and backward, in every round."""
    a = torch.rand(batch_size, seq_len, d_model, device=device).requires_grad_()
    b = torch.randn(batch_size, seq_len, d_model, device=device)
    forms = {"loop": linear_recurrence, "scan": linear_scan}
    return time_in_turns({name: partial(forward_backward, form, a, b) for name, form in forms.items()}, n_repeats)


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Time our layers against torch.nn's, and the scan against the loop, as ratios in one run."""
    announce(f"{config.n_repeats} rounds of forward and backward of 10 layers", config.n_repeats * 0.6)
    device = pick_device(run.device)
    seed_everything(run.seed)
    print(describe_machine())
    x = torch.randn(config.batch_size, config.seq_len, config.d_hidden, device=device)
    for cell, layer_cls in CELLS.items():
        ours = layer_cls(config.d_hidden, config.d_hidden).to(device)
        layers = {"ours": ours, "torch": ours.to_torch().to(device)}
        seconds = time_in_turns(
            {name: partial(forward_backward, layer, x) for name, layer in layers.items()}, config.n_repeats
        )
        print(speed_line(cell.upper(), f"nn.{cell.upper()}", seconds["ours"], seconds["torch"]))
    for rows, steps in ((config.batch_size, config.seq_len), (1, 16 * config.seq_len)):
        seconds = measure_scan(steps, rows, config.d_hidden, config.n_repeats, device)
        print(speed_line(f"scan of {rows} x {steps} steps", "our loop", seconds["scan"], seconds["loop"]))


def main(argv: list[str] | None = None) -> None:
    from sequence_experiments import FiguresConfig, figures  # here, because they import this module

    verbs = {
        "demo": (demo, LadderConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
        "train": (train, TextConfig, CharacterConfig, RunConfig),
        "generate": (generate, GenerateConfig, RunConfig),
        "evaluate": (evaluate, TextConfig, RunConfig),
        "bench": (bench, BenchConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
