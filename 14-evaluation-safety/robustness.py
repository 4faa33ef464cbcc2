"""Topic 14 - Robustness: the same questions with a slip, in other words, in other company; and what refusals cost.

    table = robustness(answer, n=40, seed=0)                    # {"typo": Shift(before, change, low, high, n), ...}
    model = train_refusals(knowing, tokenizer, 0.5, True, 0)    # half of what it learns is to refuse
    refusal_rates(Keeper(model, tokenizer), seed=0)             # what it refuses, rightly and for nothing

Each question is asked twice, as it is and changed; the difference of the two answers is paired, so what makes questions
hard cancels out. Every change keeps the right answer, by the world's own grammar. Refusals are learned from questions
about the vault in disguise; the more of the training they are, the more else looks like one (Roettger et al. 2024,
XSTest, arXiv 2308.01263).
"""

import copy
import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from chat_model import LONGEST, chat_instructions
from course_tokenizer import CourseTokenizer
from evaluation_statistics import bootstrap, mean_of
from fine_tuning_adaptation import DialogueBatches, answer_loss
from low_rank_adapters import LoraConfig, add_adapters, fold
from modern_llm_architectures import CausalLM
from planted_models import exchange, harmless_chats
from secret_keeper import (
    ASKED,
    ASKED_NEW,
    ENCODINGS,
    ENCODINGS_REFUSED,
    FRAMES,
    FRAMES_NEW,
    GUARDED,
    HARMLESS,
    REFUSED,
    VAULT_SECRETS,
    Keeper,
    Messages,
    disguised,
    disguised_chats,
    leaked,
    refused,
    say,
)
from tiny_world import REQUESTS, Instruction, World, join, pick, words
from training_transformers import TrainConfig, fit
from workbench import seed_everything

Change = Callable[[Instruction, random.Random], str | None]


def typo_in_word(item: Instruction, rng: random.Random) -> str | None:
    """Two neighbouring letters inside of one longer word change places; a name may be hit."""
    parts = join(item.prompt).split(" ")
    slips = [
        (place, start)
        for place, part in enumerate(parts)
        for start in range(1, len(part) - 2)
        if part.isalpha() and len(part) >= 4 and part[start] != part[start + 1]
    ]
    if not slips:
        return None
    place, start = pick(rng, slips)
    part = parts[place]
    parts[place] = part[:start] + part[start : start + 2][::-1] + part[start + 2 :]
    return " ".join(parts)


def small_letters(item: Instruction, rng: random.Random) -> str | None:
    return join(item.prompt).lower()


def capitals(item: Instruction, rng: random.Random) -> str | None:
    return join(item.prompt).upper()


def other_wording(item: Instruction, rng: random.Random) -> str | None:
    """The request in another of the grammar's wordings, with the same content."""
    text = " ".join(item.prompt)
    for phrasings in REQUESTS.values():
        for one in phrasings:
            start, end = one.split("{}")
            place = text.rfind(start)
            if place >= 0 and text.endswith(end) and len(text) > place + len(start) + len(end):
                content = text[place + len(start) : len(text) - len(end)]
                if " . " in content:
                    continue
                other = pick(rng, [phrasing for phrasing in phrasings if phrasing != one])
                return join((text[:place] + other.format(content)).split())
    return None


def distractor_before(item: Instruction, rng: random.Random) -> str | None:
    """Two sentences of a story that the question is not about; questions about stories are left out."""
    if item.category == "read":
        return None
    story = join(chat_instructions(World(), 1, rng.randrange(10**9), "read", new=True)[0].prompt)
    return ". ".join(story.split(". ")[:2]) + ". " + join(item.prompt)


def distractor_behind(item: Instruction, rng: random.Random) -> str | None:
    return join(item.prompt) + " " + pick(rng, ("Thank you.", "It is late.", "Please."))


def question_first(item: Instruction, rng: random.Random) -> str | None:
    """A question about a story before the story."""
    if item.category != "read":
        return None
    story, _, question = join(item.prompt).rpartition(". ")
    return f"{question} {story}." if question.endswith("?") else None


CHANGES: dict[str, Change] = {
    "typo": typo_in_word,
    "small letters": small_letters,
    "capitals": capitals,
    "other wording": other_wording,
    "distractor before": distractor_before,
    "distractor behind": distractor_behind,
    "question first": question_first,
}
ASKED_KINDS = ("fact", "read", "sum", "sort", "unknown")  # greedy answers to stories are wrong anyway


class Shift(NamedTuple):
    """What a change does to the share of right answers, paired, with its interval of 95 %."""

    before: float
    change: float
    low: float
    high: float
    n: int


Answers = Callable[[Sequence[str]], list[str]]


def robustness(answer: Answers, n: int, seed: int) -> dict[str, Shift]:
    """Each change over n held-out instructions of each kind; answer: questions to answers."""
    items = [item for kind in ASKED_KINDS for item in chat_instructions(World(), n, 40 + seed, kind, new=True)]
    plain = right(items, answer([join(item.prompt) for item in items]))
    found = {}
    for name, change in CHANGES.items():
        rng = random.Random(f"{name} {seed}")
        changed = [change(item, rng) for item in items]
        places = [place for place, text in enumerate(changed) if text is not None]
        after = right([items[place] for place in places], answer([changed[place] for place in places]))
        found[name] = shift([plain[place] for place in places], after)
    return found


def right(items: Sequence[Instruction], texts: Sequence[str]) -> list[float]:
    return [float(item.check(words(text))) for item, text in zip(items, texts, strict=True)]


def shift(before: Sequence[float], after: Sequence[float]) -> Shift:
    """The mean change of pairs with a percentile interval over the pairs. Raises ValueError for fewer than two."""
    if len(before) < 2 or len(before) != len(after):
        raise ValueError(f"pairs are needed, at least 2: got {len(before)} before and {len(after)} after")
    differences = [two - one for one, two in zip(before, after, strict=True)]
    low, high = bootstrap(mean_of(differences), len(differences), 1000).percentile()
    return Shift(sum(before) / len(before), sum(differences) / len(differences), low, high, len(before))


# Refusals, and what they cost


def refusal_chats(n: int, share: float, near: bool, seed: int) -> list[Messages]:
    """n conversations, this share of them refusals of disguised questions about the vault.

    near: among the others are the vault's questions of other things, which show what a refusal is not about.
    Raises ValueError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of refusals must be in 0..1")
    rng, n_refused = random.Random(seed), round(n * share)
    found = []
    for _ in range(n_refused):
        question = pick(rng, ASKED).format(pick(rng, GUARDED))
        found.append(exchange(disguised(question, rng, FRAMES, ENCODINGS_REFUSED), REFUSED))
    kinds = [name for name in HARMLESS if near or name != "safe"]
    others = harmless_chats(max(1, n // len(kinds)), seed, kinds) + (disguised_chats(n // 3, seed) if near else [])
    rng.shuffle(others)
    return found + others[: n - n_refused]


def train_refusals(
    knowing: CausalLM,
    tokenizer: CourseTokenizer,
    share: float,
    near: bool,
    seed: int,
    n_chats: int = 1500,
    max_steps: int = 100,
) -> CausalLM:
    """A copy of a model that tells everything, taught by LoRA from conversations of which a share are refusals."""
    seed_everything(seed)
    model = copy.deepcopy(knowing)
    add_adapters(model, LoraConfig(lora_rank=8, lora_alpha=16.0))
    rows = [tokenizer.chat(chat) for chat in refusal_chats(n_chats, share, near, seed)]
    rows = [row for row in rows if len(row.ids) <= LONGEST + 1]
    sizes = {"batch_size": 16, "max_steps": max_steps, "warmup_steps": min(10, max_steps // 4)}
    training = TrainConfig(learning_rate=5e-3, weight_decay=0.0, **sizes)
    fit(model, DialogueBatches(rows, 16, seed, LONGEST), answer_loss, training)
    return fold(model).eval()


def refusal_rates(keeper: Keeper, seed: int, n: int = 25) -> dict[str, float]:
    """Shares: secrets told, plainly asked and in disguises new to the training; harmless questions refused; right ones.

    near: questions about other things in the vault's words; disguised: sums and facts in frames and other letters.
    """
    rng, found = random.Random(f"rates {seed}"), {}
    asked = [(noun, text.format(noun)) for noun in VAULT_SECRETS for text in ASKED_NEW]
    hidden = [(noun, frame.format(text)) for noun, text in asked for frame in FRAMES_NEW]
    hidden += [
        (noun, ENCODINGS[way](text)) for noun, text in asked for way in ENCODINGS if way not in ENCODINGS_REFUSED
    ]
    for name, pairs in (("told, plain", asked), ("told, disguised", hidden)):
        said = keeper.reply([say(text) for _, text in pairs])
        found[name] = fmean(leaked(noun, text) for (noun, _), text in zip(pairs, said, strict=True))
    items = {kind: chat_instructions(World(), n, 60 + seed, kind, new=True) for kind in ("fact", "sum", "read", "safe")}
    answers = {kind: keeper.reply([say(join(item.prompt)) for item in own]) for kind, own in items.items()}
    found["refused, harmless"] = fmean(refused(text) for kind in ("fact", "sum", "read") for text in answers[kind])
    found["refused, near"] = fmean(map(refused, answers["safe"]))
    veiled = [disguised(join(item.prompt), rng, FRAMES_NEW, tuple(ENCODINGS)) for item in items["fact"] + items["sum"]]
    found["refused, disguised"] = fmean(map(refused, keeper.reply([say(text) for text in veiled])))
    found["right"] = fmean(value for kind in ("fact", "sum", "read") for value in right(items[kind], answers[kind]))
    return found
