"""Topic 11 - Exact experiments: what each estimator, each KL and each preference loss is worth on the enumerated bed.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py exact                       # the table of estimators
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures exact-estimators    # the same for the chapter
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from exact_policies import (
    ExactBed,
    Setting,
    best_baseline,
    distance,
    exact_gradient,
    fit_pairs,
    gae_loss,
    grpo_prompt_weight,
    ipo_optimum,
    judge,
    judged,
    judged_sample,
    kl_loss,
    kl_values,
    minus_baseline,
    nearby,
    pair_chances,
    tilted,
)
from policy_gradients import (
    PolicyConfig,
    dapo_loss,
    dr_grpo_loss,
    group_centred,
    group_normalised,
    grpo_loss,
    k1,
    k2,
    k3,
    per_sequence,
    reinforce_loss,
    rloo_loss,
    summed,
)
from preference_losses import dpo_loss, ipo_loss
from workbench import Column, RunConfig, announce, check_range, save_figure

MOVED = 0.5  # how far the policy under examination lies from the reference, see `nearby`
BETA = 0.3  # weight of the distance to the reference in all closed forms


@dataclass(frozen=True)
class ExactConfig:
    """How closely the estimators are looked at."""

    n_batches: int = 10_000  # batches sampled for each estimator
    n_rollouts: int = 4  # responses to each prompt in a batch

    def __post_init__(self) -> None:
        check_range(self, "n_batches", least=100)
        check_range(self, "n_rollouts", least=2)


# Estimators


def estimators(bed: ExactBed, policy: Tensor, setting: Setting) -> dict[str, tuple[Callable, Setting]]:
    """Every estimator of the policy gradient with its loss and what it is given."""
    values = bed.values(policy, bed.correct)
    wrong = torch.full_like(values, 0.3)
    best = best_baseline(bed, policy, bed.correct)

    def critic(known: Tensor, gae_lambda: float) -> Setting:
        return replace(setting, values=known, config=replace(setting.config, gae_lambda=gae_lambda))

    return {
        "REINFORCE": (reinforce_loss, setting),
        "best constant baseline": (tilted(minus_baseline(best), summed), setting),
        "RLOO": (rloo_loss, setting),
        "group mean, sum over tokens": (tilted(group_centred, summed), setting),
        "Dr. GRPO": (dr_grpo_loss, setting),
        "group deviation alone": (tilted(group_normalised, summed), setting),
        "mean over own length alone": (tilted(group_centred, per_sequence), setting),
        "GRPO": (grpo_loss, setting),
        "DAPO": (dapo_loss, setting),
        "GAE 1, true values": (gae_loss, critic(values, 1.0)),
        "GAE 0.95, true values": (gae_loss, critic(values, 0.95)),
        "GAE 0, true values": (gae_loss, critic(values, 0.0)),
        "GAE 1, wrong values": (gae_loss, critic(wrong, 1.0)),
        "GAE 0.95, wrong values": (gae_loss, critic(wrong, 0.95)),
        "GAE 0, wrong values": (gae_loss, critic(wrong, 0.0)),
    }


def plain(config: ExactConfig, bed: ExactBed, seed: int = 0) -> Setting:
    settings = PolicyConfig(kl_coef=0.0, max_new_tokens=bed.max_len)
    return Setting(bed.correct, settings, config.n_rollouts, config.n_batches, seed)


def exact(config: ExactConfig, run: RunConfig) -> None:
    """Compare every estimator of the policy gradient with the true gradient, on a task that is enumerated."""
    announce(f"{config.n_batches} batches for each of 15 estimators", 0.0025 * config.n_batches)
    bed = ExactBed(seed=run.seed)
    policy = nearby(bed, MOVED)
    truth = bed.gradient(policy, bed.correct)
    chances = (bed.log_probs(policy).exp() * bed.correct).sum(dim=1)
    print(f"{len(bed.responses)} responses; chance of a right one: {', '.join(f'{p:.2f}' for p in chances)}")
    print(f"{'estimator':28} {'length':>15} {'angle':>7} {'noise':>6}   1 is the true gradient's length")
    for name, (loss, setting) in estimators(bed, policy, plain(config, bed, run.seed)).items():
        verdict = judge(bed.estimates(policy, loss, setting), truth)
        length = f"{verdict.scale:.3f} ± {verdict.scale_error:.3f}"
        print(f"{name:28} {length:>15} {verdict.angle:6.1f}° {verdict.noise:6.2f}   {'biased' * verdict.biased}")


def estimator_table(config: Any, run: RunConfig, exact_config: ExactConfig = ExactConfig()) -> None:  # noqa: B008 - frozen
    """The verdict on each estimator for the chapter, and what a step along its mean does to the length of answers."""
    bed = ExactBed()
    policy = nearby(bed, MOVED)
    truth = bed.gradient(policy, bed.correct)
    ways = length_slopes(bed, policy)
    cells: dict[str, list[list[float]]] = {}
    for seed in range(config.n_seeds):
        for name, (loss, setting) in estimators(bed, policy, plain(exact_config, bed, seed)).items():
            found = bed.estimates(policy, loss, setting)
            verdict, step = judge(found, truth), found.mean(dim=0)
            step = step / step.norm()
            slopes = [(step @ way.flatten()).item() for way in ways.values()]
            numbers = [verdict.scale, verdict.angle, verdict.noise, verdict.off, *slopes]
            cells.setdefault(name, [[] for _ in numbers])
            for cell, number in zip(cells[name], numbers, strict=True):
                cell.append(number)
    columns = [
        *(Column("Estimator"), Column("length", "true = 1", ".3f"), Column("angle", "degrees", ".1f")),
        *(Column("noise / signal", "", ".2f"), Column("largest z", "limit 4.1", ".1f")),
        *(Column("right answers", "tokens per step", "+.2f"), Column("wrong answers", "tokens per step", "+.2f")),
    ]
    config.save("exact-estimators", columns, [[name, *row] for name, row in cells.items()], "exact-estimators")


def length_slopes(bed: ExactBed, policy: Tensor) -> dict[str, Tensor]:
    """The gradients of the mean length of right and of wrong responses: what a step does to them, to first order."""

    def mean_length(logits: Tensor, right: bool) -> Tensor:
        chances = bed.log_probs(logits).exp() * (bed.correct if right else 1 - bed.correct)
        return ((chances * bed.lengths).sum(dim=1) / chances.sum(dim=1)).mean()

    return {
        name: exact_gradient(lambda z, right=right: mean_length(z, right), policy)
        for name, right in (("right", True), ("wrong", False))
    }


def weight_table(config: Any, run: RunConfig) -> None:
    """What dividing by the group's deviation multiplies the gradient of a prompt by: measured, and by the formula."""
    bed = ExactBed()
    policy = nearby(bed, MOVED)
    truth = bed.gradient(policy, bed.correct)
    chances = (bed.log_probs(policy).exp() * bed.correct).sum(dim=1)
    rows: list[list] = []
    for n_rollouts in (2, 4, 8):
        measured: list[list[float]] = [[] for _ in range(bed.n_prompts)]
        for seed in range(config.n_seeds):
            setting = plain(ExactConfig(6000, n_rollouts), bed, seed)
            found = bed.estimates(policy, tilted(group_normalised, summed), setting)
            for prompt, cell in enumerate(measured):
                own, wanted = (part.view(-1, *policy.shape)[:, prompt].flatten(1) for part in (found, truth))
                cell.append(judge(own, wanted[0]).scale)
        for prompt, cell in enumerate(measured):
            p = chances[prompt].item()
            rows.append([f"{n_rollouts}", p, cell, grpo_prompt_weight(p, n_rollouts), (n_rollouts - 1) / n_rollouts])
    columns = [
        *(Column("Rollouts"), Column("chance of a right answer", "", ".3f"), Column("weight measured", "", ".3f")),
        *(Column("by formula", "", ".3f"), Column("Dr. GRPO's, by formula", "", ".3f")),
    ]
    config.save("exact-weights", columns, rows, "exact-weights")
    save_figure(plot_weights(), config.folder / "exact-weights.svg")


def plot_weights() -> Figure:
    """Weight of a prompt against its chance of a right answer, for groups of several sizes."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    places = [index / 200 for index in range(2, 199)]
    for n_rollouts in (2, 4, 8, 64):
        axis.plot(places, [grpo_prompt_weight(p, n_rollouts) for p in places], label=f"{n_rollouts} rollouts")
    axis.plot(places, [(p * (1 - p)) ** -0.5 for p in places], "k:", label="limit 1/√(p(1−p))")
    axis.axhline(1, color="grey", lw=1, ls="--", label="RLOO")
    axis.set(xlabel="chance of a right answer", ylabel="weight of the prompt's gradient", ylim=(0, 6))
    axis.legend(frameon=False, fontsize=8)
    return figure


# Distance to the reference


def kl_table(config: Any, run: RunConfig) -> None:
    """Mean and spread of k1, k2 and k3 near the reference and far from it, by enumeration: no sampling, no seeds."""
    bed, rows = ExactBed(), []
    near, far = (kl_values(bed, nearby(bed, size)) for size in (MOVED, 4 * MOVED))
    for name in near:
        rows.append([name, *near[name], *far[name]])
    columns = [Column("Estimator")]
    for where, found in (("near", near), ("far", far)):
        columns += [
            Column(f"mean, {where}", f"KL {found['k1, sequence'][0]:.3f}", ".3f"),
            Column("deviation", "", ".2f"),
        ]
    config.save("exact-kl", columns, rows, "exact-kl", 1)


def kl_gradient_table(config: Any, run: RunConfig) -> None:
    """The gradients that come of differentiating k1, k2, k3: angle to that of the KL and of the reversed KL."""
    bed = ExactBed()
    policy = nearby(bed, 2 * MOVED)
    truths = {
        "KL": exact_gradient(lambda z: bed.kl(z, bed.reference), policy),
        "reversed": exact_gradient(lambda z: bed.kl(bed.reference, z), policy),
    }
    rows: list[list] = []
    for level in ("sequence", "token"):
        for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
            for with_ratio in (False, True):
                cells: list[list[float]] = [[] for _ in range(5)]
                for seed in range(config.n_seeds):
                    setting = replace(plain(ExactConfig(10_000), bed, seed), n_rollouts=1)
                    found = bed.estimates(policy, kl_loss(estimator, level, with_ratio), setting)
                    one, other = (judge(found, truth) for truth in truths.values())
                    for cell, number in zip(
                        cells, (one.scale, one.angle, one.off, other.angle, other.off), strict=True
                    ):
                        cell.append(number)
                rows.append([f"{name}{' * ratio' * with_ratio}, {level}", *cells])
    columns = [
        *(Column("Differentiated"), Column("length", "KL's = 1", ".2f"), Column("angle to the KL's", "degrees", ".1f")),
        *(Column("largest z", "limit 4.1", ".1f"), Column("angle to the reversed KL's", "degrees", ".1f")),
        Column("largest z", "limit 4.1", ".1f"),
    ]
    config.save("exact-kl-gradients", columns, rows, "exact-kl-gradients")


# Preferences


def preference_table(config: Any, run: RunConfig) -> None:
    """Where DPO and IPO end: with every pair weighed exactly, with a judge who is always sure, and with few pairs."""
    bed = ExactBed(max_len=4)
    chances, sure = pair_chances(bed.worth), pair_chances(1000 * bed.worth)
    best, _ = bed.optimum(bed.worth, BETA)
    exact_pairs, sure_pairs = (judged(bed, bed.reference, c) for c in (chances, sure))
    rows: list[list] = []
    for name, loss in (("DPO", lambda p: dpo_loss(p, BETA)), ("IPO", lambda p: ipo_loss(p, BETA))):
        goal = best if name == "DPO" else ipo_optimum(bed, chances, bed.reference, BETA)
        cases = [("all pairs, exactly", [exact_pairs], goal)]
        cases += [("all pairs, a judge always sure", [sure_pairs], goal)]
        for n_pairs in (100, 1000, 10_000):
            drawn = [judged_sample(bed, bed.reference, chances, n_pairs, seed) for seed in range(config.n_seeds)]
            cases.append((f"{n_pairs:,} judged pairs of each prompt", drawn, goal))
        for case, weights, wanted in cases:
            ends = [fit_pairs(bed, weight, loss, 300) for weight in weights]
            rows.append([f"{name}, {case}", *([measure(bed, end, wanted)[i] for end in ends] for i in range(3))])
    for name, log_probs in (("reference", bed.log_probs(bed.reference)), ("closed form of DPO", best)):
        rows.append([name, *([number] for number in measure(bed, bed.policy_of(log_probs), best))])
    columns = [
        *(Column("Trained on"), Column("KL to the closed form", "nats", ".2g")),
        *(Column("true reward", "", ".3f"), Column("KL to the reference", "nats", ".2f")),
    ]
    config.save("exact-preferences", columns, rows, "exact-preferences")


def measure(bed: ExactBed, logits: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """KL to a wanted policy, true reward, KL to the reference."""
    log_probs = bed.log_probs(logits)
    far = distance(bed, log_probs, wanted), distance(bed, log_probs, bed.log_probs(bed.reference))
    return far[0], bed.expected(logits, bed.worth).item(), far[1]


EXACT_EXPERIMENTS: dict[str, tuple[Callable[[Any, RunConfig], None], float]] = {  # name -> function, seconds
    "exact-estimators": (estimator_table, 90),
    "exact-weights": (weight_table, 20),
    "exact-kl": (kl_table, 1),
    "exact-kl-gradients": (kl_gradient_table, 40),
    "exact-preferences": (preference_table, 60),
}
