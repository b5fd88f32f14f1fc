"""Intervals of gaps that hold at parity too, by inverting the noise.

A gap is never negative, so chance adds to it: with n = 25 images a prompt, a fair model of two groups shows a parity
gap of 0.08. Resampling adds the same once more, and a percentile interval of a small gap lies above the truth nearly
always. Here candidates for the true shares are tried instead, and those kept that could well have shown what was seen:

    c(s) = t + s (shape - t)                candidates, from the target t (s = 0) outwards
    f(s) = P(gap of as many images of c(s) > seen) + P(the same = seen) / 2
    low  = gap(c(s)) where f(s) = (1 - confidence) / 2,      high = gap(c(s)) where f(s) = (1 + confidence) / 2

What a candidate shows depends on how its gap is spread over prompts: few prompts with large gaps show less noise than
many with small ones, for noise on top of a large gap is as often down as up. The low end is therefore sought with the
gap in the prompts that have one beyond doubt, the high end with gaps as they were seen, a little evened out, for noise
has set them apart. A gap below the median of a fair model counts for the high end as that median: who comes closer to
parity than chance allows for was lucky, and gaps that as many images could not tell from none are not ruled out by it
(a power-constrained limit). Such gaps are then held more often than asked for. An end that would leave out what was
seen is moved there.
benchmarks/statistics/coverage.py measures the coverage of this and of the percentile interval, and chose the numbers.

References: Carpenter, Test Inversion Bootstrap Confidence Intervals, JRSS B 1999; Andrews, Inconsistency of the
Bootstrap when a Parameter Is on the Boundary, Econometrica 2000; Cowan, Cranmer, Gross and Vitells, Power-Constrained
Limits, arXiv:1105.3166, 2011; Lancaster, Significance Tests in Discrete
Distributions, JASA 1961 (half of what is equal).

The change of a gap on the same seeds, with an interval that holds where the gap comes near parity.

A treatment that works moves a gap from where noise adds nothing to where it adds a lot, so that seen gaps fall by less
than true ones. As in ``gap_intervals``, candidates for the true shares of both sides are tried:

    low:   after at the low end of its own interval, before as far out as still goes with the seen difference
    high:  before at its low end, after as far out

where "goes with" means that the candidates show a difference as large (as small) in (1 - confidence) / 2 of the draws.
Where noise adds the same on both sides, these are the ends of the usual interval, however the two sides share it; at
parity, where a side can go no further down, they still hold. The sides are drawn apart, and their differences brought
to the variance that resampling the same seeds on both sides has. A gap below the median of a fair model counts as that
median, as there. Either end is a difference of two gaps of shares, so
none lies beyond what two gaps can differ by.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stereoclinic.statistics.intervals import Interval, PairedDifference, paired_difference_interval, share_statistic
from stereoclinic.statistics.noise import Noise, noise_of, on_simplex, resampled_shares
from stereoclinic.statistics.resampling import check_settings, or_seeded
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
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> dict[str, Interval]:
    """Intervals of gaps of the same reads: each gap's mean over prompts, or its value for the pooled shares.

    Args:
        reads: (P, n, K) class probabilities.
        gaps: Name -> one of ``stereoclinic.statistics.shares.GAPS``, or any function like them.
        target: (K,) or (P, K) target shares; uniform if None.
        hard: Count each image's top group, or average probabilities.
        pooled: The gap of the prompts' mean shares, in which opposite stereotypes cancel.
        resamples: Number of bootstrap draws.
        confidence: Coverage aimed at.
        generator: Source of randomness; seeded with 0 if None.

    Returns:
        Name -> the gap of the estimated shares, and an interval that it lies in. Both ends of an infinite gap (``kl``
        to a target that excludes a group which was seen) are infinite.

    Raises:
        InputError: If shapes or settings are not of that form.
    """
    check_settings(resamples, confidence)
    noise = noise_of(reads, target, hard, pooled, resamples, or_seeded(generator))
    return {name: interval_of(noise, gap, confidence) for name, gap in gaps.items()}


def gap_interval(reads: Tensor, gap: Gap, target: Tensor | None = None, **settings: Any) -> Interval:
    """The interval of one gap; arguments as of ``gap_intervals``."""
    return gap_intervals(reads, {"": gap}, target, **settings)[""]


def interval_of(noise: Noise, gap: Gap, confidence: float = 0.95) -> Interval:
    """The interval of one gap, from shares and their noise."""
    seen = gap_of(noise, gap)
    if not math.isfinite(seen):
        return Interval(seen, seen, seen)
    low = gap_of(noise, gap, low_end(noise, gap, confidence))
    counts_as = max(seen, fair_median(noise, gap))

    def reached(centre: Tensor) -> float:
        return part_above(shown(noise, gap, centre), counts_as)

    high = gap_of(noise, gap, outwards(noise, evened(noise), reached, (1 + confidence) / 2))
    return Interval(seen, min(seen, low), max(seen, high))


def low_end(noise: Noise, gap: Gap, confidence: float) -> Tensor:
    """Shares (P, K) of the smallest gap that could well have shown what was seen."""
    seen = gap_of(noise, gap)
    return outwards(
        noise, _sure(noise), lambda centre: part_above(shown(noise, gap, centre), seen), (1 - confidence) / 2
    )


def gap_of(noise: Noise, gap: Gap, shares: Tensor | None = None) -> float:
    """Mean over prompts of the gap of (P, K) shares; of the estimated ones if None."""
    return gap(noise.shares if shares is None else shares, noise.target).mean(-1).item()


def shown(noise: Noise, gap: Gap, centre: Tensor) -> Tensor:
    """(R,) gaps that as many images of a model with shares (P, K) show."""
    return gap(noise.around(centre), noise.target).mean(-1)


def fair_median(noise: Noise, gap: Gap) -> float:
    """What a fair model shows half of the time."""
    return shown(noise, gap, noise.target).median().item()


def part_above(drawn: Tensor, seen: float) -> float:
    """Part of the draws that are above what was seen, and half of those that equal it."""
    above, equal = drawn > seen + _EQUAL, (drawn - seen).abs() <= _EQUAL
    return (above.double() + equal.double() / 2).mean().item()


def outwards(noise: Noise, shape: Tensor, reached: Callable[[Tensor], float], wanted: float) -> Tensor:
    """The first shares on the way from the target through the shape, and beyond, for which a rising value is reached.

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


def evened(noise: Noise) -> Tensor:
    """The estimated shares (P, K), their distances from the target brought closer to one another."""
    away = _as_seen(noise) - noise.target
    size: Tensor = torch.linalg.vector_norm(away, dim=-1, keepdim=True)  # (P, 1)
    return noise.target + away / size.clamp_min(1e-12) * torch.lerp(size, size.mean(), _EVENED)


def _as_seen(noise: Noise) -> Tensor:
    """The estimated shares (P, K); where no prompt shows a gap, any way out of the target will do."""
    if not torch.equal(noise.shares, noise.target):
        return noise.shares
    return torch.nn.functional.one_hot(noise.target.argmin(-1), noise.target.shape[-1]).double()


def _sure(noise: Noise) -> Tensor:
    """Shares (P, K) that leave the target in prompts whose gap is beyond doubt, or else in the one of the largest."""
    size = torch.linalg.vector_norm(noise.shares - noise.target, dim=-1, keepdim=True)  # (P, 1)
    there = size > _BEYOND_DOUBT * noise.error()
    if not bool(there.any()):
        there = torch.zeros_like(there)
        there[size.flatten().argmax()] = True
    return torch.where(there, _as_seen(noise), noise.target)


def gap_changes(
    before: Tensor,
    after: Tensor,
    gaps: Mapping[str, Gap],
    target: Tensor | None = None,
    hard: bool = True,
    pooled: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> dict[str, PairedDifference]:
    """After minus before on the same seeds for each gap: its interval, and the p-value of no change by sign flips.

    Args:
        before: (P, n, K) reads; image i of prompt p has the same seed as in ``after``.
        after: (P, n, K) reads.
        gaps: Name -> one of ``stereoclinic.statistics.shares.GAPS``.
        target: (K,) or (P, K) target shares; uniform if None.
        hard: Count each image's top group, or average probabilities.
        pooled: Of the gap of the prompts' mean shares.
        resamples: Number of draws.
        confidence: Coverage aimed at.
        generator: Source of randomness; seeded with 0 if None.

    Returns:
        Name -> difference of the gaps as seen, the ends of an interval for that of the true ones, and the p-value of
        ``paired_difference_interval``. The seen difference can lie beside the interval: what noise adds to one side
        more than to the other is in it.

    Raises:
        InputError: If the two sides differ in shape, or a setting is out of range.
    """
    check_settings(resamples, confidence)
    plain = {  # checks the shapes
        name: paired_difference_interval(before, after, share_statistic(gap, target, hard, pooled), resamples=resamples)
        for name, gap in gaps.items()
    }
    generator = or_seeded(generator)
    first, second = (noise_of(each, target, hard, pooled, resamples, generator) for each in (before, after))
    draws = resampled_shares([before, after], hard, resamples, generator)
    draws = [each.mean(-2, keepdim=True) if pooled else each for each in draws]
    found = {}
    for name, gap in gaps.items():
        tied = _spread_of_a_pair(*(gap(each, first.target).mean(-1) for each in draws))
        low, high = _least(first, second, gap, tied, confidence), -_least(second, first, gap, tied, confidence)
        found[name] = replace(plain[name], low=low, high=high)
    return found


def _least(before: Noise, after: Noise, gap: Gap, tied: float, confidence: float) -> float:
    """The smallest change that goes with what was seen: `after` at its low end, `before` as far out as can be."""
    fair = fair_median(after, gap)
    seen = max(gap_of(after, gap), fair) - max(gap_of(before, gap), fair_median(before, gap))
    if not math.isfinite(seen):
        return seen
    last = low_end(after, gap, confidence)
    # Only on this side do draws count as their median at least, as what was seen does: on the other, all that is near
    # parity would look alike, and the search end too soon.
    drawn = shown(after, gap, last).clamp_min(fair)  # (R,)

    def not_as_large(centre: Tensor) -> float:
        change = drawn - shown(before, gap, centre)
        return 1 - part_above(change.mean() + tied * (change - change.mean()), seen)

    first = outwards(before, evened(before), not_as_large, (1 + confidence) / 2)
    return gap_of(after, gap, last) - gap_of(before, gap, first)


def _spread_of_a_pair(then: Tensor, now: Tensor) -> float:
    """Standard deviation of the difference of two rows of draws, over what it would be if they were independent."""
    apart = float(then.var() + now.var())
    return math.sqrt(float((now - then).var()) / apart) if apart > 0 and math.isfinite(apart) else 1.0
