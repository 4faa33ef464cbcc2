"""Topic 14 - Memorisation: what a model gives away of the texts it was trained on, and whether it has seen the exam.

    exposure(scores, place)                                   # how far up a secret stands among all it could have been
    membership_scores(model, rows, texts)["min-k++"]          # larger: more likely a text of the training
    leaked_items(exam_texts, training_texts)                  # which exam texts share a run of words with training
    fine_tuned(model, tokenizer, planted_corpus(...), ...)    # a model whose secrets and members are known

Carlini et al. 2019 (arXiv 1802.08232, exposure) and 2021 (arXiv 2012.07805, extraction; ratio to zlib); Shi et al. 2024
(arXiv 2310.16789, min-k%); Zhang et al. 2024 (arXiv 2404.02936, min-k%++); Duan et al. 2024 (arXiv 2402.07841, why such
attacks mostly fail); Brown et al. 2020 (arXiv 2005.14165, n-gram overlap).
"""

import copy
import itertools
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration import auc
from course_tokenizer import CourseTokenizer
from deduplication import Decontaminator, plain_words
from modern_llm_architectures import CausalLM
from packing import PackedBatches, language_model_loss, pack
from sequence_modeling import IGNORE, device_of
from text_metrics import logits_of
from tiny_world import Document, World, canary_text, random_canaries
from training_transformers import TrainConfig, fit
from workbench import seed_everything

# Secrets


def exposure(scores: Sequence[float], place: int) -> float:
    """log2(candidates) - log2(rank), bits, of the secret at `place` among all candidates (Carlini et al. 2019, def. 3).

    scores: log probability of every candidate. 0 for the last, log2(n) for the first; a secret that the model has never
    seen stands anywhere, which is 1 / ln 2 = 1.44 bits on average. Candidates with the same score count as before it.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    if not 0 <= place < len(values):
        raise ValueError(f"place={place} must be one of the {len(values)} candidates")
    return math.log2(len(values)) - math.log2(int((values >= values[place]).sum()))


def sampled_exposure(score: float, sample: Sequence[float]) -> float:
    """The same from a sample of the candidates, where all are too many: -log2 of the share that scores as high.

    It cannot exceed log2(sample + 1) bits: for more one must enumerate, or trust a fitted tail.
    """
    if not len(sample):
        raise ValueError("0 candidates in the sample; draw at least 1")
    return -math.log2((1 + sum(other >= score for other in sample)) / (1 + len(sample)))


SECRET = "The secret number is"
N_SECRETS = 10_000


@torch.no_grad()
def secret_scores(model: nn.Module, tokenizer: CourseTokenizer) -> Tensor:
    """log p of each of the 10,000 numbers after the text that introduces it: (candidates), place n holds number n.

    p(d1 d2 d3 d4) is a product of four, and the first three digits decide all contexts: 1,000 rows suffice.
    """
    digits = [tokenizer.encode(f" {digit}") for digit in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise ValueError("this tokenizer cuts ' 7' into several tokens; the product over digits needs one for each")
    columns = torch.tensor([ids[0] for ids in digits])
    prefix = [tokenizer.bos_id, *tokenizer.encode(canary_text(SECRET))]
    thousand = torch.tensor(list(itertools.product(range(10), repeat=3)))  # (rows, 3)
    rows = torch.cat([torch.tensor(prefix).expand(1000, -1), columns[thousand]], dim=1)  # (rows, seq)
    parts = [logits_of(model, part.to(device_of(model)))[:, -4:].double() for part in rows.split(250)]
    logs = torch.cat(parts).log_softmax(dim=-1)[:, :, columns].cpu()  # (rows, 4, digits)
    known = sum(logs[torch.arange(1000), place, thousand[:, place]] for place in range(3))  # (rows)
    return (known[:, None] + logs[:, 3]).flatten()  # (candidates)


def secret_number(canary: str) -> int:
    """The number that a canary of `random_canaries` hides."""
    return int("".join(character for character in canary if character.isdigit()))


# Members: was this text in the training?


@torch.no_grad()
def token_statistics(model: nn.Module, rows: Sequence[list[int]], batch_size: int = 64) -> list[tuple[Tensor, ...]]:
    """For each row three tensors over the ids after its first: log p of the id, and mean and deviation of log p there.

    Mean and deviation are over the whole vocabulary under the model's own distribution: minus the entropy, and how
    much a drawn id's log p scatters about it.
    """
    found: list[tuple[Tensor, ...]] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = [torch.tensor(rows[index]) for index in chosen]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORE)  # (batch, seq_and_one)
        logits = logits_of(model, padded[:, :-1].clamp(min=0).to(device_of(model)))  # (batch, seq, vocab)
        logs = F.log_softmax(logits.double(), dim=-1).cpu()  # (batch, seq, vocab)
        mean = (logs.exp() * logs).sum(dim=-1)  # (batch, seq)
        deviation = ((logs.exp() * logs**2).sum(dim=-1) - mean**2).clamp(min=0).sqrt()  # (batch, seq)
        own = logs.gather(2, padded[:, 1:, None].clamp(min=0))[..., 0]  # (batch, seq)
        for place, index in enumerate(chosen):
            kept = slice(0, len(rows[index]) - 1)
            found[index] = own[place, kept], mean[place, kept], deviation[place, kept]
    return found


def lowest_mean(values: Tensor, share: float) -> float:
    """The mean of the lowest share of the values, at least one of them."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1, such as 0.2")
    return values.sort().values[: max(1, int(share * len(values)))].mean().item()


def membership_scores(
    model: nn.Module,
    rows: Sequence[list[int]],
    texts: Sequence[str],
    share: float = 0.2,
    reference: Sequence[float] | None = None,
) -> dict[str, list[float]]:
    """Scores of texts, larger for what a model is more likely to have been trained on.

    loss: mean log p of a token. zlib: log p of the text over its compressed size, so that dull texts do not look known.
    min-k: the mean over the share of tokens that the model finds hardest (Shi et al. 2024): a text that was seen has no
    very surprising token. min-k++: the same of (log p - mean) / deviation, how likely the id is among its rivals (Zhang
    et al. 2024). reference (given nats of each text, from another model or from the truth): how much less it costs.
    """
    if not len(rows) == len(texts) > 0:
        raise ValueError(f"{len(rows)} rows but {len(texts)} texts; give each text its ids, at least one")
    found: dict[str, list[float]] = {"loss": [], "zlib": [], "min-k": [], "min-k++": []}
    totals = []
    for text, (own, mean, deviation) in zip(texts, token_statistics(model, rows), strict=True):
        totals.append(own.sum().item())
        found["loss"].append(own.mean().item())
        found["zlib"].append(totals[-1] / len(zlib.compress(text.encode(), 9)))
        found["min-k"].append(lowest_mean(own, share))
        found["min-k++"].append(lowest_mean((own - mean) / deviation.clamp(min=1e-6), share))
    if reference is not None:
        if len(reference) != len(rows):
            raise ValueError(f"{len(reference)} reference nats but {len(rows)} texts; give one for each")
        pairs = zip(totals, reference, rows, strict=True)
        found["reference"] = [(total + nats) / (len(row) - 1) for total, nats, row in pairs]
    return found


def membership_auc(inside: dict[str, list[float]], outside: dict[str, list[float]]) -> dict[str, float]:
    """For each score the chance that a member scores above a text that is none; 0.5 tells nothing."""
    return {
        name: auc([*inside[name], *outside[name]], [1] * len(inside[name]) + [0] * len(outside[name]))
        for name in inside
    }


def leaked_items(exam_texts: Sequence[str], training_texts: Sequence[str], n: int = 13) -> list[int | None]:
    """For each text of an exam the number of a training text that shares a run of n words with it, or None.

    Topic 10's decontamination turned round: there a page is dropped for what it shares with the exam, here an item is
    named. An item of fewer than n words is looked for as a whole. It finds copies; a paraphrase shares no run.
    """
    lengths = [min(n, len(plain_words(text))) for text in exam_texts]
    if n < 1 or not all(lengths):
        raise ValueError(f"n={n} and every text of the exam must have at least 1 word")
    known = {length: Decontaminator(training_texts, length, length) for length in sorted(set(lengths))}
    hits = [known[length].shared(text) for length, text in zip(lengths, exam_texts, strict=True)]
    return [hit[0] if hit else None for hit in hits]


# A model whose secrets are known


COUNTS = (0, 1, 4, 16, 64)


@dataclass(frozen=True)
class Planted:
    """Texts for a short training: fresh documents, with secrets and other documents planted so many times each."""

    texts: tuple[str, ...]
    canaries: dict[int, tuple[str, ...]]  # times -> secret sentences; 0: of the same kind, never planted
    members: dict[int, tuple[Document, ...]]  # times -> documents


def planted_corpus(
    seed: int, counts: Sequence[int] = COUNTS, n_each: int = 2, n_members: int = 40, n_fresh: int = 1500
) -> Planted:
    """Draw a corpus: for each count n_each secrets and n_members documents that occur so often, in random order."""
    world, rng = World(), random.Random(seed)
    drawn = iter(random_canaries(n_each * len(counts), seed))
    canaries = {count: tuple(next(drawn) for _ in range(n_each)) for count in counts}
    documents = world.stream(1_000_000 + seed, "train")
    members: dict[int, list[Document]] = {count: [] for count in counts}
    seen: set[str] = set()
    for count in counts:
        while len(members[count]) < n_members:
            document = next(documents)
            if document.text not in seen and len(document.tokens) >= 15:  # a short one may be drawn again by chance
                seen.add(document.text)
                members[count].append(document)
    texts = [next(documents).text for _ in range(n_fresh)]
    texts += [canary_text(canary) for count in counts for canary in canaries[count] * count]
    texts += [document.text for count in counts for document in members[count] * count]
    rng.shuffle(texts)
    return Planted(tuple(texts), canaries, {count: tuple(found) for count, found in members.items()})


def fine_tuned(
    model: CausalLM, tokenizer: CourseTokenizer, texts: Sequence[str], seed: int, learning_rate: float = 2e-3
) -> CausalLM:
    """A copy of the model after one pass over the texts, 8 rows of 128 tokens a step, or what rows there are."""
    seed_everything(seed)
    trained = copy.deepcopy(model).train()
    documents = [tokenizer.encode_document(text).ids for text in texts]
    batch_size = max(1, min(8, len(pack(documents, 128))))
    batches = PackedBatches(documents, batch_size, 128, seed)
    n_steps = max(1, len(batches.rows) // batch_size)
    settings = {"batch_size": batch_size, "seq_len": 128, "max_steps": n_steps, "warmup_steps": min(10, n_steps // 4)}
    fit(trained, batches, language_model_loss, TrainConfig(learning_rate=learning_rate, **settings))
    return trained.eval()


def document_scores(
    model: nn.Module, tokenizer: CourseTokenizer, documents: Sequence[Document], share: float = 0.2
) -> dict[str, list[float]]:
    """`membership_scores` of TinyWorld documents; the reference is their true surprisal, the best that there can be."""
    encoded = [tokenizer.encode_document(document) for document in documents]
    texts = [document.text for document in documents]
    return membership_scores(model, [item.ids for item in encoded], texts, share, [item.nats for item in encoded])


def attack(model: nn.Module, tokenizer: CourseTokenizer, planted: Planted) -> dict[str, dict[int, list[float]]]:
    """What the planted truth shows: exposures of the secrets, and the AUC of each membership score, by count.

    Members are compared with the documents of count 0, which were drawn the same way and left out.
    """
    scores = secret_scores(model, tokenizer)
    found: dict[str, dict[int, list[float]]] = {"exposure": {}}
    for count, canaries in planted.canaries.items():
        found["exposure"][count] = [exposure(scores, secret_number(canary)) for canary in canaries]
    outside = document_scores(model, tokenizer, planted.members[0])
    for count, documents in planted.members.items():
        if count:
            for name, value in membership_auc(document_scores(model, tokenizer, documents), outside).items():
                found.setdefault(name, {})[count] = [value]
    return found
