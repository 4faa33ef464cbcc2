"""Topic 09: routers, capacity and balance against loops written out, and against their own limits."""

import math

import pytest
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from llm_layers import SwiGLU
from mixture_of_experts import (
    MixtureOfExperts,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    SwitchRouter,
    load_balance_loss,
    load_entropy,
    router_z_loss,
)


def mixture(router=None, **options) -> MixtureOfExperts:
    torch.manual_seed(0)
    layer = MixtureOfExperts(router or SoftmaxRouter(12, 6, 2), 12, 10, **options).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def some_tokens(batch: int = 3, seq: int = 7) -> torch.Tensor:
    return torch.randn(batch, seq, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_mixture_is_the_weighted_sum_of_the_chosen_networks(parity) -> None:
    layer, x = mixture(d_shared=8), some_tokens()
    got = layer(x)
    wanted = torch.zeros_like(x)
    for batch in range(3):
        for seq in range(7):
            token = x[batch, seq]
            chances = (layer.router.weight @ token).softmax(0)
            best = chances.topk(2).indices
            for expert in best.tolist():
                wanted[batch, seq] += chances[expert] / chances[best].sum() * layer.experts[expert](token)
            wanted[batch, seq] += layer.shared(token)
    parity("MixtureOfExperts", "one token at a time", "output", got, wanted, 1e-6)  # the router's softmax is float32


def test_one_expert_that_every_token_visits_is_a_plain_network(parity) -> None:
    layer, x = mixture(SoftmaxRouter(12, 1, 1)), some_tokens()
    parity("MixtureOfExperts, one expert", "SwiGLU", "invariant", layer(x), layer.experts[0](x), 0)


def test_all_experts_active_does_not_depend_on_the_order_of_tokens() -> None:
    layer, x = mixture(SoftmaxRouter(12, 6, 6)), some_tokens()
    assert torch.allclose(layer(x.flip(1)).flip(1), layer(x), atol=1e-12)


def test_capacity_drops_the_later_visits_and_leaves_the_others_alone() -> None:
    layer = mixture(SwitchRouter(12, 3), capacity_factor=0.5)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] = 5.0
    x = some_tokens().abs()  # all tokens prefer expert 1
    got = layer(x).flatten(0, 1)
    most = layer.capacity(21)
    assert most == math.ceil(0.5 * 21 / 3) == 4 and layer.counts.tolist() == [0, 21, 0]
    assert (got[most:] == 0).all() and (got[:most] != 0).any(dim=-1).all()
    layer.capacity_factor = 3.0
    assert (layer(x) != 0).any(dim=-1).all()


def test_a_switch_trains_its_router_only_through_its_gate() -> None:
    gated, x = mixture(SwitchRouter(12, 4)), some_tokens()
    gated(x).sum().backward()
    assert gated.router.weight.grad.abs().max() > 1e-3
    ungated = mixture(SoftmaxRouter(12, 4, 1))  # one weight divided by itself is 1, whatever the router says
    ungated(x).sum().backward()
    assert ungated.router.weight.grad.abs().max() < 1e-6


def test_the_switch_router_is_that_of_transformers(parity) -> None:
    torch.manual_seed(4)
    config = SwitchTransformersConfig(d_model=12, num_experts=5, expert_capacity=99, router_jitter_noise=0.0)
    theirs, ours = SwitchTransformersTop1Router(config), SwitchRouter(12, 5)
    torch.nn.init.normal_(ours.weight)
    theirs.classifier.weight.data = ours.weight.data.clone()
    x = some_tokens().float()
    chosen, weights, logits = theirs(x)
    routing = ours(x.flatten(0, 1))
    got = {"experts": routing.experts[:, 0], "weights": routing.weights, "logits": routing.logits}
    wanted = {"experts": chosen.argmax(-1), "weights": weights, "logits": logits}
    wanted = {name: tensor.reshape(got[name].shape) for name, tensor in wanted.items()}
    parity("SwitchRouter", "transformers, SwitchTransformersTop1Router", "output", got, wanted, 1e-6)
    for loss in (weights.sum(), routing.weights.sum()):
        loss.backward()
    grads = ours.weight.grad, theirs.classifier.weight.grad
    parity("SwitchRouter", "transformers, SwitchTransformersTop1Router", "gradient", *grads, 1e-5)


def test_softmax_over_the_chosen_logits_is_the_same() -> None:
    router, x = SoftmaxRouter(12, 6, 3).double(), some_tokens().flatten(0, 1)
    routing = router(x)
    chosen = routing.logits.gather(1, routing.experts)
    assert torch.allclose(routing.weights.double(), chosen.softmax(-1), atol=1e-6)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    router, x = SigmoidRouter(12, 6, 2, scale=2.5).double(), some_tokens().flatten(0, 1)
    assert torch.allclose(router(x).weights.sum(-1), torch.full((21,), 2.5), atol=1e-5)
    router.update_bias(torch.tensor([9, 0, 4, 1, 4, 6]))  # even would be 4
    assert torch.allclose(router.bias, torch.tensor([-1e-3, 1e-3, 0, 1e-3, 0, -1e-3], dtype=torch.float64))
    router.bias[4] = 10.0
    routing = router(x)
    assert (routing.experts == 4).any(dim=-1).all()
    scores = routing.logits.sigmoid().gather(1, routing.experts)
    assert torch.allclose(routing.weights, scores / scores.sum(-1, keepdim=True) * 2.5, atol=1e-5)


def test_a_token_stays_within_its_groups() -> None:
    router, x = SigmoidRouter(12, 8, 3, n_groups=4, n_active_groups=2), some_tokens().flatten(0, 1).float()
    routing = router(x)
    groups = [set((row // 2).tolist()) for row in routing.experts]
    assert all(len(group) <= 2 for group in groups)
    scores = routing.logits.sigmoid().unflatten(-1, (4, 2)).sum(-1)
    best = scores.topk(2, dim=-1).indices
    assert all(group <= set(row.tolist()) for group, row in zip(groups, best, strict=True))


def test_the_bias_balances_a_collapsed_router() -> None:
    torch.manual_seed(0)
    router = SigmoidRouter(12, 8, 2)
    with torch.no_grad():
        router.weight[:2] += 0.5
    entropies = []
    for step in range(400):
        x = torch.randn(256, 12, generator=torch.Generator().manual_seed(step)) + 0.5
        counts = torch.bincount(router(x).experts.flatten(), minlength=8)
        entropies.append(load_entropy(counts))
        router.update_bias(counts, rate=0.01)
    assert entropies[0] < 0.5 and sum(entropies[-20:]) / 20 > 0.93  # it keeps swinging by its rate


def even_routing(n_tokens: int, n_experts: int, n_active: int) -> Routing:
    experts = torch.arange(n_tokens * n_active).remainder(n_experts).view(n_tokens, n_active)
    return Routing(torch.zeros(n_tokens, n_experts), torch.full((n_tokens, n_active), 1 / n_active), experts)


def test_the_balance_loss_is_the_number_of_active_experts_when_even_and_more_when_not() -> None:
    assert load_balance_loss([even_routing(24, 6, 2)]).item() == pytest.approx(2.0)
    logits = torch.zeros(24, 6)
    logits[:, :2] = 9.0
    collapsed = Routing(logits, torch.full((24, 2), 0.5), torch.tensor([[0, 1]] * 24))
    assert load_balance_loss([collapsed]).item() == pytest.approx(6.0, rel=0.01)
    halves = load_balance_loss([even_routing(24, 6, 2), collapsed])
    assert 2 < halves < 6


def test_padding_alone_has_nothing_to_balance() -> None:
    assert load_balance_loss([even_routing(24, 6, 2)], torch.zeros(24, dtype=torch.bool)).item() == 0
    with pytest.raises(ValueError, match="there is no routing to balance"):
        load_balance_loss([])


def test_the_gradient_of_the_balance_loss_pushes_popular_experts_down() -> None:
    weight = (0.1 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)) + 1
    logits = x @ weight.T
    experts = logits.topk(2, dim=-1).indices
    load_balance_loss([Routing(logits, logits, experts)]).backward()
    counts = torch.bincount(experts.flatten(), minlength=6)
    after = x @ (weight - 0.5 * weight.grad).T
    change = (after.softmax(-1) - logits.softmax(-1)).mean(0)
    assert change[counts.argmax()] < 0 < change[counts.argmin()]


def test_z_loss_and_entropy_have_their_known_values() -> None:
    assert router_z_loss(even_routing(5, 8, 1)).item() == pytest.approx(math.log(8) ** 2)
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([7, 0, 0, 0])) == pytest.approx(0.0, abs=1e-12)
    assert load_entropy(torch.tensor([3])) == 1.0


def test_a_mixture_costs_its_active_experts_and_no_more() -> None:
    """Experts at full size with two of eight active cost two networks, not a quarter of one."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 64, 12)
    costs = []
    for layer in (MixtureOfExperts(SoftmaxRouter(12, 8, 2), 12, 10), SwiGLU(12, 10)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        costs.append(counter.get_total_flops())
    assert costs[0] == 2 * costs[1] + 2 * 64 * 12 * 8


def test_bad_sizes_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="n_groups=0 must divide n_experts=6"):
        SigmoidRouter(12, 6, 2, n_groups=0, n_active_groups=0)
    with pytest.raises(ValueError, match=r"counts have shape \(1,\), expected one for each of 6 experts"):
        SigmoidRouter(12, 6, 2).update_bias(torch.ones(1))
    with pytest.raises(ValueError, match="different numbers of experts: 6 and 4"):
        load_balance_loss([even_routing(24, 6, 2), even_routing(24, 4, 2)])
    with pytest.raises(ValueError, match=r"counted has shape \(5,\), expected one entry for each of 24 tokens"):
        load_balance_loss([even_routing(24, 6, 2)], torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no expert was visited"):
        load_entropy(torch.zeros(6))
    with pytest.raises(ValueError, match=r"n_active_experts=7 must be in 1\.\.6"):
        SoftmaxRouter(12, 6, 7)
    with pytest.raises(ValueError, match="n_groups=4 must divide n_experts=6"):
        SigmoidRouter(12, 6, 2, n_groups=4)
    for n_active in (0, 5):
        with pytest.raises(ValueError, match=f"n_active_groups={n_active} >= 1"):
            SigmoidRouter(12, 8, 2, n_groups=4, n_active_groups=n_active)
    with pytest.raises(ValueError, match="1 groups hold fewer than n_active_experts=3"):
        SigmoidRouter(12, 8, 3, n_groups=4, n_active_groups=1)
