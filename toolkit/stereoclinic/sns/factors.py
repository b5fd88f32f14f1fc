"""What a mask does to one site: s a + (1 - s) r, and what s and r come to at a strength."""

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.sns.mask import NeuronMask


def damp(a: Tensor, factor: Tensor, dim: int, offset: Tensor | None = None) -> Tensor:
    """``s a + (1 - s) r``, which is ``r + s (a - r)``.

    Args:
        a: (B, ..., C) at a linear site, (B, C, ...) at a convolution.
        factor: (B or 1, C), s.
        dim: Of the channels, -1 or 1.
        offset: (B or 1, C), (1 - s) r; None for a root at zero.

    Returns:
        Of a's shape.
    """
    ones = [1] * (a.ndim - 2)
    shape = (-1, a.shape[1], *ones) if dim == 1 else (-1, *ones, a.shape[-1])
    factor = factor.view(shape)
    if offset is None:
        return a * factor
    offset = offset.view(shape)
    if dim == 1 and a.is_cpu:
        # There addcmul is no vector code where its operands do not vary along the inner dimension: a product and a sum
        # take a half to a fifth of its time at the portraits UNet's sizes.
        return (a * factor).add_(offset)
    return torch.addcmul(offset, a, factor)


def effective(mask: NeuronMask, strength: float) -> tuple[Tensor, Tensor | None]:
    """What a mask amounts to at a strength: ``s = 1 - strength (1 - factor)`` and ``(1 - s) r``.

    Returns:
        Factors and offsets, of the mask's shape, in float32; None for a root at zero. Where a factor is 1 the offset is
        -0, so that ``s a + offset`` is a bit for bit.

    Raises:
        InputError: strength is out of range.
    """
    check_strength(strength)
    factors = (1 - strength * (1 - mask.factors.double())).float()
    if mask.roots is None:
        return factors, None
    return factors, torch.where(factors == 1, -0.0, (1 - factors) * mask.roots)


def check_strength(strength: float) -> None:
    """Raises InputError for one that is no number from 0 to 1."""
    if not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"strength {strength!r}; expected 0 (no damping) to 1 (as the mask says)")
