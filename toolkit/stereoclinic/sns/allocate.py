"""Allocation: which group an image is allotted to, from its prompt and seed alone, never from its batch."""

import hashlib

import torch
from torch import Tensor

from stereoclinic.errors import InputError

_GOLDEN = 0.6180339887498949


def allotted_group(row: dict, shares: Tensor) -> int:
    """The group of one image.

    A prompt's seeds walk along an additive (golden ratio) sequence with a start of the prompt's own, so any run of
    consecutive seeds meets the shares more closely than independent draws would (Niederreiter 1992, section 3.1).

    Args:
        row: The sample's `prompt` and `seed`.
        shares: (K,) adding up to 1.

    Raises:
        InputError: Shares that are negative or do not add up to 1.
    """
    if (shares < 0).any() or abs(float(shares.sum()) - 1) > 1e-6:
        raise InputError(f"shares {shares.tolist()}: expected none below 0 and a sum of 1")
    start = int.from_bytes(hashlib.sha256(row["prompt"].encode()).digest()[:8], "big") / 2**64
    point = (start + row["seed"] * _GOLDEN) % 1.0
    group = int(torch.searchsorted(shares.double().cumsum(0), torch.tensor(point, dtype=torch.float64), right=True))
    return min(group, len(shares) - 1)


def uniform(groups: int) -> Tensor:
    return torch.full((groups,), 1 / groups, dtype=torch.float64)
