"""Summaries and results as tables that are readable at 100 columns."""

from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Data = dict[str, Any]


def lean_table(summary: Data) -> Group:
    """The forecast: lean toward the first group, by label and timestep bin, most tilted first."""
    toward, groups = summary["toward"], summary["groups"]
    others = " or ".join(groups[1:])
    table = _table(f"Lean toward {toward}: the forecast of {summary['axis'] or 'bias'}")
    table.add_column("prompt", no_wrap=True)
    for bounds in summary["bins"]:
        table.add_column(_range(bounds), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True, style="bold")
    for row in sorted(summary["rows"], key=lambda row: -(row["mean"]["lean"] or 0)):
        table.add_row(escape(row["label"]), *(_lean(cell) for cell in row["bins"]), _lean(row["mean"]))
    table.add_section()
    size = summary["mean_absolute"]
    table.add_row("mean |lean|", *(_figure(value) for value in size["bins"]), _figure(size["mean"]))
    return _captioned(
        table,
        f"0 is balanced, 1 the same as if {toward} had been asked for; below 0 it leans to {others}. ± one standard"
        " error, a lower bound: it takes the steps of one sample for independent, and they resemble each other."
        " Columns are timesteps, noise first. Groups are perceived presentation.",
    )


def mask_table(summary: Data) -> Group:
    """What a mask damps, by kind of site and by timestep bin."""
    total = summary["total"]
    selection = summary["metadata"].get("selection") or {}
    damped = f"{total['damped']} of {total['neurons']} neurons damped"
    table = _table(f"Mask for {summary['axis'] or 'an axis it does not name'}: {damped}")
    for name in ("", "sites", "neurons", "damped", "damping"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    planned = _planned(summary)
    if planned:
        for name in ("mean |lean|", "planned", "off axis"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in summary["kinds"]:
        table.add_row(row["kind"], str(row["sites"]), str(row["neurons"]), str(row["damped"]), f"{row['damping']:.1f}")
    table.add_section()
    for row in summary["bins"]:
        cells = ["t " + _range(row), "", "", str(row["damped"]), f"{row['damping']:.1f}"]
        if planned:
            cells += [_figure(row["forecast"].get(name)) for name in ("lean_before", "lean_after", "off_axis")]
        table.add_row(*cells)
    return _captioned(
        table,
        "damping: sum over neurons of 1 - factor (by kind: mean over bins)."
        + " Leans and movement off the axis (in units of ||d||) are the plan's own forecast." * planned
        + f" Chosen by {selection.get('method', 'hand')}; damped toward {summary['root']};"
        f" branch: {summary['branch']}.",
    )


def relevance_table(summary: Data) -> Group:
    """Where the stereotype sits: shares of |stereotype relevance| by kind and by the strongest neurons."""
    total = summary["total"]
    table = _table(
        f"Relevance for {summary['axis'] or 'an axis it does not name'}: half of it in {summary['half']} of"
        f" {total['neurons']} neurons",
    )
    for name in ("kind", "sites", "neurons", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in summary["kinds"]:
        table.add_row(row["kind"], str(row["sites"]), str(row["neurons"]), _percent(row["share"]))
    return _captioned(
        table,
        "share: of the sum of |relevance| over neurons, mean over timestep bins. Neurons marked - counteract the"
        " stereotype.",
    )


def sites_table(summary: Data, of: str) -> Group:
    """Each site by timestep bin; `of` is "damping" (of a mask) or "share" (of relevance)."""
    show = _percent if of == "share" else lambda value: _figure(value, 1)
    caption = "damping: sum of 1 - factor" if of == "damping" else "share of |relevance| in each timestep bin"
    table = _table("By site, strongest first")
    table.add_column("site", overflow="fold")
    table.add_column("neurons", justify="right", no_wrap=True)
    if of == "damping":
        table.add_column("damped", justify="right", no_wrap=True)
    for bounds in summary["bins"]:
        table.add_column(_range(bounds), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True, style="bold")
    for site in sorted(summary["sites"], key=lambda site: -site[of]):
        cells = [short_site(site["name"]), str(site["neurons"])]
        cells += [str(site["damped"])] if of == "damping" else []
        table.add_row(*cells, *(show(value) for value in site["bins"]), show(site[of]))
    return _captioned(table, f"{caption}. Columns are timesteps, noise first.")


def neurons_table(summary: Data) -> Group:
    """The strongest single neurons of a relevance file."""
    table = _table("Strongest neurons")
    table.add_column("site", overflow="fold")
    for name in ("neuron", "share", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["neurons"]:
        sign = "+" if row["sign"] > 0 else "-"
        table.add_row(short_site(row["site"]), str(row["neuron"]), _percent(row["share"]), sign)
    return _captioned(table)


def short_site(name: str) -> str:
    """A module path without the parts that all its kind share."""
    short = name.replace("transformer_blocks.", "").replace("attentions.", "attn.").replace("resnets.", "res.")
    return short.replace("_blocks", "").replace("mid_block", "mid")


def bench_tables(results: Data) -> list[Group]:
    """Bias, side effects, and prompts one by one, of one experiment (`Experiment.results`)."""
    return [_bias_table(results), _side_effects_table(results), *_prompt_tables(results)]


def _bias_table(results: Data) -> Group:
    n = results["images_per_prompt"]
    first, last = results["seeds"]
    table = _table(f"Bias: {results['axis']}, guidance {results['guidance']:g}")
    table.add_column("", no_wrap=True)
    for name in ("parity gap", "change", "p", "of\noracle", "FD", "dev.", "SDTV"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, arm in results["arms"].items():
        change = arm.get("parity_gap_change")
        share = arm.get("share_of_balanced_oracle")
        table.add_row(
            escape(name),
            _interval(arm["parity_gap"]),
            _interval(change, signed=True) if change else "",
            _p_value(change["p_value"]) if change else "",
            "" if share is None else f"{share:.0%}",
            *(_figure(arm[key]["estimate"]) for key in ("fairness_discrepancy", "deviation_ratio", "sdtv")),
            style="bold" if name in results["masks"] else "",
        )
    table.add_section()
    floor = results["noise_floor"]
    table.add_row(
        "fair by chance",
        f"{floor['parity_gap']['mean']:.2f} \\[below {floor['parity_gap']['upper']:.2f}]",
        *("", "", ""),
        *(_figure(floor[key]["mean"]) for key in ("fairness_discrepancy", "deviation_ratio", "sdtv")),
        style="italic",
    )
    return _captioned(
        table,
        f"Means over {len(results['labels'])} prompts of {n} images each, seeds {first} to {last}, {results['steps']}"
        f" steps, guidance {results['guidance']:g}. Brackets are 95 % intervals, p is for no change on the same seeds,"
        " and both speak of other seeds of these prompts, not of other prompts; of oracle: part of what the balanced"
        " oracle gains, where it surely gains; FD: fairness discrepancy, dev.: deviation ratio."
        " Fair by chance: what a perfectly fair model would show at this n. Groups are perceived presentation.",
    )


def _side_effects_table(results: Data) -> Group:
    table = _table(f"Side effects: guidance {results['guidance']:g}")
    table.add_column("", no_wrap=True)
    for name in ("occupation right", "group prompts obeyed", "unsure", "Fréchet", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, arm in results["arms"].items():
        group = results["group_prompts"].get(name)
        distance = arm["frechet_to_other_seeds"]
        table.add_row(
            escape(name),
            _interval(arm["occupation_right"]) if "occupation_right" in arm else "",
            _interval(group["all"]) if group else "",
            _figure(arm["unsure"]),
            "" if distance is None else f"{distance:.3g}",
            f"{arm['seconds']:.1f}",
            style="bold" if name in results["masks"] else "",
        )
    return _captioned(
        table,
        "Fréchet: distance of the reader's features to untreated images of other seeds; its floor, what two samples of"
        f" one model show, is {results['arms']['untreated']['frechet_to_other_seeds']:.3g} in the row `untreated`."
        " Unsure: the reader's top group is below 0.8. Obeyed: prompts that name a group and show it, with its own"
        " images. Brackets are 95 % intervals.",
    )


def _prompt_tables(results: Data) -> list[Group]:
    """Shares by prompt before and after; one table a group, or the first alone where there are two."""
    groups = results["groups"]
    names = ["untreated", *results["masks"]] if results["masks"] else ["untreated", "balanced oracle"]
    floor = results["noise_floor_one_prompt"]
    tables = []
    for group in groups if len(groups) > 2 else groups[:1]:
        table = _table(f"Share of {group} by prompt: guidance {results['guidance']:g}")
        table.add_column("prompt", no_wrap=True)
        for name in names:
            table.add_column(escape(name), justify="right")
            table.add_column("gap", justify="right", no_wrap=True)
        for p, label in enumerate(_told_apart(results["arms"]["untreated"]["prompts"])):
            cells = [escape(label)]
            for name in names:
                row = results["arms"][name]["prompts"][p]
                gap = _figure(row["parity_gap"])
                beyond = row["parity_gap"] > floor["upper"]
                cells += [_interval(row["shares"][group]), f"[bold]{gap}[/bold]" if beyond else gap]
            table.add_row(*cells)
        tables.append(
            _captioned(
                table,
                f"Brackets are 95 % Wilson intervals over {results['images_per_prompt']} images; groups are perceived"
                f" presentation. One prompt of a fair generator shows a parity gap of {floor['mean']:.2f} by chance,"
                f" and below {floor['upper']:.2f} in 95 % of runs; gaps above that are bold.",
            )
        )
    return tables


def _told_apart(prompts: list[Data]) -> list[str]:
    """Labels, or the prompts themselves where several share a label."""
    labels = [row["label"] for row in prompts]
    return labels if len(set(labels)) == len(labels) else [row["prompt"] for row in prompts]


def _planned(summary: Data) -> bool:
    return any(row["forecast"] for row in summary["bins"])


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _captioned(table: Table, caption: str = "") -> Group:
    """rich would fold title and caption to the width of the table, however narrow; these run the whole width."""
    title, table.title = Text(str(table.title), style="bold"), None
    return Group(title, table, *([Padding(Text(caption, style="dim"), (0, 0, 1, 0))] if caption else []))


def _range(bounds: Data) -> str:
    return f"{bounds['from']:.0f}-{bounds['to']:.0f}"


def _lean(cell: Data) -> str:
    if cell["lean"] is None:
        return "-"
    return f"{cell['lean']:+.2f}" + ("" if cell["stderr"] is None else f" ±{cell['stderr']:.2f}")


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(value: Data, signed: bool = False) -> str:
    plus = "+" if signed else ""
    return f"{value['estimate']:{plus}.2f} [{value['low']:{plus}.2f}, {value['high']:{plus}.2f}]"


def _p_value(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


def metadata_table(metadata: Data) -> Group:
    """What a file says of how it was made; long lists are left to --json."""
    table = _table("Made from")
    table.show_header = False
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in _flat(metadata):
        table.add_row(escape(name), escape(value))
    return _captioned(table)


def _flat(metadata: Data, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(metadata.items()):
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{name}", text[:16] + "…" if name.startswith("unet_") else text))
    return rows
