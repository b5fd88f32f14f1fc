"""Shares of the groups among images, and their gap to a target.

    reads (n, K)  ->  shares p (K,)  ->  gap(p, target) >= 0, zero at the target

Shares are K non-negative numbers that sum to one. All functions take any leading dimensions, so all prompts or all
bootstrap resamples are computed in one call. The target is uniform (parity) unless given. A group is what a reader
perceives in an image, not the identity of a person.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stereoclinic.errors import InputError

# Readers work in half or single precision, so probabilities may miss a sum of one by this much.
_SUM_TOLERANCE = 1e-2


def shares_from_reads(probabilities: Tensor, hard: bool) -> Tensor:
    """Shares of the groups among images, from a reader's class probabilities.

    Args:
        probabilities: (..., n, K) class probabilities of n images.
        hard: Count the most probable group of each image (a tie counts in equal parts); else average probabilities.

    Returns:
        (..., K) shares, float64.

    Raises:
        InputError: The rows are not probabilities over at least two groups, or there are no images.

    Examples:
        >>> reads = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
        >>> shares_from_reads(reads, hard=True).tolist()
        [0.75, 0.25]
    """
    reads = _image_reads(probabilities)
    return (top_group(reads) if hard else reads).mean(-2)


def top_group(reads: Tensor) -> Tensor:
    """One-hot of each row's largest entry, shared equally on a tie: (..., K) -> (..., K)."""
    top = (reads == reads.amax(-1, keepdim=True)).to(torch.float64)
    return top / top.sum(-1, keepdim=True)


def parity_gap(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean absolute gap to the target, (1/K) sum_k |p_k - target_k|: (..., K) -> (...), between 0 and 2/K.

    Examples:
        >>> parity_gap(torch.tensor([[0.75, 0.25], [0.5, 0.5]])).tolist()
        [0.25, 0.0]
        >>> parity_gap(torch.tensor([0.75, 0.25]), torch.tensor([0.75, 0.25])).item()
        0.0
    """
    shares, target = _shares_and_target(shares, target)
    return _sum((shares - target).abs()) / shares.shape[-1]


def fairness_discrepancy(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Euclidean distance to the target, ||p - 1/K||_2 at parity: (..., K) -> (...), between 0 and sqrt(2).

    Reference: Choi et al., Fair Generative Modeling via Weak Supervision, ICML 2020, section 5.
    """
    shares, target = _shares_and_target(shares, target)
    distance: Tensor = torch.linalg.vector_norm(shares - target, dim=-1)
    return distance


def deviation_ratio(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Largest gap of one group over the largest possible one, max_k |p_k - 1/K| / (1 - 1/K): from 0 to 1.

    For another target the denominator is max_k max(target_k, 1 - target_k).

    Args:
        shares: (..., K).
        target: (K,) or (..., K); uniform if None.

    Returns:
        (...) float64.

    References: Li et al., Self-Discovering Interpretable Diffusion Latent Directions, CVPR 2024 (deviation ratio);
    Orgad et al., Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023 (delta, the same for K = 2).
    """
    shares, target = _shares_and_target(shares, target)
    largest = torch.maximum(target, 1 - target).amax(-1)
    return (shares - target).abs().amax(-1) / largest


def sdtv(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Total variation distance to the target, (1/2) sum_k |p_k - target_k|: (..., K) -> (...), from 0 to 1.

    It is K/2 times the parity gap, and is also known as stereotype-distribution total variation (Zhou et al.,
    Association of Objects May Engender Stereotypes, NeurIPS 2024).

    Examples:
        >>> shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
        >>> sdtv(shares).item(), parity_gap(shares).item()
        (0.25, 0.125)
    """
    shares, target = _shares_and_target(shares, target)
    return _sum((shares - target).abs()) / 2


def kl_to_target(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence sum_k p_k log(p_k / target_k) in nats: (..., K) -> (...).

    It is infinite when a group appears that the target excludes.
    """
    shares, target = _shares_and_target(shares, target)
    return _sum(torch.special.xlogy(shares, shares) - torch.special.xlogy(shares, target)).clamp_min(0)


def normalised_entropy(shares: Tensor) -> Tensor:
    """Diversity -sum_k p_k log p_k / log K: (..., K) -> (...), 1 at parity and 0 when one group takes all."""
    shares = distribution(shares, "shares")
    entropy = -_sum(torch.special.xlogy(shares, shares))
    return (entropy / torch.log(torch.tensor(shares.shape[-1], dtype=shares.dtype))).clamp(0, 1)


def unsure_rate(probabilities: Tensor, high: float = 0.8, no_group: Tensor | None = None) -> Tensor:
    """Share of images whose top group has a probability below `high`.

    A treatment that blends groups within one face moves the shares to parity and raises this rate: read both together.

    Args:
        probabilities: (..., n, K) class probabilities.
        high: Probability from which on a read is sure, above 0 and at most 1.
        no_group: (..., n) probability that an image shows no group; 0 if None.

    Returns:
        (...) float64 between 0 and 1.

    Raises:
        InputError: The rows are not probabilities, there are no images, or `high` is out of range.

    Examples:
        >>> reads = torch.tensor([[0.95, 0.05], [0.95, 0.05]])
        >>> unsure_rate(reads).item(), unsure_rate(reads, no_group=torch.tensor([0.98, 0.0])).item()
        (0.0, 0.5)
    """
    if not 0 < high <= 1:
        raise InputError(f"high is {high}; expected a probability above 0 and at most 1, such as 0.8")
    reads = _image_reads(probabilities)
    seen = reads if no_group is None else _with_none(reads, no_group)[..., :-1]
    return (seen.amax(-1) < high).to(torch.float64).mean(-1)


def no_group_rate(probabilities: Tensor, no_group: Tensor) -> Tensor:
    """Share of images for which "no group" is more probable than any of the groups (a tie counts in part).

    Args:
        probabilities: (..., n, K) probabilities of the groups, summing to 1 without "no group".
        no_group: (..., n) probability of no group.

    Returns:
        (...) float64 between 0 and 1.

    Raises:
        InputError: Either are not probabilities, or there are no images.

    Examples:
        >>> no_group_rate(torch.tensor([[0.95, 0.05], [0.95, 0.05]]), torch.tensor([0.98, 0.4])).item()
        0.5
    """
    return top_group(_with_none(_image_reads(probabilities), no_group))[..., -1].mean(-1)


def _image_reads(probabilities: Tensor) -> Tensor:
    reads = distribution(probabilities, "reads")
    if reads.dim() < 2 or reads.shape[-2] == 0:
        raise InputError(f"reads have shape {tuple(reads.shape)}; expected (..., n, K) with at least one image")
    return reads


def _with_none(reads: Tensor, no_group: Tensor) -> Tensor:
    """(..., K) of the groups and (...) of no group -> (..., K + 1) of both."""
    none = torch.as_tensor(no_group).to(torch.float64)
    if none.shape != reads.shape[:-1] or not bool(((none >= 0) & (none <= 1)).all()):
        raise InputError(
            f"probabilities of no group have shape {tuple(none.shape)} and range from {_extreme(none, 'min')} to"
            f" {_extreme(none, 'max')}; expected {tuple(reads.shape[:-1])}, from 0 to 1"
        )
    return torch.cat([reads * (1 - none)[..., None], none[..., None]], -1)


Gap = Callable[[Tensor, Tensor | None], Tensor]

#: Every gap by the name it is reported under: zero at the target, larger is worse.
GAPS: dict[str, Gap] = {
    "parity_gap": parity_gap,
    "fairness_discrepancy": fairness_discrepancy,
    "deviation_ratio": deviation_ratio,
    "sdtv": sdtv,
    "kl": kl_to_target,
}


def distribution(values: Tensor, what: str) -> Tensor:
    """Checks that the last dimension holds probabilities; returns them in float64, summing to one exactly."""
    values = torch.as_tensor(values).to(torch.float64)
    if values.dim() == 0 or values.shape[-1] < 2:
        raise InputError(f"{what} have shape {tuple(values.shape)}; expected (..., K) with K >= 2 groups")
    total = _sum(values)[..., None]
    # Written so that NaN fails too.
    if values.numel() and not bool((values.amin() >= 0) & ((total - 1).abs().amax() <= _SUM_TOLERANCE)):
        raise InputError(
            f"{what} range from {_extreme(values, 'min')} to {_extreme(values, 'max')} and sum to between "
            f"{_extreme(total, 'min')} and {_extreme(total, 'max')}; expected probabilities that sum to 1 "
            "(apply a softmax to logits)"
        )
    return values / total


def target_of(shares: Tensor, target: Tensor | None) -> Tensor:
    """The target of shares (..., K), checked; uniform if None."""
    if target is None:
        return torch.full_like(shares, 1 / shares.shape[-1])
    target = distribution(target, "target shares").to(shares.device)
    if target.shape[-1] != shares.shape[-1]:
        raise InputError(
            f"the target has {target.shape[-1]} groups and the shares {shares.shape[-1]}; expected the same number"
        )
    return target


def _shares_and_target(shares: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    shares = distribution(shares, "shares")
    return shares, target_of(shares, target)


def _sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, as a product: for two or three groups that is several times faster."""
    return values @ values.new_ones(values.shape[-1])


def _extreme(values: Tensor, which: str) -> str:
    return f"{getattr(values, which)().item():.4g}" if values.numel() else "nothing"
