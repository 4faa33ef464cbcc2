"""Topic 05 - Building from Scratch: the complete Transformer, trained to translate sentences that it never saw.

python 05-building-from-scratch/building_from_scratch.py                        # the demo: train, score, draw; a minute
python 05-building-from-scratch/building_from_scratch.py translate "the old man does not see her"
python 05-building-from-scratch/building_from_scratch.py train --data pairs.tsv # your own source<TAB>target lines
python 05-building-from-scratch/debugging_tools.py checkup --break no-shift     # ten planted bugs, and their symptoms

Papers: Vaswani et al. 2017 (arXiv 1706.03762), the architecture and the schedule; Szegedy et al. 2016 (arXiv
1512.00567), label smoothing; Wu et al. 2016 (arXiv 1609.08144), beam search with a length penalty.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import difflib
import hashlib
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import MultiHeadAttention, causal_mask, padding_mask
from sequence_modeling import (
    BOS_ID,
    EOS_ID,
    FIRST_TOKENS,
    IGNORE,
    PAD_ID,
    Vocabulary,
    check_integers,
    check_sizes,
    check_token_ids,
    sample_ids,
)
from transformer_architecture import (
    Decoder,
    Encoder,
    KeyValueCache,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    SinusoidalPositions,
)
from translation_pairs import TASKS, Pair, join_tokens, read_pairs, sample_pairs, split_pairs, tokenize
from workbench import (
    ROOT,
    RunConfig,
    announce,
    check_name,
    check_range,
    describe_machine,
    locked,
    pick_device,
    progress,
    run_verbs,
    save_figure,
    seed_everything,
    shown,
    speed_ratio,
    time_in_turns,
    write_atomically,
)

POSITIONS = {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions, "none": NoPositions}


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 64  # width of the residual stream
    n_heads: int = 4  # attention heads; must divide d_model
    d_ff: int = 256  # hidden width of the feed-forward networks
    n_encoder_layers: int = 2  # encoder layers
    n_decoder_layers: int = 2  # decoder layers
    max_seq_len: int = 64  # longest source or target, in tokens
    dropout: float = 0.0  # share of activations set to zero in training
    norm_order: Literal["pre", "post"] = "pre"  # normalise before or after each sub-layer
    positions: Literal["sinusoidal", "learned", "none"] = "sinusoidal"  # how the model sees order
    tie_embeddings: bool = True  # one matrix for the target embedding and the output

    def __post_init__(self) -> None:
        check_range(self, "d_model", "n_heads", "d_ff", "n_encoder_layers", "n_decoder_layers", least=1)
        check_range(self, "max_seq_len", least=2)
        check_range(self, "dropout", least=0, below=1)
        check_name("norm order", self.norm_order, ("pre", "post"))
        check_name("kind of positions", self.positions, POSITIONS)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")


@dataclass(frozen=True)
class DataConfig:
    task: Literal["french", "dates"] = "french"  # the embedded pairs to learn from
    data: Path | None = None  # a TSV file of source<TAB>target lines, in place of the embedded pairs
    unit: Literal["words", "characters"] = "words"  # how to split the lines of --data
    n_pairs: int = 40_000  # training pairs drawn from the embedded task
    n_held_out: int = 500  # pairs drawn for each held-out split of the embedded task

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", "n_held_out", least=1)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 64  # pairs per step
    max_steps: int = 700  # optimizer steps
    warmup_steps: int = 150  # steps in which the learning rate rises to its peak
    cooldown_steps: int = 250  # last steps, in which it falls to almost 0
    learning_rate: float = 3e-3  # peak of the schedule
    label_smoothing: float = 0.1  # probability moved from the right token to all tokens alike
    grad_clip: float = 1.0  # largest norm of the gradient
    save_every: int = 200  # steps between checkpoints
    resume: bool = False  # go on from the newest checkpoint in --out

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "max_steps", "warmup_steps", "cooldown_steps", "save_every", least=1)
        check_range(self, "learning_rate", "grad_clip", above=0)
        check_range(self, "label_smoothing", least=0, below=1)


@dataclass(frozen=True)
class DecodeConfig:
    n_beams: int = 4  # hypotheses kept by beam search; 1 is greedy decoding
    length_penalty: float = 0.6  # exponent of the length that divides the score of a hypothesis
    max_new_tokens: int = 40  # longest translation, in tokens
    early_stop: bool = True  # end a sentence once n_beams hypotheses are finished, not when the best is certain

    def __post_init__(self) -> None:
        check_range(self, "n_beams", "max_new_tokens", least=1)
        check_range(self, "length_penalty", least=0, most=100)  # beyond, length ** penalty is no number


# The model


class Transformer(nn.Module):
    """The encoder-decoder of Vaswani et al. 2017, section 3, with pre-norm as the default order.

    Shapes: src_ids (batch, src), tgt_ids (batch, tgt) -> logits (batch, tgt, vocab); logits[:, t] predicts token t + 1.
    Padding stands at the end. It needs no mask among the targets: the causal mask already hides what comes later, and
    the loss leaves padded positions out. Raises ValueError for ids outside the vocabularies and for sequences longer
    than max_seq_len.
    """

    def __init__(self, config: ModelConfig, src_vocab_size: int, tgt_vocab_size: int) -> None:
        super().__init__()
        self.config, self.src_vocab_size, self.tgt_vocab_size = config, src_vocab_size, tgt_vocab_size
        sizes = (config.d_model, config.n_heads, config.d_ff, config.dropout, config.norm_order)
        self.src_token_emb = nn.Embedding(src_vocab_size, config.d_model)
        self.tgt_token_emb = nn.Embedding(tgt_vocab_size, config.d_model)
        self.src_pos_emb = POSITIONS[config.positions](config.d_model, config.max_seq_len)
        self.tgt_pos_emb = POSITIONS[config.positions](config.d_model, config.max_seq_len)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(config.n_encoder_layers, *sizes)
        self.decoder = Decoder(config.n_decoder_layers, *sizes)
        self.lm_head = nn.Linear(config.d_model, tgt_vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.tgt_token_emb.weight

    def init_weights(self) -> None:
        """Embeddings get variance 1/d_model, so that after * sqrt(d_model) they are as large as the positions."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for emb in (self.src_token_emb, self.tgt_token_emb):
            nn.init.normal_(emb.weight, std=self.config.d_model**-0.5)

    def embed(self, token_ids: Tensor, token_emb: nn.Embedding, pos_emb: nn.Module, start: int = 0) -> Tensor:
        check_token_ids(token_ids, token_emb.num_embeddings)
        x = token_emb(token_ids) * math.sqrt(self.config.d_model)  # (batch, seq, d_model)
        return self.dropout(pos_emb(x, start))  # (batch, seq, d_model)

    def encode(self, src_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory (batch, src, d_model) and its mask (batch, 1, 1, src)."""
        memory_mask = padding_mask(src_ids, PAD_ID)  # (batch, 1, 1, src)
        memory = self.encoder(self.embed(src_ids, self.src_token_emb, self.src_pos_emb), memory_mask)
        return memory, memory_mask

    def decode(
        self, tgt_ids: Tensor, memory: Tensor, memory_mask: Tensor, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Logits (batch, tgt, vocab); with caches, tgt_ids holds only the tokens that the caches have not seen."""
        start = len(caches[0]) if caches else 0  # an empty list is refused by the decoder
        x = self.embed(tgt_ids, self.tgt_token_emb, self.tgt_pos_emb, start)  # (batch, tgt, d_model)
        n_new = tgt_ids.shape[1]
        mask = causal_mask(n_new, start + n_new, device=x.device)
        return self.lm_head(self.decoder(x, memory, mask, memory_mask, caches))  # (batch, tgt, vocab)

    def forward(self, src_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        memory, memory_mask = self.encode(src_ids)
        return self.decode(tgt_ids, memory, memory_mask)  # (batch, tgt, vocab)

    def new_caches(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.decoder.blocks]


# Loss and schedule


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy, in nats, against (1 - e) * the right token + e * the uniform distribution.

    Szegedy et al. 2016, section 7. Shapes: logits (..., vocab), targets (...); a target of -100 does not count.
    The uniform part includes the right token, so the smoothed target sums to 1. Raises ValueError if none counts, for a
    target that is no token, and for shapes that do not fit; TypeError for targets that are no integers.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, got {label_smoothing}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    counted = targets != IGNORE
    if not counted.any():
        raise ValueError("no target counts: every position is padding; drop empty pairs")
    wanted = targets.masked_fill(~counted, PAD_ID)
    check_token_ids(wanted, logits.shape[-1])
    wanted = wanted.long()
    log_probs = logits.log_softmax(dim=-1)
    losses = -log_probs.gather(-1, wanted[..., None]).squeeze(-1)
    if label_smoothing:  # without it a forbidden token, of logit -inf, would cost 0 * inf
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(dim=-1)
    return losses[counted].mean()


def noam_factor(step: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at `step` (the first is 1): a straight rise, then 1/sqrt(step).

    Vaswani et al. 2017, equation 3, is d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5), with its peak
    (d_model * warmup_steps)**-0.5 at step = warmup_steps.
    """
    if not (step >= 1 and warmup_steps >= 1):
        raise ValueError(f"steps count from 1: step and warmup_steps must be at least 1, got {step} and {warmup_steps}")
    return min(step / warmup_steps, math.sqrt(warmup_steps / step))


def cooldown_factor(step: int, max_steps: int, cooldown_steps: int) -> float:
    """Share left in the last `cooldown_steps` of `max_steps`: a straight fall to 1/cooldown_steps at the last one.

    The published schedule has none and averages the last checkpoints instead (section 6.1); both quiet the last steps.
    Raises ValueError for a step behind the end, where the share would be negative.
    """
    if not cooldown_steps >= 1 or not step <= max_steps + 1:
        raise ValueError(
            f"need cooldown_steps >= 1 and step <= max_steps + 1, got cooldown_steps={cooldown_steps}, step={step}, "
            f"max_steps={max_steps}"
        )
    return min(1.0, (max_steps - step + 1) / cooldown_steps)


# Pairs into batches


@dataclass(frozen=True)
class Codec:
    """The two vocabularies of a translator, and how text becomes tokens."""

    src: Vocabulary
    tgt: Vocabulary
    unit: str

    @classmethod
    def from_pairs(cls, pairs: list[Pair], unit: str) -> "Codec":
        return cls(
            Vocabulary(sorted({token for pair in pairs for token in pair.source})),
            Vocabulary(sorted({token for pair in pairs for token in pair.target})),
            unit,
        )

    def encode_sources(self, sources: list[tuple[str, ...]]) -> Tensor:
        """Sources to ids, each closed by <eos>, padded at the end: (batch, src)."""
        return pad([self.src.encode(source) + [EOS_ID] for source in sources])

    def encode_targets(self, targets: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        """Targets to the decoder's input <bos> y1 ... yn and its answer y1 ... yn <eos>, each (batch, tgt).

        The input is the answer moved one step to the right: without the shift the decoder would read the token that it
        is asked for, and learn only to copy it.
        """
        ids = [self.tgt.encode(target) for target in targets]
        return pad([[BOS_ID, *row] for row in ids]), pad([[*row, EOS_ID] for row in ids], IGNORE)

    def decode_target(self, ids: list[int]) -> tuple[str, ...]:
        ids = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
        return tuple(self.tgt.decode([index for index in ids if index not in (PAD_ID, BOS_ID)]))


def pad(rows: list[list[int]], filler: int = PAD_ID) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def epoch_batches(pairs: list[Pair], batch_size: int, seed: int, epoch: int) -> list[list[Pair]]:
    """One epoch in batches of similar length, in an order that depends only on (seed, epoch).

    Sorting within pools of 16 batches keeps padding low and the order random; a resumed run needs no stored position.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(pairs, len(pairs))
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        pool = sorted(order[start : start + 16 * batch_size], key=lambda pair: (len(pair.source), len(pair.target)))
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def endless_batches(pairs: list[Pair], batch_size: int, seed: int, first_step: int = 0) -> Iterator[list[Pair]]:
    """Epoch after epoch, starting with the batch of `first_step` (counted from 0)."""
    if not pairs:
        raise ValueError("no pairs to train on; give at least one")
    check_sizes(batch_size=batch_size)
    n_batches = math.ceil(len(pairs) / batch_size)
    epoch, skip = divmod(first_step, n_batches)
    while True:
        yield from epoch_batches(pairs, batch_size, seed, epoch)[skip:]
        epoch, skip = epoch + 1, 0


# Decoding: greedy, sampling, beam search


@torch.no_grad()
def generate(
    model: Transformer,
    src_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Extend each source's translation token by token, with cached keys and values.

    temperature 0 is greedy decoding; above 0 tokens are drawn from softmax(logits / temperature).
    Returns ids (batch, new), padded after <eos>, and the log-probability of each token under the model at temperature
    1, in nats (batch, new), 0 after <eos>. Raises ValueError for a negative or non-finite temperature.
    """
    check_new_tokens(model, max_new_tokens)
    memory, memory_mask = model.encode(src_ids)
    caches, ids = model.new_caches(), src_ids.new_full((len(src_ids), 1), BOS_ID)
    finished = torch.zeros(len(src_ids), dtype=torch.bool, device=src_ids.device)
    tokens, scores = [], []
    for _ in range(max_new_tokens):
        logits = model.decode(ids, memory, memory_mask, caches)[:, -1]  # (batch, vocab)
        log_probs = logits.log_softmax(dim=-1)  # (batch, vocab)
        ids = sample_ids(logits, temperature, generator)  # (batch, 1)
        scores.append(log_probs.gather(1, ids).masked_fill(finished[:, None], 0.0))
        ids = ids.masked_fill(finished[:, None], PAD_ID)  # (batch, 1)
        tokens.append(ids)
        finished = finished | (ids[:, 0] == EOS_ID)
        if finished.all():
            break
    return torch.cat(tokens, dim=1), torch.cat(scores, dim=1)


def check_new_tokens(model: Transformer, max_new_tokens: int) -> None:
    limit = model.config.max_seq_len
    check_integers(max_new_tokens=max_new_tokens)
    if not 1 <= max_new_tokens <= limit:
        raise ValueError(f"max_new_tokens must be in 1..{limit} (the model's max_seq_len), got {max_new_tokens}")


@dataclass(frozen=True)
class Hypothesis:
    """A finished candidate: its tokens without <bos>, and its score, log-probability / length ** length_penalty."""

    score: float
    tokens: tuple[int, ...]


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float = 0.6,
    early_stop: bool = True,
    n_best: int | None = None,
    bos_id: int = BOS_ID,
    eos_id: int = EOS_ID,
) -> list[list[Hypothesis]]:
    """The best complete sequences of each item of a batch, best first, at most n_beams of them.

    `step(tokens, parents)` gives the log-probabilities (batch * beams, vocab) of the next token: row i continues row
    parents[i] of the call before with tokens[i]; rows of different items never mix. Scores are divided by length **
    length_penalty, <eos> counted, because a sum of log-probabilities only falls: without division short wins.
    An item ends when what still runs can no longer enter its `n_best` hypotheses (None: n_beams), and with early_stop
    also as soon as it has n_beams of them, which is quicker and may miss a better long one.
    Raises ValueError for a size below 1, a length_penalty outside 0..100, n_best below 1, and log-probabilities
    of another shape or that are NaN or +inf.
    """
    check_sizes(n_beams=n_beams, max_new_tokens=max_new_tokens)
    if not 0 <= length_penalty <= 100 or (n_best is not None and n_best < 1):
        raise ValueError(f"length_penalty must be in 0..100 and n_best >= 1, got {length_penalty} and {n_best}")
    if batch_size == 0:
        return []
    running = torch.full((batch_size, n_beams), -math.inf, dtype=torch.float64)  # sums of many logarithms
    running[:, 0] = 0.0
    tokens = torch.full((batch_size * n_beams,), bos_id)
    parents = torch.arange(batch_size * n_beams)
    prefixes: list[list[tuple[int, ...]]] = [[()] * n_beams for _ in range(batch_size)]
    done: list[list[Hypothesis]] = [[] for _ in range(batch_size)]
    closed = [False] * batch_size
    for length in range(1, max_new_tokens + 1):
        log_probs = step(tokens, parents).cpu()
        if log_probs.ndim != 2 or len(log_probs) != len(tokens):
            raise ValueError(f"step must give ({len(tokens)}, vocab) log-probabilities, got {tuple(log_probs.shape)}")
        log_probs = log_probs.reshape(batch_size, n_beams, -1)  # (batch, beams, vocab)
        if not (log_probs < math.inf).all():
            raise ValueError(f"log-probabilities must be below inf, got NaN or inf at length {length}; train again?")
        vocab_size = log_probs.shape[-1]
        total = (running[:, :, None] + log_probs).flatten(1)  # (batch, beams * vocab)
        best = total.topk(min(2 * n_beams, total.shape[1]))  # two for each beam: half of them may be <eos>
        rows, picks, extended = [], [], []
        for item in range(batch_size):
            survivors: list[tuple[float, int, int]] = []
            for rank, (score, flat) in enumerate(
                zip(best.values[item].tolist(), best.indices[item].tolist(), strict=True)
            ):
                beam, token = divmod(flat, vocab_size)
                if score == -math.inf or closed[item]:
                    continue
                if token == eos_id:
                    if rank < n_beams:
                        done[item].append(Hypothesis(score / length**length_penalty, (*prefixes[item][beam], token)))
                elif len(survivors) < n_beams:
                    survivors.append((score, beam, token))
            done[item] = sorted(done[item], key=lambda hypothesis: -hypothesis.score)[:n_beams]
            enough = early_stop and len(done[item]) == n_beams
            best_to_come = survivors[0][0] / max_new_tokens**length_penalty if survivors else -math.inf
            last_wanted = done[item][(n_best or n_beams) - 1 :][:1]
            beaten = bool(last_wanted) and best_to_come <= last_wanted[0].score
            closed[item] = closed[item] or not survivors or enough or beaten
            survivors += [(-math.inf, 0, eos_id)] * (n_beams - len(survivors))
            running[item] = torch.tensor([score for score, _, _ in survivors], dtype=torch.float64)
            rows += [item * n_beams + beam for _, beam, _ in survivors]
            picks += [token for _, _, token in survivors]
            extended.append([(*prefixes[item][beam], token) for _, beam, token in survivors])
        prefixes, tokens, parents = extended, torch.tensor(picks), torch.tensor(rows)
        if all(closed):
            break
    for item, open_ended in enumerate(running.tolist()):
        if not closed[item]:  # the length limit came first: what is still running competes as it stands
            unfinished = zip(open_ended, prefixes[item], strict=True)
            done[item] += [Hypothesis(s / length**length_penalty, prefix) for s, prefix in unfinished if s > -math.inf]
            done[item] = sorted(done[item], key=lambda hypothesis: -hypothesis.score)[:n_beams]
    return done


@torch.no_grad()
def beam_translate(
    model: Transformer, src_ids: Tensor, config: DecodeConfig, n_best: int | None = 1
) -> list[list[Hypothesis]]:
    """Beam search with cached keys and values for sources (batch, src), until the n_best of each are certain or, with
    config.early_stop, n_beams of them are finished."""
    check_new_tokens(model, config.max_new_tokens)
    if len(src_ids) == 0:
        return []
    memory, memory_mask = model.encode(src_ids)
    memory = memory.repeat_interleave(config.n_beams, dim=0)  # (batch * beams, src, d_model)
    memory_mask = memory_mask.repeat_interleave(config.n_beams, dim=0)  # (batch * beams, 1, 1, src)
    caches = model.new_caches()

    def step(tokens: Tensor, parents: Tensor) -> Tensor:
        for cache in caches:
            cache.select(parents)
        logits = model.decode(tokens.to(src_ids.device)[:, None], memory, memory_mask, caches)[:, -1]
        return logits.log_softmax(dim=-1)

    limits = (config.max_new_tokens, config.length_penalty, config.early_stop, n_best)
    return beam_search(step, len(src_ids), config.n_beams, *limits)


# Checkpoints: whole or not at all, and verified when read


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> None:
    """Write step-N.pt, then its manifest step-N.json with the SHA-256; a state without its manifest does not count.

    Each file appears under its name only when it is complete, so a crash at any moment leaves the earlier checkpoints
    as they were. The `keep` newest stay.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data, name = buffer.getvalue(), f"step-{step:06d}"
    (folder / f"{name}.json").unlink(missing_ok=True)  # a rerun of the same step: never an old manifest on a new state
    write_atomically(folder / f"{name}.pt", data)
    manifest = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "saved": time.time_ns()}
    write_atomically(folder / f"{name}.json", json.dumps(manifest).encode())
    for manifest_path in manifests(folder)[keep:]:
        manifest_path.unlink()
        manifest_path.with_suffix(".pt").unlink(missing_ok=True)
    for stale in folder.glob(".step-*.tmp.*"):
        stale.unlink(missing_ok=True)


def saved_at(manifest_path: Path) -> int:
    """When a checkpoint was saved, in nanoseconds, as its manifest says; -1 if the manifest is damaged."""
    try:
        return int(json.loads(manifest_path.read_bytes())["saved"])
    except (ValueError, KeyError, TypeError):
        return -1


def manifests(folder: Path) -> list[Path]:
    """The manifests in a folder, newest first; damaged ones are the last."""
    return sorted(folder.glob("step-*.json"), key=lambda path: (saved_at(path), path), reverse=True)


def load_checkpoint(folder: Path) -> dict:
    """The newest checkpoint whose bytes still have the SHA-256 of its manifest; a damaged one is named and passed over.

    Neither torch.load nor the file format notices a flipped byte. Raises ValueError if none is whole.
    """
    found = manifests(folder)
    damaged = [path.name for path in found if saved_at(path) < 0]
    for path in found[: len(found) - len(damaged)]:
        try:
            data, manifest = path.with_suffix(".pt").read_bytes(), json.loads(path.read_bytes())
            if hashlib.sha256(data).hexdigest() == manifest["sha256"]:
                if damaged:
                    print(f"warning: damaged and passed over: {', '.join(damaged)}; using {path.stem}")
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        damaged.append(path.with_suffix(".pt").name)
    if damaged:
        raise ValueError(f"every checkpoint in {shown(folder)} is damaged ({', '.join(damaged)}); train again")
    script = shown(ROOT / "05-building-from-scratch" / "building_from_scratch.py")
    raise ValueError(f"no checkpoint in {shown(folder)}; train one first: python {script} train")


def load_translator(folder: Path, device: torch.device) -> tuple[Transformer, Codec, dict]:
    """Rebuild the model and its vocabularies from the newest checkpoint; also return the whole state."""
    state = load_checkpoint(folder)
    src, tgt = (Vocabulary(state[name]) for name in ("src_tokens", "tgt_tokens"))
    model = Transformer(ModelConfig(**state["model_config"]), len(src), len(tgt))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), Codec(src, tgt, state["unit"]), state


# Training


def fit(
    model: Transformer,
    codec: Codec,
    pairs: dict[str, list[Pair]],
    config: TrainConfig,
    run: RunConfig,
    header: dict,
    state: dict | None = None,
) -> list[dict]:
    """Train with Adam and the Noam schedule; save a checkpoint every `save_every` steps; return the history.

    `header` is stored in every checkpoint beside model, optimizer, step and random state; `state` is a checkpoint to go
    on from: the run then continues as if it had never stopped, bit for bit on the CPU.
    Raises ValueError if the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True)
    first, history = 0, []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, history = state["step"], state["history"]
    batches = endless_batches(pairs["train"], config.batch_size, run.seed, first)
    bar = progress(range(first + 1, config.max_steps + 1), "train")
    for step in bar:
        model.train()
        src_ids, tgt_ids, answers = batch_tensors(codec, next(batches), device)
        loss = smoothed_cross_entropy(model(src_ids, tgt_ids), answers, config.label_smoothing)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate or lengthen the warm-up")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        share = noam_factor(step, config.warmup_steps)
        share *= cooldown_factor(step, config.max_steps, config.cooldown_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        optimizer.step()
        record = {"step": step, "loss": loss.item()}
        if step % config.save_every == 0 or step == config.max_steps:
            record["exact"] = exact_match(greedy_answers(model, codec, pairs["test"][:200])[0], pairs["test"][:200])
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{record['exact']:.1%}")
        history.append(record)
        if "exact" in record:
            training = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run.out, step, header | training | {"rng": torch.get_rng_state(), "history": history})
    return history


def batch_tensors(codec: Codec, batch: list[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids (batch, src), decoder input and answers (batch, tgt) of some pairs, on the device."""
    tgt_ids, answers = codec.encode_targets([pair.target for pair in batch])
    src_ids = codec.encode_sources([pair.source for pair in batch])
    return src_ids.to(device), tgt_ids.to(device), answers.to(device)


def load_pairs(config: DataConfig, seed: int) -> tuple[dict[str, list[Pair]], str, dict[str, str]]:
    """Training and held-out pairs by split, the unit of their tokens, and what each split holds out.

    Held-out pairs with a token that training never shows are left out, and counted in the split's description.
    Raises ValueError if nothing is left to train on or to test with.
    """
    if config.data is None:
        task = TASKS[config.task]
        sizes = {split: config.n_pairs if split == "train" else config.n_held_out for split in task.splits}
        pairs = {split: sample_pairs(task, size, seed, split) for split, size in sizes.items()}
        unit, meanings = task.unit, dict(task.splits)
    else:
        pairs, unit = split_pairs(read_pairs(config.data, config.unit)), config.unit
        meanings = {"train": f"nine tenths of {config.data}", "test": "the other tenth"}
    src, tgt = ({token for pair in pairs["train"] for token in getattr(pair, side)} for side in ("source", "target"))
    for split, drawn in pairs.items():
        pairs[split] = [pair for pair in drawn if src.issuperset(pair.source) and tgt.issuperset(pair.target)]
        if len(pairs[split]) < len(drawn):
            meanings[split] += f" ({len(drawn) - len(pairs[split])} with tokens unseen in training left out)"
        if not pairs[split]:
            raise ValueError(f"no pair for split {split!r} whose tokens occur in training; give a few hundred pairs")
    return pairs, unit, meanings


# Evaluation


def greedy_answers(
    model: Transformer, codec: Codec, pairs: list[Pair], batch_size: int = 250
) -> tuple[list[tuple[str, ...]], list[float]]:
    """Greedy translations, and for each the log-probability of its least certain token, in nats."""
    model.eval()
    answers, certainty = [], []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        src_ids = codec.encode_sources([pair.source for pair in batch]).to(next(model.parameters()).device)
        longest = min(model.config.max_seq_len, 3 * max(len(pair.target) for pair in batch) // 2 + 4)
        ids, log_probs = generate(model, src_ids, longest)
        answers += [codec.decode_target(row) for row in ids.tolist()]
        certainty += log_probs.min(dim=1).values.tolist()
    return answers, certainty


def beam_answers(
    model: Transformer, codec: Codec, pairs: list[Pair], config: DecodeConfig, batch_size: int = 125
) -> list[tuple[str, ...]]:
    model.eval()
    answers = []
    for start in range(0, len(pairs), batch_size):
        batch = [pair.source for pair in pairs[start : start + batch_size]]
        src_ids = codec.encode_sources(batch).to(next(model.parameters()).device)
        answers += [codec.decode_target(list(best[0].tokens)) for best in beam_translate(model, src_ids, config)]
    return answers


def exact_match(answers: list[tuple[str, ...]], pairs: list[Pair]) -> float:
    """Share of answers that equal the target in every token, 0..1. Raises ValueError if there is none."""
    if not pairs:
        raise ValueError("no pairs to score; give at least one")
    return sum(answer == pair.target for answer, pair in zip(answers, pairs, strict=True)) / len(pairs)


@torch.no_grad()
def answer_log_probs(
    model: Transformer, codec: Codec, pairs: list[Pair], answers: list[tuple[str, ...]]
) -> list[float]:
    """Log-probability, in nats, that the model gives to each whole answer and its <eos>, by teacher forcing."""
    device = next(model.parameters()).device
    given = [Pair(pair.source, answer) for pair, answer in zip(pairs, answers, strict=True)]
    src_ids, tgt_ids, targets = batch_tensors(codec, given, device)
    log_probs = model.eval()(src_ids, tgt_ids).log_softmax(dim=-1)  # (batch, tgt, vocab)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)  # (batch, tgt)
    return chosen.masked_fill(targets == IGNORE, 0.0).sum(dim=1).tolist()


def held_out_loss(model: Transformer, codec: Codec, pairs: list[Pair]) -> float:
    """Cross-entropy of the true targets without smoothing, in nats per token, <eos> counted."""
    total = sum(answer_log_probs(model, codec, pairs, [pair.target for pair in pairs]))
    return -total / sum(len(pair.target) + 1 for pair in pairs)


def length_ratio(answers: list[tuple[str, ...]], pairs: list[Pair]) -> float:
    """Tokens of all answers divided by the tokens of all targets."""
    return sum(map(len, answers)) / sum(len(pair.target) for pair in pairs)


def nearest_neighbour_match(train: list[Pair], held_out: list[Pair]) -> float:
    """What remembering alone reaches: answer with the target of the most similar training source.

    Similarity is the cosine of token counts. Returns the exact match, 0..1.
    """
    tokens = {token: index for index, token in enumerate(sorted({t for p in train + held_out for t in p.source}))}

    def counts(pairs: list[Pair]) -> Tensor:
        places = [(row, tokens[token]) for row, pair in enumerate(pairs) for token in pair.source]
        rows, columns = torch.tensor(places).T
        table = torch.zeros(len(pairs), len(tokens))
        table.index_put_((rows, columns), torch.ones(len(places)), accumulate=True)
        return F.normalize(table, dim=1)  # (pairs, vocab)

    nearest = (counts(held_out) @ counts(train).T).argmax(dim=1).tolist()
    return exact_match([train[index].target for index in nearest], held_out)


def evaluate_splits(
    model: Transformer, codec: Codec, pairs: dict[str, list[Pair]], meanings: dict[str, str], config: DecodeConfig
) -> list[dict]:
    """Exact match of greedy and beam decoding on every held-out split, beside remembering, with seconds."""
    rows = []
    for split, held_out in pairs.items():
        if split == "train":
            continue
        before = time.perf_counter()
        greedy, certainty = greedy_answers(model, codec, held_out)
        middle = time.perf_counter()
        beam = beam_answers(model, codec, held_out, config)
        seconds = (middle - before, time.perf_counter() - middle)
        rows.append(
            {
                "split": split,
                "meaning": meanings[split],
                "n": len(held_out),
                "greedy": exact_match(greedy, held_out),
                "beam": exact_match(beam, held_out),
                "remembering": nearest_neighbour_match(pairs["train"], held_out),
                "certainty": sorted(certainty),
                "seconds": seconds,
            }
        )
    return rows


def print_results(rows: list[dict], n_beams: int) -> None:
    print(f"\n{'held-out split':14} {'pairs':>6} {'greedy':>8} {f'beam {n_beams}':>8} {'remembering':>12}  seconds")
    for row in rows:
        greedy_seconds, beam_seconds = row["seconds"]
        print(
            f"{row['split']:14} {row['n']:6} {row['greedy']:8.1%} {row['beam']:8.1%} {row['remembering']:12.1%}"
            f"  {greedy_seconds:.1f} + {beam_seconds:.1f}   {row['meaning']}"
        )
    print("exact match of whole translations; remembering = the target of the most similar training source")


# Looking inside


@contextmanager
def watched(model: nn.Module, kind: type, see: Callable[[str, nn.Module, tuple, object], None]) -> Iterator[None]:
    """Within the block, call see(name, module, inputs, output) after every forward pass of a module of this kind."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kind):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: see(name, m, args, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_maps(model: Transformer, src_ids: Tensor, tgt_ids: Tensor) -> dict[str, Tensor]:
    """Weights (batch, heads, query, key) of every attention layer in one pass, by the layer's name."""
    maps: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        maps[name] = output[1]

    with watched(model.eval(), MultiHeadAttention, see):
        model(src_ids, tgt_ids)
    return maps


def alignment_scores(model: Transformer, codec: Codec, pairs: list[Pair]) -> Tensor:
    """Share of target words whose largest cross-attention weight lies on a true source position: (layers, heads).

    Row i of the weights is the query that predicts target word i; <eos> has no source and is left out.
    """
    src_ids, tgt_ids, _ = batch_tensors(codec, pairs, next(model.parameters()).device)
    maps = attention_maps(model, src_ids, tgt_ids)
    layers = [maps[f"decoder.blocks.{layer}.cross_attn"] for layer in range(len(model.decoder.blocks))]
    best = torch.stack(layers).argmax(dim=-1).cpu()  # (layers, batch, heads, tgt)
    hits = [
        torch.isin(best[:, row, :, spot], torch.tensor(sources)).float()
        for row, pair in enumerate(pairs)
        for spot, sources in enumerate(pair.alignment)
    ]
    return torch.stack(hits).mean(dim=0)  # (layers, heads)


# Figures


def plot_training(history: list[dict], floor: float, chance: float) -> Figure:
    """Loss of every step between its floor (what label smoothing leaves) and chance, and held-out exact match."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.plot([r["step"] for r in history], [r["loss"] for r in history], lw=1, label="training loss")
    left.axhline(chance, color="grey", ls=":", label="chance, ln(vocabulary)")
    left.axhline(floor, color="black", ls="--", label="floor of label smoothing")
    left.set(xlabel="step", ylabel="smoothed loss (nats per token)")
    left.legend(frameon=False)
    scored = [r for r in history if "exact" in r]
    right.plot([r["step"] for r in scored], [100 * r["exact"] for r in scored], "o-")
    right.set(xlabel="step", ylabel="held-out exact match (%)", ylim=(-3, 103))
    return figure


def plot_alignment(
    weights: Tensor,
    source: tuple[str, ...],
    target: tuple[str, ...],
    alignment: tuple[tuple[int, ...], ...] = (),
    titles: tuple[str, ...] = (),
) -> Figure:
    """Heads of a cross-attention layer: weights (heads, target, source); a known alignment is outlined."""
    figure, axes = plt.subplots(1, len(weights), figsize=(2.9 * len(weights), 0.28 * len(target) + 1.6), squeeze=False)
    for head, axis in enumerate(axes[0]):
        axis.imshow(weights[head].cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(source)), source, rotation=60, ha="right")
        axis.set_yticks(range(len(target)), target if head == 0 else [""] * len(target))
        title = titles[head] if titles else f"head {head}"
        axis.set(title=title, xlabel="source", ylabel="predicted token" if head == 0 else "")
        for row, sources in enumerate(alignment):
            for column in sources:
                axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="#E69F00", lw=1.8))
    return figure


def smoothing_floor(label_smoothing: float, vocab_size: int) -> float:
    """The entropy of the smoothed target, in nats per token: no model has a lower smoothed loss."""
    if label_smoothing == 0:
        return 0.0
    other = label_smoothing / vocab_size
    right = 1 - label_smoothing + other
    return -right * math.log(right) - (vocab_size - 1) * other * math.log(other)


def save_figures(
    model: Transformer, codec: Codec, history: list[dict], smoothing: float, pair: Pair, out: Path
) -> None:
    floor = smoothing_floor(smoothing, model.tgt_vocab_size)
    save_figure(plot_training(history, floor, math.log(model.tgt_vocab_size)), out / "training.svg")
    src_ids, tgt_ids, _ = batch_tensors(codec, [pair], next(model.parameters()).device)
    weights = attention_maps(model, src_ids, tgt_ids)[f"decoder.blocks.{len(model.decoder.blocks) - 1}.cross_attn"]
    save_figure(plot_alignment(weights[0], (*pair.source, "<eos>"), (*pair.target, "<eos>")), out / "alignment.svg")


# The verbs


def train(
    model_config: ModelConfig, data: DataConfig, config: TrainConfig, decode: DecodeConfig, run: RunConfig
) -> None:
    """Train a translator, score it on held-out pairs, save figures and checkpoints."""
    seed_everything(run.seed)
    device = pick_device(run.device)
    pairs, unit, meanings = load_pairs(data, run.seed)
    codec = Codec.from_pairs(pairs["train"], unit)
    model = Transformer(model_config, len(codec.src), len(codec.tgt)).to(device)
    check_lengths(pairs, model_config.max_seq_len)
    check_new_tokens(model, decode.max_new_tokens)
    header = {
        "model_config": asdict(model_config),
        "data_config": {name: str(value) for name, value in asdict(data).items()},
        "train_config": {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE},
        "seed": run.seed,
        "src_tokens": codec.src.tokens,
        "tgt_tokens": codec.tgt.tokens,
        "unit": unit,
        "longest_source": max(len(pair.source) for pair in pairs["train"]),
    }
    with locked(run.out):
        state = load_checkpoint(run.out) if config.resume else None
        if state is not None:
            check_resume(state, header)
        todo = config.max_steps - (state["step"] if state else 0)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        plan = f"train {parameters:,} parameters on {len(pairs['train']):,} pairs for {max(todo, 0)} steps, then score"
        announce(plan, SECONDS_PER_STEP * max(todo, 0) + SECONDS_TO_SCORE)
        before = time.perf_counter()
        history = fit(model, codec, pairs, config, run, header, state)
        trained = time.perf_counter() - before
        rows = evaluate_splits(model, codec, pairs, meanings, decode)
        certainty = next(row for row in rows if row["split"] == "test")["certainty"]
        header["certainty_floor"] = certainty[len(certainty) // 100]
        save_checkpoint(run.out, history[-1]["step"], load_checkpoint(run.out) | header)
    print_results(rows, decode.n_beams)
    print(f"trained in {trained:.0f} s")
    save_figures(model, codec, history, config.label_smoothing, pairs["test"][0], run.out)
    show_examples(model, codec, pairs, meanings)
    script = shown(ROOT / "05-building-from-scratch" / "building_from_scratch.py")
    where = "" if run.out == ROOT / "runs" / "building_from_scratch" else f" --out {shown(run.out)}"
    example = join_tokens(pairs["test"][0].source, unit)
    print(f'\nNow ask it: python {script} translate "{example}"{where}')


SECONDS_PER_STEP, SECONDS_TO_SCORE = 0.06, 10.0  # measured on 2 cores with the default configuration
MAY_CHANGE = ("save_every", "resume")  # settings that a resumed run may have otherwise


def check_lengths(pairs: dict[str, list[Pair]], max_seq_len: int) -> None:
    longest = max(max(len(pair.source), len(pair.target)) for split in pairs.values() for pair in split)
    if longest + 1 > max_seq_len:
        raise ValueError(
            f"the longest pair has {longest} tokens and <eos>, more than max_seq_len={max_seq_len}; "
            f"use --max-seq-len {longest + 1} or shorten the data"
        )


def check_resume(state: dict, header: dict) -> None:
    """Raise ValueError unless the checkpoint belongs to a run with these settings."""
    for name in ("model_config", "data_config", "train_config", "seed", "src_tokens", "tgt_tokens"):
        if state[name] != header[name]:
            detail = "" if name.endswith("tokens") else f": {state[name]} there, {header[name]} here"
            raise ValueError(
                f"cannot resume: the checkpoint has another {name}{detail}; use the same flags or another --out"
            )


def show_examples(model: Transformer, codec: Codec, pairs: dict[str, list[Pair]], meanings: dict[str, str]) -> None:
    for split in [split for split in meanings if split != "train"]:
        chosen = pairs[split][:3]
        print(f"\n{split}: {meanings[split]}")
        for pair, answer in zip(chosen, greedy_answers(model, codec, chosen)[0], strict=True):
            verdict = "right" if answer == pair.target else f"wrong, should be: {join_tokens(pair.target, codec.unit)}"
            print(f"  {join_tokens(pair.source, codec.unit)}\n    -> {join_tokens(answer, codec.unit)}   ({verdict})")


@dataclass(frozen=True)
class TranslateConfig:
    text: tuple[str, ...] = ()  # what to translate


def translate(config: TranslateConfig, decode: DecodeConfig, run: RunConfig) -> None:
    """Translate a text with the newest checkpoint in --out, and say so when the text is unlike the training data."""
    model, codec, state = load_translator(run.out, pick_device(run.device))
    tokens = tokenize(" ".join(config.text), codec.unit)
    while tokens and tokens[-1] in (".", "!", "?") and tokens[-1] not in codec.src.ids:
        tokens = tokens[:-1]
    if not tokens:
        raise ValueError('nothing to translate; give a text in quotes, such as: translate "the cat sees a bird"')
    check_known(tokens, codec.src)
    if len(tokens) + 1 > model.config.max_seq_len:
        raise ValueError(f"the text has {len(tokens)} tokens; this model reads at most {model.config.max_seq_len - 1}")
    src_ids = codec.encode_sources([tokens]).to(next(model.parameters()).device)
    best = beam_translate(model, src_ids, decode)[0][0]
    answer = codec.decode_target(list(best.tokens))
    print(join_tokens(answer, codec.unit))
    if len(tokens) > state["longest_source"]:
        print(f"note: {len(tokens)} tokens; training had at most {state['longest_source']}, so this may be wrong")
    elif least_certain(model, codec, src_ids, answer) < state.get("certainty_floor", -math.inf):
        print(
            "note: the model is less sure of this than of 99 % of its held-out inputs; the text may be unlike training"
        )


def least_certain(model: Transformer, codec: Codec, src_ids: Tensor, answer: tuple[str, ...]) -> float:
    """Log-probability, in nats, of the least certain token of an answer to one source (1, src)."""
    tgt_ids, targets = codec.encode_targets([answer])
    with torch.no_grad():
        log_probs = model(src_ids, tgt_ids.to(src_ids.device)).log_softmax(dim=-1)  # (1, tgt, vocab)
    return log_probs.gather(-1, targets.to(src_ids.device)[..., None]).min().item()


def check_known(tokens: tuple[str, ...], vocabulary: Vocabulary) -> None:
    """Raise ValueError naming the tokens outside the vocabulary, each with the closest known ones."""
    known = vocabulary.tokens[len(FIRST_TOKENS) :]
    unknown = sorted({token for token in tokens if token not in vocabulary.ids})
    if unknown:
        advice = []
        for token in unknown:
            close = difflib.get_close_matches(token, known, n=3)
            advice.append(repr(token) + (f" (did you mean {', '.join(close)}?)" if close else ""))
        raise ValueError(
            f"outside what this model was trained on: {', '.join(advice)}; it knows {len(known)} source tokens, "
            f"such as {', '.join(known[:: max(1, len(known) // 12)])}"
        )


def evaluate(data: DataConfig, decode: DecodeConfig, run: RunConfig) -> None:
    """Score the newest checkpoint in --out on every held-out split of its data."""
    model, codec, state = load_translator(run.out, pick_device(run.device))
    asked = {name: str(value) for name, value in asdict(data).items()}
    if asked != state["data_config"]:
        raise ValueError(f"the checkpoint was trained on {state['data_config']}; give the same data flags, got {asked}")
    pairs, _, meanings = load_pairs(data, state["seed"])
    print_results(evaluate_splits(model, codec, pairs, meanings, decode), decode.n_beams)


def bench(model_config: ModelConfig, run: RunConfig) -> None:
    """Time a training step against nn.Transformer, and cached against uncached decoding, in one run."""
    announce("time training steps and decoding", 20)
    print(describe_machine())
    for name, ratio in measure_speed(model_config, run).items():
        what = name.replace("cached beside uncached decoding", "decoding with a cache beside without one")
        print(f"{what}: {ratio}")


def measure_speed(model_config: ModelConfig, run: RunConfig) -> dict[str, str]:
    seed_everything(run.seed)
    device, vocab_size, batch_size, seq_len = pick_device(run.device), 200, 64, 16
    ours = Transformer(model_config, vocab_size, vocab_size).to(device)
    theirs = TorchTranslator(model_config, vocab_size).to(device)
    src_ids, tgt_ids = (torch.randint(4, vocab_size, (batch_size, seq_len), device=device) for _ in range(2))

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(src_ids, tgt_ids).flatten(0, 1), tgt_ids.flatten()).backward()

    @torch.no_grad()
    def decode(n_tokens: int, caches: list[KeyValueCache] | None) -> None:
        memory, memory_mask = ours.encode(src_ids)
        ids = tgt_ids[:, :1]
        for _ in range(n_tokens):
            new = ids if caches is None else ids[:, -1:]
            logits = ours.decode(new, memory, memory_mask, caches)[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)

    def step_with_fused_norms() -> None:
        with mock.patch.object(LayerNorm, "forward", fused_layer_norm):
            step(ours)

    works = {"ours": lambda: step(ours), "fused": step_with_fused_norms, "nn.Transformer": lambda: step(theirs)}
    lengths = [length for length in (16, 48) if length <= model_config.max_seq_len]
    for length in lengths:
        works[f"cached {length}"] = lambda length=length: decode(length, ours.new_caches())
        works[f"uncached {length}"] = lambda length=length: decode(length, None)
    seconds = time_in_turns(works)
    ratios = {
        "training step beside nn.Transformer": speed_ratio(seconds["ours"], seconds["nn.Transformer"]),
        "training step with torch's LayerNorm beside nn.Transformer": speed_ratio(
            seconds["fused"], seconds["nn.Transformer"]
        ),
    }
    for length in lengths:
        name = f"cached beside uncached decoding, {length} tokens"
        ratios[name] = speed_ratio(seconds[f"cached {length}"], seconds[f"uncached {length}"])
    return ratios


def fused_layer_norm(self: LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in one kernel: ours, in steps that can be read, is what our training step loses to nn.Transformer."""
    return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.norm_eps)


class TorchTranslator(nn.Module):
    """The same model around nn.Transformer, as the peer that `bench` times."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.emb, self.lm_head = nn.Embedding(vocab_size, config.d_model), nn.Linear(config.d_model, vocab_size)
        layers = (config.n_encoder_layers, config.n_decoder_layers)
        sizes = (config.d_model, config.n_heads, *layers, config.d_ff, config.dropout)
        self.core = nn.Transformer(*sizes, batch_first=True, norm_first=config.norm_order == "pre")

    def forward(self, src_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt_ids.shape[1], device=tgt_ids.device)
        return self.lm_head(self.core(self.emb(src_ids), self.emb(tgt_ids), tgt_mask=mask, tgt_is_causal=True))


def main(argv: list[str] | None = None) -> None:
    from translation_experiments import FiguresConfig, figures  # here, because they import this module

    training = (ModelConfig, DataConfig, TrainConfig, DecodeConfig, RunConfig)
    verbs = {
        "demo": (train, *training),
        "train": (train, *training),
        "translate": (translate, TranslateConfig, DecodeConfig, RunConfig),
        "evaluate": (evaluate, DataConfig, DecodeConfig, RunConfig),
        "bench": (bench, ModelConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
