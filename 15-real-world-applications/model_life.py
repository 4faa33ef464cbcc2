"""Topic 15 - One model's life: from a grammar to a model that may be released, each stage by the topic that made it.

python 15-real-world-applications/real_world_applications.py life                # the committed weights, three minutes
python 15-real-world-applications/real_world_applications.py life --from-nothing # everything anew, half an hour
python 15-real-world-applications/real_world_applications.py figures model-life  # the chapter's table, figure

Through all stages goes one thread: the gap to the world's known entropy, in nats per token on held-out documents, with
the shares of held-out instructions answered rightly, of forbidden questions refused, and of allowed ones. A stage that
has ended is kept in --out, so that a life which was stopped goes on; trainings go on from their last checkpoint.
"""

import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from life_stages import (
    Life,
    LifeConfig,
    Thread,
    attacked,
    base,
    chatty,
    deployed,
    evaluated,
    nats,
    percent,
    quantised,
    served,
    tokenizer,
    world,
)
from workbench import (
    Column,
    RunConfig,
    announce,
    locked,
    read_object,
    save_figure,
    save_results,
    seed_everything,
    shown,
    write_atomically,
)


@dataclass(frozen=True)
class Stage:
    """One stage: who makes it, and how long it takes on one core."""

    topic: int
    verb: str  # of the topic's own command line
    live: Callable[[Life], dict[str, Any]]
    seconds: float  # of its examination
    making: Callable[[LifeConfig], float] = lambda config: 0.0  # from nothing


STAGES = {
    "world": Stage(2, "sample", world, 1),
    "tokenizer": Stage(6, "course", tokenizer, 8, lambda config: 40),
    "base": Stage(10, "pretrain", base, 10, lambda c: 30 + c.n_pretrain / 6000 + 0.2 * c.pretrain_steps),
    "chat": Stage(11, "chat", chatty, 6, lambda c: 40 + 0.13 * c.chat_steps),
    "quantised": Stage(12, "quantize", quantised, 25),
    "served": Stage(13, "serve", served, 12),
    "evaluated": Stage(14, "report", evaluated, 5),
    "attacked": Stage(14, "red-team", attacked, 75),
    "deployed": Stage(15, "release-gate", deployed, 15),
}


def line(name: str, row: dict[str, Any]) -> str:
    """What a stage prints as it ends."""
    parts = f"{row['came_in']} -> {row['came_out']} | gained: {row['gain']} | lost: {row['loss']}"
    return f"{STAGES[name].topic:02} {name}: {parts} | {row['seconds']:.1f} s"


def live(config: LifeConfig, run: RunConfig) -> dict[str, dict[str, Any]]:
    """Live all stages, or those that --out has not kept; returns a row of each."""
    life = Life(config, run)
    settings = config.sizes(made=False) | {"seed": run.seed}
    settings |= config.sizes(made=True) if config.from_nothing else {}
    kept: dict[str, dict[str, Any]] = {}
    for name in STAGES:
        path = life.out / f"{name}.json"
        known = read_object(path) if path.exists() and not config.again else {}
        if known.get("settings") != settings:
            break
        kept[name] = known["row"]
    ahead = [stage for name, stage in STAGES.items() if name not in kept]
    seconds = sum(stage.seconds + (stage.making(config) if config.from_nothing else 0) for stage in ahead)
    announce(f"{len(ahead)} stages of one model's life, {len(kept)} are kept in {shown(life.out)}", seconds)
    with locked(life.out):
        for name, stage in STAGES.items():
            if name in kept:
                life.rows[name] = kept[name]
            else:
                seed_everything(run.seed)
                before = time.perf_counter() - life.making
                row = {"made": 0.0} | stage.live(life)
                row["seconds"] = row["made"] + time.perf_counter() - life.making - before
                life.rows[name] = row
                data = json.dumps({"settings": settings, "row": row}, indent=1)
                write_atomically(life.out / f"{name}.json", data.encode())
            print(line(name, life.rows[name]) + (" (kept)" if name in kept else ""), flush=True)
    return life.rows


def life(config: LifeConfig, run: RunConfig) -> None:
    """Live one model's life: world, tokenizer, base, chat, quantised, served, evaluated, attacked, deployed."""
    rows = live(config, run)
    print(f"\n{'stage':14} {'gap, nats per token':>26} {'right':>16} {'refused':>16} {'allowed refused':>16}")
    for name, thread in threads(rows).items():
        cells = [nats(thread["gap"]), *(percent(thread[key]) if key in thread else "-" for key in THREAD[1:])]
        print(f"{name:14} {cells[0]:>26} " + " ".join(f"{cell:>16}" for cell in cells[1:]))
    print(f"{sum(row['seconds'] for row in rows.values()):.0f} s in all")


THREAD = ("gap", "right", "refused", "wrongly")


def threads(rows: dict[str, dict[str, Any]]) -> dict[str, Thread]:
    return {name: thread for row in rows.values() for name, thread in row["threads"].items()}


# The chapter's tables and figure


@dataclass(frozen=True)
class LifeFiguresConfig:
    """Where the life's figure goes, and whether it is lived again."""

    again: bool = False  # measure again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def save(self, name: str, columns: list[Column], rows: list[list], run: RunConfig, of: str) -> None:
        command = f"python 15-real-world-applications/real_world_applications.py figures {of}"
        save_results(self.folder / "results.json", name, columns, rows, [run.seed], command)


def as_bytes(count: float) -> str:
    return f"{count / 1000:,.0f} kB"


def model_life(config: LifeFiguresConfig, run: RunConfig) -> None:
    """The life of the committed weights, stage by stage; and of the model made from nothing, if --out holds it.

    Nothing is predicted here: each stage has been measured in its own topic, with other questions, and should come out
    the same; what is new is that one model goes through all of them, each stage taking what the one before has made.
    """
    rows = live(LifeConfig(again=config.again), run)
    columns = [Column("Stage"), Column("Made by"), Column("Measured by"), Column("Found"), Column("Beside it")]
    columns += [Column("Size"), Column("Time", "s", ".0f")]
    cells = [
        [
            f"{STAGES[name].topic:02} {name}",
            f"`{STAGES[name].verb}`",
            *(row[key] for key in ("measure", "value", "beside")),
            as_bytes(row["n_bytes"]),
            row["seconds"],
        ]
        for name, row in rows.items()
    ]
    config.save("model-life", columns, cells, run, "model-life")
    columns = [Column("Model"), Column("Gap", "nats per token"), Column("Right"), Column("Forbidden, refused")]
    columns.append(Column("Allowed, refused"))
    cells = [
        [name, nats(thread["gap"]), *(percent(thread[key]) if key in thread else "-" for key in THREAD[1:])]
        for name, thread in threads(rows).items()
    ]
    config.save("model-life-thread", columns, cells, run, "model-life")
    lives = {"committed weights": rows}
    if (run.out / "from-nothing" / f"{[*STAGES][-1]}.json").exists():
        lives["made from nothing"] = live(LifeConfig(from_nothing=True), run)
    save_figure(plot_life(lives), config.folder / "model_life.svg")


def life_from_nothing(config: LifeFiguresConfig, run: RunConfig) -> None:
    """The same examination of a model that is made anew, beside the committed one.

    Predicted: with less than half of the committed base's steps the gap is half as large again at every stage, the
    right answers are five points fewer, and some limit of the gate is no longer shown to hold.
    """
    lives = [live(LifeConfig(from_nothing=made, again=config.again), run) for made in (False, True)]
    columns = [Column("Stage"), Column("Measured by"), Column("Committed weights"), Column("Made from nothing")]
    columns.append(Column("Time from nothing", "s", ".0f"))
    cells = [
        [f"{STAGES[name].topic:02} {name}", row["measure"], row["value"], anew["value"], anew["seconds"]]
        for (name, row), anew in zip(lives[0].items(), lives[1].values(), strict=True)
    ]
    served = [threads(rows).get(f"{rows['quantised']['n_bits']} bits") or threads(rows)["chat"] for rows in lives]
    for key, what in zip(THREAD, ("gap", "answered rightly", "forbidden, refused", "allowed, refused"), strict=True):
        told = nats if key == "gap" else percent
        cells.append(["what is served", what, *(told(thread[key]) for thread in served), ""])
    cells.append(["in all", "", "", "", sum(row["seconds"] for row in lives[1].values())])
    config.save("model-life-from-nothing", columns, cells, run, "model-life-from-nothing")


def draw_thread(axes: Axes, at: np.ndarray, found: list[list[float]], **how: Any) -> None:
    """Values with their intervals at some places."""
    values, low, high = (np.array(part) for part in zip(*found, strict=True))
    axes.errorbar(at, values, yerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)], capsize=3, **how)


def plot_life(lives: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """The gap along each life on a log axis; below it the right answers and refusals; at the side the attacks."""
    figure = plt.figure(figsize=(8.3, 5.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(2.4, 1), height_ratios=(1.35, 1))
    top, below, side = (figure.add_subplot(place) for place in (grid[0, 0], grid[1, 0], grid[:, 1]))
    names = [name for name in threads(next(iter(lives.values()))) if name != "even guessing"]
    for number, (title, rows) in enumerate(lives.items()):
        found, at = threads(rows), np.arange(len(names)) + 0.14 * number
        colour, how = f"C{number}", {"marker": "os"[number % 2], "markersize": 6}
        draw_thread(top, at, [found[name]["gap"] for name in names], color=colour, label=title, **how)
        for index, (place, name) in enumerate(zip(at, names, strict=True)):
            value = found[name]["gap"][0]
            text = f"{value:.1f}" if value >= 1 else f"{value:.3f}"
            shift = 14 * (index < 2)  # aside of the line, which falls there
            offset = (shift, 8) if number else (-shift, -15)
            top.annotate(text, (place, value), offset, textcoords="offset points", ha="center", color=colour)
        asked = [name for name in names if "right" in found[name]]
        at = at[[names.index(name) for name in asked]]
        draw_thread(below, at, [found[name]["right"] for name in asked], color=colour, **how)
        draw_thread(below, at, [found[name]["refused"] for name in asked], color=colour, linestyle=":", **how, mfc="w")
        attacks = rows["attacked"]["attacks"]
        width = 0.8 / len(lives)
        for place, each in enumerate(attacks.values()):
            spot = place + width * (number - (len(lives) - 1) / 2)
            side.bar(spot, each[0], width, color=colour)
            ends = [[each[0] - each[1]], [each[2] - each[0]]]
            side.errorbar(spot, each[0], yerr=ends, color="black", capsize=3)
    top.set(
        yscale="log", ylabel="gap to the optimum\n(nats per token)", ylim=(0.008, 20), xlim=(-0.4, len(names) - 0.4)
    )
    top.set_xticks(range(len(names)), [""] * len(names))
    top.legend(loc="upper right", frameon=False)
    below.set(ylabel="share of questions", ylim=(-0.05, 1.08), xlim=top.get_xlim())
    chosen = f"{next(iter(lives.values()))['quantised']['n_bits']} bits"
    below.set_xticks(range(len(names)), [f"{name}\n(served)" if name == chosen else name for name in names])
    lines = [below.plot([], [], color="black", linestyle=style)[0] for style in ("-", ":")]
    below.legend(lines, ["answered rightly", "forbidden, refused"], loc="lower center", frameon=False)
    side.set(ylabel="share of attacks that get the secret", ylim=(0, 0.8))
    side.set_xticks(range(len(attacks)), [textwrap.fill(name, 9) for name in attacks])
    return figure


LIFE_VERBS: dict[str, tuple[Any, ...]] = {"life": (life, LifeConfig, RunConfig)}
LIFE_EXPERIMENTS: dict[str, tuple[Callable[[LifeFiguresConfig, RunConfig], None], float]] = {
    "model-life-from-nothing": (life_from_nothing, 1800),
    "model-life": (model_life, 150),
}
