"""Proofs for topic 07's context experts: against dictionaries, recursion by definition, and recounting."""

import re
from collections import Counter, defaultdict

import pytest
import torch

import context_experts
from context_experts import (
    BY_WORTH,
    CHAINS,
    Alphabet,
    Experts,
    Reading,
    context_keys,
    count_context,
    count_contexts,
    left_out,
)

WORDS = "return the list of all names in a set or the first of them if it is true".split()


def made_text(n_paragraphs: int, seed: int) -> tuple[str, torch.Tensor]:
    """Paragraphs of 3 to 9 words that repeat each other here and there, and the paragraph of each byte."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int, n: int = 1) -> list[int]:
        return torch.randint(high, (n,), generator=generator).tolist()

    paragraphs = [" ".join(WORDS[i] for i in drawn(len(WORDS), 3 + drawn(7)[0])) + ".\n\n" for _ in range(n_paragraphs)]
    lengths = torch.tensor([len(paragraph) for paragraph in paragraphs])
    return "".join(paragraphs), torch.arange(n_paragraphs).repeat_interleave(lengths)


@pytest.fixture(scope="module")
def text() -> tuple[Alphabet, torch.Tensor, torch.Tensor]:
    string, paragraph = made_text(60, seed=0)
    alphabet = Alphabet(string.encode())
    return alphabet, alphabet.encode(string.encode()), paragraph


@pytest.fixture(scope="module")
def experts(text) -> Experts:
    """Experts with trusts that are not learned, but all different."""
    alphabet, ids, paragraph = text
    torch.manual_seed(0)
    made = Experts(count_contexts(BY_WORTH, ids, paragraph, alphabet.letters), alphabet)
    torch.nn.init.normal_(made.mlp[2].weight)
    torch.nn.init.normal_(made.discount)
    return made.requires_grad_(False)


def every_pair(ids: torch.Tensor, order: int) -> list[tuple[tuple[int, ...], int]]:
    """(context, next symbol) at every position; -1 stands before the text."""
    padded = [-1] * order + ids.tolist()
    return [(tuple(padded[i : i + order]), padded[i + order]) for i in range(len(ids))]


def test_byte_probabilities_sum_to_one_and_bytes_never_seen_share_one_symbol() -> None:
    alphabet = Alphabet(b"banana")
    log_probs = torch.randn(5, 7, alphabet.size, dtype=torch.float64).log_softmax(-1)
    by_byte = alphabet.byte_log_probs(log_probs)
    assert by_byte.shape == (5, 7, 256) and alphabet.size == 4
    torch.testing.assert_close(by_byte.exp().sum(-1), torch.ones(5, 7, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(by_byte[..., ord("n")], log_probs[..., 2])
    assert torch.equal(by_byte[..., 0], by_byte[..., 255])
    assert alphabet.encode(b"nab\xff").tolist() == [2, 0, 1, 3]
    full = Alphabet(bytes(range(256)))
    assert full.size == 256 and torch.equal(full.byte_log_probs(log := torch.randn(3, 256)), log)


@pytest.mark.parametrize("order", [2, 5])
def test_counts_equal_those_of_a_dictionary(text, order: int, parity) -> None:
    alphabet, ids, paragraph = text
    keys = next(context_keys([str(order)], ids, alphabet.letters))
    table = count_context(keys, ids, paragraph)
    pairs = every_pair(ids, order)
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for context, symbol in pairs:
        counts[context][symbol] += 1
    position = {context: i for i, (context, _) in enumerate(pairs)}
    assert len(table.keys) == len(counts)
    ours, theirs = [], []
    for context, i in sorted(position.items()):
        row = int(table.row[table.own_row[table.seen[i]]])
        entries = slice(int(table.start[row]), int(table.start[row] + table.n_entries[row]))
        ours.append([table.symbol[entries].tolist(), table.count[entries].tolist(), table.evidence[row].tolist()])
        found = sorted(counts[context].items())
        n, kinds = sum(counts[context].values()), len(found)
        singles = sum(count == 1 for _, count in found)
        theirs.append([[s for s, _ in found], [float(c) for _, c in found], [float(n), float(kinds), float(singles)]])
    parity("count_context", "collections.Counter", "output", ours, theirs, 0)


def test_evidence_without_the_own_paragraph_equals_counting_the_other_paragraphs(text, parity) -> None:
    alphabet, ids, paragraph = text
    table = count_context(next(context_keys(["3"], ids, alphabet.letters)), ids, paragraph)
    pairs = every_pair(ids, 3)
    chosen = range(0, len(ids), 7)
    theirs, counts = [], []
    for i in chosen:
        others = Counter(s for j, (c, s) in enumerate(pairs) if c == pairs[i][0] and paragraph[j] != paragraph[i])
        theirs.append([float(others.total()), float(len(others)), float(sum(n == 1 for n in others.values()))])
        counts.append(float(others[pairs[i][1]]))
    own = table.seen[list(chosen)]
    left = table.count[table.entry[own]] - table.own_count[own]
    parity("left_out", "recounting without the paragraph", "output", left_out(table, own), torch.tensor(theirs), 0)
    assert left.tolist() == counts
    assert min(row[0] for row in theirs) == 0 < max(counts)  # contexts of this paragraph alone, and others


@pytest.mark.parametrize("name", ["word", "word-1", "word-2", "word-1-2"])
def test_word_contexts_agree_exactly_where_the_words_agree(text, name: str) -> None:
    alphabet, ids, _ = text
    string = "".join(chr(alphabet.known[i]) for i in ids.tolist())[:900]
    keys = next(context_keys([name], ids[:900], alphabet.letters)).tolist()
    by_words: dict[tuple, set] = defaultdict(set)
    for i in range(len(string)):
        begun = re.search(r"\w*$", string[:i])[0]
        ended = ["", "", *re.findall(r"\w+", string[: i - len(begun)])]
        last = string[i - 1] if i else None
        by_words[begun, last, *(ended[-int(n)] for n in name.split("-")[1:])].add(keys[i])
    assert all(len(found) == 1 for found in by_words.values())
    assert len(set(keys)) == len(by_words) > 40


def by_definition(experts: Experts, tables: dict[str, dict]) -> torch.Tensor:
    """p <- trust (discounted counts + freed mass p) + (1 - trust) p along each chain: (vocab, experts)."""
    evidence = torch.stack([tables[name]["evidence"] for name in experts.names])[None]
    described = experts.describe(evidence)
    trusts = torch.sigmoid(experts.linear(described) + experts.mlp(described))[0]
    discounts, link, columns = experts.discount.sigmoid(), 0, []
    for length in experts.lengths:
        p = torch.full((experts.vocab_size,), 1 / experts.vocab_size)
        for _ in range(length):
            counts = tables[experts.names[int(experts.context_of[link])]]["counts"]
            if counts.sum():
                held = (counts - discounts[link]).clamp(min=0) / counts.sum()
                freed = discounts[link] * (counts > 0).sum() / counts.sum()
                p = trusts[link] * (held + freed * p) + (1 - trusts[link]) * p
            link += 1
        columns.append(p)
    return torch.stack(columns, dim=1)


def test_experts_equal_the_recursion_by_definition_and_sum_to_one(text, experts, parity) -> None:
    alphabet, ids, paragraph = text
    keys = dict(zip(experts.names, context_keys(experts.names, ids, alphabet.letters), strict=True))
    reading, theirs = Reading.of_training_text(experts), []
    chosen = torch.arange(0, len(ids), 29)
    for i in chosen.tolist():
        tables = {}
        for name, key in keys.items():
            same = (key == key[i]) & (paragraph != paragraph[i])
            counts = torch.bincount(ids[same], minlength=alphabet.size).float()
            evidence = torch.stack([counts.sum(), (counts > 0).sum(), (counts == 1).sum()])
            tables[name] = {"counts": counts, "evidence": evidence}
        theirs.append(by_definition(experts, tables))
    log_probs, _ = reading(chosen)
    parity("Experts", "the chain by definition", "output", log_probs.exp(), torch.stack(theirs), 1e-5)
    assert len(CHAINS) == log_probs.shape[2] == 3
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(chosen), 3), atol=1e-5, rtol=0)


def test_the_cheap_probability_of_the_true_symbol_is_the_one_of_the_full_prediction(text, experts) -> None:
    _, ids, _ = text
    own, table = experts.table.seen, experts.table
    cheap = experts.target_log_probs(left_out(table, own), table.count[table.entry[own]] - table.own_count[own])
    full = Reading.of_training_text(experts)(torch.arange(len(ids)))[0]
    true = full.gather(1, ids[:, None, None].expand(-1, 1, 3))[:, 0]
    torch.testing.assert_close(cheap.exp(), true.exp(), atol=1e-6, rtol=0)


def test_a_new_text_is_read_with_all_counts_and_without_its_future(text, experts) -> None:
    alphabet, ids, _ = text
    new = ids[200:320].clone()
    log_probs, evidence = Reading.of_text(experts, new)(torch.arange(120))
    changed = new.clone()
    changed[80:] = changed[80:].flip(0)
    again, evidence_again = Reading.of_text(experts, changed)(torch.arange(120))
    assert torch.equal(log_probs[:81], again[:81]) and torch.equal(evidence[:81], evidence_again[:81])
    assert not torch.equal(log_probs[81:], again[81:])
    assert torch.isfinite(log_probs).all()


def test_trust_learned_without_the_own_paragraph_is_better_on_new_text(text) -> None:
    """The trap that leaving out avoids: with its own counts, the longest context always seems right."""
    alphabet, ids, paragraph = text
    new = alphabet.encode(made_text(20, seed=1)[0].encode())
    losses = {}
    for leave_out in (True, False):
        torch.manual_seed(0)
        made = Experts(count_contexts(BY_WORTH, ids, paragraph, alphabet.letters), alphabet, leave_out)
        steps = iter(range(101))
        made.learn_trust(lambda steps=steps: next(steps) / 100, torch.Generator().manual_seed(0), batch_size=256)
        log_probs, _ = Reading.of_text(made, new)(torch.arange(len(new)))
        losses[leave_out] = -log_probs[..., made.longest].gather(1, new[:, None]).mean().item()
    assert losses[True] < losses[False] - 0.05


def test_counting_stops_when_there_is_enough(text) -> None:
    alphabet, ids, paragraph = text
    answers = iter([False, True])
    tables = count_contexts(BY_WORTH, ids, paragraph, alphabet.letters, lambda: next(answers))
    assert list(tables) == BY_WORTH[:2]
    few = Experts(tables, alphabet)
    assert few.n_experts == 3 and few.lengths == [1, 2, 1]  # each chain keeps what was counted
    log_probs, _ = Reading.of_training_text(few)(torch.arange(50))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(50, 3), atol=1e-5, rtol=0)


def test_shape_comments_hold(text, checked_shapes) -> None:
    alphabet, ids, paragraph = text
    with checked_shapes(context_experts) as checked:
        made = Experts(count_contexts(["2", "word-1"], ids, paragraph, alphabet.letters), alphabet)
        steps = iter(range(3))
        made.learn_trust(lambda: next(steps) / 2, torch.Generator().manual_seed(0), batch_size=5)
        Reading.of_training_text(made)(torch.arange(11))
        Reading.of_text(made, ids[:70])(torch.arange(13))
    assert len(checked) > 25
