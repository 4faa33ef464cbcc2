"""Topic 10 - Pretraining LLMs: from dirty text to a language model in a folder that every library loads.

python 10-pretraining-llms/pretraining_llms.py                     # clean, shard, train, compare: two minutes
python 10-pretraining-llms/pretraining_llms.py corpus              # clean a crawl, and judge every filter
python 10-pretraining-llms/pretraining_llms.py examine             # what the committed course model is worth
python 10-pretraining-llms/pretraining_llms.py generate --prompt "One day Anna"
torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py pretrain   # the course model, again
torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py parallel --scheme zero1
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corpus_failures import CORPUS_BREAKS, show_failure
from corpus_pipeline import CorpusConfig, clean_pages, corpus, print_scores, render_report, scores
from course_model import (
    FOLDER,
    CheckpointConfig,
    ExamConfig,
    GenerateConfig,
    ModelSizes,
    PretrainConfig,
    SourceConfig,
    draw_samples,
    examine_folder,
    gaps_by_kind,
    generate,
    load_course_model,
    pretrain,
    pretrain_model,
    print_corpus,
    shards,
)
from dirty_corpus import DirtConfig, dirty_corpus
from parallel_experiments import ParallelConfig, parallel, quiet_run
from shards import ShardConfig
from tiny_world import World
from training_cost import EstimateConfig, estimate
from workbench import RunConfig, announce, check_range, largest_difference, run_verbs

BREAKS = CORPUS_BREAKS  # those of `parallel` stand in parallel_experiments


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of the tour through the pipeline, or the failure to show in its place."""

    n_pages: int = 300  # good pages of the crawl
    max_steps: int = 300  # optimizer steps of the small model
    n_held_out: int = 500  # held-out documents to examine models with
    break_: Literal["none", *BREAKS] = "none"  # the failure to show

    def __post_init__(self) -> None:
        check_range(self, "n_pages", least=70)
        check_range(self, "max_steps", least=20)
        check_range(self, "n_held_out", least=100)


def demo(config: DemoConfig, run: RunConfig) -> None:
    """Clean a crawl with planted dirt, train on shards, compare with the course model, and share one step."""
    if config.break_ != "none":
        announce(f"showing the failure {config.break_!r}", BREAKS[config.break_][1])
        show_failure(config.break_, run)
        return
    announce("clean a crawl, train a small model, examine the course model", 110)
    show_cleaning(config, run)
    show_training(config, run)
    show_sharing(run)


def show_cleaning(config: DemoConfig, run: RunConfig) -> None:
    pages = dirty_corpus(DirtConfig(n_pages=config.n_pages), run.seed)
    records, pipeline = clean_pages(pages, CorpusConfig(n_pages=config.n_pages))
    print(f"1. A crawl of {len(pages)} pages; {len(records)} are left")
    print(render_report(pipeline.report))
    print_scores(scores(pages, pipeline))


def show_training(config: DemoConfig, run: RunConfig) -> None:
    """A small model from shards, and the committed one, on the same held-out documents."""
    print(f"2. A small model trains for {config.max_steps} steps on shards")
    documents = World().documents(config.n_held_out, 3, "validation")
    training = PretrainConfig(max_steps=config.max_steps, warmup_steps=10, cooldown_steps=config.max_steps // 2)
    training = dataclasses.replace(training, eval_every=0, save_every=config.max_steps, learning_rate=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        sizes, source = ModelSizes(d_model=64, d_ff=176), SourceConfig(n_documents=min(10_000, 50 * config.max_steps))
        out = dataclasses.replace(run, out=Path(folder))
        small, tokenizer, made, _ = pretrain_model(sizes, source, training, out)
        print_corpus(made)
    course, _ = load_course_model(FOLDER)
    for name, model in (("small model", small.eval()), ("course model", course)):
        floor, gap, error = gaps_by_kind(model, tokenizer, documents)["all"]
        print(f"{name}: {gap:.4f} ± {error:.4f} nats per token above the floor of {floor:.4f}")
    for text, possible in draw_samples(course, tokenizer, ExamConfig(n_samples=3, exam_seed=run.seed)):
        print(f"  the course model writes: {text}" + ("" if possible else "   (the grammar could not)"))


def show_sharing(run: RunConfig) -> None:
    """The same ten steps on one process and on two, with the optimizer's state shared out."""
    config = ParallelConfig(max_steps=10)
    alone, shared = (quiet_run(dataclasses.replace(config, scheme="zero1"), size, run.seed) for size in (1, 2))
    difference = largest_difference(alone[0]["weights"], shared[0]["weights"])
    states = [result["state_bytes"] for result in (alone[0], shared[0])]
    print(
        f"3. ZeRO-1 on two processes: weights differ from one process by {difference:.1e}; state of the optimizer "
        f"{states[0]:,} bytes alone, {states[1]:,} on each of two"
    )


def main(argv: list[str] | None = None) -> None:
    from pretraining_experiments import FiguresConfig, bench, figures  # here, because they import this module's parts

    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, DemoConfig, RunConfig),
        "corpus": (corpus, CorpusConfig, RunConfig),
        "shards": (shards, ShardConfig, RunConfig),
        "pretrain": (pretrain, ModelSizes, SourceConfig, PretrainConfig, ExamConfig, RunConfig),
        "examine": (examine_folder, CheckpointConfig, ExamConfig, RunConfig),
        "generate": (generate, CheckpointConfig, GenerateConfig, RunConfig),
        "parallel": (parallel, ParallelConfig, RunConfig),
        "estimate": (estimate, EstimateConfig),
        "bench": (bench, RunConfig),
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
