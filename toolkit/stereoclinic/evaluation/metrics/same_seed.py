"""How much of a picture is still there: structural similarity to the untreated picture of the same seed.

1 is the same picture; what two seeds of one prompt show is the floor. It says how much was changed, not whether the
change was for the worse: a picture that shows another group has to differ.

LPIPS, the other usual figure, needs torchvision and downloaded weights, which this package does without unless it is
asked for them (`extractors`).

Reference: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004. As in
its authors' code, luma is compared, averaged down to about 256 pixels first.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from stereoclinic.errors import InputError

SMALLEST = 11  # pixels of the window that pictures are compared through

_SIDE = 256  # pixels of the shorter side from which on pictures are averaged down
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
_TOGETHER = 64  # pictures at once, so that memory stays flat


def structural_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    """SSIM of each picture with its other.

    Args:
        pictures: (..., 3, H, W) uint8, or floating point in [0, 1].
        others: The same shape and type.

    Returns:
        (...) float64, at most 1.

    Raises:
        InputError: If the two differ in shape or type, or are smaller than the window of 11 pixels.
    """
    if pictures.shape != others.shape or pictures.dtype != others.dtype or pictures.dim() < 3:
        raise InputError(
            f"pictures {tuple(pictures.shape)} {pictures.dtype} and {tuple(others.shape)} {others.dtype}; expected two"
            " sets of one shape (..., 3, H, W) and one type"
        )
    if min(pictures.shape[-2:]) < SMALLEST:
        raise InputError(f"pictures of {tuple(pictures.shape[-2:])} pixels; expected {SMALLEST} or more each way")
    sides = [each.reshape(-1, *each.shape[-3:]).split(_TOGETHER) for each in (pictures, others)]
    found = []
    for one, other in zip(*sides, strict=True):
        each = structural_similarity_index_measure(_prepared(one), _prepared(other), data_range=1.0, reduction="none")
        assert isinstance(each, Tensor)  # a tuple only where maps of it are asked for too
        found.append(each.double().reshape(-1))
    return torch.cat(found).reshape(pictures.shape[:-3])


def _prepared(pictures: Tensor) -> Tensor:
    """(n, 3, H, W) -> luma (n, 1, h, w) in [0, 1]."""
    values = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
    luma = (values * torch.tensor(_LUMA, device=values.device)[:, None, None]).sum(1, keepdim=True)
    factor = max(1, round(min(luma.shape[-2:]) / _SIDE))
    return functional.avg_pool2d(luma, factor) if factor > 1 else luma
