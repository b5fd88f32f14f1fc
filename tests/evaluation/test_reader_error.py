"""Laws of the correction for a reader's error, and its values against closed forms and scipy's optimiser."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from stereoclinic.errors import InputError
from stereoclinic.statistics.reader_error import corrected_intervals, corrected_shares


def reader(K: int, seed: int, right: float = 0.7) -> torch.Tensor:
    """Rates (K, K) of a reader that is right more than `right` of the time."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(K, K, generator=generator, dtype=torch.float64)
    return right * torch.eye(K, dtype=torch.float64) + (1 - right) * noise / noise.sum(1, keepdim=True)


def some_shares(K: int, seed: int) -> torch.Tensor:
    weights = torch.rand(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.sum()


@given(seed=st.integers(0, 2**31), K=st.integers(2, 5))
def test_reading_and_correcting_is_the_identity(seed, K):
    shares, rates = some_shares(K, seed), reader(K, seed)
    torch.testing.assert_close(corrected_shares(shares @ rates, rates), shares, atol=1e-9, rtol=0)
    torch.testing.assert_close(corrected_shares(shares, torch.eye(K)), shares)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), K=st.integers(2, 5))
def test_the_order_of_groups_and_the_number_of_pictures_behind_the_rates_do_not_matter(seed, K):
    shares, rates = some_shares(K, seed + 1), reader(K, seed)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    expected = corrected_shares(shares, rates)
    torch.testing.assert_close(
        corrected_shares(shares[order], rates[order][:, order]), expected[order], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(corrected_shares(shares, 250 * rates), expected)
    assert expected.min() >= 0 and expected.sum().item() == pytest.approx(1)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), K=st.integers(2, 5))
def test_it_is_the_nearest_point_of_the_simplex_by_scipy(seed, K):
    """Shares that no true ones give: most solutions lie on the boundary."""
    shares, rates = torch.eye(K, dtype=torch.float64)[seed % K], reader(K, seed)
    found = corrected_shares(shares, rates).numpy()
    matrix, wanted = rates.numpy().T, shares.numpy()

    def misfit(p: np.ndarray) -> float:
        return float(((matrix @ p - wanted) ** 2).sum())

    reference = minimize(
        misfit, np.full(K, 1 / K), bounds=[(0, 1)] * K, constraints={"type": "eq", "fun": lambda p: p.sum() - 1}
    )
    assert misfit(found) <= misfit(reference.x) + 1e-7


def test_two_groups_are_corrected_by_the_published_formula():
    sensitivity, specificity, seen = 0.9, 0.8, 0.55
    rates = torch.tensor([[sensitivity, 1 - sensitivity], [1 - specificity, specificity]])
    found = corrected_shares(torch.tensor([seen, 1 - seen]), rates)
    assert found[0].item() == pytest.approx((seen + specificity - 1) / (sensitivity + specificity - 1), abs=1e-6)


def _reads(first: int, n: int) -> torch.Tensor:
    return torch.nn.functional.one_hot((torch.arange(n) >= first).long(), 2).double()


def test_intervals_hold_the_estimate_and_narrow_with_images_and_with_known_pictures():
    rates = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    width = {}
    for n, known in ((50, 50), (5000, 50), (50, 5000), (5000, 5000)):
        first, second = corrected_intervals(_reads(n * 3 // 5, n), known * rates, resamples=500)
        assert 0 <= first.low <= first.estimate <= first.high <= 1
        assert first.low == pytest.approx(1 - second.high) and first.estimate == pytest.approx(0.625)
        width[n, known] = first.high - first.low
    assert width[5000, 5000] < min(width[5000, 50], width[50, 5000]) < width[50, 50]


def test_a_reader_that_was_never_seen_wrong_is_not_taken_for_certain():
    first, _ = corrected_intervals(_reads(100, 100), 20 * torch.eye(2), resamples=500)
    assert first.estimate == 1 and first.low < 0.99


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator, covered = torch.Generator().manual_seed(0), 0
    rates = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    for _ in range(200):
        confusion = torch.stack(
            [torch.binomial(torch.tensor(80.0), row[0].float(), generator=generator) for row in rates]
        )
        confusion = torch.stack([confusion, 80 - confusion], dim=1)
        seen = int(torch.binomial(torch.tensor(100.0), 0.3 * rates[0, 0].float() + 0.7 * 0.2, generator=generator))
        interval, _ = corrected_intervals(_reads(seen, 100), confusion, resamples=300, generator=generator)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_matrix_that_is_too_near_singular_is_refused():
    blind = torch.tensor([[50.0, 50.0], [48.0, 52.0]])
    with pytest.raises(InputError, match="too near singular"):
        corrected_shares(torch.tensor([0.5, 0.5]), blind)
    few = torch.tensor([[3.0, 2.0], [1.0, 4.0]])  # tells the groups apart, for all that ten pictures say
    corrected_shares(torch.tensor([0.5, 0.5]), few)
    with pytest.raises(InputError, match="more images"):
        corrected_intervals(_reads(5, 10), few)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match=r"expected \(\.\.\., 2, 2\)"):
        corrected_shares(torch.tensor([0.5, 0.5]), torch.eye(3))
    with pytest.raises(InputError, match="without an image"):
        corrected_shares(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match=r"expected \(n, K\)"):
        corrected_intervals(torch.rand(4, 2).softmax(1), torch.eye(3))
