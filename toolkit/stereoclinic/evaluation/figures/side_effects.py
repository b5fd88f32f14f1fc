"""The side effects of an arm as plain data: what a treatment did besides what it was for.

What a treatment does to prompts that have nothing to do with its axis: a mountain should stay that mountain.

Every figure stands beside what other seeds of the untreated model show. Of pictures of one seed that is how far apart
two seeds are; of sets of pictures, how far apart two samples are.
"""

from typing import Any

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import ALLOCATION, OTHER, UNTREATED, Drawn, Experiment
from stereoclinic.evaluation.instruments import SMALLEST, structural_similarity
from stereoclinic.prompts.sets import write
from stereoclinic.sns.policy import is_neutral
from stereoclinic.statistics.distances import (
    diversity_within,
    frechet_between,
    frechet_within_groups,
    kernel_distance,
    within_groups_ratio,
)
from stereoclinic.statistics.intervals import mean_change, mean_interval, wilson_interval
from stereoclinic.statistics.shares import no_group_rate, sdtv, shares_from_reads, top_group, unsure_rate

_COMPARED = 8  # images a prompt of which pairs are compared: convolutions take their time, and their mean needs no more


def distances(arm: Drawn, before: Drawn, distant: Drawn) -> dict[str, Any]:
    """How far its pictures are from untreated ones.

    Pictures of the same seeds pair up, which brings them closer than two samples ever are. Against other seeds every
    arm is a sample of its own, and the untreated one shows the floor. Of the similarity of pairs the floor is what
    other seeds show.

    Args:
        arm: Whose pictures.
        before: The untreated arm of the same prompts.
        distant: The untreated arm on other seeds.
    """
    figures: dict[str, Any] = {}
    for name, distance in (("frechet", frechet_between), ("kid", kernel_distance)):
        figures[f"{name}_to_untreated"] = None if arm is before else distance(_flat(arm), _flat(before))
        figures[f"{name}_to_other_seeds"] = None if arm is distant else distance(_flat(arm), _flat(distant))
    if arm is not before and min(arm.images.shape[-2:]) >= SMALLEST:
        pairs = structural_similarity(arm.images[:, :_COMPARED], before.images[:, :_COMPARED])
        figures["ssim_to_untreated"] = vars(mean_interval(pairs))
    return figures


def asked_for(arm: Drawn, before: Drawn | None) -> dict[str, Any]:
    """What was measured because it was asked for (`instruments`); `before` is None where seeds do not pair up."""
    figures: dict[str, Any] = {}
    if arm.lpips is not None:
        figures["lpips_to_untreated"] = vars(mean_interval(arm.lpips))
    if arm.clip is not None:
        figures["clip_score"] = vars(mean_interval(arm.clip))
        if before is not None and before.clip is not None:
            figures["clip_score_change"] = vars(mean_change(before.clip, arm.clip))
    return figures


def within_groups(arm: Drawn, experiment: Experiment) -> dict[str, Any]:
    """Distance to untreated images of the same people on other seeds with its floor, and diversity beside theirs."""
    oracle, reference = experiment.arm(ALLOCATION), experiment.reference
    if reference is None or oracle.allotted is None or reference.allotted is None:
        return {}
    groups = len(experiment.protocol.axis)
    own, there, fair = (_cells(each, groups) for each in (arm.reads.argmax(2), reference.allotted, oracle.allotted))
    figures: dict[str, Any] = {}
    judged, compared = diversity_within(_flat(arm), own.flatten(), _flat(reference), there.flatten())
    if judged == judged:
        figures = {"diversity_within_groups": judged, "diversity_within_groups_reference": compared}
    if arm.name == OTHER:  # it shares its seeds with the reference, which brings them closer than two samples are
        return figures
    samples = (arm.features, own), (reference.features, there), (oracle.features, fair)
    cells = len(own) * groups
    mine, others, chance = ((features.flatten(0, 1), numbers.flatten()) for features, numbers in samples)
    distance, floor = frechet_within_groups(mine, others, chance, cells)
    if distance == distance:  # there is something to compare with
        ratio = within_groups_ratio(*samples, cells)
        figures |= {
            "frechet_within_groups": distance,
            "frechet_within_groups_floor": floor,
            "frechet_within_groups_ratio": None if ratio is None else vars(ratio),
        }
    return figures


def drift(arm: Drawn, before: Drawn) -> dict[str, float]:
    """How far the shares of each other axis moved: mean over prompts of their total variation."""
    return {
        axis: float(sdtv(shares_from_reads(reads, hard=True), shares_from_reads(before.others[axis], hard=True)).mean())
        for axis, reads in arm.others.items()
    }


def certainty(arm: Drawn) -> dict[str, Any]:
    """How often the reader is unsure of the group, and where it can say so, how often it sees none.

    `unsure` is a bare number in every version of results; its interval is beside it.
    """
    none = None if arm.no_group is None else arm.no_group[..., None]
    reads = arm.reads[:, :, None]  # (P, n, 1, K): a rate an image
    unsure = rate(unsure_rate(reads, no_group=none))
    figures: dict[str, Any] = {"unsure": unsure["estimate"], "unsure_interval": unsure}
    if none is not None:
        figures["no_group"] = rate(no_group_rate(reads, none))
    return figures


def obeyed(arm: Drawn) -> dict[str, Any]:
    """Share of images that show the group they were allotted to."""
    assert arm.allotted is not None
    asked = arm.allotted >= 0
    hits = top_group(arm.reads).gather(2, arm.allotted.clamp_min(0)[..., None])[..., 0]
    return vars(wilson_interval(float(hits[asked].sum()), int(asked.sum())))


def fidelity(arm: Drawn, experiment: Experiment) -> dict[str, Any]:
    """How often a prompt that names a group was obeyed: rows of a seed run through the groups of each prompt."""
    groups = experiment.protocol.axis.groups
    shown = top_group(arm.reads).unflatten(0, (-1, len(groups))).diagonal(dim1=1, dim2=3)  # (P, m, K)
    total = {"all": (shown.sum(), shown.numel())}
    total |= {group: (shown[..., k].sum(), shown[..., k].numel()) for k, group in enumerate(groups)}
    figures: dict[str, Any] = {name: vars(wilson_interval(float(hits), count)) for name, (hits, count) in total.items()}
    if arm.right is not None:
        figures["occupation_right"] = rate(arm.right)
    return figures


def rate(true: Tensor) -> dict[str, Any]:
    """Share of pictures of which something is true, of those of which it is known (the others are NaN)."""
    return vars(wilson_interval(float(true.nansum()), int(true.isfinite().sum())))


def _cells(group: Tensor, groups: int) -> Tensor:
    """(P, n) group of each image -> (P, n) number of its prompt x group."""
    return torch.arange(len(group))[:, None] * groups + group


def _flat(arm: Drawn) -> Tensor:
    return arm.features.flatten(0, 1)


def unrelated_figures(experiment: Experiment) -> dict[str, Any]:
    """Figures of the unrelated prompts as plain data: `prompts`, how they were drawn, and by arm what became of them.

    `left_alone` counts the prompts that the gate leaves alone, for they name a group; they cannot change.
    """
    protocol, arms = experiment.protocol, {arm.name: arm for arm in experiment.unrelated}
    assert protocol.unrelated is not None
    prompts, n = [write(row) for row in protocol.unrelated], protocol.unrelated_images
    seeds = arms[UNTREATED].seeds_from(protocol.seed)
    return {
        "prompts": prompts,
        "left_alone": sum(not is_neutral(prompt, protocol.axis) for prompt in prompts),
        "images_per_prompt": n,
        "seeds": [seeds[0], seeds[-1]],
        "arms": {name: _arm(arm, arms[UNTREATED], arms[OTHER]) for name, arm in arms.items()},
    }


def _arm(arm: Drawn, before: Drawn, distant: Drawn) -> dict[str, Any]:
    figures = distances(arm, before, distant)
    if arm is not before:
        figures["feature_distance_to_untreated"] = vars(mean_interval(feature_distance(arm, before)))
    return figures | asked_for(arm, None if arm is before or arm is distant else before)


def feature_distance(arm: Drawn, before: Drawn) -> Tensor:
    """Euclidean distance of the features of each picture to those of the other arm's in its place: (P, n)."""
    distance: Tensor = torch.linalg.vector_norm(arm.features.double() - before.features.double(), dim=-1)
    return distance
