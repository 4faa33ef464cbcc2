"""Topic 13 - Bench: the engine beside transformers on the same requests, all asked at once, in one run.

    results = compare(ServingBenchConfig(), folder, seed=0)     # system -> one Measured for each round
    python 13-inference-at-scale/inference_at_scale.py bench

Systems take turns, so that a busy moment of the machine hits all alike. Every request's answer has a length of its own
and no end token ends it, so that all systems make the same number of tokens; those that a static batch makes beyond a
request's own length are not counted. A token counts from the moment at which its system could have sent it.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine_requests import RequestParams
from gpt2 import SamplingConfig, left_padded
from load_generator import Record, percentiles
from modern_llm_architectures import CausalLM
from serving_engine import Engine, EngineConfig
from workbench import check_range, progress

NO_END = -1  # an id that no vocabulary has: nothing ends early


@dataclass(frozen=True)
class ServingBenchConfig:
    """The requests and what counts as good."""

    n_requests: int = 64  # all at once
    least_prompt: int = 8  # tokens of the shortest prompt
    most_prompt: int = 96  # tokens of the longest one; lengths between are equally likely
    least_tokens: int = 4  # tokens of the shortest answer
    most_tokens: int = 96  # tokens of the longest one
    tail: float = 1.0  # exponent of the Pareto law of the answers' lengths; smaller: more long ones
    static_batch: int = 8  # rows of a static batch
    n_rounds: int = 3  # measured rounds, after one that warms up
    ttft_limit: float = 0.5  # seconds to the first token that are still good
    tpot_limit: float = 0.1  # seconds from token to token that are still good

    def __post_init__(self) -> None:
        check_range(self, "n_requests", "least_prompt", "least_tokens", "static_batch", "n_rounds", least=1)
        check_range(self, "most_prompt", least=self.least_prompt)
        check_range(self, "most_tokens", least=self.least_tokens)
        check_range(self, "tail", "ttft_limit", "tpot_limit", above=0)


class Job(NamedTuple):
    prompt: list[int]
    n_new: int  # tokens of the answer


class Answers(NamedTuple):
    """What a system made, and when: seconds since all requests were there."""

    ids: list[list[int]]
    moments: list[list[float]]  # of each token


@dataclass(frozen=True)
class Measured:
    """One run of one system."""

    tokens_per_second: float  # answers' tokens until the last one is complete
    goodput: float  # requests per second that kept both limits
    ttft: dict[str, float]  # seconds to the first token: p50, p95, ...
    tpot: dict[str, float]  # seconds from token to token within an answer
    latency: dict[str, float]  # seconds to the last token
    same: float  # share of the answers that are token for token those of topic 09's generate


System = Callable[[list[Job]], Answers]


def mixed_jobs(config: ServingBenchConfig, vocab_size: int, seed: int) -> list[Job]:
    """Prompts of even and answers of heavy-tailed lengths (a Pareto law cut off at both ends), random tokens."""
    rng, jobs = random.Random(seed), []
    low, high = (length**-config.tail for length in (config.least_tokens, config.most_tokens + 1))
    for _ in range(config.n_requests):
        n_new = int((low - rng.random() * (low - high)) ** (-1 / config.tail))
        n_prompt = rng.randint(config.least_prompt, config.most_prompt)
        prompt = [rng.randrange(min(16, vocab_size - 1), vocab_size) for _ in range(n_prompt)]
        jobs.append(Job(prompt, min(max(n_new, config.least_tokens), config.most_tokens)))
    return jobs


# Ours


def serve_jobs(model: CausalLM, config: EngineConfig, draft: CausalLM | None = None, group: int = 0) -> System:
    """The engine; with `group` it takes so many requests at a time and waits for the last of them: static batching."""

    def system(jobs: list[Job]) -> Answers:
        engine = Engine(model, None, config, draft)
        begin, answers = time.perf_counter(), Answers([[] for _ in jobs], [[] for _ in jobs])
        size = group or len(jobs)
        for first in range(0, len(jobs), size):
            for index, job in enumerate(jobs[first : first + size], start=first):
                params = RequestParams(job.n_new, temperature=0, ignore_eos=True)
                engine.add(job.prompt, params, str(index))
            while engine.busy:
                outputs = engine.step()
                now = time.perf_counter() - begin
                for output in outputs:
                    index = int(output.request_id)
                    answers.ids[index].extend(output.new_ids)
                    answers.moments[index].extend([now] * len(output.new_ids))
        return answers

    return system


# Theirs


class Moments:
    """A streamer for transformers' generate: notes when each step's tokens were there."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to say."""


def generate_jobs(theirs: Any, static_batch: int) -> System:
    """transformers' generate on `static_batch` requests at a time, padded on the left, each batch to its longest."""

    def system(jobs: list[Job]) -> Answers:
        begin, answers = time.perf_counter(), Answers([], [])
        for first in range(0, len(jobs), static_batch):
            batch = jobs[first : first + static_batch]
            token_ids, is_real = left_padded([job.prompt for job in batch], 0)
            token_ids, is_real = token_ids.to(theirs.device), is_real.to(theirs.device)
            clock, most = Moments(), max(job.n_new for job in batch)
            rule = {"do_sample": False, "max_new_tokens": most, "eos_token_id": NO_END, "pad_token_id": 0}
            with torch.no_grad():
                made = theirs.generate(token_ids, attention_mask=is_real.long(), streamer=clock, **rule)
            made, moments = made[:, token_ids.shape[1] :].tolist(), [moment - begin for moment in clock.moments[1:]]
            answers.ids.extend(row[: job.n_new] for row, job in zip(made, batch, strict=True))
            answers.moments.extend(moments[: job.n_new] for job in batch)
        return answers

    return system


def continuous_jobs(theirs: Any, jobs: list[Job], page_size: int = 16, n_tokens: int = 512) -> System:
    """transformers' continuous batching, with as many pages as all jobs need and `n_tokens` in a step, as ours.

    Its own sizes would follow from the machine's free memory. The time begins when its loop runs: setting it up is left
    out, as the model's loading is for the others.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    n_pages = sum(math.ceil((len(job.prompt) + job.n_new) / page_size) + 1 for job in jobs)
    settings = ContinuousBatchingConfig(page_size=page_size, num_blocks=n_pages, max_batch_tokens=n_tokens)

    def system(jobs: list[Job]) -> Answers:
        most = max(job.n_new for job in jobs)
        rule = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=NO_END, pad_token_id=0)
        with (
            torch.no_grad(),
            theirs.continuous_batching_context_manager(
                rule, block=True, timeout=60, continuous_batching_config=settings
            ) as manager,
        ):
            begin, found = time.perf_counter(), {}
            for index, job in enumerate(jobs):
                manager.add_request(job.prompt, str(index), job.n_new, record_timestamps=True)
            while len(found) < len(jobs):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[int(result.request_id)] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended before its requests did")
        ordered = [found[index] for index in range(len(jobs))]
        moments = [[moment - begin for moment in result.timestamps] for result in ordered]
        return Answers([list(result.generated_tokens) for result in ordered], moments)

    return system


# The comparison


def load_rival(folder: Path) -> Any:
    """The same folder in transformers' own class, in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(jobs: list[Job], answers: Answers, wanted: list[list[int]], config: ServingBenchConfig) -> Measured:
    """Raises ValueError if a system has not made what it was asked for."""
    for job, ids, moments in zip(jobs, answers.ids, answers.moments, strict=True):
        if not len(ids) == len(moments) == job.n_new:
            raise ValueError(f"{job.n_new} tokens were asked for, {len(ids)} came, at {len(moments)} moments")
    records = [Record(0.0, 0.0, own[0], own[-1], len(own), "ok") for own in answers.moments]
    seconds = max(record.last for record in records)
    good = sum(record.ttft <= config.ttft_limit and record.tpot <= config.tpot_limit for record in records)
    return Measured(
        sum(record.n_tokens for record in records) / seconds,
        good / seconds,
        percentiles([record.ttft for record in records]),
        percentiles([record.tpot for record in records if record.n_tokens > 1]),
        percentiles([record.latency for record in records]),
        float(np.mean([own == other for own, other in zip(answers.ids, wanted, strict=True)])),
    )


def naive_answers(model: CausalLM, jobs: list[Job]) -> list[list[int]]:
    """Topic 09's generate, one job after the other; its ends are ignored here too."""
    endless = CausalLM(replace(model.config, eos_id=model.config.vocab_size, more_eos_ids=()))
    endless.load_state_dict(model.state_dict())
    endless.to(model.final_norm.weight.device, model.final_norm.weight.dtype).eval()
    device = model.final_norm.weight.device
    return [
        endless.generate(torch.tensor([job.prompt], device=device), SamplingConfig(job.n_new, temperature=0))[
            0
        ].tolist()
        for job in jobs
    ]


def systems_of(model: CausalLM, folder: Path, jobs: list[Job], config: ServingBenchConfig) -> dict[str, System]:
    """Ours and theirs, by the names that the tables use."""
    theirs, engine = load_rival(folder).to(model.final_norm.weight.device), EngineConfig()
    return {
        "engine": serve_jobs(model, engine),
        f"engine, static batches of {config.static_batch}": serve_jobs(model, engine, group=config.static_batch),
        "transformers, one by one": generate_jobs(theirs, 1),
        f"transformers, static batches of {config.static_batch}": generate_jobs(theirs, config.static_batch),
        "transformers, continuous batching": continuous_jobs(theirs, jobs),
    }


def compare(config: ServingBenchConfig, model: CausalLM, folder: Path, seed: int = 0) -> dict[str, list[Measured]]:
    """Every system on the same jobs, in turns: one Measured for each round, the warming one left out."""
    jobs = mixed_jobs(config, model.config.vocab_size, seed)
    wanted, systems = naive_answers(model, jobs), systems_of(model, folder, jobs, config)
    found: dict[str, list[Measured]] = {name: [] for name in systems}
    for index in progress(range(config.n_rounds + 1), "rounds"):
        for name, system in systems.items():
            measured = measure(jobs, system(jobs), wanted, config)
            if index:
                found[name].append(measured)
    return found
