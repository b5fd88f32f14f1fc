"""The kernel distance behind KID: how far apart two sets of features are, without a bias at small n.

    MMD^2 = mean over i != j of k(a_i, a_j)  +  mean over i != j of k(b_i, b_j)  -  2 mean over i, j of k(a_i, b_j)
    k(x, y) = (gamma <x, y> + coef)^degree                      gamma = 1 / d, coef = 1, degree = 3 unless given

Its mean is zero for two samples of one distribution whatever their sizes (so it is at times below zero), where the
Frechet distance of few images is above.

Reference: Binkowski et al., Demystifying MMD GANs, ICLR 2018, sections 2.1 and 4; Gretton et al., A Kernel
Two-Sample Test, JMLR 2012, lemma 6 (the unbiased estimate).
"""

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.intervals.resampling import or_seeded

_ROWS = 4096  # of a block of the kernel, so that memory stays flat


def kernel_distance(a: Tensor, b: Tensor, degree: int = 3, gamma: float | None = None, coef: float = 1.0) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features, all of them at once.

    Args:
        a: (n, d) features, n >= 2.
        b: (m, d), m >= 2.
        degree: Of the polynomial kernel.
        gamma: Its factor; 1 / d if None.
        coef: Its constant.

    Raises:
        InputError: If the shapes do not fit, or there are values that are not finite.
    """
    a, b = _pair(a, b)
    gamma = 1 / a.shape[1] if gamma is None else gamma

    def total(x: Tensor, y: Tensor) -> Tensor:
        summed: Tensor = sum(((gamma * rows @ y.T + coef) ** degree).sum() for rows in x.split(_ROWS))
        return summed

    def among(x: Tensor) -> Tensor:
        itself = ((gamma * x.square().sum(1) + coef) ** degree).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return (among(a) + among(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def kernel_distance_of_subsets(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Mean and standard deviation of ``kernel_distance`` over random subsets, as KID is usually reported.

    Args:
        a: (n, d) features.
        b: (m, d).
        subsets: Number of pairs of subsets.
        subset_size: Images in each, at most n and m.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: As ``kernel_distance``, or a subset is smaller than two or larger than the sets.
    """
    a, b = _pair(a, b)
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise InputError(
            f"{subsets} subsets of {subset_size} images; expected 1 or more, of 2 to {min(len(a), len(b))} images"
        )
    generator = or_seeded(generator)
    found = []
    for _ in range(subsets):
        # In this order, so that torchmetrics with the same seed takes the same subsets.
        one, other = (x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)] for x in (a, b))
        found.append(kernel_distance(one, other))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(a).to(torch.float64), torch.as_tensor(b).to(torch.float64)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or a.shape[1] < 1:
        raise InputError(
            f"features have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (n, d) and (m, d) with two or more"
        )
    if not bool(a.isfinite().all() & b.isfinite().all()):
        raise InputError("features hold values that are not finite; check the feature network and its precision")
    return a, b
