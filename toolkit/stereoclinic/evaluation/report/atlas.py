"""A map of the UNet: its blocks down the left, through the middle and up the right, one line a layer, timesteps across.

    down 0  [ ][ ][ ] - - - [ ][ ][ ]  up 2
               v                ^
    down 1  [ ][ ][ ] - - - [ ][ ][ ]  up 1
               '--> [ ][ ][ ] --'
                       mid

The same map serves relevance and masks; it is drawn from their summaries.
"""

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from stereoclinic.ddtd.neurons import Site
from stereoclinic.evaluation.report.anatomy import Place, place_of

Data = dict[str, Any]

# Inches.
_LINE, _TITLE, _GAP, _BETWEEN, _MARGIN = 0.2, 0.22, 0.3, 1.7, 0.2
_HEAD, _FOOT, _BAR = 0.75, 0.5, 0.95
_NARROWEST = 1.6  # block, so that its heading leaves room for an arrow
_LETTER = 0.062  # of a row's label, and of the foot


@dataclass
class Line:
    """A row of cells: the layers of one kind in one stage of a block, a value a timestep bin.

    Args:
        place: Of the first of them.
        layers: How many; the deep transformers of larger models are summed up.
        values: (T,) what is coloured, NaN where nothing was measured.
        unsure: (T,) cells that show no more than chance would.
    """

    place: Place
    layers: int
    values: np.ndarray
    unsure: np.ndarray

    @property
    def label(self) -> str:
        return self.place.name + (f" x{self.layers}" if self.layers > 1 else "")


def relevance_map(summary: Data, title: str) -> Figure:
    """The map of `located.relevance_summary`: relevance per neuron, in units of the average neuron's in that bin."""
    neurons = summary["total"]["neurons"]
    lines = []
    for place, members in _stages(summary):
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
    foot = (
        "Figures: relevance of a neuron against the average neuron of the whole model at these timesteps. Beside a"
        " block: its share of |relevance|. Hatched: no more than standard errors alone would show."
    )
    return _draw(lines, summary["bins"], title, facts, "relevance per neuron (1 = average)", shares, foot, 0.5)


def mask_map(summary: Data, title: str) -> Figure:
    """The map of `summary.mask_summary`: how much of each layer is damped away, in percent of its neurons."""
    lines = []
    for place, members in _stages(summary):
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
    foot = "Figures: neurons damped away, in % of the layer's. Beside a block: of all its layers, mean over timesteps."
    return _draw(lines, summary["bins"], title, facts, "neurons damped away (%)", shares, foot, 1.0)


def _stages(summary: Data) -> list[tuple[Place, list[Data]]]:
    """The sites of each kind in each stage of a block, as data meets them."""
    found: dict[tuple[str, str, int, str], list[tuple[Place, Data]]] = {}
    for site in summary["sites"]:
        place = place_of(Site(site["name"], site["kind"], site["neurons"]))
        alone = place.path if place.part == "other" else ""
        found.setdefault((place.block, place.kind, place.stage, alone), []).append((place, site))
    stages = [(min((place for place, _ in each), key=_order), [site for _, site in each]) for each in found.values()]
    return sorted(stages, key=lambda stage: _order(stage[0]))


def _order(place: Place) -> tuple[int, ...]:
    return place.order


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
    foot: str,
    gamma: float,
) -> Figure:
    blocks: dict[str, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.place.block, []).append(line)
    cell = max(min(0.46, max(0.14, 4.0 / len(bins))), _NARROWEST / len(bins))
    width = cell * len(bins)
    label = _LETTER * max((len(line.label) for line in lines), default=0) + 0.12
    deepest = max((line.place.level for line in lines if line.place.part in ("down", "up")), default=-1)
    # One floor of the U holds a way down and the way up that its skip connections lead to.
    floors = [(f"down {i}", f"up {deepest - i}") for i in range(deepest + 1)]
    floors = [pair for pair in floors if any(name in blocks for name in pair)]

    def height(*names: str) -> float:
        return _LINE * max(len(blocks.get(name, ())) for name in names)

    depth = sum(height(*pair) + _TITLE + _GAP for pair in floors)
    depth += sum(height(name) + _TITLE + _GAP for name in ("mid", "other") if name in blocks)
    wide = 2 * (label + width) + _BETWEEN if floors else label + width + 2.0
    size = (max(_MARGIN + wide + _BAR, 6.4), _HEAD + depth + _FOOT)
    figure = Figure(figsize=size)
    left = _MARGIN + label
    right = left + width + _BETWEEN
    middle = left + width + _BETWEEN / 2 - width / 2 if floors else left
    top = max((float(np.nanmax(line.values, initial=0.0)) for line in lines), default=0.0) or 1.0
    norm = PowerNorm(gamma, 0, top) if gamma != 1 else Normalize(0, top)
    boxes: dict[str, tuple[float, float, float]] = {}  # x, y of the upper edge, height

    y = _HEAD
    for pair in floors:
        for name, x in zip(pair, (left, right), strict=True):
            if name in blocks:
                boxes[name] = (x, y + _TITLE + (height(*pair) - height(name)) / 2, height(name))
        y += height(*pair) + _TITLE + _GAP
    for name in ("mid", "other"):
        if name in blocks:
            boxes[name] = (middle, y + _TITLE, height(name))
            y += height(name) + _TITLE + _GAP

    lowest = {"mid", "other"} & boxes.keys() or set(floors[-1])
    for name, (x, start, tall) in boxes.items():
        axes = figure.add_axes((x / size[0], 1 - (start + tall) / size[1], width / size[0], tall / size[1]))
        # The way up is read upwards, as data goes.
        rows = blocks[name][::-1] if name.startswith("up") else blocks[name]
        _panel(axes, rows, norm, cell, labels_right=name.startswith("up"))
        share = shares.get(name)
        head = name if share is None else f"{name}   {100 * share:.1f} %"
        side, align = (x, "left") if name.startswith("up") else (x + width, "right")
        if name in ("mid", "other"):
            side, align = x + width / 2, "center"
        above = 1 - (start - 0.06) / size[1]
        figure.text(side / size[0], above, head, fontsize=8, fontweight="bold", ha=align)
        if name in lowest:
            _edges(axes, bins)
    _flow(figure, size, boxes, floors, width, label)

    tall = min(0.9 * depth, 4.5)
    middle = _FOOT + (depth - tall) / 2
    bar = figure.add_axes(((size[0] - 0.75) / size[0], middle / size[1], 0.14 / size[0], tall / size[1]))
    figure.colorbar(figure.axes[0].images[0], cax=bar).ax.tick_params(labelsize=7)
    bar.set_ylabel(what, fontsize=8)
    figure.text(_MARGIN / size[0], 1 - 0.28 / size[1], f"{title}: {what}", fontsize=11, fontweight="bold")
    figure.text(_MARGIN / size[0], 1 - 0.52 / size[1], " · ".join(filter(None, facts)), fontsize=8)
    foot = textwrap.fill(foot, int((size[0] - 2 * _MARGIN) / _LETTER))
    figure.text(_MARGIN / size[0], 0.12 / size[1], foot, fontsize=7, color="0.35")
    return figure


def _panel(axes: Axes, rows: list[Line], norm: Normalize, cell: float, labels_right: bool) -> None:
    """One block: a heat map of its layers."""
    values = np.stack([row.values for row in rows])
    axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_facecolor("0.9")
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7.5)
    if labels_right:
        axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_color("0.6")
    for (i, t), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        ink = "white" if norm(value) < 0.55 else "black"
        if rows[i].unsure[t]:
            axes.add_patch(
                Rectangle((t - 0.5, i - 0.5), 1, 1, fill=False, hatch="/////", edgecolor=ink, alpha=0.35, linewidth=0)
            )
        if cell >= 0.3 and value:
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            axes.text(t, i, text, ha="center", va="center", fontsize=6.5, color=ink)


def _edges(axes: Axes, bins: list[Data]) -> None:
    """Timesteps at the edges of the cells, as many as have room."""
    every = max(1, len(bins) // 5)
    edges = [bins[0]["from"], *(row["to"] for row in bins)]
    axes.set_xticks(np.arange(0, len(edges), every) - 0.5, [f"{edge:.0f}" for edge in edges[::every]], fontsize=7)
    axes.set_xlabel("timestep: noise to image", fontsize=7, labelpad=1)


def _flow(
    figure: Figure,
    size: tuple[float, float],
    boxes: dict[str, tuple[float, float, float]],
    floors: list[tuple[str, str]],
    width: float,
    label: float,
) -> None:
    """Arrows along the U, dashes for the skip connections across it."""

    def arrow(start: tuple[float, float], end: tuple[float, float], style: str = "arc3", **options: Any) -> None:
        patch = FancyArrowPatch(
            *((x / size[0], 1 - y / size[1]) for x, y in (start, end)),
            connectionstyle=style, transform=figure.transFigure, shrinkA=2, shrinkB=2, mutation_scale=9,
            **{"color": "0.45", "arrowstyle": "-|>", "linewidth": 1.0, **options},
        )  # fmt: skip
        figure.add_artist(patch)

    def lane(name: str) -> float:  # on the outer side, for a block's heading is on the inner
        return boxes[name][0] + width * (0.88 if name.startswith("up") else 0.12)

    def below(name: str) -> float:
        return boxes[name][1] + boxes[name][2]

    ways = [[pair[side] for pair in floors if pair[side] in boxes] for side in (0, 1)]
    for upper, lower in zip(ways[0], ways[0][1:], strict=False):
        arrow((lane(upper), below(upper)), (lane(lower), boxes[lower][1] - 0.02))
    for upper, lower in zip(ways[1], ways[1][1:], strict=False):
        arrow((lane(lower), boxes[lower][1]), (lane(upper), below(upper)))
    for down, up in floors:
        if down in boxes and up in boxes:
            across = [boxes[name][1] + boxes[name][2] / 2 for name in (down, up)]
            arrow(
                (boxes[down][0] + width, across[0]), (boxes[up][0] - 0.02, across[1]), linestyle=(0, (3, 3)),
                color="0.7",
            )  # fmt: skip
    if "mid" in boxes and ways[0] and ways[1]:
        level = boxes["mid"][1] + boxes["mid"][2] / 2
        down, up = ways[0][-1], ways[1][-1]
        arrow((lane(down), below(down)), (boxes["mid"][0] - label, level), "angle,angleA=-90,angleB=180,rad=0")
        arrow((boxes["mid"][0] + width, level), (lane(up), below(up)), "angle,angleA=0,angleB=90,rad=0")
