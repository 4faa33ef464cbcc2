"""Topic 11 - Preference failures: bugs of preference learning and policy gradients that run without a complaint.

Each entry of PREFERENCE_BREAKS is name -> (function(run), seconds); the function returns rows (what is measured, as
it should be, with the failure); CAUGHT_BY names the test that the same slip in the library would not pass.

    python 11-fine-tuning-adaptation/fine_tuning_adaptation.py --break dpo-without-reference
    python 11-fine-tuning-adaptation/fine_tuning_adaptation.py --break old-policy-recomputed

All but two are measured on the enumerated bed of `exact_policies`, where the damage is known exactly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exact_policies import (
    END,
    ExactBed,
    Setting,
    distance,
    fit_pairs,
    judge,
    judged,
    nearby,
    pair_chances,
)
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from policy_gradients import (
    PolicyConfig,
    Rollouts,
    clipped,
    group_normalised,
    leave_one_out,
    reinforce_loss,
    rloo_loss,
    summed,
)
from preference_losses import Pairs, Responses, dpo_loss, lay_out, sequence_log_probs, simpo_loss
from workbench import Column, RunConfig, seed_everything

Row = tuple[str, float, float]  # what is measured, as it should be, with the failure
BETA = 0.3
PLAIN = PolicyConfig(kl_coef=0.0, max_new_tokens=5)


def angle(bed: ExactBed, policy: Tensor, loss: Callable, truth: Tensor, run: RunConfig, kl_coef: float = 0.0) -> float:
    """Degrees between the mean gradient of a loss, over 6,000 sampled batches, and the truth."""
    setting = Setting(bed.correct, replace(PLAIN, kl_coef=kl_coef), 4, 6000, run.seed)
    return judge(bed.estimates(policy, loss, setting), truth).angle


# Preferences


def dpo_without_reference(run: RunConfig) -> list[Row]:
    """The margin is log p(chosen) - log p(rejected): what the reference knew of the language is not kept."""
    bed = ExactBed(max_len=3, seed=run.seed)
    weights = judged(bed, bed.reference, pair_chances(bed.worth))
    wanted, _ = bed.optimum(bed.worth, BETA)

    def blind(pairs: Pairs) -> Tensor:
        return dpo_loss(pairs._replace(ref_chosen=0 * pairs.ref_chosen, ref_rejected=0 * pairs.ref_rejected), BETA)

    sound, wrong = (bed.log_probs(fit_pairs(bed, weights, loss)) for loss in (lambda p: dpo_loss(p, BETA), blind))
    ref = bed.log_probs(bed.reference)
    return [
        ("KL to the closed form, nats", distance(bed, sound, wanted), distance(bed, wrong, wanted)),
        ("KL to the reference, nats", distance(bed, sound, ref), distance(bed, wrong, ref)),
    ]


def small_model(run: RunConfig) -> CausalLM:
    seed_everything(run.seed)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ff": 40, "max_seq_len": 32}
    model = CausalLM(ModelConfig(31, pad_id=0, bos_id=2, eos_id=1, **sizes)).double().eval()
    with torch.no_grad():
        model.token_emb.weight.mul_(20)  # opinions in place of an even distribution
    return model


@torch.no_grad()
def summed_over_vocabulary(run: RunConfig) -> list[Row]:
    """The log-softmax is added up whole, in place of the entry of the token that was written."""
    model = small_model(run)
    every = [[first, second] for first in range(31) for second in range(31)]
    rows = lay_out([[5, 6, 7]] * len(every), every, pad_id=0)
    full = model(rows.token_ids[:, :-1]).log_softmax(dim=-1)  # (batch, seq, vocab)
    wrong = (full.sum(dim=-1) * rows.mask).sum(dim=1)  # (batch)
    sound = sequence_log_probs(model, rows)
    return [
        ("probability of all responses of two tokens together", sound.exp().sum().item(), wrong.exp().sum().item()),
        (
            "log p of the likeliest minus that of the rarest, nats",
            *((x.max() - x.min()).item() for x in (sound, wrong)),
        ),
    ]


@torch.no_grad()
def prompt_counted(run: RunConfig) -> list[Row]:
    """The prompt's tokens are counted too: they cancel in DPO's difference of sums, not in one of means."""
    model, reference = small_model(run), small_model(replace(run, seed=run.seed + 1))
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    chosen, rejected = lay_out(prompts, [[14, 15, 1], [16, 1]], 0), lay_out(prompts, [[21, 1], [22, 23, 24, 25, 1]], 0)

    def pairs(with_prompt: bool) -> Pairs:
        sides = []
        for rows in (chosen, rejected):
            everything = (
                torch.arange(rows.mask.shape[1])
                < (rows.mask * torch.arange(1, rows.mask.shape[1] + 1)).amax(1)[:, None]
            )
            sides.append(Responses(rows.token_ids, everything) if with_prompt else rows)
        values = [sequence_log_probs(who, side) for who in (model, reference) for side in sides]
        return Pairs(*values, sides[0].lengths, sides[1].lengths)

    both = [pairs(False), pairs(True)]
    return [
        ("DPO loss", *(dpo_loss(p, BETA).mean().item() for p in both)),
        ("SimPO loss", *(simpo_loss(p, 2.0, 0.5).mean().item() for p in both)),
        ("log(policy / reference) of a single response, for KTO", *((p.chosen - p.ref_chosen)[0].item() for p in both)),
    ]


# Policy gradients


def whitened_across_prompts(run: RunConfig) -> list[Row]:
    """Rewards are centred over the whole batch: an easy prompt is praised for being easy, whatever was written."""

    def over_batch(rewards: Tensor) -> Tensor:
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    alike = torch.tensor([[1.0] * 4, [0.0] * 4])
    half = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4])
    return [
        (
            "largest advantage where all rollouts of a prompt are alike",
            *(a(alike).abs().max().item() for a in (group_normalised, over_batch)),
        ),
        (
            "advantage of the wrong answers to a prompt that is never solved",
            *(a(half)[1, 0].item() for a in (group_normalised, over_batch)),
        ),
    ]


def advantage_with_gradient(run: RunConfig) -> list[Row]:
    """The penalty inside the advantage is differentiated too, as if it were a loss."""
    bed = ExactBed(seed=run.seed)
    policy = nearby(bed, 0.5)
    truth = bed.gradient(policy, bed.correct, BETA)

    def attached(log_probs: Tensor, rollouts: Rollouts, config: PolicyConfig) -> Tensor:
        return reinforce_loss(log_probs, rollouts._replace(old_log_probs=log_probs), config)

    turned = [angle(bed, policy, loss, truth, run, BETA) for loss in (reinforce_loss, attached)]
    return [("angle to the true gradient, degrees", *turned)]


def old_policy_recomputed(run: RunConfig) -> list[Row]:
    """The old log-probabilities are those of the current weights: the ratio is always 1, and nothing is clipped."""
    bed = ExactBed(seed=run.seed)
    far, reward = [], []
    for broken in (False, True):
        generator = torch.Generator().manual_seed(run.seed)
        start = bed.reference
        picked = bed.sample(start, (1, 16), generator)[0]  # (prompts, rollouts)
        prompts = torch.arange(bed.n_prompts)[:, None]
        rewards = bed.correct[prompts, picked]
        rows = Responses(torch.zeros(0), bed.mask[picked].flatten(0, 1))
        old = bed.token_log_probs(start)[prompts, picked].flatten(0, 1)
        logits = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(60):
            ours = bed.token_log_probs(logits)[prompts, picked].flatten(0, 1)
            ratio = (ours - (ours.detach() if broken else old)).exp()
            loss = summed(clipped(ratio, leave_one_out(rewards).reshape(-1, 1), 0.2), rows.mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        far.append(bed.kl(logits.detach(), start).item())
        reward.append(bed.expected(logits.detach(), bed.correct).item())
    return [
        ("KL to the policy that sampled, after 60 steps on one batch, nats", *far),
        ("true reward after them", *reward),
    ]


def kl_with_wrong_sign(run: RunConfig) -> list[Row]:
    """The penalty is log(reference / policy): the further away, the better paid."""
    bed = ExactBed(seed=run.seed)
    far, reward = [], []
    for sign in (1.0, -1.0):
        logits = bed.reference.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            (-bed.objective(logits, bed.worth, sign * BETA)).backward()
            optimizer.step()
        far.append(bed.kl(logits.detach(), bed.reference).item())
        reward.append(bed.expected(logits.detach(), bed.worth).item())
    return [("KL to the reference after 100 exact steps, nats", *far), ("true reward after them", *reward)]


def end_not_counted(run: RunConfig) -> list[Row]:
    """The end token is masked like padding: no reward ever teaches the policy when to stop."""
    bed = ExactBed(seed=run.seed)
    policy = nearby(bed, 0.5)
    truth = bed.gradient(policy, bed.correct)

    class WithoutEnd(ExactBed):
        def __init__(self) -> None:
            super().__init__(seed=run.seed)
            self.mask = self.mask & (self.responses != END)

        def sample(self, *args) -> Tensor:
            return bed.sample(*args)  # the text is written as before; only the loss does not see its end

    ends = (truth[..., END].norm() / truth.norm()).item()
    turned = [angle(kind, policy, rloo_loss, truth, run) for kind in (bed, WithoutEnd())]
    return [
        ("angle to the true gradient, degrees", *turned),
        ("share of the gradient's length that is about the end token", ends, 0.0),
    ]


PREFERENCE_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {  # name -> function, seconds
    "dpo-without-reference": (dpo_without_reference, 10),
    "summed-over-vocabulary": (summed_over_vocabulary, 2),
    "prompt-counted": (prompt_counted, 2),
    "whitened-across-prompts": (whitened_across_prompts, 5),
    "advantage-with-gradient": (advantage_with_gradient, 5),
    "old-policy-recomputed": (old_policy_recomputed, 3),
    "kl-wrong-sign": (kl_with_wrong_sign, 3),
    "end-not-counted": (end_not_counted, 5),
}
CAUGHT_BY = {  # the test that a change of the library's code into the failure does not pass
    "dpo-without-reference": ("test_exact_policies.py", "test_dpo_and_ipo_end_where_their_theory_says"),
    "summed-over-vocabulary": ("test_preference_losses.py", "test_the_probabilities_of_all_responses_add_up_to_one"),
    "prompt-counted": ("test_preference_losses.py", "test_a_row_counts_its_response_and_its_end_and_nothing_else"),
    "whitened-across-prompts": (
        "test_policy_gradients.py",
        "test_leave_one_out_is_the_reward_minus_the_mean_of_the_others_exactly",
    ),
    "advantage-with-gradient": (
        "test_policy_gradients.py",
        "test_old_log_probabilities_are_those_of_the_policy_that_sampled",
    ),
    "old-policy-recomputed": ("test_policy_gradients.py", "test_grpo_and_its_kin_equal_trl"),
    "kl-wrong-sign": ("test_policy_gradients.py", "test_the_penalty_of_a_response_is_the_sum_over_its_tokens"),
    "end-not-counted": ("test_preference_losses.py", "test_a_row_counts_its_response_and_its_end_and_nothing_else"),
}


def preference_breaks(config: Any, run: RunConfig) -> None:
    """Every failure of this module, measured: the chapter's table."""
    rows = [[f"`{name}`", *row] for name, (show, _) in PREFERENCE_BREAKS.items() for row in show(run)]
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save("preference-breaks", columns, rows, "preference-breaks", n_seeds=1)
