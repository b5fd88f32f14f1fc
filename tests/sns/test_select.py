"""Selection: sure neurons before lucky ones, and random masks that damp as much."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import neurons_of, random_like, roots_for, top_k

SITES = [Site("a.ff.net.2", "ff", 3), Site("a.to_out.0", "attention", 2), Site("b.conv2", "conv", 3)]
N = 8


def relevance_of(samples, count=None):
    """A Relevance of one label whose sign(S) R are `samples`, (n, T, N)."""
    n, bins, _ = samples.shape
    count = torch.full((1, bins), float(n), dtype=torch.float64) if count is None else count
    zeros = torch.zeros(1, bins, 2, N, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    return Relevance(
        SITES,
        ("female", "male"),
        ["doctor"],
        torch.linspace(1000, 0, bins + 1),
        count,
        torch.zeros(1, bins, 2, dtype=torch.float64),
        torch.zeros(1, bins, 2, dtype=torch.float64),
        zeros,
        samples.double().sum(0)[None],
        samples.double().square().sum(0),
        torch.zeros(1, bins, N, dtype=torch.float64),
        n * torch.randn(2, bins, N, generator=generator, dtype=torch.float64),
        {"axis": "gender"},
    )


@pytest.fixture
def samples():
    """40 samples: neuron 1 about 0.1 always, 4 is 20 once (mean 0.5), 6 always 1e-4, 7 always -1."""
    generator = torch.Generator().manual_seed(0)
    values = 0.01 * torch.randn(40, 2, N, generator=generator)
    values[..., 1] += 0.1
    values[0, :, 4] = 20.0
    values[..., 6] = 1e-4
    values[..., 7] = -1.0
    return values


@pytest.mark.parametrize("per_bin", [False, True])
def test_a_steady_neuron_ranks_before_one_that_was_large_once(samples, per_bin):
    mask = top_k(relevance_of(samples), 1, per_bin=per_bin)
    assert (mask.factors == 0).nonzero()[:, 1].tolist() == [1, 1]
    by_mean = top_k(relevance_of(samples), 1, per_bin=per_bin, z=0.0)
    assert (by_mean.factors == 0).nonzero()[:, 1].tolist() == [4, 4]
    assert mask.metadata["axis"] == "gender"
    assert mask.metadata["selection"]["k"] == 1


def test_per_bin_chooses_each_bin_by_itself_and_pooled_once_for_all(samples):
    samples[:, 1, 2] += 0.3
    apart = top_k(relevance_of(samples), 1, per_bin=True)
    assert (apart.factors == 0).nonzero().tolist() == [[0, 1], [1, 2]]
    pooled = top_k(relevance_of(samples), 2)
    assert torch.equal(pooled.factors[0], pooled.factors[1])
    assert set((pooled.factors[0] == 0).nonzero().flatten().tolist()) == {1, 2}


@given(st.integers(1, N))
def test_at_most_k_are_silenced_and_none_that_lowers_the_lean(k):
    values = torch.randn(12, 2, N, generator=torch.Generator().manual_seed(k)) + torch.linspace(-1, 2, N)
    mask = top_k(relevance_of(values), k, per_bin=True)
    for t in range(2):
        damped = mask.factors[t] < 1
        assert damped.sum() <= k
        assert (values[:, t].mean(0)[damped] > 0).all()
    assert set(mask.factors.unique().tolist()) <= {0.0, 1.0}


def test_kinds_fractions_and_windows(samples):
    relevance = relevance_of(samples + 1)
    mask = top_k(relevance, 1.0, kinds=["attention"])
    assert (mask.factors[0] == 0).nonzero().flatten().tolist() == [3, 4]
    assert (top_k(relevance, 0.25).factors[0] == 0).sum() == 2
    late = top_k(relevance, 2, window=(400, 0), per_bin=True)
    assert late.bin_edges.tolist() == [1000, 500, 400, 0]
    assert (late.factors == 0).sum(1).tolist() == [0, 0, 2]


def test_bins_without_samples_are_left_alone_per_bin(samples):
    samples[:, 1] = 0
    relevance = relevance_of(samples, torch.tensor([[40.0, 0.0]], dtype=torch.float64))
    assert (top_k(relevance, 1, per_bin=True).factors == 0).nonzero().tolist() == [[0, 1]]
    assert (top_k(relevance, 1, root="balanced").factors == 0).nonzero().tolist() == [[0, 1], [1, 1]]
    with pytest.raises(InputError, match="no sample in these timesteps"):
        top_k(relevance, 1, window=(400, 0))


def test_one_sample_ranks_by_its_mean(samples):
    assert (top_k(relevance_of(samples[:1]), 1).factors[0] == 0).nonzero().item() == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"k": 0}, "expected 1 to 8"),
        ({"k": 9}, "expected 1 to 8"),
        ({"k": 1.5}, "fraction"),
        ({"k": float("nan")}, "fraction"),
        ({"k": 1, "kinds": ["mlp"]}, "'mlp' is not known"),
        ({"k": 1, "root": "other"}, "zero, balanced, or a group: female, male"),
        ({"k": 1, "window": (0, 1000)}, "empty"),
    ],
)
def test_arguments_out_of_range_are_refused(samples, arguments, match):
    with pytest.raises(InputError, match=match):
        top_k(relevance_of(samples), **arguments)


def test_nothing_positive_is_refused(samples):
    with pytest.raises(InputError, match="positive"):
        top_k(relevance_of(-samples.abs()), 1)


def test_roots(samples):
    relevance = relevance_of(samples)
    assert roots_for(relevance, "zero") is None
    female, male = (roots_for(relevance, group) for group in relevance.groups)
    assert torch.equal(female, relevance.root_sum[0] / 40)
    torch.testing.assert_close(roots_for(relevance, "balanced"), (female + male) / 2)
    shared = roots_for(relevance, "male", per_bin=False)
    torch.testing.assert_close(shared, male.mean(0).expand(2, -1))


def test_neurons_of_a_kind_that_is_not_there():
    with pytest.raises(InputError, match="no site has kind 'conv'; choose from ff"):
        neurons_of(SITES[:1], ["conv"])


@given(st.integers(0, 2**32))
def test_random_like_keeps_the_damping_of_every_site_and_bin(seed):
    factors = torch.rand(2, N, generator=torch.Generator().manual_seed(3))
    factors[:, :2] = 1.0
    mask = NeuronMask(
        SITES, torch.tensor([1000.0, 500.0, 0.0]), factors, branch="conditional", metadata={"axis": "age"}
    )
    drawn = random_like(mask, seed)
    for _, span in mask.spans():
        assert torch.equal(drawn.factors[:, span].sort(1).values, mask.factors[:, span].sort(1).values)
    assert torch.equal(random_like(mask, seed).factors, drawn.factors)
    assert (drawn.branch, drawn.metadata["axis"]) == ("conditional", "age")


def test_random_like_differs_by_seed_and_keeps_a_shared_mask_shared():
    factors = torch.linspace(0, 1, N).expand(2, -1)
    mask = NeuronMask(SITES, torch.tensor([1000.0, 500.0, 0.0]), factors)
    drawn = [random_like(mask, seed).factors for seed in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert all(torch.equal(one[0], one[1]) for one in drawn)
