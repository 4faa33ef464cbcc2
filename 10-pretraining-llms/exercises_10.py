"""Exercises of topic 10: write each function in a file of your own, then

python 10-pretraining-llms/exercises_10.py my_answers.py
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import random
from collections.abc import Callable

import numpy as np

from corpus_pipeline import mixture
from deduplication import PRIME, Decontaminator, MinHashConfig, MinHasher, plain_words
from manual_parallel import chunk_given
from pipeline_parallel import order_of
from workbench import Exercise, first_difference, grade

# MinHash


def minhash(values: list[int], factors: list[int], shifts: list[int], prime: int) -> list[int]:
    return [min((a * x + b) % prime for x in values) for a, b in zip(factors, shifts, strict=True)]


def check_minhash(answer: Callable) -> str | None:
    cases = {
        "one value, one function": ([5], [3], [4], 11),
        "two functions with different least values": ([1, 2, 3], [3, 5], [4, 0], 11),
        "the order of the values": ([3, 1, 2], [3, 5], [4, 0], 11),
        "products far beyond 32 bits": ([2**32 - 1, 2**31, 77], [2**32 - 5, 123_456_789], [2**32 - 1, 9], PRIME),
    }
    for name, case in cases.items():
        got = answer(*(list(part) if isinstance(part, list) else part for part in case))
        if difference := first_difference(got, minhash(*case), 0.0):
            return f"{name}: {difference}"
    return None


def minhash_with(choose: Callable) -> Callable:
    """A wrong solution: another choice among a function's values."""

    def wrong(values, factors, shifts, prime):
        return [choose([(a * x + b) % prime for x in values]) for a, b in zip(factors, shifts, strict=True)]

    return wrong


def least_before_hashing(values, factors, shifts, prime):
    return [(a * min(values) + b) % prime for a, b in zip(factors, shifts, strict=True)]


def least_of_all(values, factors, shifts, prime):
    return [min(minhash(values, factors, shifts, prime))] * len(factors)


def remainder_after_the_least(values, factors, shifts, prime):
    return [min(a * x + b for x in values) % prime for a, b in zip(factors, shifts, strict=True)]


# Bands


def candidate_pairs(signatures: list[list[int]], n_bands: int, n_rows: int) -> list[tuple[int, int]]:
    found = set()
    for band in range(n_bands):
        buckets: dict[tuple, list[int]] = {}
        for number, signature in enumerate(signatures):
            buckets.setdefault(tuple(signature[band * n_rows : (band + 1) * n_rows]), []).append(number)
        for members in buckets.values():
            found |= {(a, b) for place, b in enumerate(members) for a in members[:place]}
    return sorted(found)


def pairs_by_brute_force(signatures: list[list[int]], n_bands: int, n_rows: int) -> list[tuple[int, int]]:
    """Every pair, every band: what the buckets must find."""

    def meet(a: list[int], b: list[int]) -> bool:
        starts = range(0, n_bands * n_rows, n_rows)
        return any(a[start : start + n_rows] == b[start : start + n_rows] for start in starts)

    numbers = range(len(signatures))
    return [(a, b) for a in numbers for b in numbers if a < b and meet(signatures[a], signatures[b])]


def check_candidate_pairs(answer: Callable) -> str | None:
    rng = np.random.default_rng(0)
    hasher = MinHasher(MinHashConfig(n_bands=4, n_rows=2, shingle_size=1))
    texts = ["a b c d e", "a b c d f", "a b c x y", "p q r", "a b c d e"]
    cases = {
        "equal in one row of each band only": ([[1, 2, 3, 4], [1, 9, 3, 8]], 2, 2),
        "the same numbers in different bands": ([[1, 2, 3, 4], [3, 4, 9, 9]], 2, 2),
        "equal across the border of two bands": ([[1, 2, 3, 4], [9, 2, 3, 8]], 2, 2),
        "equal in the second band": ([[1, 2, 3, 4], [7, 8, 3, 4], [7, 9, 3, 5]], 2, 2),
        "three that meet in different bands": ([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 5, 6]], 2, 2),
        "one row to a band": (rng.integers(0, 4, (7, 3)).tolist(), 3, 1),
        "random signatures": (rng.integers(0, 2, (9, 6)).tolist(), 2, 3),
        "five texts": ([[int(x) for x in hasher(text)] for text in texts], 4, 2),
    }
    for name, (signatures, n_bands, n_rows) in cases.items():
        got, want = answer([list(row) for row in signatures], n_bands, n_rows), None
        want = pairs_by_brute_force(signatures, n_bands, n_rows)
        if not isinstance(got, list) or [tuple(pair) for pair in got] != want:
            return f"{name}, {n_bands} bands of {n_rows}: {got!r}, expected {want}"
    return None


def pairs_if(meet: Callable) -> Callable:
    """A wrong solution: another condition for a pair."""

    def wrong(signatures, n_bands, n_rows):
        numbers = range(len(signatures))
        return [
            (a, b) for a in numbers for b in numbers if a < b and meet(signatures[a], signatures[b], n_bands, n_rows)
        ]

    return wrong


def one_table_for_all_bands(a, b, n_bands, n_rows):
    bands = [{tuple(row[n * n_rows : (n + 1) * n_rows]) for n in range(n_bands)} for row in (a, b)]
    return bool(bands[0] & bands[1])


def at_any_place(a, b, n_bands, n_rows):
    return any(a[at : at + n_rows] == b[at : at + n_rows] for at in range(n_bands * n_rows - n_rows + 1))


# Mixing


def mixture_weights(sizes: list[int], temperature: float) -> list[float]:
    largest = max(sizes)
    powers = [(size / largest) ** (1 / temperature) if size else 0.0 for size in sizes]
    return [power / sum(powers) for power in powers]


def check_mixture_weights(answer: Callable) -> str | None:
    cases = {
        "as they come": ([900, 100], 1.0),
        "temperature 2": ([900, 100], 2.0),
        "temperature 4, three sources": ([10_000, 16, 1], 4.0),
        "colder than 1": ([3, 1], 0.5),
        "an empty source": ([5, 0, 20], 2.0),
        "sizes of trillions and a small temperature": ([10**13, 10**12], 0.02),
    }
    for name, (sizes, temperature) in cases.items():
        want = list(mixture({str(place): size for place, size in enumerate(sizes)}, temperature).values())
        if difference := first_difference(answer(list(sizes), temperature), want, 1e-9):
            return f"{name}, sizes {sizes}, T = {temperature}: {difference}"
    return None


def mixed_by(power: Callable) -> Callable:
    """A wrong solution: another function of size and temperature, normalised."""

    def wrong(sizes, temperature):
        powers = [power(size, temperature) for size in sizes]
        return [value / sum(powers) for value in powers]

    return wrong


def not_normalised_again(sizes, temperature):
    return [(size / sum(sizes)) ** (1 / temperature) for size in sizes]


# Contamination


def is_contaminated(page: list[str], evaluation: list[str], n: int, least: int) -> bool:
    length = min(n, len(evaluation))
    if length < least:
        return False
    runs = {tuple(evaluation[at : at + length]) for at in range(len(evaluation) - length + 1)}
    return any(tuple(page[at : at + length]) in runs for at in range(len(page) - length + 1))


def check_is_contaminated(answer: Callable) -> str | None:
    words = [f"w{number}" for number in range(20)]
    cases = {
        "13 words in a row": (["x", *words[4:17], "y"], words),
        "12 words in a row": (["x", *words[4:16], "y"], words),
        "the run is the end of the page": (["x", *words[7:]], words),
        "all words, in another order": (words[::-1], words),
        "all words, one foreign word after each sixth": ([*words[:6], "x", *words[6:12], "x", *words[12:]], words),
        "a short evaluation text, whole": (["x", *words[:9], "y"], words[:9]),
        "a short evaluation text, but for a word": (["x", *words[:8], "y"], words[:9]),
        "an evaluation text too short to look for": (words[:7], words[:7]),
        "an empty page": ([], words),
    }
    for name, (page, evaluation) in cases.items():
        want = Decontaminator([" ".join(evaluation)], 13, 8).shared(" ".join(page)) is not None
        got = answer(list(page), list(evaluation), 13, 8)
        if got is not want:
            return f"{name}: {got!r}, expected {want}"
    return None if plain_words("A b") == ["a", "b"] else "the checker itself is broken"


def by_common_words(page, evaluation, n, least):
    return len(evaluation) >= least and len(set(page) & set(evaluation)) >= min(n, len(evaluation))


def runs_of(change: int) -> Callable:
    """A wrong solution: runs that are longer or shorter by one word."""
    return lambda page, evaluation, n, least: is_contaminated(page, evaluation, n + change, least)


def never_the_last_run(page, evaluation, n, least):
    return is_contaminated(page[:-1], evaluation, n, least)


def forgets_short_texts(page, evaluation, n, least):
    return len(evaluation) >= n and is_contaminated(page, evaluation, n, least)


# Rows for training out of whole documents


def packed_row(documents: list[list[int]], seq_len: int) -> tuple[list[int], list[int], list[int]]:
    inputs, targets, document_ids = [], [], []
    for number, ids in enumerate(documents, start=1):
        inputs += ids[:-1]
        targets += ids[1:]
        document_ids += [number] * (len(ids) - 1)
    free = seq_len - len(inputs)
    return inputs + [0] * free, targets + [-100] * free, document_ids + [0] * free


def check_packed_row(answer: Callable) -> str | None:
    rng = random.Random(0)
    cases = [([[1, 5, 6, 1]], 3), ([[1, 5, 6, 1], [1, 7, 1]], 9), ([[1, 1], [1, 0, 9, 1]], 6)]
    for _ in range(30):
        documents = [[1, *(rng.randrange(12) for _ in range(rng.randint(0, 6))), 1] for _ in range(rng.randint(1, 4))]
        cases.append((documents, sum(map(len, documents)) - len(documents) + rng.randint(0, 5)))
    for documents, seq_len in cases:
        given = [list(document) for document in documents]
        got = answer(given, seq_len)
        if given != documents:
            return "the documents that were given have been changed"
        if not (isinstance(got, tuple | list) and len(got) == 3):
            return f"expected (inputs, targets, document_ids), got {got!r}"
        for name, found, wanted in zip(
            ("inputs", "targets", "document_ids"), got, packed_row(documents, seq_len), strict=True
        ):
            if list(found) != wanted:
                return f"{name} of {documents} in a row of {seq_len}: got {list(found)}, expected {wanted}"
    return None


def row_across_documents(documents: list[list[int]], seq_len: int) -> tuple[list[int], list[int], list[int]]:
    """Concatenate first, shift afterwards: the last input of a document then predicts the start of the next."""
    stream = [token for ids in documents for token in ids]
    numbers = [number for number, ids in enumerate(documents, start=1) for _ in ids]
    free = max(0, seq_len - len(stream) + 1)
    inputs = (stream[:-1] + [0] * free)[:seq_len]
    return inputs, (stream[1:] + [-100] * free)[:seq_len], (numbers[:-1] + [0] * free)[:seq_len]


def row_with_padding_in_the_labels(documents: list[list[int]], seq_len: int) -> tuple[list[int], list[int], list[int]]:
    inputs, targets, document_ids = packed_row(documents, seq_len)
    return inputs, [0 if target == -100 else target for target in targets], document_ids


def row_that_masks_by_id(documents: list[list[int]], seq_len: int) -> tuple[list[int], list[int], list[int]]:
    """Take token 0 for padding wherever it stands: a real token 0 is then never learned."""
    inputs, targets, document_ids = packed_row(documents, seq_len)
    return inputs, [-100 if target == 0 else target for target in targets], document_ids


def row_of_one_document(documents: list[list[int]], seq_len: int) -> tuple[list[int], list[int], list[int]]:
    inputs, targets, document_ids = packed_row(documents, seq_len)
    return inputs, targets, [min(number, 1) for number in document_ids]


# A ring on paper


def ring_reduce_scatter(vectors: list[list[float]]) -> tuple[list[float], list[list[int]]]:
    size, state = len(vectors), [list(vector) for vector in vectors]
    sent: list[list[int]] = [[] for _ in range(size)]
    for hop in range(size - 1):
        given = [(rank - hop - 1) % size for rank in range(size)]
        messages = [state[rank][given[rank]] for rank in range(size)]
        for rank in range(size):
            state[(rank + 1) % size][given[rank]] += messages[rank]
            sent[rank].append(given[rank])
    return [state[rank][rank] for rank in range(size)], sent


def check_ring_reduce_scatter(answer: Callable) -> str | None:
    cases = {
        "two processes": [[1, 2], [10, 20]],
        "three processes": [[1, 2, 3], [10, 20, 30], [100, 200, 300]],
        "five processes": [[10**rank * (chunk + 1) for chunk in range(5)] for rank in range(5)],
        "one process": [[7]],
    }
    for name, vectors in cases.items():
        given = [list(vector) for vector in vectors]
        got = answer(vectors)
        if vectors != given:
            return f"{name}: it changed the vectors that it was given; work on a copy"
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"{name}: expected (sums, sent), got {got!r}"
        sums, sent = got
        want = [sum(vector[chunk] for vector in given) for chunk in range(len(given))]
        if difference := first_difference(list(sums), want, 1e-9):
            return f"{name}, sums: {difference}"
        if advice := replay(given, sent, want):
            return f"{name}, sent: {advice}"
    return None


def replay(vectors: list[list[float]], sent: list[list[int]], want: list[float]) -> str | None:
    """Send what `sent` says around the ring and see whether every chunk comes home complete."""
    size, state = len(vectors), [list(vector) for vector in vectors]
    if len(sent) != size or any(len(chunks) != size - 1 for chunks in sent):
        return f"each of the {size} processes sends {size - 1} chunks, got {[len(chunks) for chunks in sent]}"
    for hop in range(size - 1):
        messages = [state[rank][sent[rank][hop]] for rank in range(size)]
        for rank in range(size):
            state[(rank + 1) % size][sent[rank][hop]] += messages[rank]
    for rank in range(size):
        if state[rank][rank] != want[rank]:
            return f"sent so, process {rank} ends with {state[rank][rank]} in chunk {rank} instead of {want[rank]}"
    return None


def ring_with(chunk_of: Callable, n_hops: Callable = lambda size: size - 1) -> Callable:
    """A wrong solution: right sums, another order or number of messages."""

    def wrong(vectors):
        size = len(vectors)
        sent = [[chunk_of(rank, hop, size) % size for hop in range(n_hops(size))] for rank in range(size)]
        return ring_reduce_scatter(vectors)[0], sent

    return wrong


def adds_in_place_of_snapshots(vectors):
    """Every process sends after its neighbour has already added: what it passes on counts twice."""
    size, state = len(vectors), [list(vector) for vector in vectors]
    for hop in range(size - 1):
        for rank in range(size):
            chunk = chunk_given(rank, hop, size, gathering=False)
            state[(rank + 1) % size][chunk] += state[rank][chunk]
    sums = [state[rank][(rank + 1) % size] for rank in range(size)]
    return sums, ring_reduce_scatter(vectors)[1]


# One forward, one backward


def one_f_one_b(stage: int, n_stages: int, n_micro: int) -> list[tuple[str, int]]:
    ahead = min(n_micro, n_stages - stage)
    events = [("F", index) for index in range(ahead)]
    for index in range(n_micro):
        events.append(("B", index))
        if ahead + index < n_micro:
            events.append(("F", ahead + index))
    return events


def check_one_f_one_b(answer: Callable) -> str | None:
    for n_stages, n_micro in ((1, 3), (2, 1), (2, 4), (4, 8), (4, 2), (3, 3)):
        for stage in range(n_stages):
            got = answer(stage, n_stages, n_micro)
            want = order_of("1f1b", stage, n_stages, n_micro)
            case = f"stage {stage} of {n_stages}, {n_micro} micro-batches"
            if not isinstance(got, list | tuple) or any(len(event) != 2 for event in got):
                return f"{case}: expected a list of pairs such as ('F', 0), got {got!r}"
            got = [tuple(event) for event in got]
            if sorted(got) != sorted(want):
                return f"{case}: every micro-batch goes forward once and backward once, got {got}"
            for position, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                if ours != theirs:
                    return f"{case}: event {position} is {ours}, expected {theirs}"
    return None


def with_ahead(ahead_of: Callable) -> Callable:
    """A wrong solution: another number of forward passes before the first backward pass."""

    def wrong(stage, n_stages, n_micro):
        ahead = max(1, min(n_micro, ahead_of(stage, n_stages, n_micro)))
        events = [("F", index) for index in range(ahead)]
        for index in range(n_micro):
            events.append(("B", index))
            if ahead + index < n_micro:
                events.append(("F", ahead + index))
        return events

    return wrong


EXERCISES = [
    Exercise(
        name="minhash",
        statement="The MinHash signature of a set of hashed shingles: for each function the least (a x + b) mod prime.",
        signature="minhash(values, factors, shifts, prime) -> list of ints, one for each (factor, shift)",
        hint="Take the remainder before the least, and one least value per function.",
        check=check_minhash,
        solution=minhash,
        mistakes={
            "the greatest value": minhash_with(max),
            "the value of the first shingle": minhash_with(lambda values: values[0]),
            "the least shingle, hashed": least_before_hashing,
            "one least value for all functions": least_of_all,
            "the remainder of the least": remainder_after_the_least,
        },
    ),
    Exercise(
        name="candidate_pairs",
        statement="All pairs (a, b), a < b, of signatures that agree in every row of at least one band, sorted.",
        signature="candidate_pairs(signatures, n_bands, n_rows) -> list of (int, int)",
        hint="One table of buckets for each band; the key of a bucket is the tuple of the band's rows.",
        check=check_candidate_pairs,
        solution=candidate_pairs,
        mistakes={
            "one equal row is enough": pairs_if(lambda a, b, *_: any(x == y for x, y in zip(a, b, strict=True))),
            "all bands must agree": pairs_if(lambda a, b, *_: a == b),
            "one table for all bands": pairs_if(one_table_for_all_bands),
            "bands that begin anywhere": pairs_if(at_any_place),
            "only neighbours in a bucket": lambda signatures, n_bands, n_rows: [
                pair for pair in candidate_pairs(signatures, n_bands, n_rows) if pair[1] == pair[0] + 1
            ],
        },
    ),
    Exercise(
        name="mixture_weights",
        statement="How often each source is drawn: proportional to size^(1/T). An empty source is never drawn.",
        signature="mixture_weights(sizes, temperature) -> list of floats that add up to 1",
        hint="Divide by the largest size before you raise to a power: 10^13 to the 50th is no float.",
        check=check_mixture_weights,
        solution=mixture_weights,
        mistakes={
            "to the power T": mixed_by(lambda size, temperature: (size / 1e13) ** temperature),
            "divided by T": mixed_by(lambda size, temperature: size / temperature),
            "shares to a power, not normalised again": not_normalised_again,
            "the power overflows": mixed_by(lambda size, temperature: float(size) ** (1 / temperature)),
            "equal weights": mixed_by(lambda size, temperature: 1.0),
        },
    ),
    Exercise(
        name="is_contaminated",
        statement=(
            "Whether a page shares a run of n words with an evaluation text. A shorter text is looked for "
            "as a whole, one of fewer than `least` words not at all."
        ),
        signature="is_contaminated(page, evaluation, n, least) -> bool; page, evaluation: lists of words",
        hint="Put the runs of the evaluation text into a set. A list of m words has m - n + 1 runs of n.",
        check=check_is_contaminated,
        solution=is_contaminated,
        mistakes={
            "common words in any order": by_common_words,
            "runs of n + 1 words": runs_of(1),
            "runs of n - 1 words": runs_of(-1),
            "the last run of the page is missed": never_the_last_run,
            "short evaluation texts are forgotten": forgets_short_texts,
        },
    ),
    Exercise(
        name="packed_row",
        statement=(
            "Put whole documents, each a list of ids from its first token to its last, into one training row of "
            "seq_len positions. Position i of a document predicts its next id; nothing predicts across documents. "
            "Number the documents from 1; free positions at the end have input 0, target -100 and number 0."
        ),
        signature="packed_row(documents, seq_len) -> (inputs, targets, document_ids), three lists of length seq_len",
        hint="A document of n ids takes n - 1 positions.",
        check=check_packed_row,
        solution=packed_row,
        mistakes={
            "predicts across documents": row_across_documents,
            "padding in the labels": row_with_padding_in_the_labels,
            "takes every 0 for padding": row_that_masks_by_id,
            "one number for all documents": row_of_one_document,
        },
    ),
    Exercise(
        name="ring_reduce_scatter",
        statement=(
            "vectors[rank][chunk] is one number for each chunk of each process. Reduce-scatter them around a ring: in "
            "every hop each process sends one chunk to rank + 1, all at once. Process r must end with the sum of chunk "
            "r. Return the sums, by rank, and for each process the chunks that it sent, in the order of the hops."
        ),
        signature="ring_reduce_scatter(vectors) -> (list of sums, list of lists of chunk numbers)",
        hint="Chunk c must come home to process c last: where does it start? Take all messages of a hop before adding.",
        check=check_ring_reduce_scatter,
        solution=ring_reduce_scatter,
        mistakes={
            "chunks end one process too early": ring_with(lambda rank, hop, size: rank - hop),
            "every process sends its own chunk away first and forwards upwards": ring_with(
                lambda rank, hop, size: rank + hop + 1
            ),
            "one hop too many": ring_with(lambda rank, hop, size: rank - hop - 1, lambda size: size),
            "messages are taken after the neighbour has added": adds_in_place_of_snapshots,
            "the sum of chunk r + 1": lambda vectors: (
                [sum(vector[(rank + 1) % len(vectors)] for vector in vectors) for rank in range(len(vectors))],
                ring_reduce_scatter(vectors)[1],
            ),
        },
    ),
    Exercise(
        name="one_f_one_b",
        statement=(
            "The order of a pipeline stage under 1F1B, as pairs ('F', i) and ('B', i): as many forward passes as "
            "stages lie from this one to the last, itself included, but no more than there are micro-batches; then "
            "backward and forward passes in turns; then the backward passes that are left."
        ),
        signature="one_f_one_b(stage, n_stages, n_micro) -> list of (kind, micro-batch); stages count from 0",
        hint="The last stage goes F0 B0 F1 B1. Write it with one number: how many forward passes come first.",
        check=check_one_f_one_b,
        solution=one_f_one_b,
        mistakes={
            "GPipe: all forward passes first": with_ahead(lambda stage, n_stages, n_micro: n_micro),
            "the warm-up leaves itself out": with_ahead(lambda stage, n_stages, n_micro: n_stages - stage - 1),
            "the warm-up grows with the stage": with_ahead(lambda stage, n_stages, n_micro: stage + 1),
            "every stage warms up alike": with_ahead(lambda stage, n_stages, n_micro: n_stages),
            "the backward passes run from the last micro-batch to the first": lambda stage, n_stages, n_micro: (
                [("F", index) for index in range(n_micro)] + [("B", index) for index in reversed(range(n_micro))]
            ),
        },
    ),
]


if __name__ == "__main__":
    grade(EXERCISES)
