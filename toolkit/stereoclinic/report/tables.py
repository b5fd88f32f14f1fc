"""The tables of the report: a row for each figure, a column for each arm, and the sampling noise.

Whatever results do not hold is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.arms import UNTREATED
from stereoclinic.evaluation.figures.registry import NOISE, figure_of, in_order
from stereoclinic.evaluation.figures.values import as_value, noise_of, tabled, values_of
from stereoclinic.evaluation.wording import MISSING, bracket, details, number, p_value, spelt
from stereoclinic.report import charts
from stereoclinic.sns.allocate import JOINT
from stereoclinic.statistics.intervals import Interval, NoiseFloor

Data = Mapping[str, Any]

MAIN_ROWS = 8  # of the table that is not folded

_TIMES = " \N{MULTIPLICATION SIGN}"
_INTERVALS = "Brackets are 95 % intervals over other seeds of these prompts."
_CORRECTED = (
    "Estimated from the confusion table that was given. Below each interval is the share as read. Gaps, changes and the"
    " verdict use the shares as read."
)
_TESTED = (
    "p-values of no change in the shares of a prompt on the same seeds (exact test). The large one is corrected for the"
    " number of prompts (Holm). BH: Benjamini-Hochberg. Moved: images that are read as another group than before."
)
_MEETINGS = f"Gaps of joint groups to the product of the axes' targets. {_INTERVALS}"


@dataclass(frozen=True)
class Cell:
    """A figure as it is printed: the number, and the lines below it."""

    text: str
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One figure of every arm, and its sampling noise; None where that is not known."""

    title: str
    note: str
    cells: list[Cell]
    noise: Cell | None = None


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: Heading.
        rows: One or more.
        arms: Names of its columns.
        caption: One sentence or two below it.
        wraps: Whether the lines below a number may wrap.
    """

    title: str
    rows: list[Row]
    arms: list[str]
    caption: str = ""
    wraps: bool = False

    @property
    def has_noise(self) -> bool:
        return any(row.noise for row in self.rows)


def main_keys(keys: Iterable[str]) -> list[str]:
    """Of these figures those that the main table shows, at most `MAIN_ROWS`."""
    return [key for key in in_order(keys) if figure_of(key).shown][:MAIN_ROWS]


def main_table(results: Data) -> Table:
    """Bias and cost: the figures that are shown by default."""
    values = tabled(results)
    keys = main_keys(dict.fromkeys(key for arm in values.values() for key in arm))
    rows = [_row(results, values, key) for key in keys]
    caption = f"{_INTERVALS} p is for no change on the same seeds.{allotment_note(results)}"
    return Table("Bias and cost", rows, list(values), caption)


def allotment_note(results: Data) -> str:
    """What sampling noise does not say of masks that allot groups; nothing where there is none."""
    if not any("allotment_obeyed" in results["arms"][mask] for mask in results.get("masks") or []):
        return ""
    return " Masks that allot groups: allotted groups are dealt evenly, so compare with the allocation oracle."


def further_tables(results: Data) -> list[Table]:
    """All other figures by part."""
    values = tabled(results)
    keys = dict.fromkeys(key for arm in values.values() for key in arm)
    main = main_keys(keys)
    rest = [key for key in in_order(keys) if key not in main]
    published = results.get("published") or {}
    titles = {
        "bias": "Further bias figures",
        "published": f"Protocol {published.get('name')}",
        "reference": "Compared with the reference",
        "cost": "Further side effects and cost",
        "option": "Figures of options",
        "further": "Further figures",
    }
    tables = []
    for part, title in titles.items():
        caption = f"{published.get('figure')}. Sources: see “How this was made”." if part == "published" else ""
        rows = [_row(results, values, key) for key in rest if figure_of(key).part == part]
        tables += [Table(title, rows, list(values), caption)] if rows else []
    return tables


def _row(results: Data, values: Mapping[str, Mapping[str, Interval]], key: str) -> Row:
    figure = figure_of(key)
    form = figure.unit.form
    cells = []
    for arm, found in values.items():
        value = found.get(key)
        noise = values_of(results, arm).get(key + NOISE)
        more = [] if noise is None else [f"noise {number(noise.estimate, form)}"]
        cells.append(_cell(value, form, *more))
    return Row(figure.heading, figure.meaning, cells, _noise_cell(noise_of(results, key), form))


def _cell(value: Interval | None, form: str = ".2f", *more: str) -> Cell:
    if value is None:
        return Cell(MISSING)
    return Cell(number(value.estimate, form), (*details(value, form), *more))


def _noise_cell(noise: Interval | NoiseFloor | None, form: str) -> Cell | None:
    if noise is None:
        return None
    if isinstance(noise, NoiseFloor):
        return Cell(number(noise.mean, form), (f"below {number(noise.upper, form)}",))
    return Cell(number(noise.estimate, form))


def prompt_labels(results: Data) -> list[str]:
    """Labels of the prompts, or the prompts themselves where several share a label."""
    rows = results["arms"][UNTREATED].get("prompts") or []
    labels = [row["label"] for row in rows]
    return labels if len(set(labels)) == len(labels) else [row.get("prompt", row["label"]) for row in rows]


def shown_groups(results: Data) -> list[str]:
    """The groups that tables of shares have: of two groups only the first, because the second mirrors it."""
    groups: list[str] = results["groups"]
    return groups if len(groups) > 2 else groups[:1]


def corrected_table(results: Data, arms: Sequence[str]) -> list[Table]:
    """Shares without the reader's error: a row for each prompt and group."""
    found = results.get("corrected_shares") or {}
    groups = shown_groups(results)
    of = "Shares" if len(groups) > 1 else f"Share of {groups[0]}"
    rows = [
        Row(
            f"{label}: {group}" if len(groups) > 1 else label,
            "",
            [_corrected(found.get(arm), results["arms"][arm], p, group) for arm in arms],
        )
        for p, label in enumerate(prompt_labels(results))
        for group in groups
    ]
    title = f"{of} without the reader's error"
    return [Table(title, rows, list(arms), _CORRECTED, wraps=True)] if found else []


def _corrected(found: Sequence[Data] | None, arm: Data, p: int, group: str) -> Cell:
    value = as_value(found[p].get(group)) if found else None
    if value is None:
        return Cell(MISSING)
    read = as_value(arm["prompts"][p]["shares"].get(group))
    return Cell(number(value.estimate), (bracket(value), f"read {number(read.estimate if read else None)}"))


def tested_table(results: Data, arms: Sequence[str]) -> list[Table]:
    """Whether each prompt's shares changed: a row for each prompt."""
    rows = []
    for p, label in enumerate(prompt_labels(results)):
        changes = [(results["arms"][arm].get("prompts") or [{}] * (p + 1))[p].get("change") for arm in arms]
        if any(changes):
            rows.append(Row(label, "", [_tested(change, results) for change in changes]))
    return [Table("Prompts tested one by one", rows, list(arms), _TESTED, wraps=True)] if rows else []


def _tested(change: Data | None, results: Data) -> Cell:
    if change is None:
        return Cell(MISSING)
    images = results.get("images_per_prompt")
    moved = f"{change['moved']} of {images} moved" if images else f"{change['moved']} moved"
    alone, less_strict = p_value(change["p_value"]), p_value(change["p_value_benjamini_hochberg"])
    return Cell(p_value(change["p_value_holm"]), (f"{moved};", f"uncorrected {alone}, BH {less_strict}"))


def meeting_table(results: Data, arms: Sequence[str]) -> list[Table]:
    """The gaps of every intersection of axes: a row for each gap."""
    rows = []
    for name, meeting in (results.get("intersections") or {}).items():
        for gap, floor in meeting["noise_floor"].items():
            figure = figure_of(gap)
            form = figure.unit.form
            cells = [_cell(as_value((meeting["arms"].get(arm) or {}).get(gap)), form) for arm in arms]
            noise = _noise_cell(NoiseFloor(floor["mean"], floor["upper"]), form)
            rows.append(Row(f"{_crossed(name)}: {figure.title}", "", cells, noise))
    return [Table("Where axes meet", rows, list(arms), _MEETINGS)] if rows else []


def meeting_charts(results: Data, arms: Sequence[str]) -> list[dict[str, Any]]:
    """The shares of the joint groups, all prompts together: one chart for each intersection."""
    found = []
    for name, meeting in (results.get("intersections") or {}).items():
        rows = []
        for group, target in zip(meeting["groups"], meeting["target_shares"], strict=True):
            values = [as_value(meeting["arms"][arm]["shares"].get(group)) for arm in arms if arm in meeting["arms"]]
            shown = [value for value in values if value is not None]
            chart, texts = charts.interval_rows(shown, target), [spelt(value) for value in shown]
            rows.append({"label": group.replace(JOINT, ", "), "chart": chart, "texts": texts})
        found.append({"title": _crossed(name), "rows": rows})
    return found


def _crossed(name: str) -> str:
    return name.replace(JOINT, _TIMES + " ")


def needs(results: Data) -> list[dict[str, Any]]:
    """What masks and other methods need and cost: one row each, with its cells by their heading."""
    costs = results.get("baselines") or {}
    plain = results["arms"][UNTREATED].get("seconds")
    rows = []
    for name in [*(results.get("masks") or []), *costs] if costs else []:
        seconds, cost = results["arms"][name].get("seconds"), costs.get(name) or {}
        cells = {
            "needs": cost.get("needs", "prompts"),
            "made in": f"{number(cost['seconds'], '.0f')} s" if "seconds" in cost else MISSING,
            "images drawn for it": str(cost.get("images", MISSING)),
            "passes forward": str(cost.get("forward", MISSING)),
            "passes backward": str(cost.get("backward", MISSING)),
            "drawing time": f"{number(seconds / plain)}{_TIMES}" if seconds and plain else MISSING,
        }
        rows.append({"name": name, "cells": cells, "source": cost.get("source", "")})
    return rows
