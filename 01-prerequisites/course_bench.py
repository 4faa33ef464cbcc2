"""Topic 01 - Bench of the course: every topic's own `bench` in turn, and one table of their ratios.

python 01-prerequisites/workbench.py bench                     # all topics; the table, and OUT/bench.json
python 01-prerequisites/workbench.py bench --topics 3,7        # these topics; other topics keep their rows
python 01-prerequisites/workbench.py bench --write             # besides, the table in BENCHMARKS.md

A topic's bench prints a line `WHAT beside WHOM: 1.23x the speed (1.10 to 1.40 in 7 rounds)` for each comparison, which
`workbench.speed_line` makes: ours and theirs took turns in one process, so that a busy moment hits both alike.
"""

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workbench import (
    ROOT,
    RunConfig,
    announce,
    check_range,
    chosen_topics,
    describe_machine,
    fill_blocks,
    progress,
    run_command,
    shown,
    shown_ratio,
    topic_script,
    write_atomically,
)

PAGE = ROOT / "BENCHMARKS.md"
RATIO = re.compile(
    r"^\s*(?P<what>.+?) beside (?P<rival>.+?): +(?P<ratio>[\d.e-]+)x the speed "
    r"\((?P<least>[\d.e-]+) to (?P<most>[\d.e-]+) in (?P<n_rounds>\d+) rounds?\)",
    re.MULTILINE,
)
SECONDS = dict(enumerate((20, 11, 26, 7, 25, 182, 36, 20, 90, 29, 46, 40, 108, 62, 49), start=1))  # topic -> its bench


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Which topics are timed, and what becomes of the table."""

    topics: str = ""  # numbers of topics with commas between, such as 3,7; none means all
    limit: float = 900.0  # seconds after which a topic's bench is given up
    write: bool = False  # put the table into BENCHMARKS.md
    note: str = ""  # what a reader of the table should know, such as what else the machine did

    def __post_init__(self) -> None:
        check_range(self, "limit", above=0)
        chosen_topics(self.topics)


def read_ratios(text: str) -> list[dict[str, Any]]:
    """The comparisons that a bench printed: what, rival, ratio, least, most, n_rounds."""
    kinds = {"what": str, "rival": str, "ratio": float, "least": float, "most": float, "n_rounds": int}
    rows = [found.groupdict() for found in RATIO.finditer(text)]
    return [{name: kinds[name](value.rstrip(",")) for name, value in row.items()} for row in rows]


def time_topic(folder: Path, run: RunConfig, limit: float) -> dict[str, Any]:
    """Run one topic's bench in a process of its own: its `rows`, its `seconds`, and `failure` in words or ""."""
    script, before = topic_script(folder), time.perf_counter()
    flags = ["--seed", str(run.seed), "--device", run.device, "--threads", str(run.threads)]
    command = [sys.executable, str(script), "bench", *flags, "--out", str(run.out / folder.name)]
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
    try:
        pipe = subprocess.PIPE
        done = run_command(command, limit, stdout=pipe, stderr=pipe, text=True, env=environment)
    except subprocess.TimeoutExpired:
        return {"rows": [], "failure": f"given up after {limit:g} s", "seconds": limit}
    rows, lines, failure = read_ratios(done.stdout), done.stderr.strip().splitlines(), ""
    if done.returncode:
        failure = f"exit code {done.returncode}: {lines[-1] if lines else 'it says nothing'}"
    elif not rows:
        failure = "it prints no ratio"
    return {"rows": rows, "failure": failure, "seconds": time.perf_counter() - before}


def render_bench(results: dict[str, dict[str, Any]]) -> str:
    """The table of all topics in `results` (folder name -> what `time_topic` found), and where it was measured."""
    lines = ["| Topic | What | Ratio | Range | Rounds | Beside |", "|--:|:--|--:|:--|--:|:--|"]
    for name, result in sorted(results.items()):
        topic = int(name[:2])
        for row in result["rows"]:
            spread = f"{shown_ratio(row['least'])} to {shown_ratio(row['most'])}"
            cells = (topic, row["what"], shown_ratio(row["ratio"]), spread, row["n_rounds"], row["rival"])
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        if result["failure"]:
            failure = result["failure"].replace("|", "\\|")
            lines.append(f"| {topic} | *no result: {failure}* | | | | |")
    places: dict[str, list[str]] = {}
    for name, result in sorted(results.items()):
        note = f" · {result['note']}" if result["note"] else ""
        places.setdefault(f"{result['hardware']} · {result['date']}{note}", []).append(name[:2].lstrip("0"))
    for place, topics in places.items():
        which = f" · topics {', '.join(topics)}" if len(places) > 1 else ""
        lines += ["", f"*{place}{which}*"]
    total = sum(result["seconds"] for result in results.values())
    return "\n".join([*lines, "", f"*{total / 60:.1f} minutes in all*"])


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Run the bench of every topic, and print one table of how fast ours is beside the field's own libraries."""
    folders, path = chosen_topics(config.topics), run.out / "bench.json"
    announce(
        f"benches of {len(folders)} topic{'s' * (len(folders) > 1)}",
        sum(SECONDS[int(folder.name[:2])] for folder in folders),
    )
    print(describe_machine(), flush=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    bar = progress(folders, "benches")
    for folder in bar:
        bar.set_postfix_str(folder.name)
        place = {"hardware": describe_machine(), "date": datetime.date.today().isoformat(), "note": config.note}
        results[folder.name] = time_topic(folder, run, config.limit) | place
        write_atomically(path, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())
    asked = {folder.name: results[folder.name] for folder in folders}
    print(render_bench(asked))
    print(f"wrote {shown(path)}")
    if config.write:
        blocks = {"benchmarks": render_bench(results)}
        write_atomically(PAGE, fill_blocks(PAGE.read_text(encoding="utf-8"), blocks).encode())
        print(f"filled {shown(PAGE)}")
    failed = [name for name, result in asked.items() if result["failure"]]
    if failed:
        sys.exit(f"no result from {', '.join(failed)}")
