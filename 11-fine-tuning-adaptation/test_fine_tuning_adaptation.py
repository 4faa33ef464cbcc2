"""Topic 11: exact loss masks, packing that changes nothing, layer-wise training, EWC, and the command line."""

import math
import re

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import adaptation_failures
import fine_tuning_adaptation as topic
from course_model import FOLDER, load_course_model
from course_tokenizer import load_course_tokenizer
from fine_tuning_adaptation import (
    RATES,
    AnswerConfig,
    DialogueBatches,
    ElasticPenalty,
    MethodConfig,
    SftConfig,
    answer_gap,
    answer_loss,
    category_accuracy,
    dialogue,
    encode_dialogues,
    encode_replay,
    everything_trained,
    fisher_diagonal,
    freeze_below,
    guessing,
    layer_rates,
    prompt_ids,
    replay_documents,
    respond,
    sft_batches,
    training_dialogues,
    with_end,
)
from gpt2 import SamplingConfig
from low_rank_adapters import DoRALinear, LoraConfig, LoRALinear, adapted_layers
from modern_llm_architectures import CausalLM, ModelConfig
from nf4 import NF4Linear
from packing import language_model_loss
from preference_failures import PREFERENCE_BREAKS
from sequence_modeling import IGNORE
from tiny_world import INSTRUCT, World, join, words
from training_transformers import fit

TOKENIZER = load_course_tokenizer()
INSTRUCTIONS = World().instructions(60, 3)
DIALOGUES = encode_dialogues(TOKENIZER, INSTRUCTIONS)
TINY = ModelConfig(len(TOKENIZER.vocab), d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40)


def tiny(seed: int = 0, **changes: object) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(**{**vars(TINY), **changes}))


# Masks


def test_ids_and_mask_equal_transformers_chat_template(parity) -> None:
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    for item, row in zip(INSTRUCTIONS, DIALOGUES, strict=True):
        made = theirs.apply_chat_template(dialogue(item), return_assistant_tokens_mask=True, return_dict=True)
        parity("dialogue ids", "transformers' chat template", "output", row.ids, made["input_ids"], 0)
        masks = [int(kept) for kept in row.trained], made["assistant_masks"]
        parity("dialogue loss mask", "transformers' chat template", "output", *masks, 0)


def test_labels_equal_those_of_trl(tmp_path, parity) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": dialogue(item)} for item in INSTRUCTIONS[:8]]
    settings = SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    model, theirs = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=theirs)
    batch = next(iter(trainer.get_train_dataloader()))
    found = sorted(row[row != IGNORE].tolist() for row in batch["labels"])
    wanted = sorted(
        [token_id for token_id, kept in zip(row.ids, row.trained, strict=True) if kept] for row in DIALOGUES[:8]
    )
    parity("trained labels", "TRL's SFTTrainer", "output", wanted, found, 0)
    ours = DialogueBatches(DIALOGUES[:8], 8, 0)(0)
    loss, count = answer_loss(load_course_model()[0], ours)
    their_loss = model(**batch).loss
    parity("loss on the answers", "TRL's batch in transformers' Llama", "output", loss / count, their_loss, 1e-5)


def test_what_is_trained_is_the_answer_and_its_end() -> None:
    for item, row in zip(INSTRUCTIONS, DIALOGUES, strict=True):
        kept = [token_id for token_id, trained in zip(row.ids, row.trained, strict=True) if trained]
        assert kept == [*TOKENIZER.encode(join(item.answer[:-1])), TOKENIZER.im_end_id]
        assert row.ids[: len(row.ids) - len(kept)] == prompt_ids(TOKENIZER, join(item.prompt))


def test_every_answer_passes_its_own_check_after_the_tokenizer() -> None:
    for item, row in zip(INSTRUCTIONS, DIALOGUES, strict=True):
        kept = [token_id for token_id, trained in zip(row.ids, row.trained, strict=True) if trained][:-1]
        assert item.check(words(TOKENIZER.decode(kept)))
        assert not item.check(words(TOKENIZER.decode(kept))[:-2])


# Batches


def test_packed_padded_and_single_dialogues_cost_the_same(parity) -> None:
    model = tiny().double()
    packed, padded = (DialogueBatches(DIALOGUES, 12, 5, seq_len) for seq_len in (96, 0))
    for step in range(6):  # into the second epoch
        losses = [answer_loss(model, batches(step)) for batches in (packed, padded)]
        alone = [answer_loss(model, DialogueBatches([row], 1, 0)(0)) for row in packed.rows(step)]
        assert losses[0][1] == losses[1][1] == sum(count for _, count in alone)
        parity("packed dialogues", "padded dialogues", "invariant", losses[0][0], losses[1][0], 1e-8)
        parity("packed dialogues", "dialogues alone", "invariant", losses[0][0], sum(loss for loss, _ in alone), 1e-8)
    assert packed(0)["inputs"].shape[0] < padded(0)["inputs"].shape[0]


def test_loss_at_counted_positions_equals_topic_07s(parity) -> None:
    for seq_len in (0, 96):
        batch, results = DialogueBatches(DIALOGUES, 10, 1, seq_len)(0), []
        for loss_fn in (answer_loss, language_model_loss):
            model = tiny().double()
            loss, count = loss_fn(model, batch)
            loss.backward()
            results.append((loss, count, model.blocks[0].ffn.up_proj.weight.grad, model.token_emb.weight.grad))
        parity("loss at the counted positions", "topic 07's loss", "output", results[0][0], results[1][0], 1e-9)
        parity("loss at the counted positions", "topic 07's loss", "gradient", results[0][2:], results[1][2:], 1e-9)
        assert results[0][1] == results[1][1]


def test_half_precision_logits_are_summed_in_float32() -> None:
    batch = DialogueBatches(DIALOGUES[:6], 6, 0)(0)
    model = tiny().bfloat16()
    loss, _ = answer_loss(model, batch)
    logits, targets = topic.counted_logits(model, batch)
    wanted = nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_epoch_holds_every_dialogue_once_and_depends_on_the_seed() -> None:
    batches = DialogueBatches(DIALOGUES, 25, 0)
    seen = [tuple(row.ids) for step in range(3) for row in batches.rows(step)]
    assert sorted(seen) == sorted(tuple(row.ids) for row in DIALOGUES)
    assert batches.rows(0) == DialogueBatches(DIALOGUES, 25, 0).rows(0) != DialogueBatches(DIALOGUES, 25, 1).rows(0)


def test_replay_mixes_documents_in_and_trains_all_of_them() -> None:
    replay = encode_replay(TOKENIZER, World().documents(30, 1, "train"))
    batches = DialogueBatches(DIALOGUES, 20, 0, 0, replay, 0.25)
    rows = batches.rows(0)
    assert len(rows) == 20 and sum(row in replay for row in rows) == 5
    count = (batches(0)["targets"] != IGNORE).sum()
    expected = sum(len(row.ids) - 1 if row in replay else sum(row.trained) for row in rows)
    assert count == expected


def test_everything_trained_counts_all_but_the_first_id() -> None:
    batch = DialogueBatches(everything_trained(DIALOGUES[:4]), 4, 0)(0)
    assert (batch["targets"] != IGNORE).sum() == sum(len(row.ids) - 1 for row in DIALOGUES[:4])


def test_batches_refuse_what_cannot_be_trained() -> None:
    row = DIALOGUES[0]
    with pytest.raises(ValueError, match="dialogue 1 has no trained token"):
        DialogueBatches([row, row._replace(trained=[False] * len(row.ids))], 2, 0)
    with pytest.raises(ValueError, match="dialogue 0 has no trained token"):  # nothing stands before the first id
        DialogueBatches([row._replace(trained=[True] + [False] * (len(row.ids) - 1))], 1, 0)
    with pytest.raises(ValueError, match=rf"dialogue 0 has {len(row.ids)} ids, a row holds 9; raise seq_len"):
        DialogueBatches([row], 1, 0, seq_len=8)
    just = DialogueBatches([row], 1, 0, seq_len=len(row.ids) - 1)(0)  # inputs and targets are one shorter
    assert just["inputs"].tolist() == [row.ids[:-1]] and just["targets"][0, -1] == row.ids[-1]
    for replay_share, n_replayed in ((0.1, 0), (0.9, 4)):  # neither replay nor dialogues may be rounded away
        with pytest.raises(ValueError, match=f"replay_share={replay_share} makes {n_replayed} of the 4 rows"):
            DialogueBatches([row] * 5, 4, 0, replay=[row] * 5, replay_share=replay_share)


def test_instructions_are_shared_out_and_documents_fit_their_rows() -> None:
    config = SftConfig(n_instructions=15, batch_size=4, categories="sum, sort")
    rows = training_dialogues(TOKENIZER, config, 0)
    wanted = [item for name in ("sum", "sort") for item in World().instructions(7, 1, "train", name)]
    assert rows == encode_dialogues(TOKENIZER, wanted)
    assert all(
        all(row.trained) for row in training_dialogues(TOKENIZER, topic.replace(config, loss_on="everything"), 0)
    )
    documents = replay_documents(TOKENIZER, 40, 0)
    longest = max(len(row.ids) for row in documents)
    assert replay_documents(TOKENIZER, 40, 0, longest - 1) == documents  # inputs and targets are one shorter
    assert max(len(row.ids) for row in replay_documents(TOKENIZER, 40, 0, longest - 2)) < longest
    lengths = {method: sft_batches(TOKENIZER, config, MethodConfig(method), 0).seq_len for method in RATES}
    assert {method for method, seq_len in lengths.items() if not seq_len} == {"prefix", "prompt"}  # before whole rows


# What is trained, and how fast


ADDED = {  # last parts of the names of what is trained, beside the rows of new tokens
    "lora": {"lora_a", "lora_b"},
    "dora": {"lora_a", "lora_b", "magnitude"},
    "qlora": {"lora_a", "lora_b"},
    "prefix": {"prefix_keys", "prefix_values"},
    "prompt": {"prompt"},
    "bitfit": {"bias"},
}


@pytest.mark.parametrize("method", RATES)
def test_each_method_trains_what_its_name_says(method: str) -> None:
    model = topic.adapt(
        tiny(tie_embeddings=True), TOKENIZER, MethodConfig(method, n_virtual=5), LoraConfig(lora_rank=2)
    )
    named = dict(model.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    if method == "full":
        assert trained == set(named) and not any(name.endswith(".rows") for name in named)
        return
    rows = {name for name in trained if name.endswith(".rows")}
    assert len(rows) == 1 and named[rows.pop()].shape[0] == len(topic.unseen_tokens(TOKENIZER)) > 3
    added = {name for name in trained if not name.endswith(".rows")}
    if method == "layerwise":
        assert added == {name for name in named if name.startswith(("blocks.1.", "blocks.2.", "final_norm"))}
    elif method == "adapters":
        assert len(added) == 3 * 2 * 4 and all(".adapter." in name for name in added)
    else:
        assert {name.rpartition(".")[2] for name in added} == ADDED[method]
    layers = adapted_layers(model).values()
    if method in ("lora", "dora", "qlora"):
        kind, base = {"dora": DoRALinear}.get(method, LoRALinear), {"qlora": NF4Linear}.get(method, nn.Linear)
        assert {(type(layer), type(layer.base)) for layer in layers} == {(kind, base)}
    if method in ("prefix", "prompt"):
        assert {named[name].shape[-2] for name in added} == {5}


def test_settings_of_a_training() -> None:
    for method, rate in RATES.items():
        training = SftConfig(max_steps=100).training(method)
        assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (rate, 25, 0)
    training = SftConfig(max_steps=1000, learning_rate=0.3).training("lora")
    assert (training.learning_rate, training.warmup_steps, training.max_steps) == (0.3, 40, 1000)


def test_a_lower_block_takes_a_shorter_step() -> None:
    """Adam's first step is the rate times the sign of the gradient, so the steps show the rates."""
    model, how = tiny(), MethodConfig("layerwise", n_frozen=1, layer_decay=0.25)
    model = topic.adapt(model, TOKENIZER, how, LoraConfig())
    before = [block.ffn.up_proj.weight.clone() for block in model.blocks]
    topic.fine_tune(model, TOKENIZER, SftConfig(max_steps=1, n_instructions=40), how, 0)
    steps = [(block.ffn.up_proj.weight - old).abs().median() for block, old in zip(model.blocks, before, strict=True)]
    assert steps[0] == 0 and steps[2].item() == pytest.approx(RATES["layerwise"], rel=0.02)
    assert steps[1].item() == pytest.approx(0.25 * RATES["layerwise"], rel=0.02)


def test_freezing_below_keeps_the_lower_blocks_and_the_embedding() -> None:
    model = tiny(tie_embeddings=True)
    freeze_below(model, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("blocks.2.", "final_norm")) for name in trained)
    freeze_below(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="n_frozen=3 leaves no block of 3 to train"):
        freeze_below(model, 3)


def test_rates_fall_from_block_to_block_and_fit_keeps_them_apart() -> None:
    model = tiny()
    optimizer = layer_rates(model, 0.08, 0.5)
    rate_of = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == sum(1 for _ in model.parameters())
    wanted = {
        "blocks.2.": 0.08,
        "blocks.1.": 0.04,
        "blocks.0.": 0.02,
        "token_emb": 0.01,
        "lm_head": 0.08,
        "final": 0.08,
    }
    for name, parameter in model.named_parameters():
        expected = next(rate for start, rate in wanted.items() if name.startswith(start))
        assert rate_of[id(parameter)] == pytest.approx(expected), name
    fit(
        model,
        DialogueBatches(DIALOGUES, 4, 0),
        answer_loss,
        SftConfig(max_steps=8).training("full"),
        optimizer=optimizer,
    )
    last = [group["lr"] / group["base_lr"] for group in optimizer.param_groups]
    assert max(last) == pytest.approx(min(last)) and max(last) < 1


def test_layerwise_training_moves_the_upper_half_alone() -> None:
    model = tiny()
    how = MethodConfig("layerwise", n_frozen=1, layer_decay=0.5)
    model = topic.adapt(model, TOKENIZER, how, LoraConfig())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    topic.fine_tune(model, TOKENIZER, SftConfig(max_steps=3, n_instructions=40), how, 0)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and not any(name.startswith(("blocks.0.", "token_emb.base")) for name in moved)
    assert any(name.startswith("blocks.1.") for name in moved) and any(name.startswith("blocks.2.") for name in moved)


def test_a_model_without_trained_numbers_is_refused() -> None:
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="no number of this model is trained"):
        topic.fine_tune(model, TOKENIZER, SftConfig(max_steps=1), MethodConfig("full"), 0)


# EWC


class OneMatrix(nn.Module):
    """Logits are rows of a matrix, so the Fisher information is known: p (1 - p), once for each visit of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))

    def hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table[token_ids]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_fisher_information_equals_the_closed_form() -> None:
    model, inputs = OneMatrix(), torch.tensor([[0, 1, 1, 2], [2, 2, 2, 0]])
    batch = {"inputs": inputs, "targets": torch.tensor([[1, 1, 1, 1], [1, 1, 1, IGNORE]])}
    n_draws = 4000
    found = fisher_diagonal(model, lambda step: batch, n_draws)["table"]
    visits, chances = torch.tensor([1.0, 2.0, 4.0]), model.table.detach().softmax(dim=-1)  # the last 0 is not counted
    expected = visits[:, None] * chances * (1 - chances) / 7
    # the square of a sum of n centred scores has a standard deviation of about sqrt(2) times its mean, more when rare
    error = 5 * (3 * expected.square() + expected / 7).sqrt() / math.sqrt(n_draws)
    assert ((found - expected).abs() < error).all()


def test_elastic_penalty_and_its_gradient(parity) -> None:
    model = nn.Linear(3, 2)
    fisher = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
    penalty = ElasticPenalty(model, fisher, 4.0)
    assert penalty(model) == 0
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data += 0.3
    value = penalty(model)
    value.backward()
    wanted = {name: 4.0 * fisher[name] * (p - start[name]).detach() for name, p in model.named_parameters()}
    parity(
        "elastic penalty",
        "2 F (theta - start)^2",
        "output",
        value.detach(),
        2 * 0.09 * sum(f.sum() for f in fisher.values()),
        1e-6,
    )
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    parity("elastic penalty", "strength F (theta - start)", "gradient", grads, wanted, 1e-6)
    loss, count = penalty.added_to(lambda model, batch: (torch.tensor(10.0), 5))(model, {})
    assert (loss / count).item() == pytest.approx(2 + value.item())  # once for each token, whatever the batch's size
    with pytest.raises(ValueError, match="strength of EWC must be finite and >= 0, got -1"):
        ElasticPenalty(model, fisher, -1)


def test_ewc_finds_the_optimum_of_both_tasks_where_losses_are_quadratic() -> None:
    """Two quadratic tasks with diagonal curvature: EWC from the first optimum is the exact joint optimum."""
    first, second = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 3.0])
    curvature, other = torch.tensor([4.0, 0.1, 1.0]), torch.tensor([0.5, 2.0, 1.0])
    model = nn.ParameterDict({"theta": nn.Parameter(first.clone())})
    penalty = ElasticPenalty(model, {"theta": curvature}, 1.0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (other * (model["theta"] - second).square()).sum() + penalty(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    joint = (curvature * first + other * second) / (curvature + other)
    assert torch.allclose(model["theta"], joint, atol=1e-5)


def test_ewc_and_replay_hold_a_model_back() -> None:
    moved = []
    for changes in ({}, {"ewc_strength": 1e5}):
        model = tiny()
        before = model.blocks[1].ffn.up_proj.weight.clone()
        config = SftConfig(max_steps=6, n_instructions=70, batch_size=8, **changes)
        topic.fine_tune(model, TOKENIZER, config, MethodConfig("full"), 0)
        moved.append((model.blocks[1].ffn.up_proj.weight - before).norm().item())
    assert 0 < moved[1] < 0.9 * moved[0]


# Learning, answering, the command line


def test_a_tiny_model_learns_to_refuse_and_to_stop() -> None:
    model = tiny(tie_embeddings=True)
    config = SftConfig(max_steps=120, categories="refuse", n_instructions=64, batch_size=8, learning_rate=0.01)
    topic.fine_tune(model, TOKENIZER, config, MethodConfig("full"), 0)
    exam = AnswerConfig(n_questions=10, exam_split="train")
    assert category_accuracy(model, TOKENIZER, exam, ["refuse"]) == {"refuse": 1.0}
    assert category_accuracy(model, TOKENIZER, exam, ["safe"]) == {"safe": 0.0}
    asked = [join(item.prompt) for item in World().instructions(3, 9, category="refuse")]
    assert respond(model, TOKENIZER, asked) == ["Sorry, I cannot talk about the vault."] * 3
    assert TOKENIZER.im_end_id in model.config.more_eos_ids


def test_answers_stand_where_their_prompts_stood_and_the_end_is_noted_once() -> None:
    (model, _), prompts = load_course_model(), [join(item.prompt) for item in INSTRUCTIONS[:7]]
    together = respond(model, TOKENIZER, prompts, SamplingConfig(6, temperature=0.0))
    assert together == [respond(model, TOKENIZER, [one], SamplingConfig(6, temperature=0.0))[0] for one in prompts]
    assert len(set(together)) > 3 and len({len(prompt) for prompt in prompts}) > 3
    assert with_end(model, TOKENIZER.im_end_id).config.more_eos_ids.count(TOKENIZER.im_end_id) == 1


def test_an_even_guess_pays_the_log_of_the_vocabulary_for_an_answer(parity) -> None:
    """Less what chance alone costs, which is something in stories only."""
    model, config = tiny(), AnswerConfig(n_questions=3)
    model.lm_head.weight.data.zero_()
    asked = [item for name in INSTRUCT for item in World().instructions(3, config.exam_seed, "content", name)]
    n_tokens = sum(sum(row.trained) for row in encode_dialogues(TOKENIZER, asked))
    chance = {item.category for item in asked if sum(item.surprisal)}
    wanted = math.log(len(TOKENIZER.vocab)) - sum(sum(item.surprisal) for item in asked) / n_tokens
    parity(
        "answer_gap",
        "log of the vocabulary, less surprisal",
        "output",
        answer_gap(model, TOKENIZER, config),
        wanted,
        1e-5,
    )
    assert chance == {"story"}


def test_guessing_is_one_in_as_many_answers_as_there_are() -> None:
    found, world = guessing(), World()
    assert set(found) == set(INSTRUCT) and all(0 <= share <= 0.5 for share in found.values())
    top = world.config.max_sum
    assert found["sum"] == 1 / len({a + b for a in range(top + 1) for b in range(top + 1)})
    told = [{facts[name] for facts in world.facts.values()} for name in next(iter(world.facts.values()))]
    assert found["fact"] == pytest.approx(sum(1 / len(values) for values in told) / len(told))


QUICK = ["--max-steps", "4", "--n-questions", "2", "--n-documents", "10", "--n-instructions", "70"]


def test_demo_saves_an_adapter_that_merge_and_evaluate_take(tmp_path, capsys) -> None:
    topic.main([*QUICK, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "guessing" in printed
    trained = int(re.search(r"trained: ([\d,]+) numbers", printed)[1].replace(",", ""))
    assert 0 < trained < 100_000
    topic.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path)])
    capsys.readouterr()
    exam = ["--n-questions", "2", "--n-documents", "10", "--out", str(tmp_path)]
    tables = []
    for flags in (["--adapter", str(tmp_path / "adapter")], ["--checkpoint", str(tmp_path / "merged")]):
        topic.main(["evaluate", *flags, *exam])
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith((*INSTRUCT, "gap"))])
    assert tables[0] == tables[1] and len(tables[0]) == len(INSTRUCT) + 1


@pytest.mark.parametrize("method", ["full", "qlora", "prompt"])
def test_sft_by_other_methods(method: str, tmp_path, capsys) -> None:
    topic.main(["sft", "--method", method, *QUICK, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert ("nothing is saved" in printed) == (method == "prompt")
    assert (tmp_path / "model" / "model.safetensors").exists() == (method == "full")
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (method == "qlora")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["sft", "--method", "lore"], "unknown method 'lore'; did you mean 'lora'"),
        (["sft", "--lora-rank", "0"], "lora_rank must be finite and >= 1, got 0"),
        (["sft", "--lora-rank", "4000"], "lora_rank=4000 must be in 1.."),
        (["sft", "--target-modules", "q_prj", "--n-questions", "1", "--n-documents", "2"], "did you mean 'q_proj'"),
        (["sft", "--replay-share", "1"], "replay_share must be finite and >= 0 and < 1"),
        (["sft", "--categories", "facts"], "unknown category 'facts'; did you mean 'fact'"),
        (["evaluate", "--adapter", "nowhere"], "has no adapter_config.json"),
        (["merge"], "merge needs --adapter"),
        (["demo", "--break", "nothing"], "invalid choice"),
        (["figures", "rank"], "did you mean 'ranks'"),
    ],
)
def test_mistakes_get_one_line(flags: list[str], message: str, tmp_path, capsys) -> None:
    quick = ["--n-questions", "1", "--n-documents", "2"] if flags[0] == "sft" else []
    with pytest.raises(SystemExit) as stopped:
        topic.main([*flags, *quick, "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1


# Failures


def test_the_names_of_the_failures_are_known_to_the_command_line() -> None:
    assert set(topic.BREAK_NAMES) == {*adaptation_failures.BREAKS, *PREFERENCE_BREAKS}


@pytest.mark.parametrize("name", ["nothing-trained", "late-binding", "all-masked", "packed-together"])
def test_quick_failures_show_what_they_promise(name: str, capsys) -> None:
    topic.main(["--break", name])
    lines = capsys.readouterr().out.splitlines()[1:]
    pairs = [re.search(r": (-?[\d.e+-]+) as it should be, (-?[\d.e+-]+|nan) with", line).groups() for line in lines]
    assert pairs and all(float(sound) != float(wrong) for sound, wrong in pairs)
    sound, wrong = (float(number) for number in pairs[0])
    expected = {
        "nothing-trained": sound > 0 and wrong == 0,
        "late-binding": sound == 1 and wrong <= 0.5,
        "all-masked": sound == 0 and math.isnan(wrong),
        "packed-together": abs(sound) < 0.1 < abs(wrong),
    }
    assert expected[name]


@pytest.mark.parametrize(
    "name",
    ["alpha-without-rank", "merged-twice", "frozen-new-tokens", "loss-on-prompt", "end-not-trained", "other-template"],
)
def test_trained_failures_run_at_any_size(name: str, monkeypatch) -> None:
    for short in ("SHORT", "TWO"):
        config = getattr(adaptation_failures, short)
        monkeypatch.setattr(adaptation_failures, short, topic.replace(config, max_steps=2, n_instructions=70))
    rows = adaptation_failures.BREAKS[name][0](topic.RunConfig())
    assert rows and all(math.isfinite(number) for row in rows for number in row[1:])
