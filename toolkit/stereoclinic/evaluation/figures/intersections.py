"""Groups where axes meet, such as old women: a gap there can be hidden on each axis alone.

    reads (n, K1), (n, K2)  ->  joint reads (n, K1 K2)  ->  shares and gaps as on any axis

Joint groups are named as masks of several axes name theirs ("female+old"), in row-major order. Their target is the
product of the axes' targets, so the gap holds both what each axis is off by and how the axes are tied.

References: Buolamwini & Gebru, Gender Shades, FAT* 2018; Kearns et al., Preventing Fairness Gerrymandering, ICML 2018.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import Drawn, Protocol
from stereoclinic.sns.allocate import JOINT
from stereoclinic.statistics.gaps import interval_of
from stereoclinic.statistics.intervals import noise_floor, wilson_interval
from stereoclinic.statistics.resampling import noise_of
from stereoclinic.statistics.shares import GAPS, distribution, top_group

#: The mean over groups, and the group that is farthest off.
JOINT_GAPS = ("parity_gap", "deviation_ratio")
_DRAWS = 400  # of an interval: each takes its time with many groups


def joint_figures(arms: Sequence[Drawn], protocol: Protocol) -> dict[str, dict[str, Any]]:
    """By the axes that meet ("gender+skin"): joint groups, their target, and each arm's shares and gaps.

    Empty where only one axis was read.
    """
    axes = {axis.name: axis for axis in (protocol.axis, *protocol.others)}
    if len(axes) < 2:
        return {}
    targets = {name: torch.full((len(axis),), 1 / len(axis)).double() for name, axis in axes.items()}
    targets[protocol.axis.name] = protocol.target.double()
    reads = {
        arm.name: intersections(
            {protocol.axis.name: arm.reads} | {axis.name: arm.others[axis.name] for axis in protocol.others}
        )
        for arm in arms
    }
    return {
        JOINT.join(names): _meeting(
            joint_groups([axes[name].groups for name in names]),
            joint_target([targets[name] for name in names]),
            {arm: joint[names] for arm, joint in reads.items()},
        )
        for names in next(iter(reads.values()))
    }


def _meeting(groups: list[str], target: Tensor, reads: Mapping[str, Tensor]) -> dict[str, Any]:
    prompts, images, _ = next(iter(reads.values())).shape
    floors = {name: vars(noise_floor(images, len(groups), prompts, GAPS[name], target=target)) for name in JOINT_GAPS}
    return {
        "groups": groups,
        "target_shares": target.tolist(),
        "noise_floor": floors,
        "arms": {arm: _joint_arm(joint, groups, target) for arm, joint in reads.items()},
    }


def _joint_arm(reads: Tensor, groups: Sequence[str], target: Tensor) -> dict[str, Any]:
    hits, images = top_group(reads).sum((0, 1)), reads.shape[0] * reads.shape[1]
    noise = noise_of(reads, target, True, False, _DRAWS, torch.Generator().manual_seed(0))
    shares = {group: vars(wilson_interval(float(count), images)) for group, count in zip(groups, hits, strict=True)}
    return {"shares": shares} | {name: vars(interval_of(noise, GAPS[name])) for name in JOINT_GAPS}


def joint_groups(groups: Sequence[Sequence[str]]) -> list[str]:
    """Names of the joint groups of axes with these groups: [(a, b), (c, d)] -> [a+c, a+d, b+c, b+d]."""
    return [JOINT.join(names) for names in itertools.product(*groups)]


def joint_reads(reads: Sequence[Tensor]) -> Tensor:
    """Probabilities of joint groups: the product of what each axis was read as.

    Given an image, its reads on the axes are taken as independent, so that axes are tied by the images alone.

    Args:
        reads: (..., K_a) for each axis, of the same images.

    Returns:
        (..., product of K_a) float64.

    Raises:
        InputError: If there are fewer than two axes, or their images differ.
    """
    if len(reads) < 2:
        raise InputError(f"{len(reads)} axis; an intersection needs reads of two or more")
    joint, *others = [distribution(axis, "reads") for axis in reads]
    for other in others:
        if other.shape[:-1] != joint.shape[:-1]:
            raise InputError(
                f"reads of shape {tuple(joint.shape)} and {tuple(other.shape)}; expected the same images on every axis"
            )
        joint = (joint[..., :, None] * other[..., None, :]).flatten(-2)
    return joint


def joint_target(targets: Sequence[Tensor]) -> Tensor:
    """Target shares of the joint groups: the product of the axes' targets, (K_a,) each, as float64."""
    return joint_reads([torch.as_tensor(target) for target in targets])


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
