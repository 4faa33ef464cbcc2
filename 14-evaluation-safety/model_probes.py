"""Topic 14 - Model probes: what can be read from the stream of a model, and what happens when it is changed there.

    depths = residual_stream(model, rows)                    # one list of states for each depth, (seq, d_model) a row
    probe = LinearProbe.fit(states, labels); probe.accuracy(fresh, truth)
    selectivity(...)                                         # accuracy less that on labels drawn for each word by lot
    lens(model, rows)                                        # what the model would say if it stopped at each depth
    direction = mean_difference(refused, answered); without_direction(model, direction)

Alain and Bengio 2016 (arXiv 1610.01644), Hewitt and Liang 2019 (control tasks, arXiv 1909.03368), nostalgebraist 2020
(logit lens), Belrose et al. 2023 (tuned lens, arXiv 2303.08112), Arditi et al. 2024 (refusal, arXiv 2406.11717).
"""

import copy
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modern_llm_architectures import CausalLM
from sequence_modeling import device_of

# The stream at every depth


@contextmanager
def recorded(model: CausalLM) -> Iterator[list[Tensor]]:
    """Within the block each forward pass leaves the stream (batch, seq, d_model) at every depth in the list.

    Depth 0 is the embedding, then two for each block: after its attention and after its feed-forward network.
    """
    found: list[Tensor] = []

    def attended(block: nn.Module, given: tuple, made: Tensor) -> None:
        found.append(found[-1] + made)

    handles = [model.token_emb.register_forward_hook(lambda layer, given, made: found.append(made))]
    for block in model.blocks:
        handles.append(block.self_attn.register_forward_hook(attended))
        handles.append(block.register_forward_hook(lambda layer, given, made: found.append(made)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def depth_names(model: CausalLM) -> list[str]:
    """What stands at each depth of `residual_stream`."""
    blocks = [f"{part} {number}" for number in range(1, len(model.blocks) + 1) for part in ("attention", "block")]
    return ["embedding", *blocks]


@torch.no_grad()
def residual_stream(model: CausalLM, rows: Sequence[list[int]], batch_size: int = 64) -> list[list[Tensor]]:
    """For each depth, for each row of ids, its states (seq, d_model). Raises ValueError for a row without ids."""
    if not rows or not all(rows):
        raise ValueError("every row needs at least one id")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in depth_names(model)]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(rows[index]) for index in chosen], batch_first=True)
        with recorded(model) as depths:
            model.hidden(ids.to(device_of(model)))  # padding on the right, where nothing looks at it
        for depth, states in enumerate(depths):
            for place, index in enumerate(chosen):
                found[depth][index] = states[place, : len(rows[index])].cpu()
    return found


# Linear probes


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised states."""

    weight: Tensor  # (classes, d_model)
    bias: Tensor  # (classes)
    centre: Tensor  # (d_model)
    scale: Tensor  # (d_model)
    classes: tuple[Hashable, ...]

    @classmethod
    def fit(cls, states: Tensor, labels: Sequence[Hashable], decay: float = 1e-3, n_steps: int = 100) -> "LinearProbe":
        """Minimise mean cross-entropy + decay / 2 * |weights|^2 by L-BFGS, in float64; nothing is random.

        states (rows, d_model). Raises ValueError for fewer than two classes, or states and labels of other lengths.
        """
        if len(states) != len(labels):
            raise ValueError(f"{len(states)} states but {len(labels)} labels; give one for each")
        classes = tuple(sorted(set(labels), key=str))
        if len(classes) < 2:
            raise ValueError(f"a probe needs at least 2 classes, got {len(classes)}: {list(classes)}")
        places = {label: place for place, label in enumerate(classes)}
        targets = torch.tensor([places[label] for label in labels])
        states = states.double()
        centre, scale = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
        given = (states - centre) / scale  # (rows, d_model)
        weight = torch.zeros(len(classes), states.shape[1], dtype=torch.double, requires_grad=True)
        bias = torch.zeros(len(classes), dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=n_steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(given @ weight.T + bias, targets) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(weight.detach(), bias.detach(), centre, scale, classes)

    def guesses(self, states: Tensor) -> list[Hashable]:
        """The likeliest class of each state (rows, d_model)."""
        logits = (states.double() - self.centre) / self.scale @ self.weight.T + self.bias  # (rows, classes)
        return [self.classes[place] for place in logits.argmax(dim=1).tolist()]

    def right(self, states: Tensor, labels: Sequence[Hashable]) -> list[bool]:
        """Whether each guess is the label."""
        return [guess == label for guess, label in zip(self.guesses(states), labels, strict=True)]

    def accuracy(self, states: Tensor, labels: Sequence[Hashable]) -> float:
        return sum(self.right(states, labels)) / len(labels)


class Probed(NamedTuple):
    """Accuracies of one probe: on the task, on labels drawn by lot for each type, and of the most frequent label."""

    task: list[bool]
    control: list[bool]
    majority: float

    @property
    def accuracy(self) -> float:
        return sum(self.task) / len(self.task)

    @property
    def selectivity(self) -> float:
        """Hewitt and Liang 2019, section 2.2: what the states add to what a probe of this size can learn by heart."""
        return self.accuracy - sum(self.control) / len(self.control)


def control_labels(types: Sequence[Hashable], labels: Sequence[Hashable], seed: int) -> list[Hashable]:
    """A control task: every type (such as a word) gets one label by lot, for all its places, with the labels' shares.

    Nothing but the type can tell it, so a probe that does well on it has learned the types by heart.
    """
    if len(types) != len(labels):
        raise ValueError(f"{len(types)} types but {len(labels)} labels; give one for each")
    rng, pool = random.Random(seed), list(labels)
    drawn: dict[Hashable, Hashable] = {}
    return [drawn.setdefault(kind, pool[int(rng.random() * len(pool))]) for kind in types]


def probed(
    states: Tensor,
    labels: Sequence[Hashable],
    types: Sequence[Hashable],
    n_train: int,
    seed: int,
    decay: float = 1e-3,
) -> Probed:
    """A probe and its control, both fitted on the first n_train states and examined on the others."""
    if not 0 < n_train < len(states):
        raise ValueError(f"n_train={n_train} must leave some of the {len(states)} states to examine")
    lots, found = control_labels(types, labels, seed), []
    for truth in (labels, lots):
        probe = LinearProbe.fit(states[:n_train], truth[:n_train], decay)
        found.append(probe.right(states[n_train:], truth[n_train:]))
    rest = list(labels[n_train:])
    majority = max(rest.count(label) for label in set(rest)) / len(rest)
    return Probed(found[0], found[1], majority)


# Lenses: the answer at every depth


class Lens(NamedTuple):
    """How far each depth is from what the model says in the end, over all positions."""

    nats: list[float]  # KL(final || depth), nats per position
    same: list[float]  # share of positions whose likeliest token is already the final one
    loss: list[float]  # nats per token of the ids that come next


@torch.no_grad()
def lens(model: CausalLM, rows: Sequence[list[int]], translators: Sequence[nn.Module] | None = None) -> Lens:
    """The last norm and the head put on the stream of every depth (the logit lens).

    translators: one affine map for each depth before the last, applied first (the tuned lens, see `tuned_lens`).
    """
    streams = residual_stream(model, rows)
    final = torch.cat([model.logits(model.final_norm(state))[:-1] for state in streams[-1]]).log_softmax(-1)
    targets = torch.tensor([token_id for row in rows for token_id in row[1:]])
    nats, same, loss = [], [], []
    for depth, stream in enumerate(streams):
        states = torch.cat([state[:-1] for state in stream])  # (tokens, d_model)
        if translators is not None and depth < len(translators):
            states = states + translators[depth](states)  # (tokens, d_model)
        logs = model.logits(model.final_norm(states)).log_softmax(-1)  # (tokens, vocab)
        nats.append((final.exp() * (final - logs)).sum(dim=-1).mean().item())
        same.append((logs.argmax(-1) == final.argmax(-1)).double().mean().item())
        loss.append(F.nll_loss(logs, targets).item())
    return Lens(nats, same, loss)


def tuned_lens(
    model: CausalLM, rows: Sequence[list[int]], n_steps: int = 200, batch_size: int = 1024, seed: int = 0
) -> list[nn.Module]:
    """For each depth before the last an affine map that begins at 0 and is trained to make its lens say what the model
    says in the end: mean KL(final || lens), Belrose et al. 2023, section 2.
    """
    streams = residual_stream(model, rows)
    columns = [torch.cat([state[:-1] for state in stream]) for stream in streams]  # each (tokens, d_model)
    found, generator = [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        final = model.logits(model.final_norm(columns[-1])).log_softmax(-1)  # (tokens, vocab)
    for states in columns[:-1]:
        layer = nn.Linear(states.shape[1], states.shape[1])
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
        for step in range(n_steps):
            chosen = torch.randint(len(states), (min(batch_size, len(states)),), generator=generator)
            moved = states[chosen] + layer(states[chosen])  # (tokens, d_model)
            logs = model.logits(model.final_norm(moved)).log_softmax(-1)  # (tokens, vocab)
            loss = (final[chosen].exp() * (final[chosen] - logs)).sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward(inputs=list(layer.parameters()))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / n_steps)
            optimizer.step()
        found.append(layer.requires_grad_(False))
    return found


# Directions: what the stream lacks, or has too much of, when the model refuses


def last_states(model: CausalLM, rows: Sequence[list[int]]) -> list[Tensor]:
    """The stream at the last position of each row, for each depth: (rows, d_model)."""
    return [torch.stack([state[-1] for state in stream]) for stream in residual_stream(model, rows)]


def mean_difference(one: Tensor, other: Tensor) -> Tensor:
    """The mean of `one` less the mean of `other` (rows, d_model), not normalised (Arditi et al. 2024, section 2.3)."""
    if not len(one) or not len(other):
        raise ValueError(f"a difference of means needs states on both sides, got {len(one)} and {len(other)}")
    return one.mean(dim=0) - other.mean(dim=0)


def random_direction(like: Tensor, seed: int) -> Tensor:
    """A direction drawn at random, as long as the given one: what any change of this size does."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return drawn * like.norm() / drawn.norm()


def without_direction(model: CausalLM, direction: Tensor) -> CausalLM:
    """A copy that cannot write the direction into its stream: embedding and output projections are made orthogonal.

    The same as taking the direction out of the stream at every depth (Arditi et al. 2024, section 4.1). A tied head
    keeps its weights: it reads the stream and does not write to it. Biases of the projections would need the same; the
    course's models have none. Raises ValueError for a direction of length 0.
    """
    if not direction.norm() > 0:
        raise ValueError("a direction of length 0 points nowhere")
    unit = direction / direction.norm()  # (d_model)
    made = copy.deepcopy(model)
    made.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    made.token_emb.weight = nn.Parameter(model.token_emb.weight.detach() @ (torch.eye(len(unit)) - outer(unit)))
    for block in made.blocks:
        for layer in (block.self_attn.out_proj, block.ffn.down_proj):
            layer.weight.data -= outer(unit) @ layer.weight.data  # the rows are what is written
    return made.eval()


def outer(unit: Tensor) -> Tensor:
    return unit[:, None] * unit[None]


class Added(nn.Module):
    """A layer whose output has a constant added."""

    def __init__(self, layer: nn.Module, constant: Tensor) -> None:
        super().__init__()
        self.layer, self.constant = layer, nn.Buffer(constant.clone())

    def forward(self, *given: Tensor) -> Tensor:
        return self.layer(*given) + self.constant


def with_direction(model: CausalLM, direction: Tensor, depth: int) -> CausalLM:
    """A copy that adds the direction to its stream at a depth of `depth_names`, at every position."""
    names = depth_names(model)
    if not 0 <= depth < len(names):
        raise ValueError(f"depth={depth} must be one of 0 to {len(names) - 1}: {', '.join(names)}")
    made = copy.deepcopy(model)
    if depth == 0:
        made.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        made.token_emb.weight = nn.Parameter(model.token_emb.weight.detach() + direction)
    elif depth % 2:
        block = made.blocks[(depth - 1) // 2]
        block.self_attn = Added(block.self_attn, direction)
    else:
        block = made.blocks[(depth - 1) // 2]
        block.ffn = Added(block.ffn, direction)
    return made.eval()


def separation(one: Tensor, other: Tensor, direction: Tensor) -> float:
    """How far apart two clouds of states lie along a direction: difference of means over pooled deviation."""
    unit = direction / direction.norm()
    first, second = one @ unit, other @ unit
    pooled = math.sqrt((first.var().item() + second.var().item()) / 2)
    return (first.mean().item() - second.mean().item()) / max(pooled, 1e-12)
