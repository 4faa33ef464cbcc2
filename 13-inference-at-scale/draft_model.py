"""Topic 13 - The draft model: a quarter of the chat model's size, taught by it to say what it would say.

    small, tokenizer = load_draft_model()                        # draft/, committed
    python 13-inference-at-scale/inference_at_scale.py draft     # makes it anew

Speculative decoding needs a draft of the same vocabulary that is much cheaper than its target and often agrees with it.
Agreement is one minus half the sum of the differences of two distributions, so the draft learns distributions, by topic
12's distillation, on the chat model's own training conversations.
"""

import copy
import datetime
import json
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chat_model import LONGEST, ChatConfig, chat_rows, load_chat_model
from course_model import ModelSizes, command_line, start_small
from course_tokenizer import CourseTokenizer, load_course_tokenizer
from distillation import DistillConfig, distilled, student_training
from fine_tuning_adaptation import DialogueBatches, replay_documents
from huggingface_folders import WEIGHTS
from llm_config import ModelConfig
from low_rank_adapters import base_sha256
from modern_llm_architectures import Block, CausalLM
from sequence_modeling import IGNORE
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

FOLDER = Path(__file__).parent / "draft"
EXAM_EXAMPLES, EXAM_SEED = 40, 1  # new conversations: instructions of each category, and their seed


def load_draft_model(folder: Path = FOLDER) -> tuple[CausalLM, CourseTokenizer]:
    """The committed draft of the course chat model, or one that `draft` wrote elsewhere; ready to use."""
    return CausalLM.from_pretrained(folder).eval(), load_course_tokenizer()


@dataclass(frozen=True)
class DraftConfig:
    """The shape of the draft and how long it is taught."""

    d_model: int = 64  # width
    n_layers: int = 1  # blocks
    d_ff: int = 176  # hidden width of the feed-forward network
    max_steps: int = 1500  # optimizer steps
    draft_batch: int = 16  # conversations and documents of a step
    learning_rate: float = 1e-2  # the peak, for Muon
    n_examples: int = 800  # instructions of each category
    replay: float = 0.25  # fraction of each batch that is pretraining documents

    def __post_init__(self) -> None:
        check_range(self, "max_steps", least=2)
        check_range(self, "draft_batch", "n_examples", least=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "replay", least=0, below=1)
        self.sizes()

    def sizes(self) -> ModelSizes:
        return ModelSizes(self.d_model, self.n_layers, n_heads=2, n_kv_heads=1, d_ff=self.d_ff)


def conversation_batches(config: DraftConfig, tokenizer: CourseTokenizer, seed: int) -> DialogueBatches:
    """Conversations as the chat model was taught them, with documents between; the loss counts answers."""
    rows = chat_rows(tokenizer, ChatConfig(n_examples=config.n_examples), seed)
    documents = replay_documents(tokenizer, 4000, seed, LONGEST) if config.replay else ()
    return DialogueBatches(rows, config.draft_batch, seed, LONGEST, documents, config.replay)


def train_draft(target: CausalLM, tokenizer: CourseTokenizer, config: DraftConfig, seed: int) -> CausalLM:
    """A small model taught the target's distributions at every token of an answer."""
    seed_everything(seed)
    draft = start_small(CausalLM(config.sizes().config(tokenizer))).to(next(target.parameters()).device)
    training = student_training(config.max_steps, config.learning_rate, config.draft_batch, LONGEST)
    return distilled(draft, target, conversation_batches(config, tokenizer, seed), DistillConfig(), training)


@torch.no_grad()
def agreement(target: CausalLM, draft: CausalLM, batches: DialogueBatches, n_batches: int = 8) -> float:
    """Mean probability that a token of the draft is accepted, at temperature 1: the overlap of the two distributions.

    Leviathan et al. 2023 (arXiv 2211.17192), corollary 3.6: sum over the vocabulary of min(p, q).
    """
    found = []
    for step in range(n_batches):
        batch = batches(step)
        counted = batch["targets"] != IGNORE  # (batch, seq)
        p, q = (model(batch["inputs"])[counted].softmax(dim=-1) for model in (target, draft))  # (counted, vocab)
        found.append(torch.minimum(p, q).sum(dim=-1))
    return torch.cat(found).mean().item()


@alone
def draft(config: DraftConfig, run: RunConfig) -> None:
    """Teach a small model to speak like the chat model, for speculative decoding; save it as a folder with a card."""
    announce(f"distil the chat model into a draft, {config.max_steps:,} steps", 15 + 0.15 * config.max_steps)
    target, tokenizer = load_chat_model()
    target.to(pick_device(run.device))
    before = time.process_time()
    made = train_draft(target, tokenizer, config, run.seed)
    facts = {"cpu_seconds": time.process_time() - before, "steps": config.max_steps, "command": command_line()}
    facts |= {"machine": describe_machine(), "date": datetime.date.today().isoformat()}
    report = save_draft(made, target, tokenizer, run.out / "draft", facts)
    print(f"accepted at temperature 1, on new conversations: {report['acceptance']:.1%} of its tokens")
    print(f"the draft is in {shown(run.out / 'draft')}")


def save_draft(
    made: CausalLM, target: CausalLM, tokenizer: CourseTokenizer, folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the draft as a Llama folder, its measured acceptance in report.json, and a card. Returns the report."""
    made.save_pretrained(folder)
    fresh = conversation_batches(DraftConfig(n_examples=EXAM_EXAMPLES), tokenizer, EXAM_SEED)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (made, target)]
    report = facts | {
        "acceptance": agreement(target, made, fresh),
        "parameters": sizes[0],
        "target_parameters": sizes[1],
    }
    report |= {
        "weights_sha256": sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "target_sha256": base_sha256(target),
    }
    lines = [
        "# The draft of the course chat model",
        "",
        f"A Llama with {sizes[0]:,} parameters beside the {sizes[1]:,} of "
        "[the course chat model](../../11-fine-tuning-adaptation/model/README.md), whose tokenizer it uses, made by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['steps']:,} steps and {report['cpu_seconds']:.0f} s of CPU ({report['machine']}, "
        f"{report['date']}) from the chat model's distributions on its training conversations and on documents.",
        "",
        "**Use**: to guess tokens that the chat model then checks. On new conversations, at temperature 1, "
        f"{report['acceptance']:.1%} of its tokens would be accepted.",
        "",
        f"`model.safetensors`: sha256 `{report['weights_sha256']}`; weights of the target: `{report['target_sha256']}`",
    ]
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())
    return report


# A target that is dear


class AddsNothing(Block):
    """A block whose two outputs are 0: it costs what a block costs, and changes no number of the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        for output in (self.self_attn.out_proj, self.ffn.down_proj):
            nn.init.zeros_(output.weight)


def made_dearer(model: CausalLM, n_blocks: int) -> CausalLM:
    """A copy with n_blocks further blocks that add nothing: the same function, bit for bit, at a larger model's price.

    So the gain of a draft can be measured in seconds where a target that needs speculation would not fit.
    """
    dear = copy.deepcopy(model)
    extra = [AddsNothing(model.config, layer) for layer in range(n_blocks)]
    dear.blocks.extend(block.to(next(model.parameters())) for block in extra)
    dear.config = replace(model.config, n_layers=model.config.n_layers + n_blocks)
    return dear.eval()
