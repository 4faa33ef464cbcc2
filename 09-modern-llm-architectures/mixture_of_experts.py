"""Topic 09 - Mixture of experts: routers, capacity, balance with a loss and without one, shared experts.

Shazeer et al. 2017 (arXiv 1701.06538), Fedus et al. 2021 (Switch, arXiv 2101.03961), Jiang et al. 2024 (Mixtral, arXiv
2401.04088), Wang et al. 2024 (balance without a loss, arXiv 2408.15664), DeepSeek-AI 2024 (V3, arXiv 2412.19437).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_layers import SwiGLU

# Routers: which experts each token visits, and how their answers are weighed


class Routing(NamedTuple):
    """What a router decides for every token.

    Shapes: logits (tokens, experts), weights and experts (tokens, active).
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor


def check_experts(n_experts: int, n_active_experts: int) -> None:
    if not 1 <= n_active_experts <= n_experts:
        raise ValueError(f"n_active_experts={n_active_experts} must be in 1..{n_experts}, the number of experts")


class SoftmaxRouter(nn.Module):
    """The `n_active_experts` likeliest experts, weighed by their probabilities divided by the sum of those (Mixtral).

    The same as a softmax over the chosen logits alone. Shapes: x (tokens, d_model) to a Routing.
    """

    def __init__(self, d_model: int, n_experts: int, n_active_experts: int) -> None:
        super().__init__()
        check_experts(n_experts, n_active_experts)
        self.n_experts, self.n_active_experts = n_experts, n_active_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.weight)  # (tokens, experts)
        weights, experts = logits.float().softmax(dim=-1).topk(self.n_active_experts, dim=-1)  # (tokens, active)
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (tokens, active)
        return Routing(logits, weights, experts)


class SwitchRouter(SoftmaxRouter):
    """One expert for each token, its answer multiplied by its probability (Fedus et al. 2021, section 2.1).

    The multiplication is what lets a gradient reach the router: without it, or divided by itself, which gives 1, the
    choice is never trained.
    """

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__(d_model, n_experts, n_active_experts=1)

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.weight)  # (tokens, experts)
        weights, experts = logits.float().softmax(dim=-1).max(dim=-1, keepdim=True)  # (tokens, 1)
        return Routing(logits, weights, experts)


class SigmoidRouter(SoftmaxRouter):
    """DeepSeek-V3's router: sigmoid scores, experts in groups, and a bias that only the choice sees.

    The bias balances the load without a loss term: `update_bias` raises it for experts with too few tokens (Wang et al.
    2024). A token may visit the best `n_active_groups` groups only, a group being as good as the sum of its two best.

    Args:
        n_groups, n_active_groups: 1 and 1 leave all experts open to all tokens
        scale: multiplies the weights, which sum to 1
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_active_experts: int,
        n_groups: int = 1,
        n_active_groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__(d_model, n_experts, n_active_experts)
        if n_groups < 1 or n_experts % n_groups or not 1 <= n_active_groups <= n_groups:
            raise ValueError(f"n_groups={n_groups} must divide n_experts={n_experts} and be >= {n_active_groups=} >= 1")
        if n_active_groups * (n_experts // n_groups) < n_active_experts:
            raise ValueError(f"{n_active_groups} groups hold fewer than n_active_experts={n_active_experts} experts")
        self.n_groups, self.n_active_groups, self.scale = n_groups, n_active_groups, scale
        self.bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False)  # moved by update_bias, not by gradients

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x.float(), self.weight.float())  # (tokens, experts)
        scores = logits.sigmoid()  # (tokens, experts)
        choice = scores + self.bias  # (tokens, experts)
        if self.n_active_groups < self.n_groups:
            grouped = choice.unflatten(-1, (self.n_groups, -1))  # (tokens, groups, members)
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)  # (tokens, groups)
            open_groups = torch.zeros_like(best, dtype=torch.bool)  # (tokens, groups)
            open_groups.scatter_(1, best.topk(self.n_active_groups, dim=-1).indices, True)
            choice = grouped.masked_fill(~open_groups[..., None], -math.inf).flatten(1)  # (tokens, experts)
        experts = choice.topk(self.n_active_experts, dim=-1).indices  # (tokens, active)
        weights = scores.gather(1, experts)  # (tokens, active)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale  # (tokens, active)
        return Routing(logits, weights, experts)

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Raise the bias of experts below the mean load by `rate`, lower the others' (Wang et al. 2024, algorithm 1).

        Shapes: counts (experts), the tokens that each expert got in the last batch.
        """
        if counts.shape != self.bias.shape:
            raise ValueError(
                f"counts have shape {tuple(counts.shape)}, expected one for each of {len(self.bias)} experts"
            )
        self.bias += rate * torch.sign(counts.float().mean() - counts.float())


# Experts


class MixtureOfExperts(nn.Module):
    """Each token is sent to a few of many SwiGLU networks; their answers are added, weighed by the router.

    The cost of a token is that of its active experts. With `capacity_factor` an expert takes at most
    ceil(capacity_factor * tokens * active / experts) visits; later ones are dropped, and the residual carries the token
    on (Fedus et al. 2021, section 2.2). Shared experts see every token.

    Shapes: x (batch, seq, d_model) to the same. After a call, `routing` and `counts` (experts) tell what happened.
    """

    def __init__(
        self,
        router: SoftmaxRouter,
        d_model: int,
        d_ff: int,
        d_shared: int = 0,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be > 0, got {capacity_factor}; None sets no limit")
        self.router, self.capacity_factor = router, capacity_factor
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(router.n_experts))
        self.shared = SwiGLU(d_model, d_shared) if d_shared else None
        self.routing: Routing | None = None
        self.counts = torch.zeros(router.n_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (tokens, d_model)
        self.routing = routing = self.router(tokens)
        mixed = torch.zeros_like(tokens)  # (tokens, d_model)
        counts = torch.bincount(routing.experts.flatten(), minlength=self.router.n_experts)  # (experts)
        self.counts = counts
        visits = routing.experts.flatten().argsort(stable=True)  # (visits): by expert, then in the order of the text
        for expert, chosen in zip(self.experts, visits.split(counts.tolist()), strict=True):
            chosen = chosen[: self.capacity(len(tokens))]
            if len(chosen):
                rows = chosen // self.router.n_active_experts
                weights = routing.weights.flatten()[chosen, None]  # (*, 1)
                answer = expert(tokens[rows]) * weights
                mixed = mixed.index_add(0, rows, answer.to(mixed.dtype))
        mixed = mixed.view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x)

    def __getstate__(self) -> dict:
        """Without the last call's routing, which is part of a graph: such tensors cannot be copied."""
        return self.__dict__ | {"routing": None}

    def capacity(self, n_tokens: int) -> int:
        """The most visits that one expert takes from a batch of `n_tokens`."""
        visits = n_tokens * self.router.n_active_experts
        if self.capacity_factor is None:
            return visits
        return math.ceil(self.capacity_factor * visits / self.router.n_experts)


# Balance


def load_balance_loss(routings: list[Routing], counted: Tensor | None = None) -> Tensor:
    """experts * sum over experts of (share of visits * active) * (mean probability), over all layers at once.

    Fedus et al. 2021, equations 4 to 6, as transformers generalises it to several active experts: `n_active_experts` if
    the load is even; usually more if it is not, but less where the most visited experts have low probabilities.
    Only the probabilities carry a gradient, so it is the popular experts whose probability falls.

    Shapes: logits (tokens, experts) each; counted (tokens), bool: the tokens that are no padding
    """
    if not routings:
        raise ValueError("there is no routing to balance; run a model with experts first")
    n_experts = routings[0].logits.shape[-1]
    wrong = [tuple(routing.logits.shape) for routing in routings if routing.logits.shape[-1] != n_experts]
    if wrong:
        raise ValueError(f"the layers have different numbers of experts: {n_experts} and {wrong[0][-1]}")
    n_tokens = [len(routing.logits) for routing in routings]
    if counted is not None and any(len(counted) != n for n in n_tokens):
        raise ValueError(
            f"counted has shape {tuple(counted.shape)}, expected one entry for each of {n_tokens[0]} tokens"
        )
    visits, probabilities, n_rows = 0.0, 0.0, 0
    for routing in routings:
        share = routing.logits.float().softmax(dim=-1)  # (tokens, experts)
        chosen = F.one_hot(routing.experts, n_experts).sum(dim=1).float()  # (tokens, experts)
        keep = torch.ones(len(share), device=share.device) if counted is None else counted.float()  # (tokens)
        visits = visits + keep @ chosen  # (experts)
        probabilities = probabilities + keep @ share  # (experts)
        n_rows = n_rows + keep.sum()
    n_rows = n_rows.clamp(min=1)  # padding alone: 0, as of no token
    return n_experts * (visits / n_rows * (probabilities / n_rows)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the router's logits, which keeps them small (Zoph et al. 2022, arXiv 2202.08906)."""
    return routing.logits.float().logsumexp(dim=-1).square().mean()


def load_entropy(counts: Tensor) -> float:
    """Entropy of the load over the experts as a share of the most possible: 1 is even, 0 is one expert for all.

    Raises ValueError for a load of nothing.
    """
    if not counts.sum() > 0:
        raise ValueError("no expert was visited; count a batch that has tokens")
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum().item()
    return entropy / math.log(len(counts)) if len(counts) > 1 else 1.0
