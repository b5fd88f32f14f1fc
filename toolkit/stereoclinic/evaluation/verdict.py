"""What a comparison comes to, in one sentence: the change of the gap, what is left of it, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.arms import BALANCED, OTHER, UNTREATED
from stereoclinic.evaluation.compare import difference, told_apart
from stereoclinic.evaluation.figures.registry import UNRELATED, Value, figure_of, values_of
from stereoclinic.evaluation.wording import number, p_value, spelt

NARROWED, WIDENED, UNCLEAR, NO_MASK = "narrowed", "widened", "unclear", "no mask"

_SURE = 0.05  # of p, the level of every interval here
_FAR = 2.0  # times its floor, where a figure has no interval: less could be chance


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one arm.

    Args:
        arm: Its name.
        outcome: `NARROWED`, `WIDENED`, `UNCLEAR` or `NO_MASK`.
        fair: Whether the gap that is left is one that a fair generator shows by chance; None if that is not known.
        costs: Side effects that are worse than untreated by more than chance.
        sentence: All of it.
    """

    arm: str
    outcome: str
    fair: bool | None
    costs: tuple[str, ...]
    sentence: str


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """One for each mask of an experiment, in their order; without a mask, one of the model as it is."""
    return [verdict(results, name) for name in results.get("masks") or [None]]


def verdict(results: Mapping[str, Any], mask: str | None = None) -> Verdict:
    """What the figures of an experiment come to.

    The gap counts as changed where both its interval and its p-value say so. What too few images cannot tell is said
    to be so, and is taken neither for failure nor for harmlessness.

    Args:
        results: Of one experiment, as in results.json; every figure but the gaps of the two arms may be absent.
        mask: Name of the mask that is judged; None for the model without one.
    """
    before = values_of(results, UNTREATED)["parity_gap"]
    if mask is None:
        return _untreated(results, before)
    after = values_of(results, mask)["parity_gap"]
    change = values_of(results, mask).get("parity_gap_change", Value(after.estimate - before.estimate))
    outcome = _outcome(change)
    came = f"{number(before.estimate)} to {number(after.estimate)}, change {spelt(change, '+.2f')}"
    if change.p_value is not None:
        came += f", {p_value(change.p_value)}"
    says = {
        NARROWED: f"mask {mask} narrows the parity gap on {results['axis']}",
        WIDENED: f"mask {mask} makes the parity gap on {results['axis']} wider",
        UNCLEAR: f"mask {mask} changes the parity gap on {results['axis']} by no more than chance might",
    }
    fair, was_fair = _is_fair(results, after), _is_fair(results, before)
    if outcome == UNCLEAR and was_fair:
        left = f"untreated, the gap already {_beside_chance(results, True)}"
    elif fair is not None:
        left = f"what is left of it {_beside_chance(results, fair)}"
    else:
        left = "whether what is left of it is more than chance is not known"
    costs, measured = _costs(results, mask)
    if costs:
        price = f"it costs: {', '.join(costs)}"
    elif measured:
        price = f"no cost beyond chance can be told in {_listed(measured)}"
    else:
        price = "side effects were not measured"
    return Verdict(mask, outcome, fair, tuple(costs), _sentence(f"{says[outcome]} ({came})", left, price))


def _untreated(results: Mapping[str, Any], gap: Value) -> Verdict:
    fair = _is_fair(results, gap)
    parts = [f"no mask was given: the model's own parity gap on {results['axis']} is {spelt(gap)}"]
    if fair is not None:
        parts.append(f"it {_beside_chance(results, fair)}")
    ceiling = values_of(results, BALANCED).get("parity_gap_change")
    if ceiling is not None:
        parts.append(f"a model without any lean (the balanced oracle) would change it by {spelt(ceiling, '+.2f')}")
    return Verdict(UNTREATED, NO_MASK, fair, (), _sentence(*parts))


def _sentence(*parts: str) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _outcome(change: Value) -> str:
    if not told_apart(change) or (change.p_value is not None and change.p_value >= _SURE):
        return UNCLEAR
    return WIDENED if change.estimate > 0 else NARROWED


def _is_fair(results: Mapping[str, Any], gap: Value) -> bool | None:
    upper = _upper(results)
    return None if upper is None else gap.estimate <= upper


def _upper(results: Mapping[str, Any]) -> float | None:
    return ((results.get("noise_floor") or {}).get("parity_gap") or {}).get("upper")


def _beside_chance(results: Mapping[str, Any], fair: bool) -> str:
    which = "is no more than" if fair else "is more than"
    n = results.get("images_per_prompt")
    size = f" at {n} images a prompt" if n else ""
    return f"{which} a fair generator shows by chance{size} (below {number(_upper(results))})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _costs(results: Mapping[str, Any], mask: str) -> tuple[list[str], list[str]]:
    """What got worse by more than chance, and the names of all that was looked at."""
    before, after = values_of(results, UNTREATED), values_of(results, mask)
    costs, measured = [], []
    for key in ("occupation_right", "group_prompts.all", "unsure", "no_group"):
        if key not in before or key not in after:
            continue
        was, now = before[key], after[key]
        change, figure = difference(was, now), figure_of(key)
        if change.has_interval:
            measured.append(figure.title)
        if told_apart(change) and change.estimate * figure.better < 0:
            costs.append(f"{figure.title} {number(was.estimate)} to {number(now.estimate)}")
    for key, floor in _floors(results, after).items():
        title = figure_of(key).title
        measured.append(title)
        value = after[key]
        if (value.low if value.low is not None else value.estimate / _FAR) > floor:
            form = figure_of(key).form
            costs.append(f"{title} {number(value.estimate, form)} where chance shows {number(floor, form)}")
    return costs, measured


def _floors(results: Mapping[str, Any], after: Mapping[str, Value]) -> dict[str, float]:
    """What chance alone shows of the distances and drifts that are there."""
    within = "frechet_within_groups_ratio"
    found = {within: 1.0} if within in after else {}
    chance = values_of(results, OTHER)
    distance = f"{UNRELATED}.frechet_to_other_seeds"
    untreated = values_of(results, UNTREATED)
    if distance in after and distance in untreated:
        found[distance] = untreated[distance].estimate
    drifts = [key for key in after if key.startswith("drift.") and key in chance]
    return found | {key: chance[key].estimate for key in drifts}
