"""Topic 13 - Inference failures: slips that raise no error, each switched on and measured beside what is right.

python 13-inference-at-scale/inference_at_scale.py --break cache-once-per-layer        # one of them
python 13-inference-at-scale/inference_at_scale.py figures inference-breaks            # all, the chapter's table

Every entry of INFERENCE_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import paged_cache
from engine_requests import RequestParams
from llm_config import ModelConfig
from llm_layers import KVCache
from modern_llm_architectures import CausalLM
from paged_cache import BlockPool, FloatStore, StepRows
from replica_router import ClockRobin, Replica, RoundRobin
from request_scheduler import Request
from serving_bench import ServingBenchConfig, mixed_jobs
from serving_engine import Engine, EngineConfig, Tables
from speculative_decoding import remainder
from stop_strings import TextStream
from workbench import RunConfig, seed_everything

Row = tuple[str, float, float]
TINY = ModelConfig(vocab_size=60, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=32, max_seq_len=128)


def tiny() -> CausalLM:
    """A small model in float64 whose blocks differ and matter, and whose answers have no end."""
    seed_everything(0)
    model = CausalLM(TINY).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def answers(engine: Engine, prompts: Sequence[list[int]], params: Sequence[RequestParams]) -> list[list[int]]:
    return [output.new_ids for output in engine.generate(prompts, params)]


def some_prompts(n: int, seed: int = 0) -> list[list[int]]:
    config = ServingBenchConfig(n_requests=n, least_prompt=5, most_prompt=40)
    return [job.prompt for job in mixed_jobs(config, TINY.vocab_size, seed)]


def share_same(found: list[list[int]], wanted: list[list[int]]) -> float:
    return sum(own == other for own, other in zip(found, wanted, strict=True)) / len(wanted)


GREEDY = RequestParams(12, temperature=0, ignore_eos=True)


# A cache that counts its layers


class OneCounter(KVCache):
    """A layer's cache that asks a counter shared by all layers for its length; `advances` says who moves it."""

    def __init__(self, counter: list[int], advances: bool) -> None:
        super().__init__()
        self.counter, self.advances = counter, advances

    def __len__(self) -> int:
        return self.counter[0]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.advances:
            self.counter[0] += k.shape[2]
        return super().append(k, v)


@torch.no_grad()
def cache_once_per_layer(run: RunConfig) -> list[Row]:
    """The position moves on by the number of layers with every token."""
    model, ids = tiny(), torch.tensor([some_prompts(1, 3)[0]])
    whole, errors = model(ids), []
    for broken in (False, True):
        counter = [0]
        caches = [OneCounter(counter, broken or layer == TINY.n_layers - 1) for layer in range(TINY.n_layers)]
        steps = [model(ids[:, [place]], caches) for place in range(ids.shape[1])]
        errors.append((torch.cat(steps, dim=1) - whole).abs().max().item())
    return [("cache-once-per-layer: largest error of a logit, decoding step by step", *errors)]


# One request's blocks for everybody


class FirstTableForAll(Tables):
    """Gives every row of a step the blocks of the first."""

    def step_rows(
        self, store: FloatStore, requests: Sequence[Request], new_ids: Sequence[list[int]], starts: Sequence[int]
    ) -> StepRows:
        super().step_rows(store, requests, new_ids, starts)
        for request in requests:
            self.rows[request.slot] = self.rows[requests[0].slot]
        return super().step_rows(store, requests, new_ids, starts)


def one_cache_for_all(run: RunConfig) -> list[Row]:
    """Every request of a batch reads what one of them wrote."""
    model, prompts, same = tiny(), some_prompts(8), []
    wanted = [answers(Engine(model), [prompt], [GREEDY])[0] for prompt in prompts]
    for broken in (False, True):
        engine = Engine(model, None, EngineConfig(prefix_cache=False))
        if broken:
            engine.tables.__class__ = FirstTableForAll
        same.append(share_same(answers(engine, prompts, [GREEDY] * len(prompts)), wanted))
    return [("one-cache-for-all: answers that are as when asked alone", *same)]


# A batch that waits for its longest


def waits_for_old(run: RunConfig) -> list[Row]:
    """New requests come in only when all of the batch before are done."""
    model, config = tiny(), ServingBenchConfig(n_requests=48, least_prompt=5, most_prompt=20, most_tokens=64)
    jobs, steps = mixed_jobs(config, TINY.vocab_size, 0), []
    for broken in (False, True):
        engine, left = Engine(model, None, EngineConfig(max_batch=8)), list(jobs)[::-1]
        while left or engine.busy:
            n_room = 8 - len(engine.requests) if not broken or not engine.requests else 0
            for job in [left.pop() for _ in range(min(n_room, len(left)))]:
                engine.add(job.prompt, RequestParams(job.n_new, temperature=0, ignore_eos=True))
            engine.step()
        steps.append(float(engine.stats().steps))
    return [("waits-for-old: steps for 48 answers, 8 at a time", *steps)]


# Blocks that are not one's own


class TrustsTheHash(BlockPool):
    """Takes whatever is found at the place of a hash."""

    def find(self, parent: int, tokens: tuple[int, ...], tenant: str) -> int | None:
        found = self.places.get(paged_cache.content_hash(parent, tokens, tenant))
        return found[0] if found else None


class IgnoresTenants(BlockPool):
    """Looks for a content without asking whose it is."""

    def find(self, parent: int, tokens: tuple[int, ...], tenant: str) -> int | None:
        return super().find(parent, tokens, "")

    def advance(self, table: paged_cache.BlockTable, ids: Sequence[int]) -> None:
        table.tenant = ""
        super().advance(table, ids)


def hash_trusted(run: RunConfig) -> list[Row]:
    """Two prefixes meet at one hash, here of 3 values, and the second gets the keys of the first."""
    model, same, right = tiny(), [], paged_cache.content_hash
    prompts = some_prompts(16, 5)
    wanted = [answers(Engine(model), [prompt], [GREEDY])[0] for prompt in prompts]
    paged_cache.content_hash = lambda parent, tokens, tenant: sum(tokens) % 3
    try:
        for broken in (False, True):
            engine = Engine(model, None, EngineConfig(block_size=4, max_batch=1))
            if broken:
                engine.pool.__class__ = TrustsTheHash
            same.append(share_same(answers(engine, prompts, [GREEDY] * len(prompts)), wanted))
    finally:
        paged_cache.content_hash = right
    return [("hash-trusted: answers that are right with a hash of three values", *same)]


def salt_ignored(run: RunConfig) -> list[Row]:
    """Whoever sends a guess of another's prompt sees by the time to the first token whether it was right."""
    model, [prompt], cached = tiny(), some_prompts(1, 7), []
    prompt = (prompt * 8)[:33]
    for broken in (False, True):
        engine = Engine(model, None, EngineConfig(block_size=4))
        if broken:
            engine.pool.__class__ = IgnoresTenants
        for tenant in ("one", "another"):
            [output] = engine.generate([prompt], RequestParams(2, temperature=0, tenant=tenant))
        cached.append(float(output.n_cached))
    return [("salt-ignored: tokens of 33 that a second tenant finds in the cache", *cached)]


# Chance


def shared_generator(run: RunConfig) -> list[Row]:
    """One random generator for the batch: a seed gives another answer when somebody else is served beside it."""
    model, prompts, same = tiny(), some_prompts(8, 9), []
    params = [RequestParams(12, seed=100 + index, ignore_eos=True) for index in range(len(prompts))]
    for broken in (False, True):

        def run_one(rows: list[int], broken: bool = broken) -> list[list[int]]:
            engine = Engine(model)
            names = [engine.add(prompts[row], params[row]) for row in rows]
            if broken:
                shared = engine.requests[names[0]].row.generator
                for name in names:
                    engine.requests[name].row.generator = shared
            found = {name: [] for name in names}
            while engine.busy:
                for output in engine.step():
                    found[output.request_id] += output.new_ids
            return list(found.values())

        alone = [run_one([row])[0] for row in range(len(prompts))]
        same.append(share_same(run_one(list(range(len(prompts)))), alone))
    return [("shared-generator: seeded answers that neighbours leave as they are", *same)]


def biased_speculation(run: RunConfig) -> list[Row]:
    """A refused guess is replaced by a draw from p itself, not from what of p is left over."""
    generator = torch.Generator().manual_seed(run.seed)
    p, q = (torch.rand(8, dtype=torch.float64, generator=generator).pow(3) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    kept = torch.minimum(p, q)  # (vocab): chance that each token is guessed and accepted
    distances = []
    left_over = remainder(p[None], q[None])[0]  # (vocab), in proportion
    for instead in (left_over / left_over.sum(), p):
        made = kept + (1 - kept.sum()) * instead
        distances.append((made - p).abs().sum().item() / 2)
    return [("biased-speculation: total variation distance from the target's distribution", *distances)]


# What is shown, and who gets what


class Letters:
    """One character for each id."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token_id) for token_id in ids)


def stop_leaked(run: RunConfig) -> list[Row]:
    """Text goes out as soon as it is decoded; what turns out to begin a stop string has been read by then."""
    text, stop, stream, shown = "Answer: 7\n\nUser: and then?", "\n\nUser:", None, ""
    stream = TextStream(Letters(), (stop,))
    for token_id in map(ord, text):
        piece, done = stream.push((token_id,))
        shown += piece
        if done:
            break
    wanted, eager = text[: text.index(stop)], text[: text.index(stop) + len(stop)]
    return [
        (
            "stop-leaked: characters of a stop string that a client has seen",
            *(float(len(own) - len(wanted)) for own in (shown, eager)),
        )
    ]


def clock_robin(run: RunConfig) -> list[Row]:
    """The replica is chosen by the second of the clock: a burst meets one of them."""
    busiest = []
    for policy in (RoundRobin(), ClockRobin()):
        replicas = [Replica(f"http://127.0.0.1:{port}") for port in range(1, 5)]
        if isinstance(policy, ClockRobin):
            policy.clock = lambda: 1000.3  # a burst is over within the second
        for _ in range(100):
            policy.pick(replicas, "").n_requests += 1
        busiest.append(max(replica.n_requests for replica in replicas) / 25)
    return [("clock-robin: load of the busiest of four replicas in a burst, times the mean", *busiest)]


INFERENCE_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "cache-once-per-layer": (cache_once_per_layer, 1),
    "one-cache-for-all": (one_cache_for_all, 1),
    "waits-for-old": (waits_for_old, 2),
    "hash-trusted": (hash_trusted, 2),
    "salt-ignored": (salt_ignored, 1),
    "shared-generator": (shared_generator, 2),
    "biased-speculation": (biased_speculation, 1),
    "stop-leaked": (stop_leaked, 1),
    "clock-robin": (clock_robin, 1),
}
