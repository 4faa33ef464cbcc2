"""Topic 10 - Corpus experiments: what cleaning is worth to the model that is trained on what remains.

Each is an entry of CORPUS_EXPERIMENTS, name -> (function(config, run), seconds), for the chapter's verb `figures`:

    stages, filters, junk      # precision and recall of the stages; the model without each of them; more and more dirt
    curve, canaries            # the S-curve measured; secrets against how often they occur
    leaks, masks, fim          # evaluation documents in training; document masks; filling in the middle

Lee et al. 2022 (arXiv 2107.06499), duplicates and memorising; Carlini et al. 2019 (arXiv 1802.08232), exposure;
Bavarian et al. 2022 (arXiv 2207.14255), filling in for free.
"""

import functools
import itertools
import math
import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from corpus_pipeline import STAGES, CorpusConfig, Pipeline, clean_pages, scores
from deduplication import MinHashConfig, MinHasher, collision_probability, jaccard, plot_s_curve, shingles
from dirty_corpus import LEAKS, DirtConfig, Page, dirty_corpus, edited, evaluation_documents, world_page
from packing import Batch, PackedBatches, PackedTransformer, language_model_loss
from pretraining_objectives import fim_document
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, UNK_ID, Vocabulary, device_of, document_losses, gap_to_floor
from tiny_world import Document, World, canary_text, random_canaries, words
from training_transformers import TrainConfig, fit
from transformer_architecture import ModelConfig, held_out_documents, start_as_identity
from workbench import Column, RunConfig, check_range, pick_device, progress, save_figure, save_results, seed_everything

MODEL = ModelConfig(max_seq_len=512, d_model=48, d_ff=192)  # 100,800 weights with the vocabulary below


@dataclass(frozen=True)
class CorpusFiguresConfig:
    """The sizes of the corpus experiments."""

    n_seeds: int = 3  # corpora and models of every condition that is compared
    n_pages: int = 400  # good pages of a crawl
    n_steps: int = 120  # optimizer steps of every model: the same compute, whatever it reads
    n_documents: int = 200  # held-out documents to examine each model with
    n_pairs: int = 400  # pairs of pages for the S-curve
    folder: Path = Path(__file__).parent / "figures"  # where figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", least=1)
        check_range(self, "n_pages", least=70)
        check_range(self, "n_steps", "n_pairs", least=10)
        check_range(self, "n_documents", least=2)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        command = f"python 10-pretraining-llms/pretraining_llms.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds or self.n_seeds), command)


# A small model of a corpus, and its distance to the floor of TinyWorld


FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
LETTERS = (
    *string.printable.strip(),
    *"\u00e0\u00e2\u00e4\u00e7\u00e8\u00e9\u00ea\u00ee\u00f4\u00f6\u00f9\u00fb\u00fc\u00df",
)


@functools.cache
def vocabulary() -> Vocabulary:
    """TinyWorld's words, and letters and signs for everything else: small, and the floor stays exact.

    A page that is not TinyWorld's costs a token for every letter, as foreign text costs every tokenizer.
    """
    world = World().vocabulary()
    return Vocabulary([*world, *FIM_TOKENS, *(letter for letter in LETTERS if letter not in world)])


def fim_ids() -> tuple[int, int, int]:
    return tuple(vocabulary().encode(FIM_TOKENS))


@functools.lru_cache(maxsize=200_000)
def paragraph_ids(paragraph: str) -> tuple[int, ...]:
    """<bos>, the words or letters of a text, <eos>. No text can spell a special token."""
    ids = vocabulary().ids
    spelled = ([ids[w]] if w in ids and w[0] != "<" else [ids.get(c, UNK_ID) for c in w] for w in words(paragraph))
    return (BOS_ID, *itertools.chain.from_iterable(spelled), EOS_ID)


def documents_of(texts: Iterable[str]) -> list[list[int]]:
    """Every paragraph of every page as a document of its own."""
    return [list(paragraph_ids(part)) for text in texts for part in text.split("\n\n") if part.strip()]


class Unmasked:
    """Packed batches without the numbers of the documents: every position sees all of its row before it."""

    def __init__(self, batches: PackedBatches) -> None:
        self.batches = batches

    def __call__(self, step: int) -> Batch:
        return {name: tensor for name, tensor in self.batches(step).items() if name != "document_ids"}


def train_on(
    documents: list[list[int]], seed: int, config: CorpusFiguresConfig, run: RunConfig, masked: bool = True
) -> PackedTransformer:
    """The small model after `n_steps` steps of 8 rows of 96 tokens."""
    seed_everything(seed)
    model = PackedTransformer(MODEL, len(vocabulary()))
    start_as_identity(model)
    settings = TrainConfig(
        batch_size=8, seq_len=96, max_steps=config.n_steps, warmup_steps=min(25, config.n_steps // 4)
    )
    batches = PackedBatches(documents, settings.batch_size, settings.seq_len, seed)
    fit(model.to(pick_device(run.device)), batches if masked else Unmasked(batches), language_model_loss, settings)
    return model.eval()


def gap_on(model: nn.Module, documents: Sequence[Document]) -> float:
    """Nats per token of TinyWorld above the documents' own surprisal."""
    return gap_to_floor(document_losses(model, documents, vocabulary()), documents)[0]


@functools.cache
def crawl(dirt: DirtConfig, seed: int) -> tuple[Page, ...]:
    return tuple(dirty_corpus(dirt, seed))


@functools.cache
def cleaned(dirt: DirtConfig, seed: int, skip: str = "") -> tuple[tuple[str, ...], Pipeline]:
    records, pipeline = clean_pages(crawl(dirt, seed), CorpusConfig(n_pages=dirt.n_pages, skip=skip))
    return tuple(record.text for record in records), pipeline


def raw(dirt: DirtConfig, seed: int) -> tuple[str, ...]:
    return tuple(page.text for page in crawl(dirt, seed))


# (a) The stages against the planted truth


def stages(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """Precision and recall of every stage, and how much of the crawl goes."""
    dirt = usual(config)
    found = [scores(crawl(dirt, seed), cleaned(dirt, seed)[1]) for seed in range(config.n_seeds)]
    reports = [cleaned(dirt, seed)[1].report for seed in range(config.n_seeds)]
    rows = []
    for name in STAGES:
        taken = [report[name].pages_in - report[name].pages_out for report in reports]
        rows.append(
            [
                name,
                [float(report[name].pages_in) for report in reports],
                [float(n) for n in taken],
                [score[name]["precision"] for score in found],
                [score[name]["recall"] for score in found],
                [float(score[name]["lost"]) for score in found],
            ]
        )
    columns = [Column("stage", digits="s"), Column("pages in", "", ".0f"), Column("removed", "", ".0f")]
    columns += [Column("precision", "", ".3f"), Column("recall", "", ".3f"), Column("good pages lost", "", ".1f")]
    config.save("corpus-stages", columns, rows, "stages")
    near_recall(config, dirt)


def near_recall(config: CorpusFiguresConfig, dirt: DirtConfig) -> None:
    """What the recall of near-duplicates and of leaks hides: it depends on how much was changed."""
    rows = []
    kinds = {"near": None, "leaked": None}
    for label in kinds:
        for detail in sorted({page.detail for page in crawl(dirt, 0) if page.label == label}, key=edit_order):
            shares, similarity = [], []
            for seed in range(config.n_seeds):
                verdicts = cleaned(dirt, seed)[1].verdicts
                chosen = [(n, p) for n, p in enumerate(crawl(dirt, seed)) if (p.label, p.detail) == (label, detail)]
                shares.append(sum(n in verdicts for n, _ in chosen) / len(chosen))
                if label == "near":
                    pairs = [jaccard(shingles(p.text), shingles(p.original)) for _, p in chosen]
                    similarity.append(float(np.mean(pairs)))
            rows.append([f"{label}: {detail}", similarity or "-", shares])
    columns = [Column("planted", digits="s"), Column("similarity to the original", "", ".2f")]
    columns.append(Column("removed by any stage", "", ".1%"))
    config.save("corpus-recall", columns, rows, "stages")


def edit_order(detail: str) -> tuple[float, str]:
    return (float(detail.split("%")[0]) if "%" in detail else 100.0, detail)


# The S-curve


def curve(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """Pairs of pages of every similarity: how often they are compared, and how far the estimate is from the truth.

    Predicted: within two standard errors of the S-curve everywhere; the estimates' standardised errors have variance 1.
    """
    rng, settings = random.Random(run.seed), MinHashConfig()
    documents = World().stream(700 + run.seed)
    hashers = [MinHasher(replace(settings, seed=seed)) for seed in range(5)]
    groups: dict[int, list[tuple[float, float, float]]] = {}
    for turn in progress(range(config.n_pairs), "pairs"):
        first = world_page(documents, rng)
        second = edited(first, 0.25 * (turn % 20 + rng.random()) / 20, rng)
        similarity = jaccard(shingles(first), shingles(second))
        for hasher in hashers:
            one, two = hasher(first), hasher(second)
            met = any(a == b for a, b in zip(hasher.bands(one), hasher.bands(two), strict=True))
            spread = math.sqrt(similarity * (1 - similarity) / settings.n_hashes)
            error = ((one == two).mean() - similarity) / spread if spread else 0.0
            groups.setdefault(min(9, int(10 * similarity)), []).append((similarity, met, float(error)))
    rows, measured = [], []
    for tenth, found in sorted(groups.items()):
        similarity, met, error = (np.array(column, dtype=float) for column in zip(*found, strict=True))
        expected = [collision_probability(s, settings.n_bands, settings.n_rows) for s in similarity]
        measured.append((float(similarity.mean()), float(met.mean())))
        label = f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"
        rows.append([label, len(found), float(met.mean()), float(np.mean(expected)), error.mean(), error.std(ddof=1)])
    columns = [Column("similarity", digits="s"), Column("pairs x hashers", "", ".0f")]
    columns += [Column("met in a band", "", ".3f"), Column("the S-curve", "", ".3f")]
    columns += [Column("mean error of the estimate", "standard deviations", "+.2f")]
    columns += [Column("spread of the errors", "standard deviations", ".2f")]
    config.save("s-curve", columns, rows, "curve", n_seeds=1)
    save_figure(plot_s_curve(settings, measured), config.folder / "s_curve.svg")


# (b) What each stage is worth to the model


LEFT_OUT = {  # condition -> stages that are skipped
    "all stages": "",
    "without language": "language",
    "without rules": "rules",
    "without quality": "quality",
    "without deduplication": "exact,near",
    "raw": ",".join(STAGES),
}
MUCH = 3.0  # bad pages as a multiple of the usual number, where the stages are compared


def usual(config: CorpusFiguresConfig, factor: float = 1.0) -> DirtConfig:
    return DirtConfig(config.n_pages, n_leaks=config.n_pages // 10).scaled(factor)


def texts_of(name: str, dirt: DirtConfig, seed: int) -> tuple[str, ...]:
    return raw(dirt, seed) if name == "raw" else cleaned(dirt, seed, LEFT_OUT[name])[0]


def filters(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """The gap on clean held-out documents, at equal compute, when each stage is left out.

    Predicted: raw loses at least 0.1 nats against all stages. Leaving out the quality stage costs most of the single
    stages, since salad spoils the very words that are examined; French and German cost about as much as their share of
    the tokens; deduplication makes no difference that three seeds can show, for few copies are read few times.
    """
    dirt, rows = usual(config, MUCH), []
    gaps: dict[str, list[float]] = {}
    for name in progress(LEFT_OUT, "stages left out"):
        texts = [texts_of(name, dirt, seed) for seed in range(config.n_seeds)]
        gaps[name] = [filter_gap(name, dirt, seed, config, run) for seed in range(config.n_seeds)]
        words = [float(sum(len(text.split()) for text in found)) / 1000 for found in texts]
        differences = [gap - other for gap, other in zip(gaps[name], gaps["all stages"], strict=True)]
        rows.append([name, words, gaps[name], differences])
    columns = [Column("corpus", digits="s"), Column("words", "thousand", ".0f")]
    columns += [Column("gap to the floor", "nats per token", ".3f"), Column("more than all stages", "nats", "+.3f")]
    config.save("corpus-filters", columns, rows, "filters")


@functools.cache
def filter_gap(name: str, dirt: DirtConfig, seed: int, config: CorpusFiguresConfig, run: RunConfig) -> float:
    model = train_on(documents_of(texts_of(name, dirt, seed)), seed, config, run)
    return gap_on(model, held_out_documents(config.n_documents))


DIRT = (0.0, 1.0, MUCH)  # bad pages as a multiple of the usual number


def junk(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """The gap against the share of the words that are bad, raw and cleaned, at equal compute.

    Predicted: raw grows with the share, faster and faster; cleaned stays within 0.03 nats of the corpus without dirt.
    """
    rows, points = [], []
    for factor in progress(DIRT, "dirt"):
        dirt = usual(config, factor)
        pages = [crawl(dirt, seed) for seed in range(config.n_seeds)]
        shares = [bad_share(found) for found in pages]
        gaps = {
            name: [filter_gap(name, dirt, seed, config, run) for seed in range(config.n_seeds)]
            for name in ("raw", "all stages")
        }
        rows.append([f"{factor:g}", shares, *gaps.values()])
        points.append((float(np.mean(shares)), *gaps.values()))
    columns = [Column("bad pages, times the usual", digits="s"), Column("bad words", "", ".1%")]
    columns += [Column("gap, raw", "nats per token", ".3f"), Column("gap, all stages", "nats per token", ".3f")]
    config.save("corpus-junk", columns, rows, "junk")
    save_figure(plot_junk(points), config.folder / "corpus_junk.svg")


def bad_share(pages: Sequence[Page]) -> float:
    bad = ("exact", "near", "junk", "salad", "foreign")
    return sum(len(page.text.split()) for page in pages if page.label in bad) / sum(len(p.text.split()) for p in pages)


def plot_junk(points: list[tuple[float, list[float], list[float]]]) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for column, label in ((1, "raw"), (2, "all stages")):
        means = [np.mean(point[column]) for point in points]
        spreads = [np.std(point[column], ddof=1) if len(point[column]) > 1 else 0 for point in points]
        axis.errorbar([point[0] for point in points], means, spreads, marker="o", capsize=3, label=label)
    axis.set(xlabel="bad words, as a share of the crawl", ylabel="gap to the floor (nats per token)")
    axis.legend(frameon=False)
    return figure


# (c) Secrets, and how often they occur


COUNTS = (1, 2, 4, 8, 16, 32, 64)
N_CANDIDATES = 10_000


@torch.no_grad()
def canary_ranks(model: nn.Module, canaries: Sequence[str]) -> list[int]:
    """The place of each canary among all 10,000 by probability, 1 is the likeliest.

    p(d1 d2 d3 d4 | prefix) is a product of four, and the first three digits decide all contexts: 1,000 rows suffice.
    """
    columns = torch.tensor(vocabulary().encode("0123456789"))
    prefix = paragraph_ids(canary_text("The secret number is"))[:-1]
    thousand = list(itertools.product(range(10), repeat=3))
    rows = torch.tensor([[*prefix, *(int(columns[digit]) for digit in digits)] for digits in thousand])  # (rows, seq)
    parts = rows.to(device_of(model)).split(250)
    logits = torch.cat([model(part)[:, -4:].cpu()[..., columns] for part in parts])  # (rows, 4, digits)
    logs = F.log_softmax(logits.double(), dim=-1)  # (rows, 4, digits)
    known = sum(logs[torch.arange(1000), place, torch.tensor(thousand)[:, place]] for place in range(3))  # (rows)
    scores = (known[:, None] + logs[:, 3]).flatten()  # (candidates)
    ranks = []
    for canary in canaries:
        number = int("".join(c for c in canary if c.isdigit()))
        ranks.append(1 + int((scores > scores[number]).sum()))
    return ranks


def canaries(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """Exposure log2(10,000) - log2(rank) of secrets that occur 1 to 64 times, before and after deduplication.

    Predicted: near 13.3 bits, which is all, from 16 occurrences on; 1 to 2 bits, as for a secret that was never seen,
    after deduplication of copied pages; unchanged by deduplication where every occurrence is on a page of its own.
    """
    conditions = {
        "copied pages": (True, False),
        "copied pages, deduplicated": (True, True),
        "different pages": (False, True),
    }
    exposures: dict[str, list[list[float]]] = {name: [] for name in conditions}
    for name, (copied, clean) in progress(conditions.items(), "canaries"):
        for seed in range(config.n_seeds):
            chosen = random_canaries(len(COUNTS), seed)
            planted = tuple(zip(chosen, COUNTS, strict=True))
            dirt = replace(clean_world(config.n_pages // 2), canaries=planted)
            dirt = replace(dirt, copied_canaries=copied)
            texts = cleaned(dirt, seed, "language,rules,quality,decontaminate")[0] if clean else raw(dirt, seed)
            ranks = canary_ranks(train_on(documents_of(texts), seed, config, run), chosen)
            exposures[name].append([math.log2(N_CANDIDATES / rank) for rank in ranks])
    rows = [
        [f"{count}", *([found[place] for found in exposures[name]] for name in conditions)]
        for place, count in enumerate(COUNTS)
    ]
    columns = [Column("occurrences", digits="s"), *(Column(name, "bits", ".1f") for name in conditions)]
    config.save("canaries", columns, rows, "canaries")
    save_figure(plot_canaries(exposures), config.folder / "canaries.svg")


def plot_canaries(exposures: dict[str, list[list[float]]]) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for name, found in exposures.items():
        axis.plot(COUNTS, np.mean(found, axis=0), marker="o", label=name)
    axis.axhline(math.log2(N_CANDIDATES), color="black", lw=1, ls="--", label="the likeliest of all 10,000")
    axis.axhline(math.log2(math.e), color="grey", lw=1, ls=":", label="mean of a secret never seen")
    axis.set(xscale="log", xlabel="occurrences in the corpus", ylabel="exposure (bits)")
    axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return figure


# (d) Evaluation documents in the training text


N_LEAKS, LEAK_COPIES = 24, 12


def leaks(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """The gap on leaked evaluation documents and on others of the same kinds, with and without decontamination.

    Predicted: documents that leaked as they are end below the floor, by 0.2 nats or more; in capitals or in other words
    they help less, but stay above it; after decontamination only the paraphrases differ from those that never leaked.
    """
    documents, names = evaluation_documents(3 * N_LEAKS), tuple(LEAKS)
    groups = {name: documents[:N_LEAKS][place :: len(names)] for place, name in enumerate(names)}
    groups["not leaked"] = documents[N_LEAKS:]
    dirt = replace(clean_world(config.n_pages // 2), n_leaks=N_LEAKS, leak_copies=LEAK_COPIES)
    gaps: dict[str, dict[str, list[float]]] = {}
    for condition in progress(("contaminated", "decontaminated"), "leaks"):
        gaps[condition] = {name: [] for name in groups}
        for seed in range(config.n_seeds):
            clean = condition == "decontaminated"
            texts = cleaned(dirt, seed, "language,rules,quality,exact,near")[0] if clean else raw(dirt, seed)
            model = train_on(documents_of(texts), seed, config, run)
            for name, found in groups.items():
                gaps[condition][name].append(gap_on(model, found))
    rows = [[name, len(groups[name]), *(gaps[condition][name] for condition in gaps)] for name in groups]
    columns = [Column("evaluation documents", digits="s"), Column("documents", "", ".0f")]
    columns += [Column(f"gap, {condition}", "nats per token", "+.3f") for condition in gaps]
    config.save("leaks", columns, rows, "leaks")


# (e) Document masks, (f) filling in the middle


def masks(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """Rows of several documents with and without a mask between them.

    Predicted: the mask gains less than 0.02 nats: other documents say nothing about this one, and the model learns soon
    not to look across <|endoftext|>.
    """
    rows = []
    for name, masked in progress({"with document masks": True, "without": False}.items(), "masks"):
        gaps = []
        for seed in range(config.n_seeds):
            gaps.append(gap_on(clean_model(0.0, masked, seed, config, run), held_out_documents(config.n_documents)))
        rows.append([name, gaps])
    columns = [Column("packed rows", digits="s"), Column("gap to the floor", "nats per token", ".3f")]
    config.save("document-masks", columns, rows, "masks")


def clean_world(n_pages: int) -> DirtConfig:
    """Good pages of TinyWorld alone."""
    return DirtConfig(n_pages, python_share=0.0, damaged_share=0.0, private_share=0.0, n_leaks=0).scaled(0.0)


@functools.cache
def clean_model(
    fim_rate: float, masked: bool, seed: int, config: CorpusFiguresConfig, run: RunConfig
) -> PackedTransformer:
    """The small model of clean documents, a share of them cut and swapped for filling in."""
    rng = random.Random(seed)
    documents = documents_of(raw(clean_world(config.n_pages), seed))
    documents = [fim_document(ids, fim_ids(), rng, fim_rate) for ids in documents]
    return train_on(documents, seed, config, run, masked)


FIM_RATES = (0.0, 0.5, 0.9)


def fim(config: CorpusFiguresConfig, run: RunConfig) -> None:
    """What filling in costs from left to right: the gap of models with no, half and most documents cut and swapped.

    Predicted: half costs less than 0.05 nats ("for free", as Bavarian et al. found with much longer training), nine
    tenths at least 0.1; the middle, asked for after its suffix, costs a model without filling in over a nat more.
    """
    rows = []
    held = held_out_documents(config.n_documents)
    for rate in progress(FIM_RATES, "filling in"):
        gaps, middles = [], []
        for seed in range(config.n_seeds):
            model = clean_model(rate, True, seed, config, run)
            gaps.append(gap_on(model, held))
            middles.append(middle_loss(model, held))
        rows.append([f"{rate:.0%}", gaps, middles])
    columns = [Column("documents for filling in", digits="s"), Column("gap, left to right", "nats per token", ".3f")]
    columns.append(Column("loss of the middle", "nats per token", ".2f"))
    config.save("fim", columns, rows, "fim")


@torch.no_grad()
def middle_loss(model: nn.Module, documents: Sequence[Document]) -> float:
    """Nats per token of the middles, given what stands before and after them; the cuts are the same for every model."""
    rng, total, count = random.Random(0), 0.0, 0
    for document in documents:
        ids = fim_document([BOS_ID, *vocabulary().encode(document.tokens)], fim_ids(), rng, 1.0)
        start = ids.index(fim_ids()[2])
        logits = model(torch.tensor([ids[:-1]], device=device_of(model))).cpu()  # (1, seq, vocab)
        targets = torch.tensor([ids[1:]])  # (1, seq)
        targets[:, :start] = IGNORE
        total += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
        count += int((targets != IGNORE).sum())
    return total / count


CORPUS_EXPERIMENTS: dict[str, tuple[Callable[[CorpusFiguresConfig, RunConfig], None], int]] = {  # name -> fn, seconds
    "stages": (stages, 60),
    "curve": (curve, 10),
    "filters": (filters, 330),
    "junk": (junk, 240),
    "canaries": (canaries, 120),
    "leaks": (leaks, 80),
    "masks": (masks, 80),
    "fim": (fim, 120),
}
