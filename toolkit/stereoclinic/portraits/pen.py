"""What portraits are drawn with: a canvas whose head is moved and scaled a little for each drawing."""

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
