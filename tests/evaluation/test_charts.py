"""Charts are well-formed, put numbers where they belong, and speak them."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.report.charts import SHAPES, Band, Curve, bar, curves, interval_rows, mark
from stereoclinic.statistics.intervals import Interval

SHARES = st.floats(0, 1)


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def places(root: ElementTree.Element) -> list[float]:
    """Where the marks stand, in percent, from the top down."""
    return [float(each.get("x").rstrip("%")) for each in root.iter("svg") if (each.get("class") or "").startswith("m")]


@given(values=st.lists(SHARES, min_size=1, max_size=7), target=SHARES)
def test_marks_stand_in_the_order_of_their_shares(values, target):
    root = parse(interval_rows([Interval(value, value, value) for value in values], target))
    found = places(root)
    assert len(found) == len(values)
    for a, x in zip(values, found, strict=True):
        assert 0 <= x <= 100
        assert all(x <= y + 0.01 for b, y in zip(values, found, strict=True) if a <= b)


def test_an_interval_and_the_target_are_where_the_numbers_say():
    root = parse(interval_rows([Interval(0.5, 0.25, 1.0)], 0.5, Band(0.4, 1.2)))
    (line,) = [each for each in root.iter("line") if each.get("class") == "m0"]
    ends = float(line.get("x1").rstrip("%")), float(line.get("x2").rstrip("%"))
    assert (places(root)[0] - ends[0]) * 2 == pytest.approx(ends[1] - places(root)[0], abs=0.05)
    (target,) = [each for each in root.iter("line") if each.get("class") == "target"]
    assert target.get("x1") == target.get("x2") == f"{places(root)[0]:.2f}%"
    (band,) = root.iter("rect")
    assert float(band.get("x").rstrip("%")) + float(band.get("width").rstrip("%")) == pytest.approx(ends[1], abs=0.02)
    assert root.get("aria-label") == "0.50 [0.25, 1.00]; target 0.50"


def test_marks_differ_in_shape_and_not_in_colour_alone():
    assert len(set(SHAPES)) == len(SHAPES)
    shapes = [re.sub(r'class="m\d"', "", mark(i)) for i in range(len(SHAPES))]
    assert len(set(shapes)) == len(SHAPES)
    assert mark(len(SHAPES)) == mark(1)  # never the untreated model's


@given(value=st.floats(0, 10), top=st.floats(0, 10))
def test_a_bar_is_as_long_as_its_part_of_the_top(value, top):
    (rect,) = parse(bar(value, top)).iter("rect")
    width = float(rect.get("width").rstrip("%"))
    assert 0 <= width <= 100
    if top > 0 and value <= top:
        assert width == pytest.approx(100 * value / top, abs=0.01)


def test_curves_break_where_nothing_was_measured_and_run_from_noise_to_image():
    root = parse(curves([Curve("female", [0.0, 1.0, None, -1.0], [0.0, None, None, 0.0])], [900, 600, 300, 0], 1.0))
    lines = [each.get("points") for each in root.iter("polyline")]
    assert lines == ["0.00,30.00 33.33,2.00", "100.00,58.00 100.00,58.00"]
    assert root.get("aria-label") == "female: 0.00, +1.00, −1.00"  # noqa: RUF001


def test_several_curves_differ_in_their_dashes():
    lines = [Curve(name, [0.1, 0.2], [0.0, 0.0]) for name in "abc"]
    dashes = [each.get("stroke-dasharray") for each in parse(curves(lines, [1, 0], 1.0)).iter("polyline")]
    assert len(set(dashes)) == 3


def test_a_single_timestep_and_no_timestep_at_all():
    assert "50.00," in curves([Curve("g", [0.5], [0.1])], [500], 1.0)
    assert not list(parse(curves([Curve("g", [], [])], [], 1.0)).iter("polyline"))


def test_names_are_escaped():
    hostile = '"><script>alert(1)</script>'
    assert "<script" not in curves([Curve(hostile, [0.5], [0.1])], [500], 1.0)
