"""Laws of joint groups: margins, order, and gaps that each axis alone hides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.intersections import intersections, joint_groups, joint_reads, joint_target
from stereoclinic.statistics.shares import parity_gap, shares_from_reads

SIZES = st.lists(st.integers(2, 4), min_size=2, max_size=3)


def drawn(sizes: list[int], seed: int = 0, images: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(images, K, generator=generator, dtype=torch.float64)).softmax(-1) for K in sizes]


@given(sizes=SIZES, seed=st.integers(0, 2**31))
def test_each_axis_is_a_margin_of_the_joint_reads_and_its_top_group_part_of_the_joint_one(sizes, seed):
    reads = drawn(sizes, seed)
    joint = joint_reads(reads).unflatten(-1, sizes)
    for axis, own in enumerate(reads):
        others = [1 + other for other in range(len(sizes)) if other != axis]
        torch.testing.assert_close(joint.sum(others), own)
    top = torch.unravel_index(joint_reads(reads).argmax(-1), sizes)
    for found, own in zip(top, reads, strict=True):
        assert torch.equal(found, own.argmax(-1))


@given(sizes=SIZES, seed=st.integers(0, 2**31))
def test_gaps_do_not_depend_on_the_order_of_the_axes(sizes, seed):
    reads = drawn(sizes, seed)
    for hard in (True, False):
        one, other = (shares_from_reads(joint_reads(each), hard) for each in (reads, reads[::-1]))
        assert parity_gap(one).item() == pytest.approx(parity_gap(other).item())


def test_an_intersection_shows_what_each_axis_alone_hides():
    """Women are old and men are young: each axis is fair, and half of the joint groups are missing."""
    gender, age = torch.eye(2).repeat(5, 1), torch.eye(2).repeat(5, 1)
    for own in (gender, age):
        assert parity_gap(shares_from_reads(own, hard=True)) == 0
    joint = shares_from_reads(joint_reads([gender, age]), hard=True)
    assert joint.tolist() == [0.5, 0, 0, 0.5]
    assert parity_gap(joint) == 0.25


def test_names_and_targets_are_in_the_order_of_the_reads():
    assert joint_groups([("a", "b"), ("c", "d", "e")]) == ["a+c", "a+d", "a+e", "b+c", "b+d", "b+e"]
    target = joint_target([torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])])
    assert target.tolist() == [0.125, 0.125, 0.375, 0.375]


def test_every_two_or_more_axes_meet():
    reads = dict(zip("abc", drawn([2, 2, 3]), strict=True))
    found = intersections(reads)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    torch.testing.assert_close(found["a", "c"], joint_reads([reads["a"], reads["c"]]))
    assert intersections({"a": reads["a"]}) == {}


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="two or more"):
        joint_reads(drawn([2]))
    with pytest.raises(InputError, match="same images"):
        joint_reads([*drawn([2]), *drawn([2], images=3)])
    with pytest.raises(InputError, match="expected probabilities"):
        joint_reads([torch.ones(3, 2), torch.ones(3, 2)])
