"""Whether two figures of independent runs differ, from their reported intervals alone.

That two intervals overlap does not say that two figures are alike: at 95 % each, figures may well differ while theirs
still meet. What does say it is an interval of the difference, recovered from the two (MOVER, the method of variance
estimates recovery):

    low  = b - a - sqrt((b - low_b)^2 + (high_a - a)^2)
    high = b - a + sqrt((high_b - b)^2 + (a - low_a)^2)

For shares with Wilson intervals this is Newcombe's hybrid score interval. It takes the two for independent. Runs that
share a model and seeds are not, and mostly vary together: then the interval is too wide, and a difference that it
tells is there all the more.

References: Zou & Donner, Construction of confidence limits about effect measures, Statistics in Medicine 2008;
Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 1998 (method
10).

Two results beside each other: which arms and figures differ, by how much, and whether B is better or worse.

What is told is told from the reported intervals, by `apart.difference`. A figure without an interval gets no verdict,
and neither does one that depends on the number of images, where the two runs drew different numbers.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import SCHEMA
from stereoclinic.evaluation.figures.registry import FLOOR, HEAD, UNRELATED, Value, figure_of, in_order, values_of
from stereoclinic.io.reading import read_json


def difference(a: Value, b: Value) -> Value:
    """b - a with its interval; without one where either figure has none.

    A bootstrap interval of a gap can lie beside its estimate, near parity. An arm that would point inwards then counts
    as half the interval's width: the interval of the difference becomes wider, never narrower.
    """
    change = b.estimate - a.estimate
    (below_a, above_a), (below_b, above_b) = _arms(a), _arms(b)
    if math.isnan(below_a + below_b):
        return Value(change)
    return Value(change, change - math.hypot(below_b, above_a), change + math.hypot(above_b, below_a))


def told_apart(change: Value) -> bool:
    """Whether a difference is surely not zero."""
    return change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def _arms(value: Value) -> tuple[float, float]:
    """How far an interval reaches below and above its estimate; NaN where there is none."""
    if value.low is None or value.high is None:
        return math.nan, math.nan
    below, above = value.estimate - value.low, value.high - value.estimate
    if min(below, above) < 0:
        half = (value.high - value.low) / 2
        return max(below, half), max(above, half)
    return below, above


BETTER, WORSE, DIFFERS, SAME, NOT_TOLD = "better", "worse", "differs", "the same", "not told apart"
NO_INTERVAL, OTHER_SIZE = "no interval", "other number of images"

Data = Mapping[str, Any]


def load_results(path: str | Path) -> dict[str, Any]:
    """Read a results.json, or the one in a folder.

    Raises:
        InputError: It cannot be read, was not written by `stereo bench`, or is of another schema.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    read = read_json(path, "results")
    data: dict[str, Any] = read if isinstance(read, dict) else {}
    found = data.get("experiments")
    if not isinstance(found, list) or not found or "schema" not in data:
        raise InputError(f"{path} holds no experiments; expected a results.json of stereo bench")
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise InputError(f"{path} has schema {data['schema']!r:.40}; this stereoclinic reads {SCHEMA}: bench again")
    try:
        if not isinstance(data.get("provenance", {}), dict | None):
            raise TypeError("provenance is no table")
        for results in found:
            _check(results)
            for name in results["arms"]:
                values_of(results, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not whole: {error!r}; bench again") from error
    return data


#: What `stereo compare` reads of an experiment, beside the figures of its arms.
_FORM: dict[str, type | UnionType] = {
    "axis": str, "groups": list, "guidance": int | float, "images_per_prompt": int, "seeds": list, "arms": dict,
}  # fmt: skip
_OPTIONAL: dict[str, type | UnionType] = {"group_prompts": dict | None, "masks": list | None, "labels": list | None}


def _check(results: Any) -> None:
    """Refuse an experiment of another form, with the error that reading it would end in."""
    for key, form in _FORM.items():
        if not isinstance(results[key], form) or isinstance(results[key], bool):
            raise TypeError(f"{key} is of another form")
    for key, form in _OPTIONAL.items():
        if not isinstance(results.get(key), form):
            raise TypeError(f"{key} is of another form")
    arms = [*results["arms"].values(), *(results.get("group_prompts") or {}).values()]
    if not results["arms"] or not all(isinstance(arm, dict | None) for arm in arms):
        raise TypeError("arms are of another form")
    for arm in filter(None, arms):
        rows = arm.get("prompts") or []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("prompts are of another form")
    if not all(isinstance(name, str) for name in results.get("masks") or []):
        raise TypeError("masks are of another form")


def compare_results(a: Data, b: Data) -> dict[str, Any]:
    """Every figure that both results have.

    Args:
        a: As in results.json.
        b: The same.

    Returns:
        Plain data: `notes` on what else differs between the runs, `experiments` with, for each guidance scale of both,
        its `arms`, and for each of these its `figures`: {"figure", "title", "a", "b", "difference", "verdict"}.

    Raises:
        InputError: They cannot be compared, and why.
    """
    first, second = a["experiments"][0], b["experiments"][0]
    for key, spoken in (("axis", "axis"), ("groups", "groups"), ("target_shares", "shares aimed at")):
        if first.get(key) != second.get(key):
            raise InputError(
                f"the results cannot be compared: {spoken} {_text(first.get(key))} in A, {_text(second.get(key))} in B"
            )
    if _prompts(first) != _prompts(second):
        raise InputError(
            f"the results cannot be compared: other prompts ({len(_prompts(first))} in A, {len(_prompts(second))} in B)"
        )
    scales = [{results["guidance"]: results for results in each["experiments"]} for each in (a, b)]
    common = [scale for scale in scales[0] if scale in scales[1]]
    if not common:
        listed = [", ".join(f"{scale:g}" for scale in each) for each in scales]
        raise InputError(f"the results cannot be compared: guidance {listed[0]} in A, {listed[1]} in B")
    return {
        "axis": first["axis"],
        "notes": _notes(a, b, scales),
        "experiments": [_experiment(scales[0][scale], scales[1][scale]) for scale in common],
    }


def _notes(a: Data, b: Data, scales: list[dict[float, Data]]) -> list[str]:
    """Lines on what differs between the runs, short of forbidding the comparison."""
    first, second = a["experiments"][0], b["experiments"][0]
    notes = []
    if first["images_per_prompt"] != second["images_per_prompt"]:
        notes.append(
            f"images a prompt: {first['images_per_prompt']} in A, {second['images_per_prompt']} in B; chance moves gaps"
            " and distances by another amount, so that those are not judged"
        )
    for key in ("seeds", "steps"):
        if first.get(key) != second.get(key):
            notes.append(f"{key}: {_text(first.get(key))} in A, {_text(second.get(key))} in B")
    if UNRELATED in first and UNRELATED in second and not _same_unrelated(first, second):
        notes.append("unrelated prompts: others, or another number of images, in A than in B; they are not compared")
    made = a.get("provenance") or {}, b.get("provenance") or {}
    for key, spoken in (
        ("model", "model"),
        ("unet_weights", "model's weights"),
        ("scheduler", "scheduler"),
        ("reader", "reader"),
        ("strength", "strength of the masks"),
        ("reference", "reference"),
    ):
        if made[0].get(key) != made[1].get(key):
            notes.append(f"{spoken}: {_text(made[0].get(key))} in A, {_text(made[1].get(key))} in B")
    for name, mine, other in (("A", *scales), ("B", *scales[::-1])):
        if alone := [f"{scale:g}" for scale in mine if scale not in other]:
            notes.append(f"guidance {', '.join(alone)} is in {name} only")
    return notes


def _experiment(a: Data, b: Data) -> dict[str, Any]:
    pairs = _pairs(a, b)
    taken = {name for pair in pairs for name in pair}
    same_size = a["images_per_prompt"] == b["images_per_prompt"]
    return {
        "guidance": a["guidance"],
        "arms": [
            {
                "a": one,
                "b": other,
                "judged": one in (a.get("masks") or []),
                "figures": _figures(values_of(a, one), values_of(b, other), same_size, _same_unrelated(a, b)),
            }
            for one, other in pairs
        ],
        "only_a": [name for name in a["arms"] if name not in taken],
        "only_b": [name for name in b["arms"] if name not in taken],
    }


def _pairs(a: Data, b: Data) -> list[tuple[str, str]]:
    """Arms of the same name; and the one mask that is left on either side, whatever it is called."""
    pairs = [(name, name) for name in a["arms"] if name in b["arms"]]
    alone = [
        [name for name in one.get("masks") or [] if name in one["arms"] and name not in other["arms"]]
        for one, other in ((a, b), (b, a))
    ]
    if len(alone[0]) == len(alone[1]) == 1:
        pairs.insert(1, (alone[0][0], alone[1][0]))
    return pairs


def _figures(a: dict[str, Value], b: dict[str, Value], same_size: bool, unrelated: bool) -> list[dict[str, Any]]:
    keys = [key for key in in_order(a) if key in b and (unrelated or not key.startswith(f"{UNRELATED}."))]
    return [
        {
            "figure": key,
            "title": figure_of(key).title,
            "a": vars(a[key]),
            "b": vars(b[key]),
            "difference": vars(difference(a[key], b[key])),
            "verdict": judge(key, a[key], b[key], same_size),
        }
        for key in keys
        if figure_of(key).part != HEAD and not (key.endswith(FLOOR) and key.removesuffix(FLOOR) in a)
    ]


def judge(key: str, a: Value, b: Value, same_size: bool = True) -> str:
    """Whether B's figure is better or worse than A's, as far as their intervals tell.

    Args:
        key: Of the figure.
        a: Its value in A.
        b: Its value in B.
        same_size: Whether both were measured on as many images.
    """
    figure, change = figure_of(key), difference(a, b)
    if figure.by_size and not same_size:
        return OTHER_SIZE
    if a == b:
        return SAME
    if not change.has_interval:
        return NO_INTERVAL
    if not told_apart(change):
        return NOT_TOLD
    if not figure.better:
        return DIFFERS
    return BETTER if change.estimate * figure.better > 0 else WORSE


def _same_unrelated(a: Data, b: Data) -> bool:
    """Whether the unrelated prompts of both are the same, and as many images of each."""
    one, other = (results.get(UNRELATED) or {} for results in (a, b))
    return all(one.get(key) == other.get(key) for key in ("prompts", "images_per_prompt"))


def _prompts(results: Data) -> list[Any]:
    rows = next(iter(results["arms"].values())).get("prompts") or []
    return [row.get("prompt") for row in rows] or list(results.get("labels") or [])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
