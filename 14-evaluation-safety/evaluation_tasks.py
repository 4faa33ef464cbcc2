"""Topic 14 - Evaluation tasks: questions in a file, a runner for any model, scores with intervals.

    write_task(world_task("facts", 200, seed=0), "facts.jsonl")       # from TinyWorld, whose truth is known
    result = run_task(load_text_model(folder), read_task("facts.jsonl"))
    result.table()                                                    # {"acc": (0.93, Interval(0.88, 0.96)), ...}

A task file is JSONL. Its first line is the task: {"task": name, "kind": "choice", "generate" or "text", ...}; every
further line is a question. The prompt is a template filled with the question's fields, so one set of questions can be
asked in several formats. Multiple choice is scored four ways at once (Brown et al. 2020, section 2.4, arXiv 2005.14165;
Holtzman et al. 2021, arXiv 2104.08315, on the competition of surface forms).
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration import softmax
from evaluation_statistics import Interval, bootstrap_interval, mean_of, ratio_of, wilson
from text_metrics import exact_match, token_f1
from text_model import TextModel
from tiny_world import ATTRIBUTES, INSTRUCT, World, join, pick
from workbench import check_name, read_utf8, shown, write_atomically

KINDS = ("choice", "generate", "text")
CHOICE_SCORES = ("acc", "acc_token", "acc_char", "acc_byte", "acc_pmi")


def is_texts(values: Any) -> bool:
    """Whether these are texts, none of them empty; none at all will do."""
    return isinstance(values, list | tuple) and all(isinstance(value, str) and value for value in values)


@dataclass(frozen=True)
class Task:
    """Questions of one kind, and how they are asked."""

    task: str
    kind: str
    template: str = "{prompt}"  # filled with the fields of a question
    delimiter: str = " "  # between prompt and choice
    until: tuple[str, ...] = ()  # generate: what ends an answer besides the model's own end
    max_new_tokens: int = 32
    chat: bool = False  # generate: ask as a chat, by the model's own template
    source: str = ""  # where the questions come from
    questions: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_name("kind of task", self.kind, KINDS)
        for name in ("task", "template", "delimiter", "source"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r:.60}")
        until = [self.until] if isinstance(self.until, str) else self.until  # a text is not to be read as its letters
        if not is_texts(until):
            raise ValueError(f"until must be texts, none of them empty, got {self.until!r:.60}")
        object.__setattr__(self, "until", tuple(until))
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r:.60} must be a whole number, at least 1")
        if not self.questions:
            raise ValueError(f"task {self.task!r} has no questions; a score needs at least 1")
        for number, question in enumerate(self.questions, start=2):  # the lines of the file
            try:
                self.check(question)
            except ValueError as error:
                raise ValueError(f"task {self.task!r}, line {number}: {error}") from None

    def check(self, question: dict[str, Any]) -> None:
        """Raises ValueError for a question that cannot be asked or scored."""
        needed = {"choice": ("choices", "answer"), "generate": ("answer",), "text": ("text",)}[self.kind]
        missing = [name for name in needed if name not in question]
        if missing:
            raise ValueError(f"a question of kind {self.kind!r} needs {', '.join(missing)}")
        if not isinstance(question.get("group", ""), str | int):
            raise ValueError(f"group must be a number or a name, got {question['group']!r:.60}")
        if self.kind == "text" and not is_texts([question["text"]]):
            raise ValueError(f"text must be a text that is not empty, got {question['text']!r:.60}")
        if self.kind == "generate" and not isinstance(question["answer"], str):
            answers = question["answer"]
            if (
                not isinstance(answers, list | tuple)
                or not answers
                or not all(isinstance(right, str) for right in answers)
            ):
                raise ValueError(
                    f"answer must be a text, or a list of texts of which each is right, got {answers!r:.60}"
                )
        if self.kind == "choice":
            choices, answer = question["choices"], question["answer"]
            if not isinstance(choices, list) or len(choices) < 2 or not is_texts(choices):
                raise ValueError("choices must be at least 2 texts, none of them empty")
            if len(set(choices)) < len(choices):
                raise ValueError(f"choices must differ, got {choices}")
            if type(answer) is not int or not 0 <= answer < len(choices):
                raise ValueError(f"answer must be the number of a choice, 0 to {len(choices) - 1}, got {answer!r}")
        if self.kind != "text":
            self.prompt(question)

    def prompt(self, question: dict[str, Any]) -> str:
        try:
            return self.template.format(**question)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"the template {self.template!r} cannot be filled: {error!r}") from None

    def take(self, n: int) -> "Task":
        """The first n questions."""
        return replace(self, questions=self.questions[:n])


def write_task(task: Task, path: Path | str) -> None:
    """Write a task file."""
    header = {name: value for name, value in asdict(task).items() if name != "questions"}
    lines = [json.dumps(line, ensure_ascii=False) for line in (header, *task.questions)]
    write_atomically(Path(path), ("\n".join(lines) + "\n").encode())


def read_task(path: Path | str) -> Task:
    """Read a task file. Raises ValueError with the line of what is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such task file: {shown(path)}")
    rows, text = [], read_utf8(path).rstrip()
    for number, line in enumerate(text.split("\n") if text else (), start=1):  # splitlines() cuts inside a string too
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{shown(path)}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{shown(path)}:{number} must be a JSON object, got {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{shown(path)} is empty; its first line is the task")
    header, questions = rows[0], rows[1:]
    unknown = set(header) - (set(Task.__dataclass_fields__) - {"questions"})
    if unknown or not {"task", "kind"} <= set(header):
        raise ValueError(f"{shown(path)}:1 needs task and kind, and knows no {', '.join(sorted(unknown)) or 'others'}")
    try:
        return Task(**header, questions=tuple(questions))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown(path)}: {error}") from None


# Running a task


@dataclass(frozen=True)
class TaskResult:
    """Scores of every question, each a column; `groups` numbers the texts that questions share."""

    task: str
    columns: dict[str, list[float]]
    groups: list[int]
    samples: list[dict[str, Any]]  # what was asked and answered, with all numbers

    def table(self, level: float = 0.95) -> dict[str, tuple[float, Interval]]:
        """The mean of every column with its interval; "text" tasks: bits per byte and nats per token."""
        if "bytes" in self.columns:
            nats = np.asarray(self.columns["nats"])
            bits = nats / math.log(2)
            return {
                "bits_per_byte": self.ratio(bits, self.columns["bytes"], level),
                "nats_per_token": self.ratio(nats, self.columns["tokens"], level),
            }
        return {name: (float(np.mean(column)), self.interval(column, level)) for name, column in self.columns.items()}

    def ratio(self, above: Sequence[float], below: Sequence[float], level: float) -> tuple[float, Interval]:
        value = float(np.sum(above) / np.sum(below))
        if len(set(self.groups)) < 2:
            return value, Interval(-math.inf, math.inf)
        return value, bootstrap_interval(ratio_of(above, below), self.groups, level, "percentile")

    def interval(self, column: Sequence[float], level: float) -> Interval:
        """Wilson's where every question is right or wrong and stands alone; else a bootstrap of whole groups."""
        alone = len(set(self.groups)) == len(self.groups)
        if alone and set(column) <= {0.0, 1.0}:
            return wilson(int(sum(column)), len(column), level)
        if len(set(self.groups)) < 2:
            return Interval(-math.inf, math.inf)
        if len(set(column)) == 1:
            return Interval(column[0], column[0])
        return bootstrap_interval(mean_of(column), self.groups, level, "percentile")


def run_task(examined: TextModel, task: Task) -> TaskResult:
    """Ask a model all questions of a task; see `score_choice`, `score_answer` for what is measured."""
    columns, samples = {"choice": run_choice, "generate": run_generate, "text": run_text}[task.kind](examined, task)
    given = [question.get("group", f"alone {number}") for number, question in enumerate(task.questions)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(given))}
    return TaskResult(task.task, columns, [numbers[name] for name in given], samples)


def score_choice(nats: Sequence[float], bare: Sequence[float], n_tokens: Sequence[int], choices: Sequence[str]) -> dict:
    """Which choice wins, by five scores of the log likelihood; all are to be largest.

    raw: log p(choice | prompt); token, char, byte: the same over the length, which takes the advantage from short
    choices; pmi: log p(choice | prompt) - log p(choice), which takes it from choices that are likely anywhere.
    """
    logs, without = -np.asarray(nats), -np.asarray(bare)
    lengths = {
        "acc_token": n_tokens,
        "acc_char": [len(choice) for choice in choices],
        "acc_byte": [len(choice.encode()) for choice in choices],
    }
    scores = {"acc": logs} | {name: logs / np.asarray(length, float) for name, length in lengths.items()}
    return {name: int(np.argmax(score)) for name, score in (scores | {"acc_pmi": logs - without}).items()}


def run_choice(examined: TextModel, task: Task) -> tuple[dict[str, list[float]], list[dict]]:
    """Every choice after its prompt, and after nothing; two questions to the model for each choice."""
    pairs, empty = [], []
    for question in task.questions:
        prompt = task.prompt(question)
        pairs += [(prompt, task.delimiter + choice) for choice in question["choices"]]
        empty += [("", task.delimiter + choice) for choice in question["choices"]]
    found, distinct = examined.likelihoods(pairs), list(dict.fromkeys(empty))
    bare = dict(zip(distinct, examined.likelihoods(distinct), strict=True))
    columns: dict[str, list[float]] = {name: [] for name in CHOICE_SCORES}
    samples, start = [], 0
    for question in task.questions:
        choices, answer = question["choices"], question["answer"]
        own = found[start : start + len(choices)]
        alone = [bare[pair].nats for pair in empty[start : start + len(choices)]]
        nats = [each.nats for each in own]
        won = score_choice(nats, alone, [each.n_tokens for each in own], choices)
        for name, place in won.items():
            columns[name].append(float(place == answer))
        chances = softmax(-np.array([nats]))[0].tolist()
        sample = {"prompt": pairs[start][0], "choices": choices, "answer": answer, "nats": nats, "bare": alone}
        samples.append(sample | {"chances": chances, "won": won, "greedy": [each.greedy for each in own]})
        start += len(choices)
    return columns, samples


def run_generate(examined: TextModel, task: Task) -> tuple[dict[str, list[float]], list[dict]]:
    """What the model writes, beside the right answers: exact match (strict, and normalised) and F1 of words."""
    prompts = [task.prompt(question) for question in task.questions]
    made = examined.complete(prompts, task.until, task.max_new_tokens, task.chat)
    columns: dict[str, list[float]] = {"exact_match": [], "exact_match_normalised": [], "f1": []}
    samples = []
    for prompt, question, text in zip(prompts, task.questions, made, strict=True):
        answers = [question["answer"]] if isinstance(question["answer"], str) else list(question["answer"])
        columns["exact_match"].append(float(text.strip() in [answer.strip() for answer in answers]))
        columns["exact_match_normalised"].append(float(exact_match(text, answers)))
        columns["f1"].append(token_f1(text, answers))
        samples.append({"prompt": prompt, "answer": answers, "made": text})
    return columns, samples


def run_text(examined: TextModel, task: Task) -> tuple[dict[str, list[float]], list[dict]]:
    """What the texts cost, each from its first token on, in windows side by side where it is long."""
    scores = [examined.rolling(question["text"]) for question in task.questions]
    columns = {
        "nats": [score.nats for score in scores],
        "tokens": [float(score.n_tokens) for score in scores],
        "bytes": [float(score.n_bytes) for score in scores],
    }
    return columns, [{"text": question["text"]} for question in task.questions]


# Tasks about the world


def other_values(world: World, rng: random.Random, name: str, right: str, n: int) -> list[str]:
    values = [value for value in world.words[ATTRIBUTES[name].word_class] if value != right]
    rng.shuffle(values)
    return values[:n]


def fact_choices(world: World, rng: random.Random, people: Sequence[str]) -> dict[str, Any]:
    """A fact of one of these people: a direct question, the beginning of a sentence, and four values."""
    person, name = pick(rng, people), pick(rng, tuple(ATTRIBUTES))
    right, (start, end) = world.facts[person][name], ATTRIBUTES[name].question
    choices = [right, *other_values(world, rng, name, right, 3)]
    rng.shuffle(choices)
    return {
        "question": join(f"{start} {person} {end}".split()),
        "person": person,
        "opening": f"{person}. {world.pronoun(person).capitalize()}",
        "verb": ATTRIBUTES[name].verb,
        "choices": choices,
        "answer": choices.index(right),
    }


def story_answers(world: World, rng: random.Random, n: int, kind: str) -> list[dict[str, Any]]:
    """All questions of documents of a kind, each with the text up to its answer; one document is one group."""
    found: list[dict[str, Any]] = []
    group = 0
    while len(found) < n:
        document = world.document(rng, kind)
        for start, end in document.answers:
            prompt, answer = join(document.tokens[:start]), join(document.tokens[start:end])
            found.append({"prompt": prompt, "answer": answer, "group": group})
        group += 1
    return found[:n]


def sum_questions(rng: random.Random, pairs: Sequence[tuple[int, int]], n: int) -> list[dict[str, Any]]:
    drawn = (pick(rng, pairs) for _ in range(n))
    return [{"prompt": f"Sum: {one} + {two} =", "answer": str(one + two)} for one, two in drawn]


def instruction_questions(world: World, seed: int, n: int, category: str) -> list[dict[str, Any]]:
    """Held-out instructions with their one right answer."""
    drawn = world.instructions(n, seed, "content", category)
    return [{"prompt": join(item.prompt), "answer": join(item.answer[:-1])} for item in drawn]


QUIZ = "Question: {question} Answer:"
WORLD_TASKS: dict[str, str] = {
    "facts": "facts that quizzes ask about, four choices",
    "facts-told": "facts that are told and never asked, four choices",
    "cloze": "the same facts as the end of a biography's sentence",
    "sums": "sums that training has, to be written",
    "new-sums": "sums that training never had",
    **{kind: f"all questions of {kind} documents, to be written" for kind in ("story", "scene", "news")},
    "held-out": "documents of the validation side, in bits per byte",
    **{f"ask-{name}": f"instructions of the category {name!r}, as a chat" for name in INSTRUCT if name != "story"},
}


def world_task(name: str, n: int, seed: int, world: World | None = None) -> Task:
    """One of WORLD_TASKS with n questions. Stories to be told have no one right answer and are left out."""
    check_name("task", name, WORLD_TASKS)
    world, rng = world or World(), random.Random(seed)
    options: dict[str, Any] = {"source": f"TinyWorld, {WORLD_TASKS[name]}, seed {seed}"}
    if name in ("facts", "facts-told", "cloze"):
        people = world.unasked if name == "facts-told" else world.asked
        questions = [fact_choices(world, rng, people) for _ in range(n)]
        template = "Meet {opening} {verb}" if name == "cloze" else QUIZ
        return Task(name, "choice", template, questions=tuple(questions), **options)
    if name == "held-out":
        texts = [
            {"text": document.text, "surprisal": sum(document.surprisal[:-1])}  # nats, of all that the text shows
            for document in world.documents(n, seed, "validation")
        ]
        return Task(name, "text", questions=tuple(texts), **options)
    if name.startswith("ask-"):
        asked = instruction_questions(world, seed, n, name.removeprefix("ask-"))
        return Task(name, "generate", chat=True, questions=tuple(asked), **options)
    if name in ("sums", "new-sums"):
        written = sum_questions(rng, world.held_out_sums if name == "new-sums" else world.sums, n)
        return Task(name, "generate", until=(".",), max_new_tokens=6, questions=tuple(written), **options)
    questions = story_answers(world, rng, n, name)
    return Task(name, "generate", until=(".",), max_new_tokens=16, questions=tuple(questions), **options)


# The same questions in other words


FORMATS: dict[str, tuple[str, str]] = {  # name -> template, delimiter; the first is the one that training has
    "quiz": (QUIZ, " "),
    "no space": (QUIZ + " ", ""),
    "two lines": ("Question: {question}\nAnswer:", " "),
    "letters": ("Q: {question} A:", " "),
    "question alone": ("{question}", " "),
    "capitals": ("QUESTION: {question} ANSWER:", " "),
    "biography": ("Meet {opening} {verb}", " "),
    "news": ("News: {opening} {verb}", " "),
    "a request": ("Please answer. {question} The answer is", " "),
}


def in_format(task: Task, name: str) -> Task:
    """The questions of a task about facts in one of FORMATS."""
    template, delimiter = FORMATS[check_name("format", name, FORMATS)]
    return replace(task, task=f"{task.task}, {name}", template=template, delimiter=delimiter)


def with_examples(task: Task, examples: Sequence[dict[str, Any]], between: str = "\n\n") -> Task:
    """The task with answered questions before each prompt. Raises ValueError for an example that is asked too."""
    asked = {task.prompt(question) for question in task.questions}
    shown_first = []
    for example in examples:
        prompt = task.prompt(example)
        if prompt in asked:
            raise ValueError(f"the example {prompt!r} is one of the questions; it would give its answer away")
        answer = example["choices"][example["answer"]] if task.kind == "choice" else example["answer"]
        answer = answer if isinstance(answer, str) else answer[0]  # of several right ones the first
        shown_first.append(f"{prompt}{task.delimiter}{answer}")
    before = "".join(text + between for text in shown_first)
    return replace(task, template=before.replace("{", "{{").replace("}", "}}") + task.template)
