"""Topic 13 - Serving experiments: real servers in processes of their own, asked over HTTP until they have enough.

python 13-inference-at-scale/inference_at_scale.py figures load balancing
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import uvicorn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from http_streams import call, check_url
from load_generator import LoadConfig, LoadReport, Record, one_request, percentiles, report_of, run_load
from replica_router import POLICIES, ReplicaProcess, Router, RouterConfig, RouterServer, make_router_app
from server import listen, uvicorn_settings
from tiny_world import World, join
from workbench import Column, RunConfig, save_figure

if TYPE_CHECKING:
    from inference_experiments import FiguresConfig

# One server, from idle to more than it can do


SHARES = (0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)  # of the highest throughput that a closed loop finds
N_LOAD = 400  # requests of one measurement


async def load_curve(seeds: range) -> tuple[float, dict[float, list[LoadReport]]]:
    """The throughput of 32 clients that wait for their answers, then open loops at shares of it."""
    process = ReplicaProcess("--max-waiting", "1024")
    try:
        config = LoadConfig(await process.start(), n_requests=N_LOAD)
        full = replace(config, kind="closed", n_clients=32)
        await run_load(full, 99)  # warms up
        capacity = report_of(await run_load(full, 98), full).throughput
        found: dict[float, list[LoadReport]] = {share: [] for share in SHARES}
        for seed in seeds:
            for share in SHARES:
                own = replace(config, rate=share * capacity)
                found[share].append(report_of(await run_load(own, seed), own))
    finally:
        await process.stop(1.0)
    return capacity, found


def load(config: "FiguresConfig", run: RunConfig) -> None:
    """Poisson arrivals at shares of what the server can do: times, goodput, and both sides of Little's law."""
    capacity, found = asyncio.run(load_curve(range(config.n_seeds)))
    rows: list[list] = []
    for share, reports in found.items():
        row: list = [f"{share:.0%}", [item.throughput for item in reports]]
        row += [[1000 * getattr(item, key)[q] for item in reports] for key, q in TIMES]
        rows.append([*row, [item.good for item in reports], *sides(reports)])
    columns = [Column("Load", f"of {capacity:.0f} requests/s"), Column("answered", "requests/s", ".1f")]
    columns += [Column("first token, p50", "ms", ",.0f"), Column("p95", "ms", ",.0f")]
    columns += [Column("whole answer, p95", "ms", ",.0f"), Column("good", "", ".0%")]
    columns += [Column("in the system", "", ".1f"), Column("rate × time", "", ".1f")]
    config.save("load", columns, rows)
    save_figure(plot_load(found, capacity), config.folder / "load.svg")


TIMES = (("ttft", "p50"), ("ttft", "p95"), ("latency", "p95"))


def sides(reports: list[LoadReport]) -> tuple[list[float], list[float]]:
    """What Little's law says are equal: requests seen in the system, and their rate times their mean time."""
    return [item.mean_in_system for item in reports], [item.rate_times_time for item in reports]


def plot_load(found: dict[float, list[LoadReport]], capacity: float) -> Figure:
    """Time to the first token, and both sides of Little's law, against the load."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    offered = [np.mean([item.offered for item in reports]) / capacity for reports in found.values()]
    for index, quantile in enumerate(("p50", "p95")):
        values = [[1000 * item.ttft[quantile] for item in reports] for reports in found.values()]
        left.plot(offered, [np.mean(own) for own in values], "o-", color=f"C{index}", label=quantile)
    left.set(yscale="log", xlabel="offered load, of what 32 waiting clients get", ylabel="time to the first token (ms)")
    left.set(title="The first token: a cliff beyond full load")
    left.legend(frameon=False)
    seen, product = zip(*(sides(reports) for reports in found.values()), strict=True)
    right.plot(np.ravel(product), np.ravel(seen), "o")
    most = float(np.max(product))
    right.plot([0, most], [0, most], "--", color="0.5", label="Little's law")
    right.set(xlabel="rate × mean time", ylabel="requests seen in the system")
    right.set(title="Little's law holds in every run")
    right.legend(frameon=False)
    return figure


# Several replicas


N_REPLICAS, N_HEADS = 3, 12  # replicas; long beginnings that prompts share
N_SPREAD, N_CLIENTS = 240, 12  # requests of one measurement; clients that send them


def headed_bodies(n: int, seed: int) -> list[bytes]:
    """Requests that begin with one of N_HEADS long system prompts, some of them far more often than others."""
    rng, world = random.Random(seed), World()
    heads = [
        " ".join(join(document.tokens) for document in world.documents(4, 500 + each, "train"))
        for each in range(N_HEADS)
    ]
    weights = [1 / (1 + rank) for rank in range(N_HEADS)]
    found = []
    for instruction in world.instructions(n, seed, "train"):
        [head] = rng.choices(heads, weights)
        messages = [{"role": "system", "content": head[:700]}, {"role": "user", "content": join(instruction.prompt)}]
        content = {"model": "course-chat", "messages": messages, "max_tokens": rng.choice((4, 8, 16, 64))}
        content |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        found.append(json.dumps(content).encode())
    return found


async def counted(url: str) -> dict[str, float]:
    """What a replica says of itself: counters by name."""
    async with call(check_url(url), "GET", "/metrics", timeout=30) as reply:
        text = (await reply.body()).decode()
    return {name: float(value) for name, value in re.findall(r"^course_(\w+?)(?:_total)? (\S+)$", text, re.MULTILINE)}


async def spread(urls: list[str], policy: str, seed: int) -> dict[str, float]:
    """All requests through one router with this policy, from clients that wait; times, cache and evenness."""
    sock = listen("127.0.0.1", 0)
    config = RouterConfig(policy=policy, cache_entries=0)
    router = Router(urls, config, seed)
    server = RouterServer(uvicorn.Config(make_router_app(router), **uvicorn_settings(config)), router)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    load = LoadConfig(f"http://127.0.0.1:{sock.getsockname()[1]}")
    before = [await counted(url) for url in urls]
    bodies, records = iter(headed_bodies(N_SPREAD, seed)), []
    begin = time.perf_counter()

    async def client() -> None:
        for body in bodies:
            records.append(await one_request(load, body, Record(time.perf_counter())))

    await asyncio.gather(*(client() for _ in range(N_CLIENTS)))
    seconds = time.perf_counter() - begin
    after = [await counted(url) for url in urls]
    server.should_exit = True
    await serving
    change = {
        key: sum(b[key] - a[key] for a, b in zip(before, after, strict=True))
        for key in ("prompt_tokens", "cached_tokens")
    }
    counts = [replica.n_requests for replica in router.replicas]
    ok = [record for record in records if record.outcome == "ok"]
    return {
        "ok": len(ok) / len(records),
        "rate": len(ok) / seconds,
        "ttft": 1000 * percentiles([record.ttft for record in ok])["p50"],
        "ttft_p95": 1000 * percentiles([record.ttft for record in ok])["p95"],
        "cached": change["cached_tokens"] / (change["cached_tokens"] + change["prompt_tokens"]),
        "busiest": max(counts) / (sum(counts) / len(counts)),
    }


async def all_policies(seeds: range) -> dict[str, list[dict[str, float]]]:
    """Every policy on the same replicas, started anew for each seed and policy: a warm cache would favour the next."""
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    for seed in seeds:
        for policy in POLICIES:
            processes = [ReplicaProcess("--n-blocks", "96") for _ in range(N_REPLICAS)]  # no room for all heads
            try:
                urls = [await process.start() for process in processes]
                found[policy].append(await spread(urls, policy, seed))
            finally:
                await asyncio.gather(*(process.stop(1.0) for process in processes if process.process))
    return found


def balancing(config: "FiguresConfig", run: RunConfig) -> None:
    """Policies over real replicas, prompts with shared heads: evenness, cache, times."""
    found = asyncio.run(all_policies(range(config.n_seeds)))
    keys = ("rate", "ttft", "ttft_p95", "cached", "busiest", "ok")
    rows = [[policy, *([item[key] for item in own] for key in keys)] for policy, own in found.items()]
    columns = [Column("Policy"), Column("answered", "requests/s", ".1f"), Column("first token, p50", "ms", ",.0f")]
    columns += [Column("p95", "ms", ",.0f"), Column("prompt tokens cached", "", ".0%")]
    columns += [Column("busiest replica", "times the mean", ".2f"), Column("answered at all", "", ".0%")]
    config.save("balancing", columns, rows)


SERVING_EXPERIMENTS: dict[str, tuple[Callable, float]] = {"load": (load, 150), "balancing": (balancing, 240)}
