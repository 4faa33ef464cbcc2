"""Topic 11 - Fine-Tuning and Adaptation: a model that continues texts learns to answer, with all its weights or few.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py                              # LoRA on the course model
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py sft --method dora            # any method, saved in --out
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py --break alpha-without-rank   # a failure, measured

Wei et al. 2022 (FLAN, arXiv 2109.01652), Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), Howard and Ruder 2018
(ULMFiT, arXiv 1801.06146: discriminative rates), Kirkpatrick et al. 2017 (EWC, arXiv 1612.00796).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_model import FOLDER, gaps_by_kind, load_course_model, upto
from course_tokenizer import Chat, CourseTokenizer
from gpt2 import SamplingConfig, left_padded
from low_rank_adapters import (
    LoraConfig,
    adapted_layers,
    add_adapters,
    fold,
    freeze,
    load_adapter,
    save_adapter,
    train_rows,
)
from modern_llm_architectures import CausalLM
from nf4 import quantize_model, weight_bytes
from packing import Batch, EpochOrder, pack, to_device
from prompt_tuning import PromptTuned, add_biases, add_bottlenecks, add_prefix, trained_parameters
from sequence_modeling import IGNORE, device_of
from tiny_world import (
    INSTRUCT,
    INSTRUCTION_SPLITS,
    LENGTHS,
    WORD_CLASSES,
    Document,
    Instruction,
    World,
    join,
    words,
)
from training_transformers import LossFn, TrainConfig, fit
from workbench import (
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    pick_device,
    run_verbs,
    seed_everything,
    shown,
)

# Dialogues: what is written, and what of it the loss counts


def dialogue(instruction: Instruction) -> list[dict[str, str]]:
    """An instruction as the messages of a chat."""
    return [
        {"role": "user", "content": join(instruction.prompt)},
        {"role": "assistant", "content": join(instruction.answer[:-1])},
    ]


def encode_dialogues(tokenizer: CourseTokenizer, instructions: Iterable[Instruction]) -> list[Chat]:
    """Instructions as ids, and which of them are trained: the answer and its <|im_end|>."""
    return [tokenizer.chat(dialogue(instruction)) for instruction in instructions]


def encode_replay(tokenizer: CourseTokenizer, documents: Iterable[Document]) -> list[Chat]:
    """Pretraining documents as rows of the same kind, all trained."""
    encoded = [tokenizer.encode_document(document).ids for document in documents]
    return [Chat(ids, [True] * len(ids)) for ids in encoded]


def prompt_ids(tokenizer: CourseTokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """A question, or the messages up to it, as a model of dialogues expects it: up to where the assistant speaks."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.chat(messages, add_generation_prompt=True).ids


class DialogueBatches:
    """Dialogues in batches that depend on the step alone: inputs, targets (-100: not counted), each (batch, seq).

    Args:
        dialogues: rows of ids with what of them is trained
        batch_size: dialogues of a step, those of the replay included
        seed: of the order, which is another in every epoch
        seq_len: pack the dialogues of a step into rows of so many positions, with their document_ids; 0: pad each
        replay: rows that are mixed in, such as pretraining documents
        replay_share: fraction of each batch that they make up

    Packed or padded, the same step has the same dialogues, and so the same loss. Raises ValueError for a dialogue that
    is longer than a row, and for one of which nothing is trained: a mean over no token is not a number.
    """

    def __init__(
        self,
        dialogues: Sequence[Chat],
        batch_size: int,
        seed: int,
        seq_len: int = 0,
        replay: Sequence[Chat] = (),
        replay_share: float = 0.0,
    ) -> None:
        for number, row in enumerate([*dialogues, *replay]):
            if not any(row.trained[1:]):
                raise ValueError(f"dialogue {number} has no trained token; give it an answer")
            if seq_len and len(row.ids) > seq_len + 1:
                raise ValueError(f"dialogue {number} has {len(row.ids)} ids, a row holds {seq_len + 1}; raise seq_len")
        self.dialogues, self.replay, self.seq_len = dialogues, replay, seq_len
        n_replayed = round(batch_size * replay_share) if replay else 0
        if n_replayed >= batch_size or (replay and replay_share and not n_replayed):
            raise ValueError(
                f"replay_share={replay_share:g} makes {n_replayed} of the {batch_size} rows of a batch; a batch needs "
                "dialogues and replayed rows: change batch_size or the share"
            )
        self.order = EpochOrder(len(dialogues), batch_size - n_replayed, seed)
        self.replay_order = EpochOrder(len(replay), n_replayed, seed) if n_replayed else None

    def rows(self, step: int) -> list[Chat]:
        """The dialogues of a step."""
        chosen = [self.dialogues[index] for index in self.order(step)]
        return chosen + [self.replay[index] for index in self.replay_order(step)] if self.replay_order else chosen

    def __call__(self, step: int) -> Batch:
        pieces = [list(zip(row.ids, row.trained, strict=True)) for row in self.rows(step)]
        if not self.seq_len:
            batch = fill_rows([[piece] for piece in pieces], max(len(piece) for piece in pieces) - 1)
            del batch["document_ids"]  # nothing to keep apart: causal attention does not see the padding behind a row
            return batch
        return fill_rows(pack(pieces, self.seq_len), self.seq_len)


def fill_rows(rows: list[list[list[tuple[int, bool]]]], seq_len: int) -> Batch:
    """Rows of pieces of (id, trained) as inputs, targets and document_ids, each (batch, seq)."""
    inputs = torch.zeros(len(rows), seq_len, dtype=torch.long)  # (batch, seq)
    targets = torch.full_like(inputs, IGNORE)  # (batch, seq)
    document_ids = torch.zeros_like(inputs)  # (batch, seq)
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces, start=1):
            stop = start + len(piece) - 1
            inputs[row, start:stop] = torch.tensor([token_id for token_id, _ in piece[:-1]])
            targets[row, start:stop] = torch.tensor([token_id if kept else IGNORE for token_id, kept in piece[1:]])
            document_ids[row, start:stop] = number
            start = stop
    return {"inputs": inputs, "targets": targets, "document_ids": document_ids}


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats of all counted targets together, and their number: `language_model_loss`, with logits for them alone.

    Two thirds of the positions of a dialogue are not counted, and the head is the largest matrix of a small model.
    """
    logits, targets = counted_logits(model, batch)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="sum"), torch.tensor(len(targets))


def counted_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocab) and targets (tokens) of the counted positions of a batch."""
    documents = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
    counted = batch["targets"] != IGNORE  # (batch, seq)
    hidden = model.hidden(batch["inputs"], **documents)  # (batch, seq, d_model)
    return model.logits(hidden[counted]), batch["targets"][counted]


def everything_trained(dialogues: Sequence[Chat]) -> list[Chat]:
    """The same dialogues with a loss on the question too, for comparison."""
    return [Chat(row.ids, [True] * len(row.ids)) for row in dialogues]


# Examination


@dataclass(frozen=True)
class AnswerConfig:
    """How much an adapted model is asked."""

    n_questions: int = 60  # held-out instructions of each category
    n_documents: int = 300  # held-out pretraining documents, for what is forgotten
    exam_seed: int = 7  # seed of the instructions and documents
    exam_split: str = "content"  # what of the instructions is held out: train, content, phrasing or both

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=1)
        check_range(self, "n_documents", least=2)
        check_range(self, "exam_seed", least=0)
        check_name("exam_split", self.exam_split, INSTRUCTION_SPLITS)


def with_end(model: nn.Module, end_id: int) -> nn.Module:
    """The model, whose generation also ends at `end_id`; its config says so, and the folder that it is saved to."""
    if end_id not in (model.config.eos_id, *model.config.more_eos_ids):
        model.config = replace(model.config, more_eos_ids=(*model.config.more_eos_ids, end_id))
    return model


@torch.no_grad()
def respond(
    model: nn.Module,
    tokenizer: CourseTokenizer,
    prompts: Sequence[str | list[dict[str, str]]],
    sampling: SamplingConfig = SamplingConfig(90, temperature=0.0),  # noqa: B008 - frozen
    seed: int = 0,
) -> list[str]:
    """What the model answers to each prompt (or messages), as text up to <|im_end|>; greedy unless told otherwise."""
    model = with_end(model.eval(), tokenizer.im_end_id)
    rows, device = [prompt_ids(tokenizer, prompt) for prompt in prompts], device_of(model)
    found, generator = [""] * len(rows), torch.Generator(device).manual_seed(seed)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), 128):
        chosen = by_length[start : start + 128]
        token_ids, real = left_padded([rows[index] for index in chosen], tokenizer.pad_id)
        made = model.generate(token_ids.to(device), sampling, real.to(device), generator).tolist()
        for index, ids in zip(chosen, made, strict=True):
            found[index] = tokenizer.decode(upto(upto(ids, tokenizer.im_end_id), tokenizer.eos_id))
    return found


def category_accuracy(
    model: nn.Module, tokenizer: CourseTokenizer, config: AnswerConfig, categories: Iterable[str] = tuple(INSTRUCT)
) -> dict[str, float]:
    """Share of held-out instructions of each category that the model carries out exactly; the best possible is 1."""
    world, found = World(), {}
    for category in categories:
        asked = world.instructions(config.n_questions, config.exam_seed, config.exam_split, category)
        texts = respond(model, tokenizer, [join(item.prompt) for item in asked])
        found[category] = sum(item.check(words(text)) for item, text in zip(asked, texts, strict=True)) / len(asked)
    return found


def forgetting(model: nn.Module, tokenizer: CourseTokenizer, config: AnswerConfig) -> float:
    """Gap to the floor on held-out pretraining documents, nats per token; 0 is the best possible."""
    documents = World().documents(config.n_documents, config.exam_seed, "validation")
    return gaps_by_kind(model.eval(), tokenizer, documents)["all"][1]


@torch.no_grad()
def answer_gap(model: nn.Module, tokenizer: CourseTokenizer, config: AnswerConfig) -> float:
    """Nats per token that the model pays for right answers to held-out instructions, above what is left to chance.

    All answers but stories follow from their instruction. It moves long before the first answer is exactly right.
    """
    world, paid, floor, n_tokens = World(), 0.0, 0.0, 0
    for category in INSTRUCT:
        asked = world.instructions(config.n_questions, config.exam_seed, config.exam_split, category)
        batch = DialogueBatches(encode_dialogues(tokenizer, asked), len(asked), 0)(0)
        loss, count = answer_loss(model.eval(), to_device(batch, device_of(model)))
        paid, n_tokens = paid + loss.item(), n_tokens + int(count)
        floor += sum(sum(item.surprisal) for item in asked)
    return (paid - floor) / n_tokens


def examine_answers(model: nn.Module, tokenizer: CourseTokenizer, config: AnswerConfig) -> dict[str, Any]:
    """Accuracy by category and their mean; the gap on answers, and the one on pretraining documents."""
    accuracy = category_accuracy(model, tokenizer, config)
    mean = sum(accuracy.values()) / len(accuracy)
    gaps = {"answer_gap": answer_gap(model, tokenizer, config), "gap": forgetting(model, tokenizer, config)}
    return {"accuracy": accuracy, "mean": mean, **gaps}


def guessing() -> dict[str, float]:
    """What somebody reaches who knows how answers look and guesses the rest; a story has too many forms to guess."""
    sizes = {name: len(WORD_CLASSES[name]) for name in ("towns", "jobs", "pets", "foods", "places", "colours")}
    facts, lengths = ("towns", "jobs", "pets", "foods"), LENGTHS.values()
    return {
        "fact": sum(1 / sizes[name] for name in facts) / len(facts),
        "read": (1 / sizes["places"] + 1 / sizes["colours"]) / 3,  # the owner is one of hundreds
        "sum": 1 / (2 * World().config.max_sum + 1),
        "story": 0.0,
        "sort": sum(1 / math.factorial(length) for length in lengths) / len(lengths),
        "refuse": 0.5,  # refuse, or say that there is none
        "safe": 0.5,
    }


# Methods: which numbers are trained


RATES = {  # peak learning rates that a run takes unless it is told another; `figures rates` compares three of each
    "full": 2e-3,
    "layerwise": 3e-3,
    "lora": 1e-2,
    "dora": 1e-2,
    "qlora": 1e-2,
    "adapters": 1e-2,
    "prefix": 9e-2,
    "prompt": 9e-2,
    "bitfit": 2e-2,
}


@dataclass(frozen=True)
class MethodConfig:
    """Which numbers of the model are trained. LoRA's own settings are in LoraConfig."""

    method: str = "lora"  # full, layerwise, lora, dora, qlora, adapters, prefix, prompt or bitfit
    n_frozen: int = 1  # layerwise: blocks at the bottom that stay as they are, the embeddings with them
    layer_decay: float = 1.0  # layerwise: learning rate of a block over that of the block above it
    d_bottleneck: int = 16  # adapters: width of the bottleneck
    n_virtual: int = 16  # prefix, prompt: positions before every text
    token_rows: bool = True  # also train the embeddings of the tokens that pretraining never saw

    def __post_init__(self) -> None:
        check_name("method", self.method, RATES)
        check_range(self, "n_frozen", least=0)
        check_range(self, "layer_decay", above=0, most=1)
        check_range(self, "d_bottleneck", "n_virtual", least=1)


def adapt(model: CausalLM, tokenizer: CourseTokenizer, how: MethodConfig, lora: LoraConfig) -> nn.Module:
    """Freeze what a method leaves alone and add what it trains.

    LoRA, DoRA, adapters, biases and full fine-tuning begin as the model was; QLoRA begins with its rounding; prefixes
    and prompts begin as if the start of a dialogue had been read.
    """
    first = (prompt_ids(tokenizer, "Please tell me") * how.n_virtual)[: how.n_virtual]
    if how.token_rows and how.method != "full":
        train_rows(model, unseen_tokens(tokenizer))
    match how.method:
        case "full":
            model.requires_grad_(True)
        case "layerwise":
            freeze_below(model, how.n_frozen)
        case "lora" | "dora" | "qlora":
            if how.method == "qlora":
                quantize_model(model)
            add_adapters(model, replace(lora, dora=lora.dora or how.method == "dora"))
        case "adapters":
            add_bottlenecks(model, how.d_bottleneck)
        case "prefix":
            add_prefix(model, first)
        case "prompt":
            return PromptTuned(model, first, tokenizer.mask_id)
        case "bitfit":
            add_biases(model)
    return model


@cache
def unseen_tokens(tokenizer: CourseTokenizer, n_documents: int = 3000, n_instructions: int = 2100) -> list[int]:
    """Ids that stand in dialogues and in no pretraining document: the template's, and pieces of instructions."""
    seen = {token_id for row in replay_documents(tokenizer, n_documents, 0) for token_id in row.ids}
    dialogues = encode_dialogues(tokenizer, World().instructions(n_instructions, 0))
    return sorted({token_id for row in dialogues for token_id in row.ids} - seen)


def freeze_below(model: CausalLM, n_frozen: int) -> None:
    """Train the blocks from number n_frozen on and the last norm; a tied head is frozen with the embedding.

    0 freezes nothing; rows that `train_rows` set apart stay trained. Raises ValueError if no block is left.
    """
    if n_frozen >= len(model.blocks):
        raise ValueError(f"n_frozen={n_frozen} leaves no block of {len(model.blocks)} to train; lower it")
    if n_frozen:
        freeze(model)
    else:
        model.requires_grad_(True)
    model.blocks[n_frozen:].requires_grad_(True)
    model.final_norm.requires_grad_(True)


def layer_rates(model: CausalLM, learning_rate: float, layer_decay: float) -> torch.optim.AdamW:
    """AdamW whose rate falls by `layer_decay` from each block to the one below (Howard and Ruder 2018, section 3.2).

    The embedding counts as the block below the first. `fit` scales every group by its own "base_lr".
    """
    n_blocks, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = n_blocks - 1 - int(name.split(".")[1]) if name.startswith("blocks.") else 0
            groups.setdefault(n_blocks if name.startswith("token_emb") else depth, []).append(parameter)
    rates = {depth: learning_rate * layer_decay**depth for depth in sorted(groups)}
    settings = [{"params": groups[depth], "lr": rate, "base_lr": rate} for depth, rate in rates.items()]
    return torch.optim.AdamW(settings, learning_rate, (0.9, 0.95), weight_decay=0.0)


# What keeps a model from forgetting


def fisher_diagonal(
    model: nn.Module, batches: Callable[[int], Batch], n_batches: int, seed: int = 0
) -> dict[str, Tensor]:
    """Fisher information of each trained number, per token, on the texts of some batches.

    The targets are drawn from the model itself, each on its own. Their scores then have mean 0 and are uncorrelated, so
    the square of the gradient of a whole batch is, on average, the sum of the tokens' squares: one backward pass for a
    batch, no loop over examples. With the texts' own targets that would not be so.
    """
    generator, n_tokens = torch.Generator().manual_seed(seed), 0
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for step in range(n_batches):
        batch = to_device(batches(step), device_of(model))
        logits, _ = counted_logits(model, batch)  # (tokens, vocab)
        drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)[:, 0]  # (tokens)
        loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            found[name] += gradient.square()
        n_tokens += len(drawn)
    return {name: total / n_tokens for name, total in found.items()}


class ElasticPenalty:
    """strength / 2 * sum of F (theta - theta at the start)^2: elastic weight consolidation (Kirkpatrick et al. 2017).

    With F per token, a strength of n gives the old task the weight of n tokens for each token of the new one.
    """

    def __init__(self, model: nn.Module, fisher: dict[str, Tensor], strength: float) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"the strength of EWC must be finite and >= 0, got {strength}")
        named = dict(model.named_parameters())
        self.fisher, self.strength = fisher, strength
        self.start = {name: named[name].detach().clone() for name in fisher}

    def __call__(self, model: nn.Module) -> Tensor:
        named = dict(model.named_parameters())
        parts = [(self.fisher[name] * (named[name] - self.start[name]).square()).sum() for name in self.fisher]
        return self.strength / 2 * torch.stack(parts).sum()

    def added_to(self, loss_fn: LossFn) -> LossFn:
        """A loss for `fit` with the penalty once for each token, because `fit` divides by their number."""

        def penalised(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            loss, count = loss_fn(model, batch)
            return loss + count * self(model), count

        return penalised


# Supervised fine-tuning


@dataclass(frozen=True)
class SftConfig:
    """How a model is fine-tuned on instructions."""

    max_steps: int = 400  # optimizer steps
    batch_size: int = 16  # dialogues of a step
    seq_len: int = 96  # positions of a row that dialogues are packed into; 0: one dialogue in a row, padded
    learning_rate: float = 0.0  # the peak; 0: the rate that suits the method
    n_instructions: int = 4200  # instructions to learn from, in equal numbers for each category
    categories: str = ",".join(INSTRUCT)  # what they are about, with commas between
    loss_on: Literal["answer", "everything"] = "answer"  # what the loss counts
    replay_share: float = 0.0  # fraction of every batch that is pretraining documents
    ewc_strength: float = 0.0  # weight of the elastic penalty; 0: none

    def __post_init__(self) -> None:
        check_range(self, "max_steps", "batch_size", "n_instructions", least=1)
        check_range(self, "seq_len", "learning_rate", "ewc_strength", least=0)
        check_range(self, "replay_share", least=0, below=1)
        check_name("loss_on", self.loss_on, ("answer", "everything"))
        if not self.names:
            raise ValueError(f"categories={self.categories!r} names none; give some of {','.join(INSTRUCT)}")
        for name in self.names:
            check_name("category", name, INSTRUCT)

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.categories.split(",") if name.strip()]

    def training(self, method: str) -> TrainConfig:
        """Topic 07's settings: AdamW without decay, a warm-up of at most 40 steps, then a cosine."""
        return TrainConfig(
            batch_size=self.batch_size,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate or RATES[method],
            warmup_steps=min(40, self.max_steps // 4),
            weight_decay=0.0,
        )


def training_dialogues(tokenizer: CourseTokenizer, config: SftConfig, seed: int) -> list[Chat]:
    """The instructions to learn from, category by category."""
    world, share = World(), max(1, config.n_instructions // len(config.names))
    drawn = [item for name in config.names for item in world.instructions(share, seed + 1, "train", name)]
    dialogues = encode_dialogues(tokenizer, drawn)
    return dialogues if config.loss_on == "answer" else everything_trained(dialogues)


def replay_documents(tokenizer: CourseTokenizer, n: int, seed: int, longest: int = 0) -> list[Chat]:
    """Documents of the pretraining side; those that do not fit into a row are left out."""
    rows = encode_replay(tokenizer, World().documents(n, seed + 1, "train"))
    return [row for row in rows if not longest or len(row.ids) <= longest + 1]


def sft_batches(tokenizer: CourseTokenizer, config: SftConfig, how: MethodConfig, seed: int) -> DialogueBatches:
    """The batches of a training; prefixes and prompts stand before whole rows, so theirs are padded."""
    seq_len = 0 if how.method in ("prefix", "prompt") else config.seq_len
    replay = replay_documents(tokenizer, 2000, seed, config.seq_len) if config.replay_share else ()
    dialogues = training_dialogues(tokenizer, config, seed)
    return DialogueBatches(dialogues, config.batch_size, seed, seq_len, replay, config.replay_share)


def fine_tune(
    model: nn.Module, tokenizer: CourseTokenizer, config: SftConfig, how: MethodConfig, seed: int
) -> list[dict[str, float]]:
    """Train what `adapt` left trainable on instructions; return the log. The model is changed in place."""
    if not trained_parameters(model):
        raise ValueError("no number of this model is trained; unfreeze some or add adapters")
    training, loss_fn, optimizer = config.training(how.method), answer_loss, None
    if how.method == "layerwise" and how.layer_decay < 1:
        optimizer = layer_rates(model, training.learning_rate, how.layer_decay)
    if config.ewc_strength:
        old = DialogueBatches(replay_documents(tokenizer, 500, seed, config.seq_len), 16, seed, config.seq_len)
        penalty = ElasticPenalty(model, fisher_diagonal(model, old, 40, seed), config.ewc_strength)
        loss_fn = penalty.added_to(answer_loss)
    return fit(model, sft_batches(tokenizer, config, how, seed), loss_fn, training, optimizer=optimizer)


# The verbs


BREAK_NAMES = (  # the keys of BREAKS and PREFERENCE_BREAKS in the two modules of failures, which measure them
    *("alpha-without-rank", "merged-twice", "nothing-trained", "late-binding", "all-masked"),
    *("frozen-new-tokens", "loss-on-prompt", "end-not-trained", "other-template", "packed-together"),
    *("dpo-without-reference", "summed-over-vocabulary", "prompt-counted", "whitened-across-prompts"),
    *("advantage-with-gradient", "old-policy-recomputed", "kl-wrong-sign", "end-not-counted"),
)


@dataclass(frozen=True)
class BreakConfig:
    """Which failure the demo shows."""

    break_: Literal["none", *BREAK_NAMES] = "none"  # the failure to show, in place of the demo


def demo(broken: BreakConfig, lora: LoraConfig, config: SftConfig, exam: AnswerConfig, run: RunConfig) -> None:
    """Teach the course model to follow instructions with LoRA, and show what it gained, forgot and weighs."""
    if broken.break_ != "none":
        from adaptation_failures import BREAKS  # here, because they import this module
        from preference_failures import PREFERENCE_BREAKS

        show, seconds = (BREAKS | PREFERENCE_BREAKS)[broken.break_]
        announce(f"showing the failure {broken.break_!r}", seconds)
        for what, sound, wrong in show(run):
            print(f"{what}: {sound:.4g} as it should be, {wrong:.4g} with --break {broken.break_}")
        return
    model, before, after = adapted(MethodConfig("lora"), lora, config, exam, run)
    show_table({"before": before, "after": after})
    show_weight(model)
    save_adapter(model, run.out / "adapter", base=shown(FOLDER))
    folder = shown(run.out / "adapter")
    print(
        f"the adapter is in {folder}, in PEFT's format; go on: python {shown(Path(__file__))} merge --adapter {folder}"
    )


def adapted(
    how: MethodConfig, lora: LoraConfig, config: SftConfig, exam: AnswerConfig, run: RunConfig
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The course model, examined, adapted, trained and examined again."""
    announce(
        f"fine-tune the course model by {how.method!r}, {config.max_steps} steps of {config.batch_size} dialogues",
        0.12 * config.max_steps + 0.04 * exam.n_questions * len(INSTRUCT) + 10,
    )
    seed_everything(run.seed)
    model, tokenizer = load_course_model()
    model = model.to(pick_device(run.device))
    before = examine_answers(model, tokenizer, exam)
    model = adapt(model, tokenizer, how, lora)
    fine_tune(model, tokenizer, config, how, run.seed)
    return model, before, examine_answers(model, tokenizer, exam)


def show_table(reports: dict[str, dict[str, Any]]) -> None:
    """Accuracy by category of some reports, beside guessing and the best possible."""
    chance = guessing()
    print(f"{'held-out':10}" + "".join(f"{name:>10}" for name in reports) + f"{'guessing':>10}{'best':>10}")
    for category in INSTRUCT:
        cells = "".join(f"{report['accuracy'][category]:10.1%}" for report in reports.values())
        print(f"{category:10}{cells}{chance[category]:10.1%}{1:10.1%}")
    means = "".join(f"{report['mean']:10.1%}" for report in reports.values())
    print(f"{'mean':10}{means}{sum(chance.values()) / len(chance):10.1%}{1:10.1%}")
    for name, what in (("answer_gap", "right answers"), ("gap", "held-out pretraining documents")):
        gaps = "".join(f"{report[name]:10.4f}" for report in reports.values())
        print(f"{name:10}{gaps}{'':10}{0:10.4f}   nats per token above the floor, {what}")


def show_weight(model: nn.Module) -> None:
    trained, base = trained_parameters(model), base_parameters()
    print(
        f"trained: {trained:,} numbers, {trained / base:.1%} of the course model's {base:,}; AdamW's state takes "
        f"{8 * trained / 2**20:.2f} MiB, the weights {weight_bytes(model) / 2**20:.2f} MiB"
    )


def base_parameters() -> int:
    """Weights of the course model; a quantised one no longer counts its own, whose codes are no parameters."""
    return sum(parameter.numel() for parameter in load_course_model()[0].parameters())


@alone
def sft(how: MethodConfig, lora: LoraConfig, config: SftConfig, exam: AnswerConfig, run: RunConfig) -> None:
    """Fine-tune the course model on instructions by any method; save a model or, for LoRA and DoRA, an adapter."""
    model, before, after = adapted(how, lora, config, exam, run)
    show_table({"before": before, "after": after})
    show_weight(model)
    if adapted_layers(model):
        save_adapter(model, run.out / "adapter", base=shown(FOLDER))
        print(f"the adapter is in {shown(run.out / 'adapter')}")
    elif how.method in ("full", "layerwise"):
        save_model(model, load_course_model()[1], run.out / "model")
    else:
        print(f"no folder format of this course holds what {how.method!r} trains: nothing is saved")


def save_model(model: CausalLM, tokenizer: CourseTokenizer, folder: Path) -> None:
    with_end(model, tokenizer.im_end_id).save_pretrained(folder)
    tokenizer.save_folder(folder)
    print(f"the model is in {shown(folder)}")


@dataclass(frozen=True)
class AdapterConfig:
    """Which model, and which adapter on it."""

    checkpoint: Path | None = None  # a folder with a model; without one, the course model
    adapter: Path | None = None  # a folder with an adapter in PEFT's format

    def load(self) -> tuple[CausalLM, CourseTokenizer]:
        model, tokenizer = load_course_model(self.checkpoint or FOLDER)
        if self.adapter:
            load_adapter(model, self.adapter)
        return model, tokenizer


def evaluate(chosen: AdapterConfig, exam: AnswerConfig, run: RunConfig) -> None:
    """Examine a model, with an adapter or without: accuracy by category, and the gap on pretraining documents."""
    announce(f"ask {exam.n_questions} instructions of each category", 5 + 0.02 * exam.n_questions * len(INSTRUCT))
    model, tokenizer = chosen.load()
    model = model.to(pick_device(run.device))
    show_table({"now": examine_answers(model, tokenizer, exam)})
    asked = World().instructions(len(INSTRUCT), run.seed, exam.exam_split)
    for item, text in zip(asked, respond(model, tokenizer, [join(item.prompt) for item in asked]), strict=True):
        print(f"  {join(item.prompt)} -> {text}{'' if item.check(words(text)) else '   (wrong)'}")


@alone
def merge_folder(chosen: AdapterConfig, run: RunConfig) -> None:
    """Add an adapter to its base model and save the whole as one Llama folder."""
    if not chosen.adapter:
        raise ValueError("merge needs --adapter, a folder such as the one that sft writes")
    model, tokenizer = chosen.load()
    save_model(fold(model), tokenizer, run.out / "merged")


def main(argv: list[str] | None = None) -> None:
    from adaptation_experiments import FiguresConfig, bench, figures  # here, because they import this module
    from chat_model import ChatConfig, TalkConfig, chat, talk
    from preference_experiments import PREFERENCE_VERBS

    training = (LoraConfig, SftConfig, AnswerConfig, RunConfig)
    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, BreakConfig, *training),
        "sft": (sft, MethodConfig, *training),
        "evaluate": (evaluate, AdapterConfig, AnswerConfig, RunConfig),
        "merge": (merge_folder, AdapterConfig, RunConfig),
        **PREFERENCE_VERBS,
        "chat": (chat, ChatConfig, AnswerConfig, RunConfig),
        "talk": (talk, TalkConfig, RunConfig),
        "bench": (bench, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
