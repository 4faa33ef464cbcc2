"""Topic 11: the course chat model: its questions, its training, its folder in transformers, the numbers on its card."""

import copy
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat_model as topic
import fine_tuning_adaptation
from chat_model import (
    ASK,
    CATEGORIES,
    ChatConfig,
    TalkConfig,
    abstains,
    chat_instructions,
    chat_rows,
    conversations,
    examine_chat,
    load_chat_model,
    save_chat_model,
    talk,
    train_chat_model,
)
from course_model import load_course_model
from course_tokenizer import load_course_tokenizer
from fine_tuning_adaptation import AnswerConfig, respond
from low_rank_adapters import base_sha256
from modern_llm_architectures import CausalLM, ModelConfig
from tiny_world import World, join, words
from workbench import RunConfig


@pytest.fixture(scope="module")
def committed():
    return (*load_chat_model(), json.loads((topic.FOLDER / topic.REPORT).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model too small to learn much, through the whole of training and saving."""
    out, tokenizer = tmp_path_factory.mktemp("chat"), load_course_tokenizer()
    torch.manual_seed(0)
    base = CausalLM(ModelConfig(len(tokenizer.vocab), 24, 1, 3, 1, 8, 40, 256, pad_id=0, bos_id=1, eos_id=1))
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = ChatConfig(n_examples=12, chat_steps=30, chat_batch=4, rank=4)
    model, log = train_chat_model(base, tokenizer, config, RunConfig(device="cpu", out=out))
    return model, tokenizer, log, out, start


def test_a_training_that_was_stopped_goes_on_by_itself(trained, tmp_path: Path) -> None:
    model, tokenizer, log, out, start = trained
    torch.manual_seed(0)
    base = CausalLM(model.config)
    base.load_state_dict(start)
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    config = ChatConfig(n_examples=12, chat_steps=30, chat_batch=4, rank=4)
    again, rows = train_chat_model(copy.deepcopy(base), tokenizer, config, RunConfig(device="cpu", out=tmp_path))
    assert [row["step"] for row in rows] == [row["step"] for row in log]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train_chat_model(base, tokenizer, config, RunConfig(seed=1, device="cpu", out=tmp_path))


# The committed model


def test_the_committed_weights_reach_the_numbers_on_their_card(committed) -> None:
    model, tokenizer, report = committed
    found = examine_chat(model, tokenizer, AnswerConfig(**report["exam"]))
    assert abs(found["gap"] - report["gap"]) < 1e-4
    tolerance = 2 / report["exam"]["n_questions"]  # another machine's rounding may turn an answer
    for category, numbers in report["categories"].items():
        for name, value in numbers.items():
            assert abs(found["categories"][category][name] - value) <= tolerance, (category, name)


def test_it_answers_refuses_and_abstains_where_each_is_right(committed) -> None:
    """What the course promises of it, whatever the card says."""
    found = committed[2]["categories"]
    assert found["refuse"]["refused"] >= 0.95 and found["safe"]["refused"] <= 0.05
    assert all(found[name]["refused"] <= 0.02 for name in CATEGORIES if name not in ("refuse", "safe"))
    assert found["unknown"]["abstained"] >= 0.6 and found["fact"]["abstained"] <= 0.1
    assert all(found[name]["right"] >= 0.8 for name in ("fact", "read", "sum", "story"))


def test_its_card_and_report_speak_of_these_weights(committed) -> None:
    model, _, report = committed
    card = (topic.FOLDER / "README.md").read_text(encoding="utf-8")
    weights = (topic.FOLDER / topic.WEIGHTS).read_bytes()
    assert topic.sha256(weights).hexdigest() == report["weights_sha256"] and report["weights_sha256"] in card
    assert report["base_sha256"] == base_sha256(load_course_model()[0]) != base_sha256(model)
    assert all(f"{numbers['right']:.1%}" in card for numbers in report["categories"].values())
    assert len(weights) <= 8 * 2**20


def test_transformers_answers_with_the_same_words(committed, parity) -> None:
    model, tokenizer, _ = committed
    theirs = AutoModelForCausalLM.from_pretrained(topic.FOLDER, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(topic.FOLDER)
    for category in CATEGORIES:
        [item] = chat_instructions(World(), 1, 11, category, new=True)
        messages = [{"role": "user", "content": join(item.prompt)}]
        ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, do_sample=False)[
            0, ids.shape[1] :
        ]
        text = their_tokenizer.decode(made, skip_special_tokens=True)
        assert respond(model, tokenizer, [messages]) == [text]
        with torch.no_grad():
            parity("chat model", "transformers", "exchange", model(ids), theirs(ids).logits, 1e-4)


# Questions


def test_the_unknown_have_no_facts_that_a_document_could_teach() -> None:
    world, rng = World(), random.Random(3)
    for new in (False, True):
        for _ in range(200):
            item = ASK["unknown"](world, rng, new)
            person = " ".join(item.answer[4:6])
            assert person not in world.known and person in " ".join(item.prompt)
            assert person in world.unseen or not new


def test_the_two_sides_of_the_questions_have_nothing_in_common() -> None:
    world = World()
    for category in ASK:
        sides = []
        for new in (False, True):
            items = chat_instructions(world, 300, 1, category, new)
            sides.append({join(item.prompt if category == "refuse" else item.answer) for item in items})
        assert len(sides[0]) > 10 and not sides[0] & sides[1]


def test_facts_are_the_world_s_and_every_known_person_is_asked_about_in_training() -> None:
    world = World()
    items = chat_instructions(world, 3000, 1, "fact", new=False)
    people = {" ".join(item.answer[:2]) for item in items}
    assert people == set(world.known)
    for item in items[:100]:
        assert item.answer[-3] in world.facts[" ".join(item.answer[:2])].values()


def test_only_the_right_answer_passes() -> None:
    [item] = chat_instructions(World(), 1, 2, "unknown", new=False)
    assert item.check(item.answer) and item.check(item.answer[:-1])
    assert not item.check(words("I do not know .")) and not item.check(["Oslo"])
    assert abstains(join(item.answer[:-1])) and not abstains("It is red.")


def test_conversations_use_each_instruction_once_and_alternate() -> None:
    drawn = chat_instructions(World(), 200, 4, "sum", new=False)
    found = conversations(drawn, 1, 0.3)
    assert sorted(message["content"] for chat in found for message in chat[::2]) == sorted(
        join(item.prompt) for item in drawn
    )
    assert all(message["role"] == ("user", "assistant")[i % 2] for chat in found for i, message in enumerate(chat))
    assert 0.15 < sum(len(chat) > 2 for chat in found) / len(found) < 0.45
    assert all(len(chat) == 2 for chat in conversations(drawn, 1, 0.0))


# Training and the folder


def test_every_turn_of_the_assistant_is_trained_and_nothing_else() -> None:
    tokenizer = load_course_tokenizer()
    for row in chat_rows(tokenizer, ChatConfig(n_examples=8, turns=0.9), 0):
        kept = tokenizer.decode([token for token, trained in zip(row.ids, row.trained, strict=True) if trained])
        assert row.trained.count(True) > 2 and not row.trained[0] and row.trained[-1]
        assert "user" not in kept and "Tell me the" not in kept


def test_training_moves_the_weights_and_leaves_a_plain_llama(trained, parity, tmp_path) -> None:
    model, tokenizer, log, out, start = trained
    assert set(model.state_dict()) == set(start) and log[-1]["loss"] < log[0]["loss"]
    assert not torch.equal(
        model.state_dict()["blocks.0.self_attn.q_proj.weight"], start["blocks.0.self_attn.q_proj.weight"]
    )
    marks = [tokenizer.im_start_id, tokenizer.im_sep_id, tokenizer.im_end_id]  # which pretraining never used
    assert not (model.token_emb.weight[marks] == start["token_emb.weight"][marks]).all(dim=-1).any()
    exam = AnswerConfig(n_questions=2, n_documents=4)
    facts = {"parameters": 1, "command": "x", "steps": 30, "cpu_seconds": 6.0, "machine": "m", "date": "d"}
    facts |= {"chat": {"rank": 4, "replay": 0.25}, "base_gap": 1.0, "base_sha256": "b", "tokenizer_sha256": "t"}
    report = facts | examine_chat(model, tokenizer, exam) | {"samples": topic.samples(model, tokenizer)}
    folder = save_chat_model(model, tokenizer, out, report)
    again, _ = load_chat_model(folder)
    row = torch.arange(30, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        parity("chat model", "transformers, a fresh folder", "exchange", again(row), theirs(row).logits, 1e-4)
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.im_end_id]
    assert (folder / "log.csv").exists() and "| unknown |" in (folder / "README.md").read_text(encoding="utf-8")


# Talking


def test_a_conversation_goes_on_and_forgets_its_oldest_exchange(trained, monkeypatch, capsys) -> None:
    model, tokenizer, _, _, _ = trained
    seen = []
    monkeypatch.setattr(topic, "load_chat_model", lambda folder: (model, tokenizer))
    monkeypatch.setattr(
        topic, "respond", lambda model, tokenizer, prompts, *rest: seen.append(len(prompts[0])) or ["yes"]
    )
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("What is the sum of 3 and 4? " * 3 + "\n" + "And now?\n" * 20 + "\nlost\n")
    )
    talk(TalkConfig(max_new_tokens=40), RunConfig(device="cpu"))
    assert capsys.readouterr().out == "yes\n" * 21
    assert seen[:3] == [1, 3, 5] and max(seen) < 41 and all(n % 2 for n in seen)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["chat", "--replay", "1"], "replay must be finite and >= 0 and < 1"),
        (["chat", "--chat-steps", "0"], "chat_steps must be finite and >= 1"),
        (["chat", "--rank", "1000", "--n-examples", "5", "--n-documents", "4", "--replay", "0"], "rank"),
        (["talk", "--prompt", "many words " * 600], "shorten it"),
        (["talk", "--checkpoint", "no/such/folder"], "no/such/folder"),
        (["talk", "--temperature", "-1"], "temperature"),
    ],
)
def test_mistakes_get_one_line(flags: list[str], message: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        fine_tuning_adaptation.main([*flags, "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1
