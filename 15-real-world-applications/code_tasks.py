"""Topic 15 - Code tasks: small functions to write, each with a sentence that asks for it and hidden tests.

    [task] = draw_tasks(1, seed=0, split="validation", lengths=(3,))
    print(task.prompt + task.body)                # a signature with a docstring, and the reference's lines
    task.public, task.hidden                      # cases: arguments and the value that is right for them

A task is a chain of one to three operations on numbers, lists, texts and words, in the manner of HumanEval (Chen et al.
2021, arXiv 2107.03374): signature and docstring are given, the body is wanted. Which pairs of neighbouring operations
are held out is decided by content, as everywhere in this course: a chain that holds one of them is never trained on.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from python_text import check_split
from tiny_world import held_out
from workbench import check_name

NAMES = {"ints": "xs", "int": "n", "text": "s", "words": "ws"}  # of the variable of each type
HELD_OUT_SHARE = 0.2  # of the pairs of neighbours
VOWELS = "aeiou"


class Operation(NamedTuple):
    """One step: types, wordings with {k} for a constant, and the expression, in which the variable has its name."""

    name: str
    takes: str
    gives: str
    wordings: tuple[str, ...]
    code: str
    constants: tuple[int, ...] = ()


def operation(name: str, kinds: str, wordings: str, code: str, constants: Sequence[int] = ()) -> Operation:
    takes, gives = kinds.split(">")
    return Operation(name, takes, gives, tuple(wordings.split("|")), code, tuple(constants))


SMALL = range(2, 10)
OPERATIONS = {
    made.name: made
    for made in (
        operation("even", "ints>ints", "keep the even numbers|drop the odd numbers", "[x for x in xs if x % 2 == 0]"),
        operation("odd", "ints>ints", "keep the odd numbers|drop the even numbers", "[x for x in xs if x % 2 == 1]"),
        operation("above", "ints>ints", "keep the numbers above {k}", "[x for x in xs if x > {k}]", range(0, 10)),
        operation("below", "ints>ints", "keep the numbers below {k}", "[x for x in xs if x < {k}]", range(0, 10)),
        operation("without", "ints>ints", "remove every {k}", "[x for x in xs if x != {k}]", SMALL),
        operation("raised", "ints>ints", "add {k} to each|raise each by {k}", "[x + {k} for x in xs]", SMALL),
        operation("lowered", "ints>ints", "subtract {k} from each", "[x - {k} for x in xs]", SMALL),
        operation("scaled", "ints>ints", "multiply each by {k}", "[x * {k} for x in xs]", SMALL),
        operation("halved", "ints>ints", "halve each, rounding down", "[x // 2 for x in xs]"),
        operation("squared", "ints>ints", "square each", "[x * x for x in xs]"),
        operation("negated", "ints>ints", "change the sign of each|negate each", "[-x for x in xs]"),
        operation("sizes", "ints>ints", "take the absolute value of each", "[abs(x) for x in xs]"),
        operation("rests", "ints>ints", "take each modulo {k}", "[x % {k} for x in xs]", SMALL),
        operation("capped", "ints>ints", "cap each at {k}", "[min(x, {k}) for x in xs]", SMALL),
        operation("raised-to", "ints>ints", "raise those below {k} to {k}", "[max(x, {k}) for x in xs]", SMALL),
        operation("sorted", "ints>ints", "sort them|put them in rising order", "sorted(xs)"),
        operation("falling", "ints>ints", "put them in falling order", "sorted(xs, reverse=True)"),
        operation("reversed", "ints>ints", "reverse their order", "xs[::-1]"),
        operation("first", "ints>ints", "take the first {k}|keep only the first {k}", "xs[:{k}]", range(2, 6)),
        operation("last", "ints>ints", "take the last {k}", "xs[-{k}:]", range(2, 6)),
        operation("skip", "ints>ints", "skip the first {k}|leave out the first {k}", "xs[{k}:]", range(1, 5)),
        operation("second", "ints>ints", "take every second one", "xs[::2]"),
        operation("once", "ints>ints", "drop repeated numbers", "list(dict.fromkeys(xs))"),
        operation("gaps", "ints>ints", "take the differences of neighbours", "[b - a for a, b in zip(xs, xs[1:])]"),
        operation("sum", "ints>int", "add them up|take their sum", "sum(xs)"),
        operation("count", "ints>int", "count them", "len(xs)"),
        operation("largest", "ints>int", "take the largest, or 0", "max(xs, default=0)"),
        operation("smallest", "ints>int", "take the smallest, or 0", "min(xs, default=0)"),
        operation("times", "ints>int", "count how often {k} occurs", "xs.count({k})", SMALL),
        operation("plus", "int>int", "add {k}", "n + {k}", SMALL),
        operation("minus", "int>int", "subtract {k}", "n - {k}", SMALL),
        operation("by", "int>int", "multiply by {k}", "n * {k}", SMALL),
        operation("square", "int>int", "square it", "n * n"),
        operation("size", "int>int", "take the absolute value", "abs(n)"),
        operation("rest", "int>int", "take it modulo {k}", "n % {k}", SMALL),
        operation("digits", "int>int", "add up its digits", "sum(int(d) for d in str(abs(n)))"),
        operation("written", "int>text", "write it as text", "str(n)"),
        operation("upper", "text>text", "put it in capitals|write it in capitals", "s.upper()"),
        operation("swapped", "text>text", "swap small letters and capitals", "s.swapcase()"),
        operation("backwards", "text>text", "reverse it|read it backwards", "s[::-1]"),
        operation("joined", "text>text", "remove the spaces", 's.replace(" ", "")'),
        operation("dashed", "text>text", "put dashes for spaces", 's.replace(" ", "-")'),
        operation("bare", "text>text", "remove the vowels", '"".join(c for c in s if c not in "aeiou")'),
        operation("letters", "text>text", "keep the letters", '"".join(c for c in s if c.isalpha())'),
        operation("start", "text>text", "keep its first {k} characters", "s[:{k}]", range(3, 9)),
        operation("end", "text>text", "keep its last {k} characters", "s[-{k}:]", range(3, 9)),
        operation("twice", "text>text", "write it twice", "s * 2"),
        operation("length", "text>int", "take its length", "len(s)"),
        operation("vowels", "text>int", "count its vowels", 'sum(c in "aeiou" for c in s)'),
        operation("spaces", "text>int", "count its spaces", 's.count(" ")'),
        operation("split", "text>words", "split it into words|take its words", "s.split()"),
        operation("alphabet", "words>words", "put the words in alphabetical order", "sorted(ws)"),
        operation("turned", "words>words", "reverse the order of the words", "ws[::-1]"),
        operation(
            "long", "words>words", "keep words of over {k} letters", "[w for w in ws if len(w) > {k}]", (2, 3, 4)
        ),
        operation("capitals", "words>words", "put each word in capitals", "[w.upper() for w in ws]"),
        operation("mirrored", "words>words", "reverse each word", "[w[::-1] for w in ws]"),
        operation("initials", "words>words", "take the first letter of each word", "[w[0] for w in ws]"),
        operation("lengths", "words>ints", "take the length of each word", "[len(w) for w in ws]"),
        operation("line", "words>text", "join the words with spaces", '" ".join(ws)'),
        operation("list", "words>text", "join the words with commas", '",".join(ws)'),
        operation("longest", "words>text", "take the longest word", 'max(ws, key=len, default="")'),
        operation("how-many", "words>int", "count the words", "len(ws)"),
    )
}


class Step(NamedTuple):
    """An operation with its constant and the wording that was chosen."""

    name: str
    constant: int
    wording: int

    @property
    def phrase(self) -> str:
        return OPERATIONS[self.name].wordings[self.wording].replace("{k}", str(self.constant))

    @property
    def code(self) -> str:
        return OPERATIONS[self.name].code.replace("{k}", str(self.constant))


class Case(NamedTuple):
    """Arguments of a call, and what the reference returns."""

    arguments: list
    expected: Any


class CodeTask(NamedTuple):
    """A function to write: `prompt` is given, a body is wanted, `hidden` decides. The reference's body passes."""

    steps: tuple[Step, ...]
    public: tuple[Case, ...]
    hidden: tuple[Case, ...]

    @property
    def takes(self) -> str:
        return OPERATIONS[self.steps[0].name].takes

    @property
    def statement(self) -> str:
        phrases = ", then ".join(step.phrase for step in self.steps)
        return f"{phrases[0].upper()}{phrases[1:]}."

    @property
    def prompt(self) -> str:
        return prompt_of(NAMES[self.takes], self.statement)

    @property
    def body(self) -> str:
        return body_of(self.steps)


def prompt_of(argument: str, statement: str) -> str:
    """The signature and the docstring that a body is to follow."""
    return f'def f({argument}):\n    """{statement}"""\n'


def body_of(steps: Sequence[Step]) -> str:
    """One line for each step; the last one returns."""
    lines = [f"    {NAMES[OPERATIONS[step.name].gives]} = {step.code}" for step in steps[:-1]]
    return "\n".join([*lines, f"    return {steps[-1].code}"]) + "\n"


# What is held out


def is_held_out(names: Sequence[str]) -> bool:
    """Whether a chain of operations holds a pair of neighbours that training never shows."""
    return any(held_out(f"{one} then {two}", HELD_OUT_SHARE) for one, two in zip(names, names[1:], strict=False))


@functools.cache
def chains(length: int, split: str) -> tuple[tuple[str, ...], ...]:
    """All chains of so many operations on one side of the split, without one operation twice in a row.

    A chain of one operation has no pair of neighbours: all are on the training side. Raises ValueError for an unknown
    split or a length outside 1 to 3.
    """
    check_split(split)
    if length not in (1, 2, 3):
        raise ValueError(f"a task has 1, 2 or 3 operations, not {length}")
    found: list[tuple[str, ...]] = [(name,) for name in OPERATIONS]
    for _ in range(length - 1):
        found = [
            (*chain, name)
            for chain in found
            for name, made in OPERATIONS.items()
            if made.takes == OPERATIONS[chain[-1]].gives and name != chain[-1]
        ]
    return tuple(chain for chain in found if is_held_out(chain) == (split == "validation"))


# Drawing


def draw_input(kind: str, rng: random.Random) -> Any:
    """A random argument of a type: short, with repetitions, signs and spaces, so that every operation has work."""
    if kind == "int":
        return rng.randint(-60, 60)
    if kind == "ints":
        return [rng.randint(-6, 14) for _ in range(rng.randint(4, 9))]
    words = ["".join(rng.choice(VOWELS * 2 + "bdklmnrstBT") for _ in range(rng.randint(1, 7))) for _ in range(3)]
    words += rng.sample(words, rng.randint(0, 2))
    return words if kind == "words" else " ".join(words)


EMPTY = {"ints": [], "int": 0, "text": "", "words": []}


def evaluate(steps: Sequence[Step], value: Any) -> Any:
    """What the reference returns. The expressions are those of OPERATIONS, never a model's."""
    for step in steps:
        value = eval(compiled(step.code), {NAMES[OPERATIONS[step.name].takes]: value})
    return value


@functools.cache
def compiled(code: str) -> Any:
    return compile(code, "<operation>", "eval")


def every_step_counts(steps: Sequence[Step], inputs: Sequence[Any]) -> bool:
    """Whether leaving out a step, where types allow it, changes what some input gives: tests must see every step."""
    right = [evaluate(steps, value) for value in inputs]
    if all(value == right[0] for value in right):
        return False  # a constant would pass
    for place, step in enumerate(steps):
        if OPERATIONS[step.name].takes == OPERATIONS[step.name].gives:
            fewer = [*steps[:place], *steps[place + 1 :]]
            if [evaluate(fewer, value) for value in inputs] == right:
                return False
    return True


def make_task(names: Sequence[str], rng: random.Random, n_public: int = 2, n_hidden: int = 8) -> CodeTask | None:
    """A task of these operations with drawn constants, wordings and inputs; None where the tests would miss a step."""
    steps = tuple(
        Step(name, rng.choice(OPERATIONS[name].constants or (0,)), rng.randrange(len(OPERATIONS[name].wordings)))
        for name in names
    )
    kind = OPERATIONS[names[0]].takes
    inputs = [EMPTY[kind], *(draw_input(kind, rng) for _ in range(n_public + n_hidden - 1))]
    if not every_step_counts(steps, inputs[:n_hidden]):
        return None
    cases = tuple(Case([value], evaluate(steps, value)) for value in inputs)
    return CodeTask(steps, cases[n_hidden:], cases[:n_hidden])


def draw_tasks(n: int, seed: int, split: str = "train", lengths: Sequence[int] = (1, 2, 3)) -> list[CodeTask]:
    """n tasks with chains of these lengths, in equal parts; a pure function of the arguments.

    Raises ValueError for held-out tasks of one operation: none is held out.
    """
    if split == "validation" and 1 in lengths:
        raise ValueError("no task of 1 operation is held out; ask for lengths 2 and 3")
    known = {length: chains(length, split) for length in lengths}
    rng, found = random.Random(f"{split} {seed} {tuple(lengths)}"), []
    while len(found) < n:
        task = make_task(rng.choice(known[lengths[len(found) % len(lengths)]]), rng)
        found += [task] if task else []
    return found


# Mistakes, to learn repair from


def slipped(task: CodeTask, rng: random.Random) -> tuple[Step, ...]:
    """The reference with one slip: a step left out, another constant, or another operation of the same types."""
    steps = list(task.steps)
    place = rng.randrange(len(steps))
    step = steps[place]
    made = OPERATIONS[step.name]
    kinds = ["other"]
    kinds += ["constant"] if len(made.constants) > 1 else []
    kinds += ["left out"] if made.takes == made.gives and len(steps) > 1 else []
    kind = rng.choice(kinds)
    if kind == "left out":
        return tuple(steps[:place] + steps[place + 1 :])
    if kind == "constant":
        steps[place] = step._replace(constant=rng.choice([k for k in made.constants if k != step.constant]))
        return tuple(steps)
    alike = [
        other.name
        for other in OPERATIONS.values()
        if (other.takes, other.gives) == (made.takes, made.gives) and other.name != step.name
    ]
    if not alike:
        return tuple(steps)
    name = rng.choice(alike)
    steps[place] = Step(name, rng.choice(OPERATIONS[name].constants or (0,)), 0)
    return tuple(steps)


def first_wrong(steps: Sequence[Step], cases: Sequence[Case]) -> tuple[Case, Any] | None:
    """The first case that these steps get wrong, with what they return; None if they get all right."""
    for case in cases:
        got = evaluate(steps, case.arguments[0])
        if got != case.expected:
            return case, got
    return None


def feedback(case: Case, got: str) -> str:
    """What a failed attempt is told, as a comment: the call, what came, what was wanted."""
    call = ", ".join(map(repr, case.arguments))
    return f"# f({call}) gives {got}, not {case.expected!r}\n"


def repair_prompt(prompt: str, body: str, case: Case, got: str) -> str:
    """The prompt of a second attempt: the first with its body, what was wrong, and the signature once more."""
    return prompt + body + feedback(case, got) + prompt


def repairs(tasks: Sequence[CodeTask], seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, body) pairs in which a slip, shown with its failure on a public case, is put right."""
    rng = random.Random(seed)
    for task in tasks:
        wrong = slipped(task, rng)
        seen = first_wrong(wrong, task.public)
        if seen:
            yield repair_prompt(task.prompt, body_of(wrong), seen[0], repr(seen[1])), task.body


def kinds_of(names: Sequence[str]) -> list[Operation]:
    """The operations of these names. Raises ValueError for an unknown one, with the nearest."""
    return [OPERATIONS[check_name("operation", name, OPERATIONS)] for name in names]
