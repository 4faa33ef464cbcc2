"""Topic 08 - Vision experiments: what the chapter measures of the Vision Transformer and of contrastive learning.

python 08-transformer-variants/transformer_variants.py figures digits patches   # some of them
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from contrastive import (
    CAPTIONS,
    DualEncoder,
    PairConfig,
    correlation_for,
    density_ratio,
    draw_pictures,
    fit_pairs,
    gaussian_pairs,
    information_bound,
    pair_batches,
    retrieval_accuracy,
    unseen_captions,
)
from optimizers import shapes_alone
from sequence_modeling import Vocabulary
from transformer_architecture import MatmulCounter
from vision_transformer import (
    Digits,
    DigitsConfig,
    VisionConfig,
    VisionTransformer,
    attention_of,
    attention_rollout,
    fit_classifier,
    image_accuracy,
    load_digits_images,
    plot_rollout,
)
from workbench import Column, RunConfig, pick_device, save_figure, save_results, seed_everything

if TYPE_CHECKING:
    from variant_experiments import FiguresConfig

SCRIPT = "python 08-transformer-variants/transformer_variants.py figures"


def save(
    config: "FiguresConfig", name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int
) -> None:
    save_results(config.folder / "results.json", name, columns, rows, range(n_seeds), f"{SCRIPT} {experiment}")


# Digits: attention over patches beside models that know, or do not know, what an image is


class ConvNet(nn.Module):
    """Two layers of 3 x 3 convolutions and one linear map: locality and shared weights are built in.

    Shapes: images (batch, 1, 8, 8) to logits (batch, 10).
    """

    def __init__(self, n_filters: int = 48) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, n_filters, 3, padding=1)
        self.second = nn.Conv2d(n_filters, n_filters, 3, padding=1)
        self.head = nn.Linear(4 * n_filters * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(images).relu(), 2)  # (batch, filters, 4, 4)
        x = self.second(x).relu()  # (batch, filters, 4, 4)
        return self.head(x.flatten(1))  # (batch, classes)


class UnorderedVisionTransformer(VisionTransformer):
    """No positions: the patches are a set."""

    def positions(self, down: int, across: int) -> Tensor:
        return torch.zeros((), device=self.pos_emb.device)


STILL = {"max_shift": 0.0, "max_turn": 0.0, "max_stretch": 0.0}


def train_digits(model: nn.Module, data: Digits, config: DigitsConfig, run: RunConfig) -> tuple[nn.Module, float]:
    """The trained model, and the seconds of CPU time that its training took."""
    before = time.process_time()
    fit_classifier(model.to(pick_device(run.device)).train(), data, config, run.seed)
    return model, time.process_time() - before


def baseline_accuracies(train: Digits, held_out: Digits) -> dict[str, float]:
    """scikit-learn's k nearest neighbours (3) and logistic regression on the 64 pixels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    models = {
        "3 nearest neighbours": KNeighborsClassifier(3),
        "logistic regression": LogisticRegression(max_iter=5000),
    }
    pixels = [part.images.flatten(1).numpy() for part in (train, held_out)]
    return {
        name: float(model.fit(pixels[0], train.labels.numpy()).score(pixels[1], held_out.labels.numpy()))
        for name, model in models.items()
    }


DIGIT_MODELS: dict[str, Callable[[], nn.Module]] = {
    "vision transformer": lambda: VisionTransformer(VisionConfig()),
    "vision transformer, no augmentation": lambda: VisionTransformer(VisionConfig()),
    "convolutional network": ConvNet,
}


def digits(config: "FiguresConfig", run: RunConfig) -> None:
    """Held-out accuracy on new images, and on new writers; beside a convolutional network and two simple methods."""
    recipe = DigitsConfig(max_steps=max(1, DigitsConfig.max_steps // config.shrink))
    names = (*DIGIT_MODELS, "3 nearest neighbours", "logistic regression")
    cells: dict[str, dict[str, list[float]]] = {name: {"content": [], "writers": [], "seconds": []} for name in names}
    sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in DIGIT_MODELS.items()}
    for seed in range(config.n_seeds):
        for split in ("content", "writers"):
            train, held_out = load_digits_images(split, seed)
            for name, make in DIGIT_MODELS.items():
                if "no augmentation" in name and split == "writers":
                    continue
                seed_everything(seed)
                own = replace(recipe, **STILL) if "no augmentation" in name else recipe
                model, seconds = train_digits(make(), train, own, replace(run, seed=seed))
                cells[name][split].append(image_accuracy(model, held_out))
                cells[name]["seconds"].append(seconds)
                if (seed, split, name) == (0, "content", "vision transformer"):
                    save_figure(rollout_figure(model, held_out), config.folder / "rollout.svg")
            for name, accuracy in baseline_accuracies(train, held_out).items():
                cells[name][split].append(accuracy)
    columns = [Column("Model"), Column("parameters"), Column("new images", "", ".1%")]
    columns += [Column("new writers", "", ".1%"), Column("training", "s of CPU time", ".0f")]
    rows = [
        [
            name,
            f"{sizes[name]:,}" if name in sizes else "",
            *(row[key] or "" for key in ("content", "writers", "seconds")),
        ]
        for name, row in cells.items()
    ]
    save(config, "digits", columns, rows, "digits", config.n_seeds)


def rollout_figure(model: VisionTransformer, held_out: Digits, n_shown: int = 8) -> Figure:
    """The first held-out image of some classes, and what reaches the class token from each of its patches."""
    rows = [int((held_out.labels == digit).nonzero()[0, 0]) for digit in range(n_shown)]
    images, grid = held_out.images[rows], model.config.grid_size
    device = next(model.parameters()).device
    flow = attention_rollout(attention_of(model, images.to(device)))[:, 0, 1:].cpu()  # (images, patches)
    guesses = model(images.to(device)).argmax(dim=1).tolist()
    titles = [f"{label}, said {guess}" for label, guess in zip(held_out.labels[rows].tolist(), guesses, strict=True)]
    return plot_rollout(images, flow.unflatten(1, (grid, grid)).detach(), titles)


# Patches: how large, and does the order matter


PATCH_SIZES = (1, 2, 4, 8)


def patches(config: "FiguresConfig", run: RunConfig) -> None:
    """Patch size with and without positions, the same number of short training steps each."""
    recipe = DigitsConfig(max_steps=max(1, 150 // config.shrink), warmup_steps=15)
    kinds = {"with positions": VisionTransformer, "without": UnorderedVisionTransformer}
    table = {size: {kind: [] for kind in kinds} for size in PATCH_SIZES}
    flops = {}
    for size in PATCH_SIZES:
        shape = VisionConfig(patch_size=size)
        with shapes_alone(), MatmulCounter() as counter:
            VisionTransformer(shape)(torch.zeros(1, 1, 8, 8))
        flops[size] = counter.flops / 1e6
        for kind, cls in kinds.items():
            for seed in range(config.n_seeds):
                train, held_out = load_digits_images("content", seed)
                seed_everything(seed)
                model, _ = train_digits(cls(shape), train, recipe, replace(run, seed=seed))
                table[size][kind].append(image_accuracy(model, held_out))
    columns = [Column("Patch", "pixels"), Column("tokens"), Column("forward pass", "MFLOP an image", ".2f")]
    columns += [Column(kind, "", ".1%") for kind in kinds]
    rows = [[f"{size} x {size}", f"{(8 // size) ** 2 + 1}", flops[size], *table[size].values()] for size in PATCH_SIZES]
    save(config, "patches", columns, rows, "patches", config.n_seeds)


# Contrastive learning


def bound(config: "FiguresConfig", run: RunConfig) -> None:
    """ln N - InfoNCE with the best possible scores, on pairs whose mutual information is known."""
    width, n_draws, sizes = 8, max(2, 20 // config.shrink), [4**power for power in range(1, 6)]
    informations = (1.0, 2.0, 4.0, 8.0)
    means: dict[float, list[list[float]]] = {}
    for information in informations:
        correlation = correlation_for(information, width)
        means[information] = []
        for n_pairs in sizes:
            draws = []
            for seed in range(n_draws):
                x, y = gaussian_pairs(n_pairs, correlation, width, torch.Generator().manual_seed(seed))
                draws.append(information_bound(density_ratio(x, y, correlation)))
            means[information].append(draws)
    columns = [Column("Pairs in a batch"), Column("ln N", "nats", ".2f")]
    columns += [Column(f"information {information:g}", "nats", ".2f") for information in informations]
    rows = [
        [str(n_pairs), math.log(n_pairs), *(means[information][row] for information in informations)]
        for row, n_pairs in enumerate(sizes)
    ]
    save(config, "bound", columns, rows, "bound", n_draws)
    save_figure(plot_bound(sizes, means), config.folder / "bound.svg")


def plot_bound(sizes: list[int], means: dict[float, list[list[float]]]) -> Figure:
    """The bound against the batch size, one curve for each true information, under the ceiling ln N."""
    figure, axis = plt.subplots(figsize=(6.0, 3.6))
    axis.plot(sizes, np.log(sizes), color="black", ls="--", label="ln N")
    for index, (information, rows) in enumerate(means.items()):
        axis.axhline(information, color=f"C{index}", lw=0.8, ls=":")
        axis.plot(sizes, [statistics.mean(row) for row in rows], "o-", color=f"C{index}", label=f"I = {information:g}")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="pairs in a batch, N", ylabel="ln N - InfoNCE (nats)", ylim=(0, 9.8))
    axis.legend(frameon=False, ncols=5, loc="upper left", fontsize=8, columnspacing=1.0)
    return figure


PAIR_VARIANTS: dict[str, dict] = {  # name: changes of the recipe
    "batches of 64 different captions": {},
    "batches of 16": {"batch_size": 16},
    "batches of 4": {"batch_size": 4},
    "repeated captions in a batch": {"distinct": False},
    "repeated, their scores masked": {"distinct": False, "masked": True},
    "temperature fixed at 1": {"temperature": 1.0, "learned": False},
}


def train_pairs(
    config: PairConfig, run: RunConfig, distinct: bool = True, masked: bool = False, learned: bool = True
) -> dict[str, float]:
    """Train on the captions that are not held out; retrieval accuracies on fresh images, by kind of caption."""
    generator = seed_everything(run.seed)
    train, held_out = load_digits_images("content", run.seed)
    unseen = unseen_captions(run.seed)
    letters = Vocabulary(sorted({letter for caption in CAPTIONS for letter in caption}))
    model = DualEncoder(letters, config).to(pick_device(run.device))
    model.log_scale.requires_grad_(learned)
    batches = pair_batches(train, (~unseen).nonzero()[:, 0], config, generator, distinct)
    losses = fit_pairs(model, batches, config, masked)
    scores = {"loss": statistics.mean(losses[-20:]), "scale": model.log_scale.exp().item()}
    for name, chosen in (("seen", ~unseen), ("unseen", unseen)):
        numbers = chosen.nonzero()[:, 0].repeat(5)  # five pictures of each number
        pictures = draw_pictures(held_out, numbers, torch.Generator().manual_seed(run.seed + 1))
        scores[name] = retrieval_accuracy(model, pictures, numbers)[0]
    return scores


def pairs(config: "FiguresConfig", run: RunConfig) -> None:
    """Pictures of two digits and their names: retrieval among 100 captions, of which 20 were never trained on."""
    rows = []
    for name, changes in PAIR_VARIANTS.items():
        options = {key: changes[key] for key in ("distinct", "masked", "learned") if key in changes}
        own = {key: value for key, value in changes.items() if key not in options}
        recipe = replace(PairConfig(max_steps=max(1, PairConfig.max_steps // config.shrink)), **own)
        found = [train_pairs(recipe, replace(run, seed=seed), **options) for seed in range(config.n_seeds)]
        rows.append([name, *([scores[key] for scores in found] for key in ("seen", "unseen", "scale", "loss"))])
    columns = [Column("Trained with"), Column("seen captions", "", ".1%"), Column("unseen captions", "", ".1%")]
    columns += [Column("last scale", "", ".1f"), Column("last loss", "nats", ".2f")]
    rows.append(["chance", 0.01, 0.01, "", ""])
    save(config, "pairs", columns, rows, "pairs", config.n_seeds)


VISION_EXPERIMENTS: dict[str, tuple[Callable[["FiguresConfig", RunConfig], None], int]] = {  # name: function, seconds
    "digits": (digits, 480),
    "patches": (patches, 400),
    "bound": (bound, 5),
    "pairs": (pairs, 400),
}
