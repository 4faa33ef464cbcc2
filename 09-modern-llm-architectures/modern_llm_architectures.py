"""Topic 09 - Modern LLM Architectures: one decoder family that is Llama, Mistral, Qwen3, Mixtral and DeepSeek-V3.

python 09-modern-llm-architectures/modern_llm_architectures.py         # train one, save it, load it in transformers
python 09-modern-llm-architectures/modern_llm_architectures.py size    # what the published models cost
python 09-modern-llm-architectures/modern_llm_architectures.py generate --checkpoint path/to/a/folder --prompt "Once"
python 09-modern-llm-architectures/modern_llm_architectures.py --break switch-without-gate    # a failure, measured

Touvron et al. 2023 (Llama 2, arXiv 2307.09288), Jiang et al. 2023 (Mistral, arXiv 2310.06825), Yang et al. 2025 (Qwen3,
arXiv 2505.09388), Jiang et al. 2024 (Mixtral, arXiv 2401.04088), DeepSeek-AI 2024 (V3, arXiv 2412.19437).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from attention_mechanisms import causal_mask, document_mask
from fast_decoding import DecodePlan, can_plan
from gpt2 import SamplingConfig, check_prompt, check_text_ids, init_weights, keep_likely
from huggingface_folders import CONFIG, WEIGHTS, check_fit, joined, load_weights, read_config, read_weights
from latent_attention import LatentAttention
from llm_config import ModelConfig, config_from_folder, config_to_folder, folder_layout, with_generation_ends
from llm_generation import PromptConfig, encode_prompt, load_tokenizer, room_for, save_word_tokenizer, text_pieces
from llm_layers import (
    GroupedQueryAttention,
    KVCache,
    NormedAttention,
    RMSNorm,
    RotaryTable,
    Rotation,
    SoftCappedAttention,
    SwiGLU,
    attention_mask,
    soft_cap,
)
from mixture_of_experts import MixtureOfExperts, SigmoidRouter, SoftmaxRouter, load_balance_loss
from optimizers import shapes_alone
from packing import language_model_loss
from sequence_modeling import BOS_ID, EOS_ID, PAD_ID, sample_ids
from tiny_world import join
from training_transformers import TrainConfig, WorldBatches, fit, world_losses
from transformer_architecture import held_out_documents, tiny_world
from workbench import (
    RunConfig,
    alone,
    announce,
    check_range,
    largest_difference,
    pick_device,
    run_verbs,
    seed_everything,
    shown,
    write_atomically,
)

# The model


def make_attention(config: ModelConfig) -> nn.Module:
    """The attention that a config asks for."""
    if config.latent:
        return LatentAttention(config.d_model, config.n_heads, config.latent, config.rope_scaling.score_factor)
    sizes = (config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.use_bias)
    if config.qk_norm:
        return NormedAttention(*sizes, norm_eps=config.norm_eps)
    if config.attention_cap:
        attention = SoftCappedAttention(*sizes)
        attention.soft_cap = config.attention_cap
        return attention
    return GroupedQueryAttention(*sizes)


def make_ffn(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward network of a layer: one, or a mixture of experts."""
    experts = config.experts
    if experts is None or layer < experts.n_dense_layers:
        return SwiGLU(config.d_model, config.d_ff)
    if experts.router == "sigmoid":
        groups = (experts.n_groups, experts.n_active_groups, experts.scale)
        router = SigmoidRouter(config.d_model, experts.n_experts, experts.n_active_experts, *groups)
    else:
        router = SoftmaxRouter(config.d_model, experts.n_experts, experts.n_active_experts)
    return MixtureOfExperts(router, config.d_model, experts.d_expert, experts.d_shared, experts.capacity_factor)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). Shapes: (batch, seq, d_model) to the same."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm, self.self_attn = RMSNorm(config.d_model, config.norm_eps), make_attention(config)
        self.ffn_norm, self.ffn = RMSNorm(config.d_model, config.norm_eps), make_ffn(config, layer)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.attn_norm(x), rotation, mask, cache)  # (batch, seq, d_model)
        return x + self.ffn(self.ffn_norm(x))  # (batch, seq, d_model)


class CausalLM(nn.Module):
    """A decoder-only language model of the Llama family.

    Shapes: token_ids (batch, seq) to logits (batch, seq, vocab); position i sees the ids up to its own and predicts the
    next. With caches (from `new_caches`), token_ids holds only the new positions. is_real (batch, all positions so far)
    is False at padding; positions are then counted without it, so that left padding changes nothing. document_ids
    (batch, seq) numbers the documents of a packed row: each position sees its own document alone, and positions need
    not start again in each, because rotary scores depend on the distance of two positions only.
    Raises ValueError for an id outside the vocabulary, for more than max_seq_len positions (a model with dynamic
    scaling or a window reads on), for document_ids together with caches or is_real, and, in a model with sinks, for
    rows that do not begin with their text.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.padding_idx)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        d_rotary = config.latent.d_rope if config.latent else config.d_head
        self.rotary = RotaryTable(d_rotary, config.rope_theta, config.max_seq_len, config.rope_scaling)
        init_weights(self)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_emb.weight

    def forward(
        self,
        token_ids: Tensor,
        caches: list[KVCache] | None = None,
        is_real: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(token_ids, caches, is_real, document_ids))  # (batch, seq, vocab)

    def hidden(
        self,
        token_ids: Tensor,
        caches: list[KVCache] | None = None,
        is_real: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """The stream after the last norm: (batch, seq, d_model)."""
        if not isinstance(token_ids, Tensor) or token_ids.dim() != 2:
            check_text_ids(token_ids, self.config.vocab_size)
        if caches and len(caches) != len(self.blocks):
            raise ValueError(f"{len(caches)} caches for {len(self.blocks)} layers; take those of new_caches()")
        start, seq_len = len(caches[0]) if caches else 0, token_ids.shape[1]
        self.check(token_ids, start + seq_len, is_real, document_ids)
        if document_ids is not None and (caches or is_real is not None):
            raise ValueError("document_ids number the documents of packed training rows; leave out caches and is_real")
        x = self.token_emb(token_ids)  # (batch, seq, d_model)
        if is_real is None:
            rotation = self.rotary.span(start, seq_len, x)
        else:
            positions = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]  # (batch, seq)
            rotation = self.rotary.at(positions, x)
        masks: dict[tuple[int, int], Tensor | None] = {}
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            window, n_keys = self.config.window_of(layer), cache.n_keys(seq_len) if cache else seq_len
            if (window, n_keys) not in masks:
                masks[window, n_keys] = self.mask(seq_len, n_keys, window, is_real, document_ids, x.device)
            x = block(x, rotation, masks[window, n_keys], cache)  # (batch, seq, d_model)
        return self.final_norm(x)  # (batch, seq, d_model)

    def mask(
        self, n_query: int, n_key: int, window: int, is_real: Tensor | None, document_ids: Tensor | None, device
    ) -> Tensor | None:
        made = attention_mask(n_query, n_key, is_real, window, self.config.n_sinks)
        if document_ids is not None:
            made = document_mask(document_ids) & (
                causal_mask(n_key, device=device) if made is None else made.to(device)
            )
        return made if made is None else made.to(device)

    def check(
        self, token_ids: Tensor, n_positions: int, is_real: Tensor | None, document_ids: Tensor | None = None
    ) -> None:
        if token_ids.is_meta:
            return
        check_text_ids(token_ids, self.config.vocab_size)
        self.check_length(n_positions)
        if is_real is not None and is_real.dtype != torch.bool:
            raise ValueError(f"is_real must be bool, True at tokens and False at padding, got {is_real.dtype}")
        if document_ids is not None and document_ids.shape != token_ids.shape:
            raise ValueError(
                f"document_ids has shape {tuple(document_ids.shape)}, expected the ids' {tuple(token_ids.shape)}"
            )
        if is_real is not None and is_real.shape != (len(token_ids), n_positions):
            raise ValueError(
                f"is_real has shape {tuple(is_real.shape)}, expected (batch, all positions so far) = "
                f"{(len(token_ids), n_positions)}"
            )
        if self.config.n_sinks and (
            document_ids is not None or (is_real is not None and not bool(is_real[:, :1].all()))
        ):
            raise ValueError(
                f"the n_sinks={self.config.n_sinks} first places of a row are sinks, but padding on the left or "
                "another document stands there; give rows that begin with their text"
            )

    def check_length(self, n_positions: int) -> None:
        config = self.config
        if n_positions > config.max_seq_len and not config.window_size and config.rope_scaling.kind != "dynamic":
            raise ValueError(
                f"{n_positions} positions exceed max_seq_len {config.max_seq_len}; shorten the text, or raise "
                "max_seq_len and set rope_scaling"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return soft_cap(logits, self.config.logit_cap) if self.config.logit_cap else logits

    def new_caches(self) -> list[KVCache]:
        """An empty cache for each layer, rolling where the layer has a window."""
        windows = (self.config.window_of(layer) for layer in range(self.config.n_layers))
        return [KVCache(window, self.config.n_sinks if window else 0) for window in windows]

    def load_balance_loss(self, counted: Tensor | None = None) -> Tensor:
        """Of the last forward pass, over all layers with experts; counted (batch, seq), bool: no padding."""
        routings = [block.ffn.routing for block in self.blocks if isinstance(block.ffn, MixtureOfExperts)]
        if not routings:
            raise ValueError("this model has no experts to balance; set experts in its config")
        return load_balance_loss(routings, None if counted is None else counted.flatten())

    @torch.no_grad()
    def generate(
        self,
        token_ids: Tensor,
        sampling: SamplingConfig,
        is_real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts (batch, seq); rows of other lengths are padded on the left, where is_real is False.

        Returns the new ids (batch, at most max_new_tokens); after its end a row holds pad_id. Call `eval()` first.
        """
        steps = list(self.stream(token_ids, sampling, is_real, generator))
        return torch.cat([token_ids[:, :0], *steps], dim=1)

    @torch.no_grad()
    def stream(
        self,
        token_ids: Tensor,
        sampling: SamplingConfig,
        is_real: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, one step after the other: ids (batch, 1), as soon as they are chosen.

        The loop of topic 08's `extend`, for models with several ends, any of which ends a row.
        """
        check_prompt(token_ids, is_real)
        ends = torch.tensor([self.config.eos_id, *self.config.more_eos_ids], device=token_ids.device)
        ended = torch.zeros(len(token_ids), 1, dtype=torch.bool, device=token_ids.device)  # (batch, 1)
        steps = self.decoding(token_ids, token_ids.shape[1] + sampling.max_new_tokens, is_real)
        for _ in range(sampling.max_new_tokens):
            logits = steps(token_ids)  # (batch, vocab)
            if sampling.temperature > 0:
                logits = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)  # (batch, vocab)
            chosen = sample_ids(logits, 1.0 if sampling.temperature > 0 else 0.0, generator)  # (batch, 1)
            token_ids = chosen.masked_fill(ended, self.config.pad_id)  # (batch, *)
            yield token_ids
            ended = ended | torch.isin(token_ids, ends)  # (batch, 1)
            if ended.all():
                return

    def decoding(self, prompt: Tensor, most: int, is_real: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A function from the newest ids, the prompt first, to the logits (batch, vocab) of the next."""
        caches, seen, plan = self.new_caches(), is_real, None

        def next_logits(new_ids: Tensor) -> Tensor:
            nonlocal seen, plan
            if len(caches[0]) and plan is None and can_plan(self):
                plan = DecodePlan(self, caches, min(most, self.config.max_seq_len), is_real)
            if plan is not None:
                return self.logits(plan.step(new_ids))  # (batch, vocab)
            if seen is not None and len(caches[0]):
                seen = F.pad(seen, (0, 1), value=True)
            return self.logits(self.hidden(new_ids, caches, seen)[:, -1])  # (batch, vocab): the last position alone

        return next_logits

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model of a Llama, Mistral, Qwen3, Mixtral or DeepSeek-V3 folder, in float32, ready to evaluate.

        Raises ValueError for another kind of model, for a setting that this family does not know, and for tensors that
        do not fit, naming them; nothing is half loaded.
        """
        settings = read_config(folder)
        n_layers = settings.get("num_hidden_layers")
        if isinstance(n_layers, int) and n_layers > 10_000:  # before blocks are built that no weights can fill
            raise ValueError(f"num_hidden_layers={n_layers} is above 10,000; config.json of {folder} is damaged")
        config = config_from_folder(with_generation_ends(settings, folder))
        tensors, layout = read_weights(folder), folder_layout(config)
        with shapes_alone():  # sizes that no weights fill are refused before they take memory
            check_fit(cls(config), tensors, layout)
        model = cls(config)
        load_weights(model, tensors, layout)
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json as the family's own class in transformers would read them.

        Raises ValueError for a model that no family describes, such as one with attention sinks.
        """
        folder, ours = Path(folder), dict(self.named_parameters(remove_duplicate=False))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{shown(folder)} is a file; choose another folder to save to")
        tensors = {
            entry.key: joined([ours[name].detach() for name in entry.parts], entry).contiguous().cpu()
            for entry in folder_layout(self.config).tensors
        }
        kind = str(next(self.parameters()).dtype).removeprefix("torch.")
        text = json.dumps(config_to_folder(self.config) | {"dtype": kind, "torch_dtype": kind}, indent=2)
        write_atomically(folder / WEIGHTS, safetensors_bytes(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG, text.encode() + b"\n")


# The verbs


Failure = Literal["none", "bool-minus-infinity", "window-of-ones", "full-size-experts", "switch-without-gate"]


@dataclass(frozen=True)
class DemoConfig:
    break_: Failure = "none"  # a failure to show and measure, in place of the demo
    max_steps: int = 800  # optimizer steps
    learning_rate: float = 7e-3  # the peak
    d_model: int = 64  # width of the residual stream
    n_layers: int = 2  # blocks
    n_documents: int = 500  # held-out documents

    def __post_init__(self) -> None:
        check_range(self, "max_steps", "d_model", "n_layers", least=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "n_documents", least=2)


@alone
def demo(config: DemoConfig, run: RunConfig) -> None:
    """Train a small Qwen3 on TinyWorld, save it as a Hugging Face folder, and let transformers compute the same."""
    if config.break_ != "none":
        from modern_llm_failures import show  # here, because it imports this module

        what, sound, wrong = show(config.break_)
        print(f"{what}: {sound:.4g} as it should be, {wrong:.4g} with --break {config.break_}")
        return
    announce(f"train a model of {config.n_layers} blocks for {config.max_steps} steps", 0.055 * config.max_steps)
    seed_everything(run.seed)
    vocabulary, held_out = tiny_world()[1], held_out_documents(config.n_documents)
    d_head = max(2, config.d_model // 8 * 2)
    ids = {"pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID}
    sizes = (len(vocabulary), config.d_model, config.n_layers, 4, 2, d_head, 3 * config.d_model, 256)
    model = CausalLM(ModelConfig(*sizes, qk_norm=True, **ids))
    training = TrainConfig(max_steps=config.max_steps, learning_rate=config.learning_rate, warmup_steps=0)
    training = replace(training, warmup_steps=min(50, config.max_steps // 4))
    fit(model, WorldBatches(training, run.seed), language_model_loss, training)
    scores = world_losses(model.eval(), held_out, vocabulary)
    print(
        f"held-out loss {scores['held_out']:.4f} nats per token, {scores['gap']:.4f} ± {scores['gap_error']:.4f} above "
        f"the entropy floor (uniform guessing: {math.log(len(vocabulary)):.3f})"
    )
    generator = torch.Generator().manual_seed(run.seed)
    samples = model.generate(torch.full((3, 1), BOS_ID), SamplingConfig(60), generator=generator)
    for row in samples.tolist():
        print(f"  {join(vocabulary.decode(row[: row.index(EOS_ID)] if EOS_ID in row else row))}")
    print_cache(model)
    model.save_pretrained(run.out)
    save_word_tokenizer(run.out, vocabulary)
    print(f"saved in {shown(run.out)}; transformers' logits differ by {difference_from_library(model, run.out):.1e}")
    print(f'go on: python {shown(Path(__file__))} generate --checkpoint {shown(run.out)} --prompt "One morning"')


def print_cache(model: CausalLM) -> None:
    """What the keys and values of this model weigh, counted in its caches, beside one key-value head for each query."""
    from llm_calculators import kv_bytes_per_token

    config, caches, n_read = model.config, model.new_caches(), 100
    with torch.no_grad():
        model(torch.full((1, n_read), BOS_ID), caches)
    counted = sum(cache.n_bytes for cache in caches) / n_read
    full = kv_bytes_per_token(replace(config, n_kv_heads=config.n_heads), bytes_per_number=4)
    print(
        f"its caches grow by {counted:.0f} bytes for each token (float32): {config.n_heads} query heads share "
        f"{config.n_kv_heads} of keys and values; with {config.n_heads} it would be {full:.0f}"
    )


def difference_from_library(model: CausalLM, folder: Path) -> float:
    """The largest difference between our logits and those of transformers' class, loaded from the folder."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.arange(model.config.vocab_size)[:64][None]
    with torch.no_grad():
        return largest_difference(model(token_ids), theirs(token_ids).logits)


def generate(prompt: PromptConfig, sampling: SamplingConfig, run: RunConfig) -> None:
    """Continue a text with the model of a folder, word by word, until one of its ends or --max-new-tokens."""
    model, tokenizer = CausalLM.from_pretrained(prompt.checkpoint), load_tokenizer(prompt.checkpoint)
    model.to(pick_device(run.device))
    ids = encode_prompt(prompt.prompt, tokenizer, model)
    sampling = replace(sampling, max_new_tokens=room_for(model, len(ids), sampling.max_new_tokens))
    token_ids = torch.tensor([ids], device=pick_device(run.device))
    generator = torch.Generator(token_ids.device).manual_seed(run.seed)
    for piece in text_pieces(model.stream(token_ids, sampling, generator=generator), ids, tokenizer):
        print(piece, end="", flush=True)
    print()


@dataclass(frozen=True)
class SizeConfig:
    checkpoint: Path | None = None  # a folder whose config.json is read; without one, published models
    seq_len: int = 4096  # tokens of a sequence

    def __post_init__(self) -> None:
        check_range(self, "seq_len", least=1)


def size(config: SizeConfig) -> None:
    """What models cost: parameters, active parameters, FLOPs per token, cache bytes."""
    from llm_calculators import PUBLISHED, count_parameters, forward_flops, kv_bytes

    models = PUBLISHED
    if config.checkpoint:
        models = {shown(config.checkpoint): config_from_folder(read_config(config.checkpoint))}
    print(f"{'model':18} {'parameters':>16} {'active':>16} {'GFLOP/token':>12} {'weights':>9} {'cache':>9}")
    for name, model in models.items():
        counted, flops = count_parameters(model), forward_flops(model, config.seq_len)
        cache = kv_bytes(model, config.seq_len) / 2**20
        row = f"{counted.total:16,} {counted.active:16,} {sum(flops.values()) / 1e9:12.1f}"
        print(f"{name:18} {row} {2 * counted.total / 2**30:5.1f} GiB {cache:5.0f} MiB")
    print(f"bf16 weights and cache; one sequence of {config.seq_len} tokens, FLOPs are its mean, forward only")


def main(argv: list[str] | None = None) -> None:
    from modern_llm_bench import BenchConfig, bench  # here, because they import this module
    from modern_llm_experiments import FiguresConfig, figures

    verbs = {
        "demo": (demo, DemoConfig, RunConfig),
        "generate": (generate, PromptConfig, SamplingConfig, RunConfig),
        "size": (size, SizeConfig),
        "bench": (bench, BenchConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
