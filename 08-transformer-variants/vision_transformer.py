"""Topic 08 - Vision transformer: an image is a sequence of patches, and the encoder of topic 04 reads it.

python 08-transformer-variants/transformer_variants.py classify drawing.png   # a digit in a reader's own picture
python 08-transformer-variants/transformer_variants.py figures vision         # every measurement of this module

Papers: Dosovitskiy et al. 2021 (arXiv 2010.11929), the Vision Transformer; Touvron et al. 2021 (arXiv 2012.12877), the
distillation token of DeiT; Abnar and Zuidema 2020 (arXiv 2005.00928), attention rollout.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import MultiHeadAttention, check_heads
from building_from_scratch import watched
from gpt2 import set_norm_eps
from huggingface_folders import FileTensor, FolderModel, Layout, file_tensors, read_config, read_json
from transformer_architecture import Encoder, learning_rate_at
from workbench import check_range, progress, shown, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROCESSING = "preprocessor_config.json"  # how the pixels of a picture become the model's numbers
MAX_IMAGE_BYTES = 20 * 2**20
MAX_IMAGE_PIXELS = 4096 * 4096
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
N_NEW_WRITERS = 899  # the rows of the second half of scikit-learn's digits, in the order of collection


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a VisionTransformer; the defaults are the model of the digit images."""

    image_size: int = 8  # pixels on a side of the images that the learned positions belong to
    patch_size: int = 2  # pixels on a side of a patch; must divide image_size
    n_channels: int = 1  # numbers for each pixel: 1 for grey, 3 for colour
    n_classes: int = 10  # classes to tell apart
    d_model: int = 64  # width of the residual stream
    n_layers: int = 2  # blocks of attention and feed-forward network
    n_heads: int = 4  # attention heads; must divide d_model
    d_ff: int = 128  # width inside the feed-forward network
    dropout: float = 0.0  # fraction of activations zeroed in training
    norm_eps: float = 1e-12  # added to the variance in every normalisation, as in the released models

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "n_channels", "n_classes", "d_model", "n_layers", "n_heads", "d_ff")
        check_range(self, *sizes, least=1)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "norm_eps", above=0)
        check_heads(self.d_model, self.n_heads)
        check_patches(self.image_size, self.image_size, self.patch_size)

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.grid_size**2


@dataclass(frozen=True)
class DigitsConfig:
    """How a classifier of digit images is trained."""

    batch_size: int = 64  # images in a batch
    max_steps: int = 1500  # optimizer steps
    warmup_steps: int = 100  # steps of rising learning rate
    learning_rate: float = 4e-3  # the peak
    min_lr_ratio: float = 0.02  # last learning rate, as a fraction of the peak
    weight_decay: float = 0.05  # of the matrices
    max_shift: float = 0.5  # largest random shift of a training image, in pixels
    max_turn: float = 10.0  # largest random turn of a training image, in degrees
    max_stretch: float = 0.1  # largest random change of width and height, as a fraction

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "max_steps", least=1)
        check_range(self, "warmup_steps", "weight_decay", "max_shift", "max_turn", least=0)
        check_range(self, "learning_rate", above=0)
        check_range(self, "min_lr_ratio", least=0, most=1)
        check_range(self, "max_stretch", least=0, below=1)


# Patches: a sequence of little squares


def check_patches(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size must be >= 1 pixel, got {patch_size}")
    if height % patch_size or width % patch_size or not height * width:
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}; "
            "resize it to multiples of patch_size"
        )


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into squares, row by row; a patch lists its channels, then its rows (Dosovitskiy et al., section 3.1).

    Shapes: (batch, channels, height, width) to (batch, patches, channels * patch_size^2), the order in which F.unfold
    lists them, so that the weight of a convolution, flattened, is the weight of a linear map. Raises ValueError for
    other axes and for sides that patch_size does not divide.
    """
    if images.dim() != 4:
        raise ValueError(f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}")
    check_patches(*images.shape[2:], patch_size)
    cut = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (batch, channels, down, p, across, p)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (batch, patches, features)


def unpatchify(patches: Tensor, n_channels: int, height: int, width: int) -> Tensor:
    """Put the patches of `patchify` together again: (batch, patches, features) to (batch, channels, height, width)."""
    patch_size = math.isqrt(patches.shape[2] // n_channels)
    if (height // max(1, patch_size)) * (width // max(1, patch_size)) != patches.shape[1] or (
        n_channels * patch_size**2 != patches.shape[2]
    ):
        raise ValueError(
            f"{patches.shape[1]} patches of {patches.shape[2]} numbers are no image of {n_channels} channels and "
            f"{height} x {width} pixels; give the sizes that `patchify` got"
        )
    grid = patches.unflatten(1, (height // patch_size, width // patch_size))  # (batch, down, across, features)
    cut = grid.unflatten(3, (n_channels, patch_size, patch_size)).permute(0, 3, 1, 4, 2, 5)
    return cut.flatten(4, 5).flatten(2, 3)  # (batch, channels, height, width)


# The model


class PatchEmbedding(nn.Module):
    """One linear map of every patch, stored as the convolution that it is: kernel and stride of patch_size.

    Shapes: (batch, channels, height, width) to (batch, patches, d_model).
    """

    def __init__(self, n_channels: int, patch_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, n_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(d_model))
        nn.init.xavier_uniform_(self.weight.data.view(d_model, -1))

    def forward(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.weight.shape[-1])  # (batch, patches, features)
        return F.linear(patches, self.weight.flatten(1), self.bias)  # (batch, patches, d_model)


class VisionTransformer(FolderModel):
    """Patches, a class token and learned positions through topic 04's encoder; the class token decides.

    Shapes: images (batch, channels, height, width), normalised numbers, to logits (batch, classes). An image of another
    size than config.image_size has its positions interpolated (section 3.2 of the paper). Raises ValueError for a wrong
    number of channels and for sides that patch_size does not divide.
    """

    n_special = 1  # tokens before the patches
    config_class = VisionConfig
    model_type, architecture, head_names = "vit", "ViTForImageClassification", {"classifier": "head"}
    config_names: ClassVar[dict[str, str]] = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "n_channels": "num_channels",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "dropout": "hidden_dropout_prob",
        "norm_eps": "layer_norm_eps",
    }
    fixed: ClassVar[dict[str, tuple]] = {"hidden_act": ("gelu",), "qkv_bias": (True,)}
    absent: ClassVar[dict[str, int]] = {  # ViT-B/16's; our defaults are for digits
        **{"image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    }

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.patch_proj = PatchEmbedding(config.n_channels, config.patch_size, d_model)
        self.class_token = nn.Parameter(torch.empty(1, 1, d_model))
        self.pos_emb = nn.Parameter(torch.empty(1, self.n_special + config.n_patches, d_model))
        sizes = (config.n_layers, d_model, config.n_heads, config.d_ff)
        self.encoder = Encoder(*sizes, config.dropout, norm_order="pre", activation="gelu")
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(d_model, config.n_classes)
        set_norm_eps(self, config.norm_eps)
        for parameter in (self.class_token, self.pos_emb, self.head.weight):
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.labels = [str(label) for label in range(config.n_classes)]
        self.pixel_mean, self.pixel_std = [0.5] * config.n_channels, [0.5] * config.n_channels

    def special_tokens(self) -> Tensor:
        return self.class_token  # (1, special, d_model)

    def positions(self, down: int, across: int) -> Tensor:
        """Positions of a grid of patches, bicubically interpolated if it is not the grid they were learned on."""
        grid_size = self.config.grid_size
        if (down, across) == (grid_size, grid_size):
            return self.pos_emb  # (1, tokens, d_model)
        special, patches = self.pos_emb.split([self.n_special, self.config.n_patches], dim=1)
        grid = patches.unflatten(1, (grid_size, grid_size)).permute(0, 3, 1, 2)  # (1, d_model, grid, grid)
        resized = F.interpolate(grid, size=(down, across), mode="bicubic", align_corners=False)
        return torch.cat([special, resized.flatten(2).transpose(1, 2)], dim=1)  # (1, tokens, d_model)

    def features(self, images: Tensor) -> Tensor:
        """The last hidden state of every token: special tokens, then patches row by row; (batch, tokens, d_model)."""
        if images.dim() != 4 or images.shape[1] != self.config.n_channels:
            wanted = f"(batch, {self.config.n_channels} channels, height, width)"
            raise ValueError(f"images must have shape {wanted}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must hold normalised numbers, got {images.dtype}; use .float() and scale them")
        patches = self.patch_proj(images)  # (batch, patches, d_model)
        special = self.special_tokens().expand(len(images), -1, -1)  # (batch, special, d_model)
        down, across = (side // self.config.patch_size for side in images.shape[2:])
        x = torch.cat([special, patches], dim=1) + self.positions(down, across)  # (batch, tokens, d_model)
        return self.encoder(self.dropout(x))  # (batch, tokens, d_model)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[:, 0])  # (batch, classes)

    @classmethod
    def layout(cls, config: VisionConfig) -> Layout:
        """The names in a file, which are those of 2020; their modules in memory have newer ones."""
        layers = {
            "layernorm_before": "attn_norm",
            "attention.attention.query": "self_attn.q_proj",
            "attention.attention.key": "self_attn.k_proj",
            "attention.attention.value": "self_attn.v_proj",
            "attention.output.dense": "self_attn.out_proj",
            "layernorm_after": "ffn_norm",
            "intermediate.dense": "ffn.up_proj",
            "output.dense": "ffn.down_proj",
        }
        parts = {"embeddings.patch_embeddings.projection": "patch_proj", "layernorm": "encoder.final_norm"}
        for layer in range(config.n_layers):
            names = layers.items()
            parts |= {f"encoder.layer.{layer}.{theirs}": f"encoder.blocks.{layer}.{ours}" for theirs, ours in names}
        parts = {f"{cls.model_type}.{theirs}": ours for theirs, ours in parts.items()} | cls.head_names
        single = {"cls_token": "class_token", "distillation_token": "teacher_token", "position_embeddings": "pos_emb"}
        if cls.n_special == 1:
            single.pop("distillation_token")
        alone = [FileTensor(f"{cls.model_type}.embeddings.{theirs}", (ours,)) for theirs, ours in single.items()]
        unused = (rf"{cls.model_type}\.pooler\..*", rf"{cls.model_type}\.embeddings\.mask_token")
        return Layout((*file_tensors(parts), *alone), ignored=unused)

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> VisionConfig:
        for name in ("image_size", "patch_size"):  # one number, or height and width
            sides = config.get(name)
            if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
                config = config | {name: sides[0]}
        bias = tensors.get(f"{next(iter(cls.head_names))}.bias", torch.zeros(1))
        return replace(super().config_of(config, tensors), n_classes=max(1, bias.numel()))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        model = super().from_pretrained(folder)
        describe(model, Path(folder))
        return model

    def file_config(self) -> dict:
        names = {str(index): label for index, label in enumerate(self.labels)}
        labels = {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}
        return super().file_config() | labels | {"attention_probs_dropout_prob": self.config.dropout}

    def save_pretrained(self, folder: Path | str) -> None:
        super().save_pretrained(folder)
        size = {"height": self.config.image_size, "width": self.config.image_size}
        processing = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True, "resample": 2}
        processing |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        processing |= {"image_mean": self.pixel_mean, "image_std": self.pixel_std}
        write_atomically(Path(folder) / PROCESSING, json.dumps(processing, indent=2).encode() + b"\n")


def describe(model: VisionTransformer, folder: Path) -> None:
    """Take the names of the classes and the pixels' mean and deviation from a folder, where it gives them."""
    names, n_classes = read_config(folder).get("id2label"), model.config.n_classes
    if isinstance(names, dict) and len(names) == n_classes:
        model.labels = [str(names.get(str(index), index)) for index in range(n_classes)]
    processing = read_json(folder / PROCESSING) if (folder / PROCESSING).exists() else {}
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        numbers = processing.get(theirs, getattr(model, ours))
        fits = isinstance(numbers, list) and len(numbers) == model.config.n_channels
        if not fits or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"{PROCESSING} has {theirs}={numbers!r}; it needs {model.config.n_channels} numbers")
        setattr(model, ours, [float(number) for number in numbers])
    if min(model.pixel_std) <= 0:
        raise ValueError(f"{PROCESSING} has image_std={model.pixel_std}; every deviation must be > 0")


VIT_BASE = VisionConfig(224, 16, 3, 1000, 768, 12, 12, 3072)  # ViT-B/16 with ImageNet's classes: 86,567,656 parameters


class DistilledVisionTransformer(VisionTransformer):
    """DeiT: a second special token with a head of its own that learns from a teacher (Touvron et al. 2021, section 3).

    In training `both` gives the logits of the two heads, one for the labels and one for the teacher's; forward gives
    their mean, the prediction.
    """

    n_special = 2
    model_type, architecture = "deit", "DeiTForImageClassificationWithTeacher"
    head_names: ClassVar[dict[str, str]] = {"cls_classifier": "head", "distillation_classifier": "teacher_head"}

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.teacher_token = nn.Parameter(0.02 * torch.randn(1, 1, config.d_model))
        self.teacher_head = nn.Linear(config.d_model, config.n_classes)

    def special_tokens(self) -> Tensor:
        return torch.cat([self.class_token, self.teacher_token], dim=1)  # (1, special, d_model)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(images)  # (batch, tokens, d_model)
        return self.head(x[:, 0]), self.teacher_head(x[:, 1])

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack(self.both(images)).mean(dim=0)  # (batch, classes)


def hard_distillation_loss(both: tuple[Tensor, Tensor], labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the cross-entropy of each head: one with the labels, one with the teacher's decisions (section 3, eq. 3)."""
    own, taught = both
    return (F.cross_entropy(own, labels) + F.cross_entropy(taught, teacher_logits.argmax(dim=-1))) / 2


def attention_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention weights of every layer in one forward pass, each (batch, heads, query, key)."""
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        watched(model.eval(), MultiHeadAttention, lambda name, layer, given, out: seen.append(out[1])),
    ):
        model(images)
    return seen


def attention_rollout(weights: list[Tensor]) -> Tensor:
    """How much of each input token reaches each output token, if a layer is half attention and half residual.

    Abnar and Zuidema 2020, section 3: A = (mean over heads + identity) / 2, multiplied through the layers.
    Shapes: a list of (batch, heads, query, key) to (batch, query, key); rows sum to 1. It ignores values, feed-forward
    networks and norms: a picture of where information could have come from, not of what was used.
    """
    mixed = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    for layer in weights:
        flow = (layer.mean(dim=1) + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)) / 2
        mixed = flow @ mixed  # (batch, query, key)
    return mixed


# Real images: 1,797 handwritten digits that come with scikit-learn


@dataclass(frozen=True)
class Digits:
    """Images (images, 1, 8, 8) with numbers in -1..1, ink positive, and their classes (images)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@functools.cache
def raw_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digit images come with scikit-learn; install it: pip install scikit-learn") from None
    return load_digits()


def load_digits_images(split: str = "content", seed: int = 0, share: float = 0.2) -> tuple[Digits, Digits]:
    """Training and held-out images of scikit-learn's digits (Alpaydin and Kaynak 1998; UCI, 8 x 8 pixels, 0..16).

    split "content": an image is held out if the hash of its pixels and the seed falls into the given share, so that two
    equal images never part. "writers": the second half of the rows, in the order of collection, is held out; most of
    its writers are not in the first half. Raises ValueError for another split, and if scikit-learn is missing.
    """
    raw = raw_digits()
    if split == "content":
        keys = (hashlib.sha256(f"{seed}:".encode() + image.tobytes()).digest() for image in raw.images)
        held_out = torch.tensor([int.from_bytes(key[:4], "big") < share * 2**32 for key in keys])
    elif split == "writers":
        held_out = torch.arange(len(raw.target)) >= len(raw.target) - N_NEW_WRITERS
    else:
        raise ValueError(f"unknown split {split!r}; use content or writers")
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1  # (images, 1, 8, 8)
    labels = torch.tensor(raw.target)
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])


def augment(images: Tensor, config: DigitsConfig, generator: torch.Generator) -> Tensor:
    """Shift, turn and stretch every image by its own random amount; what comes in from outside is background (-1)."""
    n_images, side = len(images), images.shape[-1]

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1  # uniform in -1..1

    turn = draw(n_images) * math.radians(config.max_turn)
    scale = 1 + draw(n_images, 2) * config.max_stretch
    shift = draw(n_images, 2) * config.max_shift * 2 / side  # grid_sample counts the image from -1 to 1
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)  # (images, 2, 2)
    matrix = torch.cat([matrix * scale[:, None], shift[..., None]], dim=2)  # (images, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # (images, channels, side, side)


def image_batches(data: Digits, config: DigitsConfig, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of augmented images and their labels, without end, a fresh order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for rows in order.split(config.batch_size):
            yield augment(data.images[rows], config, generator), data.labels[rows]


def fit_classifier(model: nn.Module, data: Digits, config: DigitsConfig, seed: int) -> list[float]:
    """Train with AdamW on augmented images; weight decay on the matrices alone. Returns the loss of every step, nats.

    Raises ValueError at the first loss that is not finite.
    """
    device = next(model.parameters()).device
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    batches, losses = image_batches(data, config, seed), []
    bar = progress(range(config.max_steps), "train on digits")
    for step in bar:
        images, labels = (tensor.to(device) for tensor in next(batches))
        loss = F.cross_entropy(model(images), labels)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate or lengthen the warm-up")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def image_accuracy(model: nn.Module, data: Digits) -> float:
    """Fraction of the images whose most likely class is the right one."""
    device = next(model.parameters()).device
    return (model.eval()(data.images.to(device)).argmax(dim=-1).cpu() == data.labels).float().mean().item()


# A reader's own picture


def open_image(path: Path) -> "Image":
    """Read a picture file whole, in colour and upright. Raises ValueError, in one line, for anything but a sound image.

    What a file claims is believed only within limits: its kind, its bytes, and its pixels before they are unpacked,
    because a small file can claim pixels enough to fill any memory.
    """
    from PIL import Image, ImageOps  # here: a model needs no picture files

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{shown(path)} is not a file; give a picture ({', '.join(IMAGE_FORMATS)})")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{shown(path)} has {path.stat().st_size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
    try:
        with warnings.catch_warnings(), Image.open(path, formats=IMAGE_FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"it claims {image.width} x {image.height} pixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a decoder fed with a hostile file may raise anything; all of it is the file's fault
        kinds, problem = ", ".join(IMAGE_FORMATS), " ".join(str(error).split())[:200]
        limit = f"at most {MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"{shown(path)} is not a sound picture ({kinds}; {limit}): {problem}") from None


def image_tensor(image: "Image", model: VisionTransformer) -> Tensor:
    """A picture as the model's input, (1, channels, image_size, image_size): resized, 0..1, mean and deviation applied.

    The same numbers as Hugging Face's ViTImageProcessor gives.
    """
    from PIL import Image

    side, n_channels = model.config.image_size, model.config.n_channels
    if n_channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, but the model expects {n_channels}")
    image = image.convert("L" if n_channels == 1 else "RGB").resize((side, side), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).reshape(side, side, n_channels) / 255
    normalised = (pixels - torch.tensor(model.pixel_mean)) / torch.tensor(model.pixel_std)
    return normalised.permute(2, 0, 1)[None]  # (1, channels, height, width)


def digit_tensor(image: "Image") -> Tensor:
    """A picture of one digit as the data set has it: (1, 1, 8, 8), numbers in -1..1, ink positive.

    The makers' recipe: the ink, black or white, fills a square of 32 x 32 pixels, of which each block of 4 x 4 counts
    the inked ones. Raises ValueError for a picture without contrast.
    """
    pixels = torch.tensor(np.asarray(image.convert("L")), dtype=torch.float32)  # (height, width)
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).median()
    ink = (pixels - border).abs()  # (height, width)
    if ink.max() < 32:  # of 255
        raise ValueError("the picture has no contrast; draw one digit, dark on light or light on dark")
    inked = ink > ink.max() / 2
    rows, columns = inked.any(dim=1).nonzero()[:, 0], inked.any(dim=0).nonzero()[:, 0]
    cut = (ink / ink.max())[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # (*, *)
    height, width = cut.shape
    side = 32 / max(height, width)
    size = (max(1, round(height * side)), max(1, round(width * side)))
    resized = F.interpolate(cut[None, None], size=size, mode="bilinear", antialias=True, align_corners=False)[0, 0]
    square = torch.zeros(32, 32)
    top, left = (32 - size[0]) // 2, (32 - size[1]) // 2
    square[top : top + size[0], left : left + size[1]] = (resized > 0.5).float()
    counts = square.reshape(8, 4, 8, 4).sum(dim=(1, 3))  # (8, 8), each in 0..16
    return counts[None, None] / 8 - 1  # (1, 1, 8, 8)


@torch.no_grad()
def classify_image(path: Path, model: VisionTransformer, n_best: int = 5) -> list[tuple[str, float]]:
    """The most likely classes of a picture file, each with its probability, the best first.

    A model of 8 x 8 grey pixels is taken for one of digits, and gets the digit as `digit_tensor` cuts it out.
    """
    image, config = open_image(path), model.config
    is_digit = (config.image_size, config.n_channels) == (8, 1)
    images = digit_tensor(image) if is_digit else image_tensor(image, model)  # (1, channels, height, width)
    probabilities = model.eval()(images.to(model.pos_emb.device))[0].softmax(dim=-1)  # (classes)
    best = probabilities.topk(min(n_best, config.n_classes))
    return [(model.labels[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


# Figures


def plot_rollout(images: Tensor, maps: Tensor, titles: list[str]) -> Figure:
    """Pictures (images, 1, side, side) above what reaches the class token from each patch, (images, down, across)."""
    figure, axes = plt.subplots(2, len(images), figsize=(1.25 * len(images), 2.9), squeeze=False)
    for column, (image, flow, title) in enumerate(zip(images[:, 0], maps, titles, strict=True)):
        axes[0, column].imshow(image.numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes[0, column].set_title(title, fontsize=9)
        shown_flow = axes[1, column].imshow(flow.numpy(), cmap="viridis", vmin=0, vmax=maps.max().item())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(shown_flow, ax=axes[1], label="share", shrink=0.8)
    return figure
