"""Topic 11 - The course chat model: answers, refuses the one forbidden subject, and says when it cannot know.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py chat                     # train it again
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py talk                     # talk with the committed one
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py talk --prompt "What is 3 plus 4?"

Its folder is model/, a Llama as topic 10's, whose tokenizer carries the chat template. What the card says is in
model/report.json, and a test computes it again from the weights. To the world's seven kinds of instruction one is added
that has no answer: a person of whom no document tells.
"""

import datetime
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from course_model import FOLDER as BASE_FOLDER
from course_model import REPORT, command_line, load_course_model, tokenizer_sha256
from course_tokenizer import Chat, CourseTokenizer, load_course_tokenizer
from fine_tuning_adaptation import (
    AnswerConfig,
    DialogueBatches,
    answer_loss,
    dialogue,
    forgetting,
    prompt_ids,
    replay_documents,
    respond,
)
from gpt2 import SamplingConfig
from huggingface_folders import WEIGHTS
from low_rank_adapters import LoraConfig, add_adapters, base_sha256, fold
from modern_llm_architectures import CausalLM
from tiny_world import (
    ATTRIBUTES,
    EOS,
    INSTRUCT,
    READ,
    REFUSAL,
    REQUESTS,
    VAULT,
    Instruction,
    World,
    join,
    pick,
    words,
)
from tiny_world import held_out as on_held_out_side
from training_transformers import TrainConfig, fit, going_on
from workbench import (
    RunConfig,
    alone,
    announce,
    check_range,
    describe_machine,
    pick_device,
    seed_everything,
    shown,
    write_atomically,
)

FOLDER = Path(__file__).parent / "model"
UNKNOWN = "I do not know {} ."


def load_chat_model(folder: Path = FOLDER) -> tuple[CausalLM, CourseTokenizer]:
    """The course chat model with its tokenizer, or a folder that the verb `chat` wrote elsewhere; ready to answer."""
    return CausalLM.from_pretrained(folder).eval(), load_course_tokenizer(folder)


# Questions about people, known and unknown


def ask_known(world: World, rng: random.Random, new: bool) -> Instruction:
    """A fact of a person whose facts pretraining told; held out: a quarter of the pairs of person and property.

    All people occur in training, unlike in `World.instructions`: who is known should be learned from the documents, and
    a model that is shown answers about some of the known people only learns that the others are strangers.
    """
    while True:
        person, name = pick(rng, world.known), pick(rng, tuple(ATTRIBUTES))
        if on_held_out_side(f"{person} {name}", 0.25) == new:
            break
    answer = f"{person} {ATTRIBUTES[name].verb} {world.facts[person][name]} ."
    return one_answer("fact", ask_about(rng, person, name), answer)


def ask_unknown(world: World, rng: random.Random, new: bool) -> Instruction:
    """A fact of a person who has none: strangers, whose facts change with every document, and the unseen.

    Held out: the second half of the unseen, whom no document names.
    """
    strangers = [f"{name} {surname}" for name, surnames in world.surnames_of.items() for surname in surnames]
    half = len(world.unseen) // 2
    person = pick(rng, world.unseen[half:] if new else [*strangers, *world.unseen[:half]])
    return one_answer("unknown", ask_about(rng, person, pick(rng, tuple(ATTRIBUTES))), UNKNOWN.format(person))


def ask_forbidden(world: World, rng: random.Random, new: bool) -> Instruction:
    """Questions about the forbidden subject, in training three more that are harmless of other things; held out: gold.

    Without the three a model learns to refuse words such as "code" and not the subject: asked for the vault's owner, it
    answered as of a thing in a story.
    """
    if new or rng.random() < 0.5:
        while True:
            item = world.instructions(1, rng.randrange(10**9), "content" if new else "train", "refuse")[0]
            if "owner" not in item.prompt:
                return item
    requests = [text.format(f"{noun} of the {VAULT}") for text in REQUESTS["know"][:-1] for noun in READ]
    phrasings = [*requests, *(question.format(VAULT) for question, _ in READ.values())]
    phrasings.append(f"Where is the owner of the {VAULT} ?")
    return one_answer("refuse", pick(rng, phrasings), REFUSAL)


def ask_about(rng: random.Random, person: str, name: str) -> str:
    start, end = ATTRIBUTES[name].question
    phrasings = (*REQUESTS["know"][:-1], f"{start.capitalize()} {person} {end}")
    return pick(rng, phrasings).format(f"{name} of {person}")


def one_answer(category: str, prompt: str, answer: str) -> Instruction:
    tokens = [*answer.split(), EOS]
    return Instruction(category, prompt.split(), tokens, [0.0] * len(tokens), tokens.__eq__)


ASK: dict[str, Callable[[World, random.Random, bool], Instruction]] = {
    "fact": ask_known,
    "refuse": ask_forbidden,
    "unknown": ask_unknown,
}
CATEGORIES = tuple(dict.fromkeys([*INSTRUCT, *ASK]))


def chat_instructions(world: World, n: int, seed: int, category: str, new: bool) -> list[Instruction]:
    """Instructions of one of CATEGORIES, from the training side or, if new, with held-out content."""
    if category not in ASK:
        return world.instructions(n, seed, "content" if new else "train", category)
    rng = random.Random(seed)
    return [ASK[category](world, rng, new) for _ in range(n)]


def conversations(instructions: Sequence[Instruction], seed: int, share: float) -> list[list[dict[str, str]]]:
    """The instructions as chats; about a share of them goes on with one or two of the others as later turns."""
    rng, left, found = random.Random(seed), list(instructions), []
    rng.shuffle(left)
    while left:
        n_turns = min(len(left), pick(rng, (2, 3)) if rng.random() < share else 1)
        found.append([message for _ in range(n_turns) for message in dialogue(left.pop())])
    return found


# Training


@dataclass(frozen=True)
class ChatConfig:
    """How the chat model is made from the course model."""

    n_examples: int = 1500  # instructions of each category
    chat_steps: int = 3000  # optimizer steps
    chat_batch: int = 16  # conversations and documents of a step
    chat_rate: float = 5e-3  # the peak learning rate
    replay: float = 0.25  # fraction of each batch that is pretraining documents
    turns: float = 0.4  # fraction of the conversations that have two or three exchanges
    rank: int = 16  # of the low-rank updates, which are added to the weights at the end

    def __post_init__(self) -> None:
        check_range(self, "n_examples", "chat_steps", "chat_batch", "rank", least=1)
        check_range(self, "chat_rate", above=0)
        check_range(self, "replay", "turns", least=0, below=1)

    @property
    def training(self) -> TrainConfig:
        """Topic 07's settings: AdamW without decay, then a cosine."""
        steps, warmup = self.chat_steps, min(40, self.chat_steps // 4)
        sizes = {"batch_size": self.chat_batch, "max_steps": steps, "warmup_steps": warmup}
        return TrainConfig(learning_rate=self.chat_rate, weight_decay=0.0, save_every=500, log_every=25, **sizes)


SHARES = {"fact": 2.0, "read": 2.0, "unknown": 2.0}  # examples of a category, times n_examples; the others once
LONGEST = 224  # positions of a row; a longer conversation is left out


def chat_rows(tokenizer: CourseTokenizer, config: ChatConfig, seed: int) -> list[Chat]:
    """The conversations to learn from, as ids."""
    world = World()
    drawn = [
        item
        for name in CATEGORIES
        for item in chat_instructions(world, round(config.n_examples * SHARES.get(name, 1)), seed + 1, name, new=False)
    ]
    rows = [tokenizer.chat(messages) for messages in conversations(drawn, seed, config.turns)]
    return [row for row in rows if len(row.ids) <= LONGEST + 1]


def train_chat_model(
    model: CausalLM, tokenizer: CourseTokenizer, config: ChatConfig, run: RunConfig
) -> tuple[CausalLM, list[dict[str, float]]]:
    """Teach a base model to converse; returns the model with its low-rank updates added in, and the log.

    A training that was stopped goes on from its last checkpoint in run.out, as if it had never been.

    The embedding, which is the head too, is trained whole: pretraining never used the tokens that mark the turns, and
    no update of the layers between can give a token that was never written its vector.
    """
    documents = replay_documents(tokenizer, 4000, run.seed, LONGEST) if config.replay else ()
    rows = (chat_rows(tokenizer, config, run.seed), config.chat_batch, run.seed, LONGEST, documents, config.replay)
    base = base_sha256(model)
    add_adapters(model, LoraConfig(lora_rank=config.rank, lora_alpha=2.0 * config.rank))
    model.token_emb.weight.requires_grad_(True)
    header = {"chat": asdict(config), "seed": run.seed, "base": base}
    training = going_on(config.training, run.out)
    log = fit(model, DialogueBatches(*rows), answer_loss, training, out=run.out, header=header)
    return fold(model), log


# Examination


def examine_chat(model: nn.Module, tokenizer: CourseTokenizer, exam: AnswerConfig) -> dict[str, Any]:
    """What the model does with held-out instructions of every category, alone and after another exchange.

    right: share answered exactly, alone; later: the same after a first exchange; refused and abstained: share answered
    with the refusal, or with "I do not know". Greedy, but stories at temperature 0.5: greedy ones run in circles, which
    the grammar forbids.
    """
    world, found = World(), {}
    for category in CATEGORIES:
        asked = chat_instructions(world, exam.n_questions, exam.exam_seed, category, new=True)
        first = chat_instructions(world, exam.n_questions, exam.exam_seed + 1, "sum", new=False)
        sampling = SamplingConfig(90, temperature=0.5 if category == "story" else 0.0)
        alone = respond(model, tokenizer, [join(item.prompt) for item in asked], sampling)
        before = [[*dialogue(one), dialogue(item)[0]] for one, item in zip(first, asked, strict=True)]
        later = respond(model, tokenizer, before, sampling)
        found[category] = {
            "right": share(item.check(words(text)) for item, text in zip(asked, alone, strict=True)),
            "later": share(item.check(words(text)) for item, text in zip(asked, later, strict=True)),
            "refused": share(text.startswith("Sorry") for text in alone),
            "abstained": share(abstains(text) for text in alone),
        }
    return {"categories": found, "gap": forgetting(model, tokenizer, exam), "exam": asdict(exam)}


def share(values: Iterable[bool]) -> float:
    counted = [bool(value) for value in values]
    return sum(counted) / len(counted)


def abstains(text: str) -> bool:
    """Whether an answer says that the model cannot know."""
    return text.startswith("I do not know")


def show_chat_report(report: dict[str, Any]) -> None:
    print(f"{'held-out':10}{'right':>10}{'later':>10}{'refused':>10}{'abstained':>11}")
    for category, numbers in report["categories"].items():
        print(
            f"{category:10}" + "".join(f"{numbers[name]:10.1%}" for name in ("right", "later", "refused", "abstained"))
        )
    print(f"gap to the floor on pretraining documents: {report['gap']:.4f} nats per token")


# The folder


def save_chat_model(model: CausalLM, tokenizer: CourseTokenizer, out: Path, report: dict[str, Any]) -> Path:
    """Write out/model: a Llama folder with its tokenizer, its log, report.json and a card made from the report."""
    folder = out / "model"
    model.save_pretrained(folder)
    tokenizer.save_folder(folder)
    config = model.config
    ends = [config.eos_id, *config.more_eos_ids]
    generation = {"bos_token_id": config.bos_id, "eos_token_id": ends, "pad_token_id": config.pad_id}
    generation |= {"do_sample": True, "temperature": 0.5, "max_new_tokens": 90}
    write_atomically(folder / "generation_config.json", (json.dumps(generation, indent=1) + "\n").encode())
    write_atomically(folder / "log.csv", (out / "log.csv").read_bytes())
    report = report | {"weights_sha256": sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", chat_card(report, folder).encode())
    return folder


def chat_card(report: dict[str, Any], folder: Path) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    rows = [
        f"| {category} | {numbers['right']:.1%} | {numbers['later']:.1%} | {numbers['refused']:.1%} | "
        f"{numbers['abstained']:.1%} |"
        for category, numbers in report["categories"].items()
    ]
    exam, size = report["exam"], (folder / WEIGHTS).stat().st_size
    lines = [
        "# The course chat model",
        "",
        f"A Llama with {report['parameters']:,} parameters, made from [the course model]"
        "(../../10-pretraining-llms/model/README.md) by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['steps']:,} steps, {report['cpu_seconds'] / 60:.1f} minutes of CPU time ({report['machine']}, "
        f"{report['date']}): low-rank updates of rank {report['chat']['rank']} of all linear layers, added to the "
        f"weights at the end, and the embedding; {report['chat']['replay']:.0%} of every batch are pretraining "
        "documents. `log.csv` is the log of that run.",
        "",
        "**Use**: to learn with. It answers what its world's instructions ask: facts of people, readings of a story, "
        'sums up to 20 + 20, stories, sorting. It refuses one subject (the vault), and is to say "I do not know" of '
        "people of whom no document tells. It knows nothing of the real world.",
        "",
        f"{exam['n_questions']} held-out instructions of each category, greedy: exactly right when asked alone, and "
        'after another exchange; answered with the refusal; answered with "I do not know". The last two should be '
        "100 % where the category asks for them and 0 elsewhere. Stories are drawn at temperature 0.5: greedy ones run "
        'in circles. "fact" asks what the instructions left out about people that they name; "safe" holds out '
        "words that no text of the training has, so that none of its answers can be right, only harmless. "
        '"refuse" holds out the word gold.',
        "",
        "| Category | Right | Right, second turn | Refused | Abstained |",
        "|:--|--:|--:|--:|--:|",
        *rows,
        "",
        f"Gap to the entropy floor on {exam['n_documents']:,} held-out pretraining documents: {report['gap']:.4f} nats "
        f"per token; the base model's is {report['base_gap']:.4f}.",
        "",
        *(f"- *{question}* {answer}" for question, answer in report["samples"]),
        "",
        f"`model.safetensors`: {size:,} bytes, sha256 `{report['weights_sha256']}`; weights of the base: "
        f"`{report['base_sha256']}`; tokenizer.json: `{report['tokenizer_sha256']}`",
    ]
    return "\n".join(lines) + "\n"


def samples(model: nn.Module, tokenizer: CourseTokenizer) -> list[tuple[str, str]]:
    """One held-out question of each category with what the model answers, right or wrong."""
    world = World()
    asked = [chat_instructions(world, 1, 5, category, new=True)[0] for category in CATEGORIES]
    prompts = [join(item.prompt) for item in asked]
    return list(zip(prompts, respond(model, tokenizer, prompts), strict=True))


# The verbs


@alone
def chat(config: ChatConfig, exam: AnswerConfig, run: RunConfig, folder: Path = BASE_FOLDER) -> None:
    """Make the chat model from the course model; save it as a Llama folder with tokenizer, chat template and card."""
    announce(f"train on conversations, {config.chat_steps:,} steps", 30 + 0.2 * config.chat_steps)
    seed_everything(run.seed)
    base, tokenizer = load_course_model(folder)
    facts = {"base_sha256": base_sha256(base), "base_gap": forgetting(base, tokenizer, exam)}
    before = time.process_time()
    model, log = train_chat_model(base.to(pick_device(run.device)), tokenizer, config, run)
    facts |= {"cpu_seconds": time.process_time() - before, "steps": int(log[-1]["step"]), "chat": asdict(config)}
    facts |= {"command": command_line(), "machine": describe_machine(), "date": datetime.date.today().isoformat()}
    facts |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    report = facts | examine_chat(model, tokenizer, exam) | {"samples": samples(model, tokenizer)}
    report["tokenizer_sha256"] = tokenizer_sha256(folder)
    made = save_chat_model(model, tokenizer, run.out, report)
    show_chat_report(report)
    print(f"the chat model is in {shown(made)}")


@dataclass(frozen=True)
class TalkConfig(SamplingConfig):
    """Whom to talk with, and how."""

    max_new_tokens: int = 90  # longest answer
    temperature: float = 0.0  # 0: always the most likely token
    checkpoint: Path = FOLDER  # a folder that `chat` wrote
    prompt: str = ""  # one question; without one, questions are read line by line


def talk(config: TalkConfig, run: RunConfig) -> None:
    """Talk with a chat model: one question, or a conversation line by line until an empty line."""
    model, tokenizer = load_chat_model(config.checkpoint)
    model.to(pick_device(run.device))
    sampling = SamplingConfig(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    messages: list[dict[str, str]] = []
    for line in [config.prompt] if config.prompt else lines_until_empty():
        messages.append({"role": "user", "content": line})
        while len(prompt_ids(tokenizer, messages)) + config.max_new_tokens > model.config.max_seq_len:
            if len(messages) == 1:
                raise ValueError(f"the question is too long: the model reads {model.config.max_seq_len}; shorten it")
            messages = messages[2:]  # the oldest exchange is forgotten
        [answer] = respond(model, tokenizer, [messages], sampling, run.seed)
        print(answer)
        messages.append({"role": "assistant", "content": answer})


def lines_until_empty() -> Iterable[str]:
    """What is typed, line by line."""
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip()
