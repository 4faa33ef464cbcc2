"""Topic 15 - Agent tasks: questions that need one to four calls, with their one right answer, and who can answer them.

    village = Village(seed=1)                                   # friends and belongings of the world's people
    task = draw_task(village, random.Random(0), "together")     # AgentTask(question, answer, n_calls)
    Agent(Oracle(), village_tools(village)).run(task.question)  # the upper bound
    model, tokenizer = load_agent_model(folder)                 # the chat model with an adapter of `agent-train`

No model was told who is whose friend, so that guessing does not help: with 64 people a guess at a friend is right once
in 63. Questions of one kind look alike, and the number of calls that each kind needs is exact.
"""

import datetime
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from agent_loop import (
    Agent,
    AgentLimits,
    AgentRun,
    AgentStep,
    EndpointPolicy,
    Turn,
    messages_of,
    run_together,
    turn_schema,
    write_turn,
)
from chat_endpoint import LocalEndpoint
from chat_model import load_chat_model
from chat_tools import NAME, TOOLS, Tool, course_world, object_of
from course_model import command_line
from course_tokenizer import Chat, CourseTokenizer
from fine_tuning_adaptation import DialogueBatches, answer_loss, replay_documents
from low_rank_adapters import ADAPTER_WEIGHTS, LoraConfig, add_adapters, fold, load_adapter, save_adapter, train_rows
from modern_llm_architectures import CausalLM
from served_model import CourseServing, ServedModel
from serving_engine import EngineConfig
from tiny_world import ATTRIBUTES, join, pick
from training_transformers import TrainConfig, fit
from workbench import (
    RunConfig,
    alone,
    announce,
    check_range,
    describe_machine,
    seed_everything,
    shown,
    write_atomically,
)

ADAPTER = Path(__file__).parent / "agent_adapter"
BASE = "11-fine-tuning-adaptation/model"
REPORT = "report.json"
EXAM_VILLAGE, EXAM_TASKS, EXAM_SEED = 7, 50, 7
MOST_GOODS = 20  # of a kind that one person has
LONGEST = 400  # positions of a row of training
N_VILLAGES = 100  # that a policy learns in


class Village:
    """What is true besides TinyWorld's facts: everybody has one friend, and some goods of each kind.

    Friendship goes round in circles and is not mutual; nobody is their own friend.
    """

    def __init__(self, seed: int = 0) -> None:
        rng, world = random.Random(seed), course_world()
        self.seed, self.people = seed, world.known
        order = sorted(self.people, key=lambda person: rng.random())
        self.friends = dict(zip(order, [*order[1:], order[0]], strict=True))
        self.goods = world.words["goods"]
        self.counts = {
            person: {good: int(rng.random() * MOST_GOODS) + 1 for good in self.goods} for person in self.people
        }

    def friend_of(self, person: str) -> str:
        """Raises ValueError for a person who does not live here; so does count_of."""
        return f"The friend of {person} is {self.friends[self.known(person)]}."

    def count_of(self, person: str, good: str) -> str:
        n = self.counts[self.known(person)][good]
        return f"{person} has {n} {good if n != 1 else good.removesuffix('s')}."

    def known(self, person: str) -> str:
        if person not in self.friends:
            raise ValueError(f"nothing is known of {person}")
        return person


def village_tools(village: Village) -> dict[str, Tool]:
    """The tools of an agent there: chat_tools' calculator and look_up, and what only the village knows."""
    person = {"type": "string", "pattern": NAME}
    own = (
        Tool("friend_of", "Says who a person's friend is.", object_of(person=person), village.friend_of),
        Tool(
            "count_of",
            "Says how many goods of a kind a person has.",
            object_of(person=person, good={"enum": [*village.goods]}),
            village.count_of,
        ),
    )
    return {tool.name: tool for tool in (TOOLS["calculator"], TOOLS["look_up"], *own)}


# Tasks


@dataclass(frozen=True)
class AgentTask:
    """A question with its answer and the calls that it needs at least."""

    kind: str
    question: str
    answer: str
    n_calls: int

    def right(self, answer: str) -> bool:
        """Whether an answer is this one, up to capitals, a full stop and spaces at the ends."""
        return answer.strip().rstrip(".").lower() == self.answer.lower()


KINDS: dict[str, int] = {"fact": 1, "friend": 2, "together": 3, "friend-together": 4}  # kind -> calls


def draw_task(village: Village, rng: random.Random, kind: str) -> AgentTask:
    """A task of one of KINDS about people drawn at random."""
    one, other = rng.sample(village.people, 2)
    if kind in ("fact", "friend"):
        name = pick(rng, tuple(ATTRIBUTES))
        start, end = ATTRIBUTES[name].question
        asked = one if kind == "fact" else village.friends[one]
        who = one if kind == "fact" else f"the friend of {one}"
        question = join(f"{start.capitalize()} {who} {end}".split())
        return AgentTask(kind, question, course_world().facts[asked][name], KINDS[kind])
    good = pick(rng, village.goods)
    other = other if kind == "together" else village.friends[one]
    who = other if kind == "together" else f"the friend of {one}"
    total = village.counts[one][good] + village.counts[other][good]
    return AgentTask(kind, f"How many {good} do {one} and {who} have together?", str(total), KINDS[kind])


def draw_tasks(village: Village, n: int, seed: int) -> list[AgentTask]:
    """n tasks of each kind; the first of a kind are the same for every n."""
    rngs = {kind: random.Random(f"{kind} {seed}") for kind in KINDS}
    return [draw_task(village, rngs[kind], kind) for kind in KINDS for _ in range(n)]


# The oracle: what a perfect policy does, and what another learns from


PERSON = r"([A-Z]\w+ [A-Z]\w+)"
FACT = {
    name: re.compile(rf"{re.escape(start.capitalize())} (the friend of )?{PERSON} {re.escape(end.rstrip(' ?'))}\?")
    for name, (start, end) in ((name, attribute.question) for name, attribute in ATTRIBUTES.items())
}
TOGETHER = re.compile(rf"How many (\w+) do {PERSON} and (the friend of )?(?:{PERSON} )?(?:{PERSON} )?have together\?")


def call_of(tool: str, /, **arguments: str) -> dict[str, Any]:
    return {"name": tool, "arguments": arguments}


class Oracle:
    """Reads a question by patterns and the observations by theirs, and always knows the next step.

    thoughts: whether it says why. spaced: whether its texts begin with a blank, see `write_turn`.
    """

    def __init__(self, thoughts: bool = True, spaced: bool = False) -> None:
        self.thoughts, self.spaced = thoughts, spaced

    def turn(self, question: str, steps: Sequence[AgentStep], limits: AgentLimits) -> Turn:
        seen = [(step.observation.splitlines() or [""])[0] for step in steps]  # a result is one line
        thought, call, answer = self.act(question, seen)
        return Turn(write_turn(thought if self.thoughts else "", call, answer, self.spaced))

    def act(self, question: str, seen: Sequence[str]) -> tuple[str, dict[str, Any] | None, str]:
        """Thought, call and answer. Raises ValueError for a question that is not of this village."""
        friend = next((found[1] for text in seen if (found := re.search(rf" is {PERSON}\.$", text))), "")
        for name, pattern in FACT.items():
            if found := pattern.fullmatch(question):
                return self.fact(name, found[2], friend if found[1] else found[2], seen)
        found = TOGETHER.fullmatch(question)
        if not found:
            raise ValueError(f"no question of the village: {question[:80]!r}")
        good, one, other = found[1], found[2], friend if found[3] else found[4]
        return self.together(good, one, other, seen)

    def fact(self, name: str, start: str, person: str, seen: Sequence[str]) -> tuple[str, dict | None, str]:
        if not person:
            return f"I need the friend of {start}.", call_of("friend_of", person=start), ""
        told = f"{person} {ATTRIBUTES[name].verb} "
        value = next((text.removeprefix(told).rstrip(".") for text in seen if text.startswith(told)), "")
        if value:
            return f"The {name} is {value}.", None, value  # said once in the words of a text, then as the answer
        return f"I need the {name} of {person}.", call_of("look_up", person=person, property=name), ""

    def together(self, good: str, one: str, other: str, seen: Sequence[str]) -> tuple[str, dict | None, str]:
        if not other:
            return f"I need the friend of {one}.", call_of("friend_of", person=one), ""
        counts = []
        for person in (one, other):
            n = next((found[1] for text in seen if (found := re.match(rf"{person} has (\d+) ", text))), "")
            if not n:
                return f"I need the {good} of {person}.", call_of("count_of", person=person, good=good), ""
            counts.append(n)
        total = next((text for text in seen if text.isdigit()), "")
        if total:
            return f"The sum is {total}.", None, total
        expression = f"{counts[0]} + {counts[1]}"
        return f"I need {expression}.", call_of("calculator", expression=expression), ""


# A policy that is learned


@dataclass(frozen=True)
class AgentTrainConfig:
    """How the chat model is taught to act."""

    n_tasks: int = 2000  # tasks of each kind to learn from
    agent_steps: int = 1200  # optimizer steps
    agent_batch: int = 12  # traces and documents of a step
    agent_rate: float = 1e-2  # the peak learning rate
    agent_rank: int = 16  # of the low-rank updates
    replay: float = 0.1  # fraction of each batch that is pretraining documents
    thoughts: bool = True  # whether a turn says why
    spaced: bool = True  # whether texts begin with a blank, so that a copied name is the tokens that were read

    def __post_init__(self) -> None:
        check_range(self, "n_tasks", "agent_steps", "agent_batch", "agent_rank", least=1)
        check_range(self, "agent_rate", above=0)
        check_range(self, "replay", least=0, below=1)

    @property
    def training(self) -> TrainConfig:
        steps, warmup = self.agent_steps, min(40, self.agent_steps // 4)
        sizes = {"batch_size": self.agent_batch, "max_steps": steps, "warmup_steps": warmup}
        return TrainConfig(learning_rate=self.agent_rate, weight_decay=0.0, log_every=25, **sizes)


def trace_rows(tokenizer: CourseTokenizer, config: AgentTrainConfig, seed: int) -> list[Chat]:
    """The oracle's runs as conversations, in many villages, so that only observations tell who is whose friend."""
    rng, rows = random.Random(seed), []
    villages = [Village(1000 + number + N_VILLAGES * seed) for number in range(N_VILLAGES)]
    toolboxes = [village_tools(village) for village in villages]
    for number in range(config.n_tasks):
        village, tools = villages[number % N_VILLAGES], toolboxes[number % N_VILLAGES]
        for kind in KINDS:
            task = draw_task(village, rng, kind)
            run = Agent(Oracle(config.thoughts, config.spaced), tools).run(task.question)
            if not task.right(run.answer):
                raise ValueError(f"the oracle fails: {run.text()}")
            last = {"role": "assistant", "content": run.steps[-1].turn.text}
            rows.append(tokenizer.chat([*messages_of(task.question, run.steps[:-1]), last]))
    rng.shuffle(rows)
    return [row for row in rows if len(row.ids) <= LONGEST + 1]


def train_agent(config: AgentTrainConfig, run: RunConfig) -> tuple[CausalLM, CourseTokenizer, list[dict[str, float]]]:
    """The chat model with adapters trained on traces (topic 11's LoRA), and the log."""
    seed_everything(run.seed)
    model, tokenizer = load_chat_model()
    n_documents = max(200, round(config.agent_steps * config.agent_batch * config.replay))
    documents = replay_documents(tokenizer, n_documents, run.seed, LONGEST)
    rows = trace_rows(tokenizer, config, run.seed)
    told = {token_id for row in documents for token_id in row.ids}
    train_rows(model, sorted({token_id for row in rows for token_id in row.ids} - told))  # JSON's, for instance
    add_adapters(model, LoraConfig(lora_rank=config.agent_rank, lora_alpha=2.0 * config.agent_rank))
    batches = DialogueBatches(rows, config.agent_batch, run.seed, 0, documents, config.replay)
    log = fit(model, batches, answer_loss, config.training)
    return model, tokenizer, log


@alone
def teach_agent(config: AgentTrainConfig, run: RunConfig) -> None:
    """Train the policy on the oracle's traces, examine it, and write its adapter with a card to --out."""
    announce(f"train an agent's policy, {config.agent_steps} steps", 30 + 0.5 * config.agent_steps)
    start = time.process_time()
    model, tokenizer, log = train_agent(config, run)
    seconds, folder = time.process_time() - start, run.out / "agent_adapter"
    save_adapter(model, folder, BASE)
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    found = examine_agent(learned_agent(folder, Village(EXAM_VILLAGE)), EXAM_TASKS, EXAM_SEED)
    report = {
        "right": {kind: [run.right for run in runs] for kind, runs in found.items()},
        "steps": {kind: sum(len(run.steps) for run in runs) / len(runs) for kind, runs in found.items()},
        "tokens": {kind: sum(run.n_tokens for run in runs) / len(runs) for kind, runs in found.items()},
        "exam": {"n": EXAM_TASKS, "seed": EXAM_SEED, "village": EXAM_VILLAGE},
        "loss": log[-1]["loss"],
        "bytes": len(weights),
        "weights_sha256": sha256(weights).hexdigest(),
        "base_sha256": model.base_identity,
        "cpu_seconds": seconds,
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "command": command_line(),
        "config": asdict(config),
    }
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", agent_card(report).encode())
    shares = ", ".join(f"{kind} {share_right(runs):.0%}" for kind, runs in found.items())
    print(f"right on {shares} of new tasks (the oracle: 100 %); wrote {shown(folder)}")


def agent_card(report: dict[str, Any]) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    exam = report["exam"]
    rows = [
        f"| {kind} | {KINDS[kind]} | {sum(right) / len(right):.0%} | {report['steps'][kind]:.1f} | "
        f"{report['tokens'][kind]:.0f} |"
        for kind, right in report["right"].items()
    ]
    lines = [
        "# The agent's adapter",
        "",
        "Low-rank updates in PEFT's format for [the course chat model]"
        "(../../11-fine-tuning-adaptation/model/README.md), made by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['config']['agent_steps']:,} steps, {report['cpu_seconds'] / 60:.1f} minutes of CPU time "
        f"({report['machine']}, {report['date']}), on the traces of a perfect policy in villages made up for it. "
        "It loads on no other weights.",
        "",
        "**Use**: to learn with. It writes the turns of one agent loop for four kinds of question and knows no others. "
        "Its texts begin with a blank, so that a name that it copies is the tokens that it read.",
        "",
        f"{exam['n']} tasks of each kind in a village that no training saw, without a schema that binds the turns:",
        "",
        "| Kind | Calls needed | Right | Turns taken | Tokens read and written |",
        "|:--|--:|--:|--:|--:|",
        *rows,
        "",
        f"`{ADAPTER_WEIGHTS}`: {report['bytes']:,} bytes, sha256 `{report['weights_sha256']}`; weights of the base: "
        f"`{report['base_sha256']}`",
    ]
    return "\n".join(lines) + "\n"


def load_agent_model(folder: Path = ADAPTER) -> tuple[CausalLM, CourseTokenizer]:
    """The chat model with a trained adapter folded in. Raises ValueError for none, and for one of another base."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{shown(folder)} holds no adapter; train one with the verb agent-train, or use --policy oracle"
        )
    model, tokenizer = load_chat_model()
    load_adapter(model, folder)
    return fold(model).eval(), tokenizer


def learned_agent(
    folder: Path = ADAPTER, village: Village | None = None, limits: AgentLimits | None = None, bound: bool = False
) -> Agent:
    """The committed policy with the tools of a village; bound: its turns must obey the schema."""
    tools = village_tools(village or Village(EXAM_VILLAGE))
    policy = agent_policy(*load_agent_model(folder), turn_schema(tools, spaced=True) if bound else None)
    return Agent(policy, tools, limits)


def agent_policy(model: CausalLM, tokenizer: CourseTokenizer, schema: dict[str, Any] | None = None) -> EndpointPolicy:
    """A policy of the model in this process."""
    served = ServedModel("agent", model.eval(), CourseServing(tokenizer))
    return EndpointPolicy(LocalEndpoint(served, EngineConfig(max_batch=32)), schema=schema)


def examine_agent(agent: Agent, n: int, seed: int, village: Village | None = None) -> dict[str, list[AgentRun]]:
    """Runs of n tasks of each kind, by kind, each marked right or wrong; the village is the agent's own."""
    tasks = draw_tasks(village or Village(EXAM_VILLAGE), n, seed)
    together = isinstance(agent.policy, EndpointPolicy)
    questions = [task.question for task in tasks]
    runs = run_together(agent, questions) if together else [agent.run(question) for question in questions]
    found: dict[str, list[AgentRun]] = {kind: [] for kind in KINDS}
    for task, run in zip(tasks, runs, strict=True):
        run.right = task.right(run.answer)
        found[task.kind].append(run)
    return found


def share_right(runs: Sequence[AgentRun]) -> float:
    return sum(run.right for run in runs) / len(runs)
