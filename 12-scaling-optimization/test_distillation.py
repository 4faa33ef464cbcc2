"""Proofs of distillation: TRL's divergence, the gradient at high temperature, and a student that gets there sooner."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import distillation
from distillation import (
    MODES,
    DistillConfig,
    FeatureMatch,
    StudentConfig,
    Teacher,
    distill,
    distilled,
    generalised_jsd,
    soft_cross_entropy,
    step_flops,
    student_training,
)
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from training_transformers import TrainConfig
from workbench import RunConfig, seed_everything

TEACHER = ModelConfig(vocab_size=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=40, max_seq_len=64)
STUDENT = ModelConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, max_seq_len=64)
SHORT = TrainConfig(max_steps=60, batch_size=4, seq_len=12, learning_rate=1e-2, warmup_steps=0, log_every=100)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair() -> tuple[CausalLM, CausalLM]:
    seed_everything(0)
    teacher = CausalLM(TEACHER).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return CausalLM(STUDENT), teacher


def batches(step: int) -> dict[str, torch.Tensor]:
    rows = torch.randint(2, 40, (4, 13), generator=torch.Generator().manual_seed(step))
    return {"inputs": rows[:, :-1].clone(), "targets": rows[:, 1:].clone()}


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_generalised_jsd_equals_trl(parity, beta, temperature) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = randn(2, 5, 11), randn(2, 5, 11, seed=1)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, 5, 6, 7]])
    grads = []
    for ours in (True, False):
        x = student.clone().requires_grad_()
        if ours:
            counted = labels != -100
            loss = generalised_jsd(x[counted], teacher[counted], beta, temperature).mean()
        else:
            loss = GKDTrainer.generalized_jsd_loss(x, teacher, labels, beta, temperature)
        loss.backward()
        grads.append((loss.detach(), x.grad))
    parity(f"generalised_jsd, beta {beta}", "TRL GKDTrainer", "output", grads[0][0], grads[1][0], 1e-10)
    parity(f"generalised_jsd, beta {beta}", "TRL GKDTrainer", "gradient", grads[0][1], grads[1][1], 1e-10)


def test_soft_cross_entropy_equals_torch(parity) -> None:
    student, teacher = randn(3, 11), randn(3, 11, seed=1)
    ours = soft_cross_entropy(student, teacher, 3.0).sum()
    wanted = F.log_softmax(teacher / 3, -1)
    theirs = 9 * F.kl_div(F.log_softmax(student / 3, -1), wanted, reduction="sum", log_target=True)
    parity("soft_cross_entropy", "F.kl_div", "output", ours, theirs, 1e-10)


def test_gradient_at_high_temperature_is_the_difference_of_centred_logits() -> None:
    """The error falls with 1 / T: the chapter's derivation, checked at three temperatures."""
    student, teacher = randn(7, 13).requires_grad_(), randn(7, 13, seed=1)
    expected = (student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)).detach() / 13
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        (grad,) = torch.autograd.grad(soft_cross_entropy(student, teacher, temperature).sum(), student)
        errors.append((grad - expected).abs().max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 8 and errors[2] < errors[1] / 8


def test_without_the_square_the_gradient_vanishes() -> None:
    student, teacher = randn(7, 13).requires_grad_(), randn(7, 13, seed=1)
    sizes = [
        torch.autograd.grad(soft_cross_entropy(student, teacher, t).sum(), student)[0].norm().item() for t in (1, 8, 64)
    ]
    assert max(sizes) / min(sizes) < 4
    plain = [
        torch.autograd.grad(soft_cross_entropy(student, teacher, t).sum() / t**2, student)[0].norm() for t in (1, 64)
    ]
    assert plain[0] / plain[1] > 1000


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_what_the_teacher_never_says_adds_nothing(beta, parity) -> None:
    """Banned tokens have the logit -inf: 0 log 0 is 0, and the student learns to avoid them. torch's entr agrees."""
    student, teacher = randn(3, 7).requires_grad_(), randn(3, 7, seed=1)
    teacher[:, 2] = -math.inf
    p, q = teacher.softmax(-1), student.softmax(-1)
    middle = q if beta == 0 else beta * p + (1 - beta) * q
    wanted = -(torch.special.entr(p) + torch.xlogy(p, middle)).sum(-1)
    if beta:
        wanted = beta * wanted - (1 - beta) * (torch.special.entr(q) + q * middle.log()).sum(-1)
    found = generalised_jsd(student, teacher, beta)
    parity(f"generalised_jsd, beta {beta}, banned tokens", "entr and xlogy", "output", found, wanted, 1e-10)
    ours, theirs = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, wanted))
    parity(f"generalised_jsd, beta {beta}, banned tokens", "entr and xlogy", "gradient", ours, theirs, 1e-10)
    assert torch.isfinite(soft_cross_entropy(student, teacher, 2.0)).all()


def test_feature_match_is_the_mean_squared_error_of_a_map(parity) -> None:
    match = FeatureMatch(5, 9).double()
    student, teacher = randn(2, 3, 5).requires_grad_(), randn(2, 3, 9, seed=1)
    theirs = F.mse_loss(torch.einsum("bsi,oi->bso", student, match.map.weight), teacher, reduction="none").mean(-1)
    parity("FeatureMatch", "einsum and F.mse_loss", "output", match(student, teacher), theirs, 1e-10)
    inputs = (student, match.map.weight)
    for got, want in zip(
        *(torch.autograd.grad(x.sum(), inputs) for x in (match(student, teacher), theirs)), strict=True
    ):
        parity("FeatureMatch", "einsum and F.mse_loss", "gradient", got, want, 1e-10)


@pytest.mark.parametrize("bos_id", [1, 3])
def test_a_text_counts_up_to_its_end_whether_or_not_it_begins_with_one(bos_id, monkeypatch) -> None:
    """Ends are id 1 and, as in a chat, 5; the first id is one of them or is not."""
    student, teacher = pair()
    student.config = replace(STUDENT, bos_id=bos_id, eos_id=1, more_eos_ids=(5,))
    written = torch.tensor([[7, 8, 1, 0, 0], [9, 5, 0, 0, 0], [6, 7, 8, 9, 6]])
    monkeypatch.setattr(student, "generate", lambda *args, **kwargs: written)
    config = DistillConfig("on-policy", n_rollout_tokens=5, distill_beta=0.4, distill_temperature=2.0)
    loss, count = Teacher(teacher, config).own_text(student, 3)
    assert count == 3 + 2 + 5
    inputs = torch.cat([torch.full((3, 1), bos_id), written[:, :-1]], dim=1)
    losses = generalised_jsd(student(inputs), teacher(inputs), 0.4, 2.0)
    assert loss.item() == pytest.approx((losses[0, :3].sum() + losses[1, :2].sum() + losses[2].sum()).item(), rel=1e-5)


def test_divergences_are_zero_for_the_same_distribution_and_bounded() -> None:
    x, y = randn(5, 9), randn(5, 9, seed=1)
    for beta in (0, 0.2, 0.5, 1):
        assert generalised_jsd(x, x + 3, beta).abs().max() < 1e-12
        assert (generalised_jsd(x, y, beta) > 0).all()
    far = 50 * F.one_hot(torch.arange(5), 9).double()
    assert generalised_jsd(far, far.roll(1, -1), 0.5).max() <= math.log(2) + 1e-9


def test_teacher_is_frozen_and_never_in_training_mode() -> None:
    student, teacher = pair()
    loss_fn = Teacher(teacher, DistillConfig())
    loss_fn.train()
    assert not loss_fn.model.training and not any(p.requires_grad for p in teacher.parameters())
    before = [parameter.clone() for parameter in teacher.parameters()]
    distilled(student, teacher, batches, DistillConfig(), SHORT)
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.parameters(), strict=True))


def test_loss_mixes_teacher_and_data(parity) -> None:
    student, teacher = pair()
    batch = batches(0)
    batch["targets"][0, :5] = -100
    counted = batch["targets"] != -100
    with torch.no_grad():
        loss, count = Teacher(teacher, DistillConfig(distill_temperature=2.0, distill_weight=0.7))(student, batch)
        logits, wanted = student(batch["inputs"])[counted], teacher(batch["inputs"])[counted]
        soft = soft_cross_entropy(logits, wanted, 2.0).sum()
        hard = F.cross_entropy(logits, batch["targets"][counted], reduction="sum")
        match = FeatureMatch(16, 24)
        both, _ = Teacher(teacher, DistillConfig("features", 2.0, 0.7, 0.2), match)(student, batch)
        apart = match(student.hidden(batch["inputs"]), teacher.hidden(batch["inputs"]))[counted].sum()
    parity("Teacher", "both losses apart", "output", loss, 0.7 * soft + 0.3 * hard, 1e-4)
    parity("Teacher, features", "the losses apart", "output", both, loss + 0.2 * apart, 1e-4)
    assert count == counted.sum() == 43


def test_documents_in_a_row_do_not_see_each_other() -> None:
    student, teacher = pair()
    batch = batches(0)
    batch["document_ids"] = torch.ones_like(batch["inputs"])
    batch["document_ids"][:, 6:] = 2
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["inputs"][:, :6] = 7
    later = batch["document_ids"] == 2
    losses = []
    for each in (batch, other):
        each["targets"] = each["targets"].masked_fill(~later, -100)
        with torch.no_grad():
            losses.append(Teacher(teacher, DistillConfig())(student, each)[0])
    assert torch.allclose(losses[0], losses[1], atol=1e-4)


def test_on_its_own_text_the_student_is_judged_up_to_its_first_end() -> None:
    student, teacher = pair()
    loss_fn = Teacher(teacher, DistillConfig("on-policy", on_policy_share=1.0, n_rollout_tokens=9))
    loss, count = loss_fn(student, batches(0))
    assert 4 <= count <= 36 and loss > 0 and student.training
    loss.backward()
    assert student.token_emb.weight.grad.abs().sum() > 0
    half = Teacher(teacher, DistillConfig("on-policy", on_policy_share=0.5, n_rollout_tokens=2))
    counts = [int(half(student, batches(step))[1]) for step in range(6)]
    assert [count == 48 for count in counts] == [True, False] * 3


@pytest.mark.parametrize("mode", ["logits", "features", "on-policy"])
def test_a_student_comes_closer_to_its_teacher_than_the_data_alone_brings_it(mode) -> None:
    """The data are noise here, so that only the teacher has anything to teach."""
    gaps = {}
    for name in (mode, "scratch"):
        student, teacher = pair()
        distilled(student, teacher, batches, DistillConfig(name, n_rollout_tokens=8), SHORT)
        ids = batches(999)["inputs"]
        with torch.no_grad():
            gaps[name] = soft_cross_entropy(student(ids), teacher(ids)).mean().item()
    assert gaps[mode] < 0.92 * gaps["scratch"]


def test_feature_map_trains_and_stays_outside_the_student() -> None:
    student, teacher = pair()
    names = set(student.state_dict())
    distilled(student, teacher, batches, DistillConfig("features"), SHORT)
    assert set(student.state_dict()) == names
    match = FeatureMatch(3, 5)
    assert match(torch.zeros(2, 3), torch.ones(2, 5)).tolist() == [1.0, 1.0]


def test_flops_of_a_step() -> None:
    student, teacher = pair()
    costs = {mode: step_flops(student, teacher, DistillConfig(mode), 64) for mode in MODES}
    own = costs["scratch"] / 3
    theirs = costs["logits"] - costs["scratch"]
    assert theirs > own and costs["features"] == costs["logits"]
    assert costs["on-policy"] == pytest.approx(costs["logits"] + 0.25 * own)


def test_verb_trains_both_and_saves_the_student(tmp_path, capsys) -> None:
    config = StudentConfig(max_steps=6, n_documents=300, n_held_out=10, d_model=32, d_ff=48, n_layers=1)
    distill(config, RunConfig(out=tmp_path))
    said = capsys.readouterr().out
    assert "logits: 6 steps" in said and "scratch: " in said and "teacher: " in said
    assert int(said.split("scratch: ")[1].split()[0]) > 6
    assert CausalLM.from_pretrained(tmp_path / "model").config.d_model == 32


def test_shape_comments(checked_shapes) -> None:
    student, teacher = pair()
    with checked_shapes(distillation) as checked:
        Teacher(teacher, DistillConfig())(student, batches(0))
        Teacher(teacher, DistillConfig("on-policy", on_policy_share=1.0, n_rollout_tokens=5))(student, batches(0))
    assert len(checked) >= 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillConfig("logit"), "unknown mode 'logit'; did you mean 'logits'?"),
        (lambda: DistillConfig(distill_temperature=0), "distill_temperature must be finite and > 0, got 0"),
        (lambda: DistillConfig(distill_weight=1.1), "distill_weight must be finite and >= 0 and <= 1, got 1.1"),
        (lambda: generalised_jsd(torch.zeros(2), torch.zeros(2), -0.1), "beta must be in 0..1 (0: forward KL"),
        (lambda: StudentConfig(d_model=30), "d_model=30 is not divisible by n_heads=4"),
        (lambda: StudentConfig(max_steps=0), "max_steps must be finite and >= 1, got 0"),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_training_settings_are_those_of_the_course_model() -> None:
    training = student_training(100, 1e-2)
    assert (training.optimizer, training.schedule, training.cooldown_steps) == ("muon", "wsd", 50)
