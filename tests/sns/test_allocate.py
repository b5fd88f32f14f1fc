"""Allocation: shares are met, an image's group is its own, and shares that do not fit are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.sns.allocate import allotted_group, shares_of, uniform

JOINT = ("female+young", "female+old", "male+young", "male+old")


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 10_000), st.text(max_size=20))
def test_any_run_of_seeds_meets_the_shares(weights: list[int], first: int, prompt: str) -> None:
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    groups = torch.tensor([allotted_group({"prompt": prompt, "seed": first + i}, shares) for i in range(100)])
    found = torch.bincount(groups, minlength=len(weights)) / 100
    assert (found - shares).abs().max() < 0.06  # independent draws stray by up to 0.15


def test_uniform_unless_given() -> None:
    assert torch.equal(shares_of(("female", "male")), uniform(2))
    assert shares_of(JOINT).tolist() == [0.25] * 4
    assert shares_of(("60+", "younger"), [{"60+": 0.2, "younger": 0.8}]).tolist() == [0.2, 0.8]


def test_marginals_multiply_and_joint_shares_are_taken_as_they_are() -> None:
    given_ = [{"old": 0.2, "young": 0.8}, {"female": 0.75, "male": 0.25}]
    torch.testing.assert_close(shares_of(JOINT, given_), torch.tensor([0.6, 0.15, 0.2, 0.05]).double())
    torch.testing.assert_close(shares_of(JOINT, given_[:1]), torch.tensor([0.4, 0.1, 0.4, 0.1]).double())
    whole = dict(zip(JOINT, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert shares_of(JOINT, [whole]).tolist() == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([{"female": 0.5, "male": 0.4}], "add up to 0.9; expected 1"),
        ([{"female": 0.5, "man": 0.5}], "no group 'man'; choose one of female, male"),
        ([{"woman": 1.0}], "no group 'woman'; choose one of female, male"),
        ([{"female": 1.0}], "none given for male"),
        ([{"female": 1.5, "male": -0.5}], "expected numbers of 0 or more"),
        ([{"female": float("nan"), "male": 0.5}], "expected numbers of 0 or more"),
        ([{"female": 0.5, "male": 0.5}, {"female": 0.5, "male": 0.5}], "given twice"),
    ],
)
def test_shares_that_do_not_fit(wrong: list[dict[str, float]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        shares_of(("female", "male"), wrong)
    with pytest.raises(InputError, match="sum of 1"):
        allotted_group({"prompt": "", "seed": 0}, torch.tensor([0.5, 0.4]))
