"""Topic 10 - Training Cost: FLOPs term by term, hours, money, memory, messages and bubbles of a training run.

python 10-pretraining-llms/pretraining_llms.py estimate                                  # budgets of published models
python 10-pretraining-llms/pretraining_llms.py estimate --model Llama-3.1-8B --n-tokens 15e12 --n-gpus 1024
python 10-pretraining-llms/pretraining_llms.py estimate --model Llama-3.1-8B --price 2.5 # dollars for a GPU hour

Kaplan et al. 2020 (6ND, arXiv 2001.08361), Chowdhery et al. 2022 (MFU, arXiv 2204.02311, appendix B), Rajbhandari et
al. 2020 (ZeRO, arXiv 1910.02054).
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_folders import read_config
from llm_calculators import LLAMA3_SCALING, PUBLISHED, count_parameters, forward_flops
from llm_config import ModelConfig, config_from_folder
from pipeline_parallel import bubble_share
from workbench import HARDWARE, Hardware, check_name, check_range, shown

MODELS = PUBLISHED | {
    "Llama-2-70B": ModelConfig(32000, 8192, 80, 64, 8, 128, 28672, 4096, tie_embeddings=False),
    "Llama-3.1-405B": ModelConfig(
        128256,
        16384,
        126,
        128,
        8,
        128,
        53248,
        131072,
        rope_theta=5e5,
        rope_scaling=LLAMA3_SCALING,
        tie_embeddings=False,
    ),
}
GPUS = {gpu.name: gpu for gpu in HARDWARE}
HOUR = 3600.0  # seconds


# Arithmetic


def six_nd(n_parameters: float, n_tokens: float) -> float:
    """6 N D: two FLOPs for each weight and token forward, four backward (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * n_parameters * n_tokens


def training_flops(config: ModelConfig, n_tokens: float, seq_len: int) -> dict[str, float]:
    """FLOPs of training on `n_tokens` in rows of `seq_len`, term by term; the sum is what the model needs at least.

    matrices_forward: 2 for each weight that multiplies a token. matrices_backward: twice as many, one product for the
    gradient of the input and one for that of the weight. attention_forward: scores and weighted sums over the keys
    that a causal query meets; attention_backward: twice as many. Recomputed activations are not counted.
    """
    forward = forward_flops(config, seq_len)
    return {
        "matrices_forward": forward["matrices"] * n_tokens,
        "matrices_backward": 2 * forward["matrices"] * n_tokens,
        "attention_forward": forward["scores"] * n_tokens,
        "attention_backward": 2 * forward["scores"] * n_tokens,
    }


def model_flops_utilisation(flops: float, seconds: float, n_gpus: int, peak: float) -> float:
    """Share of the processors' peak that the model's own FLOPs take, 0 to 1 (Chowdhery et al. 2022)."""
    if min(seconds, n_gpus, peak) <= 0:
        raise ValueError(f"seconds, n_gpus and peak must be above 0, got {(seconds, n_gpus, peak)}")
    return flops / (seconds * n_gpus * peak)


def training_hours(flops: float, n_gpus: int, peak: float, mfu: float) -> float:
    """Hours of wall clock that a run takes on `n_gpus` at a utilisation."""
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}")
    return flops / (n_gpus * peak * mfu) / HOUR


# Memory: what each GPU holds for each weight


def zero_bytes(n_parameters: float, n_gpus: int, stage: int, weight_bytes: float = 2) -> dict[str, float]:
    """Bytes on each GPU for weights, gradients and AdamW's state under ZeRO stage 0 to 3, without activations.

    weight_bytes 2: bf16 weights and gradients, and 12 bytes of fp32 master weight, mean and square (Rajbhandari et al.
    2020, section 3.1). weight_bytes 4: everything is fp32 and there is no master copy, so the state has 8. Stage 1
    shares the state, stage 2 the gradients too, stage 3 all three.
    """
    if stage not in (0, 1, 2, 3) or n_gpus < 1 or weight_bytes not in (2, 4):
        raise ValueError(f"stage must be 0 to 3, n_gpus >= 1, weight_bytes 2 or 4; got {(stage, n_gpus, weight_bytes)}")
    parts = {"weights": weight_bytes, "gradients": weight_bytes, "optimizer": 12 if weight_bytes == 2 else 8}
    shared_from = {"optimizer": 1, "gradients": 2, "weights": 3}
    return {name: each * n_parameters / (n_gpus if stage >= shared_from[name] else 1) for name, each in parts.items()}


# Messages: bytes that each process sends


def ring_bytes(n_bytes: float, size: int, kind: str = "all_reduce") -> float:
    """Bytes that each of `size` processes sends for a message of n_bytes by ring (Patarasuk and Yuan 2009)."""
    if size < 1:
        raise ValueError(f"size must be >= 1 process, got {size}")
    turns = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    return turns[check_name("collective", kind, turns)] * (size - 1) / size * n_bytes


def data_parallel_bytes(n_bytes: float, size: int, scheme: str = "ddp", n_micro: int = 1) -> float:
    """Bytes that each process sends in a step for gradients and weights of n_bytes each.

    ddp: one all-reduce. zero1: reduce-scatter and all-gather. zero2: a reduce-scatter for each of n_micro
    micro-batches, and one all-gather. zero3: for each micro-batch a reduce-scatter, and all-gathers of the weights for
    the forward and again for the backward pass.
    """
    turns = {"ddp": 2, "zero1": 2, "zero2": n_micro + 1, "zero3": 3 * n_micro}
    return turns[check_name("scheme", scheme, turns)] * ring_bytes(n_bytes, size, "all_gather")


def tensor_parallel_bytes(config: ModelConfig, n_tokens: int, size: int, bytes_per_number: float = 2) -> float:
    """Bytes that each of `size` processes sends in a step on n_tokens: 4 all-reduces of the stream in every block.

    Two forward, at the end of attention and of the feed-forward network, two backward at their start (Shoeybi et al.
    2019, section 3). With sequence parallelism each is a reduce-scatter and an all-gather: as many bytes.
    """
    return 4 * config.n_layers * ring_bytes(n_tokens * config.d_model * bytes_per_number, size)


# Published budgets


@dataclass(frozen=True)
class PublishedRun:
    """What a report says of a pretraining run; 0 where it is silent."""

    model: str  # a name in MODELS, or one of which only the numbers are known
    n_parameters: float  # those that a token meets, embeddings included
    n_tokens: float  # of pretraining
    seq_len: int
    gpu: str  # a name in GPUS whose peak is that of the one that was used, or ""
    gpu_hours: float  # of pretraining alone
    flops: float  # stated in the report
    source: str


RUNS = [
    PublishedRun("GPT-3", 174.6e9, 300e9, 2048, "", 0, 3.14e23, "arXiv 2005.14165, table D.1"),
    PublishedRun("Chinchilla", 70e9, 1.4e12, 2048, "", 0, 5.76e23, "arXiv 2203.15556, section 4: the budget of Gopher"),
    PublishedRun("LLaMA-65B", 65.2e9, 1.4e12, 2048, "A100 80GB SXM", 1_022_362, 0, "arXiv 2302.13971, table 15"),
    PublishedRun("Llama-2-7B", 0, 2e12, 4096, "A100 80GB SXM", 184_320, 0, "arXiv 2307.09288, table 2"),
    PublishedRun("Llama-2-70B", 0, 2e12, 4096, "A100 80GB SXM", 1_720_320, 0, "arXiv 2307.09288, table 2"),
    PublishedRun(
        *("Llama-3.1-405B", 0, 15.6e12, 8192, "H100 SXM", 30.84e6, 3.8e25),
        "arXiv 2407.21783, section 3; hours: model card, July 2024",
    ),
    PublishedRun(
        *("DeepSeek-V3", 0, 14.8e12, 4096, "H100 SXM", 2.664e6, 0),
        "arXiv 2412.19437, table 1 (H800, whose bf16 peak is the H100's; its products ran in fp8)",
    ),
]


@dataclass(frozen=True)
class Budget:
    """A published run, computed again."""

    run: PublishedRun
    n_parameters: float  # active, N of 6ND
    six_nd: float
    flops: float  # term by term where the config is known, else 6ND
    stated: float  # FLOPs of the report; 0: none
    mfu: float  # implied by the GPU hours; 0: not stated


def recomputed(run: PublishedRun) -> Budget:
    """6ND, the sum of all terms, and the utilisation that the stated GPU hours imply."""
    config = MODELS.get(run.model)
    n_parameters = run.n_parameters or count_parameters(config).active
    simple = six_nd(n_parameters, run.n_tokens)
    flops = sum(training_flops(config, run.n_tokens, run.seq_len).values()) if config else simple
    mfu = 0.0
    if run.gpu_hours:
        mfu = model_flops_utilisation(flops, run.gpu_hours * HOUR, 1, GPUS[run.gpu].flops)
    return Budget(run, n_parameters, simple, flops, run.flops, mfu)


# The verb


@dataclass(frozen=True)
class EstimateConfig:
    """A training run to be priced."""

    model: str = ""  # a published model, such as Llama-3.1-8B; empty: list published budgets
    checkpoint: Path | None = None  # or a folder whose config.json says what the model is
    n_tokens: float = 0.0  # tokens of training; 0: 20 for each parameter
    seq_len: int = 4096  # tokens in a row
    batch_tokens: float = 4e6  # tokens of an optimizer step
    n_gpus: int = 64  # processors
    gpu: str = "H100 SXM"  # which one
    mfu: float = 0.4  # share of its peak that the run will reach; published runs reach 0.3 to 0.45
    price: float = 0.0  # dollars for a GPU hour, from your own offer; 0: no money in the answer
    tensor_size: int = 1  # processes among which each layer is split
    pipeline_size: int = 1  # stages
    n_micro: int = 32  # micro-batches of a step in the pipeline

    def __post_init__(self) -> None:
        check_range(self, "n_tokens", "price", least=0)
        check_range(self, "seq_len", "n_gpus", "tensor_size", "pipeline_size", "n_micro", least=1)
        check_range(self, "batch_tokens", above=0)
        check_range(self, "mfu", above=0, most=1)
        check_name("gpu", self.gpu, GPUS)
        if self.model:
            check_name("model", self.model, MODELS)
        if self.n_gpus % (self.tensor_size * self.pipeline_size):
            raise ValueError(
                f"n_gpus={self.n_gpus} is not divisible by tensor_size * pipeline_size = "
                f"{self.tensor_size * self.pipeline_size}"
            )


def estimate(config: EstimateConfig) -> None:
    """What a training run costs: FLOPs term by term, hours, money, memory of each GPU, messages, bubble."""
    if not config.model and not config.checkpoint:
        print_budgets()
        return
    model = config_from_folder(read_config(config.checkpoint)) if config.checkpoint else MODELS[config.model]
    counted = count_parameters(model)
    n_tokens = config.n_tokens or 20.0 * counted.active
    terms = training_flops(model, n_tokens, config.seq_len)
    total, gpu = sum(terms.values()), GPUS[config.gpu]
    name = config.model or shown(config.checkpoint)
    print(f"{name}: {counted.total:,} parameters, {counted.active:,} active; {n_tokens:.3g} tokens")
    for term, flops in terms.items():
        print(f"  {term:20} {flops:9.3g} FLOP  {flops / total:6.1%}")
    print(f"  {'sum':20} {total:9.3g} FLOP; 6ND says {six_nd(counted.active, n_tokens):.3g}")
    bubble = bubble_share(config.pipeline_size, config.n_micro)
    hours = training_hours(total, config.n_gpus, gpu.flops, config.mfu)
    print(f"{config.n_gpus} x {gpu.name} at MFU {config.mfu:.0%}: {hours:,.1f} hours, {hours / 24:,.1f} days")
    print(f"  {n_tokens / hours / HOUR:,.0f} tokens/s, {hours * config.n_gpus:,.0f} GPU hours")
    if config.price:
        print(f"  {hours * config.n_gpus * config.price:,.0f} dollars at {config.price:g} dollars for a GPU hour")
    print_parallel(config, model, counted.total, gpu, bubble)


def print_parallel(config: EstimateConfig, model: ModelConfig, n_parameters: int, gpu: Hardware, bubble: float) -> None:
    ways = config.tensor_size * config.pipeline_size
    data_size = config.n_gpus // ways
    share = n_parameters / ways
    split = f"{data_size} data-parallel x {config.tensor_size} tensor x {config.pipeline_size} pipeline"
    print(f"{split}; bubble {bubble:.1%}")
    for stage in range(4):
        held = sum(zero_bytes(share, data_size, stage).values())
        scheme = "ddp" if stage == 0 else f"zero{stage}"
        sent = data_parallel_bytes(2 * share, data_size, scheme)
        fits = "" if held < gpu.memory else f", more than the {gpu.memory / 1e9:.0f} GB there are"
        print(f"  ZeRO stage {stage}: {held / 1e9:8.1f} GB a GPU{fits}; sends {sent / 1e9:.2f} GB a step")
    tokens = int(config.batch_tokens / data_size)
    sent = tensor_parallel_bytes(model, tokens, config.tensor_size) / config.pipeline_size
    print(f"  tensor parallelism sends {sent / 1e9:.2f} GB a GPU and step")


def print_budgets() -> None:
    heads = f"{'model':16} {'active N':>9} {'tokens':>8} {'6ND':>9} {'all terms':>9} {'stated':>9}"
    print(f"{heads} {'GPU hours':>10} {'MFU':>6}  source")
    for budget in map(recomputed, RUNS):
        run = budget.run
        stated = f"{budget.stated:9.3g}" if budget.stated else f"{'-':>9}"
        hours = f"{run.gpu_hours:10,.0f} {budget.mfu:6.1%}" if run.gpu_hours else f"{'-':>10} {'-':>6}"
        sizes = f"{budget.n_parameters:9.3g} {run.n_tokens:8.3g} {budget.six_nd:9.3g} {budget.flops:9.3g}"
        print(f"{run.model:16} {sizes} {stated} {hours}  {run.source}")
