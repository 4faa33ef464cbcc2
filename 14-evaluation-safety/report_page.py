"""Topic 14 - Report page: an examination as one HTML file, with plots, that opens without a network.

    write_report(report, Path("runs"), "python ... report")   # runs/report.html and runs/report.json

No script, no request: a content security policy forbids both, and every text of a model is escaped, since what a model
writes may be what an attacker has written. The page reads from the verdict down to single answers.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from calibration import Bin, plot_reliability
from evaluation_report import Examined, Measured, Report
from report_verdict import Finding, headline, percent, report_json, verdict
from workbench import FIGURE_STYLE, write_atomically

MOST_SAMPLES = 3  # right and wrong ones that are shown of each task
STYLE = """
:root { color-scheme: light dark; --line: #bbb; --good: #00734f; --doubtful: #8a5a00; --bad: #b3261e; --unknown: #666 }
@media (prefers-color-scheme: dark) {
  :root { --line: #555; --good: #4fd1a5; --doubtful: #e8b64c; --bad: #ff8a80; --unknown: #aaa } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } td.text { text-align: left; white-space: pre-wrap }
small { color: var(--unknown) } img { max-width: 100%; background: white } code { overflow-wrap: anywhere }
.good::before { content: "good " } .doubtful::before { content: "doubtful " } .bad::before { content: "bad " }
.unknown::before { content: "not known " }
.good::before, .doubtful::before, .bad::before, .unknown::before { font-weight: 600 }
.good::before { color: var(--good) } .doubtful::before { color: var(--doubtful) } .bad::before { color: var(--bad) }
.unknown::before { color: var(--unknown) } summary { cursor: pointer } ul { padding-left: 1.2rem }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> str:
    """A value as HTML text: nothing in it can become markup; control characters are shown as pictures of themselves."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))
    return html.escape(shown, quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], first: str = "") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{text(first)}</caption>" if first else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(figure: Figure, described: str) -> str:
    """A figure inside of the page, with what it shows in words."""
    image = io.BytesIO()
    with plt.rc_context(FIGURE_STYLE):
        figure.savefig(image, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<p><img alt="{text(described)}" src="data:image/svg+xml;base64,{data}"></p>'


# Plots


def plain(name: str) -> str:
    """A name for a figure's legend: no mathematics, nothing that a font cannot draw."""
    return "".join(c if c.isprintable() else "?" for c in name[:60]).replace("$", r"\$")


def plot_scores(examined: Sequence[Examined]) -> Figure:
    """Every share with its interval; a grey mark is chance, a black one the optimum."""
    names = [name for name in all_scores(examined) if any(is_share(each, name) for each in examined)]
    figure, axis = plt.subplots(figsize=(7.5, 0.6 + 0.34 * len(names)))
    step = 0.7 / len(examined)
    for place, name in enumerate(names):
        known = next(each.scores[name] for each in examined if name in each.scores)
        for value, colour in ((known.chance, "0.6"), (known.best, "0.0")):
            if value is not None:
                axis.plot([value] * 2, [place - 0.42, place + 0.42], color=colour, lw=1.5)
    for number, each in enumerate(examined):
        own = [(place, each.scores[name]) for place, name in enumerate(names) if name in each.scores]
        at = [place - 0.35 + (number + 0.5) * step for place, _ in own]
        values = [score.value for _, score in own]
        ends = [(score.value - score.low, score.high - score.value) for _, score in own]
        reach = np.maximum(np.array(ends).T, 0)  # a bootstrap's interval may lie beside the value
        axis.errorbar(values, at, xerr=reach, fmt="o", ms=4, lw=1.5, label=plain(each.subject.name))
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="share of the questions", xlim=(-0.03, 1.03))
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def is_share(examined: Examined, name: str) -> bool:
    return name in examined.scores and examined.scores[name].is_share


def all_scores(examined: Sequence[Examined]) -> list[str]:
    """Names of all scores of all subjects, in the order in which they were asked."""
    return list(dict.fromkeys(name for each in examined for name in each.scores))


# Sections


def grade(finding: Finding) -> str:
    return f'<li class="{finding.grade}">{text(finding.text)}</li>'


def first_section(report: Report) -> str:
    """What a reader needs who reads no further."""
    parts = []
    for each in report.subjects:
        findings = "".join(map(grade, verdict(each)))
        top = headline(each)
        parts.append(
            f'<h3>{text(each.subject.name)}</h3><p class="{top.grade}"><strong>{text(top.text)}</strong></p>'
            f"<ul>{findings}</ul>"
        )
    return "<h2>Verdict</h2>" + "".join(parts)


def subjects_section(report: Report) -> str:
    facts = list(dict.fromkeys(name for each in report.subjects for name in each.subject.facts))
    rows = []
    for each in report.subjects:
        own = [each.subject.facts.get(name, "") for name in facts]
        cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in own]
        rows.append([text(each.subject.name), *(f"<code>{text(cell[:64])}</code>" for cell in cells)])
    return "<h2>What was examined</h2>" + table(["model", *facts], rows)


def instruments_section(report: Report) -> str:
    """Whether the measuring device measures."""
    rows = []
    for each in report.subjects:
        for check in each.checks:
            word = "passed" if check.passed else "<strong>failed</strong>"
            rows.append([text(each.subject.name), text(check.what), text(check.expected), f"{check.found:.3g}", word])
    why = (
        "Before a model is judged the instruments are: a model that knows nothing must look like one, and an answer to "
        "another question must be wrong. Limits are intervals of 99.9 %."
    )
    heads = ["model", "what is known", "expected", "found", ""]
    return f"<h2>Do the instruments measure?</h2><p>{why}</p>" + table(heads, rows)


def cell_of(score: Measured | None) -> str:
    if score is None:
        return "<small>not asked</small>"
    if not score.is_share:
        return f"{score.value:.3f}<br><small>{score.low:.3f} to {score.high:.3f}</small>"
    return f"{percent(score.value)}<br><small>{percent(score.low)} to {percent(score.high)}</small>"


def scores_section(report: Report) -> str:
    rows = []
    for name in all_scores(report.subjects):
        known = next(each.scores[name] for each in report.subjects if name in each.scores)
        form = "{:.3f}" if not known.is_share else "{:.0%}"
        limits = [form.format(value) if value is not None else "" for value in (known.chance, known.best)]
        n = len(known.each)
        rows.append([text(name), str(n), *limits, *(cell_of(each.scores.get(name)) for each in report.subjects)])
    heads = ["score", "questions", "chance", "optimum", *(each.subject.name for each in report.subjects)]
    seen = picture(
        plot_scores(report.subjects),
        "shares with intervals of 95 %, a colour for each model; grey marks are chance, black ones the optimum",
    )
    note = (
        "Below each value its interval of 95 %: Wilson's for questions that stand alone, a bootstrap of documents "
        "where several questions share one. held-out is in bits per byte, less is better, and its optimum is the "
        "entropy of the language. The last four rows are faults: 0 is best."
    )
    return f"<h2>Scores</h2>{seen}<p>{note}</p>" + table(heads, rows)


def comparisons_section(report: Report) -> str:
    if not report.comparisons:
        return ""
    rows = []
    for each in sorted(report.comparisons, key=lambda each: each.p_value):
        told = "differ" if each.p_value <= 0.05 else "<small>no difference shown</small>"
        values = [f"{each.difference:+.3f}", f"{each.p_value:.2g}", told]
        rows.append([text(each.task), text(each.first), text(each.second), *values])
    note = (
        f"Paired tests on the same questions, {len(rows)} of them; p values are corrected for that number (Holm). "
        "Where none is shown the models may still differ by less than so many questions can tell."
    )
    heads = ["score", "first", "second", "first less second", "p", ""]
    return f"<h2>Which differences are real?</h2><p>{note}</p>" + table(heads, rows)


def calibration_section(report: Report) -> str:
    told = [(each.subject.name, each.calibration) for each in report.subjects if each.calibration]
    if not told:
        return ""
    rows = [
        [
            text(name),
            *(f"{own[key]:.3f}" for key in ("sure", "right", "error", "brier")),
            f"{own['temperature']:.2f}",
            f"{own['after']:.3f}",
        ]
        for name, own in told
    ]
    curves = {plain(name): [Bin(**each) for each in own["bins"]] for name, own in told}
    seen = picture(plot_reliability(curves), "share that came true over the stated probability; the diagonal is right")
    heads = ["model", "mean probability", "right", "calibration error", "Brier score"]
    heads += ["temperature that mends it", "error then"]
    note = (
        "Facts that training tells and never asks about, four choices. The temperature is fitted on the same "
        "questions: the last column is what one number could do at best."
    )
    return f"<h2>Does it know what it knows?</h2><p>{note}</p>{seen}" + table(heads, rows)


def samples_of(score: Measured) -> list[dict]:
    """A few right and a few wrong answers of a score that has single ones."""
    if not score.samples or "text" in score.samples[0]:
        return []
    found: dict[bool, list[dict]] = {True: [], False: []}
    for value, sample in zip(score.each, score.samples, strict=True):
        wrong = bool(value) == (score.best == 0.0)
        found[wrong].append(sample | {"verdict": "as it should not be" if wrong else "as it should be"})
    return found[True][:MOST_SAMPLES] + found[False][:MOST_SAMPLES]


def sample_row(sample: dict) -> list[str]:
    if "choices" in sample:
        right, made = sample["choices"][sample["answer"]], sample["choices"][sample["won"]["acc"]]
    else:
        answers = sample["answer"]
        right, made = answers if isinstance(answers, str) else " or ".join(answers), sample["made"]
    cells = (sample["prompt"][-300:], right, made[:300], sample["verdict"])
    return [text(cell) for cell in cells]


def samples_section(report: Report) -> str:
    """Answers to read: numbers hide what kind of mistakes a model makes."""
    parts = []
    for each in report.subjects:
        for name, score in each.scores.items():
            chosen = samples_of(score)
            if chosen:
                rows = [sample_row(sample) for sample in chosen]
                shown = table(["asked (its end)", "right", "answered", ""], rows).replace("<td>", '<td class="text">')
                title = f"{text(each.subject.name)}: {text(name)}"
                parts.append(f"<details><summary>{title}</summary>{shown}</details>")
    return "<h2>Answers to read</h2><p>The first of each kind, mistakes before the rest.</p>" + "".join(parts)


LIMITS = (
    "Plain questions of one small world: what it says elsewhere, in other words or in long conversations is not known.",
    "Nobody attacked it here. Refusals that hold against plain questions may fall to the first rewording.",
    "Greedy answers: sampling at a temperature makes rare answers visible that none of these numbers counts.",
    "An interval speaks of questions of this kind only, and of one training; another seed is another model.",
    "The refusal is recognised by its first word. An answer that avoids the subject in other words counts as speaking.",
)


def page(report: Report, command: str) -> str:
    """The whole page."""
    names = ", ".join(each.subject.name for each in report.subjects)
    sections = (
        first_section,
        scores_section,
        comparisons_section,
        calibration_section,
        instruments_section,
        samples_section,
        subjects_section,
    )
    limits = "".join(f"<li>{text(limit)}</li>" for limit in LIMITS)
    made = f"{report.date}, {report.machine}, seed {report.seed}; <code>{text(command)}</code>"
    body = "\n".join(section(report) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Examination of {text(names)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Examination of {text(names)}</h1><p><small>{made}</small></p>\n{body}\n"
        f"<h2>What this report cannot tell</h2><ul>{limits}</ul></body></html>\n"
    )


def write_report(report: Report, out: Path, command: str) -> Path:
    """Write out/report.html and out/report.json; returns the page."""
    write_atomically(out / "report.json", report_json(report))
    write_atomically(out / "report.html", page(report, command).encode())
    return out / "report.html"
