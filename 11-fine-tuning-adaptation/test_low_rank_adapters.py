"""Topic 11: LoRA, rsLoRA and DoRA equal to PEFT in outputs, gradients, training, merged weights and files."""

import json
import math
import warnings
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import low_rank_adapters
from llm_config import ExpertConfig
from low_rank_adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SETTINGS,
    UNSUPPORTED,
    DoRALinear,
    LoraConfig,
    LoRALinear,
    adapted_layers,
    adapters_off,
    add_adapters,
    base_sha256,
    file_names,
    fold,
    load_adapter,
    merge,
    save_adapter,
    train_rows,
    unmerge,
)
from modern_llm_architectures import CausalLM, ModelConfig
from nf4 import quantize_model

TINY = ModelConfig(
    vocab_size=50,
    d_model=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ff=40,
    max_seq_len=32,
    tie_embeddings=True,
)
KINDS = {
    "LoRA": LoraConfig(lora_rank=3, lora_alpha=7),
    "rsLoRA": LoraConfig(lora_rank=5, lora_alpha=7, rank_stabilised=True),
    "DoRA": LoraConfig(lora_rank=3, lora_alpha=7, dora=True),
    "LoRA, two layers": LoraConfig(lora_rank=4, lora_alpha=2, target_modules="q_proj, down_proj"),
}


def tiny(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(TINY)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters away from their start, where B = 0 hides half of what could be wrong."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def ids(batch: int = 3, seq: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def saved_base(folder: Path) -> Path:
    tiny().save_pretrained(folder / "base")
    return folder / "base"


def pair(config: LoraConfig, folder: Path, dtype: torch.dtype = torch.float64) -> tuple[CausalLM, PeftModel]:
    """The same base with the same adapter values: ours, and PEFT's made by PEFT itself."""
    base = saved_base(folder)
    ours = CausalLM.from_pretrained(base).to(dtype)
    add_adapters(ours, config)
    shaken(ours)
    names = file_names(ours)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    theirs = get_peft_model(
        theirs,
        TheirConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=sorted({names[name].rpartition(".")[2] for name in adapted_layers(ours)}),
            use_rslora=config.rank_stabilised,
            use_dora=config.dora,
        ),
        autocast_adapter_dtype=False,
    )
    for name, layer in adapted_layers(ours).items():
        for part, tensor in low_rank_adapters.file_parts(layer).items():
            their_part(theirs, names[name], part).data.copy_(tensor.detach())
    return ours, theirs


def their_part(model: PeftModel, name: str, part: str) -> torch.Tensor:
    layer = model.base_model.model.get_submodule(name)
    if part == "lora_magnitude_vector":
        return layer.lora_magnitude_vector["default"].weight
    return getattr(layer, part.partition(".")[0])["default"].weight


def gradients(ours: CausalLM, theirs: PeftModel) -> tuple[dict, dict]:
    names, mine, yours = file_names(ours), {}, {}
    for name, layer in adapted_layers(ours).items():
        for part, tensor in low_rank_adapters.file_parts(layer).items():
            mine[name, part] = tensor.grad
            yours[name, part] = their_part(theirs, names[name], part).grad
    return {str(key): value for key, value in mine.items()}, {str(key): value for key, value in yours.items()}


def loss_of(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_equal_peft(name: str, tmp_path, parity) -> None:
    ours, theirs = pair(KINDS[name], tmp_path)
    logits, wanted = ours(ids()), theirs(input_ids=ids()).logits
    assert (logits - CausalLM.from_pretrained(tmp_path / "base").double()(ids())).abs().max() > 0.01
    parity(name, "PEFT", "output", logits, wanted, 1e-10)
    loss_of(logits, ids()).backward()
    loss_of(wanted, ids()).backward()
    parity(name, "PEFT", "gradient", *gradients(ours, theirs), 1e-10)


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_float32_stays_close_to_peft(name: str, tmp_path, parity) -> None:
    ours, theirs = pair(KINDS[name], tmp_path, torch.float32)
    layer, their_layer = ours.blocks[0].ffn.up_proj, theirs.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(5, TINY.d_model, generator=torch.Generator().manual_seed(2))
    parity(f"{name} layer, float32", "PEFT", "output", layer(x), their_layer(x), 1e-6)


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA"])
def test_a_training_of_eight_steps_equals_peft(name: str, tmp_path, parity) -> None:
    ours, theirs = pair(KINDS[name], tmp_path)
    losses: list[list[float]] = [[], []]
    for model, found in ((ours, losses[0]), (theirs, losses[1])):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        for step in range(8):
            token_ids = ids(seed=step)
            logits = model(token_ids) if model is ours else model(input_ids=token_ids).logits
            loss = loss_of(logits, token_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    parity(name, "PEFT", "trajectory", losses[0], losses[1], 1e-10)


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA"])
def test_merged_and_unmerged_weights_equal_peft(name: str, tmp_path, parity) -> None:
    ours, theirs = pair(KINDS[name], tmp_path)
    names, before = file_names(ours), ours(ids())
    merge(ours)
    theirs.merge_adapter()
    assert torch.allclose(ours(ids()), before, atol=1e-10)
    mine = {name: layer.base.weight for name, layer in adapted_layers(ours).items()}
    yours = {n: theirs.base_model.model.get_submodule(names[n]).base_layer.weight for n in mine}
    parity(f"{name}, merged weights", "PEFT", "output", mine, yours, 1e-10)
    mine, yours = ({key: tensor.detach().clone() for key, tensor in part.items()} for part in (mine, yours))
    unmerge(ours)
    theirs.unmerge_adapter()
    base = CausalLM.from_pretrained(tmp_path / "base").double()
    kept = {name: layer.base.weight for name, layer in adapted_layers(ours).items()}
    parity(
        f"{name}, unmerged weights",
        "the base",
        "invariant",
        kept,
        {n: base.get_submodule(n).weight for n in kept},
        1e-10,
    )
    assert all((mine[n] - kept[n]).abs().max() > 1e-3 for n in kept)


@pytest.mark.parametrize("name", KINDS)
def test_our_folder_is_loaded_by_peft_without_a_warning(name: str, tmp_path, parity) -> None:
    ours, _ = pair(KINDS[name], tmp_path, torch.float32)
    save_adapter(ours, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what PEFT would say about a key that it does not know
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    parity(f"{name}, our adapter folder", "PeftModel", "exchange", theirs(input_ids=ids()).logits, ours(ids()), 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_pefts_folder_is_loaded_by_us_and_comes_back(name: str, tmp_path, parity) -> None:
    _, theirs = pair(KINDS[name], tmp_path, torch.float32)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = CausalLM.from_pretrained(tmp_path / "base")
    chosen = load_adapter(ours, tmp_path / "adapter")
    assert set(chosen) == set(adapted_layers(ours))
    parity(f"{name}, PEFT's adapter folder", "PEFT", "exchange", ours(ids()), theirs(input_ids=ids()).logits, 1e-5)
    save_adapter(ours, tmp_path / "again")
    again = CausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(ids()), ours(ids()))


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused_and_others_are_not(start: str, tmp_path, parity) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path), dtype=torch.float32)
    settings = TheirConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=start)
    theirs = shaken(get_peft_model(base, settings))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = CausalLM.from_pretrained(tmp_path / "base")
    if start != "gaussian":
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*merge it with PEFT"):
            load_adapter(loaded, tmp_path / "theirs")
        return
    load_adapter(loaded, tmp_path / "theirs")
    parity(f"PEFT's folder, {start}", "PEFT", "exchange", loaded(ids()), theirs(input_ids=ids()).logits, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "adapter"),
    [
        ({"tie_embeddings": False}, LoraConfig(lora_rank=2, target_modules="q_proj,lm_head")),
        ({"qk_norm": True, "n_layers": 1}, replace(KINDS["DoRA"], lora_rank=1)),
        ({"use_bias": True, "tie_embeddings": False}, replace(KINDS["rsLoRA"], dora=True)),
        ({"tie_embeddings": False, "experts": ExpertConfig(4, 2, 40)}, KINDS["LoRA"]),
    ],
    ids=["head", "qwen3", "biases", "experts"],
)
def test_other_families_are_exchanged_with_peft(sizes: dict, adapter: LoraConfig, tmp_path, parity) -> None:
    torch.manual_seed(2)
    ours = CausalLM(replace(TINY, **sizes)).eval()
    ours.save_pretrained(tmp_path / "base")
    add_adapters(ours, adapter)
    save_adapter(shaken(ours), tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    parity(f"our folder, {', '.join(sizes)}", "PEFT", "exchange", theirs(input_ids=ids(1)).logits, ours(ids(1)), 1e-5)


def test_a_loaded_adapter_goes_on_as_it_was_saved_and_nothing_else_is_trained(tmp_path) -> None:
    base, model = saved_base(tmp_path), tiny()
    add_adapters(model, replace(KINDS["LoRA"], lora_dropout=0.25))
    save_adapter(shaken(model), tmp_path / "adapter")
    assert TheirConfig.from_pretrained(tmp_path / "adapter").lora_dropout == 0.25
    loaded = CausalLM.from_pretrained(base).train()
    load_adapter(loaded, tmp_path / "adapter")
    assert not loaded.training and {layer.dropout.p for layer in adapted_layers(loaded).values()} == {0.25}
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trained) == 28 and all(".lora_" in name for name in trained)
    with pytest.raises(ValueError, match="has adapters already; fold them before loading others"):
        load_adapter(loaded, tmp_path / "adapter")


def test_every_setting_of_peft_is_read_refused_or_known_to_compute_the_same() -> None:
    """A setting that PEFT adds must be looked at here before a folder that has it is loaded."""
    files = {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    layers = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices"}
    of_refused = {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}  # starts, sizes
    elsewhere = {"megatron_config", "megatron_core", "ensure_weight_tying"}  # where it runs; of modules_to_save
    known = {*SETTINGS, *UNSUPPORTED, *files, *layers, *of_refused, *elsewhere}
    assert {field.name for field in fields(TheirConfig)} - {"runtime_config"} <= known


def test_folding_a_quantised_base_leaves_a_model_that_can_be_saved(tmp_path) -> None:
    model = tiny().eval()
    quantize_model(model)
    add_adapters(model, KINDS["LoRA, two layers"])  # five kinds of layers get no update
    logits = shaken(model)(ids())
    fold(model).save_pretrained(tmp_path)
    assert torch.allclose(CausalLM.from_pretrained(tmp_path)(ids()), logits, atol=1e-5)


def test_a_hand_worked_layer() -> None:
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    layer = LoRALinear(base, rank=1, scale=3.0)
    layer.lora_a.data, layer.lora_b.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [0.0]])
    x = torch.tensor([2.0, 4.0])  # A x = -2, B A x = (-1, 0), times 3 = (-3, 0); W x = (2, 8)
    assert layer(x).tolist() == [-1.0, 8.0]
    assert layer.weight.tolist() == [[2.5, -1.5], [0.0, 2.0]]
    assert not base.weight.requires_grad and layer.lora_a.requires_grad and layer.lora_b.requires_grad


def test_adapters_change_nothing_at_first_and_b_gets_the_first_gradient(tmp_path) -> None:
    for config in (KINDS["LoRA"], KINDS["DoRA"]):
        model, base = tiny(), tiny()
        add_adapters(model, config)
        assert torch.allclose(model(ids()), base(ids()), atol=1e-6)
        loss_of(model(ids()), ids()).backward()
        layers = adapted_layers(model).values()
        assert all(not layer.lora_a.grad.any() and layer.lora_b.grad.abs().max() > 0 for layer in layers)


def test_an_update_is_drawn_as_a_linear_layer_of_its_shape() -> None:
    torch.manual_seed(3)
    layer = LoRALinear(nn.Linear(24, 10, device="meta").to_empty(device="cpu"), rank=4, scale=1.0)
    torch.manual_seed(3)
    assert torch.equal(layer.lora_a, nn.Linear(24, 4, bias=False).weight)


def test_the_scale_is_alpha_over_rank_or_its_root() -> None:
    assert LoraConfig(lora_rank=4, lora_alpha=6).scale == 1.5
    assert LoraConfig(lora_rank=4, lora_alpha=6, rank_stabilised=True).scale == 3.0


def test_only_the_adapters_are_trained_and_their_number_is_known() -> None:
    model = tiny()
    names = add_adapters(model, KINDS["DoRA"])
    sizes = [(layer.in_features, layer.out_features) for layer in adapted_layers(model).values()]
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert len(names) == 14 and counted == sum(3 * (n_in + n_out) + n_out for n_in, n_out in sizes)


def test_dora_without_an_update_of_direction_only_stretches_rows() -> None:
    base = nn.Linear(5, 4)
    layer = DoRALinear(base, rank=2, scale=1.0)
    layer.magnitude.data *= torch.tensor([1.0, 2.0, 0.5, 3.0])
    assert torch.allclose(layer.weight, base.weight * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None])
    assert torch.allclose(layer(torch.eye(5)), layer.weight.T + base.bias, atol=1e-6)


def test_dropout_reaches_the_update_alone() -> None:
    for kind in (LoRALinear, DoRALinear):
        torch.manual_seed(0)
        layer = kind(nn.Linear(6, 5), rank=2, scale=1.5, dropout=0.5)
        x = torch.randn(4, 6)
        assert torch.allclose(layer.train()(x), layer.base(x), atol=1e-6)  # B is still 0
        shaken(layer)
        assert not torch.allclose(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_that_evaluates_goes_on_doing_so_with_adapters(quantised: bool) -> None:
    model = tiny().eval()
    if quantised:
        quantize_model(model)
    add_adapters(model, replace(KINDS["DoRA"], lora_dropout=0.5))
    shaken(model)
    assert torch.equal(model(ids()), model(ids()))


def test_generation_uses_the_adapters_and_folding_keeps_them(tmp_path) -> None:
    from gpt2 import SamplingConfig

    for config in (KINDS["LoRA"], KINDS["DoRA"]):
        model = tiny().eval()
        plain = model.generate(ids(2, 4), SamplingConfig(12, temperature=0.0))
        add_adapters(model, config)
        shaken(model)
        made, logits = model.generate(ids(2, 4), SamplingConfig(12, temperature=0.0)), model(ids())
        assert not torch.equal(made, plain)
        with torch.no_grad():
            greedy = ids(2, 4)
            for _ in range(12):
                greedy = torch.cat([greedy, model(greedy)[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(made, greedy[:, 4 : 4 + made.shape[1]])
        fold(model)
        assert not adapted_layers(model) and torch.allclose(model(ids()), logits, atol=1e-5)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path)
        assert torch.allclose(CausalLM.from_pretrained(tmp_path)(ids()), logits, atol=1e-5)


def test_folding_keeps_the_precision_and_the_next_adapter_knows_its_new_base() -> None:
    model = tiny().double()
    add_adapters(model, KINDS["DoRA"])
    first, logits = model.base_identity, shaken(model)(ids())
    fold(model)
    assert torch.allclose(model(ids()), logits, rtol=0, atol=1e-10)
    add_adapters(model, KINDS["LoRA"])
    assert model.base_identity == base_sha256(model) != first


def test_the_base_is_there_when_the_adapters_are_off() -> None:
    model, base = tiny(), tiny()
    add_adapters(model, KINDS["LoRA"])
    shaken(model)
    with adapters_off(model):
        assert torch.equal(model(ids()), base(ids()))
    assert not torch.equal(model(ids()), base(ids()))


# Rows of the embedding


ROWS = [41, 3, 17]


def with_rows(config: LoraConfig) -> CausalLM:
    model = tiny()
    train_rows(model, ROWS)
    add_adapters(model, config)
    return shaken(model)


def test_trained_rows_change_what_is_read_and_what_is_said(parity) -> None:
    model, base = tiny(), tiny()
    train_rows(model, ROWS)
    assert torch.equal(model(ids()), base(ids()))
    model.token_emb.rows.data += 0.5
    base.token_emb.weight.data[sorted(ROWS)] += 0.5
    parity("trained rows", "the embedding with these rows", "output", model(ids()), base(ids()), 1e-6)
    token_ids = torch.tensor([[3, 41, 5, 17, 3, 9]])
    loss_of(model(token_ids), token_ids).backward()
    loss_of(base(token_ids), token_ids).backward()
    grad = base.token_emb.weight.grad[sorted(ROWS)]  # through the embedding and through the tied head
    parity("trained rows", "the embedding with these rows", "gradient", model.token_emb.rows.grad, grad, 1e-6)
    add_adapters(model, KINDS["LoRA"])
    assert model.token_emb.rows.requires_grad and not model.token_emb.base.weight.requires_grad


def test_rows_and_adapters_are_exchanged_with_peft(tmp_path, parity) -> None:
    base = saved_base(tmp_path)
    ours = with_rows(KINDS["LoRA"])
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "ours"
    )
    parity("adapter with rows", "PeftModel", "exchange", theirs(input_ids=ids()).logits, ours(ids()), 1e-5)
    settings = TheirConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], trainable_token_indices=ROWS)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    shaken(theirs).save_pretrained(tmp_path / "theirs")
    loaded = CausalLM.from_pretrained(base)
    load_adapter(loaded, tmp_path / "theirs")
    parity("PEFT's rows, in another order", "PEFT", "exchange", loaded(ids()), theirs(input_ids=ids()).logits, 1e-5)
    path = tmp_path / "theirs" / ADAPTER_CONFIG  # PEFT also takes a dictionary from the layer's name
    words = json.loads(path.read_text()) | {"trainable_token_indices": {"embed_tokens": ROWS}}
    path.write_text(json.dumps(words))
    again = CausalLM.from_pretrained(base)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(ids()), loaded(ids()))
    path.write_text(json.dumps(words | {"trainable_token_indices": [3, 17, 50]}))
    refused = CausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"some of the ids 0\.\.49"):
        load_adapter(refused, tmp_path / "theirs")
    assert all(part.requires_grad for part in refused.parameters()) and not adapted_layers(refused)
    twice = tiny()
    train_rows(twice, [17, 3, 17])
    assert twice.token_emb.token_ids.tolist() == [3, 17] and len(twice.token_emb.rows) == 2


def test_rows_are_generated_with_folded_and_switched_off(tmp_path) -> None:
    from gpt2 import SamplingConfig

    model, base = with_rows(KINDS["LoRA"]).eval(), tiny()
    with adapters_off(model):
        assert torch.equal(model(ids()), base(ids()))
    logits, made = model(ids()), model.generate(ids(2, 4), SamplingConfig(12, temperature=0.0))
    fold(model)
    assert torch.allclose(model(ids()), logits, atol=1e-5) and model.lm_head.weight is model.token_emb.weight
    assert torch.equal(model.generate(ids(2, 4), SamplingConfig(12, temperature=0.0)), made)
    model.save_pretrained(tmp_path)
    assert torch.allclose(CausalLM.from_pretrained(tmp_path)(ids()), logits, atol=1e-5)


def test_adapters_and_rows_are_back_whatever_happened_without_them() -> None:
    model = with_rows(KINDS["LoRA"])
    before = model(ids())
    with pytest.raises(KeyError, match="stop"), adapters_off(model):
        raise KeyError("stop")
    assert torch.equal(model(ids()), before)


def test_rows_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"some of the ids 0\.\.49"):
        train_rows(tiny(), [50])
    with pytest.raises(TypeError, match="token ids must be integers, got torch.float32"):
        train_rows(tiny(), [1.5])
    with pytest.raises(ValueError, match="tied to the head"):
        train_rows(CausalLM(replace(TINY, tie_embeddings=False)), [3])
    with pytest.raises(ValueError, match="rows are trained once"):
        train_rows(with_rows(KINDS["LoRA"]), [3])


def test_the_hash_is_of_the_base_alone(tmp_path) -> None:
    model = tiny()
    identity = base_sha256(model)
    model.save_pretrained(tmp_path)
    assert base_sha256(CausalLM.from_pretrained(tmp_path)) == identity
    add_adapters(model, KINDS["LoRA"])
    shaken(model)
    assert base_sha256(model) == identity == model.base_identity
    model.blocks[0].ffn.up_proj.base.weight.data[0, 0] += 1e-3
    assert base_sha256(model) != identity
    quantised = tiny()
    quantize_model(quantised)
    add_adapters(quantised, KINDS["LoRA"])
    assert quantised.base_identity == identity  # of the weights that were quantised


def test_the_hash_is_that_of_names_shapes_and_numbers_in_the_order_of_the_folder(tmp_path) -> None:
    """From the saved file, by its keys in alphabetical order: nothing of the model is asked."""
    model = CausalLM(replace(TINY, tie_embeddings=False))
    model.save_pretrained(tmp_path)
    digest = sha256()
    for key, tensor in sorted(load_file(tmp_path / "model.safetensors").items()):
        digest.update(f"{key} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    assert base_sha256(model) == digest.hexdigest()


def test_an_adapter_of_another_base_is_refused(tmp_path) -> None:
    model = tiny()
    add_adapters(model, KINDS["LoRA"])
    save_adapter(shaken(model), tmp_path, base="course-model")
    other = tiny(seed=5)
    with pytest.raises(ValueError, match=r"trained on a base with sha256 \w{12}.*this model has \w{12}.*course-model"):
        load_adapter(other, tmp_path)
    assert not adapted_layers(other)
    load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_rank": 25}, r"lora_rank=25 must be in 1\.\.24"),
        ({"lora_rank": 13}, r"lora_rank=13 must be in 1\.\.12"),  # q_proj would take it, k_proj does not
        ({"target_modules": "q_prj"}, "unknown target module 'q_prj'; did you mean 'q_proj'"),
        ({"target_modules": "q_proj,query"}, "unknown target module 'query'"),
        ({"target_modules": "lm_head"}, "lm_head shares its weight with token_emb"),
    ],
)
def test_adapters_that_cannot_be_are_refused_and_leave_the_model_alone(flags: dict, message: str) -> None:
    model = CausalLM(replace(TINY, tie_embeddings=True))
    with pytest.raises(ValueError, match=message):
        add_adapters(model, LoraConfig(**flags))
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_rank_that_some_layer_cannot_have_leaves_the_model_alone(tmp_path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path), dtype=torch.float32)
    get_peft_model(theirs, TheirConfig(r=13, target_modules=["q_proj", "k_proj"])).save_pretrained(tmp_path)
    model = tiny()
    with pytest.raises(ValueError, match=r"lora_rank=13 must be in 1\.\.12"):
        load_adapter(model, tmp_path)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
        {"target_modules": ["v_proj", "layers.0.mlp.down_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
    ],
    ids=["pattern", "names", "layers"],
)
def test_a_choice_of_layers_goes_to_peft_and_back(choice: dict, tmp_path, parity) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path), dtype=torch.float32)
    theirs = shaken(get_peft_model(base, TheirConfig(task_type="CAUSAL_LM", r=2, use_dora=True, **choice)))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(input_ids=ids()).logits
    ours = CausalLM.from_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of layers that PEFT adapts and the file does not hold
        again = PeftModel.from_pretrained(base, tmp_path / "ours")
    name = f"PEFT's folder, target_modules={choice['target_modules']!r}"
    parity(name, "PEFT", "exchange", [ours(ids()), again(input_ids=ids()).logits], [wanted, wanted], 1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_rank": 0}, "lora_rank must be finite and >= 1, got 0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be finite and > 0, got nan"),
        ({"lora_dropout": 1.0}, "lora_dropout must be finite and >= 0 and < 1"),
        ({"target_modules": " , "}, "target_modules names no layer"),
        ({"target_modules": ["q_proj"]}, r"target_modules is one text with commas, got \['q_proj'\]"),
        ({"lora_rank": 2.5}, "lora_rank must be a whole number, got 2.5"),
        ({"lora_rank": True}, "lora_rank must be a whole number, got True"),
    ],
)
def test_bad_settings_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**flags)


def test_merging_twice_and_other_disorder_is_refused(tmp_path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="the model has no adapters"):
        merge(model)
    add_adapters(model, KINDS["LoRA"])
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, KINDS["LoRA"])
    with pytest.raises(ValueError, match="merge first"):
        unmerge(model)
    merge(shaken(model))
    with pytest.raises(ValueError, match="would add it twice"):
        merge(model)
    with pytest.raises(ValueError, match="unmerge before saving"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="unmerge before switching"), adapters_off(model):
        pass
    quantised = tiny()
    quantize_model(quantised)
    add_adapters(quantised, KINDS["LoRA"])
    with pytest.raises(ValueError, match="a quantised base cannot"):
        merge(quantised)


def rewritten(folder: Path, words: dict) -> Path:
    (folder / ADAPTER_CONFIG).write_text(json.dumps(words))
    return folder


def test_folders_that_do_not_fit_are_refused(tmp_path) -> None:
    model = tiny()
    add_adapters(model, KINDS["LoRA"])
    save_adapter(shaken(model), tmp_path)
    words = json.loads((tmp_path / ADAPTER_CONFIG).read_text())

    def loading(**changes: object) -> None:
        load_adapter(tiny(), rewritten(tmp_path, words | changes))

    for changes, message in (
        ({"peft_type": "PREFIX_TUNING"}, "type 'PREFIX_TUNING', expected 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'., which this course's LoRA does not know"),
        ({"r": 2}, r"has shape \(3, 24\), expected \(2, 24\)"),
        ({"r": "3"}, f"{ADAPTER_CONFIG}: r must be of type int, got '3'"),
        ({"r": None}, f"{ADAPTER_CONFIG}: r must be of type int, got None"),
        ({"lora_alpha": True}, f"{ADAPTER_CONFIG}: lora_alpha must be of type number, got True"),
        ({"auto_mapping": "x"}, f"{ADAPTER_CONFIG}: auto_mapping must be of type dict, got 'x'"),
        ({"auto_mapping": {"base_sha256": 5}}, "trained on a base with sha256 5"),
        ({"trainable_token_indices": {"lm_head": [3]}}, r"trainable_token_indices=\{'lm_head': \[3\]\}"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
    ):
        with pytest.raises(ValueError, match=message):
            loading(**changes)
    for name in UNSUPPORTED:
        with pytest.raises(ValueError, match=f"has {name}='other', which this course's LoRA does not know"):
            low_rank_adapters.read_settings(rewritten(tmp_path, words | {name: "other"}))
    loading()
    data = (tmp_path / ADAPTER_WEIGHTS).read_bytes()
    save_file({}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the model: it holds no tensor"):
        loading()
    with pytest.raises(ValueError, match="is a file; choose another folder to save to"):
        save_adapter(model, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(data[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        loading()
    with pytest.raises(ValueError, match=f"has no {ADAPTER_CONFIG}"):
        load_adapter(tiny(), tmp_path / "nowhere")
