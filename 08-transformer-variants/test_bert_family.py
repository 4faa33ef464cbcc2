"""Topic 08: BERT, RoBERTa, ALBERT and ELECTRA against Hugging Face's, their files, and their objectives."""

import dataclasses
import json
import math
import random

import pytest
import torch
import transformers
from scipy import stats
from torch.nn import functional as F

import bert_family as topic
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
from huggingface_folders import joined, read_weights
from optimizers import shapes_alone
from sequence_modeling import IGNORE
from workbench import largest_difference

VOCAB = 67
SIZES = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4)
NARROW = dict(embedding_size=20)
FAMILY = {  # our class, their class -> what their config has beside SIZES
    BertForMaskedLM: {},
    BertForPreTraining: {},
    BertForSequenceClassification: dict(id2label={0: "bad", 1: "fair", 2: "good"}),
    RobertaForMaskedLM: dict(type_vocab_size=1),
    AlbertForMaskedLM: NARROW,
    AlbertForPreTraining: NARROW,
    ElectraGenerator: NARROW,
    ElectraDiscriminator: NARROW,
}
family = pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
TINY = BertConfig(VOCAB, 37, 24, 2, 4, 44, dropout=0.0)


def their_model(kind: type, **options) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    config_class = getattr(transformers, type(kind.config_class()).__name__)
    config = config_class(**SIZES, max_position_embeddings=37, **FAMILY[kind], **options)
    theirs = getattr(transformers, kind.architecture)(config).eval()
    for parameter in theirs.parameters():  # biases start at 0 and norms at 1, which would hide a swapped name
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return theirs


def load(kind: type, theirs: transformers.PreTrainedModel, folder) -> torch.nn.Module:
    theirs.save_pretrained(folder)
    return kind.from_pretrained(folder)


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def outputs(model: torch.nn.Module, *args, **kwargs) -> list[torch.Tensor]:
    found = model(*args, **kwargs)
    if isinstance(found, torch.Tensor):
        return [found]
    return [
        value for value in (found if isinstance(found, tuple) else found.values()) if isinstance(value, torch.Tensor)
    ]


def some_loss(found: list[torch.Tensor]) -> torch.Tensor:
    """A cross-entropy of every output with fixed random classes, in the outputs' own precision."""
    total = torch.zeros((), dtype=found[0].dtype)
    for index, logits in enumerate(found):
        flat = logits.reshape(-1, logits.shape[-1])
        classes = torch.randint(flat.shape[-1], (len(flat),), generator=torch.Generator().manual_seed(index))
        total = total + F.cross_entropy(flat, classes)
    return total


# Against Hugging Face


@family
def test_logits_and_gradients_equal_theirs(kind, tmp_path, parity) -> None:
    theirs = their_model(kind)
    ours = load(kind, theirs, tmp_path).double()
    theirs = theirs.double()
    token_ids, name = some_ids(), kind.architecture
    token_ids[:, 2] = ours.config.pad_id  # a filler that nobody hides learns from no lookup
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 9]) if ours.config.n_segments > 1 else torch.zeros_like(token_ids)
    real = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    mine = outputs(ours, token_ids, segments, real)
    options = dict(token_type_ids=segments, attention_mask=real.long())
    other = outputs(theirs, token_ids, **options)
    kept = [tensor[real] if tensor.shape[:2] == real.shape else tensor for tensor in mine]
    wanted = [tensor[real] if tensor.shape[:2] == real.shape else tensor for tensor in other]
    parity(kind.__name__, name, "output", kept, wanted, 1e-10)
    some_loss(kept).backward()
    some_loss(wanted).backward()
    gradients = dict((key, parameter.grad) for key, parameter in ours.named_parameters())
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    renamed = {
        entry.key: joined([gradients[part] for part in entry.parts], entry)
        for entry in ours.layout(ours.config).tensors
    }
    memory = {key: value for key, value in expected.items() if key in renamed and value is not None}
    assert len(memory) == len(expected) == len(renamed)  # BERT's names in memory are those in files
    parity(kind.__name__, name, "gradient", {key: renamed[key] for key in memory}, memory, 1e-10)


@family
def test_files_go_both_ways(kind, tmp_path, parity) -> None:
    theirs, token_ids = their_model(kind), some_ids(3, 8)
    ours = load(kind, theirs, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    parity(kind.__name__, kind.architecture, "exchange", outputs(ours, token_ids), outputs(again, token_ids), 1e-4)
    shapes = [{key: value.shape for key, value in read_weights(tmp_path / name).items()} for name in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    same = ("hidden_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "id2label")
    assert all(getattr(again.config, name) == getattr(theirs.config, name) for name in same)
    assert kind.from_pretrained(tmp_path / "ours").config == ours.config


def test_losses_equal_theirs(tmp_path, parity) -> None:
    token_ids, targets = some_ids(), some_ids(seed=1)
    targets[:, ::2] = IGNORE
    theirs = their_model(BertForPreTraining)
    ours = load(BertForPreTraining, theirs, tmp_path / "bert")
    mlm, pair = ours(token_ids)
    followed = torch.tensor([1, 0])
    loss = F.cross_entropy(mlm.flatten(0, 1), targets.flatten(), ignore_index=IGNORE) + F.cross_entropy(pair, followed)
    expected = theirs(token_ids, labels=targets, next_sentence_label=followed).loss
    parity("BertForPreTraining, loss", "BertForPreTraining", "output", loss, expected, 1e-6)
    theirs = their_model(ElectraDiscriminator)
    judge = load(ElectraDiscriminator, theirs, tmp_path / "electra")
    real = torch.tensor([[True] * 9, [True] * 7 + [False] * 2])
    replaced = some_ids(seed=2) % 3 == 0
    expected = theirs(token_ids, attention_mask=real.long(), labels=replaced.long()).loss
    logits = judge(token_ids, None, real)
    output = topic.ReplacedTokens(torch.zeros(2, 9, VOCAB), token_ids, replaced, logits)
    ours_loss = electra_loss(output, torch.zeros(2, 9, dtype=torch.long), real, 1.0) - math.log(VOCAB)
    parity("ELECTRA, discriminator's loss", "ElectraForPreTraining", "output", ours_loss, expected, 1e-6)


PUBLISHED = [  # our model, their published config, parameters of theirs
    (BertForPreTraining, BertConfig(), {}, 110_106_428),
    (
        RobertaForMaskedLM,
        RobertaConfig(),
        dict(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1),
        None,
    ),
    (
        AlbertForPreTraining,
        AlbertConfig(),
        dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
        None,
    ),
    (ElectraDiscriminator, ElectraConfig(), {}, None),
]


@pytest.mark.parametrize(("kind", "config", "options", "published"), PUBLISHED, ids=lambda value: "")
def test_published_parameter_counts(kind, config, options, published, parity) -> None:
    config_class = getattr(transformers, type(config).__name__)
    with shapes_alone():
        ours, theirs = kind(config), getattr(transformers, kind.architecture)(config_class(**options))
    count = sum(parameter.numel() for parameter in ours.parameters())
    parity(f"{kind.__name__}, parameters", kind.architecture, "output", count, theirs.num_parameters(), 0)
    assert published in (None, count)
    if kind is BertForPreTraining:
        bare = [*ours.trunk.parameters(), *ours.pooler.parameters()]
        assert sum(parameter.numel() for parameter in bare) == 109_482_240


def test_albert_shares_one_block_and_bert_does_not() -> None:
    counts = {}
    for kind, config in (
        (BertForMaskedLM, TINY),
        (AlbertForMaskedLM, AlbertConfig(**vars(TINY) | {"d_embedding": 20})),
    ):
        for n_layers in (2, 5):
            model = kind(dataclasses.replace(config, n_layers=n_layers))
            counts[kind, n_layers] = sum(parameter.numel() for parameter in model.parameters())
    assert counts[AlbertForMaskedLM, 2] == counts[AlbertForMaskedLM, 5]
    layer = sum(parameter.numel() for parameter in topic.BertLayer(TINY).parameters())
    assert counts[BertForMaskedLM, 5] - counts[BertForMaskedLM, 2] == 3 * layer
    token_ids = some_ids()
    deep, shallow = (AlbertForMaskedLM(AlbertConfig(**vars(TINY) | {"n_layers": n})).eval() for n in (5, 2))
    deep.load_state_dict(shallow.state_dict())
    assert largest_difference(deep(token_ids), shallow(token_ids)) > 1e-3


# Folders


def test_old_names_tied_copies_and_other_heads_load(tmp_path) -> None:
    """What the released bert-base-uncased holds: gamma and beta, the tied output repeated, a table of positions."""
    from safetensors.torch import save_file

    theirs, token_ids = their_model(BertForPreTraining), some_ids()
    expected = theirs(token_ids).prediction_logits
    theirs.save_pretrained(tmp_path)
    tensors = {}
    for key, value in read_weights(tmp_path).items():
        tensors[key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for kind in (BertForPreTraining, BertForMaskedLM):  # the second has neither pooler nor pair head
        logits = outputs(kind.from_pretrained(tmp_path), token_ids)[0]
        assert largest_difference(logits, expected) < 1e-5
    tensors["cls.predictions.decoder.weight"] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_the_number_of_classes_may_stand_alone_and_no_generation_config_moves_positions(tmp_path) -> None:
    ours = BertForSequenceClassification(dataclasses.replace(TINY, class_names=("LABEL_0", "LABEL_1", "LABEL_2")))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({name: given[name] for name in given if name != "id2label"} | {"num_labels": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 5}))
    assert BertForSequenceClassification.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RobertaForMaskedLM, {}, "model_type 'bert', expected 'roberta'"),
        (BertForMaskedLM, {"hidden_act": "relu"}, "hidden_act='relu'; this model supports 'gelu'"),
        (BertForMaskedLM, {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        (BertForMaskedLM, {"num_hidden_layers": 2.0}, "num_hidden_layers=2.0; it must be of type int"),
        (BertForMaskedLM, {"num_attention_heads": 7}, "d_model=24 is not divisible by n_heads=7"),
        (BertForSequenceClassification, {}, "missing classifier.weight, classifier.bias; unexpected cls.predictions"),
        (BertForMaskedLM, {"id2label": ["a"]}, r"id2label=\['a'\]; it must map"),
        (BertForMaskedLM, {"id2label": {"0": "a", "2": "b"}}, r"id2label=\{.*\}; it must map"),
        (BertForMaskedLM, {"hidden_size": 28}, r"has shape \(67, 24\), expected \(67, 28\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, kind, change, message) -> None:
    their_model(BertForPreTraining).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as refused:
        kind.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_trunk_goes_on_in_a_classifier() -> None:
    torch.manual_seed(0)
    pretrained = BertForPreTraining(TINY).eval()
    classifier = BertForSequenceClassification(dataclasses.replace(TINY, class_names=("a", "b", "c"))).eval()
    classifier.trunk, classifier.pooler = pretrained.trunk, pretrained.pooler
    token_ids = some_ids()
    expected = classifier.class_head(pretrained.pooler(pretrained.trunk(token_ids)))
    assert torch.equal(classifier(token_ids), expected) and classifier(token_ids).shape == (2, 3)


# Invariants


@family
def test_padding_and_the_rest_of_the_batch_change_nothing(kind, tmp_path, parity) -> None:
    ours = load(kind, their_model(kind), tmp_path).double()
    rows = [some_ids(1, 5, 1), some_ids(1, 8, 2)]
    batch = torch.full((2, 8), ours.config.pad_id)
    batch[0, :5], batch[1] = rows[0][0], rows[1][0]
    real = batch != ours.config.pad_id
    together = outputs(ours, batch, None, real)
    for index, row in enumerate(rows):
        for alone, padded in zip(outputs(ours, row), together, strict=True):
            kept = padded[index][real[index]] if padded.shape[:2] == batch.shape else padded[index]
            parity(f"{kind.__name__}, padding", "one row alone", "invariant", kept, alone[0], 1e-10)


def test_a_roberta_with_another_padding_reads_its_longest_text_as_theirs_does(tmp_path) -> None:
    """Positions start behind pad_id, whatever it is, and padding moves none; whether it is seen, `real` says."""
    torch.manual_seed(0)
    config = RobertaConfig(VOCAB, 9, 24, 2, 4, 44, n_segments=1, dropout=0.0, pad_id=3)
    ours = RobertaForMaskedLM(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.RobertaForMaskedLM.from_pretrained(tmp_path).eval()
    token_ids = some_ids(2, 9)
    assert RobertaForMaskedLM.from_pretrained(tmp_path).config == config
    assert largest_difference(ours(token_ids), theirs(token_ids).logits) < 1e-5
    padded = token_ids.clone()
    padded[0, 6:] = 3
    assert largest_difference(ours(padded), theirs(padded).logits) < 1e-5
    assert largest_difference(ours(padded, real=padded != 3)[:1, :6], ours(token_ids[:1, :6])) < 1e-5


def test_every_token_sees_every_other(tmp_path) -> None:
    ours, token_ids = load(BertForMaskedLM, their_model(BertForMaskedLM), tmp_path), some_ids(1)
    for changed in (0, 4, 8):
        other = token_ids.clone()
        other[0, changed] = (other[0, changed] - 5 + 1) % (VOCAB - 5) + 5
        assert ((ours(other) - ours(token_ids)).abs().amax(-1) > 1e-5).all()


def test_a_fresh_model_knows_nothing_and_can_learn_one_batch() -> None:
    torch.manual_seed(0)
    model, token_ids = BertForMaskedLM(TINY), some_ids(4, 12)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = mask_tokens(token_ids, VOCAB, 4, range(5), MaskingConfig(0.4), generator)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    assert loss().item() == pytest.approx(math.log(VOCAB), abs=0.3)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.1


# ELECTRA


@pytest.fixture
def electra() -> Electra:
    torch.manual_seed(0)
    config = ElectraConfig(**vars(TINY) | {"d_embedding": 20})
    return Electra(
        ElectraGenerator(dataclasses.replace(config, d_model=12, d_ff=16, n_heads=3)), ElectraDiscriminator(config)
    )


def test_electra_shares_its_embeddings_and_replaces_masked_tokens_alone(electra) -> None:
    for name in ("token_emb", "pos_emb", "segment_emb"):
        assert getattr(electra.generator.trunk, name) is getattr(electra.discriminator.trunk, name)
    token_ids = some_ids(6, 30)
    inputs, targets = mask_tokens(token_ids, VOCAB, 4, range(5), MaskingConfig(0.5), torch.Generator().manual_seed(1))
    output = electra(inputs, targets, None, torch.Generator().manual_seed(2))
    chosen = targets != IGNORE
    assert torch.equal(output.corrupted_ids[~chosen], inputs[~chosen])
    assert torch.equal(output.replaced, output.corrupted_ids != token_ids) and not output.replaced[~chosen].any()
    assert output.replaced[chosen].float().mean() > 0.9  # a fresh generator guesses right once in 67
    again = electra(inputs, targets, None, torch.Generator().manual_seed(2))
    assert torch.equal(again.corrupted_ids, output.corrupted_ids)


def test_electra_and_its_loss_equal_their_two_models_and_losses(electra, tmp_path, parity) -> None:
    """Theirs are two folders with a copy of the embeddings each; the sample between them is ours."""
    theirs = []
    for half in (electra.generator, electra.discriminator):
        half.eval().save_pretrained(tmp_path / half.architecture)
        kind = getattr(transformers, half.architecture)
        theirs.append(kind.from_pretrained(tmp_path / half.architecture).double().eval())
    token_ids, real = some_ids(3, 11), torch.arange(11) < torch.tensor([[11], [7], [9]])
    inputs, targets = mask_tokens(token_ids, VOCAB, 4, range(5), MaskingConfig(0.5), torch.Generator().manual_seed(1))
    targets = targets.masked_fill(~real, IGNORE)
    output = electra.double()(inputs, targets, real, torch.Generator().manual_seed(2))
    mask = real.long()
    mlm = theirs[0](inputs, attention_mask=mask, labels=targets)
    rtd = theirs[1](output.corrupted_ids, attention_mask=mask, labels=output.replaced.long())
    pair = "ElectraForMaskedLM, ElectraForPreTraining"
    mine = [output.mlm_logits[real], output.rtd_logits[real]]
    parity("Electra", pair, "output", mine, [mlm.logits[real], rtd.logits[real]], 1e-10)
    theirs_loss = mlm.loss + 50 * rtd.loss  # the first taken in float32
    parity("electra_loss", pair, "output", electra_loss(output, targets, real), theirs_loss, 1e-5)
    electra_loss(output, targets, real).backward()
    theirs_loss.backward()
    shared = electra.discriminator.trunk.token_emb.weight.grad
    copies = [model.electra.embeddings.word_embeddings.weight.grad for model in theirs]
    parity("Electra, shared embedding", "sum over the two copies", "gradient", shared, sum(copies), 1e-6)


def test_electra_draws_its_replacements_from_the_generator(electra) -> None:
    """Chi-square over 6 tokens on 12,000 draws: a generator that ignored its logits would be caught surely."""
    wanted = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    logits = torch.full((VOCAB,), -math.inf)
    logits[10:15] = wanted.log()
    electra.generator.forward = lambda ids, segments, real: logits.expand(*ids.shape, VOCAB)
    targets = some_ids(400, 30)
    output = electra(torch.full_like(targets, 4), targets, None, torch.Generator().manual_seed(0))
    counts = torch.bincount(output.corrupted_ids.flatten(), minlength=VOCAB)
    assert counts.sum() == counts[10:15].sum() == 12_000
    assert stats.chisquare(counts[10:15].double(), 12_000 * wanted.double() / wanted.double().sum()).pvalue > 0.001


def test_no_gradient_of_the_discriminator_reaches_the_generator(electra) -> None:
    token_ids = some_ids(3, 12)
    inputs, targets = mask_tokens(token_ids, VOCAB, 4, range(5), MaskingConfig(0.5), torch.Generator().manual_seed(1))
    output = electra(inputs, targets, None, torch.Generator().manual_seed(2))
    F.binary_cross_entropy_with_logits(output.rtd_logits, output.replaced.float()).backward()
    assert all(parameter.grad is None for parameter in electra.generator.trunk.blocks.parameters())
    assert electra.generator.trunk.token_emb.weight.grad.any()  # the shared embedding is trained by both
    with pytest.raises(ValueError, match=r"share token_emb, but theirs have shapes \(67, 8\) and \(67, 20\)"):
        narrow = dataclasses.replace(electra.generator.config, d_embedding=8)
        Electra(ElectraGenerator(narrow), electra.discriminator)


# The objectives


def test_masking_hides_swaps_and_keeps_in_the_stated_shares() -> None:
    """Chi-square on 400,000 tokens: a share that is off by 1 point of the chosen tokens would be seen surely."""
    token_ids = torch.randint(8, VOCAB, (400, 1000), generator=torch.Generator().manual_seed(0))
    token_ids[:, 0] = 1
    config, n_ordinary = MaskingConfig(), VOCAB - 8
    inputs, targets = mask_tokens(token_ids, VOCAB, 4, range(8), config, torch.Generator().manual_seed(1))
    chosen = targets != IGNORE
    assert not chosen[:, 0].any() and torch.equal(inputs[~chosen], token_ids[~chosen])
    assert torch.equal(targets[chosen], token_ids[chosen])
    hidden, kept = inputs == 4, chosen & (inputs == token_ids)
    swapped = chosen & ~hidden & ~kept
    n = token_ids[:, 1:].numel()
    shares = {"hidden": 0.8, "swapped": 0.1 * (1 - 1 / n_ordinary), "kept": 0.1 + 0.1 / n_ordinary}
    counts = [mask.sum().item() for mask in (hidden, swapped, kept)]
    expected = [0.15 * n * share for share in shares.values()]
    assert stats.chisquare([*counts, n - sum(counts)], [*expected, 0.85 * n]).pvalue > 0.001
    drawn = torch.bincount(inputs[swapped], minlength=VOCAB)
    assert not drawn[:8].any() and stats.chisquare(drawn[8:].double()).pvalue > 0.001
    by_place = chosen[:, 1:].sum(dim=0).double()
    assert stats.chisquare(by_place).pvalue > 0.001


def test_masking_is_reproducible_and_other_shares_are_exact() -> None:
    token_ids = some_ids(20, 50)

    def masked(config: MaskingConfig, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return mask_tokens(token_ids, VOCAB, 4, (), config, torch.Generator().manual_seed(seed))

    assert largest_difference(masked(MaskingConfig()), masked(MaskingConfig())) == 0
    assert largest_difference(masked(MaskingConfig()), masked(MaskingConfig(), 1)) > 0
    inputs, targets = masked(MaskingConfig(0.3, 1.0, 0.0))
    assert torch.equal(inputs == 4, targets != IGNORE)
    inputs, targets = masked(MaskingConfig(1.0, 0.0, 0.0))
    assert torch.equal(inputs, token_ids) and torch.equal(targets, token_ids)
    inputs, targets = masked(MaskingConfig(1.0, 0.0, 1.0))
    assert not (inputs == 4).any() and (inputs != token_ids).any(), "a random token is never the mask"
    for call, message in (
        (lambda: MaskingConfig(mask_share=0.8, random_share=0.3), "mask_share . random_share = 1.1 exceeds 1"),
        (lambda: MaskingConfig(mask_rate=0), "mask_rate must be finite and > 0 and <= 1, got 0"),
        (
            lambda: mask_tokens(token_ids, 5, 4, range(5), MaskingConfig(), torch.Generator()),
            "all 5 tokens are special",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pairs_of_sentences() -> None:
    documents = [[[10 * d + s, d] for s in range(2 + d % 3)] for d in range(1, 12)]
    home = {tuple(sentence): (d, s) for d, document in enumerate(documents) for s, sentence in enumerate(document)}
    rng, seen = random.Random(0), {0: 0, 1: 0}
    for _ in range(2000):
        first, second, label = next_sentence(documents, rng)
        (d, s), (other, t) = home[tuple(first)], home[tuple(second)]
        assert (other, t) == (d, s + 1) if label == 0 else other != d
        seen[label] += 1
    assert stats.binomtest(seen[1], 2000, 0.5).pvalue > 0.001
    seen, places = {0: 0, 1: 0}, set()
    for _ in range(2000):
        first, second, label = sentence_order(documents, rng)
        (d, s), (other, t) = home[tuple(first)], home[tuple(second)]
        assert other == d and t == (s + 1 if label == 0 else s - 1)
        seen[label] += 1
        places.add((d, min(s, t)))
    assert len(places) == sum(len(document) - 1 for document in documents), "every pair of neighbours comes"
    assert stats.binomtest(seen[1], 2000, 0.5).pvalue > 0.001
    assert join_pair([7, 8], [9], 1, 2) == ([1, 7, 8, 2, 9, 2], [0, 0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="no document has two sentences"):
        next_sentence([[[1]]], rng)
    with pytest.raises(ValueError, match="another document needs at least 2 documents"):
        for _ in range(20):
            next_sentence([[[1], [2]]], rng)


# Bad input


def test_bad_calls_are_named() -> None:
    model, token_ids = BertForMaskedLM(TINY), some_ids()
    for call, message in (
        (lambda: model(token_ids + VOCAB), r"token id \d+ >= vocab_size 67 at \[0, 0\]"),
        (lambda: model(token_ids[0]), "token ids must have 2 axes"),
        (
            lambda: mask_tokens(token_ids, 70, 70, (), MaskingConfig(), torch.Generator()),
            r"mask_id=70 must be in 0\.\.69",
        ),
        (lambda: mask_tokens(token_ids + 70, 70, 1, (), MaskingConfig(), torch.Generator()), ">= vocab_size 70"),
        (lambda: model(some_ids(1, 38)), "sequence length 38 exceeds max_seq_len 37"),
        (lambda: model(token_ids, torch.full_like(token_ids, 2)), r"token id 2 >= vocab_size 2 at \[0, 0\]"),
        (lambda: model(token_ids, None, torch.ones(2, 9)), "real must be bool"),
        (lambda: BertConfig(n_heads=5), "d_model=768 is not divisible by n_heads=5"),
        (lambda: BertConfig(pad_id=30_522), "pad_id must be finite and >= 0 and < 30522"),
        (lambda: BertConfig(class_names=()), "class_names is empty"),
        (lambda: AlbertConfig(d_embedding=0), "d_embedding must be finite and >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@family
def test_shape_comments_hold(kind, checked_shapes, tmp_path) -> None:
    ours = load(kind, their_model(kind), tmp_path)
    with checked_shapes(topic) as checked:
        ours(some_ids(), None, torch.tensor([[True] * 9, [True] * 5 + [False] * 4]))
    assert len(checked) >= 5


def test_shape_comments_of_the_objectives_hold(electra, checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        inputs, targets = mask_tokens(some_ids(3, 12), VOCAB, 4, range(5), MaskingConfig(0.5), torch.Generator())
        electra(inputs, targets)
    assert len(checked) >= 15
