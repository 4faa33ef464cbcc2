"""Proofs for training_cost: every formula against numbers worked out another way, and published budgets again."""

import dataclasses
import json

import pytest

from llm_calculators import count_parameters, forward_flops
from llm_config import ExpertConfig, ModelConfig, config_to_folder
from training_cost import (
    MODELS,
    RUNS,
    EstimateConfig,
    data_parallel_bytes,
    estimate,
    model_flops_utilisation,
    recomputed,
    ring_bytes,
    six_nd,
    tensor_parallel_bytes,
    training_flops,
    training_hours,
    zero_bytes,
)
from workbench import write_atomically

BUDGETS = {run.model: recomputed(run) for run in RUNS}


def test_terms_of_a_training_step_add_up_to_three_forward_passes() -> None:
    config = ModelConfig(100, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_head=4, d_ff=20, tie_embeddings=False)
    terms = training_flops(config, n_tokens=7000, seq_len=7)
    assert sum(terms.values()) == pytest.approx(3 * 7000 * sum(forward_flops(config, 7).values()))
    attention = 2 * (12 * 12 * 2 + 12 * 4 * 2)  # two blocks: queries and output, keys and values
    weights = attention + 2 * 3 * 12 * 20 + 100 * 12
    assert terms["matrices_forward"] == 2 * weights * 7000 and terms["matrices_backward"] == 4 * weights * 7000
    keys_met = 2 * (7 + 1) / 2  # by a query on average, over two blocks
    assert terms["attention_forward"] == pytest.approx(4 * keys_met * 3 * 4 * 7000)


def test_6nd_is_what_remains_without_attention_embedding_and_norms() -> None:
    config = MODELS["Llama-3.1-405B"]
    counted = count_parameters(config)
    terms = training_flops(config, 15.6e12, 8192)
    matrices = terms["matrices_forward"] + terms["matrices_backward"]
    assert matrices == six_nd(counted.active_matmul, 15.6e12)
    assert counted.active_matmul == counted.total - counted.norms - counted.embedding
    assert 0.99 < matrices / six_nd(counted.total, 15.6e12) < 1


@pytest.mark.parametrize("name, stated", [("GPT-3", 3.14e23), ("Chinchilla", 5.76e23), ("Llama-3.1-405B", 3.8e25)])
def test_6nd_gives_the_published_flops(name: str, stated: float) -> None:
    assert BUDGETS[name].stated == stated
    assert BUDGETS[name].six_nd == pytest.approx(stated, rel=0.025)


def test_gpu_hours_imply_utilisations_that_are_possible() -> None:
    assert count_parameters(MODELS["Llama-3.1-405B"]).total == pytest.approx(405e9, rel=0.005)
    assert count_parameters(MODELS["Llama-2-70B"]).total == pytest.approx(69e9, rel=0.001)
    assert BUDGETS["DeepSeek-V3"].n_parameters == pytest.approx(37e9, rel=0.02), "the report's activated parameters"
    implied = {name: budget.mfu for name, budget in BUDGETS.items() if budget.mfu}
    assert set(implied) == {"LLaMA-65B", "Llama-2-7B", "Llama-2-70B", "Llama-3.1-405B", "DeepSeek-V3"}
    assert all(0.3 < share < 0.5 for share in implied.values())
    # 6 * 65.2e9 * 1.4e12 / (1,022,362 h * 3600 s * 312e12)
    assert implied["LLaMA-65B"] == pytest.approx(5.4768e23 / 1.14832e24, rel=1e-3)


def test_hours_and_utilisation_are_inverse() -> None:
    hours = training_hours(3.6e24, n_gpus=100, peak=1e15, mfu=0.4)
    assert hours == pytest.approx(3.6e24 / (100 * 1e15 * 0.4) / 3600) == pytest.approx(25_000)
    assert model_flops_utilisation(3.6e24, hours * 3600, 100, 1e15) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="mfu must be above 0 and at most 1, got 40"):
        training_hours(1e20, 8, 1e15, 40)
    with pytest.raises(ValueError, match="must be above 0"):
        model_flops_utilisation(1e20, 0, 8, 1e15)


def test_zero_divides_what_its_stage_says() -> None:
    held = [zero_bytes(7.5e9, 64, stage) for stage in range(4)]
    totals = [sum(parts.values()) / 1e9 for parts in held]
    # Rajbhandari et al. 2020, figure 1: 120, 31.4, 16.6 and 1.9 GB for 7.5 billion weights on 64 GPUs
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert held[1]["gradients"] == held[0]["gradients"] == 64 * held[2]["gradients"]
    assert sum(zero_bytes(10, 1, 3, weight_bytes=4).values()) == 160
    for wrong in ((10, 8, 4), (10, 0, 1), (10, 8, 1, 3)):
        with pytest.raises(ValueError, match="stage must be 0 to 3, n_gpus >= 1, weight_bytes 2 or 4"):
            zero_bytes(*wrong)


def test_bytes_of_messages() -> None:
    assert [ring_bytes(120, size) for size in (1, 2, 3, 4)] == [0, 120, 160, 180]
    assert data_parallel_bytes(120, 4, "zero3") == 1.5 * data_parallel_bytes(120, 4, "ddp")
    assert data_parallel_bytes(120, 4, "zero3", n_micro=2) == 540
    assert [data_parallel_bytes(120, 4, "zero2", n_micro=n) for n in (1, 4)] == [180, 4 * 90 + 90]
    config = ModelConfig(n_layers=3, d_model=8, n_heads=2, n_kv_heads=2, d_head=4)
    assert tensor_parallel_bytes(config, n_tokens=10, size=2, bytes_per_number=4) == 4 * 3 * 10 * 8 * 4
    with pytest.raises(ValueError, match="unknown collective 'broadcast'"):
        ring_bytes(1, 2, "broadcast")
    with pytest.raises(ValueError, match="size must be >= 1 process, got 0"):
        data_parallel_bytes(1, 0)


def test_estimate_prints_what_the_functions_say(capsys, tmp_path) -> None:
    estimate(EstimateConfig())
    out = capsys.readouterr().out
    assert "3.14e+23" in out and "2,664,000" in out and "arXiv 2412.19437" in out
    config = EstimateConfig("Llama-3.1-8B", n_tokens=1e12, n_gpus=64, price=2.0, tensor_size=2, pipeline_size=4)
    estimate(config)
    out = capsys.readouterr().out
    total = sum(training_flops(MODELS["Llama-3.1-8B"], 1e12, 4096).values())
    hours = training_hours(total, 64, 989.4e12, 0.4)
    assert f"{hours * 64 * 2:,.0f} dollars at 2 dollars for a GPU hour" in out
    assert "8 data-parallel x 2 tensor x 4 pipeline; bubble 8.6%" in out, "3 / 35"
    held = 16 * count_parameters(MODELS["Llama-3.1-8B"]).total / 8  # 16 bytes for each weight, shared by 2 x 4
    assert f"ZeRO stage 0: {held / 1e9:8.1f} GB a GPU" in out
    # a GPU has an eighth of the batch and 8 of the 32 blocks; two processes send each message's size in an all-reduce
    sent = 4 * 8 * (4e6 / 8) * 4096 * 2
    assert f"tensor parallelism sends {sent / 1e9:.2f} GB a GPU and step" in out
    small = ModelConfig()
    write_atomically(tmp_path / "config.json", json.dumps(config_to_folder(small)).encode())
    estimate(EstimateConfig(checkpoint=tmp_path))
    assert f"{count_parameters(small).total:,} parameters" in capsys.readouterr().out


def test_twenty_tokens_are_for_each_parameter_that_a_token_meets(capsys, tmp_path) -> None:
    experts = ModelConfig(d_ff=16, experts=ExpertConfig(n_experts=8, n_active_experts=2, d_expert=16))
    write_atomically(tmp_path / "config.json", json.dumps(config_to_folder(experts)).encode())
    estimate(EstimateConfig(checkpoint=tmp_path))
    counted = count_parameters(experts)
    assert counted.active < counted.total
    assert f"{counted.active:,} active; {20 * counted.active:.3g} tokens" in capsys.readouterr().out


def test_bad_estimates_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model 'Llama-3.1-9B'; did you mean 'Llama-3.1-8B'"):
        EstimateConfig("Llama-3.1-9B")
    with pytest.raises(ValueError, match="n_gpus=64 is not divisible by tensor_size . pipeline_size = 3"):
        EstimateConfig(tensor_size=3)
    with pytest.raises(ValueError, match="mfu must be finite and > 0 and <= 1, got 1.5"):
        dataclasses.replace(EstimateConfig(), mfu=1.5)
