"""Topic 10: the course model: its training from shards, its folder in transformers, and the numbers on its card."""

import csv
import json
import math
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import course_model as topic
import pretraining_llms
from course_model import (
    ExamConfig,
    ModelSizes,
    PretrainConfig,
    SourceConfig,
    draw_samples,
    gaps_by_kind,
    load_course_model,
    possible,
    pretrain_model,
    row_nats,
    save_course_model,
    tokenizer_sha256,
    upto,
)
from course_tokenizer import load_course_tokenizer
from sequence_modeling import document_losses
from tiny_world import World
from workbench import RunConfig

TINY = ModelSizes(d_model=24, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=40)
SOURCE = SourceConfig(n_documents=200, shard_tokens=3000)
SHORT = PretrainConfig(max_steps=6, batch_size=3, seq_len=80, warmup_steps=2, cooldown_steps=2, eval_every=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    run = RunConfig(out=out, device="cpu")
    model, tokenizer, corpus, log = pretrain_model(TINY, SOURCE, replace(SHORT, save_every=3), run)
    return model, tokenizer, corpus, log, out


# The committed model


@pytest.fixture(scope="module")
def course():
    return (*load_course_model(), json.loads((topic.FOLDER / topic.REPORT).read_text(encoding="utf-8")))


def test_the_long_run_is_nearer_to_the_floor_and_its_card_speaks_of_its_weights() -> None:
    report = json.loads((topic.LONG_RUN / topic.REPORT).read_text(encoding="utf-8"))
    assert sha256((topic.LONG_RUN / topic.WEIGHTS).read_bytes()).hexdigest() == report["weights_sha256"]
    documents = World().documents(300, 9, "validation")
    gaps = [gaps_by_kind(*load_course_model(folder), documents)["all"][1] for folder in (topic.FOLDER, topic.LONG_RUN)]
    assert gaps[1] < gaps[0] and gaps[1] < report["gaps"]["all"][1] + 0.004  # three of its standard errors here


def test_the_committed_weights_reach_the_gap_on_their_card(course) -> None:
    """The card's own examination, on its own documents: the same numbers, and the gap that the course promises."""
    model, tokenizer, report = course
    documents = World().documents(report["exam"]["n_held_out"], report["exam"]["exam_seed"], "validation")
    found = gaps_by_kind(model, tokenizer, documents)
    assert found.keys() == report["gaps"].keys()
    for kind, (floor, gap, error) in report["gaps"].items():
        assert found[kind] == pytest.approx((floor, gap, error), abs=2e-4), kind
    assert found["all"][1] <= 0.03


def test_the_committed_weights_write_and_answer_as_their_card_says(course) -> None:
    model, tokenizer, report = course
    exam = replace(ExamConfig(**report["exam"]), n_samples=100)
    share = sum(ok for _, ok in draw_samples(model, tokenizer, exam)) / exam.n_samples
    spread = 4 * math.sqrt(report["possible_samples"] * (1 - report["possible_samples"]) / exam.n_samples)
    assert abs(share - report["possible_samples"]) <= spread + 0.02  # other batch, other rounding, other draws
    for name in ("asked", "new sums"):
        right = topic.answer_accuracy(model, tokenizer, name, ExamConfig(**report["exam"]))
        assert right == pytest.approx(report["answers"][name], abs=0.011)  # two of 200 may turn by rounding


def test_the_committed_folder_is_whole_and_small(course) -> None:
    report = course[2]
    assert sha256((topic.FOLDER / "model.safetensors").read_bytes()).hexdigest() == report["weights_sha256"]
    assert report["corpus"]["tokenizer_sha256"] == tokenizer_sha256() == tokenizer_sha256(topic.FOLDER)
    assert sum(path.stat().st_size for path in topic.FOLDER.iterdir()) <= 8_000_000
    card = (topic.FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == topic.model_card(report, course[0].config, topic.FOLDER)


def test_transformers_loads_the_committed_folder_as_a_llama(course, parity) -> None:
    model, tokenizer, _ = course
    theirs = AutoModelForCausalLM.from_pretrained(topic.FOLDER, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(topic.FOLDER)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.generation_config.eos_token_id == tokenizer.eos_id
    texts = [document.text for document in World().documents(20, 5, "validation")]
    for text in texts:
        assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    row = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(" ".join(texts[:3]))]])
    with torch.no_grad():
        parity("course model", "transformers", "exchange", model(row), theirs(row).logits, 1e-4)
        greedy = theirs.generate(row[:, :9], do_sample=False, max_new_tokens=30)[0, 9:]
    ours = model.generate(row[:, :9], topic.SamplingConfig(30, temperature=0.0))[0]
    assert topic.upto(ours.tolist(), tokenizer.eos_id) == topic.upto(greedy.tolist(), tokenizer.eos_id)
    messages = [{"role": "user", "content": "Sort: 3 1 2"}]
    chat = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat == tokenizer.chat(messages, add_generation_prompt=True).ids


def test_the_committed_log_is_the_run_on_the_card(course) -> None:
    report = course[2]
    with open(topic.FOLDER / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == report["steps"]
    assert float(rows[-1]["gap"]) == pytest.approx(report["gaps"]["all"][1], abs=0.01)  # 500 other documents


# Examination


def test_gaps_are_those_of_topic_two(parity) -> None:
    """Paid nats less the floor, document by document, for a model and the word-level tokens of topic 2's functions."""
    tokenizer, documents = load_course_tokenizer(), World().documents(30, 3, "validation")
    torch.manual_seed(0)
    model = topic.CausalLM(TINY.config(tokenizer)).eval()

    class Words:
        def encode(self, tokens):
            return [*tokenizer.encode(topic.join(tokens[:-1])), tokenizer.eos_id]

    wanted = document_losses(model, documents, Words())
    paid = row_nats(model, [tokenizer.encode_document(document).ids for document in documents], batch_size=7)
    parity("row_nats", "document_losses", "output", torch.tensor(paid), torch.tensor(wanted), 1e-4)
    found = gaps_by_kind(model, tokenizer, documents)
    n_tokens = sum(len(tokenizer.encode_document(document).ids) - 1 for document in documents)
    floor = sum(sum(document.surprisal) for document in documents)
    assert found["all"][0] == pytest.approx(floor / n_tokens)
    assert sum(found["all"][:2]) == pytest.approx(sum(wanted) / n_tokens, rel=1e-5)


def test_the_grammar_judges_samples() -> None:
    world = World()
    for document in world.documents(30, 11):
        assert possible(world, document.text)
        assert not possible(world, document.text + " And then?")
        assert not possible(world, " ".join(document.text.split()[:-1]))
    assert not possible(world, "") and not possible(world, "Sum: 2 + 2 = 5.")


def test_exact_answers_are_counted(monkeypatch) -> None:
    """An oracle gets everything right, one that forgets the full stop nothing."""
    asked = World().questions("sums", 20, 4)
    right = [topic.join(answer) + " and more" for _, answer in asked]
    config = ExamConfig(n_questions=20, exam_seed=4)
    monkeypatch.setattr(topic, "complete", lambda *args: right)
    assert topic.answer_accuracy(None, load_course_tokenizer(), "sums", config) == 1
    monkeypatch.setattr(topic, "complete", lambda *args: [text.replace(".", "") for text in right])
    assert topic.answer_accuracy(None, load_course_tokenizer(), "sums", config) == 0


# Pretraining


def test_a_killed_run_goes_on_bit_for_bit(trained, tmp_path) -> None:
    model, _, _, log, _ = trained
    run = RunConfig(out=tmp_path)

    class Stop(Exception):
        pass

    def stop(self, step, real=topic.ShardBatches.__call__):
        if step == 4:
            raise Stop
        return real(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topic.ShardBatches, "__call__", stop)
        with pytest.raises(Stop):
            pretrain_model(TINY, SOURCE, replace(SHORT, save_every=3), run)
    again, _, _, log_again, _ = (*pretrain_model(TINY, SOURCE, replace(SHORT, save_every=3, resume=True), run), None)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert log_again == log


def test_the_folder_that_pretrain_writes_loads_everywhere(trained, parity, tmp_path) -> None:
    model, tokenizer, corpus, log, out = trained
    facts = topic.training_facts(model, corpus, SHORT, log, 60.0)
    exam = ExamConfig(n_held_out=20, n_questions=4, n_samples=3)
    report = facts | topic.examine(model, tokenizer, exam)
    folder = save_course_model(model, SOURCE, out, report)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    again, tokenizer_again = load_course_model(folder)
    row = torch.arange(30, 60)[None]
    with torch.no_grad():
        parity("pretrained folder", "transformers", "exchange", again(row), theirs(row).logits, 1e-4)
        assert torch.equal(again(row), model(row))
    assert tokenizer_again.encode("Anna lives in Oslo.") == tokenizer.encode("Anna lives in Oslo.")
    card = (folder / "README.md").read_text()
    for kind, (_, gap, _) in report["gaps"].items():
        assert f"| {kind} | " in card and f"{gap:.4f}" in card
    assert json.loads((folder / topic.REPORT).read_text())["steps"] == SHORT.max_steps


def test_the_card_names_the_command_and_not_the_machine_s_folders(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/10-pretraining-llms/pretraining_llms.py", "pretrain", "--out", "/tmp/x"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert topic.command_line() == "python 10-pretraining-llms/pretraining_llms.py pretrain"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert topic.command_line() == "torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py pretrain"


def test_shards_of_another_tokenizer_are_refused(trained, tmp_path) -> None:
    corpus = trained[2]
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    other = tmp_path / "shards"
    other.mkdir()
    for path in corpus.folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was tokenised by tokenizer 000000000000"):
        pretrain_model(TINY, replace(SOURCE, shards=other), SHORT, RunConfig(out=tmp_path / "out"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["pretrain", "--n-heads", "5"], "d_model=128 is not divisible by n_heads=5"),
        (["pretrain", "--n-kv-heads", "3"], "n_heads=4 is not divisible by n_kv_heads=3"),
        (["pretrain", "--batch-size", "0"], "batch_size must be finite and >= 1"),
        (["pretrain", "--shards", "no/such/folder"], "holds no corpus"),
        (["pretrain", "--tokenizer", "no/such/folder"], "tokenizer.json"),
        (["pretrain", "--packing", "tight"], "best-fit"),
        (["pretrain", "--data", "no-such-file.jsonl"], "cannot be streamed"),
        (["generate", "--checkpoint", "no/such/folder"], "no/such/folder"),
        (["generate", "--max-new-tokens", "-1"], "max_new_tokens must be finite and >= 0"),
        (["generate", "--prompt", "many words " * 600], "shorten it"),
        (["examine", "--n-held-out", "1"], "n_held_out must be finite and >= 2"),
        (["shards", "--n-documents", "0"], "n_documents must be finite and >= 1"),
    ],
)
def test_mistakes_get_one_line(flags: list[str], message: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretraining_llms.main([*flags, "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", '{"gaps": {'])
def test_a_damaged_report_is_named(content: str, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "report.json").write_text(content)
    monkeypatch.setattr(topic, "load_course_model", lambda folder: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(topic, "examine", lambda *_: {})
    monkeypatch.setattr(topic, "show_report", lambda report: None)
    with pytest.raises(SystemExit) as stopped:
        pretraining_llms.main(["examine", "--checkpoint", str(tmp_path), "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and "report.json" in errors and errors.count("\n") == 1


def test_an_answer_ends_before_its_first_end() -> None:
    assert upto([5, 3, 9, 3], 3) == [5] and upto([5, 9], 3) == [5, 9] and upto([3], 3) == []
