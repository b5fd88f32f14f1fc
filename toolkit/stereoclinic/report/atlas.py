"""Maps of a denoiser: each layer where it lies in the network, timesteps across, shaded by relevance or damping.

The maps are drawn from the summaries of relevance and of masks. `layouts` says where each map stands.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.report.anatomy import UNET, Place, places
from stereoclinic.report.layouts import BETWEEN_MAPS, KINDS_HEIGHT, LONGEST, SHARE, Line, Page, Section, arrange, arrows
from stereoclinic.report.pictures import as_written, lettered

Data = dict[str, Any]

# Inches.
_MARGIN, _HEAD, _FOOT, _BAR, _NARROWEST = 0.2, 0.75, 0.25, 0.95, 6.4
_LETTER, _ROW = 0.062, 0.13  # of the note
_TITLE, _FACT = 40, 48  # letters
_TIMESTEPS = "timestep: noise to image"
#: What is drawn within a minute, and what programs can open.
MOST_LINES, MOST_CELLS, MOST_AREA = 2_000, 20_000, 2_000


@dataclass(frozen=True)
class _Texts:
    """What stands around a map: title, what the colour shows, facts, what a block's share is, and how to read it."""

    title: str
    unit: str
    facts: list[str]
    share: tuple[str, str]
    note: str


def relevance_map(summary: Data, title: str) -> Figure:
    """Draw `located.relevance_summary`: relevance per neuron, as a multiple of the average neuron's in that bin."""
    neurons = summary["total"]["neurons"]
    lines = []
    for place, sites in _rows(summary):
        width = sum(site["neurons"] for site in sites)
        share, chance = _total(sites, "bins"), _total(sites, "chance_bins")
        lines.append(Line(place, len(sites), share * neurons / width, ~(share > chance)))
    metadata = summary["metadata"]
    samples = f"{metadata['samples']} samples of " if metadata.get("samples") else ""
    rules = " ".join(str(metadata[name]) for name in ("composite", "root") if metadata.get(name))
    facts = [
        f"composite {rules}" if rules else "",
        f"target {metadata.get('target', 'lean')}",
        f"axis {summary['axis'] or '(not named)'}: {', '.join(summary['groups'])}",
        f"{samples}{len(summary['labels'])} labels",
    ]
    note = (
        "Colour: relevance of the layer's neurons, relative to the average neuron of the model at these timesteps."
        " Hatched: no more than sampling noise. Percent: the block's share of all |relevance|."
    )
    texts = _Texts(title, "relevance per neuron (1 = average)", facts, ("share of", "relevance"), note)
    return _draw(lines, summary["bins"], texts, {row["name"]: row["share"] for row in summary["blocks"]}, 0.5)


def mask_map(summary: Data, title: str) -> Figure:
    """Draw `summary.mask_summary`: how much of each layer is damped, in percent of its neurons."""
    lines = []
    for place, sites in _rows(summary):
        damping = _total(sites, "bins")
        percent = 100 * damping / sum(site["neurons"] for site in sites)
        lines.append(Line(place, len(sites), percent, np.zeros(len(damping), bool)))
    facts = [
        f"axis {summary['axis'] or '(not named)'}",
        summary["chosen"],
        f"damped toward {summary['root']}",
        f"{summary['total']['damped']} of {summary['total']['neurons']} neurons damped",
    ]
    note = (
        "Colour: damping of the layer at these timesteps, as a percentage of its neurons. Percent: the same for all"
        " layers and timesteps of the block."
    )
    texts = _Texts(title, "neurons damped (%)", facts, ("damped", "in block"), note)
    shares = {row["name"]: row["damping"] / row["neurons"] for row in summary["blocks"]}
    return _draw(lines, summary["bins"], texts, shares, 1.0)


def _rows(summary: Data) -> list[tuple[Place, list[Data]]]:
    """The sites that share a row: of one kind and stream in a block, and in a U-Net of one stage of the block."""
    rows = {Site(row["name"], row["kind"], row["neurons"]): row for row in summary["sites"]}
    found: dict[tuple[Any, ...], tuple[Place, list[Data]]] = {}
    for site, place in places(rows).items():
        stage = place.stage if place.part in UNET else 0
        key = place.part, place.level, place.what, place.stream, stage
        found.setdefault(key, (place, []))[1].append(rows[site])
    return list(found.values())


def _total(sites: list[Data], name: str) -> np.ndarray:
    """(T,) summed over sites, NaN where nothing was measured."""
    total: np.ndarray = np.array([site[name] for site in sites], float).sum(0)  # None becomes NaN
    return total


def _draw(
    lines: list[Line],
    bins: list[Data],
    texts: _Texts,
    shares: dict[str, float | None],
    gamma: float,
) -> Figure:
    _check_size(lines, bins, len(lines) <= MOST_LINES and len(lines) * len(bins) <= MOST_CELLS)
    layout = arrange(lines, len(bins), shares)
    width = max(_MARGIN + layout.width + _BAR, _NARROWEST)
    note = textwrap.wrap(f"{texts.note} {layout.note}", int((width - 2 * _MARGIN) / _LETTER))
    below = _FOOT + _ROW * len(note)
    page = Page(width, _HEAD + layout.depth + below, _MARGIN, _HEAD)
    cells = sum(len(rows) for section in layout.sections for rows in section.maps.values()) * len(bins)
    _check_size(lines, bins, cells <= MOST_CELLS and page.width * page.height <= MOST_AREA)
    top = max((float(np.nanmax(line.values, initial=0.0)) for line in lines), default=0.0) or 1.0
    norm = PowerNorm(gamma, 0, top)
    for section in layout.sections:
        _section(page, section, bins, norm, texts.share)
    for section in layout.floors[-1]:
        page.text(section.x + section.width / 2, section.y + section.height + 0.29, _TIMESTEPS, 7, "center")
    for arrow in arrows(layout):
        page.arrow(*arrow)
    tall = min(0.9 * layout.depth, 4.5)
    bar = page.axes(width - 0.75 - _MARGIN, (layout.depth - tall) / 2, 0.14, tall)
    page.figure.colorbar(page.figure.axes[0].images[0], cax=bar).ax.tick_params(labelsize=7)
    bar.set_ylabel(texts.unit, fontsize=8)
    page.text(0, 0.28 - _HEAD, f"{lettered(texts.title, _TITLE)}: {texts.unit}", 11, fontweight="bold")
    page.text(0, 0.52 - _HEAD, " · ".join(lettered(fact, _FACT) for fact in texts.facts if fact), 8)
    page.text(0, layout.depth + below - 0.12, "\n".join(note), 7, color="0.35")
    return as_written(page.figure)


def _section(page: Page, section: Section, bins: list[Data], norm: Normalize, share_title: tuple[str, str]) -> None:
    """The maps of a section with their headings, labels and shares."""
    row, letters = section.row_height, min(7.5, 50 * section.row_height)
    heading = section.y - 0.06 - KINDS_HEIGHT * any(section.maps)
    page.text(section.x, heading, section.heading, 8, fontweight="bold")
    for i, (kind, rows) in enumerate(section.maps.items()):
        x = section.x + i * (section.map_width + BETWEEN_MAPS)
        axes = page.axes(x, section.y, section.map_width, section.height)
        _heat_map(axes, rows, norm, section.map_width / len(bins), row)
        _edges(axes, bins, section.map_width)
        axes.set_yticks(range(len(rows)), section.labels if i == 0 else [""] * len(rows), fontsize=letters)
        page.text(x + section.map_width / 2, section.y - 0.05, lettered(kind, LONGEST), 7, "center")
    if section.shares:
        right = section.x + section.width + SHARE
        page.text(right, section.y - 0.05, "\n".join(share_title), 7, "right", linespacing=1.0)
        for i, share in enumerate(section.shares):
            page.text(right, section.y + (i + 0.5) * row + 0.035, share, letters, "right")


def _check_size(lines: list[Line], bins: list[Data], fits: bool) -> None:
    if not fits:
        raise InputError(
            f"a picture of {len(lines)} layers at {len(bins)} timestep bins is too large: at most {MOST_LINES} layers,"
            f" {MOST_CELLS} cells and {MOST_AREA} square inches are drawn; leave the picture out, --json has all of it"
        )


def _heat_map(axes: Axes, rows: Sequence[Line | None], norm: Normalize, cell_width: float, cell_height: float) -> None:
    """Grey where nothing was measured, white where a block has no such layer, hatched within sampling noise."""
    bins = max(len(line.values) for line in rows if line is not None)
    values = np.stack([np.full(bins, np.nan) if line is None else line.values for line in rows])
    axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_facecolor("0.9")
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_color("0.6")
    for i, line in enumerate(rows):
        if line is None:
            axes.axhspan(i - 0.5, i + 0.5, color="white", linewidth=0)
    for (i, t), value in np.ndenumerate(values):
        line = rows[i]
        if line is None or not np.isfinite(value):
            continue
        ink = "white" if norm(value) < 0.55 else "black"
        if line.unsure[t]:
            look: Data = {"hatch": "/////", "edgecolor": ink, "alpha": 0.35, "linewidth": 0}
            axes.add_patch(Rectangle((t - 0.5, i - 0.5), 1, 1, fill=False, **look))
        if cell_width >= 0.24 and value:
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            size = min(6.5, 20 * cell_width, 50 * cell_height)
            axes.text(t, i, text, ha="center", va="center", fontsize=size, color=ink)


def _edges(axes: Axes, bins: list[Data], width: float) -> None:
    """Label the edges of the cells with timesteps, as many as have room."""
    edges = [bins[0]["from"], *(row["to"] for row in bins)]
    every = max(1, len(bins) // 5, math.ceil(0.45 * len(bins) / width))
    axes.set_xticks(np.arange(0, len(edges), every) - 0.5, [f"{edge:.0f}" for edge in edges[::every]], fontsize=7)
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")  # clear of the next map
    if (len(edges) - 1) % every == 0:
        labels[-1].set_horizontalalignment("right")
