"""Random draws behind the intervals: indices of images, counts, and percentiles of what was drawn.

Sampling noise of shares: what a model with given shares would show, in many draws.

Both forms have `around(centre)`: a model's shares (P, K) -> shares (R, P, K) that as many of its images would show.

    Counted    hard reads: images are drawn from the model's shares, which is exact
    Spread     soft reads, and pooled prompts: resampled shares less their mean are added to the model's
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.shares import shares_from_reads, target_of, top_group

#: Every interval has 95 % confidence: the share below its low end, the share below its high end, and the normal
#: quantile there.
LOW, HIGH, NORMAL = (1 - 0.95) / 2, (1 + 0.95) / 2, NormalDist().inv_cdf(0.975)

# Resamples are drawn in chunks of about this many numbers (32 MB in float64), so that memory stays flat.
CHUNK_NUMBERS = 2**22


def multinomial(n: int, shares: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multinomial counts (*shape, K), group by group: each is binomial among the images that are left."""
    left = torch.full(shape, float(n), dtype=torch.float64)
    counts = []
    for k in range(len(shares) - 1):
        rest = shares[k:].sum()
        chance = (shares[k] / rest).clamp(0, 1) if rest > 0 else torch.zeros(())
        drawn = torch.binomial(left, chance.to(torch.float64).expand(shape), generator=generator)
        counts.append(drawn)
        left = left - drawn
    return torch.stack([*counts, left], dim=-1)


def dirichlet(counts: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Shares that may be behind counts: (*, K) -> (draws, *, K), with one more image spread over the K groups.

    That image is the prior of Jeffreys for two groups and of Perks for more. It leaves room for a group that has not
    been seen.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    shape = counts.double().cpu().numpy() + 1 / counts.shape[-1]
    drawn = torch.from_numpy(np.random.default_rng(seed).gamma(shape, size=(draws, *shape.shape)))
    return drawn / drawn.sum(-1, keepdim=True).clamp_min(1e-300)


def image_draws(reads: Tensor, resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Bootstrap indices in chunks (R, P, n): which images of each prompt make up each resample."""
    prompts, images, _ = reads.shape
    for chunk in chunks(resamples, reads.numel()):
        yield torch.randint(0, images, (chunk, prompts, images), generator=generator).to(reads.device)


def resampled(reads: Tensor, images: Tensor) -> Tensor:
    """The reads of drawn images: (P, n, K) and (R, P, n) -> (R, P, n, K)."""
    return reads[torch.arange(reads.shape[0], device=reads.device)[:, None], images]


def chunks(total: int, numbers_each: int) -> Iterator[int]:
    """Sizes of chunks that add up to `total` draws of `numbers_each` numbers."""
    size = max(1, CHUNK_NUMBERS // max(1, numbers_each))
    for start in range(0, total, size):
        yield min(size, total - start)


def percentiles(values: Tensor) -> tuple[float, float]:
    """The ends of the middle 95 % of values that are not NaN."""
    tails = torch.tensor([LOW, HIGH], dtype=values.dtype, device=values.device)
    low, high = torch.nanquantile(values, tails).tolist()
    return low, high


def or_seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one seeded with 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def three_dimensional(reads: Tensor, what: str) -> Tensor:
    """Reads (P, n, K) in float64.

    Raises:
        InputError: Another shape.
    """
    reads = torch.as_tensor(reads).to(torch.float64)
    if reads.dim() != 3 or 0 in reads.shape:
        raise InputError(
            f"{what} have shape {tuple(reads.shape)}; "
            "expected (P, n, K) with the same number of images for every prompt"
        )
    return reads


def check_draws(draws: int) -> None:
    """Refuse less than one random draw, with an InputError."""
    if draws < 1:
        raise InputError(f"{draws} random draws; expected at least 1, and 1000 or more for a usable interval")


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
