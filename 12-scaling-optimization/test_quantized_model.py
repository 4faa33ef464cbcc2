"""Proofs of quantised models: bytes on disk, folders that come back, transformers' view, and what rounding costs."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from channel_scaling import smooth
from course_model import load_course_model, row_nats
from gpt2 import SamplingConfig
from gptq import GPTQConfig, block_linears, calibration_batches, gptq_model, input_statistics
from llm_config import ExpertConfig, ModelConfig
from modern_llm_architectures import CausalLM
from quantized_layers import Int8Linear, KVFormat, PackedLinear
from quantized_model import (
    METHODS,
    WHOLE_PRODUCTS,
    Exam,
    QuantisedLM,
    QuantizeConfig,
    Recipe,
    float_bytes,
    load_folder,
    quantize,
    quantize_model,
    train_rounded,
)
from tiny_world import World
from training_transformers import TrainConfig
from weight_quantization import QuantFormat, quantise, stored_bytes
from workbench import RunConfig, seed_everything

SIZES = ModelConfig(vocab_size=60, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_head=4, d_ff=40, max_seq_len=64)
IDS = torch.arange(2, 36).reshape(2, 17)
BATCHES = [(IDS, torch.ones_like(IDS, dtype=torch.bool))]


def tiny(tied: bool = True) -> CausalLM:
    seed_everything(0)
    model = CausalLM(ModelConfig(**{**vars(SIZES), "tie_embeddings": tied})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def recipe_of(method: str, **changes) -> Recipe:
    fmt = QuantFormat(8, 0, "absmax") if method in WHOLE_PRODUCTS else QuantFormat(4, 8)
    return Recipe(method, **{"fmt": fmt, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_biases_stay(method, tmp_path, parity) -> None:
    """Against the float model, which knows them, and transformers' Llama for the dequantised folder."""
    seed_everything(0)
    model = CausalLM(dataclasses.replace(SIZES, use_bias=True, tie_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if name.endswith("bias") else 0.2) * torch.randn_like(parameter))
    fmt = QuantFormat(8, 0, "absmax") if method in WHOLE_PRODUCTS else QuantFormat(8, 8)
    small = quantize_model(model, Recipe(method, fmt, 0), BATCHES)
    assert (small(IDS) - model(IDS)).abs().max() < 0.05 * model(IDS).abs().max()
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(load_folder(tmp_path / "small")(IDS), small(IDS))
    if method == "awq":  # which scales the values' biases too
        small.dequantised().save_pretrained(tmp_path / "float")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
        parity("QuantisedLM with biases", "transformers", "exchange", small(IDS), theirs(input_ids=IDS).logits, 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_folder_comes_back_bit_for_bit(method, tied, tmp_path, parity) -> None:
    model = tiny(tied)
    before = copy.deepcopy(model.state_dict())
    small = quantize_model(model, recipe_of(method), BATCHES)
    small.save_pretrained(tmp_path)
    again = load_folder(tmp_path)
    assert type(again) is QuantisedLM and again.recipe == small.recipe and not again.training
    parity(f"QuantisedLM, {method}", "its own folder", "exchange", again(IDS), small(IDS), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    kind = Int8Linear if method in WHOLE_PRODUCTS else PackedLinear
    assert all(type(small.get_submodule(name)) is kind for name in block_linears(model))


@pytest.mark.parametrize(
    "fmt", [QuantFormat(4, 8), QuantFormat(3, 16, "absmax"), QuantFormat(2, 0), QuantFormat(4, -1)]
)
@pytest.mark.parametrize("embedding_bits", [0, 4])
def test_bytes_on_disk_equal_the_formula(fmt, embedding_bits, tmp_path) -> None:
    """Codes, scales and zero points of every matrix; embedding; norms. What is over is safetensors' header."""
    recipe = Recipe("rtn", fmt, embedding_bits)
    small = quantize_model(tiny(), recipe)
    small.save_pretrained(tmp_path)
    linears = block_linears(tiny()).values()
    expected = sum(stored_bytes(layer.out_features, layer.in_features, fmt) for layer in linears)
    expected += stored_bytes(60, 24, recipe.embedding_fmt) if embedding_bits else 4 * 60 * 24
    expected += 4 * 5 * 24  # two norms in each of two blocks and the last
    assert small.n_bytes == expected
    path = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + expected
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == expected


def test_transformers_computes_the_same_from_the_dequantised_folder(tmp_path, parity) -> None:
    small = quantize_model(tiny(), recipe_of("awq+gptq"), BATCHES)
    small.dequantised().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        parity("QuantisedLM.dequantised", "transformers' Llama", "exchange", small(IDS), theirs(IDS).logits, 1e-4)


def test_generation_uses_the_codes_and_the_quantised_cache(parity) -> None:
    small = quantize_model(tiny(), recipe_of("llm.int8"), BATCHES)
    made = small.generate(IDS[:, :5], SamplingConfig(8, temperature=0.0))
    ids = IDS[:, :5]
    for _ in range(8):
        ids = torch.cat([ids, small(ids)[:, -1:].argmax(-1)], dim=1)
    parity("QuantisedLM.generate", "no cache", "invariant", made, ids[:, 5:], 0)
    small.kv_format = KVFormat(8)
    caches = small.new_caches()
    close = small(IDS, caches)
    assert type(caches[0]).__name__ == "QuantisedKVCache" and len(caches[1]) == 17
    assert 0 < (close - small(IDS)).abs().max() < 0.1 * small(IDS).abs().max()
    assert small.generate(IDS[:, :5], SamplingConfig(4, temperature=0.0)).shape == (2, 4)


def test_padding_on_the_left_changes_nothing(parity) -> None:
    small = quantize_model(tiny(), recipe_of("rtn"))
    alone = small.generate(IDS[:1, :5], SamplingConfig(6, temperature=0.0))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], dim=1)
    real = torch.arange(8)[None] >= 3
    parity(
        "QuantisedLM.generate, padded",
        "unpadded",
        "invariant",
        small.generate(padded, SamplingConfig(6, temperature=0.0), real),
        alone,
        0,
    )


@pytest.mark.parametrize(
    ("fmt", "settings", "n_documents"),  # at 4 bits the difference is 0.001, and 500 documents know it to 0.0004
    [
        (QuantFormat(3, 32), GPTQConfig(), 500),
        (QuantFormat(4, 0), GPTQConfig(0.1, act_order=True), 2000),
        (QuantFormat(3, 0), GPTQConfig(act_order=True), 500),
    ],
    ids=str,
)
def test_gptq_beats_rounding_to_nearest_on_the_course_model(fmt, settings, n_documents) -> None:
    """At 3 and at 4 bits, by more than twice the standard error of the difference on the same documents."""
    model, tokenizer = load_course_model()
    exam = exam_of(n_documents)
    nearest = quantize_model(model, Recipe("rtn", fmt, 0)).dequantised()
    mended = quantize_model(model, Recipe("gptq", fmt, 0), calibration_batches(tokenizer, 96, 0), settings)
    beside = dataclasses.replace(exam, reference=tuple(row_nats(nearest, exam.rows)))
    difference, error = beside.damage(mended.dequantised())
    n_tokens = sum(len(row) - 1 for row in exam.rows)
    added = difference + (sum(beside.reference) - sum(exam.reference)) / n_tokens  # by GPTQ, to the float model's loss
    assert difference + 2 * error < 0 < added + 2 * error, (difference, error)


@functools.cache
def exam_of(n_documents: int) -> Exam:
    model, tokenizer = load_course_model()
    return Exam.of(model, tokenizer, World().documents(n_documents, 11, "validation"))


def test_eight_bits_cost_next_to_nothing_and_a_seventh_of_the_bytes_suffices() -> None:
    model, tokenizer = load_course_model()
    exam = Exam.of(model, tokenizer, World().documents(150, 12, "validation"))
    assert exam.damage(model) == (0.0, 0.0)
    for method in ("rtn", "llm.int8"):
        small = quantize_model(model, Recipe(method, QuantFormat(8, 0, "absmax")))
        assert abs(exam.damage(small)[0]) < 0.002 and float_bytes(model) / small.n_bytes > 3.8
    small = quantize_model(model, Recipe("rtn", QuantFormat(4, 32), 4))
    assert float_bytes(model) / small.n_bytes > 6.5 and exam.damage(small)[0] < 0.02


def test_training_through_rounding_ends_with_the_codes_it_trained() -> None:
    """Twenty steps at 2 bits: the loss falls, and the packed model computes what the trained one did."""
    model, fmt = tiny(), QuantFormat(2, 8)
    config = TrainConfig(max_steps=20, batch_size=2, seq_len=16, learning_rate=3e-3, warmup_steps=0, log_every=1)

    def batches(step: int) -> dict[str, torch.Tensor]:
        return {"inputs": IDS[:, :-1], "targets": IDS[:, 1:]}

    def loss(model: CausalLM) -> float:
        logits = quantize_model(model, Recipe("rtn", fmt, 0))(IDS[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).item()

    trained = train_rounded(model, fmt, batches, config)
    assert loss(trained) < 0.8 * loss(model)
    assert all(type(layer) is torch.nn.Linear for layer in block_linears(trained).values())
    assert not torch.equal(trained.blocks[0].ffn.up_proj.weight, model.blocks[0].ffn.up_proj.weight)


def test_verb_saves_a_folder_and_says_what_it_lost(tmp_path, capsys) -> None:
    config = QuantizeConfig(method="gptq", n_bits=4, act_order=True, n_calibration=16, n_held_out=30)
    quantize(config, RunConfig(out=tmp_path))
    said = capsys.readouterr().out
    assert "times fewer" in said and "what rounding cost: " in said and "saved in" in said
    assert load_folder(tmp_path / "model").recipe == config.recipe()
    assert (tmp_path / "model" / "tokenizer.json").exists()


# Bad input


def test_a_folder_that_does_not_fit_is_refused(tmp_path) -> None:
    small = quantize_model(tiny(), recipe_of("rtn"))
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit CausalLM: missing .*model.layers.0.self_attn.q_proj.weight"):
        CausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.codes"
    wide = {**tensors, key: tensors[key].int()}
    save_file(wide, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{key} has type torch.int32, expected torch.uint8"):
        load_folder(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"do not fit QuantisedLM: missing {key}"):
        load_folder(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    for name, value, reason in (
        ("vocab_size", 10**8, "asks for .* weights, its files hold .* less than one bit each"),
        ("hidden_size", 2**63, "has hidden_size=9223372036854775808, above 1,000,000,000"),
        ("head_dim", 10**40, "has head_dim=a number of 41 digits, above"),
        ("num_hidden_layers", 10**6, "num_hidden_layers=1000000 is above 10,000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(words | {name: value}))
        with pytest.raises(ValueError, match=reason):
            load_folder(tmp_path)
    words["quantization_config"]["n_bit"] = 4
    (tmp_path / "config.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="does not describe a recipe: .*n_bit"):
        load_folder(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no quantization_config of this course; load it with CausalLM"):
        QuantisedLM.from_pretrained(tmp_path)
    assert type(load_folder(tmp_path)) is CausalLM


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("gtpq"), "unknown method 'gtpq'; did you mean 'gptq'?"),
        (lambda: Recipe("llm.int8"), "llm.int8 multiplies int8 by int8: n_bits must be 8, got 4"),
        (lambda: Recipe(embedding_bits=1), "n_bits must be finite and >= 2 and <= 8, got 1"),
        (lambda: QuantizeConfig(n_bits=16), "n_bits must be finite and >= 2 and <= 8, got 16"),
        (lambda: QuantizeConfig(damping=-0.1), "damping must be finite and >= 0, got -0.1"),
        (lambda: QuantizeConfig(n_calibration=0), "n_calibration must be finite and >= 1, got 0"),
        (lambda: quantize_model(tiny(), Recipe("awq")), "awq looks at activations; give batches"),
        (lambda: QuantisedLM(ModelConfig(experts=ExpertConfig()), Recipe()), "no experts"),
        (lambda: GPTQConfig(block_size=0), "block_size must be finite and >= 1, got 0"),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_recipes_numbers_reach_the_layers(tmp_path) -> None:
    """The threshold of llm.int8, SmoothQuant's strength, and GPTQ's settings; a folder keeps the first two."""
    fmt = QuantFormat(8, 0, "absmax")
    for method, wanted in (("llm.int8", 3.0), ("smoothquant", 0.0)):
        quantize_model(tiny(), Recipe(method, fmt, threshold=3.0), BATCHES).save_pretrained(tmp_path)
        layers = [layer for layer in load_folder(tmp_path).modules() if isinstance(layer, Int8Linear)]
        assert len(layers) == 14 and {layer.threshold for layer in layers} == {wanted}
    evened = tiny()
    smooth(evened, input_statistics(evened, BATCHES), 0.8)
    small = quantize_model(tiny(), Recipe("smoothquant", fmt, strength=0.8), BATCHES)
    settings = GPTQConfig(0.02, act_order=True)
    codes = gptq_model(tiny(), BATCHES, QuantFormat(3, 8), settings)
    mended = quantize_model(tiny(), Recipe("gptq", QuantFormat(3, 8)), BATCHES, settings)
    for name, layer in block_linears(evened).items():
        assert torch.equal(small.get_submodule(name).codes, Int8Linear.from_linear(layer).codes), name
        assert torch.equal(mended.get_submodule(name).quantised().codes, codes[name].codes), name
    assert not any(parameter.requires_grad for parameter in mended.parameters())


def test_a_quantised_cache_under_a_window_is_refused() -> None:
    small = quantize_model(CausalLM(dataclasses.replace(SIZES, window_size=8)).eval(), Recipe())
    assert small.new_caches()
    small.kv_format = KVFormat(8)
    with pytest.raises(ValueError, match="this model has a window: leave kv_format None"):
        small.new_caches()


def test_quantising_twice_changes_nothing() -> None:
    """Rounding the dequantised model again gives its codes: the grids are found again."""
    small = quantize_model(tiny(), Recipe("rtn", QuantFormat(4, 8, "absmax"), 0))
    name = "blocks.0.ffn.up_proj"
    again = quantise(small.dequantised().get_submodule(name).weight.detach(), QuantFormat(4, 8, "absmax"))
    assert torch.equal(again.codes, small.get_submodule(name).quantised().codes)
