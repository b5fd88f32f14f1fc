"""Laws of the exact intervals and tests, and their values against scipy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import wilson_interval
from stereoclinic.statistics.tests import exact_interval, prompt_p_values, sign_test


@given(n=st.integers(1, 300), data=st.data(), mid_p=st.booleans())
def test_the_interval_brackets_the_proportion_and_mirrors(n, data, mid_p):
    successes = data.draw(st.integers(0, n))
    interval, mirror = exact_interval(successes, n, mid_p=mid_p), exact_interval(n - successes, n, mid_p=mid_p)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)


@given(n=st.integers(1, 200), data=st.data(), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_it_agrees_with_scipy_and_is_never_narrower_than_its_mid_p_form(n, data, confidence):
    successes = data.draw(st.integers(0, n))
    interval = exact_interval(successes, n, confidence)
    reference = binomtest(successes, n).proportion_ci(confidence, method="exact")
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    narrower = exact_interval(successes, n, confidence, mid_p=True)
    assert interval.low <= narrower.low + 1e-12 and narrower.high <= interval.high + 1e-12


def test_mid_p_counts_the_observed_value_half():
    low = exact_interval(7, 20, mid_p=True).low
    assert binom.sf(7, 20, low) + binom.pmf(7, 20, low) / 2 == pytest.approx(0.025, abs=1e-9)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_it_covers_at_least_as_often_as_it_says_at_any_share(share):
    for n in (10, 25, 60):
        assert covered(exact_interval, n, share) >= 0.95


def test_where_it_covers_wilsons_interval_may_fall_short():
    assert covered(wilson_interval, 25, 0.02) < 0.95 <= covered(exact_interval, 25, 0.02)


def covered(interval_of, n: int, share: float) -> float:
    """The exact probability of the counts whose interval holds the share."""
    intervals = [interval_of(x, n) for x in range(n + 1)]
    return sum(binom.pmf(x, n, share) for x, each in enumerate(intervals) if each.low <= share <= each.high)


def test_images_that_count_in_part_move_both_ends_outward():
    interval = exact_interval(4.5, 10)
    assert interval.low == exact_interval(4, 10).low and interval.high == exact_interval(5, 10).high


@given(ups=st.integers(0, 60), downs=st.integers(0, 60))
def test_the_sign_test_is_that_of_scipy_and_symmetric(ups, downs):
    assert sign_test(ups, downs) == sign_test(downs, ups)
    expected = binomtest(ups, ups + downs).pvalue if ups + downs else 1.0
    assert sign_test(ups, downs) == pytest.approx(expected, abs=1e-12)


def _reads(groups: list[list[int]], K: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(groups), K).double()


def test_prompts_are_tested_one_by_one_by_the_images_that_moved():
    before = _reads([[0] * 10, [0] * 5 + [1] * 5])
    after = _reads([[1] * 8 + [0] * 2, [1] * 5 + [0] * 5])
    assert prompt_p_values(before, after) == pytest.approx([2 / 2**8, 1.0])
    assert prompt_p_values(before, before) == [1.0, 1.0]


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_p_values_ignore_the_order_of_images_and_groups_and_of_before_and_after(seed, K):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(3, 12, K, generator=generator).softmax(-1) for _ in range(2))
    images, groups = torch.randperm(12, generator=generator), torch.randperm(K, generator=generator)
    expected = pytest.approx(prompt_p_values(before, after))
    assert prompt_p_values(after, before) == expected
    assert prompt_p_values(before[:, images][..., groups], after[:, images][..., groups]) == expected


@pytest.mark.parametrize("K", [2, 3])
def test_no_change_is_rejected_at_most_as_often_as_the_level(K):
    generator = torch.Generator().manual_seed(1)
    shares = torch.full((K,), 1 / K)
    draws = torch.multinomial(shares, 2 * 2000 * 25, replacement=True, generator=generator).view(2, 2000, 25)
    p_values = prompt_p_values(*torch.nn.functional.one_hot(draws, K).double())
    assert sum(p <= 0.05 for p in p_values) / 2000 <= 0.06


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="4 successes of 3"):
        exact_interval(4, 3)
    with pytest.raises(InputError, match="confidence is 95"):
        exact_interval(1, 3, 95)
    with pytest.raises(InputError, match="none below 0"):
        sign_test(-1, 2)
    with pytest.raises(InputError, match="same prompts and seeds"):
        prompt_p_values(torch.rand(1, 3, 2), torch.rand(1, 4, 2))
