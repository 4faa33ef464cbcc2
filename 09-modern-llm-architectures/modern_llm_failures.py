"""Topic 09 - Modern LLM failures: slips that keep every shape and raise no error, each switched on and measured.

python 09-modern-llm-architectures/modern_llm_architectures.py --break bool-minus-infinity  # one of them
python 09-modern-llm-architectures/modern_llm_architectures.py figures breaks               # all, the chapter's table

Each is one word away from the sound code, and has a right value that is known.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mixture_of_experts
import modern_llm_architectures
from llm_config import ExpertConfig, ModelConfig
from llm_layers import SwiGLU, key_distance
from mixture_of_experts import MixtureOfExperts, Routing, SwitchRouter
from modern_llm_architectures import CausalLM
from workbench import Column, RunConfig, check_name, seed_everything

if TYPE_CHECKING:
    from modern_llm_experiments import FiguresConfig

TINY = ModelConfig(vocab_size=50, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=32, max_seq_len=32)


# Masks


@torch.no_grad()
def future_leak() -> float:
    """How far the logits of 11 places move when the token after them changes: not at all."""
    seed_everything(0)
    model, token_ids = CausalLM(TINY).eval(), torch.arange(12)[None]
    changed = token_ids.clone()
    changed[0, 11] = 40
    return (model(changed) - model(token_ids))[:, :11].abs().max().item()


def minus_infinity_is_true(n_query: int, n_key: int, *_: object) -> Tensor:
    """-inf is written into a mask that is bool, where everything but 0 is True: every place may look everywhere."""
    mask = torch.ones(n_query, n_key, dtype=torch.bool)
    return mask.masked_fill(key_distance(n_query, n_key) < 0, -math.inf)


@torch.no_grad()
def window_reach() -> float:
    """How far the last logits move when the first of 12 tokens changes, under two layers with a window of 4: not."""
    seed_everything(0)
    config = ModelConfig(**{**vars(TINY), "window_size": 4})
    model, token_ids = CausalLM(config).eval(), torch.arange(12)[None]
    changed = token_ids.clone()
    changed[0, 0] = 40
    return (model(changed) - model(token_ids))[:, -1].abs().max().item()


def window_of_ones(n_query: int, n_key: int, key_is_real: object, window_size: int, n_sinks: int = 0) -> Tensor:
    """The window is written as True into a mask that is True already; only the future was taken out before."""
    distance = key_distance(n_query, n_key)
    mask = torch.ones(n_query, n_key, dtype=torch.bool) & (distance >= 0)
    return mask.masked_fill((distance >= 0) & (distance < window_size), True)


# Experts


def compute_share() -> float:
    """FLOPs of 8 experts of which 2 are active, counted while they run, over those of the one network they replace."""
    seed_everything(0)
    d_model, d_ff = 24, 64
    config = ModelConfig(d_model=d_model, d_ff=d_ff, experts=ExpertConfig(8, 2, d_ff // 8))
    sparse, dense = modern_llm_architectures.make_ffn(config, 0), SwiGLU(d_model, d_ff)
    x, counted = torch.randn(2, 40, d_model), []
    for network in (sparse, dense):
        with FlopCounterMode(display=False) as counter:
            network(x)
        counted.append(counter.get_total_flops())
    router = 2 * 80 * d_model * 8  # the choice itself is not what was sold
    return (counted[0] - router) / counted[1]


class FullSizeExperts(MixtureOfExperts):
    """Every expert as wide as the network that all of them replace."""

    def __init__(self, router: SwitchRouter, d_model: int, d_ff: int, *others: object) -> None:
        super().__init__(router, d_model, router.n_experts * d_ff, *others)


def router_gradient() -> float:
    """Length of the gradient that reaches a Switch router from its layer's answer, which depends on the choice."""
    seed_everything(0)
    layer = MixtureOfExperts(mixture_of_experts.SwitchRouter(24, 4), 24, 32)
    layer(torch.randn(2, 20, 24)).square().sum().backward()
    gradient = layer.router.weight.grad
    return 0.0 if gradient is None else gradient.norm().item()


def without_gate(self: SwitchRouter, x: Tensor) -> Routing:
    """The probability of the chosen expert is divided by the sum of the chosen, itself: 1, whatever the router says."""
    logits = F.linear(x, self.weight)
    weights, experts = logits.float().softmax(dim=-1).max(dim=-1, keepdim=True)
    return Routing(logits, weights / weights, experts)


# The failures


BREAKS: dict[str, tuple[str, Callable[[], float], object, str, object]] = {
    # name: what is measured, how, and what is replaced by what
    "bool-minus-infinity": (
        "-inf written into a bool mask is True: how far a logit moves when a later token changes",
        future_leak,
        modern_llm_architectures,
        "attention_mask",
        minus_infinity_is_true,
    ),
    "window-of-ones": (
        "a window written into a mask of ones: how far a logit moves when a token outside the window changes",
        window_reach,
        modern_llm_architectures,
        "attention_mask",
        window_of_ones,
    ),
    "full-size-experts": (
        "8 experts, 2 active, sold as 0.25 of the compute: FLOPs counted over those of the dense network",
        compute_share,
        modern_llm_architectures,
        "MixtureOfExperts",
        FullSizeExperts,
    ),
    "switch-without-gate": (
        "Switch divides the gate by itself: length of the gradient that reaches the router",
        router_gradient,
        SwitchRouter,
        "forward",
        without_gate,
    ),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant one failure while the block runs. Raises ValueError, with the closest name, for an unknown one."""
    *_, owner, attribute, replacement = BREAKS[check_name("failure", name, BREAKS)]
    with mock.patch.object(owner, attribute, replacement):
        yield


def show(name: str) -> tuple[str, float, float]:
    """What a failure shows: the measurement in words, its sound value and its broken one."""
    what, measure, *_ = BREAKS[check_name("failure", name, BREAKS)]
    sound = measure()
    with planted(name):
        return what, sound, measure()


def breaks(config: "FiguresConfig", run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = []
    for name in BREAKS:
        what, sound, broken = show(name)
        rows.append([f"`{name}`", what, sound, broken])
    columns = [Column("`--break`"), Column("What happens, and what is measured"), Column("sound"), Column("broken")]
    config.save("breaks", columns, rows, "breaks", n_seeds=1)


FAILURE_EXPERIMENTS = {"breaks": (breaks, 2)}
