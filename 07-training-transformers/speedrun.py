"""Topic 07 - Speed-run: the fewest bits per byte of held-out Python text that a minute on one thread can reach.

A small transformer learns only what counting cannot say: counted contexts of many lengths predict each byte first, and
the transformer, which sees these predictions, corrects them.

python 07-training-transformers/speedrun.py                           # one minute for each of three models; a table
python 07-training-transformers/speedrun.py --budget 20s --which ours # shorter, without the baselines
python 07-training-transformers/speedrun.py --help

Papers: Jordan et al. 2024, Muon; Henry et al. 2020 (arXiv 2010.04245), normalised queries and keys; Zhang and Sennrich
2019 (arXiv 1910.07467), RMSNorm; So et al. 2021 (arXiv 2109.08668), squared ReLU. The baseline is Karpathy's nanoGPT
(https://github.com/karpathy/nanoGPT).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_mechanisms import MultiHeadAttention
from context_experts import BY_WORTH, Alphabet, Experts, Reading, count_contexts
from optimizers import build_optimizer, schedule_factor
from python_text import python_text
from sequence_modeling import NGramModel, bits_per_byte, compressed_bits
from transformer_architecture import CausalTransformer, ModelConfig, position_angles, rotate_halves
from workbench import Column, RunConfig, announce, check_range, progress, run_verbs, save_results, seed_everything

SEPARATOR = "\n\n"  # between paragraphs; its bytes are predicted and charged like all others


# The text


@dataclass(frozen=True)
class Corpus:
    """Paragraphs to train on and held-out paragraphs, as symbols."""

    alphabet: Alphabet
    train_ids: Tensor  # (seq)
    paragraph: Tensor  # (seq): which paragraph each training byte belongs to
    held_out_ids: Tensor  # (seq)
    train_text: str
    held_out_text: str
    unknown_nats: float  # nats that the held-out bytes outside the alphabet cost beyond their shared symbol


@functools.cache
def load_corpus() -> Corpus:
    return make_corpus(python_text("train"), python_text("validation"))


def make_corpus(train: list[str], held_out: list[str]) -> Corpus:
    """Join paragraphs by an empty line. Raises ValueError if a held-out paragraph is also a training paragraph."""
    shared = set(train) & set(held_out)
    if shared or not train or not held_out:
        raise ValueError(
            f"{len(train)} paragraphs to train on and {len(held_out)} held out share {len(shared)}; "
            "both sides need some, and none may be on both"
        )
    train_text, held_out_text = SEPARATOR.join(train) + SEPARATOR, SEPARATOR.join(held_out)
    alphabet = Alphabet(train_text.encode())
    lengths = torch.tensor([len((text + SEPARATOR).encode()) for text in train])
    held_out_ids = alphabet.encode(held_out_text.encode())
    n_unknown = int((held_out_ids == len(alphabet.known)).sum())
    return Corpus(
        alphabet,
        alphabet.encode(train_text.encode()),
        torch.arange(len(train)).repeat_interleave(lengths),
        held_out_ids,
        train_text,
        held_out_text,
        n_unknown * math.log(max(1, alphabet.n_unknown)),
    )


# The clock


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # seconds that pass, or that this process computes


class Clock:
    """How much of a budget of seconds is used up since the clock was made."""

    def __init__(self, budget: float, timer: Callable[[], float]) -> None:
        self.budget, self.timer, self.start = budget, timer, timer()

    @property
    def used(self) -> float:
        return self.timer() - self.start

    @property
    def share(self) -> float:
        return self.used / self.budget


# Recipes


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how the seconds are spent."""

    name: str = "ours"
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    seq_len: int = 64
    batch_size: int = 8
    learning_rate: float = 8e-3
    optimizer: str = "muon"
    schedule: str = "wsd"  # wsd: falls to 0 during the last seven tenths
    beta2: float = 0.95
    weight_decay: float = 0.0
    baseline: bool = False  # nanogpt_like instead of Corrector
    use_experts: bool = True
    use_words: bool = True  # experts for words, too
    show_experts: bool = True  # the transformer sees what the experts predict
    leave_out: bool = True  # predict a training paragraph without its own counts
    thinned: bool = True  # train on every ninth paragraph in a row, as held-out text shows every tenth
    learn_residual: bool = True  # train the transformer; False: the experts alone
    count_share: float = 0.25  # share of the budget after which no further context is counted
    trust_share: float = 0.1  # share of the budget for learning the experts' trusts


OURS = Recipe()
# README of nanoGPT, "i only have a macbook": the CPU settings of its character model; the rest from its config file.
# Its 2,000 steps do not fit into a minute here; the cosine falls over the budget instead.
NANOGPT = Recipe(
    "nanoGPT, its CPU settings", 128, 4, 4, 64, 12, 1e-3, "adamw", "cosine", 0.99, 0.1, baseline=True, use_experts=False
)
TUNED = replace(NANOGPT, name="nanoGPT, tuned", d_model=96, n_layers=2, learning_rate=1e-2)
ABLATIONS: dict[str, Recipe] = {
    "full recipe": OURS,
    "experts alone, no transformer": replace(OURS, learn_residual=False, trust_share=0.7),
    "no experts": replace(OURS, use_experts=False),
    "experts not shown to the transformer": replace(OURS, show_experts=False),
    "own paragraph counted too": replace(OURS, leave_out=False),
    "no experts for words": replace(OURS, use_words=False),
    "AdamW instead of Muon": replace(OURS, optimizer="adamw", learning_rate=4e-3),
    "paragraphs in their own order": replace(OURS, thinned=False),
}


# The model that corrects the experts


def normalised(x: Tensor) -> Tensor:
    """Divide by the root mean square: RMSNorm without a gain (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],))


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


class QueryKeyNormAttention(nn.Module):
    """Causal rotary self-attention whose queries and keys are normalised first (Henry et al. 2020).

    Logits are then bounded, so that a high learning rate cannot make the softmax one-hot. No weights are returned, so
    that PyTorch's fused kernel can do the work. Shapes: (batch, seq, d_model) to the same.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.out_proj = zeroed(nn.Linear(d_model, d_model, bias=False))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (batch, heads, seq, d_head)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(normalised(q), angles), rotate_halves(normalised(k), angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, seq, d_head)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (batch, seq, d_model)


class Block(nn.Module):
    """Attention and a squared-ReLU network (So et al. 2021), whose last maps start at 0: at first the identity."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.self_attn = QueryKeyNormAttention(d_model, n_heads)
        self.up_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down_proj = zeroed(nn.Linear(4 * d_model, d_model, bias=False))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.self_attn(normalised(x), angles)  # (batch, seq, d_model)
        return x + self.down_proj(F.relu(self.up_proj(normalised(x))).square())  # (batch, seq, d_model)


class Corrector(nn.Module):
    """A small transformer that reads the text and what the experts predict next, and adds to their log-probabilities.

    logits = lm_head(x) + sum over experts of gate(x) * log p: with lm_head and the gates' weights at 0, training starts
    at the experts' own bits per byte, and every step goes into what they get wrong. Without experts (n_experts 0) it is
    a plain decoder. Shapes: ids (batch, seq), log_probs (batch, seq, vocab, experts), evidence (batch, seq, evidence)
    to logits (batch, seq, vocab).
    """

    def __init__(self, recipe: Recipe, vocab_size: int, n_experts: int = 0, d_evidence: int = 0) -> None:
        super().__init__()
        d_model = recipe.d_model
        self.recipe, self.n_experts = recipe, n_experts
        self.token_emb = nn.Embedding(vocab_size, d_model)
        if n_experts:
            self.expert_proj = nn.Linear(vocab_size * n_experts, d_model, bias=False)
            self.evidence_proj = nn.Linear(d_evidence, d_model)
            self.gate = zeroed(nn.Linear(d_model, n_experts))
            nn.init.constant_(self.gate.bias, 1 / n_experts)
        self.blocks = nn.ModuleList(Block(d_model, recipe.n_heads) for _ in range(recipe.n_layers))
        self.lm_head = zeroed(nn.Linear(d_model, vocab_size, bias=False))

    def forward(self, ids: Tensor, log_probs: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        x = self.token_emb(ids)  # (batch, seq, d_model)
        if self.n_experts and self.recipe.show_experts:  # square roots: small probabilities are not lost beside large
            x = x + self.expert_proj(4 * (log_probs / 2).exp().flatten(2)) + self.evidence_proj(evidence)
        x = normalised(x)  # (batch, seq, d_model)
        angles = position_angles(torch.arange(ids.shape[1]), x.shape[-1] // self.recipe.n_heads)  # (seq, half)
        for block in self.blocks:
            x = block(x, angles)  # (batch, seq, d_model)
        x = normalised(x)  # (batch, seq, d_model)
        logits = self.lm_head(x)  # (batch, seq, vocab)
        if self.n_experts:
            logits = logits + (log_probs @ self.gate(x)[..., None])[..., 0]  # (batch, seq, vocab)
        return logits


# The baseline


class FusedAttention(MultiHeadAttention):
    """Topic 03's attention, causal, by PyTorch's fused kernel, as nanoGPT uses it; the weights are never formed."""

    def attend(self, x, k, v, mask=None, bias=None) -> tuple[Tensor, None]:
        mixed = F.scaled_dot_product_attention(self.split_heads(self.q_proj(x)), k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def nanogpt_like(recipe: Recipe, vocab_size: int) -> CausalTransformer:
    """Topic 04's decoder as nanoGPT configures it: learned positions, pre-norm, GELU, tied embeddings, its init.

    Attention and LayerNorm are PyTorch's fused ones, lest the baseline lose time to our teaching versions.
    """
    d_model, n_layers = recipe.d_model, recipe.n_layers
    sizes = {"max_seq_len": recipe.seq_len, "d_model": d_model, "n_layers": n_layers, "n_heads": recipe.n_heads}
    config = ModelConfig(**sizes, d_ff=4 * d_model, activation="gelu", positions="learned")
    model = CausalTransformer(config, vocab_size)
    for block in model.encoder.blocks:
        block.self_attn = FusedAttention(d_model, recipe.n_heads)
        block.attn_norm, block.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
    model.encoder.final_norm = nn.LayerNorm(d_model)
    model.lm_head.weight = model.token_emb.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            last = name.endswith(("out_proj.weight", "ffn.down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers) if last else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


# Training against the clock


def thinned_order(paragraph: Tensor, n_parts: int, generator: torch.Generator) -> Tensor:
    """Training positions in the order of n_parts thinned copies: every paragraph in one of them, at random.

    Neighbours in the held-out text lie about ten paragraphs apart in the original, as the split took a tenth. A model
    that trains on true neighbours learns to rely on a topic that the held-out text has already left.
    """
    part = torch.randint(n_parts, (int(paragraph[-1]) + 1,), generator=generator)[paragraph]
    return part.sort(stable=True).indices  # (seq)


def rate_factor(schedule: str, done: float) -> float:
    """The schedules of this topic over a run measured in seconds, of which a share is done."""
    if schedule == "wsd":
        return schedule_factor("wsd", 1000 * done, 1000, 20, 700)
    return schedule_factor(schedule, 1000 * done, 1000, 50, min_lr_ratio=0.1)


@dataclass
class Trained:
    """What a speed-run leaves behind."""

    recipe: Recipe
    alphabet: Alphabet
    experts: Experts | None
    model: nn.Module | None
    n_steps: int = 0
    seconds: float = 0.0  # of the clock that ran
    wall: float = 0.0
    cpu: float = 0.0

    def read(self, ids: Tensor) -> Reading | None:
        return Reading.of_text(self.experts, ids) if self.experts else None

    def log_probs(self, ids: Tensor, positions: Tensor, reading: Reading | None) -> Tensor:
        """Log-probabilities (batch, seq, vocab) of the symbols at positions (batch, seq) of a text.

        The transformer sees the earlier symbols of the row and the one before the row; the experts look back as far as
        their contexts reach: 24 bytes, or the word that has begun and two words before it.
        """
        return F.log_softmax(logits_at(self.model, ids, positions, reading), dim=-1)

    @property
    def n_parameters(self) -> int:
        parts = [part for part in (self.experts, self.model) if part is not None]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())


def logits_at(
    model: nn.Module | None, ids: Tensor, positions: Tensor, reading: Reading | None, order: Tensor | None = None
) -> Tensor:
    """Logits (batch, seq, vocab) for positions (batch, seq) of a text whose symbols may be read in another order.

    Each is predicted from the symbol before it; before the first stands symbol 0, the line break. (An index of -1 would
    silently show it the last symbol of the text.)
    """
    before = positions - 1  # (batch, seq)
    begins = before < 0
    if order is not None:
        positions, before = order[positions], order[before]
    inputs = ids[before].masked_fill(begins, 0)  # (batch, seq)
    if reading is not None:
        log_probs, evidence = (part.unflatten(0, positions.shape) for part in reading(positions.flatten()))
        if model is None:
            return log_probs[..., reading.experts.longest]  # (batch, seq, vocab)
        return model(inputs, log_probs, evidence)  # (batch, seq, vocab)
    return model(inputs)  # (batch, seq, vocab)


def train_in(budget: float, recipe: Recipe, corpus: Corpus, seed: int, timer: Callable[[], float]) -> Trained:
    """Count, learn trusts, train: all of it inside `budget` seconds, evaluation after it. Everything from `seed`."""
    generator = seed_everything(seed)
    clock, wall, cpu = Clock(budget, timer), time.perf_counter(), time.process_time()
    experts = reading = model = None
    if recipe.use_experts:
        names = [name for name in BY_WORTH if recipe.use_words or name.isdigit()]
        letters = corpus.alphabet.letters
        tables = count_contexts(
            names, corpus.train_ids, corpus.paragraph, letters, lambda: clock.share > recipe.count_share
        )
        experts, counted = Experts(tables, corpus.alphabet, recipe.leave_out), clock.share
        experts.learn_trust(lambda: (clock.share - counted) / recipe.trust_share, generator)
        reading = Reading.of_training_text(experts)
    trained = Trained(recipe, corpus.alphabet, experts, model)
    if recipe.learn_residual:
        evidence = (experts.n_experts, experts.d_evidence) if experts else (0, 0)
        size = corpus.alphabet.size
        trained.model = nanogpt_like(recipe, size) if recipe.baseline else Corrector(recipe, size, *evidence)
        trained.n_steps = train_model(trained.model, corpus, reading, recipe, clock, generator)
    trained.seconds, trained.wall, trained.cpu = clock.used, time.perf_counter() - wall, time.process_time() - cpu
    return trained


def train_model(
    model: nn.Module,
    corpus: Corpus,
    reading: Reading | None,
    recipe: Recipe,
    clock: Clock,
    generator: torch.Generator,
) -> int:
    """Train on random stretches until the budget is used up; return the number of steps."""
    optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, beta2=recipe.beta2)
    ids, seq_len, start, n_steps = corpus.train_ids, recipe.seq_len, clock.share, 0
    left = max(1 - start, 1e-9)  # nothing, if the budget was used up before the first step
    order = thinned_order(corpus.paragraph, 9, generator) if recipe.thinned and not recipe.baseline else None
    model.train()
    with progress(None, recipe.name, total=round(clock.budget)) as bar:
        while (done := (clock.share - start) / left) < 1:
            first = torch.randint(1, len(ids) - seq_len, (recipe.batch_size, 1), generator=generator)
            positions = first + torch.arange(seq_len)  # (batch, seq)
            targets = ids[positions if order is None else order[positions]]  # (batch, seq)
            loss = F.cross_entropy(logits_at(model, ids, positions, reading, order).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate_factor(recipe.schedule, done)
            optimizer.step()
            n_steps += 1
            bar.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits per byte", refresh=False)
            bar.update(min(clock.used, bar.total) - bar.n)
    return n_steps


# Evaluation


@torch.no_grad()
def held_out_bits(trained: Trained, corpus: Corpus, batch_size: int = 32) -> float:
    """Bits per byte over the whole held-out text, by a window that slides half its length at a time.

    A window is as long as the rows of training. Its first half is context alone, except in the first window: every
    byte of the text is predicted once, from at least half a window of the text before it. Nothing is learned from the
    held-out text. Bytes that the training text lacks are charged too.
    """
    ids, length = corpus.held_out_ids, min(trained.recipe.seq_len, len(corpus.held_out_ids))
    reading, stride = trained.read(ids), max(1, length // 2)
    starts = [*range(0, len(ids) - length, stride), len(ids) - length]
    nats, n_done = corpus.unknown_nats, 0
    if trained.model is not None:
        trained.model.eval()
    for group in progress(range(0, len(starts), batch_size), f"evaluating {trained.recipe.name}"):
        positions = torch.tensor(starts[group : group + batch_size])[:, None] + torch.arange(length)  # (*, seq)
        log_probs = trained.log_probs(ids, positions, reading)  # (*, seq, vocab)
        losses = -log_probs.gather(-1, ids[positions][..., None])[..., 0]  # (*, seq)
        for first, row in zip(positions[:, 0].tolist(), losses, strict=True):
            nats += row[n_done - first :].sum().item()
            n_done = first + length
    return bits_per_byte(nats, len(ids))


@torch.no_grad()
def write_on(trained: Trained, prompt: str, n_bytes: int, generator: torch.Generator) -> str:
    """Continue a prompt byte by byte."""
    ids = trained.alphabet.encode(prompt.encode())
    for _ in range(n_bytes):
        text = F.pad(ids, (0, 1))  # the symbol to be predicted stands last, its value unused
        first = max(0, len(ids) - trained.recipe.seq_len + 1)
        positions = torch.arange(first, len(text))[None]  # (1, seq)
        probs = trained.alphabet.byte_log_probs(trained.log_probs(text, positions, trained.read(text))[0, -1]).exp()
        byte = torch.multinomial(probs, 1, generator=generator).item()
        prompt += chr(byte) if byte < 128 else "?"
        ids = F.pad(ids, (0, 1), value=int(trained.alphabet.symbol_of[byte]))
    return prompt


# What to stand beside


def reference_rows(corpus: Corpus, order: int = 6) -> list[list]:
    """Bits per byte of what does not train by gradients: a guess, compressors after the training text, an n-gram."""
    compressed = compressed_bits(corpus.train_text, corpus.held_out_text)
    rows = [["every byte equally likely", 8.0, "-", "-", "-"]]
    for name in ("gzip", "xz"):
        rows.append([f"{name}, after the training text", compressed[f"{name} after the training text"], "-", "-", "-"])
    start = time.process_time()
    model = NGramModel(order, corpus.alphabet.size + 1).fit([[0, *(corpus.train_ids + 1).tolist()]])  # 0 is its <bos>
    seconds, nats, state = time.process_time() - start, corpus.unknown_nats, None
    inputs = F.pad(corpus.held_out_ids + 1, (1, 0))
    for part, targets in zip(inputs[:-1].split(8192), inputs[1:].split(8192), strict=True):
        log_probs, state = model.advance(part[None], state)
        nats -= log_probs[0].gather(-1, targets[:, None]).sum().item()
    bits = bits_per_byte(nats, len(corpus.held_out_ids))
    return [*rows, [f"{order}-gram, Kneser-Ney (topic 02)", bits, seconds, "-", float(model.n_entries)]]


COLUMNS = [
    Column("Model"),
    Column("held-out text", "bits per byte", ".3f"),
    Column("training", "seconds", ".1f"),
    Column("steps", "", ".0f"),
    Column("parameters or counts", "", ",.0f"),
]


def measure(recipe: Recipe, corpus: Corpus, budget: float, seed: int, clock: str = "cpu") -> tuple[list, Trained]:
    """Train and evaluate one recipe; return its row of the table, and the model."""
    trained = train_in(budget, recipe, corpus, seed, CLOCKS[clock])
    bits = held_out_bits(trained, corpus)
    return [recipe.name, bits, trained.seconds, float(trained.n_steps), float(trained.n_parameters)], trained


# The experiments of the chapter


def merged(rows: list[list]) -> list:
    """One row per seed as one row whose numbers are lists."""
    name, *columns = zip(*rows, strict=True)
    return [name[0], *map(list, columns)]


def speedrun_table(folder: Path, n_seeds: int = 3, budget: float = 60.0) -> None:
    """Ours and both baselines in CPU seconds of one thread, beside compressors and an n-gram model.

    The recipes take turns, so that a busy moment of the machine hits all alike; how much of a core each had is shown.
    """
    corpus, found = load_corpus(), {recipe: [] for recipe in (NANOGPT, TUNED, OURS)}
    for seed in range(n_seeds):
        for recipe, rows in found.items():
            row, trained = measure(recipe, corpus, budget, seed)
            rows.append([*row, trained.cpu / trained.wall])
    table = [[*row, "-"] for row in reference_rows(corpus)] + [merged(rows) for rows in found.values()]
    columns = [*COLUMNS, Column("share of a core", "CPU per wall", ".2f")]
    command = "python 07-training-transformers/training_transformers.py figures speedrun"
    save_results(folder / "results.json", "speedrun", columns, table, range(n_seeds), command)


def speedrun_ablation(folder: Path, n_seeds: int = 3, budget: float = 60.0, n_removal_seeds: int = 1) -> None:
    """Each trick taken out of the full recipe; the change is against the mean of the full recipe."""
    corpus, rows, full = load_corpus(), [], None
    for name, recipe in ABLATIONS.items():
        seeds = range(n_removal_seeds if full else n_seeds)
        row = merged([measure(recipe, corpus, budget, seed)[0] for seed in seeds])
        full = full or sum(row[1]) / len(row[1])
        rows.append([name, row[1], [bits - full for bits in row[1]], row[3]])
    columns = [Column("Recipe"), COLUMNS[1], Column("change", "bits per byte", "+.3f"), COLUMNS[3]]
    command = "python 07-training-transformers/training_transformers.py figures speedrun_ablation"
    save_results(folder / "results.json", "speedrun-ablation", columns, rows, range(n_seeds), command)


# The verb


@dataclass(frozen=True)
class SpeedrunConfig:
    """How long, on which clock, and the sizes of our model."""

    budget: str = "60s"  # seconds of training for each model, such as 60s, 2m or 90
    clock: Literal["wall", "cpu"] = "wall"  # what the budget counts: the wall's seconds or this process's CPU seconds
    which: Literal["both", "ours", "baseline"] = "both"  # baseline: nanoGPT's CPU settings, and those tuned
    d_model: int = OURS.d_model  # width of our transformer
    n_layers: int = OURS.n_layers  # its blocks
    n_heads: int = OURS.n_heads  # its attention heads; d_model / n_heads must be even
    seq_len: int = OURS.seq_len  # its context, in bytes
    batch_size: int = OURS.batch_size  # rows of a step
    learning_rate: float = OURS.learning_rate  # of Muon and AdamW alike
    n_bytes: int = 300  # length of the sample that our model writes at the end

    def __post_init__(self) -> None:
        check_range(self, "d_model", "n_layers", "n_heads", "batch_size", least=1)
        check_range(self, "seq_len", least=2, most=4096)
        check_range(self, "n_bytes", least=0, most=10_000)
        check_range(self, "learning_rate", above=0, most=1)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} / n_heads={self.n_heads} must be a whole even number, as rotary")
        parse_budget(self.budget)

    def recipes(self) -> list[Recipe]:
        sizes = ("d_model", "n_layers", "n_heads", "seq_len", "batch_size", "learning_rate")
        ours = replace(OURS, **{name: getattr(self, name) for name in sizes})
        return ([] if self.which == "ours" else [NANOGPT, TUNED]) + ([] if self.which == "baseline" else [ours])


def parse_budget(text: str) -> float:
    """Seconds of "60s", "2m", "1h" or "90". Raises ValueError for anything else, below a second or above a day."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 1 <= seconds <= 86400:
        raise ValueError(f"budget must be a time from 1s to 24h, such as 60s, 2m or 90, got {text!r}")
    return seconds


def speedrun(config: SpeedrunConfig, run: RunConfig) -> None:
    """Train for a budget of seconds and compare bits per byte of held-out Python text with two baselines."""
    if run.device not in ("auto", "cpu"):
        raise ValueError(f"the speed-run is about one CPU thread, got --device {run.device}; leave the flag out")
    budget, recipes = parse_budget(config.budget), config.recipes()
    plan = (
        f"Read the text, then {len(recipes)} x {budget:g} s of training ({config.clock} clock) and an evaluation each"
    )
    announce(plan, seconds=25 + (budget + 10) * len(recipes))
    corpus = load_corpus()
    print(f"{len(corpus.train_ids):,} bytes to train on, {len(corpus.held_out_ids):,} held out")
    rows, trained = reference_rows(corpus), None
    for recipe in recipes:
        row, trained = measure(recipe, corpus, budget, run.seed, config.clock)
        rows.append(row)
        seconds = f"{trained.wall:.1f} s on the wall, {trained.cpu:.1f} s of CPU time"
        print(f"{recipe.name}: {row[1]:.3f} bits per byte after {trained.n_steps:,} steps, {seconds}", flush=True)
    command = f"python 07-training-transformers/speedrun.py --budget {config.budget} --which {config.which}"
    save_results(run.out / "results.json", "speedrun", COLUMNS, rows, [run.seed], command)
    print_rows(rows)
    if config.which != "baseline" and config.n_bytes:
        generator = torch.Generator().manual_seed(run.seed)
        print(f"\nOur model continues 'Return':\n{write_on(trained, 'Return', config.n_bytes, generator)}")


def print_rows(rows: list[list]) -> None:
    """The table, and how far the last model lies below the others that were trained as long."""
    print(f"\n{'model':34} {'bits per byte':>13} {'seconds':>8} {'steps':>7} {'parameters':>12}")
    for row in rows:
        cells = [
            cell if isinstance(cell, str) else format(cell, column.digits)
            for cell, column in zip(row, COLUMNS, strict=True)
        ]
        print(f"{cells[0]:34} {cells[1]:>13} {cells[2]:>8} {cells[3]:>7} {cells[4]:>12}")
    ours = rows[-1]
    for row in rows[:-1]:
        if ours[0] == OURS.name and row[3] != "-":
            print(f"ours needs {1 - ours[1] / row[1]:.1%} fewer bits than {row[0]}")


def main(argv: list[str] | None = None) -> None:
    run_verbs(__doc__, {"demo": (speedrun, SpeedrunConfig, RunConfig)}, argv)


if __name__ == "__main__":
    main()
