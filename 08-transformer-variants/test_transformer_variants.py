"""Topic 08: the objectives learn, gaps are filled as Bayes' rule says, folders of any kind load, the verbs answer."""

import collections
import json
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

import transformer_variants as topic
import variant_pretraining as core
from bert_family import BertConfig, BertForMaskedLM, BertForSequenceClassification, MaskingConfig
from gpt2 import GPT2, GPT2Config
from sequence_modeling import BOS_ID, EOS_ID, IGNORE, PAD_ID
from t5 import T5, T5Config, restore_spans
from tiny_world import SPECIAL_TOKENS, held_out, join, words
from training_transformers import TrainConfig
from transformer_variants import KINDS, class_for, fill_text, load_tokenizer, main, save_tokenizer, world_says
from variant_pretraining import (
    MASK_ID,
    SENTINELS,
    VARIANTS,
    CausalBatches,
    MaskedBatches,
    Slot,
    SpanBatches,
    VariantConfig,
    acceptability,
    causal_fill_in,
    fill_in,
    possible,
    pretrain_for,
    read_classes,
    recall_slots,
    score,
    sentinel_ids,
    slots,
    span_fill_in,
    special_ids,
    step_flops,
    training_documents,
    word_world,
)

SMALL = VariantConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, max_seq_len=96)
FLAGS = "--d-model 16 --n-layers 2 --n-heads 2 --d-ff 24 --max-steps 3 --batch-size 4 --n-slots 3".split()


# The data and the objectives


def test_every_model_reads_the_same_documents_and_no_step_repeats() -> None:
    rows = [training_documents(step, 0, 4) for step in range(20)]
    decoded = [join(word_world()[1].decode(row[1:-1])) for group in rows for row in group]
    assert not any(map(held_out, decoded)), "nothing of the other side of the split"
    lengths = [max(map(len, group)) for group in rows]
    assert lengths[:8] != sorted(lengths[:8]), "which lengths come first is drawn"
    assert rows[3] == training_documents(3, 0, 4) and rows[3] != training_documents(3, 1, 4)
    texts = [tuple(row) for group in rows for row in group]
    assert len(set(texts)) > 0.97 * len(texts) and all(row[0] == BOS_ID and row[-1] == EOS_ID for row in texts)
    inputs = MaskedBatches(4, 0)(3)
    restored = torch.where(inputs["targets"] == IGNORE, inputs["inputs"], inputs["targets"])
    assert torch.equal(restored, core.padded(rows[3]))
    causal = CausalBatches(4, 0)(3)
    assert torch.equal(causal["inputs"][:, 1:], causal["targets"][:, :-1].clamp(min=0))
    assert [row[row >= 0].tolist() for row in causal["targets"]] == [row[1:] for row in rows[3]]
    spans = SpanBatches(4, 0)(3)
    for source, target, row in zip(spans["inputs"].tolist(), spans["targets"].tolist(), rows[3], strict=True):
        source, target = ([index for index in ids if index not in (PAD_ID, IGNORE)] for ids in (source, target))
        assert source[-1] == target[-1] == EOS_ID
        assert restore_spans(source, target[:-1], sentinel_ids()) == row[1:]


def test_short_texts_have_one_gap_of_any_place_and_length_and_long_ones_several() -> None:
    first, lengths, places = sentinel_ids()[0], set(), []
    for step in range(24):
        batch = SpanBatches(8, 0)(step)
        for source, target in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
            assert sum(index >= first for index in target) == 2  # the gap's sentinel, and the last
            lengths.add(sum(index >= 0 for index in target) - 3)
            places.append(source.index(first) / sum(index != PAD_ID for index in source))
    assert lengths == {1, 2, 3, 4, 5, 6} and 0.4 < sum(places) / len(places) < 0.6
    long = core.Corpus(300, frozenset(), list(range(260, 292)), lambda *_: [[BOS_ID, *range(100, 200), EOS_ID]])
    target = SpanBatches(1, 0, corpus=long)(0)["targets"][0]
    assert (target >= 260).sum() == 6  # 15 % in pieces of three
    two = {core.one_span([8, 9], torch.Generator().manual_seed(seed)) for seed in range(20)}
    assert two == {(0, 1), (1, 2)}, "one of two tokens stays, either"


def test_masked_batches_hide_words_alone() -> None:
    batch = MaskedBatches(8, 0, MaskingConfig(0.5))(0)
    chosen = batch["targets"] != IGNORE
    assert not set(batch["targets"][chosen].tolist()) & special_ids()
    assert MASK_ID in special_ids() and len(special_ids()) == len(SPECIAL_TOKENS) + len(SENTINELS)
    assert torch.equal(batch["real"], batch["inputs"] != PAD_ID)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_sums_over_the_targets(name) -> None:
    torch.manual_seed(0)
    variant = VARIANTS[name]
    model = variant.build(SMALL, len(word_world()[1])).eval()
    for parameter in model.parameters():  # far from the start, where attention to padding would hardly show
        parameter.data += 0.2 * torch.randn_like(parameter)
    batch = variant.batches(6, 0)(0)
    whole, count = variant.loss_fn(model, batch)
    assert count == (batch["targets"] != IGNORE).sum() > 0
    if name != "electra":  # whose discriminator's part is a mean over the batch
        parts = [
            variant.loss_fn(model, {key: value[rows] for key, value in batch.items()})[0]
            for rows in ([0, 1], [2, 3, 4, 5])
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
        assert (whole / count).item() == pytest.approx(math.log(len(word_world()[1])), rel=0.35)
        alone = 0.0  # each row without its padding
        for index in range(6):
            row = {key: value[index : index + 1] for key, value in batch.items()}
            if "real" in row:
                n = int(row["real"].sum())
                row |= {
                    key: row[key][:, :n] for key in ("inputs", "real") + ("targets",) * (name not in ("t5", "bart"))
                }
            alone += variant.loss_fn(model, row)[0].item()
        assert alone == pytest.approx(whole.item(), rel=1e-5)
    assert variant.loss_fn(model, batch)[0].item() == pytest.approx(whole.item(), rel=1e-6)  # also an ELECTRA's draws


def test_electras_loss_is_the_papers_times_the_number_of_masked_tokens() -> None:
    from bert_family import electra_loss

    torch.manual_seed(0)
    variant = VARIANTS["electra"]
    model, batch = variant.build(SMALL, len(word_world()[1])).eval(), variant.batches(6, 0)(0)
    total, count = variant.loss_fn(model, batch)
    generator = torch.Generator().manual_seed(int(batch["draws"][0]))
    output = model(batch["inputs"], batch["targets"], batch["real"], generator)
    expected = electra_loss(output, batch["targets"], batch["real"])
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_flops_of_a_step_by_hand() -> None:
    """Forward products of a GPT-2 times three, except that nothing flows back into the embedding's look-up."""
    model, batches = VARIANTS["gpt2"].build(SMALL, 384), CausalBatches(4, 0)
    batch, seq = batches(0)["inputs"].shape
    d, d_ff, n_layers, vocab = 16, 24, 2, model.config.vocab_size
    block = 8 * d * d + 4 * d * d_ff + 4 * seq * d
    assert step_flops(model, batches, VARIANTS["gpt2"].loss_fn, 1) == 3 * batch * seq * (
        n_layers * block + 2 * d * vocab
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "electra"])
def test_training_beats_a_uniform_guess(name) -> None:
    item = pretrain_for(name, SMALL, 6e8, 8, 0, learning_rate=1e-2, log_every=1)
    uniform = math.log(len(word_world()[1]))
    first, last = item.losses[0], sum(item.losses[-5:]) / 5
    assert 0.9 * 6e8 < item.flops <= 6e8 and item.steps == len(item.losses) and not item.model.training
    if name == "electra":  # whose loss holds 50 ln 2 for the discriminator
        assert last < first - 5
    else:
        assert last < uniform - 0.6 and abs(first - uniform) < 1.2
    if name == "bert":
        assert score(fill_in(item.model, slots(24)), slots(24)).nats < uniform - 0.5


def test_the_seed_decides_the_model() -> None:
    models = [pretrain_for("gpt2", SMALL, 6e7, 4, seed).model for seed in (3, 3, 4)]
    first, again, other = (model.token_emb.weight for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_own_texts_are_cut_to_what_a_model_reads(tmp_path) -> None:
    class Numbers:
        vocab = range(300)
        encode = staticmethod(lambda text: list(range(100, 100 + int(text))))

    path = tmp_path / "numbers.txt"
    path.write_text("\n\n".join(str(n) for n in [13] + list(range(10, 60))))
    corpus = core.text_corpus(str(path), "train", Numbers, 16)
    lengths = {len(row) for step in range(40) for row in corpus.documents(step, 0, 8)}
    assert max(lengths) == 14 and min(lengths) == 4, "with both ends and room for two sentinels; no piece of one token"


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a budget of 10 FLOPs is less than one step of bert, .*; raise it"):
        pretrain_for("bert", SMALL, 10, 8, 0)
    with pytest.raises(ValueError, match="unknown model 'brt'; did you mean 'bert'"):
        pretrain_for("brt", SMALL, 1e9, 8, 0)


# Filling in


def test_slots_hold_the_worlds_posterior() -> None:
    for slot in slots(42):
        assert sum(slot.posterior.values()) == pytest.approx(1) and slot.posterior[slot.truth] > 0
        assert slot.posterior == word_world()[0].fill_in(slot.tokens, slot.position)
        assert held_out(join(slot.tokens[:-1])) and slot.truth != "<eos>"
    for slot in recall_slots(10):
        assert slot.posterior == {slot.truth: 1.0} and slot.tokens[-2:] == [".", "<eos>"]
        assert word_world()[0].next_token(slot.tokens[: slot.position]) == {slot.truth: 1.0}


def test_a_causal_model_fills_in_by_bayes_rule() -> None:
    """Against the likelihood of every whole document, without caches and one token at a time."""
    torch.manual_seed(0)
    model, vocabulary = VARIANTS["gpt2"].build(SMALL, len(word_world()[1])).double().eval(), word_world()[1]
    slot = min(slots(20), key=lambda slot: len(slot.tokens))
    likelihoods = []
    for token_id in range(len(vocabulary)):
        ids = [BOS_ID, *slot.token_ids]
        ids[slot.position + 1] = token_id
        row = torch.tensor([ids])
        likelihoods.append(-F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum"))
    expected = torch.stack(likelihoods).log_softmax(dim=0)
    assert torch.allclose(causal_fill_in(model, slot), expected, atol=1e-10)


def test_an_encoder_decoder_fills_in_by_what_it_would_write() -> None:
    torch.manual_seed(0)
    model, sentinels = VARIANTS["t5"].build(SMALL, len(word_world()[1])).double().eval(), sentinel_ids()
    slot = slots(5)[2]
    ids = list(slot.token_ids)
    ids[slot.position] = sentinels[0]
    source = torch.tensor([ids])
    scores = []
    for token_id in range(len(word_world()[1])):
        target = torch.tensor([[sentinels[0], token_id, sentinels[1]]])
        logits = model(source, model.shift_right(target))[0]
        nats = F.cross_entropy(logits, target[0], reduction="none")
        scores.append(-nats[1:].sum())
    assert torch.allclose(span_fill_in(model, slot), torch.stack(scores).log_softmax(dim=0), atol=1e-10)


def test_a_masked_model_sees_every_token_but_the_gap() -> None:
    torch.manual_seed(0)
    model = VARIANTS["bert"].build(SMALL, len(word_world()[1])).eval()
    chosen = slots(6)
    together = fill_in(model, chosen)
    for row, slot in zip(together, chosen, strict=True):
        ids = torch.tensor([[BOS_ID, *slot.token_ids]])
        ids[0, slot.position + 1] = MASK_ID
        assert torch.allclose(row, model(ids)[0, slot.position + 1].log_softmax(-1), atol=1e-5)


def test_scores_of_known_beliefs() -> None:
    vocabulary = word_world()[1]
    slot = Slot(["One", "day", "<eos>"], 1, {"day": 0.75, "night": 0.25})
    row = torch.full((1, len(vocabulary)), -math.inf)
    row[0, vocabulary.encode(["day", "night"])] = torch.tensor([0.75, 0.25]).log()
    result = score(row, [slot])
    assert result.accuracy == result.best_accuracy == 0.75 and result.gap == pytest.approx(0, abs=1e-6)
    row[0, vocabulary.encode(["day", "night"])] = torch.tensor([0.25, 0.75]).log()
    result = score(row, [slot])
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert result.accuracy == 0.25 and result.best_nats == pytest.approx(entropy)
    assert result.gap == pytest.approx(0.5 * math.log(3), abs=1e-6)


def test_the_world_answers_for_documents_with_one_gap() -> None:
    found = world_says("The [MASK] sing because they were sad.")
    assert sum(found.values()) == pytest.approx(1) and all(word.endswith("s") for word in found)
    assert world_says("The [MASK] sing") == pytest.approx(found)
    assert world_says("The [MASK] [MASK] because they were sad.") is None and world_says("Zoe [MASK]") is None


# Folders and tokenizers


def test_our_tokenizer_is_the_vocabulary_of_the_world(tmp_path) -> None:
    vocabulary = word_world()[1]
    for kind, start, end in (("bert", [BOS_ID], []), ("t5", [], [EOS_ID]), ("bart", [], [EOS_ID])):
        save_tokenizer(tmp_path / kind, kind)
        tokenizer = load_tokenizer(tmp_path / kind)
        for document in word_world()[0].documents(50, 3):
            tokens = document.tokens[:-1]
            assert tokenizer(join(tokens))["input_ids"] == [*start, *vocabulary.encode(tokens), *end]
            assert words(tokenizer.decode(vocabulary.encode(tokens))) == tokens
        assert tokenizer.get_vocab() == vocabulary.ids and tokenizer.mask_token_id == MASK_ID
        assert tokenizer("<mask> <extra_3>")["input_ids"] == [*start, *vocabulary.encode(["<mask>", "<extra_3>"]), *end]


def test_a_pretrained_folder_works_in_their_library(tmp_path, capsys) -> None:
    main(["pretrain", "--model", "gpt2", *FLAGS, "--out", str(tmp_path), "--device", "cpu"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    ids = tokenizer("One morning", return_tensors="pt")
    answer = theirs.generate(**ids, do_sample=False, max_new_tokens=9)[0]
    capsys.readouterr()
    options = ["--out", str(tmp_path), "--temperature", "0", "--max-new-tokens", "9", "--device", "cpu"]
    main(["generate", "One morning", *options])
    assert capsys.readouterr().out.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_a_setting_that_a_folder_leaves_out_has_their_default(kind) -> None:
    """Heads and layers that no tensor's shape tells would be wrong without a word."""
    ours, theirs = kind.config_of({}, {}), getattr(transformers, kind.architecture).config_class()
    expected = {name: getattr(theirs, key) for name, key in kind.config_names.items() if hasattr(theirs, key)}
    if kind.model_type == "roberta":
        expected["max_seq_len"] -= theirs.pad_token_id + 1
    assert len(expected) > 8 and {name: getattr(ours, name) for name in expected} == expected


IDS, IMAGES = torch.arange(10, 19)[None], torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def dropped(model, kind: type, monkeypatch) -> collections.Counter:
    """The shapes of all that dropout gets in one forward pass, how often each."""
    found = collections.Counter()

    def note(x: torch.Tensor, p: float = 0.5, *_, **__) -> torch.Tensor:
        found[tuple(x.shape)] += p > 0
        return x

    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # whose dropout of the weights is seen
    arguments = [IMAGES if kind.model_type in ("vit", "deit") else IDS]
    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", note)
        if kind.model_type in ("t5", "bart"):
            model(*arguments, **{"tgt_ids" if isinstance(model, kind) else "decoder_input_ids": IDS})
        else:
            model(*arguments)
    return +found


def more_than_theirs(kind: type) -> collections.Counter:
    """Two papers' own code drops in places that Hugging Face left out; their released models have a rate of 0.

    ALBERT's, the output of every feed-forward network; the Vision Transformer's, the hidden units.
    """
    if kind.model_type == "albert":
        return collections.Counter({(1, 9, 24): 2})
    tokens = {"vit": 17, "deit": 18}.get(kind.model_type)
    return collections.Counter({(1, tokens, 20): 2} if tokens else {})


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_the_dropout_of_a_folder_is_ours_in_every_place(kind, tmp_path, parity, monkeypatch) -> None:
    """A name that the folder leaves out gets Hugging Face's 0.1: their training would go on with noise unasked for."""
    names = {"hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    names |= {"dropout", "attention_dropout", "dropout_rate"}
    known = {"vocab_size": 67, "d_model": 24, "n_heads": 3, "n_layers": 2, "n_encoder_layers": 1, "d_ff": 20}
    for dropout in (0.25, 0.0):
        torch.manual_seed(0)
        sizes = {name: value for name, value in known.items() if name in kind.config_class.__dataclass_fields__}
        ours = kind(kind.config_class(**sizes, dropout=dropout))
        ours.save_pretrained(tmp_path)
        theirs = getattr(transformers, kind.architecture).from_pretrained(tmp_path).train()
        found = {name: value for name, value in theirs.config.to_dict().items() if name in names}
        assert found and set(found.values()) == {dropout}, found
        if dropout:
            places = [dropped(model, kind, monkeypatch) for model in (ours.train(), theirs)]
            assert places[0] - places[1] == more_than_theirs(kind)
            head = (
                [(1, 24)] if kind.__name__ == "AlbertForPreTraining" else []
            )  # a rate of its own, not ALBERT's paper's
            assert list(places[1] - places[0]) == head
            assert sum(places[1].values()) > 3
    given, ids = (IMAGES if hasattr(ours, "patch_proj") else IDS,), IDS
    theirs_given = {"decoder_input_ids": ids} if hasattr(ours, "decoder_blocks") else {}
    logits = ours.train()(*given, *([ids] if theirs_given else []))
    expected = theirs(given[0], **theirs_given)
    logits = logits[0] if isinstance(logits, tuple) else logits
    expected = expected[0] if "logits" not in expected else expected.logits
    parity(f"{kind.__name__}, training mode", kind.architecture, "exchange", logits, expected, 1e-4)


def test_the_class_follows_the_folder(tmp_path) -> None:
    assert len(KINDS) == 13
    torch.manual_seed(0)
    config = BertConfig(40, 16, 8, 1, 2, 12, class_names=("a", "b", "c"))
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert class_for(tmp_path) is BertForSequenceClassification
    path = tmp_path / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"architectures": ["BertForPreTraining"]}))
    assert class_for(tmp_path, (BertForMaskedLM,)).__name__ == "BertForPreTraining"
    path.write_text(json.dumps(known | {"architectures": ["BertModel"]}))
    assert class_for(tmp_path, (T5, BertForMaskedLM)) is BertForMaskedLM is class_for(tmp_path)
    with pytest.raises(ValueError, match="holds a BertModel; this verb needs one of: gpt2, t5"):
        class_for(tmp_path, (GPT2, T5))
    path.write_text(json.dumps(known | {"model_type": "bertt", "architectures": None}))
    with pytest.raises(ValueError, match="unknown model_type 'bertt'; did you mean 'bert'"):
        class_for(tmp_path)


def test_a_foreign_folder_fills_and_generates(tmp_path, capsys) -> None:
    """BERT and GPT-2 as Hugging Face saves them, with tokenizers of their kind, trained here on a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = ["the cat sat on the mat", "the dog sat on the log"] * 5
    for kind in ("bert", "gpt2"):
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]") if kind == "bert" else models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer if kind == "bert" else trainers.BpeTrainer
        tokenizer.train_from_iterator(texts, trainer(vocab_size=60, special_tokens=["[UNK]", "[PAD]", "[MASK]"]))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", unk_token="[UNK]")
        fast.save_pretrained(tmp_path / kind)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    ).eval()
    theirs.save_pretrained(tmp_path / "bert")
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    main(
        [
            "fill",
            "the [MASK] sat on the mat",
            "--checkpoint",
            str(tmp_path / "bert"),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )
    shown = capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "bert")
    ids = torch.tensor([tokenizer("the [MASK] sat on the mat")["input_ids"]])
    chances = theirs(ids).logits[0, 1].softmax(-1)
    best = int(chances.argmax())
    assert shown.startswith(f"gap 1: {tokenizer.decode([best])} {chances[best].item():.1%}") and "world" not in shown
    arguments = ["--checkpoint", str(tmp_path / "gpt2"), "--out", str(tmp_path), "--device", "cpu"]
    main(["generate", "the cat", *arguments, "--max-new-tokens", "500"])  # no longer than the model reads
    assert capsys.readouterr().out.startswith("the cat")


# The verbs


def test_demo_compares_three_families(tmp_path, capsys) -> None:
    flags = "--d-model 16 --n-layers 2 --n-heads 2 --d-ff 24 --gflops 0.3 --n-slots 4 --batch-size 4".split()
    main(["demo", *flags, "--out", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("%")][:5] >= ["bert"]
    for name in ("bert", "gpt2", "t5", "optimum", "uniform", "world"):
        assert f"\n{name} " in shown
    assert (tmp_path / "objectives.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", ["bert", "albert", "roberta", "electra", "t5", "bart"])
def test_pretrained_models_fill_gaps(name, tmp_path, capsys) -> None:
    main(["pretrain", "--model", name, *FLAGS, "--out", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "optimum" in shown and f"saved {tmp_path / name}" in shown
    main(["fill", "The [MASK] sing because they were sad.", "--model", name, "--out", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.startswith("gap 1: ") and "world: " in shown and "bakers" in shown


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_your_own_text_is_pretrained_on_and_asked(name, tmp_path, capsys) -> None:
    path = tmp_path / "my.txt"
    path.write_text("\n\n".join(f"The number {n} comes before {n + 1}. Café {n}!" for n in range(60)))
    flags = [*FLAGS, "--data", str(path), "--vocab-size", "320", "--out", str(tmp_path), "--device", "cpu"]
    main(["pretrain", "--model", name, *flags])
    assert "nats per target (uniform guessing: 5.768)" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / name)
    ids = tokenizer("Café 7!")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Café 7!"
    assert (ids[-1] == EOS_ID) == (name == "t5") and (ids[0] == BOS_ID) == (name != "t5")
    asked = ["generate", "The number"] if name == "gpt2" else ["fill", "The [MASK] 5 comes", "--model", name]
    main([*asked, "--out", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.startswith("The number" if name == "gpt2" else "gap 1: ") and "world" not in shown
    with pytest.raises(SystemExit):
        main(["pretrain", *flags, "--vocab-size", "100"])
    assert "vocab_size=100 must be at least 296: 40 special tokens and 256 bytes" in capsys.readouterr().err


def test_pretraining_resumes_to_the_same_weights(tmp_path, capsys) -> None:
    def run(folder, *more: str) -> None:
        rate = ["--learning-rate", "0.0123"]
        main(["pretrain", *FLAGS, *rate, "--save-every", "1", "--out", str(folder), "--device", "cpu", *more])

    run(tmp_path / "whole")
    log = (tmp_path / "whole" / "bert" / "training" / "log.csv").read_text().splitlines()
    rate = float(log[1].split(",")[log[0].split(",").index("learning_rate")])
    assert 0 < rate <= 0.0123 and rate / TrainConfig(max_steps=3, warmup_steps=1).factor(2) == pytest.approx(0.0123)
    run(tmp_path / "parts")
    (tmp_path / "parts" / "bert" / "model.safetensors").unlink()
    run(tmp_path / "parts", "--resume")
    both = [BertForMaskedLM.from_pretrained(tmp_path / name / "bert").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", "--resume", "--mask-rate", "0.2")
    assert "masking" in capsys.readouterr().err


def test_finetune_and_classify(tmp_path, capsys) -> None:
    main(["pretrain", *FLAGS, "--out", str(tmp_path), "--device", "cpu"])
    lines = [f"Sum: {n % 5} + 1 = {n % 5 + 1}.\tsum" for n in range(12)] + [
        "The bakers sing because they were sad.\troles"
    ] * 12
    data = tmp_path / "texts.tsv"
    data.write_text("\n".join(lines) + "\n")
    flags = ["--max-steps", "40", "--learning-rate", "0.01", "--out", str(tmp_path), "--device", "cpu"]
    main(["finetune", "--data", str(data), *flags])
    assert "right on 100.0%" in capsys.readouterr().out
    main(["classify", "Sum: 3 + 4 = 7.", "--out", str(tmp_path), "--device", "cpu"])
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first[1] == "sum" and float(first[0].rstrip("%")) > 60


def test_finetuning_starts_from_the_pretrained_trunk_and_keeps_its_examples_apart(
    tmp_path, capsys, monkeypatch
) -> None:
    torch.manual_seed(0)
    encoder, seen = BertForMaskedLM(BertConfig(len(word_world()[1]), 32, 16, 1, 2, 24)), {}
    encoder.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", "bert")
    monkeypatch.setattr(topic, "fit_classes", lambda model, data, *_: seen.update(model=model, trained=data))
    monkeypatch.setattr(topic, "class_accuracy", lambda model, data: seen.update(examined=data) or 0.5)
    sums = [(a, b) for a in range(5) for b in range(5)]
    lines = [f"Sum: {a} + {b} = {a + b}.\t{'even' if (a + b) % 2 == 0 else 'odd'}" for a, b in sums]
    (tmp_path / "sums.tsv").write_text("\n".join(lines))
    main(["finetune", "--data", str(tmp_path / "sums.tsv"), "--out", str(tmp_path), "--device", "cpu"])
    assert torch.equal(seen["model"].trunk.token_emb.weight, encoder.trunk.token_emb.weight)
    texts = [{tuple(ids) for ids, _ in seen[part]} for part in ("trained", "examined")]
    assert [len(part) for part in texts] == [23, 2] and not texts[0] & texts[1]


def test_padding_does_not_change_what_a_classifier_says(monkeypatch) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(67, 32, 16, 2, 2, 24, dropout=0.0, class_names=("a", "b", "c")))
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    rows = [torch.randint(5, 67, (n,)).tolist() for n in (3, 30, 5, 29, 4, 28) * 4]
    with torch.no_grad():  # every class for some
        model.class_head.bias -= torch.cat([model.eval()(torch.tensor([row])) for row in rows]).mean(dim=0)
    guesses = [int(model(torch.tensor([row])).argmax()) for row in rows]
    data = list(zip(rows, guesses, strict=True))
    assert len(set(guesses)) > 1 and core.class_accuracy(model, data) == 1.0
    given = {}
    monkeypatch.setattr(core, "fit", lambda model, batches, loss_fn, config: given.update(of=batches, loss=loss_fn))
    core.fit_classes(model, data, core.FinetuneConfig(batch_size=6), 0)
    batch = given["of"](0)
    total, count = given["loss"](model, batch)
    logits = [model(row[row != 0][None]) for row in batch["inputs"]]
    expected = F.cross_entropy(torch.cat(logits), batch["classes"], reduction="sum")
    assert count == 6 and total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_probability_of_a_filling_is_that_of_all_that_is_written(tmp_path, monkeypatch) -> None:
    """A gap ends with the next sentinel, or with the text; either end is part of the answer."""
    torch.manual_seed(0)
    vocabulary, sentinels = word_world()[1], sentinel_ids()
    model = VARIANTS["t5"].build(SMALL, len(vocabulary)).double().eval()
    save_tokenizer(tmp_path, "t5")
    tokenizer, word = load_tokenizer(tmp_path), vocabulary.ids["bakers"]
    for answer in ([sentinels[0], word, sentinels[1], EOS_ID], [sentinels[0], word, EOS_ID]):
        written = torch.tensor([answer])
        monkeypatch.setattr(model, "generate", lambda *_, written=written: written)
        source = [*vocabulary.encode(["The"]), sentinels[0], *vocabulary.encode(["sing", "."]), EOS_ID]
        chances = model(torch.tensor([source]), model.shift_right(written))[0].softmax(dim=-1)
        expected = (chances[1, answer[1]] * chances[2, answer[2]]).item()
        assert fill_text(model, tokenizer, "The [MASK] sing.", 3) == [[("bakers", pytest.approx(expected, rel=1e-9))]]


def test_a_held_out_loss_is_a_mean_over_targets_not_over_batches() -> None:
    def batches(step: int) -> dict[str, torch.Tensor]:
        return {"n": torch.tensor([step + 1.0])}

    loss = topic.held_out_loss(torch.nn.Linear(1, 1), batches, lambda _, batch: (batch["n"] ** 2, batch["n"].sum()))
    assert loss == pytest.approx(385 / 55), "the sum of squares up to 10 over the sum up to 10"


def test_impossible_texts_are_impossible_and_possible_ones_possible() -> None:
    texts = acceptability(40, 5, "validation")
    assert [name for _, name in texts] == ["possible", "impossible"] * 20
    for text, name in texts:
        assert possible([*words(text), "<eos>"]) == (name == "possible")
    assert acceptability(40, 5, "validation") == texts


def test_classes_are_read_and_mistakes_named(tmp_path) -> None:
    path = tmp_path / "texts.tsv"
    path.write_text("a good day\tgood\n\nbad\tnight\tbad\n")
    assert read_classes(path) == [("a good day", "good"), ("bad\tnight", "bad")]
    for content, message in (
        ("a\tb\nc\n", r"texts.tsv:2 must be text<TAB>class, got 'c'"),
        ("a\tb\n\td\n", r"texts.tsv:2 must be"),
        ("a\tb\nc\tb\n", "fewer than two classes"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_classes(path)
    path.write_text("a\u2028b\tgood\nc\x0cd\tbad\n", encoding="utf-8")  # no ends of lines
    assert [name for _, name in read_classes(path)] == ["good", "bad"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        read_classes(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill", "The [MASK] sing."], "no model in .*bert; make one with: python .* pretrain --model bert"),
        (["classify", "x"], "no model in .*classifier; make one with: python .* finetune"),
        (["classify", "lost.png"], "no model in .*vit; make one with: python .* pretrain --model vit"),
        (["generate"], "nothing to read; give a text in quotes"),
        (["generate", "x", "--model", "gpt"], "unknown model 'gpt'; did you mean 'gpt2'"),
        (["generate", "x", "--top-p", "1.5"], "top_p must be finite and > 0 and <= 1, got 1.5"),
        (["generate", "x", "--checkpoint", "nowhere"], "nowhere is not a folder"),
        (["pretrain", "--model", "brt"], "unknown model 'brt'; did you mean 'bert'"),
        (["pretrain", "--mask-rate", "nan"], "mask_rate must be finite"),
        (["pretrain", "--d-model", "15", "--max-steps", "1"], "d_model=15 is not divisible by n_heads=4"),
        (["finetune", "--data", "lost.tsv"], "no model in"),
        (["demo", "--gflops", "0"], "gflops must be finite and > 0, got 0"),
        (["pretrain", "--vocab-size", "0"], "vocab_size must be finite and >= 1, got 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys) -> None:
    import re

    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--out", str(tmp_path), "--device", "cpu"])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.strip().count("\n") == 0 and re.search(message, error)


def test_gaps_and_words_that_a_model_cannot_answer_are_named(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    vocab_size = len(word_world()[1])
    model = BertForMaskedLM(BertConfig(vocab_size, 12, 8, 1, 2, 12)).eval()
    save_tokenizer(tmp_path, "bert")
    tokenizer = load_tokenizer(tmp_path)
    for text, message in (
        ("The bakers sing.", "the text has no gap"),
        ("The [MASK] sngs.", r"'sngs' \(did you mean sings"),
        ("The [MASK] " + "sing " * 12, "the text has 15 tokens; this model reads at most 12"),
    ):
        with pytest.raises(ValueError, match=message):
            fill_text(model, tokenizer, text, 3)
    assert fill_text(model, tokenizer, "The [MASK] " + "sing " * 9, 1), "twelve tokens are not too many"
    rows = fill_text(model, tokenizer, "The [MASK] [MASK].", 3)
    assert len(rows) == 2 and all(len(row) == 3 for row in rows)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no tokenizer that loads"):
        load_tokenizer(tmp_path / "empty")
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # it named the token for the unknown
    with pytest.raises(ValueError, match="has no tokenizer that loads .*UNK"):
        load_tokenizer(tmp_path)
    writer = T5(T5Config(vocab_size, 8, 4, 12, 1, 1, 2, eos_id=EOS_ID)).eval()
    with pytest.raises(ValueError, match="no 33 sentinels"):
        fill_text(writer, tokenizer, "[MASK] " * 32, 1)


def test_bench_times_ours_and_theirs(tmp_path, capsys) -> None:
    flags = "--n-rounds 2 --batch-size 2 --seq-len 7 --max-new-tokens 3".split()
    main(["bench", *flags, *FLAGS[:8], "--out", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    for name in ("bert, training step", "gpt2, training step", "gpt2, generation", "t5, generation"):
        assert f"{name} beside transformers': " in shown
    assert shown.count("x the speed") == 5


def test_public_names_are_all_there() -> None:
    assert len(set(topic.__all__)) == len(topic.__all__) > 40 and all(hasattr(topic, name) for name in topic.__all__)
    assert topic.GPT2 is GPT2 and topic.GPT2Config is GPT2Config


def test_shape_comments_hold(checked_shapes) -> None:
    torch.manual_seed(0)
    vocab_size = len(word_world()[1])
    with checked_shapes(core) as checked:
        for name in ("bert", "gpt2", "t5", "electra"):
            variant = VARIANTS[name]
            model = variant.build(SMALL, vocab_size)
            variant.loss_fn(model, variant.batches(3, 0)(0))
            fill_in(model.generator if name == "electra" else model, slots(3))
    assert len(checked) >= 18
