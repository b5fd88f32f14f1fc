"""The figures of an experiment as plain data, as results.json holds them; intervals are 95 %."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stereoclinic.evaluation.arms import BALANCED, OTHER, SCHEMA, UNTREATED, Drawn, Experiment
from stereoclinic.evaluation.figures.bias import prompt_figures
from stereoclinic.evaluation.figures.case import Case
from stereoclinic.evaluation.figures.intersections import joint_figures
from stereoclinic.evaluation.figures.registry import FIGURES, GROUPED, NEUTRAL, UNRELATED, VARIANTS, selector
from stereoclinic.prompts.sets import group_prompts, write
from stereoclinic.sns.policy import is_neutral
from stereoclinic.statistics.gaps import gap_changes
from stereoclinic.statistics.intervals import Interval, noise_floor, two_samples_floor
from stereoclinic.statistics.shares import GAPS, parity_gap

Selector = Callable[[str], bool]


def summarise(experiment: Experiment, masks: list[str]) -> dict[str, Any]:
    """Every figure of an experiment that its protocol asks for, as plain data."""
    protocol = experiment.protocol
    axis, labels, target = protocol.axis, list(protocol.prompts["label"]), protocol.target
    n, groups = protocol.images, len(axis)
    before = experiment.arm(UNTREATED)
    seeds = before.seeds_from(protocol.seed)
    wanted = selector(protocol.figures)

    def noise(images: int, prompts: int, family: str = "") -> dict[str, Any]:
        return {
            name: vars(noise_floor(images, groups, prompts, gap, target=target))
            for name, gap in GAPS.items()
            if wanted(family + name)
        }

    cases = _cases(experiment)
    unrelated = {UNRELATED: _unrelated(experiment, wanted)} if experiment.unrelated else {}
    grouped = {arm.name: Case(arm, before, before, experiment) for arm in experiment.grouped}
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
        "noise_floor": noise(n, len(labels)) | _drift_noise(before),
        "noise_floor_one_prompt": vars(noise_floor(n, groups, 1, parity_gap, target=target)),
        "noise_floor_pooled": noise(n * len(labels), 1, "pooled."),
        "arms": {
            name: figures_of(case, NEUTRAL, wanted) | {"prompts": prompt_figures(case, protocol)}
            for name, case in cases.items()
        },
        "intersections": joint_figures(experiment.neutral, protocol),
        GROUPED: {name: figures_of(case, GROUPED, wanted) for name, case in grouped.items()},
        "gate": _gate(experiment),
        **unrelated,
    }


def _drift_noise(before: Drawn) -> dict[str, Any]:
    """How far the shares on each other axis drift by chance: two samples of the untreated model."""
    return {f"drift.{axis}": vars(two_samples_floor(reads)) for axis, reads in before.others.items()}


def _cases(experiment: Experiment) -> dict[str, Case]:
    """The arms of neutral prompts, each with its change of the gap."""
    before = experiment.arm(UNTREATED)
    cases = {arm.name: Case(arm, before, experiment.distant, experiment) for arm in experiment.neutral}
    changes = {
        name: gap_changes(before.reads, case.arm.reads, {"": parity_gap}, case.target)[""]
        for name, case in cases.items()
        if case.paired is not None
    }
    return {
        name: replace(case, change=changes.get(name), ceiling=changes.get(BALANCED)) for name, case in cases.items()
    }


def figures_of(case: Case, prompts: str, wanted: Selector) -> dict[str, Any]:
    """The figures of one arm by key, as plain data.

    Args:
        case: The arm.
        prompts: One of NEUTRAL, GROUPED, UNRELATED.
        wanted: From `registry.selector`.
    """
    found: dict[str, Any] = {}
    measured = [(figure, figure.measure) for figure in FIGURES.values() if figure.measure and prompts in figure.on]
    for figure, measure in measured:
        value = measure(case) if wanted(figure.name) else None
        key = figure.name.removeprefix(f"{prompts}.").removesuffix(".")
        if value is not None:
            found |= {key: _plain(value)} if key else _plain(value)
    for variant, (_, hard, pooled) in VARIANTS.items():
        other = replace(case, hard=hard, pooled=pooled)
        varied = {
            figure.name: _plain(measure(other))
            for figure, measure in measured
            if figure.variants and wanted(f"{variant}.{figure.name}")
        }
        found |= {variant: varied} if varied else {}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    return None if math.isnan(value) else value


def _unrelated(experiment: Experiment, wanted: Selector) -> dict[str, Any]:
    """Figures of the unrelated prompts, and how they were drawn.

    `left_alone` counts the prompts that the gate leaves alone, for they name a group; they cannot change.
    """
    protocol, arms = experiment.protocol, {arm.name: arm for arm in experiment.unrelated}
    before, distant = arms[UNTREATED], arms[OTHER]
    prompts = [write(row) for row in protocol.unrelated or []]
    seeds = before.seeds_from(protocol.seed)
    return {
        "prompts": prompts,
        "left_alone": sum(not is_neutral(prompt, protocol.axis) for prompt in prompts),
        "images_per_prompt": protocol.unrelated_images,
        "seeds": [seeds[0], seeds[-1]],
        "arms": {
            name: figures_of(Case(arm, before, distant, experiment), UNRELATED, wanted) for name, arm in arms.items()
        },
    }


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
