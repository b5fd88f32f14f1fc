"""Groups where axes meet: women of dark skin, old men. A gap there can be hidden on each axis alone.

    reads (n, K1), (n, K2)  ->  joint reads (n, K1 K2)  ->  shares and gaps as on any axis

Joint groups are named as masks of several axes name theirs ("female+old"), in row-major order. Their target is the
product of the axes' own targets, so the gap holds both what each axis is off and what the axes are tied by.

References: Buolamwini & Gebru, Gender Shades, FAT* 2018; Kearns et al., Preventing Fairness Gerrymandering, ICML 2018.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.metrics.bias import distribution
from stereoclinic.sns.allocate import JOINT


def joint_groups(groups: Sequence[Sequence[str]]) -> list[str]:
    """Names of the joint groups of axes with these groups: [(a, b), (c, d)] -> [a+c, a+d, b+c, b+d]."""
    return [JOINT.join(each) for each in itertools.product(*groups)]


def joint_reads(reads: Sequence[Tensor]) -> Tensor:
    """Probabilities of joint groups, the product of what each axis was read as.

    A reader says of one picture what it shows on each axis; given the picture the answers are taken as independent, so
    axes are tied by the pictures alone. The likeliest joint group is that of the likeliest groups.

    Args:
        reads: (..., K_a) for each axis, of the same images.

    Returns:
        (..., product of K_a) float64.

    Raises:
        InputError: If there are fewer than two axes, or their images differ.
    """
    if len(reads) < 2:
        raise InputError(f"{len(reads)} axis; an intersection needs reads of two or more")
    joint, *others = [distribution(each, "reads") for each in reads]
    for other in others:
        if other.shape[:-1] != joint.shape[:-1]:
            raise InputError(
                f"reads of shape {tuple(joint.shape)} and {tuple(other.shape)}; expected the same images on every axis"
            )
        joint = (joint[..., :, None] * other[..., None, :]).flatten(-2)
    return joint


def joint_target(targets: Sequence[Tensor]) -> Tensor:
    """Target shares of the joint groups where each axis has its own, (K_a,) each: their product, float64."""
    return joint_reads([torch.as_tensor(each) for each in targets])


def intersections(reads: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """Joint reads of every two or more of the axes.

    Args:
        reads: Axis -> (..., K_a).

    Returns:
        Names of the axes that meet, in the order given -> (..., product of their K_a).
    """
    return {
        axes: joint_reads([reads[axis] for axis in axes])
        for size in range(2, len(reads) + 1)
        for axes in itertools.combinations(reads, size)
    }
