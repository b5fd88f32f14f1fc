"""The plan: the solver against scipy's, and what the planned damping must do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.linear import bounded_least_squares, most_useful, treatment_plan

SITES = [Site("a.ff.net.2", "ff", 12), Site("b.conv2", "conv", 8)]
P, T, K, R, N = 4, 3, 2, 2, 20
EDGES = torch.tensor([1000.0, 600.0, 300.0, 0.0])


def make(collateral=0.02, seed=0, empty=None):
    """Leans that their relevance explains, so that damping can take them away."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(3, 9, (P, T), generator=g).double()
    share = torch.rand(T, K, N, generator=g, dtype=torch.float64) / 5
    direction = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
    bias = torch.linspace(-1, 1.2, P, dtype=torch.float64)[:, None, None, None]
    noise = 0.01 * torch.randn(P, T, K, N, generator=g, dtype=torch.float64)
    rows = bias * direction * share + noise
    lean = 0.8 * rows.sum(-1)
    off = collateral * torch.randn(P, T, R, N, generator=g, dtype=torch.float64) / R**0.5
    if empty is not None:
        count[:, empty] = 0
    n = count[..., None]
    return Relevance(
        SITES,
        ("female", "male"),
        [f"occupation {p}" for p in range(P)],
        EDGES,
        count,
        lean * n,
        lean.square() * n,
        rows * n[..., None],
        torch.zeros(P, T, N, dtype=torch.float64),
        torch.zeros(T, N, dtype=torch.float64),
        off * n.sqrt()[..., None],
        torch.zeros(K, T, N, dtype=torch.float64),
        {"axis": "gender"},
    )


def objective(M, b, x, ridge):
    return ((b - M @ x).square().sum() + (ridge * x.square()).sum()).item()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.0, 0.1, 3.0]))
def test_the_solver_agrees_with_scipy(seed, rows, neurons, mu):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, neurons, generator=g, dtype=torch.float64)
    A *= torch.logspace(-2, 1, neurons, dtype=torch.float64)  # columns of very different size, as relevance has
    S = 3 * torch.randn(rows, generator=g, dtype=torch.float64)
    M = torch.cat([A, mu**0.5 * torch.randn(3, neurons, generator=g, dtype=torch.float64)])
    b = torch.cat([S, torch.zeros(3, dtype=torch.float64)])
    ridge = mu * torch.rand(neurons, generator=g, dtype=torch.float64)
    x = bounded_least_squares(M, b, ridge, iterations=20_000)
    assert ((x >= 0) & (x <= 1)).all()
    whole = torch.cat([M, ridge.sqrt().diag()])
    right = np.concatenate([b.numpy(), np.zeros(neurons)])
    known = torch.from_numpy(lsq_linear(whole.numpy(), right, (0, 1), tol=1e-13, max_iter=2000).x)
    best = objective(M, b, known, ridge)
    assert objective(M, b, x, ridge) <= best + 2e-7 * S.square().sum().item() + 1e-12


def test_the_minimum_is_found_exactly_where_it_is_known():
    M = torch.diag(torch.tensor([1.0, 2.0, 1.0, 0.0]))
    b = torch.tensor([0.5, 6.0, -1.0, 0.0])
    x = bounded_least_squares(M, b, torch.zeros(4), tolerance=1e-14)
    torch.testing.assert_close(x, torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("per_bin", [True, False])
def test_the_plan_brings_down_every_label_in_every_bin(per_bin):
    relevance = make()
    mask = treatment_plan(relevance, mu=0.01, per_bin=per_bin)
    before = relevance.lean()
    after = before - (relevance.rows() @ mask.damping.double()[None, :, :, None])[..., 0]
    assert (after.abs() < 0.35 * before.abs() + 0.03).all()
    for t, line in enumerate(mask.metadata["selection"]["bins"]):
        assert line["lean_before"] == pytest.approx(before[:, t].abs().mean().item())
        assert line["lean_after"] == pytest.approx(after[:, t].abs().mean().item(), abs=1e-5)
        assert line["off_axis"] > 0
    assert mask.metadata["axis"] == "gender"
    if not per_bin:
        assert torch.equal(mask.factors[0], mask.factors[1])


def test_a_higher_price_moves_less_and_leaves_more_lean():
    lines = [treatment_plan(make(), mu).metadata["selection"]["bins"] for mu in (0.0, 0.1, 10.0, 1000.0)]
    for key, sign in (("off_axis", -1), ("lean_after", 1)):
        values = [sum(line[key] for line in bins) for bins in lines]
        assert sorted(values, key=lambda v: sign * v) == values


@pytest.mark.parametrize("per_bin", [True, False])
def test_an_infinite_price_damps_only_neurons_without_collateral(per_bin):
    relevance = make()
    free = torch.zeros(N, dtype=torch.bool)
    free[[3, 15]] = True
    relevance.collateral[..., free] = 0.0
    damping = treatment_plan(relevance, mu=1e10, per_bin=per_bin).damping
    assert damping[:, ~free].max() < 1e-5
    assert damping[:, free].max() > 0.1


def test_kinds_window_and_empty_bins():
    by_kind = treatment_plan(make(), 0.01, kinds=["conv"])
    assert (by_kind.damping[:, :12] == 0).all()
    assert (by_kind.damping[:, 12:] > 0).any(1).all()
    late = treatment_plan(make(), 0.01, window=(500, 0))
    assert late.bin_edges.tolist() == [1000, 600, 500, 300, 0]
    assert (late.damping > 0).any(1).tolist() == [False, False, True, True]
    apart = treatment_plan(make(empty=1), 0.01)
    assert (apart.damping > 0).any(1).tolist() == [True, False, True]
    assert apart.metadata["selection"]["bins"][1]["lean_before"] is None
    assert (treatment_plan(make(empty=1), 0.01, per_bin=False).damping > 0).any(1).all()
    with pytest.raises(InputError, match="no sample"):
        treatment_plan(make(empty=1), 0.01, window=(600, 300))


def test_more_copies_of_the_same_groups_do_not_change_the_plan():
    relevance = make()
    twice = Relevance(
        relevance.sites,
        ("a", "b", "c", "d"),
        relevance.labels,
        relevance.bin_edges,
        relevance.count,
        relevance.lean_sum.repeat(1, 1, 2),
        relevance.lean_sq.repeat(1, 1, 2),
        relevance.relevance_sum.repeat(1, 1, 2, 1),
        relevance.stereotype_sum,
        relevance.stereotype_sq,
        relevance.collateral,
        relevance.root_sum.repeat(2, 1, 1),
    )
    torch.testing.assert_close(
        treatment_plan(twice, 1.0).factors, treatment_plan(relevance, 1.0).factors, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mu": -1.0}, "mu -1.0: expected 0 or a positive number"),
        ({"mu": math.nan}, "mu nan"),
        ({"mu": 1.0, "overshoot": -0.5}, "overshoot -0.5"),
        ({"mu": 1.0, "at_most": 0}, "at_most 0"),
        ({"mu": 1.0, "root": "x"}, "root 'x'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        treatment_plan(make(), **arguments)


def test_overshoot_plans_past_the_target():
    """A fifth more than all: what is left of each lean has changed its sign."""
    relevance = make(collateral=0.0)
    rows, leans = relevance.rows()[:, 0], relevance.lean()[:, 0]
    for overshoot in (0.0, 0.2):  # the rows can take away 1.25 times the lean at most
        damping = treatment_plan(relevance, 0.0, overshoot=overshoot).damping[0].double()
        left = leans - rows @ damping
        torch.testing.assert_close(left, -overshoot * leans, atol=0.05, rtol=0)


def planned(mask, relevance, mu=0.05):
    """What the plan minimises, over all bins."""
    rows, leans = relevance.rows(), relevance.lean()
    total = 0.0
    for t, x in enumerate(mask.damping.double()):
        V = (relevance.collateral[:, t] / relevance.count[:, t].sqrt()[:, None, None]).flatten(0, 1)
        own = V.square().sum(0) @ x.square()
        total += (leans[:, t] - rows[:, t] @ x).square().sum().item() / K
        total += mu * (0.5 * (V @ x).square().sum() + 0.5 * own).item()
    return total


@pytest.mark.parametrize("per_bin", [True, False])
def test_a_sparse_plan_damps_at_most_so_many_and_does_what_it_can_with_them(per_bin):
    relevance = make(collateral=0.2)
    full = treatment_plan(relevance, 0.05, per_bin=per_bin)
    same = treatment_plan(relevance, 0.05, per_bin=per_bin, at_most=N)
    assert torch.equal(same.factors, full.factors)
    last = planned(full, relevance)
    for at_most in (10, 5, 2, 1):
        mask = treatment_plan(relevance, 0.05, per_bin=per_bin, at_most=at_most)
        assert (mask.damping > 0).any(0).sum() <= at_most
        assert mask.metadata["selection"]["at_most"] == at_most
        assert planned(mask, relevance) >= last - 1e-5  # fewer do no better
        last = planned(mask, relevance)
        cut = full.damping.clone()
        cut[:, full.damping.sum(0).argsort(descending=True)[at_most:]] = 0
        assert last <= planned(replace(full, factors=1 - cut), relevance) + 1e-5  # nor worse than a plan cut short


@pytest.mark.parametrize("at_most", [1, 2, 3])
def test_of_neurons_that_do_not_meet_the_best_are_kept(at_most):
    """Each label has a neuron of its own: what it is worth is the square of its label's lean."""
    relevance = make(collateral=0.0)
    rows = torch.zeros_like(relevance.relevance_sum)
    for p in range(P):
        rows[p, :, 0, 3 * p] = 2 * relevance.lean()[p, :, 0] * relevance.count[p]
    alone = replace(relevance, relevance_sum=rows, collateral=torch.zeros_like(relevance.collateral))
    best = relevance.lean()[..., 0].square().sum(1).argsort(descending=True)[:at_most]
    damped = (treatment_plan(alone, 0.0, at_most=at_most).damping > 0.4).any(0).nonzero().flatten()
    assert damped.tolist() == sorted((3 * best).tolist())


def turned(relevance, chosen):
    """What is left of |lean - target| over labels, bins and groups, by the best damping of the chosen neurons alone."""
    left = []
    for t in range(T):
        rows, leans = relevance.rows()[:, t].flatten(0, 1), relevance.lean()[:, t].flatten()
        for target in (1.0, -1.0):
            short = leans - torch.tensor([target, -target], dtype=torch.float64).repeat(P)
            A = rows[:, chosen]
            x = bounded_least_squares(A, short, torch.zeros(A.shape[1]))
            left.append((short - A @ x).square().mean())
    return torch.stack(left).mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_useful_neurons_turn_leans_further_than_others(seed):
    relevance = make(seed=seed)
    chosen = most_useful(relevance, 0.25, None, 0.01, True)
    assert chosen.sum() == 5
    g = torch.Generator().manual_seed(seed)
    others = [turned(relevance, torch.randperm(N, generator=g)[:5]) for _ in range(20)]
    assert turned(relevance, chosen) < min(others)


def test_a_neuron_of_the_axis_itself_is_useful_though_it_is_against_the_stereotype_of_half_of_the_labels():
    relevance = make()
    rows, n = relevance.rows().clone(), relevance.count[..., None, None]
    rows[..., 7] = torch.tensor([0.4, -0.4], dtype=torch.float64)  # it says female for every label
    axis = replace(relevance, relevance_sum=rows * n)
    assert most_useful(axis, 1, None, 1.0, True)[7]
    window = (1000.0, 600.0)
    assert most_useful(axis, 0.05, window, 1.0, True).nonzero().flatten().tolist() == [7]


def test_neurons_are_useful_in_a_window_and_in_a_share():
    relevance = make()
    with pytest.raises(InputError, match="a fraction goes from above 0 to 1"):
        most_useful(relevance, 0.0, None, 1.0, True)
    with pytest.raises(InputError, match="holds no sample"):
        most_useful(make(empty=0), 0.1, (1000.0, 600.0), 1.0, False)
    alone = replace(relevance, count=relevance.count * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    first = most_useful(alone, 0.2, None, 0.1, False)
    assert torch.equal(first, most_useful(relevance, 0.2, (1000.0, 600.0), 0.1, False))
