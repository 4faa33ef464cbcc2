"""Topic 09 - Bench: our training step and our decoding beside transformers' models of the same shape, in one run.

python 09-modern-llm-architectures/modern_llm_architectures.py bench                   # ratios and their spread
python 09-modern-llm-architectures/modern_llm_architectures.py bench --d-model 512     # another shape

Everything is timed in turns, so that a busy moment of the machine hits ours and theirs alike. The measured peak is the
best rate of one large float32 product on this machine, in the same run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2 import GPT2, GPT2Config, SamplingConfig
from llm_calculators import forward_flops
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from workbench import (
    Column,
    RunConfig,
    announce,
    check_range,
    describe_machine,
    pick_device,
    seed_everything,
    speed_ratio,
    time_in_turns,
)

if TYPE_CHECKING:
    from modern_llm_experiments import FiguresConfig


@dataclass(frozen=True)
class BenchConfig:
    """What is timed; the shape of both models is the same."""

    d_model: int = 256  # width of the residual stream
    n_layers: int = 6  # blocks
    n_heads: int = 8  # query heads, and key-value heads
    vocab_size: int = 4096  # tokens
    batch_size: int = 4  # rows of a training step
    seq_len: int = 256  # tokens in a row of a training step
    prompt_len: int = 16  # tokens of a prompt
    max_new_tokens: int = 48  # tokens that are generated
    n_rounds: int = 5  # timed rounds

    def __post_init__(self) -> None:
        names = ("d_model", "n_layers", "n_heads", "vocab_size", "batch_size", "seq_len", "prompt_len", "n_rounds")
        check_range(self, *names, least=1)
        check_range(self, "max_new_tokens", least=2)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}")

    @property
    def model(self) -> ModelConfig:
        """A Llama whose SwiGLU has about the parameters of a GPT-2 block's network, to the next multiple of 16."""
        d_ff, length = round(8 * self.d_model / 3 / 16) * 16, max(self.seq_len, self.prompt_len + self.max_new_tokens)
        heads = (self.n_heads, self.n_heads, self.d_model // self.n_heads)
        return ModelConfig(self.vocab_size, self.d_model, self.n_layers, *heads, d_ff, length, eos_id=NO_END)


NO_END = 2**31 - 1  # an id that no vocabulary has: nothing ends early


class Rivals(NamedTuple):
    """Our model and transformers', the same weights in both, and a GPT-2 of theirs of the same shape."""

    ours: CausalLM
    llama: nn.Module
    gpt2: nn.Module


def rivals(config: BenchConfig, run: RunConfig) -> Rivals:
    """Build them: their Llama from the folder that ours saves, their GPT-2 from one that topic 08's saves."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    seed_everything(run.seed)
    device, sizes = pick_device(run.device), config.model
    gpt2 = GPT2(
        GPT2Config(sizes.vocab_size, sizes.max_seq_len, sizes.d_model, sizes.n_layers, sizes.n_heads, dropout=0)
    )
    models: list[nn.Module] = [CausalLM(sizes).to(device)]
    for model in (models[0], gpt2):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        models.append(theirs.to(device))
    return Rivals(*models)


def training_step(model: nn.Module, token_ids: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(logits_of(token_ids).flatten(0, 1), token_ids.flatten()).backward()


def training_works(models: Rivals, token_ids: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward pass; the optimizer is the same for all and left out."""
    theirs = {"llama": models.llama, "gpt2": models.gpt2}
    works = {"ours": lambda: training_step(models.ours, token_ids, models.ours)}
    for name, model in theirs.items():
        works[name] = lambda model=model: training_step(
            model, token_ids, lambda ids: model(input_ids=ids, use_cache=False).logits
        )
    return works


def decoding_works(models: Rivals, prompts: Tensor, n_new: int) -> dict[str, Callable[[], object]]:
    """Greedy generation of n_new tokens with a cache, the prompt included, by our model and by theirs."""
    rule = {"do_sample": False, "max_new_tokens": n_new, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    return {
        "ours": lambda: models.ours.generate(prompts, SamplingConfig(n_new, temperature=0)),
        "llama": lambda: models.llama.generate(prompts, attention_mask=mask, **rule),
    }


def peak_work(device: torch.device, size: int = 1024) -> tuple[Callable[[], object], float]:
    """One large product, and its FLOPs."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return lambda: left @ right, 2.0 * size**3


def measure_speed(config: BenchConfig, run: RunConfig) -> dict[str, str]:
    """What was compared, and the result in words; both sides have generated the same tokens before they are timed."""
    models, sizes = rivals(config, run), config.model
    device = pick_device(run.device)
    rows = torch.randint(sizes.vocab_size, (config.batch_size, config.seq_len), device=device)
    works: dict[str, Callable[[], object]] = {}
    for name, work in training_works(models, rows).items():
        works[f"train {name}"] = work
    batches = (1, 16)
    for batch_size in batches:
        prompts = torch.randint(sizes.vocab_size, (batch_size, config.prompt_len), device=device)
        pair = decoding_works(models, prompts, config.max_new_tokens)
        if not torch.equal(pair["ours"](), pair["llama"]()[:, config.prompt_len :]):
            raise ValueError("the two libraries chose different tokens; their speed cannot be compared")
        works |= {f"decode {batch_size} {name}": work for name, work in pair.items()}
    works["peak"], peak_flops = peak_work(device)
    seconds = time_in_turns(works, config.n_rounds)
    peak = peak_flops / min(seconds["peak"])
    flops = 3 * sum(forward_flops(sizes, config.seq_len).values()) * config.batch_size * config.seq_len
    found = {
        "training step, against transformers' Llama": speed_ratio(seconds["train ours"], seconds["train llama"]),
        "training step, against transformers' GPT-2": speed_ratio(seconds["train ours"], seconds["train gpt2"]),
        "training step, share of the matmul peak": f"{flops / np.median(seconds['train ours']) / peak:.0%}"
        f" of {peak / 1e9:.0f} GFLOP/s (transformers' Llama: {flops / np.median(seconds['train llama']) / peak:.0%})",
    }
    for batch_size in batches:
        ours, theirs = (seconds[f"decode {batch_size} {name}"] for name in ("ours", "llama"))
        rate = batch_size * config.max_new_tokens / np.median(ours)
        against = f"greedy decoding, batch {batch_size}, against transformers' generate"
        found[against] = f"{speed_ratio(ours, theirs)}; {rate:,.0f} tokens/s"
    return found


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Time training and greedy decoding beside transformers' models of the same shape, in one run."""
    announce("time a training step and decoding beside transformers' Llama and GPT-2", 60)
    print(describe_machine())
    for name, result in measure_speed(config, run).items():
        print(f"{name.replace(', against ', ' beside ')}: {result}")


def speed(config: "FiguresConfig", run: RunConfig) -> None:
    """The bench, as the chapter's table."""
    rows = [[name, result] for name, result in measure_speed(BenchConfig(), run).items()]
    config.save("speed", [Column("Compared"), Column("result")], rows, "speed", n_seeds=1)


def kernel(config: "FiguresConfig", run: RunConfig) -> None:
    """Our Triton kernels beside PyTorch's FlashAttention and the score matrix, causal, bfloat16; needs a GPU."""
    if not torch.cuda.is_available():
        print("kernel: there is no GPU here; the table keeps the numbers of the last one")
        return
    from triton.testing import do_bench

    from flash_kernel import flash_kernel

    batch_size, n_heads, d_head, rows = 4, 16, 64, []
    for seq_len in (1024, 2048, 4096, 8192):
        shape = (batch_size, n_heads, seq_len, d_head)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        works = {
            "ours": lambda q=q, k=k, v=v: flash_kernel(q, k, v, causal=True),
            "flash": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        if seq_len <= 4096:  # longer, the scores and their gradient do not fit well
            works["scores"] = lambda q=q, k=k, v=v: score_matrix_attention(q, k, v)
        cells: dict[str, tuple[float | str, float | str]] = {"scores": ("-", "-")}
        for name, work in works.items():
            forward = do_bench(work, warmup=20, rep=60, return_mode="median")
            both = do_bench(
                lambda work=work, q=q, k=k, v=v: torch.autograd.grad(work(), (q, k, v), q.detach()),
                warmup=20,
                rep=60,
                return_mode="median",
            )
            cells[name] = (forward, both)
        error = ((works["ours"]().float() - exact).norm() / exact.norm()).item()
        rate = 2 * batch_size * n_heads * seq_len**2 * d_head / cells["ours"][0] / 1e9
        rows.append([seq_len, *(cells[name][0] for name in ("ours", "flash", "scores")), rate])
        rows[-1] += [*(cells[name][1] for name in ("ours", "flash", "scores")), error]
    save_kernel(config, rows)


def save_kernel(config: "FiguresConfig", rows: list[list]) -> None:
    ways = ("ours", "PyTorch's", "matrix")
    columns = [Column("Keys", digits=",d"), *(Column(f"Forward, {way}", "ms", ".3f") for way in ways)]
    columns += [Column("Ours", "TFLOP/s", ".0f"), *(Column(f"Both, {way}", "ms", ".2f") for way in ways)]
    columns += [Column("Error", digits=".1e")]
    config.save("kernel", columns, rows, "kernel", n_seeds=1)


def score_matrix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention that writes all scores to memory."""
    scores = (q @ k.mT) / q.shape[-1] ** 0.5  # (batch, heads, query, key)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)  # (query, key)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v


BENCH_EXPERIMENTS = {"speed": (speed, 60), "kernel": (kernel, 30)}
