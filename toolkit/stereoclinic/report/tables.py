"""The report's tables: figures by their parts, shares without the reader's error, where axes meet, prompts tested one
by one, what other methods need.

All of it is left out where results do not hold it.

Tables of the report: a row a figure, a column an arm, and what chance alone shows beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stereoclinic.evaluation.arms import UNTREATED
from stereoclinic.evaluation.figures.registry import (
    AGAINST,
    BIAS,
    FLOOR,
    FURTHER,
    PUBLISHED,
    SIDE,
    Value,
    as_value,
    figure_of,
    in_order,
    values_of,
)
from stereoclinic.evaluation.wording import MISSING, interval, number, p_value, spelt
from stereoclinic.report import charts
from stereoclinic.sns.allocate import JOINT


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


Data = Mapping[str, Any]

_TIMES = " \N{MULTIPLICATION SIGN}"


def prompt_labels(results: Data) -> list[str]:
    """Labels of the prompts, or the prompts themselves where several share a label."""
    rows = results["arms"][UNTREATED].get("prompts") or []
    labels = [row["label"] for row in rows]
    return labels if len(set(labels)) == len(labels) else [row.get("prompt", row["label"]) for row in rows]


_BIAS = (
    "Means over prompts. Brackets are 95 % intervals over other seeds of these prompts. By chance: what a perfectly"
    " fair model would show with as many images, and what 95 % of such runs stay below; allotted groups are dealt"
    " evenly, so that chance adds less there (full obedience: the allocation oracle)."
)
_SIDE = "What a treatment should leave as it was. The row of each figure says what chance alone shows of it."
_CORRECTED = (
    "The same shares with the reader's error taken out, as far as the pictures of known groups that were given tell how"
    " often it is wrong. Brackets are 95 % intervals for what these images and those pictures leave open; beside them"
    " is the share as read. Gaps, changes and the verdict are of shares as they were read. Other arms: results.json."
)


def figure_tables(results: Data) -> list[dict[str, Any]]:
    """A table for each part of the figures that the results hold: title, caption, rows, whether there are floors."""
    parts = (
        *_published(results),
        ("Bias", _BIAS, BIAS),
        *_against(results),
        ("Side effects", _SIDE, SIDE),
        ("Further figures", "By the names they have in results.json.", FURTHER),
    )
    return [
        {"title": title, "caption": caption, "rows": rows, "floors": any(row.floor for row in rows)}
        for title, caption, part in parts
        if (rows := figure_rows(results, part))
    ]


def _published(results: Data) -> list[tuple[str, str, str]]:
    if not (published := results.get("published")):
        return []
    caption = (
        f"The figure of a published evaluation: {published['figure']}. By chance: what a perfectly fair model would"
        " show with as many images, and what 95 % of such runs stay below. Its sources, and what they leave open, stand"
        " under “How this was made”."
    )
    return [(f"Protocol {published['name']}", caption, PUBLISHED)]


def _against(results: Data) -> list[tuple[str, str, str]]:
    if not (found := results.get("amplification")):
        return []
    known = next(iter(found.values()))["labels"]
    caption = (
        f"How far shares exaggerate the reference that was given, over the {len(known)} prompts that it has. Brackets"
        " are 95 % intervals over other seeds of these prompts."
    )
    return [("Against the reference", caption, AGAINST)]


def corrected_table(results: Data, arms: Sequence[str]) -> dict[str, Any] | None:
    """Shares without the reader's error: a row a prompt and group (of two groups the first), a column an arm.

    Args:
        results: Of one experiment.
        arms: Those with a column.
    """
    if not (found := results.get("corrected_shares")):
        return None
    groups = results["groups"]
    title = "Shares" if len(groups) > 2 else f"Share of {groups[0]}"
    rows = []
    for p, label in enumerate(prompt_labels(results)):
        for group in groups if len(groups) > 2 else groups[:1]:
            cells = [_corrected(found.get(arm), results["arms"][arm], p, group) for arm in arms]
            rows.append(Row(f"{label}: {group}" if len(groups) > 2 else label, "", cells, None))
    title = f"{title} without the reader's error"
    return {"title": title, "caption": _CORRECTED, "rows": rows, "floors": False, "kind": "wraps"}


def _corrected(found: Sequence[Data] | None, arm: Data, p: int, group: str) -> Cell:
    value = as_value(found[p].get(group)) if found else None
    if value is None:
        return Cell(MISSING)
    read = as_value(arm["prompts"][p]["shares"].get(group))
    return Cell(number(value.estimate), (interval(value), f"read {MISSING if read is None else number(read.estimate)}"))


def meeting_rows(results: Data, arms: Sequence[str]) -> list[Row]:
    """The gaps of every intersection of axes: a row a gap, a column an arm, and what a fair model would show."""
    rows = []
    for name, meeting in (results.get("intersections") or {}).items():
        for gap, floor in meeting["noise_floor"].items():
            figure = figure_of(gap)
            found = [as_value((meeting["arms"].get(arm) or {}).get(gap)) for arm in arms]
            chance = Cell(number(floor["mean"], figure.form), (f"below {number(floor['upper'], figure.form)}",))
            cells = [Cell(MISSING) if each is None else cell_of(each, None, figure.form) for each in found]
            rows.append(Row(f"{_crossed(name)}: {figure.title}", "", cells, chance))
    return rows


def meeting_charts(results: Data, arms: Sequence[str]) -> list[dict[str, Any]]:
    """The shares of the joint groups, all prompts together: a chart an intersection, a row a joint group."""
    found = []
    for name, meeting in (results.get("intersections") or {}).items():
        rows = []
        for group, target in zip(meeting["groups"], meeting["target_shares"], strict=True):
            values = [as_value(meeting["arms"][arm]["shares"].get(group)) for arm in arms if arm in meeting["arms"]]
            shown: list[Value] = [value for value in values if value is not None]
            label = group.replace(JOINT, ", ")
            rows.append(
                {"label": label, "chart": charts.interval_rows(shown, target), "texts": list(map(spelt, shown))}
            )
        found.append({"title": _crossed(name), "rows": rows})
    return found


def _crossed(name: str) -> str:
    return name.replace(JOINT, _TIMES + " ")


def tested_rows(results: Data, arms: Sequence[str]) -> list[Row]:
    """Whether each prompt's shares changed: a row a prompt, a column an arm that shares untreated's seeds.

    Args:
        results: Of one experiment.
        arms: Those with a column.
    """
    rows = []
    for p, label in enumerate(prompt_labels(results)):
        changes = [(results["arms"][arm].get("prompts") or [{}] * (p + 1))[p].get("change") for arm in arms]
        if any(changes):
            rows.append(Row(label, "", [_tested(each, results) for each in changes], None))
    return rows


def _tested(change: Data | None, results: Data) -> Cell:
    if change is None:
        return Cell(MISSING)
    images = results.get("images_per_prompt")
    holm, alone, less_strict = (
        p_value(change[key]).removeprefix("p ").removeprefix("= ")
        for key in ("p_value_holm", "p_value", "p_value_benjamini_hochberg")
    )
    moved = f"{change['moved']} of {images} moved" if images else f"{change['moved']} moved"
    return Cell(holm, (f"{moved};", f"alone {alone}, BH {less_strict}"))


def needs(results: Data) -> list[dict[str, Any]]:
    """What masks and other methods need and cost: a row each, with its cells by their heading."""
    if not results.get("baselines"):
        return []
    plain = results["arms"][UNTREATED].get("seconds")
    rows = []
    for name in [*(results.get("masks") or []), *results["baselines"]]:
        seconds = results["arms"][name].get("seconds")
        cost = results["baselines"].get(name) or {}
        rows.append(
            {
                "name": name,
                "cells": {
                    "needs": cost.get("needs", "prompts"),
                    "made in": f"{number(cost['seconds'], '.0f')} s" if "seconds" in cost else MISSING,
                    "images drawn for it": str(cost.get("images", MISSING)),
                    "passes forward": str(cost.get("forward", MISSING)),
                    "passes backward": str(cost.get("backward", MISSING)),
                    "drawing, per step": f"{number(seconds / plain)}{_TIMES}" if seconds and plain else MISSING,
                },
                "source": cost.get("source", ""),
            }
        )
    return rows
