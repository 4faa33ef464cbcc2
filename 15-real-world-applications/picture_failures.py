"""Topic 15 - Picture failures: programs about pictures that run without complaint and do not see, beside sound ones.

python 15-real-world-applications/real_world_applications.py figures picture-breaks   # all, the chapter's table

Every entry of PICTURE_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from contrastive import MAX_LOG_SCALE, clip_loss
from course_tokenizer import load_course_tokenizer
from picture_model import PairEncoders, PictureConfig, attach, normalised, pair_batch
from scene_pictures import Question, ask, draw_scene, render_all
from transformer_architecture import EncoderLayer
from workbench import RunConfig, seed_everything

Row = tuple[str, float, float]
SMALL = PictureConfig(24, 2, 2, 5, 16, pair_batch=16)


def counted(n: int, seed: int, split: str, skewed: bool) -> list[Question]:
    """Questions for the number of dots; skewed: nine of ten about pictures with two, as collected questions are."""
    rng, found = random.Random(f"{seed} {split}"), []
    while len(found) < n:
        question = ask(draw_scene(rng, split), rng, "count", split)
        if not skewed or question.answer == " 2." or rng.random() < 1 / 27:
            found.append(question)
    return found


def unbalanced_answers(run: RunConfig) -> list[Row]:
    """A program that never looks and gives the most frequent answer to each wording: blind, and nine tenths right."""
    shares = []
    for skewed in (False, True):
        seen: dict[str, Counter] = defaultdict(Counter)
        for question in counted(400, run.seed, "train", skewed):
            seen[question.prompt][question.answer] += 1
        exam = counted(400, run.seed, "seen", skewed)
        right = sum(seen[question.prompt].most_common(1)[0][0] == question.answer for question in exam)
        shares.append(right / len(exam))
    return [("unbalanced-answers: share that a program without eyes gets right", shares[0], shares[1])]


def picture_behind(run: RunConfig) -> list[Row]:
    """Picture tokens behind the question: causal attention hides them from the position that answers."""
    tokenizer, effects = load_course_tokenizer(), []
    seed_everything(run.seed)
    model = attach(PairEncoders(SMALL), SMALL, run.seed).eval()
    rng = random.Random(run.seed)
    pictures = render_all([draw_scene(rng) for _ in range(2)], rng)
    question = [tokenizer.bos_id, *tokenizer.encode("Question: how many dots? Answer:")]
    places = [model.language.token_emb.picture_id] * model.n_tokens
    for row in ([question[0], *places, *question[1:]], [*question, *places]):
        token_ids = torch.tensor([row])
        last = len(row) - 1 if row[-1] != places[0] else len(question) - 1
        with torch.no_grad():
            answers = [model(pictures[i : i + 1], token_ids)[0, last] for i in range(2)]
        effects.append((answers[0] - answers[1]).abs().max().item())
    return [("picture-behind: largest change of the answer's logits with another picture", effects[0], effects[1])]


def last_layer(run: RunConfig) -> list[Row]:
    """Patches taken behind the last block: the contrastive loss never saw them, so nothing has trained them.

    Measured: the norm of the loss's gradient at the patches, before and behind the last block of the tower.
    """
    seed_everything(run.seed)
    pair, batch, seen = PairEncoders(SMALL), pair_batch(SMALL, run.seed, 0), {}

    def keep(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen["before"], seen["behind"] = given[0], made

    last = [layer for layer in pair.vision.modules() if isinstance(layer, EncoderLayer)][-1]
    handle = last.register_forward_hook(keep)
    loss = clip_loss(pair.vision(normalised(batch["pictures"])), text_side(pair, batch), pair.log_scale)
    handle.remove()
    before, behind = torch.autograd.grad(loss, [seen["before"], seen["behind"]])
    norms = [gradient[:, pair.vision.n_special :].norm().item() for gradient in (before, behind)]
    return [("last-layer: gradient of the contrastive loss at the patches", norms[0], norms[1])]


def text_side(pair: PairEncoders, batch: dict[str, Tensor]) -> Tensor:
    return pair.text_proj(pair.text(batch["token_ids"]))


def unclipped_scale(run: RunConfig) -> list[Row]:
    """A learned scale without CLIP's clip: once all pairs are told apart it grows, and with it what one error costs.

    Measured: the loss of a batch of which two partners are exchanged, after the scale was trained on the sound batch.
    """
    losses = []
    right = torch.cat(
        [torch.ones(8, 1), 0.15 * torch.eye(8)], dim=1
    )  # cosines of 1 with the partner, 0.978 with others
    for clipped in (True, False):
        log_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
        optimizer = torch.optim.Adam([log_scale], 0.1)
        for _ in range(200):
            loss = clip_loss(right, right, log_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clipped:
                log_scale.data.clamp_(max=MAX_LOG_SCALE)
        losses.append(clip_loss(right, right[[1, 0, *range(2, 8)]], log_scale.detach()).item())
    return [("unclipped-scale: loss of eight pairs of which two are exchanged, nats", losses[0], losses[1])]


PICTURE_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], int]] = {
    "unbalanced-answers": (unbalanced_answers, 5),
    "picture-behind": (picture_behind, 5),
    "last-layer": (last_layer, 5),
    "unclipped-scale": (unclipped_scale, 2),
}
