"""Proofs of the word vectors: counts by hand, gradients, what skip-gram factorises, classes found, bad input."""

import math
import random
from collections import Counter

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

import word_vectors as topic
from tiny_world import World
from word_vectors import (
    RELATIONS,
    VectorConfig,
    chance_precision,
    class_precision,
    cooccurrences,
    expected_sgns_loss,
    fact_precision,
    glove_loss,
    glove_vectors,
    main,
    minimise_expected_loss,
    nearest,
    noise_shares,
    plot_vectors,
    pmi_vectors,
    score_analogies,
    sgns_gradients,
    sgns_loss,
    sgns_vectors,
    shifted_pmi,
    subsample,
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


def test_words_that_met_nobody_have_no_pmi_and_finite_vectors() -> None:
    counts, vocab = cooccurrences([["a", "b"], ["c"], ["b", "a", "a"]], 2)
    table = shifted_pmi(counts)
    assert not table.isnan().any() and table[vocab.index("c")].tolist() == [-math.inf] * 3
    assert pmi_vectors(counts, 2).isfinite().all()
    with pytest.raises(ValueError, match="no two words met; give longer documents"):
        shifted_pmi(cooccurrences([["a"], ["b"]], 2)[0])


def test_pmi_vectors_rebuild_the_matrix_at_full_width() -> None:
    counts, _ = cooccurrences([list("abcabdacd"), list("dcba")], 2)
    positive = shifted_pmi(counts).clamp(min=0)
    vectors = pmi_vectors(counts, len(counts))
    values = (vectors**2).sum(0)  # the square of a column's length is its singular value
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, positive @ positive.T)
    assert pmi_vectors(counts, 2).shape == (4, 2)


def test_negatives_are_drawn_by_frequency_to_the_three_quarters(monkeypatch) -> None:
    counts = torch.tensor([[0.0, 3.0], [3.0, 2.0]], dtype=torch.float64)  # the words meet 3 and 5 others
    wanted = torch.tensor([3.0, 5.0], dtype=torch.float64) ** 0.75
    assert torch.allclose(noise_shares(counts, 0.75), wanted / wanted.sum())
    powers = []
    monkeypatch.setattr(topic, "noise_shares", lambda table, power: powers.append(power) or noise_shares(table, power))
    config = VectorConfig(d_model=2, max_steps=1)
    sgns_vectors(counts, config, torch.Generator().manual_seed(0))
    assert powers == [0.75]  # as in word2vec


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


@pytest.mark.parametrize("power", [1.0, 0.75])
def test_skip_gram_factorises_the_shifted_pmi(parity, power: float) -> None:
    """At full width the optimum of the expected loss is PMI - ln k (Levy and Goldberg 2014, section 3.1).

    With the noise to a power, the PMI is that against the noise. Every pair of the four words meets.
    """
    counts, _ = cooccurrences([list("abcabdacdaabbccdd"), list("dcbaab")], 3)
    assert counts.min() > 0
    parameters = [matrix.double().requires_grad_() for matrix in (normal(4, 4), normal(4, 4, seed=1))]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_sgns_loss(*parameters, counts, 3, power)
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = (parameters[0] @ parameters[1].T).detach()
    parity("skip-gram", "shifted PMI", "invariant", scores, shifted_pmi(counts, 3, power), 1e-5)


def test_narrow_vectors_leave_a_gap_and_wide_ones_close_it() -> None:
    documents = [document.tokens for document in World(max_words=3, n_people=4).documents(200, 0)]
    counts, _ = cooccurrences(documents, 3)
    met, scores = counts > 0, shifted_pmi(counts, 2)
    share = counts / counts.sum()
    false = 2 * share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    logsigmoid = torch.nn.functional.logsigmoid
    best = -(share * logsigmoid(scores) + false * logsigmoid(-scores))[met].sum().item()
    losses = {}
    for d_model in (2, len(counts)):
        config = VectorConfig(d_model=d_model, max_steps=300, learning_rate=0.1)
        found = minimise_expected_loss(counts, 2, 1.0, config, torch.Generator().manual_seed(0))
        losses[d_model] = found.losses[-1]
    assert best < losses[len(counts)] < best + 0.01
    assert losses[2] > best + 0.1


def test_expected_loss_is_the_mean_of_the_sampled_one() -> None:
    """Sum over all pairs and all negatives, weighted by how often each is drawn, written as a loop."""
    counts, _ = cooccurrences([list("abcab"), list("cb")], 2)
    words, contexts = normal(3, 2), normal(3, 2, seed=1)
    noise, total = noise_shares(counts, 0.75), 0.0
    for word in range(3):
        for context in range(3):
            for negative in range(3):
                one = sgns_loss(words[[word]], contexts[[context]], contexts[[negative]][None]).item()
                true = -torch.nn.functional.logsigmoid(words[word] @ contexts[context]).item()
                weight = (counts[word, context] / counts.sum() * noise[negative]).item()
                total += weight * (true + 4 * (one - true))
    assert expected_sgns_loss(words, contexts, counts, 4, 0.75).item() == pytest.approx(total, rel=1e-12)
    assert noise.sum().item() == pytest.approx(1.0)


def test_expected_sampled_loss_is_the_loss_of_the_expectation() -> None:
    word, context = normal(1, 4), normal(1, 4, seed=1)
    table = normal(6, 4, seed=2)
    every = [sgns_loss(word, context, table[i].view(1, 1, 4)) for i in range(6)]
    together = sgns_loss(word, context, table.view(1, 6, 4))
    true = -torch.nn.functional.logsigmoid((word * context).sum())
    assert (together - true).item() == pytest.approx(sum((one - true).item() for one in every))


def test_subsampling_keeps_each_word_as_often_as_the_formula_says() -> None:
    documents = [["the"] * 60 + ["cat"] * 36 + ["sat"] * 4] * 500
    kept = Counter(word for document in subsample(documents, 0.09, random.Random(0)) for word in document)
    for word, share in (("the", math.sqrt(0.09 / 0.6)), ("cat", 0.5), ("sat", 1.0)):
        n = 500 * documents[0].count(word)
        assert kept[word] == pytest.approx(share * n, abs=1 + 5 * math.sqrt(n * share * (1 - share))), word
    assert subsample(documents, 1.0, random.Random(0)) == documents
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        subsample(documents, 0, random.Random(0))


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


def test_analogies_of_a_perfect_parallelogram() -> None:
    """A direction for number and one for each noun; beside each word a stranger, which is its nearest neighbour."""
    pairs = [("man", "men"), ("boy", "boys"), ("dog", "dogs"), ("sun", "suns")]
    vocab = [word for pair in pairs[:3] for word in pair] + [f"like {word}" for pair in pairs[:3] for word in pair]
    nouns = torch.eye(3).repeat_interleave(2, dim=0)
    number = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(3, 1)
    real = torch.cat([nouns, number], dim=1)
    vectors = torch.cat([real, real + 0.1 * normal(6, 5).float()])
    assert score_analogies(vectors, vocab, pairs) == (6, 1.0, 0.0, 1.0, 1 / 9)
    score = score_analogies(real[[0, 3, 2, 1, 4, 5]], vocab[:6], pairs)  # men and boys have changed places
    assert score.offset < 0.5 < score.right_kind
    pair_without_strangers = score_analogies(real[:4], vocab[:4], pairs)
    assert (pair_without_strangers.offset, pair_without_strangers.alone) == (1.0, 1.0)  # one word is left to answer
    with pytest.raises(ValueError, match="needs two pairs of known words, got 1 of 3"):
        score_analogies(vectors, vocab, [*pairs[2:], ("a", "b")])


def test_facts_of_people_are_found_where_the_vectors_hold_them() -> None:
    world = World(n_people=4)
    surnames = sorted({person.split()[1] for person in world.known})
    towns = sorted({facts["town"] for facts in world.facts.values()})
    vocab = [*{person.split()[0] for person in world.known}, *surnames, *towns]
    table = {word: normal(64, seed=index) for index, word in enumerate(vocab)}
    for person in world.known:
        table[person.split()[0]] = table[person.split()[0]] / 9 + table[world.facts[person]["town"]]
    first_names = [person.split()[0] for person in world.known]
    assert len(set(first_names)) == 4
    assert fact_precision(torch.stack([table[word] for word in vocab]), vocab, world) == 1.0
    far = {word: -vector if word in towns else vector for word, vector in table.items()}
    assert fact_precision(torch.stack([far[word] for word in vocab]), vocab, world) == 0.0


def test_relations_are_words_of_the_world() -> None:
    known = set(World().vocabulary())
    for name, pairs in RELATIONS.items():
        assert len({word for pair in pairs for word in pair} - known) == 0, name


def test_exchangeable_words_cannot_be_told_apart_by_counting() -> None:
    """Every plural of a job stands in the same contexts, so 3CosAdd finds a plural but not which one: 1 in 15."""
    counts, vocab = cooccurrences([document.tokens for document in World().documents(4000, 0, "train")], 4)
    score = score_analogies(pmi_vectors(counts, 32), vocab, RELATIONS["plural of a job"])
    assert score.right_kind > 0.8 and score.offset < 3 / 15


def test_the_plane_of_two_components_shows_every_word_of_its_classes() -> None:
    vocab = ["red", "blue", "cat", "dog", "and"]
    figure = plot_vectors(normal(5, 3), vocab, ("colours", "pets"))
    assert [len(points.get_offsets()) for points in figure.axes[0].collections] == [2, 2]
    assert "of the variance of 3 dimensions" in figure.axes[0].get_title()


def test_shape_comments_are_true(checked_shapes) -> None:
    counts, vocab = cooccurrences([document.tokens for document in World().documents(200, 0, "train")], 3)
    config = VectorConfig(d_model=6, max_steps=2, batch_size=7)
    with checked_shapes(topic) as checked:
        sgns_vectors(counts, config, torch.Generator().manual_seed(0))
        glove_vectors(counts, config, torch.Generator().manual_seed(0))
        minimise_expected_loss(counts, 2, 0.75, config, torch.Generator().manual_seed(0))
        sgns_gradients(normal(5, 3), normal(5, 3), normal(5, 4, 3))
        vectors = pmi_vectors(counts, 6)
        class_precision(vectors, vocab)
        score_analogies(vectors, vocab, RELATIONS["plural of a job"])
        fact_precision(vectors, vocab, World())
    assert len(checked) >= 18, sorted(checked)


def test_three_methods_find_the_classes_of_the_world(tmp_path, capsys) -> None:
    main(["--n-documents", "1000", "--max-steps", "400", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    sgns, glove, pmi = map(float, next(line for line in lines if line.startswith("mean")).split()[1:])
    assert sgns > 0.6 and glove > 0.4 and pmi > 0.7
    assert any(line.startswith("opposite direction") and line.count("(") == 3 for line in lines)
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


def test_texts_that_are_not_cut_and_sizes_that_cannot_be_are_refused() -> None:
    counts, _ = cooccurrences([["a", "b", "c"]], 2)
    for call, message in (
        (lambda: cooccurrences(["a b", "c"], 2), "a document is a list of words, got one str"),
        (lambda: shifted_pmi(counts, 0), "n_negatives must be at least 1, got 0"),
        (lambda: pmi_vectors(counts, 4), r"d_model must be in 1\.\.3, the number of words, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="no words to count"):
        cooccurrences([], 2)
    assert VectorConfig().window_size == 4
