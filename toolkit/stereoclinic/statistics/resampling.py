"""Random draws behind the intervals: indices of images, counts, and percentiles of what was drawn."""

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from stereoclinic.errors import InputError

#: Every interval is of 95 % confidence: the share below its low end, the share below its high end, and the normal
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
    """Raises InputError for less than one random draw."""
    if draws < 1:
        raise InputError(f"{draws} random draws; expected at least 1, and 1000 or more for a usable interval")
