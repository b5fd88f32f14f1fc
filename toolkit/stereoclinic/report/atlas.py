"""Maps of a denoiser: each layer where it lies in the network, timesteps across, shaded by relevance or damping.

The same maps serve relevance and masks; they are drawn from their summaries. `layouts` says what lies where.
"""

import math
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.report.anatomy import UNET, Place, places
from stereoclinic.report.layouts import Line, Panel, column, u_shape
from stereoclinic.report.pictures import as_written, lettered

Data = dict[str, Any]

# Inches.
_MARGIN, _HEAD, _FOOT, _BAR, _NARROWEST = 0.2, 0.75, 0.25, 0.95, 6.4
_LETTER, _ROW = 0.062, 0.13  # of the foot
_TITLE, _FACT = 40, 48  # letters
#: Lines that are laid out, cells that are drawn within a minute, and square inches that programs open.
MOST_LINES, MOST_CELLS, MOST_AREA = 2_000, 20_000, 2_000


def relevance_map(summary: Data, title: str) -> Figure:
    """The map of `located.relevance_summary`: relevance per neuron, in units of the average neuron's in that bin."""
    neurons = summary["total"]["neurons"]
    lines = []
    for place, members in _lines(summary):
        width = sum(site["neurons"] for site in members)
        share, chance = _total(members, "bins"), _total(members, "chance_bins")
        lines.append(Line(place, len(members), share * neurons / width, ~(share > chance)))
    metadata = summary["metadata"]
    samples = f"{metadata['samples']} samples of " if metadata.get("samples") else ""
    rules = " ".join(str(metadata[name]) for name in ("composite", "root") if metadata.get(name))
    facts = [
        f"composite {rules}" if rules else "",
        f"target {metadata.get('target', 'lean')}",
        f"axis {summary['axis'] or '(not named)'}: {', '.join(summary['groups'])}",
        f"{samples}{len(summary['labels'])} labels",
    ]
    shares = {row["name"]: row["share"] for row in summary["blocks"]}
    head = "share of", "relevance"
    foot = (
        "Shade: relevance of the layer's neurons against the average neuron of the model, at these timesteps. Hatched:"
        " no more than sampling noise. Beside a block: its share of all |relevance|."
    )
    return _draw(lines, summary["bins"], title, facts, "relevance per neuron (1 = average)", shares, head, foot, 0.5)


def mask_map(summary: Data, title: str) -> Figure:
    """The map of `summary.mask_summary`: how much of each layer is damped away, in percent of its neurons."""
    lines = []
    for place, members in _lines(summary):
        width = sum(site["neurons"] for site in members)
        damping = _total(members, "bins")
        lines.append(Line(place, len(members), 100 * damping / width, np.zeros(len(damping), bool)))
    selection = summary["metadata"].get("selection") or {}
    facts = [
        f"axis {summary['axis'] or '(not named)'}",
        f"chosen by {selection.get('method', 'hand')}",
        f"damped toward {summary['root']}",
        f"{summary['total']['damped']} of {summary['total']['neurons']} neurons damped",
    ]
    shares = {row["name"]: row["damping"] / row["neurons"] for row in summary["blocks"]}
    head = "damped", "in block"
    foot = (
        "Shade: percentage of the layer's neurons that is damped away, at these timesteps. Beside a block: the same of"
        " all its layers and timesteps."
    )
    return _draw(lines, summary["bins"], title, facts, "neurons damped away (%)", shares, head, foot, 1.0)


def _lines(summary: Data) -> list[tuple[Place, list[Data]]]:
    """The sites that share a line: those of a kind and stream in each block, in a U-Net in each stage of a block."""
    rows = {Site(row["name"], row["kind"], row["neurons"]): row for row in summary["sites"]}
    found: dict[tuple[Any, ...], tuple[Place, list[Data]]] = {}
    for site, place in places(rows).items():
        stage = place.stage if place.part in UNET else 0
        key = place.part, place.level, place.what, place.stream, stage
        found.setdefault(key, (place, []))[1].append(rows[site])
    return list(found.values())


def _total(members: list[Data], name: str) -> np.ndarray:
    """(T,) summed over sites, NaN where nothing was measured."""
    values = np.array([[np.nan if value is None else value for value in site[name]] for site in members], float)
    total: np.ndarray = values.sum(0)
    return total


def _draw(
    lines: list[Line],
    bins: list[Data],
    title: str,
    facts: list[str],
    what: str,
    shares: dict[str, float | None],
    share: tuple[str, str],
    foot: str,
    gamma: float,
) -> Figure:
    _check_size(lines, bins, len(lines) <= MOST_LINES and len(lines) * len(bins) <= MOST_CELLS)
    unet = any(line.place.part in UNET for line in lines)
    layout = u_shape(lines, len(bins), shares) if unet else column(lines, len(bins), shares, share)
    width = max(_MARGIN + layout.width + _BAR, _NARROWEST)
    note = textwrap.wrap(f"{foot} {layout.note}", int((width - 2 * _MARGIN) / _LETTER))
    below = _FOOT + _ROW * len(note)
    size = (width, _HEAD + layout.depth + below)
    cells = sum(len(panel.lines) for panel in layout.panels) * len(bins)
    _check_size(lines, bins, cells <= MOST_CELLS and size[0] * size[1] <= MOST_AREA)
    figure = Figure(figsize=size)
    top = max((float(np.nanmax(line.values, initial=0.0)) for line in lines), default=0.0) or 1.0
    norm = PowerNorm(gamma, 0, top) if gamma != 1 else Normalize(0, top)

    def at(x: float, y: float) -> tuple[float, float]:
        """Inches from the upper left of the layout -> the figure's own coordinates."""
        return (_MARGIN + x) / size[0], 1 - (_HEAD + y) / size[1]

    for panel in layout.panels:
        corner = at(panel.x, panel.y + panel.height)
        axes = figure.add_axes((*corner, panel.width / size[0], panel.height / size[1]))
        _panel(axes, panel, norm)
        if panel.timesteps:
            _edges(axes, bins, panel.width)
    for word in layout.words:
        figure.text(*at(word.x, word.y), word.text, fontsize=word.size, fontweight=word.weight, ha=word.align)
    for start, end, style, dashed in layout.arrows:
        look = {"linestyle": (0, (3, 3)), "color": "0.7"} if dashed else {"color": "0.45"}
        figure.add_artist(
            FancyArrowPatch(
                at(*start), at(*end), connectionstyle=style, transform=figure.transFigure, arrowstyle="-|>",
                linewidth=1.0, shrinkA=2, shrinkB=2, mutation_scale=9, **look,
            )
        )  # fmt: skip
    tall = min(0.9 * layout.depth, 4.5)
    lowest = below + (layout.depth - tall) / 2
    bar = figure.add_axes(((width - 0.75) / width, lowest / size[1], 0.14 / width, tall / size[1]))
    figure.colorbar(figure.axes[0].images[0], cax=bar).ax.tick_params(labelsize=7)
    bar.set_ylabel(what, fontsize=8)
    left = _MARGIN / width
    figure.text(left, 1 - 0.28 / size[1], f"{lettered(title, _TITLE)}: {what}", fontsize=11, fontweight="bold")
    figure.text(left, 1 - 0.52 / size[1], " · ".join(lettered(fact, _FACT) for fact in facts if fact), fontsize=8)
    figure.text(left, 0.12 / size[1], "\n".join(note), fontsize=7, color="0.35")
    return as_written(figure)


def _check_size(lines: list[Line], bins: list[Data], fits: bool) -> None:
    if not fits:
        raise InputError(
            f"a picture of {len(lines)} layers at {len(bins)} timestep bins is too large: at most {MOST_LINES} layers,"
            f" {MOST_CELLS} cells and {MOST_AREA} square inches are drawn; leave the picture out, --json has all of it"
        )


def _panel(axes: Axes, panel: Panel, norm: Normalize) -> None:
    """A heat map; grey where nothing was measured, empty where there is no such layer."""
    bins = max(len(line.values) for line in panel.lines if line is not None)
    values = np.stack([np.full(bins, np.nan) if line is None else line.values for line in panel.lines])
    axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_facecolor("0.9")
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=panel.letters)
    if panel.labels_right:
        axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_color("0.6")
    cell = panel.width / bins
    for i, line in enumerate(panel.lines):
        if line is None:
            axes.axhspan(i - 0.5, i + 0.5, color="white", linewidth=0)
    for (i, t), value in np.ndenumerate(values):
        line = panel.lines[i]
        if line is None or not np.isfinite(value):
            continue
        ink = "white" if norm(value) < 0.55 else "black"
        if line.unsure[t]:
            axes.add_patch(
                Rectangle((t - 0.5, i - 0.5), 1, 1, fill=False, hatch="/////", edgecolor=ink, alpha=0.35, linewidth=0)
            )
        if cell >= 0.24 and value:
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            size = min(6.5, 20 * cell, 50 * panel.height / len(panel.lines))
            axes.text(t, i, text, ha="center", va="center", fontsize=size, color=ink)


def _edges(axes: Axes, bins: list[Data], width: float) -> None:
    """Timesteps at the edges of the cells, as many as have room."""
    edges = [bins[0]["from"], *(row["to"] for row in bins)]
    every = max(1, len(bins) // 5, math.ceil(0.45 * len(bins) / width))
    axes.set_xticks(np.arange(0, len(edges), every) - 0.5, [f"{edge:.0f}" for edge in edges[::every]], fontsize=7)
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")  # clear of the next panel
    if (len(edges) - 1) % every == 0:
        labels[-1].set_horizontalalignment("right")
