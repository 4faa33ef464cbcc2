"""Topic 15 - Code failures: verdicts and scores that look right and are not, each beside the right one.

python 15-real-world-applications/real_world_applications.py figures code-breaks      # all, the chapter's table

Every entry of CODE_BREAKS is (function, seconds); the function takes the run and returns rows
(what is measured, its sound value, its broken value).
"""

from collections.abc import Callable

from code_model import judge_bodies, load_code_model, passes
from code_tasks import draw_tasks
from sandbox import Sandbox, find_sandbox, plain_value, same
from sandbox_attacks import (
    ATTACKS,
    CHEATS,
    judge_by_exit,
    judge_by_print,
    judge_outside,
    run_together,
)
from text_metrics import mean_pass_at_k
from workbench import RunConfig

Row = tuple[str, float, float]


def judge_inside(run: RunConfig) -> list[Row]:
    """Tests behind the candidate in its own process: a candidate that leaves early, or patches, is believed."""
    box = find_sandbox()
    sound = sum(judge_outside([*CHEATS.values()], box))
    rows = []
    for name, believes in (("exit code", judge_by_exit), ("printed verdict", judge_by_print)):
        fooled = sum(believes([*CHEATS.values()], box))
        rows.append((f"judge-inside: cheats of {len(CHEATS)} that pass, by {name}", sound, fooled))
    return rows


HARMLESS = ("read a file of ours", "write a file outside", "connect over TCP", "run another program")


def names_set_to_none(run: RunConfig) -> list[Row]:
    """A guard that sets os.system and its kin to None: every name has another name."""
    chosen, box = [attack for attack in ATTACKS if attack.name in HARMLESS], find_sandbox()
    through = []
    for one in (box, Sandbox("guard", box.python)):
        results, _ = run_together(one, chosen)
        through.append(sum(not result.contained for result in results))
    return [(f"names-set-to-none: attacks of {len(chosen)} that get through", *through)]


def public_score(run: RunConfig) -> list[Row]:
    """The case that chose a program is reported as its score, in place of cases that nobody has seen.

    The case is the one that people write down first, the empty input: nine programs of ten pass it, and half of those
    are wrong. A case drawn at random shows nothing here, because 90 of the 93 programs that pass it are right.
    """
    code, tasks = load_code_model(), draw_tasks(24, 79, "validation", (3,))
    bodies = code.write([task.prompt for task in tasks], 10, 0.8, run.seed)
    public = passes(judge_bodies(tasks, bodies, cases=lambda task: task.hidden[:1]))
    hidden = passes(judge_bodies(tasks, bodies))
    picked = [row.index(True) if True in row else 0 for row in public]
    sound = [row[place] for row, place in zip(hidden, picked, strict=True)]
    seen = [row[place] for row, place in zip(public, picked, strict=True)]
    return [("public-score: programs picked by the empty input, share right", share(sound), share(seen))]


def one_seed_for_all(run: RunConfig) -> list[Row]:
    """Every program of a task drawn with the same seed: ten copies, so pass@10 is pass@1."""
    code, tasks = load_code_model(), draw_tasks(24, 79, "validation", (3,))
    prompts = [task.prompt for task in tasks]
    free = passes(judge_bodies(tasks, code.write(prompts, 10, 0.8, run.seed)))
    one = code.write(prompts, 1, 0.8, run.seed)
    copies = passes(judge_bodies(tasks, [bodies * 10 for bodies in one]))
    return [("one-seed-for-all: pass@10", mean_pass_at_k(free, 10), mean_pass_at_k(copies, 10))]


def loose_equality(run: RunConfig) -> list[Row]:
    """`==` calls True a 1 and 1.0 an int; the judge compares types as well."""
    pairs = [(True, 1), (1.0, 1), (0.0, False), ("1", 1)]
    sound = sum(same(plain_value(one), plain_value(other)) for one, other in pairs)
    return [
        (
            f"loose-equality: pairs of {len(pairs)} with different types called equal",
            sound,
            sum(a == b for a, b in pairs),
        )
    ]


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


CODE_BREAKS: dict[str, tuple[Callable[[RunConfig], list[Row]], float]] = {
    "judge-inside": (judge_inside, 5),
    "names-set-to-none": (names_set_to_none, 2),
    "public-score": (public_score, 8),
    "one-seed-for-all": (one_seed_for_all, 8),
    "loose-equality": (loose_equality, 1),
}
