"""The solutions of topic 13's exercises against oracles that share no code with them.

That every checker accepts its solution and refuses every planted mistake is tested with all other exercises.
"""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F

from broken_parts import LeakyBatcher, drawn
from engine_requests import RequestParams, RowState
from exercises_08 import numbers as normal
from exercises_13 import (
    EXERCISES,
    SHAPE,
    MendedBatcher,
    accept_or_replace,
    batcher_without,
    blocks_and_bytes,
    filtered_draw,
    mended_tokens,
    midpoints,
    paged_keys,
    random_trace,
    run,
    shown_pieces,
    step_with,
    token_masks,
)
from request_sampling import at_quantile, uniforms
from speculative_decoding import Draft, acceptance_chances, remainder, verify


def verdict(name: str, answer) -> str:
    return next(exercise for exercise in EXERCISES if exercise.name == name).verdict(answer)


def test_hand_examples_of_the_chapter() -> None:
    requests = [("", [1, 2, 3, 4, 5, 6], 3), ("", [1, 2, 3, 4, 9], 4), ("", [7, 8], 2)]
    assert blocks_and_bytes(requests, 4, SHAPE, 2) == (4, 4 * 4 * 2 * 3 * 2 * 8 * 2)
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    assert accept_or_replace(p, q, 1, 0.49, 0.9) == (1, True)
    assert accept_or_replace(p, q, 1, 0.51, 0.9) == (0, False)
    assert shown_pieces(["a", "E", "N", "D", "b"], ["END"]) == ["a", "", "", "", "", ""]


def test_requests_that_share_nothing_add_up() -> None:
    for size in (1, 3, 4, 7):
        requests = [("", [100 * n + place for place in range(2 * n + 1)], n + 1) for n in range(1, 6)]
        alone = [blocks_and_bytes([request], size, SHAPE, 4) for request in requests]
        assert blocks_and_bytes(requests, size, SHAPE, 4) == tuple(map(sum, zip(*alone, strict=True)))
        twice = blocks_and_bytes(requests * 2, size, SHAPE, 4)[0]
        saved = sum((len(prompt) - 1) // size for _, prompt, _ in requests)
        assert twice == 2 * sum(n_blocks for n_blocks, _ in alone) - saved


class Counting(MendedBatcher):
    n_preempted = 0

    def preempt(self, name: str) -> None:
        Counting.n_preempted += 1
        super().preempt(name)


def test_random_traces_meet_every_leak_and_the_mended_batcher_survives_more_of_them() -> None:
    assert not [fault for seed in range(40, 140) if (fault := random_trace(Counting, random.Random(seed)))]
    assert Counting.n_preempted > 100
    for leaks in (("abort",), ("preempt",), ("read",)):
        assert any(random_trace(batcher_without(*leaks), random.Random(seed)) for seed in range(40)), leaks
    assert random_trace(LeakyBatcher, random.Random(0))


def test_attention_over_gathered_keys_is_that_over_each_row_alone() -> None:
    store, tables, lengths, n_new = normal(7, 3, 4, 5), [[6, 2, 0], [1], [3, 5]], [11, 3, 6], 2
    q = normal(3, 3, n_new, 5, seed=1)
    keys, mask = paged_keys(store, tables, lengths, n_new)
    mixed = F.scaled_dot_product_attention(q, keys, keys, mask)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        own = torch.stack([store[table[place // 4], :, place % 4] for place in range(length)], dim=1)
        for index in range(n_new):
            seen = own[:, : length - n_new + index + 1]
            alone = F.scaled_dot_product_attention(q[row, :, index : index + 1], seen, seen)
            torch.testing.assert_close(mixed[row, :, index : index + 1], alone, atol=1e-10, rtol=0)


def test_one_step_is_the_engines_rule() -> None:
    generator, n_kept = torch.Generator().manual_seed(3), 0
    for seed in range(300):
        p, q = (normal(7, seed=seed + shift).mul(2).softmax(0) for shift in (0, 1000))
        guess = int(at_quantile(q[None], uniforms(generator, 1)[None])[0])
        u, v = uniforms(generator, 2).tolist()
        token, kept = accept_or_replace(p.tolist(), q.tolist(), guess, u, v)
        assert kept == (u < acceptance_chances(p, q)[guess].item())
        rest = remainder(p[None], q[None])
        assert token == (guess if kept else int(at_quantile(rest, torch.tensor([[v]], dtype=torch.float64))[0]))
        n_kept += kept
    assert 60 < n_kept < 240


@pytest.mark.parametrize("shift", [0.012, -0.012])
def test_a_chance_that_is_off_by_a_hundredth_is_found(shift: float) -> None:
    slightly = step_with(chance=lambda p, q: min(1.0, p / q) + (shift if p < q else 0.0))
    assert verdict("accept_or_replace", slightly).startswith("not yet: ")
    tilted = step_with(number=lambda u, v: min(max(v + shift, 0.0), 0.999))
    assert verdict("accept_or_replace", tilted).startswith("not yet: ")


def test_a_mended_sampler_is_the_engines_token_for_token() -> None:
    seen = set()
    for seed in range(200):
        n_draft, vocab_size = 1 + seed % 4, 6
        q = normal(n_draft, vocab_size, seed=seed).softmax(1)
        p = torch.cat([q, q[:1]]) * normal(n_draft + 1, vocab_size, seed=seed + 500).exp()  # somewhat like it
        p = p / p.sum(1, keepdim=True)
        draft = [drawn(row.tolist(), number) for row, number in zip(q, torch.rand(n_draft).tolist(), strict=True)]
        row = RowState(RequestParams(), [0], generator=torch.Generator().manual_seed(seed))
        numbers = uniforms(torch.Generator().manual_seed(seed), n_draft + 1).tolist()
        (found,) = verify(p.log()[None], [row], [Draft(draft, q)])
        assert mended_tokens(p.tolist(), q.tolist(), draft, numbers) == found.ids
        seen.add((n_draft, found.n_accepted))
    assert {(2, 0), (2, 1), (2, 2), (4, 0), (4, 4)} <= seen


def test_a_draw_keeps_no_token_that_is_not_needed() -> None:
    for seed in range(60):
        logits, top_p = normal(9, seed=seed) * 2, 0.1 + 0.0147 * seed
        probs, token = filtered_draw(logits, 1.0, top_p, 0.0, torch.Generator().manual_seed(seed))
        whole, kept = logits.softmax(0), probs > 0
        assert whole[kept].sum() >= top_p > whole[kept].sum() - whole[kept].min()
        assert whole[kept].min() > whole[~kept].max() and kept[token]


def whole_answer(text: str, stops: list[str]) -> str:
    """The answer of a text that has come to its end."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return text[: sum(min(ends))] if ends else text


def test_shown_is_exactly_what_no_continuation_can_change() -> None:
    """Unless one stop string lies within another: then the inner one ends the text before the outer one can."""
    rng, more = random.Random(1), ["".join(chars) for n in range(4) for chars in itertools.product("abc", repeat=n)]
    for _ in range(60):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 2))]
        if len(stops) == 2 and (stops[0] in stops[1] or stops[1] in stops[0]):
            stops.pop()
        pieces = ["".join(rng.choices("ab", k=rng.randint(0, 3))) for _ in range(4)]
        shown, text, so_far = shown_pieces(pieces, stops), "", ""
        for piece, new in zip(pieces, shown, strict=False):
            text, so_far = text + piece, so_far + new
            ends = [whole_answer(text + tail, stops) for tail in more]
            certain = next(n for n in range(len(text), -1, -1) if all(end.startswith(text[:n]) for end in ends))
            assert so_far == text[:certain]
        assert so_far + shown[-1] == whole_answer(text, stops)


def test_masks_are_what_trying_all_texts_finds() -> None:
    rng = random.Random(2)
    for _ in range(30):
        table = [{char: rng.randrange(5) for char in "abc" if rng.random() < 0.5} for _ in range(5)]
        accepting, tokens = {rng.randrange(5)}, ["a", "b", "bc", "ca", ""]
        masks = token_masks(table, accepting, tokens)
        for state, place in itertools.product(range(5), range(5)):
            ends = {run(table, state, tokens[place])} - {None}
            for _ in range(5):  # a shortest way to an end passes no state twice
                ends |= {run(table, end, token) for end in ends for token in tokens} - {None}
            assert masks[state][place] == bool(ends & accepting)


def test_no_midpoint_is_a_threshold() -> None:
    assert midpoints(4) == [0.125, 0.375, 0.625, 0.875]
