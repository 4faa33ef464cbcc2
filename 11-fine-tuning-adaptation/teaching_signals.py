"""Topic 11 - Teaching signals: which tokens a training pushes, up or down, and how hard, in five kinds of training.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures signals

The pushes are the gradients of the course's own losses in the log-probabilities of an example's tokens; nothing is
trained. Example and values are made up, so only the pattern counts: each panel is divided by its largest push.
"""

from collections.abc import Callable
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from exact_policies import gae_loss
from policy_gradients import PolicyConfig, Rollouts, grpo_loss, rloo_loss
from preference_losses import Pairs, Responses, dpo_loss
from workbench import RunConfig, save_figure

PROMPT = "What is 3 plus 4 ?".split()
RIGHT, WRONG = "3 plus 4 is 7 . end".split(), "3 plus 4 is 8 . end".split()
ANSWERS = [RIGHT, RIGHT[4:], WRONG, WRONG[4:]]  # of one prompt: two right, two wrong, one of each short
Rows = list[list[tuple[str, float | None]]]  # tokens with their push; None: not counted


def pushed(loss: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """-d loss / d log-probability of every token, over the largest size: what a step does. All log-probabilities -1."""
    log_probs = torch.full(shape, -1.0, requires_grad=True)
    (slopes,) = torch.autograd.grad(loss(log_probs), log_probs)
    return -slopes / slopes.abs().max()


def fine_tuning_signal() -> Rows:
    """The mean over the tokens of the one right answer."""
    pushes = pushed(lambda log_probs: -log_probs.mean(), (len(RIGHT),)).tolist()
    return [[(token, None) for token in PROMPT] + list(zip(RIGHT, pushes, strict=True))]


def pair_signal() -> Rows:
    """DPO on a right and a wrong answer, at the start, where the policy is the reference."""

    def loss(log_probs: Tensor) -> Tensor:
        sums, start = log_probs.sum(dim=1), torch.tensor([-float(len(RIGHT))])
        counts = torch.tensor([len(RIGHT)])
        return dpo_loss(Pairs(sums[:1], sums[1:], start, start, counts, counts), 0.1).mean()

    pushes = pushed(loss, (2, len(RIGHT))).tolist()
    prompt = [(token, None) for token in PROMPT]
    return [prompt + list(zip(answer, row, strict=True)) for answer, row in zip((RIGHT, WRONG), pushes, strict=True)]


def group_signal(loss: Callable[[Tensor, Rollouts, PolicyConfig], Tensor]) -> Rows:
    """A policy gradient on ANSWERS, two of which are right. Values: one half until the digit is written, then known."""
    width = max(len(answer) for answer in ANSWERS)
    mask, values = torch.zeros(len(ANSWERS), width, dtype=torch.bool), torch.zeros(len(ANSWERS), width)
    for row, answer in enumerate(ANSWERS):
        mask[row, : len(answer)] = True
        digit = len(answer) - 3
        values[row, : digit + 1] = 0.5
        values[row, digit + 1 : len(answer)] = float(answer[digit] == "7")
    rewards, old = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.full((len(ANSWERS), width), -1.0)
    rollouts = Rollouts(Responses(torch.zeros(0), mask), rewards, old * mask, old * mask, values)
    config = PolicyConfig(kl_coef=0.0, gae_lambda=0.5)
    pushes = pushed(lambda log_probs: loss(log_probs * mask, rollouts, config), mask.shape).tolist()
    return [list(zip(answer, row, strict=False)) for answer, row in zip(ANSWERS, pushes, strict=True)]


def draw_rows(axis: Axes, rows: Rows, title: str) -> None:
    """Tokens as cells: blue is pushed up, red down, white left alone; grey words are not counted."""
    for height, row in enumerate(rows):
        for place, (token, push) in enumerate(row):
            color = plt.get_cmap("RdBu")(0.5 + 0.42 * (push or 0.0))
            axis.add_patch(plt.Rectangle((place, -height), 0.94, 0.88, facecolor=color, edgecolor="0.75", lw=0.5))
            words = {"color": "0.55" if push is None else "white" if abs(push) > 0.75 else "black", "fontsize": 8}
            axis.text(place + 0.47, -height + 0.42, token, ha="center", va="center", **words)
    axis.set(xlim=(-0.05, max(len(row) for row in rows)), ylim=(0.1 - len(rows), 1.0))
    axis.set_title(title, fontsize=9, loc="left")
    axis.axis("off")


def plot_signals() -> Figure:
    """Five kinds of training, and what each does to every token of the same answers."""
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 2, 4))
    draw_rows(figure.add_subplot(grid[0, :]), fine_tuning_signal(), "SFT: a right answer is given")
    draw_rows(figure.add_subplot(grid[1, :]), pair_signal(), "DPO: one of two answers is better")
    groups = {
        "RLOO: four answers, two are right": rloo_loss,
        "GRPO: the same, over each one's length": grpo_loss,
        "PPO: the same, with a value model": gae_loss,
    }
    for column, (title, loss) in enumerate(groups.items()):
        draw_rows(figure.add_subplot(grid[2, column]), group_signal(loss), title)
    return figure


def signals(config: Any, run: RunConfig) -> None:
    """Which tokens each kind of training pushes, up or down: a figure of gradients, without training or seeds."""
    save_figure(plot_signals(), config.folder / "signals.svg")


SIGNAL_EXPERIMENTS: dict[str, tuple[Callable[[Any, RunConfig], None], float]] = {"signals": (signals, 2)}
