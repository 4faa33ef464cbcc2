"""Tests of semantic_cache: tenants, ages, sizes, and wrong hits counted in a world whose meanings are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from chat_endpoint import Reply
from dense_search import DenseConfig
from semantic_cache import (
    Asked,
    CacheConfig,
    CachedEndpoint,
    Questions,
    SemanticCache,
    WordingBatches,
    best_possible,
    choose_threshold,
    names_of,
    remembering,
    saving,
    train_question_encoder,
    word_vectors,
    worth,
)

CLOSE = CacheConfig(threshold=0.6, same_names=False)
BEN, HILL = "Where does Ben King live?", "Where does Ben Hill live?"
TOWN = "Tell me the town of Ben King."


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_exact_text_is_found_whatever_its_capitals_and_marks():
    cache = SemanticCache(word_vectors, CacheConfig(threshold=2.0))
    cache.put("a", BEN, "Kiel")
    hit = cache.get("a", " where does  Ben King live ")
    assert hit.answer == "Kiel" and hit.exact and hit.cosine == 1.0
    assert cache.get("a", TOWN) is None and cache.get("a", HILL) is None
    assert (cache.n_asked, cache.n_exact, cache.n_close) == (3, 1, 0)


def test_close_and_different():
    cache = SemanticCache(word_vectors, CLOSE)
    cache.put("a", BEN, "Kiel")
    assert cache.get("a", HILL).answer == "Kiel"  # four words of five: the trap
    safe = SemanticCache(word_vectors, CacheConfig(threshold=0.6, same_names=True))
    safe.put("a", BEN, "Kiel")
    assert safe.get("a", HILL) is None and safe.get("a", "Where does Ben King live today?").answer == "Kiel"


def test_a_nearer_question_with_other_names_hides_no_farther_one():
    cache = SemanticCache(word_vectors, CacheConfig(threshold=0.3))
    cache.put("a", HILL, "Lund")
    far = "Where does old Ben King really live now?"
    cache.put("a", far, "Kiel")
    asked, near, farther = word_vectors([BEN, HILL, far])
    assert asked @ near > asked @ farther > 0.3 and cache.get("a", BEN).answer == "Kiel"


def test_a_cosine_at_the_threshold_is_enough():
    cache = SemanticCache(lambda texts: np.eye(2, dtype=np.float32)[[len(texts[0]) % 2]], CacheConfig(threshold=0.0))
    cache.put("a", "even", "four")
    assert cache.get("a", "odd").answer == "four"


def test_equal_letters_of_other_names_are_another_question():
    for threshold in (0.5, 2.0):
        cache = SemanticCache(word_vectors, CacheConfig(threshold=threshold))
        cache.put("a", "Is Bill paid?", "He is.")
        assert cache.get("a", "Is bill paid?") is None and cache.get("a", "is Bill paid").answer == "He is."


def test_exact_text_alone_needs_no_vector():
    asked = []
    cache = SemanticCache(lambda texts: asked.extend(texts) or word_vectors(texts), CacheConfig(threshold=2.0))
    cache.put("a", BEN, "Kiel")
    assert cache.get("a", HILL) is None and cache.get("a", BEN) and asked == [BEN]


def test_tenants_that_ask_or_are_answered_are_remembered():
    for use in (lambda cache: cache.get("a", "one"), lambda cache: cache.put("a", "two", "a")):
        cache = SemanticCache(word_vectors, CacheConfig(threshold=2.0, max_tenants=2))
        for tenant in ("a", "b"):
            cache.put(tenant, "one", tenant)
        use(cache)
        cache.put("c", "one", "c")
        assert set(cache.shelves) == {"a", "c"}


def test_names_are_capitals_and_numbers():
    assert names_of("Where does Anna Bell live?") == {"Anna", "Bell"}
    assert names_of("What is 12 plus 3?") == {"12", "3"} != names_of("What is 12 plus 4?")
    assert names_of("Ben King lives where?") == {"Ben", "King"} and names_of("Tell me.") == frozenset()


def test_tenants_never_meet():
    cache = SemanticCache(word_vectors, CLOSE)
    for number in range(5):
        cache.put("a", f"secret number {number}", "mine")
    assert cache.get("b", "secret number 1") is None
    cache.put("b", "secret number 1", "other")
    assert cache.get("b", "secret number 1").answer == "other" and cache.get("a", "secret number 1").answer == "mine"
    assert cache.get("", "secret number 1") is None


def test_answers_grow_old():
    clock = Clock()
    cache = SemanticCache(word_vectors, CacheConfig(threshold=0.6, ttl=10), clock)
    cache.put("a", BEN, "Kiel")
    clock.now = 9.9
    assert cache.get("a", BEN) and cache.get("a", "Where does Ben King live today?")
    clock.now = 10.0
    assert cache.get("a", BEN) is None and not cache.shelves["a"].index.vectors
    cache.put("a", BEN, "Lund")
    assert cache.get("a", BEN).answer == "Lund"


def test_size_is_bounded_and_the_unused_goes_first():
    cache = SemanticCache(word_vectors, CacheConfig(threshold=2.0, max_entries=3, max_tenants=2))
    for name in ("one", "two", "three"):
        cache.put("a", name, name)
    cache.get("a", "one")
    cache.put("a", "four", "four")
    assert cache.get("a", "two") is None and cache.get("a", "one") and len(cache.shelves["a"].index) == 3
    for tenant in ("b", "c"):
        cache.put(tenant, "one", tenant)
    assert cache.get("a", "one") is None and cache.get("b", "one").answer == "b" and len(cache.shelves) == 2


def test_an_answer_is_replaced_and_empty_questions_are_not_kept():
    cache = SemanticCache(word_vectors, CLOSE)
    cache.put("a", BEN, "Kiel")
    cache.put("a", BEN + "?", "Lund")
    assert cache.get("a", BEN).answer == "Lund" and len(cache.shelves["a"].entries) == 1
    cache.put("a", "?!", "nothing")
    assert cache.get("a", "") is None and len(cache.shelves["a"].entries) == 1


class Counting:
    name = "counting"

    def __init__(self, text: str = "Kiel", reason: str = "stop") -> None:
        self.text, self.reason, self.n = text, reason, 0

    def chat(self, messages, **settings) -> Reply:
        self.n += 1
        return Reply(self.text, self.reason, 5, 3, 0.5)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_endpoint_behind_the_cache_is_asked_once():
    model = Counting()
    cached = CachedEndpoint(model, SemanticCache(word_vectors, CacheConfig(threshold=0.9)))
    assert [cached.chat(ask(BEN)).text for _ in range(3)] == ["Kiel"] * 3 and model.n == 1
    assert cached.chat(ask(BEN), tenant="b").n_prompt == 5 and model.n == 2
    for settings in ({"temperature": 0.7}, {"schema": {}}, {"stop": ("x",)}):
        cached.chat(ask(BEN), **settings)
    cached.chat([*ask("hm"), *ask(BEN)])
    cached.chat([{"role": "system", "content": BEN}])
    assert model.n == 7


@pytest.mark.parametrize("model", [Counting(reason="length"), Counting(text=" ")])
def test_answers_that_are_none_are_not_kept(model):
    cached = CachedEndpoint(model, SemanticCache(word_vectors, CLOSE))
    cached.chat(ask(BEN))
    cached.chat(ask(BEN))
    assert model.n == 2


# In the world


def test_all_wordings_of_a_question_have_its_names():
    for held_out in (False, True):
        questions = Questions(held_out)
        for key in range(0, len(questions.topics), 7):
            wordings = questions.wordings(key)
            assert len(set(wordings)) == 5 and len({names_of(text) for text in wordings}) == 1
    assert not {topic for topic in Questions(True).topics} & {topic for topic in Questions(False).topics}


def test_wrong_hits_are_counted_exactly():
    stream = [Asked(BEN, 0), Asked(BEN, 0), Asked(HILL, 1), Asked(TOWN, 0), Asked(HILL, 1)]
    found = worth(word_vectors, CacheConfig(threshold=0.7, same_names=False), stream)
    assert (found.n, found.hits, found.wrong) == (5, 3, 2)  # HILL is taken for BEN, twice
    assert (found.hit_rate, found.wrong_share) == (0.6, 2 / 3) and 0.9 < found.wrong_bound <= 1
    exact = worth(word_vectors, CacheConfig(threshold=2.0), stream)
    assert (exact.hits, exact.wrong) == (2, 0) and best_possible(stream) == 0.6


def test_streams_repeat_by_popularity():
    questions = Questions(True)
    stream = list(questions.stream(600, 1))
    counts = sorted((sum(asked.key == key for asked in stream) for key in {one.key for one in stream}), reverse=True)
    assert counts[0] > 3 * counts[10] and all(one.text in questions.wordings(one.key) for one in stream[:50])
    assert [one.text for one in questions.stream(5, 1)] == [one.text for one in stream[:5]]


def test_the_threshold_is_the_smallest_that_keeps_the_promise():
    stream = list(Questions(True).stream(300, 0))
    config = CacheConfig(same_names=True)
    chosen = choose_threshold(word_vectors, stream, config, 1.0, (0.5, 0.7, 0.9))
    assert chosen == 0.5
    assert choose_threshold(word_vectors, stream, config, 0.0, (0.5, 0.9)) == 2.0  # no number of hits proves 0


def test_the_first_threshold_that_breaks_the_promise_ends_the_search(monkeypatch):
    bounds = {0.9: 0.01, 0.8: 0.5, 0.7: 0.01}
    looked = []

    def known(embed, config, stream):
        looked.append(config.threshold)
        return SimpleNamespace(wrong_bound=bounds[config.threshold])

    monkeypatch.setattr("semantic_cache.worth", known)
    assert choose_threshold(word_vectors, [], CacheConfig(), 0.1, (0.7, 0.9, 0.8)) == 0.9 and looked == [0.9, 0.8]


def test_training_pairs_are_two_wordings_of_each_question_and_never_the_new_one():
    questions, seen = Questions(False), []
    encoder = SimpleNamespace(config=SimpleNamespace(batch_size=12), tokenizer=SimpleNamespace(pad_id=0))
    encoder.rows = lambda texts: seen.append(texts) or [[1]] * len(texts)
    batches = WordingBatches(questions, encoder, 0)
    for step in range(40):
        keys = batches(step)["groups"].tolist()
        assert len(set(keys)) == 12
        for key, *pair in zip(keys, *seen, strict=True):
            assert len(set(pair)) == 2 and set(pair) <= {*questions.wordings(key)[:-1]}
        seen.clear()


def test_words_alone_mix_names_up_and_equal_names_leave_what_is_asked_of_them():
    stream = list(Questions(True).stream(300, 0))
    embed = remembering(word_vectors)
    loose = worth(embed, CacheConfig(threshold=0.6, same_names=False), stream)
    named = worth(embed, CacheConfig(threshold=0.6), stream)
    assert loose.wrong_share > 1.5 * named.wrong_share > 0.1  # "town" for "job" of one person is left


def test_an_encoder_learns_wordings():
    config = DenseConfig(max_steps=12, batch_size=12, max_tokens=24, d_model=32, warmup_steps=3)
    encoder = train_question_encoder(0, config)
    vectors = encoder.embed([BEN, TOWN])
    assert vectors.shape == (2, 64) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_saving_by_hand():
    assert saving(0.5, 0.1, cost=10, lookup=1, harm=20) == pytest.approx(0.5 * 10 - 1 - 0.5 * 0.1 * 20)
    assert saving(0.0, 0.0, 10, 1, 20) == -1


@pytest.mark.parametrize(("field", "value"), [("threshold", -2), ("ttl", 0), ("max_entries", 0), ("max_tenants", 0)])
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=field):
        CacheConfig(**{field: value})
