"""Topic 15 - Request routing: a small model answers first, and a large one only where the small one is not sure.

    cascade = Cascade(small, large, calibrated, threshold=0.8)     # two endpoints, one to whoever asks
    cascade.chat(messages)                                         # the small model's answer, or the large one's

Chen, Zaharia and Zou 2023 (FrugalGPT, arXiv 2305.05176). How sure the small model is comes from the log probabilities
of its own answer, made into a chance of being right by isotonic regression (Ayer et al. 1955; Zadrozny and Elkan 2002)
on questions with known answers. The cost of an answer is its tokens times the weights that each of them passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from calibration import auc
from chat_endpoint import Endpoint, LocalEndpoint, Reply
from chat_model import chat_instructions, load_chat_model
from draft_model import load_draft_model
from fine_tuning_adaptation import with_end
from served_model import CourseServing, Messages, ServedModel
from serving_engine import EngineConfig
from tiny_world import World, join, words

ASKED = ("fact", "read", "sum", "sort", "refuse", "unknown")  # categories of instructions with one right answer


# How sure a model is


def mean_logprob(reply: Reply) -> float:
    """Nats per token of an answer: a long answer is not less sure for being long."""
    return float(np.mean(reply.logprobs)) if reply.logprobs else -np.inf


def least_logprob(reply: Reply) -> float:
    """Nats of the token that was least sure: one wrong digit makes a sum wrong."""
    return float(np.min(reply.logprobs)) if reply.logprobs else -np.inf


def total_logprob(reply: Reply) -> float:
    """Nats of the whole answer: the log of the chance that drawing would give it."""
    return float(np.sum(reply.logprobs)) if reply.logprobs else -np.inf


SCORES: dict[str, Callable[[Reply], float]] = {
    "mean": mean_logprob,
    "least": least_logprob,
    "total": total_logprob,
}


class Isotonic:
    """Scores made into chances by the best rising step function: pool adjacent violators.

    Questions in order of their scores; wherever a block's share of right answers is not above the one before, the two
    are one block. The result is the least-squares fit among all rising functions. Between blocks it is constant, below
    the first and above the last it stays.
    """

    def __init__(self, scores: Sequence[float], right: Sequence[bool]) -> None:
        values, labels = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
        if values.shape != labels.shape or values.ndim != 1 or not len(values):
            raise ValueError(f"{values.shape} scores and {labels.shape} answers: as many of both, at least 1")
        if np.isnan(values).any():
            raise ValueError("a score is not a number; leave that question out")
        blocks: list[list[float]] = []  # [lowest score, sum of right, count], rising in their shares
        for score in np.unique(values):
            own = labels[values == score]
            blocks.append([float(score), float(own.sum()), len(own)])
            while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
                _, n_right, count = blocks.pop()
                blocks[-1][1] += n_right
                blocks[-1][2] += count
        self.starts = np.array([block[0] for block in blocks])
        self.shares = np.array([block[1] / block[2] for block in blocks])

    def __call__(self, score: float | np.ndarray) -> np.ndarray:
        """The chance of being right."""
        places = np.searchsorted(self.starts, score, side="right") - 1
        return self.shares[np.maximum(places, 0)]


# The cascade


class Cascade:
    """Two endpoints as one: the small model's answer is kept if its chance of being right is at least `threshold`.

    calibrated: score -> chance, such as an Isotonic. The large model is asked anew; it does not see the small one's
    answer. `n_asked` and `n_escalated` count. A stream cannot be taken back, so there is none.
    """

    def __init__(
        self,
        small: Endpoint,
        large: Endpoint,
        calibrated: Callable[[float], Any],
        threshold: float,
        score: Callable[[Reply], float] = least_logprob,
    ) -> None:
        self.small, self.large, self.calibrated, self.score = small, large, calibrated, score
        self.threshold, self.name = threshold, f"{small.name}, then {large.name}"
        self.n_asked = self.n_escalated = 0

    def chat(self, messages: Messages, **settings: Any) -> Reply:
        self.n_asked += 1
        reply = self.small.chat(messages, **settings | {"logprobs": True})
        if reply.finish_reason == "stop" and float(self.calibrated(self.score(reply))) >= self.threshold:
            return reply
        self.n_escalated += 1
        return self.large.chat(messages, **settings)


# Measured and derived


@dataclass(frozen=True)
class Answered:
    """The same questions answered by both models; costs in any unit, such as tokens times weights."""

    score: np.ndarray  # of the small model's answers
    right_small: np.ndarray
    right_large: np.ndarray
    cost_small: np.ndarray
    cost_large: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


class Point(NamedTuple):
    """What a way of routing costs and gets, on average."""

    cost: float  # as a multiple of always asking the large model
    quality: float  # share right
    escalated: float  # share of the questions that the large model answers


def always(data: Answered, large: bool) -> Point:
    unit = data.cost_large.mean()
    right, cost = (data.right_large, data.cost_large) if large else (data.right_small, data.cost_small)
    return Point(float(cost.mean() / unit), float(right.mean()), float(large))


def cascade(data: Answered, keep: np.ndarray) -> Point:
    """The small model is asked always, the large one where its answer is not kept: c_s + P(not kept) c_l."""
    cost = data.cost_small + np.where(keep, 0.0, data.cost_large)
    right = np.where(keep, data.right_small, data.right_large)
    return Point(float(cost.mean() / data.cost_large.mean()), float(right.mean()), float(1 - keep.mean()))


def frontier(data: Answered, chances: np.ndarray) -> list[Point]:
    """The cascade at every threshold, from keeping all to keeping none."""
    thresholds = [*np.unique(chances), np.inf]
    return [cascade(data, chances >= threshold) for threshold in thresholds]


def random_at(data: Answered, cost: float) -> float:
    """Quality of a router that flips a coin before asking either model, at this cost; at most the large one's.

    With a share q to the large model: cost (1 - q) c_s + q c_l and quality (1 - q) a_s + q a_l, a straight line.
    """
    small, large = always(data, False), always(data, True)
    q = np.clip((cost - small.cost) / (large.cost - small.cost), 0, 1)
    return float(small.quality + q * (large.quality - small.quality))


def clairvoyant(data: Answered) -> Point:
    """A router that knows beforehand who is right: the small model where it is, or where nobody is; else the large."""
    large = (data.right_large > data.right_small).astype(bool)
    cost = np.where(large, data.cost_large, data.cost_small)
    right = np.maximum(data.right_small, data.right_large)
    return Point(float(cost.mean() / data.cost_large.mean()), float(right.mean()), float(large.mean()))


def gain_needed(data: Answered) -> float:
    """What the escalated questions must gain on average for a cascade to beat the coin: (a_l - a_s) / (1 - c_s / c_l).

    The coin reaches the cascade's cost with q = e / (1 - r), e the escalated share and r = c_s / c_l, because it pays
    one model a question and the cascade the small one always. It then gains q (a_l - a_s), the cascade e times what the
    escalated gain. Equal costs of every question of a model are assumed.
    """
    small, large = always(data, False), always(data, True)
    return (large.quality - small.quality) / (1 - small.cost)


def gain_of(data: Answered, keep: np.ndarray) -> float:
    """What the escalated questions do gain on average; 0 if there are none."""
    gone = ~keep
    return float((data.right_large - data.right_small)[gone].mean()) if gone.any() else 0.0


def best_threshold(worth_right: float, quality_large: float, relative_cost: float = 1.0) -> float:
    """Escalate while it pays: (a_l - p) V > c_l, so keep where p >= a_l - c_l / V.

    worth_right: V, of a right answer, in units of the large model's cost. It holds for p that are chances; a score that
    only looks like one is compared with a number that has nothing to do with it. The large model is taken to be as good
    on hard questions as on all.
    """
    return quality_large - relative_cost / worth_right


def net_value(point: Point, worth_right: float) -> float:
    """V times quality, less cost, per question."""
    return worth_right * point.quality - point.cost


# The course's two models


def course_pair() -> tuple[LocalEndpoint, LocalEndpoint]:
    """Topic 13's draft model and the chat model that it was made to guess for."""
    made = []
    for name, (model, tokenizer) in (("draft", load_draft_model()), ("chat", load_chat_model())):
        model = with_end(model, tokenizer.im_end_id)  # the draft's folder does not name the end of a turn
        served = ServedModel(name, model, CourseServing(tokenizer))
        made.append(LocalEndpoint(served, EngineConfig(max_batch=32)))
    return made[0], made[1]


def ask_both(
    small: LocalEndpoint, large: LocalEndpoint, n: int, seed: int, score: Callable[[Reply], float] = least_logprob
) -> Answered:
    """n held-out questions of each of ASKED, to both models; the cost of an answer is tokens times weights."""
    world, columns = World(), {name: [] for name in Answered.__dataclass_fields__}
    for category in ASKED:
        items = chat_instructions(world, n, seed, category, new=True)
        chats = [[{"role": "user", "content": join(item.prompt)}] for item in items]
        for which, endpoint in (("small", small), ("large", large)):
            n_weights = sum(weight.numel() for weight in endpoint.served.model.parameters())
            replies = endpoint.chat_all(chats, max_tokens=40, logprobs=True)
            for item, reply in zip(items, replies, strict=True):
                columns[f"right_{which}"].append(float(item.check(words(reply.text))))
                columns[f"cost_{which}"].append(n_weights * (reply.n_prompt + reply.n_generated))
            if which == "small":
                columns["score"] += [score(reply) for reply in replies]
    return Answered(*(np.array(column) for column in columns.values()))


def halves(data: Answered, seed: int) -> tuple[Answered, Answered]:
    """Two halves of the questions, drawn: one to calibrate, one to measure."""
    order = np.random.default_rng(seed).permutation(len(data))
    parts = order[: len(data) // 2], order[len(data) // 2 :]
    columns = [getattr(data, name) for name in Answered.__dataclass_fields__]
    return tuple(Answered(*(column[part] for column in columns)) for part in parts)


def discrimination(data: Answered) -> float:
    """The chance that a right answer of the small model has a higher score than a wrong one; 0.5 knows nothing."""
    return auc(data.score, data.right_small)


def plot_frontier(curves: dict[str, list[Point]], marks: dict[str, Point]) -> Figure:
    """Quality over cost: curves for ways of routing, marks for single points."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axes.plot([point.cost for point in points], [point.quality for point in points], label=name)
    for name, point in marks.items():
        axes.plot(point.cost, point.quality, "o", color="black")
        axes.annotate(name, (point.cost, point.quality), textcoords="offset points", xytext=(6, -10))
    axes.set_xlabel("cost of a question (always asking the large model = 1)")
    axes.set_ylabel("share answered right")
    axes.legend(loc="lower right")
    return figure
