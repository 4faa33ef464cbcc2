"""Topic 08 - Variant experiments: what the chapter measures of encoders, decoders and encoder-decoders for text.

python 08-transformer-variants/transformer_variants.py figures                       # everything, images too
python 08-transformer-variants/transformer_variants.py figures objectives electra    # some of it

Three objectives with the same data and the same FLOPs, beside the world's exact posterior; ELECTRA beside masking; what
80/10/10 is for. Pseudo-likelihood: Salazar et al. 2020 (arXiv 1910.14659).
"""

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from bert_family import BertConfig, BertForSequenceClassification, Electra
from efficient_experiments import EFFICIENT_EXPERIMENTS
from gpt2 import GPT2
from sequence_modeling import BOS_ID, device_of, document_losses, gap_to_floor
from transformer_variants import BenchConfig, measure_speed, plot_families, plot_scores
from variant_pretraining import (
    HELD_OUT_SEED,
    FillScore,
    FinetuneConfig,
    Slot,
    Trained,
    VariantConfig,
    VariantMasking,
    bert_sizes,
    causal_guess,
    class_accuracy,
    fill_in,
    fit_classes,
    pretrain_for,
    recall_slots,
    score,
    slots,
    word_world,
)
from vision_experiments import VISION_EXPERIMENTS
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    pick_device,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
)


@dataclass(frozen=True)
class FiguresConfig:
    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of every comparison
    shrink: int = 1  # divide the length of every training by this, for a quick look
    gflops: float = 120.0  # billions of floating-point operations of each pretraining
    n_slots: int = 150  # held-out documents with one word hidden
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "shrink", least=1)
        check_range(self, "gflops", above=0)
        check_range(self, "n_slots", least=2)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    @property
    def flops(self) -> float:
        return 1e9 * self.gflops / self.shrink

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        command = f"python 08-transformer-variants/transformer_variants.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds or self.n_seeds), command)


SIZES = VariantConfig()
BATCH_SIZE = 8
MASKINGS = {
    "80/10/10": VariantMasking(),
    "100/0/0": VariantMasking(mask_share=1.0, random_share=0.0),
    "80/10/10 of 15 % of the tokens": VariantMasking(mask_rate=0.15),
}


@functools.cache
def trained(name: str, config: FiguresConfig, run: RunConfig, seed: int, masking: str, share: float) -> Trained:
    """One model after its share of the budget; `masking` is a key of MASKINGS, or empty for the usual one.

    No argument has a default, so that the same training is never named in two ways and done twice.
    """
    options = {"masking": MASKINGS[masking]} if masking else {}
    return pretrain_for(name, SIZES, share * config.flops, BATCH_SIZE, seed, pick_device(run.device), **options)


# Three objectives


FAMILIES = {  # row of the table -> kind of model
    "encoder, masked (BERT)": "bert",
    "decoder, causal (GPT-2)": "gpt2",
    "encoder-decoder, spans (T5)": "t5",
}


def objectives(config: FiguresConfig, run: RunConfig) -> None:
    """Fill-in, recall and the gap to the best that is possible, for the three families at equal FLOPs."""
    save_figure(plot_families(), config.folder / "families.svg")
    places, stories = slots(config.n_slots), recall_slots(config.n_slots)
    left = "decoder, from the left alone"
    cells: dict[str, list[list[float]]] = {name: [[] for _ in range(7)] for name in (*FAMILIES, left)}
    found: dict[str, list[FillScore]] = {name: [] for name in cells}
    likelihood: list[list[float]] = [[], []]
    for seed, (name, kind) in itertools.product(range(config.n_seeds), FAMILIES.items()):
        item = trained(kind, config, run, seed, "", 1.0)
        beliefs = {name: (fill_in(item.model, places), fill_in(item.model, stories))}
        if kind == "gpt2":
            beliefs[left] = tuple(
                torch.stack([causal_guess(item.model, slot) for slot in group]) for group in (places, stories)
            )
            for column, value in zip(likelihood, causal_gap(item.model, config.n_slots), strict=True):
                column.append(value)
        for row, (gaps, answers) in beliefs.items():
            result, recall = score(gaps, places), score(answers, stories)
            found[row].append(result)
            values = (item.steps, item.n_targets / 1000, result.accuracy, result.nats, result.gap)
            for column, value in zip(cells[row], (*values, recall.accuracy, recall.nats), strict=True):
                column.append(float(value))
    save_objectives(cells, likelihood, found[left][0], config)
    save_figure(plot_scores({name: found[name] for name in FAMILIES}), config.folder / "objectives.svg")


def save_objectives(
    cells: dict[str, list[list[float]]], likelihood: list[list[float]], best: FillScore, config: FiguresConfig
) -> None:
    rows = [[name, *columns] for name, columns in cells.items()]
    rows.append(["exact posterior", "", "", best.best_accuracy, best.best_nats, 0.0, 1.0, 0.0])
    n_tokens = len(word_world()[1])
    rows.append(
        ["uniform guess", "", "", 1 / n_tokens, math.log(n_tokens), math.log(n_tokens) - best.best_nats, 1 / n_tokens]
    )
    rows[-1].append(math.log(n_tokens))
    columns = [
        Column("Model"),
        Column("steps", "", ".0f"),
        Column("tokens asked", "thousands", ".0f"),
        Column("right", "", ".1%"),
        Column("nats per gap", "", ".3f"),
    ]
    columns += [Column("above the posterior", "nats", ".3f"), Column("recall", "", ".1%")]
    columns += [Column("nats per answer", "", ".3f")]
    config.save("objectives", columns, rows, "objectives")
    columns = [Column("Likelihood"), Column("value", "nats per token", ".3f")]
    rows = [["GPT-2, held-out documents", likelihood[0]], ["above the entropy floor", likelihood[1]]]
    config.save("likelihood", columns, rows, "objectives")


def causal_gap(model: GPT2, n_documents: int) -> tuple[float, float]:
    """Held-out nats per token of a causal model, and what of it lies above the entropy floor."""
    world, vocabulary = word_world()
    documents = world.documents(n_documents, HELD_OUT_SEED, split="validation")
    nats = document_losses(model, documents, vocabulary)
    return sum(nats) / sum(len(document.tokens) for document in documents), gap_to_floor(nats, documents)[0]


# A masked model beside the exact posterior


def posterior(config: FiguresConfig, run: RunConfig) -> None:
    """BERT's beliefs beside the world's exact posterior: slots that are certain, slots that are open, calibration."""
    places = slots(5 * config.n_slots)
    groups = {
        "certain: one token is possible": [slot for slot in places if len(slot.posterior) == 1],
        "open: two to eight are": [slot for slot in places if 1 < len(slot.posterior) <= 8],
        "wide open: more": [slot for slot in places if len(slot.posterior) > 8],
        "all": places,
    }
    rows, points = [], []
    models = [trained("bert", config, run, seed, "", 1.0).model for seed in range(config.n_seeds)]
    for name, group in groups.items():
        if not group:
            continue
        found = [score(fill_in(model, group), group) for model in models]
        row = [name, str(len(group)), [item.accuracy for item in found], found[0].best_accuracy]
        rows.append([*row, [item.nats for item in found], found[0].best_nats])
    columns = [Column("Gaps"), Column("number"), Column("right", "", ".1%"), Column("at best", "", ".1%")]
    columns += [Column("nats", "", ".3f"), Column("at best, nats", "", ".3f")]
    config.save("posterior", columns, rows, "posterior")
    beliefs = fill_in(models[0], places).exp()
    for row, slot in zip(beliefs, places, strict=True):
        points += [(chance, row[word_world()[1].ids[token]].item()) for token, chance in slot.posterior.items()]
    save_figure(plot_posterior(points[:800], widest(places), models[0]), config.folder / "posterior.svg")


def widest(places: list[Slot], most: int = 8) -> Slot:
    """The slot with the most possible tokens, up to `most`: one that a figure can show."""
    return max(places, key=lambda slot: (len(slot.posterior) <= most) * len(slot.posterior))


def plot_posterior(points: list[tuple[float, float]], slot: Slot, model: nn.Module) -> Figure:
    """Left: each possible token's exact probability against the model's. Right: one gap, token by token."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    exact, believed = zip(*points, strict=True)
    left.plot([0, 1], [0, 1], color="black", ls="--", lw=1, label="as the world says")
    left.plot(exact, believed, "o", ms=3, alpha=0.5, label="possible tokens of the gaps")
    left.set(xlabel="exact probability", ylabel="BERT's probability")
    left.legend(frameon=False, fontsize=8)
    tokens = sorted(slot.posterior, key=slot.posterior.get, reverse=True)
    row = fill_in(model, [slot])[0].exp()
    places = range(len(tokens))
    right.barh([place - 0.2 for place in places], [slot.posterior[token] for token in tokens], 0.4, label="world")
    ours = [row[word_world()[1].ids[token]].item() for token in tokens]
    right.barh([place + 0.2 for place in places], ours, 0.4, label="BERT")
    around = [*slot.tokens[max(0, slot.position - 4) : slot.position], "____"]
    around += slot.tokens[slot.position + 1 : slot.position + 5]
    right.set(yticks=list(places), yticklabels=tokens, xlabel="probability")
    right.set_title(" ".join(around), fontsize=9)
    right.invert_yaxis()
    right.legend(frameon=False, fontsize=8)
    return figure


# What pretraining is worth to a classifier


@functools.cache
def place_questions(n: int, seed: int, split: str) -> list[tuple[list[int], int]]:
    """Stories with a question after a place, as (ids up to the place, which place): one class for each place.

    The story decides, by its last mention of the thing: a bag of words cannot tell.
    """
    world, vocabulary = word_world()
    places, found = world.words["places"], []
    for document in world.stream(seed, split, "story"):
        for start, end in document.answers:
            if document.tokens[start] == "in" and len(found) < n:
                found.append(
                    ([BOS_ID, *vocabulary.encode(document.tokens[: end - 1])], places.index(document.tokens[end - 1]))
                )
        if len(found) == n:
            return found
    return found


def classifier_accuracy(trunk: nn.Module | None, config: FiguresConfig, seed: int) -> float:
    """Held-out accuracy after fine-tuning a trunk, or a fresh one, on N_LABELLED questions with few steps."""
    seed_everything(seed)
    names = word_world()[0].words["places"]
    sizes = bert_sizes(SIZES, len(word_world()[1]))
    model = BertForSequenceClassification(BertConfig(**sizes, class_names=names))
    if trunk is not None:
        model.trunk = trunk
    data = place_questions(N_LABELLED, 1, "train")
    fit_classes(model, data, FinetuneConfig(max_steps=max(2, FINETUNE_STEPS // config.shrink), batch_size=16), seed)
    return class_accuracy(model, place_questions(N_EXAMINED, HELD_OUT_SEED, "validation"))


FINETUNE_STEPS, N_LABELLED, N_EXAMINED = 150, 1000, 500


@functools.cache
def fine_tuned(name: str, config: FiguresConfig, run: RunConfig, seed: int, masking: str, share: float) -> float:
    """What the encoder of `trained` is worth to a classifier."""
    return classifier_accuracy(trunk_of(trained(name, config, run, seed, masking, share).model), config, seed)


def trunk_of(model: nn.Module) -> nn.Module:
    """A copy of the encoder that pretraining leaves: of an ELECTRA, the discriminator's."""
    return copy.deepcopy((model.discriminator if isinstance(model, Electra) else model).trunk)


def electra(config: FiguresConfig, run: RunConfig) -> None:
    """Replaced tokens beside masked tokens at equal FLOPs, judged by what fine-tuning makes of the encoder."""
    rows, curves = [], {}
    for name, label in (("bert", "masked tokens (BERT)"), ("electra", "replaced tokens (ELECTRA)")):
        for share in SHARES:
            items = [trained(name, config, run, seed, "", share) for seed in range(config.n_seeds)]
            accuracy = [fine_tuned(name, config, run, seed, "", share) for seed in range(config.n_seeds)]
            curves.setdefault(label, []).append(accuracy)
            steps = statistics.mean(item.steps for item in items)
            rows.append([label, f"{share * config.gflops / config.shrink:.0f}", f"{steps:.0f}", accuracy])
    fresh = [classifier_accuracy(None, config, seed) for seed in range(config.n_seeds)]
    rows.append(["no pretraining", "0", "0", fresh])
    counts = [place for _, place in place_questions(N_EXAMINED, HELD_OUT_SEED, "validation")]
    rows.append(["most frequent place", "", "", max(map(counts.count, counts)) / len(counts)])
    columns = [
        Column("Pretrained on"),
        Column("budget", "GFLOP"),
        Column("steps"),
        Column("right after fine-tuning", "", ".1%"),
    ]
    config.save("electra", columns, rows, "electra")
    budgets = [share * config.gflops / config.shrink for share in SHARES]
    save_figure(plot_electra(budgets, curves, fresh), config.folder / "electra.svg")


SHARES = (0.5, 1.0)


def plot_electra(budgets: list[float], curves: dict[str, list[list[float]]], fresh: list[float]) -> Figure:
    """Accuracy after fine-tuning against the budget of pretraining, mean and every seed."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for index, (label, rows) in enumerate(curves.items()):
        axis.plot(budgets, [100 * statistics.mean(row) for row in rows], "-", color=f"C{index}", label=label)
        for budget, row in zip(budgets, rows, strict=True):
            axis.plot([budget] * len(row), [100 * value for value in row], "o", ms=3, color=f"C{index}")
    axis.axhline(100 * statistics.mean(fresh), color="grey", ls=":", label="no pretraining")
    axis.set(xlabel="pretraining (GFLOP)", ylabel="right after fine-tuning (%)", xscale="log")
    axis.set_xticks(budgets, [f"{budget:.0f}" for budget in budgets])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return figure


def masking(config: FiguresConfig, run: RunConfig) -> None:
    """80/10/10 beside masks alone: the gaps themselves, what is said of tokens in plain view, and fine-tuning."""
    places, rows = slots(config.n_slots), []
    for name in MASKINGS:
        key = name if name != "80/10/10" else ""
        items = [trained("bert", config, run, seed, key, 1.0) for seed in range(config.n_seeds)]
        hidden = [score(fill_in(item.model, places), places).nats for item in items]
        seen = [accuracy_in_view(item.model, places) for item in items]
        tuned = [fine_tuned("bert", config, run, seed, key, 1.0) for seed in range(config.n_seeds)]
        rows.append([name, hidden, seen, tuned])
    columns = [Column("Hidden/swapped/kept"), Column("nats per gap", "", ".3f")]
    columns += [Column("copies a token in plain view", "", ".1%"), Column("right after fine-tuning", "", ".1%")]
    config.save("masking", columns, rows, "masking")


@torch.no_grad()
def accuracy_in_view(model: nn.Module, places: list[Slot]) -> float:
    """How often a model's first choice for a token that it can see is that token, over whole documents."""
    right = total = 0
    for slot in places:
        ids = torch.tensor([[BOS_ID, *slot.token_ids[:-1]]], device=device_of(model))
        guesses = model(ids)[0, 1:].argmax(dim=-1)
        right, total = right + int((guesses == ids[0, 1:]).sum()), total + ids.shape[1] - 1
    return right / total


def speed(config: FiguresConfig, run: RunConfig) -> None:
    """A training step and generation beside Hugging Face's models."""
    rounds = BenchConfig(n_rounds=max(1, 7 // config.shrink))
    rows = [[name, ratio] for name, ratio in measure_speed(rounds, VariantConfig(), run).items()]
    config.save("speed", [Column("Compared"), Column("ratio")], rows, "speed", n_seeds=1)


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "objectives": (objectives, 360),
    "posterior": (posterior, 5),
    "electra": (electra, 240),
    "masking": (masking, 120),
    "speed": (speed, 30),
    **VISION_EXPERIMENTS,
    **EFFICIENT_EXPERIMENTS,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
    trained.cache_clear()
    fine_tuned.cache_clear()
