"""Where each heat map stands in the picture of a denoiser, in inches from the upper left.

A U-Net is drawn as a U. Each block is one map with a row for each stage and kind of layer:

    down 0  [ ][ ][ ] - - > [ ][ ][ ]  up 2
               v                ^
    down 1  [ ][ ][ ] - - > [ ][ ][ ]  up 1
                  v          ^
                  [ ][ ][ ]  mid

A transformer is a column of blocks from input to output. Each kind of layer is one map with a row for each block.
Layers of image tokens and of text tokens stand side by side:

          blocks: image           blocks: text
      0  [ ][ ][ ] [ ][ ][ ]   0  [ ][ ][ ] [ ][ ][ ]
      1  [ ][ ][ ] [ ][ ][ ]   1  [ ][ ][ ] [ ][ ][ ]
                      v              v
                   single blocks: image and text
               0  [ ][ ][ ] [ ][ ][ ]
               1  [ ][ ][ ] [ ][ ][ ]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from stereoclinic.report.anatomy import KINDS, OTHER, STREAMS, UNET, Place
from stereoclinic.report.pictures import lettered

Shares = Mapping[str, float | None]
Point = tuple[float, float]

_WIDTH = 6.8  # of the whole
_ROW, _LETTER = 0.2, 0.062  # the height of a row; the width of a letter in its label
_NARROWEST_MAP, _WIDEST_CELL, BETWEEN_MAPS = 0.8, 0.46, 0.2
_HEADING, KINDS_HEIGHT, _TICKS, _GAP = 0.22, 0.24, 0.12, 0.3
SHARE = 0.55  # the width of the column of shares
LONGEST = 48  # letters of a label or a heading
_COLUMNS = {"image": "left", "text": "right"}  # of a stream's section


class Page:
    """A figure that is drawn on in inches from the upper left.

    Args:
        width: Of the figure.
        height: Of the figure.
        left: Where x is 0.
        top: Where y is 0.
    """

    def __init__(self, width: float, height: float, left: float = 0.0, top: float = 0.0) -> None:
        self.width, self.height, self.left, self.top = width, height, left, top
        self.figure = Figure(figsize=(width, height))

    def at(self, x: float, y: float) -> Point:
        """In the figure's own coordinates."""
        return (self.left + x) / self.width, 1 - (self.top + y) / self.height

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with the upper left corner x, y."""
        return self.figure.add_axes((*self.at(x, y + height), width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, size: float, align: str = "left", **look: Any) -> None:
        """Text above the lower edge y."""
        self.figure.text(*self.at(x, y), text, fontsize=size, ha=align, **look)

    def arrow(self, start: Point, end: Point, dashed: bool) -> None:
        """A straight arrow."""
        look: dict[str, Any] = {"linestyle": (0, (3, 3)), "color": "0.7"} if dashed else {"color": "0.45"}
        look |= {"arrowstyle": "-|>", "linewidth": 1.0, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 9}
        ends = self.at(*start), self.at(*end)
        self.figure.add_artist(FancyArrowPatch(*ends, transform=self.figure.transFigure, **look))


@dataclass
class Line:
    """One row of a map, a cell for each timestep bin: layers of one kind that lie together.

    Args:
        place: Of the first layer.
        layers: How many layers the row adds up.
        values: (T,) what the colour shows, NaN where nothing was measured.
        unsure: (T,) bool, cells that show no more than sampling noise.
    """

    place: Place
    layers: int
    values: np.ndarray
    unsure: np.ndarray

    @property
    def label(self) -> str:
        return lettered(self.place.name, LONGEST) + (f" x{self.layers}" if self.layers > 1 else "")


@dataclass
class Section:
    """Maps under one heading, with the same rows: one block of a U-Net, or one stream of a list of blocks.

    Args:
        part: As in `Place`.
        column: "left", "right" or "middle".
        heading: Stands above the maps.
        labels: Of the rows.
        maps: Rows of each map, by the name of its kind; the name is empty where there is one map.
        shares: Stand at the right of the rows; may be empty.
        x: Left edge of the first map.
        y: Upper edge of the maps.
        map_width: Of each map.
        row_height: Of each row.
    """

    part: str
    column: str
    heading: str
    labels: list[str]
    maps: Mapping[str, Sequence[Line | None]]
    shares: list[str] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    map_width: float = 0.0
    row_height: float = 0.0

    @property
    def width(self) -> float:
        """The width of all maps."""
        return len(self.maps) * (self.map_width + BETWEEN_MAPS) - BETWEEN_MAPS

    @property
    def height(self) -> float:
        """The height of the maps."""
        return self.row_height * len(self.labels)

    @property
    def margin(self) -> float:
        """The width of the labels."""
        return _LETTER * max(map(len, self.labels)) + 0.12

    @property
    def head(self) -> float:
        """The height of the headings."""
        return _HEADING + KINDS_HEIGHT * any(self.maps)


@dataclass
class Layout:
    """A picture without its frame: width and depth in inches, and what the reader must know about it."""

    floors: list[list[Section]]
    note: str
    width: float = 0.0
    depth: float = 0.0

    @property
    def sections(self) -> list[Section]:
        """From input to output."""
        return [section for floor in self.floors for section in floor]


def arrange(lines: Sequence[Line], bins: int, shares: Shares) -> Layout:
    """Lay out the maps of a denoiser.

    Args:
        lines: In the order that data passes them.
        bins: Number of timestep bins.
        shares: Of each block.
    """
    if any(line.place.part in UNET for line in lines):
        layout = Layout(_unet_floors(lines, shares), "")
    else:
        layout = Layout(_transformer_floors(lines, shares), "Blocks run from input (top) to output (bottom).")
        if any(None in rows for section in layout.sections for rows in section.maps.values()):
            layout.note += " White: a block without such a layer."
    _place(layout, bins)
    return layout


def _place(layout: Layout, bins: int) -> None:
    """Give each section its place, and the layout its size. All maps have the same width."""
    sections = layout.sections
    halves = [section for section in sections if section.column != "middle"]
    margin = max([section.margin for section in sections if section.part != OTHER] or [sections[0].margin])

    def widest_map(section: Section) -> float:
        room = _WIDTH if section.column == "middle" else _WIDTH / 2
        return (room - max(margin, section.margin) - SHARE + BETWEEN_MAPS) / len(section.maps) - BETWEEN_MAPS

    width = max(_NARROWEST_MAP, min(max(1.2, _WIDEST_CELL * bins), *map(widest_map, sections)))
    rows = sum(max(len(section.labels) for section in floor) for floor in layout.floors)
    for section in sections:
        section.map_width, section.row_height = width, min(_ROW, max(0.125, 7.4 / rows))
    half = margin + max((section.width for section in halves), default=0.0) + SHARE
    for section in sections:
        middle = max(half - section.width / 2 if halves else margin, section.margin)
        section.x = {"left": margin, "right": half + margin, "middle": middle}[section.column]
    for floor in layout.floors:
        head, height = (max(sizes) for sizes in zip(*((each.head, each.height) for each in floor), strict=True))
        for section in floor:
            section.y = layout.depth + head + (height - section.height) / 2
        layout.depth += head + height + _TICKS + _GAP
    layout.width = max(section.x + section.width + SHARE for section in sections)


def arrows(layout: Layout) -> Iterator[tuple[Point, Point, bool]]:
    """Where data flows: start, end, and whether the arrow is dashed, as skip connections are."""
    for floor in layout.floors:
        if len(floor) == 2 and floor[1].part == "up":
            left, right = floor
            y = left.y + left.height / 2
            yield (left.x + left.width, y), (right.x - right.margin, y), True
    for above, floor in pairwise(layout.floors):
        for upper, lower in product(above, floor):
            if OTHER in (upper.part, lower.part) or {upper.column, lower.column} == {"left", "right"}:
                continue
            x = (max(upper.x, lower.x) + min(upper.x + upper.width, lower.x + lower.width)) / 2
            ends = (x, upper.y + upper.height + _TICKS + 0.03), (x, lower.y - lower.head + 0.02)
            yield (*(ends[::-1] if upper.part == "up" else ends), False)


def _unet_floors(lines: Sequence[Line], shares: Shares) -> list[list[Section]]:
    """Each floor holds a block of the way down and the block of the way up that its skip connections lead to."""
    blocks: dict[str, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.place.block, []).append(line)
    deepest = max((line.place.level for line in lines if line.place.part in ("down", "up")), default=-1)
    names = [(f"down {i}", f"up {deepest - i}") for i in range(deepest + 1)] + [("mid",), (OTHER,)]

    def section(name: str) -> Section:
        part = name.split()[0]
        rows = blocks[name][::-1] if part == "up" else blocks[name]  # the way up is read upwards, as data goes
        heading = f"{name}   {_percent(shares.get(name))}".strip()
        column = {"down": "left", "up": "right"}.get(part, "middle")
        return Section(part, column, heading, [line.label for line in rows], {"": rows})

    floors = [[section(name) for name in floor if name in blocks] for floor in names]
    return [floor for floor in floors if floor]


def _transformer_floors(lines: Sequence[Line], shares: Shares) -> list[list[Section]]:
    """From input to output; a floor holds one list of blocks, or one of image and one of text tokens."""
    parts: dict[str, list[Line]] = {}
    for line in lines:
        parts.setdefault(line.place.part, []).append(line)
    floors: list[list[Section]] = []
    for part, members in parts.items():
        sections = _block_sections(part, members, shares)
        pair = [*(floors[-1] if floors else []), *sections]
        if floors and sorted(section.column for section in pair) == ["left", "right"]:
            floors[-1] = sorted(pair, key=lambda section: section.column)
        else:
            floors.append(sections)
    return floors


def _block_sections(part: str, lines: Sequence[Line], shares: Shares) -> list[Section]:
    """One section for each stream of a list of blocks."""
    if part == OTHER:
        return [Section(part, "middle", "outside of all blocks", [line.label for line in lines], {"": lines})]
    blocks = dict(sorted((line.place.level, line.place.block) for line in lines))
    rows, place = {number: i for i, number in enumerate(blocks)}, lines[0].place
    name = place.blocks + "s" * place.blocks.endswith(("block", "layer"))
    heading = place.block if len(blocks) == 1 else f"{name} {min(rows)} to {max(rows)}"
    sections = []
    for stream in ("", *STREAMS):
        maps: dict[str, list[Line | None]] = {}
        for line in sorted(lines, key=lambda line: list(KINDS).index(line.place.kind)):
            if line.place.stream == stream:
                maps.setdefault(line.place.what, [None] * len(blocks))[rows[line.place.level]] = line
        if maps:
            full = lettered(f"{heading}: {STREAMS[stream]}" if stream else heading, LONGEST)
            sections.append(Section(part, _COLUMNS.get(stream, "middle"), full, list(map(str, blocks)), maps))
    sections[-1].shares = [_percent(shares.get(block)) for block in blocks.values()]
    return sections


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
