"""Topic 14 - Metric failures: scores that come out of a sound program and mean nothing, each beside the right number.

python 14-evaluation-safety/evaluation_safety.py figures metric-breaks      # all, the chapter's table

Every entry of METRIC_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from course_tokenizer import load_course_tokenizer
from modern_llm_architectures import CausalLM, ModelConfig
from text_metrics import bleu, normalise_answer, pass_at_k, sentence_bleu, token_f1
from tiny_world import World
from workbench import Column, RunConfig, seed_everything

Row = tuple[str, float, float]


def untrained(seed: int) -> tuple[CausalLM, list[list[int]]]:
    """A small model with its first weights, and held-out documents as ids."""
    seed_everything(seed)
    tokenizer = load_course_tokenizer()
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 16, "d_ff": 64}
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer.vocab), max_seq_len=256, **sizes)).eval()
    documents = World().documents(24, 2, "validation")
    return model, [tokenizer.encode_document(document).ids for document in documents]


def perplexity_by_batches(model, rows: Sequence[list[int]], batch_size: int, broken: bool) -> float:
    """Perplexity from the mean losses of batches.

    broken: every batch's mean loss, which is over its tokens, is multiplied by its rows, and the sum is divided by the
    number of tokens. The result is exp(loss x rows / tokens), near 1 for any model.
    """
    total, n_tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        losses = [row_loss(model, row) for row in batch]
        count = sum(len(row) - 1 for row in batch)
        mean = sum(loss * (len(row) - 1) for loss, row in zip(losses, batch, strict=True)) / count
        total += mean * (len(batch) if broken else count)
        n_tokens += count
    return math.exp(total / n_tokens)


@torch.no_grad()
def row_loss(model, row: list[int]) -> float:
    ids: Tensor = torch.tensor(row)
    return F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).item()


def wrong_count(run: RunConfig) -> list[Row]:
    """An untrained model guesses among all tokens; multiplied by rows and divided by tokens it looks perfect."""
    model, rows = untrained(run.seed)
    sound, broken = (perplexity_by_batches(model, rows, 8, wrong) for wrong in (False, True))
    size = model.config.vocab_size
    return [(f"wrong-count: perplexity of an untrained model of {size} tokens", sound, broken)]


def mean_of_means(run: RunConfig) -> list[Row]:
    """Perplexity as a mean over texts of each text's perplexity: one hard short text outweighs all others."""
    model, rows = untrained(run.seed)
    short = [rows[0][0], *range(100, 103)]
    losses = [(row_loss(model, row) * 0.1, len(row) - 1) for row in rows] + [(row_loss(model, short), 3)]
    sound = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    broken = sum(math.exp(loss) for loss, _ in losses) / len(losses)
    return [("mean-of-means: perplexity of 24 easy texts and 3 hard tokens", sound, broken)]


def sentence_mean(run: RunConfig) -> list[Row]:
    """The mean of sentences' BLEU is not the corpus's: a precision over few n-grams is mostly smoothing."""
    right = [document.text for document in World().documents(40, 3)]
    made = [text.replace(" the ", " a ") for text in right]
    average = sum(sentence_bleu(text, other) for text, other in zip(made, right, strict=True)) / len(made)
    return [("sentence-mean: BLEU of one set of 40 texts, of the corpus and as a mean", bleu(made, right), average)]


def no_normalisation(run: RunConfig) -> list[Row]:
    """Exact match on raw strings counts a capital letter or a full stop as a wrong answer."""
    asked = World().questions("asked", 100, run.seed)
    right = [answer[0] for _, answer in asked]
    made = [f"The {text.capitalize()}." for text in right]
    same = [normalise_answer(one) == normalise_answer(two) for one, two in zip(made, right, strict=True)]
    raw = [one == two for one, two in zip(made, right, strict=True)]
    return [("no-normalisation: exact match of right answers with a capital and a full stop", fmean(same), fmean(raw))]


def ignored_prediction(run: RunConfig) -> list[Row]:
    """A metric that ignores its input passes every test that only looks at right answers: ask it about a wrong one."""

    def constant(prediction: str, references: Sequence[str]) -> float:
        return 0.9

    return [("ignored-prediction: score of an answer that shares no word", token_f1("x", ["y"]), constant("x", ["y"]))]


def plug_in_pass_at_k(run: RunConfig) -> list[Row]:
    """1 - (1 - c/n)^k with n = 10 samples, k = 10, where one sample in 10 is right: too small on average."""
    n, k, p = 10, 10, 0.1
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    sound = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    broken = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    return [(f"plug-in-pass-at-k: expected estimate, truth {1 - (1 - p) ** k:.4f}", sound, broken)]


def break_table(breaks: dict[str, tuple], run: RunConfig) -> tuple[list[Column], list[list]]:
    """Columns and rows of a chapter's table of failures: the right value beside the broken one."""
    rows: list[list] = []
    for name, (show, _) in breaks.items():
        rows += [[f"`{name}`", what.partition(": ")[2], sound, broken] for what, sound, broken in show(run)]
    return [Column("`--break`"), Column("What is measured"), Column("sound"), Column("broken")], rows


METRIC_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "wrong-count": (wrong_count, 1),
    "mean-of-means": (mean_of_means, 1),
    "sentence-mean": (sentence_mean, 1),
    "no-normalisation": (no_normalisation, 1),
    "ignored-prediction": (ignored_prediction, 1),
    "plug-in-pass-at-k": (plug_in_pass_at_k, 1),
}
