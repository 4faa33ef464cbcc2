"""Topic 08: T5 and BART against Hugging Face's, in outputs, gradients, files and generation; span corruption."""

import collections
import dataclasses
import json
import math

import pytest
import torch
import transformers
from scipy import stats
from torch import nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

import t5 as topic
from gpt2 import SamplingConfig
from huggingface_folders import joined, read_weights
from optimizers import shapes_alone
from sequence_modeling import IGNORE
from t5 import (
    T5,
    Bart,
    BartConfig,
    SpanConfig,
    T5Config,
    T5Norm,
    corrupt_spans,
    draw_spans,
    infill_spans,
    random_parts,
    restore_spans,
)
from workbench import largest_difference

VOCAB = 67
GREEDY = SamplingConfig(21, temperature=0)
T5_SIZES = dict(vocab_size=VOCAB, d_model=24, d_kv=10, d_ff=44, num_layers=2, num_decoder_layers=3, num_heads=4)
T5_SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0)
BART_SIZES = dict(vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=3, max_position_embeddings=37)
BART_SIZES |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44)
CASES = {
    "T5": (T5, T5_SIZES),
    "T5 1.1": (T5, T5_SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "BART": (Bart, BART_SIZES | dict(forced_eos_token_id=None)),
}
cases = pytest.mark.parametrize("name", CASES)
TINY = T5Config(VOCAB, 24, 10, 44, 2, 2, 3, dropout=0.0)


def their_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    kind, options = CASES[name]
    config_class = {T5: transformers.T5Config, Bart: transformers.BartConfig}[kind]
    theirs = getattr(transformers, kind.architecture)(config_class(**options)).eval()
    for parameter in theirs.parameters():  # biases start at 0 and norms at 1, which would hide a swapped name
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if name == "BART":
        theirs.final_logits_bias.normal_()
    return theirs


def double_pair(name: str, folder) -> tuple[nn.Module, nn.Module]:
    """The same weights in both libraries, in float64.

    Their T5LayerNorm takes its mean square in float32 whatever the input; nn.RMSNorm, the same norm in PyTorch, stands
    in for it.
    """
    theirs = their_model(name)
    theirs.save_pretrained(folder)
    ours, theirs = CASES[name][0].from_pretrained(folder).double(), theirs.double()
    for path, module in list(theirs.named_modules()):
        if isinstance(module, T5LayerNorm):
            norm = nn.RMSNorm(24, module.variance_epsilon)
            norm.weight = module.weight
            theirs.get_submodule(path.rpartition(".")[0]).__setattr__(path.rpartition(".")[2], norm)
    return ours, theirs


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


# Against Hugging Face


@cases
def test_logits_losses_and_gradients_equal_theirs(name, tmp_path, parity) -> None:
    ours, theirs = double_pair(name, tmp_path)
    component, oracle = (name, type(theirs).__name__)
    src_ids, targets = some_ids(), some_ids(2, 7, 1)
    src_ids[:, 2] = targets[:, 2] = ours.config.pad_id  # BART's learns from no lookup
    targets[0, 5:] = IGNORE
    real = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    logits = ours(src_ids, ours.shift_right(targets), real)
    output = theirs(src_ids, attention_mask=real.long(), labels=targets)
    parity(component, oracle, "output", logits, output.logits, 1e-10)

    def loss(found: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(found.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    parity(component, oracle, "output", loss(logits), output.loss, 1e-6)
    loss(logits).backward()
    loss(output.logits).backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    mine = {
        entry.key: joined([gradients[part] for part in entry.parts], entry)
        for entry in ours.layout(ours.config).tensors
        if entry.parts[0] in gradients  # BART's logits_bias is not trained
    }
    assert set(mine) == set(expected)
    parity(component, oracle, "gradient", mine, expected, 1e-10)


@cases
def test_files_go_both_ways(name, tmp_path, parity) -> None:
    theirs, src_ids, tgt_ids = their_model(name), some_ids(3, 8), some_ids(3, 6, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CASES[name][0].from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    mine = ours(src_ids, tgt_ids)
    for other in (theirs, again):
        logits = other(src_ids, decoder_input_ids=tgt_ids).logits
        parity(name, type(theirs).__name__, "exchange", mine, logits, 1e-4)
    shapes = [{key: value.shape for key, value in read_weights(tmp_path / side).items()} for side in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    assert CASES[name][0].from_pretrained(tmp_path / "ours").config == ours.config


def test_an_output_of_its_own_goes_both_ways(tmp_path, parity) -> None:
    """Version 1.1 as Google released it: lm_head.weight in the file, tie_word_embeddings false."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, ffn="gated-gelu", tie_embeddings=False, scale_outputs=False)
    ours, src_ids, tgt_ids = T5(config).eval(), some_ids(), some_ids(2, 5, 1)
    ours.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    logits = theirs(src_ids, decoder_input_ids=tgt_ids).logits
    parity("T5 1.1, own output", "T5ForConditionalGeneration", "exchange", ours(src_ids, tgt_ids), logits, 1e-4)
    path = tmp_path / "config.json"
    released = json.loads(path.read_text())
    del released["scale_decoder_outputs"]  # released files do not have it
    path.write_text(json.dumps(released))
    again = T5.from_pretrained(tmp_path)
    assert again.config == config and torch.equal(again(src_ids, tgt_ids), ours(src_ids, tgt_ids))


@cases
def test_greedy_generation_is_token_for_token_theirs(name, tmp_path) -> None:
    ours, theirs = double_pair(name, tmp_path)
    src_ids = some_ids(3, 8)
    real = torch.tensor([[True] * 8, [True] * 3 + [False] * 5, [True] * 6 + [False] * 2])
    options = dict(do_sample=False, max_new_tokens=21, use_cache=False)  # theirs sizes the cache by encoder layers
    expected = theirs.generate(src_ids, attention_mask=real.long(), **options)[:, 1:]
    answers = ours.generate(src_ids, GREEDY, real)
    assert torch.equal(answers, expected) and answers.shape[1] > 5
    for row, kept, answer in zip(src_ids, real, answers.tolist(), strict=True):  # batched = single
        alone = ours.generate(row[kept][None], GREEDY)[0].tolist()
        assert answer[: len(alone)] == alone and set(answer[len(alone) :]) <= {ours.config.pad_id}


PUBLISHED = {  # our config, the published config in their words, the published number of parameters
    "T5 small": (T5Config(), {}, 60_506_624),
    "T5 base": (
        T5Config(d_model=768, d_ff=3072, n_encoder_layers=12, n_decoder_layers=12, n_heads=12),
        dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        222_903_552,
    ),
    "BART base": (
        BartConfig(),
        dict(d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12)
        | dict(encoder_ffn_dim=3072, decoder_ffn_dim=3072),
        139_420_416,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name, parity) -> None:
    config, options, published = PUBLISHED[name]
    kind = T5 if isinstance(config, T5Config) else Bart
    with shapes_alone():
        ours = kind(config)
        theirs = getattr(transformers, kind.architecture)(getattr(transformers, type(config).__name__)(**options))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == published
    parity(f"{name}, parameters", kind.architecture, "output", count, theirs.num_parameters(), 0)


def test_norm_equals_pytorchs(parity) -> None:
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    norm = T5Norm(24, 1e-3).double()
    norm.weight.data.normal_()
    expected = F.rms_norm(x, (24,), norm.weight, 1e-3)
    parity("T5Norm", "F.rms_norm", "output", norm(x), expected, 1e-10)


# Invariants


@cases
def test_cached_steps_equal_the_whole_pass(name, tmp_path, parity) -> None:
    ours = double_pair(name, tmp_path)[0]
    src_ids, tgt_ids = some_ids(2, 8), some_ids(2, 10, 1)
    memory, memory_mask = ours.encode(src_ids)
    caches = ours.new_caches()
    pieces = [ours.decode(tgt_ids[:, a:b], memory, memory_mask, caches) for a, b in ((0, 4), (4, 5), (5, 10))]
    whole = ours.decode(tgt_ids, memory, memory_mask)
    parity(f"{name}, cached", "one pass", "invariant", torch.cat(pieces, 1), whole, 1e-10)


@cases
def test_padding_changes_nothing_and_the_future_not_the_past(name, tmp_path, parity) -> None:
    ours = double_pair(name, tmp_path)[0]
    src_ids, tgt_ids = some_ids(1, 6), some_ids(1, 7, 1)
    padded = torch.cat([src_ids, torch.full((1, 3), ours.config.pad_id)], dim=1)
    real = torch.tensor([[True] * 6 + [False] * 3])
    alone = ours(src_ids, tgt_ids)
    parity(f"{name}, padding", "one row alone", "invariant", ours(padded, tgt_ids, real), alone, 1e-10)
    if isinstance(ours, T5):  # relative positions allow padding on the left as well
        left = ours(padded.roll(3, 1), tgt_ids, real.roll(3, 1))
        parity("T5, left padding", "one row alone", "invariant", left, alone, 1e-10)
    changed = tgt_ids.clone()
    changed[0, 4] = (changed[0, 4] - 5 + 1) % (VOCAB - 5) + 5
    gap = (ours(src_ids, changed) - alone).abs().amax(dim=(0, 2))
    assert not gap[:4].any() and (gap[4:] > 1e-6).all()
    other = src_ids.clone()
    other[0, 2] = (other[0, 2] - 5 + 1) % (VOCAB - 5) + 5
    assert ((ours(other, tgt_ids) - alone).abs().amax(dim=(0, 2)) > 1e-7).all()


def test_layers_share_one_table_of_positions() -> None:
    for given in ({"num_layers": 3}, {"num_layers": 3, "num_decoder_layers": None}):
        assert T5.config_of(given, {}).n_decoder_layers == 3, "the first files name one depth for both"
    model = T5(TINY)
    for blocks in (model.encoder_blocks, model.decoder_blocks):
        assert blocks[0].self_attn.relative_bias is blocks[1].self_attn.relative_bias
    assert model.encoder_blocks[0].self_attn.relative_bias is not model.decoder_blocks[0].self_attn.relative_bias
    assert model.encoder_blocks[0].self_attn.bidirectional and not model.decoder_blocks[0].self_attn.bidirectional


@cases
@torch.no_grad()
def test_an_empty_source_has_an_answer(name, tmp_path) -> None:
    their_model(name).save_pretrained(tmp_path)
    ours, nothing = CASES[name][0].from_pretrained(tmp_path), some_ids(2, 4)[:, :0]
    answers = ours.generate(nothing, SamplingConfig(3, 0.0))
    start = torch.full((2, 1), ours.config.start_id)
    assert answers.shape[0] == 2 and torch.equal(answers[:, 0], ours(nothing, start)[:, -1].argmax(dim=-1))


@cases
def test_second_names_of_settings_count(name, tmp_path) -> None:
    """Another number of heads may fit the same tensors."""
    their_model(name).save_pretrained(tmp_path)
    path, kind = tmp_path / "config.json", CASES[name][0]
    given, right = json.loads(path.read_text()), kind.from_pretrained(tmp_path).config
    for second, first in kind.aliases.items():
        value = given[first]
        for change in ({second: value}, {second: value, first: value + 1}):
            path.write_text(json.dumps({key: given[key] for key in given if key != first} | change))
            assert kind.from_pretrained(tmp_path).config == right, change


def test_scores_start_with_unit_variance_without_the_root() -> None:
    """Queries that start d_head times smaller in variance do what 1/sqrt(d_head) does elsewhere."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, d_model=256, d_head=64, n_heads=4)
    attn, x = T5(config).encoder_blocks[0].self_attn, torch.randn(4, 50, 256)
    q, k = attn.split_heads(attn.q_proj(x)), attn.split_heads(attn.k_proj(x))
    assert attn.scale == 1.0 and (q @ k.transpose(-2, -1)).std().item() == pytest.approx(1.0, abs=0.15)


def test_a_fresh_model_is_unsure_and_can_learn_one_batch() -> None:
    torch.manual_seed(0)
    model, src_ids, targets = T5(TINY), some_ids(4, 9), some_ids(4, 6, 1)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(src_ids, model.shift_right(targets)).flatten(0, 1), targets.flatten())

    assert loss().item() == pytest.approx(math.log(VOCAB), abs=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.1
    answers = model.eval().generate(src_ids, SamplingConfig(6, 0))
    assert torch.equal(answers, targets)


# Span corruption


def test_span_corruption_by_hand() -> None:
    """The example of Raffel et al. 2020, figure 2: "Thank you for inviting me to your party last week"."""
    text = "Thank you for inviting me to your party last week".split()
    ids = {word: index for index, word in enumerate(text)}
    inputs, targets = corrupt_spans([ids[word] for word in text], [(2, 4), (8, 9)], [90, 91, 92])
    words = {**{index: word for word, index in ids.items()}, 90: "<X>", 91: "<Y>", 92: "<Z>"}
    assert " ".join(words[index] for index in inputs) == "Thank you <X> me to your party <Y> week"
    assert " ".join(words[index] for index in targets) == "<X> for inviting <Y> last <Z>"
    assert restore_spans(inputs, targets, [90, 91, 92]) == list(range(10))
    assert restore_spans(inputs, [91, 8], [90, 91, 92]) == [0, 1, 4, 5, 6, 7, 8, 9]
    assert infill_spans(list(range(10)), [(2, 4), (8, 9)], 99) == [0, 1, 99, 4, 5, 6, 7, 99, 9]


def test_hardly_anything_may_be_left_of_a_text() -> None:
    """More is taken out than stays, in single tokens: there are no more pieces than tokens between them."""
    generator, sentinels = torch.Generator().manual_seed(0), list(range(100, 120))
    for length in range(2, 12):
        spans = draw_spans(length, SpanConfig(0.8, 1.0), generator)
        inputs, targets = corrupt_spans(list(range(length)), spans, sentinels)
        assert restore_spans(inputs, targets, sentinels) == list(range(length))
        n_noise = min(max(round(0.8 * length), 1), length - 1)
        assert len(targets) == n_noise + len(spans) + 1 and len(spans) == min(n_noise, length - n_noise)


@pytest.mark.parametrize("length", [2, 3, 7, 24, 101, 512])
def test_corruption_loses_nothing_and_keeps_its_rates(length) -> None:
    generator, config, sentinels = torch.Generator().manual_seed(length), SpanConfig(), list(range(1000, 1100))
    token_ids = torch.randint(0, 900, (length,), generator=generator).tolist()
    for _ in range(50):
        spans = draw_spans(length, config, generator)
        inputs, targets = corrupt_spans(token_ids, spans, sentinels)
        assert restore_spans(inputs, targets, sentinels) == token_ids
        n_noise = sum(end - start for start, end in spans)
        assert n_noise == min(max(round(0.15 * length), 1), length - 1) and len(spans) == max(1, round(n_noise / 3))
        assert len(inputs) == length - n_noise + len(spans) and len(targets) == n_noise + len(spans) + 1
        assert spans[0][0] > 0 and all(b[0] > a[1] for a, b in zip(spans, spans[1:], strict=False))
    assert draw_spans(length, config, torch.Generator().manual_seed(1)) == draw_spans(
        length, config, torch.Generator().manual_seed(1)
    )


def test_every_division_into_parts_is_equally_likely() -> None:
    """Chi-square over the 20 sums of 7 with 4 positive parts; a division left out would be seen surely."""
    generator = torch.Generator().manual_seed(0)
    counts = collections.Counter(tuple(random_parts(7, 4, generator)) for _ in range(8000))
    assert len(counts) == math.comb(6, 3) and all(sum(parts) == 7 and min(parts) >= 1 for parts in counts)
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_spans(1, SpanConfig(), torch.Generator()), "at least 2 tokens, .* got 1"),
        (lambda: corrupt_spans([1, 2], [(1, 2)], [9]), "1 spans need 2 sentinels, got 1"),
        (lambda: corrupt_spans([1, 9], [(1, 2)], [9, 8]), "the text contains the sentinel 9"),
        (
            lambda: corrupt_spans([1, 2, 3], [(0, 1), (1, 2)], [9, 8, 7]),
            r"span \(1, 2\) must lie in 0..3, after and apart",
        ),
        (lambda: corrupt_spans([1, 2], [(1, 1)], [9, 8]), r"span \(1, 1\) must lie in 0..2"),
        (lambda: corrupt_spans([1, 2], [(1, 3)], [9, 8]), r"span \(1, 3\) must lie in 0..2"),
        (lambda: SpanConfig(noise_share=1), "noise_share must be finite and > 0 and < 1, got 1"),
        (lambda: SpanConfig(mean_span=0.5), "mean_span must be finite and >= 1, got 0.5"),
        (lambda: T5Config(ffn="swiglu"), "unknown ffn 'swiglu'; choose from relu, gated-gelu"),
        (lambda: T5Config(n_buckets=3), "n_buckets must be finite and >= 4, got 3"),
        (lambda: T5Config(n_buckets=64, max_distance=32), "max_distance must be finite and >= 64"),
        (lambda: corrupt_spans([1, 2, 3], [(0, 1)], [9, 9]), r"a sentinel of its own, got \[9, 9\]"),
        (lambda: T5(TINY)(some_ids()[0], some_ids()), "token ids must have 2 axes"),
        (lambda: T5(TINY)(some_ids() + VOCAB, some_ids()), "token id .* >= vocab_size 67"),
        (lambda: T5(TINY)(some_ids(), some_ids() + VOCAB), "token id .* >= vocab_size 67"),
        (lambda: T5(TINY)(some_ids(), some_ids(), torch.ones(2, 9)), "real must be bool"),
        (
            lambda: Bart(BartConfig(VOCAB, 8, 24, 1, 1, 4, 44))(some_ids(), some_ids(2, 4)),
            "length 9 exceeds max_seq_len 8",
        ),
        (
            lambda: Bart(BartConfig(VOCAB, 8, 24, 1, 1, 4, 44))(some_ids(2, 4), some_ids()),
            "length 9 exceeds max_seq_len 8",
        ),
    ],
)
def test_bad_calls_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bart_loads_from_the_bare_model_that_was_released(tmp_path) -> None:
    """facebook/bart-base: no prefix before the names, copies of the embedding, no bias of the logits."""
    from safetensors.torch import load_file, save_file

    theirs = their_model("BART")
    theirs.final_logits_bias.zero_()
    theirs.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    assert "final_logits_bias" not in tensors and not any(name.startswith("model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, src_ids, tgt_ids = Bart.from_pretrained(tmp_path), some_ids(), some_ids(2, 5, 1)
    logits = theirs(input_ids=src_ids, decoder_input_ids=tgt_ids).logits
    assert largest_difference(ours(src_ids, tgt_ids), logits) < 1e-5
    tensors["encoder.embed_tokens.weight"] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.encoder.embed_tokens.weight differs from model.shared.weight"):
        Bart.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("T5", {"model_type": "mt5"}, "model_type 'mt5', expected 't5'"),
        ("T5", {"feed_forward_proj": "gated-silu"}, "unknown ffn 'gated-silu'"),
        ("T5", {"num_layers": 3}, "missing encoder.block.2.layer.0.layer_norm.weight"),
        ("T5", {"d_kv": 11}, r"has shape \(40, 24\), expected \(44, 24\)"),
        ("BART", {"decoder_ffn_dim": 45}, "encoder_ffn_dim=44 but decoder_ffn_dim=45; they must agree"),
        ("BART", {"encoder_ffn_dim": None}, "encoder_ffn_dim=None but decoder_ffn_dim=44; they must agree"),
        ("BART", {"scale_embedding": True}, "scale_embedding=True"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, name, change, message) -> None:
    their_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as refused:
        CASES[name][0].from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@cases
def test_shape_comments_hold(name, tmp_path, checked_shapes) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = CASES[name][0].from_pretrained(tmp_path)
    with checked_shapes(topic) as checked:
        ours(some_ids(), ours.shift_right(some_ids(2, 5, 1)), torch.tensor([[True] * 9, [True] * 5 + [False] * 4]))
        ours.generate(some_ids(), SamplingConfig(3, 0))
    assert len(checked) >= 10
