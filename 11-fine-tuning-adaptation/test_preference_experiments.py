"""The experiments on the course model, with a tiny model in its place wherever what is tested is the bookkeeping."""

import math
from types import SimpleNamespace

import pytest
import torch

import preference_experiments as topic
from course_tokenizer import load_course_tokenizer
from exact_experiments import EXACT_EXPERIMENTS, ExactConfig, estimators, exact, length_slopes, plain
from exact_policies import ExactBed, nearby
from fine_tuning_adaptation import AnswerConfig
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from policy_gradients import RewardTask
from preference_experiments import (
    CATEGORIES,
    COURSE_EXPERIMENTS,
    PAIR_LOSSES,
    PREFERENCE_VERBS,
    JudgeConfig,
    PreferenceConfig,
    ReinforceConfig,
    StartConfig,
    best_of_n,
    checked_task,
    draw_instructions,
    fresh,
    is_right,
    label_pairs,
    over_run,
    preference,
    questions,
    reinforce,
    starting_policy,
    train_on_pairs,
    train_reward_model,
)
from preference_losses import response_rewards
from tiny_world import join
from workbench import RunConfig, run_verbs

TOKENIZER = load_course_tokenizer()


@pytest.fixture(autouse=True)
def short_answers(monkeypatch) -> None:
    """Tiny models say nothing of worth: four tokens of it are enough."""
    monkeypatch.setattr(topic, "MOST_TOKENS", 4)


def tiny(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_ff": 24, "max_seq_len": 128}
    ids = {"pad_id": TOKENIZER.pad_id, "bos_id": TOKENIZER.bos_id, "eos_id": TOKENIZER.eos_id}
    model = CausalLM(ModelConfig(len(TOKENIZER.vocab), **ids, more_eos_ids=(TOKENIZER.im_end_id,), **sizes))
    return model.eval().requires_grad_(False)


def a_task() -> RewardTask:
    """Real questions, rewarded for an even first id: something that a tiny model does half of the time."""
    even = lambda asked, responses: [float(response[0] % 2 == 0) for response in responses]  # noqa: E731
    return RewardTask(checked_task(TOKENIZER, 0).draw, even, TOKENIZER.im_end_id)


def test_questions_are_a_function_of_the_step_and_end_where_the_assistant_speaks() -> None:
    task = checked_task(TOKENIZER, 3)
    first, again, other = task.draw(8, 5), task.draw(8, 5), task.draw(8, 6)
    assert [question.prompt for question in first] == [question.prompt for question in again]
    assert [question.prompt for question in first] != [question.prompt for question in other]
    assert {question.instruction.category for question in task.draw(40, 0)} == set(CATEGORIES)
    assert all(question.prompt[-1] == TOKENIZER.im_sep_id for question in first)


def test_training_and_held_out_questions_have_nothing_in_common() -> None:
    train, held = ({join(item.prompt) for item in draw_instructions(400, 0, split)} for split in ("train", "content"))
    assert not train & held


def test_an_answer_is_right_word_for_word_and_only_if_it_ends() -> None:
    (question,) = questions(TOKENIZER, draw_instructions(1, 0))
    answer = TOKENIZER.encode(join(question.instruction.answer[:-1]))
    assert is_right(TOKENIZER, question, [*answer, TOKENIZER.im_end_id])
    assert not is_right(TOKENIZER, question, answer)
    assert not is_right(TOKENIZER, question, [*answer[:-1], TOKENIZER.im_end_id])
    assert not is_right(TOKENIZER, question, [*answer, *answer, TOKENIZER.im_end_id])


def test_labelled_pairs_differ_and_the_better_one_is_chosen_as_often_as_said() -> None:
    model, task = tiny(), a_task()
    for p_wrong in (0.0, 0.3):
        pairs = label_pairs(model, task, 120, p_wrong, 0, ties=False)
        worth = [task.reward(pairs.asked, side) for side in (pairs.chosen, pairs.rejected)]
        assert all(chosen != rejected for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True))
        wrong = sum(chosen < rejected for chosen, rejected in zip(*worth, strict=True)) / 120
        assert abs(wrong - p_wrong) <= 4 * math.sqrt(p_wrong * (1 - p_wrong) / 120)
        assert all(chosen != rejected for chosen, rejected in zip(*worth, strict=True))


def test_with_ties_a_coin_decides_and_the_better_one_still_wins() -> None:
    model, task = tiny(), a_task()
    pairs = label_pairs(model, task, 120, 0.0, 0, ties=True)
    worth = list(zip(*(task.reward(pairs.asked, side) for side in (pairs.chosen, pairs.rejected)), strict=True))
    assert all(chosen >= rejected for chosen, rejected in worth)
    assert 20 < sum(chosen == rejected for chosen, rejected in worth) < 100


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_every_loss_on_pairs_moves_the_policy_towards_the_chosen(loss) -> None:
    reference = tiny()
    pairs = label_pairs(reference, a_task(), 24, 0.0, 0, ties=False)
    config = PreferenceConfig(loss=loss, n_pairs=24, pair_steps=8, pair_batch=12, learning_rate=1e-2)
    rows = train_on_pairs(fresh(reference), reference, pairs, config, seed=0)
    assert len(rows) == 8 and rows[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["margin"] > 0.05 if loss != "chosen-only" else rows[-1]["chosen"] > 0.05


def test_a_policy_that_is_never_right_gives_no_pairs_and_says_so() -> None:
    task = a_task()._replace(reward=lambda asked, responses: [0.0] * len(asked))
    with pytest.raises(ValueError, match="1280 questions gave no pair to learn from"):
        label_pairs(tiny(), task, 4, 0.0, 0, ties=False)


def test_a_reward_model_learns_the_judge_and_best_of_n_climbs_it() -> None:
    reference, task = tiny(), a_task()
    pairs = label_pairs(reference, task, 120, 0.0, 0, ties=False)
    judge = train_reward_model(reference, pairs, JudgeConfig(reward_steps=40, reward_rate=1e-2), 0)
    chosen, rejected = (response_rewards(judge, rows) for rows in pairs.rows(range(120), TOKENIZER.pad_id))
    assert (chosen > rejected).double().mean() > 0.9
    found = best_of_n(reference, task, judge, 0, n_prompts=6)
    learned = [pair[0] for pair in found]
    assert learned == sorted(learned) and learned[-1] > learned[0]


def test_one_run_of_over_optimisation_keeps_both_rewards(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(topic, "start_of", lambda seed: (tiny(seed), TOKENIZER))
    monkeypatch.setattr(topic, "checked_task", lambda *args: replace_reward(checked_task(*args)))
    monkeypatch.setattr(topic, "EXAM", AnswerConfig(n_questions=2))
    settings = JudgeConfig(n_pairs=20, reward_steps=3, n_unseen=20, n_prompts=2, rl_steps=2)
    found = over_run(SimpleNamespace(again=False), RunConfig(out=tmp_path), 0, settings)
    assert len(found["rl"]) == 2 and all(len(row) == 4 for row in found["rl"])
    assert len(found["best_of_n"]) == len(topic.BEST_OF) and 0 <= found["accuracy"] <= 1
    again = over_run(SimpleNamespace(again=False), RunConfig(out=tmp_path), 0, settings)
    assert again["rl"] == found["rl"]  # remembered


SMALL_START = StartConfig(sft_steps=2, sft_batch=2)


def test_the_start_is_the_course_model_that_ends_its_turns() -> None:
    model, tokenizer = starting_policy(SMALL_START, 0)
    assert tokenizer.im_end_id in model.config.more_eos_ids and not model.training


def test_reinforce_runs_and_says_what_it_gained(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(topic, "EXAM", AnswerConfig(n_questions=2))
    config = ReinforceConfig(budget=0.0, max_steps=2, n_prompts=2, n_rollouts=2)
    reinforce(config, SMALL_START, RunConfig(out=tmp_path, device="cpu"))
    printed = capsys.readouterr().out
    assert "held out: greedy, sampled" in printed and (tmp_path / "reinforce.svg").exists()


def test_preference_runs_and_says_what_it_gained(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(topic, "EXAM", AnswerConfig(n_questions=2))
    monkeypatch.setattr(topic, "checked_task", lambda *args: replace_reward(checked_task(*args)))
    preference(
        PreferenceConfig(n_pairs=6, pair_steps=2, pair_batch=4), SMALL_START, RunConfig(out=tmp_path, device="cpu")
    )
    assert "held-out accuracy, greedy" in capsys.readouterr().out


def replace_reward(task: RewardTask) -> RewardTask:
    return task._replace(reward=a_task().reward)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceConfig(p_wrong=0.5), "p_wrong must be finite and >= 0 and < 0.5, got 0.5"),
        (lambda: StartConfig(sft_steps=0), "sft_steps must be finite and >= 1, got 0"),
        (lambda: JudgeConfig(n_pairs=0), "n_pairs must be finite and >= 1, got 0"),
        (lambda: ExactConfig(n_rollouts=1), "n_rollouts must be finite and >= 2, got 1"),
    ],
)
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["reinforce", "--method", "grp"], "invalid choice: 'grp'"),
        (["reinforce", "--n-rollouts", "0"], "n_rollouts must be finite and >= 1, got 0"),
        (["preference", "--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
        (["preference", "--loss", "dppo"], "invalid choice: 'dppo'"),
        (["exact", "--n-batches", "1"], "n_batches must be finite and >= 100, got 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        run_verbs("preferences", PREFERENCE_VERBS, argv)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and message in error


# The tables


class Kept:
    """Stands for the chapter's settings, and keeps the tables."""

    n_seeds, again = 2, False

    def __init__(self, folder) -> None:
        self.folder, self.tables = folder, {}

    def save(self, name, columns, rows, experiment, n_seeds=0) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables[name] = rows


def test_tables_of_runs_have_a_cell_for_every_column(monkeypatch, tmp_path) -> None:
    after = {"sampled": 0.4, "greedy": 0.6, **dict.fromkeys(CATEGORIES, 0.5)}
    row = {"step": 1, "seconds": 1.0, "reward": 0.3, "kl": 0.1, "entropy": 0.5, "length": 8.0}
    monkeypatch.setattr(
        topic, "rl_run", lambda method, *_: {"after": after, "rows": [] if method == "start" else [row]}
    )
    monkeypatch.setattr(topic, "lift_run", lambda *_: {"before": after, "after": after, "rows": [row] * 6})
    state = {"last": {"margin": 1.0, "chosen": -1.0, "rejected": -2.0}, "after": after, "state": row}
    monkeypatch.setattr(topic, "loss_run", lambda *_: state)
    over = {"accuracy": 0.6, "best_of_n": [[0.1, 0.2]] * len(topic.BEST_OF), "rl": [[0.1, 0.2, 8.0, 0.3]] * 12}
    monkeypatch.setattr(topic, "over_run", lambda *_: over)
    kept = Kept(tmp_path)
    for name, (experiment, _) in COURSE_EXPERIMENTS.items():
        experiment(kept, RunConfig(out=tmp_path))
        assert name in kept.tables
    assert (tmp_path / "rl-methods.svg").exists() and (tmp_path / "over-optimisation.svg").exists()


def test_the_exact_verb_prints_every_estimator(capsys) -> None:
    exact(ExactConfig(n_batches=100), RunConfig())
    printed = capsys.readouterr().out
    bed = ExactBed()
    for name in estimators(bed, nearby(bed, 0.5), plain(ExactConfig(), bed)):
        assert name in printed


def test_length_slopes_are_those_of_the_mean_lengths() -> None:
    bed = ExactBed(max_len=3)
    policy = nearby(bed, 0.5)
    way = torch.randn(policy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean_wrong(logits: torch.Tensor) -> torch.Tensor:
        chances = bed.log_probs(logits).exp() * (1 - bed.correct)
        return ((chances * bed.lengths).sum(dim=1) / chances.sum(dim=1)).mean()

    slope = (mean_wrong(policy + 1e-5 * way) - mean_wrong(policy - 1e-5 * way)) / 2e-5
    assert abs(slope - (length_slopes(bed, policy)["wrong"] * way).sum()) < 1e-8


def test_exact_tables_without_sampling(tmp_path) -> None:
    kept = Kept(tmp_path)
    EXACT_EXPERIMENTS["exact-kl"][0](kept, RunConfig())
    assert len(kept.tables["exact-kl"]) == 6
