"""Laws of agreement between readers, and kappa against its formula written out in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.statistics.agreement import agreement, agreement_table, cohen_kappa, specific_agreement

NAMES = ["a", "b", "c", "d"]


def two_readers(seed: int, K: int, n: int = 30, same: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, K, (2, n), generator=generator)
    other = torch.where(torch.rand(n, generator=generator) < same, one, other)
    return tuple(torch.nn.functional.one_hot(each, K).double() for each in (one, other))


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_kappa_is_cohens_and_symmetric(seed, K):
    one, other = two_readers(seed, K)
    a, b = one.argmax(1).numpy(), other.argmax(1).numpy()
    raw = (a == b).mean()
    chance = sum((a == k).mean() * (b == k).mean() for k in range(K))
    assert float(cohen_kappa(agreement_table(one, other))) == pytest.approx((raw - chance) / (1 - chance))
    assert float(cohen_kappa(agreement_table(other, one))) == pytest.approx((raw - chance) / (1 - chance))


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_the_order_of_pictures_and_groups_and_their_number_do_not_matter(seed, K):
    one, other = two_readers(seed, K)
    generator = torch.Generator().manual_seed(seed)
    images, groups = torch.randperm(len(one), generator=generator), torch.randperm(K, generator=generator)
    table, moved = agreement_table(one, other), agreement_table(one[images][:, groups], other[images][:, groups])
    torch.testing.assert_close(cohen_kappa(moved), cohen_kappa(table))
    torch.testing.assert_close(specific_agreement(moved), specific_agreement(table)[groups], equal_nan=True)
    torch.testing.assert_close(cohen_kappa(7 * table), cohen_kappa(table))


def test_a_reader_agrees_with_itself_and_one_that_guesses_by_chance_only():
    one, other = two_readers(0, 2, n=4000, same=0.0)
    assert cohen_kappa(agreement_table(one, one)) == 1
    assert abs(float(cohen_kappa(agreement_table(one, other)))) < 0.05
    opposite = torch.eye(2).repeat(10, 1)
    assert cohen_kappa(agreement_table(opposite, 1 - opposite)) == -1


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_intervals_hold_what_was_seen(seed, K):
    found = agreement(*two_readers(seed, K), NAMES[:K], resamples=200)
    every = [found.kappa, *found.specific.values()]
    assert all(x.low <= x.estimate <= x.high for x in every if not math.isnan(x.estimate))
    assert list(found.specific) == NAMES[:K]


def test_a_small_case_group_by_group():
    """Of twelve pictures both see a in 4 and b in 5; one sees a where the other sees b in 2, and once the other way."""
    table = torch.tensor([[4.0, 2.0], [1.0, 5.0]])
    assert specific_agreement(table).tolist() == pytest.approx([8 / 11, 10 / 13])
    assert float(cohen_kappa(table)) == pytest.approx((9 / 12 - 0.5) / 0.5)


def test_kappa_covers_the_truth_about_as_often_as_it_says():
    """Both name the same group in three of four pictures and guess in the rest: kappa is 0.75."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        one, other = two_readers(int(rng.integers(2**31)), 2, n=80, same=0.75)
        kappa = agreement(one, other, ["a", "b"], resamples=300).kappa
        covered += kappa.low <= 0.75 <= kappa.high
    assert 0.90 <= covered / 200 <= 0.99


def test_readers_that_never_differed_are_not_taken_for_one():
    one, _ = two_readers(0, 2, n=20)
    found = agreement(one, one, ["a", "b"])
    assert found.kappa.estimate == 1 and found.kappa.low < 0.95


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="same images"):
        agreement(torch.rand(3, 2).softmax(1), torch.rand(4, 2).softmax(1), ["a", "b"])
    with pytest.raises(InputError, match="3 names"):
        agreement(*two_readers(0, 2), ["a", "b", "c"])
    with pytest.raises(InputError, match="0 random draws"):
        agreement(*two_readers(0, 2), ["a", "b"], resamples=0)
