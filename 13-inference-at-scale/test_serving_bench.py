"""Topic 13 - Proofs of the bench: all systems answer the same requests with the same tokens, and times add up."""

import pytest
import torch

from modern_llm_architectures import CausalLM, ModelConfig
from serving_bench import Answers, Job, ServingBenchConfig, compare, measure, mixed_jobs

SMALL = ServingBenchConfig(
    n_requests=7, least_prompt=2, most_prompt=9, least_tokens=2, most_tokens=8, static_batch=3, n_rounds=1
)


def test_all_systems_make_the_same_tokens(tmp_path) -> None:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=53, d_model=24, n_layers=2, d_head=6, d_ff=28, max_seq_len=40)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    found = compare(SMALL, model, tmp_path, seed=1)
    assert len(found) == 5 and all(len(rounds) == 1 for rounds in found.values())
    for name, [measured] in found.items():
        assert measured.same == 1, name
        assert measured.tokens_per_second > 0
        assert 0 < measured.ttft["p50"] <= measured.ttft["p95"] <= measured.latency["p99"]


def test_measures_of_a_run_worked_by_hand() -> None:
    """Two answers: tokens at 0.2, 0.3 and 0.6 s; at 1.0 s."""
    jobs, ids = [Job([1], 3), Job([1], 1)], [[4, 5, 6], [7]]
    config = ServingBenchConfig(ttft_limit=0.5, tpot_limit=0.25)
    measured = measure(jobs, Answers(ids, [[0.2, 0.3, 0.6], [1.0]]), [[4, 5, 6], [8]], config)
    assert measured.tokens_per_second == 4 and measured.same == 0.5
    assert measured.goodput == 1  # the second came too late
    assert measured.ttft["p50"] == pytest.approx(0.6) and measured.latency["p50"] == pytest.approx(0.8)
    assert measured.tpot == pytest.approx(dict.fromkeys(("p50", "p95", "p99"), 0.2))
    with pytest.raises(ValueError, match="3 tokens were asked for, 2 came"):
        measure(jobs, Answers([[4, 5], [7]], [[0.2, 0.3], [1.0]]), ids, config)


def test_lengths_of_answers_have_a_heavy_tail_between_their_limits() -> None:
    config = ServingBenchConfig(n_requests=4000)
    jobs = mixed_jobs(config, 2048, seed=0)
    lengths = sorted(job.n_new for job in jobs)
    assert jobs == mixed_jobs(config, 2048, seed=0) != mixed_jobs(config, 2048, seed=1)
    assert lengths[0] == 4 and lengths[-1] > 90 and {len(job.prompt) for job in jobs} == set(range(8, 97))
    longer = sum(length >= 16 for length in lengths) / 4000
    wanted = (1 / 16 - 1 / 97) / (1 / 4 - 1 / 97)  # the law with exponent 1
    assert abs(longer - wanted) < 4 * (wanted * (1 - wanted) / 4000) ** 0.5
    with pytest.raises(ValueError, match="most_prompt must be finite and >= 8, got 7"):
        ServingBenchConfig(most_prompt=7)
