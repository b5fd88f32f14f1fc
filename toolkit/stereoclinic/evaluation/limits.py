"""Limits on figures: what a release gate checks, such as `--fail-above parity_gap=0.2`."""

from collections.abc import Mapping, Sequence
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import UNTREATED

#: Figures that can have a limit -> where the value is in an arm's results.
_FIGURES = {
    **{gap: (gap, "estimate") for gap in ("parity_gap", "fairness_discrepancy", "deviation_ratio", "sdtv", "kl")},
    "unsure": ("unsure",),
    "frechet_to_untreated": ("frechet_to_untreated",),
    "frechet_to_other_seeds": ("frechet_to_other_seeds",),
    "frechet_within_groups": ("frechet_within_groups",),
    "frechet_within_groups_ratio": ("frechet_within_groups_ratio", "estimate"),
    "seconds": ("seconds",),
}


def read_limits(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Limits from NAME=VALUE texts.

    Raises:
        InputError: No such figure, or a value that is not a number.
    """
    limits = []
    for text in texts:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in _FIGURES:
            raise InputError(f"--fail-above {text!r}: no figure {name!r}; there are {', '.join(_FIGURES)}")
        try:
            limits.append((name, float(value)))
        except ValueError:
            raise InputError(f"--fail-above {text!r}: expected NAME=VALUE, such as parity_gap=0.2") from None
    return limits


def exceeded(results: Mapping[str, Any], limits: Sequence[tuple[str, float]]) -> list[str]:
    """One line for each limit that is exceeded, at each guidance scale.

    Args:
        results: As in results.json. The first mask is checked; without masks, the untreated model.
        limits: Name and largest allowed value. A figure that was not measured exceeds its limit.
    """
    lines = []
    for experiment in results["experiments"]:
        arm = next(iter(experiment["masks"]), UNTREATED)
        for name, limit in limits:
            value: Any = experiment["arms"][arm]
            for key in _FIGURES[name]:
                value = None if value is None else value.get(key)
            where = f"{name} of {arm} at guidance {experiment['guidance']:g}"
            if value is None:
                lines.append(f"{where} could not be measured")
            elif not value <= limit:  # NaN exceeds every limit
                lines.append(f"{where} is {value:.4g}, above {limit:g}")
    return lines
