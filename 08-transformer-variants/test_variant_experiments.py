"""Topic 08: the text experiments of the chapter run at any size; their measures are right on cases by hand."""

import json
import math

import pytest
import torch
from torch import nn

import variant_experiments as topic
import variant_pretraining
from sequence_modeling import BOS_ID, IGNORE
from transformer_variants import main, plot_families, plot_scores
from variant_experiments import (
    EXPERIMENTS,
    FiguresConfig,
    accuracy_in_view,
    causal_gap,
    hand_neighbours,
    norms_first,
    place_questions,
    possible_texts,
    start_with_sinusoids,
    trunk_of,
    widest,
)
from variant_pretraining import (
    HELD_OUT_SEED,
    MASK_ID,
    VARIANTS,
    CausalBatches,
    FillScore,
    Slot,
    VariantConfig,
    guess_of_kind,
    possible,
    pretrain_for,
    slots,
    training_documents,
    word_world,
)
from workbench import BLOCK, RunConfig, render_table

MINE = ("objectives", "diagnosis", "posterior", "electra", "masking", "speed")
SMALL = VariantConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, max_seq_len=96)


def test_figures_runs_every_text_experiment_and_fills_the_chapter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(topic, "SIZES", SMALL)
    monkeypatch.setattr(variant_pretraining, "GROUP", 2)  # batches whose FLOPs are counted before each training
    for name, value in (("FINETUNE_STEPS", 4), ("N_LABELLED", 20), ("N_EXAMINED", 30), ("SHARES", (0.5, 1.0))):
        monkeypatch.setattr(topic, name, value)
    monkeypatch.setattr(topic, "measure_speed", lambda *_: {"a step": "1.00x the speed"})
    (tmp_path / "README.md").write_text("<!-- results:begin masking -->\n<!-- results:end -->\n")
    flags = "--n-seeds 2 --shrink 2 --gflops 0.2 --n-slots 2".split()
    main(["figures", *MINE, *flags, "--folder", str(tmp_path / "figures"), "--out", str(tmp_path), "--device", "cpu"])
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    assert set(results) == {
        "objectives",
        "likelihood",
        "diagnosis",
        "posterior",
        "worst",
        "electra",
        "masking",
        "speed",
    }
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"families", "objectives", "posterior"}
    rows = {row[0]: row[1:] for row in results["objectives"]["rows"]}
    assert len(rows) == 7 and all(len(rows[name][0]) == 2 for name in list(rows)[:4])
    best = rows["exact posterior"]
    for name in list(rows)[:4]:
        steps, asked, right, nats, gap, recall, answer = rows[name]
        assert min(steps) >= 1 and min(asked) > 0 and min(gap) > 0 and min(nats) > best[3] and min(answer) > 0
        assert gap[0] == pytest.approx(nats[0] - best[3])
    assert 1 <= len(results["worst"]["rows"]) <= 5 and all("____" in row[0] for row in results["worst"]["rows"])
    diagnosed = {row[0]: row[5] for row in results["diagnosis"]["rows"]}
    assert diagnosed["encoder, as above"] == rows["encoder, masked (BERT)"][4]
    assert len({tuple(gap) for gap in diagnosed.values()}) == 8  # every change changes something
    likelihood = dict(results["likelihood"]["rows"])
    assert all(value > gap > 0 for value, gap in zip(*likelihood.values(), strict=True))
    assert [row[0] for row in results["masking"]["rows"]] == list(topic.MASKINGS)
    assert BLOCK.search((tmp_path / "README.md").read_text())[3].strip() == render_table(results["masking"])


def test_an_unknown_experiment_is_refused_with_the_known_ones(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["figures", "objective", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1
    assert f"unknown experiment 'objective'; did you mean 'objectives'? choose from {', '.join(EXPERIMENTS)}" in error
    assert set(MINE) < set(EXPERIMENTS) and len(EXPERIMENTS) > len(MINE) + 4  # images and long inputs too


def test_every_seed_and_masking_is_trained_once(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        topic, "pretrain_for", lambda *args, **options: calls.append((args[0], args[2], args[4], options))
    )
    topic.trained.cache_clear()
    config, run = FiguresConfig(gflops=2, shrink=4), RunConfig(device="cpu")
    for _ in range(2):
        topic.trained("bert", config, run, 1, "", 1.0)
        topic.trained("bert", config, run, 1, "100/0/0", 1.0)
        topic.trained("electra", config, run, 2, "", 0.5)
    topic.trained.cache_clear()
    masking = topic.MASKINGS["100/0/0"]
    assert calls == [("bert", 5e8, 1, {}), ("bert", 5e8, 1, {"masking": masking}), ("electra", 2.5e8, 2, {})]
    assert (masking.mask_share, masking.random_share) == (1.0, 0.0)


def test_a_place_is_the_last_that_the_story_gives() -> None:
    world, vocabulary = word_world()
    texts = place_questions(60, 1, "train")
    places = world.words["places"]
    assert len(texts) == 60 and len({place for _, place in texts}) == len(places)
    for ids, place in texts:
        tokens = vocabulary.decode(ids)
        assert tokens[0] == "<bos>" and tokens[-4:] == ["Answer", ":", "in", "the"]
        assert world.next_token(tokens[1:]) == {places[place]: 1.0}
    held_out = {tuple(ids) for ids, _ in place_questions(60, HELD_OUT_SEED, "validation")}
    assert not held_out & {tuple(ids) for ids, _ in texts}


def test_possible_texts_are_half_documents_and_half_what_the_world_cannot_write() -> None:
    texts = possible_texts(40, 3, "train")
    assert [truth for _, truth in texts] == [1, 0] * 20
    for ids, truth in texts:
        assert ids[0] == BOS_ID and possible(word_world()[1].decode(ids[1:])) == bool(truth)


def test_a_guess_of_the_right_kind_by_hand() -> None:
    world, vocabulary = word_world()
    texts = [Slot(["a", word], 1, {word: 1.0}) for word in (world.words["places"][2], world.names[0])]
    place, person = guess_of_kind(texts).exp()
    assert place[vocabulary.encode(world.words["places"])].tolist() == pytest.approx([1 / 4] * 4)
    assert person[vocabulary.encode(world.names)].tolist() == pytest.approx([1 / len(world.names)] * len(world.names))
    assert place.sum() == pytest.approx(1) and person.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="'the' is of no kind"):
        guess_of_kind([Slot(["the"], 0, {})])


def test_neighbours_are_handed_to_each_position_and_no_further(parity) -> None:
    torch.manual_seed(0)
    model = VARIANTS["bert"].build(SMALL, len(word_world()[1]))
    hand_neighbours(model)
    layer, x = model.trunk.pos_emb, torch.randn(2, 7, 16)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (layer(changed) - layer(x)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [False, False, True, True, True, False, False]
    left, right = layer.both_proj.weight.split(16, dim=1)
    kernel = torch.stack([left, torch.zeros_like(left), right], dim=2)  # (out, in, place)
    convolved = nn.functional.conv1d(x.transpose(1, 2), kernel, padding=1).transpose(1, 2)
    parity("HandedNeighbours", "F.conv1d", "output", layer(x), x + layer.pos_emb.weight[:7] + convolved, 1e-5)


def test_pre_norm_leaves_the_stream_as_it_is() -> None:
    model = VARIANTS["bert"].build(SMALL, len(word_world()[1]))
    norms_first(model)
    for block in model.trunk.blocks:
        for layer in (block.self_attn.out_proj, block.ffn.down_proj):
            nn.init.zeros_(layer.weight)
    x = torch.randn(1, 5, 16)
    assert all(torch.equal(block(x), x) for block in model.trunk.blocks)


def test_a_decoder_may_be_asked_about_a_share_of_its_tokens() -> None:
    whole, thin = CausalBatches(8, 5), CausalBatches(8, 5, asked=0.3)
    n_asked = n_whole = 0
    for step in range(20):
        every, some = whole(step), thin(step)
        kept = some["targets"] != IGNORE
        assert torch.equal(every["inputs"], some["inputs"])
        assert torch.equal(every["targets"][kept], some["targets"][kept])
        n_asked, n_whole = n_asked + int(kept.sum()), n_whole + int((every["targets"] != IGNORE).sum())
    assert 0.27 < n_asked / n_whole < 0.33  # about 4,000 tokens: a standard deviation is 0.007
    masked = CausalBatches(8, 5, hidden=0.5)(0)
    changed = masked["inputs"] != whole(0)["inputs"]
    assert (masked["inputs"][changed] == MASK_ID).all() and torch.equal(masked["targets"], whole(0)["targets"])
    assert not changed[:, 0].any() and 0.4 < changed[:, 1:].sum() / (whole(0)["targets"] != IGNORE).sum() < 0.6
    assert (whole(0)["targets"] != IGNORE).sum() == sum(len(ids) - 1 for ids in training_documents(0, 5, 8))


def test_sinusoids_stand_where_the_learned_positions_start_at_their_size() -> None:
    seen = []
    torch.manual_seed(0)
    fresh = VARIANTS["bert"].build(SMALL, len(word_world()[1])).trunk.pos_emb.weight.std()

    def prepare(model: nn.Module) -> None:
        start_with_sinusoids(model)
        seen.append(model.trunk.pos_emb.weight.detach().clone())

    pretrain_for("bert", SMALL, 1e8, 4, 0, prepare=prepare)
    (table,) = seen
    assert table.std() == pytest.approx(fresh.item(), rel=1e-4)
    assert table[:, 0] / table[1, 0] == pytest.approx(torch.arange(len(table)).sin() / math.sin(1), abs=1e-4)


class Copier(nn.Module):
    """Says of every token that it is what it sees, but of full stops that they are commas."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vocabulary = word_world()[1]
        shown = torch.where(ids == vocabulary.ids["."], vocabulary.ids[","], ids)
        return nn.functional.one_hot(shown, len(vocabulary)) * self.scale


def test_accuracy_in_view_by_hand() -> None:
    places = [Slot(["One", "day", ".", "<eos>"], 0, {}), Slot(["red", ".", "<eos>"], 0, {})]
    assert accuracy_in_view(Copier(), places) == pytest.approx(3 / 5)


def test_the_gap_of_a_causal_model_is_its_loss_above_the_floor() -> None:
    item = pretrain_for("gpt2", SMALL, 2e8, 4, 0)
    nats, gap = causal_gap(item.model, 6)
    world, vocabulary = word_world()
    documents = world.documents(6, HELD_OUT_SEED, split="validation")
    total, n_tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([[BOS_ID, *vocabulary.encode(document.tokens)]])
        log_probs = item.model(ids[:, :-1]).log_softmax(-1)
        total -= log_probs.gather(2, ids[:, 1:, None]).sum().item()
        n_tokens += len(document.tokens)
    assert nats == pytest.approx(total / n_tokens, rel=1e-5)
    assert gap == pytest.approx(nats - sum(sum(d.surprisal) for d in documents) / n_tokens, rel=1e-4)


def test_the_trunk_is_a_copy_of_the_encoder_that_is_kept() -> None:
    torch.manual_seed(0)
    for name in ("bert", "electra"):
        model = VARIANTS[name].build(SMALL, len(word_world()[1]))
        kept = (model.discriminator if name == "electra" else model).trunk
        copy = trunk_of(model)
        assert copy is not kept and torch.equal(copy.token_emb.weight, kept.token_emb.weight)
        copy.token_emb.weight.data.zero_()
        assert kept.token_emb.weight.any()


def test_figures_show_what_was_measured() -> None:
    score = FillScore(0.5, 0.9, 1.5, 0.25)
    axis = plot_scores({"a": [score, score], "b": [score._replace(nats=2.0)]}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [bar.get_width() for bar in axis.patches] == [1.5, 2.0] and axis.lines[-1].get_xdata()[0] == 0.25
    encoder, decoder, _ = (axis.images[0].get_array() for axis in plot_families(4).axes)
    assert encoder.min() == 1 and decoder.tolist() == torch.ones(4, 4).tril().tolist()
    chosen = widest(slots(40))
    assert len(chosen.posterior) <= 8 and math.isclose(sum(chosen.posterior.values()), 1)
