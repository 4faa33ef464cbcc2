"""Topic 08: contrastive losses against Hugging Face's CLIP, the bound on a known mutual information, and retrieval."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional as F

import contrastive as topic
from contrastive import (
    CAPTIONS,
    DualEncoder,
    PairConfig,
    TextEncoder,
    clip_loss,
    correlation_for,
    density_ratio,
    draw_pictures,
    fit_pairs,
    gaussian_information,
    gaussian_pairs,
    info_nce,
    information_bound,
    masked_clip_loss,
    pair_batches,
    retrieval_accuracy,
    unseen_captions,
)
from sequence_modeling import Vocabulary
from vision_transformer import load_digits_images
from workbench import seed_everything

TINY = PairConfig(d_model=16, n_layers=1, n_heads=2, d_shared=8, batch_size=20, max_steps=30, warmup_steps=3)
LETTERS = Vocabulary(sorted({letter for caption in CAPTIONS for letter in caption}))


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_everything(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(n: int = 5, width: int = 3) -> list[torch.Tensor]:
    return [torch.randn(n, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]


# Losses


def test_clip_loss_equals_transformers(parity) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = pairs()
    log_scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    normed = [x / x.norm(dim=-1, keepdim=True) for x in (images, texts)]
    losses = clip_loss(images, texts, log_scale), image_text_contrastive_loss(normed[1] @ normed[0].T * log_scale.exp())
    parity("clip_loss", "transformers image_text_contrastive_loss", "output", *losses, 1e-10)
    inputs = [images, texts, log_scale]
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
    parity("clip_loss", "transformers image_text_contrastive_loss", "gradient", *gradients, 1e-10)


def test_clip_loss_equals_the_loss_of_clip_model(parity) -> None:
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = shape | {
        "vocab_size": 11,
        "max_position_embeddings": 6,
        "eos_token_id": 10,
        "bos_token_id": 9,
        "pad_token_id": 1,
    }
    vision = shape | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=7)).double().eval()
    token_ids, pictures = torch.randint(2, 9, (4, 5)), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    token_ids[:, -1] = 10
    output = model(input_ids=token_ids, pixel_values=pictures, return_loss=True)
    ours = clip_loss(output.image_embeds, output.text_embeds, model.logit_scale)
    parity("clip_loss", "transformers CLIPModel", "output", ours, output.loss, 1e-10)
    wanted = list(model.parameters())
    grads = [torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) for loss in (ours, output.loss)]
    used = [[grad for grad, check in zip(part, grads[1], strict=True) if check is not None] for part in grads]
    parity("clip_loss", "transformers CLIPModel", "gradient", *used, 1e-10)


def test_info_nce_by_hand() -> None:
    scores = torch.log(torch.tensor([[2.0, 1.0, 1.0], [1.0, 6.0, 1.0], [1.0, 1.0, 2.0]]))
    expected = -(math.log(2 / 4) + math.log(6 / 8) + math.log(2 / 4)) / 3
    assert info_nce(scores).item() == pytest.approx(expected, abs=1e-6)
    assert info_nce(torch.zeros(7, 7)).item() == pytest.approx(math.log(7), abs=1e-6)  # knows nothing


def test_length_does_not_matter_and_the_two_directions_count_alike(parity) -> None:
    (images, texts), scale = pairs(), torch.tensor(2.0, dtype=torch.float64)
    parity(
        "clip_loss",
        "other lengths",
        "invariant",
        clip_loss(3 * images, texts / 5, scale),
        clip_loss(images, texts, scale),
        1e-10,
    )
    parity(
        "clip_loss", "exchanged", "invariant", clip_loss(texts, images, scale), clip_loss(images, texts, scale), 1e-10
    )
    order = torch.tensor([3, 1, 4, 0, 2])
    parity(
        "clip_loss",
        "reordered",
        "invariant",
        clip_loss(images[order], texts[order], scale),
        clip_loss(images, texts, scale),
        1e-10,
    )


def test_masked_loss_ignores_pairs_with_the_same_caption(parity) -> None:
    (images, texts), scale = pairs(), torch.tensor(1.0, dtype=torch.float64)
    distinct = torch.arange(5)
    parity(
        "masked_clip_loss",
        "clip_loss",
        "invariant",
        masked_clip_loss(images, texts, scale, distinct),
        clip_loss(images, texts, scale),
        1e-10,
    )
    captions = torch.tensor([0, 1, 0, 2, 3])  # pairs 0 and 2 say the same
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T * scale.exp()
    expected = 0.0
    for scores in (cosines, cosines.T):
        for row in range(5):
            rivals = [column for column in range(5) if column == row or captions[column] != captions[row]]
            expected += (scores[row, rivals].logsumexp(dim=0) - scores[row, row]) / 10
    parity(
        "masked_clip_loss",
        "its definition",
        "output",
        masked_clip_loss(images, texts, scale, captions),
        expected,
        1e-10,
    )


# The bound


def test_density_ratio_equals_torchs_normal_distributions(parity) -> None:
    correlation, (x, y) = 0.6, gaussian_pairs(6, 0.6, 4, generator())
    conditional = (
        torch.distributions.Normal(correlation * x[:, None], math.sqrt(1 - correlation**2)).log_prob(y).sum(-1)
    )
    marginal = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1)
    parity(
        "density_ratio",
        "torch.distributions",
        "output",
        density_ratio(x, y, correlation),
        conditional - marginal,
        1e-10,
    )


def test_gaussian_pairs_have_the_stated_information() -> None:
    correlation = correlation_for(2.0, 8)
    assert gaussian_information(correlation, 8) == pytest.approx(2.0, abs=1e-12)
    assert gaussian_information(0.0, 8) == 0
    x, y = gaussian_pairs(100_000, correlation, 8, generator())
    measured = (x * y).mean(dim=0)
    assert (measured - correlation).abs().max() < 0.02 and (y.var(dim=0) - 1).abs().max() < 0.03
    ratios = density_ratio(x[:50_000, :], y[:1], correlation)[0, 0]  # one number of the big matrix
    assert ratios.isfinite()
    paired = torch.stack([density_ratio(x[i : i + 1], y[i : i + 1], correlation)[0, 0] for i in range(4000)])
    assert abs(paired.mean() - 2.0) < 5 * paired.std() / math.sqrt(4000)  # the mean log ratio is the information


@pytest.mark.parametrize("information", [1.0, 6.0])
def test_the_bound_holds_rises_with_the_batch_and_saturates_at_ln_n(information) -> None:
    correlation, width, means = correlation_for(information, 8), 8, {}
    for n_pairs in (4, 32, 256):
        bounds = [
            information_bound(density_ratio(*gaussian_pairs(n_pairs, correlation, width, generator(seed)), correlation))
            for seed in range(40)
        ]
        assert max(bounds) <= math.log(n_pairs)
        means[n_pairs] = sum(bounds) / len(bounds)
        spread = (sum((bound - means[n_pairs]) ** 2 for bound in bounds) / 39) ** 0.5
        assert means[n_pairs] < information + 5 * spread / math.sqrt(40)
    assert means[4] < means[32] < means[256]
    if information == 1.0:
        assert means[256] > 0.9
    else:
        assert means[256] > 0.75 * math.log(256) and means[4] > 0.85 * math.log(4)


# Pictures and captions


def test_unseen_captions_leave_every_digit_on_both_sides() -> None:
    for seed in range(3):
        unseen = unseen_captions(seed)
        assert unseen.sum() == 20
        grid = unseen.reshape(10, 10)
        assert (grid.sum(dim=0) == 2).all() and (grid.sum(dim=1) == 2).all()
    assert not torch.equal(unseen_captions(0), unseen_captions(1))
    assert CAPTIONS[37] == "three seven" and len(set(CAPTIONS)) == 100


def test_pictures_show_the_digits_of_their_number() -> None:
    data, _ = load_digits_images()
    pictures = draw_pictures(data, torch.tensor([37, 70, 5]), generator())
    assert pictures.shape == (3, 1, 16, 16) and pictures.min() == -1
    by_class = {d: {image.numpy().tobytes() for image in data.images[data.labels == d]} for d in (0, 3, 5, 7)}
    for picture, digits in zip(pictures, ((3, 7), (7, 0), (0, 5)), strict=True):
        for place, digit in enumerate(digits):
            half = picture[:, :, 8 * place : 8 * place + 8]
            crops = (half[:, top : top + 8].contiguous().numpy().tobytes() for top in range(9))
            assert any(crop in by_class[digit] for crop in crops)


def test_batches_repeat_no_number_when_told() -> None:
    data, _ = load_digits_images()
    _, numbers = next(pair_batches(data, torch.arange(30), TINY, generator()))
    assert len(numbers.unique()) == 20
    drawn = [next(pair_batches(data, torch.arange(30), TINY, generator(s), distinct=False))[1] for s in range(5)]
    assert all(len(numbers.unique()) < 20 for numbers in drawn)


def test_text_encoder_ignores_padding(parity) -> None:
    model = TextEncoder(len(LETTERS), 11, TINY).double()
    token_ids = torch.randint(4, len(LETTERS), (2, 7))
    padded = torch.cat([token_ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    parity("TextEncoder", "unpadded", "invariant", model(padded), model(token_ids), 1e-10)


def test_dual_encoder_equals_their_vision_transformer_and_texts_alone(parity, tmp_path) -> None:
    model, pictures = DualEncoder(LETTERS, TINY).eval(), torch.rand(3, 1, 16, 16)
    captions = ["three one", "six", "zero seven"]
    model.vision.save_pretrained(tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    embedded = model(pictures, model.tokens(captions))
    alone = torch.cat([model.text_proj(model.text(model.tokens([caption]))) for caption in captions])
    parity("DualEncoder, pictures", "ViTForImageClassification", "exchange", embedded[0], theirs(pictures).logits, 1e-5)
    parity("DualEncoder, texts", "one text at a time", "invariant", embedded[1], alone, 1e-5)


def test_training_learns_to_retrieve(checked_shapes) -> None:
    train, held_out = load_digits_images()
    torch.manual_seed(0)
    config = replace(TINY, d_model=32, max_steps=150, warmup_steps=10)
    model, numbers = DualEncoder(LETTERS, config), torch.arange(100)
    losses = fit_pairs(model, pair_batches(train, numbers, config, generator()), config)
    with checked_shapes(topic) as checked:
        found = retrieval_accuracy(model, draw_pictures(held_out, numbers, generator(1)), numbers)
        short = replace(config, max_steps=2, warmup_steps=1)
        fit_pairs(DualEncoder(LETTERS, short), pair_batches(train, numbers, short, generator()), short)
        masked_clip_loss(*pairs(), torch.tensor(1.0), torch.arange(5))
        information_bound(density_ratio(*gaussian_pairs(4, 0.5, 2, generator()), 0.5))
        unseen_captions(0)
    assert len(checked) >= 13
    assert sum(losses[-20:]) / 20 < math.log(20) - 0.3  # ln 20 is what knowing nothing costs
    assert found[0] >= 0.03  # chance: 0.01
    assert model.log_scale.item() <= topic.MAX_LOG_SCALE


class Told:
    """Two encoders whose answers are known: a caption is its number, a picture a row of scores."""

    text = text_proj = vision = staticmethod(lambda x: x)
    tokens = staticmethod(lambda captions: torch.eye(len(captions)))
    eval = staticmethod(lambda: None)


def test_retrieval_by_hand() -> None:
    """Three pictures, of 3, 3 and 7; the second is taken for a 7, and more surely than the third."""
    pictures = torch.zeros(3, 100)
    pictures[0, 3], pictures[1, 7], pictures[2, [7, 8]] = 1.0, 1.0, torch.tensor([0.8, 0.6])
    assert retrieval_accuracy(Told(), pictures, torch.tensor([3, 3, 7])) == (pytest.approx(2 / 3), 0.5)


def test_the_scale_starts_at_the_temperature_and_is_clipped_at_100(monkeypatch) -> None:
    model, numbers = DualEncoder(LETTERS, TINY), torch.arange(20)
    assert model.log_scale.exp().item() == pytest.approx(1 / TINY.temperature)
    model.log_scale.data.fill_(9.0)
    batches = iter([(torch.rand(20, 1, 16, 16), numbers)] * 2)
    fit_pairs(model, batches, replace(TINY, max_steps=1, warmup_steps=1))
    assert model.log_scale.exp().item() == pytest.approx(100, rel=1e-5)
    broken = iter([(torch.full((20, 1, 16, 16), math.nan), numbers)])
    with pytest.raises(ValueError, match="the loss is nan at step 0; lower --learning-rate"):
        fit_pairs(model, broken, TINY)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: info_nce(torch.zeros(3, 4)), r"scores must be square, .*got \(3, 4\)"),
        (lambda: clip_loss(torch.zeros(3, 4), torch.zeros(4, 4), torch.tensor(0.0)), r"got \(3, 4\) and \(4, 4\)"),
        (lambda: info_nce(torch.zeros(0, 0)), "there is no pair to find"),
        (
            lambda: masked_clip_loss(torch.ones(2, 3), torch.ones(3, 3), torch.tensor(0.0), torch.arange(2)),
            r"equal shapes \(pairs, width\), got \(2, 3\) and \(3, 3\)",
        ),
        (
            lambda: masked_clip_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.0), torch.arange(3)),
            "one number for each of 2 pairs",
        ),
        (lambda: PairConfig(batch_size=1), "batch_size must be finite and >= 2, got 1"),
        (lambda: PairConfig(temperature=0.0), "temperature must be finite and >= 0.01"),
        (lambda: DualEncoder(LETTERS, TINY).tokens(["Three"]), r"not in the vocabulary"),
    ],
)
def test_bad_input_gives_one_clear_line(work, message) -> None:
    with pytest.raises(ValueError, match=message):
        work()
