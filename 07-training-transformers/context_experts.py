"""Topic 07 - Context experts: predict the next byte from counts of what followed the same context in the training text.

Contexts of many lengths and of words are counted by sorting; a small network learns how far to trust each of them, from
predictions in which every training paragraph is left out of its own counts. The speed-run's transformer corrects them:

python 07-training-transformers/speedrun.py

Papers: Cleary, Witten 1984, "Data compression using adaptive coding and partial string matching", the escape to shorter
contexts; Kneser, Ney 1995, and Chen, Goodman 1998, discounted counts; Mahoney 2005, PAQ, a network that mixes contexts.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes as symbols


class Alphabet:
    """The bytes of the training text, numbered; all other bytes share one last symbol and its probability evenly.

    So the 256 bytes always have probabilities that sum to 1, and a model needs an output only for bytes that occur.
    """

    def __init__(self, text: bytes) -> None:
        self.known = sorted(set(text))
        self.n_unknown = 256 - len(self.known)
        self.size = len(self.known) + (self.n_unknown > 0)
        self.symbol_of = torch.full((256,), len(self.known))
        self.symbol_of[self.known] = torch.arange(len(self.known))

    @property
    def letters(self) -> Tensor:
        """Which symbols words are made of (vocab)."""
        words = [re.fullmatch(rb"\w", bytes([byte])) is not None for byte in self.known]
        return torch.tensor(words + [False] * (self.size - len(words)))

    def encode(self, text: bytes) -> Tensor:
        return self.symbol_of[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]  # (seq)

    def byte_log_probs(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of symbols (..., vocab) as log-probabilities of the 256 bytes (..., 256)."""
        share = log_probs.new_zeros(self.size)
        if self.n_unknown:
            share[-1] = math.log(self.n_unknown)
        return (log_probs - share)[..., self.symbol_of]


# Counted contexts


HASH_BITS, PARAGRAPH_BITS, SYMBOL_BITS = 41, 14, 8  # 63 bits: paragraphs whose numbers agree in 14 bits count as one


def mixed(state: Tensor, value: Tensor) -> Tensor:
    """Fold one more integer into a 64-bit hash; multiplications wrap around."""
    state = (state ^ (state >> 29)) * -4658895280553007687 + (value + 1) * -7723592293110705685
    return state ^ (state >> 32)


def delayed(values: Tensor, n: int) -> Tensor:
    """The value n positions earlier; -1 before the beginning."""
    return F.pad(values, (n, 0), value=-1)[: len(values)]


def context_keys(names: Sequence[str], ids: Tensor, letters: Tensor) -> Iterator[Tensor]:
    """Yield, for each named kind of context, a hash (seq) of the context before each position of ids (seq).

    "7" is the last 7 symbols. "word" is what stands of the current word, and the last symbol; "word-1", "word-2" and
    "word-1-2" add the word before, the one before that, or both, whatever stands between them. `letters` (vocab) says
    which symbols words are made of.
    """
    begun, ended = word_hashes(ids, letters)
    for name in names:
        if name.isdigit():
            key = torch.zeros_like(ids)  # (seq)
            for n in range(1, int(name) + 1):
                key = mixed(key, delayed(ids, n))  # (seq)
        else:
            key = mixed(begun, delayed(ids, 1))  # (seq)
            for n in name.split("-")[1:]:
                key = mixed(key, ended[int(n) - 1] + int(n))  # (seq)
        yield key & ((1 << HASH_BITS) - 1)


def word_hashes(ids: Tensor, letters: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Hash of the begun word before each position, and of the last and the last but one word that ended before it.

    The polynomial hash of any stretch is a difference of two prefix sums: all words at once, without a loop over them.
    """
    multiplier = 6364136223846793005
    inverse = pow(multiplier, -1, 2**64)
    inverse -= 2**64 * (inverse >= 2**63)  # as a signed integer of 64 bits

    def powers(base: int) -> Tensor:
        return F.pad(torch.full((len(ids),), base), (1, 0), value=1).cumprod(0)

    places, inside, up = torch.arange(len(ids)), letters[ids], powers(multiplier)
    sums = F.pad(((ids + 1) * inside * powers(inverse)[1:]).cumsum(0), (1, 0))
    since = torch.where(inside, 0, places + 1).cummax(0).values  # where the word that a letter belongs to begins
    begun = (sums[:-1] - sums[F.pad(since[:-1], (1, 0))]) * up[:-1]  # (seq)
    ends = (F.pad(inside[:-1], (1, 0)) & ~inside).nonzero()[:, 0]
    words = F.pad((sums[ends] - sums[since[ends - 1]]) * up[ends], (2, 0))
    n_ended = torch.searchsorted(ends, places)  # words whose end was seen before the position
    return begun, [words[n_ended + 1], words[n_ended]]


def first_of_runs(sorted_keys: Tensor) -> Tensor:
    """True where a sorted sequence shows a new value."""
    return F.pad(sorted_keys[1:] != sorted_keys[:-1], (1, 0), value=True)


@dataclass
class Counts:
    """How often each symbol follows each context of one kind, and the part of it in each paragraph.

    Rows are contexts, entries are the symbols seen in them; "own" rows and entries count within one paragraph.
    """

    keys: Tensor  # (row): sorted hashes
    start: Tensor  # (row): the first entry
    n_entries: Tensor  # (row)
    evidence: Tensor  # (row, 3): occurrences, different symbols, symbols seen once
    symbol: Tensor  # (entry)
    count: Tensor  # (entry)
    row: Tensor  # (own row): the row that it is a part of
    own_start: Tensor  # (own row)
    n_own: Tensor  # (own row)
    own_evidence: Tensor  # (own row, 3): what the row's evidence loses without this paragraph
    entry: Tensor  # (own entry): the entry that it is a part of
    own_row: Tensor  # (own entry)
    own_symbol: Tensor  # (own entry)
    own_count: Tensor  # (own entry)
    seen: Tensor  # (seq): the own entry that counts each position of the training text


def concatenated(tables: list[Counts]) -> Counts:
    """Several tables as one, their rows and entries renumbered; what belongs to positions gets an axis of contexts."""
    sizes = [(len(t.start), len(t.count), len(t.own_start), len(t.own_count)) for t in tables]
    offsets = F.pad(torch.tensor(sizes).cumsum(0), (0, 0, 1, 0))[:-1].tolist()
    for table, (n_rows, n_entries, n_own_rows, n_own) in zip(tables, offsets, strict=True):
        table.row += n_rows
        table.start += n_entries
        table.entry += n_entries
        table.own_row += n_own_rows
        table.own_start += n_own
        table.seen += n_own
    parts = {name: [getattr(table, name) for table in tables] for name in Counts.__dataclass_fields__}
    return Counts(**{name: torch.stack(part, 1) if name == "seen" else torch.cat(part) for name, part in parts.items()})


def count_context(keys: Tensor, ids: Tensor, paragraph: Tensor) -> Counts:
    """Count the symbols after each context by sorting (context, paragraph, symbol) once as one integer.

    Shapes: keys, ids and paragraph (seq). Equal values stand side by side in a sorted sequence, so that numbering the
    rows is a running sum over "differs from the one before".
    """
    paragraph = paragraph & ((1 << PARAGRAPH_BITS) - 1)
    packed, order = ((keys << PARAGRAPH_BITS | paragraph) << SYMBOL_BITS | ids).sort()
    own_first = first_of_runs(packed).nonzero()[:, 0]  # (own_entry): where each own entry begins
    own_count = torch.diff(own_first, append=torch.tensor([len(packed)]))  # (own_entry)
    packed = packed[own_first]  # (own_entry)
    seen = torch.empty_like(order)
    seen[order] = torch.arange(len(own_first)).repeat_interleave(own_count)  # (seq)
    own_symbol = packed & ((1 << SYMBOL_BITS) - 1)  # (own_entry)
    own_row_begins = first_of_runs(packed >> SYMBOL_BITS)
    contexts = packed >> (SYMBOL_BITS + PARAGRAPH_BITS)
    row_begins = first_of_runs(contexts)
    own_row, row_of = own_row_begins.cumsum(0) - 1, row_begins.cumsum(0) - 1
    pairs, pair_order = (row_of << SYMBOL_BITS | own_symbol).sort()  # the paragraphs of one entry now stand together
    entry_begins = first_of_runs(pairs)
    entry = torch.empty_like(pair_order)
    entry[pair_order] = entry_begins.cumsum(0) - 1  # (own_entry)
    pairs = pairs[entry_begins]  # (entry)
    row_of_entry = pairs >> SYMBOL_BITS
    count = torch.zeros(len(pairs)).index_add_(0, entry, own_count.float())  # (entry)
    evidence = torch.stack([count, torch.ones_like(count), (count == 1).float()], dim=1)  # (entry, 3)
    total, mine = count[entry], own_count.float()  # (own_entry)
    lost = torch.stack([mine, (total == mine).float(), (total == 1).float() - (total - mine == 1).float()], dim=1)
    n_entries, n_own = torch.bincount(row_of_entry), torch.bincount(own_row)
    return Counts(
        keys=contexts[row_begins],
        start=n_entries.cumsum(0) - n_entries,
        n_entries=n_entries,
        evidence=torch.zeros(len(n_entries), 3).index_add_(0, row_of_entry, evidence),
        symbol=pairs & ((1 << SYMBOL_BITS) - 1),
        count=count,
        row=row_of[own_row_begins],
        own_start=n_own.cumsum(0) - n_own,
        n_own=n_own,
        own_evidence=torch.zeros(len(n_own), 3).index_add_(0, own_row, lost),
        entry=entry,
        own_row=own_row,
        own_symbol=own_symbol,
        own_count=mine,
        seen=seen,
    )


# Experts: the counts turned into predictions


CHAINS = (  # from short to long: a short one, one of all lengths, and one of words
    ("2", "3", "4"),
    ("2", "3", "4", "5", "6", "8", "10", "12", "16", "20", "24"),
    ("2", "3", "word", "word-2", "word-1", "word-1-2"),
)
BY_WORTH = "3 6 2 4 10 word-1 5 16 8 word 12 20 word-2 24 word-1-2".split()  # what a short budget counts first


def count_contexts(
    names: Sequence[str], ids: Tensor, paragraph: Tensor, letters: Tensor, enough: Callable[[], bool] = lambda: False
) -> dict[str, Counts]:
    """Count the named contexts of a training text (seq), one after the other, until there are `enough`."""
    tables = {}
    for name, keys in zip(names, context_keys(names, ids, letters), strict=True):
        tables[name] = count_context(keys, ids, paragraph)
        if enough():
            break
    return tables


class Experts(nn.Module):
    """Predict the next symbol from counted contexts, by one chain from short to long contexts for each expert.

    Along a chain p <- trust * (discounted counts of this context + freed mass * p) + (1 - trust) * p, from the uniform
    distribution on: Kneser and Ney's interpolation, except that `trust`, in (0, 1), is learned from the evidence (how
    often all the contexts were seen, with how many different symbols, how many of them once). The rule is linear in p,
    so an expert is a weighted sum of counts: only symbols that were seen cost anything. "Links" are the contexts of all
    chains, one after the other.
    """

    def __init__(self, tables: dict[str, Counts], alphabet: Alphabet, leave_out: bool = True) -> None:
        super().__init__()
        chains = [[name for name in chain if name in tables] for chain in CHAINS]
        chains = [chain for chain in chains if chain]
        self.names, self.keys = list(tables), [table.keys for table in tables.values()]
        self.table = concatenated(list(tables.values()))
        self.vocab_size, self.letters, self.leave_out = alphabet.size, alphabet.letters, leave_out
        self.n_experts, self.lengths = len(chains), [len(chain) for chain in chains]
        self.context_of = torch.tensor([self.names.index(name) for chain in chains for name in chain])
        self.longest = max(range(len(chains)), key=lambda index: self.lengths[index])  # the best single expert
        self.expert_of = torch.arange(len(chains)).repeat_interleave(torch.tensor(self.lengths))
        self.d_evidence, n_links = 4 * len(tables), len(self.context_of)
        self.linear = nn.Linear(self.d_evidence, n_links)
        self.mlp = nn.Sequential(nn.Linear(self.d_evidence, 48), nn.GELU(), nn.Linear(48, n_links))
        nn.init.zeros_(self.mlp[2].weight)
        self.discount = nn.Parameter(torch.full((n_links,), -1.0))  # before the sigmoid

    def look_up(self, ids: Tensor) -> Tensor:
        """The row of each context before each position of a text (seq, contexts); -1 where it was never counted."""
        found, offset = [], 0
        for known, keys in zip(self.keys, context_keys(self.names, ids, self.letters), strict=True):
            row = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
            found.append(torch.where(known[row] == keys, row + offset, -1))
            offset += len(known)
        return torch.stack(found, dim=1)  # (seq, contexts)

    @staticmethod
    def describe(evidence: Tensor) -> Tensor:
        """Evidence (tokens, contexts, 3) as numbers of moderate size (tokens, d_evidence)."""
        n, kinds, singles = evidence.unbind(-1)  # (tokens, contexts)
        parts = [n.clamp(min=1).log(), kinds.clamp(min=1).log(), (kinds == 1).float(), singles / kinds.clamp(min=1)]
        return torch.stack(parts, dim=-1).flatten(1)  # (tokens, evidence)

    def weights(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of a count (tokens, links) and of the uniform distribution (tokens, experts), so that an expert's
        p = sum over its links of weight * (count - discount) where the count is not 0, + rest / vocab.
        """
        described = self.describe(evidence)  # (tokens, evidence)
        n, kinds, _ = evidence[:, self.context_of].unbind(-1)  # (tokens, links)
        trust = torch.sigmoid(self.linear(described) + self.mlp(described)) * (n > 0)  # (tokens, links)
        weight = trust / n.clamp(min=1)  # (tokens, links)
        passed = 1 - trust + weight * self.discount.sigmoid() * kinds  # (tokens, links)
        later, rests = [], []
        for part in passed.split(self.lengths, dim=1):
            after = part.flip(1).cumprod(1).flip(1)  # what this link and all longer ones pass on
            later.append(F.pad(after[:, 1:], (0, 1), value=1.0))
            rests.append(after[:, 0])
        return weight * torch.cat(later, dim=1), torch.stack(rests, dim=1)

    def target_log_probs(self, evidence: Tensor, target_count: Tensor) -> Tensor:
        """Log-probability of the true symbol (tokens, experts), from its counts (tokens, contexts) alone: cheap."""
        weight, rest = self.weights(evidence)
        count = target_count[:, self.context_of]  # (tokens, links)
        terms = weight * (count - self.discount.sigmoid()) * (count > 0)  # (tokens, links)
        seen = torch.stack([part.sum(dim=1) for part in terms.split(self.lengths, dim=1)], dim=1)  # (tokens, experts)
        return torch.log(seen + rest / self.vocab_size)  # (tokens, experts)

    def learn_trust(self, done_share: Callable[[], float], generator: torch.Generator, batch_size: int = 512) -> None:
        """Fit trusts and discounts to the training text, each paragraph left out, until done_share() reaches 1."""
        optimizer, table = torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.0, fused=True), self.table
        while (done := done_share()) < 1:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - done)
            own = table.seen[torch.randint(len(table.seen), (batch_size,), generator=generator)]  # (tokens, contexts)
            count = table.count[table.entry[own]]  # (tokens, contexts)
            if self.leave_out:
                evidence, count = left_out(table, own), count - table.own_count[own]
            else:
                evidence = table.evidence[table.row[table.own_row[own]]]
            loss = -self.target_log_probs(evidence, count).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False)


@dataclass
class Reading:
    """The experts' predictions at the positions of one text.

    For the training text itself, each paragraph is left out of the counts that predict it. Otherwise the longest
    context would always seem right, having counted the answer itself, and trust would be learned in a world without
    anything new.
    """

    experts: Experts
    found: Tensor  # (seq, contexts): rows of the table, or if leave_out is set, own entries
    leave_out: bool

    @classmethod
    def of_training_text(cls, experts: Experts) -> "Reading":
        table = experts.table
        if experts.leave_out:
            return cls(experts, table.seen, leave_out=True)
        return cls(experts, table.row[table.own_row[table.seen]], leave_out=False)

    @classmethod
    def of_text(cls, experts: Experts, ids: Tensor) -> "Reading":
        return cls(experts, experts.look_up(ids), leave_out=False)

    @torch.no_grad()
    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (tokens, vocab, experts) and the described evidence (tokens, d_evidence) at (tokens)."""
        experts, table, found = self.experts, self.experts.table, self.found[positions]
        n_tokens, n_contexts = found.shape
        if self.leave_out:
            evidence = left_out(table, found)  # (tokens, contexts, 3)
            own_row = table.own_row[found]  # (tokens, contexts)
            row = table.row[own_row]  # (tokens, contexts)
        else:
            row, evidence = found, table.evidence[found] * (found >= 0)[..., None]
        weight, rest = experts.weights(evidence)
        by_row = torch.zeros(n_tokens, n_contexts, experts.n_experts)  # (tokens, contexts, experts)
        by_row[:, experts.context_of, experts.expert_of] = weight
        discount = torch.zeros(n_contexts, experts.n_experts)  # (contexts, experts)
        discount[experts.context_of, experts.expert_of] = experts.discount.sigmoid()
        freed, by_row = (by_row * discount).flatten(0, 1), by_row.flatten(0, 1)  # (tokens * contexts, experts)
        probs = (rest / experts.vocab_size).repeat_interleave(experts.vocab_size, dim=0)  # (tokens * vocab, experts)
        owner, entry = expand(row.flatten(), table.start, table.n_entries)
        cell = owner // n_contexts * experts.vocab_size + table.symbol[entry]
        probs.index_add_(0, cell, by_row[owner] * table.count[entry, None] - freed[owner])
        if self.leave_out:
            owner, own = expand(own_row.flatten(), table.own_start, table.n_own)
            cell = owner // n_contexts * experts.vocab_size + table.own_symbol[own]
            mine, total = table.own_count[own, None], table.count[table.entry[own], None]
            probs.index_add_(0, cell, by_row[owner] * mine - freed[owner] * (total == mine), alpha=-1)
        log_probs = probs.unflatten(0, (n_tokens, -1)).clamp(min=1e-9).log()  # (tokens, vocab, experts)
        return log_probs, experts.describe(evidence)


def left_out(table: Counts, own: Tensor) -> Tensor:
    """The evidence (tokens, contexts, 3) at training positions, given as own entries, without their own paragraph."""
    own_row = table.own_row[own]
    return table.evidence[table.row[own_row]] - table.own_evidence[own_row]


def expand(rows: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Every entry of the given rows, -1 for none: which of the rows it belongs to, and its place in the table."""
    n = length[rows] * (rows >= 0)
    owner = torch.arange(len(rows)).repeat_interleave(n)
    return owner, torch.arange(len(owner)) + (start[rows] - n.cumsum(0) + n)[owner]
