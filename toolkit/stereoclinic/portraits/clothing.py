"""What people wear and hold: dress from the shoulders down, hats above the temples, props beside the head or below.

Each is a list of shapes from back to front: a method of `Pen`, a colour and the method's further arguments, in head
units. A colour that is a number is one of the occupation's own.
"""

from typing import Any

#: Method of `Pen`, colour, arguments.
Shape = tuple[Any, ...]

# fmt: off
_TORSO: Shape = ("polygon", 0, (-82, 190), (-76, 104), (-50, 80), (-18, 68), (18, 68), (50, 80), (76, 104), (82, 190))

DRESSES: dict[str, list[Shape]] = {
    "coat": [
        _TORSO, ("polygon", 1, (-18, 68), (18, 68), (0, 112)),
        ("line", "#aeb9c4", 4, (-18, 68), (0, 116), (18, 68)), ("line", "#aeb9c4", 4, (0, 116), (0, 190)),
    ],
    "scrubs": [_TORSO, ("line", 1, 9, (-22, 68), (0, 100), (22, 68)), ("rectangle", 1, 26, 112, 52, 136)],
    "cardigan": [_TORSO, ("polygon", 1, (-22, 66), (22, 66), (14, 190), (-14, 190))],
    "blouse": [_TORSO, ("polygon", 1, (-30, 68), (0, 80), (30, 68), (24, 92), (0, 82), (-24, 92))],
    "double-breasted": [
        _TORSO, ("line", "#c9c9c9", 4, (-22, 68), (6, 112), (6, 190)),
        *[("ellipse", 1, x - 6, y - 6, x + 6, y + 6) for y in (100, 124) for x in (-16, 28)],
    ],
    "overalls": [
        ("polygon", 1, *_TORSO[2:]), ("rectangle", 0, -42, 104, 42, 200, 6),
        ("polygon", 0, (-46, 80), (-30, 74), (-24, 112), (-42, 112)),
        ("polygon", 0, (46, 80), (30, 74), (24, 112), (42, 112)),
        *[("ellipse", "#f2e6b0", x - 6, 104, x + 6, 116) for x in (-34, 34)],
    ],
    "jacket": [_TORSO, ("rectangle", 1, -84, 112, 84, 126), ("rectangle", 1, -7, 72, 7, 200)],
    "suit": [
        _TORSO, ("polygon", "#ffffff", (-22, 66), (22, 66), (0, 128)),
        ("polygon", 1, (-7, 74), (7, 74), (10, 112), (0, 126), (-10, 112)),
    ],
    "robe": [_TORSO, ("polygon", 1, (-20, 66), (20, 66), (14, 116), (0, 108), (-14, 116))],
}

#: Nothing below y = -34, where the temples begin.
HATS: dict[str, list[Shape]] = {
    "nurse-cap": [
        ("polygon", 0, (-36, -46), (-42, -78), (42, -78), (36, -46)),
        ("rectangle", 1, -4, -74, 4, -50), ("rectangle", 1, -12, -66, 12, -58),
    ],
    "toque": [
        *[("ellipse", 0, x - 23, -100, x + 23, -60) for x in (-24, 0, 24)], ("rectangle", 1, -38, -72, 38, -46, 4),
    ],
    "straw-hat": [
        ("ellipse", 0, -40, -92, 40, -30), ("ellipse", 0, -76, -58, 76, -36), ("rectangle", 1, -40, -66, 40, -56),
    ],
    "helmet": [
        ("ellipse", 0, -46, -92, 46, -38), ("rectangle", 0, -58, -54, 58, -40, 6),
        ("polygon", 1, (-13, -80), (13, -80), (10, -56), (0, -50), (-10, -56)),
    ],
    "peaked-cap": [
        ("polygon", 0, (-50, -70), (-38, -88), (38, -88), (50, -70), (40, -52), (-40, -52)),
        ("rectangle", "#0d1220", -44, -54, 44, -42, 5), ("ellipse", 1, -9, -78, 9, -60),
    ],
}

#: Below the chin or beside the head.
PROPS: dict[str, list[Shape]] = {
    "stethoscope": [
        ("line", "#3a4250", 7, (-30, 76), (-24, 116), (0, 132), (24, 116), (30, 76)),
        ("ellipse", "#3a4250", -11, 124, 11, 146), ("ellipse", "#cfd6de", -5, 130, 5, 140),
    ],
    "headset": [
        ("arc", "#2d2d38", 7, (-47, -66, 47, 40), 180, 360), ("line", "#2d2d38", 5, (44, 8), (34, 34), (12, 42)),
    ],
    "wrench": [
        ("line", "#d5dade", 12, (58, 160), (94, 84)), ("ellipse", "#d5dade", 80, 60, 112, 92),
        ("polygon", "#5b6268", (92, 58), (104, 56), (100, 78), (92, 78)),
    ],
    "gavel": [
        ("line", "#a8713a", 9, (62, 150), (88, 96)),
        ("polygon", "#7b4a22", (66, 82), (78, 70), (112, 90), (100, 106)),
    ],
}
# fmt: on
