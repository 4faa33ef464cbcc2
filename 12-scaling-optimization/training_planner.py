"""Topic 12 - Training planner: memory and time of a training on 1 to 1,024 GPUs and more, before anything is started.

python 12-scaling-optimization/scaling_optimization.py plan --model Llama-3.1-8B --n-gpus 64
python 12-scaling-optimization/scaling_optimization.py plan --model Llama-3.1-70B --n-gpus 256 --tensor-size 8

Data, tensor and pipeline parallelism, ZeRO 0 to 3, recomputation, gradient accumulation. Rajbhandari et al. 2020 (ZeRO,
arXiv 1910.02054), Narayanan et al. 2021 (Megatron-LM, arXiv 2104.04473), Korthikanti et al. 2022 (activations, arXiv
2205.05198), Chowdhery et al. 2022 (MFU and HFU, PaLM, arXiv 2204.02311). Bytes are bytes, GB are 10^9 of them.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llm_calculators import attention_parameters, count_parameters
from llm_config import ModelConfig
from pipeline_parallel import bubble_share
from training_cost import GPUS, HOUR, MODELS, data_parallel_bytes, ring_bytes, six_nd, training_flops, zero_bytes
from workbench import Hardware, check_name, check_range

RECOMPUTE = ("none", "selective", "full")  # what is computed again: nothing; all but the matrix products; everything
RESERVED = 0.1  # share of a GPU's memory that the plan leaves to the driver, to buffers and to fragments
KERNEL_SHARE = 0.57  # share of the peak that matrix products reach while they run: the median over MEGATRON below


@dataclass(frozen=True)
class Links:
    """How fast GPUs of one kind talk, bytes per second and GPU in one direction; eight to a node."""

    inside: float  # between the GPUs of a node
    outside: float  # between nodes
    source: str


LINKS = {
    "A100 80GB SXM": Links(300e9, 25e9, "NVLink of the A100 data sheet; arXiv 2104.04473: one 200 Gb/s link for a GPU"),
    "H100 SXM": Links(450e9, 50e9, "NVLink of the H100 data sheet; arXiv 2407.21783: 400 Gb/s for a GPU"),
    "H200 SXM": Links(450e9, 50e9, "as the H100"),
}
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Plan:
    """How a training is laid out. A sequence is a row of seq_len tokens."""

    n_gpus: int = 8  # processors
    tensor_size: int = 1  # processors that share each layer
    pipeline_size: int = 1  # stages
    zero_stage: int = 0  # 0: weights, gradients and state on every data-parallel processor; 3: all three shared out
    micro_batch_size: int = 1  # sequences in one forward pass
    batch_size: int = 512  # sequences of an optimizer step
    seq_len: int = 4096  # tokens of a sequence
    recompute: Literal[RECOMPUTE] = "none"  # done again in the backward pass: nothing, all but the products, everything
    n_chunks: int = 1  # parts of the model on each stage, interleaved (Narayanan et al. 2021, section 2.2.2)

    @property
    def data_size(self) -> int:
        return self.n_gpus // (self.tensor_size * self.pipeline_size)

    @property
    def n_micro(self) -> int:
        """Micro-batches of a step in each pipeline: gradient accumulation."""
        return self.batch_size // (self.data_size * self.micro_batch_size)

    @property
    def layout(self) -> str:
        extra = f", {self.n_chunks} chunks" if self.n_chunks > 1 else ""
        sizes = f"{self.data_size} data x {self.tensor_size} tensor x {self.pipeline_size} pipeline"
        return (
            f"{sizes}, ZeRO {self.zero_stage}, {self.n_micro} micro-batches of {self.micro_batch_size}, "
            f"recompute {self.recompute}{extra}"
        )


def check_plan(model: ModelConfig, plan: Plan) -> None:
    """Raise ValueError, with the value and a remedy, for a layout that does not divide."""
    counts = ("n_gpus", "tensor_size", "pipeline_size", "micro_batch_size", "batch_size", "seq_len", "n_chunks")
    check_range(plan, *counts, least=1)
    check_range(plan, "zero_stage", least=0, most=3)
    check_name("recompute", plan.recompute, RECOMPUTE)
    ways = plan.tensor_size * plan.pipeline_size
    if plan.n_gpus % ways:
        raise ValueError(f"n_gpus={plan.n_gpus} is not divisible by tensor_size * pipeline_size = {ways}")
    if model.n_heads % plan.tensor_size:
        raise ValueError(
            f"tensor_size={plan.tensor_size} does not divide the {model.n_heads} heads; choose a divisor of them"
        )
    if plan.pipeline_size * plan.n_chunks > model.n_layers:
        raise ValueError(
            f"pipeline_size={plan.pipeline_size} times {plan.n_chunks} chunks is more than the {model.n_layers} "
            "layers; choose fewer stages"
        )
    rows = plan.data_size * plan.micro_batch_size
    if plan.batch_size % rows:
        raise ValueError(
            f"batch_size={plan.batch_size} is not divisible by data-parallel size * micro_batch_size = {rows}; "
            f"choose a multiple of {rows}"
        )
    if plan.zero_stage > 1 and plan.pipeline_size > 1:
        raise ValueError(
            f"zero_stage={plan.zero_stage} with pipeline_size={plan.pipeline_size} would send gradients or weights "
            "again for every micro-batch; use zero_stage 0 or 1 with a pipeline"
        )
    if model.experts or model.latent:
        raise ValueError("the planner knows dense models with grouped-query attention; choose another --model")


# Parameters of each stage


def layers_of(model: ModelConfig, pipeline_size: int, stage: int) -> int:
    """Blocks on a stage; what does not divide goes to the first stages."""
    whole, rest = divmod(model.n_layers, pipeline_size)
    return whole + (stage < rest)


def stage_parameters(model: ModelConfig, plan: Plan, stage: int) -> int:
    """Weights that one GPU of a stage holds before ZeRO: its part of the matrices, all of the norms.

    The first stage has the embedding, the last one the head and the last norm; a tied matrix lies on both.
    """
    matrices, gains = attention_parameters(model)
    layer = (matrices + 3 * model.d_model * model.d_ff) / plan.tensor_size + 2 * model.d_model + gains
    vocabulary = model.vocab_size * model.d_model / plan.tensor_size
    first, last = stage == 0, stage == plan.pipeline_size - 1
    copies = (first or last) if model.tie_embeddings else first + last
    return math.ceil(layers_of(model, plan.pipeline_size, stage) * layer + copies * vocabulary + last * model.d_model)


# Activations: what the forward pass keeps for the backward pass


def block_activations(model: ModelConfig, n_tokens: int, n_bytes: int = 2, kept: str = "none") -> dict[str, float]:
    """Bytes that one block keeps for n_tokens, term by term, with attention that keeps no matrix of scores.

    n_bytes: of a number (2: bf16). kept "none" recomputes nothing; "selective" keeps what matrix products and attention
    made and does norms, silu and products of two vectors again, which costs no matrix product; "full" keeps the block's
    input alone.
    """
    d_query, d_kv = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    terms = {
        "inputs of the norms": 2 * n_bytes * model.d_model,
        "queries, keys, values": n_bytes * (d_query + 2 * d_kv),
        "attention output": n_bytes * d_query + 4 * model.n_heads,  # and the log of each softmax's sum, float32
        "gate and up": 2 * n_bytes * model.d_ff,
        "outputs of the norms": 2 * n_bytes * model.d_model,
        "silu of the gate, and the product": 2 * n_bytes * model.d_ff,
    }
    if check_name("recompute", kept, RECOMPUTE) == "full":
        terms = {"input of the block": n_bytes * model.d_model}
    elif kept == "selective":
        del terms["outputs of the norms"], terms["silu of the gate, and the product"]
    return {name: value * n_tokens for name, value in terms.items()}


def megatron_block_bytes(seq_len: int, batch: int, d_model: int, n_heads: int, tensor_size: int, kept: str) -> float:
    """Korthikanti et al. 2022, table 2: bytes of a GPT block with tensor and sequence parallelism.

    s b h (34 + 5 a s / h) / t with everything kept, s b h 34 / t with selective and 2 s b h with full recomputation.
    """
    unit = seq_len * batch * d_model
    if check_name("recompute", kept, RECOMPUTE) == "full":
        return 2.0 * unit
    scores = 5.0 * n_heads * seq_len / d_model if kept == "none" else 0.0
    return unit * (34.0 + scores) / tensor_size


def in_flight(plan: Plan, stage: int) -> float:
    """Micro-batches whose activations a stage of 1F1B holds at once; chunks add (p - 1) / (p v) of a full pipeline."""
    waiting = min(plan.pipeline_size - stage, plan.n_micro)
    if plan.n_chunks == 1:
        return waiting
    return min(plan.n_micro, waiting * (1 + (plan.pipeline_size - 1) / (plan.pipeline_size * plan.n_chunks)))


def activation_bytes(model: ModelConfig, plan: Plan, stage: int) -> float:
    """Bytes of activations on a GPU of a stage, split over the tensor-parallel GPUs (sequence parallelism included)."""
    n_tokens = plan.micro_batch_size * plan.seq_len
    block = sum(block_activations(model, n_tokens, 2, plan.recompute).values()) / plan.tensor_size
    total = block * layers_of(model, plan.pipeline_size, stage) * in_flight(plan, stage)
    if plan.recompute == "full":  # the block at hand is whole once
        total += sum(block_activations(model, n_tokens).values()) / plan.tensor_size
    if stage == plan.pipeline_size - 1:  # logits and their gradient, float32
        total += 2 * 4 * n_tokens * model.vocab_size / plan.tensor_size
    return total


# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, term by term."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float  # ZeRO 3: the weights of two blocks, this one's and the next one's, whole

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def stage_memory(model: ModelConfig, plan: Plan, stage: int) -> Memory:
    """Bytes of one GPU of a stage: bf16 weights and gradients, float32 master weights and AdamW's state."""
    parts = zero_bytes(stage_parameters(model, plan, stage), plan.data_size, plan.zero_stage)
    matrices, _ = attention_parameters(model)
    gathered = 0.0
    if plan.zero_stage == 3 and plan.data_size > 1:
        gathered = 2 * 2 * (matrices + 3 * model.d_model * model.d_ff) / plan.tensor_size
    return Memory(**parts, activations=activation_bytes(model, plan, stage), gathered=gathered)


def memory(model: ModelConfig, plan: Plan) -> Memory:
    """Bytes of the fullest stage."""
    stages = {0, plan.pipeline_size - 1, min(1, plan.pipeline_size - 1)}
    return max((stage_memory(model, plan, stage) for stage in stages), key=lambda held: held.total)


# Time


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, term by term; the sum is the step."""

    compute: float  # matrix products of the model's own FLOPs
    recompute: float  # matrix products done twice
    elementwise: float  # everything between the products, at the speed of the memory
    tensor: float  # messages inside each layer, which nothing hides
    pipeline: float  # messages between stages
    data: float  # what the backward pass does not hide of the gradients' messages
    bubble: float  # stages that wait

    @property
    def total(self) -> float:
        busy = self.compute + self.recompute + self.elementwise
        return busy + self.tensor + self.pipeline + self.data + self.bubble


def recomputed_flops(model: ModelConfig, plan: Plan) -> float:
    """FLOPs of matrix products of a step that are done a second time: the forward pass, or none."""
    if plan.recompute != "full":
        return 0.0
    terms = training_flops(model, plan.batch_size * plan.seq_len, plan.seq_len)
    return terms["matrices_forward"] + terms["attention_forward"]


def step_time(
    model: ModelConfig, plan: Plan, gpu: Hardware, kernel_share: float = KERNEL_SHARE, block_bytes: float = 0.0
) -> StepTime:
    """Seconds of a step on GPUs of one kind, by the roofline.

    Matrix products run at one share of the peak. What lies between them moves each number that a block makes (for a
    token `block_bytes`, 0: as `block_activations`) to memory and back, in the forward and in the backward pass, and
    once more when it is done again. Gradients (and, under ZeRO 3, weights) travel while the backward pass runs, two
    thirds of the compute; what is left over counts. Tensor-parallel messages and the bubble count in full. Left out:
    stragglers, failures, loading, the optimizer. Raises ValueError for a GPU whose links are not known.
    """
    links = LINKS[check_name("gpu with known links", gpu.name, LINKS)]
    flops = sum(training_flops(model, plan.batch_size * plan.seq_len, plan.seq_len).values())
    rate = plan.n_gpus * gpu.flops * kernel_share
    compute, again = flops / rate, recomputed_flops(model, plan) / rate
    tokens = plan.batch_size * plan.seq_len / plan.data_size  # that pass through each pipeline in a step
    layers = model.n_layers / plan.pipeline_size
    turns = 4 if plan.recompute == "none" else 6
    moved = turns * (block_bytes or sum(block_activations(model, 1).values())) * tokens * layers / plan.tensor_size
    ring = ring_bytes(2.0 * tokens * model.d_model, plan.tensor_size)
    passes = 6 if plan.recompute == "full" else 4  # all-reduces of a block: 2 forward, 2 backward, 2 when done again
    tensor = passes * layers * ring / (links.inside if plan.tensor_size <= GPUS_PER_NODE else links.outside)
    pipeline = 0.0
    if plan.pipeline_size > 1:  # forward and backward; the tensor-parallel GPUs send a part each
        pipeline = 2 * plan.n_chunks * 2.0 * tokens * model.d_model / plan.tensor_size / links.outside
    scheme = "ddp" if plan.zero_stage == 0 else f"zero{plan.zero_stage}"
    sent = data_parallel_bytes(2.0 * stage_parameters(model, plan, 0), plan.data_size, scheme, plan.n_micro)
    busy = compute + again + moved / gpu.bandwidth + tensor + pipeline
    data = max(0.0, sent / (links.inside if plan.n_gpus <= GPUS_PER_NODE else links.outside) - 2 / 3 * busy)
    share = bubble_share(plan.pipeline_size, plan.n_micro * plan.n_chunks)
    return StepTime(compute, again, moved / gpu.bandwidth, tensor, pipeline, data, busy * share / (1 - share))


def utilisations(model: ModelConfig, plan: Plan, seconds: float, gpu: Hardware) -> dict[str, float]:
    """One measured step as a share of the peak, by the definitions that reports use, 0 to 1.

    6N: six FLOPs for each weight and token, embeddings included. model: the FLOPs that the model needs, term by term
    (Chowdhery et al. 2022, appendix B). hardware: those and the ones that recomputation adds.
    """
    n_tokens = plan.batch_size * plan.seq_len
    available = seconds * plan.n_gpus * gpu.flops
    needed = sum(training_flops(model, n_tokens, plan.seq_len).values())
    body = count_parameters(model).active - count_parameters(model).embedding - count_parameters(model).head
    return {
        "6N without embeddings": six_nd(body, n_tokens) / available,
        "6N": six_nd(count_parameters(model).active, n_tokens) / available,
        "model FLOPs (MFU)": needed / available,
        "hardware FLOPs (HFU)": (needed + recomputed_flops(model, plan)) / available,
    }


# Choosing


@dataclass(frozen=True)
class Estimate:
    """A plan with what it holds and how long a step takes."""

    plan: Plan
    memory: Memory
    time: StepTime

    def days(self, n_tokens: float) -> float:
        return n_tokens / (self.plan.batch_size * self.plan.seq_len) * self.time.total / HOUR / 24


def estimate_plan(model: ModelConfig, plan: Plan, gpu: Hardware, kernel_share: float = KERNEL_SHARE) -> Estimate:
    """Memory and time of a plan. Raises ValueError, with a remedy, if the fullest GPU has too little memory."""
    check_plan(model, plan)
    held = memory(model, plan)
    room = gpu.memory * (1 - RESERVED)
    if held.total > room:
        raise ValueError(
            f"a GPU would hold {held.total / 1e9:.1f} GB ({held.weights / 1e9:.1f} weights, {held.gradients / 1e9:.1f} "
            f"gradients, {held.optimizer / 1e9:.1f} optimizer, {held.activations / 1e9:.1f} activations), more than "
            f"the {room / 1e9:.1f} GB that {gpu.name} has for it; {remedy(model, plan, gpu)}"
        )
    return Estimate(plan, held, step_time(model, plan, gpu, kernel_share))


def candidates(model: ModelConfig, base: Plan) -> Iterator[Plan]:
    """Layouts of base.n_gpus that divide evenly, for the batch and sequence length of `base`."""
    sizes = [size for size in (1, 2, 4, 8) if size <= base.n_gpus and model.n_heads % size == 0]
    stages = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= min(model.n_layers, base.n_gpus)]
    for tensor, pipeline in itertools.product(sizes, stages):
        if base.n_gpus % (tensor * pipeline):
            continue
        n_chunks = base.n_chunks if pipeline > 1 else 1
        if pipeline * n_chunks > model.n_layers:
            continue
        for zero, micro, kept in itertools.product((0, 1, 2, 3), (1, 2, 4), RECOMPUTE):
            plan = replace(
                base,
                tensor_size=tensor,
                pipeline_size=pipeline,
                zero_stage=zero,
                micro_batch_size=micro,
                recompute=kept,
                n_chunks=n_chunks,
            )
            if (
                plan.batch_size % (plan.data_size * micro)
                or (zero and plan.data_size == 1)
                or (zero > 1 and pipeline > 1)
            ):
                continue
            yield plan


def best_plan(model: ModelConfig, base: Plan, gpu: Hardware, kernel_share: float = KERNEL_SHARE) -> Estimate:
    """The fastest layout of base.n_gpus that fits. Raises ValueError, with the least number that would do, if none."""
    room, found, plans = gpu.memory * (1 - RESERVED), [], list(candidates(model, base))
    if not plans:
        raise ValueError(
            f"no layout shares batch_size={base.batch_size} out to {base.n_gpus} GPUs; choose a multiple of "
            f"{base.n_gpus}"
        )
    for plan in plans:
        held = memory(model, plan)
        if held.total <= room:
            found.append(Estimate(plan, held, step_time(model, plan, gpu, kernel_share)))
    if not found:
        enough = enough_gpus(model, base, gpu)
        advice = f"{enough} GPUs would do" if enough else "shorten --seq-len, or choose a GPU with more memory"
        raise ValueError(
            f"no layout of {base.n_gpus} x {gpu.name} holds this model at seq_len {base.seq_len}; {advice}"
        )
    return min(found, key=lambda estimate: estimate.time.total)


def smallest_plan(model: ModelConfig, base: Plan) -> Plan | None:
    """The layout of base.n_gpus that needs the least memory on its fullest GPU."""
    plans = list(candidates(model, base))
    return min(plans, key=lambda plan: memory(model, plan).total) if plans else None


def enough_gpus(model: ModelConfig, base: Plan, gpu: Hardware) -> int:
    """The least power of two above base.n_gpus that holds the model in some layout; 0 if none up to 4,096 does."""
    n_gpus = 2 ** math.ceil(math.log2(base.n_gpus + 1))
    while n_gpus <= 4096:
        plan = smallest_plan(model, replace(base, n_gpus=n_gpus, batch_size=max(base.batch_size, n_gpus)))
        if plan and memory(model, plan).total <= gpu.memory * (1 - RESERVED):
            return n_gpus
        n_gpus *= 2
    return 0


def remedy(model: ModelConfig, plan: Plan, gpu: Hardware) -> str:
    """What to change in a plan that does not fit: the smallest change that does, cheapest first."""
    changes = [
        ("--recompute full", replace(plan, recompute="full")),
        ("--micro-batch-size 1 --recompute full", replace(plan, micro_batch_size=1, recompute="full")),
    ]
    if plan.pipeline_size == 1 and plan.data_size > 1:
        changes = [(f"--zero-stage {stage}", replace(plan, zero_stage=stage)) for stage in range(1, 4)] + changes
        changes.append(
            (
                "--zero-stage 3 --micro-batch-size 1 --recompute full",
                replace(plan, zero_stage=3, micro_batch_size=1, recompute="full"),
            )
        )
    room = gpu.memory * (1 - RESERVED)
    for words, changed in changes:
        if memory(model, changed).total <= room:
            return f"it fits with {words}"
    smallest = smallest_plan(model, plan)
    if smallest and memory(model, smallest).total <= room:
        return f"it fits as {smallest.layout}"
    enough = enough_gpus(model, plan, gpu)
    return f"{enough} GPUs hold it" if enough else "shorten --seq-len, or choose a GPU with more memory"


# What papers state, to compare with


def zero_table() -> list[tuple[int, float, list[float]]]:
    """Rajbhandari et al. 2020, table 1: GB for each GPU, by number of GPUs and model, under ZeRO 1, 2 and 3."""
    sizes = (7.5e9, 128e9, 1e12)
    return [
        (n_gpus, size, [sum(zero_bytes(size, n_gpus, stage).values()) / 1e9 for stage in (1, 2, 3)])
        for n_gpus in (1, 4, 16, 64, 256, 1024)
        for size in sizes
    ]


@dataclass(frozen=True)
class MegatronRow:
    """One row of table 1 of Narayanan et al. 2021: GPT models on A100s, sequences of 2048, vocabulary 51,200."""

    billions: float
    n_heads: int
    d_model: int
    n_layers: int
    tensor_size: int
    pipeline_size: int
    n_gpus: int
    batch_size: int
    tflops: float  # achieved for each GPU, recomputation included


MEGATRON = [
    MegatronRow(1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    MegatronRow(3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    MegatronRow(7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    MegatronRow(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    MegatronRow(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    MegatronRow(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    MegatronRow(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
    MegatronRow(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    MegatronRow(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
    MegatronRow(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
]


def gpt_parameters(d_model: int, n_layers: int, vocab_size: int = 51200, seq_len: int = 2048) -> float:
    """12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)) (Narayanan et al. 2021, equation 2)."""
    per_layer = 1 + 13 / (12 * d_model) + (vocab_size + seq_len) / (12 * n_layers * d_model)
    return 12 * n_layers * d_model**2 * per_layer


def gpt_step_flops(
    batch_size: int, d_model: int, n_layers: int, vocab_size: int = 51200, seq_len: int = 2048, again: bool = True
) -> float:
    """96 B s l h^2 (1 + s / (6 h) + V / (16 l h)) (Narayanan et al. 2021, equation 3); 72 without recomputation.

    The count of attention takes all keys, future ones included, as their kernels did.
    """
    factor, share = (96, 16) if again else (72, 12)
    base = factor * batch_size * seq_len * n_layers * d_model**2
    return base * (1 + seq_len / (6 * d_model) + vocab_size / (share * n_layers * d_model))


def megatron_days(n_parameters: float, n_tokens: float, n_gpus: int, tflops: float) -> float:
    """8 T P / (n X) (Narayanan et al. 2021, equation 4): days of a training with full recomputation."""
    return 8 * n_tokens * n_parameters / (n_gpus * tflops * 1e12) / HOUR / 24


def megatron_model(row: MegatronRow) -> ModelConfig:
    """A row's model in our words: the same weights in three matrices of 8/3 d_model instead of two of 4."""
    d_ff = round(8 * row.d_model / 3)
    sizes = (51200, row.d_model, row.n_layers, row.n_heads, row.n_heads, row.d_model // row.n_heads, d_ff, 2048)
    return ModelConfig(*sizes, tie_embeddings=True)


def megatron_plan(row: MegatronRow) -> Plan:
    """A row's layout: full recomputation, micro-batches of one sequence, and 1F1B without chunks."""
    return Plan(row.n_gpus, row.tensor_size, row.pipeline_size, 0, 1, row.batch_size, 2048, recompute="full")


def predicted_tflops(row: MegatronRow, kernel_share: float = KERNEL_SHARE) -> float:
    """TFLOP/s for each GPU, counted as the paper does, that the planner predicts for a row.

    Its attention kept the matrices of scores: a block's bytes are those of `megatron_block_bytes`.
    """
    moved = megatron_block_bytes(2048, 1, row.d_model, row.n_heads, 1, "none") / 2048
    gpu = GPUS["A100 80GB SXM"]
    seconds = step_time(megatron_model(row), megatron_plan(row), gpu, kernel_share, moved).total
    return gpt_step_flops(row.batch_size, row.d_model, row.n_layers) / row.n_gpus / seconds / 1e12


def selective_overhead(d_model: int, seq_len: int) -> float:
    """HFU / MFU - 1 if attention's scores and sums are done once more in the backward pass.

    All of a step is 72 B s l h^2 (1 + s / (6 h)), a third of whose second term is the forward pass that is repeated.
    """
    attention = seq_len / (6 * d_model)
    return attention / 3 / (1 + attention)


# Korthikanti et al. 2022, table 5: billions of weights, d_model, MFU and HFU of selective recomputation, s = 2048
SELECTIVE = [
    (22, 6144, 0.415, 0.437),
    (175, 12288, 0.514, 0.528),
    (530, 20480, 0.560, 0.570),
    (1000, 25600, 0.563, 0.570),
]


LLAMA_405B = [  # arXiv 2407.21783, table 4: GPUs, tensor, pipeline, sequences of 8192 in a step, TFLOP/s for each GPU
    (8192, 8, 16, 32 * 64, 430),
    (16384, 8, 16, 16 * 128, 400),
]


def llama_plans() -> list[tuple[Plan, float]]:
    """The published layouts of Llama 3 405B, with the published TFLOP/s of a GPU; ZeRO 1 stands for its FSDP."""
    return [
        (Plan(n_gpus, tensor, pipeline, 1, 1, batch, 8192), tflops)
        for n_gpus, tensor, pipeline, batch, tflops in LLAMA_405B
    ]


def known_model(name: str) -> ModelConfig:
    return MODELS[check_name("model", name, MODELS)]
