"""Topic 09: the calculators against our own model, transformers' models on the meta device, and published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from latent_attention import LatentConfig
from llm_calculators import (
    PUBLISHED,
    count_parameters,
    forward_flops,
    kv_bytes,
    kv_bytes_per_token,
)
from llm_config import ExpertConfig, ModelConfig, config_to_folder
from llm_layers import RopeScaling
from modern_llm_architectures import CausalLM
from transformer_architecture import MatmulCounter

SMALL = ModelConfig(vocab_size=67, d_model=48, n_layers=3, d_head=12, d_ff=56)
VARIANTS = {
    "grouped": SMALL,
    "bias, untied": ModelConfig(67, 48, 3, 4, 1, 12, 56, use_bias=True, tie_embeddings=False),
    "qk-norm, window": ModelConfig(67, 48, 3, 4, 2, 10, 56, qk_norm=True, window_size=5, full_layers=(1,)),
    "experts": ModelConfig(67, 48, 3, 4, 2, 12, 56, experts=ExpertConfig(6, 2, 20, 12, 1)),
    "latent, sigmoid": ModelConfig(
        67,
        48,
        3,
        4,
        4,
        12,
        56,
        latent=LatentConfig(20, 16, 12, 8, 10),
        experts=ExpertConfig(6, 2, 20, 20, 1, "sigmoid"),
    ),
    "more dense layers than layers": ModelConfig(67, 48, 2, experts=ExpertConfig(6, 2, 20, 20, 5, "sigmoid")),
    "latent, plain queries": ModelConfig(67, 48, 3, 4, 4, 12, 56, latent=LatentConfig(0, 16, 12, 8, 10)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_transformers_builds(name: str, parity) -> None:
    given = config_to_folder(PUBLISHED[name])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    biases = sum(buffer.numel() for key, buffer in theirs.named_buffers() if "e_score_correction_bias" in key)
    wanted = sum(parameter.numel() for parameter in theirs.parameters()) + biases
    total = count_parameters(PUBLISHED[name]).total
    parity("count_parameters", f"transformers, {name}", "output", total, wanted, 0)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Llama-2-7B", 6_738_415_616, 6_738_415_616),  # the sizes of the published weight files
        ("Llama-3.1-8B", 8_030_261_248, 8_030_261_248),
        ("Mistral-7B-v0.1", 7_241_732_096, 7_241_732_096),
        ("Mixtral-8x7B", 46_702_792_704, 12_879_925_248),  # "46.7B" and "12.9B" in its announcement
        ("DeepSeek-V3", 671e9, 37e9),  # "671B total parameters with 37B activated", arXiv 2412.19437, abstract
    ],
)
def test_published_counts(name: str, total: float, active: float) -> None:
    counted = count_parameters(PUBLISHED[name])
    if isinstance(total, int):
        assert (counted.total, counted.active) == (total, active)
    else:
        assert counted.total == pytest.approx(total, rel=0.001) and counted.active == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_term_counts_what_the_model_has(name: str) -> None:
    config = VARIANTS[name]
    counted = count_parameters(config)
    found: dict[str, int] = {}
    for path, parameter in CausalLM(config).named_parameters():
        kind = "norms" if "norm" in path else path.split(".")[2] if path.startswith("blocks") else path.split(".")[0]
        found[kind] = found.get(kind, 0) + parameter.numel()
    assert found["norms"] == counted.norms and found["self_attn"] == counted.attention and found["ffn"] == counted.ffn
    assert found["token_emb"] == counted.embedding and found.get("lm_head", 0) == counted.head


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seq_len", [1, 7])
def test_flops_of_the_matrices_are_those_that_run(name: str, seq_len: int, parity) -> None:
    config, token_ids = VARIANTS[name], torch.arange(3, 3 + seq_len)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        CausalLM(config)(token_ids)
    linear = counter.get_flop_counts()["Global"]
    matrices = sum(flops for op, flops in linear.items() if str(op) in ("aten.mm", "aten.addmm"))  # bmm is attention's
    parity(
        "forward_flops", "FlopCounterMode", "output", forward_flops(config, seq_len)["matrices"] * seq_len, matrices, 0
    )


def test_scores_count_the_pairs_that_may_meet() -> None:
    config = ModelConfig(67, 48, 2, 4, 2, 12, 56, window_size=3, full_layers=(0,))
    pairs = {0: sum(range(1, 8)), 1: 1 + 2 + 5 * 3}  # full causal of 7 positions; a window of 3
    wanted = sum(pairs.values()) * 4 * (2 * 12 + 2 * 12)  # heads, dot product and weighted sum, two FLOPs each
    assert forward_flops(config, 7)["scores"] * 7 == pytest.approx(wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_bytes_are_those_of_the_caches(name: str) -> None:
    config, token_ids = VARIANTS[name], torch.randint(3, 67, (2, 9))
    model = CausalLM(config)
    caches = model.new_caches()
    with torch.no_grad():
        model(token_ids, caches)
    full = sum(cache.n_bytes for cache in caches)
    assert full == 2 * 9 * kv_bytes_per_token(config, 4)
    for cache in caches:  # what a window may forget, it forgets at the next call
        cache.drop_old()
    kept = sum(
        cache.n_bytes + (cache.window_size > 0) * 2 * 2 * config.n_kv_heads * config.d_head * 4 for cache in caches
    )
    assert kept == kv_bytes(config, 9, 2, 4)  # the formula counts the newest position of a window as well


def test_known_cache_sizes() -> None:
    assert kv_bytes_per_token(PUBLISHED["Llama-2-7B"]) == 512 * 1024  # 2 x 32 layers x 32 heads x 128 x 2 bytes
    assert kv_bytes_per_token(PUBLISHED["Llama-3.1-8B"]) == 128 * 1024
    assert kv_bytes_per_token(PUBLISHED["DeepSeek-V3"]) == 61 * 576 * 2
    assert kv_bytes(PUBLISHED["Llama-2-7B"], 4096, 2) == 2 * 4096 * 512 * 1024


def test_scaling_does_not_change_the_count() -> None:
    longer = ModelConfig(67, 48, 3, d_head=12, d_ff=56, rope_scaling=RopeScaling("linear", 4.0))
    assert count_parameters(longer) == count_parameters(SMALL)


def test_the_matmul_counter_of_topic_04_agrees() -> None:
    counter = MatmulCounter()
    with counter, torch.no_grad():
        CausalLM(SMALL)(torch.arange(3, 10)[None])
    assert forward_flops(SMALL, 7)["matrices"] * 7 <= counter.flops


def test_a_sequence_of_nothing_costs_no_cache_and_has_no_mean() -> None:
    assert kv_bytes(PUBLISHED["Llama-2-7B"], 0) == 0
    with pytest.raises(ValueError, match="seq_len must be >= 1 positions, got 0"):
        forward_flops(PUBLISHED["Llama-2-7B"], 0)
    with pytest.raises(ValueError, match="seq_len must be >= 0 positions, got -5"):
        kv_bytes(PUBLISHED["Llama-2-7B"], -5)
