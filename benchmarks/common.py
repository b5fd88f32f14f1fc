"""What the benchmarks share: intervals over repetitions, repetitions that resume, and parts of figures."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from stereoclinic.io.files import write_text


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95 % t interval over repetitions; NaN for the half if there is one repetition."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def as_text(values: Sequence[float] | np.ndarray, digits: int = 2, sign: bool = False) -> str:
    """Mean ± half of its interval."""
    mean, half = interval(values)
    return f"{mean:{'+' if sign else ''}.{digits}f} ±{half:.{digits}f}"


def resumed(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in a file of the same settings, to add repetitions to; new results if there is no file."""
    found = json.loads(out.read_text()) if out.exists() else {"settings": settings, "sets": []}
    if found["settings"] != settings:
        raise SystemExit(f"{out} was made with {found['settings']}; choose another --out")
    return found


def repeat(out: Path, found: dict[str, Any], sets: int, once: Callable[[int], dict[str, Any]]) -> None:
    """Add the repetitions that are missing, and write the file after each."""
    for number in range(len(found["sets"]), sets):
        found["sets"].append(once(number))
        write_text(out, json.dumps(found, indent=1))


def ticks(panel: Axes, values: Sequence[float], across: bool = True) -> None:
    """Label a logarithmic axis at these values alone."""
    (panel.set_xticks if across else panel.set_yticks)(values, [f"{value:g}" for value in values])
    panel.minorticks_off()


def legend(drawing: Figure, panels: Sequence[Axes], most: int = 99) -> None:
    """One legend below all panels, each name once."""
    shown = {name: drawn for panel in panels for drawn, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawing.legend(shown.values(), shown.keys(), fontsize=8, loc="outside lower center", ncols=min(most, len(shown)))
