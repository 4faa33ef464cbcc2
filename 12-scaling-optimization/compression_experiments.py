"""Topic 12 - Compression experiments: what bits, zeros and a teacher cost or buy on the course model.

python 12-scaling-optimization/scaling_optimization.py figures quantisation          # quality against bits
python 12-scaling-optimization/scaling_optimization.py figures distillation pruning  # some others

Every model is judged on the same held-out documents as the float model: the difference, in nats per token, is known far
better than either gap. Right answers are the mean over QUESTIONS_ASKED, greedy and word for word.
"""

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from channel_scaling import plant_outliers
from compression_failures import COMPRESSION_BREAKS
from course_model import ExamConfig, ModelSizes, answer_accuracy, load_course_model, make_shards, start_small
from course_tokenizer import CourseTokenizer
from distillation import DistillConfig, distilled, step_flops, student_training
from equal_compute import remembered
from gptq import (
    Batch,
    GPTQConfig,
    InputStatistics,
    block_linears,
    calibration_batches,
    input_statistics,
    output_error,
)
from modern_llm_architectures import CausalLM
from pruning import csr_bytes, prune_weights, pruned, train_masked
from quantized_layers import KVFormat, QuantisedKVCache, quantised_kv_bytes
from quantized_model import Exam, QuantisedLM, Recipe, float_bytes, quantize_model, row_nats, train_rounded
from shards import ShardBatches, ShardConfig
from tiny_world import World
from weight_quantization import QuantFormat, bits_per_weight
from workbench import (
    Column,
    RunConfig,
    check_range,
    save_figure,
    save_results,
    seed_everything,
    speed_line,
    speed_ratio,
    time_in_turns,
)

QUESTIONS_ASKED = ("story", "scene", "asked", "new sums")
COMMAND = "python 12-scaling-optimization/scaling_optimization.py figures"
ADDED = Column("Added by compression", "nats per token", ".4f")
GAP, RIGHT = Column("Gap to the floor", "nats per token", ".4f"), Column("Right answers", digits=".1%")


@dataclass(frozen=True)
class CompressionFiguresConfig:
    """The sizes of the experiments on compression."""

    n_seeds: int = 3  # seeds 0, 1, ... of calibration, of training and of students
    n_draws: int = 5  # draws of calibration text where GPTQ is compared with nearest at 4 and 3 bits
    n_held_out: int = 500  # held-out documents to examine each model with
    n_many: int = 2000  # held-out documents where ways of rounding are compared, whose differences are small
    n_questions: int = 60  # questions of each topic
    n_calibration: int = 128  # documents that a quantiser or pruner looks at
    qat_steps: int = 120  # optimizer steps of training through rounding
    heal_steps: int = 60  # optimizer steps of a pruned model
    student_steps: str = "200,400,800"  # optimizer steps of students from scratch, commas between; others: same FLOPs
    again: bool = False  # measure again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_draws", "n_questions", "n_calibration", least=1)
        check_range(self, "n_held_out", "n_many", "qat_steps", "heal_steps", least=2)
        if min(self.student_budgets) < 2:
            raise ValueError(f"student_steps must be at least 2 each, got {self.student_steps!r}")

    @property
    def student_budgets(self) -> list[int]:
        """The steps from scratch whose FLOPs every student gets, smallest first."""
        try:
            return sorted({int(word) for word in self.student_steps.split(",")})
        except ValueError:
            raise ValueError(
                f"student_steps must be whole numbers with commas between, such as 200,800; got {self.student_steps!r}"
            ) from None

    def save_table(self, name: str, columns: list[Column], rows: list[list], n_seeds: int = 1, of: str = "") -> None:
        results = self.folder / "results.json"
        save_results(results, name, columns, rows, range(n_seeds), f"{COMMAND} {of or name}")


@dataclass(frozen=True)
class Bench:
    """The float model, its tokenizer and its exam: what all experiments compare with."""

    model: CausalLM
    tokenizer: CourseTokenizer
    exam: Exam
    judged: Exam  # training documents: what settings are chosen by
    questions: ExamConfig

    @classmethod
    def of(cls, config: CompressionFiguresConfig, many: bool = False) -> "Bench":
        model, tokenizer = load_course_model()
        n_documents = config.n_many if many else config.n_held_out
        exam = Exam.of(model, tokenizer, World().documents(n_documents, 21, "validation"))
        judged = Exam.of(model, tokenizer, World().documents(config.n_held_out, 23, "train"))
        return cls(model, tokenizer, exam, judged, ExamConfig(n_questions=config.n_questions, exam_seed=22))

    def added(self, model: nn.Module) -> float:
        return self.exam.damage(model)[0]

    def gap(self, model: nn.Module) -> float:
        return self.exam.gap(model)[0]

    def right(self, model: CausalLM) -> float:
        """Mean share of right answers; weight-only models are laid out in float first, which is faster and the same."""
        if isinstance(model, QuantisedLM) and model.recipe.method not in ("llm.int8", "smoothquant"):
            model = model.dequantised()
        asked = [answer_accuracy(model, self.tokenizer, topic, self.questions) for topic in QUESTIONS_ASKED]
        return sum(asked) / len(asked)

    def calibration(self, config: CompressionFiguresConfig, seed: int) -> list[Batch]:
        return calibration_batches(self.tokenizer, config.n_calibration, 1000 + seed)


@contextmanager
def training_batches(n_documents: int, seed: int) -> Iterator[ShardBatches]:
    """Rows of training documents, from shards in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield ShardBatches(make_shards(ShardConfig(n_documents=n_documents), Path(folder)), 8, 128, seed)


def mean_bits(model: CausalLM, fmt: QuantFormat) -> float:
    """Bits for each weight of the blocks, scales and zero points included."""
    layers = block_linears(model).values()
    total = sum(layer.weight.numel() for layer in layers)
    sizes = ((layer.weight.numel(), bits_per_weight(layer.out_features, layer.in_features, fmt)) for layer in layers)
    return sum(count * bits for count, bits in sizes) / total


# Quality against bits


PLACES = ((-1, "matrix"), (0, "row"), (64, "64"), (16, "16"))
DAMPINGS = (0.01, 0.1, 0.3, 1.0)
BY_ROW = "one scale per row"
ORDERS = {"GPTQ": False, "GPTQ, large inputs first": True}


def roundings() -> list[tuple[str, QuantFormat, str]]:
    """Method, format and name of every rounding that is compared."""
    found = [("rtn", QuantFormat(bits, 32, "absmax"), "nearest, absmax") for bits in (8, 4, 3, 2)]
    found += [("rtn", QuantFormat(bits, 32), "nearest, affine") for bits in (8, 4, 3, 2)]
    found += [("rtn", QuantFormat(4, size), f"nearest, one scale per {name}") for size, name in PLACES]
    found.append(("rtn", QuantFormat(3, 0), f"nearest, {BY_ROW}"))
    found += [("gptq", QuantFormat(bits, 32), name) for name in ORDERS for bits in (4, 3, 2)]
    found += [("gptq", QuantFormat(bits, 0), f"{name}, {BY_ROW}") for name in ORDERS for bits in (4, 3)]
    for method, name in (("awq", "AWQ"), ("awq+gptq", "AWQ, then GPTQ")):
        found += [(method, QuantFormat(bits, 32), name) for bits in (4, 3, 2)]
    return found


def quantisation(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Every method at 8, 4, 3 and 2 bits: what it adds to the loss, and the right answers that are left."""
    bench = Bench.of(config, many=True)
    floor_gap = bench.gap(bench.model)  # all gaps are to the same floor: what is added to the loss is added to the gap
    rows: list[list] = [["float32", 32.0, "", "", 0.0, floor_gap, bench.right(bench.model)]]
    found: dict[tuple[str, QuantFormat], list[dict]] = {}
    for method, fmt, name in roundings():
        settings = chosen_settings(bench, fmt, name, config, run) if method == "gptq" else None
        deciding = method == "gptq" and fmt.n_bits > 2
        n_draws = 1 if method == "rtn" else config.n_draws if deciding else config.n_seeds
        draws = found[name, fmt] = [
            remembered(
                config,
                run,
                f"rounding, {config.n_many} documents, {name}, {fmt}, {settings}, draw {draw}",
                partial(measure_rounding, bench, Recipe(method, fmt, 0), config, draw, settings),
            )
            for draw in range(n_draws)
        ]
        cells = {key: [draw[key] for draw in draws] for key in ("added", "right")}
        cells["gap"] = [floor_gap + added for added in cells["added"]]
        cells = {key: value if len(value) > 1 else value[0] for key, value in cells.items()}
        damping = f"{settings.damping:g}" if settings else ""
        rows.append([f"{name}, {fmt.n_bits} bits", mean_bits(bench.model, fmt), damping, float(n_draws)])
        rows[-1] += [cells["added"], cells["gap"], cells["right"]]
        print(rows[-1], flush=True)
    columns = [Column("Weights of the blocks"), Column("Bits for each", "with scales", ".2f"), Column("Damping")]
    columns += [Column("Draws", digits=".0f"), ADDED, GAP, RIGHT]
    config.save_table("quantisation", columns, rows, config.n_draws)
    save_by_bits(rows, config)
    save_against_nearest(found, config)
    save_figure(plot_bits(rows), config.folder / "quantisation.svg")


WIDTHS = (8, 4, 3, 2)


def save_by_bits(rows: list[list], config: CompressionFiguresConfig) -> None:
    """The same turned: a row for each method that was tried at 3 bits, and what it adds at every width."""
    added = {tuple(row[0].removesuffix(" bits").rsplit(", ", 1)): row[4] for row in rows[1:]}
    names = dict.fromkeys(name for name, _ in added)
    tried = [name for name in names if (name, "3") in added or name.endswith("per matrix")]
    turned = [[name, *(added.get((name, str(n_bits)), "") for n_bits in WIDTHS)] for name in tried]
    columns = [Column("Added by", "nats per token"), *(Column(f"{n_bits} bits", digits=".4f") for n_bits in WIDTHS)]
    config.save_table("quality-by-bits", columns, turned, config.n_draws, "quantisation")


def save_against_nearest(found: dict[tuple[str, QuantFormat], list[dict]], config: CompressionFiguresConfig) -> None:
    """GPTQ beside rounding to nearest on the same grid: the model's loss, and the layers' outputs on fresh text."""
    rows = []
    for name, fmt in found:
        if not name.startswith("GPTQ"):
            continue
        nearest = found[f"nearest, {'affine' if fmt.quant_group_size else BY_ROW}", fmt][0]["added"]
        draws = found[name, fmt]
        grid = f"{fmt.n_bits} bits, {'groups of 32' if fmt.quant_group_size else BY_ROW}"
        order = "large inputs first" if "large" in name else "as they stand"
        beside = [draw["added"] - nearest for draw in draws]
        rows.append([grid, order, nearest, beside, draws[0]["beside_error"], draws[0]["outputs"]])
    columns = [Column("Grid"), Column("Columns"), replace(ADDED, name="Nearest adds")]
    columns += [Column("GPTQ's loss minus nearest's", "nats per token", "+.4f")]
    columns += [Column("Standard error over documents", digits=".4f")]
    columns += [Column("Squared error of the layers' outputs", "share of nearest's", ".2f")]
    config.save_table("gptq-against-nearest", columns, sorted(rows), config.n_draws, "quantisation")


def chosen_settings(
    bench: Bench, fmt: QuantFormat, name: str, config: CompressionFiguresConfig, run: RunConfig
) -> GPTQConfig:
    """The damping that adds least on documents of the training side, with a calibration that no row of a table uses."""
    act_order = "large inputs first" in name

    def losses() -> dict[str, float]:
        batches = calibration_batches(bench.tokenizer, config.n_calibration, 999)
        settings = [GPTQConfig(damping, act_order=act_order) for damping in DAMPINGS]
        made = [quantize_model(bench.model, Recipe("gptq", fmt, 0), batches, each) for each in settings]
        return {f"{each.damping:g}": bench.judged.damage(small)[0] for each, small in zip(settings, made, strict=True)}

    tried = remembered(config, run, f"damping, {config.n_held_out} documents, {fmt}, {act_order}", losses)
    return GPTQConfig(float(min(tried, key=tried.__getitem__)), act_order=act_order)


def measure_rounding(
    bench: Bench, recipe: Recipe, config: CompressionFiguresConfig, draw: int, settings: GPTQConfig | None
) -> dict[str, float]:
    """What one rounding adds, with its standard error over documents, beside nearest rounding on the same grid."""
    batches = None if recipe.method == "rtn" else bench.calibration(config, draw)
    small = quantize_model(bench.model, recipe, batches, settings)
    added, error = bench.exam.damage(small)
    numbers = {"added": added, "error": error, "right": bench.right(small)}
    if recipe.method == "gptq" and draw == 0:
        nearest = quantize_model(bench.model, Recipe("rtn", recipe.fmt, 0))
        paid = tuple(row_nats(nearest, bench.exam.rows))
        numbers["beside_error"] = replace(bench.exam, reference=paid).damage(small)[1]
        fresh = input_statistics(bench.model, calibration_batches(bench.tokenizer, config.n_calibration, 2000))
        numbers["outputs"] = mean_output_ratio(bench.model, small.dequantised(), nearest.dequantised(), fresh)
    return numbers


def mean_output_ratio(model: CausalLM, ours: CausalLM, theirs: CausalLM, fresh: dict[str, InputStatistics]) -> float:
    """Squared error of a layer's outputs, ours over theirs: the geometric mean over the layers of the blocks."""
    logs = []
    layers = [block_linears(each) for each in (model, ours, theirs)]
    for name, statistics in fresh.items():
        exact, own, other = (each[name].weight.detach() for each in layers)
        errors = [output_error(exact, rounded, statistics.second_moment) for rounded in (own, other)]
        logs.append(float(np.log(errors[0] / errors[1])))
    return float(np.exp(np.mean(logs)))


def plot_bits(rows: list[list]) -> Figure:
    """What quantisation to 4, 3 and 2 bits adds, over the bits that a weight really costs; 8 bits add nothing."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    marks = {"nearest, absmax": "o", "nearest, affine": "s", "GPTQ": "^", "AWQ": "v", "AWQ, then GPTQ": "D"}
    marks |= {f"nearest, {BY_ROW}": "x", f"GPTQ, large inputs first, {BY_ROW}": "+"}
    for name, mark in marks.items():
        points = [(row[1], row[4]) for row in rows if row[0].rpartition(",")[0] == name and row[1] < 6]
        bits, added = zip(*points, strict=True)
        means = [max(float(np.mean(value)), 1e-4) for value in added]
        spreads = [float(np.std(value, ddof=1)) if isinstance(value, list) and len(value) > 1 else 0 for value in added]
        dashed = "--" if name.endswith(BY_ROW) else "-"
        axis.errorbar(bits, means, spreads, marker=mark, label=name, capsize=3, ls=dashed)
    axis.set(yscale="log", xlabel="bits for each weight of the blocks, scales included")
    axis.set(ylabel="added to the loss (nats per token)", ylim=(1e-4, None))
    axis.legend(frameon=False, fontsize=8)
    return figure


GRIDS = (QuantFormat(3, 32), QuantFormat(4, 0))


def gptq_damping(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """How much to damp GPTQ's second moments, on a fine grid and a coarse one; without end it is nearest rounding."""
    bench = Bench.of(config)
    settings = {f"GPTQ, damping {damping:g}": GPTQConfig(damping) for damping in DAMPINGS}
    for damping in (0.01, 0.3):
        settings[f"GPTQ, damping {damping:g}, large inputs first"] = GPTQConfig(damping, act_order=True)
    nearest = [bench.added(quantize_model(bench.model, Recipe("rtn", fmt, 0))) for fmt in GRIDS]
    rows: list[list] = [["rounding to nearest", *nearest]]
    for name, settled in settings.items():
        rows.append([name])
        for fmt in GRIDS:
            made = (
                quantize_model(bench.model, Recipe("gptq", fmt, 0), bench.calibration(config, seed), settled)
                for seed in range(config.n_seeds)
            )
            rows[-1].append([bench.added(small) for small in made])
        print(rows[-1], flush=True)
    columns = [Column("Method"), *(replace(ADDED, name=f"{fmt}") for fmt in GRIDS)]
    config.save_table("gptq-damping", columns, rows, config.n_seeds)


def spectra(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """How unevenly the power of each layer's inputs is spread over directions, and their largest value."""
    model, tokenizer = load_course_model()
    found = input_statistics(model, calibration_batches(tokenizer, config.n_calibration, 1000))
    rows = []
    for name, statistics in found.items():
        if name.rpartition(".")[2] in ("k_proj", "v_proj", "up_proj"):
            continue  # they read what the layer before them in the list reads
        powers = torch.linalg.eigvalsh(statistics.second_moment)  # (columns), rising
        shares = powers / powers.sum()  # (columns)
        rows.append([f"`{name}`", *(part.item() for part in (shares[-1], shares.median(), statistics.max_abs.max()))])
    columns = [Column("Inputs of"), Column("Strongest direction", "share of power", ".0%")]
    columns += [Column("Median direction", "share of power", ".3%"), Column("Largest value", digits=".1f")]
    config.save_table("input-spectra", columns, rows)


def outliers(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """int8 x int8 with and without the outliers of large models, planted so that the function stays the same."""
    bench, rows = Bench.of(config), []
    fmt, batches = QuantFormat(8, 0, "absmax"), bench.calibration(config, 0)
    recipes = {
        "int8 weights, float activations": Recipe("rtn", fmt, 0),
        "int8 x int8, a scale per token": Recipe("llm.int8", fmt, 0, threshold=0.0),
        "LLM.int8, threshold 6": Recipe("llm.int8", fmt, 0),
        "SmoothQuant, strength 0.5": Recipe("smoothquant", fmt, 0),
    }
    models = {
        "course": bench.model,
        **{factor: plant_outliers(copy.deepcopy(bench.model), factor, [3, 77]) for factor in (10.0, 30.0, 100.0)},
    }
    for name, recipe in recipes.items():
        rows.append([name, *(bench.added(quantize_model(model, recipe, batches)) for model in models.values())])
        print(rows[-1], flush=True)
    columns = [Column("Method"), replace(ADDED, name="Course model")]
    columns += [replace(ADDED, name=f"Two channels {factor:g} times as large") for factor in (10, 30, 100)]
    config.save_table("outliers", columns, rows)


TUNING_RATES = (1.5e-4, 5e-4)  # peak learning rates of a model that has been trained before


def qat(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Training through rounding at 4 to 2 bits, beside GPTQ, and beside as many steps without rounding.

    The rate is the one that adds least on documents of the training side, with the first seed.
    """
    bench, rows = Bench.of(config), []
    for n_bits in (0, 4, 3, 2):

        def measured(rate: float, seed: int, n_bits: int = n_bits) -> dict[str, float]:
            what = f"qat, {config.qat_steps} steps at {rate:g}, {n_bits} bits, seed {seed}"
            return remembered(config, run, what, partial(measure_qat, bench, n_bits, rate, config, seed))

        best = min(TUNING_RATES, key=lambda rate: measured(rate, 0)["judged"])
        made = [measured(best, seed) for seed in range(config.n_seeds)]
        label = f"{n_bits} bits" if n_bits else "float32"
        before, answers, after, right = (
            [each[key] for each in made] for key in ("before", "answers", "after", "right")
        )
        rows.append([label, before, answers, f"{best:g}", after, right])
        print(rows[-1], flush=True)
    columns = [Column("Weights"), replace(ADDED, name="GPTQ adds"), RIGHT, Column("Rate")]
    columns += [replace(ADDED, name=f"{config.qat_steps} steps through rounding add"), RIGHT]
    config.save_table("qat", columns, rows, config.n_seeds)


def measure_qat(
    bench: Bench, n_bits: int, rate: float, config: CompressionFiguresConfig, seed: int
) -> dict[str, float]:
    """GPTQ and training through rounding at one width; 0 bits: no rounding at all, the same steps."""
    seed_everything(seed)
    training, fmt = student_training(config.qat_steps, rate), QuantFormat(n_bits or 8, 32)
    with training_batches(20_000, seed) as batches:
        if n_bits:
            before: CausalLM = quantize_model(bench.model, Recipe("gptq", fmt, 0), bench.calibration(config, seed))
            after: CausalLM = quantize_model(train_rounded(bench.model, fmt, batches, training), Recipe("rtn", fmt, 0))
        else:
            before, after = bench.model, train_masked(copy.deepcopy(bench.model), {}, batches, training)
    numbers = {"before": bench.added(before), "answers": bench.right(before), "judged": bench.judged.damage(after)[0]}
    return numbers | {"after": bench.added(after), "right": bench.right(after)}


class WithCache(nn.Module):
    """A model that reads everything through new caches of a kind, as in prefill: each query sees rounded keys."""

    def __init__(self, model: CausalLM, new_cache: Callable[[], QuantisedKVCache]) -> None:
        super().__init__()
        self.model, self.new_cache = model, new_cache

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model(token_ids, [self.new_cache() for _ in self.model.blocks])


def kv_cache(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Keys and values in 8 to 2 bits: bytes for each token, and what it costs."""
    bench = Bench.of(config)
    sizes = bench.model.config
    shape = (sizes.n_layers, sizes.n_kv_heads, sizes.d_head)
    rows = [["float32", 2.0 * sizes.n_layers * sizes.n_kv_heads * sizes.d_head * 4, 0.0]]
    for n_bits, keys_by in itertools.product((8, 4, 3, 2), ("token", "channel")):
        fmt = KVFormat(n_bits, keys_by)
        added = bench.added(WithCache(bench.model, partial(QuantisedKVCache, fmt)))
        rows.append([f"{n_bits} bits, keys by {keys_by}", quantised_kv_bytes(fmt, *shape), added])
        print(rows[-1], flush=True)
    columns = [Column("Cache"), Column("Size", "bytes per token", ",.0f"), ADDED]
    config.save_table("kv-cache", columns, rows)


# Pruning


PRUNINGS = (
    *(("magnitude", share) for share in (0.3, 0.5, 0.7)),
    *(("wanda", share) for share in (0.3, 0.5, 0.7)),
    *((what, 0.5) for what in ("magnitude-2:4", "wanda-2:4", "heads", "neurons", "layers")),
)
HEALING_RATE = 2e-3  # peak learning rate of a pruned model: of 5e-4 and 2e-3 better on training documents, for heads
HEALED = ("wanda-2:4", "heads", "layers")  # at a share of one half


def pruning(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Each rule: what it adds, what training on repairs, what it saves in bytes, and the speed of a forward pass."""
    bench, rows = Bench.of(config), []
    batches, ids = bench.calibration(config, 0), torch.randint(16, bench.model.config.vocab_size, (8, 128))
    works, made = {"dense": partial(forward, bench.model, ids)}, {}
    for what, share in PRUNINGS:
        made[what, share] = pruned(bench.model, what, share, batches)
        if share == 0.5:
            works[what] = partial(forward, made[what, share], ids)
    seconds = time_in_turns(works, 9)
    dense = float_bytes(bench.model)
    for (what, share), small in made.items():
        healed: list[float] | str = ""
        if share == 0.5 and what in HEALED:
            words = f"heal, {config.heal_steps} steps at {HEALING_RATE:g}, {what}, seed "
            healed = [
                remembered(config, run, words + f"{seed}", partial(heal, bench, small, config, seed))["added"]
                for seed in range(config.n_seeds)
            ]
        speed = short_ratio(seconds[what], seconds["dense"]) if share == 0.5 else ""
        rows.append([f"{what}, {share:.0%}", bench.added(small), healed, float_bytes(small) / dense, speed])
        print(rows[-1], flush=True)
    columns = [Column("What goes"), ADDED, replace(ADDED, name=f"After {config.heal_steps} more steps")]
    columns += [Column("Bytes left", digits=".0%"), Column("Speed", "times the dense model's")]
    config.save_table("pruning", columns, rows, config.n_seeds)


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)


@torch.no_grad()
def decode(model: CausalLM, ids: Tensor, n_steps: int) -> Tensor:
    """The likeliest ids after a prompt, one step after the other, through ends and for every kind of model alike.

    `generate` would stop where a damaged model ends its text, and takes a faster way for float models only.
    """
    caches, written = model.new_caches(), []
    for _ in range(n_steps):
        ids = model.logits(model.hidden(ids, caches)[:, -1]).argmax(-1, keepdim=True)  # (batch, 1)
        written.append(ids)
    return torch.cat(written, 1)  # (batch, n_steps)


def heal(bench: Bench, small: CausalLM, config: CompressionFiguresConfig, seed: int) -> dict[str, float]:
    """What a pruned model still adds after a little training on fresh documents, its zeros kept."""
    seed_everything(seed)
    model = copy.deepcopy(small)
    masks = {name: layer.weight.detach() != 0 for name, layer in block_linears(model).items()}
    with training_batches(10_000, seed) as batches:
        trained = train_masked(model, masks, batches, student_training(config.heal_steps, HEALING_RATE))
    return {"added": bench.added(trained)}


# Distillation


STUDENTS = {
    "scratch": DistillConfig("scratch"),
    "logits": DistillConfig("logits"),
    "logits and hidden states": DistillConfig("features"),
    "logits, a quarter on its own text (reverse KL)": DistillConfig("on-policy"),
}
SCARCE = 500  # documents; on more than these only the least and the largest budget are trained
CORPORA = ((20_000, tuple(STUDENTS)), (SCARCE, ("scratch", "logits")))


def distillation(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Students of one size for the same FLOPs, with and without the teacher, on much text and on little."""
    bench, rows, budgets = Bench.of(config), [], config.student_budgets
    for n_documents, names in CORPORA:
        for name in names:
            made = [
                [
                    measured_student(bench, name, n_documents, n_steps, seed, config, run)
                    for seed in range(config.n_seeds)
                ]
                if n_documents == SCARCE or n_steps in (budgets[0], budgets[-1])
                else []
                for n_steps in budgets
            ]
            gaps = [[each["gap"] for each in seeds] or "" for seeds in made]
            right = [each["right"] for each in made[-1]]
            rows.append([f"{n_documents:,} documents: {name}", made[-1][0]["steps"] / budgets[-1], *gaps, right])
            print(rows[-1], flush=True)
    nothing = [""] * (len(budgets) - 1)
    rows.append(["the teacher", "", *nothing, bench.gap(bench.model), bench.right(bench.model)])
    columns = [Column("Student"), Column("Steps", "share of scratch's", ".2f")]
    columns += [Column(f"Gap for the FLOPs of {n_steps} steps", "nats per token", ".3f") for n_steps in budgets]
    columns.append(replace(RIGHT, name=f"Right answers for {budgets[-1]}"))
    config.save_table("distillation", columns, rows, config.n_seeds)


def measured_student(
    bench: Bench, name: str, n_documents: int, n_steps: int, seed: int, config: CompressionFiguresConfig, run: RunConfig
) -> dict[str, float]:
    """One student's numbers, or those that an earlier run has left in --out."""
    what = f"student, {n_steps} steps, {n_documents} documents, {name}, seed {seed}"
    return remembered(config, run, what, partial(measure_student, bench, name, n_documents, n_steps, seed))


def measure_student(bench: Bench, name: str, n_documents: int, n_steps: int, seed: int) -> dict[str, float]:
    """One student: its steps and FLOPs, its gap and its right answers."""
    student, steps, cost = train_student(bench, STUDENTS[name], n_documents, n_steps, seed)
    return {"steps": steps, "cost": cost, "gap": bench.gap(student), "right": bench.right(student)}


def train_student(
    bench: Bench, settings: DistillConfig, n_documents: int, n_scratch: int, seed: int
) -> tuple[CausalLM, int, float]:
    """A student of half the width, the steps that the FLOPs of `n_scratch` from scratch pay for, and its share."""
    seed_everything(seed)
    sizes = ModelSizes(d_model=bench.model.config.d_model // 2, d_ff=bench.model.config.d_ff // 2)
    student = start_small(CausalLM(sizes.config(bench.tokenizer)))
    own, scratch = (step_flops(student, bench.model, each, 128) for each in (settings, DistillConfig("scratch")))
    n_steps = round(n_scratch * scratch / own)
    with training_batches(n_documents, seed) as batches:
        trained = distilled(student, bench.model, batches, settings, student_training(n_steps, 1e-2))
    return trained, n_steps, n_steps * own / (n_scratch * scratch)


# Speed and memory, in one run


class SparseLinear(nn.Module):
    """A pruned layer whose zeros are left out: the weight in compressed rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the layout a beta each time
            self.weight = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


def sparse_model(model: CausalLM, batches: list[Batch], sparsity: float) -> CausalLM:
    """The course model with a share of zeros, and the zeros left out."""
    made = copy.deepcopy(model)
    prune_weights(made, "wanda", sparsity, input_statistics(made, batches))
    for name, layer in block_linears(made).items():
        parent, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(parent), attribute, SparseLinear(layer))
    return made


Pair = tuple[list[float], list[float]]  # seconds of a model and of float32 in every round


def time_compression(n_rounds: int) -> list[tuple[str, float, Pair, Pair | None]]:
    """Each compressed model beside float32, all in turns: bytes, forward pass of 8 x 128 tokens, one row's decoding."""
    model, tokenizer = load_course_model()
    batches = calibration_batches(tokenizer, 64, 0)
    rows8, groups4 = QuantFormat(8, 0, "absmax"), QuantFormat(4, 32)
    models: dict[str, CausalLM] = {
        "float32": model,
        "int8 weights, unpacked in each call": quantize_model(model, Recipe("rtn", rows8)),
        "int4 weights in groups, unpacked in each call": quantize_model(model, Recipe("rtn", groups4)),
        "int4, laid out in float once": quantize_model(model, Recipe("rtn", groups4)).dequantised(),
        "LLM.int8": quantize_model(model, Recipe("llm.int8", rows8)),
        "half of the weights at zero": pruned(model, "wanda", 0.5, batches),
        "half at zero, left out (CSR)": sparse_model(model, batches, 0.5),
        "nine tenths at zero, left out (CSR)": sparse_model(model, batches, 0.9),
        "half of the neurons gone": pruned(model, "neurons", 0.5, batches),
        "half of the heads gone": pruned(model, "heads", 0.5, batches),
        "half of the blocks gone": pruned(model, "layers", 0.5, batches),
    }
    ids = torch.randint(16, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    forwards = time_in_turns({name: partial(forward, each, ids) for name, each in models.items()}, n_rounds)
    sparse = [name for name in models if name.endswith("(CSR)")]
    writes = {name: partial(decode, each, ids[:1, :8], 24) for name, each in models.items() if name not in sparse}
    decodes = time_in_turns(writes, n_rounds)
    found = []
    for name, each in models.items():
        n_bytes = each.n_bytes if isinstance(each, QuantisedLM) else float_bytes(each)
        if name in sparse:
            share = 0.5 if name.startswith("half") else 0.9
            sizes = [layer.weight.shape for layer in block_linears(model).values()]
            n_bytes = float_bytes(model) + sum(csr_bytes(*size, share) - 4 * size.numel() for size in sizes)
        written = (decodes[name], decodes["float32"]) if name in decodes else None
        found.append((name, n_bytes, (forwards[name], forwards["float32"]), written))
    return found


def short_ratio(ours: list[float], theirs: list[float]) -> str:
    """Median and range of a ratio of speeds, as a cell of a table."""
    return speed_ratio(ours, theirs).replace("x the speed", "").replace(f" in {len(ours)} rounds", "")


def compression_speed(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Real speed and memory of every kind of compressed model against float32, in one run."""
    columns = [Column("Model"), Column("Tensors", "MiB", ".2f")]
    columns += [Column("Speed of a forward pass", "times float32's"), Column("Speed of decoding", "times float32's")]
    rows = [
        [name, n_bytes / 2**20, short_ratio(*forwards), short_ratio(*decodes) if decodes else ""]
        for name, n_bytes, forwards, decodes in time_compression(7)
    ]
    config.save_table("compression-speed", columns, rows)


def bench_compression(n_rounds: int) -> None:
    """What `bench` prints of this half of the topic."""
    for name, n_bytes, forwards, decodes in time_compression(n_rounds):
        if name != "float32":
            print(f"{speed_line(f'{name}, forward pass', 'float32', *forwards)}; {n_bytes / 2**20:.2f} MiB")
            if decodes:
                print(speed_line(f"{name}, decoding", "float32", *decodes))


def compression_breaks(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = []
    for name, (show, _) in COMPRESSION_BREAKS.items():
        for what, sound, broken in show(run):
            rows.append([f"`{name}`", what.partition(": ")[2], sound, broken])
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save_table("compression-breaks", columns, rows)


COMPRESSION_EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "quantisation": (quantisation, 900),
    "gptq-damping": (gptq_damping, 80),
    "input-spectra": (spectra, 5),
    "outliers": (outliers, 25),
    "qat": (qat, 600),
    "kv-cache": (kv_cache, 25),
    "pruning": (pruning, 500),
    "distillation": (distillation, 2400),
    "compression-speed": (compression_speed, 20),
    "compression-breaks": (compression_breaks, 5),
}
