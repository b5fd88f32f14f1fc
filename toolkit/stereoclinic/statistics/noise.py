"""What chance does to shares: what a model with given shares would show, over and over.

Two forms with one method, ``around(centre)``: shares (P, K) of a model -> shares (R, P, K) that as many images of it
would show.

    Counted    hard reads: images are drawn from the model's shares, which is exact
    Spread     soft reads, and prompts that are pooled: resampled shares less their mean are added to the model's
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stereoclinic.statistics.resampling import image_draws, resampled, three_dimensional
from stereoclinic.statistics.shares import distribution, shares_from_reads, top_group


@dataclass(frozen=True)
class Noise:
    """Estimated shares and the target they are measured to, both (P, K), or (1, K) where prompts are pooled."""

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
    """Of n images, each of a group drawn from the model's shares.

    Args:
        uniform: (R, P, n) of [0, 1), sorted along n: the same luck for every model that is tried.
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
    """Resampled shares less their mean, whatever the model's shares are.

    Args:
        residuals: (R, P, K).
    """

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
        InputError: If reads or target are not of that form.
    """
    reads = three_dimensional(reads, "reads")
    shares = shares_from_reads(reads, hard)  # (P, K), and checks the reads
    wanted = torch.full_like(shares, 1 / shares.shape[-1]) if target is None else torch.as_tensor(target)
    wanted = distribution(wanted, "target shares").to(shares.device).expand(shares.shape)
    prompts, images, _ = reads.shape
    if hard and not pooled:
        luck = torch.rand(resamples, prompts, images, generator=generator, dtype=torch.float64)
        return Counted(shares, wanted, luck.sort(-1).values.to(shares.device))
    [draws] = resampled_shares([reads], hard, resamples, generator)
    residuals = (draws - shares) * math.sqrt(images / max(1, images - 1))  # resampled shares vary by too little
    if pooled:
        shares, wanted, residuals = (each.mean(-2, keepdim=True) for each in (shares, wanted, residuals))
    return Spread(shares, wanted, residuals)


def resampled_shares(sides: Sequence[Tensor], hard: bool, resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Bootstrap shares (R, P, K) of each side of (P, n, K) reads, the same images of all resampled together."""
    counted = [top_group(each) if hard else each for each in sides]
    draws: list[list[Tensor]] = [[] for _ in sides]
    for images in image_draws(sides[0], resamples, generator):
        for own, each in zip(draws, counted, strict=True):
            own.append(resampled(each, images).mean(-2))
    return [torch.cat(own) for own in draws]


def on_simplex(shares: Tensor) -> Tensor:
    """The nearest thing to shares: none below zero, and a sum of one, along the last dimension."""
    shares = shares.clamp_min(0)
    return shares / shares.sum(-1, keepdim=True)
