"""Topic 11 - Preference experiments: the course model learns from checked answers, and from a judge that can be fooled.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py reinforce --method rloo --budget 60
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py preference --loss ipo
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures rl-methods over-optimisation preference-losses

Gao et al. 2022 (over-optimisation of a learned reward, arXiv 2210.10760).
"""

import copy
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from course_model import FOLDER, load_course_model
from course_tokenizer import CourseTokenizer
from equal_compute import remembered
from exact_experiments import EXACT_EXPERIMENTS, ExactConfig, exact
from fine_tuning_adaptation import (
    AnswerConfig,
    DialogueBatches,
    answer_loss,
    category_accuracy,
    encode_dialogues,
    prompt_ids,
    with_end,
)
from gpt2 import SamplingConfig
from huggingface_folders import WEIGHTS
from modern_llm_architectures import CausalLM
from policy_gradients import (
    FROM_REFERENCE,
    PolicyConfig,
    RewardTask,
    improve,
    roll_out,
    sample_responses,
    take_step,
)
from preference_failures import preference_breaks
from preference_losses import (
    Pairs,
    Responses,
    ScalarModel,
    dpo_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    lay_out,
    orpo_loss,
    response_rewards,
    reward_loss,
    score_pairs,
    simpo_loss,
)
from tiny_world import Instruction, World, join, words
from training_transformers import TrainConfig, fit
from workbench import Column, RunConfig, announce, check_range, pick_device, progress, save_figure, seed_everything

CATEGORIES = ("sum", "sort")  # instructions with one right answer that can be worked out
MOST_TOKENS = 20  # longest answer; right ones have at most 15
EXAM = AnswerConfig(n_questions=150, exam_split="content")  # operands and numbers that no training has seen


# What is asked, and what an answer is worth


class Question(NamedTuple):
    """An instruction, and its prompt as ids."""

    prompt: list[int]
    instruction: Instruction


def questions(tokenizer: CourseTokenizer, instructions: Iterable[Instruction]) -> list[Question]:
    return [Question(prompt_ids(tokenizer, join(item.prompt)), item) for item in instructions]


def draw_instructions(n: int, seed: int, split: str = "train") -> list[Instruction]:
    """Instructions of CATEGORIES, drawn alike."""
    world, rng = World(), random.Random(seed)
    return [world.instructions(1, rng.randrange(2**31), split, rng.choice(CATEGORIES))[0] for _ in range(n)]


def is_right(tokenizer: CourseTokenizer, question: Question, response: list[int]) -> bool:
    """Whether a response has ended, and is the right answer word for word."""
    ended = response[-1] == tokenizer.im_end_id
    return ended and question.instruction.check(words(tokenizer.decode(response[:-1])))


def checked_task(tokenizer: CourseTokenizer, seed: int, split: str = "train") -> RewardTask:
    """Fresh instructions of one side of the split; reward 1 for a right answer, else 0."""

    def draw(n: int, step: int) -> list[Question]:
        return questions(tokenizer, draw_instructions(n, (seed << 20) + step, split))

    def reward(asked: list[Question], responses: list[list[int]]) -> list[float]:
        return [float(is_right(tokenizer, *pair)) for pair in zip(asked, responses, strict=True)]

    return RewardTask(draw, reward, tokenizer.im_end_id)


# Where everything starts


@dataclass(frozen=True)
class StartConfig:
    """The policy that is improved: the course model after a short fine-tuning that teaches it the format."""

    sft_steps: int = 150  # optimizer steps on answers
    sft_batch: int = 32  # dialogues of a step
    sft_rate: float = 3e-3  # peak learning rate

    def __post_init__(self) -> None:
        check_range(self, "sft_steps", "sft_batch", least=1)
        check_range(self, "sft_rate", above=0)


def starting_policy(config: StartConfig, seed: int, device: str = "cpu") -> tuple[CausalLM, CourseTokenizer]:
    """The course model, fine-tuned on the right answers of training instructions."""
    seed_everything(seed)
    model, tokenizer = load_course_model()
    n = config.sft_steps * config.sft_batch
    batches = DialogueBatches(encode_dialogues(tokenizer, draw_instructions(n, seed)), config.sft_batch, seed)
    training = TrainConfig(
        batch_size=config.sft_batch,
        max_steps=config.sft_steps,
        learning_rate=config.sft_rate,
        warmup_steps=min(20, config.sft_steps // 4),
        weight_decay=0.0,
        log_every=config.sft_steps,
    )
    fit(model.to(pick_device(device)), batches, answer_loss, training)
    return with_end(model.eval(), tokenizer.im_end_id), tokenizer


def frozen(model: CausalLM) -> CausalLM:
    """A copy that no gradient reaches."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def exam(model: CausalLM, tokenizer: CourseTokenizer, config: AnswerConfig | None = None) -> dict[str, float]:
    """Held-out accuracy: greedy for each category, their mean; and of answers sampled at temperature 1."""
    model, config = model.eval(), config or EXAM
    greedy = category_accuracy(model, tokenizer, config, CATEGORIES)
    asked = checked_task(tokenizer, config.exam_seed, config.exam_split).draw(2 * config.n_questions, 0)
    prompts, generator = [question.prompt for question in asked], torch.Generator(next(model.parameters()).device)
    made = sample_responses(model, prompts, tokenizer.im_end_id, SamplingConfig(MOST_TOKENS), generator.manual_seed(0))
    right = [is_right(tokenizer, *pair) for pair in zip(asked, made, strict=True)]
    return {**greedy, "greedy": float(np.mean(list(greedy.values()))), "sampled": float(np.mean(right))}


# Reinforcement learning on answers that can be checked


@dataclass(frozen=True)
class ReinforceConfig(PolicyConfig):
    """Settings of `reinforce`: as for any policy, with a budget in place of a number of steps."""

    max_new_tokens: int = MOST_TOKENS  # longest response
    max_steps: int = 100_000  # batches; with a budget the limit of them
    budget: float = 60.0  # seconds of CPU after which to end; 0: none
    learning_rate: float = 3e-4  # of Adam


def reinforce(config: ReinforceConfig, start: StartConfig, run: RunConfig) -> None:
    """Improve the course model on sums and sorting by its own checked answers; examine it on held-out ones."""
    announce(f"fine-tune for {start.sft_steps} steps, then {config.method}", 20 + 1.3 * config.budget)
    model, tokenizer = starting_policy(start, run.seed, run.device)
    reference = frozen(model)
    before = exam(model, tokenizer)
    task, examine = checked_task(tokenizer, run.seed), partial(exam, tokenizer=tokenizer)
    rows = improve(model, reference, task, config, run.seed, examine)
    print(f"{'CPU s':>6} {'reward':>7} {'KL':>6} {'entropy':>8} {'length':>7}   held out: greedy, sampled")
    print(f"{0:6.0f} {'':31}   {before['greedy']:.1%}, {before['sampled']:.1%}")
    for row in (row for row in rows if "greedy" in row):
        numbers = (
            f"{row['seconds']:6.0f} {row['reward']:7.3f} {row['kl']:6.2f} {row['entropy']:8.3f} {row['length']:7.1f}"
        )
        print(f"{numbers}   {row['greedy']:.1%}, {row['sampled']:.1%}")
    save_figure(plot_rl({config.method: [rows]}), run.out / "reinforce.svg")


METHODS = ("reinforce", "rloo", "grpo", "dr-grpo", "ppo", "rejection", "dpo", "online-dpo")
RL_BUDGET = 25.0  # CPU seconds of each training, sampling included
RL_SETTINGS: dict[str, dict[str, Any]] = {  # where a method needs other settings than the rest
    "reinforce": {"learning_rate": 1e-4},
    "ppo": {"n_epochs": 2},
}


def method_config(method: str) -> ReinforceConfig | None:
    if method == "start":
        return None
    return ReinforceConfig(method=method, budget=RL_BUDGET, **RL_SETTINGS.get(method, {}))


@cache
def start_of(seed: int) -> tuple[CausalLM, CourseTokenizer]:
    """The starting policy of a seed, frozen: made once, copied by all that start from it."""
    model, tokenizer = starting_policy(StartConfig(), seed)
    return frozen(model), tokenizer


@cache
def base_name() -> str:
    """The course model's identity, so that no number outlives the model that it was measured on."""
    return sha256((FOLDER / WEIGHTS).read_bytes()).hexdigest()[:8]


def fresh(reference: CausalLM) -> CausalLM:
    return copy.deepcopy(reference).requires_grad_(True)


def rl_run(method: str, config: Any, run: RunConfig, seed: int) -> dict[str, Any]:
    """One training: the log and the exam afterwards; method "start" is the exam alone."""

    def measure() -> dict[str, Any]:
        reference, tokenizer = start_of(seed)
        model, rows = fresh(reference), []
        if method != "start":
            rows = improve(model, reference, checked_task(tokenizer, seed), method_config(method), seed)
        return {"after": exam(model, tokenizer), "rows": rows}

    return remembered(
        config, run, f"rl, {method_config(method)}, {StartConfig()}, base {base_name()}, seed {seed}", measure
    )


def rl_methods(config: Any, run: RunConfig) -> None:
    """Every method for the same CPU time on the same start: reward, distance, entropy, length, held-out accuracy."""
    names, found, rows, states = ("sampled", "greedy", *CATEGORIES), {}, [], []
    for method in ("start", *METHODS):
        found[method] = runs = [rl_run(method, config, run, seed) for seed in range(config.n_seeds)]
        rows.append([method, *([item["after"][name] for item in runs] for name in names)])
        if method == "start":
            continue
        n_batches = [float(item["rows"][-1]["step"]) for item in runs]
        if method in FROM_REFERENCE:  # their log is about what the start samples, not about what they have become
            states.append([method, n_batches, *[""] * 4])
        else:
            last = [[float(np.mean([row[key] for row in item["rows"][-5:]])) for item in runs] for key in STATE]
            states.append([method, n_batches, *last])
    columns = [Column("Method"), Column("held out, sampled", "", ".1%"), Column("greedy", "", ".1%")]
    columns += [Column(f"greedy, {category}", "", ".1%") for category in CATEGORIES]
    config.save("rl-methods", columns, rows, "rl-methods")
    columns = [Column("Method"), Column("batches", "", ".0f"), Column("reward", "", ".3f")]
    columns += [Column("KL", "nats per answer", ".2f"), Column("entropy", "nats per token", ".3f")]
    config.save("rl-methods-state", [*columns, Column("length", "tokens", ".1f")], states, "rl-methods")
    exams = {method: [item["after"] for item in runs] for method, runs in found.items()}
    save_figure(plot_methods(exams), config.folder / "rl-methods.svg")


STATE = ("reward", "kl", "entropy", "length")  # of the log, the mean of the last five batches


def plot_methods(exams: dict[str, list[dict[str, float]]]) -> Figure:
    """Right answers after each method, sampled and greedy; a dot for each seed, dashed where all of them started."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True)
    titles = ("sampled: most methods gain", "greedy: no clear gain, and DPO loses")
    for axis, name, title in zip(axes, ("sampled", "greedy"), titles, strict=True):
        for place, found in enumerate(exams.values()):
            values = [item[name] for item in found]
            axis.plot(values, [place] * len(values), "o", ms=4, color="C0" if place else "0.4", alpha=0.6)
            axis.plot([np.mean(values)], [place], "|", ms=16, mew=2, color="C0" if place else "0.4")
        axis.axvline(np.mean([item[name] for item in exams["start"]]), ls="--", lw=1, color="0.4")
        axis.set(title=title, xlabel="right answers, held out")
    axes[0].set_yticks(range(len(exams)), list(exams))
    axes[0].invert_yaxis()
    return figure


LIFT = ReinforceConfig(method="rloo", budget=80.0)


def lift_run(config: Any, run: RunConfig, seed: int) -> dict[str, Any]:
    """RLOO for 80 CPU seconds, and the exam before and after."""

    def measure() -> dict[str, Any]:
        reference, tokenizer = start_of(seed)
        model = fresh(reference)
        rows = improve(model, reference, checked_task(tokenizer, seed), LIFT, seed)
        return {"before": exam(reference, tokenizer), "after": exam(model, tokenizer), "rows": rows}

    return remembered(config, run, f"rl, {LIFT}, {StartConfig()}, base {base_name()}, seed {seed}", measure)


def rl_lift(config: Any, run: RunConfig) -> None:
    """What 80 CPU seconds of RLOO are worth: reward on the way, accuracy on what no training has seen."""
    runs = [lift_run(config, run, seed) for seed in range(config.n_seeds)]
    names = ("sampled", "greedy", *CATEGORIES)
    rows: list[list] = []
    for when, part in (("before", slice(5)), ("after", slice(-5, None))):
        cells = [[item[when][name] for item in runs] for name in names]
        logs = [[float(np.mean([row[key] for row in item["rows"][part]])) for item in runs] for key in ("reward", "kl")]
        rows.append([when, *cells, *logs])
    rows.append(
        [
            "change",
            *([b - a for a, b in zip(*pair, strict=True)] for pair in zip(rows[0][1:], rows[1][1:], strict=True)),
        ]
    )
    columns = [
        *(Column("RLOO"), Column("held out, sampled", "", ".3f")),
        *(Column(name, "", ".3f") for name in ("greedy", *(f"greedy, {category}" for category in CATEGORIES))),
        *(Column("reward, five batches", "", ".3f"), Column("KL", "nats per answer", ".2f")),
    ]
    config.save("rl-lift", columns, rows, "rl-lift")


def plot_rl(logs: dict[str, list[list[dict[str, float]]]]) -> Figure:
    """Reward against CPU time, and against the distance to the reference: the mean of eight batches, over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for index, (method, runs) in enumerate(logs.items()):
        style = {"color": f"C{index % 8}", "ls": "-" if index < 8 else "--", "lw": 1.4}
        for seed, rows in enumerate(runs):
            seconds, distances, rewards = (
                np.array([np.mean([row[name] for row in rows[max(0, i - 7) : i + 1]]) for i in range(len(rows))])
                for name in ("seconds", "kl", "reward")
            )
            left.plot(seconds, rewards, label=method if not seed else None, **style)
            right.plot(distances, rewards, **style)
    left.set(xlabel="CPU time (s)", ylabel="share of right answers, sampled")
    right.set(xlabel="KL to the reference (nats per answer)")
    left.legend(frameon=False, fontsize=7, ncols=2)
    return figure


# Pairs


class Labelled(NamedTuple):
    """Responses to the same questions: the one that the judge prefers, and the other; ids, their end included."""

    asked: list[Question]
    chosen: list[list[int]]
    rejected: list[list[int]]

    def rows(self, places: Iterable[int], pad_id: int) -> tuple[Responses, Responses]:
        places = list(places)
        prompts = [self.asked[place].prompt for place in places]
        sides = ([side[place] for place in places] for side in (self.chosen, self.rejected))
        chosen, rejected = (lay_out(prompts, side, pad_id) for side in sides)
        return chosen, rejected


def label_pairs(model: CausalLM, task: RewardTask, n_pairs: int, p_wrong: float, seed: int, ties: bool) -> Labelled:
    """Pairs of different responses of a model, judged by their true reward.

    p_wrong: how often the judge names the worse one; between two of the same reward a coin decides, or (ties False)
    such pairs are left out. Raises ValueError if 20 batches of questions give none that is left.
    """
    found, rng, step = Labelled([], [], []), random.Random(seed), 0
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    while len(found.asked) < n_pairs:
        if step >= 20 and not found.asked:
            raise ValueError(
                f"{64 * step} questions gave no pair to learn from: all answers are alike; raise --sft-steps"
            )
        asked = [question for question in task.draw(64, 500_000 + step) for _ in range(4)]
        step += 1
        prompts = [question.prompt for question in asked]
        made = sample_responses(model, prompts, task.end_id, SamplingConfig(MOST_TOKENS), generator)
        worth = task.reward(asked, made)
        for first in range(0, len(asked), 4):
            best, worst = (choose(range(first, first + 4), key=worth.__getitem__) for choose in (max, min))
            if ties:
                best, worst = rng.sample(range(first, first + 4), 2)
                best, worst = (best, worst) if (worth[best], rng.random()) > (worth[worst], 0.5) else (worst, best)
            if made[best] == made[worst] or (not ties and worth[best] == worth[worst]):
                continue
            if rng.random() < p_wrong:
                best, worst = worst, best
            for side, value in zip(found, (asked[first], made[best], made[worst]), strict=True):
                side.append(value)
    return Labelled(*(side[:n_pairs] for side in found))


# The losses on the same pairs


def pair_kto(pairs: Pairs, dpo_beta: float) -> Tensor:
    """KTO on both responses of each pair, whose reference point is taken from the pairs shifted by one row."""
    good, bad = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    ratios, desirable = torch.cat([good, bad]), torch.arange(2 * len(good), device=good.device) < len(good)
    return kto_loss(ratios, desirable, kto_kl(ratios), dpo_beta)  # (2 * batch)


PAIR_LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "dpo": lambda pairs: dpo_loss(pairs, 0.1),
    "dpo-weak": lambda pairs: dpo_loss(pairs, 0.02),
    "ipo": lambda pairs: ipo_loss(pairs, 0.1),
    "kto": lambda pairs: pair_kto(pairs, 0.1),
    "simpo": lambda pairs: simpo_loss(pairs, 2.0, 0.5),
    "orpo": lambda pairs: orpo_loss(pairs, 0.5),
    "chosen-only": lambda pairs: -pairs.per_token().chosen,
}


@dataclass(frozen=True)
class PreferenceConfig:
    """Training on pairs."""

    loss: Literal["dpo", "dpo-weak", "ipo", "kto", "simpo", "orpo", "chosen-only"] = "dpo"  # what is minimised
    n_pairs: int = 400  # pairs of a right and a wrong answer of the starting policy
    p_wrong: float = 0.0  # how often the judge names the wrong one
    pair_steps: int = 50  # optimizer steps
    pair_batch: int = 16  # pairs of a step
    learning_rate: float = 1e-4  # of Adam

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", "pair_steps", "pair_batch", least=1)
        check_range(self, "p_wrong", least=0, below=0.5)
        check_range(self, "learning_rate", above=0)


def train_on_pairs(
    model: CausalLM, reference: CausalLM, pairs: Labelled, config: PreferenceConfig, seed: int
) -> list[dict[str, float]]:
    """Minimise a loss over labelled pairs; the log has loss, margin and the movement of both log-probabilities."""
    rng, rows = random.Random(seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    for step in progress(range(config.pair_steps), config.loss):
        picked = rng.sample(range(len(pairs.asked)), min(config.pair_batch, len(pairs.asked)))
        sides = (side.to(next(model.parameters()).device) for side in pairs.rows(picked, model.config.pad_id))
        scored = score_pairs(model, reference, *sides)
        loss = PAIR_LOSSES[config.loss](scored).mean()
        take_step(model, optimizer, loss, 1.0)
        row = {"step": step + 1, "loss": loss.item(), "margin": scored.margin.mean().item()}
        row |= {"chosen": (scored.chosen - scored.ref_chosen).mean().item()}
        rows.append(row | {"rejected": (scored.rejected - scored.ref_rejected).mean().item()})
    return rows


def preference(config: PreferenceConfig, start: StartConfig, run: RunConfig) -> None:
    """Train the course model on pairs of a right and a wrong answer of its own, by one of the preference losses."""
    announce(f"fine-tune for {start.sft_steps} steps, then {config.pair_steps} on {config.n_pairs} pairs", 60)
    model, tokenizer = starting_policy(start, run.seed, run.device)
    reference, before = frozen(model), exam(model, tokenizer)
    task = checked_task(tokenizer, run.seed)
    pairs = label_pairs(reference, task, config.n_pairs, config.p_wrong, run.seed, ties=False)
    rows = train_on_pairs(model, reference, pairs, config, run.seed)
    print(f"{'step':>5} {'loss':>7} {'margin':>7}   log-probability since the start: chosen, rejected (nats)")
    for row in rows[:: max(1, len(rows) // 6)] + rows[-1:]:
        print(f"{row['step']:5} {row['loss']:7.3f} {row['margin']:7.2f}   {row['chosen']:+.2f}, {row['rejected']:+.2f}")
    after = exam(model, tokenizer)
    for name in ("greedy", "sampled"):
        print(f"held-out accuracy, {name}: {before[name]:.1%} before, {after[name]:.1%} after")


def loss_run(loss: str, config: Any, run: RunConfig, seed: int) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        reference, tokenizer = start_of(seed)
        model, settings, task = fresh(reference), PreferenceConfig(loss=loss), checked_task(tokenizer, seed)
        pairs = label_pairs(reference, task, settings.n_pairs, 0.0, seed, ties=False)
        rows = train_on_pairs(model, reference, pairs, settings, seed)
        probe = PolicyConfig(n_prompts=32, n_rollouts=4, max_new_tokens=MOST_TOKENS)
        _, state = roll_out(model, reference, task, probe, 900_000, torch.Generator().manual_seed(seed))
        return {"last": rows[-1], "after": exam(model, tokenizer), "state": state}

    return remembered(
        config, run, f"pairs, {PreferenceConfig(loss=loss)}, {StartConfig()}, base {base_name()}, seed {seed}", measure
    )


def preference_losses(config: Any, run: RunConfig) -> None:
    """Every loss on the same 400 pairs for the same number of steps."""
    rows = []
    for loss in PAIR_LOSSES:
        runs = [loss_run(loss, config, run, seed) for seed in range(config.n_seeds)]
        cells = [[item["after"][name] for item in runs] for name in ("sampled", "greedy")]
        cells += [[item["state"][name] for item in runs] for name in ("kl", "length")]
        cells += [[item["last"][name] for item in runs] for name in ("margin", "chosen", "rejected")]
        rows.append([loss, *cells])
    columns = [
        *(Column("Loss"), Column("held out, sampled", "", ".1%"), Column("greedy", "", ".1%")),
        *(Column("KL", "nats per answer", ".2f"), Column("length", "tokens", ".1f"), Column("margin", "nats", ".2f")),
        *(Column("log p of chosen", "nats", "+.2f"), Column("log p of rejected", "nats", "+.2f")),
    ]
    config.save("preference-losses", columns, rows, "preference-losses")


# Over-optimisation: a reward model that is a little wrong, pushed hard


@dataclass(frozen=True)
class JudgeConfig:
    """The learned judge."""

    n_pairs: int = 300  # labelled pairs that it has seen: a right and a wrong answer of the start
    p_wrong: float = 0.1  # how often the label is wrong
    reward_steps: int = 60  # optimizer steps
    reward_rate: float = 3e-4  # of Adam
    n_unseen: int = 200  # further labelled pairs to examine it with
    n_prompts: int = 48  # prompts of best-of-n
    rl_steps: int = 60  # batches of RLOO without a penalty

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", "reward_steps", "n_unseen", "n_prompts", "rl_steps", least=1)
        check_range(self, "p_wrong", least=0, below=0.5)
        check_range(self, "reward_rate", above=0)


def train_reward_model(start: CausalLM, pairs: Labelled, config: JudgeConfig, seed: int) -> ScalarModel:
    """A reward model for labelled pairs by Bradley and Terry, which begins as the starting policy."""
    rng, model = random.Random(seed), ScalarModel(copy.deepcopy(start).requires_grad_(True))
    model.trunk.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.reward_rate, betas=(0.9, 0.95))
    for _ in progress(range(config.reward_steps), "reward model"):
        picked = rng.sample(range(len(pairs.asked)), min(32, len(pairs.asked)))
        chosen, rejected = (response_rewards(model, rows) for rows in pairs.rows(picked, start.config.pad_id))
        take_step(model, optimizer, reward_loss(chosen, rejected).mean(), 1.0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def learned_rewards(model: ScalarModel, asked: list[Question], responses: list[list[int]]) -> list[float]:
    rows = lay_out([question.prompt for question in asked], responses, model.trunk.config.pad_id)
    return response_rewards(model, rows).tolist()


class FooledTask:
    """Rewards of a learned judge; `true` keeps the mean of the true ones, batch by batch, for the log."""

    def __init__(self, task: RewardTask, judge: nn.Module) -> None:
        self.task, self.judge, self.true = task, judge, []

    def reward(self, asked: list[Question], responses: list[list[int]]) -> list[float]:
        self.true.append(float(np.mean(self.task.reward(asked, responses))))
        return learned_rewards(self.judge, asked, responses)


BEST_OF = (1, 2, 4, 8, 16, 32, 64)


def best_of_n(model: CausalLM, task: RewardTask, judge: ScalarModel, seed: int, n_prompts: int) -> list[list[float]]:
    """For each n of BEST_OF: the learned and the true reward of the response that the judge likes best among n."""
    most, generator = BEST_OF[-1], torch.Generator().manual_seed(seed)
    asked = [question for question in task.draw(n_prompts, 700_000) for _ in range(most)]
    prompts = [question.prompt for question in asked]
    made = sample_responses(model, prompts, task.end_id, SamplingConfig(MOST_TOKENS), generator)
    liked, worth = (
        torch.tensor(values).view(n_prompts, most)
        for values in (learned_rewards(judge, asked, made), task.reward(asked, made))
    )
    found = []
    for n in BEST_OF:
        groups = liked.view(n_prompts, most // n, n)
        best = groups.argmax(dim=2, keepdim=True)
        true = worth.view(n_prompts, most // n, n).gather(2, best)
        found.append([groups.amax(dim=2).mean().item(), true.mean().item()])
    return found


def over_run(config: Any, run: RunConfig, seed: int, settings: JudgeConfig) -> dict[str, Any]:
    """One judge, and what becomes of its reward and of the true one under best-of-n and under RLOO."""

    def measure() -> dict[str, Any]:
        reference, tokenizer = start_of(seed)
        model, task, n_unseen = fresh(reference), checked_task(tokenizer, seed), settings.n_unseen
        pairs = label_pairs(reference, task, settings.n_pairs + n_unseen, settings.p_wrong, seed, ties=False)
        seen, unseen = (Labelled(*(side[part] for side in pairs)) for part in (slice(n_unseen, None), slice(n_unseen)))
        judge = train_reward_model(reference, seen, settings, seed)
        with torch.no_grad():
            chosen, rejected = (
                response_rewards(judge, rows) for rows in unseen.rows(range(n_unseen), tokenizer.pad_id)
            )
        fooled = FooledTask(task, judge)
        rl = ReinforceConfig(method="rloo", kl_coef=0.0, budget=0.0, max_steps=settings.rl_steps)
        rows = improve(model, reference, RewardTask(task.draw, fooled.reward, task.end_id), rl, seed)
        keys = ("reward", "kl", "length")
        return {
            "accuracy": (chosen > rejected).double().mean().item(),
            "best_of_n": best_of_n(reference, task, judge, seed, settings.n_prompts),
            "rl": [[row[key] for key in keys] + [true] for row, true in zip(rows, fooled.true, strict=True)],
            "after": exam(model, tokenizer),
        }

    return remembered(
        config, run, f"over-optimisation, {settings}, {StartConfig()}, base {base_name()}, seed {seed}", measure
    )


def over_optimisation(config: Any, run: RunConfig) -> None:
    """The learned reward rises, and the true one with it at first, then without it, by two ways of optimising."""
    runs = [over_run(config, run, seed, JudgeConfig()) for seed in range(config.n_seeds)]
    rows: list[list] = [["judge's accuracy on new labels", *[""] * 3, [item["accuracy"] for item in runs], ""]]
    for place, n in enumerate(BEST_OF):
        pairs = [item["best_of_n"][place] for item in runs]
        nats = math.log(n) - (n - 1) / n
        rows.append([f"best of {n}", nats, *([pair[i] for pair in pairs] for i in range(2)), "", ""])
    n_steps = len(runs[0]["rl"])
    for stop in (5, *(round(n_steps * share) for share in (0.2, 0.4, 0.6, 0.8, 1.0))):
        means = [np.mean(item["rl"][max(0, stop - 5) : stop], axis=0).tolist() for item in runs]
        learned, distances, lengths, true = ([float(mean[i]) for mean in means] for i in range(4))
        rows.append([f"RLOO, batch {stop}", distances, learned, true, "", lengths])
    columns = [
        *(Column("Optimised by"), Column("KL to the start", "nats per answer", ".2f")),
        *(Column("learned reward", "", ".2f"), Column("true reward", "share right", ".3f")),
        *(Column("accuracy", "", ".1%"), Column("length", "tokens", ".1f")),
    ]
    config.save("over-optimisation", columns, rows, "over-optimisation")
    save_figure(plot_over(runs), config.folder / "over-optimisation.svg")


def plot_over(runs: list[dict[str, Any]]) -> Figure:
    """Learned and true reward against the distance to the start: RLOO as lines, best of n as points."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, place, best in zip(axes, (0, 3), (0, 1), strict=True):
        for seed, item in enumerate(runs):
            values = np.array(item["rl"])
            smooth = np.array([values[max(0, i - 4) : i + 1].mean(axis=0) for i in range(len(values))])
            axis.plot(smooth[:, 1], smooth[:, place], color=f"C{seed}", label=f"RLOO, seed {seed}")
            distances = [math.log(n) - (n - 1) / n for n in BEST_OF]
            label = "best of n" if not seed else None
            axis.plot(distances, [pair[best] for pair in item["best_of_n"]], "o", ms=4, color=f"C{seed}", label=label)
        axis.set(xlabel="KL to the start (nats per answer)")
    axes[0].set(ylabel="learned reward", title="what the judge says rises ...")
    axes[1].set(ylabel="share of right answers", title="... while what is true falls")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


COURSE_EXPERIMENTS: dict[str, tuple[Callable[[Any, RunConfig], None], float]] = {  # name -> function, seconds
    "rl-lift": (rl_lift, 400),
    "rl-methods": (rl_methods, 900),
    "preference-losses": (preference_losses, 300),
    "over-optimisation": (over_optimisation, 400),
}
PREFERENCE_EXPERIMENTS = {**EXACT_EXPERIMENTS, **COURSE_EXPERIMENTS, "preference-breaks": (preference_breaks, 40)}
PREFERENCE_VERBS: dict[str, tuple[Any, ...]] = {  # for the command line of the topic
    "preference": (preference, PreferenceConfig, StartConfig, RunConfig),
    "reinforce": (reinforce, ReinforceConfig, StartConfig, RunConfig),
    "exact": (exact, ExactConfig, RunConfig),
}
