"""Sampling noise of shares: what a model with given shares would show, in many draws.

Both forms have `around(centre)`: a model's shares (P, K) -> shares (R, P, K) that as many of its images would show.

    Counted    hard reads: images are drawn from the model's shares, which is exact
    Spread     soft reads, and pooled prompts: resampled shares less their mean are added to the model's
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stereoclinic.statistics.resampling import image_draws, resampled, three_dimensional
from stereoclinic.statistics.shares import shares_from_reads, target_of, top_group


@dataclass(frozen=True)
class Noise:
    """Estimated shares and their target, both (P, K), or (1, K) where prompts are pooled."""

    shares: Tensor
    target: Tensor

    def around(self, centre: Tensor) -> Tensor:
        """Shares that a model with these (P, K) would show: (R, P, K)."""
        raise NotImplementedError

    def error(self) -> Tensor:
        """(P, 1) standard error of the shares, all groups together."""
        raise NotImplementedError


@dataclass(frozen=True)
class Counted(Noise):
    """Noise of n images whose groups are drawn from the model's shares.

    Args:
        uniform: (R, P, n) of [0, 1), sorted along n: the same random numbers for every model that is tried.
    """

    uniform: Tensor

    def around(self, centre: Tensor) -> Tensor:
        bounds = centre.cumsum(-1)[:, :-1].expand(len(self.uniform), -1, -1).contiguous()
        below = torch.searchsorted(self.uniform, bounds)  # (R, P, K - 1) images below each bound
        images = self.uniform.shape[-1]
        edges = torch.nn.functional.pad(torch.nn.functional.pad(below, (1, 0)), (0, 1), value=images)
        return edges.diff(dim=-1).double() / images

    def error(self) -> Tensor:
        variance = (self.shares * (1 - self.shares)).sum(-1, keepdim=True)
        return (variance / self.uniform.shape[-1]).sqrt()


@dataclass(frozen=True)
class Spread(Noise):
    """Noise of resampled shares less their mean, (R, P, K), whatever the model's shares are."""

    residuals: Tensor

    def around(self, centre: Tensor) -> Tensor:
        return on_simplex(centre + self.residuals)

    def error(self) -> Tensor:
        return self.residuals.square().mean(0).sum(-1, keepdim=True).sqrt()


def noise_of(
    reads: Tensor, target: Tensor | None, hard: bool, pooled: bool, resamples: int, generator: torch.Generator
) -> Noise:
    """The noise of reads.

    Args:
        reads: (P, n, K) class probabilities.
        target: (K,) or (P, K) target shares; uniform if None.
        hard: Count each image's top group, or average probabilities.
        pooled: Of the prompts' mean shares.
        resamples: Number of draws, R.
        generator: Source of randomness.

    Raises:
        InputError: Reads or target are not of that form.
    """
    reads = three_dimensional(reads, "reads")
    shares = shares_from_reads(reads, hard)  # (P, K), and checks the reads
    wanted = target_of(shares, target).expand(shares.shape)
    prompts, images, _ = reads.shape
    if hard and not pooled:
        uniform = torch.rand(resamples, prompts, images, generator=generator, dtype=torch.float64)
        return Counted(shares, wanted, uniform.sort(-1).values.to(shares.device))
    [draws] = resampled_shares([reads], hard, resamples, generator)
    residuals = (draws - shares) * math.sqrt(images / max(1, images - 1))  # resampled shares vary by too little
    if pooled:
        shares, wanted, residuals = (each.mean(-2, keepdim=True) for each in (shares, wanted, residuals))
    return Spread(shares, wanted, residuals)


def resampled_shares(sides: Sequence[Tensor], hard: bool, resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Bootstrap shares (R, P, K) of each side of (P, n, K) reads, the same images of all resampled together."""
    counted = [top_group(side) if hard else side for side in sides]
    draws = [
        [resampled(side, images).mean(-2) for side in counted] for images in image_draws(sides[0], resamples, generator)
    ]
    return [torch.cat(side) for side in zip(*draws, strict=True)]


def on_simplex(shares: Tensor) -> Tensor:
    """Shares without negative entries, scaled to a sum of one along the last dimension."""
    shares = shares.clamp_min(0)
    return shares / shares.sum(-1, keepdim=True)
