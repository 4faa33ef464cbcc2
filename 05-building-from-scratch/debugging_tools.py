"""Topic 05 - Debugging Tools: twelve checks for a Transformer that does not learn, and ten planted bugs to find.

python 05-building-from-scratch/debugging_tools.py                      # the ladder: every check against every bug
python 05-building-from-scratch/debugging_tools.py checkup              # examine a sound model
python 05-building-from-scratch/debugging_tools.py checkup --break no-shift

A bug in a Transformer seldom raises an error: shapes fit, the loss falls, and the translations are wrong. Each check
measures one number with a known right value.
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from typing import Literal
from unittest import mock

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import building_from_scratch as core
from building_from_scratch import (
    IGNORE,
    PAD_ID,
    Codec,
    DataConfig,
    DecodeConfig,
    ModelConfig,
    Transformer,
    batch_tensors,
    beam_answers,
    exact_match,
    load_pairs,
    pad,
    watched,
)
from sequence_modeling import EOS_ID
from transformer_architecture import FeedForward, KeyValueCache, NoPositions
from translation_pairs import Pair
from workbench import RunConfig, announce, check_range, pick_device, progress, run_verbs, save_figure, seed_everything

Batch = tuple[Tensor, Tensor, Tensor]  # source ids, decoder input, answers


# The tools


def loss_at_init(model: Transformer, batch: Batch) -> tuple[float, float]:
    """The untrained model's loss and ln(vocabulary), in nats per token: far apart means a wrong scale or a leak."""
    src_ids, tgt_ids, answers = batch
    with torch.no_grad():
        loss = core.smoothed_cross_entropy(model.eval()(src_ids, tgt_ids), answers)
    return loss.item(), math.log(model.tgt_vocab_size)


def overfit_one_batch(
    model: Transformer, batch: Batch, max_steps: int = 200, learning_rate: float = 1e-3
) -> list[float]:
    """Train on the same batch again and again; a sound model brings the loss (nats per token) near 0."""
    src_ids, tgt_ids, answers = batch
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=learning_rate), []
    model.train()
    for _ in range(max_steps):
        loss = core.smoothed_cross_entropy(model(src_ids, tgt_ids), answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradient_report(model: Transformer, batch: Batch) -> list[tuple[str, float, float]]:
    """Name, gradient norm and weight norm of every parameter after one backward pass; 0 marks what never learns."""
    src_ids, tgt_ids, answers = batch
    model.zero_grad(set_to_none=True)
    core.smoothed_cross_entropy(model(src_ids, tgt_ids), answers).backward()
    rows = []
    for name, parameter in model.named_parameters():
        grad_norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        rows.append((name, grad_norm, parameter.norm().item()))
    model.zero_grad(set_to_none=True)
    return rows


@torch.no_grad()
def first_non_finite(model: Transformer, batch: Batch) -> str | None:
    """Name of the first module, in order of computation, whose output holds NaN or infinity; None if all is finite."""
    found: list[str] = []

    def see(name: str, _: nn.Module, inputs: tuple, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(torch.isfinite(tensor).all() for tensor in tensors if isinstance(tensor, Tensor)):
            found.append(name)

    with watched(model, nn.Module, see):
        model(*batch[:2])
    return found[0] if found else None


@torch.no_grad()
def dead_units(model: Transformer, batch: Batch) -> dict[str, float]:
    """Share of hidden units of each feed-forward network that are 0 at every real position of the batch, 0..1."""
    shares: dict[str, float] = {}

    def see(name: str, module: FeedForward, inputs: tuple, _: object) -> None:
        is_real = (batch[0] if name.startswith("encoder") else batch[1]) != PAD_ID
        hidden = F.relu(module.up_proj(inputs[0]))[is_real]  # (tokens, d_ff)
        shares[name] = (hidden == 0).all(dim=0).float().mean().item()

    with watched(model.eval(), FeedForward, see):
        model(*batch[:2])
    return shares


# The checks: one number each, with a known right value


@dataclass(frozen=True)
class Finding:
    """What a check measured, and whether that is right."""

    value: float
    right: bool


def check_loss_at_init(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """An untrained model guesses: its loss is at or a little above ln(vocabulary); the value is the excess, in nats."""
    loss, chance = loss_at_init(model, batch_of(model, codec, pairs))
    return Finding(loss - chance, -0.2 < loss - chance < 1.5)  # tied models of width 32 and 64 start 0.4 to 1.1 above


def check_gradients(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """Every parameter gets a gradient; the value is the share that gets none."""
    report = gradient_report(model, batch_of(model, codec, pairs))
    silent = sum(grad_norm == 0 for _, grad_norm, _ in report) / len(report)
    return Finding(silent, silent == 0)


@torch.no_grad()
def check_future(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """A later target token changes no earlier prediction; the value is the largest change, in logits."""
    src_ids, tgt_ids, answers = batch_of(model, codec, [pair for pair in pairs if len(pair.target) > 2])
    before = model.eval()(src_ids, tgt_ids)
    changed = tgt_ids.clone()
    changed[:, 2] = torch.where(tgt_ids[:, 2] == EOS_ID + 2, EOS_ID + 3, EOS_ID + 2)
    change = (model(src_ids, changed) - before)[:, :2].abs().max().item()
    return Finding(change, change == 0)


@torch.no_grad()
def check_answer_hidden(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """The decoder's input never holds the token that it is asked for; the value is the share of positions that do."""
    _, tgt_ids, answers = batch_of(model, codec, pairs)
    shown = (tgt_ids == answers)[answers != IGNORE].float().mean().item()
    return Finding(shown, shown < 0.05)  # a word may follow itself by chance


@torch.no_grad()
def check_padding(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """A pair has the same logits alone and padded in a batch; the value is the largest difference."""
    short = min(pairs, key=lambda pair: len(pair.source))
    together, alone = (batch_of(model, codec, group) for group in ([short, *pairs[:4]], [short]))
    padded, plain = (model.eval()(*batch[:2])[:1, : alone[1].shape[1]] for batch in (together, alone))
    difference = (padded - plain).abs().max().item()
    return Finding(difference, difference < 1e-4)


@torch.no_grad()
def check_loss_mean(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """The loss of a batch is the mean over its real tokens; the value is the difference from adding them up singly."""
    chosen = sorted(pairs, key=lambda pair: len(pair.target))[:: max(1, len(pairs) // 4)]
    singles = [batch_of(model.eval(), codec, [pair]) for pair in chosen]
    counts = [len(pair.target) + 1 for pair in chosen]
    losses = [core.smoothed_cross_entropy(model(*batch[:2]), batch[2]).item() for batch in singles]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    src_ids, tgt_ids, answers = batch_of(model, codec, chosen)
    difference = core.smoothed_cross_entropy(model(src_ids, tgt_ids), answers).item() - expected
    return Finding(difference, abs(difference) < 1e-3)


@torch.no_grad()
def check_order(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """The same source words in another order give other predictions; the value is the change, in logits."""
    pair = max(pairs, key=lambda pair: len(pair.source))
    backwards = Pair(tuple(reversed(pair.source)), pair.target)
    logits = [model.eval()(*batch_of(model, codec, [each])[:2]) for each in (pair, backwards)]
    change = (logits[0] - logits[1]).abs().max().item()
    return Finding(change, change > 1e-3)


def check_loss_floor(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """The smoothed loss of the smoothed target itself is its entropy; the value is the excess, in nats."""
    smoothing, vocab_size = 0.1, model.tgt_vocab_size
    target = torch.full((1, vocab_size), smoothing / vocab_size, dtype=torch.float64)
    target[0, EOS_ID] += 1 - smoothing
    loss = core.smoothed_cross_entropy(target.log(), torch.tensor([EOS_ID]), smoothing).item()
    excess = loss - core.smoothing_floor(smoothing, vocab_size)
    return Finding(excess, abs(excess) < 1e-9)


def check_schedule(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """Within twice the warm-up the learning rate reaches its peak; the value is the highest share of it."""
    highest = max(core.noam_factor(step, 50) for step in range(1, 101))
    return Finding(highest, abs(highest - 1) < 1e-9)


def check_one_batch(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """A sound model learns 16 pairs by heart; the value is the loss after 150 steps, in nats per token."""
    losses = overfit_one_batch(model, batch_of(model, codec, pairs[:16]), max_steps=150, learning_rate=5e-3)
    return Finding(losses[-1], losses[-1] < 0.1)


def check_decoding(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """What was learnt by heart is also said: exact match of greedy decoding on the 16 pairs of check_one_batch."""
    answers, _ = core.greedy_answers(model, codec, pairs[:16])
    share = exact_match(answers, pairs[:16])
    return Finding(share, share == 1)


def check_beam(model: Transformer, codec: Codec, pairs: list[Pair]) -> Finding:
    """Beam search gives a pair the same answer alone and in a batch; the value is the share that agrees."""
    config = DecodeConfig(n_beams=3, max_new_tokens=12)
    together = beam_answers(model, codec, pairs[:8], config)
    alone = [beam_answers(model, codec, [pair], config)[0] for pair in pairs[:8]]
    share = sum(a == b for a, b in zip(together, alone, strict=True)) / 8
    return Finding(share, share == 1)


CHECKS: dict[str, Callable[[Transformer, Codec, list[Pair]], Finding]] = {
    "loss at init": check_loss_at_init,
    "gradients": check_gradients,
    "answer hidden": check_answer_hidden,
    "future hidden": check_future,
    "padding": check_padding,
    "loss mean": check_loss_mean,
    "order": check_order,
    "loss floor": check_loss_floor,
    "schedule": check_schedule,
    "one batch": check_one_batch,  # trains the model; the two below look at what it learnt
    "decoding": check_decoding,
    "beam": check_beam,
}


def batch_of(model: Transformer, codec: Codec, pairs: list[Pair]) -> Batch:
    return batch_tensors(codec, pairs, next(model.parameters()).device)


def checkup_model(config: ModelConfig, codec: Codec, pairs: list[Pair], seed: int, device: torch.device) -> dict:
    """Build a model and run every check on it; returns check -> Finding. Needs at least 16 pairs."""
    torch.manual_seed(seed)
    model = Transformer(config, len(codec.src), len(codec.tgt)).to(device)
    return {name: check(model, codec, pairs) for name, check in CHECKS.items()}


# The bugs: each is a plausible slip, planted while a block runs


NO_POSITIONS = dict.fromkeys(core.POSITIONS, NoPositions)


def without_shift(self: Codec, targets: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
    answers = pad([[*self.tgt.encode(target), EOS_ID] for target in targets], IGNORE)
    return answers.masked_fill(answers == IGNORE, PAD_ID), answers


def with_padding_in_the_loss(self: Codec, targets: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
    tgt_ids, answers = SOUND_TARGETS(self, targets)
    return tgt_ids, answers.masked_fill(answers == IGNORE, PAD_ID)


def with_detached_memory(self: Transformer, src_ids: Tensor) -> tuple[Tensor, Tensor]:
    memory, memory_mask = SOUND_ENCODE(self, src_ids)
    return memory.detach(), memory_mask


def with_too_much_mass(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The right token keeps its whole weight, so the target sums to 1 + label_smoothing."""
    uniform = -logits.log_softmax(dim=-1).mean(dim=-1)[targets != IGNORE].mean()
    return SOUND_LOSS(logits, targets) + label_smoothing * uniform


def with_mixed_rows(model: Transformer, src_ids: Tensor, config: DecodeConfig) -> list[list[core.Hypothesis]]:
    """Beam numbers are taken for row numbers: every item of the batch goes on from the hypotheses of the first."""
    mixed = partialmethod(lambda cache, rows: SOUND_SELECT(cache, rows % config.n_beams))
    with mock.patch.object(KeyValueCache, "select", mixed):
        return SOUND_BEAM(model, src_ids, config)


SOUND_TARGETS, SOUND_ENCODE, SOUND_LOSS = Codec.encode_targets, Transformer.encode, core.smoothed_cross_entropy
SOUND_NOAM, SOUND_PADDING, SOUND_CAUSAL = core.noam_factor, core.padding_mask, core.causal_mask
SOUND_BEAM, SOUND_SELECT = core.beam_translate, KeyValueCache.select
BUGS: dict[str, tuple[str, object, str, Callable]] = {  # name -> what is wrong, and what replaces which attribute
    "no-shift": ("the decoder reads the token that it is asked for", Codec, "encode_targets", without_shift),
    "future-visible": (
        "the causal mask lets everything through",
        core,
        "causal_mask",
        lambda *sizes, **where: torch.ones_like(SOUND_CAUSAL(*sizes, **where)),
    ),
    "inverted-padding": (
        "the padding mask keeps the padding and hides the words",
        core,
        "padding_mask",
        lambda ids, pad_id: ~SOUND_PADDING(ids, pad_id),
    ),
    "padding-in-loss": ("padded positions count as targets", Codec, "encode_targets", with_padding_in_the_loss),
    "no-positions": ("words are embedded without their positions", core, "POSITIONS", NO_POSITIONS),
    "detached-memory": ("the encoder gets no gradient", Transformer, "encode", with_detached_memory),
    "no-zero-grad": (
        "gradients of all steps add up",
        torch.optim.Adam,
        "zero_grad",
        lambda self, set_to_none=True: None,
    ),
    "schedule-per-epoch": (
        "the learning rate is stepped once per epoch",
        core,
        "noam_factor",
        lambda step, warmup_steps: SOUND_NOAM(1 + step // 300, warmup_steps),
    ),
    "too-much-mass": ("the smoothed target sums to more than 1", core, "smoothed_cross_entropy", with_too_much_mass),
    "mixed-beams": ("beams go on from hypotheses of another sentence", core, "beam_translate", with_mixed_rows),
}
BugName = Literal["none", *BUGS]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant one bug while the block runs; "none" plants nothing. Raises ValueError for an unknown name."""
    if name not in ("none", *BUGS):
        raise ValueError(f"unknown bug {name!r}; choose none, {', '.join(BUGS)}")
    if name == "none":
        yield
        return
    _, owner, attribute, replacement = BUGS[name]
    with mock.patch.object(owner, attribute, replacement):
        yield


# The figure


def plot_ladder(findings: dict[str, dict[str, Finding]]) -> Figure:
    """One row for each bug, one column for each check: dark where the check is violated; ~0 is below 1e-4."""
    table = [[0.0 if finding.right else 1.0 for finding in row.values()] for row in findings.values()]
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(table) + 1.8))
    axis.imshow(table, cmap="Greys", vmin=0, vmax=1.3, aspect="auto")
    axis.set_xticks(range(len(CHECKS)), list(CHECKS), rotation=40, ha="right")
    axis.set_yticks(range(len(findings)), list(findings))
    for y, row in enumerate(findings.values()):
        for x, finding in enumerate(row.values()):
            value = "~0" if 0 < abs(finding.value) < 1e-4 else f"{finding.value:.2g}"
            axis.text(x, y, value, ha="center", va="center", color="black" if finding.right else "white")
    axis.set(xlabel="check (dark: violated)", ylabel="planted bug")
    return figure


# The verbs


@dataclass(frozen=True)
class LadderConfig:
    n_checked: int = 64  # pairs that the checks may use, at least 16

    def __post_init__(self) -> None:
        check_range(self, "n_checked", least=16)


@dataclass(frozen=True)
class BreakConfig:
    break_: BugName = "none"  # the bug to plant


SMALL = ModelConfig(d_model=32, d_ff=64, n_encoder_layers=1, n_decoder_layers=1)


def data_for_checks(n_checked: int, seed: int) -> tuple[Codec, list[Pair]]:
    pairs, unit, _ = load_pairs(DataConfig(n_pairs=max(n_checked, 400), n_held_out=20), seed)
    return Codec.from_pairs(pairs["train"], unit), pairs["train"][:n_checked]


def find_all(n_checked: int, run: RunConfig) -> dict[str, dict[str, Finding]]:
    codec, pairs = data_for_checks(n_checked, run.seed)
    findings = {}
    for name in progress(("none", *BUGS), "bugs"):
        seed_everything(run.seed)
        with planted(name):
            findings[name] = checkup_model(SMALL, codec, pairs, run.seed, pick_device(run.device))
    return findings


def symptoms(findings: dict[str, dict[str, Finding]]) -> list[list]:
    """For each bug: every check that finds it, with the sound value beside the broken one."""
    return [
        [name, check, findings["none"][check].value, finding.value]
        for name, row in findings.items()
        for check, finding in row.items()
        if not finding.right
    ]


def demo(config: LadderConfig, run: RunConfig) -> None:
    """Plant ten bugs, one at a time, and show which check finds which."""
    announce(f"{len(CHECKS)} checks on a sound model and on {len(BUGS)} broken ones", 35)
    findings = find_all(config.n_checked, run)
    for name, row in findings.items():
        found_by = [f"{check} ({finding.value:.2g})" for check, finding in row.items() if not finding.right]
        print(f"{name:20} {', '.join(found_by) or 'every check holds'}")
    save_figure(plot_ladder(findings), run.out / "ladder.svg")


def checkup(config: LadderConfig, bug: BreakConfig, run: RunConfig) -> None:
    """Run every check on an untrained model, with a planted bug beside the sound one, and say what is right."""
    codec, pairs = data_for_checks(config.n_checked, run.seed)
    findings = {}
    for name in dict.fromkeys(("none", bug.break_)):
        with planted(name):
            findings[name] = checkup_model(SMALL, codec, pairs, run.seed, pick_device(run.device))
    if bug.break_ != "none":
        print(f"planted: {BUGS[bug.break_][0]}")
    print(f"     {'check':14} {'sound':>9}" + (f" {bug.break_:>18}" if bug.break_ != "none" else ""))
    for name, finding in findings[bug.break_].items():
        broken = f" {finding.value:18.3g}" if bug.break_ != "none" else ""
        verdict = "ok  " if finding.right else "FAIL"
        print(f"{verdict} {name:14} {findings['none'][name].value:9.3g}{broken}   {CHECKS[name].__doc__}")


def main(argv: list[str] | None = None) -> None:
    verbs = {"demo": (demo, LadderConfig, RunConfig), "checkup": (checkup, LadderConfig, BreakConfig, RunConfig)}
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
