"""Masks: what makes one, its bins and windows, and the mask of a group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sns.conftest import NAMES, SITES, SMALL_EDGES, assert_same, small_group_mask, small_mask

from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import bin_within, bins_in
from stereoclinic.pipelines.sites import Site


def test_a_group_is_a_plain_mask_and_a_window_cuts_every_group():
    mask = small_group_mask()
    assert mask.allocates
    assert mask.damping.shape == (3, 2, 5)
    for k, name in enumerate(NAMES):
        part = mask.group(name)
        assert_same(part, small_mask(factors=mask.factors[k], roots=mask.roots[k]))
        assert not part.allocates
        assert_same(mask.windowed((700, 300)).group(name), part.windowed((700, 300)))
    with pytest.raises(InputError, match="group 'others' is not known; choose from female, male, other"):
        mask.group("others")
    with pytest.raises(InputError, match="group 'female' is not known; this mask has none"):
        small_mask().group("female")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sites": []}, "no sites"),
        ({"sites": [SITES[0], SITES[0]], "factors": torch.ones(2, 6), "roots": None}, "twice"),
        ({"sites": [Site("a", "odd", 5)]}, "'odd'"),
        ({"sites": [Site("a.conv2", "conv", 0)]}, "width 0"),
        ({"branch": "neither"}, "'neither'"),
        ({"roots": torch.zeros(5)}, "roots of shape"),
        ({"bin_edges": torch.tensor([1000.0])}, "two or more"),
        ({"metadata": "gender"}, "expected a dict"),
        ({"groups": ("a", "b")}, r"factors of shape \(2, 5\); expected \(2, 2, 5\), groups x timestep bins x neurons"),
        ({"factors": torch.ones(2, 2, 5)}, r"factors of shape \(2, 2, 5\); expected \(2, 5\)"),
        ({"groups": ("a", "b"), "factors": torch.ones(2, 2, 5)}, r"roots of shape \(2, 5\); expected \(2, 2, 5\)"),
        ({"groups": ("a",), "factors": torch.ones(1, 2, 5)}, "two or more that differ"),
        ({"groups": ("a", "a"), "factors": torch.ones(2, 2, 5)}, "two or more that differ"),
        ({"groups": "female"}, "expected names"),
        ({"groups": ("a", 3)}, "expected names"),
        ({"groups": ("a", " ")}, "expected names"),
        ({"sites": [Site("a.conv2", "conv", 10**30)]}, "factors of shape"),
    ],
)
def test_masks_that_cannot_be_made(changes, match):
    with pytest.raises(InputError, match=match):
        small_mask(**changes)


@given(st.floats(-100, 1200))
def test_every_timestep_is_in_the_bin_whose_edges_hold_it(t):
    i = bin_within(t, SMALL_EDGES)
    if t < 200:
        assert i is None
    else:
        assert t >= SMALL_EDGES[i + 1]
        assert t < SMALL_EDGES[i] or i == 0


@given(
    st.tuples(st.integers(100, 1100), st.integers(100, 1100)).filter(lambda w: w[0] > w[1]),
    st.integers(150, 1050),
)
def test_a_window_keeps_factors_inside_and_leaves_the_outside_untouched(window, t):
    mask = small_mask()
    high, low = window
    if high <= 200 or low >= 1000:
        with pytest.raises(InputError, match="meets no timestep bin"):
            mask.windowed(window)
        return
    cut = mask.windowed(window)
    was, now = mask.bin_of(t), cut.bin_of(t)
    inside = low <= t and (t < high or high >= 1000)
    if inside and was is not None:
        assert torch.equal(cut.factors[now], mask.factors[was])
        assert torch.equal(cut.roots[now], mask.roots[was])
    else:
        assert now is None or (cut.factors[now] == 1).all()


def test_an_empty_window_is_refused():
    with pytest.raises(InputError, match="empty"):
        bins_in(SMALL_EDGES, (300, 300))
