"""Proofs of scene_pictures.py: what is drawn is what is told, held-out pairs stay out, hostile files are one line."""

import io
import random
import struct
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scene_pictures import (
    CELL,
    COLOURS,
    COUNTS,
    HELD_OUT,
    KINDS,
    RGB,
    SHAPES,
    SIDE,
    SIZES,
    PictureLimits,
    PictureScene,
    Thing,
    ask,
    captions_of,
    decode_picture,
    describe,
    draw_scene,
    handwriting,
    load_picture,
    plot_pictures,
    png_bytes,
    render,
    render_all,
    shape_mask,
)
from tiny_world import OFFSET, World, words

STAR = Thing("star", "red", "large", 1, 1)
SQUARE = Thing("square", "blue", "small", 1, 0)
SEVEN = Thing("7", "green", "small", 0, 2)
DOTS = (Thing("dot", "pink", "small", 0, 0), Thing("dot", "pink", "small", 2, 2))
SCENE = PictureScene((STAR, SQUARE, SEVEN, *DOTS), ((0, "right of", 1),))


def scenes(split: str, n: int, seed: int = 0) -> list[PictureScene]:
    rng = random.Random(seed)
    return [draw_scene(rng, split) for _ in range(n)]


# Scenes and pixels


def test_training_never_shows_a_held_out_pair_and_every_half_of_one_is_everywhere():
    seen, things = Counter(), Counter()
    for scene in scenes("train", 400):
        assert not scene.pairs & HELD_OUT
        seen.update(colour for colour, _ in scene.pairs)
        things.update(look for _, look in scene.pairs)
    assert set(seen) == set(COLOURS) and set(things) == {*SHAPES, *"0123456789", *(f"{n} dots" for n in COUNTS[1:])}
    assert {look for _, look in HELD_OUT} == set(things) and {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert all(scene.pairs & HELD_OUT for scene in scenes("held-out", 40))
    assert not any(scene.pairs & HELD_OUT for scene in scenes("seen", 40))


def test_things_lie_in_cells_of_their_own_and_as_the_relations_say():
    for scene in scenes("train", 200, 1):
        cells = [(thing.row, thing.column) for thing in scene.things]
        assert len(set(cells)) == len(cells)
        for one, relation, other in scene.relations:
            (a, b), (down, across) = (scene.shapes[one], scene.shapes[other]), OFFSET[relation]
            assert (b.row - a.row, b.column - a.column) == (down, across)


def test_the_pixels_of_a_thing_have_its_colour_and_the_cells_between_are_paper():
    pixels = render(PictureScene((replace(STAR, look="circle"), *SCENE.things[1:]), ()), random.Random(0), noise=0.0)
    assert pixels.shape == (3, SIDE, SIDE) and pixels.min() >= 0 and pixels.max() <= 1
    centre = pixels[:, SIDE // 2, SIDE // 2]
    assert torch.allclose(centre, torch.tensor(RGB["red"]) / 255, atol=1e-6)
    paper = pixels[:, 2 * CELL : 3 * CELL, 0:CELL]
    assert paper.std() < 1e-6 and 0.42 <= paper.mean() <= 0.56
    corner = pixels[:, 2 * CELL :, 2 * CELL :].flatten(1)  # (3, cell * cell)
    assert (corner - torch.tensor(RGB["pink"])[:, None] / 255).abs().amax(dim=0).min() < 1e-6  # one pixel is all dot


def test_large_is_larger_and_the_four_shapes_differ():
    areas = {(look, size): shape_mask(look, size, 0, 0).sum() for look in SHAPES for size in SIZES}
    assert all(areas[look, "large"] > 2 * areas[look, "small"] for look in SHAPES)
    assert areas["circle", "large"] == pytest.approx(np.pi * SIZES["large"] ** 2, rel=0.02)
    masks = [shape_mask(look, "small", 0, 0) for look in SHAPES]
    assert all(abs(a - b).sum() > 3 for i, a in enumerate(masks) for b in masks[:i])
    moved = shape_mask("star", "small", 1, -1)
    assert np.allclose(moved[1:, :-1], shape_mask("star", "small", 0, 0)[:-1, 1:])


def test_the_handwriting_of_the_exam_is_not_that_of_training():
    train, held_out = handwriting(False), handwriting(True)
    written = {image.tobytes() for images in train.values() for image in images}
    assert all(len(train[digit]) > 50 and len(held_out[digit]) > 10 for digit in train)
    assert not written & {image.tobytes() for images in held_out.values() for image in images}


def test_a_scene_is_drawn_alike_from_one_seed_and_otherwise_from_another():
    one, same, other = (render(SCENE, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert render_all([SCENE, SCENE], random.Random(1)).shape == (2, 3, SIDE, SIDE)


# Texts


def test_captions_are_the_worlds_own_and_all_of_them_are_true():
    assert captions_of(SCENE) == [
        "Picture: a red star right of a blue square.",
        "Picture: a blue square left of a red star.",
    ]
    world = World()
    for scene in scenes("train", 40, 2):
        for caption in captions_of(scene):
            nats, allowed = world.follow(words(caption))  # raises for a text that no document begins with
            assert allowed and len(nats) == len(words(caption))
    assert any(len(captions_of(scene)) == 2 and len(scene.shapes) == 3 for scene in scenes("train", 40, 2))


def test_the_full_description_by_hand():
    assert describe(SCENE) == "a large red star right of a small blue square, 2 pink dots, a green 7"


def test_every_question_has_the_answer_that_the_scene_gives():
    rng, found = random.Random(3), {kind: set() for kind in KINDS}
    for _ in range(60):
        for kind in KINDS:
            question = ask(SCENE, rng, kind)
            assert question.prompt.endswith("Answer:") and question.answer[0] == " " and question.answer[-1] == "."
            found[kind].add((question.prompt.removeprefix("Question: ").removesuffix(" Answer:"), question.answer))
    assert found["colour"] == {("what colour is the star?", " red."), ("what colour is the square?", " blue.")}
    assert found["relation"] == {
        ("what is right of the square?", " the star."),
        ("what is left of the star?", " the square."),
    }
    assert found["size"] == {
        ("is the star small or large?", " large."),
        ("is the square small or large?", " small."),
    }
    assert found["count"] == {("how many dots?", " 2.")} and found["digit"] == {("what number is it?", " 7.")}
    assert {answer for _, answer in found["exists"]} == {" yes.", " no."}
    assert ("is there a blue star?", " no.") in found["exists"]


def test_yes_and_no_are_balanced_and_training_never_names_a_held_out_pair():
    for split in ("train", "held-out"):
        rng, answers = random.Random(4), Counter()
        for scene in scenes(split, 600, 4):
            question = ask(scene, rng, "exists", split)
            answers[question.answer] += 1
            assert question.held_out == (split == "held-out") or split == "held-out" and question.answer == " yes."
        assert 240 < answers[" yes."] < 360  # a fair coin leaves this with probability 1e-6
    rng = random.Random(5)
    for scene in scenes("train", 200, 5):
        assert not any(ask(scene, rng, kind).held_out for kind in KINDS)


def test_held_out_questions_are_about_held_out_pairs_where_there_is_one():
    rng = random.Random(6)
    for scene in scenes("held-out", 100, 6):
        new = any((thing.colour, thing.look) in HELD_OUT for thing in scene.shapes)
        assert all(ask(scene, rng, kind, "held-out").held_out == new for kind in ("colour", "size", "relation"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown kind of question 'smell'"):
        ask(SCENE, random.Random(0), "smell")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        draw_scene(random.Random(0), "test")


# Files of strangers


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bombs() -> dict[str, bytes]:
    photo = Image.effect_noise((40, 40), 50).convert("RGB")
    bomb = zlib.compress(bytes(30_001 * 3000))
    text = zlib.compress(b"x" * 50_000_000)
    itxt = b"a\x00\x00" + text
    frames = saved(photo, "GIF", save_all=True, append_images=[photo] * 3)
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return {
        "30,000 x 30,000": png(30_000, 30_000, bomb),
        "one long row": png(9000, 1, zlib.compress(bytes(9001))),
        "empty": b"",
        "text": b"<svg onload=alert(1)>",
        "cut off": saved(photo, "PNG")[:200],
        "cut off JPEG": saved(photo, "JPEG")[:300],
        "another kind": frames,
        "several frames": saved(photo, "PNG", save_all=True, append_images=[photo.rotate(90)] * 2),
        "broken EXIF": saved(photo, "JPEG", exif=exif)[:30_000],
        "text bomb": png(
            10, 10, b"", struct.pack(">I", len(itxt)) + b"zTXt" + itxt + struct.pack(">I", zlib.crc32(b"zTXt" + itxt))
        ),
    }


def test_every_hostile_file_is_one_line(tmp_path):
    for name, data in bombs().items():
        (tmp_path / "picture.png").write_bytes(data)
        with pytest.raises(ValueError, match="^refused: ") as refusal:
            load_picture(tmp_path, "picture.png")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300, name


def test_pixels_are_refused_before_they_are_unpacked(monkeypatch):
    def unpack(*args, **options):
        raise AssertionError("the picture was unpacked")

    monkeypatch.setattr(Image.Image, "load", unpack)
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", unpack)
    for side, reason in ((30_000, "decompression bomb"), (3000, "claims 3000 x 3000 pixels")):
        with pytest.raises(ValueError, match=reason):
            decode_picture(png(side, side, zlib.compress(bytes(1000))))


def test_files_outside_the_folder_links_and_large_files_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    data = png_bytes(render(SCENE, random.Random(0)))
    (tmp_path / "out.png").write_bytes(data)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    for name in ("../out.png", "/etc/passwd", "link.png", "%2e%2e/out.png", "absent.png"):
        with pytest.raises(ValueError, match="refused|cannot|no file|not"):
            load_picture(tmp_path / "in", name)
    with pytest.raises(ValueError, match="bytes"):
        load_picture(tmp_path, "out.png", PictureLimits(max_bytes=100))
    with pytest.raises(ValueError, match="limit is 100"):
        decode_picture(data, limits=PictureLimits(max_bytes=100))


def test_a_sound_picture_comes_back_upright_square_and_small(tmp_path):
    pixels = render(SCENE, random.Random(0))
    (tmp_path / "one.png").write_bytes(png_bytes(pixels))
    assert (load_picture(tmp_path, "one.png") - pixels).abs().max() < 0.01
    turned = Image.open(io.BytesIO(png_bytes(pixels))).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn it clockwise to see it"
    assert (decode_picture(saved(turned, "PNG", exif=exif)) - pixels).abs().max() < 0.01
    wide = Image.new("RGBA", (90, 30), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 255), (30, 0, 60, 30))
    middle = decode_picture(saved(wide, "PNG"))
    assert middle.shape == (3, SIDE, SIDE) and middle[2].mean() > 0.99 and middle[0].mean() < 0.01
    for mode in ("L", "1", "P", "I;16", "LA"):
        assert decode_picture(saved(Image.new(mode, (31, 33)), "PNG")).shape == (3, SIDE, SIDE)
    assert decode_picture(saved(Image.new("CMYK", (31, 33)), "JPEG")).shape == (3, SIDE, SIDE)


def test_the_plot_has_a_place_for_every_picture():
    figure = plot_pictures(render_all([SCENE] * 5, random.Random(0)), ["a", "b", "c", "d", "e"], 3)
    assert len(figure.axes) == 6 and [axis.get_title(loc="left") for axis in figure.axes[:2]] == ["a", "b"]
