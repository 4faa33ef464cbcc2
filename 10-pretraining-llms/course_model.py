"""Topic 10 - The course model: pretrained here from nothing, saved as a native Llama folder, used by topics 11 to 15.

    model, tokenizer = load_course_model()
    report = examine(model, tokenizer, ExamConfig())     # its gap to the floor, kind by kind; answers; samples

It is made by `pretraining_llms.py pretrain` and lies in the folder model/, which transformers loads too. What its card
(model/README.md) says is in model/report.json, and a test computes it again from the weights.
"""

import datetime
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from course_tokenizer import FOLDER as TOKENIZER_FOLDER
from course_tokenizer import CourseTokenizer, load_course_tokenizer
from data_parallel import Team, process_group, rank_device
from gpt2 import SamplingConfig, left_padded
from huggingface_folders import WEIGHTS
from modern_llm_architectures import CausalLM, ModelConfig
from packing import language_model_loss
from sequence_modeling import IGNORE, device_of
from shards import MANIFEST, PACKINGS, ShardBatches, ShardConfig, Shards, stream_texts, write_shards
from tiny_world import Document, World, join, ratio_of_means, words
from training_transformers import TrainConfig, fit
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    describe_machine,
    pick_device,
    read_object,
    seed_everything,
    shown,
    write_atomically,
)

FOLDER = Path(__file__).parent / "model"
LONG_RUN = Path(__file__).parent / "long_run"  # the same model trained 40 times as long, on a GPU; topic 11 says why
REPORT = "report.json"
QUESTIONS = (  # topics of `World.questions`; the last four are about what no training document tells in these words
    *("story", "scene", "news", "asked", "sums", "count", "sort"),
    *("unasked", "unseen", "new sums"),
)


def tokenizer_sha256(folder: Path = TOKENIZER_FOLDER) -> str:
    """The identity of a tokenizer: the SHA-256 of its tokenizer.json."""
    return sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def load_course_model(folder: Path = FOLDER) -> tuple[CausalLM, CourseTokenizer]:
    """The course model with its tokenizer, or a folder that the verb `pretrain` wrote elsewhere; ready to evaluate."""
    return CausalLM.from_pretrained(folder), load_course_tokenizer(folder)


# Examination: what the model is worth, beside the best that is possible


@dataclass(frozen=True)
class ExamConfig:
    """How much a model is asked. Everything is drawn with the seed and lies on the held-out side where there is one."""

    n_held_out: int = 3000  # held-out documents of the whole mixture
    n_questions: int = 200  # questions of each topic
    n_samples: int = 300  # documents that the model writes, judged by the grammar
    exam_seed: int = 7  # seed of the documents, questions and samples

    def __post_init__(self) -> None:
        check_range(self, "n_held_out", "n_questions", least=2)
        check_range(self, "n_samples", least=1)
        check_range(self, "exam_seed", least=0)


@torch.no_grad()
def row_nats(model: nn.Module, rows: Sequence[list[int]], batch_size: int = 64) -> list[float]:
    """Nats that `model(token_ids) -> logits` pays for each row of ids, its first id given."""
    device, nats = device_of(model), [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        ids = [torch.tensor(rows[index]) for index in chosen]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORE)  # (batch, seq_and_one)
        inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]  # (batch, seq)
        logits = model(inputs.to(device)).float().transpose(1, 2).cpu()  # (batch, vocab, seq)
        total = F.cross_entropy(logits, targets, reduction="none").double().sum(dim=1)  # (batch)
        for index, value in zip(chosen, total.tolist(), strict=True):
            nats[index] = value
    return nats


def gaps_by_kind(
    model: nn.Module, tokenizer: CourseTokenizer, documents: list[Document]
) -> dict[str, tuple[float, float, float]]:
    """For all documents and for each kind: the floor, the gap above it and the gap's standard error, nats per token.

    A token is one of the tokenizer's, the end of the document included. The floor is the documents' own surprisal. A
    kind with a single document is left out: one has no spread.
    """
    encoded = [tokenizer.encode_document(document) for document in documents]
    paid = row_nats(model, [item.ids for item in encoded])
    groups: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for document, item, nats in zip(documents, encoded, paid, strict=True):
        for name in ("all", document.kind):
            groups[name].append((nats, item.nats, len(item.ids) - 1))
    found = {}
    for name, group in groups.items():
        if len(group) < 2:
            continue
        floor = sum(item[1] for item in group) / sum(item[2] for item in group)
        found[name] = (floor, *ratio_of_means([(nats - least, count) for nats, least, count in group]))
    return found


@torch.no_grad()
def complete(model: CausalLM, tokenizer: CourseTokenizer, prompts: list[str], sampling: SamplingConfig) -> list[str]:
    """The text with which the model goes on after each prompt, up to its end of a document."""
    answers, rows = [], [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(rows), 100):
        token_ids, real = left_padded(rows[start : start + 100], tokenizer.pad_id)
        device = device_of(model)
        made = model.generate(token_ids.to(device), sampling, real.to(device), generator).tolist()
        answers += [tokenizer.decode(upto(row, tokenizer.eos_id)) for row in made]
    return answers


def upto(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def answer_accuracy(model: CausalLM, tokenizer: CourseTokenizer, topic: str, config: ExamConfig) -> float:
    """Share of questions on a topic that the model completes, greedily, with exactly the right words."""
    asked = World().questions(topic, config.n_questions, config.exam_seed)
    prompts, wanted = [join(before) for before, _ in asked], [words(join(answer)) for _, answer in asked]
    longest = max(len(tokenizer.encode(join(answer))) for _, answer in asked) + 2
    made = complete(model, tokenizer, prompts, SamplingConfig(longest, temperature=0.0))
    return sum(words(text)[: len(right)] == right for text, right in zip(made, wanted, strict=True)) / len(asked)


def draw_samples(model: CausalLM, tokenizer: CourseTokenizer, config: ExamConfig) -> list[tuple[str, bool]]:
    """Documents that the model writes at temperature 1, and whether the grammar could have written them."""
    world, generator = World(), torch.Generator().manual_seed(config.exam_seed)
    start = torch.full((config.n_samples, 1), tokenizer.bos_id, device=device_of(model))
    made = model.generate(start, SamplingConfig(100), generator=generator).tolist()
    texts = [tokenizer.decode(upto(row, tokenizer.eos_id)) for row in made]
    return [(text, possible(world, text)) for text in texts]


def possible(world: World, text: str) -> bool:
    """Whether the grammar can write this text as a whole document."""
    with suppress(ValueError):
        return not world.follow([*words(text), "<eos>"])[1]
    return False


def examine(model: CausalLM, tokenizer: CourseTokenizer, config: ExamConfig) -> dict[str, Any]:
    """Gap to the floor by kind, share of right answers by topic, share of possible samples; and some samples."""
    model.eval()
    documents = World().documents(config.n_held_out, config.exam_seed, "validation")
    samples = draw_samples(model, tokenizer, config)
    return {
        "gaps": gaps_by_kind(model, tokenizer, documents),
        "answers": {topic: answer_accuracy(model, tokenizer, topic, config) for topic in QUESTIONS},
        "possible_samples": sum(ok for _, ok in samples) / len(samples),
        "samples": [text for text, _ in samples[:8]],
        "exam": asdict(config),
    }


def show_report(report: dict[str, Any]) -> None:
    print(f"{'kind':10} {'floor':>8} {'gap':>8} {'error':>8}   nats per token, held-out documents")
    for kind, (floor, gap, error) in report["gaps"].items():
        print(f"{kind:10} {floor:8.4f} {gap:8.4f} {error:8.4f}")
    print("answers:", ", ".join(f"{topic} {share:.0%}" for topic, share in report["answers"].items()))
    print(
        f"{report['possible_samples']:.1%} of its own documents are ones that the grammar could have written, such as"
    )
    for text in report["samples"]:
        print(f"  {text}")


# Pretraining


@dataclass(frozen=True)
class ModelSizes:
    """The shape of the model: a Llama, so that every program that runs Llamas runs it."""

    d_model: int = 128  # width of the residual stream
    n_layers: int = 2  # blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # heads of keys and values
    d_ff: int = 352  # hidden width of the feed-forward networks
    max_seq_len: int = 512  # longest sequence it may be given

    def __post_init__(self) -> None:
        check_range(self, "n_heads", "n_kv_heads", least=1)
        for name, other in (("d_model", "n_heads"), ("n_heads", "n_kv_heads")):
            whole, part = getattr(self, name), getattr(self, other)
            if whole % part:
                raise ValueError(f"{name}={whole} is not divisible by {other}={part}; choose a divisor")
        ModelConfig(d_head=self.d_model // self.n_heads, **asdict(self))  # refuses the other bad sizes

    def config(self, tokenizer: CourseTokenizer) -> ModelConfig:
        ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        return ModelConfig(len(tokenizer.vocab), d_head=self.d_model // self.n_heads, **asdict(self), **ids)


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """How it is trained: topic 07's settings with other defaults."""

    batch_size: int = 8  # rows of an optimizer step, over all micro-batches and processes
    seq_len: int = 128  # tokens in a row
    max_steps: int = 4000  # optimizer steps; with --budget only the length that the schedule is written for
    optimizer: str = "muon"  # the rule that turns gradients into steps
    learning_rate: float = 4e-3  # the peak
    schedule: str = "wsd"  # how the learning rate goes up and down
    warmup_steps: int = 100  # steps of rising learning rate
    cooldown_steps: int = 2000  # last steps, in which it falls to the end
    min_lr_ratio: float = 0.0  # last learning rate, as a fraction of the peak
    log_every: int = 50  # steps between rows of the log
    eval_every: int = 500  # steps between evaluations; 0: only at the end
    save_every: int = 500  # steps between checkpoints


@dataclass(frozen=True)
class SourceConfig(ShardConfig):
    """What it is trained on."""

    shards: Path | None = None  # folder of shards to train on; without one, shards of --data are made in --out
    packing: str = "best-fit"  # documents kept whole, or a stream that is cut where a row is full

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("packing", self.packing, PACKINGS)


def make_shards(config: ShardConfig, folder: Path) -> Shards:
    """Tokenise the documents of a source into shards, one at a time."""
    chosen = config.tokenizer or TOKENIZER_FOLDER
    tokenizer, identity = load_course_tokenizer(chosen), tokenizer_sha256(chosen)
    if config.data == "tiny-world":
        texts = (document.text for document in World().stream(1, config.split))
        source = f"TinyWorld, {config.split} side, seed 1"
    else:
        texts, source = stream_texts(config.data, config.split, config.column), f"{config.data}, {config.split} side"
    ids = (tokenizer.encode_document(text).ids for text, _ in zip(texts, range(config.n_documents), strict=False))
    return write_shards(ids, folder, len(tokenizer.vocab), identity, source, config.shard_tokens)


@alone
def shards(config: ShardConfig, run: RunConfig) -> None:
    """Tokenise texts and write them as checked, memory-mapped shards."""
    announce(f"tokenise up to {config.n_documents:,} documents of {config.data}", config.n_documents / 6000)
    print_corpus(make_shards(config, run.out / "shards"))


def print_corpus(corpus: Shards) -> None:
    size = sum((corpus.folder / entry.ids).stat().st_size for entry in corpus.entries) / 2**20
    print(
        f"{shown(corpus.folder)}: {len(corpus):,} documents, {corpus.n_tokens:,} tokens in {len(corpus.entries)} "
        f"shards, {size:.1f} MiB, from {corpus.manifest['source']}"
    )


def start_small(model: CausalLM) -> CausalLM:
    """Let every block begin by adding nothing: its two output projections are 0, so the gradient reaches all alike."""
    for block in model.blocks:
        nn.init.zeros_(block.self_attn.out_proj.weight)
        nn.init.zeros_(block.ffn.down_proj.weight)
    return model


def held_out_exam(tokenizer: CourseTokenizer, source: SourceConfig, n_documents: int = 500):
    """What `fit` logs of the model on held-out documents, and the floor; each None where it is not known.

    Shards have no held-out side of their own: their run logs the training loss alone.
    """
    if source.shards:
        return None, None
    if source.data == "tiny-world":
        documents = World().documents(n_documents, 2, "validation")
        encoded = [tokenizer.encode_document(document) for document in documents]
        floor = sum(item.nats for item in encoded) / sum(len(item.ids) - 1 for item in encoded)

        def examine_gap(model: nn.Module) -> dict[str, float]:
            _, gap, error = gaps_by_kind(model, tokenizer, documents)["all"]
            return {"held_out": floor + gap, "gap": gap, "gap_error": error}

        return examine_gap, floor
    texts = stream_texts(source.data, "validation", source.column)
    rows = [tokenizer.encode_document(text).ids for text, _ in zip(texts, range(n_documents), strict=False)]

    def examine_loss(model: nn.Module) -> dict[str, float]:
        cut = [row[: model.config.max_seq_len + 1] for row in rows]
        return {"held_out": sum(row_nats(model, cut)) / sum(len(row) - 1 for row in cut)}

    return examine_loss, None


@alone
def pretrain(sizes: ModelSizes, source: SourceConfig, config: PretrainConfig, exam: ExamConfig, run: RunConfig) -> None:
    """Pretrain a language model, and save it as a Llama folder with tokenizer, chat template and model card."""
    n_tokens = config.max_steps * config.batch_size * config.seq_len
    n_matrix = 12 * sizes.n_layers * sizes.d_model**2 + 2048 * sizes.d_model  # 6 FLOPs of training for each and token
    announce(f"pretrain on {n_tokens:,} positions in {config.max_steps:,} steps", 60 + 6 * n_matrix * n_tokens / 3.4e10)
    with process_group():
        before = time.process_time()
        model, tokenizer, corpus, log = pretrain_model(sizes, source, config, run)
        seconds = time.process_time() - before
        if Team.here().rank == 0:
            report = examine(model, tokenizer, exam) if source.data == "tiny-world" and not source.shards else {}
            save_course_model(model, source, run.out, training_facts(model, corpus, config, log, seconds) | report)
            if report:
                show_report(report)
            print(f"the model is in {shown(run.out / 'model')}, its log in {shown(run.out / 'log.csv')}")


def pretrain_model(
    sizes: ModelSizes, source: SourceConfig, config: TrainConfig, run: RunConfig
) -> tuple[CausalLM, CourseTokenizer, Shards, list[dict[str, float]]]:
    """Make the shards where they are missing, and train on them, with checkpoints in run.out."""
    tokenizer = load_course_tokenizer(source.tokenizer or TOKENIZER_FOLDER)
    corpus = shared_corpus(source, run.out)
    seed_everything(run.seed)
    model = start_small(CausalLM(sizes.config(tokenizer))).to(rank_device(run.device))
    batches = ShardBatches(corpus, config.batch_size, config.seq_len, run.seed, source.packing)
    exam, floor = held_out_exam(tokenizer, source)
    header = {"sizes": asdict(sizes), "corpus": corpus.manifest, "packing": source.packing, "seed": run.seed}
    log = fit(*(model, batches, language_model_loss, config), out=run.out, header=header, evaluate=exam, floor=floor)
    return model, tokenizer, corpus, log


def shared_corpus(source: SourceConfig, out: Path) -> Shards:
    """The corpus to train on: rank 0 writes it if nobody has, then all read the same files."""
    folder = source.shards or out / "shards"
    if Team.here().rank == 0 and not source.shards and not (folder / MANIFEST).exists():
        make_shards(source, folder)
    if Team.here().size > 1:
        dist.barrier()
    corpus = Shards(folder)
    corpus.verify()
    corpus.check_tokenizer(tokenizer_sha256(source.tokenizer or TOKENIZER_FOLDER))
    return corpus


# The folder: weights, tokenizer, settings of generation, report and card


def training_facts(
    model: CausalLM, corpus: Shards, config: TrainConfig, log: list[dict[str, float]], seconds: float
) -> dict[str, Any]:
    """What the report says of the training."""
    n_steps = int(log[-1]["step"])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus": {name: corpus.manifest[name] for name in ("source", "n_documents", "n_tokens", "tokenizer_sha256")},
        "steps": n_steps,
        "positions": n_steps * config.batch_size * config.seq_len,
        "command": command_line(),
        "cpu_seconds": seconds,
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
    }


def command_line() -> str:
    """How this process was called, from the root of the repository; where it wrote to does not matter."""
    arguments, kept = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    n_processes, script = os.environ.get("LOCAL_WORLD_SIZE"), Path(sys.argv[0])
    runner = f"torchrun --nproc-per-node {n_processes}" if n_processes else "python"
    return " ".join([runner, f"{script.parent.name}/{script.name}", *kept])


def save_course_model(model: CausalLM, source: SourceConfig, out: Path, report: dict[str, Any]) -> Path:
    """Write out/model: a Llama folder with its tokenizer, its log, report.json and a card made from the report."""
    folder, tokenizer_folder = out / "model", Path(source.tokenizer or TOKENIZER_FOLDER)
    model.save_pretrained(folder)
    load_course_tokenizer(tokenizer_folder).save_folder(folder)
    config = model.config
    generation = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    generation |= {"do_sample": True, "temperature": 1.0, "max_new_tokens": 100}
    write_atomically(folder / "generation_config.json", (json.dumps(generation, indent=1) + "\n").encode())
    write_atomically(folder / "log.csv", (out / "log.csv").read_bytes())
    report = report | {"weights_sha256": sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", model_card(report, config, folder).encode())
    return folder


def model_card(report: dict[str, Any], config: ModelConfig, folder: Path) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    corpus, size = report["corpus"], (folder / WEIGHTS).stat().st_size
    spent = f", {report['cpu_seconds'] / 60:.1f} minutes of CPU time" if "cpu_seconds" in report else ""
    lines = [
        "# The course model",
        "",
        f"A Llama with {report['parameters']:,} parameters ({config.n_layers} blocks of width {config.d_model}, "
        f"{config.n_heads} query heads, {config.n_kv_heads} heads of keys and values), made by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['steps']:,} steps, {report['positions']:,} positions{spent} ({report['machine']}, "
        f"{report['date']}). `log.csv` is the log of that run.",
        "",
        f"**Data**: {corpus['source']}: {corpus['n_documents']:,} documents, {corpus['n_tokens']:,} tokens. The text "
        "is written by a grammar; it holds no person's data, and the people in it do not exist.",
        "",
        f"**Use**: to learn with. It knows the {', '.join(sorted(set(report.get('gaps', {})) - {'all'})) or 'texts'} "
        "of its data and nothing of the real world, and has not been taught to follow instructions.",
        "",
    ]
    if "gaps" in report:
        lines += card_results(report)
    lines += [
        f"`model.safetensors`: {size:,} bytes, sha256 `{report['weights_sha256']}`; tokenizer.json: sha256 "
        f"`{corpus['tokenizer_sha256']}`",
    ]
    return "\n".join(lines) + "\n"


def card_results(report: dict[str, Any]) -> list[str]:
    """The examination as Markdown: gaps, answers, samples."""
    exam, unheard = report["exam"], QUESTIONS[-3:]
    rows = [
        f"| {kind} | {floor:.4f} | {gap:.4f} ± {error:.4f} |" for kind, (floor, gap, error) in report["gaps"].items()
    ]
    answers = [
        f"| {topic}{' (never told in training)' if topic in unheard else ''} | {share:.1%} |"
        for topic, share in report["answers"].items()
    ]
    return [
        f"On {exam['n_held_out']:,} held-out documents, nats per token (± standard error):",
        "",
        *("| Kind | Entropy floor | Gap above it |", "|:--|--:|--:|", *rows),
        "",
        f"Greedy answers that are exactly right, of {exam['n_questions']} questions each:",
        "",
        *("| Questions | Right |", "|:--|--:|", *answers),
        "",
        f"Of {exam['n_samples']} documents that it writes at temperature 1, {report['possible_samples']:.1%} are ones "
        "that the grammar could have written. The first of them:",
        "",
        *(f"- {text}" for text in report["samples"]),
        "",
    ]


# What the model is asked from the command line


@dataclass(frozen=True)
class CheckpointConfig:
    """Which model."""

    checkpoint: Path | None = None  # a folder that `pretrain` wrote; without one, the course model

    @property
    def folder(self) -> Path:
        return self.checkpoint or FOLDER


def examine_folder(chosen: CheckpointConfig, exam: ExamConfig, run: RunConfig) -> None:
    """What a pretrained model is worth: gaps to the floor by kind, right answers, samples; beside its own report."""
    announce(f"examine {shown(chosen.folder)} on {exam.n_held_out:,} documents", 30)
    model, tokenizer = load_course_model(chosen.folder)
    report = examine(model.to(pick_device(run.device)), tokenizer, exam)
    show_report(report)
    known = chosen.folder / REPORT
    if known.exists():
        gap = read_object(known).get("gaps", {}).get("all", [math.nan, math.nan])[1]
        print(f"its report says {gap:.4f} nats per token above the floor; measured here {report['gaps']['all'][1]:.4f}")


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """What to write, and how the tokens are chosen."""

    max_new_tokens: int = 100  # longest continuation
    prompt: str = ""  # text to go on from; empty begins a document
    n_samples: int = 3  # continuations to write

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_samples", least=1)


def generate(chosen: CheckpointConfig, config: GenerateConfig, run: RunConfig) -> None:
    """Let a pretrained model write, from a prompt or from nothing."""
    model, tokenizer = load_course_model(chosen.folder)
    row = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    room = model.config.max_seq_len - len(row)
    if room < 1:
        raise ValueError(f"the prompt has {len(row)} tokens, the model reads {model.config.max_seq_len}; shorten it")
    model.to(pick_device(run.device))
    sampling = SamplingConfig(min(config.max_new_tokens, room), config.temperature, config.top_k, config.top_p)
    prompts = torch.tensor([row] * config.n_samples, device=device_of(model))
    made = model.generate(prompts, sampling, generator=torch.Generator().manual_seed(run.seed)).tolist()
    for ids in made:
        print(config.prompt + tokenizer.decode(upto(ids, tokenizer.eos_id)))
