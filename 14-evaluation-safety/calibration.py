"""Topic 14 - Calibration and classification: 80 % sure should mean right in 80 of 100 cases; and who agrees.

    calibration_error(confidence, right), brier_score(confidence, right), brier_parts(confidence, right)
    temperature = fit_temperature(logits, labels)      # one number that mends a model that is too sure of itself
    auc(scores, labels), confusion(guesses, labels).f1, cohen_kappa(one, other), krippendorff_alpha(ratings)

Brier 1950; Murphy 1973 (reliability, resolution, uncertainty); Stephenson, Coelho and Jolliffe 2008 (what bins hide);
Guo et al. 2017 (arXiv 1706.04599, temperature scaling, expected calibration error); Hanley and McNeil 1982 (area under
the curve as a probability); Cohen 1960 and 1968; Fleiss 1971; Krippendorff 2011. Labels are 0 or 1 unless said so.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from workbench import check_name

Numbers = Sequence[float] | np.ndarray


def same_length(**columns: Sequence) -> list[np.ndarray]:
    """The columns as arrays. Raises ValueError for none, lengths that differ and numbers that are not finite."""
    arrays = {name: np.asarray(column, dtype=float) for name, column in columns.items()}
    for name, array in arrays.items():
        if array.ndim != 1:  # (n, 1) beside (n) would be taken for n x n pairs
            raise ValueError(f"{name} must be one column, got numbers of shape {array.shape}; choose one of it")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(" but ".join(f"{length} {name}" for name, length in lengths.items()) + "; give one for each")
    if not next(iter(lengths.values())):
        raise ValueError(f"0 {next(iter(lengths))}: nothing to measure")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return list(arrays.values())


def binary(labels: np.ndarray) -> np.ndarray:
    """Labels as bool. Raises ValueError for one that is neither 0 nor 1."""
    strange = np.flatnonzero((labels != 0) & (labels != 1))
    if len(strange):
        raise ValueError(f"labels must be 0 or 1, got {labels[strange[0]]:g} at place {strange[0]}")
    return labels == 1


def probabilities(confidence: np.ndarray) -> np.ndarray:
    """Raises ValueError for a number outside 0..1."""
    if ((confidence < 0) | (confidence > 1)).any():
        strange = confidence[(confidence < 0) | (confidence > 1)][0]
        raise ValueError(f"a confidence must be between 0 and 1, got {strange:g}; a logit goes through a softmax first")
    return confidence


# Calibration: stated chances beside frequencies


@dataclass(frozen=True)
class Bin:
    """Forecasts of about one confidence: how many, the mean of what was stated, and how often it came true."""

    n: int
    confidence: float
    frequency: float


BINNINGS = ("width", "mass")


def bin_places(confidence: np.ndarray, n_bins: int, by: str) -> np.ndarray:
    """The number of the bin of each forecast: bins of equal width, or of equal mass (as many forecasts in each)."""
    check_name("binning", by, BINNINGS)
    if not isinstance(n_bins, Integral) or n_bins < 1:
        raise ValueError(f"n_bins={n_bins} must be a whole number of at least 1")
    if by == "width":
        return np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)  # (lower, upper], as Guo et al.
    places = np.empty(len(confidence), dtype=int)
    places[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * n_bins // len(confidence)
    return places


def reliability(confidence: Numbers, right: Numbers, n_bins: int = 10, by: str = "width") -> list[Bin]:
    """The reliability curve: a bin for each range of confidence that occurs, lowest first."""
    stated, came = same_length(confidence=confidence, labels=right)
    places, came = bin_places(probabilities(stated), n_bins, by), binary(came)
    chosen = [places == place for place in np.unique(places)]
    return [Bin(int(own.sum()), float(stated[own].mean()), float(came[own].mean())) for own in chosen]


def calibration_error(confidence: Numbers, right: Numbers, n_bins: int = 10, by: str = "width") -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): mean distance of frequency and confidence in a bin, 0..1.

    It depends on the bins, and it is not 0 for a perfect model on finite data: the frequency of a bin of n forecasts
    scatters by about sqrt(p (1 - p) / n). A model that always states the base rate has error 0 and knows nothing.
    """
    bins = reliability(confidence, right, n_bins, by)
    return sum(each.n * abs(each.frequency - each.confidence) for each in bins) / sum(each.n for each in bins)


def brier_score(confidence: Numbers, right: Numbers) -> float:
    """Mean squared distance of a stated probability from what came (Brier 1950, half of his sum over two classes)."""
    stated, came = same_length(confidence=confidence, labels=right)
    return float(((probabilities(stated) - binary(came)) ** 2).mean())


@dataclass(frozen=True)
class BrierParts:
    """Brier score = reliability - resolution + uncertainty + within (0 unless forecasts were put into bins)."""

    reliability: float  # squared distance of frequency from confidence, over groups: 0 is calibrated
    resolution: float  # variance of the groups' frequencies: what the forecasts know
    uncertainty: float  # variance of the outcome: the score of somebody who states the base rate
    within: float  # variance of the forecasts in a bin, less twice their covariance with the outcome there

    @property
    def score(self) -> float:
        return self.reliability - self.resolution + self.uncertainty + self.within


def brier_parts(confidence: Numbers, right: Numbers, n_bins: int = 0, by: str = "width") -> BrierParts:
    """Murphy's three parts of the Brier score, over groups of equal forecasts; n_bins > 0: over bins, with the rest."""
    stated, came = same_length(confidence=confidence, labels=right)
    probabilities(stated), binary(came)
    places = bin_places(stated, n_bins, by) if n_bins else np.unique(stated, return_inverse=True)[1]
    base, parts = came.mean(), np.zeros(3)
    for place in np.unique(places):
        own, result = stated[places == place], came[places == place]
        moved, outcome = own - own.mean(), result - result.mean()
        apart = (own.mean() - result.mean()) ** 2, (result.mean() - base) ** 2
        parts += len(own) / len(stated) * np.array([*apart, (moved**2).mean() - 2 * (moved * outcome).mean()])
    return BrierParts(float(parts[0]), float(parts[1]), float(base * (1 - base)), float(parts[2]))


def log_loss(confidence: Numbers, right: Numbers) -> float:
    """Mean nats that a stated probability pays for what came; inf where something impossible came."""
    stated, came = same_length(confidence=confidence, labels=right)
    chance = np.where(binary(came), probabilities(stated), 1 - stated)
    with np.errstate(divide="ignore"):
        return float(-np.log(chance).mean())


# Temperature scaling


MOST_LOGIT = 1e100  # its square still has room in float64


def scaled_nats(logits: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float, float]:
    """Mean nats at 1 / temperature, with first and second derivative for it.

    With p = softmax(inverse * z): the mean of -log p of the label, E_p[z] - z of the label, Var_p[z]. The last is
    positive, so there is one minimum.
    """
    moved = logits * inverse  # (n, classes)
    moved -= moved.max(axis=1, keepdims=True)
    weights = np.exp(moved)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total  # (n, classes)
    rows = np.arange(len(labels))
    mean = (weights * logits).sum(axis=1)  # (n)
    variance = (weights * (logits - mean[:, None]) ** 2).sum(axis=1)  # (n)
    nats = np.log(total[:, 0]) - moved[rows, labels]
    return float(nats.mean()), float((mean - logits[rows, labels]).mean()), float(variance.mean())


def fit_temperature(logits: np.ndarray, labels: Sequence[int]) -> float:
    """The T > 0 for which softmax(logits / T) pays least for the labels, by Newton's method (Guo et al. 2017).

    logits: (n, classes), labels: (n) class numbers. It changes no answer, only how sure the model says it is. Raises
    ValueError where no finite T > 0 is best: all labels are the likeliest (T to 0), or logits do not help (T to inf).
    """
    table, chosen = np.asarray(logits, dtype=float), np.asarray(labels)
    if table.ndim != 2 or len(table) != len(chosen) or not len(chosen):
        raise ValueError(f"logits must be (n, classes) for n labels, got {table.shape} for {len(chosen)} labels")
    if not np.isfinite(table).all() or np.abs(table).max() > MOST_LOGIT:
        raise ValueError(f"logits must be finite and at most {MOST_LOGIT:g} in size")
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers in one column, got {chosen.dtype} of shape {chosen.shape}")
    if chosen.min() < 0 or chosen.max() >= table.shape[1]:
        raise ValueError(f"labels must be class numbers below {table.shape[1]}, got {chosen.min()} to {chosen.max()}")
    if (table[np.arange(len(chosen)), chosen] == table.max(axis=1)).all():
        raise ValueError("every label has the largest logit, so the best temperature is 0; fit on text with mistakes")
    if scaled_nats(table, chosen, 0.0)[1] >= 0:
        raise ValueError("these logits are no better than a uniform guess: the best temperature is infinite")
    low, high, inverse = 0.0, math.inf, 1.0 / max(table.std(), 1e-12)
    for _ in range(200):
        _, slope, curvature = scaled_nats(table, chosen, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        inside = low < step < high
        following = step if inside and step < 4 * inverse else (low + min(high, 4 * inverse)) / 2
        if abs(following - inverse) <= 1e-14 * inverse:
            break
        inverse = following
    return 1 / inverse


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities (n, classes) at a temperature above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    moved = np.asarray(logits, dtype=float) / temperature
    weights = np.exp(moved - moved.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


# Ranking and deciding


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def auc(scores: Numbers, labels: Numbers) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half; 0.5 is chance.

    Raises ValueError if all labels are of one class: there is no pair to compare.
    """
    values, truth = same_length(scores=scores, labels=labels)
    truth = both_classes("AUC", truth)
    n_yes, n_no = int(truth.sum()), int((~truth).sum())
    return float((midranks(values)[truth].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * n_no))


def both_classes(what: str, labels: np.ndarray) -> np.ndarray:
    truth = binary(labels)
    if truth.all() or not truth.any():
        raise ValueError(f"{what} is not defined for one class: all {len(truth)} labels are {int(truth[0])}")
    return truth


def roc_curve(scores: Numbers, labels: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and threshold (scores >= it are positive), from (0, 0) to (1, 1)."""
    values, truth = same_length(scores=scores, labels=labels)
    truth = both_classes("a ROC curve", truth)
    thresholds = np.unique(values)[::-1]
    below = [np.searchsorted(np.sort(values[side]), thresholds) / side.sum() for side in (truth, ~truth)]
    yes, no = 1 - below[0], 1 - below[1]  # (thresholds)
    return np.append(0.0, no), np.append(0.0, yes), np.append(np.inf, thresholds)


def average_precision(scores: Numbers, labels: Numbers) -> float:
    """Area under precision over recall as a step function: the sum of precision times the gain in recall."""
    values, truth = same_length(scores=scores, labels=labels)
    truth, area, before = both_classes("average precision", truth), 0.0, 0
    for threshold in np.unique(values)[::-1]:
        chosen = values >= threshold
        hits = int((chosen & truth).sum())
        area += hits / chosen.sum() * (hits - before) / truth.sum()
        before = hits
    return float(area)


@dataclass(frozen=True)
class Confusion:
    """Counts of decisions against labels. A rate with nothing to divide by is 0, as scikit-learn sets it."""

    n_hits: int  # yes, rightly
    n_alarms: int  # yes, wrongly
    n_misses: int  # no, wrongly
    n_rejections: int  # no, rightly

    @property
    def accuracy(self) -> float:
        return (self.n_hits + self.n_rejections) / (self.n_hits + self.n_alarms + self.n_misses + self.n_rejections)

    @property
    def precision(self) -> float:
        return self.n_hits / max(1, self.n_hits + self.n_alarms)

    @property
    def recall(self) -> float:
        return self.n_hits / max(1, self.n_hits + self.n_misses)

    @property
    def false_alarm_rate(self) -> float:
        return self.n_alarms / max(1, self.n_alarms + self.n_rejections)

    @property
    def f1(self) -> float:
        return 2 * self.n_hits / max(1, 2 * self.n_hits + self.n_alarms + self.n_misses)

    @property
    def matthews(self) -> float:
        """Correlation of decision and label (Matthews 1975), -1..1; 0 where one of them never changes."""
        sides = (
            (self.n_hits + self.n_alarms, self.n_hits + self.n_misses),
            (self.n_rejections + self.n_alarms, self.n_rejections + self.n_misses),
        )
        product = math.prod(count for side in sides for count in side)
        covariance = self.n_hits * self.n_rejections - self.n_alarms * self.n_misses
        return covariance / math.sqrt(product) if product else 0.0


def confusion(guesses: Numbers, labels: Numbers) -> Confusion:
    """Count yes-or-no decisions against labels."""
    said, truth = (binary(column) for column in same_length(guesses=guesses, labels=labels))
    counts = ((said & truth), (said & ~truth), (~said & truth), (~said & ~truth))
    return Confusion(*(int(count.sum()) for count in counts))


# Agreement beyond chance


WEIGHTS = ("none", "linear", "quadratic")


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable], weights: str = "none") -> float:
    """Agreement of two raters beyond what their own frequencies give by chance (Cohen 1960; weighted: 1968).

    weights: what a disagreement costs: 1, or the distance (squared) of the places of two labels in sorted order. 1 is
    full agreement, 0 chance. Raises ValueError if both raters use one label only: nothing is left beyond chance.
    """
    check_name("weights", weights, WEIGHTS)
    if len(one) != len(other):
        raise ValueError(f"{len(one)} labels of one rater but {len(other)} of the other; give one for each item")
    if not len(one):
        raise ValueError("0 labels: nothing to agree on")
    names = sorted(set(one) | set(other), key=str if weights == "none" else None)  # else their order means something
    if len(names) < 2:
        raise ValueError("kappa is not defined where only one label occurs; agreement is then certain")
    place, table = {name: index for index, name in enumerate(names)}, np.zeros((len(names), len(names)))
    for first, second in zip(one, other, strict=True):
        table[place[first], place[second]] += 1 / len(one)
    distance = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names)))).astype(float)
    cost = {"none": np.minimum(distance, 1), "linear": distance, "quadratic": distance**2}[weights]
    chance = np.outer(table.sum(axis=1), table.sum(axis=0))
    return float(1 - (cost * table).sum() / (cost * chance).sum())


def fleiss_kappa(ratings: Sequence[Sequence[Hashable]]) -> float:
    """Agreement of several raters beyond chance (Fleiss 1971): for each item the labels of its raters, as many each."""
    counts = [Counter(item) for item in ratings]
    n_raters = {len(item) for item in ratings}
    if len(n_raters) != 1 or min(n_raters) < 2:
        raise ValueError(f"every item needs the same number of raters, at least 2; got {sorted(n_raters)}")
    n, total = n_raters.pop(), sum(counts, Counter())
    agreed = sum(sum(c * (c - 1) for c in item.values()) / (n * (n - 1)) for item in counts) / len(counts)
    chance = sum((c / total.total()) ** 2 for c in total.values())
    if chance == 1:
        raise ValueError("kappa is not defined where only one label occurs; agreement is then certain")
    return (agreed - chance) / (1 - chance)


def krippendorff_alpha(ratings: Sequence[Sequence[Hashable | None]], numeric: bool = False) -> float:
    """1 - disagreement seen / disagreement by chance (Krippendorff 2011); None is a rating that is missing.

    ratings: for each item what its raters said; items with fewer than two ratings say nothing and are left out.
    numeric: two labels disagree by their squared difference, else by 1. Raises ValueError if only one label occurs, and
    for NaN, which is equal to no label.
    """
    if any(rating != rating for item in ratings for rating in item):
        raise ValueError("a rating is NaN; write None for a rating that is missing")
    items = [[rating for rating in item if rating is not None] for item in ratings]
    items = [item for item in items if len(item) > 1]
    everything = Counter(rating for item in items for rating in item)
    if len(everything) < 2:
        raise ValueError("alpha needs items with two ratings and at least two different labels")

    def disagreement(counts: Counter) -> float:  # summed over ordered pairs
        pairs = ((a, b, n * m) for a, n in counts.items() for b, m in counts.items() if a != b)
        return sum(times * ((a - b) ** 2 if numeric else 1) for a, b, times in pairs)

    n = everything.total()
    seen = sum(disagreement(Counter(item)) / (len(item) - 1) for item in items) / n
    return 1 - seen / (disagreement(everything) / (n * (n - 1)))


# Drawn


def plot_reliability(curves: dict[str, list[Bin]]) -> Figure:
    """How often what was stated came true; the diagonal is calibrated, a mark's size shows how many there are."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    axis.plot([0, 1], [0, 1], color="0.6", lw=1)
    for name, bins in curves.items():
        stated, came = [each.confidence for each in bins], [each.frequency for each in bins]
        (line,) = axis.plot(stated, came, label=name)
        largest = max(each.n for each in bins)
        sizes = [12 + 60 * each.n / largest for each in bins]
        axis.scatter(stated, came, sizes, color=line.get_color(), clip_on=False, zorder=3)
    axis.set(xlabel="stated probability", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    return figure
