"""What lies where on a map of a denoiser, in inches from its upper left.

A U-Net goes down the left, through the middle and up the right, a line for each kind of layer in each stage:

    down 0  [ ][ ][ ] - - - [ ][ ][ ]  up 2
               v                ^
    down 1  [ ][ ][ ] - - - [ ][ ][ ]  up 1
               '--> [ ][ ][ ] --'
                       mid

A transformer is a column of blocks, a line each, from input to output; image and text side by side, or together:

          blocks: image           blocks: text
      0  [ ][ ][ ] [ ][ ][ ]   0  [ ][ ][ ] [ ][ ][ ]
      1  [ ][ ][ ] [ ][ ][ ]   1  [ ][ ][ ] [ ][ ][ ]
                      v              v
                   single blocks: image and text
               0  [ ][ ][ ] [ ][ ][ ]
               1  [ ][ ][ ] [ ][ ][ ]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stereoclinic.report.anatomy import KINDS, OTHER, STREAMS, Place
from stereoclinic.report.pictures import lettered

Shares = Mapping[str, float | None]

_LINE, _TITLE, _GAP, _BETWEEN = 0.2, 0.22, 0.3, 1.7
_NARROWEST = 1.6  # block, so that its heading leaves room for an arrow
_LETTER = 0.062  # of a line's label
_LONGEST = 48  # letters of a label or a heading
_AXIS = "timestep: noise to image"


@dataclass
class Line:
    """A row of cells, one a timestep bin: layers of one kind that lie together.

    Args:
        place: Of the first of them.
        layers: How many; the deep transformers of larger U-Nets are summed up.
        values: (T,) what is coloured, NaN where nothing was measured.
        unsure: (T,) cells that show no more than chance would.
    """

    place: Place
    layers: int
    values: np.ndarray
    unsure: np.ndarray

    @property
    def label(self) -> str:
        return lettered(self.place.name, _LONGEST) + (f" x{self.layers}" if self.layers > 1 else "")


@dataclass
class Panel:
    """A heat map: lines, None where there is no such layer, and a label for each, or none."""

    x: float
    y: float
    width: float
    height: float
    lines: Sequence[Line | None]
    labels: Sequence[str]
    labels_right: bool = False
    letters: float = 7.5
    timesteps: bool = False


@dataclass
class Word:
    """Text, from its lower edge."""

    x: float
    y: float
    text: str
    size: float = 8
    weight: str = "bold"
    align: str = "left"


Point = tuple[float, float]


@dataclass
class Layout:
    """A map without its frame.

    Args:
        width: In inches.
        depth: In inches.
        panels: Heat maps.
        words: Headings and the like.
        arrows: Start, end, connection style and whether it is dashed.
        note: What the reader has to know of it.
    """

    width: float
    depth: float
    panels: list[Panel] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    arrows: list[tuple[Point, Point, str, bool]] = field(default_factory=list)
    note: str = ""

    def arrow(self, start: Point, end: Point, style: str = "arc3", dashed: bool = False) -> None:
        """Add one."""
        self.arrows.append((start, end, style, dashed))


def u_shape(lines: Sequence[Line], bins: int, shares: Shares) -> Layout:
    """The map of a U-Net."""
    blocks: dict[str, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.place.block, []).append(line)
    cell = max(min(0.46, max(0.14, 4.0 / bins)), _NARROWEST / bins)
    width = cell * bins
    label = _LETTER * max((len(line.label) for line in lines if line.place.part != OTHER), default=0) + 0.12
    deepest = max((line.place.level for line in lines if line.place.part in ("down", "up")), default=-1)
    # One floor of the U holds a way down and the way up that its skip connections lead to.
    floors = [(f"down {i}", f"up {deepest - i}") for i in range(deepest + 1)]
    floors = [pair for pair in floors if any(name in blocks for name in pair)]
    last = [name for name in ("mid", OTHER) if name in blocks]

    def height(*names: str) -> float:
        return _LINE * max(len(blocks.get(name, ())) for name in names)

    right = label + width + _BETWEEN
    middle = label + width + _BETWEEN / 2 - width / 2 if floors else label
    boxes: dict[str, Point] = {}
    y = 0.0
    for pair in floors:
        for name, x in zip(pair, (label, right), strict=True):
            if name in blocks:
                boxes[name] = (x, y + _TITLE + (height(*pair) - height(name)) / 2)
        y += height(*pair) + _TITLE + _GAP
    for name in last:
        boxes[name] = (middle, y + _TITLE)
        y += height(name) + _TITLE + _GAP
    found = Layout(2 * (label + width) + _BETWEEN if floors else label + width + 2.0, y)

    for name, (x, top) in boxes.items():
        rises = name.startswith("up")
        rows = blocks[name][::-1] if rises else blocks[name]  # the way up is read upwards, as data goes
        lowest = name in (last[-1:] or floors[-1])
        found.panels.append(
            Panel(x, top, width, height(name), rows, [line.label for line in rows], rises, timesteps=lowest)
        )
        side, align = (x, "left") if rises else (x + width, "right")
        if name in last:
            side, align = x + width / 2, "center"
        found.words.append(Word(side, top - 0.06, _headed(name, shares), align=align))
        if lowest:
            found.words.append(Word(x + width / 2, top + height(name) + 0.29, _AXIS, 7, "normal", "center"))

    def lane(name: str) -> float:  # on the outer side, for a block's heading is on the inner
        return boxes[name][0] + width * (0.88 if name.startswith("up") else 0.12)

    def below(name: str) -> float:
        return boxes[name][1] + height(name)

    ways = [[pair[side] for pair in floors if pair[side] in boxes] for side in (0, 1)]
    for upper, lower in zip(ways[0], ways[0][1:], strict=False):
        found.arrow((lane(upper), below(upper)), (lane(lower), boxes[lower][1] - 0.02))
    for upper, lower in zip(ways[1], ways[1][1:], strict=False):
        found.arrow((lane(lower), boxes[lower][1]), (lane(upper), below(upper)))
    for pair in floors:
        if all(name in boxes for name in pair):
            across = [boxes[name][1] + height(name) / 2 for name in pair]
            found.arrow((label + width, across[0]), (right - 0.02, across[1]), dashed=True)
    if "mid" in boxes and all(ways):
        level = boxes["mid"][1] + height("mid") / 2
        down, up = ways[0][-1], ways[1][-1]
        found.arrow((lane(down), below(down)), (middle - label, level), "angle,angleA=-90,angleB=180,rad=0")
        found.arrow((middle + width, level), (lane(up), below(up)), "angle,angleA=0,angleB=90,rad=0")
    return found


def _headed(name: str, shares: Shares) -> str:
    return "   ".join(filter(None, (lettered(name, _LONGEST), _percent(shares.get(name)))))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


_WIDE, _MAP, _CELL, _INNER = 6.8, 0.8, 0.46, 0.2  # all of it; the narrowest map; the widest cell; between two maps
_HEADS, _TICKS, _SHARE = 0.46, 0.12, 0.55
_SIDES = ("image", "text")  # from left to right


@dataclass
class _Section:
    """One stream of one list of blocks: a row for each block, a map for each kind of layer."""

    part: str
    stream: str
    heading: str
    blocks: list[str]
    labels: list[str]
    maps: dict[str, list[Line | None]]
    shares: bool  # whether its blocks' shares stand beside it
    x: float = 0.0
    width: float = 0.0

    @property
    def margin(self) -> float:
        """What its labels need."""
        return _LETTER * max(map(len, self.labels)) + 0.12

    def below(self, other: "_Section") -> float | None:
        """Where an arrow comes down from another; None where no data does."""
        if OTHER in (self.part, other.part) or {self.stream, other.stream} == {*_SIDES}:
            return None
        return (max(self.x, other.x) + min(self.x + self.width, other.x + other.width)) / 2


def column(lines: Sequence[Line], bins: int, shares: Shares, share: tuple[str, str]) -> Layout:
    """The map of a transformer, or of a network that is not known.

    Args:
        lines: In the order that data meets them.
        bins: How many timestep bins.
        shares: Of each block.
        share: What they are, in two lines.
    """
    floors = _floors(lines)
    sections = [section for floor in floors for section in floor]
    heights = [max(len(section.labels) for section in floor) for floor in floors]
    beside = [section for section in sections if section.stream in _SIDES]
    margin = max([section.margin for section in sections if section.part != OTHER] or [sections[0].margin])

    def room(section: _Section) -> float:
        """The widest that its maps can be."""
        wide = _WIDE / 2 if section.stream in _SIDES else _WIDE
        return (wide - max(margin, section.margin) - _SHARE + _INNER) / len(section.maps) - _INNER

    width = max(_MAP, min(*map(room, sections), max(1.2, _CELL * bins)))
    side = margin + max((len(section.maps) for section in beside), default=0) * (width + _INNER) - _INNER + _SHARE
    line = min(_LINE, max(0.125, 7.4 / sum(heights)))
    for section in sections:
        section.width = len(section.maps) * (width + _INNER) - _INNER
        middle = max(side - section.width / 2 if beside else margin, section.margin)
        section.x = {"image": margin, "text": side + margin}.get(section.stream, middle)
    found = Layout(max(section.x + section.width + _SHARE for section in sections), 0.0)
    found.note = "Blocks run from input (top) to output (bottom)."
    if any(None in rows for section in sections for rows in section.maps.values()):
        found.note += " White: a block without such a layer."
    for above, floor, height in zip([[], *floors], floors, heights, strict=False):
        for section in floor:
            for x in filter(None, map(section.below, above)):
                found.arrow((x, found.depth - _GAP + 0.03), (x, found.depth + 0.02))
            _put(found, section, width, line, shares, share)
        found.depth += _HEADS + line * height + _TICKS + _GAP
    for section in floors[-1]:
        middle = section.x + section.width / 2
        found.words.append(Word(middle, found.depth - _GAP + 0.17, _AXIS, 7, "normal", "center"))
    return found


def _put(found: Layout, section: _Section, width: float, line: float, shares: Shares, share: tuple[str, str]) -> None:
    """Add a section's maps with their headings, at the depth that was reached."""
    top, letters = found.depth + _HEADS, min(7.5, 50 * line)
    found.words.append(Word(section.x, top - 0.3, section.heading))
    for i, (kind, rows) in enumerate(section.maps.items()):
        x = section.x + i * (width + _INNER)
        labels = section.labels if i == 0 else [""] * len(rows)
        found.panels.append(Panel(x, top, width, line * len(rows), rows, labels, letters=letters, timesteps=True))
        found.words.append(Word(x + width / 2, top - 0.05, lettered(kind, _LONGEST), 7, "normal", "center"))
    if section.shares:
        right = section.x + section.width + _SHARE
        words = [(share[0], top - 0.17, 7.0), (share[1], top - 0.05, 7.0)]
        for i, block in enumerate(section.blocks):
            words.append((_percent(shares.get(block)), top + (i + 0.5) * line + 0.035, letters))
        found.words += [Word(right, y, text, size, "normal", "right") for text, y, size in words]


def _floors(lines: Sequence[Line]) -> list[list[_Section]]:
    """Sections from input to output; those beside each other are of image and text."""
    parts: dict[str, list[Line]] = {}
    for line in lines:
        parts.setdefault(line.place.part, []).append(line)
    floors: list[list[_Section]] = []
    for part, members in parts.items():
        sections = _sections(part, members)
        both = [*(floors[-1] if floors else []), *sections]
        if floors and sorted(section.stream for section in both) == sorted(_SIDES):
            floors[-1] = sorted(both, key=lambda section: section.stream)
        else:
            floors.append(sections)
    return floors


def _sections(part: str, lines: Sequence[Line]) -> list[_Section]:
    """Of one list of blocks, one for each stream."""
    if part == OTHER:
        labels = [lettered(line.place.name, _LONGEST) for line in lines]
        return [_Section(part, "", "outside of all blocks", [], labels, {"": list(lines)}, False)]
    blocks = dict(sorted((line.place.level, line.place.block) for line in lines))
    numbers, place = {number: i for i, number in enumerate(blocks)}, lines[0].place
    many = place.blocks + "s" * place.blocks.endswith(("block", "layer"))
    heading = place.block if len(blocks) == 1 else f"{many} {min(numbers)} to {max(numbers)}"
    sections = []
    for stream in ("", *STREAMS):
        maps: dict[str, list[Line | None]] = {}
        for line in sorted(lines, key=lambda line: list(KINDS).index(line.place.kind)):
            if line.place.stream == stream:
                rows = maps.setdefault(line.place.what, [None] * len(blocks))
                rows[numbers[line.place.level]] = line
        if maps:
            full = lettered(f"{heading}: {STREAMS[stream]}" if stream else heading, _LONGEST)
            sections.append(_Section(part, stream, full, list(blocks.values()), list(map(str, blocks)), maps, False))
    sections[-1].shares = True
    return sections
