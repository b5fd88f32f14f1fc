"""Figures that are the mean of one number an image: CLIPScore, or how alike pictures of one seed are.

    figure = mean over prompts of the mean over their images           (P, n) -> ()

Intervals are of other seeds of the same prompts; changes are of the same seeds.
"""

from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.intervals.statistics import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference_interval,
)


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
