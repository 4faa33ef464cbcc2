"""Proofs of the policy gradients: PPO by hand, GAE by its definition, GRPO and RLOO against TRL; a loop that learns."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import policy_gradients
from course_tokenizer import FOLDER as TOKENIZER_FOLDER
from gpt2 import SamplingConfig
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from policy_gradients import (
    POLICY_LOSSES,
    Critic,
    PolicyConfig,
    RewardTask,
    Rollouts,
    best_and_worst,
    clipped,
    clipped_value_loss,
    dapo_loss,
    dr_grpo_loss,
    gae,
    group_centred,
    group_normalised,
    grpo_loss,
    improve,
    k1,
    k2,
    k3,
    leave_one_out,
    pair_loss,
    per_budget,
    per_sequence,
    per_token,
    ppo_advantages,
    ppo_loss,
    reinforce_loss,
    rejection_loss,
    rloo_loss,
    roll_out,
    sample_responses,
    summed,
    take_step,
    token_rewards,
    whitened,
)
from preference_losses import Responses, dpo_loss, lay_out, response_log_probs

SIZES = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ff": 40, "max_seq_len": 64}
DOUBLE = {"dtype": torch.float64}


def random_rollouts(
    n_prompts: int = 2, n_rollouts: int = 3, seq: int = 5, seed: int = 0
) -> tuple[torch.Tensor, Rollouts]:
    """Log-probabilities with a gradient, and rollouts that another policy sampled; rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch = n_prompts * n_rollouts
    lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
    mask = (torch.arange(seq) >= 1) & (torch.arange(seq) < 1 + lengths)
    draw = [-2 * torch.rand(batch, seq, generator=generator, **DOUBLE) * mask for _ in range(3)]
    rewards = torch.rand(n_prompts, n_rollouts, generator=generator, **DOUBLE)
    values = torch.rand(batch, seq, generator=generator, **DOUBLE) * mask
    rows = Responses(torch.zeros(batch, seq + 1, dtype=torch.long), mask)
    return draw[0].requires_grad_(True), Rollouts(rows, rewards, draw[1], draw[2], values)


# Advantages


def test_advantages_by_hand() -> None:
    """Rewards 1, 0, 0, 1: the others' mean is 1/3 or 2/3; all have mean 1/2 and deviation (n - 1) 1/sqrt(3)."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], **DOUBLE)
    signs = torch.tensor([[1.0, -1.0, -1.0, 1.0]], **DOUBLE)
    torch.testing.assert_close(leave_one_out(rewards), 2 / 3 * signs)
    torch.testing.assert_close(group_centred(rewards), signs / 2)
    torch.testing.assert_close(group_normalised(rewards, eps=0.0), signs * math.sqrt(3) / 2)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others_exactly() -> None:
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), **DOUBLE)
    for prompt in range(3):
        for i in range(5):
            others = torch.cat([rewards[prompt, :i], rewards[prompt, i + 1 :]])
            assert leave_one_out(rewards)[prompt, i].item() == pytest.approx(
                (rewards[prompt, i] - others.mean()).item()
            )


def test_a_group_of_one_and_a_group_of_equals_have_advantage_zero_and_no_nan() -> None:
    for rewards in (torch.tensor([[0.7], [0.2]]), torch.full((2, 4), 0.7)):
        for advantage in (leave_one_out, group_centred, group_normalised):
            assert advantage(rewards).abs().max() < 1e-6, advantage.__name__


def test_group_normalisation_equals_trls_arithmetic(parity) -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), **DOUBLE)
    means, deviations = rewards.mean(dim=1), nanstd(rewards, dim=1)
    expected = (rewards - means[:, None]) / (deviations[:, None] + 1e-4)
    # TRL divides n by n - 1 in float32
    parity("group_normalised", "trl nanstd", "output", group_normalised(rewards), expected, 1e-6)


# GAE


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_gae_is_the_double_sum_of_its_definition(gae_lambda, gamma, parity, checked_shapes) -> None:
    """Advantage of t: the sum over l of (gamma lambda)^l delta_{t+l}, where nothing follows the last counted token."""
    _, rollouts = random_rollouts()
    rewards = torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(5), **DOUBLE) * rollouts.mask
    with checked_shapes(policy_gradients) as checked:
        ours = gae(rewards, rollouts.values, rollouts.mask, gamma, gae_lambda)
    assert checked
    expected = torch.zeros_like(ours)
    for row in range(len(ours)):
        places = rollouts.mask[row].nonzero().flatten().tolist()
        for t in places:
            for later in (place for place in places if place >= t):
                after = rollouts.values[row, later + 1] if later + 1 in places else 0.0
                delta = rewards[row, later] + gamma * after - rollouts.values[row, later]
                expected[row, t] += (gamma * gae_lambda) ** (later - t) * delta
    parity(f"gae, lambda {gae_lambda:g}", "the double sum", "output", ours, expected, 1e-10)


def test_gae_at_its_ends_is_the_reward_to_come_minus_the_value_and_one_step_ahead() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]], **DOUBLE), torch.tensor([[0.2, 0.5, 0.9]], **DOUBLE)
    mask = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0), torch.tensor([[0.8, 0.5, 0.1]], **DOUBLE))
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 0.0), torch.tensor([[0.3, 0.4, 0.1]], **DOUBLE))


def test_what_stands_behind_the_end_changes_no_advantage() -> None:
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]], **DOUBLE), torch.tensor([[0.2, 0.5, 9.0]], **DOUBLE)
    mask = torch.tensor([[True, True, False]])
    advantages = gae(rewards, values, mask, 1.0, 0.9)
    torch.testing.assert_close(advantages, torch.tensor([[0.3 + 0.9 * 0.5, 0.5, 0.0]], **DOUBLE))


def test_ppo_rewards_the_last_counted_token_and_charges_each_for_its_distance() -> None:
    _, rollouts = random_rollouts()
    rewards = token_rewards(rollouts, kl_coef=0.3)
    distance = (rollouts.old_log_probs - rollouts.ref_log_probs).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), rollouts.rewards.flatten() - 0.3 * distance)
    plain = token_rewards(rollouts, kl_coef=0.0)
    for row in range(len(plain)):
        last = rollouts.mask[row].nonzero().max().item()
        assert plain[row].nonzero().flatten().tolist() == [last]


def test_whitening_counts_real_tokens_alone() -> None:
    _, rollouts = random_rollouts()
    advantages = torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(2), **DOUBLE) + 7
    scaled = whitened(advantages, rollouts.mask)
    counted = scaled[rollouts.mask]
    assert counted.mean().abs() < 1e-10 and (counted.std() - 1).abs() < 1e-6
    assert (scaled[~rollouts.mask] == 0).all()
    alone = torch.tensor([[False, True, False]])
    assert whitened(torch.tensor([[5.0, 3.0, 4.0]]), alone).tolist() == [[0, 0, 0]]  # one token: no spread, no NaN


def test_with_lambda_one_ppos_advantage_is_all_that_is_left_less_the_value() -> None:
    _, rollouts = random_rollouts()
    advantages = ppo_advantages(rollouts, PolicyConfig(kl_coef=0.3, gae_lambda=1.0))
    first = rollouts.mask.long().argmax(dim=1)[:, None]
    wanted = rollouts.penalised(0.3).flatten() - rollouts.values.gather(1, first)[:, 0]
    torch.testing.assert_close(advantages.gather(1, first)[:, 0], wanted)


# The clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.0),  # inside: the plain policy gradient
        (0.9, -2.0, 1.8, 2.0),  # inside, downwards
        (1.3, 2.0, -2.4, 0.0),  # up far enough: held at 1.2
        (0.7, -2.0, 1.6, 0.0),  # down far enough: held at 0.8
        (0.7, 2.0, -1.4, -2.0),  # good, and yet it has become rarer: no hold
        (1.3, -2.0, 2.6, 2.0),  # bad, and yet it has become more likely: no hold
    ],
)
def test_each_region_of_the_clip_by_hand(ratio, advantage, loss, slope) -> None:
    moved = torch.tensor(ratio, requires_grad=True, **DOUBLE)
    value = clipped(moved, torch.tensor(advantage, **DOUBLE), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss) and moved.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, (1.1 - 2) ** 2 / 2, 1.1 - 2),  # moved by 0.1 of 0.2: plain
        (1.5, (1.2 - 2) ** 2 / 2, 0.0),  # moved by 0.5 towards the return: held at 1.2
        (0.5, (0.5 - 2) ** 2 / 2, 0.5 - 2),  # moved away: the larger error counts
    ],
)
def test_the_value_clip_by_hand(value, loss, slope) -> None:
    """Old value 1, return 2, eps 0.2."""
    moved = torch.tensor(value, requires_grad=True, **DOUBLE)
    found = clipped_value_loss(moved, torch.tensor(1.0, **DOUBLE), torch.tensor(2.0, **DOUBLE), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and moved.grad.item() == pytest.approx(slope)


def test_the_first_step_of_every_clipped_loss_is_the_plain_policy_gradient() -> None:
    """At ratio 1 the clip does not act: the gradient is that of -advantage * log p."""
    log_probs, rollouts = random_rollouts()
    rollouts = rollouts._replace(old_log_probs=log_probs.detach())
    config = PolicyConfig(kl_coef=0.0)
    advantages = {
        rloo_loss: (leave_one_out(rollouts.rewards).reshape(-1, 1), summed),
        grpo_loss: (group_normalised(rollouts.rewards).reshape(-1, 1), per_sequence),
        dapo_loss: (group_normalised(rollouts.rewards).reshape(-1, 1), per_token),
        dr_grpo_loss: (group_centred(rollouts.rewards).reshape(-1, 1), lambda x, m: per_budget(x, m, 40)),
        ppo_loss: (whitened(ppo_advantages(rollouts, config), rollouts.mask), per_token),
    }
    for loss, (advantage, average) in advantages.items():
        (got,) = torch.autograd.grad(loss(log_probs, rollouts, config), log_probs)
        (wanted,) = torch.autograd.grad(average(-advantage * log_probs, rollouts.mask), log_probs)
        torch.testing.assert_close(got, wanted, msg=loss.__name__)


# Distance to the reference


def test_the_three_estimators_by_hand_and_where_they_agree() -> None:
    """log ratio log 2: k1 = 0.693, k2 = 0.240, k3 = 1/2 - 1 + 0.693 = 0.193; all 0 at 0, k3 about k2 near it."""
    x = torch.tensor([math.log(2)], **DOUBLE)
    assert [round(k(x).item(), 3) for k in (k1, k2, k3)] == [0.693, 0.24, 0.193]
    assert all(k(torch.zeros(1)).item() == 0 for k in (k1, k2, k3))
    near = torch.tensor([1e-3, -1e-3], **DOUBLE)
    torch.testing.assert_close(k3(near), k2(near), rtol=1e-3, atol=0)
    assert (k3(torch.linspace(-3, 3, 25)) >= 0).all()


def test_the_penalty_of_a_response_is_the_sum_over_its_tokens() -> None:
    _, rollouts = random_rollouts()
    distance = (rollouts.old_log_probs - rollouts.ref_log_probs)[1][rollouts.mask[1]].sum()
    assert rollouts.penalised(0.5)[0, 1].item() == pytest.approx((rollouts.rewards[0, 1] - 0.5 * distance).item())


# Averages over tokens


def test_averages_by_hand() -> None:
    """Losses 1 1 1 1 of a long response, 4 of a short one: 8/2, (1 + 4)/2, 8/5 and 8/(2 * 10)."""
    losses = torch.tensor([[1.0, 1, 1, 1], [4, 99, 99, 99]])
    mask = torch.tensor([[True] * 4, [True] + [False] * 3])
    averages = (summed(losses, mask), per_sequence(losses, mask), per_token(losses, mask), per_budget(losses, mask, 10))
    assert [round(value.item(), 3) for value in averages] == [4.0, 2.5, 1.6, 0.4]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_loss_looks_at_what_is_not_counted(name) -> None:
    log_probs, rollouts = random_rollouts()
    rewards = rollouts.rewards.clone()
    rewards[:, 0] = 1.0  # something to accept
    rollouts, config = rollouts._replace(rewards=rewards), PolicyConfig(method=name)
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(9), **DOUBLE) * ~rollouts.mask
    (gradient,) = torch.autograd.grad(POLICY_LOSSES[name](log_probs, rollouts, config), log_probs)
    assert (gradient * ~rollouts.mask == 0).all() and gradient.abs().sum() > 0
    dirty = rollouts._replace(
        old_log_probs=rollouts.old_log_probs + noise, ref_log_probs=rollouts.ref_log_probs - noise
    )
    found = POLICY_LOSSES[name](log_probs + noise, dirty, config)
    torch.testing.assert_close(found, POLICY_LOSSES[name](log_probs, rollouts, config))


# Against TRL


@pytest.fixture(scope="module")
def trl_parts(tmp_path_factory):
    """A tiny Llama as a folder, its tokenizer, and trainers of TRL that are only asked for their loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
    torch.manual_seed(0)
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id, "bos_id": 1}
    CausalLM(ModelConfig(len(tokenizer), **ids, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        **{"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"report_to": [], "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4},
        **{"num_generations": 4, "max_completion_length": 9, "temperature": 1.0, "epsilon": 0.2},
    }
    data = Dataset.from_list([{"prompt": "What is 2 plus 3 ?"}] * 4)
    parts = {"train_dataset": data, "processing_class": tokenizer, "reward_funcs": lambda completions, **_: [0.0] * 4}
    trainers = {
        "grpo": GRPOTrainer(str(folder), args=GRPOConfig(**settings, beta=0.07, epsilon_high=0.2), **parts),
        "rloo": RLOOTrainer(str(folder), args=RLOOConfig(**settings, beta=0.07), **parts),
    }
    return folder, trainers


def trl_case(folder, trainer):
    """Four completions of one prompt, log-probabilities of an older policy and of a reference, in float64."""
    theirs, ours = trainer.model.double().eval(), CausalLM.from_pretrained(folder).double()
    theirs.zero_grad()
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(20, 200, (1, 5), generator=generator).repeat(4, 1)
    completion = torch.randint(20, 200, (4, 6), generator=generator)
    lengths = [6, 3, 5, 2]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    rows = lay_out(prompt.tolist(), [row[:n].tolist() for row, n in zip(completion, lengths, strict=True)], pad_id=0)
    log_probs = response_log_probs(ours, rows)
    old, ref = (
        (log_probs + 0.3 * torch.randn(log_probs.shape, generator=generator, **DOUBLE)).detach() * rows.mask
        for _ in range(2)
    )
    rewards = torch.tensor([[1.0, 0.0, 0.3, 0.9]], **DOUBLE)
    rollouts = Rollouts(rows, rewards, old, ref)
    inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion}
    inputs |= {"completion_mask": mask.long(), "num_items_in_batch": mask.sum()}
    part = slice(4, 10)  # the targets that are completion tokens
    inputs |= {"old_per_token_logps": old[:, part], "ref_per_token_logps": ref[:, part], "old_logps": old.sum(dim=1)}
    return ours, theirs, log_probs, rollouts, inputs


def compare(parity, name: str, oracle: str, got, wanted, ours, theirs) -> None:
    parity(name, oracle, "output", got, wanted, 1e-6)
    got.backward()
    wanted.backward()
    pairs = {
        "token_emb.weight": theirs.model.embed_tokens.weight,
        "blocks.1.ffn.down_proj.weight": theirs.model.layers[1].mlp.down_proj.weight,
    }
    found = dict(ours.named_parameters())
    assert all(weight.grad.abs().max() > 1e-3 for weight in pairs.values())
    gradients = {key: found[key].grad for key in pairs}
    # transformers' rotary table is float32 whatever the weights are
    parity(name, oracle, "gradient", gradients, {key: weight.grad for key, weight in pairs.items()}, 1e-5)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(
    ("loss_type", "loss"), [("grpo", grpo_loss), ("dr_grpo", dr_grpo_loss), ("dapo", dapo_loss), ("bnpo", dapo_loss)]
)
def test_grpo_and_its_kin_equal_trl(loss_type, loss, corrected, trl_parts, parity) -> None:
    """Every default that matters is set: loss_type, beta, epsilons, and the correction of k3 by the ratio."""
    folder, trainers = trl_parts
    trainer = trainers["grpo"]
    ours, theirs, log_probs, rollouts, inputs = trl_case(folder, trainer)
    trainer.loss_type, trainer.args.use_bias_correction_kl = loss_type, corrected
    advantage = group_centred if loss_type == "dr_grpo" else group_normalised
    wanted = trainer._compute_loss(theirs, inputs | {"advantages": advantage(rollouts.rewards).flatten()})
    config = PolicyConfig(kl_coef=0.07, clip_eps=0.2, max_new_tokens=9, correct_kl=corrected)
    got = loss(log_probs, rollouts, config)
    compare(parity, loss.__name__, f"trl GRPOTrainer({loss_type})", got, wanted, ours, theirs)


def test_rloo_equals_trl(trl_parts, parity) -> None:
    """One ratio for each response; here most of them are outside the clip. TRL's KL is in the reward, as ours."""
    folder, trainers = trl_parts
    ours, theirs, log_probs, rollouts, inputs = trl_case(folder, trainers["rloo"])
    near = rollouts.old_log_probs.clone()
    near[0] = log_probs[0].detach() - 0.02 * rollouts.mask[0]  # one inside, whose gradient is not 0
    rollouts, inputs = rollouts._replace(old_log_probs=near), inputs | {"old_logps": near.sum(dim=1)}
    advantages = leave_one_out(rollouts.penalised(0.07)).flatten()
    wanted = trainers["rloo"]._compute_loss(theirs, inputs | {"advantages": advantages})
    got = rloo_loss(log_probs, rollouts, PolicyConfig(kl_coef=0.07))
    compare(parity, "rloo_loss", "trl RLOOTrainer", got, wanted, ours, theirs)


# The other losses


def test_reinforce_without_a_penalty_is_reward_times_log_probability() -> None:
    log_probs, rollouts = random_rollouts()
    reinforce_loss(log_probs, rollouts, PolicyConfig(kl_coef=0.0)).backward()
    wanted = -rollouts.rewards.reshape(-1, 1) / 6 * rollouts.mask
    torch.testing.assert_close(log_probs.grad, wanted)
    (priced,) = torch.autograd.grad(reinforce_loss(log_probs, rollouts, PolicyConfig(kl_coef=0.3)), log_probs)
    distance = ((rollouts.old_log_probs - rollouts.ref_log_probs) * rollouts.mask).sum(dim=1, keepdim=True)
    torch.testing.assert_close(priced, wanted + 0.3 * distance / 6 * rollouts.mask)


def test_rejection_learns_the_accepted_responses_alone() -> None:
    log_probs, rollouts = random_rollouts()
    rewards = torch.tensor([[1.0, 0.0, 0.99], [0.0, 1.0, 0.5]], **DOUBLE)
    loss = rejection_loss(log_probs, rollouts._replace(rewards=rewards), PolicyConfig())
    loss.backward()
    accepted = torch.tensor([0, 4])
    counted = rollouts.mask[accepted]
    assert loss.item() == pytest.approx((-log_probs[accepted] * counted).sum().item() / counted.sum().item())
    assert (log_probs.grad[[1, 2, 3, 5]] == 0).all()
    assert rejection_loss(log_probs, rollouts._replace(rewards=0 * rewards), PolicyConfig()).item() == 0


def test_pairs_are_the_best_and_the_worst_rollout_of_a_prompt() -> None:
    log_probs, rollouts = random_rollouts()
    rewards = torch.tensor([[0.5, 0.1, 0.9], [0.4, 0.4, 0.4]], **DOUBLE)
    rollouts = rollouts._replace(rewards=rewards)
    pairs, differ = best_and_worst(log_probs, rollouts)
    assert differ.tolist() == [True, False]
    assert pairs.chosen[0].item() == pytest.approx(log_probs[2].sum().item())
    assert pairs.ref_rejected[0].item() == pytest.approx(rollouts.ref_log_probs[1].sum().item())
    loss = pair_loss(log_probs, rollouts, PolicyConfig(dpo_beta=0.7))
    assert loss.item() == pytest.approx(dpo_loss(pairs, 0.7)[0].item())  # of the one prompt that has a pair
    loss.backward()
    assert (log_probs.grad[3:] == 0).all() and log_probs.grad[:3].abs().sum() > 0


# The loop


class Asked(NamedTuple):
    prompt: list[int]
    wanted: int


def tiny_task() -> RewardTask:
    """1 if the response begins with the prompt's last id, else 0."""

    def draw(n: int, step: int) -> list[Asked]:
        return [Asked([2, 4 + (step + index) % 3], 4 + (step + index) % 3) for index in range(n)]

    def reward(questions: list[Asked], responses: list[list[int]]) -> list[float]:
        pairs = zip(questions, responses, strict=True)
        return [float(response[0] == question.wanted) for question, response in pairs]

    return RewardTask(draw, reward, end_id=1)


def tiny_model(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_ff": 24, "max_seq_len": 16}
    return CausalLM(ModelConfig(8, bos_id=2, eos_id=3, more_eos_ids=(1,), **sizes)).eval()


TINY = PolicyConfig(n_prompts=6, n_rollouts=6, max_new_tokens=3, learning_rate=2e-2, kl_coef=0.01, max_steps=14)


@pytest.mark.parametrize("method", POLICY_LOSSES)
def test_every_method_improves_a_tiny_policy(method) -> None:
    """From the chance of 1/8 to far above it; offline methods are judged by what they sample afterwards."""
    model = tiny_model()
    reference = copy.deepcopy(model)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    config = replace(TINY, method=method, n_epochs=2 if method == "ppo" else 1)
    rows = improve(model, reference, tiny_task(), config, seed=0)
    final, row = roll_out(
        model, reference, tiny_task(), replace(config, method="grpo", n_prompts=30), 99, torch.Generator()
    )
    assert len(rows) == 14 and rows[-1]["step"] == 14
    assert row["reward"] > 0.5 and row["kl"] > 0.2
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_a_run_is_a_function_of_its_seed() -> None:
    logs = []
    for seed in (0, 0, 1):
        model = tiny_model()
        rows = improve(model, copy.deepcopy(model), tiny_task(), replace(TINY, max_steps=3), seed)
        logs.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert logs[0] == logs[1] != logs[2]


def test_evaluation_joins_the_log_and_a_budget_ends_the_run() -> None:
    model = tiny_model()
    config = replace(TINY, max_steps=10_000, budget=0.2, log_every=10_000)
    rows = improve(model, copy.deepcopy(model), tiny_task(), config, 0, evaluate=lambda _: {"held_out": 0.5})
    assert 1 <= len(rows) <= 7 and rows[-1]["seconds"] >= 0.2
    assert all(row["held_out"] == 0.5 for row in rows)


def test_the_log_has_a_row_when_one_is_due_and_five_exams_on_the_way() -> None:
    model, config = tiny_model(), replace(TINY, max_steps=12, log_every=5, n_prompts=2, n_rollouts=2)
    rows = improve(model, copy.deepcopy(model), tiny_task(), config, 0, evaluate=lambda _: {"held_out": 0.5})
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "held_out" in row] == [2, 4, 6, 8, 10, 12]
    again = tiny_model()
    improve(again, copy.deepcopy(again), tiny_task(), replace(config, max_steps=1, n_epochs=3), 0)
    once = tiny_model()
    improve(once, copy.deepcopy(once), tiny_task(), replace(config, max_steps=1), 0)
    assert not torch.equal(again.token_emb.weight, once.token_emb.weight)


def test_what_is_offline_is_sampled_from_the_reference_and_all_else_from_the_policy() -> None:
    """Without dropout, also where the policy was left in training."""
    model, reference, task = tiny_model(), tiny_model(1), tiny_task()
    torch.nn.init.normal_(model.token_emb.weight, std=0.5)

    def rolled(model: CausalLM, method: str) -> torch.Tensor:
        config = replace(TINY, method=method)
        return roll_out(model, reference, task, config, 0, torch.Generator().manual_seed(5))[0].rows.token_ids

    sampled = {"policy": rolled(model.train(), "grpo"), "reference": rolled(reference, "grpo")}
    assert not model.training and not torch.equal(sampled["policy"], sampled["reference"])
    for method in POLICY_LOSSES:
        who = "reference" if method in ("rejection", "dpo") else "policy"
        assert torch.equal(rolled(model, method), sampled[who]), method


def test_the_numbers_of_the_log_are_those_of_the_rollouts() -> None:
    model = tiny_model()
    rollouts, row = roll_out(model, tiny_model(1), tiny_task(), TINY, 0, torch.Generator().manual_seed(0))
    chances = model(rollouts.rows.token_ids[:, :-1]).softmax(dim=-1)
    entropy = torch.special.entr(chances).sum(dim=-1)[rollouts.mask].mean()
    assert row["entropy"] == pytest.approx(entropy.item(), abs=1e-6)
    assert row["reward"] == pytest.approx(rollouts.rewards.mean().item())
    mixed = [0 < sum(group) < len(group) for group in rollouts.rewards.tolist()]  # rewards are 0 and 1
    assert row["mixed"] == sum(mixed) / len(mixed) and 0 < sum(mixed) < len(mixed)


# The value model, and single steps


def test_a_value_is_of_the_text_before_its_token_and_the_policy_is_no_part_of_the_critic() -> None:
    model = tiny_model()
    critic = Critic(model, replace(TINY, learning_rate=1e-4))
    torch.nn.init.normal_(critic.model.head.weight)
    rows = lay_out([[2, 4], [2]], [[5, 6, 1], [7, 1]], pad_id=0)
    values = critic.values(rows)
    for row, texts in enumerate(([[2, 4], [2, 4, 5], [2, 4, 5, 6]], [[2], [2, 7]])):
        wanted = torch.cat([critic.model(torch.tensor([text]))[0, -1:] for text in texts])
        torch.testing.assert_close(values[row][rows.mask[row]], wanted)
    assert (values[~rows.mask] == 0).all()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rollouts = Rollouts(rows, torch.ones(2, 1), values.detach(), values.detach(), values.detach())
    critic.learn(rollouts, torch.ones_like(values))
    assert ((critic.values(rows) - 1).square() * rows.mask).sum() < ((values - 1).square() * rows.mask).sum()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_critic_learns_the_reward_to_come(monkeypatch) -> None:
    """With lambda 1 and no penalty a return is the reward of the whole response, at each of its tokens."""
    seen = []
    monkeypatch.setattr(Critic, "learn", lambda critic, rollouts, returns: seen.append((rollouts, returns)))
    monkeypatch.setattr(torch.nn.init, "zeros_", torch.nn.init.normal_)  # values that are not 0 at the start
    model, config = tiny_model(), replace(TINY, method="ppo", kl_coef=0.0, gae_lambda=1.0, max_steps=1)
    improve(model, copy.deepcopy(model), tiny_task(), config, 0)
    ((rollouts, returns),) = seen
    assert rollouts.values.abs().max() > 0.1
    torch.testing.assert_close(returns, rollouts.rewards.reshape(-1, 1) * rollouts.mask, atol=1e-5, rtol=1e-5)


def test_a_step_is_clipped_starts_afresh_and_does_nothing_where_nothing_is_said() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.zero_()
    descent = torch.optim.SGD(layer.parameters(), 1.0)
    for n in (1, 2):  # gradient (3, 4), of norm 5, cut to 2
        assert take_step(layer, descent, layer(torch.tensor([3.0, 4.0])).sum(), 2.0) == pytest.approx(5)
        torch.testing.assert_close(layer.weight.data, -n * torch.tensor([[1.2, 1.6]]))
    adam = torch.optim.Adam(layer.parameters(), 0.1)
    take_step(layer, adam, layer(torch.ones(2)).sum(), 1.0)
    before = layer.weight.detach().clone()
    assert take_step(layer, adam, 0 * layer(torch.ones(2)).sum(), 1.0) == 0
    assert take_step(layer, adam, torch.tensor(1.0), 1.0) == 0
    assert torch.equal(layer.weight, before)


def test_a_response_stops_at_either_end() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    responses = sample_responses(model, [[2, 4]] * 60, 1, SamplingConfig(3), generator)
    assert {len(response) for response in responses} == {1, 2, 3}
    assert all(token not in (1, 3) for response in responses for token in response[:-1])
    assert {response[-1] for response in responses if len(response) < 3} == {1, 3}


def test_old_log_probabilities_are_those_of_the_policy_that_sampled(checked_shapes) -> None:
    model = tiny_model()
    with checked_shapes(policy_gradients) as checked:
        rollouts, row = roll_out(model, tiny_model(1), tiny_task(), TINY, 0, torch.Generator().manual_seed(0))
    assert checked
    assert not rollouts.old_log_probs.requires_grad
    torch.testing.assert_close(response_log_probs(model, rollouts.rows), rollouts.old_log_probs)
    assert row["length"] == pytest.approx(rollouts.mask.sum().item() / len(rollouts.mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "grp"}, "unknown method 'grp'"),
        ({"n_rollouts": 0}, "n_rollouts must be finite and >= 1, got 0"),
        ({"clip_eps": 1.0}, "clip_eps must be finite and > 0 and < 1, got 1.0"),
        ({"gae_lambda": 1.5}, "gae_lambda must be finite and >= 0 and <= 1, got 1.5"),
        ({"kl_coef": math.nan}, "kl_coef must be finite and >= 0, got nan"),
        ({"dpo_beta": 0.0}, "dpo_beta must be finite and > 0, got 0.0"),
    ],
)
def test_bad_settings_are_refused_with_value_and_limit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**change)
