"""Topic 15 - Picture model: patches become words of the course model, and pictures find their descriptions.

    pair = train_pairs(PictureConfig(), seed=0)                       # CLIP: which text belongs to which picture
    model = PictureLM(pair.vision, projector, language, picture_id)    # LLaVA: patches, projected, before the text
    answers = model.answer(pictures, ["Question: how many dots? Answer:"])
    model = load_picture_model()                                       # the committed one, ready to answer

Papers: Radford et al. 2021 (CLIP, arXiv 2103.00020); Liu et al. 2023 (LLaVA, arXiv 2304.08485), section 4.1: one linear
map into the embedding space of a language model, which is frozen at first.
"""

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import check_heads
from building_from_scratch import watched
from contrastive import MAX_LOG_SCALE, PairConfig, TextEncoder, clip_loss, similarity
from course_model import load_course_model, upto
from course_tokenizer import RESERVED, CourseTokenizer, load_course_tokenizer
from fine_tuning_adaptation import answer_loss, fill_rows
from gpt2 import SamplingConfig, init_weights, left_padded
from huggingface_folders import read_json, read_safetensors
from low_rank_adapters import LoraConfig, add_adapters, load_adapter, save_adapter, train_rows
from modern_llm_architectures import CausalLM
from packing import Batch
from scene_pictures import (
    CHOICES,
    COLOURS,
    KINDS,
    SHAPES,
    SIDE,
    PictureScene,
    Question,
    ask,
    captions_of,
    describe,
    draw_scene,
    render_all,
)
from sequence_modeling import PAD_ID, Vocabulary
from tiny_world import World, pick, words
from training_transformers import TrainConfig, fit
from transformer_architecture import EncoderLayer
from vision_transformer import VisionConfig, VisionTransformer
from workbench import check_range, seed_everything, shown, write_atomically

DESCRIBED = Vocabulary(  # the words of `describe`
    sorted({*COLOURS, *SHAPES, *"0123456789", ",", *"a small large above below left right of and dot dots no".split()})
)
LONGEST_DESCRIPTION = 40  # words


@dataclass(frozen=True)
class PictureConfig:
    """The picture side and its training."""

    d_vision: int = 64  # width of the vision transformer
    vision_layers: int = 2  # its blocks
    vision_heads: int = 4  # its attention heads
    vision_patch: int = 5  # pixels on a side of a patch
    d_shared: int = 48  # width of the space that pictures and descriptions share
    merge: int = 2  # patches on a side of a square that becomes one picture token
    pair_steps: int = 700  # steps of contrastive training
    pair_batch: int = 64  # pictures of such a step, each compared with so many descriptions
    pair_rate: float = 3e-3  # its peak learning rate
    join_steps: int = 200  # steps in which the projector alone is trained
    join_rate: float = 5e-3  # its peak learning rate
    tune_steps: int = 1500  # steps in which projector, tower and low-rank updates of the language model are trained
    tune_rate: float = 4e-3  # their peak learning rate
    tune_vision: bool = True  # train the tower too in the last stage
    picture_batch: int = 16  # pictures of a step of the last two stages
    rank: int = 8  # of the low-rank updates

    def __post_init__(self) -> None:
        names = ("d_vision", "vision_layers", "vision_heads", "vision_patch", "d_shared", "merge")
        check_range(self, *names, "picture_batch", "rank", least=1)
        check_range(self, "pair_batch", least=2)
        check_range(self, "pair_steps", "join_steps", "tune_steps", least=0)
        check_range(self, "pair_rate", "join_rate", "tune_rate", above=0)
        check_heads(self.d_vision, self.vision_heads)
        if self.vision.grid_size % self.merge:
            raise ValueError(f"merge={self.merge} does not divide the grid of {self.vision.grid_size} patches a side")

    @property
    def vision(self) -> VisionConfig:
        sizes = (self.d_vision, self.vision_layers, self.vision_heads, 2 * self.d_vision)
        return VisionConfig(SIDE, self.vision_patch, 3, self.d_shared, *sizes)

    @property
    def n_tokens(self) -> int:
        return (self.vision.grid_size // self.merge) ** 2

    def training(self, steps: int, rate: float, batch_size: int) -> TrainConfig:
        sizes = {"batch_size": batch_size, "max_steps": steps, "warmup_steps": min(50, steps // 4)}
        return TrainConfig(learning_rate=rate, weight_decay=0.05, min_lr_ratio=0.02, log_every=50, **sizes)


# Pictures beside descriptions


class PairEncoders(nn.Module):
    """Topic 08's pair of encoders for scenes: a vision transformer, whose head is the map, and a text encoder of words.

    Shapes: pictures (pairs, 3, 30, 30) in 0..1 and token_ids (pairs, seq) to two matrices (pairs, d_shared), not
    normalised.
    """

    def __init__(self, config: PictureConfig) -> None:
        super().__init__()
        self.vision = VisionTransformer(config.vision)
        sizes = PairConfig(config.d_vision, config.vision_layers, config.vision_heads, config.d_shared)
        self.text = TextEncoder(len(DESCRIBED), LONGEST_DESCRIPTION, sizes)
        self.text_proj = nn.Linear(config.d_vision, config.d_shared)
        init_weights(self.text_proj)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(PairConfig.temperature)))

    def forward(self, pictures: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.vision(normalised(pictures)), self.text_proj(self.text(token_ids))


def normalised(pictures: Tensor) -> Tensor:
    """Pixels of 0..1 as the vision transformer takes them, -1..1."""
    return 2 * pictures - 1


def description_ids(texts: Sequence[str]) -> Tensor:
    """The words of descriptions, padded: (texts, seq)."""
    rows = [torch.tensor(DESCRIBED.encode(words(text))) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)


def pair_batch(config: PictureConfig, seed: int, step: int) -> Batch:
    """Pictures and their descriptions, no description twice: it would be right and count as wrong."""
    rng, found = random.Random(f"{seed} pairs {step}"), {}
    while len(found) < config.pair_batch:
        scene = draw_scene(rng)
        found.setdefault(describe(scene), scene)
    return {"pictures": render_all(list(found.values()), rng), "token_ids": description_ids(list(found))}


def pair_loss(model: PairEncoders, batch: Batch) -> tuple[Tensor, Tensor]:
    """CLIP's loss, times the pairs, and their number; the scale is clipped at 100 as in the paper."""
    model.log_scale.data.clamp_(max=MAX_LOG_SCALE)
    loss = clip_loss(*model(batch["pictures"], batch["token_ids"]), model.log_scale)
    return loss * len(batch["pictures"]), torch.tensor(len(batch["pictures"]))


def train_pairs(config: PictureConfig, seed: int) -> PairEncoders:
    """Both encoders, trained to tell which description belongs to which picture."""
    seed_everything(seed)
    model = PairEncoders(config)
    if config.pair_steps:
        training = config.training(config.pair_steps, config.pair_rate, config.pair_batch)
        fit(model, partial(pair_batch, config, seed), pair_loss, training)
    return model.eval()


# Pictures within texts


def merge_patches(features: Tensor, factor: int) -> Tensor:
    """Squares of factor x factor neighbouring patches as one token each, their features side by side.

    Shapes: (batch, patches, d) to (batch, patches / factor^2, d * factor^2), rows of squares from the top.
    """
    grid = math.isqrt(features.shape[1])
    squares = features.unflatten(1, (grid // factor, factor, grid // factor, factor))  # (batch, down, f, across, f, d)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)  # (batch, tokens, features)


def states_before_last(vision: VisionTransformer, images: Tensor) -> Tensor:
    """What the last block of a vision transformer reads, the layer that LLaVA takes: (batch, tokens, d_vision).

    A contrastive loss sees the class token alone. What the last block makes of a patch reaches it no more, so nothing
    has trained that; what the block reads from a patch has been trained to tell the class token what is there.
    """
    seen: list[Tensor] = []
    with watched(vision, EncoderLayer, lambda name, layer, given, made: seen.append(given[0])):
        vision.features(images)
    return seen[-1]


class Projector(nn.Module):
    """Two linear maps with a GELU between, as in LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744, section 3.2).

    Shapes: (batch, tokens, d_in) to (batch, tokens, d_model).
    """

    def __init__(self, d_in: int, d_model: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_in, d_model), nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(features)))


class PictureEmbedding(nn.Module):
    """An embedding in which the first, second ... placeholder of a row is the first, second ... token of its picture.

    Shapes: token_ids (batch, seq) to (batch, seq, d_model). Raises ValueError for a row whose placeholders are not as
    many as its picture has tokens, and for placeholders without a picture.
    """

    def __init__(self, base: nn.Embedding, picture_id: int) -> None:
        super().__init__()
        self.base, self.picture_id = base, picture_id
        self.shown: Tensor | None = None  # (batch, tokens, d_model)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        there = token_ids == self.picture_id  # (batch, seq)
        counts = there.sum(dim=1)  # (batch)
        x = self.base(token_ids)  # (batch, seq, d_model)
        if not counts.any():
            return x
        n_tokens = 0 if self.shown is None else self.shown.shape[1]
        if self.shown is None or len(self.shown) != len(token_ids) or (counts != n_tokens).any():
            raise ValueError(
                f"rows have {counts.tolist()[:8]} places for picture tokens, but "
                f"{0 if self.shown is None else len(self.shown)} pictures give {n_tokens} each"
            )
        return x.masked_scatter(there[..., None], self.shown)  # (batch, seq, d_model)


class PictureLM(nn.Module):
    """A vision transformer, a projector and a causal language model that reads pictures as part of its text.

    Shapes: pictures (batch, 3, 30, 30) in 0..1 and token_ids (batch, seq), with `n_tokens` placeholders in each row, to
    logits (batch, seq, vocab). The placeholder is a special token, so no text can be mistaken for a picture.
    """

    def __init__(
        self, vision: VisionTransformer, projector: nn.Module, language: CausalLM, picture_id: int, merge: int = 1
    ) -> None:
        super().__init__()
        self.vision, self.projector, self.language, self.merge = vision, projector, language, merge
        if not isinstance(language.token_emb, PictureEmbedding):
            language.token_emb = PictureEmbedding(language.token_emb, picture_id)

    @property
    def n_tokens(self) -> int:
        return self.vision.config.n_patches // self.merge**2

    def picture_tokens(self, pictures: Tensor) -> Tensor:
        """The tokens of pictures in the language model's space, without the class token: (batch, tokens, d_model)."""
        states = self.tower_states(normalised(pictures))  # (batch, tokens, d_vision)
        return self.projector(merge_patches(states[:, self.vision.n_special :], self.merge))

    def tower_states(self, images: Tensor) -> Tensor:
        return states_before_last(self.vision, images)

    @contextmanager
    def showing(self, pictures: Tensor) -> Iterator[CausalLM]:
        """Within the block the placeholders of the language model's rows are these pictures, one for each row."""
        self.language.token_emb.shown = self.picture_tokens(pictures)
        try:
            yield self.language
        finally:
            self.language.token_emb.shown = None

    @contextmanager
    def text_alone(self) -> Iterator[CausalLM]:
        """Within the block the language model has an embedding without pictures, as topic 11's tools expect."""
        language, picture_id = self.language, self.language.token_emb.picture_id
        language.token_emb = language.token_emb.base
        try:
            yield language
        finally:
            language.token_emb = PictureEmbedding(language.token_emb, picture_id)

    def forward(self, pictures: Tensor, token_ids: Tensor) -> Tensor:
        with self.showing(pictures) as language:
            return language(token_ids)  # (batch, seq, vocab)

    @torch.no_grad()
    def answer(
        self, tokenizer: CourseTokenizer, pictures: Tensor, prompts: Sequence[str], longest: int = 0
    ) -> list[str]:
        """What the model says after each picture and prompt, greedily, up to the end of its first sentence."""
        rows = [picture_row(tokenizer, self.n_tokens, prompt) for prompt in prompts]
        longest = longest or MOST_NEW_TOKENS
        found: list[str] = []
        for start in range(0, len(rows), 100):
            token_ids, real = left_padded(rows[start : start + 100], tokenizer.pad_id)
            with self.showing(pictures[start : start + 100]) as language:
                made = language.generate(token_ids, SamplingConfig(longest, temperature=0.0), real).tolist()
            found += [first_sentence(tokenizer.decode(upto(row, tokenizer.eos_id))) for row in made]
        return found


MOST_NEW_TOKENS = 30


def first_sentence(text: str) -> str:
    return text[: text.index(".") + 1] if "." in text else text


def picture_row(tokenizer: CourseTokenizer, n_tokens: int, text: str) -> list[int]:
    """A document that begins with a picture: its places, then the text, without the end."""
    picture_id = tokenizer.vocab[RESERVED[0]]
    return [tokenizer.bos_id, *[picture_id] * n_tokens, *tokenizer.encode(text)]


def told_pieces(scene: PictureScene, rng: random.Random) -> list[tuple[str, str]]:
    """What a training row says of a scene, as pairs (given, learned): a caption, or three questions of other kinds."""
    if rng.random() < 0.25:
        caption = pick(rng, captions_of(scene))
        return [("Picture:", caption.removeprefix("Picture:"))]
    kinds, pieces = list(KINDS), []
    for _ in range(3):
        question = ask(scene, rng, kinds.pop(int(rng.random() * len(kinds))))
        pieces.append((" " * bool(pieces) + question.prompt, question.answer))
    return pieces


def picture_batch(
    tokenizer: CourseTokenizer, n_tokens: int, batch_size: int, seed: int, blind: bool, step: int
) -> Batch:
    """Pictures, and rows of text about them; the loss counts captions and answers.

    blind: every picture is blank paper, for the model that has only the texts to learn from.
    """
    rng = random.Random(f"{seed} texts {step}")
    scenes, rows = [draw_scene(rng) for _ in range(batch_size)], []
    for scene in scenes:
        row = [(token_id, False) for token_id in picture_row(tokenizer, n_tokens, "")]
        for given, learned in told_pieces(scene, rng):
            for text, counted in ((given, False), (learned, True)):
                row += [(token_id, counted) for token_id in tokenizer.encode(text)]
        rows.append([row])
    pictures = render_all(scenes, rng)
    texts = fill_rows(rows, max(len(row) for (row,) in rows) - 1)
    del texts["document_ids"]  # one text in a row, padded behind, where causal attention does not look
    return {"pictures": torch.full_like(pictures, 0.5) if blind else pictures, **texts}


def picture_loss(model: PictureLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats of all captions and answers of a batch together, and the number of their tokens."""
    with model.showing(batch["pictures"]) as language:
        return answer_loss(language, {name: batch[name] for name in ("inputs", "targets")})


@cache
def new_tokens(tokenizer: CourseTokenizer, n: int = 200) -> list[int]:
    """The tokens of questions, answers and captions that no document of the world has.

    Pretraining pushed them away from every state, so a model whose embedding is frozen can neither tell them apart nor
    say them (topic 11): here " sm" and " l" of small and large, " y" of yes.
    """
    rng = random.Random(0)
    told = {piece for _ in range(n) for pair in told_pieces(draw_scene(rng), rng) for piece in pair}
    known = {token for document in World().documents(1500, 1, "train") for token in tokenizer.encode(document.text)}
    return sorted({token for text in told for token in tokenizer.encode(text)} - known)


# Training: the projector first, then low-rank updates of the language model with it


def attach(pair: PairEncoders, config: PictureConfig, seed: int, projector: nn.Module | None = None) -> PictureLM:
    """The course model behind a trained vision transformer, with a fresh projector; both of the old parts frozen."""
    seed_everything(seed)
    language, tokenizer = load_course_model()
    vision = copy.deepcopy(pair.vision).requires_grad_(False)
    d_in = config.d_vision * config.merge**2
    projector = projector or Projector(d_in, language.config.d_model)
    return PictureLM(vision, projector, language.requires_grad_(False), tokenizer.vocab[RESERVED[0]], config.merge)


def train_text(
    model: PictureLM, tokenizer: CourseTokenizer, config: PictureConfig, seed: int, stage: str, blind: bool = False
) -> list[dict[str, float]]:
    """One stage of training on captions and answers: "join" the projector alone, "tune" low-rank updates with it.

    In the second stage the tower learns too, unless config.tune_vision is off: what a contrastive loss needs of a patch
    is less than what questions ask. blind: without any picture. Returns the log.
    """
    steps, rate = {"join": (config.join_steps, config.join_rate), "tune": (config.tune_steps, config.tune_rate)}[stage]
    if not steps:
        return []
    if stage == "tune":
        with model.text_alone() as language:
            train_rows(language, new_tokens(tokenizer))
            add_adapters(language, LoraConfig(lora_rank=config.rank, lora_alpha=2.0 * config.rank))
        if config.tune_vision:
            train_tower(model.vision)
    batches = partial(picture_batch, tokenizer, model.n_tokens, config.picture_batch, seed, blind)
    log = fit(model, batches, picture_loss, config.training(steps, rate, config.picture_batch))
    model.eval()
    return log


def train_tower(vision: VisionTransformer) -> None:
    """Train what a picture token is made of: all below the last block."""
    for part in (vision.patch_proj, *vision.encoder.blocks[:-1]):
        part.requires_grad_(True)
    for parameter in (vision.class_token, vision.pos_emb):
        parameter.requires_grad_(True)


# Examination


@dataclass(frozen=True)
class PictureExam:
    """How much is asked of a picture model."""

    n_questions: int = 100  # questions of each kind, and captions
    n_pairs: int = 200  # pictures with different descriptions among which one is to be found
    exam_seed: int = 7  # seed of scenes and questions

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=1)
        check_range(self, "n_pairs", least=6)
        check_range(self, "exam_seed", least=0)


def exam_questions(kind: str, split: str, exam: PictureExam) -> tuple[list[PictureScene], list[Question]]:
    """Questions of one kind about fresh scenes; those of the held-out split are all about held-out pairs."""
    rng, scenes, questions = random.Random(f"{exam.exam_seed} {split} {kind}"), [], []
    while len(questions) < exam.n_questions:
        scene = draw_scene(rng, split)
        question = ask(scene, rng, kind, split)
        if question.held_out == (split == "held-out"):
            scenes.append(scene)
            questions.append(question)
    return scenes, questions


def examine_pictures(
    model: PictureLM, tokenizer: CourseTokenizer, split: str, exam: PictureExam, shuffled: bool = False
) -> dict[str, float]:
    """Share of questions of each kind answered exactly, and of captions that are true and complete.

    shuffled: every question is put to the picture of another one. A caption of the held-out split counts only where the
    shapes hold a held-out pair.
    """
    found = {}
    for kind in KINDS:
        scenes, questions = exam_questions(kind, split, exam)
        pictures = shown_pictures(scenes, exam, shuffled)
        said = model.answer(tokenizer, pictures, [question.prompt for question in questions], 8)
        found[kind] = sum(text == question.answer for text, question in zip(said, questions, strict=True)) / len(said)
    scenes, _ = exam_questions("colour", split, exam)
    said = model.answer(tokenizer, shown_pictures(scenes, exam, shuffled), ["Picture:"] * len(scenes))
    found["caption"] = sum(f"Picture:{text}" in captions_of(scene) for text, scene in zip(said, scenes, strict=True))
    return found | {"caption": found["caption"] / len(scenes)}


def shown_pictures(scenes: Sequence[PictureScene], exam: PictureExam, shuffled: bool) -> Tensor:
    pictures = render_all(scenes, random.Random(f"{exam.exam_seed} pixels"))
    return pictures.roll(1, dims=0) if shuffled else pictures


@torch.no_grad()
def recall_at(pair: PairEncoders, split: str, exam: PictureExam) -> dict[str, float]:
    """How often the right description is among the 1 and 5 nearest to a picture, and the right picture to a text.

    Keys "text@1", "text@5", "picture@1", "picture@5"; chance is 1 and 5 in n_pairs.
    """
    rng, chosen = random.Random(f"{exam.exam_seed} {split} pairs"), {}
    while len(chosen) < exam.n_pairs:
        scene = draw_scene(rng, split)
        chosen.setdefault(describe(scene), scene)
    embedded = pair(render_all(list(chosen.values()), rng), description_ids(list(chosen)))
    scores, right = similarity(*embedded), torch.arange(len(chosen))[:, None]  # (pictures, texts)
    found = {}
    for name, table in (("text", scores), ("picture", scores.T)):
        nearest = table.topk(5, dim=1).indices  # (queries, 5)
        found |= {f"{name}@{k}": (nearest[:, :k] == right).any(dim=1).float().mean().item() for k in (1, 5)}
    return found


# The folder


FOLDER = Path(__file__).parent / "picture_model"
PARTS = "pictures.safetensors"  # the projector, and the two encoders of pictures and descriptions


def save_picture_model(model: PictureLM, pair: PairEncoders, config: PictureConfig, folder: Path, report: dict) -> None:
    """Write vision/ (a ViT folder), adapter/ (PEFT's format), projector and pair of encoders, report and card."""
    model.vision.save_pretrained(folder / "vision")
    with model.text_alone() as language:
        save_adapter(language, folder / "adapter", base="../../10-pretraining-llms/model")
    parts = {f"projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    parts |= {f"pair.{name}": tensor for name, tensor in pair.state_dict().items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in parts.items()}
    write_atomically(folder / PARTS, safetensors_bytes(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "picture_config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", picture_card(report, config).encode())


def load_picture_model(folder: Path = FOLDER) -> tuple[PictureLM, PairEncoders, CourseTokenizer]:
    """The committed picture model, its pair of encoders, and the tokenizer; ready to answer.

    Raises ValueError for a folder that does not fit together, or to the course model.
    """
    folder = Path(folder)
    settings = read_json(folder / "picture_config.json")
    try:
        config = PictureConfig(**settings)
    except TypeError as error:
        raise ValueError(f"{shown(folder)}/picture_config.json is no picture model's: {error}") from None
    pair, tensors = PairEncoders(config), read_safetensors(folder / PARTS)
    model = attach(pair, config, 0)
    model.vision = VisionTransformer.from_pretrained(folder / "vision").requires_grad_(False)
    wanted = {f"projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    wanted |= {f"pair.{name}": tensor for name, tensor in pair.state_dict().items()}
    if {name: tensor.shape for name, tensor in wanted.items()} != {
        name: tensor.shape for name, tensor in tensors.items()
    }:
        raise ValueError(f"{shown(folder / PARTS)} holds other tensors than {shown(folder)}/picture_config.json tells")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
    with model.text_alone() as language:
        load_adapter(language, folder / "adapter")
    return model.eval(), pair.eval(), load_course_tokenizer()


def beats_guessing(share: float, kind: str, n: int) -> bool:
    """Whether n answers are right more often than guessing by two of its standard errors."""
    chance = 1 / CHOICES[kind]
    return share > chance + 2 * math.sqrt(chance * (1 - chance) / n)


def picture_card(report: dict, config: PictureConfig) -> str:
    """What a reader of the folder wants to know. Every number is the report's."""
    rows = [
        f"| {kind} | " + " | ".join(f"{report[split][kind]:.0%}" for split in ("seen", "held-out", "shuffled")) + " |"
        for kind in (*KINDS, "caption")
    ]
    guessed = [kind for kind in KINDS if not beats_guessing(report["seen"][kind], kind, report["n_questions"])]
    recalls = ", ".join(f"{name} {share:.0%}" for name, share in report["recall"].items())
    vision = f"a vision transformer ({config.vision_layers} blocks of width {config.d_vision})"
    lines = [
        "# The course picture model",
        "",
        "It reads pictures of 30 x 30 pixels as words of",
        "[the course model](../../10-pretraining-llms/model/README.md):",
        f"{vision}, whose patches a projector maps into the embedding space",
        f"as {config.n_tokens} tokens, and a low-rank update of rank {config.rank}. Made by",
        "",
        f"    {report['command']}",
        "",
        f"in {report['cpu_seconds']:.0f} s of CPU time ({report['machine']}, {report['date']}).",
        "",
        "**Use**: to learn with. It knows coloured shapes on grey paper, one handwritten digit (scikit-learn's) and",
        "dots. Shown anything else it answers as surely, and wrongly.",
        "",
        f"{report['n_questions']} questions of each kind, answered exactly; held out are pairs of colour and thing",
        "that no training picture showed; shuffled puts every question to another picture.",
        "",
        "| Kind | Seen pairs | Held-out pairs | Shuffled |",
        "|:--|--:|--:|--:|",
        *rows,
        "",
        f"Not told from guessing, by two standard errors: {', '.join(guessed) or 'none'}.",
        "",
        f"Among {report['n_pairs']} pictures with held-out pairs and their descriptions: {recalls}.",
    ]
    return "\n".join(lines) + "\n"
