"""Topic 13 - Inference experiments: what the engine gains, what its memory holds, and what speculation is worth.

python 13-inference-at-scale/inference_at_scale.py figures                   # every table and figure
python 13-inference-at-scale/inference_at_scale.py figures systems phases    # some of them

Requests are greedy unless a table says otherwise. Seconds are those of the clock, measured in turns; everything else is
counted, and the same on every machine.
"""

import json
import math
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from chat_model import FOLDER as CHAT_FOLDER
from chat_model import chat_instructions, load_chat_model
from constrained_decoding import TokenBytes, schema_constraint
from course_tokenizer import CourseTokenizer
from draft_model import load_draft_model, made_dearer
from dynamic_batching import (
    ArrivalsServed,
    BatchRule,
    CountedClock,
    CountedEngine,
    ProcessClock,
    StepCost,
    plot_batches,
    serve_arrivals,
)
from engine_requests import RequestParams
from fine_tuning_adaptation import prompt_ids
from inference_failures import INFERENCE_BREAKS
from llm_calculators import forward_flops
from llm_config import ModelConfig
from load_generator import LoadConfig, arrivals, percentiles
from machine_roofline import measure
from modern_llm_architectures import CausalLM
from paged_cache import store_bytes
from serving_bench import Job, Measured, ServingBenchConfig, compare, mixed_jobs
from serving_engine import Engine, EngineConfig
from serving_experiments import SERVING_EXPERIMENTS
from speculative_decoding import expected_tokens
from tiny_world import World, join, words
from workbench import (
    Column,
    RunConfig,
    announce,
    check_name,
    check_range,
    describe_machine,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
    speed_line,
)

COMMAND = "python 13-inference-at-scale/inference_at_scale.py figures"


@dataclass(frozen=True)
class FiguresConfig:
    """The experiments of the chapter, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of requests, arrivals and samples
    n_requests: int = 64  # requests of a comparison
    n_soak: int = 10_000  # requests of the endurance run
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", least=1)
        check_range(self, "n_requests", "n_soak", least=8)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    def save(self, name: str, columns: list[Column], rows: list[list], n_seeds: int = 0, experiment: str = "") -> None:
        seeds = range(n_seeds or self.n_seeds)
        save_results(self.folder / "results.json", name, columns, rows, seeds, f"{COMMAND} {experiment or name}")


@cache
def chat_model() -> tuple[CausalLM, CourseTokenizer]:
    return load_chat_model()


def questions(n: int, seed: int, categories: tuple[str, ...] = ("fact", "read", "sum", "sort")) -> list[list[int]]:
    """Held-out questions of the course chat model as prompts."""
    _, tokenizer = chat_model()
    each = -(-n // len(categories))
    asked = [item for name in categories for item in chat_instructions(World(), each, seed, name, new=True)]
    random.Random(seed).shuffle(asked)
    return [prompt_ids(tokenizer, join(item.prompt)) for item in asked[:n]]


def run_jobs(engine: Engine, jobs: list[Job]) -> tuple[list[list[int]], float]:
    """All jobs at once; the ids of each, and the seconds that it took."""
    before, ids = time.perf_counter(), {str(index): [] for index in range(len(jobs))}
    for index, job in enumerate(jobs):
        engine.add(job.prompt, RequestParams(job.n_new, temperature=0, ignore_eos=True), str(index))
    while engine.busy:
        for output in engine.step():
            ids[output.request_id] += output.new_ids
    return list(ids.values()), time.perf_counter() - before


def seconds(value: float) -> float:
    return 1000 * value  # tables give milliseconds


# The engine beside other ways of serving


def systems(config: FiguresConfig, run: RunConfig) -> None:
    """The same requests by five systems in turns: throughput, times, and whether the answers are the same."""
    model, rows, tails = chat_model()[0], [], []
    bench = ServingBenchConfig(n_requests=config.n_requests, n_rounds=1)
    found: dict[str, list[Measured]] = {}
    for seed in range(config.n_seeds):
        for name, measured in compare(bench, model, CHAT_FOLDER, seed).items():
            found.setdefault(name, []).extend(measured)
    base = [item.tokens_per_second for item in found[f"transformers, static batches of {bench.static_batch}"]]
    for name, measured in found.items():
        speeds = [item.tokens_per_second for item in measured]
        cells = [speeds, [own / other for own, other in zip(speeds, base, strict=True)]]
        cells += [
            [seconds(own["p50"]) for own in times] for times in zip(*((m.ttft, m.tpot) for m in measured), strict=True)
        ]
        rows.append([name, *cells, [item.goodput for item in measured], [item.same for item in measured]])
        late = [
            [seconds(own["p95"]) for own in times]
            for times in zip(*((m.ttft, m.latency) for m in measured), strict=True)
        ]
        tails.append([name, *late])
    columns = [Column("System"), Column("tokens/s", "", ",.0f"), Column("times static batches", "", ".2f")]
    columns += [Column("first token, p50", "ms", ",.0f"), Column("per token, p50", "ms", ".1f")]
    columns += [Column("goodput", "requests/s", ".1f"), Column("same answers", "", ".0%")]
    config.save("systems", columns, rows)
    columns = [Column("System"), Column("first token, p95", "ms", ",.0f"), Column("whole answer, p95", "ms", ",.0f")]
    config.save("systems-tails", columns, tails, experiment="systems")


# Where the time of a step goes


WIDE = ModelConfig(d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, d_head=64, d_ff=1408, max_seq_len=512)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def step_seconds(
    model: CausalLM,
    batch: int,
    n_prompt: int = 64,
    n_steps: int = 12,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of a decoding step with so many requests of n_prompt tokens and a little more."""
    engine = Engine(model, None, EngineConfig(max_batch=batch, max_step_tokens=batch * n_prompt, prefix_cache=False))
    for job in mixed_jobs(ServingBenchConfig(batch, n_prompt, n_prompt), model.config.vocab_size, 0):
        engine.add(job.prompt, RequestParams(n_steps + 4, temperature=0, ignore_eos=True))
    while engine.stats().waiting or not engine.stats().generated_tokens:
        engine.step()
    engine.step()
    spent = []
    for _ in range(n_steps):
        before = clock()
        engine.step()
        spent.append(clock() - before)
    return float(np.median(spent))


def prompt_rate(model: CausalLM, n_tokens: int = 256, clock: Callable[[], float] = time.perf_counter) -> float:
    """Tokens per second of reading one prompt."""
    engine = Engine(model, None, EngineConfig(max_batch=1, prefix_cache=False))
    [job] = mixed_jobs(ServingBenchConfig(1, n_tokens, n_tokens), model.config.vocab_size, 0)
    spent = []
    for _ in range(4):
        before = clock()
        engine.generate([job.prompt], RequestParams(1, temperature=0, ignore_eos=True))
        spent.append(clock() - before)
    return n_tokens / float(np.median(spent[1:]))


N_ROWS = 8  # rows of a batch, as in `systems`
RULES = {
    "static": BatchRule(N_ROWS, math.inf),
    "dynamic, 200 ms": BatchRule(N_ROWS, 0.2),
    "dynamic, 50 ms": BatchRule(N_ROWS, 0.05),
    "dynamic, at once": BatchRule(N_ROWS, 0.0),
    "continuous": BatchRule(N_ROWS, joins=True),
}
LOADS = (0.5, 0.9, 1.5)  # of what static batches can do that never wait for company
CLOCKED = 0.9  # the load that the chat model's engine serves as well


def measured_cost(model: CausalLM) -> StepCost:
    """A line through the CPU seconds of decoding steps of 1 to N_ROWS rows, and what a token of a prompt adds to it."""
    batches, clock = [batch for batch in BATCHES if batch <= N_ROWS], time.process_time
    turns = [[step_seconds(model, batch, clock=clock) for batch in batches] for _ in range(5)]  # a busy moment hits all
    per_row, fixed = np.polyfit(batches, np.min(turns, axis=0), 1)
    reading = 256 / max(prompt_rate(model, clock=clock) for _ in range(5))
    return StepCost(float(fixed), float(per_row), (reading - float(fixed + per_row)) / 256)


def batching(config: FiguresConfig, run: RunConfig) -> None:
    """Poisson arrivals under three rules for who may start: counted steps at measured costs, and the real engine."""
    model, n, seeds = chat_model()[0], 400, range(config.n_seeds)
    cost = measured_cost(model)
    jobs = [mixed_jobs(ServingBenchConfig(n), model.config.vocab_size, seed) for seed in seeds]

    def counted(rule: BatchRule, moments: list[list[float]]) -> list[ArrivalsServed]:
        pairs = zip(jobs, moments, strict=True)
        return [serve_arrivals(CountedEngine(), *pair, rule, CountedClock(cost)) for pair in pairs]

    rate = float(np.mean([own.throughput for own in counted(RULES["static"], [[0.0] * n for _ in seeds])]))
    rows, clocked = [], []
    for load in LOADS:
        moments = [arrivals(LoadConfig(rate=load * rate, n_requests=n), seed) for seed in seeds]
        for name, rule in RULES.items():
            rows.append([f"{load:.0%}, {name}", *batching_cells(counted(rule, moments))])
    moments = [arrivals(LoadConfig(rate=CLOCKED * rate, n_requests=n), seed) for seed in seeds]
    for name, rule in RULES.items():
        found = []
        for pair in zip(jobs, moments, strict=True):
            engine = Engine(model, None, EngineConfig(max_batch=N_ROWS, prefix_cache=False))
            found.append(serve_arrivals(engine, *pair, rule, ProcessClock()))
        clocked.append([f"{CLOCKED:.0%}, {name}", *batching_cells(found)])
    columns = [Column("Load, rule"), Column("start together", "", ".1f"), Column("wasted rows", "", ".0%")]
    columns += [Column("answered", "requests/s", ".1f"), Column("first token, p50", "ms", ",.0f")]
    columns += [Column("p99", "ms", ",.0f"), Column("whole answer, p50", "ms", ",.0f")]
    config.save("batching", columns, rows)
    config.save("batching-engine", columns, clocked, experiment="batching")
    price = ["the chat model", *(seconds(part) for part in cost), rate]
    columns = [Column("A step of"), Column("fixed", "ms", ".2f"), Column("for each row", "ms", ".3f")]
    columns += [Column("for each token of a prompt", "ms", ".3f"), Column("load of 100%", "requests/s", ".1f")]
    config.save("batching-cost", columns, [price], 1, "batching")


def batches(config: FiguresConfig, run: RunConfig) -> None:
    """The chapter's first figure: 24 requests and four rows under three rules, a second for each step."""
    jobs = mixed_jobs(ServingBenchConfig(24, most_prompt=16, most_tokens=40), 64, run.seed)
    moments = arrivals(LoadConfig(rate=0.2, n_requests=24), run.seed)
    rules = {
        "static: until four are there": BatchRule(4, math.inf),
        "dynamic: at most 10 steps": BatchRule(4, 10.0),
        "continuous: joins any step": BatchRule(4, joins=True),
    }
    found = {}
    for name, rule in rules.items():
        found[name] = serve_arrivals(CountedEngine(), jobs, moments, rule, CountedClock(StepCost(1, 0, 0)))
    save_figure(plot_batches(found), config.folder / "batches.svg")


def batching_cells(found: list[ArrivalsServed]) -> list[list[float]]:
    """The cells of one rule, a number for each seed."""
    cells = [[float(np.mean(own.starts)) for own in found], [own.wasted for own in found]]
    whole = [percentiles([record.latency for record in own.records]) for own in found]
    return [*cells, [own.throughput for own in found], *first_tokens(found), [seconds(own["p50"]) for own in whole]]


def first_tokens(found: list[ArrivalsServed]) -> list[list[float]]:
    """Milliseconds to the first token: the median and the 99th percentile."""
    firsts = [percentiles([record.ttft for record in own.records]) for own in found]
    return [[seconds(own[key]) for own in firsts] for key in ("p50", "p99")]


def phases(config: FiguresConfig, run: RunConfig) -> None:
    """Seconds of a decoding step against the batch, for a model in the caches and one that is read from memory."""
    seed_everything(run.seed)
    wide, machine, rows, points = CausalLM(WIDE).eval(), measure(3), [], {}
    for name, model in (("chat model", chat_model()[0]), ("25 million weights", wide)):
        n_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        flops = sum(forward_flops(model.config, 64).values())
        reading = prompt_rate(model)
        for batch in BATCHES:
            spent = step_seconds(model, batch)
            points.setdefault(name, []).append(spent)
            least = max(n_bytes / machine.bandwidth(n_bytes), batch * flops / machine.hardware.flops)
            row = [f"{name}, decoding {batch}", batch * flops / n_bytes, seconds(spent), seconds(least), batch / spent]
            rows.append([*row, batch / spent * flops / machine.hardware.flops])
        row = [f"{name}, one prompt of 256", 256 * flops / n_bytes, seconds(256 / reading)]
        least = max(n_bytes / machine.bandwidth(n_bytes), 256 * flops / machine.hardware.flops)
        rows.append([*row, seconds(least), reading, reading * flops / machine.hardware.flops])
    columns = [
        Column("A step"),
        Column("arithmetic intensity", "FLOP/byte of weights", ".1f"),
        Column("time", "ms", ".2f"),
    ]
    columns += [
        Column("roofline's least", "ms", ".2f"),
        Column("tokens/s", "", ",.0f"),
        Column("of the peak", "", ".0%"),
    ]
    config.save("phases", columns, rows, 1)
    save_figure(plot_phases(points), config.folder / "phases.svg")


def plot_phases(points: dict[str, list[float]]) -> Figure:
    """Milliseconds of a step against the batch; dashed: as if every request cost what one costs alone."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for index, (name, spent) in enumerate(points.items()):
        axis.plot(BATCHES, [seconds(value) for value in spent], "o-", color=f"C{index}", label=name)
        alone = [seconds(spent[0] * batch) for batch in BATCHES]
        axis.plot(BATCHES, alone, "--", lw=1, color=f"C{index}", label=f"{name}, one by one")
    axis.set(xscale="log", yscale="log", xlabel="requests that decode together", ylabel="milliseconds of a step")
    axis.set(title="A step of many rows costs far less than its rows one by one")
    axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return figure


# Memory


MOST = 192  # positions that a request of the comparison can have: 96 of the prompt, 96 of the answer
SIZES = (1, 4, 8, 16, 32, 64, MOST)
POSITIONS = 8 * MOST  # what the pool holds: eight requests, if each gets room for the longest


def blocks(config: FiguresConfig, run: RunConfig) -> None:
    """One pool of positions cut into blocks of different sizes; the last is a reservation for the longest request."""
    model, rows = chat_model()[0], []
    for size in SIZES:
        settings = EngineConfig(n_blocks=POSITIONS // size, block_size=size, prefix_cache=False)
        held, used, rates, lost = [], [], [], []
        for seed in range(config.n_seeds):
            jobs = mixed_jobs(ServingBenchConfig(config.n_requests), model.config.vocab_size, seed)
            engine = Engine(model, None, settings)
            before, seen = time.perf_counter(), []
            for job in jobs:
                engine.add(job.prompt, RequestParams(job.n_new, temperature=0, ignore_eos=True))
            while engine.busy:
                engine.step()
                if engine.stats().waiting:
                    tables = [request.table for request in engine.scheduler.running]
                    room = size * sum(len(table.blocks) for table in tables)
                    seen.append((len(tables), sum(table.n_tokens for table in tables) / max(1, room)))
            rates.append(sum(job.n_new for job in jobs) / (time.perf_counter() - before))
            held.append(float(np.mean([n for n, _ in seen])))
            used.append(float(np.mean([share for _, share in seen])))
            lost.append(float(engine.stats().preemptions))
        name = f"{size}" if size != MOST else f"{size}: the longest request"
        rows.append([name, held, used, lost, rates])
    columns = [Column("Positions of a block"), Column("requests at once", "while others wait", ".1f")]
    columns += [Column("positions in use", "of those held", ".0%"), Column("preemptions", "", ".0f")]
    config.save("blocks", [*columns, Column("tokens/s", "", ",.0f")], rows)


def prefix(config: FiguresConfig, run: RunConfig) -> None:
    """Prompts that begin alike, with and without the prefix cache: tokens computed and the wait for the first one."""
    model, rows, n_prompt = chat_model()[0], [], 128
    for share in (0.0, 0.25, 0.5, 0.75, 0.875):
        for cached in (False, True):
            computed, firsts = [], []
            for seed in range(config.n_seeds):
                jobs = mixed_jobs(
                    ServingBenchConfig(config.n_requests, n_prompt, n_prompt), model.config.vocab_size, seed
                )
                head = jobs[0].prompt[: int(share * n_prompt)]
                engine = Engine(model, None, EngineConfig(prefix_cache=cached, max_batch=16))
                begin, moments = time.perf_counter(), {}
                for job in jobs:
                    engine.add(head + job.prompt[len(head) :], RequestParams(8, temperature=0, ignore_eos=True))
                while engine.busy:
                    for output in engine.step():
                        moments.setdefault(output.request_id, time.perf_counter() - begin)
                computed.append(engine.stats().prompt_tokens / (n_prompt * len(jobs)))
                firsts.append(seconds(float(np.mean(list(moments.values())))))
            rows.append([f"{share:.1%}, {'cache' if cached else 'no cache'}", computed, firsts])
    columns = [Column("Shared of 128 tokens"), Column("prompt tokens computed", "", ".1%")]
    config.save("prefix", [*columns, Column("first token, mean", "ms", ".0f")], rows)


CHUNKS = (16, 32, 64, 128, 256, 480)


def chunks(config: FiguresConfig, run: RunConfig) -> None:
    """A prompt of 480 tokens arrives beside 15 running answers: the longest pause of those, and its own first token."""
    seed_everything(run.seed)
    model, rows = CausalLM(WIDE).eval(), []
    for chunk in CHUNKS:
        pauses, firsts = [], []
        for seed in range(config.n_seeds):
            engine = Engine(model, None, EngineConfig(prefill_chunk=chunk, max_batch=16, prefix_cache=False))
            for job in mixed_jobs(ServingBenchConfig(15, 8, 8), WIDE.vocab_size, seed):
                engine.add(job.prompt, RequestParams(64, temperature=0, ignore_eos=True))
            for _ in range(8):
                engine.step()
            [long] = mixed_jobs(ServingBenchConfig(1, 480, 480), WIDE.vocab_size, seed)
            name, begin, longest, done = (
                engine.add(long.prompt, RequestParams(2, temperature=0)),
                time.perf_counter(),
                0.0,
                0.0,
            )
            while not done:
                before = time.perf_counter()
                outputs = engine.step()
                now = time.perf_counter()
                longest = max(longest, now - before)
                done = now - begin if any(output.request_id == name for output in outputs) else 0.0
            pauses.append(seconds(longest))
            firsts.append(seconds(done))
        rows.append([f"{chunk}", pauses, firsts])
    columns = [Column("Tokens of the prompt in a step"), Column("longest pause of the others", "ms", ".0f")]
    config.save("chunks", [*columns, Column("its own first token", "ms", ".0f")], rows)


def preemption(config: FiguresConfig, run: RunConfig) -> None:
    """Pools too small for everybody: what is computed again, what it costs, and that the answers stay the same."""
    model, rows = chat_model()[0], []
    for share in (1.0, 0.5, 0.25, 0.125, 0.0625):
        taken, again, rates, same = [], [], [], []
        for seed in range(config.n_seeds):
            jobs = mixed_jobs(ServingBenchConfig(config.n_requests), model.config.vocab_size, seed)
            need = sum(-(-(len(job.prompt) + job.n_new) // 16) for job in jobs)
            wanted, _ = run_jobs(Engine(model, None, EngineConfig()), jobs)
            engine = Engine(model, None, EngineConfig(n_blocks=max(MOST // 16, int(share * need)), prefix_cache=False))
            ids, spent = run_jobs(engine, jobs)
            stats = engine.stats()
            taken.append(float(stats.preemptions))
            again.append(stats.prompt_tokens / sum(len(job.prompt) for job in jobs) - 1)
            rates.append(stats.generated_tokens / spent)
            same.append(float(np.mean([own == other for own, other in zip(ids, wanted, strict=True)])))
        rows.append([f"{share:.1%}", taken, again, rates, same])
    columns = [Column("Pool, of what all need at once"), Column("preemptions", "", ".0f")]
    columns += [Column("computed again", "of the prompts' tokens", ".0%"), Column("tokens/s", "", ",.0f")]
    config.save("preemption", [*columns, Column("same answers", "", ".0%")], rows)


# Guessing ahead


N_IDLE = 46  # blocks that add nothing behind the chat model's own two: the same function at many times the price


def speculation_run(
    target: CausalLM, settings: EngineConfig, prompts: list[list[int]], seed: int, endless: bool = False
) -> dict[str, float]:
    """One answer after the other at temperature 1: share of guesses accepted of those looked at, tokens, seconds."""
    draft = load_draft_model()[0] if settings.speculate == "draft" else None
    engine = Engine(target, None, settings, draft)
    looked, before, seen = 0, time.perf_counter(), (0, 0)
    for index, prompt in enumerate(prompts):
        engine.add(prompt, RequestParams(40, seed=1000 * seed + index, ignore_eos=endless))
        while engine.busy:
            engine.step()
            stats = engine.stats()
            now = (stats.proposed_tokens, stats.accepted_tokens)
            proposed, accepted = now[0] - seen[0], now[1] - seen[1]
            looked, seen = looked + accepted + (accepted < proposed), now
    stats, spent = engine.stats(), time.perf_counter() - before
    passes = stats.steps - len(prompts)  # the first token of each comes with its prompt
    return {
        "acceptance": stats.accepted_tokens / looked if looked else 0.0,
        "per_pass": (stats.generated_tokens - len(prompts)) / passes,
        "rate": stats.generated_tokens / spent,
    }


def speculation(config: FiguresConfig, run: RunConfig) -> None:
    """Guesses by n-grams and by the draft, 1 to 8 ahead: accepted, tokens of a pass beside the formula, and speed."""
    chat = chat_model()[0]
    targets, rows, points = {"chat": chat, "dear": made_dearer(chat, N_IDLE)}, [], {}
    plain = EngineConfig(max_batch=1)
    settings = {("none", 0): plain}
    settings |= {(who, n): replace(plain, speculate=who, n_draft=n) for who in ("ngram", "draft") for n in (1, 2, 4, 8)}
    found: dict[tuple[str, int], dict[str, list[dict[str, float]]]] = {}
    endless: list[dict[str, float]] = []  # of answers that no end cuts off: what the formula is about
    for seed in range(config.n_seeds):
        prompts = questions(24, seed)
        endless.append(speculation_run(chat, settings["draft", 4], prompts, seed, endless=True))
        for key, each in settings.items():  # in turns
            for name, target in targets.items():
                made = speculation_run(target, each, prompts, seed)
                found.setdefault(key, {}).setdefault(name, []).append(made)
    for (who, n), own in found.items():
        rates = {
            name: [a["rate"] / b["rate"] for a, b in zip(own[name], found["none", 0][name], strict=True)]
            for name in targets
        }
        if not n:
            rows.append(["no guesses", "", 1.0, "", 1.0, 1.0])
            continue
        accepted, per_pass = ([item[key] for item in own["chat"]] for key in ("acceptance", "per_pass"))
        formula = [expected_tokens(value, n) for value in accepted]
        rows.append([f"{who}, {n} ahead", accepted, per_pass, formula, rates["chat"], rates["dear"]])
        points.setdefault(who, []).append((n, np.mean(per_pass), np.mean(formula), np.mean(rates["dear"])))
    accepted, per_pass = ([item[key] for item in endless] for key in ("acceptance", "per_pass"))
    formula = [expected_tokens(value, 4) for value in accepted]
    rows.append(["draft, 4 ahead, ends ignored", accepted, per_pass, formula, "", ""])
    columns = [
        Column("Guesses"),
        Column("accepted", "of those looked at", ".0%"),
        Column("tokens of a pass", "", ".2f"),
    ]
    columns += [Column("formula", "", ".2f"), Column("speed", "times no guesses", ".2f")]
    config.save("speculation", [*columns, Column("speed, dearer target", "times no guesses", ".2f")], rows)
    save_figure(plot_speculation(points), config.folder / "speculation.svg")


def plot_speculation(points: dict[str, list[tuple]]) -> Figure:
    """Tokens of a target's pass against the guesses: measured, by formula, and the speed on the dearer target."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for index, (who, found) in enumerate(points.items()):
        ahead, per_pass, formula, speed = zip(*found, strict=True)
        axis.plot(ahead, per_pass, "o-", color=f"C{index}", label=f"{who}: tokens of a pass")
        axis.plot(ahead, formula, ":", color=f"C{index}", label=f"{who}: formula")
        axis.plot(ahead, speed, "s--", color=f"C{index}", label=f"{who}: speed, dearer target")
    axis.axhline(1, color="0.6", lw=1)
    axis.set(title="More tokens in a pass; less of it is speed", xlabel="guesses ahead")
    axis.set(ylabel="times without guesses")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


# Fewer bits, and answers of a given form


def kv_bits(config: FiguresConfig, run: RunConfig) -> None:
    """The cache in 32, 8 and 4 bits: bytes for each token, answers that change, right answers, speed."""
    model, tokenizer = chat_model()
    names, rows = ("fact", "read", "sum", "sort"), []
    asked = [item for name in names for item in chat_instructions(World(), 40, 7, name, new=True)]
    prompts = [prompt_ids(tokenizer, join(item.prompt)) for item in asked]
    plain: list[list[int]] = []
    for bits in (0, 8, 4):
        engine = Engine(model, tokenizer, EngineConfig(kv_bits=bits))
        before = time.perf_counter()
        made = engine.generate(prompts, RequestParams(40, temperature=0))
        spent = time.perf_counter() - before
        plain = plain or [output.new_ids for output in made]
        same = float(np.mean([output.new_ids == own for output, own in zip(made, plain, strict=True)]))
        right = [item.check(words(output.text)) for item, output in zip(asked, made, strict=True)]
        per_token = store_bytes(engine.pool, model.config, bits, 4) / (engine.pool.n_blocks * engine.pool.block_size)
        rows.append([f"{bits or 32} bits", per_token, same, float(np.mean(right)), engine.generated_tokens / spent])
    columns = [Column("Cache"), Column("size", "bytes per token", ",.0f"), Column("same answers", "", ".0%")]
    config.save("kv-bits", [*columns, Column("right answers", "", ".1%"), Column("tokens/s", "", ",.0f")], rows, 1)


SUM_SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


def constraints(config: FiguresConfig, run: RunConfig) -> None:
    """Sums asked for as words and as JSON, with and without a constraint: valid form, right number, speed."""
    model, tokenizer = chat_model()
    held = schema_constraint(SUM_SCHEMA, TokenBytes(tokenizer, model.config.vocab_size))
    rows: list[list] = []
    ways = {
        "as it was taught": ("", None),
        "told to answer in JSON": (' Answer as JSON like {"sum": 7} .', None),
        "constrained to JSON": ("", held),
        "told and constrained": (' Answer as JSON like {"sum": 7} .', held),
    }
    for name, (told, constraint) in ways.items():
        valid, right, rates = [], [], []
        for seed in range(config.n_seeds):
            asked = chat_instructions(World(), 60, seed, "sum", new=True)
            prompts = [prompt_ids(tokenizer, join(item.prompt) + told) for item in asked]
            engine = Engine(model, tokenizer, EngineConfig())
            before = time.perf_counter()
            made = engine.generate(prompts, RequestParams(24, temperature=0, constraint=constraint))
            rates.append(engine.generated_tokens / (time.perf_counter() - before))
            valid.append(float(np.mean([number_in(output.text) is not None for output in made])))
            right.append(float(np.mean([is_sum(output.text, item) for output, item in zip(made, asked, strict=True)])))
        rows.append([name, valid, right, rates])
    columns = [Column("Sums"), Column("valid JSON", "", ".0%"), Column("right number", "", ".0%")]
    config.save("constraints", [*columns, Column("tokens/s", "", ",.0f")], rows)


def number_in(text: str) -> int | None:
    """The sum in an answer that is valid by SUM_SCHEMA."""
    try:
        return json.loads(text)["sum"]
    except (ValueError, TypeError, KeyError):
        return None


def is_sum(text: str, item) -> bool:
    """Whether an answer, in words or as JSON, has the number that the instruction's own answer has."""
    number = number_in(text)
    return item.check(words(text)) if number is None else str(number) in item.answer


# Endurance


def soak(config: FiguresConfig, run: RunConfig) -> None:
    """Thousands of short requests, a tenth of them aborted, in a small pool: memory, blocks and speed, part by part."""
    model, rows, rng = chat_model()[0], [], random.Random(run.seed)
    engine = Engine(model, None, EngineConfig(n_blocks=256, max_batch=32))
    n_parts, vocab = 10, model.config.vocab_size
    for part in range(n_parts):
        before, left, aborted = time.perf_counter(), config.n_soak // n_parts, 0
        alive: list[str] = []
        generated = engine.stats().generated_tokens
        while left or engine.busy:
            while left and engine.scheduler.n_waiting < 32:
                ids = [rng.randrange(16, vocab) for _ in range(rng.randint(4, 24))]
                alive.append(engine.add(ids, RequestParams(rng.randint(1, 16), seed=rng.randrange(2**31 - 1))))
                left -= 1
            if rng.random() < 0.3:
                aborted += engine.abort(alive[-rng.randint(1, min(20, len(alive)))])
            engine.step()
        stats, spent = engine.stats(), time.perf_counter() - before
        rate = (stats.generated_tokens - generated) / spent
        rows.append([f"{(part + 1) * config.n_soak // n_parts:,}", float(aborted), rate, memory(), stats.free_blocks])
    columns = [Column("Requests so far"), Column("aborted", "", ",.0f"), Column("tokens/s", "", ",.0f")]
    columns += [Column("memory of the process", "MiB", ".1f"), Column("free blocks at the end", "of 256", ".0f")]
    config.save("soak", columns, rows, 1)


def memory() -> float:
    """MiB of this process that are in memory now; the most so far where the system does not say."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def inference_breaks(config: FiguresConfig, run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    rows = []
    for name, (show, _) in INFERENCE_BREAKS.items():
        rows += [[f"`{name}`", what.partition(": ")[2], sound, broken] for what, sound, broken in show(run)]
    columns = [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")]
    config.save("inference-breaks", columns, rows, 1)


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], float]] = {  # name -> function, seconds
    "systems": (systems, 150),
    "batches": (batches, 5),
    "batching": (batching, 200),
    "phases": (phases, 60),
    "blocks": (blocks, 60),
    "prefix": (prefix, 60),
    "chunks": (chunks, 60),
    "preemption": (preemption, 60),
    "speculation": (speculation, 150),
    "kv-bits": (kv_bits, 20),
    "constraints": (constraints, 30),
    "soak": (soak, 60),
    **SERVING_EXPERIMENTS,
    "inference-breaks": (inference_breaks, 20),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)


def bench(config: ServingBenchConfig, run: RunConfig) -> None:
    """The engine beside transformers on the same requests, in turns: tokens per second, times, goodput."""
    announce(f"{config.n_requests} requests by five systems, {config.n_rounds + 1} rounds", 30 * (config.n_rounds + 1))
    found = compare(config, chat_model()[0], CHAT_FOLDER, run.seed)
    print(describe_machine())
    per_token = {name: [1 / item.tokens_per_second for item in measured] for name, measured in found.items()}
    rivals = [name for name in found if name.startswith("transformers")]
    for name, measured in found.items():
        first, each = (np.median([seconds(getattr(item, key)[q]) for item in measured]) for key, q in TIMES)
        same, rate = np.mean([item.same for item in measured]), 1 / np.median(per_token[name])
        print(f"{name}: {rate:,.0f} tokens/s, TTFT p95 {first:.0f} ms, TPOT p50 {each:.1f} ms, {same:.0%} the same")
    for rival in rivals:
        print(speed_line("engine", rival, per_token["engine"], per_token[rival]))
    print(speed_line("engine", "our static batches", *(per_token[n] for n in ("engine", list(found)[1]))))


TIMES = (("ttft", "p95"), ("tpot", "p50"))
