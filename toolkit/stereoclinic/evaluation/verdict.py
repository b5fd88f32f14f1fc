"""The verdict on a mask in plain words: the change of the parity gap, the remaining gap, and the side effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.arms import BALANCED, UNTREATED
from stereoclinic.evaluation.compare import difference, is_significant
from stereoclinic.evaluation.figures.registry import TIMES_NOISE, UNRELATED, figure_of, in_order
from stereoclinic.evaluation.figures.values import noise_of, p_value_of, values_of
from stereoclinic.evaluation.wording import number, p_equals, spelt
from stereoclinic.statistics.intervals import Interval, NoiseFloor

NARROWED, WIDENED, UNCLEAR, NO_MASK = "narrowed", "widened", "unclear", "no mask"

_LEVEL = 0.05  # of p, as of every interval here
_FACTOR = 2.0  # a figure without an interval must exceed its sampling noise by this; less could be chance


@dataclass(frozen=True)
class Verdict:
    """What the figures say of one arm.

    Args:
        arm: Its name.
        outcome: `NARROWED`, `WIDENED`, `UNCLEAR` or `NO_MASK`.
        fair: Whether sampling noise explains the remaining gap; None if that is not known.
        costs: Side effects that are larger than sampling noise.
        sentence: All of it, in one line.
    """

    arm: str
    outcome: str
    fair: bool | None
    costs: tuple[str, ...]
    sentence: str


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """One for each mask of an experiment, in their order; without a mask, one of the model itself."""
    return [verdict(results, name) for name in results.get("masks") or [None]]


def verdict(results: Mapping[str, Any], mask: str | None = None) -> Verdict:
    """What the figures of an experiment say.

    The gap counts as changed where both its interval and its p-value say so. Where there are too few images to tell,
    the verdict says so; that is neither failure nor harmlessness.

    Args:
        results: Of one experiment, as in results.json; every figure but the gaps of the two arms may be absent.
        mask: Name of the mask that is judged; None for the model without one.
    """
    before = values_of(results, UNTREATED)["parity_gap"]
    if mask is None:
        return _untreated(results, before)
    values = values_of(results, mask)
    after = values["parity_gap"]
    change = values.get("parity_gap_change", Interval(after.estimate - before.estimate))
    outcome = _outcome(change)
    p = p_value_of(change)
    gap = f"the parity gap on {results['axis']}"
    sizes = f"{number(before.estimate)} to {number(after.estimate)}"
    chance = "" if p is None else f" ({p_equals(p)})"
    changed = {
        NARROWED: f"Mask {mask} narrows {gap} from {sizes}{chance}",
        WIDENED: f"Mask {mask} widens {gap} from {sizes}{chance}",
        UNCLEAR: f"Mask {mask} makes no significant difference to {gap}: {sizes}{chance}",
    }[outcome]
    fair = _is_noise(results, after)
    if outcome == UNCLEAR and _is_noise(results, before):
        remains = f"The untreated gap is already within sampling noise{_bound(results)}"
    elif fair is None:
        remains = "Sampling noise is not known"
    elif fair:
        remains = f"The remaining gap is within sampling noise{_bound(results)}"
    else:
        remains = f"The remaining gap is larger than sampling noise explains{_bound(results)}"
    costs, checked = _costs(results, mask)
    if costs:
        price = f"Side effects: {'; '.join(costs)}"
    elif checked:
        price = f"No side effect is larger than sampling noise ({', '.join(checked)})"
    else:
        price = "Side effects were not measured"
    return Verdict(mask, outcome, fair, tuple(costs), f"{changed}. {remains}. {price}.")


def _untreated(results: Mapping[str, Any], gap: Interval) -> Verdict:
    fair = _is_noise(results, gap)
    text = f"No mask was given. The model's parity gap on {results['axis']} is {spelt(gap)}."
    if fair is not None:
        extent = "within sampling noise" if fair else "larger than sampling noise explains"
        text += f" It is {extent}{_bound(results)}."
    ceiling = values_of(results, BALANCED).get("parity_gap_change")
    if ceiling is not None:
        text += f" A model without any lean (the balanced oracle) would change it by {spelt(ceiling, '+.2f')}."
    return Verdict(UNTREATED, NO_MASK, fair, (), text)


def _outcome(change: Interval) -> str:
    p = p_value_of(change)
    if not is_significant(change) or (p is not None and p >= _LEVEL):
        return UNCLEAR
    return WIDENED if change.estimate > 0 else NARROWED


def _is_noise(results: Mapping[str, Any], gap: Interval) -> bool | None:
    noise = noise_of(results, "parity_gap")
    return gap.estimate <= noise.upper if isinstance(noise, NoiseFloor) else None


def _bound(results: Mapping[str, Any]) -> str:
    noise = noise_of(results, "parity_gap")
    if not isinstance(noise, NoiseFloor):
        return ""
    images = results.get("images_per_prompt")
    size = f" at {images} images per prompt" if images else ""
    return f" (a fair model stays below {number(noise.upper)}{size})"


def _costs(results: Mapping[str, Any], mask: str) -> tuple[list[str], list[str]]:
    """Side effects beyond sampling noise in words, and the titles of all figures that were checked."""
    before, after = values_of(results, UNTREATED), values_of(results, mask)
    costs, checked = [], []
    for key in in_order(after):
        figure, value = figure_of(key), after[key]
        counts = (figure.part == "cost" and figure.shown) or key == f"{UNRELATED}.frechet_to_other_seeds"
        if not counts or not figure.sign:
            continue
        form = figure.unit.form
        noise = noise_of(results, key)
        if isinstance(noise, NoiseFloor):
            checked.append(figure.title)
            if value.estimate > noise.upper:
                most = number(noise.upper, form)
                costs.append(f"{figure.title} {number(value.estimate, form)}, by chance below {most}")
        elif isinstance(noise, Interval):
            checked.append(figure.title)
            least = value.low if value.has_ends else value.estimate / _FACTOR
            if least > noise.estimate:
                size = number(value.estimate, form)
                costs.append(
                    f"images of the same group shift {size} times as far as sampling noise"
                    if figure.unit is TIMES_NOISE
                    else f"{figure.title} {size}, sampling noise {number(noise.estimate, form)}"
                )
        elif figure.noise is None and key in before:
            change = difference(before[key], value)
            checked += [figure.title] if change.has_ends else []
            if is_significant(change) and change.estimate * figure.sign < 0:
                costs.append(f"{figure.title} {number(before[key].estimate, form)} to {number(value.estimate, form)}")
    return costs, checked
