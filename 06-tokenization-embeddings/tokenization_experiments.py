"""Topic 06 - Tokenization experiments: every measurement of the chapter.

python 06-tokenization-embeddings/tokenization_embeddings.py figures              # all of them: 19 minutes
python 06-tokenization-embeddings/tokenization_embeddings.py figures sizes speed  # some of them

Papers: Zouhar et al. 2023 (arXiv 2306.16837), what BPE's greed can lose; Petrov et al. 2023 (arXiv 2305.15425), the
price of a script; Singh and Strouse 2024 (arXiv 2402.14903), digits; Land and Bartolo 2024 (arXiv 2405.05417),
under-trained tokens; Kudo 2018 (arXiv 1804.10959) and Provilkov et al. 2020 (arXiv 1910.13267), sampled segmentations.
"""

import functools
import itertools
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import word_vectors
from python_text import python_text
from sequence_modeling import (
    BOS_ID,
    EOS_ID,
    IGNORE,
    PAD_ID,
    Vocabulary,
    bits_per_byte,
    document_batches,
    document_losses,
)
from tiny_world import SPECIAL_TOKENS, World, held_out
from tokenization_embeddings import (
    ENCODING_COLUMNS,
    TRAINING_COLUMNS,
    TRAPS,
    ByteLevelBPE,
    CharacterTokenizer,
    Unigram,
    WordPiece,
    WordTokenizer,
    bytes_per_token,
    cut_words,
    in_text_order,
    measure_encoding_speed,
    measure_training_speed,
    merge_all,
    size_of,
)
from transformer_architecture import (
    CausalTransformer,
    ModelConfig,
    TrainConfig,
    TransformerSize,
    fit,
    learning_rate_at,
    start_as_identity,
    transformer_flops,
)
from word_vectors import (
    METHODS,
    RELATIONS,
    VectorConfig,
    chance_precision,
    class_precision,
    cooccurrences,
    fact_precision,
    glove_vectors,
    minimise_expected_loss,
    noise_shares,
    plot_vectors,
    pmi_vectors,
    score_analogies,
    sgns_vectors,
    shifted_pmi,
    subsample,
)
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    pick_device,
    progress,
    run_experiments,
    save_figure,
    save_results,
)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class FiguresConfig:
    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of every comparison
    n_bytes: int = 600_000  # of Python text: tokenizers and models learn from it
    text_gflops: float = 80.0  # arithmetic of one training on Python text, in units of 1e9 operations
    world_gflops: float = 30.0  # the same on TinyWorld
    sum_gflops: float = 90.0  # the same on sums
    n_held_out: int = 80  # held-out texts
    n_documents: int = 4000  # TinyWorld documents
    vector_steps: int = 1500  # training steps of skip-gram
    speed_bytes: int = 1_000_000  # of text that the speed of tokenizers is measured on
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_held_out", "n_documents", "vector_steps", least=1)
        check_range(self, "n_bytes", "speed_bytes", least=10_000)
        check_range(self, "text_gflops", "world_gflops", "sum_gflops", above=0)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        command = f"python 06-tokenization-embeddings/tokenization_embeddings.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds or self.n_seeds), command)


# Byte pair encoding against the best that merges can do


def n_symbols(words: dict[tuple[str, ...], int]) -> int:
    """Tokens of a corpus: what byte pair encoding makes small."""
    return sum(len(word) * count for word, count in words.items())


def merged_words(words: dict[tuple[str, ...], int], merges: Iterable[tuple[str, str]]) -> dict[tuple[str, ...], int]:
    """The corpus after some merges, each everywhere, from left to right."""
    for merge in merges:
        joined: Counter = Counter()
        for word, count in words.items():
            joined[merge_all(word, merge)] += count
        words = joined
    return words


def best_merges(words: dict[tuple[str, ...], int], n_merges: int) -> tuple[int, list[tuple[str, str]]]:
    """The fewest tokens that any sequence of merges can reach, and a sequence that does, by trying all of them."""
    if n_merges == 0:
        return n_symbols(words), []
    pairs = sorted({pair for word in words for pair in itertools.pairwise(word)})
    found = [(*best_merges(merged_words(words, [pair]), n_merges - 1), pair) for pair in pairs]
    if not found:
        return n_symbols(words), []
    least, rest, pair = min(found, key=lambda item: item[0])
    return least, [pair, *rest]


# Language models on tokens


class Ids:
    """Stands where the data tools of topic 02 expect a vocabulary: the documents are token ids already."""

    @staticmethod
    def encode(tokens: list[int]) -> list[int]:
        return tokens


class Text(NamedTuple):
    tokens: list[int]  # <eos> is the last


def first_tokens(tokenizer: ByteLevelBPE, vocab_size: int) -> ByteLevelBPE:
    """The tokenizer that training would have given at a smaller vocabulary: merges only ever add to it."""
    vocab = {spelling: token_id for spelling, token_id in tokenizer.vocab.items() if token_id < vocab_size}
    merges = [pair for pair in tokenizer.merges if "".join(pair) in vocab]
    return ByteLevelBPE(vocab, merges, tokenizer.special_tokens, tokenizer.rule)


def encoded_texts(texts: list[str], encode: Encode, seed: int) -> Iterator[Text]:
    """The texts again and again, in a fresh order every epoch, encoded when they are needed: each time anew."""
    rng = random.Random(seed)
    while True:
        for text in rng.sample(texts, len(texts)):
            yield Text([*encode(text), EOS_ID])


ROW_BYTES = 192  # of text in a row of a batch, whatever the tokenizer: every model sees equally far
BATCH_SIZE = 4
MODEL = ModelConfig(max_seq_len=2048, d_model=48, d_ff=192)


def train_config(seq_len: int, n_steps: int) -> TrainConfig:
    return TrainConfig(BATCH_SIZE, seq_len, n_steps, warmup_steps=min(50, n_steps // 4))


def train_on_texts(
    vocab_size: int,
    texts: list[str],
    encode: Encode,
    gflops: float,
    run: RunConfig,
    prepare: Callable[[CausalTransformer], None] = start_as_identity,
) -> tuple[CausalTransformer, list[float]]:
    """A small transformer after `gflops` of matrix products, backward passes included: steps are what that buys.

    The cost of a step counts the output layer, so a large vocabulary pays for itself in fewer steps.
    """
    torch.manual_seed(run.seed)
    model = CausalTransformer(MODEL, vocab_size)
    prepare(model)
    seq_len = max(4, round(ROW_BYTES / bytes_per_token(encode, texts[:200])))
    flops = 3 * transformer_flops(TransformerSize.of(model), BATCH_SIZE, seq_len)["total"]
    n_steps = max(2, round(gflops * 1e9 / flops))
    config = train_config(seq_len, n_steps)
    batches = document_batches(encoded_texts(texts, encode, run.seed), Ids, BATCH_SIZE, seq_len, run.seed)
    return model, fit(model.to(pick_device(run.device)), batches, config)


def text_bits(model: nn.Module, encode: Encode, texts: list[str]) -> float:
    """Bits per byte that the model pays for the texts, the end of each included.

    It pays for one segmentation of each text, the tokenizer's; the text itself may be likelier (other segmentations).
    """
    nats = document_losses(model, [Text([*encode(text), EOS_ID]) for text in texts], Ids, batch_size=8)
    return bits_per_byte(sum(nats), size_of(texts))


@functools.cache
def python_corpus(n_bytes: int, n_held_out: int, parts: tuple[str, ...] = ("reference", "docstrings")):
    """Training texts of about `n_bytes` and held-out texts, both in a shuffled order; texts of 1,500 bytes at most."""
    found = {}
    for split in ("train", "validation"):
        texts = [text for text in python_text(split, parts) if len(text) <= 1500]
        random.Random(0).shuffle(texts)
        found[split] = texts
    sizes = itertools.accumulate(map(len, found["train"]))
    n_texts = 1 + sum(size < n_bytes for size in sizes)
    return found["train"][:n_texts], found["validation"][:n_held_out]


@functools.cache
def python_bpe(n_bytes: int, n_held_out: int, vocab_size: int) -> ByteLevelBPE:
    return ByteLevelBPE.train(python_corpus(n_bytes, n_held_out)[0], vocab_size, SPECIAL_TOKENS)


@functools.cache
def world_corpus(n_documents: int, n_held_out: int) -> tuple[list[str], list[str], float]:
    """TinyWorld's training texts, held-out texts, and the bits per byte that no model can beat on these."""
    world = World()
    train = [document.text for document in world.documents(n_documents, 1, "train")]
    fresh = world.documents(2 * n_held_out, 777, "validation")
    texts = [document.text for document in fresh]
    return train, texts, bits_per_byte(sum(sum(document.surprisal) for document in fresh), size_of(texts))


# Experiments: how many tokens


TEXT_SIZES = (264, 512, 1024, 2048, 4096)  # 8 special tokens, 256 bytes, and merges
WORLD_SIZES = (264, 384, 512, 2048)  # the last one asks for more than TinyWorld's words can give


def sizes(config: FiguresConfig, run: RunConfig) -> None:
    """Vocabulary size against compression, and against bits per byte after equal arithmetic."""
    train, unseen = python_corpus(config.n_bytes, config.n_held_out)
    whole = python_bpe(config.n_bytes, config.n_held_out, max(TEXT_SIZES))
    budgets = (config.text_gflops / 4, config.text_gflops)
    rows, curves = [], {f"Python text, {budget:g}e9 operations": [] for budget in budgets}
    for vocab_size in progress(TEXT_SIZES, "vocabulary sizes"):
        tokenizer = first_tokens(whole, vocab_size)
        bits = {}
        for budget, curve in zip(budgets, curves.values(), strict=True):
            bits[budget] = []
            for seed in range(config.n_seeds):
                seeded = seeded_run(run, seed)
                model, losses = train_on_texts(len(tokenizer.vocab), train, tokenizer.encode, budget, seeded)
                bits[budget].append(text_bits(model, tokenizer.encode, unseen))
            curve.append(bits[budget])
        size = TransformerSize.of(model)
        step = transformer_flops(size, 1, max(4, round(ROW_BYTES / bytes_per_token(tokenizer.encode, unseen))))
        share = step["output"] / step["total"]
        seen = bytes_per_token(tokenizer.encode, train)
        rows.append(
            [
                f"{vocab_size:,}",
                seen,
                bytes_per_token(tokenizer.encode, unseen),
                share,
                float(len(losses)),
                *bits.values(),
            ]
        )
    columns = [Column("Vocabulary"), Column("bytes a token, seen", "", ".2f"), Column("unseen", "", ".2f")]
    columns += [Column("output layer's share of a step", "", ".0%"), Column("steps", "", ".0f")]
    columns += [Column(f"{budget:g}e9 operations", "bits per byte", ".3f") for budget in budgets]
    config.save("sizes", columns, rows, "sizes")
    train, unseen, floor = world_corpus(config.n_documents, config.n_held_out)
    whole = ByteLevelBPE.train(train, max(WORLD_SIZES), SPECIAL_TOKENS)
    rows = []
    for vocab_size in progress(WORLD_SIZES, "vocabulary sizes, TinyWorld"):
        tokenizer = first_tokens(whole, vocab_size)
        bits = []
        for seed in range(config.n_seeds):
            model, _ = train_on_texts(
                len(tokenizer.vocab), train, tokenizer.encode, config.world_gflops, seeded_run(run, seed)
            )
            bits.append(text_bits(model, tokenizer.encode, unseen))
        rows.append(
            [f"{len(tokenizer.vocab):,}", bytes_per_token(tokenizer.encode, unseen), bits, [b - floor for b in bits]]
        )
    columns = [Column("Vocabulary"), Column("bytes a token, unseen", "", ".2f")]
    columns += [Column("held-out text", "bits per byte", ".3f"), Column("above the floor", "bits per byte", ".3f")]
    config.save("sizes-world", columns, [*rows, ["exact language", "-", floor, 0.0]], "sizes")
    save_figure(plot_sizes(TEXT_SIZES, curves), config.folder / "sizes.svg")


def seeded_run(run: RunConfig, seed: int) -> RunConfig:
    return RunConfig(seed, run.device, run.out, run.threads)


def plot_sizes(vocab_sizes: tuple[int, ...], curves: dict[str, list[list[float]]]) -> Figure:
    """Bits per byte against vocabulary size: mean over seeds, with a band from least to most."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for index, (name, points) in enumerate(curves.items()):
        means = [statistics.mean(values) for values in points]
        axis.plot(vocab_sizes, means, "os^D"[index % 4] + "-", color=f"C{index}", label=name)
        axis.fill_between(
            vocab_sizes, list(map(min, points)), list(map(max, points)), color=f"C{index}", alpha=0.2, lw=0
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(vocab_sizes, [f"{size:,}" for size in vocab_sizes])
    axis.minorticks_off()
    axis.set(xlabel="tokens in the vocabulary", ylabel="bits per byte, held-out text")
    axis.legend(frameon=False)
    return figure


# Experiments: which tokenizer


# One text of four sentences, written and translated for this course: the same meaning in every script.
SCRIPTS = {
    "English": "The water is cold. My sister reads a book in the garden. Tomorrow we go to the city. I know his name.",
    "German": "Das Wasser ist kalt. Meine Schwester liest im Garten ein Buch. Morgen gehen wir in die Stadt. Ich kenne "
    "seinen Namen.",
    "French": "L’eau est froide. Ma sœur lit un livre dans le jardin. Demain nous allons en ville. Je connais son nom.",
    "Finnish": "Vesi on kylmää. Siskoni lukee kirjaa puutarhassa. Huomenna menemme kaupunkiin. Tiedän hänen nimensä.",
    "Greek": "Το νερό είναι κρύο. Η αδελφή μου διαβάζει ένα βιβλίο στον κήπο. Αύριο πάμε στην πόλη. Ξέρω το όνομά του.",
    "Russian": "Вода холодная. Моя сестра читает книгу в саду. Завтра мы идём в город. Я знаю его имя.",
    "Hebrew": "המים קרים. אחותי קוראת ספר בגן. מחר נלך לעיר. אני יודע את שמו.",
    "Arabic": "الماء بارد. أختي تقرأ كتابًا في الحديقة. غدًا نذهب إلى المدينة. أعرف اسمه.",
    "Hindi": "पानी ठंडा है। मेरी बहन बगीचे में किताब पढ़ती है। कल हम शहर जाएँगे। मैं उसका नाम जानता हूँ।",
    "Chinese": "水很冷。我姐姐在花园里看书。明天我们去城里。我知道他的名字。",
    "Japanese": "水は冷たいです。姉は庭で本を読みます。明日私たちは町へ行きます。私は彼の名前を知っています。",
    "Korean": "물이 차갑다. 내 언니는 정원에서 책을 읽는다. 내일 우리는 도시에 간다. 나는 그의 이름을 안다.",
}
EXAMPLE = "Returns the tokenized café, 12345 bytes"  # cut by every tokenizer in the chapter's first figure
WORD = re.compile(r"\w+|[^\w\s]")


def unknown_share(tokenizer, texts: Iterable[str]) -> float:
    """Share of the characters that the tokenizer has no token for: what stood there is lost."""
    unknown = getattr(tokenizer, "unk_token", None)
    lost = total = 0
    for text in texts:
        total += len(text)
        lost += sum(end - start for _, spelling, (start, end) in tokenizer.tokens(text) if spelling == unknown)
    return lost / total


def fertility(tokenizer, texts: list[str]) -> tuple[float, float]:
    """Tokens for each word or punctuation mark, and for each character."""
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return n_tokens / sum(len(WORD.findall(text)) for text in texts), n_tokens / sum(map(len, texts))


def kinds(config: FiguresConfig, run: RunConfig) -> None:
    """Five tokenizers and plain bytes: compression, what comes back, fertility on prose, code and other scripts."""
    vocab_size = 1024
    train, unseen = python_corpus(config.n_bytes // 2, config.n_held_out)
    _, code = python_corpus(config.n_bytes // 2, config.n_held_out, ("functions",))
    tokenizers = {
        "bytes": first_tokens(ByteLevelBPE.train(train, 264, SPECIAL_TOKENS), 264),
        "characters": CharacterTokenizer.train(train, vocab_size),
        "words": WordTokenizer.train(train, vocab_size),
        "byte-level BPE": ByteLevelBPE.train(train, vocab_size, SPECIAL_TOKENS),
        "WordPiece": WordPiece.train(train, vocab_size),
        "Unigram": Unigram.train(train, vocab_size),
    }
    rows, costs = [], []
    for name, tokenizer in progress(tokenizers.items(), "tokenizers"):
        back = statistics.mean(tokenizer.decode(tokenizer.encode(text)) == text for text in unseen)
        (words, _), (code_words, code_characters) = fertility(tokenizer, unseen), fertility(tokenizer, code)
        rows.append(
            [
                name,
                len(tokenizer.vocab),
                bytes_per_token(tokenizer.encode, train),
                bytes_per_token(tokenizer.encode, unseen),
            ]
            + [unknown_share(tokenizer, unseen), back, words, code_words, 1 / code_characters]
        )
        costs.append([name, *(len(tokenizer.encode(text)) for text in SCRIPTS.values())])
    columns = [Column("Tokenizer"), Column("vocabulary", "", ",d"), Column("bytes a token, seen", "", ".2f")]
    columns += [
        Column("unseen", "", ".2f"),
        Column("characters lost", "", ".1%"),
        Column("texts that come back", "", ".0%"),
    ]
    columns += [
        Column("tokens a word, prose", "", ".2f"),
        Column("code", "", ".2f"),
        Column("bytes a token, code", "", ".2f"),
    ]
    config.save("kinds", columns, rows, "kinds", 1)
    n_tokens = {name: dict(zip(SCRIPTS, counts, strict=True)) for name, *counts in costs}
    rows = []
    for language, text in SCRIPTS.items():
        bpe = n_tokens["byte-level BPE"]
        row = [language, len(text), len(text.encode()) / len(text), bpe[language], bpe[language] / bpe["English"]]
        rows.append(row + [unknown_share(tokenizers[name], [text]) for name in ("words", "WordPiece", "Unigram")])
    columns = [Column("Same text in"), Column("characters", "", "d"), Column("UTF-8 bytes a character", "", ".2f")]
    columns += [Column("BPE tokens", "", "d"), Column("times the English", "", ".1f")]
    columns += [Column(f"characters lost, {name}", "", ".0%") for name in ("words", "WordPiece", "Unigram")]
    config.save("scripts", columns, rows, "kinds", 1)
    save_figure(plot_scripts(rows), config.folder / "scripts.svg")
    save_figure(plot_cuts(EXAMPLE, tokenizers), config.folder / "cuts.svg")


def plot_cuts(text: str, tokenizers: dict) -> Figure:
    """The same text as each tokenizer cuts it: one box a token, grey where the tokenizer has none."""
    figure, axis = plt.subplots(figsize=(7.2, 3.4))
    for row, tokenizer in enumerate(tokenizers.values()):
        unknown = getattr(tokenizer, "unk_token", None)
        tokens = tokenizer.tokens(text)
        for at, (_, spelling, (start, end)) in enumerate(tokens):
            color = "0.75" if spelling == unknown else f"C{at % 2}"
            box = {"fc": color, "ec": "white", "lw": 1.2, "alpha": 0.45}
            axis.add_patch(plt.Rectangle((start, row - 0.36), end - start, 0.72, **box))
        axis.text(len(text) + 0.6, row, f"{len(tokens)} tokens", va="center", fontsize=8)
        for at, char in enumerate(text):
            axis.text(at + 0.5, row, char, ha="center", va="center", fontsize=8, family="monospace")
    axis.set(xlim=(0, len(text) + 6), ylim=(len(tokenizers) - 0.4, -0.6))
    axis.set_yticks(range(len(tokenizers)), list(tokenizers))
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def plot_scripts(rows: list[list]) -> Figure:
    """Tokens of the same text in each language beside its characters and bytes."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    places = range(len(rows))
    axis.barh([place - 0.2 for place in places], [row[3] for row in rows], 0.4, color="C0", label="BPE tokens")
    axis.barh([place + 0.2 for place in places], [row[1] for row in rows], 0.4, color="C1", label="characters")
    n_bytes = [row[1] * row[2] for row in rows]
    axis.plot(n_bytes, places, "k|", ms=12, label="UTF-8 bytes")
    axis.set_yticks(places, [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel="count for the same four sentences")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def speed(config: FiguresConfig, run: RunConfig) -> None:
    """Training and encoding beside the Rust library and the naive trainer."""
    rows = measure_training_speed((config.speed_bytes, 10 * config.speed_bytes), 4096, n_rounds=3, n_naive=3)
    config.save("training-speed", TRAINING_COLUMNS, rows, "speed", 1)
    config.save("encoding-speed", ENCODING_COLUMNS, measure_encoding_speed(config.speed_bytes, 4096, 3), "speed", 1)


# Experiments: numbers


Cut = Callable[[str], list[str]]  # a number in digits -> its tokens
Spans = tuple[tuple[int, int], tuple[int, int]]  # least and largest first operand, the same of the second


def from_the_left(number: str) -> list[str]:
    """Two digits a token, counted from the front, as a rule that reads from left to right does."""
    return [number[at : at + 2] for at in range(0, len(number), 2)]


def from_the_right(number: str) -> list[str]:
    """Two digits a token, counted from the units: a token then always stands for the same power of a hundred."""
    odd = len(number) % 2
    return [number[:1]] * odd + from_the_left(number[odd:])


def in_learnt_chunks(spans: Spans, n_chunks: int, seed: int) -> Cut:
    """Numbers as byte pair encoding cuts them, trained on sums: some of their parts are tokens, others are not."""
    rng = random.Random(seed)
    texts = [f"{first}+{second}+{first + second}" for first, second in random_sums(spans, rng, 4000)]
    tokenizer = ByteLevelBPE.train(texts, 256 + n_chunks)
    return lambda number: [tokenizer.spellings[token_id] for token_id in tokenizer.word_ids(number.encode())]


def random_sums(spans: Spans, rng: random.Random, n_sums: int, split: str = "train") -> list[tuple[int, int]]:
    """Pairs of operands within `spans`, both ends included; a tenth are held out by a hash of the pair."""
    found: list[tuple[int, int]] = []
    while len(found) < n_sums:
        pair = (rng.randint(*spans[0]), rng.randint(*spans[1]))
        if held_out("{} + {}".format(*pair)) == (split == "validation"):
            found.append(pair)
    return found


def share_without_carry(spans: Spans) -> float:
    """Share of the sums that come out right if every column is added by itself: no column exceeds 9."""
    (low, high), (least, most) = spans
    pairs = itertools.product(range(low, high + 1), range(least, most + 1))
    return statistics.mean(
        all(int(x) + int(y) < 10 for x, y in zip(f"{a:09}", f"{b:09}", strict=True)) for a, b in pairs
    )


class SumTask(NamedTuple):
    """Sums as rows of tokens: the loss and the score look at the answer alone."""

    cut: Cut
    vocabulary: Vocabulary
    spans: Spans
    spaced: float  # share of the training sums that are written with blanks
    glued: bool  # whether a blank belongs to the token after it, as in GPT-2, or is a token

    @classmethod
    def build(cls, cut: Cut, spans: Spans, spaced: float = 0.0, glued: bool = True) -> "SumTask":
        (first, last), (least, most) = spans
        numbers = [cut(str(number)) for number in {*range(first, last + most + 1), *range(least, most + 1)}]
        parts = {part for number in numbers for part in number} | {"+", "="}
        if spaced:
            parts |= {" " + first for first in (*(number[0] for number in numbers), "+", "=")} if glued else {" "}
        return cls(cut, Vocabulary(sorted(parts)), spans, spaced, glued)

    def after_blank(self, parts: list[str], spaced: bool) -> list[str]:
        if not spaced:
            return parts
        return [" " + parts[0], *parts[1:]] if self.glued else [" ", *parts]

    def batch(self, pairs: list[tuple[int, int]], spaced: list[bool]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of next-token prediction; what stands before the answer is no target.

        Shapes:
            each (batch, seq)
        """
        rows, targets = [], []
        for (first, second), blank in zip(pairs, spaced, strict=True):
            one, two, total = (self.cut(str(number)) for number in (first, second, first + second))
            parts = [one, *(self.after_blank(part, blank) for part in (["+"], two, ["="], total))]
            question = [BOS_ID, *self.vocabulary.encode(itertools.chain(*parts[:-1]))]
            answer = [*self.vocabulary.encode(parts[-1]), EOS_ID]
            rows.append(torch.tensor([*question, *answer[:-1]]))
            targets.append(torch.tensor([IGNORE] * (len(question) - 1) + answer))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, True, PAD_ID), pad(targets, True, IGNORE)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = random.Random(seed)
        while True:
            pairs = random_sums(self.spans, rng, batch_size)
            yield self.batch(pairs, [rng.random() < self.spaced for _ in pairs])


@torch.no_grad()
def sums_right(model: nn.Module, task: SumTask, n_sums: int, spaced: bool = False) -> float:
    """Share of held-out sums whose greedy answer is right in every token (fraction 0..1)."""
    pairs = random_sums(task.spans, random.Random(1), n_sums, "validation")
    inputs, targets = task.batch(pairs, [spaced] * n_sums)  # (batch, seq)
    guesses = model(inputs.to(next(model.parameters()).device)).argmax(-1).cpu()  # (batch, seq)
    return ((guesses == targets) | (targets == IGNORE)).all(dim=1).double().mean().item()


def train_on_sums(task: SumTask, gflops: float, run: RunConfig, batch_size: int = 32) -> CausalTransformer:
    torch.manual_seed(run.seed)
    model = CausalTransformer(MODEL, len(task.vocabulary))
    start_as_identity(model)
    seq_len = next(task.batches(batch_size, run.seed))[0].shape[1]
    n_steps = max(
        2, round(gflops * 1e9 / 3 / transformer_flops(TransformerSize.of(model), batch_size, seq_len)["total"])
    )
    config = TrainConfig(max_steps=n_steps, warmup_steps=min(50, n_steps // 4))
    fit(model.to(pick_device(run.device)), task.batches(batch_size, run.seed), config)
    return model


SPANS: Spans = ((100, 989), (1, 9))  # so that every first operand and every answer has three digits
SPACED = 0.05  # of the training sums are written with blanks, where blanks are the question


def numbers(config: FiguresConfig, run: RunConfig) -> None:
    """How numbers are cut against the share of held-out sums that are right; then what a blank before one costs.

    Predicted after trials of digits and whole numbers with seed 0, before all else: digits above 95 %, whole numbers
    below 5 %; two digits from the left ahead of the right, since the digit that changes then stands alone; learnt
    chunks behind both. A blank glued to a digit costs at least 20 points, a blank of its own less than 5.
    """
    cuts: dict[str, Callable[[int], Cut]] = {
        "single digits": lambda _: list,
        "two digits, from the right": lambda _: from_the_right,
        "two digits, from the left": lambda _: from_the_left,
        "chunks learnt by BPE": lambda seed: in_learnt_chunks(SPANS, 60, seed),
        "whole numbers": lambda _: lambda number: [number],
    }
    rows, n_sums = [], 8 * config.n_held_out
    for name, cut_for in progress(cuts.items(), "sums"):
        right, sizes = [], []
        for seed in range(config.n_seeds):
            task = SumTask.build(cut_for(seed), SPANS)
            right.append(sums_right(train_on_sums(task, config.sum_gflops, seeded_run(run, seed)), task, n_sums))
            sizes.append(float(len(task.vocabulary)))
        n_tokens = 2 + sum(len(task.cut(number)) for number in ("457", "6", "463"))
        rows.append([name, statistics.mean(sizes), n_tokens, right])
    columns = [Column("Numbers as"), Column("vocabulary", "", ".0f"), Column("tokens of 457+6=463", "", "d")]
    columns += [Column("held-out sums right", "", ".1%")]
    carry = ["columns added without a carry", "-", "-", share_without_carry(SPANS)]
    config.save("numbers", columns, [*rows, carry], "numbers")
    save_figure(plot_numbers([(row[0], row[-1]) for row in rows]), config.folder / "numbers.svg")
    rows = []
    for name, glued in (("part of the number, as in GPT-2", True), ("a token of its own", False)):
        tight, spaced = [], []
        for seed in range(config.n_seeds):
            task = SumTask.build(list, SPANS, SPACED, glued)
            model = train_on_sums(task, config.sum_gflops, seeded_run(run, seed))
            tight.append(sums_right(model, task, n_sums))
            spaced.append(sums_right(model, task, n_sums, spaced=True))
        rows.append([name, float(len(task.vocabulary)), tight, spaced])
    columns = [Column("The blank in 457 + 6 = 463"), Column("vocabulary", "", ".0f")]
    columns += [Column("right without blanks", "", ".1%"), Column("right with blanks", "", ".1%")]
    config.save("spaces", columns, rows, "numbers")


def plot_numbers(rows: list[tuple[str, list[float]]]) -> Figure:
    """Share of held-out sums that are right for each way to cut numbers, one dot for each seed."""
    figure, axis = plt.subplots(figsize=(6.4, 2.6))
    for place, (_, values) in enumerate(rows):
        axis.barh(place, statistics.mean(values), 0.6, color=f"C{place}", alpha=0.5)
        axis.plot(values, [place] * len(values), "k.", ms=5)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set(xlabel="share of held-out sums that are right", xlim=(0, 1.02))
    return figure


# Experiments: tokens that no training text holds


class Suspicion(NamedTuple):
    """How suspicious each token is by one measure (larger: more), and how often training really showed it."""

    scores: list[float]
    counts: list[int]

    def n_rarer(self, limit: int) -> int:
        """How many tokens training showed less than `limit` times."""
        return sum(count < limit for count in self.counts)

    def precision(self, limit: int = 1) -> float:
        """Name as many tokens as were shown less than `limit` times: the share that really is; also the recall."""
        ranked = sorted(zip(self.scores, self.counts, strict=True), key=lambda pair: -pair[0])
        n_named = self.n_rarer(limit)
        return sum(count < limit for _, count in ranked[:n_named]) / max(1, n_named)


def count_inputs(model: CausalTransformer, counts: Tensor) -> None:
    """Let `counts` grow by every token id that the model reads from now on.

    Shapes:
        counts: (vocab), integers
    """

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        counts.add_(torch.bincount(inputs[0].flatten().cpu(), minlength=len(counts)))

    model.token_emb.register_forward_pre_hook(count)


@torch.no_grad()
def suspicions(model: CausalTransformer, reference: list[int]) -> dict[str, Tensor]:
    """Signs that a token was never trained on, larger where it is more likely (Land and Bartolo 2024, section 3).

    `reference` are ids known to be unused, such as reserved tokens and bytes that UTF-8 never holds: the output vectors
    of all unseen tokens are pushed the same way, so the cosine with the mean of the reference gives them away.

    Shapes:
        each (vocab)
    """
    inputs, outputs = model.token_emb.weight, model.lm_head.weight  # (vocab, d_model)
    outputs = outputs - outputs.mean(0)  # (vocab, d_model)
    direction = outputs[reference].mean(0, keepdim=True)  # (1, d_model)
    return {
        "small input norm": -inputs.norm(dim=1),
        "input norm near the initial": -(inputs.norm(dim=1) - inputs[reference].norm(dim=1).mean()).abs(),
        "output like the unused": F.cosine_similarity(outputs, direction),
    }


def decay_without_gradient(config: TrainConfig) -> float:
    """What AdamW multiplies a weight by that never receives a gradient: the product of 1 - rate * decay over all steps.

    Its running means stay 0, so the decay is all that is left of the step (Loshchilov and Hutter 2017, algorithm 2).
    """
    return math.prod(1 - learning_rate_at(step, config) * config.weight_decay for step in range(config.max_steps))


def small_embeddings(model: CausalTransformer, std: float = 0.02) -> None:
    """Start the blocks as the identity and the embeddings small."""
    start_as_identity(model)
    nn.init.normal_(model.token_emb.weight, std=std)


def glitch(config: FiguresConfig, run: RunConfig) -> None:
    """A tokenizer that saw code, a model that did not: which tokens were never trained, told from the weights alone."""
    prose, _ = python_corpus(config.n_bytes, config.n_held_out)
    code, _ = python_corpus(config.n_bytes, config.n_held_out, ("functions",))
    tokenizer = ByteLevelBPE.train(prose + code, 4096, SPECIAL_TOKENS)
    vocab_size = len(tokenizer.vocab)
    strange = [tokenizer.byte_ids[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]  # in no UTF-8 text
    reference = [*range(3, len(SPECIAL_TOKENS)), *strange]
    judged = [index for index in range(len(SPECIAL_TOKENS), vocab_size) if tokenizer.token_bytes(index).isascii()]
    starts = {"start at 0.02": (small_embeddings, 0.02), "start at 1": (start_as_identity, 1.0)}
    rows, facts, shown = [], {"tokens judged: ASCII, not special": [], "never seen": [], "seen 1 to 4 times": []}, {}
    for start, (begin, std) in starts.items():
        cells: dict[str, list[list[float]]] = {}
        for seed in range(config.n_seeds):
            counts = torch.zeros(vocab_size, dtype=torch.long)

            def prepare(model: CausalTransformer, begin=begin, counts=counts) -> None:
                begin(model)
                count_inputs(model, counts)

            gflops = config.text_gflops / 2
            model, losses = train_on_texts(vocab_size, prose, tokenizer.encode, gflops, seeded_run(run, seed), prepare)
            derived = std * MODEL.d_model**0.5 * decay_without_gradient(train_config(1, len(losses)))
            unseen = model.token_emb.weight[torch.tensor(reference)].detach()
            measured = unseen.norm(dim=1).square().mean().sqrt().item()
            facts.setdefault(f"norm of an unseen input vector / derived, {start}", []).append(measured / derived)
            for name, scores in suspicions(model, reference).items():
                one = Suspicion(scores[judged].tolist(), counts[judged].tolist())
                for cell, limit in zip(cells.setdefault(name, [[], []]), (1, 5), strict=True):
                    cell.append(one.precision(limit))
                shown |= {(start, name): one} if seed == 0 else {}
            if std == 1:
                for cell, number in zip(facts.values(), (len(judged), one.n_rarer(1), one.n_rarer(5)), strict=False):
                    cell.append(float(number))
        rows += [[f"{start}: {name}", *found] for name, found in cells.items()]
    facts["seen 1 to 4 times"] = [few - n for few, n in zip(*list(facts.values())[2:0:-1], strict=True)]
    chance = [[one.n_rarer(limit) / len(judged)] for limit in (1, 5)]
    columns = [Column("Embeddings and sign"), Column("found among never seen", "", ".0%")]
    columns += [Column("found among those seen less than 5 times", "", ".0%")]
    config.save("glitch", columns, [*rows, ["chance", *(cell[0] for cell in chance)]], "glitch")
    columns = [Column("Tokens and their vectors"), Column("number", "", ",.4g")]
    config.save("glitch-counts", columns, [[name, numbers] for name, numbers in facts.items()], "glitch")
    chosen = {key: one for key, one in shown.items() if key[1] != "input norm near the initial"}
    save_figure(plot_glitch(chosen), config.folder / "glitch.svg")


def plot_glitch(panels: dict[tuple[str, str], Suspicion]) -> Figure:
    """For each sign: its value against how often training showed the token."""
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(6.8, 5.4), squeeze=False)
    for axis, ((start, sign), one) in zip(axes.flat, panels.items(), strict=False):
        for unseen, color, marker in ((False, "C0", "."), (True, "C1", "x")):
            pairs = [(max(count, 0.5), score) for score, count in zip(*one, strict=True) if (count == 0) == unseen]
            columns = zip(*pairs[:: 1 + len(pairs) // 120], strict=True) if pairs else ([], [])
            axis.plot(*columns, marker, color=color, ms=4, label="never seen" if unseen else "seen")
        axis.set(xscale="log", xlabel="times seen in training (0 drawn at 0.5)", ylabel=sign)
        axis.set_title(f"embeddings {start}", fontsize=9)
    axes.flat[0].legend(frameon=False, fontsize=8)
    return figure


# Experiments: sampled segmentations


def with_typos(text: str, share: float, rng: random.Random) -> str:
    """Swap two neighbouring letters in a share of the words of four letters or more."""

    def spoil(match: re.Match) -> str:
        word = match.group()
        if rng.random() >= share:
            return word
        at = rng.randrange(1, len(word) - 2) if len(word) > 4 else 1
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"[A-Za-z]{4,}", spoil, text)


def sampling(config: FiguresConfig, run: RunConfig) -> None:
    """BPE-dropout and sampled Unigram segmentations in training: held-out text, and the same text with typos."""
    train, unseen = python_corpus(config.n_bytes // 2, config.n_held_out)
    few = train[: max(1, len(train) // 8)]
    rng = random.Random(0)
    typos = [with_typos(text, 0.2, rng) for text in unseen]
    bpe = ByteLevelBPE.train(train, 1024, SPECIAL_TOKENS)
    unigram = Unigram.train(train, 1024, SPECIAL_TOKENS)

    def drop(seed: int, share: float) -> Encode:
        generator = random.Random(seed)
        return lambda text: bpe.encode_with_dropout(text, share, generator)

    def sample(seed: int, temperature: float) -> Encode:
        generator = random.Random(seed)
        return lambda text: unigram.sample(text, temperature, generator)

    ways = {
        "BPE": (bpe, lambda seed: bpe.encode),
        "BPE, dropout 0.1": (bpe, lambda seed: drop(seed, 0.1)),
        "Unigram, the likeliest": (unigram, lambda seed: unigram.encode),
        "Unigram, sampled at temperature 3": (unigram, lambda seed: sample(seed, 3.0)),
    }
    rows = []
    for name, (tokenizer, encode_for) in progress(ways.items(), "sampled segmentations"):
        clean, spoilt = [], []
        for seed in range(config.n_seeds):
            model, _ = train_on_texts(
                len(tokenizer.vocab), few, encode_for(seed), config.text_gflops / 2, seeded_run(run, seed)
            )
            clean.append(text_bits(model, tokenizer.encode, unseen))
            spoilt.append(text_bits(model, tokenizer.encode, typos))
        rows.append([name, clean, spoilt, [s - c for s, c in zip(spoilt, clean, strict=True)]])
    columns = [
        Column("Segmentation in training"),
        *(Column(name, "bits per byte", ".3f") for name in ("held-out", "typos")),
    ]
    config.save("sampling", [*columns, Column("price of typos", "bits per byte", ".3f")], rows, "sampling")


# Experiments: how embeddings start, and tying


def tied(model: CausalTransformer, std: float) -> None:
    """One matrix for input and output, started at `std`."""
    start_as_identity(model)
    model.lm_head.weight = model.token_emb.weight
    nn.init.normal_(model.token_emb.weight, std=std)


def embeddings(config: FiguresConfig, run: RunConfig) -> None:
    """The scale at which embeddings start, with and without tying: the first loss, and where training ends."""
    train, unseen, floor = world_corpus(config.n_documents, config.n_held_out)
    tokenizer = ByteLevelBPE.train(train, 2048, SPECIAL_TOKENS)
    vocab_size, rows = len(tokenizer.vocab), []
    for name, prepare in (("untied", small_embeddings), ("tied", tied)):
        for std in (0.02, MODEL.d_model**-0.5, 1.0):
            first, gap = [], []
            for seed in range(config.n_seeds):
                model, losses = train_on_texts(
                    vocab_size,
                    train,
                    tokenizer.encode,
                    config.world_gflops,
                    seeded_run(run, seed),
                    functools.partial(prepare, std=std),
                )
                first.append(losses[0])
                gap.append(text_bits(model, tokenizer.encode, unseen) - floor)
            n_parameters = sum(parameter.numel() for parameter in model.parameters())
            rows.append([name, f"{std:.2f}", n_parameters, first, gap])
    columns = [Column("Output matrix"), Column("standard deviation at the start"), Column("parameters", "", ",d")]
    columns += [
        Column("first loss", "nats per token", ".2f"),
        Column("held-out, above the floor", "bits per byte", ".3f"),
    ]
    config.save("embeddings", columns, [*rows, ["uniform guess", "-", "-", math.log(vocab_size), "-"]], "embeddings")


# Experiments: word vectors


def correlation(x: Tensor, y: Tensor, weights: Tensor) -> float:
    """Pearson's correlation of x and y, every pair counted by its weight.

    Shapes:
        x, y, weights: (pairs)
    """
    weights = weights / weights.sum()  # (pairs)
    x, y = x - (weights * x).sum(), y - (weights * y).sum()  # (pairs)
    return ((weights * x * y).sum() / ((weights * x * x).sum() * (weights * y * y).sum()).sqrt()).item()


def least_sgns_loss(counts: Tensor, n_negatives: int, power: float = 1.0) -> float:
    """What the expected loss of skip-gram cannot fall below, at any width: its value where the scores are the shifted
    PMI, nats per pair.

    Shapes:
        counts: (vocab, vocab)
    """
    scores = shifted_pmi(counts, n_negatives, power)  # (vocab, vocab)
    share = counts / counts.sum()  # (vocab, vocab)
    false = n_negatives * share.sum(1, keepdim=True) * noise_shares(counts, power)  # (vocab, vocab)
    met = counts > 0
    return -(share * F.logsigmoid(scores) + false * F.logsigmoid(-scores))[met].sum().item()


def pmi(config: FiguresConfig, run: RunConfig) -> None:
    """Skip-gram against the shifted PMI: by width, by the number of negatives, with and without sampling."""
    documents = [document.tokens for document in World().documents(config.n_documents, 0, "train")]
    counts, vocab = cooccurrences(documents, 4)
    met = counts > 0
    cases = [(width, 5, 1.0) for width in (4, 16, 64, len(vocab))] + [(64, 1, 1.0), (64, 15, 1.0), (64, 5, 0.75)]
    rows, shown = [], None
    for width, n_negatives, power in progress(cases, "skip-gram and PMI"):
        target, least = shifted_pmi(counts, n_negatives, power), least_sgns_loss(counts, n_negatives, power)
        cells: list[list[float]] = [[], [], [], []]
        for seed in range(config.n_seeds):
            generator = torch.Generator().manual_seed(seed)
            options = VectorConfig(d_model=width, max_steps=max(2, config.vector_steps // 5), learning_rate=0.1)
            found = minimise_expected_loss(counts, n_negatives, power, options, generator)
            scores = (found.words @ found.contexts.T).double()  # (vocab, vocab)
            cells[0].append(correlation(scores[met], target[met], torch.ones_like(target[met])))
            cells[1].append(correlation(scores[met], target[met], counts[met]))
            cells[2].append((scores - target)[met].abs().median().item())
            cells[3].append(found.losses[-1] - least)
            shown = (scores[met], target[met]) if (width, n_negatives) == (16, 5) and seed == 0 else shown
        rows.append([f"width {width}, k = {n_negatives}, noise to the {power:g}", *cells])
    cells = [[], [], [], []]
    target = shifted_pmi(counts, 5, 0.75)
    for seed in range(config.n_seeds):
        options = VectorConfig(d_model=64, max_steps=config.vector_steps)
        sampled = sgns_vectors(counts, options, torch.Generator().manual_seed(seed))
        scores = (sampled.words @ sampled.contexts.T).double()  # (vocab, vocab)
        values = [correlation(scores[met], target[met], w) for w in (torch.ones_like(target[met]), counts[met])]
        loss = word_vectors.expected_sgns_loss(sampled.words, sampled.contexts, counts, 5, 0.75).item()
        values += [(scores - target)[met].abs().median().item(), loss - least_sgns_loss(counts, 5, 0.75)]
        for cell, value in zip(cells, values, strict=True):
            cell.append(value)
    rows.append(["sampled as in word2vec: width 64, k = 5, noise to the 0.75", *cells])
    columns = [Column("Skip-gram"), Column("correlation, each pair once", "", ".3f"), Column("by frequency", "", ".3f")]
    columns += [Column("median error", "nats", ".2f"), Column("loss above the optimum", "nats per pair", ".4f")]
    config.save("pmi", columns, rows, "pmi")
    save_figure(plot_pmi(*shown), config.folder / "pmi.svg")


def plot_pmi(scores: Tensor, target: Tensor) -> Figure:
    """Every pair that met: the score that skip-gram of width 16 learnt against the shifted PMI."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    stride = 1 + len(scores) // 600
    axis.plot(target[::stride], scores[::stride], ".", ms=3, alpha=0.6)
    ends = [target.min().item(), target.max().item()]
    axis.plot(ends, ends, "k--", lw=1, label="equal")
    axis.set(xlabel="shifted PMI, nats", ylabel="word · context, nats")
    axis.legend(frameon=False)
    return figure


VECTOR_SETTINGS = {  # window, subsampling threshold
    "window 4": (4, None),
    "window 4, frequent words dropped": (4, 1e-3),
    "window 12": (12, None),
}


def vectors(config: FiguresConfig, run: RunConfig) -> None:
    """Neighbours and analogies of three methods, counted against what the grammar fixes."""
    world = World()
    classes: dict[tuple[str, str], list[list[float]]] = {}
    relations: dict[str, list[list[float]]] = {}
    for seed in progress(range(config.n_seeds), "word vectors"):
        documents = [document.tokens for document in world.documents(config.n_documents, seed, "train")]
        for setting, (window_size, threshold) in VECTOR_SETTINGS.items():
            kept = subsample(documents, threshold, random.Random(seed)) if threshold else documents
            counts, vocab = cooccurrences(kept, window_size)
            generator = torch.Generator().manual_seed(seed)
            options = VectorConfig(max_steps=config.vector_steps, window_size=window_size)
            exact = VectorConfig(max_steps=max(2, config.vector_steps // 5), learning_rate=0.05)
            tables = {"sgns": minimise_expected_loss(counts, 5, 0.75, exact, generator).words}
            tables |= {
                "glove": glove_vectors(counts, options, generator)[0],
                "pmi": pmi_vectors(counts, options.d_model),
            }
            for method in METHODS:
                cells = classes.setdefault((setting, method), [[], [], []])
                cells[0].append(statistics.mean(class_precision(tables[method], vocab).values()))
                cells[1].append(chance_precision(vocab))
                cells[2].append(fact_precision(tables[method], vocab, world))
            if setting == "window 4":
                for name, pairs in RELATIONS.items():
                    scores = [score_analogies(tables[method], vocab, pairs) for method in METHODS]
                    values = [
                        *(score.offset for score in scores),
                        scores[0].alone,
                        scores[0].right_kind,
                        scores[0].n_questions,
                    ]
                    for cell, value in zip(relations.setdefault(name, [[] for _ in values]), values, strict=True):
                        cell.append(value)
                if seed == 0:
                    shown = ("women", "men", "surnames", "towns", "jobs", "foods", "places", "colours")
                    save_figure(plot_vectors(tables["sgns"], vocab, shown), config.folder / "pca.svg")
    rows = [[setting, method, *cells] for (setting, method), cells in classes.items()]
    columns = [
        Column("Setting"),
        Column("method"),
        Column("neighbours of the same class", "", ".2f"),
        Column("chance", "", ".2f"),
    ]
    columns += [Column("town of name + surname; chance 0.04", "", ".2f")]
    config.save("vectors", columns, rows, "vectors")
    columns = [Column("a : b = c : ?"), *(Column(f"offset, {method}", "", ".2f") for method in METHODS)]
    columns += [
        Column("b or c alone, sgns", "", ".2f"),
        Column("right kind, sgns", "", ".2f"),
        Column("questions", "", ".0f"),
    ]
    config.save("analogies", columns, [[name, *cells] for name, cells in relations.items()], "vectors")


# Experiments: the failures


def breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Each failure that --break switches on, on a sample of the texts for each seed; and what a model pays for one.

    Predicted before the first run: a text whose tokens come in another order than training's costs a model more than a
    tenth of a bit per byte.
    """
    train, unseen = python_corpus(config.n_bytes, config.n_held_out)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in progress(range(config.n_seeds), "failures"):
        texts = random.Random(seed).sample(train, (len(train) + 1) // 2)
        rows = [(name, *row) for name, trap in TRAPS.items() for row in trap(texts, unseen, 1024)]
        tokenizer = ByteLevelBPE.train(texts, 1024, SPECIAL_TOKENS)
        model, _ = train_on_texts(
            len(tokenizer.vocab), texts, tokenizer.encode, config.text_gflops / 4, seeded_run(run, seed)
        )
        bits = [text_bits(model, encode, unseen) for encode in (tokenizer.encode, disordered(tokenizer))]
        for name, measured, *both in [*rows, ("text-order", "held-out text (bits per byte)", *bits)]:
            for cell, value in zip(found.setdefault((name, measured), [[], []]), both, strict=True):
                cell.append(float(value))
    rows = []
    for name in TRAPS:
        for (trap, measured), cells in found.items():
            if trap == name:  # a value that never varies has no spread to report
                rows.append([f"`{name}`", measured, *(cell[0] if len({*cell}) == 1 else cell for cell in cells)])
    columns = [Column("`--break`"), Column("measured", digits="s"), Column("as it should be", "", ".3g")]
    config.save("breaks", [*columns, Column("with the failure", "", ".3g")], rows, "breaks")


def disordered(tokenizer: ByteLevelBPE) -> Encode:
    """The tokenizer with its merges applied in the order of the text."""
    return lambda text: [
        token_id for word in cut_words(tokenizer.pattern, text) for token_id in in_text_order(tokenizer, word.encode())
    ]


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], int]] = {  # name -> function, seconds
    "sizes": (sizes, 240),
    "kinds": (kinds, 40),
    "speed": (speed, 60),
    "numbers": (numbers, 420),
    "glitch": (glitch, 50),
    "sampling": (sampling, 70),
    "embeddings": (embeddings, 50),
    "pmi": (pmi, 50),
    "vectors": (vectors, 90),
    "breaks": (breaks, 40),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
