"""The difference of two figures from their intervals: known values, its symmetries, and its coverage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.evaluation.compare import difference, is_significant
from stereoclinic.statistics.intervals import Interval, wilson_interval

COUNTS = st.tuples(st.integers(0, 40), st.integers(40, 200)).map(lambda pair: wilson_interval(*pair))


def test_shares_have_newcombes_interval():
    """56 of 70 less 48 of 80: the first example of Newcombe 1998, method 10."""
    found = difference(wilson_interval(48, 80), wilson_interval(56, 70))
    assert found.estimate == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)
    assert is_significant(found)


def test_overlapping_intervals_may_still_differ_significantly():
    a, b = Interval(0.5, 0.4, 0.6), Interval(0.66, 0.56, 0.76)
    assert b.low < a.high
    assert is_significant(difference(a, b))


@given(a=COUNTS, b=COUNTS)
def test_exchanging_the_two_changes_the_sign(a, b):
    there, back = difference(a, b), difference(b, a)
    assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))


@given(a=COUNTS)
def test_a_figure_does_not_differ_from_itself(a):
    assert not is_significant(difference(a, a))


def test_without_an_interval_nothing_is_significant():
    found = difference(Interval(0.1), Interval(0.9, 0.8, 0.95))
    assert found.estimate == pytest.approx(0.8) and not found.has_ends
    assert not is_significant(found)


def test_an_interval_to_one_side_of_its_estimate_widens_the_difference():
    shifted = Interval(0.04, 0.06, 0.13)
    found = difference(Interval(0.2, 0.2, 0.2), shifted)
    assert found.low == pytest.approx(-0.16 - 0.035) and found.high == pytest.approx(-0.16 + 0.09)


def test_equal_shares_differ_significantly_about_one_time_in_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = torch.binomial(torch.full((2000, 2), 60.0), torch.tensor(0.3), generator=generator)
    pairs = [[wilson_interval(int(count), 60) for count in pair] for pair in hits]
    significant = sum(is_significant(difference(a, b)) for a, b in pairs)
    assert 0.03 < significant / 2000 < 0.07
