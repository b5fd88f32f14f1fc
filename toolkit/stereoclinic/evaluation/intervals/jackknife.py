"""Intervals of figures that resampling would move: distances between samples grow when an image is drawn twice."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from stereoclinic.evaluation.intervals.resampling import check_confidence
from stereoclinic.evaluation.intervals.statistics import Interval
from stereoclinic.evaluation.metrics.quality import frechet_within_groups

PARTS = 12
Sample = tuple[Tensor, Tensor]


def jackknife_ratio(
    measure: Callable[..., tuple[float, float]], sizes: Sequence[int], confidence: float = 0.95
) -> Interval | None:
    """The ratio of two figures of the same samples, and its interval: each sample is measured without a part of it.

    Each sample is dealt into at most 12 parts, and the logarithm of the ratio taken anew without each of them; a normal
    interval is laid round the logarithm with the variance that this shows, samples' variances added up. The jackknife's
    variance is too large on average, never too small, so the interval is rather wide.

    Args:
        measure: Called with the numbers (Tensor) that are kept of each sample; gives two figures above 0.
        sizes: How many numbers each sample has; the samples are independent.
        confidence: Coverage aimed at.

    Returns:
        The ratio; None where some part leaves nothing to measure.

    Reference: Shao & Wu, A General Theory for Jackknife Variance Estimation, Annals of Statistics 1989 (of groups);
    Efron & Stein, The Jackknife Estimate of Variance, Annals of Statistics 1981 (it errs upward).
    """
    check_confidence(confidence)
    whole = [torch.arange(size) for size in sizes]

    def log_ratio(kept: Sequence[Tensor]) -> float:
        above, below = measure(*kept)
        return math.log(above / below) if above > 0 and below > 0 else math.nan

    estimate, variance = log_ratio(whole), 0.0
    for place, numbers in enumerate(whole):
        parts = min(PARTS, len(numbers))
        without = [
            log_ratio([*whole[:place], numbers[numbers % parts != part], *whole[place + 1 :]]) for part in range(parts)
        ]
        mean = sum(without) / parts
        variance += (parts - 1) / parts * sum((each - mean) ** 2 for each in without)
    if not math.isfinite(estimate + variance):
        return None
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Interval(*(math.exp(end) for end in (estimate, estimate - half, estimate + half)))


def within_groups_ratio(arm: Sample, reference: Sample, floor: Sample, cells: int) -> Interval | None:
    """`frechet_within_groups` over its floor, left out by seeds: the prompts are those that were asked, and stay.

    Args:
        arm: Features (P, n, F) and cells (P, n) of the images.
        reference: The same of images that were drawn with each group asked for, on other seeds.
        floor: The same of another sample of those, on the arm's own seeds.
        cells: Number of cells.

    Returns:
        The ratio, as in `jackknife_ratio`.
    """

    def of(sample: Sample, seeds: Tensor) -> Sample:
        features, own = sample
        return features[:, seeds].flatten(0, 1), own[:, seeds].flatten()

    def measure(seeds: Tensor, others: Tensor) -> tuple[float, float]:
        return frechet_within_groups(of(arm, seeds), of(reference, others), of(floor, seeds), cells)

    return jackknife_ratio(measure, (arm[1].shape[1], reference[1].shape[1]))
