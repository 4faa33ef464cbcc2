"""Topic 15 - Code experiments: what a sandbox holds and costs, and what a model learns from running its programs.

python 15-real-world-applications/real_world_applications.py figures sandbox-attacks sandbox-cost cheats
python 15-real-world-applications/real_world_applications.py figures pass-at-k repair best-of-n   # trains for minutes

Trained models are kept in --out, so that an interrupted run goes on where it stopped.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from code_assistant import CodeConfig
from code_assistant import code as write_code
from code_failures import CODE_BREAKS
from code_model import (
    CodeModel,
    CodeTrainConfig,
    best_of_n_bound,
    code_train,
    exam_tasks,
    examine,
    expert_iteration,
    filtered_pass,
    judge_bodies,
    load_code_model,
    more_of_the_same,
    passes,
    second_attempts,
    train_base,
)
from code_tasks import draw_tasks
from equal_compute import remembered
from sandbox import Limits, Program, Sandbox, find_sandbox, probe
from sandbox_attacks import ATTACKS, CHEATS, JUDGES, RIGHT, SandboxConfig, attack_table, sandbox
from text_metrics import mean_pass_at_k
from workbench import Column, RunConfig, check_range, save_figure, save_results

COMMAND = "python 15-real-world-applications/real_world_applications.py figures"


@dataclass(frozen=True)
class CodeFiguresConfig(CodeTrainConfig):
    """The sizes of the experiments on code."""

    n_seeds: int = 3  # seeds 0, 1, ... of trainings and draws
    n_exam: int = 40  # held-out tasks of each length
    n_exam_samples: int = 20  # programs written for each
    n_runs: int = 60  # runs of which the cost is measured
    again: bool = False  # measure and train again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_seeds", "n_exam", least=1)
        check_range(self, "n_exam_samples", least=10)
        check_range(self, "n_runs", least=10)

    def save_code(self, name: str, columns: list[Column], rows: list[list], n_seeds: int = 1, of: str = "") -> None:
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), f"{COMMAND} {of or name}")


# The sandbox

SHOWN_MODES = {  # mode of the jail -> heading
    "guard": "names set to None",
    "limits": "limits, other user",
    "B": "tier B",
    "A": "tier A",
}


def sandbox_attacks(config: CodeFiguresConfig, run: RunConfig) -> None:
    """Every attack against every way of shutting in that this machine has.

    Predicted: a guard that sets names to None holds what limits hold and nothing else; limits and another user leave
    network, readable files and the kernel's faces open; tier B lets nothing but names of files be seen; tier A nothing.
    """
    report = probe()
    modes = [mode for mode in SHOWN_MODES if mode not in "AB" or mode >= report.tier]
    table = attack_table(modes, report.python)
    kinds = dict.fromkeys(attack.kind for attack in ATTACKS)
    rows = []
    for kind in kinds:
        for attack in ATTACKS:
            if attack.kind == kind:
                marks = ["held" if held else "**through**" for held in table[attack.name]]
                rows.append([f"{kind}: {attack.name}", attack.layer, *marks])
    held = [sum(table[name][place] for name in table) for place in range(len(modes))]
    rows.append(["held, of " + str(len(table)), "", *(str(n) for n in held)])
    columns = [Column("Attack"), Column("what holds it", digits="s")]
    columns += [Column(SHOWN_MODES[mode], digits="s") for mode in modes]
    config.save_code("sandbox-attacks", columns, rows)


def sandbox_cost(config: CodeFiguresConfig, run: RunConfig) -> None:
    """What a run costs in each way, alone and as one of fifty in one start, and what is left behind after all."""
    report, rows = probe(), []
    program = Program("def f(n):\n    return n * n + 1\n", "f", [[n] for n in range(5)])
    before = len(os.listdir("/proc/self/fd")), Path("/proc/self/mounts").read_text()
    for mode, name in SHOWN_MODES.items():
        if mode in "AB" and mode < report.tier:
            continue
        box, seconds = Sandbox(mode, report.python), []
        for _ in range(config.n_runs):
            start = time.perf_counter()
            box.run([program], Limits(wall_seconds=30))
            seconds.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        box.run([program] * 50, Limits(wall_seconds=30))
        each = 1000 * (time.perf_counter() - start) / 50
        rows.append([name, *(float(np.percentile(seconds, share)) for share in (50, 95)), each])
    after = len(os.listdir("/proc/self/fd")), Path("/proc/self/mounts").read_text()
    rows.append(["descriptors and mounts left", float(after[0] - before[0]), float(after[1] != before[1]), 0.0])
    columns = [Column("Way"), Column("median", "ms", ".0f"), Column("95th percentile", "ms", ".0f")]
    columns.append(Column("each of 50 together", "ms", ".1f"))
    config.save_code("sandbox-cost", columns, rows)


def cheats(config: CodeFiguresConfig, run: RunConfig) -> None:
    """Every cheat before three judges.

    Predicted: half of the cheats pass each judge that runs beside the candidate; none passes the one outside.
    """
    box, programs = find_sandbox(), {"(the right program)": RIGHT, **CHEATS}
    columns = [believes([*programs.values()], box) for believes in JUDGES.values()]
    marks = [["passed" if believed else "failed" for believed in row] for row in zip(*columns, strict=True)]
    rows = [[name, *row] for name, row in zip(programs, marks, strict=True)]
    fooled = [sum(row[place] == "passed" for row in rows[1:]) for place in range(1, len(JUDGES) + 1)]
    rows.append([f"cheats passed, of {len(CHEATS)}", *(str(n) for n in fooled)])
    config.save_code("cheats", [Column("Program"), *(Column(name, digits="s") for name in JUDGES)], rows)


# The model


def kept(config: CodeFiguresConfig, run: RunConfig, kind: str, seed: int, make: Callable[[], CodeModel]) -> CodeModel:
    """A trained model of --out, or a new one that is then kept there."""
    folder = run.out / f"code-{kind}-{seed}"
    if config.again or not (folder / "config.json").exists():
        make().model.save_pretrained(folder)
    return load_code_model(folder)


def trained(config: CodeFiguresConfig, run: RunConfig, seed: int) -> dict[str, CodeModel]:
    """The three models of a seed: from references, after rounds alone, after as many steps on references."""
    base = kept(config, run, "base", seed, lambda: train_base(config, seed, run.out / f"code-run-{seed}"))

    def rounds() -> CodeModel:
        made, log = expert_iteration(base, config, seed)
        remembered(config, run, f"rounds of seed {seed}", lambda: {"log": log})
        return made

    return {
        "references": base,
        "then its own programs": kept(config, run, "rounds", seed, rounds),
        "then more references": kept(config, run, "control", seed, lambda: more_of_the_same(base, config, seed)),
    }


def pass_at_k(config: CodeFiguresConfig, run: RunConfig) -> None:
    """pass@1, pass@10 and greedy on held-out chains, before and after expert iteration, and after as many steps more.

    Predicted: on three operations pass@1 rises by more than ten points after the rounds and pass@10 by less; on two it
    stays within three points; the control gains less than half of that on three operations.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.n_seeds):
        for name, code in trained(config, run, seed).items():
            for length in (2, 3):
                what = f"exam {name}, seed {seed}, {length} operations, {config.n_exam} x {config.n_exam_samples}"

                def ask(code: CodeModel = code, length: int = length, seed: int = seed) -> dict[str, float]:
                    return examine(code, exam_tasks(config.n_exam, length), config.n_exam_samples, seed=seed)

                scores = remembered(config, run, what, ask)
                for kind, value in scores.items():
                    found.setdefault(name, {}).setdefault(f"{length} {kind}", []).append(value)
    keys = [f"{length} {kind}" for length in (2, 3) for kind in ("greedy", "pass@1", "pass@10")]
    rows = [[name, *(scores[key] for key in keys)] for name, scores in found.items()]
    columns = [Column("Trained on")]
    columns += [Column(f"{key[2:]}, {key[0]} operations", digits=".0%") for key in keys]
    config.save_code("pass-at-k", columns, rows, config.n_seeds)


def repair(config: CodeFiguresConfig, run: RunConfig) -> None:
    """A second attempt that sees the failure, against a fresh program, at equal programs and at equal tokens.

    Predicted, after Olausson et al. 2023: a repair passes less often than fresh programs of the same number of tokens.
    """
    found: dict[str, list[list[float]]] = {}
    for seed in range(config.n_seeds):
        models = trained(config, run, seed)
        for name in ("references", "then its own programs"):

            def ask(code: CodeModel = models[name], seed: int = seed) -> dict[str, Any]:
                return second_attempts(code, draw_tasks(config.n_exam, 78, "validation", (2, 3)), 6, 0.8, seed)

            numbers = remembered(config, run, f"repair by {name}, seed {seed}, {config.n_exam} tasks", ask)
            ratio = numbers["repair_tokens"] / numbers["fresh_tokens"]
            equal = float(np.mean([1 - (1 - chance) ** ratio for chance in numbers["chances"]]))
            cells = [numbers["failed"], numbers["repair"], numbers["fresh"], ratio, equal, numbers["unchanged"]]
            for place, value in enumerate(cells):
                found.setdefault(name, [[] for _ in cells])[place].append(value)
    columns = [Column("Trained on"), Column("first programs that fail a public case", digits=".1%")]
    columns += [Column("repair passes", digits=".1%"), Column("fresh one passes", digits=".1%")]
    columns += [Column("tokens, repair to fresh", digits=".2f"), Column("fresh ones of equal tokens", digits=".1%")]
    columns.append(Column("repair changes nothing", digits=".1%"))
    config.save_code("repair", columns, [[name, *cells] for name, cells in found.items()], config.n_seeds)


def best_of_n(config: CodeFiguresConfig, run: RunConfig) -> None:
    """The first of n programs that passes two public cases, against one that is picked by knowing the hidden ones.

    Predicted: the filter reaches nine tenths of what knowing would; some programs pass the public cases and are wrong.
    """
    sizes, found = [n for n in (1, 2, 5, 10, 20) if n <= config.n_exam_samples], {}
    for seed in range(config.n_seeds):
        code = trained(config, run, seed)["references"]

        def ask(code: CodeModel = code, seed: int = seed) -> dict[str, Any]:
            tasks = exam_tasks(config.n_exam, 3)
            bodies = code.write([task.prompt for task in tasks], config.n_exam_samples, 0.8, seed)
            public = passes(judge_bodies(tasks, bodies, cases=lambda task: task.public))
            return {"public": public, "hidden": passes(judge_bodies(tasks, bodies))}

        seen = remembered(config, run, f"best of n, seed {seed}, {config.n_exam} x {config.n_exam_samples}", ask)
        pairs = list(zip(seen["public"], seen["hidden"], strict=True))
        lucky = sum(p and not h for row in pairs for p, h in zip(*row, strict=True))
        for n in sizes:
            cells = [float(np.mean([filtered_pass(*row, n) for row in pairs])), mean_pass_at_k(seen["hidden"], n)]
            for place, value in enumerate(cells):
                found.setdefault(f"{n}", ([], []))[place].append(value)
        found.setdefault("wrong, of those that pass the public cases", ([], []))[0].append(
            lucky / max(1, sum(map(sum, seen["public"])))
        )
    rows = [
        [name, cells[0], cells[1] or "", best_of_n_bound(int(name)) if name.isdigit() else ""]
        for name, cells in found.items()
    ]
    columns = [Column("Programs"), Column("picked by public cases", digits=".1%")]
    columns += [Column("pass@n: one of them is right", digits=".1%"), Column("log n - (n - 1)/n", "nats", ".2f")]
    config.save_code("best-of-n", columns, rows, config.n_seeds)
    save_figure(plot_best_of_n(found, sizes), config.folder / "best-of-n.svg")


def plot_best_of_n(found: dict[str, tuple[list[float], list[float]]], sizes: tuple[int, ...]) -> Figure:
    """Share of tasks solved over the number of programs."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for place, label in ((1, "one of them is right (pass@n)"), (0, "picked by two public cases")):
        means = [float(np.mean(found[f"{n}"][place])) for n in sizes]
        spread = [float(np.std(found[f"{n}"][place])) for n in sizes]
        axes.errorbar(sizes, means, spread, marker="o", capsize=3, label=label)
    axes.set(xscale="log", xlabel="programs written", ylabel="held-out tasks solved", ylim=(0, 1))
    axes.set_xticks(sizes, [f"{n}" for n in sizes])
    axes.legend(frameon=False)
    return figure


def code_breaks(config: CodeFiguresConfig, run: RunConfig) -> None:
    """Every failure of CODE_BREAKS beside what is right."""
    rows = [list(row) for show, _ in CODE_BREAKS.values() for row in show(run)]
    columns = [Column("Failure"), Column("as it should be", digits=".3g"), Column("broken", digits=".3g")]
    config.save_code("code-breaks", columns, rows)


CODE_EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "sandbox-attacks": (sandbox_attacks, 40),
    "sandbox-cost": (sandbox_cost, 20),
    "cheats": (cheats, 10),
    "pass-at-k": (pass_at_k, 1200),
    "repair": (repair, 60),
    "best-of-n": (best_of_n, 60),
    "code-breaks": (code_breaks, 20),
}


CODE_VERBS: dict[str, tuple[Any, ...]] = {  # for the command line of the topic
    "sandbox": (sandbox, SandboxConfig, RunConfig),
    "code": (write_code, CodeConfig, RunConfig),
    "code-train": (code_train, CodeTrainConfig, RunConfig),
}
