"""Topic 15 - Scene pictures: what is on them is known exactly, so that captions and answers can be scored exactly.

    scene = draw_scene(rng, "train")                       # topic 02's scenes, with sizes, a digit and dots
    pixels = render(scene, rng)                            # (3, 30, 30) in 0..1; digits are real handwriting
    captions_of(scene), describe(scene)                    # every true caption in the world's words; the full text
    ask(scene, rng, "colour", "train")                     # Question(kind, prompt, answer, choices, held_out)
    load_picture(root, "holiday.png")                      # a stranger's file as the model's pixels, or one line

Held out are combinations, not things: pairs of a colour and a shape, of a colour and a digit, of a colour and a number
of dots that no training picture shows and no training question names, although each half of a pair is everywhere.

Johnson et al. 2017 (CLEVR, arXiv 1612.06890): rendered scenes with exact questions and held-out combinations; Goyal et
al. 2017 (arXiv 1612.00837): why the answers must be balanced. Digits: Alpaydin and Kaynak 1998, as scikit-learn has
them.
"""

import io
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from document_loaders import LoadLimits, read_inside, shorten
from tiny_world import OPPOSITE, Scene, World, pick
from vision_transformer import load_digits_images
from workbench import check_name, check_range

GRID, CELL = 3, 10  # cells on a side of a picture, pixels on a side of a cell
SIDE = GRID * CELL
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 2.6, "large": 4.2}  # half the width of a shape, in pixels
COUNTS = (0, 1, 2, 3)
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))  # free of shapes in every scene of the world
RGB = {
    "red": (215, 40, 40),
    "blue": (45, 75, 220),
    "green": (40, 150, 60),
    "yellow": (240, 215, 50),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "pink": (250, 150, 195),
    "brown": (120, 70, 30),
}
COLOURS = tuple(RGB)
KINDS = ("colour", "relation", "size", "count", "digit", "exists")  # of questions
CHOICES = {
    "colour": 8,
    "relation": 3,
    "size": 2,
    "count": 4,
    "digit": 10,
    "exists": 2,
}  # answers left without the picture
SPLITS = ("train", "seen", "held-out")


# Scenes


@dataclass(frozen=True)
class Thing:
    """Something in one cell of the grid."""

    look: str  # a shape, a digit "0" to "9", or "dot"
    colour: str
    size: str
    row: int  # 0 is the top
    column: int  # 0 is the left


@dataclass(frozen=True)
class PictureScene:
    """Two or three shapes around the middle as topic 02 places them, one digit and up to three dots in the corners."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]  # (index of a shape, relation, index of another shape)
    image: int = 0  # which handwritten image of its class the digit is, modulo their number
    split: str = "train"

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.look in SHAPES)

    @property
    def digit(self) -> Thing:
        return next(thing for thing in self.things if thing.look.isdigit())

    @property
    def dots(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.look == "dot")

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """The pairs of colour and look; dots count as one look, "2 dots"."""
        found = {(thing.colour, thing.look) for thing in (*self.shapes, self.digit)}
        dots = self.dots
        return frozenset(found | {(dots[0].colour, f"{len(dots)} dots")} if dots else found)


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The pairs that training never shows: one colour for each shape and number of dots, one or two for each digit.

    Every colour and every look still stands in many other pairs.
    """
    looks = [(name, 2 * index) for index, name in enumerate(SHAPES)]
    looks += [(str(digit), digit + 5) for digit in range(10)]
    looks += [(f"{count} dots", 3 * count + 3) for count in COUNTS[1:]]
    return frozenset(
        (colour, look)
        for look, shift in looks
        for number, colour in enumerate(COLOURS)
        if (number + shift) % len(COLOURS) == 0
    )


HELD_OUT = held_out_pairs()


def draw_scene(rng: random.Random, split: str = "train") -> PictureScene:
    """A scene of the world with sizes, a digit and dots.

    split "train" and "seen": without any held-out pair; "held-out": with at least one. The handwriting of the last two
    is that of the held-out images.
    """
    check_name("split", split, SPLITS)
    while True:
        base: Scene = world().document(rng, "scene").scene
        corners = list(CORNERS)
        things = [Thing(one.shape, one.colour, pick(rng, tuple(SIZES)), one.row, one.column) for one in base.objects]
        for look in (str(int(10 * rng.random())), *("dot",) * pick(rng, COUNTS)):
            place = corners.pop(int(rng.random() * len(corners)))
            colour = things[-1].colour if look == "dot" and things[-1].look == "dot" else pick(rng, COLOURS)
            things.append(Thing(look, colour, "small", *place))
        scene = PictureScene(tuple(things), base.relations, int(rng.random() * 10_000), split)
        if bool(scene.pairs & HELD_OUT) == (split == "held-out"):
            return scene


@cache
def world() -> World:
    return World()


# Pixels


@cache
def shape_mask(look: str, size: str, down: int, across: int) -> np.ndarray:
    """How much of each pixel of a cell a shape covers, (CELL, CELL) in 0..1; it is moved by (down, across) pixels."""
    half = 1.6 if look == "dot" else SIZES[size]
    fine = (np.arange(8 * CELL) + 0.5) / 8 - CELL / 2  # 8 x 8 samples for a pixel
    y, x = (fine - down)[:, None], (fine - across)[None, :]
    if look in ("circle", "dot"):
        inside = x * x + y * y <= half * half
    elif look == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.88 * half
    elif look == "triangle":
        inside = (abs(x) <= (y + half) / 2) & (y <= 0.8 * half)
    else:  # four points: an astroid, blown up so that its arms are wider than a pixel
        inside = np.sqrt(abs(x)) + np.sqrt(abs(y)) <= np.sqrt(1.25 * half)
    return inside.reshape(CELL, 8, CELL, 8).mean(axis=(1, 3))


@cache
def handwriting(held_out: bool) -> dict[str, np.ndarray]:
    """Class -> images (images, 8, 8) in 0..1; no image stands on both sides."""
    digits = load_digits_images("content", 0)[held_out]
    return {str(digit): (digits.images[digits.labels == digit, 0].numpy() + 1) / 2 for digit in range(10)}


def thing_mask(scene: PictureScene, thing: Thing, rng: random.Random) -> np.ndarray:
    """The cover of one thing in its cell, a little off the middle: (CELL, CELL)."""
    if thing.look.isdigit():
        images = handwriting(scene.split != "train")[thing.look]
        mask, free = np.zeros((CELL, CELL)), CELL - 8
        top, left = (int(rng.random() * (free + 1)) for _ in range(2))
        mask[top : top + 8, left : left + 8] = images[scene.image % len(images)]
        return mask
    down, across = (int(rng.random() * 3) - 1 for _ in range(2))
    if thing.size == "large":
        down, across = 0, 0 if thing.look == "square" else across  # there is no room to move
    return shape_mask(thing.look, thing.size, down, across)


def render(scene: PictureScene, rng: random.Random, noise: float = 0.02) -> Tensor:
    """The picture of a scene, (3, 30, 30) in 0..1: grey paper of a random shade, jitter and noise of the pixels."""
    pixels = np.full((SIDE, SIDE, 3), 0.42 + 0.14 * rng.random(), dtype=np.float32)
    for thing in scene.things:
        top, left = thing.row * CELL, thing.column * CELL
        cell = pixels[top : top + CELL, left : left + CELL]
        mask = thing_mask(scene, thing, rng)[..., None]
        cell += (mask * (np.array(RGB[thing.colour]) / 255 - cell)).astype(np.float32)
    grain = np.random.default_rng(int(rng.random() * 2**32)).normal(0, noise, pixels.shape)
    return torch.from_numpy((pixels + grain).clip(0, 1).astype(np.float32)).permute(2, 0, 1)  # (3, side, side)


def render_all(scenes: Sequence[PictureScene], rng: random.Random) -> Tensor:
    """(pictures, 3, 30, 30)"""
    return torch.stack([render(scene, rng) for scene in scenes])


# Texts


def captions_of(scene: PictureScene) -> list[str]:
    """Every true caption in the world's words, the one that topic 02 would write first.

    With three shapes the middle one is what the others lie around, in either order; with two, either may begin.
    """
    shapes = scene.shapes
    told = [(relation, shapes[other]) for _, relation, other in scene.relations]

    def said(thing: Thing) -> str:
        return f"a {thing.colour} {thing.look}"

    orders = [told, told[::-1]] if len(told) > 1 else [told]
    found = [
        f"Picture: {said(shapes[0])} " + " and ".join(f"{relation} {said(other)}" for relation, other in order) + "."
        for order in orders
    ]
    if len(told) == 1:
        found.append(f"Picture: {said(shapes[1])} {OPPOSITE[told[0][0]]} {said(shapes[0])}.")
    return found


def describe(scene: PictureScene) -> str:
    """Everything that can be told of a scene but exact places, in one order: what retrieval compares pictures with."""
    shapes, dots = scene.shapes, scene.dots

    def said(thing: Thing) -> str:
        return f"a {thing.size} {thing.colour} {thing.look}"

    told = sorted((relation, said(shapes[other])) for _, relation, other in scene.relations)
    text = f"{said(shapes[0])} " + " and ".join(f"{relation} {other}" for relation, other in told)
    counted = f"{len(dots)} {dots[0].colour} {'dot' if len(dots) == 1 else 'dots'}" if dots else "no dots"
    return f"{text}, {counted}, a {scene.digit.colour} {scene.digit.look}"


class Question(NamedTuple):
    kind: str
    prompt: str  # ends with "Answer:"
    answer: str  # begins with a space and ends with a full stop
    n_choices: int  # answers that the question leaves possible without the picture
    held_out: bool  # whether it is about a held-out pair


def ask(scene: PictureScene, rng: random.Random, kind: str, split: str = "train") -> Question:
    """A question with its exact answer. Nothing but the picture can tell it: blind guessing has 1 / n_choices.

    split "train": no question names a held-out pair, not even to deny it, because "no" would be its constant answer.
    "held-out": about a held-out pair wherever the scene has one for this kind of question.
    """
    check_name("kind of question", kind, KINDS)
    if kind == "count":
        dots = scene.dots
        new = bool(dots) and (dots[0].colour, f"{len(dots)} dots") in HELD_OUT
        return Question(kind, "Question: how many dots? Answer:", f" {len(dots)}.", len(COUNTS), new)
    if kind == "digit":
        new = (scene.digit.colour, scene.digit.look) in HELD_OUT
        return Question(kind, "Question: what number is it? Answer:", f" {scene.digit.look}.", 10, new)
    if kind == "exists":
        return ask_exists(scene, rng, split)
    if kind == "relation":
        return ask_relation(scene, rng, split)
    thing = preferred(scene.shapes, rng, split)
    new = is_held_out(thing)
    if kind == "colour":
        return Question(kind, f"Question: what colour is the {thing.look}? Answer:", f" {thing.colour}.", 8, new)
    return Question(kind, f"Question: is the {thing.look} small or large? Answer:", f" {thing.size}.", 2, new)


def is_held_out(thing: Thing) -> bool:
    return (thing.colour, thing.look) in HELD_OUT


def preferred(things: Sequence[Thing], rng: random.Random, split: str) -> Thing:
    """One of the things; for held-out questions one of a held-out pair, if there is any."""
    return pick(rng, [thing for thing in things if is_held_out(thing)] * (split == "held-out") or list(things))


def ask_relation(scene: PictureScene, rng: random.Random, split: str) -> Question:
    shapes = scene.shapes
    told = [(shapes[one], relation, shapes[other]) for one, relation, other in scene.relations]
    told += [(other, OPPOSITE[relation], one) for one, relation, other in told]
    new = [item for item in told if is_held_out(item[0])]
    thing, relation, other = pick(rng, new * (split == "held-out") or told)
    prompt = f"Question: what is {relation} the {other.look}? Answer:"
    return Question("relation", prompt, f" the {thing.look}.", len(SHAPES) - 1, is_held_out(thing))


def ask_exists(scene: PictureScene, rng: random.Random, split: str) -> Question:
    """Yes or no, equally often; the pair of a "no" puts the colour of one shape on another, so that binding decides."""
    real = [(thing.colour, thing.look) for thing in scene.shapes]
    swapped = [(one.colour, other.look) for one in scene.shapes for other in scene.shapes if one != other]
    wanted = {"train": lambda pair: pair not in HELD_OUT, "held-out": lambda pair: pair in HELD_OUT}
    keep = wanted["held-out" if split == "held-out" else "train"]
    yes = rng.random() < 0.5
    options = [pair for pair in (real if yes else swapped) if keep(pair)]
    if not options:  # then about any pair that this split may ask about, with its true answer still decided by the coin
        anything = [(colour, look) for look in SHAPES for colour in COLOURS if keep((colour, look))]
        options = [pair for pair in anything if (pair in real) == yes] or (real if yes else swapped)
    colour, look = pick(rng, options)
    answer = " yes." if yes else " no."
    return Question("exists", f"Question: is there a {colour} {look}? Answer:", answer, 2, (colour, look) in HELD_OUT)


# Pictures of strangers


@dataclass(frozen=True)
class PictureLimits:
    """What of a picture file is accepted, all of it checked before a pixel is unpacked."""

    max_bytes: int = 4 * 2**20  # of the file
    max_pixels: int = 4096 * 1024  # width times height
    max_side: int = 8192  # of either side
    formats: tuple[str, ...] = ("PNG", "JPEG")  # by content; a file's name says nothing

    def __post_init__(self) -> None:
        check_range(self, "max_bytes", "max_pixels", "max_side", least=1)


PICTURES = PictureLimits()


def load_picture(root: Path, name: str, limits: PictureLimits = PICTURES) -> Tensor:
    """A picture file inside a folder as the model's pixels, (3, 30, 30) in 0..1; see `decode_picture`.

    The file is opened as topic 15's documents are: no path out of the folder, no links, no devices, at most max_bytes.
    """
    data = read_inside(root, name, LoadLimits(max_bytes=limits.max_bytes))
    return decode_picture(data, shorten(name), limits)


def decode_picture(data: bytes, name: str = "the picture", limits: PictureLimits = PICTURES) -> Tensor:
    """The bytes of a PNG or JPEG as pixels (3, 30, 30) in 0..1, upright, its middle square, scaled.

    A file's header is believed only within the limits and before anything is unpacked: 30,000 x 30,000 pixels of one
    colour fit into a few kilobytes. Raises ValueError, in one line, for everything that is not a sound picture.
    """
    from PIL import Image, ImageOps  # here: the scenes need no picture files

    if len(data) > limits.max_bytes:
        raise ValueError(f"refused: {name} has {len(data):,} bytes; the limit is {limits.max_bytes:,}")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=limits.formats) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if max(width, height) > limits.max_side or width * height > limits.max_pixels:
                raise ValueError(f"it claims {width} x {height} pixels, more than {limits.max_pixels:,} in all")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames; give a single picture")
            image.load()
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a decoder fed with a hostile file may raise anything; all of it is the file's fault
        kinds, problem = " or ".join(limits.formats), " ".join(str(error).split())[:160]
        raise ValueError(f"refused: {name} is not a sound {kinds} file: {problem}") from None
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    square = np.array(upright.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None]  # (1, 3, *, *)
    return F.interpolate(pixels, (SIDE, SIDE), mode="area")[0]


def png_bytes(pixels: Tensor, scale: int = 8) -> bytes:
    """A picture (3, 30, 30) as a PNG file, every pixel `scale` pixels wide."""
    from PIL import Image

    square = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(square).resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plot_pictures(pixels: Tensor, titles: Sequence[str], n_columns: int = 4) -> Figure:
    """Pictures (pictures, 3, 30, 30), each above its text."""
    n_rows = -(-len(pixels) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(2.4 * n_columns, 3.2 * n_rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture, title in zip(axes.flat, pixels, titles, strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=8.5, loc="left", y=-0.05, va="top")
    return figure
