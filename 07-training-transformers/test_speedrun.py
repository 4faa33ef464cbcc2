"""Proofs for topic 07's speed-run: the protocol, probabilities over bytes, the clock, the baseline's architecture."""

import itertools
import json
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import speedrun
from context_experts import Reading
from speedrun import (
    NANOGPT,
    OURS,
    Clock,
    Corpus,
    Corrector,
    Recipe,
    SpeedrunConfig,
    Trained,
    held_out_bits,
    logits_at,
    make_corpus,
    nanogpt_like,
    parse_budget,
    rate_factor,
    thinned_order,
    train_in,
    write_on,
)
from test_context_experts import made_text
from transformer_architecture import CausalTransformer, ModelConfig

SMALL = replace(OURS, d_model=16, n_layers=1, seq_len=12, batch_size=3)
SMALL_BASELINE = replace(NANOGPT, d_model=16, n_layers=1, n_heads=2, seq_len=12, batch_size=3)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    train = list(dict.fromkeys(made_text(80, seed=0)[0].strip().split("\n\n")))
    held_out = [text for text in made_text(20, seed=1)[0].strip().split("\n\n") if text not in train]
    return make_corpus(train, [*held_out, "quiz: \x07?"])  # with bytes that the training text lacks


def ticks() -> itertools.count:
    """A clock that counts how often it is read: every run with it is the same on every machine."""
    return itertools.count().__next__


@pytest.fixture(scope="module")
def ours(corpus) -> Trained:
    return train_in(400, SMALL, corpus, 0, ticks())


@pytest.fixture(scope="module")
def baseline(corpus) -> Trained:
    return train_in(60, SMALL_BASELINE, corpus, 0, ticks())


def uniform(corpus: Corpus, recipe: Recipe) -> Trained:
    """A model whose output layer is still 0: every symbol equally likely."""
    torch.manual_seed(0)
    return Trained(recipe, corpus.alphabet, None, Corrector(recipe, corpus.alphabet.size))


# The text


def test_the_text_is_joined_and_no_paragraph_is_on_both_sides(corpus) -> None:
    assert len(corpus.train_ids) == len(corpus.train_text.encode()) == len(corpus.paragraph)
    first = corpus.train_text.split("\n\n")[0]
    assert int((corpus.paragraph == 0).sum()) == len(first) + 2
    assert corpus.alphabet.encode(corpus.held_out_text.encode()).equal(corpus.held_out_ids)
    with pytest.raises(ValueError, match="share 1; both sides need some, and none may be on both"):
        make_corpus(["one", "two"], ["two"])
    with pytest.raises(ValueError, match="2 paragraphs to train on and 0 held out"):
        make_corpus(["one", "two"], [])


def test_thinned_order_keeps_paragraphs_whole_and_in_order(corpus) -> None:
    order = thinned_order(corpus.paragraph, 9, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(len(corpus.train_ids)))
    visited = corpus.paragraph[order]
    runs = torch.unique_consecutive(visited)
    assert len(runs) == len(torch.unique(visited))  # no paragraph is torn apart
    assert int((runs[1:] < runs[:-1]).sum()) == 8  # nine copies, each in the original order
    assert int((runs[1:] - runs[:-1] == 1).sum()) < len(runs) / 4


# Probabilities and their protocol


@pytest.mark.parametrize("name", ["ours", "baseline"])
def test_probabilities_over_the_256_bytes_sum_to_one(name: str, corpus, request, parity) -> None:
    trained = request.getfixturevalue(name)
    ids = corpus.held_out_ids
    positions = torch.arange(5)[:, None] * 9 + torch.arange(12)
    with torch.no_grad():
        log_probs = trained.log_probs(ids, positions, trained.read(ids)).double()
    total = corpus.alphabet.byte_log_probs(log_probs).exp().sum(-1)
    parity(f"speed-run, {name}", "probabilities of 256 bytes sum to 1", "invariant", total, torch.ones(5, 12), 1e-6)


@pytest.mark.parametrize("name", ["ours", "baseline"])
def test_the_future_does_not_change_a_prediction(name: str, corpus, request) -> None:
    trained = request.getfixturevalue(name)
    trained.model.eval()
    ids, positions = corpus.held_out_ids, torch.arange(30, 42)[None]
    changed = ids.clone()
    changed[36:] = changed[36:].flip(0)
    with torch.no_grad():
        before = trained.log_probs(ids, positions, trained.read(ids))
        after = trained.log_probs(changed, positions, trained.read(changed))
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)  # 36 is predicted from before 36
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ours", "baseline"])
def test_the_first_byte_does_not_see_the_last(name: str, corpus, request) -> None:
    trained, ids = request.getfixturevalue(name), corpus.held_out_ids[:12]
    trained.model.eval()
    firsts = []
    for last in range(3):
        changed = torch.cat([ids[:-1], torch.tensor([last])])
        with torch.no_grad():
            firsts.append(trained.log_probs(changed, torch.arange(12)[None], trained.read(changed))[0, 0])
    assert torch.equal(firsts[0], firsts[1]) and torch.equal(firsts[0], firsts[2])


@pytest.mark.parametrize("length", [1, 2, 12, 13, 17, 18, 19, 100])
def test_every_held_out_byte_is_charged_once(corpus, length: int) -> None:
    short = replace(corpus, held_out_ids=corpus.held_out_ids[:length], unknown_nats=0.0)
    bits = held_out_bits(uniform(corpus, SMALL), short, batch_size=3)
    assert bits == pytest.approx(math.log2(corpus.alphabet.size), abs=1e-6)


@torch.no_grad()
def test_the_sliding_window_by_definition(corpus, baseline, parity) -> None:
    """Byte i is predicted in the first window that holds it: windows of 12 bytes begin every 6, the last at the end."""
    ids, total = corpus.held_out_ids, corpus.unknown_nats
    for i in range(len(ids)):
        start = 0 if i < 12 else min(6 * ((i - 12) // 6 + 1), len(ids) - 12)
        row = torch.arange(start, start + 12)
        inputs = torch.tensor([ids[j - 1] if j else 0 for j in row.tolist()])
        log_probs = F.log_softmax(baseline.model(inputs[None])[0], dim=-1)
        total -= log_probs[i - start, ids[i]].item()
    theirs = total / math.log(2) / len(ids)
    parity("held_out_bits", "one window for each byte", "output", held_out_bits(baseline, corpus), theirs, 1e-5)


def test_unknown_bytes_are_charged(corpus) -> None:
    known = corpus.alphabet.known
    unknown = [byte for byte in corpus.held_out_text.encode() if byte not in known]
    assert len(unknown) >= 3
    assert corpus.unknown_nats == pytest.approx(len(unknown) * math.log(256 - len(known)))
    free = held_out_bits(uniform(corpus, SMALL), replace(corpus, unknown_nats=0.0))
    paid = held_out_bits(uniform(corpus, SMALL), corpus)
    extra = len(unknown) * math.log2(256 - len(known)) / len(corpus.held_out_ids)
    assert paid - free == pytest.approx(extra, abs=1e-9)


# The models


def test_training_starts_at_what_the_experts_say(corpus, ours, parity) -> None:
    experts = ours.experts
    torch.manual_seed(0)
    fresh = Corrector(SMALL, corpus.alphabet.size, experts.n_experts, experts.d_evidence)
    reading = Reading.of_text(experts, corpus.held_out_ids)
    positions = torch.arange(20, 32)[None]
    with torch.no_grad():
        logits = logits_at(fresh, corpus.held_out_ids, positions, reading)[0]
    mean = reading(positions[0])[0].mean(dim=-1)
    parity("Corrector", "geometric mean of its experts at the start", "invariant", logits, mean, 1e-5)


def test_the_baseline_is_topic_04s_decoder(parity) -> None:
    recipe, vocab_size = replace(SMALL_BASELINE, n_layers=3), 23
    torch.manual_seed(0)
    fused = nanogpt_like(recipe, vocab_size).double()
    config = ModelConfig(12, 16, 3, 2, 64, activation="gelu", positions="learned")
    plain = CausalTransformer(config, vocab_size).double()
    plain.lm_head.weight = plain.token_emb.weight
    for block in (*fused.encoder.blocks, fused.encoder):  # norms that are not the identity
        for name, parameter in block.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter)
    plain.load_state_dict(fused.state_dict())
    ids = torch.randint(vocab_size, (2, 11))
    outputs, gradients = [], []
    for model in (fused, plain):
        logits = model(ids)
        model.zero_grad()
        logits.square().mean().backward()
        outputs.append(logits)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    parity("nanogpt_like", "topic 04's CausalTransformer", "output", *outputs, 1e-10)
    parity("nanogpt_like", "topic 04's CausalTransformer", "gradient", *gradients, 1e-10)


def test_nanogpts_cpu_settings_have_about_its_number_of_parameters() -> None:
    """nanoGPT counts without positions; 4 layers of 128 and a vocabulary of 65 are 0.79M + 65 * 128."""
    model = nanogpt_like(NANOGPT, 65)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "pos_emb" not in name)
    assert matrices == 12 * 4 * 128**2 + 65 * 128
    assert sum(p.numel() for p in model.parameters()) - matrices == 64 * 128 + 9 * 2 * 128 + 4 * 9 * 128


# The clock and the training


def test_the_clock_measures_shares_of_its_budget() -> None:
    clock = Clock(8.0, iter([5.0, 7.0, 9.0]).__next__)
    assert (clock.share, clock.used) == (0.25, 4.0)


def test_schedules_rise_and_fall_with_the_budget() -> None:
    shares = [i / 1000 for i in range(1000)]
    for schedule, last in (("wsd", 0.0), ("cosine", 0.1)):
        factors = [rate_factor(schedule, share) for share in shares]
        assert factors[0] < 0.1 and max(factors) == pytest.approx(1.0, abs=1e-3)
        assert factors[-1] == pytest.approx(last, abs=0.01)


def test_the_same_seed_and_clock_give_the_same_model(corpus) -> None:
    runs = [train_in(120, SMALL, corpus, seed, ticks()) for seed in (3, 3, 4)]
    weights = [run.model.lm_head.weight for run in runs]
    assert runs[0].n_steps == runs[1].n_steps > 10
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_training_stops_when_the_budget_is_used_up(corpus) -> None:
    short, long = (train_in(budget, SMALL_BASELINE, corpus, 0, ticks()).n_steps for budget in (30, 60))
    assert 5 < short < long < 60


def test_the_corrector_is_better_than_its_experts_and_these_than_chance(corpus, ours) -> None:
    experts = replace(ours, model=None)
    bits = [held_out_bits(trained, corpus) for trained in (ours, experts, uniform(corpus, SMALL))]
    assert bits[0] < bits[1] < bits[2] - 1


def test_each_ablation_runs(corpus) -> None:
    for name, recipe in speedrun.ABLATIONS.items():
        sizes = {"d_model": 16, "n_layers": 1, "seq_len": 12, "batch_size": 3}
        trained = train_in(40, replace(recipe, **sizes), corpus, 0, ticks())
        assert held_out_bits(trained, corpus) < math.log2(256), name
        assert (trained.experts is None) == (not recipe.use_experts)
        assert (trained.model is None) == (not recipe.learn_residual)
        if trained.experts:
            assert trained.experts.leave_out == recipe.leave_out
            assert recipe.use_words or not any("word" in known for known in trained.experts.names)


def test_what_it_writes_follows_the_seed(ours) -> None:
    texts = [write_on(ours, "the ", 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the ") and len(text) == 24 for text in texts)


def test_shape_comments_hold(corpus, checked_shapes) -> None:
    with checked_shapes(speedrun) as checked:
        held_out_bits(train_in(40, SMALL, corpus, 0, ticks()), corpus)
        held_out_bits(train_in(20, SMALL_BASELINE, corpus, 0, ticks()), corpus)
    assert len(checked) > 15


# The command line


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("2m", 120), ("90", 90), ("1.5m", 90), (" 1h ", 3600)])
def test_budgets_in_words(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-5s", "sixty", "60 s s", "2d", "25h", "nan", "1e9"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget must be a time from 1s to 24h, such as 60s, 2m or 90, got"):
        SpeedrunConfig(budget=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 20, "n_heads": 4}, "d_model=20 / n_heads=4 must be"),
        ({"d_model": 0}, "d_model must be finite and >= 1, got 0"),
        ({"seq_len": 1}, "seq_len must be finite and >= 2 and <= 4096, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0"),
        ({"n_bytes": -1}, "n_bytes must be finite and >= 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeedrunConfig(**settings)


def test_command_line_trains_and_compares(corpus, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(speedrun, "load_corpus", lambda: corpus)
    monkeypatch.setitem(speedrun.CLOCKS, "cpu", lambda: 5 * time.process_time())  # a second of it is soon over
    flags = "--budget 1s --clock cpu --d-model 16 --n-layers 1 --seq-len 12 --batch-size 3 --n-bytes 5"
    speedrun.main([*flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "(about " in printed and "xz, after the training text" in printed and "6-gram" in printed
    assert "ours needs" in printed and "than nanoGPT, tuned" in printed and "continues 'Return':\nReturn" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["speedrun"]["rows"]
    bits = {row[0]: row[1] for row in rows}
    assert bits["ours"] < bits["every byte equally likely"] and len(rows) == 7
    speedrun.main(["--which", "ours", *flags.split(), "--out", str(tmp_path)])
    assert "nanoGPT" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        speedrun.main(["--budget", "soon"])
    assert refused.value.code == 2 and "such as 60s" in capsys.readouterr().err


def test_the_chapters_tables_have_a_row_for_each_recipe(corpus, tmp_path, monkeypatch) -> None:
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2, "seq_len": 12, "batch_size": 3}
    monkeypatch.setattr(speedrun, "load_corpus", lambda: corpus)
    for name in ("OURS", "NANOGPT", "TUNED"):
        monkeypatch.setattr(speedrun, name, replace(getattr(speedrun, name), **small))
    ablations = {name: replace(recipe, **small) for name, recipe in list(speedrun.ABLATIONS.items())[:2]}
    monkeypatch.setattr(speedrun, "ABLATIONS", ablations)
    speedrun.speedrun_table(tmp_path, n_seeds=2, budget=0.1)
    speedrun.speedrun_ablation(tmp_path, n_seeds=2, budget=0.1, n_removal_seeds=1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row[-1] for row in results["speedrun"]["rows"][:-3]] == 4 * ["-"]
    assert [row[0] for row in results["speedrun"]["rows"][-3:]] == [NANOGPT.name, "nanoGPT, tuned", "ours"]
    for _, bits, _, _, _, share in results["speedrun"]["rows"][-3:]:
        assert len(bits) == len(share) == 2 and all(0 < each < 1.2 for each in share)
    full, removed = results["speedrun-ablation"]["rows"]
    assert len(full[1]) == 2 and len(removed[1]) == 1
    assert sum(full[2]) == pytest.approx(0, abs=1e-9)
    assert removed[2][0] == pytest.approx(removed[1][0] - sum(full[1]) / 2)


@pytest.mark.parametrize("recipe", [SMALL, SMALL_BASELINE])
def test_a_budget_that_is_used_up_before_the_first_step_leaves_a_model_without_steps(corpus, recipe) -> None:
    trained = train_in(1, recipe, corpus, 0, ticks())
    assert trained.n_steps == 0 and held_out_bits(trained, corpus) < 9


def test_experts_alone_end_with_their_budget(corpus) -> None:
    """A context is counted to its end, which takes a while on the whole text: some of the budget has to be left."""
    recipe = speedrun.ABLATIONS["experts alone, no transformer"]
    assert recipe.count_share + recipe.trust_share < 1
    trained = train_in(200, recipe, corpus, 0, ticks())
    assert trained.model is None and 0.7 * 200 <= trained.seconds <= 200
