"""Topic 08 - Efficient attention experiments: what the cheaper forms cost, and what they get wrong.

python 08-transformer-variants/transformer_variants.py figures cost lookup   # some of them
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from attention_experiments import peak_memory
from attention_mechanisms import MultiHeadAttention, accuracy, scaled_dot_product_attention
from efficient_attention import (
    LinformerAttention,
    PerformerAttention,
    SparseAttention,
    attention_flops,
    bigbird_pattern,
    kernel_variance,
    linformer_attention,
    longformer_pattern,
    orthogonal_gaussian,
    performer_attention,
    positive_random_features,
    sparse_attention,
    trigonometric_features,
)
from sequence_modeling import IGNORE, fit
from variant_failures import breaks
from vision_experiments import save
from workbench import Column, RunConfig, save_figure, seed_everything

if TYPE_CHECKING:
    from variant_experiments import FiguresConfig


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Random features: how noisy is one kernel value


def kernel(config: "FiguresConfig", run: RunConfig) -> None:
    """Relative error of one kernel value against the angle of x and y: predicted, and measured with three features."""
    d_head, n_features, n_draws = 16, 64, 20_000 // config.shrink
    rows = []
    first, second = torch.linalg.qr(torch.randn(d_head, 2, generator=seeded(1), dtype=torch.float64))[0].T
    for cosine in (-0.9, -0.5, 0.0, 0.5, 0.9):
        x, y = first, cosine * first + math.sqrt(1 - cosine**2) * second  # both of length 1
        exact = (x @ y).exp()
        shape = (n_draws * n_features, d_head)
        independent = torch.randn(shape, generator=seeded(2), dtype=torch.float64)
        errors = []
        for features, projection in (
            (positive_random_features, independent),
            (positive_random_features, orthogonal_gaussian(len(independent), d_head, seeded(2))),
            (trigonometric_features, independent),
        ):
            products = features(x, projection) * features(y, projection)
            products = products.unflatten(0, (-1, len(independent))).sum(dim=0)
            estimates = products.unflatten(0, (n_draws, n_features)).sum(dim=1) * n_draws
            errors.append(((estimates - exact).square().mean().sqrt() / exact).item())
        predicted = kernel_variance(x, y, n_features).sqrt().item()
        rows.append([f"{cosine:g}", exact.item(), predicted, *errors])
    columns = [Column("x.y"), Column("kernel", "", ".2f"), Column("predicted", "", ".3f")]
    columns += [Column("independent rows", "", ".3f")]
    columns += [Column("orthogonal rows", "", ".3f"), Column("sines and cosines", "", ".3f")]
    save(config, "kernel", columns, rows, "kernel", 1)


# Cost against length


N_HEADS, D_HEAD = 4, 32
COST_KINDS: dict[str, tuple[str, int]] = {  # name: kind for the FLOPs, and the keys, mixtures or features of each query
    "exact, fused": ("exact", 0),
    "exact, all scores kept": ("exact", 0),
    "Linformer, rank 64": ("linformer", 64),
    "Performer, 64 features": ("performer", 64),
    "window of 32 to each side": ("sparse", 96 + 1),
    "BigBird, blocks of 16": ("sparse", 16 * 6 + 16),
}


def cost_works(seq_len: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention functions for sequences of this length, by name."""
    mix = torch.randn(2, 64, seq_len, generator=seeded(0)) / 8
    projection = orthogonal_gaussian(64, D_HEAD, seeded(0)).float()
    window = longformer_pattern(seq_len, 33, (0,))
    blocks = bigbird_pattern(seq_len, 16, 1, 3, seeded(0))
    return dict(
        zip(
            COST_KINDS,
            (
                F.scaled_dot_product_attention,
                lambda q, k, v: scaled_dot_product_attention(q, k, v)[0],
                lambda q, k, v: linformer_attention(q, k, v, *mix),
                lambda q, k, v: performer_attention(q, k, v, projection),
                lambda q, k, v: sparse_attention(q, k, v, window),
                lambda q, k, v: sparse_attention(q, k, v, blocks),
            ),
            strict=True,
        )
    )


def cpu_seconds(work: Callable[[], object], n_repeats: int) -> float:
    """The least CPU time of n_repeats runs after one that does not count: a busy neighbour changes it little."""
    times = []
    for _ in range(n_repeats + 1):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return min(times[1:])


def cost(config: "FiguresConfig", run: RunConfig) -> None:
    """Time, peak memory and FLOPs of forward and backward against length, and where each overtakes the exact form."""
    lengths = [length for length in (256, 512, 1024, 2048, 4096, 8192) if length <= 8192 // config.shrink]
    seconds, n_bytes = ({name: {} for name in COST_KINDS} for _ in range(2))
    for seq_len in lengths:
        inputs = [torch.randn(1, N_HEADS, seq_len, D_HEAD, generator=seeded(s), requires_grad=True) for s in range(3)]
        for name, attend in cost_works(seq_len).items():
            if name == "exact, all scores kept" and seq_len > 4096:
                continue  # 1 GB for each copy of the scores

            def work(attend: Callable = attend, inputs: list[Tensor] = inputs) -> None:
                torch.autograd.grad(attend(*inputs).sum(), inputs)

            seconds[name][seq_len] = cpu_seconds(work, 3 if seq_len > 2048 else 5)
            n_bytes[name][seq_len] = peak_memory(work)
    columns = [Column("Attention"), *(Column(f"{length}", "ms", ".1f") for length in lengths)]
    columns += [Column("faster than exact from")]
    rows = [[name, *(1e3 * times.get(length, math.nan) for length in lengths)] for name, times in seconds.items()]
    for row, times in zip(rows, seconds.values(), strict=True):
        row[1:] = ["" if math.isnan(cell) else cell for cell in row[1:]]
        row.append(crossing(times, seconds["exact, fused"]))
    save(config, "cost-time", columns, rows, "cost", 1)
    columns = [Column("Attention"), *(Column(f"{length}", "MiB", ".1f") for length in lengths)]
    columns += [Column("products, forward", f"MFLOP at {lengths[-1]}", ",.0f")]
    rows = []
    for name, (kind, size) in COST_KINDS.items():
        memory = [n_bytes[name][length] / 2**20 if length in n_bytes[name] else "" for length in lengths]
        rows.append([name, *memory, N_HEADS * attention_flops(kind, lengths[-1], D_HEAD, size) / 1e6])
    save(config, "cost-memory", columns, rows, "cost", 1)
    save_figure(plot_cost(seconds, n_bytes), config.folder / "cost.svg")


def crossing(times: dict[int, float], exact: dict[int, float]) -> str:
    """The first measured length from which on this form takes less time than the exact one, in words."""
    faster = [length for length in times if times[length] < exact[length]]
    stays = [length for length in faster if all(later in faster for later in times if later > length)]
    if times is exact:
        return ""
    return str(stays[0]) if stays else "not reached"


def plot_cost(seconds: dict[str, dict[int, float]], n_bytes: dict[str, dict[int, float]]) -> Figure:
    """CPU time and peak memory against length, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for axis, data, factor, label in (
        (axes[0], seconds, 1e3, "CPU time, forward and backward (ms)"),
        (axes[1], n_bytes, 2**-20, "peak memory beyond the inputs (MiB)"),
    ):
        for index, (name, values) in enumerate(data.items()):
            style = "--" if name.startswith("exact") else "-"
            axis.plot(
                list(values),
                [factor * y for y in values.values()],
                style,
                marker="o",
                ms=4,
                color=f"C{index}",
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="length (positions)", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


# Error: random inputs, and attention that has learned to look


N_CARDS = 32  # of the lookup task: 64 positions
N_VALUES = 16
SEQ_LEN, D_MODEL, LOOKUP_HEADS = 2 * N_CARDS, 48, 2
LOOKUP_STEPS = 300
N_EXAMINED = 256  # sequences that a trained model is examined with


def lookup_batch(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cards with a key and a value, then every key again, in another order and with a blank for its value.

    Returns inputs (batch, seq, 2), the two ids of every card (0: blank), and targets (batch, seq), the value that each
    question asks for. One look at the right card answers a question; nothing else does (chance 1 / 16).
    """
    shuffled = torch.rand(2, batch_size, N_CARDS, generator=generator).argsort(dim=2)  # (2, batch, cards)
    values = torch.randint(N_VALUES, (batch_size, N_CARDS), generator=generator)  # (batch, cards)
    keys, asked = 1 + shuffled[0], 1 + shuffled[0].gather(1, shuffled[1])  # (batch, cards)
    shown = torch.stack([keys, 1 + N_CARDS + values], dim=2)  # (batch, cards, 2)
    questions = torch.stack([asked, torch.zeros_like(asked)], dim=2)  # (batch, cards, 2)
    targets = torch.full((batch_size, SEQ_LEN), IGNORE)  # (batch, seq)
    targets[:, N_CARDS:] = values.gather(1, shuffled[1])
    return torch.cat([shown, questions], dim=1), targets


class LookupModel(nn.Module):
    """One attention layer of any form between an embedding of cards and a linear map, with a residual connection.

    Shapes: inputs (batch, seq, 2) to logits (batch, seq, values).
    """

    def __init__(self, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.token_emb, self.pos_emb = nn.Embedding(1 + N_CARDS + N_VALUES, D_MODEL), nn.Embedding(SEQ_LEN, D_MODEL)
        self.layer, self.head = layer, nn.Linear(D_MODEL, N_VALUES)
        nn.init.normal_(self.pos_emb.weight, std=0.1)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.token_emb(inputs).sum(dim=2) + self.pos_emb.weight  # (batch, seq, d_model)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embed(inputs)  # (batch, seq, d_model)
        return self.head(x + self.layer(x)[0])  # (batch, seq, values)


FORMS: dict[str, Callable[[int], MultiHeadAttention]] = {  # name: a layer, for this seed
    "exact": lambda seed: MultiHeadAttention(D_MODEL, LOOKUP_HEADS),
    "window of 8 to each side": lambda seed: SparseAttention(D_MODEL, LOOKUP_HEADS, longformer_pattern(SEQ_LEN, 9)),
    "the same, 1 global position": lambda seed: SparseAttention(
        D_MODEL, LOOKUP_HEADS, longformer_pattern(SEQ_LEN, 9, (N_CARDS,))
    ),
    "BigBird, blocks of 4, 2 random": lambda seed: SparseAttention(
        D_MODEL, LOOKUP_HEADS, bigbird_pattern(SEQ_LEN, 4, 1, 2, seeded(seed))
    ),
    "Linformer, rank 16": lambda seed: LinformerAttention(D_MODEL, LOOKUP_HEADS, SEQ_LEN, 16),
    "Performer, 32 features": lambda seed: PerformerAttention(D_MODEL, LOOKUP_HEADS, 32, seed),
    "Performer, 256 features": lambda seed: PerformerAttention(D_MODEL, LOOKUP_HEADS, 256, seed),
}


def lookup_with(form: str, seed: int) -> LookupModel:
    """A model trained from its first step with one of FORMS."""
    generator = seed_everything(seed)
    model = LookupModel(FORMS[form](seed))
    batches = iter(lambda: lookup_batch(64, generator), None)
    fit(model, batches, LOOKUP_STEPS, 1e-2, f"{form}, seed {seed}")
    return model.eval()


def exchanged(layer: MultiHeadAttention, make: Callable[[int], MultiHeadAttention], seed: int) -> MultiHeadAttention:
    """A layer of another form with this layer's projections; what the form adds is drawn anew."""
    torch.manual_seed(seed)
    other = make(seed)
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if "_proj" in name}, strict=False)
    return other.eval()


@torch.no_grad()
def put_in(trained: LookupModel, make: Callable[[int], MultiHeadAttention], seed: int) -> tuple[float, float, float]:
    """Exchange the attention of a trained model: relative error of its output on noise with an untrained layer, on real
    inputs with the trained one, and the accuracy of the whole model afterwards."""
    inputs, targets = lookup_batch(N_EXAMINED, seeded(seed + 10**6))
    torch.manual_seed(seed)
    untrained = MultiHeadAttention(D_MODEL, LOOKUP_HEADS).eval()
    noise, errors = torch.randn(N_EXAMINED // 4, SEQ_LEN, D_MODEL, generator=seeded(seed)), []
    for layer, x in ((untrained, noise), (trained.layer, trained.embed(inputs))):
        exact = layer(x)[0]
        errors.append(((exchanged(layer, make, seed)(x)[0] - exact).norm() / exact.norm()).item())
    x = trained.embed(inputs)  # (batch, seq, d_model)
    logits = trained.head(x + exchanged(trained.layer, make, seed)(x)[0])  # (batch, seq, values)
    return *errors, accuracy(logits, targets)


def lookup(config: "FiguresConfig", run: RunConfig) -> None:
    """Each form put in place of trained exact attention, and trained itself, on a task of one look."""
    cells: dict[str, list[list[float]]] = {form: [[], [], [], []] for form in FORMS}
    for seed in range(config.n_seeds):
        trained = lookup_with("exact", seed)
        inputs, targets = lookup_batch(N_EXAMINED, seeded(seed + 10**6))
        for form, row in cells.items():
            for cell, value in zip(row, put_in(trained, FORMS[form], seed), strict=False):
                cell.append(value)
            own = trained if form == "exact" else lookup_with(form, seed)
            with torch.no_grad():
                row[3].append(accuracy(own(inputs), targets))
    columns = [Column("Attention"), Column("error, untrained", "", ".2f"), Column("error, trained", "", ".2f")]
    columns += [Column("accuracy, put in", "", ".1%"), Column("accuracy, trained with it", "", ".1%")]
    rows = [[form, *row] for form, row in cells.items()]
    rows.append(["chance", "", "", 1 / N_VALUES, 1 / N_VALUES])
    save(config, "lookup", columns, rows, "lookup", config.n_seeds)


def features(config: "FiguresConfig", run: RunConfig) -> None:
    """Performer's error against the number of features, with an untrained layer and in a trained model."""
    counts, models = (16, 64, 256, 1024), [lookup_with("exact", seed) for seed in range(config.n_seeds)]
    rows = []
    for count in counts:

        def performer(seed: int, count: int = count) -> PerformerAttention:
            return PerformerAttention(D_MODEL, LOOKUP_HEADS, count, seed)

        found = [put_in(trained, performer, seed) for seed, trained in enumerate(models)]
        rows.append([str(count), *(list(values) for values in zip(*found, strict=True))])
    columns = [Column("Features"), Column("error, untrained", "", ".2f"), Column("error, trained", "", ".2f")]
    columns += [Column("accuracy, put in", "", ".1%")]
    save(config, "features", columns, rows, "features", config.n_seeds)


EFFICIENT_EXPERIMENTS: dict[str, tuple[Callable[["FiguresConfig", RunConfig], None], int]] = {  # function, seconds
    "kernel": (kernel, 40),
    "cost": (cost, 60),
    "lookup": (lookup, 240),
    "features": (features, 40),
    "breaks": (breaks, 10),
}
