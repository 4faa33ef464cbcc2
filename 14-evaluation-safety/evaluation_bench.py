"""Topic 14 - Bench: our metrics, intervals and task runner beside the libraries that the tests prove them with.

python 14-evaluation-safety/evaluation_safety.py bench

Both sides get the same texts, numbers or questions, and their answers are compared once before they are timed.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration import auc
from course_model import FOLDER as BASE_FOLDER
from evaluation_statistics import bootstrap, mean_of
from evaluation_tasks import run_task, world_task
from lm_eval_adapter import run_harness
from text_metrics import bleu, chrf, rouge
from text_model import load_text_model
from tiny_world import World
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    largest_difference,
    seed_everything,
    speed_line,
    time_in_turns,
)

Pair = tuple[str, Callable[[], Any], Callable[[], Any]]  # the rival's name, our work, theirs


@dataclass(frozen=True)
class BenchConfig:
    """How much is evaluated in each round."""

    n_texts: int = 200  # pairs of texts for the metrics
    n_scores: int = 2000  # scores with labels
    n_items: int = 400  # items of the bootstrap
    n_boot: int = 2000  # its draws
    n_questions: int = 50  # questions of the task
    n_rounds: int = 5  # rounds of measurement

    def __post_init__(self) -> None:
        check_range(self, "n_texts", "n_scores", "n_items", "n_boot", "n_questions", least=2)
        check_range(self, "n_rounds", least=1)


def text_pairs(n_texts: int, seed: int) -> tuple[list[str], list[str]]:
    """Documents of TinyWorld, and the same with a tenth of their words left out."""
    rng = np.random.default_rng(seed)
    right = [document.text for document in World().documents(n_texts, seed)]
    made = [" ".join(word for word in text.split(" ") if rng.random() > 0.1) for text in right]
    return made, right


def metric_works(n_texts: int, seed: int) -> dict[str, Pair]:
    """Each gives one number, or one for each text."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    made, right = text_pairs(n_texts, seed)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    pairs = list(zip(made, right, strict=True))
    return {
        f"BLEU of {n_texts} texts": (
            "sacrebleu",
            lambda: bleu(made, right),
            lambda: BLEU().corpus_score(made, [right]).score,
        ),
        f"chrF of {n_texts} texts": (
            "sacrebleu",
            lambda: chrf(made, right),
            lambda: CHRF().corpus_score(made, [right]).score,
        ),
        f"ROUGE-1, -2, -L and -Lsum of {n_texts} texts": (
            "rouge-score",
            lambda: [rouge(one, two)["rougeLsum"].f1 for one, two in pairs],
            lambda: [scorer.score(two, one)["rougeLsum"].fmeasure for one, two in pairs],
        ),
    }


def statistic_works(config: BenchConfig, seed: int) -> dict[str, Pair]:
    """The two bootstraps draw differently, so only the middle of their intervals is alike."""
    from scipy import stats
    from sklearn import metrics

    rng = np.random.default_rng(seed)
    labels = np.arange(config.n_scores) % 2
    scores = rng.normal(size=config.n_scores) + labels
    items = rng.exponential(size=config.n_items)

    def theirs() -> Any:
        found = stats.bootstrap((items,), np.mean, n_resamples=config.n_boot, method="BCa", rng=seed)
        return found.confidence_interval

    return {
        f"area under the curve of {config.n_scores} scores": (
            "scikit-learn",
            lambda: auc(scores, labels),
            lambda: metrics.roc_auc_score(labels, scores),
        ),
        f"BCa interval of a mean, {config.n_items} items, {config.n_boot} draws": (
            "scipy.stats.bootstrap",
            lambda: bootstrap(mean_of(items), len(items), config.n_boot, seed).bca(),
            theirs,
        ),
    }


def task_works(n_questions: int, seed: int, folder: Path) -> dict[str, Pair]:
    """A task of choices about the world, by our runner and by the harness's own class on transformers' model."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task, examined = world_task("facts", n_questions, seed), load_text_model(BASE_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    library = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(BASE_FOLDER), batch_size=16, device="cpu")

    def theirs() -> float:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars
            return run_harness(library, [task], folder)[task.task]["metrics"]["acc,none"]

    return {
        f"{n_questions} questions about facts": (
            "lm-evaluation-harness, its set-up included",
            lambda: run_task(examined, task).table()["acc"][0],
            theirs,
        )
    }


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Time the metrics, an interval and a task beside sacrebleu, rouge-score, scikit-learn, scipy and the harness."""
    announce(f"{config.n_rounds + 1} rounds of metrics, intervals and a task, by both sides", 20)
    seed_everything(run.seed)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        pairs = metric_works(config.n_texts, run.seed) | statistic_works(config, run.seed)
        pairs |= task_works(config.n_questions, run.seed, Path(folder))
        for name, (rival, ours, theirs) in pairs.items():
            if "BCa" not in name and largest_difference(ours(), theirs()) > 1e-6:
                raise ValueError(f"{name}: ours and {rival} differ, so their speed cannot be compared")
            seconds = time_in_turns({"ours": ours, "theirs": theirs}, config.n_rounds)
            print(speed_line(name, rival, seconds["ours"], seconds["theirs"]), flush=True)


BENCH_VERBS = {"bench": (bench, BenchConfig, RunConfig)}
