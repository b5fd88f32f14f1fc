"""Comparison: every figure against another way to come by it, and what chance shows against chance itself."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom, spearmanr

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.diff import compare, cosine, differences, expected_jaccard, jaccard, largest, spearman
from stereoclinic.sns.mask import NeuronMask

SITES = [Site("a.ff.net.2", "ff", 60), Site("a.to_out.0", "attention", 30), Site("b.conv2", "conv", 30)]
N = 120
EDGES = torch.tensor([1000.0, 600.0, 0.0])


def made(seed, edges=EDGES, groups=(), **options):
    """Half of its neurons damped, by different amounts."""
    g = torch.Generator().manual_seed(seed)
    factors = torch.rand((*([len(groups)] * bool(groups)), len(edges) - 1, N), generator=g) * 2
    return NeuronMask(SITES, edges, factors.clamp(max=1), groups=groups, **options)


def located(seed, empty=None):
    g = torch.Generator().manual_seed(seed)
    count = torch.full((2, 2), 4.0, dtype=torch.float64)
    if empty is not None:
        count[:, empty] = 0
    zeros = torch.zeros(2, 2, 2, N, dtype=torch.float64)
    rows = torch.randn(2, 2, N, generator=g, dtype=torch.float64)
    return Relevance(
        SITES, ("female", "male"), ["doctor", "nurse"], EDGES, count, zeros[..., 0], zeros[..., 0], zeros, rows,
        rows[0].square(), zeros[:, :, 0], zeros[0], {"axis": "gender", "seeds": [seed, seed]},
    )  # fmt: skip


@given(st.integers(0, 10**6), st.integers(3, 50), st.integers(1, 6))
def test_rank_correlation_is_that_of_scipy_with_ties(seed, n, values):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, values, (2, n), generator=g).double()
    ours = spearman(x, y)
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 1.0, 1.0, 5.0]])
def test_the_noise_of_a_rank_correlation_is_its_spread_over_all_orders(x):
    x, y = torch.tensor(x), torch.tensor([3.0, 0.0, 0.0, 2.0, 9.0, 9.0])
    values = [spearman(x, torch.tensor(order)) for order in itertools.permutations(y.tolist())]
    assert np.std(values) == pytest.approx(1 / 5**0.5)
    assert np.mean(values) == pytest.approx(0, abs=1e-12)


def test_the_cosine_by_chance_is_its_mean_over_random_orders():
    a, b = made(1), made(2)
    g = torch.Generator().manual_seed(0)
    x, y = a.damping[0].double(), b.damping[0].double()
    drawn = [cosine(x, y[torch.randperm(N, generator=g)]) for _ in range(2000)]
    assert compare(a, b)["bins"][0]["cosine"]["chance"] == pytest.approx(np.mean(drawn), abs=0.005)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_the_overlap_by_chance_is_the_hypergeometric_mean(sizes):
    m, n, size = sizes
    if m + n == 0:
        assert expected_jaccard(m, n, size) is None
        return
    law = hypergeom(size, m, n)
    expected = sum(law.pmf(k) * k / (m + n - k) for k in range(max(0, m + n - size), min(m, n) + 1))
    assert expected_jaccard(m, n, size) == pytest.approx(expected, abs=1e-10)
    assert expected_jaccard(n, m, size) == pytest.approx(expected_jaccard(m, n, size))


def test_the_overlap_by_chance_at_the_size_of_a_large_model():
    assert expected_jaccard(1000, 1000, 100_000) == pytest.approx(10 / 1990, rel=0.01)
    assert expected_jaccard(5, 100_000, 100_000) == pytest.approx(5 / 100_000)


@given(st.integers(0, 10**6))
def test_overlap_is_that_of_sets(seed):
    a, b = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)) < 0.3
    ours, theirs = (set(x.nonzero().flatten().tolist()) for x in (a, b))
    assert jaccard(a, b) == (len(ours & theirs) / len(ours | theirs) if ours | theirs else None)


def test_the_largest_are_not_defined_where_more_tie_and_leave_out_what_is_below_the_floor():
    x = torch.tensor([0.0, 5.0, 3.0, 3.0, 1.0, -2.0])
    assert largest(x, 0.2, 0.0).tolist() == [False, True, False, False, False, False]
    assert largest(x, 0.34, 0.0) is None
    assert largest(x, 0.5, 0.0).tolist() == [False, True, True, True, False, False]
    assert largest(x, 1.0, 0.0).tolist() == [False, True, True, True, True, False]
    assert not largest(torch.zeros(5), 0.2, 0.0).any()


@pytest.mark.parametrize("make", [made, located])
def test_a_file_is_like_itself(make):
    found = compare(make(3), make(3))
    assert found["made"] == []
    for row in (found["all"], *found["kinds"], *found["bins"]):
        assert row["overlap"]["jaccard"] == 1
        assert all(top["jaccard"] == 1 for top in row["top"])
        assert row["spearman"]["value"] == pytest.approx(1)
        assert row["cosine"]["value"] == pytest.approx(1)
        assert row["a"] == row["b"]
    assert [row["kind"] for row in found["kinds"]] == ["ff", "attention", "conv"]
    assert sum(row["neurons"] for row in found["kinds"]) == found["all"]["neurons"] == N
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("make", [made, located])
def test_which_comes_first_does_not_matter(make):
    one, other = compare(make(1), make(2)), compare(make(2), make(1))
    for row, mirrored in zip((one["all"], *one["bins"]), (other["all"], *other["bins"]), strict=True):
        assert (row["a"], row["b"]) == (mirrored["b"], mirrored["a"])
        assert row["spearman"]["value"] == pytest.approx(mirrored["spearman"]["value"])
        assert row["overlap"]["jaccard"] == mirrored["overlap"]["jaccard"]
        assert row["cosine"] == pytest.approx(mirrored["cosine"])


def test_unrelated_files_show_what_chance_would():
    found = compare(made(1), made(2))["all"]
    assert abs(found["spearman"]["value"]) < 3 * found["spearman"]["noise"]
    assert found["overlap"]["jaccard"] == pytest.approx(found["overlap"]["chance"], abs=0.15)
    assert found["cosine"]["value"] == pytest.approx(found["cosine"]["chance"], abs=0.15)


def test_bins_are_refined_and_cutting_one_changes_nothing_else():
    a, b = made(1), made(2)
    cut = replace(b, bin_edges=torch.tensor([1000.0, 600.0, 200.0, 0.0]), factors=b.factors[[0, 1, 1]])
    whole, fine = compare(a, b), compare(a, cut)
    assert [(row["from"], row["to"]) for row in fine["bins"]] == [(1000, 600), (600, 200), (200, 0)]
    for t, old in enumerate((0, 1, 1)):
        assert fine["bins"][t] == {**whole["bins"][old], "from": fine["bins"][t]["from"], "to": fine["bins"][t]["to"]}
    assert fine["all"]["a"]["sum"] == pytest.approx(whole["all"]["a"]["sum"])
    assert fine["all"]["spearman"]["value"] == pytest.approx(whole["all"]["spearman"]["value"])
    assert fine["made"] == [{"name": "bin edges", "a": [1000, 600, 0], "b": [1000, 600, 200, 0]}]


def test_timesteps_that_a_mask_does_not_reach_are_not_damped():
    short = made(1, edges=torch.tensor([1000.0, 600.0]))
    found = compare(short, made(2))
    assert found["bins"][1]["a"] == {"sum": 0, "set": 0}
    assert found["bins"][1]["spearman"]["value"] is None
    assert found["bins"][1]["overlap"]["jaccard"] == 0
    assert found["all"]["a"]["sum"] == pytest.approx(0.4 * found["bins"][0]["a"]["sum"])


def test_timesteps_without_relevance_are_left_out():
    found = compare(located(1, empty=1), located(2))
    assert found["bins"][1] == {"from": 600, "to": 0}
    for name in ("overlap", "top"):
        assert found["all"][name] == found["bins"][0][name]
    for name in ("spearman", "cosine"):
        assert found["all"][name] == pytest.approx(found["bins"][0][name])
    json.dumps(found, allow_nan=False)


def test_neurons_are_matched_by_their_site_whatever_the_order():
    a = made(1)
    order = torch.cat([torch.arange(90, 120), torch.arange(60)])  # conv, then ff; attention is missing
    b = NeuronMask([SITES[2], SITES[0]], EDGES, a.factors[:, order])
    found = compare(a, b)
    assert found["sites"] == {"common": 2, "a": 1, "b": 0}
    assert found["all"]["neurons"] == 90
    assert found["all"]["overlap"]["jaccard"] == 1
    nothing = compare(a, NeuronMask([Site("a.ff.net.2", "ff", N)], EDGES, a.factors))
    assert nothing["all"] is None
    assert nothing["kinds"] == nothing["bins"] == []
    assert nothing["sites"] == {"common": 0, "a": 3, "b": 1}


def test_masks_that_allocate_are_compared_group_by_group_and_on_the_whole():
    groups = ("female", "male")
    a, b = made(1, groups=groups), made(2, groups=groups)
    found = compare(a, b)
    assert [row["group"] for row in found["groups"]] == list(groups)
    for name, row in zip(groups, found["groups"], strict=True):
        assert row == {"group": name, **compare(a.group(name), b.group(name))["all"]}
    assert found["all"]["a"]["sum"] == pytest.approx(sum(row["a"]["sum"] for row in found["groups"]) / 2)
    assert found["all"]["a"]["set"] == int((a.factors < 0.999).any(0).any(0).sum())
    plain = compare(a, made(2))
    assert plain["groups"] == []
    assert {"name": "allocates to", "a": ["female", "male"], "b": []} in plain["made"]


def test_sites_are_counted_as_asked():
    found = compare(made(1), made(2), lambda site: site.name[0])
    assert [(row["kind"], row["neurons"]) for row in found["kinds"]] == [("a", 90), ("b", 30)]


def test_what_differs_is_listed_and_forecasts_are_not():
    one = {
        "axis": "gender",
        "selection": {"mu": 1.0, "bins": [{"lean": 1}]},
        "versions": {"torch": "2"},
        "seeds": [0, 3],
    }
    other = {"axis": "gender", "selection": {"mu": 4.0, "bins": [{"lean": 2}]}, "seeds": [0, 3]}
    found = compare(made(1, metadata=one), made(1, metadata=other, branch="conditional"))
    assert found["made"] == [
        {"name": "branch", "a": "both", "b": "conditional"},
        {"name": "selection.mu", "a": 1.0, "b": 4.0},
        {"name": "versions.torch", "a": "2", "b": None},
    ]
    assert differences({}, {}) == []


def test_a_mask_and_relevance_are_refused():
    with pytest.raises(InputError, match="give two masks, or two relevance files"):
        compare(made(1), located(1))
