"""Topic 10 - Corpus failures: what goes wrong between a crawl and a loss curve, switched on and measured.

Each entry of CORPUS_BREAKS is name -> (function(run), seconds); the function returns rows (what, as it should be, with
the failure), as topic 07's failures do:

    python 10-pretraining-llms/pretraining_llms.py --break padding-in-labels
    python 10-pretraining-llms/pretraining_llms.py --break below-the-floor

Lee et al. 2022 (arXiv 2107.06499): one sentence of 61 words occurs 60,000 times in C4; Magar and Schwartz 2022 (arXiv
2203.08242), contamination and what a model makes of it.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from corpus_experiments import MODEL, clean_world, documents_of, gap_on, raw, vocabulary
from corpus_filters import normalise
from deduplication import Decontaminator, text_key
from dirty_corpus import dirty_corpus, evaluation_documents, world_page
from packing import Batch, BucketedBatches, PackedTransformer, language_model_loss
from sequence_modeling import IGNORE, PAD_ID
from tiny_world import World
from training_transformers import TrainConfig, fit
from transformer_architecture import held_out_documents, start_as_identity
from workbench import RunConfig, pick_device, seed_everything

Row = tuple[str, float, float]  # what is measured, as it should be, with the failure
SETTINGS = TrainConfig(batch_size=8, seq_len=96, max_steps=80, warmup_steps=20)
LONGER = replace(SETTINGS, max_steps=300)  # to learn six documents by heart
N_EXAMINED = 100  # held-out documents that a failure is examined with


def trained(
    batches: Callable[[int], Batch], run: RunConfig, settings: TrainConfig = SETTINGS
) -> tuple[nn.Module, float]:
    """The small model of the corpus experiments, and the mean loss that its log shows in the last ten steps."""
    seed_everything(run.seed)
    model = PackedTransformer(MODEL, len(vocabulary()))
    start_as_identity(model)
    log = fit(model.to(pick_device(run.device)), batches, language_model_loss, settings)
    return model.eval(), log[-1]["loss"]


class PaddedTargets:
    """Batches in which padding is a target like any other: the id of <pad> in place of -100."""

    def __init__(self, batches: Callable[[int], Batch]) -> None:
        self.batches = batches

    def __call__(self, step: int) -> Batch:
        batch = self.batches(step)
        return {**batch, "targets": batch["targets"].masked_fill(batch["targets"] == IGNORE, PAD_ID)}


def padding_in_labels(run: RunConfig) -> list[Row]:
    """Padding counts as text: the loss that the log shows falls, for <pad> after <pad> is easy to say."""
    documents = documents_of(raw(clean_world(70), run.seed))
    batches = BucketedBatches(documents, SETTINGS.batch_size, run.seed, pool_size=1)
    sound, wrong = trained(batches, run), trained(PaddedTargets(batches), run)
    held = held_out_documents(N_EXAMINED)
    padded = [float((batches(step)["targets"] == IGNORE).float().mean()) for step in range(20)]
    return [
        ("training loss that the log shows, nats per target", sound[1], wrong[1]),
        ("share of the targets that are padding", 0.0, sum(padded) / len(padded)),
        ("held-out nats per token above the floor", gap_on(sound[0], held), gap_on(wrong[0], held)),
    ]


def below_the_floor(run: RunConfig) -> list[Row]:
    """The evaluation set is in the training text: its loss falls below the entropy, which no honest model can do."""
    evaluation, documents = evaluation_documents(6), World().stream(run.seed + 2000, split="train")
    rng = random.Random(run.seed)
    clean = [world_page(documents, rng) for _ in range(40)]
    leaked = [text for document in evaluation for text in [document.text] * 100]
    gaps = []
    for texts in (clean, clean + leaked):
        batches = BucketedBatches(documents_of(texts), SETTINGS.batch_size, run.seed)
        gaps.append(gap_on(trained(batches, run, LONGER)[0], evaluation))
    found = Decontaminator(document.text for document in evaluation)
    shares = [sum(found.shared(text) is not None for text in texts) / len(texts) for texts in (clean, clean + leaked)]
    return [("gap of the evaluation set, nats per token", *gaps), ("pages that share 13 words with it", *shares)]


def search_by_letters(run: RunConfig) -> list[Row]:
    """The evaluation set is looked for letter by letter: capitals and another blank hide it."""
    documents = evaluation_documents(60)
    texts = [f"{document.text.upper()} " for document in documents]
    wanted = {document.text for document in documents}
    exact = sum(any(text in page for text in wanted) for page in texts) / len(texts)
    found = Decontaminator(document.text for document in documents)
    by_words = sum(found.shared(page) is not None for page in texts) / len(texts)
    return [("share of the leaks in capitals that are found", by_words, exact)]


def deduplicate_before_normalising(run: RunConfig) -> list[Row]:
    """Copies are looked for before the text is repaired: the same page with other line ends counts as another."""
    pages = dirty_corpus(clean_world(70), run.seed)
    rng = random.Random(run.seed)
    framed = [f"Skip to main content\n\n{page.text.replace(' ', '&nbsp;', 3)}" for page in rng.sample(pages, 30)]
    texts = [page.text for page in pages] + framed
    keys = [{text_key(normalise(text)) for text in texts}, {text_key(text) for text in texts}]
    return [("pages kept of 70 and 30 copies", *(float(len(found)) for found in keys))]


CORPUS_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], int]] = {  # name -> function, seconds
    "padding-in-labels": (padding_in_labels, 20),
    "below-the-floor": (below_the_floor, 30),
    "search-by-letters": (search_by_letters, 5),
    "dedup-before-repair": (deduplicate_before_normalising, 5),
}


def show_failure(name: str, run: RunConfig) -> None:
    """Print what a failure changes."""
    for what, sound, wrong in CORPUS_BREAKS[name][0](run):
        print(f"{what}: {sound:.4f} as it should be, {wrong:.4f} with --break {name}")
