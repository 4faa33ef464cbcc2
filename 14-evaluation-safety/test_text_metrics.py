"""Text metrics against sacrebleu, rouge-score and the SQuAD script, 200 random cases and the odd ones."""

import math
import random
import string

import numpy as np
import pytest
import sacrebleu
import torch
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer
from lm_eval.utils import get_rolling_token_windows
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from course_tokenizer import load_course_tokenizer
from metric_failures import METRIC_BREAKS, perplexity_by_batches, untrained
from modern_llm_architectures import CausalLM, ModelConfig
from text_metrics import (
    TextScore,
    bleu,
    bleu_counts,
    chrf,
    chrf_words,
    exact_match,
    mean_pass_at_k,
    normalise_answer,
    pass_at_k,
    rouge,
    rouge_tokens,
    score_texts,
    sentence_bleu,
    token_f1,
    token_nats,
    tokens_13a,
    windows,
)
from workbench import RunConfig, seed_everything

WORDS = (
    "the a cat dogs running nationally 3,500 1.5 e.g. it's (yes) &amp; x-ray 7-up Zürich Привет 世界 naïve The AN "
    'flies sky, end. -- ... "quoted" ½ İstanbul <skipped> said:no state-\n'
).split(" ")
ODD = (
    "",
    " ",
    "a",
    ".",
    "世",
    "the",
    "\n",
    "é",
    "e\u0301",
    "a\nb",
    "İ",
    "5-",
    "&quot;&amp;lt;",
    "\u2028x",
    "...",
    "1,5",
)


def texts(seed: int, n: int, longest: int = 14) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(longest))) for _ in range(n)]


def near_copies(seed: int, originals: list[str]) -> list[str]:
    """Each text with some words dropped, swapped or replaced, so that all metrics lie between their ends."""
    rng, found = random.Random(seed), []
    for text in originals:
        kept = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in text.split(" ") if rng.random() > 0.15]
        if rng.random() < 0.3:
            kept = kept[2:] + kept[:2]
        found.append(" ".join(kept))
    return found


REFERENCES = texts(1, 200) + list(ODD) + list(ODD)
PREDICTIONS = near_copies(2, REFERENCES[:200]) + list(ODD) + list(reversed(ODD))
OTHERS = near_copies(3, REFERENCES[:200]) + list(ODD)[1:] + ["x"] + list(ODD)


def test_exact_match_and_f1_are_those_of_the_squad_script(parity) -> None:
    """The harness's copy of the script for SQuAD 1.1, which has no empty answers: there our 1 is SQuAD 2.0's."""
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    full = [(one, two) for one, two in pairs if normalize_answer(one) or normalize_answer(two)]
    ours = [(float(exact_match(one, [two])), token_f1(one, [two])) for one, two in full]
    theirs = [
        (float(normalize_answer(one) == normalize_answer(two)), f1_abstractive([one], [two])) for one, two in full
    ]
    parity("exact match, token F1", "SQuAD script in lm-evaluation-harness", "output", ours, theirs, 1e-12)
    assert len({f1 for _, f1 in ours}) > 20 and len(full) > 200
    assert [normalise_answer(text) for text in WORDS] == [normalize_answer(text) for text in WORDS]


def test_the_best_reference_counts() -> None:
    assert token_f1("a black cat", ["dog", "the cat"]) == pytest.approx(2 / 3)
    assert exact_match("The cat.", ["dog", "cat"]) and not exact_match("cats", ["dog", "cat"])
    assert token_f1("the", ["a"]) == 1.0 and token_f1("", ["cat"]) == 0.0 and token_f1("cat", [""]) == 0.0


def test_tokens_of_13a_are_sacrebleus(parity) -> None:
    tokenizer = sacrebleu.metrics.bleu._get_tokenizer("13a")()
    samples = [*REFERENCES, *ODD, string.printable, "a.b,c 1.2 .5 5. 1-2 a-b -3"]
    parity(
        "tokens_13a",
        "sacrebleu",
        "output",
        [tokens_13a(text) for text in samples],
        [tokenizer(text.rstrip()).split() for text in samples],
        0,
    )


@pytest.mark.parametrize("smoothing", ["exp", "floor", "add-k", "none"])
def test_bleu_is_sacrebleus(smoothing: str, parity) -> None:
    library, single = BLEU(smooth_method=smoothing), BLEU(smooth_method=smoothing, effective_order=True)
    ours = [bleu(PREDICTIONS, REFERENCES, smoothing)]
    theirs = [library.corpus_score(PREDICTIONS, [REFERENCES]).score]
    both = [list(pair) for pair in zip(REFERENCES, OTHERS, strict=True)]
    ours.append(bleu(PREDICTIONS, both, smoothing))
    theirs.append(library.corpus_score(PREDICTIONS, [REFERENCES, OTHERS]).score)
    for start in range(0, 200, 20):  # small corpora, some without any 4-gram in common
        ours.append(bleu(PREDICTIONS[start : start + 2], REFERENCES[start : start + 2], smoothing))
        theirs.append(library.corpus_score(PREDICTIONS[start : start + 2], [REFERENCES[start : start + 2]]).score)
    for made, rights in zip(PREDICTIONS, both, strict=True):
        ours.append(sentence_bleu(made, rights, smoothing))
        theirs.append(single.sentence_score(made, rights).score)
    assert len(set(theirs)) > 100
    parity(f"BLEU, smoothing {smoothing}", "sacrebleu", "output", ours, theirs, 1e-9)


@pytest.mark.parametrize(("name", "word_order"), [("chrF", 0), ("chrF++", 2)])
def test_chrf_is_sacrebleus(name: str, word_order: int, parity) -> None:
    library, both = CHRF(word_order=word_order), [list(pair) for pair in zip(REFERENCES, OTHERS, strict=True)]
    ours = [chrf(PREDICTIONS, REFERENCES, word_order), chrf(PREDICTIONS, both, word_order)]
    theirs = [library.corpus_score(PREDICTIONS, refs).score for refs in ([REFERENCES], [REFERENCES, OTHERS])]
    for made, rights in zip(PREDICTIONS, both, strict=True):
        ours.append(chrf([made], [rights], word_order))
        theirs.append(library.sentence_score(made, rights).score)
    parity(name, "sacrebleu", "output", ours, theirs, 1e-9)
    assert chrf_words("(hi) (a b) .") == library._remove_punctuation("(hi) (a b) .")


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_rouge_scores(stem: bool, parity) -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    library = rouge_scorer.RougeScorer(kinds, use_stemmer=stem)
    rng = random.Random(4)
    lines = [[text.replace(" ", "\n", 1 + rng.randrange(3)) for text in side] for side in (PREDICTIONS, REFERENCES)]
    ours, theirs = [], []
    for made, right in [*zip(PREDICTIONS, REFERENCES, strict=True), *zip(*lines, strict=True)]:
        found, known = rouge(made, right, stem), library.score(right, made)
        ours.append([(found[kind].precision, found[kind].recall, found[kind].f1) for kind in kinds])
        theirs.append([tuple(map(float, known[kind])) for kind in kinds])
    parity(f"ROUGE{', stemmed' * stem}", "rouge-score", "output", ours, theirs, 1e-9)
    assert sum(row[2] != row[3] for row in ours) > 10  # the summaries' L differs from the sequences'


def test_stemming_joins_forms_of_a_word_and_leaves_short_ones() -> None:
    assert rouge_tokens("Dogs ran, flies!", stem=True) == ["dog", "ran", "fli"] and rouge_tokens("Dogs") == ["dogs"]


def test_worked_example_of_bleu() -> None:
    """6 of 6 words, 3 of 5 pairs, 1 of 4 triples, no four: exp smoothing halves the missing one; no penalty."""
    made, right = "the cat sat on a mat", "a cat sat on the mat"
    assert bleu([made], [right]) == pytest.approx(100 * (6 / 6 * 2 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not(parity) -> None:
    n, p = 7, 0.3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    ours = [sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances)) for k in range(1, n + 1)]
    parity(
        "pass@k", "1 - (1 - p)^k, all outcomes enumerated", "invariant", ours, [1 - 0.7**k for k in range(1, 8)], 1e-12
    )
    [(_, sound, broken)] = METRIC_BREAKS["plug-in-pass-at-k"][0](RunConfig())
    assert sound == pytest.approx(1 - 0.9**10) and broken < sound - 0.05


def test_pass_at_k_is_the_product_that_the_paper_computes(parity) -> None:
    rng = random.Random(0)
    cases = [(n, rng.randint(0, n), rng.randint(1, n)) for n in (rng.randint(1, 200) for _ in range(200))]
    product = [1.0 if n - c < k else 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1))) for n, c, k in cases]
    parity("pass@k", "product formula of Chen et al.", "output", [pass_at_k(*case) for case in cases], product, 1e-10)
    assert mean_pass_at_k([[True, False], [False, False]], 1) == 0.25


def test_windows_are_lm_evals(parity) -> None:
    ours, theirs = [], []
    for n, window, context in [(1, 4, 1), (4, 4, 1), (5, 4, 1), (11, 4, 2), (13, 5, 5), (23, 7, 3), (30, 8, 1)]:
        ids = list(range(100, 100 + n))
        for inputs, targets in get_rolling_token_windows(ids, -1, window, context):
            theirs.append((inputs, targets))
        whole = [-1, *ids]
        for start, first, end in windows(n, window, window - context + 1):
            ours.append((whole[start:end], whole[first + 1 : end + 1]))
    parity("windows", "lm_eval.utils.get_rolling_token_windows", "output", ours, theirs, 0)


SIZES = {"d_model": 24, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_head": 8, "d_ff": 40}


def small_model(vocab_size: int = 50) -> CausalLM:
    seed_everything(0)
    model = CausalLM(ModelConfig(vocab_size=vocab_size, max_seq_len=64, **SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def test_every_stride_scores_every_token_once_and_context_changes_the_score() -> None:
    model, ids = small_model().double(), [1, *(torch.arange(41) * 7 % 50).tolist()]
    whole = token_nats(model, ids, 41)
    for stride in (1, 3, 10):
        found = token_nats(model, ids, 10, stride)
        assert len(found) == 41 and found[:10] == pytest.approx(whole[:10])
        assert found[10:] != pytest.approx(whole[10:])
    logits = model(torch.tensor([ids[25:35]]))[0, -1]  # stride 1: the token at 35 sees the ten before it
    assert token_nats(model, ids, 10, 1)[34] == pytest.approx(-logits.log_softmax(-1)[ids[35]].item())


def test_an_untrained_model_has_about_the_perplexity_of_the_vocabulary() -> None:
    tokenizer = load_course_tokenizer()
    model, rows = untrained(0)
    score = score_texts(model, rows, [tokenizer.decode(row[1:-1]) for row in rows], window=256)
    assert score.perplexity == pytest.approx(model.config.vocab_size, rel=0.05)
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.n_bytes)
    assert perplexity_by_batches(model, rows, 8, broken=False) == pytest.approx(score.perplexity, rel=1e-5)
    assert perplexity_by_batches(model, rows, 8, broken=True) < 1.5


def test_scores_add_up_and_bits_per_byte_by_hand() -> None:
    one, two = TextScore(10.0, 4, 16), TextScore(2.0, 1, 2)
    assert one + two == TextScore(12.0, 5, 18)
    assert TextScore(8 * math.log(2), 3, 4).bits_per_byte == pytest.approx(2.0)
    score = score_texts(small_model(), [[1, 2, 3], [1]], ["ä b", ""], window=8)
    assert (score.n_tokens, score.n_bytes) == (2, 4)


@pytest.mark.parametrize("name", METRIC_BREAKS)
def test_each_failure_moves_its_number(name: str) -> None:
    for what, sound, broken in METRIC_BREAKS[name][0](RunConfig()):
        assert what.startswith(f"{name}: ") and abs(sound - broken) > 0.01 * abs(sound) + 0.01


@pytest.mark.parametrize(("smoothing", "value"), [("floor", 0.4), ("add-k", 2.5)])
def test_a_smoothing_takes_another_value(smoothing: str, value: float) -> None:
    library = BLEU(smooth_method=smoothing, smooth_value=value, effective_order=True)
    pairs = list(zip(PREDICTIONS[:40], REFERENCES[:40], strict=True))
    ours = [bleu_counts(one, [two]).score(smoothing, value, only_present=True) for one, two in pairs]
    theirs = [library.sentence_score(one, [two]).score for one, two in pairs]
    assert ours == pytest.approx(theirs, abs=1e-9) and len(set(theirs)) > 20


def test_windows_lie_side_by_side_unless_told_otherwise() -> None:
    model, ids = small_model().double(), [1, *range(3, 30)]
    assert token_nats(model, ids, 10) == pytest.approx(token_nats(model, ids, 10, 10), abs=1e-12)
    assert token_nats(model, ids, 10) != pytest.approx(token_nats(model, ids, 10, 1), abs=1e-3)


def test_one_text_is_one_reference_and_not_its_characters() -> None:
    assert exact_match("The cat.", "cat") and not exact_match("a", "a b") and token_f1("the cat", "cat") == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bleu(["a"] * 3, ["b"] * 4), "3 predictions but 4 references"),
        (lambda: chrf(["a"] * 3, ["b"] * 4), "3 predictions but 4 references"),
        (lambda: bleu([], []), "0 predictions"),
        (lambda: chrf(["a", "b"], ["a", []]), "prediction 1 has no reference"),
        (lambda: bleu("abc", "abc"), "lists of texts, got one str"),
        (lambda: bleu(["a", None], ["a", "b"]), "are texts, got None; an answer that is missing is ''"),
        (lambda: bleu(["a"], [None]), "prediction 0 has no reference"),
        (lambda: chrf(["a"], [["a", 5]]), "are texts, got 5"),
        (lambda: chrf(["a"], ["a"], -1), "word_order=-1 must be at least 0"),
        (lambda: exact_match("a", []), "prediction 0 has no reference"),
        (lambda: token_f1("a", []), "prediction 0 has no reference"),
        (lambda: token_f1(None, ["a"]), "are texts, got None"),
        (lambda: rouge(None, "a"), "are texts, got None"),
        (lambda: pass_at_k(5, 2, 2.5), "k=2.5 must be a whole number"),
        (lambda: bleu(["a"], ["b"], "laplace"), "unknown smoothing 'laplace'.*choose from none, exp, floor, add-k"),
        (lambda: pass_at_k(3, 1, 5), "k=5 must be between 1 and n_samples=3; draw more samples"),
        (lambda: pass_at_k(3, 4, 1), "n_right=4 must be between 0 and n_samples=3"),
        (lambda: mean_pass_at_k([], 1), "0 problems"),
        (lambda: list(windows(5, 4, 5)), "stride=5 must be between 1 and window=4"),
        (lambda: score_texts(small_model(), [[1, 2]], [], 8), "1 rows but 0 texts"),
        (lambda: score_texts(small_model(), [[1]], [""], 8), "no token to score"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
