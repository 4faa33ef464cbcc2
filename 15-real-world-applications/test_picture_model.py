"""Proofs of picture_model.py: the assembly against transformers' LLaVA, masks, shuffled pictures, the folder."""

import copy
import json
import random
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import nn

from contrastive import MAX_LOG_SCALE
from course_model import load_course_model
from course_tokenizer import RESERVED, load_course_tokenizer
from fine_tuning_adaptation import answer_loss
from gpt2 import SamplingConfig
from low_rank_adapters import adapted_layers
from modern_llm_architectures import CausalLM, ModelConfig
from picture_experiments import LastLayerPictureLM
from picture_model import (
    DESCRIBED,
    FOLDER,
    PairEncoders,
    PictureConfig,
    PictureExam,
    PictureLM,
    Projector,
    attach,
    description_ids,
    exam_questions,
    examine_pictures,
    first_sentence,
    load_picture_model,
    merge_patches,
    pair_batch,
    pair_loss,
    picture_batch,
    picture_loss,
    picture_row,
    recall_at,
    save_picture_model,
    told_pieces,
    train_pairs,
    train_text,
)
from scene_pictures import KINDS, SIDE, captions_of, describe, draw_scene, render_all
from sequence_modeling import IGNORE
from vision_transformer import VisionConfig, VisionTransformer, patchify
from workbench import seed_everything

PLACE = 7  # the placeholder of the tiny models
TINY = PictureConfig(
    *(12, 2, 2, 5, 8, 2), pair_steps=2, pair_batch=6, join_steps=2, tune_steps=2, picture_batch=3, rank=2
)


def tiny(merge: int = 1, dtype: torch.dtype = torch.float64) -> PictureLM:
    """Random weights of a size that shows; all sizes differ."""
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ff": 36, "max_seq_len": 90}
    language = CausalLM(ModelConfig(vocab_size=99, **sizes))
    vision = VisionTransformer(VisionConfig(SIDE, 5, 3, 11, 20, 3, 2, 28))
    model = PictureLM(vision, Projector(20 * merge**2, 24), language, PLACE, merge).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def rows(n_rows: int, n_before: int, n_tokens: int, n_after: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(PLACE + 1, 99, (n_rows, n_before + n_tokens + n_after), generator=generator)
    ids[:, n_before : n_before + n_tokens] = PLACE
    return ids


def pictures(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=dtype)


# The assembly


def library_model(ours: PictureLM, folder):
    """transformers' LLaVA with our weights: a ViT tower, its projector, a Llama."""
    from transformers import AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    plain = copy.deepcopy(ours.language)
    plain.token_emb = plain.token_emb.base
    plain.save_pretrained(folder / "language")
    ours.vision.save_pretrained(folder / "vision")
    language = AutoModelForCausalLM.from_pretrained(folder / "language", dtype=torch.float64)
    vision = AutoModel.from_pretrained(folder / "vision", add_pooling_layer=False, dtype=torch.float64)
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    config = LlavaConfig(
        text_config=language.config,
        vision_config=vision.config,
        image_token_id=PLACE,
        image_token_index=PLACE,
        **settings,
    )
    model = LlavaForConditionalGeneration(config).double().eval()
    left = model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    assert all("pooler" in name for name in left.missing_keys) and not left.unexpected_keys
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    theirs = model.model.multi_modal_projector
    theirs.linear_1.load_state_dict(ours.projector.up.state_dict())
    theirs.linear_2.load_state_dict(ours.projector.down.state_dict())
    return model


def test_the_last_layers_patches_go_the_same_way(parity, tmp_path):
    plain = tiny()
    ours = LastLayerPictureLM(plain.vision, plain.projector, plain.language, PLACE)
    theirs = library_model(ours, tmp_path)
    token_ids, shown = rows(2, 3, 36, 11), pictures(2)
    patches = theirs.model.vision_tower(2 * shown - 1).last_hidden_state[:, 1:]  # without the class token
    x = theirs.model.language_model.embed_tokens(token_ids)
    x[token_ids == PLACE] = theirs.model.multi_modal_projector(patches).flatten(0, 1)
    library = theirs.lm_head(theirs.model.language_model(inputs_embeds=x).last_hidden_state)
    made = ours(shown, token_ids)
    assert (made - plain(shown, token_ids)).abs().max() > 0.1
    parity("LastLayerPictureLM", "transformers ViTModel, LlamaModel", "output", made, library, 1e-10)


def test_both_encoders_of_a_pair_are_those_of_their_libraries(parity, tmp_path):
    from transformers import ViTForImageClassification

    torch.manual_seed(5)
    pair = PairEncoders(PictureConfig(d_vision=24, vision_layers=3, vision_heads=3, d_shared=7)).eval()
    pair.vision.save_pretrained(tmp_path)
    theirs = ViTForImageClassification.from_pretrained(tmp_path).eval()
    shown, texts = pictures(3, torch.float32), ["a small red circle", "2 dots", "no dots and a large blue square"]
    made = pair(shown, description_ids(texts))
    parity("PairEncoders", "ViTForImageClassification", "exchange", made[0], theirs(2 * shown - 1).logits, 1e-5)
    alone = torch.cat([pair.text_proj(pair.text(description_ids([text]))) for text in texts])
    parity("PairEncoders, texts", "one text at a time", "invariant", made[1], alone, 1e-5)


def test_the_assembly_computes_what_transformers_llava_does(parity, tmp_path):
    ours = tiny()
    theirs = library_model(ours, tmp_path)
    token_ids, shown = rows(2, 3, 36, 11), pictures(2)
    made = ours(shown, token_ids)
    library = theirs(input_ids=token_ids, pixel_values=2 * shown - 1).logits
    assert made.std() > 0.1
    parity("PictureLM", "transformers LlavaForConditionalGeneration", "output", made, library, 1e-10)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(3), dtype=made.dtype)
    parts = [ours.projector.up.weight, ours.vision.patch_proj.weight, ours.language.blocks[0].self_attn.v_proj.weight]
    tower = theirs.model.vision_tower.embeddings.patch_embeddings.projection.weight
    values = theirs.model.language_model.layers[0].self_attn.v_proj.weight
    other = [theirs.model.multi_modal_projector.linear_1.weight, tower, values]
    mine = torch.autograd.grad((made * weights).sum(), parts)
    theirs_too = torch.autograd.grad((library * weights).sum(), other)
    parity("PictureLM", "transformers LlavaForConditionalGeneration", "gradient", list(mine), list(theirs_too), 1e-10)
    with torch.no_grad(), ours.showing(shown) as language:
        chosen = language.generate(token_ids, SamplingConfig(6, temperature=0.0))
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(token_ids)}
        settings |= {"eos_token_id": ours.language.config.eos_id, "pad_token_id": ours.language.config.pad_id}
        said = theirs.generate(input_ids=token_ids, pixel_values=2 * shown - 1, **settings)
    assert chosen.tolist() == said[:, token_ids.shape[1] :].tolist()


def test_squares_of_patches_become_one_token_and_lie_as_in_the_picture():
    images = torch.arange(2 * 3 * 12 * 12.0).reshape(2, 3, 12, 12)
    fine, coarse = patchify(images, 3), patchify(images, 6)  # (2, 16, 27), (2, 4, 108)
    merged = merge_patches(fine, 2)
    assert merged.shape == coarse.shape
    for token in range(4):
        assert sorted(merged[1, token].tolist()) == sorted(coarse[1, token].tolist())
    assert torch.equal(merge_patches(fine, 1), fine)


def test_a_picture_changes_only_what_comes_after_it_and_only_its_own_row():
    model, token_ids = tiny(2), rows(2, 3, 9, 8)
    shown = pictures(2)
    changed = shown.clone()
    changed[1, :, 7:12, 22:26] = 0.0
    before, after = model(shown, token_ids), model(changed, token_ids)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1, :3], after[1, :3])
    assert (before[1, 3:] - after[1, 3:]).abs().amax(dim=-1).min() > 1e-6


def test_padding_on_the_left_and_caches_leave_answers_as_they_are():
    model, token_ids = tiny(2), rows(2, 1, 9, 6)
    shown = pictures(2)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), token_ids], dim=1)
    real = torch.cat([torch.zeros(2, 4, dtype=torch.bool), torch.ones_like(token_ids, dtype=torch.bool)], dim=1)
    with torch.no_grad(), model.showing(shown) as language:
        alone, behind = language(token_ids), language(padded, is_real=real)[:, 4:]
        caches = language.new_caches()
        steps = [
            language(token_ids[:, :11], caches),
            *(language(token_ids[:, i : i + 1], caches) for i in range(11, 16)),
        ]
    assert torch.allclose(alone, behind, atol=1e-12) and torch.allclose(alone, torch.cat(steps, dim=1), atol=1e-12)


def test_places_that_do_not_fit_the_picture_are_refused_and_text_never_makes_one():
    model, tokenizer = tiny(2), load_course_tokenizer()
    for token_ids, shown in [(rows(2, 1, 8, 4), 2), (rows(2, 1, 9, 4), 1)]:
        with pytest.raises(ValueError, match=r"places for picture tokens, but \d pictures give 9 each"):
            model(pictures(shown), token_ids)
    with pytest.raises(ValueError, match="0 pictures give 0 each"):
        model.language(rows(1, 1, 9, 4))
    assert torch.equal(model.language(rows(1, 4, 0, 3)), model(pictures(1), rows(1, 4, 0, 3)))
    place = tokenizer.vocab[RESERVED[0]]
    assert place not in tokenizer.encode(f"Question: {RESERVED[0]} {RESERVED[0]}? Answer:")
    assert picture_row(tokenizer, 4, "Picture:")[1:5] == [place] * 4


# Batches and losses


def test_the_loss_counts_captions_and_answers_alone():
    tokenizer = load_course_tokenizer()
    batch = picture_batch(tokenizer, 9, 12, 0, False, 3)
    assert {len(tensor) for tensor in batch.values()} == {12} and batch["inputs"].shape == batch["targets"].shape
    rng = random.Random("0 texts 3")
    scenes = [draw_scene(rng) for _ in range(12)]
    for row, scene in enumerate(scenes):
        learned = "".join(text for _, text in told_pieces(scene, rng))
        counted = batch["targets"][row][batch["targets"][row] != IGNORE].tolist()
        assert tokenizer.decode(counted) == learned
        whole = [*batch["inputs"][row].tolist()]
        assert whole[1:10] == [tokenizer.vocab[RESERVED[0]]] * 9
    blind = picture_batch(tokenizer, 9, 12, 0, True, 3)
    assert torch.equal(blind["inputs"], batch["inputs"]) and blind["pictures"].std() == 0


def test_a_row_tells_three_different_kinds_or_a_caption():
    rng, seen = random.Random(0), set()
    for _ in range(60):
        pieces = told_pieces(draw_scene(rng), rng)
        assert len(pieces) in (1, 3) and len({given for given, _ in pieces}) == len(pieces)
        seen.add(len(pieces))
    assert seen == {1, 3}


def test_the_picture_loss_reaches_the_projector_through_a_frozen_language_model():
    seed_everything(0)
    model = attach(PairEncoders(TINY), TINY, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"projector.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")}
    batch = picture_batch(load_course_tokenizer(), 9, 3, 0, False, 0)
    loss, count = picture_loss(model, batch)
    loss.backward()
    assert count == (batch["targets"] != IGNORE).sum() and model.projector.up.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="0 pictures"):  # the pictures are gone after the block
        answer_loss(model.language, {name: batch[name] for name in ("inputs", "targets")})


def test_pairs_are_all_different_and_the_scale_is_clipped():
    batch = pair_batch(TINY, 0, 0)
    assert len({tuple(row) for row in batch["token_ids"].tolist()}) == TINY.pair_batch
    model = PairEncoders(TINY)
    model.log_scale.data.fill_(9.0)
    loss, count = pair_loss(model, batch)
    assert model.log_scale.item() == pytest.approx(MAX_LOG_SCALE) and torch.isfinite(loss) and count == 6
    texts = [describe(draw_scene(random.Random(seed), split)) for seed in range(20) for split in ("train", "held-out")]
    assert description_ids(texts).max() < len(DESCRIBED)  # every word is known


def test_one_batch_of_pairs_can_be_learned_by_heart():
    seed_everything(0)
    config = PictureConfig(24, 1, 2, 5, 16, pair_batch=8)
    model, batch = PairEncoders(config), pair_batch(config, 0, 0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = pair_loss(model, batch)[0] / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.7 * losses[0]  # ln 8 = 2.08 is guessing


# Stages and folder


def test_the_stages_train_what_they_say_and_the_folder_brings_it_back(tmp_path):
    tokenizer, pair = load_course_tokenizer(), train_pairs(TINY, 0)
    model = attach(pair, TINY, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_text(model, tokenizer, TINY, 0, "join")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("projector.")}
    train_text(model, tokenizer, TINY, 0, "tune")
    assert adapted_layers(model.language) and not torch.equal(model.vision.pos_emb, before["vision.pos_emb"])
    for name, tensor in model.vision.encoder.blocks[-1].state_dict().items():  # no picture token is made of it
        assert torch.equal(tensor, before[f"vision.encoder.blocks.{TINY.vision_layers - 1}.{name}"])
    scores = dict.fromkeys((*KINDS, "caption"), 0.5)
    report = {"seen": scores, "held-out": scores, "shuffled": scores, "recall": {"text@1": 0.25}, "command": "x"}
    report |= {"cpu_seconds": 1.0, "machine": "m", "date": "d", "n_questions": 3, "n_pairs": 9}
    save_picture_model(model, pair, TINY, tmp_path, report)
    again, other, _ = load_picture_model(tmp_path)
    batch = picture_batch(tokenizer, 9, 3, 1, False, 0)
    with torch.no_grad():
        assert torch.equal(model(batch["pictures"], batch["inputs"]), again(batch["pictures"], batch["inputs"]))
        texts = pair_batch(TINY, 0, 1)
        for mine, theirs in zip(pair(**texts), other(**texts), strict=True):
            assert torch.equal(mine, theirs)
    (tmp_path / "picture_config.json").write_text(json.dumps({"d_shared": 9} | {"d_vision": 12, "vision_heads": 2}))
    with pytest.raises(ValueError, match="holds other tensors"):
        load_picture_model(tmp_path)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="merge=4 does not divide the grid of 6"):
        PictureConfig(merge=4)
    with pytest.raises(ValueError, match="not divisible"):
        PictureConfig(d_vision=30)
    with pytest.raises(ValueError, match="exam_seed must be finite and >= 0"):
        PictureExam(exam_seed=-1)


# Exams


def test_exam_questions_are_about_held_out_pairs_or_about_none():
    exam = PictureExam(n_questions=8)
    for split in ("seen", "held-out"):
        for kind in KINDS:
            scenes, questions = exam_questions(kind, split, exam)
            assert len(scenes) == len(questions) == 8
            assert all(question.held_out == (split == "held-out") for question in questions)


class Oracle:
    """Answers from the scene that the picture shows, which it recognises by its pixels."""

    n_tokens = 9

    def __init__(self, known: dict) -> None:
        self.known = known

    def answer(self, tokenizer, shown, prompts, longest=0) -> list[str]:
        return [self.known[picture.numpy().tobytes()][prompt] for picture, prompt in zip(shown, prompts, strict=True)]


def test_an_oracle_gets_full_marks_and_a_shuffled_one_chance():
    exam, known = PictureExam(n_questions=60), defaultdict(lambda: defaultdict(lambda: " nothing."))
    for kind in KINDS:
        scenes, questions = exam_questions(kind, "seen", exam)
        for picture, scene, question in zip(
            render_all(scenes, random.Random(f"{exam.exam_seed} pixels")), scenes, questions, strict=True
        ):
            known[picture.numpy().tobytes()] |= {question.prompt: question.answer}
            known[picture.numpy().tobytes()]["Picture:"] = captions_of(scene)[-1].removeprefix("Picture:")
    right = examine_pictures(Oracle(known), None, "seen", exam)
    assert right == dict.fromkeys((*KINDS, "caption"), 1.0)
    shuffled = examine_pictures(Oracle(known), None, "seen", exam, shuffled=True)
    assert shuffled["digit"] < 0.35 and shuffled["count"] < 0.5 and shuffled["caption"] < 0.1


def test_recall_is_that_of_the_nearest():
    exam = PictureExam(n_pairs=6)

    class Perfect:
        def __call__(self, shown, token_ids):
            return torch.eye(6), torch.eye(6)

    class Reversed:
        def __call__(self, shown, token_ids):
            return torch.eye(6), -torch.eye(6)

    assert set(recall_at(Perfect(), "seen", exam).values()) == {1.0}
    assert set(recall_at(Reversed(), "seen", exam).values()) == {0.0}


def test_first_sentences():
    assert first_sentence(" red. Question: x") == " red." and first_sentence(" red") == " red"


def test_a_language_model_that_has_no_pictures_yet_is_wrapped_once():
    language, tokenizer = load_course_model()
    vision = VisionTransformer(TINY.vision)
    place = tokenizer.vocab[RESERVED[0]]
    build = partial(PictureLM, vision, Projector(48, language.config.d_model), language, place, 2)
    assert build().language.token_emb is build().language.token_emb


@pytest.mark.skipif(not FOLDER.exists(), reason="made by the verb train-pictures")
def test_the_committed_model_reaches_its_card():
    model, pair, tokenizer = load_picture_model()
    report = json.loads((FOLDER / "report.json").read_text())
    exam = PictureExam(n_questions=12, n_pairs=50)
    found = examine_pictures(model, tokenizer, "seen", exam)
    asked = [kind for kind in KINDS if kind != "caption"]
    mean = sum(found[kind] for kind in asked) / len(asked)
    told = sum(report["seen"][kind] for kind in asked) / len(asked)
    assert abs(mean - told) < 0.17  # 72 questions: three standard errors
    assert recall_at(pair, "seen", exam)["text@5"] >= 0.9


@pytest.mark.parametrize("settings", [{"colour": 1}, {"d_vision": "x"}, {"rank": None}])
def test_a_folder_with_other_settings_is_refused_in_one_line(settings, tmp_path):
    (tmp_path / "picture_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="picture_config.json is no picture model's|must be") as error:
        load_picture_model(tmp_path)
    assert "\n" not in str(error.value)
