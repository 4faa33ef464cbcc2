"""Topic 15 - Tool model: the course chat model learns when to call which tool, with what, and what to say then.

    model, tokenizer = load_tool_model()                        # the chat model with the committed adapter folded in
    report = examine_tools(model, tokenizer, ToolExamConfig())  # choice, arguments and answers, exactly scored

Its adapter lies in the folder tool_adapter/, in PEFT's format; what the card says is in report.json there, and a test
computes it again. A lesson is a conversation whose last turn is right in every token: call, result, answer. The world
knows the right call for each question, so each part is scored exactly (Schick et al. 2023, Toolformer, arXiv
2302.04761, let a model find the calls itself).
"""

import datetime
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from chat_memory import MAX_FACTS, Memory, memory_tools
from chat_model import chat_instructions, load_chat_model
from chat_tools import (
    TOOLS,
    Tool,
    call_or_text,
    call_tool,
    course_world,
    grounded,
    spaced_call,
    unspaced_call,
    with_question,
)
from constrained_decoding import TokenBytes
from course_model import command_line
from course_tokenizer import Chat, CourseTokenizer
from engine_requests import RequestParams
from fine_tuning_adaptation import DialogueBatches, answer_loss, encode_dialogues, replay_documents
from huggingface_folders import read_safetensors
from low_rank_adapters import ADAPTER_WEIGHTS, LoraConfig, add_adapters, fold, load_adapter, save_adapter, train_rows
from modern_llm_architectures import CausalLM
from rag_experiments import course_questions
from serving_engine import Engine, EngineConfig
from tiny_world import ATTRIBUTES, REQUESTS, WORD_CLASSES, World, join, pick, words
from tiny_world import held_out as on_held_out_side
from training_transformers import TrainConfig, fit, going_on
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    describe_machine,
    seed_everything,
    shown,
    write_atomically,
)

ADAPTER = Path(__file__).parent / "tool_adapter"
BASE = "11-fine-tuning-adaptation/model"
REPORT = "report.json"
SYSTEM = "Please ask the tools."  # the system prompt of lessons, exams and chats
LONGEST = 320  # positions of a row; a longer lesson loses its oldest exchanges


def load_tool_model(folder: Path = ADAPTER) -> tuple[CausalLM, CourseTokenizer]:
    """The course chat model with the tool adapter folded in. Raises ValueError for an adapter of another base."""
    model, tokenizer = load_chat_model()
    load_adapter(model, folder)
    return fold(model).eval(), tokenizer


# Lessons


@dataclass(frozen=True)
class Lesson:
    """A question with the one right reaction: a call (or none) and what is said at last."""

    category: str
    question: str
    call: dict[str, Any] | None
    answer: str  # "" where the tool's result is the answer
    kept: dict[str, str] = field(default_factory=dict)  # what the memory holds before
    before: tuple[dict[str, str], ...] = ()  # messages that the question refers to
    accepts: Callable[[str], bool] | None = None  # where more than one answer is right

    def right(self, said: str) -> bool:
        return self.accepts(said) if self.accepts else said == self.answer


def call_of(tool: str, /, **arguments: str) -> dict[str, Any]:
    return {"name": tool, "arguments": arguments}


def sentence(text: str) -> str:
    return join(text.split())


SIGN_OF = {"plus": "+", "minus": "-", "times": "*"}


def draw_number(rng: random.Random, new: bool) -> int:
    """One to three digits, equally often; of the numbers above the world's largest sum a quarter is held out."""
    while True:
        number = rng.randrange(10 ** pick(rng, (1, 2, 3)))
        if number <= 20 or on_held_out_side(f"operand {number}", 0.25) == new:
            return number


def teach_sum(world: World, rng: random.Random, new: bool) -> Lesson:
    """Sums, differences and products of numbers up to 999; held out: operands."""
    a, b, sign = draw_number(rng, new), draw_number(rng, new), pick(rng, tuple(SIGN_OF))
    asked = f"{a} {sign} {b}"
    phrasings = [f"What is {asked} ?", f"Please tell me what {asked} is .", f"How much is {asked} ?"]
    if sign == "plus":
        phrasings += [text.format(f"sum of {a} and {b}") for text in REQUESTS["know"][:-1]]
    value = {"+": a + b, "-": a - b, "*": a * b}[SIGN_OF[sign]]
    call = call_of("calculator", expression=f"{a} {SIGN_OF[sign]} {b}")
    return Lesson("sum", sentence(pick(rng, phrasings)), call, sentence(f"{asked} is {value} ."))


def teach_person(category: str, people: Sequence[str], world: World, rng: random.Random) -> Lesson:
    person, name = pick(rng, people), pick(rng, tuple(ATTRIBUTES))
    start, end = ATTRIBUTES[name].question
    phrasings = (*REQUESTS["know"][:-1], f"{start.capitalize()} {person} {end}")
    question = sentence(pick(rng, phrasings).format(f"{name} of {person}"))
    facts = world.facts.get(person)
    answer = f"{person} {ATTRIBUTES[name].verb} {facts[name]} ." if facts else f"I do not know {person} ."
    return Lesson(category, question, call_of("look_up", person=person, property=name), sentence(answer))


def half(people: Sequence[str], new: bool) -> Sequence[str]:
    return people[len(people) // 2 :] if new else people[: len(people) // 2]


def teach_fact(world: World, rng: random.Random, new: bool) -> Lesson:
    """People whom the model was told of; held out: half of them."""
    return teach_person("fact", half(world.known, new), world, rng)


def teach_listed(world: World, rng: random.Random, new: bool) -> Lesson:
    """People whom no document names, but the tool does; held out: half of them."""
    return teach_person("listed", half(world.unseen, new), world, rng)


def strangers(world: World) -> list[str]:
    return [f"{name} {surname}" for name, surnames in world.surnames_of.items() for surname in surnames]


def teach_unknown(world: World, rng: random.Random, new: bool) -> Lesson:
    """People of whom nobody knows anything; held out: half of them."""
    return teach_person("unknown", half(strangers(world), new), world, rng)


KEPT = {name: WORD_CLASSES[f"{name}s"] for name in ("town", "job", "pet", "food", "colour", "thing", "place", "shape")}
KEEP = ("Remember that my {} is {} .", "Please remember that my {} is {} .", "My {} is {} . Please remember that .")
RECALL = ("What is my {} ?", "Do you know my {} ?", "Please tell me my {} .")
FORGET = ("Forget my {} .", "Please forget my {} .")


def draw_kept(rng: random.Random, new: bool) -> tuple[str, str]:
    """A name and a value to keep; held out: a quarter of the pairs."""
    while True:
        name = pick(rng, tuple(KEPT))
        value = pick(rng, KEPT[name])
        if on_held_out_side(f"my {name} is {value}", 0.25) == new:
            return name, value


def teach_remember(world: World, rng: random.Random, new: bool) -> Lesson:
    """A fact to keep; in an eighth of the cases the memory is full."""
    name, value = draw_kept(rng, new)
    full = rng.random() < 1 / 8
    kept = {chr(ord("a") + number): "x" for number in range(MAX_FACTS)} if full else {}
    answer = "I cannot keep more." if full else f"I know your {name} now."
    question = sentence(pick(rng, KEEP).format(name, value))
    return Lesson("remember", question, call_of("remember", fact=f"{name} is {value}"), answer, kept)


def teach_recall(world: World, rng: random.Random, new: bool) -> Lesson:
    """What the memory holds, or in a third of the cases does not."""
    name, value = draw_kept(rng, new)
    kept = dict([draw_kept(rng, new) for _ in range(2)])
    if rng.random() < 2 / 3:
        kept[name] = value
    answer = f"Your {name} is {kept[name]} ." if name in kept else f"I do not know your {name} ."
    question = sentence(pick(rng, RECALL).format(name))
    return Lesson("recall", question, call_of("recall", name=name), sentence(answer), kept)


def teach_forget(world: World, rng: random.Random, new: bool) -> Lesson:
    name, value = draw_kept(rng, new)
    question = sentence(pick(rng, FORGET).format(name))
    return Lesson("forget", question, call_of("forget", name=name), f"I forgot your {name}.", {name: value})


def teach_said(world: World, rng: random.Random, new: bool) -> Lesson:
    """What the user said earlier in this conversation, or in a third of the cases did not."""
    name, value = draw_kept(rng, new)
    told = rng.random() < 2 / 3
    other, thing = (name, value) if told else draw_kept(rng, new)
    told = other == name
    before = ({"role": "user", "content": f"My {other} is {thing}."}, {"role": "assistant", "content": "I see."})
    answer = f"You said your {name} is {thing}." if told else "You did not say."
    return Lesson("said", f"What did I say is my {name}?", None, answer, before=before)


def teach_tell(world: World, rng: random.Random, new: bool) -> Lesson:
    name, value = draw_kept(rng, new)
    return Lesson("tell", f"My {name} is {value}.", None, "I see.")


@cache
def search_questions(new: bool) -> tuple[str, ...]:
    """Questions to the course: the question set's, by its own split, and in training the sections' headings."""
    return tuple(item.question for item in course_questions() if item.held_out == new)


SEARCH = ("What does the course say about {} ?", "Search the course for {} .", "Where does the course tell of {} ?")


def teach_search(world: World, rng: random.Random, new: bool) -> Lesson:
    """Questions that the chapters may answer; held out: half of the question set."""
    question = pick(rng, search_questions(new))
    if not new and rng.random() < 0.5:
        question = pick(rng, SEARCH).format(" ".join(pick_words(rng, search_questions(False))))
        question = sentence(question)
    return Lesson("search", question, call_of("search_course", query=question), "")


def pick_words(rng: random.Random, texts: Sequence[str]) -> list[str]:
    """One to four neighbouring words of one of the texts."""
    found = pick(rng, texts).rstrip("?").split()
    n_words = pick(rng, (1, 2, 3, 4))
    start = rng.randrange(max(1, len(found) - n_words))
    return found[start : start + n_words]


GREET = {  # held out? -> what is said -> the answer
    False: {
        **dict.fromkeys(("Hello.", "Hi!", "Good morning.", "Hello there!"), "Hello!"),
        **dict.fromkeys(("Who are you?", "What can you do?"), "I do sums, look people up and search this course."),
        **dict.fromkeys(("Thank you.", "Thanks!", "Good, thank you."), "With pleasure."),
    },
    True: {
        **dict.fromkeys(("Hello!", "Hi.", "Good evening.", "Hi there!"), "Hello!"),
        **dict.fromkeys(("What are you?", "What do you do?"), "I do sums, look people up and search this course."),
        **dict.fromkeys(("Thank you!", "Thanks.", "Thanks, good."), "With pleasure."),
    },
}


def teach_greet(world: World, rng: random.Random, new: bool) -> Lesson:
    """Courtesies, which need no tool; held out: wordings."""
    said, answer = pick(rng, tuple(GREET[new].items()))
    return Lesson("greet", said, None, answer)


def teach_plain(category: str) -> Callable[[World, random.Random, bool], Lesson]:
    """What the chat model did without tools, and still is to do without."""

    def teach(world: World, rng: random.Random, new: bool) -> Lesson:
        [item] = chat_instructions(world, 1, rng.randrange(10**9), category, new)
        answer = join(item.answer[:-1])
        accepts = (lambda said: item.check(words(said))) if category == "story" else None
        return Lesson(category, join(item.prompt), None, answer, accepts=accepts)

    return teach


TEACH: dict[str, Callable[[World, random.Random, bool], Lesson]] = {
    "sum": teach_sum,
    "fact": teach_fact,
    "listed": teach_listed,
    "unknown": teach_unknown,
    "remember": teach_remember,
    "recall": teach_recall,
    "forget": teach_forget,
    "search": teach_search,
    "said": teach_said,
    "tell": teach_tell,
    "greet": teach_greet,
    **{category: teach_plain(category) for category in ("read", "story", "sort", "refuse", "safe")},
}
SHARES = {"sum": 3.0, "listed": 2.0, "unknown": 2.0, "remember": 1.5, "said": 2.0, "forget": 0.5}  # times n_lessons
SHARES |= dict.fromkeys(("tell", "greet", "safe"), 0.3) | dict.fromkeys(("story", "sort", "refuse"), 0.7)


def draw_lessons(category: str, n: int, seed: int, new: bool) -> list[Lesson]:
    """Lessons of one category, for training or, if new, for an exam."""
    rng, world = random.Random(f"{category} {seed}"), course_world()
    return [TEACH[category](world, rng, new) for _ in range(n)]


def tools_of(lesson: Lesson) -> dict[str, Tool]:
    """All tools, with a memory of its own that holds what the lesson says."""
    return TOOLS | memory_tools(Memory.of(lesson.kept))


def call_message(call: dict[str, Any]) -> dict[str, Any]:
    """A call as the model writes it; see `spaced_call`."""
    return {"role": "assistant", "content": None, "tool_calls": [{"function": spaced_call(call)}]}


def reaction(lesson: Lesson) -> list[dict[str, Any]]:
    """What follows the question: the call, its result as the tool gives it, the answer."""
    said = [{"role": "assistant", "content": lesson.answer}]
    if lesson.call is None:
        return said
    if not lesson.answer:
        return [call_message(lesson.call)]
    result = call_tool(lesson.call, tools_of(lesson))
    return [call_message(lesson.call), {"role": "tool", "content": result.text}, *said]


def exchange(lesson: Lesson) -> list[dict[str, Any]]:
    """A turn as later turns remember it: what was asked and answered, without calls."""
    return [{"role": "user", "content": lesson.question}, {"role": "assistant", "content": lesson.answer}]


def lesson_row(tokenizer: CourseTokenizer, lesson: Lesson, history: Sequence[Lesson]) -> Chat | None:
    """A lesson after other exchanges as ids; only its own turn is trained. None if it is longer than a row."""
    kept = [*history]
    while True:
        before = lesson_messages(lesson, kept)
        n_before = len(tokenizer.chat(before).ids)
        row = tokenizer.chat([*before, *reaction(lesson)])
        if len(row.ids) <= LONGEST + 1:
            return Chat(row.ids, [False] * n_before + row.trained[n_before:])
        if not kept:
            return None
        kept = kept[1:]


IN_HISTORY = tuple(name for name in TEACH if name not in ("said", "tell", "search", "story"))


@dataclass(frozen=True)
class ToolTrainConfig:
    """How the adapter is made."""

    n_lessons: int = 600  # lessons of each category, some more or less often
    tool_steps: int = 1300  # optimizer steps
    tool_batch: int = 12  # lessons and documents of a step
    tool_rate: float = 1e-2  # the peak learning rate
    later_share: float = 0.3  # fraction of the lessons that follow one to three other exchanges
    document_share: float = 0.1  # fraction of each batch that is pretraining documents
    tool_rank: int = 16  # of the low-rank updates

    def __post_init__(self) -> None:
        check_range(self, "n_lessons", "tool_steps", "tool_batch", "tool_rank", least=1)
        check_range(self, "tool_rate", above=0)
        check_range(self, "later_share", least=0, most=1)
        check_range(self, "document_share", least=0, below=1)

    @property
    def training(self) -> TrainConfig:
        steps, warmup = self.tool_steps, min(40, self.tool_steps // 4)
        sizes = {"batch_size": self.tool_batch, "max_steps": steps, "warmup_steps": warmup}
        return TrainConfig(learning_rate=self.tool_rate, weight_decay=0.0, save_every=500, log_every=25, **sizes)


def lesson_rows(tokenizer: CourseTokenizer, config: ToolTrainConfig, seed: int) -> list[Chat]:
    """The lessons to learn from, as ids."""
    rng = random.Random(seed)
    lessons = [
        lesson
        for category in TEACH
        for lesson in draw_lessons(category, round(config.n_lessons * SHARES.get(category, 1.0)), seed + 1, new=False)
    ]
    earlier = [lesson for lesson in lessons if lesson.category in IN_HISTORY]
    rows = []
    for lesson in lessons:
        n_before = rng.randrange(1, 4) if rng.random() < config.later_share else 0
        row = lesson_row(tokenizer, lesson, [pick(rng, earlier) for _ in range(n_before)])
        rows += [row] if row else []
    return rows


def new_tokens(tokenizer: CourseTokenizer, rows: Sequence[Chat]) -> list[int]:
    """Ids that the lessons have and that neither documents nor instructions had: their vectors are trained."""
    known = {token_id for row in replay_documents(tokenizer, 2000, 0) for token_id in row.ids}
    known |= {i for row in encode_dialogues(tokenizer, World().instructions(2000, 0)) for i in row.ids}
    return sorted({token_id for row in rows for token_id in row.ids} - known)


def train_tool_adapter(
    model: CausalLM, tokenizer: CourseTokenizer, config: ToolTrainConfig, seed: int, out: Path | None = None
) -> list[dict[str, float]]:
    """Give a chat model an adapter and train that alone; returns the log. out: where a run that stopped goes on."""
    rows = lesson_rows(tokenizer, config, seed)
    documents = replay_documents(tokenizer, 2000, seed, LONGEST) if config.document_share else ()
    train_rows(model, new_tokens(tokenizer, rows))
    add_adapters(model, LoraConfig(lora_rank=config.tool_rank, lora_alpha=2.0 * config.tool_rank))
    batches = DialogueBatches(rows, config.tool_batch, seed, LONGEST, documents, config.document_share)
    header = {"tools": asdict(config), "seed": seed}
    return fit(model, batches, answer_loss, going_on(config.training, out), out=out, header=header)


# Examination


@dataclass(frozen=True)
class ToolExamConfig:
    """How much a tool model is asked."""

    n_questions: int = 40  # held-out lessons of each category
    exam_seed: int = 7  # seed of the lessons
    n_before: int = 0  # other exchanges before each

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=1)
        check_range(self, "exam_seed", "n_before", least=0)


@dataclass(frozen=True)
class Reaction:
    """What a model did with a question."""

    call: dict[str, Any] | None  # None: it answered without
    invalid: str  # a call that is no JSON, as it was written
    said: str  # its last words; "" after a call whose result is the answer
    result: str = ""  # what the call gave


def lesson_messages(lesson: Lesson, history: Sequence[Lesson] = ()) -> list[dict[str, Any]]:
    """What a model reads of a lesson, up to the question, with other exchanges between."""
    between = [message for other in history for message in exchange(other)]
    question = {"role": "user", "content": lesson.question}
    return [{"role": "system", "content": SYSTEM}, *lesson.before, *between, question]


class ToolPupil:
    """A model with topic 13's engine, for many questions at once.

    constraint: "grounded" (a valid call of what the question says), "schema" (a valid call, a query being the question)
    or "none".
    """

    def __init__(self, model: CausalLM, tokenizer: CourseTokenizer, constraint: str = "grounded") -> None:
        self.tokenizer, self.constraint = (
            tokenizer,
            check_name("constraint", constraint, ("grounded", "schema", "none")),
        )
        self.words = TokenBytes(tokenizer, model.config.vocab_size)
        self.engine = Engine(model, tokenizer, EngineConfig(max_batch=32))

    def react(self, lessons: Sequence[Lesson], before: Sequence[list[dict[str, Any]]]) -> list[Reaction]:
        """Ask every question, run the calls, and let the model speak after the results. Greedy.

        before: what is read for each lesson, the system prompt first and the question last; see `lesson_messages`.
        """
        first = self.generate(before, [tools_of(lesson) for lesson in lessons])
        calls = [self.read(output) for output in first]
        again, texts, results = [], {}, [""] * len(lessons)
        for number, (lesson, (call, invalid, text)) in enumerate(zip(lessons, calls, strict=True)):
            tools = tools_of(lesson)
            if call is None or (call.get("name") in tools and tools[call["name"]].final):
                texts[number] = "" if call or invalid else text
                continue
            results[number] = call_tool(call, tools).text
            again.append((number, [*before[number], call_message(call), {"role": "tool", "content": results[number]}]))
        for (number, _), output in zip(again, self.generate([row for _, row in again], None), strict=True):
            texts[number] = output.text
        return [Reaction(call, bad, texts[number], results[number]) for number, (call, bad, _) in enumerate(calls)]

    def generate(self, rows: Sequence[list[dict[str, Any]]], tools: Sequence[dict[str, Tool]] | None) -> list[Any]:
        prompts = [self.tokenizer.chat(row, add_generation_prompt=True).ids for row in rows]
        params = []
        for number, row in enumerate(rows):
            constraint = None
            if tools is not None and self.constraint != "none":
                ground = grounded if self.constraint == "grounded" else with_question
                offered = ground(tools[number], row[-1]["content"])
                constraint = call_or_text(offered, self.words, self.tokenizer.tool_call_id, spaced=True)
            params.append(RequestParams(max_tokens=100, temperature=0.0, constraint=constraint))
        return self.engine.generate(prompts, params) if rows else []

    def read(self, output: Any) -> tuple[dict[str, Any] | None, str, str]:
        """The call of an output, or what is no JSON after the token that begins one, or the text."""
        if output.new_ids[:1] != [self.tokenizer.tool_call_id]:
            return None, "", output.text
        ids = [token_id for token_id in output.new_ids[1:] if token_id != self.tokenizer.im_end_id]
        written = self.tokenizer.decode(ids)
        try:
            call = json.loads(written)
        except (ValueError, RecursionError):
            return None, written or "{", ""
        return (unspaced_call(call), "", "") if isinstance(call, dict) else (None, written, "")


def score_reactions(lessons: Sequence[Lesson], reactions: Sequence[Reaction]) -> dict[str, float]:
    """Shares of the lessons: the right tool or none chosen; the whole call right; the last words right; invalid calls.

    right counts a lesson whose call and last words are both right.
    """
    choice = call = right = invalid = 0
    for lesson, made in zip(lessons, reactions, strict=True):
        wanted = lesson.call and lesson.call["name"]
        chosen = None if made.call is None else made.call.get("name")
        choice += chosen == wanted and not made.invalid
        call += made.call == lesson.call and not made.invalid
        right += made.call == lesson.call and not made.invalid and lesson.right(made.said)
        invalid += bool(made.invalid)
    n = len(lessons)
    return {"choice": choice / n, "call": call / n, "right": right / n, "invalid": invalid / n}


def examine_tools(
    model: CausalLM,
    tokenizer: CourseTokenizer,
    exam: ToolExamConfig,
    constraint: str = "grounded",
    categories: Sequence[str] = tuple(TEACH),
) -> dict[str, dict[str, float]]:
    """`score_reactions` for held-out lessons of each category."""
    pupil, found, rng = ToolPupil(model, tokenizer, constraint), {}, random.Random(exam.exam_seed)
    others = [item for name in IN_HISTORY for item in draw_lessons(name, 5, exam.exam_seed + 1, new=False)]
    for category in categories:
        lessons = draw_lessons(category, exam.n_questions, exam.exam_seed, new=True)
        before = [lesson_messages(lesson, [pick(rng, others) for _ in range(exam.n_before)]) for lesson in lessons]
        found[category] = score_reactions(lessons, pupil.react(lessons, before))
    return found


# The folder


def exam_report(model: CausalLM, tokenizer: CourseTokenizer, exam: ToolExamConfig) -> dict[str, Any]:
    """The whole exam, and a small one that a test repeats."""
    small = ToolExamConfig(n_questions=4, exam_seed=exam.exam_seed)
    return {
        "exam": asdict(exam),
        "categories": examine_tools(model, tokenizer, exam),
        "small_exam": asdict(small),
        "small_categories": examine_tools(model, tokenizer, small),
    }


def save_tool_adapter(model: CausalLM, folder: Path, facts: dict[str, Any], exam: ToolExamConfig) -> dict[str, Any]:
    """Write the adapter of a model, examine what it gives the base, and write report.json and the card from that."""
    save_adapter(model, folder, base=BASE)
    examined, tokenizer = load_tool_model(folder)
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    numbers = sum(tensor.numel() for tensor in read_safetensors(folder / ADAPTER_WEIGHTS).values())
    report = facts | exam_report(examined, tokenizer, exam)
    report |= {"base_sha256": model.base_identity, "weights_sha256": sha256(weights).hexdigest()}
    report |= {"parameters": numbers, "bytes": len(weights)}
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", tool_card(report).encode())
    return report


def tool_card(report: dict[str, Any]) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    rows = [
        f"| {name} | {numbers['choice']:.1%} | {numbers['call']:.1%} | {numbers['right']:.1%} |"
        for name, numbers in report["categories"].items()
    ]
    train, exam = report["tools"], report["exam"]
    lines = [
        "# The tool adapter",
        "",
        f"Low-rank updates of rank {train['tool_rank']} and some rows of the embedding, {report['parameters']:,} "
        "numbers, for [the course chat model](../../11-fine-tuning-adaptation/model/README.md), in PEFT's format, by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['steps']:,} steps, {report['cpu_seconds'] / 60:.1f} minutes of CPU time ({report['machine']}, "
        f"{report['date']}). It loads on no other weights: the SHA-256 of the base is in adapter_config.json.",
        "",
        "**Use**: to learn with. The model decides by its first token whether it calls a tool, and writes the call "
        "under a constraint that admits nothing else. Asked for sums, people, its memory and the course it should "
        "call; for what it can do itself it should not.",
        "",
        f"{exam['n_questions']} held-out questions of each category, greedy, one call at most: the right tool or none "
        'chosen; the whole call right; call and last words right. A "search" is right if its call is. "safe" holds out '
        "words that no text of the training has; stories are right if the world's grammar can tell them, and greedy "
        "ones run in circles.",
        "",
        "| Category | Choice | Call | Right |",
        "|:--|--:|--:|--:|",
        *rows,
        "",
        f"`{ADAPTER_WEIGHTS}`: {report['bytes']:,} bytes, sha256 `{report['weights_sha256']}`; weights of the base: "
        f"`{report['base_sha256']}`",
    ]
    return "\n".join(lines) + "\n"


@alone
def tool_adapter(config: ToolTrainConfig, exam: ToolExamConfig, run: RunConfig) -> None:
    """Teach the course chat model its tools; save the adapter with report and card to --out."""
    announce(f"train on tool dialogues, {config.tool_steps:,} steps", 60 + 0.2 * config.tool_steps)
    seed_everything(run.seed)
    model, tokenizer = load_chat_model()
    before = time.process_time()
    log = train_tool_adapter(model, tokenizer, config, run.seed, run.out)
    facts = {"cpu_seconds": time.process_time() - before, "steps": int(log[-1]["step"]), "tools": asdict(config)}
    facts |= {"command": command_line(), "machine": describe_machine(), "date": datetime.date.today().isoformat()}
    folder = run.out / "tool_adapter"
    report = save_tool_adapter(model, folder, facts | {"seed": run.seed}, exam)
    for name, numbers in report["categories"].items():
        print(f"{name:9}" + "".join(f" {key} {value:6.1%}" for key, value in numbers.items()))
    print(f"the adapter is in {shown(folder)}")


TOOL_VERBS: dict[str, tuple[Any, ...]] = {"tool-adapter": (tool_adapter, ToolTrainConfig, ToolExamConfig, RunConfig)}
