"""The places people work in: shapes on the canvas itself, which stay where they are when the head moves.

Each is a list of shapes from back to front: a method of `PIL.ImageDraw`, a colour, points, and the width of a line. A
colour that is a number is one of the occupation's own; a pair is that colour and a factor to shade it by.
"""

from stereoclinic.portraits.clothing import Shape

_WHOLE = (0, 0, 256, 256)
_SPINES = ("#b5483a", "#d9a441", "#4a7d5b", "#3f6aa0")


def _wall(color: int) -> Shape:
    return ("rectangle", color, _WHOLE)


# fmt: off
BACKGROUNDS: dict[str, list[Shape]] = {
    "wall": [_wall(0), ("rectangle", 1, (0, 170, 256, 256))],
    "chalkboard": [
        _wall(1), ("rectangle", 0, (14, 14, 242, 176)),
        *[("line", "#dfeee4", (x, y, x + 40, y), 6) for y in (44, 74, 104) for x in (26, 190)],
    ],
    "shelves": [
        _wall(1),
        *[
            shape
            for i, top in enumerate(range(8, 256, 64))
            for shape in (
                *[("rectangle", _SPINES[(book + 2 * i) % 4], (3 + 32 * book, top, 28 + 32 * book, top + 46))
                  for book in range(8)],
                ("rectangle", 0, (0, top + 46, 256, top + 55)),
            )
        ],
    ],
    "tiles": [
        _wall(0),
        *[("line", 1, line, 6) for at in range(0, 257, 43) for line in ((at, 0, at, 256), (0, at, 256, at))],
    ],
    "field": [
        _wall(0), ("ellipse", 1, (-60, 120, 200, 360)), ("ellipse", (1, 0.85), (70, 140, 340, 380)),
        ("ellipse", "#f7d94c", (196, 16, 240, 60)),
    ],
    "bricks": [
        _wall(0),
        *[
            ("line", 1, line, 6)
            for y in range(0, 256, 32)
            for line in ((0, y, 256, y), *[(x, y, x, y + 32) for x in range(y % 64, 320, 64)])
        ],
    ],
    "garage": [
        _wall(0), *[("line", 1, (0, y, 256, y), 8) for y in range(16, 256, 32)],
        ("ellipse", "#22252a", (-30, 120, 60, 210)), ("ellipse", "#b9bfc6", (-4, 146, 34, 184)),
    ],
    "clouds": [
        _wall(0),
        *[
            ("ellipse", 1, box)
            for x, y in ((4, 40), (190, 24), (196, 150), (-20, 160))
            for box in ((x, y, x + 60, y + 32), (x + 16, y - 14, x + 48, y + 26))
        ],
    ],
    "columns": [
        _wall(0),
        *[
            ("rectangle", color, box)
            for x in (6, 54, 170, 218)
            for color, box in ((1, (x, 28, x + 32, 256)), (0, (x + 9, 28, x + 15, 256)))
        ],
        ("rectangle", (1, 0.9), (0, 10, 256, 28)),
    ],
    "skyline": [
        _wall(0),
        *[
            shape
            for x, top in ((0, 70), (46, 30), (176, 44), (220, 90))
            for shape in (
                ("rectangle", 1, (x, top, x + 38, 256)),
                *[("rectangle", "#f5e6a8", (x + 8, y, x + 30, y + 9)) for y in range(top + 12, 240, 26)],
            )
        ],
    ],
}
# fmt: on
