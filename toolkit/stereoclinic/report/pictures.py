"""Images for the report: the same seeds by several arms, small enough to embed; and text in images.

All text in images is set in DejaVu Sans, which comes with matplotlib. Long names are cut, signs that the font lacks
are escaped, and no name is read as a formula.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image, ImageFont
from torch import Tensor

from stereoclinic.evaluation.arms import BALANCED, UNTREATED, Drawn, Experiment
from stereoclinic.io.text import escaped, printable
from stereoclinic.prompts.sets import write

SEEDS = 4  # for each prompt, as long as they fit
BUDGET = 2_200_000  # characters of all pictures of a report; with them it stays below 3 MB
_SIDE = 128  # pixels; larger pictures are made smaller
_SURE = 0.8  # as `shares.unsure_rate` counts


@dataclass(frozen=True)
class Thumbnail:
    """One image, and what the reader sees in it: its top group, with its probability among all that it may see."""

    source: str  # a data: address
    seed: int
    group: str
    probability: float
    unsure: bool


@dataclass(frozen=True)
class Card:
    """One prompt: for each arm the same seeds, in the same order."""

    label: str
    prompt: str
    rows: list[tuple[str, list[Thumbnail]]]


@dataclass(frozen=True)
class Grid:
    """The images of one experiment, and how many prompts had no room."""

    cards: list[Card]
    left_out: int


def grids(experiments: Sequence[Experiment], budget: int = BUDGET) -> list[Grid]:
    """One grid for each experiment: the untreated model and every mask, or the balanced oracle where there is none.

    Where the budget is too small for four seeds of each prompt there are fewer seeds, and if need be fewer prompts.

    Args:
        experiments: With their images.
        budget: Characters that the embedded images of all of them may take.
    """
    most = min(SEEDS, *(experiment.protocol.images for experiment in experiments))
    for seeds in range(most, 0, -1):
        made = [_cards(experiment, seeds) for experiment in experiments]
        if sum(_size(card) for cards in made for card in cards) <= budget:
            return [Grid(cards, 0) for cards in made]
    return [_cut(cards, budget // len(experiments)) for cards in made]


def _cards(experiment: Experiment, seeds: int) -> list[Card]:
    arms = [experiment.arm(name) for name in (UNTREATED, *(experiment.results["masks"] or [BALANCED]))]
    return [
        Card(row["label"], write(row), [(arm.name, _row(experiment, arm, p, seeds)) for arm in arms])
        for p, row in enumerate(experiment.protocol.prompts)
    ]


def _row(experiment: Experiment, arm: Drawn, p: int, seeds: int) -> list[Thumbnail]:
    groups, all_seeds = experiment.protocol.axis.groups, arm.seeds_from(experiment.protocol.seed)
    found = []
    for i in range(seeds):
        best = int(arm.reads[p, i].argmax())
        probability = float(arm.seen[p, i, best])
        source, sure = embedded(arm.images[p, i]), probability >= _SURE
        found.append(Thumbnail(source, all_seeds[i], groups[best], probability, not sure))
    return found


def embedded(picture: Tensor) -> str:
    """(3, H, W) uint8 -> a data: address. Small images are unchanged; larger ones become small JPEGs."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    whole = max(image.size) <= _SIDE
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG" if whole else "JPEG", optimize=True, **({} if whole else {"quality": 85}))
    return f"data:image/{'png' if whole else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _size(card: Card) -> int:
    return sum(len(picture.source) for _, row in card.rows for picture in row)


def _cut(cards: list[Card], budget: int) -> Grid:
    """The first cards that fit."""
    kept: list[Card] = []
    for card in cards:
        budget -= _size(card)
        if budget < 0:
            break
        kept.append(card)
    return Grid(kept, len(cards) - len(kept))


_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
_REGULAR, _BOLD = "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"
_CUT = "..."


def lettered(text: str, most: int) -> str:
    r"""A text as an image shows it.

    Args:
        text: Any text of any length.
        most: How many letters it may have; longer texts end in "...".

    Returns:
        The text with `\uXXXX` for each sign that the font lacks.
    """
    signs = printable(text[: most + 1])
    shown = "".join(sign if ord(sign) in _known() else escaped(sign) for sign in signs)
    return shown if len(shown) <= most else shown[: most - len(_CUT)] + _CUT


@cache
def _known() -> frozenset[int]:
    """The signs that the font has, bold ones too."""
    regular, bold = (FT2Font(_FONTS / name).get_charmap() for name in (_REGULAR, _BOLD))
    return frozenset(regular.keys() & bold.keys())


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font in some size of pixels."""
    return ImageFont.truetype(_FONTS / _REGULAR, size)


def as_written(figure: Figure) -> Figure:
    """The figure, in which no text is a formula: to matplotlib, a name with two `$` would be one."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure
