"""Topic 09: the decoder family against Llama, Mistral, Qwen3, Mixtral and DeepSeek-V3 of transformers, both ways."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

import latent_attention
import llm_layers
import mixture_of_experts
import modern_llm_architectures as topic
from gpt2 import SamplingConfig, left_padded
from latent_attention import LatentConfig
from llm_config import ExpertConfig, config_from_folder, config_to_folder, folder_layout
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
    "llama, linear": LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama, dynamic": LlamaConfig(
        **{**COMMON, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    ),
    "llama, yarn": LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama, llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "mistral, window": MistralConfig(**COMMON, sliding_window=7),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
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
DECODED = 30  # tokens: beyond the windows, and beyond the 16 positions of the dynamic scaling


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
    with pytest.raises(ValueError, match=r"n_positions=99 must be in 0\.\.9"):
        caches[0].crop(99)


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
    with pytest.raises(ValueError, match="leave out caches"):
        model(ids, model.new_caches(), document_ids=ids)


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model, token_ids = CausalLM(ModelConfig(vocab_size=301, d_model=64, d_head=16)), torch.randint(0, 301, (4, 33))
    loss = F.cross_entropy(model(token_ids)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(301.0).log().item(), abs=0.05)


def test_soft_caps_bound_scores_and_logits() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=67, d_model=48, d_head=12, attention_cap=1e9, logit_cap=2.0)
    capped = CausalLM(config)
    plain = CausalLM(replace(config, attention_cap=0.0, logit_cap=0.0))
    capped.lm_head.weight.data *= 50
    plain.load_state_dict(capped.state_dict())
    assert capped(some_ids()).abs().max() <= 2 < plain(some_ids()).abs().max()
    assert torch.allclose(capped(some_ids()), llm_layers.soft_cap(plain(some_ids()), 2.0), atol=1e-4)


# Bad input


def test_a_config_that_no_family_has_is_not_saved(tmp_path) -> None:
    for change in (dict(n_sinks=2, window_size=4), dict(logit_cap=3.0)):
        with pytest.raises(ValueError, match="no family has attention sinks, soft caps"):
            CausalLM(ModelConfig(vocab_size=67, d_model=48, d_head=12, **change)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama, the closest family, cannot express this config"):
        config_to_folder(ModelConfig(full_layers=(1,)))
    with pytest.raises(ValueError, match="mixtral, the closest family"):
        config_to_folder(ModelConfig(qk_norm=True, experts=ExpertConfig()))


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
        ({"vocab_size": None}, None),
    ],
)
def test_a_config_that_we_cannot_compute_is_refused_in_words(change: dict, message: str | None) -> None:
    given = {**CONFIGS["llama"].to_dict(), **change}
    if message is None:
        given = {name: value for name, value in given.items() if name not in change}
        message = "config.json lacks vocab_size"
    with pytest.raises(ValueError, match=message):
        config_from_folder(given)


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


def test_bad_sizes_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="n_heads=4 is not divisible by n_kv_heads=3"):
        ModelConfig(n_kv_heads=3)
    with pytest.raises(ValueError, match="d_head=5 must be even"):
        ModelConfig(d_head=5)
    with pytest.raises(ValueError, match="n_active_experts=9 is more than n_experts=8"):
        ExpertConfig(n_active_experts=9)
    with pytest.raises(ValueError, match="d_rope must be even, got 7"):
        LatentConfig(d_rope=7)
    with pytest.raises(ValueError, match="unknown rotary scaling 'yarm'"):
        RopeScaling("yarm")
    with pytest.raises(ValueError, match="capacity_factor must be > 0, got 0"):
        CausalLM(ModelConfig(experts=ExpertConfig(capacity_factor=0)))
    model = CausalLM(ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_head=12, max_seq_len=8))
    with pytest.raises(ValueError, match="9 positions exceed max_seq_len 8"):
        model(some_ids(1, 9))
    with pytest.raises(ValueError, match="67"):
        model(torch.full((1, 3), 67))
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
