"""Exact answers where the counts are small: Clopper-Pearson intervals, and the sign test on the same seeds.

Both are tails of a binomial, X ~ B(n, p), summed term by term.

Many tests at once: p-values that stay honest when the smallest of them is looked at.

Both take p-values in any order and return them corrected in that order, to be compared with the level itself.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.resampling import check_confidence
from stereoclinic.statistics.shares import top_group

_HALVINGS = 50  # of [0, 1]: ends to 1e-15


def exact_interval(successes: float, n: int, confidence: float = 0.95, mid_p: bool = False) -> Interval:
    """Clopper-Pearson interval of a proportion: it covers at least as often as it says, whatever the proportion.

        low:  P(X >= x | low) = (1 - confidence) / 2          high:  P(X <= x | high) = (1 - confidence) / 2

    What guarantees that makes it wide where counts are small (``wilson_interval`` is right on average instead).
    ``mid_p`` counts the observed value half, which is right on average too and gives the guarantee up.

    Args:
        successes: Number of successes among n; an image that counts in part, on an exact tie, moves both ends outward.
        n: Number of trials, at least 1.
        confidence: Coverage that is kept at least.
        mid_p: Count P(X = x) half.

    Returns:
        The proportion and the ends of its interval, within [0, 1].

    Raises:
        InputError: If ``successes`` or ``n`` is out of range.

    References: Clopper & Pearson, The Use of Confidence or Fiducial Limits, Biometrika 1934; Lancaster, Significance
    Tests in Discrete Distributions, JASA 1961 (mid-p).
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} successes of {n}; expected n >= 1 and between 0 and n successes")
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    low = _lower_end(math.floor(successes), n, tail, mid_p)
    high = 1 - _lower_end(n - math.ceil(successes), n, tail, mid_p)
    return Interval(successes / n, low, high)


def sign_test(ups: int, downs: int) -> float:
    """Two-sided exact p-value that ups and downs are equally likely, ties left out.

    Published under two names: the sign test of paired values, and the exact McNemar test of paired yes-or-no answers,
    where ups and downs are the pairs that changed one way and the other.

    Args:
        ups: Number of pairs that went up.
        downs: Number that went down.

    Returns:
        P(at least as uneven | each is 1/2), 1 if nothing changed.

    Raises:
        InputError: If a number is negative.

    References: Dixon & Mood, The Statistical Sign Test, JASA 1946; McNemar, Note on the Sampling Error of the
    Difference between Correlated Proportions, Psychometrika 1947.

    Examples:
        >>> round(sign_test(5, 0), 4), sign_test(3, 3)
        (0.0625, 1.0)
    """
    if min(ups, downs) < 0:
        raise InputError(f"{ups} ups and {downs} downs; expected none below 0")
    return min(1.0, 2 * _upper_tail(max(ups, downs), ups + downs, 0.5))


def prompt_p_values(before: Tensor, after: Tensor) -> list[float]:
    """For each prompt, the p-value of no change of any group's share on the same seeds.

    An image is up for a group if it is read as that group after and was not before, down in the other case, and
    ``sign_test`` judges them. With two groups one test says it all; with K > 2 the smallest of K p-values is multiplied
    by K (Bonferroni).

    Args:
        before: (P, n, K) reads; image i of a prompt has the same seed as in ``after``.
        after: (P, n, K) reads.

    Returns:
        P numbers, not yet corrected for how many prompts there are; see ``intervals.multiplicity``.

    Raises:
        InputError: If the two sides differ in shape.
    """
    if before.shape != after.shape or before.dim() != 3:
        raise InputError(
            f"reads before have shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "expected (P, n, K), the same prompts and seeds on both sides"
        )
    moved = top_group(after) - top_group(before)  # (P, n, K)
    ups, downs = (moved > 0).sum(1).tolist(), (moved < 0).sum(1).tolist()
    groups = before.shape[-1]
    tests = [[sign_test(up, down) for up, down in zip(*each, strict=True)] for each in zip(ups, downs, strict=True)]
    return [each[0] if groups == 2 else min(1.0, groups * min(each)) for each in tests]


@lru_cache(maxsize=4096)
def _lower_end(x: int, n: int, tail: float, mid_p: bool) -> float:
    """The p at which x successes or more have the probability ``tail``; it grows with p, so halving finds it."""
    if x == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chance = _upper_tail(x, n, middle)
        if mid_p:
            chance = (chance + _upper_tail(x + 1, n, middle)) / 2
        low, high = (middle, high) if chance < tail else (low, middle)
    return (low + high) / 2


def _upper_tail(x: int, n: int, p: float) -> float:
    """P(X >= x) for X ~ B(n, p), 0 < p < 1."""
    k = torch.arange(x, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (ways + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum().item()


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of even one false finding stays below the level.

    With p_(1) <= ... <= p_(m):  corrected p_(i) = max over j <= i of (m - j + 1) p_(j), at most 1.

    Raises:
        InputError: If a value is no probability.

    Reference: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 1979.

    Examples:
        >>> holm([0.25, 0.125, 0.5])
        [0.5, 0.375, 0.5]
    """
    order = _ranked(p_values)
    corrected, largest = [1.0] * len(order), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[i])
        corrected[i] = min(1.0, largest)
    return corrected


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's step-up correction: the expected share of false findings stays below the level.

    With p_(1) <= ... <= p_(m):  corrected p_(i) = min over j >= i of (m / j) p_(j), at most 1. It holds for independent
    tests, such as those of prompts that share no seed's noise.

    Raises:
        InputError: If a value is no probability.

    Reference: Benjamini & Hochberg, Controlling the False Discovery Rate, JRSS B 1995.

    Examples:
        >>> benjamini_hochberg([0.25, 0.125, 0.5])
        [0.375, 0.375, 0.5]
    """
    order = _ranked(p_values)
    corrected, smallest = [1.0] * len(order), 1.0
    for rank, i in reversed(list(enumerate(order, start=1))):
        smallest = min(smallest, len(order) / rank * p_values[i])
        corrected[i] = smallest
    return corrected


def _ranked(p_values: Sequence[float]) -> list[int]:
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise InputError(f"p-value {wrong[0]}; expected probabilities between 0 and 1")
    return sorted(range(len(p_values)), key=p_values.__getitem__)
