"""The tables that `stereo diff` prints."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from stereo_cli.tables import captioned, figure, new_table, styled, timesteps

_WIDEST = 40  # characters of a value that differs


def diff_tables(found: dict[str, Any]) -> Iterator[Group | str]:
    """How the files were made, how large they are, and what they have in common."""
    yield _made(found["made"])
    if found["all"] is None:
        yield "The files have no layer in common (name, kind and width): they belong to different models."
        return
    count = found["sites"]["a"] + found["sites"]["b"]
    missing = f" {count} layers that only one file has are left out." if count else ""
    yield _sizes(found, missing)
    yield _common(found)


def _made(rows: list[dict[str, Any]]) -> Group:

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


def _sizes(found: dict[str, Any], missing: str) -> Group:
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


def _common(found: dict[str, Any]) -> Group:
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
        " ranks, and the cosine after a random reordering. A dash: not defined; in the top, more neurons are equally"
        " large.",
    )


def _rows(found: dict[str, Any], table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each row; adds a line to the table between kinds, timesteps, groups and the total."""
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
