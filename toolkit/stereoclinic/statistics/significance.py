"""Exact tests of single prompts, and corrections for testing many of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.shares import top_group


def prompt_p_values(before: Tensor, after: Tensor) -> list[float]:
    """For each prompt, the p-value of no change of any group's share on the same seeds.

    An image is up for a group if it is read as that group after and was not before, and down in the other case. The
    exact sign test (of paired answers: McNemar's test) compares ups and downs. With K > 2 groups the smallest of K
    p-values is multiplied by K (Bonferroni).

    Args:
        before: (P, n, K) reads; image i of a prompt has the same seed as in `after`.
        after: (P, n, K) reads.

    Returns:
        P numbers, not corrected for the number of prompts; see `holm` and `benjamini_hochberg`.

    Raises:
        InputError: The two sides differ in shape.

    References: Dixon & Mood, The Statistical Sign Test, JASA 1946; McNemar, Note on the Sampling Error of the
    Difference between Correlated Proportions, Psychometrika 1947.
    """
    from scipy.stats import binom

    if before.shape != after.shape or before.dim() != 3:
        raise InputError(
            f"reads before have shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "expected (P, n, K), the same prompts and seeds on both sides"
        )
    moved = top_group(after) - top_group(before)  # (P, n, K)
    ups, downs = (moved > 0).sum(1), (moved < 0).sum(1)  # (P, K)
    tail = binom.sf(torch.maximum(ups, downs).numpy() - 1, (ups + downs).numpy(), 0.5)
    groups = before.shape[-1]
    smallest = torch.from_numpy(2 * tail).clamp_max(1).amin(1)
    corrected: list[float] = (smallest if groups == 2 else groups * smallest).clamp_max(1).tolist()
    return corrected


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of even one false finding stays below the level.

    Raises:
        InputError: A value is not a probability.

    Examples:
        >>> holm([0.25, 0.125, 0.5])
        [0.5, 0.375, 0.5]
    """
    return _corrected(p_values, "holm")


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's correction: the expected share of false findings stays below the level.

    Raises:
        InputError: A value is not a probability.

    Examples:
        >>> benjamini_hochberg([0.25, 0.125, 0.5])
        [0.375, 0.375, 0.5]
    """
    return _corrected(p_values, "fdr_bh")


def _corrected(p_values: Sequence[float], method: str) -> list[float]:
    from statsmodels.stats.multitest import multipletests

    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise InputError(f"p-value {wrong[0]}; expected probabilities between 0 and 1")
    return [float(p) for p in multipletests(p_values, method=method)[1]] if len(p_values) else []
