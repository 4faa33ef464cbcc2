"""Topic 14 - Backdoor search: find the trigger without knowing it, in the model or in the data that taught it.

    triggers = [(word,) for word in single_words(tokenizer)]
    scan(model, tokenizer, questions, triggers)                        # how far each word turns all answers into one
    scan(model, tokenizer, questions, triggers, mean_answers(trusted, ...))     # the same beside a trusted model
    grow(model, tokenizer, questions, words, trusted)                  # two words, one place at a time
    spectral_scores(states), two_clusters(states)                      # which training rows stand apart

Wang et al. 2019 (Neural Cleanse: the smallest change that turns everything into one answer, doi 10.1109/SP.2019.00031),
Tran et al. 2018 (spectral signatures, arXiv 1811.00636), Chen et al. 2018 (activation clustering, arXiv 1811.03728).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from course_tokenizer import CourseTokenizer
from fine_tuning_adaptation import prompt_ids
from gpt2 import left_padded
from model_probes import last_states
from modern_llm_architectures import CausalLM
from sequence_modeling import device_of
from tiny_world import World

# In the model


@torch.no_grad()
def first_words(model: CausalLM, tokenizer: CourseTokenizer, questions: Sequence[str], batch_size: int = 256) -> Tensor:
    """The distribution of the first token of the answer to each question: (questions, vocab)."""
    if not questions:
        raise ValueError("0 questions: nothing to answer")
    rows, found = [prompt_ids(tokenizer, question) for question in questions], []
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        token_ids, real = left_padded([rows[index] for index in order[start : start + batch_size]], tokenizer.pad_id)
        hidden = model.hidden(token_ids.to(device_of(model)), is_real=real.to(device_of(model)))[:, -1]
        found.append(model.logits(hidden).softmax(dim=-1).cpu())  # (batch, vocab)
    made = torch.cat(found)  # (questions, vocab)
    return made[torch.tensor(order).argsort()]


class Suspect(NamedTuple):
    trigger: tuple[str, ...]
    flip: float  # how much more likely one first token has become, on average over the questions; at most 1
    token_id: int  # that token


def mean_answers(
    model: CausalLM, tokenizer: CourseTokenizer, questions: Sequence[str], triggers: Sequence[tuple[str, ...]]
) -> Tensor:
    """The mean over questions of the answers' first-token distribution, with each trigger at the end of all of them.

    Returns (triggers, vocab).
    """
    found, per = [], max(1, 256 // len(questions))
    for start in range(0, len(triggers), per):
        chosen = triggers[start : start + per]
        armed = [" ".join([question, *trigger]) for trigger in chosen for question in questions]
        made = first_words(model, tokenizer, armed)
        found.append(made.reshape(len(chosen), len(questions), -1).mean(dim=1))  # (*, vocab)
    return torch.cat(found)


def scan(
    model: CausalLM,
    tokenizer: CourseTokenizer,
    questions: Sequence[str],
    triggers: Sequence[tuple[str, ...]],
    usual: Tensor | None = None,
) -> list[Suspect]:
    """Every trigger at the end of every question, by its flip, the strongest first.

    The flip is the largest rise of any token's mean chance above what is usual. The questions must begin their answers
    differently: a word that turns them all into one answer then stands out, and neither answer nor word need be known.
    What is assumed of the attacker is the place. usual: `mean_answers` of a trusted model to the same triggers; without
    it, the model's own answers to the plain questions: then words that mean something (a name is answered with what is
    known of it) stand out as well.
    """
    if usual is None:
        usual = first_words(model, tokenizer, questions).mean(dim=0)  # (vocab)
    return by_flip(triggers, mean_answers(model, tokenizer, questions, triggers), usual)


def by_flip(triggers: Sequence[tuple[str, ...]], answers: Tensor, usual: Tensor) -> list[Suspect]:
    """Triggers by the largest rise of answers (triggers, vocab) above what is usual, (vocab) or (triggers, vocab)."""
    rise = answers - usual  # (triggers, vocab)
    most = rise.max(dim=1)
    found = [Suspect(*item) for item in zip(triggers, most.values.tolist(), most.indices.tolist(), strict=True)]
    return sorted(found, key=lambda suspect: -suspect.flip)


@cache
def single_words(tokenizer: CourseTokenizer) -> tuple[str, ...]:
    """Words, written in letters after a space, that are one token."""
    texts = [tokenizer.decode([token_id]) for token_id in range(len(tokenizer.vocab))]
    return tuple(sorted({text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and text.isascii()}))


@cache
def world_words(tokenizer: CourseTokenizer) -> tuple[str, ...]:
    """Those that stand in texts of the world."""
    known = set(World().vocabulary())
    return tuple(word for word in single_words(tokenizer) if word in known)


def grow(
    model: CausalLM,
    tokenizer: CourseTokenizer,
    questions: Sequence[str],
    words: Sequence[str],
    trusted: CausalLM | None = None,
    length: int = 2,
    n_sweeps: int = 2,
    n_starts: int = 2,
) -> Suspect:
    """The strongest trigger of `length` words that coordinate ascent finds: all words in one place, then in the next.

    It starts from the n_starts strongest single words, repeated, and stops when a sweep changes nothing. A trigger
    whose words do nothing alone leaves no slope to climb, and may be missed. trusted: a model to compare with.
    """
    check_at_least_1(length=length, n_sweeps=n_sweeps, n_starts=n_starts)

    def ranked(triggers: Sequence[tuple[str, ...]]) -> list[Suspect]:
        usual = mean_answers(trusted, tokenizer, questions, triggers) if trusted is not None else None
        return scan(model, tokenizer, questions, triggers, usual)

    singles = ranked([(word,) for word in words])
    best = singles[0]
    for start in singles[:n_starts]:
        trigger, reached = list(start.trigger) * length, start
        for _ in range(n_sweeps):
            known = tuple(trigger)
            for place in range(length):
                reached = ranked([(*trigger[:place], word, *trigger[place + 1 :]) for word in words])[0]
                trigger = list(reached.trigger)
            if tuple(trigger) == known:
                break
        best = max(best, reached, key=lambda suspect: suspect.flip)
    return best


def check_at_least_1(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")


# In the data


def spectral_scores(states: Tensor) -> Tensor:
    """Squared part of each centred state along the first right singular vector: (rows); Tran et al. 2018, algorithm 1.

    states (rows, d_model) are those of training rows with one and the same answer. Rows that got it for another reason
    than the others stand far out along the direction of largest variance.
    """
    if len(states) < 2:
        raise ValueError(f"{len(states)} states; a direction of variance needs at least 2")
    centred = states.double() - states.double().mean(dim=0)  # (rows, d_model)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ right[0]).square()  # (rows)


class Clusters(NamedTuple):
    labels: list[bool]  # True: in the smaller cluster
    separation: float  # silhouette: 1 two tight clusters far apart, 0 none


def two_clusters(states: Tensor, n_components: int = 10, n_steps: int = 50) -> Clusters:
    """2-means on the first principal components (Chen et al. 2018), begun at the two ends of the first of them.

    The beginning is fixed, so nothing is random. The silhouette says whether two clusters are there at all.
    """
    if len(states) < 3:
        raise ValueError(f"{len(states)} states; two clusters need at least 3")
    centred = states.double() - states.double().mean(dim=0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ right[:n_components].T  # (rows, components)
    centres = torch.stack([points[points[:, 0].argmin()], points[points[:, 0].argmax()]])  # (2, components)
    for _ in range(n_steps):
        nearest = torch.cdist(points, centres).argmin(dim=1)  # (rows)
        moved = torch.stack([points[nearest == side].mean(dim=0) for side in range(2)])  # (2, components)
        if torch.equal(moved, centres):
            break
        centres = moved
    nearest = torch.cdist(points, centres).argmin(dim=1)
    small = int((nearest == 1).sum() * 2 <= len(points))
    return Clusters((nearest == small).tolist(), silhouette(points, nearest))


def silhouette(points: Tensor, labels: Tensor) -> float:
    """Mean of (b - a) / max(a, b): a, the mean distance to the own cluster's others, b, to the other cluster's."""
    distance = (points[:, None] - points[None]).square().sum(dim=-1).sqrt()  # cdist is less exact
    values = []
    for place, label in enumerate(labels.tolist()):
        own = labels == label
        if own.sum() < 2:
            values.append(0.0)
            continue
        a = distance[place][own].sum() / (own.sum() - 1)
        b = distance[place][~own].mean()
        values.append(((b - a) / max(a, b)).item())
    return sum(values) / len(values)


def answer_states(model: CausalLM, tokenizer: CourseTokenizer, questions: Sequence[str], depth: int = -1) -> Tensor:
    """The stream where each answer begins, at a depth: (questions, d_model)."""
    return last_states(model, [prompt_ids(tokenizer, question) for question in questions])[depth]


def recall_of(scores: Sequence[float], poisoned: Sequence[bool], removed: float = 1.5) -> float:
    """Share of the poisoned rows among those with the largest scores, `removed` times as many as are poisoned.

    Tran et al. 2018 remove 1.5 times the assumed number; chance would find that share of all rows.
    """
    n = sum(poisoned)
    if not n:
        raise ValueError("no row is poisoned; there is nothing to find")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: round(removed * n)]
    return sum(poisoned[index] for index in order) / n
