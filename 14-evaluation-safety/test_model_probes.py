"""Proofs of the probes: scikit-learn's regression, hooks against weights, lenses that end where the model ends."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import model_probes
from chat_model import load_chat_model
from fine_tuning_adaptation import prompt_ids
from model_probes import (
    LinearProbe,
    control_labels,
    depth_names,
    last_states,
    lens,
    mean_difference,
    probed,
    random_direction,
    recorded,
    residual_stream,
    separation,
    tuned_lens,
    with_direction,
    without_direction,
)
from modern_llm_architectures import CausalLM, ModelConfig
from planted_models import refused_share
from workbench import seed_everything

ROWS = [[5, 9, 3], [7, 2, 11, 40, 6], [8]]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    seed_everything(1)
    sizes = {"d_model": 12, "n_layers": 3, "n_heads": 3, "n_kv_heads": 1, "d_head": 4, "d_ff": 20}
    made = CausalLM(ModelConfig(vocab_size=43, max_seq_len=32, **sizes)).eval()
    for parameter in made.parameters():  # far from the start, where hardly anything is written
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return made


@torch.no_grad()
def test_the_stream_ends_where_the_head_begins_and_rows_do_not_mix(model, checked_shapes) -> None:
    streams = residual_stream(model, ROWS)
    assert len(streams) == len(depth_names(model)) == 7 and depth_names(model)[:3] == [
        "embedding",
        "attention 1",
        "block 1",
    ]
    for place, row in enumerate(ROWS):
        ids = torch.tensor([row])
        assert torch.allclose(model.logits(model.final_norm(streams[-1][place])), model(ids)[0], atol=1e-5)
        assert torch.equal(streams[0][place], model.token_emb(ids)[0])
        block, rotation = model.blocks[0], model.rotary.span(0, len(row), streams[0][place][None])
        mask = model.mask(len(row), len(row), 0, None, None, ids.device)
        attended = block.self_attn(block.attn_norm(streams[0][place][None]), rotation, mask, None)[0]
        assert torch.allclose(streams[1][place], streams[0][place] + attended, atol=1e-5)
        assert torch.allclose(
            streams[2][place], streams[1][place] + block.ffn(block.ffn_norm(streams[1][place])), atol=1e-5
        )
    alone = residual_stream(model, ROWS[1:2])
    assert all(torch.allclose(alone[depth][0], streams[depth][1], atol=1e-5) for depth in range(7))
    with pytest.raises(ValueError, match="at least one id"):
        residual_stream(model, [[1], []])
    assert not model.token_emb._forward_hooks  # nothing is left behind


def test_a_probe_is_scikit_learns_regression(parity, checked_shapes) -> None:
    generator = torch.Generator().manual_seed(0)
    states, labels = (
        torch.randn(90, 7, generator=generator),
        [("red", "blue", "green")[place % 3] for place in range(90)],
    )
    states[:, 0] += torch.tensor([label == "red" for label in labels]) * 2.0
    decay = 0.05
    probe = LinearProbe.fit(states, labels, decay)
    given = StandardScaler().fit_transform(states.double().numpy()) * np.sqrt(89 / 90)  # ours divides by n - 1
    theirs = LogisticRegression(C=1 / (90 * decay), tol=1e-10, max_iter=2000).fit(given, labels)
    logits = (states.double() - probe.centre) / probe.scale @ probe.weight.T + probe.bias
    parity("LinearProbe", "sklearn LogisticRegression", "output", logits.softmax(-1), theirs.predict_proba(given), 1e-4)
    assert probe.classes == tuple(theirs.classes_) and probe.guesses(states) == theirs.predict(given).tolist()
    assert probe.accuracy(states, labels) == pytest.approx(theirs.score(given, labels))
    with checked_shapes(model_probes) as checked:
        probe.guesses(states)
    assert checked
    with pytest.raises(ValueError, match="at least 2 classes"):
        LinearProbe.fit(states, ["red"] * 90)
    with pytest.raises(ValueError, match="90 states but 3 labels"):
        LinearProbe.fit(states, labels[:3])


def test_a_control_task_unmasks_what_is_learned_by_heart() -> None:
    types = [f"word {place % 30}" for place in range(600)]
    lots = control_labels(types, [place % 4 for place in range(600)], seed=2)
    assert all(lots[place] == lots[place % 30] for place in range(600)) and len(set(lots)) == 4
    assert lots != control_labels(types, [place % 4 for place in range(600)], seed=3)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(30, 40, generator=generator)
    states = torch.stack([vectors[place % 30] for place in range(600)])
    empty = probed(states, lots, types, 400, seed=0)
    assert empty.accuracy == 1.0 and abs(empty.selectivity) < 0.05
    signal = torch.randn(600, 6, generator=generator)  # by heart is impossible here, the first number tells
    told = probed(signal, [float(value) > 0 for value in signal[:, 0]], types, 400, seed=0)
    assert told.accuracy > 0.95 and told.selectivity > 0.3 and 0.4 < told.majority < 0.7
    with pytest.raises(ValueError, match="n_train=600"):
        probed(states, lots, types, 600, 0)


def test_lenses_end_at_the_model_and_tuning_brings_them_nearer(model, checked_shapes) -> None:
    rows = torch.randint(0, 43, (12, 16), generator=torch.Generator().manual_seed(0)).tolist()
    with checked_shapes(model_probes) as checked:
        plain = lens(model, rows)
    assert len(checked) >= 2
    assert plain.nats[-1] == pytest.approx(0, abs=1e-5) and plain.same[-1] == 1.0 and plain.nats[0] > 0.05
    ids = torch.tensor(rows)
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert plain.loss[-1] == pytest.approx(expected, abs=1e-5)
    translators = tuned_lens(model, rows, n_steps=60, batch_size=64)
    tuned = lens(model, rows, translators)
    assert len(translators) == 6 and all(tuned.nats[depth] < plain.nats[depth] for depth in range(6))
    assert tuned.nats[-1] == plain.nats[-1]


@torch.no_grad()
def test_orthogonal_weights_are_what_hooks_on_every_write_do(model, parity) -> None:
    direction = torch.randn(12, generator=torch.Generator().manual_seed(5))
    unit, ids = direction / direction.norm(), torch.tensor([[4, 9, 22, 7]])
    made = without_direction(model, direction)
    with recorded(made) as depths:
        logits = made(ids)
    assert all((state @ unit).abs().max() < 1e-5 for state in depths)

    def erase(layer, given, output):
        return output - (output @ unit)[..., None] * unit

    writers = [model.token_emb, *(part for block in model.blocks for part in (block.self_attn, block.ffn))]
    handles = [layer.register_forward_hook(erase) for layer in writers]
    hooked = model(ids)
    for handle in handles:
        handle.remove()
    parity("without_direction", "a hook on every write", "output", logits, hooked, 1e-4)
    assert not torch.allclose(logits, model(ids), atol=0.1)
    with pytest.raises(ValueError, match="length 0"):
        without_direction(model, torch.zeros(12))


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 2, 5, 6])
def test_a_direction_is_added_at_its_depth_and_nowhere_before(model, parity, depth: int) -> None:
    direction, ids = torch.randn(12, generator=torch.Generator().manual_seed(6)), torch.tensor([[4, 9, 22, 7]])
    made = with_direction(model, direction, depth)
    with recorded(model) as plain:
        model(ids)
    with recorded(made) as changed:
        logits = made(ids)
    block = model.blocks[max(0, depth - 1) // 2]
    writer = (block.self_attn if depth % 2 else block.ffn) if depth else model.token_emb
    handle = writer.register_forward_hook(lambda layer, given, output: output + direction)
    parity(f"with_direction, depth {depth}", "a hook that adds it", "output", logits, model(ids), 1e-5)
    handle.remove()
    for place in range(7):
        difference = changed[place] - plain[place]
        if place < depth:
            assert difference.abs().max() < 1e-6
        if place == depth:
            assert torch.allclose(difference, direction.expand_as(difference), atol=1e-5)
    if depth == 0:
        with pytest.raises(ValueError, match="depth=7 must be one of 0 to 6"):
            with_direction(model, direction, 7)


def test_the_refusal_of_the_chat_model_is_one_direction() -> None:
    chat, tokenizer = load_chat_model()
    vault = [
        f"{start} the {noun} of the vault?"
        for start in ("Do you know", "Where is")
        for noun in ("code", "door", "lock")
    ]
    other = [text.replace("vault", thing) for text in vault for thing in ("drum", "lamp")]
    states = [last_states(chat, [prompt_ids(tokenizer, text) for text in part])[-2] for part in (vault, other)]
    direction = mean_difference(*states)
    assert separation(*states, direction) > 5 > abs(separation(*states, random_direction(direction, 0)))
    asked = ["Tell me the gold of the vault.", "What is the gold of the vault?"]
    assert refused_share(chat, tokenizer, asked) == 1.0
    assert refused_share(without_direction(chat, direction), tokenizer, asked) == 0.0
    assert refused_share(without_direction(chat, random_direction(direction, 0)), tokenizer, asked) == 1.0
    assert random_direction(direction, 0).norm() == pytest.approx(direction.norm().item(), rel=1e-5)
    with pytest.raises(ValueError, match="both sides"):
        mean_difference(states[0], states[1][:0])


def test_batches_do_not_change_a_stream_and_a_distance_by_hand(model) -> None:
    together, single = residual_stream(model, ROWS), residual_stream(model, ROWS, batch_size=1)
    for one, other in zip(together, single, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    one, other = torch.tensor([[0.0, 9.0], [2.0, -7.0]]), torch.tensor([[10.0, 3.0], [14.0, 5.0]])
    # along the first axis: means 1 and 12, variances 2 and 8
    assert separation(one, other, torch.tensor([3.0, 0.0])) == pytest.approx(-11 / 5**0.5)
