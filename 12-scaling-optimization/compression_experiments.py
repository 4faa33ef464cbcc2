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
from gpt2 import SamplingConfig
from gptq import Batch, GPTQConfig, block_linears, calibration_batches, input_statistics
from modern_llm_architectures import CausalLM
from pruning import csr_bytes, prune_weights, pruned, train_masked
from quantized_layers import KVFormat, QuantisedKVCache, quantised_kv_bytes
from quantized_model import Exam, QuantisedLM, Recipe, float_bytes, quantize_model, train_rounded
from shards import ShardBatches, ShardConfig
from tiny_world import World
from weight_quantization import QuantFormat, bits_per_weight
from workbench import (
    Column,
    RunConfig,
    check_range,
    describe_machine,
    save_figure,
    save_results,
    seed_everything,
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
    n_held_out: int = 500  # held-out documents to examine each model with
    n_questions: int = 60  # questions of each topic
    n_calibration: int = 128  # documents that a quantiser or pruner looks at
    qat_steps: int = 60  # optimizer steps of training through rounding
    heal_steps: int = 40  # optimizer steps of a pruned model
    student_steps: int = 110  # optimizer steps of a student from scratch; the others get the same FLOPs
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_questions", "n_calibration", least=1)
        check_range(self, "n_held_out", "qat_steps", "heal_steps", "student_steps", least=2)

    def save_table(self, name: str, columns: list[Column], rows: list[list], n_seeds: int = 1, of: str = "") -> None:
        results = self.folder / "results.json"
        save_results(results, name, columns, rows, range(n_seeds), f"{COMMAND} {of or name}")


@dataclass(frozen=True)
class Bench:
    """The float model, its tokenizer and its exam: what all experiments compare with."""

    model: CausalLM
    tokenizer: CourseTokenizer
    exam: Exam
    questions: ExamConfig

    @classmethod
    def of(cls, config: CompressionFiguresConfig) -> "Bench":
        model, tokenizer = load_course_model()
        exam = Exam.of(model, tokenizer, World().documents(config.n_held_out, 21, "validation"))
        return cls(model, tokenizer, exam, ExamConfig(n_questions=config.n_questions, exam_seed=22))

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


def quantisation(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Every method at 8, 4, 3 and 2 bits: what it adds to the loss, and the right answers that are left."""
    bench, rows = Bench.of(config), []
    floor_gap = bench.gap(bench.model)  # all gaps are to the same floor: what is added to the loss is added to the gap
    rows.append(["float32", 32.0, 0.0, floor_gap, bench.right(bench.model)])
    settings = [("rtn", QuantFormat(bits, 32, "absmax"), "nearest, absmax") for bits in (8, 4, 3, 2)]
    settings += [("rtn", QuantFormat(bits, 32), "nearest, affine") for bits in (8, 4, 3, 2)]
    settings += [("rtn", QuantFormat(4, size), f"nearest, one scale per {name}") for size, name in PLACES]
    for method, name in (("gptq", "GPTQ"), ("awq", "AWQ"), ("awq+gptq", "AWQ, then GPTQ")):
        settings += [(method, QuantFormat(bits, 32), name) for bits in (4, 3, 2)]
    for method, fmt, name in settings:
        added, right = [], 0.0
        for seed in range(1 if method == "rtn" else config.n_seeds):
            batches = None if method == "rtn" else bench.calibration(config, seed)
            small = quantize_model(bench.model, Recipe(method, fmt, 0), batches)
            added.append(bench.added(small))
            right = right if seed else bench.right(small)
        gaps, one = [floor_gap + each for each in added], method == "rtn"
        label = f"{name}, {fmt.n_bits} bits"
        rows.append([label, mean_bits(bench.model, fmt), *(part[0] if one else part for part in (added, gaps)), right])
        print(rows[-1], flush=True)
    columns = [Column("Weights of the blocks"), Column("Bits for each", "with scales", ".2f"), ADDED, GAP, RIGHT]
    config.save_table("quantisation", columns, rows, config.n_seeds)
    save_figure(plot_bits(rows), config.folder / "quantisation.svg")


PLACES = ((-1, "matrix"), (0, "row"), (64, "64"), (16, "16"))


def plot_bits(rows: list[list]) -> Figure:
    """What quantisation adds, over the bits that a weight really costs."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    marks = {"nearest, absmax": "o", "nearest, affine": "s", "GPTQ": "^", "AWQ": "v", "AWQ, then GPTQ": "D"}
    for name, mark in marks.items():
        points = [(row[1], row[2]) for row in rows if row[0].rpartition(",")[0] == name]
        bits, added = zip(*points, strict=True)
        means = [max(float(np.mean(value)), 1e-5) for value in added]
        spreads = [float(np.std(value, ddof=1)) if isinstance(value, list) and len(value) > 1 else 0 for value in added]
        axis.errorbar(bits, means, spreads, marker=mark, label=name, capsize=3)
    axis.set(yscale="log", xlabel="bits for each weight of the blocks, scales included", xlim=(2, 9.2))
    axis.set(ylabel="added to the loss (nats per token)", ylim=(1e-5, None))
    axis.legend(frameon=False)
    return figure


DAMPINGS = (0.01, 0.1, 0.3, 1.0)
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


def qat(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Training through rounding at 4, 3 and 2 bits, beside GPTQ, and beside as many steps without rounding."""
    bench, rows = Bench.of(config), []
    training = student_training(config.qat_steps, 2e-3)
    for n_bits in (0, 4, 3, 2):
        fmt, before, after = QuantFormat(n_bits or 8, 32), [], []
        for seed in range(config.n_seeds):
            seed_everything(seed)
            with training_batches(20_000, seed) as batches:
                if n_bits:
                    recipe = Recipe("gptq", fmt, 0)
                    before.append(bench.added(quantize_model(bench.model, recipe, bench.calibration(config, seed))))
                    trained = train_rounded(bench.model, fmt, batches, training)
                    after.append(bench.added(quantize_model(trained, Recipe("rtn", fmt, 0))))
                else:
                    before.append(0.0)
                    after.append(bench.added(train_masked(copy.deepcopy(bench.model), {}, batches, training)))
        rows.append([f"{n_bits} bits" if n_bits else "float32", before, after])
        print(rows[-1], flush=True)
    columns = [
        Column("Weights"),
        replace(ADDED, name="GPTQ adds"),
        replace(ADDED, name="Training through rounding adds"),
    ]
    config.save_table("qat", columns, rows, config.n_seeds)


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
HEALED = ("magnitude", "wanda", "wanda-2:4", "heads", "neurons", "layers")  # at a share of one half


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
            healed = [heal(bench, small, config, seed) for seed in range(config.n_seeds)]
        speed = speed_ratio(seconds[what], seconds["dense"]).partition("x")[0] if share == 0.5 else ""
        size = float_bytes(small) / dense
        rows.append([f"{what}, {share:.0%}", bench.added(small), healed, size, f"{speed}"])
        print(rows[-1], flush=True)
    columns = [Column("What goes"), ADDED, replace(ADDED, name=f"After {config.heal_steps} more steps")]
    columns += [Column("Bytes left", digits=".0%"), Column("Speed", "times the dense model's")]
    config.save_table("pruning", columns, rows, config.n_seeds)


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)


def heal(bench: Bench, small: CausalLM, config: CompressionFiguresConfig, seed: int) -> float:
    """What a pruned model still adds after a little training on fresh documents, its zeros kept."""
    seed_everything(seed)
    model = copy.deepcopy(small)
    masks = {name: layer.weight.detach() != 0 for name, layer in block_linears(model).items()}
    with training_batches(10_000, seed) as batches:
        return bench.added(train_masked(model, masks, batches, student_training(config.heal_steps, 2e-3)))


# Distillation


STUDENTS = (
    ("scratch", DistillConfig("scratch")),
    ("logits", DistillConfig("logits")),
    ("logits and hidden states", DistillConfig("features")),
    ("logits, a quarter on its own text (reverse KL)", DistillConfig("on-policy")),
)


def distillation(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Students of one size for the same FLOPs, with and without the teacher, on much text and on little."""
    bench, rows = Bench.of(config), []
    for n_documents, students in ((20_000, STUDENTS), (500, STUDENTS[:2])):
        for name, settings in students:
            gaps, steps, right = [], 0, []
            for seed in range(config.n_seeds):
                student, steps = train_student(bench, settings, config, n_documents, seed)
                gaps.append(bench.gap(student))
                right.append(bench.right(student))
            rows.append([f"{n_documents:,} documents: {name}", float(steps), gaps, right])
            print(rows[-1], flush=True)
    rows.append(["the teacher", "", bench.gap(bench.model), bench.right(bench.model)])
    columns = [Column("Student"), Column("Steps", digits=",.0f"), GAP, RIGHT]
    config.save_table("distillation", columns, rows, config.n_seeds)


def train_student(
    bench: Bench, settings: DistillConfig, config: CompressionFiguresConfig, n_documents: int, seed: int
) -> tuple[CausalLM, int]:
    """A student of half the width, and the steps that the FLOPs of `student_steps` from scratch pay for."""
    seed_everything(seed)
    sizes = ModelSizes(d_model=bench.model.config.d_model // 2, d_ff=bench.model.config.d_ff // 2)
    student = start_small(CausalLM(sizes.config(bench.tokenizer)))
    cost = [step_flops(student, bench.model, chosen, 128) for chosen in (settings, DistillConfig("scratch"))]
    n_steps = round(config.student_steps * cost[1] / cost[0])
    with training_batches(n_documents, seed) as batches:
        return distilled(student, bench.model, batches, settings, student_training(n_steps, 1e-2)), n_steps


# Speed and memory, in one run


class SparseLinear(nn.Module):
    """A pruned layer whose zeros are left out: the weight in compressed rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the layout a beta each time
            self.weight = layer.weight.detach().to_sparse_csr()

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.flatten(0, -2).T).T.reshape(*x.shape[:-1], -1)


def sparse_model(model: CausalLM, batches: list[Batch], sparsity: float) -> CausalLM:
    """The course model with a share of zeros, and the zeros left out."""
    made = copy.deepcopy(model)
    prune_weights(made, "wanda", sparsity, input_statistics(made, batches))
    for name, layer in block_linears(made).items():
        parent, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(parent), attribute, SparseLinear(layer))
    return made


def measure_compression(n_rounds: int = 7) -> list[list]:
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
    sampling = SamplingConfig(24, temperature=0.0)
    forwards = time_in_turns({name: partial(forward, each, ids) for name, each in models.items()}, n_rounds)
    sparse = [name for name in models if name.endswith("(CSR)")]
    writes = {
        name: partial(each.generate, ids[:1, :8], sampling) for name, each in models.items() if name not in sparse
    }
    decodes = time_in_turns(writes, n_rounds)
    found = []
    for name, each in models.items():
        n_bytes = each.n_bytes if isinstance(each, QuantisedLM) else float_bytes(each)
        if name in sparse:
            share = 0.5 if name.startswith("half") else 0.9
            sizes = [layer.weight.shape for layer in block_linears(model).values()]
            n_bytes = float_bytes(model) + sum(csr_bytes(*size, share) - 4 * size.numel() for size in sizes)
        speed = [short_ratio(forwards[name], forwards["float32"])]
        speed.append(short_ratio(decodes[name], decodes["float32"]) if name in decodes else "")
        found.append([name, n_bytes / 2**20, *speed])
    return found


def short_ratio(ours: list[float], theirs: list[float]) -> str:
    """Median and range of a ratio of speeds, as a cell of a table."""
    return speed_ratio(ours, theirs).replace("x the speed", "").replace(f" in {len(ours)} rounds", "")


def compression_speed(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Real speed and memory of every kind of compressed model against float32, in one run."""
    columns = [Column("Model"), Column("Tensors", "MiB", ".2f")]
    columns += [Column("Speed of a forward pass", "times float32's"), Column("Speed of decoding", "times float32's")]
    config.save_table("compression-speed", columns, measure_compression())


def bench_compression(run: RunConfig) -> None:
    """What `bench` prints of this half of the topic."""
    print(describe_machine())
    print(f"{'model':48} {'MiB':>6} {'forward':>22} {'decoding':>22}   times float32's speed, median (range)")
    for name, size, forwards, decodes in measure_compression():
        print(f"{name:48} {size:6.2f} {forwards:>22} {decodes:>22}")


def compression_breaks(config: CompressionFiguresConfig, run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = []
    for name, (show, _) in COMPRESSION_BREAKS.items():
        for what, sound, broken in show(run):
            rows.append([f"`{name}`", what.partition(": ")[2], sound, broken])
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save_table("compression-breaks", columns, rows)


COMPRESSION_EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "quantisation": (quantisation, 240),
    "gptq-damping": (gptq_damping, 80),
    "input-spectra": (spectra, 5),
    "outliers": (outliers, 25),
    "qat": (qat, 300),
    "kv-cache": (kv_cache, 25),
    "pruning": (pruning, 240),
    "distillation": (distillation, 420),
    "compression-speed": (compression_speed, 20),
    "compression-breaks": (compression_breaks, 5),
}
