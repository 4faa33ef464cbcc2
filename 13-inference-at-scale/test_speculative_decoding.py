"""Speculation changes the time and nothing else: by enumeration, by chi-squared, and token for token if greedy."""

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

from engine_requests import RequestParams, RowState, new_row
from gpt2 import SamplingConfig
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from request_sampling import at_quantile, choose, filtered_probs, uniforms
from speculative_decoding import (
    Draft,
    DraftModel,
    NgramLookup,
    acceptance_chances,
    acceptance_rate,
    best_draft_length,
    draft_tokens,
    expected_speedup,
    expected_tokens,
    remainder,
    rows_ahead,
    speculate,
    verify,
)

VOCAB = 7
N_DRAWS = 20_000


def table(seed: int, n: int = VOCAB, scale: float = 1.5) -> Tensor:
    """Logits (vocab, vocab) of a language in which the next token depends on the last one."""
    return scale * torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny(seed: int, vocab_size: int = 11, d_model: int = 16, **settings) -> CausalLM:
    torch.manual_seed(seed)
    sizes = dict(n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=64)
    model = CausalLM(ModelConfig(vocab_size=vocab_size, d_model=d_model, **sizes, **settings)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)  # fresh weights say almost the same everywhere
    return model


class Always:
    """Proposes what it is told."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def propose(self, rows, n_draft: int, end_ids=()) -> list[Draft]:
        return [Draft(self.ids[:n_draft]) for _ in rows]


class NoThree:
    """A constraint for tests: no 3, and an end after two tokens."""

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> Tensor:
        return torch.arange(VOCAB) != 3

    def advance(self, state: int, token_id: int) -> int:
        assert token_id != 3
        return state + 1

    def may_end(self, state: int) -> bool:
        return state >= 2


# The rule, exactly


@pytest.mark.parametrize("seed", range(4))
def test_by_enumeration_one_token_has_the_targets_distribution(seed: int, parity) -> None:
    p, q = table(seed).softmax(1), table(seed + 50).softmax(1)
    p[0, 2:], q[1, :3] = 0, 0  # what the target or the draft never says
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    kept = q * acceptance_chances(p, q)
    rest = remainder(p, q)
    output = kept + (1 - kept.sum(1, keepdim=True)) * rest / rest.sum(1, keepdim=True)
    parity("verify, one token", "the target by enumeration", "invariant", output, p, 1e-12)
    parity("verify, acceptance", "1 - total variation", "invariant", kept.sum(1), 1 - (p - q).abs().sum(1) / 2, 1e-12)
    parity("acceptance_rate", "1 - total variation", "invariant", acceptance_rate(p, q), kept.sum(1), 1e-12)


def test_by_enumeration_the_tokens_of_one_pass_have_the_targets_joint_distribution(parity) -> None:
    """Two guesses, one more token: every draft, every outcome; the joint distribution of the first two tokens."""
    p, q, start = table(1, 4).softmax(1), table(2, 4).softmax(1), 1
    joint = torch.zeros(4, 4, dtype=torch.float64)

    def settle(first: int, chance: Tensor) -> None:  # a pass that ended after one token is followed by the next one
        joint[first] += chance * p[first]

    for guess in itertools.product(range(4), repeat=2):
        drawn = q[start, guess[0]] * q[guess[0], guess[1]]
        keep = [
            acceptance_chances(p[start], q[start])[guess[0]],
            acceptance_chances(p[guess[0]], q[guess[0]])[guess[1]],
        ]
        rest = [remainder(p[[last]], q[[last]])[0] for last in (start, guess[0])]
        for token in range(4):
            settle(token, drawn * (1 - keep[0]) * rest[0][token] / rest[0].sum())
            joint[guess[0], token] += drawn * keep[0] * (1 - keep[1]) * rest[1][token] / rest[1].sum()
        joint[guess[0], guess[1]] += drawn * keep[0] * keep[1]
    parity("verify, two tokens", "the target by enumeration", "invariant", joint, p[start][:, None] * p, 1e-12)


def test_where_target_and_draft_agree_nothing_is_left_and_the_target_stands_in() -> None:
    p = table(3).softmax(1)
    assert torch.equal(remainder(p, p), p)  # not a row of zeros, from which nothing can be drawn
    never = torch.zeros(1, 2, dtype=torch.float64)
    assert acceptance_chances(never, never).tolist() == [[0, 0]]  # a guess that its own draft calls impossible


# The implementation, by what it draws (KV9)


def pass_over(
    p: Tensor, q: Tensor | None, params: RequestParams, n_draft: int, n_rows: int = N_DRAWS, check=verify
) -> tuple[Tensor, float]:
    """Counts (vocab, vocab) of the first two tokens after a 1, and the share of first guesses that were kept."""
    rows = [RowState(params, [1], generator=torch.Generator().manual_seed(seed)) for seed in range(n_rows)]

    def next_logits(newest: list[int] | None) -> Tensor:
        return q[newest or [1] * n_rows]

    drafts = [Draft([2, 5])] * n_rows if q is None else draft_tokens(next_logits, rows, n_draft)
    heads = torch.tensor([[1, *draft.ids] for draft in drafts])
    found = [verdict.ids for verdict in check(p[heads], rows, drafts)]
    kept = sum(ids[0] == draft.ids[0] for ids, draft in zip(found, drafts, strict=True)) / n_rows
    short = [index for index, ids in enumerate(found) if len(ids) == 1]
    if short:
        second = choose(p[[found[index][0] for index in short]], [rows[index] for index in short]).ids
        for index, token_id in zip(short, second, strict=True):
            found[index].append(token_id)
    counts = torch.zeros(len(p), len(p))
    for ids in found:
        counts[ids[0], ids[1]] += 1
    return counts, kept


def p_value(counts: Tensor, probs: Tensor) -> float:
    counts, probs = counts.flatten().double(), probs.flatten()
    assert counts[probs == 0].sum() == 0
    common = probs * counts.sum() >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * counts.sum()
    keep = expected > 0
    return float(stats.chisquare(observed[keep].numpy(), expected[keep].numpy()).pvalue)


def joint_of(p: Tensor, params: RequestParams) -> Tensor:
    chances = filtered_probs(p, [new_row(params, [1]) for _ in p])
    return chances[1][:, None] * chances


NEAR = 0.7 * table(3) + 0.5 * table(4)  # a draft that agrees more often than not
PAIRS = {
    "plain, by a model": (RequestParams(), NEAR),
    "filtered, by a model": (RequestParams(top_k=5, top_p=0.9, temperature=1.3), NEAR),
    "cold, by copying": (RequestParams(temperature=0.6), None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_thousand_pairs_of_tokens_follow_the_target(name: str) -> None:
    p, (params, q) = table(3), PAIRS[name]
    exact = joint_of(p, params)
    counts, kept = pass_over(p, q, params, n_draft=2)
    assert p_value(counts, exact) > 0.01
    assert p_value(counts.sum(1), exact.sum(1)) > 0.01
    if q is not None:
        rate = float(acceptance_rate(exact.sum(1), filtered_probs(q[[1]], [new_row(params, [1])])[0]))
        assert 0.5 < rate < 0.95
        assert kept == pytest.approx(rate, abs=4 * (rate * (1 - rate) / N_DRAWS) ** 0.5)


def biased(logits: Tensor, rows, drafts):
    """The planted mistake: a rejected token is drawn from p itself, not from what remains of it."""
    wrong = []
    for index, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        p = logits[index].softmax(1)
        numbers = uniforms(row.generator, 1 + len(draft.ids))
        chances = acceptance_chances(p[: len(draft.ids)], draft.probs).gather(1, torch.tensor(draft.ids)[:, None])[:, 0]
        n = next((n for n, chance in enumerate(chances) if numbers[n] >= chance), len(draft.ids))
        wrong.append([*draft.ids[:n], at_quantile(p[[n]], numbers[-1:, None]).item()])
    return [type("Wrong", (), {"ids": ids}) for ids in wrong]


def test_the_same_test_rejects_a_biased_sampler() -> None:
    p = table(3)
    counts, _ = pass_over(p, NEAR, RequestParams(), 3, 3000, biased)
    assert p_value(counts.sum(1), joint_of(p, RequestParams()).sum(1)) < 1e-6


def test_a_real_models_pairs_of_tokens_follow_it() -> None:
    """`speculate` itself, with a draft model: the third and fourth token of a text."""
    model, small = tiny(0), tiny(1, d_model=8)
    prompt, n = [4, 9], 400
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].softmax(0)
        then = model(torch.tensor([[*prompt, token] for token in range(11)]))[:, -1].softmax(1)
    counts, proposer = torch.zeros(11, 11), DraftModel(small, model)
    for seed in range(n):
        ids = speculate(model, proposer, prompt, RequestParams(max_tokens=2, seed=seed), n_draft=3).ids
        counts[ids[0], ids[1]] += 1
    assert p_value(counts, first[:, None] * then) > 0.01
    uniform = torch.full((11, 11), 1 / 121, dtype=torch.float64)
    assert p_value(counts, uniform) < 1e-6


# Greedy


@pytest.mark.parametrize("settings", [{}, {"window_size": 5}], ids=["full", "window"])
def test_greedy_speculation_is_plain_greedy(settings: dict, parity) -> None:
    model = tiny(3, **settings)
    proposers = {
        "a weaker model": DraftModel(tiny(4, d_model=8), model),
        "itself": DraftModel(model, model),
        "copying": NgramLookup(),
        "always wrong": Always([10, 10, 10, 10]),
    }
    for prompt in ([3], [5, 1, 8, 5, 1]):
        plain = model.generate(torch.tensor([prompt]), SamplingConfig(max_new_tokens=30, temperature=0.0))[0].tolist()
        plain = plain[: plain.index(model.config.eos_id) + 1] if model.config.eos_id in plain else plain
        for name, proposer in proposers.items():
            result = speculate(
                model,
                proposer,
                prompt,
                RequestParams(max_tokens=30, temperature=0.0),
                n_draft=4,
                end_ids=(model.config.eos_id,),
            )
            parity(f"speculate, {name}", "CausalLM.generate, greedy", "invariant", result.ids, plain, 0)
            assert result.n_accepted + result.n_passes >= len(plain)
            if name == "itself":
                assert result.n_accepted == result.n_drafted and result.n_passes == -(-len(plain) // 5)
            assert name != "always wrong" or result.n_passes >= 0.6 * len(plain)


def test_greedy_rows_with_penalties_or_a_constraint_are_checked_as_chosen() -> None:
    logits = table(8)
    for settings in (dict(repetition_penalty=1.8), dict(frequency_penalty=2.0), dict(constraint=NoThree())):
        row = new_row(RequestParams(temperature=0.0, **settings), [1])
        expected, last = [], 1
        for _ in range(4):
            state = RowState(row.params, [1], list(expected), None, len(expected))
            last = choose(logits[[last]], [state]).ids[0]
            expected.append(last)
        for wrong_at in range(4):
            guesses = [(token + (place >= wrong_at)) % VOCAB for place, token in enumerate(expected[:3])]
            (verdict,) = verify(logits[[1, *guesses]][None], [row], [Draft(guesses)])
            assert verdict.ids == expected[: wrong_at + 1] and verdict.n_accepted == wrong_at


# Rows and drafts of all kinds


def mixed(seed: int = 0) -> tuple[Tensor, list[RowState], list[Draft]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, VOCAB, dtype=torch.float64, generator=generator)
    params = [
        RequestParams(seed=1),
        RequestParams(temperature=0.0, logprobs=1),
        RequestParams(seed=2, top_k=3, logprobs=0),
        RequestParams(seed=3, repetition_penalty=1.5, presence_penalty=0.5),
        RequestParams(seed=4, constraint=NoThree()),
        RequestParams(seed=5, temperature=0.4),
    ]
    q = torch.rand(4, VOCAB, dtype=torch.float64, generator=generator)
    q = q / q.sum(1, keepdim=True)
    drafts = [
        Draft([2, 4, 6], q[:3]),
        Draft([0, 1, 2]),
        Draft([]),
        Draft([5, 5, 1, 2], q),
        Draft([6, 3, 1]),
        Draft([0]),
    ]
    return logits, [new_row(own, [1, 5]) for own in params], drafts


def test_a_row_gets_the_same_alone_and_among_neighbours() -> None:
    for seed in range(8):
        logits, rows, drafts = mixed(seed)
        together = verify(logits, rows, drafts)
        for index in range(len(rows)):
            _, fresh, _ = mixed(seed)
            n_positions = 1 + len(drafts[index].ids)
            alone = verify(logits[index : index + 1, :n_positions], [fresh[index]], [drafts[index]])[0]
            assert alone == together[index]


def test_a_draft_that_runs_past_an_end_takes_nothing_from_its_neighbour() -> None:
    logits = torch.zeros(2, 4, VOCAB, dtype=torch.float64)
    logits[0, :, 2], logits[1, torch.arange(4), torch.tensor([4, 5, 6, 0])] = 1.0, 1.0
    rows = [new_row(RequestParams(temperature=0.0), [1]) for _ in range(2)]
    verdicts = verify(logits, rows, [Draft([2, 2, 2]), Draft([4, 5, 6])], end_ids=(2,))
    assert [verdict.ids for verdict in verdicts] == [[2], [4, 5, 6, 0]]


def test_without_guesses_it_is_choose() -> None:
    for seed in range(20):
        logits, rows, _ = mixed(seed)
        _, again, _ = mixed(seed)
        verdicts = verify(logits, rows, [Draft([])] * 6)
        chosen = choose(logits[:, 0], again)
        assert [verdict.ids for verdict in verdicts] == [[token_id] for token_id in chosen.ids]
        assert [verdict.logprobs[0] for verdict in verdicts] == chosen.logprobs


def test_log_probabilities_belong_to_their_positions() -> None:
    logits, rows, drafts = mixed(3)
    drafts[1] = Draft(logits[1].argmax(1).tolist()[:2])
    exact = logits.log_softmax(2)
    verdicts = verify(logits, rows, drafts)
    assert verdicts[1].n_accepted == 2 and verdicts[0].logprobs == [None] * len(verdicts[0].ids)
    for position, (token_id, told) in enumerate(zip(verdicts[1].ids, verdicts[1].logprobs, strict=True)):
        assert told.token_id == token_id == told.top[0][0]
        assert told.logprob == pytest.approx(exact[1, position, token_id].item(), abs=1e-6)


def test_an_end_is_the_last_token_unless_ends_are_ignored() -> None:
    logits = torch.full((1, 4, VOCAB), -9.0)
    logits[0, :, 2] = 9.0
    for temperature in (0.0, 1e-3):
        for settings, expected in ((dict(), [2]), (dict(ignore_eos=True), [2, 2, 2, 2])):
            row = new_row(RequestParams(temperature=temperature, seed=0, **settings), [1])
            (verdict,) = verify(logits, [row], [Draft([2, 2, 2])], end_ids=(2,))
            assert verdict.ids == expected and verdict.n_accepted == min(3, len(expected))
    row = new_row(RequestParams(temperature=0.0, constraint=NoThree(), ignore_eos=True), [1])
    logits[0, :, 3] = 20.0  # the end itself: refused as a token, allowed where the text may end
    (verdict,) = verify(logits, [row], [Draft([2, 2, 3])], end_ids=(3,))
    assert verdict.ids == [2, 2, 3] and len(verdict.logprobs) == 3


def test_a_refused_guess_is_replaced_from_the_remainder() -> None:
    """A guess that the constraint refuses is a rejected one: q has to be taken off, or the rest is too likely."""
    n, params = 6000, RequestParams(constraint=NoThree())
    p, q = table(5), table(6).softmax(1)[1]
    rows = [new_row(RequestParams(**vars(params) | {"seed": seed}), [1]) for seed in range(n)]
    guesses = at_quantile(q.expand(n, -1), torch.stack([uniforms(row.generator, 1) for row in rows])).tolist()
    drafts = [Draft([guess], q[None]) for guess in guesses]
    verdicts = verify(p[torch.tensor([[1, guess] for guess in guesses])], rows, drafts)
    counts = torch.bincount(torch.tensor([verdict.ids[0] for verdict in verdicts]), minlength=VOCAB)
    exact = filtered_probs(p[[1]], [new_row(params, [1])])[0]
    assert guesses.count(3) > 300 and counts[3] == 0
    assert p_value(counts, exact) > 0.01


def test_rows_ahead_know_what_was_guessed() -> None:
    row = new_row(RequestParams(temperature=0.0, frequency_penalty=1.0, constraint=NoThree()), [1])
    row.new_ids, row.constraint_state = [6], 1
    ahead = rows_ahead(row, [5, 2, 3, 4])
    assert [state.new_ids for state in ahead] == [[6], [6, 5], [6, 5, 2]]  # and 3 is refused
    assert [state.constraint_state for state in ahead] == [1, 2, 3]
    assert row.new_ids == [6]


# Proposers


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 9, 9, 1, 2, 3], [9, 9, 1, 2]),
        ([7, 1, 5, 1, 6, 1], [6, 1, 6, 1]),  # the latest place, and on into what was just guessed
        ([4, 4, 4], [4, 4, 4, 4]),
        ([8, 1, 2, 5, 0, 2, 6, 1, 2], [5, 0, 2, 6]),  # two tokens that match count for more than one
        ([1, 2, 3], []),
        ([5], []),
        ([256, 1, 65536, 7, 256, 1], [65536, 7, 256, 1]),  # ids whose bytes overlap
    ],
)
def test_lookup_copies_what_followed(ids: list[int], expected: list[int]) -> None:
    row = new_row(RequestParams(), ids[:1])
    row.new_ids = ids[1:]
    assert NgramLookup().propose([row], 4)[0] == Draft(expected, None)
    assert NgramLookup().propose([row], 2)[0].ids == expected[:2]


def test_lookup_equals_a_search_of_lists() -> None:
    generator = torch.Generator().manual_seed(0)

    def searched(ids: list[int], n_draft: int) -> list[int]:
        for length in (3, 2, 1):
            for start in range(len(ids) - length - 1, -1, -1):
                if length < len(ids) and ids[start : start + length] == ids[-length:]:
                    text = list(ids)
                    text.extend(text[place] for place in range(start + length, start + length + n_draft))
                    return text[len(ids) :]
        return []

    for length in (1, 2, 3, 5, 9, 40):
        for high in (2, 3, 300, 70000):
            ids = torch.randint(high, (length,), generator=generator).tolist()
            assert NgramLookup().copied(ids, 5) == searched(ids, 5)


def test_a_model_drafts_its_own_greedy_text_and_says_how_likely_it_was() -> None:
    model, small = tiny(0), tiny(5, d_model=8)
    proposer = DraftModel(small, model)
    row = new_row(RequestParams(temperature=0.0), [1, 2])
    plain = small.generate(torch.tensor([[1, 2]]), SamplingConfig(max_new_tokens=4, temperature=0.0))[0].tolist()
    assert proposer.propose([row], 4)[0] == Draft(plain, None)
    sampled = new_row(RequestParams(seed=0, temperature=1.5), [1, 2])
    (draft,) = proposer.propose([sampled], 3)
    with torch.no_grad():
        exact = small(torch.tensor([[1, 2, *draft.ids]]))[0, 1:4]
    torch.testing.assert_close(draft.probs, (exact / 1.5).softmax(1), rtol=0, atol=1e-12)


def test_drafts_beside_each_other_are_those_alone() -> None:
    """One that has ended waits for the other: it takes no further guess and no further number of its generator."""
    scores = table(4).repeat(2, 1, 1)
    scores[0, :, 2] = 50.0  # row 0 ends at once

    def drafted(members: list[int]) -> list[tuple[list[int], Tensor]]:
        rows = [new_row(RequestParams(seed=index), [1]) for index in members]
        ids = [[1] for _ in members]

        def next_logits(newest: list[int] | None) -> Tensor:
            ids[:] = ids if newest is None else [[token] for token in newest]
            return torch.stack([scores[index, last] for index, (last,) in zip(members, ids, strict=True)])

        made = draft_tokens(next_logits, rows, 4, end_ids=(2,))
        return [(draft.ids, row.generator.get_state()) for draft, row in zip(made, rows, strict=True)]

    together, alone = drafted([0, 1]), drafted([0]) + drafted([1])
    assert together[0][0] == [2] and len(together[1][0]) > 1
    assert [ids for ids, _ in together] == [ids for ids, _ in alone]
    assert all(torch.equal(one[1], other[1]) for one, other in zip(together, alone, strict=True))


def test_a_draft_is_penalised_for_all_that_it_has_guessed() -> None:
    falling = torch.linspace(1, 0, VOCAB, dtype=torch.float64)[None]
    row = new_row(RequestParams(temperature=0.0, frequency_penalty=2.0), [1])
    assert draft_tokens(lambda newest: falling, [row], 4)[0].ids == [0, 1, 2, 3]


def test_a_draft_ends_at_its_end_and_at_its_models_last_position() -> None:
    model = tiny(0)
    row = new_row(RequestParams(temperature=0.0, repetition_penalty=9.0), [1, 2])
    free = DraftModel(model, model).propose([row], 4)[0].ids
    assert len(free) == 4 and free[0] != free[1]
    assert DraftModel(model, model).propose([row], 4, end_ids=(free[1],))[0].ids == free[:2]
    long = new_row(RequestParams(temperature=0.0), [1] * 63)
    assert len(DraftModel(model, model).propose([long], 4)[0].ids) == 2
    long.new_ids = [1, 1]
    assert DraftModel(model, model).propose([long], 4)[0] == Draft([])


# What it brings


@pytest.mark.parametrize(("acceptance", "n_draft"), [(1.5, 3), (-0.1, 3), (float("nan"), 3), (0.5, -1)])
def test_a_chance_that_is_none_is_refused(acceptance: float, n_draft: int) -> None:
    with pytest.raises(ValueError, match=f"acceptance={acceptance} must be between 0 and 1, and n_draft={n_draft} "):
        expected_tokens(acceptance, n_draft)


def test_expected_tokens_is_the_mean_of_what_is_kept(parity) -> None:
    for a, k in ((0.8, 5), (0.3, 1), (0.0, 4), (1.0, 3)):
        by_cases = sum(a**n * (1 - a) * (n + 1) for n in range(k)) + a**k * (k + 1)
        parity("expected_tokens", "the sum over all outcomes", "output", expected_tokens(a, k), by_cases, 1e-12)
    p, q = table(3).softmax(1)[1].expand(VOCAB, -1).log(), table(4).softmax(1)[1].expand(VOCAB, -1).log()
    rate = float(acceptance_rate(p[0].exp(), q[0].exp()))
    rows = [new_row(RequestParams(seed=seed), [1]) for seed in range(3000)]
    drafts = draft_tokens(lambda newest: q[newest or [1] * 3000], rows, 3)
    lengths = torch.tensor([float(len(v.ids)) for v in verify(p[torch.ones(3000, 4, dtype=torch.long)], rows, drafts)])
    assert lengths.mean().item() == pytest.approx(expected_tokens(rate, 3), abs=4 * lengths.std().item() / 3000**0.5)


def test_speed_up_and_the_best_length() -> None:
    assert expected_speedup(0.8, 4, 0.05) == pytest.approx((1 - 0.8**5) / 0.2 / 1.2)
    assert best_draft_length(0.0, 0.1) == 0 and best_draft_length(0.3, 0.5) == 0
    best = best_draft_length(0.8, 0.05)
    assert 0 < best < 32
    assert all(expected_speedup(0.8, best, 0.05) >= expected_speedup(0.8, n, 0.05) for n in range(33))


# Bad input


def test_bad_input_is_named() -> None:
    model, other = tiny(0), tiny(0, vocab_size=9)
    with pytest.raises(ValueError, match=r"draft vocabulary 9 != target 11; a draft must use the target's tokenizer"):
        DraftModel(other, model)
    row = new_row(RequestParams(temperature=0.0), [1])
    logits = torch.zeros(1, 3, VOCAB)
    with pytest.raises(ValueError, match=r"need logits of shape \(1, at least 4, vocab\), got \(1, 3, 7\)"):
        verify(logits, [row], [Draft([1, 2, 3])])
    with pytest.raises(ValueError, match="1 rows with 2 drafts"):
        verify(logits, [row], [Draft([]), Draft([])])
    with pytest.raises(ValueError, match=r"row 0 needs probs of shape \(1, 7\), got \(1, 6\)"):
        verify(logits, [row], [Draft([1], torch.ones(1, 6))])
    with pytest.raises(ValueError, match=r"row 0 holds ids outside 0\.\.6: \[1, 7\]"):
        verify(logits, [row], [Draft([1, 7])])
    bad = torch.zeros(3, 2, VOCAB)
    bad[2, 1, 3] = torch.nan
    rows = [new_row(RequestParams(temperature=temperature, seed=4), [1]) for temperature in (0.0, 1.0, 1.0)]
    for group in ([0, 1, 2], [0, 0, 2]):
        with pytest.raises(ValueError, match="^row 2 of the batch: the model's logits hold NaN$"):
            verify(bad, [rows[index] for index in group], [Draft([1]), Draft([]), Draft([2])])
    assert uniforms(rows[1].generator, 1) == uniforms(torch.Generator().manual_seed(4), 1)  # nothing was drawn
    verify(bad, rows, [Draft([1]), Draft([]), Draft([])])  # a position that is not read may hold anything
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        speculate(model, NgramLookup(), [], RequestParams())
    with pytest.raises(ValueError, match="70 positions exceed max_seq_len 64"):
        speculate(model, NgramLookup(), [1] * 10, RequestParams(max_tokens=60))
    with pytest.raises(ValueError, match="longest must be finite and >= 2, got 1"):
        NgramLookup(1, 2)


def test_shape_comments_hold(checked_shapes) -> None:
    import speculative_decoding

    with checked_shapes(speculative_decoding) as checked:
        verify(*mixed())
        speculate(tiny(0), DraftModel(tiny(1), tiny(0)), [1], RequestParams(max_tokens=5, seed=0))
    assert len(checked) >= 7
