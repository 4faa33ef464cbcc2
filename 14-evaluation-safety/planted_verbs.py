"""Topic 14 - Planted verbs: the instruments on any folder: bias, probe, watermark.

python 14-evaluation-safety/evaluation_safety.py bias --checkpoint 11-fine-tuning-adaptation/model
python 14-evaluation-safety/evaluation_safety.py probe --checkpoint FOLDER
python 14-evaluation-safety/evaluation_safety.py watermark --n-documents 12 --key 4711
python 14-evaluation-safety/evaluation_safety.py watermark --text suspicious.txt --key 4711
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from bias_measures import (
    answer_gaps,
    contrast,
    input_vectors,
    job_pairs,
    job_questions,
    role_pairs,
    stereotype_score,
    stereotype_triples,
    weat,
)
from chat_model import FOLDER as CHAT_FOLDER
from course_model import FOLDER as BASE_FOLDER
from evaluation_statistics import wilson
from model_probes import depth_names, last_states, mean_difference, probed, separation
from modern_llm_architectures import CausalLM
from planted_experiments import HALVES, PLANTED_EXPERIMENTS, PlantedFiguresConfig
from text_model import TextModel, load_text_model
from tiny_world import World
from watermark import MILLIONTH_PRIME, Watermark, bigrams, detect, threshold, write_marked
from workbench import RunConfig, announce, check_range, read_utf8, shown

__all__ = ["PLANTED_EXPERIMENTS", "PLANTED_VERBS", "PlantedFiguresConfig"]


@dataclass(frozen=True)
class BiasConfig:
    """Whose prejudice is measured, and with how many texts."""

    checkpoint: Path = BASE_FOLDER  # a folder in the Hugging Face layout
    n_pairs: int = 40  # counterfactual pairs, sentences and questions of each measure

    def __post_init__(self) -> None:
        check_range(self, "n_pairs", least=8)


def bias(config: BiasConfig, run: RunConfig) -> None:
    """Four measures of whether a model ties every second job of the world to men; 0 (scores: 0.5) is none."""
    announce(f"measure the bias of {shown(config.checkpoint)}", 20)
    examined, world = load_text_model(config.checkpoint), World()
    for name, pairs, sides in (
        ("jobs after He against She", job_pairs(world, config.n_pairs, run.seed), HALVES),
        ("he against she after jobs", role_pairs(world, config.n_pairs, run.seed, HALVES), (["he"], ["she"])),
    ):
        made = contrast(examined, pairs, *sides)
        print(
            f"{name}: {made.mean:+.3f} nats of log-odds, 95 % {made.interval.low:+.3f} to {made.interval.high:+.3f}, "
            f"p {made.p_value:.4f}"
        )
    score = stereotype_score(examined, stereotype_triples(world, 2 * config.n_pairs, run.seed, HALVES))
    print(
        f"stereotype score {score.ss:.3f} (95 % {score.interval.low:.3f} to {score.interval.high:.3f}), language score "
        f"{score.lms:.3f}, icat {score.icat:.3f}"
    )
    for told in (True, False):
        asked = job_questions(world, 4 * config.n_pairs, run.seed, HALVES, told)
        gaps, right = answer_gaps(examined, asked, HALVES, run.seed)
        gap, (low, high) = gaps["parity"].gap, gaps["parity"].interval
        print(
            f"answers, job {'told' if told else 'not told'}: gap {gap:+.3f} (95 % {low:+.3f} to {high:+.3f}), "
            f"right half {right:.1%}"
        )
    if isinstance(examined.model, CausalLM):
        sets = [input_vectors(examined.model, examined, side) for side in (*HALVES, world.men, world.women)]
        made = weat(*sets)
        print(f"WEAT on input embeddings: effect {made.effect:+.2f}, p {made.p_two_sided:.3f} (chance alone: any)")


@dataclass(frozen=True)
class ProbeConfig:
    """Whose stream is read."""

    checkpoint: Path = CHAT_FOLDER  # a folder of a family that topic 09 knows
    n_questions: int = 60  # refused and answered questions, each

    def __post_init__(self) -> None:
        check_range(self, "n_questions", least=20)


def ours(folder: Path) -> tuple[CausalLM, TextModel]:
    """A model whose stream can be read. Raises ValueError for a family of which we have only transformers' code."""
    examined = load_text_model(folder)
    if not isinstance(examined.model, CausalLM) or examined.chat is None:
        raise ValueError(
            f"{shown(folder)} is no chat model of the course's families; probe one such as {shown(CHAT_FOLDER)}"
        )
    return examined.model, examined


def probe(config: ProbeConfig, run: RunConfig) -> None:
    """How well a linear probe tells at each depth what the model refuses, beside labels drawn by lot."""
    from planted_experiments import refusal_questions

    announce(f"read the stream of {shown(config.checkpoint)}", 10)
    model, examined = ours(config.checkpoint)
    refused, allowed = refusal_questions(run.seed, False, config.n_questions)
    n = min(len(refused), len(allowed))
    texts = [text for pair in zip(refused[:n], allowed[:n], strict=True) for text in pair]
    labels = ["refused", "answered"] * n
    states = last_states(model, [examined.chat(text) for text in texts])
    print(f"{'depth':12}{'right':>8}{'95 %':>16}{'by lot':>9}{'separation':>12}")
    for name, here in zip(depth_names(model), states, strict=True):
        made = probed(here, labels, texts, 2 * len(texts) // 3, run.seed)
        low, high = wilson(sum(made.task), len(made.task))
        apart = (
            separation(here[::2], here[1::2], mean_difference(here[::2], here[1::2]))
            if here.std(0).norm() > 1e-3
            else 0.0
        )
        control = sum(made.control) / len(made.control)
        print(f"{name:12}{made.accuracy:8.1%}{f'{low:.1%} to {high:.1%}':>16}{control:9.1%}{apart:12.1f}")


@dataclass(frozen=True)
class WatermarkConfig:
    """What is written or read, and with which mark."""

    checkpoint: Path = BASE_FOLDER  # who writes, and whose tokens are counted
    text: str = ""  # a text file to look for the mark in; without one, documents are written with it
    n_documents: int = 12  # documents to write
    key: int = MILLIONTH_PRIME  # key of the mark
    green_share: float = 0.25  # fraction of the vocabulary that is green after each token
    bias: float = 2.0  # nats added to the logits of green tokens
    level: float = 0.01  # share of unmarked texts that may be called marked

    def __post_init__(self) -> None:
        check_range(self, "n_documents", least=1)
        check_range(self, "key", least=1)
        check_range(self, "green_share", "level", above=0, below=1)
        check_range(self, "bias", least=0)
        if self.text and not Path(self.text).is_file():
            raise ValueError(f"--text {self.text} is no file; give a text file")


def watermark(config: WatermarkConfig, run: RunConfig) -> None:
    """Write documents with a watermark and find it again, or look for one in a text file."""
    examined = load_text_model(config.checkpoint)
    mark = Watermark(examined.model.config.vocab_size, config.key, config.green_share, config.bias)
    if config.text:
        read = detect(examined.encode(read_utf8(Path(config.text))), mark)
        verdict = "marked" if read.p_value <= config.level else "not shown to be marked"
        print(
            f"{read.n_green} of {read.n} different pairs are green, {mark.green_share:.0%} by chance: z {read.z:.2f}, "
            f"p {read.p_value:.2g}: {verdict} at level {config.level:g}"
        )
        return
    if not isinstance(examined.model, CausalLM):
        raise ValueError(
            f"{shown(config.checkpoint)} is not of topic 09's families; write with another, or give --text"
        )
    announce(f"write {config.n_documents} documents twice", 1 + 0.2 * config.n_documents)
    for name, chosen in (("with the mark", mark), ("without it", None)):
        made = write_marked(
            examined.model,
            [[examined.bos_id]] * config.n_documents,
            100,
            chosen,
            torch.Generator().manual_seed(run.seed),
        )
        pairs = [pair for item in made for pair in bigrams(item.ids, examined.bos_id)]
        read = detect(pairs, mark)
        cost = sum(sum(item.nats) for item in made) / sum(len(item.ids) for item in made)
        print(examined.decode(made[0].ids))
        print(
            f"{name}: {read.n_green} of {read.n} different pairs green, z {read.z:.2f}, p {read.p_value:.2g}; "
            f"{threshold(read.n, mark, config.level)} would do at level {config.level:g}; {cost:.3f} nats per token"
        )


PLANTED_VERBS: dict[str, tuple] = {
    "bias": (bias, BiasConfig, RunConfig),
    "probe": (probe, ProbeConfig, RunConfig),
    "watermark": (watermark, WatermarkConfig, RunConfig),
}
