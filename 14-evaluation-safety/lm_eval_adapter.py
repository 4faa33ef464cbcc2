"""Topic 14 - Adapter for lm-evaluation-harness: its tasks on our models, our tasks in its format, the same numbers.

    lm = harness_model(load_text_model("10-pretraining-llms/model"))
    run_harness(lm, [task], folder)["facts"]                  # metrics and every item, offline

The harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness; version 0.4.13 in the tests) is an optional
package: pip install lm-eval. Its tasks are YAML files with Jinja templates; JSON is YAML, so ours are written as JSON.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from evaluation_tasks import Task
from text_model import TextModel
from workbench import write_atomically


@cache
def adapter_class() -> type:
    """The subclass of lm_eval's LM. Raises ValueError with the pip command where the harness is missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ValueError("the harness is not installed: pip install lm-eval") from None

    class HarnessModel(LM):
        """A TextModel as the harness asks: log likelihoods are positive for nobody, so nats change their sign."""

        def __init__(self, examined: TextModel) -> None:
            super().__init__()
            self.examined = examined

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = self.examined.likelihoods([request.args for request in requests])
            return [(-each.nats, each.greedy) for each in found]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            return [-self.examined.rolling(request.args[0]).nats for request in requests]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [self.write(*request.args) for request in requests]

        def write(self, prompt: str, options: dict[str, Any]) -> str:
            """One answer. Raises ValueError for a request to sample: this adapter is greedy."""
            if options.get("do_sample") or options.get("temperature", 0):
                raise ValueError("this adapter writes greedily; ask for do_sample: false")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            return self.examined.complete([prompt], until, options.get("max_gen_toks", 256))[0]

    return HarnessModel


def harness_model(examined: TextModel) -> Any:
    """A model that `lm_eval.simple_evaluate(model=...)` takes."""
    return adapter_class()(examined)


METRICS = {
    "choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"),
    "generate": ("exact_match",),
    "text": ("byte_perplexity", "bits_per_byte"),
}
OUTPUT_TYPES = {"choice": "multiple_choice", "generate": "generate_until", "text": "loglikelihood_rolling"}


def write_harness_task(task: Task, folder: Path) -> Path:
    """Write a task as the harness reads it: data as JSONL, prompts filled in already, and NAME.yaml.

    Raises ValueError for a chat, whose template the harness applies itself, and for several right answers.
    """
    if task.chat:
        raise ValueError(f"task {task.task!r} is a chat; the harness applies a chat template itself")
    folder = folder.absolute()
    rows = []
    for question in task.questions:
        if task.kind == "text":
            rows.append({"text": question["text"]})
        else:
            if not isinstance(question["answer"], int | str):
                raise ValueError(f"task {task.task!r} has several right answers; the harness's exact match takes one")
            own = {name: question[name] for name in ("choices", "answer") if name in question}
            rows.append({"prompt": task.prompt(question)} | own)
    data = folder / f"{task.task}.jsonl"
    write_atomically(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    fields = {"choice": {"doc_to_choice": "{{choices}}"}, "generate": {}, "text": {}}[task.kind]
    if task.kind == "generate":
        stops = {"until": list(task.until), "max_gen_toks": task.max_new_tokens, "do_sample": False}
        fields["generation_kwargs"] = stops
        strip = [{"function": "remove_whitespace"}, {"function": "take_first"}]  # an answer begins with a space
        fields["filter_list"] = [{"name": "strip", "filter": strip}]
    described = {
        "task": task.task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": OUTPUT_TYPES[task.kind],
        "doc_to_text": "" if task.kind == "text" else "{{prompt}}",
        "doc_to_target": "{{text}}" if task.kind == "text" else "answer" if task.kind == "choice" else "{{answer}}",
        "target_delimiter": task.delimiter,
        "metric_list": [{"metric": name} for name in METRICS[task.kind]],
        "metadata": {"version": 1.0},
        **fields,
    }
    path = folder / f"{task.task}.yaml"
    write_atomically(path, (json.dumps(described, indent=1) + "\n").encode())
    return path


def run_harness(lm: Any, tasks: Sequence[Task], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the harness on our tasks, offline: for each task its metrics and its samples, in the order of the questions.

    lm: `harness_model(...)`, or a model of the harness's own, such as HFLM.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for task in tasks:
        write_harness_task(task, folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [task.task for task in tasks]
    made = simple_evaluate(model=lm, tasks=names, task_manager=manager, num_fewshot=0, bootstrap_iters=0)
    found = {}
    for name in names:
        samples = sorted(made["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = {"metrics": made["results"][name], "samples": samples}
    return found
