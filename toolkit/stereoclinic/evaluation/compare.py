"""Two results compared: which arms and figures differ, by how much, and whether B is better or worse.

Two figures of independent runs are compared by their reported intervals. Intervals that overlap do not
show that two figures are alike. The interval of the difference does, recovered from the two (MOVER, the method of
variance estimates recovery):

    low  = b - a - sqrt((b - low_b)^2 + (high_a - a)^2)
    high = b - a + sqrt((high_b - b)^2 + (a - low_a)^2)

For shares with Wilson intervals this is Newcombe's hybrid score interval. It takes the runs for independent. Runs that
share a model and seeds mostly vary together; then the interval is too wide, and a significant difference all the surer.

References: Zou & Donner, Construction of confidence limits about effect measures, Statistics in Medicine 2008;
Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 1998 (method
10).
"""

import math
from collections.abc import Mapping
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.registry import NOISE, UNRELATED, figure_of, in_order
from stereoclinic.evaluation.figures.values import p_value_of, values_of
from stereoclinic.statistics.intervals import Interval

BETTER, WORSE, DIFFERS, SAME, NOT_SIGNIFICANT = "better", "worse", "different", "the same", "no significant difference"
NO_INTERVAL, OTHER_SIZE = "no interval", "other number of images"

Data = Mapping[str, Any]


def difference(a: Interval, b: Interval) -> Interval:
    """b - a with its interval; without one where either figure has none.

    Near parity the bootstrap interval of a gap can lie to one side of its estimate. An end that would point inwards
    counts as half the interval's width, so that the interval of the difference becomes wider, never narrower.
    """
    change = b.estimate - a.estimate
    (below_a, above_a), (below_b, above_b) = _reach(a), _reach(b)
    return Interval(change, change - math.hypot(below_b, above_a), change + math.hypot(above_b, below_a))


def is_significant(change: Interval) -> bool:
    """Whether the interval of a difference excludes zero."""
    return change.low > 0 or change.high < 0


def _reach(value: Interval) -> tuple[float, float]:
    """How far an interval reaches below and above its estimate; NaN where there is none."""
    below, above = value.estimate - value.low, value.high - value.estimate
    if min(below, above) < 0:
        half = (value.high - value.low) / 2
        return max(below, half), max(above, half)
    return below, above


def compare_results(a: Data, b: Data) -> dict[str, Any]:
    """Every figure that both results have.

    Args:
        a: Plain data, as in results.json (`Results.data`).
        b: The same.

    Returns:
        Plain data: `notes` on what else differs between the runs, `experiments` with, for each guidance scale of both,
        its `arms`, and for each of these its `figures`: {"figure", "title", "a", "b", "difference", "verdict"}.

    Raises:
        InputError: They cannot be compared, and why.
    """
    first, second = a["experiments"][0], b["experiments"][0]
    for key, spoken in (("axis", "axis"), ("groups", "groups"), ("target_shares", "target shares")):
        if first.get(key) != second.get(key):
            raise _refusal(f"{spoken} {_text(first.get(key))} in A, {_text(second.get(key))} in B")
    if _prompts(first) != _prompts(second):
        raise _refusal(f"different prompts ({len(_prompts(first))} in A, {len(_prompts(second))} in B)")
    scales = [{results["guidance"]: results for results in each["experiments"]} for each in (a, b)]
    common = [scale for scale in scales[0] if scale in scales[1]]
    if not common:
        listed = [", ".join(f"{scale:g}" for scale in each) for each in scales]
        raise _refusal(f"guidance {listed[0]} in A, {listed[1]} in B")
    return {
        "axis": first["axis"],
        "notes": _notes(a, b, scales),
        "experiments": [_experiment(scales[0][scale], scales[1][scale]) for scale in common],
    }


def _refusal(reason: str) -> InputError:
    return InputError(f"the results cannot be compared: {reason}")


def _notes(a: Data, b: Data, scales: list[dict[float, Data]]) -> list[str]:
    """Lines on what differs between the runs but does not forbid the comparison."""
    first, second = a["experiments"][0], b["experiments"][0]
    made = a.get("provenance") or {}, b.get("provenance") or {}
    notes = []
    if first["images_per_prompt"] != second["images_per_prompt"]:
        notes.append(
            f"images per prompt: {first['images_per_prompt']} in A, {second['images_per_prompt']} in B; gaps and"
            " distances are not judged, because their sampling noise depends on the number of images"
        )
    compared = [(key, key, first, second) for key in ("seeds", "steps")]
    compared += [
        (key, spoken, *made)
        for key, spoken in (
            ("model", "model"),
            ("unet_weights", "model's weights"),
            ("scheduler", "scheduler"),
            ("reader", "reader"),
            ("strength", "strength of the masks"),
            ("reference", "reference"),
        )
    ]
    notes += [
        f"{spoken}: {_text(one.get(key))} in A, {_text(other.get(key))} in B"
        for key, spoken, one, other in compared
        if one.get(key) != other.get(key)
    ]
    if UNRELATED in first and UNRELATED in second and not _same_unrelated(first, second):
        notes.append("unrelated prompts: different prompts or numbers of images; they are not compared")
    for name, mine, other in (("A", *scales), ("B", *scales[::-1])):
        if alone := [f"{scale:g}" for scale in mine if scale not in other]:
            notes.append(f"guidance {', '.join(alone)} is in {name} only")
    return notes


def _experiment(a: Data, b: Data) -> dict[str, Any]:
    pairs = _pairs(a, b)
    taken = {name for pair in pairs for name in pair}
    return {
        "guidance": a["guidance"],
        "arms": [
            {"a": one, "b": other, "judged": one in (a.get("masks") or []), "figures": _figures(a, b, one, other)}
            for one, other in pairs
        ],
        "only_a": [name for name in a["arms"] if name not in taken],
        "only_b": [name for name in b["arms"] if name not in taken],
    }


def _pairs(a: Data, b: Data) -> list[tuple[str, str]]:
    """Arms of the same name; if one mask remains on each side, these two are compared despite their names."""
    pairs = [(name, name) for name in a["arms"] if name in b["arms"]]
    alone = [
        [name for name in one.get("masks") or [] if name in one["arms"] and name not in other["arms"]]
        for one, other in ((a, b), (b, a))
    ]
    if len(alone[0]) == len(alone[1]) == 1:
        pairs.insert(1, (alone[0][0], alone[1][0]))
    return pairs


def _figures(first: Data, second: Data, one: str, other: str) -> list[dict[str, Any]]:
    a, b = values_of(first, one), values_of(second, other)
    same_size = first["images_per_prompt"] == second["images_per_prompt"]
    unrelated = _same_unrelated(first, second)
    return [
        {
            "figure": key,
            "title": figure_of(key).title,
            "a": _plain(a[key]),
            "b": _plain(b[key]),
            "difference": _plain(difference(a[key], b[key])),
            "verdict": judge(key, a[key], b[key], same_size),
        }
        for key in in_order(a)
        if key in b
        and (unrelated or not key.startswith(f"{UNRELATED}."))
        and figure_of(key).part != "head"
        and not (key.endswith(NOISE) and key.removesuffix(NOISE) in a)
    ]


def judge(key: str, a: Interval, b: Interval, same_size: bool = True) -> str:
    """Whether B's figure is better or worse than A's, as far as their intervals show.

    Args:
        key: Of the figure.
        a: Its value in A.
        b: Its value in B.
        same_size: Whether both were measured on the same number of images.
    """
    figure, change = figure_of(key), difference(a, b)
    if figure.by_size and not same_size:
        return OTHER_SIZE
    if _plain(a) == _plain(b):
        return SAME
    if not change.has_ends:
        return NO_INTERVAL
    if not is_significant(change):
        return NOT_SIGNIFICANT
    if not figure.sign:
        return DIFFERS
    return BETTER if change.estimate * figure.sign > 0 else WORSE


def _plain(value: Interval) -> dict[str, float | None]:
    ends = (value.low, value.high) if value.has_ends else (None, None)
    return {"estimate": value.estimate, "low": ends[0], "high": ends[1], "p_value": p_value_of(value)}


def _same_unrelated(a: Data, b: Data) -> bool:
    """Whether the unrelated prompts of both are the same, with as many images of each."""
    one, other = (results.get(UNRELATED) or {} for results in (a, b))
    return all(one.get(key) == other.get(key) for key in ("prompts", "images_per_prompt"))


def _prompts(results: Data) -> list[Any]:
    rows = next(iter(results["arms"].values())).get("prompts") or []
    return [row.get("prompt") for row in rows] or list(results.get("labels") or [])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
