"""What `stereo inspect` prints: tables that are readable at 80 columns."""

from typing import Any

from rich.console import Group
from rich.text import Text

from stereo_cli.tables import captioned, figure, new_table, percent, styled, timesteps

Data = dict[str, Any]

UP, DOWN = " ▁▂▃▄▅▆▇█", " ▔▀█"
WIDEST = 24  # labels of a profile
WIDE = 9  # no more blocks have a column each


def relevance_tables(summary: Data, top: int) -> list[Group]:
    """Where the stereotype sits, and the neurons that carry it (`evaluation.report.located.relevance_summary`).

    Args:
        summary: Plain data.
        top: How many sites are named.
    """
    return [
        _where(summary),
        _by_timestep(summary),
        _by_block(summary),
        _relevance_sites(summary, top),
        _neurons(summary),
    ]


def _where(summary: Data) -> Group:
    total = summary["total"]
    drawn = new_table(
        f"Relevance for {summary['axis'] or 'an axis it does not name'}: half of it in {summary['half']} of"
        f" {total['neurons']} neurons"
    )
    drawn.add_column("where")
    for name in ("sites", "neurons", "share", "by\nchance", "per\nneuron", "net"):
        drawn.add_column(name, justify="right")
    for rows in (summary["kinds"], summary["streams"], summary["blocks"] if len(summary["blocks"]) <= WIDE else []):
        for row in rows:
            drawn.add_row(
                row["name"], str(row["sites"]), str(row["neurons"]), percent(row["share"]),
                percent(row["chance"]), _per_neuron(row, summary), _net(row),
            )  # fmt: skip
        drawn.add_section()
    drawn.add_row("all", str(total["sites"]), str(total["neurons"]), percent(1.0), percent(total["chance"]))
    return captioned(
        drawn,
        f"{_counts(summary)} share: of |mean relevance| over neurons, mean over timesteps. by chance: what the standard"
        " errors alone would show of it, were every true mean 0. per neuron: against the average neuron. net: the"
        " signed sum in units of the target, ± one standard error between labels; above 0 it carries the stereotype."
        " Layers lie behind each other, so nets do not add up.",
    )


def _by_timestep(summary: Data) -> Group:
    drawn = new_table("By timestep, noise first")
    for name in ("timesteps", "n", "|R|", "by\nchance", "half\nin"):
        drawn.add_column(name, justify="right")
    for row in summary["kinds"]:
        drawn.add_column(row["kind"], justify="right")
    for t, row in enumerate(summary["timesteps"]):
        drawn.add_row(
            timesteps(row), str(row["n"]), figure(row["size"]), percent(row["chance"]), str(row["half"] or "-"),
            *(_points(kind["bins"][t]) for kind in summary["kinds"]),
        )  # fmt: skip
    return captioned(
        drawn,
        "n: samples x measured steps. |R|: sum of |mean relevance| over neurons. half in: this many neurons hold half"
        " of it. Then the share of each kind of layer (%); ff is feed-forward.",
    )


def _by_block(summary: Data) -> Group:
    if len(summary["blocks"]) > WIDE:
        return _rows("By depth, input to output", "block", summary["blocks"], "name", summary)
    drawn = new_table("By depth: share of |mean relevance| (%)")
    drawn.add_column("timesteps", justify="right")
    for row in summary["blocks"]:
        drawn.add_column(row["name"].replace(" ", "\n"), justify="right")
    for t, row in enumerate(summary["timesteps"]):
        drawn.add_row(timesteps(row), *(_points(block["bins"][t]) for block in summary["blocks"]))
    drawn.add_section()
    drawn.add_row("by chance", *(_points(block["chance"]) for block in summary["blocks"]), style="dim")
    return captioned(drawn)


def _relevance_sites(summary: Data, top: int) -> Group:
    """The strongest sites; --json and the picture show all."""
    sites = sorted(summary["sites"], key=lambda site: -(site["share"] or 0))[:top]
    return _rows(f"Strongest {len(sites)} of {len(summary['sites'])} sites", "site", sites, "place", summary)


def _rows(title: str, what: str, rows: list[Data], name: str, summary: Data) -> Group:
    """A line each."""
    drawn = new_table(title)
    drawn.add_column(what, overflow="fold")
    for heading in ("neurons", "share", "by\nchance", "per\nneuron", "net", "noise to\nimage"):
        drawn.add_column(heading, justify="right")
    most = max((share or 0 for row in rows for share in row["bins"]), default=0)
    for row in rows:
        drawn.add_row(
            row[name], str(row["neurons"]), percent(row["share"]), percent(row["chance"]),
            _per_neuron(row, summary), _net(row), Text(bars(row["bins"], most)),
        )  # fmt: skip
    return captioned(drawn, f"noise to image: share by timestep; a full bar is {percent(most)}.")


def _neurons(summary: Data) -> Group:
    """The strongest single neurons, each with its profile over labels."""
    rows = summary["neurons"]
    drawn = new_table("Strongest neurons")
    drawn.add_column("neuron", overflow="fold")
    for name in ("timesteps", "relevance", "t", "share"):
        drawn.add_column(name, justify="right")
    drawn.add_column("profile")
    if not rows:
        return captioned(drawn, "Nothing was measured.")
    toward, others = summary["groups"][0], " or ".join(summary["groups"][1:])
    shown = _shown(rows)
    for row in rows:
        values = [row["profile"][p]["relevance"][toward] for p in shown]
        drawn.add_row(
            styled(f"{row['place']} ").append(f"#{row['neuron']}", "bold"), timesteps(row["bin"]), _mean(row),
            figure(row["t"], 1), percent(row["share"]), Text("\n".join(two_sided(values))),
        )  # fmt: skip
    labels = ", ".join(rows[0]["profile"][p]["label"] for p in shown)
    left = len(rows[0]["profile"]) - len(shown)
    return captioned(
        drawn,
        "Ranked by |relevance| less 2 standard errors over all timesteps; shown where each stands out. relevance: mean"
        " toward the stereotype, ± one standard error between labels, t their ratio; below 0 the neuron counteracts it."
        f" profile: relevance by label, bars up toward {toward}, down toward {others}, each neuron to its own scale;"
        f" left to right: {labels}" + (f" (and {left} more, in --json)." if left else "."),
    )


def mask_tables(summary: Data, top: int) -> list[Group]:
    """What is damped of each block, and of the sites that are damped most; --json and the picture show all.

    Args:
        summary: Plain data (`evaluation.report.summary.mask_summary`).
        top: How many sites are named.
    """
    blocks = new_table("By depth, input to output")
    sites = new_table(f"Most damped {min(top, len(summary['sites']))} of {len(summary['sites'])} sites")
    for drawn, what in ((blocks, "block"), (sites, "site")):
        drawn.add_column(what, overflow="fold")
        for name in ("neurons", "damped", "damping", "part of\nneurons"):
            drawn.add_column(name, justify="right")
    sites.add_column("noise to\nimage")
    for row in summary["blocks"]:
        blocks.add_row(row["name"], *_damped(row))
    most = max((value / site["neurons"] for site in summary["sites"] for value in site["bins"]), default=0)
    for site in sorted(summary["sites"], key=lambda site: -site["damping"])[:top]:
        parts = [value / site["neurons"] for value in site["bins"]]
        sites.add_row(site["place"], *_damped(site), Text(bars(parts, most)))
    text = (
        "damping: sum over neurons of 1 - factor, mean over timesteps; part of neurons: damping over neurons. noise to"
        f" image: the same by timestep; a full bar is {percent(most)}."
    )
    return [captioned(blocks), captioned(sites, text)]


def _damped(row: Data) -> tuple[str, str, str, str]:
    share = percent(row["damping"] / row["neurons"])
    return str(row["neurons"]), str(row["damped"]), figure(row["damping"], 1), share


def metadata_table(metadata: Data) -> Group:
    """What a file says of how it was made; long lists are left to --json."""
    drawn = new_table("Made from")
    drawn.show_header = False
    drawn.add_column("")
    drawn.add_column("", overflow="fold")
    for name, value in _flat(metadata):
        drawn.add_row(name, value)
    return captioned(drawn)


def bars(values: list[float | None], most: float) -> str:
    """One character a value, from empty (0) to full (`most`); "?" for what was not measured."""
    top = len(UP) - 1
    return "".join("?" if value is None else UP[round(top * value / most) if most else 0] for value in values)


def two_sided(values: list[float | None]) -> tuple[str, str]:
    """A column a value in two lines: bars that rise from the middle above 0, and hang from it below."""
    most = max((abs(value) for value in values if value is not None), default=0) or 1.0

    def line(glyphs: str, sign: int) -> str:
        top = len(glyphs) - 1
        return "".join("?" if value is None else glyphs[round(top * max(0.0, sign * value) / most)] for value in values)

    return line(UP, 1), line(DOWN, -1)


def _shown(rows: list[Data]) -> list[int]:
    """Which labels a profile has room for, by how large they are in any row; most tilted to the first group first."""
    profiles = [row["profile"] for row in rows]

    def largest(p: int) -> float:
        found = [abs(each) for profile in profiles for each in profile[p]["relevance"].values() if each is not None]
        return max(found, default=0.0)

    chosen = sorted(range(len(profiles[0])), key=lambda p: -largest(p))[:WIDEST]
    return sorted(chosen, key=lambda p: -(profiles[0][p]["lean"] or 0))


def _per_neuron(row: Data, summary: Data) -> str:
    """How much relevance a neuron of this row holds, in units of the average neuron's."""
    if row["share"] is None:
        return "-"
    return f"{row['share'] * summary['total']['neurons'] / row['neurons']:.1f} x"


def _points(share: float | None) -> str:
    return figure(None if share is None else 100 * share, 1)


def _net(row: Data) -> str:
    if row["net"] is None:
        return "-"
    return f"{row['net']:+.2f}" + ("" if row["net_stderr"] is None else f" ±{row['net_stderr']:.2f}")


def _mean(row: Data) -> str:
    if row["mean"] is None:
        return "-"
    return f"{row['mean']:+.3f}" + ("" if row["stderr"] is None else f" ±{row['stderr']:.3f}")


def _counts(summary: Data) -> str:
    of = f"{len(summary['labels'])} labels, {sum(row['n'] for row in summary['timesteps'])} measured steps in all."
    samples = summary["metadata"].get("samples")
    return f"{samples} samples of {of}" if samples else of


def _flat(metadata: Data, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(metadata.items()):
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{name}", text[:16] + "…" if name.startswith("unet_") else text))
    return rows
