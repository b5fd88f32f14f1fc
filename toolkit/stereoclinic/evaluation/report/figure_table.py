"""Tables of the report: a row a figure, a column an arm, and what chance alone shows beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.results.figures import BIAS, FLOOR, PUBLISHED, Value, figure_of, in_order, values_of
from stereoclinic.evaluation.results.wording import MISSING, interval, number, p_value


@dataclass(frozen=True)
class Cell:
    """A figure as it is printed: the number, and below it what belongs to it."""

    text: str
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One figure of every arm; `floor` is what a fair model shows by chance, None where that is not known."""

    title: str
    note: str
    cells: list[Cell]
    floor: Cell | None


def figure_rows(results: Mapping[str, Any], part: str) -> list[Row]:
    """The rows of one part, those that are known in their order first, then whatever else results hold.

    A row is there if any arm has the figure.

    Args:
        results: Of one experiment.
        part: Where `Figure` says that they are shown.
    """
    values = {arm: values_of(results, arm) for arm in results["arms"]}
    keys = dict.fromkeys(key for found in values.values() for key in found)
    belongs = [
        key
        for key in in_order(keys)
        if figure_of(key).part == part and not (key.endswith(FLOOR) and key.removesuffix(FLOOR) in keys)
    ]
    return [_row(results, values, key) for key in belongs]


def _row(results: Mapping[str, Any], values: dict[str, dict[str, Value]], key: str) -> Row:
    figure = figure_of(key)
    cells = []
    for found in values.values():
        value = found.get(key)
        cells.append(Cell(MISSING) if value is None else cell_of(value, found.get(key + FLOOR), figure.form))
    known = {
        BIAS: results.get("noise_floor") or {},
        PUBLISHED: {key: (results.get("published") or {}).get("noise_floor")},
    }
    chance = known.get(figure.part, {}).get(key)
    floor = None
    if isinstance(chance, Mapping) and "upper" in chance:
        floor = Cell(number(chance.get("mean"), figure.form), (f"below {number(chance['upper'], figure.form)}",))
    return Row(figure.title, figure.note, cells, floor)


def cell_of(value: Value, floor: Value | None, form: str) -> Cell:
    """A value with its interval, p-value and floor, as far as there are any."""
    below = []
    if value.has_interval:
        below.append(interval(value, form))
    if value.p_value is not None:
        below.append(p_value(value.p_value))
    if floor is not None:
        below.append(f"floor {number(floor.estimate, form)}")
    return Cell(number(value.estimate, form), tuple(below))
