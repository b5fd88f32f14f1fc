"""Confidence intervals of gaps that hold at parity too, by test inversion.

A gap is never negative, so chance raises it: with n = 25 images a prompt, a fair model of two groups shows a parity
gap of 0.08. Resampling raises it once more, so a percentile interval of a small gap nearly always lies above the truth.
These intervals try candidates for the true shares instead, and keep those that could well have shown the seen gap:

    c(s) = t + s (shape - t)                candidates, from the target t (s = 0) outwards
    f(s) = P(gap of as many images of c(s) > seen) + P(the same = seen) / 2
    low  = gap(c(s)) where f(s) = 2.5 %,      high = gap(c(s)) where f(s) = 97.5 %

What a candidate shows depends on how its gap is spread over prompts: a few prompts with large gaps show less noise than
many with small ones. So the low end uses only the prompts whose gap is beyond doubt, and the high end uses the seen
gaps, a little evened out. At the high end a seen gap below the median of a fair model counts as that median (a
power-constrained limit). Such gaps are covered more often than asked for. Every interval contains the estimate.

The interval of a change tries candidates for both sides in the same way:

    low:   after at the low end of its own interval, before as far out as still fits the seen difference
    high:  before at its low end, after as far out

"Fits" means that the candidates show a difference as large (as small) in 2.5 % of the draws. The two
sides are drawn independently, and their differences scaled to the variance that resampling the same seeds on both sides
has. Each end is a difference of two gaps of shares, so none lies beyond what two gaps can differ by.

benchmarks/statistics/coverage.py measures the coverage, and chose the constants below.

References: Carpenter, Test Inversion Bootstrap Confidence Intervals, JRSS B 1999; Andrews, Inconsistency of the
Bootstrap when a Parameter Is on the Boundary, Econometrica 2000; Cowan, Cranmer, Gross and Vitells, Power-Constrained
Limits, arXiv:1105.3166, 2011; Lancaster, Significance Tests in Discrete Distributions, JASA 1961 (half of ties).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stereoclinic.statistics.intervals import Interval, PairedDifference, paired_difference_interval, share_statistic
from stereoclinic.statistics.resampling import (
    HIGH,
    LOW,
    Noise,
    check_draws,
    noise_of,
    on_simplex,
    or_seeded,
    resampled_shares,
)
from stereoclinic.statistics.shares import Gap

_BEYOND_DOUBT = 2.5  # standard errors from the target
_EVENED = 0.25  # of the way from a prompt's gap to the mean gap
_FARTHEST = 16.0  # times as far from the target as the shape
_HALVINGS = 6  # of the distance between two steps
_EQUAL = 1e-9


def gap_intervals(
    reads: Tensor,
    gaps: Mapping[str, Gap],
    target: Tensor | None = None,
    hard: bool = True,
    pooled: bool = False,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, Interval]:
    """Intervals of gaps of the same reads: each gap's mean over prompts, or its value for the pooled shares.

    Args:
        reads: (P, n, K) class probabilities.
        gaps: Name -> one of `shares.GAPS`, or any function like them.
        target: (K,) or (P, K) target shares; uniform if None.
        hard: Count each image's top group, or average probabilities.
        pooled: The gap of the prompts' mean shares, in which opposite stereotypes cancel.
        resamples: Number of bootstrap draws.
        generator: Source of randomness; seeded with 0 if None.

    Returns:
        Name -> interval. Both ends of an infinite gap are infinite.

    Raises:
        InputError: Shapes or settings are not of that form.
    """
    check_draws(resamples)
    noise = noise_of(reads, target, hard, pooled, resamples, or_seeded(generator))
    return {name: interval_of(noise, gap) for name, gap in gaps.items()}


def gap_interval(reads: Tensor, gap: Gap, target: Tensor | None = None, **settings: Any) -> Interval:
    """The interval of one gap; arguments as of `gap_intervals`."""
    return gap_intervals(reads, {"": gap}, target, **settings)[""]


def interval_of(noise: Noise, gap: Gap) -> Interval:
    """The interval of one gap, from shares and their noise."""
    seen = _gap_of(noise, gap)
    if not math.isfinite(seen):
        return Interval(seen, seen, seen)
    low = _gap_of(noise, gap, _low_end(noise, gap))
    counts_as = max(seen, _fair_median(noise, gap))
    far = _outwards(
        noise,
        _evened(noise),
        lambda centre: _part_above(_shown(noise, gap, centre), counts_as),
        HIGH,
    )
    return Interval(seen, min(seen, low), max(seen, _gap_of(noise, gap, far)))


def gap_changes(
    before: Tensor,
    after: Tensor,
    gaps: Mapping[str, Gap],
    target: Tensor | None = None,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, PairedDifference]:
    """After minus before on the same seeds for each gap: its interval, and the p-value of no change by sign flips.

    Args:
        before: (P, n, K) reads, of which the top group of each counts; image i of prompt p has the seed of `after`.
        after: (P, n, K) reads.
        gaps: Name -> one of `shares.GAPS`.
        target: (K,) or (P, K) target shares; uniform if None.
        resamples: Number of draws.
        generator: Source of randomness; seeded with 0 if None.

    Returns:
        Name -> the seen difference, an interval for the true one, and the p-value of `paired_difference_interval`. The
        seen difference can lie outside the interval, as noise may raise one side more than the other.

    Raises:
        InputError: The two sides differ in shape, or a setting is out of range.
    """
    check_draws(resamples)
    plain = {  # checks the shapes
        name: paired_difference_interval(before, after, share_statistic(gap, target), resamples=resamples)
        for name, gap in gaps.items()
    }
    generator = or_seeded(generator)
    first, second = (noise_of(side, target, True, False, resamples, generator) for side in (before, after))
    draws = resampled_shares([before, after], True, resamples, generator)
    changes = {}
    for name, gap in gaps.items():
        tied = _spread_of_a_pair(*(gap(each, first.target).mean(-1) for each in draws))
        low, high = _least(first, second, gap, tied), -_least(second, first, gap, tied)
        changes[name] = replace(plain[name], low=low, high=high)
    return changes


def _least(before: Noise, after: Noise, gap: Gap, tied: float) -> float:
    """The smallest change that fits what was seen: `after` at its low end, `before` as far out as can be."""
    fair = _fair_median(after, gap)
    seen = max(_gap_of(after, gap), fair) - max(_gap_of(before, gap), _fair_median(before, gap))
    if not math.isfinite(seen):
        return seen
    last = _low_end(after, gap)
    # Only on this side do draws count as their median at least, as what was seen does. On both sides, everything near
    # parity would look alike, and the search would end too soon.
    drawn = _shown(after, gap, last).clamp_min(fair)  # (R,)

    def not_as_large(centre: Tensor) -> float:
        change = drawn - _shown(before, gap, centre)
        return 1 - _part_above(change.mean() + tied * (change - change.mean()), seen)

    first = _outwards(before, _evened(before), not_as_large, HIGH)
    return _gap_of(after, gap, last) - _gap_of(before, gap, first)


def _spread_of_a_pair(before: Tensor, after: Tensor) -> float:
    """Standard deviation of the difference of two rows of draws, over what it would be if they were independent."""
    independent = float(before.var() + after.var())
    if not (independent > 0 and math.isfinite(independent)):
        return 1.0
    return math.sqrt(float((after - before).var()) / independent)


def _gap_of(noise: Noise, gap: Gap, shares: Tensor | None = None) -> float:
    """Mean over prompts of the gap of (P, K) shares; of the estimated ones if None."""
    return gap(noise.shares if shares is None else shares, noise.target).mean(-1).item()


def _shown(noise: Noise, gap: Gap, centre: Tensor) -> Tensor:
    """(R,) gaps that as many images of a model with shares (P, K) show."""
    return gap(noise.around(centre), noise.target).mean(-1)


def _fair_median(noise: Noise, gap: Gap) -> float:
    return _shown(noise, gap, noise.target).median().item()


def _part_above(drawn: Tensor, seen: float) -> float:
    """Part of the draws that are above the seen value, and half of those that equal it."""
    above, equal = drawn > seen + _EQUAL, (drawn - seen).abs() <= _EQUAL
    return (above.double() + equal.double() / 2).mean().item()


def _low_end(noise: Noise, gap: Gap) -> Tensor:
    """Shares (P, K) of the smallest gap that could well have shown what was seen."""
    seen = _gap_of(noise, gap)
    return _outwards(noise, _sure(noise), lambda centre: _part_above(_shown(noise, gap, centre), seen), LOW)


def _outwards(noise: Noise, shape: Tensor, reached: Callable[[Tensor], float], wanted: float) -> Tensor:
    """The first shares on the way from the target through the shape, and beyond, at which a rising value is reached.

    Args:
        noise: Has the target.
        shape: (P, K).
        reached: The value of shares (P, K).
        wanted: The value that is looked for.

    Returns:
        (P, K): the target where it reaches the value already, the farthest shares where none do.
    """

    def centre(step: float) -> Tensor:
        return on_simplex(noise.target + step * (shape - noise.target))

    near, far = (0.0, reached(centre(0.0))), (1.0, reached(centre(1.0)))  # (step, value)
    if near[1] >= wanted:
        return centre(0.0)
    while far[1] < wanted and far[0] < _FARTHEST:
        near, far = far, (2 * far[0], reached(centre(2 * far[0])))
    if far[1] < wanted:
        return centre(far[0])
    for _ in range(_HALVINGS):
        step = (near[0] + far[0]) / 2
        value = reached(centre(step))
        near, far = (near, (step, value)) if value >= wanted else ((step, value), far)
    part = (wanted - near[1]) / (far[1] - near[1])
    return centre(near[0] + part * (far[0] - near[0]))


def _evened(noise: Noise) -> Tensor:
    """The estimated shares (P, K), their distances from the target brought closer to one another."""
    away = _as_seen(noise) - noise.target
    size: Tensor = torch.linalg.vector_norm(away, dim=-1, keepdim=True)  # (P, 1)
    return noise.target + away / size.clamp_min(1e-12) * torch.lerp(size, size.mean(), _EVENED)


def _as_seen(noise: Noise) -> Tensor:
    """The estimated shares (P, K), or any way out of the target where no prompt shows a gap."""
    if not torch.equal(noise.shares, noise.target):
        return noise.shares
    return torch.nn.functional.one_hot(noise.target.argmin(-1), noise.target.shape[-1]).double()


def _sure(noise: Noise) -> Tensor:
    """Shares (P, K) that leave the target in prompts whose gap is beyond doubt, or else in the one of the largest."""
    size = torch.linalg.vector_norm(noise.shares - noise.target, dim=-1, keepdim=True)  # (P, 1)
    sure = size > _BEYOND_DOUBT * noise.error()
    if not bool(sure.any()):
        sure = torch.zeros_like(sure)
        sure[size.flatten().argmax()] = True
    return torch.where(sure, _as_seen(noise), noise.target)
