"""Topic 06 - Word vectors: skip-gram with negative sampling, GloVe and PMI with SVD, judged where the truth is known.

python 06-tokenization-embeddings/word_vectors.py                          # three methods on TinyWorld, scored
python 06-tokenization-embeddings/word_vectors.py neighbours Anna garden   # the nearest words of your own words

TinyWorld's words belong to classes (towns, jobs, foods, ...) and stand in known relations (baker is to bakers as nurse
to nurses), so neighbours and analogies are counted, not shown as anecdotes. Mikolov et al. 2013 (arXiv 1310.4546:
skip-gram, negative sampling, subsampling), Pennington et al. 2014 (GloVe), Levy and Goldberg 2014 (what skip-gram
factorises), Linzen 2016 (arXiv 1606.07736: what an analogy test measures without its offset).
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from prerequisites import pca
from tiny_world import FEMALE, MALE, SURNAMES, VERBS, WORD_CLASSES, World
from workbench import RunConfig, announce, check_range, progress, run_verbs, seed_everything

CLASSES = {**WORD_CLASSES, "women": FEMALE, "men": MALE, "surnames": SURNAMES}
METHODS = ("sgns", "glove", "pmi")
RELATIONS: dict[str, list[tuple[str, str]]] = {  # what the grammar fixes about two words: pairs of the same relation
    "pronoun of a name": [*((name, "she") for name in FEMALE), *((name, "he") for name in MALE)],
    "opposite direction": [("above", "below"), ("below", "above"), ("left", "right"), ("right", "left")],
    "verb in a question": [("lives", "live"), ("works", "work"), ("owns", "own"), ("likes", "like")],
    "verb with a plural": list(zip(VERBS["one"], VERBS["many"], strict=True)),
    "plural of a job": [(job, job + "s") for job in WORD_CLASSES["jobs"]],
    "plural of a good": [(good[:-1], good) for good in WORD_CLASSES["goods"]],
    "next number": [(str(number), str(number + 1)) for number in range(40)],
}


@dataclass(frozen=True)
class VectorConfig:
    n_documents: int = 4000  # TinyWorld documents that are counted
    window_size: int = 4  # words to each side that count as neighbours
    d_model: int = 32  # width of a vector
    n_negatives: int = 5  # random words beside each true neighbour
    max_steps: int = 2000  # training steps of skip-gram
    batch_size: int = 512  # pairs of words in a step
    learning_rate: float = 0.02  # Adam's

    def __post_init__(self) -> None:
        check_range(self, "n_documents", "window_size", "d_model", "n_negatives", "max_steps", "batch_size", least=1)
        check_range(self, "learning_rate", above=0)


@dataclass(frozen=True)
class NeighboursConfig:
    words: tuple[str, ...] = ()  # words whose nearest words are shown

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError("give at least one word, such as: neighbours Anna garden")


# Counting


def subsample(documents: Iterable[list[str]], threshold: float, generator: random.Random) -> list[list[str]]:
    """Drop each word with probability 1 - sqrt(threshold / its share of all words), if that is positive.

    Mikolov et al. 2013, equation 5. What is left moves together, so a window reaches further.
    """
    documents = list(documents)
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}; a value of 1 keeps every word")
    frequency = Counter(word for document in documents for word in document)
    total = sum(frequency.values())
    kept = {word: math.sqrt(threshold * total / count) for word, count in frequency.items()}
    return [[word for word in document if generator.random() < kept[word]] for document in documents]


def cooccurrences(documents: Iterable[list[str]], window_size: int) -> tuple[Tensor, list[str]]:
    """How often each word stands within `window_size` words of each other one; and the words, the commonest first.

    Shapes:
        counts: (vocab, vocab), symmetric, float64
    """
    documents = list(documents)
    if any(isinstance(document, str) for document in documents):
        raise ValueError("a document is a list of words, got one str, whose characters would be counted; split it")
    documents = [list(document) for document in documents]
    frequency: dict[str, int] = {}
    for document in documents:
        for word in document:
            frequency[word] = frequency.get(word, 0) + 1
    if not frequency:
        raise ValueError("no words to count; give at least one document")
    vocab = sorted(frequency, key=lambda word: (-frequency[word], word))
    ids = {word: index for index, word in enumerate(vocab)}
    counts = torch.zeros(len(vocab), len(vocab), dtype=torch.float64)  # (vocab, vocab)
    for document in documents:
        row = torch.tensor([ids[word] for word in document])
        for distance in range(1, min(window_size, len(row) - 1) + 1):
            one = torch.ones(len(row) - distance, dtype=torch.float64)
            counts.index_put_((row[:-distance], row[distance:]), one, accumulate=True)
    return counts + counts.T, vocab


def noise_shares(counts: Tensor, power: float) -> Tensor:
    """How often each word is drawn as a negative: its frequency to a power, normalised (Mikolov et al. 2013: 3/4).

    Shapes:
        counts: (vocab, vocab) -> (vocab)
    """
    if not counts.any():
        raise ValueError("no two words met; give longer documents or a wider window")
    weights = counts.sum(0) ** power  # (vocab)
    return weights / weights.sum()


def shifted_pmi(counts: Tensor, n_negatives: int = 1, power: float = 1.0) -> Tensor:
    """ln p(word, context) / (p(word) q(context)) - ln k in nats; -inf for pairs that never met (Levy and Goldberg).

    q is the noise: the frequency of the context to `power`, normalised. With power 1 it is p(context) and the result
    is the pointwise mutual information, shifted.

    Shapes:
        counts: (vocab, vocab) -> the same
    """
    if n_negatives < 1:
        raise ValueError(f"n_negatives must be at least 1, got {n_negatives}")
    expected = counts.sum(1, keepdim=True) * noise_shares(counts, power)  # (vocab, vocab)
    ratio = torch.where(counts > 0, counts / expected, 0.0)  # (vocab, vocab); 0 / 0 for words that met nobody
    return ratio.log() - math.log(n_negatives)


# Three ways to vectors


def pmi_vectors(counts: Tensor, d_model: int) -> Tensor:
    """The leading singular vectors of the positive PMI, each scaled by the root of its singular value.

    Shapes:
        counts: (vocab, vocab) -> (vocab, d_model)
    """
    if not 1 <= d_model <= len(counts):
        raise ValueError(f"d_model must be in 1..{len(counts)}, the number of words, got {d_model}")
    positive = shifted_pmi(counts).clamp(min=0)
    left, values, _ = torch.linalg.svd(positive)
    return left[:, :d_model] * values[:d_model].sqrt()


def sgns_loss(word: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """Negative sampling (Mikolov et al. 2013, equation 4), mean over pairs, in nats.

    Shapes:
        word, context: (batch, d_model)
        negatives: (batch, negatives, d_model)
    """
    true = (word * context).sum(-1)  # (batch)
    false = torch.einsum("bd,bnd->bn", word, negatives)  # (batch, negatives)
    return -(F.logsigmoid(true) + F.logsigmoid(-false).sum(-1)).mean()


def sgns_gradients(word: Tensor, context: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `sgns_loss` by hand: each is a prediction error times the other vector.

    Shapes:
        as in `sgns_loss`; a gradient has the shape of its input
    """
    n_pairs = len(word)
    error = torch.sigmoid((word * context).sum(-1, keepdim=True)) - 1  # (batch, 1): the truth is 1
    errors = torch.sigmoid(torch.einsum("bd,bnd->bn", word, negatives))[..., None]  # (batch, negatives, 1): it is 0
    by_word = error * context + (errors * negatives).sum(1)  # (batch, d_model)
    return by_word / n_pairs, error * word / n_pairs, errors * word[:, None] / n_pairs


def expected_sgns_loss(words: Tensor, contexts: Tensor, counts: Tensor, n_negatives: int, power: float = 1.0) -> Tensor:
    """The mean of `sgns_loss` over all pairs and all negatives that could be drawn, in nats: nothing is sampled.

    Shapes:
        words, contexts: (vocab, d_model); counts: (vocab, vocab)
    """
    scores = words @ contexts.T  # (vocab, vocab)
    share = (counts / counts.sum()).to(scores.dtype)  # (vocab, vocab)
    false = share.sum(1, keepdim=True) * noise_shares(counts, power).to(scores.dtype)  # (vocab, vocab)
    return -(share * F.logsigmoid(scores) + n_negatives * false * F.logsigmoid(-scores)).sum()


class SkipGram(NamedTuple):
    """What skip-gram learns. The scores are words @ contexts.T; the word vectors are the ones that are used."""

    words: Tensor  # (vocab, d_model)
    contexts: Tensor  # (vocab, d_model)
    losses: list[float]  # nats per pair, of every step


def random_vectors(vocab_size: int, d_model: int, generator: torch.Generator) -> list[Tensor]:
    """Words and contexts as normal numbers of variance 1 / d_model: scores start about as large as 1 / sqrt(d_model).

    Shapes:
        each (vocab, d_model)
    """
    scale = 1 / math.sqrt(d_model)
    return [(torch.randn(vocab_size, d_model, generator=generator) * scale).requires_grad_() for _ in range(2)]


def minimise_expected_loss(
    counts: Tensor, n_negatives: int, power: float, config: VectorConfig, generator: torch.Generator
) -> SkipGram:
    """Skip-gram without sampling: Adam on `expected_sgns_loss`, at a falling rate. For small vocabularies.

    Shapes:
        counts: (vocab, vocab)
    """
    words, contexts = random_vectors(len(counts), config.d_model, generator)
    optimizer = torch.optim.Adam([words, contexts], lr=config.learning_rate)
    losses = []
    for step in progress(range(config.max_steps), "skip-gram, expected loss"):
        loss = expected_sgns_loss(words, contexts, counts, n_negatives, power)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.max_steps)
        optimizer.step()
        losses.append(loss.item())
    return SkipGram(words.detach(), contexts.detach(), losses)


def sgns_vectors(counts: Tensor, config: VectorConfig, generator: torch.Generator) -> SkipGram:
    """Skip-gram with negative sampling: pairs drawn as often as they occur, negatives by frequency to the 3/4.

    Shapes:
        counts: (vocab, vocab)
    """
    vocab_size = len(counts)
    words, contexts = random_vectors(vocab_size, config.d_model, generator)
    optimizer = torch.optim.Adam([words, contexts], lr=config.learning_rate)
    pair_weights, noise = counts.flatten().cumsum(0), noise_shares(counts, 0.75)
    losses = []
    for _ in progress(range(config.max_steps), "skip-gram"):
        draws = torch.rand(config.batch_size, generator=generator, dtype=torch.float64) * pair_weights[-1]
        pairs = torch.searchsorted(pair_weights, draws)  # (batch)
        n_drawn = config.batch_size * config.n_negatives
        drawn = torch.multinomial(noise, n_drawn, replacement=True, generator=generator)
        negatives = drawn.view(config.batch_size, config.n_negatives)
        loss = sgns_loss(words[pairs // vocab_size], contexts[pairs % vocab_size], contexts[negatives])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return SkipGram(words.detach(), contexts.detach(), losses)


def glove_loss(
    words: Tensor, contexts: Tensor, word_bias: Tensor, context_bias: Tensor, counts: Tensor, most: float = 100.0
) -> Tensor:
    """Weighted squares of w.c + b + b' - ln count over pairs that met (Pennington et al. 2014, equation 8), mean.

    Shapes:
        words, contexts: (vocab, d_model); word_bias, context_bias: (vocab); counts: (vocab, vocab)
    """
    weights = (counts / most).clamp(max=1) ** 0.75  # (vocab, vocab)
    fitted = words @ contexts.T + word_bias[:, None] + context_bias  # (vocab, vocab)
    met = counts > 0
    return (weights[met] * (fitted[met] - counts[met].log()) ** 2).mean()


def glove_vectors(counts: Tensor, config: VectorConfig, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """GloVe by Adam on all pairs at once: the vocabulary is small. The vectors are the sums of word and context.

    Shapes:
        counts: (vocab, vocab) -> vectors (vocab, d_model), and the loss of each step
    """
    counts = counts.float()
    words, contexts = random_vectors(len(counts), config.d_model, generator)
    biases = [torch.zeros(len(counts), requires_grad=True) for _ in range(2)]
    parameters = [words, contexts, *biases]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    losses = []
    for _ in progress(range(max(1, config.max_steps // 5)), "GloVe"):
        loss = glove_loss(*parameters, counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return (words + contexts).detach(), losses


# Judging


def nearest(vectors: Tensor) -> Tensor:
    """Cosine similarity of every pair of rows, -inf on the diagonal.

    Shapes:
        vectors: (vocab, d_model) -> (vocab, vocab)
    """
    units = F.normalize(vectors.float(), dim=-1)
    return (units @ units.T).fill_diagonal_(-math.inf)


def class_precision(vectors: Tensor, vocab: list[str], n_nearest: int = 5) -> dict[str, float]:
    """For each class of words: the share of its members' nearest words that are of the class (fraction 0..1).

    Neighbours are looked for among all words. A class with a single known member is left out.
    """
    closest = nearest(vectors).topk(min(n_nearest, len(vocab) - 1)).indices  # (vocab, nearest)
    ids = {word: index for index, word in enumerate(vocab)}
    precision = {}
    for name, members in CLASSES.items():
        known = [ids[word] for word in members if word in ids]
        if len(known) > 1:
            wanted = torch.tensor(known)
            reachable = min(closest.shape[1], len(known) - 1)  # a class of four has three others to find
            hits = torch.isin(closest[wanted, :reachable], wanted).double()
            precision[name] = hits.mean().item()
    return precision


def chance_precision(vocab: list[str]) -> float:
    """The mean of `class_precision` for vectors that say nothing: the share of the class among the other words."""
    known = [sum(word in vocab for word in members) for members in CLASSES.values()]
    shares = [(n_known - 1) / (len(vocab) - 1) for n_known in known if n_known > 1]
    return sum(shares) / len(shares)


class AnalogyScore(NamedTuple):
    """Shares of the questions a : b = c : ? (fraction 0..1) that are answered with exactly the right word."""

    n_questions: int
    offset: float  # the nearest word to b - a + c, a, b and c left out (3CosAdd, Mikolov et al. 2013)
    alone: float  # the nearest word to b or to c, whichever is right more often: no analogy is drawn
    right_kind: float  # 3CosAdd answers with any second word of the relation
    chance: float  # a random word


def score_analogies(vectors: Tensor, vocab: list[str], pairs: list[tuple[str, str]]) -> AnalogyScore:
    """Ask for every two pairs (a, b) and (c, d) of one relation, all four words different: a : b = c : ?

    Raises ValueError if fewer than two of the pairs are in the vocabulary.

    Shapes:
        vectors: (vocab, d_model)
    """
    ids = {word: index for index, word in enumerate(vocab)}
    known = [(ids[first], ids[second]) for first, second in pairs if first in ids and second in ids]
    asked = [(*one, *two) for one, two in itertools.permutations(known, 2) if len({*one, *two}) == 4]
    if not asked:
        raise ValueError(f"an analogy needs two pairs of known words, got {len(known)} of {len(pairs)}")
    a, b, c, d = torch.tensor(asked).T  # (questions)
    units = F.normalize(vectors.float(), dim=-1)

    def answers(wanted: Tensor) -> Tensor:
        scores = F.normalize(wanted, dim=-1) @ units.T  # (questions, vocab)
        return scores.scatter(1, torch.stack([a, b, c], dim=1), -math.inf).argmax(dim=1)

    offset = answers(units[b] - units[a] + units[c])  # (questions)
    alone = max((answers(units[word]) == d).double().mean().item() for word in (b, c))
    kind = torch.isin(offset, torch.tensor([second for _, second in known])).double().mean().item()
    return AnalogyScore(len(asked), (offset == d).double().mean().item(), alone, kind, 1 / (len(vocab) - 3))


def fact_precision(vectors: Tensor, vocab: list[str], world: World, attribute: str = "town") -> float:
    """Share of the known people for whom the value nearest to name + surname is the true one (fraction 0..1).

    Only the values of the class compete, so chance is 1 in the number of them.
    """
    word_class = {"town": "towns", "job": "jobs", "pet": "pets", "food": "foods"}[attribute]
    ids = {word: index for index, word in enumerate(vocab)}
    values = [word for word in WORD_CLASSES[word_class] if word in ids]
    units = F.normalize(vectors.float(), dim=-1)
    people = [person for person in world.known if all(part in ids for part in person.split())]
    parts = torch.tensor([[ids[part] for part in person.split()] for person in people])  # (people, 2)
    guesses = (units[parts].sum(1) @ units[[ids[value] for value in values]].T).argmax(1).tolist()
    right = [values[guess] == world.facts[person][attribute] for guess, person in zip(guesses, people, strict=True)]
    return sum(right) / len(right)


def plot_vectors(vectors: Tensor, vocab: list[str], classes: tuple[str, ...]) -> Figure:
    """The words of some classes in the plane of the two leading principal components of all vectors.

    Shapes:
        vectors: (vocab, d_model)
    """
    points, _, variances = pca(vectors.double().numpy(), 2)
    share = variances.sum() / np.var(vectors.double().numpy(), axis=0, ddof=1).sum()
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for index, name in enumerate(classes):
        rows = [vocab.index(word) for word in CLASSES[name] if word in vocab]
        axis.scatter(*points[rows].T, color=f"C{index}", marker="os^Dvp*X"[index % 8], s=28, label=name)
    axis.set(xlabel="first principal component", ylabel="second principal component")
    axis.set_title(f"{share:.0%} of the variance of {vectors.shape[1]} dimensions", fontsize=10)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# The verbs


def counted_world(config: VectorConfig, run: RunConfig) -> tuple[Tensor, list[str]]:
    seed_everything(run.seed)
    documents = World().documents(config.n_documents, run.seed, "train")
    return cooccurrences((document.tokens for document in documents), config.window_size)


def all_vectors(config: VectorConfig, run: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The vectors of the three methods and the vocabulary."""
    counts, vocab = counted_world(config, run)
    generator = torch.Generator().manual_seed(run.seed)
    sgns = sgns_vectors(counts, config, generator).words
    glove, _ = glove_vectors(counts, config, generator)
    return {"sgns": sgns, "glove": glove, "pmi": pmi_vectors(counts, config.d_model)}, vocab


def demo(config: VectorConfig, run: RunConfig) -> None:
    """Train the three kinds of vectors on TinyWorld and count how many nearest words are of the same class."""
    announce(f"count {config.n_documents} documents, then three kinds of vectors", 15)
    vectors, vocab = all_vectors(config, run)
    scores = {method: class_precision(table, vocab) for method, table in vectors.items()}
    print(f"{'class':10}" + "".join(f"{method:>8}" for method in METHODS))
    for name in scores["sgns"]:
        print(f"{name:10}" + "".join(f"{scores[method][name]:8.2f}" for method in METHODS))
    means = {method: sum(score.values()) / len(score) for method, score in scores.items()}
    print(f"{'mean':10}" + "".join(f"{means[method]:8.2f}" for method in METHODS))
    print(f"chance {chance_precision(vocab):.2f}; seed {run.seed}, {len(vocab)} words, 1 is perfect")
    print("\na : b = c : ?        by the offset; (by b or c alone); [right kind of word]")
    for name, pairs in RELATIONS.items():
        found = [score_analogies(vectors[method], vocab, pairs) for method in METHODS]
        cells = "".join(f" {score.offset:5.2f} ({score.alone:.2f}) [{score.right_kind:.2f}]" for score in found)
        print(f"{name:20}{cells}")


def neighbours(chosen: NeighboursConfig, config: VectorConfig, run: RunConfig) -> None:
    """Show the five nearest words of each given word, by each method."""
    announce("train three kinds of vectors", 15)
    vectors, vocab = all_vectors(config, run)
    for word in chosen.words:
        if word not in vocab:
            raise ValueError(f"{word!r} is not among the {len(vocab)} words of TinyWorld; try {vocab[40]!r}")
        for method, table in vectors.items():
            closest = nearest(table)[vocab.index(word)].topk(5).indices.tolist()
            print(f"{word} ({method}): {', '.join(vocab[index] for index in closest)}")


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "demo": (demo, VectorConfig, RunConfig),
        "neighbours": (neighbours, NeighboursConfig, VectorConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
