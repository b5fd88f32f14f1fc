"""What a reader is, and what is asked of any of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import weights_digest
from stereoclinic.prompts.axes import Axis

if TYPE_CHECKING:
    from stereoclinic.prompts.sets import Row


#: The class of everything that shows no group.
REST = "(no group)"


class Reader(Protocol):
    """All that `stereo bench` needs of a reader; a class of your own that has these three members is one.

    A reader may also have:

        features(images)   (n, 3, H, W) in [0, 1] -> (n, F), for Frechet distances
        by_person          True if `read` takes the person each picture is of as a second argument, see `read_rows`
        limits             sentences: what it cannot tell
        known_errors       `KnownError`s: how often it is wrong, where that was measured
        only_named         True if an axis's file must name the head, as a head of the axis's own name may mean another
    """

    name: str
    classes: dict[str, tuple[str, ...]]  # head, such as "gender" -> its classes

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> probabilities (n, classes) of each head."""
        ...


@dataclass(frozen=True)
class KnownError:
    """How often a reader is right, as measured elsewhere.

    Args:
        what: What was read, such as "gender".
        accuracy: Share of pictures it was right on, from 0 to 1.
        data: The pictures.
        source: Where the figure comes from.
    """

    what: str
    accuracy: float
    data: str
    source: str

    def __str__(self) -> str:
        return f"{self.what}: right on {self.accuracy:.1%} of {self.data} ({self.source})"


def head_of(reader: Any, axis: Axis) -> str | None:
    """The head that the axis names for this reader, else the one of its own name; None where that must be named."""
    return axis.reader.get(reader.name, None if getattr(reader, "only_named", False) else axis.name)


def group_columns(reader: Reader, axis: Axis) -> tuple[str, list[int]]:
    """The head that tells the groups of an axis apart, and the column of each group in what it gives.

    Raises:
        InputError: There is none, or it has no class for a group.
    """
    head = head_of(reader, axis)
    if head is None or head not in reader.classes:
        known = ", ".join(name for name in reader.classes if name != "occupation") or "none"
        raise InputError(
            f"reader {reader.name!r} cannot tell the groups of axis {axis.name!r} apart; axes it can read: {known}."
            " Give another --reader"
        )
    missing = [group for group in axis.groups if group not in reader.classes[head]]
    if missing:
        raise InputError(
            f"reader {reader.name!r} has no class for {', '.join(missing)}; {head!r} has"
            f" {', '.join(reader.classes[head])}"
        )
    return head, [reader.classes[head].index(group) for group in axis.groups]


def sees_none(reader: Reader, axis: Axis) -> bool:
    """Whether the reader can say that a picture shows no group: a class of the axis's head stands for none of them."""
    head, columns = group_columns(reader, axis)
    return len(reader.classes[head]) > len(columns)


def groups_seen(reader: Reader, axis: Axis, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What was seen of an axis's groups, and how surely it was none of them ("no face").

        reads_k  = m_k / sum_g m_g                          m: what the head gives, g over the groups
        no group = 1 - sum_g m_g / sum of all classes

    A picture counts by its reads, however little is left for the groups; `no group` says how little.

    Args:
        reader: Who read.
        axis: K groups.
        seen: What it read of n pictures, as `Reader.read` gives it.

    Returns:
        (n, K) probabilities of the groups, which sum to 1 (even ones where nothing is left for them), and (n,) the
        probability of no group, None from a reader that cannot say so.
    """
    head, columns = group_columns(reader, axis)
    shown = seen[head][:, columns]
    left = shown.sum(1, keepdim=True)
    if not sees_none(reader, axis):
        return shown / left, None
    none = 1 - left[:, 0] / seen[head].sum(1)
    return torch.where(left > 0, shown / left, 1 / len(columns)), none.clamp(0, 1)


def can_read(reader: Reader, axis: Axis) -> bool:
    """Whether the reader can tell the groups of an axis apart."""
    try:
        group_columns(reader, axis)
    except InputError:
        return False
    return True


def read_rows(reader: Any, images: Tensor, rows: "Sequence[Row]") -> dict[str, Tensor]:
    """`read`, with the person that each picture is of for a reader that asks in words ("a female doctor").

    Args:
        reader: Any reader.
        images: (n, 3, H, W) in [0, 1].
        rows: n prompts, with the column `label`.
    """
    persons = ([row["label"] for row in rows],) if getattr(reader, "by_person", False) else ()
    seen: dict[str, Tensor] = reader.read(images, *persons)
    return seen


def features_of(reader: Any, images: Tensor) -> Tensor | None:
    """(n, 3, H, W) in [0, 1] -> (n, F), or None from a reader that has no features."""
    return reader.features(images) if callable(getattr(reader, "features", None)) else None


def limits(reader: Any) -> tuple[str, ...]:
    """What the reader cannot tell, as sentences for a report; empty where it does not say."""
    return tuple(getattr(reader, "limits", ()))


def known_errors(reader: Any) -> tuple[KnownError, ...]:
    """How often the reader is wrong, as far as it was measured elsewhere; empty where it does not say."""
    return tuple(getattr(reader, "known_errors", ()))


def fingerprint(reader: Any) -> list[Any]:
    """Plain data that tells readers apart: names, classes, weights; of a user's own class no more can be known."""
    if reader is None:
        return []
    modules = {name: each for name, each in getattr(reader, "__dict__", {}).items() if isinstance(each, nn.Module)}
    return [
        reader.name,
        reader.classes,
        getattr(reader, "columns", None),  # of a classifier, that show each group
        {name: weights_digest(each) for name, each in modules.items()},
        [fingerprint(each) for each in getattr(reader, "readers", ())],
    ]
