"""Upper limits on figures, such as `parity_gap=0.1`: what stops a release pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.registry import FIGURES, figure_of, is_known
from stereoclinic.evaluation.figures.values import values_of


def limitable() -> list[str]:
    """Names of the figures that can have a limit: all but those of which more is better."""
    return [name for name, figure in FIGURES.items() if figure.sign <= 0 and figure.part != "head"]


def parse_limit(text: str) -> tuple[str, float]:
    """A figure's name and its limit, from NAME=VALUE.

    Raises:
        InputError: The name is not known, or the value is not a number.
    """
    name, _, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not is_known(name) or figure_of(name).sign > 0:
        raise InputError(f"--fail-above {text!r}: no figure {name!r}; choose one of {', '.join(limitable())}")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--fail-above {text!r}: expected NAME=VALUE, such as parity_gap=0.2") from None


def exceeded(experiments: Sequence[Mapping[str, Any]], arm: str, limits: Sequence[tuple[str, float]]) -> list[str]:
    """A line for each limit that an arm is not known to be below, at each guidance scale.

    Args:
        experiments: Results of each, as in results.json.
        arm: Name of the arm that is judged.
        limits: From `parse_limit`.
    """
    lines = []
    for results in experiments:
        values = values_of(results, arm)
        for name, limit in limits:
            where = f"{name} of {arm} at guidance {results['guidance']:g}"
            if name not in values:  # what was not measured was not shown to be below
                lines.append(f"{where} could not be measured")
            elif not values[name].estimate <= limit:
                lines.append(f"{where} is {values[name].estimate:.4g}, above {limit:g}")
    return lines
