"""Topic 08: GPT-2 against Hugging Face's, in outputs, gradients, files and generation; and the folders themselves."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from scipy import stats
from torch.nn import functional as F
from transformers import GPT2Config as TheirConfig
from transformers import (
    GPT2LMHeadModel,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import gpt2 as topic
from gpt2 import GPT2, GPT2Config, SamplingConfig, TanhFeedForward, extend, keep_likely, left_padded
from huggingface_folders import read_config, read_weights
from optimizers import shapes_alone
from transformer_architecture import GPT2_SMALL, transformer_parameters
from workbench import largest_difference

VOCAB = 67
TINY = GPT2Config(VOCAB, 37, 24, 3, 4, 44, dropout=0.0, bos_id=1, eos_id=2, pad_id=0)
GREEDY = SamplingConfig(temperature=0)


def their_model(**options) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    sizes = dict(vocab_size=VOCAB, n_positions=37, n_embd=24, n_layer=3, n_head=4, n_inner=44)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    theirs = GPT2LMHeadModel(TheirConfig(**sizes, **ids, **options)).eval()
    for parameter in theirs.parameters():  # biases start at 0 and norms at 1, which would hide a swapped name
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[GPT2, GPT2LMHeadModel]:
    """The same random weights in both libraries, through a folder that theirs saved, in float64."""
    theirs, folder = their_model(), tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return GPT2.from_pretrained(folder).double(), theirs.double()


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def with_gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def in_file_names(model: GPT2, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our gradients under the names, and in the shapes, of the files."""
    found = {}
    for entry in model.layout(model.config).tensors:
        joint = torch.cat([ours[name] for name in entry.parts])
        found[entry.key] = joint.t() if entry.transposed else joint
    return found


# Against Hugging Face


def test_logits_loss_and_gradients_equal_theirs(pair, parity) -> None:
    ours, theirs = pair
    token_ids = some_ids()
    logits, theirs_out = ours(token_ids), theirs(token_ids, labels=token_ids)
    parity("GPT-2", "GPT2LMHeadModel", "output", logits, theirs_out.logits, 1e-10)
    parity("GPT-2", "GPT2LMHeadModel", "output", next_token_loss(logits, token_ids), theirs_out.loss, 1e-6)
    mine = in_file_names(ours, with_gradients(ours, next_token_loss(logits, token_ids)))
    other = with_gradients(theirs, next_token_loss(theirs_out.logits, token_ids))  # their own loss is in float32
    assert set(mine) == set(other)
    parity("GPT-2", "GPT2LMHeadModel", "gradient", mine, other, 1e-10)


def test_their_folder_loads_and_ours_loads_in_their_library(tmp_path, parity) -> None:
    theirs, token_ids = their_model(), some_ids(3, 11)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2.from_pretrained(tmp_path / "theirs")
    assert ours.config == dataclasses.replace(TINY, dropout=0.1) and not ours.training
    parity("GPT-2", "GPT2LMHeadModel", "exchange", ours(token_ids), theirs(token_ids).logits, 1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    parity("GPT-2", "GPT2LMHeadModel", "exchange", ours(token_ids), again(token_ids).logits, 1e-4)
    assert {key: value.shape for key, value in read_weights(tmp_path / "ours").items()} == {
        key: value.shape for key, value in read_weights(tmp_path / "theirs").items()
    }  # the tied lm_head.weight is in neither
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older readers refuse a file without it
    assert again.config.n_inner == 44 and again.generation_config.eos_token_id == 2
    round_trip = GPT2.from_pretrained(tmp_path / "ours")
    assert largest_difference(dict(round_trip.named_parameters()), dict(ours.named_parameters())) == 0


def test_shards_old_names_and_bare_models_load_alike(tmp_path) -> None:
    from safetensors.torch import save_file

    theirs, token_ids = their_model(), some_ids()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = theirs(token_ids).logits
    assert largest_difference(GPT2.from_pretrained(tmp_path / "shards")(token_ids), expected) < 1e-4
    bare = tmp_path / "bare"
    theirs.transformer.save_pretrained(bare)  # the published "gpt2" is such a file: no prefix, and constant masks
    tensors = read_weights(bare) | {"h.0.attn.bias": torch.ones(1, 1, 37, 37), "h.1.attn.masked_bias": torch.zeros(())}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    assert "wte.weight" in tensors
    assert largest_difference(GPT2.from_pretrained(bare)(token_ids), expected) < 1e-4


@pytest.mark.parametrize(("sizes", "published"), [((768, 12, 12), 124_439_808), ((1024, 24, 16), 354_823_168)])
def test_published_parameter_counts(sizes, published, parity) -> None:
    d_model, n_layers, n_heads = sizes
    with shapes_alone():
        ours = GPT2(GPT2Config(d_model=d_model, n_layers=n_layers, n_heads=n_heads))
        theirs = GPT2LMHeadModel(TheirConfig(n_embd=d_model, n_layer=n_layers, n_head=n_heads))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == published
    parity("GPT-2, parameters", "GPT2LMHeadModel", "output", count, theirs.num_parameters(), 0)
    if d_model == 768:
        assert transformer_parameters(GPT2_SMALL)["total"] == published


def test_padding_on_either_side_changes_nothing(pair, parity) -> None:
    ours, theirs = pair
    rows = [some_ids(1, 5, 1)[0].tolist(), some_ids(1, 8, 2)[0].tolist()]
    token_ids, real = left_padded(rows, 0)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(token_ids, attention_mask=real.long(), position_ids=positions).logits
    logits = ours(token_ids, real)
    parity("GPT-2, left padding", "GPT2LMHeadModel", "output", logits[real], expected[real], 1e-10)
    right_ids, right_real = token_ids.clone(), real.clone()
    right_ids[0], right_real[0] = torch.tensor(rows[0] + [0] * 3), torch.tensor([True] * 5 + [False] * 3)
    right = ours(right_ids, right_real)
    for index, row in enumerate(rows):
        alone = ours(torch.tensor([row]))[0]
        parity("GPT-2, left padding", "one row alone", "invariant", logits[index][real[index]], alone, 1e-10)
        parity("GPT-2, right padding", "one row alone", "invariant", right[index][right_real[index]], alone, 1e-10)


def test_greedy_generation_is_token_for_token_theirs(pair) -> None:
    ours, theirs = pair
    rows = [some_ids(1, length, length)[0].tolist() for length in (3, 7, 5)]
    token_ids, real = left_padded(rows, 0)
    new_ids = ours.generate(token_ids, dataclasses.replace(GREEDY, max_new_tokens=23), real)
    options = dict(do_sample=False, max_new_tokens=23, pad_token_id=0)
    expected = theirs.generate(token_ids, attention_mask=real.long(), **options)[:, token_ids.shape[1] :]
    assert torch.equal(new_ids, expected)
    for row, answer in zip(rows, new_ids.tolist(), strict=True):  # batched = single
        alone = ours.generate(torch.tensor([row]), dataclasses.replace(GREEDY, max_new_tokens=23))[0].tolist()
        assert answer[: len(alone)] == alone and set(answer[len(alone) :]) <= {0}


def test_generation_stops_at_the_end_and_fills_the_row(pair) -> None:
    script = torch.tensor([[5, 2, 9, 9], [7, 7, 2, 9]])
    steps = iter(script.t())

    def next_logits(new_ids: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return F.one_hot(next(steps), VOCAB).double()

    answer = extend(next_logits, script[:, :1], GREEDY, eos_id=2, filler_id=0)
    assert answer.tolist() == [[5, 2, 0], [7, 7, 2]]
    assert pair[0].generate(some_ids(), dataclasses.replace(GREEDY, max_new_tokens=0)).shape == (2, 0)


# Invariants


def test_cached_steps_equal_the_whole_pass(pair, parity) -> None:
    ours, token_ids = pair[0], some_ids(2, 10)
    real = torch.ones_like(token_ids, dtype=torch.bool)
    real[0, :3] = False
    for seen in (None, real):
        caches = ours.new_caches()
        pieces = [
            ours(token_ids[:, start:stop], None if seen is None else seen[:, :stop], caches)
            for start, stop in ((0, 4), (4, 5), (5, 10))
        ]
        whole = ours(token_ids, seen)
        parity("GPT-2, cached", "one pass", "invariant", torch.cat(pieces, 1)[real], whole[real], 1e-10)


def test_the_future_cannot_change_the_past(pair) -> None:
    ours, token_ids = pair[0], some_ids(2, 9)
    changed = token_ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = ours(token_ids), ours(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after).abs().amax(dim=(0, 2))[5:] > 1e-6).all()


def test_a_fresh_model_knows_nothing_and_can_learn_one_batch() -> None:
    torch.manual_seed(0)
    model, token_ids = GPT2(TINY), some_ids(4, 12)
    model.eval()

    def loss() -> torch.Tensor:
        return next_token_loss(model(token_ids), token_ids)

    assert loss().item() == pytest.approx(math.log(VOCAB), abs=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.1


def test_residual_projections_start_smaller_so_that_the_stream_keeps_its_variance() -> None:
    model = GPT2(dataclasses.replace(TINY, d_model=96, d_ff=400, n_layers=8))
    for block in model.encoder.blocks:
        assert block.ffn.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert block.ffn.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("proj.bias"))


def test_dropout_is_active_in_training_alone() -> None:
    model, token_ids = GPT2(dataclasses.replace(TINY, dropout=0.3)), some_ids()
    assert not torch.equal(model(token_ids), model(token_ids))
    model.eval()
    assert torch.equal(model(token_ids), model(token_ids))


def test_tanh_gelu_is_close_to_gelu_but_not_equal() -> None:
    layer = TanhFeedForward(1, 1)
    for parameter, value in zip(layer.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
        parameter.data.fill_(value)
    x = torch.linspace(-6, 6, 2001)[:, None]
    gap = (layer(x) - F.gelu(x)).abs().max().item()
    assert 4e-4 < gap < 5e-4
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert largest_difference(layer(x), tanh) < 1e-6


# Sampling


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.83), (7, 1.0), (9, 0.6), (1, 1.0), (0, 1e-6), (500, 1.0)])
def test_the_kept_tokens_are_theirs(top_k, top_p) -> None:
    logits = 3 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(5, 1, dtype=torch.long), logits)
    assert largest_difference(keep_likely(logits / 0.7, top_k, top_p), expected) < 1e-12


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {top_p: (keep_likely(logits, 0, top_p) > -math.inf)[0].tolist() for top_p in (0.5, 0.6, 0.81, 0.96)}
    assert kept[0.6] == [True, True, False, False] and kept[0.81] == [True, True, True, False]
    assert kept[0.5] == [True, False, False, False] and all(kept[0.96])


def test_samples_follow_the_renormalised_distribution() -> None:
    """Chi-square on 20,000 draws: a shift of 2 points of probability would be seen almost surely."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    sampling = SamplingConfig(1, 0.8, 4, 0.95)
    kept = keep_likely(logits[None] / 0.8, 4, 0.95).softmax(dim=-1)[0]
    n, generator = 20_000, torch.Generator().manual_seed(5)
    rows = torch.zeros(n, 1, dtype=torch.long)
    drawn = extend(lambda new_ids: logits.expand(n, -1), rows, sampling, None, 0, generator)
    counts = torch.bincount(drawn[:, 0], minlength=5).double()
    assert not counts[kept == 0].any() and (kept > 0).sum() == 3
    expected = kept[kept > 0].double()
    assert stats.chisquare(counts[kept > 0], n * expected / expected.sum()).pvalue > 0.001
    again = extend(lambda new_ids: logits.expand(n, -1), rows, sampling, None, 0, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert', expected 'gpt2'"),
        ({"n_layer": "3"}, "n_layer='3'; it must be of type int"),
        ({"n_layer": True}, "n_layer=True; it must be of type int"),
        ({"n_positions": 10**10}, "has n_positions=10000000000, above 1,000,000,000; it is damaged"),
        ({"task_specific_params": {"n": 10**24}}, "has n=a number of 25 digits, above"),
        ({"n_head": 5}, "d_model=24 is not divisible by n_heads=5"),
        ({"activation_function": "relu"}, "activation_function='relu'; this model supports 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"vocab_size": 66}, r"transformer.wte.weight has shape \(67, 24\), expected \(66, 24\)"),
        ({"n_layer": 4}, "missing transformer.h.3.ln_1.weight, .* and 6 more"),
        ({"n_layer": 2}, "unexpected transformer.h.2.attn.c_attn.bias, .* and 6 more"),
        ({"n_layer": 10**9}, r"config.json asks for \{'n_layers': 1000000000\}; at most 10,000 can be right"),
        ({"vocab_size": 10**9}, r"wte.weight has shape \(67, 24\), expected \(1000000000, 24\)"),  # no memory taken
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, change, message) -> None:
    their_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as refused:
        GPT2.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_refused_load_changes_no_parameter(tmp_path) -> None:
    from huggingface_folders import load_weights

    torch.manual_seed(0)
    model = GPT2(TINY)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    their_model().save_pretrained(tmp_path)
    tensors = read_weights(tmp_path)
    for spoil in (
        lambda: tensors.pop("transformer.ln_f.bias"),
        lambda: tensors.update({"transformer.ln_f.bias": torch.zeros(25)}),
        lambda: tensors.update({"transformer.ln_f.bias": torch.zeros(24), "lm_head.weight": torch.zeros(VOCAB, 24)}),
    ):
        spoil()
        with pytest.raises(ValueError, match="ln_f.bias|lm_head.weight differs from transformer.wte.weight"):
            load_weights(model, tensors, GPT2.layout(TINY))
        assert largest_difference(before, dict(model.named_parameters())) == 0
    load_weights(model, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, GPT2.layout(TINY))
    assert torch.equal(model.token_emb.weight, tensors["transformer.wte.weight"])


def test_malformed_folders_are_named(tmp_path) -> None:
    def refused(match: str, path=tmp_path) -> None:
        with pytest.raises(ValueError, match=match) as error:
            GPT2.from_pretrained(path)
        assert "\n" not in str(error.value)

    refused("nowhere is not a folder", tmp_path / "nowhere")
    refused("has no config.json")
    config, weights, index = (tmp_path / name for name in ("config.json", "model.safetensors", "x.index.json"))
    config.write_text("{")
    refused("config.json is not JSON")
    config.write_text("[" * 100_000)  # deeper than any reader goes
    refused("config.json is not JSON")
    config.write_text("[1]")
    refused("must hold a JSON object, got list")
    config.unlink()
    config.mkdir()
    refused("config.json cannot be read: Is a directory")
    config.rmdir()
    their_model().save_pretrained(tmp_path)
    data = weights.read_bytes()
    for broken in (b"", data[:5], data[: len(data) // 2], b"\xff" * 64):
        weights.write_bytes(broken)
        refused("model.safetensors is not a whole safetensors file")
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused("neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin may run code")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": 3}')
    refused("has no weight_map")
    index.write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    refused("'../outside.safetensors', which is not a safetensors file of this folder")
    index.write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    refused("'pytorch_model.bin', which is not a safetensors file of this folder")
    index.write_text('{"weight_map": {"a": "lost.safetensors"}}')
    refused("lost.safetensors does not exist")
    (tmp_path / "part.safetensors").write_bytes(data)
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    refused("the index promises a, which no file holds")


def test_bad_calls_are_named(pair, tmp_path) -> None:
    ours, token_ids = pair[0], some_ids()
    for call, message in (
        (lambda: ours(token_ids + VOCAB), r"token id \d+ >= vocab_size 67 at \[0, 0\]"),
        (lambda: ours(some_ids(1, 38)), "sequence length 38 exceeds max_seq_len 37"),
        (lambda: ours.generate(token_ids, dataclasses.replace(GREEDY, max_new_tokens=29)), "length 38 exceeds"),
        (lambda: ours.generate(token_ids[:, :0], GREEDY), "at least one token"),
        (lambda: ours(token_ids, torch.ones(2, 8, dtype=torch.bool)), r"shape .* = \(2, 9\)"),
        (lambda: ours(token_ids, torch.ones(2, 9)), "real must be bool"),
        (lambda: ours.generate(token_ids, GREEDY, torch.zeros(2, 9, dtype=torch.bool)), "must end with a token"),
        (
            lambda: ours.generate(token_ids, GREEDY, torch.tensor([[True] * 9, [True] * 8 + [False]])),
            "must end with a token",
        ),
        (lambda: ours(token_ids[0]), "token ids must have 2 axes"),
        (lambda: keep_likely(torch.zeros(1, 4), -1), r"top_k must be >= 0.* got -1 and 1.0"),
        (lambda: keep_likely(torch.zeros(1, 4), 0, 0.0), r"top_p in \(0, 1\], got 0 and 0.0"),
        (lambda: left_padded([[1], []], 0), "every prompt needs at least one token"),
        (lambda: SamplingConfig(temperature=-1), "temperature must be finite and >= 0, got -1"),
        (lambda: SamplingConfig(temperature=math.nan), "temperature must be finite"),
        (lambda: SamplingConfig(top_p=1.5), "top_p must be finite and > 0 and <= 1, got 1.5"),
        (lambda: SamplingConfig(top_p=0.0), "top_p must be finite and > 0 and <= 1, got 0.0"),
        (lambda: SamplingConfig(top_k=-1), "top_k must be finite and >= 0, got -1"),
        (lambda: GPT2Config(n_heads=5), "d_model=768 is not divisible by n_heads=5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: ours([[1, 2]]), lambda: ours.generate([[1, 2]], GREEDY)):
        with pytest.raises(TypeError, match=r"must be a tensor \(batch, seq\), got a list"):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; choose another folder"):
        ours.save_pretrained(tmp_path / "file")


def test_a_folder_may_say_a_setting_by_its_second_name_and_ids_in_generation_config(tmp_path) -> None:
    ours = GPT2(GPT2Config(67, 37, 24, 2, 2, 20, eos_id=5))
    ours.save_pretrained(tmp_path)
    path, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    given = json.loads(path.read_text())
    n_heads = given.pop("n_head")
    path.write_text(json.dumps(given | {"num_attention_heads": n_heads}))  # 12 heads, our default, fit the tensors too
    generation.write_text(json.dumps({"eos_token_id": 9, "pad_token_id": 4, "bos_token_id": None}))
    found = GPT2.from_pretrained(tmp_path)
    assert found.config == dataclasses.replace(ours.config, eos_id=9, pad_id=4)
    assert torch.equal(found(some_ids()), ours.eval()(some_ids()))
    generation.write_text(json.dumps({"eos_token_id": [9, 3]}))
    with pytest.raises(
        ValueError, match=r"generation_config.json has eos_token_id=\[9, 3\]; this model knows one such"
    ):
        GPT2.from_pretrained(tmp_path)


def test_shape_comments_hold(pair, checked_shapes) -> None:
    ours = pair[0]
    rows, real = left_padded([[5, 6, 7, 8], [9, 10]], 0)
    with checked_shapes(topic) as checked:
        ours(some_ids())
        ours.generate(rows, SamplingConfig(3, 0.9, 11, 0.9), real, torch.Generator().manual_seed(0))
    assert len(checked) >= 18


def test_the_config_of_a_folder_is_read_whatever_its_model(tmp_path) -> None:
    their_model().save_pretrained(tmp_path)
    assert read_config(tmp_path)["model_type"] == "gpt2"
