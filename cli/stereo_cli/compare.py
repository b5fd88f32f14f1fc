"""`stereo compare`: what differs significantly between two results of `stereo bench`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import terminal
from stereo_cli.command import Json, command

if TYPE_CHECKING:
    from rich.console import Group


@command
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A results.json of `stereo bench`, or its folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    shown: Json,
) -> None:
    """Compare two benches: which figures differ, by how much, and whether B is better or worse.

    Arms are compared by name; a single mask on each side is compared even if the names differ. Results of different
    axes, target shares, prompts or guidance scales are refused. Differences in seeds, weights, steps, readers and
    numbers of images are listed first.

    The interval of a difference comes from the two reported intervals and takes the runs for independent. Two runs of
    the same model and seeds vary together, so their differences are more certain than the intervals say.

    \b
    stereo compare before/results.json after/results.json
    """
    from stereoclinic.calls.compare import compare as compare_results

    found = compare_results(a, b)
    if shown.as_json:
        terminal.print_json({"files": {"a": str(a), "b": str(b)}, **found})
        return
    terminal.say(f"A: {a}")
    terminal.say(f"B: {b}")
    for note in found["notes"]:
        terminal.say(f"note: {note}")
    terminal.say("")
    for experiment in found["experiments"]:
        for arm in experiment["arms"]:
            terminal.stdout().print(_table(experiment["guidance"], arm))
        for side in ("a", "b"):
            if alone := experiment[f"only_{side}"]:
                terminal.say(f"only in {side.upper()}, at guidance {experiment['guidance']:g}: {', '.join(alone)}")
    for line in _sum_up(found):
        terminal.say(line)


def _table(guidance: float, arm: dict[str, Any]) -> "Group":
    """The figures that differ, and the parity gap in any case; the others are named below."""
    from stereo_cli.tables import captioned, new_table
    from stereoclinic.evaluation.compare import NO_INTERVAL, NOT_SIGNIFICANT, OTHER_SIZE, SAME
    from stereoclinic.evaluation.figures.registry import figure_of
    from stereoclinic.evaluation.figures.values import as_value
    from stereoclinic.evaluation.wording import spelt

    name = arm["a"] if arm["a"] == arm["b"] else f"{arm['a']} (A) and {arm['b']} (B)"
    table = new_table(f"{name}: guidance {guidance:g}")
    table.add_column("", overflow="fold")
    for column in ("A", "B", "B - A"):
        table.add_column(column, justify="right")
    table.add_column("B is")
    quiet: dict[str, list[str]] = {}
    for row in arm["figures"]:
        if row["verdict"] in (NOT_SIGNIFICANT, NO_INTERVAL, SAME, OTHER_SIZE) and row["figure"] != "parity_gap":
            quiet.setdefault(row["verdict"], []).append(row["title"])
            continue
        form = figure_of(row["figure"]).unit.form
        signed = form if form.startswith("+") else f"+{form}"
        cells = [spelt(as_value(row[side]), form) for side in ("a", "b")]
        table.add_row(row["title"], *cells, spelt(as_value(row["difference"]), signed), row["verdict"])
    text = " ".join(f"{verdict.capitalize()}: {', '.join(names)}." for verdict, names in quiet.items())
    return captioned(table, text, keep=[-1, -2])


def _sum_up(found: dict[str, Any]) -> tuple[str, str]:
    from stereoclinic.evaluation.compare import BETTER, DIFFERS, NOT_SIGNIFICANT, WORSE

    counts = Counter(
        row["verdict"] for experiment in found["experiments"] for arm in experiment["arms"] for row in arm["figures"]
    )
    differ = sum(counts[verdict] for verdict in (BETTER, WORSE, DIFFERS))
    return (
        f"{differ} of {differ + counts[NOT_SIGNIFICANT]} figures with intervals differ significantly: B is better in"
        f" {counts[BETTER]}, worse in {counts[WORSE]}.",
        "About one in twenty differs by chance alone. --json has every figure.",
    )
