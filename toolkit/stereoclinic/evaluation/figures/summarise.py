"""The figures of an experiment: bias, side effects, and what chance alone would show, as plain data."""

from typing import Any

from stereoclinic.evaluation.arms import BALANCED, OTHER, SCHEMA, UNTREATED, Drawn, Experiment
from stereoclinic.evaluation.figures.bias import gap_figures, joint_figures, prompt_figures
from stereoclinic.evaluation.figures.side_effects import (
    asked_for,
    certainty,
    distances,
    drift,
    fidelity,
    obeyed,
    rate,
    unrelated_figures,
    within_groups,
)
from stereoclinic.prompts.sets import group_prompts, write
from stereoclinic.sns.policy import is_neutral
from stereoclinic.statistics.agreement import agreement_figures
from stereoclinic.statistics.gaps import gap_changes
from stereoclinic.statistics.intervals import PairedDifference, noise_floor
from stereoclinic.statistics.shares import GAPS, parity_gap


def summarise(experiment: Experiment, masks: list[str]) -> dict[str, Any]:
    """Every figure of the comparison as plain data; intervals are 95 %."""
    protocol = experiment.protocol
    axis, labels, target = protocol.axis, list(protocol.prompts["label"]), protocol.target
    n, groups = protocol.images, len(axis)
    before, distant = experiment.arm(UNTREATED), experiment.arm(OTHER)
    seeds = before.seeds_from(protocol.seed)

    def floors(images: int, prompts: int) -> dict[str, Any]:
        return {
            name: vars(noise_floor(images, groups, prompts, metric, target=target)) for name, metric in GAPS.items()
        }

    changes = {
        arm.name: gap_changes(before.reads, arm.reads, {"parity_gap": parity_gap}, target)["parity_gap"]
        for arm in experiment.neutral
        if arm is not before and arm is not distant
    }
    unrelated = {"unrelated": unrelated_figures(experiment)} if experiment.unrelated else {}
    return {
        "schema": SCHEMA,
        "axis": axis.name,
        "groups": list(axis.groups),
        "target_shares": target.tolist(),
        "labels": labels,
        "images_per_prompt": n,
        "seeds": [seeds[0], seeds[-1]],
        "steps": protocol.steps,
        "guidance": protocol.guidance,
        "masks": masks,
        "noise_floor": floors(n, len(labels)),
        "noise_floor_one_prompt": vars(noise_floor(n, groups, 1, parity_gap, target=target)),
        "noise_floor_pooled": floors(n * len(labels), 1),
        "arms": {arm.name: _arm(arm, experiment, changes) for arm in experiment.neutral},
        "intersections": joint_figures(experiment.neutral, protocol),
        "group_prompts": {arm.name: fidelity(arm, experiment) for arm in experiment.grouped},
        "gate": _gate(experiment),
        **unrelated,
    }


def _arm(arm: Drawn, experiment: Experiment, changes: dict[str, PairedDifference]) -> dict[str, Any]:
    protocol, before, ceiling = experiment.protocol, experiment.arm(UNTREATED), changes[BALANCED]
    same_seeds = before if arm.name in changes else None
    figures: dict[str, Any] = {
        "images": arm.reads.shape[0] * arm.reads.shape[1],
        "seconds": None if arm.seconds is None else round(arm.seconds, 2),
        **({} if arm.memory is None else {"peak_memory": round(arm.memory / 2**20, 1)}),
        **certainty(arm),
        "prompts": prompt_figures(arm, same_seeds, protocol),
        **distances(arm, before, experiment.arm(OTHER)),
        **gap_figures(arm.reads, protocol.target),
        **within_groups(arm, experiment),
    }
    if arm is not before:
        figures["drift"] = drift(arm, before)
    if arm.allotted is not None and (arm.allotted >= 0).any():  # the gate may have left every prompt alone
        figures["allotment_obeyed"] = obeyed(arm)
    if arm.right is not None:
        figures["occupation_right"] = rate(arm.right)
    if arm.by_reader:
        figures |= agreement_figures(arm.by_reader, protocol.axis.groups)
    figures |= asked_for(arm, same_seeds)
    if arm.name in changes:
        figures["parity_gap_change"] = vars(changes[arm.name])
        if arm.right is not None and before.right is not None:
            figures["occupation_right_change"] = float(arm.right.nanmean() - before.right.nanmean())
        if ceiling.high < 0:  # a share of a gain that may be none says nothing
            figures["share_of_balanced_oracle"] = changes[arm.name].estimate / ceiling.estimate
    return figures


def _gate(experiment: Experiment) -> dict[str, Any]:
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
