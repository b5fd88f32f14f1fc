"""Distances between sets of images in a feature space: Frechet (FID), kernel (KID), and diversity within groups.

Features are given by the caller, one row per image. Compare a treated model with the *same model untreated*, and
print what two samples of the untreated model show: at finite n the Frechet distance of two samples of one
distribution is above zero.

torchmetrics' FID and KID want a network and subsets; these take features, and weighted samples.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.resampling import NORMAL

_ROWS = 4096  # of a block of the kernel, so that memory stays flat
_PARTS = 12  # of a sample in a jackknife
Sample = tuple[Tensor, Tensor]


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), n >= 2, in float64.

    Raises:
        InputError: Fewer than two rows, or values that are not finite.
    """
    features = _checked(features)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (features.shape[0] - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two normal distributions.

    ||mu1 - mu2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). The product is symmetric, so the trace of its root is a
    sum over real eigenvalues. Singular covariances, as of fewer images than features, do no harm.

    Args:
        mu1: (d,) mean of the first.
        cov1: (d, d) covariance of the first.
        mu2: (d,) mean of the second.
        cov2: (d, d) covariance of the second.

    Returns:
        The distance, never negative.

    Raises:
        InputError: The shapes do not fit together.

    References: Dowson & Landau, The Frechet Distance between Multivariate Normal Distributions, 1982; Heusel et al.,
    GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6 (FID).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).to(torch.float64) for x in (mu1, cov1, mu2, cov2))
    d = mu1.shape[0] if mu1.dim() == 1 else -1
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mu1, cov1, mu2, cov2))
        raise InputError(f"means and covariances have shapes {shapes}; expected (d,), (d, d), (d,), (d, d)")
    values, vectors = torch.linalg.eigh((cov1 + cov1.T) / 2)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    # Rounding leaves a symmetric product a little asymmetric and zero eigenvalues a little negative.
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, distance.item())


def frechet_between(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features, (n, d) and (m, d); see `frechet_distance`."""
    return frechet_distance(*feature_statistics(features_a), *feature_statistics(features_b))


def frechet_within_groups(arm: Sample, reference: Sample, floor: Sample, cells: int) -> tuple[float, float]:
    """Frechet distance to a reference that shows the same groups, so that a change of groups alone does not count.

    A cell is a prompt x group. The reference is weighted so that each cell has the share that it has in the arm. The
    floor, a second sample of the reference, is weighted alike. It is a little high where the arm is unevenly spread
    over cells, as weighted samples are effectively smaller.

    Args:
        arm: Features (n, d) and cells (n,) of the images.
        reference: The same of images that were drawn with each group asked for.
        floor: The same of another sample of those, of the arm's size.
        cells: Number of cells.

    Returns:
        The distance, and its floor. Images in cells that the others lack are left out; NaN where none is left.
    """
    features, own = arm
    shared = torch.stack([torch.bincount(each[1], minlength=cells) > 0 for each in (reference, floor)]).all(0)
    kept = shared[own]
    share = torch.bincount(own[kept], minlength=cells).double()
    samples = [(each, (share / torch.bincount(w, minlength=cells).clamp_min(1))[w]) for each, w in (reference, floor)]
    if int(kept.sum()) < 2 or any(int((weights > 0).sum()) < 2 for _, weights in samples):
        return float("nan"), float("nan")
    wanted, other = (_weighted_statistics(*each) for each in samples)
    return frechet_distance(*feature_statistics(features[kept]), *wanted), frechet_distance(*other, *wanted)


def _weighted_statistics(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of weighted rows."""
    features, weights = features.double(), weights.double() / weights.sum()
    mean = weights @ features
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (1 - weights.square().sum())


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy (KID) of features (n, d) and (m, d), n, m >= 2.

    MMD^2 = mean over i != j of k(a_i, a_j) + mean over i != j of k(b_i, b_j) - 2 mean over i, j of k(a_i, b_j),
    k(x, y) = (<x, y> / d + 1)^3. Its mean is zero for two samples of one distribution of any size, so it is at times
    negative.

    Raises:
        InputError: The shapes do not fit, or there are values that are not finite.

    References: Binkowski et al., Demystifying MMD GANs, ICLR 2018, sections 2.1 and 4; Gretton et al., A Kernel
    Two-Sample Test, JMLR 2012, lemma 6 (the unbiased estimate).
    """
    a, b = _checked(a), _checked(b)
    d = a.shape[1]
    if b.shape[1] != d:
        raise InputError(f"features have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (n, d) and (m, d)")

    def total(x: Tensor, y: Tensor) -> Tensor:
        summed: Tensor = sum(((rows @ y.T / d + 1) ** 3).sum() for rows in x.split(_ROWS))
        return summed

    def among(x: Tensor) -> Tensor:
        itself = ((x.square().sum(1) / d + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return (among(a) + among(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def _checked(features: Tensor) -> Tensor:
    features = torch.as_tensor(features).to(torch.float64)
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (n, d) with at least two images")
    if not bool(features.isfinite().all()):
        raise InputError("features hold values that are not finite; check the feature network and its precision")
    return features


def pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over pairs of rows of (n, d), n >= 2.

    Raises:
        InputError: Fewer than two rows.
    """
    if features.dim() != 2 or len(features) < 2:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (n, d) with at least two images")
    return torch.nn.functional.pdist(features.double()).mean().item()


def diversity_within(
    features: Tensor, cells: Tensor, reference: Tensor, reference_cells: Tensor
) -> tuple[float, float]:
    """How different images of the same prompt and group are, and those of a reference in the same cells.

    It is the mean over cells (prompt x group) of `pairwise_distance`. Cells count by the judged images in them, on
    both sides, so a change of groups alone moves the figure and its reference alike.

    Args:
        features: (n, d) of the images that are judged.
        cells: (n,) integer cell of each.
        reference: (m, d) of other images.
        reference_cells: (m,).

    Returns:
        Both diversities, over the cells of which both sides have two or more images; NaN where there is none.

    Raises:
        InputError: Features and cells do not fit together.

    Reference: Zhu et al., Toward Multimodal Image-to-Image Translation, NeurIPS 2017, section 5.
    """
    for rows, own in ((features, cells), (reference, reference_cells)):
        if rows.dim() != 2 or own.shape != rows.shape[:1] or own.is_floating_point():
            raise InputError(
                f"features have shape {tuple(rows.shape)}, cells {tuple(own.shape)}; expected (n, d) and integers (n,)"
            )
    total, judged, compared = 0, 0.0, 0.0
    for cell in cells.unique().tolist():
        one, other = features[cells == cell], reference[reference_cells == cell]
        if min(len(one), len(other)) >= 2:
            total += len(one)
            judged += len(one) * pairwise_distance(one)
            compared += len(one) * pairwise_distance(other)
    return (judged / total, compared / total) if total else (float("nan"), float("nan"))


def jackknife_ratio(measure: Callable[..., tuple[float, float]], sizes: Sequence[int]) -> Interval | None:
    """The ratio of two figures of the same samples with a grouped jackknife interval.

    Bootstrap resampling would move such figures: distances grow when an image is drawn twice. So each sample is split
    into at most 12 parts, and the logarithm of the ratio computed without each of them. The interval is normal on the
    logarithm. The jackknife's variance errs upward, so the interval is rather wide.

    Args:
        measure: Called with the numbers (Tensor) that are kept of each sample; gives two figures above 0.
        sizes: Size of each sample; the samples are independent.

    Returns:
        The ratio; None where some part leaves nothing to measure.

    References: Shao & Wu, A General Theory for Jackknife Variance Estimation, Annals of Statistics 1989 (of groups);
    Efron & Stein, The Jackknife Estimate of Variance, Annals of Statistics 1981 (it errs upward).
    """
    whole = [torch.arange(size) for size in sizes]

    def log_ratio(kept: Sequence[Tensor]) -> float:
        above, below = measure(*kept)
        return math.log(above / below) if above > 0 and below > 0 else math.nan

    estimate, variance = log_ratio(whole), 0.0
    for place, numbers in enumerate(whole):
        parts = min(_PARTS, len(numbers))
        without = [
            log_ratio([*whole[:place], numbers[numbers % parts != part], *whole[place + 1 :]]) for part in range(parts)
        ]
        mean = sum(without) / parts
        variance += (parts - 1) / parts * sum((each - mean) ** 2 for each in without)
    if not math.isfinite(estimate + variance):
        return None
    half = NORMAL * math.sqrt(variance)
    return Interval(*(math.exp(end) for end in (estimate, estimate - half, estimate + half)))


def within_groups_ratio(arm: Sample, reference: Sample, floor: Sample, cells: int) -> Interval | None:
    """`frechet_within_groups` over its floor; the jackknife of `jackknife_ratio` leaves out seeds.

    Args:
        arm: Features (P, n, F) and cells (P, n) of the images.
        reference: The same of images that were drawn with each group asked for, on other seeds.
        floor: The same of another sample of those, on the arm's own seeds.
        cells: Number of cells.
    """

    def of(sample: Sample, seeds: Tensor) -> Sample:
        features, own = sample
        return features[:, seeds].flatten(0, 1), own[:, seeds].flatten()

    def measure(seeds: Tensor, others: Tensor) -> tuple[float, float]:
        return frechet_within_groups(of(arm, seeds), of(reference, others), of(floor, seeds), cells)

    return jackknife_ratio(measure, (arm[1].shape[1], reference[1].shape[1]))
