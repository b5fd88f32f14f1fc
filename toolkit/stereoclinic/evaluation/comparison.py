"""The figures of an experiment: bias, side effects, and what chance alone would show, as plain data."""

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import ALLOCATION, BALANCED, OTHER, SCHEMA, UNTREATED, Drawn, Experiment
from stereoclinic.evaluation.bias import GAPS, parity_gap, sdtv, shares_from_reads, top_group, unsure_rate
from stereoclinic.evaluation.quality import frechet_between, frechet_within_groups
from stereoclinic.evaluation.statistics import (
    bootstrap_interval,
    noise_floor,
    paired_difference_interval,
    share_statistic,
    wilson_interval,
)
from stereoclinic.prompts import group_prompts, write
from stereoclinic.sns.gate import is_neutral


def summarise(experiment: Experiment, masks: list[str]) -> dict:
    """Every figure of the comparison as plain data; intervals are 95 %."""
    protocol = experiment.protocol
    axis, labels = protocol.axis, list(protocol.prompts["label"])
    before = experiment.arm(UNTREATED)
    target = protocol.target
    gap = share_statistic(parity_gap, target)
    floors = {
        name: noise_floor(protocol.images, len(axis), len(labels), metric, target=target)
        for name, metric in GAPS.items()
    }
    single = noise_floor(protocol.images, len(axis), 1, parity_gap, target=target)
    distant = experiment.arm(OTHER)
    changes = {
        arm.name: paired_difference_interval(before.reads, arm.reads, gap)
        for arm in experiment.neutral
        if arm is not before and arm is not distant
    }
    ceiling = changes[BALANCED]

    arms = {}
    for arm in experiment.neutral:
        shares = shares_from_reads(arm.reads, hard=True)  # (P, K)
        hits = top_group(arm.reads).sum(1)
        figures: dict = {
            "images": arm.reads.shape[0] * arm.reads.shape[1],
            "seconds": round(arm.seconds, 2),
            "unsure": unsure_rate(arm.reads.flatten(0, 1)).item(),
            "frechet_to_untreated": None if arm is before else frechet_between(_flat(arm), _flat(before)),
            # Pictures of the same seeds pair up, which brings them closer than two samples ever are. Against other
            # seeds every arm is a sample of its own, and the untreated one shows the floor.
            "frechet_to_other_seeds": None if arm is distant else frechet_between(_flat(arm), _flat(distant)),
            "prompts": [
                {
                    "label": label,
                    "prompt": write(protocol.prompts[p]),
                    "shares": {
                        group: vars(wilson_interval(float(hits[p, k]), arm.reads.shape[1]))
                        for k, group in enumerate(axis.groups)
                    },
                    "parity_gap": float(parity_gap(shares[p], target)),
                }
                for p, label in enumerate(labels)
            ],
        }
        for name, metric in GAPS.items():
            figures[name] = vars(bootstrap_interval(arm.reads, share_statistic(metric, target)))
        figures |= _within_groups(arm, experiment)
        if arm is not before:
            figures["drift"] = _drift(arm, before)
        if arm.allotted is not None:
            figures["allotment_obeyed"] = _obeyed(arm)
        if arm.right is not None:
            figures["occupation_right"] = _rate(arm.right)
        if arm.name in changes:
            figures["parity_gap_change"] = vars(changes[arm.name])
            if arm.right is not None and before.right is not None:
                change = float(arm.right.nanmean() - before.right.nanmean())
                figures["occupation_right_change"] = change
            if ceiling.high < 0:  # a share of a gain that may be none says nothing
                figures["share_of_balanced_oracle"] = changes[arm.name].estimate / ceiling.estimate
        arms[arm.name] = figures

    return {
        "schema": SCHEMA,
        "axis": axis.name,
        "groups": list(axis.groups),
        "target_shares": target.tolist(),
        "labels": labels,
        "images_per_prompt": protocol.images,
        "seeds": [protocol.seed, protocol.seed + protocol.images - 1],
        "steps": protocol.steps,
        "guidance": protocol.guidance,
        "masks": masks,
        "noise_floor": {name: vars(floor) for name, floor in floors.items()},
        "noise_floor_one_prompt": vars(single),
        "arms": arms,
        "group_prompts": {arm.name: _fidelity(arm, experiment) for arm in experiment.grouped},
        "gate": _gate(experiment),
    }


def _within_groups(arm: Drawn, experiment: Experiment) -> dict:
    """Distance to untreated images of the same people on other seeds, and its floor; see `frechet_within_groups`."""
    oracle, reference = experiment.arm(ALLOCATION), experiment.reference
    if reference is None or oracle.allotted is None or reference.allotted is None:
        return {}
    if arm.name == OTHER:  # it shares its seeds with the reference, which brings them closer than two samples are
        return {}
    groups = len(experiment.protocol.axis)

    def cells(group: Tensor) -> Tensor:
        return (torch.arange(len(group))[:, None] * groups + group).flatten()

    distance, floor = frechet_within_groups(
        (_flat(arm), cells(arm.reads.argmax(2))),
        (_flat(reference), cells(reference.allotted)),
        (_flat(oracle), cells(oracle.allotted)),
        len(arm.reads) * groups,
    )
    if distance != distance:  # nothing to compare with
        return {}
    return {"frechet_within_groups": distance, "frechet_within_groups_floor": floor}


def _drift(arm: Drawn, before: Drawn) -> dict:
    """How far the shares of each other axis moved: mean over prompts of their total variation."""
    return {
        axis: float(sdtv(shares_from_reads(reads, hard=True), shares_from_reads(before.others[axis], hard=True)).mean())
        for axis, reads in arm.others.items()
    }


def _obeyed(arm: Drawn) -> dict:
    """Share of images that show the group they were allotted to."""
    assert arm.allotted is not None
    asked = arm.allotted >= 0
    hits = top_group(arm.reads).gather(2, arm.allotted.clamp_min(0)[..., None])[..., 0]
    return vars(wilson_interval(float(hits[asked].sum()), int(asked.sum())))


def _gate(experiment: Experiment) -> dict:
    """How the gate reads this experiment's prompts: group prompts that it misses, neutral ones it takes for such."""
    axis, rows = experiment.protocol.axis, list(experiment.protocol.prompts)
    named = [is_neutral(prompt, axis) for row in rows for prompt in group_prompts(row, axis)]
    neutral = [is_neutral(write(row), axis) for row in rows]
    return {
        "group_prompts": len(named),
        "missed": sum(named),
        "neutral_prompts": len(neutral),
        "false_alarms": len(neutral) - sum(neutral),
    }


def _flat(arm: Drawn) -> Tensor:
    return arm.features.flatten(0, 1)


def _fidelity(arm: Drawn, experiment: Experiment) -> dict:
    """How often a prompt that names a group was obeyed: rows of a seed run through the groups of each prompt."""
    groups = experiment.protocol.axis.groups
    obeyed = top_group(arm.reads).unflatten(0, (-1, len(groups))).diagonal(dim1=1, dim2=3)  # (P, m, K)
    total = {"all": (obeyed.sum(), obeyed.numel())}
    total |= {group: (obeyed[..., k].sum(), obeyed[..., k].numel()) for k, group in enumerate(groups)}
    figures: dict = {name: vars(wilson_interval(float(hits), count)) for name, (hits, count) in total.items()}
    if arm.right is not None:
        figures["occupation_right"] = _rate(arm.right)
    return figures


def _rate(right: Tensor) -> dict:
    """Share of pictures that were read right, of those whose occupation the reader knows."""
    return vars(wilson_interval(float(right.nansum()), int(right.isfinite().sum())))
