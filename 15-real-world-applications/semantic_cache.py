"""Topic 15 - Semantic cache: an answer given again to a question that only means the same - and what that costs.

    cache = SemanticCache(encoder.embed, CacheConfig(threshold=0.97))
    cache.put("tenant", "Where does Ben King live?", "Ben King lives in Kiel.")
    cache.get("tenant", "Tell me the town of Ben King.")      # Hit(answer, ..., cosine, exact=False), or None
    CachedEndpoint(endpoint, cache).chat(messages, tenant=...)

A key of the exact text finds little: people ask the same in many words. A vector finds more, and some of it is wrong:
"Where does Ben King live?" and "Where does Ben Hill live?" are as close as two questions can be. In TinyWorld it is
known which questions have the same answer, so that wrong hits are counted and not guessed. Bang 2023 (GPTCache, doi
10.18653/v1/2023.nlposs-1.24).
"""

import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chat_endpoint import Endpoint, Reply
from dense_search import DenseConfig, FlatIndex, PassageEncoder, pair_loss
from evaluation_statistics import clopper_pearson
from served_model import Messages
from text_metrics import normalise_answer
from tiny_world import ATTRIBUTES, REQUESTS, World, join, pick
from tokenizer_basics import pad_batch
from training_transformers import fit
from workbench import check_range, seed_everything

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> unit vectors (texts, width)
ASKING = frozenset(
    "a an the what where who whom whose which when why how do does did is are was were can could would tell please i "
    "me my you your give show say".split()
)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class CacheConfig:
    """When an answer is given again."""

    threshold: float = 0.95  # smallest cosine of two questions that are taken for the same; above 1: exact text alone
    same_names: bool = True  # names and numbers must be the same, however close the vectors are
    max_entries: int = 1000  # questions kept for one tenant
    max_tenants: int = 64  # tenants remembered
    ttl: float = 3600.0  # seconds for which an answer holds

    def __post_init__(self) -> None:
        check_range(self, "threshold", above=-1, most=2)
        check_range(self, "max_entries", "max_tenants", least=1)
        check_range(self, "ttl", above=0)


class Hit(NamedTuple):
    """An answer of the cache and the question that it was given to."""

    answer: str
    question: str
    cosine: float
    exact: bool


@dataclass
class Entry:
    question: str
    answer: str
    names: frozenset[str]
    written: float


def names_of(text: str) -> frozenset[str]:
    """What must be equal in two questions with one answer: words with a capital, and numbers.

    Words that begin questions are left out; a name at the beginning stays in. In a language that writes all nouns with
    capitals, or in a text without any, this would not do.
    """
    found = WORD.findall(text)
    return frozenset(word for word in found if (word[0].isupper() or word[0].isdigit()) and word.lower() not in ASKING)


def plain(text: str) -> str:
    """The key of the exact part: small letters, no punctuation, single spaces."""
    return normalise_answer(text)


class Shelf:
    """What one tenant has asked, the least recently used first."""

    def __init__(self, width: int) -> None:
        self.index = FlatIndex(width)
        self.entries: OrderedDict[int, Entry] = OrderedDict()
        self.ids: dict[str, int] = {}  # plain text -> number
        self.n_written = 0

    def drop(self, number: int) -> None:
        entry = self.entries.pop(number)
        self.index.remove(number)
        del self.ids[plain(entry.question)]


class SemanticCache:
    """Answers by meaning, apart for each tenant.

    Args:
        embed: what makes unit vectors of texts
        config: when an answer is given again
        clock: the time, in seconds
    """

    def __init__(
        self, embed: Embed, config: CacheConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.embed, self.config, self.clock = embed, config or CacheConfig(), clock
        self.shelves: OrderedDict[str, Shelf] = OrderedDict()
        self.n_asked = self.n_exact = self.n_close = 0

    def shelf(self, tenant: str) -> Shelf | None:
        """A tenant's own questions, without those that are too old."""
        shelf = self.shelves.get(tenant)
        if shelf is not None:
            self.shelves.move_to_end(tenant)
            limit = self.clock() - self.config.ttl
            for number in [number for number, entry in shelf.entries.items() if entry.written <= limit]:
                shelf.drop(number)
        return shelf

    def get(self, tenant: str, question: str) -> Hit | None:
        """The answer to this question, or to the nearest one that is near enough; None: ask the model."""
        self.n_asked += 1
        shelf = self.shelf(tenant)
        if shelf is None or not shelf.entries:
            return None
        number = shelf.ids.get(plain(question))
        if number is not None and shelf.entries[number].names == names_of(question):
            self.n_exact += 1
            return self.found(shelf, number, 1.0, True)
        if self.config.threshold > 1:
            return None
        names = names_of(question)
        for near in shelf.index.search(self.embed([question])[0], 8):
            if near.score < self.config.threshold:
                return None
            if not self.config.same_names or shelf.entries[near.id].names == names:
                self.n_close += 1
                return self.found(shelf, near.id, near.score, False)
        return None

    def found(self, shelf: Shelf, number: int, cosine: float, exact: bool) -> Hit:
        shelf.entries.move_to_end(number)
        entry = shelf.entries[number]
        return Hit(entry.answer, entry.question, cosine, exact)

    def put(self, tenant: str, question: str, answer: str) -> None:
        """Keep an answer; an older one to the same text is replaced. A text without a word is not kept."""
        key = plain(question)
        if not key:
            return
        vector = self.embed([question])[0]
        if tenant not in self.shelves:
            self.shelves[tenant] = Shelf(len(vector))
            if len(self.shelves) > self.config.max_tenants:
                self.shelves.popitem(last=False)
        shelf = self.shelves[tenant]
        self.shelves.move_to_end(tenant)
        if key in shelf.ids:
            shelf.drop(shelf.ids[key])
        number, shelf.n_written = shelf.n_written, shelf.n_written + 1
        shelf.index.add(number, vector)
        shelf.entries[number] = Entry(question, answer, names_of(question), self.clock())
        shelf.ids[key] = number
        if len(shelf.entries) > self.config.max_entries:
            shelf.drop(next(iter(shelf.entries)))


class CachedEndpoint:
    """An endpoint that answers a single question from the cache if it can.

    Neither looked up nor kept: a conversation of more than one message, and an answer that is a matter of chance, is
    bound by a schema or was cut off. Such an answer depends on more than the question.
    """

    def __init__(self, endpoint: Endpoint, cache: SemanticCache) -> None:
        self.endpoint, self.cache, self.name = endpoint, cache, endpoint.name

    def chat(self, messages: Messages, **settings: Any) -> Reply:
        determined = not settings.get("temperature") and settings.keys() <= {"temperature", "max_tokens", "tenant"}
        if len(messages) != 1 or messages[0]["role"] != "user" or not determined:
            return self.endpoint.chat(messages, **settings)
        tenant, question, start = settings.get("tenant") or "", messages[0]["content"], time.perf_counter()
        if (hit := self.cache.get(tenant, question)) is not None:
            return Reply(hit.answer, "stop", 0, 0, time.perf_counter() - start)
        reply = self.endpoint.chat(messages, **settings)
        if reply.finish_reason == "stop" and reply.text.strip():
            self.cache.put(tenant, question, reply.text)
        return reply


# Encoders of questions


def word_vectors(texts: Sequence[str], width: int = 512) -> np.ndarray:
    """Unit vectors that count words, hashed to 512 places: no training, and no meaning but equal words."""
    found = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in plain(text).split() or ["?"]:
            found[row, random.Random(word).randrange(width)] += 1
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@dataclass(frozen=True)
class Asked:
    """A question in one wording, and the number of what it asks: equal numbers have equal answers."""

    text: str
    key: int


class Questions:
    """Questions about people and about sums, each in several wordings: which mean the same is known.

    held_out: people and sums that the encoder's training did not have. One wording of each it did not have either.
    """

    def __init__(self, held_out: bool, world: World | None = None) -> None:
        self.world = world or World()
        people, sums = self.world.known, self.world.held_out_sums
        people = people[len(people) // 2 :] if held_out else people[: len(people) // 2]
        sums = sums[len(sums) // 2 :] if held_out else sums[: len(sums) // 2]
        self.topics = [(person, name) for person in people for name in ATTRIBUTES]
        self.topics += [(str(one), str(other)) for one, other in sums]

    def wordings(self, key: int) -> list[str]:
        """All wordings of a question; the last is the one that no training has, here as in `tiny_world`."""
        one, other = self.topics[key]
        if one.isdigit():
            asked, direct = f"sum of {one} and {other}", f"What is {one} plus {other} ?"
        else:
            start, end = ATTRIBUTES[other].question
            asked, direct = f"{other} of {one}", f"{start.capitalize()} {one} {end}"
        *known, new = (way.format(asked) for way in REQUESTS["know"])
        return [join(text.split()) for text in (*known, direct, new)]

    def stream(self, n: int, seed: int, exponent: float = 1.0) -> Iterator[Asked]:
        """n questions by Zipf's law: the r-th most popular with a weight of r^-exponent; any wording equally often."""
        rng = random.Random(seed)
        keys = list(range(len(self.topics)))
        rng.shuffle(keys)
        weights = np.cumsum([(rank + 1) ** -exponent for rank in range(len(keys))])
        for _ in range(n):
            place = int(np.searchsorted(weights, rng.random() * weights[-1]))
            yield Asked(pick(rng, self.wordings(keys[place])), keys[place])


class WordingBatches:
    """Pairs of two wordings of one question; half of each batch asks about few people, so that names decide."""

    def __init__(self, questions: Questions, encoder: PassageEncoder, seed: int) -> None:
        self.questions, self.encoder, self.seed = questions, encoder, seed

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng, questions = random.Random(self.seed * 1_000_003 + step), self.questions
        n = min(self.encoder.config.batch_size, len(questions.topics))
        first = rng.randrange(len(questions.topics))
        near = [(first + offset) % len(questions.topics) for offset in range(n // 2)]  # neighbours share their person
        others = [key for key in rng.sample(range(len(questions.topics)), n) if key not in near]
        keys = near + others[: n - len(near)]
        pairs = [rng.sample(questions.wordings(key)[:-1], 2) for key in keys]
        sides = [self.encoder.rows(texts) for texts in zip(*pairs, strict=True)]
        ids = [pad_batch(rows, self.encoder.tokenizer.pad_id).token_ids for rows in sides]
        return {"questions": ids[0], "passages": ids[1], "groups": torch.tensor(keys)}


QUESTION_ENCODER = DenseConfig(max_steps=150, batch_size=48, max_tokens=24)


def train_question_encoder(seed: int, config: DenseConfig = QUESTION_ENCODER) -> PassageEncoder:
    """Topic 15's encoder, trained to find the other wording of a question among those of other questions."""
    seed_everything(seed)
    encoder = PassageEncoder(config)
    fit(encoder, WordingBatches(Questions(False), encoder, seed), pair_loss, config.training)
    return encoder.eval()


# What a cache is worth


class Worth(NamedTuple):
    """What happened to a stream of questions."""

    n: int
    hits: int
    wrong: int  # hits that answer another question

    @property
    def hit_rate(self) -> float:
        return self.hits / self.n

    @property
    def wrong_share(self) -> float:
        """Of the hits."""
        return self.wrong / self.hits if self.hits else 0.0

    @property
    def wrong_bound(self) -> float:
        """What the share of wrong hits is at most, at 95 %."""
        return clopper_pearson(self.wrong, self.hits).high if self.hits else 1.0


def remembering(embed: Embed) -> Embed:
    """The same vectors, each computed once: for experiments that ask about the same texts again and again."""
    known: dict[str, np.ndarray] = {}

    def vectors(texts: Sequence[str]) -> np.ndarray:
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        if fresh:
            known.update(zip(fresh, embed(fresh), strict=True))
        return np.stack([known[text] for text in texts])

    return vectors


def worth(embed: Embed, config: CacheConfig, stream: Sequence[Asked]) -> Worth:
    """Send a stream through a cache that is empty at first; an answer stands for the number of its question."""
    cache = SemanticCache(embed, replace(config, ttl=1e12), clock=lambda: 0.0)
    hits = wrong = 0
    for asked in stream:
        hit = cache.get("", asked.text)
        if hit is None:
            cache.put("", asked.text, str(asked.key))
            continue
        hits += 1
        wrong += hit.answer != str(asked.key)
    return Worth(len(stream), hits, wrong)


def best_possible(stream: Sequence[Asked]) -> float:
    """The hit rate of a cache that knows what every question means: all but the first of each."""
    return 1 - len({asked.key for asked in stream}) / len(stream)


def choose_threshold(
    embed: Embed, stream: Sequence[Asked], config: CacheConfig, most_wrong: float, choices: Sequence[float]
) -> float:
    """The smallest of the choices at which, by the bound, at most this share of the hits is wrong; 2.0: exact only.

    The first from above that fails ends the search: below it hits only become worse.
    """
    found = 2.0
    for threshold in sorted(choices, reverse=True):
        if worth(embed, replace(config, threshold=threshold), stream).wrong_bound > most_wrong:
            break
        found = threshold
    return found


def saving(hit_rate: float, wrong_share: float, cost: float, lookup: float, harm: float) -> float:
    """Expected saving per question: h c - e - h w L, in the unit of the costs.

    h: hit rate; w: share of the hits that are wrong; c: cost of an answer of the model; e: cost of a look-up, which
    every question pays; L: harm of a wrong answer.
    """
    return hit_rate * cost - lookup - hit_rate * wrong_share * harm
