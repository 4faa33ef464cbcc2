"""Topic 09: the ladder's ends are known models, budgets are counted right, and every experiment runs at any size."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import context_extension
import equal_compute
import router_experiments
from context_extension import (
    LENGTHS,
    SHORT,
    STRETCHES,
    WINDOWS,
    StreamingAttention,
    gap_by_place,
    gaps_by_length,
    long_rows,
    stretched,
    stretched_model,
)
from equal_compute import SIZES, TRAINING, lasting, remembered, train_steps
from gpt2 import GPT2, GPT2Config
from llm_calculators import count_parameters, forward_flops, kv_bytes_per_token
from llm_layers import RotaryTable, rotary_frequencies, rotate
from mixture_of_experts import load_balance_loss
from modern_llm_architectures import CausalLM, main
from modern_llm_experiments import ATTENTIONS, CHANGES, EXPERIMENTS, WIDE, FiguresConfig, equal_parameters, rung
from router_experiments import CONDITIONS, Cure, RouterLoss, build, expert_layers, held_out_load, smoothed
from sequence_modeling import BOS_ID, IGNORE
from training_transformers import WorldBatches
from transformer_architecture import tiny_world
from workbench import BLOCK, RunConfig, render_table

N_KINDS = len(tiny_world()[1])


def ids(batch: int = 2, seq: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, N_KINDS, (batch, seq), generator=torch.Generator().manual_seed(seed))


# The ladder


def test_the_first_rung_is_gpt2(parity) -> None:
    torch.manual_seed(0)
    ours = rung(0).double()
    sizes = GPT2Config(N_KINDS, SIZES.max_seq_len, SIZES.d_model, SIZES.n_layers, SIZES.n_heads, dropout=0)
    theirs = GPT2(sizes).double()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    moved = {
        name.replace("token_emb.0.", "token_emb.")
        .replace("token_emb.1.", "pos_emb.")
        .replace("blocks", "encoder.blocks")
        if "final" not in name
        else f"encoder.{name}": tensor
        for name, tensor in ours.state_dict().items()
        if name != "lm_head.weight"
    }
    theirs.load_state_dict(moved)
    parity("ladder, first rung", "topic 08's GPT2", "output", ours(ids()), theirs(ids()), 1e-10)


def test_each_rung_changes_what_its_name_says() -> None:
    names = [{name: tuple(p.shape) for name, p in rung(n).named_parameters()} for n in range(len(CHANGES) + 1)]
    gone = [old.keys() - new.keys() for old, new in zip(names, names[1:], strict=False)]
    come = [new.keys() - old.keys() for old, new in zip(names, names[1:], strict=False)]
    assert all("norm.bias" in name for name in gone[0]) and len(gone[0]) == 5 and not come[0]
    assert gone[1] == {"token_emb.0.weight", "token_emb.1.weight"} and come[1] == {"token_emb.weight"}
    assert come[2] == {f"blocks.{layer}.ffn.gate_proj.weight" for layer in (0, 1)}
    assert gone[3] == {f"blocks.{i}.self_attn.{n}_proj.bias" for i in (0, 1) for n in ("q", "k", "v", "out")}
    shrunk = {name for name in names[4] if names[5][name] != names[4][name]}
    assert shrunk == {f"blocks.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "kv"}
    assert come[5] == {f"blocks.{i}.self_attn.{n}_norm.weight" for i in (0, 1) for n in "qk"}
    assert come[6] == {"lm_head.weight"} and not gone[4] | gone[5] | gone[6] | come[3] | come[4]


@pytest.mark.parametrize("n_changes", [0, 3])
def test_all_rungs_start_from_one_distribution(n_changes: int) -> None:
    torch.manual_seed(0)
    for name, parameter in rung(n_changes).named_parameters():
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.08), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_the_last_rung_is_the_modern_model() -> None:
    model = rung(len(CHANGES))
    plain = CausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids()), plain(ids()))


@pytest.mark.parametrize("n_changes", [0, 2, 3, len(CHANGES)])
def test_the_budget_counts_what_a_rung_multiplies(n_changes: int) -> None:
    model = rung(n_changes)
    with FlopCounterMode(display=False) as counter:
        model(ids(1, 16))
    products = counter.get_flop_counts()["Global"]
    matrices = sum(flops for op, flops in products.items() if any(word in str(op) for word in ("mm", "linear")))
    assert matrices == 16 * forward_flops(model.config, 16)["matrices"]


def test_steps_of_a_budget_by_hand() -> None:
    per_step = 3 * sum(forward_flops(SIZES, 64).values()) * 8 * 64
    assert train_steps(SIZES, 10.4 * per_step, TRAINING) == 10
    assert lasting(TRAINING, 40).warmup_steps == 10 and lasting(TRAINING, 4000).warmup_steps == 50


def test_attentions_have_equal_parameters_and_the_bytes_of_their_caches() -> None:
    wanted = count_parameters(WIDE).total
    for name in ATTENTIONS:
        config = equal_parameters(name)
        model = CausalLM(config)
        assert abs(sum(p.numel() for p in model.parameters()) / wanted - 1) < 0.004
        caches = model.new_caches()
        model(ids(1, 9), caches)
        assert sum(cache.n_bytes for cache in caches) / 2 == 9 * kv_bytes_per_token(config)  # float32 here, bf16 there


def test_a_measurement_is_kept_until_it_is_wanted_again(tmp_path, capsys) -> None:
    calls, run, config = [], RunConfig(out=tmp_path, device="cpu"), FiguresConfig()

    def measure() -> dict:
        calls.append(len(calls))
        return {"gap": float(len(calls))}

    assert [remembered(config, run, "a", measure)["gap"] for _ in range(2)] == [1.0, 1.0]
    assert "a: taken from" in capsys.readouterr().out
    assert remembered(config, run, "b", measure)["gap"] == 2.0
    assert remembered(replace(config, again=True), run, "a", measure)["gap"] == 3.0
    assert json.loads((tmp_path / "measured.json").read_text()) == {"a": {"gap": 3.0}, "b": {"gap": 2.0}}
    (tmp_path / "measured.json").write_text("[]")
    with pytest.raises(ValueError, match="measured.json must hold a JSON object"):
        remembered(config, run, "a", lambda: pytest.fail("nothing is measured that cannot be kept"))


# The router


def batch() -> dict:
    return WorldBatches(replace(TRAINING, batch_size=4, seq_len=20), 0)(0)


def test_losses_are_added_for_each_counted_token_and_the_bias_moves_against_the_load() -> None:
    torch.manual_seed(0)
    model = CausalLM(CONDITIONS["softmax router, no cure"][0])
    plain, count = RouterLoss(Cure())(model, batch())
    routings = [layer.routing for layer in expert_layers(model)]
    balanced, _ = RouterLoss(Cure(balance=0.5))(model, batch())
    pooled, _ = RouterLoss(Cure(balance=0.5, pooled=True))(model, batch())
    z, _ = RouterLoss(Cure(z=0.1))(model, batch())
    each = sum(load_balance_loss([one]) for one in routings) / 2
    assert ((balanced - plain) / count).item() == pytest.approx(0.5 * each.item(), rel=1e-4)
    assert ((pooled - plain) / count).item() == pytest.approx(0.5 * load_balance_loss(routings).item(), rel=1e-4)
    logits = torch.stack([one.logits for one in routings])
    assert ((z - plain) / count).item() == pytest.approx(0.1 * logits.logsumexp(-1).square().mean().item(), rel=1e-3)
    model = CausalLM(CONDITIONS["bias, no loss"][0])
    RouterLoss(Cure(bias_rate=0.25))(model, batch())
    for layer in expert_layers(model):
        assert torch.equal(layer.router.bias, 0.25 * (layer.counts.double().mean() - layer.counts).sign().float())
    before = [layer.router.bias.clone() for layer in expert_layers(model)]
    RouterLoss(Cure(bias_rate=0.25))(model.eval(), batch())
    assert all(torch.equal(layer.router.bias, old) for layer, old in zip(expert_layers(model), before, strict=True))


def test_pooled_layers_can_hide_what_each_of_them_does() -> None:
    model = CausalLM(CONDITIONS["softmax router, no cure"][0])
    model(ids())
    routings = []
    for layer, favoured in zip(expert_layers(model), ((0, 1, 2, 3), (4, 5, 6, 7)), strict=True):
        logits = torch.full_like(layer.routing.logits, -4.0)
        logits[:, list(favoured)] = 4.0
        chosen = torch.tensor(favoured).roll(1)[:2].expand(len(logits), 2)
        routings.append(layer.routing._replace(logits=logits, experts=chosen))
    one, other = (load_balance_loss([routing]).item() for routing in routings)
    assert min(one, other) > 1.8 * load_balance_loss(routings).item()


def test_a_collapsed_router_is_seen_as_one() -> None:
    torch.manual_seed(0)
    model = CausalLM(CONDITIONS["sigmoid router, no cure"][0])
    for layer in expert_layers(model):
        layer.router.bias[:2] = 100.0
    load = held_out_load(model)
    assert load["entropy"] == pytest.approx(math.log(2) / math.log(8)) and load["dead"] == 0.75


def test_an_expert_is_dead_below_a_tenth_of_its_share(monkeypatch) -> None:
    def visit(model: CausalLM, _: torch.Tensor) -> None:
        for layer in expert_layers(model):
            layer.counts = torch.tensor([40, 1, 20, 3, 30, 10, 30, 26])  # 20 each would be even

    monkeypatch.setattr(CausalLM, "forward", visit)
    assert held_out_load(CausalLM(CONDITIONS["softmax router, no cure"][0]))["dead"] == 1 / 8


def test_one_active_expert_keeps_its_gate_and_two_are_weighed_against_each_other() -> None:
    for name in ("Switch router, no cure", "softmax router, no cure"):
        torch.manual_seed(0)
        model = build(name)
        loss, _ = RouterLoss(Cure())(model, batch())
        loss.backward()
        assert all(layer.router.weight.grad.norm() > 1e-6 for layer in expert_layers(model)), name
        weights = expert_layers(model)[0].routing.weights
        assert weights.shape[1] == 1 + ("softmax" in name) and ((weights.sum(dim=1) < 0.5).all() == ("Switch" in name))


def test_smoothing_by_hand() -> None:
    assert smoothed([4.0, 2.0, 6.0, 1.0], width=2).tolist() == [4.0, 3.0, 4.0, 3.5]


# Longer contexts


def test_long_rows_carry_the_surprisal_of_their_targets() -> None:
    inputs, targets, surprisal = long_rows(3, 90)
    world, vocabulary = tiny_world()
    documents = world.stream(2**31 - 1, split="validation")
    first = next(documents)
    n = len(first.tokens)
    assert inputs[0, : n + 1].tolist() == [BOS_ID, *vocabulary.encode(first.tokens)]
    assert targets[0, :n].tolist() == vocabulary.encode(first.tokens) and targets[0, n] == IGNORE
    assert torch.allclose(surprisal[0, :n], torch.tensor(first.surprisal)) and inputs.shape == (3, 90)
    known = torch.where(targets == IGNORE, inputs[:, :1], targets)[:, :-1]
    assert torch.equal(torch.where(targets[:, :-1] == IGNORE, BOS_ID, known), inputs[:, 1:])


def test_gap_of_a_uniform_guess_is_known() -> None:
    rows = long_rows(2, 40)
    model = CausalLM(SHORT)
    model.token_emb.weight.data.zero_()
    nats, counts = gap_by_place(model, rows, 30)
    surprisal, counted = rows[2][:, :30], rows[1][:, :30] != IGNORE
    assert torch.equal(counts, counted.sum(dim=0))
    wanted = ((math.log(N_KINDS) - surprisal) * counted).sum(dim=0)
    assert torch.allclose(nats, wanted, atol=1e-4)


def test_long_rows_are_examined_in_their_last_half(monkeypatch) -> None:
    def place_by_place(model: object, rows: object, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 2.0 * torch.arange(seq_len), torch.full((seq_len,), 2.0)  # the gap of a place is its number

    monkeypatch.setattr(context_extension, "gap_by_place", place_by_place)
    gaps = gaps_by_length(CausalLM(SHORT), (torch.zeros(0),) * 3)
    assert gaps["64"] == 31.5 and gaps["128"] == 95.5 and gaps["512"] == 383.5 and gaps["curve"][1] == 47.5


def test_stretches_slow_what_they_should() -> None:
    plain = rotary_frequencies(SHORT.d_head, SHORT.rope_theta)

    def frequencies(method: str) -> torch.Tensor:
        config = stretched(method)
        return rotary_frequencies(SHORT.d_head, config.rope_theta, config.rope_scaling, config.max_seq_len, 512)

    assert torch.equal(frequencies("nothing"), plain)
    assert torch.allclose(frequencies("linear"), plain / 8)
    for method in ("NTK", "dynamic NTK"):  # at full length they are the same
        ratio = plain / frequencies(method)
        assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(8, rel=1e-4) and (ratio.diff() > 0).all()
    ratio = plain / frequencies("YaRN")
    assert ratio[0] == pytest.approx(1, abs=0.01) and ratio[-1].item() == pytest.approx(8, rel=1e-4)


@torch.no_grad()
def test_within_the_trained_length_windows_and_plain_positions_change_nothing() -> None:
    torch.manual_seed(0)
    model, token_ids = CausalLM(SHORT).double(), ids(2, 60)
    for method in ("nothing", "dynamic NTK", *WINDOWS):
        assert torch.allclose(stretched_model(model, method).double()(token_ids), model(token_ids), atol=1e-5), method
    with pytest.raises(ValueError, match="unknown stretch 'YaRNs'; did you mean 'YaRN'"):
        stretched("YaRNs")


@torch.no_grad()
def test_streaming_attention_equals_a_cache_that_counts_its_own_places(checked_shapes, parity) -> None:
    torch.manual_seed(0)
    layer, seq_len, window, sinks = StreamingAttention(24, 4, 2, 6).double(), 17, 5, 2
    layer.window_size, layer.n_sinks = window, sinks
    x, table = torch.randn(1, seq_len, 24).double(), RotaryTable(6, 100.0, 64)
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    mask = (distance >= 0) & ((distance < window) | (torch.arange(seq_len) < sinks))
    with checked_shapes(context_extension):
        got = layer(x, table.span(0, seq_len, x), mask)[0]
    q, k, v = layer.project(x)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    for place in range(seq_len):
        kept = mask[place].nonzero().flatten()
        rotation = table.span(0, len(kept), x)  # places in the cache: 0, 1, 2, ...
        keys = rotate(k[:, :, kept], rotation)
        query = rotate(q[:, :, place : place + 1], tuple(part[:, :, -1:] for part in rotation))
        weights = (query @ keys.transpose(-2, -1) / 6**0.5).softmax(dim=-1)
        wanted = layer.out_proj((weights @ v[:, :, kept])[0].transpose(0, 1).flatten())
        parity("StreamingAttention", "one query after another, its keys renumbered", "output", got[place], wanted, 1e-6)


# All of them


def test_figures_runs_every_experiment_and_fills_the_chapter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("modern_llm_bench.measure_speed", lambda *_: {"a step": "1.00x the speed"})
    monkeypatch.setattr("modern_llm_experiments.RATES", (1.0,))
    monkeypatch.setattr(context_extension, "N_ROWS", 1)
    (tmp_path / "README.md").write_text("<!-- results:begin router -->\n<!-- results:end -->\n")
    flags = "--shrink 200 --n-documents 4 --device cpu".split()
    flags += ["--folder", str(tmp_path / "figures"), "--out", str(tmp_path)]
    main(["figures", "--n-seeds", "1", *flags])
    main(["figures", "ladder", "--n-seeds", "2", *flags])  # one seed of each rung is there already
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    without_table = {"blocks", "sharing", "scaling"} | ({"kernel"} if not torch.cuda.is_available() else set())
    assert set(results) == set(EXPERIMENTS) - without_table
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn >= {"ladder", "ladder-rates", "kv-quality", "router", "context"}
    ladder = results["ladder"]["rows"]
    assert [row[0] for row in ladder] == ["GPT-2", *(f"+ {change}" for change in CHANGES)]
    for old, new in zip(ladder, ladder[1:], strict=False):
        assert new[4] == pytest.approx([after - before for after, before in zip(new[3], old[3], strict=True)])
    assert all(len(row[3]) == 2 and min(row[3]) > 0 for row in ladder)
    assert [row[0] for row in results["kv-quality"]["rows"]] == list(ATTENTIONS)
    router = {row[0]: row[1:] for row in results["router"]["rows"]}
    active, total = router["softmax router, no cure"][:2]
    assert total > 2 * active and router["dense, equal active parameters"][0] == pytest.approx(active, rel=0.05)
    assert router["dense, equal total parameters"][1] == pytest.approx(total, rel=0.05)
    assert all(0 < value <= 1 for name in list(router)[2:] for value in router[name][2])
    context = results["context"]["rows"]
    assert [row[0] for row in context] == list(STRETCHES + WINDOWS) and len(context[0]) == 1 + len(LENGTHS) + 2
    assert BLOCK.search((tmp_path / "README.md").read_text())[3].strip() == render_table(results["router"])


def test_bad_sizes_are_refused(tmp_path, capsys) -> None:
    for flags, message in (
        (["ladders"], "unknown experiment 'ladders'; did you mean 'ladder'?"),
        (["--gflops", "0"], "gflops must be finite and > 0, got 0"),
        (["--n-seeds", "0"], "n_seeds must be finite and >= 1, got 0"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["figures", *flags, "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.count("\n") == 1 and message in error


def test_experiment_modules_share_one_training() -> None:
    assert router_experiments.TRAINING is equal_compute.TRAINING is context_extension.TRAINING
