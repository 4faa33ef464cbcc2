"""The samplers against transformers' logits processors, and by the distribution of what they draw."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import logits_process as theirs

from engine_requests import RequestParams, RowState, new_row
from gpt2 import keep_likely
from request_sampling import (
    SPAN,
    BadLogits,
    adjusted_logits,
    at_quantile,
    choose,
    filtered_probs,
    keep_likely_rows,
    kept_probs,
    token_logprobs,
    uniforms,
)

VOCAB = 131  # no multiple of SPAN
PROMPTS = [[5, 9, 9, 130], [0], [7, 7, 7, 3, 12]]
ANSWERS = [[9, 2, 2], [], [44, 3]]


def logits_of(n_rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n_rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def row_of(index: int = 0, **settings) -> RowState:
    row = new_row(RequestParams(**settings), PROMPTS[index])
    row.new_ids = list(ANSWERS[index])
    return row


class Odd:
    """A constraint for tests: only odd ids, and an end after the third."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.vocab = vocab

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> Tensor:
        return (torch.arange(self.vocab) % 2 == 1) & torch.tensor(state < 3)

    def advance(self, state: int, token_id: int) -> int:
        return state + 1

    def may_end(self, state: int) -> bool:
        return state >= 3


WARPERS = {
    "temperature": (dict(temperature=0.7), [lambda: theirs.TemperatureLogitsWarper(0.7)]),
    "top-k": (dict(top_k=9), [lambda: theirs.TopKLogitsWarper(9)]),
    "top-p": (dict(top_p=0.83), [lambda: theirs.TopPLogitsWarper(0.83)]),
    "min-p": (dict(min_p=0.12), [lambda: theirs.MinPLogitsWarper(0.12)]),
    "all four": (
        dict(temperature=1.7, top_k=40, top_p=0.9, min_p=0.05),
        [
            lambda: theirs.TemperatureLogitsWarper(1.7),
            lambda: theirs.TopKLogitsWarper(40),
            lambda: theirs.TopPLogitsWarper(0.9),
            lambda: theirs.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_each_filter_leaves_what_transformers_leaves(name: str, parity) -> None:
    params, warpers = WARPERS[name]
    logits = logits_of(3)
    expected = theirs.LogitsProcessorList(make() for make in warpers)(torch.zeros(3, 1, dtype=torch.long), logits)
    expected = expected.softmax(dim=1)
    assert name == "temperature" or 0 < (expected > 0).sum() < expected.numel() / 2
    ours = filtered_probs(logits, [row_of(**params) for _ in range(3)])
    parity(f"choose: {name}", "transformers logits warpers", "output", ours, expected, 1e-10)


def test_penalties_and_bias_are_those_of_transformers_and_of_the_published_formula(parity) -> None:
    logits = logits_of(1)
    ids = torch.tensor([PROMPTS[0] + ANSWERS[0]])
    repetition = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits)
    assert (repetition != logits).sum() == 4  # tokens 2, 5, 9, 130
    parity(
        "choose: repetition penalty",
        "transformers RepetitionPenaltyLogitsProcessor",
        "output",
        adjusted_logits(logits, [row_of(repetition_penalty=1.4)]),
        repetition,
        1e-10,
    )
    bias = theirs.SequenceBiasLogitsProcessor([[[3], -4.0], [[60], 2.5]])(ids, logits)
    biased = adjusted_logits(logits, [row_of(logit_bias=((3, -4.0), (60, 2.5)))])
    parity("choose: logit bias", "transformers SequenceBiasLogitsProcessor", "output", biased, bias, 1e-10)

    by_hand = logits.clone()
    for token_id, count in {9: 1, 2: 2}.items():  # of the answer alone
        by_hand[0, token_id] -= 0.6 + 0.25 * count
    ours = adjusted_logits(logits, [row_of(presence_penalty=0.6, frequency_penalty=0.25)])
    parity("choose: presence and frequency", "OpenAI's formula by hand", "output", ours, by_hand, 1e-12)


def test_greedy_with_penalties_is_transformers_greedy() -> None:
    logits = logits_of(3)
    for index in range(3):
        ids = torch.tensor([PROMPTS[index] + ANSWERS[index]])
        logits[index, PROMPTS[index][0]] = 9.0
        expected = theirs.RepetitionPenaltyLogitsProcessor(3.0)(ids, logits[index : index + 1]).argmax().item()
        assert expected != logits[index].argmax().item()
        chosen = choose(logits, [row_of(other, temperature=0.0, repetition_penalty=3.0) for other in range(3)])
        assert chosen.ids[index] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 140), st.floats(0.01, 1), st.integers(0, 50))
def test_equal_settings_give_topic_08s_filter(top_k: int, top_p: float, seed: int) -> None:
    logits = logits_of(2, seed=seed)
    expected = keep_likely(logits, top_k, top_p).softmax(dim=1)
    ours = filtered_probs(logits, [row_of(top_k=top_k, top_p=top_p) for _ in range(2)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


MIXED = [
    dict(seed=1),
    dict(temperature=0.0),
    dict(seed=2, temperature=0.4, top_k=7),
    dict(seed=3, top_p=0.5, repetition_penalty=1.3),
    dict(seed=4, min_p=0.2, logit_bias=((3, 50.0),)),
    dict(temperature=0.0, frequency_penalty=1.0, logprobs=2),
    dict(seed=5, constraint=Odd(), top_p=0.97),
    dict(seed=6, temperature=2.0, top_k=30, top_p=0.9, min_p=0.01, presence_penalty=0.3, logprobs=0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_gets_the_same_alone_and_among_neighbours_bit_for_bit(dtype: torch.dtype) -> None:
    logits = logits_of(len(MIXED), 2048, seed=3).to(dtype)
    for settings_of in (MIXED, [dict(seed=number) for number in range(8)], [dict(temperature=0.0)] * 8):
        together = [row_of(**(s | ({"constraint": Odd(2048)} if "constraint" in s else {}))) for s in settings_of]
        alone = [row_of(**(s | ({"constraint": Odd(2048)} if "constraint" in s else {}))) for s in settings_of]
        order = [5, 2, 7, 0, 4, 1, 6, 3]
        for step in range(5):
            in_batch = choose(logits[order], [together[index] for index in order])
            for place, index in enumerate(order):
                own = choose(logits[index : index + 1], [alone[index]])
                assert own.ids[0] == in_batch.ids[place]
                assert own.logprobs[0] == in_batch.logprobs[place]
                together[index].new_ids.append(own.ids[0])
                alone[index].new_ids.append(own.ids[0])
            logits = logits.roll(step + 1, dims=1)
    probs = filtered_probs(logits[:4], together[:4])
    for index in range(4):
        assert torch.equal(filtered_probs(logits[index : index + 1], [together[index]])[0], probs[index])


def test_a_nucleus_that_rounds_to_nothing_keeps_the_likeliest() -> None:
    logits = logits_of(3)
    for dtype, top_p in ((torch.float32, 1e-50), (torch.bfloat16, 1e-45), (torch.float64, 1e-320)):
        rows = [row_of(index, top_p=top_p, seed=index) for index in range(3)]
        probs = filtered_probs(logits.to(dtype), rows)
        assert torch.equal(probs, F.one_hot(logits.to(dtype).argmax(dim=1), VOCAB).double())


def chi_squared(counts: Tensor, probs: Tensor) -> float:
    """The p-value of counts under probs; cells below five expected draws are put together."""
    expected = probs * counts.sum()
    rare = expected < 5
    observed, wanted = counts[~rare], expected[~rare]
    if expected[rare].sum() >= 5:
        observed = torch.cat([observed, counts[rare].sum()[None]])
        wanted = torch.cat([wanted, expected[rare].sum()[None]])
    return float(stats.chisquare(observed.double().numpy(), (wanted / wanted.sum() * observed.sum()).numpy()).pvalue)


@pytest.mark.parametrize("params", [{}, dict(temperature=0.6), dict(top_k=11), dict(top_p=0.8), dict(min_p=0.05)])
def test_twenty_thousand_draws_follow_the_filtered_distribution(params: dict) -> None:
    logits = logits_of(1).float()
    rows = [row_of(seed=number, **params) for number in range(2000)]  # ten draws each of two thousand requests
    counts = torch.zeros(VOCAB, dtype=torch.long)
    for _ in range(10):
        counts += torch.bincount(torch.tensor(choose(logits.expand(2000, -1), rows).ids), minlength=VOCAB)
    exact = filtered_probs(logits, rows[:1])[0]
    assert counts[exact == 0].sum() == 0
    assert chi_squared(counts, exact) > 0.01
    colder = params | {"temperature": 0.9 * params.get("temperature", 1)}
    other = filtered_probs(logits, [row_of(**colder)])[0]
    assert chi_squared(counts, other) < 1e-4  # so many draws tell a temperature of 0.9 from 1


def test_a_draw_is_the_inverse_of_the_running_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 3, SPAN, SPAN + 1, 1000):
        probs = torch.rand(50, vocab, generator=generator, dtype=torch.float64) ** 8
        probs[:, : vocab // 3] = 0
        quantiles = torch.rand(50, 1, generator=generator, dtype=torch.float64)
        sums = probs.cumsum(dim=1)
        expected = torch.tensor([int((row > q * row[-1]).nonzero()[0]) for row, q in zip(sums, quantiles, strict=True)])
        assert torch.equal(at_quantile(probs, quantiles), expected)


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    probs = torch.zeros(1, VOCAB)
    probs[0, [70, 90]] = torch.tensor([1e-30, 0.3])
    for quantile, expected in ((0.0, 70), (0.5, 90), (1 - 2**-53, 90), (1.0, 90)):
        assert at_quantile(probs, torch.tensor([[quantile]], dtype=torch.float64)).tolist() == [expected]


def test_ties_stay_together_and_greedy_takes_the_smallest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, -1.0]])
    assert choose(logits, [row_of(temperature=0.0)]).ids == [1]
    for params, kept in (
        (dict(top_k=1), [1, 3]),
        (dict(top_k=3), [1, 2, 3, 4]),
        (dict(top_p=0.1), [1, 3]),
        (dict(min_p=1.0), [1, 3]),
    ):
        assert filtered_probs(logits, [row_of(**params)])[0].nonzero()[:, 0].tolist() == kept


def test_extreme_settings_end_at_the_likeliest_token() -> None:
    logits = logits_of(1).float() * 1e4
    best = logits.argmax().item()
    for params in (dict(temperature=1e-46), dict(temperature=1e-4), dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0)):
        probs = filtered_probs(logits, [row_of(**params)])
        assert probs[0, best] == 1 and probs.sum() == 1
    assert torch.equal(filtered_probs(logits, [row_of(top_k=10**9)]), filtered_probs(logits, [row_of()]))


def test_a_filter_of_one_row_does_not_touch_the_others() -> None:
    logits = logits_of(3)
    mixed = [RequestParams(top_k=4), RequestParams(), RequestParams(top_p=0.3)]
    probs = kept_probs(logits, mixed)
    assert (probs > 0).sum(dim=1).tolist()[:2] == [4, VOCAB]
    assert torch.equal(probs[1], logits.softmax(dim=1)[1])
    assert torch.equal(keep_likely_rows(logits.softmax(dim=1), mixed), probs)


def test_a_constraint_has_the_last_word_and_lets_the_text_end() -> None:
    logits = logits_of(2).float()
    logits[:, 8] = 90  # an even id
    rows = [row_of(temperature=0.0, constraint=Odd(), logit_bias=((8, 100.0),)), row_of(temperature=0.0)]
    chosen = choose(logits, rows, end_ids=(8,)).ids
    assert chosen[0] % 2 == 1 and chosen[1] == 8
    assert logits[0, 8] == 90  # the input stays as it was
    rows[0].constraint_state = 3
    assert choose(logits, rows, end_ids=(8, 10)).ids[0] == 8
    probs = filtered_probs(logits[:1], [row_of(constraint=Odd(), top_k=3)])
    assert (probs > 0).sum() == 3 and not probs[0, ::2].any()  # the filter chooses among what is allowed


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    logits = logits_of(4)
    logits[3, 4:] = -math.inf
    exact = logits.log_softmax(dim=1)
    rows = [row_of(temperature=0.0, logprobs=2, logit_bias=((7, 90.0),)), row_of(), row_of(seed=1, logprobs=0)]
    rows.append(row_of(logprobs=9))
    ids, found = choose(logits, rows)
    assert ids[0] == 7 and found[1] is None
    assert found[0].token_id == 7 and found[0].logprob == pytest.approx(exact[0, 7].item(), abs=1e-12)
    values, top = exact[0].topk(2)
    assert [token_id for token_id, _ in found[0].top] == top.tolist()
    assert [value for _, value in found[0].top] == pytest.approx(values.tolist(), abs=1e-12)
    assert found[2].top == () and found[2].logprob == pytest.approx(exact[2, ids[2]].item(), abs=1e-12)
    assert len(found[3].top) == 4  # no more tokens are possible


def test_bad_rows_are_named_and_nothing_is_drawn() -> None:
    logits = logits_of(5).float()
    logits[1, 7], logits[2], logits[3, 0] = math.nan, -math.inf, math.inf
    rows = [row_of(seed=number) for number in range(4)] + [row_of(constraint=Odd())]
    rows[4].constraint_state = 3
    with pytest.raises(ValueError) as caught:
        choose(logits, rows)
    assert str(caught.value) == (
        "row 1 of the batch: the model's logits hold NaN; row 2 of the batch: no token has a logit above -inf; "
        "row 3 of the batch: the model's logits hold +inf"
    )
    assert isinstance(caught.value, BadLogits) and caught.value.rows == (1, 2, 3)
    with pytest.raises(BadLogits, match=r"^row 1 of the batch: no token that the constraint allows has a logit above"):
        choose(logits[[0, 4]], [rows[0], rows[4]])
    assert uniforms(rows[0].generator, 1) == uniforms(torch.Generator().manual_seed(0), 1)  # still the first number
    with pytest.raises(ValueError, match=r"2 rows need logits of shape \(2, vocab\), got \(5, 131\)"):
        choose(logits, rows[:2])
    with pytest.raises(ValueError, match="logit_bias names token 131, but the vocabulary ends at 130"):
        choose(logits[:1], [row_of(logit_bias=((VOCAB, 1.0),))])
    with pytest.raises(ValueError, match="the constraint knows 200 tokens but the model has 131"):
        choose(logits[:1], [row_of(constraint=Odd(200))])


def test_greedy_rows_draw_nothing_and_unseeded_rows_differ() -> None:
    logits = torch.zeros(1, VOCAB)
    assert row_of(temperature=0.0).generator is None
    drawn = {tuple(choose(logits, [row])[0][0] for _ in range(4)) for row in (row_of() for _ in range(6))}
    assert len(drawn) > 1
    seeded = [[choose(logits, [row])[0][0] for _ in range(9)] for row in (row_of(seed=5), row_of(seed=5))]
    assert seeded[0] == seeded[1] and len(set(seeded[0])) > 3


def test_shape_comments_hold(checked_shapes) -> None:
    import request_sampling

    with checked_shapes(request_sampling) as checked:
        choose(logits_of(len(MIXED)), [row_of(**params) for params in MIXED], end_ids=(2,))
        filtered_probs(logits_of(len(MIXED)), [row_of(**params) for params in MIXED])
    assert len(checked) > 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_tokens=True), "max_tokens must be a whole number, got True"),
        (dict(top_p="1"), "top_p must be a number, got '1'"),
        (dict(temperature=math.nan), "temperature must be finite and >= 0, got nan"),
        (dict(repetition_penalty=1e-300), "repetition_penalty must be finite and >= 0.01 and <= 100, got 1e-300"),
        (dict(stop="abc"), "stop takes a tuple of at most 4 texts, none of them empty, got 'abc'"),
        (dict(stop=("a", "")), "none of them empty"),
        (dict(stop=tuple("abcde")), "at most 4 texts"),
        (dict(logit_bias=((3, "a"),)), r"a number in -100..100, got \(3, 'a'\)"),
        (dict(logit_bias=((3, math.nan),)), r"a number in -100..100, got \(3, nan\)"),
        (dict(logit_bias=((-1, 2.0),)), r"an id >= 0 with a number in -100..100, got \(-1, 2.0\)"),
    ],
)
def test_parameters_that_make_no_sense_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestParams(**settings)


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    probs = torch.tensor([[0.125, 0.5, 0.125, 0.25]] * 3, dtype=torch.float64)  # sums without rounding
    kept = keep_likely_rows(probs, [RequestParams(top_p=top_p) for top_p in (0.5, 0.75, 0.76)]) > 0
    assert kept.tolist() == [[False, True, False, False], [False, True, False, True], [True] * 4]


def test_without_top_p_the_rarest_token_stays_whatever_its_neighbours_ask() -> None:
    probs = torch.tensor([[0.5, 0.5, 1e-9]] * 2)  # in float32 the first two have all of the sum
    kept = keep_likely_rows(probs, [RequestParams(), RequestParams(top_p=0.9)]) > 0
    assert kept.tolist() == [[True, True, True], [True, True, False]]


def test_the_constraints_own_mask_is_not_written() -> None:
    class Kept(Odd):
        mask = torch.arange(VOCAB) % 2 == 1

        def allowed(self, state: int) -> Tensor:
            return self.mask

    row = row_of(temperature=0.0, constraint=Kept())
    row.constraint_state = 3  # the text may end
    choose(logits_of(1), [row], end_ids=(8,))
    assert not Kept.mask[8]


def test_what_is_rare_in_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    probs = torch.full((1, 12_801), 1e-10)
    probs[0, 0] = 1.0  # in float32 no span of the others would move the running sum
    quantiles = torch.tensor([[1 - 5e-7]], dtype=torch.float64)
    sums = probs[0].double().cumsum(0)
    expected = int((sums > quantiles * sums[-1]).nonzero()[0, 1])
    assert expected > 5000 and at_quantile(probs, quantiles).tolist() == [expected]


def test_log_probabilities_of_half_precision_are_computed_in_float32() -> None:
    logits, rows = logits_of(2).bfloat16(), [row_of(logprobs=1), row_of(logprobs=0)]
    found = token_logprobs(logits, [3, 4], rows)
    exact = logits.float().log_softmax(dim=1)
    assert [item.logprob for item in found] == pytest.approx([exact[0, 3].item(), exact[1, 4].item()], abs=1e-6)
