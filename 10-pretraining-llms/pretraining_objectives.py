"""Topic 10 - Pretraining objectives: one document of token ids, and five ways to make a lesson of it.

    causal_example(ids)                        # every token from those before it
    prefix_example(ids, rng)                   # the same, but a prefix is read in both directions and not predicted
    fim_document(ids, fim_ids, rng, rate=0.5)  # prefix, suffix, middle: a causal model learns to fill a gap
    masked_example(ids, ...), span_example(ids, ...)          # for encoders, for encoder-decoders: topic 08's
    ObjectiveBatches(documents, make, batch_size, seed)       # batches(step) of any of them, for topic 07's fit

Raffel et al. 2020 (arXiv 1910.10683), prefix language model and span corruption; Bavarian et al. 2022 (arXiv
2207.14255), fill in the middle; Devlin et al. 2019 (arXiv 1810.04805), masked language model.
"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention_mechanisms import causal_mask
from bert_family import MaskingConfig, mask_tokens
from packing import Batch, EpochOrder, PackedTransformer
from sequence_modeling import IGNORE, PAD_ID, check_token_ids
from t5 import SpanConfig, corrupt_spans, draw_spans


class Example(NamedTuple):
    """One row: what the model reads, what it must say at each position (-100: nothing), and how much is a prefix."""

    inputs: list[int]
    targets: list[int]
    prefix_length: int = 0  # positions that every position may see


def check_document(ids: Sequence[int], least: int = 2) -> None:
    if len(ids) < least:
        raise ValueError(f"a document needs at least {least} token ids for this objective, got {len(ids)}")


def causal_example(ids: Sequence[int]) -> Example:
    """Position t is asked for token t + 1: n - 1 targets for n tokens."""
    check_document(ids)
    return Example(list(ids[:-1]), list(ids[1:]))


def prefix_example(ids: Sequence[int], rng: random.Random) -> Example:
    """A prefix of uniformly drawn length, 1 to n - 1, is read in both directions; the tokens after it are targets.

    Targets inside the prefix would be copied from the next position, which the model can see there: no lesson.
    """
    check_document(ids)
    length = 1 + int((len(ids) - 1) * rng.random())
    targets = [IGNORE] * (length - 1) + list(ids[length:])
    return Example(list(ids[:-1]), targets, length)


def fim_document(ids: Sequence[int], fim_ids: tuple[int, int, int], rng: random.Random, rate: float = 0.5) -> list[int]:
    """With probability `rate` a document for filling in: <prefix> a <suffix> c <middle> b, where a + b + c is its text.

    The first and the last id (<|endoftext|> both) stay where they are. The two cuts are drawn uniformly among the
    places between tokens, ends included, so any of the three may be empty. Bavarian et al. 2022 cut characters, before
    tokenising: there the model also learns to begin in the middle of a token. Every token is still a target.
    """
    check_document(ids)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}")
    if rng.random() >= rate:
        return list(ids)
    first, *text, last = ids
    low, high = sorted(int((len(text) + 1) * rng.random()) for _ in range(2))
    prefix, suffix, middle = fim_ids
    return [first, prefix, *text[:low], suffix, *text[high:], middle, *text[low:high], last]


def restore_fim(ids: Sequence[int], fim_ids: tuple[int, int, int]) -> list[int]:
    """The document that `fim_document` cut; one that it left alone stays as it is. Raises ValueError for other ids."""
    prefix, suffix, middle = fim_ids
    if prefix not in ids:
        return list(ids)
    places = [list(ids).index(mark) if mark in ids else -1 for mark in fim_ids]
    if not 1 <= places[0] < places[1] < places[2]:
        raise ValueError(f"the marks of filling in stand at {places}, expected prefix, suffix, middle in this order")
    before, rest = ids[: places[0]], ids[places[0] + 1 : places[1]]
    return [*before, *rest, *ids[places[2] + 1 : -1], *ids[places[1] + 1 : places[2]], ids[-1]]


def masked_example(
    ids: Sequence[int],
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int],
    config: MaskingConfig,
    generator: torch.Generator,
) -> Example:
    """Topic 08's masked language model, for one document: some tokens are hidden, and only those are targets."""
    check_document(ids, 1)
    inputs, targets = mask_tokens(torch.tensor([list(ids)]), vocab_size, mask_id, special_ids, config, generator)
    return Example(inputs[0].tolist(), targets[0].tolist())


def span_example(
    ids: Sequence[int], sentinel_ids: list[int], config: SpanConfig, generator: torch.Generator
) -> Example:
    """Topic 08's span corruption, for a decoder alone: the text with gaps is the prefix, what was in them the target.

    The first and the last id (<|endoftext|>) stay. As many gaps as there are sentinels but one are kept.
    """
    check_document(ids, 4)
    first, *text, last = ids
    spans = draw_spans(len(text), config, generator)[: len(sentinel_ids) - 1]
    source, target = corrupt_spans(text, spans, sentinel_ids)
    row = [first, *source, *target, last]
    length = 1 + len(source)
    return Example(row[:-1], [IGNORE] * (length - 1) + row[length:], length)


class ObjectiveBatches:
    """Batches of examples, padded on the right; `batches(step)` depends on the step and the seed alone.

    Gives inputs, targets (-100 on padding) and prefix_lengths: (batch, seq), (batch, seq), (batch). `make(ids, rng)`
    turns a document into an Example, differently in every epoch.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        make: Callable[[Sequence[int], random.Random], Example],
        batch_size: int,
        seed: int,
    ) -> None:
        self.documents, self.make, self.seed = documents, make, seed
        self.order = EpochOrder(len(documents), batch_size, seed)

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed} {step} objective")
        examples = [self.make(self.documents[index], rng) for index in self.order(step)]
        inputs = pad_sequence([torch.tensor(item.inputs) for item in examples], True, PAD_ID)  # (batch, seq)
        targets = pad_sequence([torch.tensor(item.targets) for item in examples], True, IGNORE)  # (batch, seq)
        prefix_lengths = torch.tensor([item.prefix_length for item in examples])  # (batch)
        return {"inputs": inputs, "targets": targets, "prefix_lengths": prefix_lengths}


class PrefixTransformer(PackedTransformer):
    """Topic 07's language model with a prefix that is read in both directions; weights and names are its own.

    Shapes: token_ids (batch, seq), prefix_lengths (batch) to logits (batch, seq, vocab). A prefix of length 0 or 1
    gives the causal model. Padding must follow the text.
    """

    def forward(self, token_ids: Tensor, caches: list | None = None, prefix_lengths: Tensor | None = None) -> Tensor:
        if prefix_lengths is None:
            return super().forward(token_ids, caches)
        check_token_ids(token_ids, self.vocab_size)
        x = self.dropout(self.pos_emb(self.token_emb(token_ids)))  # (batch, seq, d_model)
        mask = prefix_masks(prefix_lengths, token_ids.shape[1])  # (batch, 1, seq, seq)
        logits = self.lm_head(self.encoder(x, mask))  # (batch, seq, vocab)
        return logits


def prefix_masks(prefix_lengths: Tensor, seq_len: int) -> Tensor:
    """True where a query may attend a key: the key is in its row's prefix, or not after the query.

    prefix_lengths (batch) to (batch, 1, seq, seq), the seqs as (query, key). One prefix for each row; topic 03's
    `prefix_mask` is for one length.
    """
    in_prefix = torch.arange(seq_len, device=prefix_lengths.device) < prefix_lengths[:, None]  # (batch, seq)
    return in_prefix[:, None, None, :] | causal_mask(seq_len, device=prefix_lengths.device)
