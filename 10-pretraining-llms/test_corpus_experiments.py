"""Topic 10: the corpus experiments measure what they say, with sizes that a test can afford."""

import json
import math
from dataclasses import replace

import pytest
import torch

import corpus_experiments
from corpus_experiments import (
    CORPUS_EXPERIMENTS,
    CorpusFiguresConfig,
    Unmasked,
    canary_ranks,
    clean_world,
    documents_of,
    fim_ids,
    gap_on,
    paragraph_ids,
    plot_canaries,
    plot_junk,
    raw,
    vocabulary,
)
from corpus_failures import CORPUS_BREAKS, deduplicate_before_normalising, padding_in_labels, search_by_letters
from packing import PackedBatches, PackedTransformer
from sequence_modeling import BOS_ID, EOS_ID, UNK_ID
from tiny_world import World, canary_text, random_canaries
from transformer_architecture import ModelConfig, held_out_documents
from workbench import RunConfig, seed_everything

TINY = ModelConfig(max_seq_len=512, d_model=16, n_layers=1, n_heads=2, d_ff=24)


@pytest.fixture
def small(tmp_path, monkeypatch) -> CorpusFiguresConfig:
    monkeypatch.setattr(corpus_experiments, "MODEL", TINY)
    return CorpusFiguresConfig(n_seeds=2, n_pages=70, n_steps=10, n_documents=20, n_pairs=20, folder=tmp_path)


def test_a_document_of_the_world_keeps_its_tokens_and_its_floor() -> None:
    for document in World().documents(50, 3):
        assert list(paragraph_ids(document.text)) == [BOS_ID, *vocabulary().encode(document.tokens)]


def test_other_text_is_spelled_and_cannot_write_special_tokens() -> None:
    ids = paragraph_ids("The <eos> Straße 中")
    letters = vocabulary().decode(ids[1:-1])
    assert letters[0] == "The" and letters[1:6] == ["<", "e", "o", "s", ">"] and letters[-1] == "<unk>"
    assert EOS_ID not in ids[:-1] and BOS_ID not in ids[1:] and ids[-2] == UNK_ID
    assert not set(ids) & set(fim_ids())
    assert documents_of(["Sum: 1 + 2 = 3.\n\n\n\nNo"]) == [list(paragraph_ids(t)) for t in ("Sum: 1 + 2 = 3.", "No")]


def test_ranks_equal_those_of_ten_thousand_whole_sentences() -> None:
    seed_everything(1)
    model = PackedTransformer(TINY, len(vocabulary())).eval()
    canaries = random_canaries(3, 0)
    prefix = paragraph_ids(canary_text("The secret number is"))[:-1]
    rows = torch.tensor([[*prefix, *vocabulary().encode(f"{number:04d}")] for number in range(10_000)])
    with torch.no_grad():
        some = torch.cat(
            [model(part)[:, -5:-1].double().log_softmax(-1) for part in rows.split(1000)]
        )  # (rows, 4, vocab)
    digits = vocabulary().encode("0123456789")
    within = some[..., digits].log_softmax(-1)  # (rows, 4, digits): among digits alone, as the ranks are
    columns = torch.tensor([[int(c) for c in f"{number:04d}"] for number in range(10_000)])
    scores = within.gather(2, columns[:, :, None]).sum(dim=(1, 2))  # (rows)
    numbers = [int("".join(c for c in canary if c.isdigit())) for canary in canaries]
    assert canary_ranks(model, canaries) == [1 + int((scores > scores[number] + 1e-9).sum()) for number in numbers]


def test_an_untrained_model_has_the_gap_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = PackedTransformer(TINY, len(vocabulary()))
    torch.nn.init.zeros_(model.lm_head.weight)
    documents = held_out_documents(20)
    floor = sum(sum(d.surprisal) for d in documents) / sum(len(d.tokens) for d in documents)
    assert gap_on(model, documents) == pytest.approx(math.log(len(vocabulary())) - floor, abs=1e-5)


def test_without_masks_the_rows_are_the_same() -> None:
    batches = PackedBatches(documents_of(raw(clean_world(70), 0))[:80], 4, 96, 0)
    masked, unmasked = batches(1), Unmasked(batches)(1)
    assert set(masked) - set(unmasked) == {"document_ids"}
    assert torch.equal(masked["inputs"], unmasked["inputs"])


@pytest.mark.parametrize("name", ["curve", "canaries", "leaks", "masks"])
def test_an_experiment_writes_its_table(name: str, small) -> None:
    CORPUS_EXPERIMENTS[name][0](replace(small, n_seeds=1), RunConfig(device="cpu", out=small.folder))
    results = json.loads((small.folder / "results.json").read_text())
    assert results
    for table in results.values():
        numbers = [x for row in table["rows"] for cell in row for x in (cell if isinstance(cell, list) else [cell])]
        assert all(math.isfinite(x) for x in numbers if not isinstance(x, str))
        assert table["command"].endswith(f"figures {name}")


def test_stages_and_one_filter_at_a_small_size(small, monkeypatch) -> None:
    monkeypatch.setattr(corpus_experiments, "LEFT_OUT", {"all stages": "", "raw": ""})
    monkeypatch.setattr(corpus_experiments, "MUCH", 1.0)
    small = replace(small, n_seeds=1)
    run = RunConfig(device="cpu", out=small.folder)
    CORPUS_EXPERIMENTS["stages"][0](small, run)
    CORPUS_EXPERIMENTS["filters"][0](small, run)
    results = json.loads((small.folder / "results.json").read_text())
    assert set(results) == {"corpus-stages", "corpus-recall", "corpus-filters"}
    (_, all_words, _, _), (_, raw_words, _, _) = results["corpus-filters"]["rows"]
    assert all_words[0] < 0.8 * raw_words[0]
    shares = {row[0]: row[2][0] for row in results["corpus-recall"]["rows"]}
    assert shares["leaked: verbatim"] == 1.0 and shares["near: 1% edited"] > shares["near: 20% edited"]


def test_plots_have_every_line() -> None:
    assert len(plot_junk([(0.1, [1.0], [1.0]), (0.5, [2.0], [1.1])]).axes[0].lines) >= 2
    assert len(plot_canaries({"a": [[1.0] * 7], "b": [[2.0] * 7]}).axes[0].lines) == 4


def test_failures_show_the_difference_they_claim(monkeypatch) -> None:
    import corpus_failures

    run = RunConfig(device="cpu")
    ((_, by_words, by_letters),) = search_by_letters(run)
    assert by_words == 1.0 and by_letters == 0.0
    ((_, sound, wrong),) = deduplicate_before_normalising(run)
    assert (sound, wrong) == (70, 100)
    monkeypatch.setattr(corpus_failures, "MODEL", TINY)
    monkeypatch.setattr(corpus_failures, "SETTINGS", replace(corpus_failures.SETTINGS, max_steps=12, warmup_steps=2))
    logged, share, _ = padding_in_labels(run)
    assert 0.1 < share[2] < 0.9 and logged[2] < logged[1]
    assert set(CORPUS_BREAKS) == {"padding-in-labels", "below-the-floor", "search-by-letters", "dedup-before-repair"}


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="n_pages must be finite and >= 70, got 5"):
        CorpusFiguresConfig(n_pages=5)
