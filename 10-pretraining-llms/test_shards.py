"""Topic 10: shards on the disk, what damages them, and the batches drawn from them."""

import json
import random
import tracemalloc

import numpy as np
import pytest
import torch

import shards as topic
from packing import IGNORE, PackedBatches
from shards import DamagedShard, ShardBatches, Shards, best_fit_rows, stream_rows, stream_texts, write_shards

END = 1


def some_documents(n: int = 60, vocab_size: int = 300, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[END, *(rng.randrange(2, vocab_size) for _ in range(rng.randint(1, 23))), END] for _ in range(n)]


@pytest.fixture
def corpus(tmp_path) -> Shards:
    return write_shards(some_documents(), tmp_path / "corpus", 300, "abc", "a test", shard_tokens=200)


def test_documents_come_back_from_several_shards(corpus: Shards, parity) -> None:
    documents = some_documents()
    assert len(corpus.entries) > 3 and len(corpus) == len(documents)
    assert corpus.n_tokens == sum(map(len, documents))
    read = [corpus[index].tolist() for index in range(len(corpus))]
    parity("Shards", "the documents written", "exchange", sum(read, []), sum(documents, []), 0)
    assert read == documents
    with pytest.raises(IndexError):
        corpus[len(corpus)]


@pytest.mark.parametrize("vocab_size, width", [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_two_bytes_while_they_fit(tmp_path, vocab_size: int, width: int) -> None:
    corpus = write_shards([[1, vocab_size - 1, 1]], tmp_path / "c", vocab_size, "abc", "a test")
    assert (tmp_path / "c" / corpus.entries[0].ids).stat().st_size == 3 * width
    assert corpus[0].tolist() == [1, vocab_size - 1, 1]


def test_ids_are_mapped_and_not_read(corpus: Shards) -> None:
    assert all(isinstance(ids, np.memmap) and ids.mode == "r" for ids in corpus.ids)


@pytest.mark.parametrize("part", ["ids", "lengths"])
def test_every_flipped_byte_is_found(corpus: Shards, part: str) -> None:
    corpus.verify()
    path = corpus.folder / getattr(corpus.entries[1], part)
    data = bytearray(path.read_bytes())
    for position in (0, len(data) // 2, len(data) - 1):
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedShard, match=path.name):
            Shards(corpus.folder).verify()
        data[position] ^= 1
    path.write_bytes(data)
    Shards(corpus.folder).verify()


def test_a_truncated_a_missing_and_an_absent_file_are_named(corpus: Shards, tmp_path) -> None:
    path = corpus.folder / corpus.entries[2].ids
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedShard, match=f"{path.name} has {len(data) - 1} bytes, expected {len(data)}"):
        Shards(corpus.folder)
    path.unlink()
    with pytest.raises(DamagedShard, match=f"{path.name} is missing"):
        Shards(corpus.folder)
    with pytest.raises(ValueError, match="holds no corpus"):
        Shards(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: "{", "is no manifest"),
        (lambda m: json.dumps({**m, "format": 9}), "format 9"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "shards"}), "is no manifest"),
        (lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "ids": "../secret"}]}), "not a file of its folder"),
        (lambda m: json.dumps({**m, "id_type": "<f8"}), "id_type"),
        (lambda m: "[]", "is no manifest"),
        (lambda m: "[" * 100_000, "is no manifest"),
    ],
)
def test_a_manifest_that_is_none_is_refused(corpus: Shards, change, message: str) -> None:
    path = corpus.folder / topic.MANIFEST
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        Shards(corpus.folder)


def test_nothing_half_written_looks_whole(tmp_path) -> None:
    def broken():
        yield from some_documents(40)
        raise OSError("the source went away")

    with pytest.raises(OSError):
        write_shards(broken(), tmp_path / "c", 300, "abc", "a test", shard_tokens=100)
    with pytest.raises(ValueError, match="holds no corpus"):
        Shards(tmp_path / "c")
    assert len(write_shards(some_documents(), tmp_path / "c", 300, "abc", "a test", shard_tokens=100)) == 60


def test_a_shard_is_full_with_as_many_ids_as_were_asked_for() -> None:
    documents = [[1, 2, 3, 4]] * 5
    assert [len(shard) for shard in topic.cut_into_shards(documents, 8)] == [2, 2, 1]
    assert [len(shard) for shard in topic.cut_into_shards(documents, 9)] == [3, 2]


def test_documents_behind_65_536_ids_are_found(tmp_path) -> None:
    documents = [np.full(40_000, number) for number in (3, 4, 5)]
    corpus = write_shards(documents, tmp_path / "long", 9, "x", "test")
    assert len(corpus.entries) == 1 and [set(corpus[index].tolist()) for index in range(3)] == [{3}, {4}, {5}]


def test_lengths_that_do_not_add_up_are_damage(corpus: Shards) -> None:
    path = corpus.folder / corpus.entries[0].lengths
    lengths = np.fromfile(path, dtype="<u4")
    (lengths + (np.arange(len(lengths)) == 0)).astype("<u4").tofile(path)  # as many bytes, one id too many
    with pytest.raises(DamagedShard, match="does not add up to"):
        Shards(corpus.folder)


def test_blank_rows_of_a_stream_are_no_documents() -> None:
    rows = [{"text": " \n"}, {"text": None}, {"text": "One day."}]
    sides = [list(topic.side_of_stream(iter(rows), "x", split, "text")) for split in ("train", "validation")]
    assert sorted(sides) == [[], ["One day."]]


def test_bad_documents_and_a_second_corpus_are_refused(corpus: Shards, tmp_path) -> None:
    with pytest.raises(ValueError, match="already holds a corpus"):
        write_shards(some_documents(), corpus.folder, 300, "abc", "a test")
    for documents, message in (
        ([[1, 300, 1]], "id 300"),
        ([[1, -1]], "id -1"),
        ([[1]], "fewer than two"),
        ([], "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(documents, tmp_path / "bad", 300, "abc", "a test")
    with pytest.raises(ValueError, match="another|not by"):
        corpus.check_tokenizer("def")
    corpus.check_tokenizer("abc")


# Batches


@pytest.mark.parametrize("packing", topic.PACKINGS)
def test_an_epoch_shows_every_pair_of_neighbours_once(corpus: Shards, packing: str) -> None:
    batches = ShardBatches(corpus, 4, 16, seed=3, packing=packing)
    wanted = sorted((a, b) for document in some_documents() for a, b in zip(document, document[1:], strict=False))
    for epoch in range(2):
        found = []
        for step in range(epoch * batches.order.n_batches, (epoch + 1) * batches.order.n_batches):
            batch = batches(step)
            counted = batch["targets"] != topic.IGNORE
            found += zip(batch["inputs"][counted].tolist(), batch["targets"][counted].tolist(), strict=True)
        assert sorted(found) == wanted


@pytest.mark.parametrize("packing", topic.PACKINGS)
def test_document_ids_separate_documents(corpus: Shards, packing: str) -> None:
    batch = ShardBatches(corpus, 5, 24, seed=0, packing=packing)(1)  # 24: no document is longer
    for inputs, targets, numbers in zip(*(batch[name] for name in ("inputs", "targets", "document_ids")), strict=True):
        for position in range(23):
            same = numbers[position] == numbers[position + 1]
            if numbers[position] and same:
                assert targets[position] == inputs[position + 1]
            elif numbers[position] and numbers[position + 1]:
                assert targets[position] == END
                assert inputs[position + 1] == END  # the next document begins
        assert ((numbers == 0) == (targets == topic.IGNORE)).all()


def test_best_fit_is_topic_seven_s(tmp_path, parity) -> None:
    documents = some_documents(50)
    ours = ShardBatches(write_shards(documents, tmp_path / "c", 300, "abc", "a test"), 6, 32, seed=5)
    theirs = PackedBatches(documents, 6, 32, seed=5)
    for step in (0, 3, 9):
        for name, tensor in theirs(step).items():
            same = ours(step)[name]
            if name == "targets" or name == "document_ids":
                assert torch.equal(same, tensor)
            else:
                assert torch.equal(same[ours(step)["document_ids"] > 0], tensor[theirs(step)["document_ids"] > 0])


def test_a_stream_has_no_padding_but_at_its_end(corpus: Shards) -> None:
    lengths = [7, 2, 30, 5]
    rows = stream_rows(lengths, 8)
    used = [sum(len(piece) - 1 for piece in row) for row in rows]
    assert used == [8] * (len(rows) - 1) + [sum(lengths) - 4 - 8 * (len(rows) - 1)]
    assert ShardBatches(corpus, 2, 16, 0, "stream").used_share > ShardBatches(corpus, 2, 16, 0).used_share > 0.8
    one_by_one = ShardBatches(corpus, 1, 16, 0)
    targets = torch.cat([one_by_one(step)["targets"] for step in range(len(one_by_one.rows))])  # an epoch
    assert one_by_one.used_share == pytest.approx((targets != IGNORE).double().mean().item())


def test_long_documents_are_cut_and_lose_nothing() -> None:
    pieces = [piece for row in best_fit_rows([50], 8) for piece in row]
    pairs = sorted(index for piece in pieces for index in range(piece.start, piece.stop - 1))
    assert pairs == list(range(49))


def test_batches_depend_on_seed_and_step_alone(corpus: Shards) -> None:
    first, again = (ShardBatches(corpus, 4, 16, seed=1) for _ in range(2))
    other = ShardBatches(corpus, 4, 16, seed=2)
    later = again(7)  # without the steps before it
    for step in range(7):
        first(step)
    assert all(torch.equal(first(7)[name], later[name]) for name in later)
    assert not torch.equal(other(7)["inputs"], later["inputs"])
    with pytest.raises(ValueError, match="batch_size"):
        ShardBatches(corpus, 1000, 16, seed=0)
    with pytest.raises(ValueError, match="best-fit"):
        ShardBatches(corpus, 4, 16, 0, packing="best")


# Streams


def test_streams_read_files_and_split_them_by_content(tmp_path) -> None:
    texts = [f"text number {number} of a file" for number in range(200)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    train, held_out = (list(stream_texts(str(path), split, "body")) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(texts) and 5 < len(held_out) < 40
    with pytest.raises(ValueError, match=r"no column 'text' in row 0; columns are body"):
        list(stream_texts(str(path)))
    with pytest.raises(ValueError, match="cannot be streamed"):
        list(stream_texts(str(tmp_path / "absent.jsonl")))


def test_a_stream_reads_only_what_is_taken(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    good = "".join(json.dumps({"text": f"number {number}" + " word" * 400}) + "\n" for number in range(12_000))
    path.write_text(good + "this is no JSON\n")  # 24 MB; the library reads 10 MB at a time
    taken = [text for text, _ in zip(stream_texts(str(path)), range(100), strict=False)]
    assert len(taken) == 100  # the bad last line was never parsed
    with pytest.raises(ValueError, match="cannot be read on after row"):
        list(stream_texts(str(path)))


def test_a_corpus_may_be_larger_than_memory(corpus: Shards) -> None:
    """A corpus of a gigabyte (a file with holes) is opened and drawn from in a hundredth of that."""
    entry, n_tokens = corpus.entries[0], 500_000_000
    (corpus.folder / entry.lengths).write_bytes(np.full(500, n_tokens // 500, dtype="<u4").tobytes())
    with open(corpus.folder / entry.ids, "wb") as file:
        file.truncate(2 * n_tokens)
    manifest = json.loads((corpus.folder / topic.MANIFEST).read_text())
    manifest["shards"] = [{**manifest["shards"][0], "n_documents": 500, "n_tokens": n_tokens}]
    (corpus.folder / topic.MANIFEST).write_text(json.dumps(manifest))
    tracemalloc.start()
    batches = ShardBatches(Shards(corpus.folder), 4, 100_000, 0)
    assert [batches(step)["inputs"].shape for step in range(3)] == [(4, 100_000)] * 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # 9.6 MB are the batch itself


def test_ids_that_are_no_whole_numbers_and_empty_rows_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="ids must be whole numbers, got float64 in shard 0"):
        write_shards([[1.5, 2.0]], tmp_path / "a", 9, "x", "test")
    with pytest.raises(ValueError, match="a document is one row of ids, got 2 axes in shard 0"):
        write_shards([[[1, 2], [3, 4]]], tmp_path / "a", 9, "x", "test")
    corpus = write_shards([[1, 2, 3]], tmp_path / "b", 9, "x", "test")
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        ShardBatches(corpus, 1, 0, seed=0)


def test_a_document_that_fills_its_rows_leaves_no_piece_that_predicts_nothing() -> None:
    rows = best_fit_rows([9, 17], 8)
    assert sorted((piece.start, piece.stop) for row in rows for piece in row) == [(0, 9), (9, 18), (17, 26)]
