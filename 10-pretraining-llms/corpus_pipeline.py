"""Topic 10 - Corpus pipeline: from a crawl to training text, stage by stage, with a count for every page that goes.

    Pipeline(CorpusConfig()).run(records)                        # a generator of the records that remain
    corpus(CorpusConfig(data="my_pages.jsonl"), RunConfig())  # cleaned.jsonl, manifest.json ... under --out
    scores(pages, pipeline)                                      # precision and recall of each stage, the truth known
    mixture({"web": 900, "books": 100}, temperature=2)           # how often each source is drawn

Pages pass one at a time, so that a corpus need not fit into memory: what grows is the deduplication's index, 16 bytes
a page for equal pages and about two kilobytes for nearly equal ones.

Penedo et al. 2024 (arXiv 2406.17557, FineWeb) and Soldaini et al. 2024 (arXiv 2402.00159, Dolma) describe such
pipelines at full size; Conneau et al. 2020 (arXiv 1911.02116) mix sources with a power of their size.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from corpus_filters import NgramLanguage, QualityClassifier, RuleConfig, failed_rule, mask_private, normalise
from deduplication import Decontaminator, MinHashConfig, NearDuplicates, text_key
from dirty_corpus import (
    N_EVALUATION,
    TO_REMOVE,
    DirtConfig,
    Page,
    dirty_corpus,
    evaluation_documents,
    foreign_text,
    python_pages,
    world_page,
)
from python_text import load_texts, read_file, text_field
from shards import stream_texts
from tiny_world import World
from workbench import RunConfig, alone, announce, check_name, check_range, locked, progress, shown, write_atomically

STAGES = {  # in this order: the cheap ones and those that repair before those that compare
    "normalise": "repair line ends, encoding, entities and the frame around the text",
    "language": "keep one language",
    "rules": "drop pages that break a rule of form",
    "quality": "drop pages unlike trusted text",
    "exact": "drop pages equal to an earlier one",
    "near": "drop pages nearly equal to an earlier one",
    "private": "mask personal data",
    "decontaminate": "drop pages that hold a part of the evaluation set",
}
OWN_LABELS = {  # stage -> labels of the planted pages that it is there for
    "language": ("foreign",),
    "rules": ("junk",),
    "quality": ("salad", "junk"),
    "exact": ("exact",),
    "near": ("near",),
    "decontaminate": ("leaked",),
}


@dataclass(frozen=True)
class CorpusConfig:
    """What to clean, and how."""

    data: str = "dirty"  # dirty: a crawl with planted dirt; a .jsonl file, a folder of them, or what load_texts reads
    column: str = "text"  # field that holds the text
    n_pages: int = 1000  # good pages of the planted crawl
    dirt: float = 1.0  # bad pages of the planted crawl, as a multiple of the usual number
    skip: str = ""  # stages to leave out, separated by commas
    language: str = "english"  # language to keep: english, french or german
    trusted: str = ""  # good texts for the quality classifier; empty: the planted crawl's own, else no such stage
    kept: float = 0.98  # share of trusted texts that the quality classifier lets pass
    evaluation: str = ""  # texts that must not be trained on; empty: TinyWorld's evaluation documents
    least_similarity: float = 0.7  # estimated share of common word runs from which on pages are nearly equal
    temperature: float = 1.0  # of the mixture of sources: 1 as they come, higher: small sources more often
    max_texts: int = 0  # read at most so many pages; 0: all

    def __post_init__(self) -> None:
        check_range(self, "n_pages", least=1)
        check_range(self, "max_texts", least=0)
        check_range(self, "dirt", least=0, most=50)
        check_range(self, "kept", "least_similarity", above=0, most=1)
        check_range(self, "temperature", above=0)
        check_name("language", self.language, ("english", "french", "german"))
        for name in self.skipped:
            check_name("stage", name, STAGES)

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.skip.split(",") if name.strip())


@dataclass(slots=True)
class Record:
    """A page on its way through the pipeline."""

    number: int  # place in the crawl
    text: str
    source: str


Stage = Callable[[str], tuple[str, str | None]]  # text -> (text, why the page is dropped or None)


@dataclass
class StageReport:
    """What one stage did."""

    pages_in: int = 0
    words_in: int = 0
    pages_out: int = 0
    words_out: int = 0
    changed: int = 0  # pages that went on with another text
    removed: Counter[str] = field(default_factory=Counter)  # reason -> pages

    def as_dict(self) -> dict:
        return {**vars(self), "removed": dict(self.removed)}

    def count(self, before: str, after: str, reason: str | None) -> None:
        self.pages_in += 1
        self.words_in += len(before.split())
        if reason is not None:
            self.removed[reason] += 1
            return
        self.pages_out += 1
        self.words_out += len(after.split())
        self.changed += after != before


# What the stages learn from: texts that are known to be good, and other languages


@cache
def trusted_pages(n_pages: int, seed: int = 500) -> tuple[str, ...]:
    """Good pages of other documents than those of any crawl: three quarters TinyWorld, a quarter Python text."""
    rng, documents = random.Random(seed), World().stream(seed, split="train")
    pages = [world_page(documents, rng) for _ in range(3 * n_pages // 4)]
    return (*pages, *rng.sample(python_pages(), min(n_pages - len(pages), len(python_pages()))))


@cache
def language_model(n_pages: int = 150, seed: int = 501) -> NgramLanguage:
    rng = random.Random(seed)
    texts = {language: [foreign_text(language, rng) for _ in range(n_pages)] for language in ("french", "german")}
    return NgramLanguage.train({"english": trusted_pages(4 * n_pages), **texts})


def quality_model(trusted: Sequence[str], crawl: Sequence[str], kept: float) -> tuple[QualityClassifier, float]:
    """The classifier, and the score from which on a page is kept: every fifth of the trusted texts sets it.

    The others are learnt from: texts that a classifier was trained on score higher than new ones. Every fifth, since
    trusted texts often come sorted by source, and a threshold from one source would drop the others.
    """
    held = trusted[::5]
    learnt = [text for place, text in enumerate(trusted) if place % 5] or held
    model = QualityClassifier.train(learnt, crawl)
    return model, model.threshold(held, kept)


# The pipeline


HALVES = re.compile("[\ud800-\udfff]")
N_SAMPLED = 600  # first pages of the crawl, which the quality classifier sets against trusted ones


class Pipeline:
    """The stages of a config, ready to run over one crawl."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.names = [name for name in STAGES if name not in config.skipped]
        self.report = {name: StageReport() for name in self.names}
        self.verdicts: dict[int, tuple[str, str]] = {}  # number of a removed page -> (stage, reason)
        self.masked: dict[int, list[tuple[str, str]]] = {}  # number of a page -> personal data found there
        self.repaired: dict[int, str] = {}  # number of a page that normalising changed -> its new text
        if not config.trusted and config.data != "dirty" and "quality" in self.names:
            self.names.remove("quality")
            del self.report["quality"]

    def run(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records that pass all stages, in order. `report` and `verdicts` fill while they are read."""
        records = iter(records)
        sample = list(itertools.islice(records, N_SAMPLED))
        if not sample:
            raise ValueError(f"{self.config.data}: no page to clean; give a file or folder with texts")
        stages = {name: getattr(self, f"build_{name}")(sample) for name in self.names}
        for record in itertools.chain(sample, records):
            if self.passes(record, stages):
                yield record

    def passes(self, record: Record, stages: dict[str, Stage]) -> bool:
        """Take one record through the stages, in place; whether it came out at the end."""
        self.current = record
        for name, stage in stages.items():
            text, reason = stage(record.text)
            self.report[name].count(record.text, text, reason)
            if reason is not None:
                self.verdicts[record.number] = (name, reason)
                return False
            record.text = text
        return True

    def build_normalise(self, sample: list[Record]) -> Stage:
        def stage(text: str) -> tuple[str, str | None]:
            repaired = normalise(text)
            if repaired != text:
                self.repaired[self.current.number] = repaired
            return repaired, None if repaired.strip() else "nothing left"

        return stage

    def build_language(self, sample: list[Record]) -> Stage:
        model = language_model()

        def stage(text: str) -> tuple[str, str | None]:
            language = model.classify(text)
            return text, None if language == self.config.language else language

        return stage

    def build_rules(self, sample: list[Record]) -> Stage:
        limits = RuleConfig()
        return lambda text: (text, failed_rule(text, limits))

    def build_quality(self, sample: list[Record]) -> Stage:
        """The other side of the classifier: what the first pages of the crawl look like after the stages before."""
        given = self.config.trusted
        trusted = all_texts(given, "train", self.config.column) if given else trusted_pages(len(sample))
        before = [name for name in ("normalise", "language", "rules") if name in self.names]
        stages = [getattr(self, f"build_{name}")(sample) for name in before]
        crawl = []
        for self.current in sample:
            text, reason = self.current.text, None
            for stage in stages:
                text, reason = (text, reason) if reason else stage(text)
            crawl += [] if reason else [text]
        model, least = quality_model(trusted, crawl, self.config.kept)
        return lambda text: (text, None if model.score(text) >= least else "low score")

    def build_exact(self, sample: list[Record]) -> Stage:
        seen: set[bytes] = set()

        def stage(text: str) -> tuple[str, str | None]:
            key = text_key(text)
            known = key in seen
            seen.add(key)
            return text, "equal to an earlier page" if known else None

        return stage

    def build_near(self, sample: list[Record]) -> Stage:
        index = NearDuplicates(MinHashConfig(least_similarity=self.config.least_similarity))
        return lambda text: (text, None if index.add(text) is None else "nearly equal to an earlier page")

    def build_private(self, sample: list[Record]) -> Stage:
        def stage(text: str) -> tuple[str, str | None]:
            text, found = mask_private(text)
            if found:
                self.masked[self.current.number] = found
            return text, None

        return stage

    def build_decontaminate(self, sample: list[Record]) -> Stage:
        if self.config.evaluation:
            texts = all_texts(self.config.evaluation, "validation", self.config.column)
        else:
            texts = [document.text for document in evaluation_documents(N_EVALUATION)]
        decontaminator = Decontaminator(texts)
        return lambda text: (text, None if decontaminator.shared(text) is None else "shares a run of words")


def clean_pages(pages: Sequence[Page], config: CorpusConfig | None = None) -> tuple[list[Record], Pipeline]:
    """Run the pipeline over planted pages; the records that remain, and the pipeline with its report."""
    pipeline = Pipeline(config or CorpusConfig())
    records = (Record(number, page.text, page.source) for number, page in enumerate(pages))
    return list(pipeline.run(records)), pipeline


# What the stages are worth, where the truth is known


def ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def scores(pages: Sequence[Page], pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Precision, recall and the good pages lost, for every stage that ran.

    A removed page was removed rightly if any label says that it should go, whichever stage found it. Recall is over the
    pages that the stage is there for and that reached it. `normalise` and `private` change pages instead: there,
    precision is over pages changed, or pieces of text masked in pages with planted personal data; recall over the
    damaged pages, or the planted pieces.
    """
    found = {}
    order = {name: place for place, name in enumerate(STAGES)}
    for name in pipeline.names:
        if name == "normalise":
            repaired = pipeline.repaired
            right = sum(repaired.get(n) == page.original for n, page in enumerate(pages) if page.label == "damaged")
            changed = [n for n in repaired if pages[n].label in ("good", "damaged", "canary", "leaked")]
            n_damaged = sum(page.label == "damaged" for page in pages)
            found[name] = {"precision": ratio(right, len(changed)), "recall": ratio(right, n_damaged), "lost": 0}
        elif name == "private":
            found[name] = private_scores(pages, pipeline)
        else:
            removed = [n for n, (stage, _) in pipeline.verdicts.items() if stage == name]
            right = sum(pages[n].label in TO_REMOVE for n in removed)
            reached = [
                n
                for n, page in enumerate(pages)
                if page.label in OWN_LABELS[name]
                and (n not in pipeline.verdicts or order[pipeline.verdicts[n][0]] >= order[name])
            ]
            own = sum(pages[n].label in OWN_LABELS[name] for n in removed)
            lost = len(removed) - right
            found[name] = {
                "precision": ratio(right, len(removed)),
                "recall": ratio(own, len(reached)),
                "lost": lost,
            }
    return found


def private_scores(pages: Sequence[Page], pipeline: Pipeline) -> dict[str, float]:
    planted, masked, right = 0, 0, 0
    order = list(STAGES)
    for number, page in enumerate(pages):
        stage = pipeline.verdicts.get(number, ("decontaminate", ""))[0]
        if page.label != "private" or order.index(stage) < order.index("private"):
            continue
        found = pipeline.masked.get(number, [])
        planted, masked = planted + len(page.secrets), masked + len(found)
        right += len(set(found) & set(page.secrets))
    return {"precision": ratio(right, masked), "recall": ratio(right, planted), "lost": 0}


# Mixing


def mixture(sizes: dict[str, int], temperature: float = 1.0) -> dict[str, float]:
    """How often each source is drawn: p_i proportional to n_i^(1/T). T = 1 as they come, T to infinity all alike."""
    if not sizes or min(sizes.values()) < 0 or not any(sizes.values()):
        raise ValueError(f"a mixture needs sizes >= 0, at least one of them positive; got {sizes}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    largest = max(sizes.values())
    powers = {name: (size / largest) ** (1 / temperature) if size else 0.0 for name, size in sizes.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def mixed(texts: dict[str, Sequence[str]], n_draws: int, temperature: float, seed: int) -> Iterator[tuple[str, str]]:
    """Yield n_draws pairs (source, text): the source by `mixture`, its texts in a fresh order every time round."""
    rng = random.Random(seed)
    weights = mixture({name: len(found) for name, found in texts.items()}, temperature)
    names = [name for name, weight in weights.items() if weight]
    waiting: dict[str, list[str]] = {name: [] for name in names}
    for name in rng.choices(names, [weights[name] for name in names], k=n_draws):
        if not waiting[name]:
            waiting[name] = rng.sample(list(texts[name]), len(texts[name]))
        yield name, waiting[name].pop()


# Reading and writing


def read_records(config: CorpusConfig, seed: int) -> Iterator[Record]:
    """The pages of a crawl, one at a time where the format allows. Raises ValueError for what cannot be read."""
    path = Path(config.data)
    if config.data == "dirty":
        pages = dirty_corpus(DirtConfig(config.n_pages).scaled(config.dirt), seed)
        found: Iterable[tuple[str, str]] = ((page.text, page.source) for page in pages)
    elif path.is_file() and path.suffix == ".jsonl":
        found = read_lines(path, config.column)
    elif path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path}: the folder is empty; put .jsonl files with a field {config.column!r} into it")
    elif path.is_dir() and any(path.glob("*.jsonl")):
        found = itertools.chain.from_iterable(read_lines(file, config.column) for file in sorted(path.glob("*.jsonl")))
    else:
        found = ((text, config.data) for text in stream_texts(config.data, "train", config.column))
    for number, (text, source) in enumerate(itertools.islice(found, config.max_texts or None)):
        yield Record(number, whole_characters(text), whole_characters(source))


def whole_characters(text: str) -> str:
    """A text in which half a surrogate pair, which JSON may name and no file in UTF-8 can hold, is U+FFFD."""
    return HALVES.sub("\ufffd", text)


def all_texts(name_or_path: str, split: str, column: str) -> list[str]:
    """Every text of a local file; of a data set those of the split."""
    path = Path(name_or_path)
    if path.is_file() and path.suffix not in (".parquet", ".arrow", ".json"):
        return [whole_characters(text) for text in read_file(path, column)]
    return [whole_characters(text) for text in load_texts(name_or_path, split, column)]


def read_lines(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of each line of JSON; the field "source" if there is one, else the file's name."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON in UTF-8: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object with a field {column!r}, got {type(record).__name__}")
            yield text_field(where, record, column), str(record.get("source", path.stem))


class LinesFile:
    """A file of JSON lines that appears under its name only when all of them are written; knows its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp.{os.getpid()}")
        self.digest, self.n_lines = hashlib.sha256(), 0

    def __enter__(self) -> "LinesFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.path.parent.glob(f".{self.path.name}.tmp.*"):  # of a run that was killed
            stale.unlink(missing_ok=True)
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed by __exit__
        return self

    def write(self, **record: object) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        self.file.write(line)
        self.digest.update(line)
        self.n_lines += 1

    def __exit__(self, kind: type | None, *exc_info) -> None:
        try:
            if not kind:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.path)
        finally:
            with contextlib.suppress(OSError):  # what the full disk did not take; its error is on the way already
                self.file.close()
            self.temporary.unlink(missing_ok=True)


# The verb


@alone
def corpus(config: CorpusConfig, run: RunConfig) -> None:
    """Clean a crawl: write cleaned.jsonl, removed.jsonl and manifest.json, and print what each stage did."""
    announce(f"clean {config.data}", 20 + config.n_pages / 100 if config.data == "dirty" else 30)
    pipeline, words = Pipeline(config), Counter()
    pages: Counter[str] = Counter()
    with (
        locked(run.out),
        LinesFile(run.out / "cleaned.jsonl") as cleaned,
        LinesFile(run.out / "removed.jsonl") as removed,
    ):
        for record in pipeline.run(progress(read_records(config, run.seed), "pages")):
            cleaned.write(text=record.text, source=record.source, number=record.number)
            pages[record.source] += 1
            words[record.source] += len(record.text.split())
        for number, (stage, reason) in sorted(pipeline.verdicts.items()):
            removed.write(number=number, stage=stage, reason=reason)
    if not pages:
        raise ValueError(
            f"{config.data}: no page is left after {', '.join(pipeline.names)}; see removed.jsonl or --skip"
        )
    weights = mixture(words, config.temperature)
    manifest = {
        "config": asdict(config),
        "seed": run.seed,
        "cleaned.jsonl": {"pages": cleaned.n_lines, "sha256": cleaned.digest.hexdigest()},
        "removed.jsonl": {"pages": removed.n_lines, "sha256": removed.digest.hexdigest()},
        "sources": {name: {"pages": pages[name], "words": words[name], "weight": weights[name]} for name in words},
        "stages": {name: stage.as_dict() for name, stage in pipeline.report.items()},
    }
    write_atomically(run.out / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    print(render_report(pipeline.report))
    if config.data == "dirty":
        print_scores(scores(dirty_corpus(DirtConfig(config.n_pages).scaled(config.dirt), run.seed), pipeline))
    print(f"wrote {shown(run.out / 'cleaned.jsonl')}: {cleaned.n_lines:,} pages, {sum(words.values()):,} words")


def render_report(report: dict[str, StageReport]) -> str:
    """One line for each stage: pages in and out, words out, pages changed, and the commonest reasons for removal."""
    lines = [f"{'stage':14} {'pages in':>9} {'out':>9} {'words out':>11} {'changed':>8}  removed"]
    for name, stage in report.items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in stage.removed.most_common(6))
        sizes = f"{stage.pages_in:9,} {stage.pages_out:9,} {stage.words_out:11,} {stage.changed:8,}"
        lines.append(f"{name:14} {sizes}  {reasons}")
    return "\n".join(lines)


def print_scores(found: dict[str, dict[str, float]]) -> None:
    print("against the planted truth:")
    for name, score in found.items():
        lost = f", {score['lost']} good pages lost" if score["lost"] else ""
        print(f"{name:14} precision {score['precision']:.3f}, recall {score['recall']:.3f}{lost}")
