"""How sure a measured gap is: bootstrap intervals, paired tests, and what chance alone would show.

A *statistic* maps reads to one number per leading index, (..., P, n, K) -> (...), P prompts with n images
each. It is called on batches of resamples, so it must be written over leading dimensions; ``share_statistic``
makes one from any gap of ``stereoclinic.statistics.shares``. All randomness comes from the generator that is
passed in.

Figures that are the mean of one number an image: CLIPScore, or how alike pictures of one seed are.

    figure = mean over prompts of the mean over their images           (P, n) -> ()

Intervals are of other seeds of the same prompts; changes are of the same seeds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.resampling import (
    check_confidence,
    check_settings,
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
    """What a metric shows for a generator that is perfectly fair: its mean, and the bound it stays under."""

    mean: float
    upper: float


def share_statistic(gap: Gap, target: Tensor | None = None, hard: bool = True, pooled: bool = False) -> Statistic:
    """A statistic of reads from a gap of shares.

    Args:
        gap: one of ``stereoclinic.statistics.shares.GAPS``.
        target: (K,) target shares; uniform if None.
        hard: count each image's top group, or average probabilities.
        pooled: the gap of all prompts' mean shares, instead of the mean over prompts of their gaps. Opposite
            stereotypes cancel in the pooled figure.

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
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """Percentile bootstrap interval, stratified by prompt: images are resampled within each prompt.

    The prompts are those that were asked and stay as they are; the interval says what other seeds of the same
    prompts would show. A gap is never negative, so resampling noise raises it: near parity the interval can
    lie wholly above the estimate. Shares have no such bias; of gaps, ``gap_intervals`` holds at parity too.

    Args:
        reads: (P, n, K) class probabilities.
        statistic: (..., P, n, K) -> (...).
        resamples: number of bootstrap draws.
        confidence: coverage aimed at.
        generator: source of randomness; seeded with 0 if None.

    Returns:
        The statistic of ``reads`` and the ends of the interval.

    Raises:
        InputError: if shapes or settings are not of that form.

    Reference: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    reads = three_dimensional(reads, "reads")
    check_settings(resamples, confidence)
    draws = [statistic(resampled(reads, images)) for images in image_draws(reads, resamples, or_seeded(generator))]
    low, high = percentiles(torch.cat(draws), confidence)
    return Interval(statistic(reads).item(), low, high)


def paired_difference_interval(
    before: Tensor,
    after: Tensor,
    statistic: Statistic,
    unit: str = "image",
    resamples: int = 2000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> PairedDifference:
    """Difference after - before on the same seeds, resampled jointly, with a sign-flip p-value.

    The interval resamples the same images of a prompt on both sides, so what a seed contributes to both
    cancels. For the p-value, before and after change places within random units, which flips the sign of each
    unit's difference; p = (1 + number of draws at least as far from zero) / (1 + draws), two-sided and never
    zero.

    Args:
        before: (P, n, K) reads; image i of prompt p has the same seed as in ``after``.
        after: (P, n, K) reads.
        statistic: (..., P, n, K) -> (...).
        unit: what changes places: "image" asks whether other seeds of these prompts would agree, "prompt"
            whether other prompts would (with P prompts no p-value can be below about 2 / 2^P).
        resamples: number of bootstrap draws, and of sign flips.
        confidence: coverage aimed at.
        generator: source of randomness; seeded with 0 if None.

    Returns:
        The difference, the ends of its interval, and the p-value.

    Raises:
        InputError: if the two sides differ in shape, or a setting is out of range.

    Reference: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, section 3.2.1 (paired
    comparisons).
    """
    before, after = three_dimensional(before, "reads before"), three_dimensional(after, "reads after")
    if before.shape != after.shape:
        raise InputError(
            f"reads before have shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "expected the same prompts and seeds on both sides"
        )
    if unit not in ("image", "prompt"):
        raise InputError(f"unit is {unit!r}; expected 'image' or 'prompt'")
    check_settings(resamples, confidence)
    generator = or_seeded(generator)
    difference = (statistic(after) - statistic(before)).item()

    draws = [
        statistic(resampled(after, images)) - statistic(resampled(before, images))
        for images in image_draws(before, resamples, generator)
    ]
    low, high = percentiles(torch.cat(draws), confidence)

    prompts, images, _ = before.shape
    as_far = 0
    for chunk in chunks(resamples, before.numel()):
        shape = (chunk, prompts, images if unit == "image" else 1, 1)
        swap = torch.randint(0, 2, shape, generator=generator).bool().to(before.device)
        flipped = statistic(torch.where(swap, before, after)) - statistic(torch.where(swap, after, before))
        # The tolerance keeps draws that equal the observed difference up to rounding.
        as_far += int((flipped.abs() >= abs(difference) - 1e-12).sum())
    return PairedDifference(difference, low, high, (1 + as_far) / (1 + resamples))


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; it holds its coverage near 0 and 1, where images often are.

    Args:
        successes: number of successes among n, from 0 to n.
        n: number of trials, at least 1.
        confidence: coverage aimed at.

    Returns:
        The proportion and the ends of its interval, within [0, 1].

    Raises:
        InputError: if ``successes`` or ``n`` is out of range.

    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.

    Examples:
        >>> interval = wilson_interval(25, 25)
        >>> interval.estimate, round(interval.low, 2), interval.high
        (1.0, 0.87, 1.0)
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} successes of {n}; expected n >= 1 and between 0 and n successes")
    check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # The closed form reaches 0 and 1 exactly at no and all successes; rounding must not move the ends past p.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def correlation_interval(x: Tensor, y: Tensor, confidence: float = 0.95) -> Interval:
    """Pearson's correlation with Fisher's interval: the inverse hyperbolic tangent of r is nearly normal.

    Args:
        x: (n,) one of each pair, at least 4.
        y: (n,) the other.
        confidence: coverage aimed at.

    Raises:
        InputError: fewer than 4 pairs, or one of the two does not vary.

    Reference: Fisher, On the "Probable Error" of a Coefficient of Correlation Deduced from a Small Sample, 1921.
    """
    check_confidence(confidence)
    r = torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
    if len(x) < 4 or math.isnan(r):
        raise InputError(f"a correlation of {len(x)} pairs; expected 4 or more, of two things that vary")
    half = NormalDist().inv_cdf((1 + confidence) / 2) / math.sqrt(len(x) - 3)
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))  # finite at 1, which rounding may reach
    return Interval(r, min(r, math.tanh(z - half)), max(r, math.tanh(z + half)))


def noise_floor(
    n: int,
    K: int,
    prompts: int,
    metric: Gap,
    target: Tensor | None = None,
    simulations: int = 4000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> NoiseFloor:
    """What a perfectly fair generator would show at n images a prompt, averaged over prompts, by simulation.

    Each image's group is drawn from the target, so every gap measured is chance. The mean does not depend on
    the number of prompts; the bound tightens with it. At n = 100 and K = 2 the mean is 0.0398 for the parity
    gap, 0.0563 for the fairness discrepancy and 0.0796 for the deviation ratio. Reads are taken as hard; soft
    reads of an unsure reader vary less.

    Args:
        n: images per prompt.
        K: number of groups.
        prompts: number of prompts that are averaged over.
        metric: one of ``stereoclinic.statistics.shares.GAPS``, (shares (..., K), target) -> (...).
        target: (K,) shares that the generator draws from and the metric compares with; uniform if None.
        simulations: number of simulated experiments.
        confidence: the bound that this share of fair experiments stays under.
        generator: source of randomness; seeded with 0 if None.

    Returns:
        Mean and one-sided upper bound of the metric's average over prompts.

    Raises:
        InputError: if a number is out of range.
    """
    if n < 1 or K < 2 or prompts < 1:
        raise InputError(
            f"n = {n} images, K = {K} groups, {prompts} prompts; expected at least one image, two groups and one prompt"
        )
    check_settings(simulations, confidence)
    expected = torch.full((K,), 1 / K, dtype=torch.float64) if target is None else torch.as_tensor(target).double()
    if expected.shape != (K,):
        raise InputError(f"the target has shape {tuple(expected.shape)}; expected ({K},), one share per group")
    generator = or_seeded(generator)
    averages = []
    for chunk in chunks(simulations, prompts * K):
        counts = multinomial(n, expected, (chunk, prompts), generator)
        averages.append(metric(counts / n, target).mean(-1))
    values = torch.cat(averages)
    return NoiseFloor(values.mean().item(), torch.quantile(values, confidence).item())


def mean_interval(values: Tensor) -> Interval:
    """The mean of (P, n) values with its bootstrap interval, stratified by prompt (`bootstrap_interval`).

    Raises:
        InputError: Another shape, or no image.
    """
    return bootstrap_interval(_column(values), _mean)


def mean_change(before: Tensor, after: Tensor) -> PairedDifference:
    """The change of the mean, of (P, n) values of the same seeds, with its p-value (`paired_difference_interval`).

    Raises:
        InputError: The two differ in shape, or hold no image.
    """
    return paired_difference_interval(_column(before), _column(after), _mean)


def _column(values: Tensor) -> Tensor:
    """(P, n) -> (P, n, 1), the form of reads."""
    if values.dim() != 2:
        raise InputError(f"values have shape {tuple(values.shape)}; expected (P, n), one an image")
    return values[..., None]


def _mean(values: Tensor) -> Tensor:
    """(..., P, n, 1) -> (...)."""
    return values.mean((-1, -2, -3))
