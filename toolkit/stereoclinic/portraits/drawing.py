"""Flat cartoon portraits, drawn large with PIL and shrunk: what the embedded model learns to draw.

A picture is painted back to front, 256 x 256:

    background   the occupation's place        wall, shelves, clouds, ...
    hair behind  the length of the hair        gender presentation
    body         the occupation's dress        coat, robe, overalls, ...
    face         skin colour, lips, beard      skin tone, gender presentation
    age          hair colour and wrinkles      age
    hat, prop    the occupation's tools        sit above the hairline and below the chin

Occupation is told by background, dress, hat and prop; the three axes by hair and face alone. Hats end above the
temples, so that the colour and the length of the hair stay in view whatever the occupation.
"""

from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageColor, ImageDraw

SIZE = 64
_CANVAS = 256

SKIN = {"dark": ["#6b4026", "#5e3720", "#7a4a2d"], "light": ["#f6d3b8", "#f2c9a8", "#fbdcc6"]}
HAIR = {"old": ["#d9d9dc", "#c9cacf", "#e8e8ea"], "young": ["#2a1a12", "#4a2c17", "#1d1d22", "#7a3b1a"]}
LIPS = {"dark": "#b03348", "light": "#d4364c"}

Colors = list[str]
Color = str | tuple[int, ...]
Painter = Callable[["_Pen", Colors], None]


def _shade(color: str, factor: float) -> tuple[int, ...]:
    return tuple(min(255, max(0, round(channel * factor))) for channel in ImageColor.getrgb(color)[:3])


def _hex(color: tuple[int, ...]) -> str:
    return "#" + bytes(color).hex()


class _Pen:
    """A drawing with its own jitter: where the head is, how large it is, which random choices were made."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.image = Image.new("RGB", (_CANVAS, _CANVAS))
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


# --- backgrounds: painted on the canvas itself, so that they stay put when the head moves --------------------------


def _wall(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    pen.draw.rectangle((0, 170, 256, 256), fill=colors[1])


def _chalkboard(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[1])
    pen.draw.rectangle((14, 14, 242, 176), fill=colors[0])
    for row in (44, 74, 104):
        for left in (26, 190):
            pen.draw.line((left, row, left + 40, row), fill="#dfeee4", width=6)


def _shelves(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[1])
    spines = ["#b5483a", "#d9a441", "#4a7d5b", "#3f6aa0"]
    for shelf in range(4):
        top = 8 + 64 * shelf
        for book in range(8):
            left = 3 + 32 * book
            pen.draw.rectangle((left, top, left + 25, top + 46), fill=spines[(book + 2 * shelf) % 4])
        pen.draw.rectangle((0, top + 46, 256, top + 55), fill=colors[0])


def _tiles(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for edge in range(0, 257, 43):
        pen.draw.line((edge, 0, edge, 256), fill=colors[1], width=6)
        pen.draw.line((0, edge, 256, edge), fill=colors[1], width=6)


def _field(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    pen.draw.ellipse((-60, 120, 200, 360), fill=colors[1])
    pen.draw.ellipse((70, 140, 340, 380), fill=_shade(colors[1], 0.85))
    pen.draw.ellipse((196, 16, 240, 60), fill="#f7d94c")


def _bricks(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for row in range(8):
        y = 32 * row
        pen.draw.line((0, y, 256, y), fill=colors[1], width=6)
        for column in range(5):
            x = 64 * column + (32 if row % 2 else 0)
            pen.draw.line((x, y, x, y + 32), fill=colors[1], width=6)


def _garage(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for y in range(16, 256, 32):
        pen.draw.line((0, y, 256, y), fill=colors[1], width=8)
    pen.draw.ellipse((-30, 120, 60, 210), fill="#22252a")
    pen.draw.ellipse((-4, 146, 34, 184), fill="#b9bfc6")


def _clouds(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for x, y in ((4, 40), (190, 24), (196, 150), (-20, 160)):
        pen.draw.ellipse((x, y, x + 60, y + 32), fill=colors[1])
        pen.draw.ellipse((x + 16, y - 14, x + 48, y + 26), fill=colors[1])


def _columns(pen: _Pen, colors: Colors) -> None:
    pen.draw.rectangle((0, 0, 256, 256), fill=colors[0])
    for x in (6, 54, 170, 218):
        pen.draw.rectangle((x, 28, x + 32, 256), fill=colors[1])
        pen.draw.rectangle((x + 9, 28, x + 15, 256), fill=colors[0])
    pen.draw.rectangle((0, 10, 256, 28), fill=_shade(colors[1], 0.9))


def _skyline(pen: _Pen, colors: Colors) -> None:
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


# --- dress: shoulders from (-78, 92) down --------------------------------------------------------------------------


def _torso(pen: _Pen, color: Color) -> None:
    pen.polygon(color, (-82, 190), (-76, 104), (-50, 80), (-18, 68), (18, 68), (50, 80), (76, 104), (82, 190))


def _coat(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-18, 68), (18, 68), (0, 112))
    pen.line("#aeb9c4", 4, (-18, 68), (0, 116), (18, 68))
    pen.line("#aeb9c4", 4, (0, 116), (0, 190))


def _scrubs(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.line(colors[1], 9, (-22, 68), (0, 100), (22, 68))
    pen.rectangle(colors[1], 26, 112, 52, 136)


def _cardigan(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-22, 66), (22, 66), (14, 190), (-14, 190))


def _blouse(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-30, 68), (0, 80), (30, 68), (24, 92), (0, 82), (-24, 92))


def _double_breasted(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.line("#c9c9c9", 4, (-22, 68), (6, 112), (6, 190))
    for y in (100, 124):
        for x in (-16, 28):
            pen.ellipse(colors[1], x - 6, y - 6, x + 6, y + 6)


def _overalls(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[1])
    pen.rectangle(colors[0], -42, 104, 42, 200, 6)
    pen.polygon(colors[0], (-46, 80), (-30, 74), (-24, 112), (-42, 112))
    pen.polygon(colors[0], (46, 80), (30, 74), (24, 112), (42, 112))
    for x in (-34, 34):
        pen.ellipse("#f2e6b0", x - 6, 104, x + 6, 116)


def _jacket(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.rectangle(colors[1], -84, 112, 84, 126)
    pen.rectangle(colors[1], -7, 72, 7, 200)


def _suit(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon("#ffffff", (-22, 66), (22, 66), (0, 128))
    pen.polygon(colors[1], (-7, 74), (7, 74), (10, 112), (0, 126), (-10, 112))


def _robe(pen: _Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-20, 66), (20, 66), (14, 116), (0, 108), (-14, 116))


DRESSES: dict[str, Painter] = {
    "coat": _coat,
    "scrubs": _scrubs,
    "cardigan": _cardigan,
    "blouse": _blouse,
    "double-breasted": _double_breasted,
    "overalls": _overalls,
    "jacket": _jacket,
    "suit": _suit,
    "robe": _robe,
}


# --- hats: nothing below y = -34, where the temples begin -----------------------------------------------------------


def _nurse_cap(pen: _Pen, colors: Colors) -> None:
    pen.polygon(colors[0], (-36, -46), (-42, -78), (42, -78), (36, -46))
    pen.rectangle(colors[1], -4, -74, 4, -50)
    pen.rectangle(colors[1], -12, -66, 12, -58)


def _toque(pen: _Pen, colors: Colors) -> None:
    for x in (-24, 0, 24):
        pen.ellipse(colors[0], x - 23, -100, x + 23, -60)
    pen.rectangle(colors[1], -38, -72, 38, -46, 4)


def _straw_hat(pen: _Pen, colors: Colors) -> None:
    pen.ellipse(colors[0], -40, -92, 40, -30)
    pen.ellipse(colors[0], -76, -58, 76, -36)
    pen.rectangle(colors[1], -40, -66, 40, -56)


def _helmet(pen: _Pen, colors: Colors) -> None:
    pen.ellipse(colors[0], -46, -92, 46, -38)
    pen.rectangle(colors[0], -58, -54, 58, -40, 6)
    pen.polygon(colors[1], (-13, -80), (13, -80), (10, -56), (0, -50), (-10, -56))


def _peaked_cap(pen: _Pen, colors: Colors) -> None:
    pen.polygon(colors[0], (-50, -70), (-38, -88), (38, -88), (50, -70), (40, -52), (-40, -52))
    pen.rectangle("#0d1220", -44, -54, 44, -42, 5)
    pen.ellipse(colors[1], -9, -78, 9, -60)


HATS: dict[str, Painter] = {
    "nurse-cap": _nurse_cap,
    "toque": _toque,
    "straw-hat": _straw_hat,
    "helmet": _helmet,
    "peaked-cap": _peaked_cap,
}


# --- props: below the chin or beside the head ----------------------------------------------------------------------


def _stethoscope(pen: _Pen, colors: Colors) -> None:
    pen.line("#3a4250", 7, (-30, 76), (-24, 116), (0, 132), (24, 116), (30, 76))
    pen.ellipse("#3a4250", -11, 124, 11, 146)
    pen.ellipse("#cfd6de", -5, 130, 5, 140)


def _headset(pen: _Pen, colors: Colors) -> None:
    pen.arc("#2d2d38", 7, (-47, -66, 47, 40), 180, 360)
    pen.line("#2d2d38", 5, (44, 8), (34, 34), (12, 42))


def _wrench(pen: _Pen, colors: Colors) -> None:
    pen.line("#d5dade", 12, (58, 160), (94, 84))
    pen.ellipse("#d5dade", 80, 60, 112, 92)
    pen.polygon("#5b6268", (92, 58), (104, 56), (100, 78), (92, 78))


def _gavel(pen: _Pen, colors: Colors) -> None:
    pen.line("#a8713a", 9, (62, 150), (88, 96))
    pen.polygon("#7b4a22", (66, 82), (78, 70), (112, 90), (100, 106))


PROPS: dict[str, Painter] = {
    "stethoscope": _stethoscope,
    "headset": _headset,
    "wrench": _wrench,
    "gavel": _gavel,
}


# --- the person -----------------------------------------------------------------------------------------------------


def _hair_behind(pen: _Pen, hair: Color, gender: str) -> None:
    if gender == "female":
        length = pen.random.uniform(84, 100)
        pen.rectangle(hair, -46, -52, 46, length, 34)
    else:
        pen.ellipse(hair, -37, -52, 37, 6)


def _face(pen: _Pen, skin: str, gender: str, age: str, tone: str) -> None:
    shadow = _shade(skin, 0.82)
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
        pen.line(_shade(skin, 0.55), 5, (-10, 27), (10, 27))
    if age == "old":
        for y in (-27, -19):
            pen.line(shadow, 3, (-17, y), (17, y))
        for side in (-1, 1):
            pen.line(shadow, 4, (side * 13, 13), (side * 20, 26))


def _hair_front(pen: _Pen, hair: Color, gender: str) -> None:
    if gender == "female":
        pen.polygon(
            hair,
            (-40, 6),
            (-46, -30),
            (-30, -52),
            (0, -58),
            (30, -52),
            (46, -30),
            (40, 6),
            (30, -22),
            (0, -36),
            (-30, -22),
        )
        for side in (-1, 1):  # the locks over the shoulders
            pen.polygon(hair, (side * 46, -30), (side * 32, -24), (side * 35, 20), (side * 30, 82), (side * 46, 78))
    else:
        pen.polygon(
            hair,
            (-38, -4),
            (-41, -34),
            (-24, -54),
            (0, -58),
            (24, -54),
            (41, -34),
            (38, -4),
            (32, -26),
            (0, -36),
            (-32, -26),
        )
        for side in (-1, 1):  # brows and the short beard along the jaw
            pen.line(hair, 6, (side * 7, -14), (side * 23, -15))
        pen.polygon(
            hair,
            (-36, 8),
            (-31, 34),
            (-15, 48),
            (0, 52),
            (15, 48),
            (31, 34),
            (36, 8),
            (28, 26),
            (14, 37),
            (-14, 37),
            (-28, 26),
        )


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
    pen = _Pen(random)
    tone = random.choice(SKIN[skin])
    hair = _shade(random.choice(HAIR[age]), random.uniform(0.92, 1.08))
    tint = random.uniform(0.93, 1.06)

    BACKGROUNDS[background[0]](pen, [_hex(_shade(color, tint)) for color in background[1]])
    _hair_behind(pen, hair, gender)
    DRESSES[dress[0]](pen, dress[1])
    _face(pen, tone, gender, age, skin)
    _hair_front(pen, hair, gender)
    if hat:
        HATS[hat[0]](pen, hat[1])
    if prop:
        PROPS[prop](pen, [])
    return np.asarray(pen.image.reduce(_CANVAS // SIZE))
