"""Topic 11 - Adaptation failures: slips that keep every shape and raise no error, each switched on and measured.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py --break alpha-without-rank   # one of them
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures adaptation-breaks    # all, the chapter's table

Each entry of BREAKS is name -> (function(run), seconds); the function returns rows (what, as it should be, with the
failure). The course's own functions refuse most of these, so the slips are made around them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from chat_model import load_chat_model
from course_model import load_course_model, upto
from course_tokenizer import Chat, CourseTokenizer
from fine_tuning_adaptation import (
    AnswerConfig,
    DialogueBatches,
    MethodConfig,
    SftConfig,
    adapt,
    answer_gap,
    answer_loss,
    category_accuracy,
    encode_dialogues,
    everything_trained,
    fine_tune,
    prompt_ids,
    training_dialogues,
    with_end,
)
from gpt2 import SamplingConfig, left_padded
from low_rank_adapters import LoraConfig, adapted_layers, add_adapters, merge
from modern_llm_architectures import CausalLM
from packing import language_model_loss
from prompt_tuning import trained_parameters
from sequence_modeling import IGNORE
from tiny_world import World, join, words
from training_transformers import fit
from workbench import Column, RunConfig, seed_everything

if TYPE_CHECKING:
    from adaptation_experiments import FiguresConfig

Row = tuple[str, float, float]  # what is measured, as it should be, with the failure
SHORT = SftConfig(max_steps=100, n_instructions=1400)
TWO = SftConfig(max_steps=100, n_instructions=800, categories="refuse,safe")  # short answers, soon learnt
LORA = MethodConfig("lora")


def fresh(run: RunConfig, lora: LoraConfig | None = None) -> tuple[CausalLM, CourseTokenizer]:
    """The course model with LoRA."""
    seed_everything(run.seed)
    model, tokenizer = load_course_model()
    return adapt(model, tokenizer, LORA, lora or LoraConfig()), tokenizer


def trained_on(dialogues: list[Chat], config: SftConfig, run: RunConfig) -> tuple[CausalLM, CourseTokenizer]:
    """LoRA trained on these rows."""
    model, tokenizer = fresh(run)
    batches = DialogueBatches(dialogues, config.batch_size, run.seed, config.seq_len)
    fit(model, batches, answer_loss, config.training("lora"))
    return model.eval(), tokenizer


# The update


def alpha_without_rank(run: RunConfig) -> list[Row]:
    """The update is scaled by alpha where alpha / rank is meant: eight times too large at rank 8."""
    losses = []
    for scale in (None, LoraConfig().lora_alpha):
        model, tokenizer = fresh(run)
        for layer in adapted_layers(model).values():
            layer.scale = layer.scale if scale is None else scale
        losses.append(fine_tune(model, tokenizer, SHORT, LORA, run.seed)[-1]["loss"])
    return [("nats per answer token after 100 steps at LoRA's learning rate", *losses)]


def merged_twice(run: RunConfig) -> list[Row]:
    """A second merge, without a flag that says it was done: the update counts double."""
    model, tokenizer = fresh(run)
    fine_tune(model, tokenizer, TWO, LORA, run.seed)
    batch = DialogueBatches(training_dialogues(tokenizer, TWO, run.seed), 16, run.seed)(0)
    losses = []
    for _ in range(2):
        for layer in adapted_layers(model).values():
            layer.merged = False  # as if nobody had noted it
        merge(model.eval())
        with torch.no_grad():
            loss, count = answer_loss(model, batch)
        losses.append(float(loss / count))
    return [("nats per answer token after one merge, and after two", *losses)]


def nothing_trained(run: RunConfig) -> list[Row]:
    """The model is frozen after the adapters were added, so they are frozen too."""
    model, _ = fresh(run)
    before = trained_parameters(model)
    model.requires_grad_(False)
    return [("trained parameters", before, trained_parameters(model))]


def late_binding(run: RunConfig) -> list[Row]:
    """Layers are patched in a loop by closures over the loop's variable: all of them use the last layer's matrices."""
    shares = []
    for broken in (False, True):
        seed_everything(run.seed)
        model, tokenizer = load_course_model()
        add_adapters(model, LoraConfig(target_modules="gate_proj,up_proj"))
        layers = list(adapted_layers(model).values())
        if broken:
            for layer in layers:
                layer.forward = lambda x, base=layer.base: (
                    base(x) + layer.scale * F.linear(F.linear(x, layer.lora_a), layer.lora_b)  # noqa: B023
                )
        batch = DialogueBatches(training_dialogues(tokenizer, TWO, run.seed), 16, run.seed)(0)
        answer_loss(model, batch)[0].backward()
        shares.append(sum(layer.lora_b.grad is not None for layer in layers) / len(layers))
    return [("share of the adapters that a gradient reaches", *shares)]


def frozen_new_tokens(run: RunConfig) -> list[Row]:
    """LoRA on the blocks alone, where the template's tokens have embeddings that pretraining never trained."""
    losses = []
    for token_rows in (True, False):
        seed_everything(run.seed)
        model, tokenizer = load_course_model()
        how = MethodConfig("lora", token_rows=token_rows)
        log = fine_tune(adapt(model, tokenizer, how, LoraConfig()), tokenizer, SHORT, how, run.seed)
        losses.append(log[-1]["loss"])
    return [("nats per answer token after 100 steps", *losses)]


# The mask


def all_masked(run: RunConfig) -> list[Row]:
    """Prompts fill the rows and the answers are cut off: the mean over no token is 0 / 0, and one step spreads it.

    F.cross_entropy's own mean is NaN too, but its gradient is 0; the mean that is written out by hand has none.
    """
    found = []
    for broken in (False, True):
        model, tokenizer = fresh(run)
        chats = encode_dialogues(tokenizer, World().instructions(8, run.seed, category="read"))
        ids = [torch.tensor(row.ids[: row.trained.index(True)]) for row in chats]
        inputs = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (batch, seq)
        batch = {"inputs": inputs, "targets": torch.full_like(inputs, IGNORE)}
        trained = [part for part in model.parameters() if part.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3)
        if broken:
            mask = (batch["targets"] != IGNORE).float()  # (batch, seq)
            nats = -model(inputs).log_softmax(dim=-1)[..., 0]  # (batch, seq): of any target, none of which counts
            loss = (nats * mask).sum() / mask.sum()
        else:
            total, count = language_model_loss(model, batch)
            loss = total / count.clamp(min=1)
        loss.backward()
        optimizer.step()
        lost = sum(int(part.isnan().sum()) for part in trained) / sum(part.numel() for part in trained)
        found.append((loss.item(), lost))
    return [
        ("loss of a batch without a trained token", found[0][0], found[1][0]),
        ("share of the trained parameters that are NaN after one step", found[0][1], found[1][1]),
    ]


def loss_on_prompt(run: RunConfig) -> list[Row]:
    """No mask: two thirds of the loss, and of the steps, go into predicting what users ask."""
    dialogues = training_dialogues(load_course_model()[1], SHORT, run.seed)
    exam = AnswerConfig(n_questions=30)
    both = (dialogues, everything_trained(dialogues))
    gaps = [answer_gap(*trained_on(rows, SHORT, run), exam) for rows in both]
    return [("nats per token of right answers above the floor, held-out instructions, after 100 steps", *gaps)]


@torch.no_grad()
def written(model: CausalLM, tokenizer: CourseTokenizer, rows: list[list[int]]) -> list[list[int]]:
    """What a model writes after each row, up to 60 ids or its end."""
    token_ids, real = left_padded(rows, tokenizer.pad_id)
    made = with_end(model, tokenizer.im_end_id).generate(token_ids, SamplingConfig(60, temperature=0.0), real)
    return made.tolist()


def end_not_trained(run: RunConfig) -> list[Row]:
    """The mask covers the answer's words but not <|im_end|>: the model answers, and goes on."""
    tokenizer = load_course_model()[1]
    dialogues = training_dialogues(tokenizer, TWO, run.seed)
    endless = [Chat(row.ids, [*row.trained[:-1], False]) for row in dialogues]
    asked = [prompt_ids(tokenizer, join(item.prompt)) for item in World().instructions(40, 7, "content", "safe")]
    shares = []
    for rows in (dialogues, endless):
        made = written(trained_on(rows, TWO, run)[0], tokenizer, asked)
        shares.append(sum(tokenizer.im_end_id in ids for ids in made) / len(made))
    return [("share of the answers that end within 60 tokens", *shares)]


ASKED = ("read", "sum")


def other_template(run: RunConfig) -> list[Row]:
    """The chat model is asked as "User: ... Assistant:", not in the words of its template."""
    model, tokenizer = load_chat_model()
    exam = AnswerConfig(n_questions=40)
    sound = category_accuracy(model, tokenizer, exam, ASKED)
    right = 0
    for name in ASKED:
        asked = World().instructions(exam.n_questions, exam.exam_seed, exam.exam_split, name)
        rows = [[tokenizer.bos_id, *tokenizer.encode(f"User: {join(item.prompt)} Assistant:")] for item in asked]
        texts = [tokenizer.decode(upto(ids, tokenizer.im_end_id)) for ids in written(model, tokenizer, rows)]
        right += sum(item.check(words(text)) for item, text in zip(asked, texts, strict=True))
    wrong = right / (exam.n_questions * len(ASKED))
    return [("right answers to held-out questions", sum(sound.values()) / len(sound), wrong)]


@torch.no_grad()
def packed_together(run: RunConfig) -> list[Row]:
    """Dialogues share a row without a mask between them: each reads the ones before it."""
    model, tokenizer = fresh(run)
    dialogues = training_dialogues(tokenizer, SHORT, run.seed)
    packed, padded = (DialogueBatches(dialogues, 16, run.seed, seq_len)(0) for seq_len in (96, 0))
    mixed = {name: part for name, part in packed.items() if name != "document_ids"}
    alone, sound, broken = (float(answer_loss(model, batch)[0]) for batch in (padded, packed, mixed))
    return [("nats of a packed batch, less those of the same dialogues alone", sound - alone, broken - alone)]


BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {  # name -> function, seconds
    "alpha-without-rank": (alpha_without_rank, 16),
    "merged-twice": (merged_twice, 8),
    "nothing-trained": (nothing_trained, 1),
    "late-binding": (late_binding, 2),
    "frozen-new-tokens": (frozen_new_tokens, 16),
    "all-masked": (all_masked, 2),
    "loss-on-prompt": (loss_on_prompt, 16),
    "end-not-trained": (end_not_trained, 16),
    "other-template": (other_template, 5),
    "packed-together": (packed_together, 2),
}


def breaks(config: "FiguresConfig", run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = [[f"`{name}`", *row] for name, (show, _) in BREAKS.items() for row in show(run)]
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save("adaptation-breaks", columns, rows, "adaptation-breaks", n_seeds=1)


FAILURE_EXPERIMENTS = {"adaptation-breaks": (breaks, 80)}
