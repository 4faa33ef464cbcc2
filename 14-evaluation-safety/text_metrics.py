"""Topic 14 - Text metrics: how near an answer is to what was asked for, and what a text costs a model.

    exact_match("The cat.", ["cat"]), token_f1("a black cat", ["the cat"])     # True, 0.667
    bleu(predictions, references), chrf(predictions, references), rouge(prediction, reference)["rougeL"].f1
    pass_at_k(n_samples=200, n_right=13, k=10)                                 # unbiased
    score_texts(model, rows, texts).bits_per_byte                              # with strides over long texts

Rajpurkar et al. 2016 (arXiv 1606.05250, exact match and F1); Papineni et al. 2002 (BLEU, ACL P02-1040); Chen and Cherry
2014 (smoothing, ACL W14-3346); Popovic 2015 and 2017 (chrF, ACL W15-3049; chrF++, W17-4770); Lin 2004 (ROUGE, ACL
W04-1013); Chen et al. 2021 (pass@k, arXiv 2107.03374). The tests hold them equal to sacrebleu and rouge-score.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequence_modeling import bits_per_byte, device_of
from sequence_modeling import perplexity as perplexity_of
from workbench import check_name

References = Sequence[str | Sequence[str]]  # for each prediction one right text, or several


def paired(predictions: Sequence[str], references: References) -> list[tuple[str, list[str]]]:
    """Predictions with their references, each a list. Raises ValueError for none, and for lengths that differ."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references are lists of texts, got one str; put it into a list")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} references; give each prediction one entry"
        )
    if not predictions:
        raise ValueError("0 predictions: a score needs at least 1")
    lists = [[right] if isinstance(right, str) else list(right) if right is not None else [] for right in references]
    found = list(zip(predictions, lists, strict=True))
    empty = next((place for place, (_, rights) in enumerate(found) if not rights), None)
    if empty is not None:
        raise ValueError(f"prediction {empty} has no reference; give it at least 1")
    check_texts(*predictions, *(right for rights in lists for right in rights))
    return found


def check_texts(*texts: str) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"predictions and references are texts, got {text!r}; an answer that is missing is ''")


# Answers of a few words


ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and extra white space (Rajpurkar et al. 2016, their script)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: str | Sequence[str]) -> bool:
    """Whether the normalised prediction is one of the normalised references; a str is one reference."""
    [(text, rights)] = paired([prediction], [references])
    return normalise_answer(text) in {normalise_answer(right) for right in rights}


def token_f1(prediction: str, references: str | Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words as bags, the best of the references; 0..1.

    Where one side has no word, 1 if both have none, else 0 (SQuAD 2.0, which has questions without an answer).
    """
    [(text, rights)] = paired([prediction], [references])
    return max(words_f1(normalise_answer(text).split(), normalise_answer(right).split()) for right in rights)


def words_f1(made: list[str], right: list[str]) -> float:
    if not made or not right:
        return float(made == right)
    n_shared = (Counter(made) & Counter(right)).total()
    return 2 * n_shared / (len(made) + len(right))


# BLEU: clipped n-gram precisions and a penalty for being short


LANGUAGE_FREE = (("<skipped>", ""), ("-\n", ""), ("\n", " "))
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))  # in this order: &amp;lt; becomes <
ALWAYS_APART = re.compile("([" + re.escape("".join(set(string.punctuation) - set("',-.")) + " ") + "])")
MARK_AFTER = re.compile(r"([^0-9])([.,])")  # a full stop or comma stands apart unless a digit is before it ...
MARK_BEFORE = re.compile(r"([.,])([^0-9])")  # ... and after it
DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")


def tokens_13a(text: str) -> list[str]:
    """The tokens of mteval-v13a, the tokenizer that reported BLEU scores mean (sacrebleu's "13a")."""
    text = text.rstrip()
    for old, new in LANGUAGE_FREE + (ENTITIES if "&" in text else ()):
        text = text.replace(old, new)
    text = ALWAYS_APART.sub(r" \1 ", f" {text} ")
    text = MARK_AFTER.sub(r"\1 \2 ", text)
    text = MARK_BEFORE.sub(r" \1 \2", text)
    return DASH_AFTER_DIGIT.sub(r"\1 \2 ", text).split()


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n tokens occurs; of a str: of n characters."""
    if isinstance(tokens, str):
        return Counter(tokens[start : start + n] for start in range(len(tokens) - n + 1))
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


SMOOTHINGS = {"none": 0.0, "exp": 0.0, "floor": 0.1, "add-k": 1.0}  # with the values that Chen and Cherry give


@dataclass(frozen=True)
class BleuCounts:
    """What BLEU needs to know of a corpus: counts add up over sentences, precisions do not."""

    matches: tuple[int, ...]  # n-grams of the prediction that a reference has, each at most as often as there
    totals: tuple[int, ...]  # n-grams of the prediction
    n_made: int  # tokens of the predictions
    n_right: int  # tokens of the references nearest in length

    def __add__(self, other: "BleuCounts") -> "BleuCounts":
        pairs = ((self.matches, other.matches), (self.totals, other.totals))
        counts = [tuple(a + b for a, b in zip(one, two, strict=True)) for one, two in pairs]
        return BleuCounts(*counts, self.n_made + other.n_made, self.n_right + other.n_right)

    def score(self, smoothing: str = "exp", value: float | None = None, only_present: bool = False) -> float:
        """The score, 0..100: brevity penalty times geometric mean of the precisions.

        only_present: leave out the orders that the predictions are too short for, as for single sentences.
        """
        check_name("smoothing", smoothing, SMOOTHINGS)
        value = SMOOTHINGS[smoothing] if value is None else value
        if not any(self.matches):
            return 0.0
        logs, halves = [], 1.0
        for order, (match, total) in enumerate(zip(self.matches, self.totals, strict=True)):
            extra = value if smoothing == "add-k" and order else 0.0
            match, total = match + extra, total + extra
            if not total:
                if only_present:
                    break
                return 0.0
            if not match and smoothing == "exp":
                halves *= 2
                match = 1 / halves
            elif not match and smoothing == "floor":
                match = value
            if not match:
                return 0.0
            logs.append(math.log(match / total))
        shortness = min(0.0, 1 - self.n_right / self.n_made)
        return 100 * math.exp(shortness + sum(logs) / len(logs))


def bleu_counts(prediction: str, references: Sequence[str], max_order: int = 4) -> BleuCounts:
    """The counts of one sentence. Of references equally near in length the shorter one counts."""
    made, rights = tokens_13a(prediction), [tokens_13a(right) for right in references]
    nearest = min((abs(len(right) - len(made)), len(right)) for right in rights)[1]
    matches, totals = [], []
    for n in range(1, max_order + 1):
        known: Counter = Counter()
        for right in rights:
            known |= ngrams(right, n)  # the largest count of any one reference
        found = ngrams(made, n)
        matches.append((found & known).total())
        totals.append(found.total())
    return BleuCounts(tuple(matches), tuple(totals), len(made), nearest)


def bleu(predictions: Sequence[str], references: References, smoothing: str = "exp") -> float:
    """BLEU of a corpus, 0..100 (Papineni et al. 2002; sacrebleu's signature tok:13a|smooth:exp by default)."""
    counts = [bleu_counts(text, rights) for text, rights in paired(predictions, references)]
    return sum(counts[1:], counts[0]).score(smoothing)


def sentence_bleu(prediction: str, references: str | Sequence[str], smoothing: str = "exp") -> float:
    """BLEU of one sentence, 0..100, over the orders that it has; a noisy number, not a part of the corpus's."""
    [(text, rights)] = paired([prediction], [references])
    return bleu_counts(text, rights).score(smoothing, only_present=True)


# chrF: n-grams of characters


def chrf_words(text: str) -> list[str]:
    """Words with one punctuation mark split off at the end, or else at the beginning (Popovic's script)."""
    found = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            found += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            found += [word[0], word[1:]]
        else:
            found.append(word)
    return found


def chrf_counts(prediction: str, reference: str, word_order: int) -> list[tuple[int, int, int]]:
    """(n-grams of the prediction, of the reference, of both) for 1 to 6 characters and 1 to word_order words."""
    sides = [
        [ngrams("".join(text.split()), n) for n in range(1, 7)]
        + [ngrams(chrf_words(text), n) for n in range(1, word_order + 1)]
        for text in (prediction, reference)
    ]
    return [
        (made.total() if right else 0, right.total(), (made & right).total())
        for made, right in zip(*sides, strict=True)
    ]


def chrf_score(counts: Iterable[tuple[int, int, int]], beta: float = 2.0) -> float:
    """F_beta of the mean precision and mean recall over the orders that both sides have, 0..100."""
    present = [(both / made, both / right) for made, right, both in counts if made and right]
    if not present:
        return 0.0
    precision, recall = (sum(column) / len(present) for column in zip(*present, strict=True))
    if not precision + recall:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def chrf(predictions: Sequence[str], references: References, word_order: int = 0) -> float:
    """chrF of a corpus, 0..100 (Popovic 2015, chrF2); word_order=2 is chrF++. Counts add up, as for BLEU."""
    if word_order < 0:
        raise ValueError(f"word_order={word_order} must be at least 0; 0 is chrF, 2 is chrF++")
    total = [(0, 0, 0)] * (6 + word_order)
    for text, rights in paired(predictions, references):
        best = max((chrf_counts(text, right, word_order) for right in rights), key=chrf_score)
        total = [tuple(a + b for a, b in zip(one, two, strict=True)) for one, two in zip(total, best, strict=True)]
    return chrf_score(total)


# ROUGE: what of the reference is found again


@dataclass(frozen=True)
class Overlap:
    """Precision and recall, each 0..1."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def overlap(n_shared: int, n_made: int, n_right: int) -> Overlap:
    return Overlap(n_shared / max(n_made, 1), n_shared / max(n_right, 1))


@cache
def porter_stemmer() -> Callable[[str], str]:
    """The Porter stemmer of NLTK. Raises ValueError with the pip command where NLTK is missing."""
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise ValueError("stemming needs NLTK: pip install nltk; or leave stem=False") from None
    return PorterStemmer().stem


def rouge_tokens(text: str, stem: bool = False) -> list[str]:
    """Runs of a-z and 0-9 in lower case, which is all of a text that ROUGE sees; stem: words of 4 letters and more."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    if not stem:
        return found
    return [porter_stemmer()(token) if len(token) > 3 else token for token in found]


def common_lengths(right: list[str], made: list[str]) -> list[list[int]]:
    """lengths[i][j]: of the longest common subsequence of the first i and the first j tokens."""
    lengths = [[0] * (len(made) + 1)]
    for token in right:
        above, row = lengths[-1], [0]
        for place, other in enumerate(made):
            row.append(above[place] + 1 if token == other else max(above[place + 1], row[place]))
        lengths.append(row)
    return lengths


def common_places(right: list[str], made: list[str]) -> set[int]:
    """Where in `right` a longest common subsequence lies; of several the one that Lin's script finds."""
    lengths, i, j, places = common_lengths(right, made), len(right), len(made), set()
    while i and j:
        if right[i - 1] == made[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def rouge(prediction: str, reference: str, stem: bool = False) -> dict[str, Overlap]:
    """ROUGE-1, -2, -L and -Lsum of one pair (Lin 2004): keys rouge1, rouge2, rougeL, rougeLsum.

    Lsum takes the lines of a text for its sentences: each sentence of the reference counts the tokens that a longest
    common subsequence with any sentence of the prediction covers, no token more often than both texts have it.
    """
    check_texts(prediction, reference)
    made, right = rouge_tokens(prediction, stem), rouge_tokens(reference, stem)
    found = {}
    for n in (1, 2):
        one, two = ngrams(made, n), ngrams(right, n)
        found[f"rouge{n}"] = overlap((one & two).total(), one.total(), two.total())
    found["rougeL"] = overlap(common_lengths(right, made)[-1][-1], len(made), len(right))
    sentences = [[rouge_tokens(line, stem) for line in text.split("\n") if line] for text in (prediction, reference)]
    left, n_hits = Counter(made) & Counter(right), 0
    for sentence in sentences[1]:
        covered = set().union(*(common_places(sentence, other) for other in sentences[0]))
        for place in sorted(covered):
            if left[sentence[place]]:
                left[sentence[place]] -= 1
                n_hits += 1
    found["rougeLsum"] = overlap(n_hits, len(made), len(right))
    return found


# Programs that pass


def pass_at_k(n_samples: int, n_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which c are (Chen et al. 2021, eq. 1).

    Of the C(n, k) ways to take k of the n samples, C(n - c, k) hold no right one. Each way is a draw of k fresh
    samples, so the share of the others is an average of unbiased estimates. 1 - (1 - c/n)^k is biased: it is concave in
    c, so it is too small on average (Jensen) wherever k > 1. Raises ValueError for k > n and for c outside 0..n.
    """
    for name, count in (("n_samples", n_samples), ("n_right", n_right), ("k", k)):
        if not isinstance(count, Integral):
            raise ValueError(f"{name}={count!r} must be a whole number")
    if not 0 <= n_right <= n_samples:
        raise ValueError(f"n_right={n_right} must be between 0 and n_samples={n_samples}")
    if not 1 <= k <= n_samples:
        raise ValueError(f"k={k} must be between 1 and n_samples={n_samples}; draw more samples or lower k")
    return 1 - math.comb(n_samples - n_right, k) / math.comb(n_samples, k)


def mean_pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """pass@k over problems, each with the outcomes of its samples."""
    if not outcomes:
        raise ValueError("0 problems: pass@k needs at least 1")
    return sum(pass_at_k(len(samples), sum(map(bool, samples)), k) for samples in outcomes) / len(outcomes)


# What a text costs a language model


def windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How a long text is read: (first position read, first one scored, end), a token's position counted from 0.

    Position p is predicted from the ids start - 1 to p - 1, where id -1 is the one that begins every text. Each window
    holds at most `window` positions and scores the last `stride` of them that are new; the first scores all of its own,
    and the last reads as much before its end as fits, as lm-evaluation-harness does. stride=window reads each token
    once and gives the first of each window no context but one id; stride=1 gives all the most and costs `window` times
    as much. Raises ValueError unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}")
    scored = 0
    while scored < n_tokens:
        end = min(n_tokens, scored + stride) if scored else min(n_tokens, window)
        yield max(0, end - window), scored, end
        scored = end


def logits_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Logits (batch, seq, vocab) of one of our models, or of one of transformers, whose outputs have a field."""
    made = model(token_ids)
    return made if isinstance(made, Tensor) else made.logits


@torch.no_grad()
def token_nats(model: nn.Module, ids: Sequence[int], window: int, stride: int | None = None) -> list[float]:
    """Nats of each id after the first, which is given (bos, or any context), read in windows; stride None: window."""
    found: list[float] = []
    sequence = torch.tensor(ids, device=device_of(model))
    for start, first, end in windows(len(ids) - 1, window, stride or window):
        logits = logits_of(model, sequence[None, start:end])[0].double()  # (seq, vocab)
        nats = F.cross_entropy(logits, sequence[start + 1 : end + 1], reduction="none")  # (seq)
        found += nats[first - start :].tolist()
    return found


@dataclass(frozen=True)
class TextScore:
    """What texts cost, and over what it is divided; sums, so that scores of two corpora add up."""

    nats: float
    n_tokens: int
    n_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token): depends on how the text is cut, so it compares models of one tokenizer only."""
        return perplexity_of(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return bits_per_byte(self.nats, self.n_bytes)

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(self.nats + other.nats, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes)


def score_texts(
    model: nn.Module, rows: Sequence[Sequence[int]], texts: Sequence[str], window: int, stride: int | None = None
) -> TextScore:
    """The score of texts, each given with its ids: the first begins the text and is not scored, all others are.

    A mean over all tokens of all texts, not a mean of means: short texts must not weigh as much as long ones.
    """
    if len(rows) != len(texts):
        raise ValueError(f"{len(rows)} rows but {len(texts)} texts; give each text its ids")
    if not any(len(row) > 1 for row in rows):
        raise ValueError("no token to score: every row needs an id that begins it and at least one more")
    nats = sum(math.fsum(token_nats(model, row, window, stride)) for row in rows if len(row) > 1)
    return TextScore(nats, sum(max(0, len(row) - 1) for row in rows), sum(len(text.encode()) for text in texts))
