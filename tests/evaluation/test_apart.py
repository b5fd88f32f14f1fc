"""The difference of two figures from their intervals: known values, its symmetries, and its coverage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.evaluation.compare import difference, told_apart
from stereoclinic.evaluation.figures.registry import Value
from stereoclinic.statistics.intervals import wilson_interval


def wilson(hits: int, n: int) -> Value:
    found = wilson_interval(hits, n)
    return Value(found.estimate, found.low, found.high)


COUNTS = st.tuples(st.integers(0, 40), st.integers(40, 200)).map(lambda pair: wilson(*pair))


def test_shares_have_newcombes_interval():
    """56 of 70 less 48 of 80: the first example of Newcombe 1998, method 10."""
    found = difference(wilson(48, 80), wilson(56, 70))
    assert found.estimate == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)
    assert told_apart(found)


def test_overlapping_intervals_may_still_be_told_apart():
    a, b = Value(0.5, 0.4, 0.6), Value(0.66, 0.56, 0.76)
    assert b.low < a.high
    assert told_apart(difference(a, b))


@given(a=COUNTS, b=COUNTS)
def test_exchanging_the_two_changes_the_sign(a, b):
    there, back = difference(a, b), difference(b, a)
    assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))


@given(a=COUNTS)
def test_a_figure_is_not_told_from_itself(a):
    assert not told_apart(difference(a, a))


def test_without_an_interval_nothing_is_told():
    found = difference(Value(0.1), Value(0.9, 0.8, 0.95))
    assert found == Value(pytest.approx(0.8))
    assert not told_apart(found)


def test_an_interval_beside_its_estimate_widens_the_difference():
    beside = Value(0.04, 0.06, 0.13)
    found = difference(Value(0.2, 0.2, 0.2), beside)
    assert found.low == pytest.approx(-0.16 - 0.035) and found.high == pytest.approx(-0.16 + 0.09)


def test_equal_shares_are_told_apart_about_one_time_in_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = torch.binomial(torch.full((2000, 2), 60.0), torch.tensor(0.3), generator=generator)
    told = sum(told_apart(difference(wilson(int(a), 60), wilson(int(b), 60))) for a, b in hits)
    assert 0.03 < told / 2000 < 0.07
