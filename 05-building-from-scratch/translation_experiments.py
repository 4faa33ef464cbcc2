"""Topic 05 - Translation experiments: every measurement of the chapter.

python 05-building-from-scratch/building_from_scratch.py figures             # all of them: about eight minutes
python 05-building-from-scratch/building_from_scratch.py figures beams speed # some of them

Papers: Wu et al. 2016 (arXiv 1609.08144), the length penalty; Stahlberg and Byrne 2019 (arXiv 1908.10090), search
errors and model errors.
"""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

import building_from_scratch as core
from building_from_scratch import (
    Codec,
    DataConfig,
    DecodeConfig,
    ModelConfig,
    TrainConfig,
    Transformer,
    alignment_scores,
    answer_log_probs,
    attention_maps,
    batch_tensors,
    beam_answers,
    beam_translate,
    evaluate_splits,
    exact_match,
    fit,
    greedy_answers,
    held_out_loss,
    length_ratio,
    load_pairs,
    measure_speed,
    noam_factor,
    plot_alignment,
    plot_training,
    smoothing_floor,
)
from debugging_tools import BUGS, find_all, planted, plot_ladder, symptoms
from translation_pairs import Pair, join_tokens
from workbench import (
    Column,
    RunConfig,
    check_name,
    check_range,
    locked,
    pick_device,
    progress,
    run_experiments,
    save_figure,
    save_results,
    seed_everything,
)


@dataclass(frozen=True)
class FiguresConfig:
    only: tuple[str, ...] = ()  # experiments to run; none means all
    n_seeds: int = 3  # seeds 0, 1, ... of every comparison
    main_steps: int = 700  # steps of the main job
    main_pairs: int = 40_000  # its training pairs
    small_steps: int = 400  # steps of the small model: ablations, beams, planted bugs
    small_pairs: int = 8_000  # its training pairs
    n_held_out: int = 500  # pairs of each held-out split
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "main_pairs", "small_pairs", least=1)
        check_range(self, "main_steps", "small_steps", "n_held_out", least=20)
        for name in self.only:
            check_name("experiment", name, EXPERIMENTS)

    def save(self, name: str, columns: list[Column], rows: list[list], experiment: str, n_seeds: int = 0) -> None:
        command = f"python 05-building-from-scratch/building_from_scratch.py figures {experiment}"
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds or self.n_seeds), command)


@dataclass(frozen=True)
class Trained:
    """A translator after its training, with its data."""

    model: Transformer
    codec: Codec
    pairs: dict[str, list[Pair]]
    meanings: dict[str, str]
    history: list[dict]


def train_translator(
    model_config: ModelConfig, data: DataConfig, config: TrainConfig, run: RunConfig, kind: type = Transformer
) -> Trained:
    seed_everything(run.seed)
    pairs, unit, meanings = load_pairs(data, run.seed)
    codec = Codec.from_pairs(pairs["train"], unit)
    model = kind(model_config, len(codec.src), len(codec.tgt)).to(pick_device(run.device))
    with locked(run.out):
        return Trained(model, codec, pairs, meanings, fit(model, codec, pairs, config, run, {}))


@functools.cache
def main_translator(config: FiguresConfig, run: RunConfig, seed: int) -> Trained:
    """The main job with the default configuration, as the demo trains it."""
    train = TrainConfig(max_steps=config.main_steps, save_every=min(50, config.main_steps))
    data = DataConfig(n_pairs=config.main_pairs, n_held_out=config.n_held_out)
    return train_translator(ModelConfig(), data, train, replace(run, seed=seed, out=run.out / f"main-{seed}"))


class UnscaledTransformer(Transformer):
    """Embeddings without the factor sqrt(d_model), the rest alike: the positions then drown the words."""

    def embed(self, token_ids: Tensor, token_emb: nn.Embedding, pos_emb: nn.Module, start: int = 0) -> Tensor:
        return self.dropout(pos_emb(token_emb(token_ids), start))  # (batch, seq, d_model)


def without_warmup(step: int, warmup_steps: int) -> float:
    """The peak from the first step on, then the decay of `noam_factor`."""
    return min(1.0, math.sqrt(warmup_steps / step))


N_CHECKED = 200  # held-out pairs of the searches that are slow, and of the alignment
SMALL_MODEL = ModelConfig(n_encoder_layers=1, n_decoder_layers=1)
ABLATIONS: dict[str, dict] = {  # name -> what differs from the small model
    "full": {},
    "embeddings not scaled": {"kind": UnscaledTransformer},
    "no warm-up": {"factor": without_warmup},
    "post-norm": {"model": {"norm_order": "post"}},
    "post-norm, no warm-up": {"model": {"norm_order": "post"}, "factor": without_warmup},
    "no label smoothing": {"train": {"label_smoothing": 0.0}},
    "no positions": {"model": {"positions": "none"}},
    "embeddings not tied": {"model": {"tie_embeddings": False}},
    "half the steps": {"share": 0.5},
}


def small_train_config(n_steps: int) -> TrainConfig:
    return TrainConfig(32, n_steps, max(1, n_steps // 5), max(1, n_steps // 3), save_every=n_steps)


@functools.cache
def small_translator(name: str, config: FiguresConfig, run: RunConfig, seed: int) -> Trained:
    """One entry of ABLATIONS: one layer on each side, fewer pairs and steps, so that parts can show their worth."""
    change = ABLATIONS[name]
    data = DataConfig(n_pairs=config.small_pairs, n_held_out=config.n_held_out)
    n_steps = int(config.small_steps * change.get("share", 1))
    train = replace(small_train_config(n_steps), **change.get("train", {}))
    run = replace(run, seed=seed, out=run.out / f"{name.replace(' ', '-')}-{seed}")
    with mock.patch.object(core, "noam_factor", change.get("factor", noam_factor)):
        model_config = replace(SMALL_MODEL, **change.get("model", {}))
        return train_translator(model_config, data, train, run, change.get("kind", Transformer))


def guessed_alignment(pairs: list[Pair]) -> tuple[float, float]:
    """The score of `alignment_scores` for a uniform guess, and for always pointing at the target's own position."""
    spots = [(len(p.source) + 1, i, sources) for p in pairs for i, sources in enumerate(p.alignment)]
    uniform = sum(len(sources) / n_sources for n_sources, _, sources in spots) / len(spots)
    return uniform, sum(i in sources for _, i, sources in spots) / len(spots)


def crossings(pair: Pair) -> int:
    """Pairs of target words that stand in the other order in the source."""
    first = [min(sources) for sources in pair.alignment]
    return sum(a > b for i, a in enumerate(first) for b in first[i + 1 :])


# Figures


def plot_shift(pair: Pair) -> Figure:
    """What goes in and what is asked for: encoder input, decoder input and answer of one pair, step by step."""
    rows = {
        "encoder reads": ((*pair.source, "<eos>"), "#56B4E9"),
        "decoder reads": (("<bos>", *pair.target), "#E69F00"),
        "decoder must say": ((*pair.target, "<eos>"), "#B8E0D2"),
    }
    width = max(len(words) for words, _ in rows.values())
    figure, axis = plt.subplots(figsize=(1.0 * width + 1.8, 2.6))
    for y, (name, (words, color)) in zip((2.4, 1, 0), rows.items(), strict=True):
        axis.text(-0.65, y, name, ha="right", va="center", weight="bold")
        for x, word in enumerate(words):
            axis.add_patch(plt.Rectangle((x - 0.45, y - 0.28), 0.9, 0.56, fc=color, ec="black", lw=0.8))
            axis.text(x, y, word, ha="center", va="center")
    for x in range(len(pair.target) + 1):
        axis.annotate("", (x, 0.3), (x, 0.7), arrowprops={"arrowstyle": "->"})
        axis.annotate("", (x, 1.3), (x, 1.7), arrowprops={"arrowstyle": "->", "color": "grey"})
    middle = len(pair.target) / 2
    axis.plot([-0.45, len(rows["decoder reads"][0]) - 0.55], [1.7, 1.7], color="grey", lw=1)
    axis.annotate("", (middle, 1.72), (middle, 2.1), arrowprops={"arrowstyle": "-", "color": "grey"})
    axis.text(middle + 0.1, 1.9, "memory: every step may look at every source word", va="center", color="#444444")
    axis.set(xlim=(-2.6, width - 0.4), ylim=(-0.4, 2.8))
    axis.axis("off")
    return figure


def plot_beam(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """Length ratio against beam width, a panel for each case, a line for each entry of SEARCHES."""
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 5), sharex=True, sharey=True)
    for axis, (case, by_search) in zip(axes.flat, curves.items(), strict=True):
        for style, (name, ratios) in zip(("o-", "s-", "v-", "v:"), by_search.items(), strict=True):
            axis.plot(WIDTHS, ratios, style, label=f"length penalty {name}")
        axis.axhline(1, color="black", ls="--", lw=1)
        axis.set(title=case, xscale="log")
        axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens said / tokens due")
    for axis in axes[1]:
        axis.set_xlabel("beam width")
    axes[0, 1].legend(frameon=False, fontsize=8)
    return figure


def plot_length_bias(stop: float, n_words: int, points: dict[str, list[tuple[int, float, bool]]]) -> Figure:
    """Left: the toy model that stops with one probability at every step. Right: what beam search finished, per source.

    points: source -> (tokens, log-probability, whether it is the right answer) of every finished hypothesis.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    lengths = range(31)
    left.semilogy(lengths, [stop * (1 - stop) ** n for n in lengths], "o-", ms=3, label="all texts of this length")
    best = [toy_probability(stop, n_words, n) for n in lengths]
    left.semilogy(lengths, best, "s-", ms=3, label="the likeliest text of this length")
    left.axvline((1 - stop) / stop, color="black", ls="--", lw=1, label=f"mean length {(1 - stop) / stop:.0f}")
    left.set(xlabel="words before <eos>", ylabel="probability", title=f"toy: <eos> has {stop:g} at every step")
    left.set_ylim(max(min(best), 1e-12), 1)
    left.legend(frameon=False, fontsize=8)
    for source, found in points.items():
        color = right.plot([n for n, _, _ in found], [score for _, score, _ in found], "o", ms=3, label=source)[0]
        for n, score, is_right in found:
            if is_right:
                right.plot(n, score, "*", ms=13, color=color.get_color(), mec="black")
    right.set(
        xlabel="tokens, <eos> counted", ylabel="log-probability (nats)", title="finished by 16 beams (star: right)"
    )
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def toy_probability(stop: float, n_words: int, length: int) -> float:
    """Probability of any one text of `length` words, if each step stops with `stop` or says one of n_words alike."""
    return stop * ((1 - stop) / n_words) ** length


# The experiments


@torch.no_grad()
def answers_of_known_length(model: Transformer, codec: Codec, pairs: list[Pair]) -> list[tuple[str, ...]]:
    """Greedy decoding that may not stop: an oracle cuts every answer at the length of its target.

    Newman et al. 2020 (arXiv 2010.07174) use such an oracle to tell a failure to stop from a failure to translate.
    """
    memory, memory_mask = model.eval().encode(batch_tensors(codec, pairs, next(model.parameters()).device)[0])
    caches, ids = model.new_caches(), torch.full_like(memory_mask[:, 0, 0, :1], core.BOS_ID, dtype=torch.long)
    tokens = []
    for _ in range(max(len(pair.target) for pair in pairs)):
        logits = model.decode(ids, memory, memory_mask, caches)[:, -1]  # (batch, vocab)
        logits[:, [core.EOS_ID, core.BOS_ID, core.PAD_ID]] = -math.inf
        ids = logits.argmax(dim=-1, keepdim=True)  # (batch, 1)
        tokens.append(ids)
    rows = torch.cat(tokens, dim=1).tolist()
    return [codec.decode_target(row[: len(pair.target)]) for row, pair in zip(rows, pairs, strict=True)]


def main_job(config: FiguresConfig, run: RunConfig) -> None:
    """Exact match of the main job on every held-out split, its losses, and what it says to longer sources."""
    decode = DecodeConfig()
    table: dict[str, list[list[float]]] = {}
    losses: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    for seed in range(config.n_seeds):
        job = main_translator(config, run, seed)
        for row in evaluate_splits(job.model, job.codec, job.pairs, job.meanings, decode):
            cells = table.setdefault(row["split"], [[], [], []])
            for cell, name in zip(cells, ("greedy", "beam", "remembering"), strict=True):
                cell.append(row[name])
        vocab_size = job.model.tgt_vocab_size
        measured = {
            "first training step": job.history[0]["loss"],
            "chance: ln of the target vocabulary": math.log(vocab_size),
            "training, mean of the last 50 steps": statistics.mean(r["loss"] for r in job.history[-50:]),
            "floor of label smoothing": smoothing_floor(0.1, vocab_size),
            "test, not smoothed": held_out_loss(job.model, job.codec, job.pairs["test"]),
            "longer, not smoothed": held_out_loss(job.model, job.codec, job.pairs["longer"]),
        }
        longer = job.pairs["longer"]
        answers, _ = greedy_answers(job.model, job.codec, longer)
        said = {
            "longest target of training": max(len(pair.target) for pair in job.pairs["train"]),
            "mean target of longer": statistics.mean(len(pair.target) for pair in longer),
            "mean answer": statistics.mean(map(len, answers)),
            "longest answer": max(map(len, answers)),
            "answers shorter than their target (%)": 100
            * sum(len(answer) < len(pair.target) for answer, pair in zip(answers, longer, strict=True))
            / len(longer),
            "exact match, greedy (%)": 100 * exact_match(answers, longer),
            "exact match if the length is given (%)": 100
            * exact_match(answers_of_known_length(job.model, job.codec, longer), longer),
        }
        for store, new in ((losses, measured), (lengths, said)):
            for name, value in new.items():
                store.setdefault(name, []).append(float(value))
    columns = [Column("Held-out split"), *(Column(name, "", ".1%") for name in ("greedy", "beam 4", "remembering"))]
    config.save("main", columns, [[split, *cells] for split, cells in table.items()], "main")
    rows = [[name, values] for name, values in losses.items()]
    config.save("losses", [Column("Loss"), Column("value", "nats per token", ".3f")], rows, "main")
    rows = [[name, values] for name, values in lengths.items()]
    config.save("longer", [Column("On the split longer"), Column("value", "tokens or %", ".1f")], rows, "main")
    job = main_translator(config, run, 0)
    vocab_size = job.model.tgt_vocab_size
    figure = plot_training(job.history, smoothing_floor(0.1, vocab_size), math.log(vocab_size))
    save_figure(figure, config.folder / "training.svg")
    short = next(pair for pair in job.pairs["test"] if crossings(pair) and len(pair.target) <= 6)
    save_figure(plot_shift(short), config.folder / "shift.svg")


def ablations(config: FiguresConfig, run: RunConfig) -> None:
    """Take out one part at a time: exact match and loss on the test split, and the change against the same seed."""
    rows, full = [], []
    for name in progress(ABLATIONS, "ablations"):
        match, loss = [], []
        for seed in range(config.n_seeds):
            job = small_translator(name, config, run, seed)
            test = job.pairs["test"]
            match.append(100 * exact_match(greedy_answers(job.model, job.codec, test)[0], test))
            loss.append(held_out_loss(job.model, job.codec, test))
        full = full or match
        rows.append([name, match, [new - old for new, old in zip(match, full, strict=True)], loss])
    columns = [
        Column("Small model"),
        Column("exact match", "%", ".1f"),
        Column("change, seed by seed", "points", ".1f"),
        Column("loss, not smoothed", "nats per token", ".3f"),
    ]
    rows[0][2] = "-"
    config.save("ablations", columns, rows, "ablations")


WIDTHS = (1, 2, 4, 8, 16)
SEARCHES = {"0": (0.0, False), "0.6": (0.6, False), "1": (1.0, False), "1, early stop": (1.0, True)}  # penalty, early


def beams(config: FiguresConfig, run: RunConfig) -> None:
    """Beam width against length penalty, for models more and less sure, on test and on longer sources."""
    cases = {
        "half-trained": (functools.partial(small_translator, "half the steps"), "test"),
        "undertrained": (functools.partial(small_translator, "full"), "test"),
        "trained": (main_translator, "test"),
        "longer": (main_translator, "longer"),
    }
    certain = [name for name, (_, early_stop) in SEARCHES.items() if not early_stop]
    columns = [Column("Beam width"), *(Column(f"exact, {name}", "", ".1%") for name in certain)]
    columns += [Column(f"length ratio, {name}", "", ".2f") for name in SEARCHES]
    curves, errors = {}, []
    for case, (translator, split) in cases.items():
        jobs = [translator(config, run, seed) for seed in range(config.n_seeds)]
        pairs = [job.pairs[split][:N_CHECKED] for job in jobs]
        match, ratio, likeliest = {}, {}, {}
        for name, (penalty, early_stop) in SEARCHES.items():
            for width in progress(WIDTHS, f"beams, {case}, penalty {name}"):
                decode = DecodeConfig(width, penalty, early_stop=early_stop)
                said = [beam_answers(job.model, job.codec, p, decode) for job, p in zip(jobs, pairs, strict=True)]
                match[name, width] = [exact_match(a, p) for a, p in zip(said, pairs, strict=True)]
                ratio[name, width] = [length_ratio(a, p) for a, p in zip(said, pairs, strict=True)]
                if penalty == 0:
                    likeliest[width] = said
        rows = [
            [str(width), *(match[name, width] for name in certain), *(ratio[name, width] for name in SEARCHES)]
            for width in WIDTHS
        ]
        config.save(f"beam-{case}", columns, rows, "beams")
        curves[case] = {name: [statistics.mean(ratio[name, width]) for width in WIDTHS] for name in SEARCHES}
        errors += [[case, str(width), *search_errors(jobs, pairs, likeliest[width])] for width in WIDTHS[::2]]
    columns = [Column("Case"), Column("width"), Column("mean log-probability of the answer", "nats", ".2f")]
    columns += [Column("search errors", "", ".1%"), Column("model errors", "", ".1%")]
    config.save("search-errors", columns, errors, "beams")
    save_figure(plot_beam(curves), config.folder / "beam.svg")
    job = small_translator("full", config, run, 0)
    save_figure(plot_length_bias(0.1, 3, finished_hypotheses(job, 3)), config.folder / "length_bias.svg")


def search_errors(
    jobs: list[Trained], pairs: list[list[Pair]], answers: list[list[tuple[str, ...]]]
) -> tuple[list[float], list[float], list[float]]:
    """Per seed: mean log-probability of the answers; share where the target is likelier than the answer (the search
    missed it); share where a wrong answer is at least as likely as the target (the model is to blame)."""
    columns: tuple[list[float], list[float], list[float]] = ([], [], [])
    for job, group, said in zip(jobs, pairs, answers, strict=True):
        ours = answer_log_probs(job.model, job.codec, group, said)
        targets = answer_log_probs(job.model, job.codec, group, [pair.target for pair in group])
        wrong = [answer != pair.target for answer, pair in zip(said, group, strict=True)]
        missed = [w and t > o for w, t, o in zip(wrong, targets, ours, strict=True)]
        columns[0].append(statistics.mean(ours))
        columns[1].append(statistics.mean(missed))
        columns[2].append(statistics.mean(w and not m for w, m in zip(wrong, missed, strict=True)))
    return columns


def finished_hypotheses(job: Trained, n_sources: int) -> dict[str, list[tuple[int, float, bool]]]:
    """What the widest beam finishes without a penalty for the first test sources that greedy decoding gets wrong."""
    answers, _ = greedy_answers(job.model, job.codec, job.pairs["test"][:N_CHECKED])
    wrong = [p for a, p in zip(answers, job.pairs["test"], strict=False) if a != p.target][:n_sources]
    found = {}
    for pair in wrong:
        src_ids = job.codec.encode_sources([pair.source]).to(next(job.model.parameters()).device)
        best = beam_translate(job.model.eval(), src_ids, DecodeConfig(WIDTHS[-1], 0.0, early_stop=False), n_best=None)[
            0
        ]
        found[join_tokens(pair.source, job.codec.unit)] = [
            (len(h.tokens), h.score, job.codec.decode_target(list(h.tokens)) == pair.target) for h in best
        ]
    return found


def alignments(config: FiguresConfig, run: RunConfig) -> None:
    """Cross-attention against the known alignment; the head is chosen on training pairs, not on the test pairs."""
    names = ("head chosen on training pairs", "mean of all heads", "own position", "uniform guess")
    columns: dict[str, list[list[float]]] = {split: [[] for _ in names] for split in ("test", "longer")}
    for seed in range(config.n_seeds):
        job = main_translator(config, run, seed)
        scores = alignment_scores(job.model, job.codec, job.pairs["train"][:N_CHECKED])
        n_heads = scores.shape[1]
        layer, head = divmod(scores.argmax().item(), n_heads)
        for split, cells in columns.items():
            pairs = job.pairs[split][:N_CHECKED]
            held_out = alignment_scores(job.model, job.codec, pairs)
            uniform, diagonal = guessed_alignment(pairs)
            values = (held_out[layer, head].item(), held_out.mean().item(), diagonal, uniform)
            for cell, value in zip(cells, values, strict=True):
                cell.append(value)
        if seed == 0:
            short = [pair for pair in job.pairs["test"] if len(pair.target) <= 10]
            pair = max(short, key=crossings)
            src_ids, tgt_ids, _ = batch_tensors(job.codec, [pair], next(job.model.parameters()).device)
            maps = attention_maps(job.model, src_ids, tgt_ids)[f"decoder.blocks.{layer}.cross_attn"][0]
            worst = scores[layer].argmin().item()
            titles = tuple(f"layer {layer + 1}, head {h + 1}" for h in (head, worst))
            words = ((*pair.source, "<eos>"), (*pair.target, "<eos>"))
            figure = plot_alignment(maps[[head, worst]], *words, pair.alignment, titles)
            save_figure(figure, config.folder / "alignment.svg")
    rows = [[name, *(columns[split][index] for split in columns)] for index, name in enumerate(names)]
    heads = [Column("Largest weight on a true source word"), *(Column(split, "", ".1%") for split in columns)]
    config.save("alignment", heads, rows, "alignments")


def ladder(config: FiguresConfig, run: RunConfig) -> None:
    """Ten planted bugs: what each check measures, and what training with the bug leads to."""
    findings = find_all(64, run)
    save_figure(plot_ladder(findings), config.folder / "ladder.svg")
    columns = [
        Column("`--break`"),
        Column("Check that finds it"),
        Column("sound", "", ".3g"),
        Column("broken", "", ".3g"),
    ]
    config.save("breaks", columns, symptoms(findings), "ladder", n_seeds=1)
    rows = [[name, *train_with(name, config, run)] for name in progress(("none", *BUGS), "training with a bug")]
    columns = [Column("Trained and scored with"), Column("last training loss", "nats per token", ".2f")]
    columns += [Column("greedy", "", ".1%"), Column("beam 4", "", ".1%")]
    config.save("outcomes", columns, rows, "ladder", n_seeds=1)


def train_with(bug: str, config: FiguresConfig, run: RunConfig) -> tuple[float, float, float]:
    """Train the small model with a bug: mean of its last 20 losses, exact match of greedy and of beam decoding."""
    data = DataConfig(n_pairs=config.small_pairs, n_held_out=config.n_held_out)
    with planted(bug):
        run = replace(run, out=run.out / f"bug-{bug}")
        job = train_translator(SMALL_MODEL, data, small_train_config(config.small_steps), run)
        test = job.pairs["test"][:N_CHECKED]
        greedy, _ = core.greedy_answers(job.model, job.codec, test)
        beam = core.beam_answers(job.model, job.codec, test, DecodeConfig())
    last = statistics.mean(record["loss"] for record in job.history[-20:])
    return last, exact_match(greedy, test), exact_match(beam, test)


def speed(config: FiguresConfig, run: RunConfig) -> None:
    """Our training step beside nn.Transformer's, and decoding with and without cached keys and values."""
    rows = [[name, ratio] for name, ratio in measure_speed(ModelConfig(), run).items()]
    config.save("speed", [Column("Compared"), Column("ratio")], rows, "speed", n_seeds=1)


EXPERIMENTS: dict[str, tuple[Callable[[FiguresConfig, RunConfig], None], int]] = {  # name -> function, seconds
    "main": (main_job, 120),
    "ablations": (ablations, 90),
    "beams": (beams, 150),
    "alignments": (alignments, 5),
    "ladder": (ladder, 110),
    "speed": (speed, 10),
}


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the chapter's experiments; write their figures, results.json and the chapter's tables."""
    run_experiments(EXPERIMENTS, config.only, config.folder, config, run)
    main_translator.cache_clear()
    small_translator.cache_clear()
