"""Topic 08 - Variant failures: slips that keep every shape and raise no error, each switched on and measured.

python 08-transformer-variants/transformer_variants.py demo --break conv1d    # one of them
python 08-transformer-variants/transformer_variants.py figures breaks         # all of them, as the chapter's table

Each has a right value that is known: two numbers that must be equal, an average, or a loss of 0.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bert_family
import efficient_attention
import gpt2
import vision_transformer
from attention_mechanisms import scaled_dot_product_attention
from bert_family import RobertaConfig, RobertaForMaskedLM
from efficient_attention import longformer_pattern, orthogonal_gaussian, positive_random_features, sparse_attention
from gpt2 import GPT2, GPT2Config
from huggingface_folders import Layout
from vision_experiments import save
from vision_transformer import PatchEmbedding
from workbench import Column, RunConfig, check_name, seed_everything

if TYPE_CHECKING:
    from variant_experiments import FiguresConfig


def shaken(model: nn.Module) -> nn.Module:
    """Weights away from their starting values, where 0 and 1 would hide mistakes."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def largest_gap(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


# Loading: square matrices fit either way, and positions are only numbers


def square_matrices_not_turned(config: GPT2Config) -> Layout:
    """Turns what would not fit otherwise, and leaves the one square matrix of each block as the file has it."""
    layout = SOUND_LAYOUT(config)
    tensors = (
        replace(entry, transposed=False) if entry.key.endswith("attn.c_proj.weight") else entry
        for entry in layout.tensors
    )
    return replace(layout, tensors=tuple(tensors))


SOUND_LAYOUT = GPT2.layout


@torch.no_grad()
def conv1d() -> float:
    """Largest difference of logits between a GPT-2 and itself after saving soundly and loading."""
    seed_everything(0)
    model = shaken(GPT2(GPT2Config(vocab_size=50, max_seq_len=16, d_model=24, n_layers=2, n_heads=3)))
    token_ids = torch.arange(12)[None]
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(GPT2, "layout", SOUND_LAYOUT):
            model.save_pretrained(Path(folder))
        return largest_gap(GPT2.from_pretrained(Path(folder))(token_ids), model(token_ids))


@torch.no_grad()
def roberta_positions() -> float:
    """Largest difference of a RoBERTa's logits for a text alone and the same text with padding before it."""
    seed_everything(0)
    config = RobertaConfig(vocab_size=50, max_seq_len=16, d_model=24, n_layers=2, n_heads=3, d_ff=32)
    model = shaken(RobertaForMaskedLM(config))
    text = torch.arange(10, 18)[None]
    padded = torch.cat([torch.full((1, 3), config.pad_id), text], dim=1)
    real = padded != config.pad_id
    return largest_gap(model(padded, real=real)[:, 3:], model(text, real=torch.ones_like(text, dtype=torch.bool)))


def counted_from_zero(self: bert_family.BertTrunk, x: Tensor, token_ids: Tensor) -> Tensor:
    return x + self.pos_emb.weight[: x.shape[1]]


# Images


@torch.no_grad()
def patch_order() -> float:
    """Largest difference between our patch embedding and nn.Conv2d with the same weights, on a colour image."""
    seed_everything(0)
    ours, theirs = shaken(PatchEmbedding(3, 4, 16)), nn.Conv2d(3, 16, 4, stride=4)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 12, 8)
    return largest_gap(ours(images), theirs(images).flatten(2).transpose(1, 2))


def channels_last(images: Tensor, patch_size: int) -> Tensor:
    cut = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


# Random features


def feature_bias() -> float:
    """Mean estimate of a kernel value over 100,000 blocks of 4 orthogonal rows, divided by the true value: 1."""
    x = torch.tensor([0.6, -0.5, 0.4, 0.3], dtype=torch.float64)
    y = torch.tensor([0.5, 0.6, 0.2, -0.4], dtype=torch.float64)
    rows = efficient_attention.orthogonal_gaussian(400_000, 4, torch.Generator().manual_seed(0))
    estimate = positive_random_features(x, rows) @ positive_random_features(y, rows)
    return (estimate / (x @ y).exp()).item()


def one_sided_rows(n_features: int, d_head: int, generator: torch.Generator) -> Tensor:
    """QR as it comes: LAPACK's signs point Q to one side."""
    square = torch.randn(-(-n_features // d_head), d_head, d_head, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(square)[0].transpose(1, 2)
    lengths = torch.randn(square.shape, generator=generator, dtype=torch.float64).norm(dim=2)
    return (directions * lengths[:, :, None]).flatten(0, 1)[:n_features]


def unit_rows(n_features: int, d_head: int, generator: torch.Generator) -> Tensor:
    """Orthogonal rows of length 1, as an orthogonal matrix has them."""
    return F.normalize(SOUND_ROWS(n_features, d_head, generator), dim=1)


SOUND_ROWS = orthogonal_gaussian


# Sparse attention and sampling


def global_twice() -> float:
    """Largest difference between windowed attention with a global position and dense attention under its mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    pattern = longformer_pattern(20, 4, (0,))
    return largest_gap(sparse_attention(q, k, v, pattern), scaled_dot_product_attention(q, k, v, pattern.mask())[0])


def keep_global_in_window(pattern: efficient_attention.SparsePattern, device: torch.device) -> Tensor:
    return SOUND_ALLOWED(replace(pattern, global_ids=()), device)


SOUND_ALLOWED = efficient_attention.allowed_keys


def nucleus_mass() -> float:
    """Least probability of what top-p = 0.8 keeps, over 200 random distributions: at least 0.8."""
    logits = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = gpt2.keep_likely(logits, 0, 0.8) > -math.inf
    return (logits.softmax(dim=-1) * kept).sum(dim=-1).min().item()


def sorted_nucleus(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The mask belongs to the sorted tokens, but is applied to the unsorted ones."""
    chances = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
    return logits.masked_fill(chances.cumsum(dim=-1) - chances >= top_p, -math.inf)


# The failures


BREAKS: dict[str, tuple[str, Callable[[], float], object, str, object]] = {
    # name: what is measured, how, and what is replaced by what
    "conv1d": (
        "GPT-2's square matrix is loaded as it lies: largest difference of a logit",
        conv1d,
        GPT2,
        "layout",
        square_matrices_not_turned,
    ),
    "roberta-positions": (
        "positions count padding, from 0: largest difference of a logit between padded and alone",
        roberta_positions,
        bert_family.RobertaTrunk,
        "add_positions",
        counted_from_zero,
    ),
    "patch-order": (
        "a patch lists its channels last: largest difference from nn.Conv2d",
        patch_order,
        vision_transformer,
        "patchify",
        channels_last,
    ),
    "one-sided-rows": (
        "the signs of QR are kept: mean estimate of a kernel value, divided by the value",
        feature_bias,
        efficient_attention,
        "orthogonal_gaussian",
        one_sided_rows,
    ),
    "unit-rows": (
        "random rows of length 1: mean estimate of a kernel value, divided by the value",
        feature_bias,
        efficient_attention,
        "orthogonal_gaussian",
        unit_rows,
    ),
    "global-twice": (
        "a global key counts in the window too: largest difference from dense attention",
        global_twice,
        efficient_attention,
        "allowed_keys",
        keep_global_in_window,
    ),
    "nucleus-order": (
        "top-p 0.8 is applied in sorted order: least probability of what is kept",
        nucleus_mass,
        gpt2,
        "keep_likely",
        sorted_nucleus,
    ),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant one failure while the block runs. Raises ValueError, with the closest name, for an unknown one."""
    *_, owner, attribute, replacement = BREAKS[check_name("failure", name, BREAKS)]
    with mock.patch.object(owner, attribute, replacement):
        yield


def show(name: str) -> tuple[str, float, float]:
    """What a failure shows: the measurement in words, its sound value and its broken one."""
    check_name("failure", name, BREAKS)
    what, measure, *_ = BREAKS[name]
    sound = measure()
    with planted(name):
        return what, sound, measure()


def breaks(config: "FiguresConfig", run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = []
    for name in BREAKS:
        what, sound, broken = show(name)
        rows.append([f"`{name}`", what, sound, broken])
    columns = [Column("`--break`"), Column("What happens, and what is measured"), Column("sound", "", ".3g")]
    save(config, "breaks", [*columns, Column("broken", "", ".3g")], rows, "breaks", 1)
