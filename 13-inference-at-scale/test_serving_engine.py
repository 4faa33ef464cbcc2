"""Topic 13 - Proofs of the engine: every answer is the one that naive decoding gives, whatever happens around it."""

import random
import string
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3Config

import model_runner
import paged_cache
import serving_engine
from engine_requests import Overloaded, RequestOutput, RequestParams, new_row
from gpt2 import SamplingConfig
from llm_config import ExpertConfig
from model_runner import BlockRunner, PackedRunner
from modern_llm_architectures import CausalLM, ModelConfig
from paged_cache import FloatStore
from quantized_layers import KVFormat, QuantisedKVCache
from request_sampling import choose
from serving_engine import Engine, EngineConfig

VOCAB = 61
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=[2, 5],
)
LATENT = dict(kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=10, qk_nope_head_dim=12, q_lora_rank=20)
EXPERTS = dict(moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1)
FAMILIES = {
    "llama": LlamaConfig(**COMMON, head_dim=6),
    "qwen3 with a window": Qwen3Config(
        **COMMON, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "mixtral": MixtralConfig(**COMMON, head_dim=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, **LATENT, **EXPERTS, n_group=4, topk_group=2, first_k_dense_replace=1
    ),
}
SMALL = EngineConfig(max_batch=5, max_step_tokens=32, prefill_chunk=9, block_size=4, n_blocks=60, ageing=10)
GREEDY = RequestParams(12, temperature=0)


class Letters:
    """A tokenizer of one or two letters for each id, so that texts meet stop strings often."""

    def __init__(self) -> None:
        letters = string.ascii_lowercase[:6]
        self.pieces = [letters[token_id % 6] + letters[token_id % 5] * (token_id % 2) for token_id in range(VOCAB)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token_id] for token_id in ids)


LETTERS = Letters()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model of each family with random weights, saved by transformers."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(3)
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
        for parameter in theirs.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp("model")
        theirs.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def models(folders) -> dict[str, CausalLM]:
    return {name: CausalLM.from_pretrained(folder).double() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def llama(models) -> CausalLM:
    return models["llama"]


def some_prompts(n: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def naive(
    model: CausalLM, prompt: list[int], params: RequestParams, guess: Sequence[int] = ()
) -> tuple[list[int], str, str]:
    """Ids, text and finish reason of one request alone, every token from a pass over the whole text.

    Where the text so far is that of `guess`, one pass over all of it has given the logits of every place.
    """
    row, ends = new_row(params, prompt), (model.config.eos_id, *model.config.more_eos_ids)
    known = model(torch.tensor([[*prompt, *guess]]))[0, len(prompt) - 1 :]
    while True:
        n = len(row.new_ids)
        as_guessed = row.new_ids == list(guess[:n]) and n < len(known)
        logits = known[n : n + 1] if as_guessed else model(torch.tensor([prompt + row.new_ids]))[:, -1]
        (token_id,) = choose(logits, [row], ends).ids
        row.new_ids.append(token_id)
        if token_id in ends and not params.ignore_eos:
            return row.new_ids, LETTERS.decode(row.new_ids[:-1]), "stop"
        text = LETTERS.decode(row.new_ids)
        found = [text.index(stop) for stop in params.stop if stop in text]
        if found:
            return row.new_ids, text[: min(found)], "stop"
        if len(row.new_ids) == params.max_tokens:
            return row.new_ids, text, "length"


def answers(outputs: Sequence[RequestOutput]) -> dict[str, tuple[list[int], str, str | None]]:
    """What each request has got in all."""
    whole: dict[str, tuple[list[int], str, str | None]] = {}
    for output in outputs:
        ids, text, reason = whole.get(output.request_id, ([], "", None))
        assert reason is None, f"{output.request_id} was told something after its end"
        whole[output.request_id] = (ids + output.new_ids, text + output.text, output.finish_reason)
        assert output.n_generated == len(whole[output.request_id][0])
    return whole


def check_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert not engine.busy and stats.running == stats.waiting == 0 and stats.free_blocks == stats.n_blocks
    assert not any(engine.pool.counts) and not engine.requests and not engine.scheduler.n_following
    assert len(engine.scheduler.slots) == engine.config.max_batch


def drain(engine: Engine, most: int = 2000) -> list[RequestOutput]:
    outputs = []
    for _ in range(most):
        if not engine.busy:
            check_empty(engine)
            return outputs
        outputs += engine.step()
    pytest.fail(f"not done after {most} steps")


# Equal to topic 09 and to transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_topic_09_and_transformers(name: str, folders, models, parity) -> None:
    model, prompts = models[name], some_prompts(12)
    theirs = AutoModelForCausalLM.from_pretrained(
        folders[name], dtype=torch.float32, experts_implementation="eager"
    ).double()
    engine = Engine(model, None, SMALL)
    assert isinstance(engine.runner, PackedRunner if name == "llama" else BlockRunner)
    outputs = engine.generate(prompts, [replace(GREEDY, max_tokens=3 + index) for index in range(12)])
    check_empty(engine)
    assert len({tuple(output.new_ids[:3]) for output in outputs}) > 4
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids, most = torch.tensor([prompt]), 3 + index
        ours = model.generate(ids, SamplingConfig(most, temperature=0))[0].tolist()
        parity(f"Engine, {name}", "CausalLM.generate", "output", output.new_ids, ours, 0)
        with torch.no_grad():
            wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
        parity(
            f"Engine, {name}", "transformers generate", "output", output.new_ids, wanted[0, len(prompt) :].tolist(), 0
        )
        assert output.finish_reason == ("stop" if output.new_ids[-1] in (2, 5) else "length")


def test_the_packed_pass_equals_the_models_own_blocks(llama, parity, checked_shapes) -> None:
    """Rows of one and of several new tokens, ragged, at different places, in one pass."""
    engine = Engine(llama, None, SMALL)
    streams = []
    for kind in (PackedRunner, BlockRunner):
        store = FloatStore(engine.pool, llama.config, torch.float64, "cpu")
        runner = kind(llama, store, 64) if kind is PackedRunner else kind(llama, store)
        generator, seen = torch.Generator().manual_seed(0), []
        for starts, n_new in (([0, 0, 0], [9, 4, 6]), ([9, 4, 6], [1, 1, 1]), ([10, 5, 7], [3, 1, 5])):
            ids = torch.randint(0, VOCAB, (3, max(n_new)), generator=generator).numpy()
            tables = torch.arange(12).view(3, 4).flip(0).numpy()
            parts = [slice(0, 1), slice(1, 3)]
            groups = [
                paged_cache.StepRows(
                    store,
                    ids[part, : max(n_new[part])],
                    *(torch.tensor(x[part]).numpy() for x in (n_new, starts)),
                    tables[part],
                )
                for part in parts
            ]
            with torch.no_grad(), checked_shapes(model_runner, paged_cache):
                seen += runner.hidden(groups)
        streams.append(seen)
    parity("PackedRunner", "BlockRunner", "output", streams[0], streams[1], 1e-5)  # norms in float32 there


# Whatever happens around a request


def random_params(rng: random.Random, most: int = 12) -> RequestParams:
    greedy = rng.random() < 0.4
    return RequestParams(
        max_tokens=rng.randint(1, most),
        temperature=0 if greedy else rng.choice([0.3, 0.8, 1.0]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.randrange(1000),
        stop=tuple(rng.sample(["ab", "cdc", "e", "aab"], rng.choice([0, 0, 1, 2]))),
        ignore_eos=rng.random() < 0.2,
        tenant=rng.choice(["", "", "b"]),
        priority=rng.choice([0, 0, 1]),
    )


def random_config(rng: random.Random, speculate: str) -> EngineConfig:
    return EngineConfig(
        max_batch=rng.randint(1, 5),
        max_step_tokens=40,
        prefill_chunk=rng.randint(1, 16),
        ageing=rng.randint(1, 20),
        max_preemptions=rng.randint(0, 3),
        block_size=rng.randint(2, 5),
        n_blocks=rng.randint(16, 24),  # the longest needs 16 of the smallest blocks
        prefix_cache=rng.random() < 0.7,
        speculate=speculate,
        n_draft=rng.randint(1, 4),
    )


def run_trace(model: CausalLM, seed: int, n_steps: int, speculate: str, draft: CausalLM | None = None) -> Engine:
    """Random arrivals, alone and as several answers to a prompt, aborts at random moments, and a check of each."""
    rng = random.Random(seed)
    engine = Engine(model, LETTERS, random_config(rng, speculate), draft)
    prompts = some_prompts(4, seed, 18)  # few and alike, so that prefixes are shared
    asked: dict[str, tuple[list[int], RequestParams]] = {}
    aborted, outputs = set(), []
    for _ in range(n_steps):
        while rng.random() < 0.45:
            base = rng.choice(prompts)
            prompt = base[: rng.randint(1, len(base))] + [rng.randrange(6, VOCAB)] * rng.randint(0, 2)
            params = [random_params(rng) for _ in range(rng.choice([1, 1, 1, 3]))]
            params = [replace(own, tenant=params[0].tenant) for own in params]
            for request_id, own in zip(engine.add_choices(prompt, params), params, strict=True):
                asked[request_id] = (prompt, own)
        if rng.random() < 0.2 and asked:
            chosen = rng.choice(list(asked))
            if engine.abort(chosen):
                aborted.add(chosen)
        outputs += engine.step()
    outputs += drain(engine)
    whole = answers(outputs)
    assert set(whole) == set(asked) and len(asked) > n_steps / 4
    for request_id, (prompt, params) in asked.items():
        ids, text, reason = naive(model, prompt, params, whole[request_id][0])
        if request_id in aborted:
            assert whole[request_id][2] == "abort" and ids[: len(whole[request_id][0])] == whole[request_id][0]
            assert text.startswith(whole[request_id][1])
        else:
            assert whole[request_id] == (ids, text, reason), (request_id, params)
    return engine


@pytest.mark.parametrize("seed", range(5))
def test_random_traces_equal_naive_decoding(llama, seed: int) -> None:
    run_trace(llama, seed, 40, "none")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_random_traces_of_the_other_families_equal_naive_decoding(models, name: str) -> None:
    run_trace(models[name], 100, 20, "none")


def greedy_trace(model: CausalLM, speculate: str, draft: CausalLM | None = None, seed: int = 0, **change) -> Engine:
    """Greedy requests in a small pool under speculation; the answers are those of an engine that does not guess."""
    rng = random.Random(seed)
    config = replace(SMALL, n_blocks=18, **change)
    prompts = [prompt * 2 for prompt in some_prompts(14, seed, 9)]  # repetitions, which a look-up finds
    params = [RequestParams(rng.randint(1, 16), temperature=0, ignore_eos=True) for _ in prompts]
    plain = Engine(model, LETTERS, replace(SMALL, n_blocks=60)).generate(prompts, params)
    engine = Engine(model, LETTERS, replace(config, speculate=speculate, max_step_tokens=48), draft)
    guessed = engine.generate(prompts, params)
    check_empty(engine)
    assert [(own.new_ids, own.text) for own in guessed] == [(own.new_ids, own.text) for own in plain]
    return engine


def test_speculation_by_look_up_changes_no_greedy_token(llama) -> None:
    stats = greedy_trace(llama, "ngram").stats()
    assert 0 < stats.accepted_tokens < stats.proposed_tokens and stats.preemptions


def test_speculation_by_another_model_changes_no_greedy_token(models, llama) -> None:
    stats = greedy_trace(llama, "draft", models["mixtral"]).stats()
    assert stats.accepted_tokens < stats.proposed_tokens and stats.preemptions


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_draft_that_is_the_model_itself_is_always_accepted(models, name: str) -> None:
    """So the draft's own keys are right at every place: in ragged rows, after preemptions, beside prompts in pieces."""
    engine = greedy_trace(models[name], "draft", models[name], prefix_cache=False)
    stats = engine.stats()
    assert stats.accepted_tokens == stats.proposed_tokens > 50 and stats.preemptions
    assert stats.steps < 0.6 * stats.generated_tokens


def test_nothing_is_guessed_beyond_the_answer(llama, monkeypatch) -> None:
    """The last block has room for more positions than the model has."""
    engine = Engine(llama, None, replace(SMALL, speculate="ngram", block_size=10, max_step_tokens=64))
    guess = engine.guess

    def checked(decodes):
        drafts = guess(decodes)
        for request, draft in zip(decodes, drafts, strict=True):
            assert len(draft.ids) < request.row.params.max_tokens - len(request.row.new_ids)
        return drafts

    monkeypatch.setattr(engine, "guess", checked)
    monkeypatch.setattr(engine.lookup, "copied", lambda ids, n_draft: [7] * n_draft)
    (output,) = engine.generate([[9] * 52], replace(GREEDY, ignore_eos=True))
    assert output.n_generated == 12 and engine.stats().proposed_tokens > 0


def test_speculation_does_not_mix_up_neighbours_that_sample(llama, models) -> None:
    """With a seed each, rows give what they give alone."""
    prompts = some_prompts(8, seed=4, longest=9)
    params = [RequestParams(10, 0.9, seed=index, ignore_eos=True, logprobs=2) for index in range(8)]
    for speculate, draft in (("ngram", None), ("draft", models["mixtral"])):
        config = replace(SMALL, speculate=speculate, n_draft=2, max_step_tokens=48)
        together = Engine(llama, LETTERS, config, draft).generate(prompts, params)
        alone = [
            Engine(llama, LETTERS, config, draft).generate([prompt], own)[0]
            for prompt, own in zip(prompts, params, strict=True)
        ]
        assert [output.new_ids for output in together] == [output.new_ids for output in alone]
        for output in together:
            assert [told.token_id for told in output.logprobs] == output.new_ids


def test_aborts_in_every_phase_leave_the_others_as_they_were(llama) -> None:
    """A hundred requests, thirty of them aborted in random phases."""
    rng = random.Random(5)
    config = replace(SMALL, n_blocks=16, max_waiting=200)
    engine, prompts = Engine(llama, LETTERS, config), some_prompts(100, 5, 16)
    params = [replace(random_params(rng), stop=(), max_tokens=rng.randint(2, 20)) for _ in prompts]
    names = [engine.add(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    to_abort, phases, outputs = set(rng.sample(names, 30)), set(), []
    left = sorted(to_abort)
    while engine.busy:
        if left and rng.random() < 0.4:
            wanted = rng.choice(["queued", "prefill", "decode", "preempted"])
            victims = [name for name in left if name in engine.requests and engine.requests[name].phase == wanted]
            if victims:
                phases.add(wanted)
                assert engine.abort(victims[0])
                left.remove(victims[0])
        left = [name for name in left if name in engine.requests]
        outputs += engine.step()
    check_empty(engine)
    assert phases == {"queued", "prefill", "decode", "preempted"}
    whole = answers(outputs)
    assert not engine.abort(names[0]) and not engine.abort("nobody")
    for name, prompt, own in zip(names, prompts, params, strict=True):
        ids, text, reason = naive(llama, prompt, own, whole[name][0])
        if whole[name][2] != "abort":
            assert whole[name] == (ids, text, reason)
        else:
            assert name in to_abort
    assert sum(whole[name][2] == "abort" for name in names) >= 20


# Memory


def test_a_small_pool_gives_the_tokens_of_a_large_one(llama) -> None:
    prompts = some_prompts(20, seed=7)
    params = [RequestParams(15, 0.8, seed=index, ignore_eos=True) for index in range(20)]
    large = Engine(llama, LETTERS, replace(SMALL, n_blocks=0)).generate(prompts, params)
    for n_blocks in (9, 13):
        engine = Engine(llama, LETTERS, replace(SMALL, n_blocks=n_blocks))
        small = engine.generate(prompts, params)
        check_empty(engine)
        assert [output.new_ids for output in small] == [output.new_ids for output in large]
        stats = engine.stats()
        assert 3 < stats.preemptions <= 20 * SMALL.max_preemptions and stats.steps < 10_000


def test_sharing_prefixes_changes_no_token_and_saves_their_computation(llama, monkeypatch) -> None:
    prefix = some_prompts(1, 8, 30)[0][:14] + [9] * 14
    prompts = [[*prefix[:28], *prompt] for prompt in some_prompts(8, 9, 4)]
    runs = {}
    for name in ("shared", "not shared", "one hash for all"):
        if name == "one hash for all":
            monkeypatch.setattr(paged_cache, "content_hash", lambda *_: 7)
        engine = Engine(llama, LETTERS, replace(SMALL, max_batch=2, prefix_cache=name != "not shared"))
        runs[name] = (engine.generate(prompts, GREEDY), engine.stats())
        check_empty(engine)
    tokens = [[output.new_ids for output in outputs] for outputs, _ in runs.values()]
    assert tokens[0] == tokens[1] == tokens[2]
    assert [output.n_cached for output in runs["not shared"][0]] == [0] * 8
    n_shared = (len(prompts[0]) - 1) // 4 * 4 if len(prefix) > len(prompts[0]) else len(prefix[:28]) // 4 * 4
    for name in ("shared", "one hash for all"):
        outputs, stats = runs[name]
        assert all(output.n_cached >= n_shared for output in outputs[2:])
        assert stats.cached_tokens == sum(output.n_cached for output in outputs)
        assert stats.cached_tokens + stats.prompt_tokens == sum(map(len, prompts))


def test_a_draft_model_reads_what_is_shared_once(llama, models, monkeypatch) -> None:
    engine, read = Engine(llama, LETTERS, replace(SMALL, speculate="draft"), models["mixtral"]), []
    hidden = engine.draft.runner.hidden
    monkeypatch.setattr(
        engine.draft.runner, "hidden", lambda groups: read.append(sum(len(g.flat) for g in groups)) or hidden(groups)
    )
    for _ in range(2):
        engine.generate([[9] * 8], RequestParams(1, temperature=0))
    assert read == [8, 4]  # a block of four is known; the last id is always read


def test_tenants_never_share(llama) -> None:
    prompt, engine = some_prompts(1, 3)[0] * 3, Engine(llama, LETTERS, SMALL)
    found = [
        engine.generate([prompt], replace(GREEDY, tenant=tenant))[0].n_cached for tenant in ("a", "a", "b", "", "b")
    ]
    whole = (len(prompt) - 1) // 4 * 4
    assert found == [0, whole, 0, 0, whole] and whole > 0


def test_several_answers_to_one_prompt_compute_it_once(llama) -> None:
    prompt = some_prompts(1, 11)[0] * 2
    params = [RequestParams(9, 1.0, seed=index, ignore_eos=True) for index in range(4)]
    engine = Engine(llama, LETTERS, replace(SMALL, prefix_cache=False))
    names = engine.add_choices(prompt, params)
    whole = answers(drain(engine))
    assert engine.stats().prompt_tokens == len(prompt) and engine.stats().cached_tokens == 3 * len(prompt)
    for name, own in zip(names, params, strict=True):
        assert whole[name] == naive(llama, prompt, own, whole[name][0])
    assert len({tuple(ids) for ids, _, _ in whole.values()}) == 4


def test_what_an_earlier_request_left_in_a_block_touches_nobody(llama) -> None:
    """NaN times weight 0 is NaN: a block is blanked before it is used again."""
    prompts = some_prompts(6, seed=12)
    wanted = Engine(llama, LETTERS, SMALL).generate(prompts, GREEDY)
    for config in (SMALL, replace(SMALL, speculate="draft", max_step_tokens=48)):
        draft = llama if config.speculate == "draft" else None
        engine = Engine(llama, LETTERS, config, draft)
        for store in engine.stores:
            for tensor in store.tensors:
                tensor.fill_(float("nan"))
        got = engine.generate(prompts, GREEDY)
        assert [(output.new_ids, output.finish_reason) for output in got] == [
            (output.new_ids, output.finish_reason) for output in wanted
        ]


@pytest.mark.parametrize("n_bits", [8, 4])
def test_a_quantised_store_computes_what_topic_12s_cache_does(llama, n_bits: int, parity) -> None:
    prompts = some_prompts(5, seed=13)
    engine = Engine(llama, None, replace(SMALL, kv_bits=n_bits, n_blocks=20))
    outputs = engine.generate(prompts, replace(GREEDY, ignore_eos=True))
    exact = Engine(llama, None, SMALL).generate(prompts, replace(GREEDY, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        caches, ids, new = [QuantisedKVCache(KVFormat(n_bits)) for _ in llama.blocks], prompt, []
        for _ in range(12):
            with torch.no_grad():
                ids = [int(llama(torch.tensor([ids]), caches)[0, -1].argmax())]
            new += ids
        parity(f"Engine, cache of {n_bits} bits", "QuantisedKVCache", "output", output.new_ids, new, 0)
    assert n_bits == 8 or [output.new_ids for output in outputs] != [output.new_ids for output in exact]


@pytest.mark.parametrize("n_bits", [0, 8])
def test_a_pool_of_no_given_size_is_as_large_as_the_contexts_or_the_memory(llama, n_bits: int) -> None:
    config = replace(SMALL, n_blocks=0, kv_bits=n_bits)
    assert Engine(llama, None, config).stats().n_blocks == 5 * 64 // 4
    assert Engine(llama, None, replace(config, block_size=10)).stats().n_blocks == 5 * 7  # 64 positions need 7 of 10
    engine = Engine(llama, None, replace(config, cache_gib=20_000 / 2**30))
    assert 20_000 - engine.store.n_bytes // engine.pool.n_blocks < engine.store.n_bytes <= 20_000


# The end of an answer


def test_stop_strings_ends_and_lengths(llama) -> None:
    prompt = some_prompts(1, 14)[0]
    free = naive(llama, prompt, RequestParams(20, temperature=0, ignore_eos=True))
    text = free[1]
    for place in range(2, 8):
        stop = text[place : place + 3]  # somewhere across the borders of tokens
        params = RequestParams(20, temperature=0, ignore_eos=True, stop=(stop, "zz"))
        engine = Engine(llama, LETTERS, SMALL)
        engine.add(prompt, params)
        outputs = drain(engine)
        assert answers(outputs)["request-0"] == naive(llama, prompt, params)
        assert answers(outputs)["request-0"][1] == text[: text.index(stop)]
    first = free[0][0]
    model = CausalLM(replace(llama.config, eos_id=first)).double()
    model.load_state_dict(llama.state_dict())
    [output] = Engine(model, LETTERS, SMALL).generate([prompt], GREEDY)
    assert (output.new_ids, output.text, output.finish_reason) == ([first], "", "stop")
    [output] = Engine(llama, LETTERS, SMALL).generate([prompt], replace(GREEDY, max_tokens=1, ignore_eos=True))
    assert (output.new_ids, output.finish_reason, output.n_prompt) == ([first], "length", len(prompt))


def test_tokens_behind_a_stop_string_are_not_counted(llama) -> None:
    engine = Engine(llama, LETTERS, replace(SMALL, speculate="draft"), llama)  # every guess is accepted
    outputs = engine.generate(some_prompts(6, 2), replace(GREEDY, stop=("a", "b"), ignore_eos=True))
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert engine.stats().generated_tokens == sum(output.n_generated for output in outputs)


def test_logprobs_are_the_models(llama) -> None:
    prompt = some_prompts(1, 15)[0]
    [output] = Engine(llama, LETTERS, SMALL).generate([prompt], RequestParams(6, 0.7, seed=1, logprobs=3))
    assert len(output.logprobs) == len(output.new_ids)
    for place, told in enumerate(output.logprobs):
        with torch.no_grad():
            logprobs = llama(torch.tensor([prompt + output.new_ids[:place]]))[0, -1].log_softmax(0)
        assert told.token_id == output.new_ids[place]
        assert abs(told.logprob - float(logprobs[told.token_id])) < 1e-5
        assert [token_id for token_id, _ in told.top] == logprobs.topk(3).indices.tolist()
    assert Engine(llama).generate([prompt], GREEDY)[0].logprobs is None


class DeadEnd:
    """Two tokens are allowed, then none, and the text may not end."""

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> torch.Tensor:
        return torch.full((VOCAB,), state < 2)

    def advance(self, state: int, token_id: int) -> int:
        return state + 1

    def may_end(self, state: int) -> bool:
        return False


@pytest.mark.parametrize("speculate", ["none", "ngram"])
def test_a_row_without_any_token_to_choose_ends_alone(llama, speculate: str) -> None:
    prompts = some_prompts(4, seed=16)
    params = [replace(GREEDY, ignore_eos=True)] * 4
    params[1] = replace(GREEDY, constraint=DeadEnd())
    engine = Engine(llama, LETTERS, replace(SMALL, speculate=speculate, max_step_tokens=48))
    outputs = engine.generate(prompts, params)
    check_empty(engine)
    assert outputs[1].finish_reason == "error" and len(outputs[1].new_ids) == 2
    for index in (0, 2, 3):
        assert outputs[index].new_ids == naive(llama, prompts[index], params[index], outputs[index].new_ids)[0]


# Refusals


def test_what_can_never_be_answered_is_refused_and_leaves_no_trace(llama) -> None:
    engine = Engine(llama, None, replace(SMALL, n_blocks=10, max_waiting=2))
    engine.add([7], GREEDY, "taken")
    before = engine.stats()
    for prompt, params, message in [
        ([], GREEDY, "the prompt is empty"),
        ([3, VOCAB], GREEDY, "holds 61, which is no token id of 0..60"),
        ([3, True], GREEDY, "holds True"),
        ([3] * 53, GREEDY, r"prompt \(53 tokens\) and max_tokens \(12\) exceed the model's context of 64 tokens"),
        ([3] * 52, GREEDY, "need 16 blocks of 4 positions, but the pool has 10"),
        ([3], replace(GREEDY, logit_bias=((VOCAB, 1.0),)), "logit_bias names id 61"),
        ([3], replace(GREEDY, stop=("a",)), "stop texts need an engine with a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, params)
    with pytest.raises(ValueError, match="request id 'taken' is in use"):
        engine.add([3], GREEDY, "taken")
    with pytest.raises(ValueError, match="belong to one tenant"):
        engine.add_choices([3], [GREEDY, replace(GREEDY, tenant="b")])
    with pytest.raises(Overloaded):
        engine.add_choices([3], [GREEDY, GREEDY])
    assert engine.stats() == before and list(engine.requests) == ["taken"]
    drain(engine)


def test_bad_engines_are_refused(llama, models) -> None:
    with pytest.raises(ValueError, match="kv_bits=3 is not known; use 8 or 4"):
        EngineConfig(kv_bits=3)
    with pytest.raises(ValueError, match="unknown speculate 'grams'"):
        EngineConfig(speculate="grams")
    with pytest.raises(ValueError, match="a draft model is needed for 'draft' and only there"):
        Engine(llama, None, EngineConfig(speculate="draft"))
    other = CausalLM(ModelConfig(vocab_size=31, d_model=12, n_layers=1, d_head=4, d_ff=8))
    with pytest.raises(ValueError, match="draft vocabulary 31 != target 61"):
        Engine(llama, None, EngineConfig(speculate="draft"), other)
    experts = ExpertConfig(n_experts=3, d_expert=5, capacity_factor=1.0)
    with pytest.raises(ValueError, match="experts with a capacity_factor drop tokens"):
        Engine(CausalLM(ModelConfig(vocab_size=31, d_model=12, n_layers=1, d_head=4, experts=experts)))


def test_shape_comments_hold(llama, checked_shapes) -> None:
    with checked_shapes(serving_engine) as checked:
        config = replace(SMALL, speculate="draft", max_step_tokens=48)
        Engine(llama, LETTERS, config, llama).generate(some_prompts(4), GREEDY)
    assert len(checked) >= 2, checked
