"""Topic 11 - Fine-Tuning and Adaptation: a model that continues texts learns to answer, with all its weights or few.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py                              # LoRA on the course model
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py sft --method dora            # any method, saved in --out
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py --break alpha-without-rank   # a failure, measured

Wei et al. 2022 (FLAN, arXiv 2109.01652), Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), Howard and Ruder 2018
(ULMFiT, arXiv 1801.06146: discriminative rates), Kirkpatrick et al. 2017 (EWC, arXiv 1612.00796).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_model import gaps_by_kind, upto
from course_tokenizer import Chat, CourseTokenizer
from gpt2 import SamplingConfig, left_padded
from packing import Batch, EpochOrder, pack
from sequence_modeling import IGNORE, device_of
from tiny_world import INSTRUCT, INSTRUCTION_SPLITS, Document, Instruction, World, join, words
from workbench import check_name, check_range

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


def prompt_ids(tokenizer: CourseTokenizer, prompt: str) -> list[int]:
    """A question as a model of dialogues expects it: up to where the assistant begins to speak."""
    return tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True).ids


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
    documents = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
    counted = batch["targets"] != IGNORE  # (batch, seq)
    logits = model.logits(model.hidden(batch["inputs"], **documents)[counted])  # (tokens, vocab)
    return F.cross_entropy(logits.float(), batch["targets"][counted], reduction="sum"), counted.sum()


def everything_trained(dialogues: Sequence[Chat]) -> list[Chat]:
    """The same dialogues with a loss on the question too, for comparison."""
    return [Chat(row.ids, [True] * len(row.ids)) for row in dialogues]


def mixture(n_examples: dict[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Shares of the tasks of a multi-task mixture: n^(1/T) / sum n^(1/T) (Raffel et al. 2020, section 3.5.2).

    T = 1 draws in proportion to the examples, T to infinity draws all tasks alike.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; 1 draws in proportion to the examples")
    weights = {name: n ** (1 / temperature) for name, n in n_examples.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


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
    prompts: Sequence[str],
    sampling: SamplingConfig = SamplingConfig(90, temperature=0.0),  # noqa: B008 - frozen
    seed: int = 0,
) -> list[str]:
    """What the model answers to each prompt, as text up to <|im_end|>; greedy unless `sampling` says otherwise."""
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


def examine_answers(model: nn.Module, tokenizer: CourseTokenizer, config: AnswerConfig) -> dict[str, Any]:
    """Accuracy by category, their mean, and the gap on pretraining documents."""
    accuracy = category_accuracy(model, tokenizer, config)
    mean = sum(accuracy.values()) / len(accuracy)
    return {"accuracy": accuracy, "mean": mean, "gap": forgetting(model, tokenizer, config)}
