"""Topic 13 - The engine: many requests at once on one model, each with exactly the answer that it would get alone.

    engine = Engine(model, tokenizer, EngineConfig(max_batch=16))
    engine.add(prompt_ids, RequestParams(max_tokens=20, temperature=0))
    while engine.busy:
        for output in engine.step():
            print(output.request_id, output.text, output.finish_reason)

A step computes a token for every answer that runs, and pieces of the prompts that come next, together. Requests
join, leave, lose their memory and get it back between steps (request_scheduler.py); keys and values are in blocks
(paged_cache.py); the model is topic 09's (model_runner.py). Yu et al. 2022 (Orca, OSDI), Kwon et al. 2023 (vLLM, arXiv
2309.06180), Agrawal et al. 2024 (Sarathi-Serve, arXiv 2403.02310).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine_requests import EngineStats, RequestOutput, RequestParams, TextDecoder, TokenLogprob, new_row
from model_runner import make_runner
from modern_llm_architectures import CausalLM
from paged_cache import BlockPool, FloatStore, QuantisedStore, StepRows, store_bytes
from request_sampling import BadLogits, choose
from request_scheduler import Plan, Request, Scheduler, SchedulerConfig
from speculative_decoding import Draft, NgramLookup, Verdict, check_draft_model, draft_tokens, ends_text, verify
from stop_strings import TextStream
from workbench import check_name, check_range

KV_BITS = (0, 8, 4)


@dataclass(frozen=True)
class EngineConfig(SchedulerConfig):
    block_size: int = 16  # positions of a block
    n_blocks: int = 0  # blocks of the pool; 0: enough for max_batch longest requests, if cache_gib allows
    cache_gib: float = 4.0  # GiB of memory that the pool takes at most where n_blocks is 0
    prefix_cache: bool = True  # prompts that begin alike share blocks
    kv_bits: int = 0  # bits of a cached number, 8 or 4; 0 keeps the model's own type
    speculate: Literal["none", "ngram", "draft"] = "none"  # who guesses ahead: the text so far, or a smaller model
    n_draft: int = 4  # tokens guessed in a step

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "block_size", "n_draft", least=1)
        check_range(self, "n_blocks", least=0)
        check_range(self, "cache_gib", above=0)
        check_name("speculate", self.speculate, ("none", "ngram", "draft"))
        if self.kv_bits not in KV_BITS:
            raise ValueError(f"kv_bits={self.kv_bits} is not known; use 8 or 4, or 0 for the model's own type")


def pool_size(model: CausalLM, config: EngineConfig) -> int:
    """Blocks for max_batch requests of the longest context, or as many as cache_gib holds, if those are fewer."""
    wanted = config.max_batch * -(-model.config.max_seq_len // config.block_size)
    one_block, n_bytes = BlockPool(1, config.block_size), model.final_norm.weight.element_size()
    affordable = int(config.cache_gib * 2**30) // store_bytes(one_block, model.config, config.kv_bits, n_bytes)
    return max(1, min(wanted, affordable))


class Tables:
    """The block tables of the running requests as one array, a row for each, so that a step gathers them at once."""

    def __init__(self, pool: BlockPool, max_batch: int, most: int) -> None:
        self.rows = np.zeros((max_batch, pool.blocks_for(most) + 1), dtype=np.int64)

    def step_rows(
        self, store: FloatStore, requests: Sequence[Request], new_ids: Sequence[list[int]], starts: Sequence[int]
    ) -> StepRows:
        """What one pass over these requests reads and writes: new_ids follow `starts` positions of each."""
        for request in requests:
            if request.n_listed != len(request.table.blocks):
                row, blocks = self.rows[request.slot], request.table.blocks
                row[: len(blocks)], row[len(blocks) :] = blocks, blocks[0]
                request.n_listed = len(blocks)
        n_new = np.array([len(ids) for ids in new_ids])
        ids = np.zeros((len(requests), n_new.max()), dtype=np.int64)
        ids[np.arange(ids.shape[1]) < n_new[:, None]] = list(itertools.chain.from_iterable(new_ids))
        return StepRows(store, ids, n_new, np.array(starts), self.rows[[request.slot for request in requests]])


class PagedDraft:
    """A smaller model that guesses for the whole batch; it keeps its keys at the same places of a store of its own.

    So a prefix that the target shares is shared here too. The last guess of an accepted draft has not been read by the
    draft itself: where a block with such a gap is reused, a guess may be worse, and the tokens are still exact.
    """

    def __init__(self, draft: CausalLM, target: CausalLM, pool: BlockPool, most: int, tables: Tables) -> None:
        check_draft_model(draft, target)
        if most > draft.config.max_seq_len:
            raise ValueError(f"the draft reads {draft.config.max_seq_len} positions, the target {most}; use another")
        weight = draft.final_norm.weight
        self.draft, self.tables = draft, tables
        self.store = FloatStore(pool, draft.config, weight.dtype, weight.device)
        self.runner = make_runner(draft, self.store, most)

    def read(self, chunks: Sequence[tuple[Request, int]]) -> None:
        """Read pieces of prompts as the target does, before its table is moved on."""
        self.forward([request for request, _ in chunks], [request.table.n_tokens + n for request, n in chunks])

    def forward(self, requests: Sequence[Request], stops: Sequence[int], more: Sequence[list[int]] = ()) -> Tensor:
        """Read what is known up to `stops`, then `more` ids; the stream at each row's last token (rows, d_model)."""
        more = more or [[]] * len(requests)
        new_ids = [
            request.ids[request.n_drafted : stop] + guessed
            for request, stop, guessed in zip(requests, stops, more, strict=True)
        ]
        rows = self.tables.step_rows(self.store, requests, new_ids, [request.n_drafted for request in requests])
        for request, ids in zip(requests, new_ids, strict=True):
            request.n_drafted += len(ids)
        (hidden,) = self.runner.hidden([rows])
        lengths = torch.tensor([len(ids) for ids in new_ids], device=hidden.device)
        return hidden[lengths.cumsum(0) - 1]

    def propose(self, requests: Sequence[Request], rooms: Sequence[int], end_ids: Sequence[int]) -> list[Draft]:
        """At most `rooms` guesses for each request; those with equal room in one batch."""
        drafts = [Draft([])] * len(requests)
        for room in sorted(set(rooms) - {0}):
            members = [index for index, own in enumerate(rooms) if own == room]
            batch = [requests[index] for index in members]
            lengths = [len(request.ids) for request in batch]

            def next_logits(newest: list[int] | None, batch: list[Request] = batch, lengths: list[int] = lengths):
                more = [[token_id] for token_id in newest] if newest is not None else ()
                return self.draft.logits(self.forward(batch, lengths, more))  # (rows, vocab)

            made = draft_tokens(next_logits, [request.row for request in batch], room, end_ids)
            for index, draft in zip(members, made, strict=True):
                drafts[index] = draft
        return drafts


class Engine:
    """Answers requests on one model.

    Args:
        model: topic 09's, in eval mode, on any device
        tokenizer: whatever decodes ids; None answers with ids alone
        config: sizes and limits
        draft: a smaller model of the same vocabulary, for speculate="draft"

    An answer depends on its own prompt, parameters and seed, not on its neighbours (up to the rounding of sums). With
    one exception: where guesses are made, a request that samples draws a number for each guess, and has fewer guesses
    where memory is short; its distribution stays the same, the tokens that a seed gives may not. Raises ValueError for
    a model whose experts have a capacity, where a full batch would change answers.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: TextDecoder | None = None,
        config: EngineConfig | None = None,
        draft: CausalLM | None = None,
    ) -> None:
        config = config or EngineConfig()
        if model.config.experts and model.config.experts.capacity_factor:
            raise ValueError("experts with a capacity_factor drop tokens of a full batch; set it to None to serve")
        if (config.speculate == "draft") != (draft is not None):
            raise ValueError(f"speculate={config.speculate!r}, but a draft model is needed for 'draft' and only there")
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.end_ids = (model.config.eos_id, *model.config.more_eos_ids)
        self.max_context = model.config.max_seq_len  # positions of prompt and answer together
        self.pool = BlockPool(config.n_blocks or pool_size(model, config), config.block_size, config.prefix_cache)
        self.tables = Tables(self.pool, config.max_batch, self.max_context)
        weight = model.final_norm.weight
        kind = (self.pool, model.config, weight.dtype, weight.device)
        self.store = QuantisedStore(*kind[:2], config.kv_bits, *kind[2:]) if config.kv_bits else FloatStore(*kind)
        self.runner = make_runner(model, self.store, self.max_context)
        self.draft = PagedDraft(draft, model, self.pool, self.max_context, self.tables) if draft else None
        self.stores = [self.store, self.draft.store] if self.draft else [self.store]
        self.lookup = NgramLookup()
        n_ahead = 0 if config.speculate == "none" else config.n_draft
        self.scheduler = Scheduler(config, self.pool, n_ahead, self.copy_blocks)
        self.requests: dict[str, Request] = {}
        self.aborted: list[RequestOutput] = []
        self.n_added = self.prompt_tokens = self.generated_tokens = self.cached_tokens = 0
        self.proposed_tokens = self.accepted_tokens = 0

    # Coming and going

    def add(self, prompt: Sequence[int], params: RequestParams, request_id: str | None = None) -> str:
        """Queue a request and return its id.

        Raises ValueError for what can never be answered, Overloaded if the queue is full.
        """
        return self.add_choices(prompt, [params], None if request_id is None else [request_id])[0]

    def add_choices(
        self, prompt: Sequence[int], params: Sequence[RequestParams], request_ids: Sequence[str] | None = None
    ) -> list[str]:
        """Queue several answers to one prompt, all or none; the prompt is computed once and its blocks are shared."""
        if request_ids is None:
            request_ids = [f"request-{self.n_added + index}" for index in range(len(params))]
        if not params or len(params) != len(request_ids):
            raise ValueError(f"{len(params)} parameters need as many ids, at least 1; got {len(request_ids)}")
        for index, request_id in enumerate(request_ids):
            if request_id in self.requests or request_id in request_ids[:index]:
                raise ValueError(f"request id {request_id!r} is in use; choose another")
        if len({own.tenant for own in params}) > 1:
            raise ValueError("the answers to one prompt belong to one tenant")
        for own in params:
            self.check(prompt, own)
        device = self.model.final_norm.weight.device
        made = [
            Request(request_id, new_row(own, list(prompt), device))
            for request_id, own in zip(request_ids, params, strict=True)
        ]
        self.scheduler.add(*made)
        self.n_added += len(made)
        for request in made:
            if self.tokenizer is not None:
                request.text = TextStream(self.tokenizer, request.row.params.stop, request.row.prompt_ids)
            self.requests[request.request_id] = request
        return list(request_ids)

    def check(self, prompt: Sequence[int], params: RequestParams) -> None:
        vocab_size, n_prompt = self.model.config.vocab_size, len(prompt)
        if not n_prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        wrong = [token_id for token_id in prompt if type(token_id) is not int or not 0 <= token_id < vocab_size]
        if wrong:
            raise ValueError(f"the prompt holds {wrong[0]!r}, which is no token id of 0..{vocab_size - 1}")
        if n_prompt + params.max_tokens > self.max_context:
            raise ValueError(
                f"prompt ({n_prompt} tokens) and max_tokens ({params.max_tokens}) exceed the model's context of "
                f"{self.max_context} tokens; shorten the prompt or lower max_tokens"
            )
        for token_id, _ in params.logit_bias:
            if token_id >= vocab_size:
                raise ValueError(f"logit_bias names id {token_id}; the vocabulary has 0..{vocab_size - 1}")
        if params.constraint is not None:
            shape = tuple(params.constraint.allowed(params.constraint.start()).shape)
            if shape != (vocab_size,):
                raise ValueError(f"the constraint is for a vocabulary of {shape}, the model has {vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need an engine with a tokenizer")

    def abort(self, request_id: str) -> bool:
        """End a request in any phase; its blocks are free at once. False if there is no such request (any more)."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return False
        self.scheduler.leave(request)
        self.aborted.append(self.report(request, [], "", "abort", []))
        return True

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.requests or self.aborted)

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.n_waiting,
            n_blocks=pool.n_blocks,
            free_blocks=pool.n_free,
            cached_blocks=len(pool.idle),
            steps=scheduler.step,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=scheduler.n_preemptions,
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def generate(self, prompts: Sequence[list[int]], params: RequestParams | Sequence[RequestParams]):
        """Answer all prompts; one RequestOutput each, with all ids and the whole text, in the order of the prompts."""
        each = [params] * len(prompts) if isinstance(params, RequestParams) else list(params)
        waiting = list(zip(prompts, each, strict=True))[::-1]
        names: list[str] = []
        whole: dict[str, RequestOutput] = {}
        while waiting or self.busy:
            while waiting and self.scheduler.n_waiting < self.config.max_waiting:
                names.append(self.add(*waiting.pop()))
            for output in self.step():
                before = whole.get(output.request_id)
                if before is not None:
                    output.new_ids, output.text = before.new_ids + output.new_ids, before.text + output.text
                    if output.logprobs is not None:
                        output.logprobs = before.logprobs + output.logprobs
                whole[output.request_id] = output
        return [whole[name] for name in names]

    # One step

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        """Compute one step, and return what it adds to each request that has got something."""
        outputs, self.aborted = self.aborted, []
        plan = self.scheduler.plan()
        if not plan.decodes and not plan.chunks:
            return outputs
        self.clear_fresh()
        drafts = self.guess(plan.decodes)
        groups = []
        if plan.decodes:
            new_ids = [[request.ids[-1], *draft.ids] for request, draft in zip(plan.decodes, drafts, strict=True)]
            starts = [request.table.n_tokens for request in plan.decodes]
            groups.append(self.tables.step_rows(self.store, plan.decodes, new_ids, starts))
        if plan.chunks:
            groups.append(self.prompt_rows(plan))
        hidden = self.runner.hidden(groups)
        ready, at = self.move_on(plan, drafts)
        states = torch.cat(hidden)
        logits = self.model.logits(states[at] if plan.chunks else states)  # (*, vocab)
        if self.scheduler.n_ahead:
            outputs += self.take_verdicts(logits, ready, drafts)
        else:
            outputs += self.take_choices(logits, ready)
        return outputs

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.clear_fresh()
        for store in self.stores:
            store.copy(copies)

    def clear_fresh(self) -> None:
        """Blank the blocks that were taken since the last time: nothing of an earlier request stays in them."""
        if self.pool.fresh:
            for store in self.stores:
                store.clear(self.pool.fresh)
            self.pool.fresh.clear()

    def prompt_rows(self, plan: Plan) -> StepRows:
        requests = [request for request, _ in plan.chunks]
        starts = [request.table.n_tokens for request in requests]
        pieces = [request.ids[start : start + n] for start, (request, n) in zip(starts, plan.chunks, strict=True)]
        self.prompt_tokens += sum(map(len, pieces))
        if self.draft:
            self.draft.read(plan.chunks)
        return self.tables.step_rows(self.store, requests, pieces, starts)

    def guess(self, decodes: Sequence[Request]) -> list[Draft]:
        """Drafts for the rows that decode, no longer than their blocks and their answer have room for."""
        if not self.scheduler.n_ahead or not decodes:
            return [Draft([])] * len(decodes)
        rooms = []
        for request in decodes:
            table = request.table
            most = min(len(table.blocks) * self.pool.block_size, request.most_positions)
            rooms.append(max(0, min(self.scheduler.n_ahead, most - table.n_tokens - 1)))
        if self.draft:
            return self.draft.propose(decodes, rooms, self.end_ids)
        rows = [request.row for request in decodes]
        drafts = self.lookup.propose(rows, self.scheduler.n_ahead, self.end_ids)
        return [Draft(draft.ids[:room]) for draft, room in zip(drafts, rooms, strict=True)]

    def move_on(self, plan: Plan, drafts: Sequence[Draft]) -> tuple[list[Request], list[int]]:
        """Book what has been computed. Returns who gets tokens now, and where in the stream their logits come from.

        A decoding row has one place for its token and one for each guess; a prompt that is complete has its last one,
        and so have its followers.
        """
        ready, place = list(plan.decodes), sum(1 + len(draft.ids) for draft in drafts)
        at = list(range(place))
        for request in plan.decodes:
            self.pool.advance(request.table, request.ids)
        for request, n in plan.chunks:
            place += n
            self.count_cached(request)
            self.pool.advance(request.table, request.ids[: request.table.n_tokens + n])
            if request.table.n_tokens == len(request.ids):
                request.phase = "decode"
                for member in (request, *self.scheduler.fork(request)):
                    self.count_cached(member)
                    ready.append(member)
                    at.append(place - 1)
        return ready, at

    def count_cached(self, request: Request) -> None:
        if not request.counted:
            request.counted = True
            self.cached_tokens += request.n_cached

    def take_choices(self, logits: Tensor, ready: Sequence[Request]) -> list[RequestOutput]:
        """Choose a token for each row of logits (rows, vocab); a row without a distribution ends with an error."""
        outputs = []
        while ready:
            try:
                chosen = choose(logits, [request.row for request in ready], self.end_ids)
            except BadLogits as bad:
                outputs += [self.finish(ready[index], [], "", "error", []) for index in bad.rows]
                kept = [index for index in range(len(ready)) if index not in bad.reasons]
                ready, logits = [ready[index] for index in kept], logits[kept]
                continue
            tokens = zip(ready, chosen.ids, chosen.logprobs, strict=True)
            return outputs + [self.grow(request, [token_id], [logprob]) for request, token_id, logprob in tokens]
        return outputs

    def take_verdicts(self, logits: Tensor, ready: Sequence[Request], drafts: Sequence[Draft]) -> list[RequestOutput]:
        """Keep or replace what was guessed: logits (places, vocab), one place for each row and each of its guesses."""
        drafts = [*drafts, *[Draft([])] * (len(ready) - len(drafts))]
        starts = np.cumsum([0, *(1 + len(draft.ids) for draft in drafts)])[:-1]
        width = 1 + max((len(draft.ids) for draft in drafts), default=0)
        index = np.minimum(starts[:, None] + np.arange(width), len(logits) - 1)
        padded = logits[torch.from_numpy(index).to(logits.device)]  # (rows, places, vocab)
        outputs, kept = [], list(range(len(ready)))
        while kept:
            rows = [ready[index].row for index in kept]
            try:
                verdicts = verify(padded[kept], rows, [drafts[index] for index in kept], self.end_ids)
            except BadLogits as bad:
                outputs += [self.finish(ready[kept[row]], [], "", "error", []) for row in bad.rows]
                kept = [index for row, index in enumerate(kept) if row not in bad.reasons]
                continue
            return outputs + [
                self.take_verdict(ready[index], drafts[index], verdict)
                for index, verdict in zip(kept, verdicts, strict=True)
            ]
        return outputs

    def take_verdict(self, request: Request, draft: Draft, verdict: Verdict) -> RequestOutput:
        if draft.ids:
            self.proposed_tokens += len(draft.ids)
            self.accepted_tokens += verdict.n_accepted
            n_known = len(request.ids)
            self.pool.advance(request.table, request.ids + verdict.ids[: verdict.n_accepted])
            request.n_drafted = min(request.n_drafted, n_known + verdict.n_accepted)  # the others were read in vain
        return self.grow(request, verdict.ids, verdict.logprobs)

    def grow(self, request: Request, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> RequestOutput:
        """Add tokens to a request, up to the one that ends it."""
        row, params, reason, n, text = request.row, request.row.params, None, 0, ""
        for token_id in ids:
            n += 1
            row.new_ids.append(token_id)
            request.ids.append(token_id)
            if ends_text(token_id, params, self.end_ids):
                reason = "stop"
                break
            if params.constraint is not None:
                row.constraint_state = params.constraint.advance(row.constraint_state, token_id)
            if request.text is not None:
                piece, stopped = request.text.push((token_id,))
                text += piece
                if stopped:
                    reason = "stop"
                    break
            if len(row.new_ids) == params.max_tokens:
                reason = "length"
                break
        self.generated_tokens += n
        if reason is None:
            return self.report(request, list(ids[:n]), text, None, logprobs[:n])
        return self.finish(request, list(ids[:n]), text, reason, logprobs[:n])

    def finish(
        self, request: Request, ids: list[int], text: str, reason: str, logprobs: Sequence[TokenLogprob | None]
    ) -> RequestOutput:
        if request.text is not None:
            text += request.text.flush()
        self.scheduler.leave(request)
        del self.requests[request.request_id]
        return self.report(request, ids, text, reason, logprobs)

    def report(
        self,
        request: Request,
        ids: list[int],
        text: str,
        reason: str | None,
        logprobs: Sequence[TokenLogprob | None],
    ) -> RequestOutput:
        row = request.row
        told = list(logprobs) if row.params.logprobs >= 0 else None
        sizes = (len(row.prompt_ids), len(row.new_ids), request.n_cached)
        return RequestOutput(request.request_id, ids, text, reason, told, *sizes)
