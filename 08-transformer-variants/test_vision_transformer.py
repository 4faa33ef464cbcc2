"""Topic 08: the Vision Transformer against Hugging Face and nn.Conv2d, its data, and pictures from a reader."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import vision_transformer as topic
from optimizers import shapes_alone
from vision_transformer import (
    VIT_BASE,
    DigitsConfig,
    DistilledVisionTransformer,
    PatchEmbedding,
    VisionConfig,
    VisionTransformer,
    attention_of,
    attention_rollout,
    augment,
    classify_image,
    digit_tensor,
    fit_classifier,
    hard_distillation_loss,
    image_accuracy,
    image_tensor,
    load_digits_images,
    open_image,
    patchify,
    plot_rollout,
    unpatchify,
)
from workbench import seed_everything

BATCH, CHANNELS, SIDE, PATCH = 2, 3, 12, 4
SMALL = VisionConfig(SIDE, PATCH, CHANNELS, n_classes=7, d_model=20, n_layers=2, n_heads=5, d_ff=32)
NAMES = {  # ours: theirs in memory, which are not the names in their files
    "patch_proj": "embeddings.patch_embeddings.projection",
    "encoder.final_norm": "layernorm",
    "attn_norm": "layernorm_before",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.o_proj",
    "ffn_norm": "layernorm_after",
    "ffn.up_proj": "mlp.fc1",
    "ffn.down_proj": "mlp.fc2",
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)


def shake(module: nn.Module) -> nn.Module:
    """Move every parameter away from special values: a weight of 1 and a bias of 0 would hide mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def huggingface(kind: str, config: VisionConfig = SMALL) -> nn.Module:
    import transformers

    prefix = {"vit": "ViT", "deit": "DeiT"}[kind]
    theirs = getattr(transformers, f"{prefix}Config")(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.n_channels,
        num_labels=config.n_classes,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
    )
    name = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}[kind]
    return shake(getattr(transformers, name)(theirs)).eval()


def gradients_by_our_names(ours: VisionTransformer, theirs: nn.Module) -> tuple[dict, dict]:
    """The gradients of both models' parameters under our names; theirs are looked up by their names in memory."""
    kind, found = ours.model_type, {}
    heads = {head: f"{name}" for name, head in ours.head_names.items()}
    single = {"class_token": "cls_token", "teacher_token": "distillation_token", "pos_emb": "position_embeddings"}
    memory = dict(theirs.named_parameters())
    for name, _ in ours.named_parameters():
        part, _, kind_of = name.rpartition(".")
        if name in single:
            key = f"{kind}.embeddings.{single[name]}"
        elif part in heads:
            key = f"{heads[part]}.{kind_of}"
        elif part.startswith("encoder.blocks."):
            layer, _, inner = part.removeprefix("encoder.blocks.").partition(".")
            key = f"{kind}.layers.{layer}.{NAMES[inner]}.{kind_of}"
        else:
            key = f"{kind}.{NAMES[part]}.{kind_of}"
        found[name] = memory.pop(key).grad
    assert not memory, f"parameters of theirs without a partner: {list(memory)}"
    return {name: parameter.grad for name, parameter in ours.named_parameters()}, found


# Parity


@pytest.mark.parametrize(("kind", "cls"), [("vit", VisionTransformer), ("deit", DistilledVisionTransformer)])
def test_both_directions_of_loading_outputs_losses_and_gradients(parity, tmp_path, kind, cls) -> None:
    import transformers

    theirs = huggingface(kind)
    oracle = f"transformers {type(theirs).__name__}"
    theirs.save_pretrained(tmp_path / "theirs")  # in float32: both then go on from the same numbers in float64
    theirs = theirs.double()
    ours = cls.from_pretrained(tmp_path / "theirs").double()
    assert dataclasses.replace(ours.config, norm_eps=1e-12) == SMALL
    x, labels = images(BATCH, CHANNELS, SIDE, SIDE), torch.tensor([4, 0])
    actual, expected = ours(x), theirs(x).logits
    parity(cls.__name__, oracle, "exchange", actual, expected, 1e-10)
    ours.labels = list("abcdefg")
    shake(ours).save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    losses = F.cross_entropy(ours(x), labels), F.cross_entropy(back(x).logits, labels)
    parity(cls.__name__, oracle, "exchange", ours(x), back(x).logits, 1e-10)
    if kind == "vit":
        parity(cls.__name__, oracle, "output", losses[0], back(x, labels=labels).loss, 1e-10)
    input_gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    parity(cls.__name__, oracle, "gradient", *input_gradients, 1e-10)
    for loss in losses:
        loss.backward()
    parity(cls.__name__, oracle, "gradient", *gradients_by_our_names(ours, back), 1e-10)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.num_labels == 7 and config.id2label[6] == "g"


def test_a_training_trajectory_equals_hugging_faces(parity, tmp_path) -> None:
    theirs = huggingface("vit")
    theirs.save_pretrained(tmp_path)
    theirs = theirs.double()
    ours = VisionTransformer.from_pretrained(tmp_path).double().train()
    x, labels, losses = images(5, CHANNELS, SIDE, SIDE).detach(), torch.tensor([4, 0, 6, 1, 4]), []
    for model, forward in ((ours, ours), (theirs.train(), lambda x: theirs(x).logits)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(12):
            loss = F.cross_entropy(forward(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    parity("VisionTransformer", "transformers ViTForImageClassification", "trajectory", *losses, 1e-10)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 20)])
@pytest.mark.parametrize(("kind", "cls"), [("vit", VisionTransformer), ("deit", DistilledVisionTransformer)])
def test_interpolated_positions_equal_hugging_faces(parity, tmp_path, kind, cls, size) -> None:
    theirs = huggingface(kind)
    theirs.save_pretrained(tmp_path)
    theirs = theirs.double()
    ours, x = cls.from_pretrained(tmp_path).double(), images(BATCH, CHANNELS, *size)
    expected = theirs(x, interpolate_pos_encoding=True).logits
    parity(cls.__name__, f"transformers {type(theirs).__name__}", "output", ours(x), expected, 1e-10)
    assert (ours(x) - ours(x.transpose(2, 3))).abs().max() > 1e-3 if size[0] == size[1] else True


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patch_embedding_is_a_convolution_and_patchify_is_unfold(parity, patch_size) -> None:
    ours = shake(PatchEmbedding(CHANNELS, patch_size, 10)).double()
    theirs = nn.Conv2d(CHANNELS, 10, patch_size, stride=patch_size).double()
    theirs.load_state_dict(ours.state_dict())
    x = images(BATCH, CHANNELS, 6, 12)
    actual, expected = ours(x), theirs(x).flatten(2).transpose(1, 2)
    parity("PatchEmbedding", "nn.Conv2d", "output", actual, expected, 1e-10)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, direction, retain_graph=True)[0] for y in (actual, expected)]
    parity("PatchEmbedding", "nn.Conv2d", "gradient", *gradients, 1e-10)
    unfolded = F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)
    parity("patchify", "F.unfold", "output", patchify(x, patch_size), unfolded, 0.0)
    parity("unpatchify", "patchify", "invariant", unpatchify(patchify(x, patch_size), CHANNELS, 6, 12), x, 0.0)


def test_published_parameter_count() -> None:
    with shapes_alone():
        assert sum(parameter.numel() for parameter in VisionTransformer(VIT_BASE).parameters()) == 86_567_656
        # DeiT-B, distilled: one more token, one more position, one more head
        distilled = sum(parameter.numel() for parameter in DistilledVisionTransformer(VIT_BASE).parameters())
        assert distilled == 86_567_656 + 2 * 768 + 1000 * 769


def test_picture_preparation_equals_hugging_faces_processor(parity, tmp_path) -> None:
    from transformers import AutoImageProcessor

    model = VisionTransformer(SMALL)
    model.pixel_mean, model.pixel_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    model.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    again = VisionTransformer.from_pretrained(tmp_path)
    parity("image_tensor", "transformers ViTImageProcessor", "output", image_tensor(picture, again), expected, 1e-6)


# Invariants


def test_without_positions_the_class_token_sees_a_set_of_patches() -> None:
    model, x = shake(VisionTransformer(SMALL)).double(), images(BATCH, CHANNELS, SIDE, SIDE)
    patches = patchify(x, PATCH)
    shuffled = unpatchify(patches[:, torch.randperm(9)], CHANNELS, SIDE, SIDE)
    assert (model(x) - model(shuffled)).abs().max() > 1e-3
    model.pos_emb.data[:, 1:] = 0
    assert (model(x) - model(shuffled)).abs().max() < 1e-10


def test_rollout_by_hand_and_its_rows_sum_to_one() -> None:
    first = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 2, 2, 2)
    second = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).expand(1, 2, 2, 2)
    # layers: half attention, half residual: [[.5 .5] [0 1]] first, then [[.75 .25] [.5 .5]]; the later one stands left
    assert torch.allclose(attention_rollout([first, second]), torch.tensor([[[0.375, 0.625], [0.25, 0.75]]]))
    weights = attention_of(VisionTransformer(SMALL), torch.randn(BATCH, CHANNELS, SIDE, SIDE))
    assert [tuple(layer.shape) for layer in weights] == [(BATCH, 5, 10, 10)] * 2
    assert torch.allclose(attention_rollout(weights).sum(dim=-1), torch.ones(BATCH, 10))


def test_distillation_loss_by_hand() -> None:
    own, taught = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    teacher = torch.tensor([[0.1, 5.0]])
    expected = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2
    assert hard_distillation_loss((own, taught), torch.tensor([0]), teacher).item() == pytest.approx(expected, abs=1e-6)


# Data and learning


def test_digit_splits_share_no_image_and_hold_all_classes() -> None:
    for split, seeds in (("content", (0, 1)), ("writers", (0,))):
        for seed in seeds:
            train, held_out = load_digits_images(split, seed)
            assert len(train) + len(held_out) == 1797 and set(held_out.labels.tolist()) == set(range(10))
            pixels = [{image.numpy().tobytes() for image in part.images} for part in (train, held_out)]
            assert not pixels[0] & pixels[1]
            assert train.images.min() == -1 and train.images.max() == 1
    assert 300 < len(load_digits_images("content", 1)[1]) < 420
    assert len(load_digits_images("writers")[1]) == 899
    first, second = (load_digits_images("content", seed)[1].images for seed in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_augmentation_moves_images_and_is_off_at_zero() -> None:
    data, still = load_digits_images()[0], DigitsConfig(max_shift=0, max_turn=0, max_stretch=0)
    picture = data.images[:5]
    assert torch.allclose(augment(picture, still, torch.Generator()), picture, atol=1e-5)
    one = torch.full((200, 1, 8, 8), -1.0)
    one[:, :, 3:5, 3:5] = 1.0
    moved = augment(one, DigitsConfig(max_shift=2, max_turn=0, max_stretch=0), torch.Generator().manual_seed(0)) + 1
    rows = (moved.sum(dim=3)[:, 0] * torch.arange(8)).sum(dim=1) / moved.sum(dim=(1, 2, 3))
    assert abs(rows.mean() - 3.5) < 0.3 and 1.4 < rows.min() < 2 and 5 < rows.max() < 5.6
    assert torch.allclose(moved.sum(dim=(1, 2, 3)), torch.tensor(8.0), atol=1e-3)  # no ink is lost
    blot = torch.full((400, 1, 8, 8), -1.0)
    blot[:, :, 3:5, 5:7] = 1.0  # 2 pixels to the right of the middle
    for config in (DigitsConfig(max_shift=0, max_stretch=0), DigitsConfig(max_shift=0, max_turn=0)):
        ink = augment(blot, config, torch.Generator().manual_seed(0))[:, 0] + 1
        ink = ink / ink.sum(dim=(1, 2), keepdim=True)
        down = (ink.sum(dim=2) * (torch.arange(8) - 3.5)).sum(dim=1)
        right = (ink.sum(dim=1) * (torch.arange(8) - 3.5)).sum(dim=1)
        angle, far = torch.atan2(down, right).rad2deg(), torch.hypot(down, right)
        turned, stretched = angle.abs().max().item(), (far - 2).abs().max().item() / 2
        assert (8 < turned < 11 and stretched < 0.02) if config.max_turn else (turned < 1 and 0.09 < stretched < 0.15)


def test_every_epoch_shows_every_image_once_in_a_fresh_order() -> None:
    data = topic.Digits(torch.zeros(10, 1, 8, 8), torch.arange(10))
    batches = topic.image_batches(data, DigitsConfig(batch_size=4), 0)
    epochs = [[label for _ in range(3) for label in next(batches)[1].tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1] != list(range(10))
    broken = topic.Digits(torch.full((10, 1, 8, 8), float("nan")), torch.arange(10))
    with pytest.raises(ValueError, match="the loss is nan at step 0; lower --learning-rate"):
        fit_classifier(VisionTransformer(VisionConfig()), broken, DigitsConfig(batch_size=4), 0)


def test_training_overfits_a_batch_and_beats_chance() -> None:
    train, held_out = load_digits_images()
    config = DigitsConfig(max_steps=40, warmup_steps=4, learning_rate=4e-3)
    model = VisionTransformer(VisionConfig(d_model=32, n_layers=1, d_ff=32, patch_size=4))
    losses = fit_classifier(model, train, config, seed=0)
    assert abs(losses[0] - np.log(10)) < 0.3
    assert image_accuracy(model, held_out) > 0.25 and not model.training  # chance: 0.1
    few = topic.Digits(train.images[:12], train.labels[:12])
    still = dataclasses.replace(config, max_steps=60, max_shift=0, max_turn=0, max_stretch=0)
    model = VisionTransformer(VisionConfig(d_model=32, n_layers=1, d_ff=32, patch_size=4))
    assert fit_classifier(model, few, still, seed=0)[-1] < 0.2 and image_accuracy(model, few) == 1.0


def test_shape_comments_hold(checked_shapes) -> None:
    model = DistilledVisionTransformer(SMALL)
    with checked_shapes(topic) as checked:
        model(torch.randn(BATCH, CHANNELS, SIDE, SIDE))
        model(torch.randn(BATCH, CHANNELS, 8, SIDE))
        attention_rollout(attention_of(model, torch.randn(BATCH, CHANNELS, SIDE, SIDE)))
        unpatchify(patchify(torch.randn(BATCH, CHANNELS, 8, 6), 2), CHANNELS, 8, 6)
        data, _ = load_digits_images()
        augment(data.images[:3], DigitsConfig(), torch.Generator())
        digit_tensor(Image.fromarray((127.5 * (data.images[0, 0] + 1)).byte().numpy()))
        image_tensor(Image.new("RGB", (5, 9)), model)
    assert len(checked) >= 27
    figure = plot_rollout(data.images[:3], torch.rand(3, 4, 4), ["0", "1", "2"])
    assert len(figure.axes) == 7


# A reader's own picture


@pytest.fixture(scope="module")
def digit_model() -> VisionTransformer:
    """A model that knows each class from the class means of the data: enough to tell digits apart, in no time."""
    seed_everything(0)
    model = VisionTransformer(VisionConfig(d_model=32, n_layers=1, d_ff=64, patch_size=4))
    fit_classifier(model, load_digits_images()[0], DigitsConfig(max_steps=250, learning_rate=4e-3), seed=0)
    return model


def enlarged(image: torch.Tensor, dark_ink: bool) -> Image.Image:
    """A data image as a photo: 20 times larger, with a margin, in dark ink on light paper or the other way round."""
    ink = ((image[0] + 1) * 127.5).repeat_interleave(20, 0).repeat_interleave(20, 1)
    page = torch.zeros(300, 240)
    page[50:210, 40:200] = ink
    return Image.fromarray((255 - page if dark_ink else page).byte().numpy())


def test_a_picture_of_a_digit_becomes_the_image_that_it_shows(digit_model, tmp_path) -> None:
    _, held_out = load_digits_images()
    distances, right = [], 0
    for index in range(60):
        image, label = held_out.images[index], held_out.labels[index].item()
        picture = enlarged(image, dark_ink=index % 2 == 0)
        distances.append((digit_tensor(picture)[0] - image).abs().mean().item())
        picture.convert("RGB").save(tmp_path / "digit.png")
        best = classify_image(tmp_path / "digit.png", digit_model, n_best=3)
        assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] >= 0
        right += best[0][0] == str(label)
    assert np.mean(distances) < 0.35  # of 2; an image and its inverse differ by 1.2 on average
    assert right >= 40  # chance: 6


def test_a_colour_model_classifies_a_picture_file(tmp_path) -> None:
    model = shake(VisionTransformer(SMALL)).eval()
    model.labels = list("abcdefg")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    best = classify_image(tmp_path / "picture.png", model)
    expected = model(image_tensor(picture, model)).softmax(dim=-1)[0]
    assert len(best) == 5 and best[0] == ("abcdefg"[int(expected.argmax())], pytest.approx(expected.max().item()))


def claimed_size_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_hostile_and_broken_pictures_are_refused_in_one_line(tmp_path, monkeypatch) -> None:
    good = tmp_path / "good.png"
    Image.new("L", (30, 30), 200).save(good)
    whole = good.read_bytes()
    cases = {
        "bomb.png": (claimed_size_png(30_000, 30_000), "not a sound picture"),
        "large.png": (claimed_size_png(4097, 4096), r"it claims 4097 x 4096 pixels"),
        "cut.png": (whole[: len(whole) // 2], "not a sound picture"),
        "empty.png": (b"", "not a sound picture"),
        "text.png": (b"not a picture at all", "not a sound picture"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a sound picture"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as refused:
            open_image(tmp_path / name)
        assert "\n" not in str(refused.value) and name in str(refused.value)
    with pytest.raises(ValueError, match="is not a file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="is not a file"):
        open_image(tmp_path / "absent.png")
    monkeypatch.setattr(topic, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ValueError, match=r"bytes; the limit is 10"):
        open_image(good)
    with pytest.raises(ValueError, match="no contrast"):
        digit_tensor(Image.new("L", (30, 30), 200))


def test_a_picture_turned_by_its_camera_stands_upright(tmp_path) -> None:
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


# Bad input


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: VisionConfig(image_size=10, patch_size=4), r"10 x 10 pixels cannot be cut into patches of 4 x 4"),
        (lambda: VisionConfig(d_model=10, n_heads=4), "d_model=10 is not divisible by n_heads=4"),
        (lambda: VisionConfig(patch_size=0), "patch_size must be finite and >= 1, got 0"),
        (lambda: patchify(torch.zeros(2, 8, 8), 4), r"must have shape \(batch, channels, height, width\)"),
        (lambda: patchify(torch.zeros(2, 1, 8, 9), 4), "8 x 9 pixels"),
        (lambda: patchify(torch.zeros(2, 1, 0, 8), 4), "0 x 8 pixels"),
        (lambda: VisionTransformer(SMALL)(torch.zeros(2, 1, 12, 12)), r"\(batch, 3 channels, height, width\)"),
        (lambda: patchify(torch.zeros(2, 1, 8, 8), 0), "patch_size must be >= 1 pixel, got 0"),
        (lambda: unpatchify(torch.zeros(2, 4, 5), 1, 4, 4), "4 patches of 5 numbers are no image of 1 channels"),
        (lambda: load_digits_images("random"), "unknown split 'random'; use content or writers"),
        (lambda: DigitsConfig(learning_rate=float("nan")), "learning_rate must be finite"),
        (lambda: image_tensor(Image.new("L", (4, 4)), VisionTransformer(VisionConfig(n_channels=2))), "expects 2"),
    ],
)
def test_bad_input_gives_one_clear_line(work, message) -> None:
    with pytest.raises(ValueError, match=message):
        work()


def test_whole_numbers_are_no_pixels() -> None:
    with pytest.raises(TypeError, match="images must hold normalised numbers, got torch.uint8"):
        VisionTransformer(SMALL)(torch.zeros(1, 3, 12, 12, dtype=torch.uint8))


def test_a_folder_may_name_two_equal_sides(tmp_path) -> None:
    VisionTransformer(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for name in ("image_size", "patch_size"):
        path.write_text(json.dumps(content | {name: [content[name]] * 2}))
        assert VisionTransformer.from_pretrained(tmp_path).config == SMALL
        for sides in ([content[name], content[name] + 1], []):
            path.write_text(json.dumps(content | {name: sides}))
            with pytest.raises(ValueError, match=f"config.json has {name}=.*; it must be of type int"):
                VisionTransformer.from_pretrained(tmp_path)


def test_bad_folders_are_named(tmp_path) -> None:
    model = VisionTransformer(SMALL)
    model.save_pretrained(tmp_path)
    processing = tmp_path / "preprocessor_config.json"
    for name, value in (
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_mean", [0.5]),
        ("image_mean", "half"),
        ("image_mean", [0.5, float("nan"), 0.5]),
    ):
        content = json.loads(processing.read_text())
        processing.write_text(json.dumps(content | {name: value}))
        with pytest.raises(ValueError, match=f"preprocessor_config.json has {name}="):
            VisionTransformer.from_pretrained(tmp_path)
        processing.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model_type 'vit', expected 'deit'"):
        DistilledVisionTransformer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 6}))
    with pytest.raises(ValueError, match="patch_embeddings.projection.weight has shape"):
        VisionTransformer.from_pretrained(tmp_path)
