"""`stereo reader check`: how often a reader is right on labelled pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stereo_cli import options, terminal
from stereo_cli.command import Shown, command
from stereo_cli.progress import TerminalReporter
from stereoclinic.calls.reader_settings import CheckReaderSettings

if TYPE_CHECKING:
    from rich.console import Group

    from stereoclinic.evaluation.labelled import ReaderCheck


@command
def check(
    *,
    reader: Annotated[str, typer.Argument(metavar="READER", help="A reader, as --reader of `stereo bench` takes it.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pictures in a folder for each group, or with a metadata.csv.")
    ],
    axis: options.AxisName = "gender",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the CSV that --confusion of `stereo bench` takes."),
    ] = None,
    settings: CheckReaderSettings,
    shown: Shown,
) -> None:
    """Measure how often a reader is right on pictures whose group you know.

    \b
    stereo reader check hf:MODEL faces -o confusion.csv
    stereo bench --reader hf:MODEL --confusion confusion.csv

    Labels are the names of the folders in FOLDER, or a column of its metadata.csv or metadata.jsonl. Shares come with
    95 % intervals. They hold for pictures like these: generated images may be harder, or easier.
    """
    from stereoclinic.calls.inputs import check_target
    from stereoclinic.calls.reader import check_reader

    if out is not None:
        check_target(out, "--out", (".csv",))
    found = check_reader(reader, folder, axis, settings=settings, reporter=TerminalReporter(shown.quiet))
    if out is not None:
        found.save(out)
    if shown.as_json:
        terminal.print_json({**found.data, "confusion": None if out is None else str(out)})
        return
    terminal.stdout().print(_table(found))
    if out is not None:
        terminal.say(f"wrote {out}")


def _table(found: "ReaderCheck") -> "Group":
    from stereo_cli.tables import captioned, figure, new_table
    from stereoclinic.evaluation.wording import spelt

    groups, right = found.axis.groups, found.right
    table = new_table(f"{found.reader} on {round(float(found.counts.sum()))} pictures: {found.axis.name}")
    names = ["shows", "pictures", "right", *(f"read as {group}" for group in groups), "unsure"]
    for name in [*names, *(["no group seen"] if found.no_group else [])]:
        table.add_column(name, justify="left" if name == "shows" else "right")
    for group, row in zip(groups, found.counts.tolist(), strict=True):
        cells = [f"{count:g}" if count == round(count) else figure(count, 1) for count in row]
        others = [spelt(each[group]) for each in (found.unsure, found.no_group) if each is not None]
        table.add_row(group, f"{round(sum(row))}", spelt(right[group]), *cells, *others)
    table.add_section()
    table.add_row("all", f"{round(float(found.counts.sum()))}", spelt(right["all"]))
    ties = " A picture in which no group is seen counts in part for each." if found.no_group else ""
    return captioned(table, f"Right, unsure, no group: share of pictures [95 % interval].{ties}", keep=[2])
