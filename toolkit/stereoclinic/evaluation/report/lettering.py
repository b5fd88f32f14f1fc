"""Names in pictures: in signs that the font has, no longer than they have room, and never taken for a formula.

All pictures are lettered in DejaVu Sans, which comes with matplotlib.
"""

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageFont

from stereoclinic.printable import escaped, printable

_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
_REGULAR, _BOLD = "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"
_CUT = "..."


def lettered(text: str, most: int) -> str:
    r"""A text as a picture shows it.

    Args:
        text: Whatever somebody wrote; its length costs nothing.
        most: How many letters it may have; what is longer ends in "...".

    Returns:
        The text with `\uXXXX` for each sign that the font has not.
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
