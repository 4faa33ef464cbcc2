"""Topic 12 - Scaling failures: five ways to a wrong law, or a wrong share of the peak, each switched on and measured.

python 12-scaling-optimization/scaling_optimization.py --break embeddings-left-out
python 12-scaling-optimization/scaling_optimization.py figures breaks      # all of them, the chapter's table

Each entry of SCALING_BREAKS is name -> (function(run), seconds); the function returns rows (what, as it should be, with
the failure). Kaplan et al. 2020 and Hoffmann et al. 2022 differ by the first and the last of them; see also Pearce and
Song 2024 (arXiv 2406.12907) and Porian et al. 2024 (arXiv 2406.19146).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from isoflop_runs import early_readings
from scaling_laws import (
    PUBLISHED_LAWS,
    ChinchillaLaw,
    Runs,
    body_exponent,
    bootstrap_laws,
    fit_power,
    interval,
    planted_runs,
)
from training_cost import GPUS
from training_planner import Plan, known_model, utilisations
from workbench import RunConfig

Row = tuple[str, float, float]  # what is measured, as it should be, with the failure
PLANTED = ChinchillaLaw(0.55, 11.0, 0.45, 17.0, 0.35)  # a world like the small one of this course
PLANTED_SIZES = (4.6e3, 7.8e3, 1.25e4, 2.4e4, 3.8e4, 7.7e4)
PLANTED_BUDGETS = (1e10, 2.5e10, 6e10, 1.5e11)


def embeddings_left_out(run: RunConfig) -> list[Row]:
    """N and C without the embeddings, on models so small that the embeddings are most of them."""
    law, found = PUBLISHED_LAWS["Hoffmann et al. 2022, TeX source"], []
    for sizes in ((768, 1.5e9), (1e9, 1e12)):
        found.append((f"a of N_best ~ C^a, bodies from {sizes[0]:g} to {sizes[1]:g} weights", sizes))
    rows = [(what, law.exponent, body_exponent(law, sizes)) for what, sizes in found]
    grown = 1000.0
    return [*rows, ("times the size for 1,000 times the compute", *(grown**row for row in rows[0][1:]))]


def without_floor(run: RunConfig) -> list[Row]:
    """The least loss of each budget fitted by a power law without E, and asked for a budget 1,000 times as large."""
    budgets = np.geomspace(PLANTED_BUDGETS[0], PLANTED_BUDGETS[-1], 6)
    noise = np.exp(np.random.default_rng(run.seed).normal(0, 0.002, len(budgets)))
    least = PLANTED.least_loss(budgets) * noise
    with_floor, without = (fit_power(budgets, least, floor) for floor in (True, False))
    rows = [("largest error on the budgets that were fitted, relative", *(
        float(np.abs(law.loss(budgets) / least - 1).max()) for law in (with_floor, without)
    ))]  # fmt: skip
    for times in (10, 1000):
        asked, truth = times * budgets[-1], PLANTED.least_loss(times * budgets[-1])
        errors = [float(law.loss(asked) / truth - 1) for law in (with_floor, without)]
        rows.append((f"error at {times} times the largest budget, relative", *errors))
    return rows


def one_name_for_three_shares(run: RunConfig) -> list[Row]:
    """One measured step of Llama-3.1-8B with full recomputation, as a share of the peak by three definitions."""
    model = known_model("Llama-3.1-8B")
    plan = Plan(n_gpus=64, batch_size=128, seq_len=32768, zero_stage=3, recompute="full")
    shares = utilisations(model, plan, 12.0, GPUS["H100 SXM"])
    mfu = shares["model FLOPs (MFU)"]
    return [(f"share of the peak by {name}", mfu, share) for name, share in shares.items() if share != mfu]


def schedule_of_another_length(run: RunConfig) -> list[Row]:
    """The loss of a short run read from a long one, whose learning rate is still high there (Kaplan's schedule)."""
    rows = early_readings(16, 2, 1040, (0.25, 0.5), run, n_documents=200)
    return [(f"gap after {steps} steps, nats per token", matched, early) for steps, early, matched in rows]


def points_as_runs(run: RunConfig) -> list[Row]:
    """Four readings of each run enter the bootstrap as if they were four runs; 12 worlds of 24 runs each."""
    widths: list[list[float]] = [[], []]
    hits = [0, 0]
    n_worlds = 12
    for seed in range(n_worlds):
        runs = planted_runs(PLANTED, PLANTED_SIZES, PLANTED_BUDGETS, 0.01, 1, run.seed + seed)
        for index, these in enumerate(repeated_readings(runs, 4, run.seed + seed)):
            found = [law.exponent for law in bootstrap_laws(these, 40, seed)]
            low, high = interval(found)
            widths[index].append(high - low)
            hits[index] += low <= PLANTED.exponent <= high
    return [
        ("share of 95 % intervals of a that cover the truth", hits[0] / n_worlds, hits[1] / n_worlds),
        ("mean width of the interval", float(np.mean(widths[0])), float(np.mean(widths[1]))),
    ]


def repeated_readings(runs: Runs, n_readings: int, seed: int) -> tuple[Runs, Runs]:
    """Every run read several times, with errors a tenth of what seeds differ by: as groups, and as if independent."""
    index = np.repeat(np.arange(len(runs)), n_readings)
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.001, len(index)))
    read = runs.take(index)
    read = dataclasses.replace(read, loss=read.loss * noise)
    return dataclasses.replace(read, group=index), dataclasses.replace(read, group=np.arange(len(index)))


SCALING_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "embeddings-left-out": (embeddings_left_out, 1),
    "no-floor": (without_floor, 2),
    "three-utilisations": (one_name_for_three_shares, 1),
    "early-reading": (schedule_of_another_length, 40),
    "points-as-runs": (points_as_runs, 15),
}
