"""Flat cartoon portraits, drawn large with PIL and shrunk: what the embedded model learns to draw.

An image is painted back to front, 256 x 256:

    background   the occupation's place        wall, shelves, clouds, ...
    hair behind  the length of the hair        gender presentation
    body         the occupation's dress        coat, robe, overalls, ...
    face         skin colour, lips, beard      skin tone, gender presentation
    age          hair colour and wrinkles      age
    hat, prop    the occupation's tools        sit above the hairline and below the chin

Background, dress, hat and prop show the occupation; hair and face alone show the three axes. Hats end above the
temples, so that the colour and the length of the hair stay in view whatever the occupation.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from stereoclinic.portraits.clothing import DRESSES, HATS, PROPS, Shape
from stereoclinic.portraits.places import BACKGROUNDS

SIZE, CANVAS = 64, 256

Colors = list[str]
Color = str | tuple[int, ...]

SKIN = {"dark": ["#6b4026", "#5e3720", "#7a4a2d"], "light": ["#f6d3b8", "#f2c9a8", "#fbdcc6"]}
HAIR = {"old": ["#d9d9dc", "#c9cacf", "#e8e8ea"], "young": ["#2a1a12", "#4a2c17", "#1d1d22", "#7a3b1a"]}
LIPS = {"dark": "#b03348", "light": "#d4364c"}


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


def _hair_behind(pen: Pen, hair: Color, gender: str) -> None:
    if gender == "female":
        length = pen.random.uniform(84, 100)
        pen.rectangle(hair, -46, -52, 46, length, 34)
    else:
        pen.ellipse(hair, -37, -52, 37, 6)


def _face(pen: Pen, skin: str, gender: str, age: str, tone: str) -> None:
    shadow = shade(skin, 0.82)
    pen.rectangle(shadow, -14, 30, 14, 78, 8)  # neck
    if gender == "male":
        pen.ellipse(skin, -43, -8, -29, 14)  # ears, which long hair covers
        pen.ellipse(skin, 29, -8, 43, 14)
    pen.ellipse(skin, -35, -46, 35, 46)
    for x in (-15, 15):
        pen.ellipse("#ffffff", x - 7, -8, x + 7, 6)
        pen.ellipse("#1a1a1a", x - 4, -6, x + 4, 5)
        if gender == "female":
            pen.arc("#1a1a1a", 4, (x - 10, -12, x + 10, 12), 200, 340)
    pen.line(shadow, 5, (0, 2), (-3, 14), (4, 15))
    if gender == "female":
        pen.ellipse(LIPS[tone], -12, 22, 12, 33)
    else:
        pen.line(shade(skin, 0.55), 5, (-10, 27), (10, 27))
    if age == "old":
        for y in (-27, -19):
            pen.line(shadow, 3, (-17, y), (17, y))
        for side in (-1, 1):
            pen.line(shadow, 4, (side * 13, 13), (side * 20, 26))


def _hair_front(pen: Pen, hair: Color, gender: str) -> None:
    if gender == "female":
        pen.polygon(
            hair, (-40, 6), (-46, -30), (-30, -52), (0, -58), (30, -52), (46, -30), (40, 6), (30, -22), (0, -36),
            (-30, -22),
        )  # fmt: skip
        for side in (-1, 1):  # the locks over the shoulders
            pen.polygon(hair, (side * 46, -30), (side * 32, -24), (side * 35, 20), (side * 30, 82), (side * 46, 78))
    else:
        pen.polygon(
            hair, (-38, -4), (-41, -34), (-24, -54), (0, -58), (24, -54), (41, -34), (38, -4), (32, -26), (0, -36),
            (-32, -26),
        )  # fmt: skip
        for side in (-1, 1):  # brows and the short beard along the jaw
            pen.line(hair, 6, (side * 7, -14), (side * 23, -15))
        pen.polygon(
            hair, (-36, 8), (-31, 34), (-15, 48), (0, 52), (15, 48), (31, 34), (36, 8), (28, 26), (14, 37),
            (-14, 37), (-28, 26),
        )  # fmt: skip


def _paint(pen: Pen, shapes: Sequence[Shape], colors: Colors) -> None:
    """Paint what moves with the head."""
    for method, color, *arguments in shapes:
        getattr(pen, method)(colors[color] if isinstance(color, int) else color, *arguments)


def _paint_place(pen: Pen, shapes: Sequence[Shape], colors: Colors) -> None:
    """Paint what stays where it is."""
    for method, color, points, *width in shapes:
        fill = color
        if isinstance(color, int):
            fill = colors[color]
        elif isinstance(color, tuple):
            fill = shade(colors[color[0]], color[1])
        getattr(pen.draw, method)(points, fill=fill, **({"width": width[0]} if width else {}))


def draw(
    groups: tuple[str, str, str],
    background: tuple[str, Colors],
    dress: tuple[str, Colors],
    hat: tuple[str, Colors] | None,
    prop: str | None,
    random: Random,
) -> np.ndarray:
    """One portrait.

    Args:
        groups: "female" or "male", "dark" or "light", "old" or "young".
        background: A name of `BACKGROUNDS` and two colours; `dress` and `hat` likewise.
        prop: A name of `PROPS`, or None.
        random: Where all small variation comes from: place and size of the head, tints, length of the hair.

    Returns:
        (64, 64, 3) uint8.
    """
    gender, skin, age = groups
    pen = Pen(random)
    tone = random.choice(SKIN[skin])
    hair = shade(random.choice(HAIR[age]), random.uniform(0.92, 1.08))
    tint = random.uniform(0.93, 1.06)

    _paint_place(pen, BACKGROUNDS[background[0]], [hex_of(shade(color, tint)) for color in background[1]])
    _hair_behind(pen, hair, gender)
    _paint(pen, DRESSES[dress[0]], dress[1])
    _face(pen, tone, gender, age, skin)
    _hair_front(pen, hair, gender)
    if hat:
        _paint(pen, HATS[hat[0]], hat[1])
    if prop:
        _paint(pen, PROPS[prop], [])
    return np.asarray(pen.image.reduce(CANVAS // SIZE))
