"""Where in a UNet a site lies, from its module path: down the left, through the middle, up the right.

down 0 --------- up 2       down_blocks.0.resnets.0.conv2                              down 0 conv 0
  down 1 ----- up 1         up_blocks.1.attentions.0.transformer_blocks.0.attn2...     up 1 cross 0
    down 2 - up 0           mid_block.attentions.0.transformer_blocks.0.ff.net.2       mid ff 0
         mid
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stereoclinic.ddtd.neurons import SITE_KINDS, Site
from stereoclinic.errors import InputError

#: What a site is, in the order that the data meets them within a stage.
KINDS = {"conv": "convolution", "self": "self-attention", "cross": "cross-attention", "ff": "feed-forward"}
PARTS = ("down", "mid", "up", "other")

_PATH = re.compile(
    r"(?:(?P<part>down|up)_blocks\.(?P<level>\d+)|mid_block)\."
    r"(?:resnets|attentions)\.(?P<stage>\d+)(?:\.transformer_blocks\.(?P<layer>\d+))?\."
)


@dataclass(frozen=True)
class Place:
    """Where a site lies.

    Args:
        part: One of `PARTS`; "other" is a model that is no UNet of diffusers.
        level: The block's number within its part, 0 in the middle.
        kind: One of `KINDS`.
        stage: Which residual or attention stage of the block.
        layer: Which transformer layer of the stage; 0 where there is one.
        path: The module path.
    """

    part: str
    level: int
    kind: str
    stage: int
    layer: int
    path: str

    @property
    def block(self) -> str:
        """ "down 1", "mid" or "up 0"."""
        return self.part if self.part in ("mid", "other") else f"{self.part} {self.level}"

    @property
    def name(self) -> str:
        """Within its block: "self 0", or "self 0.3" in the fourth layer of a deeper transformer."""
        if self.part == "other":
            return self.path
        return f"{self.kind} {self.stage}" + (f".{self.layer}" if self.layer else "")

    @property
    def order(self) -> tuple[int, int, int, int, int]:
        """Sorts places as data meets them."""
        return PARTS.index(self.part), self.level, self.stage, self.layer, list(KINDS).index(self.kind)

    def __str__(self) -> str:
        return self.path if self.part == "other" else f"{self.block} {self.name}"


def place_of(site: Site) -> Place:
    """Read a site's place from its module path.

    Raises:
        InputError: It is of no kind that is known here.
    """
    if site.kind not in SITE_KINDS:
        raise InputError(f"site {site.name!r} is of kind {site.kind!r}; expected one of {', '.join(SITE_KINDS)}")
    # Cross-attention reads the text and bears this name in every transformer block of diffusers.
    kind = ("cross" if ".attn2." in site.name else "self") if site.kind == "attention" else site.kind
    match = _PATH.match(site.name)
    if match is None:
        return Place("other", 0, kind, 0, 0, site.name)
    part, level, stage, layer = match["part"] or "mid", *(int(match[name] or 0) for name in ("level", "stage", "layer"))
    return Place(part, level, kind, stage, layer, site.name)


def by_kind(sites: Iterable[Site]) -> dict[str, list[int]]:
    """Numbers of the sites of each kind that there is, in the order of `KINDS`."""
    kinds = [place_of(site).kind for site in sites]
    return {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in KINDS if kind in kinds}


def by_block(sites: Iterable[Site]) -> dict[str, list[int]]:
    """Numbers of the sites of each block, in the order that data meets them."""
    rows: dict[str, list[int]] = {}
    for i, place in sorted(((i, place_of(site)) for i, site in enumerate(sites)), key=lambda each: each[1].order):
        rows.setdefault(place.block, []).append(i)
    return rows
