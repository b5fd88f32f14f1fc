"""The jackknife's interval of a ratio: as the textbook has it where that is known, and none where nothing is left."""

import math

import pytest
import torch

from stereoclinic.statistics.distances import frechet_within_groups, jackknife_ratio, within_groups_ratio


def test_of_two_means_it_is_that_of_the_delta_method():
    """Without one of n, the jackknife's variance of log(mean) is, to first order, s^2 / (n mean^2)."""
    drawn = torch.Generator().manual_seed(0)
    a, b = (10 + torch.randn(12, generator=drawn, dtype=torch.float64) for _ in range(2))
    found = jackknife_ratio(lambda i, j: (a[i].mean().item(), b[j].mean().item()), (12, 12))
    assert found is not None and found.estimate == pytest.approx((a.mean() / b.mean()).item())
    variance = sum((each.var() / 12 / each.mean() ** 2).item() for each in (a, b))
    half = 1.959964 * math.sqrt(variance)
    assert math.log(found.high / found.estimate) == pytest.approx(half, rel=0.01)
    assert math.log(found.estimate / found.low) == pytest.approx(half, rel=0.01)


def test_many_images_are_left_out_a_twelfth_at_a_time():
    kept: list[tuple[int, int]] = []

    def measure(i: torch.Tensor, j: torch.Tensor) -> tuple[float, float]:
        kept.append((len(i), len(j)))
        return 1.0 + i.double().mean().item(), 1.0 + j.double().mean().item()

    assert jackknife_ratio(measure, (25, 100)) is not None
    assert kept[0] == (25, 100)
    assert kept[1:13] == [(22, 100), *[(23, 100)] * 11]
    assert sorted(set(kept[13:])) == [(25, 91), (25, 92)] and len(kept) == 25


def test_seeds_are_left_out_of_the_arm_and_its_floor_together():
    """Which share them; and what is left out of the reference is its own."""
    drawn = torch.Generator().manual_seed(0)
    cells = torch.tensor([[0, 1, 0, 1, 0, 1]]) + 2 * torch.arange(4)[:, None]  # two groups of each of four prompts
    arm, reference, floor = (torch.randn(4, 6, 3, generator=drawn) + cells[..., None] for _ in range(3))
    found = within_groups_ratio((arm + 0.7, cells), (reference, cells), (floor, cells), 8)

    def flat(features: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return features[:, kept].flatten(0, 1), cells[:, kept].flatten()

    every = list(range(6))
    without = [[i for i in every if i != out] for out in every]
    logs = [
        [
            math.log(a / b)
            for mine, others in kept
            for a, b in [frechet_within_groups(flat(arm + 0.7, mine), flat(reference, others), flat(floor, mine), 8)]
        ]
        for kept in ([(every, every)], [(few, every) for few in without], [(every, few) for few in without])
    ]
    variance = sum(5 * torch.tensor(each, dtype=torch.float64).var(correction=0).item() for each in logs[1:])
    assert found is not None and math.log(found.estimate) == pytest.approx(logs[0][0])
    assert math.log(found.high / found.estimate) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_where_a_part_leaves_nothing_there_is_no_interval(nothing: float):
    assert jackknife_ratio(lambda i: (1.0, 1.0 if 0 in i else nothing), (4,)) is None
