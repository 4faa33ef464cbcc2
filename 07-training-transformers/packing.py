"""Topic 07 - Packing: documents of different lengths in rows of one length, without padding and without mixing them up.

python 07-training-transformers/training_transformers.py bench   # packed, bucketed and padded batches, in tokens/s

Paper: Krell et al. 2021 (arXiv 2107.02027), packing with a mask between documents.
"""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import causal_mask, document_mask
from sequence_modeling import IGNORE, PAD_ID, check_sizes, check_token_ids, device_of
from transformer_architecture import CausalTransformer, KeyValueCache

Batch = dict[str, Tensor]  # every tensor has the rows of the batch on its first axis


# Batches that depend on the step alone: a resumed run needs no stored position


class PackedBatches:
    """Rows of seq_len tokens, filled with whole documents, and at each position the number of its document.

    `batches(step)` gives inputs, targets (-100 on padding) and document_ids, each (batch, seq). A document is a list of
    ids from <bos> to <eos>; one longer than seq_len + 1 is cut into pieces that count as documents. Documents go into
    the fullest row with room for them, longest first, once; every epoch then draws the rows in another order.
    With `document_ids` as a mask it does not matter which documents share a row.
    """

    def __init__(self, documents: list[list[int]], batch_size: int, seq_len: int, seed: int) -> None:
        check_sizes(seq_len=seq_len)
        pieces = [
            document[start : start + seq_len + 1]
            for document in documents
            for start in range(0, len(document) - 1, seq_len)
        ]
        self.rows, self.seq_len = pack(pieces, seq_len), seq_len
        self.order = EpochOrder(len(self.rows), batch_size, seed)

    def __call__(self, step: int) -> Batch:
        rows = [self.rows[index] for index in self.order(step)]
        inputs = torch.full((len(rows), self.seq_len), PAD_ID)  # (batch, seq)
        targets = torch.full_like(inputs, IGNORE)  # (batch, seq)
        document_ids = torch.zeros_like(inputs)  # (batch, seq)
        for row, pieces in enumerate(rows):
            start = 0
            for number, piece in enumerate(pieces, start=1):
                stop = start + len(piece) - 1
                inputs[row, start:stop] = torch.tensor(piece[:-1])
                targets[row, start:stop] = torch.tensor(piece[1:])
                document_ids[row, start:stop] = number
                start = stop
        return {"inputs": inputs, "targets": targets, "document_ids": document_ids}


def pack(pieces: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """Best fit, longest first: rows of pieces. A piece takes a position for each id but its last, which is no input."""
    with_room: dict[int, list[int]] = {}  # free positions: the rows that have so many
    rows: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        length = len(piece) - 1
        free = next((room for room in range(length, seq_len) if with_room.get(room)), None)
        row = len(rows) if free is None else with_room[free].pop()
        if free is None:
            rows.append([])
        rows[row].append(piece)
        with_room.setdefault((seq_len if free is None else free) - length, []).append(row)
    return rows


class BucketedBatches:
    """Documents of similar length side by side, padded to the longest of their batch.

    `batches(step)` gives inputs and targets (-100 on padding), each (batch, seq). Every epoch shuffles the documents,
    sorts pools of `pool_size` batches by length and shuffles the batches; pool_size 1 is the plain padded batch.
    """

    def __init__(self, documents: list[list[int]], batch_size: int, seed: int, pool_size: int = 16) -> None:
        check_sizes(pool_size=pool_size)
        self.documents, self.pool_size = documents, pool_size
        self.order = EpochOrder(len(documents), batch_size, seed, self.sort_pools)

    def sort_pools(self, order: list[int], rng: random.Random, batch_size: int) -> list[list[int]]:
        width, batches = self.pool_size * batch_size, []
        for start in range(0, len(order), width):
            pool = sorted(order[start : start + width], key=lambda index: len(self.documents[index]))
            batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        return batches

    def __call__(self, step: int) -> Batch:
        ids = [torch.tensor(self.documents[index], dtype=torch.long) for index in self.order(step)]
        rows = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORE)  # (batch, seq_and_one)
        return {"inputs": rows[:, :-1].clamp(min=PAD_ID), "targets": rows[:, 1:]}


class EpochOrder:
    """Which of n items form the batch of a step: every item once in an epoch, in an order that depends on the seed."""

    def __init__(self, n_items: int, batch_size: int, seed: int, cut: Callable | None = None) -> None:
        check_sizes(batch_size=batch_size)
        if n_items < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the data has rows ({n_items}); lower it")
        self.n_items, self.batch_size, self.seed, self.cut = n_items, batch_size, seed, cut
        self.n_batches, self.known = math.ceil(n_items / batch_size), (-1, [])

    def __call__(self, step: int) -> list[int]:
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        epoch, index = divmod(step, self.n_batches)
        if self.known[0] != epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = rng.sample(range(self.n_items), self.n_items)
            cut = self.cut or (lambda o, _, size: [o[at : at + size] for at in range(0, len(o), size)])
            self.known = (epoch, cut(order, rng, self.batch_size))
        return self.known[1][index]


# Models and losses for them


class PackedTransformer(CausalTransformer):
    """Topic 04's language model, for rows that hold several documents: each position sees its own document alone.

    Shapes: token_ids, document_ids (batch, seq) to logits (batch, seq, vocab); without document_ids as its base class,
    whose weights it shares name by name. Positions need not start again in each document where attention sees only the
    distance of two positions, which is the same anywhere in a row: rotary, alibi, relative, none.
    Raises ValueError for document_ids with positions that are added to the embeddings, or with caches.
    """

    def forward(
        self, token_ids: Tensor, caches: list[KeyValueCache] | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        if document_ids is None:
            return super().forward(token_ids, caches)
        if caches is not None:
            raise ValueError("caches continue one document in each row; leave out document_ids or the caches")
        if self.config.positions in ("sinusoidal", "learned"):
            raise ValueError(
                f"positions={self.config.positions!r} count from the start of the row, not of the document; "
                "pack with rotary, alibi, relative or none"
            )
        check_token_ids(token_ids, self.vocab_size)
        x = self.dropout(self.pos_emb(self.token_emb(token_ids)))  # (batch, seq, d_model)
        mask = document_mask(document_ids) & causal_mask(token_ids.shape[1], device=x.device)  # (batch, 1, seq, seq)
        logits = self.lm_head(self.encoder(x, mask))  # (batch, seq, vocab)
        return logits


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def language_model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats of all counted targets of a batch together, and their number; passes document_ids on if there are any.

    The batch may lie on another device than the model.
    """
    batch = to_device(batch, device_of(model))
    documents = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
    logits = model(batch["inputs"], **documents)  # (batch, seq, vocab)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # a sum of thousands of losses needs more than bf16's 8 bits
    targets = batch["targets"]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (targets != IGNORE).sum()
