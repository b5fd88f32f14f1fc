"""Shares corrected for the reader's own error, from images whose group is known.

With C the reader's confusion matrix, C[k, j] = P(read j | is k), and p the true shares, the reads have shares
q = C' p. Hence p is the point of the simplex whose C' p is nearest to q:

    p = argmin ||C' p - q||^2        over p_k >= 0, sum_k p_k = 1

For two groups and a solution inside it is (q + specificity - 1) / (sensitivity + specificity - 1), known as the
Rogan-Gladen estimator and as adjusted count.

References: Rogan & Gladen, Estimating Prevalence from the Results of a Screening Test, American Journal of Epidemiology
1978; Forman, Quantifying Counts and Costs via Classification, Data Mining and Knowledge Discovery 2008; Duchi et al.,
Efficient Projections onto the l1-Ball, ICML 2008 (projection); Beck & Teboulle, FISTA, SIAM J. Imaging Sciences 2009.
"""

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.resampling import LOW, check_draws, dirichlet, on_simplex, or_seeded, percentiles
from stereoclinic.statistics.shares import distribution, top_group

_NEAR_SINGULAR = 0.1  # smallest singular value: below it, errors of reads are multiplied by more than ten
_ITERATIONS = 500


def corrected_shares(shares: Tensor, confusion: Tensor) -> Tensor:
    """Shares without the reader's error.

    Args:
        shares: (..., K) as read.
        confusion: (..., K, K) rates or counts, rows are what is there and columns what is read.

    Returns:
        (..., K) float64.

    Raises:
        InputError: Shapes do not fit, a group has no image, or the matrix is too near singular to be inverted.
    """
    shares, rates = distribution(shares, "shares"), torch.as_tensor(confusion).double()
    groups = shares.shape[-1]
    if rates.shape[-2:] != (groups, groups):
        raise InputError(f"the confusion matrix has shape {tuple(rates.shape)}; expected (..., {groups}, {groups})")
    total = rates.sum(-1, keepdim=True)
    if not bool((rates >= 0).all()) or not bool((total > 0).all()):
        raise InputError("the confusion matrix has a negative entry or a group without an image")
    rates = rates / total
    smallest = float(torch.linalg.svdvals(rates).min())
    if smallest < _NEAR_SINGULAR:
        raise InputError(_too_near(smallest))
    return _inverted(shares, rates)


def corrected_intervals(
    reads: Tensor,
    confusion: Tensor,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> list[Interval]:
    """Corrected share of each group among images, with an interval for the errors of images and confusion matrix.

    Both the images' counts and each row of the matrix are drawn anew (`resampling.dirichlet`) and inverted together.

    Args:
        reads: (n, K) class probabilities of the images; the top group counts.
        confusion: (K, K) counts, rows are the known groups and columns what was read.
        resamples: Number of draws.
        generator: Source of randomness; seeded with 0 if None.

    Returns:
        K intervals.

    Raises:
        InputError: As `corrected_shares`, or the matrix is from so few images that it may well be singular.
    """
    check_draws(resamples)
    hits = top_group(distribution(reads, "reads"))
    if hits.dim() != 2 or len(hits) == 0 or confusion.shape != (hits.shape[1], hits.shape[1]):
        raise InputError(
            f"reads have shape {tuple(hits.shape)} and the confusion matrix {tuple(confusion.shape)}; expected (n, K)"
            " and (K, K)"
        )
    generator = or_seeded(generator)
    estimate = corrected_shares(hits.mean(0).cpu(), confusion.cpu())
    shares = dirichlet(hits.sum(0), resamples, generator)  # (R, K)
    rates = dirichlet(confusion, resamples, generator)  # (R, K, K)
    smallest = torch.linalg.svdvals(rates)[..., -1]
    if float(torch.quantile(smallest, LOW)) < _NEAR_SINGULAR:
        raise InputError(_too_near(float(smallest.median())) + ", and have more images behind the matrix")
    intervals = []
    for value, draws in zip(estimate.tolist(), _inverted(shares, rates).T, strict=True):
        low, high = percentiles(draws)
        intervals.append(Interval(value, min(value, low), max(value, high)))
    return intervals


def _too_near(smallest: float) -> str:
    return (
        f"the reader's confusion matrix is too near singular (smallest singular value {smallest:.2g}, at least"
        f" {_NEAR_SINGULAR} is needed): it hardly tells the groups apart; use another reader"
    )


def _inverted(shares: Tensor, rates: Tensor) -> Tensor:
    """The simplex's nearest p to each (..., K) shares: solved, or by descent where the solution lies outside."""
    shares = shares.expand(*torch.broadcast_shapes(shares.shape[:-1], rates.shape[:-2]), -1)
    transposed = rates.transpose(-1, -2).expand(*shares.shape, shares.shape[-1])
    solved: Tensor = torch.linalg.solve(transposed, shares[..., None])[..., 0].clone()
    outside = (solved < 0).any(-1)
    if shares.shape[-1] == 2:  # a line: its nearest end
        solved[outside] = solved[outside].clamp(0, 1)
    elif bool(outside.any()):
        solved[outside] = _descended(transposed[outside], shares[outside])
    return on_simplex(solved)


def _descended(matrix: Tensor, wanted: Tensor) -> Tensor:
    """argmin over the simplex of ||matrix p - wanted||^2 by accelerated projected gradient: (m, K, K), (m, K).

    All draws at once, where scipy's solvers take one after the other.
    """
    gram, linear = matrix.transpose(-1, -2) @ matrix, (matrix.transpose(-1, -2) @ wanted[..., None])[..., 0]
    step = 1 / torch.linalg.matrix_norm(gram, 2)[..., None]
    point = ahead = torch.full_like(wanted, 1 / wanted.shape[-1])
    momentum = 1.0
    for _ in range(_ITERATIONS):
        slope = (gram @ ahead[..., None])[..., 0] - linear
        following = _projected(ahead - step * slope)
        later = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / later * (following - point)
        point, momentum = following, later
    return point


def _projected(values: Tensor) -> Tensor:
    """The nearest point of the simplex to each row: (m, K) -> (m, K)."""
    ordered = values.sort(-1, descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, values.shape[-1] + 1, dtype=values.dtype)
    kept = (ordered > excess).sum(-1, keepdim=True)
    return (values - excess.gather(-1, kept - 1)).clamp_min(0)
