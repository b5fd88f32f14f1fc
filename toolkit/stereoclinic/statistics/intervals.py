"""Confidence intervals (95 %) of shares and means, and what chance alone shows.

A *statistic* maps reads to one number per leading index, (..., P, n, K) -> (...), P prompts with n images each.
Intervals say what other seeds of the same prompts would show. Paired differences compare the same seeds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.resampling import (
    check_draws,
    chunks,
    image_draws,
    multinomial,
    or_seeded,
    percentiles,
    resampled,
    three_dimensional,
)
from stereoclinic.statistics.shares import Gap, shares_from_reads

Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval; the ends are NaN where there is no interval."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_ends(self) -> bool:
        """Whether there is an interval around the estimate."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class PairedDifference(Interval):
    """After minus before on the same seeds, its confidence interval, and the p-value of no difference."""

    p_value: float = math.nan


@dataclass(frozen=True)
class NoiseFloor:
    """What a metric shows by chance, of a fair model or of no change: its mean, and the bound that 95 % stay under."""

    mean: float
    upper: float


def share_statistic(gap: Gap, target: Tensor | None = None, hard: bool = True, pooled: bool = False) -> Statistic:
    """A statistic of reads from a gap of shares.

    Args:
        gap: One of `shares.GAPS`.
        target: (K,) target shares; uniform if None.
        hard: Count each image's top group, or average probabilities.
        pooled: The gap of the prompts' mean shares, in which opposite stereotypes cancel, not the mean of their gaps.

    Returns:
        A function (..., P, n, K) -> (...).
    """

    def statistic(reads: Tensor) -> Tensor:
        shares = shares_from_reads(reads, hard)  # (..., P, n, K) -> (..., P, K)
        return gap(shares.mean(-2), target) if pooled else gap(shares, target).mean(-1)

    return statistic


def bootstrap_interval(
    reads: Tensor,
    statistic: Statistic,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Interval:
    """Percentile bootstrap interval; images are resampled within each prompt.

    It suits shares and means. It is too high for a gap near parity, which resampling raises: see `gap_intervals`.

    Args:
        reads: (P, n, K) class probabilities.
        statistic: (..., P, n, K) -> (...).
        resamples: Number of bootstrap draws.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: Shapes or settings are not of that form.

    Reference: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    reads = three_dimensional(reads, "reads")
    check_draws(resamples)
    draws = [statistic(resampled(reads, images)) for images in image_draws(reads, resamples, or_seeded(generator))]
    return Interval(statistic(reads).item(), *percentiles(torch.cat(draws)))


def paired_difference_interval(
    before: Tensor,
    after: Tensor,
    statistic: Statistic,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> PairedDifference:
    """Difference after - before on the same seeds, with a bootstrap interval and a sign-flip p-value.

    The interval resamples the same images on both sides. For the p-value, before and after swap places in random
    images: p = (1 + number of draws at least as far from zero) / (1 + draws), two-sided and never zero.

    Args:
        before: (P, n, K) reads; image i of prompt p has the same seed as in `after`.
        after: (P, n, K) reads.
        statistic: (..., P, n, K) -> (...).
        resamples: Number of bootstrap draws, and of sign flips.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: The two sides differ in shape, or a setting is out of range.

    Reference: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, section 3.2.1.
    """
    before, after = three_dimensional(before, "reads before"), three_dimensional(after, "reads after")
    if before.shape != after.shape:
        raise InputError(
            f"reads before have shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "expected the same prompts and seeds on both sides"
        )
    check_draws(resamples)
    generator = or_seeded(generator)
    difference = (statistic(after) - statistic(before)).item()

    draws = [
        statistic(resampled(after, images)) - statistic(resampled(before, images))
        for images in image_draws(before, resamples, generator)
    ]
    low, high = percentiles(torch.cat(draws))

    as_far = 0
    for chunk in chunks(resamples, before.numel()):
        swap = torch.randint(0, 2, (chunk, *before.shape[:2], 1), generator=generator).bool().to(before.device)
        flipped = statistic(torch.where(swap, before, after)) - statistic(torch.where(swap, after, before))
        # The tolerance keeps draws that equal the observed difference up to rounding.
        as_far += int((flipped.abs() >= abs(difference) - 1e-12).sum())
    return PairedDifference(difference, low, high, (1 + as_far) / (1 + resamples))


def wilson_interval(successes: float, n: int) -> Interval:
    """Wilson score interval of a proportion; its coverage holds near 0 and 1.

    Args:
        successes: Number of successes, from 0 to n; images that count in part make fractions.
        n: Number of trials, at least 1.

    Raises:
        InputError: `successes` or `n` is out of range.

    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.

    Examples:
        >>> interval = wilson_interval(25, 25)
        >>> interval.estimate, round(interval.low, 2), interval.high
        (1.0, 0.87, 1.0)
    """
    from statsmodels.stats.proportion import proportion_confint

    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} successes of {n}; expected n >= 1 and between 0 and n successes")
    p = successes / n
    low, high = (float(end) for end in proportion_confint(successes, n, method="wilson"))
    # Rounding must not move the ends past p.
    return Interval(p, max(0.0, min(p, low)), min(1.0, max(p, high)))


def correlation_interval(x: Tensor, y: Tensor) -> Interval:
    """Pearson's correlation of (n,) and (n,), n >= 4, with Fisher's interval.

    Raises:
        InputError: Fewer than 4 pairs, or one of the two does not vary.
    """
    from scipy.stats import pearsonr

    x, y = x.double(), y.double()
    if len(x) < 4 or x.min() == x.max() or y.min() == y.max():
        raise InputError(f"a correlation of {len(x)} pairs; expected 4 or more, of two things that vary")
    result = pearsonr(x.numpy(), y.numpy())
    low, high = result.confidence_interval()
    return Interval(float(result.statistic), float(low), float(high))


def noise_floor(
    n: int,
    K: int,
    prompts: int,
    metric: Gap,
    target: Tensor | None = None,
    simulations: int = 4000,
    generator: torch.Generator | None = None,
) -> NoiseFloor:
    """What a perfectly fair generator shows at n images a prompt, averaged over prompts, by simulation.

    Each image's group is drawn from the target, so every gap is chance. At n = 100 and K = 2 the mean is 0.0398 for
    the parity gap, 0.0563 for the fairness discrepancy and 0.0796 for the deviation ratio, for any number of prompts.
    The bound tightens with more prompts. Reads are taken as hard; soft reads vary less.

    Args:
        n: Images per prompt.
        K: Number of groups.
        prompts: Number of prompts that are averaged over.
        metric: One of `shares.GAPS`.
        target: (K,) shares that are drawn from and compared with; uniform if None.
        simulations: Number of simulated experiments.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: A number is out of range.
    """
    if n < 1 or K < 2 or prompts < 1:
        raise InputError(
            f"n = {n} images, K = {K} groups, {prompts} prompts; expected at least one image, two groups and one prompt"
        )
    check_draws(simulations)
    expected = torch.full((K,), 1 / K, dtype=torch.float64) if target is None else torch.as_tensor(target).double()
    if expected.shape != (K,):
        raise InputError(f"the target has shape {tuple(expected.shape)}; expected ({K},), one share per group")
    generator = or_seeded(generator)
    averages = []
    for chunk in chunks(simulations, prompts * K):
        counts = multinomial(n, expected, (chunk, prompts), generator)
        averages.append(metric(counts / n, target).mean(-1))
    values = torch.cat(averages)
    return NoiseFloor(values.mean().item(), torch.quantile(values, 0.95).item())


def two_samples_floor(reads: Tensor, simulations: int = 2000) -> NoiseFloor:
    """How far the shares of two samples of one model are apart by chance, averaged over prompts, by simulation.

    Args:
        reads: (P, n, K) probabilities; each sample has n images of each prompt, drawn from the shares of their groups.
        simulations: Number of simulated pairs of samples.

    Returns:
        Of the total variation distance.
    """
    images, shares = reads.shape[1], shares_from_reads(reads, hard=True).cpu().numpy()
    random, apart = np.random.default_rng(0), []
    for chunk in chunks(simulations, shares.size):
        first, second = (random.multinomial(images, shares, size=(chunk, len(shares))) for _ in range(2))
        apart.append(np.abs(first - second).sum(-1).mean(-1) / (2 * images))
    distances = np.concatenate(apart)
    return NoiseFloor(float(distances.mean()), float(np.quantile(distances, 0.95)))


def mean_interval(values: Tensor) -> Interval:
    """The mean of (P, n) values with its bootstrap interval, see `bootstrap_interval`."""
    return bootstrap_interval(_column(values), _mean)


def mean_change(before: Tensor, after: Tensor) -> PairedDifference:
    """The change of the mean of (P, n) values on the same seeds, see `paired_difference_interval`."""
    return paired_difference_interval(_column(before), _column(after), _mean)


def _column(values: Tensor) -> Tensor:
    """(P, n) -> (P, n, 1), the form of reads."""
    if values.dim() != 2:
        raise InputError(f"values have shape {tuple(values.shape)}; expected (P, n), one an image")
    return values[..., None]


def _mean(values: Tensor) -> Tensor:
    """(..., P, n, 1) -> (...)."""
    return values.mean((-1, -2, -3))
