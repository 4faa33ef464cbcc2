"""Topic 11 - Preference losses: a reward model, and the losses that train a policy on pairs without one.

    rows = lay_out(prompts, answers, pad_id)             # Responses(token_ids, mask): the answer is counted, no more
    log_probs = response_log_probs(model, rows)          # (batch, seq), 0 wherever nothing is counted
    loss = dpo_loss(score_pairs(model, reference, chosen, rejected), dpo_beta=0.1).mean()

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py preference  # what each loss makes of pairs
python 11-fine-tuning-adaptation/fine_tuning_adaptation.py exact  # where each loss ends, computed exactly

Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155), section 3.5; Rafailov et al. 2023 (DPO, arXiv
2305.18290); Azar et al. 2023 (IPO, arXiv 2310.12036); Ethayarajh et al. 2024 (KTO, arXiv 2402.01306); Meng et al. 2024
(SimPO, arXiv 2405.14734); Hong et al. 2024 (ORPO, arXiv 2403.07691).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modern_llm_architectures import CausalLM

# Responses: which tokens a log-probability is about


class Responses(NamedTuple):
    """Prompts with their responses, padded on the right.

    Shapes: token_ids (batch, seq_and_one); mask (batch, seq), bool, about the targets token_ids[:, 1:]: True at the
    tokens of the response, its end included, and nowhere else.
    """

    token_ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Counted tokens of each row: (batch)."""
        return self.mask.sum(dim=1)

    def to(self, device: torch.device) -> "Responses":
        return Responses(self.token_ids.to(device), self.mask.to(device))


def lay_out(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> Responses:
    """Rows of prompt and response ids, side by side; a response holds its end token if it has ended.

    Raises ValueError for a row without a prompt or without a response, whose log-probability would be that of nothing.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give one response for each prompt")
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            empty = "response" if prompt else "prompt"
            raise ValueError(f"row {row} has an empty {empty}; every row needs at least one token of each")
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    token_ids = torch.full((len(prompts), width), pad_id)  # (batch, seq_and_one)
    mask = torch.zeros(len(prompts), width - 1, dtype=torch.bool)  # (batch, seq)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([*prompt, *response])
        if ids.is_floating_point():
            raise ValueError(f"row {row} holds ids that are no whole numbers")
        token_ids[row, : len(prompt) + len(response)] = ids
        mask[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return Responses(token_ids, mask)


def response_log_probs(model: CausalLM, rows: Responses) -> Tensor:
    """log p(token | all before it) at the counted tokens, 0 elsewhere: (batch, seq), nats.

    Only the counted positions get logits: with a long prompt the vocabulary is most of the work.
    """
    log_probs, _ = response_scores(model, rows)
    return log_probs  # (batch, seq)


def response_scores(model: CausalLM, rows: Responses, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """As `response_log_probs`, and on request the entropy of the distribution at each counted token (batch, seq)."""
    hidden = model.hidden(rows.token_ids[:, :-1])  # (batch, seq, d_model)
    full = model.logits(hidden[rows.mask]).log_softmax(dim=-1)  # (counted, vocab)
    chosen = full.gather(1, rows.token_ids[:, 1:][rows.mask][:, None])[:, 0]  # (counted)
    log_probs = chosen.new_zeros(rows.mask.shape).masked_scatter(rows.mask, chosen)  # (batch, seq)
    if not with_entropy:
        return log_probs, None
    entropy = -(full.exp() * full).sum(dim=-1)  # (counted)
    return log_probs, entropy.new_zeros(rows.mask.shape).masked_scatter(rows.mask, entropy)


def sequence_log_probs(model: CausalLM, rows: Responses) -> Tensor:
    """log p(response | prompt) of each row: (batch), nats. A sum over tokens, as every derivation here needs it."""
    return response_log_probs(model, rows).sum(dim=1)  # (batch)


# A reward model: a language model with a number in place of the vocabulary


class ScalarModel(nn.Module):
    """The stream of a language model, and a linear map from it to one number (Stiennon et al. 2020, section 3.4).

    Read at the last token it is a reward model; read at every token it is the value model of PPO. `trunk` is trained
    along: give it a copy. Shapes: token_ids (batch, seq) to (batch, seq).
    """

    def __init__(self, trunk: CausalLM) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(trunk.config.d_model, 1, bias=False)
        nn.init.zeros_(self.head.weight)  # every response starts with the same reward: the loss starts at log 2
        self.head.to(trunk.final_norm.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.head(self.trunk.hidden(token_ids))[..., 0]  # (batch, seq)


def response_rewards(model: ScalarModel, rows: Responses) -> Tensor:
    """The number that the model has at the last counted token of each row: (batch)."""
    positions = torch.arange(1, rows.token_ids.shape[1], device=rows.mask.device)  # (seq)
    last = (rows.mask * positions).amax(dim=1)  # (batch)
    values = model(rows.token_ids)  # (batch, seq_and_one)
    return values.gather(1, last[:, None])[:, 0]  # (batch)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log P(chosen beats rejected) of each pair, by Bradley and Terry: P = sigmoid(difference of rewards). (batch).

    With a margin the chosen one has to win by so much (Touvron et al. 2023, section 3.2.2).
    """
    return -F.logsigmoid(chosen - rejected - margin)  # (batch)


# Pairs


class Pairs(NamedTuple):
    """Log-probabilities of chosen and rejected responses, each (batch), by the policy and by the reference.

    n_chosen and n_rejected are the numbers of tokens that they are sums over.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """How much further than the reference the policy prefers the chosen response: (batch), nats."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    def per_token(self) -> "Pairs":
        """Means over tokens in place of sums. No longer log-probabilities: see SimPO, and IPO as TRL computes it."""
        chosen, rejected = (self.chosen, self.ref_chosen), (self.rejected, self.ref_rejected)
        (chosen, ref_chosen), (rejected, ref_rejected) = (
            [value / count.clamp(min=1) for value in values]
            for values, count in ((chosen, self.n_chosen), (rejected, self.n_rejected))
        )
        return Pairs(chosen, rejected, ref_chosen, ref_rejected, self.n_chosen, self.n_rejected)


def score_pairs(model: CausalLM, reference: CausalLM, chosen: Responses, rejected: Responses) -> Pairs:
    """The log-probabilities of pairs. No gradient goes through the reference.

    Raises ValueError for a pair whose two responses are the same: no loss can tell them apart.
    """
    check_pairs(chosen, rejected)
    with torch.no_grad():
        ref_chosen, ref_rejected = (sequence_log_probs(reference, rows) for rows in (chosen, rejected))
    ours = (sequence_log_probs(model, rows) for rows in (chosen, rejected))
    return Pairs(*ours, ref_chosen, ref_rejected, chosen.lengths, rejected.lengths)


def check_pairs(chosen: Responses, rejected: Responses) -> None:
    def text(rows: Responses, row: int) -> list[int]:
        return rows.token_ids[row, 1:][rows.mask[row]].tolist()

    for row in range(len(chosen.token_ids)):
        if text(chosen, row) == text(rejected, row):
            raise ValueError(f"pair {row}: chosen and rejected are the same response; leave such pairs out")


def check_beta(dpo_beta: float) -> None:
    if not dpo_beta > 0:
        raise ValueError(f"dpo_beta must be > 0, got {dpo_beta}; it is the weight of the distance to the reference")


# The losses: each (batch); they differ in what the margin is and in what is done with it


def dpo_loss(pairs: Pairs, dpo_beta: float) -> Tensor:
    """-log sigmoid(beta * margin): Bradley and Terry with beta log(policy / reference) for a reward (DPO, eq. 7)."""
    check_beta(dpo_beta)
    return -F.logsigmoid(dpo_beta * pairs.margin)  # (batch)


def ipo_loss(pairs: Pairs, dpo_beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2: a margin to be reached, not to be exceeded (IPO, eq. 17, where beta is tau).

    `ipo_loss(pairs.per_token(), ...)` is what TRL computes.
    """
    check_beta(dpo_beta)
    return (pairs.margin - 1 / (2 * dpo_beta)).square()  # (batch)


def simpo_loss(pairs: Pairs, dpo_beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * difference of the means per token - gamma): no reference (SimPO, eq. 6). (batch)."""
    check_beta(dpo_beta)
    means = pairs.per_token()
    return -F.logsigmoid(dpo_beta * (means.chosen - means.rejected) - gamma)  # (batch)


def orpo_loss(pairs: Pairs, orpo_weight: float) -> Tensor:
    """Nats per token of the chosen response, and weight * -log sigmoid(log of the ratio of the odds) (ORPO, eq. 6).

    Without a reference: the first term is ordinary fine-tuning. The odds are those of the mean per token.
    """
    means = pairs.per_token()
    below_0 = -torch.finfo(means.chosen.dtype).tiny  # p = 1 has infinite odds, and two of them no ratio
    values = [value.clamp(max=below_0) for value in (means.chosen, means.rejected)]
    odds = [value - torch.log(-torch.expm1(value)) for value in values]  # exact near p = 1 too
    return -means.chosen - orpo_weight * F.logsigmoid(odds[0] - odds[1])  # (batch)


def kto_loss(log_ratios: Tensor, desirable: Tensor, kl: Tensor, dpo_beta: float) -> Tensor:
    """1 - sigmoid(+-beta * (log ratio - kl)): single responses, each good or bad, no pairs (KTO, eq. 8). (batch).

    log_ratios: log(policy / reference) of each response; desirable: bool; kl: a typical log ratio, see `kto_kl`.
    """
    check_beta(dpo_beta)
    sign = torch.where(desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * dpo_beta * (log_ratios - kl))  # (batch)


def kto_kl(mismatched_log_ratios: Tensor) -> Tensor:
    """KTO's reference point: mean log ratio of responses to other rows' prompts, at least 0; without gradient."""
    return mismatched_log_ratios.mean().clamp(min=0).detach()
