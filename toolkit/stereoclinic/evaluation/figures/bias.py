"""The bias figures of an experiment as plain data: every gap from hard and soft reads, by prompt and pooled.

Where figures of a kind stand in an arm's results:

    parity_gap, ..., normalised_entropy     hard reads, mean over prompts
    soft, pooled, pooled_soft               the same names from soft reads, of the prompts' mean shares, and of both
    prompts                                 prompt by prompt: shares and gap from hard and soft reads, and what the
                                            same seeds say of a change

and beside the arms, intersections: where the read axes meet, see `intersections`.

Groups where axes meet: women of dark skin, old men. A gap there can be hidden on each axis alone.

    reads (n, K1), (n, K2)  ->  joint reads (n, K1 K2)  ->  shares and gaps as on any axis

Joint groups are named as masks of several axes name theirs ("female+old"), in row-major order. Their target is the
product of the axes' own targets, so the gap holds both what each axis is off and what the axes are tied by.

References: Buolamwini & Gebru, Gender Shades, FAT* 2018; Kearns et al., Preventing Fairness Gerrymandering, ICML 2018.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import Drawn, Protocol
from stereoclinic.prompts.sets import write
from stereoclinic.sns.allocate import JOINT
from stereoclinic.statistics.gaps import interval_of
from stereoclinic.statistics.intervals import Interval, noise_floor, wilson_interval
from stereoclinic.statistics.noise import Noise, noise_of
from stereoclinic.statistics.shares import (
    GAPS,
    Gap,
    distribution,
    normalised_entropy,
    parity_gap,
    shares_from_reads,
    top_group,
)
from stereoclinic.statistics.tests import benjamini_hochberg, holm, prompt_p_values

#: Of an interval: the divergence, whose tail is long, needs more (docs/results/intervals.md), and of a joint
#: distribution, which has many groups, each draw takes its time.
DRAWS, KL_DRAWS, JOINT_DRAWS = 600, 1000, 400
#: Of soft figures of one prompt, which are many: finer than reads are kept in `metadata.jsonl`, and than chance.
_DIGITS = 4
#: What is said of intersections: how far off the groups are on average, and the one that is farthest off.
JOINT_GAPS = ("parity_gap", "deviation_ratio")


def gap_figures(reads: Tensor, target: Tensor) -> dict[str, Any]:
    """Every gap and the entropy, of (P, n, K) reads, each with its interval."""
    figures: dict[str, Any] = _gaps(reads, target, hard=True, pooled=False)
    figures["soft"] = _gaps(reads, target, hard=False, pooled=False)
    figures["pooled"] = _gaps(reads, target, hard=True, pooled=True)
    figures["pooled_soft"] = _gaps(reads, target, hard=False, pooled=True)
    return figures


def _gaps(reads: Tensor, target: Tensor, hard: bool, pooled: bool) -> dict[str, dict[str, Any]]:
    def noise(target: Tensor | None, draws: int = DRAWS) -> Noise:
        return noise_of(reads, target, hard, pooled, draws, torch.Generator().manual_seed(0))

    usual, units = noise(target), _in_parity_gaps(target)
    parity = interval_of(usual, parity_gap)
    figures = {
        name: vars(
            _scaled(parity, units[name])
            if name in units
            else interval_of(noise(target, KL_DRAWS) if name == "kl" else usual, gap)
        )
        for name, gap in GAPS.items()
    }
    lack = interval_of(noise(None), _lack_of_entropy)
    return figures | {"normalised_entropy": vars(Interval(1 - lack.estimate, 1 - lack.high, 1 - lack.low))}


def _in_parity_gaps(target: Tensor) -> dict[str, float]:
    """The gaps that are the parity gap in another unit, which need no interval of their own: name -> the unit.

    Total variation always is; with two groups, which are off by the same, so is all but the divergence.
    """
    same = [name for name in GAPS if name != "kl"] if len(target) == 2 else ["parity_gap", "sdtv"]
    one = torch.nn.functional.one_hot(target.argmin(), len(target)).double()  # is off from any target
    return {name: float(GAPS[name](one, target) / parity_gap(one, target)) for name in same}


def _scaled(interval: Interval, unit: float) -> Interval:
    return Interval(unit * interval.estimate, unit * interval.low, unit * interval.high)


def _lack_of_entropy(shares: Tensor, target: Tensor | None) -> Tensor:
    """One minus the entropy is a gap to uniform shares, whatever the target."""
    return 1 - normalised_entropy(shares)


def prompt_figures(arm: Drawn, before: Drawn | None, protocol: Protocol) -> list[dict[str, Any]]:
    """Prompt by prompt; `before` is the untreated arm, None where it has other seeds."""
    groups, images = protocol.axis.groups, arm.reads.shape[1]
    shares, hits = shares_from_reads(arm.reads, hard=True), top_group(arm.reads).sum(1)  # (P, K)
    soft = shares_from_reads(arm.reads, hard=False)
    rows = [
        {
            "label": row["label"],
            "prompt": write(row),
            "shares": {group: vars(wilson_interval(float(hits[p, k]), images)) for k, group in enumerate(groups)},
            "parity_gap": float(parity_gap(shares[p], protocol.target)),
            "soft_shares": {group: _soft_share(float(soft[p, k]), images) for k, group in enumerate(groups)},
            "soft_parity_gap": round(float(parity_gap(soft[p], protocol.target)), _DIGITS),
        }
        for p, row in enumerate(protocol.prompts)
    ]
    if before is not None:
        for row, change in zip(rows, _prompt_changes(before.reads, arm.reads), strict=True):
            row["change"] = change
    return rows


def _soft_share(mean: float, images: int) -> dict[str, Any]:
    """The mean of reads, with Wilson's interval: no numbers in [0, 1] of this mean vary more than zeros and ones do.

    An interval from how much these reads vary would have no width where all are sure of one group, however few.
    """
    interval = wilson_interval(min(max(mean, 0.0), 1.0) * images, images)
    return {name: round(end, _DIGITS) for name, end in vars(interval).items()}


def _prompt_changes(before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """How many images of each prompt changed group, and the p-value of no change of shares, as it is and corrected."""
    moved = (before.argmax(2) != after.argmax(2)).sum(1).tolist()
    plain = prompt_p_values(before, after)
    columns = zip(moved, plain, holm(plain), benjamini_hochberg(plain), strict=True)
    names = ("moved", "p_value", "p_value_holm", "p_value_benjamini_hochberg")
    return [dict(zip(names, values, strict=True)) for values in columns]


def joint_figures(arms: Sequence[Drawn], protocol: Protocol) -> dict[str, dict[str, Any]]:
    """By the axes that meet ("gender+skin"): joint groups, their target, and each arm's shares and gaps.

    Empty where one axis alone was read.
    """
    axes = {axis.name: axis for axis in (protocol.axis, *protocol.others)}
    if len(axes) < 2:
        return {}
    targets = {name: torch.full((len(axis),), 1 / len(axis)).double() for name, axis in axes.items()}
    targets[protocol.axis.name] = protocol.target.double()
    reads = {
        arm.name: intersections(
            {protocol.axis.name: arm.reads} | {each.name: arm.others[each.name] for each in protocol.others}
        )
        for arm in arms
    }
    gaps = {name: GAPS[name] for name in JOINT_GAPS}
    found = {}
    for meeting in next(iter(reads.values())):
        groups = joint_groups([axes[name].groups for name in meeting])
        target = joint_target([targets[name] for name in meeting])
        size, count = next(iter(reads.values()))[meeting].shape[1], len(protocol.prompts)
        found[JOINT.join(meeting)] = {
            "groups": groups,
            "target_shares": target.tolist(),
            "noise_floor": {
                name: vars(noise_floor(size, len(groups), count, gap, target=target)) for name, gap in gaps.items()
            },
            "arms": {name: _joint_arm(each[meeting], groups, target, gaps) for name, each in reads.items()},
        }
    return found


def _joint_arm(reads: Tensor, groups: Sequence[str], target: Tensor, gaps: Mapping[str, Gap]) -> dict[str, Any]:
    hits, images = top_group(reads).sum((0, 1)), reads.shape[0] * reads.shape[1]
    noise = noise_of(reads, target, True, False, JOINT_DRAWS, torch.Generator().manual_seed(0))
    shares = {group: vars(wilson_interval(float(each), images)) for group, each in zip(groups, hits, strict=True)}
    return {"shares": shares} | {name: vars(interval_of(noise, gap)) for name, gap in gaps.items()}


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
