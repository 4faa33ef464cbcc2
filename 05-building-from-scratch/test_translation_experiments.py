"""Topic 05: the chapter's experiments run at any size, and their measures are right on cases worked by hand."""

import json
import math

import pytest
import torch

import building_from_scratch as core
import debugging_tools
import translation_experiments as topic
from building_from_scratch import (
    Codec,
    ModelConfig,
    TorchTranslator,
    Transformer,
    alignment_scores,
    answer_log_probs,
    beam_search,
    held_out_loss,
    length_ratio,
    main,
    noam_factor,
)
from transformer_architecture import copy_to_torch
from translation_experiments import (
    EXPERIMENTS,
    UnscaledTransformer,
    answers_of_known_length,
    crossings,
    guessed_alignment,
    plot_length_bias,
    toy_probability,
    without_warmup,
)
from translation_pairs import FRENCH, Pair, sample_pairs
from workbench import BLOCK, render_table

TINY = "--n-seeds 2 --main-steps 20 --main-pairs 300 --small-steps 20 --small-pairs 300 --n-held-out 20".split()


@pytest.fixture
def translator() -> tuple[Transformer, Codec, list[Pair]]:
    torch.manual_seed(0)
    pairs = sample_pairs(FRENCH, 20, seed=0)
    codec = Codec.from_pairs(pairs, "words")
    config = ModelConfig(d_model=16, n_heads=2, d_ff=16, n_encoder_layers=1, n_decoder_layers=2)
    return Transformer(config, len(codec.src), len(codec.tgt)).eval(), codec, pairs


def test_figures_runs_every_experiment_and_fills_the_chapter(tmp_path, monkeypatch) -> None:
    for name in ("one batch", "decoding", "beam"):  # these train a model
        monkeypatch.delitem(debugging_tools.CHECKS, name)
    for name in set(topic.BUGS) - {"no-shift", "padding-in-loss"}:
        monkeypatch.delitem(topic.BUGS, name)
    monkeypatch.setattr(topic, "WIDTHS", (1, 2))
    monkeypatch.setattr(topic, "N_CHECKED", 6)
    monkeypatch.setattr(topic, "ABLATIONS", {name: topic.ABLATIONS[name] for name in ("full", "half the steps")})
    monkeypatch.setattr(topic, "measure_speed", lambda *_: {"a step": "1.00x the speed"})
    (tmp_path / "README.md").write_text("<!-- results:begin breaks -->\n<!-- results:end -->\n")
    main(["figures", *TINY, "--folder", str(tmp_path / "figures"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    tables = "main losses longer ablations search-errors alignment breaks outcomes speed "
    tables += "beam-half-trained beam-undertrained beam-trained beam-longer"
    assert set(results) == set(tables.split())
    drawn = "training shift beam length_bias alignment ladder"
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == set(drawn.split())
    assert all(path.stat().st_size < 120_000 for path in (tmp_path / "figures").glob("*.svg"))
    losses = dict(results["losses"]["rows"])
    assert len(losses["first training step"]) == 2 and results["losses"]["seeds"] == [0, 1]
    assert losses["first training step"] == pytest.approx(losses["chance: ln of the target vocabulary"], abs=1.0)
    assert BLOCK.search((tmp_path / "README.md").read_text())[3].strip() == render_table(results["breaks"])


def test_an_unknown_experiment_is_refused_with_the_known_ones(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["figures", "beam", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1
    assert f"unknown experiment 'beam'; did you mean 'beams'? choose from {', '.join(EXPERIMENTS)}" in error


def test_log_probability_of_an_answer_is_the_sum_of_its_steps(translator) -> None:
    model, codec, pairs = translator
    together = answer_log_probs(model, codec, pairs, [pair.target for pair in pairs])
    for pair, score in zip(pairs[:3], together, strict=False):
        src_ids = codec.encode_sources([pair.source])
        tgt_ids, answers = codec.encode_targets([pair.target])
        rows = model(src_ids, tgt_ids)[0].log_softmax(-1)
        by_hand = sum(rows[t, token].item() for t, token in enumerate(answers[0].tolist()))
        assert score == pytest.approx(by_hand, abs=1e-4)
    n_tokens = sum(len(pair.target) + 1 for pair in pairs)
    assert held_out_loss(model, codec, pairs) == pytest.approx(-sum(together) / n_tokens, rel=1e-6)


def test_length_ratio_counts_tokens() -> None:
    pairs = [Pair(("a",), ("x", "y")), Pair(("b",), ("x", "y", "z", "w"))]
    assert length_ratio([("x",), ("x", "y")], pairs) == 0.5


def test_alignment_of_a_known_matrix(translator, monkeypatch) -> None:
    model, codec, _ = translator
    pair = Pair(("the", "red", "cat"), ("le", "chat", "rouge"), ((0,), (2,), (1,)))
    perfect, diagonal = torch.zeros(1, 2, 4, 4), torch.eye(4).expand(1, 2, 4, 4)
    for row, column in enumerate((0, 2, 1, 3)):
        perfect[0, :, row, column] = 1
    maps = {"decoder.blocks.0.cross_attn": perfect, "decoder.blocks.1.cross_attn": diagonal}
    monkeypatch.setattr("building_from_scratch.attention_maps", lambda *_: maps)
    monkeypatch.setattr("building_from_scratch.batch_tensors", lambda *_: (None, None, None))
    scores = alignment_scores(model, codec, [pair])
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0], [1 / 3, 1 / 3]]))
    assert guessed_alignment([pair]) == (1 / 4, 1 / 3)
    assert crossings(pair) == 1


def test_an_oracle_of_the_length_cuts_every_answer_where_its_target_ends(translator) -> None:
    model, codec, pairs = translator
    answers = answers_of_known_length(model, codec, pairs)
    assert [len(answer) for answer in answers] == [len(pair.target) for pair in pairs]
    alone = answers_of_known_length(model, codec, pairs[:1])
    assert answers[0] == alone[0] and "<eos>" not in answers[0]


def test_search_errors_and_model_errors_are_told_apart(monkeypatch) -> None:
    """Three pairs: right; wrong and less likely than the target (search); wrong and likelier (model)."""
    pairs = [Pair(("a",), (word,)) for word in ("x", "y", "z")]
    scores = {("x",): -1.0, ("y",): -2.0, ("z",): -5.0, ("v",): -3.0, ("w",): -4.0}
    monkeypatch.setattr(topic, "answer_log_probs", lambda _model, _codec, _pairs, said: [scores[s] for s in said])
    job = topic.Trained(None, None, {}, {}, [])
    mean, search, model = topic.search_errors([job], [pairs], [[("x",), ("v",), ("w",)]])
    assert mean == [pytest.approx(-8 / 3)] and search == [pytest.approx(1 / 3)] and model == [pytest.approx(1 / 3)]


def test_shape_comments_are_true(translator, checked_shapes) -> None:
    model, codec, pairs = translator
    with checked_shapes(topic, core) as checked:
        answers_of_known_length(model, codec, pairs)
        answer_log_probs(model, codec, pairs, [pair.target for pair in pairs])
        alignment_scores(model, codec, pairs)
        UnscaledTransformer(model.config, len(codec.src), len(codec.tgt))(torch.tensor([[4, 5]]), torch.tensor([[1]]))
    assert len(checked) >= 6, sorted(checked)


def test_variants_differ_in_the_one_part_they_name(translator) -> None:
    model, codec, pairs = translator
    torch.manual_seed(0)
    unscaled = UnscaledTransformer(model.config, len(codec.src), len(codec.tgt))
    unscaled.load_state_dict(model.state_dict())
    assert [name for name, _ in unscaled.named_parameters()] == [name for name, _ in model.named_parameters()]
    src_ids = codec.encode_sources([pairs[0].source])
    words = model.src_token_emb(src_ids)
    gap = model.embed(src_ids, model.src_token_emb, model.src_pos_emb) - unscaled.embed(
        src_ids, unscaled.src_token_emb, unscaled.src_pos_emb
    )
    torch.testing.assert_close(gap, (math.sqrt(16) - 1) * words)
    assert [without_warmup(step, 4) for step in (1, 4, 16)] == [1.0, 1.0, 0.5]
    assert all(without_warmup(step, 4) == noam_factor(step, 4) for step in range(4, 50))


def test_the_unscaled_model_and_the_peer_of_the_bench_compute_the_same(parity) -> None:
    config = ModelConfig(24, 3, 40, 2, 3, 13, norm_order="post", positions="none", tie_embeddings=False)
    torch.manual_seed(0)
    ours, peer = UnscaledTransformer(config, 19, 19).double().eval(), TorchTranslator(config, 19).double().eval()
    copy_to_torch(ours.encoder, peer.core.encoder)
    copy_to_torch(ours.decoder, peer.core.decoder)
    ours.src_token_emb, ours.tgt_token_emb = peer.emb, peer.emb
    peer.lm_head.weight = ours.lm_head.weight
    src_ids, tgt_ids = torch.randint(4, 19, (3, 7)), torch.randint(4, 19, (3, 5))
    logits = ours(src_ids, tgt_ids)
    parity(
        "TorchTranslator", "UnscaledTransformer", "output", peer(src_ids, tgt_ids) - peer.lm_head.bias, logits, 1e-10
    )
    scaled = Transformer(config, 19, 19).double().eval()
    scaled.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for emb in (scaled.src_token_emb, scaled.tgt_token_emb):
            emb.weight /= 24**0.5
    parity("UnscaledTransformer", "Transformer, smaller embeddings", "output", logits, scaled(src_ids, tgt_ids), 1e-10)


def test_the_toy_prefers_the_empty_text_and_the_penalty_lets_it_speak() -> None:
    """Three words alike and <eos> with probability 0.1 at every step: 9 words on average, none in the likeliest."""
    stop, n_words, eos_id = 0.1, 3, 3
    mass = [toy_probability(stop, n_words, n) * n_words**n for n in range(400)]
    assert sum(mass) == pytest.approx(1) and sum(n * p for n, p in enumerate(mass)) == pytest.approx(9)
    row = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64).log()

    def best(width: int, penalty: float):
        return beam_search(lambda tokens, _: row.expand(len(tokens), 4), 1, width, 12, penalty, False, 1, 0, eos_id)[0][
            0
        ]

    assert len(best(1, 0.0).tokens) == 12 and eos_id not in best(1, 0.0).tokens
    assert best(4, 0.0).tokens == (eos_id,) and best(4, 0.0).score == pytest.approx(math.log(0.1))
    assert len(best(4, 1.0).tokens) == 12
    assert len(plot_length_bias(stop, n_words, {"the cat": [(3, -1.0, True)]}).axes) == 2
