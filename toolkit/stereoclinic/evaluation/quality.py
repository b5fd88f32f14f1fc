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
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, distance.item())


def frechet_between(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features, (n, d) and (m, d); see ``frechet_distance``."""
    return frechet_distance(*feature_statistics(features_a), *feature_statistics(features_b))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
