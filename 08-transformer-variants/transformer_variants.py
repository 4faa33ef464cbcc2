"""Topic 08 - Transformer variants: the encoder, the decoder and the encoder-decoder, for text and for images.

python 08-transformer-variants/transformer_variants.py                      # the demo: three objectives, one budget
python 08-transformer-variants/transformer_variants.py pretrain --model bert    # train one kind of model and keep it
python 08-transformer-variants/transformer_variants.py fill "The [MASK] sing because they were sad."
python 08-transformer-variants/transformer_variants.py generate "One day" --checkpoint path/to/gpt2   # any folder
python 08-transformer-variants/transformer_variants.py figures             # every experiment of the chapter
python 08-transformer-variants/transformer_variants.py --help

Papers: Devlin et al. 2019 (arXiv 1810.04805), BERT; Radford et al. 2019, GPT-2; Raffel et al. 2020 (arXiv 1910.10683),
T5; Dosovitskiy et al. 2021 (arXiv 2010.11929), ViT; the modules named below give the others.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import causal_mask
from bert_family import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    Electra,
    ElectraConfig,
    ElectraDiscriminator,
    ElectraGenerator,
    MaskingConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    electra_loss,
    join_pair,
    mask_tokens,
    next_sentence,
    sentence_order,
)
from building_from_scratch import check_known
from byte_level_bpe import ByteLevelBPE
from contrastive import clip_loss, info_nce
from efficient_attention import (
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SparseAttention,
    bigbird_pattern,
    linformer_attention,
    longformer_pattern,
    performer_attention,
    sparse_attention,
)
from gpt2 import GPT2, GPT2Config, SamplingConfig, keep_likely, left_padded
from huggingface_folders import FolderModel, read_config
from packing import to_device
from sequence_modeling import BOS_ID, EOS_ID
from t5 import (
    T5,
    Bart,
    BartConfig,
    EncoderDecoder,
    SpanConfig,
    T5Config,
    corrupt_spans,
    draw_spans,
    infill_spans,
    restore_spans,
)
from tiny_world import SPECIAL_TOKENS, join, words
from training_transformers import TrainConfig, fit
from transformer_architecture import check_length
from variant_pretraining import (
    HELD_OUT_SEED,
    SENTINELS,
    VARIANTS,
    FillScore,
    FinetuneConfig,
    MaskedBatches,
    Slot,
    Trained,
    VariantConfig,
    VariantMasking,
    acceptability,
    class_accuracy,
    fill_in,
    fit_classes,
    pretrain_for,
    read_classes,
    recall_slots,
    score,
    slots,
    step_flops,
    text_corpus,
    train_tokenizer,
    word_world,
    world_corpus,
)
from vision_transformer import (
    DigitsConfig,
    DistilledVisionTransformer,
    VisionConfig,
    VisionTransformer,
    classify_image,
    fit_classifier,
    image_accuracy,
    load_digits_images,
)
from workbench import (
    ROOT,
    RunConfig,
    alone,
    announce,
    check_name,
    check_range,
    describe_machine,
    pick_device,
    run_verbs,
    save_figure,
    seed_everything,
    shown,
    speed_ratio,
    time_in_turns,
    write_atomically,
)

__all__ = [  # fmt: skip
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForPreTraining",
    "Bart",
    "BartConfig",
    "BertConfig",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "DistilledVisionTransformer",
    "Electra",
    "ElectraConfig",
    "ElectraDiscriminator",
    "ElectraGenerator",
    "FolderModel",
    "GPT2",
    "GPT2Config",
    "LinformerAttention",
    "LongformerAttention",
    "MaskingConfig",
    "PerformerAttention",
    "RobertaConfig",
    "RobertaForMaskedLM",
    "SamplingConfig",
    "SpanConfig",
    "SparseAttention",
    "T5",
    "T5Config",
    "VisionConfig",
    "VisionTransformer",
    "bigbird_pattern",
    "clip_loss",
    "corrupt_spans",
    "draw_spans",
    "electra_loss",
    "infill_spans",
    "info_nce",
    "join_pair",
    "keep_likely",
    "left_padded",
    "linformer_attention",
    "longformer_pattern",
    "mask_tokens",
    "next_sentence",
    "performer_attention",
    "restore_spans",
    "sentence_order",
    "sparse_attention",
]
SCRIPT = Path(__file__).resolve()
KINDS: dict[str, type[FolderModel]] = {  # the class of a Hugging Face architecture -> ours
    kind.architecture: kind
    for kind in (
        *(BertForMaskedLM, BertForPreTraining, BertForSequenceClassification),
        *(RobertaForMaskedLM, AlbertForMaskedLM, AlbertForPreTraining, ElectraGenerator, ElectraDiscriminator),
        *(GPT2, T5, Bart, VisionTransformer, DistilledVisionTransformer),
    )
}
GAP = re.compile(r"\[MASK\]|\[mask\]|<mask>|<extra_0>|<extra_id_0>")  # how a reader may write a gap
CHOICES = (*VARIANTS, "vit")


# What the verbs are asked


@dataclass(frozen=True)
class DemoConfig:
    """The comparison of the demo."""

    gflops: float = 90.0  # billions of floating-point operations for each of the three trainings
    batch_size: int = 8  # documents in a step
    n_slots: int = 100  # held-out documents with one word hidden, and questions about stories

    def __post_init__(self) -> None:
        check_range(self, "gflops", above=0)
        check_range(self, "batch_size", "n_slots", least=1)


Failure = Literal[
    "none",
    "conv1d",
    "roberta-positions",
    "patch-order",
    "one-sided-rows",
    "unit-rows",
    "global-twice",
    "nucleus-order",
]


@dataclass(frozen=True)
class BreakConfig:
    """Which failure the demo switches on; `BREAKS` in variant_failures holds them."""

    break_: Failure = "none"  # the failure to show, in place of the comparison


@dataclass(frozen=True)
class PretrainConfig:
    """Which model to pretrain, and how long."""

    model: str = "bert"  # bert, roberta, albert, electra, gpt2, t5, bart or vit (the last on images of digits)
    data: str = "tiny-world"  # tiny-world, python-text, a text file, or a data set on the Hugging Face Hub
    vocab_size: int = 1000  # tokens of the tokenizer that is trained for other data than tiny-world
    max_steps: int = 2000  # optimizer steps
    batch_size: int = 16  # documents in a step
    learning_rate: float = 0.0  # the peak; 0 means the rate that suits this kind of model
    save_every: int = 500  # steps between checkpoints
    n_slots: int = 100  # held-out documents with one word hidden, and questions, to examine the model with
    resume: bool = False  # go on from the newest checkpoint

    def __post_init__(self) -> None:
        check_name("model", self.model, CHOICES)
        check_range(self, "max_steps", "batch_size", "save_every", "n_slots", "vocab_size", least=1)
        check_range(self, "learning_rate", least=0)


@dataclass(frozen=True)
class PromptConfig:
    """What to ask, and whom."""

    text: tuple[str, ...] = ()  # the text, or an image file to classify
    model: str = ""  # which pretrained model in --out to ask; empty means the usual one of the verb
    checkpoint: Path | None = None  # a Hugging Face folder with its tokenizer, in place of a model in --out
    n_best: int = 5  # answers to show

    def __post_init__(self) -> None:
        check_range(self, "n_best", least=1)
        if self.model:
            check_name("model", self.model, (*CHOICES, "classifier"))


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark times."""

    n_rounds: int = 5  # timed rounds, ours and theirs in turns
    batch_size: int = 4  # sequences in a batch
    seq_len: int = 64  # tokens in a sequence
    max_new_tokens: int = 24  # length of a generated text

    def __post_init__(self) -> None:
        check_range(self, "n_rounds", "batch_size", "seq_len", "max_new_tokens", least=1)


# Folders with a tokenizer


def save_tokenizer(folder: Path, kind: str, trained: ByteLevelBPE | None = None) -> None:
    """Write tokenizer.json for Hugging Face's library: TinyWorld's words, or a trained byte-level BPE.

    It puts <bos> before a text, or <eos> after it for the encoder-decoders.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    if trained is not None:
        trained.save(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        tokenizer = Tokenizer(models.WordLevel(word_world()[1].ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|\w+|[^\w\s]"), "removed", invert=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":"), decoders.Fuse()]
        )
        special = [*SPECIAL_TOKENS, *SENTINELS]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ends = kind in ("t5", "bart")
    template, token = ("$A <eos>", ("<eos>", EOS_ID)) if ends else ("<bos> $A", ("<bos>", BOS_ID))
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[token])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk", "mask")}
    inputs = ["input_ids", "attention_mask"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **names}
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode() + b"\n")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by Hugging Face's library. Raises ValueError if the folder has none that loads."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer("\u2603")  # one without its token for the unknown loads, and fails at the first unknown word
        return tokenizer
    except Exception as error:  # their loaders raise whatever they meet; for the reader it is one fact
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{shown(folder)} has no tokenizer that loads ({reason}); copy its tokenizer.json there"
        ) from None


def class_for(folder: Path, wanted: tuple[type, ...] = ()) -> type[FolderModel]:
    """Our class for the model in a folder, by its architecture, or by its model_type if that names none of ours.

    `wanted` are the classes that suit the purpose: a BertForPreTraining folder can serve as a BertForMaskedLM. Raises
    ValueError with the closest name for a kind of model that this topic has not.
    """
    config = read_config(folder)
    named = next(iter(config.get("architectures") or []), None)
    families = {kind.model_type: kind for kind in reversed(KINDS.values())}
    if named in KINDS:
        found = KINDS[named]
    else:
        found = families[check_name("model_type", str(config.get("model_type")), families)]
    for kind in wanted:
        if issubclass(found, kind) or kind.model_type == found.model_type:
            return found if issubclass(found, kind) else kind
    if wanted:
        names = ", ".join(dict.fromkeys(kind.model_type for kind in wanted))
        raise ValueError(f"{shown(folder)} holds a {named or found.model_type}; this verb needs one of: {names}")
    return found


def open_model(prompt: PromptConfig, usual: str, wanted: tuple[type, ...], run: RunConfig) -> tuple[FolderModel, Path]:
    """The model that a verb asks, and its folder. Raises ValueError if it is not there, saying how to make it."""
    name = prompt.model or usual
    folder = prompt.checkpoint or run.out / name
    if not prompt.checkpoint and not (folder / "config.json").exists():
        verb = "finetune" if name == "classifier" else f"pretrain --model {name}"
        raise ValueError(
            f"no model in {shown(folder)}; make one with: python {shown(SCRIPT)} {verb}, or give --checkpoint"
        )
    return class_for(folder, wanted).from_pretrained(folder).to(pick_device(run.device)), folder


def text_of(prompt: PromptConfig, example: str) -> str:
    text = " ".join(prompt.text).strip()
    if not text:
        raise ValueError(f"nothing to read; give a text in quotes, such as: {example}")
    return text


def speaks_tiny_world(tokenizer: Any) -> bool:
    return tokenizer.get_vocab() == word_world()[1].ids


def encode(text: str, tokenizer: Any, model: FolderModel) -> Tensor:
    """Ids (1, seq) of a text. Raises ValueError for words that the tokenizer does not know, and for too long a text."""
    ids = tokenizer(text)["input_ids"]
    if speaks_tiny_world(tokenizer):
        check_known(tuple(words(text)), word_world()[1])
    if not ids:
        raise ValueError(f"{text!r} holds no token of this model's vocabulary; give some words")
    limit = getattr(model.config, "max_seq_len", None)
    if limit is not None and len(ids) > limit:
        raise ValueError(f"the text has {len(ids)} tokens; this model reads at most {limit}")
    return torch.tensor([ids], device=next(model.parameters()).device)


# Answers


def fill_text(model: FolderModel, tokenizer: Any, text: str, n_best: int) -> list[list[tuple[str, float]]]:
    """For every gap of a text the most likely fillings, each with its probability, the best first.

    A gap is written [MASK], <mask> or <extra_0>. A masked model answers for all gaps in one pass, each as if it were
    alone; an encoder-decoder writes one text for each gap, with the probability of all that it writes.
    Raises ValueError for a text without a gap and for a tokenizer that has no token for one.
    """
    n_gaps = len(GAP.findall(text))
    if not n_gaps:
        raise ValueError('the text has no gap; write [MASK] for the missing word, such as: fill "The [MASK] sings."')
    if isinstance(model, EncoderDecoder):
        return fill_by_writing(model, tokenizer, text, n_gaps)
    if tokenizer.mask_token_id is None:
        raise ValueError("this tokenizer has no mask token; it does not belong to a masked language model")
    token_ids = encode(GAP.sub(tokenizer.mask_token.replace("\\", r"\\"), text), tokenizer, model)  # (1, seq)
    with torch.no_grad():
        chances = model(token_ids)[0].softmax(dim=-1)[token_ids[0] == tokenizer.mask_token_id]  # (gaps, vocab)
    best = chances.topk(min(n_best, chances.shape[1]))
    return [
        [(tokenizer.decode([index]).strip(), chance) for index, chance in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def fill_by_writing(model: EncoderDecoder, tokenizer: Any, text: str, n_gaps: int) -> list[list[tuple[str, float]]]:
    known = tokenizer.get_vocab()
    form = next((form for form in ("<extra_id_{}>", "<extra_{}>") if form.format(n_gaps) in known), None)
    if form is None:
        raise ValueError(f"this tokenizer has no {n_gaps + 1} sentinels such as <extra_id_0>; leave fewer gaps")
    numbers = iter(range(n_gaps))
    source = encode(GAP.sub(lambda match: form.format(next(numbers)), text), tokenizer, model)  # (1, src)
    answer = model.generate(source, SamplingConfig(8 * n_gaps + 2, temperature=0))[0]  # (new)
    inputs = F.pad(answer[:-1], (1, 0), value=model.config.start_id)[None]  # (1, new)
    with torch.no_grad():
        log_probs = model(source, inputs)[0].log_softmax(dim=-1)  # (new, vocab)
    nats = log_probs.gather(1, answer[:, None])[:, 0]  # (new)
    sentinels = [known[form.format(index)] for index in range(n_gaps + 1)]
    found: list[list[tuple[str, float]]] = []
    for index in range(n_gaps):
        after = (answer == sentinels[index]).nonzero()
        if not len(after):
            found.append([("", 0.0)])
            continue
        start = after[0].item() + 1
        ends = [place for place in range(start, len(answer)) if answer[place] in (*sentinels, model.config.eos_id)]
        end = ends[0] if ends else len(answer)
        chance = nats[start : end + 1].sum().exp().item()  # the end of the gap is part of the answer
        found.append([(tokenizer.decode(answer[start:end].tolist()).strip(), chance)])
    return found


def world_says(text: str) -> dict[str, float] | None:
    """The exact posterior of the one gap of a TinyWorld document, or None if the text is not one with one gap."""
    tokens = words(GAP.sub(" <mask> ", text))
    if tokens.count("<mask>") != 1:
        return None
    world, position = word_world()[0], tokens.index("<mask>")
    for complete in ([*tokens, "<eos>"], tokens):
        try:
            return world.fill_in(complete, position)
        except ValueError:  # not a document; perhaps the beginning of one
            continue
    return None


# Figures


def plot_families(n: int = 6) -> Figure:
    """Who may attend to whom in the three families: rows are queries, columns are keys, dark is allowed."""
    future = causal_mask(n).float()
    halves = torch.zeros(n, n)
    half = n // 2
    halves[:half, :half], halves[half:, half:], halves[half:, :half] = 1.0, causal_mask(n - half).float(), 0.5
    panels = {"encoder": torch.ones(n, n), "decoder": future, "encoder-decoder": halves}
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9))
    for axis, (title, allowed) in zip(axes, panels.items(), strict=True):
        axis.imshow(allowed.numpy(), cmap="Blues", vmin=0, vmax=1.3)
        axis.set(title=title, xlabel="key", xticks=range(n), yticks=range(n))
    axes[0].set_ylabel("query")
    axes[2].axhline(half - 0.5, color="black", lw=1)
    axes[2].set_xlabel("key (light: cross-attention)")
    return figure


def plot_scores(rows: dict[str, list[FillScore]]) -> Figure:
    """Expected surprisal of each model in the gaps, every seed a dot, above the entropy that no model can beat."""
    figure, axis = plt.subplots(figsize=(6.4, 0.55 * len(rows) + 1.4))
    best = next(iter(rows.values()))[0].best_nats
    for place, found in enumerate(rows.values()):
        nats = [item.nats for item in found]
        axis.plot(nats, [place] * len(nats), "o", ms=4, color=f"C{place}")
        axis.barh(place, sum(nats) / len(nats), color=f"C{place}", alpha=0.35, height=0.6)
    axis.axvline(best, color="black", ls="--", lw=1, label=f"the world's exact posterior, {best:.3f}")
    axis.set(xlabel="nats per gap", yticks=range(len(rows)), yticklabels=list(rows))
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    return figure


def print_scores(trained: dict[str, Trained], n_slots: int) -> dict[str, FillScore]:
    """Fill-in and recall of each model, as a table on the screen."""
    found, places, stories = {}, slots(n_slots), recall_slots(n_slots)
    print(f"\n{'model':8} {'steps':>6} {'fill-in':>8} {'nats':>7} {'gap':>7} {'recall':>8}")
    for name, item in trained.items():
        asked = item.model.generator if isinstance(item.model, Electra) else item.model
        found[name] = score(fill_in(asked, places), places)
        recall = score(fill_in(asked, stories), stories)
        line = f"{found[name].accuracy:8.1%} {found[name].nats:7.3f} {found[name].gap:7.3f} {recall.accuracy:8.1%}"
        print(f"{name:8} {item.steps:6} {line}")
    best, uniform = next(iter(found.values())), math.log(len(word_world()[1]))
    print(f"{'optimum':8} {'':6} {best.best_accuracy:8.1%} {best.best_nats:7.3f} {0:7.3f} {1:8.1%}")
    print(f"{'uniform':8} {'':6} {math.exp(-uniform):8.1%} {uniform:7.3f} {uniform - best.best_nats:7.3f}")
    return found


# The verbs


def demo(broken: BreakConfig, config: DemoConfig, sizes: VariantConfig, run: RunConfig) -> None:
    """Give an encoder, a decoder and an encoder-decoder the same data and FLOPs; let all fill the same gaps."""
    if broken.break_ != "none":
        from variant_failures import show  # here: the comparison needs none of it

        what, sound, wrong = show(broken.break_)
        print(f"{what}: {sound:.4g} as it should be, {wrong:.4g} with --break {broken.break_}")
        return
    seconds = 3 * config.gflops / GFLOPS_PER_SECOND + 0.15 * config.n_slots
    announce(f"train BERT, GPT-2 and T5 with {config.gflops:g} GFLOPs each, fill {2 * config.n_slots} gaps", seconds)
    names = ("bert", "gpt2", "t5")
    device = pick_device(run.device)
    trained = {
        name: pretrain_for(name, sizes, 1e9 * config.gflops, config.batch_size, run.seed, device) for name in names
    }
    found = print_scores(trained, config.n_slots)
    slot = max(slots(config.n_slots), key=lambda slot: len(slot.posterior) if len(slot.posterior) < 9 else 0)
    show_slot(slot, {name: item.model for name, item in trained.items()})
    save_figure(plot_scores({name: [item] for name, item in found.items()}), run.out / "objectives.svg")


GFLOPS_PER_SECOND = 8.0  # of these small models on one core of a busy machine


def show_slot(slot: Slot, models: dict[str, nn.Module]) -> None:
    """One gap, what the world says about it and what each model says."""
    tokens = [*slot.tokens[: slot.position], "<mask>", *slot.tokens[slot.position + 1 : -1]]
    print(f"\n{join(tokens)}")
    likely = sorted(slot.posterior, key=slot.posterior.get, reverse=True)[:5]
    rows = {"world": {token: slot.posterior[token] for token in likely}}
    for name, model in models.items():
        chances = fill_in(model, [slot])[0].exp()
        rows[name] = {token: chances[word_world()[1].ids[token]].item() for token in likely}
    for name, row in rows.items():
        print(f"{name:8} " + "  ".join(f"{token} {chance:.1%}" for token, chance in row.items()))


@alone
def pretrain(config: PretrainConfig, sizes: VariantConfig, masking: VariantMasking, run: RunConfig) -> None:
    """Pretrain one kind of model, on TinyWorld or on your own text, and save it as a Hugging Face folder."""
    seed_everything(run.seed)
    folder, device = run.out / config.model, pick_device(run.device)
    if config.model == "vit":
        return pretrain_vit(run, folder, device)
    variant, tokenizer, corpus = VARIANTS[config.model], None, world_corpus()
    if config.data != "tiny-world":
        tokenizer = train_tokenizer(config.data, config.vocab_size)
        corpus = text_corpus(config.data, "train", tokenizer, sizes.max_seq_len)
    model = variant.build(sizes, corpus.vocab_size).to(device)
    options = {"masking": masking} if variant.batches is MaskedBatches else {}
    batches = variant.batches(config.batch_size, run.seed, corpus=corpus, **options)
    seconds = config.max_steps * step_flops(model, batches, variant.loss_fn) / (1e9 * GFLOPS_PER_SECOND)
    announce(f"pretrain {config.model} on {config.data} for {config.max_steps} steps", seconds)
    header = {"model": config.model, "sizes": asdict(sizes), "masking": asdict(masking), "seed": run.seed}
    header |= {"data": config.data, "vocab_size": corpus.vocab_size}
    train_config = TrainConfig(
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate or variant.learning_rate,
        warmup_steps=max(1, config.max_steps // 10),
        weight_decay=0.01,
        save_every=config.save_every,
        resume=config.resume,
    )
    fit(model, batches, variant.loss_fn, train_config, out=folder / "training", header=header)
    parts = {folder: model.eval()}
    if isinstance(model, Electra):
        parts = {folder: model.discriminator, folder.with_name("electra-generator"): model.generator}
    for place, part in parts.items():
        part.save_pretrained(place)
        save_tokenizer(place, config.model, tokenizer)
        print(f"saved {shown(place)}")
    if tokenizer is None:
        print_scores({config.model: Trained(model, config.max_steps, 0.0, 0.0, [])}, config.n_slots)
    else:
        held_out = text_corpus(config.data, "validation", tokenizer, sizes.max_seq_len)
        nats = held_out_loss(
            model, variant.batches(config.batch_size, HELD_OUT_SEED, corpus=held_out, **options), variant.loss_fn
        )
        print(f"held-out loss {nats:.3f} nats per target (uniform guessing: {math.log(corpus.vocab_size):.3f})")
    verb = "generate" if config.model == "gpt2" else "fill"
    example = "One morning" if verb == "generate" else "The [MASK] sing because they were sad."
    chosen = "" if config.model in ("gpt2", "bert") else f" --model {config.model}"
    print(f'\nNow ask it: python {shown(SCRIPT)} {verb} "{example}"{chosen}{where(run)}')


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Callable[[int], dict[str, Tensor]], loss_fn: Callable) -> float:
    """Mean loss over the targets of ten batches, in nats."""
    device, total, n_targets = next(model.parameters()).device, 0.0, 0
    for step in range(10):
        loss, count = loss_fn(model, to_device(batches(step), device))
        total, n_targets = total + loss.item(), n_targets + int(count)
    return total / n_targets


def where(run: RunConfig) -> str:
    return "" if run.out == ROOT / "runs" / SCRIPT.stem else f" --out {shown(run.out)}"


def pretrain_vit(run: RunConfig, folder: Path, device: torch.device) -> None:
    train, test = load_digits_images(seed=run.seed)
    announce(f"train a Vision Transformer on {len(train.images)} images of digits", 60)
    model = VisionTransformer(VisionConfig()).to(device)
    fit_classifier(model, train, DigitsConfig(), run.seed)
    model.eval().save_pretrained(folder)
    print(
        f"saved {shown(folder)}: {image_accuracy(model, test):.1%} of {len(test.images)} held-out images (chance 10 %)"
    )
    print(f"\nNow ask it: python {shown(SCRIPT)} classify picture.png{where(run)}")


@alone
def finetune(config: FinetuneConfig, run: RunConfig) -> None:
    """Turn a pretrained BERT into a classifier of whole texts, of your own classes or of what TinyWorld can say."""
    seed_everything(run.seed)
    prompt = PromptConfig(checkpoint=config.checkpoint)
    encoder, folder = open_model(prompt, "bert", (BertForMaskedLM,), run)
    if encoder.model_type != "bert":
        raise ValueError(f"{shown(folder)} holds a {encoder.model_type}; finetune needs a BERT")
    tokenizer = load_tokenizer(folder)
    if config.data:
        texts = read_classes(config.data)
        train, test = texts[len(texts) // 10 :], texts[: len(texts) // 10] or texts
    else:
        train, test = acceptability(4000, run.seed, "train"), acceptability(500, HELD_OUT_SEED, "validation")
    names = tuple(sorted({name for _, name in train + test}))
    announce(
        f"fine-tune on {len(train)} texts of {len(names)} classes for {config.max_steps} steps", 0.06 * config.max_steps
    )
    model = BertForSequenceClassification(replace(encoder.config, class_names=names)).to(pick_device(run.device))
    model.trunk = encoder.trunk
    data = [(encode(text, tokenizer, model)[0].tolist(), names.index(name)) for text, name in train + test]
    fit_classes(model, data[: len(train)], config, run.seed)
    model.eval().save_pretrained(run.out / "classifier")
    tokenizer.save_pretrained(str(run.out / "classifier"))
    accuracy, n = class_accuracy(model, data[len(train) :]), len(test)
    most = max(sum(other == name for _, other in test) for name in names) / n
    print(f"saved {shown(run.out / 'classifier')}")
    print(f"right on {accuracy:.1%} of {n} held-out texts (always the most frequent class: {most:.1%})")
    print(f'\nNow ask it: python {shown(SCRIPT)} classify "{test[0][0]}"{where(run)}')


def generate(prompt: PromptConfig, sampling: SamplingConfig, run: RunConfig) -> None:
    """Continue a text (GPT-2), or answer it (T5, BART)."""
    text = text_of(prompt, 'generate "One morning"')
    model, folder = open_model(prompt, "gpt2", (GPT2, T5, Bart), run)
    tokenizer = load_tokenizer(folder)
    token_ids = encode(text, tokenizer, model)
    if isinstance(model, GPT2):
        room = model.config.max_seq_len - token_ids.shape[1]
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    generator = torch.Generator(token_ids.device).manual_seed(run.seed)
    new_ids = model.generate(token_ids, sampling, generator=generator)  # (1, new)
    whole = torch.cat([token_ids, new_ids], dim=1) if isinstance(model, GPT2) else new_ids
    print(tokenizer.decode(whole[0].tolist(), skip_special_tokens=True))


def fill(prompt: PromptConfig, run: RunConfig) -> None:
    """Fill the gaps of a text, written [MASK]; beside a model of TinyWorld stands the world's exact answer."""
    text = text_of(prompt, 'fill "The [MASK] sing because they were sad."')
    kinds = (BertForMaskedLM, RobertaForMaskedLM, AlbertForMaskedLM, ElectraGenerator, T5, Bart)
    usual = "electra-generator" if prompt.model == "electra" else "bert"
    named = replace(prompt, model="") if prompt.model == "electra" else prompt
    model, folder = open_model(named, usual, kinds, run)
    tokenizer = load_tokenizer(folder)
    for number, row in enumerate(fill_text(model, tokenizer, text, prompt.n_best), start=1):
        print(f"gap {number}: " + "  ".join(f"{token} {chance:.1%}" for token, chance in row))
    truth = world_says(text) if speaks_tiny_world(tokenizer) else None
    if truth:
        best = sorted(truth, key=truth.get, reverse=True)[: prompt.n_best]
        print("world: " + "  ".join(f"{token} {truth[token]:.1%}" for token in best))


def classify(prompt: PromptConfig, run: RunConfig) -> None:
    """Say the class of a text, or of an image file, with the probability of each."""
    text = text_of(prompt, 'classify "The baker sings because he was sad."')
    path = Path(text)
    if path.suffix.lower() in IMAGE_SUFFIXES or path.is_file():
        model, _ = open_model(prompt, "vit", (VisionTransformer,), run)
        rows = classify_image(path, model, prompt.n_best)
    else:
        model, folder = open_model(prompt, "classifier", (BertForSequenceClassification,), run)
        tokenizer = load_tokenizer(folder)
        with torch.no_grad():
            chances = model(encode(text, tokenizer, model))[0].softmax(dim=-1)  # (classes)
        best = chances.topk(min(prompt.n_best, len(chances)))
        names = model.config.class_names
        rows = [(names[index], chance) for index, chance in zip(best.indices, best.values.tolist(), strict=True)]
    for name, chance in rows:
        print(f"{chance:6.1%}  {name}")


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def bench(config: BenchConfig, sizes: VariantConfig, run: RunConfig) -> None:
    """Time a training step and greedy generation beside Hugging Face's models with the same weights, in one run."""
    announce("time BERT, GPT-2 and T5 beside Hugging Face's", 40)
    print(describe_machine())
    for name, ratio in measure_speed(config, sizes, run).items():
        print(f"{name} beside transformers': {ratio}")


def measure_speed(config: BenchConfig, sizes: VariantConfig, run: RunConfig) -> dict[str, str]:
    """Ratios of speed by task: their seconds over ours, the same weights on both sides."""
    import transformers

    seed_everything(run.seed)
    device, vocab_size = pick_device(run.device), len(word_world()[1])
    check_length(config.seq_len + config.max_new_tokens, 0, sizes.max_seq_len)
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    token_ids = torch.randint(8, vocab_size - len(SENTINELS), (config.batch_size, config.seq_len), device=device)
    greedy = SamplingConfig(config.max_new_tokens, temperature=0)
    rule = {"do_sample": False, "max_new_tokens": config.max_new_tokens, "min_new_tokens": config.max_new_tokens}
    for name in ("bert", "gpt2", "t5"):
        ours = VARIANTS[name].build(sizes, vocab_size)
        if name != "bert":  # no text ends before its length: the last sentinel is as unlikely as any token
            ours = type(ours)(replace(ours.config, eos_id=vocab_size - 1))
        ours.to(device)
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            theirs = getattr(transformers, ours.architecture).from_pretrained(folder).to(device)
        ids = {"input_ids": token_ids}
        if name == "t5":
            ids["decoder_input_ids"] = token_ids
        mine = (
            (lambda model=ours: model(token_ids, token_ids)) if name == "t5" else (lambda model=ours: model(token_ids))
        )

        def step(model: nn.Module, logits_of: Callable[[], Tensor]) -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of().flatten(0, 1), token_ids.flatten()).backward()

        works[f"{name}, training step"] = (
            lambda step=step, ours=ours, mine=mine: step(ours, mine),
            lambda step=step, theirs=theirs, ids=ids: step(theirs, lambda: theirs(**ids).logits),
        )
        if name != "bert":
            works[f"{name}, generation"] = (
                lambda ours=ours: ours.generate(token_ids, greedy),
                lambda theirs=theirs: theirs.generate(token_ids, attention_mask=torch.ones_like(token_ids), **rule),
            )
    flat = {f"{name}/{side}": work for name, pair in works.items() for side, work in zip("ot", pair, strict=True)}
    seconds = time_in_turns(flat, config.n_rounds)
    return {name: speed_ratio(seconds[f"{name}/o"], seconds[f"{name}/t"]) for name in works}


def main(argv: list[str] | None = None) -> None:
    from variant_experiments import FiguresConfig, figures  # here, because it imports this module

    verbs = {
        "demo": (demo, BreakConfig, DemoConfig, VariantConfig, RunConfig),
        "pretrain": (pretrain, PretrainConfig, VariantConfig, VariantMasking, RunConfig),
        "finetune": (finetune, FinetuneConfig, RunConfig),
        "generate": (generate, PromptConfig, SamplingConfig, RunConfig),
        "fill": (fill, PromptConfig, RunConfig),
        "classify": (classify, PromptConfig, RunConfig),
        "bench": (bench, BenchConfig, VariantConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
