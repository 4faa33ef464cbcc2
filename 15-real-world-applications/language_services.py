"""Topic 15 - Language services: topic 05's translator and a trained summariser behind two strict routes of the server.

python 15-real-world-applications/real_world_applications.py translate "the old man does not see her"
python 15-real-world-applications/real_world_applications.py summarise "One day Ella found a blue clock ..."
python 15-real-world-applications/real_world_applications.py serve-language     # POST /v1/translate, /v1/summarize

    write_article(rng, "train")                      # a story of the world, its true facts, and the right summary
    facts_of(text)                                   # what a text claims, sentence by sentence; later ones overrule
    score_summary(made, article)                     # coverage and hallucination, counted in facts

A summary of a story says how matters stand at its end, so that no choice of its first sentences can be right. Lin 2004
(ROUGE); Nallapati et al. 2017 (arXiv 1611.04230): the first k sentences as the baseline to beat.
"""

import asyncio
import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from building_from_scratch import (
    Codec,
    DecodeConfig,
    ModelConfig,
    Transformer,
    beam_translate,
    check_known,
    least_certain,
)
from chat_endpoint import Endpoint
from chat_model import load_chat_model
from course_tokenizer import CourseTokenizer
from fine_tuning_adaptation import DialogueBatches, answer_loss, respond
from gpt2 import SamplingConfig
from huggingface_folders import WEIGHTS, read_json, read_safetensors
from low_rank_adapters import LoraConfig, add_adapters, fold, load_adapter
from modern_llm_architectures import CausalLM
from sequence_modeling import Vocabulary
from server import Service, read_request
from server_schema import ApiError, Strict, bad_request, checked
from text_metrics import rouge
from tiny_world import World, WorldConfig, held_out
from training_transformers import TrainConfig, fit
from translation_pairs import join_tokens, tokenize
from workbench import check_range, shown, write_atomically

TRANSLATOR, SUMMARISER = (Path(__file__).parent / name for name in ("translator", "summariser"))
MAX_CHARS = 4000  # of a text that a route takes
ASKED = "Summarise: {}"
TRANSLATE_PROMPT = "Translate the user's text from English into French. Answer with the translation alone."
SUMMARISE_PROMPT = "Summarise the user's text: what holds at its end, one sentence for each thing."


# Articles: what is true at the end of a story


class Fact(NamedTuple):
    thing: str
    what: str  # colour, owner or place
    value: str


@dataclass(frozen=True)
class Article:
    """A story, its sentences, the facts that hold at its end and the summary that states them all."""

    text: str
    sentences: tuple[str, ...]
    facts: frozenset[Fact]
    summary: str


STORIES = World(WorldConfig(max_events=7))  # longer than the chat model has ever read


def write_article(rng: random.Random, split: str = "train", n_events: int = 2) -> Article:
    """A story with at least n_events after its first sentence; the split is by the story's text."""
    while True:
        document = STORIES.document(rng, "story")
        text = document.text.partition(" Question:")[0]
        sentences = tuple(re.findall(r"[^.]+\.", text))
        if len(sentences) > n_events and held_out(text) == (split != "train"):
            break
    things = document.facts["things"]
    facts = frozenset(Fact(thing, what, known[what]) for thing, known in things.items() for what in known)
    told = (
        f"The {known['colour']} {thing} of {known['owner']} is in the {known['place']}."
        for thing, known in things.items()
    )
    return Article(text, tuple(sentence.strip() for sentence in sentences), facts, " ".join(told))


CLAIMS = (  # (what a sentence looks like, the facts that it states)
    (
        r"(?:One \w+|Meanwhile) (\w+) (?:found|hid) a (\w+) (\w+) in the (\w+)\.",
        {"owner": 1, "colour": 2, "place": 4},
        3,
    ),
    (r"Then \w+ took the (\w+) to the (\w+)\.", {"place": 2}, 1),
    (r"The (\w+) (\w+) of (\w+) is in the (\w+)\.", {"colour": 1, "owner": 3, "place": 4}, 2),
)


def claims_of(sentence: str) -> list[Fact]:
    """What one sentence of a story or of a summary states about things."""
    for pattern, values, thing in CLAIMS:
        if match := re.fullmatch(pattern, sentence.strip()):
            return [Fact(match[thing], what, match[group]) for what, group in values.items()]
    return []


def facts_of(text: str) -> set[Fact]:
    """What a text claims once it is read to its end: of two places of a thing the later one holds."""
    found = {(fact.thing, fact.what): fact for sentence in re.findall(r"[^.]+\.", text) for fact in claims_of(sentence)}
    return set(found.values())


class SummaryScore(NamedTuple):
    coverage: float  # share of the true facts that are stated
    hallucination: float  # share of the stated facts that are not true
    exact: float  # 1 if all true facts and no others are stated
    rouge_l: float  # F1 of ROUGE-L beside the right summary
    length: float  # words of the summary over words of the text


def score_summary(made: str, article: Article) -> SummaryScore:
    """How a summary does against the truth. A summary that states nothing hallucinates nothing and covers nothing."""
    claimed = facts_of(made)
    true = claimed & article.facts
    false_share = 1 - len(true) / len(claimed) if claimed else 0.0
    overlap = rouge(made, article.summary)["rougeL"].f1
    length = len(made.split()) / len(article.text.split())
    return SummaryScore(len(true) / len(article.facts), false_share, float(claimed == article.facts), overlap, length)


def mean_score(scores: Sequence[SummaryScore]) -> SummaryScore:
    return SummaryScore(*(sum(column) / len(scores) for column in zip(*scores, strict=True)))


# Extractive summaries


def lead(article: Article, k: int) -> str:
    """The first k sentences."""
    return " ".join(article.sentences[:k])


def best_extract(article: Article, k: int) -> str:
    """The k sentences that an all-knowing chooser would take: most true facts, then fewest false ones.

    No extractive method of k sentences covers more.
    """

    def worth(chosen: tuple[str, ...]) -> tuple[int, int]:
        claimed = facts_of(" ".join(chosen))
        return len(claimed & article.facts), -len(claimed - article.facts)

    return " ".join(max(combinations(article.sentences, min(k, len(article.sentences))), key=worth))


# The abstractive summariser: the chat model with a low-rank update


@dataclass(frozen=True)
class SummaryConfig:
    """How the chat model learns to summarise."""

    n_articles: int = 6000  # stories to learn from
    summary_steps: int = 400  # optimizer steps
    summary_batch: int = 16  # stories of a step
    summary_rate: float = 5e-3  # the peak learning rate
    summary_rank: int = 8  # of the low-rank updates

    def __post_init__(self) -> None:
        check_range(self, "n_articles", "summary_steps", "summary_batch", "summary_rank", least=1)
        check_range(self, "summary_rate", above=0)


def articles(n: int, seed: int, split: str) -> list[Article]:
    rng = random.Random(f"{seed} articles {split}")
    return [write_article(rng, split) for _ in range(n)]


def train_summariser(config: SummaryConfig, seed: int) -> tuple[CausalLM, CourseTokenizer]:
    """The course chat model with a low-rank update that has read stories beside their summaries; not yet folded in."""
    model, tokenizer = load_chat_model()
    torch.manual_seed(seed)
    messages = [
        summary_messages(article.text, article.summary) for article in articles(config.n_articles, seed, "train")
    ]
    batches = DialogueBatches([tokenizer.chat(turns) for turns in messages], config.summary_batch, seed)
    add_adapters(model, LoraConfig(lora_rank=config.summary_rank, lora_alpha=2.0 * config.summary_rank))
    steps = config.summary_steps
    sizes = {"batch_size": config.summary_batch, "max_steps": steps, "warmup_steps": min(40, steps // 4)}
    training = TrainConfig(learning_rate=config.summary_rate, weight_decay=0.0, log_every=50, **sizes)
    fit(model, batches, answer_loss, training)
    return model.eval(), tokenizer


def summary_messages(text: str, summary: str | None = None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": ASKED.format(text)}]
    return asked if summary is None else [*asked, {"role": "assistant", "content": summary}]


def summarise_all(model: CausalLM, tokenizer: CourseTokenizer, texts: Sequence[str]) -> list[str]:
    """What the model makes of stories, greedily."""
    return respond(model, tokenizer, [summary_messages(text) for text in texts], SamplingConfig(64, temperature=0.0))


def load_summariser(folder: Path = SUMMARISER) -> tuple[CausalLM, CourseTokenizer]:
    """The chat model with the committed update folded in, ready to answer."""
    model, tokenizer = load_chat_model()
    load_adapter(model, folder)
    return fold(model).eval(), tokenizer


# The translator: topic 05's Transformer as a folder


class Translation(NamedTuple):
    text: str
    sure: bool  # whether the model is as certain as of 99 % of its held-out sentences


@dataclass(frozen=True)
class Translator:
    """Topic 05's Transformer with its vocabularies, its longest source in training and its usual certainty."""

    model: Transformer
    codec: Codec
    longest_source: int
    certainty_floor: float  # nats: log-probability of the least certain token that 99 % of held-out sentences exceed

    def translate(self, text: str) -> Translation:
        """Raises ValueError for an empty text, for words outside the vocabulary, and for more than training had."""
        tokens = tokenize(text, self.codec.unit)
        while tokens and tokens[-1] in (".", "!", "?") and tokens[-1] not in self.codec.src.ids:
            tokens = tokens[:-1]
        if not tokens:
            raise ValueError("nothing to translate; give a sentence, such as: the cat sees a bird")
        if len(tokens) > self.longest_source:
            limit = f"the longest that it was trained on has {self.longest_source}"
            raise ValueError(f"the sentence has {len(tokens)} words, {limit}; give shorter sentences one by one")
        check_known(tokens, self.codec.src)
        src_ids = self.codec.encode_sources([tokens])
        best = beam_translate(self.model, src_ids, DecodeConfig())[0][0]
        made = self.codec.decode_target(list(best.tokens))
        sure = least_certain(self.model, self.codec, src_ids, made) >= self.certainty_floor
        return Translation(join_tokens(made, self.codec.unit), sure)

    def save(self, folder: Path, card: str) -> None:
        """Write model.safetensors in half precision, translator.json and the card."""
        from safetensors.torch import save

        tensors = {name: tensor.half().contiguous() for name, tensor in self.model.state_dict().items()}
        about = {"model_config": asdict(self.model.config), "unit": self.codec.unit}
        about |= {"src_tokens": self.codec.src.tokens, "tgt_tokens": self.codec.tgt.tokens}
        about |= {"longest_source": self.longest_source, "certainty_floor": self.certainty_floor}
        write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / "translator.json", (json.dumps(about, ensure_ascii=False) + "\n").encode())
        write_atomically(folder / "README.md", card.encode())


def load_translator_folder(folder: Path = TRANSLATOR) -> Translator:
    """The committed translator, or another folder of `Translator.save`. Raises ValueError for one that does not fit."""
    about, tensors = read_json(folder / "translator.json"), read_safetensors(folder / WEIGHTS)
    try:
        codec = Codec(Vocabulary(about["src_tokens"]), Vocabulary(about["tgt_tokens"]), about["unit"])
        model = Transformer(ModelConfig(**about["model_config"]), len(codec.src), len(codec.tgt))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{shown(folder)}/translator.json is no translator's: {error}") from None
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{shown(folder)} holds other tensors than its translator.json tells: {error}"[:300]) from None
    return Translator(model.eval(), codec, about["longest_source"], about["certainty_floor"])


def certainty_floor(model: Transformer, codec: Codec, held_out_pairs: Sequence) -> float:
    """The 1 % quantile of the log-probability of the least certain token, over held-out sentences."""
    from building_from_scratch import greedy_answers

    certainty = sorted(greedy_answers(model, codec, list(held_out_pairs))[1])
    return certainty[len(certainty) // 100]


# Services: one answer at a time, few that wait


class Services:
    """What the routes, the verbs and any endpoint in their place have in common: texts in, texts out.

    endpoint: any server of OpenAI's API (or a folder) that translates and summarises by prompt, in place of ours.
    """

    def __init__(
        self,
        translator: Translator | None,
        summariser: tuple[CausalLM, CourseTokenizer] | None,
        endpoint: Endpoint | None,
    ) -> None:
        self.translator, self.summariser, self.endpoint = translator, summariser, endpoint

    def translate(self, text: str) -> dict[str, Any]:
        """{"text", "sure"}; from an endpoint `sure` is None: it does not say."""
        text = clean_text(text)
        if self.endpoint is not None:
            return {"text": self.ask(TRANSLATE_PROMPT, text, 4 * len(text.split()) + 40), "sure": None}
        return self.translator.translate(text)._asdict()

    def summarise(self, text: str, method: str = "model", n_sentences: int = 2) -> dict[str, Any]:
        """{"text", "n_words"}; method "lead" takes the first sentences and needs no model."""
        text = clean_text(text)
        if method == "lead":
            made = " ".join(sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]*", text)[:n_sentences])
        elif self.endpoint is not None:
            made = self.ask(SUMMARISE_PROMPT, text, 200)
        else:
            model, tokenizer = self.summariser
            n_tokens, limit = len(tokenizer.encode(ASKED.format(text))) + 80, model.config.max_seq_len
            if n_tokens > limit:
                raise ValueError(
                    f"the text needs {n_tokens} positions with its summary, the model has {limit}; shorten it"
                )
            made = summarise_all(model, tokenizer, [text])[0]
        return {"text": made, "n_words": len(made.split())}

    def ask(self, prompt: str, text: str, max_tokens: int) -> str:
        turns = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
        return self.endpoint.chat(turns, max_tokens=max_tokens).text.strip()


def clean_text(text: str, most: int = MAX_CHARS) -> str:
    """A text as the models take it: NFC, one line. Raises ValueError for one that is empty, long or holds controls."""
    if len(text) > most:
        raise ValueError(f"the text has {len(text):,} characters; the limit is {most:,}")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise ValueError("the text is empty")
    if hidden := next((char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs")), None):
        raise ValueError(f"the text holds a character that nobody sees, U+{ord(hidden):04X}; remove it")
    return text


def load_services(endpoint: Endpoint | None = None) -> Services:
    """The committed translator and summariser, or an endpoint in the place of both."""
    if endpoint is not None:
        return Services(None, None, endpoint)
    return Services(load_translator_folder(), load_summariser(), None)


class TranslateRequest(Strict):
    """POST /v1/translate."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]
    target: Literal["fr"] = "fr"


class SummariseRequest(Strict):
    """POST /v1/summarize."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]
    method: Literal["model", "lead"] = "model"
    n_sentences: Annotated[int, Field(ge=1, le=10)] = 2  # of method "lead"


def add_language_routes(app: FastAPI, services: Services, max_waiting: int = 8) -> None:
    """Mount POST /v1/translate and /v1/summarize on topic 13's application, behind its guard and its limits.

    The models compute beside the event loop, one request at a time; more than max_waiting get 429 at once. What a model
    cannot read is a 400 that says why.
    """
    service: Service = app.state.service
    turn, waiting = asyncio.Lock(), 0

    async def computed(work: Callable[[], dict[str, Any]]) -> Response:
        nonlocal waiting
        if waiting >= max_waiting:
            message = f"{waiting} texts wait already; try again later"
            raise ApiError(429, message, "overloaded", headers={"Retry-After": "1"})
        waiting += 1
        try:
            async with turn:
                return JSONResponse(await asyncio.to_thread(work))
        except ValueError as error:
            raise bad_request(str(error), "text") from None
        finally:
            waiting -= 1

    @app.post("/v1/translate")
    async def translate(request: Request) -> Response:
        wanted = checked(TranslateRequest, await read_request(request, service.config.max_body))
        return await computed(lambda: services.translate(wanted.text))

    @app.post("/v1/summarize")
    async def summarize(request: Request) -> Response:
        wanted = checked(SummariseRequest, await read_request(request, service.config.max_body))
        return await computed(lambda: services.summarise(wanted.text, wanted.method, wanted.n_sentences))
