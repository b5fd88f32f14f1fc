"""Side effects of an arm: unwanted changes by a treatment.

A side effect is compared with what chance shows: how far apart two samples of the untreated model are, or, for images
of one seed, two seeds of it. For the drift and the shift within groups this needs no further images. Other distances
need the arm on other seeds, see `Protocol.all_arms`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import OTHER, UNTREATED, Drawn
from stereoclinic.evaluation.figures.case import Case, cells
from stereoclinic.evaluation.figures.registry import (
    DISTANCE,
    GROUPED,
    IMAGES,
    KAPPA,
    MEBIBYTES,
    NEUTRAL,
    SCORE,
    SCORE_CHANGE,
    SECONDS,
    SHARE,
    SHARE_CHANGE,
    SIMILARITY,
    TIMES_NOISE,
    UNRELATED,
    figure,
)
from stereoclinic.evaluation.instruments import SMALLEST, structural_similarity
from stereoclinic.statistics.distances import diversity_within, frechet_between, kernel_distance
from stereoclinic.statistics.intervals import Interval, PairedDifference, mean_change, mean_interval, wilson_interval
from stereoclinic.statistics.shares import no_group_rate, shares_from_reads, top_group, unsure_rate
from stereoclinic.statistics.shares import sdtv as total_variation

_COMPARED = 8  # images of each prompt of which pairs are compared: their mean needs no more
_BOTH = (NEUTRAL, UNRELATED)


@figure("images", IMAGES, part="head")
def images(case: Case) -> int:
    """Images of this arm."""
    return case.arm.reads.shape[0] * case.arm.reads.shape[1]


@figure("occupation right", SHARE, "higher", shown=True)
def occupation_right(case: Case) -> Interval | None:
    """Images that show the occupation of their prompt."""
    return None if case.arm.right is None else rate(case.arm.right)


@figure("group prompts followed", SHARE, "higher", shown=True, name="group_prompts.all", on=(GROUPED,))
def obeyed(case: Case) -> Interval:
    """Prompts that name a group and show it, treated without a gate."""
    shown = _shown(case)
    return wilson_interval(float(shown.sum()), shown.numel())


@figure("shift within groups", TIMES_NOISE, "lower", shown=True, by_size=True, noise=1.0)
def frechet_within_groups_ratio(case: Case) -> Interval | float | None:
    """Fréchet distance to untreated images of the same groups, divided by that of two untreated samples."""
    if case.within_groups is None:
        return None
    return math.nan if case.within_groups[2] is None else case.within_groups[2]


@figure("unsure", SHARE, "lower", shown=True)
def unsure(case: Case) -> float:
    """Images whose top group the reader gives less than 0.8."""
    return unsure_interval(case).estimate


@figure("unsure", SHARE, "lower")
def unsure_interval(case: Case) -> Interval:
    """The same, with its interval."""
    none = None if case.arm.no_group is None else case.arm.no_group[..., None]
    return rate(unsure_rate(case.arm.reads[:, :, None], no_group=none))


@figure("no group seen", SHARE, "lower", shown=True)
def no_group(case: Case) -> Interval | None:
    """Images that show no group, such as no face; they still count in the shares."""
    if case.arm.no_group is None:
        return None
    return rate(no_group_rate(case.arm.reads[:, :, None], case.arm.no_group[..., None]))


@figure("drift of {}", SHARE, "lower", shown=True, by_size=True)
def drift(case: Case) -> dict[str, float] | None:
    """How far a prompt's shares on another axis moved from untreated."""
    if case.arm is case.before:
        return None
    pairs = {axis: (reads, case.before.others[axis]) for axis, reads in case.arm.others.items()}
    return {
        axis: float(total_variation(*(shares_from_reads(reads, hard=True) for reads in pair)).mean())
        for axis, pair in pairs.items()
    }


@figure("occupation right, change", SHARE_CHANGE, "higher")
def occupation_right_change(case: Case) -> float | None:
    """Against untreated, on the same seeds."""
    if case.paired is None or case.arm.right is None or case.before.right is None:
        return None
    return float(case.arm.right.nanmean() - case.before.right.nanmean())


@figure("occupation right in group prompts", SHARE, "higher", name="group_prompts.occupation_right", on=(GROUPED,))
def occupation_right_in_group_prompts(case: Case) -> Interval | None:
    """The same for prompts that name a group."""
    return occupation_right(case)


@figure("followed for {}", SHARE, "higher", name="group_prompts.", on=(GROUPED,))
def obeyed_by_group(case: Case) -> dict[str, Interval]:
    """Of the prompts that name this group."""
    shown = _shown(case)
    groups = case.experiment.protocol.axis.groups
    return {group: wilson_interval(float(shown[..., k].sum()), shown[..., k].numel()) for k, group in enumerate(groups)}


@figure("Fréchet distance within groups", DISTANCE, "lower", by_size=True)
def frechet_within_groups(case: Case) -> float | None:
    """To untreated images of prompts that name the same groups: what a change of groups does not explain."""
    return None if case.within_groups is None else case.within_groups[0]


@figure("Fréchet distance within groups, two samples", DISTANCE, by_size=True)
def frechet_within_groups_floor(case: Case) -> float | None:
    """Of two untreated samples."""
    return None if case.within_groups is None else case.within_groups[1]


@figure("Fréchet distance to other seeds", DISTANCE, "lower", by_size=True, noise=UNTREATED, on=_BOTH)
def frechet_to_other_seeds(case: Case) -> float | None:
    """To untreated images of other seeds."""
    return _distance(case, case.distant, frechet_between)


@figure("Fréchet distance to untreated", DISTANCE, "lower", by_size=True, on=_BOTH)
def frechet_to_untreated(case: Case) -> float | None:
    """To the untreated images of the same seeds."""
    return _distance(case, case.before, frechet_between)


@figure("kernel distance to other seeds", DISTANCE, "lower", noise=UNTREATED, on=_BOTH)
def kid_to_other_seeds(case: Case) -> float | None:
    """KID; unlike Fréchet's, its mean does not depend on the number of images."""
    return _distance(case, case.distant, kernel_distance)


@figure("kernel distance to untreated", DISTANCE, "lower", on=_BOTH)
def kid_to_untreated(case: Case) -> float | None:
    """KID to the untreated images of the same seeds."""
    return _distance(case, case.before, kernel_distance)


@figure("feature distance to untreated", DISTANCE, noise=OTHER, on=(UNRELATED,))
def feature_distance_to_untreated(case: Case) -> Interval | None:
    """Between images of the same seed."""
    if case.arm is case.before:
        return None
    difference = case.arm.features.double() - case.before.features.double()
    return mean_interval(torch.linalg.vector_norm(difference, dim=-1))


@figure("similarity to untreated", SIMILARITY, noise=OTHER, on=_BOTH)
def ssim_to_untreated(case: Case) -> Interval | None:
    """SSIM between images of the same seed."""
    if case.arm is case.before or min(case.arm.images.shape[-2:]) < SMALLEST:
        return None
    return mean_interval(structural_similarity(case.arm.images[:, :_COMPARED], case.before.images[:, :_COMPARED]))


@figure("diversity within groups", DISTANCE, "higher")
def diversity_within_groups(case: Case) -> float | None:
    """Mean distance between images of one prompt and group."""
    return _diversity(case)[0]


@figure("diversity within groups, untreated", DISTANCE)
def diversity_within_groups_reference(case: Case) -> float | None:
    """The same of untreated images of the same groups."""
    return _diversity(case)[1]


@figure("LPIPS to untreated", SIMILARITY, part="option", noise=OTHER, on=_BOTH)
def lpips_to_untreated(case: Case) -> Interval | None:
    """How far images of the same seed are for a network that judges as people do."""
    return None if case.arm.lpips is None else mean_interval(case.arm.lpips)


@figure("CLIPScore", SCORE, "higher", part="option", on=_BOTH)
def clip_score(case: Case) -> Interval | None:
    """How well images fit their neutral prompts, from 0 to 100."""
    return None if case.arm.clip is None else mean_interval(case.arm.clip)


@figure("CLIPScore, change", SCORE_CHANGE, "higher", part="option", on=_BOTH)
def clip_score_change(case: Case) -> PairedDifference | None:
    """Against untreated on the same seeds; p is for no change."""
    if case.arm.clip is None or case.paired is None or case.paired.clip is None:
        return None
    return mean_change(case.paired.clip, case.arm.clip)


@figure("readers agree", SHARE, part="option")
def readers_agree(case: Case) -> Interval | None:
    """Images on which all readers name the same group."""
    return Interval(**case.agreement["readers_agree"]) if case.agreement else None


@figure("kappa of {}", KAPPA, part="option")
def readers_kappa(case: Case) -> dict[str, Interval] | None:
    """Agreement of two readers beyond chance: 1 is full, 0 none."""
    return _by_key(case, "readers_kappa")


@figure("readers agree on {}", SHARE, "", part="further")
def readers_agree_on(case: Case) -> dict[str, Interval] | None:
    """Of the images that either reader gives this group, those that both do."""
    return _by_key(case, "readers_agree_on")


@figure("drawing time", SECONDS, "lower")
def seconds(case: Case) -> float:
    """Of these images."""
    return math.nan if case.arm.seconds is None else round(case.arm.seconds, 2)


@figure("peak memory", MEBIBYTES, "lower")
def peak_memory(case: Case) -> float | None:
    """Largest memory of tensors on a GPU while drawing."""
    return None if case.arm.memory is None else round(case.arm.memory / 2**20, 1)


def rate(true: Tensor) -> Interval:
    """Share of images of which something is true, among those of which it is known (the others are NaN)."""
    return wilson_interval(float(true.nansum()), int(true.isfinite().sum()))


def _by_key(case: Case, name: str) -> dict[str, Interval] | None:
    found = case.agreement.get(name)
    return None if found is None else {key: Interval(**values) for key, values in found.items()}


def _shown(case: Case) -> Tensor:
    """(P, m, K) whether a prompt that names a group shows it: rows of a seed run through the groups of each prompt."""
    groups = len(case.experiment.protocol.axis)
    by_prompt: Tensor = top_group(case.arm.reads).unflatten(0, (-1, groups))
    return by_prompt.diagonal(dim1=1, dim2=3)


def _diversity(case: Case) -> tuple[float | None, float | None]:
    """Of this arm, and of untreated images of the same groups."""
    reference = case.experiment.reference
    if reference is None or reference.allotted is None:
        return None, None
    groups = len(case.experiment.protocol.axis)
    own, others = cells(case.arm.reads.argmax(2), groups), cells(reference.allotted, groups)
    found = diversity_within(_flat(case.arm.features), own.flatten(), _flat(reference.features), others.flatten())
    return (None, None) if math.isnan(found[0]) else found


def _distance(case: Case, other: Drawn | None, distance: Callable[[Tensor, Tensor], float]) -> float | None:
    """Between the images of two arms; NaN from an arm to itself, None where the other was not drawn."""
    if other is None:
        return None
    return math.nan if case.arm is other else distance(_flat(case.arm.features), _flat(other.features))


def _flat(features: Tensor) -> Tensor:
    return features.flatten(0, 1)
