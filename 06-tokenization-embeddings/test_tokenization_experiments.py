"""Topic 06: the chapter's experiments run at any size, and their measures are right on cases worked by hand."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from scipy.stats import pearsonr
from torch.utils.flop_counter import FlopCounterMode

import tokenization_experiments as topic
from sequence_modeling import EOS_ID, IGNORE, bits_per_byte
from tiny_world import SPECIAL_TOKENS, World
from tokenization_embeddings import ByteLevelBPE, CharacterTokenizer, Unigram, WordPiece, train_merges
from tokenization_experiments import (
    EXPERIMENTS,
    SCRIPTS,
    FiguresConfig,
    Ids,
    SumTask,
    Suspicion,
    Text,
    best_merges,
    bytes_per_token,
    correlation,
    count_inputs,
    decay_without_gradient,
    encoded_texts,
    fertility,
    figures,
    first_tokens,
    from_the_left,
    from_the_right,
    in_learnt_chunks,
    least_sgns_loss,
    merged_words,
    n_symbols,
    random_sums,
    share_without_carry,
    sums_right,
    suspicions,
    text_bits,
    train_config,
    train_on_sums,
    train_on_texts,
    unknown_share,
    with_typos,
    world_corpus,
)
from transformer_architecture import CausalTransformer, ModelConfig
from unigram import expected_counts, metaspace_words
from word_vectors import cooccurrences, shifted_pmi
from workbench import BLOCK, RunConfig, render_table

BETS = {tuple("bet"): 3, tuple("be"): 2, tuple("eta"): 3, tuple("ta"): 2}
CPU = RunConfig(device="cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The whole


def test_figures_runs_every_experiment_and_fills_the_chapter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(topic, "TEXT_SIZES", (264, 300))
    monkeypatch.setattr(topic, "WORLD_SIZES", (264, 2048))
    monkeypatch.setattr(topic, "VECTOR_SETTINGS", {"window 4": (4, None), "dropped": (4, 1e-3)})
    monkeypatch.setattr(topic, "ROW_BYTES", 48)
    monkeypatch.setattr(topic, "SPANS", ((10, 40), (1, 9)))
    monkeypatch.setattr(topic, "RELATIONS", {"plural of a job": topic.RELATIONS["plural of a job"]})
    for name in ("measure_training_speed", "measure_encoding_speed"):
        columns = topic.TRAINING_COLUMNS if "training" in name else topic.ENCODING_COLUMNS
        monkeypatch.setattr(topic, name, lambda *_, columns=columns, **__: [["a text", *[1] * (len(columns) - 1)]])
    (tmp_path / "README.md").write_text("<!-- results:begin glitch-counts -->\n<!-- results:end -->\n")
    config = FiguresConfig(
        n_seeds=2,
        n_bytes=20_000,
        text_gflops=0.05,
        world_gflops=0.05,
        sum_gflops=0.05,
        n_held_out=3,
        n_documents=300,
        vector_steps=5,
        folder=tmp_path / "figures",
    )
    figures(config, RunConfig(device="cpu", out=tmp_path / "out"))
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    tables = (
        "sizes sizes-world kinds scripts training-speed encoding-speed numbers spaces glitch glitch-counts sampling "
    )
    tables += "embeddings pmi vectors analogies breaks"
    assert set(results) == set(tables.split())
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"cuts", "sizes", "scripts", "numbers", "glitch", "pmi", "pca"}
    assert all(path.stat().st_size < 150_000 for path in (tmp_path / "figures").glob("*.svg"))
    assert all(len(cell) == 2 for row in results["sampling"]["rows"] for cell in row[1:])
    assert all(bits > 1 for row in results["sizes"]["rows"] for bits in row[-1])  # untrained, but finite
    text = (tmp_path / "README.md").read_text()
    assert BLOCK.search(text)[3].strip() == render_table(results["glitch-counts"])
    assert set(EXPERIMENTS) == {result["command"].split()[-1] for result in results.values()}


def test_an_unknown_experiment_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'size'; did you mean 'sizes'"):
        FiguresConfig(only=("size",))
    with pytest.raises(ValueError, match="text_gflops must be finite and > 0, got 0"):
        FiguresConfig(text_gflops=0)


# Greed and bounds


def test_greedy_merges_lose_a_token_to_the_best_ones_by_hand() -> None:
    alphabet = sorted({letter for word in BETS for letter in word})
    _, greedy = train_merges(BETS, len(alphabet) + 2, alphabet)
    assert greedy == [("e", "t"), ("b", "et")] or greedy == [("e", "t"), ("et", "a")]
    assert [n_symbols(merged_words(BETS, greedy[:n])) for n in range(3)] == [26, 20, 17]
    least, best = best_merges(BETS, 2)
    assert least == 16 and {*best} == {("b", "e"), ("t", "a")}
    assert best_merges({("a",): 3}, 2) == (3, [])


@pytest.mark.parametrize("seed", range(4))
def test_a_merge_saves_its_count_and_greed_is_never_better_than_the_best(seed: int) -> None:
    rng = random.Random(seed)
    words = Counter(tuple(rng.choice("abcd") for _ in range(rng.randint(2, 4))) for _ in range(6))
    alphabet = sorted({letter for word in words for letter in word})
    _, merges = train_merges(words, len(alphabet) + 2, alphabet)
    counts: Counter = Counter()
    for word, count in words.items():
        for pair in set(itertools.pairwise(word)):
            counts[pair] += count * "".join(word).count("".join(pair))  # without overlaps
    saved = n_symbols(words) - n_symbols(merged_words(words, merges[:1]))
    assert saved == counts[merges[0]]
    assert best_merges(words, 1)[0] <= n_symbols(words) - saved
    assert best_merges(words, 2)[0] <= n_symbols(merged_words(words, merges))


def test_expectation_maximisation_never_lowers_the_likelihood() -> None:
    """Kudo 2018, section 3.2, with the plain M-step (share of expected uses); the digamma step is a prior on top."""
    words = Counter(
        word for text in ("the cat and the hat", "a hat that the cat had") for word, _ in metaspace_words(text)
    )
    pieces = {
        word[start:end] for word in words for start in range(len(word)) for end in range(start + 1, len(word) + 1)
    }
    scores = dict.fromkeys(sorted(pieces), -math.log(len(pieces)))

    def likelihood() -> float:
        total = 0.0
        for word, count in words.items():
            chance = [1.0] + [0.0] * len(word)
            for end in range(1, len(word) + 1):
                chance[end] = sum(
                    chance[start] * math.exp(scores.get(word[start:end], -math.inf)) for start in range(end)
                )
            total += count * math.log(chance[-1])
        return total

    reached = [likelihood()]
    for _ in range(12):
        expected = expected_counts(words, scores)
        total = sum(expected.values())
        scores = {piece: math.log(count / total) for piece, count in expected.items() if count > 1e-12}
        reached.append(likelihood())
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(reached))
    assert reached[-1] > reached[0] + 1


def test_the_least_loss_of_skip_gram_is_where_the_scores_are_the_shifted_pmi() -> None:
    counts, _ = cooccurrences([list("abcabdacdaabbccdd"), list("dcbaab")], 3)
    scores, least = shifted_pmi(counts, 3), least_sgns_loss(counts, 3)
    share = counts / counts.sum()
    false = 3 * share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    logsigmoid = torch.nn.functional.logsigmoid
    for noise in (0.0, 0.1, -0.1):
        moved = scores + noise * normal(4, 4)
        loss = -(share * logsigmoid(moved) + false * logsigmoid(-moved)).sum().item()
        assert (loss == pytest.approx(least, rel=1e-12)) if noise == 0 else (loss > least)


# Bits per byte


def test_bits_per_byte_do_not_depend_on_the_tokenizer_if_the_model_does_not() -> None:
    """A uniform model of V tokens pays log2(V) bits a token: bits per byte are that over the bytes of a token."""
    texts = ["the cat sat", "on the mat"]
    tokenizer = ByteLevelBPE.train(texts, 270, SPECIAL_TOKENS)

    def uniform(token_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*token_ids.shape, 270)

    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    n_bytes = sum(map(len, texts))
    assert text_bits(uniform, tokenizer.encode, texts) == pytest.approx(math.log2(270) * n_tokens / n_bytes)
    assert bytes_per_token(tokenizer.encode, texts) == pytest.approx(n_bytes / (n_tokens - 2))


def test_the_tokenizer_pays_at_least_what_the_text_is_worth() -> None:
    """A model over tokens a, b, ab: the text "ab" has two segmentations, and the canonical one has part of its mass."""
    chance = {"a": 0.5, "b": 0.3, "ab": 0.2}
    canonical, text = chance["ab"], chance["ab"] + chance["a"] * chance["b"]
    assert -math.log2(canonical) > -math.log2(text)
    _, texts, floor = world_corpus(200, 20)
    fresh = World().documents(40, 777, "validation")
    assert texts == [document.text for document in fresh]
    assert floor == pytest.approx(
        bits_per_byte(sum(sum(document.surprisal) for document in fresh), sum(len(text.encode()) for text in texts))
    )


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one() -> None:
    texts = [document.text for document in World().documents(200, 0)]
    large = ByteLevelBPE.train(texts, 500, SPECIAL_TOKENS)
    small = first_tokens(large, 330)
    trained = ByteLevelBPE.train(texts, 330, SPECIAL_TOKENS)
    assert small.vocab == trained.vocab and small.merges == trained.merges
    assert [small.encode(text) for text in texts] == [trained.encode(text) for text in texts]
    assert large.special_tokens == small.special_tokens and small.vocab["<eos>"] == EOS_ID


def test_a_trained_model_beats_a_uniform_one_and_more_arithmetic_helps() -> None:
    train, unseen, floor = world_corpus(300, 10)
    tokenizer = ByteLevelBPE.train(train, 400, SPECIAL_TOKENS)
    bits = []
    for gflops in (0.5, 4.0):
        model, losses = train_on_texts(400, train, tokenizer.encode, gflops, CPU)
        assert losses[0] == pytest.approx(math.log(400), abs=0.3)
        seq_len = round(topic.ROW_BYTES / bytes_per_token(tokenizer.encode, train[:200]))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(topic.BATCH_SIZE, seq_len, dtype=torch.long))
        assert len(losses) == round(gflops * 1e9 / 3 / counter.get_total_flops())
        bits.append(text_bits(model, tokenizer.encode, unseen))
    uniform = math.log2(400) / bytes_per_token(tokenizer.encode, unseen)
    assert floor < bits[1] < bits[0] < uniform
    assert bits[1] < 0.8 * uniform


def test_texts_come_in_a_fresh_order_each_epoch_and_are_encoded_anew() -> None:
    calls: list[str] = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return [len(calls) + 10]

    found = list(itertools.islice(encoded_texts([*"abcde"], encode, 0), 15))
    epochs = [tuple(calls[at : at + 5]) for at in (0, 5, 10)]
    assert all(sorted(epoch) == [*"abcde"] for epoch in epochs) and len(set(epochs)) > 1
    assert found[4] == Text([15, EOS_ID]) and Ids.encode([1, 2]) == [1, 2]


# Which tokenizer


def test_fertility_and_what_is_lost_by_hand() -> None:
    texts = ["The cat sat, the cat sat."] * 3
    assert fertility(CharacterTokenizer.train(texts, 50), ["a cat"]) == (5 / 2, 1.0)
    wordpiece = WordPiece.train(["abc abc"], 20)
    assert unknown_share(wordpiece, ["abc xyz"]) == pytest.approx(3 / 7)
    assert unknown_share(ByteLevelBPE.train(texts, 260), ["привет"]) == 0
    unigram = Unigram.train(["abc abc abd"], 12)
    assert unknown_share(unigram, ["abc z"]) == pytest.approx(1 / 5)


def test_the_same_text_in_every_script_ends_its_four_sentences() -> None:
    for language, text in SCRIPTS.items():
        assert sum(text.count(mark) for mark in ".。।") == 4, language
    tokenizer = ByteLevelBPE.train([SCRIPTS["English"]] * 5, 400)
    for language in ("Greek", "Hindi", "Chinese"):  # scripts that training never showed cost a token a byte
        letters = "".join(SCRIPTS[language].split()).replace(".", "")
        assert len(tokenizer.encode(letters)) == len(letters.encode())


# Numbers


def test_numbers_are_cut_as_the_rules_say() -> None:
    assert from_the_left("12345") == ["12", "34", "5"] and from_the_right("12345") == ["1", "23", "45"]
    assert from_the_left("7") == from_the_right("7") == ["7"] and from_the_right("1234") == ["12", "34"]
    chunks = in_learnt_chunks(((0, 99), (0, 99)), 20, 0)
    assert all("".join(chunks(str(number))) == str(number) for number in range(199))
    assert {len(chunks(str(number))) for number in range(10, 100)} == {1, 2}  # some numbers are one token, some two


def test_sums_keep_held_out_pairs_out_and_mask_the_question() -> None:
    spans = ((3, 20), (0, 14))
    train = set(random_sums(spans, random.Random(0), 3000))
    assert {first for first, _ in train} == {*range(3, 21)} and {second for _, second in train} == {*range(15)}
    assert not train & set(random_sums(spans, random.Random(1), 300, "validation"))
    task = SumTask.build(list, spans)
    inputs, targets = task.batch([(3, 14)], [False])
    question = task.vocabulary.encode("3+14=")
    assert inputs.tolist() == [[1, *question, *task.vocabulary.encode("17")]]
    assert targets.tolist() == [[IGNORE] * 5 + [*task.vocabulary.encode("17"), EOS_ID]]
    spaced = SumTask.build(list, spans, 0.5)
    inputs, _ = spaced.batch([(3, 14)], [True])
    assert spaced.vocabulary.decode(inputs[0].tolist())[1:] == ["3", " +", " 1", "4", " =", " 1", "7"]
    apart = SumTask.build(list, spans, 0.5, glued=False)
    inputs, _ = apart.batch([(3, 14)], [True])
    assert apart.vocabulary.decode(inputs[0].tolist())[1:] == [*"3 + 14 = 17"]


def test_share_without_carry_by_hand() -> None:
    """Of 8 + 1, 8 + 2, 9 + 1, 9 + 2 one has no carry; 95 + 5 carries twice and 95 + 14 once, into the hundreds."""
    assert share_without_carry(((8, 9), (1, 2))) == 1 / 4
    assert share_without_carry(((95, 95), (5, 14))) == 0.0 and share_without_carry(((100, 989), (1, 9))) == 0.5


def test_single_digits_learn_sums_and_the_score_counts_whole_answers() -> None:
    task = SumTask.build(list, ((0, 9), (0, 9)))
    model = train_on_sums(task, 6.0, CPU, batch_size=16)
    assert sums_right(model, task, 60) > 0.25  # always the likeliest answer, 9: about 0.1

    def adder(inputs: torch.Tensor, wrong: bool = False) -> torch.Tensor:
        _, targets = task.batch(random_sums(task.spans, random.Random(1), 40, "validation"), [False] * 40)
        return torch.nn.functional.one_hot(targets.clamp(min=0) + wrong * (targets == EOS_ID), 40).float()

    class Oracle(torch.nn.Module):
        wrong = False

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return adder(inputs, self.wrong)

    oracle = Oracle()
    assert sums_right(oracle, task, 40) == 1.0
    oracle.wrong = True
    assert sums_right(oracle, task, 40) == 0.0


# Tokens without training, typing errors, correlation


def test_a_suspicion_counts_the_unseen_among_as_many_named() -> None:
    one = Suspicion([0.9, 0.1, 0.8, 0.7], [0, 0, 5, 0])
    assert [one.n_rarer(limit) for limit in (1, 5, 6)] == [3, 3, 4]
    assert [one.precision(limit) for limit in (1, 5, 6)] == [2 / 3, 2 / 3, 1.0]
    assert Suspicion([1.0], [3]).precision() == 0.0


def test_every_token_that_the_model_reads_is_counted() -> None:
    model = CausalTransformer(ModelConfig(d_model=16, n_heads=2, d_ff=16, n_layers=1), 6)
    counts = torch.zeros(6, dtype=torch.long)
    count_inputs(model, counts)
    model(torch.tensor([[1, 4, 4], [0, 4, 1]]))
    model(torch.tensor([[5]]))
    assert counts.tolist() == [1, 2, 0, 0, 3, 1]


def test_planted_untrained_tokens_are_the_most_suspicious() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(ModelConfig(d_model=16, n_heads=2, d_ff=16, n_layers=1), 30)
    unseen = [3, 7, 11]
    with torch.no_grad():
        model.lm_head.weight[[*unseen, 20, 21]] -= 0.5  # all unused outputs are pushed the same way
        model.token_emb.weight[[*unseen, 20, 21]] *= 0.1
    for name, scores in suspicions(model, [20, 21]).items():
        assert {*scores.topk(5).indices.tolist()} == {*unseen, 20, 21}, name


def test_a_vector_without_gradient_only_decays() -> None:
    """Derivation 5: unseen input rows are the initial ones times a known factor; unseen output rows are pushed."""
    texts, start = ["abcabc abcabc"] * 20, {}

    def remember(model: CausalTransformer) -> None:
        start["in"], start["out"] = (m.weight.detach().clone() for m in (model.token_emb, model.lm_head))

    model, losses = train_on_texts(40, texts, lambda text: [ord(char) % 32 for char in text], 0.05, CPU, remember)
    decay = decay_without_gradient(train_config(8, len(losses)))
    assert 0.5 < decay < 1 - 1e-4
    torch.testing.assert_close(model.token_emb.weight[33:], start["in"][33:] * decay)
    pushed = model.lm_head.weight[33:] - start["out"][33:] * decay
    assert pushed.norm(dim=1).min() > 0.05
    alike = torch.nn.functional.cosine_similarity(pushed[:1], pushed[1:])
    assert alike.min() > 0.9  # the gradient of every unseen output row is a sum of the same hidden states


def test_typos_swap_two_letters_inside_long_words_only() -> None:
    text = "The parameter of a set is called once again"
    spoilt = with_typos(text, 1.0, random.Random(0))
    for before, after in zip(text.split(), spoilt.split(), strict=True):
        assert sorted(before) == sorted(after) and len(before) == len(after)
        assert before[0] == after[0] and before[-1] == after[-1] and (len(before) > 3 or before == after)
    assert spoilt != text and with_typos(text, 0.0, random.Random(0)) == text


def test_correlation_equals_scipy_and_weights_are_repetitions() -> None:
    x, y = normal(9), normal(9, seed=1)
    assert correlation(x, y, torch.ones(9)) == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    weights = torch.tensor([1, 2, 3, 1, 1, 2, 1, 1, 4])
    repeated = [tensor.repeat_interleave(weights) for tensor in (x, y)]
    assert correlation(x, y, weights.double()) == pytest.approx(pearsonr(*repeated).statistic, abs=1e-12)


def test_shape_comments_are_true(checked_shapes) -> None:
    counts, _ = cooccurrences([list("abcab"), list("cba")], 2)
    task = SumTask.build(list, ((0, 9), (0, 9)))
    model = CausalTransformer(ModelConfig(d_model=16, n_heads=2, d_ff=16, n_layers=1), 40)
    with checked_shapes(topic) as checked:
        suspicions(model, [3, 4])
        sums_right(model, task, 5)
        correlation(normal(6), normal(6, seed=1), torch.ones(6).double())
        least_sgns_loss(counts, 2)
    assert len(checked) >= 9, sorted(checked)
