"""Proofs on the exact bed: what is enumerated is what is sampled, which estimators are biased, and where losses end."""

import math
from dataclasses import replace

import pytest
import torch

import exact_policies
from exact_policies import (
    END,
    ExactBed,
    Setting,
    all_pairs,
    best_baseline,
    bonferroni,
    distance,
    exact_gradient,
    fit_pairs,
    gae_loss,
    grpo_prompt_weight,
    ipo_optimum,
    judge,
    judged,
    judged_sample,
    kl_loss,
    kl_values,
    minimise,
    minus_baseline,
    nearby,
    pair_chances,
    tilted,
)
from policy_gradients import (
    PolicyConfig,
    dr_grpo_loss,
    group_centred,
    group_normalised,
    grpo_loss,
    k1,
    k2,
    k3,
    per_sequence,
    reinforce_loss,
    rloo_loss,
    summed,
)
from preference_losses import dpo_loss, ipo_loss

BED = ExactBed()
POLICY = nearby(BED, 0.5)
PLAIN = PolicyConfig(kl_coef=0.0, max_new_tokens=5)
SETTING = Setting(BED.correct, PLAIN, n_rollouts=3, n_batches=4000)
TRUTH = BED.gradient(POLICY, BED.correct)


# The bed itself


def test_every_response_is_there_once_and_their_probabilities_add_up_to_one(checked_shapes) -> None:
    with checked_shapes(exact_policies) as checked:
        bed = ExactBed(max_len=3)
        log_probs = bed.log_probs(nearby(bed, 1.0))
        bed.values(bed.reference, bed.correct)
    assert checked
    texts = {tuple(row[kept].tolist()) for row, kept in zip(bed.responses, bed.mask, strict=True)}
    assert len(texts) == len(bed.responses) == 1 + 3 + 9 + 27
    assert all(END not in text[:-1] and (text[-1] == END or len(text) == 3) for text in texts)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert len(BED.responses) == 364


def test_rewards_by_hand() -> None:
    place = {tuple(row[kept].tolist()): i for i, (row, kept) in enumerate(zip(BED.responses, BED.mask, strict=True))}
    assert [BED.correct[0, place[text]].item() for text in ((1, END), (2, 1, END), (2, END), (1,) * 5)] == [1, 1, 0, 0]
    assert [BED.worth[1, place[text]].item() for text in ((2, 1, 2, END), (2,) * 4 + (END,), (END,))] == [0.5, 1, 0]


def test_drawing_whole_responses_is_drawing_token_by_token() -> None:
    """Chi-squared over lengths, 6,000 responses drawn one token at a time; 1 in 1,000 would fail by chance."""
    generator, n = torch.Generator().manual_seed(0), 6000
    state = torch.zeros(n, dtype=torch.long)
    follows = torch.full((BED.n_states, 4), -1)
    for i in range(len(BED.responses)):
        for t in range(BED.max_len - 1):
            if BED.mask[i, t + 1]:
                follows[BED.states[i, t], BED.responses[i, t]] = BED.states[i, t + 1]
    lengths, alive = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool)
    for _ in range(BED.max_len):
        token = torch.multinomial(POLICY[0, state].softmax(dim=1), 1, generator=generator)[:, 0]
        lengths += alive
        alive &= token != END
        state = torch.where(alive, follows[state, token].clamp(min=0), state)
    chances = BED.log_probs(POLICY)[0].exp()
    expected = torch.stack([chances[BED.lengths == length].sum() for length in range(1, 6)]) * n
    seen = torch.bincount(lengths, minlength=6)[1:]
    assert ((seen - expected).square() / expected).sum() < 18.47  # 4 degrees of freedom


def test_the_gradient_of_the_objective_is_its_slope() -> None:
    generator = torch.Generator().manual_seed(2)
    way = torch.randn(POLICY.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    for kl_coef in (0.0, 0.3):
        ends = [BED.objective(POLICY + sign * step * way, BED.worth, kl_coef) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - (BED.gradient(POLICY, BED.worth, kl_coef) * way).sum()) < 1e-9


def test_values_are_expected_rewards_of_what_comes_after() -> None:
    values = BED.values(POLICY, BED.worth)
    torch.testing.assert_close(values[:, 0].mean(), BED.expected(POLICY, BED.worth))
    chosen = POLICY.softmax(dim=-1)
    start = [i for i, row in enumerate(BED.responses) if row[0] == 2 and BED.mask[i, 1]]
    ended = next(i for i, row in enumerate(BED.responses) if row[0] == END)
    after = {BED.responses[i, 0].item(): BED.states[i, 1].item() for i in range(364) if BED.mask[i, 1]}
    assert start
    wanted = chosen[:, 0, END] * BED.worth[:, ended]
    wanted = wanted + sum(chosen[:, 0, token] * values[:, state] for token, state in after.items())
    torch.testing.assert_close(values[:, 0], wanted)  # Bellman's equation at the empty response


def test_any_distribution_over_responses_has_logits() -> None:
    wanted = torch.randn(3, 364, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(dim=1)
    torch.testing.assert_close(BED.log_probs(BED.policy_of(wanted)), wanted)


# Estimators of the policy gradient


@pytest.mark.parametrize(
    "name", ["reinforce", "baseline", "rloo", "centred, scaled", "gae 0, true values", "gae 1, wrong values"]
)
def test_unbiased_estimators_agree_with_the_truth(name, parity) -> None:
    values = BED.values(POLICY, BED.correct)
    wrong = torch.full_like(values, 0.3)
    cases = {
        "reinforce": (reinforce_loss, SETTING),
        "baseline": (tilted(minus_baseline(best_baseline(BED, POLICY, BED.correct)), summed), SETTING),
        "rloo": (rloo_loss, SETTING),
        "centred, scaled": (tilted(lambda r: 3 / 2 * group_centred(r), summed), SETTING),
        "gae 0, true values": (gae_loss, replace(SETTING, values=values, config=replace(PLAIN, gae_lambda=0.0))),
        "gae 1, wrong values": (gae_loss, replace(SETTING, values=wrong, config=replace(PLAIN, gae_lambda=1.0))),
    }
    verdict = judge(BED.estimates(POLICY, *cases[name]), TRUTH)
    assert not verdict.biased and verdict.angle < 3
    parity(f"policy gradient: {name}", "exact gradient", "invariant", verdict.scale, 1.0, 4 * verdict.scale_error)


def test_the_test_would_notice_a_bias_of_a_tenth() -> None:
    verdict = judge(BED.estimates(POLICY, tilted(lambda r: 1.1 * 3 / 2 * group_centred(r), summed), SETTING), TRUTH)
    assert verdict.biased


def test_the_biased_ones_are_biased_as_derived() -> None:
    found = {
        name: judge(BED.estimates(POLICY, loss, setting), TRUTH)
        for name, loss, setting in (
            ("centred", tilted(group_centred, summed), SETTING),
            ("dr", dr_grpo_loss, SETTING),
            ("length", tilted(group_centred, per_sequence), SETTING),
            ("grpo", grpo_loss, SETTING),
            (
                "gae 0, wrong values",
                gae_loss,
                replace(SETTING, values=torch.full((3, 121), 0.3).double(), config=replace(PLAIN, gae_lambda=0.0)),
            ),
        )
    }
    assert all(verdict.biased for verdict in found.values())
    assert abs(found["centred"].scale - 2 / 3) < 4 * found["centred"].scale_error  # (n - 1) / n
    assert abs(found["dr"].scale - 2 / 3 / 5) < 4 * found["dr"].scale_error  # and the constant length of 5
    assert found["centred"].angle < 3 and found["dr"].angle < 3  # shorter, not turned
    assert found["length"].angle > 15 and found["grpo"].angle > 15 and found["gae 0, wrong values"].angle > 30


def test_dividing_by_the_deviation_weighs_prompts_by_the_formula() -> None:
    """The mean over all batches, prompt by prompt, is the formula's multiple of that prompt's own gradient."""
    estimates = BED.estimates(POLICY, tilted(lambda r: group_normalised(r, 0.0).nan_to_num(), summed), SETTING)
    chances = (BED.log_probs(POLICY).exp() * BED.correct).sum(dim=1)
    for prompt in range(3):
        own, truth = (part.view(-1, 3, 121 * 4)[:, prompt] for part in (estimates, TRUTH))
        verdict = judge(own, truth)
        assert abs(verdict.scale - grpo_prompt_weight(chances[prompt].item(), 3)) < 4 * verdict.scale_error


def test_a_mean_over_its_own_length_climbs_reward_per_token() -> None:
    """(n - 1) / n times the gradient of E[(r - p) / length], p held fixed."""
    chance = (BED.log_probs(POLICY).exp() * BED.correct).sum(dim=1, keepdim=True)
    climbed = BED.gradient(POLICY, (BED.correct - chance) / BED.lengths)
    verdict = judge(BED.estimates(POLICY, tilted(group_centred, per_sequence), SETTING), 2 / 3 * climbed)
    assert not verdict.biased and verdict.angle < 3


def test_the_prompt_weight_by_hand_and_in_the_limit() -> None:
    """Two rollouts differ with chance 2p(1 - p), and then have advantages of 1/sqrt(2): the weight is 1/sqrt(2)."""
    assert grpo_prompt_weight(0.3, 2) == pytest.approx(math.sqrt(0.5))
    for p in (0.1, 0.5, 0.8):
        assert grpo_prompt_weight(p, 1000) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=1e-2)
    with pytest.raises(ValueError, match="p must lie between 0 and 1, got 1"):
        grpo_prompt_weight(1.0, 4)


def test_baselines_take_noise_away_in_the_order_that_the_formula_says() -> None:
    average = (BED.log_probs(POLICY).exp() * BED.correct).sum(dim=1)
    noise = [
        judge(BED.estimates(POLICY, tilted(minus_baseline(b), summed), SETTING), TRUTH).noise
        for b in (0 * average, average, best_baseline(BED, POLICY, BED.correct), 1 - average)
    ]
    assert noise[2] <= noise[1] * 1.001 < noise[0] and noise[2] < noise[3]


def test_the_best_baseline_by_enumeration() -> None:
    bed = ExactBed(n_prompts=2, max_len=2, n_words=2)
    policy, rewards = nearby(bed, 0.5), bed.worth
    for prompt in range(2):
        slopes = torch.func.jacrev(lambda logits: bed.log_probs(logits)[prompt])(policy).flatten(1)  # noqa: B023
        weights = bed.log_probs(policy)[prompt].exp() * slopes.square().sum(dim=1)
        expected = (weights * rewards[prompt]).sum() / weights.sum()
        assert best_baseline(bed, policy, rewards)[prompt].item() == pytest.approx(expected.item(), abs=1e-12)


def test_batches_are_drawn_from_the_behaviour_and_its_ratio_makes_up_for_it() -> None:
    def weighted(log_probs: torch.Tensor, rollouts, config: PolicyConfig) -> torch.Tensor:
        ratio = ((log_probs - rollouts.old_log_probs) * rollouts.mask).sum(dim=1).exp()
        return -(ratio * rollouts.rewards.flatten()).mean()

    bed = ExactBed(n_prompts=2, max_len=2)
    setting = Setting(bed.correct, PLAIN, n_rollouts=3, n_batches=4000, behaviour=nearby(bed, 0.7))
    truth = bed.gradient(bed.reference, bed.correct)
    assert not judge(bed.estimates(bed.reference, weighted, setting), truth).biased


def test_judge_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    estimates = 0.5 * truth + torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    verdict = judge(estimates, truth)
    assert abs(verdict.scale - 0.5) < 4 * verdict.scale_error and verdict.biased
    assert abs(verdict.noise - math.sqrt(2) / 2.5) < 0.02 and verdict.angle < 1
    assert bonferroni(1, 0.05) == pytest.approx(1.96, abs=1e-3)


# Distance to the reference


def test_values_of_the_kl_estimators_by_enumeration(parity) -> None:
    found, truth = kl_values(BED, POLICY), BED.log_probs(POLICY)[0]
    kl = (truth.exp() * (truth - BED.log_probs(BED.reference)[0])).sum().item()
    for name in ("k1, sequence", "k1, token", "k3, sequence", "k3, token"):
        parity(f"{name}: expectation", "exact KL", "invariant", found[name][0], kl, 1e-10)
    assert abs(found["k2, sequence"][0] - kl) > 1e-3 < abs(found["k2, token"][0] - kl)
    assert found["k3, token"][1] < found["k3, sequence"][1] < found["k1, sequence"][1]


@pytest.mark.parametrize(
    ("estimator", "level", "with_ratio", "direction"),
    [
        (k1, "sequence", False, "none"),
        (k1, "sequence", True, "KL"),
        (k2, "sequence", False, "KL"),
        (k3, "sequence", False, "reversed"),
        (k3, "sequence", True, "KL"),
        (k2, "token", False, "short-sighted"),
        (k3, "token", True, "short-sighted"),
    ],
)
def test_what_differentiating_an_estimate_of_the_kl_gives(estimator, level, with_ratio, direction) -> None:
    """Derived and measured: k1 alone nothing, k2 and corrected k3 the KL's gradient, k3 that of the reversed KL.

    For single tokens the gradient forgets that a token decides which states come later.
    """
    found = BED.estimates(POLICY, kl_loss(estimator, level, with_ratio), replace(SETTING, n_batches=6000))
    forward = exact_gradient(lambda z: BED.kl(z, BED.reference), POLICY)
    reverse = exact_gradient(lambda z: BED.kl(BED.reference, z), POLICY)
    chances = BED.log_probs(POLICY).exp()

    def near(z: torch.Tensor) -> torch.Tensor:  # the KL of each state's next token, at the states that POLICY visits
        table = z.log_softmax(dim=-1)
        per_state = (table.exp() * (table - BED.reference.log_softmax(dim=-1))).sum(dim=-1)
        return (chances[..., None] * per_state[:, BED.states] * BED.mask).sum(dim=(1, 2)).mean()

    truths = {"KL": forward, "reversed": reverse, "short-sighted": exact_gradient(near, POLICY)}
    if direction == "none":
        verdict = judge(found + forward.flatten(), forward)  # mean 0: nothing but the truth is left
        assert not verdict.biased
        return
    for name, truth in truths.items():
        assert judge(found, truth).biased == (name != direction), name


# Where losses end


def test_the_penalised_objective_ends_at_the_closed_form(parity) -> None:
    wanted, log_z = BED.optimum(BED.worth, 0.3)
    policy = BED.policy_of(wanted)
    parity(
        "KL-regularised optimum",
        "beta log Z",
        "invariant",
        BED.objective(policy, BED.worth, 0.3),
        0.3 * log_z.mean(),
        1e-10,
    )
    assert BED.gradient(policy, BED.worth, 0.3).abs().max() < 1e-12
    found = minimise(lambda z: -BED.objective(z, BED.worth, 0.3), BED.reference, 150)
    assert distance(BED, BED.log_probs(found), wanted) < 1e-3


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_dpo_and_ipo_end_where_their_theory_says(name, parity) -> None:
    """The gradient of the loss over all pairs is 0 there, and L-BFGS from the reference arrives there."""
    chances = pair_chances(BED.worth)
    weights = judged(BED, BED.reference, chances)
    if name == "dpo":
        wanted, loss = BED.optimum(BED.worth, 0.3)[0], lambda pairs: dpo_loss(pairs, 0.3)
    else:
        wanted, loss = ipo_optimum(BED, chances, BED.reference, 0.3), lambda pairs: ipo_loss(pairs, 0.3)
    slope = exact_gradient(lambda z: (weights * loss(all_pairs(BED, z))).sum(), BED.policy_of(wanted))
    parity(f"{name}_loss: fixed point", "closed form", "invariant", slope, torch.zeros_like(slope), 1e-10)
    away = exact_gradient(lambda z: (weights * loss(all_pairs(BED, z))).sum(), BED.reference)
    assert away.abs().max() > 1e-4
    bed = ExactBed(max_len=3)
    chances = pair_chances(bed.worth)
    goal = bed.optimum(bed.worth, 0.3)[0] if name == "dpo" else ipo_optimum(bed, chances, bed.reference, 0.3)
    found = fit_pairs(bed, judged(bed, bed.reference, chances), loss)
    assert distance(bed, bed.log_probs(found), goal) < 1e-8


def test_dpo_without_limit_follows_a_judge_who_is_always_sure_and_ipo_does_not() -> None:
    bed = ExactBed(max_len=2)
    chances = pair_chances(1000 * bed.worth)
    weights = judged(bed, bed.reference, chances)
    ends = {
        name: bed.kl(fit_pairs(bed, weights, loss, 300), bed.reference).item()
        for name, loss in (("dpo", lambda p: dpo_loss(p, 0.3)), ("ipo", lambda p: ipo_loss(p, 0.3)))
    }
    limit = distance(bed, ipo_optimum(bed, chances, bed.reference, 0.3), bed.log_probs(bed.reference))
    assert ends["ipo"] == pytest.approx(limit, abs=1e-6) and ends["dpo"] > 2 * ends["ipo"]


def test_drawn_pairs_become_the_exact_weights() -> None:
    bed = ExactBed(max_len=2)
    chances = pair_chances(bed.worth)
    exact, drawn = judged(bed, bed.reference, chances), judged_sample(bed, bed.reference, chances, 40_000, seed=0)
    assert exact.sum().item() == pytest.approx(0.5)  # every pair is met in both orders, and one of them wins
    exact = exact * (1 - torch.eye(len(bed.responses)))
    assert abs(drawn.sum().item() - 1) < 1e-10
    assert (drawn - exact / exact.sum()).abs().max() < 0.005
