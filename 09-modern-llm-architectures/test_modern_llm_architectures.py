"""Topic 09: the decoder family against Llama, Mistral, Qwen3, Mixtral and DeepSeek-V3 of transformers, both ways."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import latent_attention
import llm_layers
import mixture_of_experts
import modern_llm_architectures as topic
from gpt2 import SamplingConfig, left_padded
from huggingface_folders import read_config
from latent_attention import LatentConfig
from llm_calculators import PUBLISHED
from llm_config import (
    EXPERT_NAMES,
    FAMILIES,
    LATENT_NAMES,
    REQUIRED,
    ExpertConfig,
    config_from_folder,
    config_to_folder,
    folder_layout,
)
from llm_layers import RopeScaling
from modern_llm_architectures import CausalLM, ModelConfig

SIZES = dict(vocab_size=67, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
COMMON = {**SIZES, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LATENT = dict(kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=10, qk_nope_head_dim=12)
EXPERTS = dict(moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2)
DEEPSEEK = {**COMMON, **LATENT, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, rms_norm_eps=1e-5),
    "llama, one key-value head, bias, tied": LlamaConfig(
        **{**COMMON, "num_key_value_heads": 1}, attention_bias=True, tie_word_embeddings=True
    ),
    "llama, linear": LlamaConfig(  # and no filler is named
        **COMMON | {"pad_token_id": None},
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ),
    "llama, dynamic": LlamaConfig(
        **{**COMMON, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    ),
    "llama, yarn": LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama, llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "mistral, window": MistralConfig(**COMMON, sliding_window=7),
    "qwen3": Qwen3Config(**COMMON, head_dim=16, attention_bias=True, rms_norm_eps=1e-3),
    "qwen3, some layers with a window": Qwen3Config(
        **COMMON, head_dim=16, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK, n_group=4, topk_group=2, q_lora_rank=20),
    "deepseek_v3, yarn, plain queries": DeepseekV3Config(
        **DEEPSEEK,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
}
DECODED = 20  # tokens: beyond the windows, and beyond the 16 positions of the dynamic scaling


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def theirs_from(config_or_folder, dtype=torch.float64):
    load = (
        AutoModelForCausalLM.from_pretrained if isinstance(config_or_folder, Path) else AutoModelForCausalLM.from_config
    )
    return load(config_or_folder, dtype=torch.float32, experts_implementation="eager").eval().to(dtype)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random weights in both libraries, in float64, through a folder that theirs saved."""
    torch.manual_seed(5)
    theirs, folder = theirs_from(CONFIGS[request.param], torch.float32), tmp_path_factory.mktemp("theirs")
    for parameter in theirs.parameters():  # norms start at 1 and biases at 0, which would hide a swapped name
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn_like(buffer))
    theirs.save_pretrained(folder)
    return request.param, CausalLM.from_pretrained(folder).double(), theirs.double(), folder


def some_ids(batch: int = 2, seq: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 67, (batch, seq), generator=torch.Generator().manual_seed(seed))


# Against transformers


def test_logits_and_loss_equal_theirs(pair, parity) -> None:
    name, ours, theirs, _ = pair
    token_ids = some_ids()
    wanted = theirs(token_ids, labels=token_ids)
    logits = ours(token_ids)
    parity(f"CausalLM ({name})", "transformers", "output", logits, wanted.logits, 1e-10)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    parity(f"CausalLM ({name})", "transformers", "output", loss, wanted.loss, 1e-6)  # theirs is a float32 mean


def test_gradients_equal_theirs(pair, parity) -> None:
    name, ours, theirs, _ = pair
    token_ids = some_ids(seed=1)
    token_ids[:, :3] = torch.arange(3)  # filler, beginning and end: a named filler learns from no lookup
    mix = torch.randn(2, 13, 67, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for model in (ours, theirs):
        model.zero_grad()
        logits = model(token_ids)
        (mix * (logits if model is ours else logits.logits)).sum().backward()
    grads = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    mine = {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
    total, wanted = (sum(grad.square().sum() for grad in part.values()) for part in (mine, grads))
    parity(f"CausalLM ({name})", "transformers", "gradient", total / wanted, torch.ones_like(total), 1e-10)
    parts = folder_layout(ours.config).tensors
    named = {entry.key: mine[entry.parts[0]] for entry in parts if entry.parts[0] in mine}
    same = [key for key in named if key in grads]
    assert len(same) >= 3 * 3 + 2  # all but the experts, which theirs keep in one tensor in memory
    parity(
        f"CausalLM ({name})",
        "transformers",
        "gradient",
        {key: named[key] for key in same},
        {key: grads[key] for key in same},
        1e-10,
    )


def test_greedy_decoding_with_a_cache_equals_theirs_token_for_token(pair, parity) -> None:
    name, ours, theirs, _ = pair
    token_ids = some_ids(batch=3, seq=9)
    options = dict(max_new_tokens=DECODED, do_sample=False, attention_mask=torch.ones_like(token_ids))
    wanted = theirs.generate(token_ids, **options)[:, 9:]
    got = ours.generate(token_ids, SamplingConfig(DECODED, 0.0))
    parity(f"CausalLM ({name})", "transformers generate, tokens", "output", got, wanted, 0)


def test_left_padding_changes_nothing(pair, parity) -> None:
    name, ours, theirs, _ = pair
    prompts = [some_ids(1, length, seed=length)[0].tolist() for length in (4, 11, 7)]
    token_ids, is_real = left_padded(prompts, 0)
    got = ours.generate(token_ids, SamplingConfig(DECODED, 0.0), is_real)
    wanted = theirs.generate(token_ids, attention_mask=is_real.long(), max_new_tokens=DECODED, do_sample=False)
    parity(f"CausalLM ({name})", "transformers generate, left padding", "output", got, wanted[:, 11:], 0)
    for row, prompt in enumerate(prompts):
        alone = ours(torch.tensor([prompt]))
        together = ours(token_ids, is_real=is_real)[row : row + 1, -len(prompt) :]
        if "dynamic" not in name:  # theirs and ours stretch by the longest row of a batch
            parity(
                f"CausalLM ({name})", "the same prompt alone", "invariant", together, alone, 1e-6
            )  # norms are float32


def test_cached_equals_uncached_in_chunks_of_any_size(pair, parity) -> None:
    name, ours, _, _ = pair
    token_ids, caches = some_ids(2, 15, seed=7), ours.new_caches()
    with torch.no_grad():
        whole = ours(token_ids)
        parts = [
            ours(token_ids[:, start:stop], caches) for start, stop in ((0, 5), (5, 6), (6, 11), (11, 12), (12, 15))
        ]
    parity(f"CausalLM ({name})", "uncached", "invariant", torch.cat(parts, dim=1), whole, 1e-6)


def test_documents_packed_in_one_row_do_not_see_each_other(pair, parity) -> None:
    name, ours, _, _ = pair
    first, second = some_ids(1, 5), some_ids(1, 8, seed=3)
    row, numbers = torch.cat([first, second], dim=1), torch.tensor([[1] * 5 + [2] * 8])
    apart = torch.cat([ours(first), ours(second)], dim=1)
    parity(
        f"CausalLM ({name}) packed", "each document alone", "invariant", ours(row, document_ids=numbers), apart, 1e-6
    )
    assert (ours(row) - apart)[:, 5:].abs().max() > 1e-3  # without the numbers the second reads the first


def test_the_future_cannot_change_the_past(pair) -> None:
    _, ours, _, _ = pair
    token_ids = some_ids()
    changed = token_ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 67
    before, after = ours(token_ids), ours(changed)
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8:], after[:, 8:])


def test_folders_go_both_ways(pair, parity, tmp_path) -> None:
    name, ours, theirs, folder = pair
    saved = CausalLM.from_pretrained(folder)
    saved.save_pretrained(tmp_path)
    back = theirs_from(tmp_path)
    assert type(back) is type(theirs)
    token_ids = some_ids()
    parity(
        f"CausalLM ({name})",
        "our folder in AutoModelForCausalLM",
        "exchange",
        saved.double()(token_ids),
        back(token_ids).logits,
        1e-10,
    )
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    absurd = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(absurd))
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000 is above 10,000"):
        CausalLM.from_pretrained(tmp_path)


def test_half_precision_is_saved_as_it_is_and_read_in_full(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "d_model": 48, "n_layers": 1, "d_head": 12, "d_ff": 20}
    model = CausalLM(ModelConfig(**sizes, experts=ExpertConfig(4, 2, 20))).bfloat16()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", experts_implementation="eager")
    logits = model(some_ids())
    assert logits.dtype == torch.bfloat16 and torch.allclose(logits, theirs(some_ids()).logits, atol=0.01)
    back = CausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16 and back.token_emb.weight.dtype == torch.float32
    n_bytes = (tmp_path / "model.safetensors").stat().st_size  # two for each number, and the names of the tensors
    assert n_bytes < 3 * sum(parameter.numel() for parameter in model.parameters())
    for ours, saved in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, saved.float())


def test_float32_logits_are_as_close(pair, parity) -> None:
    name, _, _, folder = pair
    token_ids = some_ids(seed=4)
    ours, theirs = CausalLM.from_pretrained(folder), theirs_from(folder, torch.float32)
    parity(f"CausalLM ({name})", "transformers, float32", "output", ours(token_ids), theirs(token_ids).logits, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_ten_training_steps_follow_theirs(name: str, tmp_path, parity) -> None:
    torch.manual_seed(0)
    theirs_from(CONFIGS[name], torch.float32).save_pretrained(tmp_path)
    models = (CausalLM.from_pretrained(tmp_path).double(), theirs_from(tmp_path))
    losses: tuple[list[float], list[float]] = ([], [])
    for model, history in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for step in range(10):
            token_ids = some_ids(seed=step)
            logits = model(token_ids) if model is models[0] else model(token_ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    parity(f"CausalLM ({name})", "transformers, 10 steps of AdamW", "trajectory", losses[0], losses[1], 1e-6)


def test_the_balance_loss_equals_theirs(tmp_path, parity) -> None:
    torch.manual_seed(1)
    theirs_from(CONFIGS["mixtral"], torch.float32).save_pretrained(tmp_path)
    ours, theirs = CausalLM.from_pretrained(tmp_path), theirs_from(tmp_path, torch.float32)
    token_ids, counted = some_ids(3, 11), torch.ones(3, 11, dtype=torch.bool)
    counted[1, 7:] = False
    wanted = theirs(token_ids, output_router_logits=True, attention_mask=torch.ones_like(token_ids)).aux_loss
    ours(token_ids)
    parity("load_balance_loss", "transformers", "output", ours.load_balance_loss(), wanted, 1e-6)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(block.ffn.routing.logits for block in ours.blocks)
    masked = load_balancing_loss_func(logits, 4, 2, counted.long())
    parity("load_balance_loss", "transformers, padded", "output", ours.load_balance_loss(counted), masked, 1e-6)


# Against itself


def test_a_rolling_cache_keeps_what_its_window_needs(parity) -> None:
    config = ModelConfig(vocab_size=67, d_model=48, n_layers=2, d_head=12, window_size=6, n_sinks=2, max_seq_len=32)
    torch.manual_seed(3)
    model, token_ids = CausalLM(config).double(), some_ids(2, 40)
    caches = model.new_caches()
    with torch.no_grad():
        parts = [model(token_ids[:, step : step + 1], caches) for step in range(40)]
        parity("KVCache with window and sinks", "uncached", "invariant", torch.cat(parts, 1), model(token_ids), 1e-7)
    assert caches[0].n_kept <= 2 + 6 and len(caches[0]) == 40
    assert (
        caches[0].n_bytes == 2 * 2 * 2 * caches[0].n_kept * 12 * 8
    )  # batch, k and v, kv heads, positions, width, fp64


def test_sinks_are_the_first_tokens_of_a_text_or_refused() -> None:
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_head=12, window_size=4, n_sinks=2))
    token_ids = some_ids(2, 9)
    right = torch.ones(2, 9, dtype=torch.bool)
    right[1, 6:] = False
    alone = model(token_ids[1:, :6])
    assert torch.allclose(model(token_ids, is_real=right)[1:, :6], alone, atol=1e-6)
    for options in ({"is_real": right.flip(1)}, {"document_ids": right.long()}):
        with pytest.raises(ValueError, match="the n_sinks=2 first places of a row are sinks"):
            model(token_ids, **options)


def test_a_model_can_be_copied_after_a_training_step() -> None:
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=2, d_head=12, experts=ExpertConfig(4, 2, 20)))
    model(some_ids()).sum().backward()
    copied = deepcopy(model)
    assert torch.equal(copied(some_ids()), model(some_ids())) and copied.blocks[0].ffn.routing is not None


@torch.no_grad()
def test_a_padded_row_decodes_through_a_rolling_cache_as_it_does_alone(parity) -> None:
    torch.manual_seed(4)
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=2, d_head=12, window_size=5)).double()
    for parameter in model.parameters():  # attention that matters
        parameter.add_(0.1 * torch.randn_like(parameter))
    prompts, new_ids = [some_ids(1, length, seed=length)[0].tolist() for length in (2, 9)], some_ids(2, 8, seed=1)
    (token_ids, is_real), caches = left_padded(prompts, 0), model.new_caches()
    logits = [model(token_ids, caches, is_real)[:, -1]]
    for step in range(8):
        is_real = F.pad(is_real, (0, 1), value=True)
        logits.append(model(new_ids[:, step : step + 1], caches, is_real)[:, -1])
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt + new_ids[row].tolist()]))[0, -9:]
        together = torch.stack(logits, dim=1)[row]
        parity("rolling cache, left padding", "the row alone, uncached", "invariant", together, alone, 1e-6)


def test_a_cache_holds_what_was_appended_however_often_it_grew() -> None:
    k, v = (torch.randn(2, 3, 80, width, generator=torch.Generator().manual_seed(width)) for width in (4, 5))
    for chunks in ([1] * 80, [7, 30, 1, 42], [80]):
        cache, start, sizes = llm_layers.KVCache(), 0, set()
        for size in chunks:
            kept = cache.append(k[:, :, start : start + size], v[:, :, start : start + size])
            start += size
            assert torch.equal(kept[0], k[:, :, :start]) and torch.equal(kept[1], v[:, :, :start])
            sizes.add(cache.buffers[0].shape[2])
        assert len(cache) == 80 and len(sizes) <= 3  # they double: a step does not copy all that is kept
    rolling = llm_layers.KVCache(window_size=6)
    for place in range(12):
        rolling.append(k[:, :, place : place + 1], v[:, :, place : place + 1])
    with pytest.raises(ValueError, match="a windowed cache that has dropped positions cannot be cropped"):
        rolling.crop(10)


@torch.no_grad()
def test_decoding_one_position_makes_no_key_and_a_longer_call_does(monkeypatch) -> None:
    attention, called = latent_attention.LatentAttention(48, 4, LatentConfig(0, 16, 12, 8, 10)), []
    for name in ("mix_expanded", "mix_absorbed"):
        mix = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, mix=mix, name=name: called.append(name) or mix(*args))
    table, cache, x = llm_layers.RotaryTable(8, 1e4, 32), llm_layers.KVCache(), torch.randn(2, 6, 48)
    attention(x, table.span(0, 6, x), None, cache)
    attention(x[:, :1], table.span(6, 1, x), None, cache)
    attention(x[:, :1], table.span(0, 1, x))
    assert called == ["mix_expanded", "mix_absorbed", "mix_expanded"]


def test_the_first_tokens_stay_visible_and_the_middle_does_not() -> None:
    mask = llm_layers.attention_mask(9, 9, None, window_size=3, n_sinks=2)
    assert mask[8].tolist() == [True, True, False, False, False, False, True, True, True]
    assert mask[0].tolist() == [True] + [False] * 8


def test_caches_can_be_cropped_and_reordered(parity) -> None:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=2, d_head=12)).double()
    token_ids, caches = some_ids(2, 9), model.new_caches()
    with torch.no_grad():
        model(token_ids, caches)
        for cache in caches:
            cache.crop(5)
            cache.select([1, 0])
        got = model(token_ids[[1, 0]][:, 5:], caches)
        parity("KVCache, cropped and reordered", "uncached", "invariant", got, model(token_ids)[[1, 0]][:, 5:], 1e-7)
    for n_positions in (99, -1):
        with pytest.raises(ValueError, match=rf"n_positions={n_positions} must be in 0\.\.9"):
            caches[0].crop(n_positions)


def test_a_call_of_several_positions_without_a_mask_is_aligned_at_the_last_key(parity) -> None:
    """PyTorch's own causal mask is aligned at the first key."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 5)
    mask = llm_layers.key_distance(3, 7) >= 0
    got, expected = (llm_layers.attend(q, k, v, given, 0.3) for given in (None, mask))
    parity("attend, 3 queries of 7", "the mask written out", "invariant", got, expected, 1e-7)
    table, x = llm_layers.RotaryTable(8, 1e4, 32), torch.randn(2, 7, 48)
    grouped, latent = (
        llm_layers.GroupedQueryAttention(48, 4, 2, 8),
        latent_attention.LatentAttention(48, 4, LatentConfig(0, 16, 12, 8, 10)),
    )
    for attention in (grouped, latent):
        cache = llm_layers.KVCache()
        steps = [
            attention(x[:, part], table.span(part.start, part.stop - part.start, x), None, cache)
            for part in (slice(0, 4), slice(4, 7))
        ]
        whole = attention(x, table.span(0, 7, x))
        parity(f"{type(attention).__name__}, two calls", "one call", "invariant", torch.cat(steps, dim=1), whole, 1e-6)


def test_a_model_trains_after_a_look_in_inference_mode() -> None:
    """The rotary table is made in the first call, and kept."""
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_head=12))
    with torch.inference_mode():
        model(some_ids())
    model(some_ids()).sum().backward()
    assert model.token_emb.weight.grad.isfinite().all()


def test_a_dynamic_table_is_kept_for_one_long_length_only() -> None:
    table = llm_layers.RotaryTable(8, 1e4, 16, RopeScaling("dynamic", 2.0))
    for last in (5, 20, 21, 22):  # one for all lengths of training, and that of 22
        table.rows(last, torch.zeros(1))
    assert len(table.tables) == 2


def test_shape_comments_hold(checked_shapes) -> None:
    torch.manual_seed(0)
    modules = (topic, llm_layers, latent_attention, mixture_of_experts)
    with checked_shapes(*modules) as checked:
        for name in ("llama, yarn", "llama, llama3", "mistral, window", "qwen3", "mixtral", "deepseek_v3"):
            model = CausalLM(config_from_folder(CONFIGS[name].to_dict()))
            model.generate(some_ids(), SamplingConfig(3, 0.0))
            model(some_ids(), is_real=torch.ones(2, 13, dtype=torch.bool))
        CausalLM(ModelConfig(vocab_size=67, d_model=48, d_head=12, attention_cap=5.0))(some_ids())
    for module in modules:
        assert any(where.startswith(module.__file__) for where in checked), module


def test_document_ids_are_for_packed_rows_only() -> None:
    model, ids = CausalLM(ModelConfig()), torch.ones(1, 3, dtype=torch.long)
    for options in ({"caches": model.new_caches()}, {"is_real": ids > 0}):
        with pytest.raises(ValueError, match="leave out caches"):
            model(ids, **options, document_ids=ids)


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model, token_ids = CausalLM(ModelConfig(vocab_size=301, d_model=64, d_head=16)), torch.randint(0, 301, (4, 33))
    loss = F.cross_entropy(model(token_ids)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(301.0).log().item(), abs=0.05)


@pytest.mark.parametrize("cap", [0.7, 5.0])
def test_capped_attention_equals_gemma_2(cap: float, parity) -> None:
    """At 13 keys a cap of 0.7 bends nearly every score, one of 5 hardly any."""
    torch.manual_seed(2)
    sizes = dict(SIZES, num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=10, attn_logit_softcapping=cap)
    theirs = Gemma2Attention(Gemma2Config(**sizes, attn_implementation="eager"), layer_idx=1).double()
    ours = llm_layers.SoftCappedAttention(48, 4, 2, 10).double()
    ours.soft_cap = cap
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        weight = getattr(theirs, name.replace("out", "o")).weight
        weight.data = 0.25 * torch.randn_like(weight)
        getattr(ours, name).weight = weight
    x = torch.randn(3, 13, 48, dtype=torch.float64, requires_grad=True)
    cos, sin = llm_layers.RotaryTable(10, 1e4, 32).span(0, 13, x)
    both = tuple(torch.cat([part, part], dim=-1)[0] for part in (cos, sin))  # theirs: (1, seq, d_head)
    future = torch.full((13, 13), -torch.inf, dtype=torch.float64).triu(1)
    got, wanted = ours(x, (cos, sin)), theirs(x, both, future)[0]
    parity(
        "SoftCappedAttention", "transformers, Gemma2Attention", "output", got, wanted, 1e-6
    )  # their softmax: float32
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, wanted)]
    parity("SoftCappedAttention", "transformers, Gemma2Attention", "gradient", *grads, 1e-4)
    plain = llm_layers.GroupedQueryAttention(48, 4, 2, 10).double()
    plain.load_state_dict(ours.state_dict())
    assert (plain(x, (cos, sin)) - got).abs().max() > 1e-3


def test_soft_caps_bound_scores_and_logits() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=67, d_model=48, d_head=12, attention_cap=1e9, logit_cap=2.0)
    capped = CausalLM(config)
    plain = CausalLM(replace(config, attention_cap=0.0, logit_cap=0.0))
    capped.lm_head.weight.data *= 50
    plain.load_state_dict(capped.state_dict())
    assert capped(some_ids()).abs().max() <= 2 < plain(some_ids()).abs().max()
    assert torch.allclose(capped(some_ids()), llm_layers.soft_cap(plain(some_ids()), 2.0), atol=1e-4)


# What a config.json leaves out, or says in an older way


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "mixtral", "deepseek_v3"])
def test_an_absent_key_means_what_it_means_to_transformers(kind: str, tmp_path) -> None:
    """Every key is taken out of a folder's file, one after the other."""
    heads = {"num_attention_heads": 32 if kind == "qwen3" else 8, "num_key_value_heads": 4}
    window = {"head_dim": 16, "use_sliding_window": True} if kind == "qwen3" else {}
    given, n_compared = AutoConfig.for_model(kind, **SIZES | heads | window).to_dict(), 0
    words = [("", *pair) for pair in FAMILIES[kind].names.items()]
    words += [("experts", *pair) for pair in EXPERT_NAMES.get(kind, {}).items()]
    words += [("latent", *pair) for pair in LATENT_NAMES.items()] if kind == "deepseek_v3" else []
    words = [pair for pair in words if kind != "deepseek_v3" or pair[1] != "n_kv_heads"]  # latent attention has none
    for key in {theirs for *_, theirs in words} - set(REQUIRED):
        (tmp_path / "config.json").write_text(json.dumps({name: given[name] for name in given if name != key}))
        theirs, ours = AutoConfig.from_pretrained(tmp_path), config_from_folder(read_config(tmp_path))
        for part, field, word in words:
            wanted = getattr(theirs, word)
            if wanted is not None:  # a token or a window that is not there
                assert getattr(getattr(ours, part) if part else ours, field) == wanted, f"without {key}: {field}"
                n_compared += 1
    assert n_compared > 90


def test_the_published_config_of_deepseek_v3_opens_although_it_names_no_head_dim() -> None:
    """Its scaling stands in the older way too."""
    published = DeepseekV3Config(max_position_embeddings=163840).to_dict() | {"rope_theta": 10000}
    for name in ("head_dim", "qk_head_dim", "rope_parameters", "pad_token_id"):
        del published[name]
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = config_from_folder(published | {"rope_scaling": yarn, "num_nextn_predict_layers": 1})
    assert config == replace(PUBLISHED["DeepSeek-V3"], pad_id=1, bos_id=0, eos_id=1)
    assert len(folder_layout(config).tensors) == 3 + 61 * 9 + 3 * 3 + 58 * (256 * 3 + 3 + 2)


ROTARY = {  # rope_parameters, and what is changed in the file
    "yarn, ends not rounded": ({**YARN, "truncate": False, "beta_fast": 2.5}, {}),
    "yarn, its own attention factor": ({**YARN, "attention_factor": 1.7}, {}),
    "yarn, factor from the lengths": ({**YARN, "factor": None}, {}),
    "yarn, original length beside it": (
        {name: YARN[name] for name in ("rope_type", "rope_theta", "factor")},
        {"original_max_position_embeddings": 24},
    ),
    "llama3, uneven": ({**LLAMA3, "low_freq_factor": 1.3, "high_freq_factor": 2.9, "factor": 5.0}, {}),
    "yarn, a ramp beyond the last pair": ({**YARN, "rope_theta": 3.0, "original_max_position_embeddings": 64}, {}),
    "yarn, a ramp of no width": ({**YARN, "truncate": False, "beta_fast": 0.5, "beta_slow": 0.5}, {}),
    "linear, older": (None, {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "theta beside": ({"rope_type": "linear", "factor": 2.5}, {"rope_theta": 777.0}),
    "both ways": ({"rope_type": "default", "rope_theta": 1e4}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_settings_are_read_as_transformers_reads_them(name: str, tmp_path, parity) -> None:
    rope, change = ROTARY[name]
    given = {**LlamaConfig(**COMMON, head_dim=22).to_dict(), "rope_parameters": rope, **change}
    (tmp_path / "config.json").write_text(json.dumps(given))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours = config_from_folder(given)
    got = llm_layers.rotary_frequencies(22, ours.rope_theta, ours.rope_scaling, ours.max_seq_len)
    parity(f"rotary_frequencies, {name}", "transformers", "output", got, theirs.inv_freq, 1e-7)
    factor = ours.rope_scaling.table_factor
    parity(f"table_factor, {name}", "transformers", "output", factor, theirs.attention_scaling, 1e-12)
    words = config_to_folder(ours)
    assert config_from_folder(words) == ours
    del words["rope_parameters"]  # what readers of the older files look at stands there too
    assert config_from_folder(words) == ours


def test_null_is_not_absent() -> None:
    def read(kind: str, **change: object) -> ModelConfig:
        return config_from_folder({"model_type": kind, **SIZES, **change})

    assert read("mistral", num_key_value_heads=None, sliding_window=None).window_size == 0
    assert read("mistral", num_key_value_heads=None).n_kv_heads == 4
    assert read("llama", pad_token_id=-1).pad_id == read("llama").eos_id == 2
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    types = Qwen3Config(**SIZES, **window).layer_types
    assert [kind == "full_attention" for kind in types] == [True, True, False]
    words = config_to_folder(read("qwen3", **window, num_key_value_heads=4))
    del words["layer_types"]  # older files have max_window_layers alone
    assert config_from_folder(words).full_layers == (0, 1)
    assert read("qwen3", eos_token_id=5, num_key_value_heads=4).bos_id == 5
    endless = read("qwen3", bos_token_id=7, num_key_value_heads=4)  # whose texts have no end in transformers either
    assert (endless.bos_id, endless.eos_id, endless.pad_id) == (7, 67, 7)
    assert (
        config_to_folder(endless)["eos_token_id"] is None and config_from_folder(config_to_folder(endless)) == endless
    )
    assert read("llama", eos_token_id=None, bos_token_id=None).eos_id == 67
    for kind, config in (("mixtral", MixtralConfig()), ("mistral", MistralConfig())):
        assert read(kind, num_key_value_heads=4).rope_theta == config.rope_parameters["rope_theta"]
    for kind, latent in ((None, 0), (24, 24)):
        assert read("deepseek_v3", q_lora_rank=kind).latent.q_rank == latent
    assert (
        read("qwen3", num_key_value_heads=None).d_head == 128 and read("qwen3", num_key_value_heads=4).window_size == 0
    )


def test_the_scores_of_latent_attention_are_scaled_whatever_stretches_the_positions(tmp_path, parity) -> None:
    """transformers reads mscale_all_dim for every kind of scaling."""
    for kind in ("linear", "dynamic"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0, "mscale_all_dim": 1.0}
        config = DeepseekV3Config(
            **{**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1}, rope_parameters=rope
        )
        theirs = theirs_from(config, torch.float32)
        theirs.save_pretrained(tmp_path)
        ours, theirs = CausalLM.from_pretrained(tmp_path), theirs_from(tmp_path, torch.float32)
        parity(f"deepseek_v3, {kind}", "transformers", "output", ours(some_ids()), theirs(some_ids()).logits, 1e-5)
        words = config_to_folder(ours.config)
        assert config_from_folder(words) == ours.config and words["rope_parameters"]["mscale_all_dim"] == 1.0
    assert (
        "mscale_all_dim" not in config_to_folder(ModelConfig(rope_scaling=RopeScaling("linear", 2.0)))["rope_scaling"]
    )


def test_null_means_no_where_transformers_takes_it_as_no() -> None:
    given = DeepseekV3Config(**DEEPSEEK).to_dict()
    for name in ("norm_topk_prob", "rope_interleave"):
        with pytest.raises(ValueError, match=f"{name}=False; this model supports True"):
            config_from_folder(given | {name: None})
    rope = {**YARN, "truncate": None}
    assert config_from_folder({**CONFIGS["llama"].to_dict(), "rope_parameters": rope}).rope_scaling.truncate is False


# Bad input


def test_a_config_that_no_family_has_is_not_saved(tmp_path) -> None:
    for change in (dict(n_sinks=2, window_size=4), dict(logit_cap=3.0)):
        with pytest.raises(ValueError, match="no family has attention sinks, soft caps"):
            CausalLM(ModelConfig(vocab_size=67, d_model=48, d_head=12, **change)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama, the closest family, cannot express this config"):
        config_to_folder(ModelConfig(full_layers=(1,)))
    with pytest.raises(
        ValueError, match="mixtral, the closest family, .*: qk_norm=True would become False; change that"
    ):
        config_to_folder(ModelConfig(qk_norm=True, d_ff=256, experts=ExpertConfig()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; this model supports 'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "unknown rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "gives no factor"),
        ({"num_key_value_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"hidden_size": "48"}, "hidden_size='48'; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size=True; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number >= 1"),
        ({"rope_parameters": "linear"}, "a rotary scaling of 'linear'; it must be an object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "only a part"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of their own for full_attention"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'; it must be a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": [1e4]}}, r"rope_theta=\[10000.0\]; it must be a"),
        (
            {"rope_parameters": {**YARN, "original_max_position_embeddings": "16"}},
            "embeddings='16'; it must be a number",
        ),
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, None),
        ({"vocab_size": None}, None),
    ],
)
def test_a_config_that_we_cannot_compute_is_refused_in_words(change: dict, message: str | None) -> None:
    given = {**CONFIGS["llama"].to_dict(), **change}
    if message is None and "rope_parameters" in change:
        with pytest.raises(ValueError, match="rope_theta, which must be > 1, got 1.0"):
            CausalLM(config_from_folder(given))
        return
    if message is None:
        given = {name: value for name, value in given.items() if name not in change}
        message = "config.json lacks vocab_size"
    with pytest.raises(ValueError, match=message):
        config_from_folder(given)


def test_kinds_of_layers_that_do_not_fit_are_named() -> None:
    given = CONFIGS["qwen3, some layers with a window"].to_dict()
    for types in (["full_attention"], ["full_attention", "sliding_attention", "chunked_attention"]):
        with pytest.raises(ValueError, match="layer_types=.* for each of 3 layers"):
            config_from_folder(given | {"layer_types": types})
    with pytest.raises(ValueError, match="sliding_attention but no sliding_window in use"):
        config_from_folder(given | {"use_sliding_window": False})


def test_weights_that_do_not_fit_are_named(tmp_path) -> None:
    CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=2, d_head=12)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, "missing model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected model.layers.1."),
        ({"intermediate_size": 40}, r"mlp.gate_proj.weight has shape \(352, 48\), expected \(40, 48\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            CausalLM.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match="config.json is a file; choose another folder"):
        CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_head=12)).save_pretrained(file)


def test_what_our_model_does_not_need_is_passed_over(tmp_path) -> None:
    """Older files carry the constant inverse frequencies, DeepSeek-V3's a last layer that looks one token further."""
    latent, experts = LatentConfig(0, 8, 4, 6, 5), ExpertConfig(4, 2, 10, 10, router="sigmoid")
    for extra, kind in (
        ("model.layers.1.self_attn.rotary_emb.inv_freq", {}),
        ("model.layers.2.eh_proj.weight", {"latent": latent, "experts": experts, "n_kv_heads": 4, "d_head": 6}),
    ):
        model = CausalLM(ModelConfig(**{"vocab_size": 67, "d_model": 48, "n_layers": 2, "d_head": 12, **kind}))
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        save_file({**weights, extra: torch.ones(7)}, tmp_path / "model.safetensors")
        assert torch.equal(CausalLM.from_pretrained(tmp_path)(some_ids()), model(some_ids()))


def test_numbers_without_a_meaning_are_refused() -> None:
    sizes = {"norm_eps": 0.0, "rope_theta": -1.0, "window_size": -1, "n_sinks": -1, "logit_cap": -2.0, "n_layers": 0}
    stretch = {"kind": "yarn", "factor": 2.0, "trained_seq_len": 16}
    for make, changes in (
        (ModelConfig, sizes | {"attention_cap": -1.0}),
        (ExpertConfig, {"d_expert": 0, "n_groups": 0, "d_shared": -1, "n_dense_layers": -1}),
        (lambda **change: RopeScaling(**stretch | change), {"factor": 0.0, "beta_fast": 0.0, "trained_seq_len": 0}),
    ):
        for name, value in changes.items():
            with pytest.raises(ValueError, match=f"{name} must be finite and"):
                make(**{name: value})
    assert ExpertConfig(n_experts=3, n_active_experts=3).n_active_experts == 3  # all of them is a choice
    with pytest.raises(ValueError, match="n_heads=4 is not divisible by n_kv_heads=3; choose a divisor"):
        llm_layers.GroupedQueryAttention(48, 4, 3, 12)
    assert llm_layers.NormedAttention(48, 4, 2, 12).q_norm.norm_eps == Qwen3Config().rms_norm_eps


def test_bad_sizes_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="n_heads=4 is not divisible by n_kv_heads=3"):
        ModelConfig(n_kv_heads=3)
    with pytest.raises(ValueError, match="d_head=5 must be even"):
        ModelConfig(d_head=5)
    with pytest.raises(ValueError, match="n_active_experts=9 is more than n_experts=8"):
        ExpertConfig(n_active_experts=9)
    with pytest.raises(ValueError, match="d_rope must be even, got 7"):
        LatentConfig(d_rope=7)
    with pytest.raises(ValueError, match="max_seq_len=0 must be >= 1"):
        llm_layers.rotary_frequencies(8, 1e4, RopeScaling("dynamic", 2.0))
    with pytest.raises(ValueError, match="unknown rotary scaling 'yarm'"):
        RopeScaling("yarm")
    with pytest.raises(ValueError, match="low_freq_factor=4.0 must be above 0 and below high_freq_factor=4.0"):
        RopeScaling("llama3", 2.0, 16, low_freq_factor=4.0)
    with pytest.raises(ValueError, match="latent and qk_norm and use_bias do not go together"):
        ModelConfig(latent=LatentConfig(), qk_norm=True, use_bias=True)
    with pytest.raises(ValueError, match="qk_norm and attention_cap do not go together"):
        ModelConfig(qk_norm=True, attention_cap=50.0)
    with pytest.raises(ValueError, match="n_groups=1, n_active_groups=1 and scale=2.5 belong to the sigmoid router"):
        ExpertConfig(scale=2.5)
    with pytest.raises(ValueError, match="capacity_factor must be > 0, got 0"):
        CausalLM(ModelConfig(experts=ExpertConfig(capacity_factor=0)))
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_head=12, max_seq_len=8))
    with pytest.raises(ValueError, match="9 positions exceed max_seq_len 8"):
        model(some_ids(1, 9))
    with pytest.raises(ValueError, match="67"):
        model(torch.full((1, 3), 67))
    for kwargs, message in (
        ({"is_real": torch.ones(1, 3)}, "is_real must be bool"),
        ({"document_ids": torch.zeros(1, 4, dtype=torch.long)}, r"document_ids has shape \(1, 4\)"),
        ({"caches": [llm_layers.KVCache()] * 2}, "2 caches for 1 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            model(some_ids(1, 3), **kwargs)
    with pytest.raises(ValueError, match="token ids must have 2 axes"):
        model(some_ids()[0])
    with pytest.raises(ValueError, match=r"a prompt needs shape \(batch, seq\)"):
        model.generate(some_ids()[0], SamplingConfig(1))
    with pytest.raises(ValueError, match="rope_theta, the base of the wavelengths, must be > 0, got -1.0"):
        llm_layers.rotary_frequencies(8, -1.0)
    with pytest.raises(ValueError, match="positions count from 0, got -1"):
        llm_layers.RotaryTable(8, 1e4, 16).at(torch.tensor([[-1]]), torch.zeros(1))
    with pytest.raises(ValueError, match="window_size and n_sinks must be >= 0, got -1 and 0"):
        llm_layers.KVCache(-1)
    with pytest.raises(ValueError, match="n_heads and d_head must be >= 1, got 2 and 0"):
        llm_layers.GroupedQueryAttention(48, 2, 1, 0)
    with pytest.raises(ValueError, match=r"is_real has shape \(1, 2\)"):
        model(some_ids(1, 3), is_real=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no experts to balance"):
        model.load_balance_loss()


# The verbs


def test_demo_trains_below_chance_and_its_folder_computes_the_same_in_transformers(tmp_path, capsys) -> None:
    small = ["--max-steps", "12", "--d-model", "16", "--n-documents", "20", "--out", str(tmp_path)]
    topic.main(["demo", *small])
    shown = capsys.readouterr().out
    loss, chance = (
        float(part.split()[0])
        for part in (shown.split("held-out loss ")[1], shown.split("guessing: ")[1][:-1].replace(")", " "))
    )
    assert loss < chance and float(shown.split("differ by ")[1].split()[0]) < 1e-5
    topic.main(["size", "--checkpoint", str(tmp_path)])
    assert f"{sum(p.numel() for p in CausalLM.from_pretrained(tmp_path).parameters()):,}" in capsys.readouterr().out


def test_size_lists_published_models_and_refuses_a_missing_folder(capsys) -> None:
    topic.main(["size"])
    assert "6,738,415,616" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        topic.main(["size", "--checkpoint", "/nowhere"])
    assert ended.value.code == 2 and "/nowhere is not a folder" in capsys.readouterr().err
