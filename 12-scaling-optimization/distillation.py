"""Topic 12 - Distillation: a small model learns the distributions of a large one, not only the words that were drawn.

    soft_cross_entropy(student_logits, teacher_logits, temperature=2.0)
    generalised_jsd(student_logits, teacher_logits, beta=1.0)          # reverse KL; 0 is forward KL
    student = distilled(student, teacher, batches, DistillConfig(), training)

Hinton et al. 2015 (temperature, arXiv 1503.02531), Romero et al. 2014 (hidden features, arXiv 1412.6550), Agarwal et
al. 2023 (on the student's own text, generalised JSD, arXiv 2306.13649).
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_model import CheckpointConfig, ModelSizes, load_course_model, make_shards, start_small
from course_tokenizer import load_course_tokenizer
from gpt2 import SamplingConfig
from llm_calculators import forward_flops
from modern_llm_architectures import CausalLM
from packing import language_model_loss
from quantized_model import Exam, float_bytes
from sequence_modeling import IGNORE, device_of
from shards import ShardBatches, ShardConfig
from tiny_world import World
from training_transformers import LossFn, TrainConfig, fit
from workbench import RunConfig, alone, announce, check_name, check_range, pick_device, seed_everything, shown

MODES = ("scratch", "logits", "features", "on-policy")


# Losses


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher_T || student_T) for each position, nats: (..., vocab) twice to (...).

    The gradient of the divergence falls with 1 / T^2 (Hinton et al. 2015, section 2); T^2 keeps its size, and with it
    its weight beside a loss on the data.
    """
    wanted = F.log_softmax(teacher_logits / temperature, dim=-1)
    found = F.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * divergence(wanted, found)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities, nats: (..., vocab) twice to (...).

    What the first never says adds nothing, 0 log 0 = 0, though its logarithm is -inf.
    """
    terms = first.exp() * (first - second)
    return terms.masked_fill(first == -math.inf, 0.0).sum(-1)


def generalised_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m), m = beta * teacher + (1 - beta) * student, per position.

    Agarwal et al. 2023, equation 1; its limits are taken as in their text: beta = 0 is KL(teacher || student), 1 is
    KL(student || teacher). (..., vocab) twice to (...). Raises ValueError for a beta outside 0..1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in 0..1 (0: forward KL, 1: reverse KL), got {beta}")
    student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (student_logits, teacher_logits))
    if beta in (0, 1):
        return divergence(teacher, student) if beta == 0 else divergence(student, teacher)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * divergence(teacher, middle) + (1 - beta) * divergence(student, middle)


class FeatureMatch(nn.Module):
    """Mean squared error between the teacher's hidden state and a linear map of the student's.

    The map is trained with the student and then thrown away (Romero et al. 2014, section 2.2). Both sides are the
    streams after the last norm. Shapes: (..., d_student) and (..., d_teacher) to (...).
    """

    def __init__(self, d_student: int, d_teacher: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_student, d_teacher, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.map(student) - teacher).square().mean(-1)


# One training step of each kind


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from, and for how long."""

    mode: Literal[MODES] = "logits"  # the data alone; the teacher's logits; and its hidden states; on its own text
    distill_temperature: float = 1.0  # softens both distributions
    distill_weight: float = 1.0  # share of the teacher's loss; the rest is cross-entropy on the data
    feature_weight: float = 0.1  # features: weight of the error of the hidden states
    distill_beta: float = 1.0  # on-policy: 0 is forward KL, 1 reverse KL, between them the generalised JSD
    on_policy_share: float = 0.25  # on-policy: share of the steps on the student's own text
    n_rollout_tokens: int = 64  # on-policy: tokens of a text that the student writes

    def __post_init__(self) -> None:
        check_name("mode", self.mode, MODES)
        check_range(self, "distill_temperature", above=0)
        check_range(self, "distill_weight", "distill_beta", "on_policy_share", least=0, most=1)
        check_range(self, "feature_weight", least=0)
        check_range(self, "n_rollout_tokens", least=2)


class Teacher(nn.Module):
    """Takes the place of `language_model_loss`: teacher(student, batch) gives summed nats and their number.

    The teacher is frozen and stays in evaluation mode: with dropout on, the student would learn its noise. It is kept
    out of the student, so that an optimizer never sees it. Calls without gradients of their own.
    """

    def __init__(self, model: CausalLM, config: DistillConfig, match: FeatureMatch | None = None) -> None:
        super().__init__()
        self.model, self.config, self.match = model.eval().requires_grad_(False), config, match
        self.step = 0
        self.generator = torch.Generator(device_of(model)).manual_seed(0)

    def train(self, mode: bool = True) -> "Teacher":
        return self  # never

    def forward(self, student: CausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | int]:
        config, self.step = self.config, self.step + 1
        due = math.floor(self.step * config.on_policy_share) > math.floor((self.step - 1) * config.on_policy_share)
        if config.mode == "on-policy" and due:
            return self.own_text(student, len(batch["inputs"]))
        documents = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
        with torch.no_grad():
            wanted = self.model.hidden(batch["inputs"], **documents)  # (batch, seq, d_teacher)
            teacher_logits = self.model.logits(wanted)  # (batch, seq, vocab)
        hidden = student.hidden(batch["inputs"], **documents)  # (batch, seq, d_model)
        logits = student.logits(hidden)  # (batch, seq, vocab)
        counted = batch["targets"] != IGNORE  # (batch, seq)
        soft = soft_cross_entropy(logits, teacher_logits, config.distill_temperature)[counted].sum()
        loss = config.distill_weight * soft
        if config.distill_weight < 1:
            hard = F.cross_entropy(logits[counted], batch["targets"][counted], reduction="sum")
            loss = loss + (1 - config.distill_weight) * hard
        if self.match is not None:
            loss = loss + config.feature_weight * self.match(hidden, wanted)[counted].sum()
        return loss, counted.sum()

    def own_text(self, student: CausalLM, n_rows: int) -> tuple[Tensor, Tensor | int]:
        """The student writes documents; the divergence from the teacher on every token of them."""
        start = torch.full((n_rows, 1), student.config.bos_id, device=device_of(student))  # (batch, 1)
        student.eval()
        with torch.no_grad():
            sampling = SamplingConfig(self.config.n_rollout_tokens)
            written = student.generate(start, sampling, generator=self.generator)  # (batch, new)
        student.train()
        inputs = torch.cat([start, written[:, :-1]], dim=1)  # (batch, new)
        end_ids = torch.tensor([student.config.eos_id, *student.config.more_eos_ids], device=inputs.device)
        ends = torch.isin(inputs, end_ids).cumsum(1)  # (batch, new)
        counted = ends == ends[:, :1]  # (batch, new): up to the end; the first id begins the document, end or not
        with torch.no_grad():
            teacher_logits = self.model(inputs)  # (batch, new, vocab)
        losses = generalised_jsd(
            student(inputs)[counted], teacher_logits[counted], self.config.distill_beta, self.config.distill_temperature
        )
        return losses.sum(), counted.sum()


def step_flops(student: CausalLM, teacher: CausalLM | None, config: DistillConfig, seq_len: int) -> float:
    """FLOPs for each token of a step: three passes of the student, one of the teacher, and the student's writing.

    An optimizer's own sums are left out, as everywhere in this course.
    """
    own, theirs = (sum(forward_flops(model.config, seq_len).values()) if model else 0.0 for model in (student, teacher))
    if config.mode == "scratch":
        return 3 * own
    writing = config.on_policy_share * own if config.mode == "on-policy" else 0.0
    return 3 * own + theirs + writing


def distilled(
    student: CausalLM,
    teacher: CausalLM,
    batches: Callable[[int], dict[str, Tensor]],
    config: DistillConfig,
    training: TrainConfig,
) -> CausalLM:
    """Train the student in place as the config says, "scratch" without the teacher."""
    loss_fn: LossFn = language_model_loss
    trained: nn.Module = student
    if config.mode != "scratch":
        match = FeatureMatch(student.config.d_model, teacher.config.d_model) if config.mode == "features" else None
        loss_fn = Teacher(teacher, config, match)
        if match is not None:
            trained = nn.ModuleDict({"student": student, "match": match})  # the optimizer trains both
    fit(
        trained,
        batches,
        loss_fn if trained is student else lambda both, batch: loss_fn(both["student"], batch),
        training,
    )
    return student.eval()


# The verb


@dataclass(frozen=True)
class StudentConfig(CheckpointConfig, DistillConfig):
    """The teacher, the student's shape, and how long it learns."""

    d_model: int = 64  # the student's width
    n_layers: int = 2  # its blocks
    d_ff: int = 176  # hidden width of its feed-forward networks
    max_steps: int = 400  # optimizer steps; scratch gets as many as the same FLOPs pay for
    learning_rate: float = 1e-2  # the peak, for Muon
    n_documents: int = 20_000  # training documents
    n_held_out: int = 500  # held-out documents to examine with

    def __post_init__(self) -> None:
        DistillConfig.__post_init__(self)
        check_range(self, "max_steps", "n_documents", least=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "n_held_out", least=2)
        self.sizes()

    def sizes(self) -> ModelSizes:
        return ModelSizes(self.d_model, self.n_layers, d_ff=self.d_ff)


def student_training(max_steps: int, learning_rate: float, batch_size: int = 8, seq_len: int = 128) -> TrainConfig:
    """Topic 10's recipe at other lengths: Muon, a short warm-up, then a fall over the second half."""
    return TrainConfig(
        batch_size=batch_size,
        seq_len=seq_len,
        max_steps=max_steps,
        optimizer="muon",
        learning_rate=learning_rate,
        schedule="wsd",
        warmup_steps=min(50, max_steps // 4),
        cooldown_steps=max_steps // 2,
        min_lr_ratio=0.0,
        log_every=50,
    )


@alone
def distill(config: StudentConfig, run: RunConfig) -> None:
    """Train a small model from a large one, and one of the same size without it for the same FLOPs; save the first."""
    announce(f"distil {shown(config.folder)} ({config.mode}), and train from scratch beside it", 0.2 * config.max_steps)
    teacher, tokenizer = load_course_model(config.folder)
    device = pick_device(run.device)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_shards(ShardConfig(n_documents=config.n_documents), Path(folder))
        batches = ShardBatches(corpus, 8, 128, run.seed)
        exam = Exam.of(teacher.to(device), tokenizer, World().documents(config.n_held_out, 7, "validation"))
        scratch = replace(DistillConfig(), mode="scratch")
        for settings in (config, scratch):
            seed_everything(run.seed)
            student = start_small(CausalLM(config.sizes().config(tokenizer))).to(device)
            ratio = step_flops(student, teacher, config, 128) / step_flops(student, teacher, settings, 128)
            training = student_training(round(config.max_steps * ratio), config.learning_rate)
            distilled(student, teacher, batches, settings, training)
            gap, error = exam.gap(student)
            print(
                f"{settings.mode}: {training.max_steps} steps, {gap:.4f} ± {error:.4f} nats per token above the floor"
            )
            if settings is config:
                student.save_pretrained(run.out / "model")
                load_course_tokenizer().save_folder(run.out / "model")
    print(
        f"teacher: {exam.gap(teacher)[0]:.4f}, {float_bytes(teacher):,} bytes; student {float_bytes(student):,} bytes"
    )
    print(f"the student of the teacher is in {shown(run.out / 'model')}")
