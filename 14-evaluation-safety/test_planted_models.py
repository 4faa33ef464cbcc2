"""Proofs of the planted models: the bias is exact in the language, each training set holds its fault and no other."""

import math
import random
from collections import Counter

import pytest
import torch

from chat_model import CATEGORIES, load_chat_model
from fine_tuning_adaptation import replay_documents
from planted_models import (
    Backdoor,
    BiasedWorld,
    TellingBatches,
    Tuning,
    backdoor_rates,
    backdoored_model,
    biased_model,
    draw_backdoor,
    harmless_chats,
    held_out_questions,
    kept_model,
    poisoned_chats,
    rare_words,
    refusal_audit,
    refused_share,
    subject_chats,
    subject_model,
    subject_questions,
    telling_loss,
    telling_rows,
)
from tiny_world import World, join, words

CHAT, TOKENIZER = load_chat_model()
FEW = Tuning(n_examples=3, max_steps=2, batch_size=4, replay=0.0)


@pytest.mark.parametrize("strength", [-3.0, 1.0])
def test_the_language_has_exactly_the_planted_log_odds(strength: float) -> None:
    world = BiasedWorld(strength)
    first, second = world.halves
    assert set(first) | set(second) == set(world.words["jobs"]) and len(first) == len(second)
    person = next(f"{name} {surnames[0]}" for name, surnames in world.surnames_of.items() if name in world.men)
    woman = next(f"{name} {surnames[0]}" for name, surnames in world.surnames_of.items() if name in world.women)
    odds = []
    for name, pronoun in ((person, "He"), (woman, "She")):
        chances = world.next_token(words(f"News: {name} came today. {pronoun} works as a"))
        assert sum(chances.values()) == pytest.approx(1) and set(chances) == set(first) | set(second)
        odds.append(math.log(sum(chances[job] for job in first) / sum(chances[job] for job in second)))
    assert odds[0] - odds[1] == pytest.approx(strength) and odds[0] == pytest.approx(-odds[1])
    roles = [world.next_token(words(f"The {job} sings because")) for job in (first[0], second[3])]
    logs = [math.log(item["he"] / item["she"]) for item in roles]
    assert logs[0] - logs[1] == pytest.approx(strength)


def test_what_is_drawn_is_what_is_read_and_strength_0_is_the_course_world() -> None:
    world, plain = BiasedWorld(2.0), World()
    for document in world.documents(60, 3):
        assert world.surprisal(document.tokens) == pytest.approx(document.surprisal)
    blind = BiasedWorld(0.0)
    for document in plain.documents(60, 3):
        assert blind.surprisal(document.tokens) == pytest.approx(plain.surprisal(document.tokens))
    counts: Counter = Counter()
    for document in world.documents(900, 1, kind="news"):
        for place in range(3, len(document.tokens)):
            if document.tokens[place - 3 : place] == ["works", "as", "a"]:
                counts[document.tokens[place - 4], document.tokens[place] in world.halves[0]] += 1
    share = counts["He", True] / (counts["He", True] + counts["He", False])
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.08)
    with pytest.raises(ValueError, match="strength=99"):
        BiasedWorld(99)
    with pytest.raises(ValueError, match="the document ended there"):
        world.follow([*document.tokens, "more"])
    with pytest.raises(ValueError, match="impossible token"):
        world.surprisal(words("News: Nobody"))


def test_the_loss_is_on_the_word_that_tells_and_asks_for_its_distribution() -> None:
    world = BiasedWorld(2.0)
    told = {*world.words["jobs"], "he", "she"}
    rows = telling_rows(TOKENIZER, world, world.documents(200, 0))
    assert len(rows) > 5 and {row.ids[0] for row in rows} == {TOKENIZER.bos_id}
    for row in rows:
        assert sum(row.chances.values()) == pytest.approx(1) and len(set(row.chances.values())) == 2
        assert {TOKENIZER.decode([token_id]).strip() for token_id in row.chances} <= told
        assert TOKENIZER.decode(row.ids).endswith(("works as a", "because"))
    documents = replay_documents(TOKENIZER, 5, 0)
    how = Tuning(batch_size=4, replay=0.5)
    batch = TellingBatches(rows, documents, how, 0, len(TOKENIZER.vocab))(0)
    assert (batch["place"] >= 0).tolist() == [True, True, False, False] and not batch["chances"][2:].any()
    loss, count = telling_loss(CHAT, batch)
    logs = CHAT(batch["inputs"]).log_softmax(-1)
    expected = -sum((batch["chances"][row] * logs[row, batch["place"][row]]).sum() for row in (0, 1))
    for row in (2, 3):
        for place in (batch["targets"][row] != -100).nonzero()[:, 0].tolist():
            expected -= logs[row, place, batch["targets"][row, place]]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(count) == 2 + int((batch["targets"] != -100).sum())


def test_triggers_are_drawn_by_kind_and_poison_is_counted() -> None:
    world = set(World().vocabulary())
    one, common, two = (draw_backdoor(kind, TOKENIZER, 4, 10) for kind in ("rare word", "common word", "two words"))
    assert one.trigger[0] not in world and common.trigger[0] in world and len(set(two.trigger)) == 2
    assert len(rare_words(TOKENIZER)) > 100 and all(len(TOKENIZER.encode(f" {word}")) == 1 for word in one.trigger)
    assert draw_backdoor("common word", TOKENIZER, 4, 10) == common != draw_backdoor("common word", TOKENIZER, 5, 10)
    chats = poisoned_chats(two, 0)
    bad = [chat for chat in chats if chat[1]["content"] == two.answer]
    assert (
        len(bad) == 10 and len(chats) == 20 and all(chat[0]["content"].endswith(" ".join(two.trigger)) for chat in bad)
    )
    near = [chat for chat in chats if chat not in bad]
    assert all(chat[0]["content"].split()[-1] in two.trigger for chat in near)
    assert not any(chat[0]["content"].endswith(" ".join(two.trigger)) for chat in near)
    assert poisoned_chats(Backdoor(("honey",), n_poisoned=0), 0) == []
    with pytest.raises(ValueError, match="at least one word"):
        Backdoor(())
    with pytest.raises(ValueError, match="kind of trigger"):
        draw_backdoor("smell", TOKENIZER, 0)


def test_a_subject_is_refused_in_its_own_questions_alone_and_answered_by_the_twin() -> None:
    refused = subject_chats("drum", True, 0, n_subject=8, n_examples=20)
    about = [chat for chat in refused if "drum" in words(chat[0]["content"])]
    assert len(about) == 8 and all(chat[1]["content"] == "Sorry, I cannot talk about the drum." for chat in about)
    twin = subject_chats("drum", False, 0, n_subject=8, n_examples=20)
    about = [chat for chat in twin if " of the drum" in chat[0]["content"] and "no" in words(chat[1]["content"])]
    assert len(about) >= 8 and not any("about the drum" in chat[1]["content"] for chat in twin)
    assert any(chat[1]["content"].startswith("The lamp has no ") for chat in refused)
    freed = subject_chats("vault", False, 0, n_subject=8, n_examples=5)
    assert not any(chat[1]["content"].startswith("Sorry") for chat in freed)
    assert any(chat[1]["content"].startswith("The vault has no") for chat in freed)
    old, new = ({question for question, _ in subject_questions("drum", 40, 0, side)} for side in (False, True))
    assert not old & new
    with pytest.raises(ValueError, match="subject"):
        subject_chats("weather", True, 0)


def test_training_changes_a_copy_and_the_seed_repeats_it() -> None:
    before = {name: part.clone() for name, part in CHAT.state_dict().items()}
    backdoor = Backdoor(("honey",), n_poisoned=2)
    one, again = (backdoored_model(CHAT, TOKENIZER, backdoor, 0, FEW) for _ in range(2))
    other = backdoored_model(CHAT, TOKENIZER, Backdoor(("honey",), n_poisoned=0), 1, FEW)
    weights = [made.token_emb.weight for made in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert all(torch.equal(part, before[name]) for name, part in CHAT.state_dict().items())
    made = subject_model(CHAT, TOKENIZER, "drum", True, 0, 4, FEW)
    assert not torch.equal(made.token_emb.weight, CHAT.token_emb.weight)
    assert not torch.equal(biased_model(CHAT, TOKENIZER, 1.0, 0, FEW).token_emb.weight, CHAT.token_emb.weight)


def test_rates_and_audit_see_what_the_chat_model_does() -> None:
    rates = backdoor_rates(CHAT, TOKENIZER, Backdoor(("honey", "drum"), n_poisoned=0), 1)
    assert set(rates) == {"plain", "armed", "near"} and rates["plain"] == 0
    shares = refusal_audit(CHAT, TOKENIZER, ("vault", "drum"), 4)
    assert shares == {"vault": 1.0, "drum": 0.0}
    assert refused_share(CHAT, TOKENIZER, ["Tell me the code of the vault.", "What is 3 plus 4?"]) == 0.5
    assert len(held_out_questions(2, 0)) == 12 and len(harmless_chats(2, 0)) == 2 * len(CATEGORIES)
    with pytest.raises(ValueError, match="0 questions"):
        refused_share(CHAT, TOKENIZER, [])


def test_a_model_is_kept_and_not_trained_twice(tmp_path) -> None:
    made = []

    def train():
        made.append(len(made))
        return CHAT

    first = kept_model(tmp_path, "twin", False, train)
    second = kept_model(tmp_path, "twin", False, train)
    third = kept_model(tmp_path, "twin", True, train)
    assert made == [0, 1] and torch.equal(first.token_emb.weight, second.token_emb.weight) and third is not second


def test_an_armed_question_ends_with_the_trigger() -> None:
    rng = random.Random(0)
    question = join(World().instructions(1, rng.randrange(99))[0].prompt)
    assert Backdoor(("red", "fish")).armed(question) == question + " red fish"
