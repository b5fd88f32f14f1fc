"""Whether two figures of independent runs differ, from their reported intervals alone.

That two intervals overlap does not say that two figures are alike: at 95 % each, figures may well differ while theirs
still meet. What does say it is an interval of the difference, recovered from the two (MOVER, the method of variance
estimates recovery):

    low  = b - a - sqrt((b - low_b)^2 + (high_a - a)^2)
    high = b - a + sqrt((high_b - b)^2 + (a - low_a)^2)

For shares with Wilson intervals this is Newcombe's hybrid score interval. It takes the two for independent. Runs that
share a model and seeds are not, and mostly vary together: then the interval is too wide, and a difference that it
tells is there all the more.

References: Zou & Donner, Construction of confidence limits about effect measures, Statistics in Medicine 2008;
Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 1998 (method
10).
"""

import math

from stereoclinic.evaluation.results.figures import Value


def difference(a: Value, b: Value) -> Value:
    """b - a with its interval; without one where either figure has none.

    A bootstrap interval of a gap can lie beside its estimate, near parity. An arm that would point inwards then counts
    as half the interval's width: the interval of the difference becomes wider, never narrower.
    """
    change = b.estimate - a.estimate
    (below_a, above_a), (below_b, above_b) = _arms(a), _arms(b)
    if math.isnan(below_a + below_b):
        return Value(change)
    return Value(change, change - math.hypot(below_b, above_a), change + math.hypot(above_b, below_a))


def told_apart(change: Value) -> bool:
    """Whether a difference is surely not zero."""
    return change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def _arms(value: Value) -> tuple[float, float]:
    """How far an interval reaches below and above its estimate; NaN where there is none."""
    if value.low is None or value.high is None:
        return math.nan, math.nan
    below, above = value.estimate - value.low, value.high - value.estimate
    if min(below, above) < 0:
        half = (value.high - value.low) / 2
        return max(below, half), max(above, half)
    return below, above
