"""Where in a denoiser a site lies, read from its module path.

U-Net          down_blocks.0.resnets.0.conv2                              down 0 conv 0
               up_blocks.1.attentions.0.transformer_blocks.0.attn2...     up 1 cross 0
               mid_block.attentions.0.transformer_blocks.0.ff.net.2       mid ff 0
transformer    transformer_blocks.0.attn.to_add_out                       block 0 text attention
               transformer_blocks.1.ff.net.2                              block 1 image feed-forward
               single_transformer_blocks.0.proj_out[:64]                  single block 0 joint attention
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import SITE_KINDS, Site

#: Kinds of site, in the order that data passes them.
KINDS = {
    "conv": "convolution",
    "attention": "attention",
    "self": "self-attention",
    "cross": "cross-attention",
    "ff": "feed-forward",
    "other": "other layers",
}
#: Which tokens a site works on.
STREAMS = {"image": "image tokens", "text": "text tokens", "joint": "image and text tokens"}
#: The parts of a U-Net, and the part of sites outside of all blocks.
UNET, OTHER = ("down", "mid", "up"), "other"

_UNET_PATH = re.compile(
    r"(?:(?P<part>down|up)_blocks\.(?P<level>\d{1,6})|mid_block)\."
    r"(?:resnets|attentions)\.(?P<stage>\d{1,6})(?:\.transformer_blocks\.(?P<layer>\d{1,6}))?\."
)
_BLOCK_PATH = re.compile(
    r"(?!down_blocks|up_blocks|mid_block)(?P<part>[^\d.][^.]*(?:\.[^\d.][^.]*)*)\.(?P<level>\d{1,6})\.(?P<rest>.+)"
)
_SELF = re.compile(r"(^|\.)(attn1|self_attention|attention)\.")
_CROSS = re.compile(r"(^|\.)(attn2|cross_attention)\.")


@dataclass(frozen=True)
class Place:
    """Where a site lies.

    Args:
        part: One of `UNET`, the module path of a transformer's list of blocks, or "other".
        level: Number of the block within its part; 0 in the middle.
        kind: One of `KINDS`.
        stream: One of `STREAMS`; empty where the model has only one.
        stage: In a U-Net, the number of the residual or attention stage in the block; in a transformer, the number of
            the site among those of its kind and stream in the block.
        layer: Number of the transformer layer in a U-Net's stage.
        path: Module path; in a transformer, within the block.
    """

    part: str
    level: int
    kind: str
    stream: str
    stage: int
    layer: int
    path: str

    @property
    def blocks(self) -> str:
        """Name of the blocks of this part: "down", "block", "single block", "noise refiner"."""
        words = [word for word in re.split(r"[._]", ".".join(self.part.split(".")[-2:])) if word]
        words = [word for word in words if word != "transformer"] or words
        words[-1] = {"blocks": "block", "layers": "layer"}.get(words[-1], words[-1])
        return " ".join(word for i, word in enumerate(words) if word not in words[:i])

    @property
    def block(self) -> str:
        """ "down 1", "mid", "single block 12" or "other"."""
        return self.part if self.part in ("mid", OTHER) else f"{self.blocks} {self.level}"

    @property
    def what(self) -> str:
        """The kind in words; the path for a layer that the user named and for one outside of all blocks."""
        return self.path if OTHER in (self.part, self.kind) else KINDS[self.kind]

    @property
    def name(self) -> str:
        """Name within the block: "self 0", "self 0.3" (the fourth layer of the stage), "text feed-forward"."""
        if self.part in UNET:
            return f"{self.kind} {self.stage}" + (f".{self.layer}" if self.layer else "")
        again = f" {self.stage + 1}" if self.stage and self.kind != OTHER else ""
        return f"{self.stream} {self.what}".strip() + again

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts places of one part as data passes them."""
        inside = list(KINDS).index(self.kind), ["", *STREAMS].index(self.stream)
        return self.level, self.stage, self.layer, *inside

    def __str__(self) -> str:
        return self.name if self.part == OTHER else f"{self.block} {self.name}"


def places(sites: Iterable[Site]) -> dict[Site, Place]:
    """Read the places of sites from their module paths, in the order that data passes them.

    Args:
        sites: All of a model's: the name of a site depends on its neighbours.

    Raises:
        InputError: A site has an unknown kind.
    """
    sites = list(sites)
    streams = {site.stream for site in sites}
    found = {site: _place(site, site.stream if len(streams) > 1 else "") for site in sites}
    parts: dict[str, list[Site]] = {}
    for site, place in found.items():
        if place.part not in (*UNET, OTHER):
            parts.setdefault(place.part, []).append(site)
    for members in parts.values():
        both = all(any(name.search(found[site].path) for site in members) for name in (_SELF, _CROSS))
        counts: Counter[tuple[int, str, str]] = Counter()
        for site in members:
            place = found[site]
            if both and place.kind == "attention":
                place = replace(place, kind="cross" if _CROSS.search(place.path) else "self")
            key = place.level, place.kind, place.stream
            found[site] = replace(place, stage=counts[key])
            counts[key] += 1
    ranks = {part: rank for rank, part in enumerate([*UNET, *parts, OTHER])}
    return dict(sorted(found.items(), key=lambda item: (ranks[item[1].part], *item[1].order)))


def _place(site: Site, stream: str) -> Place:
    if site.kind not in SITE_KINDS:
        raise InputError(f"site {site.name!r} has kind {site.kind!r}; expected one of {', '.join(SITE_KINDS)}")
    match = _UNET_PATH.match(site.name)
    if match is not None:
        kind = site.kind
        if kind == "attention" and ".attention." not in site.name:  # Kandinsky 3's do not say which they are
            kind = "cross" if ".attn2." in site.name else "self"
        level, stage, layer = (int(match[name] or 0) for name in ("level", "stage", "layer"))
        return Place(match["part"] or "mid", level, kind, stream, stage, layer, site.name)
    match = _BLOCK_PATH.match(site.name)
    if match is not None:
        return Place(match["part"], int(match["level"]), site.kind, stream, 0, 0, match["rest"])
    return Place(OTHER, 0, site.kind, stream, 0, 0, re.sub(r"\.(to_out\.0|to_out|net\.2)$", "", site.name))


def grouped(sites: Sequence[Site], row: Callable[[list[int]], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """One row for each kind of site, each stream, each block and each site.

    Args:
        sites: All of a model's.
        row: Figures of some sites, from their numbers.

    Returns:
        `kinds`, `streams` (empty where the model has one) and `blocks` in the order that data passes them, and `sites`
        in the order given; each row with its name.
    """
    found = places(sites)
    numbers = {site: i for i, site in enumerate(sites)}

    def rows(key: Callable[[Place], str]) -> dict[str, dict[str, Any]]:
        members: dict[str, list[int]] = {}
        for site, place in found.items():
            members.setdefault(key(place), []).append(numbers[site])
        return {name: row(sorted(each)) for name, each in members.items()}

    kinds, streams = rows(lambda place: place.kind), rows(lambda place: place.stream)
    return {
        "kinds": [{"kind": kind, "name": KINDS[kind], **kinds[kind]} for kind in KINDS if kind in kinds],
        "streams": [{"stream": name, "name": STREAMS[name], **streams[name]} for name in STREAMS if name in streams],
        "blocks": [{"name": name, **each} for name, each in rows(lambda place: place.block).items()],
        "sites": [
            {"name": site.name, "kind": site.kind, "place": str(found[site]), **row([i])} for site, i in numbers.items()
        ],
    }
