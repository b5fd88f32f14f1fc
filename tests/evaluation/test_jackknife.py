"""The jackknife's interval of a ratio: as the textbook has it where that is known, and none where nothing is left."""

import math

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.evaluation.intervals.jackknife import jackknife_ratio


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


def test_more_confidence_is_wider():
    values = torch.arange(1.0, 25.0, dtype=torch.float64)
    narrow, wide = (
        jackknife_ratio(lambda i: (values[i].mean().item(), 1.0), (24,), confidence) for confidence in (0.9, 0.99)
    )
    assert narrow is not None and wide is not None
    assert wide.low < narrow.low < narrow.estimate == wide.estimate < narrow.high < wide.high
    with pytest.raises(InputError, match="confidence"):
        jackknife_ratio(lambda i: (1.0, 1.0), (24,), 1.5)


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_where_a_part_leaves_nothing_there_is_no_interval(nothing: float):
    assert jackknife_ratio(lambda i: (1.0, 1.0 if 0 in i else nothing), (4,)) is None
