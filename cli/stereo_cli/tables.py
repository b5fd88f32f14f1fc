"""Summaries and results as tables: readable at 100 columns, and whole columns of them where there is less room."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from stereoclinic.io.text import printable

Data = dict[str, Any]


def lean_table(summary: Data) -> Group:
    """The forecast, one table a group, or the first alone where there are two."""
    return Group(*(_lean_table({**summary, **leans}) for leans in (summary, *summary["others"])))


def _lean_table(summary: Data) -> Group:
    """Lean toward one group, by label, at a few of the measured timesteps; most tilted first."""
    toward = summary["toward"]
    others = " or ".join(group for group in summary["groups"] if group != toward)
    steps = summary["timesteps"]
    # Four figures with their errors, and the mean, are what 80 columns hold.
    shown = sorted({round(i * (len(steps) - 1) / 3) for i in range(4)}) if steps else []
    table = new_table(f"Lean toward {toward} along the trajectory: the forecast of {summary['axis'] or 'bias'}")
    table.add_column("prompt")
    for m in shown:
        table.add_column(f"t {steps[m]:.0f}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    for row in sorted(summary["rows"], key=lambda row: -(row["mean"]["lean"] or 0)):
        table.add_row(row["label"], *(_lean(row["curve"][m]) for m in shown), _lean(row["mean"]))
    table.add_section()
    size = summary["mean_absolute"]
    table.add_row("mean |lean|", *(figure(size["curve"][m]) for m in shown), figure(size["mean"]))
    counts = sorted(set(summary["samples"].values())) or [0]
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return captioned(
        table,
        f"0 is balanced, 1 the same as if {toward} had been asked for; below 0 it leans to {others}. {samples} samples"
        f" a prompt; {len(shown)} of {len(steps)} measured timesteps, noise first (all of them: --json); ± one standard"
        " error over samples, for the mean an upper bound. Groups are perceived presentation.",
        keep=[-1],
    )


def mask_table(summary: Data) -> Group:
    """What a mask damps, by kind of site and by timestep bin."""
    total = summary["total"]
    selection = summary["metadata"].get("selection") or {}
    damped = f"{total['damped']} of {total['neurons']} neurons damped"
    table = new_table(f"Mask for {summary['axis'] or 'an axis it does not name'}: {damped}")
    for name in ("", "sites", "neurons", "damped", "damping"):
        table.add_column(name, justify="right" if name else "left")
    planned = _planned(summary)
    if planned:
        decomposed = summary["metadata"].get("target", "lean")
        stepwise = selection.get("method") == "stepwise"
        for name in ("|lean -\ntarget|" if stepwise else f"mean\n|{decomposed}|", "planned", "off\naxis"):
            table.add_column(name, justify="right")
    for rows in (summary["kinds"], summary["streams"]):
        for row in rows:
            counts = (str(row[name]) for name in ("sites", "neurons", "damped"))
            table.add_row(row["name"], *counts, f"{row['damping']:.1f}")
        table.add_section()
    for row in summary["bins"]:
        cells = ["t " + timesteps(row), "", "", str(row["damped"]), f"{row['damping']:.1f}"]
        if planned:
            cells += [figure(row["forecast"].get(name)) for name in ("lean_before", "lean_after", "off_axis")]
        table.add_row(*cells)
    return captioned(
        table,
        "damping: sum over neurons of 1 - factor (by kind and stream: mean over bins)."
        + f" Damping differs by the group that an image is allotted to ({', '.join(summary['groups'])}): counted is"
        " what any of them damps, and damping is their mean."
        * bool(summary["groups"])
        + " Leans and movement off the axis (in units of ||d||) are the plan's own forecast." * planned
        + f" Chosen by {selection.get('method', 'hand')}; damped toward {summary['root']};"
        f" branch: {summary['branch']}.",
    )


def bench_tables(results: Data) -> list[Group]:
    """Bias, side effects, and prompts one by one, of one experiment (`Experiment.results`)."""
    published = [_published_table(results["published"])] if "published" in results else []
    others = [_baselines_table(results)] if "baselines" in results else []
    against = [_amplification_table(results)] if "amplification" in results else []
    return [
        *published, _bias_table(results), *against, _side_effects_table(results), *others, *_prompt_tables(results),
    ]  # fmt: skip


def _amplification_table(results: Data) -> Group:
    """How far each arm exaggerates the reference."""
    table = new_table(f"Against the reference: guidance {results['guidance']:g}")
    for name in ("", "slope", "excess gap", "distance"):
        table.add_column(name, justify="right" if name else "left")
    for name, arm in results["amplification"].items():
        table.add_row(name, interval(arm["slope"]), interval(arm["excess"], True), interval(arm["distance"]))
    known = next(iter(results["amplification"].values()))["labels"]
    return captioned(
        table,
        "Slope of the generated tilt on the reference's: 1 as the reference, above 1 exaggerated, below 0 the other way"
        " round. Excess gap: the parity gap beyond the reference's own. Distance: share of images that would have to"
        f" change group. Over {len(known)} prompts; brackets are 95 % intervals.",
    )


def _baselines_table(results: Data) -> Group:
    """What other methods need and cost, beside the masks."""
    table = new_table(f"Other methods: guidance {results['guidance']:g}")
    for name in ("", "needs", "made in", "images", "passes", "drawing"):
        left = name in ("", "needs")
        table.add_column(name, justify="left" if left else "right", overflow="fold" if name == "needs" else "ellipsis")
    plain = results["arms"]["untreated"]["seconds"]
    for name in [*results["masks"], *results["baselines"]]:
        time = f"{results['arms'][name]['seconds'] / plain:.2f} x" if plain else "-"
        if (cost := results["baselines"].get(name)) is None:
            table.add_row(name, "prompts", "", "", "", time)
            continue
        passes = f"{cost['forward']} + {cost['backward']}"
        table.add_row(name, cost["needs"], f"{cost['seconds']:.0f} s", str(cost["images"]), passes, time)
    return captioned(
        table,
        "Made on seeds of their own, at their default settings. Passes: samples through the denoiser, forward +"
        " backward. Drawing: seconds over the untreated model's, in one run. Prompts that name a group are drawn"
        " treated, as they are by the masks. Sources stand in results.json.",
    )


def _published_table(published: Data) -> Group:
    """The figure of a published protocol, arm by arm."""
    table = new_table(f"Protocol {published['name']}: {published['figure']}")
    table.add_column("")
    table.add_column("figure", justify="right")
    for name, value in published["arms"].items():
        table.add_row(name, figure(value, 3))
    floor = published["noise_floor"]
    return captioned(
        table,
        f"A perfectly fair model shows {floor['mean']:.3f} by chance, and below {floor['upper']:.3f} in 95 % of runs."
        " What the sources leave open stands in results.json, provenance.protocol.left_open.",
    )


def _bias_table(results: Data) -> Group:
    n = results["images_per_prompt"]
    first, last = results["seeds"]
    table = new_table(f"Bias: {results['axis']}, guidance {results['guidance']:g}")
    table.add_column("")
    for name in ("parity gap", "change", "p", "of\noracle", "FD", "dev.", "SDTV"):
        table.add_column(name, justify="right")
    for name, arm in results["arms"].items():
        change = arm.get("parity_gap_change")
        share = arm.get("share_of_balanced_oracle")
        table.add_row(
            name,
            interval(arm["parity_gap"]),
            interval(change, signed=True) if change else "",
            p_value(change["p_value"]) if change else "",
            "" if share is None else f"{share:.0%}",
            *(figure(arm[key]["estimate"]) for key in ("fairness_discrepancy", "deviation_ratio", "sdtv")),
            style="bold" if name in results["masks"] else "",
        )
    table.add_section()
    floor = results["noise_floor"]
    table.add_row(
        "fair by chance",
        f"{floor['parity_gap']['mean']:.2f} [below {floor['parity_gap']['upper']:.2f}]",
        *("", "", ""),
        *(figure(floor[key]["mean"]) for key in ("fairness_discrepancy", "deviation_ratio", "sdtv")),
        style="italic",
    )
    return captioned(
        table,
        f"Means over {len(results['labels'])} prompts of {n} images each, seeds {first} to {last}, {results['steps']}"
        f" steps, guidance {results['guidance']:g}. Brackets are 95 % intervals, p is for no change on the same seeds,"
        " and both speak of other seeds of these prompts, not of other prompts; of oracle: part of what the balanced"
        " oracle gains, where it surely gains; FD: fairness discrepancy, dev.: deviation ratio."
        " Fair by chance: what a perfectly fair model would show at this n"
        + (
            "; allotted groups are dealt evenly, so there the row allocation oracle is what full obedience leaves"
            if any("allotment_obeyed" in results["arms"][name] for name in results["masks"])
            else ""
        )
        + ". Groups are perceived presentation.",
    )


def _side_effects_table(results: Data) -> Group:
    table = new_table(f"Side effects: guidance {results['guidance']:g}")
    table.add_column("")
    others = list(results["arms"]["other seeds"].get("drift", {}))
    drift = [f"drift\n{' / '.join(others)}"] if others else []
    for name in ("occupation\nright", "group prompts\nobeyed", "unsure", "Fréchet", "within\ngroups", *drift):
        table.add_column(name, justify="right")
    for name, arm in results["arms"].items():
        group = results["group_prompts"].get(name)
        distance = arm["frechet_to_other_seeds"]
        table.add_row(
            name,
            interval(arm["occupation_right"]) if "occupation_right" in arm else "",
            interval(group["all"]) if group else "",
            figure(arm["unsure"]),
            "" if distance is None else f"{distance:.2g}",
            _within(arm),
            *([" / ".join(figure(arm["drift"][each]) for each in others) if "drift" in arm else ""] if others else []),
            style="bold" if name in results["masks"] else "",
        )
    gate = results["gate"]
    seconds = ", ".join(f"{name} {figure(arm['seconds'], 1)}" for name, arm in results["arms"].items())
    return captioned(
        table,
        f"Fréchet: distance of {_features(results)} to untreated images of other seeds; its floor, what two samples of"
        f" one model show, is {results['arms']['untreated']['frechet_to_other_seeds']:.2g} in the row `untreated`."
        " Within groups: the same to untreated images of prompts that name the same groups, over what two samples of"
        " these show: what the change of groups alone does not account for; 1 is nothing. Unsure: the reader's top"
        " group is below 0.8. Obeyed: prompts that name a group and show it, with its own images, treated as if there"
        " were no gate;"
        f" the gate leaves {gate['group_prompts'] - gate['missed']} of {gate['group_prompts']} alone (and"
        f" {gate['false_alarms']} of {gate['neutral_prompts']} neutral ones)."
        + (
            " Drift: how much a prompt's shares on the other axes moved from untreated, beside what other seeds show."
            if others
            else ""
        )
        + f" Brackets are 95 % intervals. Seconds of drawing: {seconds}.",
    )


def _features(results: Data) -> str:
    name = results.get("features", "reader")
    return "the reader's features" if name == "reader" else f"{name} features"


def _within(arm: Data) -> str:
    ratio = arm.get("frechet_within_groups_ratio")
    return "" if ratio is None else f"{ratio['estimate']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]"


_CORRECTED = (
    "bold where the shares as read have a gap above that. Corrected: without the reader's error, as --confusion tells"
    " it; gaps, changes and the verdict are of shares as they were read."
)


def _prompt_tables(results: Data) -> list[Group]:
    """Shares by prompt before and after; one table a group, or the first alone where there are two."""
    groups = results["groups"]
    names = ["untreated", *results["masks"]] if results["masks"] else ["untreated", "balanced oracle"]
    floor = results["noise_floor_one_prompt"]
    tables = []
    for group in groups if len(groups) > 2 else groups[:1]:
        table = new_table(f"Share of {group} by prompt: guidance {results['guidance']:g}")
        table.add_column("prompt")
        fixed = results.get("corrected_shares")
        for name in names:
            table.add_column(printable(name), justify="right")
            table.add_column("corrected" if fixed else "gap", justify="right")
        for p, label in enumerate(_told_apart(results["arms"]["untreated"]["prompts"])):
            cells: list[RenderableType] = [label]
            for name in names:
                row = results["arms"][name]["prompts"][p]
                gap = interval(fixed[name][p][group]) if fixed else figure(row["parity_gap"])
                beyond = row["parity_gap"] > floor["upper"]
                cells += [interval(row["shares"][group]), Text(gap, "bold") if beyond else gap]
            table.add_row(*cells)
        tables.append(
            captioned(
                table,
                f"Brackets are 95 % Wilson intervals over {results['images_per_prompt']} images; groups are perceived"
                f" presentation. One prompt of a fair generator shows a parity gap of {floor['mean']:.2f} by chance,"
                f" and below {floor['upper']:.2f} in 95 % of runs; "
                + (_CORRECTED if fixed else "gaps above that are bold."),
            )
        )
    return tables


def _told_apart(prompts: list[Data]) -> list[str]:
    """Labels, or the prompts themselves where several share a label."""
    labels = [row["label"] for row in prompts]
    return labels if len(set(labels)) == len(labels) else [row["prompt"] for row in prompts]


def _planned(summary: Data) -> bool:
    return any(row["forecast"] for row in summary["bins"])


def new_table(title: str) -> Table:
    """A table in the style of this command line; pass it through `captioned` to print it."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def captioned(table: Table, caption: str = "", keep: Sequence[int] = ()) -> Group:
    """What is printed of a table: title and caption in the whole width, and as much of it as there is room for.

    Args:
        table: From `new_table`. Where it is too wide, columns are left out, from the right. Columns with
            `overflow="fold"` fold before that; the first one stays, and folds if it has to.
        caption: Plain text below it.
        keep: Columns to leave out last, the one that matters most first.
    """
    title, table.title = styled(str(table.title), "bold"), None
    below = [Padding(styled(caption, "dim"), (0, 0, 1, 0))] if caption else []
    return Group(title, _Fitted(table, [i % len(table.columns) for i in keep]), *below)


def styled(text: str, style: str = "") -> Text:
    """Plain text in a style."""
    return Text(printable(text), style)


_EDGES, _BETWEEN, _CLOSE = 2, 3, 2  # what is drawn at both ends of a line, and between columns, with little room
_FOLDED = 12  # no text folds to less


@dataclass(frozen=True)
class _Fitted:
    """The columns of a table that there is room for, and a line that names the others."""

    table: Table
    keep: Sequence[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, room = self.table.columns, options.max_width - _EDGES
        whole = [_width(console, options, column) for column in columns]
        least = [min(w, _FOLDED) if column.overflow == "fold" else w for w, column in zip(whole, columns, strict=True)]
        order = list(dict.fromkeys([0, *self.keep, *range(len(columns))]))
        between = _BETWEEN if sum(least) + _BETWEEN * (len(columns) - 1) <= room else _CLOSE
        beside = least[order[1]] + between if len(order) > 1 else 0
        least[0] = min(least[0], max(room - beside, _FOLDED))
        while len(order) > 1 and sum(least[i] + between for i in order) - between > room:
            order.pop()
        widths = {i: least[i] for i in sorted(order)}
        for _ in range(room + between - sum(width + between for width in widths.values())):
            if narrow := [i for i in widths if widths[i] < whole[i]]:
                widths[min(narrow, key=widths.__getitem__)] += 1

        shown = new_table("")
        shown.show_header, shown.padding = self.table.show_header, (0, 1, 0, between - 2)
        for i, width in widths.items():
            column = columns[i]
            shown.add_column(_heading(column), style=column.style, justify=column.justify, overflow="fold", width=width)
        cells = zip(*(columns[i].cells for i in widths), strict=True)
        for row, line in zip(self.table.rows, cells, strict=True):
            shown.add_row(*line, style=row.style, end_section=row.end_section)
        yield shown
        if left := [_heading(column).plain.replace("\n", " ") for i, column in enumerate(columns) if i not in widths]:
            yield Text(f"No room for: {', '.join(dict.fromkeys(left))}; --json has all.", "dim")


def _heading(column: Column) -> Text:
    """The line breaks of a heading are meant."""
    return Text("\n".join(map(printable, str(column.header).split("\n"))))


def _width(console: Console, options: ConsoleOptions, column: Column) -> int:
    """What a column needs to show its cells whole; its heading may fold."""

    def width(cell: RenderableType) -> int:
        return Measurement.get(console, options.update_width(10**6), cell).maximum

    cells = max(map(width, column.cells), default=0)
    return max(cells, min(width(_heading(column)), max(_FOLDED, cells)), 1)


def timesteps(bounds: Data) -> str:
    """A timestep bin, noisiest first."""
    return f"{bounds['from']:.0f}-{bounds['to']:.0f}"


def _lean(cell: Data) -> str:
    if cell["lean"] is None:
        return "-"
    return f"{cell['lean']:+.2f}" + ("" if cell["stderr"] is None else f" ±{cell['stderr']:.2f}")


def figure(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share, or a dash for what was not measured."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(value: Data, signed: bool = False, digits: int = 2) -> str:
    """An estimate with its bracket, or a dash for what is not defined."""
    if value["estimate"] != value["estimate"]:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value['estimate']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def p_value(p: float) -> str:
    """A p-value, or the bound below which no more digits mean anything."""
    return "<.001" if p < 0.001 else f"{p:.3f}"
