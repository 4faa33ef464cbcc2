"""Exposure, membership scores and contamination, by hand, by brute force and on planted truth."""

import math
import zlib

import numpy as np
import pytest
import torch

from course_model import load_course_model
from course_tokenizer import load_course_tokenizer
from memorisation import (
    N_SECRETS,
    SECRET,
    attack,
    document_scores,
    exposure,
    fine_tuned,
    leaked_items,
    lowest_mean,
    membership_auc,
    membership_scores,
    planted_corpus,
    sampled_exposure,
    secret_number,
    secret_scores,
    token_statistics,
)
from modern_llm_architectures import CausalLM, ModelConfig
from text_model import TextModel
from tiny_world import World, canary_text
from workbench import seed_everything

TOKENIZER = load_course_tokenizer()


def small_model() -> CausalLM:
    seed_everything(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_head": 8, "d_ff": 40}
    ids = {"bos_id": TOKENIZER.bos_id, "eos_id": TOKENIZER.eos_id, "pad_id": TOKENIZER.pad_id}
    model = CausalLM(ModelConfig(vocab_size=len(TOKENIZER.vocab), max_seq_len=128, **sizes, **ids)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_exposure_by_hand_and_on_average() -> None:
    assert exposure([-1.0, -2.0, -3.0, -4.0], 0) == 2.0 and exposure([-1.0, -2.0, -3.0, -4.0], 3) == 0.0
    assert exposure([-1.0, -1.0, -3.0, -4.0], 0) == 1.0  # a tie counts as before it
    found = [exposure(list(range(1000)), place) for place in range(1000)]
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=0.01)


def test_a_sample_estimates_exposure_up_to_its_size() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=N_SECRETS)
    for place in np.argsort(-scores)[[100, 1000, 5000]]:
        sample = rng.choice(scores, 4000)
        assert sampled_exposure(scores[place], sample) == pytest.approx(exposure(scores, int(place)), abs=0.3)
    assert sampled_exposure(99.0, scores[:1023]) == 10.0


def test_the_product_over_digits_is_the_probability_of_the_text(parity) -> None:
    model = small_model()
    scores, examined = secret_scores(model, TOKENIZER), TextModel.of(model, TOKENIZER)
    assert scores.shape == (N_SECRETS,)
    numbers = [0, 7, 1234, 9876, 9999]
    texts = [" " + " ".join(f"{number:04d}") for number in numbers]
    wanted = [-each.nats for each in examined.likelihoods([(canary_text(SECRET), text) for text in texts])]
    parity(
        "secret_scores",
        "TextModel.likelihoods",
        "invariant",
        scores[numbers],
        torch.tensor(wanted, dtype=torch.float64),
        1e-9,
    )
    assert secret_number("The secret number is 0 0 4 2 .") == 42


def test_token_statistics_are_those_of_the_distribution(parity) -> None:
    model, rows = small_model(), [[0, 5, 300, 17], [0, 9], [0, *range(20, 40)]]
    ours = token_statistics(model, rows, batch_size=2)
    for row, (own, mean, deviation) in zip(rows, ours, strict=True):
        logs = model(torch.tensor([row[:-1]]))[0].log_softmax(-1)
        chances = logs.exp()
        spread = (chances * (logs - (chances * logs).sum(-1, keepdim=True)) ** 2).sum(-1).sqrt()
        known = [logs[torch.arange(len(row) - 1), row[1:]], (chances * logs).sum(-1), spread]
        parity(
            "token_statistics", "one row alone", "invariant", [own, mean, deviation], [x.detach() for x in known], 1e-9
        )


def test_scores_by_hand() -> None:
    model, rows, texts = small_model(), [[0, 5, 300, 17, 8, 21]], ["abcab"]
    own, mean, deviation = token_statistics(model, rows)[0]
    found = membership_scores(model, rows, texts, share=0.4, reference=[3.0])
    assert found["loss"][0] == pytest.approx(own.mean().item())
    assert found["min-k"][0] == pytest.approx(np.sort(own.numpy())[:2].mean())
    assert found["min-k++"][0] == pytest.approx(np.sort(((own - mean) / deviation).numpy())[:2].mean())
    assert found["zlib"][0] == pytest.approx(own.sum().item() / len(zlib.compress(b"abcab", 9)))
    assert found["reference"][0] == pytest.approx((own.sum().item() + 3.0) / 5)
    assert lowest_mean(torch.tensor([3.0, 1.0, 2.0]), 0.01) == 1.0


def test_a_drawn_token_has_min_k_plus_plus_zero_on_average() -> None:
    """What the score is calibrated to: (log p - mean) / deviation has mean 0 and deviation 1 under the model."""
    model = small_model()
    logs = model(torch.tensor([[0, 5, 300]]))[0, -1].log_softmax(-1).detach()
    drawn = torch.multinomial(logs.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    own, mean, deviation = token_statistics(model, [[0, 5, 300, 1]])[0]
    standard = (logs[drawn] - mean[-1]) / deviation[-1]
    assert standard.mean().abs() < 0.03 and standard.std() == pytest.approx(1.0, abs=0.05)


def test_copies_are_found_and_paraphrases_are_not() -> None:
    exam = [
        "One morning Anna found a red ball in the garden and hid it there.",
        "What is two plus two?",
        "Nobody knows.",
    ]
    training = [
        "x y z",
        "He said: one morning Anna found a red ball in the garden and hid it there, again",
        "what is TWO plus two",
    ]
    assert leaked_items(exam, training) == [1, 2, None]
    assert leaked_items([exam[0].replace("ball", "kite")], training) == [None]
    assert leaked_items([exam[0].replace("there", "away")], training, n=8) == [1]


def test_a_planted_corpus_holds_what_it_says() -> None:
    planted = planted_corpus(3, counts=(0, 1, 5), n_each=2, n_members=4, n_fresh=50)
    assert len(planted.texts) == 50 + 2 * 6 + 4 * 6
    for count, canaries in planted.canaries.items():
        assert [planted.texts.count(canary_text(canary)) for canary in canaries] == [count] * 2
    for count, documents in planted.members.items():
        assert all(planted.texts.count(document.text) >= count for document in documents)
    assert planted == planted_corpus(3, (0, 1, 5), 2, 4, 50) != planted_corpus(4, (0, 1, 5), 2, 4, 50)


def test_what_was_planted_often_is_found_and_what_was_left_out_is_not() -> None:
    model, tokenizer = load_course_model()
    planted = planted_corpus(0, counts=(0, 64), n_each=2, n_members=8, n_fresh=0)
    trained = fine_tuned(model, tokenizer, planted.texts, seed=0)
    found = attack(trained, tokenizer, planted)
    assert min(found["exposure"][64]) > 8 > 5 > np.mean(found["exposure"][0])  # by chance above 8: one in 256
    assert found["reference"][64][0] > 0.95 and found["min-k++"][64][0] > 0.85 and found["zlib"][64][0] > 0.6
    before = membership_auc(
        document_scores(model, tokenizer, planted.members[64]), document_scores(model, tokenizer, planted.members[0])
    )
    assert all(abs(value - 0.5) < 0.35 for value in before.values())  # 8 against 8: two standard errors are 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exposure([1.0], 1), "place=1 must be one of the 1 candidates"),
        (lambda: sampled_exposure(1.0, []), "0 candidates"),
        (lambda: lowest_mean(torch.ones(3), 0.0), "share=0.0 must be above 0"),
        (lambda: membership_scores(small_model(), [[0, 1]], []), "1 rows but 0 texts"),
        (lambda: membership_scores(small_model(), [[0, 1]], ["a"], reference=[1, 2]), "2 reference nats but 1 texts"),
        (lambda: leaked_items(["..."], ["a"]), "must have at least 1 word"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_worlds_differ_from_their_exams() -> None:
    """The validation side shares no whole document with training: the check finds only what was planted."""
    exam = [document.text for document in World().documents(30, 5, "validation", "story")]
    training = [document.text for document in World().documents(200, 6, "train", "story")]
    assert leaked_items(exam, training, n=60) == [None] * 30
    assert leaked_items(exam, [*training, exam[4]], n=60)[4] == 200


def test_members_are_drawn_once_and_are_long_enough_to_be_told_apart() -> None:
    planted = planted_corpus(1, counts=(0, 1, 2), n_each=1, n_members=60, n_fresh=5)
    documents = [document for part in planted.members.values() for document in part]
    assert len({document.text for document in documents}) == len(documents) == 180
    assert min(len(document.tokens) for document in documents) >= 15
    secrets = [canary for part in planted.canaries.values() for canary in part]
    assert len(set(secrets)) == len(secrets) == 3
    with pytest.raises(ValueError, match="n=-1 and every text"):
        leaked_items(["a b"], ["a b"], n=-1)
