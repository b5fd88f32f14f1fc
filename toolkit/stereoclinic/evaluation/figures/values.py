"""The figures of results as flat values, by dotted key.

Results nest their figures, and later versions add to them. Whatever reads results walks them here, so that a figure
that is not registered is still shown, under its own key.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from stereoclinic.evaluation.figures.registry import GROUPED, INTERVAL, NOISE, UNRELATED, figure_of
from stereoclinic.statistics.intervals import Interval, NoiseFloor, PairedDifference, wilson_interval


def values_of(results: Mapping[str, Any], arm: str) -> dict[str, Interval]:
    """Every figure of one arm by its dotted key; those of single prompts are left out.

    Also those that results hold outside the arms: of group prompts, of unrelated prompts, against a reference, and of
    a published protocol by that protocol's name.

    Args:
        results: Of one experiment, as in results.json.
        arm: Name of an arm; one that is not there has no figures.
    """
    published = results.get("published") or {}
    elsewhere = {
        "published": {name: {published["name"]: value} for name, value in (published.get("arms") or {}).items()},
        "amplification": results.get("amplification") or {},
        GROUPED: results.get(GROUPED) or {},
        UNRELATED: (results.get(UNRELATED) or {}).get("arms") or {},
    }
    return _with_unsure_interval(flat(results["arms"].get(arm) or {})) | {
        f"{family}.{key}": value
        for family, arms in elsewhere.items()
        for key, value in flat(arms.get(arm) or {}).items()
    }


def _with_unsure_interval(values: dict[str, Interval]) -> dict[str, Interval]:
    """The same with the interval of `unsure`, which older results lack; the number of images tells it."""
    unsure, images = values.get("unsure"), values.get("images")
    if unsure is None or unsure.has_ends or images is None:
        return values
    if not (0 <= unsure.estimate <= 1 and 1 <= images.estimate < math.inf):
        return values
    n = round(images.estimate)
    return values | {"unsure": wilson_interval(unsure.estimate * n, n)}


def flat(figures: Mapping[str, Any]) -> dict[str, Interval]:
    """Numbers and intervals by dotted key; anything else, and what was not measured, is left out.

    A number and its interval under `INTERVAL` are one figure.
    """
    found: dict[str, Interval] = {}
    for key, figure in figures.items():
        if key.endswith(INTERVAL) and key.removesuffix(INTERVAL) in figures:
            continue
        if (value := as_value(figures.get(key + INTERVAL)) or as_value(figure)) is not None:
            found[key] = value
        elif isinstance(figure, Mapping) and "estimate" not in figure:
            found |= {f"{key}.{below}": value for below, value in flat(figure).items()}
    return found


def as_value(figure: Any) -> Interval | None:
    """A number or an interval as results hold it; None for anything else. One with a p-value is a PairedDifference."""
    if _is_number(figure):
        return Interval(float(figure))
    if not isinstance(figure, Mapping) or not _is_number(figure.get("estimate")):
        return None
    low, high, p = (
        float(end) if _is_number(end := figure.get(name)) else math.nan for name in ("low", "high", "p_value")
    )
    estimate = float(figure["estimate"])
    return Interval(estimate, low, high) if math.isnan(p) else PairedDifference(estimate, low, high, p)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def p_value_of(value: Interval) -> float | None:
    """The p-value of a figure that has one."""
    return value.p_value if isinstance(value, PairedDifference) and not math.isnan(value.p_value) else None


def noise_of(results: Mapping[str, Any], key: str) -> Interval | NoiseFloor | None:
    """The sampling noise of a figure: what a treatment that changes nothing, or a fair model, shows by chance.

    Returns:
        For a gap, the mean of a fair model and the bound that 95 % of runs stay below. For a distance, what two
        samples differ by. None where results do not tell it.
    """
    noise = figure_of(key).noise
    if isinstance(noise, str):
        return values_of(results, noise).get(key)
    if noise is not None:
        return Interval(noise)
    published = results.get("published") or {}
    floors = {**(results.get("noise_floor") or {}), f"published.{published.get('name')}": published.get("noise_floor")}
    for name, pooled in (results.get("noise_floor_pooled") or {}).items():
        floors[f"pooled.{name}"] = pooled
    floor = floors.get(key)
    if not isinstance(floor, Mapping) or not _is_number(floor.get("upper")):
        return None
    return NoiseFloor(float(floor["mean"]) if _is_number(floor.get("mean")) else math.nan, float(floor["upper"]))


def tabled(results: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """The values of every arm by arm, without those that a table shows in the cell of another figure."""
    values = {arm: values_of(results, arm) for arm in results["arms"]}
    keys = {key for arm in values.values() for key in arm}
    hidden = {key for key in keys if key.endswith(NOISE) and key.removesuffix(NOISE) in keys}
    return {arm: {key: value for key, value in found.items() if key not in hidden} for arm, found in values.items()}
