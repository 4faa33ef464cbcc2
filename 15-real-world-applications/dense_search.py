"""Topic 15 - Dense search: questions and passages as vectors, from an encoder that is trained here, and two indexes.

    encoder, log = train_encoder(chunks, DenseConfig())      # about a minute and a half on one core
    vectors = encoder.embed([chunk.search_text for chunk in chunks])
    flat, graph = FlatIndex(64), HNSWIndex(64)               # exact, and approximate with fewer comparisons
    graph.add(0, vectors[0]); graph.search(vectors[0], k=5)

Papers: Karpukhin et al. 2020 (arXiv 2004.04906), two encoders and in-batch negatives; Lee, Chang, Toutanova 2019 (arXiv
1906.00300), the inverse cloze task; Malkov and Yashunin 2016 (arXiv 1603.09320), the graph. One encoder serves both
sides here: there are too few pairs for two.
"""

import heapq
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from contrastive import MAX_LOG_SCALE, PairConfig, TextEncoder, masked_clip_loss
from course_tokenizer import CourseTokenizer, load_course_tokenizer
from gpt2 import init_weights
from lexical_search import Hit
from text_chunks import Chunk
from tokenizer_basics import pad_batch
from training_transformers import TrainConfig, fit
from workbench import check_range, seed_everything


@dataclass(frozen=True)
class DenseConfig(PairConfig):
    """How the encoder of questions and passages is built and trained."""

    d_model: int = 64  # width of the encoder
    n_layers: int = 1  # blocks
    d_shared: int = 64  # width of the vectors
    batch_size: int = 48  # pairs in a batch: each question is compared with so many passages
    max_steps: int = 350  # optimizer steps
    warmup_steps: int = 30  # steps of rising learning rate
    learning_rate: float = 4e-3  # the peak
    temperature: float = 0.05  # at the start; it is learned
    max_tokens: int = 64  # tokens of a passage that are read
    heading_share: float = 0.5  # questions made of headings; the others are sentences taken out of their passage

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "max_tokens", least=8)
        check_range(self, "heading_share", least=0, most=1)

    @property
    def training(self) -> TrainConfig:
        names = "batch_size max_steps warmup_steps learning_rate min_lr_ratio weight_decay".split()
        return TrainConfig(**{name: getattr(self, name) for name in names}, log_every=10)


class PassageEncoder(nn.Module):
    """Topic 08's text encoder over the course tokenizer, a linear map, and the learned scale of the contrastive loss.

    Shapes: token_ids (batch, seq), <|pad|> after the end, to (batch, d_shared), not normalised.
    """

    def __init__(self, config: DenseConfig, tokenizer: CourseTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer or load_course_tokenizer()
        self.text = TextEncoder(len(self.tokenizer.vocab), config.max_tokens, config)
        self.proj = nn.Linear(config.d_model, config.d_shared)
        nn.init.normal_(self.text.token_emb.weight, std=0.1)
        init_weights(self.proj)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.proj(self.text(token_ids))

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The first max_tokens ids of each text; a text without any becomes one <|endoftext|>."""
        most = self.config.max_tokens
        return [self.tokenizer.encode(text[: 8 * most])[:most] or [self.tokenizer.eos_id] for text in texts]

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Unit vectors of texts, (texts, d_shared) float32. Rows of like length are computed together."""
        self.eval()
        rows, found = self.rows(texts), np.zeros((len(texts), self.config.d_shared), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            token_ids = pad_batch([rows[index] for index in chosen], self.tokenizer.pad_id).token_ids  # (batch, seq)
            found[chosen] = nn.functional.normalize(self(token_ids), dim=-1).numpy()
        return found


class PairBatches:
    """Questions made from passages, with their passages: batches that depend on the seed and the step alone.

    A question is the heading of a passage, which then stands before the passage or not, or a sentence of it, which is
    then taken out of the passage, but stays in a tenth of the cases so that equal words count (Lee et al. 2019).
    `groups` numbers the sections: another passage of the same section is no wrong answer.
    """

    def __init__(self, chunks: Sequence[Chunk], encoder: PassageEncoder, seed: int) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk.text) > 80]
        if len(self.chunks) < 2:
            raise ValueError(f"{len(self.chunks)} passages of more than 80 characters; training needs at least 2")
        self.encoder, self.seed = encoder, seed
        places = {(chunk.source, chunk.headings): None for chunk in self.chunks}
        self.group_of = {place: number for number, place in enumerate(places)}

    def pair(self, chunk: Chunk, rng: random.Random) -> tuple[str, str]:
        """One question and its passage."""
        head, body = " ".join(chunk.headings[-1:]), chunk.text
        sentences = [text for text in re.split(r"(?<=[.!?:])\s+", body) if 20 < len(text) < 300]
        if head and (rng.random() < self.encoder.config.heading_share or not sentences):
            plain = re.sub(r"^#+ .*\n?", "", body).strip() or body
            return head, plain if rng.random() < 0.5 else chunk.search_text
        question = rng.choice(sentences) if sentences else body[:100]
        rest = body if rng.random() < 0.1 else body.replace(question, " ", 1)
        return question, f"{chunk.title}\n{head}\n{rest}"

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng = random.Random(self.seed * 1_000_003 + step)
        chosen = rng.sample(range(len(self.chunks)), min(self.encoder.config.batch_size, len(self.chunks)))
        pairs = [self.pair(self.chunks[index], rng) for index in chosen]
        groups = [self.group_of[self.chunks[index].source, self.chunks[index].headings] for index in chosen]
        sides = [self.encoder.rows(texts) for texts in zip(*pairs, strict=True)]
        ids = [pad_batch(rows, self.encoder.tokenizer.pad_id).token_ids for rows in sides]
        return {"questions": ids[0], "passages": ids[1], "groups": torch.tensor(groups)}


def pair_loss(encoder: PassageEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the pairs of topic 08's contrastive loss, in nats, and the number of pairs."""
    scale = encoder.log_scale.clamp(max=MAX_LOG_SCALE)
    loss = masked_clip_loss(encoder(batch["questions"]), encoder(batch["passages"]), scale, batch["groups"])
    n_pairs = torch.tensor(len(batch["groups"]))
    return loss * n_pairs, n_pairs


def train_encoder(
    chunks: Sequence[Chunk], config: DenseConfig | None = None, seed: int = 0
) -> tuple[PassageEncoder, list[dict[str, float]]]:
    """An encoder trained on the passages that it will search, and the log; guessing costs ln(batch_size) nats."""
    seed_everything(seed)
    encoder = PassageEncoder(config or DenseConfig())
    log = fit(encoder, PairBatches(chunks, encoder, seed), pair_loss, encoder.config.training)
    return encoder.eval(), log


# Indexes


def check_vector(vector: np.ndarray, width: int) -> np.ndarray:
    """A unit vector of float32; raises ValueError for another width, for NaN or infinity, and for length 0."""
    vector = np.asarray(vector, dtype=np.float32)
    if vector.shape != (width,):
        raise ValueError(f"a vector of shape ({width},) is wanted, got {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"the vector holds {vector[~np.isfinite(vector)][0]}; check the encoder and its input")
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if length < 1e-12:
        raise ValueError("the vector has length 0 and so no direction; check the encoder and its input")
    return (vector / length).astype(np.float32)


def check_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return k


class FlatIndex:
    """The cosine with every vector: exact, and O(N) for each search."""

    def __init__(self, width: int) -> None:
        self.width, self.vectors = width, {}
        self.stacked: tuple[np.ndarray, np.ndarray] | None = (
            None  # ids, matrix; made by the first search after a change
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def add(self, id: int, vector: np.ndarray) -> None:
        """Add a vector under a new id. Raises ValueError for a taken id and for a vector without direction."""
        if id in self.vectors:
            raise ValueError(f"passage {id} is in the index already; remove it first")
        self.vectors[id], self.stacked = check_vector(vector, self.width), None

    def remove(self, id: int) -> None:
        if id not in self.vectors:
            raise ValueError(f"passage {id} is not in the index")
        del self.vectors[id]
        self.stacked = None

    def vector_of(self, id: int) -> np.ndarray:
        return self.vectors[id]

    def search(self, vector: np.ndarray, k: int) -> list[Hit]:
        """The k nearest by cosine, best first, ties by id; all of them if there are fewer than k."""
        vector, k = check_vector(vector, self.width), check_k(k)
        if not self.vectors:
            return []
        if self.stacked is None:
            self.stacked = np.fromiter(self.vectors, dtype=np.int64), np.stack([*self.vectors.values()])
        ids, matrix = self.stacked
        cosines = matrix @ vector  # (passages)
        n_worse = max(len(ids) - k, 0)
        rows = np.flatnonzero(cosines >= np.partition(cosines, n_worse)[n_worse])  # the k best, and whoever ties
        order = rows[np.lexsort((ids[rows], -cosines[rows]))][:k]
        return [Hit(int(ids[row]), float(cosines[row])) for row in order]


@dataclass(frozen=True)
class HNSWConfig:
    """The sizes of the graph."""

    n_links: int = 8  # links of a new node in each layer (M); the ground layer keeps twice as many
    build_width: int = 64  # candidates that an insertion keeps (efConstruction)
    search_width: int = 48  # candidates that a search keeps (ef); more find more
    seed: int = 0  # of the layers

    def __post_init__(self) -> None:
        check_range(self, "n_links", least=2)
        check_range(self, "build_width", "search_width", least=1)


class HNSWIndex:
    """Hierarchical navigable small worlds: each layer a graph of neighbours, the upper ones sparse.

    A search walks greedily down the layers and then keeps the best `search_width` candidates on the ground. A removed
    node stays a stepping stone until a third of the nodes are removed; then the graph is built anew without them.
    `n_compared` counts the comparisons of vectors, what a search costs on every machine.
    """

    def __init__(self, width: int, config: HNSWConfig | None = None) -> None:
        self.width, self.config = width, config or HNSWConfig()
        self.n_compared = 0
        self.clear()

    def clear(self) -> None:
        self.rng = random.Random(self.config.seed)
        self.vectors = np.zeros((0, self.width), dtype=np.float32)
        self.ids: list[int] = []  # id of each node
        self.node_of: dict[int, int] = {}  # live nodes only
        self.layers: list[dict[int, list[int]]] = []  # from the ground up: node -> its neighbours
        self.entry = -1

    def __len__(self) -> int:
        return len(self.node_of)

    def vector_of(self, id: int) -> np.ndarray:
        return self.vectors[self.node_of[id]]

    def cosines(self, vector: np.ndarray, nodes: Sequence[int]) -> np.ndarray:
        self.n_compared += len(nodes)
        return self.vectors[nodes] @ vector  # (nodes)

    def add(self, id: int, vector: np.ndarray) -> None:
        """Insert a vector (algorithm 1). Raises ValueError for a taken id and for a vector without direction."""
        if id in self.node_of:
            raise ValueError(f"passage {id} is in the index already; remove it first")
        vector, node = check_vector(vector, self.width), len(self.ids)
        if node == len(self.vectors):  # double the room
            room = np.zeros((max(64, 2 * node), self.width), dtype=np.float32)
            room[:node] = self.vectors
            self.vectors = room
        self.vectors[node], self.node_of[id] = vector, node
        self.ids.append(id)
        level = int(-math.log(1 - self.rng.random()) / math.log(self.config.n_links))  # 1/M of the nodes one layer up
        start = [self.entry] if self.entry >= 0 else []
        for layer in range(len(self.layers) - 1, -1, -1):
            found = self.walk(vector, start, layer, self.config.build_width if layer <= level else 1)
            if layer <= level:
                self.connect(node, found, layer)
            start = [other for _, other in found]
        while len(self.layers) <= level:
            self.layers.append({node: []})
            self.entry = node

    def walk(self, vector: np.ndarray, start: list[int], layer: int, width: int) -> list[tuple[float, int]]:
        """The `width` best nodes of a layer that a greedy walk meets, best first (algorithm 2)."""
        links, seen = self.layers[layer], set(start)
        near = [(-float(cosine), node) for cosine, node in zip(self.cosines(vector, start), start, strict=True)]
        heapq.heapify(near)  # to be visited, nearest first
        kept = [(-distance, node) for distance, node in near]
        heapq.heapify(kept)  # the best so far, farthest first
        while len(kept) > width:
            heapq.heappop(kept)
        while near:
            distance, node = heapq.heappop(near)
            if len(kept) == width and -distance < kept[0][0]:
                break  # the nearest that is left is farther than all that is kept
            fresh = [other for other in links[node] if other not in seen]
            if not fresh:
                continue
            seen.update(fresh)
            for cosine, other in zip(self.cosines(vector, fresh).tolist(), fresh, strict=True):
                if len(kept) < width or cosine > kept[0][0]:
                    heapq.heappush(near, (-cosine, other))
                    heapq.heappush(kept, (cosine, other))
                    if len(kept) > width:
                        heapq.heappop(kept)
        return sorted(kept, key=lambda item: (-item[0], item[1]))

    def choose(self, found: list[tuple[float, int]], most: int) -> list[int]:
        """Neighbours in different directions: none that is nearer to a chosen one than to the node (algorithm 4)."""
        chosen: list[int] = []
        for cosine, other in found:
            if len(chosen) == most:
                break
            if not chosen or (self.cosines(self.vectors[other], chosen) <= cosine).all():
                chosen.append(other)
        left = [other for _, other in found if other not in chosen]
        return chosen + left[: most - len(chosen)]  # filled up with the nearest, the paper's keepPrunedConnections

    def connect(self, node: int, found: list[tuple[float, int]], layer: int) -> None:
        """Link a new node both ways; a neighbour with too many links chooses again."""
        links, most = self.layers[layer], self.config.n_links * (1 if layer else 2)
        links[node] = self.choose(found, self.config.n_links)
        for other in links[node]:
            links[other].append(node)
            if len(links[other]) > most:
                cosines = self.cosines(self.vectors[other], links[other]).tolist()
                links[other] = self.choose(sorted(zip(cosines, links[other], strict=True), reverse=True), most)

    def remove(self, id: int) -> None:
        """Take an id out: no search returns it any more. Raises ValueError for an id that is not there."""
        if id not in self.node_of:
            raise ValueError(f"passage {id} is not in the index")
        del self.node_of[id]
        if 3 * (len(self.ids) - len(self.node_of)) > len(self.ids):
            live = [(other, self.vectors[node].copy()) for other, node in self.node_of.items()]
            self.clear()
            for other, vector in live:
                self.add(other, vector)

    def search(self, vector: np.ndarray, k: int, search_width: int = 0) -> list[Hit]:
        """About the k nearest by cosine, best first; fewer if the walk meets fewer live nodes (algorithm 5)."""
        vector, k = check_vector(vector, self.width), check_k(k)
        if not self.node_of:
            return []
        start, width = [self.entry], max(search_width or self.config.search_width, k)
        for layer in range(len(self.layers) - 1, 0, -1):
            start = [node for _, node in self.walk(vector, start, layer, 1)]
        dead = len(self.ids) - len(self.node_of)
        found = self.walk(vector, start, 0, min(width + dead, len(self.ids)))
        live = [Hit(self.ids[node], cosine) for cosine, node in found if self.node_of.get(self.ids[node]) == node]
        return sorted(live, key=lambda hit: (-hit.score, hit.id))[:k]
