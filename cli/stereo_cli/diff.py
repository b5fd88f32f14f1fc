"""`stereo diff`: what two masks, or two relevance files, have in common."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import terminal
from stereo_cli.command import Json, command

if TYPE_CHECKING:
    from rich.console import Group

    from stereoclinic.pipelines.sites import Site

_WIDEST = 40  # characters of a value that differs


@command
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A mask or relevance file, .pt or .safetensors.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another file of the same kind.")],
    shown: Json,
) -> None:
    """Say what two masks, or two relevance files, have in common, and what differs in how they were made.

    By kind of layer and by timestep: how much each damps, how far they damp the same neurons (overlap), and how similar
    the damping is (rank correlation, cosine), each with the value that two unrelated files show by chance.

    \b
    stereo diff gender.pt age.pt
        do two axes live in the same neurons?
    stereo diff seed-0.pt seed-100.pt
        would other seeds have found the same?
    """
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.errors import InputError
    from stereoclinic.io.tensors import kind_of
    from stereoclinic.report.anatomy import KINDS, places
    from stereoclinic.sns.diff import compare
    from stereoclinic.sns.mask import NeuronMask

    loaded: list[NeuronMask | Relevance] = []
    for path in (a, b):
        kind = kind_of(path)
        if kind not in ("mask", "relevance"):
            raise InputError(f"{path} is a {kind} file; expected a mask or relevance")
        loaded.append(NeuronMask.load(path) if kind == "mask" else Relevance.load(path))
    if isinstance(loaded[0], NeuronMask) != isinstance(loaded[1], NeuronMask):
        first, second = ("a mask" if isinstance(file, NeuronMask) else "relevance" for file in loaded)
        raise InputError(f"{a} is {first} and {b} is {second}; give two masks, or two relevance files")

    known = places(dict.fromkeys(site for file in loaded for site in file.sites))

    def kind_name(site: "Site") -> str:
        return KINDS[known[site].kind]

    found = compare(loaded[0], loaded[1], kind_name)
    if shown.as_json:
        terminal.print_json({"files": {"a": str(a), "b": str(b)}, **found})
        return
    terminal.say(f"A: {a}")
    terminal.say(f"B: {b}")
    terminal.say("")
    for table in _tables(found):
        terminal.stdout().print(table)


def _tables(found: dict[str, Any]) -> "Iterator[Group | str]":
    yield _made(found["made"])
    if found["all"] is None:
        yield "The files have no layer in common (name, kind and width): they belong to different models."
        return
    count = found["sites"]["a"] + found["sites"]["b"]
    missing = f" {count} layers that only one file has are left out." if count else ""
    yield _sizes(found, missing)
    yield _common(found)


def _made(rows: list[dict[str, Any]]) -> "Group":
    from rich.console import Group

    from stereo_cli.tables import captioned, new_table, styled

    if not rows:
        return Group(styled("Made alike: the files record no difference", "bold"), "")
    table = new_table("What differs in how they were made")
    for name in ("", "A", "B"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["name"], *(_short(row[side]) for side in ("a", "b")))
    return captioned(table)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _sizes(found: dict[str, Any], missing: str) -> "Group":
    from stereo_cli.tables import captioned, new_table

    of_mask = found["what"] == "mask"
    table = new_table("How much each damps" if of_mask else "How much relevance each holds")
    table.add_column("")
    count, total = ("damped", "damping") if of_mask else ("above 0", "|R|")
    for name in ("neurons", f"{count}\nA", f"{count}\nB", f"{total}\nA", f"{total}\nB"):
        table.add_column(name, justify="right")
    for name, row in _rows(found, table):
        sides = [row["a"], row["b"]] if row else []
        sums = [f"{side['sum']:.1f}" if of_mask else f"{side['sum']:.3g}" for side in sides]
        cells = [str(row["neurons"]), *(str(side["set"]) for side in sides), *sums] if row else "-----"
        table.add_row(name, *cells)
    if of_mask:
        text = (
            "damped: factor below 0.999 in any timestep or group. damping: sum over neurons of 1 - factor, mean over"
            " timesteps and groups."
        )
    else:
        text = (
            "above 0: neurons that carry the stereotype, by the mean of sign(S) R over samples. |R|: sum over neurons"
            " of |mean|. A dash: not measured in both."
        )
    return captioned(table, text + missing)


def _common(found: dict[str, Any]) -> "Group":
    from stereo_cli.tables import captioned, figure, new_table

    table = new_table("What they have in common, and what chance would show")
    table.add_column("")
    for name in ("overlap", "top 1 %", "top 5 %", "rank\ncorr.", "cosine"):
        table.add_column(name, justify="right")
        table.add_column("by\nchance", justify="right", style="dim")
    for name, row in _rows(found, table):
        if not row:
            table.add_row(name, *10 * "-")
            continue
        cells = [figure(each[key]) for each in (row["overlap"], *row["top"]) for key in ("jaccard", "chance")]
        rank, angle = row["spearman"], row["cosine"]
        noise = "-" if rank["noise"] is None or rank["value"] is None else f"±{rank['noise']:.2f}"
        table.add_row(name, *cells, figure(rank["value"]), noise, figure(angle["value"]), figure(angle["chance"]))
    which = "damped neurons" if found["what"] == "mask" else "neurons above 0"
    return captioned(
        table,
        f"overlap: Jaccard index of the {which}; top 1 % and 5 %: of the neurons with the largest values. rank corr.:"
        " Spearman over all neurons. by chance: mean for random sets of these sizes, one standard error for unrelated"
        " ranks, and the cosine after a random reordering. A dash: not defined.",
    )


def _rows(found: dict[str, Any], table: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each row; adds a line to the table between kinds, timesteps, groups and the total."""
    from stereo_cli.tables import timesteps

    for row in found["kinds"]:
        yield row["kind"], row
    table.add_section()
    for row in found["bins"]:
        yield f"t {timesteps(row)}", row if "neurons" in row else {}
    for row in found["groups"]:
        if row is found["groups"][0]:
            table.add_section()
        yield f"for {row['group']}", row
    table.add_section()
    yield "all", found["all"]
