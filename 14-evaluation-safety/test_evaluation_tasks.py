"""Our runner and our adapter against lm-evaluation-harness, item by item; task files; tasks about the world."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from course_model import load_course_model
from course_tokenizer import load_course_tokenizer
from evaluation_statistics import Interval, wilson
from evaluation_tasks import (
    FORMATS,
    WORLD_TASKS,
    Task,
    TaskResult,
    in_format,
    read_task,
    run_task,
    score_choice,
    with_examples,
    world_task,
    write_task,
)
from llm_generation import save_word_tokenizer
from lm_eval_adapter import harness_model, run_harness, write_harness_task
from modern_llm_architectures import CausalLM, ModelConfig
from sequence_modeling import Vocabulary
from text_model import TextModel, cut, load_text_model, write_greedily
from tiny_world import World
from workbench import seed_everything

SIZES = {"d_model": 24, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_head": 8, "d_ff": 40}

CHOICES = Task(
    "odd-choices",
    "choice",
    "{prompt}",
    questions=(
        {"prompt": "Sum: 2 + 3 =", "choices": ["5", "15", "23."], "answer": 0},
        {"prompt": "The trailing space goes over ", "choices": ["to this", "there"], "answer": 1},
        {"prompt": "Zürich \u4e16\u754c", "choices": ["é", "e\u0301 und \u4e16", "x"], "answer": 2},
        {"prompt": "word" * 60, "choices": ["tail", " longer tail of many words that count"], "answer": 0},
        {"prompt": "un", "choices": ["a", "b c", "\n"], "answer": 1},
        {"prompt": "a\n", "choices": ["same", "sames"], "answer": 1},
    ),
)
SEAMS = replace(CHOICES, task="seams", delimiter="", questions=CHOICES.questions[:3] + CHOICES.questions[4:])
WRITTEN = Task(
    "written",
    "generate",
    until=(".", "a"),
    max_new_tokens=12,
    questions=tuple({"prompt": f"{n} is", "answer": f"{n}"} for n in ("One", "Two three", "4", "Zürich")),
)
TEXTS = Task("texts", "text", questions=({"text": "Short."}, {"text": "é \u4e16 one two " * 25}, {"text": "x" * 200}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama of few positions with the course's tokenizer, as a folder that transformers loads."""
    path, tokenizer = tmp_path_factory.mktemp("llama"), load_course_tokenizer()
    seed_everything(0)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer.vocab), max_seq_len=64, **SIZES, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_folder(path)
    return path


def library(folder: Path) -> HFLM:
    """The harness's own class for models of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory) -> dict:
    """What the harness finds with its own class."""
    return run_harness(library(folder), [CHOICES, SEAMS, WRITTEN, TEXTS], tmp_path_factory.mktemp("tasks"))


def numbers(result: dict) -> list:
    """What the harness's model answered for each item: (log likelihood, greedy) of choices, or a text, or a number."""
    return [[response[0] for response in sample["resps"]] for sample in result["samples"]]


def test_our_runner_gives_the_numbers_of_the_harness_item_by_item(folder, theirs, parity) -> None:
    examined = load_text_model(folder, begin=False)  # transformers' tokenizer of this folder writes no bos
    for task in (CHOICES, SEAMS):
        result, known = run_task(examined, task), theirs[task.task]
        n = [len(question["choices"]) for question in task.questions]
        items = [[(-a, b) for a, b in zip(s["nats"], s["greedy"], strict=True)] for s in result.samples]
        wanted = [row[:size] for row, size in zip(numbers(known), n, strict=True)]
        bare = [[pair[0] for pair in row[size:]] for row, size in zip(numbers(known), n, strict=True)]
        parity(f"run_task, {task.task}", "lm-evaluation-harness, HFLM", "output", items, wanted, 1e-5)
        parity(
            f"run_task, {task.task}, without a prompt",
            "lm-evaluation-harness, HFLM",
            "output",
            [[-nats for nats in sample["bare"]] for sample in result.samples],
            bare,
            1e-5,
        )
        pairs = {"acc": "acc", "acc_char": "acc_norm", "acc_byte": "acc_bytes", "acc_pmi": "acc_mutual_info"}
        ours = {name: result.columns[name] for name in pairs}
        wanted = {name: [sample[other] for sample in known["samples"]] for name, other in pairs.items()}
        parity(f"scores of choices, {task.task}", "lm-evaluation-harness", "output", ours, wanted, 0)
    written = run_task(examined, WRITTEN)
    assert [sample["made"] for sample in written.samples] == [row[0] for row in numbers(theirs["written"])]
    matches = [sample["exact_match"] for sample in theirs["written"]["samples"]]
    assert written.columns["exact_match"] == matches
    texts = run_task(examined, TEXTS)
    parity(
        "run_task, texts longer than the model reads",
        "lm-evaluation-harness, HFLM",
        "output",
        [-nats / 100 for nats in texts.columns["nats"]],  # in hundreds of nats: float32 sums of 200 tokens
        [row[0] / 100 for row in numbers(theirs["texts"])],
        1e-5,
    )
    bits = theirs["texts"]["metrics"]["bits_per_byte,none"]
    assert texts.table()["bits_per_byte"][0] == pytest.approx(bits, rel=1e-5)


def test_our_adapter_in_the_harness_gives_the_numbers_of_its_own_class(folder, theirs, tmp_path, parity) -> None:
    tasks = [CHOICES, WRITTEN, TEXTS]
    ours = run_harness(harness_model(load_text_model(folder, begin=False)), tasks, tmp_path)
    parity(
        "HarnessModel, choices", "HFLM", "output", numbers(ours["odd-choices"]), numbers(theirs["odd-choices"]), 1e-5
    )
    assert numbers(ours["written"]) == numbers(theirs["written"])
    for task in tasks:
        for name, value in theirs[task.task]["metrics"].items():
            if isinstance(value, float):
                assert ours[task.task]["metrics"][name] == pytest.approx(value, rel=1e-5), name


def test_a_folder_of_another_family_whose_tokenizer_writes_bos(tmp_path, parity) -> None:
    """GPT-2 with a tokenizer of whole words that puts <bos> before every text."""
    vocabulary = Vocabulary(World().vocabulary())
    save_word_tokenizer(tmp_path, vocabulary)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    seed_everything(1)
    ids = {"bos_token_id": vocabulary.ids["<bos>"], "eos_token_id": vocabulary.ids["<eos>"]}
    sizes = {"n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary.ids), **sizes, **ids)).save_pretrained(tmp_path)
    examined, task = load_text_model(tmp_path), world_task("facts", 5, 0)
    assert not examined.begin and not isinstance(examined.model, CausalLM) and examined.max_seq_len == 48
    written = world_task("story", 4, 0)
    theirs = run_harness(library(tmp_path), [task, written], tmp_path / "tasks")
    result = run_task(examined, task)
    items = [[(-a, b) for a, b in zip(s["nats"], s["greedy"], strict=True)] for s in result.samples]
    wanted = [row[:4] for row in numbers(theirs["facts"])]
    parity("run_task, GPT-2", "lm-evaluation-harness, HFLM", "output", items, wanted, 1e-5)
    made = [sample["made"] for sample in run_task(examined, written).samples]
    assert made == [row[0] for row in numbers(theirs["story"])]


def test_the_seam_belongs_to_the_continuation(folder) -> None:
    examined = load_text_model(folder)
    context, continuation = examined.pair("Sum: 2 ", "+ 3")
    assert examined.decode(context[1:]) == "Sum: 2" and examined.decode(continuation) == " + 3"
    assert context[0] == examined.bos_id and examined.pair("", "x")[0] == [examined.bos_id]
    name = " lives in Oslo"
    context, continuation = examined.pair("by Nor", "a" + name)  # " Nora" is one token where " Nor" are two
    assert (
        context + continuation
        == examined.begun("by Nora" + name)
        != examined.begun("by Nor") + examined.encode("a" + name)
    )
    assert examined.decode(continuation) == " in Oslo"  # so a word of the continuation is not scored
    with pytest.raises(ValueError, match="the continuation 'a' adds no token to its context"):
        examined.pair("by Nor", "a")


def test_batches_do_not_change_a_likelihood(folder) -> None:
    examined = load_text_model(folder)
    examined.model.double()
    pairs = [(question["prompt"], " " + choice) for question in CHOICES.questions for choice in question["choices"]]
    together = examined.likelihoods(pairs)
    for pair, found in zip(pairs, together, strict=True):
        assert examined.likelihoods([pair])[0].nats == pytest.approx(found.nats, abs=1e-9)
    prompts = ["One", "Two three four", "5"]
    assert [examined.complete([text], ["e"], 9)[0] for text in prompts] == examined.complete(prompts, ["e"], 9)


def test_choices_by_hand() -> None:
    """raw takes -2 before -3; per token -3 / 3 before -2 / 1; pmi what the prompt made likelier."""
    won = score_choice([2.0, 3.0], [1.5, 9.0], [1, 3], ["ab", "é"])
    assert won == {"acc": 0, "acc_token": 1, "acc_char": 0, "acc_byte": 0, "acc_pmi": 1}
    won = score_choice([2.0, 3.0], [0.0, 0.0], [1, 1], ["a", "éé"])
    assert (won["acc_char"], won["acc_byte"]) == (1, 1) and -3.0 / 4 > -3.0 / 2 > -2.0 / 1


def test_the_course_model_knows_its_world() -> None:
    examined = TextModel.of(*load_course_model())
    assert run_task(examined, world_task("facts", 40, 3)).table()["acc"][0] > 0.9
    assert run_task(examined, world_task("sums", 20, 3)).table()["exact_match"][0] > 0.9
    bits, (low, high) = run_task(examined, world_task("held-out", 30, 3)).table()["bits_per_byte"]
    assert 0.05 < low < bits < high < 0.5
    without = replace(examined, begin=False)
    prompt = ("Question: where does", " Anna")
    assert without.likelihoods([prompt])[0].nats != pytest.approx(examined.likelihoods([prompt])[0].nats, abs=1e-3)


def test_a_task_survives_its_file_whatever_its_texts_hold(tmp_path) -> None:
    odd = {"prompt": "one\u2028two\x85three\x0cfour\nfive", "answer": "\u2029"}
    task = Task("odd", "generate", questions=(odd, odd | {"answer": "x"}))
    write_task(task, tmp_path / "odd.jsonl")
    assert read_task(tmp_path / "odd.jsonl") == task
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl is not UTF-8 at byte 0; save it as UTF-8 text"):
        read_task(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("name", WORLD_TASKS)
def test_world_tasks_are_what_they_say_and_survive_a_file(name: str, tmp_path) -> None:
    task, world = world_task(name, 12, 5), World()
    write_task(task, tmp_path / "task.jsonl")
    assert read_task(tmp_path / "task.jsonl") == task and len(task.questions) == 12
    assert world_task(name, 12, 5) == task != world_task(name, 12, 6)
    for question in task.questions:
        if task.kind == "choice":
            right = question["choices"][question["answer"]]
            assert right in world.facts[question["person"]].values() and len(set(question["choices"])) == 4
        elif name in ("sums", "new-sums"):
            one, _, two = question["prompt"].removeprefix("Sum: ").removesuffix(" =").split()
            assert question["answer"] == str(int(one) + int(two))
            assert ((int(one), int(two)) in world.held_out_sums) == (name == "new-sums")


def test_all_questions_of_a_document_are_one_group() -> None:
    task = world_task("news", 30, 2)
    by_group: dict[int, list[str]] = {}
    for question in task.questions:
        by_group.setdefault(question["group"], []).append(question["prompt"])
    assert any(len(prompts) > 1 for prompts in by_group.values())
    for prompts in by_group.values():
        assert all(later.startswith(first) for first, later in zip(prompts, prompts[1:], strict=False))


def test_intervals_respect_groups() -> None:
    right = [1.0, 1.0, 0.0, 0.0] * 25
    alone = TaskResult("t", {"acc": right}, list(range(100)), [])
    together = TaskResult("t", {"acc": right}, [n // 2 for n in range(100)], [])
    assert alone.table()["acc"] == (0.5, wilson(50, 100))
    narrow, wide = alone.table()["acc"][1], together.table()["acc"][1]
    assert 1.2 < (wide.high - wide.low) / (narrow.high - narrow.low) < 1.6  # sqrt(2)
    assert TaskResult("t", {"f1": [0.5, 0.5]}, [0, 0], []).table()["f1"][1] == Interval(-math.inf, math.inf)
    assert TaskResult("t", {"f1": [0.5, 0.5]}, [0, 1], []).table()["f1"][1] == Interval(0.5, 0.5)


def test_formats_ask_the_same_questions() -> None:
    task = world_task("facts", 6, 1)
    for name in FORMATS:
        asked = in_format(task, name)
        assert asked.questions == task.questions and asked.prompt(task.questions[0])
    assert in_format(task, "quiz").prompt(task.questions[0]) == task.prompt(task.questions[0])
    more = with_examples(task, world_task("facts", 3, 99).questions[:2])
    prompt = more.prompt(task.questions[0])
    assert prompt.endswith(task.prompt(task.questions[0])) and prompt.count("Answer:") == 3
    with pytest.raises(ValueError, match="is one of the questions; it would give its answer away"):
        with_examples(task, task.questions[:1])


def test_one_stop_string_is_not_read_as_its_letters() -> None:
    assert Task("t", "generate", until="end", questions=({"prompt": "p", "answer": "a"},)).until == ("end",)


def test_stop_strings_end_an_answer_at_the_first_of_them() -> None:
    assert cut("one. two\nthree", ["\n", "."]) == "one" and cut("one", ["x", ""]) == "one"


class Answers:
    """Completes every prompt as it is told to."""

    def __init__(self, *made: str) -> None:
        self.made = list(made)

    def complete(self, prompts: list[str], *settings: object) -> list[str]:
        return self.made[: len(prompts)]


def test_any_of_several_right_answers_counts() -> None:
    questions = [{"prompt": "p", "answer": ["one", "The two."]}] * 4
    found = run_task(Answers("one ", "two", "a two three", "four"), Task("t", "generate", questions=tuple(questions)))
    assert found.columns["exact_match"] == [1.0, 0.0, 0.0, 0.0]
    assert found.columns["exact_match_normalised"] == [1.0, 1.0, 0.0, 0.0]
    assert found.columns["f1"] == pytest.approx([1.0, 1.0, 2 / 3, 0.0])
    assert found.samples[1] == {"prompt": "p", "answer": ["one", "The two."], "made": "two"}


def test_examples_are_shown_as_they_are() -> None:
    task = Task(
        "t", "generate", "Q: {prompt}", questions=({"prompt": "x {y}", "answer": "z"}, {"prompt": "q", "answer": "a"})
    )
    more = with_examples(task, [{"prompt": "{0}", "answer": ["{first}", "second"]}])
    assert more.prompt(task.questions[0]) == "Q: {0} {first}\n\nQ: x {y}"
    assert more.take(1).questions == task.questions[:1] and len(more.questions) == 2


def test_bits_and_nats_of_texts_by_hand() -> None:
    columns = {"nats": [2 * math.log(2), 6 * math.log(2)], "tokens": [1.0, 3.0], "bytes": [4.0, 12.0]}
    found = TaskResult("t", columns, [0, 1], []).table()
    assert found["bits_per_byte"][0] == pytest.approx(0.5) and found["nats_per_token"][0] == pytest.approx(math.log(4))
    assert TaskResult("t", columns, [0, 0], []).table()["bits_per_byte"][1] == Interval(-math.inf, math.inf)


def test_small_batches_change_nothing_and_a_long_prompt_loses_its_beginning(folder) -> None:
    examined = load_text_model(folder)
    examined.model.double()
    few, pairs = replace(examined, batch_size=3), [(q["prompt"], " x") for q in CHOICES.questions]
    pairs = [*pairs, *(("a", " b" * n) for n in range(1, 5))]
    assert [each.nats for each in few.likelihoods(pairs)] == pytest.approx(
        [each.nats for each in examined.likelihoods(pairs)], abs=1e-9
    )
    prompts = ["One", "Two three four", "5", "six seven"]
    assert replace(examined, batch_size=2).complete(prompts, (), 6) == examined.complete(prompts, (), 6)
    long = " ".join(f"w{n}" for n in range(60))
    ids = examined.begun(long)
    [written] = write_greedily(examined, [ids[-(64 - 5) :]], (), 5)
    assert len(ids) > 64 and examined.complete([long], (), 5) == [examined.text(written)]


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["{"], ":1 is not JSON"),
        (['{"task": "t"}'], ":1 needs task and kind"),
        (['{"task": "t", "kind": "choice", "metric": 1}'], "knows no metric"),
        (['{"task": "t", "kind": "choose"}'], "unknown kind of task 'choose'; did you mean 'choice'"),
        (['{"task": "t", "kind": "choice"}'], "task 't' has no questions"),
        (['{"task": "t", "kind": "choice"}', "[1]"], ":2 must be a JSON object, got list"),
        (
            ['{"task": "t", "kind": "choice"}', json.dumps(GOOD), json.dumps(GOOD | {"answer": 2})],
            "line 3: answer must",
        ),
        (
            ['{"task": "t", "kind": "choice"}', json.dumps(GOOD | {"choices": ["a", "a"]})],
            "line 2: choices must differ",
        ),
        (['{"task": "t", "kind": "text"}', '{"text": ""}'], "line 2: text must be a text that is not empty, got ''"),
        (['{"task": "t", "kind": "text"}', '{"text": 5}'], "that is not empty, got 5"),
        (['{"task": "t", "kind": "text"}', '{"text": "a", "group": [1]}'], "group must be a number or a name"),
        (['{"task": "t", "kind": "generate"}', '{"prompt": "p", "answer": 5}'], "answer must be a text, or a list"),
        (['{"task": "t", "kind": "generate"}', '{"prompt": "p", "answer": []}'], "answer must be a text, or a list"),
        (['{"task": 5, "kind": "text"}', '{"text": "a"}'], "task must be a text, got 5"),
        (['{"task": "t", "kind": "text", "template": 5}', '{"text": "a"}'], "template must be a text, got 5"),
        (['{"task": "t", "kind": "text", "until": [""]}', '{"text": "a"}'], "until must be texts, none of them empty"),
        (['{"task": "t", "kind": "text", "max_new_tokens": "5"}', '{"text": "a"}'], "'5' must be a whole number"),
        (['{"task": "t", "kind": "choice"}', json.dumps(GOOD | {"choices": ["a", ""]})], "none of them empty"),
        (
            ['{"task": "t", "kind": "generate"}', '{"prompt": "x"}'],
            "line 2: a question of kind 'generate' needs answer",
        ),
        (['{"task": "t", "kind": "generate"}', '{"question": "x", "answer": "y"}'], "cannot be filled: KeyError"),
        (['{"task": "t", "kind": "generate", "max_new_tokens": 0}', '{"prompt": "x", "answer": "y"}'], "at least 1"),
    ],
)
def test_a_bad_task_file_is_named_with_its_line(lines, message: str, tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "t.jsonl")


def test_what_cannot_be_asked_is_refused(folder, tmp_path) -> None:
    examined = replace(load_text_model(folder), chat=None)
    with pytest.raises(ValueError, match="no such task file"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="unknown task 'fact'; did you mean 'facts'"):
        world_task("fact", 3, 0)
    with pytest.raises(ValueError, match="adds no token to its context"):
        examined.pair("a", "")
    with pytest.raises(ValueError, match="has no chat template"):
        examined.complete(["x"], as_chat=True)
    with pytest.raises(ValueError, match="max_new_tokens=64 must be below the model's 64 positions"):
        examined.complete(["x"], max_new_tokens=64)
    with pytest.raises(ValueError, match="a continuation has .* tokens, the model reads 64"):
        examined.likelihoods([("x", " one two three" * 60)])
    with pytest.raises(ValueError, match="is a chat; the harness applies"):
        write_harness_task(world_task("ask-sum", 2, 0), tmp_path)
    with pytest.raises(ValueError, match="writes greedily"):
        harness_model(examined).write("x", {"do_sample": True})
    with pytest.raises(ValueError, match="is not a folder"):
        load_text_model(tmp_path / "none")
    assert np.isfinite(examined.likelihoods([("", "x")])[0].nats)
