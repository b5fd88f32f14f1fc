"""The report as one self-contained HTML page: everything inline, nothing loaded, readable on a phone and in print.

The page is made of plain data and templates that escape whatever they are given; names of masks, prompts and groups
come from files of anyone's making. The page also forbids itself, by its own content policy, to run or load anything.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stereoclinic.evaluation.arms import BALANCED, UNTREATED
from stereoclinic.evaluation.figures.registry import Value, as_value, values_of
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.evaluation.wording import number, spelt
from stereoclinic.report import charts
from stereoclinic.report.pictures import Grid
from stereoclinic.report.tables import (
    corrected_table,
    figure_tables,
    meeting_charts,
    meeting_rows,
    needs,
    prompt_labels,
    tested_rows,
)

Data = Mapping[str, Any]

TEMPLATES = Path(__file__).with_name("templates")

_READER = ("reader_limits", "reader_errors")  # said above all figures, not among the settings
_LONG = 160  # characters of a setting that is printed among the others; longer ones are in the JSON below them


def build_page(
    data: Data,
    grids: Sequence[Grid] = (),
    masks: Mapping[str, Data] | None = None,
    lean: Data | None = None,
) -> str:
    """The whole page.

    Args:
        data: As in results.json. Figures that are absent are left out; figures that are not known are shown by key.
        grids: Pictures of each experiment, in the order of `data["experiments"]`; none is fine.
        masks: Name -> `summary.mask_summary`, of the masks whose neurons are drawn.
        lean: `summary.lean_summary` of the relevance that the masks were chosen from.
    """
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    experiments = data["experiments"]
    return templates.get_template("report.html").render(
        axis=experiments[0]["axis"],
        model=data["provenance"].get("model", "the model"),
        reader=_reader(data["provenance"]),
        sections=[_section(results, i, grids[i] if i < len(grids) else None) for i, results in enumerate(experiments)],
        masks=[{"name": name, **_mask(summary)} for name, summary in (masks or {}).items()],
        lean=None if lean is None else _lean(lean),
        provenance=_settings(data["provenance"]),
        everything=json.dumps(data["provenance"], indent=2, ensure_ascii=False, default=str),
    )


def _section(results: Data, i: int, grid: Grid | None) -> dict[str, Any]:
    drawn = [UNTREATED, *(results.get("masks") or [BALANCED])]
    drawn = [name for name in drawn if name in results["arms"]]
    return {
        "id": f"experiment-{i}",
        "name": f"Guidance {results['guidance']:g}" if "guidance" in results else f"Experiment {i + 1}",
        "verdicts": verdicts(results),
        "index": "parity gap " + ", ".join(f"{name} {_gap(results, name)}" for name in drawn),
        "facts": _facts(results),
        "legend": [(charts.mark(j), name) for j, name in enumerate(drawn)],
        "shares": _share_charts(results, drawn),
        "scale": charts.share_scale(),
        "shown": [{"name": name, "judged": False} for name in drawn],
        "corrected": corrected_table(results, drawn),
        "tested": {
            "rows": tested_rows(results, drawn[1:]),
            "floors": False,
            "caption": _TESTED,
            "kind": "wraps",
        },
        "meetings": {"rows": meeting_rows(results, drawn), "floors": True, "caption": _MEETINGS},
        "meeting_charts": meeting_charts(results, drawn),
        "needs": needs(results),
        "arms": [{"name": name, "judged": name in (results.get("masks") or [])} for name in results["arms"]],
        "tables": figure_tables(results),
        "grid": grid,
    }


def _gap(results: Data, arm: str) -> str:
    return number(values_of(results, arm)["parity_gap"].estimate)


_TESTED = (
    "p-values of no change of the shares of a prompt on the same seeds, each by an exact test. The large one is"
    " corrected for the number of prompts (Holm): below 0.05 the change of that prompt is told, whichever prompt one"
    " looks at. Alone: as if it were the only prompt. BH (Benjamini-Hochberg): below 0.05, at most that share of what"
    " is found is expected to be false. Moved: images that are read as another group than before."
)
_MEETINGS = (
    "Gaps of joint groups, to the product of the targets of their axes: a gap can be hidden on each axis alone."
    " Brackets are 95 % intervals. By chance: what a perfectly fair model would show. Other arms: results.json."
)


def _facts(results: Data) -> str:
    prompts, images = len(results.get("labels") or []), results.get("images_per_prompt")
    parts = [f"{prompts} prompts" + (f" of {images} images each" if images else "")] if prompts else []
    if seeds := results.get("seeds"):
        parts.append(f"seeds {seeds[0]} to {seeds[1]}")
    if "steps" in results:
        parts.append(f"{results['steps']} steps")
    if left_out := results.get("left_out"):
        parts.append(f"pictures that showed nothing: {left_out['pictures']} (their seeds are left out)")
    target = results.get("target_shares") or []
    if target:
        aims = (f"{group} {number(share)}" for group, share in zip(results["groups"], target, strict=False))
        parts.append(f"shares aimed at: {', '.join(aims)}")
    return "; ".join(parts)


def _share_charts(results: Data, arms: list[str]) -> list[dict[str, Any]]:
    """Shares of each group by prompt; of two groups the first alone, for the second mirrors it."""
    groups = results["groups"]
    target = results.get("target_shares") or [1 / len(groups)] * len(groups)
    upper = (results.get("noise_floor_one_prompt") or {}).get("upper")
    labels = prompt_labels(results)
    found = []
    for k, group in enumerate(groups if len(groups) > 2 else groups[:1]):
        # With two groups a prompt's gap is how far its share lies from the target; with more no one share tells it.
        band = charts.Band(target[k] - upper, target[k] + upper) if upper is not None and len(groups) == 2 else None
        found.append(
            {
                "group": group,
                "target": number(target[k]),
                "band": band is not None,
                "rows": [
                    {
                        "label": label,
                        "chart": charts.interval_rows(values, target[k], band),
                        "texts": map(spelt, values),
                    }
                    for p, label in enumerate(labels)
                    if (values := _shares(results, arms, p, group))
                ],
            }
        )
    return [each for each in found if each["rows"]]


def _shares(results: Data, arms: list[str], p: int, group: str) -> list[Value]:
    found = (as_value(results["arms"][name]["prompts"][p]["shares"].get(group)) for name in arms)
    return [value for value in found if value is not None]


def _mask(summary: Data) -> dict[str, Any]:
    """How much of each kind, block and timestep a mask damps away, in percent of the neurons there."""
    total = summary["total"]
    selection = summary["metadata"].get("selection") or {}
    parts = [
        ("by kind of layer", [(row["name"], row["damping"] / row["neurons"], row) for row in summary["kinds"]]),
        ("by stream of tokens", [(row["name"], row["damping"] / row["neurons"], row) for row in summary["streams"]]),
        ("by block", [(row["name"], row["damping"] / row["neurons"], row) for row in summary["blocks"]]),
        (
            "by timestep, noise first",
            [
                (f"{row['from']:.0f} to {row['to']:.0f}", row["damping"] / total["neurons"], {**total, **row})
                for row in summary["bins"]
            ],
        ),
    ]
    top = max((share for _, rows in parts for _, share, _ in rows), default=0.0)
    return {
        "facts": f"{total['damped']} of {total['neurons']} neurons damped, chosen by"
        f" {selection.get('method', 'hand')}, damped toward {summary['root']}"
        + (f", by the group an image is allotted to ({', '.join(summary['groups'])})" if summary["groups"] else ""),
        "parts": [
            {
                "title": title,
                "rows": [
                    {
                        "name": name,
                        "bar": charts.bar(share, top),
                        "text": number(100 * share, ".1f") + " %",
                        "count": f"{row['damped']} of {row['neurons']}",
                    }
                    for name, share, row in rows
                ],
            }
            for title, rows in parts
            if rows
        ],
    }


def _lean(summary: Data) -> dict[str, Any]:
    """Small multiples: one panel a label, one line a group; of two groups the first alone."""
    leans = [summary, *summary["others"]]
    cells = [cell["lean"] for each in leans for row in each["rows"] for cell in row["curve"]]
    reach = max(1.0, *(abs(value) for value in cells if value is not None), 1.0)
    panels = []
    for p, row in enumerate(summary["rows"]):
        lines = [
            charts.Curve(
                each["toward"],
                [cell["lean"] for cell in each["rows"][p]["curve"]],
                [cell["stderr"] for cell in each["rows"][p]["curve"]],
            )
            for each in leans
        ]
        panels.append(
            {
                "label": row["label"],
                "mean": number(row["mean"]["lean"], "+.2f") if len(leans) == 1 else "",
                "chart": charts.curves(lines, summary["timesteps"], reach),
            }
        )
    return {
        "toward": summary["toward"],
        "reach": number(reach, ".2g"),
        "panels": panels,
        "legend": [(charts.dash(i), each["toward"]) for i, each in enumerate(leans)] if len(leans) > 1 else [],
    }


def _reader(provenance: Data) -> dict[str, Any]:
    """What the reader says of itself: its name, what it cannot tell, and how often it is known to be wrong."""
    limits, errors = (value if isinstance(value := provenance.get(key), list) else [] for key in _READER)
    return {"name": provenance.get("reader", ""), "limits": limits, "errors": errors}


def _settings(provenance: Data) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings and the settings below them: those of the run, of each mask, and of whatever else is a table."""
    tables = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    masks = tables.pop("masks", {})
    run = {key: value for key, value in provenance.items() if not isinstance(value, Mapping) and key not in _READER}
    named = {"": run, **{f"mask {name}": each for name, each in masks.items()}, **tables}
    return [(heading, _flat(each)) for heading, each in named.items() if isinstance(each, Mapping) and each]


def _flat(settings: Data) -> list[tuple[str, str]]:
    """Names and values, what is nested by its dotted name."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            found += [(f"{name}.{below}", text) for below, text in _flat(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((name, text if len(text) <= _LONG or key == "command" else "see below"))
    return found
