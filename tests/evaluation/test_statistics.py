"""Laws of the intervals and tests, their coverage on simulated data, and exact figures of the noise floor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.statistics import resampling
from stereoclinic.statistics.intervals import (
    NoiseFloor,
    bootstrap_interval,
    correlation_interval,
    noise_floor,
    paired_difference_interval,
    share_statistic,
    two_samples_floor,
    wilson_interval,
)
from stereoclinic.statistics.resampling import dirichlet
from stereoclinic.statistics.shares import (
    GAPS,
    deviation_ratio,
    fairness_discrepancy,
    parity_gap,
    sdtv,
    shares_from_reads,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled_reads(shares: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Sure reads (P, n, K) of images drawn from each prompt's shares (P, K)."""
    groups = torch.multinomial(shares, n, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(groups, shares.shape[1]).double()


def first_share(reads: torch.Tensor) -> torch.Tensor:
    """Mean over prompts of the first group's share, a statistic without the bias of an absolute value."""
    return reads[..., 0].mean((-1, -2))


def test_share_statistic_averages_gaps_or_pools_shares():
    reads = torch.tensor([[[1.0, 0.0], [0.8, 0.2]], [[0.0, 1.0], [0.2, 0.8]]])
    assert share_statistic(parity_gap)(reads) == pytest.approx(0.5)
    assert share_statistic(parity_gap, hard=False)(reads) == pytest.approx(0.4)
    assert share_statistic(parity_gap, pooled=True)(reads) == pytest.approx(0)
    assert share_statistic(parity_gap, torch.tensor([1.0, 0.0]), pooled=True)(reads) == pytest.approx(0.5)


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_bootstrap_brackets_a_share_and_is_reproducible(seed, K):
    reads = torch.rand(3, 8, K, generator=seeded(seed), dtype=torch.float64)
    reads = reads / reads.sum(-1, keepdim=True)
    interval = bootstrap_interval(reads, first_share, resamples=200, generator=seeded(seed))
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval == bootstrap_interval(reads, first_share, resamples=200, generator=seeded(seed))
    assert interval.estimate == first_share(reads).item()


def test_bootstrap_is_stratified():
    """Prompts that never vary leave no uncertainty, however different they are from each other."""
    reads = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 20, 2)
    interval = bootstrap_interval(reads, first_share, resamples=100)
    assert (interval.low, interval.estimate, interval.high) == (0.5, 0.5, 0.5)


def test_bootstrap_interval_agrees_with_a_loop_in_numpy():
    reads = sampled_reads(torch.tensor([[0.7, 0.3], [0.2, 0.8]]), 60, seeded(0))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        prompts = [prompt[rng.integers(0, 60, 60)].mean(0) for prompt in reads.numpy()]
        draws.append(np.mean([np.abs(p - 0.5).mean() for p in prompts]))
    interval = bootstrap_interval(reads, share_statistic(parity_gap), resamples=4000)
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.008)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.008)


def test_intervals_narrow_with_images():
    shares = torch.tensor([[0.7, 0.3]])
    few, many = (bootstrap_interval(sampled_reads(shares, n, seeded(1)), first_share, resamples=500) for n in (25, 400))
    assert few.high - few.low > 2 * (many.high - many.low)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    shares = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    truth, generator = shares[:, 0].mean().item(), seeded(2)
    covered = 0
    for _ in range(300):
        reads = sampled_reads(shares, 50, generator)
        interval = bootstrap_interval(reads, first_share, resamples=400, generator=generator)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_paired_interval_covers_the_truth_and_the_test_keeps_its_level():
    """After keeps half the images of before, so the sides are correlated, and both have the same shares."""
    shares, generator = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64), seeded(3)
    covered = rejected = 0
    for _ in range(300):
        before, fresh = sampled_reads(shares, 40, generator), sampled_reads(shares, 40, generator)
        keep = torch.rand(2, 40, 1, generator=generator) < 0.5
        paired = paired_difference_interval(
            before, torch.where(keep, before, fresh), first_share, resamples=300, generator=generator
        )
        covered += paired.low <= 0 <= paired.high
        rejected += paired.p_value <= 0.05
    assert 0.90 <= covered / 300 <= 0.99
    assert rejected / 300 <= 0.09


@given(seed=st.integers(0, 2**31))
def test_a_side_compared_with_itself_shows_no_difference(seed):
    reads = sampled_reads(torch.tensor([[0.7, 0.3], [0.4, 0.6]]), 10, seeded(seed))
    paired = paired_difference_interval(reads, reads, share_statistic(parity_gap), resamples=50)
    assert (paired.estimate, paired.low, paired.high, paired.p_value) == (0, 0, 0, 1)


@given(seed=st.integers(0, 2**31))
def test_exchanging_before_and_after_mirrors_the_result(seed):
    before = sampled_reads(torch.tensor([[0.8, 0.2]] * 3), 12, seeded(seed))
    after = sampled_reads(torch.tensor([[0.5, 0.5]] * 3), 12, seeded(seed + 1))
    settings = {"statistic": share_statistic(parity_gap), "resamples": 200}
    one, other = (
        paired_difference_interval(*sides, **settings, generator=seeded(seed))
        for sides in ((before, after), (after, before))
    )
    assert (one.estimate, one.low, one.high) == pytest.approx((-other.estimate, -other.high, -other.low), abs=1e-12)
    assert one.p_value == other.p_value


def test_a_large_change_is_found():
    before = sampled_reads(torch.tensor([[0.9, 0.1]] * 4), 50, seeded(4))
    after = sampled_reads(torch.tensor([[0.5, 0.5]] * 4), 50, seeded(5))
    change = paired_difference_interval(before, after, share_statistic(parity_gap))
    assert change.high < 0 and change.p_value < 0.001


def test_the_sign_flip_p_value_is_that_of_all_flips():
    before = sampled_reads(torch.tensor([[0.9, 0.1]] * 2), 4, seeded(6))
    after = sampled_reads(torch.tensor([[0.4, 0.6]] * 2), 4, seeded(8))
    difference = (after - before)[..., 0].flatten()
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(difference))).reshape(len(difference), -1)
    flips = np.abs(signs.T @ difference.numpy())
    exact = (flips >= abs(difference.sum().item()) - 1e-9).mean()
    paired = paired_difference_interval(before, after, first_share, resamples=5000)
    assert paired.p_value == pytest.approx(exact, abs=0.03)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_brackets_the_proportion_within_zero_and_one_and_mirrors(n, data):
    successes = data.draw(st.integers(0, n))
    interval, mirror = wilson_interval(successes, n), wilson_interval(n - successes, n)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)


def test_the_interval_of_a_correlation_is_that_of_fisher():
    generator = torch.Generator().manual_seed(0)
    for n in (4, 12, 100):
        x, noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
        y = x + 0.5 * noise
        found, r = correlation_interval(x, y), torch.corrcoef(torch.stack([x, y]))[0, 1].item()
        ends = [math.tanh(math.atanh(r) + sign * 1.959964 / math.sqrt(n - 3)) for sign in (-1, 1)]
        assert (found.estimate, found.low, found.high) == pytest.approx((r, *ends))
    line = correlation_interval(x, 3 * x)
    assert line.estimate == pytest.approx(1) and 0.99 < line.low <= line.high <= 1
    for x, y in ((torch.arange(3.0), torch.arange(3.0)), (torch.ones(9), torch.arange(9.0))):
        with pytest.raises(InputError, match="4 or more, of two things that vary"):
            correlation_interval(x, y)


def test_wilson_agrees_with_scipy():
    from scipy.stats import binomtest

    for successes, n in ((0, 10), (3, 10), (81, 263), (50, 50)):
        reference = binomtest(successes, n).proportion_ci(0.95, method="wilson")
        interval = wilson_interval(successes, n)
        assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


@pytest.mark.parametrize(
    ("metric", "known"), [(fairness_discrepancy, 0.055), (deviation_ratio, 0.078), (parity_gap, 0.039)]
)
def test_noise_floor_of_a_hundred_images_and_two_groups(metric, known):
    """The exact mean of |share - 1/2| is C(100, 50) / 2^101; the known figures are simulated ones."""
    half = math.comb(100, 50) / 2**101
    scale = metric(torch.tensor([0.6, 0.4])).item() / 0.1
    floor = noise_floor(100, 2, 12, metric)
    assert floor.mean == pytest.approx(scale * half, rel=0.01)
    assert floor.mean == pytest.approx(known, abs=0.002)
    assert floor.mean < floor.upper


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("target", [None, [0.2, 0.5, 0.3], [0.6, 0.0, 0.4]])
def test_noise_floor_agrees_with_multinomial_draws_in_numpy(name, target):
    target = None if target is None else torch.tensor(target, dtype=torch.float64)
    expected = np.full(3, 1 / 3) if target is None else target.numpy()
    shares = np.random.default_rng(0).multinomial(20, expected, size=(4000, 2)) / 20
    values = GAPS[name](torch.from_numpy(shares), target).mean(-1)
    floor = noise_floor(20, 3, 2, GAPS[name], target)
    assert floor.mean == pytest.approx(values.mean().item(), rel=0.05)
    assert floor.upper == pytest.approx(values.quantile(0.95).item(), rel=0.1)


def test_noise_floor_falls_with_images_and_its_bound_with_prompts():
    base, images, prompts = (noise_floor(n, 3, P, parity_gap) for n, P in ((25, 1), (100, 1), (25, 16)))
    assert images.mean == pytest.approx(base.mean / 2, rel=0.1)
    assert prompts.mean == pytest.approx(base.mean, rel=0.05)
    assert prompts.upper < base.upper


def test_the_floor_of_two_samples_is_what_drawing_them_image_by_image_shows():
    """Three groups, two prompts of ten images; a group that was not seen is not drawn."""
    reads = torch.nn.functional.one_hot(torch.tensor([[0] * 5 + [1] * 3 + [2] * 2, [0] + [2] * 9])).double()
    drawn = sampled_reads(reads.mean(1), 10 * 2 * 4000, seeded(1)).reshape(2, 10, 2, 4000, 3).mean(1)
    apart = (drawn[:, 0] - drawn[:, 1]).abs().sum(-1).mean(0) / 2
    floor = two_samples_floor(reads)
    assert floor.mean == pytest.approx(apart.mean().item(), rel=0.03)
    # These distances are multiples of 0.05, and many fall on the bound.
    assert (apart > floor.upper + 1e-9).double().mean() <= 0.05 <= (apart > floor.upper - 1e-9).double().mean()
    soft = 0.7 * reads + 0.1  # the top groups count
    assert two_samples_floor(soft) == floor


def test_two_samples_of_certain_shares_are_not_apart():
    certain = torch.eye(3)[torch.tensor([0, 2])][:, None].expand(-1, 25, -1)
    assert two_samples_floor(certain) == NoiseFloor(0.0, 0.0)


def test_the_floor_of_two_samples_is_how_far_other_seeds_drift():
    """Twelve prompts of a hundred images, drawn untreated and on other seeds; the floor knows the untreated ones."""
    shares = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    shares = torch.stack([shares, 1 - shares], 1)
    runs = [[sampled_reads(shares, 100, seeded(seed)) for seed in (2 * i, 2 * i + 1)] for i in range(300)]
    drifts = [sdtv(*(shares_from_reads(reads, hard=True) for reads in run)).mean().item() for run in runs]
    floors = [two_samples_floor(untreated, 400) for untreated, _ in runs]
    assert np.mean(drifts) == pytest.approx(np.mean([floor.mean for floor in floors]), rel=0.03)
    above = np.mean([drift > floor.upper for drift, floor in zip(drifts, floors, strict=True)])
    assert 0.02 < above < 0.09


def test_the_floor_of_two_samples_falls_with_images_and_does_not_depend_on_how_they_are_cut(monkeypatch):
    reads = sampled_reads(torch.full((4, 2), 0.5, dtype=torch.float64), 100, seeded(3))
    few, many = two_samples_floor(reads[:, :25]), two_samples_floor(reads)
    assert many.mean == pytest.approx(few.mean / 2, rel=0.1) and many.upper < few.upper
    monkeypatch.setattr(resampling, "CHUNK_NUMBERS", 80)  # ten pairs at a time
    assert two_samples_floor(reads).mean == pytest.approx(many.mean, rel=0.03)


def test_shares_are_drawn_round_what_was_counted_and_leave_room_for_what_was_not():
    counts = torch.tensor([[40.0, 60.0], [100.0, 0.0]])
    drawn = dirichlet(counts, 4000, seeded(9))
    assert drawn.shape == (4000, 2, 2)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(4000, 2, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0), (counts.double() + 0.5) / 101, atol=0.004, rtol=0)
    assert drawn[:, 0, 0].std() == pytest.approx((0.4 * 0.6 / 102) ** 0.5, rel=0.05)
    assert drawn[:, 1, 1].min() > 0
    assert torch.equal(drawn, dirichlet(counts, 4000, seeded(9)))


def test_wrong_input_is_refused():
    reads = torch.full((2, 3, 2), 0.5)
    with pytest.raises(InputError, match=r"expected \(P, n, K\)"):
        bootstrap_interval(reads[0], first_share)
    with pytest.raises(InputError, match="0 random draws"):
        bootstrap_interval(reads, first_share, resamples=0)
    with pytest.raises(InputError, match="same prompts and seeds"):
        paired_difference_interval(reads, reads[:1], first_share)
    with pytest.raises(InputError, match="4 successes of 3"):
        wilson_interval(4, 3)
    with pytest.raises(InputError, match="n = 0 images"):
        noise_floor(0, 2, 1, parity_gap)
    with pytest.raises(InputError, match=r"expected \(3,\)"):
        noise_floor(10, 3, 1, parity_gap, torch.tensor([0.5, 0.5]))
