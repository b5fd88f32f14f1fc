"""Laws of the bias metrics, and their formulas against numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stereoclinic.errors import InputError
from stereoclinic.statistics.shares import (
    GAPS,
    deviation_ratio,
    fairness_discrepancy,
    kl_to_target,
    no_group_rate,
    normalised_entropy,
    parity_gap,
    sdtv,
    shares_from_reads,
    unsure_rate,
)

UPPER_BOUND = {
    "parity_gap": lambda K: 2 / K,
    "fairness_discrepancy": lambda K: math.sqrt(2),
    "deviation_ratio": lambda K: 1.0,
    "sdtv": lambda K: 1.0,
    "kl": lambda K: math.inf,
}

REFERENCE = {
    "parity_gap": lambda p, q: np.abs(p - q).sum() / len(p),
    "fairness_discrepancy": lambda p, q: np.sqrt(((p - q) ** 2).sum()),
    "deviation_ratio": lambda p, q: np.abs(p - q).max() / np.maximum(q, 1 - q).max(),
    "sdtv": lambda p, q: np.abs(p - q).sum() / 2,
    "kl": lambda p, q: sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0),
}


@st.composite
def distributions(draw, rows: int | None = None, smallest: float = 0.0):
    """Probability rows (rows, K), or one (K,), with K from 2 to 6."""
    K = draw(st.integers(2, 6))
    shape = (K,) if rows is None else (rows, K)
    values = draw(hnp.arrays(np.float64, shape, elements=st.floats(smallest, 1))) + 1e-3
    return torch.from_numpy(values / values.sum(-1, keepdims=True))


@st.composite
def pairs(draw):
    """Shares and a target over the same groups."""
    rows = draw(distributions(rows=2))
    return rows[0], rows[1]


@pytest.mark.parametrize("name", GAPS)
@given(pair=pairs())
def test_gaps_stay_in_their_range_and_vanish_at_the_target(name, pair):
    p, q = pair
    value = GAPS[name](p, q)
    assert 0 <= value <= UPPER_BOUND[name](len(p)) + 1e-12
    assert GAPS[name](q, q) == pytest.approx(0, abs=1e-12)
    assert GAPS[name](torch.full((len(p),), 1 / len(p)), None) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", GAPS)
@given(pair=pairs(), data=st.data())
def test_gaps_do_not_depend_on_the_order_of_groups(name, pair, data):
    p, q = pair
    order = data.draw(st.permutations(range(len(p))))
    torch.testing.assert_close(GAPS[name](p[order], q[order]), GAPS[name](p, q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", GAPS)
@given(pair=pairs())
def test_gaps_agree_with_their_formulas(name, pair):
    p, q = pair
    assert GAPS[name](p, q).item() == pytest.approx(REFERENCE[name](p.numpy(), q.numpy()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_gaps_reach_their_largest_value_when_one_group_takes_all(K):
    p = torch.eye(K)[0]
    assert parity_gap(p) == pytest.approx(2 * (K - 1) / K**2)
    assert fairness_discrepancy(p) == pytest.approx(math.sqrt(1 - 1 / K))
    assert deviation_ratio(p) == pytest.approx(1)
    assert sdtv(p) == pytest.approx(1 - 1 / K)
    assert kl_to_target(p) == pytest.approx(math.log(K))
    assert normalised_entropy(p) == 0


@given(p=distributions())
def test_entropy_is_one_minus_the_divergence_from_parity(p):
    K = len(p)
    assert 0 <= normalised_entropy(p) <= 1
    assert normalised_entropy(p).item() == pytest.approx(1 - kl_to_target(p).item() / math.log(K), abs=1e-9)
    assert sdtv(p).item() == pytest.approx(parity_gap(p).item() * K / 2)


def test_kl_is_infinite_only_when_an_excluded_group_appears():
    assert kl_to_target(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])) == math.inf
    assert kl_to_target(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0


@pytest.mark.parametrize("gap", GAPS.values())
def test_gaps_take_leading_dimensions(gap):
    p = torch.rand(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = p / p.sum(-1, keepdim=True)
    together = gap(p, None)
    assert together.shape == (3, 4)
    assert together[2, 1].item() == pytest.approx(gap(p[2, 1], None).item())


@given(reads=distributions(rows=7), data=st.data())
def test_shares_are_a_distribution_and_ignore_the_order_of_images_and_groups(reads, data):
    groups = data.draw(st.permutations(range(reads.shape[1])))
    images = data.draw(st.permutations(range(reads.shape[0])))
    for hard in (True, False):
        shares = shares_from_reads(reads, hard)
        assert shares.sum().item() == pytest.approx(1)
        torch.testing.assert_close(shares_from_reads(reads[images][:, groups], hard), shares[groups])


def test_hard_and_soft_shares_of_a_small_case():
    reads = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    torch.testing.assert_close(shares_from_reads(reads, hard=True).tolist(), [0.625, 0.375])
    torch.testing.assert_close(shares_from_reads(reads, hard=False).tolist(), [0.55, 0.45], rtol=1e-6, atol=0)


@given(seed=st.integers(0, 2**31), groups=st.integers(2, 4))
def test_no_group_takes_from_every_group_what_it_has(seed, groups):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.rand(3, 7, groups + 1, generator=generator, dtype=torch.float64).softmax(-1)  # the last is none
    none = whole[..., -1]
    reads = whole[..., :-1] / (1 - none)[..., None]
    high = 1.2 / (groups + 1)
    assert torch.equal(unsure_rate(reads, high, none), (whole[..., :-1].amax(-1) < high).double().mean(-1))
    assert torch.equal(no_group_rate(reads, none), (whole.argmax(-1) == groups).double().mean(-1))
    nobody = torch.zeros_like(none)
    assert torch.equal(unsure_rate(reads, high, nobody), unsure_rate(reads, high))
    assert not no_group_rate(reads, nobody).any()
    assert unsure_rate(reads, high, nobody + 1).eq(1).all() and no_group_rate(reads, nobody + 1).eq(1).all()


def test_probabilities_of_no_group_that_do_not_fit_are_refused():
    reads = torch.tensor([[0.9, 0.1]])
    for wrong in (torch.tensor([0.1, 0.2]), torch.tensor([1.5]), torch.tensor([float("nan")])):
        with pytest.raises(InputError, match="no group"):
            unsure_rate(reads, no_group=wrong)
        with pytest.raises(InputError, match="no group"):
            no_group_rate(reads, wrong)


def test_unsure_rate_counts_images_whose_top_group_is_below_the_bound():
    reads = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.25, 0.75], [0.05, 0.95]])
    assert unsure_rate(reads) == 0.5
    assert unsure_rate(reads, high=0.92) == 0.75
    assert unsure_rate(reads.flip(-1)) == unsure_rate(reads)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0.5, 0.6]),
        torch.tensor([1.5, -0.5]),
        torch.tensor([float("nan"), 1.0]),
        torch.tensor([1.0]),
        torch.tensor(1.0),
    ],
)
@pytest.mark.parametrize("gap", GAPS.values())
def test_what_is_no_distribution_is_refused(gap, bad):
    with pytest.raises(InputError, match="expected"):
        gap(bad, None)


def test_targets_and_reads_of_the_wrong_form_are_refused():
    with pytest.raises(InputError, match="3 groups and the shares 2"):
        parity_gap(torch.tensor([0.5, 0.5]), torch.ones(3) / 3)
    with pytest.raises(InputError, match="at least one image"):
        shares_from_reads(torch.zeros(0, 2), hard=True)
    with pytest.raises(InputError, match="at least one image"):
        unsure_rate(torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match=r"high is 1\.5"):
        unsure_rate(torch.tensor([[0.5, 0.5]]), high=1.5)
