"""Topic 15 - Picture experiments: what the model sees, counted by kind of question, beside models that cannot see.

python 15-real-world-applications/real_world_applications.py train-pictures            # make picture_model/ again
python 15-real-world-applications/real_world_applications.py picture scene.png "how many dots?"
python 15-real-world-applications/real_world_applications.py figures picture-recall picture-questions picture-breaks
"""

import datetime
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from course_tokenizer import load_course_tokenizer
from equal_compute import remembered
from huggingface_folders import read_safetensors
from llm_calculators import forward_flops, kv_bytes_per_token
from picture_failures import PICTURE_BREAKS
from picture_model import (
    FOLDER,
    PairEncoders,
    PictureConfig,
    PictureExam,
    PictureLM,
    attach,
    examine_pictures,
    load_picture_model,
    recall_at,
    save_picture_model,
    train_pairs,
    train_text,
)
from scene_pictures import (
    CHOICES,
    KINDS,
    ask,
    captions_of,
    draw_scene,
    load_picture,
    plot_pictures,
    png_bytes,
    render,
    render_all,
)
from workbench import (
    Column,
    RunConfig,
    alone,
    announce,
    check_range,
    describe_machine,
    save_figure,
    save_results,
    shown,
    write_atomically,
)

COMMAND = "python 15-real-world-applications/real_world_applications.py figures"


@dataclass(frozen=True)
class PictureFiguresConfig:
    """The sizes of the experiments on pictures."""

    n_seeds: int = 3  # seeds 0, 1, ... of encoders, projectors and updates
    picture_questions: int = 60  # questions of each kind
    picture_pairs: int = 200  # pictures among which one is found
    picture_shrink: int = 1  # divide the steps of every picture training by this
    again: bool = False  # measure again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "picture_questions", "picture_shrink", least=1)
        check_range(self, "picture_pairs", least=6)

    @property
    def exam(self) -> PictureExam:
        return PictureExam(self.picture_questions, self.picture_pairs)

    @property
    def recipe(self) -> PictureConfig:
        whole = PictureConfig()
        names = ("pair_steps", "join_steps", "tune_steps")
        return replace(whole, **{name: max(1, getattr(whole, name) // self.picture_shrink) for name in names})

    def save_table(self, name: str, columns: list[Column], rows: list[list], n_seeds: int) -> None:
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), f"{COMMAND} {name}")


def encoders(config: PictureFiguresConfig, run: RunConfig, seed: int) -> PairEncoders:
    """The pair of encoders of a seed, trained once and kept in --out."""
    recipe = config.recipe
    path = run.out / f"pair-{recipe.pair_steps}-{seed}.safetensors"
    pair = PairEncoders(recipe)
    if config.again or not path.exists():
        pair = train_pairs(recipe, seed)
        tensors = {name: tensor.contiguous() for name, tensor in pair.state_dict().items()}
        write_atomically(path, safetensors_bytes(tensors))
    else:
        pair.load_state_dict(read_safetensors(path))
    return pair.eval()


# What is found


def picture_recall(config: PictureFiguresConfig, run: RunConfig) -> None:
    """The right description among 200, and the right picture among 200, for scenes with and without held-out pairs.

    Prediction: held-out pairs cost a few points at 1 and nothing at 5, because colour and shape are read apart.
    """
    names = ("text@1", "text@5", "picture@1", "picture@5")
    found: dict[str, dict[str, list[float]]] = {split: {name: [] for name in names} for split in ("seen", "held-out")}
    for seed in range(config.n_seeds):
        for split, lists in found.items():
            what = f"recall, {config.recipe.pair_steps} steps, seed {seed}, {split}, {config.picture_pairs} pairs"
            scores = remembered(
                config,
                run,
                what,
                lambda seed=seed, split=split: recall_at(encoders(config, run, seed), split, config.exam),
            )
            for name in names:
                lists[name].append(scores[name])
    columns = [Column("Pictures"), Column("text at 1", "", ".1%"), Column("text at 5", "", ".1%")]
    columns += [Column("picture at 1", "", ".1%"), Column("picture at 5", "", ".1%")]
    rows = [[f"{split} pairs", *(lists[name] for name in names)] for split, lists in found.items()]
    rows.append(["chance", *(k / config.picture_pairs for k in (1, 5, 1, 5))])
    config.save_table("picture-recall", columns, rows, config.n_seeds)


# What is answered


class LastLayerPictureLM(PictureLM):
    """The same model with the patches as they leave the tower, which no contrastive loss has trained."""

    def tower_states(self, images: Tensor) -> Tensor:
        return self.vision.features(images)


Scores = dict[str, dict[str, float]]


def answered(config: PictureFiguresConfig, run: RunConfig, seed: int, how: str = "") -> dict[str, Scores]:
    """Scores by kind after each stage of one training: stage -> split -> kind -> share of right answers.

    how "blind": without any picture, in the second stage alone. "last-layer": with other patches. The trained model of
    a seed that is neither is kept in --out.
    """
    recipe = config.recipe
    what = f"answers {how}, {recipe.join_steps} + {recipe.tune_steps} steps, seed {seed}, {config.picture_questions}"

    def measure() -> dict[str, Scores]:
        tokenizer, before, found = load_course_tokenizer(), time.process_time(), {}
        pair = encoders(config, run, seed)
        model = attach(pair, recipe, seed)
        model.__class__ = LastLayerPictureLM if how == "last-layer" else PictureLM
        for stage in ("join", "tune") if how != "blind" else ("tune",):
            train_text(model, tokenizer, recipe, seed, stage, blind=how == "blind")
            splits = ("seen", "held-out") if not how else ("seen",)
            found[stage] = {split: examine_pictures(model, tokenizer, split, config.exam) for split in splits}
        if not how:
            spent = time.process_time() - before
            found["shuffled"] = {"seen": examine_pictures(model, tokenizer, "seen", config.exam, shuffled=True)}
            scores = found["tune"] | {"shuffled": found["shuffled"]["seen"]}
            write_picture_model(model, pair, recipe, config.exam, spent, run.out / f"picture_model-{seed}", scores)
        return found

    return remembered(config, run, what, measure)


def picture_questions(config: PictureFiguresConfig, run: RunConfig) -> None:
    """Questions and captions: after the projector's stage, after that of the updates, and of models that cannot see.

    Prediction: a frozen model answers in its own words (colours, relations) well above chance and never says small,
    large, yes or no, words that it has not learned to say; with updates all kinds rise; without pictures and with wrong
    ones all are at chance; held-out pairs cost most where the two halves must be bound, in "exists".
    """
    seeds = range(config.n_seeds)
    sound = [answered(config, run, seed) for seed in seeds]
    rows = [
        ("projector alone", "seen", [one["join"]["seen"] for one in sound]),
        ("projector alone", "held out", [one["join"]["held-out"] for one in sound]),
        ("projector and updates", "seen", [one["tune"]["seen"] for one in sound]),
        ("projector and updates", "held out", [one["tune"]["held-out"] for one in sound]),
        ("the same, wrong pictures", "seen", [one["shuffled"]["seen"] for one in sound]),
    ]
    save_answers(config, "picture-questions", rows)


def picture_controls(config: PictureFiguresConfig, run: RunConfig) -> None:
    """Two trainings that should fail: without any picture, and with the patches that the tower's last block writes.

    Prediction: without pictures all kinds are at chance; with the last patches the tower, which is trained too, makes
    up for some of it, and counting still comes later.
    """
    seeds = range(config.n_seeds)
    rows = [
        (name, "seen", [answered(config, run, seed, how)["tune"]["seen"] for seed in seeds])
        for how, name in (("blind", "trained without pictures"), ("last-layer", "patches of the last block"))
    ]
    save_answers(config, "picture-controls", rows)


def save_answers(config: PictureFiguresConfig, table: str, rows: list[tuple[str, str, list[dict[str, float]]]]) -> None:
    """Rows of (model, pairs, scores by kind for each seed) as a table, with chance below."""
    kinds = (*KINDS, "caption")
    columns = [Column("Model"), Column("Pairs"), *(Column(kind, "", ".0%") for kind in kinds)]
    cells = [[name, pairs, *([item[kind] for item in found] for kind in kinds)] for name, pairs, found in rows]
    cells.append(["chance", "", *(1 / CHOICES[kind] for kind in KINDS), 0.0])
    config.save_table(table, columns, cells, config.n_seeds)


def picture_tokens(config: PictureFiguresConfig, run: RunConfig) -> None:
    """What the tokens of a picture cost before a question of 14 tokens: positions, operations, cache. Computed."""
    model = attach(PairEncoders(config.recipe), config.recipe, 0).language.config
    rows = []
    for name, n_tokens in (
        ("none", 0),
        ("one for a picture", 1),
        ("9, squares of 2 x 2 patches", 9),
        ("36 patches", 36),
    ):
        n = n_tokens + 15
        flops = sum(forward_flops(model, n).values()) * n / 1e6
        rows.append([name, str(n), flops, kv_bytes_per_token(model, 4) * n / 1024])
    n_large = (336 // 14) ** 2
    rows.append([f"336 x 336 pixels in patches of 14: {n_large}", str(n_large + 15), "", ""])
    columns = [Column("Picture tokens"), Column("positions"), Column("forward pass", "MFLOP", ".1f")]
    columns.append(Column("keys and values", "KiB", ".0f"))
    config.save_table("picture-tokens", columns, rows, 1)


def picture_breaks(config: PictureFiguresConfig, run: RunConfig) -> None:
    """Every failure of picture_failures.py beside its sound form."""
    rows = []
    for name in PICTURE_BREAKS:
        found = [PICTURE_BREAKS[name][0](replace(run, seed=seed)) for seed in range(config.n_seeds)]
        for number, (what, _, _) in enumerate(found[0]):
            rows.append([what, *([row[number][side] for row in found] for side in (1, 2))])
    columns = [Column("Failure, and what is measured"), Column("sound", "", ".3g"), Column("broken", "", ".3g")]
    config.save_table("picture-breaks", columns, rows, config.n_seeds)


def picture_gallery(config: PictureFiguresConfig, run: RunConfig) -> None:
    """Held-out scenes with the committed model's captions and answers."""
    model, _, tokenizer = load_picture_model()
    save_figure(gallery(model, tokenizer), config.folder / "pictures.svg")


def gallery(model: PictureLM, tokenizer, n: int = 8) -> Figure:
    """Pictures with held-out pairs, and what the model says of each, marked right or wrong."""
    rng = random.Random(11)
    scenes = [draw_scene(rng, "held-out") for _ in range(n)]
    pictures = render_all(scenes, rng)
    asked = [ask(scene, rng, KINDS[index % len(KINDS)], "held-out") for index, scene in enumerate(scenes)]
    captions = model.answer(tokenizer, pictures, ["Picture:"] * n)
    answers = model.answer(tokenizer, pictures, [question.prompt for question in asked], 8)
    titles = []
    for scene, question, caption, answer in zip(scenes, asked, captions, answers, strict=True):
        caption_ok, answer_ok = f"Picture:{caption}" in captions_of(scene), answer == question.answer
        wording = question.prompt.removeprefix("Question: ").removesuffix(" Answer:")
        said = f"{mark(caption_ok)} {caption.strip()}", f"{mark(answer_ok)} {wording} {answer.strip()}"
        titles.append("\n".join(fill(line, 34) for line in said))
    return plot_pictures(pictures, titles)


def mark(right: bool) -> str:
    return "right:" if right else "WRONG:"


PICTURE_EXPERIMENTS: dict[str, tuple[Callable[[Any, RunConfig], None], int]] = {  # name: function, seconds
    "picture-recall": (picture_recall, 330),
    "picture-questions": (picture_questions, 1100),
    "picture-controls": (picture_controls, 1500),
    "picture-tokens": (picture_tokens, 5),
    "picture-breaks": (picture_breaks, 20),
    "picture-gallery": (picture_gallery, 10),
}


# The verbs


@dataclass(frozen=True)
class PictureQuestionConfig:
    """A picture, and what is asked about it."""

    text: tuple[str, ...] = ()  # the picture's file, then the question; without one a caption is asked for
    checkpoint: Path = FOLDER  # the folder of the picture model
    draw: bool = False  # first draw a scene of --seed into that file

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError('give a picture and a question, such as: picture scene.png "how many dots?"')


def picture(config: PictureQuestionConfig, run: RunConfig) -> None:
    """Answer a question about a PNG or JPEG file, or caption it."""
    path, question = Path(config.text[0]), " ".join(config.text[1:])
    if config.draw:
        rng = random.Random(run.seed)
        scene = draw_scene(rng, "held-out")
        write_atomically(path, png_bytes(render(scene, rng)))
        print(f"drew {captions_of(scene)[0].removeprefix('Picture: ')} to {shown(path)}")
    pixels = load_picture(path.parent, path.name)
    model, _, tokenizer = load_picture_model(config.checkpoint)
    if len(question) > 200:
        raise ValueError(f"the question has {len(question)} characters; the limit is 200")
    prompt = f"Question: {question.rstrip('?').strip()}? Answer:" if question else "Picture:"
    with torch.no_grad():
        print(model.answer(tokenizer, pixels[None], [prompt])[0].strip())


@alone
def train_pictures(config: PictureConfig, exam: PictureExam, run: RunConfig) -> None:
    """Train encoders, projector and updates, examine them, and write out/picture_model with its card."""
    announce(
        "train a picture model", 0.16 * config.pair_steps + 0.15 * config.join_steps + 0.25 * config.tune_steps + 40
    )
    before, tokenizer = time.process_time(), load_course_tokenizer()
    pair = train_pairs(config, run.seed)
    model = attach(pair, config, run.seed)
    for stage in ("join", "tune"):
        train_text(model, tokenizer, config, run.seed, stage)
    spent = time.process_time() - before
    scores = {split: examine_pictures(model, tokenizer, split, exam) for split in ("seen", "held-out")}
    scores["shuffled"] = examine_pictures(model, tokenizer, "seen", exam, shuffled=True)
    write_picture_model(model, pair, config, exam, spent, run.out / "picture_model", scores)
    for split, found in scores.items():
        print(f"{split:9}" + "  ".join(f"{kind} {share:.0%}" for kind, share in found.items()))
    print(f"in {shown(run.out / 'picture_model')}")


def write_picture_model(
    model: PictureLM,
    pair: PairEncoders,
    config: PictureConfig,
    exam: PictureExam,
    spent: float,
    folder: Path,
    scores: Scores,
) -> None:
    """Write the folder of an examined model: spent is its CPU seconds, scores are by split and kind."""
    command = f"python {Path(__file__).parent.name}/real_world_applications.py train-pictures"
    report: dict[str, Any] = scores | {"recall": recall_at(pair, "held-out", exam), "command": command}
    report |= {"cpu_seconds": spent, "machine": describe_machine()}
    report |= {"date": str(datetime.datetime.now(datetime.UTC).date())}
    report |= {"n_questions": exam.n_questions, "n_pairs": exam.n_pairs}
    save_picture_model(model, pair, config, folder, report)


PICTURE_VERBS: dict[str, tuple[Any, ...]] = {
    "picture": (picture, PictureQuestionConfig, RunConfig),
    "train-pictures": (train_pictures, PictureConfig, PictureExam, RunConfig),
}
