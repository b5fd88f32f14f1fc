"""Many tests at once: p-values that stay honest when the smallest of them is looked at.

Both take p-values in any order and return them corrected in that order, to be compared with the level itself.
"""

from collections.abc import Sequence

from stereoclinic.errors import InputError


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
