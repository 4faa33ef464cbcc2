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
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from bert_family import BertConfig, BertForSequenceClassification, Electra
from efficient_experiments import EFFICIENT_EXPERIMENTS
from gpt2 import GPT2
from sequence_modeling import BOS_ID, device_of, document_losses, gap_to_floor
from transformer_architecture import SinusoidalPositions
from transformer_variants import BenchConfig, measure_speed, plot_families, plot_scores
from variant_pretraining import (
    CLASSES,
    HELD_OUT_SEED,
    FillScore,
    FinetuneConfig,
    Slot,
    Trained,
    VariantConfig,
    VariantMasking,
    acceptable_tokens,
    bert_sizes,
    causal_guess,
    class_accuracy,
    fill_in,
    fit_classes,
    guess_of_kind,
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
    save_objectives(cells, likelihood, found[left][0], stories, config)
    save_figure(plot_scores({name: found[name] for name in FAMILIES}), config.folder / "objectives.svg")


def save_objectives(
    cells: dict[str, list[list[float]]],
    likelihood: list[list[float]],
    best: FillScore,
    stories: list[Slot],
    config: FiguresConfig,
) -> None:
    rows = [[name, *columns] for name, columns in cells.items()]
    guess = guess_of_kind(stories)
    share = sum(row.max().exp().item() for row in guess) / len(stories)  # right on average; a first choice is luck
    rows.append(["a guess among the words of the right kind", "", "", "", "", "", share, score(guess, stories).nats])
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


# Why the encoder falls behind


def start_with_sinusoids(model: nn.Module) -> None:
    """Give an encoder's learned positions the directions of topic 04's sinusoids, at the size that they start with."""
    weight = model.trunk.pos_emb.weight
    table = SinusoidalPositions(weight.shape[1], len(weight)).table.to(weight)  # (positions, d_model)
    weight.data.copy_(table * (weight.std() / table.std()))


def norms_first(model: nn.Module) -> None:
    """Make an encoder's blocks pre-norm, as GPT-2's are."""
    for block in model.trunk.blocks:
        block.norm_order = "pre"


class HandedNeighbours(nn.Module):
    """Add to each position its learned vector, and a linear map of the words on both of its sides.

    Shapes: (batch, seq, d_model) to the same. A hidden position then need not find its neighbours by attention.
    """

    def __init__(self, pos_emb: nn.Module) -> None:
        super().__init__()
        d_model = pos_emb.weight.shape[1]
        self.pos_emb, self.both_proj = pos_emb, nn.Linear(2 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.pad(x[:, :-1], (0, 0, 1, 0)), F.pad(x[:, 1:], (0, 0, 0, 1))  # (batch, seq, d_model)
        return self.pos_emb(x) + self.both_proj(torch.cat([left, right], dim=-1))


def hand_neighbours(model: nn.Module) -> None:
    model.trunk.pos_emb = HandedNeighbours(model.trunk.pos_emb)


def diagnosis_works(config: FiguresConfig, run: RunConfig) -> dict[str, Callable[[int], Trained]]:
    """Rows of the table of `diagnosis`: a name, and a training for each seed."""
    device, rate = pick_device(run.device), VariantMasking.mask_rate

    def changed(kind: str, batch_size: int = BATCH_SIZE, **options) -> Callable[[int], Trained]:
        return lambda seed: pretrain_for(kind, SIZES, config.flops, batch_size, seed, device, **options)

    return {
        "encoder, as above": lambda seed: trained("bert", config, run, seed, "", 1.0),
        "three times the FLOPs": lambda seed: trained("bert", config, run, seed, "", 3.0),
        "half as many documents a step": changed("bert", BATCH_SIZE // 2),
        "pre-norm": changed("bert", prepare=norms_first),
        "positions start as sinusoids": changed("bert", prepare=start_with_sinusoids),
        "both neighbours handed over": changed("bert", prepare=hand_neighbours),
        "decoder, asked 10 % of its tokens": changed("gpt2", asked=0.1),
        "decoder, asked 30 %, reads 24 % as masks": changed(
            "gpt2", asked=rate, hidden=rate * VariantMasking.mask_share
        ),
    }


def diagnosis(config: FiguresConfig, run: RunConfig) -> None:
    """What an encoder lacks: changes of it, and a decoder that is asked as seldom or reads as many masks as it."""
    places, rows = slots(config.n_slots), []
    for name, work in diagnosis_works(config, run).items():
        items = [work(seed) for seed in range(config.n_seeds)]
        found = [score(fill_in(item.model, places), places) for item in items]
        numbers = [[item.steps for item in items], [item.n_targets / 1000 for item in items]]
        rows.append([name, *numbers, *map(list, zip(*((s.accuracy, s.nats, s.gap) for s in found), strict=True))])
    columns = [Column("Model"), Column("steps", "", ".0f"), Column("tokens asked", "thousands", ".0f")]
    columns += [Column("right", "", ".1%"), Column("nats per gap", "", ".3f")]
    config.save("diagnosis", [*columns, Column("above the posterior", "nats", ".3f")], rows, "diagnosis")


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
    save_worst(beliefs, places, config)
    for row, slot in zip(beliefs, places, strict=True):
        points += [(chance, row[word_world()[1].ids[token]].item()) for token, chance in slot.posterior.items()]
    save_figure(plot_posterior(points[:800], widest(places), models[0]), config.folder / "posterior.svg")


def save_worst(beliefs: Tensor, places: list[Slot], config: FiguresConfig, n_worst: int = 5) -> None:
    """The certain gaps whose right word the model of seed 0 finds least likely; one for each right word."""
    ids, tokens = word_world()[1].ids, word_world()[1].tokens
    certain = [(row[ids[slot.truth]].item(), row, slot) for row, slot in zip(beliefs, places, strict=True)]
    worst: dict[str, list] = {}
    for chance, row, slot in sorted(certain, key=lambda item: item[0]):
        if len(slot.posterior) == 1 and slot.truth not in worst and len(worst) < n_worst:
            likely = f"`{tokens[int(row.argmax())]}` {row.max():.0%}"
            worst[slot.truth] = [f"`{gap_of(slot)}`", f"`{slot.truth}`", chance, likely]
    columns = [Column("Gap"), Column("right word"), Column("BERT gives it", "", ".1e"), Column("its first choice")]
    config.save("worst", columns, list(worst.values()), "posterior", n_seeds=1)


def gap_of(slot: Slot, width: int = 4) -> str:
    """A gap among the words around it."""
    before, after = slot.tokens[max(0, slot.position - width) : slot.position], slot.tokens[slot.position + 1 :]
    return " ".join([*before, "____", *after[:width]])


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
    right.set(yticks=list(places), yticklabels=tokens, xlabel="probability")
    right.set_xlim(0, 1.4 * max(*ours, *slot.posterior.values()))  # room for the legend
    right.set_title(gap_of(slot), fontsize=9)
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


@functools.cache
def possible_texts(n: int, seed: int, split: str) -> list[tuple[list[int], int]]:
    """Documents as (ids, whether the world can write them): half have one word replaced so that it cannot."""
    encode = word_world()[1].encode
    return [([BOS_ID, *encode(tokens)], CLASSES.index(name)) for tokens, name in acceptable_tokens(n, seed, split)]


class Task(NamedTuple):
    """What a classifier is fine-tuned for."""

    names: Callable[[], tuple[str, ...]]  # of the classes; a function, since making the world takes a second
    data: Callable[[int, int, str], list[tuple[list[int], int]]]  # (n, seed, split) -> (ids, class)
    heading: str  # of its column


TASKS = {
    "possible": Task(lambda: CLASSES, possible_texts, "possible text or not"),
    "place": Task(lambda: tuple(word_world()[0].words["places"]), place_questions, "where the thing is"),
}


def classifier_accuracy(trunk: nn.Module | None, task: str, config: FiguresConfig, seed: int) -> float:
    """Held-out accuracy after fine-tuning a trunk, or a fresh one, on N_LABELLED texts with few steps."""
    seed_everything(seed)
    class_names, questions, _ = TASKS[task]
    sizes = bert_sizes(SIZES, len(word_world()[1]))
    model = BertForSequenceClassification(BertConfig(**sizes, class_names=class_names()))
    if trunk is not None:
        model.trunk = trunk
    data = questions(N_LABELLED, 1, "train")
    fit_classes(model, data, FinetuneConfig(max_steps=max(2, FINETUNE_STEPS // config.shrink), batch_size=16), seed)
    return class_accuracy(model, questions(N_EXAMINED, HELD_OUT_SEED, "validation"))


FINETUNE_STEPS, N_LABELLED, N_EXAMINED = 300, 1000, 500


@functools.cache
def fine_tuned(
    name: str, task: str, config: FiguresConfig, run: RunConfig, seed: int, masking: str, share: float
) -> float:
    """What the encoder of `trained` is worth to a classifier of a task."""
    return classifier_accuracy(trunk_of(trained(name, config, run, seed, masking, share).model), task, config, seed)


def tuned_columns() -> list[Column]:
    return [Column(task.heading, "", ".1%") for task in TASKS.values()]


def trunk_of(model: nn.Module) -> nn.Module:
    """A copy of the encoder that pretraining leaves: of an ELECTRA, the discriminator's."""
    return copy.deepcopy((model.discriminator if isinstance(model, Electra) else model).trunk)


def electra(config: FiguresConfig, run: RunConfig) -> None:
    """Replaced tokens beside masked tokens at equal FLOPs, judged by what fine-tuning makes of the encoder."""
    rows, seeds = [], range(config.n_seeds)
    for name, label in (("bert", "masked tokens (BERT)"), ("electra", "replaced tokens (ELECTRA)")):
        for share in SHARES:
            items = [trained(name, config, run, seed, "", share) for seed in seeds]
            found = [[fine_tuned(name, task, config, run, seed, "", share) for seed in seeds] for task in TASKS]
            steps = statistics.mean(item.steps for item in items)
            rows.append([label, f"{share * config.gflops / config.shrink:.0f}", f"{steps:.0f}", *found])
    fresh = [[classifier_accuracy(None, task, config, seed) for seed in seeds] for task in TASKS]
    rows.append(["no pretraining", "0", "0", *fresh])
    most = []
    for task in TASKS.values():
        classes = [truth for _, truth in task.data(N_EXAMINED, HELD_OUT_SEED, "validation")]
        most.append(max(map(classes.count, classes)) / len(classes))
    rows.append(["most frequent class", "", "", *most])
    columns = [Column("Pretrained on"), Column("budget", "GFLOP"), Column("steps"), *tuned_columns()]
    config.save("electra", columns, rows, "electra")


SHARES = (0.5, 1.0)


def masking(config: FiguresConfig, run: RunConfig) -> None:
    """80/10/10 beside masks alone: the gaps themselves, what is said of tokens in plain view, and fine-tuning."""
    places, rows = slots(config.n_slots), []
    for name in MASKINGS:
        key = name if name != "80/10/10" else ""
        items = [trained("bert", config, run, seed, key, 1.0) for seed in range(config.n_seeds)]
        hidden = [score(fill_in(item.model, places), places).nats for item in items]
        seen = [accuracy_in_view(item.model, places) for item in items]
        tuned = [fine_tuned("bert", "possible", config, run, seed, key, 1.0) for seed in range(config.n_seeds)]
        rows.append([name, hidden, seen, tuned])
    columns = [Column("Hidden/swapped/kept"), Column("nats per gap", "", ".3f")]
    columns += [Column("copies a token in plain view", "", ".1%"), tuned_columns()[0]]
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
    rounds = BenchConfig(n_rounds=max(1, 21 // config.shrink))
    rows = [[name, ratio] for name, ratio in measure_speed(rounds, VariantConfig(), run).items()]
    config.save("speed", [Column("Compared"), Column("ratio")], rows, "speed", n_seeds=1)


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "objectives": (objectives, 360),
    "diagnosis": (diagnosis, 540),
    "posterior": (posterior, 60),
    "electra": (electra, 480),
    "masking": (masking, 240),
    "speed": (speed, 30),
    **VISION_EXPERIMENTS,
    **EFFICIENT_EXPERIMENTS,
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
    trained.cache_clear()
    fine_tuned.cache_clear()
