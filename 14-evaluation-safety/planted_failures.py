"""Topic 14 - Planted failures: instruments of safety that give a number and mean nothing, each beside the right one.

python 14-evaluation-safety/evaluation_safety.py --break unequal-sets        # one of them
python 14-evaluation-safety/evaluation_safety.py figures planted-breaks      # all, the chapter's table

Every entry of PLANTED_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bias_measures import association, spearman, weat
from model_probes import probed
from tiny_world import World
from watermark import Watermark, detect
from workbench import RunConfig

Row = tuple[str, float, float]


def constant_bias(run: RunConfig) -> list[Row]:
    """A bias score that ignores its input passes every test that only asks for a number between 0 and 1.

    Planted strengths in any order, the reversed one too, get one score; asked to rank them, it shows.
    """
    planted = [-2.0, 0.0, 1.0, 2.0, 4.0]
    rng = np.random.default_rng(run.seed)
    sound = [strength + rng.normal(0, 0.1) for strength in planted]
    constant = [0.31 for _ in planted]
    return [
        (
            "constant-bias: rank correlation with five planted strengths",
            spearman(planted, sound),
            rank(planted, constant),
        )
    ]


def rank(planted: Sequence[float], scores: Sequence[float]) -> float:
    """A score that never moves orders nothing: 0."""
    return spearman(planted, scores) if len(set(scores)) > 1 else 0.0


def unequal_sets(run: RunConfig) -> list[Row]:
    """WEAT's statistic is a sum over x less a sum over y. With eight words against four, and all of them equally near
    to the attribute, the sums differ by their sizes; differences of means do not.
    """
    rng = np.random.default_rng(run.seed)
    a, b = np.eye(12)[:2], np.eye(12)[2:4]
    words = 0.5 * (a[0] + a[1]) + 0.1 * rng.normal(size=(12, 12))  # all targets lean to a
    values = association(words, a, b)
    sums = values[:8].sum() - values[8:].sum()
    return [
        (
            "unequal-sets: how much more 8 words lean to a than 4 that lean as much",
            float(values[:8].mean() - values[8:].mean()),
            float(sums),
        )
    ]


def no_permutation(run: RunConfig) -> list[Row]:
    """An effect size of a few words is large by chance. Of vectors drawn by lot every second effect exceeds 0.5, which
    tables call medium; the permutation test calls 5 % of them significant, as it says.
    """
    rng, effects, p_values = np.random.default_rng(run.seed), [], []
    for _ in range(200):
        made = weat(*(rng.normal(size=(4, 16)) for _ in range(4)))
        effects.append(abs(made.effect))
        p_values.append(made.p_two_sided)
    sound, broken = np.mean(np.array(p_values) <= 0.05), np.mean(np.array(effects) > 0.5)
    return [("no-permutation: share of 200 pairs of random sets that are called biased", float(sound), float(broken))]


def repeated_pairs(run: RunConfig) -> list[Row]:
    """A text of the world says "Question :" again and again. If that pair is green, each repetition counts as evidence,
    and texts without a mark are called marked.
    """
    world, found = World(), []
    ids = {token: place for place, token in enumerate(world.vocabulary())}
    rng = random.Random(run.seed)
    texts = []
    for _ in range(20):
        made: list[int] = []
        while len(made) < 300:
            made += [ids[token] for token in world.document(rng).tokens]
        texts.append(made[:300])
    for distinct in (True, False):
        marks = [Watermark(len(ids), 500 + key) for key in range(30)]
        hits = [detect(text, mark, distinct=distinct).p_value <= 0.01 for mark in marks for text in texts]
        found.append(sum(hits) / len(hits))
    return [("repeated-pairs: false alarms at level 1 %, 300 tokens of the world, 30 keys", *found)]


def probe_without_control(run: RunConfig) -> list[Row]:
    """A linear probe on vectors that were drawn by lot, one for each of 60 words, tells a property that was drawn by
    lot too: it knows the words by heart. Its accuracy is high; its selectivity is what the vectors mean: nothing.
    """
    generator, rng = torch.Generator().manual_seed(run.seed), random.Random(run.seed)
    vectors = torch.randn(60, 64, generator=generator)
    kinds = [rng.randrange(4) for _ in range(60)]
    types = [rng.randrange(60) for _ in range(900)]
    states = vectors[types] + 0.1 * torch.randn(900, 64, generator=generator)
    made = probed(states, [kinds[kind] for kind in types], types, 600, run.seed)
    return [("probe-without-control: what a probe says of vectors drawn by lot", made.selectivity, made.accuracy)]


PLANTED_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "constant-bias": (constant_bias, 1),
    "unequal-sets": (unequal_sets, 1),
    "no-permutation": (no_permutation, 1),
    "repeated-pairs": (repeated_pairs, 8),
    "probe-without-control": (probe_without_control, 2),
}
