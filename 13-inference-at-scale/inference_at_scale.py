"""Topic 13 - Inference at Scale: many answers at once from one model, over a network, exactly as each would be alone.

python 13-inference-at-scale/inference_at_scale.py                      # one by one, then together: the same answers
python 13-inference-at-scale/inference_at_scale.py serve                # OpenAI's API for the course chat model
python 13-inference-at-scale/inference_at_scale.py load --rate 8        # clients for a server that runs
python 13-inference-at-scale/inference_at_scale.py route --n-replicas 2 # several servers behind one address
python 13-inference-at-scale/inference_at_scale.py autoscale --most 3   # as many as the measured load needs
python 13-inference-at-scale/inference_at_scale.py draft                # teach the small model that guesses ahead
python 13-inference-at-scale/inference_at_scale.py --break salt-ignored # a failure on purpose

Kwon et al. 2023 (paged cache, arXiv 2309.06180), Yu et al. 2022 (continuous batching, OSDI), Leviathan et al. 2023
(speculative decoding, arXiv 2211.17192).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from autoscaling import AUTOSCALING_VERBS
from chat_model import CATEGORIES, chat_instructions, load_chat_model
from draft_model import DraftConfig, draft, load_draft_model
from engine_requests import RequestParams
from fine_tuning_adaptation import prompt_ids
from inference_failures import INFERENCE_BREAKS
from load_generator import LOAD_VERBS
from modern_llm_architectures import CausalLM
from replica_router import ROUTER_VERBS
from server import SERVER_VERBS
from serving_engine import Engine, EngineConfig
from tiny_world import World, join
from workbench import RunConfig, announce, check_range, pick_device, run_verbs, save_figure, shown


@dataclass(frozen=True)
class DemoConfig:
    """The tour, or the failure to show in its place."""

    n_questions: int = 32  # questions that are asked at once
    break_: Literal["none", *INFERENCE_BREAKS] = "none"  # the failure to show

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=2)


@dataclass(frozen=True)
class Served:
    """What became of a set of questions."""

    texts: list[str]
    ids: list[list[int]]
    seconds: float
    engine: Engine
    moments: list[list[int]]  # of each request, the steps in which it got a token


def ask(model: CausalLM, tokenizer: Any, prompts: list[list[int]], config: EngineConfig, guess: CausalLM | None = None):
    """Ask everything at once and note who got a token in which step."""
    engine = Engine(model, tokenizer, config, guess)
    before, params = time.perf_counter(), RequestParams(60, temperature=0)
    names = [engine.add(prompt, params) for prompt in prompts]
    found = {name: ("", [], []) for name in names}
    while engine.busy:
        for output in engine.step():
            text, ids, moments = found[output.request_id]
            moments.append(engine.scheduler.step)
            found[output.request_id] = (text + output.text, ids + output.new_ids, moments)
    texts, ids, moments = zip(*(found[name] for name in names), strict=True)
    return Served(list(texts), list(ids), time.perf_counter() - before, engine, list(moments))


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Ask the chat model one question after the other, then all at once, in little memory, and with a draft."""
    if config.break_ != "none":
        show, seconds = INFERENCE_BREAKS[config.break_]
        announce(f"showing the failure {config.break_!r}", seconds)
        for what, sound, broken in show(run):
            print(f"{what}: {sound:.4g} as it should be, {broken:.4g} with --break {config.break_}")
        return
    announce(f"{config.n_questions} questions, one by one and together", 15)
    model, tokenizer = load_chat_model()
    model.to(pick_device(run.device))
    each = -(-config.n_questions // len(CATEGORIES))
    asked = [item for name in CATEGORIES for item in chat_instructions(World(), each, run.seed, name, new=True)]
    asked = asked[: config.n_questions]
    prompts = [prompt_ids(tokenizer, join(item.prompt)) for item in asked]
    ways = {
        "one by one": EngineConfig(max_batch=1, prefix_cache=False),
        "together": EngineConfig(),
        "together, 32 blocks of memory": EngineConfig(n_blocks=32),
        "together, 8-bit cache": EngineConfig(kv_bits=8),
        "one by one, a draft guesses": EngineConfig(max_batch=1, speculate="draft"),
    }
    print(f"{'':32}{'seconds':>8}{'tokens/s':>10}{'steps':>7}{'lost blocks':>13}{'accepted':>10}{'same answers':>14}")
    found: dict[str, Served] = {}
    for name, own in ways.items():
        guess = load_draft_model()[0].to(pick_device(run.device)) if own.speculate == "draft" else None
        found[name] = ask(model, tokenizer, prompts, own, guess)
        served, stats = found[name], found[name].engine.stats()
        same = np.mean([a == b for a, b in zip(served.ids, found["one by one"].ids, strict=True)])
        guesses = f"{stats.accepted_tokens / stats.proposed_tokens:.0%}" if stats.proposed_tokens else ""
        numbers = f"{served.seconds:8.2f}{stats.generated_tokens / served.seconds:10,.0f}{stats.steps:7}"
        print(f"{name:32}{numbers}{stats.preemptions:13}{guesses:>10}{same:14.0%}")
    for item, text in list(zip(asked, found["together"].texts, strict=True))[:: max(1, each)]:
        print(f"  {join(item.prompt)}  ->  {text}")
    path = run.out / "together.svg"
    save_figure(plot_steps(found), path)
    print(f"who got a token in which step: {shown(path)}")


def plot_steps(found: dict[str, Served]) -> Figure:
    """A row for each request, a dot for each step in which it got a token: with enough memory and with little."""
    names = ("together", "together, 32 blocks of memory")
    figure, axes = plt.subplots(1, len(names), figsize=(9, 4), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for row, moments in enumerate(found[name].moments):
            axis.plot(moments, [row] * len(moments), ".", ms=3, color=f"C{row % 8}")
        axis.set(title=name, xlabel="step of the engine")
    axes[0].set(ylabel="request")
    return figure


def main(argv: list[str] | None = None) -> None:
    from inference_experiments import FiguresConfig, bench, figures  # here: they take seconds to import
    from serving_bench import ServingBenchConfig

    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, DemoConfig, RunConfig),
        **SERVER_VERBS,
        **LOAD_VERBS,
        **ROUTER_VERBS,
        **AUTOSCALING_VERBS,
        "draft": (draft, DraftConfig, RunConfig),
        "bench": (bench, ServingBenchConfig, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
