"""Topic 08 - Contrastive learning: two encoders learn one space in which what belongs together lies together.

python 08-transformer-variants/transformer_variants.py figures contrastive   # pictures of numbers and their names

Papers: van den Oord, Li, Vinyals 2018 (arXiv 1807.03748), InfoNCE and its bound; Radford et al. 2021 (arXiv
2103.00020), CLIP.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import padding_mask
from gpt2 import init_weights
from sequence_modeling import PAD_ID, Vocabulary
from transformer_architecture import Encoder, LearnedPositions, learning_rate_at
from vision_transformer import DIGIT_WORDS, Digits, VisionConfig, VisionTransformer
from workbench import check_range, progress

MAX_LOG_SCALE = math.log(100)  # CLIP clips the learned scale there (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class PairConfig:
    """How the two encoders of pictures and captions are built and trained."""

    d_model: int = 48  # width of both encoders
    n_layers: int = 2  # blocks of each
    n_heads: int = 4  # attention heads; must divide d_model
    d_shared: int = 32  # width of the space that both are mapped to
    batch_size: int = 64  # pairs in a batch: each picture is compared with so many captions
    max_steps: int = 600  # optimizer steps
    warmup_steps: int = 50  # steps of rising learning rate
    learning_rate: float = 3e-3  # the peak
    min_lr_ratio: float = 0.02  # last learning rate, as a fraction of the peak
    weight_decay: float = 0.05  # of the matrices
    temperature: float = 0.07  # at the start; it is learned

    def __post_init__(self) -> None:
        check_range(self, "d_model", "n_layers", "n_heads", "d_shared", "max_steps", least=1)
        check_range(self, "batch_size", least=2)
        check_range(self, "warmup_steps", "weight_decay", least=0)
        check_range(self, "learning_rate", above=0)
        check_range(self, "min_lr_ratio", least=0, most=1)
        check_range(self, "temperature", least=0.01)


# The losses


def info_nce(scores: Tensor) -> Tensor:
    """Cross-entropy of finding each row's own partner among all columns, in nats (van den Oord et al. 2018, eq. 4).

    Shapes: scores (row, column), square; the partner of row i is column i. Raises ValueError for another shape.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores must be square, one row and one column for each pair, got {tuple(scores.shape)}")
    if not len(scores):
        raise ValueError("there is no pair to find; give scores of at least one")
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def clip_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """InfoNCE of cosines times exp(log_scale), from pictures to texts and back, halved (Radford et al. 2021, figure 3).

    Shapes: images and texts (pairs, width), of any lengths. Raises ValueError if they differ in shape.
    """
    check_pairs(images, texts)
    scores = similarity(images, texts) * log_scale.exp()  # (pairs, pairs)
    return (info_nce(scores) + info_nce(scores.T)) / 2


def check_pairs(images: Tensor, texts: Tensor) -> None:
    if images.shape != texts.shape or images.dim() != 2:
        raise ValueError(f"pairs need equal shapes (pairs, width), got {tuple(images.shape)} and {tuple(texts.shape)}")


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every picture with every text: (images, width) and (texts, width) to (images, texts)."""
    return F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def masked_clip_loss(images: Tensor, texts: Tensor, log_scale: Tensor, captions: Tensor) -> Tensor:
    """CLIP's loss without the false negatives: another pair with the same caption is no wrong answer, and is left out.

    Shapes: as clip_loss; captions (pairs), one number for each different caption. Raises ValueError for others.
    """
    check_pairs(images, texts)
    if captions.shape != images.shape[:1]:
        raise ValueError(f"captions need one number for each of {len(images)} pairs, got {tuple(captions.shape)}")
    scores = similarity(images, texts) * log_scale.exp()  # (pairs, pairs)
    same = (captions[:, None] == captions) & ~torch.eye(len(captions), dtype=torch.bool, device=captions.device)
    scores = scores.masked_fill(same, -math.inf)  # (pairs, pairs)
    return (info_nce(scores) + info_nce(scores.T)) / 2


# The bound: a loss that knows how much two things say about each other


def gaussian_pairs(n_pairs: int, correlation: float, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal x and y, (pairs, width) each, whose matching features correlate and whose others are free."""
    x, noise = (torch.randn(n_pairs, width, generator=generator, dtype=torch.float64) for _ in "xy")
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def gaussian_information(correlation: float, width: int) -> float:
    """Mutual information of such a pair, in nats: -width / 2 * ln(1 - correlation^2)."""
    return -width / 2 * math.log1p(-(correlation**2))


def correlation_for(information: float, width: int) -> float:
    """The correlation at which a pair has this mutual information, in nats."""
    return math.sqrt(-math.expm1(-2 * information / width))


def density_ratio(x: Tensor, y: Tensor, correlation: float) -> Tensor:
    """ln p(y | x) / p(y) of every x with every y: the best possible scores, (pairs, pairs)."""
    variance = 1 - correlation**2
    squares = (correlation * x).square().sum(dim=1)[:, None] - 2 * correlation * (x @ y.T)  # (pairs, pairs)
    conditional = (squares + y.square().sum(dim=1)) / (2 * variance) + x.shape[1] / 2 * math.log(variance)
    return y.square().sum(dim=1) / 2 - conditional  # (pairs, pairs)


def information_bound(scores: Tensor) -> float:
    """ln N - InfoNCE, in nats: on average never above the mutual information, and never above ln N at all."""
    return math.log(len(scores)) - info_nce(scores).item()


# Pictures of two digits and their names


CAPTIONS = tuple(f"{tens} {ones}" for tens, ones in itertools.product(DIGIT_WORDS, repeat=2))  # number n is caption n
SIDE = 16  # pixels on a side of a picture


def unseen_captions(seed: int, n_unseen: int = 20) -> Tensor:
    """The numbers whose pair of digits never stands in training, bool (100); each digit still stands on each side."""
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randperm(10, generator=generator)[: n_unseen // 10].tolist()
    tens, ones = torch.arange(100) // 10, torch.arange(100) % 10
    order = torch.randperm(10, generator=generator)
    return torch.stack([order[(tens + shift) % 10] == ones for shift in shifts]).any(dim=0)  # (100)


def draw_pictures(data: Digits, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Two digits side by side, each at a height of its own: numbers (pictures) to (pictures, 1, 16, 16).

    Each digit is a random image of its class in `data`.
    """
    pictures = torch.full((len(numbers), 1, SIDE, SIDE), -1.0)
    by_class = [(data.labels == digit).nonzero()[:, 0] for digit in range(10)]
    for row, number in enumerate(numbers.tolist()):
        for place, digit in enumerate(divmod(number, 10)):
            rows = by_class[digit]
            image = data.images[rows[torch.randint(len(rows), (), generator=generator)], 0]  # (8, 8)
            top = int(torch.randint(SIDE - 7, (), generator=generator))
            pictures[row, 0, top : top + 8, 8 * place : 8 * place + 8] = image
    return pictures


class TextEncoder(nn.Module):
    """Characters through topic 04's encoder; the mean over them is the text.

    Shapes: token_ids (batch, seq), PAD_ID after the end, to (batch, d_model).
    """

    def __init__(self, vocab_size: int, max_seq_len: int, config: PairConfig) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, config.d_model)
        self.pos_emb = LearnedPositions(config.d_model, max_seq_len)
        sizes = (config.n_layers, config.d_model, config.n_heads, 2 * config.d_model)
        self.encoder = Encoder(*sizes, activation="gelu")

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.pos_emb(self.token_emb(token_ids))  # (batch, seq, d_model)
        x = self.encoder(x, padding_mask(token_ids, PAD_ID))  # (batch, seq, d_model)
        real = (token_ids != PAD_ID)[..., None]  # (batch, seq, 1)
        return (x * real).sum(dim=1) / real.sum(dim=1)


class DualEncoder(nn.Module):
    """A vision transformer and a text encoder, each with a linear map into the shared space, and a learned scale.

    Shapes: pictures (pairs, 1, 16, 16) and token_ids (pairs, seq) to two matrices (pairs, d_shared), not normalised.
    """

    def __init__(self, vocabulary: Vocabulary, config: PairConfig) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        sizes = (config.d_model, config.n_layers, config.n_heads, 2 * config.d_model)
        self.vision = VisionTransformer(VisionConfig(SIDE, 4, 1, config.d_shared, *sizes))  # its head is the map
        self.text = TextEncoder(len(vocabulary), max(map(len, CAPTIONS)), config)
        self.text_proj = nn.Linear(config.d_model, config.d_shared)
        init_weights(self.text_proj)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def tokens(self, captions: list[str]) -> Tensor:
        """The characters of every caption, padded to the longest: (captions, seq)."""
        rows = [torch.tensor(self.vocabulary.encode(list(caption))) for caption in captions]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID).to(self.log_scale.device)

    def forward(self, pictures: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.vision(pictures), self.text_proj(self.text(token_ids))


def pair_batches(
    data: Digits, numbers: Tensor, config: PairConfig, generator: torch.Generator, distinct: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and their numbers, without end; a batch repeats no number while `distinct` and there are enough."""
    while True:
        if distinct and config.batch_size <= len(numbers):
            rows = torch.randperm(len(numbers), generator=generator)[: config.batch_size]
        else:
            rows = torch.randint(len(numbers), (config.batch_size,), generator=generator)
        yield draw_pictures(data, numbers[rows], generator), numbers[rows]


def fit_pairs(
    model: DualEncoder, batches: Iterator[tuple[Tensor, Tensor]], config: PairConfig, masked: bool = False
) -> list[float]:
    """Train both encoders with CLIP's loss, or with the masked one; returns the loss of every step, in nats.

    The scale is clipped at 100, as in the paper. Raises ValueError at the first loss that is not finite.
    """
    device = model.log_scale.device
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True), []
    for step in progress(range(config.max_steps), "train on pairs"):
        pictures, numbers = next(batches)
        token_ids = model.tokens([CAPTIONS[number] for number in numbers.tolist()])  # (pairs, *)
        embedded = model(pictures.to(device), token_ids)
        if masked:
            loss = masked_clip_loss(*embedded, model.log_scale, numbers.to(device))
        else:
            loss = clip_loss(*embedded, model.log_scale)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate or lengthen the warm-up")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()
        model.log_scale.data.clamp_(max=MAX_LOG_SCALE)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def retrieval_accuracy(model: DualEncoder, pictures: Tensor, numbers: Tensor) -> tuple[float, float]:
    """How often the nearest of all 100 captions is the right one, and how often the picture nearest to a caption is.

    Shapes: pictures (pictures, 1, 16, 16), numbers (pictures). The second counts each caption that has a picture.
    """
    model.eval()
    captions = model.text_proj(model.text(model.tokens(list(CAPTIONS))))  # (captions, d_shared)
    pictures, numbers = pictures.to(captions.device), numbers.to(captions.device)
    scores = similarity(model.vision(pictures), captions)  # (pictures, captions)
    to_text = (scores.argmax(dim=1) == numbers).float().mean().item()
    asked = numbers.unique()
    to_picture = (numbers[scores[:, asked].argmax(dim=0)] == asked).float().mean().item()
    return to_text, to_picture
