"""Laws of the Frechet distance, and its values against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from tests.evaluation.test_kernel import AsGiven
from torchmetrics.image.fid import FrechetInceptionDistance

from stereoclinic.errors import InputError
from stereoclinic.statistics.distances import (
    feature_statistics,
    frechet_between,
    frechet_distance,
    frechet_within_groups,
)


def features(seed: int, n: int, d: int) -> torch.Tensor:
    """Correlated features (n, d) with their own mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.randn(d, generator=generator)


SEEDS = st.integers(0, 2**31)


@given(seed=SEEDS, n=st.integers(2, 30), d=st.integers(1, 8))
def test_distance_of_a_set_to_itself_is_zero_with_singular_covariances_too(seed, n, d):
    assert frechet_between(features(seed, n, d), features(seed, n, d)) == pytest.approx(0, abs=1e-5)


@given(seed=SEEDS, n=st.integers(2, 30), d=st.integers(1, 8))
def test_distance_is_symmetric_and_not_negative(seed, n, d):
    a, b = features(seed, n, d), features(seed + 1, n + 3, d)
    assert 0 <= frechet_between(a, b) == pytest.approx(frechet_between(b, a), rel=1e-6, abs=1e-6)


@given(seed=SEEDS, d=st.integers(1, 6))
def test_a_shift_adds_its_squared_length_and_a_rotation_nothing(seed, d):
    a, shift = features(seed, 20, d), torch.arange(1.0, d + 1)
    assert frechet_between(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    b, rotation = features(seed + 1, 20, d), torch.linalg.qr(features(seed + 2, d, d)).Q
    assert frechet_between(a @ rotation, b @ rotation) == pytest.approx(frechet_between(a, b), rel=1e-6, abs=1e-6)


def test_commuting_covariances_have_a_closed_form():
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 4.0])
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    zero = torch.zeros(3)
    assert frechet_distance(zero, torch.diag(a), zero, torch.diag(b)) == pytest.approx(expected)


@pytest.mark.parametrize("d", [1, 3, 16])
def test_distance_agrees_with_a_matrix_square_root(d):
    a, b = features(0, 80, d).numpy(), features(1, 60, d).numpy()
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_between(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_distance_of_fewer_images_than_features_is_that_of_torchmetrics(scale):
    n, d = 60, 128
    a, b = features(0, n, d) * scale / d, features(1, n, d) * scale / d
    metric = FrechetInceptionDistance(feature=AsGiven(d)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    expected = metric.compute().item()
    assert expected > 0.01
    assert frechet_between(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_statistics_agree_with_numpy_and_are_double_precision():
    x = features(2, 12, 4).float()
    mean, cov = feature_statistics(x)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False))


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="at least two images"):
        feature_statistics(torch.zeros(1, 3))
    with pytest.raises(InputError, match="not finite"):
        feature_statistics(torch.tensor([[1.0], [float("inf")]]))
    with pytest.raises(InputError, match=r"expected \(d,\), \(d, d\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


def _people(cells: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose mean is the cell's own."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * cells[:, None] + torch.randn(len(cells), 4, generator=generator), cells


def test_within_groups_a_change_of_groups_alone_is_no_distance():
    even = torch.arange(4).repeat(500)
    uneven = torch.cat([torch.zeros(1500), torch.ones(100), 2 * torch.ones(200), 3 * torch.ones(200)]).long()
    arm, reference, floor = _people(uneven, 0), _people(even, 1), _people(even, 2)
    distance, by_chance = frechet_within_groups(arm, reference, floor, 4)
    assert distance < 0.1 and by_chance < 0.1
    assert frechet_between(arm[0], reference[0]) > 1  # which a plain distance takes for one
    moved = (arm[0] + 1, arm[1])
    assert frechet_within_groups(moved, reference, floor, 4)[0] > 3


def test_within_groups_of_the_same_people_it_is_the_plain_distance():
    cells = torch.arange(4).repeat(50)
    arm, reference, floor = (_people(cells, seed) for seed in range(3))
    distance, by_chance = frechet_within_groups(arm, reference, floor, 4)
    assert distance == pytest.approx(frechet_between(arm[0], reference[0]))
    assert by_chance == pytest.approx(frechet_between(floor[0], reference[0]))


def test_within_groups_cells_that_the_reference_lacks_are_left_out():
    arm = _people(torch.arange(4).repeat(50), 0)
    reference, floor = (_people(torch.arange(2).repeat(100), seed) for seed in (1, 2))
    kept = arm[1] < 2
    expected = frechet_within_groups((arm[0][kept], arm[1][kept]), reference, floor, 4)
    assert frechet_within_groups(arm, reference, floor, 4) == pytest.approx(expected)
    nobody = _people(torch.full((5,), 3), 0)
    assert all(math.isnan(each) for each in frechet_within_groups(nobody, reference, floor, 4))
