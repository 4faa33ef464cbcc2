"""Topic 02 - Sequence modeling: n-grams, recurrent networks and sequence-to-sequence models, against a known optimum.

python 02-sequence-modeling/sequence_modeling.py                     # the demo: a ladder of models, CPU, no network
python 02-sequence-modeling/sequence_modeling.py --break no-shift    # a failure on purpose, beside the sound value
python 02-sequence-modeling/sequence_modeling.py figures             # every figure and table of the chapter
python 02-sequence-modeling/sequence_modeling.py train --data python-text
python 02-sequence-modeling/sequence_modeling.py --help

Papers: Kneser and Ney 1995; Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014 (arXiv 1406.1078);
Sutskever et al. 2014 (arXiv 1409.3215).
"""

import copy
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from python_text import COMPRESSORS, load_texts
from python_text import bits_per_byte as compressor_bits
from tiny_world import SPECIAL_TOKENS, Document, World, plot_surprisal, ratio_of_means, statistics
from workbench import (
    Column,
    RunConfig,
    announce,
    check_range,
    describe_machine,
    fill_chapter,
    largest_difference,
    locked,
    pick_device,
    progress,
    run_verbs,
    save_figure,
    save_results,
    seed_everything,
    shown,
    speed_ratio,
    time_in_turns,
    write_atomically,
)

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
FIRST_TOKENS = list(SPECIAL_TOKENS[:4])  # <pad> <bos> <eos> <unk>, in this order in every vocabulary of the course
IGNORE = -100  # a target that the loss leaves out
N_KINDS = 16  # different symbols of the memory tasks; guessing is right once in so many
State = Tensor | tuple[Tensor, Tensor]  # of a recurrent layer: h, or the LSTM's (h, c)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every named size is at least 1."""
    check_range(SimpleNamespace(**sizes), *sizes, least=1)


# Tokens and ids


class Vocabulary:
    """Tokens and their ids; the four special tokens come first, whether or not `tokens` lists them.

    Raises ValueError for a token listed twice, for a token that is not in the vocabulary (with the code point of a
    single character), and for an id outside it.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        self.tokens = tokens if tokens[: len(FIRST_TOKENS)] == FIRST_TOKENS else FIRST_TOKENS + tokens
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise ValueError(f"the vocabulary lists {twice!r} twice; list each token once")

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
        ids = [int(index) for index in ids]
        check_token_ids(torch.tensor(ids, dtype=torch.long), len(self))
        return [self.tokens[index] for index in ids]


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError that names the first id outside 0..vocab_size-1 and its position; TypeError for non-integers."""
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {token_ids.dtype}")
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
        sequences = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        if sum(len(sequence) > 1 for sequence in sequences) == 0:
            raise ValueError("nothing to count: give at least one sequence of two tokens, <bos> and another")
        token_ids = np.concatenate(sequences)
        check_token_ids(torch.from_numpy(token_ids), self.vocab_size)
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
        check_token_ids(token_ids, self.vocab_size)
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
        if len(parts) != n_states or any(part.shape != shape for part in parts):
            got = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"state must be {n_states} tensor(s) of shape {shape}, got {got}")
        return parts

    def load_torch(self, theirs: nn.RNNBase) -> "Recurrent":
        """Copy the weights of torch's layer. Raises ValueError if it is of another kind, size or setting."""
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
    batch, seq = x.shape[:2]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each row, got {tuple(lengths.shape)}")
    if batch and not 1 <= lengths.min() <= lengths.max() <= seq:
        raise ValueError(f"lengths must be in 1..{seq}, got {lengths.tolist()}")
    return (torch.arange(seq, device=x.device) < lengths[:, None])[:, :, None]  # (batch, seq, 1)


# Linear recurrence: no gate reads the state, so the steps can be combined in any order


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, one step after another.

    Shapes: a, b (batch, seq, d_model), initial (batch, d_model), None for zeros -> every h (batch, seq, d_model).
    Raises ValueError unless a and b have one shape with at least one step.
    """
    check_recurrence(a, b)
    h, states = torch.zeros_like(b[:, 0]) if initial is None else initial, []
    for gain, increment in zip(a.unbind(1), b.unbind(1), strict=True):
        h = gain * h + increment
        states.append(h)
    return torch.stack(states, dim=1)  # (batch, seq, d_model)


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """The same states in 2 log2(seq) parallel passes (Blelloch 1990; Martin and Cundy 2018, arXiv 1709.04057).

    Shapes and errors as linear_recurrence. No division: a may be 0.
    """
    check_recurrence(a, b)
    initial = torch.zeros_like(b[:, 0]) if initial is None else initial  # (batch, d_model)
    b = torch.cat([a[:, :1] * initial[:, None] + b[:, :1], b[:, 1:]], dim=1)  # (batch, seq, d_model)
    return scan_from_zero(a, b)


def scan_from_zero(a: Tensor, b: Tensor) -> Tensor:
    """Join neighbours into half as many steps, solve those, and fill in the states between: 2 seq products in all.

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


def check_recurrence(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2 or a.shape[1] < 1:
        raise ValueError(f"a and b must both be (batch, seq >= 1, ...), got {tuple(a.shape)} and {tuple(b.shape)}")


# Models


def document_so_far(token_ids: Tensor) -> Tensor:
    """True at (i, j) where position j belongs to the same document as position i and is not later."""
    document = (token_ids == BOS_ID).cumsum(dim=1)  # (batch, seq)
    return (document[:, :, None] == document[:, None, :]).tril()  # (batch, seq, seq)


def bag_of_words(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Count every word of each document so far: which words, not in which order.

    Shapes: token_ids (batch, seq) -> counts (batch, seq, vocab). <bos> empties the bag and is the first to enter it.
    """
    check_token_ids(token_ids, vocab_size)
    counts = document_so_far(token_ids).float() @ F.one_hot(token_ids, vocab_size).float()  # (batch, seq, vocab)
    return counts


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
        check_token_ids(token_ids, self.vocab_size)
        visible = document_so_far(token_ids).to(self.token_emb.weight.dtype)  # (batch, seq, seq)
        mean = visible / visible.sum(dim=-1, keepdim=True)  # (batch, seq, seq)
        x = mean @ self.token_emb(token_ids)  # (batch, seq, d_model): bag_of_words @ embedding, without the zeros
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
        check_token_ids(token_ids, self.vocab_size)
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
    <bos>: no model can know what comes after a document. A list is reshuffled every epoch, without end; an iterator is
    read lazily, in its order, until it is exhausted. Deterministic given `seed`.
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
    Raises ValueError if the data is shorter than batch_size rows of seq_len inputs and one more target.
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
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
    check_sizes(batch_size=batch_size, n_symbols=n_symbols, n_kinds=n_kinds)
    symbols = torch.randint(n_kinds, (batch_size, n_symbols), generator=generator) + len(FIRST_TOKENS)
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

    Shapes: logits (batch, vocab) -> ids (batch, 1). Raises ValueError for a negative or non-finite temperature.
    """
    check_range(SimpleNamespace(temperature=temperature), "temperature", least=0)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (batch, 1)
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # (batch, vocab); no overflow near 0
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)  # (batch, 1)


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
    """exp(loss): of how many equally likely tokens a uniform choice would be as hard."""
    return math.exp(nats_per_token)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total nats of a text in bits, over its bytes in UTF-8: comparable between all tokenizers and compressors."""
    check_sizes(n_bytes=n_bytes)
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def stream_nats(model, token_ids: Tensor, n_rows: int = 1, chunk: int = 256) -> float:
    """Total nats that `model.advance` pays for one long sequence of ids, read as n_rows rows side by side.

    The first token is predicted from <bos>. A further row starts with an empty state after its true previous token:
    more rows are faster, and can only cost a model what it would have remembered.
    """
    check_sizes(n_tokens=len(token_ids), n_rows=n_rows)
    width = math.ceil(len(token_ids) / n_rows)
    padded = F.pad(token_ids, (0, n_rows * width - len(token_ids)), value=IGNORE)
    targets = padded.view(n_rows, width)  # (rows, width)
    inputs = F.pad(padded[:-1].clamp(min=PAD_ID), (1, 0), value=BOS_ID).view(n_rows, width)  # (rows, width)
    total, state = 0.0, None
    for start in range(0, width, chunk):
        logits, state = model.advance(inputs[:, start : start + chunk].to(device_of(model)), state)
        wanted = targets[:, start : start + chunk]
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


# Experiments


@torch.no_grad()
def accuracy(model: nn.Module, *batch: Tensor) -> float:
    """Fraction of the counted targets of one batch (*inputs, targets) that are the model's first choice."""
    *inputs, targets = (part.to(device_of(model)) for part in batch)
    counted = targets != IGNORE
    return (model(*inputs).argmax(dim=-1) == targets)[counted].float().mean().item()


def memory_accuracy(
    model: nn.Module, make_batch: Callable, size: int, max_steps: int, learning_rate: float = 3e-3, seed: int = 0
) -> float:
    """Train on fresh sequences of one size of `copy_batch`, `recall_batch` or `echo_batch`; accuracy on 512 more."""
    generator = torch.Generator().manual_seed(seed)
    batches = (make_batch(64, size, generator) for _ in itertools.count())
    fit(model, batches, max_steps, learning_rate, f"{type(model).__name__}, size {size}")
    return accuracy(model, *make_batch(512, size, generator))


def measure_memory(make_batch: Callable, sizes: list[int], d_model: int, max_steps: int, seed: int) -> dict[str, list]:
    """Accuracy of every cell, or of Seq2Seq for `echo_batch`, at every size; one fresh model for each."""
    vocab_size = len(FIRST_TOKENS) + 2 * N_KINDS  # recall_batch has keys and values
    makers = {cell.upper(): partial(LanguageModel, vocab_size, d_model, cell) for cell in CELLS}
    if make_batch is echo_batch:
        makers = {f"seq2seq, width {d_model}": partial(Seq2Seq, vocab_size, vocab_size, d_model)}
    found: dict[str, list] = {}
    for (name, maker), size in itertools.product(makers.items(), sizes):
        seed_everything(seed)
        found.setdefault(name, []).append(memory_accuracy(maker(), make_batch, size, max_steps, seed=seed))
    return found


def bag_accuracy(n_pairs: int, n_draws: int = 20_000) -> float:
    """Best accuracy in `recall_batch` for a memory of the values alone: which were shown, but not with which key.

    It answers with the most frequent of the values that were not yet asked for; the mean over random sequences.
    """
    values = torch.randint(N_KINDS, (n_draws, n_pairs), generator=torch.Generator().manual_seed(0))  # as they are asked
    left = (
        F.one_hot(values, N_KINDS).flip(1).cumsum(1)
    )  # (draws, pairs, kinds); the counts of the last 1, 2, ... values
    return (left.amax(dim=2) / left.sum(dim=2)).mean().item()


def least_bits(n_symbols: int, accuracy: float) -> float:
    """Bits that must have passed from a sequence of random symbols to whoever names them with this accuracy.

    Fano's inequality for each of the N_KINDS equally likely symbols, summed: at chance it gives 0, at accuracy 1 all.
    """
    check_range(SimpleNamespace(accuracy=accuracy), "accuracy", least=1 / N_KINDS, most=1)
    parts = [accuracy, *[(1 - accuracy) / (N_KINDS - 1)] * (N_KINDS - 1)]
    doubt = -sum(part * math.log2(part) for part in parts if part)
    return n_symbols * (math.log2(N_KINDS) - doubt)


def gradient_by_lag(layer: Recurrent, seq_len: int, seed: int) -> list[float]:
    """Mean norm of the gradient of the last output, along a random unit vector, with respect to each input.

    Entry k belongs to the input k steps back. In float64: a vanished gradient is a small number here, not 0.
    """
    check_sizes(seq_len=seq_len)
    generator = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(32, seq_len, layer.d_input, generator=generator, dtype=torch.float64).requires_grad_()
    direction = F.normalize(torch.randn(32, layer.d_hidden, generator=generator, dtype=torch.float64))
    outputs, _ = layer(x)
    (gradient,) = torch.autograd.grad((outputs[:, -1] * direction).sum(), x)  # (batch, seq, d_input)
    return gradient.norm(dim=2).mean(dim=0).flip(0).tolist()


def gradient_bound(layer: RNN, seq_len: int) -> list[float]:
    """What `gradient_by_lag` cannot exceed: the largest singular value of W, times that of U for each step back."""
    cell = layer.cells[0]
    reach, gain = (
        torch.linalg.matrix_norm(proj.weight.double(), 2).item() for proj in (cell.input_proj, cell.state_proj)
    )
    return [reach * gain**lag for lag in range(seq_len)]


def measure_gradients(d_hidden: int, seq_len: int, seed: int) -> dict[str, list[float]]:
    """`gradient_by_lag` of fresh layers: RNNs whose state matrix stretches by a gain, GRU, LSTM, LSTM without bias."""
    found = {}
    for gain in (0.8, 1.0, 1.2):
        seed_everything(seed)
        layer = RNN(d_hidden, d_hidden)
        nn.init.orthogonal_(layer.cells[0].state_proj.weight, gain)
        found[f"RNN, gain {gain}"] = gradient_by_lag(layer, seq_len, seed)
        found[f"bound, gain {gain}"] = gradient_bound(layer, seq_len)
    for name, layer_cls in (("GRU", GRU), ("LSTM", LSTM), ("LSTM, forget bias 0", LSTM)):
        seed_everything(seed)
        layer = layer_cls(d_hidden, d_hidden)
        if name.endswith("0"):
            nn.init.zeros_(layer.cells[0].input_proj.bias)
        found[name] = gradient_by_lag(layer, seq_len, seed)
    return found


def forward_backward(layer: Callable, *inputs: Tensor) -> None:
    outputs = layer(*inputs)
    (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()


def measure_scan(seq_len: int, batch_size: int, d_model: int, n_repeats: int, device: torch.device) -> dict[str, list]:
    """Seconds of the "loop" and of the "scan", forward and backward, in every round."""
    a = torch.rand(batch_size, seq_len, d_model, device=device).requires_grad_()
    b = torch.randn(batch_size, seq_len, d_model, device=device)
    forms = {"loop": linear_recurrence, "scan": linear_scan}
    return time_in_turns({name: partial(forward_backward, form, a, b) for name, form in forms.items()}, n_repeats)


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


# The ladder: every model of the topic on the same documents


@dataclass(frozen=True)
class LadderConfig:
    break_: Literal["none", "no-shift", "pad-in-loss", "no-clip", "forget-bias"] = "none"  # show one failure instead
    n_documents: int = 20_000  # TinyWorld documents to train on
    n_eval: int = 1_000  # fresh documents on which every model is judged
    order: int = 3  # tokens of the longest n-gram
    d_model: int = 64  # width of embeddings and states
    batch_size: int = 16  # rows per step
    seq_len: int = 64  # tokens per row
    max_steps: int = 300  # optimizer steps of each neural model
    learning_rate: float = 2e-2  # Adam's largest step size

    def __post_init__(self) -> None:
        check_range(self, "n_documents", "order", "d_model", "batch_size", "seq_len", "max_steps", least=1)
        check_range(self, "n_eval", least=2)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class Rung:
    """One model of the ladder after training."""

    name: str
    model: Any
    losses: list[float]  # nats of each fresh document
    curve: list[float]  # training loss of each step, nats per token
    seconds: float  # of training


def climb(config: LadderConfig, run: RunConfig) -> tuple[list[Rung], list[Document], Vocabulary]:
    """Train every model on the same TinyWorld documents and judge it on the same fresh ones of the validation side."""
    world = World()
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, run.seed, "train")
    fresh, n_tokens = world.documents(config.n_eval, run.seed, "validation"), len(vocabulary)
    makers = {
        "unigram": partial(NGramModel, 1, n_tokens),
        "bag of words": partial(BagOfWords, n_tokens, config.d_model),
        f"{config.order}-gram Kneser-Ney": partial(NGramModel, config.order, n_tokens),
        **{cell.upper(): partial(LanguageModel, n_tokens, config.d_model, cell) for cell in CELLS},
    }
    rungs = []
    for name, maker in makers.items():
        seed_everything(run.seed)
        model, start = maker(), time.perf_counter()
        if isinstance(model, NGramModel):
            curve = []
            model.fit([BOS_ID, *vocabulary.encode(document.tokens)] for document in documents)
        else:
            batches = document_batches(documents, vocabulary, config.batch_size, config.seq_len, run.seed)
            curve = fit(model.to(pick_device(run.device)), batches, config.max_steps, config.learning_rate, name)
        seconds = time.perf_counter() - start
        rungs.append(Rung(name, model, document_losses(model, fresh, vocabulary), curve, seconds))
    return rungs, fresh, vocabulary


def floor_of(documents: list[Document]) -> float:
    """Mean surprisal of the documents, nats per token: the loss of a model that knows the language exactly."""
    return sum(sum(document.surprisal) for document in documents) / sum(len(document.tokens) for document in documents)


def sample_documents(model, vocabulary: Vocabulary, n_samples: int, seed: int, temperature: float = 1.0) -> list:
    """Draw TinyWorld documents from a model, at most 100 tokens each, without surprisal."""
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    prompt = torch.full((n_samples, 1), BOS_ID, device=device_of(model))
    rows = generate_ids(model, prompt, 100, temperature, generator).tolist()
    rows = [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in rows]
    return [Document("sample", vocabulary.decode(row), []) for row in rows]


def is_grammatical(document: Document, world: World) -> bool:
    """Whether TinyWorld could have written the document, as a whole."""
    try:
        world.surprisal(document.tokens)
    except ValueError:
        return False
    return document.tokens[-1] == FIRST_TOKENS[EOS_ID]


def grammatical_share(documents: list[Document]) -> float:
    """Fraction of the documents that TinyWorld could have written."""
    world = World()
    return sum(is_grammatical(document, world) for document in documents) / len(documents)


def plot_lines(
    series: dict[str, tuple], levels: dict[str, float], labels: tuple[str, str], scales: tuple[str, str]
) -> Figure:
    """Draw (x, y) series as lines and `levels` as dashed horizontals; labels and scales are those of x and y."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (x, y) in series.items():
        axis.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=4)
    for index, (name, level) in enumerate(levels.items()):
        axis.axhline(level, color="black", linestyle=("--", ":", "-.")[index % 3], linewidth=1, label=name)
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale=scales[0], yscale=scales[1])
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_ladder(rungs: list[Rung], fresh: list[Document]) -> Figure:
    """Draw the smoothed training losses of the networks above the levels of the counting models and the floor."""
    n_tokens, series = sum(len(document.tokens) for document in fresh), {}
    for rung in (rung for rung in rungs if rung.curve):
        window = math.ceil(len(rung.curve) / 50)
        smooth = np.convolve(rung.curve, np.full(window, 1 / window), "valid")
        series[rung.name] = (np.arange(len(smooth)) + window, smooth)
    levels = {rung.name: sum(rung.losses) / n_tokens for rung in rungs if not rung.curve}
    labels = ("optimizer step", "loss (nats per token)")
    figure = plot_lines(series, {**levels, "entropy floor": floor_of(fresh)}, labels, ("linear", "log"))
    figure.axes[0].minorticks_off()
    figure.axes[0].set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    return figure


# Failures on purpose, each beside the sound run: `--break NAME`


def padded_batches(documents: Iterable[Document], vocabulary: Vocabulary, batch_size: int, break_: str) -> Iterator:
    """Yield (inputs, targets): a document in each row, padded to the longest of its batch, the loss blind to padding.

    Two classic mistakes can be made: "pad-in-loss" counts the padding as tokens to predict, "no-shift" asks for the
    token that the model reads instead of the next one.
    """
    documents = iter(documents)
    while chosen := list(itertools.islice(documents, batch_size)):
        rows = [torch.tensor([BOS_ID, *vocabulary.encode(document.tokens)]) for document in chosen]
        token_ids = nn.utils.rnn.pad_sequence(rows, True, PAD_ID)  # (batch, seq_and_one)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]  # (batch, seq)
        is_padding = targets == PAD_ID  # (batch, seq)
        if break_ == "no-shift":
            targets = inputs
        if break_ != "pad-in-loss":
            targets = targets.masked_fill(is_padding, IGNORE)
        yield inputs, targets


@torch.no_grad()
def reported_loss(model: nn.Module, batches: Iterable) -> float:
    """What a training log would show: nats over counted targets, whatever the batches count."""
    nats, counted = 0.0, 0
    for inputs, targets in batches:
        nats += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        counted += (targets != IGNORE).sum().item()
    return nats / counted


def break_batches(config: LadderConfig, seed: int, break_: str) -> list[tuple[str, float, float]]:
    """Train a GRU on sound and on spoiled batches: the gap that each reports, and the gap when scored soundly."""
    world, found = World(), []
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, seed, "train")
    fresh = world.documents(config.n_eval, seed, "validation")
    for kind in ("none", break_):
        seed_everything(seed)
        model = LanguageModel(len(vocabulary), config.d_model, "gru")
        stream = reshuffled(list(documents), random.Random(seed))
        batches = padded_batches(stream, vocabulary, config.batch_size, kind)
        fit(model, batches, config.max_steps, config.learning_rate, f"break: {kind}")
        gaps = [reported_loss(model, padded_batches(fresh, vocabulary, 64, how)) for how in (kind, "none")]
        found.append([gap - floor_of(fresh) for gap in gaps])
    measures = ("reported loss above the floor (nats per token)", "the same model, scored soundly")
    return [(measure, *values) for measure, values in zip(measures, zip(*found, strict=True), strict=True)]


def break_clipping(config: LadderConfig, seed: int) -> list[tuple[str, float, float]]:
    """Train an RNN whose state matrix stretches 2.5 times by plain gradient descent, with clipping and without."""
    world, found = World(), []
    vocabulary, documents = Vocabulary(world.vocabulary()), world.documents(config.n_documents, seed, "train")
    for max_norm in (1.0, math.inf):
        seed_everything(seed)
        model = LanguageModel(len(vocabulary), config.d_model, "rnn")
        nn.init.orthogonal_(model.layers.cells[0].state_proj.weight, 2.5)
        optimizer = torch.optim.SGD(model.parameters())
        batches = document_batches(documents, vocabulary, config.batch_size, config.seq_len, seed)
        losses, largest = [], 0.0
        for step, (inputs, targets) in enumerate(itertools.islice(batches, config.max_steps)):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            losses.append(update(loss, optimizer, step, config.max_steps, 1.0, max_norm))
            moved = sum((new - old).square().sum() for new, old in zip(model.parameters(), before, strict=True))
            largest = max(largest, moved.sqrt().item())
        found.append((largest, float(np.mean(losses[-math.ceil(config.max_steps / 10) :]))))
    measures = ("largest step of the parameters (length)", "training loss at the end (nats per token)")
    return [(measure, *values) for measure, values in zip(measures, zip(*found, strict=True), strict=True)]


def break_forget_bias(config: LadderConfig, seed: int) -> list[tuple[str, float, float]]:
    """A fresh LSTM with and without its forget bias of 1: the gradient that comes back over 50 steps."""
    found = measure_gradients(config.d_model, 51, seed)
    return [("gradient norm 50 steps back", found["LSTM"][50], found["LSTM, forget bias 0"][50])]


BREAKS: dict[str, Callable[[LadderConfig, int], list[tuple[str, float, float]]]] = {
    "no-shift": partial(break_batches, break_="no-shift"),
    "pad-in-loss": partial(break_batches, break_="pad-in-loss"),
    "no-clip": break_clipping,
    "forget-bias": break_forget_bias,
}


# The verbs


def demo(config: LadderConfig, run: RunConfig) -> None:
    """Train n-grams and recurrent networks on TinyWorld and show how far each stays above the entropy."""
    if config.break_ != "none":
        announce(f"the failure {config.break_} beside the sound run", 0.15 * config.max_steps)
        for measure, sound, broken in BREAKS[config.break_](config, run.seed):
            print(f"{measure}: sound {sound:.3g}, with --break {config.break_} {broken:.3g}")
        return
    per_token = 0.8e-3 + 0.9e-6 * config.batch_size * config.d_model  # of a row, in all four networks
    seconds = 10 + per_token * config.seq_len * config.max_steps
    announce(f"2 counting models and 4 networks of {config.max_steps} steps each", seconds)
    rungs, fresh, vocabulary = climb(config, run)
    n_tokens, floor, uniform = (
        sum(len(document.tokens) for document in fresh),
        floor_of(fresh),
        math.log(len(vocabulary)),
    )
    print(f"{n_tokens} tokens of {len(fresh)} fresh documents, vocabulary {len(vocabulary)}, seed {run.seed}")
    print(f"{'model':22}{'nats/token':>11}{'gap to the floor':>22}{'perplexity':>12}{'seconds':>9}")
    print(f"{'uniform (chance)':22}{uniform:11.3f}{uniform - floor:13.3f}{perplexity(uniform):21.2f}")
    for rung in rungs:
        gap, error = gap_to_floor(rung.losses, fresh)
        nats = sum(rung.losses) / n_tokens
        print(f"{rung.name:22}{nats:11.3f}{gap:13.3f} +- {error:.3f}{perplexity(nats):12.2f}{rung.seconds:9.1f}")
    print(f"{'floor (optimum)':22}{floor:11.3f}{0:13.3f}{perplexity(floor):21.2f}")
    save_figure(plot_ladder(rungs, fresh), run.out / "ladder.svg")
    for rung in rungs:
        if hasattr(rung.model, "advance"):
            samples = sample_documents(rung.model, vocabulary, 100, run.seed)
            share = grammatical_share(samples)
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
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != card["sha256"]:
        raise ValueError(f"{shown(folder / 'model.safetensors')} is damaged (its sha256 differs); run train again")
    vocabulary = Vocabulary(card["tokens"])
    model = LanguageModel(len(vocabulary), card["d_model"], card["cell"], card["n_layers"])
    model.load_state_dict(safetensors.torch.load(weights))
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


def measure_text(
    train_text: str, test_text: str, config: CharacterConfig, runs: list[RunConfig]
) -> dict[str, float | list[float]]:
    """Bits per byte of the test text: uniform, compressors, a 5-gram, and a network (a list, one number a run)."""
    vocabulary = Vocabulary(sorted(set(train_text + test_text)))
    five_gram = NGramModel(5, len(vocabulary)).fit([[BOS_ID, *vocabulary.encode(train_text)]])
    models = (train_character_lm(train_text, vocabulary, config, run)[0] for run in runs)
    return {
        "uniform": uniform_bits(vocabulary, test_text),
        **compressed_bits(train_text, test_text),
        "5-gram Kneser-Ney": text_bits(five_gram, vocabulary, test_text),
        config.cell.upper(): [text_bits(model, vocabulary, test_text) for model in models],
    }


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


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Time our layers against torch.nn's, and the scan against the loop, as ratios in one run."""
    announce(f"{config.n_repeats} rounds of forward and backward of 10 layers", config.n_repeats * 0.6)
    device = pick_device(run.device)
    seed_everything(run.seed)
    print(describe_machine())
    x = torch.randn(config.batch_size, config.seq_len, config.d_hidden, device=device)
    for cell, layer_cls in CELLS.items():
        ours = layer_cls(config.d_hidden, config.d_hidden).to(device)
        layers = {"ours": ours, "torch": ours.to_torch()}
        seconds = time_in_turns(
            {name: partial(forward_backward, layer, x) for name, layer in layers.items()}, config.n_repeats
        )
        print(f"{cell.upper()} beside nn.{cell.upper()}: {speed_ratio(seconds['ours'], seconds['torch'])}")
    for rows, steps in ((config.batch_size, config.seq_len), (1, 16 * config.seq_len)):
        seconds = measure_scan(steps, rows, config.d_hidden, config.n_repeats, device)
        print(f"scan beside loop, {rows} x {steps} steps: {speed_ratio(seconds['scan'], seconds['loop'])}")


# The chapter's figures and tables


@dataclass(frozen=True)
class FiguresConfig:
    only: tuple[str, ...] = ()  # experiments to run: data, ladder, gradients, memory, text, scan, breaks; none: all
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go
    n_seeds: int = 3  # runs of every experiment that compares
    n_documents: int = 20_000  # TinyWorld documents to train on
    n_eval: int = 1_000  # fresh documents on which every model is judged
    max_steps: int = 300  # optimizer steps of each network of the ladder
    memory_steps: int = 400  # optimizer steps of each network that must remember
    max_symbols: int = 16  # longest sequence to remember
    text_steps: int = 800  # optimizer steps of the character model
    eval_chars: int = 100_000  # held-out characters of Python text
    max_lag: int = 100  # steps back over which gradients are measured
    scan_steps: int = 4096  # longest recurrence that is timed

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(EXPERIMENTS))
        if unknown:
            raise ValueError(f"unknown experiment {', '.join(unknown)}; known are {', '.join(EXPERIMENTS)}")
        check_range(self, "n_seeds", "n_documents", "max_steps", "memory_steps", "text_steps", "eval_chars", least=1)
        check_range(self, "n_eval", "max_symbols", "max_lag", "scan_steps", least=2)

    def save(self, name: str, columns: list[Column], rows: list[list], n_seeds: int, experiment: str) -> None:
        command = f"python 02-sequence-modeling/sequence_modeling.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), command)


def measure_data(config: FiguresConfig, run: RunConfig) -> None:
    """What each kind of document is worth, and one document with the surprisal of every token."""
    rows = statistics(World(), 2 * config.n_eval, seed=0)
    columns = [Column("kind"), Column("share", digits=".1%"), Column("tokens", "mean of a document", ".1f")]
    columns += [Column("entropy", "nats per token", ".3f"), Column("standard error", digits=".3f")]
    columns += [Column("repeats in 2,000 documents", digits=".1%")]
    cells = [[row.kind, row.share, row.tokens, row.entropy, row.error, row.repeats] for row in rows]
    config.save("kinds", columns, cells, 1, "data")
    save_figure(plot_surprisal(World().document(random.Random(0), "story"), rows), config.folder / "surprisal.svg")


def measure_ladder(config: FiguresConfig, run: RunConfig) -> None:
    """The gap of every model to the floor, over all documents and by kind."""
    sizes = {"n_documents": config.n_documents, "n_eval": config.n_eval, "max_steps": config.max_steps}
    table, by_kind = {}, {}
    for seed in range(config.n_seeds):
        rungs, fresh, vocabulary = climb(LadderConfig(**sizes), RunConfig(seed, run.device, run.out, run.threads))
        floor, n_tokens = floor_of(fresh), sum(len(document.tokens) for document in fresh)
        rows = [("uniform (chance)", math.log(len(vocabulary)), None)]
        for rung in rungs:
            share = None
            if hasattr(rung.model, "advance"):
                share = grammatical_share(sample_documents(rung.model, vocabulary, 100, seed))
            rows.append((rung.name, sum(rung.losses) / n_tokens, share))
            for kind in World().kinds:
                pairs = [pair for pair in zip(rung.losses, fresh, strict=True) if pair[1].kind == kind]
                if len(pairs) > 1:
                    gap, _ = gap_to_floor(*zip(*pairs, strict=True))
                    by_kind.setdefault(kind, {}).setdefault(rung.name, []).append(gap)
        rows.append(("floor (optimum)", floor, 1.0))
        for name, nats, share in rows:
            for index, value in enumerate((nats, nats - floor, perplexity(nats), share)):
                table.setdefault(name, ([], [], [], []))[index].append(value)
        if seed == 0:
            save_figure(plot_ladder(rungs, fresh), config.folder / "ladder.svg")
    columns = [Column("model"), Column("loss", "nats per token", ".3f"), Column("gap to the floor", digits=".3f")]
    columns += [Column("perplexity", digits=".2f"), Column("grammatical samples", digits=".0%")]
    cells = [[name, *("-" if None in cell else cell for cell in lists)] for name, lists in table.items()]
    config.save("ladder", columns, cells, config.n_seeds, "ladder")
    models = [name for name in table if name not in ("uniform (chance)", "floor (optimum)", "bag of words")]
    columns = [Column("gap by kind (nats per token)"), *(Column(name, digits=".2f") for name in models)]
    cells = [[kind, *(gaps[name] for name in models)] for kind, gaps in by_kind.items()]
    config.save("ladder-kinds", columns, cells, config.n_seeds, "ladder")


def measure_lags(config: FiguresConfig, run: RunConfig) -> None:
    """The gradient that reaches the input k steps back, and the bound of the RNN."""
    runs = [measure_gradients(64, config.max_lag + 1, seed) for seed in range(config.n_seeds)]
    lags = sorted({min(lag, config.max_lag) for lag in (0, 10, 25, 50, 100)})
    columns = [Column("layer"), *(Column(f"{lag} steps back", digits=".1e") for lag in lags)]
    cells = [[name, *([found[name][lag] for found in runs] for lag in lags)] for name in runs[0]]
    config.save("gradients", columns, cells, config.n_seeds, "gradients")
    save_figure(plot_gradients(runs[0]), config.folder / "gradients.svg")


def plot_gradients(found: dict[str, list[float]]) -> Figure:
    """Draw gradient norms by lag on a log scale, each RNN with its bound as a dotted line of the same colour."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    colours = {}
    for name, norms in found.items():
        kind, _, gain = name.partition(", gain ")
        style = ":" if kind == "bound" else "-"
        (line,) = axis.plot(norms, style, color=colours.get(gain) if gain else None, linewidth=1.2 if gain else 2)
        colours.setdefault(gain or name, line.get_color())
        if kind != "bound":
            line.set_label(name)
    axis.plot([], [], ":", color="black", label="bound of the RNN")
    axis.set(xlabel="steps back (lag)", ylabel="norm of the gradient", yscale="log", ylim=(1e-16, 1e10))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def measure_remembering(config: FiguresConfig, run: RunConfig) -> None:
    """Accuracy against length: copying, recalling by key, and passing a sequence through one vector."""
    sizes = [2**power for power in range(1, config.max_symbols.bit_length()) if 2**power <= config.max_symbols]
    plans = {
        "copy": (copy_batch, (64,), sizes, "symbols"),
        "recall": (recall_batch, (64,), [size // 2 for size in sizes], "pairs"),
        "bottleneck": (echo_batch, (16, 64), sizes, "symbols"),
    }
    panels = {}
    for task, (make_batch, widths, lengths, unit) in plans.items():
        found: dict[str, list[list[float]]] = {}  # model -> length -> seed
        for width, seed in itertools.product(widths, range(config.n_seeds)):
            for name, scores in measure_memory(make_batch, lengths, width, config.memory_steps, seed).items():
                for place, score in enumerate(scores):
                    found.setdefault(name, [[] for _ in lengths])[place].append(score)
        levels = {"chance": [1 / N_KINDS] * len(lengths)}
        if make_batch is recall_batch:
            levels["values without their keys"] = [bag_accuracy(length) for length in lengths]
        columns = [
            Column("model"),
            *(Column(f"{length} {unit if length > 1 else 'pair'}", digits=".2f") for length in lengths),
        ]
        cells = [[name, *values] for name, values in (found | levels).items()]
        for name, values in found.items() if make_batch is echo_batch else ():
            pairs = zip(lengths, values, strict=True)
            passed = ([least_bits(length, max(score, 1 / N_KINDS)) for score in scores] for length, scores in pairs)
            cells.append([f"bits that passed, at least: {name}", *passed])
        config.save(task, columns, cells, config.n_seeds, "memory")
        panels[task] = (lengths, unit, {name: np.mean(values, axis=1) for name, values in found.items()}, levels)
    save_figure(plot_memory(panels), config.folder / "memory.svg")


def plot_memory(panels: dict[str, tuple]) -> Figure:
    """Draw accuracy against length, a panel for each task, with the levels that need no memory as dashed lines."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True)
    for axis, (task, (lengths, unit, found, levels)) in zip(axes, panels.items(), strict=True):
        for name, values in found.items():
            axis.plot(lengths, values, marker="o", markersize=4, label=name)
        for (name, values), style in zip(levels.items(), ("--", ":"), strict=False):
            axis.plot(lengths, values, style, color="black", linewidth=1.3, label=name)
        axis.set(xlabel=f"{unit} to remember", title=task, xscale="log", ylim=(0, 1.03))
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8, loc="upper right")
    axes[0].set_ylabel("accuracy (fraction)")
    return figure


def measure_compression(config: FiguresConfig, run: RunConfig) -> None:
    """Bits per byte of held-out Python text: general compressors, counting, and a short run of an LSTM."""
    train_text, test_text = (read_text("python-text", split) for split in ("train", "validation"))
    model = CharacterConfig(d_model=128, max_steps=config.text_steps)
    runs = [RunConfig(seed, run.device, run.out, run.threads) for seed in range(config.n_seeds)]
    bits = measure_text(train_text, test_text[: config.eval_chars], model, runs)
    columns = [Column("model"), Column("held-out text", "bits per byte", ".3f")]
    config.save("text", columns, [[name, value] for name, value in bits.items()], config.n_seeds, "text")
    save_figure(plot_bits(bits), config.folder / "text.svg")


def plot_bits(bits: dict[str, float | list[float]]) -> Figure:
    """Draw bits per byte as bars, best last."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    means = {name: float(np.mean(value)) for name, value in bits.items()}
    names = sorted(means, key=means.get, reverse=True)
    colours = ["C0" if isinstance(bits[name], list) or "gram" in name else "#999999" for name in names]
    bars = axis.barh(names, [means[name] for name in names], color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel="bits per byte of held-out Python text (less is better)")
    axis.invert_yaxis()
    return figure


def measure_speed(config: FiguresConfig, run: RunConfig) -> None:
    """Time the loop and the scan of one recurrence, forward and backward, and compare their states."""
    lengths = [length for length in (64, 256, 1024, 4096, 16384) if length < config.scan_steps] + [config.scan_steps]
    cells = []
    for seq_len in lengths:
        seconds = measure_scan(seq_len, 1, 64, 7, pick_device(run.device))
        loop, scan = (1e3 * float(np.median(seconds[form])) for form in ("loop", "scan"))
        seed_everything(run.seed)
        a, b = torch.rand(1, seq_len, 64, dtype=torch.float64), torch.randn(1, seq_len, 64, dtype=torch.float64)
        error = largest_difference(linear_scan(a, b), linear_recurrence(a, b))
        passes = 2 * math.ceil(math.log2(seq_len))
        cells.append([str(seq_len), str(seq_len), str(passes), loop, scan, loop / scan, error])
    columns = [Column("steps"), Column("sequential passes, loop"), Column("sequential passes, scan")]
    columns += [Column("loop", "ms", ".1f"), Column("scan", "ms", ".1f"), Column("loop / scan", digits=".1f")]
    config.save("scan", [*columns, Column("largest difference", digits=".0e")], cells, 1, "scan")


def measure_breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Every failure beside the sound run."""
    sizes = {"n_documents": config.n_documents, "n_eval": config.n_eval, "max_steps": math.ceil(config.max_steps / 2)}
    cells = []
    for name, show in BREAKS.items():
        runs = [show(LadderConfig(**sizes), seed) for seed in range(config.n_seeds)]
        for rows in zip(*runs, strict=True):
            sound, broken = ([row[place] for row in rows] for place in (1, 2))
            cells.append([f"`{name}`", rows[0][0], sound, broken])
    columns = [Column("`--break`"), Column("what is measured"), Column("sound"), Column("broken")]
    config.save("breaks", columns, cells, config.n_seeds, "breaks")


EXPERIMENTS: dict[str, Callable[[FiguresConfig, RunConfig], None]] = {
    "data": measure_data,
    "ladder": measure_ladder,
    "gradients": measure_lags,
    "memory": measure_remembering,
    "text": measure_compression,
    "scan": measure_speed,
    "breaks": measure_breaks,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments, write figures and results.json, and fill the chapter's tables."""
    names = config.only or tuple(EXPERIMENTS)
    announce(f"the experiments {', '.join(names)}, {config.n_seeds} seeds", 420 * len(names) / len(EXPERIMENTS))
    for name in names:
        EXPERIMENTS[name](config, run)
    fill_chapter(config.folder.parent)


def main(argv: list[str] | None = None) -> None:
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
