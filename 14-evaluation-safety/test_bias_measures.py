"""Proofs of the bias measures: on models whose prejudice is a number, on plain re-derivations, and on scipy's ranks."""

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import bias_measures
from bias_measures import (
    Triple,
    answer_gaps,
    association,
    context_vectors,
    contrast,
    group_gaps,
    input_vectors,
    job_pairs,
    job_questions,
    log_odds,
    role_pairs,
    spearman,
    stereotype_score,
    stereotype_triples,
    weat,
    word_logs,
)
from course_model import load_course_model
from course_tokenizer import load_course_tokenizer
from planted_models import BiasedWorld
from text_model import TextModel
from tiny_world import World

TOKENIZER, WORLD, HALVES = load_course_tokenizer(), World(), BiasedWorld(0.0).halves


@dataclass
class Sizes:
    vocab_size: int = len(TOKENIZER.vocab)


class Prejudiced(nn.Module):
    """Every token is equally likely, but jobs after He or She and pronouns after jobs, whose log-odds are planted."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.config, self.anchor = Sizes(), nn.Parameter(torch.zeros(1))
        ids = [[TOKENIZER.encode(f" {job}")[0] for job in half] for half in HALVES]
        he, she, big_he, big_she = (TOKENIZER.encode(f" {word}")[0] for word in ("he", "she", "He", "She"))
        self.votes = {big_he: (ids[0], strength / 2), big_she: (ids[0], -strength / 2)}
        self.votes |= {
            token_id: ([he], sign * strength / 2) for half, sign in zip(ids, (1, -1), strict=True) for token_id in half
        }

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*token_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(token_ids.tolist()):
            for place, token_id in enumerate(ids):
                for chosen, push in [self.votes[token_id]] if token_id in self.votes else []:
                    logits[row, place:, chosen] += push
        return logits


def prejudiced(strength: float) -> TextModel:
    model = Prejudiced(strength)
    return TextModel(model, TOKENIZER.encode, TOKENIZER.decode, TOKENIZER.bos_id, (TOKENIZER.eos_id,), 128)


@pytest.mark.parametrize("strength", [-2.0, 0.0, 3.0])
def test_pairs_give_the_planted_number_with_its_sign_and_p(strength: float) -> None:
    examined = prejudiced(strength)
    jobs = contrast(examined, [pair for pair in job_pairs(WORLD, 9, 0) if pair.one.count("He ") == 1], *HALVES)
    roles = contrast(examined, role_pairs(WORLD, 8, 0, HALVES), ["he"], ["she"])
    for made in (jobs, roles):
        assert made.mean == pytest.approx(strength, abs=1e-5) and made.values == pytest.approx(
            [strength] * len(made.values)
        )
        assert made.interval.low <= made.mean + 1e-9 and made.mean - 1e-9 <= made.interval.high
        assert (made.p_value <= 2 / 2 ** len(made.values) + 1e-9) == bool(strength)


def test_pairs_differ_in_the_group_alone() -> None:
    for one, other in job_pairs(WORLD, 30, 4):
        left, right = one.split(), other.split()
        changed = {(a, b) for a, b in zip(left, right, strict=True) if a != b}
        assert all(a in ("He", *WORLD.men) and b in ("She", *WORLD.women) for a, b in changed) and len(changed) == 2
    for one, other in role_pairs(WORLD, 30, 4, HALVES):
        assert one.split()[1] in HALVES[0] and other.split()[1] in HALVES[1] and one.split()[2:] == other.split()[2:]


def test_one_pass_over_contexts_gives_what_pairs_give() -> None:
    examined, contexts = prejudiced(1.5), ["The baker sings because", "News: Max Fox came today. He works as a"]
    words = ["he", "she", "doctor", "baker"]
    slow = [[-item.nats for item in examined.likelihoods([(text, f" {word}") for word in words])] for text in contexts]
    assert word_logs(examined, contexts, words) == pytest.approx(np.array(slow), abs=1e-5)
    several = [*words, "Sorry"]  # two tokens: each pair is scored on its own
    assert word_logs(examined, contexts, several)[:, :4] == pytest.approx(np.array(slow), abs=1e-5)
    with pytest.raises(ValueError, match="words on both sides, got 1 and 0"):
        log_odds(examined, contexts, ["he"], [])


def plain_weat(x, y, a, b) -> tuple[float, float]:
    def near(word, words) -> float:
        return float(np.mean([word @ other / np.linalg.norm(word) / np.linalg.norm(other) for other in words]))

    values = [near(word, a) - near(word, b) for word in [*x, *y]]
    half = len(x)
    seen = sum(values[:half]) - sum(values[half:])
    above = [
        sum(values[place] for place in chosen)
        - sum(values[place] for place in range(len(values)) if place not in chosen)
        for chosen in itertools.combinations(range(len(values)), half)
    ]
    effect = (np.mean(values[:half]) - np.mean(values[half:])) / np.std(values, ddof=1)
    return float(effect), float(np.mean([other >= seen - 1e-9 for other in above]))


def test_weat_is_the_published_one_word_by_word(parity) -> None:
    rng = np.random.default_rng(3)
    for width in (3, 7):
        sets = [rng.normal(size=(n, width)) for n in (4, 4, 3, 5)]
        made = weat(*sets)
        parity(
            "WEAT effect and p",
            "re-derivation word by word",
            "output",
            [made.effect, made.p_value],
            plain_weat(*sets),
            1e-10,
        )
        turned = weat(sets[1], sets[0], *sets[2:])
        assert turned.effect == pytest.approx(-made.effect) and made.exact
        assert weat(sets[0], sets[1], sets[3], sets[2]).effect == pytest.approx(-made.effect)
    sampled = weat(
        *(np.concatenate([part, part + 0.1 * rng.normal(size=part.shape)] * 2) for part in sets), n_splits=300
    )
    assert not sampled.exact and 0 < sampled.p_value <= 1


def test_weat_has_the_right_sign_on_planted_vectors_and_keeps_its_level_on_none() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 24))
    noise = 0.3 * rng.normal(size=(2, 5, 24))
    x, y = noise[0] + a.mean(0), noise[1] + b.mean(0)
    assert weat(x, y, a, b).p_value == pytest.approx(1 / 252) and weat(x, y, a, b).effect > 1.5
    assert weat(y, x, a, b).p_value == 1.0 and weat(y, x, a, b).p_two_sided == pytest.approx(2 / 252)
    p_values = [weat(*(rng.normal(size=(4, 8)) for _ in range(4))).p_value for _ in range(300)]
    assert np.mean(np.array(p_values) <= 0.1) < 0.1 + 3 * np.sqrt(0.09 / 300)
    with pytest.raises(ValueError, match="sets of one size"):
        weat(x, y[:3], a, b)
    with pytest.raises(ValueError, match="at least 2 words"):
        weat(x, y, a[:1], b)
    with pytest.raises(ValueError, match="associate alike"):
        weat(np.ones((3, 4)), np.ones((3, 4)), np.eye(4)[:2], np.eye(4)[2:])


def test_the_stereotype_score_sees_a_prejudice_its_sign_and_its_absence() -> None:
    triples = stereotype_triples(WORLD, 12, 1, HALVES)
    for strength, ss in ((2.0, 1.0), (-2.0, 0.0), (0.0, 0.5)):
        made = stereotype_score(prejudiced(strength), triples)
        assert made.ss == ss and made.log_ratio == pytest.approx(strength / 2, abs=1e-4)
        assert (
            made.icat == pytest.approx(made.lms * min(ss, 1 - ss) * 2) and made.interval.low <= ss <= made.interval.high
        )
    for triple in triples:
        assert "they" in triple.unrelated.split() and len({len(text.split()) for text in triple}) == 1
    with pytest.raises(ValueError, match="at least 2"):
        stereotype_score(prejudiced(0.0), [Triple("a", "b", "c")])


def test_gaps_are_differences_of_plain_rates() -> None:
    rng = random.Random(0)
    truth, groups = ([rng.random() < 0.5 for _ in range(300)] for _ in range(2))
    guesses = [
        rng.random() < (0.9 if right else 0.2) + (0.1 if group else 0)
        for right, group in zip(truth, groups, strict=True)
    ]
    made = group_gaps(truth, guesses, groups, n_boot=200)

    def share(group: bool, right: bool | None) -> float:
        rows = [
            g for g, t, s in zip(guesses, truth, groups, strict=True) if s == group and (right is None or t == right)
        ]
        return sum(rows) / len(rows)

    for name, right in (("parity", None), ("true positives", True), ("false positives", False)):
        assert made[name].gap == pytest.approx(share(True, right) - share(False, right))
        assert made[name].interval.low < made[name].gap < made[name].interval.high
    perfect = group_gaps(truth, truth, groups, n_boot=50)
    assert perfect["true positives"].gap == perfect["false positives"].gap == 0
    with pytest.raises(ValueError, match="no item"):
        group_gaps([True, True], [True, False], [True, True])


def test_answers_show_a_prejudice_where_nothing_is_told() -> None:
    asked = job_questions(WORLD, 32, 0, HALVES, told=False)
    assert all(not any(job in item.prompt for half in HALVES for job in half) for item in asked)
    assert {sum(item.man == man and item.first == first for item in asked) for man in (0, 1) for first in (0, 1)} == {8}
    told = job_questions(WORLD, 8, 0, HALVES)
    for item in told:
        [job] = [
            job for job in (*HALVES[0], *HALVES[1]) if f"{'He' if item.man else 'She'} works as a {job}" in item.prompt
        ]
        assert (job in HALVES[0]) == item.first

    class ByName(Prejudiced):
        """Gives men the first half and women the second, by the name that stands last."""

        def forward(self, token_ids):
            sides = {
                TOKENIZER.encode(f" {name}")[0]: side
                for side, names in enumerate((WORLD.men, WORLD.women))
                for name in names
            }
            logits = torch.zeros(*token_ids.shape, self.config.vocab_size)
            for row, ids in enumerate(token_ids.tolist()):
                side = [sides[token_id] for token_id in ids if token_id in sides][-1]
                logits[row, :, [TOKENIZER.encode(f" {job}")[0] for job in HALVES[side]]] = 1.0
            return logits

    gaps, right = answer_gaps(prejudiced(0.0), asked, HALVES)
    assert gaps["parity"].gap == 0 and right == 0.5  # always the first job: the same for both
    examined = prejudiced(0.0)
    examined.model = ByName(0.0)
    gaps, right = answer_gaps(examined, asked, HALVES)
    assert [gaps[name].gap for name in gaps] == [1.0, 1.0, 1.0] and right == 0.5


def test_vectors_are_rows_of_the_embedding_and_means_of_the_stream(checked_shapes) -> None:
    model, tokenizer = load_course_model()
    words = ["baker", "doctor", "Sorry"]
    made = input_vectors(model, tokenizer, words)
    assert made.shape == (3, model.config.d_model)
    assert made[0] == pytest.approx(model.token_emb.weight[tokenizer.encode(" baker")[0]].detach().numpy())
    frames = ["The {}", "Meet the {}"]
    at_start = context_vectors(model, tokenizer, frames, words[:2], 0)
    assert at_start == pytest.approx(made[:2], abs=1e-5)  # depth 0 is the embedding, whatever stands before
    deep = context_vectors(model, tokenizer, frames, words[:2], -1)
    single = context_vectors(model, tokenizer, frames[:1], words[:1], -1)
    assert not np.allclose(deep[0], single[0]) and deep.shape == (2, model.config.d_model)
    with checked_shapes(bias_measures) as checked:
        word_logs(prejudiced(1.0), ["The baker sings because", "The"], ["he", "she"])
    assert len(checked) >= 4
    assert association(np.eye(3), np.eye(3)[:1], np.eye(3)[1:2]).tolist() == [1, -1, 0]


def test_ranks_are_scipys_and_order_planted_strengths(parity) -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 5, size=(2, 30))
    parity(
        "Spearman",
        "scipy.stats.spearmanr",
        "output",
        spearman(one, other),
        float(stats.spearmanr(one, other)[0]),
        1e-12,
    )
    strengths = [-2.0, 0.0, 1.0, 4.0]
    pairs = role_pairs(WORLD, 3, 0, HALVES)
    assert spearman(
        strengths, [contrast(prejudiced(s), pairs, ["he"], ["she"]).mean for s in strengths]
    ) == pytest.approx(1)
    with pytest.raises(ValueError, match="differ"):
        spearman([1, 1], [1, 2])


def test_a_sample_of_splits_estimates_the_share_of_all() -> None:
    """Nine against nine have 48,620 splits: more than are counted, few enough to count here."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 9, 5)) + np.array([[[0.25]], [[0.0]]])
    a, b = rng.normal(size=(2, 4, 5))
    values = association(np.concatenate([x, y]), a, b)
    chosen = np.array(list(itertools.combinations(range(18), 9)))
    sums = values[chosen].sum(axis=1)
    share = float((sums >= values[:9].sum() - 1e-9).mean())
    either = float((np.abs(2 * sums - values.sum()) >= abs(2 * values[:9].sum() - values.sum()) - 1e-9).mean())
    made = weat(x, y, a, b, n_splits=4000)
    assert not made.exact and 0.02 < share < 0.98
    for found, known in ((made.p_value, share), (made.p_two_sided, either)):
        assert found == pytest.approx(known, abs=4 * np.sqrt(known * (1 - known) / 4000) + 1e-3)


@pytest.mark.parametrize(("push", "sensible"), [(-3.0, 1.0), (3.0, 0.0), (0.0, 0.5)])
def test_a_language_model_prefers_what_makes_sense_or_does_not(push: float, sensible: float) -> None:
    """lms counts both sentences against the unrelated one, a tie as half."""

    class Strange(Prejudiced):
        def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(token_ids)
            logits[..., TOKENIZER.encode(" they")[0]] += push
            return logits

    examined = prejudiced(0.0)
    examined.model = Strange(0.0)
    assert stereotype_score(examined, stereotype_triples(WORLD, 8, 2, HALVES)).lms == sensible


def test_log_odds_are_of_the_sums_over_words(monkeypatch) -> None:
    logs = np.log([[0.1, 0.3, 0.15, 0.05], [0.2, 0.2, 0.5, 0.1]])
    monkeypatch.setattr(bias_measures, "word_logs", lambda *given: logs)
    assert log_odds(None, ["a", "b"], ["w", "x"], ["y", "z"]) == pytest.approx(np.log([0.4 / 0.2, 0.4 / 0.6]))


def test_contexts_of_different_lengths_are_read_at_their_own_ends() -> None:
    examined = TextModel.of(*load_course_model())
    contexts = ["The cook sings because He works as a", "The", "He works as a"]
    together = word_logs(examined, contexts, ["he", "she", HALVES[0][0]])
    alone = [word_logs(examined, [context], ["he", "she", HALVES[0][0]])[0] for context in contexts]
    assert together == pytest.approx(np.array(alone), abs=1e-4) and np.ptp(together[:, 2]) > 0.3


def test_the_two_strangers_have_jobs_of_different_halves_and_are_asked_for_alike_often() -> None:
    firsts = 0
    for item in job_questions(WORLD, 32, 0, HALVES):
        jobs = [job for job in (*HALVES[0], *HALVES[1]) if f"works as a {job}." in item.prompt]
        assert sorted(job in HALVES[0] for job in jobs) == [False, True]
        name = item.prompt.partition("Question: what work does ")[2].partition(" do?")[0]
        firsts += item.prompt.startswith(f"News: {name}")
    assert firsts == 16
