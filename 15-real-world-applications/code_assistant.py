"""Topic 15 - Code assistant: ask for a function in a sentence, see it written, run and judged.

python 15-real-world-applications/real_world_applications.py code keep the even numbers, then add them up
python 15-real-world-applications/real_world_applications.py code reverse it --takes text --example "'abc' gives 'cba'"
python 15-real-world-applications/real_world_applications.py code ... --base-url http://127.0.0.1:8000

Several programs are written. With examples, the first that gives what they say is shown, and if none does, one more is
written for each from its own failure. Without examples the programs vote: the largest group that agrees on drawn inputs
is shown (Li et al. 2022, AlphaCode, arXiv 2203.07814, section 4.6). Nothing is run outside of the sandbox.
"""

import ast
import contextlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from chat_endpoint import open_endpoint
from code_model import FOLDER, LIMITS, load_code_model
from code_tasks import NAMES, Case, draw_input, prompt_of, repair_prompt
from sandbox import Outcome, Program, Sandbox, SetupFailed, Submission, find_sandbox, judge, printable
from workbench import RunConfig, check_range

ASK = "Complete this Python function. Answer with the whole function and nothing else.\n\n"
LONGEST_ANSWER = 400  # tokens of a server's answer


@dataclass(frozen=True)
class CodeConfig:
    """What is wanted, and of whom."""

    words: tuple[str, ...] = ()  # what the function is to do
    takes: Literal["ints", "int", "text", "words"] = "ints"  # its argument: numbers, a number, a text, or words
    example: str = ""  # what it gives, as "[1, 2, 4] gives 6"; several with semicolons between
    n_samples: int = 5  # programs to write
    temperature: float = 0.8  # of all but the first, which is greedy
    checkpoint: Path = FOLDER  # folder of the model that writes
    base_url: str = ""  # address of a server of OpenAI's API that writes instead
    model: str = ""  # the server's name of its model
    i_accept_unsafe: bool = False  # run programs even where no sandbox can be built

    def __post_init__(self) -> None:
        check_range(self, "n_samples", least=1)
        check_range(self, "temperature", least=0)
        if not " ".join(self.words).strip():
            raise ValueError("words say nothing; say what the function is to do, such as: code add them up")
        self.cases()

    @property
    def prompt(self) -> str:
        """The signature with the sentence: capital letter, full stop."""
        sentence = " ".join(" ".join(self.words).split()).rstrip(".").replace('"""', "'''")
        return prompt_of(NAMES[self.takes], f"{sentence[0].upper()}{sentence[1:]}.")

    def cases(self) -> list[Case]:
        """The examples as cases. Raises ValueError for one that cannot be read."""
        found = []
        for text in filter(str.strip, self.example.split(";")):
            given, word, wanted = text.partition(" gives ")
            try:
                found.append(Case([ast.literal_eval(given.strip())], ast.literal_eval(wanted.strip())))
            except (ValueError, SyntaxError):
                raise ValueError(f"example {text.strip()!r} cannot be read; write it as: [1, 2, 4] gives 6") from None
        return found


class Written(NamedTuple):
    """A program with what it said in the sandbox."""

    source: str
    note: str
    outcome: Outcome


def code_in(answer: str, prompt: str) -> str:
    """The program in a server's answer: a fenced block if there is one; a bare body gets the signature before it."""
    fenced = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    text = fenced[1] if fenced else answer
    return text if re.search(r"^def f\(", text, re.MULTILINE) else prompt + text


def write_programs(config: CodeConfig, prompt: str, seed: int) -> list[str]:
    """n_samples programs for a prompt, by the local model or by the server; some may be the same."""
    if config.base_url:
        endpoint = open_endpoint(config.base_url, config.model or None)
        try:
            asked = [[{"role": "user", "content": ASK + prompt}]] * config.n_samples
            replies = endpoint.chat_all(asked, max_tokens=LONGEST_ANSWER, temperature=config.temperature)
        finally:
            endpoint.close()
        return [code_in(reply.text, prompt) for reply in replies]
    code = load_code_model(config.checkpoint)
    bodies, n_more = code.write([prompt])[0], config.n_samples - 1
    if n_more and config.temperature:
        bodies += code.write([prompt], n_more, config.temperature, seed)[0]
    start = prompt.rindex("def f(")  # a repair's prompt begins with the first attempt
    return [prompt[start:] + body for body in bodies]


def by_vote(programs: Sequence[str], config: CodeConfig, seed: int, sandbox: Sandbox) -> Written:
    """The first program of the largest group that returns the same on drawn inputs without failing."""
    rng = random.Random(seed)
    calls = [[draw_input(config.takes, rng)] for _ in range(3)]
    outcomes = sandbox.run([Program(source, "f", calls) for source in programs], LIMITS)
    groups: dict[str, list[int]] = {}
    for place, outcome in enumerate(outcomes):
        lines = outcome.results.split("\n")[:-1]
        if outcome.status == "ok" and len(lines) == len(calls) and all(line.startswith('["ok", ') for line in lines):
            groups.setdefault(outcome.results, []).append(place)
    if not groups:
        return Written(programs[0], "no program ran to its end", outcomes[0])
    group = max(groups.values(), key=len)
    results = outcomes[group[0]].results.split("\n")[:-1]
    shown = [f"f({call[0]!r}) gives {printable(line[7:-1])}" for call, line in zip(calls, results, strict=True)]
    note = f"{len(group)} of {len(programs)} programs agree; " + "; ".join(shown)
    return Written(programs[group[0]], note, outcomes[group[0]])


def by_examples(programs: Sequence[str], config: CodeConfig, seed: int, sandbox: Sandbox) -> Written:
    """The first program that gives what the examples say; if none does, the local model repairs each once."""
    cases, tried = config.cases(), list(dict.fromkeys(programs))
    verdicts = judge([Submission(source, "f", cases) for source in tried], LIMITS, sandbox)
    if not any(verdict.passed for verdict in verdicts) and not config.base_url:
        for source, verdict in list(zip(tried, verdicts, strict=True)):
            body = source.removeprefix(config.prompt)
            prompt = repair_prompt(config.prompt, body, cases[max(0, verdict.failed_case)], verdict.failure)
            with contextlib.suppress(ValueError):  # a failure too long to be read is not repaired
                tried += write_programs(config, prompt, seed)[:1]
        verdicts += judge([Submission(source, "f", cases) for source in tried[len(verdicts) :]], LIMITS, sandbox)
    place = next((place for place, verdict in enumerate(verdicts) if verdict.passed), 0)
    verdict = verdicts[place]
    note = f"program {place + 1} of {len(tried)} gives what the {len(cases)} examples say"
    if not verdict.passed:
        note = f"none of {len(tried)} programs gives what the examples say; the first gives {verdict.failure}"
    return Written(tried[place], note, verdict.outcome)


def assist(config: CodeConfig, seed: int) -> Written:
    """Write, run, choose. Raises ValueError where nothing can be run safely."""
    sandbox = find_sandbox(config.i_accept_unsafe)
    programs = write_programs(config, config.prompt, seed)
    return (by_examples if config.example.strip() else by_vote)(programs, config, seed, sandbox)


def code(config: CodeConfig, run: RunConfig) -> None:
    """Write a function for a sentence, run it in the sandbox, and show it with its verdict."""
    try:
        written = assist(config, run.seed)
    except SetupFailed as error:
        raise ValueError(f"the sandbox could not be built, nothing was run: {error}") from None
    print(printable(written.source.rstrip(), "\n\t"))
    print(f"# {written.note}")
    print(f"# {written.outcome.status} in {written.outcome.seconds:.2f} s, {written.outcome.peak_mib:.0f} MiB")
