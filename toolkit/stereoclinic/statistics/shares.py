"""How far the groups' shares are from where they should be.

Everything here is a function of *shares*: a vector p of K non-negative numbers that sum to one, the fractions
of a prompt's images that show each group. ``shares_from_reads`` makes them from a reader's probabilities, the
gaps in ``GAPS`` compare them with a target, and ``GroupShares`` accumulates them over batches and ranks.

    reads (n, K)  ->  shares p (K,)  ->  gap(p, target) >= 0, zero at the target

The functions take any leading dimensions, so the shares of all prompts, or of thousands of bootstrap
resamples, go through in one call. The target is uniform (parity) unless given. Groups are perceived
presentation in a picture.

What every metric here is a shell of: sums in double precision whose size does not grow with the images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from stereoclinic.errors import Incomplete, InputError


class Sums(Metric):
    """A metric whose states are added up over batches and ranks, so the result of several ranks is that of one."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, **sizes: tuple[int, ...]) -> None:
        """Adds a state of zeros for each name and size."""
        super().__init__()
        for name, size in sizes.items():
            self.add_state(name, default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Lets the states change device but not type.

        torchmetrics guards them against ``half()``, but not against ``to(torch.bfloat16)``, which is what a
        trainer in half precision calls on everything inside it; counts above 256 would then stop growing.
        """
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


# Readers work in half or single precision, so their sums miss one by this much; worse is a mistake.
SUM_TOLERANCE = 1e-2


def shares_from_reads(probabilities: Tensor, hard: bool) -> Tensor:
    """Shares of the groups among images, from a reader's class probabilities.

    Hard shares count each image for its most probable group (an exact tie counts in equal parts, so that the
    order of the groups never matters); soft shares average the probabilities.

    Args:
        probabilities: (..., n, K) class probabilities of n images.
        hard: count the top group rather than average.

    Returns:
        (..., K) shares, float64.

    Raises:
        InputError: if the rows are not probabilities over at least two groups, or there are no images.

    Examples:
        >>> reads = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
        >>> shares_from_reads(reads, hard=True).tolist()
        [0.75, 0.25]
    """
    reads = distribution(probabilities, "reads")
    if reads.dim() < 2 or reads.shape[-2] == 0:
        raise InputError(f"reads have shape {tuple(reads.shape)}; expected (..., n, K) with at least one image")
    return (top_group(reads) if hard else reads).mean(-2)


def top_group(reads: Tensor) -> Tensor:
    """One-hot of each row's largest entry, shared equally on an exact tie: (..., K) -> (..., K)."""
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

    Reference: Choi et al., Fair Generative Modeling via Weak Supervision, ICML 2020, section 5 (there with a
    reader's soft probabilities, and any reference distribution).
    """
    shares, target = _shares_and_target(shares, target)
    distance: Tensor = torch.linalg.vector_norm(shares - target, dim=-1)
    return distance


def deviation_ratio(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Largest gap of one group over the largest possible, max_k |p_k - 1/K| / (1 - 1/K): from 0 to 1.

    Published under two names that agree for two groups: the deviation ratio, and the delta |p - 1/2| / (1/2)
    of the papers on editing text-to-image models. For a target other than uniform the denominator is its own
    largest possible gap, max_k max(target_k, 1 - target_k), which is 1 - 1/K for the uniform one.

    Args:
        shares: (..., K).
        target: (K,) or (..., K); uniform if None.

    Returns:
        (...) float64.

    Reference: Li et al., Self-Discovering Interpretable Diffusion Latent Directions, CVPR 2024 (deviation
    ratio); Orgad et al., Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023 (delta).
    """
    shares, target = _shares_and_target(shares, target)
    largest = torch.maximum(target, 1 - target).amax(-1)
    return (shares - target).abs().amax(-1) / largest


def sdtv(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Total variation distance to the target, (1/2) sum_k |p_k - target_k|: (..., K) -> (...), from 0 to 1.

    The share of images that would have to change group. Two published names: total variation distance, and
    stereotype-distribution total variation (SDTV; Zhou et al., Association of Objects May Engender
    Stereotypes, NeurIPS 2024). It is K/2 times the parity gap, hence equal to it for two groups.

    Examples:
        >>> shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
        >>> sdtv(shares).item(), parity_gap(shares).item()
        (0.25, 0.125)
    """
    shares, target = _shares_and_target(shares, target)
    return _sum((shares - target).abs()) / 2


def kl_to_target(shares: Tensor, target: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence sum_k p_k log(p_k / target_k) in nats: (..., K) -> (...).

    Zero at the target, log K when one group takes all against a uniform target, and infinite when a group
    appears that the target excludes.
    """
    shares, target = _shares_and_target(shares, target)
    return _sum(torch.special.xlogy(shares, shares) - torch.special.xlogy(shares, target)).clamp_min(0)


def normalised_entropy(shares: Tensor) -> Tensor:
    """Diversity -sum_k p_k log p_k / log K: (..., K) -> (...), 1 at parity and 0 when one group takes all."""
    shares = distribution(shares, "shares")
    entropy = -_sum(torch.special.xlogy(shares, shares))
    return (entropy / torch.log(torch.tensor(shares.shape[-1], dtype=shares.dtype))).clamp(0, 1)


def unsure_rate(probabilities: Tensor, high: float = 0.8, no_group: Tensor | None = None) -> Tensor:
    """Share of images whose group the reader is unsure of: the top group's probability is below ``high``.

    With two groups and the default this is the band of probabilities between 0.2 and 0.8. A treatment that
    blends groups within one face moves the shares to parity and this rate up, so the two are read together.

    Args:
        probabilities: (..., n, K) class probabilities.
        high: probability from which on a read is sure, above 0 and at most 1.
        no_group: (..., n) probability that an image shows no group; what is left is the groups' part. None: none is.

    Returns:
        (...) float64 between 0 and 1.

    Raises:
        InputError: if the rows are not probabilities, there are no images, or ``high`` is out of range.

    Examples:
        >>> reads = torch.tensor([[0.95, 0.05], [0.95, 0.05]])
        >>> unsure_rate(reads).item(), unsure_rate(reads, no_group=torch.tensor([0.98, 0.0])).item()
        (0.0, 0.5)
    """
    if not 0 < high <= 1:
        raise InputError(f"high is {high}; expected a probability above 0 and at most 1, such as 0.8")
    reads = distribution(probabilities, "reads")
    if reads.dim() < 2 or reads.shape[-2] == 0:
        raise InputError(f"reads have shape {tuple(reads.shape)}; expected (..., n, K) with at least one image")
    seen = reads if no_group is None else _with_none(reads, no_group)[..., :-1]
    return (seen.amax(-1) < high).to(torch.float64).mean(-1)


def no_group_rate(probabilities: Tensor, no_group: Tensor) -> Tensor:
    """Share of images that show no group: that is more probable than any of the groups (an exact tie counts in part).

    Args:
        probabilities: (..., n, K) probabilities of the groups, without that of none of them.
        no_group: (..., n) probability that it is none.

    Returns:
        (...) float64 between 0 and 1.

    Raises:
        InputError: if either are not probabilities, or there are no images.

    Examples:
        >>> no_group_rate(torch.tensor([[0.95, 0.05], [0.95, 0.05]]), torch.tensor([0.98, 0.4])).item()
        0.5
    """
    reads = distribution(probabilities, "reads")
    if reads.dim() < 2 or reads.shape[-2] == 0:
        raise InputError(f"reads have shape {tuple(reads.shape)}; expected (..., n, K) with at least one image")
    return top_group(_with_none(reads, no_group))[..., -1].mean(-1)


def _with_none(reads: Tensor, no_group: Tensor) -> Tensor:
    """(..., K) of the groups alone and (...) of none -> (..., K + 1) of both."""
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


class GroupShares(Sums):
    """Hard and soft shares of every prompt, accumulated over batches and ranks.

    The states are sums in float64 whose size does not grow with the images, so the result of several ranks is
    the result of one.

    Args:
        num_prompts: P, number of prompts.
        num_groups: K, number of groups of the axis.

    Examples:
        >>> shares = GroupShares(num_prompts=1, num_groups=2)
        >>> shares.update(torch.tensor([0, 0]), torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
        >>> shares.compute()["hard"].tolist()
        [[0.5, 0.5]]
    """

    hard: Tensor  # (P, K) images counted for their top group
    soft: Tensor  # (P, K) probabilities added up

    def __init__(self, num_prompts: int, num_groups: int) -> None:
        if num_prompts < 1 or num_groups < 2:
            raise InputError(
                f"{num_prompts} prompts and {num_groups} groups; expected at least one prompt and two groups"
            )
        size = (num_prompts, num_groups)
        super().__init__(hard=size, soft=size)

    def update(self, prompts: Tensor, probabilities: Tensor) -> None:
        """Add a batch of reads.

        Args:
            prompts: (B,) integer index of each image's prompt.
            probabilities: (B, K) class probabilities.

        Raises:
            InputError: if shapes or values are not of that form.
        """
        num_prompts, num_groups = self.hard.shape
        if probabilities.shape != (len(prompts), num_groups):
            raise InputError(
                f"probabilities have shape {tuple(probabilities.shape)}; expected ({len(prompts)}, {num_groups})"
            )
        if len(prompts) == 0:
            return
        if prompts.is_floating_point() or prompts.min() < 0 or prompts.max() >= num_prompts:
            raise InputError(f"prompt indices {prompts.tolist()}; expected integers from 0 to {num_prompts - 1}")
        reads = distribution(probabilities, "reads").to(self.soft.device)
        prompts = prompts.to(self.soft.device, torch.long)
        self.hard.index_add_(0, prompts, top_group(reads))
        self.soft.index_add_(0, prompts, reads)

    def compute(self) -> dict[str, Tensor]:
        """Shares so far, ``{"hard": (P, K), "soft": (P, K)}``.

        Raises:
            Incomplete: if a prompt has no image yet.
        """
        images = self.hard.sum(-1, keepdim=True)
        if (images == 0).any():
            missing = (images.squeeze(-1) == 0).nonzero().flatten().tolist()
            raise Incomplete(f"no image was read for prompts {missing}; read at least one image of every prompt")
        return {"hard": self.hard / images, "soft": self.soft / images}


def distribution(values: Tensor, what: str) -> Tensor:
    """Checks that the last dimension holds probabilities; returns them in float64, summing to one exactly."""
    values = torch.as_tensor(values).to(torch.float64)
    if values.dim() == 0 or values.shape[-1] < 2:
        raise InputError(f"{what} have shape {tuple(values.shape)}; expected (..., K) with K >= 2 groups")
    total = _sum(values)[..., None]
    # Written so that NaN fails too.
    if values.numel() and not bool((values.amin() >= 0) & ((total - 1).abs().amax() <= SUM_TOLERANCE)):
        raise InputError(
            f"{what} range from {_extreme(values, 'min')} to {_extreme(values, 'max')} and sum to between "
            f"{_extreme(total, 'min')} and {_extreme(total, 'max')}; expected probabilities that sum to 1 "
            "(apply a softmax to logits)"
        )
    return values / total


def _sum(values: Tensor) -> Tensor:
    """Over the last dimension; as a product it is several times faster there, where sums of two or three are slow."""
    return values @ values.new_ones(values.shape[-1])


def _extreme(values: Tensor, which: str) -> str:
    return f"{getattr(values, which)().item():.4g}" if values.numel() else "nothing"


def _shares_and_target(shares: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    shares = distribution(shares, "shares")
    if target is None:
        return shares, torch.full_like(shares, 1 / shares.shape[-1])
    target = distribution(target, "target shares").to(shares.device)
    if target.shape[-1] != shares.shape[-1]:
        raise InputError(
            f"the target has {target.shape[-1]} groups and the shares {shares.shape[-1]}; expected the same number"
        )
    return shares, target
