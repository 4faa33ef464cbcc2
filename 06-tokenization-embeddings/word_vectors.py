"""Topic 06 - Word vectors: skip-gram with negative sampling, GloVe and PMI with SVD, judged where the truth is known.

python 06-tokenization-embeddings/word_vectors.py                          # three methods on TinyWorld, scored
python 06-tokenization-embeddings/word_vectors.py neighbours Anna garden   # the nearest words of your own words

TinyWorld's words belong to classes (towns, jobs, foods, ...), so "the nearest word is of the same class" is a fact to
count, not an anecdote. Mikolov et al. 2013 (skip-gram, negative sampling), Pennington et al. 2014 (GloVe), Levy and
Goldberg 2014 (what skip-gram factorises).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tiny_world import FEMALE, MALE, SURNAMES, WORD_CLASSES, World
from workbench import RunConfig, announce, check_range, progress, run_verbs, seed_everything

CLASSES = {**WORD_CLASSES, "women": FEMALE, "men": MALE, "surnames": SURNAMES}
METHODS = ("sgns", "glove", "pmi")


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


def cooccurrences(documents: Iterable[list[str]], window_size: int) -> tuple[Tensor, list[str]]:
    """How often each word stands within `window_size` words of each other one; and the words, the commonest first.

    Shapes:
        counts: (vocab, vocab), symmetric, float64
    """
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


def shifted_pmi(counts: Tensor, n_negatives: int = 1) -> Tensor:
    """ln p(word, context) / (p(word) p(context)) - ln k in nats; -inf for pairs that never met (Levy and Goldberg).

    Shapes:
        counts: (vocab, vocab) -> the same
    """
    total = counts.sum()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / total  # (vocab, vocab)
    return (counts / expected).log() - math.log(n_negatives)


# Three ways to vectors


def pmi_vectors(counts: Tensor, d_model: int) -> Tensor:
    """The leading singular vectors of the positive PMI, each scaled by the root of its singular value.

    Shapes:
        counts: (vocab, vocab) -> (vocab, d_model)
    """
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


def sgns_vectors(counts: Tensor, config: VectorConfig, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """Skip-gram with negative sampling: pairs drawn as often as they occur, negatives by frequency to the 3/4.

    Shapes:
        counts: (vocab, vocab) -> vectors (vocab, d_model), and the loss of each step in nats
    """
    vocab_size = len(counts)
    scale = 1 / math.sqrt(config.d_model)
    words, contexts = (
        (torch.randn(vocab_size, config.d_model, generator=generator) * scale).requires_grad_() for _ in range(2)
    )
    optimizer = torch.optim.Adam([words, contexts], lr=config.learning_rate)
    pair_weights, noise = counts.flatten().cumsum(0), counts.sum(1) ** 0.75
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
    return words.detach(), losses


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
    counts, scale = counts.float(), 1 / math.sqrt(config.d_model)
    words, contexts = (torch.randn(len(counts), config.d_model, generator=generator) * scale for _ in range(2))
    parameters = [words, contexts, torch.zeros(len(counts)), torch.zeros(len(counts))]
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in parameters], lr=config.learning_rate)
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


# The verbs


def counted_world(config: VectorConfig, run: RunConfig) -> tuple[Tensor, list[str]]:
    seed_everything(run.seed)
    documents = World().documents(config.n_documents, run.seed, "train")
    return cooccurrences((document.tokens for document in documents), config.window_size)


def all_vectors(config: VectorConfig, run: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The vectors of the three methods and the vocabulary."""
    counts, vocab = counted_world(config, run)
    generator = torch.Generator().manual_seed(run.seed)
    sgns, _ = sgns_vectors(counts, config, generator)
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
