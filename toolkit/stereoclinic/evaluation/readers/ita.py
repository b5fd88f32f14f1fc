"""Skin tone by measurement, with no trained weights: the individual typology angle of skin pixels.

    ITA = arctan((L* - 50) / b*) x 180 / pi                CIELAB, white point D65, median over skin pixels

Six classes of ITA (`CLASSES`) become the groups of an axis: by `[reader.ita]` in its file, or by its groups' names. The
nearest tone of the Monk scale is given beside.

Skin pixels are those in the middle of the picture, where a portrait has its face, whose hue and chroma skin can have.
The angle is of the picture as it is: a darker exposure lowers it.

References: Chardon, Cretois & Hourseau, Skin colour typology and suntanning pathways, International Journal of Cosmetic
Science 13(4), 1991 (the angle and its classes); Del Bino & Bernerd, Variations in skin colour and the biological
consequences of ultraviolet radiation exposure, British Journal of Dermatology 169(s3), 2013 (brown and dark at -30).
Monk, The Monk Skin Tone Scale, 2023 (colours as published at skintone.google). sRGB: IEC 61966-2-1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers.base import REST, Reader
from stereoclinic.prompts.axes import Axis

#: Class -> the angle above which it begins, in degrees; the lightest first.
CLASSES = {"very light": 55.0, "light": 41.0, "intermediate": 28.0, "tan": 10.0, "brown": -30.0, "dark": -90.0}
#: The ten tones of the Monk scale, lightest first.
MONK = (
    "f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420",
)  # fmt: skip
#: Hue angles (degrees) and chroma that skin can have: those of the Monk scale and of lit and reddened skin, and more.
_HUES, _LEAST_CHROMA = (25.0, 110.0), 3.0
#: Half axes of the ellipse that is looked at, of the picture's width and height; and the least of it that must be skin.
_MIDDLE, _LEAST_SKIN = (0.15, 0.15), 0.1
#: Lightness above which what has no chroma is over-exposed.
_WHITEST = 97.0
#: Degrees: no picture is measured more exactly, whatever its pixels say.
_LEAST_SPREAD = 1.0

_TO_XYZ = torch.tensor(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    dtype=torch.float64,
)
_WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)


def lab(colours: Tensor) -> Tensor:
    """sRGB (..., 3) in [0, 1] -> CIELAB (..., 3) under D65: L* from 0 to 100, a*, b*."""
    colours = colours.double()
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    root = torch.where(xyz > 216 / 24389, xyz.clamp_min(1e-12) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def typology_angle(colours: Tensor) -> Tensor:
    """CIELAB (..., 3) -> individual typology angle (...) in degrees, from -90 to 90."""
    lightness, _, blue_yellow = colours.unbind(-1)
    return torch.rad2deg(torch.atan((lightness - 50) / blue_yellow.clamp_min(1e-6)))


def skin_pixels(image: Tensor) -> Tensor | None:
    """CIELAB (m, 3) of the skin in the middle of an image (3, H, W) in [0, 1]; None where there is hardly any.

    None too where more of it is white: what is over-exposed has no colour, and what is left would be the hair's.
    """
    rows, columns = (torch.linspace(-0.5, 0.5, side, dtype=torch.float64) for side in image.shape[-2:])
    inside = (columns[None] / _MIDDLE[0]) ** 2 + (rows[:, None] / _MIDDLE[1]) ** 2 <= 1
    seen = lab(image.permute(1, 2, 0)[inside])
    hue, chroma = torch.rad2deg(torch.atan2(seen[:, 2], seen[:, 1])), torch.hypot(seen[:, 1], seen[:, 2])
    skin = seen[(hue >= _HUES[0]) & (hue <= _HUES[1]) & (chroma >= _LEAST_CHROMA)]
    white = int(((seen[:, 0] > _WHITEST) & (chroma < _LEAST_CHROMA)).sum())
    return skin if len(skin) >= max(_LEAST_SKIN * len(seen), white, 8) else None


def nearest_monk(colour: Tensor) -> int:
    """The tone of the Monk scale, 1 (lightest) to 10, that is nearest to a CIELAB colour (3,) by Delta E 1976."""
    scale = torch.tensor([[int(tone[i : i + 2], 16) for i in (0, 2, 4)] for tone in MONK]) / 255
    return int(torch.linalg.vector_norm(lab(scale) - colour, dim=1).argmin()) + 1


class ItaReader(Reader):
    """Groups of skin tone by the individual typology angle.

        p_k = P(class of k | angle normal around ITA, with the robust standard deviation of the pixels' angles)

    Args:
        axes: Those it is to read. The first must be readable; of the others, those that are.

    Raises:
        InputError: It cannot tell the first axis's groups apart, or its file names a class that does not exist.
    """

    name = "ita"
    limits = (
        "It measures colour: exposure, coloured light, make-up and style shift it. On drawn faces"
        " half a stop darker lowers the angle by 7 degrees on average and by up to 17.",
        "It takes what is in the middle of the picture and has the hue of skin for skin: wood, sand and brown hair too."
        " It is for portraits with the face in the middle.",
    )

    def __init__(self, axes: Sequence[Axis]) -> None:
        found = {axis.name: group_classes(axis) for axis in axes}
        if axes and found[axes[0].name] is None:
            raise InputError(
                f"reader 'ita' measures skin tone, and axis {axes[0].name!r} does not say which of"
                f" {', '.join(CLASSES)} show {', '.join(axes[0].groups)}; give --axis skin, or [reader.ita] in its file"
            )
        self.columns = {name: each for name, each in found.items() if each is not None}
        self.classes = {axis.name: (*axis.groups, REST) for axis in axes if axis.name in self.columns}

    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> (n, K + 1) for each axis; the last is "no group": no skin seen, or another tone."""
        measured = [self._measure(image) for image in images]
        self.remarks = [remark for _, remark in measured]
        chances = torch.stack([each for each, _ in measured])  # (n, classes)
        found = {}
        for name, groups in self.columns.items():
            shown = torch.stack([chances[:, own].sum(1) for own in groups], 1)
            found[name] = torch.cat([shown, (1 - shown.sum(1, keepdim=True)).clamp_min(0)], 1).float()
        return found

    def _measure(self, image: Tensor) -> tuple[Tensor, str]:
        """Probabilities of `CLASSES`, and what was measured in words."""
        skin = skin_pixels(image.cpu())
        if skin is None:
            return torch.zeros(len(CLASSES), dtype=torch.float64), "no skin seen"
        middle = skin.median(0).values
        angle = typology_angle(middle)
        apart = (typology_angle(skin) - angle).abs().median()
        spread = max(1.4826 * float(apart), _LEAST_SPREAD)  # a normal distribution's, from the median deviation
        below = [0.5 * (1 + math.erf((bound - float(angle)) / spread / math.sqrt(2))) for bound in CLASSES.values()]
        below[-1] = 0.0
        chances = torch.tensor([above - under for above, under in zip([1.0, *below], below, strict=False)])
        return chances.double(), f"ITA {float(angle):.0f}, Monk {nearest_monk(middle)}"


def group_classes(axis: Axis) -> list[list[int]] | None:
    """The places in `CLASSES` of each group of an axis; None where a group has none.

    Raises:
        InputError: Its file names another class, or one for two groups.
    """
    if not axis.tones and not axis.about_race:  # "dark" and "light" may be of anything
        return None
    named = [(group, axis.tones.get(group, () if axis.tones else (group,))) for group in axis.groups]
    every = [each for _, classes in named for each in classes]
    if axis.tones and (wrong := [each for each in every if each not in CLASSES or every.count(each) > 1]):
        raise InputError(
            f"axis {axis.name!r}: [reader.ita] {wrong[0]!r}; give each of {', '.join(CLASSES)} to one group"
        )
    places = [[list(CLASSES).index(each) for each in classes if each in CLASSES] for _, classes in named]
    return places if all(places) else None


def open_ita(request: Request) -> Reader:
    """`ita`."""
    return ItaReader(request.axes)
