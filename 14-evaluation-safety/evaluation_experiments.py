"""Topic 14 - Evaluation experiments: what intervals, tests, judges, ratings and attacks find where the truth is known.

python 14-evaluation-safety/evaluation_safety.py figures coverage power     # some of them
    coverage, power         # intervals and tests on small exams, drawn from one so large that its score is the truth
    formats                 # one set of questions in nine wordings
    judge, elo              # planted biases and strengths, found again or not
    canaries, calibration   # planted secrets and members; stated chances before and after one number is fitted
    metric-breaks           # scores that mean nothing
    report, nothing-seen    # the course's models examined with all that stands; what 0 of n proves
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from calibration import (
    brier_parts,
    brier_score,
    calibration_error,
    fit_temperature,
    log_loss,
    plot_reliability,
    reliability,
    softmax,
)
from chat_model import FOLDER as CHAT_FOLDER
from chat_model import load_chat_model
from course_model import FOLDER as BASE_FOLDER
from course_model import load_course_model
from equal_compute import remembered
from evaluation_report import ReportPlan, examine, subject_of
from evaluation_statistics import (
    ELO,
    bootstrap,
    bradley_terry,
    clustered_error,
    elo,
    exact_coverage,
    exact_mcnemar_power,
    mcnemar,
    mean_of,
    paired_power,
    share_intervals,
    two_sided,
    wald,
    wilson,
    win_table,
)
from evaluation_tasks import FORMATS, Task, fact_choices, in_format, run_task, with_examples, world_task
from judging import Duel, PlantedJudge, agreement, first_wins, judge_duels, judge_model, likelihood_judge, win_rate
from memorisation import COUNTS, attack, fine_tuned, planted_corpus
from metric_failures import METRIC_BREAKS, break_table
from quantized_model import Recipe, quantize_model
from text_model import TextModel
from tiny_world import World
from weight_quantization import QuantFormat
from workbench import Column, RunConfig, check_range, progress, save_figure, save_results

COMMAND = "python 14-evaluation-safety/evaluation_safety.py figures"


@dataclass(frozen=True)
class EvaluationFiguresConfig:
    """The sizes of the experiments on evaluation."""

    n_seeds: int = 3  # seeds 0, 1, ... of exams, judges, games and trainings
    n_truth: int = 3000  # questions of the exam that stands for all questions
    n_draws: int = 400  # small exams that are drawn from it, for each seed
    n_questions: int = 150  # questions of each format and seed
    n_duels: int = 1000  # duels that a judge sees, for each seed
    n_fresh: int = 1000  # fresh documents of the training that plants secrets
    n_members: int = 24  # documents that are planted with each number of repetitions
    again: bool = False  # measure again what an earlier run has left in --out
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_draws", "n_fresh", least=1)
        check_range(self, "n_truth", "n_questions", "n_duels", "n_members", least=8)

    def save(
        self, name: str, columns: list[Column], rows: list[list], of: str = "", n_seeds: int | None = None
    ) -> None:
        seeds = range(self.n_seeds if n_seeds is None else n_seeds)
        save_results(self.folder / "results.json", name, columns, rows, seeds, f"{COMMAND} {of or name}")


@functools.cache
def course() -> TextModel:
    return TextModel.of(*load_course_model(), "course model")


@functools.cache
def rounded() -> TextModel:
    """The course model with weights of 3 bits, one step for a row: a rival that is a little worse."""
    examined = course()
    made = quantize_model(examined.model, Recipe("rtn", QuantFormat(3, 0))).dequantised()
    return replace(examined, model=made.eval(), name="course model in 3 bits")


@functools.cache
def chatting() -> TextModel:
    return TextModel.of(*load_chat_model(), "chat model")


# An exam so large that its score is the truth


def large_exam(config: EvaluationFiguresConfig, run: RunConfig, rival: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong for every question of many scenes, and the number of its document."""

    def ask() -> dict[str, Any]:
        result = run_task(rounded() if rival else course(), world_task("scene", config.n_truth, 77))
        return {"right": result.columns["exact_match"], "groups": result.groups}

    what = f"large exam, {config.n_truth} questions, {'3 bits' if rival else 'float32'}"
    found = remembered(config, run, what, ask)
    return np.array(found["right"]), np.array(found["groups"])


def documents_of(groups: np.ndarray) -> list[np.ndarray]:
    """The places of each document's questions."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


INTERVALS = {  # name -> (right, groups) -> (low, high)
    "Wald, questions alone": lambda right, groups: wald(int(right.sum()), len(right)),
    "Wilson, questions alone": lambda right, groups: wilson(int(right.sum()), len(right)),
    "bootstrap of questions": lambda right, groups: bootstrap(mean_of(right), len(right), 400).percentile(),
    "bootstrap of documents": lambda right, groups: bootstrap(mean_of(right), groups, 400).percentile(),
    "bootstrap of documents, BCa": lambda right, groups: bootstrap(mean_of(right), groups, 400).bca(),
    "error from documents' sums": lambda right, groups: around(right.mean(), clustered_error(right, groups)),
}
SIZES = (15, 50, 150)  # documents of a small exam


def around(mean: float, error: float) -> tuple[float, float]:
    return mean - two_sided(0.95) * error, mean + two_sided(0.95) * error


def coverage(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """How often 95 % intervals hold the truth: exactly for a share, and on small exams drawn from the large one.

    Predicted: Wald's interval covers less than 90 % for accuracies near 1, Wilson's about 95 %; questions of one
    document share its luck, so all intervals that take them alone cover less than 95 %, at every size of the exam;
    drawing documents repairs it but for the smallest exams.
    """
    shares, rows = np.linspace(0.005, 0.995, 199), []
    for n in (20, 100, 500):
        for method in ("wald", "wilson", "clopper-pearson"):
            covered = np.array([exact_coverage(method, n, share) for share in shares])
            low, high = share_intervals(method, n, 0.95)
            at = [exact_coverage(method, n, share) for share in (0.7, 0.95)]
            rows.append([f"{method}, {n} questions", float(covered.mean()), float(covered.min()), *at])
            rows[-1].append(float((high - low)[round(0.7 * n)]))
    columns = [Column("interval", digits="s"), Column("covers, mean", digits=".1%")]
    columns += [Column("least", digits=".1%"), Column("at accuracy 0.7", digits=".1%")]
    columns += [Column("at 0.95", digits=".1%"), Column("width at 0.7", digits=".3f")]
    config.save("coverage-of-a-share", columns, rows, "coverage", 1)
    save_figure(plot_coverage(100), config.folder / "coverage.svg")
    save_clustered(config, run)


def save_clustered(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    right, groups = large_exam(config, run)
    truth, documents, rows = float(right.mean()), documents_of(groups), []
    for size in SIZES:
        covered: dict[str, list[float]] = {name: [] for name in INTERVALS}
        widths: dict[str, list[float]] = {name: [] for name in INTERVALS}
        for seed in range(config.n_seeds):
            rng, hits, sums = (
                np.random.default_rng(1000 + seed),
                dict.fromkeys(INTERVALS, 0),
                dict.fromkeys(INTERVALS, 0.0),
            )
            for _ in progress(range(config.n_draws), f"exams of {size} documents"):
                drawn = [documents[place] for place in rng.integers(len(documents), size=size)]
                own = np.concatenate([right[places] for places in drawn])
                numbers = np.repeat(np.arange(size), [len(places) for places in drawn])
                for name, make in INTERVALS.items():
                    low, high = make(own, numbers) if 0 < own.mean() < 1 else wilson(int(own.sum()), len(own))
                    hits[name] += low <= truth <= high
                    sums[name] += high - low
            for name in INTERVALS:
                covered[name].append(hits[name] / config.n_draws)
                widths[name].append(sums[name] / config.n_draws)
        rows += [[f"{name}, {size} documents", covered[name], widths[name]] for name in INTERVALS]
    per = len(right) / len(documents)
    columns = [Column("95 % interval", digits="s"), Column("holds the truth", f"accuracy {truth:.3f}", ".1%")]
    columns.append(Column("mean width", f"{per:.1f} questions per document", ".3f"))
    config.save("coverage-of-documents", columns, rows, "coverage")


def plot_coverage(n: int) -> Figure:
    """Exact coverage over the true accuracy."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    shares = np.linspace(0.005, 0.995, 397)
    for name in ("wald", "wilson", "clopper-pearson"):
        axis.plot(shares, [exact_coverage(name, n, share) for share in shares], lw=1, label=name)
    axis.axhline(0.95, color="0.5", lw=1, ls=":")
    axis.set(xlabel="true accuracy", ylabel="coverage", ylim=(0.8, 1.005))
    axis.set_title(f"95 % intervals after {n} questions: Wald's fails where models are good", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return figure


# Power


def power(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """How often small exams show that the course model in 3 bits is worse than in float32, which it is.

    Predicted: the paired test needs about disagreement / (2 p (1 - p)) of the questions that the unpaired one needs;
    the normal formula is within 5 points of what is seen; without a difference both reject in at most 5 %.
    """
    first, second = large_exam(config, run)[0], large_exam(config, run, rival=True)[0]
    difference, apart = float((first - second).mean()), float((first != second).mean())
    pooled = float((first.mean() + second.mean()) / 2)
    rows = []
    for n in (50, 200, 800, 3200, 6400):
        seen: dict[str, list[float]] = {name: [] for name in ("paired", "unpaired", "null")}
        for seed in range(config.n_seeds):
            rng, counts = np.random.default_rng(2000 + seed), dict.fromkeys(seen, 0)
            for _ in range(config.n_draws):
                places, others = rng.integers(len(first), size=n), rng.integers(len(first), size=n)
                one, two, other = first[places], second[places], second[others]
                counts["paired"] += rejects(one, two)
                counts["unpaired"] += rejects_unpaired(one, other)
                swap = rng.random(n) < 0.5  # which model is which, question by question: no difference is left
                counts["null"] += rejects(np.where(swap, one, two), np.where(swap, two, one))
            for name, found in seen.items():
                found.append(counts[name] / config.n_draws)
        said = [paired_power(n, difference, apart), exact_mcnemar_power(n, difference, apart)]
        spread = math.sqrt(2 * pooled * (1 - pooled) / n)
        alone = sum(normal_below(side * difference / spread - two_sided(0.95)) for side in (-1, 1))
        rows.append([f"{n}", seen["paired"], *said, seen["unpaired"], alone, seen["null"]])
    columns = [Column("questions", digits="s"), Column("paired finds it", digits=".1%")]
    columns += [Column("normal formula", digits=".1%"), Column("exact", digits=".1%")]
    columns += [Column("unpaired finds it", digits=".1%"), Column("formula", digits=".1%")]
    columns.append(Column("paired, no difference", digits=".1%"))
    config.save("power", columns, rows)
    sizes = [["course model, float32", float(first.mean())], ["in 3 bits", float(second.mean())]]
    sizes += [["difference", difference], ["disagreement", apart], ["2 p (1 - p)", 2 * pooled * (1 - pooled)]]
    truth = [Column("on the large exam", digits="s"), Column("share of questions", digits=".3f")]
    config.save("power-truth", truth, sizes, "power", 1)


def normal_below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def rejects(one: np.ndarray, two: np.ndarray) -> bool:
    return mcnemar(int((one > two).sum()), int((one < two).sum())) <= 0.05


def rejects_unpaired(one: np.ndarray, other: np.ndarray) -> bool:
    """The z-test of two shares on questions of their own."""
    pooled = (one.mean() + other.mean()) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / len(one))
    return bool(error) and abs(one.mean() - other.mean()) / error > two_sided(0.95)


# Wordings


def formats(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """The same questions about the same facts in nine wordings and with two examples, for two models.

    Predicted: the wording of the training is best for the base model; the spread over wordings is several standard
    errors of one score; the order of the two models depends on the wording.
    """
    names = [*FORMATS, "quiz, two examples"]
    found: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(config.n_seeds):
        task = world_task("facts", config.n_questions, 300 + seed)
        asked = {name: in_format(task, name) for name in FORMATS}
        prompts = {task.prompt(question) for question in task.questions}
        fresh = [q for q in world_task("facts", 60, 900 + seed).questions if task.prompt(q) not in prompts]
        asked["quiz, two examples"] = with_examples(task, fresh[:2], " ")
        for name in progress(names, f"wordings, seed {seed}"):
            for examined in (course(), chatting()):
                scores = run_task(examined, asked[name]).table()
                for kind, what in (("acc", "log p"), ("acc_pmi", "PMI")):
                    place = found.setdefault(name, {}).setdefault(f"{examined.name}, {what}", [])
                    place.append(scores[kind][0])
    keys = list(next(iter(found.values())))
    rows = [[name, *(scores[key] for key in keys)] for name, scores in found.items()]
    spread = [
        [float(np.std([row[place][seed] for row in rows], ddof=1)) for seed in range(config.n_seeds)]
        for place in range(1, len(keys) + 1)
    ]
    rows.append(["standard deviation over wordings", *spread])
    error = math.sqrt(0.25 / config.n_questions)
    rows.append(["largest standard error of one score", *[error] * len(keys)])
    columns = [Column("wording", digits="s"), *(Column(key, digits=".1%") for key in keys)]
    config.save("formats", columns, rows)


# Judges


def right_answer(question: str, answer: str) -> float:
    """1 if the answer holds the value that the world's facts give, else 0."""
    person = next(person for person in the_world().known if person in question)
    name = next(name for name, kind in PROPERTIES.items() if kind in question)
    return float(the_world().facts[person][name] in answer.rstrip(".").split())


@functools.cache
def the_world() -> World:
    return World()


PROPERTIES = {"town": "where does", "job": "what work", "pet": "what pet", "food": "what food"}
PADDING = "I am sure that the answer is".split()


def fact_duels(n: int, seed: int, p_a: float, p_b: float, extra: int) -> list[Duel]:
    """Two systems that are right with these chances; A begins its answer with `extra` words more, on average."""
    rng, task, found = np.random.default_rng(seed), world_task("facts", n, 500 + seed), []
    for question in task.questions:
        wrong = [choice for place, choice in enumerate(question["choices"]) if place != question["answer"]]
        right, answers = (rng.random() < p_a, rng.random() < p_b), []
        for ok, more in zip(right, (extra, 0), strict=True):
            value = question["choices"][question["answer"]] if ok else wrong[int(rng.integers(len(wrong)))]
            n_words = int(rng.integers(0, 4)) + more
            answers.append(" ".join([*PADDING[:n_words], value]) + ".")
        found.append(Duel(task.prompt(question), *answers, truth=(1 + right[0] - right[1]) / 2))
    return found


def judge(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """Judges with planted biases, and the course model as one; A is right in 60 %, B in 75 %, A writes 3 words more.

    Predicted: every planted coefficient lies in its interval; uncorrected, A wins although it is worse; swapping brings
    the position to nothing but leaves the length; the regression brings the win rate to within 3 points of an unbiased
    judge's. The model as a judge, on answers alike in length on average, agrees with the truth, but prefers short ones
    by its sum and long ones by its mean.
    """
    planted = {
        "no bias": {},
        "position 0.8": {"position": 0.8},
        "length 0.3 a word": {"length": 0.3},
        "both": {"position": 0.8, "length": 0.3},
    }
    judges: dict[str, Callable[[int], Any]] = {
        f"planted: {name}": lambda seed, biases=biases: PlantedJudge(quality_of(), 2.0, seed=seed, **biases)
        for name, biases in planted.items()
    }
    judges["course model, log p, lengths alike"] = lambda seed: likelihood_judge(course())
    judges["course model, log p per token, lengths alike"] = lambda seed: likelihood_judge(course(), per_token=True)
    rows = []
    for name, make in judges.items():
        cells: dict[str, list[float]] = {}
        n = config.n_duels if name.startswith("planted") else max(8, config.n_duels // 5)
        for seed in range(config.n_seeds):
            duels = fact_duels(n, seed, 0.6, 0.75, 0 if name.endswith("alike") else 3)
            verdicts = judge_duels(make(seed), duels)
            model, agreed = judge_model(verdicts), agreement(verdicts)
            numbers = [first_wins(verdicts).value, model.length.value]
            numbers += [win_rate(verdicts, kind) for kind in ("plain", "swapped", "length")]
            numbers += [agreed.accuracy, float(np.mean([duel.truth for duel in duels]))]
            for place, value in enumerate(numbers):
                cells.setdefault(str(place), []).append(value)
        rows.append([name, *cells.values()])
        print(rows[-1], flush=True)
    columns = [Column("judge", digits="s"), Column("first wins", digits=".1%")]
    columns += [Column("length", "nats a word", "+.2f"), Column("A: read first", digits=".1%")]
    columns += [Column("A: both orders", digits=".1%"), Column("A: length taken out", digits=".1%")]
    columns += [Column("A: truth", digits=".1%"), Column("right", digits=".1%")]
    config.save("judge", columns, [[*row[:-2], row[-1], row[-2]] for row in rows])


@functools.cache
def quality_of() -> Callable[[str, str], float]:
    """`right_answer`, remembered: a judge asks about each answer twice."""
    return functools.lru_cache(maxsize=100_000)(right_answer)


# Ratings


STRENGTHS = (300.0, 150.0, 50.0, 0.0, -150.0, -350.0)  # Elo points


def elo_games(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """Six players of known strength: what Elo and Bradley-Terry make of their games, and what the intervals promise.

    Predicted: Bradley-Terry's error falls as 1 / sqrt(games) and its intervals hold the truth in 95 %; Elo's error
    stops falling, at about sqrt(k) points' worth of memory: k = 32 worse than k = 8 in the end, better at first.
    """
    truth = np.array(STRENGTHS) - np.mean(STRENGTHS)
    methods = ("Elo, k = 32", "Elo, k = 8", "Bradley-Terry")
    rows = []
    for n_games in (200, 1000, 5000):
        errors: dict[str, list[float]] = {name: [] for name in methods}
        covered, widths = [], []
        for seed in range(config.n_seeds):
            found, inside, wide = {name: [] for name in methods}, [], []
            for repeat in range(max(1, config.n_draws // 5)):
                games = draw_games(truth, n_games, np.random.default_rng([seed, repeat, n_games]))
                rated = bradley_terry(win_table(games, 6) + np.where(np.eye(6), 0, 1e-9))  # finite, whoever never won
                ratings = [elo(games, 6, k) - 1000 for k in (32.0, 8.0)] + [rated.elo - 1000]
                for name, made in zip(methods, ratings, strict=True):
                    found[name].append(float(np.sqrt(((made - truth) ** 2).mean())))
                gap = rated.difference(1, 2)
                inside.append(gap.covers((truth[1] - truth[2]) / ELO))
                wide.append((gap.high - gap.low) / 2 * ELO)
            for name in methods:
                errors[name].append(float(np.mean(found[name])))
            covered.append(float(np.mean(inside)))
            widths.append(float(np.mean(wide)))
        rows.append([f"{n_games:,}", *errors.values(), covered, widths])
    columns = [
        Column("games", digits="s"),
        *(Column(f"{name}: error", "points", ".1f") for name in methods),
    ]
    columns += [
        Column("95 % interval holds", digits=".1%"),
        Column("half width", "points", ".0f"),
    ]
    config.save("elo", columns, rows)


def draw_games(points: np.ndarray, n_games: int, rng: np.random.Generator) -> list[tuple[int, int, float]]:
    """Games of random pairs, won with the chances of Elo's model."""
    one = rng.integers(len(points), size=n_games)
    two = (one + rng.integers(1, len(points), size=n_games)) % len(points)
    wins = rng.random(n_games) < 1 / (1 + 10 ** ((points[two] - points[one]) / 400))
    return list(zip(one.tolist(), two.tolist(), wins.astype(float).tolist(), strict=True))


# Secrets and members


def canaries(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """The course model after one pass over fresh documents with planted secrets and planted repetitions.

    Predicted: secrets that never occurred have exposure 1.44 bits on average, 64 occurrences give nearly all 13.3; no
    score tells documents that were seen once from others (AUC 0.5 within 0.06), all tell 64 repetitions; the score
    that knows the true surprisal is the best one at every count.
    """
    model, tokenizer = load_course_model()
    found: list[dict[str, dict[str, list[float]]]] = []
    for seed in range(config.n_seeds):

        def measure(seed: int = seed) -> dict[str, Any]:
            planted = planted_corpus(seed, COUNTS, 2, config.n_members, config.n_fresh)
            made = attack(fine_tuned(model, tokenizer, planted.texts, seed), tokenizer, planted)
            return {name: {str(count): values for count, values in by.items()} for name, by in made.items()}

        what = f"canaries, {config.n_fresh} fresh documents, {config.n_members} members, seed {seed}"
        found.append(remembered(config, run, what, measure))
    names, rows = list(found[0]), []
    for count in COUNTS:
        row: list = [f"{count}"]
        for name in names:
            cells = [float(np.mean(one[name][str(count)])) for one in found if str(count) in one[name]]
            row.append(cells or "")
        rows.append(row)
    columns = [Column("times seen", digits="s"), Column("exposure", "bits of 13.3", ".1f")]
    columns += [Column(name, "AUC", ".2f") for name in names[1:]]
    config.save("memorised", columns, rows, "canaries")


# Calibration


def told_facts(n: int, seed: int, fitting: bool) -> Task:
    """Questions about people that no quiz asks about: one half of them to fit a temperature, the other to judge it.

    The halves share no person. Two draws from all of them would share most facts, since there are few.
    """
    people, rng = list(the_world().unasked), random.Random(seed)
    rng.shuffle(people)
    half = people[: len(people) // 2] if fitting else people[len(people) // 2 :]
    questions = tuple(fact_choices(the_world(), rng, half) for _ in range(n))
    return replace(world_task("facts-told", 1, seed), questions=questions)


def choice_chances(examined: TextModel, task: Task, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities of the choices (n, 4), times a factor, and the number of the right one."""
    result = run_task(examined, task)
    logs = -np.array([sample["nats"] for sample in result.samples]) * factor
    return logs, np.array([sample["answer"] for sample in result.samples])


CALIBRATED = (  # model, factor of its log probabilities: 3 plants a temperature three times as high
    (course, 1.0),
    (course, 3.0),
    (rounded, 1.0),
    (chatting, 1.0),
)


def calibration(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """What the base and the chat model say of four choices, before and after a temperature fitted on other people.

    Predicted: all are too sure of facts that they were told and never asked, the chat model most; rounding to 3 bits
    makes it worse; one temperature removes most of the error in each case, and changes no answer and hardly the
    resolution.
    """
    rows, curves = [], {}
    for make, factor in CALIBRATED:
        cells: dict[str, list[float]] = {}
        for seed in range(config.n_seeds):
            asked = [told_facts(2 * config.n_questions, 700 + seed, fitting) for fitting in (True, False)]
            fitted, (logs, labels) = (choice_chances(make(), task, factor) for task in asked)
            temperature = float(fit_temperature(*fitted))
            numbers = [float((logs.argmax(1) == labels).mean()), temperature]
            for scale in (1.0, temperature):
                chances = softmax(logs, scale)
                sure, right = chances.max(axis=1), chances.argmax(axis=1) == labels
                parts = brier_parts(sure, right, 10, "mass")
                of_right = chances[np.arange(len(labels)), labels]
                numbers += [calibration_error(sure, right, 10, "mass"), brier_score(sure, right), parts.resolution]
                numbers.append(log_loss(of_right, np.ones(len(labels))))
                if seed == 0 and factor != 1:
                    name = "log p times 3" if scale == 1.0 else f"divided by {temperature:.2f}"
                    curves[name] = reliability(sure, right, 8, "mass")
            for place, value in enumerate(numbers):
                cells.setdefault(str(place), []).append(value)
        planted = f", log p times {factor:g}" if factor != 1 else ""
        rows.append([f"{make().name}{planted}", *cells.values()])
        print(rows[-1], flush=True)
    columns = [Column("model", digits="s"), Column("right", digits=".1%"), Column("temperature", digits=".2f")]
    for what in ("error", "Brier", "resolution", "nats"):
        columns += [Column(f"{what}, {when}", digits=".3f") for when in ("before", "after")]
    order = [0, 1, 2, *(place + 4 * after for place in range(3, 7) for after in range(2))]
    rows = [[row[place] for place in order] for row in rows]
    for name, kept in (("calibration", (0, 2, 3, 4, 9, 10)), ("calibration-parts", (0, 1, 5, 6, 7, 8))):
        config.save(name, [columns[k] for k in kept], [[row[k] for k in kept] for row in rows], "calibration")
    save_figure(plot_reliability(curves), config.folder / "calibration.svg")


# Scores that mean nothing


def metric_breaks(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """Every planted failure: the right value beside the broken one."""
    config.save("metric-breaks", *break_table(METRIC_BREAKS, run), n_seeds=1)


# The whole examination


REPORTED = {"course model": str(BASE_FOLDER), "chat model": str(CHAT_FOLDER), "in 3 bits": f"{CHAT_FOLDER}@3"}


def report(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """The base model, the chat model and the chat model in 3 bits, with other questions for each seed.

    Predicted: the chat model pays for its answers with a tenth of bits per byte and loses facts that were never asked;
    three bits cost most where an answer is long, in sorting and sums, and nothing of its conduct.
    """
    plan = ReportPlan(n_questions=max(10, config.n_questions))
    cells: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.n_seeds):

        def measure(seed: int = seed) -> dict[str, Any]:
            made = examine([subject_of(place, name) for name, place in REPORTED.items()], plan, 40 + seed)
            scores = {
                each.subject.name: {
                    name: score.value if score.is_share else score.value / score.best - 1
                    for name, score in each.scores.items()
                }
                for each in made.subjects
            }
            for each in made.subjects:
                passed = [check.passed for check in each.checks]
                scores[each.subject.name]["checks of the instruments passed"] = sum(passed) / len(passed)
            return scores

        found = remembered(config, run, f"the whole report, {config.n_questions} questions, seed {seed}", measure)
        for name, scores in found.items():
            for score, value in scores.items():
                cells.setdefault(score, {}).setdefault(name, []).append(value)
    rows = []
    for score, by in cells.items():
        what = "held-out documents, bits above the optimum" if score == "held-out" else score
        rows.append([what, *([each for each in by.get(name, [])] for name in REPORTED)])
    columns = [Column("score", digits="s"), *(Column(name, digits=".1%") for name in REPORTED)]
    config.save("report", columns, rows)


def nothing_seen(config: EvaluationFiguresConfig, run: RunConfig) -> None:
    """What no fault among n different questions proves: the upper end of the interval of 95 % for its share."""
    rows = [[f"{n:,}", wilson(0, n).high, 1 - 0.05 ** (1 / n), 3 / n] for n in (4, 30, 119, 1000, 10_000)]
    columns = [Column("questions without a fault", digits="s"), Column("Wilson, two-sided", digits=".2%")]
    columns += [Column("exact, one-sided", digits=".2%"), Column("rule of three, 3/n", digits=".2%")]
    config.save("nothing-seen", columns, rows, n_seeds=1)
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    sizes = np.geomspace(3, 10_000, 200)
    axis.fill_between(sizes, [wilson(0, round(n)).high for n in sizes], 1e-5, alpha=0.25, lw=0, label="not ruled out")
    for n, what in ((4, "the card's four questions"), (119, "119 different ones")):
        axis.plot(n, wilson(0, n).high, "o", color="0.2", ms=5)
        axis.annotate(
            f"{what}: up to {wilson(0, n).high:.0%}", (n, wilson(0, n).high), (6, 6), textcoords="offset points"
        )
    axis.set(xscale="log", yscale="log", xlim=(3, 10_000), ylim=(1e-4, 1))
    axis.set(xlabel="questions asked, none answered wrongly", ylabel="true share of wrong answers")
    axis.legend(frameon=False, loc="lower left")
    save_figure(figure, config.folder / "nothing-seen.svg")


EVALUATION_EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "coverage": (coverage, 60),
    "power": (power, 60),
    "formats": (formats, 60),
    "judge": (judge, 40),
    "elo": (elo_games, 30),
    "canaries": (canaries, 60),
    "calibration": (calibration, 40),
    "metric-breaks": (metric_breaks, 5),
    "report": (report, 180),
    "nothing-seen": (nothing_seen, 2),
}
