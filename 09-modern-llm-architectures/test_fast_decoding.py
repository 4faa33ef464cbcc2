"""Topic 09: the planned step computes what the modules compute, and `generate` uses it only where it can."""

from dataclasses import replace

import pytest
import torch

import fast_decoding
from fast_decoding import DecodePlan, can_plan
from gpt2 import SamplingConfig, left_padded
from latent_attention import LatentConfig
from llm_config import ExpertConfig, ModelConfig
from llm_layers import RopeScaling
from modern_llm_architectures import CausalLM

PLAIN = ModelConfig(vocab_size=67, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_head=10, d_ff=40, max_seq_len=32)
KINDS = {
    "llama": PLAIN,
    "one head each, biased, untied": replace(PLAIN, n_kv_heads=6, use_bias=True, tie_embeddings=False),
    "qwen3": replace(PLAIN, qk_norm=True),
    "yarn, capped logits": replace(PLAIN, rope_scaling=RopeScaling("yarn", 4.0, 8), logit_cap=3.0),
}


def shaken(config: ModelConfig) -> CausalLM:
    torch.manual_seed(3)
    model = CausalLM(config).double().eval()
    for parameter in model.parameters():  # gains of 1 and biases of 0 would hide a forgotten one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ids(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 67, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_planned_steps_equal_the_modules(name: str, parity, checked_shapes) -> None:
    model, token_ids = shaken(KINDS[name]), ids(3, 15)
    caches, plain = model.new_caches(), model.new_caches()
    model.hidden(token_ids[:, :7], caches)
    model.hidden(token_ids[:, :7], plain)
    plan, pairs = DecodePlan(model, caches, 15), []
    with checked_shapes(fast_decoding):
        for place in range(7, 15):
            step = token_ids[:, place : place + 1]
            pairs.append((plan.step(step), model.hidden(step, plain)[:, -1]))
    got, wanted = (torch.stack(side) for side in zip(*pairs, strict=True))
    parity(f"DecodePlan ({name})", "the modules", "invariant", got, wanted, 1e-5)  # the modules' norms are float32


@torch.no_grad()
def test_padding_on_the_left_is_never_seen(parity) -> None:
    model, (token_ids, is_real) = shaken(PLAIN), left_padded([[5, 9], [7, 4, 3, 8, 6], [11, 12, 13]], 0)
    caches, new_ids = model.new_caches(), ids(3, 4, seed=1)
    model.hidden(token_ids, caches, is_real)
    plan = DecodePlan(model, caches, 9, is_real)
    got = torch.stack([plan.step(new_ids[:, [place]]) for place in range(4)], dim=1)
    for row, prompt in enumerate(([5, 9], [7, 4, 3, 8, 6], [11, 12, 13])):
        alone = model.hidden(torch.tensor([prompt + new_ids[row].tolist()]))[0, -4:]
        parity("DecodePlan, left padding", "the same prompt alone", "invariant", got[row], alone, 1e-5)


def test_generate_takes_the_plan_and_gives_the_same_tokens(monkeypatch) -> None:
    model, used = shaken(PLAIN), []
    step = DecodePlan.step
    monkeypatch.setattr(DecodePlan, "step", lambda self, new_ids: used.append(1) or step(self, new_ids))
    fast = model.generate(ids(4, 5), SamplingConfig(12, 0.0))
    n_used = len(used)
    monkeypatch.setattr("modern_llm_architectures.can_plan", lambda _: False)
    slow = model.generate(ids(4, 5), SamplingConfig(12, 0.0))
    assert torch.equal(fast, slow) and n_used == fast.shape[1] - 1 and len(used) == n_used


def test_the_plan_stops_where_the_model_stops() -> None:
    model = shaken(replace(PLAIN, eos_id=66))
    with pytest.raises(ValueError, match="33 positions exceed max_seq_len 32"):
        model.generate(ids(1, 5), SamplingConfig(40, 0.0))


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 4},
        {"attention_cap": 5.0},
        {"experts": ExpertConfig(4, 2, 8)},
        {"latent": LatentConfig(0, 8, 4, 4, 4)},
        {"rope_scaling": RopeScaling("dynamic", 2.0)},
    ],
    ids=str,
)
def test_other_models_are_left_to_their_modules(change: dict) -> None:
    assert not can_plan(CausalLM(replace(PLAIN, **change)))
    assert can_plan(CausalLM(PLAIN)) and not can_plan(CausalLM(PLAIN).bfloat16())
