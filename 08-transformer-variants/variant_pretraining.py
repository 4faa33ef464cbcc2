"""Topic 08 - Pretraining the variants: one language, three kinds of transformer, three objectives, one budget.

python 08-transformer-variants/transformer_variants.py pretrain --model bert    # train one of them on TinyWorld
python 08-transformer-variants/transformer_variants.py fill "One day [MASK] found a red ball in the cellar." # ask it

Every model reads the same stream of documents; each objective turns them into inputs and targets of its own. A budget
is a number of floating-point operations, counted in the matrix products that PyTorch really runs.

Papers: those of bert_family.py, gpt2.py and t5.py; Salazar et al. 2020 (arXiv 1910.14659), pseudo-likelihoods.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bert_family import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Electra,
    ElectraConfig,
    ElectraDiscriminator,
    ElectraGenerator,
    MaskingConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    mask_tokens,
)
from byte_level_bpe import ByteLevelBPE
from gpt2 import GPT2, GPT2Config, init_weights
from packing import Batch, to_device
from python_text import load_texts
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, PAD_ID, Vocabulary, device_of
from t5 import T5, Bart, BartConfig, EncoderDecoder, SpanConfig, T5Config, corrupt_spans, draw_spans
from tiny_world import SPECIAL_TOKENS, World, WorldConfig, join
from training_transformers import TrainConfig, fit
from transformer_architecture import MatmulCounter
from workbench import check_name, check_range, shown

HELD_OUT_SEED = 4242  # of the documents that models are examined with; no setting was chosen on them
SENTINELS = tuple(f"<extra_{index}>" for index in range(32))
MASK_ID = SPECIAL_TOKENS.index("<mask>")


@dataclass(frozen=True)
class VariantConfig:
    """The shape of a small model of any kind; an encoder-decoder divides its layers between its two halves."""

    d_model: int = 64  # width of the residual stream
    n_layers: int = 2  # blocks, of encoder and decoder together
    n_heads: int = 4  # attention heads; must divide d_model
    d_ff: int = 256  # width inside the feed-forward networks
    max_seq_len: int = 128  # most positions

    def __post_init__(self) -> None:
        check_range(self, "d_model", "n_heads", "d_ff", least=1)
        check_range(self, "n_layers", least=2)
        check_range(self, "max_seq_len", least=8)


@dataclass(frozen=True)
class VariantMasking(MaskingConfig):
    """Masking for short trainings: more targets in a step (Wettig et al. 2023, arXiv 2202.08005)."""

    mask_rate: float = 0.3  # fraction of the tokens to predict; 0.15 in BERT


# The language

# Few words and four kinds of document: small enough that a quarter of a teraFLOP teaches a good part of it
MIXTURE = {"story": 4, "scene": 2, "talk": 1, "roles": 2}
WORLD = WorldConfig(max_words=4, n_people=8, max_sum=5, max_events=2, mixture=MIXTURE)


@functools.cache
def word_world() -> tuple[World, Vocabulary]:
    """TinyWorld and its words, with sentinels for span corruption at the end."""
    world = World(WORLD)
    return world, Vocabulary([*world.vocabulary(), *SENTINELS])


@functools.cache
def special_ids() -> frozenset[int]:
    """Ids that are no words: never masked, never drawn as a replacement."""
    vocabulary = word_world()[1]
    return frozenset(vocabulary.encode([*SPECIAL_TOKENS, *SENTINELS]))


def sentinel_ids() -> list[int]:
    return word_world()[1].encode(SENTINELS)


def training_documents(step: int, seed: int, batch_size: int) -> list[list[int]]:
    """Ids of the fresh documents of one step, each after its <bos>: the same for every model with this seed.

    The documents of GROUP steps are drawn together and dealt out by length, so that rows need little padding; which
    lengths come first is drawn as well.
    """
    group, place = divmod(step, GROUP)
    documents, order = document_group(group, seed, batch_size)
    first = order[place] * batch_size
    return documents[first : first + batch_size]


GROUP = 8  # steps whose documents are drawn together


@functools.lru_cache(maxsize=4)
def document_group(group: int, seed: int, batch_size: int) -> tuple[list[list[int]], list[int]]:
    world, vocabulary = word_world()
    stream = world.stream((seed << 32) + group, split="train")
    documents = [[BOS_ID, *vocabulary.encode(document.tokens)] for document in islice(stream, GROUP * batch_size)]
    order = torch.randperm(GROUP, generator=generator_of(seed, group)).tolist()
    return sorted(documents, key=len), order


class Corpus(NamedTuple):
    """What a model is pretrained on: ids of documents, each from <bos> to <eos>, and which ids are no words."""

    vocab_size: int
    special_ids: frozenset[int]
    sentinel_ids: list[int]
    documents: Callable[[int, int, int], list[list[int]]]  # (step, seed, batch_size) -> the documents of that step


def world_corpus() -> Corpus:
    return Corpus(len(word_world()[1]), special_ids(), sentinel_ids(), training_documents)


def text_corpus(data: str, split: str, tokenizer: ByteLevelBPE, max_seq_len: int) -> Corpus:
    """Any texts that `load_texts` reads, cut into pieces that a model of max_seq_len can take."""
    pieces, length = [], max_seq_len - 4
    for text in load_texts(data, split):
        ids = tokenizer.encode(text)
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ValueError(f"{data} has no text of two tokens or more on the {split} side; give more")

    def documents(step: int, seed: int, batch_size: int) -> list[list[int]]:
        picked = torch.randint(len(pieces), (batch_size,), generator=generator_of(seed, step, "texts")).tolist()
        return [[BOS_ID, *pieces[index], EOS_ID] for index in picked]

    n_special = len(SPECIAL_TOKENS) + len(SENTINELS)
    first = len(SPECIAL_TOKENS)
    return Corpus(len(tokenizer.vocab), frozenset(range(n_special)), list(range(first, n_special)), documents)


def train_tokenizer(data: str, vocab_size: int) -> ByteLevelBPE:
    """Topic 06's byte-level BPE of some texts, with the special tokens of this topic on the first ids."""
    special = (*SPECIAL_TOKENS, *SENTINELS)
    least = len(special) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {least}: {len(special)} special tokens and 256 bytes"
        )
    return ByteLevelBPE.train(load_texts(data), vocab_size, special)


def padded(rows: Sequence[Sequence[int]], filler_id: int = PAD_ID) -> Tensor:
    """Rows of ids as one tensor (batch, seq), filled up on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler_id)


def generator_of(*numbers: int | str) -> torch.Generator:
    """A generator whose stream is decided by these numbers alone."""
    return torch.Generator().manual_seed(random.Random(repr(numbers)).getrandbits(62))


# The objectives: batches that depend on the step alone, and losses as (sum, number of targets)


class MaskedBatches:
    """Masked language modelling: documents with some tokens hidden, swapped or kept; targets there alone."""

    def __init__(
        self, batch_size: int, seed: int, masking: MaskingConfig | None = None, corpus: Corpus | None = None
    ) -> None:
        self.batch_size, self.seed, self.corpus = batch_size, seed, corpus or world_corpus()
        self.masking = masking or VariantMasking()

    def __call__(self, step: int) -> Batch:
        corpus, generator = self.corpus, generator_of(self.seed, step)
        token_ids = padded(corpus.documents(step, self.seed, self.batch_size))  # (batch, seq)
        sizes = (corpus.vocab_size, MASK_ID, corpus.special_ids)
        inputs, targets = mask_tokens(token_ids, *sizes, self.masking, generator)
        draws = torch.randint(2**31, (len(token_ids),), generator=generator)  # (batch); decide an ELECTRA's samples
        return {"inputs": inputs, "targets": targets, "real": token_ids != PAD_ID, "draws": draws}


class CausalBatches:
    """Language modelling: every token of a document, <eos> too, from those before it.

    For comparisons with a masked model: `asked` is the share of the tokens that it must predict, `hidden` the share
    that it reads as <mask>.
    """

    def __init__(
        self, batch_size: int, seed: int, corpus: Corpus | None = None, asked: float = 1.0, hidden: float = 0.0
    ) -> None:
        self.batch_size, self.seed, self.corpus = batch_size, seed, corpus or world_corpus()
        self.asked, self.hidden = asked, hidden

    def __call__(self, step: int) -> Batch:
        token_ids = padded(self.corpus.documents(step, self.seed, self.batch_size), IGNORE)  # (batch, seq_and_one)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]  # (batch, seq)
        lots = torch.rand(
            2, *targets.shape, generator=generator_of(self.seed, step, "lots")
        )  # (2, batch, seq), below 1
        special = torch.tensor([IGNORE, *self.corpus.special_ids])
        inputs = inputs.masked_fill((lots[1] < self.hidden) & ~torch.isin(inputs, special), MASK_ID)
        return {"inputs": inputs.clamp(min=PAD_ID), "targets": targets.masked_fill(lots[0] >= self.asked, IGNORE)}


class SpanBatches:
    """Span corruption: documents with gaps, and what was in the gaps.

    A text of fewer than SHORT tokens gets one gap of one to six tokens, anywhere: T5's 15 % in pieces of three would be
    one or two gaps there too, but never one of a single word, or the first sentinel near the end, which is what a
    model is asked for when it fills in a word.
    """

    def __init__(
        self, batch_size: int, seed: int, spans: SpanConfig | None = None, corpus: Corpus | None = None
    ) -> None:
        self.batch_size, self.seed, self.corpus = batch_size, seed, corpus or world_corpus()
        self.spans = spans or SpanConfig()

    def __call__(self, step: int) -> Batch:
        generator, sentinels = generator_of(self.seed, step), self.corpus.sentinel_ids
        sources, targets = [], []
        for token_ids in self.corpus.documents(step, self.seed, self.batch_size):
            text = token_ids[1:-1]  # T5 has no <bos>, and every text ends
            spans = draw_spans(len(text), self.spans, generator) if len(text) >= SHORT else [one_span(text, generator)]
            source, target = corrupt_spans(text, spans[: len(sentinels) - 1], sentinels)
            sources.append([*source, EOS_ID])
            targets.append([*target, EOS_ID])
        inputs = padded(sources)  # (batch, src)
        return {"inputs": inputs, "real": inputs != PAD_ID, "targets": padded(targets, IGNORE)}


SHORT = 64  # tokens


def one_span(text: list[int], generator: torch.Generator) -> tuple[int, int]:
    """A gap of one to six tokens that leaves at least one, its length and its place drawn uniformly."""
    length = 1 + int(torch.randint(min(6, len(text) - 1), (), generator=generator))
    start = int(torch.randint(len(text) - length + 1, (), generator=generator))
    return start, start + length


def summed(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (targets != IGNORE).sum()


def masked_loss(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, Tensor]:
    return summed(model(batch["inputs"], None, batch["real"]), batch["targets"])


def causal_loss(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    return summed(model(batch["inputs"]), batch["targets"])


def span_loss(model: EncoderDecoder, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch["inputs"], model.shift_right(batch["targets"]), batch["real"])  # (batch, tgt, vocab)
    return summed(logits, batch["targets"])


def replaced_loss(model: Electra, batch: Batch, rtd_weight: float = 50.0) -> tuple[Tensor, Tensor]:
    """ELECTRA's two losses: the generator's sum over masked tokens, the discriminator's mean weighed to match it."""
    generator = torch.Generator(batch["draws"].device).manual_seed(int(batch["draws"][0]))
    output = model(batch["inputs"], batch["targets"], batch["real"], generator)
    mlm, count = summed(output.mlm_logits, batch["targets"])
    judged, truth = output.rtd_logits[batch["real"]], output.replaced[batch["real"]]  # (tokens)
    rtd = F.binary_cross_entropy_with_logits(judged, truth.to(judged))
    return mlm + rtd_weight * count * rtd, count


# The models


def bert_sizes(config: VariantConfig, vocab_size: int) -> dict:
    sizes = {name: getattr(config, name) for name in ("max_seq_len", "d_model", "n_layers", "n_heads", "d_ff")}
    return {**sizes, "vocab_size": vocab_size, "dropout": 0.0, "pad_id": PAD_ID}


def started(model: nn.Module, config: VariantConfig) -> nn.Module:
    """The model with the start that suits its width: the usual 0.02 is for 768, and leaves narrow maps too weak."""
    std = 0.02 * math.sqrt(768 / config.d_model)
    if isinstance(model, GPT2):
        model.start(std)
    else:
        init_weights(model, std)
    return model


def build_bert(config: VariantConfig, vocab_size: int) -> BertForMaskedLM:
    return started(BertForMaskedLM(BertConfig(**bert_sizes(config, vocab_size))), config)


def build_roberta(config: VariantConfig, vocab_size: int) -> RobertaForMaskedLM:
    return started(RobertaForMaskedLM(RobertaConfig(**bert_sizes(config, vocab_size))), config)


def build_albert(config: VariantConfig, vocab_size: int) -> AlbertForMaskedLM:
    albert = AlbertConfig(**bert_sizes(config, vocab_size), d_embedding=max(1, config.d_model // 2))
    return started(AlbertForMaskedLM(albert), config)


def build_electra(config: VariantConfig, vocab_size: int) -> Electra:
    """A generator of half the width and half the depth (Clark et al. 2020 find a quarter to a half best)."""
    sizes = bert_sizes(config, vocab_size) | {"d_embedding": config.d_model}
    small = {"d_model": config.d_model // 2, "n_layers": config.n_layers // 2, "n_heads": max(1, config.n_heads // 2)}
    generator = ElectraConfig(**(sizes | small | {"d_ff": max(1, config.d_ff // 2)}))
    return started(Electra(ElectraGenerator(generator), ElectraDiscriminator(ElectraConfig(**sizes))), config)


def build_gpt2(config: VariantConfig, vocab_size: int) -> GPT2:
    sizes = (vocab_size, config.max_seq_len, config.d_model, config.n_layers, config.n_heads, config.d_ff)
    return started(GPT2(GPT2Config(*sizes, dropout=0.0, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=PAD_ID)), config)


def build_t5(config: VariantConfig, vocab_size: int) -> T5:
    half, d_head = config.n_layers // 2, config.d_model // config.n_heads
    sizes = (vocab_size, config.d_model, d_head, config.d_ff, half, config.n_layers - half, config.n_heads)
    return T5(T5Config(*sizes, dropout=0.0, pad_id=PAD_ID, eos_id=EOS_ID, start_id=PAD_ID))


def build_bart(config: VariantConfig, vocab_size: int) -> Bart:
    half = config.n_layers // 2
    sizes = (vocab_size, config.max_seq_len, config.d_model, half, config.n_layers - half, config.n_heads, config.d_ff)
    return started(Bart(BartConfig(*sizes, dropout=0.0, pad_id=PAD_ID, eos_id=EOS_ID, start_id=EOS_ID)), config)


class Variant(NamedTuple):
    """How a kind of model is built and what it learns from."""

    build: Callable[[VariantConfig, int], nn.Module]
    batches: Callable[..., Callable[[int], Batch]]  # (batch_size, seed) -> the batches
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    learning_rate: float  # the best of those tried at the size of VariantConfig


VARIANTS = {
    "bert": Variant(build_bert, MaskedBatches, masked_loss, 4e-3),
    "roberta": Variant(build_roberta, MaskedBatches, masked_loss, 4e-3),
    "albert": Variant(build_albert, MaskedBatches, masked_loss, 4e-3),
    "electra": Variant(build_electra, MaskedBatches, replaced_loss, 4e-3),
    "gpt2": Variant(build_gpt2, CausalBatches, causal_loss, 4e-3),
    "t5": Variant(build_t5, SpanBatches, span_loss, 4e-3),
    "bart": Variant(build_bart, SpanBatches, span_loss, 2e-3),
}


def step_flops(model: nn.Module, batches: Callable[[int], Batch], loss_fn: Callable, n_steps: int = 0) -> float:
    """Mean FLOPs of one training step, forward and backward, counted on n_steps batches; padding costs too.

    n_steps 0 takes a whole group.
    """
    n_steps = n_steps or GROUP
    with MatmulCounter() as counter:
        for step in range(n_steps):
            batch = to_device(batches(step), device_of(model))
            loss_fn(model, batch)[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.flops / n_steps


# Filling in one token: what each kind of model believes about a gap


class Slot(NamedTuple):
    """One token of a held-out document, hidden, and what the world says about it given all the others."""

    tokens: list[str]  # the document, <eos> included
    position: int
    posterior: dict[str, float]

    @property
    def truth(self) -> str:
        return self.tokens[self.position]

    @property
    def token_ids(self) -> list[int]:
        return word_world()[1].encode(self.tokens)


@functools.cache
def slots(n_slots: int, seed: int = HELD_OUT_SEED) -> list[Slot]:
    """One slot in each of n_slots validation documents, anywhere before <eos>, with its exact posterior."""
    world, rng, found = word_world()[0], random.Random(seed), []
    for document in world.documents(n_slots, seed, split="validation"):
        position = int(rng.random() * (len(document.tokens) - 1))
        found.append(Slot(document.tokens, position, world.fill_in(document.tokens, position)))
    return found


@functools.cache
def recall_slots(n_slots: int, seed: int = HELD_OUT_SEED) -> list[Slot]:
    """The last word of the answer to a question about a story: only the story tells it, so its posterior is certain."""
    world, found = word_world()[0], []
    for text, answer in world.questions("story", n_slots, seed):
        tokens = [*text, *answer, "<eos>"]
        found.append(Slot(tokens, len(tokens) - 3, {tokens[-3]: 1.0}))
    return found


@torch.no_grad()
def masked_fill_in(model: BertForMaskedLM | ElectraGenerator, chosen: Sequence[Slot]) -> Tensor:
    """Log-probabilities (slots, vocab) of a masked language model: one pass, the gap hidden by <mask>."""
    rows = [[BOS_ID, *slot.token_ids] for slot in chosen]
    for row, slot in zip(rows, chosen, strict=True):
        row[slot.position + 1] = MASK_ID
    token_ids = padded(rows).to(device_of(model))  # (slots, seq)
    logits = model(token_ids, None, token_ids != PAD_ID)  # (slots, seq, vocab)
    places = torch.tensor([slot.position + 1 for slot in chosen], device=logits.device)  # (slots)
    return logits[torch.arange(len(rows)), places].log_softmax(dim=-1)  # (slots, vocab)


@torch.no_grad()
def causal_fill_in(model: GPT2, slot: Slot) -> Tensor:
    """Log-probabilities (vocab) by Bayes' rule: the likelihood of the whole document with every token in the gap.

    A causal model never saw a gap; but its likelihood determines the posterior, at the price of a pass for each token
    of the vocabulary over the rest of the document. What stands before the gap is read once and shared.
    """
    ids, vocab_size, device = slot.token_ids, model.config.vocab_size, device_of(model)
    caches = model.new_caches()
    before = model(torch.tensor([[BOS_ID, *ids[: slot.position]]], device=device), None, caches)[0, -1]  # (vocab)
    for cache in caches:
        cache.select([0] * vocab_size)
    rest = torch.tensor(ids[slot.position + 1 :], device=device).expand(vocab_size, -1)  # (vocab, rest)
    everyone = torch.arange(vocab_size, device=device)[:, None]  # (vocab, 1)
    logits = model(torch.cat([everyone, rest[:, :-1]], dim=1), None, caches)  # (vocab, rest, vocab_again)
    after = -F.cross_entropy(logits.transpose(1, 2), rest, reduction="none").sum(dim=1)  # (vocab)
    return (before.log_softmax(dim=-1) + after).log_softmax(dim=-1)  # (vocab)


@torch.no_grad()
def causal_guess(model: GPT2, slot: Slot) -> Tensor:
    """Log-probabilities (vocab) from what stands before the gap alone."""
    ids = torch.tensor([[BOS_ID, *slot.token_ids[: slot.position]]], device=device_of(model))
    return model(ids)[0, -1].log_softmax(dim=-1)  # (vocab)


@torch.no_grad()
def span_fill_in(model: EncoderDecoder, slot: Slot) -> Tensor:
    """Log-probabilities (vocab) of an encoder-decoder: how likely it writes a sentinel, the token, the next sentinel.

    It does not know that the gap holds one token, so that every token is scored together with the end of the gap.
    """
    ids, sentinels, device = slot.token_ids, sentinel_ids(), device_of(model)
    position, vocab_size = slot.position, model.config.vocab_size
    source = torch.tensor([[*ids[:position], sentinels[0], *ids[position + 1 :]]], device=device)  # (1, src)
    memory, memory_mask = model.encode(source)
    start = torch.tensor([[model.config.start_id, sentinels[0]]], device=device)  # (1, 2)
    caches = model.new_caches()
    first = model.decode(start, memory, memory_mask, caches)[0, -1].log_softmax(dim=-1)  # (vocab)
    for cache in caches:
        cache.select([0] * vocab_size)
    everyone = torch.arange(vocab_size, device=device)[:, None]  # (vocab, 1)
    logits = model.decode(everyone, memory, memory_mask.expand(vocab_size, -1, -1, -1), caches)[:, -1]  # (vocab, vocab)
    end = logits.log_softmax(dim=-1)[:, sentinels[1]]  # (vocab)
    return (first + end).log_softmax(dim=-1)  # (vocab)


def fill_in(model: nn.Module, chosen: Sequence[Slot], batch_size: int = 64) -> Tensor:
    """Log-probabilities (slots, vocab) of every token in each gap, in the way of the model's kind."""
    model.eval()
    if isinstance(model, GPT2):
        return torch.stack([causal_fill_in(model, slot) for slot in chosen])
    if isinstance(model, EncoderDecoder):
        return torch.stack([span_fill_in(model, slot) for slot in chosen])
    parts = [masked_fill_in(model, chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    return torch.cat(parts)  # (slots, vocab)


class FillScore(NamedTuple):
    """How well a model fills in, beside the best that is possible on the same slots."""

    accuracy: float  # share of slots whose token is the model's first choice
    best_accuracy: float  # expected accuracy of always saying the most probable token of the posterior
    nats: float  # mean expected -log p(model) under the exact posterior
    best_nats: float  # mean entropy of the posterior: no model has less

    @property
    def gap(self) -> float:
        """Mean KL divergence from the exact posterior to the model's, in nats."""
        return self.nats - self.best_nats


def guess_of_kind(chosen: Sequence[Slot]) -> Tensor:
    """Log-probabilities (slots, vocab) of knowing which kind of word is hidden, a place or a person, and no more.

    Raises ValueError for a hidden word that is of no kind.
    """
    world, vocabulary = word_world()
    kinds, rows = [*world.words.values(), world.names], torch.full((len(chosen), len(vocabulary)), -math.inf)
    for row, slot in zip(rows, chosen, strict=True):
        kind = next((words for words in kinds if slot.truth in words), None)
        if kind is None:
            raise ValueError(f"{slot.truth!r} is of no kind of word that this world has")
        row[vocabulary.encode(kind)] = -math.log(len(kind))
    return rows


def score(log_probs: Tensor, chosen: Sequence[Slot]) -> FillScore:
    """Compare a model's beliefs (slots, vocab) with the world's; expectations under the posterior remove luck."""
    ids, found = word_world()[1].ids, []
    for row, slot in zip(log_probs.double().cpu(), chosen, strict=True):
        best = word_world()[1].tokens[int(row.argmax())]
        nats = -sum(chance * row[ids[token]].item() for token, chance in slot.posterior.items())
        entropy = -sum(chance * math.log(chance) for chance in slot.posterior.values() if chance)
        found.append((slot.posterior.get(best, 0.0), max(slot.posterior.values()), nats, entropy))
    return FillScore(*(sum(column) / len(found) for column in zip(*found, strict=True)))


# Training with a budget


class Trained(NamedTuple):
    """A model after its training, and what that took."""

    model: nn.Module
    steps: int
    flops: float  # of the whole training
    n_targets: float  # tokens that it had to predict, about
    losses: list[float]  # of the batches, at every tenth step


def pretrain_for(
    name: str,
    config: VariantConfig,
    flops: float,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], object] | None = None,
    **options,
) -> Trained:
    """Train one kind of model until it has used up `flops`; `options` go to its batches or to TrainConfig.

    `prepare` may change the new model before its first step.

    Raises ValueError for an unknown name and for a budget that does not pay for one step.
    """
    variant = VARIANTS[check_name("model", name, VARIANTS)]
    torch.manual_seed(seed)
    model = variant.build(config, len(word_world()[1])).to(device)
    if prepare is not None:
        prepare(model)
    known = set(TrainConfig.__dataclass_fields__)
    data = {key: value for key, value in options.items() if key not in known}
    batches = variant.batches(batch_size, seed, **data)
    cost = step_flops(model, batches, variant.loss_fn)
    steps = int(flops / cost)
    if steps < 1:
        raise ValueError(f"a budget of {flops:.3g} FLOPs is less than one step of {name}, {cost:.3g}; raise it")
    settings = {"learning_rate": variant.learning_rate, "warmup_steps": max(1, steps // 10), "weight_decay": 0.01}
    settings |= {key: value for key, value in options.items() if key in known}
    train_config = TrainConfig(batch_size=batch_size, max_steps=steps, **settings)
    rows = fit(model, batches, variant.loss_fn, train_config)
    n_targets = steps * sum(row["n_counted"] for row in rows) / len(rows)
    return Trained(model.eval(), steps, steps * cost, n_targets, [row["loss"] for row in rows])


# Judging whole texts: fine-tuning


CLASSES = ("impossible", "possible")  # of a text of TinyWorld


@dataclass(frozen=True)
class FinetuneConfig:
    """What a classifier learns, and from which pretrained encoder."""

    data: Path | None = None  # lines of text<TAB>class; none means: is this text possible in TinyWorld?
    checkpoint: Path | None = None  # a folder of a pretrained BERT; none means the one in --out
    max_steps: int = 300  # optimizer steps
    batch_size: int = 16  # texts in a step
    learning_rate: float = 1e-3  # the peak

    def __post_init__(self) -> None:
        check_range(self, "max_steps", "batch_size", least=1)
        check_range(self, "learning_rate", above=0)


def possible(tokens: list[str]) -> bool:
    """Whether TinyWorld writes this document."""
    try:
        word_world()[0].surprisal(tokens)
    except ValueError:
        return False
    return True


def acceptability(n: int, seed: int, split: str) -> list[tuple[str, str]]:
    """n texts with a class: half are documents, half have one word replaced so that the world cannot write them."""
    return [(join(tokens[:-1]), name) for tokens, name in acceptable_tokens(n, seed, split)]


def acceptable_tokens(n: int, seed: int, split: str) -> list[tuple[list[str], str]]:
    """The texts of `acceptability` as tokens, <eos> included."""
    world, vocabulary = word_world()
    generator, found = generator_of(seed, n), []
    usual = [token for token in vocabulary.tokens if token not in (*SPECIAL_TOKENS, *SENTINELS)]
    for document in islice(world.stream(seed, split), n):
        tokens = list(document.tokens)
        if len(found) % 2:
            while possible(tokens):
                tokens = list(document.tokens)
                place, word = (
                    int(torch.randint(size, (), generator=generator)) for size in (len(tokens) - 1, len(usual))
                )
                tokens[place] = usual[word]
        found.append((tokens, CLASSES[1 - len(found) % 2]))
    return found


def read_classes(path: Path) -> list[tuple[str, str]]:
    """Lines of text<TAB>class. Raises ValueError that names the file and the line of a mistake."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a line separator or a form feed is part of the text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown(path)} cannot be read as UTF-8 text: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        text, tab, name = line.rpartition("\t")
        if line.strip() and (not tab or not text.strip() or not name.strip()):
            raise ValueError(f"{shown(path)}:{number} must be text<TAB>class, got {line[:40]!r}")
        if line.strip():
            found.append((text.strip(), name.strip()))
    if len({name for _, name in found}) < 2:
        raise ValueError(f"{shown(path)} names fewer than two classes; there is nothing to tell apart")
    return found


def fit_classes(
    model: BertForSequenceClassification, data: list[tuple[list[int], int]], config: FinetuneConfig, seed: int
) -> None:
    """Train a classifier on (token ids, class) pairs, drawn anew for every step."""
    filler = model.config.pad_id

    def batches(step: int) -> dict[str, Tensor]:
        picked = torch.randint(len(data), (config.batch_size,), generator=generator_of(seed, step)).tolist()
        token_ids = padded([data[index][0] for index in picked], filler)  # (batch, seq)
        return {"inputs": token_ids, "classes": torch.tensor([data[index][1] for index in picked])}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = model(batch["inputs"], None, batch["inputs"] != filler)  # (batch, classes)
        return F.cross_entropy(logits, batch["classes"], reduction="sum"), len(logits)

    train_config = TrainConfig(
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        warmup_steps=max(1, config.max_steps // 10),
        weight_decay=0.01,
    )
    fit(model, batches, loss_fn, train_config)


@torch.no_grad()
def class_accuracy(model: BertForSequenceClassification, data: list[tuple[list[int], int]]) -> float:
    """Share of (token ids, class) pairs whose class the model finds most likely."""
    model.eval()
    right, filler, device = 0, model.config.pad_id, next(model.parameters()).device
    for start in range(0, len(data), 64):
        part = data[start : start + 64]
        token_ids = padded([ids for ids, _ in part], filler).to(device)
        guesses = model(token_ids, None, token_ids != filler).argmax(dim=-1).tolist()
        right += sum(guess == truth for guess, (_, truth) in zip(guesses, part, strict=True))
    return right / len(data)
