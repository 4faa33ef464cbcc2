"""Exercises of topic 07: write each function in a file of your own, then

python 07-training-transformers/exercises_07.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from optimizers import QUINTIC, gradient_noise_scale, orthogonalise, parameter_groups, schedule_factor
from training_transformers import LossScaler, clip_gradients
from transformer_architecture import LayerNorm
from workbench import Exercise, first_difference, grade

# One step of AdamW


def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad**2
    direction = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
    return parameter - learning_rate * (direction + weight_decay * parameter), first, second


def check_adamw_step(answer: Callable) -> str | None:
    cases = {
        "no decay": (0.1, 0.9, 0.999, 1e-8, 0.0),
        "decay 0.5": (0.02, 0.8, 0.95, 1e-8, 0.5),
        "a large eps": (0.1, 0.9, 0.99, 0.3, 0.1),
    }
    for name, (learning_rate, beta1, beta2, eps, weight_decay) in cases.items():
        generator = torch.Generator().manual_seed(0)
        theirs = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        options = {"lr": learning_rate, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        optimizer = torch.optim.AdamW([theirs], **options)
        ours = (theirs.detach().clone(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double())
        for step in range(1, 5):
            grad = torch.randn(3, 2, generator=generator, dtype=torch.float64) * 10.0 ** (1 - step)
            theirs.grad = grad.clone()
            optimizer.step()
            ours = answer(ours[0], grad, *ours[1:], step, learning_rate, beta1, beta2, eps, weight_decay)
            if not (isinstance(ours, tuple | list) and len(ours) == 3):
                return f"expected (parameter, first, second), got {ours!r}"
            state = optimizer.state[theirs]
            wanted = {"parameter": theirs.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}
            for got, (what, want) in zip(ours, wanted.items(), strict=True):
                if difference := first_difference(got, want, 1e-9):
                    return f"{name}, step {step}, {what}: {difference}"
    return None


def adamw_with(direction_of: Callable) -> Callable:
    """A wrong solution: the right moments, another change of the parameter."""

    def wrong(parameter, grad, first, second, step, learning_rate, beta1, beta2, eps, weight_decay):
        _, first, second = adamw_step(parameter, grad, first, second, step, learning_rate, beta1, beta2, eps, 0.0)
        corrected = first / (1 - beta1**step), second / (1 - beta2**step)
        changed = direction_of(parameter, first, second, *corrected, learning_rate, eps, weight_decay)
        return changed, first, second

    return wrong


def adam_with_l2(parameter, grad, first, second, step, learning_rate, beta1, beta2, eps, weight_decay):
    grad = grad + weight_decay * parameter
    return adamw_step(parameter, grad, first, second, step, learning_rate, beta1, beta2, eps, 0.0)


# Newton-Schulz


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], n_steps: int) -> Tensor:
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def check_newton_schulz(answer: Callable) -> str | None:
    generator = torch.Generator().manual_seed(1)
    cubic = (1.5, -0.5, 0.0)
    for rows, columns, coefficients, n_steps, scale in (
        (1, 1, QUINTIC, 1, 1.0),
        (3, 3, QUINTIC, 1, 1.0),
        (3, 5, QUINTIC, 5, 1.0),
        (6, 2, QUINTIC, 5, 1e-4),
        (4, 4, cubic, 12, 50.0),
        (3, 2, QUINTIC, 5, 0.0),
    ):
        matrix = scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        given = matrix.clone()
        got = answer(matrix, coefficients, n_steps)
        case = f"a {rows} x {columns} matrix of scale {scale}, {n_steps} steps with {coefficients}"
        if not torch.equal(matrix, given):
            return f"{case}: it changed the matrix that it was given; work on a new one"
        if difference := first_difference(got, orthogonalise(matrix, n_steps, coefficients), 1e-9):
            return f"{case}: {difference}"
    return None


def schulz_with(normalise: Callable, change: Callable) -> Callable:
    """A wrong solution: another first scale, or another polynomial."""

    def wrong(matrix, coefficients, n_steps):
        x = normalise(matrix)
        for _ in range(n_steps):
            x = change(x, *coefficients)
        return x

    return wrong


def frobenius(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm().clamp(min=1e-7)


def quintic(x: Tensor, a: float, b: float, c: float) -> Tensor:
    return a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x


# The schedule


def rate_at(step: int, max_steps: int, warmup_steps: int, peak: float, min_lr_ratio: float) -> float:
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


def check_rate_at(answer: Callable) -> str | None:
    for max_steps, warmup_steps, peak, min_lr_ratio in ((100, 10, 3e-4, 0.1), (37, 0, 0.02, 0.0), (8, 7, 1.0, 0.5)):
        for step in (0, 1, warmup_steps - 1, warmup_steps, warmup_steps + 1, max_steps // 2, max_steps - 1):
            if not 0 <= step < max_steps:
                continue
            got = answer(step, max_steps, warmup_steps, peak, min_lr_ratio)
            want = peak * schedule_factor("cosine", step, max_steps, warmup_steps, min_lr_ratio=min_lr_ratio)
            if difference := first_difference(got, want, 1e-9 * peak):
                return (
                    f"step {step} of {max_steps}, warm-up {warmup_steps}, peak {peak}, min_lr_ratio {min_lr_ratio}: "
                    f"{difference}"
                )
    return None


def starts_at_zero(step, max_steps, warmup_steps, peak, min_lr_ratio):
    later = rate_at(step, max_steps, warmup_steps, peak, min_lr_ratio)
    return peak * step / warmup_steps if step < warmup_steps else later


# Accumulation


def accumulated_gradient(parameter: Tensor, micro_batches: list, token_losses: Callable) -> Tensor:
    total, n_tokens = torch.zeros_like(parameter), 0
    for micro_batch in micro_batches:
        losses = token_losses(parameter, micro_batch)
        if len(losses):
            total += torch.autograd.grad(losses.sum(), parameter)[0]
            n_tokens += len(losses)
    return total / max(1, n_tokens)


def squared_errors(parameter: Tensor, micro_batch: list[float]) -> Tensor:
    """One loss per real token: how far the token's number is from a line through the parameter's two entries."""
    values = torch.tensor(micro_batch, dtype=parameter.dtype)
    return (values * parameter[0] + parameter[1] - values**2) ** 2


def check_accumulated_gradient(answer: Callable) -> str | None:
    cases = {
        "one micro-batch": [[1.0, 2.0, -1.0]],
        "two of equal length": [[1.0, 2.0], [3.0, -1.0]],
        "three of 4, 1 and 2 tokens": [[1.0, 2.0, 3.0, 4.0], [-2.0], [0.5, -1.0]],
        "one of them has no real token": [[1.0, 2.0, 3.0], [], [-1.0]],
        "no real token at all": [[], []],
    }
    for name, micro_batches in cases.items():
        parameter = torch.tensor([0.5, -0.25], dtype=torch.float64, requires_grad=True)
        got = answer(parameter, [list(batch) for batch in micro_batches], squared_errors)
        want = accumulated_gradient(parameter, micro_batches, squared_errors)
        if difference := first_difference(got, want, 1e-9):
            return f"{name}: {difference}; it must equal the gradient of the mean over all tokens in one batch"
    return None


def accumulated_with(share: Callable) -> Callable:
    """A wrong solution: every micro-batch counts with another share."""

    def wrong(parameter, micro_batches, token_losses):
        losses = [token_losses(parameter, batch) for batch in micro_batches]
        total = sum(loss.sum() * share(len(loss), [len(one) for one in losses]) for loss in losses)
        return torch.autograd.grad(total, parameter)[0]

    return wrong


def mean_of_means(parameter, micro_batches, token_losses):
    means = [token_losses(parameter, batch).mean() for batch in micro_batches if batch]
    if not means:
        return torch.zeros_like(parameter)
    return torch.autograd.grad(sum(means) / len(means), parameter)[0]


# The loss scaler


def next_scale(scale: float, n_good: int, overflow: bool, growth_interval: int) -> tuple[float, int, bool]:
    if overflow:
        return scale / 2, 0, False
    if n_good + 1 == growth_interval:
        return scale * 2, 0, True
    return scale, n_good + 1, True


def check_next_scale(answer: Callable) -> str | None:
    for growth_interval in (1, 3):
        scaler, mine, history = LossScaler(1024.0, growth_interval=growth_interval), (1024.0, 0), ""
        for overflow in (False, False, True, False, False, False, True, True, False, False, False, False):
            history += "x" if overflow else "."
            found = answer(*mine, overflow, growth_interval)
            scaler.update(overflow)
            if not (isinstance(found, tuple | list) and len(found) == 3):
                return f"expected (scale, n_good, take_step), got {found!r}"
            wanted = {"scale": scaler.scale, "n_good": scaler.n_good, "take_step": not overflow}
            for got, (what, want) in zip(found, wanted.items(), strict=True):
                if difference := first_difference(got, want, 1e-9):
                    return (
                        f"growth_interval {growth_interval}, steps so far {history} (x: overflow), {what}: {difference}"
                    )
            mine = tuple(found[:2])
    return None


# Clipping


def clip_by_global_norm(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))
    factor = min(1.0, max_norm / norm) if norm else 1.0
    return [factor * gradient for gradient in gradients], norm


def check_clip_by_global_norm(answer: Callable) -> str | None:
    cases = {
        "norm 5 against 1": ([[3.0], [0.0, 4.0]], 1.0),
        "norm 5 against 10, nothing to do": ([[3.0], [0.0, 4.0]], 10.0),
        "one large and one small tensor": ([[30.0, 40.0], [0.1, -0.2, 0.2]], 2.0),
        "all zero": ([[0.0, 0.0], [0.0]], 1.0),
    }
    for name, (values, max_norm) in cases.items():
        gradients = [torch.tensor(value, dtype=torch.float64) for value in values]
        clipped = [gradient.clone() for gradient in gradients]
        norm = clip_gradients(clipped, max_norm)
        found = answer([gradient.clone() for gradient in gradients], max_norm)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"expected (gradients, norm), got {found!r}"
        if difference := first_difference(list(found[0]), clipped, 1e-5 * max_norm):
            return f"{name}, gradients: {difference}; one factor for all tensors keeps the direction"
        if difference := first_difference(float(found[1]), norm, 1e-6):
            return f"{name}, norm: {difference}; report the norm before clipping"
    return None


def clips_each_tensor(gradients, max_norm):
    clipped = [clip_by_global_norm([gradient], max_norm)[0][0] for gradient in gradients]
    return clipped, clip_by_global_norm(gradients, max_norm)[1]


def clips_values(gradients, max_norm):
    return [gradient.clamp(-max_norm, max_norm) for gradient in gradients], clip_by_global_norm(gradients, max_norm)[1]


def always_rescales(gradients, max_norm):
    norm = clip_by_global_norm(gradients, max_norm)[1]
    return [gradient * max_norm / max(norm, 1e-12) for gradient in gradients], norm


def reports_the_clipped_norm(gradients, max_norm):
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    return clipped, min(norm, max_norm)


# The gradient noise scale


def noise_scale(small: list[float], large: list[float], small_batch: int, large_batch: int) -> float:
    signal = [
        (large_batch * b - small_batch * s) / (large_batch - small_batch) for s, b in zip(small, large, strict=True)
    ]
    noise = [(s - b) / (1 / small_batch - 1 / large_batch) for s, b in zip(small, large, strict=True)]
    return sum(noise) / sum(signal)


def check_noise_scale(answer: Callable) -> str | None:
    cases = {
        "true gradient 4 squared, noise 96, without scatter": ([16 + 96 / 8], [16 + 96 / 64], 8, 64),
        "the same from batches of 1 and 2": ([16 + 96.0], [16 + 48.0], 1, 2),
        "no noise": ([9.0, 9.0], [9.0, 9.0], 4, 32),
        "four scattered measurements": ([30.0, 22.0, 41.0, 26.0], [17.0, 18.5, 15.0, 19.5], 8, 64),
    }
    for name, (small, large, small_batch, large_batch) in cases.items():
        got = answer(list(small), list(large), small_batch, large_batch)
        want = gradient_noise_scale(small, large, small_batch, large_batch).scale
        if difference := first_difference(got, want, 1e-9 * max(1.0, want)):
            return f"{name}, batches of {small_batch} and {large_batch}: {difference}"
    return None


def mean_of_ratios(small, large, small_batch, large_batch):
    pairs = zip(small, large, strict=True)
    return sum(noise_scale([s], [b], small_batch, large_batch) for s, b in pairs) / len(small)


def takes_the_large_batch_as_truth(small, large, small_batch, large_batch):
    return sum(s - b for s, b in zip(small, large, strict=True)) * small_batch / sum(large)


# Parameter groups


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keeps_size = parameter.dim() < 2 or id(parameter) in tables
            (spared if keeps_size else decayed).append(name)
    return decayed, spared


class TinyModel(nn.Module):
    """A model with everything that goes wrong: norms, biases, a learned scalar, tied and frozen weights."""

    def __init__(self, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.words = nn.Embedding(7, 4)
        self.attn_norm = LayerNorm(4)
        self.q_proj = nn.Linear(4, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.lm_head.weight = self.words.weight
        if frozen:
            self.q_proj.weight.requires_grad_(False)
            self.attn_norm.bias.requires_grad_(False)


def names_in_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the parameters in the course's own groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {bool(group["weight_decay"]): group["params"] for group in parameter_groups(model, 0.1)}
    return tuple([names[id(parameter)] for parameter in groups[decays]] for decays in (True, False))


def check_decay_groups(answer: Callable) -> str | None:
    cases = {"a plain model": (False, False), "tied embedding": (True, False), "frozen parts": (False, True)}
    for case, flags in cases.items():
        found, want = answer(TinyModel(*flags)), names_in_groups(TinyModel(*flags))
        if not (isinstance(found, tuple | list) and len(found) == 2):
            return f"expected (decayed, not_decayed), two lists of names, got {found!r}"
        for what, got, wanted in zip(("decayed", "not decayed"), map(list, found), want, strict=True):
            if twice := {name for name in got if got.count(name) > 1}:
                return f"{case}: {sorted(twice)[0]} is listed twice"
            if missing := sorted(set(wanted) - set(got)):
                return f"{case}: {missing[0]} should be {what}"
            if extra := sorted(set(got) - set(wanted)):
                return f"{case}: {extra[0]} should not be {what}"
    return None


def decays(model: nn.Module, parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and parameter is not model.words.weight


def groups_by(rule: Callable, duplicates: bool = False, frozen: bool = False) -> Callable:
    """A wrong solution: another rule, or every name of a shared weight, or frozen weights too."""

    def wrong(model):
        named = dict(model.named_parameters(remove_duplicate=not duplicates))
        kept = {name: parameter for name, parameter in named.items() if frozen or parameter.requires_grad}
        chosen = [name for name, parameter in kept.items() if rule(model, name, parameter)]
        return chosen, [name for name in kept if name not in chosen]

    return wrong


# A checkpoint's manifest


def damaged_file(folder: Path) -> str | None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in sorted(manifest):
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != manifest[name]:
            return name
    return None


def write_checkpoint(folder: Path) -> None:
    files = {"model.bin": bytes(range(256)) * 20, "optimizer.bin": b"\r\n\x00" * 999, "state.json": b'{"step": 3}\n'}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps(digests), encoding="utf-8")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing is damaged": lambda folder: None,
    "one bit of model.bin is flipped near its end": lambda folder: flip(folder / "model.bin", 5100),
    "optimizer.bin lacks its last byte": lambda folder: (folder / "optimizer.bin").write_bytes(
        b"\r\n\x00" * 998 + b"\r\n"
    ),
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    "model.bin is empty": lambda folder: (folder / "model.bin").write_bytes(b""),
    "state.json has another step, at the same length": lambda folder: (folder / "state.json").write_bytes(
        b'{"step": 4}\n'
    ),
    "a stray temporary file lies beside": lambda folder: (folder / ".model.bin.tmp.7").write_bytes(b"half"),
}


def check_damaged_file(answer: Callable) -> str | None:
    for name, damage in DAMAGES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_checkpoint(folder)
            damage(folder)
            got, want = answer(folder), damaged_file(folder)
        if got != want:
            return f"{name}: {got!r}, expected {want!r}"
    return None


def damaged_if(broken: Callable) -> Callable:
    """A wrong solution: another sign of damage."""

    def wrong(folder):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return next((name for name in sorted(manifest) if broken(folder / name, manifest[name])), None)

    return wrong


def only_what_is_there(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json" and hashlib.sha256(path.read_bytes()).hexdigest() != manifest.get(path.name):
            return path.name
    return None


EXERCISES = [
    Exercise(
        name="adamw_step",
        statement="One step of AdamW (the first has step 1): the new parameter and the two new moments.",
        signature=(
            "adamw_step(parameter, grad, first, second, step, learning_rate, beta1, beta2, eps, weight_decay) "
            "-> (parameter, first, second), three new tensors"
        ),
        hint="The decay multiplies the old parameter by 1 - learning_rate * weight_decay and never meets the moments.",
        check=check_adamw_step,
        solution=adamw_step,
        mistakes={
            "L2 in the gradient (Adam with weight_decay)": adam_with_l2,
            "no bias correction": adamw_with(
                lambda p, first, second, m, u, rate, eps, decay: p - rate * (first / (second.sqrt() + eps) + decay * p)
            ),
            "eps inside the root": adamw_with(
                lambda p, first, second, m, u, rate, eps, decay: p - rate * (m / (u + eps).sqrt() + decay * p)
            ),
            "the decay is not multiplied by the learning rate": adamw_with(
                lambda p, first, second, m, u, rate, eps, decay: p - rate * m / (u.sqrt() + eps) - decay * p
            ),
            "the decay acts on the new parameter": adamw_with(
                lambda p, first, second, m, u, rate, eps, decay: (p - rate * m / (u.sqrt() + eps)) * (1 - rate * decay)
            ),
            "the moments keep what they were": lambda parameter, grad, first, second, *rest: (
                adamw_step(parameter, grad, first, second, *rest)[0],
                first,
                second,
            ),
        },
    ),
    Exercise(
        name="newton_schulz",
        statement=(
            "Muon's orthogonalisation: divide by the Frobenius norm, then n_steps times "
            "x <- a x + b (x x^T) x + c (x x^T)^2 x. A zero matrix stays zero."
        ),
        signature="newton_schulz(matrix, coefficients, n_steps) -> matrix of the same shape; coefficients: (a, b, c)",
        hint="Compute x x^T once per step. Clamp the norm from below, so that 0 / 0 cannot happen.",
        check=check_newton_schulz,
        solution=newton_schulz,
        mistakes={
            "no first division by the norm": schulz_with(lambda matrix: matrix, quintic),
            "divided by the largest singular value": schulz_with(
                lambda matrix: matrix / torch.linalg.matrix_norm(matrix, 2).clamp(min=1e-7), quintic
            ),
            "the polynomial of each entry": schulz_with(frobenius, lambda x, a, b, c: a * x + b * x**3 + c * x**5),
            "the fifth power is left out": schulz_with(frobenius, lambda x, a, b, c: quintic(x, a, b, 0.0)),
            "0 / 0 for a zero matrix": schulz_with(lambda matrix: matrix / matrix.norm(), quintic),
            "normalised again in every step": schulz_with(
                lambda matrix: matrix, lambda x, a, b, c: quintic(frobenius(x), a, b, c)
            ),
        },
    ),
    Exercise(
        name="rate_at",
        statement=(
            "Learning rate at a step (the first is 0): a straight rise that reaches the peak at step warmup_steps - 1, "
            "then half a cosine from the peak at warmup_steps down to min_lr_ratio * peak at max_steps."
        ),
        signature="rate_at(step, max_steps, warmup_steps, peak, min_lr_ratio) -> float",
        hint="The cosine's argument runs from 0 to pi over max_steps - warmup_steps steps, not over max_steps.",
        check=check_rate_at,
        solution=rate_at,
        mistakes={
            "the first step has rate 0 and is wasted": starts_at_zero,
            "the cosine runs over all steps": lambda step, max_steps, warmup_steps, peak, min_lr_ratio: (
                peak * (step + 1) / warmup_steps
                if step < warmup_steps
                else rate_at(step, max_steps, 0, peak, min_lr_ratio)
            ),
            "the minimum is added on top": lambda step, max_steps, warmup_steps, peak, min_lr_ratio: (
                rate_at(step, max_steps, warmup_steps, peak, 0.0) + (step >= warmup_steps) * min_lr_ratio * peak
            ),
            "a straight fall": lambda step, max_steps, warmup_steps, peak, min_lr_ratio: (
                rate_at(step, max_steps, warmup_steps, peak, min_lr_ratio)
                if step < warmup_steps
                else peak * (1 - (1 - min_lr_ratio) * (step - warmup_steps) / max(1, max_steps - warmup_steps))
            ),
            "a whole cosine, which rises again": lambda step, max_steps, warmup_steps, peak, min_lr_ratio: rate_at(
                warmup_steps + 2 * (step - warmup_steps) if step >= warmup_steps else step,
                max_steps,
                warmup_steps,
                peak,
                min_lr_ratio,
            ),
        },
    ),
    Exercise(
        name="accumulated_gradient",
        statement=(
            "Gradient of the mean loss over all real tokens of several micro-batches, for a parameter. "
            "token_losses(parameter, micro_batch) gives one loss per real token, perhaps none. No tokens at all: zeros."
        ),
        signature="accumulated_gradient(parameter, micro_batches, token_losses) -> tensor like the parameter",
        hint="Add up gradients of sums, and count tokens; divide once, at the end.",
        check=check_accumulated_gradient,
        solution=accumulated_gradient,
        mistakes={
            "the mean of the micro-batches' means": mean_of_means,
            "the sum is never divided": accumulated_with(lambda n, all_n: 1.0),
            "divided by the number of micro-batches": accumulated_with(lambda n, all_n: 1.0 / len(all_n)),
            "each divided by its own tokens, then added": accumulated_with(lambda n, all_n: 1.0 / max(1, n)),
            "only the last micro-batch counts": lambda parameter, micro_batches, token_losses: accumulated_gradient(
                parameter, micro_batches[-1:], token_losses
            ),
            "all micro-batches taken to be as long as the first": accumulated_with(
                lambda n, all_n: 1.0 / max(1, all_n[0] * len(all_n))
            ),
        },
    ),
    Exercise(
        name="next_scale",
        statement=(
            "A loss scaler's rule after one step: on overflow halve the scale, restart the count of good steps and "
            "skip the update; after growth_interval good steps in a row double it and restart the count."
        ),
        signature="next_scale(scale, n_good, overflow, growth_interval) -> (scale, n_good, take_step)",
        hint="Three cases. A good step that completes the interval is itself still taken.",
        check=check_next_scale,
        solution=next_scale,
        mistakes={
            "the step is taken with infinite gradients": lambda scale, n_good, overflow, growth_interval: (
                *next_scale(scale, n_good, overflow, growth_interval)[:2],
                True,
            ),
            "an overflow does not restart the count": lambda scale, n_good, overflow, growth_interval: (
                (scale / 2, n_good, False) if overflow else next_scale(scale, n_good, overflow, growth_interval)
            ),
            "never grows": lambda scale, n_good, overflow, growth_interval: (
                scale / 2 if overflow else scale,
                0 if overflow else n_good + 1,
                not overflow,
            ),
            "grows one step too late": lambda scale, n_good, overflow, growth_interval: next_scale(
                scale, n_good, overflow, growth_interval + 1
            ),
            "halves but goes on counting upwards for ever": lambda scale, n_good, overflow, growth_interval: (
                (scale / 2, 0, False)
                if overflow
                else (scale * (2 if (n_good + 1) % growth_interval == 0 else 1), n_good + 1, True)
            ),
        },
    ),
    Exercise(
        name="clip_by_global_norm",
        statement=(
            "Scale all gradients by one factor so that the norm of all of them together is at most max_norm; also "
            "return that norm before clipping."
        ),
        signature="clip_by_global_norm(gradients, max_norm) -> (list of new gradients, float)",
        hint="The squared norm of all tensors is the sum of their squared norms. Gradients within the limit stay.",
        check=check_clip_by_global_norm,
        solution=clip_by_global_norm,
        mistakes={
            "every tensor by itself, which turns the direction": clips_each_tensor,
            "every entry by itself": clips_values,
            "small gradients are blown up to max_norm": always_rescales,
            "the norm after clipping": reports_the_clipped_norm,
            "the sum of the norms": lambda gradients, max_norm: (
                clip_by_global_norm(gradients, max_norm)[0],
                sum(float(gradient.norm()) for gradient in gradients),
            ),
        },
    ),
    Exercise(
        name="noise_scale",
        statement=(
            "The gradient noise scale (noise / signal) from lists of squared gradient norms, measured with small and "
            "with large batches; average noise and signal first, then divide."
        ),
        signature="noise_scale(small, large, small_batch, large_batch) -> float, in the unit of the batch sizes",
        hint="E[norm^2 at batch B] = signal + noise / B: two equations for two unknowns.",
        check=check_noise_scale,
        solution=noise_scale,
        mistakes={
            "the mean of the ratios": mean_of_ratios,
            "the large batch's norm is taken for the true one": takes_the_large_batch_as_truth,
            "signal over noise": lambda small, large, small_batch, large_batch: (
                1 / max(1e-9, noise_scale(small, large, small_batch, large_batch))
            ),
            "norms that are not squared": lambda small, large, small_batch, large_batch: noise_scale(
                [s**0.5 for s in small], [b**0.5 for b in large], small_batch, large_batch
            ),
            "the batch sizes exchanged": lambda small, large, small_batch, large_batch: noise_scale(
                small, large, large_batch, small_batch
            ),
        },
    ),
    Exercise(
        name="decay_groups",
        statement=(
            "Names of the trainable parameters in two lists: those with weight decay (two or more axes, but not the "
            "weight of an nn.Embedding) and those without. A shared weight counts once, under its first name."
        ),
        signature="decay_groups(model) -> (decayed, not_decayed), two lists of names",
        hint="named_parameters() lists a shared weight once. Ask what a parameter is, not what it is called.",
        check=check_decay_groups,
        solution=decay_groups,
        mistakes={
            "everything decays": groups_by(lambda model, name, parameter: True),
            "by name: only biases are spared, so the norms' weights decay": groups_by(
                lambda model, name, parameter: decays(model, parameter) or name.endswith("norm.weight")
            ),
            "all that has two or more axes, embeddings too": groups_by(
                lambda model, name, parameter: parameter.dim() >= 2
            ),
            "embeddings known by their name, which a tied output matrix does not have": groups_by(
                lambda model, name, parameter: parameter.dim() >= 2 and not name.startswith("words")
            ),
            "a tied weight is listed twice": groups_by(
                lambda model, name, parameter: decays(model, parameter), duplicates=True
            ),
            "frozen parameters too": groups_by(lambda model, name, parameter: decays(model, parameter), frozen=True),
            "exactly two axes": groups_by(
                lambda model, name, parameter: decays(model, parameter) and parameter.dim() == 2
            ),
        },
    ),
    Exercise(
        name="damaged_file",
        statement=(
            "folder/manifest.json maps the name of each file to its SHA-256 in hexadecimal. The first name, in "
            "alphabetical order, whose file is missing or has other bytes; None if all is well."
        ),
        signature="damaged_file(folder) -> str | None; folder is a pathlib.Path",
        hint="hashlib.sha256(path.read_bytes()).hexdigest(). Go through the manifest, not through the folder.",
        check=check_damaged_file,
        solution=damaged_file,
        mistakes={
            "only looks whether the files exist": damaged_if(lambda path, digest: not path.exists()),
            "only looks for empty and missing files": damaged_if(
                lambda path, digest: not path.exists() or path.stat().st_size == 0
            ),
            "hashes only the first kilobyte": damaged_if(
                lambda path, digest: (
                    not path.exists()
                    or (path.stat().st_size <= 1024 and hashlib.sha256(path.read_bytes()).hexdigest() != digest)
                )
            ),
            "goes through the folder": only_what_is_there,
            "raises where a file is missing": damaged_if(
                lambda path, digest: hashlib.sha256(path.read_bytes()).hexdigest() != digest
            ),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
