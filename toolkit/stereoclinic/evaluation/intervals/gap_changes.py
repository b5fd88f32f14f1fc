"""The change of a gap on the same seeds, with an interval that holds where the gap comes near parity.

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
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stereoclinic.evaluation.intervals.gap_intervals import (
    evened,
    fair_median,
    gap_of,
    low_end,
    outwards,
    part_above,
    shown,
)
from stereoclinic.evaluation.intervals.noise import Noise, noise_of, resampled_shares
from stereoclinic.evaluation.intervals.resampling import check_settings, or_seeded
from stereoclinic.evaluation.intervals.statistics import PairedDifference, paired_difference_interval, share_statistic
from stereoclinic.evaluation.metrics.bias import Gap


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
        gaps: Name -> one of ``stereoclinic.evaluation.metrics.bias.GAPS``.
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
