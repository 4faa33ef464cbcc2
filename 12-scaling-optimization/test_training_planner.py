"""Proofs for training_planner: counts against models on the meta device, and against what three papers print."""

import dataclasses
import statistics

import pytest
import torch
from torch import nn

from llm_calculators import count_parameters
from llm_config import ExpertConfig, ModelConfig
from modern_llm_architectures import CausalLM
from pipeline_parallel import peak_of, simulate
from training_cost import GPUS, MODELS, training_flops
from training_planner import (
    KERNEL_SHARE,
    MEGATRON,
    RESERVED,
    SELECTIVE,
    Plan,
    best_plan,
    block_activations,
    candidates,
    check_plan,
    enough_gpus,
    estimate_plan,
    gpt_parameters,
    gpt_step_flops,
    in_flight,
    known_model,
    layers_of,
    llama_plans,
    megatron_block_bytes,
    megatron_days,
    megatron_model,
    megatron_plan,
    memory,
    predicted_tflops,
    recomputed_flops,
    selective_overhead,
    stage_memory,
    stage_parameters,
    step_time,
    utilisations,
    zero_table,
)

A100, H100 = GPUS["A100 80GB SXM"], GPUS["H100 SXM"]
SMALL = ModelConfig(100, d_model=24, n_layers=5, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40, tie_embeddings=False)


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Parameters


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-2-70B", "Llama-3.1-405B"])
def test_stages_hold_what_models_on_the_meta_device_hold(parity, name: str) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(config, max_seq_len=16))  # the rotary table is no parameter
    parity(
        "planner, parameters", "CausalLM on the meta device", "output", count_parameters(config).total, numel(model), 0
    )
    for n_stages in (1, 4, 16):
        plan = Plan(n_gpus=n_stages, pipeline_size=n_stages)
        held, first = [], 0
        for stage in range(n_stages):
            blocks = model.blocks[first : first + layers_of(config, n_stages, stage)]
            first += len(blocks)
            ends = (numel(model.token_emb) if stage == 0 else 0) + (
                numel(model.lm_head) + numel(model.final_norm) if stage == n_stages - 1 else 0
            )
            held.append(numel(blocks) + ends)
        ours = [stage_parameters(config, plan, stage) for stage in range(n_stages)]
        parity("planner, stages", "modules on the meta device", "output", ours, held, 0)
        assert sum(ours) == numel(model)


def test_tensor_parallelism_divides_matrices_and_copies_norms() -> None:
    whole, half = (stage_parameters(SMALL, Plan(n_gpus=size, tensor_size=size), 0) for size in (1, 2))
    norms = count_parameters(SMALL).norms
    assert whole == count_parameters(SMALL).total and half == (whole - norms) / 2 + norms


def test_a_tied_matrix_lies_on_the_first_and_the_last_stage() -> None:
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    plan = Plan(n_gpus=2, pipeline_size=2)
    total = sum(stage_parameters(tied, plan, stage) for stage in (0, 1))
    assert total == count_parameters(tied).total + 100 * 24
    assert stage_parameters(tied, Plan(n_gpus=1), 0) == count_parameters(tied).total


# What papers print


def test_zero_table_of_the_paper(parity) -> None:
    # Rajbhandari et al. 2020, table 1: GB under ZeRO 1, 2 and 3 (there P_os, P_os+g, P_os+g+p)
    printed = {
        (1, 7.5e9): [120, 120, 120], (4, 7.5e9): [52.5, 41.3, 30], (16, 7.5e9): [35.6, 21.6, 7.5],
        (64, 7.5e9): [31.4, 16.6, 1.88], (256, 7.5e9): [30.4, 15.4, 0.47], (1024, 7.5e9): [30.1, 15.1, 0.12],
        (1, 128e9): [2048, 2048, 2048], (4, 128e9): [896, 704, 512], (16, 128e9): [608, 368, 128],
        (64, 128e9): [536, 284, 32], (256, 128e9): [518, 263, 8], (1024, 128e9): [513, 257, 2],
        (1, 1e12): [16000, 16000, 16000], (4, 1e12): [7000, 5500, 4000], (16, 1e12): [4750, 2875, 1000],
        (64, 1e12): [4187, 2218, 250], (256, 1e12): [4046, 2054, 62.5], (1024, 1e12): [4011, 2013, 15.6],
    }  # fmt: skip
    found = {(n_gpus, size): held for n_gpus, size, held in zero_table()}
    assert set(found) == set(printed)
    ratios = [[ours / theirs for ours, theirs in zip(found[key], printed[key], strict=True)] for key in printed]
    parity("ZeRO memory", "table 1 of arXiv 1910.02054", "output", ratios, [[1.0] * 3] * len(ratios), 0.025)


def test_sizes_of_table_1_of_megatron(parity) -> None:
    ours = [round(gpt_parameters(row.d_model, row.n_layers) / 1e9, 1) for row in MEGATRON]
    parity("GPT parameters", "table 1 of arXiv 2104.04473", "output", ours, [row.billions for row in MEGATRON], 1e-9)
    for row in MEGATRON:
        model = megatron_model(row)
        check_plan(model, megatron_plan(row))
        assert count_parameters(model).total == pytest.approx(row.billions * 1e9, rel=0.05), "three matrices, not two"
        assert row.d_model % row.n_heads == 0


def test_flops_of_megatron_are_ours_but_for_future_keys_and_recomputation() -> None:
    row = MEGATRON[4]
    model, plan = megatron_model(row), megatron_plan(row)
    terms = training_flops(model, row.batch_size * 2048, 2048)
    matrices = terms["matrices_forward"] + terms["matrices_backward"]
    attention = terms["attention_forward"] + terms["attention_backward"]
    theirs = gpt_step_flops(row.batch_size, row.d_model, row.n_layers, again=False)
    assert matrices + 2 * attention * 2048 / 2049 == pytest.approx(theirs, rel=2e-3), "they count keys of the future"
    again = gpt_step_flops(row.batch_size, row.d_model, row.n_layers)
    assert recomputed_flops(model, plan) / (matrices + attention) == pytest.approx(1 / 3)
    assert 1.3 < again / theirs < 4 / 3, "all but the head's product is done again"


def test_days_of_megatron() -> None:
    # Narayanan et al. 2021, section 5.1: 34 days for GPT-3 on 1,024 A100s, 84 days for a trillion on 3,072
    assert megatron_days(175e9, 300e9, 1024, 140) == pytest.approx(34, abs=0.5)
    assert megatron_days(1e12, 450e9, 3072, 163) == pytest.approx(84, abs=1)


def test_one_kernel_share_predicts_all_rows_of_megatron() -> None:
    ratios = [predicted_tflops(row) / row.tflops for row in MEGATRON]
    assert 0.95 < statistics.median(ratios) < 1.05
    assert min(ratios) > 0.85 and max(ratios) < 1.15
    assert all(memory(megatron_model(row), megatron_plan(row)).total < 80e9 for row in MEGATRON), "they ran"


def test_selective_recomputation_of_the_paper() -> None:
    # Korthikanti et al. 2022: 5 a s / h is 80 for GPT-3 and 64 for 530B, so selective saves 70 % and 65 %
    for d_model, n_heads, scores, saved in ((12288, 96, 80, 0.70), (20480, 128, 64, 0.65)):
        unit = 2048 * 1 * d_model
        whole, part = (megatron_block_bytes(2048, 1, d_model, n_heads, 1, kept) for kept in ("none", "selective"))
        assert whole / unit == 34 + scores and 1 - part / whole == pytest.approx(saved, abs=0.006)
        assert megatron_block_bytes(2048, 1, d_model, n_heads, 8, "full") == 2 * unit
        assert megatron_block_bytes(2048, 1, d_model, n_heads, 8, "none") == whole / 8
    for _, d_model, mfu, hfu in SELECTIVE:  # table 5 counts the repeated attention three times as dear as its forward
        assert hfu / mfu - 1 == pytest.approx(3 * selective_overhead(d_model, 2048), abs=0.002)


def test_llama_405b_fits_its_gpus_only_with_elementwise_recomputation() -> None:
    model = known_model("Llama-3.1-405B")
    for plan, tflops in llama_plans():
        check_plan(model, plan)
        assert memory(model, plan).total > H100.memory
        chunked = dataclasses.replace(plan, recompute="selective")
        assert memory(model, chunked).total < H100.memory
        flops = sum(training_flops(model, plan.batch_size * 8192, 8192).values())
        shares = utilisations(model, plan, flops / plan.n_gpus / (tflops * 1e12), H100)
        assert shares["model FLOPs (MFU)"] == pytest.approx(0.42, abs=0.02), "the paper prints 43 % and 41 %"
        assert plan.batch_size * plan.seq_len == pytest.approx(16e6, rel=0.05), "16M tokens in a batch"


# Activations


def saved_bytes(block: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(kept.values())


class FusedBlock(nn.Module):
    """A Llama block whose norm and attention are PyTorch's own: each keeps its input, attention its output too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_query, d_kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False)
            for sizes in (
                (config.d_model, d_query), (config.d_model, d_kv), (config.d_model, d_kv), (d_query, config.d_model),
                (config.d_model, config.d_ff), (config.d_model, config.d_ff), (config.d_ff, config.d_model),
            )
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = Norm.apply(x)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, self.config.d_head)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = Add.apply(x, self.out_proj(mixed.transpose(1, 2).flatten(2)))
        normed = Norm.apply(x)
        return Add.apply(x, self.down(nn.functional.silu(self.gate(normed)) * self.up(normed)))


class Norm(torch.autograd.Function):
    """A norm without weights that keeps its input and nothing else, as a fused kernel does."""

    @staticmethod
    def forward(context, x: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(x)
        return nn.functional.rms_norm(x, x.shape[-1:])


class Add(torch.autograd.Function):
    """A sum, which keeps nothing."""

    @staticmethod
    def forward(context, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_activations_are_what_autograd_keeps(parity) -> None:
    config = ModelConfig(50, d_model=48, n_layers=1, n_heads=4, n_kv_heads=4, d_head=12, d_ff=80, max_seq_len=32)
    x = torch.randn(2, 16, 48, requires_grad=True)
    kept = saved_bytes(FusedBlock(config), x)
    ours = sum(block_activations(config, 32, n_bytes=4).values())
    parity("block_activations", "tensors that autograd saves", "output", ours / kept, 1.0, 0.005)
    selective = block_activations(config, 32, 4, "selective")
    assert sum(selective.values()) == ours - 4 * 32 * (2 * 48 + 2 * 80)
    assert sum(block_activations(config, 32, 4, "full").values()) == 4 * 32 * 48


def test_micro_batches_in_flight_are_those_of_the_timetable() -> None:
    for n_stages, n_micro in ((4, 8), (3, 2), (1, 5)):
        plan = Plan(n_gpus=n_stages, pipeline_size=n_stages, batch_size=n_micro)
        table = simulate("1f1b", n_stages, n_micro)
        assert [in_flight(plan, stage) for stage in range(n_stages)] == [table.peak(stage) for stage in range(n_stages)]
    assert peak_of([("F", 0), ("F", 1), ("B", 0)]) == 2
    plan = Plan(n_gpus=4, pipeline_size=4, batch_size=16, n_chunks=2)
    assert in_flight(plan, 0) == pytest.approx(4 * (1 + 3 / 8))


# Time


def test_terms_of_a_step_by_hand() -> None:
    plan = Plan(n_gpus=8, tensor_size=2, pipeline_size=2, batch_size=16, seq_len=10)
    assert (plan.data_size, plan.n_micro) == (2, 8)
    time = step_time(SMALL, plan, H100, kernel_share=0.5)
    flops = sum(training_flops(SMALL, 160, 10).values())
    assert time.compute == pytest.approx(flops / (8 * H100.flops * 0.5)) and time.recompute == 0
    tokens = 80  # of each of two pipelines
    assert time.elementwise == pytest.approx(4 * sum(block_activations(SMALL, 80).values()) * 2.5 / 2 / H100.bandwidth)
    assert time.tensor == pytest.approx(4 * 2.5 * (2 * 1 / 2 * 2 * tokens * 24) / 450e9)
    assert time.pipeline == pytest.approx(2 * 2 * tokens * 24 / 2 / 50e9)
    busy = time.compute + time.elementwise + time.tensor + time.pipeline
    assert time.bubble / (busy + time.bubble) == pytest.approx(1 / 9), "(p - 1) / (m + p - 1)"
    assert time.total == pytest.approx(busy + time.bubble + time.data)
    chunks = step_time(SMALL, dataclasses.replace(plan, n_chunks=2), H100, 0.5)
    assert chunks.pipeline == pytest.approx(2 * time.pipeline) and chunks.bubble < time.bubble
    full = step_time(SMALL, dataclasses.replace(plan, recompute="full"), H100, 0.5)
    assert full.recompute == pytest.approx(time.compute / 3) and full.tensor == pytest.approx(1.5 * time.tensor)


@pytest.mark.parametrize("zero", range(4))
def test_messages_of_the_gradients_by_hand(zero: int) -> None:
    """A ring of n sends (n - 1) / n of all bf16 numbers a turn: a reduce-scatter is one, as an all-gather is."""
    for n_gpus, n_micro, link in ((8, 2, 450e9), (16, 1, 50e9)):  # inside a node; between two
        plan = Plan(n_gpus=n_gpus, batch_size=16, seq_len=10, zero_stage=zero)
        turns = (2, 2, n_micro + 1, 3 * n_micro)[zero]
        sent = turns * (n_gpus - 1) / n_gpus * 2 * count_parameters(SMALL).total
        time = step_time(SMALL, plan, H100)
        hidden = 2 / 3 * (time.compute + time.elementwise)  # under the backward pass
        assert plan.n_micro == n_micro and time.data == pytest.approx(sent / link - hidden) and time.data > 0
    assert step_time(SMALL, Plan(n_gpus=8, batch_size=16, seq_len=2000), H100).data == 0, "all of it is hidden"


def test_memory_by_hand() -> None:
    """One micro-batch of 30 tokens on one of 4 GPUs, with vocabulary 100, width 24, 5 blocks."""
    plan = Plan(n_gpus=4, batch_size=4, seq_len=30, zero_stage=3)
    n, block = count_parameters(SMALL).total, sum(block_activations(SMALL, 30).values())
    held = memory(SMALL, plan)
    assert (held.weights, held.gradients, held.optimizer) == pytest.approx((2 * n / 4, 2 * n / 4, 12 * n / 4))
    assert held.activations == pytest.approx(5 * block + 2 * 4 * 30 * 100), "logits and their gradient in float32"
    matrices = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40  # q and out, k and v, gate and up and down
    assert held.gathered == 2 * 2 * matrices, "this block and the next, in bf16"
    assert held.total == pytest.approx(sum(dataclasses.astuple(held)))
    alone = memory(SMALL, dataclasses.replace(plan, n_gpus=1))
    assert alone.gathered == 0 and alone.weights == 2 * n
    full = memory(SMALL, dataclasses.replace(plan, recompute="full"))
    assert full.activations == pytest.approx(5 * 2 * 30 * 24 + block + 2 * 4 * 30 * 100), "one block is whole at a time"


def test_days_of_a_plan() -> None:
    estimate = estimate_plan(SMALL, Plan(n_gpus=2, batch_size=8, seq_len=10), H100)
    assert estimate.days(80 * 1000) == pytest.approx(1000 * estimate.time.total / 86_400)


def test_definitions_of_utilisation_are_in_their_order() -> None:
    model, plan = known_model("Llama-3.1-8B"), Plan(n_gpus=64, batch_size=128, recompute="full")
    shares = utilisations(model, plan, 10.0, H100)
    assert list(shares.values()) == sorted(shares.values())
    assert shares["hardware FLOPs (HFU)"] == pytest.approx(4 / 3 * shares["model FLOPs (MFU)"])
    n_tokens = 128 * 4096
    assert shares["6N"] == pytest.approx(6 * 8.03e9 * n_tokens / (10 * 64 * 989.4e12), rel=1e-3)


def test_more_gpus_are_never_slower_and_memory_falls_with_the_stage() -> None:
    model = known_model("Llama-3.1-8B")
    times = [best_plan(model, Plan(n_gpus=n_gpus, batch_size=256), H100).time.total for n_gpus in (8, 32, 128)]
    assert times == sorted(times, reverse=True)
    held = [stage_memory(model, Plan(n_gpus=8, batch_size=64, zero_stage=stage), 0) for stage in range(3)]
    assert [one.total for one in held] == sorted((one.total for one in held), reverse=True)
    assert held[1].optimizer == held[0].optimizer / 8 and held[2].gradients == held[0].gradients / 8


# Bad plans


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pipeline_size": 6, "n_gpus": 6}, "pipeline_size=6 times 1 chunks is more than the 5 layers; choose fewer"),
        ({"tensor_size": 8}, "tensor_size=8 does not divide the 4 heads"),
        ({"n_gpus": 6, "tensor_size": 4}, "n_gpus=6 is not divisible by tensor_size . pipeline_size = 4"),
        ({"batch_size": 12}, "batch_size=12 is not divisible by .* = 8; choose a multiple of 8"),
        ({"zero_stage": 4}, "zero_stage must be finite and >= 0 and <= 3, got 4"),
        ({"recompute": "some"}, "unknown recompute 'some'"),
        ({"zero_stage": 3, "pipeline_size": 2}, "use zero_stage 0 or 1 with a pipeline"),
        ({"n_gpus": 0}, "n_gpus must be finite and >= 1, got 0"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(SMALL, dataclasses.replace(Plan(batch_size=16), **change))


def test_plans_that_do_not_fit_are_refused_with_a_remedy_that_fits() -> None:
    model = known_model("Llama-3.1-70B")
    plan = Plan(n_gpus=64, tensor_size=8)
    with pytest.raises(
        ValueError, match="155.3 GB .*more than the 72.0 GB that H100 SXM has.*fits with --zero-stage 1"
    ):
        estimate_plan(model, plan, H100)
    assert estimate_plan(model, dataclasses.replace(plan, zero_stage=1), H100).memory.total < H100.memory * (
        1 - RESERVED
    )
    with pytest.raises(ValueError, match="; 2 GPUs hold it"):
        estimate_plan(known_model("Llama-3.1-8B"), Plan(n_gpus=1), H100)
    with pytest.raises(ValueError, match="no layout of 4 x H100 SXM holds this model .*; 16 GPUs would do"):
        best_plan(model, Plan(n_gpus=4), H100)
    assert best_plan(model, Plan(n_gpus=16), H100).memory.total < 72e9
    with pytest.raises(ValueError, match="no layout shares batch_size=1 out to 1024 GPUs; choose a multiple of 1024"):
        best_plan(known_model("Llama-3.1-8B"), Plan(1024, batch_size=1), GPUS["H100 SXM"])
    with pytest.raises(ValueError, match="unknown gpu with known links 'T4'"):
        step_time(SMALL, Plan(), GPUS["T4"])
    with pytest.raises(ValueError, match="the planner knows dense models"):
        check_plan(dataclasses.replace(SMALL, experts=ExpertConfig(4, 2, 16)), Plan())
    with pytest.raises(ValueError, match="unknown model 'Llama-3.1-9B'; did you mean"):
        known_model("Llama-3.1-9B")


def test_candidates_divide_evenly() -> None:
    plans = list(candidates(SMALL, Plan(n_gpus=8, batch_size=32, seq_len=16)))
    assert len(plans) > 20 and KERNEL_SHARE < 1
    plans += candidates(SMALL, Plan(n_gpus=8, batch_size=32, seq_len=16, n_chunks=2))  # of more stages than one
    for plan in plans:
        check_plan(SMALL, plan)
        assert plan.pipeline_size > 1 or plan.n_chunks == 1


def test_links_recomputation_and_zero_2_by_hand() -> None:
    """Eight tensor-parallel GPUs are one node still, sixteen are not; what is done again also moves again."""
    for size, link in ((8, 450e9), (16, 50e9)):
        time = step_time(SMALL, Plan(n_gpus=size, tensor_size=size, batch_size=16, seq_len=10), H100)
        assert time.tensor == pytest.approx(4 * 5 * 2 * (size - 1) / size * 2 * 160 * 24 / link)
    plain, selective, full = (
        step_time(SMALL, Plan(n_gpus=8, batch_size=16, seq_len=10, recompute=kept), H100)
        for kept in ("none", "selective", "full")
    )
    assert full.elementwise == selective.elementwise == pytest.approx(1.5 * plain.elementwise)
    with pytest.raises(ValueError, match="zero_stage=2 with pipeline_size=2 .*use zero_stage 0 or 1 with a pipeline"):
        check_plan(SMALL, Plan(n_gpus=8, pipeline_size=2, zero_stage=2, batch_size=16))


def test_the_fullest_stage_may_be_the_last() -> None:
    wide = dataclasses.replace(SMALL, vocab_size=100_000, n_layers=6)
    for plan in (Plan(n_gpus=3, pipeline_size=3, batch_size=6, seq_len=64), Plan(n_gpus=6, pipeline_size=6)):
        held = [stage_memory(wide, plan, stage).total for stage in range(plan.pipeline_size)]
        assert memory(wide, plan).total == max(held)
    assert max(held) == held[-1]  # the logits


def test_gradients_of_eight_replicas_of_eight_gpus_travel_between_nodes() -> None:
    model = dataclasses.replace(SMALL, n_heads=8, n_kv_heads=8)
    plan = Plan(n_gpus=64, tensor_size=8, batch_size=8, seq_len=2)
    time = step_time(model, plan, H100)
    sent = 2 * 7 / 8 * 2 * stage_parameters(model, plan, 0)
    hidden = 2 / 3 * (time.compute + time.elementwise + time.tensor)
    assert time.data == pytest.approx(sent / 50e9 - hidden) and time.data > 0


def test_gpus_that_would_do_are_more_than_there_are_and_have_a_sequence_each() -> None:
    assert enough_gpus(SMALL, Plan(n_gpus=8), H100) == 16 and enough_gpus(SMALL, Plan(n_gpus=6), H100) == 8
    assert enough_gpus(SMALL, Plan(n_gpus=33, batch_size=1), H100) == 64  # at most 4 x 4 of them share a replica
