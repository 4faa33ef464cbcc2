"""Topic 07 - Training Failures: what goes wrong in training, switched on and measured beside what is right.

python 07-training-transformers/training_transformers.py --break mean-of-means       # one failure
python 07-training-transformers/training_transformers.py figures precision spikes    # the chapter's measurements

Papers: Micikevicius et al. 2018 (arXiv 1710.03740), what fp16 loses; Kalamkar et al. 2019 (arXiv 1905.12322), bf16;
Molybog et al. 2023 (arXiv 2304.09871), instabilities of Adam; Wortsman et al. 2023 (arXiv 2309.14322), loss spikes.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from optimizers import AdamW, RuleOptimizer, build_optimizer, shrink
from packing import Batch, BucketedBatches, PackedTransformer, language_model_loss, to_device
from sequence_modeling import BOS_ID, FIRST_TOKENS, device_of
from training_monitors import attention_entropy, loss_spikes
from training_transformers import TrainConfig, WorldBatches, backward_in_parts, fit, gradient_norm, world_losses
from transformer_architecture import ModelConfig, held_out_documents, start_as_identity, tiny_world
from workbench import RunConfig, pick_device, progress, seed_everything

Row = tuple[str, float, float]  # what is measured, as it should be, with the failure
MODEL = ModelConfig()  # of the gallery and the autopsy
N_EXAMINED = 200  # held-out documents that a failure is examined with


def new_model(model_config: ModelConfig, run: RunConfig) -> PackedTransformer:
    """A language model of TinyWorld whose blocks start as the identity."""
    seed_everything(run.seed)
    model = PackedTransformer(model_config, len(tiny_world()[1]))
    start_as_identity(model)
    return model.to(pick_device(run.device))


def gap_of(model: nn.Module, n_documents: int | None = None) -> float:
    """Held-out nats per token above the entropy floor."""
    return world_losses(model, held_out_documents(n_documents or N_EXAMINED), tiny_world()[1])["gap"]


def relative_error(model: nn.Module, whole: list[Tensor]) -> float:
    """Distance of the model's gradient from another one, relative to that one's length."""
    differences = [parameter.grad - other for parameter, other in zip(model.parameters(), whole, strict=True)]
    return gradient_norm(differences) / gradient_norm(whole)


# The failures. Each returns its rows for the same model, data and seed, with and without


def schedule_per_micro_batch(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """The schedule counts the 4 micro-batches of each step: the rate has fallen to its end after a quarter."""
    config = dataclasses.replace(config, micro_batch_size=math.ceil(config.batch_size / 4))

    def too_fast(step: float) -> float:
        return config.factor(min(config.grad_accum_steps * step, config.max_steps))

    gaps, last = [], []
    for schedule in (config.factor, too_fast):
        model = new_model(model_config, run)
        fit(model, WorldBatches(config, run.seed), language_model_loss, config, schedule=schedule)
        gaps.append(gap_of(model))
        rates = [schedule(step) for step in range(config.max_steps)]
        last.append(sum(rate > 1.01 * min(rates[-1], config.min_lr_ratio) for rate in rates) / config.max_steps)
    return [
        ("share of the run before the rate is at its end", *last),
        ("held-out nats per token above the floor", *gaps),
    ]


def document_batches_of_any_length(config: TrainConfig, seed: int) -> BucketedBatches:
    world, vocabulary = tiny_world()
    documents = world.documents(2000, seed, "train")
    ids = [[BOS_ID, *vocabulary.encode(document.tokens)] for document in documents]
    return BucketedBatches(ids, config.batch_size, seed, pool_size=1)


def mean_of_means(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The wrong loss: each micro-batch gives the mean over its own tokens, and counts once."""
    loss, count = language_model_loss(model, batch)
    return loss / count.clamp(min=1), 1


def mean_of_the_means(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """Accumulation takes the mean of the micro-batches' means: a token in a short document weighs more."""
    config = dataclasses.replace(config, micro_batch_size=1)
    batches = document_batches_of_any_length(config, run.seed)
    model, gaps = new_model(model_config, run), []
    loss, count = language_model_loss(model, batches(0))
    (loss / count).backward()
    whole, errors = [parameter.grad for parameter in model.parameters()], []
    counts = [int((row != -100).sum()) for row in batches(0)["targets"]]
    for loss_fn in (language_model_loss, mean_of_means):
        model.zero_grad()
        _, n_counted = backward_in_parts(model, batches(0), loss_fn, config, 1.0)
        torch._foreach_mul_([parameter.grad for parameter in model.parameters()], 1 / n_counted)
        errors.append(relative_error(model, whole))
    for loss_fn in (language_model_loss, mean_of_means):
        model = new_model(model_config, run)
        fit(model, batches, loss_fn, config)
        gaps.append(gap_of(model))
    return [
        ("weight of a token of the shortest document, in tokens of the longest", 1.0, max(counts) / min(counts)),
        ("error of the first gradient, relative", *errors),
        ("held-out nats per token above the floor", *gaps),
    ]


def decay_layernorm(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """Weight decay on every parameter: the gains of the norms are pulled to 0, the rows of rare words as well."""
    config = dataclasses.replace(config, weight_decay=max(config.weight_decay, 1.0))
    gains, gaps = [], []
    for everything in (False, True):
        model = new_model(model_config, run)
        settings = (config.learning_rate, config.weight_decay, config.beta1, config.beta2)
        optimizer = build_optimizer(model, "adamw", *settings)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay if everything or group["weight_decay"] else 0.0
        fit(model, WorldBatches(config, run.seed), language_model_loss, config, optimizer=optimizer)
        gains.append(np.mean([p.abs().mean().item() for n, p in model.named_parameters() if n.endswith("norm.weight")]))
        gaps.append(gap_of(model))
    return [("mean gain of the norms", *gains), ("held-out nats per token above the floor", *gaps)]


class UncorrectedAdamW(RuleOptimizer):
    """AdamW whose running means start at 0 and are believed as they are."""

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
        state["mean"].lerp_(grad, 1 - group["beta1"])
        state["square"].mul_(group["beta2"]).addcmul_(grad, grad, value=1 - group["beta2"])
        shrink(parameter, group)
        parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-group["lr"])


def no_bias_correction(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """Adam without bias correction, beta2 = 0.999 and no warm-up: the first steps are sqrt(1 - beta2) too careful
    below the root and 1 - beta1 above it, together three times too long."""
    config = dataclasses.replace(config, warmup_steps=0, beta2=0.999)
    first, gaps, early = [], [], []
    for kind in (AdamW, UncorrectedAdamW):
        model = new_model(model_config, run)
        settings = {"beta1": config.beta1, "beta2": config.beta2, "eps": 1e-8, "weight_decay": 0.0}
        optimizer, before = kind(model.parameters(), config.learning_rate, **settings), copy.deepcopy(model)
        rows: list[dict] = []
        short = dataclasses.replace(config, max_steps=1, schedule="constant")
        fit(model, WorldBatches(config, run.seed), language_model_loss, short, optimizer=optimizer)
        moved = [
            (new - old).abs().max().item() for new, old in zip(model.parameters(), before.parameters(), strict=True)
        ]
        first.append(max(moved) / config.learning_rate)
        model = before
        optimizer = kind(model.parameters(), config.learning_rate, **settings)
        quick = dataclasses.replace(config, log_every=1)
        rows = fit(model, WorldBatches(config, run.seed), language_model_loss, quick, optimizer=optimizer)
        early.append(np.mean([row["loss"] for row in rows[1:11]]))
        gaps.append(gap_of(model))
    return [
        ("largest move of a weight in the first step, in learning rates", *first),
        ("mean loss of steps 2 to 11 (nats per token)", *early),
        ("held-out nats per token above the floor", *gaps),
    ]


def norm_after_zero_grad(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """The gradient norm is logged after zero_grad: a curve at 0 that looks like a finished run."""
    model = new_model(model_config, run)
    loss, count = language_model_loss(model, WorldBatches(config, run.seed)(0))
    (loss / count).backward()
    before = gradient_norm([parameter.grad for parameter in model.parameters()])
    model.zero_grad(set_to_none=False)
    return [("logged gradient norm", before, gradient_norm([parameter.grad for parameter in model.parameters()]))]


def step_per_micro_batch(model_config: ModelConfig, config: TrainConfig, run: RunConfig) -> list[Row]:
    """A branch for mixed precision that steps and clears after every micro-batch: no accumulation is left."""
    config = dataclasses.replace(config, micro_batch_size=math.ceil(config.batch_size / 4))
    model, batch = new_model(model_config, run), WorldBatches(config, run.seed)(0)
    loss, count = language_model_loss(model, batch)
    (loss / count).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    part = {name: tensor[: config.micro_batch_size] for name, tensor in batch.items()}
    loss, count = language_model_loss(model, part)
    (loss / count).backward()
    error, gaps = relative_error(model, whole), []
    for wrong in (False, True):
        model = new_model(model_config, run)
        changed = config
        if wrong:  # the same rows in the same number of passes, a step after each
            n_parts = config.grad_accum_steps
            changed = dataclasses.replace(
                config,
                batch_size=config.micro_batch_size,
                max_steps=n_parts * config.max_steps,
                warmup_steps=n_parts * config.warmup_steps,
                cooldown_steps=n_parts * config.cooldown_steps,
            )
        fit(model, WorldBatches(changed, run.seed), language_model_loss, changed)
        gaps.append(gap_of(model))
    return [
        ("error of the gradient of a step, relative", 0.0, error),
        ("held-out nats per token above the floor, the same tokens seen", *gaps),
    ]


BREAKS: dict[str, tuple[Callable[[ModelConfig, TrainConfig, RunConfig], list[Row]], float]] = {  # and its trainings
    "schedule-per-micro-batch": (schedule_per_micro_batch, 3),
    "mean-of-means": (mean_of_the_means, 6),
    "decay-layernorm": (decay_layernorm, 2),
    "no-bias-correction": (no_bias_correction, 2),
    "norm-after-zero-grad": (norm_after_zero_grad, 0),
    "step-per-micro-batch": (step_per_micro_batch, 3),
}


def failure_rows(n_steps: int, run: RunConfig) -> list[list]:
    """A row for each number that a failure shows: its name, what is measured, as it should be, with the failure."""
    config = TrainConfig(max_steps=n_steps, warmup_steps=n_steps // 10)
    named = progress(BREAKS.items(), "failures")
    return [[f"`{name}`", *row] for name, (measure, _) in named for row in measure(MODEL, config, run)]


# The precision gallery


def underflow(model: nn.Module, batch: Batch, scale: float) -> float:
    """Share of the weights whose gradient is 0 in fp16 at this scale of the mean loss, though not in fp32."""
    gradients = []
    for dtype, factor in (("fp32", 1.0), ("fp16", scale)):
        model.zero_grad()
        n_counted = int(language_model_loss(model, batch)[1])
        config = TrainConfig(dtype=dtype, batch_size=len(batch["inputs"]))
        backward_in_parts(model, batch, language_model_loss, config, factor / n_counted)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    exact, half = gradients
    return ((half == 0) & (exact != 0)).sum().item() / (exact != 0).sum().item()


def lost_updates(before: nn.Module, after: nn.Module) -> float:
    """Share of the weights that one step moved in fp32 and would not have moved in bf16: less than half its spacing."""
    moved = lost = 0
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        moved += (new != old).sum().item()
        rounded = (old.bfloat16() + (new - old).bfloat16()) == old.bfloat16()
        lost += (rounded & (new != old)).sum().item()
    return lost / moved


def precision_gallery(n_steps: int, run: RunConfig) -> list[Row]:
    """What fp16 and bf16 do to a model after n_steps of training, to sums and to large activations."""
    config = TrainConfig(max_steps=n_steps, warmup_steps=n_steps // 10)
    model = new_model(MODEL, run)
    fit(model, WorldBatches(config, run.seed), language_model_loss, config)
    batch = to_device(WorldBatches(dataclasses.replace(config, batch_size=64), run.seed + 1)(0), device_of(model))
    with torch.no_grad():
        probabilities = model(batch["inputs"]).softmax(dim=-1).flatten() / batch["targets"].numel()
    zeros = [(scale * probabilities).half().eq(0).float().mean().item() for scale in (2.0**16, 1.0)]
    before = copy.deepcopy(model)
    one = dataclasses.replace(config, max_steps=1, warmup_steps=0, schedule="constant", learning_rate=1e-3)
    fit(model, WorldBatches(one, run.seed + 1), language_model_loss, one)
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        total += 1
    logits, x = torch.tensor([100.0, 99.0]).half(), 300 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    centred = (x - x.mean()).half()
    normed = centred * torch.rsqrt(centred.square().mean() + 1e-5)
    stable = logits.softmax(dim=0)  # subtracts the largest first
    naive = logits.exp() / logits.exp().sum()
    weights = [underflow(before, batch, scale) for scale in (2.0**16, 1.0)]
    return [
        ("gradients of the logits that are 0 in fp16: loss times 65536, loss as it is", *zeros),
        ("gradients of the weights that are 0 in fp16: loss times 65536, loss as it is", *weights),
        ("weights that a step moves by too little for bf16: in fp32, in bf16", 0.0, lost_updates(before, model)),
        ("1000 times 1 added up: in fp32, in bf16", 1000.0, total.item()),
        (
            "softmax of the logits 100 and 99 in fp16: stable, naive",
            stable[0].item(),
            naive[0].item(),
        ),
        ("deviation after LayerNorm of activations around 300: in fp32, in fp16", 1.0, normed.float().std().item()),
        ("Adam's epsilon of 1e-8: in fp32, in fp16", 1e-8, torch.tensor(1e-8).half().item()),
    ]


PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {  # name: what changes in the config, dtype of the weights
    "fp32": ({}, torch.float32),
    "bf16 products": ({"dtype": "bf16"}, torch.float32),
    "fp16 products, loss scaled": ({"dtype": "fp16"}, torch.float32),
    "fp16 products, loss as it is": ({"dtype": "fp16", "loss_scale": 1 / 64}, torch.float32),  # 64 tokens in a row
    "weights in bf16": ({}, torch.bfloat16),
}


def precision_run(name: str, config: TrainConfig, run: RunConfig, n_documents: int) -> tuple[float, int]:
    """Held-out gap to the floor in nats per token after training in one precision, and the steps that were skipped."""
    changes, weights = PRECISIONS[name]
    model = new_model(MODEL, run).to(weights)
    config = dataclasses.replace(config, **changes)
    rows = fit(model, WorldBatches(config, run.seed), language_model_loss, config)
    return gap_of(model.float(), n_documents), int(rows[-1]["n_skipped"])


# Autopsy of a loss spike


@dataclasses.dataclass(frozen=True)
class Autopsy:
    """A run with a few planted bad steps: its loss, three monitors, and the number of the first bad step."""

    series: dict[str, list[float]]
    planted: int

    def cost(self, width: int = 25) -> float:
        """Mean loss of the steps after the bad ones above that of the steps before them, in nats per token."""
        losses, after = self.series["loss"], self.planted + N_BAD
        return float(np.mean(losses[after : after + width]) - np.mean(losses[self.planted - width : self.planted]))

    def peak(self) -> float:
        """Highest loss after the bad steps, above the mean before them, in nats per token."""
        losses, after = self.series["loss"], self.planted + N_BAD
        return max(losses[after:]) - float(np.mean(losses[self.planted - 25 : self.planted]))

    def alarm(self, name: str) -> float:
        """Steps from the first bad one to the first spike of a monitor; infinity if it shows none."""
        spikes = [step for step in loss_spikes(self.series[name]) if step >= self.planted]
        return spikes[0] - self.planted if spikes else math.inf


N_BAD = 3  # bad steps in a row


RATE_JUMP = 10.0  # by which the learning rate is too high in the bad steps


def autopsy(cause: str, config: TrainConfig, planted: int, run: RunConfig) -> Autopsy:
    """Train on TinyWorld and watch every step; from step `planted` on, N_BAD steps have a cause of a spike.

    cause "batch": rows of one random token repeated, to be answered with random tokens; "rate": a learning rate
    RATE_JUMP times too high.
    """
    batches, vocab_size = WorldBatches(config, run.seed), len(tiny_world()[1])
    generator = torch.Generator().manual_seed(run.seed)

    def with_noise(step: int) -> Batch:
        if cause != "batch" or not planted <= step < planted + N_BAD:
            return batches(step)
        noise = torch.randint(len(FIRST_TOKENS), vocab_size, (config.batch_size, config.seq_len), generator=generator)
        return {"inputs": noise[:, :1].expand_as(noise).clone(), "targets": noise}

    model, entropies = new_model(MODEL, run), []

    def watching(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        entropies.append(min(attention_entropy(model, batch["inputs"]).values()))
        return language_model_loss(model, batch)

    def with_jump(step: float) -> float:
        return config.factor(step) * (RATE_JUMP if cause == "rate" and planted <= step < planted + N_BAD else 1.0)

    config = dataclasses.replace(config, log_every=1, monitor=True)
    rows = fit(model, with_noise, watching, config, schedule=with_jump)
    ratios = [max(value for name, value in row.items() if name.startswith("update_ratio")) for row in rows]
    series = {"loss": [row["loss"] for row in rows], "gradient norm": [row["grad_norm"] for row in rows]}
    return Autopsy({**series, "relative update": ratios, "attention entropy": entropies}, planted)


SPIKES: dict[str, tuple[str, float, float]] = {  # name: cause, beta2, limit of the gradient norm
    "bad batches": ("batch", 0.95, 1.0),
    "bad batches, no clipping": ("batch", 0.95, 0.0),
    "bad batches, beta2 0.999": ("batch", 0.999, 1.0),
    "bad batches, beta2 0.999, no clipping": ("batch", 0.999, 0.0),
    "rate times 10": ("rate", 0.95, 1.0),
    "rate times 10, no clipping": ("rate", 0.95, 0.0),
}


def spike_autopsies(n_steps: int, seeds: Iterable[int], run: RunConfig) -> dict[str, list[Autopsy]]:
    """Every condition of SPIKES, once for each seed: the bad steps come after n_steps good ones."""
    found: dict[str, list[Autopsy]] = {}
    settings = {"max_steps": n_steps + 30, "warmup_steps": min(20, n_steps // 2), "schedule": "constant"}
    for name, (cause, beta2, clip) in progress(SPIKES.items(), "spikes"):
        config = TrainConfig(**settings, beta2=beta2, grad_clip=clip)
        found[name] = [autopsy(cause, config, n_steps, dataclasses.replace(run, seed=seed)) for seed in seeds]
    return found


def shown_alarms(alarms: list[float]) -> str:
    """Steps from the first bad one to the alarm, seed by seed; a dash where none came."""
    return " ".join(f"{alarm:.0f}" if math.isfinite(alarm) else "-" for alarm in alarms)


def plot_autopsies(autopsies: dict[str, Autopsy]) -> Figure:
    """Loss and three monitors around the bad steps, one line for each condition."""
    first = next(iter(autopsies.values()))
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True)
    units = {"loss": "loss (nats per token)", "attention entropy": "lowest attention entropy (nats)"}
    for axis, name in zip(axes.flat, first.series, strict=True):
        for condition, each in autopsies.items():
            steps = range(each.planted - 30, len(each.series[name]))
            axis.plot([step - each.planted for step in steps], each.series[name][steps.start :], lw=1, label=condition)
        axis.axvspan(-0.5, N_BAD - 0.5, color="grey", alpha=0.25, lw=0)
        axis.set(ylabel=units.get(name, name), yscale="linear" if name in units else "log")
    for axis in axes[1]:
        axis.set_xlabel("step after the first bad one")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure
