"""Proofs of the watermark: transformers' lists, exact tails, expected shares, and what removal leaves."""

import math
import random

import pytest
import torch
from scipy import stats

import watermark
from modern_llm_architectures import CausalLM, ModelConfig
from watermark import (
    Watermark,
    bigrams,
    cropped,
    detect,
    pushed_mass,
    resampled,
    stolen_lists,
    substituted,
    surviving_share,
    tail,
    threshold,
    write_marked,
    z_score,
)
from workbench import seed_everything

MARK = Watermark(vocab_size=211, key=97, green_share=0.3, bias=2.0)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    seed_everything(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 8, "d_ff": 24}
    return CausalLM(ModelConfig(vocab_size=211, max_seq_len=96, **sizes)).eval()


def test_lists_bias_and_scores_are_those_of_transformers(parity) -> None:
    from transformers import WatermarkDetector, WatermarkingConfig, WatermarkLogitsProcessor

    theirs = WatermarkLogitsProcessor(211, "cpu", 0.3, 2.0, 97, "lefthash", 1)
    ids, logits = torch.randint(3, 211, (4, 61)), torch.randn(4, 211)
    for token_id in (3, 17, 210):
        expected = torch.zeros(211, dtype=torch.bool)
        expected[theirs._get_greenlist_ids(torch.tensor([5, token_id]))] = True
        assert torch.equal(MARK.green(token_id), expected)
    parity(
        "watermarked logits",
        "WatermarkLogitsProcessor",
        "output",
        MARK.push(logits, ids[:, -1]),
        theirs(ids, logits),
        0,
    )

    class Sizes:
        vocab_size, bos_token_id, is_encoder_decoder = 211, 0, False

    settings = WatermarkingConfig(0.3, 2.0, 97, "lefthash", 1)
    ids[0, 30:60] = ids[0, :30]  # n-grams that come twice
    for distinct in (False, True):
        detector = WatermarkDetector(Sizes(), "cpu", settings, ignore_repeated_ngrams=distinct)
        found, ours = detector(ids, return_dict=True), [detect(row.tolist(), MARK, distinct=distinct) for row in ids]
        assert [item.n_green for item in ours] == found.num_green_tokens.tolist()
        assert [item.n for item in ours] == found.num_tokens_scored.tolist()
        parity("watermark z", "WatermarkDetector", "output", [item.z for item in ours], found.z_score.tolist(), 1e-10)
    assert detect(ids[0].tolist(), MARK).n < detect(ids[0].tolist(), MARK, distinct=False).n


def test_the_tail_is_the_binomial_one_and_the_threshold_keeps_its_level(parity) -> None:
    share = MARK.n_green / 211
    ours = [tail(count, 40, MARK) for count in range(41)]
    parity(
        "watermark tail",
        "scipy.stats.binom.sf",
        "output",
        ours,
        stats.binom.sf(range(-1, 40), 40, share).tolist(),
        1e-12,
    )
    for n in (1, 10, 40):
        least = threshold(n, MARK, 0.01)
        assert stats.binom.sf(least - 1, n, share) <= 0.01 and (
            least == 0 or stats.binom.sf(least - 2, n, share) > 0.01
        )
    assert threshold(1, MARK, 0.01) == 2
    assert z_score(30, 40, MARK) == pytest.approx((30 - 12) / math.sqrt(40 * 0.3 * 0.7))


def test_a_marked_text_has_the_expected_share_of_green_tokens(model, checked_shapes) -> None:
    with checked_shapes(watermark) as checked:
        found = write_marked(model, [[5], [5, 9]], 6, MARK, torch.Generator().manual_seed(3))
    assert len(checked) >= 5
    found = write_marked(model, [[5]] * 30, 60, MARK, torch.Generator().manual_seed(1))
    expected = sum(pushed_mass(mass, 2.0) for item in found for mass in item.green_mass)
    pairs = [pair for item in found for pair in bigrams(item.ids, 5)]
    seen = detect(pairs, MARK, distinct=False)
    spread = math.sqrt(sum(p * (1 - p) for p in (pushed_mass(m, 2.0) for item in found for m in item.green_mass)))
    assert abs(seen.n_green - expected) < 3 * spread and seen.n == sum(len(item.ids) for item in found)
    assert seen.p_value < 1e-50 < detect(pairs, Watermark(211, 98, 0.3, 2.0), distinct=False).p_value
    assert pushed_mass(0.5, math.log(3)) == pytest.approx(0.75) and pushed_mass(0.3, 0) == pytest.approx(0.3)


def test_without_a_mark_it_is_ordinary_sampling_and_nats_are_the_models(model) -> None:
    from text_metrics import token_nats

    [plain] = write_marked(model, [[5, 7]], 12, None, torch.Generator().manual_seed(4))
    assert plain.green_mass == [] and plain.nats == pytest.approx(
        token_nats(model, [5, 7, *plain.ids], 96)[1:], abs=1e-4
    )
    [pushed] = write_marked(model, [[5, 7]], 12, Watermark(211, 97, 0.3, 0.0), torch.Generator().manual_seed(4))
    assert pushed.ids == plain.ids and pushed.nats == pytest.approx(plain.nats)
    greedy = [write_marked(model, [[5, 7]], 5, MARK, torch.Generator(), 0.0)[0].ids for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_over_keys_the_null_is_kept_for_pairs_counted_once_only() -> None:
    rng = random.Random(0)
    text = [rng.randrange(200) for _ in range(25)] * 3  # says everything three times
    rates = {}
    for distinct in (True, False):
        marks = [Watermark(211, 1000 + key, 0.3, 2.0) for key in range(250)]
        rates[distinct] = sum(detect(text, mark, distinct=distinct).p_value <= 0.05 for mark in marks) / len(marks)
    assert rates[True] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 250) < rates[False]


def test_replacing_tokens_leaves_the_share_that_the_formula_says(model) -> None:
    rng, pool = random.Random(2), list(range(3, 211))
    found = write_marked(model, [[5]] * 40, 80, MARK, torch.Generator().manual_seed(5))
    green = detect([pair for item in found for pair in bigrams(item.ids)], MARK, distinct=False)
    for share in (0.2, 0.6):
        changed = [substituted(item.ids, share, pool, rng) for item in found]
        after = detect([pair for ids in changed for pair in bigrams(ids)], MARK, distinct=False)
        expected = surviving_share(green.n_green / green.n, MARK.n_green / 211, share)
        assert after.n_green / after.n == pytest.approx(expected, abs=4 * math.sqrt(0.25 / after.n))
    ids = found[0].ids
    anew = resampled(model, [5], ids, 0.5, torch.Generator().manual_seed(0), rng)
    assert len(anew) == len(ids) and 0 < sum(one != two for one, two in zip(ids, anew, strict=True)) <= round(
        0.5 * len(ids)
    )
    assert cropped(list(range(10)), 0.3) == list(range(7)) and cropped([4], 0.9) == [4]


def test_lists_can_be_read_off_enough_texts(model) -> None:
    generator = torch.Generator().manual_seed(6)
    small = Watermark(211, 97, 0.3, 4.0)
    texts = [write_marked(model, [[5]] * 48, 70, mark, generator) for mark in (small, None)]
    pairs = [[pair for item in side for pair in bigrams(item.ids)] for side in texts]
    found = stolen_lists(*pairs)
    often = [pair for pair, value in found.items() if value > 0.5]
    green = sum(bool(small.green(one)[two]) for one, two in often) / len(often)
    assert green > 0.9
    with pytest.raises(ValueError, match="0 plain pairs"):
        stolen_lists(pairs[0], [])


def test_a_text_ends_at_its_end_and_pairs_may_have_one_before_them(model) -> None:
    class Ending(CausalLM):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            made = super().logits(hidden)
            made[..., self.config.eos_id] += 4.0
            return made

    model = Ending(model.config).eval()
    found = write_marked(model, [[5], [5, 9], [7]] * 4, 30, MARK, torch.Generator().manual_seed(2))
    lengths = {len(item.ids) for item in found}
    assert len(lengths) > 2 and max(lengths) < 30
    for item in found:
        assert item.ids[-1] == model.config.eos_id and model.config.eos_id not in item.ids[:-1]
        assert len(item.nats) == len(item.green_mass) == len(item.ids)
    assert detect([9, 4], MARK, previous=5) == detect([(5, 9), (9, 4)], MARK) != detect([9, 4], MARK)


def test_ids_and_shares_that_cannot_be_are_named() -> None:
    mark, rng = Watermark(10), random.Random(0)
    for call, message in (
        (lambda: detect([1, 10], mark), r"token id 10 is not in 0\.\.9"),
        (lambda: detect([1, -1], mark), r"token id -1 is not in 0\.\.9"),  # not the last of the list
        (lambda: substituted([1, 2], 1.5, [1], rng), "share=1.5 must be between 0 and 1"),
        (lambda: substituted([1, 2], 0.5, [], rng), "the pool holds no token"),
        (lambda: cropped([1, 2], 2), "share=2 must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_settings_name_value_and_limit() -> None:
    with pytest.raises(ValueError, match="green_share"):
        Watermark(100, green_share=1.0)
    for bias in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="bias must be finite and >= 0"):
            Watermark(100, bias=bias)
    with pytest.raises(ValueError, match="is none; raise it"):
        Watermark(100, green_share=0.001)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        detect([5], MARK)
    with pytest.raises(ValueError, match="level=2"):
        threshold(5, MARK, 2)
    with pytest.raises(ValueError, match="probability"):
        pushed_mass(1.5, 1.0)
