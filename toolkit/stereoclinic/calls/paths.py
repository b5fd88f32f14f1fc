"""The files near a mask: the relevance that it was chosen from.

stereo locate    NAME.pt                                  and NAME.relevance.safetensors
stereo plan      NAME-allocated.pt, NAME-balanced.pt      beside those
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

PLANNED = ("-allocated", "-balanced")
_DIGESTS = ("unet_shapes", "unet_weights")


def relevance_file(stem: str) -> str:
    """The name that `stereo locate` gives to relevance, by the stem of its mask."""
    return f"{stem}.relevance.safetensors"


def relevance_near(mask: Path, groups: Sequence[str], model: Mapping[str, Any]) -> "tuple[Path, Relevance] | None":
    """The relevance beside a mask, and its file; None where there is none, or it is of something else.

    Args:
        mask: The mask's file.
        groups: Of the axis that is judged.
        model: Digests of the model that is judged, `unet_shapes` and `unet_weights`; the relevance must carry the same.
    """
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.errors import InputError

    for stem in dict.fromkeys([mask.stem, *map(mask.stem.removesuffix, PLANNED)]):
        path = mask.with_name(relevance_file(stem))
        if not path.is_file():
            continue
        try:
            found = Relevance.load(path)
        except InputError:
            continue
        same = all(found.metadata.get(digest) == model[digest] for digest in _DIGESTS)
        if same and tuple(found.groups) == tuple(groups):
            return path, found
    return None
