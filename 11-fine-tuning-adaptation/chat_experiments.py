"""Topic 11 - Chat experiments: what the committed chat model does, and what it means to start from another base.

python 11-fine-tuning-adaptation/fine_tuning_adaptation.py figures chat overtraining
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat_model import FOLDER, REPORT
from course_model import FOLDER as BASE_FOLDER
from course_model import LONG_RUN, load_course_model
from equal_compute import remembered
from fine_tuning_adaptation import MethodConfig, SftConfig, adapt, examine_answers, fine_tune
from low_rank_adapters import LoraConfig
from workbench import Column, RunConfig, pick_device, save_results, seed_everything

if TYPE_CHECKING:
    from adaptation_experiments import FiguresConfig


def chat(config: "FiguresConfig", run: RunConfig) -> None:
    """The committed chat model's report as a table; nothing is trained."""
    report = json.loads((FOLDER / REPORT).read_text(encoding="utf-8"))
    heads = ("Right", "Right, second turn", "Refused", "Abstained")
    columns = [Column("Held-out instructions"), *(Column(head, digits=".0%") for head in heads)]
    rows = [[category, *numbers.values()] for category, numbers in report["categories"].items()]
    made = ([0], report["command"], report["machine"])
    save_results(config.folder / "results.json", "chat", columns, rows, *made)


BASES = {"9.2 million positions: the course model": BASE_FOLDER, "360 million positions: long_run/": LONG_RUN}


def overtraining(config: "FiguresConfig", run: RunConfig) -> None:
    """The same fine-tuning from a base model and from one of the same shape that was trained 40 times as long."""
    columns = [Column("Pretrained on"), Column("Gap before", "nats per token", ".4f")]
    columns += [Column(f"Right: {name}", digits=".1%") for name in ("fact", "read", "sum", "sort")]
    columns += [Column("Mean of all", digits=".1%"), Column("Gap on answers", "nats per token", ".3f")]
    rows = []
    for name, folder in BASES.items():
        found = [tuned(folder, config, run, seed) for seed in range(config.n_seeds)]
        before = json.loads((folder / "report.json").read_text(encoding="utf-8"))["gaps"]["all"][1]
        answers = [[item["accuracy"][key] for item in found] for key in ("fact", "read", "sum", "sort")]
        rows.append([name, before, *answers, *([item[key] for item in found] for key in ("mean", "answer_gap"))])
    config.save("overtraining", columns, rows, "overtraining")


def tuned(folder: Path, config: "FiguresConfig", run: RunConfig, seed: int) -> dict[str, Any]:
    """A base model fine-tuned by LoRA as in the other tables, and examined."""

    def measure() -> dict[str, Any]:
        seed_everything(seed)
        model, tokenizer = load_course_model(folder)
        how = MethodConfig("lora")
        model = adapt(model.to(pick_device(run.device)), tokenizer, how, LoraConfig())
        fine_tune(model, tokenizer, SftConfig(max_steps=config.sft_steps), how, seed)
        return examine_answers(model, tokenizer, config.exam)

    sizes = [config.sft_steps, config.n_questions, config.n_documents]
    return remembered(config, run, f"overtraining, {folder.name}, seed {seed}, sizes {sizes}", measure)


CHAT_EXPERIMENTS: dict[str, tuple[Callable, float]] = {"chat": (chat, 1), "overtraining": (overtraining, 200)}
