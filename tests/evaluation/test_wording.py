"""Numbers as they are printed: signs that mean something, digits that do, and what is not known."""

import pytest

from stereoclinic.evaluation.wording import number, p_equals, spelt
from stereoclinic.statistics.intervals import Interval


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.126, ".2f", "0.13"),
        (-0.126, "+.2f", "~0.13"),
        (0.126, "+.2f", "+0.13"),
        (-0.001, ".2f", "0.00"),
        (-0.001, "+.2f", "0.00"),
        (0.0, "+.2f", "0.00"),
        (0.0672, ".2g", "0.067"),
        (0.3, ".2g", "0.30"),
        (12.0, ".2g", "12"),
        (12345.6, ".2g", "12346"),
        (-12345.6, "+.2g", "~12346"),
        (2.37, ".0%", "237%"),
        (None, ".2f", "-"),
    ],
)
def test_numbers(value, form, text):
    assert number(value, form) == text.replace("~", "\N{MINUS SIGN}")


def test_an_interval_stands_behind_its_figure_and_is_left_out_where_there_is_none():
    assert spelt(Interval(0.2, 0.1, 0.3)) == "0.20 [0.10, 0.30]"
    assert spelt(Interval(0.2)) == "0.20"


def test_p_has_no_more_digits_than_its_draws_give():
    assert (p_equals(0.0005), p_equals(0.012), p_equals(1.0)) == ("p < 0.001", "p = 0.012", "p = 1.000")
