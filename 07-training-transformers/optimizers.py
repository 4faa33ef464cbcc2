"""Topic 07 - Optimizers and schedules: how a gradient becomes a step, how large it is, and what it costs to remember.

python 07-training-transformers/training_transformers.py figures optimizers  # the optimizers against the entropy floor
python 07-training-transformers/training_transformers.py figures width batch schedules
python 07-training-transformers/training_transformers.py --help

Papers: Loshchilov, Hutter 2019 (arXiv 1711.05101), AdamW; Shazeer, Stern 2018 (arXiv 1804.04235), Adafactor; Chen et
al. 2023 (arXiv 2302.06675), Lion; You et al. 2020 (arXiv 1904.00962), LAMB; Jordan et al. 2024 (the write-up "Muon: An
optimizer for hidden layers in neural networks") and Liu et al. 2025 (arXiv 2502.16982), Muon; Yang et al. 2022 (arXiv
2203.03466), the maximal update parametrisation; McCandlish et al. 2018 (arXiv 1812.06162), the gradient noise scale.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_mechanisms import MultiHeadAttention
from building_from_scratch import cooldown_factor, noam_factor
from transformer_architecture import CausalTransformer
from workbench import check_name

# One class for each rule; what they share is the walk over the parameters


class RuleOptimizer(torch.optim.Optimizer):
    """Apply `update(parameter, grad, state, group)` to every parameter that has a gradient.

    State holds tensors and plain numbers alone, so that `torch.load(weights_only=True)` reads it, and a run that goes
    on from a state_dict is bitwise the run that never stopped. Every group keeps its own full rate in "base_lr";
    a schedule sets "lr" to a share of it. Raises ValueError for settings outside their range.
    """

    def __init__(self, params: Iterable, learning_rate: float, **settings: Any) -> None:
        super().__init__(params, {"lr": learning_rate, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also after the start; what it leaves out is as in the others' default."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("base_lr", self.param_groups[-1]["lr"])

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change one parameter in place; `state` is its memory, empty before its first step."""
        raise TypeError("RuleOptimizer has no rule; use one of its subclasses")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step for every parameter whose gradient is not None; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.is_sparse:
                        raise ValueError(f"{type(self).__name__} takes no sparse gradients; build nn.Embedding without")
                    self.update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def check_settings(group: dict[str, Any]) -> None:
    """Raise ValueError for a rate, decay, beta or epsilon that no optimizer of this file can use."""
    for name in ("lr", "weight_decay", "eps"):
        if name in group and not 0 <= group[name] < math.inf:
            shown = {"lr": "learning_rate"}.get(name, name)
            raise ValueError(f"{shown} must be finite and >= 0, got {group[name]}")
    for name in ("beta1", "beta2", "momentum"):
        if name in group and not 0 <= group[name] < 1:
            raise ValueError(f"{name} must be >= 0 and < 1, got {group[name]}")


def shrink(parameter: Tensor, group: dict[str, Any]) -> None:
    """Decoupled weight decay: multiply by 1 - lr * weight_decay, apart from the gradient (Loshchilov, Hutter 2019).

    Added to the gradient instead, the decay of a weight would be divided by the size of its gradients like the rest of
    the step: weights with large gradients would hardly decay.
    """
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def adam_direction(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The mean of the gradients over their root mean square, both corrected for their start at 0 (Kingma, Ba 2015).

    After t equal gradients g a running mean that starts at 0 holds (1 - beta^t) g; dividing by 1 - beta^t gives g.
    """
    if not state:
        state.update(step=0, mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
    state["step"] += 1
    state["mean"].lerp_(grad, 1 - group["beta1"])
    state["square"].mul_(group["beta2"]).addcmul_(grad, grad, value=1 - group["beta2"])
    root = (state["square"] / (1 - group["beta2"] ** state["step"])).sqrt_()
    return state["mean"] / (1 - group["beta1"] ** state["step"]) / root.add_(group["eps"])


class AdamW(RuleOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2); 8 bytes of state per fp32 weight."""

    def __init__(
        self,
        params: Iterable,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, learning_rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        shrink(parameter, group)
        parameter.add_(adam_direction(grad, state, group), alpha=-group["lr"])


class LAMB(RuleOptimizer):
    """AdamW whose step on each tensor is as long as the tensor times the rate (You et al. 2020, algorithm 2).

    The decay joins the direction before its length is taken. A tensor or direction of length 0 takes the plain step.
    The paper bounds the length by a function phi; here it is the identity.
    """

    def __init__(
        self,
        params: Iterable,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, learning_rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        direction = adam_direction(grad, state, group).add_(parameter, alpha=group["weight_decay"])
        length, size = direction.norm().item(), parameter.norm().item()
        trust = size / length if size > 0 and length > 0 else 1.0
        parameter.add_(direction, alpha=-group["lr"] * trust)


class Lion(RuleOptimizer):
    """Step by the sign of a running mean (Chen et al. 2023, algorithm 2); 4 bytes of state per fp32 weight.

    The mean that gives the sign weighs the newest gradient by 1 - beta1, the mean that is kept by 1 - beta2. Every
    weight moves by exactly the rate, so that the rate is 3 to 10 times smaller than AdamW's, and the decay larger.
    """

    def __init__(
        self,
        params: Iterable,
        learning_rate: float = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, learning_rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay)

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["mean"] = torch.zeros_like(grad)
        shrink(parameter, group)
        parameter.sub_(state["mean"].lerp(grad, 1 - group["beta1"]).sign_(), alpha=group["lr"])
        state["mean"].lerp_(grad, 1 - group["beta2"])


class Adafactor(RuleOptimizer):
    """Adam's second moment from its row and column means alone (Shazeer and Stern 2018, algorithms 4 and 5).

    A matrix of squares V is estimated as outer(row means, column means) / mean: exact if V has rank one, and the best
    such estimate under the generalised Kullback-Leibler divergence. A matrix of n x m weights keeps n + m numbers.
    Three more parts of the paper: beta2 grows as 1 - step^decay_power, the update is clipped to root mean square
    `clip`, and the rate is relative to the root mean square of the weights, at least `least_scale`.

    As torch.optim.Adafactor, unlike the paper: epsilon (that of the dtype) bounds the estimate from below instead of
    being added to the squares, the rate is at most 1/sqrt(step), and there is decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable,
        learning_rate: float = 1e-2,
        decay_power: float = -0.8,
        least_scale: float = 1e-3,
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not (decay_power <= 0 and least_scale >= 0 and clip >= 1):
            raise ValueError(
                "Adafactor needs decay_power <= 0, least_scale >= 0 and clip >= 1, "
                f"got {decay_power}, {least_scale} and {clip}"
            )
        options = {"decay_power": decay_power, "least_scale": least_scale, "clip": clip}
        super().__init__(params, learning_rate, weight_decay=weight_decay, **options)

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if grad.numel() == 0:
            return  # no mean of nothing
        if not state:
            sums = {"row": grad[..., :1], "column": grad[..., :1, :]} if grad.dim() > 1 else {"square": grad}
            state.update(step=0, **{name: torch.zeros_like(part) for name, part in sums.items()})
        state["step"] += 1
        newest = state["step"] ** group["decay_power"]  # 1 - beta2
        rate = min(group["lr"], state["step"] ** -0.5) * max(group["least_scale"], root_mean_square(parameter))
        shrink(parameter, group)
        eps = torch.finfo(parameter.dtype).eps
        squares = grad.square()
        if grad.dim() > 1:
            row = state["row"].lerp_(squares.mean(dim=-1, keepdim=True), newest)
            column = state["column"].lerp_(squares.mean(dim=-2, keepdim=True), newest)
            estimate = row @ column / row.mean(dim=-2, keepdim=True).clamp_(min=eps)
        else:
            estimate = state["square"].lerp_(squares, newest).clone()
        direction = estimate.clamp_(min=eps**2).rsqrt_().mul_(grad)
        parameter.sub_(direction, alpha=rate / max(1.0, root_mean_square(direction) / group["clip"]))


def root_mean_square(x: Tensor) -> float:
    return x.norm().item() / math.sqrt(x.numel())


# Muon: the nearest orthogonal matrix by five matrix polynomials


QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of a s + b s^3 + c s^5 (Jordan et al. 2024): steep at 0, then near 1
QUINTIC_STEPS = 5


def quintic(s, coefficients: tuple[float, float, float] = QUINTIC):
    """What one step of `orthogonalise` does to a singular value s: a s + b s^3 + c s^5."""
    a, b, c = coefficients
    return s * (a + s**2 * (b + s**2 * c))


def orthogonalise(
    matrix: Tensor,
    n_steps: int = QUINTIC_STEPS,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """Bring all singular values of a matrix near 1 and keep its singular vectors (Newton-Schulz; Jordan et al. 2024).

    With X = U S V^T the product X X^T is U S^2 U^T, so that a X + b (X X^T) X + c (X X^T)^2 X = U (a S + b S^3 + c S^5)
    V^T: a polynomial of the matrix is the same polynomial of each singular value, without any decomposition. Dividing
    by the Frobenius norm first brings them all into (0, 1]. After 5 steps those that were above 0.0015 lie in
    [0.68, 1.21]: these coefficients do not converge to 1, they lift small values fast.

    Shapes: (row, column) to the same; computed in `dtype` (that of the matrix if None).
    """
    if matrix.dim() != 2:
        raise ValueError(f"orthogonalise takes a matrix, got shape {tuple(matrix.shape)}")
    a, b, c = coefficients
    x = matrix.to(dtype or matrix.dtype)
    wide = x.T if x.shape[0] > x.shape[1] else x  # (short, long)
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(n_steps):
        gram = wide @ wide.T  # (short, short)
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)  # (short, long)
    return wide.T if x.shape[0] > x.shape[1] else wide


def muon_scale(shape: tuple[int, int], match: str) -> float:
    """Factor on the rate of a (row, column) matrix.

    An orthogonal matrix of that shape has entries of root mean square 1 / sqrt(max(row, column)). "adamw" (Liu et al.
    2025) makes that 0.2, about the size of AdamW's steps, so that both share one rate; "shape" is the sqrt(max(1,
    row / column)) of Jordan et al. 2024. Raises ValueError for another name.
    """
    check_name("match", match, ("adamw", "shape"))
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if match == "adamw" else math.sqrt(max(1.0, rows / columns))


class Muon(RuleOptimizer):
    """Momentum, then every singular value of the step brought near 1 (Jordan et al. 2024); for hidden matrices alone.

    torch.optim.Muon orthogonalises in bfloat16 always; here in float32, which most CPUs multiply faster, unless
    ns_dtype names another dtype. Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Iterable,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        match: str = "adamw",
        ns_dtype: str = "float32",
    ) -> None:
        check_name("ns_dtype", ns_dtype, ("float32", "bfloat16", "float64"))
        settings = {"momentum": momentum, "match": match, "ns_dtype": ns_dtype}
        super().__init__(params, learning_rate, weight_decay=weight_decay, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise ValueError(f"Muon takes matrices, got shape {tuple(parameter.shape)}; give it to AdamW")
            muon_scale(parameter.shape, self.param_groups[-1]["match"])

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["mean"] = torch.zeros_like(grad)
        momentum = group["momentum"]
        state["mean"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(state["mean"], momentum)  # Nesterov: the mean one step on, if this gradient came again
        direction = orthogonalise(ahead, dtype=getattr(torch, group["ns_dtype"]))
        shrink(parameter, group)
        parameter.add_(direction, alpha=-group["lr"] * muon_scale(parameter.shape, group["match"]))


class MuonAdamW(RuleOptimizer):
    """Muon for the groups that say rule="muon", AdamW for the others, in one object with one state_dict."""

    def __init__(
        self, params: Iterable, learning_rate: float = 1e-3, weight_decay: float = 0.1, **settings: Any
    ) -> None:
        shared = {"rule": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95, "match": "adamw"}
        settings = {**shared, "ns_dtype": "float32", **settings}
        super().__init__(params, learning_rate, weight_decay=weight_decay, **settings)

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (Muon if group["rule"] == "muon" else AdamW).update(parameter, grad, state, group)


# Which parameters decay, and which Muon may have


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Map the name of every trained parameter, tied ones once, to its kind: vector, embedding, hidden or output.

    vector: biases, gains of a LayerNorm, everything with one axis. embedding: the weight of an nn.Embedding, and what
    the course calls token_emb or pos_emb; a weight that is tied to one, too. output: a matrix of a module called
    lm_head, head or classifier. hidden: the other matrices.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds = {}
    for name, parameter in model.named_parameters():  # names a tied parameter once, where it appears first
        path = name.split(".")
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            kinds[name] = "vector"
        elif id(parameter) in tables or any(part.endswith(("token_emb", "pos_emb")) for part in path):
            kinds[name] = "embedding"
        else:
            kinds[name] = "output" if {"lm_head", "head", "classifier"} & set(path) else "hidden"
    return kinds


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay and those that do not, tied ones once; no group is empty.

    Matrices decay: their size is what a norm after them takes out again. Not so a bias; the gain of a LayerNorm, which
    decay would pull to 0 instead of 1; and an embedding, whose rows decay at every step but learn only at the steps in
    which their token occurs. Raises ValueError for a model without trained parameters.
    """
    kinds, parameters = parameter_kinds(model), dict(model.named_parameters())
    if not kinds:
        raise ValueError("the model has no parameter that requires a gradient; unfreeze at least one")
    matrices = [parameters[name] for name, kind in kinds.items() if kind in ("hidden", "output")]
    others = [parameters[name] for name, kind in kinds.items() if kind in ("vector", "embedding")]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of `parameter_groups`, with the hidden matrices (exactly two axes) in one of their own for Muon."""
    kinds, parameters = parameter_kinds(model), dict(model.named_parameters())
    hidden = [parameters[name] for name, kind in kinds.items() if kind == "hidden" and parameters[name].dim() == 2]
    taken = {id(parameter) for parameter in hidden}
    groups = [{"params": hidden, "weight_decay": weight_decay, "rule": "muon"}] if hidden else []
    for group in parameter_groups(model, weight_decay):
        rest = [parameter for parameter in group["params"] if id(parameter) not in taken]
        groups += [{**group, "params": rest, "rule": "adamw"}] if rest else []
    return groups


OPTIMIZERS = ("sgd", "momentum", "adamw", "adafactor", "lion", "lamb", "muon")


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.95,
) -> torch.optim.Optimizer:
    """The optimizer called `name` for all trained parameters of a model, with decay on its matrices alone.

    Each group's "base_lr" is its full rate, see `set_learning_rates`. "adamw" is torch's fused AdamW: the same numbers
    as AdamW above up to rounding, which a test proves, in one pass over the weights. "muon" gives the hidden matrices
    to Muon and the rest to AdamW, at one rate. "sgd" and "momentum" are torch.optim.SGD, without and with beta1.
    Raises ValueError for an unknown name and for settings outside their range.
    """
    check_name("optimizer", name, OPTIMIZERS)
    check_settings({"lr": learning_rate, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2})
    groups = parameter_groups(model, weight_decay)
    match name:
        case "sgd" | "momentum":
            optimizer = torch.optim.SGD(groups, learning_rate, momentum=beta1 if name == "momentum" else 0.0)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, learning_rate, (beta1, beta2), fused=True)
        case "adafactor":
            optimizer = Adafactor(groups, learning_rate)
        case "lion":
            optimizer = Lion(groups, learning_rate, beta1, beta2)
        case "lamb":
            optimizer = LAMB(groups, learning_rate, beta1, beta2)
        case "muon":
            groups = muon_groups(model, weight_decay)
            optimizer = MuonAdamW(groups, learning_rate, beta1=beta1, beta2=beta2)
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
    return optimizer


# Schedules


POLYNOMIAL_POWER = 2
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "wsd")


def schedule_factor(
    name: str, step: float, max_steps: int, warmup_steps: int, cooldown_steps: int = 0, min_lr_ratio: float = 0.0
) -> float:
    """Share of the full learning rate at optimizer step `step` (0 to max_steps - 1) of `max_steps`.

    Every schedule rises in a straight line, (step + 1) / warmup_steps, then
    constant stays; linear, cosine and polynomial (power 2) fall from 1 to min_lr_ratio, which they would reach at step
    max_steps; inverse_sqrt is sqrt(warmup_steps / (step + 1)), topic 05's `noam_factor` (a warm-up of 0 counts as 1),
    lifted like the others to min_lr_ratio + (1 - min_lr_ratio) of it;
    wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays, and falls in a straight line in the last
    cooldown_steps. A cooldown can be asked of the others as well: their value is multiplied by that fall.
    A run that is measured in seconds may ask for steps between the whole ones.

    transformers' schedules start at 0, so that their first step moves nothing; these start at 1 / warmup_steps and
    reach 1 one step earlier. From step warmup_steps on, all but inverse_sqrt are equal to theirs.
    Raises ValueError for an unknown name, a warm-up and cooldown longer than the run, and a step outside it.
    """
    check_name("schedule", name, SCHEDULES)
    if not (max_steps >= 1 and warmup_steps >= 0 <= cooldown_steps and warmup_steps + cooldown_steps <= max_steps):
        raise ValueError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} must be >= 0 and together at most "
            f"max_steps={max_steps}; train longer or shorten them"
        )
    if name == "wsd" and not cooldown_steps:
        raise ValueError("schedule wsd needs cooldown_steps >= 1; a tenth to a fifth of max_steps is usual")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio must be >= 0 and <= 1, got {min_lr_ratio}")
    if not 0 <= step <= max_steps:
        raise ValueError(f"step {step} is outside 0 to max_steps={max_steps}; count optimizer steps, not micro-batches")
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)  # share of the decay that lies behind, 0 to 1
    match name:
        case "linear":
            left = 1 - done
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "polynomial":
            left = (1 - done) ** POLYNOMIAL_POWER
        case "inverse_sqrt":
            left = noam_factor(step + 1, max(1, warmup_steps))
        case _:
            left = 1.0
    if cooldown_steps:
        left *= cooldown_factor(step + 1, max_steps, cooldown_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * left


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its own full rate; of one that has no "base_lr" yet, the rate is the full one.

    Raises ValueError for a factor that is negative or not finite.
    """
    if not 0 <= factor < math.inf:
        raise ValueError(f"the factor on the learning rate must be finite and >= 0, got {factor}")
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


# Width: what must change with it, so that the best learning rate does not (the maximal update parametrisation)


def scale_for_width(model: CausalTransformer, base_width: int) -> CausalTransformer:
    """Change what a model computes by the rules of Yang et al. 2022 (table 8), equal to the usual at base_width.

    A sum over n = d_model terms grows like sqrt(n) while weights and activations are independent, and like n as soon as
    training has aligned them. Two sums start independent and end aligned, and shrink here by 1/n: the scores, which
    are divided by d_head instead of sqrt(d_head), and the logits. Topic 04's starting values need no change: embeddings
    and output have a fixed variance, hidden matrices 1 / fan_in up to a constant.

    Returns the same model; call it once. The scaling is no weight: a loaded model needs the same call again.
    """
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.scale = math.sqrt(base_width / module.n_heads) / module.d_head
    shrink_by = base_width / model.config.d_model
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * shrink_by)
    return model


def mup_groups(
    model: CausalTransformer, base_width: int, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW in which a hidden matrix learns base_width / d_model times as fast (Yang et al. 2022, table 8).

    Adam moves each entry by about the rate, whatever the gradient, and all n entries of a row in the direction that
    their inputs call for: the output of the row moves by n times the rate. A rate that shrinks like 1/n keeps that
    the same at every width. Vectors, embeddings and the output matrix (whose logits are divided instead) see no such
    sum. The decay of a hidden matrix grows by the same factor: lr * weight_decay, its shrinkage per step, stays.
    """
    ratio = model.config.d_model / base_width
    groups = muon_groups(model, weight_decay)  # the same split: hidden matrices, and two groups of others
    for group in groups:
        narrower = ratio if group.pop("rule") == "muon" else 1.0
        group["lr"] = group["base_lr"] = learning_rate / narrower
        group["weight_decay"] *= narrower
    return groups


# How many samples a step deserves: the gradient noise scale


@dataclass(frozen=True)
class GradientNoise:
    """The gradient of a loss, split into what all samples agree on and what they do not (McCandlish et al. 2018)."""

    signal: float  # squared length of the true gradient
    noise: float  # summed variance of the entries of one sample's gradient

    @property
    def scale(self) -> float:
        """Samples in a batch whose noise is as long as its signal; infinite if no signal was measured."""
        return self.noise / self.signal if self.signal > 0 else math.inf


def gradient_squares(model: nn.Module, losses: Iterable[Tensor]) -> tuple[list[float], float]:
    """Squared length of the gradient of each loss, and that of their mean; changes no `grad`.

    A parameter that a loss does not use counts as 0. Raises ValueError without a loss.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, squares = [torch.zeros_like(parameter) for parameter in parameters], []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        squares.append(sum(grad.square().sum().item() for grad in grads))
        for summed, grad in zip(total, grads, strict=True):
            summed.add_(grad)
    if not squares:
        raise ValueError("no losses; give at least one")
    return squares, sum(summed.square().sum().item() for summed in total) / len(squares) ** 2


def gradient_noise_scale(
    small_squares: Sequence[float], big_squares: Sequence[float], small_size: int, big_size: int
) -> GradientNoise:
    """Signal and noise from squared gradient lengths at two batch sizes (McCandlish et al. 2018, appendix A.1).

    The mean of B independent gradients has an expected squared length of signal + noise / B. Two sizes give two
    equations, and their solution is unbiased. Average the lengths over many batches first, as here: the ratio of two
    unbiased numbers is biased, and a single pair of batches can even give a signal below 0.
    Raises ValueError unless 1 <= small_size < big_size and both have at least one length.
    """
    if not 1 <= small_size < big_size:
        raise ValueError(f"small_size={small_size} must be >= 1 and below big_size={big_size}")
    if not small_squares or not big_squares:
        raise ValueError(f"need at least one length of each size, got {len(small_squares)} and {len(big_squares)}")
    small, big = sum(small_squares) / len(small_squares), sum(big_squares) / len(big_squares)
    signal = (big_size * big - small_size * small) / (big_size - small_size)
    noise = (small - big) / (1 / small_size - 1 / big_size)
    return GradientNoise(signal, noise)


# Bytes


class Undrawn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function.__name__ == "normal_" else function(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within the block models are made on the meta device: parameters have shapes but no numbers, and take no memory.

    Nothing is drawn: normal_ on that device would import PyTorch's compiler first, which takes two seconds.
    """
    with torch.device("meta"), Undrawn():
        yield


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps between steps, measured."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in kept)


def training_bytes(model: nn.Module, name: str) -> dict[str, int]:
    """Bytes of the weights, their gradients, and the state of build_optimizer(model, name, ...) after its first step.

    For n bytes of weights the state is 0 (sgd), n (momentum, lion), 2 n (lamb; adamw with a counter of 4 bytes for
    each tensor), n for hidden matrices and 2 n for the others (muon), and for adafactor n for vectors but only one
    column and one row of each matrix. Activations come on top, topic 04's `activation_bytes`. A model of
    `shapes_alone` is enough. Raises ValueError for an unknown optimizer.
    """
    check_name("optimizer", name, OPTIMIZERS)
    kinds, state, weights, gradients = parameter_kinds(model), 0, 0, 0
    for path, parameter in model.named_parameters():
        weights += parameter.nbytes
        if path not in kinds:
            continue
        gradients += parameter.nbytes
        match name:
            case "momentum" | "lion":
                state += parameter.nbytes
            case "lamb":
                state += 2 * parameter.nbytes
            case "adamw":
                state += 2 * parameter.nbytes + 4
            case "muon":
                state += parameter.nbytes * (1 if kinds[path] == "hidden" and parameter.dim() == 2 else 2)
            case "adafactor" if parameter.dim() > 1:
                rows, columns = parameter.shape[-2:]
                state += parameter.nbytes // rows + parameter.nbytes // columns
            case "adafactor":
                state += parameter.nbytes
    return {"weights": weights, "gradients": gradients, "state": state}
