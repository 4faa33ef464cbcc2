"""The solutions of topic 12's exercises against oracles that share no formula with them.

That every checker accepts its solution and refuses every planted mistake is tested with all other exercises.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from exercises_08 import numbers
from exercises_12 import affine_row, best_division, gptq_row, gpu_bill, group_codes, moment
from gptq import output_error
from pipeline_parallel import simulate
from scaling_laws import ChinchillaLaw
from training_planner import Plan


def test_hand_examples_of_the_chapter() -> None:
    codes, scale, zero_point = affine_row([-1.0, 0.0, 0.5, 2.0], 2)
    assert (codes, scale, zero_point) == ([0, 1, 1, 3], 1.0, 1)
    correlated = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    assert gptq_row(torch.tensor([0.4, 0.4], dtype=torch.float64), correlated, 1.0).tolist() == [0.0, 1.0]
    assert best_division(9, 0.5, 9, 0.5, 54) == pytest.approx((3, 3))
    assert best_division(9, 0.5, 36, 0.5, 54) == pytest.approx((0.75, 12))


def test_no_code_of_a_row_is_further_off_than_half_a_step() -> None:
    for seed, n_bits in itertools.product(range(20), (2, 3, 4, 8)):
        weights = [*numbers(7, seed=seed).tolist(), 0.0]
        codes, scale, zero_point = affine_row(weights, n_bits)
        back = [(code - zero_point) * scale for code in codes]
        assert back[-1] == 0 and min(codes) >= 0 and max(codes) < 2**n_bits
        assert max(abs(got - weight) for got, weight in zip(back, weights, strict=True)) <= scale / 2 * (1 + 1e-9)


def test_groups_reach_their_largest_weight() -> None:
    weight = numbers(3, 7, seed=1)
    codes, scales = group_codes(weight, 4, 3)
    for group, part in enumerate(codes.split(3, dim=1)):
        assert (part.abs().amax(1) == 7).all()
        kept = weight.split(3, dim=1)[group]
        assert ((part * scales[:, group, None] - kept).abs() <= scales[:, group, None] / 2 + 1e-12).all()


def test_mended_rows_lose_less_than_rounded_ones_and_no_less_than_the_best() -> None:
    logs = []
    for seed in range(12):
        weight, second_moment = numbers(5, seed=seed), moment(5, 100 + seed)
        near = [0.5 * torch.floor(2 * value) + 0.5 * torch.arange(-1, 3) for value in weight]
        away = torch.cartesian_prod(*near) - weight  # (roundings, columns)
        best = ((away @ second_moment) * away).sum(1).min().item()
        mended = damage(weight, gptq_row(weight, second_moment, 0.5), second_moment)
        nearest = damage(weight, 0.5 * torch.round(2 * weight), second_moment)
        assert mended >= best - 1e-12
        logs.append([math.log(value) for value in (best, mended, nearest)])
    best, mended, nearest = np.mean(logs, axis=0)
    assert best < mended < nearest


def damage(weight: torch.Tensor, rounded: torch.Tensor, second_moment: torch.Tensor) -> float:
    return output_error(weight[None], rounded[None], second_moment)


def test_no_other_division_of_a_budget_is_better() -> None:
    law, flops = ChinchillaLaw(0.5, 30.0, 0.3, 200.0, 0.45), 7e13
    n_best, d_best = best_division(law.a, law.alpha, law.b, law.beta, flops)
    assert 6 * n_best * d_best == pytest.approx(flops)
    others = n_best * np.geomspace(0.01, 100, 4001)
    losses = law.loss(others, flops / 6 / others)
    assert abs(int(losses.argmin()) - 2000) <= 1 and law.loss(n_best, d_best) <= losses.min() + 1e-12


@pytest.mark.parametrize(("n_stages", "n_micro"), [(2, 3), (4, 8), (3, 1)])
def test_bubble_is_that_of_a_timetable(n_stages: int, n_micro: int) -> None:
    bubble = gpu_bill(1.0, Plan(n_stages, pipeline_size=n_stages, batch_size=n_micro))[3]
    assert bubble == pytest.approx(simulate("1f1b", n_stages, n_micro).bubble)
