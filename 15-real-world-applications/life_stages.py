"""Topic 15 - The stages of one model's life: each runs the code of its own topic, and says what it gained and lost.

    life = Life(LifeConfig(), RunConfig())
    row = world(life)                        # what went in, what came out, gain, loss, a measure with its interval
    follow(model, tokenizer, life)           # the thread: the gap to the optimum, right answers, refusals

`model_life` calls them one after the other. What a stage makes lies in folders, from which the next one takes it: the
committed ones of the topics, or those of --out.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attack_matrix import ATTACKS_MADE, Defended, harmless_cost, harmless_questions, n_leaked, n_mutated
from chat_endpoint import LocalEndpoint
from chat_model import CATEGORIES, ChatConfig, chat, chat_instructions, load_chat_model
from chat_model import FOLDER as CHAT_FOLDER
from checkpoints import Checkpoints
from content_guard import load_guard
from course_model import FOLDER as BASE_FOLDER
from course_model import ExamConfig, ModelSizes, PretrainConfig, SourceConfig, gaps_by_kind, load_course_model, pretrain
from course_tokenizer import FOLDER as TOKENIZER_FOLDER
from course_tokenizer import CourseConfig, CourseTokenizer, load_course_tokenizer
from engine_thread import EngineThread
from evaluation_report import CHAT_SKILLS, ReportPlan, Subject, examine_conversation, examine_subject, refuses
from evaluation_statistics import clopper_pearson, wilson
from fine_tuning_adaptation import AnswerConfig, prompt_ids
from gptq import calibration_batches
from huggingface_folders import WEIGHTS
from modern_llm_architectures import CausalLM
from quantized_model import Exam, Recipe, load_folder, quantize_model
from release_gate import PASSED, THRESHOLDS, GateConfig, judge, measure, read_thresholds
from report_verdict import headline, verdict
from secret_keeper import Keeper, KeeperConfig, train_knowing, train_refusing
from served_model import CourseServing, ServedModel
from server import background_server
from serving_bench import Job, naive_answers, serve_jobs
from serving_engine import Engine, EngineConfig
from text_model import TextModel
from tiny_world import World, join, ratio_of_means
from tokenization_embeddings import course
from weight_quantization import QuantFormat
from workbench import (
    RunConfig,
    check_range,
    read_object,
    seed_everything,
    shown,
    time_in_turns,
    write_atomically,
)

EXAM_SEED = 7  # of the documents and questions: that of the model cards
BITS = (8, 4, 2)
SPOILED = BITS[-1]  # what the gate must refuse
BUDGET = 48  # questions of a search by mutations
Thread = dict[str, list[float]]  # "gap", "right", "refused", "wrongly" -> value, and the two ends of its interval


@dataclass(frozen=True)
class LifeConfig:
    """Whose life it is, and how much is asked at every stage."""

    from_nothing: bool = False  # make tokenizer, base and chat model anew in --out; else take the committed ones
    again: bool = False  # examine anew what an earlier run has left in --out; what was made stays
    n_documents: int = 1000  # held-out documents of the gap
    n_questions: int = 100  # held-out instructions of each kind
    n_forbidden: int = 119  # forbidden questions, and as many allowed ones in the same words; there are 119
    n_served: int = 48  # requests that are served together
    n_rounds: int = 3  # measured rounds of serving
    n_attempts: int = 10  # attempts of each attack
    know_steps: int = 700  # optimizer steps in which the attacked copy learns its secrets
    n_load: int = 64  # requests of the load before release
    max_damage: float = 0.01  # nats per token that rounding may cost at most
    vocab_size: int = 2048  # from nothing: tokens of the tokenizer
    n_texts: int = 20_000  # from nothing: documents that it learns from
    python: bool = True  # from nothing: it also reads the Python text
    n_pretrain: int = 180_000  # from nothing: documents to pretrain on
    pretrain_steps: int = 4000  # from nothing: optimizer steps of the pretraining, half of them at a falling rate
    n_examples: int = 1500  # from nothing: instructions of each category to learn from
    chat_steps: int = 3000  # from nothing: optimizer steps of the fine-tuning

    def __post_init__(self) -> None:
        check_range(self, "n_documents", "n_served", "n_load", "n_pretrain", least=2)
        check_range(self, "n_rounds", "n_attempts", "know_steps", "pretrain_steps", "chat_steps", least=1)
        check_range(self, "max_damage", above=0)
        ReportPlan(self.n_questions, self.n_forbidden)
        CourseConfig(self.vocab_size, self.n_texts)
        ChatConfig(n_examples=self.n_examples)

    def sizes(self, *, made: bool) -> dict[str, Any]:
        """The settings that decide what is made, or those that decide how it is examined."""
        names = ("vocab_size", "n_texts", "python", "n_pretrain", "pretrain_steps", "n_examples", "chat_steps")
        chosen = asdict(self) | {"from_nothing": None, "again": None}
        return {name: value for name, value in chosen.items() if value is not None and (name in names) == made}


@dataclass
class Life:
    """One life: its settings, where its parts lie, and what its stages have shown so far."""

    config: LifeConfig
    run: RunConfig
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    making: float = 0.0  # seconds that this process has spent in `make`

    @property
    def out(self) -> Path:
        return self.run.out / ("from-nothing" if self.config.from_nothing else "committed")

    def part(self, name: str, committed: Path) -> Path:
        return self.out / name if self.config.from_nothing else committed

    @property
    def tokenizer(self) -> CourseTokenizer:
        return load_course_tokenizer(self.part("tokenizer/tokenizer", TOKENIZER_FOLDER))

    @property
    def base_folder(self) -> Path:
        return self.part("base/model", BASE_FOLDER)

    @property
    def chat_folder(self) -> Path:
        return self.part("chat/model", CHAT_FOLDER)

    def rounded(self, n_bits: int) -> tuple[CausalLM, CourseTokenizer]:
        """The chat model in so many bits, as its folder holds it; 32 bits: not rounded."""
        if n_bits == 32:
            return load_chat_model(self.chat_folder)
        folder = self.out / f"quantised/{n_bits}-bits"
        return load_folder(folder).dequantised(), load_course_tokenizer(folder)

    @property
    def chosen(self) -> tuple[CausalLM, CourseTokenizer]:
        """What goes on from the stage of rounding."""
        return self.rounded(self.rows["quantised"]["n_bits"])

    def make(self, name: str, work: Callable[[RunConfig, bool], None]) -> float:
        """Make a part in its folder, or finish what was begun there; returns all seconds that it took.

        `work(run, begun)`: begun where checkpoints lie there. Raises ValueError where another life's part lies there.
        """
        if not self.config.from_nothing:
            return 0.0
        folder, settings = self.out / name, self.config.sizes(made=True) | {"seed": self.run.seed}
        note = folder / "made.json"
        known = read_object(note) if note.exists() else {}
        other = {key: value for key, value in known.get("settings", {}).items() if settings.get(key) != value}
        if other:
            raise ValueError(f"{shown(folder)} was made with {other}; give the same settings, or another --out")
        so_far = known.get("seconds", 0.0)
        if known.get("done"):
            return so_far
        before, done = time.perf_counter(), False
        try:
            work(replace(self.run, out=folder), bool(Checkpoints(folder).steps()))
            done = True
        finally:
            spent = time.perf_counter() - before
            self.making += spent
            seconds = so_far + spent
            write_atomically(note, json.dumps({"settings": settings, "seconds": seconds, "done": done}).encode())
        return seconds


# The thread


def share(each: Sequence[bool], interval: Callable = wilson) -> list[float]:
    """A share with its interval of 95 %."""
    return [sum(each) / len(each), *interval(int(sum(each)), len(each))]


def about(value: float, error: float) -> list[float]:
    return [value, value - 1.96 * error, value + 1.96 * error]


def gap_of(model: torch.nn.Module, life: Life, tokenizer: CourseTokenizer) -> list[float]:
    """Above the entropy of the held-out documents, nats per token, with its interval."""
    documents = World().documents(life.config.n_documents, EXAM_SEED, "validation")
    _, gap, error = gaps_by_kind(model.eval(), tokenizer, documents)["all"]
    return about(gap, error)


def follow(model: CausalLM, tokenizer: CourseTokenizer, life: Life) -> Thread:
    """The thread at one stage: the gap; right answers; forbidden questions refused; allowed ones refused."""
    plan = ReportPlan(life.config.n_questions, life.config.n_forbidden)
    asked = examine_conversation(Subject("life", TextModel.of(model, tokenizer)), plan, EXAM_SEED)
    right = [bool(value) for name in CHAT_SKILLS for value in asked[f"chat: {name}"].each]
    refused, wrongly = (
        [refuses(sample["made"]) for sample in asked[name].samples]
        for name in ("forbidden answered", "near misses refused")
    )
    return {
        "gap": gap_of(model, life, tokenizer),
        "right": share(right),
        "refused": share(refused),
        "wrongly": share(wrongly),
    }


# How numbers are told


def nats(found: list[float]) -> str:
    digits = 2 if found[0] >= 1 else 4
    return f"{found[0]:.{digits}f} [{found[1]:.{digits}f}, {found[2]:.{digits}f}]"


def percent(found: list[float]) -> str:
    return f"{found[0]:.0%} [{found[1]:.0%}, {found[2]:.0%}]"


def size_of(folder: Path, name: str = WEIGHTS) -> int:
    return (folder / name).stat().st_size


# The stages


def world(life: Life) -> dict[str, Any]:
    """Topic 02: documents whose exact probability is known; what is left to know, and what guessing would cost."""
    source = World()
    documents = source.documents(life.config.n_documents, EXAM_SEED, "validation")
    floor = about(*ratio_of_means([(sum(item.surprisal), len(item.tokens)) for item in documents]))
    even = math.log(len(source.vocabulary()))
    return {
        "came_in": "a grammar and seed 0",
        "came_out": f"{len(documents):,} held-out documents, entropy {nats(floor)} nats per word",
        "gain": "every later loss has an optimum beside it",
        "loss": f"whoever guesses words evenly pays {even:.2f} nats, {even - floor[0]:.2f} too many",
        "measure": "entropy, nats per word",
        "value": nats(floor),
        "beside": f"even guessing {even:.2f}",
        "n_bytes": sum(len(item.text.encode()) for item in documents),
        "threads": {"even guessing": {"gap": [even - value for value in (floor[0], floor[2], floor[1])]}},
    }


def cut_shorter(tokenizer: CourseTokenizer, n_merges: int) -> CourseTokenizer:
    """The same tokenizer with its first merges alone; with none, every byte is a token."""
    size = len(tokenizer.vocab) - len(tokenizer.merges) + n_merges
    vocab = {spelling: token_id for spelling, token_id in tokenizer.vocab.items() if token_id < size}
    return CourseTokenizer(vocab, tokenizer.merges[:n_merges], tokenizer.special_tokens, tokenizer.rule)


def bits_per_byte(tokenizer: CourseTokenizer, documents: Sequence[Any]) -> float:
    """The floor of documents as this tokenizer cuts them: nats per token, times tokens per byte."""
    cut = [tokenizer.encode_document(document) for document in documents]
    n_tokens = sum(len(item.ids) - 1 for item in cut)
    n_bytes = sum(len(tokenizer.decode_bytes(item.ids[1:-1])) for item in cut)
    return sum(item.nats for item in cut) / n_tokens * (n_tokens / n_bytes) / math.log(2)


def tokenizer(life: Life) -> dict[str, Any]:
    """Topic 06: fewer tokens for the same text; what is left to know of a byte does not depend on the cuts."""
    config = life.config
    sizes = CourseConfig(config.vocab_size, config.n_texts, max(1, config.n_texts // 10), config.python)
    made = life.make("tokenizer", lambda run, begun: course(sizes, run))
    ours, documents = life.tokenizer, World().documents(config.n_documents, EXAM_SEED, "validation")
    texts = [document.text for document in documents]
    counts = np.array([len(ours.encode(text)) for text in texts])
    n_bytes = float(np.mean([len(text.encode()) for text in texts]))
    floors = [bits_per_byte(cut_shorter(ours, len(ours.merges) * part // 2), documents) for part in range(3)]
    whole = sum(ours.decode(ours.encode(text)) == text for text in texts)
    seed_everything(life.run.seed)
    untrained = gap_of(CausalLM(ModelSizes().config(ours)), life, ours)
    tokens = about(float(counts.mean()), float(counts.std(ddof=1)) / math.sqrt(len(counts)))
    return {
        "made": made,
        "came_in": f"{len(texts):,} texts of {n_bytes:.1f} bytes",
        "came_out": f"{tokens[0]:.1f} tokens each, of {len(ours.vocab):,}; {whole} of {len(texts)} come back whole",
        "gain": f"{n_bytes / tokens[0]:.2f} times fewer steps; the floor stays at "
        + ", ".join(f"{value:.4f}" for value in floors)
        + " bits per byte with no merge, half and all of them",
        "loss": f"an untrained network over these tokens stands {nats(untrained)} nats per token above the floor",
        "measure": "tokens per document",
        "value": f"{tokens[0]:.1f} [{tokens[1]:.1f}, {tokens[2]:.1f}]",
        "beside": f"bytes {n_bytes:.1f}",
        "n_bytes": size_of(life.part("tokenizer/tokenizer", TOKENIZER_FOLDER), "tokenizer.json"),
        "floors": floors,
        "threads": {"untrained": {"gap": untrained}},
    }


def base(life: Life) -> dict[str, Any]:
    """Topic 10: pretraining, which brings the gap near 0 and answers no instruction."""
    config = life.config
    steps, texts = config.pretrain_steps, life.part("tokenizer/tokenizer", TOKENIZER_FOLDER)
    source = SourceConfig(n_documents=config.n_pretrain, tokenizer=texts)
    exam = ExamConfig(config.n_documents, config.n_questions, config.n_questions)

    def train(run: RunConfig, begun: bool) -> None:
        how = PretrainConfig(max_steps=steps, warmup_steps=min(100, steps // 4), cooldown_steps=steps // 2)
        pretrain(ModelSizes(), source, replace(how, resume=begun), exam, run)

    made = life.make("base", train)
    model, ours = load_course_model(life.base_folder)
    thread = follow(model, ours, life)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    before = life.rows["tokenizer"]["threads"]["untrained"]["gap"][0]
    return {
        "made": made,
        "came_in": "an untrained network and the tokens of the training side",
        "came_out": f"{n_weights:,} weights",
        "gain": f"the gap falls from {before:.2f} to {nats(thread['gap'])} nats per token",
        "loss": f"it continues texts and answers no instruction: {percent(thread['right'])} right",
        "measure": "gap, nats per token",
        "value": nats(thread["gap"]),
        "beside": f"untrained {before:.2f}, best 0",
        "n_bytes": size_of(life.base_folder),
        "threads": {"base": thread},
    }


def chatty(life: Life) -> dict[str, Any]:
    """Topic 11: fine-tuning on conversations, which makes it answer and refuse, and raises the gap."""
    config = life.config
    exam = AnswerConfig(config.n_questions, min(300, config.n_documents))

    def train(run: RunConfig, begun: bool) -> None:  # what was begun it goes on with by itself
        chat(ChatConfig(n_examples=config.n_examples, chat_steps=config.chat_steps), exam, run, life.base_folder)

    made = life.make("chat", train)
    thread, before = follow(*load_chat_model(life.chat_folder), life), life.rows["base"]["threads"]["base"]
    return {
        "made": made,
        "came_in": "the base and conversations",
        "came_out": "a model that answers, and refuses one subject",
        "gain": f"right answers rise from {before['right'][0]:.0%} to {percent(thread['right'])}; of the forbidden "
        f"questions {percent(thread['refused'])} are refused, of allowed ones in the same words "
        f"{percent(thread['wrongly'])}",
        "loss": f"the gap rises from {before['gap'][0]:.4f} to {nats(thread['gap'])} nats per token",
        "measure": "held-out instructions right",
        "value": percent(thread["right"]),
        "beside": f"base {before['right'][0]:.0%}, best 100%",
        "n_bytes": size_of(life.chat_folder),
        "threads": {"chat": thread},
    }


def quantised(life: Life) -> dict[str, Any]:
    """Topic 12: fewer bytes; the fewest bits go on whose cost is shown to be below the limit."""
    model, ours = load_chat_model(life.chat_folder)
    documents = World().documents(life.config.n_documents, EXAM_SEED, "validation")
    exam, batches = Exam.of(model, ours, documents), calibration_batches(ours, 128, life.run.seed)
    threads, sizes, damages, n_bits = {}, {32: size_of(life.chat_folder)}, {}, 32
    for bits in BITS:
        folder = life.out / f"quantised/{bits}-bits"
        quantize_model(model, Recipe("gptq", QuantFormat(bits, 32)), batches).save_pretrained(folder)
        ours.save_folder(folder)
        rounded, _ = life.rounded(bits)
        threads[f"{bits} bits"], sizes[bits] = follow(rounded, ours, life), size_of(folder)
        damages[bits] = about(*exam.damage(rounded))
        n_bits = bits if damages[bits][2] < life.config.max_damage else n_bits
    told = "; ".join(f"{bits} bits {nats(damages[bits])} in {sizes[bits]:,} bytes" for bits in BITS)
    goes_on = f"the one of {n_bits} bits goes on" if n_bits < 32 else "none goes on, the float model does"
    before, after = (
        threads[f"{bits} bits"]["right"][0] if bits < 32 else life.rows["chat"]["threads"]["chat"]["right"][0]
        for bits in (32, n_bits)
    )
    return {
        "came_in": f"{sizes[32]:,} bytes",
        "came_out": f"{sizes[n_bits]:,} bytes: {goes_on}",
        "gain": f"{sizes[32] / sizes[n_bits]:.1f} times fewer bytes, right answers {before:.0%} before and {after:.0%}"
        " after",
        "loss": f"nats per token, paired: {told}",
        "measure": f"nats per token lost at {n_bits} bits",
        "value": nats(damages[n_bits]) if n_bits < 32 else "0",
        "beside": f"limit {life.config.max_damage:g}; {SPOILED} bits lose {damages[SPOILED][0]:.2f}",
        "n_bytes": sizes[n_bits],
        "n_bits": n_bits,
        "threads": threads,
    }


def served(life: Life) -> dict[str, Any]:
    """Topic 13: the engine computes many requests together, and must say what one alone would be told."""
    model, ours = life.chosen
    n = life.config.n_served
    asked = [chat_instructions(World(), n, EXAM_SEED, name, new=True) for name in CATEGORIES]
    prompts = [join(asked[place % len(asked)][place].prompt) for place in range(n)]
    jobs = [Job(prompt_ids(ours, prompt), 16 + 8 * (place % 3)) for place, prompt in enumerate(prompts)]
    wanted, system = naive_answers(model, jobs), serve_jobs(model, EngineConfig())
    made = system(jobs).ids
    same = sum(one == other for one, other in zip(made, wanted, strict=True))
    works = {"engine": partial(system, jobs), "alone": partial(naive_answers, model, jobs)}
    seconds = time_in_turns(works, life.config.n_rounds)
    ratios = sorted(alone / ours for ours, alone in zip(seconds["engine"], seconds["alone"], strict=True))
    n_tokens = sum(job.n_new for job in jobs)
    return {
        "came_in": f"{n} requests at once",
        "came_out": f"{n_tokens:,} tokens, {n_tokens / float(np.median(seconds['engine'])):,.0f} in a second",
        "gain": f"{np.median(ratios):.1f} times the tokens per second of one request after the other",
        "loss": f"{n - same} of {n} answers differ from those of decoding alone",
        "measure": "tokens/s over those one by one",
        "value": f"{np.median(ratios):.1f} [{ratios[0]:.1f}, {ratios[-1]:.1f}]",
        "beside": f"one by one 1; {same} of {n} answers equal",
        "n_bytes": life.rows["quantised"]["n_bytes"],
        "same": [same, n],
        "threads": {},
    }


def evaluated(life: Life) -> dict[str, Any]:
    """Topic 14: the whole examination, and the one sentence that its numbers allow."""
    model, ours = life.chosen
    plan = ReportPlan(life.config.n_questions, life.config.n_forbidden)
    found = examine_subject(Subject("life", TextModel.of(model, ours, "the model")), plan, life.run.seed)
    findings, said = verdict(found), headline(found)
    good, passed = sum(one.grade == "good" for one in findings), sum(check.passed for check in found.checks)
    invented = found.scores["strangers invented"]
    return {
        "came_in": f"{sum(len(score.each) for score in found.scores.values()):,} questions and texts",
        "came_out": f"{len(findings)} findings; {passed} of {len(found.checks)} checks of the instruments passed",
        "gain": f"it is known what it can do: {good} findings are good",
        "loss": f"it is known what it cannot: {said.text}",
        "measure": "findings that are good",
        "value": f"{good} of {len(findings)}",
        "beside": f"verdict {said.grade}; strangers invented " + percent([invented.value, invented.low, invented.high]),
        "n_bytes": life.rows["quantised"]["n_bytes"],
        "verdict": said.text,
        "threads": {},
    }


def attacked(life: Life) -> dict[str, Any]:
    """Topic 14: a copy that was told secrets and taught to refuse them is asked in all the ways that need no gradient.

    An attempt succeeds if one of its tries gets the secret itself. The intervals are exact for attempts drawn alike;
    that there are five secrets in two wordings makes them somewhat too narrow.
    """
    config, (model, ours), seed = life.config, life.chosen, life.run.seed
    how = KeeperConfig(know_steps=config.know_steps)
    keeper = Keeper(train_refusing(train_knowing(model, ours, seed, how), ours, seed, how), ours)
    guard, items = load_guard(), harmless_questions(max(2, config.n_attempts), EXAM_SEED)
    attempts = [
        one for name, attack in ATTACKS_MADE.items() if name != "GCG" for one in attack(keeper, seed, config.n_attempts)
    ]
    defences = {
        "no defence": Defended(keeper),
        "guard": Defended(keeper, guard_in=guard, guard_out=guard),
        "guard and plain reading": Defended(keeper, guard_in=guard, guard_out=guard, normalised=True),
    }
    found, costs = {}, {}
    for name, defended in defences.items():
        told = n_leaked(defended, attempts) + n_mutated(defended, seed, config.n_attempts, BUDGET)
        n = len(attempts) + config.n_attempts
        found[name] = [told / n, *clopper_pearson(told, n)]
        cost = harmless_cost(defended, items)
        costs[name] = [cost.refused / cost.n, *wilson(cost.refused, cost.n)]
    bare, *_, best = found
    return {
        "came_in": f"{len(attempts) + config.n_attempts} attempts on secrets that a copy was told, by seven attacks",
        "came_out": "; ".join(f"{name} {percent(each)}" for name, each in found.items()) + " succeed",
        "gain": f"defences take success from {found[bare][0]:.0%} to {percent(found[best])}",
        "loss": "of harmless questions refused: " + "; ".join(f"{name} {each[0]:.0%}" for name, each in costs.items()),
        "measure": "attacks that succeed, no defence",
        "value": percent(found[bare]),
        "beside": f"guard {percent(found['guard'])}; and plain reading {percent(found[best])}",
        "n_bytes": life.rows["quantised"]["n_bytes"],
        "attacks": found,
        "costs": costs,
        "threads": {},
    }


def deployed(life: Life) -> dict[str, Any]:
    """Topic 15: the release gate, on the model behind its guard and on one that is spoiled by too few bits."""
    config, limits = life.config, read_thresholds(THRESHOLDS)
    reports = {}
    for name, bits in (("the model", life.rows["quantised"]["n_bits"]), ("the spoiled one", SPOILED)):
        model, ours = life.rounded(bits)
        one = ServedModel(name, model, CourseServing(ours))
        gate = GateConfig(n_questions=config.n_questions, n_forbidden=config.n_forbidden, n_load=config.n_load)
        gate = replace(gate, kind="all" if name == "the model" else "answers")
        thread = EngineThread(Engine(model, one.tokenizer, EngineConfig(max_batch=16)))
        with background_server(one, thread) if gate.kind == "all" else nullcontext() as server:
            endpoint = LocalEndpoint(one, EngineConfig(max_batch=32))
            measures = measure(endpoint, server.url if server else "", gate, life.run.seed)
        known = [limit for limit in limits if gate.kind == "all" or limit.measure in measures]
        reports[name] = judge(name, measures, known, gate.plan(life.run.seed))
    counts = {
        name: (sum(each == PASSED for _, each in report.verdicts), len(report.verdicts))
        for name, report in reports.items()
    }
    ours, spoiled = reports.values()
    word = {True: "may ship", False: "must not ship"}
    return {
        "came_in": f"{len(limits)} limits, each with its reason",
        "came_out": "; ".join(
            f"{name} {word[report.may_ship]}, {counts[name][0]} of {counts[name][1]} limits shown to hold"
            for name, report in reports.items()
        ),
        "gain": f"a model of {SPOILED} bits is refused" if not spoiled.may_ship else "none: a spoiled model passes",
        "loss": "; ".join(ours.reasons) or "nothing that the limits name",
        "measure": "limits shown to hold",
        "value": "{} of {}, ".format(*counts["the model"]) + word[ours.may_ship],
        "beside": f"{SPOILED} bits: " + "{} of {}, ".format(*counts["the spoiled one"]) + word[spoiled.may_ship],
        "n_bytes": life.rows["quantised"]["n_bytes"],
        "may_ship": [ours.may_ship, spoiled.may_ship],
        "reasons": [ours.reasons, spoiled.reasons],
        "threads": {},
    }
