"""The tables of `stereo inspect`, readable at 80 columns."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stereo_cli.tables import captioned, figure, new_table, percent, styled, timesteps

Data = dict[str, Any]

UP, DOWN = " ▁▂▃▄▅▆▇█", " ▔▀█"
WIDEST = 24  # labels of a profile
_SHARES = ("neurons", "share", "share by\nchance", "per\nneuron", "net")
_BARS = "noise to\nimage"  # aligned left: rich drops empty bars at the end of a cell


def relevance_tables(summary: Data, top: int) -> list[Group]:
    """Where the stereotype lies, and the neurons that carry it.

    Args:
        summary: From `stereoclinic.report.located.relevance_summary`.
        top: Number of sites to list; --json and the picture have all.
    """
    blocks = _table("By depth, input to output", "block", *_SHARES, _BARS)
    sites = sorted(summary["sites"], key=lambda site: -(site["share"] or 0))[:top]
    title = f"Strongest {len(sites)} of {len(summary['sites'])} sites"
    strongest = _table(title, "site", *_SHARES, _BARS)
    texts = [_with_bars(blocks, summary["blocks"], "name", summary), _with_bars(strongest, sites, "place", summary)]
    return [
        _where(summary), _by_timestep(summary), captioned(blocks, texts[0]), captioned(strongest, texts[1]),
        _neurons(summary),
    ]  # fmt: skip


def _table(title: str, first: str, *others: str) -> Table:
    """A table with a text column and columns of figures."""
    table = new_table(title)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == _BARS else "right")
    return table


def _where(summary: Data) -> Group:
    total, axis = summary["total"], summary["axis"] or "an unnamed axis"
    title = f"Relevance for {axis}: half of it in {summary['half']} of {total['neurons']} neurons"
    table = _table(title, "where", "sites", *_SHARES)
    for rows in (summary["kinds"], summary["streams"]):
        for row in rows:
            table.add_row(row["name"], str(row["sites"]), *_shares(row, summary))
        table.add_section()
    table.add_row("all", str(total["sites"]), str(total["neurons"]), percent(1.0), percent(total["chance"]))
    steps = sum(row["n"] for row in summary["timesteps"])
    samples = f"{summary['metadata']['samples']} samples of " if summary["metadata"].get("samples") else ""
    return captioned(
        table,
        f"{samples}{len(summary['labels'])} labels, {steps} measured steps. share: of |mean relevance|, mean over"
        " timesteps. share by chance: from the standard errors alone. per neuron: relative to the average neuron. net:"
        " signed sum in units of the target, ± one standard error between labels; above 0 it carries the stereotype."
        " Layers lie behind each other, so nets do not add up.",
    )


def _by_timestep(summary: Data) -> Group:
    kinds = summary["kinds"]
    heads = [f"{row['kind']}\n%" for row in kinds]
    table = _table(
        "By timestep, noise first", "timesteps", "n", "|R|", "share by\nchance", "neurons\nwith half", *heads
    )
    for t, row in enumerate(summary["timesteps"]):
        points = [None if kind["bins"][t] is None else 100 * kind["bins"][t] for kind in kinds]
        table.add_row(
            timesteps(row), str(row["n"]), figure(row["size"]), percent(row["chance"]), str(row["half"] or "-"),
            *(figure(share, 1) for share in points),
        )  # fmt: skip
    return captioned(
        table, "n: samples x measured steps. |R|: sum of |mean relevance| over neurons. %: share of each kind of layer."
    )


def _with_bars(table: Table, rows: list[Data], name: str, summary: Data) -> str:
    """Add a row for each block or site; returns the caption."""
    most = max((share or 0 for row in rows for share in row["bins"]), default=0)
    for row in rows:
        table.add_row(row[name], *_shares(row, summary), Text(bars(row["bins"], most)))
    return f"noise to image: share by timestep; a full bar is {percent(most)}."


def _shares(row: Data, summary: Data) -> list[str]:
    """Cells for `_SHARES`."""
    ratio = "-" if row["share"] is None else f"{row['share'] * summary['total']['neurons'] / row['neurons']:.1f} x"
    net = _with_error(row["net"], row["net_stderr"], 2)
    return [str(row["neurons"]), percent(row["share"]), percent(row["chance"]), ratio, net]


def _neurons(summary: Data) -> Group:
    """The strongest single neurons, each with its profile over labels."""
    rows = summary["neurons"]
    table = _table("Strongest neurons", "neuron", "timesteps", "relevance", "t", "share")
    table.add_column("profile")
    if not rows:
        return captioned(table, "Nothing was measured.")
    toward, others = summary["groups"][0], " or ".join(summary["groups"][1:])
    shown = _shown(rows)
    for row in rows:
        values = [row["profile"][p]["relevance"][toward] for p in shown]
        table.add_row(
            styled(f"{row['place']} ").append(f"#{row['neuron']}", "bold"), timesteps(row["bin"]),
            _with_error(row["mean"], row["stderr"], 3), figure(row["t"], 1), percent(row["share"]),
            Text("\n".join(two_sided(values))),
        )  # fmt: skip
    labels = ", ".join(rows[0]["profile"][p]["label"] for p in shown)
    left = len(rows[0]["profile"]) - len(shown)
    return captioned(
        table,
        "Ranked by |relevance| - 2 standard errors over all timesteps; shown at the timesteps where it is largest."
        " relevance: mean toward the stereotype, ± one standard error between labels; below 0 the neuron counteracts"
        f" it. t: their ratio. profile: relevance by label, bars up toward {toward}, down toward {others}; each neuron"
        f" has its own scale; left to right: {labels}" + (f" (and {left} more, in --json)." if left else "."),
    )


def mask_tables(summary: Data, top: int) -> list[Group]:
    """How much of each block is damped, and of the most damped sites.

    Args:
        summary: From `stereoclinic.report.summary.mask_summary`.
        top: Number of sites to list; --json and the picture have all.
    """
    heads = ("neurons", "damped", "damping", "damping /\nneurons")
    blocks = _table("By depth, input to output", "block", *heads)
    title = f"Most damped {min(top, len(summary['sites']))} of {len(summary['sites'])} sites"
    sites = _table(title, "site", *heads, _BARS)
    for row in summary["blocks"]:
        blocks.add_row(row["name"], *_damped(row))
    most = max((value / site["neurons"] for site in summary["sites"] for value in site["bins"]), default=0)
    for site in sorted(summary["sites"], key=lambda site: -site["damping"])[:top]:
        parts = [value / site["neurons"] for value in site["bins"]]
        sites.add_row(site["place"], *_damped(site), Text(bars(parts, most)))
    text = (
        "damping: sum over neurons of 1 - factor, mean over timesteps. noise to image: damping / neurons by timestep; a"
        f" full bar is {percent(most)}."
    )
    return [captioned(blocks), captioned(sites, text)]


def _damped(row: Data) -> tuple[str, str, str, str]:
    share = percent(row["damping"] / row["neurons"])
    return str(row["neurons"]), str(row["damped"]), figure(row["damping"], 1), share


def metadata_table(metadata: Data) -> Group:
    """How a file was made; --json also has the long lists."""
    table = new_table("Made from")
    table.show_header = False
    table.add_column("")
    table.add_column("", overflow="fold")
    for name, value in _flat(metadata):
        table.add_row(name, value)
    return captioned(table)


def bars(values: list[float | None], most: float) -> str:
    """One character per value, from empty (0) to full (`most`); "?" if not measured."""
    top = len(UP) - 1
    return "".join("?" if value is None else UP[round(top * value / most) if most else 0] for value in values)


def two_sided(values: list[float | None]) -> tuple[str, str]:
    """One column per value in two lines: bars rise from the middle above 0 and hang below 0."""
    most = max((abs(value) for value in values if value is not None), default=0) or 1.0

    def line(glyphs: str, sign: int) -> str:
        top = len(glyphs) - 1
        return "".join("?" if value is None else glyphs[round(top * max(0.0, sign * value) / most)] for value in values)

    return line(UP, 1), line(DOWN, -1)


def _shown(rows: list[Data]) -> list[int]:
    """The labels with the largest relevance in any row, ordered by lean toward the first group."""
    profiles = [row["profile"] for row in rows]

    def largest(p: int) -> float:
        found = [abs(each) for profile in profiles for each in profile[p]["relevance"].values() if each is not None]
        return max(found, default=0.0)

    chosen = sorted(range(len(profiles[0])), key=lambda p: -largest(p))[:WIDEST]
    return sorted(chosen, key=lambda p: -(profiles[0][p]["lean"] or 0))


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")


def _flat(metadata: Data, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(metadata.items()):
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{name}", text[:16] + "…" if name.startswith("unet_") else text))
    return rows
