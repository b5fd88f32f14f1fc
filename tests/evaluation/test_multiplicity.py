"""Laws of the corrections, and their values against scipy and against testing every intersection."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from stereoclinic.errors import InputError
from stereoclinic.statistics.significance import benjamini_hochberg, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=7)
BOTH = pytest.mark.parametrize("correct", [holm, benjamini_hochberg])


@BOTH
@given(p_values=P_VALUES, data=st.data())
def test_corrected_values_are_larger_probabilities_in_the_same_order(correct, p_values, data):
    corrected = correct(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    ranked = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in ranked] == sorted(corrected)
    order = data.draw(st.permutations(range(len(p_values))))
    assert correct([p_values[i] for i in order]) == [corrected[i] for i in order]


@BOTH
@given(p=st.floats(0, 1))
def test_one_test_alone_needs_no_correction(correct, p):
    assert correct([p]) == [p] and correct([]) == []


@given(p_values=P_VALUES)
def test_holm_is_bonferroni_on_every_set_of_tests_that_holds_one(p_values):
    """Closed testing: a test is rejected if every set of tests that it is in is."""
    sets = [s for k in range(1, len(p_values) + 1) for s in itertools.combinations(range(len(p_values)), k)]
    for i, corrected in enumerate(holm(p_values)):
        worst = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s)
        assert corrected == pytest.approx(worst)


@given(p_values=P_VALUES)
def test_benjamini_hochberg_is_that_of_scipy_and_never_above_holm(p_values):
    corrected = benjamini_hochberg(p_values)
    assert corrected == pytest.approx(list(false_discovery_control(p_values)))
    assert all(q <= h + 1e-12 for q, h in zip(corrected, holm(p_values), strict=True))


@BOTH
def test_what_is_no_probability_is_refused(correct):
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(InputError, match="expected probabilities"):
            correct([0.5, bad])
