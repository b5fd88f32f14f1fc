"""What people wear and hold: dress from the shoulders down, hats above the temples, props beside the head or below."""

from stereoclinic.portraits.places import Color, Colors, Painter, Pen


def _torso(pen: Pen, color: Color) -> None:
    pen.polygon(color, (-82, 190), (-76, 104), (-50, 80), (-18, 68), (18, 68), (50, 80), (76, 104), (82, 190))


def _coat(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-18, 68), (18, 68), (0, 112))
    pen.line("#aeb9c4", 4, (-18, 68), (0, 116), (18, 68))
    pen.line("#aeb9c4", 4, (0, 116), (0, 190))


def _scrubs(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.line(colors[1], 9, (-22, 68), (0, 100), (22, 68))
    pen.rectangle(colors[1], 26, 112, 52, 136)


def _cardigan(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-22, 66), (22, 66), (14, 190), (-14, 190))


def _blouse(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon(colors[1], (-30, 68), (0, 80), (30, 68), (24, 92), (0, 82), (-24, 92))


def _double_breasted(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.line("#c9c9c9", 4, (-22, 68), (6, 112), (6, 190))
    for y in (100, 124):
        for x in (-16, 28):
            pen.ellipse(colors[1], x - 6, y - 6, x + 6, y + 6)


def _overalls(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[1])
    pen.rectangle(colors[0], -42, 104, 42, 200, 6)
    pen.polygon(colors[0], (-46, 80), (-30, 74), (-24, 112), (-42, 112))
    pen.polygon(colors[0], (46, 80), (30, 74), (24, 112), (42, 112))
    for x in (-34, 34):
        pen.ellipse("#f2e6b0", x - 6, 104, x + 6, 116)


def _jacket(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.rectangle(colors[1], -84, 112, 84, 126)
    pen.rectangle(colors[1], -7, 72, 7, 200)


def _suit(pen: Pen, colors: Colors) -> None:
    _torso(pen, colors[0])
    pen.polygon("#ffffff", (-22, 66), (22, 66), (0, 128))
    pen.polygon(colors[1], (-7, 74), (7, 74), (10, 112), (0, 126), (-10, 112))


def _robe(pen: Pen, colors: Colors) -> None:
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


def _nurse_cap(pen: Pen, colors: Colors) -> None:
    pen.polygon(colors[0], (-36, -46), (-42, -78), (42, -78), (36, -46))
    pen.rectangle(colors[1], -4, -74, 4, -50)
    pen.rectangle(colors[1], -12, -66, 12, -58)


def _toque(pen: Pen, colors: Colors) -> None:
    for x in (-24, 0, 24):
        pen.ellipse(colors[0], x - 23, -100, x + 23, -60)
    pen.rectangle(colors[1], -38, -72, 38, -46, 4)


def _straw_hat(pen: Pen, colors: Colors) -> None:
    pen.ellipse(colors[0], -40, -92, 40, -30)
    pen.ellipse(colors[0], -76, -58, 76, -36)
    pen.rectangle(colors[1], -40, -66, 40, -56)


def _helmet(pen: Pen, colors: Colors) -> None:
    pen.ellipse(colors[0], -46, -92, 46, -38)
    pen.rectangle(colors[0], -58, -54, 58, -40, 6)
    pen.polygon(colors[1], (-13, -80), (13, -80), (10, -56), (0, -50), (-10, -56))


def _peaked_cap(pen: Pen, colors: Colors) -> None:
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


def _stethoscope(pen: Pen, colors: Colors) -> None:
    pen.line("#3a4250", 7, (-30, 76), (-24, 116), (0, 132), (24, 116), (30, 76))
    pen.ellipse("#3a4250", -11, 124, 11, 146)
    pen.ellipse("#cfd6de", -5, 130, 5, 140)


def _headset(pen: Pen, colors: Colors) -> None:
    pen.arc("#2d2d38", 7, (-47, -66, 47, 40), 180, 360)
    pen.line("#2d2d38", 5, (44, 8), (34, 34), (12, 42))


def _wrench(pen: Pen, colors: Colors) -> None:
    pen.line("#d5dade", 12, (58, 160), (94, 84))
    pen.ellipse("#d5dade", 80, 60, 112, 92)
    pen.polygon("#5b6268", (92, 58), (104, 56), (100, 78), (92, 78))


def _gavel(pen: Pen, colors: Colors) -> None:
    pen.line("#a8713a", 9, (62, 150), (88, 96))
    pen.polygon("#7b4a22", (66, 82), (78, 70), (112, 90), (100, 106))


PROPS: dict[str, Painter] = {
    "stethoscope": _stethoscope,
    "headset": _headset,
    "wrench": _wrench,
    "gavel": _gavel,
}
