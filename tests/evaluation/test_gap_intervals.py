"""Laws of the intervals of gaps and of their changes, with coverage where percentile intervals have none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom

from stereoclinic.errors import InputError
from stereoclinic.statistics.gaps import gap_changes, gap_interval, gap_intervals
from stereoclinic.statistics.intervals import (
    bootstrap_interval,
    noise_floor,
    paired_difference_interval,
    share_statistic,
)
from stereoclinic.statistics.shares import GAPS, parity_gap


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled_reads(shares: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Sure reads (P, n, K) of images drawn from each prompt's shares (P, K)."""
    groups = torch.multinomial(shares, n, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(groups, shares.shape[1]).double()


def fair(prompts: int, K: int = 2) -> torch.Tensor:
    return torch.full((prompts, K), 1 / K, dtype=torch.float64)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), K=st.integers(2, 4), hard=st.booleans(), pooled=st.booleans())
def test_intervals_hold_the_gap_that_was_seen_and_are_reproducible(seed, K, hard, pooled):
    reads = (2 * torch.randn(3, 8, K, generator=seeded(seed), dtype=torch.float64)).softmax(-1)
    how = {"hard": hard, "pooled": pooled, "resamples": 100}
    found = gap_intervals(reads, GAPS, **how, generator=seeded(seed))
    for name, interval in found.items():
        assert 0 <= interval.low <= interval.estimate <= interval.high
        seen = share_statistic(GAPS[name], hard=hard, pooled=pooled)(reads)
        assert interval.estimate == pytest.approx(seen.item())
        assert gap_interval(reads, GAPS[name], **how, generator=seeded(seed)) == interval


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_gaps_that_say_the_same_have_the_same_interval(seed):
    reads = sampled_reads(torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.3, 0.7]]), 20, seeded(seed))
    found = gap_intervals(reads, GAPS, resamples=200)
    for name, scale in (("sdtv", 1), ("deviation_ratio", 2), ("fairness_discrepancy", math.sqrt(2))):
        for end in ("estimate", "low", "high"):
            expected = scale * getattr(found["parity_gap"], end)
            assert getattr(found[name], end) == pytest.approx(expected, abs=1e-9)


def test_a_fair_model_is_covered_where_a_percentile_interval_never_is():
    held = {"inverted": 0, "percentile": 0}
    generator = seeded(0)
    for _ in range(60):
        reads = sampled_reads(fair(12), 25, generator)
        held["inverted"] += gap_interval(reads, parity_gap, resamples=200, generator=generator).low == 0
        low = bootstrap_interval(reads, share_statistic(parity_gap), resamples=200, generator=generator).low
        held["percentile"] += low <= 0
    assert held["inverted"] >= 54
    assert held["percentile"] == 0


def test_prompts_far_from_parity_are_covered_as_a_percentile_interval_covers_them():
    shares = torch.tensor([[0.85, 0.15], [0.2, 0.8]] * 4, dtype=torch.float64)
    truth, generator, held = parity_gap(shares).mean().item(), seeded(1), 0
    for _ in range(100):
        interval = gap_interval(sampled_reads(shares, 40, generator), parity_gap, resamples=200, generator=generator)
        held += interval.low <= truth <= interval.high
    assert held >= 88


def mid_p_interval(hits: int, n: int) -> tuple[float, float]:
    """The shares at which the counts above `hits`, and half of those that equal it, have a chance of 97.5 and 2.5 %."""

    def end(tail: float) -> float:
        return brentq(lambda share: binom.sf(hits, n, share) + binom.pmf(hits, n, share) / 2 - tail, 0, 1)

    return 0.0 if hits == 0 else end(0.025), 1.0 if hits == n else end(0.975)


@pytest.mark.parametrize("hits", [0, 3, 13, 20, 25])
def test_for_one_prompt_and_two_groups_it_is_the_exact_interval_of_the_share(hits):
    """Its low end, for a gap far enough from the target that its other side plays no part."""
    reads = torch.nn.functional.one_hot((torch.arange(25) >= hits).long(), 2).double()[None]
    interval = gap_interval(reads, parity_gap, resamples=4000)
    low, high = mid_p_interval(hits, 25)
    ends = sorted([abs(low - 0.5), abs(high - 0.5)])
    if low <= 0.5 <= high:
        assert interval.low == pytest.approx(0, abs=0.03)
    else:
        assert interval.low == pytest.approx(ends[0], abs=0.02)
        assert interval.high == pytest.approx(ends[1], abs=0.02)


def test_closer_to_parity_than_chance_allows_for_is_still_no_proof_of_parity():
    reads = torch.eye(2).repeat(10, 1).expand(12, 20, 2)
    interval = gap_interval(reads, parity_gap)
    assert interval.low == interval.estimate == 0
    assert interval.high > noise_floor(20, 2, 12, parity_gap).mean / 2


def test_a_target_may_be_given_for_all_prompts_or_for_each():
    shares = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    reads = sampled_reads(shares, 40, seeded(3))
    one = gap_interval(reads, parity_gap, torch.tensor([0.25, 0.75]), resamples=100)
    assert one == gap_interval(reads, parity_gap, torch.tensor([[0.25, 0.75]] * 2), resamples=100)
    own = gap_interval(reads, parity_gap, reads.mean(1), resamples=100)
    assert own.estimate == own.low == 0 < own.high


def test_an_infinite_gap_stays_one():
    reads = sampled_reads(fair(2), 10, seeded(4))
    interval = gap_interval(reads, GAPS["kl"], torch.tensor([1.0, 0.0]), resamples=50)
    assert interval.low == interval.estimate == interval.high == math.inf


def test_intervals_narrow_with_images():
    shares = torch.tensor([[0.8, 0.2]] * 3, dtype=torch.float64)
    few, many = (gap_interval(sampled_reads(shares, n, seeded(5)), parity_gap) for n in (25, 400))
    assert few.high - few.low > 2 * (many.high - many.low)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exchanging_before_and_after_mirrors_the_change_up_to_what_is_drawn(seed):
    before = sampled_reads(torch.tensor([[0.8, 0.2]] * 3), 12, seeded(seed))
    after = sampled_reads(torch.tensor([[0.5, 0.5]] * 3), 12, seeded(seed + 1))
    gap = {"gap": parity_gap}
    one = gap_changes(before, after, gap, resamples=2000)["gap"]
    other = gap_changes(after, before, gap, resamples=2000)["gap"]
    assert one.estimate == pytest.approx(-other.estimate)
    assert one.p_value == pytest.approx(other.p_value, abs=0.02)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.04)


def test_no_change_at_all_is_in_the_interval():
    reads = sampled_reads(torch.tensor([[0.7, 0.3], [0.4, 0.6]]), 20, seeded(6))
    change = gap_changes(reads, reads, GAPS, resamples=200)["parity_gap"]
    assert change.low <= 0 <= change.high and change.estimate == 0 and change.p_value == 1


@pytest.mark.parametrize("target", [None, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)])
def test_no_end_of_a_change_lies_beyond_what_two_gaps_can_differ_by(target):
    """From one group alone to parity and back, with few images, which leave room for more than there can be."""
    alone = torch.tensor([[0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    sides = [sampled_reads(shares, 4, seeded(8)) for shares in (alone, fair(2, 3))]
    expected = torch.full((3,), 1 / 3).double() if target is None else target
    for before, after in (sides, sides[::-1]):
        found = gap_changes(before, after, GAPS, target, resamples=60)
        for name, change in found.items():
            largest = float(GAPS[name](torch.eye(3).double(), expected).max())
            assert -largest - 1e-9 <= change.low <= change.high <= largest + 1e-9


def test_a_change_to_parity_is_covered_where_a_percentile_interval_falls_short():
    before, after = torch.tensor([[0.9, 0.1], [0.1, 0.9]] * 6, dtype=torch.float64), fair(12)
    held, generator = {"inverted": 0, "percentile": 0}, seeded(7)
    for _ in range(40):
        sides = [sampled_reads(shares, 25, generator) for shares in (before, after)]
        one = gap_changes(*sides, {"gap": parity_gap}, resamples=200, generator=generator)["gap"]
        other = paired_difference_interval(*sides, share_statistic(parity_gap), resamples=200, generator=generator)
        held["inverted"] += one.low <= -0.4 <= one.high
        held["percentile"] += other.low <= -0.4 <= other.high
        assert one.estimate == other.estimate
    assert held["inverted"] >= 35
    assert held["percentile"] <= 10


def test_wrong_input_is_refused():
    reads = torch.full((2, 3, 2), 0.5)
    with pytest.raises(InputError, match=r"expected \(P, n, K\)"):
        gap_interval(reads[0], parity_gap)
    with pytest.raises(InputError, match="target shares"):
        gap_interval(reads, parity_gap, torch.tensor([0.9, 0.9]))
    with pytest.raises(InputError, match="same prompts and seeds"):
        gap_changes(reads, reads[:1], {"gap": parity_gap})
