"""Topic 07: optimizers follow PyTorch's or the published equations step for step, schedules follow transformers'."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler, optimization

import optimizers as topic
from building_from_scratch import noam_factor
from optimizers import (
    LAMB,
    OPTIMIZERS,
    SCHEDULES,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    MuonAdamW,
    build_optimizer,
    gradient_noise_scale,
    gradient_squares,
    muon_groups,
    muon_scale,
    mup_groups,
    orthogonalise,
    parameter_groups,
    parameter_kinds,
    quintic,
    scale_for_width,
    schedule_factor,
    set_learning_rates,
    shapes_alone,
    state_bytes,
    training_bytes,
)
from transformer_architecture import (
    CausalTransformer,
    ModelConfig,
    TrainConfig,
    learning_rate_at,
    start_as_identity,
)

SHAPES = [(7, 3), (5,), (2, 11), (3, 1), (1, 4), (), (2, 3, 5)]  # tall, vector, wide, column, row, number, stack
N_STEPS = 60
OURS = {"adamw": AdamW, "adafactor": Adafactor, "lion": Lion, "lamb": LAMB, "muon": MuonAdamW}


def start_weights(shapes, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradient(weight: torch.Tensor, index: int, step: int, size: float = 1.0) -> torch.Tensor:
    """A smooth gradient that depends on the weight, so that an error in one step is felt in all later ones."""
    phase = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
    return size * (torch.sin(1.7 * weight + phase) + 0.3 * torch.cos(0.9 * step + index + 2 * phase))


def trajectory(make, shapes, scale: float = 1.0, size: float = 1.0, rates=None) -> list[list]:
    """All weights after every step of an optimizer with two groups; parameter 2 has no gradient at step 7.

    From rates (step -> factor) the rate of every group changes as under a schedule.
    """
    weights = [nn.Parameter(weight) for weight in start_weights(shapes, scale)]
    optimizer = make(weights[::2], weights[1::2])
    full = [group["lr"] for group in optimizer.param_groups]
    seen = []
    for step in range(N_STEPS):
        for index, weight in enumerate(weights):
            weight.grad = None if (index, step) == (2, 7) else gradient(weight.detach(), index, step, size)
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate * (rates(step) if rates else 1.0)
        optimizer.step()
        seen.append([weight.detach().clone() for weight in weights])
    return seen


def two_groups(rule, first: dict, second: dict, **shared):
    return lambda even, odd: rule([{"params": even, **first}, {"params": odd, **second}], **shared)


def falling(step: int) -> float:
    return 1 - step / (2 * N_STEPS)


# Parity by trajectory


def test_adamw_follows_torch(parity) -> None:
    groups = ({"lr": 0.03, "weight_decay": 0.2}, {"lr": 0.01, "weight_decay": 0.0})
    ours = two_groups(AdamW, *groups, beta1=0.8, beta2=0.97, eps=1e-6)
    for theirs, tolerance in (({}, 1e-10), ({"foreach": True}, 1e-10), ({"fused": True}, 1e-10)):
        other = two_groups(torch.optim.AdamW, *groups, betas=(0.8, 0.97), eps=1e-6, **theirs)
        name = "torch.optim.AdamW" + "".join(f"({key}=True)" for key in theirs)
        expected = trajectory(other, SHAPES, rates=falling)
        parity("AdamW", name, "trajectory", trajectory(ours, SHAPES, rates=falling), expected, tolerance)


def test_adafactor_follows_torch(parity) -> None:
    """Weights and gradients large and small meet both sides of every maximum; a rate of 0.4 exceeds 1/sqrt(t)."""
    groups = ({"lr": 0.4, "weight_decay": 0.05}, {"lr": 0.02, "weight_decay": 0.0})
    for scale, size in ((1.0, 1.0), (1e-5, 1.0), (1.0, 1e-9), (1.0, 1e-17)):
        ours = two_groups(Adafactor, *groups, decay_power=-0.7, clip=1.1)
        theirs = two_groups(torch.optim.Adafactor, *groups, beta2_decay=-0.7, d=1.1)
        expected = trajectory(theirs, SHAPES, scale, size, rates=falling)
        actual = trajectory(ours, SHAPES, scale, size, rates=falling)
        parity("Adafactor", "torch.optim.Adafactor", "trajectory", actual, expected, 1e-10)


MATRICES = [(7, 3), (2, 11), (3, 1), (4, 6), (1, 5)]


@pytest.mark.parametrize(("match", "theirs"), [("adamw", "match_rms_adamw"), ("shape", "original")])
@pytest.mark.parametrize("ns_dtype", ["float64", "bfloat16"])
def test_muon_follows_torch(match, theirs, ns_dtype, parity, monkeypatch) -> None:
    """As it is, in bfloat16; and in float64, once torch's own cast to bfloat16 is taken away."""
    if ns_dtype == "float64":
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    groups = ({"lr": 0.03, "weight_decay": 0.2}, {"lr": 0.01, "weight_decay": 0.0})
    ours = two_groups(Muon, *groups, momentum=0.9, match=match, ns_dtype=ns_dtype)
    other = two_groups(torch.optim.Muon, *groups, momentum=0.9, adjust_lr_fn=theirs)
    expected = trajectory(other, MATRICES, rates=falling)
    actual = trajectory(ours, MATRICES, rates=falling)
    parity("Muon", f"torch.optim.Muon, Newton-Schulz in {ns_dtype}", "trajectory", actual, expected, 1e-10)


def numpy_lion(lr: float, weight_decay: float, beta1: float, beta2: float, w, memory, g):
    """Chen et al. 2023, algorithm 2, line by line."""
    m = memory.get("m", np.zeros_like(w))
    c = beta1 * m + (1 - beta1) * g
    w = w - lr * (np.sign(c) + weight_decay * w)
    memory["m"] = beta2 * m + (1 - beta2) * g
    return w


def numpy_lamb(lr: float, weight_decay: float, beta1: float, beta2: float, w, memory, g):
    """You et al. 2020, algorithm 2 with phi the identity; eps 1e-6."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    v = memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-6)
    u = r + weight_decay * w
    norm_w, norm_u = math.sqrt(np.sum(w**2)), math.sqrt(np.sum(u**2))
    ratio = norm_w / norm_u if norm_w > 0 and norm_u > 0 else 1.0
    return w - lr * ratio * u


@pytest.mark.parametrize(("rule", "reference"), [(Lion, numpy_lion), (LAMB, numpy_lamb)])
@pytest.mark.parametrize("scale", [1.0, 0.0])  # weights of length 0 take LAMB's other branch
def test_lion_and_lamb_follow_the_published_equations(rule, reference, scale, parity) -> None:
    settings = ({"lr": 0.03, "weight_decay": 0.2}, {"lr": 0.01, "weight_decay": 0.0})
    ours = trajectory(two_groups(rule, *settings, beta1=0.8, beta2=0.97), SHAPES, scale, rates=falling)
    weights = [weight.numpy() for weight in start_weights(SHAPES, scale)]
    memories: list[dict] = [{} for _ in weights]
    expected = []
    for step in range(N_STEPS):
        for index, weight in enumerate(weights):
            if (index, step) != (2, 7):
                setting = settings[index % 2]
                g = gradient(torch.tensor(weight), index, step).numpy()
                rate = setting["lr"] * falling(step)
                weights[index] = reference(rate, setting["weight_decay"], 0.8, 0.97, weight, memories[index], g)
        expected.append(list(weights))
    parity(rule.__name__, "the published equations in NumPy", "trajectory", ours, expected, 1e-10)


def test_sgd_and_momentum_are_torchs_with_our_groups() -> None:
    model = nn.Linear(3, 2)
    plain, heavy = build_optimizer(model, "sgd", 0.1), build_optimizer(model, "momentum", 0.1, beta1=0.7)
    assert [group["momentum"] for group in plain.param_groups + heavy.param_groups] == [0, 0, 0.7, 0.7]
    assert [group["weight_decay"] for group in heavy.param_groups] == [0.1, 0.0]


# Properties of the rules


def one_step(rule, weight: torch.Tensor, grad: torch.Tensor, **settings) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad
    rule([parameter], **settings).step()
    return parameter.detach() - weight


def test_bias_correction_makes_the_first_step_as_large_as_the_rate() -> None:
    grad = torch.tensor([3e-4, -20.0], dtype=torch.float64)
    step = one_step(AdamW, torch.zeros(2, dtype=torch.float64), grad, learning_rate=0.01, beta2=0.9999, eps=0.0)
    torch.testing.assert_close(step, torch.tensor([-0.01, 0.01], dtype=torch.float64))


@pytest.mark.parametrize("rule", [AdamW, Lion, Adafactor])
def test_decay_is_decoupled_from_the_gradient(rule) -> None:
    """Weight decay shrinks by lr * weight_decay whatever the gradients are; coupled, their size would divide it."""
    weight = torch.tensor([2.0, -3.0, 5.0], dtype=torch.float64)
    for size in (1e-3, 1e3):
        grad = size * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
        step = [one_step(rule, weight, grad, learning_rate=0.01, weight_decay=decay) for decay in (0.0, 0.5)]
        torch.testing.assert_close(step[1] - step[0], -0.01 * 0.5 * weight)


def test_a_lamb_step_is_as_long_as_the_weights_times_the_rate() -> None:
    still = one_step(LAMB, torch.ones(3), torch.zeros(3), learning_rate=0.02, weight_decay=0.0)
    assert still.tolist() == [0, 0, 0], "without any direction it stands"
    weight, grad = start_weights([(7, 3), (7, 3)])
    for size in (1e-3, 1e3):
        step = one_step(LAMB, weight, size * grad, learning_rate=0.02, weight_decay=0.3)
        assert step.norm().item() == pytest.approx(0.02 * weight.norm().item(), rel=1e-12)


def test_adafactor_factors_a_rank_one_matrix_exactly() -> None:
    """The estimate of a rank-one matrix of squares is the matrix: the first step is the sign of the gradient."""
    rows, columns = torch.tensor([[0.1], [3.0]]).double(), torch.tensor([[1.0, -20.0, 0.5]]).double()
    grad = rows @ columns
    weight = torch.ones(2, 3, dtype=torch.float64)
    step = one_step(Adafactor, weight, grad, learning_rate=0.01)
    torch.testing.assert_close(step, -0.01 * grad.sign())


def test_newton_schulz_maps_singular_values_by_the_polynomial_and_keeps_the_vectors(parity) -> None:
    for shape in ((9, 4), (4, 9), (6, 6), (1, 5), (5, 1)):
        (matrix,) = start_weights([shape])
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for _ in range(topic.QUINTIC_STEPS):
            s = quintic(s)
        parity("orthogonalise", "the polynomial of torch.linalg.svd's values", "output", orthogonalise(matrix),
               u @ torch.diag(s) @ v, 1e-10)  # fmt: skip


def test_shape_comments_are_true(checked_shapes) -> None:
    with checked_shapes(topic) as checked:
        for shape in ((9, 4), (4, 9)):
            orthogonalise(start_weights([shape])[0])
    assert len(checked) == 3


def test_singular_values_land_in_the_band_that_the_docstring_states() -> None:
    s = torch.logspace(math.log10(0.0015), 0, 200_001, dtype=torch.float64)
    for _ in range(topic.QUINTIC_STEPS):
        s = quintic(s)
    assert 0.675 < s.min() < 0.685 and 1.195 < s.max() < 1.205
    spread = torch.logspace(0, -2.3, 12, dtype=torch.float64)  # a matrix whose singular values span a factor of 200
    u, _ = torch.linalg.qr(start_weights([(17, 12)])[0])
    v, _ = torch.linalg.qr(start_weights([(12, 12)])[0])
    values = torch.linalg.svdvals(orthogonalise(u @ torch.diag(spread) @ v))
    assert values.min() > 0.67 and values.max() < 1.21
    assert torch.linalg.svdvals(orthogonalise(torch.zeros(3, 5))).tolist() == [0, 0, 0]


def test_muons_steps_have_the_size_of_adamws_at_every_shape() -> None:
    for shape in ((40, 10), (10, 40), (30, 30)):
        weight, grad = start_weights([shape, shape])
        step = one_step(Muon, weight, grad, learning_rate=0.5, weight_decay=0.0, ns_dtype="float64")
        assert 0.68 * 0.2 < topic.root_mean_square(step) / 0.5 < 1.21 * 0.2
    assert muon_scale((8, 2), "shape") == 2 and muon_scale((2, 8), "shape") == 1


def test_muon_is_blind_to_the_scale_of_the_gradient() -> None:
    weight, grad = start_weights([(6, 4), (6, 4)])
    small, big = (one_step(Muon, weight, size * grad, ns_dtype="float64") for size in (1e-3, 1e3))
    torch.testing.assert_close(small, big, rtol=1e-9, atol=1e-12)


# State, groups, building


def small_model(tied: bool = False, width: int = 12) -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(ModelConfig(16, width, 2, 2, 3 * width, positions="learned"), 23)
    if tied:
        model.lm_head.weight = model.token_emb.weight
    return model


def train(model: nn.Module, optimizer, steps, width: int = 7) -> None:
    for step in steps:
        token_ids = torch.randint(0, 23, (3, width + 1), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        set_learning_rates(optimizer, schedule_factor("linear", step, 10, 2))
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_is_bitwise_the_one_that_never_stopped(name) -> None:
    whole = small_model()
    train(whole, build_optimizer(whole, name, 0.01), range(8))
    model = small_model()
    optimizer = build_optimizer(model, name, 0.01)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_model(width=12)
    other.load_state_dict(saved["model"])
    resumed = build_optimizer(other, name, 0.5)  # a wrong rate, which the state must put right
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(5, 8))
    for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [group["base_lr"] for group in resumed.param_groups] == [0.01] * len(resumed.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_one_batch(name) -> None:
    rates = {"sgd": 0.5, "momentum": 0.1, "adafactor": 0.1, "lion": 5e-3, "lamb": 0.05}
    model = small_model()
    optimizer = build_optimizer(model, name, rates.get(name, 0.01), weight_decay=0.0)
    token_ids = torch.randint(0, 23, (3, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        logits = model(token_ids[:, :-1])
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(math.log(23), abs=0.2)
    assert losses[-1] < 0.5 * losses[0], f"{name}: {losses[-1]:.3f}"


def test_built_adamw_is_ours_up_to_rounding(parity) -> None:
    models = [small_model().double() for _ in range(2)]
    groups = parameter_groups(models[1], 0.1)
    train(models[0], build_optimizer(models[0], "adamw", 0.01), range(10))
    train(models[1], AdamW(groups, 0.01, 0.9, 0.95), range(10))
    ours, theirs = ([parameter.detach() for parameter in model.parameters()] for model in models)
    parity("build_optimizer", "AdamW of this topic", "trajectory", ours, theirs, 1e-10)


def test_the_betas_reach_the_rule() -> None:
    for name in ("adamw", "lion", "lamb", "muon"):
        for group in build_optimizer(small_model(), name, 0.01, beta1=0.6, beta2=0.7).param_groups:
            assert group.get("betas", (group.get("beta1"), group.get("beta2"))) == (0.6, 0.7), name


def test_built_muon_is_torchs_muon_and_adamw(monkeypatch) -> None:
    """Both of torch's in one run of six steps, with the defaults of both sides; all in float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours, theirs = small_model().double(), small_model().double()
    optimizer = build_optimizer(ours, "muon", 0.01)
    for group in optimizer.param_groups:
        group["ns_dtype"] = "float64"
    train(ours, optimizer, range(6))
    hidden, output, others = ([parameter for parameter in group["params"]] for group in muon_groups(theirs, 0.1))
    muon = torch.optim.Muon(hidden, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": output, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 0.01, (0.9, 0.95))
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    for step in range(6):
        for optimizer in (muon, adamw):
            set_learning_rates(optimizer, schedule_factor("linear", step, 10, 2))
        token_ids = torch.randint(0, 23, (3, 8), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(theirs(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())
        theirs.zero_grad()
        loss.backward()
        muon.step()
        adamw.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_groups_hold_every_parameter_once_and_decay_only_matrices(tied) -> None:
    model = small_model(tied)
    kinds = parameter_kinds(model)
    n_hidden = 2 * 6  # q, k, v, out, up, down
    assert sum(kind == "hidden" for kind in kinds.values()) == n_hidden
    assert kinds["token_emb.weight"] == kinds["pos_emb.weight"] == "embedding"
    assert kinds.get("lm_head.weight") == (None if tied else "output")
    assert kinds["encoder.blocks.1.attn_norm.weight"] == kinds["encoder.blocks.0.ffn.up_proj.bias"] == "vector"
    for groups, sizes in ((parameter_groups(model, 0.3), (13, 24)), (muon_groups(model, 0.3), (12, 1, 24))):
        members = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
        expected = [size - tied * (size in (13, 1)) for size in sizes]
        assert [len(group["params"]) for group in groups] == [size for size in expected if size]
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert decays[id(parameter)] == (0.3 if kinds[name] in ("hidden", "output") else 0.0), name


class HeadFirst(nn.Module):
    """A foreign model: its own names, and the tied matrix appears first as the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.wte = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
        self.wte.weight = self.head.weight


def test_foreign_heads_are_outputs_and_muon_gets_no_kernel_of_a_convolution() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in ("head", "classifier", "other")})
    assert list(parameter_kinds(model).values()) == ["output", "output", "hidden"]
    groups = muon_groups(nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Linear(3, 2, bias=False)), 0.1)
    assert [(group["rule"], group["params"][0].dim(), group["weight_decay"]) for group in groups] == [
        ("muon", 2, 0.1),
        ("adamw", 4, 0.1),
    ]


def test_a_tied_matrix_is_an_embedding_whatever_its_name() -> None:
    assert parameter_kinds(HeadFirst()) == {"head.weight": "embedding"}
    assert [group["weight_decay"] for group in muon_groups(HeadFirst(), 0.1)] == [0.0]


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    for parameter in model.encoder.parameters():
        parameter.requires_grad = False
    assert [len(group["params"]) for group in muon_groups(model, 0.1)] == [1, 2]
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert training_bytes(model, "lion") == {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": trained,
        "state": trained,
    }
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="no parameter that requires a gradient; unfreeze"):
        build_optimizer(model, "lion", 0.1)


def test_a_decayed_layer_norm_shrinks_and_an_exempt_one_does_not() -> None:
    """Without any gradient a gain of 1 decays to (1 - lr * weight_decay)^n; in our groups it stays."""
    norm, exempt = nn.LayerNorm(4), nn.LayerNorm(4)
    for module, optimizer in (
        (norm, AdamW(norm.parameters(), 0.1, weight_decay=0.5)),
        (exempt, build_optimizer(exempt, "adamw", 0.1, weight_decay=0.5)),
    ):
        for _ in range(10):
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    torch.testing.assert_close(norm.weight, torch.full((4,), (1 - 0.1 * 0.5) ** 10))
    assert exempt.weight.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_predicted_bytes_are_the_measured_ones(name, tied, parity) -> None:
    model = small_model(tied)
    optimizer = build_optimizer(model, name, 0.01)
    train(model, optimizer, range(1))
    predicted = training_bytes(model, name)
    measured = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(parameter.grad.nbytes for parameter in model.parameters()),
        "state": state_bytes(optimizer),
    }
    parity(f"training_bytes({name})", "bytes of the tensors", "invariant", predicted, measured, 0)
    with shapes_alone():
        assert tied or training_bytes(CausalTransformer(model.config, 23), name) == predicted


def test_bytes_per_parameter_of_a_large_model() -> None:
    """For matrices of 4096 columns: 8 bytes of state per parameter for AdamW, 4 for Lion, near 0 for Adafactor."""
    with shapes_alone():
        layer = nn.Linear(4096, 4096, bias=False)
    each = {name: training_bytes(layer, name)["state"] / 4096**2 for name in OPTIMIZERS}
    assert (each["sgd"], each["momentum"], each["lion"], each["lamb"], each["muon"]) == (0, 4, 4, 8, 4)
    assert each["adamw"] == pytest.approx(8, rel=1e-6) and each["adafactor"] == 2 * 4 / 4096


# Schedules


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_transformers(name, warmup_steps, parity) -> None:
    """Over all steps and the end: theirs one step later in the warm-up (inverse_sqrt: also after), then at the same."""
    max_steps, cooldown_steps, rate = 40, 11 if name == "wsd" else 0, 1e-3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)
    special = {
        "polynomial": {"power": 2, "lr_end": 0.0},
        "inverse_sqrt": {"timescale": max(1, warmup_steps)},
        "wsd": {"num_decay_steps": cooldown_steps, "decay_type": "linear"},
    }
    kind = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, name)
    schedule = get_scheduler(kind, optimizer, warmup_steps, max_steps, special.get(name)).lr_lambdas[0]
    ours = [schedule_factor(name, step, max_steps, warmup_steps, cooldown_steps) for step in range(max_steps + 1)]
    later = [step < warmup_steps or (name == "inverse_sqrt" and warmup_steps > 0) for step in range(max_steps + 1)]
    theirs = [schedule(step + shift) for step, shift in enumerate(later)]
    parity(f"schedule_factor({name})", "transformers.get_scheduler", "output", ours, theirs, 1e-12)
    assert ours[0] > 0 and max(ours) == 1


def test_schedules_with_a_least_rate_follow_transformers(parity) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    made = {
        "linear": optimization.get_polynomial_decay_schedule_with_warmup(optimizer, 5, 30, lr_end=2e-4, power=1),
        "polynomial": optimization.get_polynomial_decay_schedule_with_warmup(optimizer, 5, 30, lr_end=2e-4, power=2),
        "cosine": optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 30, min_lr_rate=0.2),
        "wsd": optimization.get_wsd_schedule(optimizer, 5, 8, 30, decay_type="linear", min_lr_ratio=0.2),
    }
    for name, schedule in made.items():
        theirs = [schedule.lr_lambdas[0](step) for step in range(5, 31)]
        ours = [schedule_factor(name, step, 30, 5, 8 if name == "wsd" else 0, 0.2) for step in range(5, 31)]
        parity(f"schedule_factor({name})", "transformers with a least rate", "output", ours, theirs, 1e-12)
        assert ours[-1] == pytest.approx(0.2)


def test_schedules_reduce_to_those_of_the_earlier_topics() -> None:
    config = TrainConfig(max_steps=50, warmup_steps=9, learning_rate=0.7, min_lr_ratio=0.05)
    for step in range(50):
        mine = 0.7 * schedule_factor("cosine", step, 50, 9, min_lr_ratio=0.05)
        assert mine == pytest.approx(learning_rate_at(step, config), rel=1e-12)
        assert schedule_factor("inverse_sqrt", step, 50, 9) == noam_factor(step + 1, 9)
        assert schedule_factor("wsd", step, 50, 9, 12) == schedule_factor("constant", step, 50, 9, 12)
    assert [schedule_factor("linear", step, 8, 2) for step in (0, 0.5, 1, 1.5, 2, 5, 6.5, 8)] == [
        0.5, 0.75, 1, 1, 1, 0.5, 0.25, 0
    ]  # fmt: skip
    assert [schedule_factor("wsd", step, 8, 2, 4) for step in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [schedule_factor("wsd", step, 4, 2, 2) for step in range(4)] == [0.5, 1, 1, 0.5], "up and down, and no more"


def test_a_schedule_multiplies_each_groups_own_rate() -> None:
    model = small_model()
    optimizer = AdamW(mup_groups(model, 4, 0.3, 0.1))
    full = [group["base_lr"] for group in optimizer.param_groups]
    assert len(set(full)) == 2
    for factor in (0.5, 0.25):  # not 0.125 the second time
        set_learning_rates(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in full]


# Width


def test_scaling_changes_nothing_at_the_base_width_and_the_two_sums_elsewhere() -> None:
    token_ids = torch.randint(0, 23, (2, 5), generator=torch.Generator().manual_seed(1))
    plain, scaled = small_model(width=12), scale_for_width(small_model(width=12), 12)
    assert torch.equal(plain(token_ids), scaled(token_ids))
    wide = scale_for_width(small_model(width=24), 12)
    attention = wide.encoder.blocks[0].self_attn
    assert attention.scale == pytest.approx(math.sqrt(6) / 12)  # d_head 6 at the base, 12 here
    hidden = torch.randn(2, 5, 24)
    torch.testing.assert_close(wide.lm_head(hidden), hidden @ wide.lm_head.weight.T / 2)
    groups = mup_groups(wide, 12, 0.3, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.15, 0.2), (0.3, 0.1), (0.3, 0.0)]
    assert {len(group["params"]) for group in groups} == {12, 1, 24}


def movement(width: int, mup: bool) -> float:
    """Root mean square change of the logits by five steps of Adam at one rate, averaged over three seeds."""
    moved = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = CausalTransformer(ModelConfig(16, width, 2, 2, 4 * width), 23)
        start_as_identity(model)
        if mup:
            scale_for_width(model, 16)
        groups = mup_groups(model, 16, 4e-3, 0.0) if mup else parameter_groups(model, 0.0)
        optimizer = AdamW(groups, 4e-3, beta2=0.95)
        token_ids = torch.randint(0, 23, (8, 9), generator=torch.Generator().manual_seed(seed))
        before = model(token_ids).detach()
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved.append(topic.root_mean_square(model(token_ids).detach() - before))
    return sum(moved) / len(moved)


def test_under_mup_a_step_moves_the_logits_alike_at_every_width() -> None:
    widths = (16, 64, 256)
    slopes = {}
    for mup in (False, True):
        sizes = [movement(width, mup) for width in widths]
        slopes[mup] = math.log(sizes[-1] / sizes[0]) / math.log(widths[-1] / widths[0])
    assert slopes[False] > 0.4 and abs(slopes[True]) < 0.15, slopes


# Noise


def test_noise_scale_is_unbiased_over_every_possible_batch() -> None:
    """All batches of 1 and of 3 drawn with replacement from five gradients: the mean estimates are the truth."""
    gradients = np.random.default_rng(0).normal(size=(5, 2)) + 0.4
    true = gradients.mean(axis=0)
    signal, noise = true @ true, gradients.var(axis=0).sum()
    lengths = {
        size: [
            float(np.square(gradients[list(chosen)].mean(axis=0)).sum())
            for chosen in itertools.product(range(5), repeat=size)
        ]
        for size in (1, 3)
    }
    found = gradient_noise_scale(lengths[1], lengths[3], 1, 3)
    assert (found.signal, found.noise) == (pytest.approx(signal, rel=1e-12), pytest.approx(noise, rel=1e-12))
    assert found.scale == pytest.approx(noise / signal)


class Point(nn.Module):
    """Loss |w - x|^2 / 2 for x of known mean and variance: the gradient of a batch is w minus its mean of x."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)


def test_noise_scale_of_a_quadratic_is_the_known_one() -> None:
    """Four features, variances 1, 4, 9, 16, and |w - mean|^2 = 4: signal 4, noise 30, noise scale 7.5."""
    generator, deviations = torch.Generator().manual_seed(0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    model, small, big = Point(torch.ones(4)), [], []
    for _ in range(600):
        samples = torch.randn(8, 2, 4, generator=generator) * deviations
        squares, square = gradient_squares(model, ((model.weight - x).square().sum(1).mean() / 2 for x in samples))
        small += squares
        big.append(square)
    found = gradient_noise_scale(small, big, 2, 16)
    assert found.signal == pytest.approx(4, rel=0.1) and found.noise == pytest.approx(30, rel=0.05)
    assert found.scale == pytest.approx(7.5, rel=0.1) and model.weight.grad is None


def test_a_gradient_without_signal_has_an_infinite_noise_scale() -> None:
    assert gradient_noise_scale([1.0], [0.1], 1, 8).scale == math.inf


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_optimizer(small_model(), "adam", 0.1), "unknown optimizer 'adam'; did you mean 'adamw'?"),
        (lambda: build_optimizer(small_model(), "lion", -0.1), "learning_rate must be finite and >= 0, got -0.1"),
        (lambda: build_optimizer(small_model(), "adamw", math.nan), "learning_rate must be finite and >= 0, got nan"),
        (lambda: build_optimizer(small_model(), "adamw", 0.1, beta2=1.0), "beta2 must be >= 0 and < 1, got 1.0"),
        (lambda: build_optimizer(small_model(), "muon", math.inf), "learning_rate must be finite and >= 0, got inf"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 2))], momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 3, 4))]), r"Muon takes matrices, got shape \(2, 3, 4\)"),
        (lambda: AdamW(small_model().parameters(), eps=-1.0), "eps must be finite"),
        (lambda: AdamW([{"params": small_model().parameters(), "weight_decay": -1.0}]), "weight_decay must be"),
        (lambda: Muon(small_model().parameters()), r"Muon takes matrices, got shape \(12,\); give it to AdamW"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 2))], match="rms"), "unknown match 'rms'"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 2))], ns_dtype="half"), "unknown ns_dtype 'half'"),
        (lambda: Adafactor(small_model().parameters(), clip=0.5), "clip >= 1, got -0.8, 0.001 and 0.5"),
        (lambda: orthogonalise(torch.ones(2, 3, 4)), r"takes a matrix, got shape \(2, 3, 4\)"),
        (lambda: schedule_factor("cosin", 0, 9, 1), "unknown schedule 'cosin'; did you mean 'cosine'?"),
        (lambda: schedule_factor("cosine", 0, 9, 10), "warmup_steps=10 and cooldown_steps=0 .* max_steps=9; train"),
        (lambda: schedule_factor("wsd", 0, 9, 5, 5), "together at most max_steps=9"),
        (lambda: schedule_factor("wsd", 0, 9, 5), "wsd needs cooldown_steps >= 1"),
        (lambda: schedule_factor("linear", 0, 9, -1), "must be >= 0"),
        (lambda: schedule_factor("linear", 10, 9, 1), "count optimizer steps, not micro-batches"),
        (lambda: schedule_factor("linear", 1, 9, 1, min_lr_ratio=1.5), "min_lr_ratio must be >= 0 and <= 1, got 1.5"),
        (lambda: schedule_factor("linear", 1, 9, math.nan), "warmup_steps=nan and cooldown_steps=0 must be >= 0"),
        (lambda: set_learning_rates(build_optimizer(small_model(), "sgd", 0.1), math.nan), "finite and >= 0, got nan"),
        (lambda: set_learning_rates(build_optimizer(small_model(), "sgd", 0.1), -1.0), "finite and >= 0, got -1"),
        (lambda: topic.gradient_squares(small_model(), []), "no losses; give at least one"),
        (lambda: gradient_noise_scale([1.0], [1.0], 4, 4), "small_size=4 must be >= 1 and below big_size=4"),
        (lambda: gradient_noise_scale([], [1.0], 1, 4), "at least one length of each size, got 0 and 1"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_group_that_is_added_later_is_a_group_like_the_others() -> None:
    matrix, late = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([matrix], 0.1)
    optimizer.add_param_group({"params": [late], "lr": 0.4})
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2]
    for wrong, message in (
        ({"params": [nn.Parameter(torch.ones(2))]}, "Muon takes matrices"),
        ({"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1.0}, "learning_rate must be finite and >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(wrong)
    assert len(optimizer.param_groups) == 2
    plain = torch.optim.SGD([matrix], 0.2)  # not of build_optimizer: its rate is the full one
    for factor in (0.5, 0.25):
        set_learning_rates(plain, factor)
    assert plain.param_groups[0]["lr"] == 0.05


def test_empty_unused_and_sparse_parameters() -> None:
    empty = nn.Parameter(torch.ones(0, 3))
    empty.grad = torch.ones(0, 3)
    Adafactor([empty]).step()
    used, unused = nn.Linear(3, 2), nn.Linear(1, 1)
    squares, square = topic.gradient_squares(nn.ModuleList([used, unused]), [used(torch.ones(3)).sum()])
    assert squares == [square] == [8.0]  # two rows of three ones, and two biases
    sparse = nn.Embedding(3, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="AdamW takes no sparse gradients"):
        AdamW(sparse.parameters()).step()


def test_the_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([weight], 0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1 and weight.item() == pytest.approx(0.9)


def test_a_copied_optimizer_is_independent() -> None:
    model = small_model()
    optimizer = build_optimizer(model, "muon", 0.01)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 3))
    moved = [name for name, state in before["state"].items() if "square" in state]
    assert moved and all(before["state"][name]["step"] == 2 for name in moved)
