"""Topic 11: soft prompts and prefixes equal to PEFT's, biases to transformers' Llama, and each begins as promised."""

from dataclasses import replace

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import prompt_tuning
from gpt2 import SamplingConfig, left_padded
from llm_config import ExpertConfig
from modern_llm_architectures import CausalLM, ModelConfig
from prompt_tuning import (
    Bottleneck,
    PrefixAttention,
    PromptTuned,
    add_biases,
    add_bottlenecks,
    add_prefix,
    trained_parameters,
    turned_back,
)

TINY = ModelConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40, max_seq_len=40)
FIRST, PLACEHOLDER = [7, 3, 9, 11, 5], 4
GREEDY = SamplingConfig(9, temperature=0.0)


def tiny(dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(TINY)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def ids(batch: int = 3, seq: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(12, TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def after_first(token_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([FIRST] * len(token_ids)), token_ids], dim=1)


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def loss_of(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def by_hand(model: nn.Module, token_ids: torch.Tensor, n_new: int = 9) -> torch.Tensor:
    """Greedy continuation without any cache."""
    grown = token_ids
    with torch.no_grad():
        for _ in range(n_new):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(dim=-1)], dim=1)
    return grown[:, token_ids.shape[1] :]


METHODS = {
    "bottlenecks": lambda model: add_bottlenecks(model, 5) or model,
    "biases": lambda model: add_biases(model) or model,
    "prefix": lambda model: add_prefix(model, FIRST) or model,
    "prompt": lambda model: PromptTuned(model, FIRST, PLACEHOLDER),
}
SIZES = {  # numbers that are trained: 3 blocks, width 24, 2 heads of keys of width 6
    "bottlenecks": 3 * 2 * (2 * 24 * 5 + 5 + 24),
    "biases": 3 * (24 + 12 + 12 + 24 + 40 + 40 + 24),
    "prefix": 3 * 2 * 5 * 2 * 6,
    "prompt": 5 * 24,
}


# What each begins as


@pytest.mark.parametrize("name", ["bottlenecks", "biases"])
def test_what_is_added_begins_as_nothing(name: str) -> None:
    assert torch.allclose(METHODS[name](tiny())(ids()), tiny()(ids()), atol=1e-12)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_what_stands_before_a_text_begins_as_the_ids_that_it_was_made_of(name: str) -> None:
    wanted = tiny()(after_first(ids()))[:, len(FIRST) :]
    tolerance = {"prompt": 1e-12, "prefix": 1e-6}[name]  # angles are float32, so turning back is exact to 1e-7 alone
    assert torch.allclose(METHODS[name](tiny())(ids()), wanted, atol=tolerance)
    assert not torch.allclose(tiny()(ids()), wanted, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_trained_numbers_are_those_of_the_formula_and_all_get_a_gradient(name: str) -> None:
    model = METHODS[name](tiny())
    assert trained_parameters(model) == SIZES[name]
    loss_of(shaken(model)(ids()), ids()).backward()
    for parameter in model.parameters():
        assert parameter.grad is None if not parameter.requires_grad else parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_the_added_numbers_alone_and_learns(name: str) -> None:
    model = METHODS[name](tiny())
    frozen = {key: part.clone() for key, part in model.named_parameters() if not part.requires_grad}
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], 0.05)
    first = loss_of(model(ids()), ids()).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model(ids()), ids()).backward()
        optimizer.step()
    assert loss_of(model(ids()), ids()).item() < 0.9 * first
    assert all(torch.equal(part, frozen[key]) for key, part in model.named_parameters() if key in frozen)


# Generation: caches, padding


@pytest.mark.parametrize("name", METHODS)
def test_generation_with_caches_equals_the_slow_way(name: str) -> None:
    model = shaken(METHODS[name](tiny())).eval()
    made, wanted = model.generate(ids(2, 6), GREEDY), by_hand(model, ids(2, 6))
    for fast, slow in zip(made.tolist(), wanted.tolist(), strict=True):
        n_kept = slow.index(TINY.eos_id) + 1 if TINY.eos_id in slow else len(slow)
        assert fast[:n_kept] == slow[:n_kept] and not any(token_id != TINY.pad_id for token_id in fast[n_kept:])


@pytest.mark.parametrize("name", METHODS)
def test_left_padding_changes_nothing(name: str) -> None:
    model = shaken(METHODS[name](tiny())).eval()
    rows = [ids(1, 3)[0].tolist(), ids(1, 7, seed=2)[0].tolist()]
    together = model.generate(*left_padded(rows, 0)[:1], GREEDY, left_padded(rows, 0)[1])
    for row, made in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), GREEDY)[0]
        assert torch.equal(made[: len(alone)], alone)


# The libraries


def test_prompt_equals_pefts(tmp_path, parity) -> None:
    tiny(torch.float32).save_pretrained(tmp_path)
    ours = shaken(PromptTuned(CausalLM.from_pretrained(tmp_path).double(), FIRST, PLACEHOLDER))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = get_peft_model(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(FIRST))).double()
    table = theirs.prompt_encoder["default"].embedding.weight
    table.data.copy_(ours.model.token_emb.prompt)
    logits, wanted = ours(ids()), theirs(input_ids=ids()).logits[:, -8:]
    parity("prompt tuning", "PEFT", "output", logits, wanted, 1e-10)
    loss_of(logits, ids()).backward()
    loss_of(wanted, ids()).backward()
    parity("prompt tuning", "PEFT", "gradient", ours.model.token_emb.prompt.grad, table.grad, 1e-10)


def test_prefix_equals_pefts_with_its_keys_turned_back(tmp_path, parity) -> None:
    tiny(torch.float32).save_pretrained(tmp_path)
    ours = CausalLM.from_pretrained(tmp_path).double()
    add_prefix(ours, FIRST)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = get_peft_model(theirs, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(FIRST))).double()
    table = theirs.prompt_encoder["default"].embedding.weight  # (virtual, layers * 2 * kv_heads * d_head)
    table.data.copy_(0.5 * torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
    parts = table.detach().view(len(FIRST), TINY.n_layers, 2, 2, 6).permute(1, 2, 3, 0, 4)
    for block, (keys, values) in zip(ours.blocks, parts, strict=True):
        block.self_attn.prefix_keys.data.copy_(turned_back(ours, keys, len(FIRST)))
        block.self_attn.prefix_values.data.copy_(values)
    logits, wanted = ours(ids()), theirs(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    parity("prefix tuning", "PEFT", "output", logits, wanted, 1e-6)  # both have float32 angles
    loss_of(logits, ids()).backward()
    loss_of(wanted, ids()).backward()
    grads = table.grad.view(len(FIRST), TINY.n_layers, 2, 2, 6).permute(1, 2, 3, 0, 4)
    mine = [[turn(ours, block.self_attn) for turn in (key_gradient, value_gradient)] for block in ours.blocks]
    parity("prefix tuning", "PEFT", "gradient", mine, [list(layer) for layer in grads], 1e-6)


def key_gradient(model: CausalLM, attention: PrefixAttention) -> torch.Tensor:
    """Of the keys as PEFT has them: a rotation turns gradients as it turns keys."""
    cos, sin = model.rotary.span(len(FIRST), 1, attention.prefix_keys)
    return prompt_tuning.rotate(attention.prefix_keys.grad, (cos, sin)).reshape(attention.prefix_keys.shape)


def value_gradient(_: CausalLM, attention: PrefixAttention) -> torch.Tensor:
    return attention.prefix_values.grad


def test_biases_are_those_of_transformers_llama(tmp_path, parity) -> None:
    tiny(torch.float32).save_pretrained(tmp_path)
    ours = CausalLM.from_pretrained(tmp_path).double()
    add_biases(ours)
    shaken(ours)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.attention_bias = config.mlp_bias = True
    theirs = LlamaForCausalLM(config).double().eval()
    named = dict(ours.named_parameters(remove_duplicate=False))
    state = {}
    for key in theirs.state_dict():
        name = key.replace("model.layers", "blocks").replace("mlp", "ffn").replace("o_proj", "out_proj")
        name = name.replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "ffn_norm")
        name = name.replace("model.norm", "final_norm").replace("model.embed_tokens", "token_emb")
        state[key] = named[name].detach()
    theirs.load_state_dict(state)
    parity("BitFit's biases", "transformers' Llama with biases", "output", ours(ids()), theirs(ids()).logits, 1e-10)


def test_a_bottleneck_is_its_formula_with_its_gradients(parity) -> None:
    torch.manual_seed(3)
    layer, y = Bottleneck(7, 3).double(), torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    shaken(layer)
    z = y @ layer.down.weight.T + layer.down.bias
    hidden = z * (1 + torch.erf(z / 2**0.5)) / 2  # gelu by its definition
    wanted = y + hidden @ layer.up.weight.T + layer.up.bias
    parity("Bottleneck", "the formula with erf", "output", layer(y), wanted, 1e-10)
    inputs = [y, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(made.square().sum(), inputs) for made in (layer(y), wanted))
    for name, got, want in zip(("y", "W_down", "b_down", "W_up", "b_up"), ours, theirs, strict=True):
        parity(f"Bottleneck, {name}", "the formula with erf", "gradient", got, want, 1e-10)


def test_bottlenecks_equal_hooks_on_transformers_llama(tmp_path, parity) -> None:
    """Adapters as others add them: a forward hook on every sublayer, from which nothing of ours is used."""
    tiny(torch.float32).save_pretrained(tmp_path)
    ours = CausalLM.from_pretrained(tmp_path).double().eval()
    add_bottlenecks(ours, 5)
    shaken(ours)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    pairs = list(zip(ours.blocks, theirs.model.layers, strict=True))
    for block, layer in pairs:
        for mine, yours in ((block.self_attn.adapter, layer.self_attn), (block.ffn.adapter, layer.mlp)):
            yours.adapter = nn.Sequential(nn.Linear(24, 5), nn.GELU(), nn.Linear(5, 24)).double()
            yours.adapter[0].load_state_dict(mine.down.state_dict())
            yours.adapter[2].load_state_dict(mine.up.state_dict())
            yours.register_forward_hook(plus_adapter)
    parity("WithBottleneck", "hooks on transformers' Llama", "output", ours(ids()), theirs(ids()).logits, 1e-10)
    loss_of(ours(ids()), ids()).backward()
    loss_of(theirs(ids()).logits, ids()).backward()
    for number, (block, layer) in enumerate(pairs):
        got, want = block.self_attn.adapter.down.weight.grad, layer.self_attn.adapter[0].weight.grad
        parity(f"WithBottleneck {number}", "hooks on transformers' Llama", "gradient", got, want, 1e-10)


def plus_adapter(layer: nn.Module, _: tuple, output: object) -> object:
    """The output of a sublayer, which for attention is a tuple, with its adapter's added."""
    if isinstance(output, tuple):
        return (output[0] + layer.adapter(output[0]), *output[1:])
    return output + layer.adapter(output)


def test_biases_that_a_model_has_are_trained_and_kept() -> None:
    torch.manual_seed(0)
    model = CausalLM(replace(TINY, use_bias=True)).double().eval()
    nn.init.normal_(model.blocks[1].self_attn.k_proj.bias)
    nn.init.normal_(model.blocks[1].self_attn.v_proj.bias)
    before = model(ids())
    add_biases(model)
    assert torch.allclose(model(ids()), before, atol=1e-12) and trained_parameters(model) == SIZES["biases"]


# Invariants and mistakes


def test_a_prompt_leaves_other_texts_alone_when_it_is_not_read() -> None:
    model = shaken(PromptTuned(tiny(), FIRST, PLACEHOLDER))
    assert torch.equal(model.model(ids()), tiny()(ids()))  # ids without a placeholder


def test_a_prefix_is_seen_by_every_position_and_the_future_by_none() -> None:
    model = tiny()
    add_prefix(model, FIRST)
    before = model(ids())
    changed = ids()
    changed[:, -1] = 13
    assert torch.allclose(model(changed)[:, :-1], before[:, :-1], atol=1e-12)
    model.blocks[0].self_attn.prefix_values.data += 1.0
    assert ((model(ids()) - before).abs().amax(dim=(0, 2)) > 1e-3).all()


def test_packed_rows_are_refused_by_a_prompt() -> None:
    with pytest.raises(ValueError, match="pad the rows instead of packing them"):
        PromptTuned(tiny(), FIRST, PLACEHOLDER)(ids(), document_ids=torch.ones_like(ids()))


@pytest.mark.parametrize(
    "work, message",
    [
        (lambda: add_bottlenecks(tiny(), 25), r"d_bottleneck=25 must be in 1\.\.24"),
        (lambda: add_bottlenecks(tiny(), 0), r"d_bottleneck=0 must be in 1\.\.24"),
        (lambda: add_biases(tiny(), ["up_prj"]), "unknown biased layer 'up_prj'; did you mean 'up_proj'"),
        (lambda: add_biases(CausalLM(replace(TINY, experts=ExpertConfig(4, 2, 40)))), "this model has experts"),
        (lambda: add_prefix(tiny(), []), "a prefix needs at least one token id"),
        (lambda: add_prefix(CausalLM(replace(TINY, qk_norm=True)), [3]), "got NormedAttention with window_size=0"),
        (lambda: add_prefix(CausalLM(replace(TINY, attention_cap=5.0)), [3]), "got SoftCappedAttention"),
        (lambda: add_prefix(CausalLM(replace(TINY, window_size=4)), [3]), "window_size=4; use PromptTuned"),
        (lambda: PromptTuned(tiny(), FIRST, 13)(torch.tensor([[12, 13]])), "a text holds id 13"),
        (lambda: PromptTuned(tiny(), [], PLACEHOLDER), "a prompt needs at least one token id"),
        (lambda: PromptTuned(tiny(), [-1], PLACEHOLDER), r"token id -1 < 0 at \[0\]"),  # not the last of the table
        (lambda: PromptTuned(tiny(), [3], 999), r"token id 999 >= vocab_size \d+ at \[1\]"),
    ],
)
def test_mistakes_are_refused(work, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work()
