"""How far apart two sets of images are in a feature space: the Frechet distance behind FID.

The features are the caller's: a network's embeddings, or anything else with one row per image. Compare a
treated model with the *same model untreated*, and print the distance between two halves of untreated images
beside it: at finite n the distance of two samples of one distribution is above zero.

The kernel distance behind KID: how far apart two sets of features are, without a bias at small n.

    MMD^2 = mean over i != j of k(a_i, a_j)  +  mean over i != j of k(b_i, b_j)  -  2 mean over i, j of k(a_i, b_j)
    k(x, y) = (gamma <x, y> + coef)^degree                      gamma = 1 / d, coef = 1, degree = 3 unless given

Its mean is zero for two samples of one distribution whatever their sizes (so it is at times below zero), where the
Frechet distance of few images is above.

Reference: Binkowski et al., Demystifying MMD GANs, ICLR 2018, sections 2.1 and 4; Gretton et al., A Kernel
Two-Sample Test, JMLR 2012, lemma 6 (the unbiased estimate).

How different the pictures of the same prompt and group are: a treatment may give each group one face.

    D = mean over cells of the mean distance ||f_i - f_j|| over pairs i < j of the cell's pictures

Cells are prompt x group. A cell counts as much as the treated pictures that are in it, on both sides, so a change of
groups alone moves the figure and its reference alike. (The same mean with LPIPS as the distance is what papers on
multimodal generation call LPIPS diversity.)

Reference: Zhu et al., Toward Multimodal Image-to-Image Translation, NeurIPS 2017, section 5 (mean distance of pairs).

Intervals of figures that resampling would move: distances between samples grow when an image is drawn twice.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.resampling import check_confidence, or_seeded


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of features.

    Args:
        features: (n, d), one row per image, n >= 2.

    Returns:
        (d,) mean and (d, d) covariance, float64.

    Raises:
        InputError: if there are fewer than two rows, or values that are not finite.
    """
    features = torch.as_tensor(features).to(torch.float64)
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (n, d) with at least two images")
    if not bool(features.isfinite().all()):
        raise InputError("features hold values that are not finite; check the feature network and its precision")
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (features.shape[0] - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two normal distributions.

    ||mu1 - mu2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). The product is symmetric, so its square root's
    trace is a sum over eigenvalues: no complex square root of a non-symmetric matrix, and no trouble with
    singular covariances, which fewer images than features always give.

    Args:
        mu1: (d,) mean of the first.
        cov1: (d, d) covariance of the first.
        mu2: (d,) mean of the second.
        cov2: (d, d) covariance of the second.

    Returns:
        The distance, never negative.

    Raises:
        InputError: if the shapes do not fit together.

    Reference: Dowson & Landau, The Frechet Distance between Multivariate Normal Distributions, 1982; Heusel
    et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6 (FID).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).to(torch.float64) for x in (mu1, cov1, mu2, cov2))
    d = mu1.shape[0] if mu1.dim() == 1 else -1
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mu1, cov1, mu2, cov2))
        raise InputError(f"means and covariances have shapes {shapes}; expected (d,), (d, d), (d,), (d, d)")
    root = _symmetric_root(cov1)
    product = root @ cov2 @ root
    # Rounding leaves a symmetric product a little asymmetric and zero eigenvalues a little negative.
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, distance.item())


def frechet_between(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features, (n, d) and (m, d); see ``frechet_distance``."""
    return frechet_distance(*feature_statistics(features_a), *feature_statistics(features_b))


def frechet_within_groups(
    arm: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], floor: tuple[Tensor, Tensor], cells: int
) -> tuple[float, float]:
    """Frechet distance to a reference that shows the same people: what a change of groups alone does not account for.

    Cells are prompt x group. The reference is weighted so that each cell has the share that it has in the arm, and so
    is a second sample of the reference, whose distance to it is the floor. Where the arm is unevenly spread over cells
    the weighted samples are effectively smaller than the arm, so the floor is then a little high.

    Args:
        arm: Features (n, d) and cells (n,) of the images.
        reference: The same of images that were drawn with each group asked for.
        floor: The same of another sample of those, of the arm's size.
        cells: Number of cells.

    Returns:
        The distance, and its floor. Images in cells that the others lack are left out; NaN where none is left.
    """
    features, own = arm
    there = torch.stack([torch.bincount(each[1], minlength=cells) > 0 for each in (reference, floor)]).all(0)
    kept = there[own]
    share = torch.bincount(own[kept], minlength=cells).double()
    samples = [(each, (share / torch.bincount(w, minlength=cells).clamp_min(1))[w]) for each, w in (reference, floor)]
    if int(kept.sum()) < 2 or any(int((weights > 0).sum()) < 2 for _, weights in samples):
        return float("nan"), float("nan")
    wanted, other = (_weighted_statistics(*each) for each in samples)
    return frechet_distance(*feature_statistics(features[kept]), *wanted), frechet_distance(*other, *wanted)


def _weighted_statistics(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of weighted rows, unbiased for weights that were chosen without looking at the features."""
    features, weights = features.double(), weights.double() / weights.sum()
    mean = weights @ features
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (1 - weights.square().sum())


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


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


def pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over pairs of rows: (n, d), n >= 2.

    Raises:
        InputError: If there are fewer than two rows.
    """
    if features.dim() != 2 or len(features) < 2:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (n, d) with at least two images")
    return torch.nn.functional.pdist(features.double()).mean().item()


def diversity_within(
    features: Tensor, cells: Tensor, reference: Tensor, reference_cells: Tensor
) -> tuple[float, float]:
    """Diversity within cells, and that of a reference in the same cells.

    Args:
        features: (n, d) of the pictures that are judged.
        cells: (n,) integer cell of each.
        reference: (m, d) of other pictures.
        reference_cells: (m,).

    Returns:
        Both diversities, over the cells of which both sides have two or more pictures; NaN where there is none.

    Raises:
        InputError: If features and cells do not fit together.
    """
    for rows, own in ((features, cells), (reference, reference_cells)):
        if rows.dim() != 2 or own.shape != rows.shape[:1] or own.is_floating_point():
            raise InputError(
                f"features have shape {tuple(rows.shape)}, cells {tuple(own.shape)}; expected (n, d) and integers (n,)"
            )
    total, judged, compared = 0, 0.0, 0.0
    for cell in cells.unique().tolist():
        here, there = features[cells == cell], reference[reference_cells == cell]
        if min(len(here), len(there)) >= 2:
            total += len(here)
            judged += len(here) * pairwise_distance(here)
            compared += len(here) * pairwise_distance(there)
    return (judged / total, compared / total) if total else (float("nan"), float("nan"))


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
