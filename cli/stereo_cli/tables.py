"""Tables of leans and masks, and how a table fits the terminal: columns that have no room are left out and named."""

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
    """The forecast: one table for each group, of two groups the first alone."""
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
        f"0: balanced. 1: as if {toward} had been asked for. Below 0: leans to {others}. {samples} samples per prompt;"
        f" {len(shown)} of {len(steps)} measured timesteps, noise first (--json has all); ± one standard error."
        " Groups are perceived presentation.",
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
    planned = any(row["forecast"] for row in summary["bins"])
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
    groups = f" Mean over the groups that images are allotted to ({', '.join(summary['groups'])})."
    return captioned(
        table,
        f"Damping: sum over neurons of 1 - factor (by kind{' and stream' * bool(summary['streams'])}: mean over"
        " timesteps)."
        + groups * bool(summary["groups"])
        + " Leans and movement off the axis (in units of ||d||) are forecasts." * planned
        + f" {summary['chosen'].capitalize()}; damped toward {summary['root']}."
        + f" Branch: {_HALVES.get(summary['branch'], summary['branch'])}.",
    )


_HALVES = {"both": "both halves of guidance", "conditional": "conditional half of guidance"}


def new_table(title: str) -> Table:
    """A table in the style of this command line; pass it through `captioned` to print it."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def captioned(table: Table, caption: str = "", keep: Sequence[int] = (), blocks: bool = False) -> Group:
    """A table with its title and caption, as wide as the terminal allows.

    Args:
        table: From `new_table`. Where it is too wide, columns are left out from the right. Columns with
            `overflow="fold"` fold before that; the first column always stays.
        caption: Plain text below it.
        keep: Columns to leave out last, the most important first.
        blocks: Leave out no column: print those that have no room below, with the first column again.
    """
    title, table.title = styled(str(table.title), "bold"), None
    below = [Padding(styled(caption, "dim"), (0, 0, 1, 0))] if caption else []
    return Group(title, _Fitted(table, [i % len(table.columns) for i in keep], blocks), *below)


def styled(text: str, style: str = "") -> Text:
    """Plain text in a style."""
    return Text(printable(text), style)


_EDGES, _BETWEEN, _CLOSE = 2, 3, 2  # width of both ends of a line, and of the gap between columns, wide and narrow
_FOLDED = 12  # no text folds to less than this
P = "p"  # heading of a column that belongs to the one before it


@dataclass(frozen=True)
class _Fitted:
    """The columns of a table that fit, and the others below or named in a line."""

    table: Table
    keep: Sequence[int]
    blocks: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self.table.columns
        rest = list(dict.fromkeys([0, *self.keep, *range(len(columns))]))
        while rest:
            widths, between = self._widths(console, options, rest)
            yield self._block(widths, between)
            left = [i for i in rest if i not in widths]
            if left and not (self.blocks and len(widths) > 1):
                names = dict.fromkeys(_heading(columns[i]).plain.replace("\n", " ") for i in sorted(left))
                yield Text(f"No room for: {', '.join(names)}; --json has all.", "dim")
                return
            rest = [0, *left] if left else []

    def _widths(self, console: Console, options: ConsoleOptions, order: list[int]) -> tuple[dict[int, int], int]:
        """The columns that fit, from left to right, with their widths, and the gap between them.

        Args:
            order: The columns, the most important first; the first always fits.
        """
        columns, room, order = self.table.columns, options.max_width - _EDGES, list(order)
        whole = {i: _width(console, options, columns[i]) for i in order}
        least = {i: _width(console, options, columns[i], least=True) for i in order}
        between = _BETWEEN if sum(least.values()) + _BETWEEN * (len(order) - 1) <= room else _CLOSE
        second = least[order[1]] + between if len(order) > 1 else 0
        least[0] = min(least[0], max(room - second, _FOLDED))
        last = None
        while len(order) > 1 and sum(least[i] + between for i in order) - between > room:
            last = order.pop()
        if self.blocks and len(order) > 2 and last is not None and columns[last].header == P:
            order.pop()
        widths = {i: least[i] for i in sorted(order)}
        for _ in range(room + between - sum(width + between for width in widths.values())):
            if narrow := [i for i in widths if widths[i] < whole[i]]:
                widths[min(narrow, key=widths.__getitem__)] += 1
        return widths, between

    def _block(self, widths: dict[int, int], between: int) -> Table:
        columns = self.table.columns
        shown = new_table("")
        shown.show_header, shown.padding = self.table.show_header, (0, 1, 0, between - 2)
        for i, width in widths.items():
            column = columns[i]
            shown.add_column(_heading(column), style=column.style, justify=column.justify, overflow="fold", width=width)
        cells = zip(*(columns[i].cells for i in widths), strict=True)
        for row, line in zip(self.table.rows, cells, strict=True):
            shown.add_row(*line, style=row.style, end_section=row.end_section)
        return shown


def _heading(column: Column) -> Text:
    """A heading with its line breaks."""
    return Text("\n".join(map(printable, str(column.header).split("\n"))))


def _width(console: Console, options: ConsoleOptions, column: Column, least: bool = False) -> int:
    """The width that shows a column's cells whole and folds its heading a little; or the least that it can have."""

    def measure(cell: RenderableType) -> Measurement:
        return Measurement.get(console, options.update_width(10**6), cell)

    cells, heading = max((measure(cell).maximum for cell in column.cells), default=0), measure(_heading(column))
    whole = max(cells, min(heading.maximum, max(_FOLDED, cells)), 1)
    if not least:
        return whole
    return min(whole, _FOLDED) if column.overflow == "fold" else max(cells, min(whole, heading.minimum), 1)


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
