"""Proofs of the word vectors: counts by hand, gradients, what skip-gram factorises, classes found, bad input."""

import math

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

import word_vectors as topic
from word_vectors import (
    VectorConfig,
    chance_precision,
    class_precision,
    cooccurrences,
    glove_loss,
    main,
    nearest,
    pmi_vectors,
    sgns_gradients,
    sgns_loss,
    shifted_pmi,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neighbours_are_counted_within_the_window() -> None:
    counts, vocab = cooccurrences([["a", "b", "c", "a"], ["b"]], window_size=2)
    assert vocab == ["a", "b", "c"]
    assert counts.tolist() == [[0, 2, 2], [2, 0, 1], [2, 1, 0]]
    assert cooccurrences([["a", "a"]], 4)[0].tolist() == [[2]]


def test_shifted_pmi_by_hand() -> None:
    counts = torch.tensor([[0.0, 3.0], [3.0, 2.0]], dtype=torch.float64)
    pmi = shifted_pmi(counts, n_negatives=2)
    assert pmi[0, 1].item() == pytest.approx(math.log(3 * 8 / (3 * 5)) - math.log(2))
    assert pmi[0, 0].item() == -math.inf


def test_pmi_vectors_rebuild_the_matrix_at_full_width() -> None:
    counts, _ = cooccurrences([list("abcabdacd"), list("dcba")], 2)
    positive = shifted_pmi(counts).clamp(min=0)
    vectors = pmi_vectors(counts, len(counts))
    values = (vectors**2).sum(0)  # the square of a column's length is its singular value
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, positive @ positive.T)
    assert pmi_vectors(counts, 2).shape == (4, 2)


def test_sgns_gradients_equal_autograd(parity) -> None:
    inputs = [
        normal(5, 3).requires_grad_(),
        normal(5, 3, seed=1).requires_grad_(),
        normal(5, 4, 3, seed=2).requires_grad_(),
    ]
    wanted = torch.autograd.grad(sgns_loss(*inputs), inputs)
    with torch.no_grad():
        parity("sgns_gradients", "torch.autograd", "gradient", list(sgns_gradients(*inputs)), list(wanted), 1e-12)
    assert torch.autograd.gradcheck(sgns_loss, inputs)


def test_skip_gram_factorises_the_shifted_pmi(parity) -> None:
    """With enough width the optimum of the expected loss is PMI - ln k (Levy and Goldberg 2014, section 3.1).

    Here the noise follows the plain frequencies, as their proof assumes.
    """
    counts, _ = cooccurrences([list("abcabdacd"), list("dcbaab")], 3)
    n_negatives, met = 3, counts > 0
    share = counts / counts.sum()
    noise = share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    scores = torch.zeros_like(counts, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18)

    def closure() -> Tensor:
        optimizer.zero_grad()
        true, false = torch.nn.functional.logsigmoid(scores), torch.nn.functional.logsigmoid(-scores)
        loss = -(share * true + n_negatives * noise * false)[met].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    parity("skip-gram", "shifted PMI", "invariant", scores.detach()[met], shifted_pmi(counts, n_negatives)[met], 1e-5)


def test_expected_sampled_loss_is_the_loss_of_the_expectation() -> None:
    word, context = normal(1, 4), normal(1, 4, seed=1)
    table = normal(6, 4, seed=2)
    every = [sgns_loss(word, context, table[i].view(1, 1, 4)) for i in range(6)]
    together = sgns_loss(word, context, table.view(1, 6, 4))
    true = -torch.nn.functional.logsigmoid((word * context).sum())
    assert (together - true).item() == pytest.approx(sum((one - true).item() for one in every))


def test_glove_loss_by_a_loop_and_zero_at_the_solution() -> None:
    counts = torch.tensor([[0.0, 5.0], [5.0, 400.0]], dtype=torch.float64)
    words, contexts, bias, other = normal(2, 3), normal(2, 3, seed=1), normal(2, seed=2), normal(2, seed=3)
    squares = [
        min(1.0, counts[i, j].item() / 100) ** 0.75
        * ((words[i] @ contexts[j] + bias[i] + other[j]).item() - math.log(counts[i, j])) ** 2
        for i, j in ((0, 1), (1, 0), (1, 1))
    ]
    assert glove_loss(words, contexts, bias, other, counts).item() == pytest.approx(sum(squares) / 3)
    exact = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    fitted = torch.tensor([0.0, math.log(5)], dtype=torch.float64)
    solution = glove_loss(exact * math.log(400 / 25), exact, fitted, fitted, counts)
    assert solution.item() == pytest.approx(0.0, abs=1e-20)


def test_nearest_is_the_cosine(parity) -> None:
    vectors = normal(7, 4)
    ours = nearest(vectors)
    assert torch.isinf(ours.diagonal()).all()
    off = ~torch.eye(7, dtype=torch.bool)
    parity("nearest", "sklearn cosine_similarity", "output", ours[off], cosine_similarity(vectors)[off], 1e-6)


def test_precision_is_one_for_perfect_vectors_and_chance_for_random_ones() -> None:
    members = {name: words for name, words in topic.CLASSES.items()}
    vocab = [word for words in members.values() for word in words]
    perfect = torch.eye(len(members)).repeat_interleave(torch.tensor([len(words) for words in members.values()]), dim=0)
    assert set(class_precision(perfect + 0.01 * normal(*perfect.shape).float(), vocab).values()) == {1.0}
    means = []
    for seed in range(20):
        scores = class_precision(normal(len(vocab), 8, seed=seed), vocab)
        means.append(sum(scores.values()) / len(scores))
    assert sum(means) / 20 == pytest.approx(chance_precision(vocab), abs=0.02)


def test_three_methods_find_the_classes_of_the_world(tmp_path, capsys) -> None:
    main(["--n-documents", "1500", "--max-steps", "800", "--out", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    sgns, glove, pmi = map(float, line.split()[1:])
    assert sgns > 0.6 and glove > 0.4 and pmi > 0.7
    main(["neighbours", "garden", "--n-documents", "500", "--max-steps", "50", "--out", str(tmp_path)])
    assert "garden (pmi): " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["neighbours"], "give at least one word"),
        (["--window-size", "0"], "window_size must be finite and >= 1"),
        (["neighbours", "zorg", "--n-documents", "50", "--max-steps", "1"], "'zorg' is not among the"),
    ],
)
def test_bad_input_gives_one_line(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="no words to count"):
        cooccurrences([], 2)
    assert VectorConfig().window_size == 4
