"""The report as one self-contained HTML page: nothing is loaded, and it is readable on a phone and in print.

The page is made of plain data and templates that escape whatever they are given: names of masks, prompts and groups
come from anyone's files. Its content policy forbids it to run or load anything.

The first two screens hold the verdict, shares by prompt, one table, images, where the neurons are and provenance.
The rest folds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stereoclinic.evaluation.arms import BALANCED, UNTREATED
from stereoclinic.evaluation.figures.values import as_value, values_of
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.evaluation.wording import number, spelt
from stereoclinic.report import charts, tables
from stereoclinic.report.pictures import Grid
from stereoclinic.statistics.intervals import Interval

Data = Mapping[str, Any]

TEMPLATES = Path(__file__).with_name("templates")

_READER = ("reader_limits", "reader_errors")  # shown above the figures, not among the settings
_FIRST = ("model", "reader", "created", "command")  # settings that are not folded
_LONG = 160  # characters of a setting; longer ones are only in the JSON


def build_page(
    data: Data,
    grids: Sequence[Grid] = (),
    masks: Mapping[str, Data] | None = None,
    lean: Data | None = None,
) -> str:
    """The whole page.

    Args:
        data: As in results.json. Figures that are absent are left out; unknown ones are shown by key.
        grids: Images of each experiment, in the order of `data["experiments"]`; none is fine.
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
    experiments, provenance = data["experiments"], data["provenance"]
    settings = _settings(provenance)
    return templates.get_template("report.html").render(
        axis=experiments[0]["axis"],
        model=provenance.get("model", "the model"),
        reader=_reader(provenance),
        sections=[_section(results, i, grids[i] if i < len(grids) else None) for i, results in enumerate(experiments)],
        masks=[{"name": name, **_mask(summary)} for name, summary in (masks or {}).items()],
        lean=None if lean is None else _lean(lean),
        first=[row for heading, rows in settings if not heading for row in rows if row[0].replace(" ", "_") in _FIRST],
        provenance=settings,
        everything=json.dumps(provenance, indent=2, ensure_ascii=False, default=str),
    )


def _section(results: Data, i: int, grid: Grid | None) -> dict[str, Any]:
    masks = results.get("masks") or []
    drawn = [name for name in (UNTREATED, *(masks or [BALANCED])) if name in results["arms"]]
    return {
        "id": f"experiment-{i}",
        "name": f"Guidance {results['guidance']:g}" if "guidance" in results else f"Experiment {i + 1}",
        "verdicts": verdicts(results),
        "index": "parity gap " + ", ".join(f"{name} {_gap(results, name)}" for name in drawn),
        "facts": _facts(results),
        "legend": [(charts.mark(j), name) for j, name in enumerate(drawn)],
        "shares": _share_charts(results, drawn),
        "scale": charts.share_scale(),
        "masks": masks,
        "main": tables.main_table(results),
        "folded": [
            *tables.corrected_table(results, drawn),
            *tables.tested_table(results, drawn[1:]),
            *tables.further_tables(results),
            *tables.meeting_table(results, drawn),
        ],
        "meeting_charts": tables.meeting_charts(results, drawn),
        "needs": tables.needs(results),
        "grid": grid,
    }


def _gap(results: Data, arm: str) -> str:
    return number(values_of(results, arm)["parity_gap"].estimate)


def _facts(results: Data) -> str:
    prompts, images = len(results.get("labels") or []), results.get("images_per_prompt")
    parts = [f"{prompts} prompts" + (f" of {images} images each" if images else "")] if prompts else []
    if seeds := results.get("seeds"):
        parts.append(f"seeds {seeds[0]} to {seeds[1]}")
    if "steps" in results:
        parts.append(f"{results['steps']} steps")
    if left_out := results.get("left_out"):
        parts.append(f"blank images: {left_out['pictures']} (their seeds are left out)")
    target = results.get("target_shares") or []
    if len(set(target)) > 1:
        aims = (f"{group} {number(share)}" for group, share in zip(results["groups"], target, strict=False))
        parts.append(f"target shares: {', '.join(aims)}")
    return "; ".join(parts)


def _share_charts(results: Data, arms: list[str]) -> list[dict[str, Any]]:
    """Shares of each group by prompt."""
    groups = results["groups"]
    targets = results.get("target_shares") or [1 / len(groups)] * len(groups)
    upper = (results.get("noise_floor_one_prompt") or {}).get("upper")
    found = []
    for group, target in zip(tables.shown_groups(results), targets, strict=False):
        # With two groups a prompt's gap is the distance of its share from the target; with more it is not.
        band = charts.Band(target - upper, target + upper) if upper is not None and len(groups) == 2 else None
        rows = []
        for p, label in enumerate(tables.prompt_labels(results)):
            values = _shares(results, arms, p, group)
            chart, texts = charts.interval_rows(values, target, band), [spelt(value) for value in values]
            rows += [{"label": label, "chart": chart, "texts": texts}] if values else []
        found += [{"group": group, "target": number(target), "band": band is not None, "rows": rows}] if rows else []
    return found


def _shares(results: Data, arms: list[str], p: int, group: str) -> list[Interval]:
    found = (as_value(results["arms"][name]["prompts"][p]["shares"].get(group)) for name in arms)
    return [value for value in found if value is not None]


def _mask(summary: Data) -> dict[str, Any]:
    """How much of each kind, block and timestep a mask damps, in percent of the neurons there."""
    total = summary["total"]
    parts = [
        (title, [(row["name"], row["damping"] / row["neurons"], row) for row in summary[key]])
        for title, key in (("by kind of layer", "kinds"), ("by stream of tokens", "streams"), ("by block", "blocks"))
    ]
    bins = [
        (f"{row['from']:.0f} to {row['to']:.0f}", row["damping"] / total["neurons"], {**total, **row})
        for row in summary["bins"]
    ]
    parts.insert(1, ("by timestep, noise first", bins))
    top = max((share for _, rows in parts for _, share, _ in rows), default=0.0)
    groups = f", by the group an image is allotted to ({', '.join(summary['groups'])})" if summary["groups"] else ""
    return {
        "facts": f"{total['damped']} of {total['neurons']} neurons damped, {summary['chosen']},"
        f" damped toward {summary['root']}{groups}",
        "parts": [{"title": title, "rows": [_bar(*row, top) for row in rows]} for title, rows in parts if rows],
    }


def _bar(name: str, share: float, row: Data, top: float) -> dict[str, Any]:
    count = f"{row['damped']} of {row['neurons']}"
    return {"name": name, "bar": charts.bar(share, top), "text": number(100 * share, ".1f") + " %", "count": count}


def _lean(summary: Data) -> dict[str, Any]:
    """Small multiples: one panel for each label, one line for each group; of two groups the first alone."""
    leans = [summary, *summary["others"]]
    cells = [cell["lean"] for each in leans for row in each["rows"] for cell in row["curve"]]
    reach = max([1.0, *(abs(value) for value in cells if value is not None)])
    panels = []
    for p, row in enumerate(summary["rows"]):
        curves = [(each["toward"], each["rows"][p]["curve"]) for each in leans]
        lines = [
            charts.Curve(toward, [cell["lean"] for cell in curve], [cell["stderr"] for cell in curve])
            for toward, curve in curves
        ]
        mean = number(row["mean"]["lean"], "+.2f") if len(leans) == 1 else ""
        panels.append({"label": row["label"], "mean": mean, "chart": charts.curves(lines, summary["timesteps"], reach)})
    return {
        "toward": summary["toward"],
        "reach": number(reach, ".2g"),
        "panels": panels,
        "legend": [(charts.dash(i), each["toward"]) for i, each in enumerate(leans)] if len(leans) > 1 else [],
    }


def _reader(provenance: Data) -> dict[str, Any]:
    """The reader's name, its limits, and how often it is known to be wrong."""
    limits, errors = (value if isinstance(value := provenance.get(key), list) else [] for key in _READER)
    return {"name": provenance.get("reader", ""), "limits": limits, "errors": errors}


def _settings(provenance: Data) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings and the settings below them: of the run, of each mask, and of whatever else is a table."""
    nested = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    masks = nested.pop("masks", {})
    run = {key: value for key, value in provenance.items() if not isinstance(value, Mapping) and key not in _READER}
    named = {"": run, **{f"mask {name}": record for name, record in masks.items()}, **nested}
    return [(heading, _flat(part)) for heading, part in named.items() if isinstance(part, Mapping) and part]


def _flat(settings: Data) -> list[tuple[str, str]]:
    """Names and values, what is nested by its dotted name."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            found += [(f"{name}.{below}", text) for below, text in _flat(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((name, text if len(text) <= _LONG or key == "command" else "see the JSON below"))
    return found
