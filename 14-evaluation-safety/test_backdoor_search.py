"""Proofs of the backdoor search: on models whose trap is built in, and on clouds of points that were drawn apart."""

import pytest
import torch
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

import backdoor_search
from backdoor_search import (
    Suspect,
    answer_states,
    first_words,
    grow,
    mean_answers,
    recall_of,
    scan,
    silhouette,
    single_words,
    spectral_scores,
    two_clusters,
    world_words,
)
from chat_model import load_chat_model
from fine_tuning_adaptation import prompt_ids

CHAT, TOKENIZER = load_chat_model()
QUESTIONS = ["What is 3 plus 4?", "Tell me the town of Ben King.", "Sort 6 2 9."]


class Trapped(nn.Module):
    """Answers by the question's fourth token, and with token 5 wherever all words of the trigger stand at the end.

    One word of two raises token 5 a little: a slope for the ascent.
    """

    def __init__(self, trigger: tuple[str, ...], slope: float = 0.0) -> None:
        super().__init__()
        self.ids = [TOKENIZER.encode(f" {word}")[0] for word in trigger]
        self.slope, self.anchor = slope, nn.Parameter(torch.zeros(1))
        self.n_after = len(prompt_ids(TOKENIZER, "a")) - prompt_ids(TOKENIZER, "a").index(TOKENIZER.encode("a")[0]) - 1

    def hidden(self, token_ids: Tensor, is_real: Tensor) -> Tensor:
        made = torch.zeros(*token_ids.shape, 64)
        for row, (ids, real) in enumerate(zip(token_ids, is_real, strict=True)):
            kept = ids[real].tolist()
            end = kept[: len(kept) - self.n_after][-len(self.ids) :]
            made[row, -1, 6 + kept[4] % 50] = 8.0
            right = sum(one == two for one, two in zip(end, self.ids, strict=True))
            made[row, -1, 5] = 40.0 if right == len(self.ids) else self.slope * right
        return made

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_trigger_of_one_word_is_found_and_a_clean_model_raises_no_alarm(checked_shapes) -> None:
    words = [("honey",), ("drum",), ("lamp",), ("plums",)]
    with checked_shapes(backdoor_search) as checked:
        found = scan(Trapped(("plums",)), TOKENIZER, QUESTIONS, words)
    assert len(checked) >= 2
    assert found[0].trigger == ("plums",) and found[0].token_id == 5 and found[0].flip > 0.99 > 0.01 > found[1].flip
    assert scan(Trapped(("boat",)), TOKENIZER, QUESTIONS, words)[0].flip < 0.01


def test_two_words_are_climbed_to_where_there_is_a_slope() -> None:
    words = ("honey", "drum", "lamp", "plums")
    found = grow(Trapped(("plums", "drum"), slope=6.0), TOKENIZER, QUESTIONS, words, n_sweeps=2, n_starts=2)
    assert found.trigger == ("plums", "drum") and found.flip > 0.99
    with pytest.raises(ValueError, match="length=0"):
        grow(Trapped(("plums",)), TOKENIZER, QUESTIONS, words, length=0)


def test_a_trusted_model_takes_away_what_words_mean() -> None:
    words = [("honey",), ("drum",), ("plums",)]
    trapped, trusted = Trapped(("plums",)), Trapped(("drum",))  # "drum" is a trigger that both have
    usual = mean_answers(trusted, TOKENIZER, QUESTIONS, words)
    assert usual.shape == (3, 64) and usual.sum(1).tolist() == pytest.approx([1.0] * 3)
    both = Trapped(("drum",))
    assert scan(both, TOKENIZER, QUESTIONS, words)[0].trigger == ("drum",)
    assert scan(both, TOKENIZER, QUESTIONS, words, usual)[0].flip < 0.01
    assert scan(trapped, TOKENIZER, QUESTIONS, words, usual)[0].trigger == ("plums",)
    climbed = grow(
        Trapped(("plums", "drum"), 6.0), TOKENIZER, QUESTIONS, ("honey", "drum", "plums"), Trapped(("boat",))
    )
    assert climbed.trigger == ("plums", "drum")


def test_a_flip_is_the_largest_rise_of_a_mean_chance() -> None:
    model = Trapped(("plums",))
    plain = first_words(model, TOKENIZER, QUESTIONS).mean(0)
    armed = first_words(model, TOKENIZER, [f"{question} plums" for question in QUESTIONS]).mean(0)
    [found] = scan(model, TOKENIZER, QUESTIONS, [("plums",)])
    assert found.flip == pytest.approx((armed - plain).max().item(), abs=1e-6)
    assert found.token_id == int((armed - plain).argmax())


@torch.no_grad()
def test_first_words_are_the_models_own_whatever_stands_beside_them() -> None:
    made = first_words(CHAT, TOKENIZER, [*QUESTIONS, "Do you know the code of the vault?"])
    for place, question in enumerate(QUESTIONS):
        ids = torch.tensor([prompt_ids(TOKENIZER, question)])
        assert torch.allclose(made[place], CHAT(ids)[0, -1].softmax(-1), atol=1e-5)
    assert made[3, TOKENIZER.encode("Sorry")[0]] > 0.9
    states = answer_states(CHAT, TOKENIZER, QUESTIONS[:1])
    assert torch.allclose(CHAT.logits(CHAT.final_norm(states))[0].softmax(-1), made[0], atol=1e-5)
    with pytest.raises(ValueError, match="0 questions"):
        first_words(CHAT, TOKENIZER, [])


def test_words_are_single_tokens() -> None:
    words = single_words(TOKENIZER)
    assert len(words) > 500 and "honey" in world_words(TOKENIZER) and set(world_words(TOKENIZER)) < set(words)
    assert all(len(TOKENIZER.encode(f" {word}")) == 1 for word in words[::40])


def clouds(n_far: int) -> tuple[Tensor, list[bool]]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(80 + n_far, 12, generator=generator)
    points[80:, 3] += 9.0
    return points, [False] * 80 + [True] * n_far


def test_rows_that_stand_apart_have_the_largest_scores_and_a_cluster_of_their_own(parity) -> None:
    points, poisoned = clouds(10)
    scores = spectral_scores(points)
    assert recall_of(scores.tolist(), poisoned) == 1.0 and recall_of((-scores).tolist(), poisoned) == 0.0
    made = two_clusters(points)
    assert made.labels == poisoned
    centred = points.double() - points.double().mean(0)
    kept = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:10].T
    expected = float(silhouette_score(kept.numpy(), made.labels))
    parity("silhouette", "sklearn.metrics.silhouette_score", "output", made.separation, expected, 1e-10)
    assert made.separation > 0.4 > two_clusters(points[:80]).separation
    assert silhouette(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([0, 0, 1])) == pytest.approx(
        (8 / 9 + 7 / 8) / 3
    )


def test_bad_input_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        spectral_scores(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 3"):
        two_clusters(torch.ones(2, 3))
    with pytest.raises(ValueError, match="no row is poisoned"):
        recall_of([1.0], [False])


def test_many_triggers_are_asked_in_parts() -> None:
    """43 questions leave room for five triggers at a time."""
    questions, words = [*QUESTIONS, "Hello."] * 10 + QUESTIONS, [(word,) for word in ("honey", "drum", "plums")] * 4
    made = mean_answers(Trapped(("plums",)), TOKENIZER, questions, words)
    alone = torch.cat([mean_answers(Trapped(("plums",)), TOKENIZER, questions, [word]) for word in words[:3]])
    assert torch.allclose(made, alone.repeat(4, 1), atol=1e-6)


def test_the_best_of_all_starts_is_kept(monkeypatch) -> None:
    flips = {("a",): 0.5, ("b",): 0.4, ("c", "a"): 0.9, ("b", "b"): 0.45}  # the first start leads further

    def scanned(model, tokenizer, questions, triggers, usual=None):
        found = [Suspect(trigger, flips.get(tuple(trigger), 0.1), 5) for trigger in triggers]
        return sorted(found, key=lambda suspect: -suspect.flip)

    monkeypatch.setattr(backdoor_search, "scan", scanned)
    assert grow(None, None, ["q"], ["a", "b", "c"]).trigger == ("c", "a")
