"""`stereo compare`: which figures of two results of `stereo bench` differ."""

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
    """Say which figures of two benches differ, by how much, and whether B is better or worse.

    Arms are compared by their names; a single mask on either side is compared whatever it is called. Results of
    another axis, of other shares, prompts or guidance scales are refused. Other seeds, weights, steps, readers and
    numbers of images are noted.

    The interval of a difference is computed from the two reported intervals, as if the runs were independent. Two runs
    of the same model and seeds mostly vary together; their difference is then more certain than its interval.

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
    """What differs, and the parity gap whether it does or not; the rest is named below."""
    from stereo_cli.tables import captioned, new_table
    from stereoclinic.evaluation.compare import NO_INTERVAL, NOT_TOLD, OTHER_SIZE, SAME
    from stereoclinic.evaluation.figures.registry import Value, figure_of
    from stereoclinic.evaluation.wording import spelt

    name = arm["a"] if arm["a"] == arm["b"] else f"{arm['a']} (A) and {arm['b']} (B)"
    table = new_table(f"{name}: guidance {guidance:g}")
    table.add_column("", overflow="fold")
    for column in ("A", "B", "B - A"):
        table.add_column(column, justify="right")
    table.add_column("B is")
    quiet: dict[str, list[str]] = {}
    for row in arm["figures"]:
        if row["verdict"] in (NOT_TOLD, NO_INTERVAL, SAME, OTHER_SIZE) and row["figure"] != "parity_gap":
            quiet.setdefault(row["verdict"], []).append(row["title"])
            continue
        form = figure_of(row["figure"]).form
        signed = form if form.startswith("+") else f"+{form}"
        cells = [spelt(Value(**row[side]), form) for side in ("a", "b")]
        table.add_row(row["title"], *cells, spelt(Value(**row["difference"]), signed), row["verdict"])
    text = " ".join(f"{verdict.capitalize()}: {', '.join(names)}." for verdict, names in quiet.items())
    return captioned(table, text, keep=[-1, -2])


def _sum_up(found: dict[str, Any]) -> tuple[str, str]:
    from stereoclinic.evaluation.compare import BETTER, DIFFERS, NOT_TOLD, WORSE

    counts = Counter(
        row["verdict"] for experiment in found["experiments"] for arm in experiment["arms"] for row in arm["figures"]
    )
    judged = sum(counts[verdict] for verdict in (BETTER, WORSE, DIFFERS, NOT_TOLD))
    told = judged - counts[NOT_TOLD]
    return (
        f"{told} of {judged} figures with intervals are told apart: B is better in {counts[BETTER]}, worse in"
        f" {counts[WORSE]}.",
        "About one in twenty would be told apart by chance alone. --json has every figure.",
    )
