"""How far apart two sets of images are in a feature space: the Frechet distance behind FID.

The features are the caller's: a network's embeddings, or anything else with one row per image. Compare a
treated model with the *same model untreated*, and print the distance between two halves of untreated images
beside it: at finite n the distance of two samples of one distribution is above zero.
"""

import torch
from torch import Tensor

from stereoclinic.errors import InputError


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
