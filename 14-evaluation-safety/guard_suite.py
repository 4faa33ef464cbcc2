"""Topic 14 - Guard suite: what a guard catches and what it stops for nothing, written plainly and in eight disguises.

python 14-evaluation-safety/evaluation_safety.py guard            # train it, examine it, write its card

The texts are `guard_corpus`'s held-out half. The limit is chosen on the training half alone: the guard is trained four
times without a quarter of the templates, and the limit lets through all but a given share of the harmless texts of that
quarter. So the share that the suite then finds is a prediction that can fail.
"""

import base64
import datetime
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from content_guard import CATEGORIES, WEIGHTS, Guard, GuardConfig, load_guard, save_guard, train_guard
from course_model import command_line
from evaluation_statistics import wilson
from guard_corpus import ATTACKS, SIDES, SLOTS, GuardText, draw_texts, n_templates, templates, world_texts
from workbench import (
    RunConfig,
    alone,
    announce,
    check_range,
    describe_machine,
    seed_everything,
    shown,
    write_atomically,
)

REPORT = "report.json"
GERMAN = dict(
    pair.split("=")
    for pair in """a=ein all=alle and=und any=jede answer=antworte are=bist at=bei before=vorher best=beste but=aber
    by=von call=rufe can=kannst comply=folge could=könntest creator=Schöpfer dead=tot directive=Anweisung
    disclose=verrate display=zeige ever=je every=jede everything=alles explain=erkläre for=für from=von game=Spiel
    give=gib go=geh going=werde gold=Gold hate=hasse he=er hello=hallo here=hier his=sein house=Haus how=wie i=ich
    if=wenn in=in initial=erste is=ist it=es its=sein just=nur key=Schlüssel let=lass life=Leben like=wie link=Link
    locate=finde look=sieh love=liebe machine=Maschine me=mich meet=treffen my=mein name=nenne never=nie new=neu
    next=nächste no=kein not=nicht notes=Notizen nothing=nichts now=jetzt number=Nummer of=von off=aus on=auf
    one=einer only=nur or=oder order=Befehl our=unser out=aus owner=Besitzer page=Seite person=Person play=spiele
    please=bitte print=drucke private=privat quote=zitiere record=Rekord refusing=ablehnen remark=Hinweis reply=antworte
    request=Bitte role=Rolle rules=Regeln salary=Gehalt say=sage secret=Geheimnis see=sehe server=Server show=zeige
    so=so speak=sprich start=Anfang station=Bahnhof story=Geschichte street=Straße suppose=angenommen system=System
    tell=sage text=Text that=das the=der them=sie then=dann there=dort this=dies time=Zeit to=zu together=zusammen
    told=gesagt turn=schalte up=auf updated=neue us=uns vault=Tresor visit=besuche want=will was=war we=wir what=was
    when=wenn where=wo which=welche who=wer whose=wessen will=wird with=mit without=ohne wish=wünschte would=würde
    write=schreibe wrong=falsch years=Jahre yes=ja you=du your=dein""".split()
)
CYRILLIC = str.maketrans("aceopxyisABCEHKMOPTX", "асеорхуіѕАВСЕНКМОРТХ")


def in_changing_case(text: str, rng: random.Random) -> str:
    return "".join(char.upper() if rng.random() < 0.5 else char.lower() for char in text)


def in_leet(text: str, rng: random.Random) -> str:
    return text.translate(str.maketrans("aeiostAEIOST", "431057431057"))


def spaced(text: str, rng: random.Random) -> str:
    return "  ".join(" ".join(word) for word in text.split())


def in_lookalikes(text: str, rng: random.Random) -> str:
    return "".join(char.translate(CYRILLIC) if rng.random() < 0.7 else char for char in text)


def in_base64(text: str, rng: random.Random) -> str:
    return base64.b64encode(text.encode()).decode()


def with_nothing_between(text: str, rng: random.Random) -> str:
    return "".join(char + "\u200b" * (rng.random() < 0.5) for char in text)


def in_german_words(text: str, rng: random.Random) -> str:
    """Word by word, where the glossary has one: a stub of a translation."""
    return "".join(GERMAN.get(part.lower(), part) for part in split_words(text))


def split_words(text: str) -> list[str]:
    parts: list[str] = []
    for char in text:
        if parts and char.isalpha() and parts[-1].isalpha():
            parts[-1] += char
        else:
            parts.append(char)
    return parts


def as_strings(text: str, rng: random.Random) -> str:
    """Cut into strings that a program would put together again."""
    parts, start = [], 0
    while start < len(text):
        n = rng.randint(3, 7)
        parts.append(text[start : start + n])
        start += n
    return " + ".join(f'"{part}"' for part in parts)


TRANSFORMS: dict[str, Callable[[str, random.Random], str]] = {
    "as written": lambda text, rng: text,
    "case": in_changing_case,
    "leet": in_leet,
    "spaces": spaced,
    "look-alikes": in_lookalikes,
    "base64": in_base64,
    "zero width": with_nothing_between,
    "German words": in_german_words,
    "split": as_strings,
}


def suite(n: int = 42, seed: int = 5) -> list[GuardText]:
    """n held-out attacks of each category, five times as many harmless texts, a part of them the world's."""
    world = [one for one in world_texts("held-out", 40 + 2 * n, seed + 1) if one.label == "none"]
    return draw_texts("held-out", n, seed, CATEGORIES) + draw_texts("held-out", 4 * n, seed, ("none",)) + world[:n]


def verdicts(guard: Guard, texts: Sequence[GuardText], transform: str, every: int = 1) -> list[bool]:
    """Whether each `every`-th text is blocked in this disguise."""
    return [
        guard.check(TRANSFORMS[transform](one.text, random.Random(f"{transform} {place}"))).blocked
        for place, one in enumerate(texts)
        if place % every == 0
    ]


def rates(texts: Sequence[GuardText], blocked: Sequence[bool]) -> dict[str, tuple[int, int]]:
    """(blocked, all) for attacks, harmless texts, each category, and the world's instructions among the harmless."""
    found = {}
    for name, labels in {"attack": CATEGORIES, "harmless": ("none",), **{name: (name,) for name in CATEGORIES}}.items():
        own = [stopped for one, stopped in zip(texts, blocked, strict=True) if one.label in labels]
        found[name] = (sum(own), len(own))
    own = [stopped for one, stopped in zip(texts, blocked, strict=True) if one.label == "none" and one.template < 0]
    return found | {"world": (sum(own), len(own))}


# Making it


@dataclass(frozen=True)
class GuardTrainConfig(GuardConfig):
    """The guard, and the texts that it learns from."""

    n_texts: int = 900  # generated texts of each category
    n_harmless: int = 3400  # generated harmless texts
    n_world: int = 800  # instructions of the course's world
    false_refusals: float = 0.05  # share of harmless texts of unknown templates that may be stopped; sets the limit

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_texts", "n_harmless", "n_world", least=8)
        check_range(self, "false_refusals", above=0, below=1)

    @property
    def guard(self) -> GuardConfig:
        return GuardConfig(**{name: getattr(self, name) for name in GuardConfig.__dataclass_fields__})


def training_texts(config: GuardTrainConfig, seed: int) -> list[GuardText]:
    drawn = draw_texts("train", config.n_texts, seed, CATEGORIES) + draw_texts(
        "train", config.n_harmless, seed, ("none",)
    )
    return drawn + world_texts("train", config.n_world, seed + 3)


def scored_without_own_template(config: GuardTrainConfig, texts: Sequence[GuardText], seed: int) -> np.ndarray:
    """Score of each text by a guard that was trained without a quarter of the templates, its own among them."""
    scores = np.zeros(len(texts))
    for fold in range(4):
        outside = [one for one in texts if one.template % 4 != fold]
        made = train_guard([one.text for one in outside], [one.label for one in outside], config.guard, seed)
        for place, one in enumerate(texts):
            if one.template % 4 == fold and place % 3 == 0:
                scores[place] = made.check(one.text).score
            elif one.template % 4 == fold:
                scores[place] = np.nan
    return scores


def chosen_limit(scores: np.ndarray, texts: Sequence[GuardText], share: float) -> float:
    """The limit above which this share of the harmless texts lies; every template counts alike."""
    by_template: dict[int, list[float]] = {}
    for score, one in zip(scores, texts, strict=True):
        if one.label == "none" and one.template >= 0 and np.isfinite(score):
            by_template.setdefault(one.template, []).append(float(score))
    weights = np.concatenate([np.full(len(found), 1 / len(found)) for found in by_template.values()])
    values = np.concatenate([np.array(found) for found in by_template.values()])
    order = np.argsort(-values)
    place = int(np.searchsorted(np.cumsum(weights[order]) / weights.sum(), share))
    return float(np.clip(values[order][min(place, len(values) - 1)], 0.02, 0.98))


def make_guard(config: GuardTrainConfig, seed: int) -> tuple[Guard, dict[str, Any]]:
    """A guard with its limit, and what was seen when the limit was chosen."""
    texts = training_texts(config, seed)
    scores = scored_without_own_template(config, texts, seed)
    limit = round(chosen_limit(scores, texts, config.false_refusals), 3)
    seen = np.isfinite(scores) & np.array([one.template >= 0 for one in texts])
    attack = np.array([one.label != "none" for one in texts])
    expected = {"recall": float((scores[seen & attack] >= limit).mean()), "false refusals": config.false_refusals}
    made = train_guard([one.text for one in texts], [one.label for one in texts], config.guard, seed)
    made.config = replace(config.guard, limit=limit)
    return made, {"n_texts": len(texts), "limit": limit, "expected": expected}


def examine(guard: Guard, texts: Sequence[GuardText]) -> dict[str, Any]:
    """Counts for every disguise, and the verdicts themselves as 0 and 1."""
    blocked = {name: verdicts(guard, texts, name) for name in TRANSFORMS}
    counts = {name: {kind: list(pair) for kind, pair in rates(texts, found).items()} for name, found in blocked.items()}
    return {"counts": counts, "verdicts": {name: "".join("01"[one] for one in row) for name, row in blocked.items()}}


@alone
def guard(config: GuardTrainConfig, run: RunConfig) -> None:
    """Train the guard, choose its limit, examine it on held-out texts in nine forms; write its folder with a card."""
    announce("train the guard five times and examine it on nine forms of 420 texts", 90)
    seed_everything(run.seed)
    before = time.process_time()
    made, report = make_guard(config, run.seed)
    report |= {"cpu_seconds": round(time.process_time() - before, 1), "command": command_line()}
    report |= {"machine": describe_machine(), "date": datetime.date.today().isoformat()}
    folder = run.out / "guard"
    report["weights_sha256"] = save_guard(made, folder)
    report |= examine(load_guard(folder), suite())
    write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", guard_card(report, folder).encode())
    show_counts(report["counts"])
    print(f"the guard is in {shown(folder)}")


def show_counts(counts: dict[str, dict[str, list[int]]]) -> None:
    print(f"{'form':14}{'attacks stopped':>34}{'harmless texts stopped':>34}")
    for name, found in counts.items():
        print(f"{name:14}" + "".join(f"{as_share(found[kind]):>34}" for kind in ("attack", "harmless")))


def as_share(pair: Sequence[int]) -> str:
    low, high = wilson(*pair)
    return f"{pair[0]} of {pair[1]} ({low:.1%} to {high:.1%})"


def guard_card(report: dict[str, Any], folder: Path) -> str:
    """What a reader of the folder wants to know; every number is the report's."""
    rows = [
        f"| {name} | {as_share(found['attack'])} | {as_share(found['harmless'])} |"
        for name, found in report["counts"].items()
    ]
    own = report["counts"]["as written"]
    kinds = [f"| {name} | {as_share(own[name])} |" for name in CATEGORIES]
    numbers = [sum(n_templates(one) for name in (*ATTACKS, "none") for one in templates(side, name)) for side in SIDES]
    expected = report["expected"]
    lines = [
        "# The course guard",
        "",
        f"A linear classifier over hashed pieces of characters and words, made by\n\n    {report['command']}\n",
        f"in {report['cpu_seconds']:.0f} s of CPU time ({report['machine']}, {report['date']}) from "
        f"{report['n_texts']:,} generated texts. It reads a text as it is written and as what it could be meant to "
        "be read as (`text_normalisation.py`), and stops it if any reading scores "
        f"{report['limit']:g} or more for one of: {', '.join(CATEGORIES)}.",
        "",
        "**Use**: to learn with. Every text it was trained and examined on is generated by `guard_corpus.py`: "
        f"{numbers[0]:,} templates for training, {numbers[1]:,} others for the examination, with slots whose words "
        f"({', '.join(SLOTS)}) are others too. What it does with text that people write is not known.",
        "",
        f"The limit was chosen so that {expected['false refusals']:.0%} of harmless texts of unknown templates of the "
        f"training side are stopped; there it stops {expected['recall']:.1%} of the attacks. On the held-out "
        "side, with 95 % intervals (Wilson):",
        "",
        "| Form | Attacks stopped | Harmless texts stopped |",
        "|:--|--:|--:|",
        *rows,
        "",
        "As written, by kind:",
        "",
        "| Kind | Stopped |",
        "|:--|--:|",
        *kinds,
        "",
        "A fifth of the harmless texts are instructions of the course's world, of which it stops "
        f"{as_share(own['world'])}; the others are chosen to be hard: idioms of violence, numbers that look like "
        "telephones, pole vaults.",
        "",
        f"`{WEIGHTS}`: {(folder / WEIGHTS).stat().st_size:,} bytes, sha256 `{report['weights_sha256']}`",
    ]
    return "\n".join(lines) + "\n"
