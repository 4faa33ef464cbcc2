"""Topic 09: a prompt becomes text by the folder's own tokenizer; every end that a folder names is obeyed."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from gpt2 import SamplingConfig
from llm_config import ModelConfig, config_from_folder, config_to_folder
from llm_generation import TOKENIZER, encode_prompt, load_tokenizer, room_for, save_word_tokenizer, text_pieces
from modern_llm_architectures import CausalLM, main
from sequence_modeling import BOS_ID, EOS_ID, PAD_ID
from tiny_world import words
from transformer_architecture import held_out_documents, tiny_world

VOCAB_SIZE = len(tiny_world()[1])
SMALL = ModelConfig(VOCAB_SIZE, 32, 2, 4, 2, 8, 24, 24, pad_id=PAD_ID, bos_id=BOS_ID, eos_id=EOS_ID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    CausalLM(SMALL).save_pretrained(path)
    save_word_tokenizer(path, tiny_world()[1])
    return path


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


# The tokenizer


def test_word_tokenizer_has_the_vocabulary_s_ids_and_gives_the_text_back(folder) -> None:
    tokenizer, vocabulary = load_tokenizer(folder), tiny_world()[1]
    for document in held_out_documents(200):
        ids = tokenizer.encode(document.text).ids
        assert ids == [BOS_ID, *vocabulary.encode(words(document.text))]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
    assert theirs("Meet Will Reed.")["input_ids"] == tokenizer.encode("Meet Will Reed.").ids


def test_pieces_make_the_whole_text_and_no_half_character(tmp_path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    ids = tokenizer.encode("a café, ein Löwe, 猫").ids
    pieces = list(text_pieces((torch.tensor([[token_id]]) for token_id in ids[3:]), ids[:3], tokenizer))
    assert "".join(pieces) == "a café, ein Löwe, 猫" and not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "a c" and len(pieces) > 10
    cut = list(text_pieces((torch.tensor([[token_id]]) for token_id in ids[3:-1]), ids[:3], tokenizer))
    assert "".join(cut) == tokenizer.decode(ids[:-1]) != "".join(pieces)  # the last character never became whole


# The verb


def test_generate_continues_the_prompt(folder, capsys) -> None:
    argv = ["generate", "--checkpoint", str(folder), "--prompt", "Meet Will", "--device", "cpu"]
    main([*argv, "--temperature", "0", "--max-new-tokens", "6"])
    said = capsys.readouterr().out
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer.encode("Meet Will").ids
    new_ids = model.generate(torch.tensor([ids]), SamplingConfig(6, 0.0))[0].tolist()
    assert said.strip() == tokenizer.decode(ids + new_ids).strip() and said.startswith("Meet Will")
    texts = []
    for seed in ("1", "1", "2"):  # a prompt that leaves room for 21 of the 500 tokens
        main([*argv, "--temperature", "3", "--max-new-tokens", "500", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and len(texts[0].split()) > 3


def test_bad_input_is_one_line(folder, tmp_path, capsys) -> None:
    argv = ("generate", "--device", "cpu", "--checkpoint")
    assert "/nowhere is not a folder" in refused(capsys, *argv, "/nowhere")
    assert "does not know 'zebra'" in refused(capsys, *argv, str(folder), "--prompt", "Meet zebra")
    assert "temperature must be finite and >= 0, got -1" in refused(capsys, *argv, str(folder), "--temperature", "-1")
    assert "temperature must be finite" in refused(capsys, *argv, str(folder), "--temperature", "nan")
    assert "top_p must be finite and > 0" in refused(capsys, *argv, str(folder), "--top-p", "0")
    assert "reads at most 24 in all" in refused(capsys, *argv, str(folder), "--prompt", "Meet " * 23)  # and <bos>
    most = max(load_tokenizer(folder).encode("Meet Will").ids)
    CausalLM(replace(SMALL, vocab_size=most)).save_pretrained(tmp_path)
    assert f"has no {TOKENIZER}" in refused(capsys, *argv, str(tmp_path))
    save_word_tokenizer(tmp_path, tiny_world()[1])
    assert f"has vocab_size {most}: not a pair" in refused(capsys, *argv, str(tmp_path), "--prompt", "Meet Will")
    (tmp_path / TOKENIZER).write_text("{")
    assert "does not load" in refused(capsys, *argv, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert "not a whole safetensors file" in refused(capsys, *argv, str(tmp_path))


def test_a_tokenizer_that_puts_nothing_in_front_gets_the_model_s_bos(folder) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = None
    assert encode_prompt("", tokenizer, CausalLM(SMALL)) == [BOS_ID]


def test_room_is_what_the_model_has_left() -> None:
    assert room_for(CausalLM(SMALL), 20, 500) == 4 and room_for(CausalLM(SMALL), 3, 5) == 5
    assert room_for(CausalLM(replace(SMALL, window_size=4)), 20, 500) == 500


def test_likely_tokens_are_chosen_after_the_temperature(monkeypatch) -> None:
    """0.7 of the mass is two tokens of these four, and three once a temperature of 4 has flattened them."""
    model, logits = CausalLM(SMALL), torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 20:24] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    monkeypatch.setattr(model, "decoding", lambda *_: lambda new_ids: logits.expand(len(new_ids), -1))
    sampling = SamplingConfig(1, temperature=4.0, top_p=0.7)
    drawn = model.generate(torch.full((200, 1), BOS_ID), sampling, generator=torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {20, 21, 22}


# Several ends


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_every_end_of_a_folder_is_obeyed_as_transformers_obeys_it(place, tmp_path, parity) -> None:
    torch.manual_seed(1)
    CausalLM(replace(SMALL, vocab_size=40, max_seq_len=64)).save_pretrained(tmp_path)
    ends, prompts = [7, 31, 12, 25, 38], torch.randint(3, 40, (6, 4), generator=torch.Generator().manual_seed(0))
    given = json.loads((tmp_path / "config.json").read_text()) if place == "config.json" else {"pad_token_id": PAD_ID}
    (tmp_path / place).write_text(json.dumps(given | {"eos_token_id": ends}))
    ours = CausalLM.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data *= 8  # sharp logits, so that rows end at different places
    assert (ours.config.eos_id, *ours.config.more_eos_ids) == tuple(ends)
    mask = torch.ones_like(prompts)
    wanted = theirs.generate(prompts, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=PAD_ID)
    got = ours.generate(prompts, SamplingConfig(30, 0.0))
    parity(f"several ends in {place}", "transformers generate, tokens", "output", got, wanted[:, 4:], 0)
    last = {row[(row != PAD_ID).nonzero().max()].item() for row in got}
    assert len(last & set(ends[1:])) > 0, "no row ended by another end than the first: the test shows nothing"
    assert config_from_folder(config_to_folder(ours.config)) == ours.config


def test_the_filler_of_a_folder_is_that_of_its_generation_config(tmp_path) -> None:
    CausalLM(replace(SMALL, vocab_size=40)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 9, "eos_token_id": None}))
    config = CausalLM.from_pretrained(tmp_path).config
    assert config == replace(SMALL, vocab_size=40, pad_id=9)


def test_a_filler_is_named_or_the_end_fills() -> None:
    """Only a token that was named for filling is kept from learning: id 0 may be a word."""
    config = ModelConfig(vocab_size=40, bos_id=2, eos_id=3)
    assert (config.pad_id, config.padding_idx) == (3, None)
    assert CausalLM(config).token_emb.padding_idx is None
    assert config_to_folder(config)["pad_token_id"] is None and config_from_folder(config_to_folder(config)) == config
    endless = ModelConfig(vocab_size=40, bos_id=2, eos_id=40)
    assert (endless.pad_id, endless.padding_idx) == (2, None)
    model = CausalLM(replace(config, pad_id=0, tie_embeddings=False))
    model(torch.tensor([[0, 5]])).square().sum().backward()
    assert model.token_emb.weight.grad[5].any() and not model.token_emb.weight.grad[0].any()
    with pytest.raises(ValueError, match="pad_id must be .*, got 40"):
        replace(config, pad_id=40)


def test_a_list_of_ends_must_hold_ids() -> None:
    words_of = config_to_folder(SMALL)
    for wrong in ([], ["</s>"], [3, -1]):
        with pytest.raises(ValueError, match="eos_token_id="):
            config_from_folder(words_of | {"eos_token_id": wrong})
