"""Fusion and measures equal to their formulas and to scikit-learn; the reranker learns to tell right from wrong."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from contrastive import TextEncoder
from dense_search import PassageEncoder
from document_loaders import document_of
from hybrid_search import (
    CrossConfig,
    CrossEncoder,
    RankingBatches,
    dcg,
    ndcg,
    one_per_section,
    ranking_loss,
    recall_at,
    reciprocal_rank,
    reciprocal_rank_fusion,
    success_at,
    train_reranker,
)
from lexical_search import Hit
from text_chunks import cut_documents
from transformer_architecture import copy_to_torch

TINY = CrossConfig(
    d_model=20, n_heads=2, d_shared=12, batch_size=5, max_steps=40, warmup_steps=5, max_tokens=40, n_negatives=2
)


def hits(*ids: int) -> list[Hit]:
    return [Hit(id, -number) for number, id in enumerate(ids)]


def test_fusion_by_hand_and_against_the_sum() -> None:
    joined = reciprocal_rank_fusion([hits(1, 2, 3), hits(3, 1)], 5)
    assert joined == [
        Hit(1, pytest.approx(1 / 61 + 1 / 62)),
        Hit(3, pytest.approx(1 / 63 + 1 / 61)),
        Hit(2, pytest.approx(1 / 62)),
    ]
    rng = random.Random(0)
    for _ in range(20):
        rankings = [rng.sample(range(12), rng.randint(0, 12)) for _ in range(3)]
        scores = {
            id: sum(1 / (7 + ranking.index(id) + 1) for ranking in rankings if id in ranking)
            for id in set(itertools.chain(*rankings))
        }
        found = reciprocal_rank_fusion([hits(*ranking) for ranking in rankings], 12, constant=7)
        assert [hit.id for hit in found] == sorted(scores, key=lambda id: (-scores[id], id))


def test_fusion_looks_at_ranks_alone() -> None:
    loud = [Hit(1, 1e9), Hit(2, 1e8)]
    assert reciprocal_rank_fusion([loud, hits(2, 3)], 3) == reciprocal_rank_fusion([hits(1, 2), hits(2, 3)], 3)
    assert reciprocal_rank_fusion([hits(4, 4, 5)], 3) == [Hit(4, 1 / 61), Hit(5, 1 / 62)]  # a repeat takes no rank
    assert reciprocal_rank_fusion([], 3) == [] == reciprocal_rank_fusion([[]], 3)
    for call, message in (
        (lambda: reciprocal_rank_fusion([], 0), "k=0"),
        (lambda: reciprocal_rank_fusion([], 1, -1), "constant=-1"),
        (lambda: reciprocal_rank_fusion([], 1, math.nan), "constant=nan"),
        (lambda: recall_at([1, 2], {2}, -1), "k=-1 must be at least 1"),  # not all but the last
        (lambda: success_at([1, 2], {2}, 0), "k=0 must be at least 1"),
        (lambda: ndcg([1], {1: 1.0}, 0), "k=0 must be at least 1"),
        (lambda: ndcg([1], {1: math.nan}, 1), "gains of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ndcg_equals_scikit_learn(parity) -> None:
    from sklearn.metrics import ndcg_score

    rng, ours, theirs = np.random.default_rng(0), [], []
    for _ in range(50):
        n, k = int(rng.integers(2, 15)), int(rng.integers(1, 18))
        gains, order = rng.integers(0, 4, n).astype(float), rng.permutation(n)
        gains[rng.integers(n)] = 2.0
        scores = np.empty(n)
        scores[order] = np.arange(n, 0, -1)
        ours.append(ndcg(order.tolist(), dict(enumerate(gains)), k))
        theirs.append(ndcg_score(gains[None], scores[None], k=k))
    parity("ndcg", "sklearn.metrics.ndcg_score", "output", ours, theirs, 1e-12)


def test_ndcg_is_the_share_of_the_best_order(parity) -> None:
    gains, k = {0: 3.0, 1: 1.0, 2: 0.0, 3: 2.0, 4: 1.0}, 3
    best = max(dcg([gains[id] for id in order], k) for order in itertools.permutations(gains))
    ours = [ndcg(order, gains, k) for order in itertools.permutations(gains)]
    theirs = [dcg([gains[id] for id in order], k) / best for order in itertools.permutations(gains)]
    parity("ndcg", "the best of all orders", "output", ours, theirs, 1e-12)
    assert ndcg([3, 9, 0], {3: 1.0, 0: 1.0}, 3) == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))  # by hand
    assert ndcg([3, 3, 3], {3: 1.0, 0: 1.0}, 3) < 1  # a repeat gains nothing


def test_recall_and_reciprocal_rank_by_hand() -> None:
    assert recall_at([5, 1, 2], {1, 9}, 2) == 0.5 and recall_at([5, 1, 1], {1}, 3) == 1.0 and recall_at([], {1}, 3) == 0
    assert success_at([5, 1, 2], {1, 9}, 2) == 1.0 and success_at([5, 1], {1}, 1) == 0.0
    assert reciprocal_rank([5, 1, 9], {1, 9}) == 0.5 and reciprocal_rank([5], {1}) == 0.0
    for call in (lambda: recall_at([1], set(), 1), lambda: ndcg([1], {}, 1), lambda: ndcg([1], {1: -1.0, 2: 3.0}, 1)):
        with pytest.raises(ValueError, match="needs"):
            call()
    assert recall_at([1, 2], [2, 2], 5) == 1.0  # a right one that is named twice is one


SUBJECTS = "attention tokens gradients caches experts pruning beams layers ranks floors".split()
TEXT = "\n\n".join(
    f"## About {word}\n\nHere we tell what {word} are for. Some {word} are small. Nobody counts {word} twice at all."
    for word in SUBJECTS
)


@pytest.fixture(scope="module")
def trained():
    chunks = cut_documents([document_of("a.md", "markdown", TEXT)])
    return chunks, *train_reranker(chunks, TINY, seed=0)


def test_the_reranker_learns_and_keeps_what_it_is_given(trained) -> None:
    chunks, model, log = trained
    texts = {number: chunk.search_text for number, chunk in enumerate(chunks)}
    assert log[-1]["loss"] < math.log(3)  # guessing among one right and two wrong
    found = model.rerank("About experts", hits(3, 1, 4), texts)
    assert sorted(hit.id for hit in found) == [1, 3, 4] and [hit.score for hit in found] == sorted(
        (hit.score for hit in found), reverse=True
    )
    assert model.rerank("anything", [], texts) == []


def test_rows_hold_one_right_passage_and_the_wanted_number_of_others(trained) -> None:
    chunks, model, _ = trained
    batches = RankingBatches(chunks, model, seed=0)
    batch = batches(2)
    assert batch["token_ids"].shape[:2] == (5, 3) and (batch["token_ids"] == batches(2)["token_ids"]).all()
    for question in batch["token_ids"]:
        parts = [row.tolist() for row in question]
        place = [row.index(model.tokenizer.im_sep_id) for row in parts]
        assert len({tuple(row[:at]) for row, at in zip(parts, place, strict=True)}) == 1  # one question
        assert len({tuple(row[at:]) for row, at in zip(parts, place, strict=True)}) == 3  # three passages


def test_the_first_passage_alone_is_about_what_is_asked(trained) -> None:
    chunks, model, _ = trained
    batches = RankingBatches(chunks, model, seed=3)
    for step in range(12):
        for question in batches(step)["token_ids"]:
            rows = [[id for id in row if id != model.tokenizer.pad_id] for row in question.tolist()]
            place = rows[0].index(model.tokenizer.im_sep_id)
            asked, *passages = (
                model.tokenizer.decode(ids) for ids in (rows[0][:place], *(row[place:] for row in rows))
            )
            [subject] = [word for word in SUBJECTS if word in asked]
            if subject != SUBJECTS[0]:  # which is in the title, and so in all passages
                assert [subject in passage for passage in passages] == [True, False, False]


def test_the_loss_is_the_sum_over_the_questions(trained) -> None:
    chunks, model, _ = trained
    token_ids = RankingBatches(chunks, model, seed=0)(0)["token_ids"]
    with torch.no_grad():
        whole, n = ranking_loss(model, {"token_ids": token_ids})
        each = [ranking_loss(model, {"token_ids": token_ids[row : row + 1]})[0] for row in range(len(token_ids))]
    assert n == len(token_ids) == 5 and whole.item() == pytest.approx(sum(loss.item() for loss in each), rel=1e-5)


def test_rows_fit_and_shapes_hold(checked_shapes) -> None:
    import hybrid_search

    model = CrossEncoder(TINY)
    assert max(len(row) for row in model.rows("what " * 100, ["long " * 400, ""])) == 40
    with checked_shapes(hybrid_search) as checked:
        hybrid_search.ranking_loss(
            model, RankingBatches(cut_documents([document_of("a.md", "markdown", TEXT)]), model, 0)(0)
        )
    assert len(checked) >= 2


def test_one_passage_for_each_section() -> None:
    text = "# A\n\n" + "one two three four five six. " * 60 + "\n\n# B\n\nsome other words that follow here now.\n"
    chunks = dict(enumerate(cut_documents([document_of("a.md", "markdown", text)])))
    assert [chunk.headings for chunk in chunks.values()] == [("A",), ("A",), ("A",), ("B",)]
    assert [hit.id for hit in one_per_section(hits(1, 0, 3, 2), chunks)] == [1, 3]
    chunks[4] = replace(chunks[3], source="b.md")  # another document's section of the same name
    assert [hit.id for hit in one_per_section(hits(3, 4, 1), chunks)] == [3, 4, 1]


def pooled_by_torch(text: TextEncoder, token_ids: torch.Tensor) -> torch.Tensor:
    """The mean over the real tokens of PyTorch's own encoder with our weights."""
    d_model, block = text.token_emb.embedding_dim, text.encoder.blocks[0]
    settings = {"batch_first": True, "norm_first": True, "activation": "gelu", "dropout": 0.0}
    layer = nn.TransformerEncoderLayer(d_model, block.self_attn.n_heads, 2 * d_model, dtype=torch.float64, **settings)
    norm = nn.LayerNorm(d_model, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, len(text.encoder.blocks), norm, enable_nested_tensor=False)
    copy_to_torch(text.encoder, theirs)
    x = nn.functional.embedding(token_ids, text.token_emb.weight) + text.pos_emb.weight[: token_ids.shape[1]]
    x = theirs(x, src_key_padding_mask=token_ids == 0)  # (batch, seq, d_model)
    return torch.stack([row[ids != 0].mean(dim=0) for row, ids in zip(x, token_ids, strict=True)])


@pytest.mark.parametrize("kind", [CrossEncoder, PassageEncoder])
def test_the_encoders_compute_what_pytorchs_encoder_does(kind: type, parity) -> None:
    torch.manual_seed(4)
    model = kind(TINY).double().eval()
    token_ids = torch.tensor([[7, 300, 41, 8, 9, 77, 1, 12], [5, 0, 0, 0, 0, 0, 0, 0], [88, 9, 4, 61, 0, 0, 0, 0]])
    last = model.head if kind is CrossEncoder else model.proj
    theirs = nn.functional.linear(pooled_by_torch(model.text, token_ids), last.weight, last.bias)
    theirs = theirs[:, 0] if kind is CrossEncoder else theirs
    assert theirs.std() > 0.01
    parity(kind.__name__, "nn.TransformerEncoder", "output", model(token_ids), theirs, 1e-10)
