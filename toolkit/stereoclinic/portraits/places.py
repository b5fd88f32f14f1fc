"""The places people work in, painted on the canvas itself, so that they stay put when the head moves.

What portraits are drawn with: a canvas whose head is moved and scaled a little for each drawing.
"""

from collections.abc import Callable
from random import Random

from PIL import Image, ImageColor, ImageDraw

SIZE = 64
CANVAS = 256

Colors = list[str]
Color = str | tuple[int, ...]


def shade(color: str, factor: float) -> tuple[int, ...]:
    return tuple(min(255, max(0, round(channel * factor))) for channel in ImageColor.getrgb(color)[:3])


def hex_of(color: tuple[int, ...]) -> str:
    return "#" + bytes(color).hex()


class Pen:
    """A drawing with its own jitter: where the head is, how large it is, which random choices were made."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.image = Image.new("RGB", (CANVAS, CANVAS))
        self.draw = ImageDraw.Draw(self.image)
        self.x = 128 + random.uniform(-7, 7)
        self.y = 116 + random.uniform(-5, 5)
        self.scale = random.uniform(1.08, 1.18)

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        """A rectangle in head units (the face is 48 wide and 60 high, centred at 0, 0) on the canvas."""
        s = self.scale
        return (self.x + left * s, self.y + top * s, self.x + right * s, self.y + bottom * s)

    def points(self, *pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + x * self.scale, self.y + y * self.scale) for x, y in pairs]

    def polygon(self, fill: Color, *pairs: tuple[float, float]) -> None:
        self.draw.polygon(self.points(*pairs), fill=fill)

    def ellipse(self, fill: Color, left: float, top: float, right: float, bottom: float) -> None:
        self.draw.ellipse(self.box(left, top, right, bottom), fill=fill)

    def rectangle(self, fill: Color, left: float, top: float, right: float, bottom: float, radius: float = 0) -> None:
        self.draw.rounded_rectangle(self.box(left, top, right, bottom), radius * self.scale, fill=fill)

    def line(self, fill: Color, width: float, *pairs: tuple[float, float]) -> None:
        self.draw.line(self.points(*pairs), fill=fill, width=max(1, round(width * self.scale)), joint="curve")

    def arc(self, fill: Color, width: float, box: tuple[float, float, float, float], start: float, end: float) -> None:
        self.draw.arc(self.box(*box), start, end, fill=fill, width=max(1, round(width * self.scale)))


Painter = Callable[[Pen, Colors], None]


def _wall(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    pen.draw.rectangle((0, 170, 256, 256), fill=colors[1])


def _chalkboard(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[1])
    pen.draw.rectangle((14, 14, 242, 176), fill=colors[0])
    for row in (44, 74, 104):
        for left in (26, 190):
            pen.draw.line((left, row, left + 40, row), fill="#dfeee4", width=6)


def _shelves(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[1])
    spines = ["#b5483a", "#d9a441", "#4a7d5b", "#3f6aa0"]
    for shelf in range(4):
        top = 8 + 64 * shelf
        for book in range(8):
            left = 3 + 32 * book
            pen.draw.rectangle((left, top, left + 25, top + 46), fill=spines[(book + 2 * shelf) % 4])
        pen.draw.rectangle((0, top + 46, 256, top + 55), fill=colors[0])


def _tiles(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for edge in range(0, 257, 43):
        pen.draw.line((edge, 0, edge, 256), fill=colors[1], width=6)
        pen.draw.line((0, edge, 256, edge), fill=colors[1], width=6)


def _field(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    pen.draw.ellipse((-60, 120, 200, 360), fill=colors[1])
    pen.draw.ellipse((70, 140, 340, 380), fill=shade(colors[1], 0.85))
    pen.draw.ellipse((196, 16, 240, 60), fill="#f7d94c")


def _bricks(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for row in range(8):
        y = 32 * row
        pen.draw.line((0, y, 256, y), fill=colors[1], width=6)
        for column in range(5):
            x = 64 * column + (32 if row % 2 else 0)
            pen.draw.line((x, y, x, y + 32), fill=colors[1], width=6)


def _garage(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for y in range(16, 256, 32):
        pen.draw.line((0, y, 256, y), fill=colors[1], width=8)
    pen.draw.ellipse((-30, 120, 60, 210), fill="#22252a")
    pen.draw.ellipse((-4, 146, 34, 184), fill="#b9bfc6")


def _clouds(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for x, y in ((4, 40), (190, 24), (196, 150), (-20, 160)):
        pen.draw.ellipse((x, y, x + 60, y + 32), fill=colors[1])
        pen.draw.ellipse((x + 16, y - 14, x + 48, y + 26), fill=colors[1])


def _columns(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for x in (6, 54, 170, 218):
        pen.draw.rectangle((x, 28, x + 32, 256), fill=colors[1])
        pen.draw.rectangle((x + 9, 28, x + 15, 256), fill=colors[0])
    pen.draw.rectangle((0, 10, 256, 28), fill=shade(colors[1], 0.9))


def _skyline(pen: Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for x, top in ((0, 70), (46, 30), (176, 44), (220, 90)):
        pen.draw.rectangle((x, top, x + 38, 256), fill=colors[1])
        for y in range(top + 12, 240, 26):
            pen.draw.rectangle((x + 8, y, x + 30, y + 9), fill="#f5e6a8")


BACKGROUNDS: dict[str, Painter] = {
    "wall": _wall,
    "chalkboard": _chalkboard,
    "shelves": _shelves,
    "tiles": _tiles,
    "field": _field,
    "bricks": _bricks,
    "garage": _garage,
    "clouds": _clouds,
    "columns": _columns,
    "skyline": _skyline,
}
