"""Topic 15 - Hybrid search: rankings joined by their ranks, a reranker that reads both texts, and the measures.

    reciprocal_rank_fusion([words.search(question, 50), vectors.search(vector, 50)], k=5)
    recall_at(found, right, 5), reciprocal_rank(found, right), ndcg(found, gains, 5)
    reranker, log = train_reranker(chunks, CrossConfig()); reranker.rerank(question, hits, texts)

Papers: Cormack, Clarke, Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
methods"; Järvelin and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques"; Nogueira and Cho 2019 (arXiv
1901.04085), a cross-encoder as reranker.
"""

import math
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from contrastive import TextEncoder
from course_tokenizer import load_course_tokenizer
from dense_search import DenseConfig, PairBatches, PassageEncoder, check_k
from gpt2 import init_weights
from lexical_search import BM25Index, Hit, best
from text_chunks import Chunk
from tokenizer_basics import pad_batch
from training_transformers import fit
from workbench import check_range, seed_everything

RRF_CONSTANT = 60  # Cormack et al. found it on pilot runs and left it there

# Joining


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Hit]], k: int, constant: float = RRF_CONSTANT) -> list[Hit]:
    """The k best by the sum over the rankings of 1 / (constant + rank), ranks from 1; scores are not looked at.

    An id that a ranking has twice counts there with its first rank. Ties by id. Raises ValueError for k < 1 or a
    constant below 0.
    """
    if not constant >= 0:
        raise ValueError(f"constant={constant} must be at least 0")
    scores: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, id in enumerate(dict.fromkeys(hit.id for hit in ranking), start=1):
            scores[id] += 1 / (constant + rank)
    return best(scores, k)


def one_per_section(hits: Sequence[Hit], chunks: Mapping[int, Chunk]) -> list[Hit]:
    """The first hit of every section: five passages of one section answer less than one of each of five."""
    firsts: dict[tuple, Hit] = {}
    for hit in hits:
        chunk = chunks[hit.id]
        firsts.setdefault((chunk.source, chunk.headings), hit)
    return [*firsts.values()]


# Measures


def recall_at(found: Sequence[int], right: Collection[int], k: int) -> float:
    """The share of the right ids among the first k found. Raises ValueError if there is no right one."""
    if not right:
        raise ValueError("recall needs at least one right passage, got none")
    return len(set(found[: check_k(k)]) & set(right)) / len(set(right))


def success_at(found: Sequence[int], right: Collection[int], k: int) -> float:
    """1 if any of the first k found is right, else 0; its mean is what question answering calls recall@k."""
    return float(any(id in right for id in found[: check_k(k)]))


def reciprocal_rank(found: Sequence[int], right: Collection[int]) -> float:
    """1 / rank of the first right id; 0 if none was found. Its mean is the MRR."""
    return next((1 / rank for rank, id in enumerate(found, start=1) if id in right), 0.0)


def dcg(gains: Sequence[float], k: int) -> float:
    """Sum of gain / log2(rank + 1) over the first k ranks."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[: check_k(k)], start=1))


def ndcg(found: Sequence[int], gains: Mapping[int, float], k: int) -> float:
    """DCG of what was found over that of the best order of all that has gain: 0 to 1.

    An id that is found twice gains once. Raises ValueError if nothing has gain, or a gain is negative.
    """
    if not any(gains.values()) or not all(gain >= 0 for gain in gains.values()):
        raise ValueError("nDCG needs gains of at least 0, and one above it")
    made = dcg([gains.get(id, 0.0) for id in dict.fromkeys(found)], k)
    return made / dcg(sorted(gains.values(), reverse=True), k)


# A cross-encoder


@dataclass(frozen=True)
class CrossConfig(DenseConfig):
    """How the reranker is built and trained."""

    batch_size: int = 8  # questions of a step
    n_negatives: int = 3  # wrong passages beside each right one, from the best that BM25 finds
    max_steps: int = 300  # optimizer steps
    learning_rate: float = 2e-3  # the peak
    max_tokens: int = 128  # tokens of question and passage together

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_negatives", least=1)


class CrossEncoder(nn.Module):
    """Question and passage read as one text, so that each word of one can attend to the words of the other.

    Shapes: token_ids (batch, seq) to scores (batch). `start` gives its encoder the weights of a trained one.
    """

    def __init__(self, config: CrossConfig, start: PassageEncoder | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, load_course_tokenizer()
        self.text = TextEncoder(len(self.tokenizer.vocab), config.max_tokens, config)
        self.head = nn.Linear(config.d_model, 1)
        nn.init.normal_(self.text.token_emb.weight, std=0.1)
        init_weights(self.head)
        if start is not None:
            self.text.token_emb.load_state_dict(start.text.token_emb.state_dict())
            self.text.encoder.load_state_dict(start.text.encoder.state_dict())

    def rows(self, question: str, passages: Sequence[str]) -> list[list[int]]:
        most = self.config.max_tokens
        asked = self.tokenizer.encode(question)[: most // 3]
        room = most - len(asked) - 1
        return [
            [*asked, self.tokenizer.im_sep_id, *self.tokenizer.encode(text[: 8 * most])[:room]] for text in passages
        ]

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.head(self.text(token_ids)).squeeze(-1)

    @torch.no_grad()
    def rerank(self, question: str, hits: Sequence[Hit], texts: Mapping[int, str]) -> list[Hit]:
        """The same hits by the scores of the encoder, best first, ties by id; no hits give none."""
        if not hits:
            return []
        self.eval()
        rows = self.rows(question, [texts[hit.id] for hit in hits])
        scores = self(pad_batch(rows, self.tokenizer.pad_id).token_ids).tolist()
        return best({hit.id: score for hit, score in zip(hits, scores, strict=True)}, len(hits))


class RankingBatches:
    """Rows of one right and n wrong passages for each question, right one first; wrong ones look right to BM25.

    The questions are those of `PairBatches`: headings, and sentences that were taken out.
    """

    def __init__(self, chunks: Sequence[Chunk], model: CrossEncoder, seed: int) -> None:
        self.model, self.seed = model, seed
        self.pairs = PairBatches(chunks, replace_encoder(model), seed)
        self.chunks = self.pairs.chunks
        self.words = BM25Index()
        for number, chunk in enumerate(self.chunks):
            self.words.add(number, chunk.search_text)

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng, rows = random.Random(self.seed * 1_000_003 + step), []
        for index in rng.sample(range(len(self.chunks)), min(self.model.config.batch_size, len(self.chunks))):
            right = self.chunks[index]
            question, passage = self.pairs.pair(right, rng)
            found = self.words.search(question[:1000] if question.strip() else right.title, 20)
            near = [hit.id for hit in found if self.chunks[hit.id].headings != right.headings]
            anywhere = rng.sample(range(len(self.chunks)), min(len(self.chunks), 3 * self.model.config.n_negatives))
            wrong = rng.sample(near, min(len(near), self.model.config.n_negatives - 1))
            wrong += [other for other in anywhere if other != index and other not in wrong]
            texts = [self.chunks[other].search_text for other in wrong[: self.model.config.n_negatives]]
            rows += self.model.rows(question, [passage, *texts])
        token_ids = pad_batch(rows, self.model.tokenizer.pad_id).token_ids
        return {"token_ids": token_ids.view(-1, 1 + self.model.config.n_negatives, token_ids.shape[1])}


def replace_encoder(model: CrossEncoder) -> PassageEncoder:
    """An encoder of the same settings, of which `PairBatches` reads only those."""
    return PassageEncoder(replace(model.config), model.tokenizer)


def ranking_loss(model: CrossEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the right passage among those of its question, summed, in nats; and the number of questions."""
    token_ids = batch["token_ids"]  # (questions, passages, seq)
    scores = model(token_ids.flatten(0, 1)).view(token_ids.shape[:2])  # (questions, passages)
    right = torch.zeros(len(scores), dtype=torch.long)
    return nn.functional.cross_entropy(scores, right, reduction="sum"), torch.tensor(len(scores))


def train_reranker(
    chunks: Sequence[Chunk], config: CrossConfig | None = None, seed: int = 0, start: PassageEncoder | None = None
) -> tuple[CrossEncoder, list[dict[str, float]]]:
    """A reranker trained on the passages that it will see, and the log; guessing costs ln(1 + n_negatives) nats."""
    seed_everything(seed)
    model = CrossEncoder(config or CrossConfig(), start)
    log = fit(model, RankingBatches(chunks, model, seed), ranking_loss, model.config.training)
    return model.eval(), log
