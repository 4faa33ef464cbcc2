"""Topic 09: the bench compares the same weights, the same tokens and the same lengths, and says so in ratios."""

import re

import pytest
import torch

from gpt2 import SamplingConfig
from modern_llm_architectures import main
from modern_llm_bench import (
    BenchConfig,
    decoding_works,
    kernel,
    measure_speed,
    rivals,
    score_matrix_attention,
    training_works,
)
from modern_llm_experiments import FiguresConfig
from workbench import RunConfig

SMALL = BenchConfig(32, 2, 2, 61, batch_size=2, seq_len=12, prompt_len=5, max_new_tokens=6, n_rounds=1)
RUN = RunConfig(device="cpu")


@pytest.fixture(scope="module")
def models():
    return rivals(SMALL, RUN)


def test_both_sides_have_the_same_weights_and_gradients(models, parity) -> None:
    token_ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    works = training_works(models, token_ids)  # without id 0, whose embedding theirs keeps from learning, as padding
    for work in works.values():
        work()
    parity("bench", "transformers, Llama", "output", models.ours(token_ids), models.llama(token_ids).logits, 1e-5)
    ours, theirs = models.ours.token_emb.weight.grad, models.llama.model.embed_tokens.weight.grad
    parity("bench", "transformers, Llama", "gradient", ours, theirs, 1e-5)
    assert models.gpt2.config.n_layer == 2 and models.gpt2.config.n_embd == 32
    assert list(works) == ["ours", "llama", "gpt2"]


def test_both_sides_generate_the_same_tokens_to_the_full_length(models) -> None:
    prompts = torch.randint(61, (3, 5), generator=torch.Generator().manual_seed(1))
    works = decoding_works(models, prompts, 6)
    got, wanted = works["ours"](), works["llama"]()[:, 5:]
    assert torch.equal(got, wanted) and got.shape == (3, 6) and models.ours.config.eos_id >= SMALL.vocab_size
    assert torch.equal(got, models.ours.generate(prompts, SamplingConfig(6, 0.0)))


def test_results_are_ratios_with_their_spread() -> None:
    found = measure_speed(SMALL, RUN)
    ratios = [text for name, text in found.items() if "share" not in name]
    assert len(found) == 5 and all(re.match(r"\d+\.\d\dx the speed \(.* in 1 rounds\)", text) for text in ratios)
    assert re.match(r"\d+% of \d+ GFLOP/s", found["training step, share of the matmul peak"])


def test_bad_shapes_are_refused(capsys) -> None:
    for flags, message in (
        (["--d-model", "30"], "d_model=30 must be a multiple of 2 * n_heads=16"),
        (["--n-rounds", "0"], "n_rounds must be finite and >= 1"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["bench", *flags])
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_rival_of_the_kernel_is_causal_attention(parity) -> None:
    q, k, v = (torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = score_matrix_attention(q, k, v)
    parity("score_matrix_attention", "F.scaled_dot_product_attention", "output", got, wanted, 1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would measure")
def test_without_a_gpu_the_kernel_s_numbers_stay(tmp_path, capsys) -> None:
    kernel(FiguresConfig(folder=tmp_path), RUN)
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
